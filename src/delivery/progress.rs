//! How deliveries to one sink go, for statistics and health. Read without waiting for the sink or
//! for the disk.

use std::time::Duration;

use crate::clock::uptime;
use crate::delivery::outlet::Failure;
use crate::delivery::state::SinkState;
use crate::delivery::{SinkCondition, SinkStatus};
use crate::journal::writer::ChainPoint;
use crate::model::{BatchNumber, Timestamp};
use crate::sink::Position;

/// A call of a sink that takes longer than this counts as one that hangs. PostgreSQL gives a
/// statement 60 seconds.
pub(crate) const CALL_MAX: Duration = Duration::from_secs(90);

#[derive(Debug)]
pub(super) struct Progress {
    confirmed: Option<ChainPoint>,
    in_flight: Option<ChainPoint>,
    /// Something has been waiting since then.
    behind_since: Option<Duration>,
    pub(super) backlog_bytes: u64,
    deliveries: u64,
    rows: u64,
    events: u64,
    failures: u64,
    /// Those that do not pass by themselves.
    refusals: u64,
    failures_in_a_row: u32,
    last_error: Option<String>,
    condition: SinkCondition,
    last_delivery: Option<Timestamp>,
    /// When the sink was called, while it has not answered.
    called_at: Option<Duration>,
}

/// How many attempts failed so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Failures {
    pub(super) all: u64,
    pub(super) refusals: u64,
}

impl Progress {
    pub(super) fn new(state: &SinkState) -> Self {
        Self {
            confirmed: state.confirmed,
            in_flight: state.in_flight,
            behind_since: None,
            backlog_bytes: 0,
            deliveries: 0,
            rows: 0,
            events: 0,
            failures: 0,
            refusals: 0,
            failures_in_a_row: 0,
            last_error: None,
            condition: SinkCondition::Fine,
            last_delivery: None,
            called_at: None,
        }
    }

    pub(super) fn called(&mut self) {
        self.called_at = Some(uptime());
    }

    pub(super) fn returned(&mut self) {
        self.called_at = None;
    }

    /// Takes over where the sink is, and notes since when it has been behind.
    pub(super) fn look(&mut self, state: &SinkState, durable: BatchNumber) {
        (self.confirmed, self.in_flight) = (state.confirmed, state.in_flight);
        if self.lag(durable) == 0 {
            self.behind_since = None;
        } else {
            self.behind_since.get_or_insert_with(uptime);
        }
    }

    /// As [`look`](Self::look), after the sink has confirmed something: what is missing now is
    /// younger.
    pub(super) fn confirmed(&mut self, state: &SinkState, durable: BatchNumber) {
        self.behind_since = None;
        self.look(state, durable);
    }

    pub(super) fn delivered(&mut self, [rows, events]: [u64; 2], now: Timestamp) {
        self.deliveries += 1;
        self.rows += rows;
        self.events += events;
        self.last_delivery = Some(now);
    }

    /// An attempt went well, or there was nothing to do. Whether that is worth logging, without
    /// the lock of this: whoever gets what is logged may ask how the engine is.
    pub(super) fn succeeded(&mut self) -> bool {
        self.failures_in_a_row = 0;
        self.last_error = None;
        std::mem::replace(&mut self.condition, SinkCondition::Fine) != SinkCondition::Fine
    }

    /// Returns how many have failed in a row, and whether this is worth logging, as above.
    pub(super) fn failed(&mut self, failure: &Failure, attempts_max: u32) -> (u32, bool) {
        self.failures += 1;
        self.failures_in_a_row = self.failures_in_a_row.saturating_add(1);
        self.refusals += u64::from(!failure.is_retryable);
        let condition = if !failure.is_retryable {
            SinkCondition::Refused
        } else if self.failures_in_a_row > attempts_max {
            SinkCondition::Down
        } else {
            self.condition
        };
        let reason = &failure.reason;
        let is_news = condition != self.condition || self.last_error.as_ref() != Some(reason);
        self.condition = condition;
        self.last_error = Some(reason.clone());
        (self.failures_in_a_row, is_news)
    }

    fn lag(&self, durable: BatchNumber) -> u64 {
        let confirmed = self.confirmed.map_or(0, |point| point.number.0);
        durable.0.saturating_sub(confirmed)
    }

    pub(super) fn has(&self, batch: BatchNumber) -> bool {
        self.lag(batch) == 0
    }

    pub(super) fn failures(&self) -> Failures {
        Failures { all: self.failures, refusals: self.refusals }
    }

    pub(super) fn last_error(&self) -> Option<&str> {
        self.last_error.as_deref()
    }

    /// What is told of the sink at `now`, by uptime. A call that hangs is said, since nothing fails
    /// as long as it does.
    pub(super) fn status(
        &self,
        sink: &str,
        is_attached: bool,
        durable: BatchNumber,
        now: Duration,
    ) -> SinkStatus {
        let position = |point: ChainPoint| Position { batch: point.number.0, check: point.check };
        let lag_batches = self.lag(durable);
        let since = self.behind_since.filter(|_| lag_batches > 0);
        let called_for = self.called_at.map(|called_at| now.saturating_sub(called_at));
        let hangs_for = called_for.filter(|&called_for| called_for > CALL_MAX);
        let (condition, last_error) = match hangs_for {
            Some(hangs_for) => {
                let reason = format!("the call has not returned for {} s", hangs_for.as_secs());
                (SinkCondition::Down, Some(reason))
            }
            None => (self.condition, self.last_error.clone()),
        };
        SinkStatus {
            name: sink.to_owned(),
            is_attached,
            position: self.confirmed.map(position),
            in_flight: self.in_flight.map(position),
            lag_batches,
            lag: since.map_or(Duration::ZERO, |since| now.saturating_sub(since)),
            backlog_bytes: self.backlog_bytes,
            deliveries: self.deliveries,
            rows: self.rows,
            events: self.events,
            failures: self.failures,
            failures_in_a_row: self.failures_in_a_row,
            last_error,
            condition: if is_attached { condition } else { SinkCondition::Missing },
            last_delivery: self.last_delivery,
        }
    }
}
