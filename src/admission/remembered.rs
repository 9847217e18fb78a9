//! What is remembered for a while: a bounded map that forgets the oldest first.

mod index;
mod shard;

use std::hash::{BuildHasher, Hash};

use crossbeam::utils::CachePadded;
use foldhash::quality::RandomState;

use self::index::{Hint, VALUES_MAX};
use self::shard::Shard;
use crate::ledger::Remembering;
use crate::model::Timestamp;
use crate::sync::{BriefGuard, BriefLock};

/// At most this many parts, each with its own lock.
const SHARDS_MAX: usize = 64;
/// A part holds no fewer than this, so that the bound is kept closely.
const SHARD_ENTRIES_MIN: usize = 64;

/// For want of room so many are forgotten at once: they lie in a row, and those that go next are
/// asked for.
const FORGOTTEN_AT_ONCE: usize = 16;
/// But no more than one in so many.
const FORGOTTEN_PART: usize = 64;
/// And so many, under a lock, whose time is over.
const SWEPT_AT_ONCE: usize = 128;

/// On a cache line of its own.
pub(super) type Locked<T> = CachePadded<BriefLock<T>>;

/// Values by key, each until its time is over.
#[derive(Debug)]
pub(crate) struct Remembered<K, V> {
    shards: Box<[Locked<Shard<K, V>>]>,
    /// Of each part. Apart from the locks, whose lines are mostly with some other processor: these
    /// are written when an index grows, and read by all.
    hints: Box<[Hint]>,
    /// The slower one: what the parts hold must not depend on a pattern in the keys.
    hasher: RandomState,
    /// With the bound of a part.
    remembering: Remembering,
}

/// Where a key is, if it is anywhere.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place<K> {
    key: K,
    hash: u64,
    shard: usize,
}

/// The values whose keys hash like one key, to be looked at and added to by one thread at a time.
#[derive(Debug)]
pub(crate) struct Slot<'a, K, V> {
    remembered: &'a Remembered<K, V>,
    shard: BriefGuard<'a, Shard<K, V>>,
    place: Place<K>,
}

impl<K: Copy + Eq + Hash, V: Copy> Remembered<K, V> {
    pub(crate) fn new(remembering: Remembering) -> Self {
        let shards = (remembering.max / SHARD_ENTRIES_MIN).clamp(1, SHARDS_MAX);
        // Keys are not spread evenly. With six standard deviations more no part is full, and
        // forgets, before all of them together hold the bound.
        let share = remembering.max.div_ceil(shards);
        let more = if shards > 1 { 6 * share.isqrt() } else { 0 };
        let max = share.saturating_add(more).min(VALUES_MAX);
        Self {
            shards: (0..shards).map(|_| CachePadded::new(BriefLock::new(Shard::new()))).collect(),
            hints: (0..shards).map(|_| Hint::default()).collect(),
            hasher: RandomState::default(),
            remembering: Remembering { max, ..remembering },
        }
    }

    #[inline(always)]
    fn place(&self, key: K) -> Place<K> {
        let hash = self.hasher.hash_one(key);
        // The upper half says which of the parts; the index of the part uses the lower one.
        let shard = ((hash >> 32) * self.shards.len() as u64) >> 32;
        Place { key, hash, shard: shard as usize }
    }

    /// Says that a key is about to be locked and looked for, so that what it is found by is there
    /// then.
    #[inline(always)]
    pub(crate) fn prefetch(&self, key: K) -> Place<K> {
        let place = self.place(key);
        self.hints[place.shard].prefetch(place.hash);
        place
    }

    /// Locks where a key is.
    pub(crate) fn lock(&self, key: K) -> Slot<'_, K, V> {
        self.lock_at(self.place(key))
    }

    /// The same, given where that is.
    #[inline(always)]
    pub(crate) fn lock_at(&self, place: Place<K>) -> Slot<'_, K, V> {
        Slot { remembered: self, shard: self.shards[place.shard].lock(), place }
    }

    /// Whether somebody has locked where a key is.
    #[cfg(all(test, not(loom)))]
    pub(crate) fn is_locked(&self, key: K) -> bool {
        self.shards[self.place(key).shard].is_locked()
    }

    /// The value of a key, if it is not forgotten.
    pub(crate) fn get(&self, key: K, now: Timestamp) -> Option<V> {
        self.lock(key).get(now).map(|(_, value)| value)
    }

    pub(crate) fn insert(&self, key: K, value: V, at: Timestamp, now: Timestamp) {
        self.lock(key).insert(value, at, now);
    }

    /// How many values were forgotten before their time, for want of room.
    pub(crate) fn forgotten_early(&self) -> u64 {
        self.shards.iter().map(|shard| shard.lock().forgotten_early()).sum()
    }

    /// Forgets what is over. Nothing else does: what is forgotten by a clock that is wrong does not
    /// come back when it is set right, and callers have no time to doubt it.
    pub(crate) fn sweep(&self, now: Timestamp) {
        let is_over = |at| self.remembering.is_over(at, now);
        for shard in &self.shards {
            // A few at a time, since callers wait for the part's lock: they must find it free in
            // between.
            while shard.lock().forget(SWEPT_AT_ONCE, is_over) == SWEPT_AT_ONCE {
                crate::sync::yield_now();
            }
        }
    }

    /// How many values are remembered.
    pub(crate) fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().len()).sum()
    }
}

impl<K: Copy + Eq + Hash, V: Copy> Slot<'_, K, V> {
    /// The value, and when it came to be, if it is not forgotten.
    pub(crate) fn get(&self, now: Timestamp) -> Option<(Timestamp, V)> {
        let (at, value) = self.shard.get(self.place.hash, &self.place.key)?;
        (!self.remembered.remembering.is_over(at, now)).then_some((at, value))
    }

    /// Whether there is a value, maybe one whose time is over.
    #[inline]
    pub(crate) fn is_known(&self) -> bool {
        self.shard.is_known(self.place.hash, &self.place.key)
    }

    /// Adds a value that came to be at `at`, in place of an earlier one. Forgets the oldest for
    /// want of room, which is counted where its time is not over.
    pub(crate) fn insert(mut self, value: V, at: Timestamp, now: Timestamp) {
        self.shard.supersede(self.place.hash, &self.place.key);
        self.insert_new(value, at, now);
    }

    /// The same, where there is no earlier one.
    #[inline]
    pub(crate) fn insert_new(mut self, value: V, at: Timestamp, now: Timestamp) {
        let Self { remembered, shard, place } = &mut self;
        let Remembering { max, .. } = remembered.remembering;
        if shard.values() >= max {
            let count = FORGOTTEN_AT_ONCE.min(max / FORGOTTEN_PART).max(1);
            shard.forget_for_room(count, |at| remembered.remembering.is_over(at, now));
        }
        let hash_of = |key: &K| remembered.hasher.hash_one(key);
        shard.make_place(max, &remembered.hints[place.shard], hash_of);
        shard.push((place.hash, place.key), (at, value), max);
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

    /// Callers once forgot what was over by a clock that was wrong for a moment.
    #[test]
    fn only_a_sweep_forgets_what_is_over_and_all_of_it() {
        let max = 10 * SWEPT_AT_ONCE;
        let remembering = Remembering { window: Duration::from_secs(10), max };
        let remembered = Remembered::new(remembering);
        let (count, late) = (max as u64, 3_600_000);
        (0..count).for_each(|key| remembered.insert(key, (), at(key), at(key)));
        remembered.insert(count, (), at(late), at(late));
        let kept = (0..count).filter(|&key| remembered.get(key, at(count)).is_some()).count();
        assert!(kept > max - 2 * FORGOTTEN_AT_ONCE, "{kept}");
        // So many that what came from the future is gone, in whichever part it was.
        (count..9 * count).for_each(|key| remembered.insert(key, (), at(count), at(late)));
        assert_eq!(remembered.forgotten_early(), 0);
        remembered.sweep(at(late));
        assert_eq!(remembered.len(), 0);
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

    /// Where there are several parts one was once full, and forgot, while others had room: a
    /// request within the bound counted twice.
    #[test]
    fn within_the_bound_nothing_is_forgotten_before_its_time() {
        for max in [1, 127, 128, 300, 5_000, 20_000] {
            let remembering = Remembering { window: Duration::from_secs(10), max };
            let remembered = Remembered::new(remembering);
            for key in 0..3 * max {
                remembered.insert(key, (), at(1), at(1));
            }
            for key in 2 * max..3 * max {
                assert_eq!(remembered.get(key, at(1)), Some(()), "{key} of {max}");
            }
        }
    }

    /// A key whose hash is every other's.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    struct Alike(u64);

    impl Hash for Alike {
        fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
            state.write_u64(7);
        }
    }

    #[test]
    fn keys_of_one_hash_are_told_apart() {
        let remembering = Remembering { window: Duration::from_secs(10), max: 3 };
        let remembered = Remembered::new(remembering);
        for key in (0..5).chain([3]) {
            remembered.insert(Alike(key), key, at(key), at(key));
        }
        let found = [0, 1, 2, 3, 4, 5].map(|key| remembered.get(Alike(key), at(5)));
        assert_eq!(found, [None, None, None, Some(3), Some(4), None]);
        assert_eq!(remembered.len(), 2);
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
