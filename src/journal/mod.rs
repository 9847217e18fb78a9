//! The journal: numbered, checksummed batches in files that are written once through, synced, and
//! reused.
//!
//! One thread at a time appends (it holds the drain's lock), another prepares files ahead of it, a
//! third reads what is durable to merge it into a snapshot.

pub(crate) mod batch;
mod checksums;
pub(crate) mod cold;
pub(crate) mod files;
pub(crate) mod found;
pub(crate) mod pool;
pub(crate) mod proof;
pub(crate) mod reader;
pub(crate) mod walk;
pub(crate) mod writer;

#[cfg(test)]
mod tests;
