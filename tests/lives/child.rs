//! The child: random operations on several threads, acknowledged in the shared page, until it is
//! ended. It closes and opens the directory again and again, so that the end meets recovery and
//! close as well, and looks each time whether all is there.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tollgate::{
    Consume, Counter, Decision, Error, HealthLevel, QuotaId, ReservationId, Reserved, Result,
    Timestamp, Usage, UsageEvent,
};

use super::{
    ADJUSTED, ADJUSTED_MAX, Answered, COUNTERS, Count, Level, Life, Open, PAIR, PER_MINUTE, Page,
    Phase, QUOTAS, Random, Request, Tally, UNLIMITED, WINDOW_MS, adjusted, examine, open, quotas,
    settle, split, window_until,
};
use super::{THREADS, page::WINDOWS, verdict};

/// Runs until it is ended, or something is not as promised: returns what.
pub(crate) fn run(level: Level, dir: &Path, page: &Page, seed: u64) -> String {
    let mut random = Random(seed);
    // What the last life of this process left: nothing of it is in doubt.
    let mut since = level;
    loop {
        if let Err(found) = live(since, dir, page, &mut random) {
            return found;
        }
        since = Level::Process;
    }
}

/// One life: open, count, close.
fn live(
    level: Level,
    dir: &Path,
    page: &Page,
    random: &mut Random,
) -> std::result::Result<(), String> {
    page.enter(Phase::Opening);
    let life = open(dir, page, random.next()).map_err(|error| format!("open: {error}"))?;
    let found = examine(&life.gate, page, level)?;
    settle(&life.gate, page, &found);
    page.enter(Phase::Counting);
    let rounds = random.below(400) + 1;
    let ids = quotas(&life.gate).map_err(|error| format!("define: {error}"))?;
    count(&life, level, page, ids, rounds, random)?;
    let health = life.gate.health();
    if health.level() == HealthLevel::Failed {
        return Err(format!("{health:?}"));
    }
    // What is in memory is what was acknowledged, exactly.
    verdict::examine_counters(&life.gate, page, Level::Process)
        .map_err(|what| format!("before close, {what}"))?;
    page.enter(Phase::Closing);
    let acknowledged = page.acknowledged();
    if random.below(3) > 0 {
        life.gate.close().map_err(|error| format!("close: {error}"))?;
    }
    drop(life);
    // A close that met the end of the power says so; a drop can't.
    if !page.is_cut() {
        page.cover(&acknowledged);
    }
    Ok(())
}

/// Some rounds of random operations on each thread, after a death of this level.
fn count(
    life: &Life,
    level: Level,
    page: &Page,
    ids: [QuotaId; QUOTAS],
    rounds: u64,
    random: &mut Random,
) -> std::result::Result<(), String> {
    let is_over = AtomicBool::new(false);
    let mut workers: Vec<_> = (0..THREADS)
        .map(|thread| Worker { life, page, thread, ids, random: Random(random.next()) })
        .collect();
    let result = std::thread::scope(|scope| {
        scope.spawn(|| watch(life, page, &is_over));
        let threads: Vec<_> = workers
            .iter_mut()
            .map(|worker| {
                scope.spawn(move || {
                    let is_as_before = worker.ask_again(level)?;
                    page.count(Count::AskedAgain, u64::from(is_as_before));
                    (0..rounds).try_for_each(|_| worker.turn())
                })
            })
            .collect();
        let results: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
        is_over.store(true, Ordering::SeqCst);
        results
            .into_iter()
            .try_for_each(|result| result.unwrap_or_else(|_| panicked("a thread that counts")))
    });
    // No failure of the disk, the end of the power included, is a reason to panic.
    let health = life.gate.health();
    match health.reasons.iter().find(|reason| reason.to_string().contains("panicked")) {
        Some(reason) => panicked(&reason.to_string()),
        None => result,
    }
}

/// Ends the process at once: whatever happened to the disk, this must not be.
fn panicked(what: &str) -> ! {
    eprintln!("there was a panic: {what}");
    std::process::exit(super::VIOLATION.into());
}

/// What the syncs in the background promise: all that was acknowledged before one began is durable
/// once it has completed. Of two that completed since, the second began since.
fn watch(life: &Life, page: &Page, is_over: &AtomicBool) {
    while !is_over.load(Ordering::SeqCst) {
        let acknowledged = page.acknowledged();
        let before = life.gate.stats().syncs;
        while life.gate.stats().syncs < before + 2 {
            if is_over.load(Ordering::SeqCst) {
                return;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        page.cover(&acknowledged);
    }
}

struct Worker<'a> {
    life: &'a Life,
    page: &'a Page,
    thread: usize,
    ids: [QuotaId; QUOTAS],
    random: Random,
}

/// What a call counted: the time at which its window ends, or nothing.
type Counted = Option<Option<Timestamp>>;

/// For longer than all of this takes.
const LONG: Duration = Duration::from_hours(7 * 24);
/// Ids are remembered for ten windows: one that was first asked so long ago certainly is.
const REMEMBERED: u64 = 3;

fn of_decision(decision: Decision) -> Counted {
    decision.is_allowed().then_some(decision.resets_at)
}

fn of_usage(usage: Usage) -> Counted {
    Some(usage.resets_at)
}

impl Worker<'_> {
    /// One random operation.
    fn turn(&mut self) -> std::result::Result<(), String> {
        let counter = self.random.below(COUNTERS as u64) as usize;
        let amount = self.random.below(5) + 1;
        let (user, quota) = split(counter);
        let (gate, id) = (&self.life.gate, self.ids[quota]);
        let choice = self.random.below(100);
        // Past the limit on purpose: only on the quota that has none.
        let is_free = quota == UNLIMITED;
        let handle = || gate.counter(user, id);
        let done = match choice {
            0..30 => self.add(counter, amount, false, || {
                gate.try_consume(user, id, amount).map(of_decision)
            }),
            30..45 => {
                self.add(counter, amount, false, || handle()?.try_consume(amount).map(of_decision))
            }
            45..50 => self.add(counter, amount, true, || {
                gate.try_consume_sync(user, id, amount).map(of_decision)
            }),
            50..55 => self
                .add(counter, amount, true, || handle()?.try_consume_sync(amount).map(of_decision)),
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
                self.ask_again(Level::Process)?;
                self.ask(counter, amount)
            }
            97..99 if quota != PER_MINUTE => self.reserve(counter, amount),
            99 if amount == 1 => self.reserve_pair(),
            99 => self.count_pair(amount),
            _ => self.look(counter, amount),
        };
        done.map_err(|error| format!("choice {choice} on counter {counter}: {error}"))
    }

    fn add(
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

    fn added(&self, counter: usize, amount: u64, is_synced: bool, resets_at: Option<Timestamp>) {
        let slot = self.slot(resets_at);
        if is_synced || self.life.is_durable {
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
        let first = self.random.below(super::USERS as u64 / 2) as usize;
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

    /// Under a new id, twice: it counts once, and the answer is the same. The next life asks a
    /// third time.
    fn ask(&mut self, counter: usize, amount: u64) -> Result<()> {
        let id = self.random.next();
        let kind = self.random.below(4);
        let request = Request { id, kind, counter, amount, asked: self.page.clock() };
        self.page.note_request(self.thread, &request);
        let mut answered = Answered::Denied;
        self.add(counter, amount, false, || {
            let (counted, reservation) = self.call(&request)?;
            assert_eq!(self.call(&request)?, (counted, reservation), "asked again");
            if counted.is_some() {
                answered = Answered::Admitted;
            }
            Ok(counted)
        })?;
        self.page.answered(self.thread, answered);
        Ok(())
    }

    /// What it counted, and what it reserved.
    fn call(&self, request: &Request) -> Result<(Counted, Option<ReservationId>)> {
        let &Request { id, kind, counter, amount, .. } = request;
        let ((user, quota), id) = (split(counter), u128::from(id));
        let (gate, quota_id) = (&self.life.gate, self.ids[quota]);
        match kind {
            0 if quota == UNLIMITED => {
                gate.consume_once(id, user, quota_id, amount).map(|usage| (of_usage(usage), None))
            }
            1 if quota != PER_MINUTE => {
                let reserved = gate.reserve_once(id, user, quota_id, amount, LONG)?;
                let reservation = reserved.into_result().ok().map(|it| it.detach());
                Ok((reservation.map(|_| None), reservation))
            }
            2 if quota == UNLIMITED => {
                let now = Timestamp::from_unix_millis(0);
                let event = UsageEvent::new(user, quota_id, amount as f64, now).request_id(id);
                gate.record(&event).map(|usage| (of_usage(usage), None))
            }
            _ => gate
                .try_consume_once(id, user, quota_id, amount)
                .map(|decision| (of_decision(decision), None)),
        }
    }

    /// What this thread asked last, perhaps in an earlier life: what was answered then is the
    /// answer, and does not count again. What it reserved is still reserved, and is given back.
    /// Whether it was certain that it had been answered.
    fn ask_again(&self, level: Level) -> std::result::Result<bool, String> {
        let Some((request, answered)) = self.page.request(self.thread) else { return Ok(false) };
        let Request { counter, amount, asked, .. } = request;
        let is_remembered = self.page.clock() <= asked + REMEMBERED;
        let is_certain = level == Level::Process && answered != Answered::Unknown;
        if is_remembered {
            if !is_certain {
                // It may count only now. This stays open: nobody will know.
                self.page.issue(counter, Open::Add, self.thread, amount);
            }
            let called = self.call(&request);
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
        let gate = &self.life.gate;
        self.page.issue(counter, Open::Refund, self.thread, amount);
        let given = gate.extend_reservation(id, LONG).and_then(|()| {
            if amount.is_multiple_of(2) {
                gate.cancel_reservation(id)
            } else {
                gate.commit_reservation_each(id, &[0]).map(drop)
            }
        });
        match given {
            Err(Error::ReservationSettled { .. }) => return Ok(()),
            given => given?,
        }
        if self.life.is_durable {
            self.page.add(counter, 0, Tally::RefundedSynced, self.thread, amount);
        }
        self.page.add(counter, 0, Tally::Refunded, self.thread, amount);
        self.page.withdraw(counter, Open::Refund, self.thread, amount);
        Ok(())
    }

    /// What is reserved is counted; settled, it is given back, and what it cost is counted. A
    /// reservation whose process dies stays open for longer than all of this takes. Not where
    /// windows pass: the answer does not say in which one it was.
    fn reserve(&mut self, counter: usize, amount: u64) -> Result<()> {
        let (user, quota) = split(counter);
        let (gate, id) = (&self.life.gate, self.ids[quota]);
        let mut open = None;
        self.add(counter, amount, false, || {
            let reserved = gate.reserve(user, id, amount, LONG)?;
            open = reserved.into_result().ok();
            Ok(open.as_ref().map(|_| None))
        })?;
        let Some(mut reservation) = open else { return Ok(()) };
        let actual = self.random.below(amount + 1);
        self.page.issue(counter, Open::Add, self.thread, actual);
        self.page.issue(counter, Open::Refund, self.thread, amount);
        match self.random.below(4) {
            0 => reservation.commit(actual).map(drop)?,
            1 => gate.commit_reservation(reservation.detach(), actual).map(drop)?,
            2 if actual == 0 => reservation.cancel()?,
            _ => {
                reservation.extend(LONG)?;
                reservation.commit_each(&[actual]).map(drop)?;
            }
        }
        if actual > 0 {
            self.added(counter, actual, false, None);
        }
        if self.life.is_durable {
            self.page.add(counter, 0, Tally::RefundedSynced, self.thread, amount);
        }
        self.page.add(counter, 0, Tally::Refunded, self.thread, amount);
        self.page.withdraw(counter, Open::Refund, self.thread, amount);
        self.page.withdraw(counter, Open::Add, self.thread, actual);
        Ok(())
    }

    /// Two counters that are only ever changed together.
    fn count_pair(&mut self, amount: u64) -> Result<()> {
        let quota = self.ids[UNLIMITED];
        let mut items = PAIR.map(|user| Consume { user, quota, amount });
        if self.random.below(2) == 0 {
            items.reverse();
        }
        assert!(self.life.gate.try_consume_all(&items)?.is_allowed());
        self.page.count(Count::Acknowledged, 1);
        Ok(())
    }

    /// The same two, reserved together and settled together.
    fn reserve_pair(&mut self) -> Result<()> {
        let quota = self.ids[UNLIMITED];
        let items = PAIR.map(|user| Consume { user, quota, amount: 5 });
        let Reserved::Open(mut reservation) = self.life.gate.reserve_all(&items, LONG)? else {
            panic!("there is no limit");
        };
        match self.random.below(3) {
            0 => reservation.cancel()?,
            1 => reservation.commit(2).map(drop)?,
            _ => reservation.commit_each(&[7, 7]).map(drop)?,
        }
        self.page.count(Count::Acknowledged, 1);
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
            if self.life.is_durable {
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
    fn covered(&self, call: impl FnOnce() -> Result<()>) -> Result<()> {
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
        match (whose, limit, handle) {
            (None, ..) => gate.define(adjusted(limit)).map(|_| ()),
            (_, 0, None) => gate.clear_limit(id, quota),
            (_, 0, Some(handle)) => handle.clear_limit(),
            (_, _, None) => gate.set_limit(id, quota, limit),
            (_, _, Some(handle)) => handle.set_limit(limit),
        }?;
        self.page.acknowledge_limit(whose, limit);
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
