//! What is remembered for a while: a bounded map that forgets the oldest first.

mod index;

use std::collections::VecDeque;
use std::hash::{BuildHasher, Hash};
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam::utils::CachePadded;
use foldhash::quality::RandomState;

use self::index::Index;
use crate::ledger::Remembering;
use crate::model::Timestamp;
use crate::prefetch;
use crate::sync::{BriefGuard, BriefLock};

/// At most this many parts, each with its own lock.
const SHARDS_MAX: usize = 64;
/// A part holds no fewer than this, so that the bound is kept closely.
const SHARD_ENTRIES_MIN: usize = 64;
/// Of a key's hash the index of its part uses the upper and the lower bits; the part itself is told
/// by those from here on.
const SHARD_BITS_FROM: u32 = 32;

/// For want of room so many are forgotten at once: what they are found by was asked for before,
/// with one for each that came.
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
    /// The slower one: what the parts hold must not depend on a pattern in the keys.
    hasher: RandomState,
    forgotten_early: AtomicU64,
}

/// The values whose keys hash alike.
///
/// They lie in the order in which they came, and the index only says where: what is remembered for
/// minutes is far more than a processor's cache holds, and so most of it is written and given up in
/// a row, while the part that is read at random stays small.
#[derive(Debug)]
struct Shard<K, V> {
    /// The oldest first. Of a key that was added again the older one is still there.
    values: VecDeque<Value<K, V>>,
    /// Where the newest value of each key is: counted, around, from the first that there ever was.
    index: Index,
    /// The number of the oldest.
    oldest: u32,
    remembering: Remembering,
}

#[derive(Debug)]
struct Value<K, V> {
    at: Timestamp,
    key: K,
    value: V,
}

/// The values whose keys hash like one key, to be looked at and added to by one thread at a time.
#[derive(Debug)]
pub(crate) struct Slot<'a, K, V> {
    remembered: &'a Remembered<K, V>,
    shard: BriefGuard<'a, Shard<K, V>>,
    key: K,
    hash: u64,
}

impl<K: Copy + Eq + Hash, V: Copy> Remembered<K, V> {
    pub(crate) fn new(remembering: Remembering) -> Self {
        let shards = (remembering.max / SHARD_ENTRIES_MIN).clamp(1, SHARDS_MAX);
        // Keys are not spread evenly. With six standard deviations more no part is full, and
        // forgets, before all of them together hold the bound.
        let share = remembering.max.div_ceil(shards);
        let more = if shards > 1 { 6 * share.isqrt() } else { 0 };
        // So that the numbers of those that are there differ.
        let max = share.saturating_add(more).min(u32::MAX as usize);
        let shard = || Shard {
            values: VecDeque::new(),
            index: Index::default(),
            oldest: 0,
            remembering: Remembering { max, ..remembering },
        };
        Self {
            shards: (0..shards).map(|_| CachePadded::new(BriefLock::new(shard()))).collect(),
            hasher: RandomState::default(),
            forgotten_early: AtomicU64::new(0),
        }
    }

    /// Where a key is, if it is anywhere.
    pub(crate) fn lock(&self, key: K) -> Slot<'_, K, V> {
        let hash = self.hasher.hash_one(key);
        Slot { remembered: self, shard: self.part(hash).lock(), key, hash }
    }

    /// Whether somebody has locked where a key is.
    #[cfg(all(test, not(loom)))]
    pub(crate) fn is_locked(&self, key: K) -> bool {
        self.part(self.hasher.hash_one(key)).is_locked()
    }

    fn part(&self, hash: u64) -> &BriefLock<Shard<K, V>> {
        &self.shards[(hash >> SHARD_BITS_FROM) as usize % self.shards.len()]
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
        self.forgotten_early.load(Ordering::Relaxed)
    }

    /// Forgets what is over. Nothing else does: what is forgotten by a clock that is wrong does not
    /// come back when it is set right, and callers have no time to doubt it.
    pub(crate) fn sweep(&self, now: Timestamp) {
        for shard in &self.shards {
            // A few at a time: callers wait for the part's lock.
            while shard.lock().forget(now, &self.hasher) == SWEPT_AT_ONCE {}
        }
    }

    /// How many values are remembered.
    pub(crate) fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().index.len()).sum()
    }
}

impl<K: Copy + Eq + Hash, V: Copy> Slot<'_, K, V> {
    /// The value, and when it came to be, if it is not forgotten.
    pub(crate) fn get(&self, now: Timestamp) -> Option<(Timestamp, V)> {
        let shard = &*self.shard;
        let number = shard.index.find(self.hash, |number| shard.is_key(number, &self.key))?;
        let &Value { at, value, .. } = shard.value(number)?;
        (!shard.remembering.is_over(at, now)).then_some((at, value))
    }

    /// Whether there is a value, maybe one whose time is over.
    #[inline]
    pub(crate) fn is_known(&self) -> bool {
        let is_key = |number| self.shard.is_key(number, &self.key);
        self.shard.index.find(self.hash, is_key).is_some()
    }

    /// Says that the key is about to be looked for.
    #[inline]
    pub(crate) fn prefetch(&self) {
        self.shard.index.prefetch(self.hash);
    }

    /// Adds a value that came to be at `at`, in place of an earlier one. Forgets the oldest for
    /// want of room, which is counted where its time is not over.
    pub(crate) fn insert(mut self, value: V, at: Timestamp, now: Timestamp) {
        self.make_room(now);
        let Self { shard, key, hash, .. } = &mut self;
        shard.push(Value { at, key: *key, value }, *hash);
    }

    /// The same, where there is no earlier one.
    #[inline]
    pub(crate) fn insert_new(mut self, value: V, at: Timestamp, now: Timestamp) {
        self.make_room(now);
        let Self { shard, key, hash, .. } = &mut self;
        shard.push_new(Value { at, key: *key, value }, *hash);
    }

    #[inline]
    fn make_room(&mut self, now: Timestamp) {
        let hasher = &self.remembered.hasher;
        let shard = &mut *self.shard;
        let (max, len) = (shard.remembering.max, shard.values.len());
        let count = FORGOTTEN_AT_ONCE.min(max / FORGOTTEN_PART).max(1);
        if len < max {
            // With each that comes, what one of those that go next is found by.
            let next = (len + count).checked_sub(max).and_then(|next| shard.values.get(next));
            if let Some(value) = next {
                shard.index.prefetch(hasher.hash_one(value.key));
            }
            return;
        }
        let mut forgotten = 0;
        for _ in 0..count {
            let is_early = !shard.is_oldest_over(now);
            forgotten += u64::from(shard.forget_oldest(hasher) && is_early);
        }
        // Those that go next, when as many more have come.
        for value in shard.values.iter().take(count) {
            prefetch::for_write(value);
        }
        if forgotten > 0 {
            // Relaxed: for statistics.
            self.remembered.forgotten_early.fetch_add(forgotten, Ordering::Relaxed);
        }
    }
}

impl<K: Copy + Eq + Hash, V> Shard<K, V> {
    fn value(&self, number: u32) -> Option<&Value<K, V>> {
        self.values.get(number.wrapping_sub(self.oldest) as usize)
    }

    fn is_key(&self, number: u32, key: &K) -> bool {
        self.value(number).is_some_and(|value| value.key == *key)
    }

    fn push(&mut self, value: Value<K, V>, hash: u64) {
        let Self { values, index, oldest, .. } = self;
        let at = |number: u32| values.get(number.wrapping_sub(*oldest) as usize);
        let next = Self::number_after(*oldest, values.len());
        index.insert(hash, next, |number| at(number).is_some_and(|known| known.key == value.key));
        self.push_value(value);
    }

    #[inline]
    fn push_new(&mut self, value: Value<K, V>, hash: u64) {
        self.index.insert_new(hash, Self::number_after(self.oldest, self.values.len()));
        self.push_value(value);
    }

    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "no more than that, see `new`")]
    fn number_after(oldest: u32, count: usize) -> u32 {
        oldest.wrapping_add(count as u32)
    }

    #[inline]
    fn push_value(&mut self, value: Value<K, V>) {
        let Self { values, remembering, .. } = self;
        if values.len() == values.capacity() {
            // Doubled, but not beyond the bound.
            let more = remembering.max.saturating_sub(values.len()).min(values.len());
            values.reserve_exact(more.max(1));
        }
        values.push_back(value);
        // The next one's place, which nobody needs before: there are many shards.
        if let Some(last) = values.back() {
            let next = std::ptr::from_ref(last).wrapping_add(1);
            prefetch::for_write(next);
            prefetch::for_write(next.cast::<u8>().wrapping_add(size_of::<Value<K, V>>() - 1));
        }
    }

    /// Forgets some of what is over. How many.
    fn forget(&mut self, now: Timestamp, hasher: &RandomState) -> usize {
        let mut count = 0;
        while count < SWEPT_AT_ONCE && self.is_oldest_over(now) {
            self.forget_oldest(hasher);
            count += 1;
        }
        count
    }

    fn is_oldest_over(&self, now: Timestamp) -> bool {
        self.values.front().is_some_and(|value| self.remembering.is_over(value.at, now))
    }

    /// Whether its key is forgotten with it.
    fn forget_oldest(&mut self, hasher: &RandomState) -> bool {
        let Some(value) = self.values.pop_front() else { return false };
        let number = self.oldest;
        self.oldest = number.wrapping_add(1);
        let hash = hasher.hash_one(value.key);
        self.index.remove(hash, number)
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
