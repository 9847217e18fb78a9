//! Sums of ranges of the journal: gathered in memory to be delivered, or merged into files for a
//! sink that lags. For sinks that want events these come with them; events are not merged, so a
//! range that holds many is split. Reads files, never the counters.

use std::collections::HashSet;
use std::sync::Arc;

use crate::codec::DecodeResult;
use crate::delivery::state::{
    self, SinkState, backlog_name, parse_backlog_name, temporary_backlog_name,
};
use crate::error::{Error, Result};
use crate::fold::{FoldTable, Sum, SumKey};
use crate::journal::batch::{Batch, BatchSource};
use crate::journal::pool::JournalFiles;
use crate::journal::reader::JournalSource;
use crate::journal::writer::ChainPoint;
use crate::ledger::{LedgerEvent, Recorded};
use crate::model::{BatchNumber, EngineId, QuotaId, WindowStart};
use crate::snapshot::SnapshotReader;
use crate::snapshot::deltas::{DeltaRange, DeltasReader, DeltasWriter};
use crate::snapshot::merge::{MergedSums, SortedSums, SumSource};
use crate::storage::Storage;

/// This many sums are folded in memory, at some 100 bytes each, before they are merged into a file.
const SUMS_IN_MEMORY: usize = if cfg!(test) { 64 } else { 1 << 20 };

/// A part of a backlog with this many sums is reported as large before it is read into memory.
const SUMS_MANY: u64 = 2 * SUMS_IN_MEMORY as u64;

/// A part of a backlog ends where it holds this many sums in addition to those of the fullest
/// window of each quota, since it is built in memory, and delivered in one transaction. A long
/// outage adds windows, but not counters, so a part may hold all counters, as the totals do, and
/// counters whose windows do not end are kept once.
const WINDOW_SUMS_MAX: u64 = if cfg!(test) { 16 } else { 1 << 20 };

/// A range is cut at the batch with which the payloads of its events reach this: it is gathered in
/// memory, and delivered in one transaction.
pub(super) const EVENT_BYTES_MAX: u64 = if cfg!(test) { 256 } else { 4 << 20 };

/// How many parts a backlog may have.
const PARTS_MAX: usize = if cfg!(test) { 100 } else { state::PARTS_MAX };

/// A merge reports its pace at least once per this many sums.
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

/// What a range holds: sums, ascending by key, and events.
#[derive(Debug, Default)]
pub(super) struct Content {
    pub(super) sums: Vec<Sum>,
    pub(super) events: Vec<Recorded>,
}

/// How much of the journal is taken in.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// No batch after this one.
    pub(super) end: BatchNumber,
    /// No further batch is taken once there are this many sums and events.
    pub(super) entries: usize,
    /// No further batch once the events' payloads take so much.
    pub(super) event_bytes: u64,
    /// In a part of a backlog, no further batch is taken once the windows that are not the fullest
    /// of their quota have this many sums.
    pub(super) window_sums: u64,
}

impl Bounds {
    /// Everything up to this batch, which was the end of a range before, or must be.
    pub(super) fn exactly(end: BatchNumber) -> Self {
        Self { end, entries: usize::MAX, event_bytes: u64::MAX, window_sums: u64::MAX }
    }

    /// Up to this batch, or to where there are many events, or many windows.
    pub(super) fn cut(end: BatchNumber) -> Self {
        let (event_bytes, window_sums) = (EVENT_BYTES_MAX, WINDOW_SUMS_MAX);
        Self { event_bytes, window_sums, ..Self::exactly(end) }
    }
}

/// What the journal adds from a position on, being gathered.
#[derive(Debug)]
pub(super) struct Gathered {
    pub(super) from: ChainPoint,
    source: JournalSource,
    table: FoldTable,
    /// Those of batches after this one are taken; `None`: none are.
    events_after: Option<BatchNumber>,
    events: Vec<Recorded>,
    event_bytes: u64,
}

impl Gathered {
    /// Takes batches in, as far as the bounds allow.
    pub(super) fn gather(
        &mut self,
        disk: &Disk,
        bounds: Bounds,
        pace: &mut Pace<'_>,
    ) -> Result<()> {
        self.source.go_on(&disk.files, bounds.end);
        while !self.is_full(bounds.entries, bounds.event_bytes) {
            pace(0)?;
            let Self { table, events, event_bytes, .. } = self;
            let events_after = self.events_after;
            let has_more = self.source.next_batch(&mut |batch| {
                table.add_sums(batch.sums())?;
                if events_after.is_some_and(|after| batch.header.number > after) {
                    *event_bytes += take_events(events, batch)?;
                }
                Ok(())
            })?;
            if !has_more {
                break;
            }
        }
        Ok(())
    }

    /// Whether there are this many sums and events, or this many bytes of events.
    pub(super) fn is_full(&self, entries: usize, event_bytes: u64) -> bool {
        self.table.len() + self.events.len() >= entries || self.event_bytes >= event_bytes
    }

    /// The last batch taken in.
    pub(super) fn to(&self) -> ChainPoint {
        self.source.last()
    }

    pub(super) fn into_content(mut self) -> Content {
        let mut sums = Vec::new();
        self.table.drain_sorted(&mut sums);
        Content { sums, events: self.events }
    }
}

/// Asks, once for so many that have passed, whether to go on.
pub(super) fn keep_pace(passed: usize, pace: &mut Pace<'_>) -> Result<()> {
    if (passed as u64).is_multiple_of(PACE_SUMS) { pace(0) } else { Ok(()) }
}

/// Takes the recorded events of a batch; how many bytes their payloads take.
fn take_events(taken: &mut Vec<Recorded>, batch: &Batch<'_>) -> DecodeResult<u64> {
    let mut bytes = 0;
    let mut events = batch.events();
    while let Some(event) = events.next_event()? {
        if let LedgerEvent::Recorded(recorded) = event {
            bytes += recorded.payload.len() as u64;
            taken.push(recorded);
        }
    }
    Ok(bytes)
}

/// Whether a part, of which nothing is read yet, holds sums of many windows. It is read for that
/// only where it holds many sums.
fn has_many_windows(part: &mut DeltasReader, pace: &mut Pace<'_>) -> Result<bool> {
    let mut sums = WindowSums::default();
    if part.sum_count() >= WINDOW_SUMS_MAX {
        let mut passed = 0_u64;
        while sums.beside < WINDOW_SUMS_MAX
            && let Some(sum) = part.next_sum()?
        {
            sums.add(sum.key);
            passed += 1;
            if passed.is_multiple_of(PACE_SUMS) {
                pace(0)?;
            }
        }
    }
    Ok(sums.beside >= WINDOW_SUMS_MAX)
}

/// Counts sums, ascending by key, that are not in the fullest window of their quota.
#[derive(Debug, Default)]
struct WindowSums {
    window: Option<(QuotaId, WindowStart)>,
    in_window: u64,
    in_fullest: u64,
    beside: u64,
}

impl WindowSums {
    fn add(&mut self, key: SumKey) {
        let window = Some((key.quota, key.window));
        if self.window != window {
            if self.window.is_none_or(|(quota, _)| quota != key.quota) {
                self.in_fullest = 0;
            }
            (self.window, self.in_window) = (window, 0);
        }
        self.in_window += 1;
        if self.in_window > self.in_fullest {
            self.in_fullest = self.in_window;
        } else {
            self.beside += 1;
        }
    }
}

/// A sum or an event of a range.
enum Entry {
    Event(Recorded),
    Sum(Sum),
}

impl Disk {
    /// Begins to gather what follows a batch, with the events after another one.
    pub(super) fn gather_after(
        &self,
        from: ChainPoint,
        events_after: Option<BatchNumber>,
    ) -> Gathered {
        let source = JournalSource::new(&self.files, self.engine, from, from.number);
        let (table, events) = (FoldTable::default(), Vec::new());
        Gathered { from, source, table, events_after, events, event_bytes: 0 }
    }

    /// All of a part of a sink's backlog. `is_news`: a large one is reported.
    pub(super) fn backlog_content(
        &self,
        of: &SinkState,
        range: DeltaRange,
        is_news: bool,
        pace: &mut Pace<'_>,
    ) -> Result<Content> {
        if is_news {
            let sums = self.open_backlog(&of.name, range)?.sum_count();
            if sums >= SUMS_MANY {
                // Before, in case the memory does not suffice.
                tracing::warn!(sink = of.name, sums, "a delivery of many sums is put together");
            }
        }
        self.collect(of, Base::Backlog(range), Content::default(), pace)
    }

    /// `base` and the batches that follow it, and the last of them.
    pub(super) fn content_of(
        &self,
        of: &SinkState,
        base: Base,
        bounds: Bounds,
        pace: &mut Pace<'_>,
    ) -> Result<(Content, ChainPoint)> {
        let mut gathered = self.gather_after(base.end(), of.events_after);
        gathered.gather(self, bounds, pace)?;
        let to = gathered.to();
        self.collect(of, base, gathered.into_content(), pace).map(|content| (content, to))
    }

    fn collect(
        &self,
        of: &SinkState,
        base: Base,
        more: Content,
        pace: &mut Pace<'_>,
    ) -> Result<Content> {
        let mut all = Content::default();
        self.merge(of, base, more, &mut |entry| {
            match entry {
                Entry::Event(event) => all.events.push(event),
                Entry::Sum(sum) => all.sums.push(sum),
            }
            keep_pace(all.events.len() + all.sums.len(), pace)
        })?;
        Ok(all)
    }

    /// Hands what `base` and `more` hold together to `take`: the events in their order, then the
    /// sums, ascending by key.
    fn merge(
        &self,
        of: &SinkState,
        base: Base,
        more: Content,
        take: &mut dyn FnMut(Entry) -> Result<()>,
    ) -> Result<()> {
        let mut base: Option<Box<dyn SumSource>> = match base {
            Base::After(_) => None,
            Base::Backlog(range) => {
                let mut reader = self.open_backlog(&of.name, range)?;
                // Of an earlier part the sink gave up its events: it was opened without since.
                if of.events_after.is_some_and(|after| range.to.number > after) {
                    reader.read_events(&mut |event| take(Entry::Event(event)))?;
                }
                Some(Box::new(reader))
            }
            Base::Snapshot(point) => {
                Some(Box::new(SnapshotReader::open(&self.storage, self.engine, point.number)?))
            }
        };
        more.events.into_iter().try_for_each(|event| take(Entry::Event(event)))?;
        let mut more = SortedSums(more.sums.into_iter());
        let mut sources: Vec<&mut dyn SumSource> = vec![&mut more];
        if let Some(base) = &mut base {
            sources.push(&mut **base);
        }
        let mut merged = MergedSums::new(sources)?;
        while let Some(sum) = merged.next_sum()? {
            take(Entry::Sum(sum))?;
        }
        Ok(())
    }

    pub(super) fn open_backlog(&self, sink: &str, range: DeltaRange) -> Result<DeltasReader> {
        DeltasReader::open(&self.storage, self.engine, range, &backlog_name(sink, range))
    }

    /// Whether a part of a backlog can't be read, to which this error of a merge leads back. That
    /// of a disk may as well be of what was written: the part, read alone, tells.
    pub(super) fn is_lost(&self, sink: &str, part: DeltaRange, error: &Error) -> bool {
        match error {
            Error::Damaged { .. } => true,
            Error::Io { .. } => {
                let read = self.open_backlog(sink, part);
                read.and_then(|mut reader| reader.verify_to_end()).is_err()
            }
            _ => false,
        }
    }

    /// Writes a part of a sink's backlog: `base` and the batches that follow it, up to
    /// `bounds.end`. Its range begins at `from`. Durable when it returns; what `base` is stays.
    pub(super) fn write_part(
        &self,
        of: &SinkState,
        from: Option<ChainPoint>,
        base: Base,
        bounds: Bounds,
        pace: &mut Pace<'_>,
    ) -> Result<DeltaRange> {
        let mut written: Option<DeltaRange> = None;
        loop {
            let so_far = written.map_or(base, Base::Backlog);
            let bytes_before = match so_far {
                Base::Backlog(range) => self.open_backlog(&of.name, range)?.payload_bytes(),
                _ => 0,
            };
            let event_bytes = bounds.event_bytes.saturating_sub(bytes_before);
            let mut gathered = self.gather_after(so_far.end(), of.events_after);
            let step = Bounds { entries: SUMS_IN_MEMORY, event_bytes, ..bounds };
            gathered.gather(self, step, pace)?;
            let has_many_events = gathered.is_full(usize::MAX, event_bytes);
            let range = DeltaRange { from, to: gathered.to() };
            let window_sums =
                self.write_merged(of, range, so_far, gathered.into_content(), pace)?;
            let is_cut = has_many_events || window_sums >= bounds.window_sums;
            if let Some(step) = written.replace(range) {
                self.remove_backlog(&of.name, step)?;
            }
            if is_cut || range.to.number >= bounds.end {
                return Ok(range);
            }
        }
    }

    /// As [`write_part`](Self::write_part), with as many parts as are needed for all up to `end`.
    ///
    /// # Errors
    /// Also where the backlog would have more parts than its state's file can name: the last one
    /// does not grow instead, since it is delivered as a whole.
    pub(super) fn write_parts(
        &self,
        of: &SinkState,
        mut from: Option<ChainPoint>,
        mut base: Base,
        end: BatchNumber,
        pace: &mut Pace<'_>,
    ) -> Result<Vec<DeltaRange>> {
        let mut parts = Vec::new();
        let kept = of.backlog.iter().filter(|&&part| base != Base::Backlog(part)).count();
        loop {
            if kept + parts.len() >= PARTS_MAX {
                let reason = format!(
                    "it is kept in {PARTS_MAX} files, and there may be no more: attach the sink, or \
                     have it forgotten; until then nothing is merged, and the journal grows"
                );
                let (sink, source) = (of.name.clone(), None);
                return Err(Error::NotDelivered { sink, reason, source, is_retryable: false });
            }
            let part = self.write_part(of, from, base, Bounds::cut(end), pace)?;
            parts.push(part);
            if part.to.number >= end {
                return Ok(parts);
            }
            (from, base) = (Some(part.to), Base::After(part.to));
        }
    }

    /// Whether what follows a part of a backlog goes to another one. Not where the part can't be
    /// read, or the work is to end: a merge then says so.
    pub(super) fn is_part_full(&self, sink: &str, part: DeltaRange, pace: &mut Pace<'_>) -> bool {
        let is_full = |mut reader: DeltasReader| {
            let has_many_events = reader.payload_bytes() >= EVENT_BYTES_MAX;
            Ok(has_many_events || has_many_windows(&mut reader, pace)?)
        };
        self.open_backlog(sink, part).and_then(is_full).unwrap_or(false)
    }

    /// Returns how many sums are not in the fullest window of their quota.
    fn write_merged(
        &self,
        of: &SinkState,
        range: DeltaRange,
        base: Base,
        more: Content,
        pace: &mut Pace<'_>,
    ) -> Result<u64> {
        let name = backlog_name(&of.name, range);
        let temporary = temporary_backlog_name(&of.name);
        let mut writer = DeltasWriter::create(&self.storage, self.engine, range, temporary)?;
        let mut passed = 0;
        let mut window_sums = WindowSums::default();
        self.merge(of, base, more, &mut |entry| {
            match entry {
                Entry::Event(event) => writer.write_event(event)?,
                Entry::Sum(sum) => {
                    window_sums.add(sum.key);
                    writer.write_sum(sum)?;
                }
            }
            passed += 1;
            if passed % PACE_SUMS == 0 { pace(writer.take_bytes_written()) } else { Ok(()) }
        })?;
        pace(writer.take_bytes_written())?;
        writer.finish(&name)?;
        Ok(window_sums.beside)
    }

    pub(super) fn remove_backlog(&self, sink: &str, range: DeltaRange) -> Result<()> {
        self.remove(&backlog_name(sink, range))
    }

    /// Removes what a crash, or a merge that failed, left of backlogs that are `concerned`, by
    /// their sinks: parts that were replaced, or that no state names yet.
    pub(super) fn remove_unlisted(
        &self,
        states: &[SinkState],
        concerned: impl Fn(&str) -> bool,
    ) -> Result<()> {
        let names = self.storage.list();
        let names = names.map_err(|error| Error::io("list", self.storage.path(""), error))?;
        let listed = |state: &SinkState| -> Vec<_> {
            state.backlog.iter().map(|&range| backlog_name(&state.name, range)).collect()
        };
        let listed: HashSet<String> = states.iter().flat_map(listed).collect();
        let is_left = |name: &String| {
            parse_backlog_name(name).is_some_and(&concerned) && !listed.contains(name)
        };
        names.iter().filter(|name| is_left(name)).try_for_each(|name| self.remove(name))
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

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;
    use crate::storage::sim::SimDisk;

    /// All of a long part was once read by a merge that gave no sign of life meanwhile, and that
    /// nothing could end.
    #[test]
    fn looking_through_a_part_keeps_the_pace() {
        let (storage, engine) = (SimDisk::new(1).storage(), EngineId::from_u128(1));
        let to = ChainPoint { number: BatchNumber(1), check: 1 };
        let range = DeltaRange { from: None, to };
        let mut writer =
            DeltasWriter::create(&storage, engine, range, temporary_backlog_name("a")).unwrap();
        for user in 0..3 * PACE_SUMS {
            let key = SumKey { quota: QuotaId::from_u16(0), window: WindowStart(0), user };
            writer.write_sum(Sum { key, amount: 1 }).unwrap();
        }
        writer.finish(&backlog_name("a", range)).unwrap();
        let part = || DeltasReader::open(&storage, engine, range, &backlog_name("a", range));

        let mut signs = 0;
        let is_full = has_many_windows(&mut part().unwrap(), &mut |_| {
            signs += 1;
            Ok(())
        });
        assert_eq!((is_full.unwrap(), signs), (false, 3));
        let ended = has_many_windows(&mut part().unwrap(), &mut |_| Err(Error::Closed));
        assert!(matches!(ended, Err(Error::Closed)), "{ended:?}");
    }
}
