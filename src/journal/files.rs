//! The journal's files: names and headers. Pure.
//!
//! A file starts with a header of 64 bytes, little-endian, and batches follow it without gaps:
//!
//! ```text
//! offset  size  field
//!      0     4  magic "TGJ1"
//!      4     4  format version (3; in files of version 2 each event of a ledger is encoded on its
//!               own, in files of version 1 no batch has a ledger)
//!      8     8  sequence number, as in the name
//!     16    16  engine id
//!     32     8  state: 0 = prepared, holds nothing yet; 1 = in use
//!     40     8  number of the last batch before this file: of that batch's file, everything up
//!               to it counts and nothing beyond
//!     48     4  check of that batch (0 when there is none)
//!     52     8  length of the file in bytes
//!     60     4  CRC32 of bytes 0..60
//! ```

use crate::codec::Input;
use crate::model::{BatchNumber, EngineId};
use crate::numbers::{NUMBER_MAX, number_in_name};

/// The size of a file's header: batches begin here.
pub(crate) const FILE_HEADER_BYTES: usize = 64;

const MAGIC: [u8; 4] = *b"TGJ1";
/// The version of the journal's format that this library writes. It reads all before it too.
pub(crate) const VERSION: u32 = 3;
const CHECKED_BYTES: usize = FILE_HEADER_BYTES - 4;
const _: () = assert!(4 + 4 + 8 + 16 + 8 + 8 + 4 + 8 == CHECKED_BYTES);
const _: () = assert!(FILE_HEADER_BYTES.is_multiple_of(super::batch::BATCH_ALIGN));

const PREFIX: &str = "journal-";
const SUFFIX: &str = ".tgj";
const TEMPORARY_SUFFIX: &str = ".tmp";
const DIGITS: usize = 20;

/// Numbers the journal's files in the order of their use; the first is 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct FileSequence(pub(crate) u64);

impl FileSequence {
    pub(crate) fn next(self) -> Self {
        Self(self.0 + 1)
    }

    /// The file's name.
    pub(crate) fn file_name(self) -> String {
        format!("{PREFIX}{:0DIGITS$}{SUFFIX}", self.0)
    }

    /// Under this name a file is written that counts only once it is complete and renamed.
    pub(crate) fn temporary_name(self) -> String {
        format!("{PREFIX}{:0DIGITS$}{TEMPORARY_SUFFIX}", self.0)
    }

    /// The sequence number in a file's name; `None` for other names.
    pub(crate) fn parse(name: &str) -> Option<Self> {
        Self::parse_with(name, SUFFIX)
    }

    /// Whether it is the name of a file that is being written.
    pub(crate) fn is_temporary(name: &str) -> bool {
        Self::parse_with(name, TEMPORARY_SUFFIX).is_some()
    }

    fn parse_with(name: &str, suffix: &str) -> Option<Self> {
        let digits = name.strip_prefix(PREFIX)?.strip_suffix(suffix)?;
        number_in_name(digits, DIGITS).map(Self)
    }
}

/// A file's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileHeader {
    /// Zero-written ahead of use.
    Prepared { sequence: FileSequence, bytes: u64 },
    /// Holds the batches after `previous`, whose check is given.
    InUse { sequence: FileSequence, bytes: u64, previous: BatchNumber, previous_check: u32 },
}

/// What a header's bytes can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeaderError {
    /// Another format version.
    Version(u32),
    /// Not a header of this journal.
    Bad(&'static str),
}

impl From<&'static str> for HeaderError {
    fn from(reason: &'static str) -> Self {
        Self::Bad(reason)
    }
}

impl FileHeader {
    pub(crate) fn sequence(&self) -> FileSequence {
        match *self {
            Self::Prepared { sequence, .. } | Self::InUse { sequence, .. } => sequence,
        }
    }

    /// The length of the file: a file that was cut between two batches ends like one that was never
    /// longer.
    pub(crate) fn bytes(&self) -> u64 {
        match *self {
            Self::Prepared { bytes, .. } | Self::InUse { bytes, .. } => bytes,
        }
    }

    pub(crate) fn encode(&self, engine: EngineId) -> [u8; FILE_HEADER_BYTES] {
        let (state, previous, previous_check) = match *self {
            Self::Prepared { .. } => (0_u64, BatchNumber::ZERO, 0),
            Self::InUse { previous, previous_check, .. } => (1, previous, previous_check),
        };
        let file_bytes = self.bytes();
        let mut bytes = Vec::with_capacity(FILE_HEADER_BYTES);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&self.sequence().0.to_le_bytes());
        bytes.extend_from_slice(&engine.0.to_le_bytes());
        bytes.extend_from_slice(&state.to_le_bytes());
        bytes.extend_from_slice(&previous.0.to_le_bytes());
        bytes.extend_from_slice(&previous_check.to_le_bytes());
        bytes.extend_from_slice(&file_bytes.to_le_bytes());
        let crc = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&crc.to_le_bytes());
        let mut header = [0; FILE_HEADER_BYTES];
        header.copy_from_slice(&bytes);
        header
    }

    pub(crate) fn decode(
        engine: EngineId,
        bytes: &[u8; FILE_HEADER_BYTES],
    ) -> Result<Self, HeaderError> {
        let header = Self::decode_fields(bytes)?;
        let (this, header) = header;
        if this == engine { Ok(header) } else { Err("a file of another data directory".into()) }
    }

    /// Whether the bytes are, except for one bit, this file's header in the state prepared. The
    /// checksum tells any two headers apart by more than two.
    pub(crate) fn is_prepared_but_for_a_bit(
        engine: EngineId,
        sequence: FileSequence,
        file_bytes: u64,
        bytes: &[u8; FILE_HEADER_BYTES],
    ) -> bool {
        let prepared = Self::Prepared { sequence, bytes: file_bytes };
        (0..FILE_HEADER_BYTES * 8).any(|bit| {
            let mut flipped = *bytes;
            if let Some(byte) = flipped.get_mut(bit / 8) {
                *byte ^= 1 << (bit % 8);
            }
            Self::decode(engine, &flipped) == Ok(prepared)
        })
    }

    /// For fuzzing: makes magic, engine and checksum right.
    #[cfg(feature = "fuzzing")]
    pub(crate) fn reseal(engine: EngineId, bytes: &mut [u8; FILE_HEADER_BYTES]) {
        let (fields, crc) = bytes.split_at_mut(CHECKED_BYTES);
        let given = [&MAGIC[..], fields.get(4..16).unwrap_or_default(), &engine.0.to_le_bytes()];
        let given = [&given.concat(), fields.get(32..).unwrap_or_default()].concat();
        fields.copy_from_slice(&given);
        crc.copy_from_slice(&crc32fast::hash(fields).to_le_bytes());
    }

    /// Whose file it is, by a header that verifies.
    pub(crate) fn owner(bytes: &[u8; FILE_HEADER_BYTES]) -> Option<EngineId> {
        Self::decode_fields(bytes).ok().map(|(engine, _)| engine)
    }

    fn decode_fields(bytes: &[u8; FILE_HEADER_BYTES]) -> Result<(EngineId, Self), HeaderError> {
        let mut input = Input::new(bytes);
        if input.array()? != MAGIC {
            return Err("no journal header".into());
        }
        let version = input.u32()?;
        let sequence = FileSequence(input.u64()?);
        let engine = EngineId(input.u128()?);
        let state = input.u64()?;
        let previous = BatchNumber(input.u64()?);
        let previous_check = input.u32()?;
        let file_bytes = input.u64()?;
        let crc = input.u32()?;
        if crc32fast::hash(bytes.split_at(CHECKED_BYTES).0) != crc {
            return Err("a journal header whose checksum does not match".into());
        }
        if !(1..=VERSION).contains(&version) {
            return Err(HeaderError::Version(version));
        }
        let is_possible = (1..=NUMBER_MAX).contains(&sequence.0) && previous.0 <= NUMBER_MAX;
        if file_bytes < FILE_HEADER_BYTES as u64 || !is_possible {
            return Err("a journal header that can't have been written".into());
        }
        match state {
            0 => Ok((engine, Self::Prepared { sequence, bytes: file_bytes })),
            1 => {
                let bytes = file_bytes;
                Ok((engine, Self::InUse { sequence, bytes, previous, previous_check }))
            }
            _ => Err("a journal header in an unknown state".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENGINE: EngineId = EngineId(0x1234_5678_9abc_def0_1122_3344_5566_7788);

    #[test]
    fn names_sort_by_sequence_and_parse_back() {
        let names: Vec<_> = [9, 10, 11].map(|n| FileSequence(n).file_name()).into();
        assert!(names.is_sorted());
        assert_eq!(FileSequence::parse(&names[1]), Some(FileSequence(10)));
        assert_eq!(FileSequence::parse(&FileSequence(u64::MAX).file_name()), None);
        for other in ["journal-1.tgj", "journal-0000000000000000000x.tgj", "journal-", "x"] {
            assert_eq!(FileSequence::parse(other), None, "{other}");
        }
    }

    #[test]
    fn headers_round_trip_and_no_flipped_bit_passes() {
        let headers = [
            FileHeader::Prepared { sequence: FileSequence(7), bytes: 64 << 10 },
            FileHeader::InUse {
                sequence: FileSequence(8),
                bytes: 1 << 40,
                previous: BatchNumber(99),
                previous_check: 0xdead_beef,
            },
        ];
        for header in headers {
            let bytes = header.encode(ENGINE);
            assert_eq!(FileHeader::decode(ENGINE, &bytes), Ok(header));
            assert!(FileHeader::decode(EngineId(1), &bytes).is_err());
            let is_prepared = |bytes: &[u8; FILE_HEADER_BYTES]| {
                let (sequence, len) = (header.sequence(), header.bytes());
                FileHeader::is_prepared_but_for_a_bit(ENGINE, sequence, len, bytes)
            };
            for bit in 0..bytes.len() * 8 {
                let mut flipped = bytes;
                flipped[bit / 8] ^= 1 << (bit % 8);
                assert!(FileHeader::decode(ENGINE, &flipped).is_err(), "bit {bit}");
                let was_prepared = matches!(header, FileHeader::Prepared { .. });
                assert_eq!(is_prepared(&flipped), was_prepared, "bit {bit}");
            }
            assert!(!is_prepared(&[0; FILE_HEADER_BYTES]));
        }
    }
}
