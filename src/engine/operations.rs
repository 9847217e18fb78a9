//! The operations: look the counter up, take a lane, change the cell, write the record. In this
//! order, so that nothing can fail once the cell has changed.

mod batch;
mod fast;
mod unlogged;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::admission::cell::{Cell, CellState, Live};
use crate::admission::quotas::QuotaState;
use crate::admission::shared::{Handle, SHARED_MAX, SharedCell, SharedCells};
use crate::admission::table::{Key, Operation};
use crate::clock::uptime;
use crate::config::Backpressure;
use crate::engine::Engine;
use crate::engine::operations::fast::Way;
use crate::error::{Error, Resource, Result};
use crate::flush::commit::Target;
use crate::fold::SumKey;
use crate::model::{AMOUNT_MAX, Decision, QuotaId, Timestamp, Usage, WindowStart, is_valid_amount};
use crate::sync::Patience;
use crate::wal::lanes::{Lanes, NoLane};
use crate::wal::record::Record;
pub(crate) use unlogged::Unlogged;

/// How long a caller sleeps at a time while it waits for room in the rings.
const ROOM_WAIT: Duration = Duration::from_millis(1);

/// A counter as an operation meets it: in the map, or through a handle.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Counted<'a> {
    pub(crate) user: u64,
    pub(crate) quota: &'a QuotaState,
    /// The cell, where the caller holds a handle.
    pub(crate) cell: Option<&'a SharedCell>,
}

/// The outcome of trying to add.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Admission {
    /// The state after it, or the one that refused.
    state: CellState,
    is_admitted: bool,
    limit: u64,
    /// Where the record went, if it was logged.
    target: Option<Target>,
}

impl Engine {
    #[inline(always)]
    pub(crate) fn quota(&self, id: QuotaId) -> Result<&Arc<QuotaState>> {
        match self.quotas.get(id) {
            Some(quota) => Ok(quota),
            None => Err(Error::UnknownQuota(id)),
        }
    }

    #[inline(always)]
    pub(crate) fn counted(&self, user: u64, id: QuotaId) -> Result<Counted<'_>> {
        Ok(Counted { user, quota: self.quota(id)?, cell: None })
    }

    /// Calls `operate` with the counter, if it is there.
    #[inline]
    pub(super) fn find_cell<R>(
        &self,
        counter: &Counted<'_>,
        operate: impl FnOnce(Live<'_>) -> R,
    ) -> Option<R> {
        match counter.cell {
            Some(cell) => Some(operate(cell.live())),
            None => self.table.find(counter.key(), operate),
        }
    }

    /// Calls `operate` with the counter, creating it where it is not there.
    #[inline]
    pub(super) fn with_cell<R>(
        &self,
        counter: &Counted<'_>,
        mut operate: impl FnMut(Live<'_>) -> R,
    ) -> R {
        loop {
            if let Some(result) = self.find_cell(counter, &mut operate) {
                return result;
            }
            let forget = self.forgetting();
            self.table.insert(counter.key(), || self.new_cell(counter.quota), forget);
        }
    }

    /// Puts the counter in where it is not there.
    pub(super) fn create(&self, counter: &Counted<'_>) {
        self.with_cell(counter, |_| ());
    }

    pub(super) fn new_cell(&self, quota: &QuotaState) -> CellState {
        let window = quota.window_at(self.clock.now());
        CellState::new(quota.id(), quota.window_for_new_cell(window), 0)
    }

    /// Says of counters whether they can be forgotten, now. Asks the clock, which may be the
    /// application's, before a shard of the map is locked, and once for all of it.
    fn forgetting(&self) -> impl Fn(Key, CellState) -> bool {
        // What a clock says that is ahead for a while must not end a window for good.
        let now = self.believed.now();
        move |key, state| {
            self.quotas.get(key.quota).is_some_and(|quota| quota.forget(state.window(), now))
        }
    }

    /// Adds `amount` if usage stays within the counter's limit, or within `bound` where one is
    /// given.
    #[inline]
    pub(crate) fn add(
        &self,
        counter: &Counted<'_>,
        amount: u64,
        bound: Option<u64>,
    ) -> Result<Admission> {
        check_amount(amount)?;
        let (mut now, mut is_fresh) = (self.clock.now(), false);
        let mut deadline = None;
        loop {
            let window = counter.quota.window_at(now);
            let attempt = self.with_cell(counter, |live| {
                add_to_cell(&self.lanes, live, counter, window, amount, bound)
            });
            let admission = match attempt {
                Ok(admission) => admission,
                Err(NoLane::Full) if self.wait_for_room(1, &mut deadline) => {
                    (now, is_fresh) = (self.clock.now(), false);
                    continue;
                }
                Err(why) => self.without_lane(counter, amount, bound, why)?,
            };
            if admission.is_admitted {
                return Ok(admission);
            }
            if is_fresh {
                self.refuse_when_closed()?;
                return Ok(admission);
            }
            (now, is_fresh) = (self.before_denial(), true);
        }
    }

    /// There is no lane, up to the deadline: the configured answer.
    #[cold]
    fn without_lane(
        &self,
        counter: &Counted<'_>,
        amount: u64,
        bound: Option<u64>,
        why: NoLane,
    ) -> Result<Admission> {
        if why == NoLane::Closed || self.config.backpressure == Backpressure::Reject {
            return Err(self.no_lane(why));
        }
        // Another one may have begun meanwhile.
        let window = counter.quota.window_at(self.clock.now());
        let admission = self.with_cell(counter, |live| {
            let limit = live.limit(counter.quota.limit());
            let add = || live.cell.add(window, amount, bound.unwrap_or(limit));
            let result = self.unlogged.admit(counter.key(), amount, add)?;
            let (Ok(state) | Err(state)) = result;
            Some(Admission { state, is_admitted: result.is_ok(), limit, target: None })
        });
        let Some(admission) = admission else { return Err(self.no_lane(why)) };
        if admission.is_admitted {
            self.counts.unlogged.add_one();
        }
        Ok(admission)
    }

    /// What a call without a lane is told.
    #[cold]
    pub(super) fn no_lane(&self, why: NoLane) -> Error {
        self.counts.failed.add_one();
        match why {
            NoLane::Closed => Error::Closed,
            NoLane::Full => Error::Backpressure { waited: self.config.backpressure_deadline },
        }
    }

    /// Whether a lane has room for this many records before the `deadline`, which is that of the
    /// call, set by its first wait: another call may take the room that was seen here. Holds
    /// neither lane nor shard.
    pub(super) fn wait_for_room(&self, slots: u64, deadline: &mut Option<Duration>) -> bool {
        self.counts.backpressure_waits.add_one();
        let deadline =
            *deadline.get_or_insert_with(|| uptime() + self.config.backpressure_deadline);
        // Relaxed: a hint, which the drainer sees by the time its pulse does.
        self.room.waiting.fetch_add(1, Ordering::Relaxed);
        let has_room = self.wait_for_room_until(slots, deadline);
        self.room.waiting.fetch_sub(1, Ordering::Relaxed);
        has_room
    }

    fn wait_for_room_until(&self, slots: u64, deadline: Duration) -> bool {
        loop {
            match self.lanes.acquire(slots) {
                Ok(_) | Err(NoLane::Closed) => return true,
                Err(NoLane::Full) => {}
            }
            if uptime() >= deadline {
                return false;
            }
            self.pulses.drain.kick();
            self.pulses.files.kick();
            let mut room = self.room.lock.lock();
            self.room.freed.wait_for(&mut room, ROOM_WAIT);
        }
    }

    /// Checks without counting.
    #[inline(always)]
    pub(crate) fn check(&self, counter: &Counted<'_>, amount: u64) -> Result<Decision> {
        match self.check_fast(counter, amount) {
            Some(decision) => Ok(decision),
            None => self.check_slow(*counter, amount),
        }
    }

    #[inline(never)]
    fn check_slow(&self, counter: Counted<'_>, amount: u64) -> Result<Decision> {
        let counter = &counter;
        if let Some(denial) = self.deny_fast(counter, amount) {
            return Ok(denial);
        }
        check_amount(amount)?;
        let (mut now, mut is_fresh) = (self.clock.now(), false);
        loop {
            let (state, limit) = self.peek(counter, counter.quota.window_at(now));
            let is_allowed = state.has_room(amount, limit);
            if is_allowed || is_fresh {
                return Ok(self.decide(counter, state, limit, amount, is_allowed, now));
            }
            (now, is_fresh) = (self.before_denial(), true);
        }
    }

    /// What comes before any denial, and before a last look at the counter: the coarse clock may be
    /// behind, so the real one is asked; and what is reserved may be over. Others may give it back
    /// at the same time, which is why that look comes in any case.
    pub(super) fn before_denial(&self) -> Timestamp {
        let now = self.clock.refresh();
        if self.reservations.is_due(now) {
            self.expire(now);
        }
        now
    }

    /// The state and the limit, without creating the counter.
    #[inline]
    fn peek(&self, counter: &Counted<'_>, window: WindowStart) -> (CellState, u64) {
        let default = counter.quota.limit();
        let peek = Peek { window, default };
        let found = match counter.cell {
            Some(cell) => peek.run(cell.live()),
            None => {
                let (key, table) = (counter.key(), &self.table);
                let closed = || table.find(key, |live| peek.run(live)).flatten();
                table.find_open(table.place(key), peek).or_else(closed)
            }
        };
        found.unwrap_or_else(|| self.unused(counter, window))
    }

    /// What [`peek`](Self::peek) says of a counter that is not there.
    fn unused(&self, counter: &Counted<'_>, window: WindowStart) -> (CellState, u64) {
        let window = counter.quota.window_for_new_cell(window);
        (CellState::new(counter.quota.id(), window, 0), counter.quota.limit())
    }

    #[inline(always)]
    pub(super) fn decide(
        &self,
        counter: &Counted<'_>,
        state: CellState,
        limit: u64,
        amount: u64,
        is_allowed: bool,
        now: Timestamp,
    ) -> Decision {
        let resets_at = counter.quota.end_of(state.window());
        Decision::new(is_allowed, state.used(), limit, amount, resets_at, now)
    }

    /// Checks and counts in one step.
    #[inline(always)]
    pub(crate) fn try_consume(
        &self,
        counter: &Counted<'_>,
        amount: u64,
        is_sync: bool,
    ) -> Result<Decision> {
        if !is_sync && let Some(admission) = self.add_fast(counter, amount, None, Way::Own) {
            return Ok(admission.decision(amount));
        }
        self.try_consume_slow(*counter, amount, is_sync)
    }

    #[inline(never)]
    fn try_consume_slow(
        &self,
        counter: Counted<'_>,
        amount: u64,
        is_sync: bool,
    ) -> Result<Decision> {
        if !is_sync && let Some(admission) = self.add_fast_in_shared_lane(&counter, amount, None) {
            return Ok(admission.decision(amount));
        }
        if let Some(denial) = self.deny_fast(&counter, amount) {
            self.refuse_when_closed()?;
            self.counts.denied.add_one();
            return Ok(denial);
        }
        let admission = self.add(&counter, amount, None)?;
        if !admission.is_admitted {
            self.counts.denied.add_one();
        }
        let Admission { state, limit, is_admitted, target } = admission;
        self.wait_if_durable(target, is_admitted, is_sync)?;
        Ok(self.decide(&counter, state, limit, amount, is_admitted, self.clock.now()))
    }

    /// Counts what happened, past the limit if need be.
    #[inline(always)]
    pub(crate) fn consume(
        &self,
        counter: &Counted<'_>,
        amount: u64,
        is_sync: bool,
    ) -> Result<Usage> {
        let bound = Some(AMOUNT_MAX);
        if !is_sync && let Some(admission) = self.add_fast(counter, amount, bound, Way::Own) {
            return Ok(self.usage_after(counter, &admission));
        }
        self.consume_slow(*counter, amount, is_sync)
    }

    #[inline(never)]
    fn consume_slow(&self, counter: Counted<'_>, amount: u64, is_sync: bool) -> Result<Usage> {
        let (counter, bound) = (&counter, Some(AMOUNT_MAX));
        if !is_sync && let Some(admission) = self.add_fast_in_shared_lane(counter, amount, bound) {
            return Ok(self.usage_after(counter, &admission));
        }
        let Admission { state, limit, is_admitted, target } = self.add(counter, amount, bound)?;
        let usage = self.consumed(counter, amount, is_admitted, state, limit)?;
        self.wait_if_durable(target, is_admitted, is_sync)?;
        Ok(usage)
    }

    /// The usage after what was counted past limits: only what no counter can hold was refused.
    pub(super) fn consumed(
        &self,
        counter: &Counted<'_>,
        amount: u64,
        is_admitted: bool,
        state: CellState,
        limit: u64,
    ) -> Result<Usage> {
        if !is_admitted {
            return Err(Error::Overflow { used: state.used(), amount });
        }
        let reserved = self.reserved(counter, state.window());
        Ok(usage_of(counter.quota, state, limit).with_reserved(reserved))
    }

    /// Waits for the disk where the call or the configuration asks for it. What was admitted
    /// without a record can't get there.
    #[inline]
    pub(super) fn wait_if_durable(
        &self,
        target: Option<Target>,
        is_admitted: bool,
        is_sync: bool,
    ) -> Result<()> {
        match target {
            _ if !is_sync && !self.durable_consumes => Ok(()),
            Some(target) => self.committer.wait_durable(target),
            None if is_admitted => Err(Error::NotLogged),
            None => Ok(()),
        }
    }

    /// Gives back up to `amount`, and returns what was given back.
    pub(crate) fn refund(&self, counter: &Counted<'_>, amount: u64) -> Result<u64> {
        check_amount(amount)?;
        let (mut deadline, mut patience) = (None, Patience::default());
        loop {
            let window = counter.quota.window_at(self.clock.now());
            if self.peek(counter, window).0.used() == 0 {
                self.refuse_when_closed()?;
                return Ok(0);
            }
            let attempt = self.with_cell(counter, |live| {
                let kept = |window| self.reserved(counter, window);
                let unlogged = |window, given| self.unlogged.take(counter.key(), window, given);
                refund_from_cell(&self.lanes, live.cell, counter, window, amount, kept, unlogged)
            });
            match attempt {
                Ok(Some((given, target))) => {
                    if let Some(target) = target.filter(|_| self.durable_consumes) {
                        self.committer.wait_durable(target)?;
                    }
                    return Ok(given);
                }
                // Another refund of this counter is under way: it waits for nothing, so neither do
                // we for long.
                Ok(None) => patience.wait(),
                Err(NoLane::Full) if self.wait_for_room(1, &mut deadline) => {}
                Err(why) => return Err(self.no_lane(why)),
            }
        }
    }

    /// What is used now.
    pub(crate) fn usage(&self, counter: &Counted<'_>) -> Usage {
        let window = counter.quota.window_at(self.clock.refresh());
        let mut patience = Patience::default();
        loop {
            let found = self.find_cell(counter, |live| {
                let read = self.reservations.read(live.cell, counter.user, window);
                read.map(|(state, reserved)| (state, live.limit(counter.quota.limit()), reserved))
            });
            let unused = || {
                let (state, limit) = self.unused(counter, window);
                Some((state, limit, 0))
            };
            if let Some((state, limit, reserved)) = found.unwrap_or_else(unused) {
                return usage_of(counter.quota, state, limit).with_reserved(reserved);
            }
            patience.wait();
        }
    }

    /// How much of the usage in a window is reserved.
    #[inline(always)]
    pub(super) fn reserved(&self, counter: &Counted<'_>, window: WindowStart) -> u64 {
        let (quota, user) = (counter.quota.id(), counter.user);
        self.reservations.reserved(SumKey { quota, window, user })
    }

    /// The counters that live outside the map.
    #[inline(always)]
    pub(crate) fn shared(&self) -> &SharedCells {
        self.table.shared()
    }

    /// The counter's cell, shared from now on.
    pub(crate) fn share(&self, counter: &Counted<'_>) -> Result<Handle<'_>> {
        let forget = self.forgetting();
        let handle = self.table.share(counter.key(), || self.new_cell(counter.quota), forget);
        handle.ok_or_else(too_many_shared)
    }
}

/// A look at a counter, from this window.
#[derive(Debug, Clone, Copy)]
struct Peek {
    window: WindowStart,
    /// The quota's limit.
    default: u64,
}

impl Operation for Peek {
    /// The state, and the limit.
    type Result = (CellState, u64);

    const CHANGES: bool = false;

    #[inline(always)]
    fn run(self, live: Live<'_>) -> Option<(CellState, u64)> {
        Some((live.cell.load().seen_from(self.window), live.limit(self.default)))
    }
}

/// One attempt on a cell: takes a lane, changes the cell, writes the record. In this order, so that
/// nothing can fail once the cell has changed.
#[inline]
fn add_to_cell(
    lanes: &Lanes,
    live: Live<'_>,
    counter: &Counted<'_>,
    window: WindowStart,
    amount: u64,
    bound: Option<u64>,
) -> std::result::Result<Admission, NoLane> {
    let (cell, limit) = (live.cell, live.limit(counter.quota.limit()));
    let bound = bound.unwrap_or(limit);
    // A refusal needs no lane. Also fetches the cell's line while the lane is taken.
    let seen = cell.load().seen_from(window);
    if !seen.has_room(amount, bound) {
        return Ok(Admission { state: seen, is_admitted: false, limit, target: None });
    }
    let (lane, mut permit) = lanes.acquire(1)?;
    match cell.add(window, amount, bound) {
        Ok(state) => {
            let number = permit.next();
            permit.append(&Record {
                user: counter.user,
                quota: counter.quota.id(),
                window: state.window(),
                delta: amount.cast_signed(),
            });
            let target = Some(Target::Record { lane, number });
            Ok(Admission { state, is_admitted: true, limit, target })
        }
        Err(state) => Ok(Admission { state, is_admitted: false, limit, target: None }),
    }
}

/// Takes a lane, marks the refund in the cell, writes the record, and only then gives the units
/// back. `None` while another refund of the counter is under way. Otherwise what was given back,
/// and where its record went, if it has one: what was admitted `unlogged` is given back unlogged.
fn refund_from_cell(
    lanes: &Lanes,
    cell: &Cell,
    counter: &Counted<'_>,
    window: WindowStart,
    amount: u64,
    kept: impl FnOnce(WindowStart) -> u64,
    unlogged: impl FnOnce(WindowStart, u64) -> u64,
) -> std::result::Result<Option<(u64, Option<Target>)>, NoLane> {
    let (lane, mut permit) = lanes.acquire(1)?;
    let Some(refund) = cell.begin_refund(window, amount, kept) else { return Ok(None) };
    let given = refund.amount();
    // The log can't give back what it has not counted: the sum would be too small from then on.
    let logged = given - unlogged(refund.window(), given);
    let number = permit.next();
    if logged > 0 {
        permit.append(&Record {
            user: counter.user,
            quota: counter.quota.id(),
            window: refund.window(),
            delta: -logged.cast_signed(),
        });
    }
    refund.finish();
    Ok(Some((given, (logged > 0).then_some(Target::Record { lane, number }))))
}

impl Counted<'_> {
    #[inline(always)]
    pub(super) fn key(&self) -> Key {
        Key { user: self.user, quota: self.quota.id() }
    }
}

fn usage_of(quota: &QuotaState, state: CellState, limit: u64) -> Usage {
    let resets_at = quota.end_of(state.window());
    Usage::new(state.used(), limit, state.window(), quota.is_lifetime(), resets_at)
}

/// More counters have a handle or a limit of their own than can.
pub(super) fn too_many_shared() -> Error {
    Error::TooMany { what: Resource::SharedCounters, bound: SHARED_MAX }
}

#[inline]
pub(crate) fn check_amount(amount: u64) -> Result<()> {
    if is_valid_amount(amount) { Ok(()) } else { Err(Error::InvalidAmount(amount)) }
}

#[cfg(all(test, loom))]
mod loom_tests;
