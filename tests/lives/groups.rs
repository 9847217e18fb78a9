//! Several counters at once, all or nothing, and what is reserved of one or of several.

use std::time::Duration;

use tollgate::{Consume, Decisions, Result};

use super::limits::Before;
use super::worker::Worker;
use super::{Count, Open, QUOTAS, SINGLES, Tally, UNLIMITED, split};

/// For longer than all of this takes.
pub(super) const LONG: Duration = Duration::from_hours(7 * 24);

impl Worker<'_> {
    /// What the decisions of a group say: either all fit, or one that does not is named.
    pub(super) fn decided_all(
        &self,
        counters: &[usize],
        amount: u64,
        before: &[Before],
        decisions: &Decisions,
    ) {
        assert_eq!(decisions.each().len(), counters.len(), "{decisions:?}");
        let is_allowed = decisions.is_allowed();
        for ((&counter, &before), decision) in counters.iter().zip(before).zip(decisions.each()) {
            if is_allowed || decision.is_denied() {
                self.decided(counter, amount, before, &decision);
            } else {
                self.require_limit(counter, before, decision.limit);
            }
        }
    }

    fn before_all(&self, counters: &[usize]) -> Vec<Before> {
        counters.iter().map(|&counter| self.life.limits.before(counter / QUOTAS)).collect()
    }

    fn items(&self, counters: &[usize], amount: u64) -> Vec<Consume> {
        let item = |&counter: &usize| {
            let (user, quota) = split(counter);
            Consume { user, quota: self.ids[quota], amount }
        };
        counters.iter().map(item).collect()
    }

    /// One counter and any other.
    pub(super) fn count_two(&mut self, counter: usize, amount: u64) -> Result<()> {
        let distance = self.random.below(SINGLES as u64 - 1) as usize + 1;
        self.count_all([counter, (counter + distance) % SINGLES], amount)
    }

    pub(super) fn count_all(&mut self, mut counters: [usize; 2], amount: u64) -> Result<()> {
        if self.random.below(2) == 0 {
            counters.reverse();
        }
        let before = self.before_all(&counters);
        for counter in counters {
            self.page.issue(counter, Open::Add, self.thread, amount);
        }
        let decisions = self.life.gate.try_consume_all(&self.items(&counters, amount))?;
        self.decided_all(&counters, amount, &before, &decisions);
        for (counter, decision) in counters.into_iter().zip(decisions.each()) {
            if decisions.is_allowed() {
                self.added(counter, amount, false, decision.resets_at);
            }
            self.page.withdraw(counter, Open::Add, self.thread, amount);
        }
        self.page.count(Count::Denied, u64::from(decisions.is_denied()));
        Ok(())
    }

    /// What is reserved is counted; settled, it is given back, and what it cost is counted. A
    /// reservation whose process dies stays open for longer than all of this takes. Not where
    /// windows pass: the answer does not say in which one it was.
    pub(super) fn reserve(&mut self, counters: &[usize], amount: u64) -> Result<()> {
        let before = self.before_all(counters);
        self.issue_all(counters, Open::Add, amount);
        let reserved = match *counters {
            [counter] => {
                let (user, quota) = split(counter);
                self.life.gate.reserve(user, self.ids[quota], amount, LONG)
            }
            _ => self.life.gate.reserve_all(&self.items(counters, amount), LONG),
        };
        let mut reservation = match reserved?.into_result() {
            Ok(reservation) => reservation,
            Err(decisions) => {
                self.decided_all(counters, amount, &before, &decisions);
                self.page.count(Count::Denied, 1);
                self.issue_all(counters, Open::Add, amount.wrapping_neg());
                return Ok(());
            }
        };
        counters.iter().for_each(|&counter| self.added(counter, amount, false, None));
        self.issue_all(counters, Open::Add, amount.wrapping_neg());
        let mut actual = self.random.below(amount + 1);
        if self.random.below(4) == 0 && counters.iter().all(|&it| split(it).1 == UNLIMITED) {
            actual += amount;
        }
        self.issue_all(counters, Open::Add, actual);
        self.issue_all(counters, Open::Refund, amount);
        let settled = match self.random.below(4) {
            0 => Some(reservation.commit(actual)?),
            1 => Some(self.life.gate.commit_reservation(reservation.detach(), actual)?),
            2 if actual == 0 => {
                reservation.cancel()?;
                None
            }
            _ => {
                reservation.extend(LONG)?;
                Some(reservation.commit_items(&self.items(counters, actual))?)
            }
        };
        assert!(settled.as_ref().is_none_or(Decisions::is_allowed), "{settled:?}");
        for &counter in counters {
            if actual > 0 {
                self.added(counter, actual, false, None);
            }
            self.gave_back(counter, amount);
        }
        self.issue_all(counters, Open::Refund, amount.wrapping_neg());
        self.issue_all(counters, Open::Add, actual.wrapping_neg());
        Ok(())
    }

    /// That much more is open, of each.
    fn issue_all(&self, counters: &[usize], open: Open, amount: u64) {
        counters.iter().for_each(|&counter| self.page.issue(counter, open, self.thread, amount));
    }

    /// In the window in which everything is that has none.
    pub(super) fn gave_back(&self, counter: usize, amount: u64) {
        if self.life.syncs.each_call() {
            self.page.add(counter, 0, Tally::RefundedSynced, self.thread, amount);
        }
        self.page.add(counter, 0, Tally::Refunded, self.thread, amount);
    }
}
