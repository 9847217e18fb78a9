//! What the engine tells about itself. Reads only; callers pay nothing for it.

use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::clock::uptime;
use crate::engine::Engine;
use crate::health::{Health, HealthReason};
use crate::stats::Stats;

/// Slack on top of the sync interval before a sync counts as late: a sync that takes long is not
/// late yet.
const SYNC_SLACK: Duration = Duration::from_millis(500);

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
        }
        let percent = self.fullest_ring_percent();
        if u32::from(percent) >= self.config.backlog_degraded_percent {
            reasons.push(HealthReason::Backlog { percent });
        }
        let operations = self.counts.dropped.sum();
        if operations > 0 {
            reasons.push(HealthReason::Unlogged { operations });
        }
        let syncs = self.committer.syncs().rescued.load(Ordering::Relaxed);
        if syncs > 0 {
            reasons.push(HealthReason::SyncsRescued { syncs });
        }
        let batches = self.troubles.batches.lock().clone();
        if let Some(reason) = batches {
            reasons.push(HealthReason::JournalUnreadable { reason });
        }
        let snapshots = self.troubles.snapshots.lock().clone();
        if let Some(reason) = snapshots {
            reasons.push(HealthReason::SnapshotsFail { reason });
        }
        self.outbox.judge(self.committer.durable_batch(), uptime(), &mut reasons);
        let jump = *self.troubles.clock.lock();
        if let Some(jump) = jump {
            let (by, backwards) = (jump.by, jump.backwards);
            reasons.push(HealthReason::ClockJumped { by, backwards });
        }
        reasons.sort_by_key(|reason| std::cmp::Reverse(reason.level()));
        Health { reasons }
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
            dropped: self.counts.dropped.sum(),
            denied: self.counts.denied.sum(),
            batches: syncs.batches.load(Ordering::Relaxed),
            backpressure_waits: self.counts.backpressure_waits.sum(),
            backlog: total.saturating_sub(processed),
            backlog_max: self.lanes.iter().map(|lane| lane.capacity()).sum(),
            counters: self.table.len() as u64,
            quotas: self.quotas.iter().count() as u64,
            syncs: syncs.count.load(Ordering::Relaxed),
            syncs_rescued: syncs.rescued.load(Ordering::Relaxed),
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
