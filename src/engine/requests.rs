//! Requests that count once: the first call with an id counts, and later calls get its answer.

use std::time::Duration;

use crate::admission::cell::CellState;
use crate::engine::Engine;
use crate::engine::group::{Ask, Attempt, Member, Outcome};
use crate::engine::operations::{Counted, check_amount};
use crate::engine::reserving::check_ttl;
use crate::error::{Error, Result};
use crate::ledger::{Answer, Asked};
use crate::model::{AMOUNT_MAX, Decision, Decisions, ReservationId, Usage, WindowStart};

/// What is asked under an id.
#[derive(Debug, Clone, Copy)]
struct Request<'a> {
    id: u128,
    asked: Asked,
    counter: Counted<'a>,
    amount: u64,
    /// For a reservation.
    ttl: Option<Duration>,
    /// What is kept for sinks; empty for nothing.
    payload: &'a [u8],
}

/// A reservation asked for under an id.
#[derive(Debug)]
pub(crate) enum ReservedOnce {
    /// This call made it.
    Now(ReservationId),
    /// An earlier call did.
    Before(ReservationId),
    Denied(Decisions),
}

impl Engine {
    pub(crate) fn try_consume_once(
        &self,
        id: u128,
        counter: Counted<'_>,
        amount: u64,
    ) -> Result<Decision> {
        let asked = Asked::TryConsume;
        let answer = match self.once_fast(id, asked, &counter, amount, None) {
            Some(answer) => answer,
            None => self.once(Request { id, asked, counter, amount, ttl: None, payload: &[] })?.0,
        };
        Ok(self.decision_of(&counter, &answer))
    }

    pub(crate) fn consume_once(
        &self,
        id: u128,
        counter: Counted<'_>,
        amount: u64,
        payload: &[u8],
    ) -> Result<Usage> {
        let (asked, bound) = (Asked::Consume, Some(AMOUNT_MAX));
        let fast = payload.is_empty();
        let answer = match fast.then(|| self.once_fast(id, asked, &counter, amount, bound)) {
            Some(Some(answer)) => answer,
            _ => self.once(Request { id, asked, counter, amount, ttl: None, payload })?.0,
        };
        let Answer { is_admitted, window, used, limit, .. } = answer;
        let state = CellState::new(counter.quota.id(), window, used);
        self.consumed(&counter, amount, is_admitted, state, limit)
    }

    pub(crate) fn reserve_once(
        &self,
        id: u128,
        counter: Counted<'_>,
        amount: u64,
        ttl: Duration,
    ) -> Result<ReservedOnce> {
        let asked = Asked::Reserve;
        let (answer, is_new) =
            self.once(Request { id, asked, counter, amount, ttl: Some(ttl), payload: &[] })?;
        Ok(match answer.reservation {
            Some(id) if is_new => ReservedOnce::Now(id),
            Some(id) => ReservedOnce::Before(id),
            None => ReservedOnce::Denied(Decisions::one(&self.decision_of(&counter, &answer))),
        })
    }

    fn decision_of(&self, counter: &Counted<'_>, answer: &Answer) -> Decision {
        let &Answer { is_admitted, window, amount, used, limit, at, .. } = answer;
        let state = CellState::new(counter.quota.id(), window, used);
        self.decide(counter, state, limit, amount, is_admitted, at)
    }

    /// The answer, and whether this call made it.
    fn once(&self, request: Request<'_>) -> Result<(Answer, bool)> {
        let Request { id, counter, amount, .. } = request;
        check_amount(amount)?;
        self.refuse_when_closed()?;
        // The counter, and what is known of the id, are far apart in memory: neither waits for the
        // other.
        self.table.prefetch(counter.key());
        request.ttl.map_or(Ok(()), check_ttl)?;
        let members = [Member { counter, amount }];
        let ask = Ask {
            members: &members,
            bound: (request.asked == Asked::Consume).then_some(AMOUNT_MAX),
            ttl: request.ttl,
            request: Some((id, request.asked)),
            payload: request.payload,
        };
        let (mut deadline, mut fresh) = (None, None);
        loop {
            // The clock may be the application's, which may call us: here, and before a denial, it
            // is asked without the lock.
            let now = self.believed.now();
            // Of two calls at the same time one waits here, and finds the other's answer.
            let known = self.answers.lock(id);
            if let Some((at, kept)) = known.get(now) {
                drop(known);
                return Ok((self.repeat(&request, kept.answer(id, at))?, false));
            }
            match self.try_ask(&ask, fresh)? {
                Attempt::Done(outcome) => {
                    let answer = request.answer(&outcome);
                    // An error is no answer, and was not written down.
                    if outcome.target.is_some() {
                        known.insert(answer.into(), answer.at, answer.at);
                    }
                    self.wait_for_outcome(&outcome)?;
                    return Ok((answer, true));
                }
                Attempt::Stale => {
                    drop(known);
                    fresh = Some(self.before_denial());
                }
                Attempt::Missing => {
                    // What may be forgotten for it is asked of the clock, too.
                    drop(known);
                    self.create(&counter);
                }
                Attempt::NoRoom => {
                    // Others whose ids lie there need no room, or have a deadline too.
                    drop(known);
                    self.require_room(ask.slots(), &mut deadline)?;
                    fresh = None;
                }
            }
        }
    }

    /// The answer of an earlier call, to the same question.
    fn repeat(&self, request: &Request<'_>, answer: Answer) -> Result<Answer> {
        let &Request { id, asked, counter, amount, .. } = request;
        let known = (answer.asked, answer.user, answer.quota, answer.amount);
        if known != (asked, counter.user, counter.quota.id(), amount) {
            return Err(Error::RequestMismatch { id });
        }
        if self.durable_consumes {
            // The first call may still be waiting for the disk.
            self.committer.commit()?;
        }
        Ok(answer)
    }
}

impl Request<'_> {
    /// What came of it, to be remembered.
    fn answer(&self, outcome: &Outcome) -> Answer {
        let &Request { id, asked, counter, amount, .. } = self;
        // There is one counter.
        let empty = || (CellState::new(counter.quota.id(), WindowStart(0), 0), 0);
        let (state, limit) = outcome.states.first().copied().unwrap_or_else(empty);
        Answer {
            request: id,
            asked,
            is_admitted: outcome.is_admitted,
            user: counter.user,
            quota: counter.quota.id(),
            window: state.window(),
            amount,
            used: state.used(),
            limit,
            at: outcome.at,
            reservation: outcome.reservation,
        }
    }
}
