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

use hdrhistogram::Histogram;
use serde_json::{Value, json};
use tollgate::Config;

use common::AnyError;
use common::gates::Gate;
use common::keys::Users;
use common::options::Options;
use common::peers::{BareMap, Governor};
use common::pin::{on_core, pin};
use common::report::{Report, Row, Target};

const USERS: Users = Users::Uniform(100_000);
const OPERATIONS_PER_SECOND: u64 = 1_000_000;
const NANOS_BETWEEN: u64 = 1_000_000_000 / OPERATIONS_PER_SECOND;
const CALLER_CORE: usize = 0;
const ENGINE_CORE: usize = 1;
const PAUSE: Duration = Duration::from_millis(200);
/// Longer times count as this.
const NANOS_MAX: u64 = 10_000_000_000;

fn main() -> Result<(), AnyError> {
    let options = Options::from_args();
    let mut report = Report::new("tail", &options);
    let seconds = options.seconds(10, 1);
    let drawn = USERS.draw((seconds * OPERATIONS_PER_SECOND) as usize, 1);

    // Threads inherit the core of the thread that starts them.
    let gate = on_core(ENGINE_CORE, || open().map_err(|error| error.to_string()))?;
    let (bare, governor) = (BareMap::populated(USERS.count()), Governor::populated(USERS.count()));
    pin(CALLER_CORE);

    let mut contestants =
        [Times::new("bare map"), Times::new("try_consume"), Times::new("governor")];
    let snapshots = gate.gate.stats().snapshots;
    let (mut quiet, mut attempts) = (options.quiet(), 0);
    for _ in 0..options.repetitions() {
        let measured = quiet.run(|| {
            attempts += 1;
            let measured = [
                measure(&drawn, |user| bare.add(user)),
                measure(&drawn, |user| admit(&gate, user)),
                measure(&drawn, |user| u64::from(governor.admits(user))),
            ];
            gate.gate.sync().map(|()| measured)
        });
        for (times, histograms) in contestants.iter_mut().zip(measured?) {
            times.repetitions.push(histograms);
        }
    }
    let snapshots = gate.gate.stats().snapshots - snapshots;
    let counted = drawn.len() as u64 * attempts;
    assert_eq!(gate.used(USERS.count()), counted + u64::from(USERS.count()));
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
struct Times {
    name: &'static str,
    repetitions: Vec<Histograms>,
}

struct Histograms {
    /// From the call to the return.
    service: Histogram<u64>,
    /// From when it was due to the return.
    response: Histogram<u64>,
}

impl Histograms {
    fn new() -> Self {
        let histogram = || Histogram::new_with_max(NANOS_MAX, 3).expect("the bounds are valid");
        Self { service: histogram(), response: histogram() }
    }
}

/// One operation for each user, each when it is due.
fn measure(users: &[u32], operate: impl Fn(u32) -> u64) -> Histograms {
    let clock = quanta::Clock::new();
    let mut histograms = Histograms::new();
    let start = clock.raw();
    let since_start = || clock.delta_as_nanos(start, clock.raw());
    for (number, &user) in users.iter().enumerate() {
        let due = number as u64 * NANOS_BETWEEN;
        let mut began = since_start();
        while began < due {
            std::hint::spin_loop();
            began = since_start();
        }
        std::hint::black_box(operate(std::hint::black_box(user)));
        let ended = since_start();
        histograms.service.saturating_record(ended.saturating_sub(began));
        histograms.response.saturating_record(ended.saturating_sub(due));
    }
    // Whatever is left of the pass should not meet the next.
    std::thread::sleep(PAUSE);
    histograms
}

impl Times {
    fn new(name: &'static str) -> Self {
        Self { name, repetitions: Vec::new() }
    }

    fn percentile(&self, of: Of, percent: f64) -> Vec<f64> {
        let one = |histograms: &Histograms| of.pick(histograms).value_at_percentile(percent) as f64;
        self.repetitions.iter().map(one).collect()
    }

    fn longest(&self, of: Of) -> Vec<f64> {
        self.repetitions.iter().map(|histograms| of.pick(histograms).max() as f64).collect()
    }

    /// How many operations took how long, all repetitions together.
    fn counts(&self, of: Of) -> Value {
        let mut all = Histogram::<u64>::new_with_max(NANOS_MAX, 3).expect("the bounds are valid");
        for histograms in &self.repetitions {
            all.add(of.pick(histograms)).expect("the bounds are the same");
        }
        let counts = all.iter_log(1, 1.1).filter(|step| step.count_since_last_iteration() > 0);
        let pair = |step: hdrhistogram::iterators::IterationValue<u64>| {
            json!([step.value_iterated_to(), step.count_since_last_iteration()])
        };
        counts.map(pair).collect()
    }
}

/// Which of the two times.
#[derive(Clone, Copy)]
enum Of {
    Service,
    Response,
}

impl Of {
    fn pick(self, histograms: &Histograms) -> &Histogram<u64> {
        match self {
            Self::Service => &histograms.service,
            Self::Response => &histograms.response,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Service => "service",
            Self::Response => "response",
        }
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

fn tell(contestants: &[Times; 3], report: &mut Report) {
    let bare = &contestants[0];
    for of in [Of::Service, Of::Response] {
        for times in contestants {
            let is_gate = times.name == "try_consume";
            let name = format!("{}, {}", times.name, of.name());
            for (percentile, percent, bound) in PERCENTILES {
                let samples = times.percentile(of, percent);
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
            report.add(Row::new(&name, "max", "ns", &times.longest(of)));
            let key = format!("{} {}", times.name, of.name());
            report.attach(&key, times.counts(of));
        }
    }
}
