//! All counters, by (user, quota): a `DashMap` of cells.
//!
//! Callers hold a shard's read lock while they count, its write lock only to insert, to hand out a
//! handle, or to forget cells whose window has passed. The flushers never come here.

use std::hash::{BuildHasher, Hash, Hasher};
use std::sync::Arc;

use dashmap::{DashMap, SharedValue};
use foldhash::fast::RandomState;

use crate::admission::cell::{Cell, CellState};
use crate::model::{QuotaId, WindowStart};

/// Names a counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Key {
    pub(crate) user: u64,
    pub(crate) quota: QuotaId,
}

impl Hash for Key {
    #[inline]
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.user);
        state.write_u16(self.quota.as_u16());
    }
}

/// The counters in memory.
#[derive(Debug)]
pub(crate) struct Table {
    map: DashMap<Key, Cell, RandomState>,
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
    pub(crate) fn find<R>(&self, key: Key, operate: impl FnOnce(&Cell) -> R) -> Option<R> {
        let hash = self.hash(key);
        let shard = self.map.shards()[self.shard_of(hash)].read();
        let (_, cell) = shard.get(hash, |(other, _)| *other == key)?;
        Some(operate(cell.get().live()))
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
    ) -> Arc<Cell> {
        self.with_entry(key, create, forget, Cell::share)
    }

    /// Puts a counter in as recovery found it. Of several windows the newest stays.
    pub(crate) fn load(&self, key: Key, window: WindowStart, used: u64) {
        let state = CellState::new(window, used);
        self.with_entry(key, || state, |_, _| false, |cell| cell.load_newer(state));
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
        if limit.is_none() {
            self.find(key, |cell| cell.set_limit(None));
        } else {
            self.with_entry(key, create, forget, |cell| cell.live().set_limit(limit));
        }
    }

    fn with_entry<R>(
        &self,
        key: Key,
        create: impl FnOnce() -> CellState,
        forget: impl Fn(Key, CellState) -> bool,
        operate: impl FnOnce(&mut Cell) -> R,
    ) -> R {
        let hash = self.hash(key);
        let mut shard = self.map.shards()[self.shard_of(hash)].write();
        if let Some((_, cell)) = shard.get_mut(hash, |(other, _)| *other == key) {
            return operate(cell.get_mut());
        }
        let rehash = |(key, _): &(Key, SharedValue<Cell>)| self.hash(*key);
        if shard.len() == shard.capacity() {
            let kept: Vec<_> = shard
                .drain()
                .filter(|(key, cell)| {
                    let cell = cell.get();
                    !(cell.is_forgettable() && forget(*key, cell.live().load()))
                })
                .collect();
            // Grow before it is full again, so that the sweep's cost is spread over as many
            // insertions as it read.
            shard.reserve(kept.len() + kept.len() / 2 + 1, rehash);
            for entry in kept {
                shard.insert(self.hash(entry.0), entry, rehash);
            }
        }
        // `create` comes after the sweep: what the sweep forgot raises the floor for what is
        // created.
        let cell = SharedValue::new(Cell::new(create()));
        let (_, cell) = shard.insert_entry(hash, (key, cell), rehash);
        operate(cell.get_mut())
    }

    #[inline(always)]
    fn shard_of(&self, hash: u64) -> usize {
        #[expect(clippy::cast_possible_truncation, reason = "64-bit platforms only")]
        self.map.determine_shard(hash as usize)
    }

    /// Visits every counter, under its shard's read lock.
    pub(crate) fn for_each(&self, mut visit: impl FnMut(Key, &Cell)) {
        for entry in &self.map {
            visit(*entry.key(), entry.value().live());
        }
    }

    /// How many counters are in memory. Takes every shard's read lock in turn.
    pub(crate) fn len(&self) -> usize {
        self.map.len()
    }
}
