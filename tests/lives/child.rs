//! The child: random operations on several threads, acknowledged in the shared page, until it is
//! ended. It closes and opens the directory again and again, so that the end meets recovery and
//! close as well, and looks each time whether all is there.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tollgate::{HealthLevel, QuotaId};

use super::limits::Limits;
use super::worker::Worker;
use super::{
    Count, Level, Life, Page, Phase, QUOTAS, Random, Syncs, THREADS, examine, open, quotas, settle,
    verdict,
};

/// So often at least must the syncs in the background cover what was counted, in a life in which
/// they are all there is.
const COVERED_UNASKED: u64 = 2;

/// Runs until it is ended, or something is not as promised: returns what.
pub(crate) fn run(level: Level, dir: &Path, page: &Page, seed: u64) -> String {
    let mut random = Random(seed);
    // What the last life of this process left: nothing of it is in doubt.
    let mut since = level;
    loop {
        if let Err(found) = live(since, dir, page, &mut random) {
            return found;
        }
        since = Level::Process;
    }
}

/// One life: open, count, close.
fn live(level: Level, dir: &Path, page: &Page, random: &mut Random) -> Result<(), String> {
    page.enter(Phase::Opening);
    let mut life = open(dir, page, random.next()).map_err(|error| format!("open: {error}"))?;
    let found = examine(&life.gate, page, level)?;
    settle(&life.gate, page, level, &found);
    life.limits = Limits::of(page);
    page.enter(Phase::Counting);
    let rounds = random.below(400) + 1;
    let ids = quotas(&life.gate).map_err(|error| format!("define: {error}"))?;
    count(&life, page, ids, rounds, random)?;
    let health = life.gate.health();
    if health.level() == HealthLevel::Failed {
        return Err(format!("{health:?}"));
    }
    // What is in memory is what was acknowledged, exactly.
    verdict::examine_counters(&life.gate, page, Level::Process)
        .map_err(|what| format!("before close, {what}"))?;
    page.enter(Phase::Closing);
    let acknowledged = page.acknowledged();
    let says_so = random.below(3) > 0;
    if says_so {
        life.gate.close().map_err(|error| format!("close: {error}"))?;
        page.cover(&acknowledged);
    }
    drop(life);
    // A drop that met the end of the power can't say so.
    if !says_so && !page.is_cut() {
        page.cover(&acknowledged);
    }
    Ok(())
}

/// Some rounds of random operations on each thread.
fn count(
    life: &Life,
    page: &Page,
    ids: [QuotaId; QUOTAS],
    rounds: u64,
    random: &mut Random,
) -> Result<(), String> {
    let is_over = AtomicBool::new(false);
    let covered = AtomicU64::new(0);
    let mut workers: Vec<_> = (0..THREADS)
        .map(|thread| Worker { life, page, thread, ids, random: Random(random.next()) })
        .collect();
    let result = std::thread::scope(|scope| {
        let covered = &covered;
        scope.spawn(|| watch(life, page, covered, &is_over));
        let threads: Vec<_> = workers
            .iter_mut()
            .map(|worker| {
                scope.spawn(move || {
                    let is_as_before = worker.ask_again()?;
                    page.count(Count::AskedAgain, u64::from(is_as_before));
                    (0..rounds).try_for_each(|_| worker.turn())?;
                    // Whoever waits in vain shows no sign of life any more.
                    while life.syncs == Syncs::Interval
                        && covered.load(Ordering::SeqCst) < COVERED_UNASKED
                    {
                        worker.count_slowly()?;
                    }
                    Ok(())
                })
            })
            .collect();
        let results: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
        is_over.store(true, Ordering::SeqCst);
        results
            .into_iter()
            .try_for_each(|result| result.unwrap_or_else(|_| panicked("a thread that counts")))
    });
    // No failure of the disk, the end of the power included, is a reason to panic.
    let health = life.gate.health();
    match health.reasons.iter().find(|reason| reason.to_string().contains("panicked")) {
        Some(reason) => panicked(&reason.to_string()),
        None => result,
    }
}

/// Ends the process at once: whatever happened to the disk, this must not be.
fn panicked(what: &str) -> ! {
    eprintln!("there was a panic: {what}");
    std::process::exit(super::VIOLATION.into());
}

/// What the syncs in the background promise: all that was acknowledged before one began is durable
/// once it has completed. Of two that completed since, the second began since.
fn watch(life: &Life, page: &Page, covered: &AtomicU64, is_over: &AtomicBool) {
    while !is_over.load(Ordering::SeqCst) {
        let acknowledged = page.acknowledged();
        let before = life.gate.stats().syncs;
        while life.gate.stats().syncs < before + 2 {
            if is_over.load(Ordering::SeqCst) {
                return;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        page.cover(&acknowledged);
        covered.fetch_add(1, Ordering::SeqCst);
        page.count(Count::CoveredUnasked, u64::from(life.syncs == Syncs::Interval));
    }
}
