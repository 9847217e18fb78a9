//! A sink that an operator empties, as docs/sinks.md says, or sets back: what the engine notices of
//! it, and delivers then.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::sink_tests::{Bench, Down, at, consume, named, serve, small, status};
use super::*;
use crate::clock::uptime;
use crate::delivery::SILENCE_MAX;
use crate::model::{Quota, UsageEvent};
use crate::sink::{
    Applied, EventRow, Fault, MemoryStore, Position, SinkError, UsageBatch, UsageSink,
};
use crate::storage::sim::SimDisk;
use crate::wal::lanes::prefer;

/// Only guards against a hang.
const PATIENCE: Duration = Duration::from_secs(60);

/// A database that keeps its events when it is emptied, and takes none under the key of another;
/// clones are handles to it, and sinks.
#[derive(Clone, Default)]
struct Database(Arc<Mutex<Tables>>);

#[derive(Default)]
struct Tables {
    counted: MemoryStore,
    /// By the end of the delivery, and the place in it.
    events: BTreeMap<(u64, usize), EventRow>,
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

    fn inject(&self, fault: Fault) {
        self.0.lock().counted.inject(fault);
    }

    /// What the events were numbered with, which must be of each event something else.
    fn events(&self) -> BTreeSet<u64> {
        let tables = self.0.lock();
        let numbers = tables.events.values().map(|row| row.event.metadata["n"].parse().unwrap());
        let all: Vec<u64> = numbers.collect();
        let distinct: BTreeSet<_> = all.iter().copied().collect();
        assert_eq!(distinct.len(), all.len(), "one is there twice: {all:?}");
        distinct
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
        let mut tables = self.0.lock();
        let stored = tables.counted.position(batch.engine());
        let is_new = stored != Some(batch.to());
        let end = batch.to().batch;
        let has_key = |nr| tables.events.contains_key(&(end, nr));
        if is_new && (0..batch.events().len()).any(has_key) {
            return Err(SinkError::bad_data("test", format!("batch {end} has events")));
        }
        let applied = tables.counted.sink().apply(batch);
        if is_new && tables.counted.position(batch.engine()) == Some(batch.to()) {
            let rows = batch.events().iter().cloned().enumerate();
            tables.events.extend(rows.map(|(nr, row)| ((end, nr), row)));
        }
        applied
    }

    fn wants_events(&self) -> bool {
        true
    }

    fn last_events(&mut self, _: EngineId) -> std::result::Result<Option<u64>, SinkError> {
        Ok(self.0.lock().events.keys().next_back().map(|&(end, _)| end))
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

fn record(owner: &Owner, numbers: std::ops::Range<u64>) {
    let quota = owner.engine.define(&Quota::new("lifetime", 1 << 40)).unwrap();
    for number in numbers {
        let event = UsageEvent::new(1, quota, 1.0, at(number)).metadata("n", number.to_string());
        owner.engine.record(&event).unwrap();
    }
}

/// The last delivery was applied, and the process died before that was written down: the events of
/// that delivery came a second time, or, where it was the first, kept the sink from all others.
#[test]
fn events_that_an_emptied_sink_has_do_not_come_again() {
    for is_first in [true, false] {
        for is_merged in [true, false] {
            let case = format!("first: {is_first}, merged: {is_merged}");
            let (bench, database) = (Bench::new(), Database::default());
            let sink = || named(database.clone());
            let owner = bench.open(vec![sink()]);
            let before = if is_first { 0 } else { 3 };
            record(&owner, 0..before);
            if !is_first {
                serve(&owner);
            }
            record(&owner, before..6);
            owner.engine.sync().unwrap();
            owner.engine.serve_sinks();
            assert_eq!(database.events().len(), 6, "{case}");
            bench.disk.kill();
            drop(owner);
            if is_merged {
                let owner = bench.open(vec![named(Down)]);
                for _ in 0..3 {
                    consume(&owner, 2, 1);
                    owner.engine.serve_sinks();
                    owner.engine.snapshot().unwrap();
                }
                assert!(status(&owner).in_flight.is_some(), "{case}");
                bench.disk.kill();
                drop(owner);
            }
            database.empty();
            let owner = bench.open(vec![sink()]);
            record(&owner, 6..8);
            serve(&owner);
            assert_eq!(status(&owner).last_error, None, "{case}");
            assert_eq!(database.events(), (0..8).collect(), "{case}");
            assert_eq!(database.used(1), 8, "{case}");
        }
    }
}

/// The same without a restart: what was put together before is not sent as it was.
#[test]
fn a_delivery_in_doubt_is_put_together_again_without_them() {
    let (bench, database) = (Bench::new(), Database::default());
    let owner = bench.open(vec![named(database.clone())]);
    record(&owner, 0..3);
    owner.engine.sync().unwrap();
    database.inject(Fault::AfterCommit);
    owner.engine.serve_sinks();
    assert_eq!((database.events().len(), status(&owner).failures), (3, 1));
    database.empty();
    serve(&owner);
    assert_eq!((status(&owner).last_error, status(&owner).failures), (None, 1));
    assert_eq!((database.events(), database.used(1)), ((0..3).collect(), 3));
}

/// What was in flight was not applied: its events are still to come.
#[test]
fn events_that_an_emptied_sink_does_not_have_come() {
    let (bench, database) = (Bench::new(), Database::default());
    let owner = bench.open(vec![named(database.clone())]);
    record(&owner, 0..3);
    serve(&owner);
    record(&owner, 3..6);
    owner.engine.sync().unwrap();
    database.inject(Fault::BeforeCommit);
    owner.engine.serve_sinks();
    database.empty();
    serve(&owner);
    assert_eq!((database.events(), database.used(1)), ((0..6).collect(), 6));
}

/// Runs until the disk ends, or the work does. How many events were recorded.
fn work(disk: &Arc<SimDisk>, database: &Database, recorded: &mut u64) -> Result<()> {
    let bench = Bench { disk: Arc::clone(disk), ..Bench::new() };
    let alive = || if disk.has_crashed() { Err(Error::Closed) } else { Ok(()) };
    for life in 0..3 {
        let owner = bench.try_open(vec![named(database.clone())])?;
        let quota = owner.engine.define(&Quota::new("lifetime", 1 << 40))?;
        for step in 0..3 {
            prefer(0);
            let number = recorded.to_string();
            owner.engine.record(&UsageEvent::new(1, quota, 1.0, at(0)).metadata("n", number))?;
            alive()?;
            *recorded += 1;
            owner.engine.sync()?;
            match (life, step) {
                (0, 1) => database.inject(Fault::AfterCommit),
                (1, 1) => database.inject(Fault::BeforeCommit),
                _ => {}
            }
            owner.engine.serve_sinks();
            alive()?;
        }
        if life == 0 {
            owner.close()?;
            alive()?;
        } else {
            disk.kill();
        }
    }
    Ok(())
}

/// Whatever call the engine ends at: the sink is emptied, and has each event once in the end.
#[test]
fn an_end_at_any_call_brings_no_event_again() {
    let calls = {
        let disk = SimDisk::new(0);
        work(&disk, &Database::default(), &mut 0).unwrap();
        disk.calls()
    };
    assert!(calls > 100, "{calls} calls");
    for nth in 0..=calls {
        let (disk, database, mut recorded) = (SimDisk::new(nth), Database::default(), 0);
        disk.crash_at(nth);
        let ended = work(&disk, &database, &mut recorded);
        assert_eq!(ended.is_ok(), nth == calls, "{ended:?}");
        disk.kill();
        database.empty();
        let disk = SimDisk::from_image(&disk.snapshot_image(), nth);
        let bench = Bench { disk, ..Bench::new() };
        let owner = bench.open(vec![named(database.clone())]);
        serve(&owner);
        let (events, context) = (database.events(), format!("ended at call {nth}"));
        // One may have been under way.
        let possible = [recorded, recorded + 1].map(|end| (0..end).collect::<BTreeSet<_>>());
        assert!(possible.contains(&events), "{context}: {events:?} of {recorded}");
        assert_eq!(database.used(1), events.len() as i128, "{context}: {:?}", status(&owner));
    }
}
