//! What the kernel knows about this process.

use std::fs;

/// The value of a line `name: value` in a file of `/proc/self`.
fn field(file: &str, name: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/self/{file}")).expect("/proc is mounted");
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let value = line.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    value.unwrap_or_else(|| panic!("/proc/self/{file} has {name}"))
}

/// Bytes that this process has caused to be written to the disk, mapped pages included.
pub(crate) fn disk_bytes() -> u64 {
    field("io", "write_bytes").saturating_sub(field("io", "cancelled_write_bytes"))
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
