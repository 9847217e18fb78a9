//! How much of each counter is reserved.
//!
//! A counter's sum changes while its cell is held, so that usage and the reserved part of it can be
//! read as of one instant. The window, and the hash by which the counter itself is found, give its
//! bucket: a cache line that holds two sums and their common lock, taken by one compare-and-swap
//! and released by a store. Sums beyond these two are in maps behind the buckets. A thread that
//! holds a bucket waits for nothing but a map, and one that holds a map for nothing.

use std::collections::HashMap;
use std::hash::BuildHasher;

use crossbeam::utils::CachePadded;
use foldhash::fast::RandomState;
use parking_lot::{Mutex, MutexGuard};

use crate::admission::cell::{Cell, CellState};
use crate::admission::table::{Key, Place};
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
pub(crate) struct SumPlace {
    key: SumKey,
    hash: usize,
}

/// A counter's sum in a bucket that nobody else looks at.
#[derive(Debug)]
pub(crate) struct HeldSum<'a> {
    bucket: &'a Bucket,
    reserved: &'a Reserved,
    place: SumPlace,
    /// How many of its sums lie in the map.
    beyond: u64,
}

impl SumPlace {
    /// Given the hash of the counter. Windows of one counter are spread, too: with short ones, many
    /// may have reservations.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "64-bit platforms only")]
    fn new(key: SumKey, hash: u64) -> Self {
        let spread = key.window.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        Self { key, hash: (hash ^ spread) as usize }
    }
}

impl Reserved {
    /// The hasher is that of the counters' table.
    pub(crate) fn new(hasher: RandomState) -> Self {
        Self {
            buckets: (0..BUCKETS).map(|_| Bucket::default()).collect(),
            maps: (0..MAPS).map(|_| CachePadded::default()).collect(),
            hasher,
        }
    }

    /// Where a counter's sum is.
    pub(crate) fn place(&self, key: SumKey) -> SumPlace {
        let SumKey { user, quota, .. } = key;
        SumPlace::new(key, self.hasher.hash_one(Key { user, quota }))
    }

    /// Where the sum of a counter is that was found already, which is about to be asked for.
    #[inline(always)]
    pub(crate) fn prefetch(&self, counter: Place, window: WindowStart) -> SumPlace {
        let Key { user, quota } = counter.key();
        let place = SumPlace::new(SumKey { quota, window, user }, counter.hash());
        prefetch::for_write(&raw const self.buckets[place.hash % BUCKETS]);
        place
    }

    /// The sum of a counter, to be changed. Waits for whoever has its bucket.
    #[inline(always)]
    pub(crate) fn lock(&self, place: SumPlace) -> HeldSum<'_> {
        let bucket = &self.buckets[place.hash % BUCKETS];
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
                return HeldSum { bucket, reserved: self, place, beyond };
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

/// What lies in the maps. The caller has the bucket.
impl Reserved {
    fn map(&self, place: SumPlace) -> MutexGuard<'_, Map> {
        self.maps[place.hash % MAPS].lock()
    }

    #[cold]
    fn sum_beyond(&self, place: SumPlace) -> u64 {
        self.map(place).get(&place.key).copied().unwrap_or(0)
    }

    #[cold]
    fn begin_beyond(&self, place: SumPlace, amount: u64) {
        self.map(place).insert(place.key, amount);
    }

    /// Whether the counter's sum lies here.
    #[cold]
    fn add_beyond(&self, place: SumPlace, amount: u64) -> bool {
        let mut map = self.map(place);
        let Some(sum) = map.get_mut(&place.key) else { return false };
        *sum += amount;
        true
    }

    /// Whether there is a sum less.
    #[cold]
    fn subtract_beyond(&self, place: SumPlace, amount: u64) -> bool {
        let mut map = self.map(place);
        let Some(sum) = map.get_mut(&place.key) else { return false };
        *sum = sum.saturating_sub(amount);
        *sum == 0 && map.remove(&place.key).is_some()
    }
}

impl HeldSum<'_> {
    /// The counter's sum in the bucket.
    #[inline(always)]
    fn find(&self) -> Option<&Sum> {
        self.bucket.sums.iter().find(|sum| sum.is_of(self.place.key))
    }

    #[inline(always)]
    fn sum(&self) -> u64 {
        match self.find() {
            Some(sum) => sum.amount.load(Ordering::Relaxed),
            None if self.beyond == 0 => 0,
            None => self.reserved.sum_beyond(self.place),
        }
    }

    /// Counts what is reserved. The counter's cell is held.
    #[inline(always)]
    pub(crate) fn add(&mut self, amount: u64) {
        if let Some(sum) = self.find() {
            let before = sum.amount.load(Ordering::Relaxed);
            return sum.amount.store(before + amount, Ordering::Relaxed);
        }
        if self.beyond > 0 && self.reserved.add_beyond(self.place, amount) {
            return;
        }
        match self.bucket.sums.iter().find(|sum| sum.is_free()) {
            Some(free) => {
                free.user.store(self.place.key.user, Ordering::Relaxed);
                free.place.store(self.place.key.place(), Ordering::Relaxed);
                free.amount.store(amount, Ordering::Relaxed);
            }
            None => {
                self.reserved.begin_beyond(self.place, amount);
                self.beyond += 1;
            }
        }
    }

    /// Counts what is no longer reserved. The counter's cell is held, unless its window is over.
    #[inline(always)]
    pub(crate) fn subtract(&mut self, amount: u64) {
        match self.find() {
            Some(sum) => {
                let before = sum.amount.load(Ordering::Relaxed);
                sum.amount.store(before.saturating_sub(amount), Ordering::Relaxed);
            }
            None => {
                self.beyond -= u64::from(self.reserved.subtract_beyond(self.place, amount));
            }
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
            let reserved = Reserved::new(RandomState::default());
            let mut expected = BTreeMap::new();
            // Users whose counters share a bucket.
            let home = reserved.place(part(0, 1).key()).hash % BUCKETS;
            let shared: Vec<u64> = (0..)
                .filter(|&number| reserved.place(part(number, 1).key()).hash % BUCKETS == home)
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
        let (reserved, begin) = (Reserved::new(RandomState::default()), std::sync::Barrier::new(3));
        let home = reserved.place(part(0, 1).key()).hash % BUCKETS;
        let shared: Vec<u64> = (0..)
            .filter(|&number| reserved.place(part(number, 1).key()).hash % BUCKETS == home)
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
