//! Who may use how much: the counters, in memory. Never calls the log.

mod bias;
pub(crate) mod cell;
mod entry;
pub(crate) mod quotas;
pub(crate) mod remembered;
pub(crate) mod reservations;
pub(crate) mod reserved;
pub(crate) mod settled;
pub(crate) mod shared;
pub(crate) mod table;
pub(crate) mod word;
