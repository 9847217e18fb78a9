//! What is remembered of requests under a clock that is set: no id that was answered lately counts
//! twice. On a simulated disk, without threads.

use std::sync::Arc;
use std::time::Duration;

use super::order_tests::{START, define, small, used};
use super::*;
use crate::clock::ManualClock;
use crate::model::Timestamp;
use crate::storage::sim::SimDisk;

const WINDOW: Duration = Duration::from_mins(10);
const HOUR: u64 = 3_600_000;

fn at(millis: u64) -> Timestamp {
    Timestamp::from_unix_millis(START + millis)
}

/// Three answers are remembered.
fn open(disk: &Arc<SimDisk>, clock: &ManualClock) -> Owner {
    let config = small().dedup_max(3).dedup_window(WINDOW).clock(Arc::new(clock.clone()));
    Owner::open_at_rest(&disk.storage(), config).unwrap()
}

/// Asks for one under an id: what is used then.
fn ask(owner: &Owner, quota: QuotaId, id: u128) -> u64 {
    let counted = owner.engine.counted(1, quota).unwrap();
    let decision = owner.engine.try_consume_once(id, counted, 1).unwrap();
    assert!(decision.is_allowed());
    used(owner, 1, quota)
}

/// The answers from before a clock was set back were once taken for the newest, since they were
/// given at later times: a merge, or an open, forgot those that came after them.
#[test]
fn the_oldest_answers_are_forgotten_first_though_the_clock_was_set_back() {
    for merges in 0..=2 {
        let (disk, clock) = (SimDisk::new(1), ManualClock::new(at(HOUR)));
        let owner = open(&disk, &clock);
        let quota = define(&owner);
        assert_eq!([1, 2, 3].map(|id| ask(&owner, quota, id)), [1, 2, 3]);
        if merges == 2 {
            owner.engine.snapshot().unwrap();
        }
        clock.set(at(0));
        assert_eq!(ask(&owner, quota, 4), 4);
        if merges > 0 {
            owner.engine.snapshot().unwrap();
        }
        disk.kill();
        drop(owner);
        let owner = open(&disk, &clock);
        assert_eq!([4, 3, 2].map(|id| ask(&owner, quota, id)), [4; 3], "{merges} merges");
        assert_eq!(ask(&owner, quota, 1), 5, "the first was the oldest");
    }
}

/// A merge believes no jump ahead for a day, but what came since is newer all the same.
#[test]
fn the_newest_answers_are_kept_though_the_clock_is_ahead() {
    let (disk, clock) = (SimDisk::new(1), ManualClock::new(at(0)));
    let owner = open(&disk, &clock);
    let quota = define(&owner);
    assert_eq!(ask(&owner, quota, 1), 1);
    clock.set(at(HOUR));
    assert_eq!([2, 3, 4].map(|id| ask(&owner, quota, id)), [2, 3, 4]);
    owner.engine.snapshot().unwrap();
    disk.kill();
    drop(owner);
    let owner = open(&disk, &clock);
    assert_eq!([2, 3, 4].map(|id| ask(&owner, quota, id)), [4; 3]);
}

/// An id is forgotten when its time is over, once that is believed: what was forgotten while the
/// clock was ahead counted twice when it had been set right.
#[test]
fn a_clock_that_was_ahead_for_a_while_makes_no_request_count_twice() {
    for sweeps in [false, true] {
        let (disk, clock) = (SimDisk::new(1), ManualClock::new(at(0)));
        let owner = open(&disk, &clock);
        let quota = define(&owner);
        assert_eq!(ask(&owner, quota, 1), 1);
        clock.set(at(0).saturating_add(WINDOW + Duration::from_mins(1)));
        assert_eq!(ask(&owner, quota, 2), 2);
        if sweeps {
            owner.engine.sweep();
        }
        clock.set(at(0));
        assert_eq!(ask(&owner, quota, 1), 2);
        // Time that passes is believed.
        clock.advance(3 * WINDOW);
        owner.engine.sweep();
        assert_eq!(owner.engine.stats().answers, 0);
    }
}

/// A retry found that the time of its id was over by the clock of that moment, and counted again.
#[test]
fn a_clock_that_is_ahead_makes_no_request_count_twice() {
    let (disk, clock) = (SimDisk::new(1), ManualClock::new(at(0)));
    let owner = open(&disk, &clock);
    let quota = define(&owner);
    assert_eq!(ask(&owner, quota, 1), 1);
    clock.set(at(0).saturating_add(WINDOW + Duration::from_mins(1)));
    assert_eq!(ask(&owner, quota, 1), 1);
    clock.set(at(0));
    // Time that passes is believed, without a sweep.
    clock.advance(WINDOW);
    assert_eq!(ask(&owner, quota, 1), 2);
}

/// The counters of a window that is over only by a clock that is ahead were forgotten for new ones,
/// and so could not be used any more once it was set right.
#[test]
fn a_clock_that_is_ahead_forgets_no_counter() {
    let (disk, clock) = (SimDisk::new(1), ManualClock::new(at(0)));
    let owner = open(&disk, &clock);
    let hourly = crate::model::Quota::new("hourly", 10).window(crate::model::Window::Hour);
    let quota = owner.engine.define(&hourly).unwrap();
    let consume = |user, amount| {
        let counted = owner.engine.counted(user, quota).unwrap();
        owner.engine.try_consume(&counted, amount, false).unwrap().is_allowed()
    };
    assert!(consume(1, 10));
    clock.set(at(2 * HOUR));
    for user in 2..400 {
        assert!(consume(user, 1));
        if user % 10 == 0 {
            owner.engine.sync().unwrap();
        }
    }
    clock.set(at(0));
    assert_eq!(used(&owner, 1, quota), 10);
    assert!(!consume(1, 1));
    // Time that passes is believed.
    clock.advance(Duration::from_millis(2 * HOUR));
    assert!(consume(1, 10));
}
