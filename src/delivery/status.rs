//! What callers are told about a sink.

use std::fmt;
use std::time::Duration;

use crate::model::Timestamp;
use crate::sink::Position;

/// The state of deliveries to a sink. See [`Tollgate::sinks`](crate::Tollgate::sinks).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SinkStatus {
    /// The name under which it was attached.
    pub name: String,
    /// Whether it is attached now. If it is not, what it misses is kept, in merged form, until it
    /// is attached again or [forgotten](crate::forget_sink).
    pub is_attached: bool,
    /// The last position that it confirmed; `None` when it has none, or is not known to have one.
    pub position: Option<Position>,
    /// The end of a delivery that was sent and is not confirmed yet.
    pub in_flight: Option<Position>,
    /// Durable batches of the journal after the position.
    pub lag_batches: u64,
    /// The age of the oldest batch that it has not got, at most the time since the directory was
    /// opened; zero when nothing is missing. It may be too small by a second, or too large by a
    /// sixteenth of its recent values.
    pub lag: Duration,
    /// Bytes of files that hold what it has not got and the journal no longer has.
    pub backlog_bytes: u64,
    /// Deliveries that it confirmed since the directory was opened.
    pub deliveries: u64,
    /// Rows in those deliveries.
    pub rows: u64,
    /// Events in those deliveries.
    pub events: u64,
    /// Attempts that failed since the directory was opened.
    pub failures: u64,
    /// Attempts that failed since the last one that succeeded.
    pub failures_in_a_row: u32,
    /// Why the last attempt failed, or that the current one hangs; `None` once one succeeds.
    pub last_error: Option<String>,
    /// Whether it works, for [`health`](crate::Tollgate::health).
    pub condition: SinkCondition,
    /// When it last confirmed a delivery.
    pub last_delivery: Option<Timestamp>,
}

/// Whether a sink works.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum SinkCondition {
    /// It takes what it is given, or has not been called yet; or it failed a few times and is being
    /// retried.
    Fine,
    /// It failed more often than [`retry_attempts`](crate::DeliveryConfig::retry_attempts) in a
    /// row, and attempts go on; or a call to it has not returned for 90 seconds.
    Down,
    /// It refused, for a reason that does not pass by itself. Attempts go on, at longer intervals.
    Refused,
    /// It was attached before, and is not now.
    Missing,
}

impl fmt::Display for SinkCondition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fine => "fine",
            Self::Down => "down",
            Self::Refused => "refused",
            Self::Missing => "missing",
        })
    }
}
