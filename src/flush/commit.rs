//! Group commit: all callers that wait for the disk share one drain and one sync.
//!
//! A caller that finds no leader leads: it drains the lanes into the journal (under the drain's
//! lock), syncs the files that were written to (under no lock but the leadership), publishes what
//! is durable, and wakes the others. A caller that appended before a leader read the lanes' tails
//! is covered by that leader; of those that came later, one leads next (`turns`).

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::AtomicU64 as StatU64;
use std::time::Duration;

use crossbeam::utils::CachePadded;

use crate::clock::{CoarseClock, uptime};
use crate::error::{Error, Result};
use crate::flush::drain::{Drain, DrainCounts};
use crate::flush::turns::{Leading, Turns};
use crate::journal::cold::ColdEvent;
use crate::journal::pool::JournalFiles;
use crate::model::{BatchNumber, Timestamp};
use crate::poison::{OnPanic, Poison};
use crate::process::Process;
use crate::sync::{AtomicBool, AtomicU64, Mutex, MutexGuard, Ordering};
use crate::wal::lanes::LaneIndex;

/// How long a waiter sleeps before it looks again by itself, above all at the poison: the thread
/// that ends a commit wakes the waiters, but one that the system stopped in the middle of it can't.
const WAIT_MAX: Duration = Duration::from_millis(100);

/// Moves what is acknowledged to the disk, on behalf of callers and of the flushers.
#[derive(Debug)]
pub(crate) struct Committer {
    clock: Arc<CoarseClock>,
    poison: Arc<Poison>,
    process: Process,
    is_closed: AtomicBool,
    drain: Mutex<Drain>,
    files: Arc<JournalFiles>,
    turns: Turns,
    /// Per lane: the records below survive loss of power.
    durable: Box<[CachePadded<AtomicU64>]>,
    /// Cold events up to this ticket survive loss of power.
    durable_cold: AtomicU64,
    taken_cold: AtomicU64,
    durable_batch: AtomicU64,
    syncs: SyncStats,
}

/// When syncs happened, for statistics and health.
#[derive(Debug, Default)]
pub(crate) struct SyncStats {
    pub(crate) count: StatU64,
    /// Monotonic milliseconds at which the last completed sync began.
    pub(crate) last_began_ms: StatU64,
    /// Monotonic milliseconds at which the sync under way began; 0 while none is.
    under_way_since_ms: StatU64,
    /// Wall-clock milliseconds at which the last sync ended.
    pub(crate) last_ended_at: StatU64,
    pub(crate) last_duration_us: StatU64,
    /// Failed syncs that a new file made up for.
    pub(crate) rescued: StatU64,
    pub(crate) bytes: StatU64,
    pub(crate) records: StatU64,
    pub(crate) batches: StatU64,
}

/// What must be durable before a caller may go on.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Target {
    /// The record with this number in this lane.
    Record { lane: LaneIndex, number: u64 },
    /// The cold event with this ticket.
    Cold(u64),
}

impl Committer {
    pub(crate) fn new(
        drain: Drain,
        files: Arc<JournalFiles>,
        clock: Arc<CoarseClock>,
        poison: Arc<Poison>,
    ) -> Self {
        let durable = drain.journaled().iter().map(|&n| CachePadded::new(AtomicU64::new(n)));
        let syncs = SyncStats::default();
        // Relaxed, all of the statistics: they order nothing.
        syncs.last_began_ms.store(millis(uptime()), Ordering::Relaxed);
        Self {
            poison,
            process: Process::this(),
            is_closed: AtomicBool::new(false),
            files,
            durable: durable.collect(),
            durable_cold: AtomicU64::new(0),
            taken_cold: AtomicU64::new(0),
            durable_batch: AtomicU64::new(drain.durable().number.0),
            turns: Turns::default(),
            drain: Mutex::new(drain),
            clock,
            syncs,
        }
    }

    /// An error once nothing can be promised any more, and in a forked process: there the lock may
    /// be held by a thread that is not there, and the journal is the parent's.
    fn check(&self) -> Result<()> {
        self.process.check()?;
        self.poison.check()
    }

    /// Locks the drain. Checks the poison under the lock.
    pub(crate) fn lock_drain(&self) -> Result<LockedDrain<'_>> {
        self.process.check()?;
        let drain = self.drain.lock();
        self.poison.check()?;
        // Relaxed: stored under the drain's lock.
        if self.is_closed.load(Ordering::Relaxed) {
            return Err(Error::Closed);
        }
        Ok(LockedDrain { _poisoning: self.poison.on_panic("the drain panicked"), drain })
    }

    /// Nothing is written from here on.
    pub(crate) fn close(&self) {
        let _drain = self.drain.lock();
        self.is_closed.store(true, Ordering::Relaxed);
    }

    /// Hands a cold event to the next batch. `apply` makes it effective in memory, under the same
    /// lock, so that events take effect in the order in which they are written.
    pub(crate) fn take_cold(&self, event: ColdEvent, apply: impl FnOnce()) -> Result<Target> {
        let mut drain = self.lock_drain()?;
        let ticket = drain.take_cold(event);
        apply();
        // Relaxed: stored under the drain's lock; a reader that misses it did not wait for that
        // event.
        self.taken_cold.store(ticket, Ordering::Relaxed);
        Ok(Target::Cold(ticket))
    }

    /// Hands a cold event to a batch of now. An error: it is in none. Otherwise its target, and
    /// whether its batch is in the journal; where it is not, the batch is tried again, and the
    /// event will be there.
    pub(crate) fn write_cold(&self, event: &ColdEvent) -> Result<(Target, Result<()>)> {
        let mut tried = Tried::default();
        loop {
            let mut drain = self.lock_drain()?;
            let ticket = drain.take_cold(event.clone());
            let written = drain.append_cold(ticket);
            self.count(&mut drain);
            match written {
                // Taken back while room is made: behind it others would hand over theirs, and it
                // could not be any more.
                Err(error) if drain.withdraw_cold(ticket) => {
                    let head = drain.head().number;
                    drop(drain);
                    self.make_room(error, head, &mut tried)?;
                }
                written => {
                    // Relaxed: as in `take_cold`.
                    self.taken_cold.store(ticket, Ordering::Relaxed);
                    drop(drain);
                    let target = Target::Cold(ticket);
                    return Ok((target, written.or_else(|_| self.append_cold(target))));
                }
            }
        }
    }

    /// Moves a cold event that was taken to the journal, if it is not there.
    pub(crate) fn append_cold(&self, target: Target) -> Result<()> {
        let Target::Cold(ticket) = target else { return Ok(()) };
        let mut tried = Tried::default();
        loop {
            let mut drain = self.lock_drain()?;
            let appended = drain.append_cold(ticket);
            self.count(&mut drain);
            let head = drain.head().number;
            drop(drain);
            match appended {
                Ok(()) => return Ok(()),
                Err(error) => self.make_room(error, head, &mut tried)?,
            }
        }
    }

    /// Makes room so that an append after this batch, which had none, can be tried again: by
    /// preparing a file, or waiting for one, or by a sync that covers what it may. Returns the
    /// error if neither helps.
    fn make_room(&self, error: Error, head: BatchNumber, tried: &mut Tried) -> Result<()> {
        match error {
            Error::Io { .. } if tried.file.replace(head) != Some(head) => {
                self.files.provide_spare()
            }
            Error::TooMany { .. } if tried.sync.replace(head) != Some(head) => self.commit(),
            error => Err(error),
        }
    }

    /// The cold event taken last: once it is durable all are.
    pub(crate) fn last_cold(&self) -> Target {
        Target::Cold(self.taken_cold.load(Ordering::Relaxed))
    }

    /// How many cold events wait for a batch.
    pub(crate) fn cold_waiting(&self) -> usize {
        self.drain.lock().cold_waiting()
    }

    /// Waits until the target survives loss of power, leading the commit where nobody else does.
    ///
    /// # Errors
    /// `DurabilityLost` once a sync has failed for good, or when the engine was closed meanwhile
    /// and could not make it durable; `Io` when the journal can't be written for now.
    pub(crate) fn wait_durable(&self, target: Target) -> Result<()> {
        let mut waiter = self.turns.waiter();
        while !self.is_durable(target) {
            self.check()?;
            let leading = waiter.lead();
            // A commit may have ended in between.
            if self.is_durable(target) {
                break;
            }
            let Some(leading) = leading else {
                waiter.wait(WAIT_MAX);
                continue;
            };
            match self.lead(leading) {
                Err(error) if !self.is_durable(target) => {
                    return Err(match error {
                        // It is in the log, and was not refused.
                        Error::Closed => {
                            Error::durability_lost("the engine was closed before it was durable")
                        }
                        other => other,
                    });
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn is_durable(&self, target: Target) -> bool {
        // Acquire: pairs with the Release in `publish`.
        match target {
            Target::Record { lane, number } => {
                self.durable.get(lane).is_some_and(|d| d.load(Ordering::Acquire) > number)
            }
            Target::Cold(ticket) => self.durable_cold.load(Ordering::Acquire) >= ticket,
        }
    }

    /// An error in a forked process, for callers that take other locks on their way here.
    pub(crate) fn check_process(&self) -> Result<()> {
        self.process.check()
    }

    /// Makes everything durable that was appended before the call.
    pub(crate) fn commit(&self) -> Result<()> {
        let mut waiter = self.turns.exact_waiter();
        while !waiter.is_covered() {
            self.check()?;
            match waiter.lead() {
                Some(leading) => return self.lead(leading),
                None => waiter.wait(WAIT_MAX),
            }
        }
        Ok(())
    }

    /// What the lanes hold now becomes durable: by one sync, or by several where that is more than
    /// may wait for one.
    fn lead(&self, leading: Leading<'_>) -> Result<()> {
        let mut failure = None;
        let led = self.lead_unsaid(leading, &mut failure);
        // Only now: whoever gets what is logged may wait for the disk, and so for who leads.
        if let Some(failure) = failure {
            tracing::warn!(%failure, "a sync failed; what it should have covered is in a new file");
        }
        led
    }

    /// [`lead`](Self::lead), leaving it to the caller to log the `failure` of a sync that a new
    /// file has made up for.
    fn lead_unsaid(
        &self,
        leading: Leading<'_>,
        failure: &mut Option<std::io::Error>,
    ) -> Result<()> {
        let leader = Leader { _poisoning: self.poison.on_panic("a commit panicked"), leading };
        let drain = self.lock_drain()?;
        // Whoever came while this thread waited for the lock is still covered.
        leader.leading.look();
        let tails = drain.tails();
        drop(drain);
        while !self.sync_up_to(&tails, failure)? {}
        leader.leading.succeeded();
        Ok(())
    }

    /// Whether everything up to these tails is durable now. Where not all of it could be written,
    /// what is written is synced nevertheless.
    fn sync_up_to(&self, tails: &[u64], failure: &mut Option<std::io::Error>) -> Result<bool> {
        let began = uptime();
        let (files, head, journaled, cold, flushed) = {
            let (mut drain, flushed) = self.flushed_drain(tails)?;
            let files = drain.writer().take_unsynced();
            (files, drain.head(), drain.journaled().to_vec(), drain.cold_appended(), flushed)
        };
        self.syncs.under_way_since_ms.store(millis(uptime()).max(1), Ordering::Relaxed);
        let synced = files.iter().try_for_each(|file| file.sync_data());
        self.syncs.under_way_since_ms.store(0, Ordering::Relaxed);
        let mut drain = self.lock_drain()?;
        match synced {
            Ok(()) => {
                drain.synced(head);
                self.publish(head.number, &journaled, cold);
            }
            Err(error) => {
                self.rescue(&mut drain, &error)?;
                *failure = Some(error);
            }
        }
        drop(drain);
        if !files.is_empty() {
            self.count_sync(began);
        }
        let is_all = flushed?;
        self.syncs.last_began_ms.store(millis(began), Ordering::Relaxed);
        Ok(is_all)
    }

    /// The drain, with as much in the journal as may wait for a sync, and whether that is all up to
    /// these tails. Where the journal is full a file is prepared, or waited for.
    fn flushed_drain(&self, tails: &[u64]) -> Result<(LockedDrain<'_>, Result<bool>)> {
        let mut waited_at = None;
        loop {
            let mut drain = self.lock_drain()?;
            let flushed = drain.flush(tails);
            self.count(&mut drain);
            let head = drain.head().number;
            // Once more at the same batch, although there was a file: the disk did not take what
            // was reserved on it.
            let is_in_vain = waited_at == Some(head);
            match flushed {
                Err(Error::Io { .. }) if !is_in_vain => {}
                flushed => return Ok((drain, flushed)),
            }
            drop(drain);
            waited_at = Some(head);
            if let Err(error) = self.files.provide_spare() {
                return Ok((self.lock_drain()?, Err(error)));
            }
        }
    }

    /// A failed sync is final for the file: the kernel may have thrown the bytes away, and would
    /// say OK next time. What it should have covered is still in memory and goes to a new file. If
    /// that fails too, nothing can be promised any more.
    fn rescue(&self, drain: &mut Drain, failure: &std::io::Error) -> Result<()> {
        if let Err(error) = drain.rescue() {
            let reason = format!("a sync failed ({failure}), and so did writing anew: {error}");
            self.poison.latch_by(reason, Some(error));
            return self.poison.check();
        }
        self.syncs.rescued.fetch_add(1, Ordering::Relaxed);
        self.publish(drain.head().number, drain.journaled(), drain.cold_appended());
        Ok(())
    }

    fn publish(&self, batch: BatchNumber, journaled: &[u64], cold: u64) {
        // Release, all: pair with the Acquire in `is_durable`.
        for (durable, &journaled) in self.durable.iter().zip(journaled) {
            durable.store(journaled, Ordering::Release);
        }
        self.durable_cold.fetch_max(cold, Ordering::Release);
        self.durable_batch.store(batch.0, Ordering::Release);
    }

    /// The last batch that survives loss of power.
    pub(crate) fn durable_batch(&self) -> BatchNumber {
        // Acquire: pairs with the Release in `publish`.
        BatchNumber(self.durable_batch.load(Ordering::Acquire))
    }

    /// Copies the drain's counts to where statistics read them without its lock.
    pub(crate) fn count(&self, drain: &mut Drain) {
        let DrainCounts { records, batches } = drain.counts();
        // Release: pairs with the Acquire in `Engine::stats`: no more was read than was written.
        self.syncs.records.store(records, Ordering::Release);
        self.syncs.batches.store(batches, Ordering::Relaxed);
        self.syncs.bytes.store(drain.writer().bytes_written(), Ordering::Relaxed);
    }

    fn count_sync(&self, began: Duration) {
        let took = uptime().saturating_sub(began);
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.syncs.count.fetch_add(1, Ordering::Relaxed);
        self.syncs.last_duration_us.store(micros, Ordering::Relaxed);
        self.syncs.last_ended_at.store(self.clock.now().as_unix_millis(), Ordering::Relaxed);
    }

    /// How long the sync that is under way has taken so far.
    pub(crate) fn syncing_for(&self) -> Duration {
        // Relaxed: a hint.
        match self.syncs.under_way_since_ms.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            since => uptime().saturating_sub(Duration::from_millis(since)),
        }
    }

    /// Counts from now on how long ago the last sync began: none was to begin before.
    pub(crate) fn expect_sync_from_now(&self) {
        self.syncs.last_began_ms.store(millis(uptime()), Ordering::Relaxed);
    }

    /// Keeps others from leading, so that whoever waits for the disk goes on waiting.
    #[cfg(all(test, not(loom)))]
    pub(crate) fn lead_for_good(&self) -> Leading<'_> {
        let mut waiter = self.turns.waiter();
        loop {
            match waiter.lead() {
                Some(leading) => return leading,
                None => waiter.wait(WAIT_MAX),
            }
        }
    }

    pub(crate) fn syncs(&self) -> &SyncStats {
        &self.syncs
    }

    /// When the last sync ended, by the wall clock.
    pub(crate) fn last_sync(&self) -> Option<Timestamp> {
        let ms = self.syncs.last_ended_at.load(Ordering::Relaxed);
        (ms > 0).then(|| Timestamp::from_unix_millis(ms))
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The drain, locked. A panic ends durability before the lock is released: the next holder would go
/// on with sums that are not what the lanes hold.
#[derive(Debug)]
pub(crate) struct LockedDrain<'a> {
    _poisoning: OnPanic<'a>,
    drain: MutexGuard<'a, Drain>,
}

impl Deref for LockedDrain<'_> {
    type Target = Drain;

    fn deref(&self) -> &Drain {
        &self.drain
    }
}

impl DerefMut for LockedDrain<'_> {
    fn deref_mut(&mut self) -> &mut Drain {
        &mut self.drain
    }
}

/// After which batch room was last made for the next one. A second time after the same batch is in
/// vain: the disk did not take what was reserved on it.
#[derive(Debug, Default)]
struct Tried {
    file: Option<BatchNumber>,
    sync: Option<BatchNumber>,
}

/// A panic ends durability before the others are woken.
struct Leader<'a> {
    _poisoning: OnPanic<'a>,
    leading: Leading<'a>,
}
