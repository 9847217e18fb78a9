//! Summing: (user, quota, window) -> a plain wide sum.
//!
//! Deltas commute, so batches, snapshots and lanes are all folded by the same addition, unclamped.
//! Only recovery clamps, when it loads the counters.

use std::hash::BuildHasher;
use std::ops::Range;

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

/// From so many sums on they are sorted digit by digit.
const RADIX_FROM: usize = 512;

/// How many keys are kept between rounds at most.
const KEPT_MAX: usize = 1 << 20;
/// One in so many keys may stand at the end, out of order, before all are put in order.
const TAIL_PART: usize = 8;
/// Where in so many rounds running fewer than one in [`TAIL_PART`] keys had a sum, all are
/// forgotten.
const IDLE_ROUNDS: u32 = 16;

/// Sums deltas by key: a dense list of sums, and an index into it by linear probing.
///
/// Keys stay from round to round, in their order: those that had a sum will mostly have one again,
/// and then they need neither be put in nor sorted.
///
/// Not a map from a library: none says where a key would be before it is looked up, and waiting for
/// one look-up after the other is what the drain's time would go to.
#[derive(Debug, Default)]
pub(crate) struct FoldTable {
    /// Of all known keys. Only those have an amount that are [`summed`](Self::summed).
    sums: Vec<Slot>,
    /// So many of them, from the first on, ascend by key.
    ordered: usize,
    /// Which of them have a sum in this round, a bit for each.
    summed: Vec<u64>,
    /// How many these are.
    len: usize,
    /// A power of two, at most half of it taken; empty at first.
    index: Vec<Lead>,
    /// For how many rounds now only few of the keys had a sum.
    idle_rounds: u32,
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

    /// Adds wide deltas that come from a file, up to the first error.
    ///
    /// # Errors
    /// That of an item; or that a sum overflows, which only damage can cause.
    pub(crate) fn add_sums(
        &mut self,
        sums: impl IntoIterator<Item = Result<Sum, &'static str>>,
    ) -> Result<(), &'static str> {
        let mut sums = sums.into_iter();
        let mut block: SmallVec<[Sum; BLOCK]> = SmallVec::new();
        loop {
            block.clear();
            for sum in sums.by_ref().take(BLOCK) {
                block.push(sum?);
            }
            if block.is_empty() {
                return Ok(());
            }
            self.add_slots(&block, |sum| Slot::new(sum.key, sum.amount))
                .ok_or("a sum above 128 bits")?;
        }
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
        let (word, bit) = (&mut self.summed[place / 64], 1 << (place % 64));
        // Without a branch: one way is as likely as the other.
        let is_first = *word & bit == 0;
        *word |= bit;
        self.len += usize::from(is_first);
        let sum = &mut self.sums[place].amount;
        *sum = if is_first { 0 } else { *sum }.checked_add(amount)?;
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

    /// The place of this key, which is put in where it is not there.
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
        self.sums.push(slot);
        if self.sums.len() > 64 * self.summed.len() {
            self.summed.push(0);
        }
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
        self.len
    }

    /// The sums, in no order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Sum> {
        self.summed_slots(0..self.sums.len()).map(|slot| slot.sum())
    }

    fn is_summed(&self, place: usize) -> bool {
        self.summed[place / 64] & 1 << (place % 64) != 0
    }

    /// Those with a sum among these places, which begin with a multiple of 64 or are few.
    fn summed_slots(&self, places: Range<usize>) -> impl Iterator<Item = &Slot> {
        let words = places.start / 64..places.end.div_ceil(64);
        let bits = words.flat_map(|word| Bits(self.summed[word]).map(move |bit| word * 64 + bit));
        bits.filter(move |place| places.contains(place)).map(|place| &self.sums[place])
    }

    /// Moves the sums out, ascending by key. The keys stay, for the next round. Sums of zero are
    /// kept: that something happened in a window is part of the state.
    pub(crate) fn drain_sorted(&mut self, out: &mut Vec<Sum>) {
        if (self.sums.len() - self.ordered) * TAIL_PART > self.sums.len() {
            self.put_in_order();
        }
        let mut tail: Vec<_> = self.summed_slots(self.ordered..self.sums.len()).collect();
        tail.sort_unstable_by_key(|slot| slot.key());
        let mut tail = tail.into_iter().peekable();
        out.clear();
        out.reserve(self.len);
        for slot in self.summed_slots(0..self.ordered) {
            while let Some(before) = tail.next_if(|before| before.key() < slot.key()) {
                out.push(before.sum());
            }
            out.push(slot.sum());
        }
        out.extend(tail.map(|slot| slot.sum()));
        self.end_round();
    }

    /// Makes all keys ascend.
    fn put_in_order(&mut self) {
        if self.ordered == 0 && self.len == self.sums.len() {
            // The first round, and the only one of many tables: in place.
            sort(&mut self.sums, |slot| slot.key());
        } else {
            self.merge_tail();
        }
        self.ordered = self.sums.len();
        // Made anew when it is needed: for the last round it would be in vain.
        self.index.clear();
    }

    /// Moves the keys at the end to where they belong.
    fn merge_tail(&mut self) {
        let tail = self.ordered..self.sums.len();
        let mut tail: Vec<_> =
            tail.map(|place| (self.sums[place], self.is_summed(place))).collect();
        sort(&mut tail, |(slot, _)| slot.key());
        let mut tail = tail.into_iter().peekable();
        let mut sums = Vec::with_capacity(self.sums.capacity());
        let mut summed = vec![0; self.summed.len()];
        let mut push = |slot: Slot, is_summed: bool| {
            let place = sums.len();
            summed[place / 64] |= u64::from(is_summed) << (place % 64);
            sums.push(slot);
        };
        for (place, &slot) in self.sums.iter().enumerate().take(self.ordered) {
            while let Some((before, is_summed)) = tail.next_if(|(next, _)| next.key() < slot.key())
            {
                push(before, is_summed);
            }
            push(slot, self.is_summed(place));
        }
        tail.for_each(|(slot, is_summed)| push(slot, is_summed));
        (self.sums, self.summed) = (sums, summed);
    }

    fn end_round(&mut self) {
        let is_idle = self.len * TAIL_PART < self.sums.len();
        self.idle_rounds = if is_idle { self.idle_rounds + 1 } else { 0 };
        self.summed.fill(0);
        self.len = 0;
        if self.idle_rounds >= IDLE_ROUNDS || self.sums.len() > KEPT_MAX {
            *self = Self { hasher: self.hasher.clone(), ..Self::default() };
        }
    }
}

/// Sorts by key.
fn sort<T>(items: &mut [T], key: impl Fn(&T) -> (u64, u64)) {
    if items.len() < RADIX_FROM {
        items.sort_unstable_by_key(key);
    } else {
        radsort::sort_by_key(items, key);
    }
}

/// The places of the bits that are set, ascending.
struct Bits(u64);

impl Iterator for Bits {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let bit = self.0.trailing_zeros();
        self.0 &= self.0.wrapping_sub(1);
        (bit < u64::BITS).then_some(bit as usize)
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

    /// Rounds as the drain has them: the same keys again and again, more of them from time to time,
    /// few for a while, and more than are kept.
    #[test]
    fn keys_that_stay_have_the_sums_of_their_round_only() {
        let mut table = FoldTable::default();
        let mut sums = Vec::new();
        let mut is_forgotten = 0;
        let many = KEPT_MAX as u64 + 1;
        // Users of each round: from one on, so many, one in so many.
        let rounds = [(50, 1000, 1), (0, 1100, 3), (7, 2, 1), (0, 900, 2), (0, many, 1), (0, 9, 1)];
        let idle = std::iter::repeat_n((3, 5, 1), IDLE_ROUNDS as usize + 1);
        for (from, count, step) in rounds.into_iter().chain([(0, 4000, 1)]).chain(idle) {
            let users: Vec<_> = (from..from + count).step_by(step).collect();
            // Descending, so that they are never in order by chance.
            for block in users.rchunks(BLOCK) {
                let deltas: Vec<_> = block.iter().map(|&user| (key(1, 5, user), -3)).collect();
                table.add_block(&deltas);
                table.add_block(&deltas);
            }
            assert_eq!(table.len(), users.len());
            let mut unordered: Vec<_> = table.iter().map(|sum| sum.key.user).collect();
            unordered.sort_unstable();
            assert_eq!(unordered, users);
            table.drain_sorted(&mut sums);
            let expected = users.iter().map(|&user| Sum { key: key(1, 5, user), amount: -6 });
            assert!(sums.iter().copied().eq(expected));
            assert_eq!((table.len(), table.iter().count()), (0, 0));
            is_forgotten += usize::from(table.sums.is_empty());
        }
        assert_eq!(is_forgotten, 2, "when there were too many, and when few were used");
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
