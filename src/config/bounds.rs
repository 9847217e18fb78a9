//! The bounds of each option: one table for the checks, the messages and the documents.

use std::time::Duration;

use super::units::Unit;

/// The name of an option and its bounds, in its base unit.
#[derive(Debug)]
pub(super) struct Bounds {
    /// The option, with its path in a file.
    pub(super) field: &'static str,
    unit: Unit,
    min: u64,
    max: u64,
}

/// An option's value, compared with its bounds.
#[derive(Debug)]
pub(super) struct Check {
    pub(super) field: &'static str,
    pub(super) value: String,
    pub(super) allowed: String,
    pub(super) is_allowed: bool,
}

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

const DAYS_3650: Duration = Duration::from_hours(24 * 3650);

pub(super) const LANES: Bounds = Bounds::count("lanes", 1, 1024);
pub(super) const LANE_RECORDS: Bounds = Bounds::power_of_two("lane_records", 64, 1 << 26);
pub(super) const SYNC_INTERVAL: Bounds = Bounds::time("sync_interval", ms(1), secs(60));
pub(super) const DRAIN_INTERVAL: Bounds =
    Bounds::time("drain_interval", Duration::from_micros(100), secs(1));
pub(super) const CLOCK_TICK: Bounds =
    Bounds::time("clock_tick", Duration::from_micros(100), ms(100));
pub(super) const JOURNAL_FILE_BYTES: Bounds = Bounds::bytes("journal_file_bytes", 64 * KIB, GIB);
pub(super) const SNAPSHOT_JOURNAL_BYTES: Bounds =
    Bounds::bytes("snapshot_journal_bytes", 64 * KIB, TIB);
pub(super) const SNAPSHOT_JOURNAL_PERCENT: Bounds =
    Bounds::percent("snapshot_journal_percent", 10, 1000);
pub(super) const UNSYNCED_BYTES_MAX: Bounds = Bounds::bytes("unsynced_bytes_max", MIB, 4 * GIB);
pub(super) const BACKPRESSURE_DEADLINE: Bounds =
    Bounds::time("backpressure_deadline", Duration::ZERO, Duration::from_hours(1));
pub(super) const CLOSED_WINDOW_RETENTION: Bounds =
    Bounds::time("closed_window_retention", Duration::ZERO, DAYS_3650);
pub(super) const COUNTERS_EXPECTED: Bounds = Bounds::count("counters_expected", 0, 1 << 32);
pub(super) const SHARDS: Bounds = Bounds::power_of_two("shards", 2, 1 << 16);
pub(super) const BACKLOG_DEGRADED_PERCENT: Bounds =
    Bounds::percent("backlog_degraded_percent", 1, 100);
pub(super) const CLOCK_JUMP_MAX: Bounds = Bounds::time("clock_jump_max", secs(1), DAYS_3650);
pub(super) const RESERVATIONS_MAX: Bounds = Bounds::count("reservations_max", 1, 1 << 24);
pub(super) const DEDUP_WINDOW: Bounds =
    Bounds::time("dedup_window", secs(1), Duration::from_hours(7 * 24));
pub(super) const DEDUP_MAX: Bounds = Bounds::count("dedup_max", 1, 1 << 28);

pub(super) const WORKER_COUNT: Bounds = Bounds::count("delivery.worker_count", 1, 64);
pub(super) const BATCH_SIZE: Bounds = Bounds::count("delivery.batch_size", 1, 1_000_000);
pub(super) const FLUSH_INTERVAL: Bounds =
    Bounds::time("delivery.flush_interval", ms(10), Duration::from_hours(1));
pub(super) const RETRY_ATTEMPTS: Bounds = Bounds::count("delivery.retry_attempts", 0, 100);
pub(super) const RETRY_DELAY: Bounds =
    Bounds::time("delivery.retry_delay", ms(1), Duration::from_hours(1));

impl Bounds {
    const fn count(field: &'static str, min: u64, max: u64) -> Self {
        Self { field, unit: Unit::Count, min, max }
    }

    const fn power_of_two(field: &'static str, min: u64, max: u64) -> Self {
        assert!(min.is_power_of_two() && max.is_power_of_two());
        Self { field, unit: Unit::PowerOfTwo, min, max }
    }

    const fn percent(field: &'static str, min: u64, max: u64) -> Self {
        Self { field, unit: Unit::Percent, min, max }
    }

    const fn bytes(field: &'static str, min: u64, max: u64) -> Self {
        Self { field, unit: Unit::Bytes, min, max }
    }

    const fn time(field: &'static str, min: Duration, max: Duration) -> Self {
        Self { field, unit: Unit::Time, min: nanoseconds(min), max: nanoseconds(max) }
    }

    /// Compares a value with the bounds.
    pub(super) fn check(&self, value: u64) -> Check {
        Check {
            field: self.field,
            value: self.unit.show(value),
            allowed: self.allowed(),
            is_allowed: self.allows(value),
        }
    }

    pub(super) fn check_time(&self, value: Duration) -> Check {
        self.check(nanoseconds(value))
    }

    pub(super) fn allows(&self, value: u64) -> bool {
        let in_shape = self.unit != Unit::PowerOfTwo || value.is_power_of_two();
        in_shape && (self.min..=self.max).contains(&value)
    }

    /// The bounds as text, in the units of the option.
    pub(super) fn allowed(&self) -> String {
        let shape = if self.unit == Unit::PowerOfTwo { "a power of two, " } else { "" };
        format!("{shape}{}..={}", self.unit.show(self.min), self.unit.show(self.max))
    }
}

#[cfg(feature = "config-file")]
impl Bounds {
    pub(super) fn unit(&self) -> Unit {
        self.unit
    }

    pub(super) fn min(&self) -> u64 {
        self.min
    }

    pub(super) fn max(&self) -> u64 {
        self.max
    }
}

/// Saturates: 2^64 nanoseconds are 584 years, beyond all bounds.
const fn nanoseconds(duration: Duration) -> u64 {
    duration.as_secs().saturating_mul(1_000_000_000).saturating_add(duration.subsec_nanos() as u64)
}

const fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

const fn secs(count: u64) -> Duration {
    Duration::from_secs(count)
}
