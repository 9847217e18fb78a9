//! The write-ahead log: memory-mapped rings that survive the death of the process.

pub(crate) mod region;
