//! Operations over several counters: every one is admitted, or none.
//!
//! A lane is taken first, then the shards of the map that the counters are in, then each counter's
//! cell is held, in the order of their keys. While all are held nobody else changes them, so the
//! decision is exact; the records are written, and each cell is released with its new state. An
//! operation that finds a cell held releases everything before it waits, so that nobody waits for
//! it, and a writer of a shard waits for no more than one operation. Since all use the same order,
//! whichever holds the last of the cells that several want can go on.

use std::mem;
use std::time::Duration;

use crate::admission::cell::{Cell, CellState, Live};
use crate::admission::reservations::Opening;
use crate::admission::table::Key;
use crate::engine::Engine;
use crate::engine::operations::{Counted, check_amount};
use crate::error::{Error, Result};
use crate::flush::commit::Target;
use crate::ledger::{Asked, PARTS_COMMON, PARTS_MAX, Part, Parts};
use crate::model::{Consume, Decisions, QuotaId, ReservationId, Timestamp};
use crate::seats::thread_hint;
use crate::sync::Patience;
use crate::wal::lane::Permit;
use crate::wal::lanes::{LaneIndex, NoLane};
use crate::wal::payload;
use crate::wal::record::{Item, Record};
use smallvec::SmallVec;

/// The states of an operation's counters, with their limits, in their order.
pub(super) type States = SmallVec<[(CellState, u64); PARTS_COMMON]>;

/// The counters of an operation, in the order in which they are held.
pub(super) type Members<'a> = SmallVec<[Member<'a>; PARTS_COMMON]>;

/// One counter of an operation, and how much is asked of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Member<'a> {
    pub(super) counter: Counted<'a>,
    pub(super) amount: u64,
}

/// What is asked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ask<'a> {
    /// In the order of their keys, each once; at most [`PARTS_MAX`].
    pub(super) members: &'a [Member<'a>],
    /// Instead of the counters' limits.
    pub(super) bound: Option<u64>,
    /// It is reserved, for so long from when it is counted.
    pub(super) ttl: Option<Duration>,
    /// It is asked for under this id.
    pub(super) request: Option<(u128, Asked)>,
    /// What is kept for sinks besides what is counted; may be empty.
    pub(super) payload: &'a [u8],
}

/// What came of it.
#[derive(Debug, Clone)]
pub(super) struct Outcome {
    pub(super) is_admitted: bool,
    /// Of each member, afterwards, and its limit.
    pub(super) states: States,
    pub(super) at: Timestamp,
    pub(super) target: Option<Target>,
    /// What it was reserved under.
    pub(super) reservation: Option<ReservationId>,
}

/// What came of one attempt.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "to allocate takes longer than to move it")]
pub(super) enum Attempt {
    Done(Outcome),
    /// It does not fit, as far as a clock tells that may be late: it is to be tried again after
    /// [`before_denial`](Engine::before_denial).
    Stale,
    /// A counter has to be created first.
    Missing,
    /// The log has no room.
    NoRoom,
}

/// The held cells of an operation. Dropping it releases them unchanged.
struct Hold<'a> {
    cells: SmallVec<[&'a Cell; PARTS_COMMON]>,
    /// With the limits.
    states: States,
}

/// Why nothing could be decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Obstacle {
    /// A counter is not there.
    Missing,
    /// Another holds one.
    Held,
}

impl Engine {
    /// Counts all or nothing.
    pub(crate) fn try_consume_all(&self, items: &[Consume]) -> Result<Decisions> {
        if let Some(decisions) = self.all_fast(items) {
            return Ok(decisions);
        }
        let members = self.members(items)?;
        let ask = Ask { members: &members, bound: None, ttl: None, request: None, payload: &[] };
        let outcome = self.ask(&ask)?;
        self.wait_for_outcome(&outcome)?;
        Ok(self.decisions(items, &members, &outcome))
    }

    /// The counters of a call, each once, in the order in which they are held.
    pub(super) fn members(&self, items: &[Consume]) -> Result<Members<'_>> {
        check_count(items)?;
        for &Consume { user, quota, .. } in items {
            self.table.prefetch(Key { user, quota });
        }
        let mut members = Members::with_capacity(items.len());
        for &Consume { user, quota, amount } in items {
            check_amount(amount)?;
            members.push(Member { counter: self.counted(user, quota)?, amount });
        }
        if members.is_sorted_by(|one, next| one.key() < next.key()) {
            return Ok(members);
        }
        members.sort_unstable_by_key(Member::key);
        members.dedup_by(|later, kept| {
            let is_same = later.key() == kept.key();
            if is_same {
                // More than a counter can hold is more than any limit.
                kept.amount = kept.amount.saturating_add(later.amount);
            }
            is_same
        });
        Ok(members)
    }

    /// Admits all or nothing, and writes it down. Waits for room in the log, up to the deadline.
    pub(super) fn ask(&self, ask: &Ask<'_>) -> Result<Outcome> {
        let (mut deadline, mut fresh) = (None, None);
        loop {
            match self.try_ask(ask, fresh)? {
                Attempt::Done(outcome) => return Ok(outcome),
                Attempt::Stale => fresh = Some(self.before_denial()),
                Attempt::Missing => {
                    ask.members.iter().for_each(|member| self.create(&member.counter))
                }
                Attempt::NoRoom => {
                    self.require_room(ask.slots(), &mut deadline)?;
                    fresh = None;
                }
            }
        }
    }

    /// [`ask`](Self::ask) without waiting, and without asking the clock, which may be the
    /// application's. `fresh` is what came of [`before_denial`](Self::before_denial): without it
    /// nothing is denied.
    pub(super) fn try_ask(&self, ask: &Ask<'_>, fresh: Option<Timestamp>) -> Result<Attempt> {
        if let [member] = ask.members {
            return self.ask_one(ask, member, fresh);
        }
        let mut keys: SmallVec<[Key; PARTS_COMMON]> = SmallVec::new();
        for member in ask.members {
            keys.push(member.counter.key());
        }
        let mut states = States::new();
        let now = fresh.unwrap_or_else(|| self.clock.now());
        let mut patience = Patience::default();
        loop {
            let Some((lane, mut permit)) = self.acquire(ask.slots())? else {
                return Ok(Attempt::NoRoom);
            };
            let number = permit.next() + u64::from(ask.slots()) - 1;
            let mut opening = match self.opening(ask) {
                Err(_) if fresh.is_none() => return Ok(Attempt::Stale),
                opening => opening?,
            };
            let mut reservation = None;
            let is_admitted = self.table.find_each(&keys, |found| {
                let hold = Hold::new(ask.members, found, now)?;
                if !hold.admit(ask, &mut states) {
                    states = hold.abandon();
                    return Ok(false);
                }
                reservation = self.write_admitted(ask, &mut permit, &states, now, opening.take());
                hold.release(&states);
                Ok(true)
            });
            drop(opening);
            match is_admitted {
                Ok(true) => {
                    drop(permit);
                    let target = Some(Target::Record { lane, number });
                    let (at, is_admitted) = (now, true);
                    let outcome = Outcome { is_admitted, states, at, target, reservation };
                    return Ok(Attempt::Done(outcome));
                }
                Ok(false) if fresh.is_none() => return Ok(Attempt::Stale),
                Ok(false) => {
                    return self.refuse(ask, lane, permit, states, now).map(Attempt::Done);
                }
                Err(Obstacle::Missing) => return Ok(Attempt::Missing),
                Err(Obstacle::Held) => {
                    drop(permit);
                    patience.wait();
                }
            }
        }
    }

    /// [`try_ask`](Self::try_ask) for one counter, in one look-up.
    fn ask_one(
        &self,
        ask: &Ask<'_>,
        &Member { counter, amount }: &Member<'_>,
        fresh: Option<Timestamp>,
    ) -> Result<Attempt> {
        let default = counter.quota.limit();
        let now = fresh.unwrap_or_else(|| self.clock.now());
        let window = counter.quota.window_at(now);
        let mut patience = Patience::default();
        loop {
            let Some((lane, mut permit)) = self.acquire(ask.slots())? else {
                return Ok(Attempt::NoRoom);
            };
            let number = permit.next() + u64::from(ask.slots()) - 1;
            let mut opening = match self.opening(ask) {
                Err(_) if fresh.is_none() => return Ok(Attempt::Stale),
                opening => opening?,
            };
            let mut reservation = None;
            let attempt = self.find_cell(&counter, |live| {
                let limit = live.limit(default);
                let bound = ask.bound.unwrap_or(limit);
                if ask.ttl.is_none() {
                    let added = live.cell.add(window, amount, bound);
                    let (Ok(state) | Err(state)) = added;
                    let states = [(state, limit)];
                    if added.is_ok() {
                        ask.write(&mut permit, &states, now, None);
                    }
                    return Ok((added.is_ok(), states));
                }
                // What is reserved of a counter changes while it is held.
                let seen = live.cell.try_hold(window).ok_or(Obstacle::Held)?;
                let Some(next) = seen.plus(amount, bound) else {
                    live.cell.release(seen, seen);
                    return Ok((false, [(seen, limit)]));
                };
                let states = [(next, limit)];
                reservation = self.write_admitted(ask, &mut permit, &states, now, opening.take());
                live.cell.release(seen, next);
                Ok((true, states))
            });
            drop(opening);
            match attempt.unwrap_or(Err(Obstacle::Missing)) {
                Ok((true, states)) => {
                    drop(permit);
                    let target = Some(Target::Record { lane, number });
                    return Ok(Attempt::Done(Outcome {
                        is_admitted: true,
                        states: States::from_slice(&states),
                        at: now,
                        target,
                        reservation,
                    }));
                }
                Ok((false, _)) if fresh.is_none() => return Ok(Attempt::Stale),
                Ok((false, states)) => {
                    let states = States::from_slice(&states);
                    return self.refuse(ask, lane, permit, states, now).map(Attempt::Done);
                }
                // Whoever reads the shard that the counter goes into may wait for a lane.
                Err(Obstacle::Missing) => return Ok(Attempt::Missing),
                Err(Obstacle::Held) => {
                    drop(permit);
                    patience.wait();
                }
            }
        }
    }

    /// The reservation that is to be opened, if one is.
    fn opening(&self, ask: &Ask<'_>) -> Result<Option<Opening<'_>>> {
        if ask.ttl.is_none() {
            return Ok(None);
        }
        let opening = self.reservations.begin(thread_hint());
        opening.map(Some).ok_or_else(|| self.too_many_reservations())
    }

    /// Writes down what was admitted, and opens what is reserved. The cells are held.
    fn write_admitted(
        &self,
        ask: &Ask<'_>,
        permit: &mut Permit<'_>,
        states: &[(CellState, u64)],
        at: Timestamp,
        opening: Option<Opening<'_>>,
    ) -> Option<ReservationId> {
        let opened = opening.zip(ask.ttl.map(|ttl| at.saturating_add(ttl)));
        let named = opened.as_ref().map(|(opening, expires)| (opening.id(), *expires));
        ask.write(permit, states, at, named);
        let (opening, expires) = opened?;
        let id = opening.id();
        let parts: Parts = ask.parts(states).collect();
        for part in &parts {
            self.reservations.reserve(part);
        }
        opening.open(expires, parts);
        Some(id)
    }

    /// Refuses, and writes it down where somebody may ask again. Past a bound instead of the limit
    /// it is an error, which is no answer.
    #[cold]
    fn refuse(
        &self,
        ask: &Ask<'_>,
        lane: LaneIndex,
        mut permit: Permit<'_>,
        states: States,
        now: Timestamp,
    ) -> Result<Outcome> {
        let number = permit.next() + 2;
        let target = ask.refused_items(&states, now).map(|items| {
            permit.append_operation(3, items.into_iter());
            Target::Record { lane, number }
        });
        drop(permit);
        // What is written down is the answer, also after the next open.
        if target.is_none() {
            self.refuse_when_closed()?;
        }
        // Past a bound it is an error, and no denial.
        if ask.bound.is_none() {
            self.counts.denied.add_one();
        }
        Ok(Outcome { is_admitted: false, states, at: now, target, reservation: None })
    }

    /// A lane with room for this many records; `None` if none has. Then only a caller that holds
    /// nothing that others want may wait for room.
    pub(super) fn acquire(&self, slots: u8) -> Result<Option<(LaneIndex, Permit<'_>)>> {
        match self.lanes.acquire(u64::from(slots)) {
            Ok(acquired) => Ok(Some(acquired)),
            Err(NoLane::Full) => Ok(None),
            Err(why @ NoLane::Closed) => Err(self.no_lane(why)),
        }
    }

    /// Waits for room for this many records, up to the deadline of the call. Afterwards the clock
    /// is right, however long that took.
    pub(super) fn require_room(&self, slots: u8, deadline: &mut Option<Duration>) -> Result<()> {
        if !self.wait_for_room(u64::from(slots), deadline) {
            return Err(self.no_lane(NoLane::Full));
        }
        self.clock.refresh();
        Ok(())
    }

    /// Waits for the disk where the configuration asks for it.
    pub(super) fn wait_for_outcome(&self, outcome: &Outcome) -> Result<()> {
        self.wait_if_durable(outcome.target, outcome.is_admitted, false)
    }

    /// The answers, in the order of the call.
    pub(super) fn decisions(
        &self,
        items: &[Consume],
        members: &[Member<'_>],
        outcome: &Outcome,
    ) -> Decisions {
        let at = outcome.at;
        let decision = |item: &Consume| {
            let key = (item.quota, item.user);
            let mut found = members.iter().zip(&outcome.states);
            let (member, &(state, limit)) = found.find(|(member, _)| member.key() == key)?;
            let &Member { counter, amount } = member;
            let is_allowed = outcome.is_admitted || state.has_room(amount, limit);
            Some(self.decide(&counter, state, limit, amount, is_allowed, at))
        };
        Decisions::new(at, items.iter().filter_map(decision))
    }
}

/// 1 to 16.
pub(super) fn check_count(items: &[Consume]) -> Result<()> {
    match items.len() {
        1..=PARTS_MAX => Ok(()),
        found => Err(Error::InvalidGroup { found }),
    }
}

impl Member<'_> {
    fn key(&self) -> (QuotaId, u64) {
        (self.counter.quota.id(), self.counter.user)
    }
}

impl Ask<'_> {
    /// How many records it takes. No fewer than a refusal that is remembered.
    pub(super) fn slots(&self) -> u8 {
        let members = u8::try_from(self.members.len()).unwrap_or(u8::MAX);
        let opens = u8::from(self.ttl.is_some());
        let requests = if self.request.is_some() { 2 } else { 0 };
        members + opens + requests + payload::records(self.payload.len())
    }

    /// Writes what was admitted.
    fn write(
        &self,
        permit: &mut Permit<'_>,
        states: &[(CellState, u64)],
        at: Timestamp,
        opened: Option<(ReservationId, Timestamp)>,
    ) {
        let mut following = self.slots();
        let mut write = |item: &Item| {
            following -= 1;
            permit.append_item(item, following);
        };
        for (member, (state, _)) in self.members.iter().zip(states) {
            write(&Item::Add(Record {
                user: member.counter.user,
                quota: member.counter.quota.id(),
                window: state.window(),
                delta: member.amount.cast_signed(),
            }));
        }
        if let Some((id, expires)) = opened {
            write(&Item::Open { id, expires });
        }
        if let Some([request, answer]) = self.request_items(states, at) {
            write(&request);
            write(&answer);
        }
        payload::items(self.payload).for_each(|item| write(&item));
    }

    fn request_items(&self, states: &[(CellState, u64)], at: Timestamp) -> Option<[Item; 2]> {
        let (id, asked) = self.request?;
        let &(state, limit) = states.first()?;
        Some([Item::Request { id, asked, at }, Item::Answer { used: state.used(), limit }])
    }

    fn refused_items(&self, states: &[(CellState, u64)], at: Timestamp) -> Option<[Item; 3]> {
        if self.bound.is_some() {
            return None;
        }
        let [request, answer] = self.request_items(states, at)?;
        let member = self.members.first()?;
        let &(state, _) = states.first()?;
        let (user, quota) = (member.counter.user, member.counter.quota.id());
        let (window, amount) = (state.window(), member.amount);
        Some([Item::Refusal { user, quota, window, amount }, request, answer])
    }

    /// What is reserved, once it was admitted.
    pub(super) fn parts(&self, states: &[(CellState, u64)]) -> impl Iterator<Item = Part> {
        self.members.iter().zip(states).map(|(member, (state, _))| Part {
            user: member.counter.user,
            quota: member.counter.quota.id(),
            window: state.window(),
            amount: member.amount,
        })
    }
}

impl<'a> Hold<'a> {
    /// Holds the members' cells, one after the other.
    fn new(
        members: &[Member<'_>],
        found: &[Option<Live<'a>>],
        now: Timestamp,
    ) -> std::result::Result<Self, Obstacle> {
        let mut hold = Self { cells: SmallVec::new(), states: States::new() };
        for (Member { counter, .. }, live) in members.iter().zip(found) {
            let live = live.ok_or(Obstacle::Missing)?;
            let state = live.cell.try_hold(counter.quota.window_at(now)).ok_or(Obstacle::Held)?;
            hold.cells.push(live.cell);
            hold.states.push((state, live.limit(counter.quota.limit())));
        }
        Ok(hold)
    }

    /// Whether all have room; `next` are the states afterwards then.
    fn admit(&self, ask: &Ask<'_>, next: &mut States) -> bool {
        next.clear();
        for (member, &(state, limit)) in ask.members.iter().zip(&self.states) {
            match state.plus(member.amount, ask.bound.unwrap_or(limit)) {
                Some(state) => next.push((state, limit)),
                None => return false,
            }
        }
        true
    }

    /// Lets go, leaving these states.
    fn release(mut self, next: &States) {
        self.release_all(next);
        self.cells.clear();
    }

    /// Lets go, leaving all as it was. The states.
    fn abandon(mut self) -> States {
        self.release_all(&self.states);
        self.cells.clear();
        mem::take(&mut self.states)
    }

    fn release_all(&self, next: &States) {
        for ((cell, (seen, _)), (next, _)) in self.cells.iter().zip(&self.states).zip(next) {
            cell.release(*seen, *next);
        }
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        self.release_all(&self.states);
    }
}
