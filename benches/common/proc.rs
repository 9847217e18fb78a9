//! What the kernel knows about this process.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

/// The value of a line `name: value` in a file of `/proc/self`.
fn field(file: &str, name: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/self/{file}")).expect("/proc is mounted");
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let value = line.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    value.unwrap_or_else(|| panic!("/proc/self/{file} has {name}"))
}

/// Bytes that this process has caused to be written to the disk, mapped pages included. An upper
/// bound: a store to a large folio of the page cache counts as all of it.
pub(crate) fn disk_bytes() -> u64 {
    field("io", "write_bytes").saturating_sub(field("io", "cancelled_write_bytes"))
}

/// Bytes written to the device that holds `path`, by this process and all others.
pub(crate) fn device_bytes(path: &Path) -> u64 {
    const SECTOR_BYTES: u64 = 512;
    let device = fs::metadata(path).expect("the directory exists").dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let stat = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat"));
    // The seventh number; a file system without a device has none.
    let stat = stat.unwrap_or_default();
    let sectors = stat.split_whitespace().nth(6).and_then(|sectors| sectors.parse::<u64>().ok());
    sectors.unwrap_or(0) * SECTOR_BYTES
}

/// Resident memory in bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Resident {
    /// The heap and the stacks.
    pub(crate) anonymous: u64,
    /// Pages of mapped files: the rings, the program.
    pub(crate) mapped: u64,
}

impl Resident {
    pub(crate) fn now() -> Self {
        let kib = |name| field("status", name) * 1024;
        Self { anonymous: kib("RssAnon"), mapped: kib("RssFile") + kib("RssShmem") }
    }

    pub(crate) fn total(self) -> u64 {
        self.anonymous + self.mapped
    }
}

/// How long the engines' merges have run on a processor, in nanoseconds.
fn merging() -> u64 {
    let tasks = fs::read_dir("/proc/self/task").expect("/proc is mounted");
    // A thread that ends meanwhile has no files any more.
    let run = |path: std::path::PathBuf| -> Option<u64> {
        let name = fs::read_to_string(path.join("comm")).ok()?;
        let text = fs::read_to_string(path.join("schedstat")).ok()?;
        name.starts_with("tollgate-merge").then_some(())?;
        text.split_whitespace().next()?.parse().ok()
    };
    tasks.filter_map(|task| run(task.ok()?.path())).sum()
}

/// Waits until no engine of this process is merging.
pub(crate) fn await_merges() {
    const LOOK: Duration = Duration::from_millis(50);
    loop {
        let before = merging();
        thread::sleep(LOOK);
        // They look now and then whether there is something to merge.
        if merging() - before < LOOK.as_nanos() as u64 / 50 {
            return;
        }
    }
}

/// Who has used the processors, in ticks of the kernel's accounting.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Processors {
    own: u64,
    /// All processes together, and what a hypervisor has given to others.
    busy: u64,
    all: u64,
}

impl Processors {
    pub(crate) fn now() -> Self {
        let stat = fs::read_to_string("/proc/stat").expect("/proc is mounted");
        let ticks: Vec<u64> = stat
            .lines()
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .skip(1)
            .take(8)
            .map(|ticks| ticks.parse().unwrap_or(0))
            .collect();
        let all = ticks.iter().sum::<u64>();
        // The fourth and the fifth are idle time.
        let idle: u64 = ticks.iter().skip(3).take(2).sum();
        let own = fs::read_to_string("/proc/self/stat").expect("/proc is mounted");
        // After the name: user and system time of the process and of its children.
        let after_name = own.rsplit(')').next().unwrap_or_default();
        let fields = after_name.split_whitespace().skip(11).take(4);
        let own = fields.map(|ticks| ticks.parse::<u64>().unwrap_or(0)).sum();
        Self { own, busy: all - idle, all }
    }

    /// Which part of the processors others have used since `before`: other processes, the kernel
    /// for itself, other virtual machines.
    pub(crate) fn used_by_others(self, before: Self) -> f64 {
        let busy = self.busy - before.busy;
        let others = busy.saturating_sub(self.own - before.own);
        others as f64 / (self.all - before.all).max(1) as f64
    }
}
