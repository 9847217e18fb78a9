//! How reservations and requests end, and what is said of it to whoever asks again, comes late or
//! finds no room. On a simulated disk, without threads but where a test starts them.

use std::sync::Arc;
use std::time::Duration;

use super::order_tests::{START, consume, define, open, small, used};
use super::*;
use crate::clock::{Clock, ManualClock};
use crate::ledger::Settlement;
use crate::model::{AMOUNT_MAX, Consume, Decisions, Overrun, Quota, ReservationId, Window};
use crate::reservation::Reservation;
use crate::storage::sim::SimDisk;

const MINUTE: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_hours(24);
/// So long that a test which waited for it would not go unnoticed, nor for ever.
const DEADLINE: Duration = Duration::from_secs(20);

fn clock() -> ManualClock {
    ManualClock::new(Timestamp::from_unix_millis(START))
}

fn open_with(disk: &Arc<SimDisk>, clock: &ManualClock, config: Config) -> Owner {
    Owner::open_at_rest(&disk.storage(), config.clock(Arc::new(clock.clone()))).unwrap()
}

fn reserve(owner: &Owner, quota: QuotaId, amount: u64, ttl: Duration) -> ReservationId {
    let item = Consume { user: 1, quota, amount };
    owner.engine.reserve(&[item], ttl).unwrap().unwrap()
}

fn reserved(owner: &Owner, quota: QuotaId) -> u64 {
    owner.engine.usage(&owner.engine.counted(1, quota).unwrap()).reserved
}

/// Until no lane has room for so many records.
fn fill(owner: &Owner, quota: QuotaId, slots: u64) {
    while !owner.engine.lanes.iter().all(|lane| lane.lacks_room(slots)) {
        consume(owner, 2, quota, false).unwrap();
    }
}

fn wait_for_waits(owner: &Owner, count: u64) {
    while owner.engine.stats().backpressure_waits < count {
        std::thread::yield_now();
    }
}

fn is_settled(result: Result<Decisions>, settlement: Settlement) -> bool {
    matches!(result, Err(Error::ReservationSettled { how, .. }) if how == settlement)
}

/// An error is no answer: once remembered, it was given again when the amount did fit, and what was
/// asked instead was a mismatch.
#[test]
fn an_overflow_is_not_remembered() {
    let (disk, clock) = (SimDisk::new(1), clock());
    let owner = open_with(&disk, &clock, small());
    let quota = owner.engine.define(&Quota::new("daily", 5).window(Window::Day)).unwrap();
    let once = |owner: &Owner, amount| {
        let counted = owner.engine.counted(1, quota).unwrap();
        owner.engine.consume_once(9, counted, amount, &[]).map(|usage| usage.used)
    };
    let counted = owner.engine.counted(1, quota).unwrap();
    owner.engine.consume(&counted, AMOUNT_MAX, false).unwrap();
    for amount in [1, 2] {
        let refused = once(&owner, amount);
        assert!(matches!(refused, Err(Error::Overflow { .. })), "{refused:?}");
    }
    disk.kill();
    drop(owner);
    let owner = open_with(&disk, &clock, small());
    clock.advance(DAY);
    assert_eq!(once(&owner, 2).unwrap(), 2);
    assert_eq!(once(&owner, 2).unwrap(), 2);
    let other = once(&owner, 1);
    assert!(matches!(other, Err(Error::RequestMismatch { .. })), "{other:?}");
    assert_eq!(used(&owner, 1, quota), 2);
}

/// The work is done, whatever became of the commit: the `?` behind it once gave all of it back.
#[test]
fn a_commit_that_failed_gives_nothing_back() {
    let disk = SimDisk::new(1);
    let owner = Arc::new(open(&disk));
    let keepers = Keepers::new(&owner);
    let quota = define(&owner);
    let handle = |id| Reservation::new(&keepers, id, false);
    let id = reserve(&owner, quota, 5, MINUTE);
    let mut reservation = handle(id);
    fill(&owner, quota, 1);
    let full = reservation.commit(5);
    assert!(matches!(full, Err(Error::Backpressure { .. })), "{full:?}");
    owner.engine.committer.commit().unwrap();
    drop(reservation);
    assert_eq!(reserved(&owner, quota), 5);
    let mut reservation = handle(id);
    let mistaken = reservation.commit_items(&[Consume { user: 2, quota, amount: 1 }]);
    assert!(matches!(mistaken, Err(Error::ReservationMismatch { .. })), "{mistaken:?}");
    drop(reservation);
    assert_eq!(reserved(&owner, quota), 5);
    assert!(owner.engine.commit(id, Charge::Same(3)).unwrap().is_allowed());
    assert_eq!((used(&owner, 1, quota), reserved(&owner, quota)), (3, 0));
}

/// A denial is an answer, and the handle still stands for what is reserved.
#[test]
fn a_commit_that_was_denied_leaves_its_handle_in_charge() {
    let disk = SimDisk::new(1);
    let owner = Arc::new(open(&disk));
    let quota = Quota::new("strict", 10).overrun(Overrun::Refuse);
    let quota = owner.engine.define(&quota).unwrap();
    let id = reserve(&owner, quota, 5, MINUTE);
    let mut reservation = Reservation::new(&Keepers::new(&owner), id, false);
    assert!(reservation.commit(11).unwrap().is_denied());
    drop(reservation);
    assert_eq!(used(&owner, 1, quota), 0);
}

/// Who waits for room has taken nothing meanwhile: repeated commits once waited one after the
/// other, each for a deadline of its own, and kept a processor busy until it was their turn.
#[test]
fn repeated_commits_wait_for_room_together() {
    let (disk, clock) = (SimDisk::new(1), clock());
    let owner = open_with(&disk, &clock, small().backpressure_deadline(DEADLINE));
    let quota = define(&owner);
    let id = reserve(&owner, quota, 5, MINUTE);
    fill(&owner, quota, 1);
    std::thread::scope(|scope| {
        let commit = || owner.engine.commit(id, Charge::Same(3));
        let cancel = || owner.engine.cancel(id).map(|()| Decisions::new(Timestamp::MIN, []));
        let waiting = [scope.spawn(commit), scope.spawn(commit), scope.spawn(cancel)];
        wait_for_waits(&owner, 3);
        assert!(waiting.iter().all(|call| !call.is_finished()), "one after the other");
        owner.engine.committer.commit().unwrap();
        let ends = waiting.map(|call| call.join().unwrap());
        assert_eq!(ends.iter().filter(|end| end.is_ok()).count(), 1, "{ends:?}");
    });
}

/// A clock that is looked at, and does not say when it changes.
#[derive(Debug)]
struct Unpushed(ManualClock);

impl Clock for Unpushed {
    fn now(&self) -> Timestamp {
        self.0.now()
    }

    fn monotonic(&self) -> Duration {
        self.0.monotonic()
    }
}

/// The time to live once counted from the call: what had waited longer than that for room was
/// handed out expired.
#[test]
fn a_reservation_that_waited_for_room_lives_as_long_as_any() {
    let ttl = Duration::from_millis(100);
    for is_once in [false, true] {
        let (disk, clock) = (SimDisk::new(1), clock());
        let config = small().backpressure_deadline(DEADLINE);
        let config = config.clock(Arc::new(Unpushed(clock.clone())));
        let owner = Owner::open_at_rest(&disk.storage(), config).unwrap();
        let quota = define(&owner);
        fill(&owner, quota, 2);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                if !is_once {
                    return reserve(&owner, quota, 5, ttl);
                }
                let counted = owner.engine.counted(1, quota).unwrap();
                let reserved = owner.engine.reserve_once(7, counted, 5, ttl).unwrap();
                let ReservedOnce::Now(id) = reserved else { panic!("{reserved:?}") };
                id
            });
            wait_for_waits(&owner, 1);
            clock.advance(MINUTE);
            owner.engine.committer.commit().unwrap();
            let id = waiting.join().unwrap();
            owner.engine.clock.refresh();
            assert!(owner.engine.commit(id, Charge::Same(3)).unwrap().is_allowed());
        });
    }
}

/// Whoever gives a reservation back may need more records than there is room for, and a check
/// waited for it until its deadline.
#[test]
fn a_check_waits_for_nobody_who_waits_for_room() {
    let (disk, clock) = (SimDisk::new(1), clock());
    let owner = open_with(&disk, &clock, small().backpressure_deadline(DEADLINE));
    let ten = owner.engine.define(&Quota::new("ten", 10)).unwrap();
    let quota = define(&owner);
    let id = reserve(&owner, ten, 5, Duration::from_millis(1));
    clock.advance(MINUTE);
    owner.engine.clock.refresh();
    fill(&owner, quota, 2);
    std::thread::scope(|scope| {
        let late = scope.spawn(|| owner.engine.commit(id, Charge::Same(3)));
        wait_for_waits(&owner, 1);
        let counted = owner.engine.counted(1, ten).unwrap();
        assert!(owner.engine.check(&counted, 10).unwrap().is_denied());
        assert!(!late.is_finished(), "the check waited for it");
        owner.engine.committer.commit().unwrap();
        assert!(is_settled(late.join().unwrap(), Settlement::Expired));
    });
}

/// What a commit finds to be over is over for an extension too: it once began to live again.
#[test]
fn an_extension_does_not_revive_what_is_over() {
    let (disk, clock) = (SimDisk::new(1), clock());
    let owner = open_with(&disk, &clock, small());
    let quota = define(&owner);
    let id = reserve(&owner, quota, 5, MINUTE);
    clock.advance(MINUTE);
    for _ in 0..2 {
        let late = owner.engine.extend(id, MINUTE);
        let how = Settlement::Expired;
        assert!(matches!(late, Err(Error::ReservationSettled { how: h, .. }) if h == how));
    }
    assert_eq!(used(&owner, 1, quota), 0);
    assert_eq!(owner.engine.stats().reservations_expired, 1);
    let id = reserve(&owner, quota, 5, MINUTE);
    clock.advance(MINUTE);
    fill(&owner, quota, 1);
    let late = owner.engine.extend(id, MINUTE);
    assert!(matches!(late, Err(Error::Backpressure { .. })), "{late:?}");
    assert_eq!(used(&owner, 1, quota), 5);
}

/// The answer once hung on whether anything was counted since the window was over.
#[test]
fn an_overrun_of_a_window_that_is_over_is_refused() {
    let answers = [false, true].map(|is_touched| {
        let (disk, clock) = (SimDisk::new(1), clock());
        let owner = open_with(&disk, &clock, small());
        let quota = Quota::new("daily", 10).window(Window::Day).overrun(Overrun::Refuse);
        let quota = owner.engine.define(&quota).unwrap();
        let id = reserve(&owner, quota, 4, 2 * DAY);
        clock.advance(DAY);
        owner.engine.clock.refresh();
        if is_touched {
            consume(&owner, 1, quota, false).unwrap();
        }
        let refused = owner.engine.commit(id, Charge::Same(6)).unwrap();
        assert!(refused.is_denied(), "{refused:?}");
        assert_eq!(refused.get(0).unwrap().used, 0, "nothing is known of it any more");
        let charged = owner.engine.commit(id, Charge::Same(4)).unwrap();
        assert!(charged.is_allowed(), "{charged:?}");
        assert_eq!(used(&owner, 1, quota), u64::from(is_touched));
        (refused, charged)
    });
    assert_eq!(answers[0], answers[1]);
}
