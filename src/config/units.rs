//! Values with units as text: `100ms`, `64MiB`.

/// What the base unit of an option counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    Count,
    PowerOfTwo,
    Percent,
    Bytes,
    /// Counted in nanoseconds.
    Time,
}

type Suffix = (&'static str, u64);

const NANOSECONDS_PER_MS: u64 = 1_000_000;

/// Largest first.
const TIME_SUFFIXES: [Suffix; 7] = [
    ("d", 24 * 3_600_000 * NANOSECONDS_PER_MS),
    ("h", 3_600_000 * NANOSECONDS_PER_MS),
    ("m", 60_000 * NANOSECONDS_PER_MS),
    ("s", 1000 * NANOSECONDS_PER_MS),
    ("ms", NANOSECONDS_PER_MS),
    ("us", 1000),
    ("ns", 1),
];

/// Largest first.
const SIZE_SUFFIXES: [Suffix; 5] =
    [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

impl Unit {
    /// The value in the largest unit that leaves it whole.
    pub(super) fn show(self, value: u64) -> String {
        let suffixes = self.suffixes();
        if value == 0 && self == Self::Time {
            return "0s".to_owned();
        }
        match suffixes.iter().find(|(_, scale)| value.is_multiple_of(*scale)) {
            Some((suffix, scale)) if value > 0 => format!("{}{suffix}", value / scale),
            _ => value.to_string(),
        }
    }

    fn suffixes(self) -> &'static [Suffix] {
        match self {
            Self::Count | Self::PowerOfTwo | Self::Percent => &[],
            Self::Bytes => &SIZE_SUFFIXES,
            Self::Time => &TIME_SUFFIXES,
        }
    }
}

#[cfg(feature = "config-file")]
impl Unit {
    /// Reads numbers with suffixes, one or several that are added: `100ms`, `1h 30m`. `None` for
    /// anything else, and beyond 64 bits.
    pub(super) fn read(self, text: &str) -> Option<u64> {
        let mut rest = text.trim();
        if rest.is_empty() {
            return None;
        }
        let mut total = 0_u64;
        while !rest.is_empty() {
            let (number, after) = split_where(rest, |char| !char.is_ascii_digit());
            let (suffix, after) =
                split_where(after.trim_start(), |char| !char.is_ascii_alphabetic());
            let (_, scale) = self.suffixes().iter().find(|(known, _)| *known == suffix)?;
            let part = number.parse::<u64>().ok()?.checked_mul(*scale)?;
            total = total.checked_add(part)?;
            rest = after.trim_start();
        }
        Some(total)
    }

    /// What a plain number counts in a file, in base units: milliseconds for a time.
    pub(super) fn plain_number(self, number: u64) -> Option<u64> {
        match self {
            Self::Time => number.checked_mul(NANOSECONDS_PER_MS),
            Self::Count | Self::PowerOfTwo | Self::Percent | Self::Bytes => Some(number),
        }
    }

    /// How a value is written in a file, where that is not plain.
    pub(super) fn notation(self) -> &'static str {
        match self {
            Self::Count | Self::PowerOfTwo | Self::Percent => "",
            Self::Bytes => ", written as \"64MiB\" or as a number of bytes",
            Self::Time => ", written as \"100ms\" or as a number of milliseconds",
        }
    }
}

#[cfg(feature = "config-file")]
fn split_where(text: &str, is_end: impl Fn(char) -> bool) -> (&str, &str) {
    text.split_at(text.find(is_end).unwrap_or(text.len()))
}

#[cfg(all(test, feature = "config-file"))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn values_are_shown_in_the_largest_whole_unit() {
        assert_eq!(Unit::Time.show(0), "0s");
        assert_eq!(Unit::Time.show(100_000), "100us");
        assert_eq!(Unit::Time.show(1_000_000_000), "1s");
        assert_eq!(Unit::Time.show(90_000_000_000), "90s");
        assert_eq!(Unit::Time.show(24 * 3_600_000_000_000), "1d");
        assert_eq!(Unit::Bytes.show(64 << 10), "64KiB");
        assert_eq!(Unit::Bytes.show((1 << 30) + 1), "1073741825B");
        assert_eq!(Unit::Percent.show(80), "80");
    }

    #[test]
    fn text_is_read_with_its_units() {
        assert_eq!(Unit::Time.read("100ms"), Some(100_000_000));
        assert_eq!(Unit::Time.read(" 1h 30m "), Some(5_400_000_000_000));
        assert_eq!(Unit::Time.read("1m500us"), Some(60_000_500_000));
        assert_eq!(Unit::Bytes.read("64 MiB"), Some(64 << 20));
    }

    #[test]
    fn other_text_is_refused() {
        for text in ["", " ", "5", "s", "-1s", "1.5s", "1 parsec", "1S", "1s,", "s1", "5MiB"] {
            assert_eq!(Unit::Time.read(text), None, "{text:?}");
        }
        for text in ["64MB", "64mib", "64M", "20000000TiB", "99999999999999999999B", "3s"] {
            assert_eq!(Unit::Bytes.read(text), None, "{text:?}");
        }
        assert_eq!(Unit::Count.read("7"), None);
    }

    proptest! {
        #[test]
        fn what_is_shown_is_read_back(value: u64, zeros in 0_u32..60) {
            let value = value >> zeros << zeros;
            prop_assert_eq!(Unit::Time.read(&Unit::Time.show(value)), Some(value));
            if value > 0 {
                prop_assert_eq!(Unit::Bytes.read(&Unit::Bytes.show(value)), Some(value));
            }
        }

        #[test]
        fn no_text_panics(text: String) {
            let _ = (Unit::Time.read(&text), Unit::Bytes.read(&text));
        }
    }
}
