//! How long single operations take at a fixed rate, each timed: `cargo bench --bench tail`.
//!
//! A caller pinned to core 0 does one operation a microsecond on a fixed schedule; the engine's
//! threads run on core 1, draining, syncing and compacting all the time. Two times are taken: the
//! operation's own, and the time from when it was due to when it was done, which charges it with
//! whatever held the caller up before.
#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a benchmark prints, reads the real clock, and stops where it can't go on"
)]

mod common;

use std::time::Duration;

use serde_json::{Value, json};
use tollgate::Config;

use common::AnyError;
use common::gates::Gate;
use common::keys::Users;
use common::open_loop::{Of, Times, open_loop};
use common::options::Options;
use common::passes::Contestant;
use common::peers::{BareMap, Governor};
use common::pin::{on_core, pin};
use common::proc::await_merges;
use common::report::{Report, Row, Target};

const USERS: Users = Users::Uniform(100_000);
const OPERATIONS_PER_SECOND: u64 = 1_000_000;
const NANOS_BETWEEN: u64 = 1_000_000_000 / OPERATIONS_PER_SECOND;
const CALLER_CORE: usize = 0;
const ENGINE_CORE: usize = 1;
const PAUSE: Duration = Duration::from_millis(200);

/// The places of the contestants.
const BARE: usize = 0;
const GATE: usize = 1;

fn main() -> Result<(), AnyError> {
    let options = Options::from_args(&["--repetitions", "--seconds", "--patience"]);
    let mut report = Report::new("tail", &options);
    let seconds = options.seconds(10, 1);
    let drawn = USERS.draw((seconds * OPERATIONS_PER_SECOND) as usize, 1);

    // Threads inherit the core of the thread that starts them.
    let gate = on_core(ENGINE_CORE, || open().map_err(|error| error.to_string()))?;
    let (bare, governor) = (BareMap::populated(USERS.count()), Governor::populated(USERS.count()));
    pin(CALLER_CORE);

    let mut contestants =
        [Measured::new("bare map"), Measured::new("try_consume"), Measured::new("governor")];
    let snapshots = gate.gate.stats().snapshots;
    let (mut quiet, mut attempts) = (options.quiet(), 0);
    for repetition in 0..options.repetitions() {
        let measured = quiet.run(|| {
            attempts += 1;
            // Each repetition begins with another one.
            let turns = (0..contestants.len()).map(|turn| (turn + repetition) % contestants.len());
            turns
                .map(|contestant| {
                    let times = match contestant {
                        BARE => measure(&drawn, |user| bare.add(user)),
                        GATE => measure(&drawn, |user| admit(&gate, user)),
                        _ => measure(&drawn, |user| {
                            assert!(governor.admits(user), "governor admits all");
                            1
                        }),
                    };
                    // What the engine still has to do should not meet the next.
                    gate.gate.sync()?;
                    await_merges();
                    Ok((contestant, times))
                })
                .collect::<tollgate::Result<Vec<_>>>()
        });
        for (contestant, times) in measured? {
            contestants[contestant].repetitions.push(times);
        }
    }
    let snapshots = gate.gate.stats().snapshots - snapshots;
    let counted = drawn.len() as u64 * attempts;
    assert_eq!(gate.used(USERS.count()), counted + u64::from(USERS.count()));
    bare.verify(counted);
    println!("{counted} operations a contestant; {snapshots} snapshots written meanwhile");

    tell(&contestants, &mut report);
    report.attach("snapshots", json!(snapshots));
    report.attach("operations_per_second", json!(OPERATIONS_PER_SECOND));
    report.finish()
}

/// An engine that compacts several times a second.
fn open() -> Result<Gate, AnyError> {
    let config = Config::default().snapshot_journal_bytes(1 << 20).snapshot_journal_percent(10);
    let gate = Gate::open(config)?;
    gate.populate(USERS.count())?;
    Ok(gate)
}

#[inline]
fn admit(gate: &Gate, user: u32) -> u64 {
    let decision = gate.gate.try_consume(user.into(), gate.quota, 1).expect("the log has room");
    u64::from(decision.is_allowed())
}

/// What one contestant's operations took.
struct Measured {
    name: &'static str,
    repetitions: Vec<Times>,
}

/// One operation for each user, each when it is due.
fn measure(users: &[u32], operate: impl Fn(u32) -> u64) -> Times {
    let dues = (0..users.len() as u64).map(|number| number * NANOS_BETWEEN);
    let times = open_loop(users, dues, operate);
    // Whatever is left of the pass should not meet the next.
    std::thread::sleep(PAUSE);
    times
}

impl Measured {
    fn new(name: &'static str) -> Self {
        Self { name, repetitions: Vec::new() }
    }

    fn percentile(&self, of: Of, percent: f64) -> Vec<f64> {
        let one = |times: &Times| times.of(of).value_at_percentile(percent) as f64;
        self.repetitions.iter().map(one).collect()
    }

    fn longest(&self, of: Of) -> Vec<f64> {
        self.repetitions.iter().map(|times| times.of(of).max() as f64).collect()
    }

    /// How many operations took how long, all repetitions together.
    fn counts(&self, of: Of) -> Value {
        let mut all = Times::new();
        self.repetitions.iter().for_each(|times| all.add(times));
        all.counts(of)
    }
}

/// The percentiles, what they must reach, and by how much more than the bare map's they may be.
const PERCENTILES: [(&str, f64, Option<f64>); 4] = [
    ("p50", 50.0, None),
    ("p99", 99.0, None),
    ("p99.9", 99.9, Some(1e3)),
    ("p99.99", 99.99, Some(1e4)),
];
const TIMES_BARE_MAP: f64 = 3.0;

fn tell(contestants: &[Measured; 3], report: &mut Report) {
    let bare = &contestants[BARE];
    for of in Of::BOTH {
        for contestant in contestants {
            let is_gate = contestant.name == "try_consume";
            let name = format!("{}, {}", contestant.name, of.name());
            for (percentile, percent, bound) in PERCENTILES {
                let samples = contestant.percentile(of, percent);
                let mut row = Row::new(&name, percentile, "ns", &samples);
                // The targets are those of the operation's own time.
                let bound = bound.filter(|_| matches!(of, Of::Service) && is_gate);
                if let Some(bound) = bound {
                    row = row.must(Target::AtMost(bound));
                }
                if is_gate {
                    let target = bound.map(|_| Target::AtMost(TIMES_BARE_MAP));
                    row = row.against("bare map", &bare.percentile(of, percent), target);
                }
                report.add(row);
            }
            report.add(Row::new(&name, "max", "ns", &contestant.longest(of)));
            let key = format!("{} {}", contestant.name, of.name());
            report.attach(&key, contestant.counts(of));
        }
    }
}
