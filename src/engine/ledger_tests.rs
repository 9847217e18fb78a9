//! Lives of an engine on a simulated disk that reserves, settles, counts groups and answers
//! requests: what is counted is what these have done, to the unit, after each death.
//!
//! A failure names its seed; `TOLLGATE_SIM_SEED=n` runs that one alone, and `TOLLGATE_SIM_RUNS`
//! sets how many follow.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::flushers::Step;
use super::*;
use crate::admission::reservations::Take;
use crate::clock::ManualClock;
use crate::ledger::Settlement;
use crate::model::{Consume, Decision, Quota, ReservationId};
use crate::storage::sim::{SimDisk, SplitMix64};
use crate::wal::lanes::prefer;

const START: u64 = 1_767_225_600_000;
/// Of reservations and requests, and the two of each group.
const USERS: u64 = 3;
const PAIR: [u64; 2] = [100, 101];
const LIMIT: u64 = 120;
const TTL: Duration = Duration::from_secs(60);
const RUNS: u64 = 1500;
const LIVES: usize = 5;

/// What was acknowledged of a reservation, and whether a sync has begun since.
#[derive(Debug, Clone)]
struct Made {
    parts: Vec<(u64, u64)>,
    expires: Timestamp,
    /// What `expires` was at the last sync.
    expires_synced: Timestamp,
    is_synced: bool,
    settled: Option<Settled>,
}

#[derive(Debug, Clone)]
struct Settled {
    how: Settlement,
    actual: u64,
    is_synced: bool,
}

#[derive(Debug, Clone, Copy)]
struct Answered {
    user: u64,
    amount: u64,
    decision: Decision,
    is_synced: bool,
}

struct World {
    seed: u64,
    random: SplitMix64,
    disk: Arc<SimDisk>,
    clock: ManualClock,
    lanes: usize,
    owner: Option<Owner>,
    quota: QuotaId,
    made: BTreeMap<ReservationId, Made>,
    answered: BTreeMap<u128, Answered>,
    /// What both counters of the pair have, and had at the last sync.
    pair: u64,
    pair_synced: u64,
    log: Vec<String>,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = SplitMix64::new(seed);
        let disk = SimDisk::new(random.next_u64());
        Self {
            seed,
            lanes: 1 + random.index(3),
            random,
            disk,
            clock: ManualClock::new(Timestamp::from_unix_millis(START)),
            owner: None,
            quota: QuotaId(0),
            made: BTreeMap::new(),
            answered: BTreeMap::new(),
            pair: 0,
            pair_synced: 0,
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
            .dedup_window(Duration::from_hours(7 * 24))
            .clock(Arc::new(self.clock.clone()))
    }

    fn fail(&self, what: &str) -> ! {
        let from = self.log.len().saturating_sub(300);
        let log = self.log[from..].join("\n");
        panic!("seed {}: {what}\nafter:\n{log}", self.seed);
    }

    fn engine(&self) -> Arc<Engine> {
        Arc::clone(&self.owner.as_ref().expect("open within a life").engine)
    }

    fn open(&mut self) -> bool {
        let storage = self.disk.storage();
        let opened = Owner::open_at_rest(&storage, self.config()).and_then(|owner| {
            let quota = owner.engine.define(&Quota::new("tokens", LIMIT))?;
            Ok((owner, quota))
        });
        match opened {
            _ if self.disk.has_crashed() => {
                drop(opened);
                let is_cut = self.random.index(2) == 0;
                self.log.push(format!("died while opening, power cut: {is_cut}"));
                if is_cut {
                    self.disk.power_cut()
                } else {
                    self.disk.kill()
                }
                self.after(is_cut);
                false
            }
            Ok((owner, quota)) => {
                (self.owner, self.quota) = (Some(owner), quota);
                true
            }
            Err(error) => self.fail(&format!("refused: {error}")),
        }
    }

    fn live(&mut self) {
        if self.random.index(2) == 0 {
            let nth = self.random.index(150) as u64;
            let parts = u8::try_from(self.random.index(256)).expect("a byte");
            self.log.push(format!("crash at call {nth}, within a write after {parts}/256"));
            self.disk.crash_within(nth, parts);
        }
        if !self.open() {
            return;
        }
        for _ in 0..20 + self.random.index(100) {
            self.step();
            if self.disk.has_crashed() {
                break;
            }
            self.compare();
        }
        let owner = self.owner.take().expect("open within a life");
        let is_cut = self.random.index(2) == 0;
        if !self.disk.has_crashed() && self.random.index(3) == 0 {
            let closed = owner.close();
            self.log.push(format!("close: {closed:?}"));
            if closed.is_ok() && !self.disk.has_crashed() {
                self.synced();
            }
            drop(owner);
            if is_cut { self.disk.power_cut() } else { self.disk.kill() }
        } else {
            if is_cut {
                self.disk.power_cut()
            } else {
                self.disk.kill()
            }
            drop(owner);
        }
        self.log.push(if is_cut { "power cut" } else { "kill" }.to_owned());
        self.after(is_cut);
    }

    fn step(&mut self) {
        prefer(self.random.index(self.lanes));
        match self.random.index(100) {
            0..22 => self.reserve(),
            22..40 => self.settle(),
            40..45 => self.extend(),
            45..58 => self.ask(),
            58..66 => self.count_pair(),
            66..70 => self.advance(),
            70..76 => self.sync(|engine| engine.step(Step::Sync)),
            76..78 => self.sync(Engine::snapshot),
            78..83 => self.flush(Step::Drain),
            83..89 => self.flush(Step::Append),
            89..94 => self.flush(Step::Files),
            94..97 => self.flush(Step::Expiry),
            _ => self.flush(Step::Merge),
        }
    }

    /// An error is fine where the rings are full.
    fn excuse(&self, error: &Error) {
        let is_full = matches!(error, Error::Backpressure { .. }) || error.is_disk_full();
        if !(is_full || self.disk.has_crashed()) {
            self.fail(&format!("{error}"));
        }
    }

    fn user(&mut self) -> u64 {
        self.random.next_u64() % USERS
    }

    fn reserve(&mut self) {
        let mut parts = BTreeMap::new();
        for _ in 0..=self.random.index(3) {
            let user = self.user();
            *parts.entry(user).or_insert(0) += 1 + self.random.index(40) as u64;
        }
        let items: Vec<_> = parts
            .iter()
            .map(|(&user, &amount)| Consume { user, quota: self.quota, amount })
            .collect();
        let ttl = [TTL, TTL * 2, TTL * 3][self.random.index(3)];
        let result = self.engine().reserve(&items, ttl);
        self.log.push(format!("reserve {parts:?} -> {result:?}"));
        let parts: Vec<_> = parts.into_iter().collect();
        match result {
            Ok(Ok(id)) => {
                let expires = self.clock_now().saturating_add(ttl);
                let expires_synced = expires;
                let made = Made { parts, expires, expires_synced, is_synced: false, settled: None };
                if self.made.insert(id, made).is_some() {
                    self.fail("an id was given twice");
                }
            }
            Ok(Err(_)) => {
                self.expired();
                if parts.iter().all(|&(user, amount)| self.total(user) + amount <= LIMIT) {
                    self.fail("refused what fits");
                }
            }
            Err(error) => self.excuse(&error),
        }
    }

    fn clock_now(&self) -> Timestamp {
        crate::clock::Clock::now(&self.clock)
    }

    /// An id of one that is open, or of any.
    fn some_id(&mut self) -> Option<ReservationId> {
        let ids: Vec<_> = self.made.keys().copied().collect();
        let open: Vec<_> =
            ids.iter().filter(|id| self.made[id].settled.is_none()).copied().collect();
        let ids = if open.is_empty() || self.random.index(8) == 0 { ids } else { open };
        (!ids.is_empty()).then(|| ids[self.random.index(ids.len())])
    }

    fn settle(&mut self) {
        let Some(id) = self.some_id() else { return };
        let is_over = self.made[&id].expires <= self.clock_now();
        let (how, actual, result) = if self.random.index(3) == 0 {
            (Settlement::Cancelled, 0, self.engine().cancel(id))
        } else {
            let actual = self.random.index(60) as u64;
            let result = self.engine().commit(id, Charge::Same(actual)).map(drop);
            (Settlement::Committed, actual, result)
        };
        self.log.push(format!("settle {id} {how} {actual} -> {result:?}"));
        let settled = |how, actual| Some(Settled { how, actual, is_synced: false });
        let made = self.made.get_mut(&id).expect("it was made");
        match (result, &made.settled) {
            (Ok(()), None) => made.settled = settled(how, actual),
            (Err(Error::ReservationSettled { how: Settlement::Expired, .. }), None) if is_over => {
                made.settled = settled(Settlement::Expired, 0);
            }
            (Err(Error::ReservationSettled { how, .. }), Some(known)) if how == known.how => {}
            (Err(error), None) => self.excuse(&error),
            (result, known) => {
                let what = format!("settled twice: {result:?}, {known:?}");
                self.fail(&what);
            }
        }
    }

    fn extend(&mut self) {
        let Some(id) = self.some_id() else { return };
        let is_over = self.made[&id].expires <= self.clock_now();
        let result = self.engine().extend(id, TTL * 2);
        self.log.push(format!("extend {id} -> {result:?}"));
        let now = self.clock_now();
        let made = self.made.get_mut(&id).expect("it was made");
        match (result, made.settled.is_some()) {
            (Ok(()), false) if !is_over => {
                made.expires = made.expires.max(now.saturating_add(TTL * 2));
            }
            (Err(Error::ReservationSettled { how: Settlement::Expired, .. }), false) if is_over => {
                let how = Settlement::Expired;
                made.settled = Some(Settled { how, actual: 0, is_synced: false });
            }
            (Err(Error::ReservationSettled { .. }), true) => {}
            (Err(error), false) => self.excuse(&error),
            (result, _) => self.fail(&format!("extended: {result:?}")),
        }
    }

    fn ask(&mut self) {
        let id = u128::from(self.random.next_u64() % 30);
        let (user, amount) = match self.answered.get(&id) {
            Some(answered) => (answered.user, answered.amount),
            None => (self.user(), 1 + self.random.index(30) as u64),
        };
        let engine = self.engine();
        let counted = engine.counted(user, self.quota).expect("it is defined");
        let result = engine.try_consume_once(id, counted, amount);
        self.log.push(format!("ask {id} {user} {amount} -> {result:?}"));
        match (result, self.answered.get(&id)) {
            (Ok(decision), Some(known)) if known.decision != decision => {
                self.fail("another answer under the same id");
            }
            (Ok(_), Some(_)) => {}
            (Ok(decision), None) => {
                self.expired();
                if decision.is_allowed() != (self.total(user) + amount <= LIMIT) {
                    self.fail("decided wrongly");
                }
                let answered = Answered { user, amount, decision, is_synced: false };
                self.answered.insert(id, answered);
            }
            (Err(error), _) => self.excuse(&error),
        }
    }

    fn count_pair(&mut self) {
        let amount = 1 + self.random.index(2) as u64;
        let mut items = PAIR.map(|user| Consume { user, quota: self.quota, amount });
        if self.random.index(2) == 0 {
            items.reverse();
        }
        let result = self.engine().try_consume_all(&items);
        self.log.push(format!("pair {amount} -> {result:?}"));
        match result {
            Ok(decisions) => {
                if decisions.is_allowed() != (self.pair + amount <= LIMIT) {
                    self.fail("decided wrongly");
                }
                if decisions.is_allowed() {
                    self.pair += amount;
                }
            }
            Err(error) => self.excuse(&error),
        }
    }

    fn advance(&mut self) {
        let millis = [1, 1_000, 61_000][self.random.index(3)];
        self.log.push(format!("{millis} ms pass"));
        self.clock.advance(Duration::from_millis(millis));
        self.engine().clock.refresh();
    }

    fn sync(&mut self, sync: impl Fn(&Engine) -> Result<()>) {
        let result = sync(&self.engine());
        self.log.push(format!("sync -> {result:?}"));
        match result {
            _ if self.disk.has_crashed() => {}
            Ok(()) => self.synced(),
            Err(error) => self.excuse(&error),
        }
    }

    fn synced(&mut self) {
        for made in self.made.values_mut() {
            made.is_synced = true;
            made.expires_synced = made.expires;
            if let Some(settled) = &mut made.settled {
                settled.is_synced = true;
            }
        }
        for answered in self.answered.values_mut() {
            answered.is_synced = true;
        }
        self.pair_synced = self.pair;
    }

    fn flush(&mut self, step: Step) {
        let result = self.engine().step(step);
        self.log.push(format!("{step:?} -> {result:?}"));
        if let Err(error) = result {
            self.excuse(&error);
        }
        self.expired();
    }

    /// Takes over which reservations the engine has found to be over.
    fn expired(&mut self) {
        let (engine, now) = (self.engine(), self.clock_now());
        for (id, made) in &mut self.made {
            let is_open = made.settled.is_none();
            if is_open && made.expires <= now && state_of(&engine, *id) == State::Expired {
                let how = Settlement::Expired;
                made.settled = Some(Settled { how, actual: 0, is_synced: false });
            }
        }
    }

    /// What is reserved of a user's counter, and what is counted beside it.
    fn expected(&self, user: u64) -> (u64, u64) {
        let (mut reserved, mut counted) = (0, 0);
        for made in self.made.values() {
            for &(_, amount) in made.parts.iter().filter(|part| part.0 == user) {
                match &made.settled {
                    None => reserved += amount,
                    Some(settled) => counted += settled.actual,
                }
            }
        }
        let admitted = self.answered.values().filter(|answered| answered.decision.is_allowed());
        let asked = admitted.filter(|answered| answered.user == user);
        (reserved, counted + asked.map(|answered| answered.amount).sum::<u64>())
    }

    fn total(&self, user: u64) -> u64 {
        let (reserved, counted) = self.expected(user);
        reserved + counted
    }

    /// The engine says exactly what was acknowledged.
    fn compare(&mut self) {
        self.expired();
        let engine = self.engine();
        let usage = |user| {
            let counted = engine.counted(user, self.quota).expect("it is defined");
            let usage = engine.usage(&counted);
            (usage.reserved, usage.used - usage.reserved)
        };
        for user in 0..USERS {
            if usage(user) != self.expected(user) {
                let found = usage(user);
                self.fail(&format!("user {user} has {found:?}, not {:?}", self.expected(user)));
            }
        }
        for user in PAIR {
            if usage(user) != (0, self.pair) {
                self.fail(&format!("of the pair {user} has {:?}, not {}", usage(user), self.pair));
            }
        }
    }

    /// Another process looks at what is there, on a disk without faults; where the power was cut,
    /// what no sync has covered may be gone, each thing as a whole.
    fn after(&mut self, is_cut: bool) {
        self.disk.clear_faults();
        if !self.open() {
            self.fail("did not open");
        }
        let engine = self.engine();
        let mut made = std::mem::take(&mut self.made);
        made.retain(|id, made| {
            let found = state_of(&engine, *id);
            let is_settle_synced = made.settled.as_ref().is_some_and(|settled| settled.is_synced);
            let is_kept = match (found, &made.settled) {
                (State::Open, None) => true,
                (State::Open, Some(settled)) => {
                    // Expired in memory only when the process died, or lost with the power.
                    let is_lost = is_cut && !settled.is_synced;
                    if !is_lost {
                        self.fail(&format!("{id} is open again"));
                    }
                    made.settled = None;
                    true
                }
                (State::Gone, _) => {
                    if !is_cut || made.is_synced || is_settle_synced {
                        self.fail(&format!("{id} is gone"));
                    }
                    false
                }
                (_, Some(settled)) => {
                    if found != State::of(settled.how) {
                        self.fail(&format!("{id} is {found:?}, not {settled:?}"));
                    }
                    true
                }
                (found, None) => self.fail(&format!("{id} is {found:?}, though it was open")),
            };
            if let Take::Taken(taken) = engine.reservations.take(*id) {
                let least = if is_cut { made.expires_synced } else { made.expires };
                if !(least..=made.expires).contains(&taken.expires()) {
                    self.fail(&format!("{id} expires at {}, not {made:?}", taken.expires()));
                }
                made.expires = taken.expires();
            }
            is_kept
        });
        self.made = made;
        let now = self.clock_now();
        let mut answered = std::mem::take(&mut self.answered);
        answered.retain(|&id, known| {
            let is_kept = engine.answers.get(id, now).is_some();
            if !is_kept && (!is_cut || known.is_synced) {
                self.fail(&format!("the answer to {id} is gone"));
            }
            is_kept
        });
        self.answered = answered;
        let counted = engine.counted(PAIR[0], self.quota).expect("it is defined");
        let pair = engine.usage(&counted).used;
        let least = if is_cut { self.pair_synced } else { self.pair };
        if !(least..=self.pair).contains(&pair) {
            self.fail(&format!("the pair has {pair}, not {least}..={}", self.pair));
        }
        self.pair = pair;
        self.synced();
        self.compare();
        for id in self.answered.keys().copied().collect::<Vec<_>>() {
            let Answered { user, amount, decision, .. } = self.answered[&id];
            let counted = engine.counted(user, self.quota).expect("it is defined");
            let again = engine.try_consume_once(id, counted, amount);
            if !again.as_ref().is_ok_and(|again| *again == decision) {
                self.fail(&format!("the answer to {id} is {again:?}, not {decision:?}"));
            }
        }
        self.compare();
        let owner = self.owner.take().expect("it is open");
        if self.random.index(2) == 0 {
            self.disk.kill();
        }
        drop((owner, engine));
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    Committed,
    Cancelled,
    Expired,
    Gone,
}

impl State {
    fn of(how: Settlement) -> Self {
        match how {
            Settlement::Committed => Self::Committed,
            Settlement::Cancelled => Self::Cancelled,
            Settlement::Expired => Self::Expired,
        }
    }
}

fn state_of(engine: &Engine, id: ReservationId) -> State {
    match engine.reservations.take(id) {
        Take::Taken(_) => State::Open,
        Take::Busy => unreachable!("there is one thread"),
        Take::Gone => engine.settled.get(id, engine.clock.now()).map_or(State::Gone, State::of),
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn no_life_loses_a_reservation_or_answers_twice() {
    let first = number("TOLLGATE_SIM_SEED");
    let default = if first.is_some() { 1 } else { RUNS };
    let runs = number("TOLLGATE_SIM_RUNS").unwrap_or(default);
    let first = first.unwrap_or(1);
    for seed in first..first + runs {
        let mut world = World::new(seed);
        for _ in 0..LIVES {
            world.live();
        }
    }
}
