//! Models of the fast path of a group: cells and log change together.

use std::sync::Arc;

use loom::thread;

use super::*;
use crate::admission::cell::Cell;
use crate::model::{Definition, Quota, QuotaId, Window, WindowStart};
use crate::sync::explore;
use crate::wal::lane::Lane;
use crate::wal::lane::loom_tests::lane;
use crate::wal::lanes::Lanes;
use crate::wal::operation::Operation;

const QUOTA: QuotaId = QuotaId(3);
const TODAY: u64 = 20_000 * 86_400_000;

struct World {
    lanes: Lanes,
    cells: [Cell; 2],
    quota: QuotaState,
}

impl World {
    /// Each counter has room for so much.
    fn new(limit: u64) -> Arc<Self> {
        let quota = Quota::new("requests", limit).window(Window::Day);
        let definition = Definition::new(QUOTA, &quota).expect("a valid quota");
        let lanes = vec![lane(4), lane(4)];
        // So that threads without a seat have the fast path too.
        lanes.iter().for_each(Lane::share);
        let cell = || Cell::new(CellState::new(QUOTA, WindowStart(TODAY), 0));
        Arc::new(Self {
            lanes: Lanes::new(lanes),
            cells: [cell(), cell()],
            quota: QuotaState::new(definition, WindowStart(0), Timestamp::from_unix_millis(TODAY)),
        })
    }

    fn asking(&self, user: u64) -> Asking {
        let now = Timestamp::from_unix_millis(TODAY);
        Asking::new(user, &self.quota, 1, now).expect("the window is current")
    }

    /// Counts 1 in both, whether or not that is possible just now.
    fn count_both(&self) -> bool {
        let lives = self.cells.each_ref().map(Live::inline);
        let permit = self.lanes.iter().find_map(|lane| lane.try_lock(2).ok());
        let mut permit = permit.expect("a lane for each");
        Engine::count_few(&mut permit, &[self.asking(0), self.asking(1)], &lives).is_some()
    }

    fn used(&self) -> [u64; 2] {
        self.cells.each_ref().map(|cell| {
            assert!(!cell.is_marked(), "nobody is left who holds it");
            cell.load().used()
        })
    }

    /// What recovery would add up, by user.
    fn logged(&self) -> [u64; 2] {
        let mut counts = [0, 0];
        let mut operation = Operation::default();
        for lane in self.lanes.iter() {
            let mut number = 0;
            while lane.read_operation(number, &mut operation).is_some() {
                number += operation.len();
                for record in operation.adds() {
                    counts[usize::try_from(record.user).expect("0 or 1")] += 1;
                }
            }
            assert_eq!(number, lane.tail());
        }
        counts
    }
}

/// Two groups with room for one: one of them is admitted, in both of its counters and in the log.
///
/// Fails when a cell is held that another holds, when the last is changed before the others are
/// held, or when they are not let go.
#[test]
fn loom_of_two_groups_one_is_admitted_as_a_whole() {
    explore(|| {
        let world = World::new(1);
        let other = thread::spawn({
            let world = Arc::clone(&world);
            move || world.count_both()
        });
        let one = world.count_both();
        assert!(one != other.join().unwrap());
        assert_eq!((world.used(), world.logged()), ([1, 1], [1, 1]));
    });
}

/// A group meets a consume of its last counter, with room for one of them there: one is admitted,
/// and of a group that is not nothing is left in the other counter.
///
/// Fails when the last counter is changed without a look at its limit, or the first not let go.
#[test]
fn loom_a_group_that_loses_its_last_counter_leaves_nothing() {
    explore(|| {
        let world = World::new(1);
        let consume = thread::spawn({
            let world = Arc::clone(&world);
            move || {
                let [_, last] = &world.cells;
                last.add(WindowStart(TODAY), 1, 1).is_ok()
            }
        });
        let group = world.count_both();
        let single = consume.join().unwrap();
        assert!(group != single);
        assert_eq!(world.used(), [u64::from(group), 1]);
        assert_eq!(world.logged(), [u64::from(group); 2]);
    });
}
