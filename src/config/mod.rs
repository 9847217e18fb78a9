//! The configuration: one value, validated once, when the engine opens.

mod bounds;
mod delivery;
#[cfg(feature = "config-file")]
mod file;
mod units;

use std::fmt;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

pub use self::delivery::DeliveryConfig;

use self::bounds::Check;
use crate::clock::{Clock, SystemClock};
use crate::error::{Error, Result};
use crate::ledger::Remembering;

/// How the engine runs.
///
/// Start from [`Config::default`] or from a preset, change what should differ, and open the engine
/// with it. A value out of its bounds then fails the open with [`Error::InvalidConfig`];
/// [`validate`](Self::validate) says so before.
/// `docs/configuration.md` has all options in one table.
///
/// ```
/// use std::time::Duration;
/// use tollgate::{Backpressure, Config};
///
/// let config = Config::low_latency()
///     .sync_interval(Duration::from_millis(50))
///     .backpressure(Backpressure::AdmitUnlogged);
/// ```
#[derive(Debug, Clone)]
#[must_use = "a configuration has no effect until an engine is opened with it"]
pub struct Config {
    pub(crate) lanes: usize,
    pub(crate) lane_records: u64,
    pub(crate) sync_interval: Duration,
    pub(crate) drain_interval: Duration,
    pub(crate) clock_tick: Duration,
    pub(crate) journal_file_bytes: u64,
    pub(crate) snapshot_journal_bytes: u64,
    pub(crate) snapshot_journal_percent: u32,
    pub(crate) unsynced_bytes_max: u64,
    pub(crate) backpressure_deadline: Duration,
    pub(crate) backpressure: Backpressure,
    pub(crate) closed_window_retention: Duration,
    pub(crate) counters_expected: usize,
    pub(crate) shards: usize,
    pub(crate) durable_consumes: bool,
    pub(crate) backlog_degraded_percent: u32,
    pub(crate) clock_jump_max: Duration,
    pub(crate) reservations_max: usize,
    pub(crate) dedup_window: Duration,
    pub(crate) dedup_max: usize,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) delivery: DeliveryConfig,
}

/// What happens to a call when the log still has no room after the
/// [`backpressure_deadline`](Config::backpressure_deadline). Nothing is ever dropped silently.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
#[non_exhaustive]
pub enum Backpressure {
    /// The call fails with [`Error::Backpressure`], and nothing was counted.
    #[default]
    Reject,
    /// The operation is carried out in memory and is not logged: it is lost at the next open, even
    /// after a clean [`close`](crate::Tollgate::close), and sinks never get it. Statistics count
    /// such operations and health reports them. For services where a wrong count is better than a
    /// refused request.
    ///
    /// This applies to `consume`, `try_consume`, each item of `consume_batch`, and `record` of an
    /// event without a request id while no sink wants events. Those among them that wait for the
    /// disk return [`Error::NotLogged`] then. All other operations fail with
    /// [`Error::Backpressure`] all the same, and so does any operation on a further counter once
    /// 262,144 counters hold unlogged units.
    AdmitUnlogged,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            lanes: (2 * parallelism()).clamp(4, 64),
            lane_records: 1 << 20,
            sync_interval: Duration::from_millis(100),
            drain_interval: Duration::from_millis(2),
            clock_tick: Duration::from_millis(1),
            journal_file_bytes: 32 << 20,
            snapshot_journal_bytes: 64 << 20,
            snapshot_journal_percent: 100,
            unsynced_bytes_max: 64 << 20,
            backpressure_deadline: Duration::from_secs(1),
            backpressure: Backpressure::Reject,
            closed_window_retention: Duration::from_hours(24),
            counters_expected: 0,
            shards: 1024,
            durable_consumes: false,
            backlog_degraded_percent: 80,
            clock_jump_max: Duration::from_mins(1),
            reservations_max: 100_000,
            dedup_window: Duration::from_mins(10),
            dedup_max: 1_000_000,
            clock: Arc::new(SystemClock),
            delivery: DeliveryConfig::default(),
        }
    }
}

/// Presets.
impl Config {
    /// For very many threads and users.
    ///
    /// - `lanes`: 4 for each processor, 16 to 256, so that a thread finds a free lane at its first
    ///   try; `lane_records` is 2^18, so that the rings together are no larger than by default.
    /// - `shards`: 8192, so that two threads seldom use the same one.
    /// - `unsynced_bytes_max` and `snapshot_journal_bytes`: 256 MiB, since batches with many
    ///   counters are large.
    /// - `delivery.worker_count`: 8.
    pub fn high_concurrency() -> Self {
        Self {
            lanes: (4 * parallelism()).clamp(16, 256),
            lane_records: 1 << 18,
            shards: 8192,
            unsynced_bytes_max: 256 << 20,
            snapshot_journal_bytes: 256 << 20,
            delivery: DeliveryConfig::default().worker_count(8),
            ..Self::default()
        }
    }

    /// For callers that can't wait.
    ///
    /// - `lane_records`: 2^21, so that it takes longer until callers feel a slow disk. The rings
    ///   take up twice the default's room on disk: 256 MiB on 2 processors, 4 GiB on 32.
    /// - `drain_interval`: 5 ms, so that the drainer stays off the cache lines that callers have
    ///   just written.
    /// - `backpressure_deadline`: 10 ms, so that calls are answered soon when the log is full.
    /// - `counters_expected`: 2^20, so that the map is not grown while it is in use.
    /// - `snapshot_journal_percent`: 200, for half as many merges, at the price of a recovery that
    ///   reads more.
    pub fn low_latency() -> Self {
        Self {
            lane_records: 1 << 21,
            drain_interval: Duration::from_millis(5),
            backpressure_deadline: Duration::from_millis(10),
            counters_expected: 1 << 20,
            snapshot_journal_percent: 200,
            ..Self::default()
        }
    }

    /// For counts that should survive nearly everything without each call waiting for the disk; for
    /// those that must survive everything, use the `_sync` calls or
    /// [`durable_consumes`](Self::durable_consumes).
    ///
    /// - `sync_interval`: 10 ms, so that a power cut loses at most that plus one sync's duration;
    ///   `drain_interval` is 1 ms.
    /// - `backpressure_deadline`: 10 s, so that a call waits out a slow disk rather than fail.
    /// - `backlog_degraded_percent`: 50, for an earlier warning.
    /// - `closed_window_retention`: 7 days, for questions that come later.
    /// - `delivery`: `flush_interval` 1 s, 10 `retry_attempts`.
    pub fn high_reliability() -> Self {
        Self {
            sync_interval: Duration::from_millis(10),
            drain_interval: Duration::from_millis(1),
            backpressure_deadline: Duration::from_secs(10),
            backlog_degraded_percent: 50,
            closed_window_retention: Duration::from_hours(7 * 24),
            delivery: DeliveryConfig::default()
                .flush_interval(Duration::from_secs(1))
                .retry_attempts(10),
            ..Self::default()
        }
    }
}

/// Options. Each names its default, its minimum and its maximum.
impl Config {
    /// How many rings callers log to. Each thread keeps one to itself, so more lanes than threads
    /// are of no use; with fewer, threads share them, and each operation costs some nanoseconds
    /// more. Default: 2 per processor, at least 4 and at most 64; 1 to 1024.
    pub fn lanes(mut self, lanes: usize) -> Self {
        self.lanes = lanes;
        self
    }

    /// The capacity of each ring in records of 32 bytes, a power of two. A ring must hold what a
    /// thread logs while the drainer is held up, and takes up its whole size in the data directory
    /// from the open on: with the default number of [`lanes`](Self::lanes) that is 128 MiB in all
    /// on 2 processors, and 2 GiB on 32. Default 2^20 (32 MiB), one second of log at a million
    /// consumes per second and lane; 64 to 2^26.
    pub fn lane_records(mut self, records: u64) -> Self {
        self.lane_records = records;
        self
    }

    /// How often a sync starts. Everything acknowledged before the start of the last completed sync
    /// survives loss of power, so a power cut loses at most this plus one sync's duration. Default
    /// 100 milliseconds; 1 millisecond to 60 seconds.
    pub fn sync_interval(mut self, interval: Duration) -> Self {
        self.sync_interval = interval;
        self
    }

    /// How often the drainer checks the rings for new records. While there are none it backs off,
    /// to 8 times this. A shorter interval keeps the rings emptier, a longer one keeps the drainer
    /// out of the callers' way. Default 2 milliseconds; 100 microseconds to 1 second.
    pub fn drain_interval(mut self, interval: Duration) -> Self {
        self.drain_interval = interval;
        self
    }

    /// How often the clock that callers read is advanced. A window may be entered late by this
    /// much, but no call is denied without reading the real clock. Default 1 millisecond; 100
    /// microseconds to 100 milliseconds.
    pub fn clock_tick(mut self, tick: Duration) -> Self {
        self.clock_tick = tick;
        self
    }

    /// The size of one journal file, written in advance and reused. A batch must fit in it whatever
    /// the number of lanes, so the engine raises it to at least 264 bytes for each of the
    /// [`lanes`](Self::lanes), rounded up to 4 KiB. At 128 files the journal is merged regardless
    /// of the two options below, since an open looks into every file. Default 32 MiB; 64 KiB to 1
    /// GiB.
    pub fn journal_file_bytes(mut self, bytes: u64) -> Self {
        self.journal_file_bytes = bytes;
        self
    }

    /// The journal is merged into a new snapshot when it is larger than this *and* than
    /// [`snapshot_journal_percent`](Self::snapshot_journal_percent) allows. A smaller value makes
    /// recovery faster, and more is written. Default 64 MiB; 64 KiB to 1 TiB.
    pub fn snapshot_journal_bytes(mut self, bytes: u64) -> Self {
        self.snapshot_journal_bytes = bytes;
        self
    }

    /// How large the journal may grow before the next snapshot, in percent of the last one's size.
    /// With 100, each byte of journal costs at most two bytes of snapshot writes. Default 100; 10
    /// to 1000.
    pub fn snapshot_journal_percent(mut self, percent: u32) -> Self {
        self.snapshot_journal_percent = percent;
        self
    }

    /// How many bytes of batches are kept in memory until a sync covers them, so that they can be
    /// written again when a sync fails. Beyond this, draining pauses. Default 64 MiB; 1 MiB to 4
    /// GiB.
    pub fn unsynced_bytes_max(mut self, bytes: u64) -> Self {
        self.unsynced_bytes_max = bytes;
        self
    }

    /// The longest that a call waits for room in the log before
    /// [`backpressure`](Self::backpressure) applies. Default 1 second; 0 (at once) to 1 hour.
    pub fn backpressure_deadline(mut self, deadline: Duration) -> Self {
        self.backpressure_deadline = deadline;
        self
    }

    /// What happens to a call when the log has no room. Default: [`Backpressure::Reject`].
    pub fn backpressure(mut self, policy: Backpressure) -> Self {
        self.backpressure = policy;
        self
    }

    /// How long the sums of windows that have ended stay in the snapshot. Sinks that lag get them
    /// in any case. Default 1 day; 0 to 3650 days.
    pub fn closed_window_retention(mut self, retention: Duration) -> Self {
        self.closed_window_retention = retention;
        self
    }

    /// For how many counters (one per user and quota) memory is reserved when the engine opens, so
    /// that the map need not grow under load. Default 0; 0 to 2^32.
    pub fn counters_expected(mut self, counters: usize) -> Self {
        self.counters_expected = counters;
        self
    }

    /// How many parts the map of counters has, each with its own lock; a power of two. Default
    /// 1024; 2 to 65,536.
    pub fn shards(mut self, shards: usize) -> Self {
        self.shards = shards;
        self
    }

    /// Makes every operation that counts, refunds, reserves, settles or extends wait until it
    /// survives loss of power, as the `_sync` calls do; so does dropping a
    /// [`Reservation`](crate::Reservation) that is not settled, which releases it. Default: false.
    pub fn durable_consumes(mut self, durable: bool) -> Self {
        self.durable_consumes = durable;
        self
    }

    /// Whether [`durable_consumes`](Self::durable_consumes) was set: for programs that run
    /// operations that wait for the disk on other threads.
    #[must_use]
    pub fn has_durable_consumes(&self) -> bool {
        self.durable_consumes
    }

    /// How full a ring may be, in percent, before health is degraded. Default 80; 1 to 100.
    pub fn backlog_degraded_percent(mut self, percent: u32) -> Self {
        self.backlog_degraded_percent = percent;
        self
    }

    /// By how much the wall clock may jump, forward or back, before health is degraded. Default 1
    /// minute; 1 second to 3650 days.
    pub fn clock_jump_max(mut self, jump: Duration) -> Self {
        self.clock_jump_max = jump;
        self
    }

    /// How many reservations may be open at a time. Each takes 180 to 320 bytes of memory, and up
    /// to 100 bytes in each snapshot, or more where it covers several counters. Default 100,000; 1
    /// to 2^24.
    pub fn reservations_max(mut self, reservations: usize) -> Self {
        self.reservations_max = reservations;
        self
    }

    /// For how long the answer to a request id, and how a reservation ended, is remembered. Default
    /// 10 minutes; 1 second to 7 days.
    pub fn dedup_window(mut self, window: Duration) -> Self {
        self.dedup_window = window;
        self
    }

    /// How many answers, and how many ended reservations, are remembered. Beyond this the oldest
    /// are forgotten before their time, which [`Stats`](crate::Stats) counts. A million answers
    /// take about 110 MB of memory (`cargo bench --bench ledger -- memory`), a million ends 16 MB.
    /// Default 1,000,000; 1 to 2^28.
    pub fn dedup_max(mut self, answers: usize) -> Self {
        self.dedup_max = answers;
        self
    }

    /// Where the time comes from; can't be set in a file. Default: [`SystemClock`].
    pub fn clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    /// Changes how batches are handed to the sinks; what is not changed keeps the preset's value.
    /// Default: that of [`DeliveryConfig`], which documents its options.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tollgate::Config;
    ///
    /// let config = Config::high_reliability() // with 10 `retry_attempts`
    ///     .delivery(|delivery| delivery.flush_interval(Duration::from_secs(2)));
    /// ```
    pub fn delivery(mut self, change: impl FnOnce(DeliveryConfig) -> DeliveryConfig) -> Self {
        self.delivery = change(self.delivery);
        self
    }
}

impl Config {
    /// Checks that every option is within its bounds, as an open does.
    ///
    /// ```
    /// use tollgate::Config;
    ///
    /// Config::low_latency().lanes(8).validate()?;
    /// let error = Config::default().lanes(0).validate().unwrap_err();
    /// assert_eq!(error.to_string(), "configuration: lanes is 0, allowed: 1..=1024");
    /// # Ok::<(), tollgate::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::InvalidConfig`], for the first that is not.
    pub fn validate(&self) -> Result<()> {
        match self.checks().into_iter().find(|check| !check.is_allowed) {
            Some(check) => Err(Error::config(check.field, check.value, check.allowed)),
            None => Ok(()),
        }
    }

    pub(crate) fn remembering(&self) -> Remembering {
        Remembering { window: self.dedup_window, max: self.dedup_max }
    }

    /// Every option that has bounds.
    fn checks(&self) -> Vec<Check> {
        let mut checks = vec![
            bounds::LANES.check(self.lanes as u64),
            bounds::LANE_RECORDS.check(self.lane_records),
            bounds::SYNC_INTERVAL.check_time(self.sync_interval),
            bounds::DRAIN_INTERVAL.check_time(self.drain_interval),
            bounds::CLOCK_TICK.check_time(self.clock_tick),
            bounds::JOURNAL_FILE_BYTES.check(self.journal_file_bytes),
            bounds::SNAPSHOT_JOURNAL_BYTES.check(self.snapshot_journal_bytes),
            bounds::SNAPSHOT_JOURNAL_PERCENT.check(u64::from(self.snapshot_journal_percent)),
            bounds::UNSYNCED_BYTES_MAX.check(self.unsynced_bytes_max),
            bounds::BACKPRESSURE_DEADLINE.check_time(self.backpressure_deadline),
            bounds::CLOSED_WINDOW_RETENTION.check_time(self.closed_window_retention),
            bounds::COUNTERS_EXPECTED.check(self.counters_expected as u64),
            bounds::SHARDS.check(self.shards as u64),
            bounds::BACKLOG_DEGRADED_PERCENT.check(u64::from(self.backlog_degraded_percent)),
            bounds::CLOCK_JUMP_MAX.check_time(self.clock_jump_max),
            bounds::RESERVATIONS_MAX.check(self.reservations_max as u64),
            bounds::DEDUP_WINDOW.check_time(self.dedup_window),
            bounds::DEDUP_MAX.check(self.dedup_max as u64),
        ];
        checks.extend(self.delivery.checks());
        checks
    }
}

/// All options with their values, but for the clock: a file of TOML, which is read back as the same
/// configuration.
///
/// ```
/// let text = tollgate::Config::low_latency().to_string();
/// assert!(text.contains("backpressure_deadline = \"10ms\"\n"));
/// ```
impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Check { field, value, .. } in self.checks() {
            // A number is plain; what has a unit is text.
            if value.bytes().all(|byte| byte.is_ascii_digit()) {
                writeln!(f, "{field} = {value}")?;
            } else {
                writeln!(f, "{field} = {value:?}")?;
            }
        }
        writeln!(f, "backpressure = \"{}\"", self.backpressure)?;
        writeln!(f, "durable_consumes = {}", self.durable_consumes)
    }
}

/// Its name in a file.
impl fmt::Display for Backpressure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Reject => "reject",
            Self::AdmitUnlogged => "admit_unlogged",
        })
    }
}

/// How many threads the machine runs at once.
fn parallelism() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

#[cfg(test)]
mod tests;
