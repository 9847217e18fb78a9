//! The events of a batch, on their way to its bytes.
//!
//! Where the end of a reservation of one counter follows its beginning in the same batch, the batch
//! says only how it ended: what was reserved and what was given back are both in its sums.
//! Reservations that do not last then cost the journal, and the merge that reads it, much less.

use crate::ledger::{Answer, EventWriter, LedgerEvent, Part, Parts, Settlement, open_bytes_max};
use crate::model::{QuotaId, ReservationId, Timestamp, WindowStart};
use crate::wal::operation::EventVisitor;

/// So many reservations wait for their ends. A power of two: threads number theirs in a row, each
/// in a block of its own.
const PLACES: usize = 1 << 10;

/// Events in no order that means anything, as a batch has them.
#[derive(Debug, Default)]
pub(super) struct BatchEvents {
    written: EventWriter,
    /// Reservations of one counter that are not in `written` yet, by their numbers; no places
    /// before the first.
    opened: Vec<Opened>,
    /// How many those are.
    opened_count: usize,
}

/// No reservation where nothing is reserved.
#[derive(Debug, Clone, Copy)]
struct Opened {
    id: ReservationId,
    expires: Timestamp,
    part: Part,
}

impl Opened {
    const NONE: Self = Self {
        id: ReservationId { generation: 0, number: 0 },
        expires: Timestamp::MIN,
        part: Part { user: 0, quota: QuotaId(0), window: WindowStart(0), amount: 0 },
    };

    #[inline(always)]
    fn is_there(&self) -> bool {
        self.part.amount > 0
    }

    fn into_event(self) -> LedgerEvent {
        let Self { id, expires, part } = self;
        LedgerEvent::Open { id, expires, parts: Parts::from_buf([part]) }
    }
}

impl EventVisitor for BatchEvents {
    #[inline(always)]
    fn open(&mut self, id: ReservationId, expires: Timestamp, part: Part) {
        if self.opened.is_empty() {
            self.opened = vec![Opened::NONE; PLACES];
        }
        // One that takes its place makes another wait no longer.
        if self.opened[Self::place(id)].is_there() {
            self.put_opened(Self::place(id));
        }
        self.opened[Self::place(id)] = Opened { id, expires, part };
        self.opened_count += 1;
    }

    #[inline(always)]
    fn settle(&mut self, id: ReservationId, how: Settlement, at: Timestamp, part: Part) {
        let given_back = if self.take(id) { &[][..] } else { &[part] };
        self.written.put_end(id, how, at, given_back);
    }

    #[inline(always)]
    fn answer(&mut self, answer: Answer) {
        self.written.put_answer(&answer);
    }

    #[inline(always)]
    fn event(&mut self, event: LedgerEvent) {
        match event {
            LedgerEvent::Extend { id, expires } if let Some(opened) = self.find(id) => {
                opened.expires = expires.max(opened.expires);
            }
            LedgerEvent::Settle { id, how, at, .. } if self.take(id) => {
                self.written.put_end(id, how, at, &[]);
            }
            _ => self.written.put(&event),
        }
    }
}

impl BatchEvents {
    /// A reservation that waits for its end.
    #[inline(always)]
    fn find(&mut self, id: ReservationId) -> Option<&mut Opened> {
        self.opened.get_mut(Self::place(id)).filter(|opened| opened.id == id && opened.is_there())
    }

    #[expect(clippy::cast_possible_truncation, reason = "the lower bits are meant")]
    fn place(id: ReservationId) -> usize {
        id.number as usize % PLACES
    }

    /// Takes a reservation that has ended out, if it waits for that.
    #[inline(always)]
    fn take(&mut self, id: ReservationId) -> bool {
        let Some(opened) = self.find(id) else { return false };
        opened.part.amount = 0;
        self.opened_count -= 1;
        true
    }

    /// Writes the reservation at a place, which waits no longer.
    fn put_opened(&mut self, place: usize) {
        let opened = std::mem::replace(&mut self.opened[place], Opened::NONE);
        self.opened_count -= 1;
        self.written.put(&opened.into_event());
    }

    /// The events take no more bytes of a batch than that.
    pub(super) fn bytes_max(&self) -> usize {
        self.written.bytes().len() + self.opened_count * open_bytes_max(1)
    }

    /// Their bytes. Nothing waits for its end any longer.
    pub(super) fn finish(&mut self) -> &[u8] {
        if self.opened_count > 0 {
            for place in 0..self.opened.len() {
                if self.opened[place].is_there() {
                    self.put_opened(place);
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

    /// As an operation tells it.
    fn add(events: &mut BatchEvents, event: LedgerEvent) {
        match event {
            LedgerEvent::Open { id, expires, parts } if let [part] = parts[..] => {
                events.open(id, expires, part);
            }
            LedgerEvent::Settle { id, how, at, parts } if let [part] = parts[..] => {
                events.settle(id, how, at, part);
            }
            event => events.event(event),
        }
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
                    add(&mut events, event);
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
        [open(0), open(6), extend(6), settle(0)]
            .into_iter()
            .for_each(|event| add(&mut events, event));
        let LedgerEvent::Settle { id, how, at, .. } = settle(0) else { panic!() };
        let ended = LedgerEvent::Settle { id, how, at, parts: Parts::new() };
        let LedgerEvent::Open { id, parts, .. } = open(6) else { panic!() };
        let LedgerEvent::Extend { expires, .. } = extend(6) else { panic!() };
        let opened = LedgerEvent::Open { id, expires, parts };
        assert_eq!(decoded(&mut events), [ended, opened]);
        // In the next batch it has no beginning.
        events.clear();
        add(&mut events, settle(6));
        assert_eq!(decoded(&mut events), [settle(6)]);
    }
}
