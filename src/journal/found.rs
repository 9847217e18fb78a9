//! The journal's files as they are found at open.
#![deny(clippy::indexing_slicing)]

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::journal::files::{FILE_HEADER_BYTES, FileHeader, FileSequence, HeaderError, VERSION};
use crate::journal::pool::{IndexEntry, JournalFiles, replace_after};
use crate::journal::writer::ChainPoint;
use crate::model::{BatchNumber, EngineId};
use crate::storage::{Reopening, Storage, StorageFile};

/// The journal's files as found on disk.
#[derive(Debug)]
pub(crate) struct FoundFiles {
    pub(crate) in_use: Vec<IndexEntry>,
    pub(crate) prepared: Vec<(FileSequence, Arc<dyn StorageFile>, u64)>,
    /// Files that were interrupted while they were given a new name: they hold nothing that is
    /// needed.
    pub(crate) misnamed: Vec<String>,
    /// Files whose header does not verify, in the order of their names.
    pub(crate) unreadable: Vec<UnreadableFile>,
    /// Files in use that are not as long as they were written, and how long that was.
    pub(crate) resized: Vec<(FileSequence, u64)>,
    /// Of the files in use: there may be more than can be open.
    reopening: Arc<Reopening>,
}

/// A file whose header does not verify, or which is not as long as it says.
#[derive(Debug)]
pub(crate) struct UnreadableFile {
    pub(crate) entry: IndexEntry,
    pub(crate) reason: &'static str,
    /// It was prepared, and not yet in use, as certainly as can be told: it held nothing.
    pub(crate) was_prepared: bool,
}

impl FoundFiles {
    /// Whether no file was ever put in use, as far as can be told.
    pub(crate) fn hold_nothing(&self) -> bool {
        self.in_use.is_empty() && self.unreadable.is_empty()
    }

    /// What is wrong with the length of a file in use.
    pub(crate) fn resized(&self, entry: &IndexEntry) -> Option<String> {
        let (_, written) =
            self.resized.iter().find(|&&(sequence, _)| sequence == entry.sequence)?;
        Some(format!("it is {} bytes long, not {written} as it was written", entry.bytes))
    }

    /// The files as the engine goes on with them. One that was left prepared between files in use,
    /// or whose header does not verify and that was not refused, holds nothing that is needed: it
    /// keeps its place until the files before it are released, or is used behind them. Such a
    /// header is written anew, or the next open would meet it between files in use, and refuse.
    pub(crate) fn into_files(
        self,
        storage: Arc<dyn Storage>,
        engine: EngineId,
        file_bytes: u64,
    ) -> Result<JournalFiles> {
        let mut index = self.in_use;
        let mut spares = Vec::new();
        let mut unused = Vec::new();
        for (sequence, file, bytes) in self.prepared {
            // A copy of the directory may have holes where zeros were.
            file.allocate(bytes).map_err(|error| {
                Error::io("allocate", storage.path(&sequence.file_name()), error)
            })?;
            unused.push(IndexEntry { sequence, file, bytes, previous: ChainPoint::START });
        }
        for UnreadableFile { entry, .. } in self.unreadable {
            unused.push(prepare_anew(&storage, engine, entry)?);
        }
        unused.sort_unstable_by_key(|entry| entry.sequence);
        for mut entry in unused {
            let place = index.partition_point(|used| used.sequence < entry.sequence);
            match index.get(place) {
                Some(next) => {
                    entry.previous = next.previous;
                    index.insert(place, entry);
                }
                None => spares.push((entry.sequence, entry.file, entry.bytes)),
            }
        }
        let files = JournalFiles::new(storage, engine, file_bytes, index, spares);
        Ok(files.reopened_by(self.reopening))
    }
}

/// Writes the header of a file that holds nothing which is needed.
fn prepare_anew(
    storage: &Arc<dyn Storage>,
    engine: EngineId,
    entry: IndexEntry,
) -> Result<IndexEntry> {
    let (sequence, bytes) = (entry.sequence, entry.bytes.max(FILE_HEADER_BYTES as u64));
    let write = || -> std::io::Result<()> {
        entry.file.allocate(bytes)?;
        entry.file.write_all_at(&FileHeader::Prepared { sequence, bytes }.encode(engine), 0)?;
        entry.file.sync_data()
    };
    write().map_err(|error| Error::io("prepare", storage.path(&sequence.file_name()), error))?;
    Ok(IndexEntry { bytes, ..entry })
}

/// Files before this one are needed no more where nobody needs what was counted up to `unneeded`,
/// and are left over: they could not be removed, and some between them and this one are gone.
/// `in_use` and `sequences`, of all files, each in the order of the sequence numbers.
pub(crate) fn left_over_before<'a>(
    in_use: impl Iterator<Item = &'a IndexEntry>,
    sequences: &[FileSequence],
    unneeded: BatchNumber,
) -> FileSequence {
    let none = FileSequence(0);
    let needed = in_use.take_while(|entry| entry.previous.number <= unneeded).last();
    let needed = needed.map_or(none, |entry| entry.sequence);
    let behind_gap = |pair: &[FileSequence]| match *pair {
        [before, after] if before.next() < after && after <= needed => Some(after),
        _ => None,
    };
    sequences.windows(2).filter_map(behind_gap).next_back().unwrap_or(none)
}

/// Opens the journal's files and reads their headers.
pub(crate) fn find_files(storage: &Arc<dyn Storage>, engine: EngineId) -> Result<FoundFiles> {
    let names = storage.list().map_err(|error| Error::io("list", storage.path(""), error))?;
    let mut sequences: Vec<_> = names.iter().filter_map(|name| FileSequence::parse(name)).collect();
    sequences.sort_unstable();
    let mut found = FoundFiles {
        in_use: Vec::new(),
        prepared: Vec::new(),
        misnamed: Vec::new(),
        unreadable: Vec::new(),
        resized: Vec::new(),
        reopening: Reopening::new(Arc::clone(storage)),
    };
    for sequence in sequences {
        let name = sequence.file_name();
        let path = storage.path(&name);
        let open = || -> std::io::Result<_> {
            let file = storage.open(&name)?;
            let bytes = file.len()?;
            let mut header = [0; FILE_HEADER_BYTES];
            if bytes >= FILE_HEADER_BYTES as u64 {
                file.read_exact_at(&mut header, 0)?;
            }
            Ok((file, bytes, header))
        };
        let (file, bytes, header) = open().map_err(|error| Error::io("read", &path, error))?;
        match FileHeader::decode(engine, &header) {
            Ok(header) if header.sequence() != sequence => {
                let other = header.sequence().file_name();
                match header {
                    FileHeader::Prepared { .. } => found.misnamed.push(name),
                    FileHeader::InUse { .. } => {
                        return Err(Error::damaged(
                            path,
                            0,
                            format!("it is {other} by its header"),
                        ));
                    }
                }
            }
            Ok(FileHeader::Prepared { bytes: written, .. }) if written != bytes => {
                let entry = IndexEntry { sequence, file, bytes, previous: ChainPoint::START };
                let reason = "it is not as long as it was written";
                found.unreadable.push(UnreadableFile { entry, reason, was_prepared: true });
            }
            Ok(FileHeader::Prepared { .. }) => found.prepared.push((sequence, file, bytes)),
            Ok(FileHeader::InUse { previous, previous_check, bytes: written, .. }) => {
                if written != bytes {
                    found.resized.push((sequence, written));
                }
                let previous = ChainPoint { number: previous, check: previous_check };
                let file = found.reopening.keep(name, file);
                found.in_use.push(IndexEntry { sequence, file, bytes, previous });
            }
            Err(HeaderError::Version(found)) => {
                return Err(Error::UnsupportedVersion { path, found, supported: VERSION });
            }
            Err(HeaderError::Bad(reason)) => {
                let was_prepared =
                    FileHeader::is_prepared_but_for_a_bit(engine, sequence, bytes, &header);
                let entry = IndexEntry { sequence, file, bytes, previous: ChainPoint::START };
                found.unreadable.push(UnreadableFile { entry, reason, was_prepared });
            }
        }
    }
    if let Some(last) = found.in_use.last() {
        let last = last.previous;
        replace_after(&mut found.in_use, last);
    }
    Ok(found)
}
