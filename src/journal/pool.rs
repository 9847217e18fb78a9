//! The journal's files: those that hold batches, those prepared ahead, and those no longer needed.

use std::collections::VecDeque;
use std::fmt;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use crate::error::{Error, Result};
use crate::journal::files::{FILE_HEADER_BYTES, FileHeader, FileSequence};
use crate::journal::writer::{ChainPoint, Encoded};
use crate::model::{BatchNumber, EngineId};
use crate::storage::{Reopening, Storage, StorageFile, TemporaryFile, is_taken_away};

/// How many prepared files are kept ahead of the one in use: one for the next batch, one while it
/// is being replaced.
const SPARES: usize = 2;

/// The size of a file that must be there at once, at open: larger ones are prepared in the
/// background.
const FIRST_FILE_BYTES: u64 = 1 << 20;

/// Zeros are written in pieces of this size.
const ZERO_BYTES: usize = 1 << 20;

/// A file that holds batches.
#[derive(Debug, Clone)]
pub(crate) struct IndexEntry {
    pub(crate) sequence: FileSequence,
    pub(crate) file: Arc<dyn StorageFile>,
    pub(crate) bytes: u64,
    /// The last batch before this file. The file before counts up to it.
    pub(crate) previous: ChainPoint,
}

/// A zero-written file, not yet in use.
#[derive(Debug, Clone)]
pub(super) struct Spare {
    pub(super) sequence: FileSequence,
    pub(super) file: Arc<dyn StorageFile>,
    pub(super) bytes: u64,
}

impl Spare {
    pub(super) fn in_use(self, previous: ChainPoint) -> IndexEntry {
        IndexEntry { sequence: self.sequence, file: self.file, bytes: self.bytes, previous }
    }
}

/// A file that begins after `previous` follows these: what they hold beyond it no longer counts.
/// For files that began after a later batch this is everything, and they end where they begin.
pub(crate) fn replace_after(files: &mut [IndexEntry], mut previous: ChainPoint) {
    for file in files.iter_mut().rev() {
        if file.previous.number > previous.number {
            file.previous = previous;
        }
        previous = file.previous;
    }
}

/// The journal's files, shared by the writer, the preparer and the merge.
pub(crate) struct JournalFiles {
    storage: Arc<dyn Storage>,
    /// Those that are not written to any more: with merges that fail there may be more of them than
    /// can be open.
    read_only: Arc<Reopening>,
    engine: EngineId,
    file_bytes: u64,
    state: Mutex<FilesState>,
    /// Held while a file is made and numbered, so that the numbers on disk follow each other.
    making: Mutex<()>,
    /// Wakes the preparer.
    wake_preparer: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl fmt::Debug for JournalFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JournalFiles").field("state", &self.state).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct FilesState {
    index: Vec<IndexEntry>,
    spares: VecDeque<Spare>,
    /// The sequence number of the next file to prepare.
    next: FileSequence,
    /// Why a file could not be prepared the last time, if it could not.
    failure: Option<(ErrorKind, String)>,
    /// Files that are needed no more, by their current names, lowest first. They are reused or
    /// removed in this order, so that the sequence numbers on disk have no gap from the first file
    /// on that is needed: a gap there is a file that somebody removed.
    obsolete: VecDeque<IndexEntry>,
    /// Obsolete files that could not be removed. Removal is retried once others are released: a
    /// file that can never be removed must not keep others from being prepared. Until then there is
    /// a gap after it.
    unremoved: Vec<IndexEntry>,
    /// Why one could not be removed, until the preparer has said so.
    not_removed: Option<Error>,
}

impl JournalFiles {
    /// Where they lie.
    pub(super) fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// `index` and `prepared` each in the order of their sequence numbers, the prepared ones after
    /// the index.
    pub(crate) fn new(
        storage: Arc<dyn Storage>,
        engine: EngineId,
        file_bytes: u64,
        index: Vec<IndexEntry>,
        prepared: Vec<(FileSequence, Arc<dyn StorageFile>, u64)>,
    ) -> Self {
        let last = prepared.last().map(|&(sequence, ..)| sequence);
        let last = last.or(index.last().map(|entry| entry.sequence)).unwrap_or(FileSequence(0));
        let spares = prepared
            .into_iter()
            .map(|(sequence, file, bytes)| Spare { sequence, file, bytes })
            .collect();
        let read_only = Reopening::new(Arc::clone(&storage));
        let state = FilesState {
            index,
            spares,
            next: last.next(),
            failure: None,
            obsolete: VecDeque::new(),
            unremoved: Vec::new(),
            not_removed: None,
        };
        Self {
            storage,
            read_only,
            engine,
            file_bytes,
            state: Mutex::new(state),
            making: Mutex::new(()),
            wake_preparer: OnceLock::new(),
        }
    }

    /// The files in use that are not written to any more are these.
    pub(crate) fn reopened_by(self, read_only: Arc<Reopening>) -> Self {
        Self { read_only, ..self }
    }

    /// Prepares files until enough are ready: zero-written, so that a later sync writes no
    /// metadata, under their final names, and synced with the directory. Files that are needed no
    /// more are reused. Called by the preparer, and by recovery.
    ///
    /// # Errors
    /// Why no file could be prepared; or why one that is no longer needed could not be removed,
    /// which is reported once the others are prepared.
    pub(crate) fn prepare(&self) -> Result<()> {
        while self.prepare_next(SPARES)? {}
        self.state.lock().not_removed.take().map_or(Ok(()), Err)
    }

    /// Prepares a file unless one is ready, or waits for the preparer that is working on one: for
    /// callers that wait for the disk anyway.
    pub(crate) fn provide_spare(&self) -> Result<()> {
        while self.lacks_spare() {
            match self.prepare_next(1) {
                // The preparer may have made one meanwhile, for which there was room.
                Err(error) if self.lacks_spare() => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Sets how the preparer is woken when a prepared file was taken.
    pub(crate) fn set_wake_preparer(&self, wake: impl Fn() + Send + Sync + 'static) {
        // Set once, by the engine that owns the files.
        let _ = self.wake_preparer.set(Box::new(wake));
    }

    fn wake_preparer(&self) {
        if let Some(wake) = self.wake_preparer.get() {
            wake();
        }
    }

    /// How many prepared files have room for every batch: those left from another configuration,
    /// and the first of an open, may be smaller.
    fn count_large(&self, state: &FilesState) -> usize {
        state.spares.iter().filter(|spare| spare.bytes >= self.file_bytes).count()
    }

    /// Prepares one file where less than `enough` are ready, or removes one that is needed no more.
    /// Whether there was anything to do.
    fn prepare_next(&self, enough: usize) -> Result<bool> {
        let prepared = self.try_prepare_next(enough);
        self.state.lock().failure = prepared.as_ref().err().map(|error| match error {
            Error::Io { source, .. } => (source.kind(), error.to_string()),
            _ => (ErrorKind::Other, error.to_string()),
        });
        prepared
    }

    fn try_prepare_next(&self, enough: usize) -> Result<bool> {
        let _making = self.making.lock();
        let (is_enough, sequence, obsolete) = {
            let mut state = self.state.lock();
            (self.count_large(&state) >= enough, state.next, state.obsolete.pop_front())
        };
        let spare = match obsolete {
            None if is_enough => return Ok(false),
            None => {
                self.require_room()?;
                self.create(sequence, self.file_bytes)?
            }
            Some(entry) if is_enough || entry.bytes < self.file_bytes => {
                // Whoever waits for a file has nothing to do with it.
                if let Err(error) = self.remove(entry) {
                    self.state.lock().not_removed = Some(error);
                }
                return Ok(true);
            }
            Some(entry) => self.reuse(sequence, entry)?,
        };
        let mut state = self.state.lock();
        state.next = spare.sequence.next();
        state.spares.push_back(spare);
        Ok(true)
    }

    /// Removes the files that are needed no more, rather than have them reused.
    pub(crate) fn remove_obsolete(&self) -> Result<()> {
        let _making = self.making.lock();
        loop {
            let Some(entry) = self.state.lock().obsolete.pop_front() else { return Ok(()) };
            self.remove(entry)?;
        }
    }

    /// An error once no file can be made durable under its name any more.
    pub(crate) fn check_directory(&self) -> Result<()> {
        let checked = self.storage.check_directory();
        checked.map_err(|error| Error::io("make a file in", self.storage.path(""), error))
    }

    /// Where the directory was, if somebody has moved or replaced it.
    pub(crate) fn moved_from(&self) -> Option<PathBuf> {
        self.storage.moved_from()
    }

    /// A file that is written to, or a prepared one, if somebody has removed, moved or replaced it.
    pub(crate) fn find_taken_away(&self) -> Option<PathBuf> {
        // So that none of them comes to be needed no more, and is removed, meanwhile.
        let _making = self.making.lock();
        let files: Vec<_> = {
            let state = self.state.lock();
            let index = state.index.iter().map(|entry| (entry.sequence, Arc::clone(&entry.file)));
            let spares = state.spares.iter().map(|spare| (spare.sequence, Arc::clone(&spare.file)));
            index.chain(spares).collect()
        };
        files.into_iter().find_map(|(sequence, file)| {
            let name = sequence.file_name();
            // Those that are only read are opened by their names. What can't be told is told by the
            // writes.
            let is_taken = is_taken_away(&*self.storage, &name, &*file).unwrap_or(false);
            is_taken.then(|| self.storage.path(&name))
        })
    }

    fn remove(&self, entry: IndexEntry) -> Result<()> {
        let name = entry.sequence.file_name();
        self.read_only.forget(&name);
        self.storage.remove(&name).map_err(|error| {
            if error.kind() != ErrorKind::NotFound {
                self.state.lock().unremoved.push(entry);
            }
            Error::io("remove", self.storage.path(&name), error)
        })
    }

    /// Refuses a file that does not fit on the disk. A file system may take all that is left before
    /// it says so, and others, this engine's small files among them, would find none meanwhile.
    fn require_room(&self) -> Result<()> {
        // Where that can't be told it is tried.
        let free = self.storage.free_bytes().unwrap_or(u64::MAX);
        if free >= self.file_bytes {
            return Ok(());
        }
        let reason = format!("{} bytes are needed, and {free} are free", self.file_bytes);
        let full = std::io::Error::new(ErrorKind::StorageFull, reason);
        Err(Error::io("create a file in", self.storage.path(""), full))
    }

    fn create(&self, sequence: FileSequence, bytes: u64) -> Result<Spare> {
        let temporary = TemporaryFile::create(&self.storage, sequence.temporary_name())?;
        temporary.allocate(bytes)?;
        let zeros = vec![0; ZERO_BYTES.min(usize::try_from(bytes).unwrap_or(ZERO_BYTES))];
        let mut offset = 0;
        while offset < bytes {
            let count = usize::try_from(bytes - offset).unwrap_or(ZERO_BYTES).min(zeros.len());
            temporary.write(&zeros[..count], offset)?;
            offset += count as u64;
        }
        temporary.write(&FileHeader::Prepared { sequence, bytes }.encode(self.engine), 0)?;
        let file = Arc::clone(temporary.file());
        temporary.publish(&sequence.file_name())?;
        Ok(Spare { sequence, file, bytes })
    }

    /// Gives a file that is needed no more a new name. What it held can't be taken for new batches:
    /// those continue a chain of numbers and checks that the old ones are not part of.
    fn reuse(&self, sequence: FileSequence, entry: IndexEntry) -> Result<Spare> {
        let old = entry.sequence.file_name();
        let rename = || -> std::io::Result<_> {
            let header = FileHeader::Prepared { sequence, bytes: entry.bytes }.encode(self.engine);
            let file = self.read_only.take(&old)?;
            file.write_all_at(&header, 0)?;
            file.sync_data()?;
            self.storage.rename(&old, &sequence.file_name())?;
            self.storage.sync_directory()?;
            Ok(file)
        };
        let file = rename().map_err(|error| {
            // It would only take space: nobody knows of it any more. Under its new name it is a
            // file that was prepared.
            let _ = self.storage.remove(&old);
            Error::io("reuse", self.storage.path(&old), error)
        })?;
        Ok(Spare { sequence, file, bytes: entry.bytes })
    }

    /// The first prepared file with room for `bytes`, to go on in behind `previous`. The smaller
    /// ones before it are passed over.
    pub(super) fn take_spare(&self, bytes: u64, previous: ChainPoint) -> Option<Spare> {
        let needed = FILE_HEADER_BYTES as u64 + bytes;
        let mut state = self.state.lock();
        let place = state.spares.iter().position(|spare| spare.bytes >= needed)?;
        let passed_over: Vec<_> = state.spares.drain(..place).collect();
        // They hold nothing, but keep their place in the order of the sequence numbers.
        state.index.extend(passed_over.into_iter().map(|spare| spare.in_use(previous)));
        let spare = state.spares.pop_front();
        drop(state);
        self.wake_preparer();
        spare
    }

    /// A prepared file with room for `bytes`, created where none is ready, and the smaller ones
    /// that were passed over.
    fn make_spare(&self, bytes: u64) -> Result<(Vec<Spare>, Spare)> {
        let needed = FILE_HEADER_BYTES as u64 + bytes;
        let _making = self.making.lock();
        let mut passed_over = Vec::new();
        loop {
            let (spare, next) = {
                let mut state = self.state.lock();
                (state.spares.pop_front(), state.next)
            };
            match spare {
                Some(spare) if spare.bytes >= needed => return Ok((passed_over, spare)),
                Some(spare) => passed_over.push(spare),
                None => {
                    let bytes = needed.max(FIRST_FILE_BYTES.min(self.file_bytes));
                    let spare = self.create(next, bytes)?;
                    self.state.lock().next = next.next();
                    return Ok((passed_over, spare));
                }
            }
        }
    }

    /// Has a prepared file with room for `bytes` ready: what puts it in use then takes no space.
    pub(crate) fn make_room(&self, bytes: u64) -> Result<()> {
        let (passed_over, spare) = self.make_spare(bytes)?;
        let spares = &mut self.state.lock().spares;
        [spare]
            .into_iter()
            .chain(passed_over.into_iter().rev())
            .for_each(|it| spares.push_front(it));
        Ok(())
    }

    fn put_in_use(&self, spare: &Spare, previous: ChainPoint) -> Result<()> {
        let header = FileHeader::InUse {
            sequence: spare.sequence,
            bytes: spare.bytes,
            previous: previous.number,
            previous_check: previous.check,
        };
        let write = || {
            let written = spare.file.write_all_at(&header.encode(self.engine), 0);
            written.inspect_err(|_| self.put_out_of_use(spare))?;
            spare.file.sync_data()
        };
        let path = self.storage.path(&spare.sequence.file_name());
        write().map_err(|error| Error::io("write", path, error))
    }

    /// After a write that failed: half a header would be taken for damage. Where this fails too, it
    /// is.
    fn put_out_of_use(&self, spare: &Spare) {
        let prepared = FileHeader::Prepared { sequence: spare.sequence, bytes: spare.bytes };
        let _ = spare.file.write_all_at(&prepared.encode(self.engine), 0);
    }

    /// Puts a file in use for recovery or rescue: writes `batches`, syncs them, and only then
    /// writes and syncs the header that makes the file count, in place of all that the files before
    /// hold beyond `previous`. Returns the file and where it goes on.
    pub(super) fn install(
        &self,
        previous: ChainPoint,
        batches: &[Encoded],
    ) -> Result<(IndexEntry, u64)> {
        let bytes: u64 = batches.iter().map(|batch| batch.bytes.len() as u64).sum();
        let (passed_over, spare) = self.make_spare(bytes)?;
        let mut offset = FILE_HEADER_BYTES as u64;
        let mut write = || -> std::io::Result<()> {
            for batch in batches {
                spare.file.write_all_at(&batch.bytes, offset)?;
                offset += batch.bytes.len() as u64;
            }
            spare.file.sync_data()
        };
        let path = self.storage.path(&spare.sequence.file_name());
        write().map_err(|error| Error::io("write", path, error))?;
        self.put_in_use(&spare, previous)?;
        let entry = spare.in_use(previous);
        let mut state = self.state.lock();
        replace_after(&mut state.index, previous);
        // Files that hold nothing, but keep their place in the order of the sequence numbers.
        state.index.extend(passed_over.into_iter().map(|spare| spare.in_use(previous)));
        state.index.push(entry.clone());
        Ok((entry, offset))
    }

    /// From now on the file is read only, if at all: it need not stay open.
    pub(super) fn end_writing(&self, sequence: FileSequence) {
        let mut state = self.state.lock();
        let place = state.index.iter().rposition(|entry| entry.sequence == sequence);
        if let Some(entry) = place.and_then(|place| state.index.get_mut(place)) {
            entry.file = self.read_only.keep(sequence.file_name(), Arc::clone(&entry.file));
        }
    }

    /// The files that hold the batches after `number`, in order.
    pub(crate) fn holding_after(&self, number: BatchNumber) -> Vec<IndexEntry> {
        let state = self.state.lock();
        let begins_after = state.index.partition_point(|entry| entry.previous.number <= number);
        state.index.iter().skip(begins_after.saturating_sub(1)).cloned().collect()
    }

    /// The file that holds the batch after `number`, or will.
    pub(crate) fn path_of_next(&self, number: BatchNumber) -> PathBuf {
        let holding = self.holding_after(number).first().map(|entry| entry.sequence);
        self.path(holding.unwrap_or_else(|| self.state.lock().next))
    }

    /// How many files there are from the one on that holds the batch `number`, with those that hold
    /// nothing any more: lives that end before anything is known durable replace each other's.
    pub(crate) fn count_from(&self, number: BatchNumber) -> usize {
        let state = self.state.lock();
        let begins_at = state.index.partition_point(|entry| entry.previous.number < number);
        state.index.len() - begins_at.saturating_sub(1)
    }

    /// Releases the files whose batches are all at or below `number`, for reuse.
    pub(crate) fn release_up_to(&self, number: BatchNumber) {
        let mut state = self.state.lock();
        let begins_after = state.index.partition_point(|entry| entry.previous.number <= number);
        let released: Vec<_> = state.index.drain(..begins_after.saturating_sub(1)).collect();
        let again = std::mem::take(&mut state.unremoved);
        state.obsolete.extend(again.into_iter().chain(released));
    }

    /// The size of a file.
    pub(crate) fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    /// The bytes that the journal's files take, prepared ones included.
    pub(crate) fn bytes(&self) -> u64 {
        let state = self.state.lock();
        let held = state.index.iter().chain(&state.obsolete).chain(&state.unremoved);
        let held = held.map(|entry| entry.bytes);
        held.chain(state.spares.iter().map(|spare| spare.bytes)).sum()
    }

    /// Whether no file of the full size is ready.
    pub(crate) fn lacks_spare(&self) -> bool {
        self.count_large(&self.state.lock()) == 0
    }

    /// Whether a prepared file has room for `bytes`.
    pub(super) fn has_spare(&self, bytes: u64) -> bool {
        let needed = FILE_HEADER_BYTES as u64 + bytes;
        self.state.lock().spares.iter().any(|spare| spare.bytes >= needed)
    }

    /// Whose they are.
    pub(super) fn engine(&self) -> EngineId {
        self.engine
    }

    /// Why no file could be prepared the last time, if none could.
    pub(super) fn failure(&self) -> Option<(ErrorKind, String)> {
        self.state.lock().failure.clone()
    }

    /// A prepared file that was taken holds a batch now.
    pub(super) fn count_in(&self, entry: IndexEntry) {
        self.state.lock().index.push(entry);
    }

    /// A prepared file that was taken could not be written to: it is the next one again.
    pub(super) fn give_back(&self, spare: Spare) {
        self.put_out_of_use(&spare);
        self.state.lock().spares.push_front(spare);
    }

    pub(super) fn path(&self, sequence: FileSequence) -> PathBuf {
        self.storage.path(&sequence.file_name())
    }
}
