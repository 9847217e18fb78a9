//! A disk that remembers a failed sync, over another one.
//!
//! The kernel reports a failed `fsync` once: it may throw the bytes away, and the next call says
//! OK. Here the first failure of a file is its last word, through whichever handle it was seen and
//! whatever the file is called by then. Other files are not affected: the engine goes on in a new
//! one. The directory counts as one more file, whose bytes are names: once its sync has failed, no
//! later name can be promised to be durable, so none is given, rather than write a file in vain,
//! and another with each attempt.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, ErrorKind};
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;

use super::{Storage, StorageFile};
use crate::wal::region::Region;

/// The disk underneath, with its failures kept.
#[derive(Debug)]
pub(crate) struct CheckedStorage {
    inner: Arc<dyn Storage>,
    directory: Latch,
    /// The files that were opened or created here, by their present name; one that was removed or
    /// replaced is kept by its handles only. Held while names change, so that map and directory
    /// agree; never across a sync.
    files: Mutex<HashMap<String, Arc<Latch>>>,
}

impl CheckedStorage {
    pub(crate) fn new(inner: Arc<dyn Storage>) -> Self {
        Self { inner, directory: Latch::default(), files: Mutex::default() }
    }

    /// Refuses names once a sync of the directory has failed.
    fn refuse_after(&self, failed: Option<&Failure>) -> io::Result<()> {
        // A name that is refused is not what failed.
        let what = || format!("the directory {}", self.inner.path("").display());
        failed.map_or(Ok(()), |first| Err(first.of(what())))
    }
}

/// The first failure of a file's sync.
#[derive(Debug, Default)]
struct Latch {
    failed: Mutex<Option<Failure>>,
}

#[derive(Debug)]
struct Failure {
    kind: ErrorKind,
    reason: String,
}

impl Latch {
    /// Syncs, unless that has failed before.
    fn sync(&self, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        // Held across the call: the kernel hands one failure to one of two callers at a time, and
        // the other must not be told OK.
        let mut failed = self.failed.lock();
        if let Some(first) = &*failed {
            return Err(first.of("it"));
        }
        let result = sync();
        if let Err(error) = &result {
            *failed = Some(Failure { kind: error.kind(), reason: error.to_string() });
        }
        result
    }
}

impl Failure {
    /// Once more, of what failed.
    fn of(&self, what: impl fmt::Display) -> io::Error {
        io::Error::new(self.kind, format!("an earlier sync of {what} failed: {}", self.reason))
    }
}

impl Storage for CheckedStorage {
    fn list(&self) -> io::Result<Vec<String>> {
        self.inner.list()
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn StorageFile>> {
        self.refuse_after(self.directory.failed.lock().as_ref())?;
        let mut files = self.files.lock();
        let inner = self.inner.create(name)?;
        let latch = Arc::<Latch>::default();
        files.insert(name.to_owned(), Arc::clone(&latch));
        drop(files);
        Ok(Arc::new(CheckedFile { inner, latch }))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn StorageFile>> {
        let mut files = self.files.lock();
        let inner = self.inner.open(name)?;
        let latch = Arc::clone(files.entry(name.to_owned()).or_default());
        drop(files);
        Ok(Arc::new(CheckedFile { inner, latch }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.refuse_after(self.directory.failed.lock().as_ref())?;
        let mut files = self.files.lock();
        self.inner.rename(from, to)?;
        let moved = files.remove(from);
        // What had the name is gone, even if nothing is known of what has it now.
        files.remove(to);
        if let Some(latch) = moved {
            files.insert(to.to_owned(), latch);
        }
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut files = self.files.lock();
        self.inner.remove(name)?;
        files.remove(name);
        Ok(())
    }

    fn sync_directory(&self) -> io::Result<()> {
        self.directory.sync(|| self.inner.sync_directory())
    }

    fn check_directory(&self) -> io::Result<()> {
        // Who asks has something else to do than to wait for a sync that is under way.
        self.directory.failed.try_lock().map_or(Ok(()), |failed| self.refuse_after(failed.as_ref()))
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
struct CheckedFile {
    inner: Arc<dyn StorageFile>,
    latch: Arc<Latch>,
}

impl StorageFile for CheckedFile {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.inner.read_exact_at(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.inner.write_all_at(buf, offset)
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        self.inner.allocate(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.latch.sync(|| self.inner.sync_data())
    }

    fn identity(&self) -> io::Result<Option<(u64, u64)>> {
        self.inner.identity()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::RealStorage;
    use crate::storage::faulty::{Call, Fault, FaultyDisk, Outcome};
    use crate::storage::sim::SimDisk;

    /// A disk, checked, on which the next sync of `call` fails and all later ones say OK.
    fn failing_once(call: Call) -> (tempfile::TempDir, CheckedStorage) {
        let dir = tempfile::tempdir().unwrap();
        let faulty = FaultyDisk::default();
        let outcome = Outcome::Fail(ErrorKind::TimedOut);
        faulty.inject(Fault { call, name: "", outcome, times: 1 });
        let disk = faulty.over(Arc::new(RealStorage::open(dir.path()).unwrap()));
        (dir, CheckedStorage::new(disk))
    }

    fn is_latched(result: io::Result<()>) -> bool {
        matches!(result, Err(error) if error.kind() == ErrorKind::TimedOut)
    }

    /// Prefaulting and health once waited for a sync of the directory that hung.
    #[test]
    fn a_look_at_the_directory_waits_for_no_sync_of_it() {
        let storage = CheckedStorage::new(SimDisk::new(1).storage());
        let under_way = storage.directory.failed.lock();
        storage.check_directory().unwrap();
        drop(under_way);
    }

    #[test]
    fn a_failed_sync_is_final_for_the_file_and_for_no_other() {
        let (_dir, disk) = failing_once(Call::Sync);
        let other = disk.create("b").unwrap();
        let file = disk.create("a").unwrap();
        assert!(is_latched(file.sync_data()));
        assert!(is_latched(file.sync_data()));
        file.write_all_at(b"again", 0).unwrap();
        assert!(is_latched(file.sync_data()), "new bytes do not bring the lost ones back");
        other.sync_data().unwrap();
        disk.create("c").unwrap().sync_data().unwrap();
        disk.sync_directory().unwrap();
    }

    #[test]
    fn a_second_handle_and_a_new_name_do_not_forget() {
        let (_dir, disk) = failing_once(Call::Sync);
        let file = disk.create("a").unwrap();
        let second = disk.open("a").unwrap();
        assert!(is_latched(file.sync_data()));
        assert!(is_latched(second.sync_data()));
        disk.rename("a", "b").unwrap();
        assert!(is_latched(disk.open("b").unwrap().sync_data()));
    }

    #[test]
    fn another_file_of_the_same_name_starts_afresh() {
        let (_dir, disk) = failing_once(Call::Sync);
        let file = disk.create("a").unwrap();
        assert!(is_latched(file.sync_data()));
        disk.remove("a").unwrap();
        disk.create("a").unwrap().sync_data().unwrap();
        assert!(is_latched(file.sync_data()), "the old one is still what it was");
        disk.create("b").unwrap();
        disk.rename("b", "a").unwrap();
        disk.open("a").unwrap().sync_data().unwrap();
    }

    #[test]
    fn the_directory_has_a_latch_of_its_own() {
        let (_dir, disk) = failing_once(Call::SyncDirectory);
        let file = disk.create("a").unwrap();
        disk.create("b").unwrap();
        assert!(is_latched(disk.sync_directory()));
        assert!(is_latched(disk.sync_directory()));
        file.sync_data().unwrap();
        assert!(is_latched(disk.create("c").map(drop)));
        assert!(is_latched(disk.rename("a", "c")));
        let refused = disk.create("c").unwrap_err().to_string();
        assert!(refused.contains(disk.path("").to_str().unwrap()), "{refused}");
        disk.remove("b").unwrap();
        assert_eq!(disk.list().unwrap(), ["a"]);
    }
}
