//! Writing a snapshot, or a sorted run of a merge: events, sums and limits in, blocks out.

use std::io;
use std::sync::Arc;

use crate::codec::SUM_BYTES_MAX;
use crate::error::{Error, Result};
use crate::fold::{Sum, SumKey};
use crate::journal::writer::ChainPoint;
use crate::ledger::{EventWriter, LedgerEvent};
use crate::model::{AMOUNT_MAX, BatchNumber, EngineId, QuotaId, WindowStart};
use crate::snapshot::codec::{
    BLOCK_BYTES_MAX, Binding, Counts, HEADER_BYTES, Header, LIMIT_BYTES_MAX, Limit,
    put_events_block, put_limits_block, put_sums_block,
};
use crate::snapshot::{Manifest, file_name, temporary_name};
use crate::storage::Storage;
use crate::storage::TemporaryFile;

/// Blocks are handed to the operating system in pieces of about this size.
pub(super) const PIECE_BYTES: usize = 256 << 10;

/// The most sums in a block that is written: decoded, each takes 48 bytes in the reader, for each
/// run of a merge.
const BLOCK_SUMS_MAX: usize = 4096;

/// The most bytes that the first sum of a group takes: the group's count takes a second byte when
/// it grows.
const GROUP_BYTES_MAX: usize = SUM_BYTES_MAX + 1;
const _: () = assert!(BLOCK_SUMS_MAX < 1 << 14);
const _: () = assert!(GROUP_BYTES_MAX <= BLOCK_BYTES_MAX);

/// A finished snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SnapshotInfo {
    /// The last batch contained.
    pub(crate) point: ChainPoint,
    pub(crate) bytes: u64,
    pub(crate) sums: u64,
    pub(crate) limits: u64,
}

/// See `ContentWriter::sync_bytes`.
pub(super) const SYNC_BYTES: u64 = 16 << 20;

/// Writes one snapshot. Dropped before it is finished, it leaves nothing behind.
#[derive(Debug)]
pub(crate) struct SnapshotWriter {
    engine: EngineId,
    point: ChainPoint,
    manifest_len: u64,
    manifest_crc: u32,
    content: ContentWriter,
}

impl SnapshotWriter {
    /// With blocks of the usual size.
    pub(crate) fn create(
        storage: &Arc<dyn Storage>,
        engine: EngineId,
        manifest: &Manifest,
    ) -> Result<Self> {
        Self::create_with(storage, engine, manifest, BLOCK_BYTES_MAX)
    }

    /// With blocks of at most `block_bytes`, or one entry.
    pub(super) fn create_with(
        storage: &Arc<dyn Storage>,
        engine: EngineId,
        manifest: &Manifest,
        block_bytes: usize,
    ) -> Result<Self> {
        let point = manifest.point();
        let binding = Binding::new(engine, point.number);
        let name = temporary_name(point.number);
        let refused = |reason| refused(&storage.path(&name), reason);
        if point.number == BatchNumber::ZERO {
            return Err(refused("a snapshot of no batch"));
        }
        let bytes = manifest.encode().map_err(refused)?;
        let file = TemporaryFile::create(storage, name)?;
        let mut content = ContentWriter::new(file, binding, block_bytes);
        content.sync_bytes = SYNC_BYTES;
        // The header's place, until it is known.
        content.buffer.resize(HEADER_BYTES, 0);
        content.buffer.extend_from_slice(&bytes);
        Ok(Self {
            engine,
            point,
            manifest_len: bytes.len() as u64,
            manifest_crc: binding.manifest_crc(&bytes),
            content,
        })
    }

    /// Writes an event; all events come before the first sum.
    pub(crate) fn write_event(&mut self, event: &LedgerEvent) -> Result<()> {
        self.content.write_event(event)
    }

    /// Writes a sum whose key is above those before it; all sums come before the first limit.
    pub(crate) fn write_sum(&mut self, sum: Sum) -> Result<()> {
        self.content.write_sum(sum)
    }

    /// Writes a limit whose quota and user are above those before it.
    pub(crate) fn write_limit(&mut self, limit: Limit) -> Result<()> {
        self.content.write_limit(limit)
    }

    pub(super) fn progress(&mut self) -> &mut Progress {
        &mut self.content.progress
    }

    /// Completes the file, and makes it durable under its name.
    pub(crate) fn finish(mut self) -> Result<SnapshotInfo> {
        let (counts, bytes) = self.content.flush()?;
        let header = Header {
            point: self.point,
            manifest_crc: self.manifest_crc,
            manifest_len: self.manifest_len,
            counts,
            file_len: bytes,
        };
        let file = self.content.file;
        file.write(&header.encode(self.engine), 0)?;
        file.publish(&file_name(self.point.number))?;
        Ok(SnapshotInfo { point: self.point, bytes, sums: counts.sums, limits: counts.limits })
    }
}

/// Writes blocks to a temporary file.
#[derive(Debug)]
pub(super) struct ContentWriter {
    pub(super) file: TemporaryFile,
    binding: Binding,
    block_bytes: usize,
    /// The bytes to write at `offset`.
    pub(super) buffer: Vec<u8>,
    offset: u64,
    counts: Counts,
    /// The block that is being filled: of one kind or another.
    events: EventWriter,
    sums: Vec<Sum>,
    limits: Vec<Limit>,
    /// No less than the payload of that block takes.
    payload_bytes: usize,
    last_sum: Option<SumKey>,
    last_limit: Option<(QuotaId, u64)>,
    progress: Progress,
    /// A file that will be synced is synced in pieces of this size, so that the last sync does not
    /// keep the disk from the journal.
    pub(super) sync_bytes: u64,
    unsynced_bytes: u64,
}

/// What was done since it was last reported.
#[derive(Debug, Default)]
pub(super) struct Progress {
    pub(super) bytes_written: u64,
    pub(super) entries_passed: usize,
}

impl ContentWriter {
    pub(super) fn new(file: TemporaryFile, binding: Binding, block_bytes: usize) -> Self {
        Self {
            file,
            binding,
            block_bytes: block_bytes.min(BLOCK_BYTES_MAX),
            buffer: Vec::with_capacity(PIECE_BYTES + BLOCK_BYTES_MAX),
            offset: 0,
            counts: Counts::default(),
            events: EventWriter::default(),
            sums: Vec::new(),
            limits: Vec::new(),
            payload_bytes: 0,
            last_sum: None,
            last_limit: None,
            progress: Progress::default(),
            sync_bytes: u64::MAX,
            unsynced_bytes: 0,
        }
    }

    pub(super) fn write_event(&mut self, event: &LedgerEvent) -> Result<()> {
        if self.last_sum.is_some() || self.last_limit.is_some() {
            return Err(self.refused("an event after the sums"));
        }
        if !self.events.put_within(self.block_bytes, event) {
            self.end_block()?;
            self.events.put(event);
        }
        self.counts.events += 1;
        Ok(())
    }

    pub(super) fn write_sum(&mut self, sum: Sum) -> Result<()> {
        if !self.events.bytes().is_empty() {
            self.end_block()?;
        }
        if self.last_sum.is_some_and(|last| last >= sum.key) {
            return Err(self.refused("sums out of order"));
        }
        if self.last_limit.is_some() {
            return Err(self.refused("a sum after the limits"));
        }
        if sum.key.window > WindowStart::MAX {
            return Err(self.refused("a window beyond 48 bits"));
        }
        let mut bytes = sum_bytes(self.sums.last(), &sum);
        let is_full =
            self.payload_bytes + bytes > self.block_bytes || self.sums.len() >= BLOCK_SUMS_MAX;
        if is_full && !self.sums.is_empty() {
            self.end_block()?;
            bytes = sum_bytes(None, &sum);
        }
        self.payload_bytes += bytes;
        self.last_sum = Some(sum.key);
        self.counts.sums += 1;
        self.sums.push(sum);
        Ok(())
    }

    fn write_limit(&mut self, limit: Limit) -> Result<()> {
        if self.last_limit.is_some_and(|last| last >= limit.key()) {
            return Err(self.refused("limits out of order"));
        }
        if limit.limit > AMOUNT_MAX {
            return Err(self.refused("a limit above 2^63 - 1"));
        }
        let is_full = self.payload_bytes + LIMIT_BYTES_MAX > self.block_bytes;
        let is_other = !self.sums.is_empty() || !self.events.bytes().is_empty();
        if is_other || is_full && !self.limits.is_empty() {
            self.end_block()?;
        }
        self.payload_bytes += LIMIT_BYTES_MAX;
        self.last_limit = Some(limit.key());
        self.counts.limits += 1;
        self.limits.push(limit);
        Ok(())
    }

    fn end_block(&mut self) -> Result<()> {
        let index = self.counts.blocks;
        let put = if !self.events.bytes().is_empty() {
            put_events_block(&mut self.buffer, self.binding, index, self.events.bytes())
        } else if !self.sums.is_empty() {
            put_sums_block(&mut self.buffer, self.binding, index, &self.sums)
        } else if !self.limits.is_empty() {
            put_limits_block(&mut self.buffer, self.binding, index, &self.limits)
        } else {
            return Ok(());
        };
        put.map_err(|reason| self.refused(reason))?;
        self.counts.blocks += 1;
        self.events.clear();
        self.sums.clear();
        self.limits.clear();
        self.payload_bytes = 0;
        if self.buffer.len() >= PIECE_BYTES { self.write_buffer() } else { Ok(()) }
    }

    fn write_buffer(&mut self) -> Result<()> {
        self.file.write(&self.buffer, self.offset)?;
        let written = self.buffer.len() as u64;
        self.offset += written;
        self.unsynced_bytes += written;
        if self.unsynced_bytes >= self.sync_bytes {
            self.file.sync()?;
            self.unsynced_bytes = 0;
        }
        self.progress.bytes_written += written;
        self.buffer.clear();
        Ok(())
    }

    pub(super) fn progress(&mut self) -> &mut Progress {
        &mut self.progress
    }

    /// Writes what is left; returns what the file holds, and its length.
    pub(super) fn flush(&mut self) -> Result<(Counts, u64)> {
        self.end_block()?;
        self.write_buffer()?;
        Ok((self.counts, self.offset))
    }

    /// Ends a file that is read back by this process only: not synced, not renamed, and removed
    /// when dropped.
    pub(super) fn finish_unsynced(mut self) -> Result<(TemporaryFile, Counts, u64)> {
        let (counts, bytes) = self.flush()?;
        Ok((self.file, counts, bytes))
    }

    fn refused(&self, reason: &'static str) -> Error {
        refused(&self.file.path(), reason)
    }
}

/// What is asked for would make a bad file.
fn refused(path: &std::path::Path, reason: &'static str) -> Error {
    Error::io("write", path, io::Error::new(io::ErrorKind::InvalidInput, reason))
}

/// No less than what `sum` takes in a block behind `previous`, or at its start.
fn sum_bytes(previous: Option<&Sum>, sum: &Sum) -> usize {
    let group = |sum: &Sum| (sum.key.quota, sum.key.window);
    match previous {
        Some(previous) if group(previous) == group(sum) => {
            let step = sum.key.user.wrapping_sub(previous.key.user);
            // A zigzag number has one bit more than the magnitude.
            let magnitude = sum.amount ^ (sum.amount >> 127);
            let amount_bits = 129 - magnitude.leading_zeros();
            varint_bytes(64 - step.leading_zeros()) + varint_bytes(amount_bits)
        }
        _ => GROUP_BYTES_MAX,
    }
}

fn varint_bytes(bits: u32) -> usize {
    bits.div_ceil(7).max(1) as usize
}
