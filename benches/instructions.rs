//! Instructions of an operation: `cargo bench --bench instructions`. Unlike times they repeat, on
//! any machine of the same kind.
//!
//! The program runs itself twice for each operation, with few and with many repetitions, and leads
//! its loop through them one instruction at a time (`ptrace(2)`). The difference, divided, is one
//! operation. Not by callgrind, which has no `membarrier(2)`: what it would count is the way of
//! machines without it, see `seats`.
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
use std::process::Command;
use std::time::Duration;

use nix::sys::ptrace;
use nix::sys::signal::{Signal, raise};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use tollgate::{Config, Consume, Counter};

use common::AnyError;
use common::gates::Gate;
use common::options::{FILTER, Options};
use common::peers::{BareMap, Governor};
use common::report::{Report, Row};

const FEW: u64 = 100;
const MANY: u64 = 1_100;
const USERS: u32 = 1024;
/// How often each counter is looked at before: until its shard is read past its lock.
const LOOKS: u32 = 300;
const VARIABLE: &str = "TOLLGATE_BENCH_OPERATION";
/// Says to who leads it through that the loop begins, and that it has ended.
const MARK: Signal = Signal::SIGSTOP;

const OPERATIONS: [&str; 10] = [
    "reserve + commit",
    "try_consume_all of 3",
    "try_consume_once",
    "try_consume",
    "consume",
    "check",
    "handle try_consume",
    "handle check",
    "bare map",
    "governor",
];

fn main() -> Result<(), AnyError> {
    if let Ok(task) = std::env::var(VARIABLE) {
        let (count, operation) = task.split_once(' ').expect("a count and a name");
        return run(operation, count.parse()?);
    }
    let options = Options::from_args(&[FILTER]);
    let mut report = Report::new("instructions", &options);
    let mut of_bare_map = None;
    for operation in OPERATIONS.iter().rev().filter(|operation| options.wants(operation)) {
        let difference = instructions(operation, MANY)? - instructions(operation, FEW)?;
        let each = difference / (MANY - FEW) as f64;
        if *operation == "bare map" {
            of_bare_map = Some(each);
        }
        let row = Row::new("instructions", operation, "", &[each]);
        report.add(match of_bare_map {
            Some(bare) if *operation != "bare map" => row.against("bare map", &[bare], None),
            _ => row,
        });
    }
    report.finish()
}

/// The instructions of so many operations, loop included.
fn instructions(operation: &str, count: u64) -> Result<f64, AnyError> {
    let mut child = Command::new(std::env::current_exe()?)
        .env(VARIABLE, format!("{count} {operation}"))
        .spawn()?;
    let pid = Pid::from_raw(child.id().try_into()?);
    let mut stopped = waitpid(pid, None)?;
    let mut steps = 0_u64;
    assert_eq!(stopped, WaitStatus::Stopped(pid, MARK), "{operation}: it is not led through");
    loop {
        ptrace::step(pid, None)?;
        stopped = waitpid(pid, None)?;
        match stopped {
            WaitStatus::Stopped(_, Signal::SIGTRAP) => steps += 1,
            WaitStatus::Stopped(_, MARK) => break,
            other => return Err(format!("{operation}: {other:?} in the loop").into()),
        }
    }
    ptrace::detach(pid, None)?;
    assert!(child.wait()?.success(), "{operation}: it has failed");
    Ok(steps as f64)
}

fn run(operation: &str, count: u64) -> Result<(), AnyError> {
    match operation {
        "bare map" => {
            let bare = BareMap::populated(USERS);
            counted_loop(count, |user| bare.add(user));
        }
        "governor" => {
            let governor = Governor::populated(USERS);
            counted_loop(count, |user| u64::from(governor.admits(user)));
        }
        _ => run_on_gate(operation, count)?,
    }
    Ok(())
}

fn run_on_gate(operation: &str, count: u64) -> Result<(), AnyError> {
    // The engine's threads are not led through, and go on.
    let config = Config::default().drain_interval(Duration::from_secs(1));
    let Gate { gate, quota, dir } = Gate::open(config)?;
    for user in 0..USERS {
        gate.consume(user.into(), quota, 1)?;
        for _ in 0..LOOKS {
            assert!(gate.check(user.into(), quota, 1)?.is_allowed());
        }
    }
    let handle = |user: u32| gate.counter(user.into(), quota);
    let handles: Vec<Counter> = if operation.starts_with("handle") {
        (0..USERS).map(handle).collect::<tollgate::Result<_>>()?
    } else {
        Vec::new()
    };
    match operation {
        "try_consume" => counted_loop(count, |user| {
            let decision = gate.try_consume(user.into(), quota, 1).expect("the log has room");
            u64::from(decision.is_allowed())
        }),
        "consume" => counted_loop(count, |user| {
            gate.consume(user.into(), quota, 1).expect("the log has room").used
        }),
        "check" => counted_loop(count, |user| {
            let decision = gate.check(user.into(), quota, 1).expect("the quota is defined");
            u64::from(decision.is_allowed())
        }),
        "handle try_consume" => counted_loop(count, |user| {
            let decision = handles[user as usize].try_consume(1).expect("the log has room");
            u64::from(decision.is_allowed())
        }),
        "handle check" => counted_loop(count, |user| {
            let decision = handles[user as usize].check(1).expect("the quota is defined");
            u64::from(decision.is_allowed())
        }),
        "reserve + commit" => counted_loop(count, |user| {
            let ttl = Duration::from_secs(600);
            let reserved = gate.reserve(user.into(), quota, 2, ttl).expect("the log has room");
            let mut reservation = reserved.into_result().expect("there is no limit");
            u64::from(reservation.commit(1).expect("it is open").is_allowed())
        }),
        "try_consume_all of 3" => counted_loop(count, |user| {
            let users = [user, (user + 1) % USERS, (user + 2) % USERS];
            let items = users.map(|user| Consume { user: user.into(), quota, amount: 1 });
            u64::from(gate.try_consume_all(&items).expect("the log has room").is_allowed())
        }),
        "try_consume_once" => {
            let next = std::cell::Cell::new(0_u128);
            counted_loop(count, |user| {
                next.set(next.get() + 1);
                let decision = gate.try_consume_once(next.get(), user.into(), quota, 1);
                u64::from(decision.expect("the log has room").is_allowed())
            });
        }
        unknown => panic!("no operation {unknown}"),
    }
    gate.close()?;
    drop(dir);
    Ok(())
}

/// What is counted, the same for all.
#[inline(never)]
fn counted_loop(count: u64, operate: impl Fn(u32) -> u64) {
    let users: Vec<_> = (0..count).map(|number| (number % u64::from(USERS)) as u32).collect();
    // Once through first: what is there once is not counted.
    let mut sum = operate(0);
    ptrace::traceme().expect("a process may have itself led through");
    raise(MARK).expect("a signal to oneself");
    for &user in &users {
        sum = sum.wrapping_add(operate(black_box(user)));
    }
    raise(MARK).expect("a signal to oneself");
    black_box(sum);
}
