//! Points in time.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::civil::Date;

pub(super) const MS_PER_DAY: i64 = 24 * 60 * 60 * 1000;

/// A point in time: whole milliseconds since 1970-01-01 00:00 UTC, leap seconds not counted.
///
/// Times outside [`Timestamp::MIN`]..=[`Timestamp::MAX`] are clamped to the nearer end, so that
/// every window that a timestamp lies in can be represented.
///
/// ```
/// use tollgate::Timestamp;
///
/// let time = Timestamp::from_unix_millis(1_767_323_045_678);
/// assert_eq!(time.to_string(), "2026-01-02T03:04:05.678Z");
/// assert_eq!("2026-01-02T04:04:05.678+01:00".parse(), Ok(time));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(u64);

impl Timestamp {
    /// 1970-01-01T00:00:00.000Z.
    pub const MIN: Self = Self(0);

    /// 9999-12-31T23:59:59.999Z.
    pub const MAX: Self = Self(253_402_300_799_999);

    /// The time that is `millis` milliseconds after 1970-01-01 00:00 UTC, at most
    /// [`Timestamp::MAX`].
    #[must_use]
    pub const fn from_unix_millis(millis: u64) -> Self {
        if millis > Self::MAX.0 { Self::MAX } else { Self(millis) }
    }

    /// [`from_unix_millis`](Self::from_unix_millis), for a value that came from a timestamp.
    #[inline(always)]
    pub(crate) const fn of_millis(millis: u64) -> Self {
        debug_assert!(millis <= Self::MAX.0);
        Self(millis)
    }

    /// The milliseconds since 1970-01-01 00:00 UTC.
    #[must_use]
    pub const fn as_unix_millis(self) -> u64 {
        self.0
    }

    /// The time from `other` to `self`; zero when `other` is later.
    #[must_use]
    pub const fn saturating_sub(self, other: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(other.0))
    }

    /// The time `duration` later, in whole milliseconds rounded down, at most [`Timestamp::MAX`].
    #[must_use]
    pub fn saturating_add(self, duration: Duration) -> Self {
        // It begins with a whole millisecond, so that what is beyond one is the duration's.
        let later = u128::from(self.0) + duration.as_millis();
        u64::try_from(later).map_or(Self::MAX, Self::from_unix_millis)
    }

    /// The time that is `duration` after 1970-01-01 00:00 UTC, rounded down.
    pub(crate) fn from_since_1970(duration: Duration) -> Self {
        u64::try_from(duration.as_millis()).map_or(Self::MAX, Self::from_unix_millis)
    }
}

impl From<SystemTime> for Timestamp {
    /// Rounds down to whole milliseconds and clamps to [`Timestamp::MIN`]..=[`Timestamp::MAX`].
    fn from(time: SystemTime) -> Self {
        time.duration_since(UNIX_EPOCH).map_or(Self::MIN, Self::from_since_1970)
    }
}

impl From<Timestamp> for SystemTime {
    fn from(time: Timestamp) -> Self {
        UNIX_EPOCH + Duration::from_millis(time.0)
    }
}

/// RFC 3339 in UTC, with milliseconds.
impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = self.0.cast_signed();
        let Date { year, month, day } = Date::from_days(millis / MS_PER_DAY);
        let of_day = millis % MS_PER_DAY;
        let (seconds, milli) = (of_day / 1000, of_day % 1000);
        let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{milli:03}Z")
    }
}

/// From RFC 3339, with any offset from UTC: `2026-01-02T03:04:05.678Z`,
/// `2026-01-02T05:04:05+02:00`. Digits beyond the milliseconds are cut off, a leap second is the
/// first second after it, and times out of range are clamped.
impl FromStr for Timestamp {
    type Err = ParseTimestampError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let millis = millis_since_1970(text.as_bytes()).ok_or(ParseTimestampError(()))?;
        Ok(u64::try_from(millis).map_or(Self::MIN, Self::from_unix_millis))
    }
}

/// A text that is no time of RFC 3339.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a time is written as 2026-01-02T03:04:05.678Z, or with an offset as in +01:00 for the Z")]
pub struct ParseTimestampError(());

/// What RFC 3339 means, below 0 for a time before 1970; `None` for another text.
fn millis_since_1970(text: &[u8]) -> Option<i64> {
    let (date_and_time, mut rest) = text.split_at_checked(19)?;
    let &[y1, y2, y3, y4, b'-', m1, m2, b'-', d1, d2, b'T' | b't', ref time @ ..] = date_and_time
    else {
        return None;
    };
    let &[h1, h2, b':', n1, n2, b':', s1, s2] = time else { return None };
    let date = Date {
        year: number(&[y1, y2, y3, y4])?,
        month: number(&[m1, m2])?,
        day: number(&[d1, d2])?,
    };
    let (hour, minute, second) = (number(&[h1, h2])?, number(&[n1, n2])?, number(&[s1, s2])?);
    // A day that its month does not have would be one of the next.
    if !(1..=12).contains(&date.month) || Date::from_days(date.to_days()) != date {
        return None;
    }
    let mut milli = 0;
    if let Some(fraction) = rest.strip_prefix(b".") {
        let digits = fraction.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let (fraction, after) = fraction.split_at_checked(digits)?;
        let mut padded = *b"000";
        padded.iter_mut().zip(fraction).for_each(|(to, digit)| *to = *digit);
        (milli, rest) = (number(&padded)?, after);
        if digits == 0 {
            return None;
        }
    }
    let offset_minutes = match *rest {
        [b'Z' | b'z'] => 0,
        [sign @ (b'+' | b'-'), h1, h2, b':', m1, m2] => {
            let (hours, minutes) = (number(&[h1, h2])?, number(&[m1, m2])?);
            if hours > 23 || minutes > 59 {
                return None;
            }
            let offset = 60 * hours + minutes;
            if sign == b'+' { offset } else { -offset }
        }
        _ => return None,
    };
    let minute_of_day = 60 * hour + minute - offset_minutes;
    let is_leap_second = second == 60 && minute_of_day.rem_euclid(24 * 60) == 24 * 60 - 1;
    if hour > 23 || minute > 59 || second > 59 && !is_leap_second {
        return None;
    }
    let of_day = (60 * minute_of_day + second) * 1000;
    Some(date.to_days() * MS_PER_DAY + of_day + milli)
}

/// Of digits, and nothing else.
fn number(digits: &[u8]) -> Option<i64> {
    digits.iter().try_fold(0, |number, &digit| {
        digit.is_ascii_digit().then(|| number * 10 + i64::from(digit - b'0'))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn it_prints_rfc_3339() {
        let cases = [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399_999, "2000-02-28T23:59:59.999Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
            (u64::MAX, "9999-12-31T23:59:59.999Z"),
        ];
        for (millis, expected) in cases {
            assert_eq!(Timestamp::from_unix_millis(millis).to_string(), expected);
        }
    }

    #[test]
    fn rfc_3339_is_read() {
        let read = |text: &str| text.parse::<Timestamp>().ok().map(Timestamp::as_unix_millis);
        for (text, millis) in [
            ("1970-01-01T00:00:00Z", 0),
            ("2026-01-02T03:04:05.678Z", 1_767_323_045_678),
            ("2026-01-02t03:04:05.678999999z", 1_767_323_045_678),
            ("2026-01-02T03:04:05.6Z", 1_767_323_045_600),
            ("2026-01-02T08:49:05.678+05:45", 1_767_323_045_678),
            ("2026-01-01T20:04:05.678-07:00", 1_767_323_045_678),
            ("2000-02-29T00:00:00-00:00", 951_782_400_000),
            // Leap seconds, as the clocks of systems count them.
            ("2016-12-31T23:59:60.5Z", 1_483_228_800_500),
            ("1990-12-31T15:59:60-08:00", 662_688_000_000),
            // Clamped.
            ("1969-12-31T23:59:59Z", 0),
            ("1970-01-01T00:30:00+01:00", 0),
            ("0000-01-01T00:00:00Z", 0),
            ("9999-12-31T23:59:59-23:59", Timestamp::MAX.as_unix_millis()),
        ] {
            assert_eq!(read(text), Some(millis), "{text}");
        }
        for text in [
            "",
            "2026-01-02",
            "2026-01-02T03:04:05",
            "2026-01-02 03:04:05Z",
            "2026-01-02T03:04:05.Z",
            "2026-01-02T03:04:05,5Z",
            "2026-01-02T03:04:05Z ",
            "2026-01-02T03:04Z",
            "+026-01-02T03:04:05Z",
            "2026-1-02T03:04:05Z",
            "2026-00-02T03:04:05Z",
            "2026-13-02T03:04:05Z",
            "2026-02-29T03:04:05Z",
            "2026-01-00T03:04:05Z",
            "2026-01-02T24:00:00Z",
            "2026-01-02T03:60:05Z",
            "2026-01-02T03:04:60Z",
            "2026-01-02T03:04:05+24:00",
            "2026-01-02T03:04:05+01:60",
            "2026-01-02T03:04:05+0100",
            "2026-01-02T03:04:05\u{661}Z",
        ] {
            assert_eq!(read(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read_back(millis in 0..=Timestamp::MAX.0) {
            let time = Timestamp::from_unix_millis(millis);
            prop_assert_eq!(time.to_string().parse(), Ok(time));
        }

        #[test]
        fn no_text_panics(text: String) {
            let _ = text.parse::<Timestamp>();
        }
    }

    #[test]
    fn system_times_out_of_range_are_clamped() {
        let before = UNIX_EPOCH - Duration::from_secs(1);
        assert_eq!(Timestamp::from(before), Timestamp::MIN);
        let beyond = SystemTime::from(Timestamp::MAX) + Duration::from_secs(1);
        assert_eq!(Timestamp::from(beyond), Timestamp::MAX);
        let last = Timestamp::MAX.as_unix_millis();
        assert_eq!(Timestamp::from_unix_millis(last + 1), Timestamp::MAX);
        assert_eq!(Timestamp::from_unix_millis(last - 1).as_unix_millis(), last - 1);
        let between = Timestamp::from_unix_millis(1_767_323_045_678);
        let rounded = SystemTime::from(between) + Duration::from_micros(999);
        assert_eq!(Timestamp::from(rounded), between);
    }

    #[test]
    fn arithmetic_saturates() {
        let (early, late) = (Timestamp::from_unix_millis(1000), Timestamp::from_unix_millis(1250));
        assert_eq!(late.saturating_sub(early), Duration::from_millis(250));
        assert_eq!(early.saturating_sub(late), Duration::ZERO);
        assert_eq!(early.saturating_add(Duration::from_micros(250_999)), late);
        assert_eq!(early.saturating_add(Duration::MAX), Timestamp::MAX);
    }
}
