//! What is remembered for a while: a bounded map that forgets the oldest first.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, Hash};
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam::utils::CachePadded;
use foldhash::fast::RandomState;
use parking_lot::{Mutex, MutexGuard};

use crate::ledger::Remembering;
use crate::model::Timestamp;

/// At most so many parts with a lock each.
const SHARDS_MAX: usize = 64;
/// A part holds no fewer than this, so that the bound is kept closely.
const SHARD_ENTRIES_MIN: usize = 64;

/// On a cache line of its own.
pub(super) type Locked<T> = CachePadded<Mutex<T>>;

/// Values by key, each until its time is over.
#[derive(Debug)]
pub(crate) struct Remembered<K, V> {
    shards: Box<[Locked<Shard<K, V>>]>,
    hasher: RandomState,
    forgotten_early: AtomicU64,
}

/// The values whose keys hash alike, to be looked at and added to by one thread at a time.
#[derive(Debug)]
pub(crate) struct Shard<K, V> {
    values: HashMap<K, (Timestamp, V), RandomState>,
    /// Keys with the time at which they were added, oldest first. A key that was added again stands
    /// twice.
    order: VecDeque<(Timestamp, K)>,
    remembering: Remembering,
}

impl<K: Copy + Eq + Hash, V: Copy> Remembered<K, V> {
    pub(crate) fn new(remembering: Remembering) -> Self {
        let shards = (remembering.max / SHARD_ENTRIES_MIN).clamp(1, SHARDS_MAX);
        let max = remembering.max.div_ceil(shards);
        let shard = || Shard {
            values: HashMap::default(),
            order: VecDeque::new(),
            remembering: Remembering { max, ..remembering },
        };
        Self {
            shards: (0..shards).map(|_| CachePadded::new(Mutex::new(shard()))).collect(),
            hasher: RandomState::default(),
            forgotten_early: AtomicU64::new(0),
        }
    }

    /// The part in which a key is, if it is anywhere.
    pub(crate) fn lock(&self, key: K) -> MutexGuard<'_, Shard<K, V>> {
        #[expect(clippy::cast_possible_truncation, reason = "64-bit platforms only")]
        let hash = self.hasher.hash_one(key) as usize;
        self.shards[hash % self.shards.len()].lock()
    }

    /// The value of a key, if it is not forgotten.
    pub(crate) fn get(&self, key: K, now: Timestamp) -> Option<V> {
        self.lock(key).get(key, now)
    }

    pub(crate) fn insert(&self, key: K, value: V, at: Timestamp, now: Timestamp) {
        let forgotten = self.lock(key).insert(key, value, at, now);
        self.count_forgotten(forgotten);
    }

    /// Counts what [`Shard::insert`] has forgotten before its time.
    pub(crate) fn count_forgotten(&self, forgotten: u64) {
        if forgotten > 0 {
            // Relaxed: for statistics.
            self.forgotten_early.fetch_add(forgotten, Ordering::Relaxed);
        }
    }

    /// How many values were forgotten before their time, for want of room.
    pub(crate) fn forgotten_early(&self) -> u64 {
        self.forgotten_early.load(Ordering::Relaxed)
    }

    /// Forgets what is over.
    pub(crate) fn sweep(&self, now: Timestamp) {
        for shard in &self.shards {
            shard.lock().forget(now);
        }
    }

    /// How many values are remembered.
    pub(crate) fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().values.len()).sum()
    }
}

impl<K: Copy + Eq + Hash, V: Copy> Shard<K, V> {
    /// The value of a key, if it is not forgotten.
    pub(crate) fn get(&self, key: K, now: Timestamp) -> Option<V> {
        let &(at, value) = self.values.get(&key)?;
        (!self.remembering.is_over(at, now)).then_some(value)
    }

    /// Adds a value that came to be at `at`, in place of an earlier one. Returns how many others
    /// were forgotten before their time.
    pub(crate) fn insert(&mut self, key: K, value: V, at: Timestamp, now: Timestamp) -> u64 {
        self.forget(now);
        let mut forgotten = 0;
        while self.values.len() >= self.remembering.max && self.forget_oldest() {
            forgotten += 1;
        }
        self.values.insert(key, (at, value));
        self.order.push_back((at, key));
        forgotten
    }

    fn forget(&mut self, now: Timestamp) {
        while self.order.front().is_some_and(|&(at, _)| self.remembering.is_over(at, now)) {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) -> bool {
        let Some((at, key)) = self.order.pop_front() else { return false };
        if self.values.get(&key).is_some_and(|&(known, _)| known == at) {
            self.values.remove(&key);
        }
        true
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(millis: u64) -> Timestamp {
        Timestamp::from_unix_millis(millis)
    }

    #[test]
    fn a_value_is_remembered_for_its_time() {
        let remembering = Remembering { window: Duration::from_millis(10), max: 1000 };
        let remembered = Remembered::new(remembering);
        remembered.insert(1, 'a', at(5), at(5));
        assert_eq!(remembered.get(1, at(14)), Some('a'));
        assert_eq!(remembered.get(1, at(15)), None);
        assert_eq!(remembered.get(2, at(5)), None);
        assert_eq!(remembered.len(), 1);
        // Added again, it is remembered anew.
        remembered.insert(1, 'b', at(20), at(20));
        remembered.sweep(at(29));
        assert_eq!(remembered.get(1, at(29)), Some('b'));
        remembered.sweep(at(30));
        assert_eq!((remembered.len(), remembered.forgotten_early()), (0, 0));
    }

    #[test]
    fn beyond_the_bound_the_oldest_go_and_are_counted() {
        let remembering = Remembering { window: Duration::from_secs(10), max: 3 };
        let remembered = Remembered::new(remembering);
        for key in 0..5 {
            remembered.insert(key, (), at(key), at(key));
        }
        let kept: Vec<_> = (0..5).filter(|&key| remembered.get(key, at(5)).is_some()).collect();
        assert_eq!(kept, [2, 3, 4]);
        assert_eq!((remembered.len(), remembered.forgotten_early()), (3, 2));
    }

    #[test]
    fn a_key_of_which_an_older_value_is_forgotten_stays() {
        let remembering = Remembering { window: Duration::from_millis(10), max: 2 };
        let remembered = Remembered::new(remembering);
        remembered.insert(1, 'a', at(0), at(0));
        remembered.insert(1, 'b', at(5), at(5));
        remembered.sweep(at(12));
        assert_eq!(remembered.get(1, at(12)), Some('b'));
    }
}
