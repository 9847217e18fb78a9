//! The fast paths of requests, reservations and groups of a few counters: what `group` and
//! `reserving` describe, for the case that nothing is in the way. The counters exist, in open
//! shards and in the current window, and nobody else is in the middle of a change; the amounts fit;
//! the thread's own lane has room; and nobody waits for the disk. In any other case nothing is
//! changed, and the slow path decides: it alone denies.
//!
//! Two kinds of locks are waited for here. Before a counter's shard is entered to stay: that of a
//! request's answers, or that of the shard of a reservation that ends. Inside: those under which
//! nobody waits for a counter, a bucket of reserved sums and what is remembered of ends. The
//! counters' shards, the shard where a reservation is opened, and the lane are only tried. Of
//! several counters the last is not held but changed at once: with the others held, its
//! compare-and-swap decides for all.

use std::array::from_fn;
use std::time::Duration;

use crate::admission::cell::{CellState, Live};
use crate::admission::quotas::{Current, QuotaState};
use crate::admission::reservations::{Open, Opening};
use crate::admission::reserved::SumPlace;
use crate::admission::table::{Key, Operation};
use crate::engine::Engine;
use crate::engine::operations::Counted;
use crate::engine::reserving::expiry;
use crate::ledger::{Answer, Asked, Part, Parts, Settlement};
use crate::model::{
    AMOUNT_MAX, Answered, Consume, Decisions, Overrun, ReservationId, Timestamp, is_valid_amount,
};
use crate::seats::thread_hint;
use crate::wal::lane::Permit;
use crate::wal::record::{Item, Record};

/// One counter, and what is asked of it.
#[derive(Debug, Clone, Copy)]
struct Asking {
    key: Key,
    amount: u64,
    window: Current,
    /// The quota's limit.
    default: u64,
}

impl Asking {
    #[inline(always)]
    fn new(user: u64, quota: &QuotaState, amount: u64, now: Timestamp) -> Option<Self> {
        if !is_valid_amount(amount) {
            return None;
        }
        let window = quota.current(now)?;
        let key = Key { user, quota: quota.id() };
        Some(Self { key, amount, window, default: quota.limit() })
    }

    /// The counter's state before any use.
    #[inline(always)]
    fn empty(&self) -> CellState {
        self.window.empty()
    }

    #[inline(always)]
    fn record(&self, delta: i64) -> Item {
        let Key { user, quota } = self.key;
        Item::Add(Record { user, quota, window: self.window.start, delta })
    }

    /// What is added.
    #[inline(always)]
    fn add(&self) -> Item {
        self.record(self.amount.cast_signed())
    }

    /// Holds the counter's cell, if it has room: the state, the one with the amount, and the limit.
    #[inline(always)]
    fn hold(&self, live: Live<'_>) -> Option<(CellState, CellState, u64)> {
        let limit = live.limit(self.default);
        let seen = live.cell.try_hold_in_window(self.empty())?;
        match seen.plus(self.amount, limit) {
            Some(next) => Some((seen, next, limit)),
            None => {
                live.cell.release(seen, seen);
                None
            }
        }
    }

    #[inline(always)]
    fn answer(&self, used: u64, limit: u64) -> Answered {
        Answered::allowed(used, limit, self.amount, self.window.resets_at())
    }
}

impl Engine {
    /// The fast path of [`once`](Self::once): counts, under an id that is not known. The answer.
    #[inline(always)]
    pub(super) fn once_fast(
        &self,
        id: u128,
        asked: Asked,
        counter: &Counted<'_>,
        amount: u64,
        bound: Option<u64>,
    ) -> Option<Answer> {
        if self.durable_consumes {
            return None;
        }
        // What is known of the id, and the counter, are far apart in memory: they are asked for
        // before anything is waited for.
        let request = self.answers.prefetch(id);
        let place = self.table.prefetch(counter.key());
        let now = self.clock.now();
        let asking = Asking::new(counter.user, counter.quota, amount, now)?;
        let Key { user, quota } = asking.key;
        let window = asking.window.start;
        let known = self.answers.lock_at(request);
        if known.is_known() {
            return None;
        }
        let once = Once { engine: self, asking, bound, id, asked, now };
        let (used, limit) = self.table.find_open(place, once)?;
        let answer = Answer {
            request: id,
            asked,
            is_admitted: true,
            user,
            quota,
            window,
            amount,
            used,
            limit,
            at: now,
            reservation: None,
        };
        known.insert_new(answer.into(), now, now);
        Some(answer)
    }

    /// The fast path of [`try_consume_all`](Self::try_consume_all), for a few counters.
    #[inline]
    pub(super) fn all_fast(&self, items: &[Consume]) -> Option<Decisions> {
        match *items {
            [one] => self.few([one]),
            [one, two] => self.few([one, two]),
            [one, two, three] => self.few([one, two, three]),
            [one, two, three, four] => self.few([one, two, three, four]),
            _ => None,
        }
    }

    #[inline(never)]
    fn few<const N: usize>(&self, items: [Consume; N]) -> Option<Decisions> {
        if self.durable_consumes {
            return None;
        }
        let now = self.clock.now();
        let key = |&Consume { user, quota, .. }: &Consume| Key { user, quota };
        let keys: [Key; N] = from_fn(|index| key(&items[index]));
        // What is asked, in the order of the keys, and the place of each in the call.
        let sort = || {
            let mut order = [0_usize; N];
            let rank = |index: usize| (items[index].quota, items[index].user);
            for index in 1..N {
                let mut place = index;
                while place > 0 && rank(order[place - 1]) > rank(index) {
                    order[place] = order[place - 1];
                    place -= 1;
                }
                if place > 0 && rank(order[place - 1]) == rank(index) {
                    return None;
                }
                order[place] = index;
            }
            let mut asked = [self.asking(&items[order[0]], now)?; N];
            for place in 1..N {
                asked[place] = self.asking_after(&asked[place - 1], &items[order[place]], now)?;
            }
            Some((order, asked))
        };
        let answers = self.table.find_few(keys, sort, |(order, asked), found| {
            let lives: [Live<'_>; N] = from_fn(|place| found[order[place]]);
            let mut permit = self.lanes.try_preferred_for(N as u64)?;
            let states = Self::count_few(&mut permit, &asked, &lives)?;
            let mut answers = [Answered::NONE; N];
            for ((index, asking), (used, limit)) in order.into_iter().zip(&asked).zip(states) {
                answers[index] = asking.answer(used, limit);
            }
            Some(answers)
        })?;
        // For more than three it allocates, for which nobody should wait.
        Some(Decisions::few(now, &answers))
    }

    #[inline(always)]
    fn asking(&self, item: &Consume, now: Timestamp) -> Option<Asking> {
        let &Consume { user, quota, amount } = item;
        Asking::new(user, self.quotas.get(quota)?, amount, now)
    }

    /// [`asking`](Self::asking) where another item was looked at before: mostly of the same quota.
    #[inline(always)]
    fn asking_after(&self, before: &Asking, item: &Consume, now: Timestamp) -> Option<Asking> {
        let &Consume { user, quota, amount } = item;
        if quota != before.key.quota {
            return self.asking(item, now);
        }
        is_valid_amount(amount).then_some(Asking { key: Key { user, quota }, amount, ..*before })
    }

    /// Changes all cells or none. The usage of each afterwards, and its limit.
    #[inline(always)]
    fn count_few<const N: usize>(
        permit: &mut Permit<'_>,
        asked: &[Asking; N],
        lives: &[Live<'_>; N],
    ) -> Option<[(u64, u64); N]> {
        let (last, last_live) = asked.last().zip(lives.last())?;
        let mut held = [(last.empty(), last.empty(), 0); N];
        let mut count = 0;
        while count < N - 1 {
            let Some(states) = asked[count].hold(lives[count]) else { break };
            held[count] = states;
            count += 1;
        }
        let changed = if count == N - 1 {
            let limit = last_live.limit(last.default);
            let seen = last_live.cell.guess();
            let state = last_live.cell.add_in_window(seen, last.empty(), last.amount, limit);
            state.map(|state| (state.used(), limit))
        } else {
            None
        };
        let Some(changed) = changed else {
            for (live, &(seen, ..)) in lives.iter().zip(&held).take(count) {
                live.cell.release(seen, seen);
            }
            return None;
        };
        for (asking, following) in asked.iter().zip((0..N).rev()) {
            #[expect(clippy::cast_possible_truncation, reason = "a few")]
            permit.append_item(&asking.add(), following as u8);
        }
        let mut states = [changed; N];
        for ((live, &(seen, next, limit)), state) in
            lives.iter().zip(&held).zip(&mut states).take(N - 1)
        {
            live.cell.release(seen, next);
            *state = (next.used(), limit);
        }
        Some(states)
    }

    /// The fast path of [`reserve`](Self::reserve), for one counter.
    #[inline]
    pub(crate) fn reserve_fast(&self, item: &Consume, ttl: Duration) -> Option<ReservationId> {
        if self.durable_consumes {
            return None;
        }
        let place = self.table.place(Key { user: item.user, quota: item.quota });
        self.table.find_open_with(place, || {
            let now = self.clock.now();
            let asking = self.asking(item, now)?;
            let sum = self.reservations.prefetch(place, asking.window.start);
            let expires = expiry(now, ttl)?;
            let opening = self.reservations.try_begin(thread_hint())?;
            Some(Reserving { engine: self, opening, sum, asking, expires })
        })
    }

    /// The fast path of [`commit`](Self::commit), for a reservation of one counter.
    #[inline]
    pub(crate) fn commit_fast(&self, id: ReservationId, actual: u64) -> Option<Decisions> {
        if actual > AMOUNT_MAX || self.durable_consumes {
            return None;
        }
        let now = self.clock.now();
        let open = self.reservations.open_one(id).filter(|open| open.expires > now)?;
        let Part { user, quota, window, amount } = open.part;
        let state = self.quotas.get(quota)?;
        let asking = Asking::new(user, state, amount, now)?;
        let is_of_window = asking.window.start == window;
        let is_overrun = actual > amount && state.overrun() == Overrun::Refuse;
        if !is_of_window || is_overrun {
            return None;
        }
        let place = self.table.place(asking.key);
        let sum = self.reservations.prefetch(place, window);
        let committing = Committing { engine: self, open, sum, asking, actual, now };
        let (used, limit) = self.table.find_open(place, committing)?;
        let answer = Answered::allowed(used, limit, actual, asking.window.resets_at());
        Some(Decisions::few(now, &[answer]))
    }
}

/// A request with an id on its way into its counter.
#[derive(Debug)]
struct Once<'a> {
    engine: &'a Engine,
    asking: Asking,
    /// What the usage may not pass, where that is not the counter's limit.
    bound: Option<u64>,
    id: u128,
    asked: Asked,
    now: Timestamp,
}

impl Operation for Once<'_> {
    /// The usage after it, and the limit.
    type Result = (u64, u64);

    #[inline(always)]
    fn run(self, live: Live<'_>) -> Option<(u64, u64)> {
        let Self { engine, asking, bound, id, asked, now } = self;
        let limit = live.limit(asking.default);
        let seen = live.cell.guess();
        let mut permit = engine.lanes.try_preferred_for(3)?;
        let bound = bound.unwrap_or(limit);
        let state = live.cell.add_in_window(seen, asking.empty(), asking.amount, bound)?;
        let used = state.used();
        permit.append_item(&asking.add(), 2);
        permit.append_item(&Item::Request { id, asked, at: now }, 1);
        permit.append_item(&Item::Answer { used, limit }, 0);
        Some((used, limit))
    }
}

/// A reservation on its way into its counter.
#[derive(Debug)]
struct Reserving<'a> {
    engine: &'a Engine,
    opening: Opening<'a>,
    /// Where the counter's reserved sum is.
    sum: SumPlace,
    asking: Asking,
    expires: Timestamp,
}

impl Operation for Reserving<'_> {
    type Result = ReservationId;

    #[inline(always)]
    fn run(self, live: Live<'_>) -> Option<ReservationId> {
        let Self { engine, opening, sum, asking, expires } = self;
        let Key { user, quota } = asking.key;
        let mut permit = engine.lanes.try_preferred_for(2)?;
        let (seen, next, _) = asking.hold(live)?;
        let id = opening.id();
        permit.append_item(&asking.add(), 1);
        permit.append_item(&Item::Open { id, expires }, 0);
        engine.reservations.lock_sum(sum).add(asking.amount);
        let part = Part { user, quota, window: asking.window.start, amount: asking.amount };
        opening.open(expires, Parts::from_buf([part]));
        live.cell.release(seen, next);
        Some(id)
    }
}

/// The end of a reservation on its way into its counter.
#[derive(Debug)]
struct Committing<'a> {
    engine: &'a Engine,
    open: Open<'a>,
    /// Where the counter's reserved sum is.
    sum: SumPlace,
    /// Of what is reserved.
    asking: Asking,
    actual: u64,
    now: Timestamp,
}

impl Operation for Committing<'_> {
    /// The usage after it, and the limit.
    type Result = (u64, u64);

    #[inline(always)]
    fn run(self, live: Live<'_>) -> Option<(u64, u64)> {
        let Self { engine, open, sum, asking, actual, now } = self;
        let (id, amount) = (open.id, asking.amount);
        let limit = live.limit(asking.default);
        let mut permit = engine.lanes.try_preferred_for(3)?;
        let seen = live.cell.try_hold_in_window(asking.empty())?;
        let Some(next) = seen.minus(amount).plus(actual, AMOUNT_MAX) else {
            live.cell.release(seen, seen);
            return None;
        };
        // Both, see `settle_held`.
        let is_charged = actual > 0;
        permit.append_item(&asking.record(-amount.cast_signed()), 1 + u8::from(is_charged));
        if is_charged {
            permit.append_item(&asking.record(actual.cast_signed()), 1);
        }
        let how = Settlement::Committed;
        permit.append_item(&Item::Settle { id, how, at: now }, 0);
        engine.reservations.lock_sum(sum).subtract(amount);
        open.settled(|| engine.settled.insert(id, how, now, now));
        live.cell.release(seen, next);
        Some((next.used(), limit))
    }
}

#[cfg(all(test, loom))]
mod loom_tests;
