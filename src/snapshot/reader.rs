//! Reading a snapshot, or a sorted run of a merge: blocks in, verified events, sums and limits out.
//!
//! Nothing is handed out before the checksum of its block has been verified. A file is read once,
//! front to back, in pieces.
#![deny(clippy::indexing_slicing)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::codec::{DecodeResult, Sums};
use crate::error::{Error, Result};
use crate::fold::{Sum, SumKey};
use crate::ledger::{Events, LedgerEvent};
use crate::model::{BatchNumber, EngineId, QuotaId};
use crate::snapshot::codec::{
    BLOCK_HEADER_BYTES, Binding, BlockHeader, BlockKind, Counts, HEADER_BYTES, Header, HeaderError,
    Limit, VERSION, decode_limits,
};
use crate::snapshot::merge::SumSource;
use crate::snapshot::writer::PIECE_BYTES;
use crate::snapshot::{Manifest, file_name};
use crate::storage::TemporaryFile;
use crate::storage::{Storage, StorageFile};

/// Reads one snapshot: first the events, then the sums, then the limits. After an error it must not
/// be used further.
#[derive(Debug)]
pub(crate) struct SnapshotReader {
    manifest: Manifest,
    content: ContentReader,
}

impl SnapshotReader {
    /// Opens the snapshot that contains the batches up to `number`, and verifies its head.
    pub(crate) fn open(
        storage: &Arc<dyn Storage>,
        engine: EngineId,
        number: BatchNumber,
    ) -> Result<Self> {
        let name = file_name(number);
        let reader = Self::open_named(storage, engine, &name)?;
        let found = reader.manifest.point().number;
        if found != number {
            let reason = format!("it is the snapshot of batch {found}");
            return Err(Error::damaged(storage.path(&name), 0, reason));
        }
        Ok(reader)
    }

    /// Opens the snapshot that has this name, whichever it is, and verifies its head.
    pub(crate) fn open_named(
        storage: &Arc<dyn Storage>,
        engine: EngineId,
        name: &str,
    ) -> Result<Self> {
        let path = storage.path(name);
        let file = storage.open(name).map_err(|error| Error::io("open", &path, error))?;
        let header = read_header(&*file, &path, engine)?;
        let binding = Binding::new(engine, header.point.number);
        let manifest = read_manifest(&*file, &path, &header, binding)?;
        let begin = HEADER_BYTES as u64 + header.manifest_len;
        let blocks = BlockReader::new(file, path, binding, begin..header.file_len);
        Ok(Self { manifest, content: ContentReader::new(blocks, header.counts) })
    }

    /// Whose snapshot it is, by a header that verifies.
    pub(crate) fn owner(storage: &Arc<dyn Storage>, number: BatchNumber) -> Option<EngineId> {
        let mut bytes = [0; HEADER_BYTES];
        storage.open(&file_name(number)).ok()?.read_exact_at(&mut bytes, 0).ok()?;
        Header::owner(&bytes)
    }

    pub(crate) fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// How many sums it holds. Bounded by the file's length, so that it may size an allocation.
    pub(crate) fn sum_count(&self) -> u64 {
        self.content.sum_count()
    }

    /// How many limits it holds.
    pub(crate) fn limit_count(&self) -> u64 {
        self.content.expected.limits
    }

    /// The length of the file.
    pub(crate) fn bytes(&self) -> u64 {
        self.content.blocks.end
    }

    /// How many events it holds.
    pub(crate) fn event_count(&self) -> u64 {
        self.content.expected.events
    }

    /// Hands out the events, before the first sum is read.
    pub(crate) fn read_events(
        &mut self,
        visit: &mut dyn FnMut(LedgerEvent) -> DecodeResult<()>,
    ) -> Result<()> {
        self.content.read_events(&mut |event| match event {
            LedgerEvent::Recorded(_) => Err("a recorded event, which snapshots do not hold"),
            event => visit(event),
        })
    }

    /// The next limit. Events and sums that were not read are passed over.
    pub(crate) fn next_limit(&mut self) -> Result<Option<Limit>> {
        self.content.next_limit()
    }

    /// Reads what is left, and checks that the file is good to its end.
    pub(crate) fn verify_to_end(&mut self) -> Result<()> {
        while self.next_limit()?.is_some() {}
        Ok(())
    }
}

impl SumSource for SnapshotReader {
    #[inline]
    fn next_sum(&mut self) -> Result<Option<Sum>> {
        self.content.next_sum()
    }
}

fn read_header(file: &dyn StorageFile, path: &Path, engine: EngineId) -> Result<Header> {
    let unreadable = |error| Error::io("read", path, error);
    let len = file.len().map_err(unreadable)?;
    if len < HEADER_BYTES as u64 {
        let reason = format!("it is {len} bytes long, too short for a snapshot");
        return Err(Error::damaged(path, len, reason));
    }
    let mut bytes = [0; HEADER_BYTES];
    file.read_exact_at(&mut bytes, 0).map_err(unreadable)?;
    let header = Header::decode(engine, &bytes).map_err(|error| match error {
        HeaderError::Bad(reason) => Error::damaged(path, 0, reason),
        HeaderError::Version(found) => {
            Error::UnsupportedVersion { path: path.into(), found, supported: VERSION }
        }
    })?;
    if header.file_len != len {
        let reason = format!("it is {len} bytes long, not {} as it was written", header.file_len);
        return Err(Error::damaged(path, len.min(header.file_len), reason));
    }
    Ok(header)
}

fn read_manifest(
    file: &dyn StorageFile,
    path: &Path,
    header: &Header,
    binding: Binding,
) -> Result<Manifest> {
    let damaged = |reason| Error::damaged(path, HEADER_BYTES as u64, reason);
    // Below the file's length, or the header would have been refused.
    let len =
        usize::try_from(header.manifest_len).map_err(|_| damaged("a manifest above the memory"))?;
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, HEADER_BYTES as u64)
        .map_err(|error| Error::io("read", path, error))?;
    if binding.manifest_crc(&bytes) != header.manifest_crc {
        return Err(damaged("a manifest whose checksum does not match"));
    }
    let manifest = Manifest::decode(&bytes).map_err(damaged)?;
    if manifest.point() != header.point {
        return Err(damaged("a manifest of another batch than the header's"));
    }
    Ok(manifest)
}

/// A sorted run of a merge, read back; removed when dropped.
#[derive(Debug)]
pub(super) struct RunReader {
    content: ContentReader,
    _file: TemporaryFile,
}

impl RunReader {
    pub(super) fn new(file: TemporaryFile, binding: Binding, counts: Counts, bytes: u64) -> Self {
        let blocks = BlockReader::new(Arc::clone(file.file()), file.path(), binding, 0..bytes);
        Self { content: ContentReader::new(blocks, counts), _file: file }
    }
}

impl SumSource for RunReader {
    fn next_sum(&mut self) -> Result<Option<Sum>> {
        self.content.next_sum()
    }
}

/// Decodes blocks one at a time, and checks order and counts.
#[derive(Debug)]
pub(super) struct ContentReader {
    blocks: BlockReader,
    expected: Counts,
    seen: Counts,
    /// One of the two holds the current block, unless that is of events; both keep their memory for
    /// the next.
    sums: Vec<Sum>,
    limits: Vec<Limit>,
    next_sum: usize,
    next_limit: usize,
    last_sum: Option<SumKey>,
    last_limit: Option<(QuotaId, u64)>,
}

impl ContentReader {
    pub(super) fn new(blocks: BlockReader, expected: Counts) -> Self {
        Self {
            blocks,
            expected,
            seen: Counts::default(),
            sums: Vec::new(),
            limits: Vec::new(),
            next_sum: 0,
            next_limit: 0,
            last_sum: None,
            last_limit: None,
        }
    }

    pub(super) fn sum_count(&self) -> u64 {
        self.expected.sums
    }

    pub(super) fn read_events(
        &mut self,
        visit: &mut dyn FnMut(LedgerEvent) -> DecodeResult<()>,
    ) -> Result<()> {
        while self.seen.events < self.expected.events && self.next_block(visit)? {}
        Ok(())
    }

    #[inline]
    pub(super) fn next_sum(&mut self) -> Result<Option<Sum>> {
        loop {
            if let Some(&sum) = self.sums.get(self.next_sum) {
                self.next_sum += 1;
                return Ok(Some(sum));
            }
            // All sums come before the first limit.
            if self.seen.limits > 0 || !self.next_block(&mut pass_over)? {
                return Ok(None);
            }
        }
    }

    fn next_limit(&mut self) -> Result<Option<Limit>> {
        while self.next_sum()?.is_some() {}
        loop {
            if let Some(&limit) = self.limits.get(self.next_limit) {
                self.next_limit += 1;
                return Ok(Some(limit));
            }
            if !self.next_block(&mut pass_over)? {
                return Ok(None);
            }
        }
    }

    /// Decodes the next block, whose events are handed out at once: a block may hold many times its
    /// size of them. `false` at the end, which is checked to be where it should be.
    fn next_block(
        &mut self,
        visit: &mut dyn FnMut(LedgerEvent) -> DecodeResult<()>,
    ) -> Result<bool> {
        if self.seen.blocks == self.expected.blocks {
            self.check_end()?;
            return Ok(false);
        }
        let at = self.blocks.position();
        let (kind, payload) = self.blocks.next(self.seen.blocks)?;
        self.seen.blocks += 1;
        let decoded = match kind {
            BlockKind::Events if self.seen.sums > 0 || self.seen.limits > 0 => {
                Err("a block of events after the sums")
            }
            BlockKind::Events => {
                visit_events(payload, visit).map(|count| self.seen.events += count)
            }
            BlockKind::Sums if self.seen.limits > 0 => Err("a block of sums after the limits"),
            BlockKind::Sums => {
                self.next_sum = 0;
                decode_sums(payload, self.last_sum, &mut self.sums)
            }
            BlockKind::Limits => {
                self.next_limit = 0;
                decode_limits(payload, self.last_limit, &mut self.limits)
            }
        };
        decoded.map_err(|reason| Error::damaged(&self.blocks.path, at, reason))?;
        match kind {
            BlockKind::Events => {}
            BlockKind::Sums => {
                self.check_events_complete()?;
                self.last_sum = self.sums.last().map(|sum| sum.key);
                self.seen.sums += self.sums.len() as u64;
            }
            BlockKind::Limits => {
                self.check_sums_complete()?;
                self.last_limit = self.limits.last().map(Limit::key);
                self.seen.limits += self.limits.len() as u64;
            }
        }
        Ok(true)
    }

    fn check_events_complete(&self) -> Result<()> {
        let (seen, expected) = (self.seen.events, self.expected.events);
        if seen != expected {
            return Err(self.blocks.damaged(format!("it holds {seen} events, not {expected}")));
        }
        Ok(())
    }

    fn check_sums_complete(&self) -> Result<()> {
        self.check_events_complete()?;
        let (seen, expected) = (self.seen.sums, self.expected.sums);
        if seen != expected {
            return Err(self.blocks.damaged(format!("it holds {seen} sums, not {expected}")));
        }
        Ok(())
    }

    fn check_end(&self) -> Result<()> {
        self.check_sums_complete()?;
        let (seen, expected) = (self.seen.limits, self.expected.limits);
        if seen != expected {
            return Err(self.blocks.damaged(format!("it holds {seen} limits, not {expected}")));
        }
        if self.blocks.position() != self.blocks.end {
            return Err(self.blocks.damaged("something follows the last block"));
        }
        Ok(())
    }
}

/// Of events that nobody wants.
fn pass_over(_event: LedgerEvent) -> DecodeResult<()> {
    Ok(())
}

/// Decodes a payload of events, and says how many there were.
fn visit_events(
    payload: &[u8],
    visit: &mut dyn FnMut(LedgerEvent) -> DecodeResult<()>,
) -> DecodeResult<u64> {
    let mut count = 0;
    let mut events = Events::new(payload);
    while let Some(event) = events.next_event()? {
        visit(event)?;
        count += 1;
    }
    Ok(count)
}

/// Decodes a payload of sums into `out`, which is cleared first. `last` is the last key before it.
fn decode_sums(payload: &[u8], last: Option<SumKey>, out: &mut Vec<Sum>) -> DecodeResult<()> {
    out.clear();
    let mut sums = Sums::new(payload);
    while let Some(sum) = sums.next_sum()? {
        out.push(sum);
    }
    // Within a payload the decoder checks the order.
    if out.first().is_some_and(|first| last.is_some_and(|last| last >= first.key)) {
        return Err("sums out of order");
    }
    Ok(())
}

/// Reads blocks and verifies their checksums.
#[derive(Debug)]
pub(super) struct BlockReader {
    file: Arc<dyn StorageFile>,
    path: PathBuf,
    binding: Binding,
    /// What was read ahead; `used` bytes of it have been handed out.
    buffer: Vec<u8>,
    used: usize,
    /// Where the buffer ends in the file.
    offset: u64,
    end: u64,
}

impl BlockReader {
    pub(super) fn new(
        file: Arc<dyn StorageFile>,
        path: PathBuf,
        binding: Binding,
        range: std::ops::Range<u64>,
    ) -> Self {
        let (offset, end) = (range.start, range.end);
        Self { file, path, binding, buffer: Vec::new(), used: 0, offset, end }
    }

    /// Where the next block begins.
    fn position(&self) -> u64 {
        self.offset - self.ahead() as u64
    }

    fn ahead(&self) -> usize {
        self.buffer.len() - self.used
    }

    fn next(&mut self, index: u64) -> Result<(BlockKind, &[u8])> {
        let at = self.position();
        self.read_ahead(BLOCK_HEADER_BYTES)?;
        let head = self.buffer.get(self.used..).unwrap_or_default();
        let block = BlockHeader::decode(head, index)
            .map_err(|reason| Error::damaged(&self.path, at, reason))?;
        self.used += BLOCK_HEADER_BYTES;
        self.read_ahead(block.len)?;
        let begin = self.used;
        self.used += block.len;
        let payload = self.buffer.get(begin..self.used).unwrap_or_default();
        block
            .verify(self.binding, payload)
            .map_err(|reason| Error::damaged(&self.path, at, reason))?;
        Ok((block.kind, payload))
    }

    /// Makes sure that `count` bytes are ahead.
    fn read_ahead(&mut self, count: usize) -> Result<()> {
        let Some(missing) = count.checked_sub(self.ahead()).filter(|&missing| missing > 0) else {
            return Ok(());
        };
        let left = self.end - self.offset;
        if missing as u64 > left {
            return Err(self.damaged("a block is cut short"));
        }
        self.buffer.drain(..self.used);
        self.used = 0;
        let kept = self.buffer.len();
        let wanted = PIECE_BYTES.saturating_sub(kept).max(missing);
        let wanted = usize::try_from(left).map_or(wanted, |left| left.min(wanted));
        self.buffer.resize(kept + wanted, 0);
        let free = self.buffer.get_mut(kept..).unwrap_or_default();
        self.file
            .read_exact_at(free, self.offset)
            .map_err(|error| Error::io("read", &self.path, error))?;
        self.offset += wanted as u64;
        Ok(())
    }

    fn damaged(&self, reason: impl Into<String>) -> Error {
        Error::damaged(&self.path, self.position(), reason)
    }
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, reason = "a test may panic")]
mod tests;
