//! How long to wait before a failed delivery is retried.

use std::hash::BuildHasher;
use std::time::Duration;

use foldhash::fast::RandomState;

/// Attempts are never further apart than this, unless the first pause is longer.
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// The same for batches that are refused.
const REFUSED_PAUSE_MAX: Duration = Duration::from_mins(15);

/// The pause after this many failures in a row, at least one: drawn between nothing and the first
/// pause doubled with each failure, so that engines which lost the same database do not come back
/// to it all at once.
pub(super) fn pause(first: Duration, failures: u32) -> Duration {
    let bound = first
        .saturating_mul(1_u32.checked_shl(failures.saturating_sub(1)).unwrap_or(u32::MAX))
        .min(PAUSE_MAX.max(first));
    let random = RandomState::default().hash_one(failures) >> 32;
    let nanos = bound.as_nanos().saturating_mul(u128::from(random)) >> 32;
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// The pause after a failure that needs somebody to act; if a batch was refused, after this many
/// refusals in a row. It doubles with each: a database keeps what it rolls back of each attempt for
/// a while.
pub(super) fn pause_for_help(first: Duration, refusals: u32) -> Duration {
    let shortest = PAUSE_MAX.max(first);
    let doubled = 1_u32.checked_shl(refusals.saturating_sub(1)).unwrap_or(u32::MAX);
    shortest.saturating_mul(doubled).min(REFUSED_PAUSE_MAX.max(first))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_are_spread_and_have_a_cap() {
        let first = Duration::from_millis(100);
        for (failures, bound) in [(1, 100), (2, 200), (5, 1600), (40, 30_000), (u32::MAX, 30_000)] {
            let bound = Duration::from_millis(bound);
            let pauses: Vec<_> = (0..200).map(|_| pause(first, failures)).collect();
            assert!(pauses.iter().all(|&pause| pause < bound), "{failures}: {pauses:?}");
            assert!(pauses.iter().any(|&pause| pause > bound / 2), "{failures}: {pauses:?}");
            assert!(pauses.iter().any(|&pause| pause < bound / 2), "{failures}: {pauses:?}");
        }
        let hour = Duration::from_secs(3600);
        assert!(pause(hour, 9) < hour);
        assert_eq!(pause_for_help(hour, 9), hour);
    }

    #[test]
    fn pauses_after_refusals_double_up_to_a_quarter_of_an_hour() {
        let first = Duration::from_millis(100);
        let seconds = |refusals| pause_for_help(first, refusals).as_secs();
        let refusals = [0, 1, 2, 3, 5, 6, 31, 32, 33, u32::MAX];
        assert_eq!(refusals.map(seconds), [30, 30, 60, 120, 480, 900, 900, 900, 900, 900]);
    }
}
