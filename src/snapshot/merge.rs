//! Merging: a snapshot and the batches after it become the next snapshot. Streams files; never
//! reads the counters.
//!
//! Memory and fan-in are bounded: sums are folded in a table, which is written out as a sorted run
//! when it is full, and a merge that has as many runs as it may have stops there; the next one goes
//! on from the snapshot it wrote. What is remembered besides the sums is held in memory; whenever
//! there is much more than is to be kept, the oldest is forgotten.

use std::cmp::Reverse;
use std::collections::binary_heap::PeekMut;
use std::collections::{BinaryHeap, HashSet};
use std::sync::Arc;

use crate::codec::DecodeResult;
use crate::error::{Error, Result};
use crate::fold::{FoldTable, Sum, SumKey};
use crate::journal::batch::{Batch, BatchSource};
use crate::ledger::Remembering;
use crate::model::{BatchNumber, Definition, EngineId, QuotaId, Timestamp, WindowStart};
use crate::snapshot::codec::{BLOCK_BYTES_MAX, Binding};
use crate::snapshot::reader::RunReader;
use crate::snapshot::state::ColdState;
use crate::snapshot::writer::{ContentWriter, PIECE_BYTES, Progress};
use crate::snapshot::{Limit, SnapshotInfo, SnapshotReader, SnapshotWriter, run_name};
use crate::storage::Storage;
use crate::storage::TemporaryFile;

/// Gives sums whose keys ascend strictly.
pub(crate) trait SumSource {
    fn next_sum(&mut self) -> Result<Option<Sum>>;
}

/// What a merge may use, and what it keeps.
#[derive(Debug, Clone)]
pub(crate) struct MergeLimits {
    /// This many sums fill the table (one batch may overfill it), at some 100 bytes each. As many
    /// changed limits end the merge. At least 1.
    pub(crate) sums_in_memory: usize,
    /// The merge stops folding when it has written this many sorted runs. Each takes half a
    /// megabyte while it is read. At least 1.
    pub(crate) runs_max: usize,
    /// The largest payload of a block.
    pub(crate) block_bytes: usize,
    /// How long answers are kept, and how many.
    pub(crate) remembering: Remembering,
}

impl MergeLimits {
    pub(crate) fn new(remembering: Remembering) -> Self {
        Self { sums_in_memory: 1 << 20, runs_max: 64, block_bytes: BLOCK_BYTES_MAX, remembering }
    }
}

/// `pace` is called at least once per this many sums or limits, whether or not they were written.
const PACE_ENTRIES: usize = 1 << 16;

/// Told how many bytes were written since the last call; may sleep; its error ends the merge.
type Pace<'a> = dyn FnMut(u64) -> Result<()> + 'a;

/// Merges the snapshot `base` (none: the empty state) and the batches that follow it into the next
/// snapshot. `None` when there was no batch to merge.
///
/// Windows that start below their quota's `horizon` are dropped, except for counters that a
/// reservation still holds something of; so is what need not be remembered. `pace` is told after
/// each batch, and every so often between, how many bytes were written since its last call; it may
/// sleep, and its error ends the merge.
///
/// # Errors
/// Then nothing has changed except temporary files; only an error of the last directory sync may
/// leave the new snapshot behind, complete.
#[expect(clippy::too_many_arguments, reason = "one call site; each is a thing of its own")]
pub(crate) fn merge(
    storage: &Arc<dyn Storage>,
    engine: EngineId,
    mut base: Option<SnapshotReader>,
    batches: &mut dyn BatchSource,
    horizon: &dyn Fn(&Definition) -> WindowStart,
    now: Timestamp,
    pace: &mut Pace<'_>,
    limits: &MergeLimits,
) -> Result<Option<SnapshotInfo>> {
    let state = match &mut base {
        Some(base) => ColdState::from_snapshot(base)?,
        None => ColdState::new(),
    };
    let mut folding = Folding::new(storage, engine, state, limits, now);
    while !folding.is_full() && batches.next_batch(&mut |batch| folding.take(batch))? {
        if folding.is_table_full() {
            folding.spill(pace)?;
        }
        pace(0)?;
    }
    if folding.state.last().number == folding.start {
        return Ok(None);
    }
    folding.state.raise_floors(horizon);
    folding.state.prune(limits.remembering, now);
    folding.write(base, pace).map(Some)
}

/// Batches being folded.
struct Folding<'a> {
    storage: &'a Arc<dyn Storage>,
    engine: EngineId,
    limits: &'a MergeLimits,
    now: Timestamp,
    /// The last batch before those that are folded.
    start: BatchNumber,
    state: ColdState,
    table: FoldTable,
    /// Of the table, sorted; kept for its memory.
    sorted: Vec<Sum>,
    runs: Vec<RunReader>,
}

impl<'a> Folding<'a> {
    fn new(
        storage: &'a Arc<dyn Storage>,
        engine: EngineId,
        state: ColdState,
        limits: &'a MergeLimits,
        now: Timestamp,
    ) -> Self {
        Self {
            storage,
            engine,
            limits,
            now,
            start: state.last().number,
            state,
            table: FoldTable::default(),
            sorted: Vec::new(),
            runs: Vec::new(),
        }
    }

    /// Whether no further batch may be taken.
    fn is_full(&self) -> bool {
        self.runs.len() >= self.limits.runs_max.max(1)
            || self.state.limit_changes().len() >= self.limits.sums_in_memory.max(1)
    }

    fn is_table_full(&self) -> bool {
        self.table.len() >= self.limits.sums_in_memory.max(1)
    }

    fn take(&mut self, batch: &Batch<'_>) -> DecodeResult<()> {
        self.state.apply(batch)?;
        self.state.bound(self.limits.remembering, self.now);
        self.table.add_sums(batch.sums())
    }

    /// Writes the table out as a sorted run.
    fn spill(&mut self, pace: &mut Pace<'_>) -> Result<()> {
        self.table.drain_sorted(&mut self.sorted);
        let file = TemporaryFile::create(self.storage, run_name(self.start, self.runs.len()))?;
        let binding = Binding::new(self.engine, self.start);
        let mut writer = ContentWriter::new(file, binding, self.limits.block_bytes);
        for &sum in &self.sorted {
            writer.write_sum(sum)?;
            keep_pace(writer.progress(), pace)?;
        }
        let (file, counts, bytes) = writer.finish_unsynced()?;
        self.runs.push(RunReader::new(file, binding, counts, bytes));
        Ok(())
    }

    fn write(
        mut self,
        mut base: Option<SnapshotReader>,
        pace: &mut Pace<'_>,
    ) -> Result<SnapshotInfo> {
        let damaged = |reason| Error::damaged(self.storage.path("journal"), 0, reason);
        let manifest = self.state.manifest(self.now).map_err(damaged)?;
        let mut writer = SnapshotWriter::create_with(
            self.storage,
            self.engine,
            &manifest,
            self.limits.block_bytes,
        )?;

        let held = self.state.ledger().held();
        for event in self.state.take_events() {
            writer.write_event(&event)?;
            keep_pace(writer.progress(), pace)?;
        }

        self.table.drain_sorted(&mut self.sorted);
        let mut rest = SortedSums(self.sorted.iter().copied());
        let mut sources: Vec<&mut dyn SumSource> = vec![&mut rest];
        sources.extend(self.runs.iter_mut().map(|run| run as &mut dyn SumSource));
        sources.extend(base.iter_mut().map(|base| base as &mut dyn SumSource));
        let mut totals = MergedSums::new(sources)?;
        let mut pruning = Pruning { state: &self.state, held, current: None };
        while let Some(total) = totals.next_sum()? {
            if pruning.keeps(total.key)? {
                writer.write_sum(total)?;
            }
            keep_pace(writer.progress(), pace)?;
        }
        drop(totals);

        write_limits(&self.state, base.as_mut(), &mut writer, pace)?;
        report(writer.progress(), pace)?;
        writer.finish()
    }
}

/// Counts one more entry, and reports to `pace` every so often.
fn keep_pace(progress: &mut Progress, pace: &mut Pace<'_>) -> Result<()> {
    progress.entries_passed += 1;
    let is_due = progress.bytes_written >= PIECE_BYTES as u64;
    if is_due || progress.entries_passed >= PACE_ENTRIES { report(progress, pace) } else { Ok(()) }
}

fn report(progress: &mut Progress, pace: &mut Pace<'_>) -> Result<()> {
    pace(std::mem::take(progress).bytes_written)
}

/// Decides which sums are kept.
struct Pruning<'a> {
    state: &'a ColdState,
    /// What comes for these makes sense only with what is there of them, however old: a sink that
    /// begins with the totals is told of both.
    held: HashSet<SumKey>,
    /// The quota of the sum before, and its floor: sums come quota by quota.
    current: Option<(QuotaId, WindowStart)>,
}

impl Pruning<'_> {
    fn keeps(&mut self, key: SumKey) -> Result<bool> {
        let floor = match self.current {
            Some((quota, floor)) if quota == key.quota => floor,
            _ => {
                if self.state.definition(key.quota).is_none() {
                    let reason = format!("a sum of the unknown quota {}", key.quota);
                    return Err(Error::damaged("snapshot", 0, reason));
                }
                let floor = self.state.floor(key.quota);
                self.current = Some((key.quota, floor));
                floor
            }
        };
        Ok(key.window >= floor || self.held.contains(&key))
    }
}

/// Writes the limits of the base with the changes since.
fn write_limits(
    state: &ColdState,
    mut base: Option<&mut SnapshotReader>,
    writer: &mut SnapshotWriter,
    pace: &mut Pace<'_>,
) -> Result<()> {
    let mut changes = state.limit_changes().iter().map(|(&key, &limit)| (key, limit)).peekable();
    let mut next_of_base = || base.as_mut().map_or(Ok(None), |base| base.next_limit());
    let mut old = next_of_base()?;
    loop {
        let keys = [old.map(|old| old.key()), changes.peek().map(|&(key, _)| key)];
        let Some(key @ (quota, user)) = keys.into_iter().flatten().min() else { return Ok(()) };
        if state.definition(quota).is_none() {
            let reason = format!("a limit of the unknown quota {quota}");
            return Err(Error::damaged("snapshot", 0, reason));
        }
        let mut limit = None;
        if let Some(same) = old.filter(|old| old.key() == key) {
            limit = Some(same.limit);
            old = next_of_base()?;
        }
        if let Some((_, changed)) = changes.next_if(|&(changed, _)| changed == key) {
            limit = changed;
        }
        if let Some(limit) = limit {
            writer.write_limit(Limit { quota, user, limit })?;
        }
        keep_pace(writer.progress(), pace)?;
    }
}

/// Sums in memory, ascending by key.
pub(crate) struct SortedSums<I>(pub(crate) I);

impl<I: Iterator<Item = Sum>> SumSource for SortedSums<I> {
    fn next_sum(&mut self) -> Result<Option<Sum>> {
        Ok(self.0.next())
    }
}

/// Adds sorted sources up: one total for each key, ascending.
pub(crate) struct MergedSums<'a> {
    sources: Vec<&'a mut dyn SumSource>,
    heads: BinaryHeap<Reverse<Head>>,
}

/// The next sum of a source. Compared by key, then source: no two are equal.
#[derive(Debug, Clone, Copy)]
struct Head {
    sum: Sum,
    source: usize,
}

impl Ord for Head {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.sum.key, self.source).cmp(&(other.sum.key, other.source))
    }
}

impl PartialOrd for Head {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Head {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Head {}

impl<'a> MergedSums<'a> {
    pub(crate) fn new(mut sources: Vec<&'a mut dyn SumSource>) -> Result<Self> {
        let mut heads = BinaryHeap::with_capacity(sources.len());
        for (source, sums) in sources.iter_mut().enumerate() {
            if let Some(sum) = sums.next_sum()? {
                heads.push(Reverse(Head { sum, source }));
            }
        }
        Ok(Self { sources, heads })
    }

    pub(crate) fn next_sum(&mut self) -> Result<Option<Sum>> {
        let Some(mut total) = self.take_first(None)? else { return Ok(None) };
        while let Some(sum) = self.take_first(Some(total.key))? {
            total.amount = total.amount.checked_add(sum.amount).ok_or_else(|| {
                let SumKey { quota, user, .. } = total.key;
                let reason = format!("the sum of user {user} of quota {quota} is above 128 bits");
                Error::damaged("snapshot", 0, reason)
            })?;
        }
        Ok(Some(total))
    }

    /// The least sum of all sources, if there is one and it has this key (`None`: any).
    #[inline]
    fn take_first(&mut self, key: Option<SumKey>) -> Result<Option<Sum>> {
        let Some(mut head) = self.heads.peek_mut() else { return Ok(None) };
        let Reverse(Head { sum, source }) = *head;
        if key.is_some_and(|key| key != sum.key) {
            return Ok(None);
        }
        let next = match self.sources.get_mut(source) {
            Some(source) => source.next_sum()?,
            None => None,
        };
        match next {
            Some(next) => head.0.sum = next,
            None => {
                PeekMut::pop(head);
            }
        }
        Ok(Some(sum))
    }
}

impl std::fmt::Debug for MergedSums<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MergedSums").field("sources", &self.sources.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
