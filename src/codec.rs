//! The building blocks of what is on disk: varints, sorted runs of sums, bounded bincode. Pure:
//! bytes in, value out.
//!
//! Decoders trust nothing: each field is checked against what is left of the input before it is
//! used, and no allocation is larger than a fixed multiple of the input.

use bincode::enc::EncoderImpl;
use bincode::enc::write::SizeWriter;
use bincode::{Decode, Encode};

use crate::fold::{Sum, SumKey};
use crate::model::{QuotaId, WindowStart};

/// Why bytes could not be decoded. What is wrong, for a message; the caller adds the file and the
/// offset.
pub(crate) type DecodeResult<T> = Result<T, &'static str>;

/// Reads from the front of a byte slice.
#[derive(Debug, Clone)]
pub(crate) struct Input<'a> {
    bytes: &'a [u8],
}

impl<'a> Input<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    pub(crate) fn remaining(&self) -> usize {
        self.bytes.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(crate) fn take(&mut self, count: usize) -> DecodeResult<&'a [u8]> {
        let (head, tail) = self.bytes.split_at_checked(count).ok_or("cut short")?;
        self.bytes = tail;
        Ok(head)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> DecodeResult<[u8; N]> {
        let (head, tail) = self.bytes.split_first_chunk::<N>().ok_or("cut short")?;
        self.bytes = tail;
        Ok(*head)
    }

    pub(crate) fn u32(&mut self) -> DecodeResult<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> DecodeResult<u64> {
        self.array().map(u64::from_le_bytes)
    }

    pub(crate) fn u128(&mut self) -> DecodeResult<u128> {
        self.array().map(u128::from_le_bytes)
    }

    /// A LEB128 varint of at most 64 bits, in its shortest form.
    #[inline]
    pub(crate) fn varint(&mut self) -> DecodeResult<u64> {
        if let Some(value) = self.varint_in_word() {
            return Ok(value);
        }
        let wide = self.varint_bytewise()?;
        u64::try_from(wide).map_err(|_| "a varint above 64 bits")
    }

    /// A LEB128 varint of at most 128 bits, in its shortest form.
    #[inline]
    pub(crate) fn varint_wide(&mut self) -> DecodeResult<u128> {
        match self.varint_in_word() {
            Some(value) => Ok(value.into()),
            None => self.varint_bytewise(),
        }
    }

    /// The varint, if it is in its shortest form and ends within the next eight bytes, which are
    /// there: all of its bytes at once. Nothing is taken otherwise.
    #[inline]
    fn varint_in_word(&mut self) -> Option<u64> {
        let word = u64::from_le_bytes(*self.bytes.first_chunk()?);
        let ends = !word & 0x8080_8080_8080_8080;
        if ends == 0 {
            return None;
        }
        // Of the first byte without the bit that says that more follow.
        let bits = ends.trailing_zeros() + 1;
        let last = word << (u64::BITS - bits) >> (u64::BITS - 8);
        if last == 0 && bits > 8 {
            return None;
        }
        self.bytes = self.bytes.get(bits as usize / 8..)?;
        // Neighbours are brought together: bytes to 14 bits, these to 28, these to 56.
        let sevens = word << (u64::BITS - bits) >> (u64::BITS - bits) & 0x7f7f_7f7f_7f7f_7f7f;
        let pairs = sevens & 0x007f_007f_007f_007f | (sevens & 0x7f00_7f00_7f00_7f00) >> 1;
        let fours = pairs & 0x0000_3fff_0000_3fff | (pairs & 0x3fff_0000_3fff_0000) >> 2;
        Some(fours & 0x0fff_ffff | (fours & 0x0fff_ffff_0000_0000) >> 4)
    }

    /// What [`put_difference`] appended.
    #[inline]
    pub(crate) fn difference(&mut self, from: u64) -> DecodeResult<u64> {
        let step = self.varint()?;
        Ok(from.wrapping_add((step >> 1) ^ (step & 1).wrapping_neg()))
    }

    #[cold]
    fn varint_bytewise(&mut self) -> DecodeResult<u128> {
        let mut value = 0_u128;
        for shift in (0..u128::BITS).step_by(7) {
            let [byte] = self.array()?;
            let part = u128::from(byte & 0x7f);
            if shift > 0 && byte == 0 {
                return Err("a varint that is not in its shortest form");
            }
            if (part << shift) >> shift != part {
                return Err("a varint above 128 bits");
            }
            value |= part << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err("a varint above 128 bits")
    }

    /// A varint that counts things of at least `unit` bytes each which must still follow: never
    /// larger than the input allows, so that it may size an allocation.
    pub(crate) fn count(&mut self, unit: usize) -> DecodeResult<usize> {
        let count = usize::try_from(self.varint()?).map_err(|_| "a count above the input")?;
        match count.checked_mul(unit) {
            Some(bytes) if bytes <= self.remaining() => Ok(count),
            _ => Err("a count above the input"),
        }
    }
}

/// Appends a LEB128 varint in its shortest form.
#[inline]
pub(crate) fn put_varint(out: &mut Vec<u8>, value: u64) {
    if value < 0x80 {
        #[expect(clippy::cast_possible_truncation, reason = "less than 128")]
        return out.push(value as u8);
    }
    if value >> 56 != 0 {
        return put_varint_bytewise(out, value.into());
    }
    // Eight bytes at once, of which some are too many: see `Input::varint_in_word`.
    let fours = value & 0x0fff_ffff | value << 4 & 0x0fff_ffff_0000_0000;
    let pairs = fours & 0x0000_3fff_0000_3fff | fours << 2 & 0x3fff_0000_3fff_0000;
    let sevens = pairs & 0x007f_007f_007f_007f | pairs << 1 & 0x7f00_7f00_7f00_7f00;
    let bytes = varint_bytes(value);
    let more = 0x8080_8080_8080_8080 & ((1 << (8 * (bytes - 1))) - 1);
    let end = out.len() + bytes;
    out.extend_from_slice(&(sevens | more).to_le_bytes());
    out.truncate(end);
}

/// Appends a LEB128 varint in its shortest form.
#[inline]
pub(crate) fn put_varint_wide(out: &mut Vec<u8>, value: u128) {
    match u64::try_from(value) {
        Ok(value) => put_varint(out, value),
        Err(_) => put_varint_bytewise(out, value),
    }
}

#[cold]
fn put_varint_bytewise(out: &mut Vec<u8>, mut value: u128) {
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push((value & 0x7f) as u8);
}

/// Appends how a number differs from another, modulo 2^64: one that is near takes few bytes.
#[inline]
pub(crate) fn put_difference(out: &mut Vec<u8>, value: u64, from: u64) {
    let step = value.wrapping_sub(from).cast_signed();
    put_varint(out, ((step << 1) ^ (step >> 63)).cast_unsigned());
}

/// How many bytes [`put_varint`] appends.
#[inline]
pub(crate) fn varint_bytes(value: u64) -> usize {
    (u64::BITS - (value | 1).leading_zeros()).div_ceil(7) as usize
}

/// Maps signed to unsigned so that small magnitudes stay small: to no more than twice as much.
fn zigzag(value: i128) -> u128 {
    ((value << 1) ^ (value >> 127)).cast_unsigned()
}

fn unzigzag(value: u128) -> i128 {
    (value >> 1).cast_signed() ^ -((value & 1).cast_signed())
}

/// The most bytes that a group of sums takes beside these: quota 3, window 7, count 10.
pub(crate) const GROUP_BYTES_MAX: usize = 20;
/// The most bytes that one sum can take, with a group of its own: count 1, user 10, amount 19.
pub(crate) const SUM_BYTES_MAX: usize = 40;

/// Encodes sums that ascend strictly by key, in groups of one quota and window:
/// `quota, window, count, count x (user - previous user, amount)`, all varints; the amount zigzag.
pub(crate) fn put_sums(out: &mut Vec<u8>, sums: &[Sum]) {
    for group in sums.chunk_by(|a, b| a.key.place() == b.key.place()) {
        let Some(first) = group.first() else { continue };
        let sums = group.iter().map(|sum| (sum.key.user, sum.amount));
        put_group(out, first.key.place(), group.len(), sums);
    }
}

/// What [`put_sums`] appends.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn encoded_sums(sums: &[Sum]) -> Vec<u8> {
    let mut out = Vec::new();
    put_sums(&mut out, sums);
    out
}

/// Encodes the sums of one quota and window, see [`SumKey::place`]: so many, at least one, by users
/// who ascend strictly. Groups ascend, too.
pub(crate) fn put_group<A: Into<i128>>(
    out: &mut Vec<u8>,
    place: u64,
    count: usize,
    sums: impl Iterator<Item = (u64, A)>,
) {
    let SumKey { quota, window, .. } = SumKey::at(place, 0);
    put_varint(out, u64::from(quota.as_u16()));
    put_varint(out, window.0);
    put_varint(out, count as u64);
    let mut previous = 0;
    for (user, amount) in sums {
        put_varint(out, user.wrapping_sub(previous));
        put_varint_wide(out, zigzag(amount.into()));
        previous = user;
    }
}

/// Decodes what [`put_sums`] wrote, one at a time, to the end of the input.
#[derive(Debug, Clone)]
pub(crate) struct Sums<'a> {
    input: Input<'a>,
    quota: QuotaId,
    window: WindowStart,
    user: u64,
    left_in_group: usize,
    last: Option<SumKey>,
}

impl<'a> Sums<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self {
            input: Input::new(bytes),
            quota: QuotaId(0),
            window: WindowStart(0),
            user: 0,
            left_in_group: 0,
            last: None,
        }
    }

    /// The next sum; `None` at the end. After an error the rest is not to be used.
    pub(crate) fn next_sum(&mut self) -> DecodeResult<Option<Sum>> {
        let first_of_group = self.left_in_group == 0;
        if first_of_group {
            if self.input.is_empty() {
                return Ok(None);
            }
            let quota = u16::try_from(self.input.varint()?).map_err(|_| "a quota above 65535")?;
            self.quota = QuotaId(quota);
            self.window = WindowStart(self.input.varint()?);
            if self.window > WindowStart::MAX {
                return Err("a window beyond 48 bits");
            }
            self.left_in_group = self.input.count(2)?;
            if self.left_in_group == 0 {
                return Err("an empty group of sums");
            }
            self.user = 0;
        }
        let step = self.input.varint()?;
        self.user = self.user.checked_add(step).ok_or("a user above 64 bits")?;
        let amount = unzigzag(self.input.varint_wide()?);
        self.left_in_group -= 1;
        let key = SumKey { quota: self.quota, window: self.window, user: self.user };
        if self.last.is_some_and(|last| last >= key) {
            return Err("sums out of order");
        }
        self.last = Some(key);
        Ok(Some(Sum { key, amount }))
    }
}

impl Iterator for Sums<'_> {
    type Item = DecodeResult<Sum>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_sum().transpose()
    }
}

/// The most bytes that one piece of cold data may take.
const COLD_BYTES_MAX: usize = 64 << 20;

/// No type of cold data takes more memory than this for each encoded byte.
const MEMORY_PER_BYTE: usize = 32;

/// Encodes cold data (definitions, limits, manifests) with bincode.
pub(crate) fn encode_cold<T: Encode>(value: &T) -> DecodeResult<Vec<u8>> {
    let bytes = bincode::encode_to_vec(value, bincode::config::standard())
        .map_err(|_| "cold data that bincode can't encode")?;
    if bytes.len() > COLD_BYTES_MAX { Err("cold data above 64 MiB") } else { Ok(bytes) }
}

/// How many bytes [`encode_cold`] makes of it.
pub(crate) fn encoded_len<T: Encode>(value: &T) -> DecodeResult<usize> {
    let config = bincode::config::standard();
    let mut encoder = EncoderImpl::new(SizeWriter::default(), config);
    value.encode(&mut encoder).map_err(|_| "cold data that bincode can't encode")?;
    Ok(encoder.into_writer().bytes_written)
}

/// Decodes cold data; all of the input must be used.
///
/// What is allocated is bounded by a multiple of the input: a damaged count must not make a small
/// file ask for as much as the largest one may. Bincode wants the bound at compile time, so it goes
/// in steps.
pub(crate) fn decode_cold<T: Decode<()>>(bytes: &[u8]) -> DecodeResult<T> {
    const KIB: usize = 1 << 10;
    match bytes.len() {
        len if len <= KIB => decode_within::<T, { MEMORY_PER_BYTE * KIB }>(bytes),
        len if len <= 8 * KIB => decode_within::<T, { MEMORY_PER_BYTE * 8 * KIB }>(bytes),
        len if len <= 64 * KIB => decode_within::<T, { MEMORY_PER_BYTE * 64 * KIB }>(bytes),
        len if len <= 512 * KIB => decode_within::<T, { MEMORY_PER_BYTE * 512 * KIB }>(bytes),
        len if len <= 4096 * KIB => decode_within::<T, { MEMORY_PER_BYTE * 4096 * KIB }>(bytes),
        len if len <= COLD_BYTES_MAX => decode_within::<T, { 16 * COLD_BYTES_MAX }>(bytes),
        _ => Err("cold data above 64 MiB"),
    }
}

fn decode_within<T: Decode<()>, const LIMIT: usize>(bytes: &[u8]) -> DecodeResult<T> {
    let config = bincode::config::standard().with_limit::<LIMIT>();
    match bincode::decode_from_slice(bytes, config) {
        Ok((value, used)) if used == bytes.len() => Ok(value),
        Ok(_) => Err("cold data with bytes left over"),
        Err(_) => Err("cold data that bincode can't decode"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sum(quota: u16, window: u64, user: u64, amount: i128) -> Sum {
        Sum { key: SumKey { quota: QuotaId(quota), window: WindowStart(window), user }, amount }
    }

    #[test]
    fn sums_at_their_bounds_round_trip_within_the_stated_size() {
        let extreme = [sum(u16::MAX, WindowStart::MAX.0, u64::MAX, i128::MIN)];
        let mut bytes = Vec::new();
        put_sums(&mut bytes, &extreme);
        assert!(bytes.len() <= SUM_BYTES_MAX, "{} bytes", bytes.len());
        assert_eq!(Sums::new(&bytes).collect::<Result<Vec<_>, _>>().unwrap(), extreme);
    }

    #[test]
    fn a_dense_run_takes_three_bytes_a_sum() {
        let sums: Vec<_> = (0..1000).map(|user| sum(1, 1_700_000_000_000, user, 100)).collect();
        let mut bytes = Vec::new();
        put_sums(&mut bytes, &sums);
        assert!(bytes.len() <= 3 * sums.len() + 16, "{} bytes", bytes.len());
    }

    #[test]
    fn unordered_repeated_and_empty_runs_are_refused() {
        let encode = |sums: &[Sum]| {
            let mut bytes = Vec::new();
            put_sums(&mut bytes, sums);
            bytes
        };
        let descending = encode(&[sum(2, 0, 1, 1), sum(1, 0, 1, 1)]);
        assert_eq!(Sums::new(&descending).last().unwrap(), Err("sums out of order"));
        let repeated = [encode(&[sum(1, 0, 1, 1)]), encode(&[sum(1, 0, 1, 1)])].concat();
        assert_eq!(Sums::new(&repeated).last().unwrap(), Err("sums out of order"));
        assert_eq!(Sums::new(&[1, 1, 0]).next(), Some(Err("an empty group of sums")));
        assert_eq!(Sums::new(&[1, 1, 200, 1, 1, 1]).next(), Some(Err("a count above the input")));
    }

    #[test]
    fn overlong_varints_are_refused() {
        assert_eq!(
            Input::new(&[0x80, 0]).varint(),
            Err("a varint that is not in its shortest form")
        );
        assert_eq!(Input::new(&[0xff; 20]).varint(), Err("a varint above 128 bits"));
        assert_eq!(Input::new(&[0x80]).varint(), Err("cut short"));
    }

    proptest! {
        #[test]
        fn varints_round_trip(value: u128) {
            let mut bytes = Vec::new();
            put_varint_wide(&mut bytes, value);
            let mut input = Input::new(&bytes);
            prop_assert_eq!(input.varint_wide(), Ok(value));
            prop_assert!(input.is_empty());
            if let Ok(value) = u64::try_from(value >> (value % 128)) {
                bytes.clear();
                put_varint(&mut bytes, value);
                prop_assert_eq!(bytes.len(), varint_bytes(value));
            }
        }

        /// Of arbitrary bytes and of varints of every length, whether or not more bytes follow.
        #[test]
        fn a_varint_is_the_same_at_once_as_byte_by_byte(
            value: u64,
            bits in 0..64_u32,
            flip in proptest::option::of((0..10_usize, any::<u8>())),
            rest in proptest::collection::vec(prop_oneof![Just(0), Just(0x80), any::<u8>()], 0..12),
        ) {
            let mut bytewise = Vec::new();
            put_varint_bytewise(&mut bytewise, (value >> bits).into());
            let mut bytes = Vec::new();
            put_varint(&mut bytes, value >> bits);
            prop_assert_eq!(&bytes, &bytewise);
            bytes.extend(rest);
            if let Some((at, byte)) = flip && let Some(place) = bytes.get_mut(at) {
                *place = byte;
            }
            let (mut at_once, mut by_byte) = (Input::new(&bytes), Input::new(&bytes));
            let (found, expected) = (at_once.varint_wide(), by_byte.varint_bytewise());
            prop_assert_eq!(found, expected);
            if expected.is_ok() {
                prop_assert_eq!(at_once.remaining(), by_byte.remaining());
            }
        }

        #[test]
        fn differences_round_trip_and_are_short_where_they_are_small(from: u64, by: u64) {
            for (value, bytes_max) in [(by, 10), (from.wrapping_add(by % 64), 1)] {
                for (value, from) in [(value, from), (from, value)] {
                    let mut bytes = Vec::new();
                    put_difference(&mut bytes, value, from);
                    prop_assert!(bytes.len() <= bytes_max);
                    let mut input = Input::new(&bytes);
                    prop_assert_eq!(input.difference(from), Ok(value));
                    prop_assert!(input.is_empty());
                }
            }
        }

        #[test]
        fn sums_round_trip(entries in proptest::collection::btree_map(
            (0_u16..4, 0_u64..4, any::<u64>()), any::<i128>(), 0..200)
        ) {
            let sums: Vec<_> =
                entries.into_iter().map(|((q, w, u), amount)| sum(q, w, u, amount)).collect();
            let mut bytes = Vec::new();
            put_sums(&mut bytes, &sums);
            prop_assert_eq!(Sums::new(&bytes).collect::<Result<Vec<_>, _>>().unwrap(), sums);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let decoded = Sums::new(&bytes).take_while(Result::is_ok).count();
            prop_assert!(decoded <= bytes.len());
        }
    }
}
