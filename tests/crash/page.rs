//! The page that parent and child share: what was issued, and what was acknowledged. It is a mapped
//! file, so that it keeps what the child stored until the instant of its death.
#![allow(unsafe_code, reason = "the page is shared memory")]

use std::fs::OpenOptions;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::MmapRaw;

use crate::{COUNTERS, THREADS};

/// Numbers that only grow, per counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tally {
    /// Amounts handed to `consume` and `try_consume`, before the call.
    AddIssued,
    /// Amounts whose consume was acknowledged.
    AddAcked,
    /// Amounts handed to `refund`, before the call.
    RefundIssued,
    /// Amounts that refunds said were given back.
    RefundAcked,
}

const TALLIES: usize = 4;
const WORDS: usize = 1 + COUNTERS * TALLIES * THREADS;

/// The mapped page. Each thread has tallies of its own, so that storing is not a race.
pub(crate) struct Page {
    map: MmapRaw,
}

impl Page {
    pub(crate) fn open(path: &Path) -> Self {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .expect("the page's file opens");
        file.set_len((WORDS * 8) as u64).expect("the page's file grows");
        Self { map: MmapRaw::map_raw(&file).expect("the page maps") }
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < WORDS);
        let words = self.map.as_mut_ptr().cast::<AtomicU64>();
        // SAFETY: the mapping holds WORDS words and lives as long as `self`.
        let word = unsafe { words.add(index) };
        // SAFETY: the word is aligned and only ever accessed atomically.
        unsafe { &*word }
    }

    /// Windows passed so far: the clock of child and parent.
    pub(crate) fn clock(&self) -> &AtomicU64 {
        self.word(0)
    }

    pub(crate) fn add(&self, counter: usize, tally: Tally, thread: usize, amount: u64) {
        let index = 1 + (counter * TALLIES + tally as usize) * THREADS + thread;
        self.word(index).fetch_add(amount, Ordering::SeqCst);
    }

    pub(crate) fn sum(&self, counter: usize, tally: Tally) -> u64 {
        let first = 1 + (counter * TALLIES + tally as usize) * THREADS;
        (first..first + THREADS).map(|index| self.word(index).load(Ordering::SeqCst)).sum()
    }

    /// Between kills: what was recovered is the new start.
    pub(crate) fn reset(&self, counter: usize, used: u64) {
        for tally in [Tally::AddIssued, Tally::AddAcked, Tally::RefundIssued, Tally::RefundAcked] {
            for thread in 0..THREADS {
                let index = 1 + (counter * TALLIES + tally as usize) * THREADS + thread;
                self.word(index).store(0, Ordering::SeqCst);
            }
        }
        self.add(counter, Tally::AddIssued, 0, used);
        self.add(counter, Tally::AddAcked, 0, used);
    }
}
