//! Full speed for a minute, and what reaches the disk at which rate:
//! `cargo bench --bench sustained`.
//!
//! Callers are pinned from core 0 on and go as fast as they can; flushers, journal and snapshots
//! run as configured by default, on the other cores where there are any. The bare map goes before
//! and afterwards: what it got slower by is the machine's. Then callers go at fixed
//! rates, for the bytes that a consume costs the disk, as the kernel counts them (mapped pages
//! included).
#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a benchmark prints, reads the real clock, and stops where it can't go on"
)]

mod common;

use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam::utils::CachePadded;
use rustix::fs::syncfs;
use serde_json::json;
use tollgate::Config;

use common::AnyError;
use common::gates::Gate;
use common::keys::Users;
use common::options::{FILTER, Options};
use common::peers::BareMap;
use common::pin::{keep_off, pin};
use common::proc::{Resident, device_bytes, disk_bytes};
use common::report::{Report, Row, Target};

const USERS: Users = Users::Zipf(100_000);
/// How many operations a caller does between two looks at the clock.
const BLOCK: usize = 1000;
/// For how long the bare map goes, each time.
const MAP_SECONDS: u64 = 3;
/// Consumes per second at which the disk is watched; the last is full speed.
const RATES: [Option<u64>; 5] = [Some(1_000), Some(10_000), Some(100_000), Some(1_000_000), None];

fn main() -> Result<(), AnyError> {
    let options = Options::from_args(&[FILTER, "--seconds"]);
    let mut report = Report::new("sustained", &options);
    for threads in [1, 2] {
        let name = format!("full-speed-{threads}t");
        if options.wants(&name) {
            keep_off(threads);
            full_speed(&name, threads, &options, &mut report)?;
        }
    }
    for rate in RATES {
        let text = rate.map_or_else(|| "full speed".to_owned(), |rate| format!("{rate} a second"));
        let name = format!("bytes-at-rate, {text}");
        if options.wants(&name) {
            keep_off(1);
            bytes_at_rate(&name, rate, &options, &mut report)?;
        }
    }
    report.finish()
}

fn full_speed(
    name: &str,
    threads: usize,
    options: &Options,
    report: &mut Report,
) -> Result<(), AnyError> {
    let seconds = options.seconds(60, 3);
    let map = BareMap::populated(USERS.count());
    let map_rate = || {
        let (_, operations) = watch(&|user| _ = map.add(user), threads, MAP_SECONDS, None);
        operations as f64 / MAP_SECONDS as f64
    };
    let gate = populated()?;
    let map_before = map_rate();
    let before = disk_bytes();
    let watched = watch_consumes(&gate, threads, seconds, None);
    gate.gate.sync()?;
    let written = disk_bytes() - before;
    let stats = gate.gate.stats();

    let rates: Vec<f64> = watched.iter().map(|second| second.operations as f64).collect();
    let [first, rest @ ..] = rates.as_slice() else { return Ok(()) };
    let of_first = |what, rate: f64| Row::new(name, what, "", &[rate / first]);
    let mean = rest.iter().sum::<f64>() / rest.len() as f64;
    let slowest = rest.iter().copied().fold(f64::INFINITY, f64::min);
    report.add(Row::new(name, "first second", "/s", &[*first]));
    report.add(of_first("mean of later seconds / first", mean).must(Target::AtLeast(0.7)));
    report.add(of_first("slowest second / first", slowest).must(Target::AtLeast(0.7)));
    let map_ratio = map_rate() / map_before;
    report.add(Row::new(name, "bare map, afterwards / before", "", &[map_ratio]));

    let operations: u64 = watched.iter().map(|second| second.operations).sum();
    let per_consume = written as f64 / operations as f64;
    let bytes = Row::new(name, "written to disk", "B/consume", &[per_consume]);
    report.add(bytes.must(Target::AtMost(4.0)));
    let early = watched[watched.len() / 10].resident;
    let late = watched[watched.len() - 1].resident;
    let growth = late.total() as f64 / early.total() as f64;
    report.add(Row::new(name, "memory at the end / after 10 %", "", &[growth]));
    report.add(Row::new(name, "memory at the end", "B", &[late.total() as f64]));

    let snapshots = stats.snapshots;
    println!("{operations} consumes, {snapshots} snapshots, {} syncs", stats.syncs);
    let by_second = watched.iter().map(|second| {
        let Resident { anonymous, mapped } = second.resident;
        json!({ "operations": second.operations, "anonymous": anonymous, "mapped": mapped })
    });
    report.attach(name, by_second.collect());
    gate.gate.close()?;
    Ok(())
}

fn bytes_at_rate(
    name: &str,
    rate: Option<u64>,
    options: &Options,
    report: &mut Report,
) -> Result<(), AnyError> {
    let gate = populated()?;
    let dir = File::open(gate.dir.path())?;
    let looks = || -> Result<_, AnyError> {
        // What is dirty is written when the kernel pleases: what came before must not be counted,
        // and the rings' pages must.
        gate.gate.sync()?;
        syncfs(&dir)?;
        Ok([disk_bytes(), device_bytes(gate.dir.path()), gate.gate.stats().bytes_to_disk])
    };
    let before = looks()?;
    let watched = watch_consumes(&gate, 1, options.seconds(10, 2), rate);
    let after = looks()?;
    let operations = watched.iter().map(|second| second.operations).sum::<u64>() as f64;
    let elapsed = watched.len() as f64;
    report.add(Row::new(name, "consumes", "/s", &[operations / elapsed]));
    for (index, by) in COUNTED_BY.iter().enumerate() {
        let written = after[index].saturating_sub(before[index]) as f64;
        report.add(Row::new(name, by, "B/consume", &[written / operations]));
    }
    Ok(())
}

/// Three counts of what goes to the disk: the kernel's of this process, an upper bound since it
/// counts large folios as a whole; the device's, of all processes; the engine's, without what the
/// file system adds, nor the rings.
const COUNTED_BY: [&str; 3] = ["by the process", "by the device", "by the engine"];

/// An engine that knows all users and has gone through its first snapshot.
fn populated() -> Result<Gate, AnyError> {
    let gate = Gate::open(Config::default())?;
    gate.populate(USERS.count())?;
    gate.gate.snapshot()?;
    // The next journal file is prepared by now.
    thread::sleep(Duration::from_secs(2));
    Ok(gate)
}

/// What happened in one second.
struct Second {
    operations: u64,
    resident: Resident,
}

/// [`watch`]es callers that consume. At the end every operation must have been counted.
fn watch_consumes(gate: &Gate, threads: usize, seconds: u64, rate: Option<u64>) -> Vec<Second> {
    let used_before = gate.used(USERS.count());
    let consume = |user: u32| {
        gate.gate.consume(user.into(), gate.quota, 1).expect("the log has room");
    };
    let (watched, operations) = watch(&consume, threads, seconds, rate);
    assert_eq!(gate.used(USERS.count()), used_before + operations, "every operation counts");
    watched
}

/// Lets callers go on for so many seconds, at `rate` together or as fast as they can, and looks at
/// them once a second. And all operations, those after the last look too.
fn watch(
    operate: &(impl Fn(u32) + Sync),
    threads: usize,
    seconds: u64,
    rate: Option<u64>,
) -> (Vec<Second>, u64) {
    let drawn = USERS.draw_for_threads(threads, 1 << 22);
    let counts: Vec<_> = (0..threads).map(|_| CachePadded::new(AtomicU64::new(0))).collect();
    let stop = AtomicBool::new(false);
    // Relaxed, here and in `go_on`: counts that one thread writes and another looks at.
    let total = || counts.iter().map(|count| count.load(Ordering::Relaxed)).sum::<u64>();
    let mut watched = Vec::new();
    thread::scope(|scope| {
        for (core, (users, count)) in drawn.iter().zip(&counts).enumerate() {
            let stop = &stop;
            scope.spawn(move || {
                pin(core);
                go_on(operate, users, rate, count, stop);
            });
        }
        let start = Instant::now();
        let mut before = 0;
        for second in 1..=seconds {
            thread::sleep(Duration::from_secs(second).saturating_sub(start.elapsed()));
            let now = total();
            watched.push(Second { operations: now - before, resident: Resident::now() });
            before = now;
        }
        stop.store(true, Ordering::Relaxed);
    });
    (watched, total())
}

/// Operates for the users in turn, until told to stop.
fn go_on(
    operate: impl Fn(u32),
    users: &[u32],
    rate: Option<u64>,
    count: &AtomicU64,
    stop: &AtomicBool,
) {
    let block = rate.map_or(BLOCK, |rate| (rate / 1000).clamp(1, BLOCK as u64) as usize);
    let start = Instant::now();
    let mut done = 0;
    for users in users.chunks_exact(block).cycle() {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        for &user in users {
            operate(user);
        }
        done += block as u64;
        count.store(done, Ordering::Relaxed);
        if let Some(rate) = rate {
            let due = Duration::from_secs_f64(done as f64 / rate as f64);
            thread::sleep(due.saturating_sub(start.elapsed()));
        }
    }
}
