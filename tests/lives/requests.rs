//! Requests with an id, asked again in the next life.

use tollgate::{Consume, Error, ReservationId, Result, Timestamp, UsageEvent};

use super::groups::LONG;
use super::limits::Before;
use super::worker::{Counted, Worker, of_usage};
use super::{Answered, Open, PER_MINUTE, QUOTAS, Request, UNLIMITED, split};

/// Ids are remembered for ten windows: one that was first asked so long ago certainly is.
const REMEMBERED: u64 = 3;

impl Worker<'_> {
    /// Under a new id, twice: it counts once, and the answer is the same. The next life asks a
    /// third time.
    pub(super) fn ask(&mut self, counter: usize, amount: u64) -> Result<()> {
        let id = self.random.next();
        let kind = self.random.below(4);
        let request = Request { id, kind, counter, amount, asked: self.page.clock() };
        self.page.note_request(self.thread, &request);
        let before = self.life.limits.before(counter / QUOTAS);
        let mut answered = Answered::Denied;
        self.add(counter, amount, false, || {
            let (counted, reservation) = self.call(&request, Some(before))?;
            assert_eq!(self.call(&request, None)?, (counted, reservation), "asked again");
            if counted.is_some() {
                answered = Answered::Admitted;
            }
            Ok(counted)
        })?;
        self.page.answered(self.thread, answered);
        if !self.life.syncs.each_call() {
            if self.life.syncs.no_call() || self.random.below(2) == 0 {
                return Ok(());
            }
            self.covered(|| self.life.gate.sync())?;
        }
        self.page.answer_survives(self.thread);
        Ok(())
    }

    /// What it counted, and what it reserved. What is asked for the first time is judged.
    fn call(
        &self,
        request: &Request,
        first: Option<Before>,
    ) -> Result<(Counted, Option<ReservationId>)> {
        let &Request { id, kind, counter, amount, .. } = request;
        let ((user, quota), id) = (split(counter), u128::from(id));
        let (gate, quota_id) = (&self.life.gate, self.ids[quota]);
        match kind {
            0 if quota == UNLIMITED => {
                gate.consume_once(id, user, quota_id, amount).map(|usage| (of_usage(usage), None))
            }
            1 if quota != PER_MINUTE => {
                let reserved = gate.reserve_once(id, user, quota_id, amount, LONG)?.into_result();
                if let (Err(denied), Some(before)) = (&reserved, first) {
                    self.decided_all(&[counter], amount, &[before], denied);
                }
                let reservation = reserved.ok().map(|it| it.detach());
                Ok((reservation.map(|_| None), reservation))
            }
            2 if quota == UNLIMITED => {
                let now = Timestamp::from_unix_millis(0);
                let event = UsageEvent::new(user, quota_id, amount as f64, now).request_id(id);
                gate.record(&event).map(|usage| (of_usage(usage), None))
            }
            _ => {
                let decision = gate.try_consume_once(id, user, quota_id, amount)?;
                if let Some(before) = first {
                    self.decided(counter, amount, before, &decision);
                }
                Ok((decision.is_allowed().then_some(decision.resets_at), None))
            }
        }
    }

    /// What this thread asked last, perhaps in an earlier life: what was answered then is the
    /// answer, and does not count again. What it reserved is still reserved, and is given back.
    /// Whether it was certain that it had been answered.
    pub(super) fn ask_again(&self) -> std::result::Result<bool, String> {
        let Some((request, answered)) = self.page.request(self.thread) else { return Ok(false) };
        let Request { counter, amount, asked, .. } = request;
        let is_remembered = self.page.clock() <= asked + REMEMBERED;
        let is_certain = answered != Answered::Unknown;
        if is_remembered {
            if !is_certain {
                // It may count only now. This stays open: nobody will know.
                self.page.issue(counter, Open::Add, self.thread, amount);
            }
            let called = self.call(&request, None);
            let (counted, reservation) = called.map_err(|error| format!("{request:?}: {error}"))?;
            if is_certain && counted.is_some() != (answered == Answered::Admitted) {
                return Err(format!("{request:?} was {answered:?}, and then {counted:?}"));
            }
            if let Some(id) = reservation {
                self.give_back(&request, id).map_err(|error| format!("{request:?}: {error}"))?;
            }
        }
        self.page.forget_request(self.thread);
        Ok(is_remembered && is_certain)
    }

    /// Gives back what a request has reserved, unless that was done already, before a death.
    fn give_back(&self, request: &Request, id: ReservationId) -> Result<()> {
        let &Request { counter, amount, .. } = request;
        let (gate, (user, quota)) = (&self.life.gate, split(counter));
        self.page.issue(counter, Open::Refund, self.thread, amount);
        let given = gate.extend_reservation(id, LONG).and_then(|()| {
            if amount.is_multiple_of(2) {
                gate.cancel_reservation(id)
            } else {
                let nothing = Consume { user, quota: self.ids[quota], amount: 0 };
                gate.commit_reservation_items(id, &[nothing]).map(drop)
            }
        });
        match given {
            Err(Error::ReservationSettled { .. }) => return Ok(()),
            given => given?,
        }
        self.gave_back(counter, amount);
        self.page.withdraw(counter, Open::Refund, self.thread, amount);
        Ok(())
    }
}
