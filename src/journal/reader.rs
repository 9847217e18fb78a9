//! Reading batches back: the whole chain at recovery, what is durable for a merge.
//!
//! A torn tail is what a crash leaves, and is reported. A batch that is bad although a later one
//! says that it was durable is damage, and is refused.
#![deny(clippy::indexing_slicing)]

use std::path::PathBuf;
use std::sync::Arc;

use crate::codec::DecodeResult;
use crate::error::{Error, Result};
use crate::journal::batch::{BATCH_ALIGN, Batch, BatchHeader, BatchSource, HEADER_BYTES, NO_BATCH};
use crate::journal::checksums::Checksums;
use crate::journal::files::{FILE_HEADER_BYTES, FileSequence};
use crate::journal::found::{FoundFiles, UnreadableFile};
use crate::journal::pool::{IndexEntry, JournalFiles};
use crate::journal::writer::{ChainPoint, Encoded};
use crate::model::{BatchNumber, EngineId};
use crate::storage::Storage;

/// Where the chain of batches ended, and why.
#[derive(Debug)]
pub(crate) struct ChainEnd {
    /// The last good batch.
    pub(crate) last: ChainPoint,
    /// All batches up to this one are known to have been durable.
    pub(crate) durable: ChainPoint,
    /// The batches after `durable`, verbatim.
    pub(crate) unsynced: Vec<Encoded>,
    /// What follows the last good batch, when it is not simply the end.
    pub(crate) torn: Option<Torn>,
    /// How many batches were visited.
    pub(crate) batches: u64,
}

/// A tail that does not verify: normal after a crash.
#[derive(Debug, Clone)]
pub(crate) struct Torn {
    pub(crate) path: PathBuf,
    pub(crate) offset: u64,
    pub(crate) reason: &'static str,
}

/// Reads all batches after `start` (the snapshot's, or [`ChainPoint::START`]) and hands each to
/// `visit`, in order.
///
/// # Errors
/// `Damaged` when a batch at or below a known durable one is missing or bad, or `visit` says so.
pub(crate) fn read_chain(
    storage: &Arc<dyn Storage>,
    engine: EngineId,
    found: &FoundFiles,
    start: ChainPoint,
    visit: &mut dyn FnMut(&Batch<'_>) -> DecodeResult<()>,
) -> Result<ChainEnd> {
    let files = &found.in_use;
    let path_of = |sequence: FileSequence| storage.path(&sequence.file_name());
    let first = files
        .partition_point(|entry| entry.previous.number <= start.number)
        .checked_sub(1)
        .ok_or_else(|| match files.first() {
            Some(entry) => Error::damaged(
                path_of(entry.sequence),
                0,
                format!(
                    "the journal begins after batch {}, but batch {} is needed",
                    entry.previous.number,
                    start.number.next()
                ),
            ),
            None => Error::damaged(
                path_of(FileSequence(1)),
                0,
                format!("no journal file holds batch {} and what follows", start.number.next()),
            ),
        })?;

    let needed = files.get(first..).unwrap_or_default();
    refuse_gaps(storage, found, needed)?;
    for entry in needed {
        if let Some(reason) = found.resized(entry) {
            return Err(Error::damaged(path_of(entry.sequence), entry.bytes, reason));
        }
    }
    let mut end = ChainEnd { last: start, durable: start, ..ChainEnd::at_start() };
    let mut ended_at = (0, FILE_HEADER_BYTES as u64);
    for (index, entry) in needed.iter().enumerate() {
        let path = path_of(entry.sequence);
        let bound = needed.get(index + 1).map(|next| next.previous.number);
        if index > 0 && entry.previous != end.last {
            let reason = "it does not follow the batches before it";
            end.torn = Some(Torn { path, offset: 0, reason });
            break;
        }
        let mut cursor = Cursor::new(storage, engine, entry);
        cursor.skip_to(start)?;
        while bound.is_none_or(|bound| end.last.number < bound) {
            let at = cursor.offset;
            ended_at = (index, at);
            match cursor.next(end.last)? {
                Next::Batch(bytes) => {
                    let batch = Batch::decode(engine, bytes)
                        .map_err(|reason| Error::damaged(&path, at, reason))?;
                    visit(&batch).map_err(|reason| {
                        let reason = format!("batch {}: {reason}", batch.header.number);
                        Error::damaged(&path, at, reason)
                    })?;
                    end.take(&batch, bytes);
                }
                Next::End { reason: UNUSED, .. } if bound.is_none() => break,
                Next::End { offset, reason } => {
                    end.torn = Some(Torn { path, offset, reason });
                    break;
                }
            }
        }
        if end.torn.is_some() {
            break;
        }
    }
    refuse_if_durable(storage, engine, found, needed, ended_at, &end)?;
    Ok(end)
}

/// The sequence numbers from the first file that is needed have no gap: files are reused and
/// removed lowest first.
fn refuse_gaps(
    storage: &Arc<dyn Storage>,
    found: &FoundFiles,
    needed: &[IndexEntry],
) -> Result<()> {
    let Some(first) = needed.first().map(|entry| entry.sequence) else { return Ok(()) };
    let prepared = found.prepared.iter().map(|&(sequence, ..)| sequence);
    let unreadable = found.unreadable.iter().map(|file| file.entry.sequence);
    let mut sequences: Vec<_> = needed.iter().map(|entry| entry.sequence).collect();
    sequences.extend(prepared.chain(unreadable).filter(|&sequence| sequence > first));
    sequences.sort_unstable();
    for (expected, sequence) in (first.0..).map(FileSequence).zip(sequences) {
        if sequence != expected {
            return Err(Error::damaged(storage.path(&expected.file_name()), 0, "it is missing"));
        }
    }
    Ok(())
}

impl ChainEnd {
    /// Of a directory without batches.
    pub(crate) fn at_start() -> Self {
        Self {
            last: ChainPoint::START,
            durable: ChainPoint::START,
            unsynced: Vec::new(),
            torn: None,
            batches: 0,
        }
    }

    fn take(&mut self, batch: &Batch<'_>, bytes: &[u8]) {
        let header = &batch.header;
        self.batches += 1;
        self.last = ChainPoint { number: header.number, check: header.check };
        self.unsynced.push(Encoded {
            number: header.number,
            check: header.check,
            bytes: bytes.to_vec(),
        });
        if header.durable > self.durable.number {
            let covered = self.unsynced.partition_point(|encoded| encoded.number <= header.durable);
            if let Some(durable) = self.unsynced.drain(..covered).next_back() {
                self.durable = durable.point();
            }
        }
    }
}

/// Looks beyond the end of the chain for a batch that says that more was durable, and for one that
/// would have been next if the header of its file verified.
fn refuse_if_durable(
    storage: &Arc<dyn Storage>,
    engine: EngineId,
    found: &FoundFiles,
    needed: &[IndexEntry],
    (ended_in, ended_at): (usize, u64),
    end: &ChainEnd,
) -> Result<()> {
    let missing = end.last.number.next();
    for (index, entry) in needed.iter().enumerate().skip(ended_in) {
        let mut cursor = Cursor::new(storage, engine, entry);
        if index == ended_in {
            cursor.offset = ended_at;
            cursor.expected = (ended_at, end.last);
        }
        while let Some(FoundBatch { offset, header, .. }) = cursor.find_batch()? {
            if header.durable >= missing && header.number > missing {
                let (path, at, reason) = match &end.torn {
                    Some(torn) => (torn.path.clone(), torn.offset, torn.reason),
                    None => (storage.path(&entry.sequence.file_name()), offset, "it is missing"),
                };
                let reason = format!("batch {missing} was durable but can't be read: {reason}");
                return Err(Error::damaged(path, at, reason));
            }
        }
    }
    let last_needed = needed.last().map_or(FileSequence(0), |entry| entry.sequence);
    for UnreadableFile { entry, reason, was_prepared } in &found.unreadable {
        let mut cursor = Cursor::new(storage, engine, entry);
        cursor.expected.1 = end.last;
        let mut continues_chain = false;
        while let Some(FoundBatch { header, .. }) = cursor.find_batch()? {
            continues_chain |= header.durable >= missing
                || header.number == missing && header.previous_check == end.last.check;
        }
        // In the middle, or in front of batches that belong to the chain: a crash leaves neither.
        // Nor does it leave a last file whose header does not verify, which lies in one sector: it
        // may have held what came last, durable and closed, and be empty now.
        let first_needed = needed.first().map_or(FileSequence(0), |entry| entry.sequence);
        let may_have_been_last = entry.sequence > last_needed && !was_prepared;
        if continues_chain
            || may_have_been_last
            || (first_needed..last_needed).contains(&entry.sequence)
        {
            let path = storage.path(&entry.sequence.file_name());
            let reason = format!("{reason}; what it held, if anything, is left out");
            return Err(Error::damaged(path, 0, reason));
        }
    }
    Ok(())
}

/// The reason given when nothing was ever written where the next batch would be.
pub(super) const UNUSED: &str = NO_BATCH;

pub(super) enum Next<'a> {
    Batch(&'a [u8]),
    End { offset: u64, reason: &'static str },
}

/// A batch that was found where it may stand on its own.
pub(super) struct FoundBatch<'a> {
    pub(super) offset: u64,
    pub(super) header: BatchHeader,
    /// Where all of them verify.
    pub(super) bytes: Option<&'a [u8]>,
}

/// Walks through one file.
pub(super) struct Cursor<'a> {
    storage: &'a Arc<dyn Storage>,
    engine: EngineId,
    entry: &'a IndexEntry,
    pub(super) offset: u64,
    buffer: Vec<u8>,
    /// For `find_header`: a piece of the file and where it begins.
    piece_at: u64,
    piece: Vec<u8>,
    /// For `find_batch`: where a batch begins, and which one it follows, as far as that is known.
    pub(super) expected: (u64, ChainPoint),
    /// How many bytes `find_batch` has read for batches that did not verify.
    in_vain: u64,
    checksums: Checksums,
}

/// `find_header` reads the file in pieces of this size.
const PIECE_BYTES: usize = 1 << 18;

impl<'a> Cursor<'a> {
    pub(super) fn new(
        storage: &'a Arc<dyn Storage>,
        engine: EngineId,
        entry: &'a IndexEntry,
    ) -> Self {
        let offset = FILE_HEADER_BYTES as u64;
        let expected = (offset, entry.previous);
        let (buffer, piece) = (Vec::new(), Vec::new());
        let checksums = Checksums::default();
        Self {
            storage,
            engine,
            entry,
            offset,
            buffer,
            piece_at: 0,
            piece,
            expected,
            in_vain: 0,
            checksums,
        }
    }

    fn path(&self) -> PathBuf {
        self.storage.path(&self.entry.sequence.file_name())
    }

    fn io(&self, error: std::io::Error) -> Error {
        Error::io("read", self.path(), error)
    }

    fn header(&self) -> Result<Option<[u8; HEADER_BYTES]>> {
        let mut bytes = [0; HEADER_BYTES];
        if self.offset + HEADER_BYTES as u64 > self.entry.bytes {
            return Ok(None);
        }
        let read = self.entry.file.read_exact_at(&mut bytes, self.offset);
        read.map_err(|error| self.io(error))?;
        Ok(Some(bytes))
    }

    /// Moves to just after the batch `start`, if this file holds it. Batches before it are not
    /// needed, so damage to them is ignored: only a header with the number and check is looked for.
    fn skip_to(&mut self, start: ChainPoint) -> Result<()> {
        if start.number <= self.entry.previous.number {
            return Ok(());
        }
        let mut search = Cursor::new(self.storage, self.engine, self.entry);
        while let Some((offset, header)) = search.find_header()? {
            if header.number == start.number && header.check == start.check {
                self.offset = offset + header.total_len();
                return Ok(());
            }
            if header.number == start.number.next() && header.previous_check == start.check {
                self.offset = offset;
                return Ok(());
            }
        }
        let reason = format!("batch {} is not in it", start.number);
        Err(Error::damaged(self.path(), self.offset, reason))
    }

    /// The batch that follows `last`.
    pub(super) fn next(&mut self, last: ChainPoint) -> Result<Next<'_>> {
        let offset = self.offset;
        let stop = |reason| Ok(Next::End { offset, reason });
        let Some(head) = self.header()? else { return stop(UNUSED) };
        let header = match BatchHeader::decode(self.engine, &head) {
            Ok(header) => header,
            Err(_) if head == [0; HEADER_BYTES] => return stop(UNUSED),
            // In a reused file anything may lie here, but hardly a batch but for its first bytes.
            Err(UNUSED) if BatchHeader::decode_without_magic(self.engine, &head).is_ok() => {
                return stop("a batch whose first bytes are damaged");
            }
            Err(reason) => return stop(reason),
        };
        if header.number != last.number.next() || header.previous_check != last.check {
            // In a reused file: a batch of its earlier life.
            return stop(if header.number <= last.number {
                UNUSED
            } else {
                "a batch out of order"
            });
        }
        let len = header.total_len();
        if len > self.entry.bytes - offset {
            return stop("a batch that goes beyond its file");
        }
        let Ok(len_in_memory) = usize::try_from(len) else {
            return stop("a batch above the memory");
        };
        self.buffer.resize(len_in_memory, 0);
        let read = self.entry.file.read_exact_at(&mut self.buffer, offset);
        read.map_err(|error| self.io(error))?;
        match Batch::decode(self.engine, &self.buffer) {
            Ok(_) => {
                self.offset += len;
                Ok(Next::Batch(&self.buffer))
            }
            Err(reason) => stop(reason),
        }
    }

    /// The next batch anywhere in the file, from the cursor on. Batches need not follow each other.
    ///
    /// What applications record lies in batches as they gave it, and may look like a header. So one
    /// is believed where the batch that it follows ends; anywhere else with its whole batch only.
    pub(super) fn find_batch(&mut self) -> Result<Option<FoundBatch<'_>>> {
        while let Some((offset, header)) = self.find_header()? {
            let (place, before) = self.expected;
            let follows =
                header.number == before.number.next() && header.previous_check == before.check;
            let len = header.total_len();
            let is_whole = self.read_whole(offset, &header)?;
            if !is_whole && (offset != place || !follows) {
                continue;
            }
            self.offset = offset.saturating_add(len);
            let point = ChainPoint { number: header.number, check: header.check };
            self.expected = (self.offset, point);
            let bytes = is_whole.then_some(self.buffer.as_slice());
            return Ok(Some(FoundBatch { offset, header, bytes }));
        }
        Ok(None)
    }

    /// Whether the whole batch of a header lies here.
    fn read_whole(&mut self, offset: u64, header: &BatchHeader) -> Result<bool> {
        let len = header.total_len();
        let Ok(len_in_memory) = usize::try_from(len) else { return Ok(false) };
        if len > self.entry.bytes - offset {
            return Ok(false);
        }
        // Batches hardly overlap, so that those which don't verify are soon read. Where more claim
        // to be some, they may be as many as fit, each up to the file's end: then no byte is read
        // again, and what has its checksum and is none is passed over.
        if self.in_vain > self.entry.bytes {
            let (body_len, body_crc) = header.body();
            let start = offset + HEADER_BYTES as u64;
            let check = self.checksums.of(&*self.entry.file, start, body_len);
            if check.map_err(|error| self.io(error))? != body_crc {
                return Ok(false);
            }
            self.offset = offset + len;
        }
        self.buffer.resize(len_in_memory, 0);
        let read = self.entry.file.read_exact_at(&mut self.buffer, offset);
        read.map_err(|error| self.io(error))?;
        let is_whole = Batch::decode(self.engine, &self.buffer).is_ok();
        self.in_vain += if is_whole { 0 } else { len };
        Ok(is_whole)
    }

    /// The next verifying header anywhere in the file, from the cursor on: batches need not follow
    /// each other, nor need it be one's.
    pub(super) fn find_header(&mut self) -> Result<Option<(u64, BatchHeader)>> {
        loop {
            let offset = self.offset;
            if offset.saturating_add(HEADER_BYTES as u64) > self.entry.bytes {
                return Ok(None);
            }
            let piece_end = self.piece_at + self.piece.len() as u64;
            if offset < self.piece_at || offset + HEADER_BYTES as u64 > piece_end {
                let left = self.entry.bytes - offset;
                let count = usize::try_from(left).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
                self.piece.resize(count, 0);
                self.piece_at = offset;
                let read = self.entry.file.read_exact_at(&mut self.piece, offset);
                read.map_err(|error| self.io(error))?;
            }
            let at = usize::try_from(offset - self.piece_at).unwrap_or(usize::MAX);
            let head = self.piece.get(at..).and_then(|rest| rest.first_chunk());
            self.offset += BATCH_ALIGN as u64;
            if let Some(head) = head
                && let Ok(header) = BatchHeader::decode(self.engine, head)
            {
                return Ok(Some((offset, header)));
            }
        }
    }
}

/// The durable batches after a snapshot, for a merge.
#[derive(Debug)]
pub(crate) struct JournalSource {
    storage: Arc<dyn Storage>,
    engine: EngineId,
    files: Vec<IndexEntry>,
    file: usize,
    offset: Option<u64>,
    last: ChainPoint,
    end: BatchNumber,
}

impl JournalSource {
    /// The batches after `start`, up to `end` or a little more.
    pub(crate) fn new(
        files: &JournalFiles,
        engine: EngineId,
        start: ChainPoint,
        end: BatchNumber,
    ) -> Self {
        let storage = Arc::clone(files.storage());
        let files = files.holding_after(start.number);
        Self { storage, engine, files, file: 0, offset: None, last: start, end }
    }

    /// Goes on up to `end`, in the files as they are now, without looking for its place again.
    pub(crate) fn go_on(&mut self, files: &JournalFiles, end: BatchNumber) {
        let sequence = self.files.get(self.file).map(|entry| entry.sequence);
        self.files = files.holding_after(self.last.number);
        let place = self.files.iter().position(|entry| Some(entry.sequence) == sequence);
        match place {
            Some(place) => self.file = place,
            None => (self.file, self.offset) = (0, None),
        }
        self.end = end;
    }

    /// The last batch that was handed out.
    pub(crate) fn last(&self) -> ChainPoint {
        self.last
    }
}

/// Whether the journal still has the batch `point`, by number and check. It must be durable.
pub(crate) fn holds(files: &JournalFiles, engine: EngineId, point: ChainPoint) -> Result<bool> {
    let Some(before) = point.number.0.checked_sub(1) else { return Ok(false) };
    let entries = files.holding_after(BatchNumber(before));
    if entries.iter().any(|entry| entry.previous == point) {
        return Ok(true);
    }
    // A reused file still shows batches of its earlier life, none of which follows its start.
    let Some(entry) = entries.first().filter(|entry| entry.previous.number < point.number) else {
        return Ok(false);
    };
    let mut cursor = Cursor::new(files.storage(), engine, entry);
    while let Some((_, header)) = cursor.find_header()? {
        if header.number == point.number && header.check == point.check {
            return Ok(true);
        }
    }
    Ok(false)
}

impl BatchSource for JournalSource {
    fn next_batch(
        &mut self,
        visit: &mut dyn FnMut(&Batch<'_>) -> DecodeResult<()>,
    ) -> Result<bool> {
        while self.last.number < self.end {
            let Some(entry) = self.files.get(self.file) else { break };
            let bound = self.files.get(self.file + 1).map(|next| next.previous.number);
            if bound.is_some_and(|bound| self.last.number >= bound) {
                self.file += 1;
                self.offset = None;
                continue;
            }
            let path = self.storage.path(&entry.sequence.file_name());
            if self.last.number < entry.previous.number {
                let (needed, begin) = (self.last.number.next(), entry.previous.number.next());
                let reason =
                    format!("the journal begins with batch {begin}, and {needed} is needed");
                return Err(Error::damaged(path, 0, reason));
            }
            let mut cursor = Cursor::new(&self.storage, self.engine, entry);
            match self.offset {
                Some(offset) => cursor.offset = offset,
                None => cursor.skip_to(self.last)?,
            }
            let at = cursor.offset;
            let bytes = match cursor.next(self.last)? {
                Next::Batch(bytes) => bytes,
                Next::End { offset, reason } => {
                    let number = self.last.number.next();
                    let reason = format!("batch {number} can't be read back: {reason}");
                    return Err(Error::damaged(path, offset, reason));
                }
            };
            let batch = Batch::decode(self.engine, bytes)
                .map_err(|reason| Error::damaged(&path, at, reason))?;
            self.last = ChainPoint { number: batch.header.number, check: batch.header.check };
            visit(&batch).map_err(|reason| {
                let reason = format!("batch {}: {reason}", batch.header.number);
                Error::damaged(path, at, reason)
            })?;
            self.offset = Some(cursor.offset);
            return Ok(true);
        }
        Ok(false)
    }
}
