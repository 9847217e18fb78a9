//! Look-ups of the short ways: nothing in between that a processor has to wait for.

use std::array::from_fn;

use dashmap::SharedValue;

use super::{Entry, Key, Table};
use crate::admission::cell::Live;
use crate::prefetch;

/// Asks for the lines where a counter probably lies, near the place that its hash names, in a shard
/// with so many buckets that ends there.
#[inline(always)]
fn prefetch_near(end: *const (Entry, SharedValue<()>), buckets: usize, hash: u64) {
    #[expect(clippy::cast_possible_truncation, reason = "64-bit platforms only")]
    let bucket = hash as usize & (buckets - 1);
    // They lie in descending order, two to a line.
    prefetch::for_write(end.wrapping_sub(bucket + 1));
    prefetch::for_write(end.wrapping_sub(bucket + 3));
}

impl Table {
    /// [`find`](Self::find), with something else done while the counter is on its way from memory,
    /// without which there is nothing to do.
    #[inline(always)]
    pub(crate) fn find_after<T, R>(
        &self,
        key: Key,
        before: impl FnOnce() -> Option<T>,
        operate: impl FnOnce(T, Live<'_>) -> Option<R>,
    ) -> Option<R> {
        let hash = self.hash(key);
        let shard = self.map.shards()[self.shard_of(hash)].read();
        prefetch_near(shard.data_end().as_ptr(), shard.buckets(), hash);
        let before = before()?;
        let (entry, _) = shard.get(hash, |(entry, _)| entry.key() == key)?;
        operate(before, entry.live())
    }

    /// [`find_each`](Self::find_each) for few counters, of which `None` may be missing.
    #[inline(always)]
    pub(crate) fn find_few<const N: usize, R>(
        &self,
        keys: [Key; N],
        operate: impl FnOnce([Live<'_>; N]) -> Option<R>,
    ) -> Option<R> {
        let hashes = keys.map(|key| self.hash(key));
        // Each shard's number, and which key it is for: ascending by the shards.
        let mut order: [(usize, usize); N] = from_fn(|index| (self.shard_of(hashes[index]), index));
        for end in 1..N {
            let mut place = end;
            while place > 0 && order[place - 1] > order[place] {
                order.swap(place - 1, place);
                place -= 1;
            }
        }
        let mut shards: [_; N] = from_fn(|_| None);
        // Which of these a key's counter is in.
        let mut shard_of = [0; N];
        let mut last = 0;
        for (place, &(number, index)) in order.iter().enumerate() {
            if place == 0 || order[place - 1].0 != number {
                shards[place] = Some(self.map.shards()[number].read());
                last = place;
            }
            shard_of[index] = last;
            if let Some(shard) = &shards[last] {
                prefetch_near(shard.data_end().as_ptr(), shard.buckets(), hashes[index]);
            }
        }
        let mut found = [None; N];
        for (index, key) in keys.into_iter().enumerate() {
            let shard = shards[shard_of[index]].as_ref()?;
            let (entry, _) = shard.get(hashes[index], |(entry, _)| entry.key() == key)?;
            found[index] = Some(entry.live());
        }
        let mut lives = [found.first().copied().flatten()?; N];
        for (live, found) in lives.iter_mut().zip(found) {
            *live = found?;
        }
        operate(lives)
    }
}
