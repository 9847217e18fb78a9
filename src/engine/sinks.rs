//! The engine's side of delivery: the workers, and what only the engine knows.

use std::sync::Arc;
use std::time::Duration;

use crate::admission::table::Key;
use crate::clock::uptime;
use crate::delivery::{Host, SinkStatus, Waiter};
use crate::engine::Engine;
use crate::error::Result;
use crate::flush::threads::{Flushers, Pulse};
use crate::fold::SumKey;
use crate::journal::writer::ChainPoint;
use crate::model::{BatchNumber, Definition, QuotaId, Timestamp};

/// How long a close waits for the sinks.
const FINISH_MAX: Duration = Duration::from_secs(5);
/// How long it waits for a worker whose sink has been given up on.
const STOP_MAX: Duration = Duration::from_millis(200);

impl Engine {
    pub(super) fn start_sinks(self: &Arc<Self>, workers: &mut Flushers) -> Result<()> {
        for (number, pulse) in self.pulses.sinks.iter().enumerate() {
            let engine = Arc::clone(self);
            let name = format!("tollgate-sink-{number}");
            workers.spawn_named(name, pulse, &self.poison, move |pulse| engine.run_sinks(pulse))?;
        }
        Ok(())
    }

    fn run_sinks(&self, pulse: &Pulse) {
        let mut wait = Duration::ZERO;
        while pulse.sleep(wait) {
            wait = self.outbox.serve(self, &|| pulse.is_stopping());
        }
        // Here rather than where the last handle goes: that may be a thread that must not block, or
        // one that panics.
        self.outbox.let_go_of_sinks();
    }

    fn wake_sinks(&self, batch: BatchNumber) {
        self.outbox.want(batch);
        self.pulses.sinks.iter().for_each(|pulse| pulse.kick());
    }

    /// Makes everything acknowledged durable, and waits until all sinks say that they have it.
    pub(crate) fn deliver(&self, timeout: Duration) -> Result<()> {
        let deadline = uptime().saturating_add(timeout);
        self.sync()?;
        let batch = self.committer.durable_batch();
        self.outbox.wait(batch, deadline, Waiter::Caller, || self.wake_sinks(batch))
    }

    /// A last attempt, when all that will be counted is durable; then the workers end. What a sink
    /// does not confirm stays in flight, and is sorted out by the next open. `is_all`: all that was
    /// counted is durable.
    pub(super) fn finish_sinks(&self, workers: &mut Flushers, is_all: bool) {
        let batch = self.committer.durable_batch();
        if is_all {
            self.outbox.end_at(batch);
        }
        if workers.is_empty() {
            return;
        }
        let deadline = uptime() + FINISH_MAX;
        let wake = || self.wake_sinks(batch);
        if let Err(error) = self.outbox.wait(batch, deadline, Waiter::Close, wake) {
            tracing::warn!(%error, "closing with something undelivered; it is kept");
        }
        workers.stop_until(uptime() + STOP_MAX);
    }

    pub(crate) fn sinks(&self) -> Vec<SinkStatus> {
        self.outbox.statuses(self.committer.durable_batch(), uptime())
    }

    /// One round of a worker, for tests without threads.
    #[cfg(all(test, not(loom)))]
    pub(super) fn serve_sinks(&self) {
        self.outbox.want(self.committer.durable_batch());
        self.outbox.serve(self, &|| false);
    }
}

impl Host for Engine {
    fn durable(&self) -> BatchNumber {
        self.committer.durable_batch()
    }

    fn now(&self) -> Timestamp {
        self.clock.now()
    }

    fn with_newest_snapshot(
        &self,
        read: &mut dyn FnMut(Option<ChainPoint>) -> Result<()>,
    ) -> Result<()> {
        self.compactor.with_newest(read)
    }

    fn quota(&self, quota: QuotaId) -> Option<Definition> {
        self.quotas.get(quota).map(|state| state.definition().clone())
    }

    fn counter(&self, key: SumKey) -> (Option<u64>, u64) {
        let default = self.quotas.get(key.quota).map_or(0, |state| state.limit());
        let counter = Key { user: key.user, quota: key.quota };
        let found = self.table.find(counter, |live| {
            let state = live.cell.load();
            let used = (state.window() == key.window).then(|| state.used());
            (used, live.limit(default))
        });
        found.unwrap_or((None, default))
    }
}
