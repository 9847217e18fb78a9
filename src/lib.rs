//! An embedded quota engine.

mod error;
mod fold;
mod model;
mod storage;
mod sync;
mod wal;

pub use error::{Error, Result};
pub use model::{AMOUNT_MAX, EngineId, QuotaId};
