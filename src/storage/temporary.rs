//! A file that is being written: removed again unless it is published.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::{Storage, StorageFile};
use crate::error::{Error, Result};

/// Removes its file when dropped.
#[derive(Debug)]
pub(crate) struct TemporaryFile {
    storage: Arc<dyn Storage>,
    name: String,
    file: Arc<dyn StorageFile>,
    is_published: bool,
}

impl TemporaryFile {
    /// Creates an empty file, in place of what an earlier attempt left under its name.
    pub(crate) fn create(storage: &Arc<dyn Storage>, name: String) -> Result<Self> {
        let created = storage.create(&name).or_else(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => {
                storage.remove(&name)?;
                storage.create(&name)
            }
            _ => Err(error),
        });
        let file = created.map_err(|error| Error::io("create", storage.path(&name), error))?;
        Ok(Self { storage: Arc::clone(storage), name, file, is_published: false })
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.storage.path(&self.name)
    }

    pub(crate) fn file(&self) -> &Arc<dyn StorageFile> {
        &self.file
    }

    /// Has blocks allocated for `len` bytes.
    pub(crate) fn allocate(&self, len: u64) -> Result<()> {
        let allocated = self.file.allocate(len);
        allocated.map_err(|error| Error::io("allocate", self.path(), error))
    }

    pub(crate) fn write(&self, bytes: &[u8], offset: u64) -> Result<()> {
        let written = self.file.write_all_at(bytes, offset);
        written.map_err(|error| Error::io("write", self.path(), error))
    }

    /// Makes what was written so far durable.
    pub(crate) fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(|error| Error::io("sync", self.path(), error))
    }

    /// Makes the file durable under its final name. When this fails, the file may or may not have
    /// that name, but if it has, it is complete.
    pub(crate) fn publish(mut self, name: &str) -> Result<()> {
        self.sync()?;
        self.storage
            .rename(&self.name, name)
            .map_err(|error| Error::io("rename", self.path(), error))?;
        self.is_published = true;
        self.storage
            .sync_directory()
            .map_err(|error| Error::io("sync the directory of", self.storage.path(name), error))
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        if !self.is_published {
            // Left behind it would only take space: the next open removes temporary files.
            let _ = self.storage.remove(&self.name);
        }
    }
}
