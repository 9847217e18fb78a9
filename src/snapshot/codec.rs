//! A snapshot's bytes: header and blocks. Pure codec.
//!
//! A file is a header, a manifest (see [`Manifest`](super::Manifest)) and blocks, without gaps:
//! first the blocks of events, then of sums, then of limits. All numbers are little-endian. The
//! header is written last:
//!
//! ```text
//! offset  size  field
//!      0     4  magic "TGS1"
//!      4     4  format version (3; in files of version 2 each event is encoded on its own, files
//!               of version 1 have no events, and zeros in their place)
//!      8    16  engine id
//!     24     8  number of the last batch contained, as in the name
//!     32     4  check of that batch
//!     36     4  CRC32 of: engine id, number, the manifest's bytes
//!     40     8  manifest length in bytes
//!     48     8  count of blocks
//!     56     8  count of sums
//!     64     8  count of limits
//!     72     8  length of the whole file in bytes
//!     80     8  count of events
//!     88   420  zero
//!    508     4  CRC32 of bytes 0..508
//! ```
//!
//! Magic, version and the final CRC32 keep their places in every version, so that damage is not
//! taken for another version. A block:
//!
//! ```text
//! offset  size  field
//!      0     4  kind: 1 = sums, 2 = limits, 3 = events
//!      4     4  payload length in bytes: 1..=65536
//!      8     8  index: 0 for the first block of the file
//!     16     4  CRC32 of: engine id, number, bytes 0..16, the payload
//!     20     -  payload
//! ```
//!
//! A payload of sums is what [`put_sums`] writes; a payload of limits is a sequence of
//! `quota, user, limit` in varints. Keys ascend strictly, across blocks too. A payload of events is
//! what an [`EventWriter`](crate::ledger::EventWriter) holds, in any order; each block is
//! decoded on its own.
#![deny(clippy::indexing_slicing)]

use crate::codec::{DecodeResult, Input, put_sums, put_varint};
use crate::fold::Sum;
use crate::journal::writer::ChainPoint;
use crate::ledger::EVENT_BYTES_MIN;
use crate::model::{AMOUNT_MAX, BatchNumber, EngineId, QuotaId};
use crate::numbers::NUMBER_MAX;

/// The size of the header: the manifest begins here.
pub(super) const HEADER_BYTES: usize = 512;
/// The size of what stands before a block's payload.
pub(super) const BLOCK_HEADER_BYTES: usize = 20;
/// The largest payload of a block.
pub(super) const BLOCK_BYTES_MAX: usize = 64 << 10;
/// The most bytes that one limit takes: quota 3, user 10, limit 9.
pub(super) const LIMIT_BYTES_MAX: usize = 22;
/// The version that is written. All before it are read too.
pub(super) const VERSION: u32 = 3;

const MAGIC: [u8; 4] = *b"TGS1";
const CHECKED_BYTES: usize = HEADER_BYTES - 4;
const ZERO_BYTES: usize = 420;
const BLOCK_FIELDS_BYTES: usize = BLOCK_HEADER_BYTES - 4;
/// No sum takes less: a byte for the user, a byte for the amount.
const SUM_BYTES_MIN: u64 = 2;
/// No limit takes less: a byte each for quota, user and limit.
const LIMIT_BYTES_MIN: u64 = 3;
const _: () = assert!(4 + 4 + 16 + 8 + 4 + 4 + 8 * 6 + ZERO_BYTES == CHECKED_BYTES);
const _: () = assert!(4 + 4 + 8 == BLOCK_FIELDS_BYTES);

/// A user's own limit for a quota.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limit {
    pub(crate) quota: QuotaId,
    pub(crate) user: u64,
    pub(crate) limit: u64,
}

impl Limit {
    /// What limits are sorted by.
    pub(super) fn key(&self) -> (QuotaId, u64) {
        (self.quota, self.user)
    }
}

/// How much a file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Counts {
    pub(super) blocks: u64,
    pub(super) events: u64,
    pub(super) sums: u64,
    pub(super) limits: u64,
}

/// The fields of a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    /// The last batch contained.
    pub(super) point: ChainPoint,
    pub(super) manifest_crc: u32,
    pub(super) manifest_len: u64,
    pub(super) counts: Counts,
    pub(super) file_len: u64,
}

/// Why bytes are no header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HeaderError {
    /// Another format version.
    Version(u32),
    /// Damage, or another data directory's.
    Bad(&'static str),
}

impl From<&'static str> for HeaderError {
    fn from(reason: &'static str) -> Self {
        Self::Bad(reason)
    }
}

impl Header {
    pub(super) fn encode(&self, engine: EngineId) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&engine.0.to_le_bytes());
        bytes.extend_from_slice(&self.point.number.0.to_le_bytes());
        bytes.extend_from_slice(&self.point.check.to_le_bytes());
        bytes.extend_from_slice(&self.manifest_crc.to_le_bytes());
        let Counts { blocks, events, sums, limits } = self.counts;
        for field in [self.manifest_len, blocks, sums, limits, self.file_len, events] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        bytes.extend_from_slice(&[0; ZERO_BYTES]);
        let crc = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&crc.to_le_bytes());
        debug_assert_eq!(bytes.len(), HEADER_BYTES);
        bytes
    }

    pub(super) fn decode(
        engine: EngineId,
        bytes: &[u8; HEADER_BYTES],
    ) -> Result<Self, HeaderError> {
        if *bytes == [0; HEADER_BYTES] {
            return Err("its header was never written".into());
        }
        let mut input = Input::new(bytes);
        if input.array()? != MAGIC {
            return Err("it does not begin like a snapshot".into());
        }
        let version = input.u32()?;
        let owner = EngineId(input.u128()?);
        let number = BatchNumber(input.u64()?);
        let check = input.u32()?;
        let manifest_crc = input.u32()?;
        let manifest_len = input.u64()?;
        let (blocks, sums, limits) = (input.u64()?, input.u64()?, input.u64()?);
        let file_len = input.u64()?;
        let counts = Counts { blocks, events: input.u64()?, sums, limits };
        let zeros: [u8; ZERO_BYTES] = input.array()?;
        if crc32fast::hash(bytes.split_at(CHECKED_BYTES).0) != input.u32()? {
            return Err("its header's checksum does not match".into());
        }
        // The fields of another version may mean anything; up to here nothing depends on them.
        if !(1..=VERSION).contains(&version) {
            return Err(HeaderError::Version(version));
        }
        if owner != engine {
            return Err("it belongs to another data directory".into());
        }
        let point = ChainPoint { number, check };
        let header = Self { point, manifest_crc, manifest_len, counts, file_len };
        let has_unknown_events = version == 1 && counts.events > 0;
        if has_unknown_events
            || zeros != [0; ZERO_BYTES]
            || !(1..=NUMBER_MAX).contains(&number.0)
            || !header.fits_its_file()
        {
            return Err("its header can't have been written like this".into());
        }
        Ok(header)
    }

    /// Whose file it is, by a header whose checksum matches.
    pub(super) fn owner(bytes: &[u8; HEADER_BYTES]) -> Option<EngineId> {
        let mut input = Input::new(bytes);
        let is_ours = input.array().ok()? == MAGIC && (1..=VERSION).contains(&input.u32().ok()?);
        let owner = EngineId(input.u128().ok()?);
        let (checked, crc) = bytes.split_at(CHECKED_BYTES);
        let matches = Input::new(crc).u32().ok()? == crc32fast::hash(checked);
        (is_ours && matches).then_some(owner)
    }

    /// Whether the file is long enough for what the header says it holds, so that the counts may
    /// size allocations.
    fn fits_its_file(&self) -> bool {
        let Counts { blocks, events, sums, limits } = self.counts;
        let blocks_len = self
            .file_len
            .checked_sub(HEADER_BYTES as u64)
            .and_then(|rest| rest.checked_sub(self.manifest_len));
        let least = [(blocks, BLOCK_HEADER_BYTES as u64 + 1)];
        let entries = [(events, EVENT_BYTES_MIN), (sums, SUM_BYTES_MIN), (limits, LIMIT_BYTES_MIN)];
        let least = least.into_iter().chain(entries);
        blocks_len.is_some_and(|len| {
            least.into_iter().all(|(count, unit)| count.checked_mul(unit).is_some_and(|n| n <= len))
        })
    }
}

/// What each checksum in a file covers besides the bytes: which file of which data directory it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Binding {
    engine: EngineId,
    number: BatchNumber,
}

impl Binding {
    pub(super) fn new(engine: EngineId, number: BatchNumber) -> Self {
        Self { engine, number }
    }

    pub(super) fn manifest_crc(self, manifest: &[u8]) -> u32 {
        self.crc(&[], manifest)
    }

    fn crc(self, fields: &[u8], payload: &[u8]) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&self.engine.0.to_le_bytes());
        hasher.update(&self.number.0.to_le_bytes());
        hasher.update(fields);
        hasher.update(payload);
        hasher.finalize()
    }
}

/// What a block holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BlockKind {
    Sums,
    Limits,
    Events,
}

impl BlockKind {
    fn number(self) -> u32 {
        match self {
            Self::Sums => 1,
            Self::Limits => 2,
            Self::Events => 3,
        }
    }
}

/// Appends a block of sums that ascend strictly.
pub(super) fn put_sums_block(
    out: &mut Vec<u8>,
    binding: Binding,
    index: u64,
    sums: &[Sum],
) -> DecodeResult<()> {
    put_block(out, binding, BlockKind::Sums, index, |out| put_sums(out, sums))
}

/// Appends a block of limits that ascend strictly.
pub(super) fn put_limits_block(
    out: &mut Vec<u8>,
    binding: Binding,
    index: u64,
    limits: &[Limit],
) -> DecodeResult<()> {
    put_block(out, binding, BlockKind::Limits, index, |out| {
        for limit in limits {
            put_varint(out, u64::from(limit.quota.as_u16()));
            put_varint(out, limit.user);
            put_varint(out, limit.limit);
        }
    })
}

/// Appends a block of encoded events.
pub(super) fn put_events_block(
    out: &mut Vec<u8>,
    binding: Binding,
    index: u64,
    events: &[u8],
) -> DecodeResult<()> {
    put_block(out, binding, BlockKind::Events, index, |out| out.extend_from_slice(events))
}

fn put_block(
    out: &mut Vec<u8>,
    binding: Binding,
    kind: BlockKind,
    index: u64,
    put_payload: impl FnOnce(&mut Vec<u8>),
) -> DecodeResult<()> {
    let start = out.len();
    out.extend_from_slice(&[0; BLOCK_HEADER_BYTES]);
    put_payload(out);
    let (head, payload) = out.split_at_mut(start).1.split_at_mut(BLOCK_HEADER_BYTES);
    if !(1..=BLOCK_BYTES_MAX).contains(&payload.len()) {
        return Err("a block outside its bounds");
    }
    let len = u32::try_from(payload.len()).map_err(|_| "a block outside its bounds")?;
    let mut fields = Vec::with_capacity(BLOCK_HEADER_BYTES);
    fields.extend_from_slice(&kind.number().to_le_bytes());
    fields.extend_from_slice(&len.to_le_bytes());
    fields.extend_from_slice(&index.to_le_bytes());
    let crc = binding.crc(&fields, payload);
    fields.extend_from_slice(&crc.to_le_bytes());
    head.copy_from_slice(&fields);
    Ok(())
}

/// What stands before a block's payload.
#[derive(Debug, Clone, Copy)]
pub(super) struct BlockHeader {
    pub(super) kind: BlockKind,
    /// Within the bounds of a payload.
    pub(super) len: usize,
    fields: [u8; BLOCK_FIELDS_BYTES],
    crc: u32,
}

impl BlockHeader {
    /// Decodes the header of block `index`. It is not verified before [`verify`](Self::verify) is.
    pub(super) fn decode(bytes: &[u8], index: u64) -> DecodeResult<Self> {
        let mut input = Input::new(bytes);
        let fields: [u8; BLOCK_FIELDS_BYTES] = input.array()?;
        let crc = input.u32()?;
        let mut input = Input::new(&fields);
        let kind = match input.u32()? {
            1 => BlockKind::Sums,
            2 => BlockKind::Limits,
            3 => BlockKind::Events,
            _ => return Err("a block of an unknown kind"),
        };
        let len = usize::try_from(input.u32()?).map_err(|_| "a block outside its bounds")?;
        if !(1..=BLOCK_BYTES_MAX).contains(&len) {
            return Err("a block outside its bounds");
        }
        if input.u64()? != index {
            return Err("a block in another's place");
        }
        Ok(Self { kind, len, fields, crc })
    }

    pub(super) fn verify(&self, binding: Binding, payload: &[u8]) -> DecodeResult<()> {
        if binding.crc(&self.fields, payload) != self.crc {
            return Err("a block whose checksum does not match");
        }
        Ok(())
    }
}

/// For fuzzing: makes length, index and checksum of the block that begins here right, and says how
/// long it is.
#[cfg(feature = "fuzzing")]
pub(super) fn reseal_block(blocks: &mut [u8], binding: Binding, index: u64) -> usize {
    let Some((head, rest)) = blocks.split_first_chunk_mut::<BLOCK_HEADER_BYTES>() else { return 0 };
    let (fields, crc) = head.split_at_mut(BLOCK_FIELDS_BYTES);
    let mut input = Input::new(fields);
    let kind = input.u32().unwrap_or_default() % 4;
    let len = usize::try_from(input.u32().unwrap_or_default()).unwrap_or_default();
    let len = len.clamp(1, rest.len().min(BLOCK_BYTES_MAX));
    let mut anew = Vec::with_capacity(BLOCK_FIELDS_BYTES);
    anew.extend_from_slice(&kind.to_le_bytes());
    anew.extend_from_slice(&u32::try_from(len).unwrap_or_default().to_le_bytes());
    anew.extend_from_slice(&index.to_le_bytes());
    fields.copy_from_slice(&anew);
    crc.copy_from_slice(&binding.crc(fields, rest.split_at(len).0).to_le_bytes());
    BLOCK_HEADER_BYTES + len
}

/// For fuzzing: what a header says, unverified: the manifest's length, the counts, the check.
#[cfg(feature = "fuzzing")]
pub(super) fn header_fields(bytes: &[u8; HEADER_BYTES]) -> (u64, Counts, u32) {
    let mut input = Input::new(bytes.split_at(32).1);
    let mut fields = || -> DecodeResult<_> {
        let (check, _manifest_crc) = (input.u32()?, input.u32()?);
        let manifest_len = input.u64()?;
        let (blocks, sums, limits) = (input.u64()?, input.u64()?, input.u64()?);
        let _file_len = input.u64()?;
        let counts = Counts { blocks, events: input.u64()?, sums, limits };
        Ok((manifest_len, counts, check))
    };
    fields().unwrap_or_default()
}

/// Decodes a payload of limits into `out`, which is cleared first. `last` is the last key before
/// it.
pub(super) fn decode_limits(
    payload: &[u8],
    mut last: Option<(QuotaId, u64)>,
    out: &mut Vec<Limit>,
) -> DecodeResult<()> {
    out.clear();
    let mut input = Input::new(payload);
    while !input.is_empty() {
        let quota = u16::try_from(input.varint()?).map_err(|_| "a quota above 65535")?;
        let limit = Limit { quota: QuotaId(quota), user: input.varint()?, limit: input.varint()? };
        if limit.limit > AMOUNT_MAX {
            return Err("a limit above 2^63 - 1");
        }
        if last.is_some_and(|last| last >= limit.key()) {
            return Err("limits out of order");
        }
        last = Some(limit.key());
        out.push(limit);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENGINE: EngineId = EngineId(7);

    fn header() -> Header {
        Header {
            point: ChainPoint { number: BatchNumber(9), check: 5 },
            manifest_crc: 1,
            manifest_len: 100,
            counts: Counts { blocks: 1, sums: 4, ..Counts::default() },
            file_len: 1000,
        }
    }

    fn bytes_of(header: &Header) -> [u8; HEADER_BYTES] {
        header.encode(ENGINE).try_into().unwrap()
    }

    fn resealed(mut bytes: [u8; HEADER_BYTES]) -> [u8; HEADER_BYTES] {
        let crc = crc32fast::hash(bytes.split_at(CHECKED_BYTES).0);
        bytes.split_at_mut(CHECKED_BYTES).1.copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    #[test]
    fn a_header_round_trips() {
        assert_eq!(Header::decode(ENGINE, &bytes_of(&header())), Ok(header()));
    }

    #[test]
    fn another_version_is_told_from_damage_by_the_checksum() {
        let mut bytes = bytes_of(&header());
        *bytes.get_mut(4).unwrap() = 4;
        let damaged = Header::decode(ENGINE, &bytes);
        assert_eq!(damaged, Err(HeaderError::Bad("its header's checksum does not match")));
        assert_eq!(Header::decode(ENGINE, &resealed(bytes)), Err(HeaderError::Version(4)));
    }

    #[test]
    fn counts_that_the_file_has_no_room_for_are_refused() {
        let room = |counts, file_len| {
            let header = Header { counts, file_len, ..header() };
            Header::decode(ENGINE, &bytes_of(&header)).is_ok()
        };
        let none = Counts::default();
        assert!(room(none, 612) && !room(none, 611));
        assert!(
            room(Counts { blocks: 1, ..none }, 633) && !room(Counts { blocks: 1, ..none }, 632)
        );
        assert!(room(Counts { sums: 2, ..none }, 616) && !room(Counts { sums: 2, ..none }, 615));
        assert!(!room(Counts { sums: u64::MAX, ..none }, u64::MAX));
        assert!(!room(Counts { limits: u64::MAX / 3, ..none }, 1 << 40));
    }

    #[test]
    fn a_block_is_bound_to_directory_snapshot_and_place() {
        let limits = [Limit { quota: QuotaId(u16::MAX), user: u64::MAX, limit: AMOUNT_MAX }];
        let binding = Binding::new(ENGINE, BatchNumber(3));
        let mut bytes = Vec::new();
        put_limits_block(&mut bytes, binding, 6, &limits).unwrap();
        assert_eq!(bytes.len(), BLOCK_HEADER_BYTES + LIMIT_BYTES_MAX);
        let payload = bytes.split_at(BLOCK_HEADER_BYTES).1;

        let block = BlockHeader::decode(&bytes, 6).unwrap();
        assert_eq!(block.verify(binding, payload), Ok(()));
        let mut decoded = Vec::new();
        decode_limits(payload, None, &mut decoded).unwrap();
        assert_eq!(decoded, limits);
        assert!(decode_limits(payload, Some(limits[0].key()), &mut decoded).is_err());

        assert!(BlockHeader::decode(&bytes, 7).is_err());
        for other in
            [Binding::new(EngineId(8), BatchNumber(3)), Binding::new(ENGINE, BatchNumber(4))]
        {
            assert!(block.verify(other, payload).is_err());
        }
    }
}
