//! The values whose keys hash alike, under one lock.

use std::collections::VecDeque;

use super::index::{Hint, Index, Span};
use crate::model::Timestamp;
use crate::prefetch;

/// A part of what is remembered.
///
/// The values lie in the order in which they came, and the index only says where: what is
/// remembered for minutes is far more than a processor's cache holds, and so most of it is written
/// and given up in a row, while the part that is read at random stays small.
#[derive(Debug)]
pub(super) struct Shard<K, V> {
    /// The oldest first. Of a key that was added again the older one is still there.
    values: VecDeque<Value<K, V>>,
    /// Where the values are, those too that were added again.
    index: Index,
    /// The number of the oldest: counted, around, from the first that there ever was.
    oldest: u32,
    /// How many values are not the newest of their keys.
    superseded: usize,
    forgotten_early: u64,
}

#[derive(Debug)]
struct Value<K, V> {
    /// When it came to be; with [`SUPERSEDED`] where there is a newer one of the key.
    stamp: u64,
    key: K,
    value: V,
}

/// A bit that the milliseconds of a time leave free.
const SUPERSEDED: u64 = 1 << 63;
const _: () = assert!(Timestamp::MAX.as_unix_millis() < SUPERSEDED);
/// Of an answer.
const _: () = assert!(size_of::<Value<u128, [u64; 5]>>() == 64);

impl<K, V> Value<K, V> {
    fn at(&self) -> Timestamp {
        Timestamp::of_millis(self.stamp & !SUPERSEDED)
    }

    fn is_superseded(&self) -> bool {
        self.stamp & SUPERSEDED != 0
    }
}

impl<K: Copy + Eq, V: Copy> Shard<K, V> {
    pub(super) fn new() -> Self {
        Self {
            values: VecDeque::new(),
            index: Index::new(1, 0),
            oldest: 0,
            superseded: 0,
            forgotten_early: 0,
        }
    }

    /// How many keys have a value.
    pub(super) fn len(&self) -> usize {
        self.values.len() - self.superseded
    }

    /// How many values there are, those too that were added again.
    #[inline]
    pub(super) fn values(&self) -> usize {
        self.values.len()
    }

    /// How many values were forgotten before their time.
    pub(super) fn forgotten_early(&self) -> u64 {
        self.forgotten_early
    }

    #[inline(always)]
    fn span(&self) -> Span {
        Span { oldest: self.oldest, len: self.values.len() }
    }

    /// Where the newest value of a key is.
    #[inline]
    fn find(&self, hash: u64, key: &K) -> Option<usize> {
        let is_it = |value: &Value<K, V>| value.key == *key && !value.is_superseded();
        self.index.find(hash, self.span(), |place| self.values.get(place).is_some_and(is_it))
    }

    #[inline]
    pub(super) fn is_known(&self, hash: u64, key: &K) -> bool {
        self.find(hash, key).is_some()
    }

    pub(super) fn get(&self, hash: u64, key: &K) -> Option<(Timestamp, V)> {
        let value = self.values.get(self.find(hash, key)?)?;
        Some((value.at(), value.value))
    }

    /// Prepares for another value of a key.
    pub(super) fn supersede(&mut self, hash: u64, key: &K) {
        let known = self.find(hash, key);
        if let Some(value) = known.and_then(|place| self.values.get_mut(place)) {
            value.stamp |= SUPERSEDED;
            self.superseded += 1;
        }
    }

    /// Adds a value of a key that has none, or had it superseded. No more than `max` will be there.
    #[inline]
    pub(super) fn push(&mut self, (hash, key): (u64, K), (at, value): (Timestamp, V), max: usize) {
        let span = self.span();
        self.index.push(hash, span);
        let values = &mut self.values;
        if values.len() == values.capacity() {
            // Doubled, but not beyond the bound.
            let more = max.saturating_sub(values.len()).min(values.len());
            values.reserve_exact(more.max(1));
        }
        values.push_back(Value { stamp: at.as_unix_millis(), key, value });
        // The next one's place, which nobody needs before: there are many shards.
        if let Some(last) = values.back() {
            let next = std::ptr::from_ref(last).wrapping_add(1);
            prefetch::for_write(next);
            prefetch::for_write(next.cast::<u8>().wrapping_add(size_of::<Value<K, V>>() - 1));
        }
    }

    /// Makes the index larger where it has no room for one more value.
    #[inline]
    pub(super) fn make_place(&mut self, max: usize, hint: &Hint, hash_of: impl Fn(&K) -> u64) {
        let capacity = self.index.capacity();
        if self.values.len() == capacity {
            self.rebuild_index((2 * capacity).min(max), hash_of);
            hint.set(&self.index);
        }
    }

    #[cold]
    fn rebuild_index(&mut self, capacity: usize, hash_of: impl Fn(&K) -> u64) {
        let oldest = self.oldest;
        self.index = Index::new(capacity, oldest);
        for (len, value) in self.values.iter().enumerate() {
            self.index.push(hash_of(&value.key), Span { oldest, len });
        }
    }

    /// Forgets up to `count` of what is over, as `is_over` says of a time. How many.
    pub(super) fn forget(&mut self, count: usize, is_over: impl Fn(Timestamp) -> bool) -> usize {
        let mut forgotten = 0;
        while forgotten < count && self.values.front().is_some_and(|value| is_over(value.at())) {
            self.forget_oldest();
            forgotten += 1;
        }
        forgotten
    }

    /// Forgets the `count` oldest for want of room.
    #[inline]
    pub(super) fn forget_for_room(&mut self, count: usize, is_over: impl Fn(Timestamp) -> bool) {
        for _ in 0..count {
            let is_early = self.values.front().is_some_and(|value| !is_over(value.at()));
            self.forgotten_early += u64::from(self.forget_oldest() && is_early);
        }
        // Those that go next, when as many more have come.
        for value in self.values.iter().take(count) {
            prefetch::for_write(value);
        }
    }

    /// Whether its key is forgotten with it.
    #[inline]
    fn forget_oldest(&mut self) -> bool {
        let Some(value) = self.values.pop_front() else { return false };
        self.oldest = self.oldest.wrapping_add(1);
        self.superseded -= usize::from(value.is_superseded());
        !value.is_superseded()
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// Of keys of which many share a line, and of those many a tag.
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "as the shard asks for it")]
    fn hash_of(key: &u32) -> u64 {
        [0, 0, 1, 3][*key as usize % 4] << 30 | u64::from(key / 4 % 2)
    }

    /// A shard, and what it should be: values are numbered in the order in which they come.
    struct Pair {
        shard: Shard<u32, u32>,
        newest: BTreeMap<u32, u32>,
        /// In their order.
        keys: VecDeque<(u32, u32)>,
        count: u32,
        forgotten_early: u64,
    }

    impl Pair {
        fn insert(&mut self, key: u32, max: usize) {
            let at = Timestamp::from_unix_millis(u64::from(self.count));
            if self.shard.values() >= max {
                self.forget(1 + max / 8);
            }
            let hash = hash_of(&key);
            assert_eq!(self.shard.is_known(hash, &key), self.newest.contains_key(&key));
            self.shard.supersede(hash, &key);
            self.shard.make_place(max, &Hint::default(), hash_of);
            self.shard.push((hash, key), (at, self.count), max);
            self.newest.insert(key, self.count);
            self.keys.push_back((key, self.count));
            self.count += 1;
        }

        /// Those with even numbers are over.
        fn forget(&mut self, count: usize) {
            self.shard.forget_for_room(count, |at| at.as_unix_millis().is_multiple_of(2));
            for (key, number) in self.keys.drain(..count.min(self.keys.len())) {
                if self.newest.get(&key) == Some(&number) {
                    self.newest.remove(&key);
                    self.forgotten_early += u64::from(number % 2);
                }
            }
        }

        fn assert_alike(&self, key: u32) {
            let found = self.shard.get(hash_of(&key), &key);
            let at = |&number: &u32| (Timestamp::from_unix_millis(number.into()), number);
            assert_eq!(found, self.newest.get(&key).map(at));
            assert_eq!(self.shard.len(), self.newest.len());
            assert_eq!(self.shard.forgotten_early(), self.forgotten_early);
        }
    }

    proptest! {
        /// With growing, forgetting, values of keys that are there, lines that are full, numbers
        /// that come again.
        #[test]
        fn it_remembers_what_a_map_does(
            max in prop::sample::select(vec![3, 20, 70, 300]),
            oldest in prop_oneof![Just(0), u32::MAX - 500..=u32::MAX, any::<u32>()],
            steps in prop::collection::vec((0..4_u8, 0..40_u32, 0..30_u32), 0..300),
        ) {
            let shard = Shard { oldest, index: Index::new(1, oldest), ..Shard::new() };
            let (newest, keys) = (BTreeMap::new(), VecDeque::new());
            let mut pair = Pair { shard, newest, keys, count: 0, forgotten_early: 0 };
            for (step, key, count) in steps {
                match step {
                    0 => pair.forget(count as usize),
                    1 => {
                        let first = 100 + pair.count;
                        (0..count).for_each(|key| pair.insert(first + key, max));
                    }
                    _ => pair.insert(key, max),
                }
                pair.assert_alike(key);
            }
            (0..100 + pair.count).for_each(|key| pair.assert_alike(key));
        }
    }
}
