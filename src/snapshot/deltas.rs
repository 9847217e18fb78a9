//! The sums of a range of batches in one file, for a sink that has not got them when the journal is
//! released; and the recorded events, if it wants events. The blocks are as in a snapshot, after a
//! header of a different layout.
//!
//! The header, 96 bytes, little-endian, written last:
//!
//! ```text
//! offset  size  field
//!      0     4  magic "TGD1"
//!      4     4  format version (2; files of version 1 have no events, and zeros in their place)
//!      8    16  engine id
//!     24     8  number of the batch that the range begins behind; 0: the sums are totals
//!     32     8  number of the last batch of the range
//!     40     4  check of the batch that the range begins behind; 0 for totals
//!     44     4  check of the last batch
//!     48     8  count of blocks
//!     56     8  count of sums
//!     64     8  length of the whole file in bytes
//!     72     8  count of events
//!     80     8  bytes of the events' payloads
//!     88     4  zero
//!     92     4  CRC32 of bytes 0..92
//! ```
#![deny(clippy::indexing_slicing)]

use std::sync::Arc;

use crate::codec::{DecodeResult, Input};
use crate::error::{Error, Result};
use crate::fold::Sum;
use crate::journal::writer::ChainPoint;
use crate::ledger::{EVENT_BYTES_MIN, LedgerEvent, Recorded};
use crate::model::{BatchNumber, EngineId};
#[cfg(feature = "fuzzing")]
use crate::snapshot::codec::reseal_block;
use crate::snapshot::codec::{BLOCK_BYTES_MAX, BLOCK_HEADER_BYTES, Binding, Counts};
use crate::snapshot::merge::SumSource;
use crate::snapshot::reader::{BlockReader, ContentReader};
use crate::snapshot::writer::{ContentWriter, SYNC_BYTES};
use crate::storage::Storage;
use crate::storage::TemporaryFile;

const HEADER_BYTES: usize = 96;
const CHECKED_BYTES: usize = HEADER_BYTES - 4;
const ZERO_BYTES: usize = 4;
const _: () = assert!(4 + 4 + 16 + 8 + 8 + 4 + 4 + 8 * 5 + ZERO_BYTES == CHECKED_BYTES);
const MAGIC: [u8; 4] = *b"TGD1";
/// The version that is written. The one before it is read too.
const VERSION: u32 = 2;

/// The batches behind `from` up to `to`; without `from` all that was counted up to `to`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DeltaRange {
    pub(crate) from: Option<ChainPoint>,
    pub(crate) to: ChainPoint,
}

/// The fields of a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Header {
    range: DeltaRange,
    blocks: u64,
    sums: u64,
    file_len: u64,
    events: u64,
    payload_bytes: u64,
}

/// Writes one file. Dropped before it is finished, it leaves nothing behind.
#[derive(Debug)]
pub(crate) struct DeltasWriter {
    engine: EngineId,
    range: DeltaRange,
    payload_bytes: u64,
    content: ContentWriter,
}

impl DeltasWriter {
    /// Begins the file under a temporary name.
    pub(crate) fn create(
        storage: &Arc<dyn Storage>,
        engine: EngineId,
        range: DeltaRange,
        temporary_name: String,
    ) -> Result<Self> {
        let file = TemporaryFile::create(storage, temporary_name)?;
        let binding = Binding::new(engine, range.to.number);
        let mut content = ContentWriter::new(file, binding, BLOCK_BYTES_MAX);
        content.sync_bytes = SYNC_BYTES;
        // The header's place, until it is known.
        content.buffer.resize(HEADER_BYTES, 0);
        Ok(Self { engine, range, payload_bytes: 0, content })
    }

    /// Writes an event; all events come before the first sum.
    pub(crate) fn write_event(&mut self, event: Recorded) -> Result<()> {
        self.payload_bytes += event.payload.len() as u64;
        self.content.write_event(&LedgerEvent::Recorded(event))
    }

    /// Writes a sum whose key is above those before it.
    pub(crate) fn write_sum(&mut self, sum: Sum) -> Result<()> {
        self.content.write_sum(sum)
    }

    /// How many bytes were written since this was last asked.
    pub(crate) fn take_bytes_written(&mut self) -> u64 {
        std::mem::take(self.content.progress()).bytes_written
    }

    /// Completes the file, and makes it durable under its name.
    pub(crate) fn finish(mut self, name: &str) -> Result<()> {
        let (counts, file_len) = self.content.flush()?;
        let Counts { blocks, sums, events, .. } = counts;
        let (range, payload_bytes) = (self.range, self.payload_bytes);
        let header = Header { range, blocks, sums, file_len, events, payload_bytes };
        let file = self.content.file;
        file.write(&header.encode(self.engine), 0)?;
        file.publish(name)
    }
}

/// Reads one file: its events, then its sums, ascending by key. After an error it must not be used
/// further.
#[derive(Debug)]
pub(crate) struct DeltasReader {
    bytes: u64,
    payload_bytes: u64,
    content: ContentReader,
}

impl DeltasReader {
    /// Opens the file and verifies its header, which must be of this range.
    pub(crate) fn open(
        storage: &Arc<dyn Storage>,
        engine: EngineId,
        range: DeltaRange,
        name: &str,
    ) -> Result<Self> {
        let path = storage.path(name);
        let damaged = |offset: u64, reason: &str| Error::damaged(&path, offset, reason);
        let io = |error| Error::io("read", &path, error);
        let file = match storage.open(name) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(damaged(0, "it is missing"));
            }
            Err(error) => return Err(Error::io("open", &path, error)),
        };
        let len = file.len().map_err(io)?;
        if len < HEADER_BYTES as u64 {
            return Err(damaged(len, "it is too short for its header"));
        }
        let mut bytes = [0; HEADER_BYTES];
        file.read_exact_at(&mut bytes, 0).map_err(io)?;
        let (version, owner, header) =
            Header::decode(&bytes).map_err(|reason| damaged(0, reason))?;
        if !(1..=VERSION).contains(&version) {
            let (path, found) = (path.clone(), version);
            return Err(Error::UnsupportedVersion { path, found, supported: VERSION });
        }
        if owner != engine {
            return Err(damaged(0, "it belongs to another data directory"));
        }
        if header.range != range {
            return Err(damaged(0, "it holds another range of batches than its name says"));
        }
        let blocks_len = len - HEADER_BYTES as u64;
        let fits = |count: u64, unit: u64| count.checked_mul(unit).is_some_and(|n| n <= blocks_len);
        if header.file_len != len
            || !fits(header.blocks, BLOCK_HEADER_BYTES as u64 + 1)
            || !fits(header.sums, 2)
            || !fits(header.events, EVENT_BYTES_MIN)
            || header.payload_bytes > blocks_len
        {
            return Err(damaged(len, "it is not as long as it was written"));
        }
        let binding = Binding::new(engine, range.to.number);
        let blocks = BlockReader::new(file, path, binding, HEADER_BYTES as u64..len);
        let Header { blocks: count, sums, events, payload_bytes, .. } = header;
        let counts = Counts { blocks: count, sums, events, limits: 0 };
        Ok(Self { bytes: len, payload_bytes, content: ContentReader::new(blocks, counts) })
    }

    /// The length of the file.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many sums it holds.
    pub(crate) fn sum_count(&self) -> u64 {
        self.content.sum_count()
    }

    /// How many bytes the payloads of its events take.
    pub(crate) fn payload_bytes(&self) -> u64 {
        self.payload_bytes
    }

    /// Hands out the events, in their order, before the first sum is read.
    pub(crate) fn read_events(
        &mut self,
        visit: &mut dyn FnMut(Recorded) -> Result<()>,
    ) -> Result<()> {
        let mut visited = Ok(());
        let read = self.content.read_events(&mut |event| match event {
            LedgerEvent::Recorded(recorded) => {
                visited = visit(recorded);
                if visited.is_ok() { Ok(()) } else { Err("no further event is wanted") }
            }
            _ => Err("a part of the ledger in a sink's backlog"),
        });
        visited.and(read)
    }

    /// Reads all that has not been read, and keeps nothing of it.
    pub(crate) fn verify_to_end(&mut self) -> Result<()> {
        self.content.read_events(&mut |_| Ok(()))?;
        while self.content.next_sum()?.is_some() {}
        Ok(())
    }
}

/// For fuzzing: makes what identifies the file, its length and its checksums right.
#[cfg(feature = "fuzzing")]
pub(super) fn reseal(bytes: &mut [u8], engine: EngineId, range: DeltaRange) {
    let file_len = bytes.len() as u64;
    let Some((head, mut blocks)) = bytes.split_first_chunk_mut::<HEADER_BYTES>() else { return };
    let mut input = Input::new(head.split_at(48).1);
    let mut field = || input.u64().unwrap_or_default();
    let (blocks_count, sums, _, events, payload_bytes) =
        (field(), field(), field(), field(), field());
    let header = Header { range, blocks: blocks_count, sums, file_len, events, payload_bytes };
    head.copy_from_slice(&header.encode(engine));
    let binding = Binding::new(engine, range.to.number);
    for index in 0.. {
        if blocks.len() <= BLOCK_HEADER_BYTES {
            break;
        }
        let len = reseal_block(blocks, binding, index);
        blocks = blocks.split_at_mut(len).1;
    }
}

/// Whether a file of whatever range holds events, or can't be asked.
pub(crate) fn may_hold_events(storage: &Arc<dyn Storage>, name: &str) -> bool {
    let mut bytes = [0; HEADER_BYTES];
    let read = storage.open(name).and_then(|file| file.read_exact_at(&mut bytes, 0));
    match Header::decode(&bytes) {
        Ok((.., header)) if read.is_ok() => header.events > 0,
        _ => true,
    }
}

impl SumSource for DeltasReader {
    fn next_sum(&mut self) -> Result<Option<Sum>> {
        self.content.next_sum()
    }
}

impl Header {
    fn encode(&self, engine: EngineId) -> Vec<u8> {
        let from = self.range.from.unwrap_or(ChainPoint::START);
        let mut bytes = Vec::with_capacity(HEADER_BYTES);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&engine.0.to_le_bytes());
        bytes.extend_from_slice(&from.number.0.to_le_bytes());
        bytes.extend_from_slice(&self.range.to.number.0.to_le_bytes());
        bytes.extend_from_slice(&from.check.to_le_bytes());
        bytes.extend_from_slice(&self.range.to.check.to_le_bytes());
        let Self { blocks, sums, file_len, events, payload_bytes, .. } = *self;
        for field in [blocks, sums, file_len, events, payload_bytes] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        bytes.extend_from_slice(&[0; ZERO_BYTES]);
        let crc = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&crc.to_le_bytes());
        debug_assert_eq!(bytes.len(), HEADER_BYTES);
        bytes
    }

    fn decode(bytes: &[u8; HEADER_BYTES]) -> DecodeResult<(u32, EngineId, Self)> {
        let mut input = Input::new(bytes);
        if input.array()? != MAGIC {
            return Err("it does not begin like a sink's backlog");
        }
        let version = input.u32()?;
        let engine = EngineId(input.u128()?);
        let (from, to) = (BatchNumber(input.u64()?), BatchNumber(input.u64()?));
        let (from_check, to_check) = (input.u32()?, input.u32()?);
        let (blocks, sums, file_len) = (input.u64()?, input.u64()?, input.u64()?);
        let (events, payload_bytes) = (input.u64()?, input.u64()?);
        let zeros: [u8; ZERO_BYTES] = input.array()?;
        if crc32fast::hash(bytes.split_at(CHECKED_BYTES).0) != input.u32()? {
            return Err("its header's checksum does not match");
        }
        // Without a start both are zero: there is no batch 0.
        let is_total = from == BatchNumber::ZERO;
        let has_unknown_events = version == 1 && (events, payload_bytes) != (0, 0);
        if (1..=VERSION).contains(&version)
            && (has_unknown_events
                || zeros != [0; ZERO_BYTES]
                || to <= from
                || is_total && from_check != 0)
        {
            return Err("its header can't have been written like this");
        }
        let from = (!is_total).then_some(ChainPoint { number: from, check: from_check });
        let to = ChainPoint { number: to, check: to_check };
        let range = DeltaRange { from, to };
        Ok((version, engine, Self { range, blocks, sums, file_len, events, payload_bytes }))
    }
}

#[cfg(test)]
#[cfg(not(loom))]
#[allow(clippy::indexing_slicing, reason = "a test may panic")]
mod tests {
    use super::*;
    use crate::fold::SumKey;
    use crate::model::{QuotaId, WindowStart};
    use crate::storage::sim::SimDisk;

    const ENGINE: EngineId = EngineId(0x1234_5678_9abc_def0_1122_3344_5566_7788);
    const NAME: &str = "deltas";

    fn point(number: u64) -> ChainPoint {
        ChainPoint { number: BatchNumber(number), check: 7 }
    }

    fn written(range: DeltaRange, users: u64) -> (Arc<SimDisk>, Vec<Sum>) {
        let disk = SimDisk::new(1);
        let storage = disk.storage();
        let mut writer =
            DeltasWriter::create(&storage, ENGINE, range, "deltas.tmp".to_owned()).unwrap();
        let sum = |user| Sum {
            key: SumKey { quota: QuotaId(1), window: WindowStart(9), user },
            amount: i128::from(user) - 3,
        };
        let sums: Vec<_> = (0..users).map(sum).collect();
        events(users).into_iter().for_each(|event| writer.write_event(event).unwrap());
        sums.iter().for_each(|&sum| writer.write_sum(sum).unwrap());
        writer.finish(NAME).unwrap();
        assert_eq!(disk.file_names(), [NAME]);
        (disk, sums)
    }

    /// As many as there are sums, so that they take several blocks too.
    fn events(users: u64) -> Vec<Recorded> {
        let payload = |user: u64| vec![7; 1 + usize::try_from(user % 60).unwrap()];
        let event = |user| Recorded { user, quota: QuotaId(1), payload: payload(user) };
        (0..users).map(event).collect()
    }

    fn read(disk: &Arc<SimDisk>, engine: EngineId, range: DeltaRange) -> Result<Vec<Sum>> {
        let storage = disk.storage();
        let mut reader = DeltasReader::open(&storage, engine, range, NAME)?;
        let mut found = Vec::new();
        reader.read_events(&mut |event| {
            found.push(event);
            Ok(())
        })?;
        let bytes: usize = found.iter().map(|event| event.payload.len()).sum();
        assert_eq!(reader.payload_bytes(), bytes as u64);
        let mut sums = Vec::new();
        while let Some(sum) = reader.next_sum()? {
            sums.push(sum);
        }
        assert_eq!(found, events(sums.len() as u64));
        Ok(sums)
    }

    #[test]
    fn what_is_written_is_read_back_also_nothing_and_after_a_loss_of_power() {
        for from in [None, Some(point(4))] {
            for users in [0, 3, 10_000] {
                let range = DeltaRange { from, to: point(9) };
                let (disk, sums) = written(range, users);
                disk.power_cut();
                assert_eq!(read(&disk, ENGINE, range).unwrap(), sums);
            }
        }
    }

    #[test]
    fn another_range_another_engine_and_every_flipped_bit_are_refused() {
        let range = DeltaRange { from: Some(point(4)), to: point(9) };
        let (disk, _) = written(range, 3);
        let others = [
            DeltaRange { from: None, ..range },
            DeltaRange { from: Some(point(5)), ..range },
            DeltaRange { to: point(8), ..range },
        ];
        for other in others {
            assert!(matches!(read(&disk, ENGINE, other), Err(Error::Damaged { .. })));
        }
        assert!(read(&disk, EngineId(1), range).is_err());
        let bytes = disk.file(NAME).unwrap();
        for bit in 0..bytes.len() * 8 {
            let damaged = SimDisk::new(2);
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            damaged.put(NAME, &flipped);
            assert!(read(&damaged, ENGINE, range).is_err(), "bit {bit}");
        }
        for len in 0..bytes.len() {
            let cut = SimDisk::new(3);
            cut.put(NAME, &bytes[..len]);
            assert!(read(&cut, ENGINE, range).is_err(), "cut to {len}");
        }
    }
}
