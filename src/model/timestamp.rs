//! Points in time.

use std::fmt;
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

#[cfg(test)]
mod tests {
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
