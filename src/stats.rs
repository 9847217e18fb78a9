//! Counts for the operator. Callers pay at most an atomic addition on a cache line that is mostly
//! their own; readers add the counts up.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crossbeam::utils::CachePadded;

use crate::model::Timestamp;
use crate::seats::thread_hint;

/// What the engine has done since it was opened. Each number is exact, but they are not read at one
/// instant.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Records written to the log: one for most operations, more for those over several counters,
    /// with a request id, or with an event.
    pub total: u64,
    /// How many of these the drainer has taken out of the log.
    pub processed: u64,
    /// Operations that failed because the log had no room, or because the engine was closed when
    /// they asked for some.
    pub failed: u64,
    /// Operations that were counted in memory but not logged, under
    /// [`Backpressure::AdmitUnlogged`](crate::Backpressure): the next open does not find them.
    pub unlogged: u64,
    /// Operations denied because of a limit. A commit refused because of
    /// [`Overrun::Refuse`](crate::Overrun::Refuse) is not included: its reservation stays open.
    pub denied: u64,
    /// Batches appended to the journal.
    pub batches: u64,
    /// How many times a call had to wait for room in the log.
    pub backpressure_waits: u64,
    /// Records in the lanes that the drainer has not taken out yet.
    pub backlog: u64,
    /// Records that the lanes can hold.
    pub backlog_max: u64,
    /// Counters in memory.
    pub counters: u64,
    /// Quotas defined.
    pub quotas: u64,
    /// Syncs completed.
    pub syncs: u64,
    /// Failed syncs whose contents were written anew to another file.
    pub syncs_rescued: u64,
    /// How many times the wall clock jumped by more than
    /// [`Config::clock_jump_max`](crate::Config::clock_jump_max).
    pub clock_jumps: u64,
    /// When the last sync ended.
    pub last_sync: Option<Timestamp>,
    /// How long the last sync took, from the start of its drain.
    pub last_sync_duration: Duration,
    /// The last batch that survives loss of power.
    pub durable_batch: u64,
    /// Bytes written to the journal and to snapshots.
    pub bytes_to_disk: u64,
    /// Bytes that the journal's files take up, including prepared ones.
    pub journal_bytes: u64,
    /// Bytes of the newest snapshot.
    pub snapshot_bytes: u64,
    /// The last batch in the newest snapshot.
    pub snapshot_batch: u64,
    /// Snapshots written.
    pub snapshots: u64,
    /// Reservations that are open.
    pub reservations: u64,
    /// Reservations that expired and were released.
    pub reservations_expired: u64,
    /// Answers to requests that are remembered.
    pub answers: u64,
    /// Answers and ended reservations forgotten before the `dedup_window` was over, because there
    /// were more than `dedup_max`. A request with a forgotten id counts again.
    pub answers_forgotten_early: u64,
}

const STRIPES: usize = 16;

/// A counter that many threads add to, each mostly on a cache line of its own.
#[derive(Debug)]
pub(crate) struct Striped {
    stripes: [CachePadded<AtomicU64>; STRIPES],
}

impl Default for Striped {
    fn default() -> Self {
        Self { stripes: std::array::from_fn(|_| CachePadded::default()) }
    }
}

impl Striped {
    pub(crate) fn add_one(&self) {
        let stripe = &self.stripes[thread_hint() % STRIPES];
        // Relaxed, here and in `sum`: a count, nothing depends on it.
        stripe.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn sum(&self) -> u64 {
        self.stripes.iter().map(|stripe| stripe.load(Ordering::Relaxed)).sum()
    }
}

/// What callers count.
#[derive(Debug, Default)]
pub(crate) struct CallerCounts {
    pub(crate) denied: Striped,
    pub(crate) failed: Striped,
    pub(crate) unlogged: Striped,
    pub(crate) backpressure_waits: Striped,
    pub(crate) expired: Striped,
}
