//! What each flusher thread does.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::clock::uptime;
use crate::engine::{ClockJump, Engine, Troubles};
use crate::error::{Error, Result};
use crate::flush::threads::{Flushers, Pulse};
use crate::journal::files::FileSequence;
use crate::model::Timestamp;

/// An idle drainer looks this many times less often at the lanes.
const IDLE_FACTOR: u32 = 8;
/// How often files are prepared and rings prefaulted ahead.
const FILES_INTERVAL: Duration = Duration::from_millis(50);
/// After a file that could not be prepared nobody's kick is followed for as long, after each
/// further one twice as long, up to this.
const FILES_RETRY_MAX: Duration = Duration::from_secs(1);
/// How often it is looked whether somebody has taken the journal's files away.
const TAKEN_INTERVAL: Duration = Duration::from_secs(1);
/// At least this many records of a ring in use are prefaulted.
const PREFAULT_MIN: u64 = 1 << 13;
/// While a sync has taken this long none are.
const SLOW_SYNC: Duration = Duration::from_millis(50);
/// The farthest that a lane was seen into its ring decays by one part in this many each time.
const REACH_FADES: u64 = 16;
/// One time in this many, all of it is prefaulted again: the kernel cleans pages every half a
/// minute, and looking at each page of a large ring takes time from the callers.
const PREFAULT_AGAIN: u32 = 5;
/// How often the merge thread looks whether a snapshot is due.
const MERGE_INTERVAL: Duration = Duration::from_millis(250);
/// How often it is looked for reservations whose time is over.
const EXPIRY_INTERVAL: Duration = Duration::from_millis(10);
/// How often what need not be remembered is forgotten, and it is looked which shards of the map are
/// quiet.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);
/// How long a failed merge waits before it is tried again; after each further one twice as long,
/// up to the second: it reads and writes as much as one that succeeds.
const MERGE_RETRY: Duration = Duration::from_secs(5);
const MERGE_RETRY_MAX: Duration = Duration::from_mins(5);

impl Engine {
    pub(super) fn start(self: &Arc<Self>, flushers: &mut Flushers) -> Result<()> {
        type Work = fn(&Engine, &Pulse);
        let threads: [(&Arc<Pulse>, Work); 6] = [
            (&self.pulses.clock, Engine::run_clock),
            (&self.pulses.drain, Engine::run_drain),
            (&self.pulses.sync, Engine::run_sync),
            (&self.pulses.files, Engine::run_files),
            (&self.pulses.merge, Engine::run_merge),
            (&self.pulses.expiry, Engine::run_expiry),
        ];
        // What the open did before may have taken long: none of them was to do anything yet.
        self.committer.expect_sync_from_now();
        for (pulse, work) in threads {
            pulse.beat();
            let engine = Arc::clone(self);
            flushers.spawn(pulse, &self.poison, move |pulse| work(&engine, pulse))?;
        }
        Ok(())
    }

    /// Advances the coarse clock, and notices when the wall clock goes another way than the
    /// monotonic one.
    fn run_clock(&self, pulse: &Pulse) {
        let mut clocks = self.read_clocks();
        while pulse.sleep(self.config.clock_tick) {
            // Whoever met it may have held locks.
            self.poison.say();
            clocks = self.look_for_jump(clocks);
        }
    }

    /// The wall clock, and the monotonic one.
    pub(super) fn read_clocks(&self) -> (Timestamp, Duration) {
        (self.clock.refresh(), self.clock.monotonic())
    }

    /// What the clocks say now, after they said that.
    pub(super) fn look_for_jump(
        &self,
        (wall, monotonic): (Timestamp, Duration),
    ) -> (Timestamp, Duration) {
        let (wall_now, monotonic_now) = self.read_clocks();
        let passed = monotonic_now.saturating_sub(monotonic);
        let backwards = wall_now < wall;
        let by = if backwards {
            wall.saturating_sub(wall_now).saturating_add(passed)
        } else {
            wall_now.saturating_sub(wall).abs_diff(passed)
        };
        if by > self.config.clock_jump_max {
            tracing::warn!(?by, backwards, "the wall clock jumped");
            *self.troubles.clock.lock() = Some(ClockJump { by, backwards, at: monotonic_now });
            // Relaxed: for statistics.
            self.troubles.clock_jumps.fetch_add(1, Ordering::Relaxed);
        }
        (wall_now, monotonic_now)
    }

    /// Sums up what the lanes hold, and writes a batch when a ring fills up before the next sync.
    fn run_drain(&self, pulse: &Pulse) {
        let interval = self.config.drain_interval;
        let mut wait = interval;
        while pulse.sleep(wait) {
            let drained = match self.drain_once() {
                // As many batches wait for a sync as may, and callers will soon wait for them.
                Err(Error::TooMany { .. }) => self.sync_once().and_then(|()| self.drain_once()),
                drained => drained,
            };
            match drained {
                Ok(Drained::Pressing) => wait = Duration::ZERO,
                Ok(Drained::Some) => wait = interval,
                Ok(Drained::Nothing) => wait = (wait * 2).clamp(interval, interval * IDLE_FACTOR),
                Err(error) => {
                    wait = interval;
                    self.poison_if_damaged(&error);
                    self.set_trouble(&self.troubles.journal, Some(&error));
                }
            }
        }
    }

    fn drain_once(&self) -> Result<Drained> {
        let mut drain = self.committer.lock_drain()?;
        let before = drain.counts();
        // An operation that needs most of a ring waits while the ring is far from full.
        let is_waited_for = self.room.waiting.load(Ordering::Relaxed) > 0;
        let result = drain.fold().and_then(|()| {
            if is_waited_for || drain.is_pressing() { drain.append_batch() } else { Ok(()) }
        });
        let drained = match drain.counts().records - before.records {
            _ if drain.is_pressing() => Drained::Pressing,
            0 => Drained::Nothing,
            _ => Drained::Some,
        };
        let freed = drain.counts().batches != before.batches;
        self.committer.count(&mut drain);
        drop(drain);
        if freed {
            // Only what was written says that it can be.
            self.set_trouble(&self.troubles.journal, None);
            self.room.freed.notify_all();
        }
        result.map(|()| drained)
    }

    /// Begins a sync every interval.
    fn run_sync(&self, pulse: &Pulse) {
        let interval = self.config.sync_interval;
        let mut next = uptime() + interval;
        while pulse.sleep(next.saturating_sub(uptime())) {
            if uptime() < next {
                continue;
            }
            next = (next + interval).max(uptime());
            self.set_trouble(&self.troubles.journal, self.sync_once().err().as_ref());
        }
    }

    fn sync_once(&self) -> Result<()> {
        let synced = self.committer.commit().inspect_err(|error| self.poison_if_damaged(error));
        self.room.freed.notify_all();
        synced
    }

    fn poison_if_damaged(&self, error: &Error) {
        if let Error::Damaged { .. } = error {
            self.poison.set_by(error);
        }
    }

    /// What is written to a file that the directory does not have is nowhere, whatever its syncs
    /// say.
    fn poison_if_taken_away(&self) {
        if let Some(path) = self.files.find_taken_away() {
            self.poison.set(format!("{}: it was removed, moved or replaced", path.display()));
        }
    }

    /// Without names for further files the journal is full soon, and no later sync of the directory
    /// can be believed.
    fn poison_if_names_are_lost(&self) {
        if let Err(error) = self.files.check_directory() {
            self.poison.set(format!("{error}; the data directory must be reopened"));
        }
    }

    /// What is written goes on to where the directory is now. The next open by its path does not.
    pub(super) fn look_where_directory_is(&self) {
        let now = self.files.moved_from();
        let before = std::mem::replace(&mut *self.troubles.moved_from.lock(), now.clone());
        match (now, before) {
            (Some(dir), None) => {
                let dir = dir.display();
                tracing::warn!(%dir, "the data directory was moved or replaced");
            }
            (None, Some(_)) => tracing::info!("the data directory is back in its place"),
            _ => {}
        }
    }

    /// Prepares journal files and prefaults the rings ahead of their writers.
    fn run_files(&self, pulse: &Pulse) {
        let mut reaches: Vec<_> = self.lanes.iter().map(|lane| Reach::new(lane.tail())).collect();
        let mut reported = false;
        let (mut wait, mut retry_at) = (Duration::ZERO, Duration::ZERO);
        let mut looked = uptime();
        while pulse.sleep(FILES_INTERVAL) {
            if uptime() >= retry_at {
                let prepared = self.files.prepare();
                wait = match prepared {
                    Ok(()) => Duration::ZERO,
                    Err(_) => (wait * 2).clamp(FILES_INTERVAL, FILES_RETRY_MAX),
                };
                retry_at = uptime() + wait;
                self.set_trouble(&self.troubles.files, prepared.as_ref().err());
            }
            self.poison_if_names_are_lost();
            if uptime() >= looked + TAKEN_INTERVAL {
                looked = uptime();
                self.poison_if_taken_away();
                self.look_where_directory_is();
            }
            if let Err(error) = self.prefault_ahead(&mut reaches)
                && !reported
            {
                tracing::debug!(%error, "rings can't be prefaulted; first stores will be slower");
                reported = true;
            }
        }
    }

    /// Prefaults the rings ahead of their writers, unless the disk is slow to answer: the kernel
    /// holds the lock of the process's memory meanwhile, and where a page waits for the disk every
    /// thread that maps or unmaps memory would too. How many records.
    pub(super) fn prefault_ahead(&self, reaches: &mut [Reach]) -> io::Result<u64> {
        let mut done = 0;
        for (lane, reach) in self.lanes.iter().zip(reaches) {
            let Some(mut part) = reach.at(lane.tail(), lane.capacity()) else { continue };
            // What is left out has its turn when all of it has.
            while !part.is_empty() && !self.is_disk_slow() {
                let count = PREFAULT_MIN.min(part.end - part.start);
                lane.prefault(part.start, count)?;
                part.start += count;
                done += count;
            }
        }
        Ok(done)
    }

    /// Whether a sync takes longer than usual, or the drainer waits for the disk.
    fn is_disk_slow(&self) -> bool {
        self.committer.syncing_for() >= SLOW_SYNC || self.pulses.drain.stalled_for().is_some()
    }

    /// Writes a snapshot when the journal has outgrown its share.
    fn run_merge(&self, pulse: &Pulse) {
        let mut wait = MERGE_INTERVAL;
        while pulse.sleep(wait) {
            match self.merge_once(&mut |duration| pulse.pause(duration)) {
                Ok(true) => wait = MERGE_INTERVAL,
                // A caller merges: what comes of that shows what is left to do.
                Ok(false) => {}
                Err(Error::Closed) => return,
                Err(_) => wait = after_failed_merge(wait),
            }
        }
    }

    /// Merges where that is due, or failed the last time. Whether nothing is left to do: not while
    /// a caller merges.
    pub(super) fn merge_once(&self, pause: &mut dyn FnMut(Duration) -> Result<()>) -> Result<bool> {
        let Troubles { batches, snapshots, .. } = &self.troubles;
        let has_failed = batches.lock().is_some() || snapshots.lock().is_some();
        if !self.compactor.is_due() && !has_failed {
            return Ok(true);
        }
        let merged = self.compactor.run_if_free(pause);
        if !matches!(merged, Ok(false)) {
            self.show_merge(merged.as_ref().err());
        }
        merged
    }

    /// Health shows what came of a merge, unless a close ended it.
    pub(super) fn show_merge(&self, failure: Option<&Error>) {
        let (in_journal, elsewhere) = match failure {
            Some(Error::Closed) => return,
            Some(error) if is_in_journal(error) => (Some(error), None),
            failure => (None, failure),
        };
        self.set_trouble(&self.troubles.batches, in_journal);
        self.set_trouble(&self.troubles.snapshots, elsewhere);
    }

    /// Merges, at open, what lives have left that were too short for the merge's thread. Where that
    /// fails, the thread tries again and says so.
    pub(super) fn merge_what_piled_up(&self) {
        if !self.compactor.is_overdue() {
            return;
        }
        let merged =
            self.compactor.run(&mut |_| Ok(())).and_then(|()| self.files.remove_obsolete());
        if let Err(error) = merged {
            tracing::warn!(%error, "the journal of short lives can't be merged for now");
        }
    }

    /// Gives back reservations whose time is over, and forgets answers. Changes counters as a
    /// caller does.
    fn run_expiry(&self, pulse: &Pulse) {
        let mut swept = uptime();
        while pulse.sleep(EXPIRY_INTERVAL) {
            self.expire_once();
            if uptime() >= swept + SWEEP_INTERVAL {
                swept = uptime();
                self.sweep();
            }
        }
    }

    /// What is forgotten by a clock that is wrong does not come back when it is set right.
    pub(super) fn sweep(&self) {
        let now = self.believed.look();
        self.answers.sweep(now);
        self.settled.sweep(now);
        self.table.open_quiet_shards();
        self.look_what_passes();
        self.outbox.note(self.committer.durable_batch(), uptime());
        self.unlogged.sweep(self.clock.monotonic(), |key, window| {
            // A counter that is not there was forgotten: its window is over.
            self.table.find(key, |live| live.cell.load()).is_none_or(|now| now.has_left(window))
        });
    }

    fn expire_once(&self) {
        let now = self.clock.now();
        if self.reservations.is_due(now) {
            self.expire(now);
        }
    }

    pub(super) fn set_trouble(
        &self,
        trouble: &parking_lot::Mutex<Option<String>>,
        error: Option<&Error>,
    ) {
        let now = error.map(Error::to_string);
        // Let go of before anything is logged: whoever gets that may ask how the engine is.
        let before = std::mem::replace(&mut *trouble.lock(), now);
        match (error, before) {
            (None, Some(_)) => tracing::info!("a flusher works again"),
            (Some(error), None) => tracing::warn!(%error, "a flusher can't go on for now"),
            _ => {}
        }
    }
}

/// How long to wait after a merge that failed, which had been waited for so long.
fn after_failed_merge(wait: Duration) -> Duration {
    (wait * 2).clamp(MERGE_RETRY, MERGE_RETRY_MAX)
}

/// Whether it is a batch that can't be read back, and never will be.
fn is_in_journal(error: &Error) -> bool {
    let path = match error {
        Error::Damaged { path, .. } => path,
        Error::Io { path, .. } if error.is_bad_medium() => path,
        _ => return false,
    };
    let name = path.file_name().and_then(|name| name.to_str());
    name.is_some_and(|name| FileSequence::parse(name).is_some())
}

/// What a look at the lanes found.
#[derive(Debug, Clone, Copy)]
enum Drained {
    Nothing,
    Some,
    /// More than one batch takes: the next one should not wait.
    Pressing,
}

/// How much of its ring a lane uses: lanes go on at its start once they have emptied it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reach {
    tail: u64,
    /// How far into the ring the writer was seen lately.
    farthest: u64,
    /// How far into the ring pages were prefaulted since they all were.
    prefaulted: u64,
    /// How many times ago that was.
    age: u32,
}

impl Reach {
    pub(super) fn new(tail: u64) -> Self {
        Self { tail, farthest: 0, prefaulted: 0, age: 0 }
    }

    /// Which records of the ring to prefault, now that its writer is at `tail`: up to twice as far
    /// as the writer has gone lately, from where that ended the last time; from time to time from
    /// the ring's start, since the kernel may have cleaned pages. Nothing where it stands still.
    fn at(&mut self, tail: u64, capacity: u64) -> Option<Range<u64>> {
        if std::mem::replace(&mut self.tail, tail) == tail {
            return None;
        }
        let into_ring = tail & (capacity - 1);
        self.farthest = into_ring.max(self.farthest - self.farthest / REACH_FADES);
        self.age += 1;
        if self.age == PREFAULT_AGAIN {
            (self.age, self.prefaulted) = (0, 0);
        }
        let from = self.prefaulted;
        let to = (2 * self.farthest).max(PREFAULT_MIN).min(capacity);
        self.prefaulted = from.max(to);
        let start = tail - into_ring;
        (from < to).then(|| start + from..start + to)
    }
}

/// What the flushers do, a step at a time and in any order, for tests without threads.
#[cfg(all(test, not(loom)))]
#[derive(Debug, Clone, Copy)]
pub(super) enum Step {
    Drain,
    /// A batch, without a sync: what a drain does when much is in the lanes.
    Append,
    Sync,
    Files,
    Merge,
    Expiry,
}

#[cfg(all(test, not(loom)))]
impl Engine {
    pub(super) fn step(&self, step: Step) -> Result<()> {
        match step {
            Step::Drain => self.drain_once().map(|_| ()),
            Step::Append => self.committer.lock_drain()?.append_batch(),
            Step::Sync => self.sync_once(),
            Step::Files => {
                let prepared = self.files.prepare();
                self.poison_if_names_are_lost();
                prepared
            }
            Step::Merge => self.merge_once(&mut |_| Ok(())).map(drop),
            Step::Expiry => {
                self.expire_once();
                Ok(())
            }
        }
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    #[test]
    fn a_merge_that_fails_again_and_again_is_tried_less_and_less_often() {
        let mut wait = MERGE_INTERVAL;
        let waits = [0; 8].map(|_| {
            wait = after_failed_merge(wait);
            wait.as_secs()
        });
        assert_eq!(waits, [5, 10, 20, 40, 80, 160, 300, 300]);
    }

    #[test]
    fn a_ring_is_prefaulted_as_far_as_it_is_used() {
        const CAPACITY: u64 = 1 << 20;
        let lap = 3 * CAPACITY;
        let mut reach = Reach::new(lap);
        assert_eq!(reach.at(lap, CAPACITY), None, "nothing was written");
        assert_eq!(reach.at(lap + 10, CAPACITY), Some(lap..lap + PREFAULT_MIN));
        assert_eq!(reach.at(lap + 50_000, CAPACITY), Some(lap + PREFAULT_MIN..lap + 100_000));
        // Emptied, it has gone on at the start of the next lap: soon it comes as far again.
        let next = lap + CAPACITY;
        assert_eq!(reach.at(next + 100, CAPACITY), None);
        // All of it where it is not emptied in time.
        let end = next + CAPACITY;
        assert_eq!(reach.at(end - 1, CAPACITY), Some(next + 100_000..end));
        // And again, though it stands still meanwhile, once the kernel may have cleaned pages.
        assert_eq!(reach.at(end + 1, CAPACITY), Some(end..end + CAPACITY));
        assert_eq!(reach.at(end + 1, CAPACITY), None);
        for number in 2..=PREFAULT_AGAIN.into() {
            assert_eq!(reach.at(end + number, CAPACITY), None);
        }
        let from_the_start = reach.at(end + 10, CAPACITY).unwrap();
        assert_eq!(from_the_start.start, end);
        let small = Reach::new(0).at(63, 64);
        assert_eq!(small, Some(0..64));
        // Used less, less of it.
        let last = (11..200).filter_map(|number| reach.at(end + number, CAPACITY)).last();
        assert_eq!(last, Some(end..end + PREFAULT_MIN));
    }
}
