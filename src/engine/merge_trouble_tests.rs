//! Merges that fail again and again cost little, and take nothing from the callers.

use std::sync::Arc;

use super::flushers::Step;
use super::order_tests::{consume, define, small};
use super::*;
use crate::health::HealthReason;
use crate::storage::sim::{Call, Fault, Outcome, SimDisk};

/// An engine with a few bytes in its journal, far fewer than are due for a merge.
fn with_a_batch(disk: &Arc<SimDisk>) -> (Owner, QuotaId) {
    let owner = Owner::open_at_rest(&disk.storage(), small()).unwrap();
    let quota = define(&owner);
    consume(&owner, 1, quota, true).unwrap();
    (owner, quota)
}

fn snapshots_fail(owner: &Owner) -> bool {
    let reasons = owner.engine.health().reasons;
    reasons.iter().any(|reason| matches!(reason, HealthReason::SnapshotsFail { .. }))
}

/// A merge that gave way to another one, or to a close, counted as one that had gone through:
/// health was good again, on the disk on which merges had failed.
#[test]
fn only_a_merge_that_goes_through_takes_back_that_merges_fail() {
    let disk = SimDisk::new(1);
    let (owner, quota) = with_a_batch(&disk);
    disk.inject(Fault::new(Call::Create, 0, Outcome::Enospc).on("snapshot-"));
    owner.engine.snapshot().unwrap_err();
    assert!(snapshots_fail(&owner), "{}", owner.engine.health());
    let closed = owner.engine.merge_once(&mut |_| Err(Error::Closed));
    assert!(matches!(closed, Err(Error::Closed)), "{closed:?}");
    assert!(snapshots_fail(&owner));
    let mut gave_way = 0;
    let mut meanwhile = |_| {
        assert!(!owner.engine.merge_once(&mut |_| Ok(()))?);
        assert!(snapshots_fail(&owner));
        gave_way += 1;
        Ok(())
    };
    owner.engine.compactor.run(&mut meanwhile).unwrap();
    assert!(gave_way > 0);
    owner.engine.snapshot().unwrap();
    assert!(owner.engine.health().is_healthy(), "{}", owner.engine.health());
    // What failed is tried again though nothing is due.
    consume(&owner, 1, quota, true).unwrap();
    disk.inject(Fault::new(Call::Create, 0, Outcome::Enospc).on("snapshot-"));
    owner.engine.snapshot().unwrap_err();
    let before = owner.engine.stats().snapshots;
    owner.engine.step(Step::Merge).unwrap();
    assert_eq!(owner.engine.stats().snapshots, before + 1);
    assert!(owner.engine.health().is_healthy(), "{}", owner.engine.health());
}

/// A merge that did not fit filled the disk, and began again five seconds later: the journal found
/// room only in between.
#[test]
fn a_merge_that_does_not_fit_leaves_room_for_the_journal() {
    const USERS: u64 = 60_000;
    const FILE_BYTES: u64 = 256 << 10;
    let disk = SimDisk::new(1);
    let config = small().lane_records(1 << 14).journal_file_bytes(FILE_BYTES);
    let owner = Owner::open_at_rest(&disk.storage(), config).unwrap();
    let quota = define(&owner);
    for number in 0..USERS {
        // Users far from each other: some ten bytes for each sum.
        consume(&owner, number.wrapping_mul(0x9e37_79b9_7f4a_7c15), quota, false).unwrap();
        if number % 4096 == 0 {
            owner.engine.step(Step::Files).unwrap();
            owner.engine.sync().unwrap();
        }
    }
    owner.engine.sync().unwrap();
    owner.engine.step(Step::Files).unwrap();
    let len = |name: &String| disk.file(name).unwrap().len() as u64;
    let used: u64 = disk.file_names().iter().map(len).sum();
    disk.set_capacity(used + 600_000);
    let mut least = u64::MAX;
    let mut pause = |_| {
        least = least.min(owner.storage.free_bytes().unwrap());
        Ok(())
    };
    let refused = owner.engine.compactor.run(&mut pause).unwrap_err();
    assert!(refused.is_disk_full() && least >= FILE_BYTES, "{least} bytes were left: {refused}");
    assert!(refused.to_string().contains("no room for a snapshot"), "{refused}");
    assert_eq!(owner.storage.free_bytes().unwrap(), 600_000);
    // With as much as it takes it goes through.
    disk.set_capacity(used + (3 << 20));
    owner.engine.compactor.run(&mut |_| Ok(())).unwrap();
}

/// A read that failed for another reason, such as too many open files, ended in the advice to give
/// the directory up.
#[test]
fn only_what_the_disk_does_not_give_is_said_to_be_lost() {
    for (outcome, is_lost) in [(Outcome::Eio, true), (Outcome::Enospc, false)] {
        let disk = SimDisk::new(1);
        let (owner, _) = with_a_batch(&disk);
        disk.inject(Fault::new(Call::Read, 0, outcome).on("journal-"));
        owner.engine.snapshot().unwrap_err();
        let health = owner.engine.health().to_string();
        assert_eq!(health.contains("salvage"), is_lost, "{health}");
        assert_eq!(snapshots_fail(&owner), !is_lost, "{health}");
    }
}

/// A durable batch that rotted ends merges for good. Each file of the journal stayed open, later
/// 256 of them, of which four engines had as many as a process may, and health knew of a snapshot
/// only.
#[cfg(target_os = "linux")]
#[test]
fn a_batch_that_rots_is_said_and_does_not_use_up_the_descriptors() {
    use crate::storage::{CheckedStorage, RealStorage};

    const FILES: usize = 320;
    let dir = tempfile::tempdir().unwrap();
    let real = Arc::new(RealStorage::open(dir.path()).unwrap());
    let storage: Arc<dyn Storage> = Arc::new(CheckedStorage::new(real));
    let config = small().lane_records(1 << 14).snapshot_journal_bytes(1 << 20);
    let owner = Owner::open_at_rest(&storage, config).unwrap();
    let quota = define(&owner);
    let files = || {
        let names = storage.list().unwrap().into_iter();
        names.filter(|name| name.starts_with("journal-")).collect::<Vec<_>>()
    };
    let open = || {
        let links = std::fs::read_dir("/proc/self/fd").unwrap();
        let is_ours = |path: &std::path::PathBuf| path.starts_with(dir.path());
        let paths = links.map(|link| std::fs::read_link(link.unwrap().path()));
        paths.filter(|path| path.as_ref().is_ok_and(is_ours)).count()
    };
    consume(&owner, 1, quota, true).unwrap();
    owner.engine.snapshot().unwrap();
    let mut user = 0_u64;
    let mut fill_a_file = || {
        // Some 64 KiB.
        for _ in 0..6000 {
            user += 1;
            consume(&owner, user.wrapping_mul(0x9e37_79b9_7f4a_7c15), quota, false).unwrap();
        }
        owner.engine.step(Step::Drain).unwrap();
        owner.engine.step(Step::Files).unwrap();
        owner.engine.sync().unwrap();
    };
    fill_a_file();
    let rotten = files().into_iter().min().unwrap();
    let mut bytes = std::fs::read(dir.path().join(&rotten)).unwrap();
    // In the last batch of the file, behind the snapshot.
    let last = bytes.iter().rposition(|&byte| byte != 0).unwrap();
    bytes[last - 100] ^= 1;
    std::fs::write(dir.path().join(&rotten), &bytes).unwrap();
    while files().len() < FILES {
        fill_a_file();
    }
    owner.engine.step(Step::Merge).unwrap_err();
    let open = open();
    assert!(open <= 32, "{open} files are open");
    let health = owner.engine.health().to_string();
    assert!(health.contains("salvage") && health.contains(&rotten), "{health}");
    owner.close().unwrap();
}
