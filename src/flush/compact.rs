//! Compaction: the snapshot and the journal after it become a new snapshot. Reads files, never the
//! counters.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::clock::{CoarseClock, WaryClock};
use crate::error::{Error, Result};
use crate::flush::commit::Committer;
use crate::journal::pool::JournalFiles;
use crate::journal::reader::JournalSource;
use crate::journal::writer::ChainPoint;
use crate::ledger::Remembering;
use crate::model::{BatchNumber, Definition, EngineId, Timestamp, WindowStart};
use crate::snapshot::merge::{MergeLimits, merge};
use crate::snapshot::{SnapshotReader, file_name};
use crate::storage::Storage;

/// A merge in the background writes at most this many bytes a second, so that it leaves the disk to
/// the syncs.
const BYTES_PER_SECOND: u64 = 256 << 20;

/// With this many shares of journal, an open does not leave the merge to the merge thread: the
/// process may end, again and again, before that thread has looked.
const OVERDUE_SHARES: u64 = 4;

/// This many files of the journal count as its share too, however small they are: an open looks
/// into each, and there are up to twice as many, back to the older of two snapshots.
const FILES_SHARE: usize = 128;

/// With this many files, an open does not leave the merge to the merge thread.
const FILES_OVERDUE: usize = FILES_SHARE + 64;

/// A merge that has written as much as a file of the journal takes leaves room for another one, and
/// for this: it ends before the disk is full, which would keep callers from counting.
const BYTES_LEFT: u64 = 1 << 20;

/// A clock that is set back by so much finds all windows that it was in before.
const STEP_BACK_MAX: Duration = Duration::from_mins(1);

/// When to compact, and what to keep.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CompactPolicy {
    /// At least this much journal before a snapshot.
    pub(crate) journal_bytes_min: u64,
    /// And at least this percentage of the last snapshot.
    pub(crate) journal_percent: u64,
    /// How long sums of closed windows are kept.
    pub(crate) retention: Duration,
    /// How long answers are kept, and how many.
    pub(crate) remembering: Remembering,
}

/// The snapshots that are kept, newest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct KeptSnapshot {
    pub(crate) point: ChainPoint,
    pub(crate) bytes: u64,
}

/// Reads the journal at its own pace, and must not lose what a merge releases.
pub(crate) trait JournalUser: std::fmt::Debug + Send + Sync {
    /// Called before a snapshot is made of everything up to `durable`. Once this has returned, the
    /// journal up to `newest`, the newest snapshot so far, is released, and sums of windows that
    /// are over may be gone from the next one. `pace` is told how many bytes were written since
    /// its last call; it may sleep, and its error ends the merge.
    fn cover(
        &self,
        newest: Option<ChainPoint>,
        durable: BatchNumber,
        pace: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<()>;
}

/// Merges snapshot and journal, one merge at a time.
#[derive(Debug)]
pub(crate) struct Compactor {
    storage: Arc<dyn Storage>,
    engine: EngineId,
    /// What is forgotten by a clock that is wrong does not come back when it is set right.
    clock: Mutex<WaryClock>,
    files: Arc<JournalFiles>,
    committer: Arc<Committer>,
    user: Arc<dyn JournalUser>,
    policy: CompactPolicy,
    /// Newest first. Held during a merge.
    kept: Mutex<Vec<KeptSnapshot>>,
    stats: CompactStats,
}

/// For statistics and for deciding when the next merge is due; read without the merge's lock.
#[derive(Debug, Default)]
pub(crate) struct CompactStats {
    pub(crate) snapshot_bytes: AtomicU64,
    pub(crate) snapshot_batch: AtomicU64,
    pub(crate) snapshots: AtomicU64,
    pub(crate) bytes_written: AtomicU64,
    /// The journal's bytes written when the last snapshot was finished.
    journal_bytes_then: AtomicU64,
    /// What the files of earlier lives take that no snapshot has covered since: lives that each
    /// write little must not pile them up.
    inherited_bytes: AtomicU64,
}

impl Compactor {
    #[expect(clippy::too_many_arguments, reason = "one call site; each is a thing of its own")]
    pub(crate) fn new(
        storage: Arc<dyn Storage>,
        engine: EngineId,
        clock: Arc<CoarseClock>,
        files: Arc<JournalFiles>,
        committer: Arc<Committer>,
        user: Arc<dyn JournalUser>,
        policy: CompactPolicy,
        kept: Vec<KeptSnapshot>,
    ) -> Self {
        let stats = CompactStats::default();
        if let Some(newest) = kept.first() {
            // Relaxed, all of the statistics: they order nothing.
            stats.snapshot_bytes.store(newest.bytes, Ordering::Relaxed);
            stats.snapshot_batch.store(newest.point.number.0, Ordering::Relaxed);
        }
        let covered = kept.first().map_or(BatchNumber::ZERO, |newest| newest.point.number);
        // All but the one in use.
        let inherited =
            files.holding_after(covered).iter().rev().skip(1).map(|file| file.bytes).sum();
        stats.inherited_bytes.store(inherited, Ordering::Relaxed);
        let kept = Mutex::new(kept);
        let clock = Mutex::new(WaryClock::new(clock));
        Self { storage, engine, clock, files, committer, user, policy, kept, stats }
    }

    /// Whether the journal has outgrown its share.
    pub(crate) fn is_due(&self) -> bool {
        self.journal_bytes_since() >= self.share() || self.journal_files_since() >= FILES_SHARE
    }

    /// Whether it has by so much that no life since was long enough for a merge.
    pub(crate) fn is_overdue(&self) -> bool {
        self.journal_bytes_since() >= self.share().saturating_mul(OVERDUE_SHARES)
            || self.journal_files_since() >= FILES_OVERDUE
    }

    fn share(&self) -> u64 {
        let snapshot = self.stats.snapshot_bytes.load(Ordering::Relaxed);
        let share = snapshot.saturating_mul(self.policy.journal_percent) / 100;
        self.policy.journal_bytes_min.max(share)
    }

    fn journal_files_since(&self) -> usize {
        self.files.count_from(BatchNumber(self.stats.snapshot_batch.load(Ordering::Relaxed)))
    }

    fn journal_bytes_since(&self) -> u64 {
        let written = self.committer.syncs().bytes.load(Ordering::Relaxed);
        written.saturating_sub(self.stats.journal_bytes_then.load(Ordering::Relaxed))
            + self.stats.inherited_bytes.load(Ordering::Relaxed)
    }

    /// Merges what is durable now into a snapshot, in as many rounds as its bounds ask for. `pause`
    /// is called between pieces of work with how long to wait for the pace; its error ends the
    /// merge, with nothing changed.
    pub(crate) fn run(&self, pause: &mut dyn FnMut(Duration) -> Result<()>) -> Result<()> {
        self.run_rounds(&mut self.kept.lock(), pause)
    }

    /// [`run`](Self::run), unless a merge is under way: for the flusher, which has time. Whether it
    /// did.
    pub(crate) fn run_if_free(
        &self,
        pause: &mut dyn FnMut(Duration) -> Result<()>,
    ) -> Result<bool> {
        match self.kept.try_lock() {
            Some(mut kept) => self.run_rounds(&mut kept, pause).map(|()| true),
            None => Ok(false),
        }
    }

    fn run_rounds(
        &self,
        kept: &mut Vec<KeptSnapshot>,
        pause: &mut dyn FnMut(Duration) -> Result<()>,
    ) -> Result<()> {
        let target = self.committer.durable_batch();
        while kept.first().is_none_or(|newest| newest.point.number < target) {
            match self.run_once(kept, target, pause) {
                Ok(true) => {}
                Ok(false) => break,
                Err(error @ (Error::Damaged { .. } | Error::Io { .. })) => {
                    self.go_back(kept, error)?
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Lets go of the newest snapshot where it has rotten, or can't be read: the one before it and
    /// the journal since make up for it. The file of one that can't be read stays: that may pass.
    ///
    /// # Errors
    /// The failure, where it is elsewhere or there is no other snapshot.
    fn go_back(&self, kept: &mut Vec<KeptSnapshot>, failure: Error) -> Result<()> {
        let [newest, _, ..] = kept[..] else { return Err(failure) };
        let number = newest.point.number;
        let path = self.storage.path(&file_name(number));
        if matches!(failure, Error::Io { .. }) && !failure.names(&path) {
            return Err(failure);
        }
        let verified = SnapshotReader::open(&self.storage, self.engine, number)
            .and_then(|mut reader| reader.verify_to_end());
        match verified {
            Err(Error::Damaged { .. }) => self.remove(newest)?,
            Err(Error::Io { .. }) => {}
            Ok(()) | Err(_) => return Err(failure),
        }
        tracing::error!(%failure, "the newest snapshot is damaged; going on from the one before it");
        kept.remove(0);
        Ok(())
    }

    fn remove(&self, snapshot: KeptSnapshot) -> Result<()> {
        let name = file_name(snapshot.point.number);
        let removed = self.storage.remove(&name);
        removed.map_err(|error| Error::io("remove", self.storage.path(&name), error))
    }

    fn run_once(
        &self,
        kept: &mut Vec<KeptSnapshot>,
        target: BatchNumber,
        pause: &mut dyn FnMut(Duration) -> Result<()>,
    ) -> Result<bool> {
        let journal_bytes = self.committer.syncs().bytes.load(Ordering::Relaxed);
        let start = kept.first().map_or(ChainPoint::START, |newest| newest.point);
        let base = match kept.first() {
            Some(newest) => {
                Some(SnapshotReader::open(&self.storage, self.engine, newest.point.number)?)
            }
            None => None,
        };
        let now = self.clock.lock().now();
        let horizon = |definition: &Definition| self.horizon(definition, now);
        let mut written = 0;
        let mut pace = |bytes: u64| {
            written += bytes;
            self.leave_room(written)?;
            pause(Duration::from_micros(bytes.saturating_mul(1_000_000) / BYTES_PER_SECOND))
        };
        self.user.cover(kept.first().map(|newest| newest.point), target, &mut pace)?;
        let mut source = JournalSource::new(&self.files, self.engine, start, target);
        let merged = merge(
            &self.storage,
            self.engine,
            base,
            &mut source,
            &horizon,
            now,
            &mut pace,
            &MergeLimits::new(self.policy.remembering),
        )?;
        let Some(info) = merged else { return Ok(false) };
        kept.insert(0, KeptSnapshot { point: info.point, bytes: info.bytes });
        self.stats.journal_bytes_then.store(journal_bytes, Ordering::Relaxed);
        self.stats.inherited_bytes.store(0, Ordering::Relaxed);
        self.stats.snapshot_bytes.store(info.bytes, Ordering::Relaxed);
        self.stats.snapshot_batch.store(info.point.number.0, Ordering::Relaxed);
        self.stats.snapshots.fetch_add(1, Ordering::Relaxed);
        self.stats.bytes_written.fetch_add(info.bytes, Ordering::Relaxed);
        self.forget_old(kept)?;
        Ok(true)
    }

    /// Refuses to go on where what a merge still writes takes the journal's room: its file is of
    /// use only once it is complete, and is begun again and again until it fits.
    fn leave_room(&self, written: u64) -> Result<()> {
        let file_bytes = self.files.file_bytes();
        if written < file_bytes {
            return Ok(());
        }
        let refused = |error| Error::io("write a snapshot to", self.storage.path(""), error);
        let free = self.storage.free_bytes().map_err(refused)?;
        if free >= file_bytes.saturating_add(BYTES_LEFT) {
            return Ok(());
        }
        let reason = format!(
            "{written} bytes are written, and the last {free} are left for the journal: there is no \
             room for a snapshot"
        );
        Err(refused(io::Error::new(io::ErrorKind::StorageFull, reason)))
    }

    /// Windows that started before this and are closed are dropped from the snapshot: not those
    /// that a clock which is set back a little opens again.
    fn horizon(&self, definition: &Definition, now: Timestamp) -> WindowStart {
        let retention = self.policy.retention.max(STEP_BACK_MAX);
        let retention = u64::try_from(retention.as_millis()).unwrap_or(u64::MAX);
        let kept_from = now.as_unix_millis().saturating_sub(retention);
        definition.calendar.span_at(Timestamp::from_unix_millis(kept_from)).start
    }

    /// Calls `read` with the newest snapshot, while no merge is under way.
    pub(crate) fn with_newest(
        &self,
        read: &mut dyn FnMut(Option<ChainPoint>) -> Result<()>,
    ) -> Result<()> {
        let kept = self.kept.lock();
        read(kept.first().map(|newest| newest.point))
    }

    /// Waits for the merge under way, which ends early once its `pause` refuses.
    pub(crate) fn wait(&self) {
        drop(self.kept.lock());
    }

    /// Keeps two snapshots, and the journal back to the older: one rotten file then costs nothing.
    fn forget_old(&self, kept: &mut Vec<KeptSnapshot>) -> Result<()> {
        while kept.len() > 2 {
            let Some(oldest) = kept.pop() else { break };
            self.remove(oldest)?;
        }
        if let [_, older] = kept[..] {
            self.files.release_up_to(older.point.number);
        }
        Ok(())
    }

    pub(crate) fn stats(&self) -> &CompactStats {
        &self.stats
    }
}
