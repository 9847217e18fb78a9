//! Rings of which a loss of power leaves a part, as a kernel may that writes back single pages
//! unasked: what is missing is said, and refused by nobody, for it was not promised. And a close
//! that finds the power gone.

use std::path::Path;
use std::process::{Child, ExitCode};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use libtest_mimic::Failed;
use tollgate::{Config, Tollgate};

use crate::disk::{Cut, Disk};
use crate::full::wait_until;
use crate::lives::{
    Count, Level, Open, Page, Tally, UNLIMITED, VIOLATION, child_arguments, clock_of,
    examine_twice, quotas, spawn_as, split,
};

const DISK_MIB: u64 = 64;
/// Signals between parent and child: the ring is there; it counts as written; it is used.
const MADE: u64 = 1;
const WRITTEN: u64 = 2;
const USED: u64 = 3;
/// The power is gone; what a close then said.
const GONE: u64 = 4;
const CLOSED: u64 = 5;
const REFUSED: u64 = 6;
/// A drain at an unlucky moment sends the lane back to the first page.
const ATTEMPTS: u32 = 20;
/// More than a page of the ring holds.
const RECORDS: u64 = 200;

/// A ring, which page of it is written back, and what an open must then find.
struct Case {
    lane_records: u64,
    page: u64,
    found: Count,
}

const CASES: [Case; 2] = [
    // The second page of slots without the first.
    Case { lane_records: 512, page: 2, found: Count::Gaps },
    // The only one, after it went round, while the journal was not synced.
    Case { lane_records: 64, page: 1, found: Count::Laps },
];

pub(crate) fn child_main() -> Option<ExitCode> {
    let (flag, _, dir, page, lane_records) = child_arguments()?;
    if flag != "--child-of-rings" {
        return None;
    }
    let found = count(&dir, &page, lane_records).err();
    eprintln!("{}", found.map_or_else(String::new, |error| error.to_string()));
    Some(ExitCode::from(VIOLATION))
}

fn count(dir: &Path, page: &Page, lane_records: u64) -> tollgate::Result<()> {
    let hardly_ever = Duration::from_secs(60);
    let config = Config::default()
        .lanes(1)
        .lane_records(lane_records)
        .sync_interval(hardly_ever)
        .drain_interval(Duration::from_secs(1))
        .backpressure_deadline(hardly_ever)
        .clock(Arc::new(clock_of(page)));
    let gate = Tollgate::open(dir, config)?;
    let id = quotas(&gate)?[UNLIMITED];
    let user = split(UNLIMITED).0;
    page.signal().store(MADE, Ordering::SeqCst);
    wait_for(page, WRITTEN);
    for _ in 0..RECORDS {
        page.issue(UNLIMITED, Open::Add, 0, 1);
        let _ = gate.consume(user, id, 1)?;
        page.add(UNLIMITED, 0, Tally::Added, 0, 1);
        page.withdraw(UNLIMITED, Open::Add, 0, 1);
    }
    page.signal().store(USED, Ordering::SeqCst);
    wait_for(page, GONE);
    let said = if gate.close().is_ok() { CLOSED } else { REFUSED };
    page.signal().store(said, Ordering::SeqCst);
    loop {
        std::thread::sleep(hardly_ever);
    }
}

fn wait_for(page: &Page, signal: u64) {
    while page.signal().load(Ordering::SeqCst) != signal {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// I1, I2, R19: after a loss of power what verifies in a ring is counted, once, and the rest is
/// reported; nothing is refused.
pub(crate) fn in_part(seed: u64) -> Result<(), Failed> {
    let Some(mut disk) = crate::disk("rings", DISK_MIB)? else { return Ok(()) };
    let page = Page::open(&disk.beside("page"));
    for case in CASES {
        let mut attempts = 0..ATTEMPTS;
        while page.counted(case.found) == 0 {
            attempts.next().ok_or_else(|| format!("{:?} were never found", case.found))?;
            cut_once(&mut disk, &page, &case, seed)?;
        }
    }
    Ok(())
}

fn cut_once(disk: &mut Disk, page: &Page, case: &Case, seed: u64) -> Result<(), Failed> {
    let mut child = start(disk, page, case.lane_records)?;
    let written = write_back(disk, page, &mut child, case.page);
    let cut = disk.cut(Cut::AtOnce);
    child.kill()?;
    child.wait()?;
    written.and(cut).and_then(|()| disk.restart())?;
    Ok(examine_twice(&disk.data(), page, Level::Power, seed)?)
}

fn start(disk: &mut Disk, page: &Page, lane_records: u64) -> Result<Child, Failed> {
    disk.make_anew()?;
    page.forget();
    page.signal().store(0, Ordering::SeqCst);
    let kind = ["--child-of-rings", "counts"];
    Ok(spawn_as(kind, &disk.data(), &disk.beside("page"), lane_records)?)
}

/// I1: a close that can't make durable what was counted does not say that it has.
pub(crate) fn closed_without_power(seed: u64) -> Result<(), Failed> {
    let Some(mut disk) = crate::disk("closed", DISK_MIB)? else { return Ok(()) };
    let page = Page::open(&disk.beside("page"));
    let mut child = start(&mut disk, &page, 512)?;
    let signal = || page.signal().load(Ordering::SeqCst);
    let said = write_back(&disk, &page, &mut child, 0)
        .and_then(|()| disk.cut(Cut::AtOnce))
        .and_then(|()| {
            page.signal().store(GONE, Ordering::SeqCst);
            wait_until(&mut child, "it closes", || Ok(signal() > GONE))
        });
    child.kill()?;
    child.wait()?;
    said?;
    if signal() != REFUSED {
        return Err("a close without power says that all is durable".into());
    }
    disk.restart()?;
    Ok(examine_twice(&disk.data(), &page, Level::Power, seed)?)
}

fn write_back(disk: &Disk, page: &Page, child: &mut Child, number: u64) -> Result<(), String> {
    let has_come_to = |signal| page.signal().load(Ordering::SeqCst) == signal;
    wait_until(child, "the ring is there", || Ok(has_come_to(MADE)))?;
    // What is written back from now on needs no change of the file system's log.
    disk.sync_rings();
    page.signal().store(WRITTEN, Ordering::SeqCst);
    wait_until(child, "the ring is used", || Ok(has_come_to(USED)))?;
    disk.write_back_rings(|page| page == number);
    Ok(())
}
