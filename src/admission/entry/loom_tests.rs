//! Models of a counter that is forgotten while somebody lets go of his handle.

use std::sync::Arc;

use loom::sync::Mutex;
use loom::thread;

use super::*;
use crate::admission::shared::Kept;
use crate::model::{QuotaId, WindowStart};
use crate::sync::explore;

const QUOTA: QuotaId = QuotaId(3);
const JANUARY: WindowStart = WindowStart(1_767_225_600_000);
const FEBRUARY: WindowStart = WindowStart(1_769_904_000_000);

fn state(window: WindowStart, used: u64) -> CellState {
    CellState::new(QUOTA, window, used)
}

/// A shard's write lock with the one counter in it, which is shared.
struct Shard {
    entry: Mutex<Option<Entry>>,
    cells: SharedCells,
    number: Number,
}

impl AsRef<SharedCells> for Shard {
    fn as_ref(&self) -> &SharedCells {
        &self.cells
    }
}

impl Shard {
    /// User 7 has used 1 in January. With a handle.
    fn new() -> (Arc<Self>, Kept<Self>) {
        let cells = SharedCells::new();
        let mut entry = Entry::new(7, state(JANUARY, 1));
        let number = entry.share(&cells).expect("there is room");
        let shard = Arc::new(Self { entry: Mutex::new(Some(entry)), cells, number });
        let kept = Kept::new(Arc::clone(&shard), |shard| shard.cells.handle(number).ok_or(()));
        (shard, kept.expect("it was created"))
    }

    /// Forgets the counter if nobody has a handle and January is all that it knows of.
    fn sweep(&self) -> bool {
        let is_old = |_: Key, state: CellState| state.window() == JANUARY;
        let mut entry = self.entry.lock().expect("nobody panics");
        let is_forgotten = entry.as_ref().is_some_and(|entry| entry.forget(&self.cells, is_old));
        if is_forgotten {
            *entry = None;
        }
        is_forgotten
    }
}

/// A unit that a handle counted in a new window is not forgotten, whenever the handle is dropped.
///
/// Fails when the state is read before it is known that there are no handles, when the last drop
/// is not a Release, or when `has_handles` does not acquire it.
#[test]
fn loom_what_a_handle_counted_is_not_forgotten() {
    explore(|| {
        let (shard, handle) = Shard::new();
        let sweeper = {
            let shard = Arc::clone(&shard);
            thread::spawn(move || shard.sweep())
        };
        assert_eq!(handle.cell().live().cell.add(FEBRUARY, 1, 1), Ok(state(FEBRUARY, 1)));
        drop(handle);
        assert!(!sweeper.join().unwrap());
        let entry = shard.entry.lock().expect("nobody panics");
        let entry = entry.as_ref().expect("it is not forgotten");
        assert_eq!(entry.live(&shard.cells).cell.load(), state(FEBRUARY, 1));
    });
}

/// What a handle counts never reaches the counter that gets its place: as long as there is a
/// handle, the place is not given away.
///
/// Fails when a counter is forgotten that has handles, or one handle's drop counts for two.
#[test]
fn loom_a_place_is_not_given_away_under_a_handle() {
    explore(|| {
        let (shard, handle) = Shard::new();
        let sweeper = {
            let shard = Arc::clone(&shard);
            thread::spawn(move || {
                let is_forgotten = shard.sweep();
                // Somebody else's, in the same place where it is free.
                let other = shard.cells.create(8, state(JANUARY, 5)).expect("there is room");
                assert_eq!(other == shard.number, is_forgotten);
                other
            })
        };
        let other = handle.clone();
        drop(handle);
        assert_eq!(other.cell().user(), 7);
        assert_eq!(other.cell().live().cell.add(JANUARY, 1, 9), Ok(state(JANUARY, 2)));
        drop(other);
        let other = shard.cells.get(sweeper.join().unwrap()).expect("it was created");
        assert_eq!((other.user(), other.live().cell.load()), (8, state(JANUARY, 5)));
    });
}
