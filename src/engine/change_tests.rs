//! Definitions: what they find room for.

use super::order_tests::{consume, define, open, small, used};
use super::*;
use crate::model::Quota;
use crate::storage::sim::SimDisk;

/// Nobody prepares files here. A new quota said that the disk is full, where all others who wait
/// for the disk prepare a file themselves.
#[test]
fn a_new_quota_finds_room_in_a_file_that_it_prepares() {
    let disk = SimDisk::new(1);
    let owner = open(&disk);
    let name = |number| format!("quota-{number}");
    let ids: Vec<_> = (0..2_000)
        .map(|number| owner.engine.define(&Quota::new(name(number), 10)).unwrap())
        .collect();
    disk.power_cut();
    drop(owner);
    let owner = open(&disk);
    for (number, id) in ids.into_iter().enumerate() {
        assert_eq!(owner.engine.quota_by_name(&name(number)), Some(id));
    }
}

/// With as many bytes unsynced as may be, a new quota was refused until the next sync was due.
#[test]
fn a_new_quota_leads_the_sync_that_it_needs() {
    let disk = SimDisk::new(1);
    let config = small().unsynced_bytes_max(1 << 20);
    let owner = Owner::open_at_rest(&disk.storage(), config).unwrap();
    let quota = define(&owner);
    let mut user = 0_u64;
    let append = || owner.engine.committer.lock_drain().unwrap().append_batch();
    let refused = loop {
        for _ in 0..32 {
            user += 1;
            consume(&owner, user.rotate_left(48), quota, false).unwrap();
        }
        owner.engine.files.provide_spare().unwrap();
        if let Err(error) = append() {
            break error;
        }
    };
    assert!(matches!(refused, Error::TooMany { .. }), "{refused}");
    let other = owner.engine.define(&Quota::new("other", 10)).unwrap();
    disk.power_cut();
    drop(owner);
    let owner = open(&disk);
    assert_eq!(owner.engine.quota_by_name("other"), Some(other));
    assert!((1..=user).all(|user| used(&owner, user.rotate_left(48), quota) == 1));
}
