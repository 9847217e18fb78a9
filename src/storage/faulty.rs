//! A disk that fails on command, over another one: for tests.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::{Condvar, Mutex};

use super::{Storage, StorageFile};
use crate::wal::region::Region;

/// What is asked of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    Create,
    Open,
    Allocate,
    Write,
    Sync,
    SyncDirectory,
    Rename,
    Remove,
}

/// What happens instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Fail(io::ErrorKind),
    Panic,
    /// Waits until the fault is removed.
    Block,
}

/// Calls of a kind, on files whose name starts so, have this outcome.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fault {
    pub(crate) call: Call,
    pub(crate) name: &'static str,
    pub(crate) outcome: Outcome,
    /// How often; then the fault is gone.
    pub(crate) times: usize,
}

/// The faults of a disk, whoever opens it.
#[derive(Debug, Clone, Default)]
pub(crate) struct FaultyDisk {
    faults: Arc<Faults>,
}

#[derive(Debug)]
struct FaultyStorage {
    inner: Arc<dyn Storage>,
    faults: Arc<Faults>,
}

#[derive(Debug, Default)]
struct Faults {
    list: Mutex<Vec<Fault>>,
    changed: Condvar,
    blocked: AtomicUsize,
}

impl FaultyDisk {
    /// A storage that meets these faults on the way to another one.
    pub(crate) fn over(&self, inner: Arc<dyn Storage>) -> Arc<dyn Storage> {
        Arc::new(FaultyStorage { inner, faults: Arc::clone(&self.faults) })
    }

    pub(crate) fn inject(&self, fault: Fault) {
        self.faults.list.lock().push(fault);
    }

    /// From here on everything works.
    pub(crate) fn heal(&self) {
        self.faults.list.lock().clear();
        self.faults.changed.notify_all();
    }

    /// Whether a call waits until everything works.
    #[cfg(not(loom))]
    pub(crate) fn is_blocking(&self) -> bool {
        // Relaxed: tells nothing but itself.
        self.faults.blocked.load(Ordering::Relaxed) > 0
    }

    /// Whether all faults have happened.
    pub(crate) fn is_exhausted(&self) -> bool {
        self.faults.list.lock().is_empty()
    }
}

impl FaultyStorage {
    fn wrap(&self, name: &str, file: Arc<dyn StorageFile>) -> Arc<dyn StorageFile> {
        let faults = Arc::clone(&self.faults);
        Arc::new(FaultyFile { inner: file, name: name.to_owned(), faults })
    }
}

impl Faults {
    fn meet(&self, call: Call, name: &str) -> io::Result<()> {
        let mut list = self.list.lock();
        loop {
            let found =
                list.iter().position(|fault| fault.call == call && name.starts_with(fault.name));
            let Some(index) = found else { return Ok(()) };
            let outcome = list[index].outcome;
            if outcome == Outcome::Block {
                self.blocked.fetch_add(1, Ordering::Relaxed);
                self.changed.wait(&mut list);
                self.blocked.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            list[index].times -= 1;
            if list[index].times == 0 {
                list.remove(index);
            }
            drop(list);
            match outcome {
                Outcome::Fail(kind) => return Err(io::Error::new(kind, "injected")),
                _ => panic!("injected"),
            }
        }
    }
}

impl Storage for FaultyStorage {
    fn list(&self) -> io::Result<Vec<String>> {
        self.inner.list()
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn StorageFile>> {
        self.faults.meet(Call::Create, name)?;
        Ok(self.wrap(name, self.inner.create(name)?))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn StorageFile>> {
        self.faults.meet(Call::Open, name)?;
        Ok(self.wrap(name, self.inner.open(name)?))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.faults.meet(Call::Rename, from)?;
        self.inner.rename(from, to)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.faults.meet(Call::Remove, name)?;
        self.inner.remove(name)
    }

    fn sync_directory(&self) -> io::Result<()> {
        self.faults.meet(Call::SyncDirectory, "")?;
        self.inner.sync_directory()
    }

    fn moved_from(&self) -> Option<PathBuf> {
        self.inner.moved_from()
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

#[derive(Debug)]
struct FaultyFile {
    inner: Arc<dyn StorageFile>,
    /// As it was opened.
    name: String,
    faults: Arc<Faults>,
}

impl StorageFile for FaultyFile {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.inner.read_exact_at(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.faults.meet(Call::Write, &self.name)?;
        self.inner.write_all_at(buf, offset)
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        self.faults.meet(Call::Allocate, &self.name)?;
        self.inner.allocate(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.faults.meet(Call::Sync, &self.name)?;
        self.inner.sync_data()
    }

    fn identity(&self) -> io::Result<Option<(u64, u64)>> {
        self.inner.identity()
    }
}
