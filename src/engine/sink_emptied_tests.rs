//! A sink that an operator empties, as docs/sinks.md says, or sets back: what the engine notices of
//! it, and delivers then.

use std::sync::Arc;

use super::sink_tests::{Bench, consume, named, serve, small};
use super::*;
use crate::clock::uptime;
use crate::delivery::SILENCE_MAX;
use crate::sink::{Applied, MemoryStore, Position, SinkError, UsageBatch, UsageSink};

/// Only guards against a hang.
const PATIENCE: Duration = Duration::from_secs(60);

/// A database; clones are handles to it, and sinks.
#[derive(Clone, Default)]
struct Database(Arc<Mutex<Tables>>);

#[derive(Default)]
struct Tables {
    counted: MemoryStore,
    /// How often a position was read.
    reads: u64,
}

impl Database {
    /// Usage and positions, in one step.
    fn empty(&self) {
        self.restore(MemoryStore::new());
    }

    fn back_up(&self) -> MemoryStore {
        self.0.lock().counted.duplicate()
    }

    fn restore(&self, backup: MemoryStore) {
        self.0.lock().counted = backup;
    }

    fn used(&self, user: u64) -> i128 {
        self.0.lock().counted.used(user, "lifetime", None)
    }

    fn reads(&self) -> u64 {
        self.0.lock().reads
    }
}

impl UsageSink for Database {
    fn position(&mut self, engine: EngineId) -> std::result::Result<Option<Position>, SinkError> {
        let mut tables = self.0.lock();
        tables.reads += 1;
        Ok(tables.counted.position(engine))
    }

    fn apply(&mut self, batch: &UsageBatch) -> std::result::Result<Applied, SinkError> {
        self.0.lock().counted.sink().apply(batch)
    }
}

/// With threads. The sink has all of it, also what an idle journal ends with.
fn delivered(bench: &Bench, database: &Database) -> Owner {
    let sinks = vec![named(database.clone())];
    let owner = Owner::open_with(&bench.disk.storage(), small(&bench.clock), sinks).unwrap();
    consume(&owner, 1, 10);
    (0..2).for_each(|_| owner.engine.deliver(PATIENCE).unwrap());
    owner
}

/// Nothing was delivered to a sink that was emptied while there was nothing to deliver, and who
/// waited for a delivery was told that all was there.
#[test]
fn who_waits_for_a_delivery_finds_the_sink_emptied_or_set_back() {
    let (bench, database) = (Bench::new(), Database::default());
    let owner = delivered(&bench, &database);
    let backup = database.back_up();
    database.empty();
    owner.engine.deliver(PATIENCE).unwrap();
    assert_eq!(database.used(1), 10);

    consume(&owner, 1, 5);
    (0..2).for_each(|_| owner.engine.deliver(PATIENCE).unwrap());
    database.restore(backup);
    let error = owner.engine.deliver(PATIENCE).unwrap_err();
    assert!(error.to_string().contains("it is behind"), "{error}");
}

#[test]
fn a_sink_that_was_silent_for_long_is_asked_where_it_is() {
    let (bench, database) = (Bench::new(), Database::default());
    let owner = bench.open(vec![named(database.clone())]);
    consume(&owner, 1, 10);
    (0..2).for_each(|_| serve(&owner));
    database.empty();
    let reads = database.reads();
    owner.engine.serve_sinks();
    assert_eq!((database.reads(), database.used(1)), (reads, 0), "not each time");
    owner.engine.outbox.note(owner.engine.committer.durable_batch(), uptime() + SILENCE_MAX);
    owner.engine.serve_sinks();
    assert_eq!((database.reads(), database.used(1)), (reads + 1, 10));
    owner.engine.serve_sinks();
    assert_eq!((database.reads(), database.used(1)), (reads + 1, 10), "once");
}

/// A database that does not answer would hold it up.
#[test]
fn a_close_does_not_ask_for_what_is_confirmed() {
    let (bench, database) = (Bench::new(), Database::default());
    let owner = delivered(&bench, &database);
    let reads = database.reads();
    owner.close().unwrap();
    assert_eq!(database.reads(), reads);
}
