//! Numbers, places, and what is open and over.

use super::*;
use crate::model::{AMOUNT_MAX, QuotaId, WindowStart};

const PART: Part = Part { user: 7, quota: QuotaId(1), window: WindowStart(0), amount: 5 };

fn at(millis: u64) -> Timestamp {
    Timestamp::from_unix_millis(millis)
}

fn open(reservations: &Reservations, expires: u64) -> ReservationId {
    let opening = reservations.begin(0).expect("there is room");
    reservations.reserve(&PART);
    let id = opening.id();
    opening.open(at(expires), smallvec::smallvec![PART]);
    id
}

#[test]
fn places_are_bounded_and_come_back() {
    let reservations = Reservations::new(1, 0, 2, RandomState::default());
    assert_eq!(reservations.reserved(PART.key()), 0);
    let first = open(&reservations, 10);
    // Nothing is taken that is not opened.
    let opening = reservations.begin(0).expect("a second");
    drop(opening);
    let second = open(&reservations, 10);
    assert!(first != second && reservations.begin(0).is_none());
    assert_eq!((reservations.len(), reservations.reserved(PART.key())), (2, 10));
    let Take::Taken(taken) = reservations.take(first) else { panic!("it is open") };
    assert!(matches!(reservations.take(first), Take::Busy));
    assert!(reservations.open_one(first).is_none());
    reservations.unreserve(&PART);
    let mut is_remembered = false;
    taken.settled(|| is_remembered = true);
    assert!(is_remembered && matches!(reservations.take(first), Take::Gone));
    assert!(reservations.open_one(first).is_none());
    assert_eq!((reservations.len(), reservations.reserved(PART.key())), (1, 5));
    let third = open(&reservations, 10);
    assert!(reservations.begin(1).is_none());
    let one = reservations.open_one(third).expect("it is open");
    assert_eq!((one.expires, one.part), (at(10), PART));
    one.settled(|| ());
    assert!(matches!(reservations.take(third), Take::Gone));
    assert!(reservations.begin(1).is_some());
}

/// Also where shards have places that others want; and recovery may find more than may be.
#[test]
fn as_many_may_be_open_as_the_bound_says() {
    for max in [1, 7, 100, 10_000] {
        let reservations = Reservations::new(1, 0, max, RandomState::default());
        let mut ids: Vec<_> = (0..max)
            .map(|number| {
                // Half of them without waiting, where that is possible.
                let thread = number / 2;
                let begun = reservations.try_begin(thread).filter(|_| number % 2 == 0);
                let opening = begun.or_else(|| reservations.begin(thread)).expect("there is room");
                let id = opening.id();
                opening.open(at(10), smallvec::smallvec![PART]);
                id
            })
            .collect();
        for thread in 0..STRIPES {
            assert!(reservations.try_begin(thread).is_none());
            assert!(reservations.begin(thread).is_none());
        }
        let loaded = ReservationId { generation: 0, number: 5 };
        reservations.load(loaded, at(10), &[PART]);
        assert_eq!(reservations.len(), max + 1);
        ids.push(loaded);
        let mut settle = || {
            let id = ids.pop().expect("one is left");
            reservations.open_one(id).expect("it is open").settled(|| ());
        };
        settle();
        assert!(reservations.begin(0).is_none());
        settle();
        assert!(reservations.begin(0).is_some());
    }
}

/// Recovery may find more reserved than can be used, where a loss of power has left the beginnings
/// and taken the ends: the sum once overflowed.
#[test]
fn more_than_can_be_used_is_reserved_as_what_can() {
    let reservations = Reservations::new(1, 0, 9, RandomState::default());
    let part = Part { amount: AMOUNT_MAX, ..PART };
    for number in 1..=3 {
        let id = ReservationId { generation: 0, number };
        reservations.load(id, at(10), &[part]);
        assert_eq!(reservations.reserved(PART.key()), AMOUNT_MAX);
    }
    for _ in 0..3 {
        reservations.unreserve(&part);
        assert_eq!(reservations.reserved(PART.key()), 0);
    }
}

/// Also by threads that share a stripe, of which there are more than stripes.
#[test]
fn no_number_is_given_twice() {
    let reservations = Reservations::new(1, 0, usize::MAX, RandomState::default());
    let mut numbers: Vec<u64> = std::thread::scope(|scope| {
        let take = |thread| {
            let next = || {
                let opening = reservations.begin(thread).expect("there is room");
                let number = opening.id().number;
                opening.open(at(10), smallvec::smallvec![PART]);
                number
            };
            std::iter::repeat_with(next).take(1000).collect::<Vec<_>>()
        };
        let threads: Vec<_> =
            (0..STRIPES + 4).map(|thread| scope.spawn(move || take(thread))).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("no panic")).collect()
    });
    numbers.sort_unstable();
    assert!(numbers.is_sorted_by(|one, next| one < next));
    assert!(numbers.first().is_some_and(|&first| first > 0));
}

/// A number that two threads have seen is given to the one that comes first.
#[test]
fn a_number_is_looked_at_again_under_its_lock() {
    let reservations = Reservations::new(1, 0, 1000, RandomState::default());
    for _ in 0..20 {
        std::thread::scope(|scope| {
            let opening = reservations.begin(0).expect("there is room");
            let waiting = scope.spawn(|| reservations.begin(0).map(|opening| opening.id()));
            // So that it has seen the number, and waits for the lock.
            std::thread::sleep(std::time::Duration::from_millis(10));
            let first = opening.id();
            opening.open(at(10), smallvec::smallvec![PART]);
            let second = waiting.join().expect("no panic");
            assert!(second.is_some_and(|second| second != first));
        });
    }
}

#[test]
fn who_does_not_wait_begins_where_nothing_is_in_the_way() {
    let reservations = Reservations::new(1, 0, 1000, RandomState::default());
    assert!(reservations.try_begin(0).is_none(), "the thread has no number yet");
    let opening = reservations.begin(0).expect("there is room");
    let id = opening.id();
    assert!(reservations.try_begin(0).is_none(), "another has the lock");
    drop(opening);
    let opening = reservations.try_begin(0).expect("nothing is in the way");
    assert_eq!(opening.id(), id, "it was not opened");
}

/// Threads that share a stripe see the same number, and one after the other gets the lock.
#[test]
fn no_number_is_given_twice_to_those_who_do_not_wait() {
    let reservations = Reservations::new(1, 0, usize::MAX, RandomState::default());
    drop(reservations.begin(0));
    let mut numbers: Vec<u64> = std::thread::scope(|scope| {
        let take = |_| {
            let opening = reservations.try_begin(0)?;
            let id = opening.id();
            opening.open(at(10), smallvec::smallvec![PART]);
            reservations.open_one(id).expect("it is open").settled(|| ());
            Some(id.number)
        };
        let all = move || (0..300_000).filter_map(take).collect::<Vec<_>>();
        let threads: Vec<_> = (0..3).map(|_| scope.spawn(all)).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("no panic")).collect()
    });
    assert!(numbers.len() > 1000);
    numbers.sort_unstable();
    assert!(numbers.is_sorted_by(|one, next| one < next));
}

#[test]
fn what_was_not_settled_is_open_again() {
    let reservations = Reservations::new(1, 0, 2, RandomState::default());
    let id = open(&reservations, 10);
    for _ in 0..2 {
        let Take::Taken(taken) = reservations.take(id) else { panic!("it is open") };
        assert_eq!(taken.parts[..], [PART]);
        let extended = reservations.extend(id, at(9), at(20), || ());
        assert_eq!(extended, None, "it is being settled");
    }
    assert_eq!(reservations.len(), 1);
}

#[test]
fn those_whose_time_is_over_are_found_again_and_again() {
    let reservations = Reservations::new(1, 0, 1000, RandomState::default());
    let late = open(&reservations, 30);
    let ids: Vec<_> = (0..200).map(|n| open(&reservations, 10 + n % 2)).collect();
    assert_eq!(reservations.expired(at(9)), []);
    assert_eq!(reservations.expired(at(10)).len(), 100);
    assert_eq!(reservations.expired(at(11)).len(), 200);
    for id in ids {
        let Take::Taken(taken) = reservations.take(id) else { panic!("it is open") };
        taken.settled(|| ());
    }
    assert_eq!(reservations.expired(at(29)), []);
    assert_eq!(reservations.expired(at(30)), [late]);
    assert_eq!(reservations.extend(late, at(30), at(40), || ()), None, "its time is over");
    assert_eq!(reservations.extend(late, at(29), at(40), || ()), Some(true));
    assert_eq!(reservations.extend(late, at(29), at(35), || ()), Some(false));
    assert_eq!(reservations.expired(at(39)), []);
    assert_eq!(reservations.expired(at(40)), [late]);
}
