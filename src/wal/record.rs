//! One record in a slot of 32 bytes: what an operation actually changed. Pure codec.
//!
//! Most operations write one record. One that changes several counters, or more than sums, writes
//! several next to each other, each of which says how many follow; it counts only if all are there.
//!
//! Layout, little-endian words:
//!
//! ```text
//! word  bits    field
//!    0  0..64   a
//!    1  0..64   b
//!    2  0..48   t
//!       48..56  kind
//!       56..64  records of the same operation that follow
//!    3  0..32   check: CRC32C over the generation's salt, the record's number and every other
//!               bit of the slot
//!       32..48  c
//!       48..64  zero
//!
//! kind        a                   b              t         c
//! 1 add       user                delta, signed  window    quota
//! 2 skip      next record         0              0         0
//! 3 refusal   user                amount asked   window    quota
//! 4 open      reservation number  generation     expires   0
//! 5 extend    reservation number  generation     expires   0
//! 6 settle    reservation number  generation     at        how: 1 committed, 2 cancelled,
//!                                                          3 expired
//! 7 request   id, lower half      upper half     at        asked: 1 try_consume, 2 consume,
//!                                                          3 reserve
//! 8 answer    used                limit          0         0
//! 9 payload   bytes 0..8          8..16          16..22    22..24
//! ```
//!
//! A window is its start, and all times are in milliseconds since 1970. A delta is positive for a
//! consume and negative for a refund. Open follows the adds of what is reserved; request and answer
//! follow what was counted, or a refusal. The payload of a recorded event comes last: see
//! [`payload`](crate::wal::payload).
//!
//! The check binds the slot's position: a record moved to another slot, left over from an earlier
//! lap or from an earlier generation does not verify. An all-zero slot has kind 0 and never
//! verifies.

use crate::codec::Input;
use crate::error::Result;
use crate::fold::SumKey;
use crate::ledger::{Asked, Settlement};
use crate::model::{AMOUNT_MAX, QuotaId, ReservationId, Timestamp, WindowStart};
use crate::wal::crc::Crc32c;
use crate::wal::payload::PIECE_BYTES;

/// A slot's size in 64-bit words.
pub(crate) const SLOT_WORDS: usize = 4;
/// A slot's size in bytes. It divides a disk's sector, so that no slot is half old and half new
/// after a power cut.
pub(crate) const SLOT_BYTES: usize = SLOT_WORDS * 8;
const _: () = assert!(512 % SLOT_BYTES == 0);

const KIND_ADD: u64 = 1;
const KIND_SKIP: u64 = 2;
const KIND_REFUSAL: u64 = 3;
const KIND_OPEN: u64 = 4;
const KIND_EXTEND: u64 = 5;
const KIND_SETTLE: u64 = 6;
const KIND_REQUEST: u64 = 7;
const KIND_ANSWER: u64 = 8;
const KIND_PAYLOAD: u64 = 9;
const WINDOW_BITS: u32 = 48;
const KIND_BITS: u32 = 8;
const KIND_MASK: u64 = (1 << KIND_BITS) - 1;
const CHECK_BITS: u32 = 32;
/// Of the last word; those above are zero.
const USED_BITS: u32 = CHECK_BITS + u16::BITS;
const WINDOW_MASK: u64 = (1 << WINDOW_BITS) - 1;
const CHECK_MASK: u64 = (1 << CHECK_BITS) - 1;

/// What an operation changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) user: u64,
    pub(crate) quota: QuotaId,
    pub(crate) window: WindowStart,
    pub(crate) delta: i64,
}

impl Record {
    /// What the delta is summed under.
    #[inline]
    pub(crate) fn key(&self) -> SumKey {
        SumKey { quota: self.quota, window: self.window, user: self.user }
    }
}

/// A record of any kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Item {
    Add(Record),
    /// What was asked and not counted.
    Refusal {
        user: u64,
        quota: QuotaId,
        window: WindowStart,
        amount: u64,
    },
    /// The adds before it are reserved.
    Open {
        id: ReservationId,
        expires: Timestamp,
    },
    Extend {
        id: ReservationId,
        expires: Timestamp,
    },
    /// The adds before it settle a reservation.
    Settle {
        id: ReservationId,
        how: Settlement,
        at: Timestamp,
    },
    /// The operation was asked for under this id.
    Request {
        id: u128,
        asked: Asked,
        at: Timestamp,
    },
    /// And answered so.
    Answer {
        used: u64,
        limit: u64,
    },
    /// A piece of the payload of the event that was recorded.
    Payload([u8; PIECE_BYTES]),
}

impl Item {
    /// The words without check and count, and the kind.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the halves are meant")]
    fn fields(&self) -> ([u64; 2], u64, u64, u16) {
        match *self {
            Self::Add(Record { user, quota, window, delta }) => {
                ([user, delta.cast_unsigned()], window.0, KIND_ADD, quota.as_u16())
            }
            Self::Refusal { user, quota, window, amount } => {
                ([user, amount], window.0, KIND_REFUSAL, quota.as_u16())
            }
            Self::Open { id, expires } => {
                ([id.number, id.generation], expires.as_unix_millis(), KIND_OPEN, 0)
            }
            Self::Extend { id, expires } => {
                ([id.number, id.generation], expires.as_unix_millis(), KIND_EXTEND, 0)
            }
            Self::Settle { id, how, at } => {
                let how = u16::from(how.number());
                ([id.number, id.generation], at.as_unix_millis(), KIND_SETTLE, how)
            }
            Self::Request { id, asked, at } => {
                let asked = u16::from(asked.number());
                ([id as u64, (id >> 64) as u64], at.as_unix_millis(), KIND_REQUEST, asked)
            }
            Self::Answer { used, limit } => ([used, limit], 0, KIND_ANSWER, 0),
            Self::Payload(piece) => {
                let [a, b, rest] = words(&piece);
                ([a, b], rest & WINDOW_MASK, KIND_PAYLOAD, (rest >> WINDOW_BITS) as u16)
            }
        }
    }

    /// `None` for fields that no record has.
    #[inline(always)]
    fn from_fields([a, b]: [u64; 2], time: u64, kind: u64, c: u64) -> Option<Self> {
        let c = u16::try_from(c).ok()?;
        let (quota, window) = (QuotaId(c), WindowStart(time));
        let number = u8::try_from(c);
        let at = || {
            let at = Timestamp::from_unix_millis(time);
            (at.as_unix_millis() == time).then_some(at)
        };
        let id = ReservationId { generation: b, number: a };
        Some(match kind {
            KIND_ADD => Self::Add(Record { user: a, quota, window, delta: b.cast_signed() }),
            KIND_REFUSAL if b <= AMOUNT_MAX => Self::Refusal { user: a, quota, window, amount: b },
            KIND_OPEN if c == 0 => Self::Open { id, expires: at()? },
            KIND_EXTEND if c == 0 => Self::Extend { id, expires: at()? },
            KIND_SETTLE => {
                Self::Settle { id, how: Settlement::from_number(number.ok()?)?, at: at()? }
            }
            KIND_REQUEST => {
                let id = u128::from(a) | u128::from(b) << 64;
                Self::Request { id, asked: Asked::from_number(number.ok()?)?, at: at()? }
            }
            KIND_ANSWER if time == 0 && c == 0 && a <= AMOUNT_MAX && b <= AMOUNT_MAX => {
                Self::Answer { used: a, limit: b }
            }
            KIND_PAYLOAD => Self::Payload(bytes([a, b, time | u64::from(c) << WINDOW_BITS])),
            _ => return None,
        })
    }
}

/// A slot that holds a record of any kind but a skip. It is taken apart where it is needed: an
/// [`Item`] that is put down and picked up again costs more than the record was to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Verified([u64; SLOT_WORDS]);

impl Verified {
    /// What the record says; there always is something.
    #[inline(always)]
    pub(crate) fn item(self) -> Option<Item> {
        let [a, b, meta, last] = self.0;
        let kind = meta >> WINDOW_BITS & KIND_MASK;
        Item::from_fields([a, b], meta & WINDOW_MASK, kind, last >> CHECK_BITS)
    }

    /// The add, if it is one: told without looking at what else there is.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "no more bits are set")]
    pub(crate) fn add(self) -> Option<Record> {
        let [user, delta, meta, last] = self.0;
        (meta >> WINDOW_BITS & KIND_MASK == KIND_ADD).then_some(Record {
            user,
            quota: QuotaId((last >> CHECK_BITS) as u16),
            window: WindowStart(meta & WINDOW_MASK),
            delta: delta.cast_signed(),
        })
    }

    /// Whether it is a record that anybody writes.
    #[inline(always)]
    fn says_something(self) -> bool {
        let [.., last] = self.0;
        // Adds are most of it.
        last >> USED_BITS == 0 && (self.add().is_some() || self.item().is_some())
    }

    /// How many records of the same operation follow.
    #[inline(always)]
    pub(crate) fn following(self) -> u64 {
        let [.., meta, _] = self.0;
        meta >> (WINDOW_BITS + KIND_BITS)
    }
}

fn words(piece: &[u8; PIECE_BYTES]) -> [u64; PIECE_BYTES / 8] {
    let mut input = Input::new(piece);
    std::array::from_fn(|_| input.u64().unwrap_or_default())
}

fn bytes(words: [u64; PIECE_BYTES / 8]) -> [u8; PIECE_BYTES] {
    let mut piece = [0; PIECE_BYTES];
    for (bytes, word) in piece.chunks_exact_mut(8).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    piece
}

/// Seals the records of one generation: the state of the check after the salt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seal {
    crc: Crc32c,
    state: u32,
}

impl Seal {
    /// # Errors
    /// `UnsupportedProcessor` without SSE 4.2.
    pub(crate) fn new(salt: u64) -> Result<Self> {
        let crc = Crc32c::detect()?;
        Ok(Self { crc, state: crc.of(!0, [salt]) })
    }

    /// [`new`](Self::new), for tests.
    #[cfg(test)]
    pub(crate) fn sure(salt: u64) -> Self {
        let Ok(seal) = Self::new(salt) else { panic!("this processor lacks SSE 4.2") };
        seal
    }

    #[inline(always)]
    fn check(self, number: u64, slot: &[u64; SLOT_WORDS]) -> u64 {
        let [user, delta, meta, last] = *slot;
        u64::from(self.crc.of(self.state, [number, user, delta, meta, last & !CHECK_MASK]))
    }

    /// Encodes the record with this number.
    #[inline(always)]
    pub(crate) fn encode(self, number: u64, record: &Record) -> [u64; SLOT_WORDS] {
        let mut slot = [
            record.user,
            record.delta.cast_unsigned(),
            record.window.0 | KIND_ADD << WINDOW_BITS,
            u64::from(record.quota.as_u16()) << CHECK_BITS,
        ];
        slot[SLOT_WORDS - 1] |= self.check(number, &slot);
        slot
    }

    /// Encodes the record with this number, of an operation of which `following` records follow.
    #[inline(always)]
    pub(crate) fn encode_item(self, number: u64, item: &Item, following: u8) -> [u64; SLOT_WORDS] {
        let ([a, b], time, kind, c) = item.fields();
        let kind = kind | u64::from(following) << KIND_BITS;
        let mut slot = [a, b, time | kind << WINDOW_BITS, u64::from(c) << CHECK_BITS];
        slot[SLOT_WORDS - 1] |= self.check(number, &slot);
        slot
    }

    /// The slot, if it holds the record with this number, of any kind but a skip.
    #[inline(always)]
    pub(crate) fn verified(self, number: u64, slot: &[u64; SLOT_WORDS]) -> Option<Verified> {
        let verified = Verified(*slot);
        (self.verifies(number, slot) && verified.says_something()).then_some(verified)
    }

    /// Encodes the record with this number, after which the lane goes on at `target`.
    pub(crate) fn encode_skip(self, number: u64, target: u64) -> [u64; SLOT_WORDS] {
        let mut slot = [target, 0, KIND_SKIP << WINDOW_BITS, 0];
        slot[SLOT_WORDS - 1] |= self.check(number, &slot);
        slot
    }

    /// Where the lane goes on, if the slot holds the record with this number and it is a skip.
    pub(crate) fn decode_skip(self, number: u64, slot: &[u64; SLOT_WORDS]) -> Option<u64> {
        let [target, _, meta, _] = *slot;
        (meta >> WINDOW_BITS == KIND_SKIP && self.verifies(number, slot)).then_some(target)
    }

    #[inline(always)]
    fn verifies(self, number: u64, slot: &[u64; SLOT_WORDS]) -> bool {
        let [.., last] = *slot;
        last & CHECK_MASK == self.check(number, slot)
    }

    /// Decodes a slot that should hold the record with this number, an add that is all of its
    /// operation; `None` for any other, and when it does not verify.
    #[inline]
    pub(crate) fn decode(self, number: u64, slot: &[u64; SLOT_WORDS]) -> Option<Record> {
        let [user, delta, meta, last] = *slot;
        if meta >> WINDOW_BITS != KIND_ADD || !self.verifies(number, slot) {
            return None;
        }
        let quota = u16::try_from(last >> CHECK_BITS).ok()?;
        Some(Record {
            user,
            quota: QuotaId(quota),
            window: WindowStart(meta & WINDOW_MASK),
            delta: delta.cast_signed(),
        })
    }

    /// Whether the slot would hold the record with this number if one of its bits were another: a
    /// record that was only partly stored is off by more, except one in ten million.
    pub(crate) fn is_one_bit_off(self, number: u64, slot: &[u64; SLOT_WORDS]) -> bool {
        (0..SLOT_BYTES * 8).any(|bit| {
            let mut other = *slot;
            if let Some(word) = other.get_mut(bit / 64) {
                *word ^= 1 << (bit % 64);
            }
            self.verified(number, &other).is_some() || self.decode_skip(number, &other).is_some()
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    prop_compose! {
        fn records()(user: u64, quota: u16, window in 0..=WindowStart::MAX.0, delta: i64) -> Record {
            Record { user, quota: QuotaId(quota), window: WindowStart(window), delta }
        }
    }

    fn items() -> impl Strategy<Value = Item> {
        let time = (0..=Timestamp::MAX.as_unix_millis()).prop_map(Timestamp::from_unix_millis);
        let number = (any::<u128>(), time, 1..=3_u8);
        prop_oneof![
            records().prop_map(Item::Add),
            (records(), 0..=AMOUNT_MAX).prop_map(|(Record { user, quota, window, .. }, amount)| {
                Item::Refusal { user, quota, window, amount }
            }),
            (number, 4..=7_u64).prop_map(|((number, time, how), kind)| {
                let id = ReservationId::from_u128(number);
                let settlement = Settlement::from_number(how).expect("1 to 3");
                let asked = Asked::from_number(how).expect("1 to 3");
                match kind {
                    KIND_OPEN => Item::Open { id, expires: time },
                    KIND_EXTEND => Item::Extend { id, expires: time },
                    KIND_SETTLE => Item::Settle { id, how: settlement, at: time },
                    _ => Item::Request { id: number, asked, at: time },
                }
            }),
            (0..=AMOUNT_MAX, 0..=AMOUNT_MAX).prop_map(|(used, limit)| Item::Answer { used, limit }),
            any::<[u8; PIECE_BYTES]>().prop_map(Item::Payload),
        ]
    }

    proptest! {
        #[test]
        fn items_round_trip(salt: u64, number: u64, item in items(), following: u8, bit in 0..256_usize) {
            let seal = Seal::sure(salt);
            let mut slot = seal.encode_item(number, &item, following);
            let verified = seal.verified(number, &slot).unwrap();
            prop_assert_eq!((verified.item(), verified.following()), (Some(item), following.into()));
            prop_assert_eq!(seal.decode_skip(number, &slot), None);
            let alone = match item {
                Item::Add(record) if following == 0 => Some(record),
                _ => None,
            };
            prop_assert_eq!(seal.decode(number, &slot), alone);
            slot[bit / 64] ^= 1 << (bit % 64);
            prop_assert_eq!(seal.verified(number, &slot), None);
        }

        #[test]
        fn what_nobody_writes_does_not_verify(number: u64, item in items(), bit in USED_BITS..64) {
            let seal = Seal::sure(1);
            let mut slot = seal.encode_item(number, &item, 0);
            slot[SLOT_WORDS - 1] = slot[SLOT_WORDS - 1] & !CHECK_MASK | 1 << bit;
            slot[SLOT_WORDS - 1] |= seal.check(number, &slot);
            prop_assert_eq!(seal.verified(number, &slot), None);
            prop_assert_eq!(seal.decode(number, &slot), None);
        }

        #[test]
        fn records_round_trip(salt: u64, number: u64, record in records()) {
            let seal = Seal::sure(salt);
            let slot = seal.encode(number, &record);
            prop_assert_eq!(seal.decode(number, &slot), Some(record));
            prop_assert_eq!(seal.decode_skip(number, &slot), None);
        }

        #[test]
        fn skips_round_trip(salt: u64, number: u64, target: u64, bit in 0..SLOT_BYTES * 8) {
            let seal = Seal::sure(salt);
            let mut slot = seal.encode_skip(number, target);
            prop_assert_eq!(seal.decode_skip(number, &slot), Some(target));
            prop_assert_eq!(seal.decode(number, &slot), None);
            prop_assert_eq!(seal.decode_skip(number ^ 64, &slot), None);
            slot[bit / 64] ^= 1 << (bit % 64);
            prop_assert_eq!(seal.decode_skip(number, &slot), None);
            prop_assert!(seal.is_one_bit_off(number, &slot));
        }

        #[test]
        fn a_flipped_bit_never_verifies(salt: u64, number: u64, record in records()) {
            let seal = Seal::sure(salt);
            let slot = seal.encode(number, &record);
            for bit in 0..SLOT_BYTES * 8 {
                let mut flipped = slot;
                flipped[bit / 64] ^= 1 << (bit % 64);
                prop_assert_eq!(seal.decode(number, &flipped), None, "bit {}", bit);
                prop_assert!(seal.is_one_bit_off(number, &flipped), "bit {}", bit);
            }
        }

        #[test]
        fn another_lap_or_generation_never_verifies(salt: u64, number in 0..u64::MAX / 2, record in records()) {
            let seal = Seal::sure(salt);
            let slot = seal.encode(number, &record);
            prop_assert_eq!(seal.decode(number + 64, &slot), None);
            prop_assert_eq!(Seal::sure(salt ^ 1).decode(number, &slot), None);
        }
    }

    #[test]
    fn an_empty_slot_never_verifies() {
        for number in 0..1000 {
            assert_eq!(Seal::sure(number).decode(number, &[0; SLOT_WORDS]), None);
        }
    }
}
