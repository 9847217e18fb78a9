//! What reservations, groups and requests cost beside a plain `try_consume`:
//! `cargo bench --bench ledger`.
//!
//! Frame and workload are those of `throughput`: users drawn beforehand, callers pinned, the
//! engine's threads on the other cores where there are any, passes interleaved.
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
use std::time::Duration;

use serde_json::json;
use tollgate::{Config, Consume, QuotaId, Tollgate};

use common::AnyError;
use common::gates::{Gate, used};
use common::keys::Users;
use common::options::{FILTER, Options};
use common::passes::{Contestant, Part, race};
use common::pin::keep_off;
use common::proc::Resident;
use common::report::{Report, Row, Target};

const USERS: u32 = 100_000;
const TTL: Duration = Duration::from_secs(600);
/// Most requests are asked once; their answers fill what may be remembered, and the oldest go.
const ANSWERS: usize = 1_000_000;

const PLAIN: &str = "try_consume";
const RESERVE: &str = "reserve + commit";
const ALL: &str = "try_consume_all of 3";
const ONCE: &str = "try_consume_once";

fn main() -> Result<(), AnyError> {
    let options = Options::from_args(&[FILTER, "--repetitions", "--patience"]);
    let mut report = Report::new("ledger", &options);
    // First, while nothing was allocated and freed yet.
    if options.wants("memory") {
        memory(&options, &mut report)?;
    }
    for threads in [1, 2] {
        let name = format!("uniform-100k-{threads}t");
        if options.wants(&name) {
            keep_off(threads);
            run(&name, threads, &options, &mut report)?;
        }
    }
    report.finish()
}

fn run(name: &str, threads: usize, options: &Options, report: &mut Report) -> Result<(), AnyError> {
    let contestants = [
        Operations::open(PLAIN, 1, plain)?,
        Operations::open(RESERVE, 1, reserve_and_commit)?,
        Operations::open(ALL, 3, all_of_three)?,
        Operations::open(ONCE, 1, once)?,
    ];
    let taking_part: Vec<&dyn Contestant> =
        contestants.iter().map(|contestant| contestant as &dyn Contestant).collect();
    let operations = options.size(1 << 20, 1 << 15);
    let users = Users::Uniform(USERS).draw_for_threads(threads, operations);
    let samples = race(&taking_part, &users, options);
    for (what, measured) in &samples {
        let mut row = Row::new(name, what, "ns", measured);
        if let Some(base) = samples.get(PLAIN).filter(|_| *what != PLAIN) {
            row = row.against(PLAIN, base, Some(Target::AtMost(4.0)));
        }
        report.add(row);
    }
    let waits: Vec<_> =
        contestants.iter().map(|of| of.gate.gate.stats().backpressure_waits).collect();
    report.note(&format!("{name}: waits for room in the log"), json!(waits));
    Ok(())
}

/// What each answer that is remembered and each open reservation takes.
fn memory(options: &Options, report: &mut Report) -> Result<(), AnyError> {
    let count = options.size(ANSWERS, 1 << 15);
    let config = Config::default().dedup_max(count).reservations_max(count);
    let Gate { gate, quota, dir: _dir } = Gate::open(config)?;
    let user = |number: usize| number as u64 % u64::from(USERS);
    for number in 0..USERS as usize {
        gate.consume(user(number), quota, 1)?;
    }
    let mut measure =
        |what: &str, operate: &dyn Fn(usize) -> tollgate::Result<()>| -> tollgate::Result<()> {
            gate.sync()?;
            let before = Resident::now().anonymous;
            (0..count).try_for_each(operate)?;
            gate.sync()?;
            let grown = Resident::now().anonymous.saturating_sub(before);
            report.add(Row::new("memory", what, "B", &[grown as f64 / count as f64]));
            Ok(())
        };
    measure("of an answer", &|number| {
        gate.try_consume_once(number as u128, user(number), quota, 1).map(|decision| {
            assert!(decision.is_allowed(), "there is no limit");
        })
    })?;
    measure("of an open reservation", &|number| {
        let reserved = gate.reserve(user(number), quota, 1, TTL)?;
        reserved.into_result().expect("there is no limit").detach();
        Ok(())
    })?;
    Ok(())
}

/// One kind of operation, on an engine of its own.
struct Operations {
    name: &'static str,
    gate: Gate,
    /// Counters in an operation.
    counters: u64,
    operate: fn(&Operations, u32, u64) -> bool,
    /// How many operations were begun.
    begun: AtomicU64,
}

impl Operations {
    fn open(
        name: &'static str,
        counters: u64,
        operate: fn(&Operations, u32, u64) -> bool,
    ) -> Result<Self, AnyError> {
        let gate = Gate::open(Config::default().dedup_max(ANSWERS))?;
        gate.populate(USERS)?;
        Ok(Self { name, gate, counters, operate, begun: AtomicU64::new(0) })
    }

    fn parts(&self) -> (&Tollgate, QuotaId) {
        (&self.gate.gate, self.gate.quota)
    }
}

fn plain(of: &Operations, user: u32, _: u64) -> bool {
    let (gate, quota) = of.parts();
    gate.try_consume(user.into(), quota, 1).expect("the log has room").is_allowed()
}

fn reserve_and_commit(of: &Operations, user: u32, _: u64) -> bool {
    let (gate, quota) = of.parts();
    let reserved = gate.reserve(user.into(), quota, 2, TTL).expect("the log has room");
    let Ok(mut reservation) = reserved.into_result() else { return false };
    reservation.commit(1).expect("it is open").is_allowed()
}

/// The user's counter and two more, in no order.
fn all_of_three(of: &Operations, user: u32, _: u64) -> bool {
    let (gate, quota) = of.parts();
    let others = [user, user.wrapping_mul(31) % USERS, user.wrapping_mul(17) % USERS];
    let items = others.map(|user| Consume { user: user.into(), quota, amount: 1 });
    gate.try_consume_all(&items).expect("the log has room").is_allowed()
}

fn once(of: &Operations, user: u32, number: u64) -> bool {
    let (gate, quota) = of.parts();
    let request = u128::from(number) << 64 | u128::from(number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let decision = gate.try_consume_once(request, user.into(), quota, 1);
    decision.expect("the log has room").is_allowed()
}

impl Contestant for Operations {
    fn name(&self) -> &'static str {
        self.name
    }

    fn run(&self, part: &Part<'_>) -> u64 {
        // Relaxed: a ticket.
        let first = self.begun.fetch_add(part.users.len() as u64, Ordering::Relaxed);
        let operate = |(number, &user)| u64::from((self.operate)(self, black_box(user), number));
        (first..).zip(part.users).map(operate).sum()
    }

    fn settle(&self) {
        self.gate.gate.sync().expect("the disk works");
    }

    fn verify(&self, operations: u64) {
        let expected = operations * self.counters + u64::from(USERS);
        assert_eq!(
            used(&self.gate.gate, self.gate.quota, USERS),
            expected,
            "every operation counts"
        );
    }
}
