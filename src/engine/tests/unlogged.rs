//! What was admitted unlogged, and is given back.

use super::*;

/// An engine that has admitted more than a few units unlogged, on a disk that works again.
fn with_unlogged(world: &World, config: Config) -> (Arc<Owner>, QuotaId) {
    let config = config.backpressure(Backpressure::AdmitUnlogged);
    let owner = world.open_with(config.backpressure_deadline(Duration::ZERO)).unwrap();
    let quota = define(&owner);
    world.fail(Call::Create, "journal-", Outcome::Fail(ErrorKind::StorageFull), FOREVER);
    while owner.engine.stats().unlogged < 10 {
        let _ = consume(&owner, 1, quota, false);
    }
    world.disk.heal();
    owner.engine.sync().unwrap();
    (owner, quota)
}

/// The log said that as much was given back, and had never said that it was taken: what it found
/// below zero the next open set right, and with that acknowledged, durable units were gone.
#[test]
fn what_is_given_back_unlogged_takes_nothing_from_what_is_logged() {
    let world = World::new();
    let (owner, quota) = with_unlogged(&world, small());
    let counted = owner.engine.counted(1, quota).unwrap();
    let unlogged = owner.engine.stats().unlogged;
    let logged = used(&owner, 1, quota) - unlogged;
    assert_eq!(owner.engine.refund(&counted, unlogged - 3).unwrap(), unlogged - 3);
    assert_eq!(used(&owner, 1, quota), logged + 3);
    assert_eq!(owner.engine.refund(&counted, logged + 3).unwrap(), logged + 3);
    let again = owner.engine.consume(&counted, logged, true).unwrap();
    assert_eq!(again.used, logged);
    drop(owner);
    let owner = world.open().unwrap();
    assert_eq!(used(&owner, 1, quota), logged);
    assert_eq!(owner.engine.report().corrected, 0);
}

/// Nothing of it is in the log that could become durable.
#[test]
fn a_refund_of_what_is_in_no_log_waits_for_no_disk() {
    let world = World::new();
    let (owner, quota) = with_unlogged(&world, small().durable_consumes(true));
    let counted = owner.engine.counted(1, quota).unwrap();
    let before = owner.engine.stats().total;
    assert_eq!(owner.engine.refund(&counted, 2).unwrap(), 2);
    assert_eq!(owner.engine.stats().total, before);
}
