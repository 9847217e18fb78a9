//! Summing: (user, quota, window) -> a plain wide sum.
//!
//! Deltas commute, so batches, snapshots and lanes are all folded by the same addition, unclamped. Only recovery
//! clamps, when it loads the counters.

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
