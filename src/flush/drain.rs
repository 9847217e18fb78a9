//! The drain: lanes -> sums -> a batch in the journal. One at a time, under its lock.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::clock::CoarseClock;
use crate::codec::SUM_BYTES_MAX;
use crate::error::{Error, Resource, Result};
use crate::flush::events::BatchEvents;
use crate::flush::tally::Tally;
use crate::journal::batch::{self, BatchContent, LaneSpan};
use crate::journal::cold::ColdEvent;
use crate::journal::writer::{ChainPoint, Encoded, JournalWriter};
use crate::ledger::PAYLOAD_BYTES_MAX;
use crate::model::{BatchNumber, EngineId};
use crate::wal::lane::Lane;
use crate::wal::lanes::{LaneIndex, Lanes};
use crate::wal::operation::Operation;

/// A lane skips to the start of its ring once it has gone this many records into it, so that the
/// pages in use stay few and warm, and low load does not walk the whole ring through the kernel's
/// write-back.
const SKIP_AFTER: u64 = 1 << 13;

/// A batch goes out before the next sync once a lane holds this many records: what the lanes hold
/// should stay in the processor's cache, and yet a batch should hold far fewer sums than records.
const PRESSING_RECORDS: u64 = 1 << 18;

/// A batch takes in at most about this many records: their slots become free only when it is
/// written.
const BATCH_RECORDS_MAX: u64 = 1 << 19;

/// The bounds of a batch are checked once per this many records.
const BLOCK: u64 = 64;

/// How much memory of batches is kept for the next ones.
const BUFFERS_BYTES_MAX: usize = 16 << 20;

/// The most bytes that one lane's span takes in a batch.
const SPAN_BYTES_MAX: u64 = 33;

/// What one batch may hold, derived from the size of the journal's files.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DrainLimits {
    /// Records that a batch takes in, about.
    pub(crate) records: u64,
    /// Bytes of sums in a batch.
    pub(crate) sum_bytes: usize,
    /// Cold events in a batch.
    pub(crate) cold: usize,
    /// Bytes of the ledger's events in a batch: once it holds this many, no further lane is read.
    pub(crate) ledger_bytes: usize,
    /// Bytes of batches kept until a sync covers them.
    pub(crate) unsynced_bytes: u64,
}

impl DrainLimits {
    /// The most bytes that a cold event written while running takes.
    const COLD_BYTES_MAX: usize = 512;
    /// The most bytes that the events of one operation take: a reservation of 16 counters, the
    /// answer to a request, and what was recorded.
    const EVENTS_BYTES_MAX: usize = 1024 + 32 + PAYLOAD_BYTES_MAX;
    /// A batch takes at most this part of a file.
    const BATCHES_IN_FILE: u64 = 2;

    pub(crate) fn new(file_bytes: u64, unsynced_bytes: u64) -> Self {
        let share = usize::try_from(file_bytes / Self::BATCHES_IN_FILE).unwrap_or(usize::MAX);
        Self {
            records: BATCH_RECORDS_MAX,
            sum_bytes: share / 2,
            cold: (share / 8 / Self::COLD_BYTES_MAX).max(1),
            ledger_bytes: share / 4,
            unsynced_bytes,
        }
    }

    /// The size of journal files with which every batch fits, however many lanes there are.
    pub(crate) fn file_bytes(wanted: u64, lanes: usize) -> u64 {
        let spans = lanes as u64 * SPAN_BYTES_MAX;
        wanted.max((spans * 4 * Self::BATCHES_IN_FILE).next_multiple_of(4096)).max(64 << 10)
    }

    /// The most bytes that a batch takes with these many bytes of sums, of cold events and of the
    /// ledger.
    fn batch_bytes(&self, sums: usize, cold: usize, ledger: usize, lanes: usize) -> u64 {
        let sums = sums.min(self.sum_bytes) as u64;
        let cold = cold.min(self.cold) * Self::COLD_BYTES_MAX;
        let ledger = ledger.min(self.ledger_bytes) + Self::EVENTS_BYTES_MAX;
        let spans = lanes as u64 * SPAN_BYTES_MAX;
        sums + (cold + ledger) as u64 + spans + 2 * batch::HEADER_BYTES as u64
    }
}

/// What the drain has done so far.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct DrainCounts {
    pub(crate) records: u64,
    pub(crate) batches: u64,
}

/// Reads the lanes and writes the journal.
#[derive(Debug)]
pub(crate) struct Drain {
    engine: EngineId,
    clock: Arc<CoarseClock>,
    lanes: Arc<Lanes>,
    writer: JournalWriter,
    limits: DrainLimits,
    tally: Tally,
    /// How many records have gone into the tally since the last batch.
    taken: u64,
    /// The lane that is read first. Another one for each batch: a lane that is filled as fast as it
    /// is read would leave no room for the others.
    first: LaneIndex,
    /// What is to be remembered.
    events: BatchEvents,
    operation: Operation,
    /// Per lane: the records below are in the tally, or in a batch.
    folded: Vec<u64>,
    /// Per lane: the records below are in an appended batch.
    journaled: Vec<u64>,
    /// Per lane: a skip that no appended batch names yet.
    skips: Vec<Option<Skip>>,
    cold: VecDeque<ColdEvent>,
    /// Cold events taken in and appended so far.
    cold_taken: u64,
    cold_appended: u64,
    /// An encoded batch whose append failed: tried again, byte for byte.
    pending: Option<Pending>,
    /// Batches that no sync covers yet.
    retained: VecDeque<Encoded>,
    retained_bytes: u64,
    durable: ChainPoint,
    /// The last batch that holds more than a mark.
    last_content: BatchNumber,
    /// The highest durable batch that a batch names.
    marked: BatchNumber,
    counts: DrainCounts,
    /// Kept for its memory.
    sums: Vec<u8>,
    /// Memory of batches that are synced, for the next ones: what is mapped anew for each is waited
    /// for page by page, and what is given back makes other threads wait.
    buffers: Vec<Vec<u8>>,
}

/// A lane went from record `from`, which says so, on to `to`.
#[derive(Debug, Clone, Copy)]
struct Skip {
    from: u64,
    to: u64,
}

#[derive(Debug)]
struct Pending {
    encoded: Encoded,
    spans: Vec<LaneSpan>,
    cold: u64,
}

impl Drain {
    /// Goes on where recovery ended: everything appended by `writer` so far is durable.
    pub(crate) fn new(
        engine: EngineId,
        clock: Arc<CoarseClock>,
        lanes: Arc<Lanes>,
        writer: JournalWriter,
        limits: DrainLimits,
    ) -> Self {
        let bases: Vec<_> = lanes.iter().map(Lane::tail).collect();
        let durable = writer.head();
        Self {
            engine,
            clock,
            lanes,
            writer,
            limits,
            tally: Tally::default(),
            taken: 0,
            first: 0,
            events: BatchEvents::default(),
            operation: Operation::default(),
            skips: vec![None; bases.len()],
            folded: bases.clone(),
            journaled: bases,
            cold: VecDeque::new(),
            cold_taken: 0,
            cold_appended: 0,
            pending: None,
            retained: VecDeque::new(),
            retained_bytes: 0,
            durable,
            last_content: durable.number,
            marked: BatchNumber::ZERO,
            counts: DrainCounts::default(),
            sums: Vec::new(),
            buffers: Vec::new(),
        }
    }

    /// Adds what the lanes hold now to the sums, up to the bound of one batch. Cheap, and frees
    /// nothing yet.
    ///
    /// # Errors
    /// `Damaged` when a published record does not verify.
    pub(crate) fn fold(&mut self) -> Result<()> {
        let count = self.lanes.len();
        for offset in 0..count {
            self.fold_lane((self.first + offset) % count)?;
        }
        Ok(())
    }

    fn fold_lane(&mut self, index: usize) -> Result<()> {
        let (Some(lane), Some(folded), Some(skip)) =
            (self.lanes.get(index), self.folded.get_mut(index), self.skips.get(index))
        else {
            return Ok(());
        };
        // Beyond a skip nothing is folded until the batch that names it is written.
        let tail = skip.map_or_else(|| lane.tail(), |skip| skip.from);
        let damaged = |number| {
            let what = "a published record does not verify: the ring was changed from outside";
            let (path, offset) = lane.place(number);
            Error::damaged(path, offset, format!("{what} (record {number})"))
        };
        while *folded < tail
            && self.taken < self.limits.records
            && self.tally.bytes_max() < self.limits.sum_bytes
            && self.events.bytes_max() < self.limits.ledger_bytes
        {
            let from = *folded;
            let end = tail.min(from + BLOCK);
            let read = loop {
                if let Some(record) = lane.read(*folded) {
                    self.tally.add(record.key(), record.delta);
                    *folded += 1;
                } else if let Some(()) = lane.read_operation(*folded, &mut self.operation) {
                    // An operation of several records is in one batch: complete, or absent.
                    let adds = self.operation.adds();
                    adds.for_each(|add| self.tally.add(add.key(), add.delta));
                    self.operation.visit_events(&mut self.events);
                    *folded += self.operation.len();
                } else {
                    break Err(damaged(*folded));
                }
                if *folded >= end || self.events.bytes_max() >= self.limits.ledger_bytes {
                    break Ok(());
                }
            };
            self.counts.records += *folded - from;
            self.taken += *folded - from;
            read?;
        }
        Ok(())
    }

    /// Whether a batch should go out without waiting for the next sync: a ring fills up, or the
    /// sums reach the bound.
    pub(crate) fn is_pressing(&self) -> bool {
        let ring_fills = self.lanes.iter().zip(&self.journaled).any(|(lane, &journaled)| {
            lane.tail().saturating_sub(journaled) > (lane.capacity() / 4).min(PRESSING_RECORDS)
        });
        ring_fills
            || self.taken >= self.limits.records
            || self.tally.bytes_max() >= self.limits.sum_bytes / 2
            || self.events.bytes_max() >= self.limits.ledger_bytes / 2
    }

    /// Per lane, the number below which all records are published.
    pub(crate) fn tails(&self) -> Vec<u64> {
        self.lanes.iter().map(Lane::tail).collect()
    }

    /// Moves everything that was in the lanes up to `tails`, and the cold events taken in, to the
    /// journal. Stops, and says false, where a sync has to cover earlier batches first.
    pub(crate) fn flush(&mut self, tails: &[u64]) -> Result<bool> {
        loop {
            if self.is_beyond_unsynced() {
                return Ok(false);
            }
            self.append_batch()?;
            let drained = self.journaled.iter().zip(tails).all(|(done, tail)| done >= tail);
            if drained && self.cold.is_empty() {
                return Ok(true);
            }
        }
    }

    /// Whether as many bytes of batches wait for a sync as may.
    fn is_beyond_unsynced(&self) -> bool {
        self.retained_bytes > self.limits.unsynced_bytes
    }

    /// Appends one batch with what is there, if anything is.
    pub(crate) fn append_batch(&mut self) -> Result<()> {
        if self.pending.is_none() {
            let bounds = self.refuse_beyond_bounds();
            // A mark that has no room can wait: what it says is durable is so without it.
            if bounds.is_err() && !self.has_content() {
                return Ok(());
            }
            bounds?;
            self.skip_lanes();
            self.fold()?;
            self.pending = self.encode()?;
        }
        // Left where it is until it is written.
        let Some(pending) = &self.pending else { return Ok(()) };
        self.writer.append(&pending.encoded)?;
        if let Some(pending) = self.pending.take() {
            self.appended(pending);
            self.free_lanes();
        }
        Ok(())
    }

    /// Whether there is something to write that is not in the journal yet.
    fn has_content(&self) -> bool {
        let lanes = self.lanes.iter().zip(&self.journaled);
        !self.cold.is_empty() || lanes.into_iter().any(|(lane, &to)| lane.tail() > to)
    }

    fn refuse_beyond_bounds(&self) -> Result<()> {
        if self.is_beyond_unsynced() {
            return Err(Error::TooMany {
                what: Resource::UnsyncedBytes,
                bound: self.limits.unsynced_bytes,
            });
        }
        // Twice what is there now: writers go on until it is folded. A batch that turns out larger
        // than the room is retried when there is a file for it.
        let backlog = usize::try_from(self.backlog()).unwrap_or(usize::MAX);
        let sums = self.tally.bytes_max().saturating_add(backlog.saturating_mul(SUM_BYTES_MAX));
        let (cold, ledger) = (self.cold.len(), self.events.bytes_max());
        let (sums, ledger) = (sums.saturating_mul(2), ledger * 2);
        let bytes = self.limits.batch_bytes(sums, cold, ledger, self.lanes.len());
        if self.writer.has_room(bytes) { Ok(()) } else { Err(self.writer.full()) }
    }

    /// Makes the lanes that are far into their rings go on at the start. The batch that is about to
    /// be written ends where the lane skipped and says where it goes on; for a recovery that finds
    /// no such batch, a record in the lane says it.
    ///
    /// Until that batch is written there is only so much room as was freed at the ring's start:
    /// a lane skips once that is as much as it holds. And no more than half of them do, each time
    /// others: where the batch can't be written, which may last, the rings of the rest are whole.
    fn skip_lanes(&mut self) {
        let count = self.lanes.len();
        let mut left = count.div_ceil(2);
        for index in (0..count).map(|offset| (self.first + offset) % count) {
            let (Some(lane), Some(&journaled), Some(skip)) =
                (self.lanes.get(index), self.journaled.get(index), self.skips.get_mut(index))
            else {
                continue;
            };
            let tail = lane.tail();
            let (into_ring, held) = (tail & (lane.capacity() - 1), tail.saturating_sub(journaled));
            let worth = SKIP_AFTER.min(lane.capacity() / 2).max(2 * held);
            if skip.is_some() || into_ring < worth || left == 0 {
                continue;
            }
            *skip = self.lanes.skip(lane).map(|(from, to)| Skip { from, to });
            left -= usize::from(skip.is_some());
        }
    }

    fn encode(&mut self) -> Result<Option<Pending>> {
        let mut spans = Vec::new();
        for (index, (&from, &to)) in self.journaled.iter().zip(&self.folded).enumerate() {
            let next = match self.skips.get(index) {
                Some(&Some(skip)) if skip.from == to => skip.to,
                _ => to,
            };
            if from < next {
                let lane = u16::try_from(index).unwrap_or(u16::MAX);
                spans.push(LaneSpan { lane, from, to, next });
            }
        }
        let has_mark_to_write = self.durable.number > self.marked
            && self.durable == self.writer.head()
            && self.last_content > self.marked;
        let cold_count = self.cold.len().min(self.limits.cold);
        if spans.is_empty() && cold_count == 0 && !has_mark_to_write {
            return Ok(None);
        }
        let cold: Vec<_> = self.cold.drain(..cold_count).collect();
        self.tally.drain_into(&mut self.sums);
        self.taken = 0;
        self.first = (self.first + 1) % self.lanes.len();
        let head = self.writer.head();
        let content = BatchContent {
            number: head.number.next(),
            durable: self.durable.number,
            time: self.clock.now(),
            previous_check: head.check,
            spans: &spans,
            cold: &cold,
            ledger: self.events.finish(),
            sums: &self.sums,
        };
        let mut bytes = self.buffers.pop().unwrap_or_default();
        let check = batch::encode_into(&mut bytes, self.engine, &content).map_err(|reason| {
            let (path, offset) = self.writer.place();
            Error::damaged(path, offset, format!("a batch can't be encoded: {reason}"))
        })?;
        if !(spans.is_empty() && cold.is_empty()) {
            self.last_content = content.number;
        }
        self.marked = content.durable;
        let encoded = Encoded { number: content.number, check, bytes };
        self.events.clear();
        Ok(Some(Pending { encoded, spans, cold: cold_count as u64 }))
    }

    fn appended(&mut self, pending: Pending) {
        for span in &pending.spans {
            let index = usize::from(span.lane);
            if let Some(journaled) = self.journaled.get_mut(index) {
                *journaled = span.next;
            }
            if span.next > span.to
                && let (Some(folded), Some(skip)) =
                    (self.folded.get_mut(index), self.skips.get_mut(index))
            {
                *folded = span.next;
                *skip = None;
            }
        }
        self.cold_appended += pending.cold;
        self.counts.batches += 1;
        self.retained_bytes += pending.encoded.bytes.len() as u64;
        self.retained.push_back(pending.encoded);
    }

    /// Gives the slots back. Only now: the batch is in the page cache, as safe as the ring was.
    fn free_lanes(&self) {
        for (lane, &journaled) in self.lanes.iter().zip(&self.journaled) {
            if lane.freed() != journaled {
                lane.free(journaled);
            }
        }
    }

    /// Takes in a cold event for the next batch, and returns its ticket: it is in the journal once
    /// [`cold_appended`](Self::cold_appended) reaches it.
    pub(crate) fn take_cold(&mut self, event: ColdEvent) -> u64 {
        self.cold.push_back(event);
        self.cold_taken += 1;
        self.cold_taken
    }

    /// Appends batches until this cold event is in one.
    pub(crate) fn append_cold(&mut self, ticket: u64) -> Result<()> {
        while self.cold_appended < ticket {
            self.append_batch()?;
        }
        Ok(())
    }

    /// Takes the cold event that came last back, unless it is in a batch. Whether it did.
    pub(crate) fn withdraw_cold(&mut self, ticket: u64) -> bool {
        let is_waiting = ticket == self.cold_taken && !self.cold.is_empty();
        if is_waiting {
            self.cold.pop_back();
            self.cold_taken -= 1;
        }
        is_waiting
    }

    pub(crate) fn cold_appended(&self) -> u64 {
        self.cold_appended
    }

    /// How many cold events wait for a batch.
    pub(crate) fn cold_waiting(&self) -> usize {
        self.cold.len()
    }

    /// Per lane, the number below which all records are in the journal.
    pub(crate) fn journaled(&self) -> &[u64] {
        &self.journaled
    }

    pub(crate) fn writer(&mut self) -> &mut JournalWriter {
        &mut self.writer
    }

    pub(crate) fn head(&self) -> ChainPoint {
        self.writer.head()
    }

    /// The last batch that a sync has covered.
    pub(crate) fn durable(&self) -> ChainPoint {
        self.durable
    }

    /// Records that the lanes hold and that are not folded yet.
    pub(crate) fn backlog(&self) -> u64 {
        let lanes = self.lanes.iter().zip(&self.folded).zip(&self.skips);
        let waiting = lanes.map(|((lane, &folded), skip)| {
            let skipped = skip.map_or(0, |skip| skip.to - skip.from);
            lane.tail().saturating_sub(folded).saturating_sub(skipped)
        });
        waiting.sum()
    }

    pub(crate) fn counts(&self) -> DrainCounts {
        self.counts
    }

    /// Makes batches take in so many records only.
    #[cfg(all(test, not(loom)))]
    pub(crate) fn bound_records(&mut self, records: u64) {
        self.limits.records = records;
    }

    /// A sync has covered all batches up to `point`.
    pub(crate) fn synced(&mut self, point: ChainPoint) {
        while self.retained.front().is_some_and(|batch| batch.number <= point.number) {
            if let Some(batch) = self.retained.pop_front() {
                self.retained_bytes -= batch.bytes.len() as u64;
                let kept: usize = self.buffers.iter().map(Vec::capacity).sum();
                if kept + batch.bytes.capacity() <= BUFFERS_BYTES_MAX {
                    self.buffers.push(batch.bytes);
                }
            }
        }
        if point.number > self.durable.number {
            self.durable = point;
        }
    }

    /// A sync has failed: what it should have covered goes to a new file. See
    /// [`JournalWriter::rescue`].
    pub(crate) fn rescue(&mut self) -> Result<()> {
        let batches = self.retained.make_contiguous();
        self.writer.rescue(self.durable, batches)?;
        let head = self.writer.head();
        self.synced(head);
        Ok(())
    }
}
