//! All counters, by (user, quota): a `DashMap` of cells.
//!
//! Callers hold a shard's read lock while they count, its write lock only to insert, to hand out a
//! handle, or to forget cells whose window has passed. The flushers never come here.

use std::hash::{BuildHasher, Hash, Hasher};
use std::sync::Arc;

use dashmap::{DashMap, SharedValue};
use foldhash::fast::RandomState;
use smallvec::SmallVec;

use crate::admission::cell::{Cell, CellState, Live, SharedCell};
use crate::ledger::PARTS_COMMON;
use crate::model::{QuotaId, WindowStart};
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

/// A counter with its key, aligned so that it lies on one cache line. The map's key and value in
/// one, for which the map's own pairs leave no way.
#[derive(Debug)]
#[repr(align(32))]
struct Entry {
    user: u64,
    /// Once a handle was taken or a limit set, the counter lives there, and `cell` only tells the
    /// quota. Changed under the map shard's write lock only.
    shared: Option<Arc<SharedCell>>,
    cell: Cell,
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<(Entry, SharedValue<()>)>() == 32);

impl Entry {
    fn new(user: u64, state: CellState) -> Self {
        Self { user, shared: None, cell: Cell::new(state) }
    }

    #[inline(always)]
    fn key(&self) -> Key {
        Key { user: self.user, quota: self.cell.quota() }
    }

    /// The counter, wherever it lives.
    #[inline(always)]
    fn live(&self) -> Live<'_> {
        self.shared.as_ref().map_or(Live::inline(&self.cell), |shared| shared.live())
    }

    /// Moves the counter out, so that handles can share it. The shard's write lock keeps others
    /// out, and orders what they stored before.
    fn share(&mut self) -> &Arc<SharedCell> {
        let Self { user, shared, cell } = self;
        shared.get_or_insert_with(|| Arc::new(SharedCell::new(*user, cell.load())))
    }

    /// Whether nothing but the map holds the counter, it has no limit of its own and nobody is in
    /// the middle of a change: then forgetting it once its window has passed loses nothing. The
    /// caller has the shard's write lock.
    fn is_forgettable(&self) -> bool {
        let live = self.live();
        self.shared.as_ref().is_none_or(|shared| Arc::strong_count(shared) == 1)
            && !live.has_own_limit()
            && !live.cell.is_marked()
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Entry {}

impl Hash for Entry {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key().hash(state);
    }
}

/// A counter as recovery found it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Loaded {
    user: u64,
    hash: u64,
    state: CellState,
}

/// The counters in memory.
#[derive(Debug)]
pub(crate) struct Table {
    map: DashMap<Entry, (), RandomState>,
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
        }
    }

    #[inline(always)]
    fn hash(&self, key: Key) -> u64 {
        self.map.hasher().hash_one(key)
    }

    /// Calls `operate` with the counter, if it is there, under its shard's read lock.
    #[inline(always)]
    pub(crate) fn find<R>(&self, key: Key, operate: impl FnOnce(Live<'_>) -> R) -> Option<R> {
        let hash = self.hash(key);
        let shard = self.map.shards()[self.shard_of(hash)].read();
        let (entry, _) = shard.get(hash, |(entry, _)| entry.key() == key)?;
        Some(operate(entry.live()))
    }

    /// Says that a counter is about to be asked for, so that its line is there then: where it
    /// probably lies, near the place that its hash names.
    #[inline]
    pub(crate) fn prefetch(&self, key: Key) {
        let hash = self.hash(key);
        let shard = self.map.shards()[self.shard_of(hash)].read();
        #[expect(clippy::cast_possible_truncation, reason = "64-bit platforms only")]
        let bucket = hash as usize & (shard.buckets() - 1);
        // They lie in descending order, two to a line.
        let end = shard.data_end().as_ptr();
        prefetch::for_write(end.wrapping_sub(bucket + 1));
        prefetch::for_write(end.wrapping_sub(bucket + 3));
    }

    /// Calls `operate` with several counters, in the order of their keys here, where they are
    /// there, under the read locks of all their shards. These are taken in their order, so that
    /// nobody who waits for one is waited for, whether or not the lock lets a writer go first; and
    /// before any counter is looked for, so that no look-up waits for the one before it.
    pub(crate) fn find_each<R>(
        &self,
        keys: &[Key],
        operate: impl FnOnce(&[Option<Live<'_>>]) -> R,
    ) -> R {
        if let &[key] = keys {
            let hash = self.hash(key);
            let shard = self.map.shards()[self.shard_of(hash)].read();
            let found = shard.get(hash, |(entry, _)| entry.key() == key);
            return operate(&[found.map(|(entry, _)| entry.live())]);
        }
        let mut hashes: SmallVec<[u64; PARTS_COMMON]> = SmallVec::new();
        let mut numbers: SmallVec<[usize; PARTS_COMMON]> = SmallVec::new();
        for &key in keys {
            let hash = self.hash(key);
            hashes.push(hash);
            let number = self.shard_of(hash);
            // Ascending, each once.
            if let Err(place) = numbers.binary_search(&number) {
                numbers.insert(place, number);
            }
        }
        let mut shards: SmallVec<[_; PARTS_COMMON]> = SmallVec::new();
        for &number in &numbers {
            shards.push((number, self.map.shards()[number].read()));
        }
        let mut found: SmallVec<[_; PARTS_COMMON]> = SmallVec::new();
        for (&key, &hash) in keys.iter().zip(&hashes) {
            let number = self.shard_of(hash);
            let shard = shards.iter().find(|(locked, _)| *locked == number);
            let entry =
                shard.and_then(|(_, shard)| shard.get(hash, |(entry, _)| entry.key() == key));
            found.push(entry.map(|(entry, _)| entry.live()));
        }
        operate(&found)
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
    pub(crate) fn share(
        &self,
        key: Key,
        create: impl FnOnce() -> CellState,
        forget: impl Fn(Key, CellState) -> bool,
    ) -> Arc<SharedCell> {
        self.with_entry(key, create, forget, |entry| Arc::clone(entry.share()))
    }

    /// A counter as recovery found it, to be put in with others.
    pub(crate) fn loaded(&self, key: Key, window: WindowStart, used: u64) -> Loaded {
        let state = CellState::new(key.quota, window, used);
        Loaded { user: key.user, hash: self.hash(key), state }
    }

    /// Puts counters in as recovery found them, before any limit, and empties the list. Of several
    /// windows of a counter the newest stays.
    ///
    /// In the order in which they will lie in memory: in any other, each would wait for a line and
    /// a page of its own.
    pub(crate) fn load(&mut self, counters: &mut Vec<Loaded>) {
        let hasher = self.map.hasher().clone();
        let shards = self.map.shards_mut();
        let buckets: Vec<_> = shards.iter_mut().map(|shard| shard.get_mut().buckets()).collect();
        let bits = buckets.len().trailing_zeros();
        radsort::sort_by_key(counters, |loaded| {
            let shard = self.shard_of(loaded.hash);
            // The lower bits of the hash say where in its shard it lies.
            let bucket_bits = buckets.get(shard).map_or(0, |buckets| buckets.trailing_zeros());
            let within = loaded.hash.checked_shl(u64::BITS - bucket_bits).unwrap_or(0);
            let place = (shard as u64) << (u64::BITS - bits) | within >> bits;
            // The upper half tells enough of them apart.
            (place >> u32::BITS) as u32
        });
        for Loaded { user, hash, state } in counters.drain(..) {
            let number = self.shard_of(hash);
            let shard = self.map.shards_mut()[number].get_mut();
            let key = Key { user, quota: state.quota() };
            match shard.get_mut(hash, |(entry, _)| entry.key() == key) {
                Some((entry, _)) => entry.cell.load_newer(state),
                None => {
                    let entry = (Entry::new(user, state), SharedValue::new(()));
                    shard.insert(hash, entry, |(entry, _)| hasher.hash_one(entry.key()));
                }
            }
        }
    }

    /// Sets or clears a counter's own limit, creating the counter for a limit where it is not
    /// there.
    pub(crate) fn set_limit(
        &self,
        key: Key,
        limit: Option<u64>,
        create: impl FnOnce() -> CellState,
        forget: impl Fn(Key, CellState) -> bool,
    ) {
        let has_own_limit = || self.find(key, |live| live.has_own_limit()).unwrap_or_default();
        if limit.is_some() || has_own_limit() {
            self.with_entry(key, create, forget, |entry| entry.share().set_limit(limit));
        }
    }

    fn with_entry<R>(
        &self,
        key: Key,
        create: impl FnOnce() -> CellState,
        forget: impl Fn(Key, CellState) -> bool,
        operate: impl FnOnce(&mut Entry) -> R,
    ) -> R {
        let hash = self.hash(key);
        let mut shard = self.map.shards()[self.shard_of(hash)].write();
        if let Some((entry, _)) = shard.get_mut(hash, |(entry, _)| entry.key() == key) {
            return operate(entry);
        }
        let rehash = |(entry, _): &(Entry, SharedValue<()>)| self.hash(entry.key());
        if shard.len() == shard.capacity() {
            let kept: Vec<_> = shard
                .drain()
                .filter(|(entry, _)| {
                    let state = entry.live().cell.load();
                    !(entry.is_forgettable() && forget(entry.key(), state))
                })
                .collect();
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
            visit(entry.key(), entry.live());
        }
    }

    /// How many counters are in memory. Takes every shard's read lock in turn.
    pub(crate) fn len(&self) -> usize {
        self.map.len()
    }
}
