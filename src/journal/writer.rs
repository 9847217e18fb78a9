//! Appending batches to the file in use.

use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::journal::files::{FILE_HEADER_BYTES, FileHeader, FileSequence};
use crate::journal::pool::{IndexEntry, JournalFiles};
use crate::model::BatchNumber;
use crate::storage::StorageFile;

/// A numbered and checksummed batch, immutable: a retry writes the same bytes.
#[derive(Debug)]
pub(crate) struct Encoded {
    pub(crate) number: BatchNumber,
    pub(crate) check: u32,
    pub(crate) bytes: Vec<u8>,
}

/// A batch by number and check: a point in the chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ChainPoint {
    pub(crate) number: BatchNumber,
    pub(crate) check: u32,
}

impl ChainPoint {
    /// Before the first batch.
    pub(crate) const START: Self = Self { number: BatchNumber::ZERO, check: 0 };
}

/// Appends to the file in use. Owned by the drain.
#[derive(Debug)]
pub(crate) struct JournalWriter {
    files: Arc<JournalFiles>,
    active: IndexEntry,
    offset: u64,
    head: ChainPoint,
    /// Files written to since they were last handed out to be synced.
    unsynced: Vec<Arc<dyn StorageFile>>,
    bytes_written: u64,
}

impl JournalWriter {
    /// Begins in a new file, durably: `batches` follow `previous` and take the place of whatever
    /// else follows it in the files before. Needs a prepared file that has room for them.
    pub(crate) fn begin(
        files: Arc<JournalFiles>,
        previous: ChainPoint,
        batches: &[Encoded],
    ) -> Result<Self> {
        let (active, offset) = files.install(previous, batches)?;
        let head = batches.last().map_or(previous, Encoded::point);
        Ok(Self { files, active, offset, head, unsynced: Vec::new(), bytes_written: offset })
    }

    /// The last batch appended.
    pub(crate) fn head(&self) -> ChainPoint {
        self.head
    }

    /// How many bytes were handed to the operating system so far.
    pub(crate) fn bytes_written(&self) -> u64 {
        self.bytes_written
    }

    /// Whether a batch of up to `bytes` can be appended now: in the file in use, or in a prepared
    /// one.
    pub(crate) fn has_room(&self, bytes: u64) -> bool {
        self.offset + bytes <= self.active.bytes || self.files.has_spare(bytes)
    }

    /// The error when there is no room: why no file could be prepared, or that none is yet.
    pub(crate) fn full(&self) -> Error {
        let failure = self.files.failure();
        let (kind, reason) = failure
            .unwrap_or_else(|| (ErrorKind::StorageFull, "no file is prepared yet".to_owned()));
        let full = std::io::Error::new(kind, format!("the journal has no room: {reason}"));
        Error::io("write", self.path(self.active.sequence.next()), full)
    }

    /// Appends the batch that follows the head. In the page cache when this returns, not yet
    /// durable. After an error nothing has changed, and the same batch can be tried again.
    pub(crate) fn append(&mut self, batch: &Encoded) -> Result<()> {
        debug_assert_eq!(batch.number, self.head.number.next());
        let len = batch.bytes.len() as u64;
        if self.offset + len > self.active.bytes {
            return self.append_to_next_file(batch);
        }
        self.active
            .file
            .write_all_at(&batch.bytes, self.offset)
            .map_err(|error| Error::io("write", self.path(self.active.sequence), error))?;
        self.appended(batch, len);
        Ok(())
    }

    fn append_to_next_file(&mut self, batch: &Encoded) -> Result<()> {
        let len = batch.bytes.len() as u64;
        let Some(spare) = self.files.take_spare(len, self.head) else { return Err(self.full()) };
        let header = FileHeader::InUse {
            sequence: spare.sequence,
            bytes: spare.bytes,
            previous: self.head.number,
            previous_check: self.head.check,
        };
        // One write. A process that is killed in it may leave a part, and then the lanes still
        // have the records: their slots are freed only after it.
        let bytes = [&header.encode(self.files.engine())[..], &batch.bytes].concat();
        if let Err(error) = spare.file.write_all_at(&bytes, 0) {
            let path = self.path(spare.sequence);
            self.files.give_back(spare);
            return Err(Error::io("write", path, error));
        }
        self.files.end_writing(self.active.sequence);
        self.active = spare.in_use(self.head);
        self.files.count_in(self.active.clone());
        self.offset = FILE_HEADER_BYTES as u64;
        self.appended(batch, len);
        Ok(())
    }

    fn appended(&mut self, batch: &Encoded, len: u64) {
        self.offset += len;
        self.bytes_written += len;
        self.head = batch.point();
        let file = &self.active.file;
        if !self.unsynced.last().is_some_and(|last| Arc::ptr_eq(last, file)) {
            self.unsynced.push(Arc::clone(file));
        }
    }

    /// The files to sync so that everything appended so far is durable.
    pub(crate) fn take_unsynced(&mut self) -> Vec<Arc<dyn StorageFile>> {
        std::mem::take(&mut self.unsynced)
    }

    /// After a failed sync: the batches that no sync has covered go to a new file, same bytes, same
    /// numbers, and are synced there. `durable` is the last batch that a sync has covered. Once
    /// this succeeds everything appended is durable.
    pub(crate) fn rescue(&mut self, durable: ChainPoint, batches: &[Encoded]) -> Result<()> {
        let (active, offset) = self.files.install(durable, batches)?;
        self.files.end_writing(self.active.sequence);
        self.bytes_written += offset;
        self.active = active;
        self.offset = offset;
        self.unsynced.clear();
        Ok(())
    }

    /// Where the next batch goes, as far as the file in use has room for it.
    pub(crate) fn place(&self) -> (PathBuf, u64) {
        (self.path(self.active.sequence), self.offset)
    }

    fn path(&self, sequence: FileSequence) -> PathBuf {
        self.files.path(sequence)
    }
}

impl Encoded {
    pub(crate) fn point(&self) -> ChainPoint {
        ChainPoint { number: self.number, check: self.check }
    }
}
