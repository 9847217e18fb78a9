//! An ext4 file system in a file in memory, behind a loop device, whose power can be cut: the
//! kernel then refuses all that would reach the disk, and what has not reached it is gone once it
//! is mounted again.
#![allow(unsafe_code, reason = "the power is cut by an ioctl")]

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use rustix::fs::{FallocateFlags, fallocate, fstat, fsync, syncfs};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, ioctl, opcode};
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_bind, mount_change, unmount};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::lives::Random;

const MEMORY: &str = "/dev/shm";
const PREFIX: &str = "tollgate-power-";
const LOCK: &str = "lock";
/// Where the kernel says which start of the machine this is.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// What is busy for longer is kept open by somebody.
const ATTEMPTS_TO_UNMOUNT: u32 = 1000;
const PAUSE_TO_UNMOUNT: Duration = Duration::from_millis(10);

/// `EXT4_IOC_SHUTDOWN`.
const SHUTDOWN: Opcode = opcode::read::<u32>(b'X', 125);

/// What the kernel still does before the power is gone.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Cut {
    /// Writes all that is in memory.
    AfterSync = 0,
    /// Writes the file system's own log: names and sizes, not contents.
    AfterLog = 1,
    /// Nothing.
    AtOnce = 2,
}

/// Removed with all that belongs to it when it is dropped.
#[derive(Debug)]
pub(crate) struct Disk {
    dir: PathBuf,
    /// Locked as long as this process lives.
    _lock: File,
    bytes: u64,
    is_mounted: bool,
    restarts: u64,
}

impl Disk {
    /// An empty file system, mounted, for the calling thread and the processes that it starts.
    /// Fails where that is not possible here.
    pub(crate) fn create(name: &str, mib: u64) -> Result<Self, String> {
        if !rustix::process::geteuid().is_root() {
            return Err("only root can mount a file system".to_owned());
        }
        sweep();
        let dir = Path::new(MEMORY).join(format!("{PREFIX}{}-{name}", std::process::id()));
        fs::create_dir_all(dir.join("mount")).map_err(|error| format!("{MEMORY}: {error}"))?;
        let lock = File::create(dir.join(LOCK)).and_then(|lock| lock.lock().map(|()| lock));
        let lock = lock.map_err(|error| format!("{MEMORY}: {error}"))?;
        detach_mounts()?;
        let mut disk = Self { dir, _lock: lock, bytes: mib << 20, is_mounted: false, restarts: 0 };
        disk.start()?;
        mount_bind(disk.boot_id(), BOOT_ID).map_err(|error| format!("{BOOT_ID}: {error}"))?;
        disk.make_anew()?;
        Ok(disk)
    }

    /// Where files that are not on this disk can lie.
    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The file system's root.
    pub(crate) fn root(&self) -> PathBuf {
        self.dir.join("mount")
    }

    /// The data directory on it.
    pub(crate) fn data(&self) -> PathBuf {
        self.root().join("data")
    }

    fn image(&self) -> PathBuf {
        self.dir.join("image")
    }

    fn boot_id(&self) -> PathBuf {
        self.dir.join("boot_id")
    }

    /// From here on the machine is another one than before, as far as its boot id says.
    fn start(&mut self) -> Result<(), String> {
        self.restarts += 1;
        let id = format!("00000000-0000-4000-8000-{:012x}\n", self.restarts);
        fs::write(self.boot_id(), id).map_err(|error| format!("the boot id: {error}"))
    }

    /// An empty file system in the place of this one.
    pub(crate) fn make_anew(&mut self) -> Result<(), String> {
        self.unmount()?;
        let image = File::create(self.image()).and_then(|file| file.set_len(self.bytes));
        image.map_err(|error| format!("{}: {error}", self.image().display()))?;
        // No blocks kept back: full is full.
        run(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(self.image()))?;
        self.mount()
    }

    fn mount(&mut self) -> Result<(), String> {
        // The loop device goes when it is unmounted.
        run(Command::new("mount").args(["-o", "loop"]).arg(self.image()).arg(self.root()))?;
        self.is_mounted = true;
        Ok(())
    }

    fn unmount(&mut self) -> Result<(), String> {
        if !self.is_mounted {
            return Ok(());
        }
        let mut attempts = 0..ATTEMPTS_TO_UNMOUNT;
        loop {
            match unmount(self.root(), UnmountFlags::empty()) {
                Ok(()) => break,
                // A process that another test is starting has what this one had open, until it
                // becomes its program.
                Err(Errno::BUSY) if attempts.next().is_some() => sleep(PAUSE_TO_UNMOUNT),
                Err(error) => {
                    return Err(format!("{} can't be unmounted: {error}", self.dir.display()));
                }
            }
        }
        self.is_mounted = false;
        Ok(())
    }

    /// From here on nothing reaches the disk.
    pub(crate) fn cut(&self, cut: Cut) -> Result<(), String> {
        let root = File::open(self.root()).map_err(|error| format!("the root: {error}"))?;
        // SAFETY: the kernel reads one u32 for this operation, as `Setter` passes it.
        let shutdown = unsafe { Setter::<SHUTDOWN, u32>::new(cut as u32) };
        // SAFETY: it changes nothing in this process.
        unsafe { ioctl(&root, shutdown) }.map_err(|error| format!("{cut:?}: {error}"))
    }

    /// The machine starts again. Nobody may have a file open.
    pub(crate) fn restart(&mut self) -> Result<(), String> {
        self.unmount()?;
        self.start()?;
        self.mount()
    }

    /// Takes all of the space but this much, and what has come back since the last time.
    pub(crate) fn fill(&self, leave: u64) -> Result<(), String> {
        let put = |name: &str, bytes: u64| {
            let path = self.root().join(name);
            let file = OpenOptions::new().create(true).append(true).open(path);
            file.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO)).and_then(
                |file| {
                    let len = fstat(&file)?.st_size.cast_unsigned();
                    fallocate(&file, FallocateFlags::empty(), len, bytes)?;
                    fsync(&file)
                },
            )
        };
        if leave > 0 {
            put("left", leave).map_err(|error| format!("to leave space: {error}"))?;
        }
        let mut step = 1 << 20;
        while step >= 1024 {
            match put("filler", step) {
                Ok(()) => {}
                Err(Errno::NOSPC) => step /= 2,
                Err(error) => return Err(format!("the filler: {error}")),
            }
        }
        if leave > 0 {
            fs::remove_file(self.root().join("left")).map_err(|error| format!("left: {error}"))?;
        }
        self.sync()
    }

    /// Gives back what [`fill`](Self::fill) took.
    pub(crate) fn free(&self) -> Result<(), String> {
        fs::remove_file(self.root().join("filler")).map_err(|error| format!("filler: {error}"))?;
        self.sync()
    }

    /// What was removed is free once the file system's log says so.
    fn sync(&self) -> Result<(), String> {
        let root = File::open(self.root()).map_err(|error| format!("the root: {error}"))?;
        syncfs(&root).map_err(|error| format!("the file system: {error}"))
    }

    /// Lets a page of some file reach the disk unasked, as the kernel does now and then.
    pub(crate) fn write_back_something(&self, random: &mut Random) {
        let paths = self.files();
        if paths.is_empty() {
            return;
        }
        let path = &paths[random.below(paths.len() as u64) as usize];
        write_back(path, random.below(pages(path).clamp(1, 8)));
    }

    /// Lets each page of the rings reach the disk for which `chosen` says so.
    pub(crate) fn write_back_rings(&self, mut chosen: impl FnMut(u64) -> bool) {
        for path in self.rings() {
            (0..pages(&path)).filter(|&page| chosen(page)).for_each(|page| write_back(&path, page));
        }
    }

    /// Lets the rings reach the disk as they are. From then on their blocks count as written, so
    /// that a page that is written back is there after a loss of power.
    pub(crate) fn sync_rings(&self) {
        for path in self.rings() {
            // It may be gone by now.
            let _ = File::open(path).and_then(|file| file.sync_data());
        }
    }

    fn rings(&self) -> Vec<PathBuf> {
        let mut paths = self.files();
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "tgr"));
        paths
    }

    fn files(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.data()).into_iter().flatten().flatten();
        let mut paths: Vec<_> = entries.map(|entry| entry.path()).collect();
        paths.sort();
        paths
    }
}

const PAGE: u64 = 4096;

fn pages(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len().div_ceil(PAGE))
}

/// What reads past the page cache is preceded by the writing of what it reads.
fn write_back(path: &Path, page: u64) {
    const O_DIRECT: i32 = rustix::fs::OFlags::DIRECT.bits() as i32;
    // It may be gone by now.
    let Ok(file) = OpenOptions::new().read(true).custom_flags(O_DIRECT).open(path) else { return };
    let mut buffer = vec![0; 2 * PAGE as usize];
    let start = buffer.as_ptr().align_offset(PAGE as usize);
    let _ = file.read_at(&mut buffer[start..start + PAGE as usize], page * PAGE);
}

impl Drop for Disk {
    fn drop(&mut self) {
        if self.is_mounted {
            // What is still in use goes with its last user.
            let _ = unmount(self.root(), UnmountFlags::DETACH);
        }
        // In the place of the machine's own, which is there again: not below a file that is gone.
        let _ = unmount(BOOT_ID, UnmountFlags::DETACH);
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// From here on nobody else sees what the calling thread and its children mount.
fn detach_mounts() -> Result<(), String> {
    // SAFETY: nothing in this process relies on threads that share their mounts and their current
    // directory.
    let detached = unsafe { unshare_unsafe(UnshareFlags::NEWNS) };
    detached
        .and_then(|()| {
            mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        })
        .map_err(|error| format!("mounts of one's own: {error}"))
}

fn run(command: &mut Command) -> Result<(), String> {
    let program = command.get_program().display().to_string();
    let output = command.output().map_err(|error| format!("{program}: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(format!("{program}: {}", said.trim())) }
}

/// Removes what tests that were killed have left behind.
fn sweep() {
    let Ok(entries) = fs::read_dir(MEMORY) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some((process, _)) = name.strip_prefix(PREFIX).and_then(|rest| rest.split_once('-'))
        else {
            continue;
        };
        let is_ours = process == std::process::id().to_string();
        let is_free = |lock: File| lock.try_lock().is_ok();
        if !is_ours && File::open(entry.path().join(LOCK)).is_ok_and(is_free) {
            let _ = unmount(entry.path().join("mount"), UnmountFlags::DETACH);
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
