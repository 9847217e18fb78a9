//! The vocabulary: quotas, windows, amounts, decisions. Pure; no clock, no file, no atomics.

mod ids;

pub use ids::{AMOUNT_MAX, EngineId, QuotaId};
pub(crate) use ids::{BatchNumber, WindowStart};
