//! The engine: opens, wires and closes the parts. The only place, besides recovery, that knows both
//! admission and the log.

mod changes;
mod events;
mod fast_paths;
mod flushers;
mod group;
mod keepers;
mod observe;
mod opening;
mod operations;
mod requests;
mod reserving;
mod sinks;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::{Condvar, Mutex, RwLock};

use crate::admission::quotas::{QuotaState, Quotas};
use crate::admission::remembered::Remembered;
use crate::admission::reservations::Reservations;
use crate::admission::settled::Settled;
use crate::admission::shared::{Handle, SharedCells};
use crate::admission::table::Table;
use crate::admission::word;
use crate::clock::{BelievedClock, CoarseClock};
use crate::config::Config;
use crate::delivery::{NamedSink, Outbox};
use crate::error::{Error, Result};
use crate::flush::commit::{Committer, Target};
use crate::flush::compact::{CompactPolicy, Compactor, JournalUser};
use crate::flush::drain::{Drain, DrainLimits};
use crate::flush::threads::{Flushers, Pulse};
use crate::journal::pool::JournalFiles;
use crate::ledger::Kept;
use crate::model::{Definition, EngineId, QuotaId, Timestamp};
use crate::poison::Poison;
use crate::process::Process;
use crate::recovery::{self, Recovered, RecoveryReport, Wanted};
use crate::stats::CallerCounts;
use crate::storage::Storage;
use crate::wal::crc::Crc32c;
use crate::wal::lanes::Lanes;

pub(crate) use keepers::{Keeper, Keepers};
use observe::Passing;
pub(crate) use opening::Opening;
pub(crate) use operations::Counted;
use operations::Unlogged;
pub(crate) use requests::ReservedOnce;
pub(crate) use reserving::Charge;

/// Everything that callers and flushers share.
#[derive(Debug)]
// In this order: what every operation needs comes first, on few cache lines. After a pause none of
// them is at hand.
#[repr(C)]
pub(crate) struct Engine {
    table: Table,
    quotas: Quotas,
    clock: Arc<CoarseClock>,
    lanes: Arc<Lanes>,
    /// All that every operation asks of the configuration.
    durable_consumes: bool,
    id: EngineId,
    reservations: Reservations,
    /// How reservations ended.
    settled: Settled,
    /// What was answered to requests with an id.
    answers: Remembered<u128, Kept>,
    /// The quotas by name.
    names: RwLock<HashMap<String, QuotaId>>,
    /// Held while a quota is defined.
    half_defined: Mutex<Option<HalfDefined>>,
    committer: Arc<Committer>,
    files: Arc<JournalFiles>,
    compactor: Compactor,
    outbox: Arc<Outbox>,
    poison: Arc<Poison>,
    counts: CallerCounts,
    unlogged: Unlogged,
    /// For what can't be taken back.
    believed: BelievedClock,
    room: Room,
    pulses: Pulses,
    troubles: Troubles,
    report: RecoveryReport,
    /// Held by who changes a user's limit, from the look for what the change is to.
    limits_changing: Mutex<()>,
    is_closed: AtomicBool,
    config: Config,
}

/// A quota whose definition is in a batch that could not be written yet: it will be, under its id,
/// but nobody may use it before, nor define another new one.
#[derive(Debug)]
struct HalfDefined {
    target: Target,
    definition: Definition,
}

/// Where callers wait when the rings are full.
#[derive(Debug, Default)]
struct Room {
    /// How many callers wait.
    waiting: AtomicUsize,
    lock: Mutex<()>,
    freed: Condvar,
}

/// The flushers' life signs.
#[derive(Debug)]
struct Pulses {
    clock: Arc<Pulse>,
    drain: Arc<Pulse>,
    sync: Arc<Pulse>,
    files: Arc<Pulse>,
    merge: Arc<Pulse>,
    expiry: Arc<Pulse>,
    /// One for each worker that serves sinks.
    sinks: Vec<Arc<Pulse>>,
}

impl Pulses {
    /// How long a thread may be silent whose pieces of work are short. A sync takes as long as the
    /// disk does; one that takes longer than this is worth being told of.
    const SILENCE_MAX: Duration = Duration::from_millis(800);
    /// The same for those that write whole files: nobody waits for these as long as the journal has
    /// room. When it has none, health says that.
    const FILE_SILENCE_MAX: Duration = Duration::from_secs(5);

    fn new(stop: &Arc<AtomicBool>, sink_stop: &Arc<AtomicBool>, sink_workers: usize) -> Self {
        // A sink may take as long as it likes: how it does is said of the sink.
        let sink_pulse = |_| Pulse::new("tollgate-sink", Duration::MAX, sink_stop);
        Self {
            clock: Pulse::new("tollgate-clock", Self::SILENCE_MAX, stop),
            drain: Pulse::new("tollgate-drain", Self::SILENCE_MAX, stop),
            sync: Pulse::new("tollgate-sync", Self::SILENCE_MAX, stop),
            files: Pulse::new("tollgate-files", Self::FILE_SILENCE_MAX, stop),
            merge: Pulse::new("tollgate-merge", Self::FILE_SILENCE_MAX, stop),
            // It waits for room in the log as callers do.
            expiry: Pulse::new("tollgate-expiry", Self::FILE_SILENCE_MAX, stop),
            sinks: (0..sink_workers).map(sink_pulse).collect(),
        }
    }

    fn all(&self) -> [&Arc<Pulse>; 6] {
        [&self.clock, &self.drain, &self.sync, &self.files, &self.merge, &self.expiry]
    }
}

/// What the flushers met last, until it works again.
#[derive(Debug, Default)]
struct Troubles {
    journal: Mutex<Option<String>>,
    files: Mutex<Option<String>>,
    snapshots: Mutex<Option<String>>,
    /// A merge could not read a batch back.
    batches: Mutex<Option<String>>,
    /// Where the directory was, while it is not there.
    moved_from: Mutex<Option<std::path::PathBuf>>,
    clock: Mutex<Option<ClockJump>>,
    clock_jumps: AtomicU64,
    /// Operations admitted unlogged.
    unlogged: Passing,
    /// Syncs made good in another file.
    rescued: Passing,
}

/// The wall clock went another way than the monotonic one.
#[derive(Debug, Clone, Copy)]
struct ClockJump {
    by: Duration,
    backwards: bool,
    /// By the monotonic clock.
    at: Duration,
}

/// Owns the engine and its threads: dropping it closes the engine.
#[derive(Debug)]
pub(crate) struct Owner {
    pub(crate) engine: Arc<Engine>,
    flushers: Mutex<Flushers>,
    /// Apart from the flushers: a sink may keep its worker for longer than a close waits.
    sink_workers: Mutex<Flushers>,
    storage: Arc<dyn Storage>,
    process: Process,
    /// Why the first close failed, if it did.
    close_failure: Mutex<Option<Error>>,
    /// What is shared by the handles of each quota that has some.
    bound: Mutex<HashMap<QuotaId, Weak<Bound>>>,
}

/// What all handles of a quota share. Keeps the engine open.
#[derive(Debug)]
pub(crate) struct Bound {
    pub(crate) engine: Arc<Engine>,
    pub(crate) quota: Arc<QuotaState>,
    _owner: Arc<Owner>,
}

impl Bound {
    /// A user's counter of the quota, shared from now on.
    pub(crate) fn share(&self, user: u64) -> Result<Handle<'_>> {
        self.engine.share(&Counted { user, quota: &self.quota, cell: None })
    }
}

impl AsRef<SharedCells> for Bound {
    fn as_ref(&self) -> &SharedCells {
        self.engine.shared()
    }
}

impl Owner {
    /// Takes a data directory, creates or recovers it, and starts the flushers.
    pub(crate) fn open(opening: &Opening, config: Config, sinks: Vec<NamedSink>) -> Result<Self> {
        // Here already, so that no directory is made for what is refused.
        config.validate()?;
        Outbox::check_names(&sinks)?;
        Self::open_with(&opening.storage()?, config, sinks)
    }

    /// [`open_with`](Self::open_with) without sinks.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn open_on(storage: &Arc<dyn Storage>, config: Config) -> Result<Self> {
        Self::open_with(storage, config, Vec::new())
    }

    /// [`open`](Self::open) on any storage.
    pub(crate) fn open_with(
        storage: &Arc<dyn Storage>,
        config: Config,
        sinks: Vec<NamedSink>,
    ) -> Result<Self> {
        let owner = Self::open_at_rest_with(storage, config, sinks)?;
        owner.engine.start(&mut owner.flushers.lock())?;
        owner.engine.start_sinks(&mut owner.sink_workers.lock())?;
        Ok(owner)
    }

    /// Opens without the threads: nothing happens by itself.
    #[cfg(all(test, not(loom)))]
    fn open_at_rest(storage: &Arc<dyn Storage>, config: Config) -> Result<Self> {
        Self::open_at_rest_with(storage, config, Vec::new())
    }

    fn open_at_rest_with(
        storage: &Arc<dyn Storage>,
        config: Config,
        sinks: Vec<NamedSink>,
    ) -> Result<Self> {
        config.validate()?;
        Outbox::check_names(&sinks)?;
        require_instructions()?;
        let clock = CoarseClock::new(Arc::clone(&config.clock));
        let wanted = wanted(&config, clock.refresh());
        let recovered = recovery::recover(storage, &wanted)?;
        let (stop, sink_stop) = (Arc::default(), Arc::default());
        let stops = [&stop, &sink_stop];
        let engine = Arc::new(Engine::assemble(storage, config, clock, sinks, recovered, stops)?);
        let files_pulse = Arc::clone(&engine.pulses.files);
        engine.files.set_wake_preparer(move || files_pulse.kick());
        engine.merge_what_piled_up();
        Ok(Self {
            engine,
            flushers: Mutex::new(Flushers::new(stop)),
            sink_workers: Mutex::new(Flushers::new(sink_stop)),
            storage: Arc::clone(storage),
            process: Process::this(),
            close_failure: Mutex::default(),
            bound: Mutex::default(),
        })
    }

    /// Refuses new operations, makes everything durable, gives the sinks a last chance, stops the
    /// flushers, and lets go of the directory. The second call only says how the first one went,
    /// and does nothing, nor does any in a forked process.
    pub(crate) fn close(&self) -> Result<()> {
        if let Some(closed) = self.close_once() {
            return closed;
        }
        self.close_failure.lock().as_ref().map_or(Ok(()), |first| Err(first.again()))
    }

    /// [`close`](Self::close); `None` where that was done before.
    fn close_once(&self) -> Option<Result<()>> {
        // What it would write are the sums from before the fork, at the place where the parent
        // writes, and its locks may be held by threads that are not there.
        if !self.process.is_this() {
            return None;
        }
        let mut flushers = self.flushers.lock();
        if self.engine.mark_closed() {
            return None;
        }
        let is_quiet = self.engine.lanes.close();
        let synced = self.engine.committer.commit();
        self.engine.finish_sinks(&mut self.sink_workers.lock(), synced.is_ok());
        flushers.stop();
        // Once more: the batch that says that all before it is durable.
        let marked = synced.and_then(|()| self.engine.committer.commit());
        self.engine.committer.close();
        self.engine.compactor.wait();
        let positions = self.engine.outbox.close();
        let quiet = if is_quiet {
            self.storage.release();
            Ok(())
        } else {
            // What that thread writes must not reach whoever opens the directory next.
            let reason = "a thread was stopped in the middle of an operation: the directory stays \
                          locked until the process ends";
            Err(Error::durability_lost(reason))
        };
        let closed = marked.and(positions).and(quiet);
        // Under the flushers' lock: who closes at the same time waits for it, and finds this.
        *self.close_failure.lock() = closed.as_ref().err().map(Error::again);
        Some(closed)
    }
}

/// What counters and log are built on.
fn require_instructions() -> Result<()> {
    if !word::is_supported() {
        return Err(Error::UnsupportedProcessor { lacks: "cmpxchg16b" });
    }
    Crc32c::detect().map(drop)
}

fn compact_policy(config: &Config) -> CompactPolicy {
    CompactPolicy {
        journal_bytes_min: config.snapshot_journal_bytes,
        journal_percent: u64::from(config.snapshot_journal_percent),
        retention: config.closed_window_retention,
        remembering: config.remembering(),
    }
}

/// What recovery is asked for.
fn wanted(config: &Config, now: Timestamp) -> Wanted {
    Wanted {
        lanes: config.lanes,
        lane_records: config.lane_records,
        journal_file_bytes: journal_file_bytes(config),
        shards: config.shards,
        counters_expected: config.counters_expected,
        remembering: config.remembering(),
        now,
    }
}

fn journal_file_bytes(config: &Config) -> u64 {
    DrainLimits::file_bytes(config.journal_file_bytes, config.lanes)
}

/// The reservations and answers of earlier lives.
struct Remembrance {
    reservations: Reservations,
    settled: Settled,
    answers: Remembered<u128, Kept>,
}

impl Remembrance {
    fn new(recovered: &Recovered, config: &Config, now: Timestamp) -> Self {
        let Recovered { generation, first_reservation, ref ledger, .. } = *recovered;
        let (remembering, open_max) = (config.remembering(), config.reservations_max);
        let hasher = recovered.table.hasher().clone();
        let reservations = Reservations::new(generation, first_reservation, open_max, hasher);
        for (id, expires, parts) in ledger.open() {
            reservations.load(id, expires, parts);
        }
        let settled = Settled::new(generation, remembering, open_max, now);
        for (id, how, at) in ledger.settled(now) {
            settled.insert(id, how, at, now);
        }
        settled.sweep(now);
        let answers = Remembered::new(remembering);
        for answer in ledger.answers(now) {
            answers.insert(answer.request, answer.into(), answer.at, now);
        }
        answers.sweep(now);
        Self { reservations, settled, answers }
    }
}

/// Faults the first pages of the rings in, so that the first stores do not wait for it.
fn prefault(lanes: &Lanes) {
    /// Records in all lanes together: 4 MiB of pages.
    const RECORDS: u64 = 1 << 17;
    for lane in lanes.iter() {
        let share = RECORDS / lanes.len() as u64;
        if let Err(error) = lane.prefault(lane.tail(), share) {
            tracing::debug!(%error, "rings can't be prefaulted; first stores will be slower");
            return;
        }
    }
}

impl Owner {
    /// Whether this process opened the engine. A system call.
    pub(crate) fn is_of_this_process(&self) -> bool {
        self.process.is_this()
    }

    /// What handles of this quota share.
    pub(crate) fn bind(self: &Arc<Self>, id: QuotaId) -> Result<Arc<Bound>> {
        let quota = Arc::clone(self.engine.quota(id)?);
        self.engine.refuse_when_closed()?;
        let mut bound = self.bound.lock();
        if let Some(known) = bound.get(&id).and_then(Weak::upgrade) {
            return Ok(known);
        }
        let engine = Arc::clone(&self.engine);
        let new = Arc::new(Bound { engine, quota, _owner: Arc::clone(self) });
        bound.insert(id, Arc::downgrade(&new));
        Ok(new)
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        if !self.process.is_this() {
            self.flushers.get_mut().disown();
            self.sink_workers.get_mut().disown();
        }
        // A failure that was returned before is not told again.
        if let Some(Err(error)) = self.close_once() {
            tracing::error!(%error, "closing failed; what was not synced is recovered at the next open");
        }
    }
}

impl Engine {
    /// Puts the parts together, around what was recovered. The flushers stop at `stop`, the sinks'
    /// workers at `sink_stop`.
    fn assemble(
        storage: &Arc<dyn Storage>,
        config: Config,
        clock: Arc<CoarseClock>,
        sinks: Vec<NamedSink>,
        recovered: Recovered,
        [stop, sink_stop]: [&Arc<AtomicBool>; 2],
    ) -> Result<Self> {
        let Remembrance { reservations, settled, answers } =
            Remembrance::new(&recovered, &config, clock.now());
        let (id, files, poison) = (recovered.engine, recovered.files, Arc::default());
        let lanes = Arc::new(recovered.lanes);
        prefault(&lanes);
        let head = recovered.writer.head().number;
        let limits = DrainLimits::new(journal_file_bytes(&config), config.unsynced_bytes_max);
        let (writer, drained) = (recovered.writer, Arc::clone(&lanes));
        let drain = Drain::new(id, Arc::clone(&clock), drained, writer, limits);
        let committer = Arc::new(Committer::new(
            drain,
            Arc::clone(&files),
            Arc::clone(&clock),
            Arc::clone(&poison),
        ));
        let (known, delivery) = (recovered.sinks, &config.delivery);
        let outbox = Outbox::open(storage, id, &files, known, sinks, head, delivery)?;
        let sink_workers = config.delivery.worker_count.min(outbox.attached());
        let outbox = Arc::new(outbox);
        let compactor = Compactor::new(
            Arc::clone(storage),
            id,
            Arc::clone(&clock),
            Arc::clone(&files),
            Arc::clone(&committer),
            Arc::clone(&outbox) as Arc<dyn JournalUser>,
            compact_policy(&config),
            recovered.snapshots,
        );
        let names = recovered.quotas.iter().map(|quota| {
            let definition = quota.definition();
            (definition.name.clone(), definition.id)
        });
        Ok(Self {
            id,
            durable_consumes: config.durable_consumes,
            names: RwLock::new(names.collect()),
            half_defined: Mutex::new(None),
            table: recovered.table,
            quotas: recovered.quotas,
            reservations,
            settled,
            answers,
            lanes,
            committer,
            files,
            compactor,
            outbox,
            poison,
            counts: CallerCounts::default(),
            unlogged: Unlogged::default(),
            believed: BelievedClock::new(Arc::clone(&clock)),
            room: Room::default(),
            pulses: Pulses::new(stop, sink_stop, sink_workers),
            troubles: Troubles::default(),
            report: recovered.report,
            limits_changing: Mutex::default(),
            is_closed: AtomicBool::new(false),
            clock,
            config,
        })
    }

    pub(crate) fn id(&self) -> EngineId {
        self.id
    }

    pub(crate) fn report(&self) -> &RecoveryReport {
        &self.report
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod agreement_tests;
#[cfg(test)]
#[cfg(not(loom))]
mod change_tests;
#[cfg(test)]
#[cfg(not(loom))]
mod clock_tests;
#[cfg(test)]
#[cfg(not(loom))]
mod crash_tests;
#[cfg(test)]
#[cfg(not(loom))]
mod delivery_tests;
#[cfg(test)]
#[cfg(not(loom))]
mod durable_tests;
#[cfg(test)]
#[cfg(not(loom))]
mod event_lives_tests;
#[cfg(test)]
#[cfg(not(loom))]
mod event_tests;
#[cfg(test)]
#[cfg(not(loom))]
mod failing_disk_tests;
#[cfg(test)]
#[cfg(not(loom))]
mod ledger_tests;
#[cfg(test)]
#[cfg(not(loom))]
mod merge_trouble_tests;
#[cfg(test)]
#[cfg(not(loom))]
mod order_tests;
#[cfg(test)]
#[cfg(not(loom))]
mod reopen_tests;
#[cfg(test)]
#[cfg(not(loom))]
mod restart_tests;
#[cfg(test)]
#[cfg(not(loom))]
mod settling_tests;
#[cfg(test)]
#[cfg(not(loom))]
mod simulated_tests;
#[cfg(test)]
#[cfg(not(loom))]
mod sink_backlog_tests;
#[cfg(test)]
#[cfg(not(loom))]
mod sink_crash_tests;
#[cfg(test)]
#[cfg(not(loom))]
mod sink_emptied_tests;
#[cfg(test)]
#[cfg(not(loom))]
mod sink_end_tests;
#[cfg(test)]
#[cfg(not(loom))]
mod sink_tests;
#[cfg(test)]
#[cfg(not(loom))]
mod tests;
