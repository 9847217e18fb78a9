//! The records of one operation: what it added, and what must be remembered. Pure.

use crate::ledger::{Answer, LedgerEvent, Part, Parts, Recorded, Settlement};
use crate::model::{QuotaId, ReservationId, Timestamp};
use crate::wal::payload;
use crate::wal::record::{Item, Record, Verified};

/// What an operation wrote, read back; kept for its memory.
#[derive(Debug, Clone, Default)]
pub(crate) struct Operation {
    slots: Vec<Verified>,
}

/// Takes what must be remembered of operations. Most reservations are of one counter, and are told
/// by themselves: an event with a list of counters goes through memory on its way, and whoever
/// takes it waits for it there.
pub(crate) trait EventVisitor {
    /// A reservation of one counter was opened.
    fn open(&mut self, id: ReservationId, expires: Timestamp, part: Part);

    /// A reservation of one counter has ended, and this was given back.
    fn settle(&mut self, id: ReservationId, how: Settlement, at: Timestamp, part: Part);

    /// Anything else.
    fn event(&mut self, event: LedgerEvent);
}

/// Makes an event of each.
struct AsEvents<F>(F);

impl<F: FnMut(LedgerEvent)> EventVisitor for AsEvents<F> {
    fn open(&mut self, id: ReservationId, expires: Timestamp, part: Part) {
        self.0(LedgerEvent::Open { id, expires, parts: Parts::from_buf([part]) });
    }

    fn settle(&mut self, id: ReservationId, how: Settlement, at: Timestamp, part: Part) {
        self.0(LedgerEvent::Settle { id, how, at, parts: Parts::from_buf([part]) });
    }

    fn event(&mut self, event: LedgerEvent) {
        self.0(event);
    }
}

/// How reading an operation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reading {
    /// It is complete.
    Complete,
    /// Only this many of its first records are there, and the next is not: its writer died.
    CutShort(u64),
}

impl Operation {
    /// Reads the operation that begins with record `number`.
    #[inline]
    pub(crate) fn read(&mut self, number: u64, slot: impl Fn(u64) -> Option<Verified>) -> Reading {
        self.slots.clear();
        let (mut next, mut expected) = (Some(number), None);
        while let Some(slot) = next.and_then(&slot) {
            let following = slot.following();
            if expected.is_some_and(|expected| expected != following) {
                break;
            }
            self.slots.push(slot);
            if following == 0 {
                return Reading::Complete;
            }
            expected = Some(following - 1);
            next = next.and_then(|number| number.checked_add(1));
        }
        Reading::CutShort(self.len())
    }

    /// How many records it takes.
    pub(crate) fn len(&self) -> u64 {
        self.slots.len() as u64
    }

    #[inline(always)]
    fn items(&self) -> impl DoubleEndedIterator<Item = Item> {
        self.slots.iter().filter_map(|slot| slot.item())
    }

    /// What it added to the sums.
    #[inline(always)]
    pub(crate) fn adds(&self) -> impl Iterator<Item = Record> {
        self.slots.iter().filter_map(|slot| slot.add())
    }

    /// The quotas that it is about, some of them more than once.
    pub(crate) fn quotas(&self) -> impl Iterator<Item = QuotaId> {
        self.items().filter_map(|item| match item {
            Item::Add(Record { quota, .. }) | Item::Refusal { quota, .. } => Some(quota),
            _ => None,
        })
    }

    /// Visits what must be remembered of it. What no operation writes yields nothing.
    pub(crate) fn for_each_event(&self, visit: impl FnMut(LedgerEvent)) {
        self.visit_events(&mut AsEvents(visit));
    }

    /// [`for_each_event`](Self::for_each_event), where there are many.
    #[inline(always)]
    pub(crate) fn visit_events(&self, events: &mut impl EventVisitor) {
        let mut opened = None;
        let mut request = None;
        // Adds are most of it.
        for slot in self.slots.iter().filter(|slot| slot.add().is_none()) {
            let Some(item) = slot.item() else { continue };
            match item {
                Item::Add(_) | Item::Refusal { .. } => {}
                Item::Open { id, expires } => {
                    let mut parts = self.adds().filter_map(part);
                    let Some(first) = parts.next() else { continue };
                    opened = Some(id);
                    match parts.next() {
                        None => events.open(id, expires, first),
                        Some(_) => {
                            let parts = self.adds().filter_map(part).collect();
                            events.event(LedgerEvent::Open { id, expires, parts });
                        }
                    }
                }
                Item::Extend { id, expires } => events.event(LedgerEvent::Extend { id, expires }),
                Item::Settle { id, how, at } => {
                    let mut parts = self.adds().filter_map(given_back);
                    match (parts.next(), parts.next()) {
                        (Some(part), None) => events.settle(id, how, at, part),
                        _ => {
                            let parts = self.adds().filter_map(given_back).collect();
                            events.event(LedgerEvent::Settle { id, how, at, parts });
                        }
                    }
                }
                Item::Request { id, asked, at } => request = Some((id, asked, at)),
                Item::Answer { used, limit } => {
                    let Some((request, asked, at)) = request else { continue };
                    let Some((subject, is_admitted)) = self.subject() else { continue };
                    let Part { user, quota, window, amount } = subject;
                    events.event(LedgerEvent::Answer(Answer {
                        request,
                        asked,
                        is_admitted,
                        user,
                        quota,
                        window,
                        amount,
                        used,
                        limit,
                        at,
                        reservation: opened,
                    }));
                }
                // They come last.
                Item::Payload(_) => {
                    let recorded = self.recorded();
                    return recorded
                        .into_iter()
                        .map(LedgerEvent::Recorded)
                        .for_each(|event| events.event(event));
                }
            }
        }
    }

    /// The event that was recorded.
    fn recorded(&self) -> Option<Recorded> {
        let Some(Item::Payload(_)) = self.items().next_back() else { return None };
        let Some(Item::Add(Record { user, quota, .. })) = self.items().next() else { return None };
        Some(Recorded { user, quota, payload: payload::joined(self.items())? })
    }

    /// What was asked about, and whether it was admitted.
    #[inline(always)]
    fn subject(&self) -> Option<(Part, bool)> {
        let first = self.slots.first()?;
        if let Some(record) = first.add() {
            return part(record).map(|part| (part, true));
        }
        match first.item()? {
            Item::Refusal { user, quota, window, amount } => {
                Some((Part { user, quota, window, amount }, false))
            }
            _ => None,
        }
    }
}

/// What is reserved by an add.
#[inline(always)]
fn part(record: Record) -> Option<Part> {
    let Record { user, quota, window, delta } = record;
    let amount = u64::try_from(delta).ok().filter(|&amount| amount > 0)?;
    Some(Part { user, quota, window, amount })
}

/// What is given back by an add.
#[inline(always)]
fn given_back(record: Record) -> Option<Part> {
    part(Record { delta: record.delta.checked_neg()?, ..record })
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;
    use crate::ledger::Asked;
    use crate::model::WindowStart;
    use crate::wal::record::Seal;

    const ID: ReservationId = ReservationId { generation: 2, number: 7 };
    const AT: Timestamp = Timestamp::from_unix_millis(5);

    fn add(user: u64, delta: i64) -> Item {
        Item::Add(Record { user, quota: QuotaId(1), window: WindowStart(0), delta })
    }

    fn operation(items: &[Item]) -> Operation {
        let mut operation = Operation::default();
        assert_eq!(operation.read(0, decode(items.to_vec())), Reading::Complete);
        operation
    }

    fn decode(items: Vec<Item>) -> impl Fn(u64) -> Option<Verified> {
        let seal = Seal::sure(1);
        move |number| {
            let index = usize::try_from(number).ok()?;
            let following = u8::try_from(items.len().checked_sub(index + 1)?).ok()?;
            let slot = seal.encode_item(number, items.get(index)?, following);
            seal.verified(number, &slot)
        }
    }

    #[test]
    fn an_operation_is_complete_or_cut_short() {
        let items = vec![add(1, 1), add(2, 1), Item::Open { id: ID, expires: AT }];
        let whole = decode(items.clone());
        let mut operation = Operation::default();
        assert_eq!(operation.read(0, &whole), Reading::Complete);
        assert!(operation.items().eq(items));
        for missing in 0..3 {
            let cut = |number| whole(number).filter(|_| number != missing);
            assert_eq!(operation.read(0, cut), Reading::CutShort(missing));
        }
        // A record of another operation does not complete it.
        let other = |number| whole(if number == 1 { 2 } else { number });
        assert_eq!(operation.read(0, other), Reading::CutShort(1));
        assert_eq!(operation.read(u64::MAX, |_| whole(0)), Reading::CutShort(1));
    }

    #[test]
    fn what_is_remembered_follows_from_the_records() {
        let events = |items: &[Item]| {
            let mut events = Vec::new();
            operation(items).for_each_event(|event| events.push(event));
            events
        };
        assert_eq!(events(&[add(1, 3), add(2, 4)]), []);
        let open = Item::Open { id: ID, expires: AT };
        let opened = events(&[add(1, 3), add(2, 4), open]);
        let [LedgerEvent::Open { id: ID, expires: AT, parts }] = &opened[..] else {
            panic!("{opened:?}")
        };
        let parts: Vec<_> = parts.iter().map(|part| (part.user, part.amount)).collect();
        assert_eq!(parts, [(1, 3), (2, 4)]);
        let (how, at) = (Settlement::Expired, AT);
        let settled = events(&[add(1, -3), add(1, 2), Item::Settle { id: ID, how, at }]);
        let [LedgerEvent::Settle { id: ID, parts, .. }] = &settled[..] else {
            panic!("{settled:?}")
        };
        assert_eq!(parts.iter().map(|part| (part.user, part.amount)).collect::<Vec<_>>(), [(1, 3)]);

        let request = Item::Request { id: 9, asked: Asked::Reserve, at: AT };
        let answer = Item::Answer { used: 3, limit: 10 };
        let both = events(&[add(1, 3), open, request, answer]);
        let [_, LedgerEvent::Answer(admitted)] = &both[..] else { panic!("{both:?}") };
        assert_eq!((admitted.amount, admitted.reservation), (3, Some(ID)));
        assert!(admitted.is_admitted);
        let (quota, window) = (QuotaId(1), WindowStart(0));
        let refusal = Item::Refusal { user: 4, quota, window, amount: 6 };
        let refused = events(&[refusal, request, answer]);
        let [LedgerEvent::Answer(refused)] = &refused[..] else { panic!("{refused:?}") };
        assert_eq!((refused.user, refused.amount, refused.is_admitted), (4, 6, false));
        let payload = vec![7; 60];
        let mut items = vec![add(9, 3)];
        items.extend(payload::items(&payload));
        let recorded = Recorded { user: 9, quota, payload: payload.clone() };
        assert_eq!(events(&items), [LedgerEvent::Recorded(recorded.clone())]);
        items.splice(1..1, [request, answer]);
        let both = events(&items);
        let [LedgerEvent::Answer(answered), LedgerEvent::Recorded(found)] = &both[..] else {
            panic!("{both:?}")
        };
        assert_eq!((answered.amount, found), (3, &recorded));
        assert_eq!(events(&items[3..]), [], "what it counted is missing");
        for never_written in [&[answer, request][..], &[open], &[request, answer]] {
            assert_eq!(events(never_written), []);
        }
    }
}
