//! A sink in memory, for tests and examples.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;

use super::{Applied, EventRow, Position, SinkError, UsageBatch, UsageSink};
use crate::model::{EngineId, Timestamp};

const KIND: &str = "memory";

/// Takes usage into a [`MemoryStore`].
///
/// ```
/// use tollgate::sink::{MemoryStore, Position, UsageBatch, UsageRow, UsageSink};
/// use tollgate::{EngineId, QuotaId};
///
/// let store = MemoryStore::new();
/// let mut sink = store.sink();
/// let row = UsageRow::new(42, QuotaId::from_u16(0), "requests", 3, 1_000);
/// let to = Position { batch: 1, check: 0xabcd };
/// let batch = UsageBatch::new(EngineId::from_u128(1), None, to, vec![row], Vec::new());
/// sink.apply(&batch)?;
/// sink.apply(&batch)?; // a repeat changes nothing
/// assert_eq!(store.used(42, "requests", None), 3);
/// # Ok::<(), tollgate::sink::SinkError>(())
/// ```
#[derive(Debug)]
pub struct MemorySink {
    store: MemoryStore,
}

/// What [`MemorySink`]s have taken; clones are handles to the same store.
#[derive(Debug, Clone, Default)]
pub struct MemoryStore {
    state: Arc<Mutex<State>>,
}

/// What is stored for a user and a quota in a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct MemoryRow {
    /// The sum of what was added, in units.
    pub used: i128,
    /// The limit of the latest delivery, in units.
    pub limit: u64,
    /// Amounts are units of 10^-`decimals`.
    pub decimals: u8,
    /// When the window ends; `None` when it never does.
    pub window_end: Option<Timestamp>,
}

/// A failure for a call of [`UsageSink::apply`] to meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Fault {
    /// The batch is not applied, and the call fails.
    BeforeCommit,
    /// The batch is applied, and the call fails as if the confirmation had been lost.
    AfterCommit,
}

/// User, quota's name, start of the window.
type Key = (u64, Arc<str>, Option<Timestamp>);

#[derive(Debug, Clone, Default)]
struct State {
    rows: BTreeMap<Key, MemoryRow>,
    events: Vec<EventRow>,
    positions: HashMap<EngineId, Position>,
    faults: VecDeque<Fault>,
}

impl MemoryStore {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A sink that takes usage into this store.
    #[must_use]
    pub fn sink(&self) -> MemorySink {
        MemorySink { store: self.clone() }
    }

    /// The usage of a user and a quota in the window that begins at `window_start`, in units; 0
    /// where there is none.
    #[must_use]
    pub fn used(&self, user: u64, quota: &str, window_start: Option<Timestamp>) -> i128 {
        let key = (user, Arc::from(quota), window_start);
        self.state.lock().rows.get(&key).map_or(0, |row| row.used)
    }

    /// All rows, by user, quota's name and start of the window.
    #[must_use]
    pub fn rows(&self) -> BTreeMap<(u64, Arc<str>, Option<Timestamp>), MemoryRow> {
        self.state.lock().rows.clone()
    }

    /// All events, in the order in which they came.
    #[must_use]
    pub fn events(&self) -> Vec<EventRow> {
        self.state.lock().events.clone()
    }

    /// The position of an engine.
    #[must_use]
    pub fn position(&self, engine: EngineId) -> Option<Position> {
        self.state.lock().positions.get(&engine).copied()
    }

    /// Another store with the same contents.
    #[cfg(test)]
    #[cfg(not(loom))]
    pub(crate) fn duplicate(&self) -> Self {
        let state = self.state.lock().clone();
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// Makes a future call of [`UsageSink::apply`] fail: the next one, or, after earlier calls of
    /// this function, the one after theirs.
    pub fn inject(&self, fault: Fault) {
        self.state.lock().faults.push_back(fault);
    }
}

impl UsageSink for MemorySink {
    fn position(&mut self, engine: EngineId) -> Result<Option<Position>, SinkError> {
        Ok(self.store.position(engine))
    }

    fn apply(&mut self, batch: &UsageBatch) -> Result<Applied, SinkError> {
        let mut state = self.store.state.lock();
        let fault = state.faults.pop_front();
        if fault == Some(Fault::BeforeCommit) {
            return Err(SinkError::unavailable(KIND, "apply a batch", "an injected fault"));
        }
        let applied = state.apply(batch)?;
        if fault == Some(Fault::AfterCommit) {
            return Err(SinkError::OutcomeUnknown {
                sink: KIND,
                source: "an injected fault".into(),
            });
        }
        Ok(applied)
    }

    fn wants_events(&self) -> bool {
        true
    }
}

impl State {
    fn apply(&mut self, batch: &UsageBatch) -> Result<Applied, SinkError> {
        let stored = self.positions.get(&batch.engine()).copied();
        if batch.verdict(stored)? == Applied::Before {
            return Ok(Applied::Before);
        }
        let mut changed = Vec::with_capacity(batch.rows().len());
        for row in batch.rows() {
            let key = (row.user, row.name.clone(), row.window_start);
            let (decimals, window_end) = (row.decimals, row.window_end);
            let stored = self.rows.get(&key);
            if stored.is_some_and(|it| (it.decimals, it.window_end) != (decimals, window_end)) {
                return Err(SinkError::other_meaning(KIND, &row.name));
            }
            let used = stored.map_or(0, |stored| stored.used);
            let used = used.checked_add(row.added).ok_or_else(|| {
                SinkError::bad_data(KIND, format!("{used} plus {} overflows", row.added))
            })?;
            changed.push((key, MemoryRow { used, limit: row.limit, decimals, window_end }));
        }
        self.rows.extend(changed);
        self.events.extend_from_slice(batch.events());
        self.positions.insert(batch.engine(), batch.to());
        Ok(Applied::Now)
    }
}
