//! Look-ups of the fast paths: only in open shards, and inlined into the operation as a whole, so
//! that nothing goes through memory.

use std::array::from_fn;

use super::{Key, Place, Table, prefetch_all, prefetch_place};
use crate::admission::cell::Live;
use crate::prefetch;

/// What is done with a counter that was found. A trait of our own in place of `FnOnce`: a method
/// can be put into its caller in any case, a closure only where the compiler likes to (as it does
/// with those of the functions below, of which each is called in one place).
pub(crate) trait Operation {
    type Result;

    /// Whether it changes the counter, so that its cache line is fetched for writing. A mere reader
    /// leaves the line shared with other readers.
    const CHANGES: bool = true;

    fn run(self, live: Live<'_>) -> Option<Self::Result>;
}

impl Table {
    /// [`find`](Self::find) in a shard that is open; `None` otherwise.
    #[inline(always)]
    pub(crate) fn find_open<O: Operation>(&self, place: Place, operation: O) -> Option<O::Result> {
        let Place { key, hash, index } = place;
        let shard = self.bias.read_if_open(index, &self.map.shards()[index])?;
        // Where it probably is: the map will not know before it has read what lies elsewhere.
        let fetch: fn(*const _) = if O::CHANGES { prefetch::for_write } else { prefetch::for_read };
        prefetch_place(shard.data_end().as_ptr(), shard.buckets(), hash, fetch);
        let (entry, _) = shard.get(hash, |(entry, _)| entry.key() == key)?;
        operation.run(entry.live(&self.shared))
    }

    /// [`find_open`](Self::find_open) for an operation that changes the counter and takes time to
    /// `prepare`, in which the counter comes from memory. `prepare` waits for nobody.
    #[inline(always)]
    pub(crate) fn find_open_with<O: Operation>(
        &self,
        place: Place,
        prepare: impl FnOnce() -> Option<O>,
    ) -> Option<O::Result> {
        const { assert!(O::CHANGES) };
        let Place { key, hash, index } = place;
        let shard = self.bias.read_if_open(index, &self.map.shards()[index])?;
        prefetch_all(shard.data_end().as_ptr(), shard.buckets(), hash);
        let operation = prepare()?;
        let (entry, _) = shard.get(hash, |(entry, _)| entry.key() == key)?;
        operation.run(entry.live(&self.shared))
    }

    /// [`find_each`](Self::find_each) for few counters, all of them there and in shards that are
    /// open; `None` otherwise. `prepare` has the time in which their lines come, and waits for
    /// nobody.
    #[inline(always)]
    pub(crate) fn find_few<const N: usize, P, R>(
        &self,
        keys: [Key; N],
        prepare: impl FnOnce() -> Option<P>,
        operate: impl FnOnce(P, [Live<'_>; N]) -> Option<R>,
    ) -> Option<R> {
        let places = keys.map(|key| self.place(key));
        let hashes = places.map(|place| place.hash);
        let indices = places.map(|place| place.index);
        let shards: [_; N] = from_fn(|index| &*self.map.shards()[indices[index]]);
        self.bias.read_open(indices, shards, |shards| {
            for (shard, hash) in shards.iter().zip(hashes) {
                let (end, fetch) = (shard.data_end().as_ptr(), prefetch::for_write);
                prefetch_place(end, shard.buckets(), hash, fetch);
            }
            let prepared = prepare()?;
            let find = |index: usize| {
                let (key, hash) = (keys[index], hashes[index]);
                let (entry, _) = shards[index].get(hash, |(entry, _)| entry.key() == key)?;
                Some(entry.live(&self.shared))
            };
            let mut lives = [find(0)?; N];
            for (index, live) in lives.iter_mut().enumerate().skip(1) {
                *live = find(index)?;
            }
            operate(prepared, lives)
        })
    }
}
