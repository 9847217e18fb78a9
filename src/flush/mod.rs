//! The threads behind the callers: they move what the lanes hold to the disk, and never look at the
//! counters.

pub(crate) mod commit;
pub(crate) mod compact;
pub(crate) mod drain;
pub(crate) mod threads;
mod turns;

#[cfg(all(test, loom))]
mod loom_tests;
