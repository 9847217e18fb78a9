//! What changes rarely, folded batch by batch: definitions, limits, the rings, and how far each has
//! been read.
//!
//! Pure, and shared by merge and recovery, so that both refuse the same chains of batches.

use std::collections::BTreeMap;

use crate::codec::DecodeResult;
use crate::error::Result;
use crate::journal::batch::{Batch, BatchHeader, LaneSpan};
use crate::journal::cold::{ColdEvent, Generation};
use crate::journal::writer::ChainPoint;
use crate::ledger::{Ledger, LedgerEvent, Remembering};
use crate::model::{AMOUNT_MAX, Definition, QuotaId, Timestamp, WindowStart};
use crate::snapshot::manifest::check_generation;
use crate::snapshot::{Manifest, SnapshotReader};

/// The state after the last batch applied.
#[derive(Debug, Clone)]
pub(crate) struct ColdState {
    last: ChainPoint,
    /// What the clock showed when the last batch was written. No batch: nothing came after it.
    shown: Timestamp,
    definitions: BTreeMap<QuotaId, Definition>,
    floors: BTreeMap<QuotaId, WindowStart>,
    /// Since the snapshot; `None` where a user is back at the quota's limit.
    limit_changes: BTreeMap<(QuotaId, u64), Option<u64>>,
    generation: Option<Generation>,
    lanes: Vec<u64>,
    ledger: Ledger,
}

impl ColdState {
    /// Before the first batch.
    pub(crate) fn new() -> Self {
        Self {
            last: ChainPoint::START,
            shown: Timestamp::MAX,
            definitions: BTreeMap::new(),
            floors: BTreeMap::new(),
            limit_changes: BTreeMap::new(),
            generation: None,
            lanes: Vec::new(),
            ledger: Ledger::default(),
        }
    }

    /// As a snapshot left it, of which nothing but the head was read yet. The snapshot's limits are
    /// not in it, only the changes since.
    pub(crate) fn from_snapshot(snapshot: &mut SnapshotReader) -> Result<Self> {
        let mut state = Self::from_manifest(snapshot.manifest());
        snapshot.read_events(&mut |event| state.remember(event))?;
        Ok(state)
    }

    /// As the head of a snapshot says.
    pub(crate) fn from_manifest(manifest: &Manifest) -> Self {
        let definitions = manifest.definitions.iter();
        let floors = manifest.floors.iter();
        Self {
            last: manifest.point(),
            shown: Timestamp::MAX,
            definitions: definitions
                .map(|definition| (definition.id, definition.clone()))
                .collect(),
            floors: floors.map(|&(quota, window)| (QuotaId(quota), WindowStart(window))).collect(),
            limit_changes: BTreeMap::new(),
            generation: Some(manifest.generation.clone()),
            lanes: manifest.lanes.clone(),
            ledger: Ledger::default(),
        }
    }

    /// Applies the batch that follows the last one. After an error the state must not be used
    /// further.
    ///
    /// The spans of a batch are of the generation before the batch: one that begins a generation
    /// covers what the rings still held of the one before.
    pub(crate) fn apply(&mut self, batch: &Batch<'_>) -> DecodeResult<()> {
        let BatchHeader { number, time, previous_check, check, .. } = batch.header;
        if self.last.number.0.checked_add(1) != Some(number.0) {
            return Err("it does not follow the batch before it by number");
        }
        if self.last.check != previous_check {
            return Err("it does not follow the batch before it by check");
        }
        for span in &batch.spans {
            self.advance(span)?;
        }
        for event in &batch.cold {
            self.change(event)?;
        }
        let mut events = batch.events();
        while let Some(event) = events.next_event()? {
            self.remember(event)?;
        }
        if batch.cold.iter().any(|event| matches!(event, ColdEvent::Generation(_))) {
            self.ledger.end_generation();
        }
        self.last = ChainPoint { number, check };
        self.shown = time;
        Ok(())
    }

    /// Applies an event of a batch, of a snapshot or of a lane beyond the last batch.
    #[inline(always)]
    pub(crate) fn remember(&mut self, event: LedgerEvent) -> DecodeResult<()> {
        let is_defined = match &event {
            LedgerEvent::Open { parts, .. } | LedgerEvent::Settle { parts, .. } => {
                parts.iter().all(|part| self.knows(part.quota))
            }
            LedgerEvent::Answer(answer) => self.knows(answer.quota),
            LedgerEvent::Recorded(recorded) => self.knows(recorded.quota),
            LedgerEvent::Extend { .. } => true,
        };
        if !is_defined {
            return Err("a reservation, a request or an event of an unknown quota");
        }
        self.ledger.apply(event);
        Ok(())
    }

    /// Forgets the oldest of what has ended, where there is much more than is remembered: between
    /// batches, so that memory does not grow with how many there are.
    pub(crate) fn bound(&mut self, remembering: Remembering, now: Timestamp) {
        self.ledger.bound(remembering, now, self.shown);
    }

    /// Forgets what need not be remembered any longer.
    pub(crate) fn prune(&mut self, remembering: Remembering, now: Timestamp) {
        self.ledger.prune(remembering, now, self.shown);
    }

    pub(crate) fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// What leads to what is remembered, and leaves none behind.
    pub(crate) fn take_events(&mut self) -> impl Iterator<Item = LedgerEvent> {
        std::mem::take(&mut self.ledger).into_events()
    }

    pub(crate) fn into_ledger(self) -> Ledger {
        self.ledger
    }

    fn advance(&mut self, span: &LaneSpan) -> DecodeResult<()> {
        let lane = self.lanes.get_mut(usize::from(span.lane));
        let next = lane.ok_or("a span of a lane that does not exist")?;
        if *next != span.from {
            return Err("a span that does not continue its lane");
        }
        *next = span.next;
        Ok(())
    }

    fn change(&mut self, event: &ColdEvent) -> DecodeResult<()> {
        match event {
            ColdEvent::Define(definition) => self.define(definition),
            &ColdEvent::SetLimit { user, quota, limit } => {
                if limit > AMOUNT_MAX {
                    return Err("a limit above 2^63 - 1");
                }
                self.change_limit(QuotaId(quota), user, Some(limit))
            }
            &ColdEvent::ClearLimit { user, quota } => self.change_limit(QuotaId(quota), user, None),
            ColdEvent::Generation(generation) => self.begin_generation(generation),
        }
    }

    fn define(&mut self, definition: &Definition) -> DecodeResult<()> {
        let meaning = |definition: &Definition| (definition.calendar, definition.decimals);
        let defined = self.definitions.insert(definition.id, definition.clone());
        if defined.is_some_and(|old| meaning(&old) != meaning(definition)) {
            return Err("a quota whose window or decimals change under the same id");
        }
        Ok(())
    }

    fn change_limit(&mut self, quota: QuotaId, user: u64, limit: Option<u64>) -> DecodeResult<()> {
        if !self.definitions.contains_key(&quota) {
            return Err("a limit of an unknown quota");
        }
        self.limit_changes.insert((quota, user), limit);
        Ok(())
    }

    fn begin_generation(&mut self, generation: &Generation) -> DecodeResult<()> {
        check_generation(generation)?;
        if self.generation.as_ref().is_some_and(|old| old.number >= generation.number) {
            return Err("a generation that is not newer than the one before");
        }
        let rings = &generation.rings;
        if rings.iter().zip(&self.lanes).any(|(ring, &next)| ring.base < next) {
            return Err("a generation that uses record numbers again");
        }
        self.lanes = rings.iter().map(|ring| ring.base).collect();
        self.generation = Some(generation.clone());
        Ok(())
    }

    /// The last batch applied.
    pub(crate) fn last(&self) -> ChainPoint {
        self.last
    }

    /// Ascending by id.
    pub(crate) fn definitions(&self) -> impl Iterator<Item = &Definition> {
        self.definitions.values()
    }

    pub(crate) fn definition(&self, quota: QuotaId) -> Option<&Definition> {
        self.definitions.get(&quota)
    }

    /// Whether the quota is defined.
    pub(crate) fn knows(&self, quota: QuotaId) -> bool {
        self.definitions.contains_key(&quota)
    }

    /// Of windows of the quota that start below this nothing is kept but what a reservation holds.
    pub(crate) fn floor(&self, quota: QuotaId) -> WindowStart {
        self.floors.get(&quota).copied().unwrap_or(WindowStart(0))
    }

    /// The rings in use; `None` before the first batch.
    pub(crate) fn generation(&self) -> Option<&Generation> {
        self.generation.as_ref()
    }

    /// The number of the first record of a lane that no batch contains.
    pub(crate) fn lane(&self, lane: usize) -> Option<u64> {
        self.lanes.get(lane).copied()
    }

    /// The limits that were set (`Some`) and taken back (`None`) since the snapshot.
    pub(crate) fn limit_changes(&self) -> &BTreeMap<(QuotaId, u64), Option<u64>> {
        &self.limit_changes
    }

    /// Raises the floors to `horizon`; they never sink, also when the clock that made it did.
    pub(crate) fn raise_floors(&mut self, horizon: &dyn Fn(&Definition) -> WindowStart) {
        for (&quota, definition) in &self.definitions {
            let raised = horizon(definition).min(WindowStart::MAX);
            if raised > self.floor(quota) {
                self.floors.insert(quota, raised);
            }
        }
    }

    /// The manifest of a snapshot of this state.
    pub(crate) fn manifest(&self, created: Timestamp) -> DecodeResult<Manifest> {
        let generation = self.generation.clone().ok_or("no batch began a generation")?;
        Ok(Manifest {
            number: self.last.number.0,
            check: self.last.check,
            generation,
            lanes: self.lanes.clone(),
            definitions: self.definitions.values().cloned().collect(),
            floors: self.floors.iter().map(|(quota, window)| (quota.0, window.0)).collect(),
            created: created.as_unix_millis(),
        })
    }
}
