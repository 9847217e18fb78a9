//! What is delivered: a range of the journal, summed up.

use std::fmt;
use std::sync::Arc;

use super::SinkError;
use crate::model::{EngineId, QuotaId, Timestamp, UsageEvent};

/// A point in an engine's journal: just after a batch.
// Exhaustive: a sink that does not store all of it should not compile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Position {
    /// The number of the batch.
    pub batch: u64,
    /// The checksum of the batch, which reveals a sink that was fed from another history.
    pub check: u32,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "batch {} (check {:08x})", self.batch, self.check)
    }
}

/// Whether a batch was applied by this call.
// Exhaustive: the contract of sinks knows no third.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Applied {
    /// This call applied it.
    Now,
    /// It had been applied before: this call changed nothing.
    Before,
}

/// What an engine's journal adds from one position to another.
#[derive(Debug, Clone, PartialEq)]
pub struct UsageBatch {
    engine: EngineId,
    from: Option<Position>,
    to: Position,
    rows: Vec<UsageRow>,
    events: Vec<EventRow>,
}

impl UsageBatch {
    /// The batch that leads from `from` to the later `to`. Without `from` it is an engine's first
    /// batch, whose rows carry the totals so far as [`UsageRow::added`].
    ///
    /// Rows are sorted by user, quota's name and window, the order in which sinks lock them; rows
    /// with the same key are added up. Events keep their order.
    #[must_use]
    pub fn new(
        engine: EngineId,
        from: Option<Position>,
        to: Position,
        mut rows: Vec<UsageRow>,
        events: Vec<EventRow>,
    ) -> Self {
        // In place, for there may be millions; the ids keep an order among rows of the same key.
        rows.sort_unstable_by(|a, b| (a.key(), a.quota).cmp(&(b.key(), b.quota)));
        rows.dedup_by(|later, kept| {
            let is_same = later.key() == kept.key();
            if is_same {
                kept.added = kept.added.saturating_add(later.added);
                (kept.used, kept.limit) = (later.used, later.limit);
            }
            is_same
        });
        Self { engine, from, to, rows, events }
    }

    /// The engine that counted.
    #[must_use]
    pub fn engine(&self) -> EngineId {
        self.engine
    }

    /// The position that the sink must be at; `None` when the sink must have none for the engine.
    #[must_use]
    pub fn from(&self) -> Option<Position> {
        self.from
    }

    /// The position that the sink is at afterwards.
    #[must_use]
    pub fn to(&self) -> Position {
        self.to
    }

    /// Whether it is the engine's first batch, whose rows carry the totals as `added`.
    #[must_use]
    pub fn is_first(&self) -> bool {
        self.from.is_none()
    }

    /// What was counted, ascending by user, quota's name and window, each key once.
    #[must_use]
    pub fn rows(&self) -> &[UsageRow] {
        &self.rows
    }

    /// The recorded events, in the order in which the log was read. An event that was recorded
    /// after another had been delivered comes later; so, nearly always, does a later event of the
    /// same thread. Empty unless the sink [wants them](super::UsageSink::wants_events).
    #[must_use]
    pub fn events(&self) -> &[EventRow] {
        &self.events
    }

    /// What the contract says to do when `stored` is the engine's stored position: apply the batch
    /// (`Now`), or do nothing (`Before`). For implementors of [`UsageSink`](super::UsageSink).
    ///
    /// # Errors
    ///
    /// [`SinkError::Disagrees`] where the stored position is neither the start nor the end of the
    /// batch.
    pub fn verdict(&self, stored: Option<Position>) -> Result<Applied, SinkError> {
        if stored == Some(self.to) {
            return Ok(Applied::Before);
        }
        if stored == self.from && self.from.is_none_or(|from| from.batch < self.to.batch) {
            return Ok(Applied::Now);
        }
        let Self { engine, from, to, .. } = *self;
        Err(SinkError::Disagrees { engine, stored, from, to })
    }
}

/// What was counted for a user and a quota in a window.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct UsageRow {
    /// The user.
    pub user: u64,
    /// The quota, by its id in the engine's data directory.
    pub quota: QuotaId,
    /// The quota's name, which identifies it across engines that share a sink.
    pub name: Arc<str>,
    /// Amounts are units of 10^-`decimals`.
    pub decimals: u8,
    /// When the window began; `None` for a lifetime.
    pub window_start: Option<Timestamp>,
    /// When the window ends; `None` when it never does.
    pub window_end: Option<Timestamp>,
    /// What the batch adds, in units; negative where more was refunded than consumed.
    pub added: i128,
    /// The engine's usage in the window, in units, when the batch was put together: at its end or a
    /// little later. `None` if the counter had moved on to a later window by then, or was forgotten
    /// after its window.
    pub used: Option<u64>,
    /// The limit that applied to the user when the batch was put together, in units.
    pub limit: u64,
}

impl UsageRow {
    /// A row for a sink's tests: of a lifetime, without decimals, and without a usage, which can
    /// all be set.
    #[must_use]
    pub fn new(
        user: u64,
        quota: QuotaId,
        name: impl Into<Arc<str>>,
        added: i128,
        limit: u64,
    ) -> Self {
        Self {
            user,
            quota,
            name: name.into(),
            decimals: 0,
            window_start: None,
            window_end: None,
            added,
            used: None,
            limit,
        }
    }

    /// The key that a row is stored under. A lifetime starts in 1970, like a window that began
    /// earlier.
    pub(super) fn key(&self) -> (u64, &str, Timestamp) {
        (self.user, &self.name, self.stored_start())
    }

    /// The start of the window as a value: 1970 for a lifetime.
    pub(super) fn stored_start(&self) -> Timestamp {
        self.window_start.unwrap_or(Timestamp::MIN)
    }
}

/// An event of a batch: what was given to [`Tollgate::record`](crate::Tollgate::record).
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct EventRow {
    /// The quota's name.
    pub name: Arc<str>,
    /// The event.
    pub event: UsageEvent,
}

impl EventRow {
    /// A row for a sink's tests.
    #[must_use]
    pub fn new(name: impl Into<Arc<str>>, event: UsageEvent) -> Self {
        Self { name: name.into(), event }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(user: u64, name: &str, start: Option<u64>, added: i128) -> UsageRow {
        UsageRow {
            user,
            quota: QuotaId::from_u16(1),
            name: name.into(),
            decimals: 0,
            window_start: start.map(Timestamp::from_unix_millis),
            window_end: None,
            added,
            used: Some(5),
            limit: 10,
        }
    }

    fn at(batch: u64) -> Position {
        Position { batch, check: 7 }
    }

    #[test]
    fn rows_are_ordered_and_each_key_stands_once() {
        let rows = vec![
            row(2, "a", None, 1),
            row(1, "b", Some(9), 2),
            row(1, "b", Some(3), 3),
            row(1, "a", Some(9), 4),
            row(1, "b", Some(9), -5),
        ];
        let batch = UsageBatch::new(EngineId::from_u128(1), None, at(4), rows, Vec::new());
        let found: Vec<_> = batch.rows().iter().map(|row| (row.key(), row.added)).collect();
        let time = Timestamp::from_unix_millis;
        assert_eq!(
            found,
            [
                ((1, "a", time(9)), 4),
                ((1, "b", time(3)), 3),
                ((1, "b", time(9)), -3),
                ((2, "a", time(0)), 1),
            ]
        );
    }

    #[test]
    fn the_stored_position_decides() {
        let engine = EngineId::from_u128(1);
        let batch = |from| UsageBatch::new(engine, from, at(8), Vec::new(), Vec::new());
        let next = batch(Some(at(4)));
        assert_eq!(next.verdict(Some(at(4))).unwrap(), Applied::Now);
        assert_eq!(next.verdict(Some(at(8))).unwrap(), Applied::Before);
        let other = Position { batch: 4, check: 8 };
        for stored in [None, Some(at(3)), Some(at(9)), Some(other)] {
            let error = next.verdict(stored).unwrap_err();
            assert!(matches!(error, SinkError::Disagrees { .. }), "{stored:?}: {error}");
        }
        assert_eq!(batch(None).verdict(None).unwrap(), Applied::Now);
        assert_eq!(batch(None).verdict(Some(at(8))).unwrap(), Applied::Before);
        assert!(batch(None).verdict(Some(at(4))).is_err());
        assert!(batch(Some(at(9))).verdict(Some(at(9))).is_err(), "a batch goes forward");
    }
}
