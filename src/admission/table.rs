//! All counters, by (user, quota): a `DashMap` of cells.
//!
//! Callers read a shard while they count, and take its write lock only to insert, to hand out a
//! handle, or to forget cells whose window has passed. A shard that is seldom written to is read
//! without its lock, see [`bias`](super::bias). The flushers never come here.

mod loading;
mod several;

pub(crate) use several::Operation;

use std::hash::{BuildHasher, Hash, Hasher};

use dashmap::{DashMap, SharedValue};
use foldhash::fast::RandomState;
use smallvec::SmallVec;

use crate::admission::bias::Bias;
use crate::admission::cell::{CellState, Live};
use crate::admission::entry::Entry;
use crate::admission::shared::{Handle, SharedCells};
use crate::ledger::PARTS_COMMON;
use crate::model::QuotaId;
use crate::prefetch;

/// Names a counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Key {
    pub(crate) user: u64,
    pub(crate) quota: QuotaId,
}

impl Hash for Key {
    #[inline(always)]
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.user);
        state.write_u16(self.quota.as_u16());
    }
}

/// Where a counter is, if it is anywhere.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    key: Key,
    hash: u64,
    /// Of its shard of the map.
    index: usize,
}

impl Place {
    #[inline(always)]
    pub(crate) fn key(self) -> Key {
        self.key
    }

    /// Of the key, by the table's [hasher](Table::hasher).
    #[inline(always)]
    pub(crate) fn hash(self) -> u64 {
        self.hash
    }
}

/// The counters in memory.
#[derive(Debug)]
pub(crate) struct Table {
    map: DashMap<Entry, (), RandomState>,
    /// By which the map's shards are reached, and no other way unless the table is exclusive.
    bias: Bias,
    /// Counters that live outside the map.
    shared: SharedCells,
}

impl Table {
    /// `shards` is a power of two above 1. The hasher's seed is random: users are chosen by the
    /// outside world.
    pub(crate) fn new(shards: usize, counters_expected: usize) -> Self {
        Self {
            map: DashMap::with_capacity_and_hasher_and_shard_amount(
                counters_expected,
                RandomState::default(),
                shards,
            ),
            bias: Bias::new(shards),
            shared: SharedCells::new(),
        }
    }

    /// By which keys are hashed.
    pub(crate) fn hasher(&self) -> &RandomState {
        self.map.hasher()
    }

    #[inline(always)]
    fn hash(&self, key: Key) -> u64 {
        self.map.hasher().hash_one(key)
    }

    /// Where a counter is.
    #[inline(always)]
    pub(crate) fn place(&self, key: Key) -> Place {
        let hash = self.hash(key);
        Place { key, hash, index: self.shard_of(hash) }
    }

    /// Calls `operate` with the counter, if it is there, in its shard, entered by [`Bias::read`].
    #[inline(always)]
    pub(crate) fn find<R>(&self, key: Key, operate: impl FnOnce(Live<'_>) -> R) -> Option<R> {
        let Place { hash, index, .. } = self.place(key);
        self.bias.read(index, &self.map.shards()[index], |shard| {
            let end = shard.data_end().as_ptr();
            prefetch_place(end, shard.buckets(), hash, prefetch::for_write);
            let (entry, _) = shard.get(hash, |(entry, _)| entry.key() == key)?;
            Some(operate(entry.live(&self.shared)))
        })
    }

    /// Says that a counter is about to be asked for, so that its lines are there then; unless its
    /// shard is closed. Where it is.
    #[inline(always)]
    pub(crate) fn prefetch(&self, key: Key) -> Place {
        let place @ Place { hash, index, .. } = self.place(key);
        if let Some(shard) = self.bias.read_if_open(index, &self.map.shards()[index]) {
            prefetch_all(shard.data_end().as_ptr(), shard.buckets(), hash);
        }
        place
    }

    /// To be called from time to time: shards that nobody puts counters into are then read past
    /// their locks, however seldom they are read.
    pub(crate) fn open_quiet_shards(&self) {
        self.bias.open_quiet(self.map.shards().iter().map(|shard| &**shard));
    }

    /// Calls `operate` with several counters, in the order of their keys here, where they are
    /// there. All their shards are entered before any counter is looked for, so that no look-up
    /// waits for the one before it.
    pub(crate) fn find_each<R>(
        &self,
        keys: &[Key],
        operate: impl FnOnce(&[Option<Live<'_>>]) -> R,
    ) -> R {
        if let &[key] = keys {
            let Place { hash, index, .. } = self.place(key);
            return self.bias.read(index, &self.map.shards()[index], |shard| {
                let found = shard.get(hash, |(entry, _)| entry.key() == key);
                operate(&[found.map(|(entry, _)| entry.live(&self.shared))])
            });
        }
        let places: SmallVec<[Place; PARTS_COMMON]> =
            keys.iter().map(|&key| self.place(key)).collect();
        let mut numbers: SmallVec<[usize; PARTS_COMMON]> = SmallVec::new();
        for &Place { index, .. } in &places {
            // Ascending, each once.
            if let Err(place) = numbers.binary_search(&index) {
                numbers.insert(place, index);
            }
        }
        let shard = |number: usize| &*self.map.shards()[number];
        self.bias.read_each(&numbers, shard, |shards| {
            let mut found: SmallVec<[_; PARTS_COMMON]> = SmallVec::new();
            for &Place { key, hash, index } in &places {
                let place = numbers.iter().position(|&entered| entered == index);
                let shard = place.and_then(|place| shards.get(place));
                let entry =
                    shard.and_then(|shard| shard.get(hash, |(entry, _)| entry.key() == key));
                found.push(entry.map(|(entry, _)| entry.live(&self.shared)));
            }
            operate(&found)
        })
    }

    /// Creates the counter unless it is there. `create` gives its first state, `forget` says of
    /// other counters whether they can be dropped to make room.
    #[cold]
    pub(crate) fn insert(
        &self,
        key: Key,
        create: impl FnOnce() -> CellState,
        forget: impl Fn(Key, CellState) -> bool,
    ) {
        self.with_entry(key, create, forget, |_| ());
    }

    /// The counter as a handle, created where it is not there. From then on the map points to it.
    /// `None` when too many are shared.
    pub(crate) fn share(
        &self,
        key: Key,
        create: impl FnOnce() -> CellState,
        forget: impl Fn(Key, CellState) -> bool,
    ) -> Option<Handle<'_>> {
        self.with_entry(key, create, forget, |entry| {
            entry.share(&self.shared).and_then(|number| self.shared.handle(number))
        })
    }

    /// Counters that live outside the map.
    #[inline(always)]
    pub(crate) fn shared(&self) -> &SharedCells {
        &self.shared
    }

    /// Sets a counter's own limit as recovery found it, creating the counter where it is not there.
    /// Whether it did: not when too many are shared.
    pub(crate) fn load_limit(
        &self,
        key: Key,
        limit: u64,
        create: impl FnOnce() -> CellState,
    ) -> bool {
        let handle = self.share(key, create, |_, _| false);
        handle.map(|handle| handle.cell().set_limit(Some(limit))).is_some()
    }

    fn with_entry<R>(
        &self,
        key: Key,
        create: impl FnOnce() -> CellState,
        forget: impl Fn(Key, CellState) -> bool,
        operate: impl FnOnce(&mut Entry) -> R,
    ) -> R {
        let Place { hash, index, .. } = self.place(key);
        let mut shard = self.bias.write(index, &self.map.shards()[index]);
        if let Some((entry, _)) = shard.get_mut(hash, |(entry, _)| entry.key() == key) {
            return operate(entry);
        }
        let rehash = |(entry, _): &(Entry, SharedValue<()>)| self.hash(entry.key());
        if shard.len() == shard.capacity() {
            let kept: Vec<_> =
                shard.drain().filter(|(entry, _)| !entry.forget(&self.shared, &forget)).collect();
            // Grow before it is full again, so that the sweep's cost is spread over as many
            // insertions as it read.
            shard.reserve(kept.len() + kept.len() / 2 + 1, rehash);
            for entry in kept {
                shard.insert(self.hash(entry.0.key()), entry, rehash);
            }
        }
        // `create` comes after the sweep: what the sweep forgot raises the floor for what is
        // created.
        let entry = (Entry::new(key.user, create()), SharedValue::new(()));
        let (entry, _) = shard.insert_entry(hash, entry, rehash);
        operate(entry)
    }

    #[inline(always)]
    fn shard_of(&self, hash: u64) -> usize {
        #[expect(clippy::cast_possible_truncation, reason = "64-bit platforms only")]
        self.map.determine_shard(hash as usize)
    }

    /// Visits every counter, under its shard's read lock.
    pub(crate) fn for_each(&self, mut visit: impl FnMut(Key, Live<'_>)) {
        for entry in &self.map {
            let entry = entry.key();
            visit(entry.key(), entry.live(&self.shared));
        }
    }

    /// For how many counters there is room before a shard is swept or grows.
    #[cfg(all(test, not(loom)))]
    pub(crate) fn capacity(&self) -> usize {
        self.map.capacity()
    }

    /// How many counters are in memory. Takes every shard's read lock in turn.
    pub(crate) fn len(&self) -> usize {
        self.map.len()
    }
}

/// Asks for the lines where a counter probably lies, given where the buckets of its shard end: near
/// the place that its hash names. They lie in descending order, two to a line.
#[inline(always)]
fn prefetch_place<T>(end: *const T, buckets: usize, hash: u64, fetch: impl Fn(*const T)) {
    let bucket = bucket_of(hash, buckets);
    fetch(end.wrapping_sub(bucket + 1));
    fetch(end.wrapping_sub(bucket + 3));
}

/// Asks for all that a look-up will read, see [`prefetch_place`].
#[inline(always)]
fn prefetch_all<T>(end: *const T, buckets: usize, hash: u64) {
    prefetch_place(end, buckets, hash, prefetch::for_write);
    // Where the buckets end, their tags begin, a byte each: the look-up begins there.
    prefetch::for_read(end.cast::<u8>().wrapping_add(bucket_of(hash, buckets)));
}

/// Which bucket of its shard a hash names.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "64-bit platforms only")]
fn bucket_of(hash: u64, buckets: usize) -> usize {
    hash as usize & (buckets - 1)
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;
    use crate::model::WindowStart;

    const QUOTA: QuotaId = QuotaId(3);

    fn key(user: u64) -> Key {
        Key { user, quota: QUOTA }
    }

    fn state(used: u64) -> CellState {
        CellState::new(QUOTA, WindowStart(0), used)
    }

    /// Forgets all it may.
    fn insert(table: &Table, user: u64) {
        table.insert(key(user), || state(user), |_, _| true);
    }

    fn used(table: &Table, user: u64) -> Option<u64> {
        table.find(key(user), |live| live.cell.load().used())
    }

    #[test]
    fn what_has_a_handle_or_a_limit_is_not_forgotten() {
        let table = Table::new(2, 0);
        for user in 1..=4 {
            insert(&table, user);
        }
        let share = |user| table.share(key(user), || state(user), |_, _| false);
        let (handle, dropped) = (share(1).expect("there is room"), share(2));
        drop(dropped);
        assert!(table.load_limit(key(3), 9, || state(3)));
        // Until each shard was swept.
        for user in 100..200 {
            insert(&table, user);
        }
        let kept: Vec<_> = (1..=4).filter(|&user| used(&table, user).is_some()).collect();
        assert_eq!(kept, [1, 3]);
        assert_eq!(handle.cell().live().cell.load(), state(1));
        let live = handle.cell().live();
        assert!(live.cell.add(WindowStart(0), 5, 100).is_ok());
        assert_eq!(used(&table, 1), Some(6));
        let limit = table.find(key(3), |live| live.limit(100));
        assert_eq!(limit, Some(9));
        // What was forgotten lies where others are now.
        let next = share(500).expect("there is room");
        assert_eq!((next.cell().user(), used(&table, 500)), (500, Some(500)));
    }

    #[test]
    fn counters_are_found_one_by_one_and_together_also_in_open_shards() {
        let table = Table::new(4, 0);
        for user in 0..50 {
            insert_for_good(&table, user);
        }
        let keys: Vec<_> = (0..60).map(key).collect();
        // The first round under the locks, the last in shards that are open.
        for _ in 0..1000 {
            for chunk in keys.chunks(7) {
                let found = table.find_each(chunk, |found| {
                    let used = |live: &Option<Live<'_>>| live.map(|live| live.cell.load().used());
                    found.iter().map(used).collect::<Vec<_>>()
                });
                let one_by_one: Vec<_> = chunk.iter().map(|key| used(&table, key.user)).collect();
                assert_eq!(found, one_by_one);
                let expected = chunk.iter().map(|key| (key.user < 50).then_some(key.user));
                assert!(found.into_iter().eq(expected));
            }
        }
    }

    fn insert_for_good(table: &Table, user: u64) {
        table.insert(key(user), || state(user), |_, _| false);
    }
}
