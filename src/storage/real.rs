//! The real disk: files in one directory, locked by this process.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::{Advice, MmapOptions, MmapRaw};
use parking_lot::Mutex;
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

use super::{Storage, StorageFile, require_plain_name};
use crate::directory::{Directory, LockFile};
use crate::error::{Error, Result};
use crate::sync::AtomicU64;
use crate::wal::region::Region;

/// Held (`flock`), beside the directory itself, by the process that has the directory open.
const LOCK_NAME: &str = "tollgate.lock";

/// Zeros are written in pieces of this size where blocks can't be reserved.
static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

/// File systems on which a log can't be trusted, by their magic number: those whose other end may
/// be written to, or may lose what it confirmed, behind this machine's back.
///
/// FUSE is accepted: its number says nothing about what is behind it, and local file systems
/// (encrypted, pooled, in sandboxes) are its common use. Whoever puts a network behind it answers
/// for its locks and syncs.
const NETWORK_FILE_SYSTEMS: [(u64, &str); 11] = [
    (0x6969, "NFS"),
    (0xff53_4d42, "CIFS"),
    (0xfe53_4d42, "SMB2"),
    (0x517b, "SMB"),
    (0x00c3_6400, "Ceph"),
    (0x0102_1997, "9P"),
    (0x5346_414f, "AFS"),
    (0x7375_7245, "Coda"),
    (0x0bd0_0bd0, "Lustre"),
    (0x4750_4653, "GPFS"),
    (0x1983_0326, "BeeGFS"),
];

/// File systems in memory, for which a sync is nothing: what is there ends with the machine.
const MEMORY_FILE_SYSTEMS: [(u64, &str); 2] = [(0x0102_1994, "tmpfs"), (0x8584_58f6, "ramfs")];

/// A directory of files on the real disk.
#[derive(Debug)]
pub(crate) struct RealStorage {
    directory: Directory,
    /// `None` for a look from outside, and once released: then nothing can be changed.
    lock: Mutex<Option<LockFile>>,
    is_read_only: bool,
}

impl RealStorage {
    /// Creates the directory where it is missing, and locks it.
    ///
    /// # Errors
    /// `Locked` while another process, or another opener in this one, has it;
    /// `UnsupportedFileSystem`; `Io` for what the operating system refuses.
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        Self::lock(Directory::create(dir)?)
    }

    /// As [`open`](Self::open), of a directory that is there.
    ///
    /// # Errors
    /// As `open`; `Io` where there is none.
    pub(crate) fn open_existing(dir: &Path) -> Result<Self> {
        Self::lock(Directory::open(dir)?)
    }

    fn lock(directory: Directory) -> Result<Self> {
        let magic = file_system(&directory)?;
        refuse_network_file_system(&directory, magic)?;
        let lock = directory.lock(LOCK_NAME)?;
        if let Some(&(_, kind)) = MEMORY_FILE_SYSTEMS.iter().find(|&&(known, _)| known == magic) {
            let dir = directory.path().display();
            tracing::warn!(%dir, kind, "the directory is in memory: nothing survives loss of power");
        }
        Ok(Self { directory, lock: Mutex::new(Some(lock)), is_read_only: false })
    }

    /// As [`open`](Self::open), of a directory that is missing or empty, and not inside another.
    ///
    /// # Errors
    /// As `open`; `Io` where it is not like that.
    pub(crate) fn create_empty(dir: &Path, outside: &Path) -> Result<Self> {
        let refused =
            |reason| Error::io("create", dir, io::Error::new(ErrorKind::AlreadyExists, reason));
        let is_empty = match fs::read_dir(dir) {
            Ok(mut entries) => entries.next().is_none(),
            Err(error) if error.kind() == ErrorKind::NotFound => true,
            Err(error) => return Err(Error::io("read", dir, error)),
        };
        if !is_empty {
            return Err(refused("it is there, and not empty"));
        }
        let existing = dir.ancestors().find(|path| path.exists()).unwrap_or(Path::new("."));
        let existing = if existing.as_os_str().is_empty() { Path::new(".") } else { existing };
        let resolve =
            |path: &Path| path.canonicalize().map_err(|error| Error::io("resolve", path, error));
        if resolve(existing)?.starts_with(resolve(outside)?) {
            return Err(refused("it would lie inside the other directory"));
        }
        let storage = Self::open(dir)?;
        // Another process may have been faster.
        let names = storage.list().map_err(|error| Error::io("read", dir, error))?;
        if !names.is_empty() {
            return Err(refused("another process has filled it meanwhile"));
        }
        Ok(storage)
    }

    /// A look at a directory that another process may own. Whatever would change it is refused
    /// (`PermissionDenied`); a mapping is a copy of what the file held.
    ///
    /// # Errors
    /// `Io` where there is no such directory, or it can't be read.
    pub(crate) fn open_read_only(dir: &Path) -> Result<Self> {
        let directory = Directory::open(dir)?;
        Ok(Self { directory, lock: Mutex::new(None), is_read_only: true })
    }

    /// As [`open_read_only`](Self::open_read_only), of a directory that nobody owns meanwhile:
    /// several may look at it at once.
    ///
    /// # Errors
    /// `Locked` while a process has it open for changing it; `Io`.
    pub(crate) fn open_locked_read_only(dir: &Path) -> Result<Self> {
        let storage = Self::open_read_only(dir)?;
        *storage.lock.lock() = storage.directory.lock_shared(LOCK_NAME)?;
        Ok(storage)
    }

    /// Takes the lock's file away too, from a directory that is not used after all. The directory
    /// itself stays locked.
    pub(crate) fn remove_lock_file(&self) -> io::Result<()> {
        if !self.is_writable() {
            return Err(reading_only());
        }
        self.directory.remove(LOCK_NAME)
    }

    /// Refuses a name that is not one of a file that may be reached here.
    fn require_name(name: &str) -> io::Result<()> {
        require_plain_name(name)?;
        if name == LOCK_NAME {
            return Err(io::Error::new(ErrorKind::InvalidInput, "the name of the lock"));
        }
        Ok(())
    }

    fn is_writable(&self) -> bool {
        !self.is_read_only && self.lock.lock().is_some()
    }

    fn require_name_for_change(&self, name: &str) -> io::Result<()> {
        if !self.is_writable() {
            return Err(reading_only());
        }
        Self::require_name(name)
    }
}

fn reading_only() -> io::Error {
    io::Error::new(ErrorKind::PermissionDenied, "the directory is open for reading only")
}

/// The magic number of the file system.
fn file_system(directory: &Directory) -> Result<u64> {
    let stat = rustix::fs::fstatfs(directory.handle())
        .map_err(|error| Error::io("examine", directory.path(), error.into()))?;
    #[expect(clippy::cast_sign_loss, reason = "a magic number, not a quantity")]
    let magic = stat.f_type as u64 & u64::from(u32::MAX);
    Ok(magic)
}

fn refuse_network_file_system(directory: &Directory, magic: u64) -> Result<()> {
    let dir = directory.path();
    match NETWORK_FILE_SYSTEMS.iter().find(|&&(known, _)| known == magic) {
        Some(&(_, kind)) => Err(Error::UnsupportedFileSystem { dir: dir.to_owned(), kind }),
        None => Ok(()),
    }
}

impl Storage for RealStorage {
    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = self.directory.file_names()?;
        names.retain(|name| name != LOCK_NAME);
        Ok(names)
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn StorageFile>> {
        self.require_name_for_change(name)?;
        let file = self.directory.create_file(name)?;
        Ok(Arc::new(RealFile { file, is_writable: true }))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn StorageFile>> {
        Self::require_name(name)?;
        let is_writable = self.is_writable();
        let file = self.directory.open_file(name, is_writable)?;
        Ok(Arc::new(RealFile { file, is_writable }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.require_name_for_change(from)?;
        self.require_name_for_change(to)?;
        self.directory.rename(from, to)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.require_name_for_change(name)?;
        self.directory.remove(name)
    }

    fn sync_directory(&self) -> io::Result<()> {
        if !self.is_writable() {
            return Err(reading_only());
        }
        self.directory.sync()
    }

    fn moved_from(&self) -> Option<PathBuf> {
        self.directory.is_moved().then(|| self.directory.path().to_owned())
    }

    fn map(&self, name: &str) -> io::Result<Region> {
        if !self.is_writable() {
            return Ok(copy_into_memory(&*self.open(name)?)?.with_path(self.path(name)));
        }
        Self::require_name(name)?;
        let file = self.directory.open_file(name, true)?;
        let map = MmapOptions::new().map_raw(&file)?;
        // Random: the kernel then dirties and writes back single pages, not large folios around
        // them. DontFork: a child process has no business in the rings.
        for advice in [Advice::Random, Advice::DontFork] {
            if let Err(error) = map.advise(advice) {
                tracing::debug!(name, ?advice, %error, "the kernel takes no advice on a ring");
            }
        }
        let written = written_parts(&file);
        read_in(&map, written.as_deref())?;
        Ok(Region::mapped(map)?.with_written(written).with_path(self.path(name)))
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let stat = rustix::fs::fstatvfs(self.directory.handle())?;
        // A file system that does not say how large it is: some in memory or behind FUSE.
        if stat.f_blocks == 0 {
            return Ok(u64::MAX);
        }
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    fn boot_id(&self) -> u128 {
        let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        u128::from_str_radix(&id.trim().replace('-', ""), 16).unwrap_or(0)
    }

    fn release(&self) {
        // The directory's own lock goes last: it is the first that others try.
        drop(self.lock.lock().take());
        self.directory.unlock();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

impl Drop for RealStorage {
    fn drop(&mut self) {
        self.release();
    }
}

/// More parts than this are not told apart.
const PARTS_TOLD_APART: usize = 64;

/// Which bytes of a file may hold something, ascending: not those whose blocks were reserved and
/// never written. `None` where the system does not say.
fn written_parts(file: &File) -> Option<Vec<Range<u64>>> {
    let len = file.metadata().ok()?.len();
    let mut parts = Vec::new();
    let mut offset = 0;
    while offset < len {
        let start = match rustix::fs::seek(file, SeekFrom::Data(offset)) {
            Ok(start) => start,
            // There is nothing more.
            Err(Errno::NXIO) => break,
            Err(_) => return None,
        };
        let is_last = parts.len() + 1 == PARTS_TOLD_APART;
        let end = match rustix::fs::seek(file, SeekFrom::Hole(start)) {
            Ok(end) if end > start && !is_last => end,
            Ok(_) => len,
            Err(_) => return None,
        };
        parts.push(start..end);
        offset = end;
    }
    Some(parts)
}

/// Reads in what was written (`None`: all of it), so that what the disk does not give back is an
/// error here, and not a signal that kills the process when the memory is looked at.
fn read_in(map: &MmapRaw, written: Option<&[Range<u64>]>) -> io::Result<()> {
    let all = 0..map.len() as u64;
    #[cfg(target_os = "linux")]
    for part in written.unwrap_or(std::slice::from_ref(&all)) {
        let start = usize::try_from(part.start).map_err(io::Error::other)?;
        let end = usize::try_from(part.end).map_err(io::Error::other)?.min(map.len());
        let read = map.advise_range(Advice::PopulateRead, start, end.saturating_sub(start));
        match read.as_ref().err().and_then(Errno::from_io_error) {
            // The kernel's way to say that looking there would be answered by a signal.
            Some(Errno::FAULT | Errno::HWPOISON) => return Err(Errno::IO.into()),
            Some(error) => tracing::debug!(%error, "the kernel does not read a ring in"),
            None => {}
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (all, written);
    Ok(())
}

/// What a ring holds now, for a look from outside: nothing that is done to it reaches the file.
fn copy_into_memory(file: &dyn StorageFile) -> io::Result<Region> {
    let len = usize::try_from(file.len()?).map_err(io::Error::other)?;
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, 0)?;
    let (words, _) = bytes.as_chunks::<8>();
    Ok(Region::heap(
        words.iter().map(|&word| AtomicU64::new(u64::from_le_bytes(word).to_le())).collect(),
    ))
}

#[derive(Debug)]
struct RealFile {
    file: File,
    is_writable: bool,
}

impl RealFile {
    fn require_writable(&self) -> io::Result<()> {
        if self.is_writable { Ok(()) } else { Err(reading_only()) }
    }

    /// Whether blocks for so many bytes were taken or reserved.
    fn has_blocks(&self, len: u64) -> io::Result<bool> {
        let metadata = self.file.metadata()?;
        Ok(metadata.len() >= len && metadata.blocks().saturating_mul(512) >= len)
    }

    /// Where the file system reserves no blocks: they are taken by writing them.
    fn write_zeros_up_to(&self, len: u64) -> io::Result<()> {
        let mut offset = self.len()?;
        // This engine leaves no holes, but a copy of the directory may have some. One as small as
        // what a file system keeps about a file is not seen: that counts as blocks too.
        if !self.has_blocks(offset)? {
            self.write_again(offset)?;
        }
        while offset < len {
            let left = usize::try_from(len - offset).unwrap_or(usize::MAX);
            let piece = &ZEROS[..left.min(ZEROS.len())];
            self.file.write_all_at(piece, offset)?;
            offset += piece.len() as u64;
        }
        Ok(())
    }

    /// Writes the first `len` bytes as they are.
    fn write_again(&self, len: u64) -> io::Result<()> {
        let mut piece = ZEROS.to_vec();
        let mut offset = 0;
        while offset < len {
            let left = usize::try_from(len - offset).unwrap_or(usize::MAX);
            piece.truncate(left);
            self.file.read_exact_at(&mut piece, offset)?;
            self.file.write_all_at(&piece, offset)?;
            offset += piece.len() as u64;
        }
        Ok(())
    }
}

impl StorageFile for RealFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.require_writable()?;
        self.file.write_all_at(buf, offset)
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        self.require_writable()?;
        // The system call refuses it.
        if len == 0 {
            return Ok(());
        }
        // A signal may interrupt it; std, which repeats the other calls, has none for this.
        let reserve = || rustix::fs::fallocate(&self.file, FallocateFlags::empty(), 0, len);
        match rustix::io::retry_on_intr(reserve) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => self.write_zeros_up_to(len),
            // Of a file that has its blocks some file systems want as many again for the moment,
            // which a full disk does not have. It is not looked at first: what a file system keeps
            // about a file counts as blocks too, and hides a hole.
            Err(Errno::NOSPC | Errno::DQUOT) if self.has_blocks(len)? => Ok(()),
            result => Ok(result?),
        }
    }

    fn sync_data(&self) -> io::Result<()> {
        self.require_writable()?;
        self.file.sync_data()
    }

    fn identity(&self) -> io::Result<Option<(u64, u64)>> {
        let file = self.file.metadata()?;
        Ok(Some((file.dev(), file.ino())))
    }
}

#[cfg(test)]
mod tests;
