//! A file without its name: what the process sees, what is durable, and what may become of the
//! difference.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::sync::Arc;

use super::cut::{Settle, Undecided};
use crate::sync::{AtomicU64, Ordering};
use crate::wal::region::Region;

/// What a disk writes whole.
pub(super) const SECTOR_BYTES: usize = 512;

/// Contents of a sector, and lengths of a file, that are kept since the last sync: the last ones.
const VERSIONS_MAX: usize = 8;

const WORD_BYTES: usize = size_of::<AtomicU64>();

/// Bytes beyond the end of the file are zero.
type Sector = [u8; SECTOR_BYTES];

#[derive(Debug, Default)]
pub(super) struct Node {
    /// What reads show, but for stores into the region since the last `pull`.
    live: Vec<u8>,
    durable: Vec<u8>,
    /// The sectors written since the last sync: what each write left in them.
    written: BTreeMap<usize, Vec<Sector>>,
    /// The sectors that a failed sync has lost, as they were then: while they are still like that,
    /// they count as clean.
    lost: BTreeMap<usize, Sector>,
    /// The lengths since the last sync.
    lengths: Vec<usize>,
    /// The sectors that were written back unasked from the region since the last sync.
    written_back: BTreeSet<usize>,
    /// The mapping of the file's whole words.
    region: Option<Arc<[AtomicU64]>>,
    /// Open files of the living process.
    handles: usize,
}

/// A file can't be longer: it is in memory, three times.
const FILE_BYTES_MAX: usize = 1 << 30;

/// An offset or length to write to, as an index into memory.
pub(super) fn position(offset: u64) -> io::Result<usize> {
    match usize::try_from(offset) {
        Ok(position) if position <= FILE_BYTES_MAX => Ok(position),
        _ => Err(ErrorKind::FileTooLarge.into()),
    }
}

impl Node {
    pub(super) fn durable(bytes: Vec<u8>) -> Self {
        Self { live: bytes.clone(), durable: bytes, ..Self::default() }
    }

    pub(super) fn len(&self) -> u64 {
        self.live.len() as u64
    }

    /// Whether the file exists without a name: it is open or mapped.
    pub(super) fn is_in_use(&self) -> bool {
        self.handles > 0 || self.region.as_ref().is_some_and(|words| Arc::strong_count(words) > 1)
    }

    pub(super) fn opened(&mut self) {
        self.handles += 1;
    }

    pub(super) fn closed(&mut self) {
        self.handles = self.handles.saturating_sub(1);
    }

    pub(super) fn contents(&mut self) -> &[u8] {
        self.pull();
        &self.live
    }

    pub(super) fn read(&mut self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.pull();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = self.live.get(start..).unwrap_or_default();
        let bytes = bytes.get(..buf.len()).ok_or(ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }

    pub(super) fn write(&mut self, bytes: &[u8], offset: usize) {
        if bytes.is_empty() {
            return;
        }
        self.pull();
        let end = offset + bytes.len();
        self.grow(end);
        self.live[offset..end].copy_from_slice(bytes);
        self.push(offset..end);
        for index in offset / SECTOR_BYTES..end.div_ceil(SECTOR_BYTES) {
            let sector = sector(&self.live, index);
            let versions = self.written.entry(index).or_default();
            remember(versions, sector);
        }
    }

    /// Up to a length, with zeros. Never shrinks.
    pub(super) fn grow(&mut self, len: usize) {
        if len > self.live.len() {
            self.live.resize(len, 0);
            remember(&mut self.lengths, len);
        }
    }

    /// The file's words, shared with all that have it mapped.
    pub(super) fn map(&mut self) -> io::Result<Region> {
        self.pull();
        let count = self.live.len() / WORD_BYTES;
        match &self.region {
            Some(words) if words.len() == count => return Ok(Region::heap(Arc::clone(words))),
            Some(words) if Arc::strong_count(words) > 1 => {
                return Err(io::Error::other("mapped while shorter: the simulation can't do that"));
            }
            _ => {}
        }
        let (words, _) = self.live.as_chunks::<WORD_BYTES>();
        let words: Arc<[AtomicU64]> =
            words.iter().map(|&bytes| AtomicU64::new(to_word(bytes))).collect();
        self.region = Some(Arc::clone(&words));
        Ok(Region::heap(words))
    }

    /// Takes what was stored into the region.
    pub(super) fn pull(&mut self) {
        pull(self.region.as_deref(), &mut self.live);
    }

    /// Shows a write to those who have the file mapped. Stores into other bytes of the same words
    /// are not undone.
    fn push(&mut self, range: Range<usize>) {
        let Some(words) = &self.region else { return };
        let last = range.end.div_ceil(WORD_BYTES).min(words.len());
        for (index, word) in words.iter().enumerate().take(last).skip(range.start / WORD_BYTES) {
            let start = index * WORD_BYTES;
            let merge = |value| {
                let mut bytes = to_bytes(value);
                for (at, byte) in bytes.iter_mut().enumerate() {
                    if range.contains(&(start + at)) {
                        *byte = self.live[start + at];
                    }
                }
                Some(to_word(bytes))
            };
            // Release and Acquire: a system call that writes orders what is before and after it.
            let _ = word.fetch_update(Ordering::AcqRel, Ordering::Acquire, merge);
        }
    }

    /// The process is dead: what it does to the region from now on reaches nobody.
    pub(super) fn detach(&mut self) {
        self.pull();
        self.region = None;
        self.handles = 0;
    }

    /// A copy that nothing has open or mapped.
    pub(super) fn detached(&self) -> Self {
        let mut live = self.live.clone();
        pull(self.region.as_deref(), &mut live);
        Self {
            live,
            durable: self.durable.clone(),
            written: self.written.clone(),
            lost: self.lost.clone(),
            lengths: self.lengths.clone(),
            written_back: self.written_back.clone(),
            region: None,
            handles: 0,
        }
    }

    /// All is durable, but for what an earlier sync has lost and nobody has written again.
    pub(super) fn sync(&mut self) {
        self.pull();
        let Self { live, written, lost, .. } = self;
        lost.retain(|&index, then| !written.contains_key(&index) && sector(live, index) == *then);
        let mut durable = self.live.clone();
        for &index in self.lost.keys() {
            put_sector(&mut durable, index, &sector(&self.durable, index));
        }
        self.durable = durable;
        self.written.clear();
        self.written_back.clear();
        self.lengths.clear();
    }

    /// A sync failed: what was written counts as clean and is not durable. The length is another
    /// matter (the file system's log), and stays undecided.
    pub(super) fn lose(&mut self) {
        self.pull();
        for index in 0..self.live.len().div_ceil(SECTOR_BYTES) {
            if self.is_dirty(index) {
                self.lost.insert(index, sector(&self.live, index));
            }
        }
        self.written.clear();
        self.written_back.clear();
    }

    /// Of what a failed sync has lost, reads show what is durable. Whether there was anything.
    pub(super) fn evict(&mut self) -> bool {
        self.pull();
        let lost: Vec<_> = self.lost.keys().copied().collect();
        let clean: Vec<_> = lost.into_iter().filter(|&index| !self.is_dirty(index)).collect();
        for &index in &clean {
            self.lost.remove(&index);
            put_sector(&mut self.live, index, &sector(&self.durable, index));
            let end = self.live.len().min((index + 1) * SECTOR_BYTES);
            self.push((index * SECTOR_BYTES).min(end)..end);
        }
        !clean.is_empty()
    }

    /// What is stored in the region is a version of its own from now on.
    pub(super) fn write_back(&mut self) {
        if self.region.is_none() {
            return;
        }
        self.pull();
        for index in 0..self.live.len().div_ceil(SECTOR_BYTES) {
            if self.is_dirty(index) {
                let newest = sector(&self.live, index);
                remember(self.written.entry(index).or_default(), newest);
                self.written_back.insert(index);
            }
        }
    }

    fn is_dirty(&self, index: usize) -> bool {
        let live = sector(&self.live, index);
        let clean = self.lost.get(&index).copied();
        self.written.contains_key(&index)
            || live != clean.unwrap_or_else(|| sector(&self.durable, index))
    }

    /// What a sector may hold after a loss of power, and which of it is the newest.
    fn versions(&self, index: usize) -> (Vec<Sector>, usize) {
        let mut versions = vec![sector(&self.durable, index)];
        if !self.is_dirty(index) {
            return (versions, 0);
        }
        let newest = sector(&self.live, index);
        let written = self.written.get(&index).into_iter().flatten().copied();
        let mut seen: Vec<_> = written.chain([newest]).collect();
        if self.written_back.contains(&index) {
            let torn = seen.windows(2).enumerate().flat_map(|(at, pair)| {
                let (older, newer) = (pair[0], pair[1]);
                // Where the stores between the two began: within a record, mostly.
                let same = older.iter().zip(&newer).take_while(|(one, other)| one == other).count();
                let word = same / WORD_BYTES + 1 + (index + at) % 7;
                [mixed(&older, &newer, word), mixed(&newer, &older, word)]
            });
            let torn: Vec<_> = torn.collect();
            seen.extend(torn);
        }
        for version in seen {
            if !versions.contains(&version) {
                versions.push(version);
            }
        }
        let newest = versions.iter().position(|version| *version == newest).unwrap_or_default();
        (versions, newest)
    }

    /// How many sectors may hold more than one thing after a loss of power.
    pub(super) fn undecided_sectors(&self) -> usize {
        let sectors = 0..self.live.len().div_ceil(SECTOR_BYTES);
        sectors.filter(|&index| self.versions(index).0.len() > 1).count()
    }

    /// What a loss of power leaves.
    pub(super) fn settle(&self, name: &str, settle: &mut Settle<'_>) -> Vec<u8> {
        let mut lengths = vec![self.durable.len()];
        lengths.extend(self.lengths.iter().filter(|&&len| len != self.durable.len()));
        let what = Undecided::Length { file: name };
        let len = lengths[settle.choose(what, lengths.len(), lengths.len() - 1)];
        let mut bytes = self.durable.clone();
        bytes.resize(len, 0);
        for index in 0..len.div_ceil(SECTOR_BYTES) {
            let (versions, newest) = self.versions(index);
            let what = Undecided::Sector { file: name, index };
            let version = &versions[settle.choose(what, versions.len(), newest)];
            put_sector(&mut bytes, index, version);
        }
        bytes
    }

    /// Flips bits of a byte in all its versions.
    pub(super) fn corrupt(&mut self, offset: usize, xor: u8) -> io::Result<()> {
        self.pull();
        *self.live.get_mut(offset).ok_or(ErrorKind::UnexpectedEof)? ^= xor;
        self.push(offset..offset + 1);
        if let Some(byte) = self.durable.get_mut(offset) {
            *byte ^= xor;
        }
        let (index, at) = (offset / SECTOR_BYTES, offset % SECTOR_BYTES);
        let written = self.written.get_mut(&index).into_iter().flatten();
        for version in written.chain(self.lost.get_mut(&index)) {
            version[at] ^= xor;
        }
        Ok(())
    }
}

fn remember<T: PartialEq>(versions: &mut Vec<T>, newest: T) {
    if versions.last() == Some(&newest) {
        return;
    }
    if versions.len() == VERSIONS_MAX {
        versions.remove(0);
    }
    versions.push(newest);
}

fn sector(bytes: &[u8], index: usize) -> Sector {
    let mut sector = [0; SECTOR_BYTES];
    let from = bytes.get(index * SECTOR_BYTES..).unwrap_or_default();
    let count = from.len().min(SECTOR_BYTES);
    sector[..count].copy_from_slice(&from[..count]);
    sector
}

/// Up to a word as the one, and then as the other: it was copied while it was stored to.
fn mixed(one: &Sector, other: &Sector, word: usize) -> Sector {
    let mut sector = *other;
    let end = SECTOR_BYTES.min(word * WORD_BYTES);
    sector[..end].copy_from_slice(&one[..end]);
    sector
}

/// As far as the file reaches.
fn put_sector(bytes: &mut [u8], index: usize, sector: &Sector) {
    let to = bytes.get_mut(index * SECTOR_BYTES..).unwrap_or_default();
    let count = to.len().min(SECTOR_BYTES);
    to[..count].copy_from_slice(&sector[..count]);
}

fn pull(region: Option<&[AtomicU64]>, live: &mut [u8]) {
    let (bytes, _) = live.as_chunks_mut::<WORD_BYTES>();
    for (bytes, word) in bytes.iter_mut().zip(region.unwrap_or_default()) {
        // Acquire: pairs with the Release of the thread that stored, so that what it stored before
        // is seen in the words that follow.
        *bytes = to_bytes(word.load(Ordering::Acquire));
    }
}

/// The bytes that a word is in memory.
fn to_bytes(word: u64) -> [u8; WORD_BYTES] {
    u64::from_le(word).to_le_bytes()
}

fn to_word(bytes: [u8; WORD_BYTES]) -> u64 {
    u64::from_le_bytes(bytes).to_le()
}
