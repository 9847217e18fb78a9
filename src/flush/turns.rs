//! Who leads a commit, and which commit each waiter sleeps for.
//!
//! Commits are numbered, and one at a time is under way. Until its leader looks at the lanes, new
//! arrivals join it; those that come later wait for the next. So two kinds of waiters sleep at a
//! time, each on its own word: those of the commit under way, which are all woken by its end, and
//! those of the next, one of which is woken then, to lead it. That one is woken after some of the
//! others, so that a thread that returns from a commit and comes back at once finds the next one
//! still open to join, and all share a sync rather than follow each other in two halves. If the
//! system has futexes, a thread takes no lock when it is woken.
//!
//! The commits before and after the one under way share a word. So the thread woken to lead the
//! latter may be one that still sleeps for the former: it leads, or wakes another.

use std::time::Duration;

use crossbeam::utils::CachePadded;

use crate::sync::futex::Futex;
use crate::sync::{AtomicU64, Ordering, fence};

/// This many waiters of the ended commit are woken before the leader of the next, and the others
/// after it: enough to fill a sync, few enough that the disk does not idle for long. Measured with
/// 64 and 256 waiters on two cores; with 16, all of them come first.
const WOKEN_FIRST: u32 = 48;

/// The order of commits.
#[derive(Debug)]
pub(crate) struct Turns {
    /// The commit that is under way or comes next, and its [`Phase`].
    state: AtomicU64,
    /// The last commit that ended well: it made durable all that was there when it looked.
    succeeded: AtomicU64,
    /// For the waiters of commits with even numbers, and of those with odd ones.
    ended: [CachePadded<Futex>; 2],
}

/// How far a commit has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The next thread to arrive leads it.
    Open = 0,
    /// One of its sleeping waiters was woken to lead it. New arrivals join.
    Reserved = 1,
    /// Its leader has not looked at the lanes yet. New arrivals join.
    Gathering = 2,
    /// New arrivals wait for the next.
    Syncing = 3,
}

/// What `Turns::state` holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct State {
    number: u64,
    phase: Phase,
}

impl State {
    fn from_word(word: u64) -> Self {
        let phase = match word % 4 {
            0 => Phase::Open,
            1 => Phase::Reserved,
            2 => Phase::Gathering,
            _ => Phase::Syncing,
        };
        Self { number: word / 4, phase }
    }

    const fn word(self) -> u64 {
        4 * self.number + self.phase as u64
    }
}

impl Default for Turns {
    fn default() -> Self {
        let first = State { number: 1, phase: Phase::Open };
        Self {
            state: AtomicU64::new(first.word()),
            succeeded: AtomicU64::new(0),
            ended: Default::default(),
        }
    }
}

impl Turns {
    /// For a thread that needs a commit, and can tell when it had one. It may be woken by one that
    /// did not cover what the thread has just written.
    pub(crate) fn waiter(&self) -> Waiter<'_> {
        Waiter { turns: self, round: None, was_asleep: false }
    }

    /// For a thread that needs what is in the lanes by now to be committed, and can't tell except
    /// [by the commit](Waiter::is_covered).
    pub(crate) fn exact_waiter(&self) -> Waiter<'_> {
        // Pairs with the fence in `look`: the leader that this thread still finds gathering sees
        // what was written before.
        fence(Ordering::SeqCst);
        self.waiter()
    }

    fn state(&self) -> State {
        // Acquire: pairs with the Release wherever the state changes. What the last leader did is
        // seen.
        State::from_word(self.state.load(Ordering::Acquire))
    }

    /// Whether the state was the first and is the second now.
    fn change(&self, from: State, to: State) -> bool {
        let (from, to) = (from.word(), to.word());
        // AcqRel: pairs with itself and the Release in `end`. Relaxed: the caller looks again.
        self.state.compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    fn ended(&self, number: u64) -> &Futex {
        let [even, odd] = &self.ended;
        if number.is_multiple_of(2) { even } else { odd }
    }

    /// The commit under way is over. The next one is led by one of its waiters.
    fn end(&self, number: u64) {
        let next = State { number: number + 1, phase: Phase::Reserved };
        // Release: pairs with the Acquire in `state`.
        self.state.store(next.word(), Ordering::Release);
        let (ended, waiting) = (self.ended(number), self.ended(number + 1));
        ended.advance();
        waiting.advance();
        ended.wake(WOKEN_FIRST);
        self.hand_over(number + 1);
        ended.wake(u32::MAX);
    }

    /// Wakes one of the threads that sleep for this commit, to lead it. If there is none, the next
    /// thread to arrive leads it.
    fn hand_over(&self, number: u64) {
        let waiting = self.ended(number);
        if waiting.wake(1) > 0 {
            return;
        }
        let reserved = State { number, phase: Phase::Reserved };
        if self.change(reserved, State { number, phase: Phase::Open }) {
            // Somebody may have come and fallen asleep since.
            waiting.advance();
            waiting.wake(1);
        }
    }
}

/// A thread that needs a commit.
#[derive(Debug)]
pub(crate) struct Waiter<'a> {
    turns: &'a Turns,
    /// A commit that covers what the thread has written, unless it fails. `None`: it has not waited
    /// yet.
    round: Option<u64>,
    /// It has slept since it waits for that commit, and may be the one that was woken to lead.
    was_asleep: bool,
}

impl<'a> Waiter<'a> {
    /// The lead, where it is this thread's turn to lead. Otherwise it is to wait.
    pub(crate) fn lead(&mut self) -> Option<Leading<'a>> {
        loop {
            let state = self.turns.state();
            let State { number, phase } = state;
            let may_lead = match phase {
                Phase::Open => true,
                // Also one whose commit failed, before those who came after it.
                Phase::Reserved => {
                    self.was_asleep && self.round.is_some_and(|round| round <= number)
                }
                Phase::Gathering | Phase::Syncing => false,
            };
            if may_lead {
                if self.turns.change(state, State { number, phase: Phase::Gathering }) {
                    self.round = None;
                    return Some(Leading { turns: self.turns, number });
                }
                continue;
            }
            if self.round.is_none_or(|round| round < number) {
                self.round = Some(number + u64::from(phase == Phase::Syncing));
                self.was_asleep = false;
            }
            return None;
        }
    }

    /// Sleeps until its commit has ended, or needs somebody to lead it, or for so long. May return
    /// early.
    pub(crate) fn wait(&mut self, at_most: Duration) {
        let Some(round) = self.round else { return };
        let ended = self.turns.ended(round);
        let seen = ended.look();
        // After the look: who changes the state before this load is seen by it, and who does so
        // later finds this thread asleep, or keeps it from falling asleep.
        let State { number, phase } = self.turns.state();
        let is_to_sleep = match phase {
            Phase::Open => false,
            Phase::Reserved => number == round && !self.was_asleep,
            Phase::Gathering => number == round,
            Phase::Syncing => number == round || number + 1 == round,
        };
        // Whoever was to sleep until this commit and finds it reserved may lead it as well.
        self.was_asleep = true;
        if is_to_sleep {
            ended.sleep(seen, at_most);
        }
    }

    /// Whether a commit has ended well that covers what was in the lanes when this waiter came.
    /// Only an exact one can tell.
    pub(crate) fn is_covered(&self) -> bool {
        // Acquire: pairs with the Release in `succeeded`.
        let succeeded = self.turns.succeeded.load(Ordering::Acquire);
        self.round.is_some_and(|round| round <= succeeded)
    }
}

impl Drop for Waiter<'_> {
    /// A thread that was woken to lead and does not need to wakes another.
    fn drop(&mut self) {
        let Some(round) = self.round else { return };
        let State { number, phase } = self.turns.state();
        // Of that commit, or of one whose waiters sleep on the same word. Whoever leads wakes all.
        let is_for_it = number >= round && (number - round).is_multiple_of(2);
        if is_for_it && matches!(phase, Phase::Open | Phase::Reserved) {
            self.turns.hand_over(number);
        }
    }
}

/// The lead of a commit. Dropped, the commit has ended, also when its leader panics.
#[derive(Debug)]
pub(crate) struct Leading<'a> {
    turns: &'a Turns,
    number: u64,
}

impl Leading<'_> {
    /// To be called before the leader looks at the lanes: threads that arrive from here on wait for
    /// the next commit.
    pub(crate) fn look(&self) {
        let syncing = State { number: self.number, phase: Phase::Syncing };
        // Release: pairs with the Acquire in `state`.
        self.turns.state.store(syncing.word(), Ordering::Release);
        // Pairs with the fence in `exact_waiter`.
        fence(Ordering::SeqCst);
    }

    /// All that was in the lanes when the leader looked is durable.
    pub(crate) fn succeeded(&self) {
        // Release: pairs with the Acquire in `is_covered`.
        self.turns.succeeded.store(self.number, Ordering::Release);
    }
}

impl Drop for Leading<'_> {
    fn drop(&mut self) {
        self.turns.end(self.number);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::testing::watched;
    use std::sync::atomic::AtomicUsize;

    const NEVER: Duration = Duration::from_secs(1 << 20);

    #[test]
    fn who_comes_alone_leads_and_so_does_the_next() {
        let turns = Turns::default();
        for _ in 0..3 {
            let leading = turns.waiter().lead().expect("nobody else is there");
            leading.look();
            leading.succeeded();
        }
    }

    #[test]
    fn who_comes_before_the_leader_looks_joins_and_who_comes_later_does_not() {
        let turns = Turns::default();
        let leading = turns.waiter().lead().expect("nobody else is there");
        let (mut early, mut late) = (turns.exact_waiter(), turns.exact_waiter());
        assert!(early.lead().is_none());
        leading.look();
        assert!(late.lead().is_none() && early.lead().is_none());
        leading.succeeded();
        drop(leading);
        assert!(early.is_covered() && !late.is_covered());
        late.lead().expect("nobody else is there").succeeded();
        assert!(turns.exact_waiter().lead().is_some());
    }

    #[test]
    fn a_commit_that_failed_covers_nobody() {
        let turns = Turns::default();
        let leading = turns.waiter().lead().expect("nobody else is there");
        let mut waiter = turns.exact_waiter();
        assert!(waiter.lead().is_none());
        leading.look();
        drop(leading);
        waiter.wait(NEVER);
        assert!(!waiter.is_covered());
        assert!(waiter.lead().is_some());
    }

    /// A leader has ended its commit and not come to wake who waited for it, when the next but one
    /// is handed over on the same word. A model of it takes too long.
    #[test]
    fn a_lead_is_not_lost_to_one_who_slept_until_another_commit() {
        let turns = Turns::default();
        let first = turns.waiter().lead().expect("nobody else is there");
        std::thread::scope(|scope| {
            let early = watched(scope, || {
                let mut waiter = turns.waiter();
                assert!(waiter.lead().is_none());
                waiter.wait(NEVER);
            });
            assert!(early.waits());
            let next = State { number: 2, phase: Phase::Gathering };
            turns.state.store(next.word(), Ordering::Release);
            drop(Leading { turns: &turns, number: 2 });
            early.join();
            assert!(turns.waiter().lead().is_some(), "nobody else has the lead");
        });
        std::mem::forget(first);
    }

    /// With the system's futex, where the models have another. A wake-up that gets lost hangs.
    #[test]
    fn many_threads_share_commits_and_none_sleeps_for_good() {
        const THREADS: usize = 100;
        const ROUNDS: usize = if cfg!(miri) { 2 } else { 200 };
        let turns = Turns::default();
        let marks = || -> Vec<AtomicUsize> { (0..THREADS).map(|_| AtomicUsize::new(0)).collect() };
        let (written, durable) = (marks(), marks());
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (turns, written, durable) = (&turns, &written, &durable);
                scope.spawn(move || {
                    for round in 1..=ROUNDS {
                        // Release, Acquire: as a lane's tail and the committer's marks.
                        written[thread].store(round, Ordering::Release);
                        let mut waiter = turns.waiter();
                        while durable[thread].load(Ordering::Acquire) < round {
                            let Some(leading) = waiter.lead() else {
                                waiter.wait(NEVER);
                                continue;
                            };
                            leading.look();
                            // Others come meanwhile.
                            std::thread::yield_now();
                            for (durable, written) in durable.iter().zip(written) {
                                durable.store(written.load(Ordering::Acquire), Ordering::Release);
                            }
                            leading.succeeded();
                        }
                    }
                });
            }
        });
        assert!(durable.into_iter().all(|durable| durable.into_inner() == ROUNDS));
    }
}

#[cfg(all(test, loom))]
mod loom_tests;
