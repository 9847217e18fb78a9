//! Sizes and durations on the command line: a number with a unit, as in the configuration.

#[cfg(feature = "redis")]
use std::time::Duration;

/// Reads a size, in bytes.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let units = [("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30)];
    let expected = "expected a whole number of B, KiB, MiB or GiB, as in 64MiB";
    read(text, &units).ok_or_else(|| expected.to_owned())
}

/// Reads a duration.
#[cfg(feature = "redis")]
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let units = [("s", 1), ("m", 60), ("h", 3_600), ("d", 86_400)];
    let expected = "expected a whole number of s, m, h or d, as in 90d";
    read(text, &units).map(Duration::from_secs).ok_or_else(|| expected.to_owned())
}

fn read(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let (number, unit) = text.split_at(text.find(|char: char| !char.is_ascii_digit())?);
    let (_, scale) = units.iter().find(|(known, _)| *known == unit)?;
    number.parse::<u64>().ok()?.checked_mul(*scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_their_units() {
        assert_eq!(size("0B"), Ok(0));
        assert_eq!(size("64MiB"), Ok(64 << 20));
        for text in ["", "64", "MiB", "64MB", "64 MiB", "-1B", "1.5GiB", "18446744073709551615KiB"]
        {
            assert!(size(text).is_err_and(|told| told.contains("as in 64MiB")), "{text}");
        }
    }

    #[cfg(feature = "redis")]
    #[test]
    fn durations_are_read_with_their_units() {
        assert_eq!(duration("90d"), Ok(Duration::from_secs(90 * 24 * 3_600)));
        assert_eq!(duration("5m"), Ok(Duration::from_secs(300)));
        for text in ["", "90", "90D", "1h30m", "18446744073709551615d"] {
            assert!(duration(text).is_err_and(|told| told.contains("as in 90d")), "{text}");
        }
    }
}
