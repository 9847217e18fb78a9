//! A directory that is held open: its lock, its files and its syncs go through the one descriptor.
//!
//! A path may come to name another directory (this one was moved, and a copy put in its place),
//! which may then belong to another process. So paths are for messages here, and for a look at
//! whether that has happened.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::process::Process;

/// Who used how much, and what was recorded of them, is for nobody else on the machine to read.
const DIRECTORY_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;

/// An open directory.
#[derive(Debug)]
pub(crate) struct Directory {
    /// Absolute: the process may change its working directory.
    path: PathBuf,
    handle: File,
    /// Of the root by which the path was resolved: the process may get another one.
    root: Option<(u64, u64)>,
    process: Process,
}

/// The file beside the files that says who has the directory, locked until it is dropped.
#[derive(Debug)]
pub(crate) struct LockFile {
    file: File,
    process: Process,
}

impl Directory {
    /// Opens a directory, after creating it, durably, where it is missing.
    ///
    /// # Errors
    /// `Io` for what the operating system refuses.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        create_durably(path)?;
        Self::open(path)
    }

    /// Opens a directory.
    ///
    /// # Errors
    /// `Io` where there is none, or it can't be read.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let open = || -> io::Result<_> {
            let (path, handle) = (std::path::absolute(path)?, File::open(path)?);
            Ok(Self { path, handle, root: root(), process: Process::this() })
        };
        let directory = open().map_err(|error| Error::io("open", path, error))?;
        // What is not a directory, or may be opened and not read, shows here.
        directory.entries().map_err(|error| Error::io("read", path, error))?;
        Ok(directory)
    }

    /// Where it was when it was opened, for messages.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the path leads to another directory by now, or to none: this one was moved, replaced
    /// or removed. Not, where that can't be told.
    pub(crate) fn is_moved(&self) -> bool {
        let Ok(handle) = self.handle.metadata() else { return false };
        let is_elsewhere = match fs::metadata(&self.path) {
            Ok(named) => identity(&named) != identity(&handle),
            Err(error) => matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory),
        };
        is_elsewhere && self.root == root()
    }

    pub(crate) fn handle(&self) -> &File {
        &self.handle
    }

    /// Takes the directory for this process alone. Its own lock is the one that counts; earlier
    /// versions know the file's only, which is also easily removed, and then says nothing.
    ///
    /// # Errors
    /// `Locked` while another process, or another opener in this one, has it; `Io`.
    pub(crate) fn lock(&self, name: &str) -> Result<LockFile> {
        self.taken(&self.path, self.handle.try_lock())?;
        let path = self.path.join(name);
        let flags = OFlags::RDWR | OFlags::CREATE;
        let file = self.open_with(name, flags).map_err(|error| Error::io("open", &path, error))?;
        self.taken(&path, file.try_lock())?;
        let mut lock = LockFile { file, process: self.process };
        // For humans only: who it is. A full disk is no reason to stay out.
        if let Err(error) = lock.say_who() {
            tracing::debug!(path = %path.display(), %error, "the lock file does not say who has it");
        }
        Ok(lock)
    }

    /// Keeps others from taking the directory alone; several may have it so at once. `None` where
    /// there is no lock's file.
    ///
    /// # Errors
    /// `Locked` while a process has it for itself; `Io`.
    pub(crate) fn lock_shared(&self, name: &str) -> Result<Option<LockFile>> {
        self.taken(&self.path, self.handle.try_lock_shared())?;
        let path = self.path.join(name);
        let file = match self.open_file(name, false) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("open", path, error)),
        };
        self.taken(&path, file.try_lock_shared())?;
        Ok(Some(LockFile { file, process: self.process }))
    }

    fn taken(&self, path: &Path, tried: std::result::Result<(), TryLockError>) -> Result<()> {
        tried.map_err(|error| match error {
            TryLockError::WouldBlock => Error::Locked { dir: self.path.clone() },
            TryLockError::Error(error) => Error::io("lock", path, error),
        })
    }

    /// Lets go of the directory's own lock.
    pub(crate) fn unlock(&self) {
        unlock(&self.handle, self.process);
    }

    /// Whether it was removed: it has no name any more, and takes no file.
    pub(crate) fn is_removed(&self) -> bool {
        self.handle.metadata().is_ok_and(|metadata| metadata.nlink() == 0)
    }

    /// The names of the regular files, in no order.
    pub(crate) fn file_names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in self.entries()? {
            let entry = entry?;
            let is_file = match entry.file_type() {
                // Not every file system says it here.
                FileType::Unknown => self.is_file(entry.file_name())?,
                kind => kind == FileType::RegularFile,
            };
            if is_file && let Ok(name) = entry.file_name().to_str() {
                names.push(name.to_owned());
            }
        }
        Ok(names)
    }

    fn entries(&self) -> io::Result<Dir> {
        Ok(rustix::io::retry_on_intr(|| Dir::read_from(&self.handle))?)
    }

    fn is_file(&self, name: &std::ffi::CStr) -> io::Result<bool> {
        let stat = rustix::fs::statat(&self.handle, name, AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile)
    }

    /// Creates a file, for reading and writing, which must not be there.
    pub(crate) fn create_file(&self, name: &str) -> io::Result<File> {
        self.open_with(name, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL)
    }

    /// Opens a file that is there, for reading, and for writing too where asked for.
    pub(crate) fn open_file(&self, name: &str, is_writable: bool) -> io::Result<File> {
        self.open_with(name, if is_writable { OFlags::RDWR } else { OFlags::RDONLY })
    }

    fn open_with(&self, name: &str, flags: OFlags) -> io::Result<File> {
        let (flags, mode) = (flags | OFlags::CLOEXEC, Mode::from_raw_mode(FILE_MODE));
        let open = || rustix::fs::openat(&self.handle, name, flags, mode);
        Ok(rustix::io::retry_on_intr(open)?.into())
    }

    /// Whether the name leads to this very file.
    pub(crate) fn leads_to(&self, name: &str, file: &File) -> io::Result<bool> {
        let stat = match rustix::fs::statat(&self.handle, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        Ok((stat.st_dev, stat.st_ino) == identity(&file.metadata()?))
    }

    /// Renames a file, replacing what has the new name.
    pub(crate) fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(rustix::fs::renameat(&self.handle, from, &self.handle, to)?)
    }

    /// Removes a file.
    pub(crate) fn remove(&self, name: &str) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.handle, name, AtFlags::empty())?)
    }

    /// Makes the names durable.
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.handle.sync_all()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        self.unlock();
    }
}

impl LockFile {
    fn say_who(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        writeln!(self.file, "{}", std::process::id())
    }
}

#[cfg(test)]
impl LockFile {
    pub(crate) fn file(&self) -> &File {
        &self.file
    }
}

impl Drop for LockFile {
    fn drop(&mut self) {
        unlock(&self.file, self.process);
    }
}

/// Closing the file would unlock it too, but not while a child that this process is starting has a
/// copy of it.
fn unlock(file: &File, process: Process) {
    // The lock is that of all copies of its descriptor: a forked process would take it from its
    // parent.
    if !process.is_this() {
        return;
    }
    if let Err(error) = file.unlock() {
        tracing::debug!(%error, "the directory stays locked until its last user is gone");
    }
}

/// Creates the directory and what is missing above it, and makes their names durable.
fn create_durably(dir: &Path) -> Result<()> {
    let is_missing = |path: &&Path| !path.as_os_str().is_empty() && !path.exists();
    let missing: Vec<&Path> = dir.ancestors().take_while(is_missing).collect();
    let create = || -> io::Result<()> {
        // Those above it are not only its own.
        if missing.len() > 1 {
            fs::create_dir_all(parent_of(dir))?;
        }
        DirBuilder::new().recursive(true).mode(DIRECTORY_MODE).create(dir)
    };
    create().map_err(|error| Error::io("create", dir, error))?;
    for created in &missing {
        let parent = parent_of(created);
        sync_directory(parent).map_err(|error| Error::io("sync", parent, error))?;
    }
    // Who created it may have been killed before the sync. Where the parent can't be read, this
    // process is not the one that creates directories there.
    if missing.is_empty()
        && let Err(error) = sync_directory(parent_of(dir))
    {
        tracing::debug!(dir = %dir.display(), %error, "the parent directory can't be synced");
    }
    Ok(())
}

/// Device and inode.
fn identity(metadata: &fs::Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// That of the root directory, for this process.
fn root() -> Option<(u64, u64)> {
    fs::metadata("/").ok().as_ref().map(identity)
}

fn parent_of(dir: &Path) -> &Path {
    match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn sync_directory(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}
