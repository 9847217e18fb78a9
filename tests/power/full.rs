//! A small disk that something else fills up, while a process counts and while it opens. The engine
//! runs in a child, so that a store that the disk refuses (SIGBUS) is seen as what it is.

use std::path::Path;
use std::process::{Child, ExitCode};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use libtest_mimic::Failed;
use tollgate::{Config, Error, HealthLevel, HealthReason, QuotaId, Tollgate};

use crate::disk::Disk;
use crate::lives::{
    Count, Level, Open, Page, QUOTAS, Random, THREADS, Tally, UNLIMITED, USERS, VIOLATION,
    child_arguments, clock_of, examine_twice, open, quotas, spawn_as, split,
};

const DISK_MIB: u64 = 24;
/// More than an open faults in, so that stores to blocks that nobody has touched meet a full disk.
const LANE_RECORDS: u64 = 1 << 17;
const ROUNDS: u64 = 4;
/// Signals: what health says.
const BLOCKED: u64 = 1;
const WELL: u64 = 2;
/// An exit code: the disk is full.
const FULL: u8 = 4;
/// Only a hang takes so long: a minute.
const LOOKS_MAX: u32 = 12_000;

pub(crate) fn child_main() -> Option<ExitCode> {
    let (flag, kind, dir, page, seed) = child_arguments()?;
    let result = match (&*flag, &*kind) {
        ("--child-of-disk", "counts") => count(&dir, &page),
        ("--child-of-disk", "opens") => return Some(try_open(&dir, &page, seed)),
        _ => return None,
    };
    eprintln!("{}", result.err().unwrap_or_default());
    Some(ExitCode::from(VIOLATION))
}

/// Counts until it is killed, whatever the disk says, and says what health says.
fn count(dir: &Path, page: &Page) -> Result<(), String> {
    let config = Config::default()
        .lanes(2)
        .lane_records(LANE_RECORDS)
        .journal_file_bytes(64 << 10)
        .snapshot_journal_bytes(64 << 10)
        .sync_interval(Duration::from_millis(5))
        .backpressure_deadline(Duration::from_millis(20))
        .clock(Arc::new(clock_of(page)));
    let gate = Tollgate::open(dir, config).map_err(|error| format!("open: {error}"))?;
    let ids = quotas(&gate).map_err(|error| format!("define: {error}"))?;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let gate = &gate;
                scope.spawn(move || work(gate, page, thread, ids[UNLIMITED]))
            })
            .collect();
        while !threads.iter().any(|thread| thread.is_finished()) {
            let health = gate.health();
            let is_blocked = |reason: &_| matches!(reason, HealthReason::JournalBlocked { .. });
            if health.level() == HealthLevel::Failed {
                // The threads never end by themselves.
                eprintln!("a full disk is no reason to fail: {health:?}");
                std::process::exit(VIOLATION.into());
            }
            let signal = match () {
                () if health.reasons.iter().any(is_blocked) => BLOCKED,
                () if health.is_healthy() => WELL,
                () => 0,
            };
            page.signal().store(signal, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(2));
        }
        eprintln!("a thread ended");
        std::process::exit(VIOLATION.into());
    })
}

fn work(gate: &Tollgate, page: &Page, thread: usize, id: QuotaId) {
    let mut random = Random(thread as u64);
    loop {
        let counter = random.below(USERS as u64) as usize * QUOTAS + UNLIMITED;
        let is_synced = random.below(200) == 0;
        match consume(gate, page, thread, counter, id, is_synced) {
            Ok(()) => {}
            Err(Error::Backpressure { .. }) => page.count(Count::Refused, 1),
            Err(error) if is_synced && error.is_disk_full() => {}
            Err(error) => {
                eprintln!("{error}");
                return;
            }
        }
    }
}

/// One unit, written down.
fn consume(
    gate: &Tollgate,
    page: &Page,
    thread: usize,
    counter: usize,
    id: QuotaId,
    is_synced: bool,
) -> tollgate::Result<()> {
    let user = split(counter).0;
    page.issue(counter, Open::Add, thread, 1);
    let result = match is_synced {
        true => gate.consume_sync(user, id, 1),
        false => gate.consume(user, id, 1),
    };
    match &result {
        Ok(_) => page.count(Count::Acknowledged, 1),
        // It is counted all the same, and survives the process.
        Err(error) if error.is_disk_full() => {}
        // Whoever is refused has counted nothing.
        Err(_) => {
            page.withdraw(counter, Open::Add, thread, 1);
            return result.map(|_| ());
        }
    }
    page.add(counter, 0, Tally::Added, thread, 1);
    page.withdraw(counter, Open::Add, thread, 1);
    result.map(|_| ())
}

/// Waits until the child has come to `condition`.
pub(crate) fn wait_until(
    child: &mut Child,
    what: &str,
    mut condition: impl FnMut() -> Result<bool, String>,
) -> Result<(), String> {
    for _ in 0..LOOKS_MAX {
        if let Some(status) = child.try_wait().map_err(|error| format!("no child: {error}"))? {
            return Err(format!("while waiting until {what}, the child ended: {status}"));
        }
        if condition()? {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Err(format!("it never happened that {what}"))
}

/// I6: when the disk is full health says so and callers are told; when there is space again all
/// goes on by itself; nothing that was acknowledged is lost by a kill, then or later.
pub(crate) fn while_counting(seed: u64) -> Result<(), Failed> {
    let Some(mut disk) = crate::disk("filled", DISK_MIB)? else { return Ok(()) };
    let page = Page::open(&disk.beside("page"));
    page.forget();
    let mut random = Random(seed);
    for round in 0..ROUNDS {
        let context = |what| format!("round {round}: {what}");
        fill_once(&mut disk, &page, &mut random).map_err(context)?;
        examine_twice(&disk.data(), &page, Level::Process, random.next()).map_err(context)?;
    }
    eprintln!(
        "{ROUNDS} times full; {} operations acknowledged, {} refused; in {} recoveries {} units \
         had to be found; 0 violations",
        page.counted(Count::Acknowledged),
        page.counted(Count::Refused),
        page.counted(Count::Recoveries),
        page.counted(Count::Promised),
    );
    Ok(())
}

fn fill_once(disk: &mut Disk, page: &Page, random: &mut Random) -> Result<(), String> {
    page.signal().store(0, Ordering::SeqCst);
    let kind = ["--child-of-disk", "counts"];
    let mut child = spawn_as(kind, &disk.data(), &disk.beside("page"), random.next())
        .map_err(|error| format!("no child: {error}"))?;
    let result = fill_and_free(disk, page, &mut child);
    // Every other time it dies while the disk is full.
    let result = match random.below(2) {
        0 => result.and_then(|()| disk.fill(0)),
        _ => result,
    };
    child.kill().map_err(|error| format!("no kill: {error}"))?;
    child.wait().map_err(|error| format!("no end: {error}"))?;
    let _ = disk.free();
    result
}

fn fill_and_free(disk: &Disk, page: &Page, child: &mut Child) -> Result<(), String> {
    let acknowledged = || page.counted(Count::Acknowledged);
    let signal = || page.signal().load(Ordering::SeqCst);
    let before = acknowledged();
    wait_until(child, "it counts", || Ok(acknowledged() > before + 1_000))?;
    let refused = page.counted(Count::Refused);
    disk.fill(0)?;
    wait_until(child, "health says that the disk is full, and callers are told", || {
        // What the merge gives back is taken too.
        disk.fill(0)?;
        Ok(signal() == BLOCKED && page.counted(Count::Refused) > refused)
    })?;
    disk.free()?;
    let before = acknowledged();
    wait_until(child, "it counts again, and health is well", || {
        Ok(signal() == WELL && acknowledged() > before + 1_000)
    })
}

/// Opens and counts a little, as a child: whether the disk has room for it.
fn try_open(dir: &Path, page: &Page, seed: u64) -> ExitCode {
    let count_a_little = || -> tollgate::Result<()> {
        let gate = open(dir, page, seed)?.gate;
        let id = quotas(&gate)?[UNLIMITED];
        // As many as the smallest ring holds without the journal.
        for _ in 0..48 {
            consume(&gate, page, 0, UNLIMITED, id, false)?;
        }
        gate.close()
    };
    match count_a_little() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is_disk_full() => ExitCode::from(FULL),
        // What a definition that finds no room is.
        Err(Error::OutcomeUnknown { .. }) => ExitCode::from(FULL),
        Err(error) => {
            eprintln!("not that the disk is full: {error}");
            ExitCode::from(VIOLATION)
        }
    }
}

/// An open for which there is not enough space, at every step, says so and spoils nothing: neither
/// a new directory nor one that a killed process has left.
pub(crate) fn at_open(seed: u64) -> Result<(), Failed> {
    let Some(mut disk) = crate::disk("full", DISK_MIB)? else { return Ok(()) };
    let page = Page::open(&disk.beside("page"));
    page.forget();
    let mut random = Random(seed);
    let (mut refused, mut opened) = (0, 0);
    for round in 0..60 {
        let context = |what| format!("round {round}: {what}");
        let is_new = round % 3 == 0;
        if is_new {
            disk.make_anew().map_err(context)?;
            page.forget();
        } else {
            leave_rings(&disk, &page, &mut random).map_err(context)?;
        }
        // From nothing to what an open takes at most.
        let leave = [0, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 512, 768]
            [random.below(18) as usize];
        disk.fill(leave << 10).map_err(context)?;
        let kind = ["--child-of-disk", "opens"];
        let mut child = spawn_as(kind, &disk.data(), &disk.beside("page"), random.next())?;
        let status = child.wait()?;
        match status.code() {
            Some(0) => opened += 1,
            Some(code) if code == i32::from(FULL) => refused += 1,
            _ => return Err(context(format!("with {leave} KiB left, {status}")).into()),
        }
        disk.free().map_err(context)?;
        examine_twice(&disk.data(), &page, Level::Process, random.next()).map_err(context)?;
    }
    if refused == 0 || opened == 0 {
        return Err(format!("{refused} refused, {opened} opened: both were to be seen").into());
    }
    eprintln!("{refused} opens found too little space, {opened} enough; 0 violations");
    Ok(())
}

/// Leaves a directory as a killed process does, with records in the rings.
fn leave_rings(disk: &Disk, page: &Page, random: &mut Random) -> Result<(), String> {
    let kind = ["--child-of-disk", "counts"];
    let mut child = spawn_as(kind, &disk.data(), &disk.beside("page"), random.next())
        .map_err(|error| format!("no child: {error}"))?;
    let before = page.counted(Count::Acknowledged);
    let counts =
        wait_until(
            &mut child,
            "it counts",
            || Ok(page.counted(Count::Acknowledged) > before + 500),
        );
    child.kill().map_err(|error| format!("no kill: {error}"))?;
    child.wait().map_err(|error| format!("no end: {error}"))?;
    counts
}
