//! The real disk: files in one directory, locked by this process.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::{Advice, MmapOptions};
use parking_lot::Mutex;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::{Storage, StorageFile};
use crate::error::{Error, Result};
use crate::sync::AtomicU64;
use crate::wal::region::Region;

/// Held (`flock`) by the process that has the directory open.
const LOCK_NAME: &str = "tollgate.lock";

/// Zeros are written in pieces of this size where blocks can't be reserved.
static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

/// File systems on which a log can't be trusted, by their magic number: those whose other end may
/// be written to, or may lose what it confirmed, behind this machine's back.
const NETWORK_FILE_SYSTEMS: [(u64, &str); 9] = [
    (0x6969, "NFS"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB2"),
    (0x517b, "SMB"),
    (0x00c3_6400, "Ceph"),
    (0x0102_1997, "9P"),
    (0x5346_414f, "AFS"),
    (0x7375_7245, "Coda"),
    (0x0bd0_0bd0, "Lustre"),
];

/// A directory of files on the real disk.
#[derive(Debug)]
pub(crate) struct RealStorage {
    dir: PathBuf,
    /// `None` for a look from outside, and once released: then nothing can be changed.
    lock: Mutex<Option<File>>,
}

impl RealStorage {
    /// Creates the directory where it is missing, and locks it.
    ///
    /// # Errors
    /// `Locked` while another process, or another opener in this one, has it;
    /// `UnsupportedFileSystem`; `Io` for what the operating system refuses.
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        let is_new = !dir.exists();
        fs::create_dir_all(dir).map_err(|error| Error::io("create", dir, error))?;
        if is_new {
            sync_parent(dir)?;
        }
        refuse_network_file_system(dir)?;
        let path = dir.join(LOCK_NAME);
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|error| Error::io("open", &path, error))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::Locked { dir: dir.to_owned() }),
            Err(TryLockError::Error(error)) => return Err(Error::io("lock", path, error)),
        }
        // For humans only: who it is.
        let named = lock.set_len(0).and_then(|()| writeln!(lock, "{}", std::process::id()));
        named.map_err(|error| Error::io("write", path, error))?;
        Ok(Self { dir: dir.to_owned(), lock: Mutex::new(Some(lock)) })
    }

    /// A look at a directory that another process may own. Whatever would change it is refused.
    pub(crate) fn open_read_only(dir: &Path) -> Result<Self> {
        fs::read_dir(dir).map_err(|error| Error::io("read", dir, error))?;
        Ok(Self { dir: dir.to_owned(), lock: Mutex::new(None) })
    }

    fn named(&self, name: &str) -> io::Result<PathBuf> {
        if name.is_empty() || name.contains('/') || name == "." || name == ".." {
            return Err(io::Error::new(ErrorKind::InvalidInput, "not a plain file name"));
        }
        Ok(self.dir.join(name))
    }

    fn is_writable(&self) -> bool {
        self.lock.lock().is_some()
    }

    fn named_for_change(&self, name: &str) -> io::Result<PathBuf> {
        if !self.is_writable() {
            let reason = "the directory is open for reading only";
            return Err(io::Error::new(ErrorKind::PermissionDenied, reason));
        }
        self.named(name)
    }
}

/// Makes a new directory's own name durable.
fn sync_parent(dir: &Path) -> Result<()> {
    let parent = match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(parent)
        .and_then(|parent| parent.sync_all())
        .map_err(|error| Error::io("sync", parent, error))
}

fn refuse_network_file_system(dir: &Path) -> Result<()> {
    let stat = rustix::fs::statfs(dir).map_err(|error| Error::io("examine", dir, error.into()))?;
    #[expect(clippy::cast_sign_loss, reason = "a magic number, not a quantity")]
    let magic = stat.f_type as u64 & u64::from(u32::MAX);
    match NETWORK_FILE_SYSTEMS.iter().find(|&&(known, _)| known == magic) {
        Some(&(_, kind)) => Err(Error::UnsupportedFileSystem { dir: dir.to_owned(), kind }),
        None => Ok(()),
    }
}

impl Storage for RealStorage {
    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let is_file = entry.file_type()?.is_file();
            if let Ok(name) = entry.file_name().into_string()
                && is_file
                && name != LOCK_NAME
            {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn StorageFile>> {
        let path = self.named_for_change(name)?;
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
        Ok(Arc::new(RealFile { file }))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn StorageFile>> {
        let path = self.named(name)?;
        let file = OpenOptions::new().read(true).write(self.is_writable()).open(path)?;
        Ok(Arc::new(RealFile { file }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.named_for_change(from)?, self.named_for_change(to)?)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.named_for_change(name)?)
    }

    fn sync_directory(&self) -> io::Result<()> {
        File::open(&self.dir)?.sync_all()
    }

    fn map(&self, name: &str) -> io::Result<Region> {
        if !self.is_writable() {
            return copy_into_memory(&*self.open(name)?);
        }
        let file = OpenOptions::new().read(true).write(true).open(self.named(name)?)?;
        let map = MmapOptions::new().map_raw(&file)?;
        // Random: the kernel then dirties and writes back single pages, not large folios around
        // them. DontFork: a child process has no business in the rings.
        for advice in [Advice::Random, Advice::DontFork] {
            if let Err(error) = map.advise(advice) {
                tracing::debug!(name, ?advice, %error, "the kernel takes no advice on a ring");
            }
        }
        Region::mapped(map)
    }

    fn release(&self) {
        // Closing the file unlocks it.
        self.lock.lock().take();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

/// What a ring holds now, for a look from outside: nothing that is done to it reaches the file.
fn copy_into_memory(file: &dyn StorageFile) -> io::Result<Region> {
    let len = usize::try_from(file.len()?).map_err(io::Error::other)?;
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, 0)?;
    let (words, _) = bytes.as_chunks::<8>();
    Ok(Region::heap(words.iter().map(|&word| AtomicU64::new(u64::from_le_bytes(word))).collect()))
}

#[derive(Debug)]
struct RealFile {
    file: File,
}

impl StorageFile for RealFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(buf, offset)
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        match rustix::fs::fallocate(&self.file, FallocateFlags::empty(), 0, len) {
            Err(Errno::OPNOTSUPP) => {
                let mut offset = self.len()?;
                while offset < len {
                    let left = usize::try_from(len - offset).unwrap_or(usize::MAX);
                    let piece = &ZEROS[..left.min(ZEROS.len())];
                    self.write_all_at(piece, offset)?;
                    offset += piece.len() as u64;
                }
                Ok(())
            }
            result => Ok(result?),
        }
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &tempfile::TempDir) -> RealStorage {
        RealStorage::open(dir.path()).unwrap()
    }

    #[test]
    fn a_directory_has_one_owner_until_it_lets_go() {
        let dir = tempfile::tempdir().unwrap();
        let first = open(&dir);
        assert!(matches!(RealStorage::open(dir.path()), Err(Error::Locked { .. })));
        drop(first);
        open(&dir);
    }

    #[test]
    fn missing_parents_are_created_and_a_file_in_the_way_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a/b");
        RealStorage::open(&deep).unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "x").unwrap();
        let error = RealStorage::open(&file).unwrap_err();
        assert!(matches!(&error, Error::Io { path, .. } if *path == file), "{error}");
    }

    #[test]
    fn names_that_leave_the_directory_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let storage = open(&dir);
        for name in ["", ".", "..", "a/b", "/etc/passwd"] {
            assert_eq!(storage.open(name).unwrap_err().kind(), ErrorKind::InvalidInput, "{name}");
        }
    }

    #[test]
    fn a_mapping_and_the_file_are_one() {
        let dir = tempfile::tempdir().unwrap();
        let storage = open(&dir);
        let file = storage.create("ring").unwrap();
        file.allocate(8192).unwrap();
        let region = storage.map("ring").unwrap();
        region.prefault(0, 1024).unwrap();
        region.words()[1000].store(77_u64.to_le(), std::sync::atomic::Ordering::Relaxed);
        let mut word = [0; 8];
        file.read_exact_at(&mut word, 8000).unwrap();
        assert_eq!(u64::from_le_bytes(word), 77);
        assert_eq!(storage.list().unwrap(), ["ring"], "the lock file is not listed");
    }

    #[test]
    fn a_look_from_outside_changes_nothing_and_needs_no_lock() {
        let dir = tempfile::tempdir().unwrap();
        let owner = open(&dir);
        owner.create("ring").unwrap().allocate(64).unwrap();
        let looker = RealStorage::open_read_only(dir.path()).unwrap();
        assert!(looker.create("x").is_err());
        assert!(looker.remove("ring").is_err());
        assert!(looker.rename("ring", "x").is_err());
        assert!(looker.open("ring").unwrap().write_all_at(&[1], 0).is_err());
        let copy = looker.map("ring").unwrap();
        copy.words()[0].store(1, std::sync::atomic::Ordering::Relaxed);
        let original = owner.map("ring").unwrap();
        assert_eq!(original.words()[0].load(std::sync::atomic::Ordering::Relaxed), 0);
        assert!(RealStorage::open_read_only(&dir.path().join("missing")).is_err());
    }
}
