//! The events of a batch, on their way to its bytes.
//!
//! Where the end of a reservation follows its beginning in the same batch, the batch says only how
//! it ended: what was reserved and what was given back are both in its sums. Reservations that do
//! not last then cost the journal, and the merge that reads it, much less.

use crate::ledger::{EventWriter, LedgerEvent, Parts, open_bytes_max};
use crate::model::{ReservationId, Timestamp};

/// So many reservations wait for their ends. A power of two: threads number theirs in a row, each
/// in a block of its own.
const PLACES: usize = 1 << 10;

/// Events in no order that means anything, as a batch has them.
#[derive(Debug, Default)]
pub(super) struct BatchEvents {
    written: EventWriter,
    /// Reservations that are not in `written` yet, by their numbers; no places before the first.
    opened: Vec<Option<Opened>>,
    /// What those would add to `written` at most.
    opened_bytes_max: usize,
}

#[derive(Debug)]
struct Opened {
    id: ReservationId,
    expires: Timestamp,
    parts: Parts,
}

impl Opened {
    fn bytes_max(&self) -> usize {
        open_bytes_max(self.parts.len())
    }

    fn into_event(self) -> LedgerEvent {
        let Self { id, expires, parts } = self;
        LedgerEvent::Open { id, expires, parts }
    }
}

impl BatchEvents {
    /// Inlined where the event is made, so that it does not go through memory.
    #[inline(always)]
    pub(super) fn add(&mut self, event: LedgerEvent) {
        match event {
            LedgerEvent::Open { id, expires, parts } => self.open(Opened { id, expires, parts }),
            LedgerEvent::Extend { id, expires } => match self.find(id) {
                Some(Some(opened)) => opened.expires = expires.max(opened.expires),
                _ => self.written.put(&event),
            },
            LedgerEvent::Settle { id, how, at, .. } => match self.find(id).and_then(Option::take) {
                Some(opened) => {
                    self.opened_bytes_max -= opened.bytes_max();
                    let parts = Parts::new();
                    self.written.put(&LedgerEvent::Settle { id, how, at, parts });
                }
                None => self.written.put(&event),
            },
            LedgerEvent::Answer(_) | LedgerEvent::Recorded(_) => self.written.put(&event),
        }
    }

    /// The place of a reservation, where it is in it.
    fn find(&mut self, id: ReservationId) -> Option<&mut Option<Opened>> {
        let place = self.opened.get_mut(Self::place(id))?;
        place.as_ref().is_some_and(|opened| opened.id == id).then_some(place)
    }

    #[expect(clippy::cast_possible_truncation, reason = "the lower bits are meant")]
    fn place(id: ReservationId) -> usize {
        id.number as usize % PLACES
    }

    fn open(&mut self, opened: Opened) {
        if self.opened.is_empty() {
            self.opened.resize_with(PLACES, || None);
        }
        self.opened_bytes_max += opened.bytes_max();
        // One that takes its place makes another wait no longer.
        let before = self.opened[Self::place(opened.id)].replace(opened);
        if let Some(before) = before {
            self.put(before);
        }
    }

    fn put(&mut self, opened: Opened) {
        self.opened_bytes_max -= opened.bytes_max();
        self.written.put(&opened.into_event());
    }

    /// The events take no more bytes of a batch than that.
    pub(super) fn bytes_max(&self) -> usize {
        self.written.bytes().len() + self.opened_bytes_max
    }

    /// Their bytes. Nothing waits for its end any longer.
    pub(super) fn finish(&mut self) -> &[u8] {
        if self.opened_bytes_max > 0 {
            for place in 0..self.opened.len() {
                if let Some(opened) = self.opened[place].take() {
                    self.put(opened);
                }
            }
        }
        self.written.bytes()
    }

    pub(super) fn clear(&mut self) {
        self.written.clear();
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ledger::{Events, Ledger, Part, Settlement};
    use crate::model::{QuotaId, WindowStart};

    const AT: Timestamp = Timestamp::from_unix_millis(5);

    /// Two generations, and numbers of which some share a place.
    fn id(which: u64) -> ReservationId {
        ReservationId { generation: which % 2, number: which / 2 % 3 * PLACES as u64 + which / 6 }
    }

    fn part(amount: u64) -> Part {
        Part { user: 1, quota: QuotaId(1), window: WindowStart(0), amount }
    }

    fn open(which: u64) -> LedgerEvent {
        let parts = (1..=which % 3 + 1).map(part).collect();
        LedgerEvent::Open { id: id(which), expires: AT, parts }
    }

    fn settle(which: u64) -> LedgerEvent {
        let (how, parts) = (Settlement::Cancelled, (1..=which % 3 + 1).map(part).collect());
        LedgerEvent::Settle { id: id(which), how, at: AT, parts }
    }

    fn extend(which: u64) -> LedgerEvent {
        let expires = Timestamp::from_unix_millis(100 + which);
        LedgerEvent::Extend { id: id(which), expires }
    }

    fn decoded(events: &mut BatchEvents) -> Vec<LedgerEvent> {
        let mut bytes = Events::new(events.finish());
        std::iter::from_fn(|| bytes.next_event().unwrap()).collect()
    }

    proptest! {
        /// Whichever events of which batches come in which order, as lanes may bring them: all of
        /// them lead to what the batches lead to.
        #[test]
        fn a_batch_leads_to_what_its_events_lead_to(
            batches in Just((0..18).flat_map(|which| [open(which), extend(which), settle(which)])
                .collect::<Vec<_>>())
                .prop_shuffle()
                .prop_flat_map(|all| (0..=all.len(), 0..=all.len(), Just(all)))
                .prop_map(|(one, other, all)| {
                    let (first, second) = (one.min(other), one.max(other));
                    [all[..first].to_vec(), all[first..second].to_vec(), all[second..].to_vec()]
                }),
        ) {
            let (mut direct, mut folded) = (Ledger::default(), Ledger::default());
            let mut events = BatchEvents::default();
            for batch in batches {
                for event in batch {
                    direct.apply(event.clone());
                    events.add(event);
                }
                let bytes_max = events.bytes_max();
                prop_assert!(events.finish().len() <= bytes_max);
                prop_assert_eq!(events.bytes_max(), events.finish().len());
                decoded(&mut events).into_iter().for_each(|event| folded.apply(event));
                prop_assert_eq!(&folded, &direct);
                events.clear();
            }
        }
    }

    #[test]
    fn a_reservation_that_ends_in_its_batch_is_one_event_without_parts() {
        let mut events = BatchEvents::default();
        [open(0), open(6), extend(6), settle(0)].into_iter().for_each(|event| events.add(event));
        let LedgerEvent::Settle { id, how, at, .. } = settle(0) else { panic!() };
        let ended = LedgerEvent::Settle { id, how, at, parts: Parts::new() };
        let LedgerEvent::Open { id, parts, .. } = open(6) else { panic!() };
        let LedgerEvent::Extend { expires, .. } = extend(6) else { panic!() };
        let opened = LedgerEvent::Open { id, expires, parts };
        assert_eq!(decoded(&mut events), [ended, opened]);
        // In the next batch it has no beginning.
        events.clear();
        events.add(settle(6));
        assert_eq!(decoded(&mut events), [settle(6)]);
    }
}
