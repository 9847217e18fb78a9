//! Models of who leads: threads that write into lanes of their own and wait for a commit, over a
//! disk that takes what it finds when its leader looks.
//!
//! Nobody sleeps for a limited time here: a wake-up that gets lost is a deadlock, which loom
//! reports.

use std::sync::Arc;
use std::time::Duration;

use loom::thread;

use super::Turns;
use crate::sync::{AtomicU64, Ordering, explore, explore_briefly};

#[derive(Debug, Default)]
struct World {
    turns: Turns,
    written: [AtomicU64; 2],
    durable: [AtomicU64; 2],
}

impl World {
    fn write(&self, lane: usize) {
        // Release, Acquire: as a lane's tail and the committer's marks.
        self.written[lane].store(1, Ordering::Release);
    }

    fn is_durable(&self, lane: usize) -> bool {
        self.durable[lane].load(Ordering::Acquire) == 1
    }

    fn commit(&self) {
        for (durable, written) in self.durable.iter().zip(&self.written) {
            durable.store(written.load(Ordering::Acquire), Ordering::Release);
        }
    }

    /// Writes and waits, as a consume does.
    fn consume(&self, lane: usize) {
        self.write(lane);
        let mut waiter = self.turns.waiter();
        while !self.is_durable(lane) {
            match waiter.lead() {
                Some(leading) => {
                    leading.look();
                    self.commit();
                    leading.succeeded();
                }
                None => waiter.wait(Duration::MAX),
            }
        }
    }

    /// Commits what is there, as a flusher does.
    fn sync(&self) {
        let mut waiter = self.turns.exact_waiter();
        while !waiter.is_covered() {
            match waiter.lead() {
                Some(leading) => {
                    leading.look();
                    self.commit();
                    leading.succeeded();
                    return;
                }
                None => waiter.wait(Duration::MAX),
            }
        }
    }
}

/// Two come while a commit is under way: each is woken, or leads.
///
/// Fails when the end of a commit wakes nobody to lead the next, when a reserved commit is not
/// opened again where nobody slept, or when nobody looks again after that.
#[test]
fn loom_whoever_waits_for_a_commit_wakes() {
    explore_briefly(|| {
        let world = Arc::new(World::default());
        let leading = world.turns.waiter().lead().expect("nobody else is there");
        leading.look();
        let others = [0, 1].map(|lane| {
            let world = Arc::clone(&world);
            thread::spawn(move || world.consume(lane))
        });
        drop(leading);
        for other in others {
            other.join().unwrap();
        }
    });
}

/// One was woken to lead and does not need to: another is woken in its place.
///
/// Fails when a waiter that goes does not hand the lead over.
#[test]
fn loom_who_does_not_need_to_lead_wakes_another() {
    explore(|| {
        let world = Arc::new(World::default());
        let leading = world.turns.waiter().lead().expect("nobody else is there");
        leading.look();
        let gone = {
            let world = Arc::clone(&world);
            thread::spawn(move || {
                let mut waiter = world.turns.waiter();
                if waiter.lead().is_none() {
                    waiter.wait(Duration::MAX);
                }
            })
        };
        let other = {
            let world = Arc::clone(&world);
            thread::spawn(move || world.consume(0))
        };
        drop(leading);
        gone.join().unwrap();
        other.join().unwrap();
    });
}

/// Whoever is told that a commit covers what was there when it came finds it durable, also where it
/// joined a commit that somebody else led.
///
/// Fails without either of the two fences, or when a waiter that comes during a sync joins it.
#[test]
fn loom_a_commit_that_is_joined_covers_what_was_before() {
    explore(|| {
        let world = Arc::new(World::default());
        let other = {
            let world = Arc::clone(&world);
            thread::spawn(move || world.sync())
        };
        world.write(1);
        world.sync();
        assert!(world.is_durable(1));
        other.join().unwrap();
    });
}
