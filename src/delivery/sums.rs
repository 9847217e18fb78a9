//! Sums of ranges of the journal: gathered in memory to be delivered, or merged into files for a
//! sink that lags. Reads files, never the counters.

use std::sync::Arc;

use crate::delivery::state::backlog_name;
use crate::error::{Error, Result};
use crate::fold::{FoldTable, Sum};
use crate::journal::batch::{Batch, BatchSource};
use crate::journal::reader::JournalSource;
use crate::journal::writer::{ChainPoint, JournalFiles};
use crate::model::{BatchNumber, EngineId};
use crate::snapshot::SnapshotReader;
use crate::snapshot::deltas::{DeltaRange, DeltasReader, DeltasWriter};
use crate::snapshot::merge::{MergedSums, SumSource};
use crate::storage::Storage;

/// So many sums are folded in memory, at some 100 bytes each, before they are merged into a file.
const SUMS_IN_MEMORY: usize = 1 << 20;

/// A merge reports its pace at least once for so many sums.
const PACE_SUMS: u64 = 1 << 12;

/// Told how many bytes were written since the last call; may sleep; its error ends the work.
pub(super) type Pace<'a> = dyn FnMut(u64) -> Result<()> + 'a;

/// The data directory, as deliveries see it.
#[derive(Debug, Clone)]
pub(super) struct Disk {
    pub(super) storage: Arc<dyn Storage>,
    pub(super) engine: EngineId,
    pub(super) files: Arc<JournalFiles>,
}

/// Sums that something is added to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Base {
    /// None: what is added follows this batch.
    After(ChainPoint),
    /// A part of a sink's backlog.
    Backlog(DeltaRange),
    /// Everything up to this batch.
    Snapshot(ChainPoint),
}

impl Base {
    /// The batch after which the journal goes on.
    fn end(self) -> ChainPoint {
        match self {
            Self::After(point) | Self::Snapshot(point) => point,
            Self::Backlog(range) => range.to,
        }
    }
}

/// What the journal adds from a position on, being gathered.
#[derive(Debug)]
pub(super) struct Gathered {
    pub(super) from: ChainPoint,
    source: JournalSource,
    table: FoldTable,
}

impl Gathered {
    /// Takes batches in, up to `end`, until there are `sums_max` sums.
    pub(super) fn gather(&mut self, disk: &Disk, end: BatchNumber, sums_max: usize) -> Result<()> {
        self.source.go_on(&disk.files, end);
        let table = &mut self.table;
        while table.len() < sums_max && self.source.next_batch(&mut |batch| add(table, batch))? {}
        Ok(())
    }

    /// The last batch taken in.
    pub(super) fn to(&self) -> ChainPoint {
        self.source.last()
    }

    /// How many sums there are.
    pub(super) fn len(&self) -> usize {
        self.table.len()
    }

    /// The sums, ascending by key.
    pub(super) fn into_sums(mut self) -> Vec<Sum> {
        let mut sums = Vec::new();
        self.table.drain_sorted(&mut sums);
        sums
    }
}

fn add(table: &mut FoldTable, batch: &Batch<'_>) -> Result<()> {
    let damaged = |reason| {
        let reason = format!("batch {}: {reason}", batch.header.number);
        Error::damaged("journal", 0, reason)
    };
    let mut sums = batch.sums();
    while let Some(sum) = sums.next_sum().map_err(damaged)? {
        table.add_checked(sum).ok_or("a sum above 128 bits").map_err(damaged)?;
    }
    Ok(())
}

/// Sums in memory, as a source for a merge.
struct SortedSums<'a>(std::slice::Iter<'a, Sum>);

impl SumSource for SortedSums<'_> {
    fn next_sum(&mut self) -> Result<Option<Sum>> {
        Ok(self.0.next().copied())
    }
}

impl Disk {
    /// Begins to gather what follows a batch.
    pub(super) fn gather_after(&self, from: ChainPoint) -> Gathered {
        let source = JournalSource::new(&self.files, self.engine, from, from.number);
        Gathered { from, source, table: FoldTable::default() }
    }

    /// All of a part of a sink's backlog.
    pub(super) fn backlog_sums(&self, sink: &str, range: DeltaRange) -> Result<Vec<Sum>> {
        self.collect(sink, Base::Backlog(range), &[])
    }

    /// `base` and the batches that follow it, up to `end`, and the last of them.
    pub(super) fn sums_up_to(
        &self,
        sink: &str,
        base: Base,
        end: BatchNumber,
    ) -> Result<(Vec<Sum>, ChainPoint)> {
        let mut gathered = self.gather_after(base.end());
        gathered.gather(self, end, usize::MAX)?;
        let to = gathered.to();
        self.collect(sink, base, &gathered.into_sums()).map(|sums| (sums, to))
    }

    fn collect(&self, sink: &str, base: Base, more: &[Sum]) -> Result<Vec<Sum>> {
        let mut sums = Vec::new();
        self.merge(sink, base, more, &mut |sum| {
            sums.push(sum);
            Ok(())
        })?;
        Ok(sums)
    }

    /// Hands the sums of `base` and `more` together to `take`, ascending by key.
    fn merge(
        &self,
        sink: &str,
        base: Base,
        more: &[Sum],
        take: &mut dyn FnMut(Sum) -> Result<()>,
    ) -> Result<()> {
        let mut more = SortedSums(more.iter());
        let mut base: Option<Box<dyn SumSource>> = match base {
            Base::After(_) => None,
            Base::Backlog(range) => Some(Box::new(self.open_backlog(sink, range)?)),
            Base::Snapshot(point) => {
                Some(Box::new(SnapshotReader::open(&self.storage, self.engine, point.number)?))
            }
        };
        let mut sources: Vec<&mut dyn SumSource> = vec![&mut more];
        if let Some(base) = &mut base {
            sources.push(&mut **base);
        }
        let mut merged = MergedSums::new(sources)?;
        while let Some(sum) = merged.next_sum()? {
            take(sum)?;
        }
        Ok(())
    }

    pub(super) fn open_backlog(&self, sink: &str, range: DeltaRange) -> Result<DeltasReader> {
        DeltasReader::open(&self.storage, self.engine, range, &backlog_name(sink, range))
    }

    /// Writes a part of a sink's backlog: `base` and the batches that follow it, up to `end`. Its
    /// range begins at `from`. Durable when it returns; what `base` is stays.
    pub(super) fn write_backlog(
        &self,
        sink: &str,
        from: Option<ChainPoint>,
        base: Base,
        end: BatchNumber,
        pace: &mut Pace<'_>,
    ) -> Result<DeltaRange> {
        let mut written: Option<DeltaRange> = None;
        loop {
            let so_far = written.map_or(base, Base::Backlog);
            let mut gathered = self.gather_after(so_far.end());
            gathered.gather(self, end, SUMS_IN_MEMORY)?;
            let range = DeltaRange { from, to: gathered.to() };
            self.write_merged(sink, range, so_far, &gathered.into_sums(), pace)?;
            if let Some(step) = written.replace(range) {
                self.remove_backlog(sink, step)?;
            }
            if range.to.number >= end {
                return Ok(range);
            }
        }
    }

    fn write_merged(
        &self,
        sink: &str,
        range: DeltaRange,
        base: Base,
        more: &[Sum],
        pace: &mut Pace<'_>,
    ) -> Result<()> {
        let name = backlog_name(sink, range);
        let temporary = format!("backlog-{sink}.tmp");
        let mut writer = DeltasWriter::create(&self.storage, self.engine, range, temporary)?;
        let mut passed = 0;
        self.merge(sink, base, more, &mut |sum| {
            writer.write_sum(sum)?;
            passed += 1;
            if passed % PACE_SUMS == 0 { pace(writer.take_bytes_written()) } else { Ok(()) }
        })?;
        pace(writer.take_bytes_written())?;
        writer.finish(&name).map(|_| ())
    }

    pub(super) fn remove_backlog(&self, sink: &str, range: DeltaRange) -> Result<()> {
        self.remove(&backlog_name(sink, range))
    }

    /// Removes a file that may be gone already.
    pub(super) fn remove(&self, name: &str) -> Result<()> {
        match self.storage.remove(name) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io("remove", self.storage.path(name), error))
            }
            _ => Ok(()),
        }
    }
}
