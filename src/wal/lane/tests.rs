use super::*;
use crate::model::{QuotaId, ReservationId, Timestamp, WindowStart};
use crate::wal::region::Region;
use crate::wal::region::SLOTS_AT;

const CAPACITY: u64 = 8;

fn record(user: u64) -> Record {
    Record { user, quota: QuotaId(3), window: WindowStart(86_400_000), delta: 1 }
}

/// A ring in which the first record of an operation of four is the fifth, and the last the eighth.
fn ring() -> (Lane, Seal) {
    let words = SLOTS_AT + SLOT_WORDS * usize::try_from(CAPACITY).expect("it is small");
    let words = (0..words).map(|_| AtomicU64::new(0)).collect();
    let Some(slots) = Slots::new(Region::heap(words), CAPACITY) else { panic!("it fits") };
    let seal = Seal::sure(7);
    let lane = Lane::new(slots, 0, seal);
    let Ok(mut permit) = lane.try_lock(CAPACITY) else { panic!("nobody else writes") };
    (0..4).for_each(|user| permit.append(&record(user)));
    let id = ReservationId { generation: 1, number: 1 };
    let open = Item::Open { id, expires: Timestamp::MIN };
    let items = [Item::Add(record(4)), Item::Add(record(5)), Item::Add(record(6)), open];
    permit.append_operation(4, items.into_iter());
    drop(permit);
    (lane, seal)
}

fn scan(lane: &Lane, seal: Seal) -> (RingScan, Vec<u64>) {
    let mut users = Vec::new();
    let scan = scan_ring(&lane.drained.slots, seal, 0, &mut |_, found| {
        match found {
            Found::Add(record) => users.push(record.user),
            Found::Operation(operation) => users.extend(operation.adds().map(|add| add.user)),
        }
        Ok(())
    });
    (scan.expect("no visit fails"), users)
}

fn clear(lane: &Lane, number: u64) {
    for word in lane.drained.slots.get(number) {
        word.store(0, Ordering::Relaxed);
    }
}

/// A process that dies while it writes an operation leaves its first records: no gap, and nothing
/// that counts.
#[test]
fn an_operation_that_is_cut_short_is_absent() {
    let (lane, seal) = ring();
    let (whole, users) = scan(&lane, seal);
    assert_eq!((whole.records, whole.end, whole.beyond_gap), (8, 8, None));
    assert_eq!(users, [0, 1, 2, 3, 4, 5, 6]);
    for left in (0..4).rev() {
        clear(&lane, 4 + left);
        let (cut, users) = scan(&lane, seal);
        assert_eq!((cut.records, cut.end, cut.beyond_gap), (4, 4, None), "{left} records left");
        assert_eq!((users.len(), cut.one_bit_off), (4, None));
    }
}

#[test]
fn a_gap_in_an_operation_is_seen() {
    for missing in 4..7 {
        let (lane, seal) = ring();
        clear(&lane, missing);
        let (torn, users) = scan(&lane, seal);
        assert_eq!((torn.end, torn.beyond_gap), (4, Some(missing + 1)));
        assert_eq!(users.len(), 4);
    }
}

#[test]
fn a_drainer_reads_an_operation_whole() {
    let (lane, _) = ring();
    let mut operation = Operation::default();
    assert_eq!(lane.read(4), None);
    assert_eq!(lane.read_operation(4, &mut operation), Some(()));
    assert_eq!((operation.len(), operation.adds().count()), (4, 3));
    clear(&lane, 7);
    assert_eq!(lane.read_operation(4, &mut operation), None);
}

/// What may hold something is looked at, in a ring that was filled in part, wherever it lies.
#[test]
fn only_what_was_written_is_looked_at_beyond_the_end() {
    let slot = |number: usize| (SLOTS_AT * 8 + SLOT_WORDS * 8 * number) as u64;
    let words: Vec<_> = (0..SLOTS_AT + SLOT_WORDS * 8).map(|_| AtomicU64::new(0)).collect();
    let words: std::sync::Arc<[AtomicU64]> = words.into();
    let slots = |written: Option<Vec<std::ops::Range<u64>>>| {
        let region = Region::heap(std::sync::Arc::clone(&words)).with_written(written);
        Slots::new(region, CAPACITY).expect("it fits")
    };
    let runs = |slots: &Slots, from: u64| {
        let (mut runs, mut next) = (Vec::<u64>::new(), from);
        while next < from + CAPACITY {
            let run = slots.written_from(next);
            next = run.end;
            runs.extend(run);
        }
        runs
    };
    assert_eq!(runs(&slots(None), 8), (8..16).collect::<Vec<_>>());
    assert!(runs(&slots(Some(vec![])), 8).is_empty());
    // The second part begins and ends within slots.
    let parts = vec![0..slot(1), slot(3) + 1..slot(5) + 1];
    assert_eq!(runs(&slots(Some(parts.clone())), 8), [8, 11, 12, 13]);
    // From the middle of the ring on, around its end.
    assert_eq!(runs(&slots(Some(parts)), 12), [12, 13, 16, 19, 20, 21]);

    let seal = Seal::sure(7);
    let lane = Lane::new(slots(None), 0, seal);
    let Ok(mut permit) = lane.try_lock(CAPACITY) else { panic!("nobody else writes") };
    (0..8).for_each(|user| permit.append(&record(user)));
    drop(permit);
    clear(&lane, 2);
    let beyond = |written: &[std::ops::Range<u64>]| {
        let scan = scan_ring(&slots(Some(written.to_vec())), seal, 0, &mut |_, _| Ok(()));
        scan.expect("no visit fails").beyond_gap
    };
    assert_eq!(beyond(&[0..slot(1), slot(1)..slot(8)]), Some(3));
    assert_eq!(beyond(&[0..slot(2), slot(6)..slot(7)]), Some(6));
    assert_eq!(beyond(&[0..slot(1), slot(1)..slot(3)]), None);
}
