//! Look-ups of the fast paths: only in open shards, and inlined into the operation as a whole, so
//! that nothing goes through memory.

use std::array::from_fn;

use super::{Key, Table, prefetch_place};
use crate::admission::cell::Live;
use crate::prefetch;

/// What is done with a counter that was found. A trait of our own in place of `FnOnce`: a method
/// can be put into its caller in any case, a closure only where the compiler likes to.
pub(crate) trait Operation {
    type Result;

    /// Whether it changes the counter, so that its cache line is fetched for writing. A mere reader
    /// leaves the line shared with other readers.
    const CHANGES: bool = true;

    /// Asked while the counter is on its way from memory: whether there is something to do.
    #[inline(always)]
    fn is_wanted(&self) -> bool {
        true
    }

    fn run(self, live: Live<'_>) -> Option<Self::Result>;
}

impl Table {
    /// [`find`](Self::find) in a shard that is open; `None` otherwise.
    #[inline(always)]
    pub(crate) fn find_open<O: Operation>(&self, key: Key, operation: O) -> Option<O::Result> {
        let hash = self.hash(key);
        let index = self.shard_of(hash);
        let shard = self.bias.read_if_open(index, &self.map.shards()[index])?;
        // Where it probably is: the map will not know before it has read what lies elsewhere.
        let fetch: fn(*const _) = if O::CHANGES { prefetch::for_write } else { prefetch::for_read };
        prefetch_place(shard.data_end().as_ptr(), shard.buckets(), hash, fetch);
        if !operation.is_wanted() {
            return None;
        }
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
        let hashes: [_; N] = from_fn(|index| self.hash(keys[index]));
        let indices: [_; N] = from_fn(|index| self.shard_of(hashes[index]));
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
