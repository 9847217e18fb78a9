//! A thread of a child: one random operation after the other, each judged by its answer and written
//! down in the shared page.

use std::time::Duration;

use tollgate::{
    AMOUNT_MAX, Consume, Counter, Decision, QuotaId, Result, Timestamp, Usage, UsageEvent,
};

use super::limits::Before;
use super::page::WINDOWS;
use super::{
    ADJUSTED, ADJUSTED_MAX, Count, LIMIT, Life, Open, PAIR, PER_MINUTE, Page, QUOTAS, Random,
    SINGLES, Tally, UNLIMITED, USERS, WINDOW_MS, adjusted, split, window_until,
};

pub(super) struct Worker<'a> {
    pub(super) life: &'a Life,
    pub(super) page: &'a Page,
    pub(super) thread: usize,
    pub(super) ids: [QuotaId; QUOTAS],
    pub(super) random: Random,
}

/// What a call counted: the time at which its window ends, or nothing.
pub(super) type Counted = Option<Option<Timestamp>>;

pub(super) fn of_usage(usage: Usage) -> Counted {
    Some(usage.resets_at)
}

impl Worker<'_> {
    /// One random operation.
    pub(super) fn turn(&mut self) -> std::result::Result<(), String> {
        let counter = self.random.below(SINGLES as u64) as usize;
        let amount = self.random.below(5) + 1;
        let before = self.life.limits.before(counter / QUOTAS);
        let (user, quota) = split(counter);
        let (gate, id) = (&self.life.gate, self.ids[quota]);
        let choice = match self.random.below(100) {
            // What waits for the disk, or makes it be waited for.
            45..55 | 66..69 | 86..94 if self.life.syncs.no_call() => 0,
            choice => choice,
        };
        // Past the limit on purpose: only on the quota that has none.
        let is_free = quota == UNLIMITED;
        let handle = || gate.counter(user, id);
        let decided = |decision| self.decided(counter, amount, before, &decision);
        let done = match choice {
            0..30 => {
                self.add(counter, amount, false, || gate.try_consume(user, id, amount).map(decided))
            }
            30..45 => {
                self.add(counter, amount, false, || handle()?.try_consume(amount).map(decided))
            }
            45..50 => self.add(counter, amount, true, || {
                gate.try_consume_sync(user, id, amount).map(decided)
            }),
            50..55 => {
                self.add(counter, amount, true, || handle()?.try_consume_sync(amount).map(decided))
            }
            55..60 if is_free => {
                self.add(counter, amount, false, || gate.consume(user, id, amount).map(of_usage))
            }
            60..65 if is_free => {
                self.add(counter, amount, false, || handle()?.consume(amount).map(of_usage))
            }
            65 if is_free => self.add(counter, amount, false, || {
                let now = Timestamp::from_unix_millis(0);
                gate.record(&UsageEvent::new(user, id, amount as f64, now)).map(of_usage)
            }),
            66 if is_free => self
                .add(counter, amount, true, || gate.consume_sync(user, id, amount).map(of_usage)),
            67..69 if is_free => {
                self.add(counter, amount, true, || handle()?.consume_sync(amount).map(of_usage))
            }
            69..75 if is_free => self.add_batch(amount),
            75..82 => self.refund(counter, amount, |amount| gate.refund(user, id, amount)),
            82..86 => self.refund(counter, amount, |amount| handle()?.refund(amount)),
            86..89 => self.covered(|| gate.sync()),
            89 if amount == 1 => {
                self.page.merging(true);
                let result = self.covered(|| gate.snapshot());
                self.page.merging(false);
                result
            }
            90..94 if self.thread == 0 => self.change_limits(counter / QUOTAS, user),
            94 if self.thread == 0 => self.pass_time(),
            95 if self.thread == 0 => {
                std::thread::sleep(Duration::from_micros(self.random.below(2_000)));
                Ok(())
            }
            95..97 => {
                // So that what it reserved is given back.
                self.ask_again()?;
                self.ask(counter, amount)
            }
            97 if quota != PER_MINUTE => self.reserve(&[counter], amount),
            98 => self.count_two(counter, amount),
            99 if amount < 3 => self.reserve(&PAIR, amount),
            99 => self.count_all(PAIR, amount),
            _ => self.look(counter, amount),
        };
        self.page.count(Count::Turns, 1);
        done.map_err(|error| format!("choice {choice} on counter {counter}: {error}"))
    }

    /// So that there is something for the syncs in the background. It is no sign of life.
    pub(super) fn count_slowly(&mut self) -> std::result::Result<(), String> {
        std::thread::sleep(Duration::from_micros(500));
        let counter = self.random.below(USERS as u64) as usize * QUOTAS + UNLIMITED;
        let (user, quota) = split(counter);
        let consume = || self.life.gate.consume(user, self.ids[quota], 1).map(of_usage);
        self.add(counter, 1, false, consume).map_err(|error| error.to_string())
    }

    /// What a decision counted. It is exact: what fits is admitted, what does not is not, by a
    /// limit that was in force meanwhile.
    pub(super) fn decided(
        &self,
        counter: usize,
        amount: u64,
        before: Before,
        decision: &Decision,
    ) -> Counted {
        let &Decision { used, limit, .. } = decision;
        let is_exact = match decision.is_allowed() {
            true => (amount..=limit).contains(&used),
            false => used + amount > limit,
        };
        assert!(is_exact, "{amount} on counter {counter}: {decision:?}");
        self.require_limit(counter, before, limit);
        decision.is_allowed().then_some(decision.resets_at)
    }

    pub(super) fn require_limit(&self, counter: usize, before: Before, limit: u64) {
        let is_right = match split(counter).1 {
            UNLIMITED => limit == AMOUNT_MAX,
            ADJUSTED => self.life.limits.may_be(counter / QUOTAS, before, limit),
            _ => limit == LIMIT,
        };
        assert!(is_right, "the limit of counter {counter} was not {limit} then");
    }

    pub(super) fn add(
        &self,
        counter: usize,
        amount: u64,
        is_synced: bool,
        call: impl FnOnce() -> Result<Counted>,
    ) -> Result<()> {
        self.page.issue(counter, Open::Add, self.thread, amount);
        let counted = call()?;
        match counted {
            Some(resets_at) => self.added(counter, amount, is_synced, resets_at),
            None => self.page.count(Count::Denied, 1),
        }
        self.page.withdraw(counter, Open::Add, self.thread, amount);
        Ok(())
    }

    pub(super) fn added(
        &self,
        counter: usize,
        amount: u64,
        is_synced: bool,
        resets_at: Option<Timestamp>,
    ) {
        let slot = self.slot(resets_at);
        if is_synced || self.life.syncs.each_call() {
            self.page.add(counter, slot, Tally::AddedSynced, self.thread, amount);
            self.page.count(Count::AcknowledgedSynced, 1);
        }
        self.page.add(counter, slot, Tally::Added, self.thread, amount);
        self.page.count(Count::Acknowledged, 1);
    }

    fn slot(&self, resets_at: Option<Timestamp>) -> usize {
        let slot = window_until(resets_at).map(|window| self.page.slot(window));
        slot.unwrap_or(Some(0)).expect("an operation counts in a window that was there meanwhile")
    }

    /// On several counters, each of which may be there without the others.
    fn add_batch(&mut self, amount: u64) -> Result<()> {
        let first = self.random.below(USERS as u64 / 2) as usize;
        let counters = (first..first + 3).map(|user| user * QUOTAS + UNLIMITED);
        let id = self.ids[UNLIMITED];
        let items: Vec<_> = counters
            .clone()
            .map(|counter| Consume { user: split(counter).0, quota: id, amount })
            .collect();
        for counter in counters.clone() {
            self.page.issue(counter, Open::Add, self.thread, amount);
        }
        let usages = self.life.gate.consume_batch(&items)?;
        for (counter, usage) in counters.zip(usages) {
            self.added(counter, amount, false, usage.resets_at);
            self.page.withdraw(counter, Open::Add, self.thread, amount);
        }
        Ok(())
    }

    /// A refund does not say in which window it was. Where the window is the same before and after,
    /// it was in that one.
    fn refund(
        &self,
        counter: usize,
        amount: u64,
        call: impl FnOnce(u64) -> Result<u64>,
    ) -> Result<()> {
        let (user, quota) = split(counter);
        let window = || self.life.gate.usage(user, self.ids[quota]).map(|usage| usage.resets_at);
        let before = window()?;
        self.page.issue(counter, Open::Refund, self.thread, amount);
        let given = call(amount)?;
        if window()? == before {
            let slot = self.slot(before);
            if self.life.syncs.each_call() {
                self.page.add(counter, slot, Tally::RefundedSynced, self.thread, given);
            }
            self.page.add(counter, slot, Tally::Refunded, self.thread, given);
        } else {
            self.page.issue(counter, Open::RefundUnplaced, self.thread, given);
        }
        self.page.withdraw(counter, Open::Refund, self.thread, amount);
        self.page.count(Count::Acknowledged, 1);
        Ok(())
    }

    /// What makes all durable that was acknowledged before.
    pub(super) fn covered(&self, call: impl FnOnce() -> Result<()>) -> Result<()> {
        let acknowledged = self.page.acknowledged();
        call()?;
        self.page.cover(&acknowledged);
        Ok(())
    }

    /// By one thread only, so that the order is known.
    fn change_limits(&mut self, user: usize, id: u64) -> Result<()> {
        let (gate, quota) = (&self.life.gate, self.ids[ADJUSTED]);
        let half = self.random.below(ADJUSTED_MAX / 2);
        let (whose, limit) = match self.random.below(4) {
            0 => (None, 2 * half + 2),
            1 => (Some(user), 0),
            _ => (Some(user), 2 * half + 1),
        };
        let handle = if half.is_multiple_of(2) { Some(gate.counter(id, quota)?) } else { None };
        self.page.ask_limit(whose, limit);
        self.life.limits.ask(whose, limit);
        match (whose, limit, handle) {
            (None, ..) => gate.define(adjusted(limit)).map(|_| ()),
            (_, 0, None) => gate.clear_limit(id, quota),
            (_, 0, Some(handle)) => handle.clear_limit(),
            (_, _, None) => gate.set_limit(id, quota, limit),
            (_, _, Some(handle)) => handle.set_limit(limit),
        }?;
        self.page.acknowledge_limit(whose, limit);
        self.life.limits.acknowledge(whose);
        self.page.count(Count::Changes, 1);
        Ok(())
    }

    /// The next window begins, while the others count.
    fn pass_time(&self) -> Result<()> {
        if self.page.slot(self.page.clock()).is_some_and(|slot| slot + 1 < WINDOWS) {
            self.page.tick();
            self.life.clock.advance(Duration::from_millis(WINDOW_MS));
            self.page.count(Count::Windows, 1);
        }
        Ok(())
    }

    /// What changes nothing, and agrees with itself.
    fn look(&self, counter: usize, amount: u64) -> Result<()> {
        let (user, quota) = split(counter);
        let (gate, id) = (&self.life.gate, self.ids[quota]);
        let handle: Counter = gate.counter(user, id)?;
        let decisions = [gate.check(user, id, amount)?, handle.check(amount)?];
        let usages = [gate.usage(user, id)?, handle.usage()];
        let is_windowed = quota == PER_MINUTE;
        let agree = decisions.iter().all(|decision| decision.resets_at.is_some() == is_windowed)
            && usages.iter().all(|usage| usage.window_start.is_some() == is_windowed)
            && (handle.user(), handle.quota()) == (user, id)
            && gate.quotas().contains(&id)
            && gate.quota_by_name(gate.quota(id)?.name()) == Some(id);
        assert!(agree, "{decisions:?} {usages:?}");
        Ok(())
    }
}
