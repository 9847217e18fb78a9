//! Cuts the power of a file system on which a process counts, at random instants, and looks at what
//! is recovered; fills it up while a process counts.
//!
//! Proves I1 and I2 for loss of power: what a `_sync` call acknowledged, what a completed `sync()`
//! covered, and what was older than the start of a completed sync in the background is there;
//! nothing that was not issued is; no limit is passed by more than the refunds that were lost; a
//! second recovery finds the same. And I6 for a disk that is full.
//!
//! `TOLLGATE_CUTS` sets the number of cuts (default 50), `TOLLGATE_SEED` the first seed. Where no
//! file system can be mounted the tests say so and succeed, unless `TOLLGATE_REQUIRE_ROOT` is set.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stderr,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    reason = "a test ends where something is not as expected"
)]

mod disk;
mod full;
#[path = "../lives/mod.rs"]
mod lives;
mod rings;

use std::os::unix::process::ExitStatusExt;
use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};
use rustix::process::Signal;

use disk::{Cut, Disk};
use lives::{
    Count, EVENTS, Level, Moments, Page, Phase, Random, child_main, examine_twice, journal_files,
    number, spawn, wait_for_moment,
};

const DISK_MIB: u64 = 64;

/// A disk, or `None` where there can't be one and need not be.
fn disk(name: &str, mib: u64) -> Result<Option<Disk>, Failed> {
    match Disk::create(name, mib) {
        Ok(disk) => Ok(Some(disk)),
        Err(reason) if std::env::var_os("TOLLGATE_REQUIRE_ROOT").is_none() => {
            eprintln!("skipped, without a file system of its own: {reason}");
            Ok(None)
        }
        Err(reason) => Err(reason.into()),
    }
}

fn cut_many(cuts: u64, first_seed: u64) -> Result<(), Failed> {
    let Some(mut disk) = disk("cuts", DISK_MIB)? else { return Ok(()) };
    let page = Page::open(&disk.beside("page"));
    page.forget();
    let mut random = Random(first_seed);
    let mut moments = Moments::default();
    let mut files = 0;
    // What the next child finds has lost its power, unless somebody has looked at it since.
    let mut since = Level::Process;
    while !moments.suffice(cuts, &page.events(&EVENTS))? {
        let cut = moments.deaths;
        let context = |what| format!("cut {cut}, first seed {first_seed}: {what}");
        cut_once(since, &mut disk, &page, &mut random, &mut moments).map_err(context)?;
        if random.below(3) == 0 {
            // The next child recovers it, and loses its power in doing so as well.
            since = Level::Power;
            continue;
        }
        since = Level::Process;
        examine_twice(&disk.data(), &page, Level::Power, random.next()).map_err(context)?;
        if random.below(20) == 0 {
            // A window passes while nobody is there.
            page.tick();
        }
        if random.below(30) == 0 {
            files += journal_files(&disk.data());
            disk.make_anew().map_err(context)?;
            page.forget();
        }
    }
    files += journal_files(&disk.data());
    eprintln!(
        "{} cuts: {moments}; {} operations acknowledged, {} of them durable, {} denied, {} \
         changes of limits, {} windows passed, {files} journal files; {} recoveries, in which {} \
         units had to be found; {} requests asked again in the next life and answered as before; \
         found: {} batches torn, {} rings with a gap, {} that had gone on past what the journal had, \
         {} other things; 0 violations",
        moments.deaths,
        page.counted(Count::Acknowledged),
        page.counted(Count::AcknowledgedSynced),
        page.counted(Count::Denied),
        page.counted(Count::Changes),
        page.counted(Count::Windows),
        page.counted(Count::Recoveries),
        page.counted(Count::Promised),
        page.counted(Count::AskedAgain),
        page.counted(Count::TornBatches),
        page.counted(Count::Gaps),
        page.counted(Count::Laps),
        page.counted(Count::OtherFindings),
    );
    Ok(())
}

fn cut_once(
    since: Level,
    disk: &mut Disk,
    page: &Page,
    random: &mut Random,
    moments: &mut Moments,
) -> Result<(), String> {
    page.enter(Phase::Starting);
    page.set_cut(false);
    let started = spawn(since, &disk.data(), &disk.beside("page"), random.next());
    let mut child = started.map_err(|error| format!("no child: {error}"))?;
    let mut others = Random(random.next());
    let writes_back = random.below(2) == 0;
    wait_for_moment(&mut child, page, random, || match others.below(8) {
        0 if writes_back => disk.write_back_something(&mut others),
        1 if writes_back => disk.sync_rings(),
        _ => {}
    })?;
    moments.note(page);
    let kind = match random.below(6) {
        0 => Cut::AfterSync,
        1 | 2 => Cut::AfterLog,
        _ => Cut::AtOnce,
    };
    if writes_back {
        disk.write_back_rings(|_| others.below(2) == 0);
    }
    let is_early = child.try_wait().map_err(|error| format!("no child: {error}"))?.is_some();
    page.set_cut(true);
    let cut = disk.cut(kind);
    child.kill().map_err(|error| format!("no kill: {error}"))?;
    let status = child.wait().map_err(|error| format!("no end: {error}"))?;
    cut?;
    // A file system without power answers a store to a mapped file with SIGBUS; a machine would
    // not have come so far.
    let is_expected = [Signal::KILL, Signal::BUS].map(Signal::as_raw).map(Some);
    if is_early || !is_expected.contains(&status.signal()) {
        return Err(format!("the child ended by itself: {status}"));
    }
    disk.restart()
}

fn main() -> ExitCode {
    if let Some(exit) = child_main().or_else(full::child_main).or_else(rings::child_main) {
        return exit;
    }
    let cuts = Trial::test("loss_of_power_takes_nothing_that_was_synced", || {
        cut_many(number("TOLLGATE_CUTS", 50), number("TOLLGATE_SEED", 1))
    });
    let trials = vec![
        cuts,
        Trial::test("a_ring_of_which_a_part_is_left_is_said_and_refused_by_nobody", || {
            rings::in_part(number("TOLLGATE_SEED", 1))
        }),
        Trial::test("a_close_without_power_does_not_say_that_all_is_durable", || {
            rings::closed_without_power(number("TOLLGATE_SEED", 1))
        }),
        Trial::test("a_disk_that_fills_up_is_said_and_nothing_is_lost", || {
            full::while_counting(number("TOLLGATE_SEED", 1))
        }),
        Trial::test("a_disk_that_is_full_at_open_is_said_and_nothing_is_lost", || {
            full::at_open(number("TOLLGATE_SEED", 1))
        }),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
