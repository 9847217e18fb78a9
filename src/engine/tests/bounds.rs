//! What counts as refused, and what is given back before anything is.

use super::*;
use crate::engine::flushers::Step;
use crate::model::Consume;

const START: Timestamp = Timestamp::from_unix_millis(1_767_225_600_000);

fn at_rest(world: &World, clock: &ManualClock, config: Config) -> Owner {
    let storage = world.disk.over(Arc::new(RealStorage::open(world.dir.path()).unwrap()));
    Owner::open_at_rest(&storage, config.clock(Arc::new(clock.clone()))).unwrap()
}

/// Reservations whose time was over were in the way of others until the thread had looked.
#[test]
fn what_is_over_is_given_back_before_there_are_too_many_reservations() {
    let (world, clock) = (World::new(), ManualClock::new(START));
    let owner = at_rest(&world, &clock, small().reservations_max(1));
    let quota = define(&owner);
    let item = Consume { user: 1, quota, amount: 5 };
    let two = [item, Consume { user: 2, ..item }];
    for items in [&[item][..], &two, &[item]] {
        owner.engine.reserve(items, Duration::from_millis(1)).unwrap().unwrap();
        let refused = owner.engine.reserve(items, Duration::from_millis(1));
        assert!(matches!(refused, Err(Error::TooMany { .. })), "{refused:?}");
        clock.advance(Duration::from_secs(1));
    }
}

/// What it counted is in the log, and may be on the disk: the next call under the id gets it.
#[test]
fn a_reservation_under_an_id_outlives_a_failing_disk() {
    let (world, clock) = (World::new(), ManualClock::new(START));
    let owner = at_rest(&world, &clock, small().durable_consumes(true));
    let quota = define(&owner);
    let reserve = || {
        let counted = owner.engine.counted(1, quota).unwrap();
        owner.engine.reserve_once(7, counted, 5, Duration::from_secs(600))
    };
    owner.engine.files.provide_spare().unwrap();
    world.fail(Call::Write, "journal-", Outcome::Fail(ErrorKind::Other), FOREVER);
    let failed = reserve();
    assert!(matches!(failed, Err(Error::Io { .. })), "{failed:?}");
    assert_eq!(used(&owner, 1, quota), 5);
    world.disk.heal();
    let Ok(ReservedOnce::Before(id)) = reserve() else { panic!("the same reservation") };
    assert!(owner.engine.commit(id, Charge::Same(3)).unwrap().is_allowed());
    assert_eq!(used(&owner, 1, quota), 3);
}

/// A merge may take long, before any thread is there: health once said that they had stood still
/// meanwhile.
#[test]
fn nothing_is_late_that_has_not_begun() {
    let world = World::new();
    let owner = at_rest(&world, &ManualClock::new(START), small());
    std::thread::sleep(Duration::from_millis(5));
    let before = u64::try_from(crate::clock::uptime().as_millis()).unwrap();
    owner.engine.start(&mut owner.flushers.lock()).unwrap();
    let began = &owner.engine.committer.syncs().last_began_ms;
    assert!(began.load(std::sync::atomic::Ordering::Relaxed) >= before);
}

/// An amount that no counter can hold is no denial.
#[test]
fn an_overflow_is_no_denial() {
    let (world, clock) = (World::new(), ManualClock::new(START));
    let owner = at_rest(&world, &clock, small());
    let quota = define(&owner);
    let counted = owner.engine.counted(1, quota).unwrap();
    consume(&owner, 1, quota, false).unwrap();
    for id in 0..2 {
        let refused = owner.engine.consume_once(id, counted, u64::MAX >> 1, &[]);
        assert!(matches!(refused, Err(Error::Overflow { .. })), "{refused:?}");
    }
    assert_eq!(owner.engine.stats().denied, 0);
}

/// The thread goes on looking while a close waits for sinks.
#[test]
fn what_a_closed_engine_can_not_give_back_is_no_failed_operation() {
    let (world, clock) = (World::new(), ManualClock::new(START));
    let owner = at_rest(&world, &clock, small());
    let quota = define(&owner);
    let item = Consume { user: 1, quota, amount: 5 };
    owner.engine.reserve(&[item], Duration::from_millis(1)).unwrap().unwrap();
    clock.advance(Duration::from_secs(1));
    owner.close().unwrap();
    owner.engine.step(Step::Expiry).unwrap();
    let stats = owner.engine.stats();
    assert_eq!((stats.failed, stats.reservations), (0, 1));
}

/// All lanes skipped at once, and a write that failed left each with a part of its ring.
#[test]
fn while_a_batch_can_not_be_written_half_of_the_rings_are_whole() {
    const CAPACITY: u64 = 1 << 15;
    let (world, clock) = (World::new(), ManualClock::new(START));
    let config = small().lanes(4).lane_records(1 << 15).journal_file_bytes(1 << 20);
    let owner = at_rest(&world, &clock, config.backpressure_deadline(Duration::ZERO));
    let quota = define(&owner);
    let fill = |lane, count| {
        crate::wal::lanes::prefer(lane);
        for _ in 0..count {
            consume(&owner, 1, quota, false).unwrap();
        }
    };
    (0..4).for_each(|lane| fill(lane, 9000));
    owner.engine.step(Step::Append).unwrap();
    (0..4).for_each(|lane| fill(lane, 1));
    world.fail(Call::Write, "journal-", Outcome::Fail(ErrorKind::Other), FOREVER);
    owner.engine.step(Step::Append).unwrap_err();
    let mut room = 0;
    while consume(&owner, 1, quota, false).is_ok() {
        room += 1;
    }
    assert!(room > 2 * (CAPACITY - 2), "{room}");
}
