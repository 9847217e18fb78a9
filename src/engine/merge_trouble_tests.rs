//! Merges that fail again and again cost little, and take nothing from the callers.

use super::order_tests::{consume, define, small};
use super::*;
use crate::storage::sim::SimDisk;

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
