//! Reservations: counted at once, settled later.
//!
//! What a reservation holds is part of its counters' usage from the start, in memory and in the log
//! alike; settling it adds the difference, in the window in which it was made.

use std::time::Duration;

use smallvec::SmallVec;

use crate::admission::cell::{Cell, CellState, Live};
use crate::admission::reservations::{Take, Taken};
use crate::admission::table::Key;
use crate::engine::Engine;
use crate::engine::group::{Ask, check_count};
use crate::error::{Error, Resource, Result};
use crate::flush::commit::Target;
use crate::ledger::{PARTS_COMMON, Part, Settlement};
use crate::model::{
    AMOUNT_MAX, Consume, Decision, Decisions, OpenReservation, Overrun, ReservationId, Timestamp,
};
use crate::sync::Patience;
use crate::wal::lane::Permit;
use crate::wal::lanes::LaneIndex;
use crate::wal::record::{Item, Record};

const TTL_MIN: Duration = Duration::from_millis(1);
const TTL_MAX: Duration = Duration::from_hours(7 * 24);

/// What a reservation cost.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Charge<'a> {
    /// The same for each of its counters.
    Same(u64),
    /// An amount for each of its counters, in any order; those of one counter are added up.
    Items(&'a [Consume]),
}

/// What each counter of a reservation cost.
#[derive(Debug)]
struct Costs {
    /// In the order of the counters.
    amounts: SmallVec<[u64; PARTS_COMMON]>,
    /// Which counters the answers are about, in the order of the answers.
    answers: SmallVec<[usize; PARTS_COMMON]>,
}

/// A counter of a reservation that is being settled. Dropping it releases the counter unchanged.
#[derive(Debug)]
struct Settling<'a> {
    part: Part,
    actual: u64,
    /// The counter's cell, held, and its state; `None` when the window is over, so that no cell is
    /// changed.
    seen: Option<(&'a Cell, CellState)>,
    /// Kept, since the quota may be redefined meanwhile.
    charged: Charged,
    /// So the clock says: it may still be the cell's, until the counter is used again.
    is_over: bool,
    limit: u64,
}

/// What charging does to a counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Charged {
    /// This is its state afterwards.
    Next(CellState),
    /// Its window is over: there is no cell to change.
    WindowOver,
    /// The limit refuses it.
    Refused,
    /// No limit, but no counter can hold so much.
    Overflow { used: u64 },
}

/// Why it was not settled.
enum Refusal {
    /// Another holds one of the counters just now.
    Held,
    /// The limit: the answers.
    Limit(Decisions),
    Error(Error),
}

impl Engine {
    /// Reserves all or nothing; the denial otherwise.
    pub(crate) fn reserve(
        &self,
        items: &[Consume],
        ttl: Duration,
    ) -> Result<std::result::Result<ReservationId, Decisions>> {
        if let [item] = items
            && let Some(id) = self.reserve_fast(item, ttl)
        {
            return Ok(Ok(id));
        }
        self.reserve_slow(items, ttl)
    }

    /// The slow path of [`reserve`](Self::reserve), which decides whatever it is.
    pub(crate) fn reserve_slow(
        &self,
        items: &[Consume],
        ttl: Duration,
    ) -> Result<std::result::Result<ReservationId, Decisions>> {
        let members = self.members(items)?;
        check_ttl(ttl)?;
        let ask =
            Ask { members: &members, bound: None, ttl: Some(ttl), request: None, payload: &[] };
        let outcome = self.ask(&ask)?;
        let Some(id) = outcome.reservation else {
            return Ok(Err(self.decisions(items, &members, &outcome)));
        };
        if let Err(error) = self.wait_for_outcome(&outcome) {
            // Nobody gets to know of it. What can't be given back now is when its time is over.
            let _ = self.cancel(id);
            return Err(error);
        }
        Ok(Ok(id))
    }

    pub(super) fn too_many_reservations(&self) -> Error {
        Error::TooMany { what: Resource::OpenReservations, bound: self.reservations.max() as u64 }
    }

    /// When what is made now with this time to live expires.
    pub(super) fn expiry(&self, ttl: Duration) -> Result<Timestamp> {
        expiry(self.clock.now(), ttl).ok_or_else(|| Error::InvalidTtl(ttl))
    }

    /// Charges what it cost, and gives the rest back. A denial leaves it open.
    pub(crate) fn commit(&self, id: ReservationId, charge: Charge<'_>) -> Result<Decisions> {
        if let Charge::Same(actual) = charge
            && let Some(decisions) = self.commit_fast(id, actual)
        {
            return Ok(decisions);
        }
        self.commit_slow(id, charge)
    }

    /// The slow path of [`commit`](Self::commit), which decides whatever it is.
    pub(crate) fn commit_slow(&self, id: ReservationId, charge: Charge<'_>) -> Result<Decisions> {
        match charge {
            Charge::Same(actual) if actual > AMOUNT_MAX => {
                return Err(Error::InvalidAmount(actual));
            }
            Charge::Items(items) => check_count(items)?,
            Charge::Same(_) => {}
        }
        let (mut is_fresh, mut deadline) = (false, None);
        loop {
            let taken = self.take_in_time(id, &mut deadline)?;
            let slots = slots(&taken);
            match self.settle(taken, Some(charge), Settlement::Committed)? {
                Some(decisions) if decisions.is_allowed() || is_fresh => return Ok(decisions),
                // Not while it is taken: what others give back is waited for, and they may wait for
                // it.
                Some(_) => {
                    self.before_denial();
                    is_fresh = true;
                }
                None => {
                    self.require_room(slots, &mut deadline)?;
                    is_fresh = false;
                }
            }
        }
    }

    /// Gives all of it back.
    pub(crate) fn cancel(&self, id: ReservationId) -> Result<()> {
        let mut deadline = None;
        loop {
            let taken = self.take(id)?;
            let slots = slots(&taken);
            if self.settle(taken, None, Settlement::Cancelled)?.is_some() {
                return Ok(());
            }
            self.require_room(slots, &mut deadline)?;
        }
    }

    /// Lets it live for so long from now.
    pub(crate) fn extend(&self, id: ReservationId, ttl: Duration) -> Result<()> {
        self.clock.refresh();
        let expires = self.expiry(ttl)?;
        let mut deadline = None;
        loop {
            let now = self.clock.now();
            let (target, is_longer) = match self.acquire(1)? {
                Some((lane, mut permit)) => {
                    let target = Target::Record { lane, number: permit.next() };
                    let item = Item::Extend { id, expires };
                    let write = || permit.append_operation(1, std::iter::once(item));
                    (Some(target), self.reservations.extend(id, now, expires, write))
                }
                None => {
                    let open = self.reservations.expires(id).filter(|&present| present > now);
                    (None, open.map(|present| expires > present))
                }
            };
            match (is_longer, target) {
                // Open again, or settled, when whoever has it is done; or its time is over.
                (None, _) => drop(self.take_in_time(id, &mut deadline)?),
                (Some(true), None) => self.require_room(1, &mut deadline)?,
                _ if !self.durable_consumes => return Ok(()),
                (Some(true), Some(target)) => return self.committer.wait_durable(target),
                // It lives as long anyway, by a call that may still be waiting for the disk.
                (Some(false), _) => return self.committer.commit(),
            }
        }
    }

    /// An open reservation, or what became of it.
    pub(crate) fn open_reservation(&self, id: ReservationId) -> Result<OpenReservation> {
        // Given back when it has been read.
        let taken = self.take_in_time(id, &mut None)?;
        Ok(open_reservation(taken.id(), taken.expires(), &taken.parts))
    }

    /// All that are open, those first that expire first.
    pub(crate) fn open_reservations(&self) -> Vec<OpenReservation> {
        let (now, mut open) = (self.clock.refresh(), Vec::new());
        self.reservations.for_each(|id, expires, parts| {
            // What is over is left to whoever gives it back.
            if expires > now {
                open.push(open_reservation(id, expires, parts));
            }
        });
        open.sort_by_key(|reservation| (reservation.expires_at, reservation.id));
        open
    }

    /// Gives back what is over at `now`, and waits for what others are giving back, unless there is
    /// no room for that in the log. The caller has taken no reservation.
    pub(super) fn expire(&self, now: Timestamp) {
        // The next open does it.
        if self.lanes.is_closed() {
            return;
        }
        let expired = self.reservations.expired(now);
        if !self.expire_those(&expired, now) {
            return;
        }
        for &id in &expired {
            let mut patience = Patience::default();
            while matches!(self.reservations.take(id), Take::Busy) {
                patience.wait();
            }
        }
        // Who had one may have wanted something else of it.
        self.expire_those(&expired, now);
    }

    /// Whether all of them could be given back that nobody else is giving back.
    fn expire_those(&self, expired: &[ReservationId], now: Timestamp) -> bool {
        for &id in expired {
            let Take::Taken(taken) = self.reservations.take(id) else { continue };
            // It may have been extended since it was found.
            if taken.expires() > now {
                continue;
            }
            match self.settle(taken, None, Settlement::Expired) {
                Ok(Some(_)) => self.counts.expired.add_one(),
                // It stays open, and is found again. Not logged: callers come here with locks that
                // whoever gets what is logged may want.
                _ => return false,
            }
        }
        true
    }

    /// Takes an open reservation. One that has expired is released, and the error says so.
    fn take_in_time(
        &self,
        id: ReservationId,
        deadline: &mut Option<Duration>,
    ) -> Result<Taken<'_>> {
        loop {
            let taken = self.take(id)?;
            if taken.expires() > self.clock.now() {
                return Ok(taken);
            }
            let slots = slots(&taken);
            if self.settle(taken, None, Settlement::Expired)?.is_some() {
                self.counts.expired.add_one();
                return Err(Error::ReservationSettled { id, how: Settlement::Expired });
            }
            self.require_room(slots, deadline)?;
        }
    }

    /// Takes an open reservation, or says what became of it. The taker waits for nothing, so that
    /// this lasts no longer than an operation.
    fn take(&self, id: ReservationId) -> Result<Taken<'_>> {
        let mut patience = Patience::default();
        loop {
            match self.reservations.take(id) {
                Take::Taken(taken) => return Ok(taken),
                Take::Busy => patience.wait(),
                Take::Gone => {
                    self.refuse_when_closed()?;
                    let Some(how) = self.settled.get(id, self.believed.now()) else {
                        return Err(Error::UnknownReservation(id));
                    };
                    if self.durable_consumes && how != Settlement::Expired {
                        // Whoever settled it may still be waiting for the disk.
                        self.committer.commit()?;
                    }
                    return Err(Error::ReservationSettled { id, how });
                }
            }
        }
    }

    /// Settles it, or says which limit has no room: then it is open as before. So it is where the
    /// log has no room, `None`: that is waited for when nobody has taken it, as others want it too.
    fn settle(
        &self,
        taken: Taken<'_>,
        charge: Option<Charge<'_>>,
        how: Settlement,
    ) -> Result<Option<Decisions>> {
        let costs = match charge {
            None => Costs::same(0, &taken.parts),
            Some(Charge::Same(actual)) => Costs::same(actual, &taken.parts),
            Some(Charge::Items(items)) => Costs::of(items, &taken)?,
        };
        let mut patience = Patience::default();
        loop {
            let Some((lane, permit)) = self.acquire(slots(&taken))? else { return Ok(None) };
            match self.try_settle(&taken, &costs, how, lane, permit) {
                Ok((decisions, target)) => {
                    let (id, now) = (taken.id(), self.clock.now());
                    taken.settled(|| self.settled.insert(id, how, now, now));
                    // Nobody is told that it expired.
                    if self.durable_consumes && how != Settlement::Expired {
                        self.committer.wait_durable(target)?;
                    }
                    return Ok(Some(decisions));
                }
                Err(Refusal::Held) => patience.wait(),
                Err(Refusal::Limit(decisions)) => return Ok(Some(decisions)),
                Err(Refusal::Error(error)) => return Err(error),
            }
        }
    }

    /// Holds the counters whose window is still open, writes down what changes, and lets them go.
    fn try_settle(
        &self,
        taken: &Taken<'_>,
        costs: &Costs,
        how: Settlement,
        lane: LaneIndex,
        mut permit: Permit<'_>,
    ) -> std::result::Result<(Decisions, Target), Refusal> {
        let parts = &*taken.parts;
        let key = |&Part { user, quota, .. }: &Part| Key { user, quota };
        let keys: SmallVec<[Key; 1]> = parts.iter().map(key).collect();
        self.table.find_each(&keys, |found| {
            let mut settling: SmallVec<[Settling<'_>; 1]> = SmallVec::new();
            for ((&part, live), &actual) in parts.iter().zip(found).zip(&costs.amounts) {
                settling.push(self.hold_part(part, *live, actual).ok_or(Refusal::Held)?);
            }
            let target = self.settle_held(taken, costs, &mut settling, &mut permit, how);
            target.map(|(decisions, number)| (decisions, Target::Record { lane, number }))
        })
    }

    /// Holds a reservation's counter, if its window is still open. `None` while another holds it.
    fn hold_part<'a>(
        &self,
        part: Part,
        live: Option<Live<'a>>,
        actual: u64,
    ) -> Option<Settling<'a>> {
        let quota = self.quotas.get(part.quota);
        let default = quota.map_or(0, |quota| quota.limit());
        let limit = live.map_or(default, |live| live.limit(default));
        let end = quota.and_then(|quota| quota.end_of(part.window));
        let now = self.clock.now();
        let is_over = end.is_some_and(|end| end <= now);
        let charged = Charged::WindowOver;
        let mut settling = Settling { part, actual, seen: None, charged, is_over, limit };
        // A window that is still to come is the counter's, or was too far ahead to be loaded: then
        // the counter stays where it is.
        let has_begun = || quota.is_some_and(|quota| part.window <= quota.window_at(now));
        let may_be_in = |window| window == part.window || window < part.window && has_begun();
        // A counter that is not there was forgotten: its window is over.
        if let Some(cell) = live.map(|live| live.cell)
            && may_be_in(cell.load().window())
        {
            let seen = cell.try_hold(part.window)?;
            if seen.window() == part.window {
                settling.seen = Some((cell, seen));
            } else {
                cell.release(seen, seen);
            }
        }
        let overrun = quota.map_or(Overrun::Charge, |quota| quota.overrun());
        settling.charged = settling.charge(overrun);
        Some(settling)
    }

    /// Decides, writes down what changes, and lets the counters go. The answers, and the number of
    /// the last record.
    fn settle_held(
        &self,
        taken: &Taken<'_>,
        costs: &Costs,
        parts: &mut [Settling<'_>],
        permit: &mut Permit<'_>,
        how: Settlement,
    ) -> std::result::Result<(Decisions, u64), Refusal> {
        let now = self.clock.now();
        let decide = |is_charged| {
            let answered = costs.answers.iter().filter_map(|&place| parts.get(place));
            Decisions::new(now, answered.map(|settling| settling.decide(self, now, is_charged)))
        };
        if parts.iter().any(|settling| settling.charged == Charged::Refused) {
            return Err(Refusal::Limit(decide(false)));
        }
        for &Settling { charged, actual, .. } in &*parts {
            if let Charged::Overflow { used } = charged {
                return Err(Refusal::Error(Error::Overflow { used, amount: actual }));
            }
        }
        let decisions = decide(true);
        // What is given back stands for itself, so that a recovery which does not find where it was
        // taken can take it back.
        let mut following: u8 = parts.iter().map(Settling::records).sum();
        let number = permit.next() + u64::from(following);
        for settling in &*parts {
            for delta in settling.deltas().into_iter().flatten() {
                let Part { user, quota, window, .. } = settling.part;
                permit.append_item(&Item::Add(Record { user, quota, window, delta }), following);
                following -= 1;
            }
        }
        permit.append_item(&Item::Settle { id: taken.id(), how, at: now }, 0);
        for settling in parts {
            self.reservations.unreserve(&settling.part);
            settling.release();
        }
        Ok((decisions, number))
    }
}

pub(super) fn check_ttl(ttl: Duration) -> Result<()> {
    if (TTL_MIN..=TTL_MAX).contains(&ttl) { Ok(()) } else { Err(Error::InvalidTtl(ttl)) }
}

/// What is made at `now` with this time to live expires then, if one may ask for it.
#[inline(always)]
pub(super) fn expiry(now: Timestamp, ttl: Duration) -> Option<Timestamp> {
    if ttl > TTL_MAX || ttl < TTL_MIN {
        return None;
    }
    // As `saturating_add`, without its 128 bits, which only longer times need.
    let millis = ttl.as_secs() * 1000 + u64::from(ttl.subsec_millis());
    Some(Timestamp::from_unix_millis(now.as_unix_millis() + millis))
}

fn open_reservation(id: ReservationId, expires_at: Timestamp, parts: &[Part]) -> OpenReservation {
    let item = |&Part { user, quota, amount, .. }: &Part| Consume { user, quota, amount };
    OpenReservation { id, expires_at, items: parts.iter().map(item).collect() }
}

/// How many records it takes to settle it, at most.
fn slots(taken: &Taken<'_>) -> u8 {
    u8::try_from(2 * taken.parts.len() + 1).unwrap_or(u8::MAX)
}

impl Costs {
    /// The same for each.
    fn same(amount: u64, parts: &[Part]) -> Self {
        let amounts = SmallVec::from_elem(amount, parts.len());
        Self { amounts, answers: (0..parts.len()).collect() }
    }

    /// What the items say, if they name each counter of the reservation and no other.
    fn of(items: &[Consume], taken: &Taken<'_>) -> Result<Self> {
        let (id, parts) = (taken.id(), &*taken.parts);
        let mut costs = Self { answers: SmallVec::new(), ..Self::same(0, parts) };
        for &Consume { user, quota, amount } in items {
            let place = parts.iter().position(|part| (part.quota, part.user) == (quota, user));
            let Some(place) = place else {
                let is_reserved = false;
                return Err(Error::ReservationMismatch { id, user, quota, is_reserved });
            };
            costs.amounts[place] = costs.amounts[place].saturating_add(amount);
            costs.answers.push(place);
        }
        for (place, &Part { user, quota, .. }) in parts.iter().enumerate() {
            if !costs.answers.contains(&place) {
                let is_reserved = true;
                return Err(Error::ReservationMismatch { id, user, quota, is_reserved });
            }
        }
        match costs.amounts.iter().find(|&&amount| amount > AMOUNT_MAX) {
            Some(&amount) => Err(Error::InvalidAmount(amount)),
            None => Ok(costs),
        }
    }
}

impl Settling<'_> {
    /// What is added to the sums: the reserved amount back, and what it cost.
    fn deltas(&self) -> [Option<i64>; 2] {
        let actual = self.actual.cast_signed();
        [Some(-self.part.amount.cast_signed()), Some(actual).filter(|&actual| actual != 0)]
    }

    /// How many records that takes.
    fn records(&self) -> u8 {
        if self.actual == 0 { 1 } else { 2 }
    }

    fn charge(&self, overrun: Overrun) -> Charged {
        let reserved = self.part.amount;
        let refuses = overrun == Overrun::Refuse && self.actual > reserved;
        match self.seen {
            _ if refuses && self.is_over => Charged::Refused,
            None if refuses => Charged::Refused,
            None => Charged::WindowOver,
            Some((_, seen)) => {
                let limit = if refuses { self.limit } else { AMOUNT_MAX };
                match seen.minus(reserved).plus(self.actual, limit) {
                    Some(next) => Charged::Next(next),
                    None if refuses => Charged::Refused,
                    None => Charged::Overflow { used: seen.used() },
                }
            }
        }
    }

    fn decide(&self, engine: &Engine, now: Timestamp, is_charged: bool) -> Decision {
        let Part { quota, window, .. } = self.part;
        let state = match self.charged {
            Charged::Next(next) if is_charged => Some(next),
            _ => self.seen.map(|(_, seen)| seen),
        };
        // The same whether or not the cell has gone on to the next window.
        let used = state.filter(|_| !self.is_over).map_or(0, CellState::used);
        let resets_at = engine.quotas.get(quota).and_then(|quota| quota.end_of(window));
        let is_allowed = self.charged != Charged::Refused;
        let decision = Decision::new(is_allowed, used, self.limit, self.actual, resets_at, now);
        // The next window has room, but not for what was reserved in this one.
        if is_allowed { decision } else { decision.refused() }
    }

    /// Lets the counter go, charged.
    fn release(&mut self) {
        if let Charged::Next(next) = self.charged
            && let Some((cell, seen)) = self.seen.take()
        {
            cell.release(seen, next);
        }
    }
}

impl Drop for Settling<'_> {
    fn drop(&mut self) {
        if let Some((cell, seen)) = self.seen.take() {
            cell.release(seen, seen);
        }
    }
}
