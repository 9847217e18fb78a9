//! The defined quotas, found by id without a lock, each with the window that is current.

use std::fmt;
use std::sync::{Arc, OnceLock};

use crate::admission::cell::CellState;
use crate::ledger::QUOTA_IDS;
use crate::model::{Definition, Overrun, QuotaId, Timestamp, Window, WindowStart};
use crate::sync::{AtomicBool, AtomicU64, Mutex, Ordering};

/// How many quotas a data directory can define: a cell has 15 bits for their ids.
pub(crate) const QUOTAS_MAX: usize = 1 << 15;
const _: () = assert!(QUOTAS_MAX <= QUOTA_IDS);

/// `end` of a window that never ends.
const NEVER: u64 = u64::MAX;

/// A window that is current.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Current {
    pub(crate) start: WindowStart,
    end: u64,
    upper: u64,
}

impl Current {
    /// When it ends; `None` for a lifetime.
    #[inline(always)]
    pub(crate) fn resets_at(self) -> Option<Timestamp> {
        (self.end != NEVER).then(|| Timestamp::from_unix_millis(self.end))
    }

    /// The state of a counter in it before any use.
    #[inline(always)]
    pub(crate) fn empty(self) -> CellState {
        CellState::from_upper(self.upper)
    }
}

/// One quota.
#[derive(Debug)]
pub(crate) struct QuotaState {
    definition: Definition,
    limit: AtomicU64,
    refuses_overrun: AtomicBool,
    /// The newest window that was current so far. Both only grow, and `start` is stored before
    /// `end`: a thread that sees an `end` sees its `start` or a newer one, and a newer one is not
    /// before that `end`, so that a torn pair contains no time.
    start: AtomicU64,
    end: AtomicU64,
    /// `start` as the quota's counters hold it, so that it need not be computed for each. Stored
    /// between the two: a thread that sees it sees its `start`, and one that sees an `end` sees its
    /// `upper`, or newer ones.
    upper: AtomicU64,
    /// No cell is created in a window that starts before this: such cells were forgotten.
    floor: AtomicU64,
    /// Held while the current window is replaced.
    turning: Mutex<()>,
}

impl QuotaState {
    pub(crate) fn new(definition: Definition, floor: WindowStart, now: Timestamp) -> Self {
        let span = definition.calendar.span_at(now);
        Self {
            limit: AtomicU64::new(definition.limit),
            refuses_overrun: AtomicBool::new(definition.overrun == Overrun::Refuse),
            start: AtomicU64::new(span.start.0),
            end: AtomicU64::new(span.end.map_or(NEVER, Timestamp::as_unix_millis)),
            upper: AtomicU64::new(CellState::new(definition.id, span.start, 0).upper()),
            floor: AtomicU64::new(floor.0),
            turning: Mutex::new(()),
            definition,
        }
    }

    /// What was defined. The limit in it is the one at the definition; [`limit`](Self::limit) is
    /// the one that applies.
    pub(crate) fn definition(&self) -> &Definition {
        &self.definition
    }

    #[inline(always)]
    pub(crate) fn id(&self) -> QuotaId {
        self.definition.id
    }

    /// Whether its window never ends.
    #[inline]
    pub(crate) fn is_lifetime(&self) -> bool {
        self.definition.calendar.window() == Window::Lifetime
    }

    /// The default limit.
    #[inline]
    pub(crate) fn limit(&self) -> u64 {
        // Relaxed: an operation that overlaps a change of the limit may use either.
        self.limit.load(Ordering::Relaxed)
    }

    /// What becomes of a commit beyond what was reserved.
    pub(crate) fn overrun(&self) -> Overrun {
        // Relaxed: as for `limit`.
        if self.refuses_overrun.load(Ordering::Relaxed) { Overrun::Refuse } else { Overrun::Charge }
    }

    fn redefine(&self, limit: u64, overrun: Overrun) {
        // Relaxed: see `limit`.
        self.limit.store(limit, Ordering::Relaxed);
        self.refuses_overrun.store(overrun == Overrun::Refuse, Ordering::Relaxed);
    }

    /// The window that `now` lies in.
    #[inline]
    pub(crate) fn window_at(&self, now: Timestamp) -> WindowStart {
        self.current(now).map_or_else(|| self.turn(now), |current| current.start)
    }

    /// The window that `now` lies in, if it was looked at before.
    #[inline(always)]
    pub(crate) fn current(&self, now: Timestamp) -> Option<Current> {
        // Acquire: pairs with the last Release in `turn`, so that the others are at least as new.
        let end = self.end.load(Ordering::Acquire);
        // Acquire: pairs with the other Release in `turn`, so that `start` is as new as `upper`.
        let upper = self.upper.load(Ordering::Acquire);
        // Relaxed: ordered by the loads before.
        let start = self.start.load(Ordering::Relaxed);
        let now_ms = now.as_unix_millis();
        let is_current = start <= now_ms && now_ms < end;
        is_current.then_some(Current { start: WindowStart(start), end, upper })
    }

    #[cold]
    fn turn(&self, now: Timestamp) -> WindowStart {
        let span = self.definition.calendar.span_at(now);
        // A thread that read the clock before others turned the window must not turn it back under
        // them; nor does a clock that was set back, which is why its calls come here.
        let is_newer = || span.start.0 > self.start.load(Ordering::Relaxed);
        if !is_newer() {
            return span.start;
        }
        let _turning = self.turning.lock();
        if !is_newer() {
            return span.start;
        }
        // Relaxed: published by the Releases that follow.
        self.start.store(span.start.0, Ordering::Relaxed);
        // Both Release: each pairs with its Acquire in `current`.
        let empty = CellState::new(self.id(), span.start, 0);
        self.upper.store(empty.upper(), Ordering::Release);
        self.end.store(span.end.map_or(NEVER, Timestamp::as_unix_millis), Ordering::Release);
        span.start
    }

    /// When a window of this quota ends; `None` for a lifetime.
    #[inline]
    pub(crate) fn end_of(&self, window: WindowStart) -> Option<Timestamp> {
        // Acquire, Relaxed: as in `current`. The pair may be torn when the window turns just now:
        // a newer `start` with an older `end`, which is not beyond it.
        let end = self.end.load(Ordering::Acquire);
        let start = self.start.load(Ordering::Relaxed);
        if start == window.0 && end > start {
            (end != NEVER).then(|| Timestamp::from_unix_millis(end))
        } else {
            self.definition.calendar.end_of(window)
        }
    }

    /// The window in which a new cell is created: the current one, unless cells of that one were
    /// forgotten already and the clock was set back since.
    pub(crate) fn window_for_new_cell(&self, window: WindowStart) -> WindowStart {
        // Relaxed: raised under the lock of the shard that the new cell goes to, for a cell with
        // the same key.
        window.max(WindowStart(self.floor.load(Ordering::Relaxed)))
    }

    /// Whether a cell of `window` can be forgotten at `now`; if so, no later cell opens in that
    /// window.
    pub(crate) fn forget(&self, window: WindowStart, now: Timestamp) -> bool {
        match self.definition.calendar.end_of(window) {
            Some(end) if end <= now => {
                // Relaxed: see `window_for_new_cell`. Windows tile time: the end is the next one's
                // start.
                self.floor.fetch_max(end.as_unix_millis(), Ordering::Relaxed);
                true
            }
            _ => false,
        }
    }
}

/// All quotas of a data directory.
pub(crate) struct Quotas {
    states: Box<[OnceLock<Arc<QuotaState>>]>,
}

impl Quotas {
    pub(crate) fn new() -> Self {
        Self { states: (0..QUOTAS_MAX).map(|_| OnceLock::new()).collect() }
    }

    #[inline]
    pub(crate) fn get(&self, id: QuotaId) -> Option<&Arc<QuotaState>> {
        self.states.get(usize::from(id.as_u16())).and_then(OnceLock::get)
    }

    /// Adds a quota, or gives the one with this id a new default limit and policy. Definitions come
    /// under the engine's lock, one at a time.
    pub(crate) fn define(&self, definition: Definition, floor: WindowStart, now: Timestamp) {
        let Some(slot) = self.states.get(usize::from(definition.id.as_u16())) else { return };
        let (limit, overrun) = (definition.limit, definition.overrun);
        slot.get_or_init(|| Arc::new(QuotaState::new(definition, floor, now)))
            .redefine(limit, overrun);
    }

    /// The defined quotas, by id: ids are handed out without gaps, from 0.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<QuotaState>> {
        self.states.iter().map_while(OnceLock::get)
    }
}

impl fmt::Debug for Quotas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

#[cfg(all(test, loom))]
mod loom_tests;
