//! Asking a sink where it is, and what follows from the answer.

use crate::delivery::failure::Failure;
use crate::delivery::outlet::{Context, Kept, Outlet, Serving, point, position};
use crate::delivery::state::SinkState;
use crate::error::Result;
use crate::journal::reader::holds;
use crate::journal::writer::ChainPoint;
use crate::sink::{Position, SinkError, UsageBatch};

impl Outlet {
    /// Asks the sink where it is, and goes on from there; unless that is known, and nobody wants it
    /// confirmed.
    pub(super) fn ask(
        &self,
        serving: &mut Serving,
        cx: &Context<'_>,
    ) -> std::result::Result<(), Failure> {
        // Before the call: the answer may be older than a question that comes during it.
        let question = self.progress.lock().last_question();
        if serving.is_position_known && self.progress.lock().is_answered(question) {
            return Ok(());
        }
        let at = self.call(|| serving.sink.position(cx.disk.engine))?;
        let has_events = at.is_none() && self.has_events_in_flight(serving, cx)?;
        let mut kept = self.kept.lock();
        if has_events {
            kept.give_up_events_in_flight();
            serving.prepared = None;
        }
        self.reconcile(&mut kept, &mut serving.prepared, at, cx)?;
        self.progress.lock().answered(question, &kept.state);
        serving.is_position_known = true;
        Ok(())
    }

    /// Whether a sink without a position has the events of the delivery in flight. Then it applied
    /// the delivery before it was emptied, and its confirmation was lost.
    fn has_events_in_flight(
        &self,
        serving: &mut Serving,
        cx: &Context<'_>,
    ) -> std::result::Result<bool, Failure> {
        let SinkState { in_flight, events_after, .. } = self.kept.lock().state;
        let (Some(end), Some(after)) = (in_flight, events_after) else { return Ok(false) };
        if after >= end.number {
            // They are not sent anyway.
            return Ok(false);
        }
        let last = self.call(|| serving.sink.last_events(cx.disk.engine))?;
        Ok(last == Some(end.number.0))
    }

    /// Takes over the position that the sink says it has.
    fn reconcile(
        &self,
        kept: &mut Kept,
        prepared: &mut Option<UsageBatch>,
        at: Option<Position>,
        cx: &Context<'_>,
    ) -> std::result::Result<(), Failure> {
        let at = at.map(point);
        let SinkState { confirmed, in_flight, .. } = kept.state;
        if let Some(end) = at
            && in_flight == at
        {
            // Its confirmation was lost. One that a process before this one sent is not counted.
            self.count(prepared, end, cx);
            self.confirm_locked(kept, end, cx)?;
            return Ok(());
        }
        if at == confirmed {
            return Ok(());
        }
        let Some(end) = at else {
            tracing::warn!(sink = self.name, "the sink was emptied: it gets all totals anew");
            return Ok(self.reset(kept, None, cx)?);
        };
        if confirmed.is_none() && in_flight.is_none() {
            let is_there = kept.released <= end.number && end.number <= cx.host.durable();
            if is_there && holds(&cx.disk.files, cx.disk.engine, end)? {
                return Ok(self.reset(kept, Some(end), cx)?);
            }
        }
        let durable = ChainPoint { number: cx.host.durable(), check: 0 };
        let to = in_flight.or(confirmed).unwrap_or(durable);
        Err(SinkError::Disagrees {
            engine: cx.disk.engine,
            stored: at.map(position),
            from: confirmed.map(position),
            to: position(to),
        }
        .into())
    }

    /// Goes on from where the sink is: what was kept from elsewhere on is of no use to it.
    fn reset(&self, kept: &mut Kept, at: Option<ChainPoint>, cx: &Context<'_>) -> Result<()> {
        // Of the events it has those before what it had confirmed.
        let events_after = kept.state.events_after.map(|after| {
            let confirmed = kept.state.confirmed.map(|point| point.number);
            at.map_or_else(|| confirmed.map_or(after, |it| it.max(after)), |point| point.number)
        });
        let state = SinkState { confirmed: at, events_after, ..SinkState::new(&self.name) };
        let dropped = std::mem::replace(&mut kept.state, state).backlog;
        let saved = self.save(kept, cx.disk);
        self.measure_locked(kept, cx.disk);
        saved?;
        self.remove_parts(kept, &dropped, cx.disk)
    }
}

impl Kept {
    /// What is sent next brings no event of the delivery in flight. Not saved at once: a process
    /// that finds this missing finds out again.
    fn give_up_events_in_flight(&mut self) {
        let end = self.state.in_flight.map(|end| end.number);
        self.state.events_after = self.state.events_after.max(end);
        self.is_dirty = true;
    }
}
