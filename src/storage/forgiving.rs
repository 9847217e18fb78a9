//! A disk whose bad sectors read as zeros, over another one: for salvage, which takes what verifies
//! and continues after what does not.
//!
//! This does not make a file sound: zeros pass for bytes that were never written, so a reader must
//! ask at the end what could not be read.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;

use super::{Storage, StorageFile};
use crate::error::is_bad_medium;
use crate::wal::region::Region;

/// Where a piece can't be read it is tried in parts of this size, at multiples of it: neither
/// sectors nor pages are larger.
const PART_BYTES: usize = 4096;

/// Reads what can be read, and remembers what can't.
#[derive(Debug)]
pub(crate) struct ForgivingStorage {
    inner: Arc<dyn Storage>,
    bad: Arc<Bad>,
}

/// The parts of each file that can't be read, and why the last of them can't.
type Bad = Mutex<BTreeMap<String, (BTreeSet<u64>, String)>>;

impl ForgivingStorage {
    pub(crate) fn new(inner: Arc<dyn Storage>) -> Self {
        Self { inner, bad: Arc::default() }
    }

    /// What could not be read so far: of each such file the name, where that begins, and what it
    /// is.
    pub(crate) fn unreadable(&self) -> Vec<(String, u64, String)> {
        let bad = self.bad.lock();
        let say = |(name, (parts, reason)): (&String, &(BTreeSet<u64>, String))| {
            let what =
                format!("{} parts of {PART_BYTES} bytes can't be read: {reason}", parts.len());
            (name.clone(), parts.first().copied().unwrap_or(0), what)
        };
        bad.iter().map(say).collect()
    }
}

fn note(bad: &Bad, name: &str, offset: u64, error: &io::Error) {
    let mut bad = bad.lock();
    let (parts, reason) = bad.entry(name.to_owned()).or_default();
    parts.insert(offset - offset % PART_BYTES as u64);
    *reason = error.to_string();
}

impl Storage for ForgivingStorage {
    fn list(&self) -> io::Result<Vec<String>> {
        self.inner.list()
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn StorageFile>> {
        self.inner.create(name)
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn StorageFile>> {
        let inner = match self.inner.open(name) {
            Ok(inner) => Some(inner),
            Err(error) if is_bad_medium(&error) => {
                note(&self.bad, name, 0, &error);
                None
            }
            Err(error) => return Err(error),
        };
        Ok(Arc::new(ForgivingFile { inner, name: name.to_owned(), bad: Arc::clone(&self.bad) }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.inner.rename(from, to)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.inner.remove(name)
    }

    fn sync_directory(&self) -> io::Result<()> {
        self.inner.sync_directory()
    }

    fn map(&self, name: &str) -> io::Result<Region> {
        self.inner.map(name)
    }

    fn free_bytes(&self) -> io::Result<u64> {
        self.inner.free_bytes()
    }

    fn boot_id(&self) -> u128 {
        self.inner.boot_id()
    }

    fn release(&self) {
        self.inner.release();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.inner.path(name)
    }
}

/// A file; an empty one where it can't even be opened.
#[derive(Debug)]
struct ForgivingFile {
    inner: Option<Arc<dyn StorageFile>>,
    name: String,
    bad: Arc<Bad>,
}

impl ForgivingFile {
    fn inner(&self) -> io::Result<&Arc<dyn StorageFile>> {
        self.inner.as_ref().ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

impl StorageFile for ForgivingFile {
    fn len(&self) -> io::Result<u64> {
        let Some(inner) = &self.inner else { return Ok(0) };
        match inner.len() {
            Err(error) if is_bad_medium(&error) => {
                note(&self.bad, &self.name, 0, &error);
                Ok(0)
            }
            len => len,
        }
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let inner = self.inner()?;
        match inner.read_exact_at(buf, offset) {
            Err(error) if is_bad_medium(&error) => {}
            read => return read,
        }
        let (mut rest, mut at) = (buf, offset);
        while !rest.is_empty() {
            let into_part = usize::try_from(at % PART_BYTES as u64).unwrap_or(0);
            let count = rest.len().min(PART_BYTES - into_part);
            let (part, behind) = rest.split_at_mut(count);
            match inner.read_exact_at(part, at) {
                Err(error) if is_bad_medium(&error) => {
                    part.fill(0);
                    note(&self.bad, &self.name, at, &error);
                }
                read => read?,
            }
            (rest, at) = (behind, at + count as u64);
        }
        Ok(())
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.inner()?.write_all_at(buf, offset)
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        self.inner()?.allocate(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.inner()?.sync_data()
    }
}
