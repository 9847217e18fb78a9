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
    let owner = at_rest(&world, small());
    let quota = define(&owner);
    while consume(&owner, 1, quota, false).is_ok() {}
    let mut deadline = None;
    assert!(!owner.engine.wait_for_room(1, &mut deadline));
    let first = deadline;
    assert!(first.is_some() && !owner.engine.wait_for_room(1, &mut deadline));
    assert_eq!(deadline, first);
}

/// An operation may need all of a ring that has one record in it. It once waited for the next sync,
/// or was refused, while the drainer had nothing else to do.
#[test]
fn a_ring_that_is_far_from_full_is_emptied_for_who_needs_all_of_it() {
    let world = World::new();
    let owner = world.open_with(small().lanes(1)).unwrap();
    let quota = define(&owner);
    consume(&owner, 1, quota, false).unwrap();
    assert!(owner.engine.lanes.iter().all(|lane| lane.lacks_room(64)));
    assert!(owner.engine.wait_for_room(64, &mut None));
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

/// Without flushers: nothing makes room.
fn at_rest(world: &World, config: Config) -> Owner {
    let storage = world.disk.over(Arc::new(RealStorage::open(world.dir.path()).unwrap()));
    Owner::open_at_rest(&storage, config).unwrap()
}

/// Calls under ids that lie together once waited for room one after the other, each up to its
/// deadline, and so did whoever asked for an answer that was known.
#[test]
fn who_waits_for_room_keeps_no_answer_from_others() {
    let world = World::new();
    let config = small().dedup_max(1).backpressure_deadline(Duration::from_secs(600));
    let owner = at_rest(&world, config);
    let quota = define(&owner);
    let once =
        |id| owner.engine.try_consume_once(id, owner.engine.counted(1, quota).unwrap(), 1).unwrap();
    let mut known = 0;
    while !owner.engine.lanes.iter().all(|lane| lane.lacks_room(3)) {
        known += 1;
        let _ = once(known);
    }
    std::thread::scope(|scope| {
        let waiting = [1, 2].map(|more| scope.spawn(move || once(known + more)));
        while owner.engine.stats().backpressure_waits < 2 {
            std::thread::yield_now();
        }
        assert_eq!(once(known).used, u64::try_from(known).unwrap());
        owner.engine.committer.commit().unwrap();
        for waiting in waiting {
            assert!(waiting.join().unwrap().is_allowed());
        }
    });
}

/// Whoever was stopped in a shared lane, while the engine was closed, left it open once: the closed
/// engine went on counting, in the rings of the next one.
#[test]
fn a_lane_that_was_held_at_the_close_is_closed_when_it_is_left() {
    let world = World::new();
    let owner = at_rest(&world, small().lanes(1));
    let quota = define(&owner);
    let lane = owner.engine.lanes.get(0).unwrap();
    lane.share();
    consume(&owner, 1, quota, false).unwrap();
    let held = lane.try_lock(1).unwrap();
    let closed = owner.close();
    assert!(matches!(closed, Err(Error::DurabilityLost { .. })), "{closed:?}");
    let next = RealStorage::open(world.dir.path());
    assert!(matches!(next, Err(Error::Locked { .. })), "it may still write there");
    drop(held);
    for _ in 0..2 {
        let refused = consume(&owner, 1, quota, false);
        assert!(matches!(refused, Err(Error::Closed)), "{refused:?}");
    }
}

/// An extension that another call has written counts once it is durable, for this one too.
#[test]
fn an_extension_that_another_makes_is_waited_for() {
    let world = World::new();
    let owner = at_rest(&world, small().durable_consumes(true));
    let quota = define(&owner);
    let item = crate::model::Consume { user: 1, quota, amount: 5 };
    let id = owner.engine.reserve(&[item], Duration::from_secs(1)).unwrap().unwrap();
    let before = owner.engine.committer.durable_batch();
    assert_eq!(
        owner.engine.reservations.extend(
            id,
            owner.engine.clock.now(),
            owner.engine.expiry(Duration::from_secs(60)).unwrap(),
            // As a call that has not come to its wait yet.
            || {
                let (_, mut permit) = owner.engine.lanes.acquire(1).unwrap();
                let expires = owner.engine.expiry(Duration::from_secs(60)).unwrap();
                let item = crate::wal::record::Item::Extend { id, expires };
                permit.append_operation(1, std::iter::once(item));
            }
        ),
        Some(true)
    );
    owner.engine.extend(id, Duration::from_secs(50)).unwrap();
    assert!(owner.engine.committer.durable_batch() > before);
}

/// What another thread is giving back is waited for before a commit is refused.
#[test]
fn a_commit_that_fits_is_not_refused_while_another_gives_back() {
    let world = World::new();
    let clock = ManualClock::new(Timestamp::from_unix_millis(1_767_225_600_000));
    let owner = at_rest(&world, small().clock(Arc::new(clock.clone())));
    let quota = Quota::new("ten", 10).overrun(crate::model::Overrun::Refuse);
    let quota = owner.engine.define(&quota).unwrap();
    let item = crate::model::Consume { user: 1, quota, amount: 5 };
    let reserve = |ttl| owner.engine.reserve(&[item], Duration::from_secs(ttl)).unwrap().unwrap();
    let (long, short) = (reserve(600), reserve(1));
    clock.advance(Duration::from_secs(2));
    let taken = owner.engine.reservations.take(short);
    std::thread::scope(|scope| {
        let commit = || owner.engine.commit(long, Charge::Same(8)).unwrap();
        let committing = scope.spawn(commit);
        // Mostly it has come to its wait by then.
        std::thread::sleep(Duration::from_millis(50));
        drop(taken);
        let decisions = committing.join().unwrap();
        assert!(decisions.is_allowed(), "{decisions:?}");
    });
}

/// In the next window there is room, but not for what was reserved in this one: a client that came
/// back then was refused again and again.
#[test]
fn a_refused_commit_names_no_time_to_wait() {
    let world = World::new();
    let owner = at_rest(&world, small());
    let quota = Quota::new("ten", 10).window(crate::model::Window::Day);
    let quota = quota.overrun(crate::model::Overrun::Refuse);
    let quota = owner.engine.define(&quota).unwrap();
    let item = crate::model::Consume { user: 1, quota, amount: 8 };
    let id = owner.engine.reserve(&[item], Duration::from_secs(600)).unwrap().unwrap();
    let refused = owner.engine.commit(id, Charge::Same(11)).unwrap();
    assert!(refused.is_denied());
    let refused = owner.engine.try_consume_all(&[item]).unwrap();
    assert!(refused.is_denied() && refused.retry_after().is_some(), "that one can wait");
    let fits = owner
        .engine
        .reserve(&[crate::model::Consume { amount: 1, ..item }], Duration::from_secs(9));
    assert!(fits.unwrap().is_ok());
    let refused = owner.engine.commit(id, Charge::Same(10)).unwrap();
    assert_eq!((refused.is_denied(), refused.retry_after()), (true, None));
}
