//! Operations, reopenings and crashes against a map of numbers.
//!
//! After the death of the process all that was acknowledged is there, exactly. After a loss of
//! power a counter lies between what was synced less the refunds since, and that plus the consumes
//! since; from there the model goes on with what was found, which a second recovery must find too.
#![no_main]

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use tollgate::fuzzing::Disk;
use tollgate::{Config, ManualClock, Quota, QuotaId, Timestamp, Tollgate, Window};

const START: u64 = 1_767_225_600_000; // 2026-01-01T00:00:00Z
const USERS: u8 = 4;
const WINDOWS: [Window; 3] = [Window::Lifetime, Window::Minute, Window::Day];
const DEFAULT_LIMIT: u64 = 40;
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

struct World {
    disk: Disk,
    clock: ManualClock,
    gate: Option<Tollgate>,
    now: u64,
    quotas: Vec<QuotaId>,
    defaults: [u64; WINDOWS.len()],
    limits: HashMap<(u64, usize), u64>,
    usages: HashMap<(u64, usize), Usage>,
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
        let usage = self.usage(key);
        assert_eq!(given, amount.min(usage.used), "{key:?} {amount}");
        usage.used -= given;
        usage.refunded_since += given;
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
            Operation::Advance { seconds } => {
                let duration = Duration::from_secs(u64::from(seconds) * 3);
                self.clock.advance(duration);
                self.now += u64::from(seconds) * 3_000;
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
        for user in 0..u64::from(USERS) {
            for quota in 0..WINDOWS.len() {
                let key = (user, quota);
                let found = self.gate().usage(user, self.quotas[quota]).expect("it is defined");
                assert_eq!(found.limit, self.limit(key), "{key:?}");
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
    world.step(&Operation::Close);
});
