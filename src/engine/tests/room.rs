//! Who waits for room in the log or on the disk, and who does not.

use super::*;

/// While the journal is being written to, however long that takes, nobody who looks waits for it.
#[test]
fn who_looks_does_not_wait_for_the_disk() {
    let world = World::new();
    let owner = world.open().unwrap();
    let quota = define(&owner);
    consume(&owner, 1, quota, false).unwrap();
    let before = owner.engine.stats();
    let writing = owner.engine.committer.lock_drain().unwrap();
    let defining = owner.engine.half_defined.lock();
    consume(&owner, 1, quota, false).unwrap();
    let stats = owner.engine.stats();
    assert_eq!((stats.total, stats.total - stats.processed), (before.total + 1, stats.backlog));
    assert_eq!(owner.engine.quota_by_name("requests"), Some(quota));
    assert_eq!(owner.engine.quota_ids(), [quota]);
    assert!(owner.engine.health().level() < HealthLevel::Failed);
    drop((writing, defining));
}

/// The deadline is the call's: one that finds room again and again, and loses it to others each
/// time, waits no longer than that.
#[test]
fn a_deadline_is_not_set_anew_by_each_wait() {
    let world = World::new();
    let owner = world.open().unwrap();
    let quota = define(&owner);
    world.fail(Call::Create, "journal-", Outcome::Fail(ErrorKind::StorageFull), FOREVER);
    while consume(&owner, 1, quota, false).is_ok() {}
    let mut deadline = None;
    assert!(!owner.engine.wait_for_room(1, &mut deadline));
    let first = deadline;
    assert!(first.is_some() && !owner.engine.wait_for_room(1, &mut deadline));
    assert_eq!(deadline, first);
}

/// On a file system that copies on write, a full disk may refuse what was reserved on it: callers
/// are told, rather than wait for a file that would not help.
#[test]
fn a_write_that_finds_no_space_is_not_tried_for_ever() {
    let world = World::new();
    let owner = world.open().unwrap();
    let quota = define(&owner);
    owner.engine.files.provide_spare().unwrap();
    consume(&owner, 1, quota, false).unwrap();
    world.fail(Call::Write, "journal-", Outcome::Fail(ErrorKind::StorageFull), 100_000);
    let synced = owner.engine.sync();
    assert!(matches!(&synced, Err(error) if error.is_disk_full()), "{synced:?}");
    world.disk.heal();
    owner.engine.sync().unwrap();
}

/// What could not be made durable is not reserved for nobody.
#[test]
fn a_reservation_that_nobody_gets_is_given_back() {
    let world = World::new();
    let owner = world.open_with(small().durable_consumes(true)).unwrap();
    let quota = define(&owner);
    world.fail(Call::Sync, "journal-", Outcome::Fail(ErrorKind::Other), FOREVER);
    let item = crate::model::Consume { user: 1, quota, amount: 5 };
    let reserved = owner.engine.reserve(&[item], Duration::from_secs(600));
    assert!(matches!(reserved, Err(Error::DurabilityLost { .. })), "{reserved:?}");
    assert_eq!(used(&owner, 1, quota), 0);
    assert_eq!(owner.engine.stats().reservations, 0);
}
