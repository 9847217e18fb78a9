//! Windows: how usage is divided into periods that start from zero.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use super::civil::Date;
use super::timestamp::MS_PER_DAY;
use super::{Timestamp, WindowStart};

const MS_PER_MINUTE: i64 = 60 * 1000;
const MS_PER_HOUR: i64 = 60 * MS_PER_MINUTE;

/// The shortest [`Window::Every`].
pub(super) const EVERY_MIN: Duration = Duration::from_secs(1);
/// The longest [`Window::Every`]: 100 years of 365.25 days.
pub(super) const EVERY_MAX: Duration = Duration::from_secs(36_525 * 24 * 60 * 60);
/// The largest distance from UTC that is in use, in minutes.
pub(super) const UTC_OFFSET_MINUTES_MAX: i16 = 14 * 60;

// Every timestamp can be the start of a window.
const _: () = assert!(Timestamp::MAX.as_unix_millis() <= WindowStart::MAX.0);

/// The period that a quota counts over. At its end, usage starts from zero again.
///
/// Periods are those of local time at the quota's UTC offset, which is fixed: there is no daylight
/// saving time. A period that would begin before 1970 begins with 1970, and one that would end
/// after the year 9999 never ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Window {
    /// Usage is never reset.
    Lifetime,
    /// A minute of the clock.
    Minute,
    /// An hour of the clock.
    Hour,
    /// From midnight to midnight.
    Day,
    /// From the first of a month to the first of the next.
    Month,
    /// From January 1 to January 1.
    Year,
    /// Back-to-back periods of this length, the first beginning at 1970-01-01 00:00 local time.
    /// Whole milliseconds, from 1 second to 36,525 days (100 years).
    Every(Duration),
}

const NAMES: [(&str, Window); 6] = [
    ("lifetime", Window::Lifetime),
    ("minute", Window::Minute),
    ("hour", Window::Hour),
    ("day", Window::Day),
    ("month", Window::Month),
    ("year", Window::Year),
];

/// Its name in lower case, as in the HTTP API, or its length: `day`, `every 90000ms`.
impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Every(length) => write!(f, "every {}ms", length.as_millis()),
            named => {
                let name = NAMES.iter().find(|(_, window)| window == named);
                f.write_str(name.map_or("", |(name, _)| name))
            }
        }
    }
}

/// From what `Display` writes. How long a window may be is checked where a quota is defined.
///
/// ```
/// use std::time::Duration;
/// use tollgate::Window;
///
/// assert_eq!("month".parse(), Ok(Window::Month));
/// assert_eq!("every 90000ms".parse(), Ok(Window::Every(Duration::from_secs(90))));
/// ```
impl FromStr for Window {
    type Err = ParseWindowError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some((_, window)) = NAMES.iter().find(|(name, _)| *name == text) {
            return Ok(*window);
        }
        let millis = text.strip_prefix("every ").and_then(|text| text.strip_suffix("ms"));
        // `parse` takes a sign.
        let millis = millis.filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
        let length = millis.and_then(|text| text.parse().ok()).map(Duration::from_millis);
        length.map(Self::Every).ok_or(ParseWindowError(()))
    }
}

/// A text that is no window.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a window is lifetime, minute, hour, day, month, year, or as in every 90000ms")]
pub struct ParseWindowError(());

/// A window at an offset from UTC: cuts time into spans. Always valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Calendar {
    window: Window,
    utc_offset_minutes: i16,
}

/// One period of a window: from `start` up to, not including, `end`. Without an end it lasts
/// forever.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) start: WindowStart,
    pub(crate) end: Option<Timestamp>,
}

impl Calendar {
    /// Checks the bounds; the error says what is wrong.
    pub(crate) fn new(window: Window, utc_offset_minutes: i16) -> Result<Self, String> {
        if let Window::Every(length) = window {
            if !(EVERY_MIN..=EVERY_MAX).contains(&length) {
                return Err(format!(
                    "its window is {length:?} long, allowed: {EVERY_MIN:?}..={EVERY_MAX:?}"
                ));
            }
            if length.subsec_nanos() % 1_000_000 != 0 {
                return Err(format!("its window is {length:?} long, not whole milliseconds"));
            }
        }
        if utc_offset_minutes.unsigned_abs() > UTC_OFFSET_MINUTES_MAX.unsigned_abs() {
            return Err(format!(
                "its UTC offset is {utc_offset_minutes} minutes, \
                 allowed: -{UTC_OFFSET_MINUTES_MAX}..={UTC_OFFSET_MINUTES_MAX}"
            ));
        }
        Ok(Self { window, utc_offset_minutes })
    }

    pub(crate) fn window(&self) -> Window {
        self.window
    }

    pub(crate) fn utc_offset_minutes(&self) -> i16 {
        self.utc_offset_minutes
    }

    /// The period that holds `at`. Consecutive periods have ascending starts and leave no gaps.
    pub(crate) fn span_at(&self, at: Timestamp) -> Span {
        let offset = i64::from(self.utc_offset_minutes) * MS_PER_MINUTE;
        let local = at.as_unix_millis().cast_signed() + offset;
        let (start, end) = match self.window {
            Window::Lifetime => return Span { start: WindowStart(0), end: None },
            Window::Minute => period(local, MS_PER_MINUTE),
            Window::Hour => period(local, MS_PER_HOUR),
            Window::Day => period(local, MS_PER_DAY),
            Window::Month => {
                let date = date(local);
                (midnight(date.month_start()), midnight(date.next_month_start()))
            }
            Window::Year => {
                let date = date(local);
                (midnight(date.year_start()), midnight(date.next_year_start()))
            }
            Window::Every(length) => period(local, whole_millis(length)),
        };
        // The end is after `at`, so it can't be negative; the start can, in the first period only.
        let end = (end - offset).cast_unsigned();
        Span {
            start: WindowStart((start - offset).max(0).cast_unsigned()),
            end: (end <= Timestamp::MAX.as_unix_millis()).then(|| Timestamp::from_unix_millis(end)),
        }
    }

    /// The end of the period that starts at `start`; `None` when it lasts forever.
    pub(crate) fn end_of(&self, start: WindowStart) -> Option<Timestamp> {
        self.span_at(Timestamp::from_unix_millis(start.0)).end
    }
}

/// The period of a fixed length around `local`, counted from 1970.
fn period(local: i64, length: i64) -> (i64, i64) {
    let start = local - local.rem_euclid(length);
    (start, start + length)
}

fn date(local: i64) -> Date {
    Date::from_days(local.div_euclid(MS_PER_DAY))
}

fn midnight(date: Date) -> i64 {
    date.to_days() * MS_PER_DAY
}

/// The length in milliseconds, which `Calendar::new` has bounded.
fn whole_millis(length: Duration) -> i64 {
    i64::try_from(length.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
