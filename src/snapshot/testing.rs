//! For the tests of this module: a disk that fails and loses power, and values to write.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::fold::{Sum, SumKey};
use crate::journal::cold::{Generation, RingRef};
use crate::model::{Definition, EngineId, Quota, QuotaId, Window, WindowStart};
use crate::snapshot::Manifest;
use crate::storage::{Storage, StorageFile};
use crate::wal::region::Region;

pub(super) const ENGINE: EngineId = EngineId(0x0123_4567_89ab_cdef_fedc_ba98_7654_3210);

/// A quota that counts days.
pub(super) fn definition(id: u16) -> Definition {
    let quota = Quota::new(format!("quota-{id}"), 100).window(Window::Day);
    Definition::new(QuotaId(id), &quota).expect("a valid quota")
}

pub(super) fn generation(number: u64, bases: &[u64]) -> Generation {
    let ring = |&base| RingRef { created: 1, capacity: 64, base };
    Generation { number, salt: 77, boot: 5, rings: bases.iter().map(ring).collect() }
}

/// Of batch `number`, with the quotas 1 and 2.
pub(super) fn manifest(number: u64) -> Manifest {
    Manifest {
        number,
        check: 99,
        generation: generation(1, &[64, 128]),
        lanes: vec![70, 128],
        definitions: vec![definition(1), definition(2)],
        floors: vec![(1, 5)],
        created: 1_700_000_000_000,
    }
}

pub(super) fn sum(quota: u16, window: u64, user: u64, amount: i128) -> Sum {
    Sum { key: SumKey { quota: QuotaId(quota), window: WindowStart(window), user }, amount }
}

/// A disk in memory that tells what is durable from what is not. Its path for messages is the
/// file's name.
#[derive(Debug, Default)]
pub(super) struct TestDisk {
    names: Mutex<Names>,
    /// How many calls that change something still succeed; `None`: all.
    calls_left: Arc<Mutex<Option<usize>>>,
}

#[derive(Debug, Default)]
struct Names {
    live: BTreeMap<String, Arc<Mutex<Contents>>>,
    durable: BTreeMap<String, Arc<Mutex<Contents>>>,
}

#[derive(Debug, Default, Clone)]
struct Contents {
    live: Vec<u8>,
    durable: Vec<u8>,
}

impl TestDisk {
    /// Lets `calls` more changes succeed.
    pub(super) fn fail_after(&self, calls: usize) {
        *self.calls_left.lock() = Some(calls);
    }

    /// What another process finds after this one was killed.
    pub(super) fn killed(&self) -> Arc<Self> {
        Self::holding(&self.names.lock().live, |contents| contents.live.clone())
    }

    /// What is found after the power was lost: nothing that was not synced.
    pub(super) fn power_lost(&self) -> Arc<Self> {
        Self::holding(&self.names.lock().durable, |contents| contents.durable.clone())
    }

    fn holding(
        names: &BTreeMap<String, Arc<Mutex<Contents>>>,
        bytes: impl Fn(&Contents) -> Vec<u8>,
    ) -> Arc<Self> {
        let disk = Self::default();
        for (name, contents) in names {
            disk.put(name, bytes(&contents.lock()));
        }
        Arc::new(disk)
    }

    pub(super) fn put(&self, name: &str, bytes: Vec<u8>) {
        let contents = Arc::new(Mutex::new(Contents { live: bytes.clone(), durable: bytes }));
        let mut names = self.names.lock();
        names.live.insert(name.to_owned(), Arc::clone(&contents));
        names.durable.insert(name.to_owned(), contents);
    }

    pub(super) fn bytes(&self, name: &str) -> Vec<u8> {
        self.names.lock().live[name].lock().live.clone()
    }

    fn change(calls_left: &Mutex<Option<usize>>) -> io::Result<()> {
        let mut calls_left = calls_left.lock();
        match &mut *calls_left {
            Some(0) => Err(io::Error::other("the test ends here")),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

impl Storage for TestDisk {
    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.names.lock().live.keys().cloned().collect())
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn StorageFile>> {
        Self::change(&self.calls_left)?;
        let mut names = self.names.lock();
        if names.live.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let contents = Arc::new(Mutex::new(Contents::default()));
        names.live.insert(name.to_owned(), Arc::clone(&contents));
        Ok(Arc::new(TestFile { contents, calls_left: Arc::clone(&self.calls_left) }))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn StorageFile>> {
        let names = self.names.lock();
        let contents = names.live.get(name).cloned().ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(TestFile { contents, calls_left: Arc::clone(&self.calls_left) }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        Self::change(&self.calls_left)?;
        let mut names = self.names.lock();
        let contents = names.live.remove(from).ok_or(io::ErrorKind::NotFound)?;
        names.live.insert(to.to_owned(), contents);
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        Self::change(&self.calls_left)?;
        self.names.lock().live.remove(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(())
    }

    fn sync_directory(&self) -> io::Result<()> {
        Self::change(&self.calls_left)?;
        let mut names = self.names.lock();
        names.durable = names.live.clone();
        Ok(())
    }

    fn map(&self, _name: &str) -> io::Result<Region> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn boot_id(&self) -> u128 {
        0
    }

    fn release(&self) {}

    fn path(&self, name: &str) -> PathBuf {
        name.into()
    }
}

#[derive(Debug)]
struct TestFile {
    contents: Arc<Mutex<Contents>>,
    calls_left: Arc<Mutex<Option<usize>>>,
}

impl StorageFile for TestFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.contents.lock().live.len() as u64)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let contents = self.contents.lock();
        let begin = usize::try_from(offset).unwrap();
        let bytes = contents.live.get(begin..begin + buf.len());
        buf.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        TestDisk::change(&self.calls_left)?;
        let mut contents = self.contents.lock();
        let begin = usize::try_from(offset).unwrap();
        let end = begin + buf.len();
        if contents.live.len() < end {
            contents.live.resize(end, 0);
        }
        contents.live[begin..end].copy_from_slice(buf);
        Ok(())
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        self.contents.lock().live.resize(usize::try_from(len).unwrap(), 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        TestDisk::change(&self.calls_left)?;
        let mut contents = self.contents.lock();
        contents.durable = contents.live.clone();
        Ok(())
    }
}
