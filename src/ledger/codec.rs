//! The bytes of events: a tag, then fields as varints, one event after the other.
//!
//! Events that follow each other have much in common: one generation, one window, nearly the same
//! time. Most are written as how they differ from the events before them in the same batch, or in
//! the same block of a snapshot (`Context`, which is empty where these begin):
//!
//! ```text
//! 8 + e + 4p reservation  of the generation before: number~, time~; with p: user, amount
//!            e: 0 open with p, extend without; 1 committed, 2 cancelled, 3 expired
//!            p: one part, of the quota and the window before; without p: no parts
//! 64 + ...   answer       request (16 bytes), user, amount, used, at~; unless of the quota and the
//!                         window before: quota, window; unless of the limit before: limit; for an
//!                         admitted reserve: generation~, number~
//!            + 1 try_consume, 2 consume, 3 reserve; + 4 admitted; + 8 of the quota and the window
//!            before; + 16 of the limit before
//! ```
//!
//! `x~` is the zigzag of the difference to the `x` before, modulo 2^64; the `time` of one that is
//! open or extended is when it expires. The others say all there is to say:
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
//!
//! Before version 3 there were these only, and the last but one is no longer written. A decoder
//! need not be told the version: a tag says by itself how its event is read, whatever is decoded is
//! behind a checksum, and batches of version 2 that were not durable yet are copied, as they are,
//! to files of version 3.
#![deny(clippy::indexing_slicing)]

use super::{
    Answer, Asked, LedgerEvent, PARTS_MAX, PAYLOAD_BYTES_MAX, Part, Parts, Recorded, Settlement,
};
use crate::codec::{DecodeResult, Input, put_difference, put_varint};
use crate::model::{AMOUNT_MAX, QuotaId, ReservationId, Timestamp, WindowStart};

const OPEN: u8 = 1;
const EXTEND: u8 = 2;
const SETTLE: u8 = 3;
const ANSWER: u8 = 4;
const RECORDED: u8 = 5;

/// From here on: a reservation that is near the one before, plus how it ended, if it did.
const NEAR: u8 = 8;
const NEAR_LAST: u8 = NEAR | ENDED_BITS | WITH_PART;
const ENDED_BITS: u8 = 3;
const WITH_PART: u8 = 4;

/// From here on: an answer beside others, plus what was asked.
const BESIDE: u8 = 64;
const BESIDE_LAST: u8 = BESIDE | ASKED_BITS | ADMITTED | SAME_WINDOW | SAME_LIMIT;
const ASKED_BITS: u8 = 3;
const ADMITTED: u8 = 4;
const SAME_WINDOW: u8 = 8;
const SAME_LIMIT: u8 = 16;
const _: () = assert!(RECORDED < NEAR && NEAR_LAST < BESIDE && BESIDE_LAST < 128);

/// No event takes less: a tag, the difference of a number, that of a time.
pub(crate) const EVENT_BYTES_MIN: u64 = 3;
/// No part takes less.
const PART_BYTES_MIN: usize = 4;

/// The most bytes that a reservation of so many counters takes: a tag, the id, a time, the count,
/// and for each counter a user, a quota, a window and an amount.
pub(crate) const fn open_bytes_max(parts: usize) -> usize {
    1 + 2 * 10 + 7 + 1 + parts * (10 + 3 + 7 + 9)
}

/// What the events before have said last, of which the next are likely to say the same, or nearly.
#[derive(Debug, Clone, Copy)]
struct Context {
    /// Of reservations, in whichever event.
    id: ReservationId,
    expires: Timestamp,
    /// When a reservation ended, or a request was answered.
    at: Timestamp,
    /// Of answers and of parts.
    quota: QuotaId,
    window: WindowStart,
    /// Of answers.
    limit: u64,
}

impl Context {
    const EMPTY: Self = Self {
        id: ReservationId { generation: 0, number: 0 },
        expires: Timestamp::MIN,
        at: Timestamp::MIN,
        quota: QuotaId(0),
        window: WindowStart(0),
        limit: 0,
    };

    /// When a reservation expires, or when it ended.
    #[inline]
    fn time(&mut self, how: Option<Settlement>) -> &mut Timestamp {
        if how.is_some() { &mut self.at } else { &mut self.expires }
    }

    #[inline]
    fn is_of(&self, quota: QuotaId, window: WindowStart) -> bool {
        (self.quota, self.window) == (quota, window)
    }

    fn take_parts(&mut self, parts: &[Part]) {
        if let Some(part) = parts.last() {
            (self.quota, self.window) = (part.quota, part.window);
        }
    }
}

/// Encodes events, one after the other.
#[derive(Debug)]
pub(crate) struct EventWriter {
    bytes: Vec<u8>,
    before: Context,
}

impl Default for EventWriter {
    fn default() -> Self {
        Self { bytes: Vec::new(), before: Context::EMPTY }
    }
}

impl EventWriter {
    /// What was put since the last [`clear`](Self::clear): to be decoded as a whole.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The next event is the first again.
    pub(crate) fn clear(&mut self) {
        self.bytes.clear();
        self.before = Context::EMPTY;
    }

    /// Appends an event.
    pub(crate) fn put(&mut self, event: &LedgerEvent) {
        match event {
            LedgerEvent::Open { id, expires, parts } => {
                self.put_reservation(OPEN, None, *id, *expires, parts);
            }
            LedgerEvent::Extend { id, expires } => {
                self.put_reservation(EXTEND, None, *id, *expires, &[]);
            }
            LedgerEvent::Settle { id, how, at, parts } => self.put_end(*id, *how, *at, parts),
            LedgerEvent::Answer(answer) => self.put_answer(answer),
            LedgerEvent::Recorded(Recorded { user, quota, payload }) => {
                let out = &mut self.bytes;
                out.push(RECORDED);
                put_varint(out, *user);
                put_varint(out, u64::from(quota.as_u16()));
                put_varint(out, payload.len() as u64);
                out.extend_from_slice(payload);
            }
        }
    }

    /// Appends the end of a reservation of which this was given back.
    #[inline]
    pub(crate) fn put_end(
        &mut self,
        id: ReservationId,
        how: Settlement,
        at: Timestamp,
        parts: &[Part],
    ) {
        self.put_reservation(SETTLE, Some(how), id, at, parts);
    }

    /// [`put`](Self::put), unless there would be more bytes than that, and not of this event alone:
    /// then nothing changes. Whether it was put.
    pub(crate) fn put_within(&mut self, bytes_max: usize, event: &LedgerEvent) -> bool {
        let (begin, before) = (self.bytes.len(), self.before);
        self.put(event);
        let fits = self.bytes.len() <= bytes_max || begin == 0;
        if !fits {
            self.bytes.truncate(begin);
            self.before = before;
        }
        fits
    }

    #[inline]
    fn put_reservation(
        &mut self,
        tag: u8,
        how: Option<Settlement>,
        id: ReservationId,
        time: Timestamp,
        parts: &[Part],
    ) {
        let (out, before) = (&mut self.bytes, &mut self.before);
        let near = match parts {
            _ if id.generation != before.id.generation => None,
            [] if tag != OPEN => Some(NEAR),
            [part] if tag != EXTEND && before.is_of(part.quota, part.window) => {
                Some(NEAR | WITH_PART)
            }
            _ => None,
        };
        if let Some(near) = near {
            out.push(near | how.map_or(0, Settlement::number));
            put_difference(out, id.number, before.id.number);
            put_difference(out, time.as_unix_millis(), before.time(how).as_unix_millis());
            for part in parts {
                put_varint(out, part.user);
                put_varint(out, part.amount);
            }
        } else {
            out.push(tag);
            put_varint(out, id.generation);
            put_varint(out, id.number);
            if let Some(how) = how {
                out.push(how.number());
            }
            put_varint(out, time.as_unix_millis());
            if tag != EXTEND {
                put_parts(out, parts);
            }
            before.take_parts(parts);
        }
        before.id = id;
        *before.time(how) = time;
    }

    /// Appends the answer to a request.
    #[inline]
    pub(crate) fn put_answer(&mut self, answer: &Answer) {
        let (out, before) = (&mut self.bytes, &mut self.before);
        let &Answer { quota, window, limit, .. } = answer;
        let is_same_window = before.is_of(quota, window);
        let is_same_limit = limit == before.limit;
        out.push(
            BESIDE
                | answer.asked.number()
                | if answer.is_admitted { ADMITTED } else { 0 }
                | if is_same_window { SAME_WINDOW } else { 0 }
                | if is_same_limit { SAME_LIMIT } else { 0 },
        );
        out.extend_from_slice(&answer.request.to_le_bytes());
        put_varint(out, answer.user);
        put_varint(out, answer.amount);
        put_varint(out, answer.used);
        put_difference(out, answer.at.as_unix_millis(), before.at.as_unix_millis());
        if !is_same_window {
            put_varint(out, u64::from(quota.as_u16()));
            put_varint(out, window.0);
        }
        if !is_same_limit {
            put_varint(out, limit);
        }
        if let Some(id) = answer.reservation {
            put_difference(out, id.generation, before.id.generation);
            put_difference(out, id.number, before.id.number);
            before.id = id;
        }
        *before = Context { at: answer.at, quota, window, limit, ..*before };
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

/// Decodes events, one at a time, to the end of the input.
#[derive(Debug, Clone)]
pub(crate) struct Events<'a> {
    input: Input<'a>,
    before: Context,
}

impl<'a> Events<'a> {
    /// Of all that an [`EventWriter`] held.
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { input: Input::new(bytes), before: Context::EMPTY }
    }

    /// The next event; `None` at the end. After an error the rest is not to be used.
    #[inline(always)]
    pub(crate) fn next_event(&mut self) -> DecodeResult<Option<LedgerEvent>> {
        if self.input.is_empty() {
            return Ok(None);
        }
        let [tag] = self.input.array()?;
        let event = match tag {
            BESIDE..=BESIDE_LAST => LedgerEvent::Answer(self.answer_beside(tag)?),
            NEAR..=NEAR_LAST => self.near(tag)?,
            OPEN => {
                let (id, expires) = (self.id()?, self.time(None)?);
                let parts = self.parts()?;
                if parts.is_empty() {
                    return Err("a reservation of no counter");
                }
                LedgerEvent::Open { id, expires, parts }
            }
            EXTEND => LedgerEvent::Extend { id: self.id()?, expires: self.time(None)? },
            SETTLE => {
                let id = self.id()?;
                let how = self.small(Settlement::from_number)?;
                LedgerEvent::Settle { id, how, at: self.time(Some(how))?, parts: self.parts()? }
            }
            ANSWER => LedgerEvent::Answer(self.answer()?),
            RECORDED => LedgerEvent::Recorded(self.recorded()?),
            _ => return Err("an event of an unknown kind"),
        };
        Ok(Some(event))
    }

    #[inline(always)]
    fn near(&mut self, tag: u8) -> DecodeResult<LedgerEvent> {
        let how = Settlement::from_number(tag & ENDED_BITS);
        let number = self.input.difference(self.before.id.number)?;
        let before = self.before.time(how);
        let time = timestamp(self.input.difference(before.as_unix_millis())?)?;
        *before = time;
        self.before.id.number = number;
        let id = self.before.id;
        let has_part = tag & WITH_PART != 0;
        let mut parts = Parts::new();
        if has_part {
            let user = self.input.varint()?;
            let Context { quota, window, .. } = self.before;
            parts.push(Part { user, quota, window, amount: self.reserved()? });
        }
        Ok(match how {
            Some(how) => LedgerEvent::Settle { id, how, at: time, parts },
            None if has_part => LedgerEvent::Open { id, expires: time, parts },
            None => LedgerEvent::Extend { id, expires: time },
        })
    }

    #[inline(always)]
    fn answer_beside(&mut self, tag: u8) -> DecodeResult<Answer> {
        let asked = Asked::from_number(tag & ASKED_BITS).ok_or(IMPOSSIBLE_FIELD)?;
        let is_admitted = tag & ADMITTED != 0;
        let request = self.input.u128()?;
        let user = self.input.varint()?;
        let (amount, used) = (self.amount()?, self.amount()?);
        let at = timestamp(self.input.difference(self.before.at.as_unix_millis())?)?;
        self.before.at = at;
        if tag & SAME_WINDOW == 0 {
            (self.before.quota, self.before.window) = (self.quota()?, self.window()?);
        }
        if tag & SAME_LIMIT == 0 {
            self.before.limit = self.amount()?;
        }
        let Context { quota, window, limit, id: before, .. } = self.before;
        let mut reservation = None;
        if is_admitted && asked == Asked::Reserve {
            self.before.id = ReservationId {
                generation: self.input.difference(before.generation)?,
                number: self.input.difference(before.number)?,
            };
            reservation = Some(self.before.id);
        }
        Ok(Answer {
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

    fn parts(&mut self) -> DecodeResult<Parts> {
        let count = self.input.count(PART_BYTES_MIN)?;
        if count > PARTS_MAX {
            return Err("a reservation of too many counters");
        }
        let parts: Parts = (0..count).map(|_| self.part()).collect::<DecodeResult<_>>()?;
        self.before.take_parts(&parts);
        Ok(parts)
    }

    fn part(&mut self) -> DecodeResult<Part> {
        Ok(Part {
            user: self.input.varint()?,
            quota: self.quota()?,
            window: self.window()?,
            amount: self.reserved()?,
        })
    }

    fn answer(&mut self) -> DecodeResult<Answer> {
        let request = self.input.u128()?;
        let asked = self.small(Asked::from_number)?;
        let is_admitted = self.small(|number| [false, true].get(usize::from(number)).copied())?;
        let answer = Answer {
            request,
            asked,
            is_admitted,
            user: self.input.varint()?,
            quota: self.quota()?,
            window: self.window()?,
            amount: self.amount()?,
            used: self.amount()?,
            limit: self.amount()?,
            at: timestamp(self.input.varint()?)?,
            reservation: if is_admitted && asked == Asked::Reserve {
                Some(self.id()?)
            } else {
                None
            },
        };
        let Answer { quota, window, limit, at, .. } = answer;
        self.before = Context { quota, window, limit, at, ..self.before };
        Ok(answer)
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
        let (generation, number) = (self.input.varint()?, self.input.varint()?);
        self.before.id = ReservationId { generation, number };
        Ok(self.before.id)
    }

    fn small<T>(&mut self, from_number: impl Fn(u8) -> Option<T>) -> DecodeResult<T> {
        let [number] = self.input.array()?;
        from_number(number).ok_or(IMPOSSIBLE_FIELD)
    }

    fn quota(&mut self) -> DecodeResult<QuotaId> {
        u16::try_from(self.input.varint()?).map(QuotaId).map_err(|_| "a quota above 65535")
    }

    fn window(&mut self) -> DecodeResult<WindowStart> {
        let window = WindowStart(self.input.varint()?);
        if window > WindowStart::MAX { Err("a window beyond 48 bits") } else { Ok(window) }
    }

    #[inline]
    fn amount(&mut self) -> DecodeResult<u64> {
        let amount = self.input.varint()?;
        if amount > AMOUNT_MAX { Err("an amount above 2^63 - 1") } else { Ok(amount) }
    }

    #[inline]
    fn reserved(&mut self) -> DecodeResult<u64> {
        let amount = self.amount()?;
        if amount == 0 { Err("a reservation of nothing") } else { Ok(amount) }
    }

    fn time(&mut self, how: Option<Settlement>) -> DecodeResult<Timestamp> {
        let time = timestamp(self.input.varint()?)?;
        *self.before.time(how) = time;
        Ok(time)
    }
}

const IMPOSSIBLE_FIELD: &str = "an event with a field that can't be";

#[inline]
fn timestamp(millis: u64) -> DecodeResult<Timestamp> {
    let time = Timestamp::from_unix_millis(millis);
    if time.as_unix_millis() == millis { Ok(time) } else { Err("a time beyond the year 9999") }
}

#[cfg(test)]
#[cfg(not(loom))]
pub(super) mod tests;
