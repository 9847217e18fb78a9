//! The atomic state of one counter: usage and window in one 128-bit word.
//!
//! Usage and window change in one compare-and-swap, so that a unit is always counted in the window
//! it is charged to. A cell's window never goes back: a call with an older window (the clock was
//! set back, or another thread saw the new window first) counts in the cell's window.
//!
//! Refunds are recorded before they are subtracted, so that a crash in between never gives back
//! more than was logged. Meanwhile the mark in the word keeps out other refunds of the same
//! counter; consumes go on, since they only ever add.
//!
//! An operation over several counters holds each, in the order of their keys, while it decides for
//! all. Others that would change a held counter wait, but never for long, since the holder of one
//! waits for nothing but the next. The mark for this makes the usage look larger than any limit, so
//! that code that doesn't know of it is refused and looks again.
//!
//! The quota's id is in the same word, so that a counter with its key takes 32 bytes, which never
//! cross a cache line.

use crate::admission::quotas::QUOTAS_MAX;
use crate::admission::word::Word;
use crate::model::{AMOUNT_MAX, QuotaId, WindowStart};
use crate::sync::Patience;
use std::sync::atomic::{AtomicU64, Ordering};

const WINDOW_SHIFT: u32 = 64;
const WINDOW_MASK: u128 = WindowStart::MAX.0 as u128;
const QUOTA_SHIFT: u32 = 112;
const QUOTA_MASK: u128 = (QUOTAS_MAX - 1) as u128;
const REFUND_MARK: u128 = 1 << 127;
const HOLD_MARK: u128 = 1 << 63;
const _: () = assert!(HOLD_MARK == AMOUNT_MAX as u128 + 1);
const _: () = assert!(WINDOW_MASK << WINDOW_SHIFT & QUOTA_MASK << QUOTA_SHIFT == 0);
const _: () = assert!(QUOTA_MASK << QUOTA_SHIFT & REFUND_MARK == 0);

const _: () = assert!(Live::NO_LIMIT > AMOUNT_MAX);

/// How often a thread spins before it tries again at a cell where it met another.
const STEP_BACK_SPINS: u32 = if cfg!(loom) { 1 } else { 8 };

/// What a cell held at one instant.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct CellState(u128);

impl CellState {
    #[inline(always)]
    pub(crate) fn new(quota: QuotaId, window: WindowStart, used: u64) -> Self {
        let quota = u128::from(quota.as_u16()) & QUOTA_MASK;
        let window = u128::from(window.0) & WINDOW_MASK;
        Self(u128::from(used) | window << WINDOW_SHIFT | quota << QUOTA_SHIFT)
    }

    /// The state in which nothing is used, given the upper half: window and quota.
    #[inline(always)]
    pub(super) fn from_upper(upper: u64) -> Self {
        Self(u128::from(upper) << WINDOW_SHIFT)
    }

    #[inline(always)]
    pub(super) fn upper(self) -> u64 {
        (self.0 >> WINDOW_SHIFT) as u64
    }

    #[inline(always)]
    pub(crate) fn used(self) -> u64 {
        self.lower() & AMOUNT_MAX
    }

    /// Usage, or more than any limit while the cell is held.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the lower half is meant")]
    fn lower(self) -> u64 {
        self.0 as u64
    }

    #[inline(always)]
    pub(crate) fn window(self) -> WindowStart {
        WindowStart(((self.0 >> WINDOW_SHIFT) & WINDOW_MASK) as u64)
    }

    #[inline(always)]
    pub(crate) fn quota(self) -> QuotaId {
        QuotaId::from_u16(((self.0 >> QUOTA_SHIFT) & QUOTA_MASK) as u16)
    }

    fn is_refunding(self) -> bool {
        self.0 & REFUND_MARK != 0
    }

    pub(crate) fn is_held(self) -> bool {
        self.0 & HOLD_MARK != 0
    }

    /// Whether a refund can't be of `window` any more: a newer one has begun, and no refund that
    /// began before that is under way.
    pub(crate) fn has_left(self, window: WindowStart) -> bool {
        self.window() > window && !self.is_refunding()
    }

    fn without_hold(self) -> Self {
        Self(self.0 & !HOLD_MARK)
    }

    /// The state as seen from a window: in a newer one than the cell's nothing is used yet.
    #[inline]
    pub(crate) fn seen_from(self, window: WindowStart) -> Self {
        if window > self.window() {
            Self(Self::new(self.quota(), window, 0).0 | self.0 & (REFUND_MARK | HOLD_MARK))
        } else {
            self
        }
    }

    #[inline(always)]
    fn with_used(self, used: u64) -> Self {
        Self(self.0 & !u128::from(u64::MAX) | u128::from(used))
    }

    /// Whether `amount` more keeps to `limit`.
    #[inline]
    pub(crate) fn has_room(self, amount: u64, limit: u64) -> bool {
        self.without_hold().plus(amount, limit).is_some()
    }

    /// The state after `amount` less, which is counted in it.
    pub(crate) fn minus(self, amount: u64) -> Self {
        self.with_used(self.used().saturating_sub(amount))
    }

    /// The state after `amount` more, if that keeps to `limit` and nobody holds the cell. Pure: the
    /// whole decision.
    #[inline(always)]
    pub(crate) fn plus(self, amount: u64, limit: u64) -> Option<Self> {
        let used = self.lower().checked_add(amount)?;
        (used <= limit).then(|| self.with_used(used))
    }
}

/// The state of one counter, which many threads change.
#[derive(Debug)]
pub(crate) struct Cell(Word);

/// A counter as an operation meets it: its state, and where its own limit would be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Live<'a> {
    pub(crate) cell: &'a Cell,
    limit: Option<&'a AtomicU64>,
}

impl<'a> Live<'a> {
    /// No limit of its own: the quota's default applies.
    pub(super) const NO_LIMIT: u64 = u64::MAX;

    /// A counter in the map.
    #[inline(always)]
    pub(crate) fn inline(cell: &'a Cell) -> Self {
        Self { cell, limit: None }
    }

    /// A counter outside the map, and its own limit, or [`NO_LIMIT`](Self::NO_LIMIT).
    #[inline(always)]
    pub(super) fn shared(cell: &'a Cell, limit: &'a AtomicU64) -> Self {
        Self { cell, limit: Some(limit) }
    }

    /// The limit that applies, given the quota's default.
    #[inline(always)]
    pub(crate) fn limit(self, default: u64) -> u64 {
        // Relaxed: an operation that overlaps a change of the limit may use either.
        match self.limit.map(|limit| limit.load(Ordering::Relaxed)) {
            Some(limit) if limit != Self::NO_LIMIT => limit,
            _ => default,
        }
    }

    /// Whether it has a limit of its own.
    pub(crate) fn has_own_limit(self) -> bool {
        // Relaxed: see `limit`.
        self.limit.is_some_and(|limit| limit.load(Ordering::Relaxed) != Self::NO_LIMIT)
    }
}

impl Cell {
    pub(crate) fn new(state: CellState) -> Self {
        Self(Word::new(state.0))
    }

    /// The quota that it counts for, which never changes.
    #[inline(always)]
    pub(crate) fn quota(&self) -> QuotaId {
        self.guess().quota()
    }

    /// Whether somebody is in the middle of a change.
    pub(crate) fn is_marked(&self) -> bool {
        let state = self.load();
        state.is_refunding() || state.is_held()
    }

    /// The state at one instant.
    #[inline]
    pub(crate) fn load(&self) -> CellState {
        let mut guess = CellState(self.0.guess());
        loop {
            // A window never comes back: when it is the same before and after, the usage that was
            // read in between is of that window.
            let again = CellState(self.0.guess());
            if again.window() == guess.window() {
                return again;
            }
            guess = again;
        }
    }

    /// The state now, its halves maybe not of one instant: for a first attempt, which the
    /// compare-and-swap then checks.
    #[inline(always)]
    pub(crate) fn guess(&self) -> CellState {
        CellState(self.0.guess())
    }

    /// Takes a state over that is of a newer window, or of the same. The caller has the shard's
    /// write lock.
    pub(crate) fn load_newer(&mut self, state: CellState) {
        if state.window() >= self.load().window() {
            self.0 = Word::new(state.0);
        }
    }

    /// Takes this state instead. Nobody else knows the cell.
    pub(super) fn overwrite(&self, state: CellState) {
        let mut current = self.guess();
        while let Err(now) = self.swap(current, state) {
            current = now;
        }
    }

    /// Adds `amount` in `window` (or the cell's, where that is newer), if usage stays within
    /// `limit`. The new state, or the one that refused.
    #[inline]
    pub(crate) fn add(
        &self,
        window: WindowStart,
        amount: u64,
        limit: u64,
    ) -> Result<CellState, CellState> {
        let mut current = self.load();
        let mut patience = Patience::default();
        loop {
            if current.is_held() {
                patience.wait();
                current = self.load();
                continue;
            }
            let seen = current.seen_from(window);
            let next = seen.plus(amount, limit).ok_or(seen)?;
            match self.swap(current, next) {
                Ok(()) => return Ok(next),
                Err(now) => current = now,
            }
        }
    }

    #[inline(always)]
    fn swap(&self, current: CellState, next: CellState) -> Result<(), CellState> {
        self.0.compare_exchange(current.0, next.0).map_err(CellState)
    }

    /// The fast path of [`add`](Self::add), to be inlined: the cell is in the window of `empty`,
    /// its state before any use, nobody else changes it just now, and the amount fits. `None` in
    /// any other case, with nothing changed.
    #[inline(always)]
    pub(crate) fn add_in_window(
        &self,
        current: CellState,
        empty: CellState,
        amount: u64,
        limit: u64,
    ) -> Option<CellState> {
        if (current.0 ^ empty.0) >> WINDOW_SHIFT != 0 {
            return None;
        }
        let next = current.plus(amount, limit)?;
        if self.swap(current, next).is_ok() {
            return Some(next);
        }
        step_back();
        None
    }

    /// Holds the cell, in `window` or in its own where that is newer: until it is
    /// [`release`](Self::release)d nobody else changes it. The state, without the mark; `None`
    /// while another holds it or gives back.
    pub(crate) fn try_hold(&self, window: WindowStart) -> Option<CellState> {
        let mut current = self.load();
        loop {
            if current.is_held() || current.is_refunding() {
                return None;
            }
            let seen = current.seen_from(window);
            match self.swap(current, CellState(seen.0 | HOLD_MARK)) {
                Ok(()) => return Some(seen),
                Err(now) => current = now,
            }
        }
    }

    /// The fast path of [`try_hold`](Self::try_hold), to be inlined: the cell is in the window of
    /// `empty`, its state before any use, and nobody is in the middle of a change. `None` in any
    /// other case.
    #[inline(always)]
    pub(crate) fn try_hold_in_window(&self, empty: CellState) -> Option<CellState> {
        let mut current = self.guess();
        loop {
            if (current.0 ^ empty.0) >> WINDOW_SHIFT != 0 || current.is_held() {
                return None;
            }
            match self.swap(current, CellState(current.0 | HOLD_MARK)) {
                Ok(()) => return Some(current),
                Err(now) => current = now,
            }
        }
    }

    /// Ends a hold that began with the state `seen`, leaving the state `next`: the same but for the
    /// usage. By a store, since nobody else changes a held cell.
    #[inline(always)]
    pub(crate) fn release(&self, seen: CellState, next: CellState) {
        debug_assert_eq!(self.load().0, seen.0 | HOLD_MARK, "nobody else changes a held cell");
        debug_assert_eq!(seen.0 >> WINDOW_SHIFT, next.0 >> WINDOW_SHIFT, "only the usage changes");
        self.0.store_lower(next.lower());
    }

    /// Begins to give back up to `amount` of what is used in `window`, except what `kept` says must
    /// stay in the window. `None` while another refund of this counter is under way, or another
    /// operation holds it. Otherwise the refund must be finished; it does so when dropped.
    pub(crate) fn begin_refund(
        &self,
        window: WindowStart,
        amount: u64,
        kept: impl FnOnce(WindowStart) -> u64,
    ) -> Option<Refund<'_>> {
        let mut current = self.load();
        loop {
            if current.is_refunding() || current.is_held() {
                return None;
            }
            let seen = current.seen_from(window);
            match self.swap(current, CellState(seen.0 | REFUND_MARK)) {
                Ok(()) => {
                    // From here on what is kept does not change: who would change it must hold
                    // the cell first.
                    let window = seen.window();
                    let mut refund = Refund { cell: self, window, amount: 0 };
                    refund.amount = amount.min(seen.used().saturating_sub(kept(window)));
                    return Some(refund);
                }
                Err(now) => current = now,
            }
        }
    }
}

/// Lets another thread that counts in the same cell go on for a moment: the cell's line then stays
/// with one processor for several operations, which is quicker for both than if it went to and fro
/// for each.
#[cold]
#[inline(never)]
fn step_back() {
    for _ in 0..STEP_BACK_SPINS {
        crate::sync::spin_loop();
    }
}

/// A refund between its mark and its subtraction: what it gives back can't shrink any more, so it
/// can be recorded.
#[derive(Debug)]
pub(crate) struct Refund<'a> {
    cell: &'a Cell,
    window: WindowStart,
    amount: u64,
}

impl Refund<'_> {
    /// The window that the refund belongs to.
    pub(crate) fn window(&self) -> WindowStart {
        self.window
    }

    /// What is given back: the amount asked for, or all that was used where that is less.
    pub(crate) fn amount(&self) -> u64 {
        self.amount
    }

    /// Subtracts, clears the mark, and returns the state after it.
    pub(crate) fn finish(self) -> CellState {
        let state = self.settle();
        std::mem::forget(self);
        state
    }

    fn settle(&self) -> CellState {
        let mut current = self.cell.load();
        loop {
            let unmarked = CellState(current.0 & !REFUND_MARK);
            // In a newer window there is nothing to subtract from: the refund belongs to the one
            // before.
            let next = if unmarked.window() == self.window {
                unmarked.with_used(unmarked.used().saturating_sub(self.amount))
            } else {
                unmarked
            };
            match self.cell.swap(current, next) {
                Ok(()) => return next,
                Err(now) => current = now,
            }
        }
    }
}

impl Drop for Refund<'_> {
    fn drop(&mut self) {
        self.settle();
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::testing::watched;

    const JANUARY: WindowStart = WindowStart(1_767_225_600_000);
    const FEBRUARY: WindowStart = WindowStart(1_769_904_000_000);

    fn state(window: WindowStart, used: u64) -> CellState {
        CellState::new(QuotaId::from_u16(3), window, used)
    }

    fn cell(window: WindowStart, used: u64) -> Cell {
        Cell::new(state(window, used))
    }

    /// Under a real-time policy to let others run is to let those of the same priority run: the
    /// holder, of a lower one, once never got the processor that the one who waited for it had.
    #[test]
    fn who_waits_for_a_cell_that_is_held_leaves_the_processor() {
        let cell = cell(JANUARY, 9);
        let seen = cell.try_hold(JANUARY).expect("nobody else holds it");
        let (end, is_ending) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| {
            let waiter = watched(scope, || cell.add(JANUARY, 1, 10));
            let held = &cell;
            let holder = scope.spawn(move || {
                // Long enough to fail, where nobody ever sleeps.
                let _ = is_ending.recv_timeout(Duration::from_secs(20));
                held.release(seen, seen);
            });
            assert!(waiter.waits());
            end.send(()).expect("the holder waits for it");
            holder.join().expect("no panic");
            assert_eq!(waiter.join(), Ok(state(JANUARY, 10)));
        });
    }

    #[test]
    fn a_state_keeps_what_it_is_made_of() {
        let highest = QuotaId::from_u16(u16::try_from(QUOTAS_MAX - 1).expect("15 bits"));
        let made = CellState::new(highest, WindowStart::MAX, AMOUNT_MAX);
        assert_eq!(
            (made.quota(), made.window(), made.used()),
            (highest, WindowStart::MAX, AMOUNT_MAX)
        );
        assert!(!made.is_refunding());
        let later = state(JANUARY, 5).seen_from(FEBRUARY);
        assert_eq!(later, state(FEBRUARY, 0));
    }

    #[test]
    fn the_last_unit_fits_and_one_more_does_not() {
        let cell = cell(JANUARY, 9);
        assert_eq!(cell.add(JANUARY, 2, 10), Err(state(JANUARY, 9)));
        assert_eq!(cell.add(JANUARY, 1, 10), Ok(state(JANUARY, 10)));
        assert_eq!(cell.add(JANUARY, 1, 10), Err(state(JANUARY, 10)));
    }

    #[test]
    fn a_newer_window_starts_empty_and_an_older_one_is_not_reopened() {
        let cell = cell(JANUARY, 10);
        assert_eq!(cell.add(FEBRUARY, 3, 10), Ok(state(FEBRUARY, 3)));
        assert_eq!(cell.add(JANUARY, 3, 10), Ok(state(FEBRUARY, 6)));
        assert_eq!(cell.add(JANUARY, 5, 10), Err(state(FEBRUARY, 6)));
    }

    #[test]
    fn usage_never_wraps() {
        let cell = cell(JANUARY, AMOUNT_MAX);
        assert!(cell.add(JANUARY, AMOUNT_MAX, AMOUNT_MAX).is_err());
        assert!(cell.add(JANUARY, u64::MAX, u64::MAX).is_err());
        assert_eq!(cell.load().used(), AMOUNT_MAX);
    }

    #[test]
    fn a_refund_gives_back_what_is_used_at_most() {
        let cell = cell(JANUARY, 5);
        let refund = cell.begin_refund(JANUARY, 8, |_| 0).expect("no other refund");
        assert_eq!(refund.amount(), 5);
        assert!(cell.begin_refund(JANUARY, 1, |_| 0).is_none(), "one refund at a time");
        assert_eq!(cell.add(JANUARY, 2, 10), Ok(CellState(state(JANUARY, 7).0 | REFUND_MARK)));
        assert_eq!(refund.finish(), state(JANUARY, 2));
        assert!(cell.begin_refund(JANUARY, 1, |_| 0).is_some());
    }

    #[test]
    fn a_refund_that_crosses_a_window_leaves_the_new_one_alone() {
        let cell = cell(JANUARY, 5);
        let refund = cell.begin_refund(JANUARY, 5, |_| 0).expect("no other refund");
        assert!(cell.add(FEBRUARY, 4, 10).is_ok());
        assert_eq!(refund.window(), JANUARY);
        assert_eq!(refund.finish(), state(FEBRUARY, 4));
    }

    #[test]
    fn a_refund_leaves_what_is_kept() {
        let cell = cell(JANUARY, 5);
        let refund = cell.begin_refund(JANUARY, 5, |_| 3).expect("no other refund");
        assert_eq!((refund.amount(), refund.finish()), (2, state(JANUARY, 3)));
        assert_eq!(cell.begin_refund(JANUARY, 5, |_| 4).map(|refund| refund.amount()), Some(0));
    }

    #[test]
    fn a_held_cell_is_read_and_not_changed() {
        let cell = cell(JANUARY, 5);
        let seen = cell.try_hold(FEBRUARY).expect("nobody holds it");
        assert_eq!(seen, state(FEBRUARY, 0));
        assert!(cell.is_marked() && cell.try_hold(FEBRUARY).is_none());
        assert!(cell.begin_refund(FEBRUARY, 1, |_| 0).is_none());
        let empty = state(FEBRUARY, 0);
        assert_eq!(cell.add_in_window(cell.guess(), empty, 1, AMOUNT_MAX), None);
        assert_eq!(cell.load().used(), 0);
        assert!(cell.load().has_room(AMOUNT_MAX, AMOUNT_MAX));
        let next = seen.plus(3, 10).expect("it fits");
        cell.release(seen, next);
        assert_eq!(cell.load(), state(FEBRUARY, 3));
        assert!(!cell.is_marked());
        assert_eq!(cell.load().minus(2), state(FEBRUARY, 1));
    }

    #[test]
    fn what_racing_threads_are_given_is_the_limit_exactly() {
        const LIMIT: u64 = 10_000;
        let cell = cell(JANUARY, 0);
        let admitted: u64 = std::thread::scope(|scope| {
            let workers: Vec<_> = (1..=4)
                .map(|amount| {
                    let cell = &cell;
                    scope.spawn(move || {
                        let mut admitted = 0;
                        while cell.add(JANUARY, amount, LIMIT).is_ok() {
                            admitted += amount;
                        }
                        admitted
                    })
                })
                .collect();
            workers.into_iter().map(|worker| worker.join().expect("a worker")).sum()
        });
        assert_eq!(admitted, LIMIT);
        assert_eq!(cell.load().used(), LIMIT);
    }
}

#[cfg(all(test, loom))]
mod loom_tests;
