//! The background threads: they move what the lanes hold to the disk, and never look at the
//! counters.
//!
//! Besides the sums of the lanes, batches hold *cold events*, the journal's metadata records, such
//! as a definition or a limit that a caller changes; see [`journal::cold`](crate::journal::cold).
//! They do not go through lanes. The drain queues each under a ticket, and a commit covers it as it
//! covers records.

pub(crate) mod commit;
pub(crate) mod compact;
pub(crate) mod drain;
mod events;
mod tally;
pub(crate) mod threads;
mod turns;

#[cfg(all(test, loom))]
mod loom_tests;
