//! Models of one lane: writers against the drainer's reads.
//!
//! loom runs a thread's loads in program order, so that a load which the machine moves behind a
//! later store is beyond these models: that `free` is a Release and `limit` an Acquire rests on the
//! argument at the head of the module.

use std::sync::Arc;

use loom::thread;

use super::*;
use crate::model::{QuotaId, WindowStart};
use crate::sync::{explore, yield_now};
use crate::wal::region::Region;

const SALT: u64 = 5;

pub(crate) fn record(user: u64) -> Record {
    Record { user, quota: QuotaId(3), window: WindowStart(86_400_000), delta: 1 }
}

fn slots(words: Arc<[AtomicU64]>, capacity: u64) -> Slots {
    Slots::new(Region::heap(words), capacity).expect("words for so many")
}

pub(crate) fn lane(capacity: u64) -> Lane {
    let words = (0..capacity * SLOT_WORDS as u64).map(|_| AtomicU64::new(0)).collect();
    Lane::new(slots(words, capacity), 0, Seal::sure(SALT))
}

/// What a recovery would find now, whatever the tail says.
pub(crate) fn found(lane: &Lane) -> Vec<Record> {
    (0..lane.capacity()).map_while(|number| lane.read(number)).collect()
}

/// Appends, waiting for room where there is none.
fn append(lane: &Lane, user: u64) {
    loop {
        if let Ok(mut permit) = lane.try_lock(1) {
            permit.append(&record(user));
            return;
        }
        yield_now();
    }
}

/// What the tail says is there is there, whole.
///
/// Fails when the store in `Permit::drop` is Relaxed, when the load in `tail` is Relaxed, or when
/// `append` counts the record up before its words are stored and publishes it.
#[test]
fn loom_what_is_published_is_complete() {
    explore(|| {
        let lane = Arc::new(lane(2));
        let reader = thread::spawn({
            let lane = Arc::clone(&lane);
            move || {
                let tail = lane.tail();
                for number in 0..tail {
                    assert_eq!(lane.read(number), Some(record(number)));
                }
                tail
            }
        });
        (0..2).for_each(|user| append(&lane, user));
        let tail = reader.join().unwrap();
        assert_eq!(lane.tail(), 2);
        for number in tail..2 {
            assert_eq!(lane.read(number), Some(record(number)));
        }
    });
}

/// Two writers share the lane: no record is lost or overwritten, and who sees the second writer's
/// record sees the first's too.
///
/// Fails when the compare-and-swap in `try_lock` is Relaxed, or is a load and a store.
#[test]
fn loom_the_lock_hands_over_what_was_written() {
    explore(|| {
        let lane = Arc::new(lane(2));
        let writers = [10, 20].map(|user| {
            let lane = Arc::clone(&lane);
            thread::spawn(move || append(&lane, user))
        });
        let read = |number| lane.read(number).expect("published records verify").user;
        for number in 0..lane.tail() {
            read(number);
        }
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        let mut users: Vec<_> = (0..lane.tail()).map(read).collect();
        users.sort_unstable();
        assert_eq!(users, [10, 20]);
    });
}

/// A ring of two slots takes three records: the third only once the first was read.
///
/// Fails when `try_lock` does not look for room, when `limit` allows one record more, or when the
/// drainer frees a slot before it reads it.
#[test]
fn loom_only_freed_slots_are_overwritten() {
    explore(|| {
        let lane = Arc::new(lane(2));
        let writer = thread::spawn({
            let lane = Arc::clone(&lane);
            move || (0..3).for_each(|user| append(&lane, user))
        });
        let mut drained = 0;
        while drained < 3 {
            let tail = lane.tail();
            if drained == tail {
                yield_now();
            }
            while drained < tail {
                assert_eq!(lane.read(drained), Some(record(drained)));
                drained += 1;
                lane.free(drained);
            }
        }
        writer.join().unwrap();
    });
}

/// What recovery would read at any instant while a ring is written to: whole records without a gap,
/// and all that were acknowledged.
///
/// Fails when the check leaves a word of the slot out, or does not cover the number.
#[test]
fn loom_a_scan_finds_whole_records_only() {
    explore(|| {
        let words: Arc<[AtomicU64]> =
            (0..2 * SLOT_WORDS as u64).map(|_| AtomicU64::new(0)).collect();
        let seal = Seal::sure(SALT);
        let lane = Arc::new(Lane::new(slots(Arc::clone(&words), 2), 0, seal));
        append(&lane, 0);
        append(&lane, 1);
        lane.free(1);
        let writer = thread::spawn({
            let lane = Arc::clone(&lane);
            move || append(&lane, 2)
        });
        let mut found = Vec::new();
        let scan = scan_ring(&slots(words, 2), seal, 1, &mut |_, what| {
            match what {
                Found::Add(record) => found.push(record),
                // Only here a slot can be stored between two looks.
                Found::Operation(operation) => found.extend(operation.adds()),
            }
            Ok(())
        });
        let scan = scan.expect("visits succeed");
        assert!((1..=2).contains(&scan.records));
        assert_eq!(found, [record(1), record(2)][..found.len()]);
        writer.join().unwrap();
    });
}

/// What recovery would read at any instant while an operation of two records is written: both or
/// none. A drainer sees it only when it is complete.
///
/// Fails when `scan_ring` takes an operation that is cut short, and when `append_operation` counts
/// what follows from 1.
#[test]
fn loom_an_operation_is_complete_or_absent() {
    explore(|| {
        let words: Arc<[AtomicU64]> =
            (0..4 * SLOT_WORDS as u64).map(|_| AtomicU64::new(0)).collect();
        let seal = Seal::sure(SALT);
        let lane = Arc::new(Lane::new(slots(Arc::clone(&words), 4), 0, seal));
        append(&lane, 0);
        let writer = thread::spawn({
            let lane = Arc::clone(&lane);
            move || {
                let Ok(mut permit) = lane.try_lock(2) else { panic!("nobody else writes") };
                permit.append_operation(2, [record(1), record(2)].map(Item::Add).into_iter());
            }
        });
        let mut found = Vec::new();
        let scan = scan_ring(&slots(words, 4), seal, 0, &mut |_, what| {
            match what {
                Found::Add(record) => found.push(record),
                Found::Operation(operation) => found.extend(operation.adds()),
            }
            Ok(())
        });
        let scan = scan.expect("visits succeed");
        assert!([1, 3].contains(&scan.records), "{scan:?}");
        assert_eq!(scan.end, scan.records);
        assert!(found.iter().copied().eq((0..scan.records).map(record)));
        let tail = lane.tail();
        let mut operation = Operation::default();
        assert!(tail == 1 || lane.read_operation(1, &mut operation).is_some());
        writer.join().unwrap();
        assert_eq!(lane.tail(), 3);
    });
}
