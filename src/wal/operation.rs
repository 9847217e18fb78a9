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

    /// A request with an id was answered.
    fn answer(&mut self, answer: Answer);

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

    fn answer(&mut self, answer: Answer) {
        self.0(LedgerEvent::Answer(answer));
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
    #[inline(always)]
    pub(crate) fn read(&mut self, number: u64, slot: impl Fn(u64) -> Option<Verified>) -> Reading {
        self.slots.clear();
        let mut expected = None;
        while let Some(slot) = number.checked_add(self.len()).and_then(&slot) {
            let following = slot.following();
            if expected.is_some_and(|expected| expected != following) {
                break;
            }
            self.slots.push(slot);
            match following.checked_sub(1) {
                None => return Reading::Complete,
                next => expected = next,
            }
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
        // Those of one counter, which are nearly all, at a glance.
        match *self.slots {
            [reserved, open]
                if let Some(Item::Open { id, expires }) = open.item()
                    && let Some(part) = reserved.add().and_then(part) =>
            {
                events.open(id, expires, part);
            }
            [back, settle] | [back, _, settle]
                if let Some(Item::Settle { id, how, at }) = settle.item()
                    && let Some(part) = back.add().and_then(given_back)
                    && self.adds().count() == self.slots.len() - 1
                    && self.adds().filter_map(given_back).count() == 1 =>
            {
                events.settle(id, how, at, part);
            }
            [subject, request, answer]
                if let Some(answer) = answered(subject, request.item(), answer.item(), None) =>
            {
                events.answer(answer);
            }
            _ => self.visit_any_events(events),
        }
    }

    /// What is to be remembered, whichever there is.
    fn visit_any_events(&self, events: &mut impl EventVisitor) {
        let mut opened = None;
        let mut request = None;
        // Groups have adds only.
        let others = self.slots.iter().filter(|slot| slot.add().is_none());
        for item in others.filter_map(|slot| slot.item()) {
            match item {
                Item::Add(_) | Item::Refusal { .. } => {}
                Item::Open { id, expires } => {
                    let parts: Parts = self.adds().filter_map(part).collect();
                    opened = Some(id).filter(|_| !parts.is_empty());
                    match *parts {
                        [] => {}
                        [part] => events.open(id, expires, part),
                        _ => events.event(LedgerEvent::Open { id, expires, parts }),
                    }
                }
                Item::Extend { id, expires } => events.event(LedgerEvent::Extend { id, expires }),
                Item::Settle { id, how, at } => {
                    let parts: Parts = self.adds().filter_map(given_back).collect();
                    match *parts {
                        [part] => events.settle(id, how, at, part),
                        _ => events.event(LedgerEvent::Settle { id, how, at, parts }),
                    }
                }
                Item::Request { .. } => request = Some(item),
                Item::Answer { .. } => {
                    let subject = self.slots.first().copied();
                    let answer =
                        subject.and_then(|slot| answered(slot, request, Some(item), opened));
                    answer.into_iter().for_each(|answer| events.answer(answer));
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
}

/// The answer to a request about what the first record says: that was counted, or refused.
#[inline(always)]
fn answered(
    subject: Verified,
    request: Option<Item>,
    answer: Option<Item>,
    reservation: Option<ReservationId>,
) -> Option<Answer> {
    let Some(Item::Request { id: request, asked, at }) = request else { return None };
    let Some(Item::Answer { used, limit }) = answer else { return None };
    let admitted = subject.add().map(part);
    let is_admitted = admitted.is_some();
    let refused = || match subject.item()? {
        Item::Refusal { user, quota, window, amount } => Some(Part { user, quota, window, amount }),
        _ => None,
    };
    let Part { user, quota, window, amount } = admitted.unwrap_or_else(refused)?;
    Some(Answer {
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
        reservation,
    })
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
        let cancelled = events(&[add(1, -3), add(2, -4), Item::Settle { id: ID, how, at }]);
        let [LedgerEvent::Settle { id: ID, parts, .. }] = &cancelled[..] else {
            panic!("{cancelled:?}")
        };
        assert_eq!(parts.len(), 2);
        let (end, extend) =
            (Item::Settle { id: ID, how, at }, Item::Extend { id: ID, expires: AT });
        assert_eq!(events(&[add(1, -3), extend, end]).len(), 2, "each is told");

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
