//! Events folded.
//!
//! Lanes are drained one after the other, so a reservation may be settled in one batch and opened
//! in a later one. The fold does not care: what it yields does not depend on the order of the
//! events.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use foldhash::fast::RandomState;

use super::kept::KeptAnswer;
use super::newest::{Newest, Timed, age};
use super::{Answer, LedgerEvent, Part, Parts, Settlement};
use crate::fold::SumKey;
use crate::model::{ReservationId, Timestamp};

/// What is remembered after the last event.
///
/// Most of it is what has ended, which nothing that comes later changes: it is kept in lists, in
/// the order in which it came, and only what is still under way is looked up.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ledger {
    open: HashMap<ReservationId, Open, RandomState>,
    /// Extended, but not opened yet: the lane that says so is still to be read.
    announced: HashMap<ReservationId, Timestamp, RandomState>,
    /// Settled, with what was given back, but not opened yet: likewise.
    unproven: HashMap<ReservationId, (End, Parts), RandomState>,
    settled: Newest<(ReservationId, End)>,
    answers: Newest<KeptAnswer>,
}

/// An open reservation.
#[derive(Debug, Clone)]
struct Open {
    expires: Timestamp,
    parts: Parts,
}

/// How a reservation ended, and when.
#[derive(Debug, Clone, Copy)]
struct End {
    how: Settlement,
    at: Timestamp,
}

/// For how long, and how many, answers and settled reservations are remembered.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Remembering {
    pub(crate) window: Duration,
    pub(crate) max: usize,
}

impl Timed for (ReservationId, End) {
    #[inline]
    fn at(&self) -> Timestamp {
        self.1.at
    }
}

impl Timed for KeptAnswer {
    #[inline]
    fn at(&self) -> Timestamp {
        self.at
    }
}

impl Remembering {
    /// Nothing is forgotten: for a look that does not know the engine's configuration.
    pub(crate) const ALL: Self = Self { window: Duration::MAX, max: usize::MAX };

    /// Whether what happened then is forgotten now.
    pub(crate) fn is_over(&self, at: Timestamp, now: Timestamp) -> bool {
        at.saturating_add(self.window) <= now
    }
}

impl Ledger {
    /// Inlined, like what reads and checks events: there are millions, and one that is put down and
    /// picked up again costs more than it was to read.
    #[inline(always)]
    pub(crate) fn apply(&mut self, event: LedgerEvent) {
        match event {
            LedgerEvent::Open { id, expires, parts } => {
                if let Some((end, _)) = self.unproven.remove(&id) {
                    self.settled.push((id, end));
                    return;
                }
                let announced = self.announced.remove(&id).unwrap_or(expires);
                let opened = Open { expires: expires.max(announced), parts };
                self.open.entry(id).or_insert(opened);
            }
            LedgerEvent::Extend { id, expires } => {
                if let Some(open) = self.open.get_mut(&id) {
                    open.expires = expires.max(open.expires);
                } else if !self.unproven.contains_key(&id) {
                    let announced = self.announced.entry(id).or_insert(expires);
                    *announced = expires.max(*announced);
                }
            }
            LedgerEvent::Settle { id, how, at, parts } => {
                let end = End { how, at };
                if self.open.remove(&id).is_some() || parts.is_empty() {
                    self.settled.push((id, end));
                } else {
                    self.announced.remove(&id);
                    self.unproven.insert(id, (end, parts));
                }
            }
            LedgerEvent::Answer(answer) => self.answers.push(answer.into()),
            // Nobody but sinks asks for it.
            LedgerEvent::Recorded(_) => {}
        }
    }

    /// All lanes have been read to their ends: what has not come will not come. A loss of power may
    /// leave the end of a reservation and take its beginning.
    pub(crate) fn end_generation(&mut self) {
        self.announced.clear();
        self.settled.extend(self.unproven.drain().map(|(id, (end, _))| (id, end)));
    }

    /// What was given back without having been taken, were this the end of the generation.
    pub(crate) fn unproven(&self) -> impl Iterator<Item = &Part> {
        self.unproven.values().flat_map(|(_, parts)| parts)
    }

    /// Forgets what is over, and the oldest answers and ends beyond the bound of each. The clock
    /// showed `shown` after all of them had come; `now` may be what it is believed to be.
    pub(crate) fn prune(&mut self, remembering: Remembering, now: Timestamp, shown: Timestamp) {
        self.announced.retain(|_, expires| *expires > now);
        // Before the ends by which it is told that some came too late.
        self.forget_announced();
        self.answers.prune(remembering, now, shown);
        self.settled.prune(remembering, now, shown);
    }

    /// Forgets the oldest answers and ends where there are so many that it pays: while events are
    /// folded there are never many more than twice the bound. What is forgotten here would be in
    /// the end, or the clock was set back since.
    pub(crate) fn bound(&mut self, remembering: Remembering, now: Timestamp, shown: Timestamp) {
        if self.answers.is_bound_due(remembering) {
            self.answers.bound(remembering, now, shown);
        }
        if self.settled.is_bound_due(remembering) {
            // Before the ends by which it is told that some came too late.
            self.forget_announced();
            self.settled.bound(remembering, now, shown);
        }
    }

    /// Those that are open, ascending by id, with when they expire.
    pub(crate) fn open(&self) -> impl Iterator<Item = (ReservationId, Timestamp, &Parts)> {
        let mut open: Vec<_> = self.open.iter().collect();
        open.sort_unstable_by_key(|&(&id, _)| id);
        open.into_iter().map(|(&id, Open { expires, parts })| (id, *expires, parts))
    }

    /// How much of each counter they hold.
    pub(crate) fn reserved(&self) -> HashMap<SumKey, i128> {
        let mut sums = HashMap::new();
        for part in self.open.values().flat_map(|open| &open.parts) {
            *sums.entry(part.key()).or_default() += i128::from(part.amount);
        }
        sums
    }

    /// The counters whose sums something that was reserved is in, or is given back in, while the
    /// other half is still to come.
    pub(crate) fn held(&self) -> HashSet<SumKey> {
        let open = self.open.values().flat_map(|open| &open.parts);
        open.chain(self.unproven()).map(Part::key).collect()
    }

    /// Those that have ended, the earliest first, when the clock shows `now`.
    pub(crate) fn settled(&self, now: Timestamp) -> Vec<(ReservationId, Settlement, Timestamp)> {
        let unproven = self.unproven.iter().map(|(&id, &(end, _))| (id, end));
        let ended = self.settled.iter().copied().chain(unproven);
        let mut settled: Vec<_> = ended.map(|(id, End { how, at })| (id, how, at)).collect();
        settled.sort_unstable_by_key(|&(id, _, at)| (age(at, now), id));
        settled
    }

    /// The answers, the earliest first, when the clock shows `now`. An id may be used again once it
    /// is forgotten: its last answer is the one that counts.
    pub(crate) fn answers(&self, now: Timestamp) -> impl Iterator<Item = Answer> + use<> {
        let mut answers: Vec<_> = self.answers.iter().copied().collect();
        answers.sort_unstable_by_key(|answer| (age(answer.at, now), answer.request));
        answers.into_iter().map(Answer::from)
    }

    /// Events that lead to this state, in no order that means anything. The lists become the
    /// events, as they are: there may be millions.
    pub(crate) fn into_events(self) -> impl Iterator<Item = LedgerEvent> {
        let announced = self.announced().into_iter();
        let announced = announced.map(|(id, expires)| LedgerEvent::Extend { id, expires });
        let Self { open, unproven, settled, answers, .. } = self;
        let mut open: Vec<_> = open.into_iter().collect();
        open.sort_unstable_by_key(|&(id, _)| id);
        let open = open.into_iter().map(|(id, Open { expires, parts })| LedgerEvent::Open {
            id,
            expires,
            parts,
        });
        let mut unproven: Vec<_> = unproven.into_iter().collect();
        unproven.sort_unstable_by_key(|&(id, _)| id);
        let unproven = unproven
            .into_iter()
            .map(|(id, (End { how, at }, parts))| LedgerEvent::Settle { id, how, at, parts });
        let settled = settled.into_items().map(|(id, End { how, at })| LedgerEvent::Settle {
            id,
            how,
            at,
            parts: Parts::new(),
        });
        let answers = answers.into_items().map(|answer| LedgerEvent::Answer(answer.into()));
        open.chain(announced).chain(unproven).chain(settled).chain(answers)
    }

    /// Forgets extensions that change nothing: of reservations that have ended. (And `prune` those
    /// that are over, with which what they extend is over too.) Otherwise one that is read after
    /// the end would be in every snapshot for as long as the engine is open.
    fn forget_announced(&mut self) {
        if self.announced.is_empty() {
            return;
        }
        for (id, _) in self.settled.iter() {
            self.announced.remove(id);
        }
    }

    /// What is announced, ascending by id: but for those whose end came first, with their beginning
    /// before it.
    fn announced(&self) -> Vec<(ReservationId, Timestamp)> {
        let mut announced: Vec<_> = self.announced.iter().map(|(&id, &at)| (id, at)).collect();
        announced.sort_unstable();
        if !announced.is_empty() {
            let ended: HashSet<_> = self.settled.iter().map(|&(id, _)| id).collect();
            announced.retain(|(id, _)| !ended.contains(id));
        }
        announced
    }
}

/// Two are equal when they remember the same.
#[cfg(test)]
impl PartialEq for Ledger {
    fn eq(&self, other: &Self) -> bool {
        let events = |ledger: &Self| {
            let mut ledger = ledger.clone();
            let mut settled: Vec<_> = std::mem::take(&mut ledger.settled).into_items().collect();
            settled.sort_unstable_by_key(|&(id, end)| (id, end.at));
            ledger.settled.extend(settled);
            let mut answers: Vec<_> = std::mem::take(&mut ledger.answers).into_items().collect();
            answers.sort_unstable_by_key(|answer| (answer.request, answer.at));
            ledger.answers.extend(answers);
            ledger.into_events()
        };
        events(self).eq(events(other))
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use proptest::prelude::*;

    use super::super::codec::tests::events;
    use super::super::newest::EXCESS_ALLOWED;
    use super::*;

    fn fold(events: impl IntoIterator<Item = LedgerEvent>) -> Ledger {
        let mut ledger = Ledger::default();
        for event in events {
            ledger.apply(event);
        }
        ledger
    }

    /// What an engine can write: a reservation is opened once and settled once, and a request
    /// answered once at a time.
    fn written(events: Vec<LedgerEvent>) -> Vec<LedgerEvent> {
        let mut seen = std::collections::BTreeSet::new();
        let is_first = |event: &LedgerEvent| match event {
            LedgerEvent::Open { id, .. } => seen.insert((0, id.as_u128(), Timestamp::MIN)),
            // What was given back is left out only once the beginning has come.
            LedgerEvent::Settle { parts, .. } if parts.is_empty() => false,
            LedgerEvent::Settle { id, .. } => seen.insert((1, id.as_u128(), Timestamp::MIN)),
            LedgerEvent::Answer(answer) => seen.insert((2, answer.request, answer.at)),
            LedgerEvent::Extend { .. } | LedgerEvent::Recorded(_) => true,
        };
        let mut events = events;
        let mut is_first = is_first;
        events.retain(|event| is_first(event));
        events
    }

    proptest! {
        #[test]
        fn the_order_of_events_does_not_matter(
            (events, shuffled) in proptest::collection::vec(events(), 0..40)
                .prop_map(written)
                .prop_flat_map(|events| (Just(events.clone()), Just(events).prop_shuffle())),
        ) {
            prop_assert_eq!(fold(events), fold(shuffled));
        }

        #[test]
        fn the_state_s_events_lead_to_it(
            events in proptest::collection::vec(events(), 0..40).prop_map(written),
        ) {
            let ledger = fold(events);
            prop_assert_eq!(fold(ledger.clone().into_events()), ledger);
        }
    }

    fn settled(number: u64, at: u64) -> LedgerEvent {
        let id = ReservationId { generation: 1, number };
        let at = Timestamp::from_unix_millis(at);
        LedgerEvent::Settle { id, how: Settlement::Committed, at, parts: Parts::new() }
    }

    /// What is pruned too early would be open again once its beginning comes.
    #[test]
    fn an_end_is_kept_until_its_beginning_comes_or_can_not_come() {
        let id = ReservationId { generation: 1, number: 1 };
        let (quota, window) = (crate::model::QuotaId(1), crate::model::WindowStart(0));
        let parts: Parts = smallvec::smallvec![Part { user: 1, quota, window, amount: 5 }];
        let (how, at) = (Settlement::Cancelled, Timestamp::MIN);
        let end = LedgerEvent::Settle { id, how, at, parts: parts.clone() };
        let mut ledger = fold([end]);
        let nothing = Remembering { window: Duration::ZERO, max: 0 };
        ledger.prune(nothing, Timestamp::MAX, Timestamp::MAX);
        assert_eq!(ledger.unproven().count(), 1);
        let mut proven = ledger.clone();
        proven.apply(LedgerEvent::Open { id, expires: at, parts });
        assert_eq!((proven.unproven().count(), proven.open().count()), (0, 0));
        for mut ledger in [proven, {
            ledger.end_generation();
            ledger
        }] {
            assert_eq!(ledger.settled(Timestamp::MAX).len(), 1);
            ledger.prune(nothing, Timestamp::MAX, Timestamp::MAX);
            assert_eq!(ledger, Ledger::default());
        }
    }

    #[test]
    fn what_is_over_is_forgotten_and_the_oldest_beyond_the_bound() {
        let id = ReservationId { generation: 1, number: 9 };
        let expires = Timestamp::from_unix_millis(100);
        let mut ledger = fold((1..=4).map(|number| settled(number, number)));
        ledger.apply(LedgerEvent::Extend { id, expires });
        let remembering = Remembering { window: Duration::from_millis(10), max: 2 };
        ledger.prune(remembering, Timestamp::from_unix_millis(11), Timestamp::MAX);
        let kept = |ledger: &Ledger| {
            let settled = ledger.settled(Timestamp::MAX).into_iter();
            settled.map(|(id, ..)| id.number).collect::<Vec<_>>()
        };
        assert_eq!(kept(&ledger), [3, 4]);
        assert_eq!(ledger.announced(), [(id, expires)]);
        ledger.prune(remembering, Timestamp::from_unix_millis(13), Timestamp::MAX);
        ledger.end_generation();
        assert_eq!(kept(&ledger), [4]);
        assert!(ledger.announced().is_empty());
    }

    /// An extension is read after the end, when that lies in a lane that is read before.
    #[test]
    fn an_extension_that_comes_after_the_end_changes_nothing() {
        let id = ReservationId { generation: 1, number: 1 };
        let (quota, window) = (crate::model::QuotaId(1), crate::model::WindowStart(0));
        let parts: Parts = smallvec::smallvec![Part { user: 1, quota, window, amount: 5 }];
        let [expires, later] = [10, 20].map(Timestamp::from_unix_millis);
        let open = LedgerEvent::Open { id, expires, parts: parts.clone() };
        let extend = LedgerEvent::Extend { id, expires: later };
        let end = LedgerEvent::Settle { id, how: Settlement::Committed, at: expires, parts };
        let settled = fold([open.clone(), end.clone()]);
        for order in [[&open, &end, &extend], [&end, &extend, &open], [&extend, &end, &open]] {
            assert_eq!(fold(order.into_iter().cloned()), settled);
        }
        let extended = fold([extend, open]);
        assert_eq!(extended.open().map(|(_, expires, _)| expires).collect::<Vec<_>>(), [later]);
    }

    /// It once stayed in every snapshot until the engine was closed: nothing comes after an end
    /// that would take it away.
    #[test]
    fn an_extension_that_comes_after_the_end_is_forgotten_with_it() {
        let id = ReservationId { generation: 1, number: 1 };
        let (quota, window) = (crate::model::QuotaId(1), crate::model::WindowStart(0));
        let parts: Parts = smallvec::smallvec![Part { user: 1, quota, window, amount: 5 }];
        let [expires, at, later] = [10, 20, 1000].map(Timestamp::from_unix_millis);
        let open = LedgerEvent::Open { id, expires, parts: parts.clone() };
        let end = LedgerEvent::Settle { id, how: Settlement::Committed, at, parts };
        let extend = LedgerEvent::Extend { id, expires: later };
        let remembering = Remembering { window: Duration::from_millis(10), max: 9 };

        let mut ledger = fold([open.clone(), end.clone(), extend.clone()]);
        ledger.prune(remembering, Timestamp::from_unix_millis(30), Timestamp::MAX);
        assert_eq!(ledger.clone().into_events().count(), 0, "{ledger:?}");

        // The end may be forgotten before the lane that extends is read: then until it is over.
        let mut ledger = fold([open, end]);
        ledger.prune(remembering, Timestamp::from_unix_millis(30), Timestamp::MAX);
        ledger.apply(extend);
        ledger.prune(remembering, Timestamp::from_unix_millis(999), Timestamp::MAX);
        assert_eq!(ledger.announced(), [(id, later)]);
        ledger.prune(remembering, later, Timestamp::MAX);
        assert_eq!(ledger.clone().into_events().count(), 0, "{ledger:?}");
    }

    /// All answers and ends of a journal were once held at once: gigabytes, where its share of a
    /// large snapshot was long.
    #[test]
    fn while_events_are_folded_there_are_not_many_more_than_are_kept() {
        let now = Timestamp::from_unix_millis(50_000);
        for remembering in [
            Remembering { window: Duration::from_secs(30), max: 100 },
            Remembering { window: Duration::from_secs(1), max: 100 },
            Remembering { window: Duration::from_secs(30), max: usize::MAX },
        ] {
            let (mut bounded, mut whole) = (Ledger::default(), Ledger::default());
            let mut longest = 0;
            for number in 0..20_000 {
                // Not in order, and two at a time.
                let at = 30_000 + (number * 7919) % 10_000;
                let event = if number % 3 == 0 {
                    settled(number, at)
                } else {
                    LedgerEvent::Answer(answer(u128::from(number), at))
                };
                whole.apply(event.clone());
                bounded.apply(event);
                bounded.bound(remembering, now, Timestamp::MAX);
                longest = longest.max(bounded.answers.len()).max(bounded.settled.len());
            }
            let most = if remembering.max == 100 { 2 * 100 + EXCESS_ALLOWED } else { 20_000 };
            assert!(longest <= most && whole.answers.len() > 13_000, "{longest}");
            whole.prune(remembering, now, Timestamp::MAX);
            bounded.prune(remembering, now, Timestamp::MAX);
            assert_eq!(bounded, whole, "{remembering:?}");
        }
    }

    /// Of many at the same time all were once forgotten where only one was too many, and a request
    /// counted twice after a recovery.
    #[test]
    fn of_what_came_at_the_same_time_only_the_excess_is_forgotten() {
        let times = [7, 5, 7, 7, 6, 7, 5, 8];
        for max in 0..=times.len() {
            let mut ledger =
                fold((1..).zip(times).map(|(id, at)| LedgerEvent::Answer(answer(id, at))));
            for (number, at) in (1..).zip(times) {
                ledger.apply(settled(number, at));
            }
            let window = Duration::from_secs(10);
            ledger.prune(
                Remembering { window, max },
                Timestamp::from_unix_millis(8),
                Timestamp::MAX,
            );
            // From the earliest on, and in the order in which they came.
            let newest = &[2, 7, 5, 1, 3, 4, 6, 8][times.len() - max..];
            let answers: Vec<_> = ledger.answers(Timestamp::MAX).collect();
            let requests = answers.iter().map(|answer| answer.request);
            assert!(requests.eq(newest.iter().map(|&id| u128::from(id))), "of {max}: {answers:?}");
            let ends: Vec<_> =
                ledger.settled(Timestamp::MAX).iter().map(|(id, ..)| id.number).collect();
            assert_eq!(ends, newest, "of {max}");
        }
    }

    fn answer(request: u128, at: u64) -> Answer {
        Answer {
            request,
            asked: super::super::Asked::Consume,
            is_admitted: true,
            user: 1,
            quota: crate::model::QuotaId(1),
            window: crate::model::WindowStart(0),
            amount: 1,
            used: at,
            limit: 9,
            at: Timestamp::from_unix_millis(at),
            reservation: None,
        }
    }

    #[test]
    fn of_an_id_s_answers_the_last_counts() {
        let answers = [answer(1, 5), answer(2, 1), answer(1, 3)];
        let ledger = fold(answers.map(LedgerEvent::Answer));
        let kept = fold(ledger.clone().into_events());
        for ledger in [ledger, kept] {
            assert_eq!(ledger.answers(Timestamp::MAX).last(), Some(answer(1, 5)));
        }
    }
}
