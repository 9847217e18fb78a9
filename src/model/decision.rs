//! What callers ask and what they are told.

use std::fmt;
use std::time::Duration;

use smallvec::SmallVec;

use super::{QuotaId, Timestamp, WindowStart};

/// The answer to a check or a conditional consume. A denial is an answer, not an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "a denial that nobody looks at limits nothing"]
#[non_exhaustive]
pub struct Decision {
    /// The usage in the current window, in units: with the amount just consumed if it was admitted,
    /// without it for a denial or a check (which consumes nothing). Above `limit` where usage was
    /// counted past it.
    pub used: u64,
    /// The limit that applies to the user, in units.
    pub limit: u64,
    /// What is left of the limit, in units: `limit` minus `used`, not below zero.
    pub remaining: u64,
    /// When usage starts from zero again; `None` when it never does.
    pub resets_at: Option<Timestamp>,
    outcome: Outcome,
    asked: u64,
    decided_at: Timestamp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Denied,
    Allowed,
    /// Denied, and never allowed later.
    Refused,
}

impl Decision {
    pub(crate) const fn new(
        allowed: bool,
        used: u64,
        limit: u64,
        asked: u64,
        resets_at: Option<Timestamp>,
        decided_at: Timestamp,
    ) -> Self {
        let remaining = limit.saturating_sub(used);
        let outcome = if allowed { Outcome::Allowed } else { Outcome::Denied };
        Self { used, limit, remaining, resets_at, outcome, asked, decided_at }
    }

    /// A permanent denial: there is nothing to wait for.
    pub(crate) const fn refused(mut self) -> Self {
        self.outcome = Outcome::Refused;
        self
    }

    /// Whether the amount fits the limit. A conditional consume then also consumed it.
    #[must_use]
    pub const fn is_allowed(&self) -> bool {
        matches!(self.outcome, Outcome::Allowed)
    }

    /// Whether the amount does not fit the limit. Nothing was consumed then.
    #[must_use]
    pub const fn is_denied(&self) -> bool {
        !self.is_allowed()
    }

    /// The amount that was asked for, in units.
    #[must_use]
    pub const fn asked(&self) -> u64 {
        self.asked
    }

    /// The decision if it allows, or the denial, for `?` and `match`.
    ///
    /// ```
    /// use tollgate::{Config, Decision, Quota, QuotaId, Tollgate};
    ///
    /// fn call(gate: &Tollgate, calls: QuotaId) -> Result<(), Box<dyn std::error::Error>> {
    ///     let _ = gate.try_consume(42, calls, 1)?.into_result()?;
    ///     Ok(()) // ... what is metered
    /// }
    ///
    /// # let dir = tempfile::tempdir()?;
    /// let gate = Tollgate::open(dir.path(), Config::default())?;
    /// let calls = gate.define(Quota::new("calls", 1))?;
    /// call(&gate, calls)?;
    /// let denied = call(&gate, calls).unwrap_err();
    /// assert_eq!(denied.to_string(), "denied: 0 of 1 left, and 1 was asked for");
    /// assert!(denied.is::<Decision>());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The denial.
    pub const fn into_result(self) -> Result<Self, Self> {
        if self.is_allowed() { Ok(self) } else { Err(self) }
    }

    /// How long to wait before asking again can help: the time from the decision to the reset, at
    /// least 1 millisecond. `None` when the amount was allowed, and when waiting can't help: there
    /// is no reset, the amount is more than the whole limit, or it is a commit, which is charged to
    /// the window of its reservation. Reservations may be released earlier; the wait does not take
    /// that into account.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        if self.outcome != Outcome::Denied || self.asked > self.limit {
            return None;
        }
        let wait = self.resets_at?.saturating_sub(self.decided_at);
        Some(wait.max(Duration::from_millis(1)))
    }

    /// [`retry_after`](Self::retry_after) in whole seconds, rounded up, as HTTP's `Retry-After`
    /// wants it.
    #[must_use]
    pub fn retry_after_secs(&self) -> Option<u64> {
        self.retry_after().map(secs_rounded_up)
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { remaining, limit, asked, .. } = self;
        if self.is_allowed() {
            return f.write_str("allowed");
        }
        let were = if *asked == 1 { "was" } else { "were" };
        write!(f, "denied: {remaining} of {limit} left, and {asked} {were} asked for")
    }
}

/// As an error, it is a denial: see [`Decision::into_result`].
impl std::error::Error for Decision {}

fn secs_rounded_up(wait: Duration) -> u64 {
    wait.as_secs() + u64::from(wait.subsec_nanos() > 0)
}

/// The answers for all counters of an operation over several counters: in the order of the call's
/// items; for a commit of one amount, by quota id and user. As an error, it says which counter has
/// no room.
///
/// The operation was admitted when every counter allows it; otherwise nothing was counted, not even
/// in the counters that had room.
#[derive(Clone, PartialEq, Eq)]
#[must_use = "a denial that nobody looks at limits nothing"]
pub struct Decisions {
    answers: SmallVec<[Answered; 3]>,
    decided_at: Timestamp,
}

/// A [`Decision`] in half the room, without the time, which all of an operation have in common: the
/// answers for three counters are moved faster than they could be allocated.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Answered {
    used: u64,
    limit: u64,
    asked: u64,
    /// From bit 0 on the time of the reset, above it the outcome.
    reset_and_outcome: u64,
}

impl Answered {
    /// All times are below.
    const OUTCOME_FROM: u32 = 62;
    /// Where one is still to be put.
    pub(crate) const NONE: Self = Self { used: 0, limit: 0, asked: 0, reset_and_outcome: 0 };
    /// A time that is none.
    const NEVER: u64 = (1 << Self::OUTCOME_FROM) - 1;

    #[inline(always)]
    fn of(decision: &Decision) -> Self {
        let &Decision { used, limit, resets_at, outcome, asked, .. } = decision;
        Self::new(outcome, used, limit, asked, resets_at)
    }

    /// Of a decision that allows.
    #[inline(always)]
    pub(crate) fn allowed(used: u64, limit: u64, asked: u64, resets_at: Option<Timestamp>) -> Self {
        Self::new(Outcome::Allowed, used, limit, asked, resets_at)
    }

    #[inline(always)]
    fn new(
        outcome: Outcome,
        used: u64,
        limit: u64,
        asked: u64,
        resets_at: Option<Timestamp>,
    ) -> Self {
        let outcome = match outcome {
            Outcome::Denied => 0,
            Outcome::Allowed => 1,
            Outcome::Refused => 2,
        };
        let reset = resets_at.map_or(Self::NEVER, Timestamp::as_unix_millis);
        Self { used, limit, asked, reset_and_outcome: reset | outcome << Self::OUTCOME_FROM }
    }

    fn outcome(self) -> Outcome {
        match self.reset_and_outcome >> Self::OUTCOME_FROM {
            0 => Outcome::Denied,
            1 => Outcome::Allowed,
            _ => Outcome::Refused,
        }
    }

    fn decision(self, decided_at: Timestamp) -> Decision {
        let Self { used, limit, asked, reset_and_outcome } = self;
        let reset = Some(reset_and_outcome & Self::NEVER).filter(|&reset| reset != Self::NEVER);
        let resets_at = reset.map(Timestamp::from_unix_millis);
        let decision = Decision::new(true, used, limit, asked, resets_at, decided_at);
        Decision { outcome: self.outcome(), ..decision }
    }
}

impl Decisions {
    /// All decided at one time.
    #[inline(always)]
    pub(crate) fn new(
        decided_at: Timestamp,
        decisions: impl IntoIterator<Item = Decision>,
    ) -> Self {
        let answers = decisions.into_iter().map(|decision| Answered::of(&decision)).collect();
        Self { answers, decided_at }
    }

    /// [`new`](Self::new) for a few, copied as a whole.
    #[inline(always)]
    pub(crate) fn few<const N: usize>(decided_at: Timestamp, answers: &[Answered; N]) -> Self {
        let mut few = [Answered::NONE; 3];
        let answers = match few.first_chunk_mut() {
            Some(first) => {
                *first = *answers;
                SmallVec::from_buf_and_len(few, N)
            }
            None => SmallVec::from_slice(answers),
        };
        Self { answers, decided_at }
    }

    /// Of one counter.
    #[inline(always)]
    pub(crate) fn one(decision: &Decision) -> Self {
        Self::few(decision.decided_at, &[Answered::of(decision)])
    }

    /// Whether all counters have room. An operation that counts has then counted in all of them.
    #[must_use]
    pub fn is_allowed(&self) -> bool {
        self.refused().is_none()
    }

    /// Whether some counter has no room. Nothing was counted then, in any of them.
    #[must_use]
    pub fn is_denied(&self) -> bool {
        !self.is_allowed()
    }

    /// The decisions if they allow, or the denial, for `?` and `match`.
    ///
    /// # Errors
    ///
    /// The denial.
    pub fn into_result(self) -> Result<Self, Self> {
        if self.is_allowed() { Ok(self) } else { Err(self) }
    }

    /// The first counter that has no room, by its place in [`each`](Self::each).
    #[must_use]
    pub fn refused(&self) -> Option<usize> {
        self.answers.iter().position(|answer| answer.outcome() != Outcome::Allowed)
    }

    /// Each counter's answer. In a denied operation, the answers of counters that have room say
    /// allowed, though nothing was counted.
    pub fn each(&self) -> impl DoubleEndedIterator<Item = Decision> + ExactSizeIterator + Clone {
        self.answers.iter().map(|answer| answer.decision(self.decided_at))
    }

    /// The answer of the counter in this place of [`each`](Self::each).
    #[must_use]
    pub fn get(&self, index: usize) -> Option<Decision> {
        self.each().nth(index)
    }

    /// How long to wait before asking again can help: the longest wait of the counters that
    /// refused. `None` when the operation was allowed, and when waiting does not help for one of
    /// them.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        let mut denied = self.each().filter(Decision::is_denied);
        denied
            .try_fold(None, |longest, decision| Some(longest.max(Some(decision.retry_after()?))))?
    }

    /// [`retry_after`](Self::retry_after) in whole seconds, rounded up, as HTTP's `Retry-After`
    /// wants it.
    #[must_use]
    pub fn retry_after_secs(&self) -> Option<u64> {
        self.retry_after().map(secs_rounded_up)
    }
}

impl fmt::Display for Decisions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.each().enumerate().find(|(_, decision)| decision.is_denied()) {
            None => f.write_str("allowed"),
            Some((index, Decision { remaining, asked, .. })) => {
                write!(
                    f,
                    "denied: counter {index} has {remaining} left, and {asked} were asked for"
                )
            }
        }
    }
}

impl fmt::Debug for Decisions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.each()).finish()
    }
}

impl std::error::Error for Decisions {}

/// What a user has used of a quota in the current window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Usage {
    /// The usage, in units, including what is reserved. Above `limit` where usage was counted past
    /// it, or where the limit was lowered.
    pub used: u64,
    /// How much of `used` open reservations hold, in units; what they don't use is released.
    pub reserved: u64,
    /// The limit that applies to the user, in units.
    pub limit: u64,
    /// What is left of the limit, in units: `limit` minus `used`, not below zero.
    pub remaining: u64,
    /// When the window began; `None` for a lifetime.
    pub window_start: Option<Timestamp>,
    /// When usage starts from zero again; `None` when it never does.
    pub resets_at: Option<Timestamp>,
}

impl Usage {
    pub(crate) const fn new(
        used: u64,
        limit: u64,
        start: WindowStart,
        lifetime: bool,
        resets_at: Option<Timestamp>,
    ) -> Self {
        let window_start = if lifetime { None } else { Some(Timestamp::from_unix_millis(start.0)) };
        let remaining = limit.saturating_sub(used);
        Self { used, reserved: 0, limit, remaining, window_start, resets_at }
    }

    /// Does not include what was reserved after the usage was read.
    pub(crate) fn with_reserved(self, reserved: u64) -> Self {
        Self { reserved: reserved.min(self.used), ..self }
    }

    /// Whether more was used than the limit allows.
    #[must_use]
    pub const fn is_over_limit(&self) -> bool {
        self.used > self.limit
    }
}

/// A counter, and how much of it: an item of a call that names several counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Consume {
    /// Who consumes.
    pub user: u64,
    /// What is consumed.
    pub quota: QuotaId,
    /// How much, in the quota's units: 1 to [`AMOUNT_MAX`](crate::AMOUNT_MAX), or 0 in a commit.
    pub amount: u64,
}

impl Consume {
    /// So much of this counter.
    #[must_use]
    pub const fn new(user: u64, quota: QuotaId, amount: u64) -> Self {
        Self { user, quota, amount }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RESET: Option<Timestamp> = Some(Timestamp::from_unix_millis(5000));

    fn at(millis: u64) -> Timestamp {
        Timestamp::from_unix_millis(millis)
    }

    #[test]
    fn a_denial_says_how_long_to_wait() {
        let denied = Decision::new(false, 8, 10, 3, RESET, at(4000));
        assert!(denied.is_denied() && !denied.is_allowed());
        assert_eq!((denied.used, denied.limit, denied.remaining), (8, 10, 2));
        assert_eq!(denied.retry_after(), Some(Duration::from_secs(1)));
        assert_eq!((denied.asked(), denied.into_result()), (3, Err(denied)));
        assert_eq!(denied.to_string(), "denied: 2 of 10 left, and 3 were asked for");
        let allowed = Decision::new(true, 8, 10, 3, RESET, at(4000));
        assert_eq!((allowed.into_result(), &*allowed.to_string()), (Ok(allowed), "allowed"));
    }

    #[test]
    fn whole_seconds_to_wait_are_rounded_up() {
        let denied = |now| Decision::new(false, 8, 10, 3, RESET, at(now));
        assert_eq!(
            [3999, 4000, 4001].map(|now| denied(now).retry_after_secs()),
            [2, 1, 1].map(Some)
        );
        assert_eq!(Decision::new(true, 8, 10, 1, RESET, at(0)).retry_after_secs(), None);
    }

    fn of<const N: usize>(decisions: [Decision; N]) -> [Answered; N] {
        decisions.map(|decision| Answered::of(&decision))
    }

    #[test]
    fn several_say_which_has_no_room() {
        let answers = [(true, 10, 3), (false, 10, 3), (false, 20, 30)];
        let answers = answers.map(|(allowed, limit, asked)| {
            Decision::new(allowed, 8, limit, asked, RESET, at(4000))
        });
        let first = Decisions::new(at(4000), answers[..1].to_vec());
        assert_eq!((first.refused(), &*first.to_string()), (None, "allowed"));
        assert_eq!(first.clone().into_result(), Ok(first));
        let two = Decisions::new(at(4000), answers[..2].to_vec());
        assert_eq!((two.refused(), two.retry_after_secs()), (Some(1), Some(1)));
        assert_eq!(two.to_string(), "denied: counter 1 has 2 left, and 3 were asked for");
        assert_eq!(two.clone().into_result(), Err(two));
        let three = Decisions::new(at(4000), answers);
        assert_eq!((three.refused(), three.retry_after_secs()), (Some(1), None));
        assert!(three.each().eq(answers) && three == Decisions::few(at(4000), &of(answers)));
        let never = Decision::new(false, 1, 1, 1, None, at(4));
        let kinds = [answers[0], answers[1].refused(), never];
        let four = Decisions::new(at(4), [kinds[2]; 4]);
        assert!(four.each().eq([kinds[2]; 4]) && four.get(4).is_none());
        assert_eq!(Decisions::few(at(4), &of([kinds[2]; 4])), four);
        for kind in &kinds {
            assert_eq!(Decisions::one(kind).get(0), Some(*kind));
        }
    }

    #[test]
    fn no_wait_is_named_where_none_helps() {
        assert_eq!(Decision::new(true, 8, 10, 3, RESET, at(4000)).retry_after(), None);
        assert_eq!(Decision::new(false, 8, 10, 3, None, at(4000)).retry_after(), None);
        assert_eq!(Decision::new(false, 8, 10, 11, RESET, at(4000)).retry_after(), None);
        let whole_limit = Decision::new(false, 8, 10, 10, RESET, at(4000));
        assert_eq!(whole_limit.retry_after(), Some(Duration::from_secs(1)));
    }

    /// A wait of zero would make a client ask again at once, in a loop.
    #[test]
    fn a_wait_is_never_zero() {
        for now in [5000, 5001] {
            let denied = Decision::new(false, 10, 10, 1, RESET, at(now));
            assert_eq!(denied.retry_after(), Some(Duration::from_millis(1)));
        }
    }

    #[test]
    fn usage_past_the_limit_leaves_nothing() {
        let usage = Usage::new(12, 10, WindowStart(1000), false, RESET);
        assert_eq!((usage.remaining, usage.window_start), (0, Some(at(1000))));
        assert!(usage.is_over_limit());
        let lifetime = Usage::new(10, 10, WindowStart(0), true, None);
        assert_eq!((lifetime.remaining, lifetime.window_start), (0, None));
        assert!(!lifetime.is_over_limit());
        assert_eq!(Decision::new(false, 12, 10, 1, None, at(0)).remaining, 0);
        assert_eq!([5, 12, 13].map(|it| usage.with_reserved(it).reserved), [5, 12, 12]);
    }
}
