//! The whole engine on a simulated disk, ended at every single call that it makes.
//!
//! Proves I1 and I2 for both deaths: after the process's, everything acknowledged is there; after a
//! loss of power, everything that a `_sync` call or `sync` covered; and never more than was asked
//! for. Fails when a directory or file sync, or the order of two writes, is left out.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::model::Quota;
use crate::storage::sim::SimDisk;

/// What was asked for, acknowledged, and made durable, per user.
#[derive(Debug, Default, Clone)]
struct Ledger {
    issued: BTreeMap<u64, u64>,
    acknowledged: BTreeMap<u64, u64>,
    durable: BTreeMap<u64, u64>,
}

const USERS: u64 = 5;

fn small() -> Config {
    Config::default()
        .lanes(2)
        .lane_records(64)
        .shards(2)
        .journal_file_bytes(64 << 10)
        .sync_interval(Duration::from_secs(60))
        .backpressure_deadline(Duration::from_millis(20))
}

/// Runs until the disk ends, or the work does. Opens twice, so that recovery is ended too.
fn work(disk: &Arc<SimDisk>, ledger: &mut Ledger) -> Result<()> {
    for round in 0..2 {
        let storage = disk.storage();
        let owner = Owner::open_on(&storage, small())?;
        let quota = owner.engine.define(&Quota::new("requests", 1 << 40))?;
        for step in 0..30 {
            let user = step % USERS;
            let counted = owner.engine.counted(user, quota)?;
            let amount = step + 1;
            let is_sync = step % 7 == 3;
            *ledger.issued.entry(user).or_default() += amount;
            owner.engine.consume(&counted, amount, is_sync)?;
            // What returned after the disk's end was never returned to anybody.
            if disk.has_crashed() {
                return Err(Error::Closed);
            }
            *ledger.acknowledged.entry(user).or_default() += amount;
            if is_sync || step == 20 && owner.engine.sync().is_ok() && !disk.has_crashed() {
                ledger.durable = ledger.acknowledged.clone();
            }
            if step == 25 && round == 0 {
                owner.engine.snapshot()?;
                if disk.has_crashed() {
                    return Err(Error::Closed);
                }
                ledger.durable = ledger.acknowledged.clone();
            }
        }
        owner.close()?;
        if disk.has_crashed() {
            return Err(Error::Closed);
        }
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
        let owner = Owner::open_on(&storage, small())
            .unwrap_or_else(|error| panic!("{context}: refused: {error}"));
        let quota = owner.engine.define(&Quota::new("requests", 1 << 40)).unwrap();
        let used: Vec<_> = (0..USERS)
            .map(|user| owner.engine.usage(&owner.engine.counted(user, quota).unwrap()).used)
            .collect();
        found.push(used);
        owner.close().unwrap();
    }
    assert_eq!(found[0], found[1], "{context}: a second recovery differs");
    for (user, &used) in (0..).zip(&found[0]) {
        let least = least.get(&user).copied().unwrap_or(0);
        let most = ledger.issued.get(&user).copied().unwrap_or(0);
        assert!(
            least <= used && used <= most,
            "{context}: user {user} has {used}, should have {least}..={most}"
        );
    }
}

#[test]
fn an_end_at_any_call_loses_nothing_that_was_promised() {
    let calls = {
        let disk = SimDisk::new(0);
        work(&disk, &mut Ledger::default()).unwrap();
        disk.calls()
    };
    assert!(calls > 60, "{calls} calls");
    // The flushers' own calls come at times of their own: a few more than were counted.
    for nth in 0..calls + 10 {
        let disk = SimDisk::new(nth);
        let mut ledger = Ledger::default();
        disk.crash_at(nth);
        let ended = work(&disk, &mut ledger);
        disk.kill();
        let image = disk.snapshot_image();
        let context = format!("ended at call {nth} ({ended:?})");
        let killed = SimDisk::from_image(&image, nth);
        let acknowledged = ledger.acknowledged.clone();
        examine(&killed, &acknowledged, &ledger, &format!("{context}, process killed"));
        for seed in 0..6 {
            let cut = SimDisk::from_image(&image, nth * 100 + seed);
            cut.power_cut();
            let durable = ledger.durable.clone();
            examine(&cut, &durable, &ledger, &format!("{context}, power cut with seed {seed}"));
        }
    }
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
    for user in 0..USERS {
        let counted = owner.engine.counted(user, quota).unwrap();
        owner.engine.consume(&counted, 7, user == 3).unwrap();
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
    let quota = owner.engine.define(&Quota::new("requests", 1 << 40)).unwrap();
    let used: Vec<_> = (0..USERS)
        .map(|user| owner.engine.usage(&owner.engine.counted(user, quota).unwrap()).used)
        .collect();
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
