//! How much of each counter is reserved.
//!
//! A counter's sum changes while its cell is held, so that usage and the reserved part of it can be
//! read as of one instant. The counter's hash gives its bucket: a cache line that holds two sums
//! and their common lock, taken by one compare-and-swap and released by a store. Sums beyond these
//! two are in maps behind the buckets. A thread that holds a bucket waits for nothing but a map,
//! and one that holds a map for nothing.

use std::collections::HashMap;
use std::hash::BuildHasher;

use crossbeam::utils::CachePadded;
use foldhash::fast::RandomState;
use parking_lot::Mutex;

use crate::admission::cell::{Cell, CellState};
use crate::fold::SumKey;
use crate::ledger::Part;
use crate::model::{AMOUNT_MAX, WindowStart};
use crate::prefetch;
use crate::sync::{AtomicU64, Ordering, Patience};

/// 64 KiB, which is little compared with what reservations take, and ample for those that are open
/// at a time.
const BUCKETS: usize = if cfg!(loom) { 1 } else { 1 << 10 };
const MAPS: usize = 64;

const LOCKED: u64 = 1;
/// How many sums of a bucket lie in its map, in its lock's word.
const ONE_BEYOND: u64 = 2;

type Map = HashMap<SumKey, u64, RandomState>;

/// The sums of an engine's counters; nothing is left out.
#[derive(Debug)]
pub(crate) struct Reserved {
    buckets: Box<[Bucket]>,
    maps: Box<[CachePadded<Mutex<Map>>]>,
    hasher: RandomState,
}

#[derive(Debug, Default)]
#[repr(align(64))]
struct Bucket {
    lock: AtomicU64,
    sums: [Sum; 2],
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<Bucket>() == 64);

/// Free where the amount is 0. All accesses are relaxed, under the bucket's lock.
#[derive(Debug, Default)]
struct Sum {
    user: AtomicU64,
    /// See [`SumKey::place`].
    place: AtomicU64,
    amount: AtomicU64,
}

/// A counter, and where its sum is looked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    key: SumKey,
    hash: usize,
}

/// A counter's sum in a bucket that nobody else looks at.
#[derive(Debug)]
pub(crate) struct HeldSum<'a> {
    bucket: &'a Bucket,
    map: &'a Mutex<Map>,
    key: SumKey,
    /// How many of its sums lie in the map.
    beyond: u64,
}

impl Reserved {
    pub(crate) fn new() -> Self {
        Self {
            buckets: (0..BUCKETS).map(|_| Bucket::default()).collect(),
            maps: (0..MAPS).map(|_| CachePadded::default()).collect(),
            hasher: RandomState::default(),
        }
    }

    /// Where a counter's sum is.
    #[inline(always)]
    pub(crate) fn place(&self, key: SumKey) -> Place {
        Place { key, hash: self.hash(key) }
    }

    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "64-bit platforms only")]
    fn hash(&self, key: SumKey) -> usize {
        self.hasher.hash_one((key.user, key.place())) as usize
    }

    /// Where a counter's sum is, which is about to be asked for.
    #[inline(always)]
    pub(crate) fn prefetch(&self, key: SumKey) -> Place {
        let place = self.place(key);
        prefetch::for_write(&raw const self.buckets[place.hash % BUCKETS]);
        place
    }

    /// The sum of a counter, to be changed. Waits for whoever has its bucket.
    #[inline(always)]
    pub(crate) fn lock(&self, place: Place) -> HeldSum<'_> {
        let Place { key, hash } = place;
        let bucket = &self.buckets[hash % BUCKETS];
        let mut patience = Patience::default();
        loop {
            // Relaxed: a guess for the compare-and-swap.
            let seen = bucket.lock.load(Ordering::Relaxed);
            // Acquire: pairs with the Release in `HeldSum::drop`.
            if seen & LOCKED == 0
                && bucket
                    .lock
                    .compare_exchange(seen, seen | LOCKED, Ordering::Acquire, Ordering::Relaxed)
                    .is_ok()
            {
                let beyond = seen / ONE_BEYOND;
                return HeldSum { bucket, map: &self.maps[hash % MAPS], key, beyond };
            }
            patience.wait();
        }
    }

    /// A counter's state as seen from a window, and how much of it is reserved: of one instant.
    /// `None` while somebody is about to change them.
    pub(crate) fn read(
        &self,
        cell: &Cell,
        user: u64,
        window: WindowStart,
    ) -> Option<(CellState, u64)> {
        let seen = || cell.load().seen_from(window);
        let guess = seen();
        let sum =
            self.lock(self.place(SumKey { quota: guess.quota(), window: guess.window(), user }));
        // Whoever has changed the sum held the cell then, and has let it go with what goes with the
        // sum, if it is not held now. Whoever holds it from now on waits for the bucket.
        let state = seen();
        let is_settled = state.window() == guess.window() && !state.is_held();
        is_settled.then(|| (state, sum.sum()))
    }

    /// How much of a counter's usage in a window is reserved.
    pub(crate) fn sum(&self, key: SumKey) -> u64 {
        self.lock(self.place(key)).sum()
    }

    /// Counts what recovery found to be reserved, as far as it can be used: what a loss of power
    /// has left may be more than was ever open at a time. The counter's usage is loaded with the
    /// same bound, so that settling takes the same from both.
    pub(crate) fn load(&self, part: &Part) {
        let mut held = self.lock(self.place(part.key()));
        let more = AMOUNT_MAX.saturating_sub(held.sum());
        held.add(part.amount.min(more));
    }
}

impl HeldSum<'_> {
    /// The counter's sum in the bucket.
    #[inline(always)]
    fn find(&self) -> Option<&Sum> {
        self.bucket.sums.iter().find(|sum| sum.is_of(self.key))
    }

    #[inline(always)]
    fn sum(&self) -> u64 {
        match self.find() {
            Some(sum) => sum.amount.load(Ordering::Relaxed),
            None if self.beyond == 0 => 0,
            None => self.map.lock().get(&self.key).copied().unwrap_or(0),
        }
    }

    /// Counts what is reserved. The counter's cell is held.
    #[inline(always)]
    pub(crate) fn add(&mut self, amount: u64) {
        if let Some(sum) = self.find() {
            let before = sum.amount.load(Ordering::Relaxed);
            return sum.amount.store(before + amount, Ordering::Relaxed);
        }
        if self.beyond > 0 && self.add_beyond(amount) {
            return;
        }
        match self.bucket.sums.iter().find(|sum| sum.is_free()) {
            Some(free) => {
                free.user.store(self.key.user, Ordering::Relaxed);
                free.place.store(self.key.place(), Ordering::Relaxed);
                free.amount.store(amount, Ordering::Relaxed);
            }
            None => self.begin_beyond(amount),
        }
    }

    #[cold]
    fn begin_beyond(&mut self, amount: u64) {
        self.map.lock().insert(self.key, amount);
        self.beyond += 1;
    }

    /// Whether the counter's sum lies in the map.
    #[cold]
    fn add_beyond(&self, amount: u64) -> bool {
        let mut map = self.map.lock();
        let Some(sum) = map.get_mut(&self.key) else { return false };
        *sum += amount;
        true
    }

    /// Counts what is no longer reserved. The counter's cell is held, unless its window is over.
    #[inline(always)]
    pub(crate) fn subtract(&mut self, amount: u64) {
        match self.find() {
            Some(sum) => {
                let before = sum.amount.load(Ordering::Relaxed);
                sum.amount.store(before.saturating_sub(amount), Ordering::Relaxed);
            }
            None => self.subtract_beyond(amount),
        }
    }

    #[cold]
    fn subtract_beyond(&mut self, amount: u64) {
        let mut map = self.map.lock();
        let Some(sum) = map.get_mut(&self.key) else { return };
        *sum = sum.saturating_sub(amount);
        if *sum == 0 {
            map.remove(&self.key);
            drop(map);
            self.beyond -= 1;
        }
    }
}

impl Drop for HeldSum<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        // Release: pairs with the Acquire in `lock`.
        self.bucket.lock.store(self.beyond * ONE_BEYOND, Ordering::Release);
    }
}

impl Sum {
    #[inline(always)]
    fn is_free(&self) -> bool {
        self.amount.load(Ordering::Relaxed) == 0
    }

    #[inline(always)]
    fn is_of(&self, key: SumKey) -> bool {
        self.user.load(Ordering::Relaxed) == key.user
            && self.place.load(Ordering::Relaxed) == key.place()
            && !self.is_free()
    }
}

#[cfg(all(test, loom))]
mod loom_tests;
#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::model::{QuotaId, WindowStart};

    fn part(number: u64, amount: u64) -> Part {
        let quota = QuotaId::from_u16((number % 3) as u16);
        Part { user: number / 6, quota, window: WindowStart(number / 3 % 2), amount }
    }

    proptest! {
        /// In buckets and beyond, a sum is what was added less what was subtracted, in whichever
        /// order others come and go.
        #[test]
        fn a_sum_is_what_was_added_less_what_was_subtracted(
            steps in proptest::collection::vec((0..12_usize, 0..4_u64), 0..200),
        ) {
            let reserved = Reserved::new();
            let mut expected = BTreeMap::new();
            // Users whose counters share a bucket.
            let home = reserved.hash(part(0, 1).key()) % BUCKETS;
            let shared: Vec<u64> = (0..)
                .filter(|&number| reserved.hash(part(number, 1).key()) % BUCKETS == home)
                .take(6)
                .collect();
            for (which, amount) in steps {
                let number = shared.get(which).copied().unwrap_or(which as u64);
                let sum = expected.entry(number).or_insert(0);
                if amount > 0 {
                    reserved.lock(reserved.place(part(number, amount).key())).add(amount);
                    *sum += amount;
                } else {
                    reserved.lock(reserved.place(part(number, 1).key())).subtract(*sum);
                    *sum = 0;
                }
                for (&number, &sum) in &expected {
                    prop_assert_eq!(reserved.sum(part(number, 1).key()), sum);
                }
            }
        }
    }

    #[test]
    fn racing_threads_lose_no_unit() {
        // So many that they meet, whatever else the machine does.
        const EACH: usize = 500_000;
        let (reserved, begin) = (Reserved::new(), std::sync::Barrier::new(3));
        let home = reserved.hash(part(0, 1).key()) % BUCKETS;
        let shared: Vec<u64> = (0..)
            .filter(|&number| reserved.hash(part(number, 1).key()) % BUCKETS == home)
            .take(3)
            .collect();
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    begin.wait();
                    for step in 0..EACH {
                        let number = shared[step % 3];
                        let place = reserved.place(part(number, 1).key());
                        reserved.lock(place).add(2);
                        reserved.lock(place).subtract(1);
                    }
                });
            }
        });
        let sum: u64 = shared.iter().map(|&number| reserved.sum(part(number, 1).key())).sum();
        assert_eq!(sum, 3 * EACH as u64);
        assert!(reserved.buckets[home].lock.load(Ordering::Relaxed) & LOCKED == 0);
    }
}
