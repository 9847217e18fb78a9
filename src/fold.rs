//! Summing: (user, quota, window) -> a plain wide sum.
//!
//! Deltas commute, so batches, snapshots and lanes are all folded by the same addition, unclamped.
//! Only recovery clamps, when it loads the counters.

use std::hash::BuildHasher;

use foldhash::fast::RandomState;
use smallvec::SmallVec;

use crate::model::{QuotaId, WindowStart};

/// What a sum is kept for. The order of the fields is the order on disk: quota, window, user.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SumKey {
    pub(crate) quota: QuotaId,
    pub(crate) window: WindowStart,
    pub(crate) user: u64,
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

/// Sums deltas by key: a dense list of sums, and an index into it by linear probing.
///
/// Not a map from a library: none says where a key would be before it is looked up, and waiting for
/// one look-up after the other is what the drain's time would go to.
#[derive(Debug, Default)]
pub(crate) struct FoldTable {
    sums: Vec<Slot>,
    /// Places in `sums`, counted from 1; 0 is free. A power of two, at most half of it taken; empty
    /// at first.
    index: Vec<u32>,
    hasher: RandomState,
}

/// A sum, with its key packed so that the order is that of [`SumKey`].
#[derive(Debug, Clone, Copy)]
struct Slot {
    /// Quota and window.
    place: u64,
    user: u64,
    amount: i128,
}

const QUOTA_SHIFT: u32 = 48;
const _: () = assert!(WindowStart::MAX.0 >> QUOTA_SHIFT == 0);

impl Slot {
    fn new(key: SumKey, amount: i128) -> Self {
        let place = u64::from(key.quota.as_u16()) << QUOTA_SHIFT | key.window.0;
        Self { place, user: key.user, amount }
    }

    fn is_same(&self, other: &Self) -> bool {
        (self.place, self.user) == (other.place, other.user)
    }

    fn sum(self) -> Sum {
        let quota = QuotaId::from_u16((self.place >> QUOTA_SHIFT) as u16);
        let window = WindowStart(self.place & WindowStart::MAX.0);
        Sum { key: SumKey { quota, window, user: self.user }, amount: self.amount }
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
        let mask = self.index.len() - 1;
        // Three rounds of loads that don't wait for each other.
        let mut probes = [(0, 0); BLOCK];
        for (probe, item) in probes.iter_mut().zip(block) {
            let home = self.home(&slot(item));
            *probe = (home, self.index[home & mask]);
        }
        for ((home, place), item) in probes.into_iter().zip(block) {
            let slot = slot(item);
            let total = match (place as usize).checked_sub(1).and_then(|p| self.sums.get_mut(p)) {
                Some(sum) if sum.is_same(&slot) => &mut sum.amount,
                _ => &mut self.find_from(home, slot).amount,
            };
            *total = total.checked_add(slot.amount)?;
        }
        Some(())
    }

    /// Adds a wide delta that comes from a file; `None` when the sum overflows, which only damage
    /// can cause.
    pub(crate) fn add_checked(&mut self, sum: Sum) -> Option<()> {
        self.reserve(1);
        let slot = Slot::new(sum.key, sum.amount);
        let home = self.home(&slot);
        let total = self.find_from(home, slot);
        total.amount = total.amount.checked_add(sum.amount)?;
        Some(())
    }

    /// The sum with this key, from zero where it is not there.
    fn find_from(&mut self, home: usize, slot: Slot) -> &mut Slot {
        let mask = self.index.len() - 1;
        let mut at = home & mask;
        let place = loop {
            let Some(place) = (self.index[at] as usize).checked_sub(1) else {
                self.sums.push(Slot { amount: 0, ..slot });
                self.index[at] = u32::try_from(self.sums.len()).unwrap_or(u32::MAX);
                break self.sums.len() - 1;
            };
            if self.sums[place].is_same(&slot) {
                break place;
            }
            at = (at + 1) & mask;
        };
        &mut self.sums[place]
    }

    #[inline]
    fn home(&self, slot: &Slot) -> usize {
        #[expect(clippy::cast_possible_truncation, reason = "64-bit platforms only")]
        let hash = self.hasher.hash_one((slot.place, slot.user)) as usize;
        hash
    }

    /// Makes room for more keys, so that at most half of the index is taken.
    fn reserve(&mut self, more: usize) {
        let needed = (self.sums.len() + more) * 2;
        if needed > self.index.len() {
            self.index.clear();
            self.index.resize(needed.next_power_of_two(), 0);
            let mask = self.index.len() - 1;
            for (place, slot) in (1..).zip(&self.sums) {
                let mut at = self.home(slot) & mask;
                while self.index[at] != 0 {
                    at = (at + 1) & mask;
                }
                self.index[at] = place;
            }
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

    /// Moves the sums out, ascending by key, keeping the memory for the next round. Sums of zero
    /// are kept: that something happened in a window is part of the state.
    pub(crate) fn drain_sorted(&mut self, out: &mut Vec<Sum>) {
        if self.sums.len() < RADIX_FROM {
            self.sums.sort_unstable_by_key(|slot| (slot.place, slot.user));
        } else {
            radsort::sort_by_key(&mut self.sums, |slot| (slot.place, slot.user));
        }
        out.clear();
        out.extend(self.sums.iter().map(|slot| slot.sum()));
        // As large as this round needed it, so that one large round does not slow all later ones.
        self.index.clear();
        self.index.resize((self.sums.len() * 2).next_power_of_two(), 0);
        self.sums.clear();
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
