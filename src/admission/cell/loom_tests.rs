//! Models of one cell: limits, windows and refunds under races.

use std::sync::Arc;

use loom::thread;

use super::*;
use crate::sync::{explore, yield_now};

const JANUARY: WindowStart = WindowStart(1_767_225_600_000);
const FEBRUARY: WindowStart = WindowStart(1_769_904_000_000);

fn state(window: WindowStart, used: u64) -> CellState {
    CellState::new(QuotaId::from_u16(3), window, used)
}

fn cell(used: u64) -> Arc<Cell> {
    Arc::new(Cell::new(state(JANUARY, used)))
}

/// Gives back up to `amount`, as the engine does: tries again while another refund is under way.
fn refund(cell: &Cell, amount: u64) -> (WindowStart, u64) {
    loop {
        if let Some(refund) = cell.begin_refund(JANUARY, amount, |_| 0) {
            let given = (refund.window(), refund.amount());
            refund.finish();
            return given;
        }
        yield_now();
    }
}

/// Three racing consumes of 2, 1 and 1 with room for 3: what is admitted never passes the limit,
/// and nothing is refused that fits what the refuser saw.
///
/// Fails when `add` decides once and not again after each lost race, or stores instead of swapping.
#[test]
fn loom_the_limit_is_exact() {
    explore(|| {
        let cell = cell(0);
        let consumes = [2, 1].map(|amount| {
            let cell = Arc::clone(&cell);
            thread::spawn(move || (amount, cell.add(JANUARY, amount, 3)))
        });
        let mut results = vec![(1, cell.add(JANUARY, 1, 3))];
        results.extend(consumes.into_iter().map(|consume| consume.join().unwrap()));
        let admitted: u64 =
            results.iter().filter(|(_, result)| result.is_ok()).map(|(amount, _)| amount).sum();
        assert_eq!(cell.load().used(), admitted);
        assert!(admitted <= 3);
        for (amount, result) in results {
            assert!(result.is_ok() || result.unwrap_err().used() + amount > 3);
        }
    });
}

/// The window changes under a consume: each unit counts in the one window that it was told, each
/// window keeps to its limit, and the cell's window never goes back.
///
/// Fails when window and usage are swapped one after the other, when `seen_from` goes back to an
/// older window, or when `add` decides once and not again after a lost race.
#[test]
fn loom_a_unit_counts_in_one_window() {
    explore(|| {
        const LIMIT: u64 = 2;
        let cell = cell(1);
        let others = [JANUARY, FEBRUARY].map(|window| {
            let cell = Arc::clone(&cell);
            thread::spawn(move || cell.add(window, 1, LIMIT))
        });
        let mut results = vec![cell.add(FEBRUARY, 1, LIMIT)];
        results.extend(others.into_iter().map(|other| other.join().unwrap()));
        let admitted_in = |window| {
            results.iter().filter(|result| result.is_ok_and(|s| s.window() == window)).count()
                as u64
        };
        let last = cell.load();
        assert_eq!(last, state(FEBRUARY, admitted_in(FEBRUARY)));
        assert!(1 + admitted_in(JANUARY) <= LIMIT);
        assert!(admitted_in(FEBRUARY) <= LIMIT);
        assert!(results[0].is_ok() || last.used() == LIMIT);
    });
}

/// Two refunds of 2 with 3 used: together they record what was there and no more, since what one
/// has marked the other can't count again.
///
/// Fails when `begin_refund` does not look for the mark, or `settle` subtracts without a swap.
#[test]
fn loom_two_refunds_never_give_more_than_was_used() {
    explore(|| {
        let cell = cell(3);
        let other = thread::spawn({
            let cell = Arc::clone(&cell);
            move || refund(&cell, 2).1
        });
        let given = refund(&cell, 2).1;
        assert_eq!(given + other.join().unwrap(), 3);
        assert_eq!(cell.load(), state(JANUARY, 0));
    });
}

/// A consume during a refund is neither lost nor given back, and the units that are being given
/// back are not free before the refund ends.
///
/// Fails when `settle` stores what `begin_refund` saw less the amount, or when `begin_refund`
/// subtracts already.
#[test]
fn loom_a_consume_during_a_refund_is_kept() {
    explore(|| {
        const LIMIT: u64 = 4;
        let cell = cell(3);
        let ended = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let consume = thread::spawn({
            let (cell, ended) = (Arc::clone(&cell), Arc::clone(&ended));
            move || {
                let result = cell.add(JANUARY, 2, LIMIT);
                assert!(result.is_err() || ended.load(Ordering::Relaxed));
                result.is_ok()
            }
        });
        cell.add(JANUARY, 1, LIMIT).expect("there is room for one");
        let refund = cell.begin_refund(JANUARY, 3, |_| 0).expect("no other refund");
        assert_eq!(refund.amount(), 3);
        ended.store(true, Ordering::Relaxed);
        refund.finish();
        let admitted = if consume.join().unwrap() { 2 } else { 0 };
        assert_eq!(cell.load(), state(JANUARY, 1 + admitted));
    });
}

/// The window changes under a refund: it belongs to the window that it was begun in, and takes
/// nothing from another.
///
/// Fails when `settle` subtracts whatever the window, or when a change of window drops the mark.
#[test]
fn loom_a_refund_takes_nothing_from_the_next_window() {
    explore(|| {
        let cell = cell(3);
        let consume = thread::spawn({
            let cell = Arc::clone(&cell);
            move || cell.add(FEBRUARY, 2, 10).map(|_| ()).expect("there is room")
        });
        let other = thread::spawn({
            let cell = Arc::clone(&cell);
            move || refund(&cell, 1)
        });
        let refunds = [refund(&cell, 2), other.join().unwrap()];
        consume.join().unwrap();
        let given = |window| -> u64 {
            refunds.iter().filter(|refund| refund.0 == window).map(|refund| refund.1).sum()
        };
        assert!(given(JANUARY) <= 3);
        assert_eq!(cell.load(), state(FEBRUARY, 2 - given(FEBRUARY)));
    });
}

/// A reader sees usage and window of one instant, although it reads one after the other.
///
/// Fails when `load` does not look at the window again.
#[test]
fn loom_usage_is_read_with_its_own_window() {
    explore(|| {
        let cell = cell(3);
        let reader = thread::spawn({
            let cell = Arc::clone(&cell);
            move || {
                let seen = cell.load();
                assert!([state(JANUARY, 3), state(FEBRUARY, 2)].contains(&seen));
            }
        });
        cell.add(FEBRUARY, 2, 10).expect("there is room");
        reader.join().unwrap();
    });
}

/// The fast path of `add` starts from a guess that may be torn: what it admits keeps to the limit
/// of the window, and what it can't decide it leaves alone.
///
/// Fails when `add_in_window` does not look at the window, or stores instead of swapping.
#[test]
fn loom_a_torn_guess_admits_nothing_wrong() {
    explore(|| {
        const LIMIT: u64 = 3;
        let cell = cell(3);
        let consume = thread::spawn({
            let cell = Arc::clone(&cell);
            move || {
                [JANUARY, FEBRUARY]
                    .map(|window| cell.add_in_window(cell.guess(), state(window, 0), 1, LIMIT))
            }
        });
        cell.add(FEBRUARY, 2, LIMIT).expect("there is room");
        let [today, tomorrow] = consume.join().unwrap();
        assert_eq!(today, None);
        let used = 2 + u64::from(tomorrow.is_some());
        assert_eq!(cell.load(), state(FEBRUARY, used));
    });
}

/// Counts 1 in each of the cells, or in none, as the engine does: holds one after the other.
fn count_in_all(cells: &[Arc<Cell>], window: WindowStart, limit: u64) -> bool {
    let hold = |cell: &Arc<Cell>| loop {
        match cell.try_hold(window) {
            Some(seen) => break seen,
            None => yield_now(),
        }
    };
    let seen: Vec<_> = cells.iter().map(hold).collect();
    let next: Option<Vec<_>> = seen.iter().map(|seen| seen.plus(1, limit)).collect();
    let is_admitted = next.is_some();
    let next = next.unwrap_or_else(|| seen.clone());
    for ((cell, seen), next) in cells.iter().zip(seen).zip(next) {
        cell.release(seen, next);
    }
    is_admitted
}

/// Two groups with room for one: one is admitted, in all of its counters, and only one.
///
/// Fails when `try_hold` does not look for another's mark.
#[test]
fn loom_groups_are_whole_and_exact() {
    explore(|| {
        let cells = [cell(0), cell(0)];
        let other = thread::spawn({
            let cells = cells.clone();
            move || count_in_all(&cells, JANUARY, 1)
        });
        let one = count_in_all(&cells, JANUARY, 1);
        assert!(one != other.join().unwrap());
        assert!(cells.iter().all(|cell| cell.load() == state(JANUARY, 1)));
    });
}

/// A group and consumes of one of its counters, with room for one: whoever is first is admitted,
/// and nobody is refused for what a group tried and did not count.
///
/// Fails when `add` decides while the cell is held, or `add_in_window` adds to a held cell.
#[test]
fn loom_a_group_that_is_refused_refuses_nobody_else() {
    explore(|| {
        let cells = [cell(0), cell(1)];
        let group = thread::spawn({
            let cells = cells.clone();
            move || count_in_all(&cells, JANUARY, 1)
        });
        let fast = cells[0].add_in_window(cells[0].guess(), state(JANUARY, 0), 1, 1);
        assert!(fast.is_some() || cells[0].add(JANUARY, 1, 1).is_ok());
        assert!(!group.join().unwrap(), "its second counter is full");
        assert!(cells.iter().all(|cell| cell.load() == state(JANUARY, 1)));
    });
}

fn hold(cell: &Cell, window: WindowStart) -> CellState {
    loop {
        match cell.try_hold(window) {
            Some(seen) => break seen,
            None => yield_now(),
        }
    }
}

/// A refund waits while a cell is held, and a hold while units are given back.
///
/// Fails when `begin_refund` does not look for the hold, or `try_hold` for the refund.
#[test]
fn loom_refunds_and_holds_wait_for_each_other() {
    explore(|| {
        let cell = cell(3);
        let refund = thread::spawn({
            let cell = Arc::clone(&cell);
            move || refund(&cell, 4).1
        });
        let seen = hold(&cell, JANUARY);
        assert_eq!(cell.load().used(), seen.used());
        cell.release(seen, seen.plus(1, 10).expect("there is room"));
        let given = refund.join().unwrap();
        assert_eq!(cell.load(), state(JANUARY, 4 - given));
        assert!([3, 4].contains(&given));
    });
}

/// The window does not change under whoever holds the cell.
///
/// Fails when `seen_from` drops the mark.
#[test]
fn loom_a_held_cell_stays_in_its_window() {
    explore(|| {
        let cell = cell(3);
        let consume = thread::spawn({
            let cell = Arc::clone(&cell);
            move || cell.add(FEBRUARY, 2, 10).map(|_| ()).expect("there is room")
        });
        let seen = hold(&cell, JANUARY);
        cell.release(seen, seen.plus(1, 10).expect("there is room"));
        consume.join().unwrap();
        let counted = if seen.window() == FEBRUARY { 1 } else { 0 };
        assert_eq!(cell.load(), state(FEBRUARY, 2 + counted));
    });
}
