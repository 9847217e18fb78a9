//! What an operation costs, by threads and keys, beside limiters that keep nothing:
//! `cargo bench --bench throughput`.
//!
//! One pass is some millions of operations. Callers are pinned, one to a core; the engine's own
//! threads have the other cores, and share all where callers have all.
#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a benchmark prints, reads the real clock, and stops where it can't go on"
)]

mod common;

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::json;
use tollgate::{AMOUNT_MAX, Config, Counter, Quota, QuotaId, Tollgate, Window};

use common::AnyError;
use common::gates::{Gate, used};
use common::keys::Users;
use common::options::{FILTER, Options};
use common::passes::{Contestant, Part, Samples, race};
use common::peers::{BareGet, BareMap, BareWord, Governor, HalfGovernor, TunedMap};
use common::pin::keep_off;
use common::report::{Report, Row, Target};

const HUNDRED_THOUSAND: u32 = 100_000;
const MILLION: u32 = 1_000_000;

fn main() -> Result<(), AnyError> {
    let options = Options::from_args(&[FILTER, "--repetitions", "--patience"]);
    let mut report = Report::new("throughput", &options);
    for scenario in &SCENARIOS {
        for threads in [1, 2] {
            let name = format!("{}-{threads}t", scenario.name);
            if options.wants(&name) {
                keep_off(threads);
                scenario.run(&name, threads, &options, &mut report)?;
            }
        }
    }
    if options.wants("half-refused") {
        for threads in [1, 2] {
            keep_off(threads);
            half_refused(threads, &options, &mut report)?;
        }
    }
    if options.wants("exact") {
        exact_limit(&options)?;
    }
    report.finish()
}

/// The same operations, for users of one distribution.
struct Scenario {
    name: &'static str,
    users: Users,
    /// What is compared with which baseline, and the targets at one thread and at two.
    targets: &'static [(&'static str, &'static str, [Option<Target>; 2])],
}

const BY_KEY: &str = "try_consume";
const HANDLE: &str = "handle";
const LOOKED_UP: &str = "handle, looked up";
const CHECK: &str = "check";
const BARE: &str = "bare map";
const BARE_GET: &str = "bare map's get";
const BARE_WORD: &str = "bare fetch_add";
const TUNED: &str = "tuned map";
const GOVERNOR: &str = "governor";

const fn at_most(bound: f64) -> Option<Target> {
    Some(Target::AtMost(bound))
}

const SCENARIOS: [Scenario; 4] = [
    Scenario {
        name: "uniform-100k",
        users: Users::Uniform(HUNDRED_THOUSAND),
        targets: &[
            (BY_KEY, BARE, [at_most(1.1), at_most(0.75)]),
            (TUNED, BARE, [None, None]),
            (BY_KEY, GOVERNOR, [at_most(0.55), at_most(0.4)]),
            (HANDLE, BARE, [at_most(0.65), at_most(0.45)]),
            (HANDLE, GOVERNOR, [at_most(0.3), at_most(0.25)]),
            (LOOKED_UP, BARE, [at_most(0.65), at_most(0.45)]),
            (LOOKED_UP, GOVERNOR, [at_most(0.3), at_most(0.25)]),
            (CHECK, BARE_GET, [at_most(1.0), at_most(1.0)]),
        ],
    },
    Scenario {
        name: "zipf-100k",
        users: Users::Zipf(HUNDRED_THOUSAND),
        targets: &[
            (BY_KEY, BARE, [None, at_most(0.7)]),
            (TUNED, BARE, [None, None]),
            (BY_KEY, GOVERNOR, [None, None]),
            (HANDLE, BARE, [None, None]),
            (HANDLE, GOVERNOR, [None, None]),
            (LOOKED_UP, BARE, [None, None]),
            (CHECK, BARE_GET, [None, None]),
        ],
    },
    Scenario {
        name: "uniform-1m",
        users: Users::Uniform(MILLION),
        targets: &[
            (BY_KEY, BARE, [at_most(1.1), at_most(0.6)]),
            (TUNED, BARE, [None, None]),
            (BY_KEY, GOVERNOR, [None, None]),
            (HANDLE, BARE, [None, None]),
            (HANDLE, GOVERNOR, [None, None]),
            (LOOKED_UP, BARE, [None, None]),
            (CHECK, BARE_GET, [None, None]),
        ],
    },
    Scenario {
        name: "one-user",
        users: Users::One,
        targets: &[
            (BY_KEY, BARE_WORD, [None, at_most(2.0)]),
            (BY_KEY, BARE, [None, None]),
            (BY_KEY, GOVERNOR, [None, None]),
            (HANDLE, BARE_WORD, [None, at_most(2.0)]),
            (HANDLE, BARE, [None, None]),
            (CHECK, BARE_GET, [None, None]),
        ],
    },
];

impl Scenario {
    fn run(
        &self,
        name: &str,
        threads: usize,
        options: &Options,
        report: &mut Report,
    ) -> Result<(), AnyError> {
        let count = self.users.count();
        let users = self.users.draw_for_threads(threads, operations(options));
        let by_key = ByKey::open(count)?;
        let at_hand = AtHand::open(count, &users)?;
        let looked_up = Handles::open(count)?;
        let check = Check::open(count)?;
        let (bare, bare_get) = (BareMap::populated(count), BareGet::populated(count));
        let (word, governor) = (BareWord::default(), Governor::populated(count));
        let tuned = TunedMap::populated(count);
        let mut taking_part: Vec<&dyn Contestant> =
            vec![&bare, &by_key, &at_hand, &governor, &bare_get, &check];
        if count == 1 {
            // It only says something where all threads meet on one user.
            taking_part.push(&word);
        } else {
            let among_many: [&dyn Contestant; 2] = [&looked_up, &tuned];
            taking_part.extend(among_many);
        }

        let samples = race(&taking_part, &users, options);
        self.report(name, threads, &samples, report);
        let gates = [&by_key.gate, &at_hand.handles.gate, &looked_up.gate];
        let waits = gates.map(|gate| gate.gate.stats().backpressure_waits);
        report.note(&format!("{name}: waits for room in the log"), json!(waits));
        Ok(())
    }

    fn report(&self, name: &str, threads: usize, samples: &Samples, report: &mut Report) {
        for (what, measured) in samples {
            let mut row = Row::new(name, what, "ns", measured);
            let targets = self.targets.iter().filter(|(subject, ..)| subject == what);
            for (_, baseline, targets) in targets {
                if let Some(base) = samples.get(baseline) {
                    row = row.against(baseline, base, targets[threads - 1]);
                }
            }
            report.add(row);
        }
    }
}

/// How many operations a thread does in a pass.
fn operations(options: &Options) -> usize {
    options.size(8 << 20, 1 << 17)
}

/// `try_consume` by user and quota.
struct ByKey {
    gate: Gate,
    users: u32,
}

impl ByKey {
    fn open(users: u32) -> Result<Self, AnyError> {
        let gate = Gate::open(Config::default())?;
        gate.populate(users)?;
        Ok(Self { gate, users })
    }
}

impl Contestant for ByKey {
    fn name(&self) -> &'static str {
        BY_KEY
    }

    fn run(&self, part: &Part<'_>) -> u64 {
        let (gate, quota) = (&self.gate.gate, self.gate.quota);
        part.users.iter().fold(0, |sum, &user| sum + admit(gate, user, quota))
    }

    fn settle(&self) {
        self.gate.gate.sync().expect("the disk works");
    }

    fn verify(&self, operations: u64) {
        let populated = u64::from(self.users);
        assert_eq!(self.gate.used(self.users), operations + populated, "every operation counts");
    }
}

#[inline]
fn admit(gate: &Tollgate, user: u32, quota: QuotaId) -> u64 {
    let decision = gate.try_consume(black_box(user).into(), quota, 1).expect("the log has room");
    u64::from(decision.is_allowed())
}

/// `try_consume` through a handle for each user, which is looked up by the user's number: another
/// wait for memory where there are many.
struct Handles {
    gate: Gate,
    counters: Vec<Counter>,
}

impl Handles {
    fn open(users: u32) -> Result<Self, AnyError> {
        let gate = Gate::open(Config::default())?;
        gate.populate(users)?;
        let handle = |user: u32| gate.gate.counter(user.into(), gate.quota);
        let counters = (0..users).map(handle).collect::<tollgate::Result<_>>()?;
        Ok(Self { gate, counters })
    }
}

impl Contestant for Handles {
    fn name(&self) -> &'static str {
        LOOKED_UP
    }

    fn run(&self, part: &Part<'_>) -> u64 {
        let admit = |user: u32| {
            let counter = &self.counters[black_box(user) as usize];
            u64::from(counter.try_consume(1).expect("the log has room").is_allowed())
        };
        part.users.iter().fold(0, |sum, &user| sum + admit(user))
    }

    fn settle(&self) {
        self.gate.gate.sync().expect("the disk works");
    }

    fn verify(&self, operations: u64) {
        let users = self.counters.len();
        let used: u64 = self.counters.iter().map(|counter| counter.usage().used).sum();
        assert_eq!(used, operations + users as u64, "every operation counts");
    }
}

/// `try_consume` through handles that lie in the order of the requests, as the users of all others
/// do: each request has its handle at hand, in its session or its connection.
struct AtHand {
    handles: Handles,
    /// By thread.
    drawn: Vec<Vec<Counter>>,
}

impl AtHand {
    fn open(count: u32, users: &[Vec<u32>]) -> Result<Self, AnyError> {
        let handles = Handles::open(count)?;
        let handle = |&user: &u32| handles.counters[user as usize].clone();
        let drawn = users.iter().map(|users| users.iter().map(handle).collect()).collect();
        Ok(Self { handles, drawn })
    }
}

impl Contestant for AtHand {
    fn name(&self) -> &'static str {
        HANDLE
    }

    fn run(&self, part: &Part<'_>) -> u64 {
        let admit = |counter: &Counter| {
            u64::from(counter.try_consume(1).expect("the log has room").is_allowed())
        };
        let counters = &self.drawn[part.thread][part.first..][..part.users.len()];
        counters.iter().fold(0, |sum, counter| sum + admit(black_box(counter)))
    }

    fn settle(&self) {
        self.handles.settle();
    }

    fn verify(&self, operations: u64) {
        self.handles.verify(operations);
    }
}

/// `check` by user and quota.
struct Check(ByKey);

impl Check {
    fn open(users: u32) -> Result<Self, AnyError> {
        ByKey::open(users).map(Self)
    }
}

impl Contestant for Check {
    fn name(&self) -> &'static str {
        CHECK
    }

    fn run(&self, part: &Part<'_>) -> u64 {
        let (gate, quota) = (&self.0.gate.gate, self.0.gate.quota);
        let ask = |user: u32| {
            let answer = gate.check(black_box(user).into(), quota, 1);
            u64::from(answer.expect("the quota is defined").is_allowed())
        };
        part.users.iter().fold(0, |sum, &user| sum + ask(user))
    }

    fn verify(&self, _: u64) {
        self.0.verify(0);
    }
}

/// Users with odd numbers are refused everything; the bare map counts all, as ever.
struct HalfRefused {
    gate: Gate,
    quotas: [QuotaId; 2],
    users: u32,
    admitted: AtomicU64,
}

impl HalfRefused {
    fn open(users: u32) -> Result<Self, AnyError> {
        let gate = Gate::open(Config::default())?;
        let closed = gate.gate.define(Quota::new("closed", 0).window(Window::Month))?;
        gate.populate(users)?;
        for user in 0..users {
            gate.gate.consume(user.into(), closed, 1)?;
        }
        let quotas = [gate.quota, closed];
        Ok(Self { gate, quotas, users, admitted: AtomicU64::new(0) })
    }
}

impl Contestant for HalfRefused {
    fn name(&self) -> &'static str {
        BY_KEY
    }

    fn run(&self, part: &Part<'_>) -> u64 {
        let gate = &self.gate.gate;
        let admit = |user: u32| admit(gate, user, self.quotas[user as usize % 2]);
        let admitted = part.users.iter().fold(0, |sum, &user| sum + admit(user));
        assert_eq!(admitted, part.users.iter().filter(|&user| user % 2 == 0).count() as u64);
        // Relaxed: a count, read when the threads have ended.
        self.admitted.fetch_add(admitted, Ordering::Relaxed)
    }

    fn settle(&self) {
        self.gate.gate.sync().expect("the disk works");
    }

    fn verify(&self, _: u64) {
        let admitted = self.admitted.load(Ordering::Relaxed);
        assert_eq!(self.gate.used(self.users), admitted + u64::from(self.users));
        assert_eq!(used(&self.gate.gate, self.quotas[1], self.users), u64::from(self.users));
    }
}

fn half_refused(threads: usize, options: &Options, report: &mut Report) -> Result<(), AnyError> {
    let users = Users::Uniform(HUNDRED_THOUSAND);
    let count = users.count();
    let (bare, governor) = (BareMap::populated(count), HalfGovernor::populated(count));
    let gate = HalfRefused::open(count)?;
    let drawn = users.draw_for_threads(threads, operations(options));
    let samples = race(&[&bare, &gate, &governor], &drawn, options);
    let name = format!("half-refused-{threads}t");
    for (what, measured) in &samples {
        let row = Row::new(&name, what, "ns", measured);
        report.add(match *what {
            BY_KEY => {
                row.against(BARE, &samples[BARE], None).against(GOVERNOR, &samples[GOVERNOR], None)
            }
            _ => row,
        });
    }
    Ok(())
}

/// The limit is exact where all meet on one user: of more operations than fit, exactly those that
/// fit are admitted. Not timed.
fn exact_limit(options: &Options) -> Result<(), AnyError> {
    let gate = Gate::open(Config::default())?;
    let operations = operations(options) as u64;
    let limit = operations + operations / 2;
    assert!(limit < AMOUNT_MAX);
    let quota = gate.gate.define(Quota::new("exact", limit))?;
    let admitted: u64 = std::thread::scope(|scope| {
        let worker = |core| {
            let gate = &gate.gate;
            scope.spawn(move || {
                common::pin::pin(core);
                (0..operations).map(|_| admit(gate, 0, quota)).sum::<u64>()
            })
        };
        let workers: Vec<_> = (0..2).map(worker).collect();
        workers.into_iter().map(|worker| worker.join().expect("no panic")).sum()
    });
    assert_eq!(admitted, limit, "what is admitted is what fits, to the unit");
    assert_eq!(gate.gate.usage(0, quota)?.used, limit);
    Ok(())
}
