//! Cold events: the journal's metadata records. They hold what changes rarely and must survive,
//! besides the sums that every batch consists of: definitions, limits, generations of the log.
//! Encoded with bincode.

use bincode::{Decode, Encode};

use crate::model::Definition;

/// More than any ring holds that was written.
pub(crate) const CAPACITY_MAX: u64 = 1 << 26;

/// A change of cold state, in a batch. The order of the variants is part of the format.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) enum ColdEvent {
    /// A quota is defined, or its default limit changes.
    Define(Definition),
    /// A user's limit for a quota.
    SetLimit { user: u64, quota: u16, limit: u64 },
    /// Back to the quota's default limit.
    ClearLimit { user: u64, quota: u16 },
    /// The rings are used anew: from this batch on, their records are sealed with this salt.
    Generation(Generation),
}

/// One use of the rings, from an open to the death of the process.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Generation {
    /// Counts the opens of the data directory; the first is 1.
    pub(crate) number: u64,
    /// Random; seals the records of this generation.
    pub(crate) salt: u64,
    /// The machine's boot id, to tell a crash of the process from one of the machine. Zero when
    /// unknown.
    pub(crate) boot: u128,
    /// The rings, in the order of the lanes.
    pub(crate) rings: Vec<RingRef>,
}

/// Where a lane's ring lies and where it starts.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) struct RingRef {
    /// The generation that created the file: part of its name.
    pub(crate) created: u64,
    /// Capacity in records, a power of two.
    pub(crate) capacity: u64,
    /// The number of the first record of this generation in this lane.
    pub(crate) base: u64,
}
