//! The write-ahead log: memory-mapped rings that survive the death of the process.

pub(crate) mod crc;
pub(crate) mod lane;
pub(crate) mod lanes;
pub(crate) mod operation;
pub(crate) mod payload;
pub(crate) mod record;
pub(crate) mod region;
