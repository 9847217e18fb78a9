//! What is logged is logged where whoever gets it may call the engine.

use std::sync::atomic::{AtomicU64, Ordering};

use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use super::*;

/// Asks the engine how it is, and waits for the disk, whenever something is logged.
struct Curious {
    engine: Arc<Engine>,
    events: Arc<AtomicU64>,
}

impl Subscriber for Curious {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {
        let _ = self.engine.health();
        let _ = self.engine.sync();
        self.events.fetch_add(1, Ordering::Relaxed);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// How often something was logged meanwhile. Where what is logged can't be listened to, it hangs.
pub(in crate::engine) fn events_of(owner: &Owner, work: impl FnOnce()) -> u64 {
    let events = Arc::<AtomicU64>::default();
    let curious = Curious { engine: Arc::clone(&owner.engine), events: Arc::clone(&events) };
    tracing::subscriber::with_default(curious, work);
    events.load(Ordering::Relaxed)
}

fn at_rest(world: &World) -> Owner {
    let storage = world.disk.over(Arc::new(RealStorage::open(world.dir.path()).unwrap()));
    Owner::open_at_rest(&storage, small()).unwrap()
}

#[test]
fn trouble_is_said_to_who_asks_for_it() {
    let world = World::new();
    let owner = at_rest(&world);
    let (journal, failure) = (&owner.engine.troubles.journal, Error::Closed);
    let events = events_of(&owner, || {
        for failure in [Some(&failure), Some(&failure), None, None] {
            owner.engine.set_trouble(journal, failure);
        }
    });
    assert_eq!(events, 2, "when it began, and when it was over");
}

#[test]
fn that_durability_is_lost_is_said_to_who_asks_for_it() {
    let world = World::new();
    let owner = at_rest(&world);
    let events = events_of(&owner, || {
        owner.engine.poison.set("for one reason");
        owner.engine.poison.set("and for another");
    });
    assert_eq!(events, 1);
}

/// It was said under the lock that a sync needs, by the thread that was to wake who waits for one.
#[test]
fn a_sync_that_fails_is_said_to_who_waits_for_another() {
    let world = World::new();
    let owner = at_rest(&world);
    let quota = define(&owner);
    world.fail(Call::Sync, "journal-", Outcome::Fail(ErrorKind::Other), 1);
    let events = events_of(&owner, || {
        consume(&owner, 1, quota, true).unwrap();
    });
    assert_eq!(events, 1);
    world.fail(Call::Sync, "journal-", Outcome::Fail(ErrorKind::Other), FOREVER);
    let events = events_of(&owner, || {
        consume(&owner, 1, quota, true).unwrap_err();
        owner.engine.poison.say();
        owner.engine.poison.say();
    });
    assert_eq!(events, 1);
}
