//! Files that are opened for reading, where there are many: a process may have only a limited
//! number of files open.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;

use super::{Storage, StorageFile};

/// So many stay open: one for each who reads from its begin to its end, and some more. A process
/// often may have no more than 1024, several engines and all that its application opens.
const OPEN_MAX: usize = 16;

/// Keeps the files open that were used last, and opens others by their names when something is
/// asked of them.
#[derive(Debug)]
pub(crate) struct Reopening {
    storage: Arc<dyn Storage>,
    /// The last used at the back.
    open: Mutex<Open>,
}

impl Reopening {
    pub(crate) fn new(storage: Arc<dyn Storage>) -> Arc<Self> {
        Arc::new(Self { storage, open: Mutex::default() })
    }

    /// A file that need not stay open, and keeps its name until it is [taken](Self::take).
    pub(crate) fn keep(
        self: &Arc<Self>,
        name: String,
        file: Arc<dyn StorageFile>,
    ) -> Arc<dyn StorageFile> {
        push(&mut self.open.lock(), name.clone(), file);
        Arc::new(ReopenedFile { files: Arc::clone(self), name })
    }

    /// The file itself, which is about to get another name.
    pub(crate) fn take(&self, name: &str) -> io::Result<Arc<dyn StorageFile>> {
        match remove(&mut self.open.lock(), name) {
            Some(file) => Ok(file),
            None => self.storage.open(name),
        }
    }

    /// Lets go of a file that is about to be removed.
    pub(crate) fn forget(&self, name: &str) {
        remove(&mut self.open.lock(), name);
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn StorageFile>> {
        let mut open = self.open.lock();
        let file = match remove(&mut open, name) {
            Some(file) => file,
            None => self.storage.open(name)?,
        };
        push(&mut open, name.to_owned(), Arc::clone(&file));
        Ok(file)
    }
}

type Open = VecDeque<(String, Arc<dyn StorageFile>)>;

fn push(open: &mut Open, name: String, file: Arc<dyn StorageFile>) {
    if open.len() == OPEN_MAX {
        open.pop_front();
    }
    open.push_back((name, file));
}

fn remove(open: &mut Open, name: &str) -> Option<Arc<dyn StorageFile>> {
    // Mostly it is the one that was used last.
    let place = open.iter().rposition(|(other, _)| other == name)?;
    open.remove(place).map(|(_, file)| file)
}

#[derive(Debug)]
struct ReopenedFile {
    files: Arc<Reopening>,
    name: String,
}

impl ReopenedFile {
    fn open(&self) -> io::Result<Arc<dyn StorageFile>> {
        self.files.open(&self.name)
    }
}

impl StorageFile for ReopenedFile {
    fn len(&self) -> io::Result<u64> {
        self.open()?.len()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.open()?.read_exact_at(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.open()?.write_all_at(buf, offset)
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        self.open()?.allocate(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.open()?.sync_data()
    }
}
