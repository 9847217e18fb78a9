//! What is recorded: counted as a consume, kept only for sinks that want it, and delivered whole,
//! once; promise by promise, on a simulated disk without threads.

use std::sync::Arc;

use parking_lot::Mutex;

use super::flushers::Step;
use super::sink_tests::{Bench, Down, at, named, serve, small, status};
use super::*;
use crate::delivery::state::{self, SinkState};
use crate::model::{Quota, Usage, UsageEvent};
use crate::sink::{
    Applied, EventRow, MemorySink, MemoryStore, Position, SinkError, UsageBatch, UsageSink,
};

fn quota(owner: &Owner) -> QuotaId {
    owner.engine.define(&Quota::new("credits", 1 << 40).decimals(2)).unwrap()
}

/// Of 0.25 of the quota's unit, which are 25, at a time of its own.
fn event(owner: &Owner, number: u64) -> UsageEvent {
    let event = UsageEvent::new(number % 3, quota(owner), 0.25, at(number));
    event.metadata("number", number.to_string()).metadata("", "\0\n\"ü")
}

fn record(owner: &Owner, number: u64) -> UsageEvent {
    let event = event(owner, number);
    owner.engine.record(&event).unwrap();
    event
}

/// Records some, with room made for each.
fn record_all(owner: &Owner, numbers: std::ops::Range<u64>) -> Vec<UsageEvent> {
    let record = |number| {
        let event = record(owner, number);
        owner.engine.step(Step::Files).unwrap();
        owner.engine.sync().unwrap();
        event
    };
    numbers.map(record).collect()
}

fn delivered(store: &MemoryStore) -> Vec<UsageEvent> {
    store.events().into_iter().map(|row| row.event).collect()
}

/// A sink that takes totals only.
struct Totals(MemorySink);

impl UsageSink for Totals {
    fn position(&mut self, id: EngineId) -> std::result::Result<Option<Position>, SinkError> {
        self.0.position(id)
    }

    fn apply(&mut self, batch: &UsageBatch) -> std::result::Result<Applied, SinkError> {
        assert_eq!(batch.events(), []);
        self.0.apply(batch)
    }
}

/// One that is down, and takes totals only.
struct DownForTotals;

impl UsageSink for DownForTotals {
    fn position(&mut self, id: EngineId) -> std::result::Result<Option<Position>, SinkError> {
        Down.position(id)
    }

    fn apply(&mut self, batch: &UsageBatch) -> std::result::Result<Applied, SinkError> {
        Down.apply(batch)
    }
}

#[test]
fn an_event_counts_and_is_delivered_whole() {
    let (bench, store) = (Bench::new(), MemoryStore::new());
    let owner = bench.open_with(&store);
    let events = [
        event(&owner, 1),
        UsageEvent::new(u64::MAX, quota(&owner), 1e9, Timestamp::MAX).request_id(u128::MAX),
        UsageEvent::new(0, quota(&owner), 0.07, Timestamp::MIN),
    ];
    let used = events.each_ref().map(|event| owner.engine.record(event).unwrap().used);
    assert_eq!(used, [25, 100_000_000_000, 7]);
    serve(&owner);
    assert_eq!(delivered(&store), events);
    assert!(store.events().iter().all(|row| &*row.name == "credits"));
    assert_eq!(store.used(0, "credits", None), 7);
    assert_eq!(store.used(1, "credits", None), 25);
    assert_eq!(status(&owner).events, 3);
}

/// What is recorded while nobody wants it takes one record in the ring, and nothing in the journal.
#[test]
fn what_nobody_wants_is_not_kept() {
    let (bench, store) = (Bench::new(), MemoryStore::new());
    let owner = bench.open(vec![named(Totals(store.sink()))]);
    let tail = |owner: &Owner| owner.engine.lanes.iter().map(|lane| lane.tail()).sum::<u64>();
    quota(&owner);
    let before = tail(&owner);
    record(&owner, 1);
    assert_eq!(tail(&owner), before + 1);
    serve(&owner);
    assert_eq!(store.used(1, "credits", None), 25);
    owner.close().unwrap();

    // From here on somebody does.
    let owner = bench.open_with(&store);
    let before = tail(&owner);
    let wanted = record(&owner, 2);
    assert!(tail(&owner) > before + 2);
    serve(&owner);
    assert_eq!(delivered(&store), [wanted]);
    owner.close().unwrap();

    // And from here on nobody does, also of what was kept and not delivered.
    let owner = bench.open(vec![named(Down)]);
    record(&owner, 3);
    owner.close().unwrap();
    let owner = bench.open(vec![named(Totals(store.sink()))]);
    let before = tail(&owner);
    record(&owner, 4);
    assert_eq!(tail(&owner), before + 1);
    serve(&owner);
    assert_eq!((0..3).map(|user| store.used(user, "credits", None)).sum::<i128>(), 100);
}

#[test]
fn what_can_not_be_recorded_is_refused_and_not_counted() {
    for wants in [false, true] {
        let (bench, store) = (Bench::new(), MemoryStore::new());
        let sink = if wants { named(store.sink()) } else { named(Totals(store.sink())) };
        let owner = bench.open(vec![sink]);
        let event = UsageEvent::new(1, quota(&owner), 1.0, at(1));
        for value in [f64::NAN, f64::INFINITY, -1.0, 0.001, 1e300] {
            let error = owner.engine.record(&UsageEvent { value, ..event.clone() }).unwrap_err();
            assert!(matches!(error, Error::InvalidFloat { .. }), "{value}: {error}");
        }
        let zero = owner.engine.record(&UsageEvent { value: 0.0, ..event.clone() });
        assert!(matches!(zero, Err(Error::InvalidAmount(0))));
        let unknown = owner.engine.record(&UsageEvent { quota: QuotaId(9), ..event.clone() });
        assert!(matches!(unknown, Err(Error::UnknownQuota(QuotaId(9)))));
        // A ring of 64 records holds 61 of 24 bytes, of which two say how long it is.
        let with = |bytes: usize| event.clone().metadata("", "x".repeat(bytes));
        let most = (0..2000).rev().find(|&len| owner.engine.record(&with(len)).is_ok()).unwrap();
        let error = owner.engine.record(&with(most + 1)).unwrap_err();
        assert!(
            matches!(error, Error::EventTooLarge { bytes: 1463, max: 1462 }),
            "{most}: {error}"
        );
        serve(&owner);
        assert_eq!(store.used(1, "credits", None), 100, "one of them was counted");
        assert_eq!(store.events().len(), usize::from(wants));
    }
    let bench = Bench::new();
    let config = small(&bench.clock).lane_records(1 << 10);
    let owner = Owner::open_at_rest_with(&bench.disk.storage(), config, Vec::new()).unwrap();
    let event = UsageEvent::new(1, quota(&owner), 1.0, at(1)).metadata("", "x".repeat(4096));
    let error = owner.engine.record(&event).unwrap_err();
    assert!(matches!(error, Error::EventTooLarge { bytes: 4097.., max: 4096 }), "{error}");
}

/// The largest there can be: whole over a death, with what a full operation of it takes.
#[test]
fn the_largest_event_survives_in_the_ring() {
    let (bench, store) = (Bench::new(), MemoryStore::new());
    let config = || small(&bench.clock).lane_records(256);
    let open = || {
        let sinks = vec![named(store.sink())];
        Owner::open_at_rest_with(&bench.disk.storage(), config(), sinks).unwrap()
    };
    let owner = open();
    let mut largest = UsageEvent::new(1, quota(&owner), 1.0, at(1)).request_id(7);
    let room = 4096 - crate::ledger::payload_len(&largest.clone().metadata("", "")).unwrap();
    largest = largest.metadata("", "x".repeat(room - 2));
    assert_eq!(crate::ledger::payload_len(&largest).unwrap(), 4096);
    owner.engine.record(&largest).unwrap();
    bench.disk.kill();
    drop(owner);
    let owner = open();
    serve(&owner);
    assert_eq!(delivered(&store), [largest]);
}

/// With an id an event counts and is delivered once, also after a restart.
#[test]
fn a_request_is_recorded_once() {
    let (bench, store) = (Bench::new(), MemoryStore::new());
    let owner = bench.open_with(&store);
    let event = event(&owner, 1).request_id(0xfeed);
    let again = |owner: &Owner| -> Usage { owner.engine.record(&event).unwrap() };
    assert_eq!(again(&owner), again(&owner));
    serve(&owner);
    again(&owner);
    bench.disk.kill();
    drop(owner);
    let owner = bench.open_with(&store);
    assert_eq!(again(&owner).used, 25);
    let other = owner.engine.record(&UsageEvent { value: 2.0, ..event.clone() });
    assert!(matches!(other, Err(Error::RequestMismatch { id: 0xfeed })));
    serve(&owner);
    assert_eq!(delivered(&store), [event]);
    assert_eq!(store.used(1, "credits", None), 25);
}

/// What no sync had covered is in the ring, or in the batch that the recovery makes of it.
#[test]
fn events_outlive_the_process_and_recoveries() {
    let (bench, store) = (Bench::new(), MemoryStore::new());
    let owner = bench.open_with(&store);
    let mut events: Vec<_> = (0..3).map(|number| record(&owner, number)).collect();
    owner.engine.step(Step::Drain).unwrap();
    events.extend((3..6).map(|number| record(&owner, number)));
    bench.disk.kill();
    drop(owner);
    // Recovered twice before they are delivered.
    drop(bench.open_with(&store));
    let owner = bench.open_with(&store);
    serve(&owner);
    assert_eq!(delivered(&store), events);
}

/// A sink that is added later gets what is recorded from then on, with all totals.
#[test]
fn a_sink_added_later_gets_events_from_then_on() {
    let (bench, store, late) = (Bench::new(), MemoryStore::new(), MemoryStore::new());
    let owner = bench.open_with(&store);
    let mut events = record_all(&owner, 0..4);
    serve(&owner);
    // In the ring when the process dies: in the batch of the next recovery.
    events.push(record(&owner, 4));
    bench.disk.kill();
    drop(owner);
    let two = || vec![named(store.sink()), ("late".to_owned(), Box::new(late.sink()) as _)];
    let owner = bench.open(two());
    let later = record_all(&owner, 5..8);
    serve(&owner);
    events.extend(later.clone());
    assert_eq!((delivered(&store), delivered(&late)), (events, later));
    assert_eq!(late.used(0, "credits", None), store.used(0, "credits", None));
}

/// A sink and the events' bytes in each of its deliveries.
struct Watched(MemorySink, Arc<Mutex<Vec<usize>>>);

impl UsageSink for Watched {
    fn position(&mut self, id: EngineId) -> std::result::Result<Option<Position>, SinkError> {
        self.0.position(id)
    }

    fn apply(&mut self, batch: &UsageBatch) -> std::result::Result<Applied, SinkError> {
        let bytes = |row: &EventRow| crate::ledger::payload_len(&row.event).unwrap();
        self.1.lock().push(batch.events().iter().map(bytes).sum());
        self.0.apply(batch)
    }

    fn wants_events(&self) -> bool {
        true
    }
}

/// While a sink is down all its events are kept, in order, in parts; each is a delivery, so that
/// none holds much more than the bound. For a sink that takes totals nothing grows.
#[test]
fn a_backlog_keeps_all_events_in_order_and_in_parts() {
    let (bench, store) = (Bench::new(), MemoryStore::new());
    let owner = bench.open_with(&store);
    serve(&owner);
    owner.close().unwrap();
    let totals: NamedSink = ("totals".to_owned(), Box::new(DownForTotals));
    let owner = bench.open(vec![named(Down), totals]);
    let mut events = Vec::new();
    let mut totals_bytes = Vec::new();
    for round in 0..20 {
        events.extend(record_all(&owner, round * 5..round * 5 + 5));
        owner.engine.serve_sinks();
        owner.engine.snapshot().unwrap();
        totals_bytes.push(owner.engine.sinks()[1].backlog_bytes);
    }
    assert!(totals_bytes[19] < totals_bytes[2] + 20, "{totals_bytes:?}");
    let bytes: usize = events.iter().map(|event| crate::ledger::payload_len(event).unwrap()).sum();
    assert!(status(&owner).backlog_bytes > bytes as u64);
    owner.close().unwrap();
    let kept = SinkState::load(&bench.disk.storage(), owner.engine.id(), "billing").unwrap();
    assert!(kept.backlog.len() > 5, "{kept:?}");

    let seen = Arc::default();
    let owner = bench.open(vec![named(Watched(store.sink(), Arc::clone(&seen)))]);
    serve(&owner);
    assert_eq!(delivered(&store), events);
    assert_eq!((0..3).map(|user| store.used(user, "credits", None)).sum::<i128>(), 2500);
    let seen = seen.lock();
    // In the tests a range is cut at 256 bytes of events; a batch here holds one of some 30.
    assert!(seen.iter().all(|&bytes| bytes < 256 + 40), "{seen:?}");
    let names = bench.disk.file_names().into_iter();
    let left: Vec<_> = names.filter(|name| name.starts_with("backlog-billing")).collect();
    assert_eq!(left, [""; 0]);
}

/// What a sink had given up once came back out of its backlog: the parts that were written while it
/// wanted events were delivered with them, if it had got no further when it wanted events again.
#[test]
fn events_that_a_sink_gave_up_do_not_come_back() {
    for goes_on in [false, true] {
        let (bench, store) = (Bench::new(), MemoryStore::new());
        let owner = bench.open_with(&store);
        serve(&owner);
        owner.close().unwrap();
        let lag = |sink: NamedSink, numbers: std::ops::Range<u64>| {
            let owner = bench.open(vec![sink]);
            let rounds = numbers.map(|number| {
                let events = record_all(&owner, number..number + 1);
                owner.engine.serve_sinks();
                owner.engine.snapshot().unwrap();
                events
            });
            let events: Vec<_> = rounds.flatten().collect();
            assert!(events.is_empty() || status(&owner).backlog_bytes > 0);
            owner.close().unwrap();
            events
        };
        lag(named(Down), 0..4);
        let during = if goes_on { 4..7 } else { 4..4 };
        lag(named(DownForTotals), during);
        // The last part is made longer by what comes now, which is wanted again.
        let wanted = lag(named(Down), if goes_on { 7..12 } else { 7..7 });
        let owner = bench.open_with(&store);
        serve(&owner);
        assert_eq!(delivered(&store), wanted, "goes on: {goes_on}");
        let used: i128 = (0..3).map(|user| store.used(user, "credits", None)).sum();
        assert_eq!(used, if goes_on { 12 } else { 4 } * 25);
    }
}

/// From the journal too a delivery ends where there are many events.
#[test]
fn a_delivery_from_the_journal_is_cut_where_there_are_many_events() {
    let (bench, store) = (Bench::new(), MemoryStore::new());
    let seen = Arc::default();
    let owner = bench.open(vec![named(Watched(store.sink(), Arc::clone(&seen)))]);
    let mut events = record_all(&owner, 0..40);
    serve(&owner);
    events.extend(record_all(&owner, 40..80));
    serve(&owner);
    assert_eq!(delivered(&store), events);
    let seen = seen.lock();
    assert!(seen.len() > 8 && seen.iter().all(|&bytes| bytes < 256 + 40), "{seen:?}");
}

/// What was emptied gets all totals anew, and of the events those that it had not confirmed. One
/// whose state is lost goes on from its own position, with its events.
#[test]
fn an_emptied_sink_and_a_lost_state_get_no_event_twice() {
    let (bench, store) = (Bench::new(), MemoryStore::new());
    let owner = bench.open_with(&store);
    let first = record_all(&owner, 0..3);
    serve(&owner);
    let second = record_all(&owner, 3..5);
    owner.close().unwrap();

    let image = bench.disk.snapshot_image();
    let emptied = MemoryStore::new();
    let owner = bench.open_with(&emptied);
    serve(&owner);
    assert_eq!(delivered(&emptied), second);
    assert_eq!(emptied.used(0, "credits", None), 50);
    drop(owner);

    let bench = Bench { disk: crate::storage::sim::SimDisk::from_image(&image, 1), ..bench };
    assert!(bench.disk.delete(&state::file_name("billing")));
    let owner = bench.open_with(&store);
    serve(&owner);
    assert_eq!(delivered(&store), [first, second].concat());
}
