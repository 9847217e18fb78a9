//! The whole engine on a simulated disk, ended at every single call that it makes.
//!
//! Proves I1 and I2 for both deaths: after the process's, everything acknowledged is there; after a
//! loss of power, everything that a `_sync` call or `sync` covered; and never more than was asked
//! for, nor anything twice in place of something lost. Fails when a directory or file sync, or the
//! order of two writes, is left out.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::flushers::Step;
use super::*;
use crate::clock::ManualClock;
use crate::model::{Quota, Timestamp, Window};
use crate::storage::sim::{Call, Fault, Outcome, SimDisk};
use crate::wal::lanes::prefer;

/// What was asked for, acknowledged, and made durable, per user: each operation with an amount of
/// its own, see [`amount`].
#[derive(Debug, Default, Clone)]
struct Ledger {
    issued: BTreeMap<u64, u64>,
    acknowledged: BTreeMap<u64, u64>,
    durable: BTreeMap<u64, u64>,
}

/// Far apart, with large amounts, so that batches are longer than a sector.
const USERS: u64 = 48;

/// What the next operation of a user adds: a digit of its own, to base 4, in what is used. It is 0
/// or 1: what was lost, or is there once.
fn amount(issued: u64) -> u64 {
    if issued == 0 { 1 << 24 } else { 1 << (issued.ilog2() + 2) }
}

/// The digits above 1.
const TWICE: u64 = 0xaaaa_aaaa_aaaa_aaaa;

fn user(index: u64) -> u64 {
    index << 50
}

fn used(owner: &Owner) -> Vec<u64> {
    let quota = owner.engine.define(&Quota::new("requests", 1 << 40)).unwrap();
    let counted = |index| owner.engine.counted(user(index), quota).unwrap();
    (0..USERS).map(|index| owner.engine.usage(&counted(index)).used).collect()
}

fn small() -> Config {
    Config::default()
        .lanes(2)
        .lane_records(64)
        .shards(2)
        .journal_file_bytes(64 << 10)
        .sync_interval(Duration::from_secs(60))
        .backpressure_deadline(Duration::from_millis(20))
}

/// Runs until the disk ends, or the work does. The first process closes, the second is killed when
/// its last syncs have no mark in the journal yet, the third recovers and goes on: so that recovery
/// is ended too, of both kinds.
fn work(disk: &Arc<SimDisk>, ledger: &mut Ledger) -> Result<()> {
    work_while(disk, ledger, &|| ())
}

/// The same, with something that happens to the disk after every operation.
fn work_while(disk: &Arc<SimDisk>, ledger: &mut Ledger, happens: &dyn Fn()) -> Result<()> {
    let alive = || if disk.has_crashed() { Err(Error::Closed) } else { Ok(()) };
    for round in 0..3 {
        let storage = disk.storage();
        let owner = Owner::open_at_rest(&storage, small())?;
        let quota = owner.engine.define(&Quota::new("requests", 1 << 40))?;
        for step in 0..30 {
            let is_sync = step % 7 == 3;
            for part in 0..4 {
                let index = (step * 4 + part) % USERS;
                let counted = owner.engine.counted(user(index), quota)?;
                prefer((part % 2) as usize);
                let issued = ledger.issued.entry(index).or_default();
                let amount = amount(*issued);
                *issued += amount;
                owner.engine.consume(&counted, amount, is_sync && part == 3)?;
                // What returned after the disk's end was never returned to anybody.
                alive()?;
                happens();
                *ledger.acknowledged.entry(index).or_default() += amount;
            }
            let covers_all = match step {
                8 => owner.engine.step(Step::Drain).map(|()| false),
                14 => owner.engine.step(Step::Files).map(|()| false),
                20 => owner.engine.sync().map(|()| true),
                15 if round < 2 => owner.engine.snapshot().map(|()| true),
                _ => Ok(is_sync),
            }?;
            alive()?;
            if covers_all {
                ledger.durable = ledger.acknowledged.clone();
            }
        }
        if round == 1 {
            disk.kill();
            continue;
        }
        owner.close()?;
        alive()?;
        ledger.durable = ledger.acknowledged.clone();
    }
    Ok(())
}

/// Recovers twice and compares with the ledger.
fn examine(disk: &Arc<SimDisk>, least: &BTreeMap<u64, u64>, ledger: &Ledger, context: &str) {
    disk.clear_faults();
    let mut found = Vec::new();
    for _ in 0..2 {
        let storage = disk.storage();
        let owner = Owner::open_at_rest(&storage, small())
            .unwrap_or_else(|error| panic!("{context}: refused: {error}"));
        found.push(used(&owner));
        let report = owner.engine.report();
        // The rings are as they were: nothing is missed in them.
        let in_ring =
            report.findings.iter().any(|finding| finding.path.extension() == Some("tgr".as_ref()));
        assert!(report.machine_restarted || !in_ring, "{context}: {report:?}");
        owner.close().unwrap();
    }
    assert_eq!(found[0], found[1], "{context}: a second recovery differs");
    for (user, &used) in (0..).zip(&found[0]) {
        let least = least.get(&user).copied().unwrap_or(0);
        let most = ledger.issued.get(&user).copied().unwrap_or(0);
        let (missing, invented, twice) = (least & !used, used & !most, used & TWICE);
        assert!(
            missing | invented | twice == 0,
            "{context}: user number {user} has {used:#x}, should have {least:#x}..={most:#x}"
        );
    }
}

/// Up to so many outcomes of a loss of power are looked at one by one; of more, some.
const OUTCOMES: usize = 500;

#[test]
fn an_end_at_any_call_loses_nothing_that_was_promised() {
    let calls = {
        let disk = SimDisk::new(0);
        work(&disk, &mut Ledger::default()).unwrap();
        disk.calls()
    };
    assert!(calls > 150, "{calls} calls");
    let (mut complete, mut cuts) = (0, 0);
    for nth in 0..=calls {
        let disk = SimDisk::new(nth);
        let mut ledger = Ledger::default();
        disk.crash_at(nth);
        let ended = work(&disk, &mut ledger);
        assert_eq!(ended.is_ok(), nth == calls, "{ended:?}");
        disk.kill();
        let image = disk.snapshot_image();
        let context = format!("ended at call {nth}");
        let killed = SimDisk::from_image(&image, nth);
        examine(&killed, &ledger.acknowledged, &ledger, &format!("{context}, process killed"));
        let outcomes: Vec<_> = disk.outcomes().take(OUTCOMES + 1).collect();
        if outcomes.len() <= OUTCOMES {
            complete += 1;
        }
        let some = (0..12).map(|seed| {
            let cut = SimDisk::from_image(&image, nth * 100 + seed);
            cut.power_cut();
            cut
        });
        for (outcome, cut) in outcomes.into_iter().chain(some).enumerate() {
            let context = format!("{context}, outcome {outcome} of a power cut");
            examine(&cut, &ledger.durable, &ledger, &context);
            cuts += 1;
        }
    }
    assert!(complete > calls / 2, "all outcomes of {complete} ends only");
    assert!(cuts > 4_000, "{cuts} power cuts");
}

/// A process that is killed in a write may have got through a part of it, while the rings still
/// hold all that it was about. Or power is lost then, and the rings' pages were written back while
/// records were stored to them: of one a part is there, and it is not taken for whole.
#[test]
fn an_end_within_any_write_loses_nothing_that_was_promised() {
    let mut writes = 0;
    for parts in [32, 128, 250] {
        for nth in 0.. {
            let disk = SimDisk::new(nth);
            let mut ledger = Ledger::default();
            disk.inject(Fault::new(Call::Write, nth, Outcome::CrashWithin(parts)));
            if work_while(&disk, &mut ledger, &|| disk.write_back()).is_ok() {
                break;
            }
            writes += 1;
            disk.kill();
            let image = disk.snapshot_image();
            let context = format!("ended in write {nth} after {parts}/256");
            let killed = SimDisk::from_image(&image, nth);
            examine(&killed, &ledger.acknowledged, &ledger, &format!("{context}, killed"));
            for seed in 0..8 {
                let cut = SimDisk::from_image(&image, nth * 100 + seed);
                cut.power_cut();
                examine(&cut, &ledger.durable, &ledger, &format!("{context}, power cut {seed}"));
            }
        }
    }
    assert!(writes > 100, "{writes} writes");
}

/// A window passes, and a merge forgets what was counted in it, while a refund in it has not come
/// further than a ring. Found by `tests/crash`: recovery took the refund for one whose consume was
/// lost, and wrote a correction, which a sink would have counted.
#[test]
fn a_refund_in_a_window_that_a_merge_has_forgotten_needs_no_correction() {
    let disk = SimDisk::new(1);
    let clock = ManualClock::new(Timestamp::from_unix_millis(60_000_000));
    let config = || small().closed_window_retention(Duration::ZERO).clock(Arc::new(clock.clone()));
    let owner = Owner::open_at_rest(&disk.storage(), config()).unwrap();
    let quota = owner.engine.define(&Quota::new("requests", 100).window(Window::Minute)).unwrap();
    let counted = || owner.engine.counted(user(1), quota).unwrap();
    owner.engine.consume(&counted(), 5, true).unwrap();
    assert_eq!(owner.engine.refund(&counted(), 3).unwrap(), 3);
    clock.advance(Duration::from_secs(60));
    // What is durable: the consume.
    owner.engine.compactor.run(&mut |_| Ok(())).unwrap();
    disk.kill();
    drop(owner);
    let owner = Owner::open_at_rest(&disk.storage(), config()).unwrap();
    let report = owner.engine.report();
    assert_eq!((report.lane_records, report.corrected), (1, 0), "{report:?}");
}

/// A directory as a killed process leaves it: snapshots, a journal, records in the rings.
fn left_behind() -> (Arc<SimDisk>, Vec<u64>) {
    let disk = SimDisk::new(1);
    let mut ledger = Ledger::default();
    work(&disk, &mut ledger).unwrap();
    let storage = disk.storage();
    let owner = Owner::open_on(&storage, small()).unwrap();
    let quota = owner.engine.define(&Quota::new("requests", 1 << 40)).unwrap();
    owner.engine.snapshot().unwrap();
    let mut used = Vec::new();
    for index in 0..USERS {
        let counted = owner.engine.counted(user(index), quota).unwrap();
        owner.engine.consume(&counted, 7, index == 3).unwrap();
        used.push(owner.engine.consume(&counted, 5, false).unwrap().used);
    }
    disk.kill();
    (disk, used)
}

/// Opens what damage has made of the directory: the exact state, or less with a finding that says
/// so, or a refusal that names what is wrong. Never more, never a panic.
fn open_damaged(disk: &Arc<SimDisk>, exact: &[u64], context: &str) -> bool {
    let storage = disk.storage();
    let owner = match Owner::open_on(&storage, small()) {
        Ok(owner) => owner,
        Err(Error::Damaged { .. } | Error::UnsupportedVersion { .. }) => return false,
        Err(error) => panic!("{context}: {error}"),
    };
    let used = used(&owner);
    let findings = &owner.engine.report().findings;
    let is_less = used.iter().zip(exact).all(|(used, exact)| used <= exact);
    assert!(
        used == exact || is_less && !findings.is_empty(),
        "{context}: {used:?} instead of {exact:?}, {findings:?}"
    );
    true
}

/// I5: a flipped bit anywhere in what is not zero, and here and there in what is.
#[test]
fn a_flipped_bit_anywhere_is_exact_or_reported_or_refused() {
    let (disk, exact) = left_behind();
    let image = disk.snapshot_image();
    let (mut opened, mut refused) = (0, 0);
    for name in disk.file_names() {
        let bytes = disk.file(&name).unwrap();
        for (offset, &byte) in bytes.iter().enumerate() {
            if byte == 0 && !offset.is_multiple_of(509) {
                continue;
            }
            let damaged = SimDisk::from_image(&image, 2);
            damaged.corrupt(&name, offset as u64, 1 << (offset % 8)).unwrap();
            let context = format!("{name} at {offset}");
            *(if open_damaged(&damaged, &exact, &context) { &mut opened } else { &mut refused }) +=
                1;
        }
    }
    assert!(opened > 100 && refused > 100, "{opened} opened, {refused} refused");
}

/// I5: a file that is gone, cut short, or in the place of another.
#[test]
fn a_missing_cut_or_swapped_file_is_exact_or_reported_or_refused() {
    let (disk, exact) = left_behind();
    let image = disk.snapshot_image();
    let names = disk.file_names();
    for name in &names {
        let damaged = SimDisk::from_image(&image, 3);
        assert!(damaged.delete(name));
        open_damaged(&damaged, &exact, &format!("{name} deleted"));
        let bytes = disk.file(name).unwrap();
        for len in [0, 1, 47, 63, 64, 511, 512, bytes.len() / 2, bytes.len() - 1] {
            let damaged = SimDisk::from_image(&image, 4);
            damaged.put(name, &bytes[..len.min(bytes.len() - 1)]);
            open_damaged(&damaged, &exact, &format!("{name} cut to {len}"));
        }
        for other in &names {
            let damaged = SimDisk::from_image(&image, 5);
            damaged.put(name, &disk.file(other).unwrap());
            damaged.put(other, &bytes);
            open_damaged(&damaged, &exact, &format!("{name} and {other} swapped"));
        }
    }
}
