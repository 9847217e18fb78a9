//! Models of an operation as a whole: cell and log change together.

use loom::thread;

use super::fast::{Addition, Way};
use super::*;
use crate::model::{Definition, Quota, Window};
use crate::sync::explore;
use crate::wal::lane::Lane;
use crate::wal::lane::loom_tests::{found, lane};

const USER: u64 = 7;
const QUOTA: QuotaId = QuotaId(3);
const LIMIT: u64 = 4;
const DAY: u64 = 86_400_000;
const TODAY: WindowStart = WindowStart(20_000 * DAY);
const TOMORROW: WindowStart = WindowStart(20_001 * DAY);

struct World {
    lanes: Lanes,
    cell: Cell,
    quota: Arc<QuotaState>,
}

impl World {
    fn new() -> Arc<Self> {
        let quota = Quota::new("requests", LIMIT).window(Window::Day);
        let definition = Definition::new(QUOTA, &quota).expect("a valid quota");
        let now = Timestamp::from_unix_millis(TODAY.0);
        let lanes = vec![lane(4), lane(4)];
        // So that threads without a seat have the fast path too.
        lanes.iter().for_each(Lane::share);
        Arc::new(Self {
            lanes: Lanes::new(lanes),
            cell: Cell::new(CellState::new(QUOTA, TODAY, 0)),
            quota: Arc::new(QuotaState::new(definition, WindowStart(0), now)),
        })
    }

    fn counted(&self) -> Counted<'_> {
        Counted { user: USER, quota: &self.quota, cell: None }
    }

    fn live(&self) -> Live<'_> {
        Live::inline(&self.cell)
    }

    fn consume(&self, window: WindowStart, amount: u64) -> bool {
        match add_to_cell(&self.lanes, self.live(), &self.counted(), window, amount, None) {
            Ok(admission) => admission.is_admitted,
            Err(refusal) => unreachable!("{refusal:?} with room for all"),
        }
    }

    /// As callers do: the fast path, then the slow one.
    fn consume_fast(&self, window: WindowStart, amount: u64) -> bool {
        let key = Key { user: USER, quota: QUOTA };
        let now = Timestamp::from_unix_millis(window.0);
        let is_added = self.quota.current(now).is_some_and(|window| {
            let (lanes, way, bound) = (&self.lanes, Way::Shared, None);
            let addition = Addition { lanes, way, key, window, amount, default: LIMIT, bound };
            addition.run(self.live()).is_some()
        });
        is_added || self.consume(window, amount)
    }

    fn refund(&self, window: WindowStart, amount: u64) -> u64 {
        loop {
            let (lanes, counted) = (&self.lanes, self.counted());
            let (kept, unlogged) = (|_| 0, |_, _| 0);
            let refund =
                refund_from_cell(lanes, &self.cell, &counted, window, amount, kept, unlogged);
            if let Some((given, _)) = refund.expect("there is room for all") {
                return given;
            }
            crate::sync::yield_now();
        }
    }

    /// What recovery would add up.
    fn logged(&self, window: WindowStart) -> i64 {
        let records = |lane: &Lane| -> Vec<Record> {
            (0..lane.tail()).map(|n| lane.read(n).expect("published records verify")).collect()
        };
        let all: Vec<_> = self.lanes.iter().flat_map(records).collect();
        assert!(all.iter().all(|record| record.user == USER && record.delta != 0));
        all.iter().filter(|record| record.window == window).map(|record| record.delta).sum()
    }
}

/// Consumes of two windows race: what the log adds up to is what the cell holds, window by window.
///
/// Fails when the record names the window that was asked for instead of the one that counted, or
/// when a refused consume is recorded.
#[test]
fn loom_the_log_adds_up_to_the_cell_across_windows() {
    explore(|| {
        let world = World::new();
        let other = thread::spawn({
            let world = Arc::clone(&world);
            move || world.consume(TOMORROW, 3)
        });
        let today = [world.consume(TODAY, 3), world.consume_fast(TODAY, 2)];
        assert!(other.join().unwrap() || today.contains(&true));
        let state = world.cell.load();
        assert_eq!(world.logged(state.window()), state.used().cast_signed());
        assert!(world.logged(TODAY) <= LIMIT.cast_signed());
        assert!(world.logged(TOMORROW) <= LIMIT.cast_signed());
    });
}

/// Refunds race with each other and with a consume: the log adds up to the cell, and never to less
/// than nothing.
///
/// Fails when a refund records what was asked for instead of what is given, or when the mark is not
/// looked for.
#[test]
fn loom_the_log_adds_up_to_the_cell_across_refunds() {
    explore(|| {
        let world = World::new();
        assert!(world.consume(TODAY, 3));
        let refund = thread::spawn({
            let world = Arc::clone(&world);
            move || world.refund(TODAY, 2)
        });
        let given = world.refund(TODAY, 2);
        let admitted = u64::from(world.consume_fast(TODAY, 1));
        let given = given + refund.join().unwrap();
        assert_eq!(admitted, 1);
        assert!((3..=4).contains(&given));
        let used = 3 + admitted - given;
        assert_eq!(world.cell.load(), CellState::new(QUOTA, TODAY, used));
        assert_eq!(world.logged(TODAY), used.cast_signed());
    });
}

/// A refund gives room to a consume: whoever has taken it finds the refund in the log. A process
/// that dies at any instant so never leaves more than the limit behind.
///
/// Fails when units are given back before the refund is recorded.
#[test]
fn loom_what_is_given_back_is_in_the_log_first() {
    explore(|| {
        let world = World::new();
        assert!(world.consume(TODAY, LIMIT));
        let consume = thread::spawn({
            let world = Arc::clone(&world);
            move || {
                if world.consume(TODAY, 2) {
                    let records = world.lanes.iter().flat_map(found);
                    let logged: i64 = records.map(|record| record.delta).sum();
                    assert!(logged <= LIMIT.cast_signed());
                }
            }
        });
        assert_eq!(world.refund(TODAY, 2), 2);
        consume.join().unwrap();
    });
}
