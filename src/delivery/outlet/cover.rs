//! What a sink that lags is kept: before the journal is released, what the sink has not got of it
//! goes to its backlog.

use crate::delivery::outlet::Outlet;
use crate::delivery::state::SinkState;
use crate::delivery::sums::{Base, Bounds, Disk, Pace};
use crate::error::{Error, Result};
use crate::journal::writer::ChainPoint;
use crate::model::BatchNumber;

impl Outlet {
    /// Makes sure that the sink needs nothing of what is about to be released, the journal up to
    /// the newest snapshot: what it has not got by then, and can be read, goes to its backlog.
    /// `durable` is as far as the backlog goes then.
    pub(in crate::delivery) fn cover(
        &self,
        disk: &Disk,
        newest: Option<ChainPoint>,
        durable: BatchNumber,
        pace: &mut Pace<'_>,
    ) -> Result<()> {
        let mut kept = self.kept.lock();
        kept.refuse_when_closed()?;
        let released = newest.map_or(BatchNumber::ZERO, |point| point.number);
        kept.released = kept.released.max(released);
        // One that begins with totals needs them before windows are dropped from the snapshot.
        if kept.state.tip().is_some_and(|tip| tip.number >= released) {
            return if kept.is_dirty { self.save(&mut kept, disk) } else { Ok(()) };
        }
        kept.has_unlisted = true;
        let state = match self.lengthened(&kept.state, disk, newest, durable, pace) {
            Ok(lengthened) => lengthened,
            // What can't be read for this sink can't be delivered either: it is refused once it
            // gets there. The others, and the journal, need not wait for that.
            Err(Error::Damaged { path, offset, reason }) => {
                let sink = &self.name;
                tracing::error!(sink, ?path, offset, reason, "what a sink has not got is damaged");
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        kept.state = state;
        let saved = self.save(&mut kept, disk);
        self.measure_locked(&mut kept, disk);
        saved
    }

    /// The state with a backlog that goes on to `end`; a part that was replaced by a longer one is
    /// still there. An end in flight stays a boundary, and so does one before which there are many
    /// events.
    fn lengthened(
        &self,
        state: &SinkState,
        disk: &Disk,
        newest: Option<ChainPoint>,
        end: BatchNumber,
        pace: &mut Pace<'_>,
    ) -> Result<SinkState> {
        let mut state = state.clone();
        let first = match state.confirmed {
            Some(confirmed) => Base::After(confirmed),
            None => newest.map_or(Base::After(ChainPoint::START), Base::Snapshot),
        };
        if let Some(sent) = state.in_flight
            && state.backlog.is_empty()
        {
            let bounds = Bounds::exactly(sent.number);
            let range = disk.write_part(&state, state.confirmed, first, bounds, pace)?;
            self.require(disk, sent, range.to)?;
            state.backlog.push(range);
        }
        let Some(&last) = state.backlog.last() else {
            state.backlog = disk.write_parts(&state, state.confirmed, first, end, pace)?;
            return Ok(state);
        };
        if last.to.number >= end {
            return Ok(state);
        }
        if state.in_flight != Some(last.to) && !disk.is_part_full(&self.name, last, pace) {
            match disk.write_parts(&state, last.from, Base::Backlog(last), end, pace) {
                Ok(parts) => {
                    state.backlog.pop();
                    state.backlog.extend(parts);
                    return Ok(state);
                }
                // What can't be read can't be merged, nor delivered; what follows is kept beside
                // it.
                Err(error) if disk.is_lost(&self.name, last, &error) => {
                    tracing::error!(sink = self.name, %error, "a backlog can't be read");
                }
                Err(error) => return Err(error),
            }
        }
        let after = Base::After(last.to);
        let parts = disk.write_parts(&state, Some(last.to), after, end, pace)?;
        state.backlog.extend(parts);
        Ok(state)
    }
}
