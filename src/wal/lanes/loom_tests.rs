//! Models of all lanes: who takes which, and closing.

use std::sync::Arc;

use loom::thread;

use super::*;
use crate::seats::sit_at;
use crate::sync::{explore, yield_now};
use crate::wal::lane::loom_tests::{lane, record};

fn lanes(count: usize) -> Arc<Lanes> {
    Arc::new(Lanes::new((0..count).map(|_| lane(2)).collect()))
}

fn append(lanes: &Lanes, user: u64) -> Result<(), NoLane> {
    let (_, mut permit) = lanes.acquire(1)?;
    permit.append(&record(user));
    Ok(())
}

fn users(lanes: &Lanes) -> Vec<u64> {
    let read = |lane: &Lane| -> Vec<u64> {
        (0..lane.tail()).map(|n| lane.read(n).expect("published records verify").user).collect()
    };
    let mut users: Vec<_> = lanes.iter().flat_map(read).collect();
    users.sort_unstable();
    users
}

/// Two writers, each with two records, and two lanes of two slots: both begin with the same lane,
/// and make way for each other.
///
/// Fails when the compare-and-swap in `Lane::try_lock` is a load and a store, when it is Relaxed,
/// or when `Permit::drop` does not unlock.
#[test]
fn loom_writers_make_way_for_each_other() {
    explore(|| {
        let lanes = lanes(2);
        let writers = [10, 20].map(|user| {
            let lanes = Arc::clone(&lanes);
            thread::spawn(move || {
                append(&lanes, user).expect("there is room");
                append(&lanes, user + 1).expect("there is room");
            })
        });
        users(&lanes);
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        assert_eq!(users(&lanes), [10, 11, 20, 21]);
    });
}

/// A thread that dies with a lane costs that lane, and nobody waits for it.
///
/// Once the others are full too the answer is that there is no room, so that the caller's deadline
/// holds.
///
/// Fails when a writer waits for its preferred lane, when `try_lock` takes a locked one, or when
/// `acquire` tries a held lane for ever.
#[test]
fn loom_an_abandoned_lane_holds_nobody_up() {
    explore(|| {
        let lanes = lanes(2);
        let dead = thread::spawn({
            let lanes = Arc::clone(&lanes);
            move || {
                let (index, permit) = lanes.acquire(1).expect("there is room");
                permit.keep();
                index
            }
        });
        append(&lanes, 10).expect("there is room");
        let abandoned = dead.join().unwrap();
        append(&lanes, 11).expect("there is room");
        let left = lanes.get(1 - abandoned).expect("two lanes");
        let results = [append(&lanes, 12), append(&lanes, 13)];
        assert_eq!(left.tail(), 2);
        assert_eq!(results[1], Err(NoLane::Full));
    });
}

/// After `close` nothing is appended any more, and an operation that was not acknowledged by then
/// is refused.
///
/// Fails when `close` drops the permits instead of keeping them, passes over a lane that is held,
/// or stores `closed` after it took the lanes (a writer then waits for good).
#[test]
fn loom_nothing_is_appended_after_closing() {
    explore(|| {
        let lanes = lanes(2);
        let writer = thread::spawn({
            let lanes = Arc::clone(&lanes);
            move || [append(&lanes, 10), append(&lanes, 11)]
        });
        lanes.close();
        let at_close = users(&lanes);
        let results = writer.join().unwrap();
        assert_eq!(users(&lanes), at_close);
        let acknowledged: Vec<_> = results
            .iter()
            .zip([10, 11])
            .filter_map(|(result, user)| result.is_ok().then_some(user))
            .collect();
        assert_eq!(at_close, acknowledged);
        assert!(results.iter().all(|result| !matches!(result, Err(NoLane::Full))));
        assert_eq!(append(&lanes, 12), Err(NoLane::Closed));
    });
}

/// A thread goes in and out of its own lane while the drainer takes it away for a moment: each
/// record is where its writer left it.
///
/// Fails without either barrier, when `try_enter` does not look again whether the lane is its own,
/// when `take_away` does not wait until the owner is outside, and when `Permit::drop` says that it
/// is outside before it has stored the state.
#[test]
fn loom_an_owner_and_who_borrows_its_lane_exclude_each_other() {
    explore(|| {
        let lanes = Arc::new(Lanes::new(vec![lane(4)]));
        let owner = thread::spawn({
            let lanes = Arc::clone(&lanes);
            move || {
                sit_at(1);
                append(&lanes, 10).expect("there is room");
                while append(&lanes, 11) == Err(NoLane::Full) {
                    yield_now();
                }
            }
        });
        let lane = lanes.get(0).expect("one lane");
        if let Some(mut permit) = lanes.borrow(lane) {
            permit.append(&record(20));
        }
        owner.join().unwrap();
        let users = users(&lanes);
        assert!(users == [10, 11] || users == [10, 11, 20], "{users:?}");
    });
}

/// A thread whose lane is full goes on in another, and gives the full one up while the drainer
/// takes that away: it is left to whoever comes next, and no record is lost.
///
/// Fails when `Lane::give_up` does not unlock, or unlocks a lane that was taken away, and when
/// `Permit::keep_for` says with a Relaxed store where the thread is: who waits for it to leave the
/// full lane then does not see what it stored there last.
#[test]
fn loom_a_full_lane_is_given_up() {
    explore(|| {
        let lanes = lanes(2);
        let owner = thread::spawn({
            let lanes = Arc::clone(&lanes);
            move || {
                sit_at(1);
                for user in 10..13 {
                    append(&lanes, user).expect("there is room in the other lane");
                }
            }
        });
        let lane = lanes.get(0).expect("two lanes");
        if let Some(permit) = lanes.borrow(lane) {
            yield_now();
            assert_eq!(lane.tail(), permit.next(), "nobody else is in it");
            assert!(lane.try_lock(0).is_err(), "it is taken");
        }
        owner.join().unwrap();
        assert_eq!(users(&lanes), [10, 11, 12]);
        // Still its owner's, maybe: the drainer gave it back to a thread that had gone on.
        assert!(lane.take_away(&lanes.seats, Then::Nobodys, 0).is_ok(), "nobody is in it");
    });
}

/// Two threads with a seat each and one lane: it becomes one that both share.
///
/// Fails when a lane is taken away without a compare-and-swap, or when it is kept by one while it
/// is shared.
#[test]
fn loom_more_threads_than_lanes_share_one() {
    explore(|| {
        let lanes = Arc::new(Lanes::new(vec![lane(4)]));
        let writers = [1, 2].map(|seat| {
            let lanes = Arc::clone(&lanes);
            thread::spawn(move || {
                sit_at(seat);
                while append(&lanes, seat) == Err(NoLane::Full) {
                    yield_now();
                }
            })
        });
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        assert_eq!(users(&lanes), [1, 2]);
    });
}

/// As [`loom_nothing_is_appended_after_closing`], with a writer that owns its lane.
///
/// Fails as that one does, and when `close` does not take lanes away from their owners.
#[test]
fn loom_an_owner_appends_nothing_after_closing() {
    explore(|| {
        let lanes = lanes(1);
        let writer = thread::spawn({
            let lanes = Arc::clone(&lanes);
            move || {
                sit_at(1);
                [append(&lanes, 10), append(&lanes, 11)]
            }
        });
        lanes.close();
        let at_close = users(&lanes);
        let results = writer.join().unwrap();
        assert_eq!(users(&lanes), at_close);
        let acknowledged = results.iter().filter(|result| result.is_ok()).count();
        assert_eq!(at_close.len(), acknowledged);
        assert!(results.iter().all(|result| !matches!(result, Err(NoLane::Full))));
    });
}
