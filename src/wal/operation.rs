//! The records of one operation: what it added, and what must be remembered. Pure.

use std::ops::ControlFlow;

use crate::ledger::{Answer, LedgerEvent, Part, Parts, Recorded};
use crate::model::QuotaId;
use crate::wal::payload;
use crate::wal::record::{Item, Record};

/// What an operation wrote, to be read back or written, kept for its memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Operation {
    items: Vec<Item>,
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
    pub(crate) fn read(
        &mut self,
        number: u64,
        decode: impl Fn(u64) -> Option<(Item, u8)>,
    ) -> Reading {
        self.items.clear();
        let mut expected = None;
        let read = (number..=u64::MAX).try_for_each(|number| match decode(number) {
            Some((item, following)) if expected.is_none_or(|expected| expected == following) => {
                self.items.push(item);
                match following.checked_sub(1) {
                    Some(next) => {
                        expected = Some(next);
                        ControlFlow::Continue(())
                    }
                    None => ControlFlow::Break(Reading::Complete),
                }
            }
            _ => ControlFlow::Break(Reading::CutShort(self.items.len() as u64)),
        });
        match read {
            ControlFlow::Break(reading) => reading,
            ControlFlow::Continue(()) => Reading::CutShort(self.items.len() as u64),
        }
    }

    /// How many records it takes.
    pub(crate) fn len(&self) -> u64 {
        self.items.len() as u64
    }

    /// What it added to the sums.
    pub(crate) fn adds(&self) -> impl Iterator<Item = &Record> {
        self.items.iter().filter_map(|item| match item {
            Item::Add(record) => Some(record),
            _ => None,
        })
    }

    /// The quotas that it is about, some of them more than once.
    pub(crate) fn quotas(&self) -> impl Iterator<Item = QuotaId> {
        self.items.iter().filter_map(|item| match *item {
            Item::Add(Record { quota, .. }) | Item::Refusal { quota, .. } => Some(quota),
            _ => None,
        })
    }

    /// What is to be remembered of it. What no operation writes yields nothing.
    pub(crate) fn events(&self) -> impl Iterator<Item = LedgerEvent> {
        let mut events = [None, None, None];
        let [reservation, answer, recorded] = &mut events;
        *recorded = self.recorded().map(LedgerEvent::Recorded);
        let mut opened = None;
        let mut request = None;
        for &item in &self.items {
            match item {
                Item::Add(_) | Item::Refusal { .. } | Item::Payload(_) => {}
                Item::Open { id, expires } => {
                    let parts: Parts = self.adds().filter_map(part).collect();
                    opened = Some(id).filter(|_| !parts.is_empty());
                    *reservation = opened.map(|id| LedgerEvent::Open { id, expires, parts });
                }
                Item::Extend { id, expires } => {
                    *reservation = Some(LedgerEvent::Extend { id, expires });
                }
                Item::Settle { id, how, at } => {
                    let parts = self.adds().filter_map(given_back).collect();
                    *reservation = Some(LedgerEvent::Settle { id, how, at, parts });
                }
                Item::Request { id, asked, at } => request = Some((id, asked, at)),
                Item::Answer { used, limit } => {
                    *answer = request.zip(self.subject()).map(|((request, asked, at), subject)| {
                        let (Part { user, quota, window, amount }, is_admitted) = subject;
                        LedgerEvent::Answer(Answer {
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
                        })
                    });
                }
            }
        }
        events.into_iter().flatten()
    }

    /// The event that was recorded.
    fn recorded(&self) -> Option<Recorded> {
        let Some(Item::Payload(_)) = self.items.last() else { return None };
        let Some(&Item::Add(Record { user, quota, .. })) = self.items.first() else { return None };
        Some(Recorded { user, quota, payload: payload::joined(self.items.iter())? })
    }

    /// What was asked about, and whether it was admitted.
    fn subject(&self) -> Option<(Part, bool)> {
        match *self.items.first()? {
            Item::Add(record) => part(&record).map(|part| (part, true)),
            Item::Refusal { user, quota, window, amount } => {
                Some((Part { user, quota, window, amount }, false))
            }
            _ => None,
        }
    }
}

/// What is reserved by an add.
fn part(record: &Record) -> Option<Part> {
    let Record { user, quota, window, delta } = *record;
    let amount = u64::try_from(delta).ok().filter(|&amount| amount > 0)?;
    Some(Part { user, quota, window, amount })
}

/// What is given back by an add.
fn given_back(record: &Record) -> Option<Part> {
    part(&Record { delta: record.delta.checked_neg()?, ..*record })
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;
    use crate::ledger::{Asked, Settlement};
    use crate::model::{ReservationId, Timestamp, WindowStart};

    const ID: ReservationId = ReservationId { generation: 2, number: 7 };
    const AT: Timestamp = Timestamp::from_unix_millis(5);

    fn add(user: u64, delta: i64) -> Item {
        Item::Add(Record { user, quota: QuotaId(1), window: WindowStart(0), delta })
    }

    fn operation(items: &[Item]) -> Operation {
        Operation { items: items.to_vec() }
    }

    fn decode(items: Vec<Item>) -> impl Fn(u64) -> Option<(Item, u8)> {
        move |number| {
            let index = usize::try_from(number).ok()?;
            let following = u8::try_from(items.len().checked_sub(index + 1)?).ok()?;
            items.get(index).map(|&item| (item, following))
        }
    }

    #[test]
    fn an_operation_is_complete_or_cut_short() {
        let items = vec![add(1, 1), add(2, 1), Item::Open { id: ID, expires: AT }];
        let whole = decode(items.clone());
        let mut operation = Operation::default();
        assert_eq!(operation.read(0, &whole), Reading::Complete);
        assert_eq!(operation.items, items);
        for missing in 0..3 {
            let cut = |number| whole(number).filter(|_| number != missing);
            assert_eq!(operation.read(0, cut), Reading::CutShort(missing));
        }
        // A record of another operation does not complete it.
        let other = |number| whole(number).map(|(item, n)| (item, if number == 1 { 0 } else { n }));
        assert_eq!(operation.read(0, other), Reading::CutShort(1));
        assert_eq!(operation.read(u64::MAX, |_| Some((add(1, 1), 1))), Reading::CutShort(1));
    }

    #[test]
    fn what_is_remembered_follows_from_the_records() {
        let events = |items: &[Item]| operation(items).events().collect::<Vec<_>>();
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
