//! How a sink's life ends: with the engine's, and on the engine's threads.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use super::sink_tests::{Bench, consume, named, serve, small};
use super::*;
use crate::clock::uptime;
use crate::delivery::{CALL_MAX, SinkCondition, Waiter};
use crate::health::HealthReason;
use crate::sink::{
    Applied, JsonLinesSink, MemorySink, MemoryStore, Position, SinkError, UsageBatch, UsageSink,
};
use crate::{Quota, Tollgate};

/// Only guards against a hang.
const PATIENCE: Duration = Duration::from_secs(60);

/// A sink that says on which thread it is dropped, and that waits in each delivery where it is told
/// to.
struct Watched {
    inner: MemorySink,
    /// Told of each delivery that begins; goes on once it is answered.
    door: Option<(Sender<()>, Receiver<()>)>,
    dropped: Sender<Option<String>>,
}

impl UsageSink for Watched {
    fn position(&mut self, engine: EngineId) -> std::result::Result<Option<Position>, SinkError> {
        self.inner.position(engine)
    }

    fn apply(&mut self, batch: &UsageBatch) -> std::result::Result<Applied, SinkError> {
        if let Some((entered, may_go_on)) = &self.door {
            let _ = entered.send(());
            let _ = may_go_on.recv();
        }
        self.inner.apply(batch)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let _ = self.dropped.send(std::thread::current().name().map(str::to_owned));
    }
}

/// Sinks lived as long as the last handle, and went with it: on a thread of an asynchronous
/// runtime, where a connection to PostgreSQL can't be closed, by a panic.
#[test]
fn a_close_drops_the_sinks_on_a_thread_of_the_engine() {
    let bench = Bench::new();
    let (dropped, was_dropped) = channel();
    let sink = Watched { inner: MemoryStore::new().sink(), door: None, dropped };
    let sinks = vec![named(sink)];
    let owner = Owner::open_with(&bench.disk.storage(), small(&bench.clock), sinks).unwrap();
    consume(&owner, 1, 5);
    assert!(was_dropped.try_recv().is_err(), "it is in use");
    owner.close().unwrap();
    assert_eq!(was_dropped.recv().unwrap().unwrap(), "tollgate-sink-0");
    // The mark that a close writes behind all that is counted was said to be missing there.
    let status = &owner.engine.sinks()[0];
    assert!(status.deliveries > 0 && status.lag_batches == 0, "{status:?}");
    drop(owner);
    assert!(was_dropped.recv().is_err(), "once");
}

/// Also where no worker ever ran.
#[test]
fn a_close_without_workers_drops_the_sinks() {
    let bench = Bench::new();
    let (dropped, was_dropped) = channel();
    let sink = Watched { inner: MemoryStore::new().sink(), door: None, dropped };
    let owner = bench.open(vec![named(sink)]);
    consume(&owner, 1, 5);
    serve(&owner);
    owner.close().unwrap();
    assert!(was_dropped.try_recv().is_ok());
}

/// Whoever is in a sink when the engine closes drops it: nothing takes it away under a call.
#[test]
fn a_sink_that_is_being_called_is_dropped_by_its_worker() {
    let bench = Bench::new();
    let ((dropped, was_dropped), (entered, has_entered)) = (channel(), channel());
    let (go_on, may_go_on) = channel();
    let door = Some((entered, may_go_on));
    let sink = Watched { inner: MemoryStore::new().sink(), door, dropped };
    let owner = bench.open(vec![named(sink)]);
    consume(&owner, 1, 5);
    owner.engine.sync().unwrap();
    std::thread::scope(|scope| {
        // Gone if this fails, so that the worker goes on.
        let go_on = go_on;
        let worker = scope.spawn(|| {
            owner.engine.serve_sinks();
            owner.engine.outbox.let_go_of_sinks();
        });
        has_entered.recv().unwrap();
        owner.close().unwrap();
        assert!(was_dropped.try_recv().is_err(), "it is being called");
        go_on.send(()).unwrap();
        worker.join().unwrap();
        assert!(was_dropped.try_recv().is_ok());
    });
}

/// A sink whose call did not return was fine for ever: nothing had failed.
#[test]
fn a_call_that_does_not_return_is_said_in_time() {
    let bench = Bench::new();
    let ((dropped, _was_dropped), (entered, has_entered)) = (channel(), channel());
    let (go_on, may_go_on) = channel();
    let store = MemoryStore::new();
    let sink = Watched { inner: store.sink(), door: Some((entered, may_go_on)), dropped };
    let owner = bench.open(vec![named(sink)]);
    consume(&owner, 1, 5);
    owner.engine.sync().unwrap();
    let durable = owner.engine.committer.durable_batch();
    let status = |later| owner.engine.outbox.statuses(durable, uptime() + later).remove(0);
    std::thread::scope(|scope| {
        // Gone if this fails, so that the worker goes on.
        let go_on = go_on;
        let worker = scope.spawn(|| owner.engine.serve_sinks());
        has_entered.recv().unwrap();
        assert_eq!(status(Duration::ZERO).condition, SinkCondition::Fine);
        let hanging = status(CALL_MAX + Duration::from_secs(2));
        assert_eq!(hanging.condition, SinkCondition::Down);
        let reason = hanging.last_error.unwrap();
        assert!(reason.starts_with("the call has not returned for 9"), "{reason}");
        let mut reasons = Vec::new();
        owner.engine.outbox.judge(durable, uptime() + 2 * CALL_MAX, &mut reasons);
        assert!(matches!(reasons[..], [HealthReason::SinkDown { attempts: 0, .. }]), "{reasons:?}");
        go_on.send(()).unwrap();
        worker.join().unwrap();
    });
    let returned = status(2 * CALL_MAX);
    assert_eq!((returned.condition, returned.last_error), (SinkCondition::Fine, None));
    assert_eq!(store.used(1, "lifetime", None), 5);
}

/// Who waited for a delivery waited on, after the close, until its time was over.
#[test]
fn who_waits_for_a_delivery_is_told_of_a_close() {
    let bench = Bench::new();
    let owner = bench.open_with(&MemoryStore::new());
    consume(&owner, 1, 5);
    owner.engine.sync().unwrap();
    let (batch, outbox) = (owner.engine.committer.durable_batch(), &owner.engine.outbox);
    let (asks, has_asked) = channel();
    let deadline = uptime() + PATIENCE;
    // There is no worker: what ends the wait is the close, or the end of its time.
    let waiting = std::thread::scope(|scope| {
        let wait = || outbox.wait(batch, deadline, Waiter::Caller, || asks.send(()).unwrap());
        let waiter = scope.spawn(wait);
        has_asked.recv().unwrap();
        owner.close().unwrap();
        waiter.join().unwrap()
    });
    assert!(matches!(waiting, Err(Error::Closed)), "{waiting:?}");
}

/// After a close, with a handle still there, the directory of the sink was in use.
#[test]
fn after_a_close_directory_and_sink_can_be_opened_again() {
    let (dir, lines) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let open = || {
        let sink = JsonLinesSink::open(lines.path()).unwrap();
        Tollgate::builder(dir.path()).sink("lines", sink).open().unwrap()
    };
    let gate = open();
    let quota = gate.define(Quota::new("requests", 100)).unwrap();
    let counter = gate.counter(1, quota).unwrap();
    counter.consume(5).unwrap();
    gate.close().unwrap();
    let again = open();
    assert_eq!(again.usage(1, quota).unwrap().used, 5);
    assert_eq!(counter.usage().used, 5);
}

/// A close waited until everything was put together for a sink that it had given up on: of millions
/// of counters, for a minute.
#[test]
fn whoever_closes_does_not_wait_until_a_batch_is_put_together() {
    const USERS: u64 = 3 << 12;
    let (bench, store) = (Bench::new(), MemoryStore::new());
    let config = small(&bench.clock).lane_records(USERS.next_power_of_two());
    let sinks = vec![named(store.sink())];
    let owner = Owner::open_at_rest_with(&bench.disk.storage(), config, sinks).unwrap();
    (0..USERS).for_each(|user| consume(&owner, user, 1));
    owner.engine.sync().unwrap();
    let (outbox, batch) = (&owner.engine.outbox, owner.engine.committer.durable_batch());
    let mut asked_max = 0;
    loop {
        let asked = AtomicU64::new(0);
        let is_stopping = || asked.fetch_add(1, Ordering::Relaxed) >= asked_max;
        outbox.want(batch);
        outbox.serve(&*owner.engine, &is_stopping);
        let status = owner.engine.sinks().remove(0);
        assert_eq!((status.failures, status.last_error), (0, None));
        if status.deliveries > 0 {
            break;
        }
        assert!(store.rows().is_empty());
        asked_max += 1;
    }
    // At the beginning, at each batch and behind the last; and for so many sums, and so many rows.
    assert!(asked_max >= 2 + batch.0 + 2 * 3, "{asked_max}, {batch} batches");
    assert_eq!(store.rows().len() as u64, USERS);
}
