//! Delivery: the journal is the outbox of the sinks.
//!
//! A sink gets a range of synced batches, summed up, starting at its position. Its state file says
//! what that is, and which end of a delivery may be in flight; the sink's own position decides. A
//! part of the journal may be released only once each sink that the directory knows has received
//! it, or has it in its backlog: merged deltas in separate files, which grow with the number of
//! counters and not with the amount of traffic.
//!
//! - [`state`]: what is remembered about a sink.
//! - [`sums`]: reading ranges, and merging them into backlogs.
//! - [`rows`]: sums as sinks get them.
//! - [`outlet`]: one sink.
//! - [`failure`], [`backoff`], [`progress`], [`status`]: failures, pauses, counts, what callers are
//!   told.

mod backoff;
mod failure;
mod outlet;
mod progress;
mod rows;
pub(crate) mod state;
mod status;
mod sums;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

#[cfg(all(test, not(loom)))]
pub(crate) use self::progress::{CALL_MAX, SILENCE_MAX};
pub use self::status::{SinkCondition, SinkStatus};

use crate::clock::uptime;
use crate::config::DeliveryConfig;
use crate::delivery::outlet::{Context, Outlet};
use crate::delivery::progress::LastError;
use crate::delivery::state::{NAMES_ALLOWED, SinkState, is_valid_name};
use crate::delivery::sums::Disk;
use crate::error::{Error, Resource, Result};
use crate::flush::compact::JournalUser;
use crate::fold::SumKey;
use crate::health::HealthReason;
use crate::identity;
use crate::journal::pool::JournalFiles;
use crate::journal::writer::ChainPoint;
use crate::model::{BatchNumber, Definition, EngineId, QuotaId, Timestamp};
use crate::sink::UsageSink;
use crate::storage::{RealStorage, Storage};

/// How many sinks may be attached.
const SINKS_MAX: usize = 64;
/// A worker looks at least this often whether there is something to do.
const LOOK_MAX: Duration = Duration::from_millis(250);
/// How long a worker waits at least between two looks.
const LOOK_MIN: Duration = Duration::from_millis(1);
/// How often a caller that waits for a delivery checks by itself.
const WAIT_MAX: Duration = Duration::from_millis(50);

/// A sink and the name under which its position is kept.
pub(crate) type NamedSink = (String, Box<dyn UsageSink>);

/// What delivery asks of the engine.
pub(crate) trait Host {
    /// The last batch that survives loss of power.
    fn durable(&self) -> BatchNumber;

    /// The wall clock.
    fn now(&self) -> Timestamp;

    /// Calls `read` with the newest snapshot, while no other is made.
    fn with_newest_snapshot(
        &self,
        read: &mut dyn FnMut(Option<ChainPoint>) -> Result<()>,
    ) -> Result<()>;

    /// A quota's definition.
    fn quota(&self, quota: QuotaId) -> Option<Definition>;

    /// What is used in a window, if it is the counter's current one, and the limit that applies.
    fn counter(&self, key: SumKey) -> (Option<u64>, u64);
}

/// For whom [`Outbox::wait`] waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Waiter {
    /// A caller, until a sink fails for a reason that does not pass by itself. Each sink must say
    /// that it has everything now, whatever it has confirmed before.
    Caller,
    /// A close, until a sink fails. What was confirmed is enough.
    Close,
}

/// All sinks that the directory knows.
#[derive(Debug)]
pub(crate) struct Outbox {
    disk: Disk,
    config: DeliveryConfig,
    outlets: Vec<Outlet>,
    /// Some sink, attached or not, gets events.
    keeps_events: bool,
    /// What follows this batch of the journal holds nothing for sinks: the engine is closing.
    last: AtomicU64,
    /// Told after each attempt, and at the end.
    attempted: Condvar,
    attempts: Mutex<Attempts>,
}

/// What waiters for deliveries are woken for.
#[derive(Debug, Default)]
struct Attempts {
    count: u64,
    /// There are no more.
    is_over: bool,
}

impl Outbox {
    /// Attaches `sinks` where `states` say that they are; those that are not known begin with the
    /// totals. Those that want events, and did not before, get what is recorded after `head`, the
    /// last batch of the journal.
    pub(crate) fn open(
        storage: &Arc<dyn Storage>,
        engine: EngineId,
        files: &Arc<JournalFiles>,
        states: Vec<SinkState>,
        sinks: Vec<NamedSink>,
        head: BatchNumber,
        config: &DeliveryConfig,
    ) -> Result<Self> {
        let (storage, files) = (Arc::clone(storage), Arc::clone(files));
        let disk = Disk { storage, engine, files };
        disk.remove_unlisted(&states, |_| true)?;
        let mut states = states;
        let mut outlets = Vec::new();
        for (name, sink) in sinks {
            let known = states.iter().position(|state| state.name == name);
            let before = known.map(|known| states.swap_remove(known));
            let mut state = before.clone().unwrap_or_else(|| SinkState::new(&name));
            state.events_after = match wants_events(&*sink) {
                Some(true) => Some(state.events_after.unwrap_or(head)),
                Some(false) => None,
                // What is kept for it is not given up for that.
                None => state.events_after,
            };
            if before.as_ref() != Some(&state) {
                state.save(&disk.storage, engine)?;
            } else {
                state.keep_room(&disk.storage, 0);
            }
            outlets.push((state, Some(sink)));
        }
        states.sort_by(|a, b| a.name.cmp(&b.name));
        outlets.extend(states.into_iter().map(|state| (state, None)));
        let keeps_events = outlets.iter().any(|(state, _)| state.events_after.is_some());
        let outlets = outlets.into_iter().map(|(state, sink)| {
            let outlet = Outlet::new(state, sink, config);
            outlet.measure(&disk);
            outlet.progress.lock().note(head, uptime());
            outlet
        });
        let outlets = outlets.collect();
        let config = config.clone();
        let (attempted, attempts) = (Condvar::new(), Mutex::default());
        let last = AtomicU64::new(u64::MAX);
        Ok(Self { disk, config, outlets, keeps_events, last, attempted, attempts })
    }

    /// Refuses names that can't be a part of a file's, and those that are given twice.
    pub(crate) fn check_names(sinks: &[NamedSink]) -> Result<()> {
        for (index, (name, _)) in sinks.iter().enumerate() {
            if !is_valid_name(name) {
                return Err(Error::config("sink", name, NAMES_ALLOWED));
            }
            if sinks.iter().take(index).any(|(other, _)| other == name) {
                return Err(Error::config("sink", name, "each name once"));
            }
        }
        if sinks.len() > SINKS_MAX {
            return Err(Error::TooMany { what: Resource::Sinks, bound: SINKS_MAX as u64 });
        }
        Ok(())
    }

    /// Whether what is recorded is to be kept for a sink.
    pub(crate) fn keeps_events(&self) -> bool {
        self.keeps_events
    }

    /// How many sinks are attached.
    pub(crate) fn attached(&self) -> usize {
        self.outlets.iter().filter(|outlet| outlet.is_attached()).count()
    }

    /// Makes one attempt with each sink that is due and that no other worker serves. For how long
    /// there is nothing to do then.
    pub(crate) fn serve(&self, host: &dyn Host, is_stopping: &dyn Fn() -> bool) -> Duration {
        let cx = Context { disk: &self.disk, config: &self.config, host, is_stopping };
        let mut wait = LOOK_MAX;
        for outlet in self.outlets.iter().filter(|outlet| outlet.is_attached()) {
            if is_stopping() {
                break;
            }
            if let Some(idle) = outlet.serve(&cx) {
                wait = wait.min(idle);
                self.attempts.lock().count += 1;
                self.attempted.notify_all();
            }
        }
        wait.max(LOOK_MIN)
    }

    /// Asks for everything up to `batch`, whether or not its time has come.
    pub(crate) fn want(&self, batch: BatchNumber) {
        self.outlets.iter().for_each(|outlet| outlet.want(batch));
    }

    /// Waits, until `deadline`, for all attached sinks to confirm everything up to `batch`. `want`
    /// asks for it and wakes the workers.
    ///
    /// # Errors
    /// `NotDelivered`, of the first sink that it is true of; `Closed` where the engine is, and some
    /// sink has not got there.
    pub(crate) fn wait(
        &self,
        batch: BatchNumber,
        deadline: Duration,
        waiter: Waiter,
        want: impl FnOnce(),
    ) -> Result<()> {
        let attached = self.outlets.iter().filter(|outlet| outlet.is_attached());
        let before = attached.map(|outlet| {
            let mut progress = outlet.progress.lock();
            let question = match waiter {
                Waiter::Caller => progress.ask(),
                Waiter::Close => 0,
            };
            (outlet, question, progress.failures())
        });
        let before: Vec<_> = before.collect();
        want();
        loop {
            let mut attempts = self.attempts.lock();
            let is_late = uptime() >= deadline;
            let mut is_waiting = false;
            let mut failed = None;
            for (outlet, question, before) in &before {
                let progress = outlet.progress.lock();
                if progress.has(batch) && progress.is_answered(*question) {
                    continue;
                }
                let now = progress.failures();
                let has_given_up = match waiter {
                    Waiter::Caller => now.refusals > before.refusals,
                    Waiter::Close => now.all > before.all,
                };
                if is_late || has_given_up {
                    let sink = outlet.name.clone();
                    let (reason, source, is_retryable) = match progress.last_error() {
                        Some(LastError { reason, source, is_retryable }) => {
                            (reason.clone(), source.clone(), *is_retryable)
                        }
                        None => ("it takes too long".to_owned(), None, true),
                    };
                    let error = Error::NotDelivered { sink, reason, source, is_retryable };
                    failed.get_or_insert(error);
                } else {
                    is_waiting = true;
                }
            }
            match failed {
                Some(error) if !is_waiting => return Err(error),
                None if !is_waiting => return Ok(()),
                _ if attempts.is_over => return Err(Error::Closed),
                _ => {}
            }
            self.attempted.wait_for(&mut attempts, WAIT_MAX);
        }
    }

    /// Nothing is counted after this batch: no sink need confirm what a close writes after it.
    pub(crate) fn end_at(&self, batch: BatchNumber) {
        // Relaxed: for a report, nothing depends on it.
        self.last.store(batch.0, Ordering::Relaxed);
    }

    /// Notes since when what is durable now has been waiting, for each sink that the directory
    /// knows, and has those asked where they are that have been silent for long. Called every
    /// second, or what a sink misses would seem to be no older than the last time that somebody
    /// looked.
    pub(crate) fn note(&self, durable: BatchNumber, now: Duration) {
        let durable = self.until_end(durable);
        for outlet in &self.outlets {
            let mut progress = outlet.progress.lock();
            progress.note(durable, now);
            progress.ask_if_silent(now);
        }
    }

    /// How deliveries go at `now`, by uptime, for each sink that the directory knows.
    pub(crate) fn statuses(&self, durable: BatchNumber, now: Duration) -> Vec<SinkStatus> {
        let durable = self.until_end(durable);
        self.outlets.iter().map(|outlet| outlet.status(durable, now)).collect()
    }

    fn until_end(&self, durable: BatchNumber) -> BatchNumber {
        // Relaxed: see `end_at`.
        durable.min(BatchNumber(self.last.load(Ordering::Relaxed)))
    }

    /// What is wrong at `now`, by uptime.
    pub(crate) fn judge(
        &self,
        durable: BatchNumber,
        now: Duration,
        reasons: &mut Vec<HealthReason>,
    ) {
        for status in self.statuses(durable, now) {
            let SinkStatus { name: sink, lag_batches, .. } = status;
            let reason = status.last_error.unwrap_or_default();
            match status.condition {
                SinkCondition::Fine => {}
                SinkCondition::Down => {
                    let attempts = status.failures_in_a_row;
                    reasons.push(HealthReason::SinkDown { sink, attempts, lag_batches, reason });
                }
                SinkCondition::Refused => {
                    reasons.push(HealthReason::SinkRefused { sink, lag_batches, reason });
                }
                SinkCondition::Missing => {
                    let backlog_bytes = status.backlog_bytes;
                    reasons.push(HealthReason::SinkMissing { sink, lag_batches, backlog_bytes });
                }
            }
        }
    }

    /// Drops the sinks that no call is in. For workers that end, and for a close without workers.
    pub(crate) fn let_go_of_sinks(&self) {
        self.outlets.iter().for_each(Outlet::let_go);
    }

    /// Writes what is known, for the last time: nothing is written from here on.
    pub(crate) fn close(&self) -> Result<()> {
        self.attempts.lock().is_over = true;
        self.attempted.notify_all();
        self.let_go_of_sinks();
        let mut result = Ok(());
        for outlet in &self.outlets {
            result = result.and(outlet.close(&self.disk));
        }
        result
    }
}

impl JournalUser for Outbox {
    fn cover(
        &self,
        newest: Option<ChainPoint>,
        durable: BatchNumber,
        pace: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        self.outlets.iter().try_for_each(|outlet| outlet.cover(&self.disk, newest, durable, pace))
    }
}

/// Whether a sink, which may be anybody's code, wants events; `None` where it panics.
fn wants_events(sink: &dyn UsageSink) -> Option<bool> {
    catch_unwind(AssertUnwindSafe(|| sink.wants_events())).ok()
}

/// Makes a data directory forget a sink: what is kept for it is removed for good.
///
/// Use it for a sink that will not be attached again, or one whose backlog is damaged. If the sink
/// comes back, under any name, it must be empty (it then begins with the totals), or at a position
/// that the journal still reaches back to; otherwise it is refused. Do not use it for a sink that
/// is reported to be beyond the journal: that one knows of batches that are lost, see
/// [`salvage`](crate::salvage). Returns whether the sink was known.
///
/// # Errors
///
/// [`Error::Locked`] while a process has the directory open; [`Error::Io`], also if it is not a
/// data directory.
///
/// # Examples
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let dir = dir.path();
/// # tollgate::Tollgate::open(dir, tollgate::Config::default())?.close()?;
/// let was_known = tollgate::forget_sink(dir, "billing")?;
/// assert!(!was_known);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn forget_sink(dir: impl AsRef<Path>, name: &str) -> Result<bool> {
    let dir = dir.as_ref();
    if !dir.is_dir() {
        let missing = std::io::Error::from(std::io::ErrorKind::NotFound);
        return Err(Error::io("open", dir, missing));
    }
    // By a look, which leaves no lock's file behind in a directory that is another's.
    let look: Arc<dyn Storage> = Arc::new(RealStorage::open_read_only(dir)?);
    if identity::read(&look)?.is_none() {
        return Err(identity::no_directory(&look));
    }
    let storage: Arc<dyn Storage> = Arc::new(RealStorage::open_existing(dir)?);
    forget_on(&storage, name)
}

/// The state goes last: a backlog without it is taken for what a lost state leaves, and refused.
pub(crate) fn forget_on(storage: &Arc<dyn Storage>, sink: &str) -> Result<bool> {
    let mut names = storage.list().map_err(|error| Error::io("list", storage.path(""), error))?;
    names.retain(|name| {
        state::parse_file_name(name) == Some(sink) || state::parse_backlog_name(name) == Some(sink)
    });
    names.sort_by_key(|name| state::parse_file_name(name).is_some());
    for name in &names {
        storage.remove(name).map_err(|error| Error::io("remove", storage.path(name), error))?;
        storage.sync_directory().map_err(|error| Error::io("sync", storage.path(""), error))?;
    }
    Ok(!names.is_empty())
}
