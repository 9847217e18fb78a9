//! Deliveries to sinks that fail, on a simulated disk, without threads: one seed decides every
//! operation, every step of the flushers and of the workers, every fault, of disk and sinks, and
//! every death.
//!
//! Proves that a sink has, in the end, what the engine has, to the unit: whatever died when,
//! however far it lagged, and whenever it was added. `TOLLGATE_SIM_SEED=n` runs one life alone,
//! `TOLLGATE_SIM_RUNS` sets how many there are.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::flushers::Step;
use super::*;
use crate::clock::ManualClock;
use crate::delivery::{SinkCondition, state};
use crate::identity;
use crate::model::{Quota, Timestamp, Window};
use crate::sink::{Applied, MemorySink, MemoryStore, Position, SinkError, UsageBatch, UsageSink};
use crate::snapshot::{self, deltas::DeltasReader};
use crate::storage::sim::{Call, Fault, Outcome, SimDisk, SplitMix64};
use crate::wal::lanes::prefer;

const START: u64 = 1_767_225_600_000;
const USERS: u64 = 5;
const WINDOWS: [Window; 3] = [Window::Lifetime, Window::Minute, Window::Day];
const RUNS: u64 = 400;
const LIVES: usize = 6;

/// User, quota, start of the window.
type Key = (u64, usize, u64);
type Sums = BTreeMap<Key, i128>;

/// How a sink behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mood {
    Works,
    /// Every call may fail, in every way.
    Fails,
    Down,
}

/// A database that is far away: what was sent to it may be applied, and the answer lost, or it may
/// be applied later, when nobody expects it any more.
#[derive(Debug, Clone)]
pub(super) struct Remote {
    pub(super) store: MemoryStore,
    state: Arc<Mutex<RemoteState>>,
}

#[derive(Debug)]
pub(super) struct RemoteState {
    random: SplitMix64,
    mood: Mood,
    late: Option<UsageBatch>,
    /// Batches that were applied when nobody expected it.
    surprises: u64,
}

impl Remote {
    pub(super) fn new(seed: u64) -> Self {
        let state = RemoteState {
            random: SplitMix64::new(seed),
            mood: Mood::Works,
            late: None,
            surprises: 0,
        };
        Self { store: MemoryStore::new(), state: Arc::new(Mutex::new(state)) }
    }

    pub(super) fn set_mood(&self, mood: Mood) {
        self.state.lock().mood = mood;
    }

    pub(super) fn sink(&self) -> RemoteSink {
        RemoteSink { inner: self.store.sink(), state: Arc::clone(&self.state) }
    }

    /// What it has, by quota's number.
    fn sums(&self) -> Sums {
        let rows = self.store.rows().into_iter();
        rows.map(|((user, name, start), row)| {
            let quota = name.strip_prefix("quota-").unwrap().parse().unwrap();
            ((user, quota, start.map_or(0, Timestamp::as_unix_millis)), row.used)
        })
        .collect()
    }
}

pub(super) struct RemoteSink {
    inner: MemorySink,
    state: Arc<Mutex<RemoteState>>,
}

fn lost(what: &'static str) -> SinkError {
    SinkError::OutcomeUnknown { sink: "remote", source: what.into() }
}

impl RemoteState {
    fn below(&mut self, bound: usize) -> usize {
        self.random.index(bound)
    }

    /// What was under way arrives.
    fn arrive(&mut self, inner: &mut MemorySink) {
        if let Some(batch) = self.late.take() {
            // Refused where something else came first: nobody hears of it.
            self.surprises += u64::from(matches!(inner.apply(&batch), Ok(Applied::Now)));
        }
    }
}

impl UsageSink for RemoteSink {
    fn position(&mut self, engine: EngineId) -> std::result::Result<Option<Position>, SinkError> {
        let mut state = self.state.lock();
        let mood = state.mood;
        match mood {
            Mood::Down => return Err(lost("it is down")),
            Mood::Fails if state.below(3) == 0 => return Err(lost("no answer")),
            _ => {}
        }
        if state.below(2) == 0 {
            state.arrive(&mut self.inner);
        }
        let position = self.inner.position(engine);
        if state.below(2) == 0 {
            // The position that was just read is not the last word.
            state.arrive(&mut self.inner);
        }
        position
    }

    fn apply(&mut self, batch: &UsageBatch) -> std::result::Result<Applied, SinkError> {
        let mut state = self.state.lock();
        if state.mood == Mood::Down {
            return Err(lost("it is down"));
        }
        state.arrive(&mut self.inner);
        if state.mood == Mood::Fails {
            match state.below(6) {
                0 => return Err(lost("before the commit")),
                1 => {
                    self.inner.apply(batch)?;
                    return Err(lost("after the commit"));
                }
                2 => {
                    state.late = Some(batch.clone());
                    return Err(lost("on the way"));
                }
                3 => {
                    let reason = "it does not like it".to_owned();
                    return Err(SinkError::BadData { sink: "remote", reason, source: None });
                }
                _ => {}
            }
        }
        self.inner.apply(batch)
    }

    fn wants_events(&self) -> bool {
        true
    }
}

struct World {
    seed: u64,
    random: SplitMix64,
    disk: Arc<SimDisk>,
    clock: ManualClock,
    now: u64,
    remotes: Vec<Remote>,
    /// In which life a sink is attached first.
    added_in: Vec<usize>,
    /// When that was.
    added_at: Vec<Option<u64>>,
    owner: Option<Owner>,
    quotas: Vec<QuotaId>,
    /// What was acknowledged, where no power is lost.
    counted: Sums,
    /// Windows that are over are dropped at once, and the process is only killed: then `counted` is
    /// exact. Otherwise they are kept, and snapshot and journal are the reference.
    is_pruning: bool,
    may_fail: bool,
    log: Vec<String>,
    /// How many lives ended with a backlog.
    backlogs: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = SplitMix64::new(seed);
        let disk = SimDisk::new(random.next_u64());
        Self {
            seed,
            disk,
            clock: ManualClock::new(Timestamp::from_unix_millis(START)),
            now: START,
            remotes: (0..3).map(|_| Remote::new(random.next_u64())).collect(),
            added_in: vec![0, 0, 1 + random.index(LIVES - 1)],
            added_at: vec![None; 3],
            owner: None,
            quotas: Vec::new(),
            counted: Sums::new(),
            is_pruning: random.index(2) == 0,
            may_fail: false,
            log: Vec::new(),
            backlogs: 0,
            random,
        }
    }

    fn config(&mut self) -> Config {
        let retention = Duration::from_hours(if self.is_pruning { 0 } else { 24 * 3650 });
        let batch_size = 1 + self.random.index(12);
        Config::default()
            .lanes(2)
            .lane_records(64)
            .shards(2)
            .journal_file_bytes(64 << 10)
            .snapshot_journal_bytes(64 << 10)
            .closed_window_retention(retention)
            .sync_interval(Duration::from_secs(60))
            .backpressure_deadline(Duration::ZERO)
            .delivery(|it| it.batch_size(batch_size))
            .clock(Arc::new(self.clock.clone()))
    }

    fn fail(&self, what: &str) -> ! {
        let from = self.log.len().saturating_sub(300);
        panic!("seed {}: {what}\nafter:\n{}", self.seed, self.log[from..].join("\n"));
    }

    fn engine(&self) -> &Engine {
        &self.owner.as_ref().expect("open within a life").engine
    }

    /// Opens with the sinks that were added by now, or with some of them.
    fn open(&mut self, life: usize, all: bool) -> bool {
        for attempt in 0.. {
            let mut sinks: Vec<NamedSink> = Vec::new();
            for (index, remote) in self.remotes.iter().enumerate() {
                if life >= self.added_in[index] && (all || self.random.index(5) > 0) {
                    sinks.push((format!("sink-{index}"), Box::new(remote.sink())));
                }
            }
            let names: Vec<_> = sinks.iter().map(|(name, _)| name.clone()).collect();
            let storage = self.disk.storage();
            let config = self.config();
            let opened = Owner::open_at_rest_with(&storage, config, sinks).and_then(|owner| {
                let define = |index| {
                    let quota = Quota::new(format!("quota-{index}"), 1 << 40);
                    owner.engine.define(&quota.window(WINDOWS[index]))
                };
                let quotas = (0..WINDOWS.len()).map(define).collect::<Result<Vec<_>>>()?;
                Ok((owner, quotas))
            });
            self.log.push(format!("open with {names:?}: {:?}", opened.as_ref().err()));
            match opened {
                _ if self.disk.has_crashed() => {
                    drop(opened);
                    return false;
                }
                Ok((owner, quotas)) => {
                    (self.owner, self.quotas) = (Some(owner), quotas);
                    for index in 0..self.remotes.len() {
                        if names.contains(&format!("sink-{index}")) {
                            self.added_at[index].get_or_insert(self.now);
                        }
                    }
                    return true;
                }
                Err(error) if self.may_fail && attempt == 0 => {
                    self.log.push(format!("open failed: {error}"));
                    self.disk.clear_faults();
                }
                Err(error) => self.fail(&format!("refused: {error}")),
            }
        }
        false
    }

    fn arm(&mut self) {
        self.may_fail = false;
        match self.random.index(10) {
            0..3 => {}
            3..8 => {
                let nth = self.random.index(400) as u64;
                let parts = u8::try_from(self.random.index(256)).expect("a byte");
                self.log.push(format!("crash at call {nth}, within a write after {parts}/256"));
                self.disk.crash_within(nth, parts);
            }
            _ if self.is_pruning => {}
            _ => {
                self.may_fail = true;
                let calls = [Call::Create, Call::Write, Call::Sync, Call::Rename, Call::Remove];
                let call = calls[self.random.index(calls.len())];
                let nth = self.random.index(60) as u64;
                let outcome = [Outcome::Eio, Outcome::Enospc][self.random.index(2)];
                self.log.push(format!("{call:?} {nth} {outcome:?}"));
                self.disk.inject(Fault::new(call, nth, outcome));
            }
        }
        for remote in &self.remotes {
            let mood = [Mood::Works, Mood::Fails, Mood::Fails, Mood::Down][self.random.index(4)];
            remote.set_mood(mood);
            self.log.push(format!("{mood:?}"));
        }
    }

    fn live(&mut self, life: usize) {
        self.arm();
        let mut under_way = None;
        if self.open(life, false) {
            for _ in 0..30 + self.random.index(150) {
                under_way = self.step();
                if self.disk.has_crashed() {
                    break;
                }
            }
        }
        self.die(under_way);
    }

    /// What the operation adds whose end was not seen.
    fn step(&mut self) -> Option<(Key, i128)> {
        let (user, quota) = (self.random.next_u64() % USERS, self.random.index(3));
        prefer(self.random.index(2));
        let amount = 1 + self.random.index(30) as u64;
        let step = match self.random.index(100) {
            0..40 => return self.consume(user, quota, amount, false),
            40..48 => return self.consume(user, quota, amount, true),
            48..56 => return self.refund(user, quota, amount),
            56..60 => {
                let millis = [1_000, 61_000, 86_400_000][self.random.index(3)];
                self.clock.advance(Duration::from_millis(millis));
                self.now += millis;
                return None;
            }
            60..78 => {
                self.engine().serve_sinks();
                self.log.push("serve".to_owned());
                return None;
            }
            78..84 => Step::Sync,
            84..86 => Step::Drain,
            86..88 => Step::Append,
            88..92 => Step::Files,
            _ => {
                let result = self.engine().snapshot();
                self.note("snapshot", result);
                return None;
            }
        };
        let result = self.engine().step(step);
        self.note(step, result);
        None
    }

    fn note(&mut self, what: impl std::fmt::Debug, result: Result<()>) {
        self.log.push(format!("{what:?} -> {result:?}"));
        if let Err(error) = result {
            let is_excused = self.may_fail || self.disk.has_crashed() || error.is_disk_full();
            if !is_excused {
                self.fail(&error.to_string());
            }
        }
    }

    fn key(&self, user: u64, quota: usize) -> Key {
        let start = match WINDOWS[quota] {
            Window::Minute => self.now / 60_000 * 60_000,
            Window::Day => self.now / 86_400_000 * 86_400_000,
            _ => 0,
        };
        (user, quota, start)
    }

    fn consume(&mut self, user: u64, quota: usize, amount: u64, sync: bool) -> Option<(Key, i128)> {
        let counted = self.engine().counted(user, self.quotas[quota]).unwrap();
        let result = self.engine().consume(&counted, amount, sync);
        let added = (self.key(user, quota), i128::from(amount));
        self.log.push(format!("{added:?} -> {:?}", result.as_ref().err()));
        match result {
            _ if self.disk.has_crashed() => Some(added),
            Ok(_) => {
                *self.counted.entry(added.0).or_default() += added.1;
                None
            }
            Err(Error::Backpressure { .. }) => None,
            Err(error) if self.may_fail || error.is_disk_full() => None,
            Err(error) => self.fail(&error.to_string()),
        }
    }

    fn refund(&mut self, user: u64, quota: usize, amount: u64) -> Option<(Key, i128)> {
        let counted = self.engine().counted(user, self.quotas[quota]).unwrap();
        let given = self.engine().refund(&counted, amount);
        let key = self.key(user, quota);
        self.log.push(format!("{key:?} -{given:?}"));
        let given = i128::from(given.unwrap_or(0));
        if self.disk.has_crashed() {
            return Some((key, -given));
        }
        if given > 0 {
            *self.counted.entry(key).or_default() -= given;
        }
        None
    }

    fn die(&mut self, under_way: Option<(Key, i128)>) {
        let owner = self.owner.take();
        let is_power_cut = !self.is_pruning && self.random.index(3) == 0;
        let is_closed = !is_power_cut && !self.disk.has_crashed() && self.random.index(2) == 0;
        self.log.push(format!("end: cut {is_power_cut}, closed {is_closed}"));
        if is_closed && let Some(owner) = &owner {
            let result = owner.close();
            self.note("close", result);
        }
        if is_power_cut {
            self.disk.power_cut();
        } else {
            self.disk.kill();
        }
        drop(owner);
        self.disk.clear_faults();
        self.may_fail = false;
        self.examine_backlogs();
        let names = self.disk.file_names();
        self.backlogs += u64::from(names.iter().any(|name| name.starts_with("backlog")));
        let Some((key, added)) = under_way else { return };
        if !self.is_pruning {
            return;
        }
        // There or not: look.
        if !self.open(0, false) {
            self.fail("did not open");
        }
        let counted = self.engine().counted(key.0, self.quotas[key.1]).unwrap();
        let used = i128::from(self.engine().usage(&counted).used);
        let before = self.counted.get(&key).copied().unwrap_or(0);
        if used == before + added {
            *self.counted.entry(key).or_default() += added;
        } else if used != before {
            self.fail(&format!("{key:?} is {used}, not {before} or {added} more"));
        }
        self.disk.kill();
        self.owner = None;
    }

    /// Whatever the end: each part of a backlog that a state names is there.
    fn examine_backlogs(&self) {
        let storage = self.disk.storage();
        let Ok(Some(identity)) = identity::read(&storage) else { return };
        for sink in state::load_all(&storage, identity.engine).unwrap() {
            for &range in &sink.backlog {
                let name = state::backlog_name(&sink.name, range);
                if let Err(error) = DeltasReader::open(&storage, identity.engine, range, &name) {
                    self.fail(&format!("{error}: {sink:?}"));
                }
            }
        }
    }

    /// All sinks work and are given everything; then they have what the engine has.
    fn finish(&mut self) {
        for remote in &self.remotes {
            remote.set_mood(Mood::Works);
        }
        assert!(self.open(LIVES, true));
        self.engine().sync().unwrap();
        for _ in 0..2000 {
            if self.engine().sinks().iter().all(|sink| sink.lag_batches == 0) {
                break;
            }
            self.engine().serve_sinks();
        }
        for status in self.engine().sinks() {
            if status.lag_batches > 0 || status.condition != SinkCondition::Fine {
                self.fail(&format!("{status:?}"));
            }
        }
        let expected = if self.is_pruning { self.counted.clone() } else { self.on_disk() };
        for (index, remote) in self.remotes.iter().enumerate() {
            let found = remote.sums();
            let added_at = self.added_at[index].expect("it is attached now");
            let keys = expected.keys().chain(found.keys());
            for &key in keys {
                let [has, should] =
                    [&found, &expected].map(|sums| sums.get(&key).copied().unwrap_or(0));
                // Windows that were over when the sink was added may be gone.
                let length = [u64::MAX, 60_000, 86_400_000][key.1];
                let was_over = key.2.saturating_add(length) <= added_at;
                if has != should && !(self.is_pruning && was_over && has == 0) {
                    self.fail(&format!("sink {index}: {key:?} is {has}, not {should}"));
                }
            }
        }
        self.compare_with_memory(&expected);
        let left = self.disk.file_names().into_iter().filter(|name| name.starts_with("backlog"));
        assert_eq!(left.collect::<Vec<_>>(), [""; 0], "nobody lags");
        self.owner = None;
    }

    fn compare_with_memory(&self, expected: &Sums) {
        for (user, quota) in (0..USERS).flat_map(|user| (0..3).map(move |quota| (user, quota))) {
            let counted = self.engine().counted(user, self.quotas[quota]).unwrap();
            let used = i128::from(self.engine().usage(&counted).used);
            let key = self.key(user, quota);
            if used != expected.get(&key).copied().unwrap_or(0) {
                self.fail(&format!("{key:?}: memory has {used}"));
            }
        }
    }

    /// The sums of the newest snapshot after everything was merged.
    fn on_disk(&self) -> Sums {
        self.engine().snapshot().unwrap();
        let newest = self.disk.file_names().into_iter();
        let newest = newest.filter_map(|name| snapshot::parse_file_name(&name)).max().unwrap();
        let storage = self.owner.as_ref().map(|owner| Arc::clone(&owner.storage)).unwrap();
        let mut reader =
            snapshot::SnapshotReader::open(&storage, self.engine().id(), newest).unwrap();
        let mut sums = Sums::new();
        while let Some(sum) = snapshot::merge::SumSource::next_sum(&mut reader).unwrap() {
            let key = (sum.key.user, usize::from(sum.key.quota.as_u16()), sum.key.window.0);
            sums.insert(key, sum.amount);
        }
        sums
    }
}

pub(super) fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn in_the_end_every_sink_has_what_the_engine_has() {
    let first = number("TOLLGATE_SIM_SEED");
    let default = if first.is_some() { 1 } else { RUNS };
    let runs = number("TOLLGATE_SIM_RUNS").unwrap_or(default);
    let first = first.unwrap_or(1);
    let (mut backlogs, mut surprises) = (0, 0);
    for seed in first..first + runs {
        let mut world = World::new(seed);
        for life in 0..LIVES {
            world.live(life);
        }
        world.finish();
        backlogs += world.backlogs;
        surprises += world.remotes.iter().map(|it| it.state.lock().surprises).sum::<u64>();
    }
    // The lives meet what they are there for.
    let least = if runs < 100 { 0 } else { runs / 4 };
    assert!(backlogs >= least && surprises >= least, "{backlogs} backlogs, {surprises} surprises");
}
