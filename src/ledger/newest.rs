//! What has ended, of which only the newest is kept.
//!
//! It lies in chunks, in the order in which it came, which is nearly that of its times. A chunk
//! that is certainly too old goes as a whole, without a look at what is in it, and its memory is
//! used again: a merge reads millions, and keeps the last of them.

use std::cmp::Ordering;
use std::time::Duration;

use super::Remembering;
use crate::model::Timestamp;

/// How many lie in a chunk.
const CHUNK: usize = if cfg!(test) { 16 } else { 1 << 14 };
/// It is looked for chunks that are too old when there are more by this part of the bound, at least
/// a chunk: to look is not free.
const LOOKS_PART: usize = 64;
/// Where no chunk goes as a whole, all are looked at when there are twice as many as the bound, and
/// so many more.
pub(super) const EXCESS_ALLOWED: usize = 4096;

/// What came at a time so far ahead of the clock came before that was set back. Clocks are set back
/// by less now and then: then the times of most of what is remembered still tell the order.
const AHEAD_MAX: Duration = Duration::from_mins(1);

/// Something that came to be at a time.
pub(super) trait Timed {
    fn at(&self) -> Timestamp;
}

/// The age of what came at `at`, when the clock shows `now`: the oldest is the least.
pub(super) fn age(at: Timestamp, now: Timestamp) -> u64 {
    let is_past = at <= now.saturating_add(AHEAD_MAX);
    // No time is so late that it takes the upper bit.
    at.as_unix_millis() | u64::from(is_past) << 63
}

/// Items in the order in which they came.
#[derive(Debug, Clone)]
pub(super) struct Newest<T> {
    /// None is empty.
    chunks: Vec<Chunk<T>>,
    /// Kept for its memory.
    spare: Vec<T>,
    len: usize,
    /// With so many it is looked again whether some are too old.
    next_look: usize,
}

#[derive(Debug, Clone)]
struct Chunk<T> {
    items: Vec<T>,
    /// No item came earlier than that, and none later than this.
    earliest: Timestamp,
    latest: Timestamp,
}

impl<T> Default for Newest<T> {
    fn default() -> Self {
        Self { chunks: Vec::new(), spare: Vec::new(), len: 0, next_look: 0 }
    }
}

impl<T: Timed> Newest<T> {
    #[inline]
    pub(super) fn push(&mut self, item: T) {
        let at = item.at();
        let last = match self.chunks.last_mut() {
            Some(last) if last.items.len() < CHUNK => last,
            _ => self.begin_chunk(at),
        };
        last.earliest = last.earliest.min(at);
        last.latest = last.latest.max(at);
        last.items.push(item);
        self.len += 1;
    }

    #[cold]
    fn begin_chunk(&mut self, at: Timestamp) -> &mut Chunk<T> {
        let mut items = std::mem::take(&mut self.spare);
        // The first grows as it is filled: mostly there are few.
        if !self.chunks.is_empty() {
            items.reserve_exact(CHUNK);
        }
        self.chunks.push_mut(Chunk { items, earliest: at, latest: at })
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.chunks.iter().flat_map(|chunk| &chunk.items)
    }

    /// Gives them all, and what it has given back of their memory.
    pub(super) fn into_items(self) -> impl Iterator<Item = T> {
        self.chunks.into_iter().flat_map(|chunk| chunk.items)
    }

    /// Whether there are so many that [`bound`](Self::bound) may find some to forget.
    pub(super) fn is_bound_due(&self, remembering: Remembering) -> bool {
        self.len > remembering.max && self.len >= self.next_look
    }

    /// Forgets what is certainly beyond the bound, where it is easily found: so that there are
    /// never many more than twice the bound, and mostly not many more than that. See
    /// [`prune`](Self::prune), of which it forgets nothing that that would keep.
    pub(super) fn bound(&mut self, remembering: Remembering, now: Timestamp, shown: Timestamp) {
        self.forget_chunks(remembering.max, shown);
        let most = remembering.max.saturating_mul(2).saturating_add(EXCESS_ALLOWED);
        if self.len > most {
            self.prune(remembering, now, shown);
        }
        let more = (remembering.max / LOOKS_PART).max(CHUNK);
        let next_look = self.len.max(remembering.max).saturating_add(more);
        self.next_look = next_look.min(most.saturating_add(1));
    }

    /// Forgets chunks of which each item has `max` others that came later.
    fn forget_chunks(&mut self, max: usize, shown: Timestamp) {
        // What came before the clock was set back is older than its time says.
        if self.chunks.iter().any(|chunk| chunk.latest > shown.saturating_add(AHEAD_MAX)) {
            return;
        }
        let mut from: Vec<_> =
            self.chunks.iter().map(|chunk| (chunk.earliest, chunk.items.len())).collect();
        from.sort_unstable_by_key(|&(earliest, _)| earliest);
        // How many are in the chunks that begin with a time, and in those that begin later.
        let mut count = 0;
        for (_, items) in from.iter_mut().rev() {
            count += *items;
            *items = count;
        }
        let Self { chunks, spare, len, .. } = self;
        chunks.retain_mut(|chunk| {
            let later = from.partition_point(|&(earliest, _)| earliest <= chunk.latest);
            let is_kept = from.get(later).is_none_or(|&(_, count)| count < max);
            if !is_kept {
                *len -= chunk.items.len();
                chunk.items.clear();
                *spare = std::mem::take(&mut chunk.items);
            }
            is_kept
        });
    }

    /// Keeps what is not over at `now`, and of that the newest; of what came to be at the same time
    /// the last that came. The clock showed `shown` after all of them had come.
    pub(super) fn prune(&mut self, remembering: Remembering, now: Timestamp, shown: Timestamp) {
        let is_over = |item: &T| remembering.is_over(item.at(), now);
        let age = |item: &T| age(item.at(), shown);
        let mut ages: Vec<_> = self.iter().filter(|item| !is_over(item)).map(age).collect();
        let Some(excess) = ages.len().checked_sub(remembering.max).filter(|&n| n > 0) else {
            if ages.len() < self.len {
                self.retain(|item| !is_over(item));
            }
            return;
        };
        let (before, &mut newest_forgotten, _) = ages.select_nth_unstable(excess - 1);
        let earlier = before.iter().filter(|&&age| age < newest_forgotten).count();
        // Not all of that time: a request that is forgotten within the bound would count twice.
        let mut same_time = excess - earlier;
        self.retain(|item| match age(item).cmp(&newest_forgotten) {
            _ if is_over(item) => false,
            Ordering::Less => false,
            Ordering::Equal if same_time > 0 => {
                same_time -= 1;
                false
            }
            Ordering::Equal | Ordering::Greater => true,
        });
    }

    fn retain(&mut self, mut is_kept: impl FnMut(&T) -> bool) {
        self.len = 0;
        for chunk in &mut self.chunks {
            chunk.items.retain(&mut is_kept);
            self.len += chunk.items.len();
            // Only the last one is filled further.
            if chunk.items.len() < chunk.items.capacity() / 2 {
                chunk.items.shrink_to_fit();
            }
        }
        self.chunks.retain(|chunk| !chunk.items.is_empty());
    }
}

impl<T: Timed> Extend<T> for Newest<T> {
    fn extend<I: IntoIterator<Item = T>>(&mut self, items: I) {
        items.into_iter().for_each(|item| self.push(item));
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// When it came, and which it is.
    impl Timed for (u64, usize) {
        fn at(&self) -> Timestamp {
            Timestamp::from_unix_millis(self.0)
        }
    }

    fn remembering(max: usize) -> Remembering {
        Remembering { window: Duration::from_millis(5_000), max }
    }

    proptest! {
        /// Whatever the order of the times, what is kept is what a single look at all keeps, in the
        /// order in which it came.
        #[test]
        fn what_is_forgotten_early_would_be_in_the_end(
            max in prop::sample::select(vec![0, 1, 10, 40, 100, usize::MAX]),
            disorder in prop::sample::select(vec![1, 4, 40, 10_000]),
            (shown, now) in (0..70_000_u64, 0..12_000_u64),
            steps in prop::collection::vec((any::<u16>(), prop::bool::weighted(0.1)), 0..600),
        ) {
            let [shown, now] = [shown, now].map(Timestamp::from_unix_millis);
            let (mut early, mut late) = (Newest::default(), Newest::default());
            for (number, (random, is_looked)) in steps.into_iter().enumerate() {
                let at = 8 * number as u64 + u64::from(random) % disorder;
                // Some so far ahead that the clock must have been set back since.
                let ahead = if random % 97 == 0 { 65_000 } else { 0 };
                early.push((at + ahead, number));
                late.push((at + ahead, number));
                if is_looked && early.is_bound_due(remembering(max)) {
                    early.bound(remembering(max), now, shown);
                }
                prop_assert_eq!(early.len(), early.iter().count());
            }
            early.prune(remembering(max), now, shown);
            late.prune(remembering(max), now, shown);
            prop_assert_eq!(early.into_items().collect::<Vec<_>>(), late.into_items().collect::<Vec<_>>());
        }
    }

    /// As a merge reads them: batch after batch, and in each lane after lane.
    #[test]
    fn old_chunks_go_as_a_whole_and_their_memory_is_used_again() {
        let (max, lanes, per_lane) = (40 * CHUNK, 4, 2 * CHUNK);
        let mut newest = Newest::default();
        let mut longest = 0;
        for batch in 0..100 {
            for _ in 0..lanes {
                for step in 0..per_lane {
                    newest.push(((batch * per_lane + step) as u64, 0));
                }
            }
            let (now, shown) = (Timestamp::MIN, Timestamp::MAX);
            if newest.is_bound_due(remembering(max)) {
                newest.bound(remembering(max), now, shown);
            }
            longest = longest.max(newest.len());
        }
        // Those of two batches may be of one time.
        assert!(longest <= max + 3 * lanes * per_lane, "{longest}");
        assert!(newest.len() >= max && newest.spare.capacity() == CHUNK);
    }

    fn numbers(newest: Newest<(u64, usize)>) -> Vec<usize> {
        newest.into_items().map(|(_, number)| number).collect()
    }

    #[test]
    fn of_one_time_the_last_that_came_stay() {
        let (all, max) = (4 * CHUNK, CHUNK + 3);
        let mut newest = Newest::default();
        newest.extend((0..all).map(|number| (5, number)));
        newest.bound(remembering(max), Timestamp::MIN, Timestamp::MAX);
        newest.prune(remembering(max), Timestamp::MIN, Timestamp::MAX);
        assert!(numbers(newest).into_iter().eq(all - max..all));
    }

    /// What came before the clock was set back has the later times, and is older.
    #[test]
    fn when_the_clock_was_set_back_what_came_since_stays() {
        let (half, max) = (3 * CHUNK, 2 * CHUNK);
        let mut newest = Newest::default();
        newest.extend((0..half).map(|number| (1_000_000, number)));
        newest.extend((half..2 * half).map(|number| (5, number)));
        let shown = Timestamp::from_unix_millis(6);
        newest.bound(remembering(max), Timestamp::MIN, shown);
        newest.prune(remembering(max), Timestamp::MIN, shown);
        assert!(numbers(newest).into_iter().eq(2 * half - max..2 * half));
    }

    /// Bits of chunks once kept the memory of all.
    #[test]
    fn chunks_of_which_little_is_left_take_little_memory() {
        let mut newest = Newest::default();
        newest.extend((0..100 * CHUNK).map(|number| ((number * 7919 % 1000) as u64, number)));
        newest.prune(remembering(10 * CHUNK), Timestamp::MIN, Timestamp::MAX);
        let capacity: usize = newest.chunks.iter().map(|chunk| chunk.items.capacity()).sum();
        assert!(newest.len() == 10 * CHUNK && capacity < 12 * CHUNK, "{capacity}");
    }
}
