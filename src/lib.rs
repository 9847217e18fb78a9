//! An embedded quota engine.

mod codec;
mod error;
mod fold;
mod journal;
mod model;
mod storage;
mod sync;
mod wal;

pub use error::{Error, Result};
pub use model::{AMOUNT_MAX, EngineId, QuotaId};
