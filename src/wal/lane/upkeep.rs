//! What the flushers need from a lane besides its records.

use std::path::Path;

use super::Lane;
use crate::sync::Ordering;
use crate::wal::record::SLOT_WORDS;
use crate::wal::region::SLOTS_AT;

impl Lane {
    /// The ring's file, and where in it the record with this number lies.
    pub(crate) fn place(&self, number: u64) -> (&Path, u64) {
        self.drained.slots.place(number)
    }

    /// How many records it holds, and for how many more there is room now: together less than the
    /// ring while a skip is not in the journal.
    pub(crate) fn fill(&self) -> (u64, u64) {
        let tail = self.tail();
        let freed = self.freed();
        // Relaxed: a report. A skip whose tail was seen is seen.
        let [from, to] = self.drained.skipped.each_ref().map(|it| it.load(Ordering::Relaxed));
        let is_held = to <= tail && freed < to;
        let unused = if is_held { to.saturating_sub(from.max(freed)) } else { 0 };
        let held = tail.saturating_sub(freed).saturating_sub(unused);
        (held, (freed + self.capacity()).saturating_sub(tail))
    }

    /// Says which numbers hold no record, before the tail behind them is published. The drainer's.
    pub(in crate::wal) fn note_skip(&self, from: u64, to: u64) {
        // Relaxed: published with the tail.
        self.drained.skipped[0].store(from, Ordering::Relaxed);
        self.drained.skipped[1].store(to, Ordering::Relaxed);
    }

    /// The words that its ring lies in.
    #[cfg(all(test, not(loom)))]
    pub(crate) fn words(&self) -> &[crate::sync::AtomicU64] {
        self.drained.slots.region().words()
    }

    /// Faults the pages of the records `number..number + count` in, ahead of the writers.
    pub(crate) fn prefault(&self, number: u64, count: u64) -> std::io::Result<()> {
        let capacity = self.capacity();
        let count = count.min(capacity);
        let first = number & (capacity - 1);
        let until_end = count.min(capacity - first);
        for (start, count) in [(first, until_end), (0, count - until_end)] {
            if count > 0 {
                let words = |slots: u64| usize::try_from(slots).unwrap_or(usize::MAX) * SLOT_WORDS;
                self.drained.slots.region().prefault(SLOTS_AT + words(start), words(count))?;
            }
        }
        Ok(())
    }
}
