//! Counters that live outside the map: those with a handle, or with a limit of their own.
//!
//! They are stored next to each other, two to a cache line, so that an operation through a handle
//! waits for one line. They are numbered, and the map's value holds the number. A handle that is
//! kept holds the cell's address, which is quicker to follow.
#![allow(unsafe_code, reason = "a handle that is kept reaches its cell by address")]

use std::fmt;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, OnceLock};

use crate::admission::cell::{Cell, CellState, Live};
use crate::sync::{AtomicU64 as Count, Mutex, Ordering};

/// The first chunk has room for this many cells; each further one for twice as many as the one
/// before.
const FIRST_CHUNK: u32 = if cfg!(loom) { 1 } else { 1 << 10 };
const CHUNKS: usize = 22;

/// All shared cells of a table.
#[derive(Debug)]
pub(crate) struct SharedCells {
    chunks: Box<[OnceLock<Chunk>]>,
    unused: Mutex<Unused>,
}

#[derive(Debug, Default)]
struct Unused {
    /// Numbers that were given back.
    returned: Vec<u32>,
    /// All numbers from here on were never used.
    fresh: u32,
}

/// How many can be shared at a time.
pub(crate) const SHARED_MAX: u64 = FIRST_CHUNK as u64 * ((1 << CHUNKS) - 1);

/// The number of a shared cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Number(u32);

struct Chunk {
    cells: Box<[SharedCell]>,
    /// How many handles each has. Wide enough for all that are forgotten without being dropped.
    handles: Box<[Count]>,
}

/// A counter that is shared, on half a cache line.
#[derive(Debug)]
#[repr(align(32))]
pub(crate) struct SharedCell {
    cell: Cell,
    user: AtomicU64,
    limit: AtomicU64,
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<SharedCell>() == 32);

/// A handle to a shared cell: as long as there is one the map does not forget the counter.
#[derive(Debug)]
pub(crate) struct Handle<'a> {
    cell: &'a SharedCell,
    /// Of the cell.
    handles: &'a Count,
}

impl SharedCell {
    fn unused() -> Self {
        let state = CellState::default();
        let (user, limit) = (AtomicU64::new(0), AtomicU64::new(Live::NO_LIMIT));
        Self { cell: Cell::new(state), user, limit }
    }

    /// Whose it is.
    #[inline(always)]
    pub(crate) fn user(&self) -> u64 {
        // Relaxed: stored before anybody got to know of the cell.
        self.user.load(Ordering::Relaxed)
    }

    #[inline(always)]
    pub(crate) fn live(&self) -> Live<'_> {
        Live::shared(&self.cell, &self.limit)
    }

    /// Sets or clears the counter's own limit.
    pub(crate) fn set_limit(&self, limit: Option<u64>) {
        // Relaxed: see `Live::limit`.
        self.limit.store(limit.unwrap_or(Live::NO_LIMIT), Ordering::Relaxed);
    }
}

impl SharedCells {
    pub(super) fn new() -> Self {
        Self { chunks: (0..CHUNKS).map(|_| OnceLock::new()).collect(), unused: Mutex::default() }
    }

    /// Which chunk a number is in, and where in it.
    #[inline(always)]
    fn place(Number(number): Number) -> (usize, u32) {
        let chunk = (number / FIRST_CHUNK + 1).ilog2();
        (chunk as usize, number - FIRST_CHUNK * ((1 << chunk) - 1))
    }

    /// A cell for this user in this state, without handles and without a limit of its own. `None`
    /// when there are billions.
    pub(super) fn create(&self, user: u64, state: CellState) -> Option<Number> {
        let number = {
            let mut unused = self.unused.lock();
            unused.returned.pop().or_else(|| {
                let fresh = unused.fresh;
                (Self::place(Number(fresh)).0 < CHUNKS).then(|| {
                    unused.fresh += 1;
                    fresh
                })
            })?
        };
        let number = Number(number);
        let (chunk, _) = Self::place(number);
        self.chunks.get(chunk)?.get_or_init(|| Chunk::new(chunk));
        let shared = self.get(number)?;
        // Relaxed: whoever gets to know of the number is told so by the map's lock.
        shared.user.store(user, Ordering::Relaxed);
        shared.set_limit(None);
        shared.cell.overwrite(state);
        Some(number)
    }

    /// Gives a number back that nobody else knows: it has no handle, and is not in the map.
    pub(super) fn give_back(&self, Number(number): Number) {
        self.unused.lock().returned.push(number);
    }

    #[inline(always)]
    fn chunk(&self, number: Number) -> Option<(&Chunk, usize)> {
        let (chunk, place) = Self::place(number);
        Some((self.chunks.get(chunk)?.get()?, place as usize))
    }

    #[inline(always)]
    pub(crate) fn get(&self, number: Number) -> Option<&SharedCell> {
        let (chunk, place) = self.chunk(number)?;
        chunk.cells.get(place)
    }

    fn handles(&self, number: Number) -> Option<&Count> {
        let (chunk, place) = self.chunk(number)?;
        chunk.handles.get(place)
    }

    /// Whether anybody has a handle to it. The caller must keep others from getting a first one.
    pub(super) fn has_handles(&self, number: Number) -> bool {
        // Acquire: pairs with the Release of the last handle's drop, so that what was done by it
        // comes before what is done with the cell next.
        self.handles(number).is_some_and(|handles| handles.load(Ordering::Acquire) > 0)
    }

    /// A handle to it. Another one, or the map, keeps it from being given back meanwhile.
    pub(crate) fn handle(&self, number: Number) -> Option<Handle<'_>> {
        let (cell, handles) = (self.get(number)?, self.handles(number)?);
        // Relaxed: see above.
        handles.fetch_add(1, Ordering::Relaxed);
        Some(Handle { cell, handles })
    }

    /// The number of a cell, if it is one of these.
    fn number_of(&self, cell: NonNull<SharedCell>) -> Option<Number> {
        self.chunks.iter().enumerate().find_map(|(index, chunk)| {
            let cells = chunk.get()?.cells.as_ptr_range();
            let place = cells
                .contains(&cell.as_ptr().cast_const())
                .then(|| (cell.addr().get() - cells.start.addr()) / size_of::<SharedCell>())?;
            let before = FIRST_CHUNK * ((1 << index) - 1);
            Some(Number(before + u32::try_from(place).ok()?))
        })
    }
}

impl Chunk {
    fn new(chunk: usize) -> Self {
        let len = (FIRST_CHUNK as usize) << chunk;
        let cells = (0..len).map(|_| SharedCell::unused()).collect();
        let handles = (0..len).map(|_| Count::new(0)).collect();
        Self { cells, handles }
    }
}

impl<'a> Handle<'a> {
    pub(crate) fn cell(&self) -> &'a SharedCell {
        self.cell
    }
}

impl Drop for Handle<'_> {
    fn drop(&mut self) {
        // Release: pairs with the Acquire in `has_handles`.
        self.handles.fetch_sub(1, Ordering::Release);
    }
}

/// A handle that keeps what its cell lies in.
pub(crate) struct Kept<O: AsRef<SharedCells>> {
    owner: Arc<O>,
    cell: NonNull<SharedCell>,
}

// SAFETY: it is an `Arc` and a shared reference to a cell, which may both go to other threads.
unsafe impl<O: AsRef<SharedCells> + Send + Sync> Send for Kept<O> {}
// SAFETY: likewise.
unsafe impl<O: AsRef<SharedCells> + Send + Sync> Sync for Kept<O> {}

impl<O: AsRef<SharedCells>> Kept<O> {
    /// Keeps the handle to one of the owner's cells.
    pub(crate) fn new<E>(
        owner: Arc<O>,
        share: impl for<'a> FnOnce(&'a O) -> Result<Handle<'a>, E>,
    ) -> Result<Self, E> {
        let handle = share(&owner)?;
        let cell = NonNull::from(handle.cell);
        // Until this is dropped.
        std::mem::forget(handle);
        Ok(Self { owner, cell })
    }

    #[inline(always)]
    pub(crate) fn owner(&self) -> &O {
        &self.owner
    }

    #[inline(always)]
    pub(crate) fn cell(&self) -> &SharedCell {
        // SAFETY: the cell is one of the owner's, whose chunks stay where they are until it is
        // dropped, which `self.owner` prevents.
        unsafe { self.cell.as_ref() }
    }

    /// How many handles the cell has.
    fn handles(&self) -> Option<&Count> {
        let cells = (*self.owner).as_ref();
        cells.handles(cells.number_of(self.cell)?)
    }
}

impl<O: AsRef<SharedCells>> Clone for Kept<O> {
    fn clone(&self) -> Self {
        if let Some(handles) = self.handles() {
            // Relaxed: see `SharedCells::handle`.
            handles.fetch_add(1, Ordering::Relaxed);
        }
        Self { owner: Arc::clone(&self.owner), cell: self.cell }
    }
}

impl<O: AsRef<SharedCells>> Drop for Kept<O> {
    fn drop(&mut self) {
        if let Some(handles) = self.handles() {
            drop(Handle { cell: self.cell(), handles });
        }
    }
}

impl fmt::Debug for Chunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chunk").field("cells", &self.cells.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;
    use crate::model::{QuotaId, WindowStart};

    fn state(used: u64) -> CellState {
        CellState::new(QuotaId(3), WindowStart(0), used)
    }

    #[test]
    fn numbers_have_places_of_their_own() {
        let place = |number| SharedCells::place(Number(number));
        let edges = [0, FIRST_CHUNK - 1, FIRST_CHUNK, 3 * FIRST_CHUNK - 1, 3 * FIRST_CHUNK];
        let places = edges.map(place);
        assert_eq!(
            places,
            [(0, 0), (0, FIRST_CHUNK - 1), (1, 0), (1, 2 * FIRST_CHUNK - 1), (2, 0)]
        );
        assert!(place(u32::MAX).0 >= CHUNKS);
    }

    #[test]
    fn cells_are_told_apart_and_used_again() {
        let cells = SharedCells::new();
        let many = u64::from(4 * FIRST_CHUNK);
        let numbers: Vec<_> =
            (0..many).map(|user| cells.create(user, state(user)).expect("there is room")).collect();
        for (user, &number) in (0..).zip(&numbers) {
            let shared = cells.get(number).expect("it was created");
            assert_eq!((shared.user(), shared.live().cell.load()), (user, state(user)));
        }
        let number = numbers[5];
        cells.get(number).expect("it was created").set_limit(Some(1));
        cells.give_back(number);
        assert_eq!(cells.create(9, state(1)), Some(number));
        let shared = cells.get(number).expect("it was created");
        assert_eq!((shared.user(), shared.live().cell.load()), (9, state(1)));
        assert!(!shared.live().has_own_limit());
    }

    /// Also of the last cell of a chunk and the first of the next.
    #[test]
    fn handles_are_counted() {
        let cells = Arc::new(Owner(SharedCells::new()));
        for user in 0..=u64::from(FIRST_CHUNK) {
            let number = cells.0.create(user, state(user)).expect("there is room");
            assert!(!cells.0.has_handles(number));
            let handle = cells.0.handle(number).expect("it was created");
            let kept = Kept::new(Arc::clone(&cells), |owner| owner.share(number));
            let kept = kept.expect("it was created");
            drop(handle);
            assert!(cells.0.has_handles(number));
            let other = kept.clone();
            assert_eq!((kept.cell().user(), other.cell().user()), (user, user));
            assert_eq!(cells.0.number_of(kept.cell), Some(number));
            drop(kept);
            assert!(cells.0.has_handles(number));
            drop(other);
            assert!(!cells.0.has_handles(number));
        }
        assert_eq!(cells.0.number_of(NonNull::dangling()), None);
    }

    #[derive(Debug)]
    struct Owner(SharedCells);

    impl Owner {
        fn share(&self, number: Number) -> Result<Handle<'_>, ()> {
            self.0.handle(number).ok_or(())
        }
    }

    impl AsRef<SharedCells> for Owner {
        fn as_ref(&self) -> &SharedCells {
            &self.0
        }
    }
}
