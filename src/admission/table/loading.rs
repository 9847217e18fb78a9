//! Putting counters in as recovery found them.
//!
//! Whoever finds them reads files; whoever puts them in waits for memory. Where there are many,
//! they are put in by threads of their own, each of which has some of the shards.

use std::fmt;
use std::hash::BuildHasher;
use std::num::NonZero;
use std::thread::{Builder, Scope, available_parallelism};

use crossbeam::channel::{Sender, bounded};
use dashmap::{DashMap, SharedValue};
use foldhash::fast::RandomState;

use super::{Entry, Key, Table};
use crate::admission::cell::CellState;
use crate::model::WindowStart;

/// So many counters are held back, to be put in in the order in which they will lie in memory: 32
/// MiB of them, with those that threads are putting in, and once more to sort them.
const HELD_MAX: usize = 1 << 20;
/// With more threads than this, the counters are not found as fast as they are put in.
const THREADS_MAX: usize = 3;

/// Takes the counters that recovery finds.
#[derive(Debug)]
pub(crate) struct Loading<'scope, 'env> {
    scope: &'scope Scope<'scope, 'env>,
    hasher: &'scope RandomState,
    twin: &'scope Twin,
    parts: Vec<Part<'scope>>,
    shards_in_part: usize,
    held_max: usize,
    may_spawn: bool,
}

/// A map of nothing with as many shards: it says where counters go while the shards of the other
/// are lent out.
type Twin = DashMap<(), (), RandomState>;

/// Some of the shards, and what is to be put into them.
#[derive(Debug)]
struct Part<'scope> {
    held: Vec<Loaded>,
    taker: Taker<'scope>,
}

enum Taker<'scope> {
    /// Whoever finds them.
    Finder(PutIn<'scope>),
    Thread(Sender<Vec<Loaded>>),
}

/// Puts counters into some of the shards, and empties the list.
type PutIn<'scope> = Box<dyn FnMut(&mut Vec<Loaded>) + Send + 'scope>;

/// A counter as recovery found it.
#[derive(Debug, Clone, Copy)]
struct Loaded {
    user: u64,
    hash: u64,
    state: CellState,
}

impl Table {
    /// Puts in what `find` finds, before any limit. Of several windows of a counter the newest
    /// stays.
    ///
    /// Shards grow as they are filled, while they are in the processor's cache, which costs nothing
    /// that can be seen: room for more than there is would keep old counters, which are swept out
    /// of full shards only.
    pub(crate) fn load<R>(&mut self, find: impl FnOnce(&mut Loading<'_, '_>) -> R) -> R {
        let others = available_parallelism().map_or(1, NonZero::get) - 1;
        self.load_with(others.min(THREADS_MAX), HELD_MAX, find)
    }

    /// [`load`](Self::load) with up to so many threads, and so many counters held back.
    fn load_with<R>(
        &mut self,
        threads: usize,
        held_max: usize,
        find: impl FnOnce(&mut Loading<'_, '_>) -> R,
    ) -> R {
        let hasher = self.map.hasher().clone();
        let shards = self.map.shards_mut();
        let twin = Twin::with_hasher_and_shard_amount(hasher.clone(), shards.len());
        let shards_in_part = shards.len().div_ceil(threads.max(1));
        let (hasher, twin) = (&hasher, &twin);
        std::thread::scope(|scope| {
            let mut parts = Vec::new();
            for (index, shards) in shards.chunks_mut(shards_in_part).enumerate() {
                let place = move |hash| shard_of(twin, hash) - index * shards_in_part;
                let put_in = move |counters: &mut Vec<Loaded>| {
                    let buckets = shards.iter_mut().map(|shard| shard.get_mut().buckets());
                    sort(counters, &buckets.collect::<Vec<_>>(), place);
                    for Loaded { user, hash, state } in counters.drain(..) {
                        let shard = shards[place(hash)].get_mut();
                        let key = Key { user, quota: state.quota() };
                        match shard.get_mut(hash, |(entry, _)| entry.key() == key) {
                            Some((entry, _)) => entry.load_newer(state),
                            None => {
                                let entry = (Entry::new(user, state), SharedValue::new(()));
                                shard
                                    .insert(hash, entry, |(entry, _)| hasher.hash_one(entry.key()));
                            }
                        }
                    }
                };
                parts.push(Part { held: Vec::new(), taker: Taker::Finder(Box::new(put_in)) });
            }
            let may_spawn = threads > 0;
            // While a thread puts in what it was sent, as much is held.
            let lists = parts.len() * if may_spawn { 2 } else { 1 };
            let held_max = (held_max / lists).max(1);
            let mut loading =
                Loading { scope, hasher, twin, parts, shards_in_part, held_max, may_spawn };
            let found = find(&mut loading);
            loading.finish();
            found
        })
    }
}

impl Loading<'_, '_> {
    /// A counter is there, in this state.
    pub(crate) fn put(&mut self, key: Key, window: WindowStart, used: u64) {
        let hash = self.hasher.hash_one(key);
        let state = CellState::new(key.quota, window, used);
        let part = &mut self.parts[shard_of(self.twin, hash) / self.shards_in_part];
        part.held.push(Loaded { user: key.user, hash, state });
        if part.held.len() >= self.held_max {
            self.may_spawn = self.may_spawn && part.spawn(self.scope);
            part.pass_on(Vec::with_capacity(self.held_max));
        }
    }

    fn finish(mut self) {
        self.parts.iter_mut().for_each(|part| part.pass_on(Vec::new()));
    }
}

impl<'scope> Part<'scope> {
    /// Has a thread take what is held, from now on. Whether there is one.
    fn spawn(&mut self, scope: &'scope Scope<'scope, '_>) -> bool {
        if matches!(self.taker, Taker::Thread(_)) {
            return true;
        }
        // No more than one list waits: the finder's.
        let (sender, lists) = bounded::<Vec<Loaded>>(0);
        // What a thread that can't be made was given would be lost.
        let (give, given) = bounded::<PutIn<'scope>>(1);
        let run = move || {
            if let Ok(mut put_in) = given.recv() {
                lists.iter().for_each(|mut list| put_in(&mut list));
            }
        };
        if let Err(error) = Builder::new().name("tollgate-load".into()).spawn_scoped(scope, run) {
            tracing::debug!(%error, "counters are loaded without a thread of their own");
            return false;
        }
        if let Taker::Finder(put_in) = std::mem::replace(&mut self.taker, Taker::Thread(sender)) {
            // It waits for it.
            let _ = give.send(put_in);
        }
        true
    }

    /// Has what is held put in. A thread keeps the list: then it goes on with the next.
    fn pass_on(&mut self, next: Vec<Loaded>) {
        match &mut self.taker {
            Taker::Finder(put_in) => put_in(&mut self.held),
            Taker::Thread(sender) => {
                // It takes lists for as long as there is a sender.
                let _ = sender.send(std::mem::replace(&mut self.held, next));
            }
        }
    }
}

fn shard_of(twin: &Twin, hash: u64) -> usize {
    #[expect(clippy::cast_possible_truncation, reason = "64-bit platforms only")]
    twin.determine_shard(hash as usize)
}

/// Sorts counters by where they will lie in memory, given how many buckets the shards have: in any
/// other order, each would wait for a line and a page of its own.
fn sort(counters: &mut [Loaded], buckets: &[usize], place: impl Fn(u64) -> usize) {
    let bits = buckets.len().next_power_of_two().trailing_zeros();
    radsort::sort_by_key(counters, |loaded| {
        let shard = place(loaded.hash);
        // The lower bits of the hash say where in its shard it lies.
        let bucket_bits = buckets.get(shard).map_or(0, |buckets| buckets.trailing_zeros());
        let within = loaded.hash.checked_shl(u64::BITS - bucket_bits).unwrap_or(0);
        let place = (shard as u64).checked_shl(u64::BITS - bits).unwrap_or(0) | within >> bits;
        // The upper half tells enough of them apart.
        (place >> u32::BITS) as u32
    });
}

impl fmt::Debug for Taker<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Finder(_) => "Finder",
            Self::Thread(_) => "Thread",
        })
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::model::QuotaId;

    /// By any number of threads, in lists of any size: the newest window of each.
    #[test]
    fn what_is_loaded_is_there() {
        for (shards, threads, held_max) in
            [(2, 0, 7), (2, 1, 1), (4, 1, 100), (8, 3, 60), (8, 7, 1000), (2, 3, 1 << 20)]
        {
            let mut table = Table::new(shards, 0);
            let mut expected = BTreeMap::new();
            let found = table.load_with(threads, held_max, |loading| {
                for step in 0..2000_u64 {
                    let (user, window) = (step * 7 % 500, step * 13 % 5);
                    let quota = QuotaId::from_u16((step % 3) as u16);
                    let key = Key { user, quota };
                    loading.put(key, WindowStart(window), step);
                    let known = expected.entry((user, quota)).or_insert((window, step));
                    if window >= known.0 {
                        *known = (window, step);
                    }
                }
                "all of them"
            });
            assert_eq!((found, table.len()), ("all of them", expected.len()));
            for (&(user, quota), &(window, used)) in &expected {
                let state = table.find(Key { user, quota }, |live| live.cell.load());
                assert_eq!(state, Some(CellState::new(quota, WindowStart(window), used)));
            }
        }
    }
}
