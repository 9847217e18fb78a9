//! Kills a process that counts, at random instants, and looks at what is recovered.
//!
//! Proves I1 and I2 for the death of the process: for each counter, what was acknowledged is there,
//! nothing that was not issued is, no limit is passed, and a second recovery finds the same.
//!
//! `TOLLGATE_KILLS` sets the number of kills (default 200), `TOLLGATE_SEED` the first seed.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stderr,
    clippy::cast_possible_truncation,
    reason = "a test ends where something is not as expected"
)]

mod child;
mod page;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::Duration;

use libtest_mimic::{Arguments, Failed, Trial};
use tollgate::{Config, ManualClock, Quota, QuotaId, Timestamp, Tollgate, Window};

use crate::page::{Page, Tally};

const THREADS: usize = 3;
const USERS: usize = 8;
/// Without a limit that matters; with one; with one and windows.
const QUOTAS: usize = 3;
const COUNTERS: usize = USERS * QUOTAS;
const LIMIT: u64 = 3_000;
const WINDOW_MS: u64 = 60_000;
const START_MS: u64 = 1_767_225_600_000;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

fn split(counter: usize) -> (u64, usize) {
    ((counter / QUOTAS) as u64, counter % QUOTAS)
}

fn define(gate: &Tollgate) -> [QuotaId; QUOTAS] {
    let definitions = [
        Quota::new("unlimited", u64::MAX >> 1),
        Quota::new("limited", LIMIT),
        Quota::new("per-minute", LIMIT).window(Window::Minute),
    ];
    definitions.map(|quota| gate.define(quota).expect("the disk works"))
}

/// Opens the directory with bounds so small that all of them are met, and a geometry that changes
/// with the seed.
fn open(dir: &Path, page: &Page, seed: u64) -> Tollgate {
    let mut random = Random(seed);
    let minutes = page.clock().load(std::sync::atomic::Ordering::SeqCst);
    let clock = ManualClock::new(Timestamp::from_unix_millis(START_MS + minutes * WINDOW_MS));
    let config = Config::default()
        .lanes(1 + random.below(3) as usize)
        .lane_records(64 << random.below(3))
        .shards(4)
        .journal_file_bytes(64 << 10)
        .snapshot_journal_bytes(64 << 10)
        .sync_interval(Duration::from_millis(1 + random.below(10)))
        .drain_interval(Duration::from_micros(200))
        .backpressure_deadline(Duration::from_secs(60))
        .clock(Arc::new(clock));
    Tollgate::open(dir, config).expect("the directory opens")
}

struct Outcome {
    kills: u64,
    acknowledged: u64,
}

fn kill_many(kills: u64, first_seed: u64) -> Result<Outcome, Failed> {
    let root = tempfile::tempdir()?;
    let (dir, page_path) = (root.path().join("data"), root.path().join("page"));
    let page = Page::open(&page_path);
    let mut random = Random(first_seed);
    let mut acknowledged = 0;
    for kill in 0..kills {
        let seed = random.next();
        let context = format!("kill {kill}, first seed {first_seed}");
        kill_once(&dir, &page_path, seed, &mut random)?;
        let before: u64 = (0..COUNTERS).map(|c| page.sum(c, Tally::AddAcked)).sum();
        let used = examine(&dir, &page, random.next(), &context)?;
        let started: u64 = used.iter().sum();
        for (counter, &used) in used.iter().enumerate() {
            page.reset(counter, used);
        }
        acknowledged += before.saturating_sub(started.min(before));
        if random.below(20) == 0 {
            // A window passes: its counters start at zero.
            page.clock().fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            for counter in (0..COUNTERS).filter(|&counter| split(counter).1 == 2) {
                page.reset(counter, 0);
            }
        }
        if random.below(40) == 0 {
            // Anew, so that creation is killed as well, and usage stays far from the limit now and
            // then.
            std::fs::remove_dir_all(&dir)?;
            (0..COUNTERS).for_each(|counter| page.reset(counter, 0));
        }
    }
    Ok(Outcome { kills, acknowledged })
}

fn kill_once(dir: &Path, page: &Path, seed: u64, random: &mut Random) -> Result<(), Failed> {
    let mut child = Command::new(std::env::current_exe()?)
        .arg("--child")
        .arg(dir)
        .arg(page)
        .arg(seed.to_string())
        .stdin(Stdio::null())
        .spawn()?;
    let micros = match random.below(3) {
        0 => random.below(3_000),
        1 => random.below(20_000),
        _ => random.below(80_000),
    };
    std::thread::sleep(Duration::from_micros(micros));
    child.kill()?;
    let status = child.wait()?;
    if status.code().is_some() {
        return Err(format!("the child ended by itself: {status}, seed {seed}").into());
    }
    Ok(())
}

/// Recovers twice, the second time with a snapshot merged in between, and checks every counter.
fn examine(dir: &Path, page: &Page, seed: u64, context: &str) -> Result<Vec<u64>, Failed> {
    let read = |gate: &Tollgate| -> Vec<u64> {
        let quotas = define(gate);
        let usage = |counter| {
            let (user, quota) = split(counter);
            gate.usage(user, quotas[quota]).expect("it is defined").used
        };
        (0..COUNTERS).map(usage).collect()
    };
    let gate = open(dir, page, seed);
    if !gate.recovery_report().findings.is_empty() && gate.recovery_report().corrected > 0 {
        return Err(format!("{context}: {:?}", gate.recovery_report()).into());
    }
    let used = read(&gate);
    if seed.is_multiple_of(2) {
        gate.snapshot()?;
    }
    drop(gate);
    let again = read(&open(dir, page, seed ^ 1));
    if used != again {
        return Err(format!("{context}: a second recovery differs: {used:?}, {again:?}").into());
    }
    for (counter, &used) in used.iter().enumerate() {
        let [added, acked, refunds, given] =
            [Tally::AddIssued, Tally::AddAcked, Tally::RefundIssued, Tally::RefundAcked]
                .map(|tally| page.sum(counter, tally));
        let least = acked.saturating_sub(refunds);
        let most = added.saturating_sub(given);
        if used < least || used > most {
            return Err(format!(
                "{context}: counter {counter} has {used}, should have {least}..={most} \
                 (added {added}, acknowledged {acked}, refunds {refunds}, given back {given})"
            )
            .into());
        }
        if split(counter).1 != 0 && used > LIMIT {
            return Err(format!("{context}: counter {counter} has {used} above {LIMIT}").into());
        }
    }
    Ok(used)
}

fn number(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name} is a number")),
        Err(_) => default,
    }
}

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().collect();
    if let [_, flag, dir, page, seed] = &arguments[..]
        && flag == "--child"
    {
        let seed = seed.parse().expect("a seed");
        child::run(&PathBuf::from(dir), &PathBuf::from(page), seed);
        return ExitCode::FAILURE;
    }
    let trial = Trial::test("a_killed_process_loses_nothing_and_counts_nothing_twice", || {
        let kills = number("TOLLGATE_KILLS", 200);
        let outcome = kill_many(kills, number("TOLLGATE_SEED", 1))?;
        eprintln!(
            "{} kills, {} units acknowledged, 0 violations",
            outcome.kills, outcome.acknowledged
        );
        Ok(())
    });
    libtest_mimic::run(&Arguments::from_args(), vec![trial]).exit_code()
}
