//! What a process sees of the disk, until it dies.

use std::io::{self, ErrorKind};
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::MutexGuard;
use rustix::io::Errno;

use super::fault::{Call, Outcome};
use super::node::{Node, SECTOR_BYTES};
use super::{NodeId, SimDisk, State};
use crate::storage::{Storage, StorageFile, require_plain_name};
use crate::wal::region::Region;

#[derive(Debug)]
pub(super) struct SimStorage {
    pub(super) disk: Arc<SimDisk>,
    pub(super) process: u64,
}

#[derive(Debug)]
struct SimFile {
    disk: Arc<SimDisk>,
    process: u64,
    node: NodeId,
    /// As it was opened.
    name: String,
}

pub(super) fn disk_full() -> io::Error {
    Errno::NOSPC.into()
}

fn io_error() -> io::Error {
    Errno::IO.into()
}

fn dead() -> io::Error {
    io::Error::other("this process is dead, the disk does not hear it")
}

/// Counts the call and lets it fail where it should. What it returns is what only some calls do.
fn begin<'a>(
    disk: &'a SimDisk,
    process: u64,
    call: Call,
    name: &str,
) -> io::Result<(MutexGuard<'a, State>, Option<Outcome>)> {
    let mut state = disk.state.lock();
    if state.process != process || state.has_crashed {
        return Err(dead());
    }
    let outcome = state.faults.meet(call, name);
    match outcome {
        None => {}
        Some(Outcome::ShortWrite(_)) if call == Call::Write => {}
        Some(Outcome::LoseUnsynced) if matches!(call, Call::Sync | Call::SyncDirectory) => {}
        Some(Outcome::Eio | Outcome::ShortWrite(_) | Outcome::LoseUnsynced) => {
            return Err(io_error());
        }
        Some(Outcome::Enospc) => return Err(disk_full()),
        Some(Outcome::CrashWithin(_)) if call == Call::Write => {}
        Some(Outcome::Crash | Outcome::CrashWithin(_)) => {
            state.crash();
            return Err(dead());
        }
    }
    Ok((state, outcome))
}

impl SimStorage {
    fn begin(
        &self,
        call: Call,
        name: &str,
    ) -> io::Result<(MutexGuard<'_, State>, Option<Outcome>)> {
        begin(&self.disk, self.process, call, name)
    }

    fn file(&self, node: NodeId, name: &str) -> Arc<dyn StorageFile> {
        let (disk, process) = (Arc::clone(&self.disk), self.process);
        Arc::new(SimFile { disk, process, node, name: name.to_owned() })
    }
}

impl Storage for SimStorage {
    fn list(&self) -> io::Result<Vec<String>> {
        let (state, _) = self.begin(Call::List, "")?;
        Ok(state.image.names.live().map(|(name, _)| name.to_owned()).collect())
    }

    fn create(&self, name: &str) -> io::Result<Arc<dyn StorageFile>> {
        require_plain_name(name)?;
        let (mut state, _) = self.begin(Call::Create, name)?;
        if state.image.names.find(name).is_some() {
            return Err(ErrorKind::AlreadyExists.into());
        }
        let mut node = Node::default();
        node.opened();
        let id = state.image.add(node);
        state.image.names.create(name, id);
        drop(state);
        Ok(self.file(id, name))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn StorageFile>> {
        require_plain_name(name)?;
        let (mut state, _) = self.begin(Call::Open, name)?;
        let (id, node) = state.image.find(name)?;
        node.opened();
        drop(state);
        Ok(self.file(id, name))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        require_plain_name(from)?;
        require_plain_name(to)?;
        let (mut state, _) = self.begin(Call::Rename, from)?;
        state.image.names.rename(from, to)?;
        state.image.forget_unreachable();
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        require_plain_name(name)?;
        let (mut state, _) = self.begin(Call::Remove, name)?;
        state.image.names.remove(name)?;
        state.image.forget_unreachable();
        Ok(())
    }

    fn sync_directory(&self) -> io::Result<()> {
        let (mut state, outcome) = self.begin(Call::SyncDirectory, "")?;
        if outcome.is_some() {
            state.image.names.lose();
            return Err(io_error());
        }
        state.image.names.sync();
        state.image.forget_unreachable();
        Ok(())
    }

    fn map(&self, name: &str) -> io::Result<Region> {
        require_plain_name(name)?;
        let (mut state, _) = self.begin(Call::Map, name)?;
        let (_, node) = state.image.find(name)?;
        Ok(node.map()?.with_path(self.path(name)))
    }

    fn free_bytes(&self) -> io::Result<u64> {
        Ok(self.disk.state.lock().image.room())
    }

    fn boot_id(&self) -> u128 {
        u128::from(self.disk.state.lock().image.cuts) + 1
    }

    /// The next `storage()` ends this process anyhow.
    fn release(&self) {}

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from("/simulated").join(name)
    }
}

impl SimFile {
    fn begin(&self, call: Call) -> io::Result<(MutexGuard<'_, State>, Option<Outcome>)> {
        begin(&self.disk, self.process, call, &self.name)
    }
}

impl StorageFile for SimFile {
    fn len(&self) -> io::Result<u64> {
        let (mut state, _) = self.begin(Call::Length)?;
        Ok(state.image.node(self.node)?.len())
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let (mut state, _) = self.begin(Call::Read)?;
        state.image.node(self.node)?.read(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let (mut state, outcome) = self.begin(Call::Write)?;
        match outcome {
            Some(Outcome::ShortWrite(count)) => {
                state.image.write(self.node, &buf[..count.min(buf.len())], offset)?;
                Err(io_error())
            }
            Some(Outcome::CrashWithin(parts)) => {
                let begin = usize::try_from(offset).unwrap_or(usize::MAX);
                let end = begin.saturating_add(buf.len() * usize::from(parts) / 256);
                // A page is copied whole. That of a sector is all that the engine counts on.
                let count = (end - end % SECTOR_BYTES).saturating_sub(begin);
                // A full disk makes it less: the process does not live to hear of it.
                let _ = state.image.write(self.node, &buf[..count], offset);
                state.crash();
                Err(dead())
            }
            _ => state.image.write(self.node, buf, offset),
        }
    }

    fn allocate(&self, len: u64) -> io::Result<()> {
        let (mut state, _) = self.begin(Call::Allocate)?;
        state.image.allocate(self.node, len)
    }

    fn sync_data(&self) -> io::Result<()> {
        let (mut state, outcome) = self.begin(Call::Sync)?;
        let node = state.image.node(self.node)?;
        if outcome.is_some() {
            node.lose();
            return Err(io_error());
        }
        node.sync();
        Ok(())
    }
}

impl Drop for SimFile {
    fn drop(&mut self) {
        let mut state = self.disk.state.lock();
        if state.process != self.process || state.has_crashed {
            return;
        }
        if let Ok(node) = state.image.node(self.node) {
            node.closed();
            state.image.forget_unreachable();
        }
    }
}
