//! The vocabulary: quotas, windows, amounts, decisions. Pure; no clock, no file, no atomics.

mod amount;
mod civil;
mod decision;
mod definition;
mod event;
mod ids;
mod quota;
mod reserved;
mod timestamp;
mod window;

pub(crate) use amount::units_from_f64;
pub(crate) use decision::Answered;
pub use decision::{Consume, Decision, Decisions, Usage};
pub(crate) use definition::Definition;
pub use event::UsageEvent;
pub use ids::{AMOUNT_MAX, EngineId, ParseIdError, QuotaId, ReservationId};
pub(crate) use ids::{BatchNumber, WindowStart, is_valid_amount};
pub use quota::{Overrun, Quota};
pub use reserved::OpenReservation;
pub use timestamp::{ParseTimestampError, Timestamp};

pub use window::{ParseWindowError, Window};
