//! Summing: (user, quota, window) -> a plain wide sum.
//!
//! Deltas commute, so batches, snapshots and lanes are all folded by the same addition, unclamped.
//! Only recovery clamps, when it loads the counters.

use std::hash::BuildHasher;

use foldhash::fast::RandomState;
use smallvec::SmallVec;

use crate::model::{QuotaId, WindowStart};
use crate::prefetch;

/// What a sum is kept for. The order of the fields is the order on disk: quota, window, user.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SumKey {
    pub(crate) quota: QuotaId,
    pub(crate) window: WindowStart,
    pub(crate) user: u64,
}

const QUOTA_SHIFT: u32 = 48;
const _: () = assert!(WindowStart::MAX.0 >> QUOTA_SHIFT == 0);

impl SumKey {
    /// Quota and window in one word, the quota above: words order as they do.
    #[inline(always)]
    pub(crate) fn place(self) -> u64 {
        u64::from(self.quota.as_u16()) << QUOTA_SHIFT | self.window.0
    }

    /// The key with quota and window out of one word.
    #[inline(always)]
    pub(crate) fn at(place: u64, user: u64) -> Self {
        let quota = QuotaId::from_u16((place >> QUOTA_SHIFT) as u16);
        Self { quota, window: WindowStart(place & WindowStart::MAX.0), user }
    }
}

/// One sum: in a batch a delta, in a snapshot a total.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sum {
    pub(crate) key: SumKey,
    pub(crate) amount: i128,
}

/// How many deltas are looked up at a time: their cache misses then overlap.
pub(crate) const BLOCK: usize = 64;

/// From so many on they are sorted digit by digit.
const RADIX_FROM: usize = 512;

/// Sums by key: a dense list of them, and an index into it by linear probing.
///
/// Not a map from a library: none says where a key would be before it is looked up, and waiting for
/// one look-up after the other is what most of the time would go to.
#[derive(Debug, Default)]
pub(crate) struct FoldTable {
    sums: Vec<Slot>,
    /// So many of them, from the first on, ascend by key.
    ordered: usize,
    /// A power of two, at most half of it taken; empty at first.
    index: Vec<Lead>,
    hasher: RandomState,
}

/// A sum, with its key packed so that the order is that of [`SumKey`]. Never on two cache lines.
#[derive(Debug, Clone, Copy)]
#[repr(align(32))]
struct Slot {
    /// Quota and window.
    place: u64,
    user: u64,
    amount: i128,
}

/// Leads to a place in the sums: the place, counted from 1, in the lower bits, and above it as much
/// of the hash of its key as there is room for, so that seldom another sum's line is looked at than
/// the right one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Lead(u32);

impl Lead {
    const FREE: Self = Self(0);
}

/// How the leads of an index are put together.
#[derive(Debug, Clone, Copy)]
struct Layout {
    /// The bits of a lead that hold the place; the others hold the tag.
    place: u32,
}

impl Layout {
    /// For an index of so many leads, a power of two: at most half of them are taken.
    #[inline]
    fn new(leads: usize) -> Self {
        #[expect(clippy::cast_possible_truncation, reason = "an index has fewer leads")]
        let place = (leads as u32).wrapping_sub(1);
        Self { place }
    }

    #[inline]
    fn lead(self, hash: u64, place: usize) -> Lead {
        debug_assert!(place < self.place as usize, "at most half of the index is taken");
        #[expect(clippy::cast_possible_truncation, reason = "a place fits its bits")]
        let place = place as u32 + 1;
        Lead(self.tag_of(hash) | place)
    }

    /// From the upper half of the hash: the lower says where in the index the lead is.
    #[inline]
    fn tag_of(self, hash: u64) -> u32 {
        (hash >> u32::BITS) as u32 & !self.place
    }

    #[inline]
    fn has_tag(self, lead: Lead, tag: u32) -> bool {
        lead.0 & !self.place == tag
    }

    #[inline]
    fn place(self, lead: Lead) -> usize {
        (lead.0 & self.place).wrapping_sub(1) as usize
    }
}

impl Slot {
    fn new(key: SumKey, amount: i128) -> Self {
        Self { place: key.place(), user: key.user, amount }
    }

    fn key(&self) -> (u64, u64) {
        (self.place, self.user)
    }

    fn is_same(&self, other: &Self) -> bool {
        self.key() == other.key()
    }

    fn sum(self) -> Sum {
        Sum { key: SumKey::at(self.place, self.user), amount: self.amount }
    }
}

impl FoldTable {
    /// Adds deltas, at most [`BLOCK`] of them. A sum can't overflow: 2^64 deltas of 2^63 fit an
    /// `i128`; batches from disk are added through [`add_sums`](Self::add_sums).
    pub(crate) fn add_block(&mut self, block: &[(SumKey, i64)]) {
        let added = self.add_slots(block, |&(key, delta)| Slot::new(key, i128::from(delta)));
        debug_assert!(added.is_some(), "sums of 64-bit deltas do not overflow");
    }

    /// Adds wide deltas that come from a file, up to the first error. Those that ascend by key, as
    /// a batch's do, are found among those that are in order, next to one another; only the others
    /// are looked up.
    ///
    /// # Errors
    /// That of an item; or that a sum overflows, which only damage can cause.
    pub(crate) fn add_sums(
        &mut self,
        sums: impl IntoIterator<Item = Result<Sum, &'static str>>,
    ) -> Result<(), &'static str> {
        const OVERFLOW: &str = "a sum above 128 bits";
        if self.sums.len() - self.ordered > self.ordered / 2 {
            self.put_in_order();
        }
        let mut at = 0;
        let mut block: SmallVec<[Slot; BLOCK]> = SmallVec::new();
        for sum in sums {
            let Sum { key, amount } = sum?;
            let slot = Slot::new(key, amount);
            at = self.seek(at, slot.key());
            if at < self.ordered && self.sums[at].is_same(&slot) {
                self.add_at(at, amount).ok_or(OVERFLOW)?;
                at += 1;
                continue;
            }
            block.push(slot);
            if block.len() == BLOCK {
                self.add_slots(&block, |&slot| slot).ok_or(OVERFLOW)?;
                block.clear();
            }
        }
        self.add_slots(&block, |&slot| slot).ok_or(OVERFLOW)
    }

    /// The first place, from `from` on, of those in order that is not below the key; mostly it is
    /// near. Exponential search (Bentley and Yao, 1976).
    #[inline]
    fn seek(&self, from: usize, key: (u64, u64)) -> usize {
        let (mut from, mut step) = (from, 1);
        let ordered = &self.sums[..self.ordered];
        while ordered.get(from + step - 1).is_some_and(|slot| slot.key() < key) {
            from += step;
            step *= 2;
        }
        let near = &ordered[from..ordered.len().min(from + step - 1)];
        from + near.partition_point(|slot| slot.key() < key)
    }

    /// Adds a block; `None` when a sum overflows.
    #[inline]
    fn add_slots<T>(&mut self, block: &[T], slot: impl Fn(&T) -> Slot) -> Option<()> {
        let block = block.get(..BLOCK).unwrap_or(block);
        if block.is_empty() {
            return Some(());
        }
        self.reserve(block.len());
        // Three rounds, each of which asks for the lines of the next one.
        let mut hashes = [0; BLOCK];
        for (hash, item) in hashes.iter_mut().zip(block) {
            *hash = self.hash(&slot(item));
            prefetch::for_write(&raw const self.index[self.home(*hash)]);
        }
        let mut places = [0; BLOCK];
        for (place, hash) in places.iter_mut().zip(hashes).take(block.len()) {
            *place = self.probable_place(hash);
            prefetch::for_write(self.sums.as_ptr().wrapping_add(*place));
        }
        for ((hash, place), item) in hashes.into_iter().zip(places).zip(block) {
            let slot = slot(item);
            let is_there = self.sums.get(place).is_some_and(|sum| sum.is_same(&slot));
            let place = if is_there { place } else { self.place_of(hash, slot) };
            self.add_at(place, slot.amount)?;
        }
        Some(())
    }

    /// Adds a wide delta that comes from a file; `None` when the sum overflows, which only damage
    /// can cause.
    pub(crate) fn add_checked(&mut self, sum: Sum) -> Option<()> {
        self.reserve(1);
        let slot = Slot::new(sum.key, sum.amount);
        let place = self.place_of(self.hash(&slot), slot);
        self.add_at(place, sum.amount)
    }

    #[inline]
    fn add_at(&mut self, place: usize, amount: i128) -> Option<()> {
        let sum = &mut self.sums[place].amount;
        *sum = sum.checked_add(amount)?;
        Some(())
    }

    /// The place of the first key whose hash is tagged like this one: in nearly all cases of the
    /// key itself, if it is there. Some place that no key has otherwise.
    #[inline]
    fn probable_place(&self, hash: u64) -> usize {
        let layout = Layout::new(self.index.len());
        let tag = layout.tag_of(hash);
        let mut at = self.home(hash);
        loop {
            let lead = self.index[at];
            if lead == Lead::FREE {
                return usize::MAX;
            }
            if layout.has_tag(lead, tag) {
                return layout.place(lead);
            }
            at = (at + 1) & (self.index.len() - 1);
        }
    }

    /// The place of this key, which is put in, with a sum of zero, where it is not there.
    fn place_of(&mut self, hash: u64, slot: Slot) -> usize {
        let layout = Layout::new(self.index.len());
        let tag = layout.tag_of(hash);
        let mut at = self.home(hash);
        while self.index[at] != Lead::FREE {
            let lead = self.index[at];
            if layout.has_tag(lead, tag) && self.sums[layout.place(lead)].is_same(&slot) {
                return layout.place(lead);
            }
            at = (at + 1) & (self.index.len() - 1);
        }
        let place = self.sums.len();
        self.sums.push(Slot { amount: 0, ..slot });
        self.index[at] = layout.lead(hash, place);
        place
    }

    #[inline]
    fn hash(&self, slot: &Slot) -> u64 {
        self.hasher.hash_one((slot.place, slot.user))
    }

    /// Where in the index a key with this hash is looked for first.
    #[inline]
    fn home(&self, hash: u64) -> usize {
        #[expect(clippy::cast_possible_truncation, reason = "the lower bits are meant")]
        let home = hash as usize & (self.index.len() - 1);
        home
    }

    /// Makes room for more keys, so that at most half of the index is taken.
    fn reserve(&mut self, more: usize) {
        let needed = (self.sums.len() + more) * 2;
        if needed > self.index.len() {
            self.rebuild_index(needed);
        }
        if self.sums.capacity() - self.sums.len() < more {
            // By half, so that the memory that is copied and given back stays in proportion.
            self.sums.reserve_exact(more.max(self.sums.len() / 2));
        }
    }

    fn rebuild_index(&mut self, needed: usize) {
        let needed = needed.next_power_of_two();
        if needed > self.index.capacity() {
            self.index = Vec::with_capacity(needed);
        }
        self.index.clear();
        self.index.resize(needed, Lead::FREE);
        let layout = Layout::new(needed);
        for (place, slot) in self.sums.iter().enumerate() {
            let hash = self.hash(slot);
            let mut at = self.home(hash);
            while self.index[at] != Lead::FREE {
                at = (at + 1) & (needed - 1);
            }
            self.index[at] = layout.lead(hash, place);
        }
    }

    /// How many keys have a sum.
    pub(crate) fn len(&self) -> usize {
        self.sums.len()
    }

    /// The sums, in no order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Sum> {
        self.sums.iter().map(|slot| slot.sum())
    }

    /// Moves the sums out, ascending by key. Sums of zero are kept: that something happened in a
    /// window is part of the state.
    pub(crate) fn drain_sorted(&mut self, out: &mut Vec<Sum>) {
        self.put_in_order();
        out.clear();
        out.extend(self.sums.drain(..).map(Slot::sum));
        self.ordered = 0;
    }

    fn put_in_order(&mut self) {
        sort(&mut self.sums, |slot| slot.key());
        self.ordered = self.sums.len();
        // Made anew when it is needed: before the end it may not be.
        self.index.clear();
    }
}

/// Sorts by key.
pub(crate) fn sort<T, K: Ord + radsort::Key>(items: &mut [T], key: impl Fn(&T) -> K) {
    if items.len() < RADIX_FROM {
        items.sort_unstable_by_key(key);
    } else {
        radsort::sort_by_key(items, key);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn key(quota: u16, window: u64, user: u64) -> SumKey {
        SumKey { quota: QuotaId::from_u16(quota), window: WindowStart(window), user }
    }

    fn any_key() -> impl Strategy<Value = SumKey> {
        // Few and many keys, and the extremes.
        let user = prop_oneof![0..4_u64, 0..5000_u64, Just(u64::MAX)];
        let window = prop_oneof![Just(0), Just(86_400_000), Just(WindowStart::MAX.0)];
        let quota = prop_oneof![0..3_u16, Just(u16::MAX)];
        (quota, window, user).prop_map(|(quota, window, user)| key(quota, window, user))
    }

    proptest! {
        #[test]
        fn the_table_sums_as_a_map_does(
            rounds in proptest::collection::vec(
                proptest::collection::vec((any_key(), any::<i64>()), 0..3000),
                1..4,
            ),
        ) {
            let mut table = FoldTable::default();
            let mut sums = Vec::new();
            for deltas in rounds {
                let mut expected = BTreeMap::<_, i128>::new();
                for (key, delta) in &deltas {
                    *expected.entry(*key).or_default() += i128::from(*delta);
                }
                for block in deltas.chunks(BLOCK) {
                    table.add_block(block);
                }
                prop_assert_eq!(table.len(), expected.len());
                table.drain_sorted(&mut sums);
                let expected: Vec<_> =
                    expected.into_iter().map(|(key, amount)| Sum { key, amount }).collect();
                prop_assert_eq!(&sums, &expected);
                prop_assert_eq!(table.len(), 0);
            }
        }
    }

    proptest! {
        /// Batches as a merge has them: each ascends, most keys come again, some come late.
        #[test]
        fn sorted_batches_are_summed_as_by_a_map(
            batches in proptest::collection::vec(
                proptest::collection::btree_map(any_key(), any::<i64>(), 0..600),
                1..6,
            ),
        ) {
            let mut table = FoldTable::default();
            let mut expected = BTreeMap::<_, i128>::new();
            for batch in &batches {
                let sum = |(&key, &delta): (&SumKey, &i64)| Sum { key, amount: delta.into() };
                prop_assert_eq!(table.add_sums(batch.iter().map(sum).map(Ok)), Ok(()));
                for (key, delta) in batch {
                    *expected.entry(*key).or_default() += i128::from(*delta);
                }
                prop_assert_eq!(table.len(), expected.len());
            }
            let mut sums = Vec::new();
            table.drain_sorted(&mut sums);
            prop_assert!(sums.iter().map(|sum| (sum.key, sum.amount)).eq(expected));
        }
    }

    /// One after the other, far ahead, below the first, above the last, and what is not there.
    #[test]
    fn a_place_among_those_in_order_is_found_from_any_before_it() {
        let mut table = FoldTable::default();
        let users = (10..1000).step_by(10);
        let sums = users.clone().map(|user| Ok(Sum { key: key(1, 2, user), amount: 1 }));
        assert_eq!(table.add_sums(sums), Ok(()));
        table.put_in_order();
        for wanted in (0..1010).map(|user| key(1, 2, user)) {
            let expected = users.clone().filter(|&user| user < wanted.user).count();
            for from in 0..=expected {
                assert_eq!(table.seek(from, (wanted.place(), wanted.user)), expected);
            }
        }
    }

    #[test]
    fn a_key_many_times_in_a_block_has_one_sum() {
        let mut table = FoldTable::default();
        table.add_block(&[]);
        table.add_block(&[(key(1, 2, 3), 5); BLOCK]);
        let sums: Vec<_> = table.iter().collect();
        assert_eq!(sums, [Sum { key: key(1, 2, 3), amount: 5 * BLOCK as i128 }]);
    }

    #[test]
    fn an_overflow_of_what_a_file_says_is_noticed() {
        let mut table = FoldTable::default();
        let sum = Sum { key: key(1, 2, 3), amount: i128::MAX };
        assert!(table.add_checked(sum).is_some());
        assert!(table.add_checked(sum).is_none());
        assert!(table.add_sums([Ok(sum)]).is_err());
    }

    #[test]
    fn sums_from_a_file_are_added_up_to_the_first_error() {
        let sum = |user| Sum { key: key(1, 2, user), amount: 1 << 100 };
        let mut table = FoldTable::default();
        let many = 3 * BLOCK as u64 + 5;
        assert_eq!(table.add_sums((0..many).map(|user| Ok(sum(user)))), Ok(()));
        assert_eq!(table.add_sums((0..many).map(|user| Ok(sum(user)))), Ok(()));
        assert_eq!(table.len() as u64, many);
        assert!(table.iter().all(|sum| sum.amount == 2 << 100));
        assert_eq!(table.add_sums([Ok(sum(0)), Err("torn")]), Err("torn"));
    }
}
