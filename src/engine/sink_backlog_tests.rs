//! What is kept for a sink until it is there: by merges that meet a disk which fails, and by those
//! that drop windows. On a simulated disk without threads.

use std::collections::BTreeSet;
use std::time::Duration;

use parking_lot::Mutex;

use super::flushers::Step;
use super::sink_tests::{Bench, Down, START, at, consume, consume_in_window, named, serve, status};
use super::tests::subscriber::events_of;
use super::*;
use crate::clock::uptime;
use crate::delivery::forget_on;
use crate::delivery::state::{self, SinkState};
use crate::fold::{Sum, SumKey};
use crate::model::{Consume, Decisions, Quota, UsageEvent, Window, WindowStart};
use crate::sink::{Applied, MemorySink, MemoryStore, Position, SinkError, UsageBatch, UsageSink};
use crate::snapshot::deltas::DeltasWriter;
use crate::storage::sim::{Call, Fault, Outcome, SimDisk};

/// An engine whose only sink lags: it has got what was first, and each merge keeps the rest for it.
fn lagging(bench: &Bench, store: &MemoryStore, rounds: usize) -> Owner {
    let owner = bench.open_with(store);
    consume(&owner, 1, 100);
    serve(&owner);
    owner.close().unwrap();
    let owner = bench.open(vec![named(Down)]);
    (0..rounds).for_each(|_| merge(&owner).unwrap());
    owner
}

fn merge(owner: &Owner) -> Result<()> {
    consume(owner, 1, 1);
    owner.engine.snapshot()
}

/// The parts of the backlog that are there, and those that the state names.
fn parts(bench: &Bench, owner: &Owner) -> [BTreeSet<String>; 2] {
    // As another process would find it.
    let disk = SimDisk::from_image(&bench.disk.snapshot_image(), 1);
    let state = SinkState::load(&disk.storage(), owner.engine.id(), "billing").unwrap();
    let names = bench.disk.file_names().into_iter();
    let listed = state.backlog.iter().map(|&range| state::backlog_name("billing", range));
    [names.filter(|name| name.starts_with("backlog-")).collect(), listed.collect()]
}

/// A merge once dropped what an open reservation still held of a window that was over: a sink that
/// began with the totals was then told what the end of the reservation gave back, and not what it
/// was given back of.
#[test]
fn what_a_reservation_holds_outlasts_its_window_in_the_totals() {
    for is_settled_first in [false, true] {
        let (bench, store) = (Bench::new(), MemoryStore::new());
        let mut owner = bench.open(Vec::new());
        let quota = Quota::new("minute", 1 << 40).window(Window::Minute);
        let quota = owner.engine.define(&quota).unwrap();
        let counted = owner.engine.counted(8, quota).unwrap();
        owner.engine.consume(&counted, 3, false).unwrap();
        let item = Consume { user: 7, quota, amount: 10 };
        let reserved: std::result::Result<_, Decisions> =
            owner.engine.reserve(&[item], Duration::from_hours(24)).unwrap();
        let id = reserved.unwrap();
        let commit = |owner: &Owner| {
            let charged = owner.engine.commit(id, Charge::Same(4)).unwrap();
            assert!(charged.is_allowed());
        };
        merge(&owner).unwrap();
        bench.clock.advance(Duration::from_hours(1));
        owner.engine.clock.refresh();
        (0..3).for_each(|_| merge(&owner).unwrap());
        if is_settled_first {
            commit(&owner);
            owner.engine.sync().unwrap();
        }
        owner.close().unwrap();

        owner = bench.open_with(&store);
        serve(&owner);
        let used = |user| store.used(user, "minute", Some(at(START)));
        if !is_settled_first {
            assert_eq!(used(7), 10);
            commit(&owner);
            serve(&owner);
        }
        assert_eq!((used(7), used(8)), (4, 0), "settled first: {is_settled_first}");

        // Once nothing holds it, it goes the way of its window.
        (0..3).for_each(|_| merge(&owner).unwrap());
        owner.close().unwrap();
        let late = MemoryStore::new();
        let owner = bench.open(vec![("late".to_owned(), Box::new(late.sink()) as _)]);
        serve(&owner);
        assert!(
            late.rows().keys().all(|(_, quota, _)| &**quota == "lifetime"),
            "{:?}",
            late.rows()
        );
    }
}

/// Until its position was known, a sink was behind by many batches and by no time.
#[test]
fn a_sink_that_is_not_reached_is_behind_since_the_open() {
    for is_attached in [true, false] {
        let (bench, store) = (Bench::new(), MemoryStore::new());
        lagging(&bench, &store, 3).close().unwrap();
        let opened_at = uptime();
        let owner = bench.open(if is_attached { vec![named(Down)] } else { Vec::new() });
        let is_open_at = uptime();
        merge(&owner).unwrap();
        let durable = owner.engine.committer.durable_batch();
        let later = is_open_at + Duration::from_hours(1);
        owner.engine.serve_sinks();
        let status = owner.engine.outbox.statuses(durable, later).remove(0);
        assert!(status.lag_batches > 0 && status.is_attached == is_attached, "{status:?}");
        let ages = Duration::from_hours(1)..=later - opened_at;
        assert!(ages.contains(&status.lag), "{status:?}");
    }
}

/// What a sink missed while it was not asked was as old as the first look at its status.
#[test]
fn a_sink_is_behind_since_it_missed_something_whoever_looks() {
    let (bench, store) = (Bench::new(), MemoryStore::new());
    let owner = bench.open_with(&store);
    consume(&owner, 1, 1);
    serve(&owner);
    consume(&owner, 1, 1);
    owner.engine.sync().unwrap();
    owner.engine.sweep();
    let later = uptime() + Duration::from_hours(1);
    let durable = owner.engine.committer.durable_batch();
    let status = owner.engine.outbox.statuses(durable, later).remove(0);
    assert!(status.lag_batches > 0 && status.lag >= Duration::from_hours(1), "{status:?}");
}

/// A sink, and how many rows each of its deliveries has.
struct Rows(MemorySink, Arc<Mutex<Vec<usize>>>);

impl UsageSink for Rows {
    fn position(&mut self, id: EngineId) -> std::result::Result<Option<Position>, SinkError> {
        self.0.position(id)
    }

    fn apply(&mut self, batch: &UsageBatch) -> std::result::Result<Applied, SinkError> {
        self.1.lock().push(batch.rows().len());
        self.0.apply(batch)
    }
}

/// All that a sink had missed was once one delivery, in memory at once: of an outage over many
/// windows as much as the process was ended for, and ended for again at each restart.
#[test]
fn an_outage_over_many_windows_is_delivered_in_parts() {
    const MINUTES: u64 = 40;
    const USERS: u64 = 10;
    // Merged minute by minute, and all at once.
    for minutes_per_merge in [1, MINUTES] {
        let (bench, store) = (Bench::new(), MemoryStore::new());
        lagging(&bench, &store, 0).close().unwrap();
        let owner = bench.open(vec![named(Down)]);
        for minute in 0..MINUTES {
            (0..USERS).for_each(|user| consume_in_window(&owner, user, 3));
            consume(&owner, 1, 1);
            owner.engine.sync().unwrap();
            if (minute + 1) % minutes_per_merge == 0 {
                owner.engine.snapshot().unwrap();
            }
            bench.clock.advance(Duration::from_mins(1));
            owner.engine.clock.refresh();
        }
        // What the snapshot before it has.
        merge(&owner).unwrap();
        let [there, listed] = parts(&bench, &owner);
        assert!(there == listed && there.len() > 4, "{there:?}, {listed:?}");
        owner.close().unwrap();

        let seen: Arc<Mutex<Vec<usize>>> = Arc::default();
        let owner = bench.open(vec![named(Rows(store.sink(), Arc::clone(&seen)))]);
        for _ in 0..100 {
            assert_eq!(status(&owner).backlog_bytes, bench.bytes("backlog") as u64);
            owner.engine.serve_sinks();
        }
        assert_eq!(status(&owner).lag_batches, 0);
        // A window's and the lifetime's; in the tests up to 16 beside these; and one step's: two
        // merges', or 64 and the rest of a batch.
        let step = if minutes_per_merge == 1 { 2 * 10 } else { 64 + 11 };
        let rows_max = 10 + 1 + 16 + step;
        let seen = seen.lock();
        assert!(seen.iter().all(|&rows| rows <= rows_max), "{seen:?}");
        for minute in 0..MINUTES {
            let start = Some(at(START + minute * 60_000));
            assert!((0..USERS).all(|user| store.used(user, "minute", start) == 3), "{minute}");
        }
        // It is in each of the parts.
        assert_eq!(store.used(1, "lifetime", None), 100 + i128::from(MINUTES) + 1);
    }
}

/// Leaves a backlog whose first part has 500 windows of the quota "minute", with 5 in each.
fn leave_large(bench: &Bench, store: &MemoryStore, is_in_flight: bool) {
    let owner = lagging(bench, store, 3);
    let quota = Quota::new("minute", 1 << 40).window(Window::Minute);
    let quota = owner.engine.define(&quota).unwrap();
    merge(&owner).unwrap();
    let engine = owner.engine.id();
    owner.close().unwrap();

    let storage = bench.disk.storage();
    let mut state = SinkState::load(&storage, engine, "billing").unwrap();
    let range = state.backlog[0];
    let temporary = state::temporary_backlog_name("billing");
    let mut writer = DeltasWriter::create(&storage, engine, range, temporary).unwrap();
    let sum = |minute: u64| Sum {
        key: SumKey { quota, window: WindowStart(START + minute * 60_000), user: 7 },
        amount: 5,
    };
    (0..500).for_each(|minute| writer.write_sum(sum(minute)).unwrap());
    writer.finish(&state::backlog_name("billing", range)).unwrap();
    state.in_flight = is_in_flight.then_some(range.to);
    state.save(&storage, engine).unwrap();
}

/// A sink that takes nothing that it is given.
struct Refusing(MemorySink);

impl UsageSink for Refusing {
    fn position(&mut self, id: EngineId) -> std::result::Result<Option<Position>, SinkError> {
        self.0.position(id)
    }

    fn apply(&mut self, _: &UsageBatch) -> std::result::Result<Applied, SinkError> {
        Err(SinkError::BadData { sink: "test", reason: "not this one".to_owned(), source: None })
    }
}

/// It was once said before each attempt with the part, for as long as it was refused.
#[test]
fn a_large_part_is_said_to_be_large_once() {
    let (bench, store) = (Bench::new(), MemoryStore::new());
    leave_large(&bench, &store, false);
    let owner = bench.open(vec![named(Refusing(store.sink()))]);
    let said = events_of(&owner, || (0..5).for_each(|_| owner.engine.serve_sinks()));
    assert_eq!(status(&owner).failures, 5);
    // And that the delivery failed.
    assert_eq!(said, 2);
}

/// A part that was written before there was a bound is delivered as it is, and not made longer.
#[test]
fn a_part_above_the_bound_is_delivered_and_ends() {
    for is_in_flight in [false, true] {
        let (bench, store) = (Bench::new(), MemoryStore::new());
        leave_large(&bench, &store, is_in_flight);
        let owner = bench.open(vec![named(Down)]);
        (0..3).for_each(|_| merge(&owner).unwrap());
        let [there, listed] = parts(&bench, &owner);
        assert!(there == listed && there.len() == 2, "{there:?}, {listed:?}");
        owner.close().unwrap();
        let owner = bench.open_with(&store);
        serve(&owner);
        let used = |minute: u64| store.used(7, "minute", Some(at(START + minute * 60_000)));
        assert!((0..500).all(|minute| used(minute) == 5));
        // The sums that were replaced had these.
        assert_eq!(store.used(1, "lifetime", None), 100 + 3);
    }
}

/// Beyond a bound the last part once took in all that came, and was in memory at each merge. Now
/// merges fail and say so, nothing is lost, and all goes on once the sink takes something.
#[test]
fn a_backlog_of_as_many_parts_as_there_may_be_is_not_lengthened() {
    // In the tests.
    const PARTS_MAX: usize = 100;
    let (bench, store) = (Bench::new(), MemoryStore::new());
    lagging(&bench, &store, 0).close().unwrap();
    let owner = bench.open(vec![named(Down)]);
    let quota = owner.engine.define(&Quota::new("credits", u64::MAX / 4)).unwrap();
    let mut recorded = 0;
    let mut record = |owner: &Owner| {
        let metadata = "m".repeat(100);
        for _ in 0..3 {
            let event = UsageEvent::new(5, quota, 1.0, at(START)).metadata("name", &metadata);
            owner.engine.record(&event).unwrap();
            owner.engine.step(Step::Files).unwrap();
            owner.engine.sync().unwrap();
            recorded += 1;
        }
    };
    let refused = (0..3 * PARTS_MAX).find_map(|_| {
        record(&owner);
        owner.engine.snapshot().err()
    });
    let refused = refused.unwrap();
    assert!(matches!(refused, Error::NotDelivered { .. }), "{refused}");
    assert!(refused.to_string().contains("\"billing\"") && refused.to_string().contains("100"));
    for _ in 0..3 {
        record(&owner);
        assert!(owner.engine.snapshot().is_err());
    }
    let [there, listed] = parts(&bench, &owner);
    // And the one that was to be made longer.
    assert!(listed.len() <= PARTS_MAX && there.len() <= PARTS_MAX + 1, "{}", there.len());
    let longest = there.iter().map(|name| bench.disk.file(name).unwrap().len()).max().unwrap();
    assert!(longest < 2000, "{longest}");
    owner.close().unwrap();

    let owner = bench.open(vec![named(store.sink())]);
    for _ in 0..3 {
        serve(&owner);
    }
    assert_eq!(store.used(5, "credits", None), recorded);
    assert_eq!(store.events().len() as i128, recorded);
    owner.engine.snapshot().unwrap();
}

/// One part that could not be read once ended all merges, and the journal grew without bound.
#[test]
fn a_part_that_can_not_be_read_does_not_end_merges() {
    let (bench, store) = (Bench::new(), MemoryStore::new());
    let owner = lagging(&bench, &store, 5);
    let [_, before] = parts(&bench, &owner);
    assert_eq!(before.len(), 1);
    // Each attempt to read it fails; nothing else is read of a backlog by these merges.
    for nth in 0..100 {
        bench.disk.inject(Fault::new(Call::Read, nth, Outcome::Eio).on("backlog-"));
    }
    merge(&owner).unwrap();
    bench.disk.clear_faults();
    (0..3).for_each(|_| merge(&owner).unwrap());
    let [there, listed] = parts(&bench, &owner);
    assert_eq!(there, listed);
    assert!(there.len() == 2 && there.is_superset(&before), "{there:?}");
    owner.close().unwrap();

    // It can be read again, and nothing is missing.
    let owner = bench.open_with(&store);
    serve(&owner);
    assert_eq!(store.used(1, "lifetime", None), 109);
}

/// What can't be written is not a part that can't be read: it is tried again, as one part.
#[test]
fn a_part_that_can_not_be_written_fails_the_merge() {
    for call in [Call::Create, Call::Write, Call::Sync, Call::Rename] {
        let (bench, store) = (Bench::new(), MemoryStore::new());
        let owner = lagging(&bench, &store, 5);
        bench.disk.inject(Fault::new(call, 0, Outcome::Enospc).on("backlog-"));
        let error = merge(&owner).unwrap_err();
        assert!(matches!(error, Error::Io { .. }), "{error}");
        (0..3).for_each(|_| merge(&owner).unwrap());
        let [there, listed] = parts(&bench, &owner);
        assert!(there == listed && there.len() == 1, "{call:?}: {there:?}, {listed:?}");
        owner.close().unwrap();
        let owner = bench.open_with(&store);
        serve(&owner);
        assert_eq!(store.used(1, "lifetime", None), 109);
    }
}

/// After a state that could not be saved, the part that it replaced once stayed until the next
/// open, which may be far away.
#[test]
fn a_part_that_was_replaced_is_removed_though_a_save_fails() {
    let (bench, store) = (Bench::new(), MemoryStore::new());
    let owner = lagging(&bench, &store, 5);
    for _ in 0..3 {
        bench.disk.inject(Fault::new(Call::Create, 0, Outcome::Eio).on("sink-billing.tmp"));
        let error = merge(&owner).unwrap_err();
        assert!(matches!(error, Error::Io { .. }), "{error}");
    }
    (0..2).for_each(|_| merge(&owner).unwrap());
    let [there, listed] = parts(&bench, &owner);
    assert!(there == listed && there.len() == 1, "{there:?}, {listed:?}");
    let bytes = there.iter().map(|name| bench.disk.file(name).unwrap().len() as u64).sum::<u64>();
    assert_eq!(status(&owner).backlog_bytes, bytes);
    owner.close().unwrap();
    let owner = bench.open_with(&store);
    serve(&owner);
    assert_eq!(store.used(1, "lifetime", None), 110);
}

/// Killed between any two calls, or as the power goes: a directory that has forgotten half a sink
/// opens, and forgets the rest. A state that is gone before its backlog is taken for a lost one.
#[test]
fn a_sink_that_is_half_forgotten_keeps_nothing_from_opening() {
    let (bench, store) = (Bench::new(), MemoryStore::new());
    lagging(&bench, &store, 5).close().unwrap();
    let image = bench.disk.snapshot_image();
    let calls = {
        let disk = SimDisk::from_image(&image, 1);
        assert!(forget_on(&disk.storage(), "billing").unwrap());
        disk.calls()
    };
    for nth in 0..calls {
        for seed in 0..10 {
            let disk = SimDisk::from_image(&image, seed);
            disk.set_loose_directory(seed % 2 == 0);
            let storage = disk.storage();
            disk.crash_at(nth);
            assert!(forget_on(&storage, "billing").is_err());
            if seed == 0 {
                disk.kill()
            } else {
                disk.power_cut()
            }
            disk.clear_faults();
            let half = Bench { disk, clock: bench.clock.clone() };
            half.open(Vec::new()).close().unwrap();
            forget_on(&half.disk.storage(), "billing").unwrap();
            assert_eq!((half.bytes("sink"), half.bytes("backlog")), (0, 0));
        }
    }
}

/// A delivery writes where the sink is to a new file. On a full disk it could not, and nothing left
/// the disk any more.
#[test]
fn a_full_disk_keeps_nothing_from_the_sinks() {
    let (bench, store) = (Bench::new(), MemoryStore::new());
    lagging(&bench, &store, 5).close().unwrap();
    let owner = bench.open_with(&store);
    // But for what a state may be longer than the one before: disks allocate by the page.
    bench.disk.set_capacity(bench.bytes("") as u64 + 64);
    serve(&owner);
    assert_eq!(store.used(1, "lifetime", None), 105);
    assert!(bench.bytes("backlog-") == 0, "{:?}", bench.disk.file_names());
    for round in 1..=5 {
        bench.disk.set_capacity(bench.bytes("") as u64 + 64);
        consume(&owner, 1, 1);
        serve(&owner);
        assert_eq!(store.used(1, "lifetime", None), 105 + round);
    }
    // Of the room nothing is left behind.
    owner.close().unwrap();
    assert_eq!(bench.bytes("sink-"), bench.disk.file("sink-billing.tgp").unwrap().len());
}
