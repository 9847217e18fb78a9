//! A sink that writes files of JSON lines, for destinations that have no sink of their own.
//!
//! One line for each row and event; a commit line, with the position and a checksum, ends a batch,
//! and then the file is synced. Lines after the last commit line do not count: they are cut off
//! when the sink is opened. A file begins with the positions of all engines, so that opening reads
//! only the newest file, and the others belong to the reader.

mod lines;
mod scan;

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::{self, BufWriter, ErrorKind, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use self::lines::{Commit, EventLine, Positions, Sealed, Start, UsageLine};
use super::{Applied, EventRow, Position, SinkError, UsageBatch, UsageSink};
use crate::directory::{Directory, LockFile};
use crate::error::Error;
use crate::model::EngineId;

const KIND: &str = "JSON lines";
const FILE_PREFIX: &str = "usage-";
const FILE_SUFFIX: &str = ".jsonl";
/// A sink that began a file each nanosecond would get there in thirty years: a file with a higher
/// number is not a sink's, and each number has a next one.
const FILE_NUMBER_MAX: u64 = 1_000_000_000_000_000_000;
/// A file that is being made has this name; one that is found is a leftover.
const TEMPORARY: &str = "usage.tmp";
const LOCK: &str = "lock";
const DIRECTORY_REMOVED: &str =
    "the directory was removed; what its path leads to now is only used after a restart";
/// When a new file is begun, unless said otherwise.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// Writes usage and events as JSON lines to a directory, which has one writer at a time.
///
/// `docs/sinks.md` describes the lines. Files are named by number,
/// `usage-00000000000000000001.jsonl` is the first; any but the newest may be moved away.
#[derive(Debug)]
pub struct JsonLinesSink {
    _lock: LockFile,
    directory: Directory,
    file_bytes_max: u64,
    takes_events: bool,
    positions: Positions,
    file: Newest,
}

/// The newest file.
#[derive(Debug)]
struct Newest {
    file: File,
    number: u64,
    /// The length up to the last commit line.
    committed: u64,
    /// Whether that holds a batch, after the first line.
    holds_batches: bool,
    /// Whether writing failed, so that anything may follow `committed`. The kernel may have thrown
    /// bytes away, so the next batch goes to a new file.
    is_in_doubt: bool,
    /// How a batch is made durable; tests make it fail.
    sync: fn(&File) -> io::Result<()>,
}

impl JsonLinesSink {
    /// Opens or creates a directory of the sink's own, and cuts off what was not committed. It
    /// can't be an engine's data directory, which the engine has locked.
    ///
    /// # Errors
    ///
    /// [`SinkError::Unavailable`] when a file can't be read or written, or another sink has the
    /// directory open; [`SinkError::Damaged`] when a file holds what no crash can leave there.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, SinkError> {
        let opening = || failed("open the directory");
        let directory = Directory::create(dir.as_ref()).map_err(opening())?;
        let lock = directory.lock(LOCK).map_err(opening())?;
        let numbers = file_numbers(&directory).map_err(opening())?;
        let (positions, file) = match numbers.into_iter().max() {
            Some(number) => open_newest(&directory, number)?,
            None => {
                let positions = Positions::new();
                let file = start_file(&directory, 1, &positions).map_err(failed("start a file"))?;
                (positions, file)
            }
        };
        let (file_bytes_max, takes_events) = (FILE_BYTES_MAX, false);
        Ok(Self { _lock: lock, directory, file_bytes_max, takes_events, positions, file })
    }

    /// A batch that finds the newest file this long or longer begins a new one. Default 64 MiB. A
    /// batch is never split.
    #[must_use]
    pub fn file_bytes_max(mut self, bytes: u64) -> Self {
        self.file_bytes_max = bytes;
        self
    }

    /// Also writes a line for each recorded event.
    #[must_use]
    pub fn with_events(mut self) -> Self {
        self.takes_events = true;
        self
    }

    /// After a failure: takes back what was written of the batch, and begins a new file.
    fn resolve_doubt(&mut self) -> Result<(), Error> {
        if self.file.is_in_doubt {
            let path = self.directory.path().join(file_name(self.file.number));
            cut(&self.file.file, self.file.committed).map_err(|e| Error::io("cut", path, e))?;
            self.start_file()?;
        }
        Ok(())
    }

    /// Whether the newest file was removed, renamed, replaced or cut off, as by a program that
    /// rotates logs: readers would not find what is written to it.
    fn is_taken_away(&self) -> Result<bool, Error> {
        let Newest { file, number, committed, .. } = &self.file;
        let name = file_name(*number);
        let look = || -> io::Result<bool> {
            let is_whole = file.metadata()?.len() >= *committed;
            Ok(!is_whole || !self.directory.leads_to(&name, file)?)
        };
        look().map_err(|e| Error::io("examine", self.directory.path().join(&name), e))
    }

    /// Begins the next file, or, if the newest one holds no batch, that one again (another file
    /// under the same name), so that many failures in a row leave only one.
    fn start_file(&mut self) -> Result<(), Error> {
        let number = self.file.number + u64::from(self.file.holds_batches);
        self.file = start_file(&self.directory, number, &self.positions)?;
        Ok(())
    }

    fn append(&mut self, batch: &UsageBatch) -> Result<(), Error> {
        if self.is_taken_away()? {
            // Whatever has its name now is left as it is.
            self.file = start_file(&self.directory, self.file.number + 1, &self.positions)?;
        } else if self.file.committed >= self.file_bytes_max {
            self.start_file()?;
        }
        self.file.is_in_doubt = true;
        let events = if self.takes_events { batch.events() } else { &[] };
        match self.file.write(batch, events) {
            Ok(committed) => (self.file.committed, self.file.holds_batches) = (committed, true),
            Err(error) => {
                // At once, since nobody may ask this sink again: who opens the file next must not
                // find a batch that looks complete. Where this fails too, it is tried again.
                let _ = cut(&self.file.file, self.file.committed);
                let path = self.directory.path().join(file_name(self.file.number));
                return Err(Error::io("write", path, error));
            }
        }
        self.file.is_in_doubt = false;
        Ok(())
    }
}

impl UsageSink for JsonLinesSink {
    fn position(&mut self, engine: EngineId) -> Result<Option<Position>, SinkError> {
        self.resolve_doubt().map_err(failed("take an unfinished batch back"))?;
        Ok(self.positions.get(&engine.as_u128()).copied())
    }

    fn apply(&mut self, batch: &UsageBatch) -> Result<Applied, SinkError> {
        let stored = self.position(batch.engine())?;
        if batch.verdict(stored)? == Applied::Before {
            return Ok(Applied::Before);
        }
        self.append(batch).map_err(failed("store a batch"))?;
        self.positions.insert(batch.engine().as_u128(), batch.to());
        Ok(Applied::Now)
    }

    fn wants_events(&self) -> bool {
        self.takes_events
    }
}

impl Newest {
    fn new(file: File, number: u64, committed: u64) -> Self {
        let (holds_batches, is_in_doubt) = (false, false);
        Self { file, number, committed, holds_batches, is_in_doubt, sync: File::sync_data }
    }

    /// Writes a batch after the last one and syncs it; returns the new length.
    fn write(&self, batch: &UsageBatch, events: &[EventRow]) -> io::Result<u64> {
        let mut out = LineWriter::new(&self.file, self.committed);
        let engine = batch.engine();
        for row in batch.rows() {
            out.line(UsageLine(engine, row))?;
        }
        for event in events {
            out.line(EventLine(engine, event))?;
        }
        let lines = batch.rows().len() as u64 + events.len() as u64;
        let lines_crc = out.crc.clone().finalize();
        let position = batch.to();
        let commit = Commit { engine, position, lines, from: self.committed, lines_crc };
        out.line(Sealed(commit))?;
        let committed = out.finish()?;
        (self.sync)(&self.file)?;
        Ok(committed)
    }
}

/// Writes lines to a place in a file, buffered, and checksums them.
struct LineWriter<'a> {
    out: BufWriter<FileAt<'a>>,
    line: String,
    crc: crc32fast::Hasher,
}

struct FileAt<'a> {
    file: &'a File,
    offset: u64,
}

impl Write for FileAt<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write_at(bytes, self.offset)?;
        self.offset += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> LineWriter<'a> {
    fn new(file: &'a File, offset: u64) -> Self {
        let out = BufWriter::with_capacity(1 << 16, FileAt { file, offset });
        Self { out, line: String::new(), crc: crc32fast::Hasher::new() }
    }

    fn line(&mut self, line: impl fmt::Display) -> io::Result<()> {
        self.line.clear();
        writeln!(self.line, "{line}").map_err(io::Error::other)?;
        self.crc.update(self.line.as_bytes());
        self.out.write_all(self.line.as_bytes())
    }

    /// The offset after the last line.
    fn finish(mut self) -> io::Result<u64> {
        self.out.flush()?;
        Ok(self.out.get_ref().offset)
    }
}

fn failed(action: &'static str) -> impl FnOnce(Error) -> SinkError {
    move |source| SinkError::unavailable(KIND, action, source)
}

fn file_name(number: u64) -> String {
    format!("{FILE_PREFIX}{number:020}{FILE_SUFFIX}")
}

/// The numbers of the sink's files in the directory: those with exactly the names that it gives.
fn file_numbers(directory: &Directory) -> Result<Vec<u64>, Error> {
    let names = directory.file_names().map_err(|e| Error::io("list", directory.path(), e))?;
    let number = |name: &String| -> Option<u64> {
        let number = name.strip_prefix(FILE_PREFIX)?.strip_suffix(FILE_SUFFIX)?.parse().ok()?;
        ((1..=FILE_NUMBER_MAX).contains(&number) && *name == file_name(number)).then_some(number)
    };
    Ok(names.iter().filter_map(number).collect())
}

/// Reads the newest file, cuts off what was not committed, and makes the rest durable: it may have
/// been written by a process that died before its sync, or after one that failed.
fn open_newest(directory: &Directory, number: u64) -> Result<(Positions, Newest), SinkError> {
    let name = file_name(number);
    let path = directory.path().join(&name);
    let io = |action| {
        let path = path.clone();
        move |e| failed("open the directory")(Error::io(action, path, e))
    };
    let file = directory.open_file(&name, true).map_err(io("open"))?;
    let found =
        scan::scan(&file).map_err(io("read"))?.map_err(|scan::Damage { offset, reason }| {
            SinkError::Damaged { path: path.clone(), offset, reason }
        })?;
    if file.metadata().map_err(io("examine"))?.len() > found.committed {
        cut(&file, found.committed).map_err(io("cut"))?;
    }
    // After a failed sync the kernel still shows the pages, but takes them for written, and the
    // next sync passes over them. Only one batch can be concerned: none follows a failure.
    write_again(&file, found.last..found.committed).map_err(io("write"))?;
    file.sync_all().map_err(io("sync"))?;
    // Whoever began the file may have died before its name was durable.
    directory.sync().map_err(io("sync the directory of"))?;
    let mut newest = Newest::new(file, number, found.committed);
    newest.holds_batches = found.last > 0;
    Ok((found.positions, newest))
}

/// Writes a range of a file over itself, so that the next sync covers it.
fn write_again(file: &File, range: Range<u64>) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 16];
    let mut offset = range.start;
    while offset < range.end {
        let left = usize::try_from(range.end - offset).unwrap_or(usize::MAX);
        let len = left.min(buffer.len());
        let piece = &mut buffer[..len];
        file.read_exact_at(piece, offset)?;
        file.write_all_at(piece, offset)?;
        offset += len as u64;
    }
    Ok(())
}

/// Begins a file. Its name appears once its first line is durable.
fn start_file(directory: &Directory, number: u64, positions: &Positions) -> Result<Newest, Error> {
    let name = file_name(number);
    let start = || -> io::Result<Newest> {
        if number > FILE_NUMBER_MAX {
            return Err(io::Error::other("the numbers of files are used up"));
        }
        match directory.remove(TEMPORARY) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let file = directory.create_file(TEMPORARY)?;
        let mut out = LineWriter::new(&file, 0);
        out.line(Sealed(Start(positions)))?;
        let committed = out.finish()?;
        file.sync_all()?;
        directory.rename(TEMPORARY, &name)?;
        directory.sync()?;
        Ok(Newest::new(file, number, committed))
    };
    start().map_err(|error| {
        // What has its path now, if anything, is another directory, which may be another sink's.
        let error = match error.kind() {
            ErrorKind::NotFound if directory.is_removed() => {
                io::Error::new(ErrorKind::NotFound, DIRECTORY_REMOVED)
            }
            _ => error,
        };
        Error::io("start", directory.path().join(&name), error)
    })
}

fn cut(file: &File, len: u64) -> io::Result<()> {
    file.set_len(len)?;
    file.sync_all()
}

#[cfg(test)]
mod tests;
