//! What an engine promises to one sink, promise by promise, on a simulated disk without threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::flushers::Step;
use super::*;
use crate::clock::ManualClock;
use crate::delivery::{SinkCondition, SinkStatus};
use crate::health::{HealthLevel, HealthReason};
use crate::model::{Quota, Timestamp, Window};
use crate::sink::{
    Applied, Fault, MemorySink, MemoryStore, Position, SinkError, UsageBatch, UsageSink,
};
use crate::storage::sim::SimDisk;

pub(super) const START: u64 = 1_767_225_600_000;
const MINUTE: u64 = 60_000;

pub(super) fn at(millis: u64) -> Timestamp {
    Timestamp::from_unix_millis(millis)
}

pub(super) fn small(clock: &ManualClock) -> Config {
    Config::default()
        .lanes(1)
        .lane_records(64)
        .shards(2)
        .journal_file_bytes(64 << 10)
        .closed_window_retention(Duration::ZERO)
        .sync_interval(Duration::from_secs(60))
        .backpressure_deadline(Duration::from_millis(20))
        .delivery(|it| it.retry_attempts(2))
        .clock(Arc::new(clock.clone()))
}

/// A disk with a clock, on which an engine is opened again and again.
pub(super) struct Bench {
    pub(super) disk: Arc<SimDisk>,
    pub(super) clock: ManualClock,
}

impl Bench {
    pub(super) fn new() -> Self {
        Self { disk: SimDisk::new(1), clock: ManualClock::new(at(START)) }
    }

    pub(super) fn open(&self, sinks: Vec<NamedSink>) -> Owner {
        self.try_open(sinks).unwrap()
    }

    pub(super) fn try_open(&self, sinks: Vec<NamedSink>) -> Result<Owner> {
        Owner::open_at_rest_with(&self.disk.storage(), small(&self.clock), sinks)
    }

    pub(super) fn open_with(&self, store: &MemoryStore) -> Owner {
        self.open(vec![named(store.sink())])
    }

    pub(super) fn bytes(&self, prefix: &str) -> usize {
        let names = self.disk.file_names().into_iter().filter(|name| name.starts_with(prefix));
        names.map(|name| self.disk.file(&name).unwrap().len()).sum()
    }
}

pub(super) fn named(sink: impl UsageSink + 'static) -> NamedSink {
    ("billing".to_owned(), Box::new(sink))
}

pub(super) fn consume(owner: &Owner, user: u64, amount: u64) {
    let quota = owner.engine.define(&Quota::new("lifetime", 1 << 40)).unwrap();
    let counted = owner.engine.counted(user, quota).unwrap();
    owner.engine.consume(&counted, amount, false).unwrap();
}

pub(super) fn consume_in_window(owner: &Owner, user: u64, amount: u64) {
    let quota = Quota::new("minute", 1 << 40).window(Window::Minute);
    let quota = owner.engine.define(&quota).unwrap();
    let counted = owner.engine.counted(user, quota).unwrap();
    owner.engine.consume(&counted, amount, false).unwrap();
}

pub(super) fn status(owner: &Owner) -> SinkStatus {
    owner.engine.sinks().remove(0)
}

/// Serves until nobody lags, or a sink does not get any further.
pub(super) fn serve(owner: &Owner) {
    owner.engine.sync().unwrap();
    for _ in 0..100 {
        owner.engine.serve_sinks();
        if owner.engine.sinks().iter().all(|sink| sink.lag_batches == 0) {
            break;
        }
    }
}

/// What is wrong with sinks. Without threads there are no signs of life, which is something else.
fn complaints(owner: &Owner) -> Vec<HealthReason> {
    let mut reasons = owner.engine.health().reasons;
    reasons.retain(|reason| {
        matches!(
            reason,
            HealthReason::SinkDown { .. }
                | HealthReason::SinkRefused { .. }
                | HealthReason::SinkMissing { .. }
        )
    });
    reasons
}

/// A sink that does not answer.
pub(super) struct Down;

impl UsageSink for Down {
    fn position(&mut self, _: EngineId) -> std::result::Result<Option<Position>, SinkError> {
        Err(SinkError::OutcomeUnknown { sink: "test", source: "no answer".into() })
    }

    fn apply(&mut self, _: &UsageBatch) -> std::result::Result<Applied, SinkError> {
        unreachable!("its position is not known")
    }

    fn wants_events(&self) -> bool {
        true
    }
}

/// While a sink is down, what is kept for it grows with the counters, not with what is counted.
#[test]
fn a_backlog_grows_with_the_counters_and_not_with_the_events() {
    let (bench, store) = (Bench::new(), MemoryStore::new());
    let owner = bench.open_with(&store);
    consume(&owner, 1, 1);
    serve(&owner);
    owner.close().unwrap();

    let owner = bench.open(vec![named(Down)]);
    let mut sizes = Vec::new();
    for round in 0..40 {
        for user in 0..100 {
            consume(&owner, user, 1000);
            if user % 20 == 0 {
                owner.engine.step(Step::Files).unwrap();
                owner.engine.sync().unwrap();
            }
        }
        owner.engine.serve_sinks();
        owner.engine.snapshot().unwrap();
        if round >= 2 {
            sizes.push((bench.bytes("backlog"), bench.bytes("journal")));
        }
    }
    let (least, most) = (sizes.iter().min().unwrap(), sizes.iter().max().unwrap());
    assert!(least.0 > 100 && most.0 < 100 * 8 + 1000, "{sizes:?}");
    assert!(sizes.last().unwrap().1 <= sizes[0].1 + (128 << 10), "{sizes:?}");
    let complaints_now = complaints(&owner);
    assert!(
        matches!(
            complaints_now[..],
            [HealthReason::SinkDown { attempts: 3.., lag_batches: 1.., .. }]
        ),
        "{complaints_now:?}"
    );
    assert_eq!(complaints_now[0].level(), HealthLevel::Degraded);
    assert_eq!(status(&owner).backlog_bytes, sizes.last().unwrap().0 as u64);
    owner.close().unwrap();

    let owner = bench.open_with(&store);
    serve(&owner);
    assert_eq!(complaints(&owner), []);
    for user in 0..100 {
        assert_eq!(store.used(user, "lifetime", None), 40_000 + i128::from(user == 1));
    }
    assert_eq!((bench.bytes("backlog"), status(&owner).backlog_bytes), (0, 0));
}

/// R15: what the snapshot drops of a window that is over is not dropped for a sink that lags, also
/// if it never got anything.
#[test]
fn windows_that_close_while_a_sink_lags_are_delivered() {
    for begins_down in [false, true] {
        let (bench, store) = (Bench::new(), MemoryStore::new());
        let mut owner = bench.open_with(&store);
        if begins_down {
            owner.close().unwrap();
            owner = bench.open(vec![named(Down)]);
        } else {
            serve(&owner);
            owner.close().unwrap();
            owner = bench.open(vec![named(Down)]);
        }
        for minute in 0..6 {
            consume_in_window(&owner, 7, 10 + minute);
            bench.clock.advance(Duration::from_millis(MINUTE));
            owner.engine.snapshot().unwrap();
        }
        owner.close().unwrap();
        let owner = bench.open_with(&store);
        serve(&owner);
        for minute in 0..6 {
            let start = Some(at(START + minute * MINUTE));
            assert_eq!(store.used(7, "minute", start), i128::from(10 + minute), "{begins_down}");
        }
    }
}

#[test]
fn a_sink_added_later_starts_from_the_totals() {
    let (bench, store, late) = (Bench::new(), MemoryStore::new(), MemoryStore::new());
    let owner = bench.open_with(&store);
    for round in 0..5 {
        consume(&owner, 1, 10);
        consume(&owner, 2, 1);
        serve(&owner);
        if round == 2 {
            owner.engine.snapshot().unwrap();
        }
    }
    owner.close().unwrap();
    let two = vec![named(store.sink()), ("late".to_owned(), Box::new(late.sink()) as _)];
    let owner = bench.open(two);
    consume(&owner, 1, 10);
    serve(&owner);
    for store in [&store, &late] {
        assert_eq!(store.used(1, "lifetime", None), 60);
        assert_eq!(store.used(2, "lifetime", None), 5);
        assert_eq!(store.position(owner.engine.id()), status(&owner).position);
    }
}

/// The only delivery that can't be cut into pieces of `batch_size` is the first.
#[test]
fn deliveries_are_cut_at_the_batch_size() {
    #[derive(Debug)]
    struct Counting(MemorySink, Arc<AtomicU64>);
    impl UsageSink for Counting {
        fn position(&mut self, id: EngineId) -> std::result::Result<Option<Position>, SinkError> {
            self.0.position(id)
        }
        fn apply(&mut self, batch: &UsageBatch) -> std::result::Result<Applied, SinkError> {
            self.1.fetch_max(batch.rows().len() as u64, Ordering::Relaxed);
            self.0.apply(batch)
        }
    }
    let (bench, store, largest) = (Bench::new(), MemoryStore::new(), Arc::new(AtomicU64::new(0)));
    let config = small(&bench.clock).delivery(|it| it.batch_size(10));
    let sink = named(Counting(store.sink(), Arc::clone(&largest)));
    let owner = Owner::open_at_rest_with(&bench.disk.storage(), config, vec![sink]).unwrap();
    serve(&owner);
    for user in 0..50 {
        consume(&owner, user, 1);
        if user % 4 == 0 {
            owner.engine.sync().unwrap();
        }
    }
    serve(&owner);
    assert_eq!(store.rows().len(), 50);
    let largest = largest.load(Ordering::Relaxed);
    assert!((10..14).contains(&largest), "{largest}");
    assert!(status(&owner).deliveries >= 5);
}

#[test]
fn an_emptied_sink_gets_all_totals_anew() {
    let (bench, store) = (Bench::new(), MemoryStore::new());
    let owner = bench.open_with(&store);
    consume(&owner, 1, 10);
    serve(&owner);
    owner.close().unwrap();
    let emptied = MemoryStore::new();
    let owner = bench.open_with(&emptied);
    consume(&owner, 1, 5);
    serve(&owner);
    assert_eq!(emptied.used(1, "lifetime", None), 15);
}

/// A copy of the data directory that delivers too, or one that was set back.
#[test]
fn a_sink_that_is_ahead_is_refused_and_the_engine_goes_on() {
    let (bench, store) = (Bench::new(), MemoryStore::new());
    let owner = bench.open_with(&store);
    consume(&owner, 1, 10);
    serve(&owner);
    owner.close().unwrap();
    let copy = Bench {
        disk: SimDisk::from_image(&bench.disk.snapshot_image(), 2),
        clock: bench.clock.clone(),
    };
    let owner = bench.open_with(&store);
    consume(&owner, 1, 10);
    serve(&owner);
    let ahead = store.position(owner.engine.id());
    owner.close().unwrap();

    let owner = copy.open_with(&store);
    consume(&owner, 1, 7);
    serve(&owner);
    let refused = status(&owner);
    assert_eq!(refused.condition, SinkCondition::Refused);
    let reason = refused.last_error.unwrap();
    assert!(reason.contains("the sink disagrees") && reason.contains("ahead"), "{reason}");
    let reasons = complaints(&owner);
    assert!(matches!(&reasons[..], [HealthReason::SinkRefused { sink, .. }] if sink == "billing"));
    assert_eq!(store.position(owner.engine.id()), ahead);
    assert_eq!(store.used(1, "lifetime", None), 20);
    consume(&owner, 1, 1);
    owner.engine.snapshot().unwrap();
}

/// A confirmation that is lost at the last moment is found at the next open, in every order.
#[test]
fn an_end_in_doubt_stays_a_boundary_over_merges_and_restarts() {
    for fault in [Fault::BeforeCommit, Fault::AfterCommit] {
        for first in [true, false] {
            let (bench, store) = (Bench::new(), MemoryStore::new());
            let owner = bench.open_with(&store);
            if !first {
                consume(&owner, 1, 100);
                serve(&owner);
            }
            consume(&owner, 1, 10);
            owner.engine.sync().unwrap();
            store.inject(fault);
            owner.engine.serve_sinks();
            let in_flight = status(&owner).in_flight;
            assert!(in_flight.is_some());
            bench.disk.kill();
            drop(owner);
            let owner = bench.open(vec![named(Down)]);
            for _ in 0..4 {
                consume(&owner, 1, 1);
                owner.engine.serve_sinks();
                owner.engine.snapshot().unwrap();
            }
            assert_eq!(status(&owner).in_flight, in_flight);
            let parts = bench.disk.file_names();
            let parts = parts.iter().filter(|name| name.starts_with("backlog")).count();
            assert_eq!(parts, 2);
            bench.disk.kill();
            drop(owner);
            let owner = bench.open_with(&store);
            serve(&owner);
            let expected = 14 + if first { 0 } else { 100 };
            assert_eq!(store.used(1, "lifetime", None), expected, "{fault:?}, first: {first}");
        }
    }
}

#[test]
fn what_a_sink_misses_that_is_not_attached_is_kept_until_it_is_forgotten() {
    let (bench, store) = (Bench::new(), MemoryStore::new());
    let owner = bench.open_with(&store);
    consume(&owner, 1, 10);
    serve(&owner);
    owner.close().unwrap();
    let without = |rounds: u64| {
        let owner = bench.open(Vec::new());
        for _ in 0..rounds {
            consume(&owner, 1, 1);
            owner.engine.snapshot().unwrap();
        }
        owner
    };
    let owner = without(4);
    let found = status(&owner);
    assert!(!found.is_attached && found.lag_batches > 0 && found.backlog_bytes > 0, "{found:?}");
    let reasons = complaints(&owner);
    assert!(matches!(&reasons[..], [HealthReason::SinkMissing { sink, .. }] if sink == "billing"));
    owner.close().unwrap();
    let owner = bench.open_with(&store);
    serve(&owner);
    assert_eq!(store.used(1, "lifetime", None), 14);
    owner.close().unwrap();

    // Until the journal does not reach back any more: otherwise the sink's own position would do.
    let owner = without(0);
    for round in 0..1500 {
        consume(&owner, 1, 1);
        owner.engine.sync().unwrap();
        if round % 100 == 0 {
            owner.engine.snapshot().unwrap();
            owner.engine.step(Step::Files).unwrap();
        }
    }
    owner.close().unwrap();
    let storage = bench.disk.storage();
    assert!(crate::delivery::forget_on(&storage, "billing").unwrap());
    assert!(!crate::delivery::forget_on(&storage, "billing").unwrap());
    assert_eq!((bench.bytes("sink"), bench.bytes("backlog")), (0, 0));
    let owner = bench.open_with(&store);
    serve(&owner);
    let refused = status(&owner);
    assert_eq!(refused.condition, SinkCondition::Refused, "it has lost the way: {refused:?}");
    assert!(refused.last_error.unwrap().contains("fed before"));
    assert_eq!(store.used(1, "lifetime", None), 14);
}

/// A file of the journal that is used again still shows batches of its earlier life: one that a
/// sink is at, and that was released, is not taken for a place to go on from.
#[test]
fn what_a_reused_file_still_shows_is_not_in_the_journal() {
    let (bench, store) = (Bench::new(), MemoryStore::new());
    let owner = bench.open_with(&store);
    for _ in 0..300 {
        consume(&owner, 1, 1);
        owner.engine.sync().unwrap();
    }
    serve(&owner);
    owner.close().unwrap();
    assert!(crate::delivery::forget_on(&bench.disk.storage(), "billing").unwrap());

    let mut refusals = 0;
    for life in 0..12 {
        let owner = bench.open(Vec::new());
        for _ in 0..2 {
            consume(&owner, 1, 1);
            owner.engine.snapshot().unwrap();
        }
        owner.engine.step(Step::Files).unwrap();
        owner.close().unwrap();

        let disk = SimDisk::from_image(&bench.disk.snapshot_image(), life);
        let fork = Bench { disk, clock: bench.clock.clone() };
        let owner = fork.open_with(&store.duplicate());
        serve(&owner);
        // The first lives leave the journal as far back as the sink is.
        if let Some(refused) = status(&owner).last_error {
            assert!(refused.contains("fed before"), "life {life}: {refused}");
            refusals += 1;
        }
        for _ in 0..2 {
            consume(&owner, 1, 1);
            owner.engine.snapshot().unwrap();
        }
    }
    assert!((6..12).contains(&refusals), "{refusals}");
}

/// After an error a sink may have the batch or not: it is asked before anything else is sent.
#[test]
fn after_an_error_a_sink_is_asked_where_it_is() {
    #[derive(Debug)]
    struct Doubtful {
        sink: MemorySink,
        applied: u64,
        is_in_doubt: bool,
        unasked: Arc<AtomicU64>,
    }
    impl UsageSink for Doubtful {
        fn position(&mut self, id: EngineId) -> std::result::Result<Option<Position>, SinkError> {
            self.is_in_doubt = false;
            self.sink.position(id)
        }
        fn apply(&mut self, batch: &UsageBatch) -> std::result::Result<Applied, SinkError> {
            self.unasked.fetch_add(u64::from(self.is_in_doubt), Ordering::Relaxed);
            let applied = self.sink.apply(batch);
            self.applied += 1;
            self.is_in_doubt = self.applied.is_multiple_of(2);
            let source = "it was cut off".into();
            if self.is_in_doubt {
                Err(SinkError::OutcomeUnknown { sink: "test", source })
            } else {
                applied
            }
        }
    }
    let (bench, store, unasked) = (Bench::new(), MemoryStore::new(), Arc::new(AtomicU64::new(0)));
    let (sink, count) = (store.sink(), Arc::clone(&unasked));
    let sink = Doubtful { sink, applied: 0, is_in_doubt: false, unasked: count };
    let owner = bench.open(vec![named(sink)]);
    for round in 1..=5 {
        consume(&owner, 1, 1);
        owner.engine.sync().unwrap();
        // Again after the error.
        (0..3).for_each(|_| owner.engine.serve_sinks());
        assert_eq!(store.used(1, "lifetime", None), round);
    }
    assert_eq!(unasked.load(Ordering::Relaxed), 0);
    // Also those whose confirmation was lost.
    let SinkStatus { deliveries, rows, last_delivery, .. } = status(&owner);
    assert_eq!((deliveries, rows, last_delivery), (5, 5, Some(at(START))));
}

/// A sink is anybody's code.
#[test]
fn a_sink_that_panics_harms_nobody_else() {
    #[derive(Debug)]
    struct Panics(MemorySink, u32);
    impl UsageSink for Panics {
        fn position(&mut self, id: EngineId) -> std::result::Result<Option<Position>, SinkError> {
            self.0.position(id)
        }
        fn apply(&mut self, batch: &UsageBatch) -> std::result::Result<Applied, SinkError> {
            let applied = self.0.apply(batch);
            self.1 += 1;
            assert!(self.1 > 3, "out of order");
            applied
        }
    }
    let (bench, store, other) = (Bench::new(), MemoryStore::new(), MemoryStore::new());
    let sinks = vec![
        named(Panics(store.sink(), 0)),
        ("other".to_owned(), Box::new(other.sink()) as Box<dyn UsageSink>),
    ];
    let owner = bench.open(sinks);
    for round in 1..=5 {
        consume(&owner, 1, 1);
        owner.engine.sync().unwrap();
        owner.engine.serve_sinks();
        assert_eq!(other.used(1, "lifetime", None), round);
        if round == 2 {
            let reason = status(&owner).last_error.unwrap();
            assert!(reason.contains("the sink panicked: out of order"), "{reason}");
        }
    }
    serve(&owner);
    assert_eq!(store.used(1, "lifetime", None), 5);
    assert_eq!(complaints(&owner), []);
}

#[test]
fn names_are_checked_before_anything_is_opened() {
    let bench = Bench::new();
    let store = MemoryStore::new();
    for name in ["", "a/b", "Ä", &"a".repeat(65)] {
        let error = bench.try_open(vec![(name.to_owned(), Box::new(store.sink()))]).unwrap_err();
        assert!(matches!(error, Error::InvalidConfig { .. }), "{error}");
    }
    let error = bench.try_open(vec![named(store.sink()), named(store.sink())]).unwrap_err();
    assert!(error.to_string().contains("each name once"), "{error}");
    assert_eq!(bench.disk.file_names(), [""; 0]);
}

/// What a sink is told of a counter: what was added, what the engine has, until the window is over.
#[test]
fn rows_say_what_the_engine_has() {
    #[derive(Debug)]
    struct Last(MemorySink, Arc<Mutex<Vec<crate::sink::UsageRow>>>);
    impl UsageSink for Last {
        fn position(&mut self, id: EngineId) -> std::result::Result<Option<Position>, SinkError> {
            self.0.position(id)
        }
        fn apply(&mut self, batch: &UsageBatch) -> std::result::Result<Applied, SinkError> {
            *self.1.lock() = batch.rows().to_vec();
            self.0.apply(batch)
        }
    }
    let (bench, store, rows) = (Bench::new(), MemoryStore::new(), Arc::new(Mutex::default()));
    let owner = bench.open(vec![named(Last(store.sink(), Arc::clone(&rows)))]);
    consume_in_window(&owner, 7, 10);
    serve(&owner);
    consume_in_window(&owner, 7, 5);
    owner.engine.sync().unwrap();
    consume_in_window(&owner, 7, 1);
    let quota = owner.engine.quota_by_name("minute").unwrap();
    owner.engine.set_limit(&owner.engine.counted(7, quota).unwrap(), Some(99)).unwrap();
    bench.clock.advance(Duration::from_millis(MINUTE));
    consume_in_window(&owner, 7, 2);
    owner.engine.sync().unwrap();
    owner.engine.serve_sinks();
    let rows = rows.lock();
    let facts: Vec<_> = rows
        .iter()
        .map(|row| (row.window_start, row.window_end, row.added, row.used, row.limit))
        .collect();
    let (first, second, third) =
        (Some(at(START)), Some(at(START + MINUTE)), Some(at(START + 2 * MINUTE)));
    assert_eq!(facts, [(first, second, 6, None, 99), (second, third, 2, Some(2), 99)]);
}
