//! Definitions and limits: what they find room for, and what of them is in effect after an error.

use super::order_tests::{consume, define, open, small, used};
use super::*;
use crate::admission::cell::Live;
use crate::model::Quota;
use crate::storage::faulty::{self, FaultyDisk};
use crate::storage::sim::SimDisk;

/// A disk that refuses what is asked of the journal's files until it is healed.
fn refuse(faults: &FaultyDisk, call: faulty::Call, kind: std::io::ErrorKind) {
    let outcome = faulty::Outcome::Fail(kind);
    faults.inject(faulty::Fault { call, name: "journal-", outcome, times: usize::MAX });
}

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

/// A definition waits to be written, for as long as the disk refuses it. It keeps its id, and other
/// quotas and limits can be changed meanwhile: nothing was, and the error said that it was.
#[test]
fn a_definition_that_waits_holds_up_new_quotas_only() {
    let (disk, faults) = (SimDisk::new(1), FaultyDisk::default());
    let owner = Owner::open_at_rest(&faults.over(disk.storage()), small()).unwrap();
    let engine = &owner.engine;
    let known = define(&owner);
    refuse(&faults, faulty::Call::Write, std::io::ErrorKind::StorageFull);
    let first = engine.define(&Quota::new("first", 10));
    let first = first.unwrap_err();
    assert!(matches!(first, Error::OutcomeUnknown { .. }) && first.is_disk_full(), "{first:?}");
    assert_eq!(engine.quota_by_name("first"), None);
    let second = engine.define(&Quota::new("second", 10));
    assert!(matches!(&second, Err(error) if error.is_disk_full()), "{second:?}");
    assert_eq!(engine.quota_by_name("second"), None);
    let again = engine.define(&Quota::new("first", 10));
    assert!(matches!(again, Err(Error::OutcomeUnknown { .. })), "{again:?}");
    let raised = engine.define(&Quota::new("requests", 7));
    assert!(matches!(raised, Err(Error::OutcomeUnknown { .. })), "{raised:?}");
    assert_eq!(engine.describe(known).unwrap().limit(), 7);
    let limited = engine.set_limit(&engine.counted(1, known).unwrap(), Some(3));
    assert!(matches!(limited, Err(Error::OutcomeUnknown { .. })), "{limited:?}");
    assert_eq!(engine.usage(&engine.counted(1, known).unwrap()).limit, 3);
    faults.heal();
    let second = engine.define(&Quota::new("second", 10)).unwrap();
    let first = engine.quota_by_name("first").unwrap();
    assert_eq!([first, second].map(QuotaId::as_u16), [1, 2]);
    disk.power_cut();
    drop(owner);
    let owner = open(&disk);
    let engine = &owner.engine;
    for (name, id) in [("first", first), ("second", second)] {
        assert_eq!(engine.quota_by_name(name), Some(id));
    }
    assert_eq!(engine.describe(known).unwrap().limit(), 7);
    assert_eq!(engine.usage(&engine.counted(1, known).unwrap()).limit, 3);
}

/// Whoever defined its quotas at each start took back what an operator had changed.
#[test]
fn a_quota_that_is_there_stays_as_it_is() {
    let (disk, faults) = (SimDisk::new(1), FaultyDisk::default());
    let owner = Owner::open_at_rest(&faults.over(disk.storage()), small()).unwrap();
    let first = Quota::new("first", 10).window(crate::model::Window::Day);
    let id = owner.engine.define_if_absent(&first).unwrap();
    disk.power_cut();
    drop(owner);
    let owner = Owner::open_at_rest(&faults.over(disk.storage()), small()).unwrap();
    let engine = &owner.engine;
    assert_eq!(engine.quota_by_name("first"), Some(id), "it was durable");
    engine.define(&first.clone().with_limit(20)).unwrap();
    for other in [Quota::new("first", 5), Quota::new("first", 5).decimals(2), first.clone()] {
        assert_eq!(engine.define_if_absent(&other).unwrap(), id);
        assert_eq!(engine.describe(id).unwrap(), first.clone().with_limit(20));
    }
    // What another caller has only handed over is waited for.
    refuse(&faults, faulty::Call::Write, std::io::ErrorKind::StorageFull);
    for quota in [Quota::new("second", 1), Quota::new("second", 2), first.clone()] {
        let unknown = engine.define_if_absent(&quota).unwrap_err();
        assert!(matches!(unknown, Error::OutcomeUnknown { .. }), "{unknown:?}");
        assert!(engine.define(&first.clone().with_limit(30)).is_err());
    }
    faults.heal();
    let second = engine.define_if_absent(&Quota::new("second", 3)).unwrap();
    assert_eq!((second.as_u16(), engine.describe(second).unwrap().limit()), (1, 1));
    assert_eq!(engine.describe(id).unwrap().limit(), 30);
}

/// Once durability is lost nothing is changed any more, and the error says so.
#[test]
fn without_durability_definitions_and_limits_stay_as_they_are() {
    let (disk, faults) = (SimDisk::new(1), FaultyDisk::default());
    let owner = Owner::open_at_rest(&faults.over(disk.storage()), small()).unwrap();
    let engine = &owner.engine;
    let quota = define(&owner);
    let counted = || engine.counted(1, quota).unwrap();
    engine.set_limit(&counted(), Some(5)).unwrap();
    refuse(&faults, faulty::Call::Sync, std::io::ErrorKind::Other);
    // This one was made before the sync failed.
    let failed = engine.set_limit(&counted(), Some(6));
    assert!(matches!(failed, Err(Error::OutcomeUnknown { .. })), "{failed:?}");
    assert_eq!(engine.usage(&counted()).limit, 6);
    let lost = [
        engine.set_limit(&counted(), Some(7)),
        engine.set_limit(&counted(), None),
        engine.define(&Quota::new("requests", 7)).map(drop),
        engine.define(&Quota::new("other", 7)).map(drop),
    ];
    for lost in lost {
        assert!(matches!(lost, Err(Error::DurabilityLost { .. })), "{lost:?}");
    }
    assert_eq!(engine.usage(&counted()).limit, 6);
    assert_eq!(engine.describe(quota).unwrap().limit(), 1 << 40);
    assert_eq!(engine.quota_by_name("other"), None);
}

/// The map was looked into under the drain's lock: whoever read there, and was not given a
/// processor, held up the syncs behind a clear that waited for an insertion that waited for it.
#[test]
fn a_limit_that_is_cleared_keeps_nobody_from_a_sync() {
    const SOON: Duration = Duration::from_millis(50);
    let disk = SimDisk::new(1);
    let owner = Owner::open_at_rest(&disk.storage(), small().shards(2)).unwrap();
    let engine = &owner.engine;
    let quota = define(&owner);
    consume(&owner, 1, quota, false).unwrap();
    let (done, is_done) = std::sync::mpsc::channel();
    let synced = std::thread::scope(|scope| {
        let read = |_: Live<'_>| {
            // Some of them where this one is read: they wait until it is.
            scope.spawn(|| (2..100).for_each(|user| drop(consume(&owner, user, quota, false))));
            std::thread::sleep(SOON);
            scope.spawn(|| engine.set_limit(&engine.counted(1, quota).unwrap(), None).unwrap());
            std::thread::sleep(SOON);
            scope.spawn(move || done.send(engine.sync()));
            is_done.recv_timeout(Duration::from_secs(10))
        };
        engine.table.find(engine.counted(1, quota).unwrap().key(), read).unwrap()
    });
    assert!(matches!(synced, Ok(Ok(()))), "{synced:?}");
}

/// What a clear finds must be what its place in the journal clears.
#[test]
fn a_limit_that_is_set_while_it_is_cleared_is_in_effect_as_it_is_in_the_journal() {
    const SOON: Duration = Duration::from_millis(50);
    let disk = SimDisk::new(1);
    let owner = open(&disk);
    let engine = &owner.engine;
    let quota = define(&owner);
    let counted = || engine.counted(1, quota).unwrap();
    std::thread::scope(|scope| {
        let drain = engine.committer.lock_drain().unwrap();
        scope.spawn(|| engine.set_limit(&counted(), Some(5)).unwrap());
        std::thread::sleep(SOON);
        scope.spawn(|| engine.set_limit(&counted(), None).unwrap());
        std::thread::sleep(SOON);
        drop(drain);
    });
    let limit = engine.usage(&counted()).limit;
    drop(owner);
    let owner = open(&disk);
    assert_eq!(owner.engine.usage(&owner.engine.counted(1, quota).unwrap()).limit, limit);
}
