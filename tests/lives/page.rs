//! The page that parent and child share: what was issued, what was acknowledged, and what was
//! promised to survive loss of power. It is a mapped file, so that it keeps what the child stored
//! until the instant of its death.
//!
//! What is counted lies in two banks: whoever has recovered the directory and found it right writes
//! the other bank, with what was recovered as the new start, and then makes that the current one.
#![allow(unsafe_code, reason = "the page is shared memory")]

use std::fs::OpenOptions;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::MmapRaw;

use super::{ADJUSTED_MAX, COUNTERS, THREADS, USERS};

/// Amounts that only grow, per thread, counter and window.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Tally {
    /// Of consumes that were acknowledged.
    Added,
    /// Of these, those that were durable when they returned. Counted before `Added`.
    AddedSynced,
    /// What refunds said was given back.
    Refunded,
    RefundedSynced,
}

/// Amounts of calls that have not returned, or of which more is not known, per thread and counter.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Open {
    Add,
    Refund,
    /// Given back in one of two windows.
    RefundUnplaced,
}

/// Where a child is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Starting,
    Opening,
    Counting,
    Closing,
    /// A thread merges, while the others go on.
    Merging,
}

impl Phase {
    pub(crate) const ALL: [Self; 5] =
        [Self::Starting, Self::Opening, Self::Counting, Self::Closing, Self::Merging];
}

/// A request with an id, which the next life asks again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    pub(crate) id: u64,
    pub(crate) kind: u64,
    pub(crate) counter: usize,
    pub(crate) amount: u64,
    /// The page's clock before it was asked first.
    pub(crate) asked: u64,
}

/// What was answered to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answered {
    /// The call has not returned.
    Unknown = 1,
    Admitted = 2,
    Denied = 3,
}

/// What is only reported.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Count {
    Acknowledged,
    AcknowledgedSynced,
    Denied,
    Recoveries,
    /// Units that a recovery had to find, beyond those of the recovery before.
    Promised,
    Windows,
    Changes,
    Refused,
    /// Requests that were asked again in the next life, and answered as before.
    AskedAgain,
    /// Signs of life: operations that have returned, and phases.
    Turns,
    /// Times that the syncs in the background were all that made durable what was counted.
    CoveredUnasked,
    /// Findings of recoveries: a batch of which a part is there; a ring of which an earlier record
    /// is missing; one that has overwritten what the journal has lost; others.
    TornBatches,
    Gaps,
    Laps,
    OtherFindings,
}

/// Windows that can pass before the next recovery.
pub(crate) const WINDOWS: usize = 6;

const TALLIES: usize = 4;
const OPENS: usize = 3;
const COUNTS: usize = 15;

const CLOCK: usize = 0;
const BANK: usize = 1;
const CUT: usize = 2;
const PHASE: usize = 3;
const MERGING: usize = 4;
const SIGNAL: usize = 5;
const COUNTED: usize = 6;
/// Limits: the default and each user's own; the last one that was acknowledged, and the one asked
/// for last.
const LIMITS: usize = COUNTED + COUNTS;
/// The last request of each thread.
const REQUESTS: usize = LIMITS + 2 * (USERS + 1);
const REQUEST_WORDS: usize = 7;
/// In a request: whether its answer survives loss of power.
const SURVIVES: usize = REQUEST_WORDS - 1;
const BANKS: usize = REQUESTS + REQUEST_WORDS * THREADS;

// In a bank.
const FIRST_WINDOW: usize = 0;
const BASE: usize = 1;
const OPEN: usize = BASE + COUNTERS;
const COVERED: usize = OPEN + COUNTERS * OPENS * THREADS;
const TALLY: usize = COVERED + COUNTERS * WINDOWS * 2;
const BANK_WORDS: usize = TALLY + COUNTERS * WINDOWS * TALLIES * THREADS;

const WORDS: usize = BANKS + 2 * BANK_WORDS;

/// Added to what is covered, which may be below zero for a moment.
const BIAS: u64 = 1 << 40;

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

    fn load(&self, index: usize) -> u64 {
        self.word(index).load(Ordering::SeqCst)
    }

    fn store(&self, index: usize, value: u64) {
        self.word(index).store(value, Ordering::SeqCst);
    }

    fn bank(&self) -> usize {
        BANKS + (self.load(BANK) as usize % 2) * BANK_WORDS
    }

    /// Windows passed so far: the clock of child and parent, never behind the engine's.
    pub(crate) fn clock(&self) -> u64 {
        self.load(CLOCK)
    }

    pub(crate) fn tick(&self) {
        self.word(CLOCK).fetch_add(1, Ordering::SeqCst);
    }

    /// Whether the power is gone, or goes at any moment.
    pub(crate) fn is_cut(&self) -> bool {
        self.load(CUT) == 1
    }

    pub(crate) fn set_cut(&self, is_cut: bool) {
        self.store(CUT, u64::from(is_cut));
    }

    pub(crate) fn enter(&self, phase: Phase) {
        self.store(PHASE, phase as u64);
        self.store(MERGING, 0);
        self.count(Count::Turns, 1);
    }

    pub(crate) fn merging(&self, begins: bool) {
        let change = if begins { 1 } else { u64::MAX };
        self.word(MERGING).fetch_add(change, Ordering::SeqCst);
    }

    pub(crate) fn is_in(&self, phase: Phase) -> bool {
        match phase {
            Phase::Merging => self.load(MERGING) > 0,
            _ => self.load(PHASE) == phase as u64,
        }
    }

    /// What a run that shows something has met.
    pub(crate) fn events(&self, events: &[Count]) -> Vec<(Count, u64)> {
        events.iter().map(|&event| (event, self.counted(event))).collect()
    }

    /// What a child that meets a full disk sees of itself.
    pub(crate) fn signal(&self) -> &AtomicU64 {
        self.word(SIGNAL)
    }

    pub(crate) fn count(&self, count: Count, by: u64) {
        self.word(COUNTED + count as usize).fetch_add(by, Ordering::SeqCst);
    }

    pub(crate) fn counted(&self, count: Count) -> u64 {
        self.load(COUNTED + count as usize)
    }

    /// The limit that was acknowledged last, and the one that was asked for last: the default where
    /// there is no `user`. 0 is no limit of one's own.
    pub(crate) fn limit(&self, user: Option<usize>) -> [u64; 2] {
        let index = LIMITS + 2 * user.map_or(0, |user| user + 1);
        [self.load(index), self.load(index + 1)]
    }

    pub(crate) fn ask_limit(&self, user: Option<usize>, limit: u64) {
        self.store(LIMITS + 2 * user.map_or(0, |user| user + 1) + 1, limit);
    }

    pub(crate) fn acknowledge_limit(&self, user: Option<usize>, limit: u64) {
        self.store(LIMITS + 2 * user.map_or(0, |user| user + 1), limit);
    }

    /// Notes what is about to be asked. The first word last: without it there is none.
    pub(crate) fn note_request(&self, thread: usize, request: &Request) {
        self.forget_request(thread);
        let &Request { id, kind, counter, amount, asked } = request;
        let first = REQUESTS + thread * REQUEST_WORDS;
        for (word, value) in (first + 1..).zip([id, kind, counter as u64, amount, asked, 0]) {
            self.store(word, value);
        }
        self.answered(thread, Answered::Unknown);
    }

    pub(crate) fn answered(&self, thread: usize, answered: Answered) {
        self.store(REQUESTS + thread * REQUEST_WORDS, answered as u64);
    }

    /// What this thread was answered last survives loss of power.
    pub(crate) fn answer_survives(&self, thread: usize) {
        self.store(REQUESTS + thread * REQUEST_WORDS + SURVIVES, 1);
    }

    /// The power was lost: of the other answers nobody knows whether they are there.
    pub(crate) fn doubt_answers(&self) {
        for thread in 0..THREADS {
            let first = REQUESTS + thread * REQUEST_WORDS;
            if self.request(thread).is_some() && self.load(first + SURVIVES) == 0 {
                self.answered(thread, Answered::Unknown);
            }
        }
    }

    pub(crate) fn forget_request(&self, thread: usize) {
        self.store(REQUESTS + thread * REQUEST_WORDS, 0);
    }

    /// The last request of a thread, which may be one of an earlier life.
    pub(crate) fn request(&self, thread: usize) -> Option<(Request, Answered)> {
        let first = REQUESTS + thread * REQUEST_WORDS;
        let all = [Answered::Unknown, Answered::Admitted, Answered::Denied];
        let answered = all.into_iter().find(|&it| it as u64 == self.load(first))?;
        let [id, kind, counter, amount, asked] =
            std::array::from_fn(|index| self.load(first + 1 + index));
        Some((Request { id, kind, counter: counter as usize, amount, asked }, answered))
    }

    /// The place of a window in the bank; `None` where it lies outside.
    pub(crate) fn slot(&self, window: u64) -> Option<usize> {
        let slot = window.checked_sub(self.load(self.bank() + FIRST_WINDOW))?;
        (slot < WINDOWS as u64 && window <= self.clock()).then_some(slot as usize)
    }

    pub(crate) fn base(&self, counter: usize) -> u64 {
        self.load(self.bank() + BASE + counter)
    }

    pub(crate) fn issue(&self, counter: usize, open: Open, thread: usize, amount: u64) {
        let index = OPEN + (counter * OPENS + open as usize) * THREADS + thread;
        self.word(self.bank() + index).fetch_add(amount, Ordering::SeqCst);
    }

    pub(crate) fn withdraw(&self, counter: usize, open: Open, thread: usize, amount: u64) {
        self.issue(counter, open, thread, amount.wrapping_neg());
    }

    pub(crate) fn open_amount(&self, counter: usize, open: Open) -> u64 {
        let first = self.bank() + OPEN + (counter * OPENS + open as usize) * THREADS;
        (first..first + THREADS).map(|index| self.load(index)).sum()
    }

    fn tally(counter: usize, slot: usize, tally: Tally) -> usize {
        TALLY + ((counter * WINDOWS + slot) * TALLIES + tally as usize) * THREADS
    }

    pub(crate) fn add(
        &self,
        counter: usize,
        slot: usize,
        tally: Tally,
        thread: usize,
        amount: u64,
    ) {
        let index = self.bank() + Self::tally(counter, slot, tally) + thread;
        self.word(index).fetch_add(amount, Ordering::SeqCst);
    }

    pub(crate) fn sum(&self, counter: usize, slot: usize, tally: Tally) -> u64 {
        let first = self.bank() + Self::tally(counter, slot, tally);
        (first..first + THREADS).map(|index| self.load(index)).sum()
    }

    /// What is acknowledged now, for [`cover`](Self::cover): per word of `COVERED`, what is not
    /// durable for itself. What was durable when it returned is read last and counted first, so
    /// that it is never counted as both.
    pub(crate) fn acknowledged(&self) -> Vec<u64> {
        let mut words = Vec::with_capacity(COUNTERS * WINDOWS * 2);
        for counter in 0..COUNTERS {
            for slot in 0..WINDOWS {
                for (all, synced) in
                    [(Tally::Added, Tally::AddedSynced), (Tally::Refunded, Tally::RefundedSynced)]
                {
                    let all = self.sum(counter, slot, all);
                    words.push(BIAS + all - self.sum(counter, slot, synced));
                }
            }
        }
        words
    }

    /// What was acknowledged then survives loss of power from now on.
    pub(crate) fn cover(&self, acknowledged: &[u64]) {
        for (index, &word) in acknowledged.iter().enumerate() {
            self.word(self.bank() + COVERED + index).fetch_max(word, Ordering::SeqCst);
        }
    }

    /// What survives loss of power of what was added and of what was given back.
    pub(crate) fn durable(&self, counter: usize, slot: usize) -> [u64; 2] {
        let index = self.bank() + COVERED + (counter * WINDOWS + slot) * 2;
        [(index, Tally::AddedSynced), (index + 1, Tally::RefundedSynced)].map(|(index, synced)| {
            let synced = self.sum(counter, slot, synced);
            (self.load(index).max(BIAS) + synced).saturating_sub(BIAS)
        })
    }

    /// What was recovered is the new start, in the window in which it is now.
    pub(crate) fn rebase(&self, used: &[u64]) {
        let next = self.load(BANK) + 1;
        let bank = BANKS + (next as usize % 2) * BANK_WORDS;
        (bank..bank + BANK_WORDS).for_each(|index| self.store(index, 0));
        self.store(bank + FIRST_WINDOW, self.clock());
        for (counter, &used) in used.iter().enumerate() {
            self.store(bank + BASE + counter, used);
        }
        self.store(BANK, next);
    }

    /// Of a directory that is not there yet.
    pub(crate) fn forget(&self) {
        self.rebase(&[0; COUNTERS]);
        (0..THREADS).for_each(|thread| self.forget_request(thread));
        for user in std::iter::once(None).chain((0..USERS).map(Some)) {
            let limit = if user.is_none() { ADJUSTED_MAX } else { 0 };
            self.ask_limit(user, limit);
            self.acknowledge_limit(user, limit);
        }
    }
}
