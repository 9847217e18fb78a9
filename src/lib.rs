//! An embedded quota engine.

mod clock;
mod codec;
mod config;
mod error;
mod fold;
mod journal;
mod model;
mod storage;
mod sync;
mod wal;

pub use clock::{Clock, CoarseClock, ManualClock, SystemClock};
pub use config::{Backpressure, Config, DeliveryConfig};
pub use error::{Error, Result};
pub use model::{
    AMOUNT_MAX, Consume, Decision, EngineId, Quota, QuotaId, Timestamp, Usage, Window,
};
