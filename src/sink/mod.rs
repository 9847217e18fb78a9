//! Where usage goes: databases and files that follow the journal, taking each batch exactly once.
//!
//! A sink stores two things in one transaction: what a [`UsageBatch`] adds, and the [`Position`] in
//! the engine's journal that it has then reached. A batch names the position it starts from. So a
//! batch that is delivered twice changes nothing the second time, whichever process was killed in
//! between: the position says that it was applied.
//!
//! Sinks are attached when the engine is opened, by [`Builder::sink`](crate::Builder::sink); from
//! then on they receive what is counted, in the background, in order, with retries after failures.
//!
//! [`MemorySink`] is for tests and examples, [`JsonLinesSink`] writes files, `PostgresSink`
//! (feature `postgres`) and `RedisSink` (feature `redis`) write to databases. `docs/sinks.md`
//! describes the tables, keys and lines, and gives the full argument.

mod batch;
mod error;
mod json;
mod json_lines;
mod memory;
#[cfg(feature = "postgres")]
mod postgres;
#[cfg(feature = "redis")]
mod redis;

pub use batch::{Applied, EventRow, Position, UsageBatch, UsageRow};
pub use error::SinkError;
pub use json_lines::JsonLinesSink;
pub use memory::{Fault, MemoryRow, MemorySink, MemoryStore};
#[cfg(feature = "postgres")]
pub use postgres::PostgresSink;
#[cfg(feature = "redis")]
pub use redis::RedisSink;

use crate::model::EngineId;
pub use crate::model::UsageEvent;

/// Takes an engine's usage.
///
/// # Contract
///
/// [`apply`](Self::apply) is one transaction. It requires that the position stored for the batch's
/// engine is [`UsageBatch::from`] (none for a first batch), adds [`UsageRow::added`] to what is
/// stored for each row, stores the [events](UsageBatch::events) if it wants any, and stores
/// [`UsageBatch::to`]. All of it becomes durable, or none.
///
/// | stored position | what `apply` does |
/// | --- | --- |
/// | `from`, or none where `from` is `None` | applies the batch: [`Applied::Now`] |
/// | `to` | nothing: [`Applied::Before`] |
/// | anything else | nothing: [`SinkError::Disagrees`] |
///
/// Amounts are added, not overwritten: engines that share a database count into the same rows,
/// identified by (user, quota's name, window).
///
/// After an error the batch is applied or not applied as a whole. Which of the two may be unknown,
/// or not even decided: a database may still be working on it. The engine reads
/// [`position`](Self::position) after any error, and after a restart, and goes on from there. The
/// end of the batch in doubt stays a boundary: the next batch is that one again, or one that starts
/// where it ends, never a longer one that contains it.
///
/// A sink may be emptied while an engine uses it: usage and positions, in one step. An engine whose
/// position is gone delivers all totals anew. To notice this when there is nothing to deliver, it
/// reads `position` once a minute too, and for each [`deliver`](crate::Tollgate::deliver). Events
/// that it confirmed are not delivered again. A sink that keeps its events then says which of them
/// it stored last ([`last_events`](Self::last_events)), since this may not have been confirmed.
///
/// # What a sink may do
///
/// A sink is called, and dropped, on one of the engine's threads. A call may take its time, but not
/// forever: one that does not return blocks one of the
/// [`worker_count`](crate::DeliveryConfig::worker_count) workers. Through a handle to the engine
/// that calls it, a sink may check, count, define and sync. It must not call
/// [`deliver`](crate::Tollgate::deliver), which would wait for the very call that it comes from,
/// nor [`close`](crate::Tollgate::close), which gives up on the sink after 5 seconds. Nor may it
/// keep a handle for good: the engine owns its sinks, so dropping all other handles would then
/// never close it.
pub trait UsageSink: Send {
    /// The stored position of an engine; `None` when it never delivered.
    ///
    /// The answer is as durable as the sink can make it: once it has been `to`, it is never `from`
    /// again.
    ///
    /// # Errors
    ///
    /// When the sink can't be reached or read.
    fn position(&mut self, engine: EngineId) -> Result<Option<Position>, SinkError>;

    /// Applies a batch and moves the engine's position, in one transaction.
    ///
    /// # Errors
    ///
    /// [`SinkError::is_retryable`] says whether the same call may succeed later.
    fn apply(&mut self, batch: &UsageBatch) -> Result<Applied, SinkError>;

    /// Whether batches for this sink carry events: those recorded since it was first attached as a
    /// sink that wants them. Asked at each open. While no sink of a data directory wants events,
    /// they are not kept.
    fn wants_events(&self) -> bool {
        false
    }

    /// The last batch of an engine whose events are stored, by the number of
    /// [`UsageBatch::to`].
    ///
    /// For sinks whose events may stay when usage and positions are removed. It is asked when the
    /// sink has no position, and the engine does not know whether the sink had applied the batch
    /// that it was sent last: if it is this one, its events are not delivered again. The default,
    /// `None`, is right where events go together with positions.
    ///
    /// # Errors
    ///
    /// When the sink can't be reached or read.
    fn last_events(&mut self, engine: EngineId) -> Result<Option<u64>, SinkError> {
        let _ = engine;
        Ok(None)
    }
}

impl<S: UsageSink + ?Sized> UsageSink for Box<S> {
    fn position(&mut self, engine: EngineId) -> Result<Option<Position>, SinkError> {
        (**self).position(engine)
    }

    fn apply(&mut self, batch: &UsageBatch) -> Result<Applied, SinkError> {
        (**self).apply(batch)
    }

    fn wants_events(&self) -> bool {
        (**self).wants_events()
    }

    fn last_events(&mut self, engine: EngineId) -> Result<Option<u64>, SinkError> {
        (**self).last_events(engine)
    }
}

// Sinks are kept as trait objects.
const _: Option<&dyn UsageSink> = None;
