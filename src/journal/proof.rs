//! Which batches of a damaged journal certainly belong to it: for salvage, which must not take a
//! batch that a later one replaced.
//!
//! A batch is proven by a link to a proven point: it names the check of the batch before it, so a
//! proven batch proves the one before it, and the one after it that names it. The starting points
//! are
//!
//! - where the journal continues from: a snapshot, or the beginning;
//! - what a file in use names as the last batch before it, and what a snapshot's head names;
//! - in the last file, a batch that says that a missing one was durable: no batch that says so was
//!   ever replaced, since the missing one would still have been readable then.
//!
//! A batch that verifies but is linked to none of these may be what a loss of power left of a tail
//! that the next open replaced. It is not taken.
#![deny(clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::PathBuf;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::journal::batch::{Batch, BatchHeader};
use crate::journal::files::{FILE_HEADER_BYTES, FileHeader, FileSequence, HeaderError, VERSION};
use crate::journal::pool::{IndexEntry, replace_after};
use crate::journal::walk::scan_file;
use crate::journal::writer::ChainPoint;
use crate::model::{BatchNumber, EngineId};
use crate::storage::{Reopening, Storage};

/// A file that may hold batches.
#[derive(Debug)]
pub(crate) struct Candidate {
    pub(crate) entry: IndexEntry,
    /// The name: not always the one that belongs to its sequence number.
    pub(crate) name: String,
    /// Its header verifies and says that it is in use.
    pub(crate) is_in_use: bool,
    /// It is shorter than it was written.
    pub(crate) is_short: bool,
}

/// The journal's files, as far as they can be told.
#[derive(Debug, Default)]
pub(crate) struct Candidates {
    /// By sequence number.
    pub(crate) files: Vec<Candidate>,
    /// The sequence numbers of all files, those that hold nothing yet among them.
    pub(crate) sequences: Vec<FileSequence>,
    /// What is wrong with which file.
    pub(crate) damage: Vec<(String, u64, String)>,
}

impl Candidates {
    /// As an open does: a file that begins behind an earlier batch than those before it replaces
    /// what they hold beyond that.
    fn forget_replaced(&mut self) {
        let in_use = self.files.iter().filter(|candidate| candidate.is_in_use);
        let mut in_use: Vec<_> = in_use.map(|candidate| candidate.entry.clone()).collect();
        let Some(last) = in_use.last().map(|entry| entry.previous) else { return };
        replace_after(&mut in_use, last);
        let corrected = self.files.iter_mut().filter(|candidate| candidate.is_in_use);
        for (candidate, entry) in corrected.zip(in_use) {
            candidate.entry = entry;
        }
    }
}

/// Opens the journal's files, whatever state they are in.
///
/// # Errors
/// `Io`, and `UnsupportedVersion`: another library reads that.
pub(crate) fn find_candidates(storage: &Arc<dyn Storage>, engine: EngineId) -> Result<Candidates> {
    let names = storage.list().map_err(|error| Error::io("list", storage.path(""), error))?;
    let mut found = Candidates::default();
    let reopening = Reopening::new(Arc::clone(storage));
    for name in names {
        let Some(named) = FileSequence::parse(&name) else { continue };
        let path = storage.path(&name);
        let mut header = [0; FILE_HEADER_BYTES];
        let mut open = || -> std::io::Result<_> {
            let file = storage.open(&name)?;
            let bytes = file.len()?;
            if bytes >= FILE_HEADER_BYTES as u64 {
                file.read_exact_at(&mut header, 0)?;
            }
            Ok((file, bytes))
        };
        let (file, bytes) = open().map_err(|error| Error::io("read", &path, error))?;
        let header = match FileHeader::decode(engine, &header) {
            Ok(header) => Some(header),
            Err(HeaderError::Version(found)) => {
                return Err(Error::UnsupportedVersion { path, found, supported: VERSION });
            }
            Err(HeaderError::Bad(reason)) => {
                found.damage.push((name.clone(), 0, reason.to_owned()));
                None
            }
        };
        let sequence = header.map_or(named, |header| header.sequence());
        if sequence != named {
            let reason = format!("it is {} by its header", sequence.file_name());
            found.damage.push((name.clone(), 0, reason));
        }
        if let Some(written) = header.map(|header| header.bytes()).filter(|&len| len != bytes) {
            let reason = format!("it is {bytes} bytes long, not {written} as it was written");
            found.damage.push((name.clone(), bytes, reason));
        }
        found.sequences.push(sequence);
        let (previous, is_in_use) = match header {
            Some(FileHeader::Prepared { .. }) => continue,
            Some(FileHeader::InUse { previous, previous_check, .. }) => {
                (ChainPoint { number: previous, check: previous_check }, true)
            }
            None => (ChainPoint::START, false),
        };
        let is_short = header.is_some_and(|header| bytes < header.bytes());
        let file = reopening.keep(name.clone(), file);
        let entry = IndexEntry { sequence, file, bytes, previous };
        found.files.push(Candidate { entry, name, is_in_use, is_short });
    }
    found.files.sort_by_key(|candidate| (candidate.entry.sequence, candidate.is_in_use));
    found.sequences.sort_unstable();
    found.forget_replaced();
    Ok(found)
}

/// A batch that verifies, and where it lies.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    pub(crate) point: ChainPoint,
    previous: ChainPoint,
    durable: BatchNumber,
    /// The index of its file among the candidates.
    pub(crate) file: usize,
    pub(crate) offset: u64,
    bytes: u64,
}

impl Place {
    fn new(header: &BatchHeader, file: usize, offset: u64) -> Self {
        let previous = BatchNumber(header.number.0.saturating_sub(1));
        Self {
            point: ChainPoint { number: header.number, check: header.check },
            previous: ChainPoint { number: previous, check: header.previous_check },
            durable: header.durable,
            file,
            offset,
            bytes: header.total_len(),
        }
    }

    /// Where it ends in its file.
    pub(crate) fn end(&self) -> u64 {
        self.offset + self.bytes
    }
}

/// The batches that are proven, and those that are not.
#[derive(Debug, Default)]
pub(crate) struct Proof {
    /// Ascending by number. Numbers that are missing are lost.
    pub(crate) batches: Vec<Place>,
    /// Of the last file that holds any: batches beyond the proven ones.
    pub(crate) unproven: Vec<Place>,
}

/// Finds all batches that verify, and proves what can be proven of those after `base`. `points` are
/// further points that are known to belong to the journal.
pub(crate) fn prove(
    storage: &Arc<dyn Storage>,
    engine: EngineId,
    candidates: &Candidates,
    base: ChainPoint,
    points: &[ChainPoint],
) -> Result<Proof> {
    let mut links = Links::default();
    for (index, candidate) in candidates.files.iter().enumerate() {
        scan_file(storage, engine, &candidate.entry, &mut |offset, batch: &Batch<'_>| {
            if batch.header.number > base.number {
                let place = Place::new(&batch.header, index, offset);
                links.found.entry(place.point.number).or_default().push(place);
            }
        })?;
    }
    // Of two that follow the same batch the one in the later file counts, and one in a file whose
    // header verifies before one in a file whose header does not.
    for places in links.found.values_mut() {
        let rank = |place: &Place| {
            let in_use = candidates.files.get(place.file).is_some_and(|file| file.is_in_use);
            (in_use, place.file)
        };
        places.sort_by_key(|place| std::cmp::Reverse(rank(place)));
    }
    links.follow(base);
    let in_use = candidates.files.iter().filter(|candidate| candidate.is_in_use);
    let mut points: Vec<_> =
        in_use.map(|candidate| candidate.entry.previous).chain(points.iter().copied()).collect();
    points.retain(|point| point.number > base.number);
    points.sort_unstable_by_key(|point| point.number);
    for point in points {
        links.trace(point);
        links.follow(point);
    }
    let unproven = links.prove_by_marks(base);
    Ok(Proof { batches: links.consistent(), unproven })
}

/// Batches by number: all that were found, and those that are proven.
#[derive(Debug, Default)]
struct Links {
    found: BTreeMap<BatchNumber, Vec<Place>>,
    proven: BTreeMap<BatchNumber, Place>,
}

impl Links {
    /// Takes what follows a proven point.
    fn follow(&mut self, mut point: ChainPoint) {
        loop {
            let behind = self.found.get(&point.number.next());
            let mut behind = behind.into_iter().flatten();
            let Some(&next) = behind.find(|place| place.previous == point) else { return };
            // What is proven stays: a point that leads elsewhere was replaced.
            let Entry::Vacant(place) = self.proven.entry(next.point.number) else { return };
            place.insert(next);
            point = next.point;
        }
    }

    /// Takes a proven batch and what comes before it.
    fn trace(&mut self, mut point: ChainPoint) {
        while !self.proven.contains_key(&point.number) {
            let places = self.found.get(&point.number).into_iter().flatten();
            let Some(&place) = places.into_iter().find(|place| place.point == point) else {
                return;
            };
            self.proven.insert(point.number, place);
            point = place.previous;
        }
    }

    /// Takes what follows from the marks of durability in the last file. Returns the batches in it
    /// that nothing proves.
    fn prove_by_marks(&mut self, base: ChainPoint) -> Vec<Place> {
        let Some(last_file) = self.found.values().flatten().map(|place| place.file).max() else {
            return Vec::new();
        };
        let in_last: Vec<_> = self
            .found
            .values()
            .flatten()
            .filter(|place| place.file == last_file)
            .copied()
            .collect();
        for place in &in_last {
            let end = self.end().unwrap_or(base.number);
            if place.durable > end && place.point.number > end.next() {
                self.trace(place.point);
                self.follow(place.point);
            }
        }
        let end = self.end().unwrap_or(base.number);
        in_last.into_iter().filter(|place| place.point.number > end).collect()
    }

    fn end(&self) -> Option<BatchNumber> {
        self.proven.last_key_value().map(|(&number, _)| number)
    }

    /// The proven batches, up to the first that contradicts the one before it: with more than one
    /// file damaged, two points may disagree.
    fn consistent(self) -> Vec<Place> {
        let mut batches: Vec<Place> = Vec::with_capacity(self.proven.len());
        for place in self.proven.into_values() {
            let contradicts = |last: &Place| {
                last.point.number == place.previous.number && last.point != place.previous
            };
            if batches.last().is_some_and(contradicts) {
                break;
            }
            batches.push(place);
        }
        batches
    }
}

/// Reads a proven batch again.
pub(crate) fn read_batch<'a>(
    storage: &Arc<dyn Storage>,
    engine: EngineId,
    candidates: &Candidates,
    place: &Place,
    buffer: &'a mut Vec<u8>,
) -> Result<Batch<'a>> {
    let (file, path) = match candidates.files.get(place.file) {
        Some(candidate) => (&candidate.entry.file, storage.path(&candidate.name)),
        None => return Err(Error::damaged(PathBuf::new(), place.offset, "no such file")),
    };
    let len = usize::try_from(place.bytes)
        .map_err(|_| Error::damaged(&path, place.offset, "a batch above the memory"))?;
    buffer.resize(len, 0);
    file.read_exact_at(buffer, place.offset).map_err(|error| Error::io("read", &path, error))?;
    Batch::decode(engine, buffer).map_err(|reason| Error::damaged(path, place.offset, reason))
}
