//! What verified records say, put together across gaps.

use std::collections::BTreeMap;
use std::ops::Range;

use super::Notes;
use crate::codec::DecodeResult;
use crate::fold::{FoldTable, Sum, SumKey};
use crate::journal::batch::Batch;
use crate::journal::cold::{ColdEvent, Generation};
use crate::journal::writer::ChainPoint;
use crate::ledger::{Ledger, LedgerEvent};
use crate::model::{Definition, QuotaId, WindowStart};
use crate::snapshot::Manifest;
use crate::snapshot::manifest::check_generation;
use crate::wal::operation::Operation;
use crate::wal::record::Record;

/// The state, as far as it is known.
#[derive(Debug)]
pub(super) struct Pieces {
    last: ChainPoint,
    pub(super) definitions: BTreeMap<QuotaId, Definition>,
    /// Of snapshots that are not complete: used where no batch defines the quota.
    other_definitions: BTreeMap<QuotaId, Definition>,
    pub(super) floors: BTreeMap<QuotaId, WindowStart>,
    /// Since the snapshot; `None` where a user is back at the quota's limit.
    pub(super) limit_changes: BTreeMap<(QuotaId, u64), Option<u64>>,
    pub(super) deltas: FoldTable,
    pub(super) ledger: Ledger,
    /// How many are only in the rings.
    pub(super) recorded_in_rings: u64,
    /// The uses of the rings that are known, in order.
    pub(super) uses: Vec<RingUse>,
    /// A batch after the snapshot is lost.
    has_gap: bool,
}

/// One generation, and which of its records are counted.
#[derive(Debug)]
pub(super) struct RingUse {
    pub(super) generation: Generation,
    /// Per lane: the records that counted batches hold, or that never were.
    pub(super) counted: Vec<Ranges>,
    /// A batch is lost that may have held records of it.
    pub(super) has_gap: bool,
}

/// Numbers, in ascending ranges that do not touch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Ranges(Vec<Range<u64>>);

impl Ranges {
    /// Adds a range; nearly always at the end.
    pub(super) fn add(&mut self, added: Range<u64>) {
        if added.is_empty() {
            return;
        }
        let before = self.0.partition_point(|range| range.end < added.start);
        let behind = self.0.partition_point(|range| range.start <= added.end);
        let mut merged = added;
        for range in self.0.drain(before..behind) {
            merged = merged.start.min(range.start)..merged.end.max(range.end);
        }
        self.0.insert(before, merged);
    }

    /// Adds all of another's.
    pub(super) fn extend(&mut self, other: &Self) {
        for range in &other.0 {
            self.add(range.clone());
        }
    }

    /// Where the last range ends.
    pub(super) fn end(&self) -> u64 {
        self.0.last().map_or(0, |range| range.end)
    }

    /// The ranges from `from` up to `to` that are not in it.
    pub(super) fn gaps(&self, from: u64, to: u64) -> Vec<Range<u64>> {
        let mut gaps = Vec::new();
        let mut at = from;
        for range in &self.0 {
            gaps.push(at..range.start.min(to));
            at = at.max(range.end);
        }
        gaps.push(at..to);
        gaps.retain(|gap| !gap.is_empty());
        gaps
    }
}

impl Pieces {
    pub(super) fn new(base: Option<&Manifest>) -> Self {
        let mut pieces = Self {
            last: ChainPoint::START,
            definitions: BTreeMap::new(),
            other_definitions: BTreeMap::new(),
            floors: BTreeMap::new(),
            limit_changes: BTreeMap::new(),
            deltas: FoldTable::default(),
            ledger: Ledger::default(),
            recorded_in_rings: 0,
            uses: Vec::new(),
            has_gap: false,
        };
        if let Some(manifest) = base {
            let definitions = manifest.definitions.iter();
            pieces.last = manifest.point();
            pieces.definitions = definitions.map(|it| (it.id, it.clone())).collect();
            let floors = manifest.floors.iter();
            pieces.floors = floors.map(|&(id, at)| (QuotaId(id), WindowStart(at))).collect();
            pieces.begin(&manifest.generation);
            if let Some(ring_use) = pieces.uses.last_mut() {
                for (counted, &next) in ring_use.counted.iter_mut().zip(&manifest.lanes) {
                    counted.add(0..next);
                }
            }
        }
        pieces
    }

    /// Takes what another snapshot's head defines, for quotas whose definition is lost.
    pub(super) fn learn_definitions(&mut self, manifest: &Manifest) {
        for definition in &manifest.definitions {
            self.other_definitions.entry(definition.id).or_insert_with(|| definition.clone());
        }
    }

    /// Takes a proven batch.
    pub(super) fn take(&mut self, batch: &Batch<'_>) -> DecodeResult<()> {
        let header = &batch.header;
        if self.last.number.next() != header.number {
            self.has_gap = true;
            if let Some(ring_use) = self.uses.last_mut() {
                ring_use.has_gap = true;
            }
        }
        self.last = ChainPoint { number: header.number, check: header.check };
        if let Some(ring_use) = self.uses.last_mut() {
            for span in &batch.spans {
                let lane = usize::from(span.lane);
                if ring_use.counted.len() <= lane {
                    // Of a generation whose beginning is lost.
                    ring_use.counted.resize_with(lane + 1, Ranges::default);
                }
                if let Some(counted) = ring_use.counted.get_mut(lane) {
                    counted.add(span.from..span.next);
                }
            }
        }
        for event in &batch.cold {
            match event {
                ColdEvent::Define(definition) => {
                    self.definitions.insert(definition.id, definition.clone());
                }
                &ColdEvent::SetLimit { user, quota, limit } => {
                    self.limit_changes.insert((QuotaId(quota), user), Some(limit));
                }
                &ColdEvent::ClearLimit { user, quota } => {
                    self.limit_changes.insert((QuotaId(quota), user), None);
                }
                ColdEvent::Generation(generation) => {
                    check_generation(generation)?;
                    self.begin(generation);
                }
            }
        }
        let mut events = batch.events();
        while let Some(event) = events.next_event()? {
            self.ledger.apply(event);
        }
        // The recovery that wrote this batch has taken back, in its sums, what was given back
        // without having been taken: to do that again would count it twice. Behind a gap what was
        // taken may be in the batch that is lost, which that recovery knew.
        let begins = |event: &ColdEvent| matches!(event, ColdEvent::Generation(_));
        if !self.has_gap && batch.cold.iter().any(begins) {
            self.ledger.end_generation();
        }
        for sum in batch.sums() {
            self.add(sum?)?;
        }
        Ok(())
    }

    fn begin(&mut self, generation: &Generation) {
        let before_first = |base| {
            let mut counted = Ranges::default();
            counted.add(0..base);
            counted
        };
        let counted = generation.rings.iter().map(|ring| before_first(ring.base)).collect();
        self.uses.push(RingUse { generation: generation.clone(), counted, has_gap: false });
    }

    fn add(&mut self, sum: Sum) -> DecodeResult<()> {
        self.deltas.add_checked(sum).ok_or("a sum above 128 bits")
    }

    /// Takes an add that is in a ring, and in no counted batch.
    pub(super) fn take_record(&mut self, record: &Record) {
        self.deltas.add_block(&[(record.key(), record.delta)]);
    }

    /// Takes an operation of several records that is in a ring, and in no counted batch.
    pub(super) fn take_operation(&mut self, operation: &Operation) {
        for record in operation.adds() {
            self.take_record(&record);
        }
        operation.for_each_event(|event| {
            self.recorded_in_rings += u64::from(matches!(event, LedgerEvent::Recorded(_)));
            self.ledger.apply(event);
        });
    }

    /// Nothing more comes: what the end of a reservation gave back, without its beginning, was not
    /// taken.
    pub(super) fn end_ledger(&mut self) {
        for part in self.ledger.unproven() {
            let key = SumKey { quota: part.quota, window: part.window, user: part.user };
            self.deltas.add_block(&[(key, part.amount.cast_signed())]);
        }
        self.ledger.end_generation();
    }

    /// The newest generation that is known of.
    pub(super) fn last_generation(&self) -> u64 {
        self.uses.iter().map(|ring_use| ring_use.generation.number).max().unwrap_or(0)
    }

    /// Fills in what other snapshots define, and says which quotas have sums or limits but no
    /// definition.
    pub(super) fn complete_definitions(&mut self, notes: &mut Notes<'_>) {
        for (id, definition) in std::mem::take(&mut self.other_definitions) {
            self.definitions.entry(id).or_insert(definition);
        }
        let mut unknown: BTreeMap<QuotaId, u64> = BTreeMap::new();
        let sums = self.deltas.iter().map(|sum| sum.key.quota);
        let limits = self.limit_changes.keys().map(|&(quota, _)| quota);
        for quota in sums.chain(limits).filter(|quota| !self.definitions.contains_key(quota)) {
            *unknown.entry(quota).or_default() += 1;
        }
        for (quota, count) in unknown {
            let what = format!(
                "the definition of quota {quota} is lost, and with it {count} sums and limits"
            );
            notes.loss("journal", 0, what);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_merge_and_show_their_gaps() {
        let mut ranges = Ranges::default();
        for range in [0..4, 4..6, 20..30, 10..12, 5..8, 40..40] {
            ranges.add(range);
        }
        assert_eq!(ranges.0, [0..8, 10..12, 20..30]);
        assert_eq!(ranges.end(), 30);
        assert_eq!(ranges.gaps(2, 40), [8..10, 12..20, 30..40]);
        assert_eq!(ranges.gaps(11, 35), [12..20, 30..35]);
        ranges.add(7..50);
        assert!(ranges.gaps(0, 50).is_empty());
        assert_eq!(ranges.end(), 50);
    }
}
