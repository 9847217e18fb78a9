//! What an open makes of a directory that normal use, or a disk with bad sectors, has left. On a
//! simulated disk, without threads.

use std::sync::Arc;
use std::sync::mpsc::{TryRecvError, channel};
use std::time::Duration;

use super::flushers::Step;
use super::order_tests::{START, consume, define, open, small, used};
use super::*;
use crate::clock::ManualClock;
use crate::model::{Quota, Timestamp, Window};
use crate::storage::sim::{Call, Fault, Outcome, SimDisk};

/// The map was made as large as all sums of closed windows in the snapshot ask for, which would
/// fill it before a counter was forgotten.
#[test]
fn an_open_makes_room_for_open_windows_only() {
    const USERS: u64 = 100;
    let disk = SimDisk::new(1);
    let clock = ManualClock::new(Timestamp::from_unix_millis(START));
    let config = || small().lane_records(1 << 12).clock(Arc::new(clock.clone()));
    let open = || Owner::open_at_rest(&disk.storage(), config()).unwrap();
    let count = |owner: &Owner, quota, users: std::ops::Range<u64>| {
        clock.advance(Duration::from_secs(1));
        users.for_each(|user| assert_eq!(consume(owner, user, quota, false).unwrap(), 1));
        owner.engine.step(Step::Files).unwrap();
        owner.engine.sync().unwrap();
    };
    let owner = open();
    let per_second = Quota::new("requests", 10).window(Window::Every(Duration::from_secs(1)));
    let quota = owner.engine.define(&per_second).unwrap();
    for _ in 0..100 {
        count(&owner, quota, 0..USERS);
    }
    owner.engine.snapshot().unwrap();
    disk.kill();
    drop(owner);

    let owner = open();
    let table = &owner.engine.table;
    assert_eq!(table.len() as u64, USERS);
    assert!(table.capacity() <= 4 * table.len(), "room for {}", table.capacity());
    // And so it stays, whoever comes.
    for window in 1..=50 {
        count(&owner, quota, window * USERS..(window + 1) * USERS);
    }
    assert!(table.len() as u64 <= 4 * USERS, "{} counters", table.len());
}

fn snapshots(disk: &SimDisk) -> Vec<String> {
    let mut names = disk.file_names();
    names.retain(|name| name.starts_with("snapshot-"));
    names.sort();
    names
}

/// The newest snapshot can't be read when the directory is opened: the one before it and the
/// journal since make up for it, and its file stays, since that may pass.
#[test]
fn a_snapshot_that_can_not_be_read_does_not_end_an_open() {
    let disk = SimDisk::new(1);
    let owner = open(&disk);
    let quota = define(&owner);
    for _ in 0..2 {
        consume(&owner, 1, quota, true).unwrap();
        owner.engine.snapshot().unwrap();
    }
    disk.kill();
    drop(owner);
    let before = snapshots(&disk);
    let newest: &'static str = Box::leak(before[1].clone().into_boxed_str());
    let image = disk.snapshot_image();
    // The header, the manifest, and the blocks.
    let calls = [(Call::Open, 0), (Call::Length, 0), (Call::Read, 0), (Call::Read, 1)];
    for (call, nth) in calls.into_iter().chain([(Call::Read, 2)]) {
        let disk = SimDisk::from_image(&image, 1);
        disk.inject(Fault::new(call, nth, Outcome::Eio).on(newest));
        let owner = open(&disk);
        assert_eq!(used(&owner, 1, quota), 2, "{call:?} {nth}");
        let findings = &owner.engine.report().findings;
        assert!(findings.len() == 1 && findings[0].path.ends_with(newest), "{findings:?}");
        assert_eq!(snapshots(&disk), before, "{call:?} {nth}");
        // Nor does what comes then take it away, or need it.
        consume(&owner, 1, quota, true).unwrap();
        owner.engine.snapshot().unwrap();
        assert!(snapshots(&disk).contains(&before[1]), "{call:?} {nth}");
        disk.kill();
        drop(owner);
        let owner = open(&disk);
        assert_eq!((used(&owner, 1, quota), &owner.engine.report().findings[..]), (3, &[][..]));
    }
}

/// Where nothing makes up for it, that it can't be read is the answer: that may pass. Nothing is
/// changed.
#[test]
fn what_nothing_makes_up_for_is_not_called_damaged() {
    let disk = SimDisk::new(1);
    let owner = open(&disk);
    let quota = define(&owner);
    let user = |number: u64| number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for _ in 0..3 {
        // So much that the journal begins behind the first batch.
        for number in 0..12_000 {
            consume(&owner, user(number), quota, false).unwrap();
            owner.engine.step(Step::Drain).unwrap();
            owner.engine.step(Step::Files).unwrap();
        }
        owner.engine.sync().unwrap();
        owner.engine.snapshot().unwrap();
    }
    disk.kill();
    drop(owner);
    let before = disk.file_names();
    disk.inject(Fault::new(Call::Open, 0, Outcome::Eio).on("snapshot-"));
    disk.inject(Fault::new(Call::Open, 1, Outcome::Eio).on("snapshot-"));
    let refused = Owner::open_at_rest(&disk.storage(), small()).map(drop).unwrap_err();
    assert!(matches!(refused, Error::Io { .. }), "{refused}");
    assert_eq!(disk.file_names(), before);
    assert_eq!(used(&open(&disk), user(1), quota), 3);
}

/// A directory is copied while the engine counts, file by file: a copy that opens has nothing
/// twice. It may lack what was counted last.
#[test]
fn a_copy_of_an_open_directory_counts_nothing_twice() {
    let dir = tempfile::tempdir().unwrap();
    let config = || Config::default().lanes(2).lane_records(1 << 12).journal_file_bytes(64 << 10);
    let gate = crate::Tollgate::open(dir.path(), config()).unwrap();
    let quota = gate.define(Quota::new("requests", 1 << 40)).unwrap();
    let (go_on, is_over) = channel::<()>();
    std::thread::scope(|scope| {
        // Gone at the end, also if this fails.
        let _go_on = go_on;
        let gate = &gate;
        scope.spawn(move || {
            while is_over.try_recv() == Err(TryRecvError::Empty) {
                gate.consume(7, quota, 1).unwrap();
            }
        });
        for _ in 0..20 {
            let copy = tempfile::tempdir().unwrap();
            for entry in std::fs::read_dir(dir.path()).unwrap() {
                let name = entry.unwrap().file_name();
                // One that is gone meanwhile is missing.
                let _ = std::fs::copy(dir.path().join(&name), copy.path().join(&name));
            }
            let after = gate.usage(7, quota).unwrap().used;
            match crate::Tollgate::open(copy.path(), config()) {
                Ok(copied) => {
                    let used = copied.usage(7, quota).map_or(0, |usage| usage.used);
                    assert!(used <= after, "{used} of {after}");
                }
                Err(error) => assert!(matches!(error, Error::Damaged { .. }), "{error}"),
            }
        }
    });
}
