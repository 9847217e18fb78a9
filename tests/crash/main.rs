//! Kills a process that counts, at random instants, and looks at what is recovered.
//!
//! Proves I1 and I2 for the death of the process: for each counter, window and limit, what was
//! acknowledged is there, nothing that was not issued is, no limit is passed, and a second recovery
//! finds the same. The child uses every operation of the public API.
//!
//! `TOLLGATE_KILLS` sets the number of kills (default 200), `TOLLGATE_SEED` the first seed.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stderr,
    clippy::cast_possible_truncation,
    reason = "a test ends where something is not as expected"
)]

#[path = "../lives/mod.rs"]
#[allow(dead_code, reason = "loss of power needs more of it")]
mod lives;

use std::path::Path;
use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};

use lives::{
    Count, EVENTS, Level, Moments, Page, Phase, Random, child_main, examine_twice, journal_files,
    number, spawn, wait_for_moment,
};

fn kill_many(kills: u64, first_seed: u64) -> Result<(), Failed> {
    let root = tempfile::tempdir()?;
    let (dir, page_path) = (root.path().join("data"), root.path().join("page"));
    let page = Page::open(&page_path);
    page.forget();
    let mut random = Random(first_seed);
    let mut moments = Moments::default();
    let mut files = 0;
    while !moments.suffice(kills, &page.events(&EVENTS))? {
        let kill = moments.deaths;
        let context = |what| format!("kill {kill}, first seed {first_seed}: {what}");
        kill_once(&dir, &page_path, &page, &mut random, &mut moments).map_err(context)?;
        if random.below(4) == 0 {
            // The next child recovers it, and is killed in doing so as well.
            continue;
        }
        examine_twice(&dir, &page, Level::Process, random.next()).map_err(context)?;
        if random.below(20) == 0 {
            // A window passes while nobody is there.
            page.tick();
        }
        if random.below(40) == 0 {
            // Anew, so that creation is killed as well, and usage stays below the limit now and
            // then.
            files += journal_files(&dir);
            std::fs::remove_dir_all(&dir)?;
            page.forget();
        }
    }
    files += journal_files(&dir);
    eprintln!(
        "{} kills: {moments}; {} operations acknowledged, {} denied, {} changes of limits, {} \
         windows passed, {files} journal files; {} recoveries, in which {} units had to be found; \
         {} requests asked again in the next life and answered as before; 0 violations",
        moments.deaths,
        page.counted(Count::Acknowledged),
        page.counted(Count::Denied),
        page.counted(Count::Changes),
        page.counted(Count::Windows),
        page.counted(Count::Recoveries),
        page.counted(Count::Promised),
        page.counted(Count::AskedAgain),
    );
    Ok(())
}

fn kill_once(
    dir: &Path,
    page_path: &Path,
    page: &Page,
    random: &mut Random,
    moments: &mut Moments,
) -> Result<(), String> {
    page.enter(Phase::Starting);
    let started = spawn(Level::Process, dir, page_path, random.next());
    let mut child = started.map_err(|error| format!("no child: {error}"))?;
    wait_for_moment(&mut child, page, random, || {})?;
    moments.note(page);
    child.kill().map_err(|error| format!("no kill: {error}"))?;
    let status = child.wait().map_err(|error| format!("no end: {error}"))?;
    match status.code() {
        Some(_) => Err(format!("the child ended by itself: {status}")),
        None => Ok(()),
    }
}

fn main() -> ExitCode {
    if let Some(exit) = child_main() {
        return exit;
    }
    let trial = Trial::test("a_killed_process_loses_nothing_and_counts_nothing_twice", || {
        kill_many(number("TOLLGATE_KILLS", 200), number("TOLLGATE_SEED", 1))
    });
    libtest_mimic::run(&Arguments::from_args(), vec![trial]).exit_code()
}
