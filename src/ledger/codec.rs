//! The bytes of events: a tag, then fields as varints, one event after the other.
//!
//! ```text
//! 1 open     generation, number, expires, count of parts, parts: user, quota, window, amount
//! 2 extend   generation, number, expires
//! 3 settle   generation, number, how (1 committed, 2 cancelled, 3 expired), at, count of parts,
//!            parts
//! 4 answer   request (16 bytes), asked (1 try_consume, 2 consume, 3 reserve), admitted (0 or 1),
//!            user, quota, window, amount, used, limit, at; for an admitted reserve: generation,
//!            number
//! 5 recorded user, quota, length (1 to 4096), so many bytes: the payload of an event
//! ```
#![deny(clippy::indexing_slicing)]

use super::{
    Answer, Asked, LedgerEvent, PARTS_MAX, PAYLOAD_BYTES_MAX, Part, Parts, Recorded, Settlement,
};
use crate::codec::{DecodeResult, Input, put_varint};
use crate::model::{AMOUNT_MAX, QuotaId, ReservationId, Timestamp, WindowStart};

const OPEN: u64 = 1;
const EXTEND: u64 = 2;
const SETTLE: u64 = 3;
const ANSWER: u64 = 4;
const RECORDED: u64 = 5;

/// No event takes less: a tag, two for the id, a time.
pub(crate) const EVENT_BYTES_MIN: u64 = 4;
/// No part takes less.
const PART_BYTES_MIN: usize = 4;

/// The most bytes that a reservation of so many counters takes: a tag, the id, a time, the count,
/// and for each counter a user, a quota, a window and an amount.
pub(crate) const fn open_bytes_max(parts: usize) -> usize {
    1 + 2 * 10 + 7 + 1 + parts * (10 + 3 + 7 + 9)
}

/// Appends an event.
pub(crate) fn put_event(out: &mut Vec<u8>, event: &LedgerEvent) {
    match event {
        LedgerEvent::Open { id, expires, parts } => {
            put_varint(out, OPEN);
            put_id(out, *id);
            put_time(out, *expires);
            put_parts(out, parts);
        }
        LedgerEvent::Extend { id, expires } => {
            put_varint(out, EXTEND);
            put_id(out, *id);
            put_time(out, *expires);
        }
        LedgerEvent::Settle { id, how, at, parts } => {
            put_varint(out, SETTLE);
            put_id(out, *id);
            put_varint(out, u64::from(how.number()));
            put_time(out, *at);
            put_parts(out, parts);
        }
        LedgerEvent::Answer(answer) => put_answer(out, answer),
        LedgerEvent::Recorded(Recorded { user, quota, payload }) => {
            put_varint(out, RECORDED);
            put_varint(out, *user);
            put_varint(out, u64::from(quota.as_u16()));
            put_varint(out, payload.len() as u64);
            out.extend_from_slice(payload);
        }
    }
}

fn put_parts(out: &mut Vec<u8>, parts: &[Part]) {
    put_varint(out, parts.len() as u64);
    for part in parts {
        put_varint(out, part.user);
        put_varint(out, u64::from(part.quota.as_u16()));
        put_varint(out, part.window.0);
        put_varint(out, part.amount);
    }
}

fn put_answer(out: &mut Vec<u8>, answer: &Answer) {
    put_varint(out, ANSWER);
    out.extend_from_slice(&answer.request.to_le_bytes());
    put_varint(out, u64::from(answer.asked.number()));
    put_varint(out, u64::from(answer.is_admitted));
    put_varint(out, answer.user);
    put_varint(out, u64::from(answer.quota.as_u16()));
    put_varint(out, answer.window.0);
    put_varint(out, answer.amount);
    put_varint(out, answer.used);
    put_varint(out, answer.limit);
    put_time(out, answer.at);
    if let Some(id) = answer.reservation {
        put_id(out, id);
    }
}

fn put_id(out: &mut Vec<u8>, id: ReservationId) {
    put_varint(out, id.generation);
    put_varint(out, id.number);
}

fn put_time(out: &mut Vec<u8>, time: Timestamp) {
    put_varint(out, time.as_unix_millis());
}

/// Decodes events, one at a time, to the end of the input.
#[derive(Debug, Clone)]
pub(crate) struct Events<'a> {
    input: Input<'a>,
}

impl<'a> Events<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { input: Input::new(bytes) }
    }

    /// The next event; `None` at the end. After an error the rest is not to be used.
    pub(crate) fn next_event(&mut self) -> DecodeResult<Option<LedgerEvent>> {
        if self.input.is_empty() {
            return Ok(None);
        }
        let event = match self.input.varint()? {
            OPEN => {
                let (id, expires) = (self.id()?, self.time()?);
                let parts = self.parts()?;
                if parts.is_empty() {
                    return Err("a reservation of no counter");
                }
                LedgerEvent::Open { id, expires, parts }
            }
            EXTEND => LedgerEvent::Extend { id: self.id()?, expires: self.time()? },
            SETTLE => {
                let id = self.id()?;
                let how = self.small(Settlement::from_number)?;
                LedgerEvent::Settle { id, how, at: self.time()?, parts: self.parts()? }
            }
            ANSWER => LedgerEvent::Answer(self.answer()?),
            RECORDED => LedgerEvent::Recorded(self.recorded()?),
            _ => return Err("an event of an unknown kind"),
        };
        Ok(Some(event))
    }

    fn parts(&mut self) -> DecodeResult<Parts> {
        let count = self.input.count(PART_BYTES_MIN)?;
        if count > PARTS_MAX {
            return Err("a reservation of too many counters");
        }
        (0..count).map(|_| self.part()).collect()
    }

    fn part(&mut self) -> DecodeResult<Part> {
        let part = Part {
            user: self.input.varint()?,
            quota: self.quota()?,
            window: self.window()?,
            amount: self.amount()?,
        };
        if part.amount == 0 { Err("a reservation of nothing") } else { Ok(part) }
    }

    fn answer(&mut self) -> DecodeResult<Answer> {
        let request = self.input.u128()?;
        let asked = self.small(Asked::from_number)?;
        let is_admitted = self.small(|number| [false, true].get(usize::from(number)).copied())?;
        Ok(Answer {
            request,
            asked,
            is_admitted,
            user: self.input.varint()?,
            quota: self.quota()?,
            window: self.window()?,
            amount: self.amount()?,
            used: self.amount()?,
            limit: self.amount()?,
            at: self.time()?,
            reservation: if is_admitted && asked == Asked::Reserve {
                Some(self.id()?)
            } else {
                None
            },
        })
    }

    fn recorded(&mut self) -> DecodeResult<Recorded> {
        let (user, quota) = (self.input.varint()?, self.quota()?);
        let len = self.input.count(1)?;
        if !(1..=PAYLOAD_BYTES_MAX).contains(&len) {
            return Err("an event of no bytes, or of too many");
        }
        Ok(Recorded { user, quota, payload: self.input.take(len)?.to_vec() })
    }

    fn id(&mut self) -> DecodeResult<ReservationId> {
        Ok(ReservationId { generation: self.input.varint()?, number: self.input.varint()? })
    }

    fn small<T>(&mut self, from_number: impl Fn(u8) -> Option<T>) -> DecodeResult<T> {
        let number = u8::try_from(self.input.varint()?).ok();
        number.and_then(from_number).ok_or("an event with a field that can't be")
    }

    fn quota(&mut self) -> DecodeResult<QuotaId> {
        u16::try_from(self.input.varint()?).map(QuotaId).map_err(|_| "a quota above 65535")
    }

    fn window(&mut self) -> DecodeResult<WindowStart> {
        let window = WindowStart(self.input.varint()?);
        if window > WindowStart::MAX { Err("a window beyond 48 bits") } else { Ok(window) }
    }

    fn amount(&mut self) -> DecodeResult<u64> {
        let amount = self.input.varint()?;
        if amount > AMOUNT_MAX { Err("an amount above 2^63 - 1") } else { Ok(amount) }
    }

    fn time(&mut self) -> DecodeResult<Timestamp> {
        let millis = self.input.varint()?;
        let time = Timestamp::from_unix_millis(millis);
        if time.as_unix_millis() == millis { Ok(time) } else { Err("a time beyond the year 9999") }
    }
}

#[cfg(test)]
#[cfg(not(loom))]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    prop_compose! {
        fn ids()(generation in 0..3_u64, number in prop_oneof![0..20_u64, Just(u64::MAX)])
            -> ReservationId {
            ReservationId { generation, number }
        }
    }

    prop_compose! {
        fn times()(millis in prop_oneof![0..100_u64, Just(Timestamp::MAX.as_unix_millis())])
            -> Timestamp {
            Timestamp::from_unix_millis(millis)
        }
    }

    prop_compose! {
        fn parts()(
            user: u64,
            quota: u16,
            window in 0..=WindowStart::MAX.0,
            amount in 1..=AMOUNT_MAX,
        ) -> Part {
            Part { user, quota: QuotaId(quota), window: WindowStart(window), amount }
        }
    }

    prop_compose! {
        fn answers()(
            part in parts(),
            request: u128,
            how in (1..=3_u8, any::<bool>()),
            numbers in (0..=AMOUNT_MAX, 0..=AMOUNT_MAX),
            at in times(),
            id in ids(),
        ) -> Answer {
            let Part { user, quota, window, amount } = part;
            let (asked, is_admitted) = (Asked::from_number(how.0).unwrap(), how.1);
            let reservation = (asked == Asked::Reserve && is_admitted).then_some(id);
            let (used, limit) = numbers;
            Answer {
                request, asked, is_admitted, user, quota, window, amount, used, limit, at,
                reservation,
            }
        }
    }

    prop_compose! {
        fn recorded()(
            user: u64,
            quota: u16,
            payload in prop_oneof![
                proptest::collection::vec(any::<u8>(), 1..40),
                Just(vec![7; PAYLOAD_BYTES_MAX]),
            ],
        ) -> Recorded {
            Recorded { user, quota: QuotaId(quota), payload }
        }
    }

    pub(in crate::ledger) fn events() -> impl Strategy<Value = LedgerEvent> {
        let how = (1..=3_u8).prop_map(|number| Settlement::from_number(number).unwrap());
        prop_oneof![
            (ids(), times(), proptest::collection::vec(parts(), 1..=PARTS_MAX)).prop_map(
                |(id, expires, parts)| LedgerEvent::Open { id, expires, parts: parts.into() }
            ),
            (ids(), times()).prop_map(|(id, expires)| LedgerEvent::Extend { id, expires }),
            (ids(), how, times(), proptest::collection::vec(parts(), 0..=PARTS_MAX)).prop_map(
                |(id, how, at, parts)| LedgerEvent::Settle { id, how, at, parts: parts.into() }
            ),
            answers().prop_map(LedgerEvent::Answer),
            recorded().prop_map(LedgerEvent::Recorded),
        ]
    }

    fn decode(bytes: &[u8]) -> DecodeResult<Vec<LedgerEvent>> {
        let mut events = Events::new(bytes);
        let mut found = Vec::new();
        while let Some(event) = events.next_event()? {
            found.push(event);
        }
        Ok(found)
    }

    proptest! {
        #[test]
        fn events_round_trip(events in proptest::collection::vec(events(), 0..20)) {
            let mut bytes = Vec::new();
            for event in &events {
                let before = bytes.len();
                put_event(&mut bytes, event);
                let len = bytes.len() - before;
                prop_assert!(len as u64 >= EVENT_BYTES_MIN);
                if let LedgerEvent::Open { parts, .. } = event {
                    prop_assert!(len <= open_bytes_max(parts.len()));
                }
            }
            prop_assert_eq!(decode(&bytes).unwrap(), events);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = decode(&bytes);
        }
    }

    #[test]
    fn what_can_not_have_been_written_is_refused() {
        let part = Part { user: 1, quota: QuotaId(1), window: WindowStart(1), amount: 1 };
        let id = ReservationId { generation: 1, number: 1 };
        let expires = Timestamp::MIN;
        let too_many = vec![part; PARTS_MAX + 1];
        for parts in [vec![], too_many, vec![Part { amount: 0, ..part }]] {
            let mut bytes = Vec::new();
            put_event(&mut bytes, &LedgerEvent::Open { id, expires, parts: parts.into() });
            assert!(decode(&bytes).is_err());
        }
        for len in [0, PAYLOAD_BYTES_MAX + 1] {
            let mut bytes = Vec::new();
            let recorded = Recorded { user: 1, quota: QuotaId(1), payload: vec![1; len] };
            put_event(&mut bytes, &LedgerEvent::Recorded(recorded));
            assert!(decode(&bytes).is_err(), "{len}");
        }
        for bytes in
            [&[0][..], &[6], &[5, 1, 1, 2, 1], &[3, 1, 1, 0, 0, 0], &[3, 1, 1, 4, 0, 0], &[2, 1, 1]]
        {
            assert!(decode(bytes).is_err(), "{bytes:?}");
        }
    }
}
