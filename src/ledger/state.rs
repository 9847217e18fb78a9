//! Events folded.
//!
//! Lanes are drained one after the other, so a reservation may be settled in one batch and opened
//! in a later one. The fold does not care: what it yields does not depend on the order of the
//! events.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Answer, LedgerEvent, Part, Settlement};
use crate::model::{ReservationId, Timestamp};

/// What is remembered after the last event.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Ledger {
    reservations: BTreeMap<ReservationId, Held>,
    answers: BTreeMap<u128, Answer>,
}

/// A reservation.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Held {
    /// Extended, but not opened yet: the lane that says so is still to be read.
    Announced {
        expires: Timestamp,
    },
    Open {
        expires: Timestamp,
        parts: Vec<Part>,
    },
    Settled {
        how: Settlement,
        at: Timestamp,
        /// What was given back, until it is known that it had been taken.
        unproven: Vec<Part>,
    },
}

/// For how long, and how many, answers and settled reservations are remembered.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Remembering {
    pub(crate) window: Duration,
    pub(crate) max: usize,
}

impl Remembering {
    /// Whether what happened then is forgotten now.
    pub(crate) fn is_over(&self, at: Timestamp, now: Timestamp) -> bool {
        at.saturating_add(self.window) <= now
    }
}

impl Ledger {
    pub(crate) fn apply(&mut self, event: LedgerEvent) {
        match event {
            LedgerEvent::Open { id, expires, parts } => {
                let held = self.reservations.entry(id).or_insert(Held::Announced { expires });
                match held {
                    Held::Announced { expires: announced } => {
                        *held = Held::Open { expires: expires.max(*announced), parts };
                    }
                    Held::Settled { unproven, .. } => unproven.clear(),
                    Held::Open { .. } => {}
                }
            }
            LedgerEvent::Extend { id, expires: extended } => {
                let announced = Held::Announced { expires: extended };
                match self.reservations.entry(id).or_insert(announced) {
                    Held::Announced { expires } | Held::Open { expires, .. } => {
                        *expires = extended.max(*expires);
                    }
                    Held::Settled { .. } => {}
                }
            }
            LedgerEvent::Settle { id, how, at, parts } => {
                let is_proven = matches!(self.reservations.get(&id), Some(Held::Open { .. }));
                let unproven = if is_proven { Vec::new() } else { parts };
                self.reservations.insert(id, Held::Settled { how, at, unproven });
            }
            LedgerEvent::Answer(answer) => {
                let known = self.answers.entry(answer.request).or_insert(answer);
                // An id may be used again once it is forgotten.
                if known.at < answer.at {
                    *known = answer;
                }
            }
            // Nobody but sinks asks for it.
            LedgerEvent::Recorded(_) => {}
        }
    }

    /// All lanes have been read to their ends: what has not come will not come. A loss of power may
    /// leave the end of a reservation and take its beginning.
    pub(crate) fn end_generation(&mut self) {
        self.reservations.retain(|_, held| !matches!(held, Held::Announced { .. }));
        for held in self.reservations.values_mut() {
            if let Held::Settled { unproven, .. } = held {
                unproven.clear();
            }
        }
    }

    /// What was given back without having been taken, were this the end of the generation.
    pub(crate) fn unproven(&self) -> impl Iterator<Item = &Part> {
        self.reservations.values().flat_map(|held| match held {
            Held::Settled { unproven, .. } => &unproven[..],
            _ => &[],
        })
    }

    /// Forgets what is over, and the oldest beyond the bound.
    pub(crate) fn prune(&mut self, remembering: Remembering, now: Timestamp) {
        self.reservations.retain(|_, held| match held {
            Held::Settled { at, unproven, .. } => {
                !unproven.is_empty() || !remembering.is_over(*at, now)
            }
            _ => true,
        });
        self.answers.retain(|_, answer| !remembering.is_over(answer.at, now));
        let settled = self.reservations.values().filter_map(|held| match held {
            Held::Settled { at, .. } => Some(*at),
            _ => None,
        });
        let mut times: Vec<_> =
            self.answers.values().map(|answer| answer.at).chain(settled).collect();
        let Some(excess) = times.len().checked_sub(remembering.max).filter(|&n| n > 0) else {
            return;
        };
        let (_, &mut newest_forgotten, _) = times.select_nth_unstable(excess - 1);
        self.answers.retain(|_, answer| answer.at > newest_forgotten);
        self.reservations.retain(|_, held| match held {
            Held::Settled { at, unproven, .. } => !unproven.is_empty() || *at > newest_forgotten,
            _ => true,
        });
    }

    /// Those that are open, with when they expire.
    pub(crate) fn open(&self) -> impl Iterator<Item = (ReservationId, Timestamp, &[Part])> {
        self.reservations.iter().filter_map(|(&id, held)| match held {
            Held::Open { expires, parts } => Some((id, *expires, &parts[..])),
            _ => None,
        })
    }

    /// Those that have ended, the earliest first.
    pub(crate) fn settled(&self) -> Vec<(ReservationId, Settlement, Timestamp)> {
        let settled = self.reservations.iter().filter_map(|(&id, held)| match *held {
            Held::Settled { how, at, .. } => Some((id, how, at)),
            _ => None,
        });
        let mut settled: Vec<_> = settled.collect();
        settled.sort_unstable_by_key(|&(id, _, at)| (at, id));
        settled
    }

    /// The answers, the earliest first.
    pub(crate) fn answers(&self) -> Vec<Answer> {
        let mut answers: Vec<_> = self.answers.values().copied().collect();
        answers.sort_unstable_by_key(|answer| (answer.at, answer.request));
        answers
    }

    /// Events that lead to this state.
    pub(crate) fn events(&self) -> impl Iterator<Item = LedgerEvent> {
        let reservations = self.reservations.iter().map(|(&id, held)| match held {
            &Held::Announced { expires } => LedgerEvent::Extend { id, expires },
            Held::Open { expires, parts } => {
                LedgerEvent::Open { id, expires: *expires, parts: parts.clone() }
            }
            Held::Settled { how, at, unproven } => {
                LedgerEvent::Settle { id, how: *how, at: *at, parts: unproven.clone() }
            }
        });
        reservations.chain(self.answers.values().copied().map(LedgerEvent::Answer))
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use proptest::prelude::*;

    use super::super::codec::tests::events;
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
            prop_assert_eq!(fold(ledger.events()), ledger);
        }
    }

    fn settled(number: u64, at: u64) -> LedgerEvent {
        let id = ReservationId { generation: 1, number };
        let at = Timestamp::from_unix_millis(at);
        LedgerEvent::Settle { id, how: Settlement::Committed, at, parts: Vec::new() }
    }

    /// What is pruned too early would be open again once its beginning comes.
    #[test]
    fn an_end_is_kept_until_its_beginning_comes_or_can_not_come() {
        let id = ReservationId { generation: 1, number: 1 };
        let (quota, window) = (crate::model::QuotaId(1), crate::model::WindowStart(0));
        let parts = vec![Part { user: 1, quota, window, amount: 5 }];
        let (how, at) = (Settlement::Cancelled, Timestamp::MIN);
        let end = LedgerEvent::Settle { id, how, at, parts: parts.clone() };
        let mut ledger = fold([end]);
        let nothing = Remembering { window: Duration::ZERO, max: 0 };
        ledger.prune(nothing, Timestamp::MAX);
        assert_eq!(ledger.unproven().count(), 1);
        let mut proven = ledger.clone();
        proven.apply(LedgerEvent::Open { id, expires: at, parts });
        assert_eq!((proven.unproven().count(), proven.open().count()), (0, 0));
        for mut ledger in [proven, {
            ledger.end_generation();
            ledger
        }] {
            assert_eq!(ledger.settled().len(), 1);
            ledger.prune(nothing, Timestamp::MAX);
            assert_eq!(ledger, Ledger::default());
        }
    }

    #[test]
    fn what_is_over_is_forgotten_and_the_oldest_beyond_the_bound() {
        let id = ReservationId { generation: 1, number: 9 };
        let mut ledger = fold((1..=4).map(|number| settled(number, number)));
        ledger.apply(LedgerEvent::Extend { id, expires: Timestamp::MIN });
        let remembering = Remembering { window: Duration::from_millis(10), max: 2 };
        ledger.prune(remembering, Timestamp::from_unix_millis(11));
        let kept: Vec<_> = ledger.reservations.keys().map(|id| id.number).collect();
        assert_eq!(kept, [3, 4, 9]);
        ledger.prune(remembering, Timestamp::from_unix_millis(13));
        ledger.end_generation();
        let kept: Vec<_> = ledger.reservations.keys().map(|id| id.number).collect();
        assert_eq!(kept, [4]);
    }
}
