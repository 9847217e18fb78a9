//! Events: counted like any other usage, and kept whole for the sinks that want them.

use smallvec::smallvec;

use crate::admission::cell::CellState;
use crate::engine::Engine;
use crate::engine::group::{Ask, Member, Members};
use crate::engine::operations::{Counted, check_amount};
use crate::error::{Error, Result};
use crate::ledger::{self, PAYLOAD_BYTES_MAX};
use crate::model::{AMOUNT_MAX, Usage, UsageEvent, WindowStart, units_from_f64};
use crate::wal::payload;

impl Engine {
    /// Counts an event, and keeps it where a sink wants events.
    pub(crate) fn record(&self, event: &UsageEvent) -> Result<Usage> {
        let counter = self.counted(event.user, event.quota)?;
        let amount = units_from_f64(event.value, counter.quota.definition().decimals)?;
        check_amount(amount)?;
        // Refused whether or not a sink wants it: attaching one is not to cause errors.
        self.check_size(event)?;
        let payload = if self.outbox.keeps_events() {
            ledger::payload(event).map_err(|_| self.too_large(usize::MAX))?
        } else {
            Vec::new()
        };
        match event.request_id {
            Some(id) => self.consume_once(id, counter, amount, &payload),
            None if payload.is_empty() => self.consume(&counter, amount, false),
            None => self.consume_and_keep(counter, amount, &payload),
        }
    }

    fn check_size(&self, event: &UsageEvent) -> Result<()> {
        let bytes = ledger::payload_len(event).unwrap_or(usize::MAX);
        if bytes > self.event_bytes_max() { Err(self.too_large(bytes)) } else { Ok(()) }
    }

    fn event_bytes_max(&self) -> usize {
        payload::len_max(self.config.lane_records).min(PAYLOAD_BYTES_MAX)
    }

    fn too_large(&self, bytes: usize) -> Error {
        Error::EventTooLarge { bytes, max: self.event_bytes_max() }
    }

    fn consume_and_keep(&self, counter: Counted<'_>, amount: u64, payload: &[u8]) -> Result<Usage> {
        let members: Members<'_> = smallvec![Member { counter, amount }];
        let bound = Some(AMOUNT_MAX);
        let ask = Ask { members: &members, bound, ttl: None, request: None, payload };
        let outcome = self.ask(&ask)?;
        // There is one counter.
        let empty = || (CellState::new(counter.quota.id(), WindowStart(0), 0), 0);
        let (state, limit) = outcome.states.first().copied().unwrap_or_else(empty);
        let usage = self.consumed(&counter, amount, outcome.is_admitted, state, limit)?;
        self.wait_for_outcome(&outcome)?;
        Ok(usage)
    }
}
