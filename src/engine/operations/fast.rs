//! The fast paths of adding and of checking, as short as they can be.

use crate::admission::cell::Live;
use crate::admission::quotas::Current;
use crate::admission::table::{Key, Operation};
use crate::engine::Engine;
use crate::engine::operations::Counted;
use crate::model::{Decision, Timestamp, Usage, is_valid_amount};
use crate::wal::lanes::Lanes;
use crate::wal::record::Record;

/// What the fast path yields: it was admitted, and nobody waits for its record.
#[derive(Debug, Clone, Copy)]
pub(super) struct FastAdmission {
    window: Current,
    used: u64,
    limit: u64,
    now: Timestamp,
}

impl FastAdmission {
    #[inline(always)]
    pub(super) fn decision(self, amount: u64) -> Decision {
        Decision::new(true, self.used, self.limit, amount, self.window.resets_at(), self.now)
    }
}

/// Which lane the fast path takes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Way {
    /// The thread's own: no call on the way.
    Own,
    /// The one that it shares with others.
    Shared,
}

/// What the fast path adds.
#[derive(Debug, Clone, Copy)]
pub(super) struct Addition<'a> {
    pub(super) lanes: &'a Lanes,
    pub(super) way: Way,
    pub(super) key: Key,
    pub(super) window: Current,
    pub(super) amount: u64,
    /// The quota's limit.
    pub(super) default: u64,
    /// What the usage may not pass, where that is not the counter's limit.
    pub(super) bound: Option<u64>,
}

impl Operation for Addition<'_> {
    /// The usage after it, and the limit.
    type Result = (u64, u64);

    /// The fast path of [`add_to_cell`](super::add_to_cell), or nothing. By value throughout:
    /// what lies in registers does not wait for memory.
    #[inline(always)]
    fn run(self, live: Live<'_>) -> Option<(u64, u64)> {
        let Self { lanes, way, key: Key { user, quota }, window, amount, default, bound } = self;
        let limit = live.limit(default);
        let seen = live.cell.guess();
        let mut permit = match way {
            Way::Own => lanes.try_own(),
            Way::Shared => lanes.try_preferred_shared(),
        }?;
        let state =
            live.cell.add_in_window(seen, window.empty(), amount, bound.unwrap_or(limit))?;
        let (window, delta) = (window.start, amount.cast_signed());
        permit.append(&Record { user, quota, window, delta });
        Some((state.used(), limit))
    }
}

/// What the fast path of a check looks for, or that of a denial: whether the amount fits.
#[derive(Debug, Clone, Copy)]
struct Look<const FITS: bool> {
    window: Current,
    amount: u64,
    /// The quota's limit.
    default: u64,
}

impl<const FITS: bool> Operation for Look<FITS> {
    /// The usage, and the limit.
    type Result = (u64, u64);

    const CHANGES: bool = false;

    #[inline(always)]
    fn run(self, live: Live<'_>) -> Option<(u64, u64)> {
        let Self { window, amount, default } = self;
        let (limit, state) = (live.limit(default), live.cell.load());
        // Of a counter that somebody holds neither can be said.
        let fits = state.plus(amount, limit).is_some();
        let is_so = if FITS { fits } else { !fits && !state.is_held() };
        (is_so && state.window() == window.start).then_some((state.used(), limit))
    }
}

impl Engine {
    /// The fast path of [`check`](Self::check): the counter is in a shard that is open and in the
    /// current window, nobody holds it, and the amount fits. `None` in any other case.
    #[inline(always)]
    pub(super) fn check_fast(&self, counter: &Counted<'_>, amount: u64) -> Option<Decision> {
        if !is_valid_amount(amount) {
            return None;
        }
        let now = self.clock.now();
        let window = counter.quota.current(now)?;
        let look = Look::<true> { window, amount, default: counter.quota.limit() };
        let (used, limit) = self.look(counter, look)?;
        Some(Decision::new(true, used, limit, amount, window.resets_at(), now))
    }

    #[inline(always)]
    fn look<const FITS: bool>(
        &self,
        counter: &Counted<'_>,
        look: Look<FITS>,
    ) -> Option<(u64, u64)> {
        match counter.cell {
            Some(cell) => look.run(cell.live()),
            None => self.table.find_open(self.table.place(counter.key()), look),
        }
    }

    /// The fast path of a denial, for [`try_consume`](Self::try_consume) and
    /// [`check`](Self::check): the counter is in a shard that is open and in the current window,
    /// nobody holds it, and the amount does not fit, neither at first nor after what comes
    /// [before any denial](Self::before_denial). `None` in any other case.
    #[inline]
    pub(in crate::engine) fn deny_fast(
        &self,
        counter: &Counted<'_>,
        amount: u64,
    ) -> Option<Decision> {
        if !is_valid_amount(amount) {
            return None;
        }
        let refused_at = |now| {
            let window = counter.quota.current(now)?;
            let look = Look::<false> { window, amount, default: counter.quota.limit() };
            let (used, limit) = self.look(counter, look)?;
            Some(Decision::new(false, used, limit, amount, window.resets_at(), now))
        };
        let _ = refused_at(self.clock.now())?;
        refused_at(self.before_denial())
    }

    /// The fast path of [`add`](Self::add), inlined into callers as a whole: the counter is
    /// there and in the current window, the amount fits, the thread's lane is free. `None` in any
    /// other case, with nothing changed. Short on purpose: the processor then sees far enough ahead
    /// to fetch the next counter while this one's line is on its way.
    #[inline(always)]
    pub(super) fn add_fast(
        &self,
        counter: &Counted<'_>,
        amount: u64,
        bound: Option<u64>,
        way: Way,
    ) -> Option<FastAdmission> {
        if !is_valid_amount(amount) || self.durable_consumes {
            return None;
        }
        let now = self.clock.now();
        let window = counter.quota.current(now)?;
        let (key, default) = (counter.key(), counter.quota.limit());
        let addition = Addition { lanes: &self.lanes, way, key, window, amount, default, bound };
        let (used, limit) = match counter.cell {
            Some(cell) => addition.run(cell.live()),
            None => self.table.find_open(self.table.place(key), addition),
        }?;
        Some(FastAdmission { window, used, limit, now })
    }

    /// [`add_fast`](Self::add_fast) for a thread that shares its lane with others.
    #[inline]
    pub(super) fn add_fast_in_shared_lane(
        &self,
        counter: &Counted<'_>,
        amount: u64,
        bound: Option<u64>,
    ) -> Option<FastAdmission> {
        if !self.lanes.prefers_shared() {
            return None;
        }
        self.add_fast(counter, amount, bound, Way::Shared)
    }

    #[inline(always)]
    pub(super) fn usage_after(&self, counter: &Counted<'_>, admission: &FastAdmission) -> Usage {
        let FastAdmission { window, used, limit, .. } = *admission;
        let is_lifetime = counter.quota.is_lifetime();
        let usage = Usage::new(used, limit, window.start, is_lifetime, window.resets_at());
        usage.with_reserved(self.reserved(counter, window.start))
    }
}
