//! The fast paths against the slow ones: two engines live the same life, one of which takes the
//! slow path every time, since its every operation waits for the disk. What they answer, what they
//! count and what they leave behind is the same.
//!
//! A failure names its seed; `TOLLGATE_SIM_SEED=n` runs that one alone.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use super::flushers::Step;
use super::*;
use crate::clock::ManualClock;
use crate::model::{AMOUNT_MAX, Consume, Overrun, Quota, ReservationId, Window};
use crate::storage::sim::{SimDisk, SplitMix64};

const START: u64 = 1_767_225_600_000;
const USERS: u64 = 5;
const LIMIT: u64 = 60;
const TTL: Duration = Duration::from_secs(60);
const RUNS: u64 = 60;
const STEPS: usize = 250;
/// So few that the bound is met.
const OPEN_MAX: usize = 6;
const DEDUP_MAX: usize = 40;

/// One of the two.
struct Life {
    disk: Arc<SimDisk>,
    owner: Option<Owner>,
    is_general: bool,
    /// The reservations made, in their order: the two number theirs alike.
    made: Vec<ReservationId>,
}

/// What one step of a life is, the same for both.
#[derive(Debug, Clone)]
enum Act {
    Consume(Consume),
    All(Vec<Consume>),
    Once(u128, Consume),
    ConsumeOnce(u128, Consume),
    Reserve(Vec<Consume>, Duration),
    ReserveOnce(u128, Consume),
    Commit(usize, u64),
    Cancel(usize),
    Extend(usize),
    Refund(Consume),
    Limit(u64, Option<u64>),
    Handle(u64),
    Drain,
    Reopen,
}

impl Life {
    fn new(seed: u64, is_general: bool) -> Self {
        Self { disk: SimDisk::new(seed), owner: None, is_general, made: Vec::new() }
    }

    fn open(&mut self, clock: &ManualClock) {
        let config = Config::default()
            .lanes(1)
            .lane_records(1 << 10)
            .shards(2)
            .reservations_max(OPEN_MAX)
            .dedup_max(DEDUP_MAX)
            .durable_consumes(self.is_general)
            .clock(Arc::new(clock.clone()));
        let owner = Owner::open_at_rest(&self.disk.storage(), config).expect("the disk works");
        let quota = Quota::new("requests", LIMIT).window(Window::Day);
        owner.engine.define(&quota).expect("a valid quota");
        let refusing = Quota::new("tokens", LIMIT).overrun(Overrun::Refuse);
        owner.engine.define(&refusing).expect("a valid quota");
        self.owner = Some(owner);
    }

    fn engine(&self) -> &Engine {
        &self.owner.as_ref().expect("it is open").engine
    }

    fn id(&self, which: usize) -> ReservationId {
        let beyond = ReservationId { generation: 1, number: 1 << 40 };
        self.made.get(which).copied().unwrap_or(beyond)
    }

    /// What came of it, in words: the answers, or the error.
    fn act(&mut self, act: &Act, clock: &ManualClock) -> String {
        fn said(said: impl Debug) -> String {
            format!("{said:?}")
        }
        if let Act::Reopen = act {
            drop(self.owner.take());
            self.disk.kill();
            self.open(clock);
            return String::new();
        }
        let engine = Arc::clone(&self.owner.as_ref().expect("it is open").engine);
        let counted = |item: &Consume| engine.counted(item.user, item.quota).expect("defined");
        let mut made = None;
        let words = match act {
            Act::Consume(item) => said(engine.try_consume(&counted(item), item.amount, false)),
            Act::All(items) => said(engine.try_consume_all(items)),
            Act::Once(id, item) => said(engine.try_consume_once(*id, counted(item), item.amount)),
            Act::ConsumeOnce(id, item) => {
                said(engine.consume_once(*id, counted(item), item.amount, &[]))
            }
            Act::Reserve(items, ttl) => {
                let reserved = engine.reserve(items, *ttl);
                made = reserved.as_ref().ok().and_then(|reserved| reserved.as_ref().ok()).copied();
                said(reserved)
            }
            Act::ReserveOnce(id, item) => {
                let reserved = engine.reserve_once(*id, counted(item), item.amount, TTL);
                if let Ok(ReservedOnce::Now(id)) = reserved {
                    made = Some(id);
                }
                said(reserved)
            }
            Act::Commit(which, actual) => {
                said(engine.commit(self.id(*which), Charge::Same(*actual)))
            }
            Act::Cancel(which) => said(engine.cancel(self.id(*which))),
            Act::Extend(which) => said(engine.extend(self.id(*which), TTL * 2)),
            Act::Refund(item) => said(engine.refund(&counted(item), item.amount)),
            Act::Limit(user, limit) => {
                let item = Consume { user: *user, quota: QuotaId(0), amount: 1 };
                said(engine.set_limit(&counted(&item), *limit))
            }
            Act::Handle(user) => {
                let item = Consume { user: *user, quota: QuotaId(0), amount: 1 };
                drop(engine.share(&counted(&item)));
                String::new()
            }
            Act::Drain => said(engine.step(Step::Drain)),
            Act::Reopen => unreachable!("see above"),
        };
        self.made.extend(made);
        if !words.contains("ReservationId") {
            return words;
        }
        // The ids of two engines differ.
        let named = self.made.iter().enumerate();
        named.fold(words, |words, (which, id)| {
            words.replace(&format!("{id:?}"), &format!("reservation {which}"))
        })
    }

    /// What is used and reserved of all counters, and how much is open.
    fn usage(&self) -> String {
        let engine = self.engine();
        let of = |user, quota| {
            let counted = engine.counted(user, QuotaId(quota)).expect("it is defined");
            engine.usage(&counted)
        };
        let all: Vec<_> = (0..USERS).flat_map(|user| [of(user, 0), of(user, 1)]).collect();
        let stats = engine.stats();
        format!("{all:?} {} {} {}", stats.reservations, stats.answers, stats.total)
    }
}

fn item(random: &mut SplitMix64) -> Consume {
    let quota = QuotaId(if random.index(3) == 0 { 1 } else { 0 });
    let amount = match random.index(40) {
        0 => 0,
        1 => AMOUNT_MAX,
        2 => AMOUNT_MAX + 1,
        _ => 1 + random.index(9) as u64,
    };
    Consume { user: random.next_u64() % USERS, quota, amount }
}

fn act(random: &mut SplitMix64) -> Act {
    let items = |random: &mut SplitMix64| -> Vec<Consume> {
        (0..1 + random.index(5)).map(|_| item(random)).collect()
    };
    let request = |random: &mut SplitMix64| u128::from(random.next_u64() % 60);
    match random.index(100) {
        0..12 => Act::Consume(item(random)),
        12..27 => Act::All(items(random)),
        27..40 => Act::Once(request(random), item(random)),
        40..45 => Act::ConsumeOnce(request(random), item(random)),
        45..57 => Act::Reserve(vec![item(random)], TTL),
        57..61 => Act::Reserve(items(random), [Duration::ZERO, TTL, TTL * 3][random.index(3)]),
        61..64 => Act::ReserveOnce(request(random), item(random)),
        64..80 => Act::Commit(random.index(40), random.index(14) as u64),
        80..84 => Act::Cancel(random.index(40)),
        84..87 => Act::Extend(random.index(40)),
        87..90 => Act::Refund(item(random)),
        90..92 => {
            let limit = [None, Some(20), Some(100)][random.index(3)];
            Act::Limit(random.next_u64() % USERS, limit)
        }
        92..94 => Act::Handle(random.next_u64() % USERS),
        94..99 => Act::Drain,
        _ => Act::Reopen,
    }
}

fn live(seed: u64) {
    let mut random = SplitMix64::new(seed);
    let clock = ManualClock::new(Timestamp::from_unix_millis(START));
    let mut lives = [false, true].map(|is_general| Life::new(seed, is_general));
    lives.iter_mut().for_each(|life| life.open(&clock));
    for step in 0..STEPS {
        if random.index(12) == 0 {
            let passes = [1, 1_000, 61_000, 7 * 3_600_000][random.index(4)];
            clock.advance(Duration::from_millis(passes));
            for life in &lives {
                life.engine().clock.refresh();
            }
        }
        let mut act = act(&mut random);
        // The newest reservations are 0 and so on.
        if let Act::Commit(which, _) | Act::Cancel(which) | Act::Extend(which) = &mut act {
            *which = lives[0].made.len().wrapping_sub(1 + *which / 4);
        }
        let [fast, slow] = lives.each_mut().map(|life| life.act(&act, &clock));
        assert_eq!(fast, slow, "seed {seed}, step {step}: {act:?}");
        let [fast, slow] = lives.each_ref().map(Life::usage);
        assert_eq!(fast, slow, "seed {seed}, step {step}, after {act:?}");
    }
}

#[test]
fn the_short_ways_agree_with_the_general_one() {
    let chosen = std::env::var("TOLLGATE_SIM_SEED").ok().and_then(|seed| seed.parse().ok());
    match chosen {
        Some(seed) => live(seed),
        None => (1..=RUNS).for_each(live),
    }
}

/// They are taken at all, where nothing is in the way.
#[test]
fn the_short_ways_are_taken() {
    let clock = ManualClock::new(Timestamp::from_unix_millis(START));
    let mut life = Life::new(1, false);
    life.open(&clock);
    let engine = life.engine();
    let items = [3, 1, 4, 2].map(|user| Consume { user, quota: QuotaId(0), amount: 1 });
    // The counters, and the thread's lane.
    assert!(engine.all_fast(&items).is_none());
    assert!(engine.try_consume_all(&items).expect("there is room").is_allowed());
    // Their shards of the map were written to just now. Once they have been read often enough they
    // are read past their locks.
    for Consume { user, quota, .. } in items {
        let counted = engine.counted(user, quota).expect("it is defined");
        for _ in 0..256 {
            assert_eq!(engine.usage(&counted).used, 1);
        }
    }
    for count in 1..=items.len() {
        let decisions = engine.all_fast(&items[..count]).expect("nothing is in the way");
        assert!(decisions.is_allowed() && decisions.each().len() == count);
    }
    let counted = engine.counted(3, QuotaId(0)).expect("it is defined");
    let asked = crate::ledger::Asked::TryConsume;
    assert!(engine.once_fast(7, asked, &counted, 1, None).is_some());
    assert!(engine.once_fast(7, asked, &counted, 1, None).is_none(), "it is known");
    let asked = crate::ledger::Asked::Consume;
    assert!(engine.once_fast(8, asked, &counted, 1, Some(AMOUNT_MAX)).is_some());
    assert!(engine.reserve_fast(&items[0], TTL).is_none(), "the thread has no number yet");
    let first = engine.reserve(&items[..1], TTL).unwrap().expect("there is room");
    engine.cancel(first).unwrap();
    let id = engine.reserve_fast(&items[0], TTL).expect("nothing is in the way");
    assert_eq!(engine.usage(&counted).reserved, 1);
    let decision = engine.commit_fast(id, 2).expect("nothing is in the way");
    assert!(decision.is_allowed());
    assert!(engine.commit_fast(id, 2).is_none(), "it is settled");
    let usage = engine.usage(&counted);
    assert_eq!((usage.used, usage.reserved), (5 + 2 + 2, 0));
}
