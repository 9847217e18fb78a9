//! Summing: (user, quota, window) -> a plain wide sum.
//!
//! Deltas commute, so batches, snapshots and lanes are all folded by the same addition, unclamped.
//! Only recovery clamps, when it loads the counters.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use foldhash::fast::RandomState;

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

/// Sums deltas by key.
#[derive(Debug, Default)]
pub(crate) struct FoldTable {
    sums: HashMap<SumKey, i128, RandomState>,
}

impl FoldTable {
    /// Adds a delta. A sum can't overflow: 2^64 deltas of 2^63 fit an `i128`; batches from disk are
    /// added through [`add_checked`](Self::add_checked).
    #[inline]
    pub(crate) fn add(&mut self, key: SumKey, delta: i64) {
        *self.sums.entry(key).or_insert(0) += i128::from(delta);
    }

    /// Adds a wide delta that comes from a file; `None` when the sum overflows, which only damage
    /// can cause.
    pub(crate) fn add_checked(&mut self, sum: Sum) -> Option<()> {
        match self.sums.entry(sum.key) {
            Entry::Occupied(mut total) => {
                *total.get_mut() = total.get().checked_add(sum.amount)?;
            }
            Entry::Vacant(vacant) => {
                vacant.insert(sum.amount);
            }
        }
        Some(())
    }

    /// How many keys have a sum.
    pub(crate) fn len(&self) -> usize {
        self.sums.len()
    }

    /// The sums, in no order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Sum> {
        self.sums.iter().map(|(&key, &amount)| Sum { key, amount })
    }

    /// Moves the sums out, ascending by key, keeping the memory for the next round. Sums of zero
    /// are kept: that something happened in a window is part of the state.
    pub(crate) fn drain_sorted(&mut self, out: &mut Vec<Sum>) {
        out.clear();
        out.extend(self.sums.drain().map(|(key, amount)| Sum { key, amount }));
        out.sort_unstable_by_key(|sum| sum.key);
    }
}
