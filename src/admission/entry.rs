//! What the map holds for a counter: the counter itself, or where to find it once it is shared.

use std::hash::{Hash, Hasher};

#[cfg(not(loom))]
use dashmap::SharedValue;

use crate::admission::cell::{Cell, CellState, Live};
use crate::admission::shared::{Number, SharedCell, SharedCells};
use crate::admission::table::Key;

/// A counter with its key, aligned so that it lies on one cache line. Key and value in one struct:
/// as a pair, padding would make it 48 bytes.
#[derive(Debug)]
#[repr(align(32))]
pub(super) struct Entry {
    user: u64,
    /// Once a handle was taken or a limit set, the counter lives there, and `cell` only tells the
    /// quota. Changed under the map shard's write lock only.
    shared: Option<Number>,
    cell: Cell,
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<(Entry, SharedValue<()>)>() == 32);

impl Entry {
    pub(super) fn new(user: u64, state: CellState) -> Self {
        Self { user, shared: None, cell: Cell::new(state) }
    }

    #[inline(always)]
    pub(super) fn key(&self) -> Key {
        Key { user: self.user, quota: self.cell.quota() }
    }

    /// The counter, wherever it lives.
    #[inline(always)]
    pub(super) fn live<'a>(&'a self, cells: &'a SharedCells) -> Live<'a> {
        let shared = self.shared.and_then(|number| cells.get(number));
        shared.map_or(Live::inline(&self.cell), SharedCell::live)
    }

    /// Moves the counter out, so that handles can share it. The shard's write lock keeps others
    /// out, and orders what they stored before. `None` when too many are shared.
    pub(super) fn share(&mut self, cells: &SharedCells) -> Option<Number> {
        if self.shared.is_none() {
            self.shared = cells.create(self.user, self.cell.load());
        }
        self.shared
    }

    /// Whether the counter can be forgotten, and is: nothing but the map holds it, it has no limit
    /// of its own, nobody is in the middle of a change, and `may_forget` says so of its state. The
    /// caller has the shard's write lock, and then drops the entry.
    pub(super) fn forget(
        &self,
        cells: &SharedCells,
        may_forget: impl FnOnce(Key, CellState) -> bool,
    ) -> bool {
        let live = self.live(cells);
        // The state is read when nobody is left who could change it, or what the last handle
        // counted in a new window would be forgotten.
        let is_forgotten = !self.shared.is_some_and(|number| cells.has_handles(number))
            && !live.has_own_limit()
            && !live.cell.is_marked()
            && may_forget(self.key(), live.cell.load());
        if is_forgotten && let Some(number) = self.shared {
            cells.give_back(number);
        }
        is_forgotten
    }

    /// Takes over what recovery found, if it is of a newer window.
    pub(super) fn load_newer(&mut self, state: CellState) {
        self.cell.load_newer(state);
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Entry {}

impl Hash for Entry {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key().hash(state);
    }
}

#[cfg(all(test, loom))]
mod loom_tests;
