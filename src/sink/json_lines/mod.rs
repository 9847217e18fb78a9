//! A sink that writes files of JSON lines, for everything that has no sink of its own.
//!
//! One line for each row and event; a commit line, with the position and a checksum, ends a batch,
//! and then the file is synced. Lines behind the last commit line are not there: they are cut off
//! when the sink is opened. A file begins with the positions of all engines, so that opening reads
//! the newest file only, and the others belong to the reader.

mod lines;
mod scan;

use std::fmt::{self, Write as _};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use self::lines::{Commit, EventLine, Positions, Sealed, Start, UsageLine};
use super::{Applied, EventRow, Position, SinkError, UsageBatch, UsageSink};
use crate::error::Error;
use crate::model::EngineId;

const KIND: &str = "JSON lines";
const FILE_PREFIX: &str = "usage-";
const FILE_SUFFIX: &str = ".jsonl";
/// A file in the making has this name; what is found of it is leftover.
const TEMPORARY: &str = "usage.tmp";
const LOCK: &str = "lock";
/// When a new file is begun, unless said otherwise.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// Writes usage and events as JSON lines to a directory, which has one writer at a time.
///
/// `docs/sinks.md` describes the lines. Files are named by number,
/// `usage-00000000000000000001.jsonl` is the first; any but the newest may be moved away.
#[derive(Debug)]
pub struct JsonLinesSink {
    dir: PathBuf,
    file_bytes_max: u64,
    takes_events: bool,
    positions: Positions,
    file: Newest,
    _lock: Lock,
}

/// The newest file.
#[derive(Debug)]
struct Newest {
    file: File,
    number: u64,
    /// The length up to the last commit line.
    committed: u64,
    /// Whether writing failed, so that anything may stand behind `committed`. The kernel may have
    /// thrown bytes away, so the next batch goes to a new file.
    is_in_doubt: bool,
}

/// Keeps the directory for one writer.
#[derive(Debug)]
struct Lock {
    file: File,
}

impl Drop for Lock {
    /// A process that another thread is just starting has the file open as well, until it runs its
    /// program; so closing it alone would not unlock it at once.
    fn drop(&mut self) {
        let _ = self.file.unlock();
    }
}

impl JsonLinesSink {
    /// Opens a directory, or creates it, and cuts off what was not committed.
    ///
    /// # Errors
    ///
    /// [`SinkError::Unavailable`] when a file can't be read or written, or another sink has the
    /// directory open; [`SinkError::Damaged`] when a file holds what no crash can leave there.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, SinkError> {
        let dir = dir.as_ref();
        let lock = lock(dir).map_err(failed("open the directory"))?;
        let numbers = file_numbers(dir).map_err(failed("open the directory"))?;
        let (positions, file) = match numbers.into_iter().max() {
            Some(number) => open_newest(dir, number)?,
            None => {
                let positions = Positions::new();
                let file = start_file(dir, 1, &positions).map_err(failed("start a file"))?;
                (positions, file)
            }
        };
        let dir = dir.to_path_buf();
        let (file_bytes_max, takes_events) = (FILE_BYTES_MAX, false);
        Ok(Self { dir, file_bytes_max, takes_events, positions, file, _lock: lock })
    }

    /// Begins a new file with the batch that finds the newest one this long or longer. Default 64
    /// MiB. A batch is never split.
    #[must_use]
    pub fn file_bytes_max(mut self, bytes: u64) -> Self {
        self.file_bytes_max = bytes;
        self
    }

    /// Writes a line for each recorded event, too.
    #[must_use]
    pub fn with_events(mut self) -> Self {
        self.takes_events = true;
        self
    }

    /// After a failure: takes back what was written of the batch, and begins a new file.
    fn resolve_doubt(&mut self) -> Result<(), Error> {
        if self.file.is_in_doubt {
            let path = self.dir.join(file_name(self.file.number));
            cut(&self.file.file, self.file.committed).map_err(|e| Error::io("cut", path, e))?;
            self.start_next_file()?;
        }
        Ok(())
    }

    fn start_next_file(&mut self) -> Result<(), Error> {
        self.file = start_file(&self.dir, self.file.number + 1, &self.positions)?;
        Ok(())
    }

    fn append(&mut self, batch: &UsageBatch) -> Result<(), Error> {
        if self.file.committed >= self.file_bytes_max {
            self.start_next_file()?;
        }
        self.file.is_in_doubt = true;
        self.file.committed = self
            .file
            .write(batch, if self.takes_events { batch.events() } else { &[] })
            .map_err(|e| Error::io("write", self.dir.join(file_name(self.file.number)), e))?;
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
    /// Writes a batch behind the last one and syncs it; the new length.
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
        self.file.sync_data()?;
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

    /// The offset behind the last line.
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

/// Creates the directory where it is missing, and takes it.
fn lock(dir: &Path) -> Result<Lock, Error> {
    fs::create_dir_all(dir).map_err(|e| Error::io("create", dir, e))?;
    let path = dir.join(LOCK);
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|e| Error::io("open", &path, e))?;
    match file.try_lock() {
        Ok(()) => Ok(Lock { file }),
        Err(fs::TryLockError::WouldBlock) => Err(Error::Locked { dir: dir.to_path_buf() }),
        Err(fs::TryLockError::Error(e)) => Err(Error::io("lock", path, e)),
    }
}

/// The numbers of the files in the directory.
fn file_numbers(dir: &Path) -> Result<Vec<u64>, Error> {
    let list = || -> io::Result<Vec<u64>> {
        let mut numbers = Vec::new();
        for entry in fs::read_dir(dir)? {
            let name = entry?.file_name();
            let number: Option<u64> = name.to_str().and_then(|name| {
                name.strip_prefix(FILE_PREFIX)?.strip_suffix(FILE_SUFFIX)?.parse().ok()
            });
            numbers.extend(number);
        }
        Ok(numbers)
    };
    list().map_err(|e| Error::io("list", dir, e))
}

/// Reads the newest file, cuts off what was not committed, and syncs: the file may have been
/// written by a process that died before its sync.
fn open_newest(dir: &Path, number: u64) -> Result<(Positions, Newest), SinkError> {
    let path = dir.join(file_name(number));
    let io = |action| {
        let path = path.clone();
        move |e| failed("open the directory")(Error::io(action, path, e))
    };
    let file = OpenOptions::new().read(true).write(true).open(&path).map_err(io("open"))?;
    let found =
        scan::scan(&file).map_err(io("read"))?.map_err(|scan::Damage { offset, reason }| {
            SinkError::Damaged { path: path.clone(), offset, reason }
        })?;
    cut(&file, found.committed).map_err(io("cut"))?;
    let newest = Newest { file, number, committed: found.committed, is_in_doubt: false };
    Ok((found.positions, newest))
}

/// Begins a file. Its name appears once its first line is durable.
fn start_file(dir: &Path, number: u64, positions: &Positions) -> Result<Newest, Error> {
    let temporary = dir.join(TEMPORARY);
    let path = dir.join(file_name(number));
    let start = || -> io::Result<Newest> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&temporary)?;
        let mut out = LineWriter::new(&file, 0);
        out.line(Sealed(Start(positions)))?;
        let committed = out.finish()?;
        file.sync_all()?;
        fs::rename(&temporary, &path)?;
        File::open(dir)?.sync_all()?;
        Ok(Newest { file, number, committed, is_in_doubt: false })
    };
    start().map_err(|e| Error::io("start", &path, e))
}

fn cut(file: &File, len: u64) -> io::Result<()> {
    file.set_len(len)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The disk was full, or a sync failed: what was written of the batch is taken back, also when
    /// it looks complete, and the next one goes to a new file.
    #[test]
    fn after_a_failure_the_batch_is_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let engine = EngineId::from_u128(1);
        let at = |batch| Position { batch, check: 0 };
        let batch = |from, to| UsageBatch::new(engine, from, at(to), Vec::new(), Vec::new());
        let mut sink = JsonLinesSink::open(dir.path()).unwrap();
        sink.apply(&batch(None, 1)).unwrap();
        let first = fs::read(dir.path().join(file_name(1))).unwrap();

        sink.file.write(&batch(Some(at(1)), 2), &[]).unwrap();
        sink.file.is_in_doubt = true;

        assert_eq!(sink.position(engine).unwrap(), Some(at(1)));
        assert_eq!(sink.apply(&batch(Some(at(1)), 2)).unwrap(), Applied::Now);
        drop(sink);
        assert_eq!(fs::read(dir.path().join(file_name(1))).unwrap(), first);
        let mut sink = JsonLinesSink::open(dir.path()).unwrap();
        assert_eq!(sink.position(engine).unwrap(), Some(at(2)));
        assert_eq!(sink.file.number, 2);
    }
}
