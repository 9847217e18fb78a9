//! The journal: numbered, checksummed batches in files that are written once through, synced, and reused.

pub(crate) mod batch;
pub(crate) mod cold;
