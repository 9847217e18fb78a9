//! The only way out of the process to the disk.
//!
//! Everything that the engine writes goes through [`Storage`], one flat directory of files, so that
//! tests can put a disk under it that loses power (`sim`). The real one is [`real`]; [`checked`]
//! remembers failed syncs; a [`temporary`] file is removed unless it gets its final name; of files
//! that are [`reopened`] only a bounded number is open; bad sectors of a [`forgiving`] disk read as
//! zeros.

mod checked;
#[cfg(test)]
pub(crate) mod faulty;
mod forgiving;
mod real;
mod reopened;
#[cfg(any(test, feature = "simulation"))]
#[cfg_attr(not(test), allow(dead_code, unused_imports, reason = "reached from tests only"))]
pub(crate) mod sim;
mod temporary;

use std::fmt::Debug;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

pub(crate) use checked::CheckedStorage;
pub(crate) use forgiving::ForgivingStorage;
pub(crate) use real::RealStorage;
pub(crate) use reopened::Reopening;
pub(crate) use temporary::TemporaryFile;

use crate::wal::region::Region;

/// A directory of files, owned by this process.
///
/// Names are plain file names without separators. A created, renamed or removed name survives loss
/// of power only once [`sync_directory`](Storage::sync_directory) has returned; contents only once
/// [`StorageFile::sync_data`] has.
pub(crate) trait Storage: Debug + Send + Sync {
    /// The names of the regular files in the directory, in no order.
    fn list(&self) -> io::Result<Vec<String>>;

    /// Creates an empty file, open for reading and writing; an existing one is an error
    /// (`AlreadyExists`).
    fn create(&self, name: &str) -> io::Result<Arc<dyn StorageFile>>;

    /// Opens an existing file for reading and writing.
    fn open(&self, name: &str) -> io::Result<Arc<dyn StorageFile>>;

    /// Renames a file, replacing what has the new name.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Removes a file.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Makes the names durable.
    fn sync_directory(&self) -> io::Result<()>;

    /// An error once no name can be made durable any more.
    fn check_directory(&self) -> io::Result<()> {
        Ok(())
    }

    /// The path by which the directory was opened, if that leads elsewhere by now, or nowhere. Not,
    /// where that can't be told.
    fn moved_from(&self) -> Option<PathBuf> {
        None
    }

    /// Maps an existing file whole, shared with the page cache. The file must not be truncated
    /// while it is mapped, and its blocks must have been allocated: a store into a hole on a full
    /// disk kills the process.
    fn map(&self, name: &str) -> io::Result<Region>;

    /// Lets go of the directory: another process may open it. Nothing is changed in it any more.
    fn release(&self);

    /// How many bytes files can still grow by, as far as it is known.
    fn free_bytes(&self) -> io::Result<u64> {
        Ok(u64::MAX)
    }

    /// A number that changes when the machine starts anew; 0 where there is none.
    fn boot_id(&self) -> u128;

    /// The path of a file, for messages.
    fn path(&self, name: &str) -> PathBuf;
}

/// Whether somebody has removed or moved a file that had this name, or put another one in its
/// place. Not, where that can't be told.
pub(crate) fn is_taken_away(
    storage: &dyn Storage,
    name: &str,
    file: &dyn StorageFile,
) -> io::Result<bool> {
    let Some(identity) = file.identity()? else { return Ok(false) };
    match storage.open(name) {
        Ok(named) => Ok(named.identity()? != Some(identity)),
        Err(error) => Ok(error.kind() == io::ErrorKind::NotFound),
    }
}

/// Refuses a name that would leave the directory.
fn require_plain_name(name: &str) -> io::Result<()> {
    if name.is_empty() || name.contains('/') || name == "." || name == ".." {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a plain file name"));
    }
    Ok(())
}

/// An open file. All calls may be made from several threads.
pub(crate) trait StorageFile: Debug + Send + Sync {
    /// The length in bytes.
    fn len(&self) -> io::Result<u64>;

    /// Fills `buf` from `offset`; reaching the end of the file first is an error (`UnexpectedEof`).
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all of `buf` at `offset`, growing the file where needed.
    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// Makes the file `len` bytes long with blocks reserved for all of it, so that no later write
    /// within `len` fails for want of space. New bytes read as zeros.
    fn allocate(&self, len: u64) -> io::Result<()>;

    /// Makes the contents durable (`fdatasync`). After a failure the contents are in doubt for
    /// good: the next success says nothing about them.
    fn sync_data(&self) -> io::Result<()>;

    /// Device and inode, which tell the file from every other that is there, whatever their names;
    /// `None` where there are none.
    fn identity(&self) -> io::Result<Option<(u64, u64)>> {
        Ok(None)
    }
}
