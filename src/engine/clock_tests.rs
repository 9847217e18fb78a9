//! A clock that is set: no request that was answered lately counts twice, and no counter is lost to
//! a window that is years away. On a simulated disk, without threads.

use std::sync::Arc;
use std::time::Duration;

use super::order_tests::{START, Silent, define, small, used};
use super::*;
use crate::clock::{Clock, ManualClock};
use crate::model::{Consume, Quota, Timestamp, Window};
use crate::recovery::Finding;
use crate::storage::sim::SimDisk;

const WINDOW: Duration = Duration::from_mins(10);
const HOUR: u64 = 3_600_000;
const SECOND: Duration = Duration::from_secs(1);

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
    let quota = owner.engine.define(&Quota::new("hourly", 10).window(Window::Hour)).unwrap();
    let consume = |user, amount| try_consume(&owner, user, quota, amount);
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

const YEAR: u64 = 365 * 24 * HOUR;

fn open_keeping(disk: &Arc<SimDisk>, clock: &ManualClock, retention: Duration) -> Owner {
    let config = small().closed_window_retention(retention).clock(Arc::new(clock.clone()));
    Owner::open_at_rest(&disk.storage(), config).unwrap()
}

/// Ten a day.
fn daily(owner: &Owner) -> QuotaId {
    owner.engine.define(&Quota::new("daily", 10).window(Window::Day)).unwrap()
}

fn try_consume(owner: &Owner, user: u64, quota: QuotaId, amount: u64) -> bool {
    let counted = owner.engine.counted(user, quota).unwrap();
    owner.engine.try_consume(&counted, amount, true).unwrap().is_allowed()
}

fn findings(owner: &Owner) -> Vec<String> {
    owner.engine.report().findings.iter().map(Finding::to_string).collect()
}

/// Who was counted while the clock was ahead for a moment was refused for ten years: also after a
/// restart, which took the newest window for the present one.
#[test]
fn a_restart_ends_what_a_clock_that_was_ahead_began() {
    for merges in [false, true] {
        let (disk, clock) = (SimDisk::new(1), ManualClock::new(at(0)));
        let owner = open(&disk, &clock);
        let quota = daily(&owner);
        assert!(try_consume(&owner, 1, quota, 3));
        clock.set(at(10 * YEAR));
        assert!(try_consume(&owner, 1, quota, 10));
        clock.set(at(0));
        assert!(!try_consume(&owner, 1, quota, 1));
        assert!(try_consume(&owner, 2, quota, 1));
        for used_up in [3, 10] {
            if merges {
                owner.engine.snapshot().unwrap();
            }
            disk.kill();
            let owner = open(&disk, &clock);
            assert_eq!((used(&owner, 1, quota), used(&owner, 2, quota)), (used_up, 1));
            let [finding] = &findings(&owner)[..] else { panic!("nothing is said of it") };
            assert!(finding.contains("\"daily\": counters not loaded: 1, in"), "{finding}");
            assert_eq!(try_consume(&owner, 1, quota, 7), used_up == 3);
        }
        // What was counted is counted, in its window.
        disk.kill();
        clock.set(at(10 * YEAR));
        let owner = open(&disk, &clock);
        assert_eq!((used(&owner, 1, quota), findings(&owner)), (10, vec![]));
    }
}

/// A machine that has forgotten the time, and finds out once the directory is open: all goes on as
/// it was.
#[test]
fn a_clock_that_is_behind_at_open_gives_nothing_back() {
    for merges in [false, true] {
        let (disk, clock) = (SimDisk::new(1), ManualClock::new(at(0)));
        // So long that no floor is near.
        let open = || open_keeping(&disk, &clock, Duration::from_hours(24 * 30));
        let owner = open();
        let quota = daily(&owner);
        assert!(try_consume(&owner, 1, quota, 10));
        if merges {
            owner.engine.snapshot().unwrap();
        }
        disk.kill();
        drop(owner);
        clock.set(Timestamp::from_unix_millis(1000));
        let owner = open();
        assert!(!try_consume(&owner, 1, quota, 1));
        clock.set(at(HOUR));
        assert!(!try_consume(&owner, 1, quota, 1));
        assert_eq!(used(&owner, 1, quota), 10);
    }
}

/// Nor one that is set back by less than a day.
#[test]
fn a_clock_that_was_ahead_by_hours_gives_nothing_back() {
    let (disk, clock) = (SimDisk::new(1), ManualClock::new(at(24 * HOUR)));
    let owner = open(&disk, &clock);
    let quota = daily(&owner);
    assert!(try_consume(&owner, 1, quota, 10));
    clock.set(at(HOUR));
    assert!(try_consume(&owner, 2, quota, 1));
    disk.kill();
    drop(owner);
    let owner = open(&disk, &clock);
    assert_eq!((used(&owner, 1, quota), findings(&owner)), (10, vec![]));
}

/// Nor where a merge has forgotten the windows before: then that is the present one.
#[test]
fn a_window_before_which_all_is_forgotten_is_loaded_however_far_ahead() {
    let (disk, clock) = (SimDisk::new(1), ManualClock::new(at(10 * YEAR)));
    let open = || open_keeping(&disk, &clock, Duration::ZERO);
    let owner = open();
    let quota = daily(&owner);
    assert!(try_consume(&owner, 1, quota, 4));
    owner.engine.snapshot().unwrap();
    clock.set(at(0));
    for used_up in [4, 7] {
        disk.kill();
        let owner = open();
        assert_eq!(used(&owner, 1, quota), used_up);
        assert!(try_consume(&owner, 1, quota, 3));
    }
}

/// What was reserved while the clock was ahead is settled in its window; the counter stays in the
/// present one.
#[test]
fn a_reservation_of_a_window_that_is_years_away_leaves_the_present_one_alone() {
    let (disk, clock) = (SimDisk::new(1), ManualClock::new(at(10 * YEAR)));
    let owner = open(&disk, &clock);
    let quota = daily(&owner);
    let item = Consume { user: 1, quota, amount: 8 };
    let id = owner.engine.reserve(&[item], Duration::from_hours(1)).unwrap().unwrap();
    clock.set(at(0));
    assert!(try_consume(&owner, 2, quota, 1));
    disk.kill();
    drop(owner);
    let owner = open(&disk, &clock);
    assert!(try_consume(&owner, 1, quota, 4));
    assert!(owner.engine.commit(id, Charge::Same(2)).unwrap().is_allowed());
    assert_eq!(used(&owner, 1, quota), 4);
    assert!(try_consume(&owner, 1, quota, 6));
    disk.kill();
    drop(owner);
    clock.set(at(10 * YEAR));
    assert_eq!(used(&open(&disk, &clock), 1, quota), 2);
}

/// A clock that looks whether what is known of request 7 is locked when it is asked for the first
/// time after it was armed.
#[derive(Debug)]
struct Looking {
    inner: ManualClock,
    armed: Mutex<Option<Arc<Owner>>>,
    found: Mutex<Vec<bool>>,
}

impl Clock for Looking {
    fn now(&self) -> Timestamp {
        let armed = self.armed.lock().take();
        if let Some(owner) = armed {
            self.found.lock().push(owner.engine.answers.is_locked(7));
        }
        self.inner.now()
    }

    fn monotonic(&self) -> Duration {
        self.inner.monotonic()
    }
}

/// A clock that asks the engine in its turn would once have waited for itself.
#[test]
fn before_a_denial_the_clock_is_asked_without_the_lock_of_the_request() {
    let disk = SimDisk::new(1);
    let inner = ManualClock::new(Timestamp::from_unix_millis(START));
    let clock = Arc::new(Looking { inner, armed: Mutex::default(), found: Mutex::default() });
    let config = small().clock(Arc::clone(&clock) as _);
    let owner = Arc::new(Owner::open_at_rest(&disk.storage(), config).unwrap());
    let quota = owner.engine.define(&Quota::new("five", 5)).unwrap();
    let counted = owner.engine.counted(1, quota).unwrap();
    *clock.armed.lock() = Some(Arc::clone(&owner));
    assert!(owner.engine.try_consume_once(7, counted, 6).unwrap().is_denied());
    assert_eq!(*clock.found.lock(), [false]);
    assert!(owner.engine.try_consume_once(7, counted, 6).unwrap().is_denied());
}

/// The quick way to a denial looks at the counter by the real clock too, and leaves to the slow way
/// whatever that may decide otherwise.
#[test]
fn a_quick_denial_is_as_sure_as_a_slow_one() {
    let (disk, clock) = (SimDisk::new(1), ManualClock::new(at(0)));
    let config = small().clock(Arc::new(Silent(clock.clone())));
    let owner = Owner::open_at_rest(&disk.storage(), config).unwrap();
    let engine = &owner.engine;
    let quota = engine.define(&Quota::new("per-minute", 5).window(Window::Minute)).unwrap();
    for user in [1, 2] {
        // One of them through a handle.
        let by_key = engine.counted(user, quota).unwrap();
        let handle = (user == 2).then(|| engine.share(&by_key).unwrap());
        let counted = Counted { cell: handle.as_ref().map(|handle| handle.cell()), ..by_key };
        let deny = |amount| engine.deny_fast(&counted, amount);
        engine.consume(&counted, 3, false).unwrap();
        // Until its shard is open.
        (0..10).for_each(|_| assert!(engine.check(&counted, 2).unwrap().is_allowed()));
        let denial = deny(3).expect("it does not fit");
        assert!(denial.is_denied());
        assert_eq!((denial.used, denial.limit, denial.remaining), (3, 5, 2));
        assert_eq!(engine.try_consume(&counted, 3, false).unwrap(), denial);
        assert_eq!(deny(2), None);
        if let Some(cell) = counted.cell {
            let window = counted.quota.window_at(engine.clock.now());
            let seen = cell.live().cell.try_hold(window).unwrap();
            assert_eq!(deny(3), None, "who holds it may give back");
            cell.live().cell.release(seen, seen);
            assert_eq!(deny(3), Some(denial));
        }
        let reserved = engine.reserve(&[Consume { user, quota, amount: 2 }], SECOND).unwrap();
        assert!(reserved.is_ok() && deny(1).is_some());
        clock.advance(SECOND);
        assert_eq!(deny(1), None, "what was reserved is over");
        assert!(engine.try_consume(&counted, 2, false).unwrap().is_allowed());
        assert!(deny(1).is_some());
        clock.advance(Duration::from_mins(1));
        assert_eq!(deny(1), None, "another window has begun");
        assert!(engine.try_consume(&counted, 5, false).unwrap().is_allowed());
    }
}
