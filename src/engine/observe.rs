//! What the engine reports about itself. It only reads, so callers pay nothing for it.

use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::Mutex;

use crate::clock::{WaryClock, uptime};
use crate::engine::{ClockJump, Engine};
use crate::health::{Health, HealthReason};
use crate::stats::Stats;

/// Slack on top of the sync interval before a sync counts as late: a sync that takes long is not
/// late yet.
const SYNC_SLACK: Duration = Duration::from_millis(500);

/// For so long health says what has passed: what comes after it must be seen.
const PASSES_AFTER: Duration = Duration::from_hours(1);

/// Something that happens now and then, and is counted.
#[derive(Debug, Default)]
pub(super) struct Passing {
    /// How often it had happened when that was last seen to have grown, and the monotonic clock
    /// then.
    seen: Mutex<(u64, Duration)>,
}

impl Passing {
    /// The count, if it has happened lately.
    fn lately(&self, count: u64, now: Duration) -> Option<u64> {
        let mut seen = self.seen.lock();
        if count > seen.0 {
            *seen = (count, now);
        }
        (count > 0 && now.saturating_sub(seen.1) < PASSES_AFTER).then_some(count)
    }
}

/// What has passed, and is still worth a look.
#[derive(Debug)]
pub(super) struct Lately {
    /// How many were admitted unlogged.
    operations: Option<u64>,
    /// How many were rescued.
    syncs: Option<u64>,
    jump: Option<ClockJump>,
}

impl Engine {
    /// Marks the engine as closed, for health. Whether it was already.
    pub(super) fn mark_closed(&self) -> bool {
        // AcqRel: whoever closes first sees everything before, and the second call sees that it
        // did.
        self.is_closed.swap(true, Ordering::AcqRel)
    }

    pub(crate) fn health(&self) -> Health {
        let mut reasons = Vec::new();
        // Relaxed, here and below: a report, nothing depends on it.
        if self.is_closed.load(Ordering::Relaxed) {
            reasons.push(HealthReason::Closed);
        }
        if let Some(reason) = self.poison.reason() {
            reasons.push(HealthReason::DurabilityLost { reason });
        }
        let journal = self.troubles.journal.lock().clone();
        let files = self.troubles.files.lock().clone();
        for reason in [journal, files].into_iter().flatten() {
            reasons.push(HealthReason::JournalBlocked { reason });
        }
        if !self.is_closed.load(Ordering::Relaxed) {
            self.judge_threads(&mut reasons);
            let moved_from = self.troubles.moved_from.lock().clone();
            reasons.extend(moved_from.map(|dir| HealthReason::DirectoryMoved { dir }));
        }
        let percent = self.fullest_ring_percent();
        if u32::from(percent) >= self.config.backlog_degraded_percent {
            reasons.push(HealthReason::Backlog { percent });
        }
        let Lately { operations, syncs, jump } = self.look_what_passes();
        reasons.extend(operations.map(|operations| HealthReason::Unlogged { operations }));
        reasons.extend(syncs.map(|syncs| HealthReason::SyncsRescued { syncs }));
        let batches = self.troubles.batches.lock().clone();
        if let Some(reason) = batches {
            reasons.push(HealthReason::JournalUnreadable { reason });
        }
        let snapshots = self.troubles.snapshots.lock().clone();
        if let Some(reason) = snapshots {
            reasons.push(HealthReason::SnapshotsFail { reason });
        }
        self.outbox.judge(self.committer.durable_batch(), uptime(), &mut reasons);
        reasons.extend(
            jump.map(|jump| HealthReason::ClockJumped { by: jump.by, backwards: jump.backwards }),
        );
        reasons.sort_by_key(|reason| std::cmp::Reverse(reason.level()));
        Health { reasons }
    }

    /// What has happened lately. Called regularly, so that it is known when that was though nobody
    /// asks.
    pub(super) fn look_what_passes(&self) -> Lately {
        let now = self.clock.monotonic();
        let (troubles, syncs) = (&self.troubles, self.committer.syncs());
        let jump = *troubles.clock.lock();
        Lately {
            operations: troubles.unlogged.lately(self.counts.unlogged.sum(), now),
            syncs: troubles.rescued.lately(syncs.rescued.load(Ordering::Relaxed), now),
            jump: jump.filter(|jump| now.saturating_sub(jump.at) < WaryClock::DOUBTED_FOR),
        }
    }

    fn judge_threads(&self, reasons: &mut Vec<HealthReason>) {
        let began = self.committer.syncs().last_began_ms.load(Ordering::Relaxed);
        let since = uptime().saturating_sub(Duration::from_millis(began));
        if since > self.config.sync_interval + SYNC_SLACK {
            reasons.push(HealthReason::SyncLate { since });
        }
        for (thread, silent) in self.pulses.all().iter().filter_map(|pulse| pulse.stalled_for()) {
            reasons.push(HealthReason::Stalled { thread, silent });
        }
    }

    fn fullest_ring_percent(&self) -> u8 {
        let percents = self.lanes.iter().map(|lane| {
            let (held, room) = lane.fill();
            u8::try_from(held * 100 / (held + room).max(1)).unwrap_or(u8::MAX)
        });
        percents.max().unwrap_or(0)
    }

    pub(crate) fn stats(&self) -> Stats {
        let syncs = self.committer.syncs();
        // Without the drain's lock, which is held while the disk is written to. Acquire: pairs with
        // the Release in `Committer::count`, so that `total` is no less.
        let processed = syncs.records.load(Ordering::Acquire);
        let total = self.lanes.records();
        let compaction = self.compactor.stats();
        let snapshot_bytes = compaction.bytes_written.load(Ordering::Relaxed);
        Stats {
            total,
            processed,
            failed: self.counts.failed.sum(),
            unlogged: self.counts.unlogged.sum(),
            denied: self.counts.denied.sum(),
            batches: syncs.batches.load(Ordering::Relaxed),
            backpressure_waits: self.counts.backpressure_waits.sum(),
            backlog: total.saturating_sub(processed),
            backlog_max: self.lanes.iter().map(|lane| lane.capacity()).sum(),
            counters: self.table.len() as u64,
            quotas: self.quotas.iter().count() as u64,
            syncs: syncs.count.load(Ordering::Relaxed),
            syncs_rescued: syncs.rescued.load(Ordering::Relaxed),
            clock_jumps: self.troubles.clock_jumps.load(Ordering::Relaxed),
            last_sync: self.committer.last_sync(),
            last_sync_duration: Duration::from_micros(
                syncs.last_duration_us.load(Ordering::Relaxed),
            ),
            durable_batch: self.committer.durable_batch().0,
            bytes_to_disk: syncs.bytes.load(Ordering::Relaxed) + snapshot_bytes,
            journal_bytes: self.files.bytes(),
            snapshot_bytes: compaction.snapshot_bytes.load(Ordering::Relaxed),
            snapshot_batch: compaction.snapshot_batch.load(Ordering::Relaxed),
            snapshots: compaction.snapshots.load(Ordering::Relaxed),
            reservations: self.reservations.len() as u64,
            reservations_expired: self.counts.expired.sum(),
            answers: self.answers.len() as u64,
            answers_forgotten_early: self.answers.forgotten_early()
                + self.settled.forgotten_early(),
        }
    }
}
