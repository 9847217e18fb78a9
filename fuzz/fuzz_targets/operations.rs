//! Operations, reopenings and crashes against a map of numbers.
//!
//! After the death of the process all that was acknowledged is there, exactly. After a loss of
//! power a counter lies between what was synced less the refunds since, and that plus the consumes
//! since; from there the model goes on with what was found, which a second recovery must find too.
#![no_main]

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use tollgate::fuzzing::Disk;
use tollgate::{
    AMOUNT_MAX, Config, Consume, Decision, ManualClock, Quota, QuotaId, ReservationId, Reserved,
    Timestamp, Tollgate, Window,
};

const START: u64 = 1_767_225_600_000; // 2026-01-01T00:00:00Z
const USERS: u8 = 4;
const WINDOWS: [Window; 3] = [Window::Lifetime, Window::Minute, Window::Day];
const DEFAULT_LIMIT: u64 = 40;
/// Longer than any other reservation lives.
const LONG: Duration = Duration::from_secs(7 * 24 * 60 * 60);
/// For so long an answer is given again; from then on its request is a new one.
const DEDUP_WINDOW: Duration = Duration::from_secs(10 * 60);
/// What a reservation costs that is cancelled, or over.
const NOTHING: [u64; 3] = [0; 3];
/// More only make an input slow.
const OPERATIONS_MAX: usize = 400;

#[derive(Debug, Arbitrary)]
struct Input {
    seed: u16,
    operations: Vec<Operation>,
}

#[derive(Debug, Arbitrary)]
enum Operation {
    TryConsume { counter: Counter, amount: u8 },
    TryConsumeByHandle { counter: Counter, amount: u8 },
    Consume { counter: Counter, amount: u16 },
    ConsumeMany { counter: Counter, times: u8 },
    ConsumeSync { counter: Counter, amount: u8 },
    Check { counter: Counter, amount: u8 },
    Refund { counter: Counter, amount: u16 },
    SetLimit { counter: Counter, limit: u8 },
    ClearLimit { counter: Counter },
    Redefine { quota: u8, limit: u8 },
    ConsumeAll { counters: [Counter; 3], amount: u8 },
    ConsumeBatch { counters: [Counter; 3], amount: u8 },
    Reserve { counter: Counter, amount: u8, seconds: u16 },
    ReserveAll { counters: [Counter; 3], amount: u8, seconds: u16 },
    Commit { which: u8, actual: u8 },
    CommitItems { which: u8, actual: [u8; 3] },
    Cancel { which: u8 },
    Extend { which: u8, seconds: u16 },
    TryConsumeOnce { id: u8, counter: Counter, amount: u8 },
    Advance { seconds: u16 },
    Sync,
    Snapshot,
    Close,
    Kill,
    PowerCut,
}

#[derive(Debug, Clone, Copy, Arbitrary)]
struct Counter {
    user: u8,
    quota: u8,
}

/// One counter, in the window that it was used in last.
#[derive(Debug, Clone, Copy, Default)]
struct Usage {
    window: u64,
    used: u64,
    synced: u64,
    consumed_since: u64,
    refunded_since: u64,
}

/// What was asked under an id: a counter, and how much of it.
type Asked = ((u64, usize), u64);

/// An open reservation.
#[derive(Debug, Clone)]
struct Open {
    /// Of one counter each.
    parts: Vec<Part>,
    expires: u64,
}

#[derive(Debug, Clone, Copy)]
struct Part {
    key: (u64, usize),
    window: u64,
    amount: u64,
}

struct World {
    disk: Disk,
    clock: ManualClock,
    gate: Option<Tollgate>,
    now: u64,
    quotas: Vec<QuotaId>,
    defaults: [u64; WINDOWS.len()],
    limits: HashMap<(u64, usize), u64>,
    usages: HashMap<(u64, usize), Usage>,
    open: BTreeMap<ReservationId, Open>,
    /// Settled since the last sync: open again, maybe, after a loss of power.
    settled_since: BTreeMap<ReservationId, Open>,
    /// What was asked under an id, when it was first, and what was answered.
    answers: HashMap<u128, (Asked, u64, Decision)>,
    /// Where ids begin: after a loss of power it is not known which are remembered.
    first_request: u128,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut world = Self {
            disk: Disk::new(seed),
            clock: ManualClock::new(Timestamp::from_unix_millis(START)),
            gate: None,
            now: START,
            quotas: Vec::new(),
            defaults: [DEFAULT_LIMIT; WINDOWS.len()],
            limits: HashMap::new(),
            usages: HashMap::new(),
            open: BTreeMap::new(),
            settled_since: BTreeMap::new(),
            answers: HashMap::new(),
            first_request: 0,
        };
        world.open();
        for quota in 0..WINDOWS.len() {
            let id = world.gate().define(definition(quota, DEFAULT_LIMIT)).expect("it is valid");
            world.quotas.push(id);
        }
        world
    }

    /// With rings, journal files and snapshots so small that every bound is met often.
    fn open(&mut self) {
        let config = Config::default()
            .lanes(2)
            .lane_records(64)
            .shards(2)
            .journal_file_bytes(64 << 10)
            .snapshot_journal_bytes(64 << 10)
            .sync_interval(Duration::from_secs(60))
            .dedup_window(DEDUP_WINDOW)
            .clock(Arc::new(self.clock.clone()));
        self.gate = Some(self.disk.open(config).expect("no crash leaves what can't be opened"));
    }

    fn gate(&self) -> &Tollgate {
        self.gate.as_ref().expect("open between operations")
    }

    fn window(&self, quota: usize) -> u64 {
        match WINDOWS[quota] {
            Window::Minute => self.now / 60_000 * 60_000,
            Window::Day => self.now / 86_400_000 * 86_400_000,
            _ => 0,
        }
    }

    fn usage(&mut self, key: (u64, usize)) -> &mut Usage {
        let window = self.window(key.1);
        let usage = self.usages.entry(key).or_default();
        if usage.window != window {
            *usage = Usage { window, ..Usage::default() };
        }
        usage
    }

    fn limit(&self, key: (u64, usize)) -> u64 {
        self.limits.get(&key).copied().unwrap_or(self.defaults[key.1])
    }

    fn consumed(&mut self, key: (u64, usize), amount: u64) -> u64 {
        let usage = self.usage(key);
        usage.used += amount;
        usage.consumed_since += amount;
        usage.used
    }

    fn synced(&mut self) {
        self.settled_since.clear();
        for usage in self.usages.values_mut() {
            *usage = Usage { synced: usage.used, consumed_since: 0, refunded_since: 0, ..*usage };
        }
    }

    fn try_consume(&mut self, counter: Counter, amount: u8, by_handle: bool) {
        let (key, id, amount) = (self.key(counter), self.id(counter), u64::from(amount) % 30 + 1);
        let decision = if by_handle {
            self.gate().counter(key.0, id).expect("it is defined").try_consume(amount)
        } else {
            self.gate().try_consume(key.0, id, amount)
        };
        let decision = decision.expect("there is room");
        let fits = self.usage(key).used + amount <= self.limit(key);
        assert_eq!(decision.is_allowed(), fits, "{key:?} {amount}");
        if fits {
            self.consumed(key, amount);
        }
        assert_eq!(decision.used, self.usage(key).used, "{key:?} {amount}");
    }

    fn consume(&mut self, counter: Counter, amount: u64, is_sync: bool) {
        let (key, id) = (self.key(counter), self.id(counter));
        let usage = if is_sync {
            self.gate().consume_sync(key.0, id, amount)
        } else {
            self.gate().consume(key.0, id, amount)
        };
        assert_eq!(usage.expect("there is room").used, self.consumed(key, amount), "{key:?}");
        if is_sync {
            self.synced();
        }
    }

    fn refund(&mut self, counter: Counter, amount: u64) {
        let (key, id) = (self.key(counter), self.id(counter));
        let given = self.gate().refund(key.0, id, amount).expect("there is room");
        let reserved = self.reserved(key);
        let usage = self.usage(key);
        // What is reserved is for its reservation to give back.
        assert_eq!(given, amount.min(usage.used - reserved), "{key:?} {amount}");
        usage.used -= given;
        usage.refunded_since += given;
    }

    fn item(&self, counter: Counter, amount: u64) -> Consume {
        Consume { user: self.key(counter).0, quota: self.id(counter), amount }
    }

    /// What is asked of each counter, those of one counter added up.
    fn asked(&self, counters: &[Counter], amount: u64) -> BTreeMap<(u64, usize), u64> {
        let mut asked = BTreeMap::new();
        for &counter in counters {
            *asked.entry(self.key(counter)).or_insert(0) += amount;
        }
        asked
    }

    fn fits(&mut self, asked: &BTreeMap<(u64, usize), u64>) -> bool {
        asked.iter().all(|(&key, amount)| self.usage(key).used + amount <= self.limit(key))
    }

    fn consume_all(&mut self, counters: [Counter; 3], amount: u64) {
        let asked = self.asked(&counters, amount);
        let items = counters.map(|counter| self.item(counter, amount));
        let decisions = self.gate().try_consume_all(&items).expect("there is room");
        assert_eq!(decisions.is_allowed(), self.fits(&asked), "{asked:?}");
        if decisions.is_allowed() {
            for (key, amount) in asked {
                self.consumed(key, amount);
            }
            for (counter, decision) in counters.into_iter().zip(decisions.each()) {
                assert_eq!(decision.used, self.usage(self.key(counter)).used, "{counter:?}");
            }
        }
    }

    fn consume_batch(&mut self, counters: [Counter; 3], amount: u64) {
        let items = counters.map(|counter| self.item(counter, amount));
        let usages = self.gate().consume_batch(&items).expect("there is room");
        assert_eq!(usages.len(), counters.len());
        for (counter, usage) in counters.into_iter().zip(usages) {
            let key = self.key(counter);
            assert_eq!(usage.used, self.consumed(key, amount), "{key:?}");
        }
    }

    fn reserve(&mut self, counters: &[Counter], amount: u64, seconds: u64) {
        let (asked, ttl) = (self.asked(counters, amount), Duration::from_secs(seconds));
        let reserved = match *counters {
            [counter] => self.gate().reserve(self.key(counter).0, self.id(counter), amount, ttl),
            _ => {
                let items = counters.iter().map(|&counter| self.item(counter, amount));
                self.gate().reserve_all(&items.collect::<Vec<_>>(), ttl)
            }
        };
        let reserved = reserved.expect("there is room");
        assert_eq!(reserved.is_open(), self.fits(&asked), "{asked:?}");
        if let Reserved::Open(reservation) = reserved {
            let mut parts = Vec::new();
            for (key, amount) in asked {
                self.consumed(key, amount);
                parts.push(Part { key, window: self.window(key.1), amount });
            }
            let expires = self.now + seconds * 1_000;
            self.open.insert(reservation.detach(), Open { parts, expires });
        }
    }

    /// How much of a counter's usage now is reserved.
    fn reserved(&self, key: (u64, usize)) -> u64 {
        let now = (key, self.window(key.1));
        let parts = self.open.values().flat_map(|open| &open.parts);
        parts.filter(|part| (part.key, part.window) == now).map(|part| part.amount).sum()
    }

    /// One of the open reservations.
    fn which(&self, which: u8) -> Option<(ReservationId, Open)> {
        let index = usize::from(which) % self.open.len().max(1);
        self.open.iter().nth(index).map(|(&id, open)| (id, open.clone()))
    }

    /// A reservation has ended, and cost so much of each of its counters.
    fn settled(&mut self, id: ReservationId, actual: &[u64]) {
        let Some(open) = self.open.remove(&id) else { return };
        for (&Part { key, window, amount }, actual) in open.parts.iter().zip(actual) {
            if self.window(key.1) == window {
                let usage = self.usage(key);
                usage.used = usage.used - amount + actual;
                usage.refunded_since += amount;
                usage.consumed_since += actual;
            }
        }
        self.settled_since.insert(id, open);
    }

    /// By one amount for all of its counters, or by one for each.
    fn commit(&mut self, which: u8, actual: &[u8]) {
        let Some((id, open)) = self.which(which) else { return };
        let commit = |world: &Self| match *actual {
            [actual] => world.gate().commit_reservation(id, actual.into()),
            _ => {
                let items = open.parts.iter().zip(actual).map(|(part, &actual)| Consume {
                    user: part.key.0,
                    quota: world.quotas[part.key.1],
                    amount: actual.into(),
                });
                world.gate().commit_reservation_items(id, &items.collect::<Vec<_>>())
            }
        };
        assert!(commit(self).expect("it is open").is_allowed());
        assert!(commit(self).is_err(), "once");
        let amounts: Vec<_> = actual.iter().cycle().map(|&actual| actual.into()).take(3).collect();
        self.settled(id, &amounts);
    }

    /// What is over is given back before anything is refused.
    fn expire(&mut self) {
        let denied = self.gate().check(0, self.quotas[0], AMOUNT_MAX).expect("it is defined");
        assert!(denied.is_denied());
        let over = self.open.iter().filter(|(_, open)| open.expires <= self.now);
        for id in over.map(|(&id, _)| id).collect::<Vec<_>>() {
            self.settled(id, &NOTHING);
        }
    }

    fn try_consume_once(&mut self, id: u128, counter: Counter, amount: u64) {
        let id = self.first_request + id;
        let now = self.now;
        self.answers
            .retain(|_, (_, answered, _)| now < *answered + DEDUP_WINDOW.as_millis() as u64);
        let known = self.answers.get(&id).map(|(asked, _, answer)| (*asked, answer.clone()));
        let (key, amount) = known.as_ref().map_or((self.key(counter), amount), |(asked, _)| *asked);
        let decision = self.gate().try_consume_once(id, key.0, self.quotas[key.1], amount);
        let decision = decision.expect("there is room");
        if let Some((_, answer)) = known {
            assert_eq!(decision, answer, "{key:?} {amount}");
            return;
        }
        let fits = self.usage(key).used + amount <= self.limit(key);
        assert_eq!(decision.is_allowed(), fits, "{key:?} {amount}");
        if fits {
            self.consumed(key, amount);
        }
        self.answers.insert(id, ((key, amount), now, decision));
    }

    fn key(&self, counter: Counter) -> (u64, usize) {
        (u64::from(counter.user % USERS), usize::from(counter.quota) % WINDOWS.len())
    }

    fn id(&self, counter: Counter) -> QuotaId {
        self.quotas[self.key(counter).1]
    }

    fn step(&mut self, operation: &Operation) {
        match *operation {
            Operation::TryConsume { counter, amount } => self.try_consume(counter, amount, false),
            Operation::TryConsumeByHandle { counter, amount } => {
                self.try_consume(counter, amount, true);
            }
            Operation::Consume { counter, amount } => {
                self.consume(counter, u64::from(amount) + 1, false);
            }
            Operation::ConsumeMany { counter, times } => {
                (0..times).for_each(|_| self.consume(counter, 1, false));
            }
            Operation::ConsumeSync { counter, amount } => {
                self.consume(counter, u64::from(amount) + 1, true);
            }
            Operation::Check { counter, amount } => {
                let (key, amount) = (self.key(counter), u64::from(amount) + 1);
                let decision = self.gate().check(key.0, self.id(counter), amount);
                let fits = self.usage(key).used + amount <= self.limit(key);
                assert_eq!(decision.expect("it is defined").is_allowed(), fits);
            }
            Operation::Refund { counter, amount } => self.refund(counter, u64::from(amount) + 1),
            Operation::SetLimit { counter, limit } => {
                let (key, limit) = (self.key(counter), u64::from(limit));
                self.gate().set_limit(key.0, self.id(counter), limit).expect("the disk works");
                self.limits.insert(key, limit);
            }
            Operation::ClearLimit { counter } => {
                let key = self.key(counter);
                self.gate().clear_limit(key.0, self.id(counter)).expect("the disk works");
                self.limits.remove(&key);
            }
            Operation::Redefine { quota, limit } => {
                let (quota, limit) = (usize::from(quota) % WINDOWS.len(), u64::from(limit));
                let id = self.gate().define(definition(quota, limit)).expect("the same meaning");
                assert_eq!(id, self.quotas[quota]);
                self.defaults[quota] = limit;
            }
            Operation::ConsumeAll { counters, amount } => {
                self.consume_all(counters, u64::from(amount) % 20 + 1);
            }
            Operation::ConsumeBatch { counters, amount } => {
                self.consume_batch(counters, u64::from(amount) % 20 + 1);
            }
            Operation::Reserve { counter, amount, seconds } => {
                self.reserve(&[counter], u64::from(amount) % 30 + 1, u64::from(seconds) + 1);
            }
            Operation::ReserveAll { counters, amount, seconds } => {
                self.reserve(&counters, u64::from(amount) % 20 + 1, u64::from(seconds) + 1);
            }
            Operation::Commit { which, actual } => self.commit(which, &[actual]),
            Operation::CommitItems { which, actual } => self.commit(which, &actual),
            Operation::Cancel { which } => {
                let Some((id, _)) = self.which(which) else { return };
                self.gate().cancel_reservation(id).expect("it is open");
                self.settled(id, &NOTHING);
            }
            Operation::Extend { which, seconds } => {
                let Some((id, _)) = self.which(which) else { return };
                let seconds = u64::from(seconds) + 1;
                let ttl = Duration::from_secs(seconds);
                self.gate().extend_reservation(id, ttl).expect("it is open");
                let expires = self.now + seconds * 1_000;
                if let Some(open) = self.open.get_mut(&id) {
                    open.expires = open.expires.max(expires);
                }
            }
            Operation::TryConsumeOnce { id, counter, amount } => {
                self.try_consume_once(u128::from(id), counter, u64::from(amount) % 30 + 1);
            }
            Operation::Advance { seconds } => {
                let duration = Duration::from_secs(u64::from(seconds) * 3);
                self.clock.advance(duration);
                self.now += u64::from(seconds) * 3_000;
                self.expire();
            }
            Operation::Sync => {
                self.gate().sync().expect("the disk works");
                self.synced();
            }
            Operation::Snapshot => {
                self.gate().snapshot().expect("the disk works");
                self.synced();
            }
            Operation::Close => {
                self.gate.take().expect("it is open").close().expect("the disk works");
                self.reopen(true);
            }
            Operation::Kill => {
                self.disk.kill();
                self.gate = None;
                self.reopen(true);
            }
            Operation::PowerCut => {
                self.disk.power_cut();
                self.gate = None;
                self.reopen(false);
            }
        }
    }

    /// Recovers, compares, and takes over what was found.
    fn reopen(&mut self, is_exact: bool) {
        self.open();
        let mut over = BTreeMap::new();
        if is_exact {
            self.expire();
        } else {
            self.first_request += 1 << 8;
            self.answers.clear();
            // Those that are gone, or open again, are found in the usages below. What they were
            // extended to may be lost: now it is longer than any of that, or their time is over,
            // and the next loss of power may take that they were given back.
            let mut known = std::mem::take(&mut self.open);
            known.append(&mut self.settled_since);
            for (id, mut open) in known {
                if self.gate().extend_reservation(id, LONG).is_ok() {
                    open.expires = self.now + LONG.as_millis() as u64;
                    self.open.insert(id, open);
                    continue;
                }
                for &Part { key, window, amount } in &open.parts {
                    if self.window(key.1) == window {
                        self.usage(key).refunded_since += amount;
                    }
                }
                over.insert(id, open);
            }
        }
        for user in 0..u64::from(USERS) {
            for quota in 0..WINDOWS.len() {
                let key = (user, quota);
                let found = self.gate().usage(user, self.quotas[quota]).expect("it is defined");
                assert_eq!(found.limit, self.limit(key), "{key:?}");
                assert_eq!(found.reserved, self.reserved(key), "{key:?}");
                let usage = self.usage(key);
                let (least, most) = if is_exact {
                    (usage.used, usage.used)
                } else {
                    let least = usage.synced.saturating_sub(usage.refunded_since);
                    (least, usage.synced + usage.consumed_since)
                };
                assert!(
                    (least..=most).contains(&found.used),
                    "{key:?} has {}, not {least}..={most}",
                    found.used
                );
                usage.used = found.used;
            }
        }
        self.synced();
        self.settled_since = over;
    }
}

fn definition(quota: usize, limit: u64) -> Quota {
    Quota::new(format!("quota-{quota}"), limit).window(WINDOWS[quota])
}

libfuzzer_sys::fuzz_target!(|input: Input| {
    let mut world = World::new(u64::from(input.seed));
    for operation in input.operations.iter().take(OPERATIONS_MAX) {
        world.step(operation);
    }
    world.step(&Operation::Kill);
    world.expire();
    world.step(&Operation::Close);
});
