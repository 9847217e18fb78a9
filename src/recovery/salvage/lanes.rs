//! The records in the rings that no counted batch holds.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::Notes;
use super::pieces::{Pieces, Ranges};
use crate::codec::Input;
use crate::error::{Error, Result};
use crate::journal::cold::RingRef;
use crate::model::EngineId;
use crate::recovery::rings;
use crate::storage::{Storage, StorageFile};
use crate::wal::operation::{Operation, Reading};
use crate::wal::record::{SLOT_BYTES, SLOT_WORDS, Seal, Verified};

/// A header with this many bits wrong is still told from every other lane's: any two that were
/// written differ in more than twice as many.
const HEADER_BITS_WRONG_MAX: u32 = 2;

/// For how many laps a slot is tested, back from the end of each range that is looked for and ahead
/// of the last record that is known.
const LAPS_TESTED: u64 = 64;

/// Slots are read in pieces of this many.
const SLOTS_READ: u64 = 4096;

/// Takes them, and says which are lost.
pub(super) fn take_records(
    storage: &Arc<dyn Storage>,
    engine: EngineId,
    pieces: &mut Pieces,
    notes: &mut Notes<'_>,
) -> Result<u64> {
    let mut taken = 0;
    let uses = std::mem::take(&mut pieces.uses);
    let last = uses.len().saturating_sub(1);
    for (index, ring_use) in uses.iter().enumerate() {
        // All that an earlier generation left is in the batch that ended it, unless that is lost.
        if index < last && !ring_use.has_gap {
            continue;
        }
        let seal = Seal::new(ring_use.generation.salt)?;
        for (lane, ring) in ring_use.generation.rings.iter().enumerate() {
            let Some(counted) = ring_use.counted.get(lane) else { continue };
            let name = rings::file_name(lane, ring.created);
            match open_ring(storage, engine, lane, ring, &name)? {
                Ok((file, slots)) => {
                    let mut scan = Scan { ring, seal, slots, taken: 0 };
                    let unreadable = |error| Error::io("read", storage.path(&name), error);
                    let found = scan.run(&*file, counted, pieces).map_err(unreadable)?;
                    taken += scan.taken;
                    note_gaps(&name, &scan, &*file, counted, &found, notes).map_err(unreadable)?;
                    if slots < ring.capacity {
                        let at = rings::slot_offset(slots);
                        notes.damage(&name, at, "the ring was cut short".to_owned());
                        let what = "the records beyond its end that no batch holds are lost";
                        notes.loss(&name, at, what.to_owned());
                    }
                }
                Err(reason) => {
                    notes.damage(&name, 0, reason.to_owned());
                    let what = "the records in it that no batch holds are lost".to_owned();
                    notes.loss(&name, 0, what);
                }
            }
        }
    }
    if uses.is_empty() {
        notes.loss(
            "lane",
            0,
            "without a batch that begins a generation no ring can be read".into(),
        );
    }
    Ok(taken)
}

type Opened = (Arc<dyn StorageFile>, u64);

/// The ring, and how many of its slots are there; or why it can't be used.
fn open_ring(
    storage: &Arc<dyn Storage>,
    engine: EngineId,
    lane: usize,
    ring: &RingRef,
    name: &str,
) -> Result<Result<Opened, &'static str>> {
    let expected = rings::header(engine, lane, ring);
    let mut found = vec![0; expected.len()];
    let open = || -> std::io::Result<_> {
        let file = storage.open(name)?;
        let len = file.len()?;
        Ok((file, len))
    };
    let (file, len) = match open() {
        Ok(opened) => opened,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Ok(Err("the ring is missing"));
        }
        Err(error) => return Err(Error::io("open", storage.path(name), error)),
    };
    let slots = len.saturating_sub(rings::slot_offset(0)) / SLOT_BYTES as u64;
    if len < found.len() as u64 {
        return Ok(Err("the ring is cut short before its first record"));
    }
    file.read_exact_at(&mut found, 0)
        .map_err(|error| Error::io("read", storage.path(name), error))?;
    let bits = expected.iter().zip(&found).map(|(a, b)| (a ^ b).count_ones());
    if bits.sum::<u32>() > HEADER_BITS_WRONG_MAX {
        return Ok(Err("the ring's header is another's, so that its records may be too"));
    }
    Ok(Ok((file, slots.min(ring.capacity))))
}

struct Scan<'a> {
    ring: &'a RingRef,
    seal: Seal,
    slots: u64,
    taken: u64,
}

impl Scan<'_> {
    /// Takes the records that verify and are not counted yet, and returns their numbers. Of an
    /// operation of several records, all or none.
    fn run(
        &mut self,
        file: &dyn StorageFile,
        counted: &Ranges,
        pieces: &mut Pieces,
    ) -> std::io::Result<Ranges> {
        let capacity = self.ring.capacity;
        let limit = counted.end().saturating_add(capacity.saturating_mul(LAPS_TESTED));
        let gaps = counted.gaps(self.ring.base, limit);
        let mut found = Ranges::default();
        let mut verified: BTreeMap<u64, Verified> = BTreeMap::new();
        let mut piece = Vec::new();
        for first in (0..self.slots).step_by(usize::try_from(SLOTS_READ).unwrap_or(1)) {
            let count = SLOTS_READ.min(self.slots - first);
            piece.resize(usize::try_from(count).unwrap_or(0) * SLOT_BYTES, 0);
            file.read_exact_at(&mut piece, rings::slot_offset(first))?;
            for (index, bytes) in (first..).zip(piece.chunks_exact(SLOT_BYTES)) {
                let slot = words(bytes);
                for number in gaps.iter().flat_map(|gap| numbers_of(index, capacity, gap)) {
                    let is_last_of_operation = || {
                        // The slot before the first is read last.
                        let before = number.checked_sub(1);
                        let is_begun = |before| {
                            verified.get(&before).is_some_and(|slot| slot.following() == 1)
                        };
                        index == 0 || before.is_some_and(is_begun)
                    };
                    if let Some(record) = self.seal.decode(number, &slot)
                        && !is_last_of_operation()
                    {
                        pieces.take_record(&record);
                        found.add(number..number + 1);
                        self.taken += 1;
                        break;
                    }
                    if let Some(slot) = self.seal.verified(number, &slot) {
                        verified.insert(number, slot);
                        break;
                    }
                    // Between a skip and its target there are no records.
                    let target = self.seal.decode_skip(number, &slot);
                    if let Some(target) = target.filter(|&target| target > number) {
                        found.add(number..target);
                        break;
                    }
                }
            }
        }
        let mut operation = Operation::default();
        let mut next = 0;
        while let Some((&number, _)) = verified.range(next..).next() {
            next = number + 1;
            if operation.read(number, |number| verified.get(&number).copied()) == Reading::Complete
            {
                pieces.take_operation(&operation);
                next = number + operation.len();
                found.add(number..next);
                self.taken += operation.len();
            }
        }
        Ok(found)
    }

    /// Whether the record with this number would be in its slot, were one bit another.
    fn is_one_bit_off(&self, file: &dyn StorageFile, number: u64) -> std::io::Result<bool> {
        let index = number & (self.ring.capacity - 1);
        if index >= self.slots {
            return Ok(false);
        }
        let mut bytes = [0; SLOT_BYTES];
        file.read_exact_at(&mut bytes, rings::slot_offset(index))?;
        Ok(self.seal.is_one_bit_off(number, &words(&bytes)))
    }
}

/// The numbers in a range that lie in this slot, the last laps only.
fn numbers_of(index: u64, capacity: u64, range: &Range<u64>) -> impl Iterator<Item = u64> {
    let start = range.start.max(range.end.saturating_sub(capacity.saturating_mul(LAPS_TESTED)));
    let lap = start & !(capacity - 1);
    let first = if lap + index < start { lap.saturating_add(capacity) } else { lap };
    let step = usize::try_from(capacity).unwrap_or(usize::MAX);
    (first.saturating_add(index)..range.end).step_by(step)
}

fn words(bytes: &[u8]) -> [u64; SLOT_WORDS] {
    let mut input = Input::new(bytes);
    std::array::from_fn(|_| input.u64().unwrap_or(0))
}

/// Says which records are neither counted nor found.
fn note_gaps(
    name: &str,
    scan: &Scan<'_>,
    file: &dyn StorageFile,
    counted: &Ranges,
    found: &Ranges,
    notes: &mut Notes<'_>,
) -> std::io::Result<()> {
    let mut known = counted.clone();
    known.extend(found);
    let at = |record| rings::record_offset(record, scan.ring.capacity);
    for gap in known.gaps(scan.ring.base, known.end()) {
        let (first, last) = (gap.start, gap.end - 1);
        let what = format!("records {first}..={last} are lost, if they were written");
        notes.loss(name, at(first), what);
    }
    let end = known.end();
    if scan.is_one_bit_off(file, end)? {
        notes.loss(name, at(end), format!("record {end} would verify but for one bit"));
    }
    Ok(())
}
