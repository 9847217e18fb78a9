//! One record: what an operation really changed, in a slot of 32 bytes. Pure codec.
//!
//! A second kind of record says that the lane goes on elsewhere: its user is the number of the next
//! record, and all else is zero.
//!
//! Layout, little-endian words:
//!
//! ```text
//! word  bits    field
//!    0  0..64   user
//!    1  0..64   delta, signed units: positive for a consume, negative for a refund
//!    2  0..48   window: its start in milliseconds since 1970
//!       48..56  kind (1 = add, 2 = skip)
//!       56..64  slots of the same operation that follow (0)
//!    3  0..32   check: CRC32C over the generation's salt, the record's number and every other
//!               bit of the slot
//!       32..48  quota
//!       48..64  zero
//! ```
//!
//! The check binds the slot's position: a record moved to another slot, left over from an earlier
//! lap or from an earlier generation does not verify. An all-zero slot has kind 0 and never
//! verifies.

use crate::fold::SumKey;
use crate::model::{QuotaId, WindowStart};
use crate::wal::crc::Crc32c;

/// A slot's size in 64-bit words.
pub(crate) const SLOT_WORDS: usize = 4;
/// A slot's size in bytes. It divides a disk's sector, so that no slot is half old and half new
/// after a power cut.
pub(crate) const SLOT_BYTES: usize = SLOT_WORDS * 8;
const _: () = assert!(512 % SLOT_BYTES == 0);

const KIND_ADD: u64 = 1;
const KIND_SKIP: u64 = 2;
const WINDOW_BITS: u32 = 48;
const CHECK_BITS: u32 = 32;
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

/// Seals the records of one generation: the state of the check after the salt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seal {
    crc: Crc32c,
    state: u32,
}

impl Seal {
    pub(crate) fn new(salt: u64) -> Self {
        let crc = Crc32c::detect();
        Self { crc, state: crc.of(!0, [salt]) }
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

    /// Decodes a slot that should hold the record with this number; `None` when it does not verify.
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
    /// record that was only partly stored is off by more, but for one in ten million.
    pub(crate) fn is_one_bit_off(self, number: u64, slot: &[u64; SLOT_WORDS]) -> bool {
        (0..SLOT_BYTES * 8).any(|bit| {
            let mut other = *slot;
            if let Some(word) = other.get_mut(bit / 64) {
                *word ^= 1 << (bit % 64);
            }
            self.decode(number, &other).is_some() || self.decode_skip(number, &other).is_some()
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

    proptest! {
        #[test]
        fn records_round_trip(salt: u64, number: u64, record in records()) {
            let seal = Seal::new(salt);
            let slot = seal.encode(number, &record);
            prop_assert_eq!(seal.decode(number, &slot), Some(record));
            prop_assert_eq!(seal.decode_skip(number, &slot), None);
        }

        #[test]
        fn skips_round_trip(salt: u64, number: u64, target: u64, bit in 0..SLOT_BYTES * 8) {
            let seal = Seal::new(salt);
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
            let seal = Seal::new(salt);
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
            let seal = Seal::new(salt);
            let slot = seal.encode(number, &record);
            prop_assert_eq!(seal.decode(number + 64, &slot), None);
            prop_assert_eq!(Seal::new(salt ^ 1).decode(number, &slot), None);
        }
    }

    #[test]
    fn an_empty_slot_never_verifies() {
        for number in 0..1000 {
            assert_eq!(Seal::new(number).decode(number, &[0; SLOT_WORDS]), None);
        }
    }
}
