//! Lives of an engine on a simulated disk, without threads: one seed decides every operation, every
//! step of the flushers, every fault and every death.
//!
//! Proves I1 and I2 as [`Tally`] states them, and that an engine whose disk fails says so and loses
//! nothing. A failure names its seed; `TOLLGATE_SIM_SEED=n` runs that one alone, and
//! `TOLLGATE_SIM_RUNS` sets how many follow.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use super::flushers::Step;
use super::*;
use crate::clock::ManualClock;
use crate::model::{Quota, QuotaId, Timestamp, Window};
use crate::storage::sim::{Call, Fault, Outcome, SimDisk, SplitMix64};
use crate::wal::lanes::prefer;

const START: u64 = 1_767_225_600_000;
const USERS: u64 = 4;
const WINDOWS: [Window; 3] = [Window::Lifetime, Window::Minute, Window::Day];
const DEFAULT_LIMIT: u64 = 60;
const RUNS: u64 = 2000;
const LIVES: usize = 5;

type Key = (u64, usize);

/// What a counter may hold, in the window that it was used in last.
#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    window: u64,
    /// What was acknowledged: the engine says exactly this while it lives, and after the death of
    /// its process, but for the operation that was under way.
    used: u64,
    /// What `used` was at the last sync, and what came and went since: after a loss of power any
    /// part of that may be gone.
    synced: u64,
    consumed_since: u64,
    refunded_since: u64,
}

/// The operation that the process died in.
#[derive(Debug, Clone, Copy)]
enum UnderWay {
    Consume(Key, u64),
    Limit(Key, Option<u64>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Death {
    Close,
    Kill,
    PowerCut,
}

struct World {
    seed: u64,
    random: SplitMix64,
    disk: Arc<SimDisk>,
    clock: ManualClock,
    now: u64,
    lanes: usize,
    owner: Option<Owner>,
    quotas: Vec<QuotaId>,
    tallies: BTreeMap<Key, Tally>,
    /// What each limit may be: one value, but after an unknown outcome.
    limits: BTreeMap<Key, BTreeSet<Option<u64>>>,
    under_way: Option<UnderWay>,
    /// Faults were injected in this life: calls that need the disk may fail.
    may_fail: bool,
    /// Since the last sync that went well, pages that a failed one had lost were evicted: a process
    /// that dies before it has written them again takes them with it.
    was_evicted: bool,
    /// The engine has said in this life that what it counted may not be durable.
    was_told: bool,
    /// What was lost so, after it was said, has left a directory that an open refuses.
    is_over: bool,
    /// How many lives have ended with batches that no sync had covered.
    ended_unsynced: u64,
    log: Vec<String>,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = SplitMix64::new(seed);
        let disk = SimDisk::new(random.next_u64());
        disk.set_loose_directory(random.index(4) == 0);
        Self {
            seed,
            lanes: 1 + random.index(3),
            random,
            disk,
            clock: ManualClock::new(Timestamp::from_unix_millis(START)),
            now: START,
            owner: None,
            quotas: Vec::new(),
            tallies: BTreeMap::new(),
            limits: BTreeMap::new(),
            under_way: None,
            may_fail: false,
            was_evicted: false,
            was_told: false,
            is_over: false,
            ended_unsynced: 0,
            log: Vec::new(),
        }
    }

    fn config(&self) -> Config {
        Config::default()
            .lanes(self.lanes)
            .lane_records(64)
            .shards(2)
            .journal_file_bytes(64 << 10)
            .snapshot_journal_bytes(64 << 10)
            .sync_interval(Duration::from_secs(60))
            .backpressure_deadline(Duration::ZERO)
            .clock(Arc::new(self.clock.clone()))
    }

    fn fail(&self, what: &str) -> ! {
        let from = self.log.len().saturating_sub(400);
        let log = self.log[from..].join("\n");
        panic!("seed {}: {what}\nafter:\n{log}", self.seed);
    }

    fn engine(&self) -> &Engine {
        &self.owner.as_ref().expect("open within a life").engine
    }

    /// Opens, examines what is there, works, dies.
    fn live(&mut self) {
        if self.is_over {
            return;
        }
        self.arm();
        if !self.open() {
            return;
        }
        self.examine();
        let steps = 20 + self.random.index(120);
        for _ in 0..steps {
            self.step();
            if self.disk.has_crashed() {
                break;
            }
            self.under_way = None;
        }
        self.die();
    }

    /// Decides what goes wrong in this life.
    fn arm(&mut self) {
        (self.may_fail, self.was_told) = (false, false);
        match self.random.index(10) {
            0..4 => {}
            4..7 => {
                let nth = self.random.index(150) as u64;
                let parts = u8::try_from(self.random.index(256)).expect("a byte");
                self.log.push(format!("crash at call {nth}, within a write after {parts}/256"));
                self.disk.crash_within(nth, parts);
            }
            _ => {
                self.may_fail = true;
                for _ in 0..=self.random.index(3) {
                    let fault = self.fault();
                    self.log.push(format!("{fault:?}"));
                    self.disk.inject(fault);
                }
                if self.random.index(3) == 0 {
                    let bytes = self.random.index(1 << 20) as u64;
                    self.log.push(format!("room for {bytes} bytes"));
                    self.disk.set_capacity(bytes);
                }
            }
        }
    }

    /// A directory's sync never loses names and works again later: a journaling file system that
    /// can't store them refuses all further changes.
    fn fault(&mut self) -> Fault {
        let calls = [
            Call::Any,
            Call::Create,
            Call::Write,
            Call::Allocate,
            Call::Sync,
            Call::Rename,
            Call::Remove,
            Call::SyncDirectory,
            Call::Read,
        ];
        let call = calls[self.random.index(calls.len())];
        let nth = self.random.index(40) as u64;
        match self.random.index(6) {
            0 => Fault::new(call, nth, Outcome::Eio),
            1 => Fault::new(call, nth, Outcome::Enospc),
            2 => Fault::new(Call::Write, nth, Outcome::ShortWrite(self.random.index(700))),
            3 => Fault::new(call, nth, Outcome::Eio).lasting(),
            4 => Fault::new(Call::Change, nth, Outcome::Eio).lasting(),
            _ => Fault::new(Call::Sync, nth, Outcome::LoseUnsynced),
        }
    }

    /// Whether there is an engine now: not when the process died, or failed, in opening.
    fn open(&mut self) -> bool {
        for attempt in 0.. {
            let storage = self.disk.storage();
            let opened = Owner::open_at_rest(&storage, self.config()).and_then(|owner| {
                let mut quotas = Vec::new();
                for (quota, window) in WINDOWS.into_iter().enumerate() {
                    let quota = Quota::new(format!("quota-{quota}"), DEFAULT_LIMIT).window(window);
                    quotas.push(owner.engine.define(&quota)?);
                }
                Ok((owner, quotas))
            });
            match opened {
                _ if self.disk.has_crashed() => {
                    self.log.push("died while opening".to_owned());
                    drop(opened);
                    let death = [Death::Kill, Death::PowerCut][self.random.index(2)];
                    self.lose(death);
                    return false;
                }
                Ok((owner, quotas)) => {
                    (self.owner, self.quotas) = (Some(owner), quotas);
                    return true;
                }
                Err(error) if self.may_fail && attempt == 0 => {
                    self.log.push(format!("open failed: {error}"));
                    self.repair();
                }
                Err(error @ Error::Damaged { .. }) if self.was_evicted && self.was_told => {
                    self.log.push(format!("refused: {error}"));
                    self.is_over = true;
                    return false;
                }
                Err(error) => self.fail(&format!("refused: {error}")),
            }
        }
        false
    }

    /// No more faults.
    fn repair(&mut self) {
        self.disk.clear_faults();
        self.disk.set_capacity(u64::MAX);
    }

    /// The page cache drops what it may.
    fn evict(&mut self) {
        let was_evicted = self.disk.evict();
        self.log.push(format!("evicted {was_evicted}"));
        self.was_evicted |= was_evicted;
    }

    /// Compares the engine with what was promised, and goes on with what is there.
    fn examine(&mut self) {
        for key in (0..USERS).flat_map(|user| (0..WINDOWS.len()).map(move |quota| (user, quota))) {
            let usage = self.usage(key);
            let limits = self.limits.entry(key).or_insert_with(|| BTreeSet::from([None]));
            let is_known = |limit: &Option<u64>| limit.unwrap_or(DEFAULT_LIMIT) == usage.limit;
            limits.retain(is_known);
            if limits.is_empty() {
                self.fail(&format!("{key:?} has the limit {}", usage.limit));
            }
            let tally = *self.tally(key);
            if usage.used != tally.used {
                self.fail(&format!("{key:?} has used {}, not {tally:?}", usage.used));
            }
        }
    }

    fn usage(&self, (user, quota): Key) -> crate::Usage {
        let counted = self.engine().counted(user, self.quotas[quota]).expect("it is defined");
        self.engine().usage(&counted)
    }

    fn window(&self, quota: usize) -> u64 {
        match WINDOWS[quota] {
            Window::Minute => self.now / 60_000 * 60_000,
            Window::Day => self.now / 86_400_000 * 86_400_000,
            _ => 0,
        }
    }

    fn tally(&mut self, key: Key) -> &mut Tally {
        let window = self.window(key.1);
        let tally = self.tallies.entry(key).or_default();
        if tally.window != window {
            *tally = Tally { window, ..Tally::default() };
        }
        tally
    }

    fn synced(&mut self) {
        self.was_evicted = false;
        for tally in self.tallies.values_mut() {
            *tally = Tally { synced: tally.used, consumed_since: 0, refunded_since: 0, ..*tally };
        }
    }

    fn step(&mut self) {
        let (user, quota) = (self.random.next_u64() % USERS, self.random.index(3));
        let key = (user, quota);
        prefer(self.random.index(self.lanes));
        let amount = 1 + self.random.index(30) as u64;
        match self.random.index(100) {
            0..30 => self.consume(key, amount, false),
            30..36 => self.consume(key, amount, true),
            36..52 => self.try_consume(key, amount),
            52..62 => self.refund(key, amount),
            62..66 => {
                let limit = (self.random.index(3) > 0).then(|| self.random.index(90) as u64);
                self.set_limit(key, limit);
            }
            66..70 => self.advance(),
            70..74 => self.sync("sync", Engine::sync),
            74..76 => self.sync("snapshot", Engine::snapshot),
            76..80 => self.sync("sync tick", |engine| engine.step(Step::Sync)),
            80..84 => self.flush(Step::Drain),
            84..90 => self.flush(Step::Append),
            90..93 => self.flush(Step::Files),
            93..96 => self.disk.write_back(),
            96 => self.evict(),
            _ => self.flush(Step::Merge),
        }
    }

    fn note(&mut self, what: impl std::fmt::Debug, result: &dyn std::fmt::Debug) {
        self.log.push(format!("{what:?} -> {result:?}"));
    }

    /// An error is fine where the disk may fail, and where the rings are full.
    fn excuse(&mut self, error: &Error) {
        self.was_told |= matches!(error, Error::DurabilityLost { .. });
        let is_full = matches!(error, Error::Backpressure { .. }) || error.is_disk_full();
        if !(self.may_fail || is_full || self.disk.has_crashed()) {
            self.fail(&format!("{error}"));
        }
    }

    fn consume(&mut self, key: Key, amount: u64, is_sync: bool) {
        let counted = self.engine().counted(key.0, self.quotas[key.1]).expect("it is defined");
        let result = self.engine().consume(&counted, amount, is_sync);
        self.note(("consume", key, amount, is_sync), &result);
        if self.disk.has_crashed() {
            self.under_way = Some(UnderWay::Consume(key, amount));
            return;
        }
        let is_counted = match &result {
            Ok(_) => true,
            Err(error) => {
                self.excuse(error);
                // Only then was nothing counted: otherwise the disk failed after it.
                !matches!(error, Error::Backpressure { .. })
            }
        };
        if is_counted {
            let tally = self.tally(key);
            tally.used += amount;
            tally.consumed_since += amount;
        }
        if is_sync && result.is_ok() {
            self.synced();
        }
        if let Ok(usage) = result
            && usage.used != self.tally(key).used
        {
            self.fail("another usage than was acknowledged");
        }
    }

    fn try_consume(&mut self, key: Key, amount: u64) {
        let counted = self.engine().counted(key.0, self.quotas[key.1]).expect("it is defined");
        let result = self.engine().try_consume(&counted, amount, false);
        self.note(("try_consume", key, amount), &result);
        match result {
            Ok(decision) => {
                let fits = self.tally(key).used + amount <= decision.limit;
                let knows = |limit: &Option<u64>| limit.unwrap_or(DEFAULT_LIMIT) == decision.limit;
                if decision.is_allowed() != fits || !self.limits[&key].iter().any(knows) {
                    self.fail("decided wrongly");
                }
                if fits {
                    let tally = self.tally(key);
                    tally.used += amount;
                    tally.consumed_since += amount;
                }
            }
            Err(error) => self.excuse(&error),
        }
    }

    fn refund(&mut self, key: Key, amount: u64) {
        let counted = self.engine().counted(key.0, self.quotas[key.1]).expect("it is defined");
        let result = self.engine().refund(&counted, amount);
        self.note(("refund", key, amount), &result);
        match result {
            Ok(given) => {
                let tally = self.tally(key);
                if given != amount.min(tally.used) {
                    self.fail("gave another amount back");
                }
                let tally = self.tally(key);
                tally.used -= given;
                tally.refunded_since += given;
            }
            Err(error) => self.excuse(&error),
        }
    }

    fn set_limit(&mut self, key: Key, limit: Option<u64>) {
        let counted = self.engine().counted(key.0, self.quotas[key.1]).expect("it is defined");
        let result = self.engine().set_limit(&counted, limit);
        self.note(("set_limit", key, limit), &result);
        if self.disk.has_crashed() {
            self.under_way = Some(UnderWay::Limit(key, limit));
            return;
        }
        match result {
            Ok(()) => {
                self.limits.insert(key, BTreeSet::from([limit]));
                self.synced();
            }
            Err(error) => {
                self.excuse(&error);
                self.limits.entry(key).or_default().insert(limit);
            }
        }
    }

    fn advance(&mut self) {
        let millis = [1, 1_000, 61_000, 86_400_000][self.random.index(4)];
        self.log.push(format!("{millis} ms pass"));
        self.clock.advance(Duration::from_millis(millis));
        self.now += millis;
    }

    fn sync(&mut self, what: &str, sync: impl Fn(&Engine) -> Result<()>) {
        let result = sync(self.engine());
        self.note(what, &result);
        if self.disk.has_crashed() {
            return;
        }
        match result {
            Ok(()) => self.synced(),
            Err(error) => self.excuse(&error),
        }
    }

    fn flush(&mut self, step: Step) {
        let result = self.engine().step(step);
        self.note(step, &result);
        if let Err(error) = result {
            self.excuse(&error);
        }
    }

    fn die(&mut self) {
        let owner = self.owner.take().expect("open within a life");
        let drain = owner.engine.committer.lock_drain();
        let is_unsynced = drain.is_ok_and(|drain| drain.head() != drain.durable());
        self.ended_unsynced += u64::from(is_unsynced);
        if self.disk.has_crashed() {
            drop(owner);
            let death = [Death::Kill, Death::PowerCut][self.random.index(2)];
            self.lose(death);
            return;
        }
        match self.random.index(3) {
            0 => {
                let closed = owner.close();
                self.note("close", &closed);
                let died = self.disk.has_crashed();
                drop(owner);
                match closed {
                    _ if died => self.lose(Death::PowerCut),
                    Ok(()) => {
                        self.synced();
                        self.lose(Death::Close);
                    }
                    Err(error) => {
                        self.excuse(&error);
                        self.lose(Death::Kill);
                    }
                }
            }
            1 => {
                self.lose(Death::Kill);
                drop(owner);
            }
            _ => {
                self.lose(Death::PowerCut);
                drop(owner);
            }
        }
    }

    /// The process is gone. Another one looks at what is there, on a disk without faults, and the
    /// model takes that over where it keeps the promises.
    fn lose(&mut self, death: Death) {
        self.log.push(format!("{death:?}"));
        match death {
            Death::Close | Death::Kill => self.disk.kill(),
            Death::PowerCut => self.disk.power_cut(),
        }
        if self.random.index(4) == 0 {
            self.evict();
        }
        self.repair();
        let under_way = self.under_way.take();
        if let Some(UnderWay::Limit(key, limit)) = under_way {
            self.limits.entry(key).or_default().insert(limit);
        }
        if self.quotas.len() < WINDOWS.len() {
            return;
        }
        self.may_fail = false;
        let was_evicted = self.was_evicted;
        if !self.open() {
            if self.is_over {
                return;
            }
            self.fail("did not open");
        }
        for key in (0..USERS).flat_map(|user| (0..WINDOWS.len()).map(move |quota| (user, quota))) {
            let used = self.usage(key).used;
            let tally = *self.tally(key);
            let late = match under_way {
                Some(UnderWay::Consume(of, amount)) if of == key => amount,
                _ => 0,
            };
            let (least, most) = if death == Death::PowerCut || was_evicted {
                let least = tally.synced.saturating_sub(tally.refunded_since);
                (least, tally.synced + tally.consumed_since + late)
            } else {
                (tally.used, tally.used + late)
            };
            if !(least..=most).contains(&used) {
                self.fail(&format!("{key:?} has used {used}, not {least}..={most}"));
            }
            self.tally(key).used = used;
        }
        self.examine();
        self.synced();
        // A look changes nothing that the next recovery sees; half the time it ends hard.
        let owner = self.owner.take().expect("it is open");
        if self.random.index(2) == 0 {
            self.disk.kill();
        }
        drop(owner);
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn no_life_loses_or_invents_anything() {
    let first = number("TOLLGATE_SIM_SEED");
    let default = if first.is_some() { 1 } else { RUNS };
    let runs = number("TOLLGATE_SIM_RUNS").unwrap_or(default);
    let first = first.unwrap_or(1);
    let mut ended_unsynced = 0;
    for seed in first..first + runs {
        let mut world = World::new(seed);
        for _ in 0..LIVES {
            world.live();
        }
        ended_unsynced += world.ended_unsynced;
    }
    assert!(runs < RUNS || ended_unsynced > runs / 4, "{ended_unsynced} ended in the middle");
}
