//! What counts as refused, and what is given back before anything is.

use super::*;
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
