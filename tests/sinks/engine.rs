//! The engine delivers: to sinks in memory, and to servers of the tests' own while either side is
//! killed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use tollgate::sink::{
    Applied, Fault, JsonLinesSink, MemorySink, MemoryStore, Position, SinkError, UsageBatch,
    UsageSink,
};
use tollgate::{
    Config, DeliveryConfig, EngineId, Error, HealthReason, Quota, QuotaId, SinkCondition, Tollgate,
    Verdict,
};

/// Only guards against a hang.
const PATIENCE: Duration = Duration::from_secs(60);

fn config(delivery: DeliveryConfig) -> Config {
    Config::default().lanes(2).lane_records(1 << 10).delivery(|_| delivery)
}

fn often() -> DeliveryConfig {
    DeliveryConfig::default()
        .flush_interval(Duration::from_millis(10))
        .retry_delay(Duration::from_millis(1))
}

fn seldom() -> DeliveryConfig {
    DeliveryConfig::default().flush_interval(Duration::from_secs(3600))
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn consume(gate: &Tollgate, user: u64, quota: QuotaId) {
    gate.consume(user, quota, 1).unwrap();
}

/// A sink that waits in every delivery until it is let go.
struct Slow {
    inner: MemorySink,
    gate: Arc<(Mutex<bool>, Condvar)>,
    entered: Arc<AtomicBool>,
}

impl Slow {
    fn new(store: &MemoryStore) -> Self {
        let gate = Arc::new((Mutex::new(false), Condvar::new()));
        Self { inner: store.sink(), gate, entered: Arc::default() }
    }
}

impl UsageSink for Slow {
    fn position(&mut self, engine: EngineId) -> Result<Option<Position>, SinkError> {
        self.inner.position(engine)
    }

    fn apply(&mut self, batch: &UsageBatch) -> Result<Applied, SinkError> {
        self.entered.store(true, Ordering::Release);
        let (is_open, opened) = &*self.gate;
        let is_open = is_open.lock().unwrap();
        drop(opened.wait_while(is_open, |is_open| !*is_open).unwrap());
        self.inner.apply(batch)
    }
}

#[test]
fn several_sinks_share_the_workers_and_get_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let lines = tempfile::tempdir().unwrap();
    let stores = [MemoryStore::new(), MemoryStore::new(), MemoryStore::new()];
    let mut builder = Tollgate::builder(dir.path()).config(config(often().worker_count(2)));
    for (index, store) in stores.iter().enumerate() {
        builder = builder.sink(format!("store-{index}"), store.sink());
    }
    let gate = builder.sink("lines", JsonLinesSink::open(lines.path()).unwrap()).open().unwrap();
    let quota = gate.define(Quota::new("tokens", 1 << 40)).unwrap();
    std::thread::scope(|scope| {
        for user in 0..4 {
            let gate = &gate;
            scope.spawn(move || {
                (0..2000).for_each(|_| consume(gate, user, quota));
            });
        }
    });
    // By itself, without being asked.
    wait_until("delivered", || {
        stores.iter().all(|store| (0..4).all(|user| store.used(user, "tokens", None) == 2000))
    });
    gate.consume(7, quota, 5).unwrap();
    gate.deliver(PATIENCE).unwrap();
    // An idle journal gets one more batch, which says so and has nothing for them.
    wait_until("all are where the journal is", || {
        let sinks = gate.sinks();
        assert_eq!(sinks.len(), 4);
        sinks.iter().all(|sink| {
            assert!(sink.deliveries > 0, "{sink:?}");
            sink.lag_batches == 0 && sink.position == sinks[0].position
        })
    });
    for store in &stores {
        assert_eq!(store.used(7, "tokens", None), 5);
    }
    assert!(gate.health().is_healthy(), "{:?}", gate.health());
    gate.close().unwrap();
    let files = std::fs::read_dir(lines.path()).unwrap().map(|entry| entry.unwrap().path());
    let text: String = files
        .filter(|path| path.extension().is_some_and(|extension| extension == "jsonl"))
        .map(|path| std::fs::read_to_string(path).unwrap())
        .collect();
    let added = |line: &str| -> i64 {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        if line["type"] == "usage" { line["added"].as_i64().unwrap() } else { 0 }
    };
    assert_eq!(text.lines().map(added).sum::<i64>(), 8005);
}

/// `batch_size` distinct counters do not wait for the interval.
#[test]
fn much_goes_out_before_its_time() {
    let dir = tempfile::tempdir().unwrap();
    let store = MemoryStore::new();
    let gate = Tollgate::builder(dir.path())
        .config(config(seldom().batch_size(50)))
        .sink("store", store.sink())
        .open()
        .unwrap();
    let quota = gate.define(Quota::new("tokens", 1 << 40)).unwrap();
    gate.deliver(PATIENCE).unwrap();
    (0..10).for_each(|user| consume(&gate, user, quota));
    gate.sync().unwrap();
    (10..60).for_each(|user| consume(&gate, user, quota));
    wait_until("delivered", || store.used(59, "tokens", None) == 1);
    assert_eq!(store.rows().len(), 60);
}

#[test]
fn close_delivers_and_what_it_can_not_deliver_comes_after_the_next_open() {
    let dir = tempfile::tempdir().unwrap();
    let store = MemoryStore::new();
    let open = || {
        Tollgate::builder(dir.path()).config(config(seldom())).sink("store", store.sink()).open()
    };
    let gate = open().unwrap();
    let quota = gate.define(Quota::new("tokens", 1 << 40)).unwrap();
    gate.consume(1, quota, 5).unwrap();
    gate.close().unwrap();
    assert_eq!(store.used(1, "tokens", None), 5);

    for fault in [Fault::BeforeCommit, Fault::AfterCommit] {
        let gate = open().unwrap();
        gate.consume(1, quota, 5).unwrap();
        store.inject(fault);
        gate.close().unwrap();
    }
    let gate = open().unwrap();
    gate.deliver(PATIENCE).unwrap();
    assert_eq!(store.used(1, "tokens", None), 15);
}

/// A database that hangs holds neither callers nor a close; what it does later is no harm.
#[test]
fn a_sink_that_hangs_holds_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let store = MemoryStore::new();
    let slow = Slow::new(&store);
    let (door, entered) = (Arc::clone(&slow.gate), Arc::clone(&slow.entered));
    let gate =
        Tollgate::builder(dir.path()).config(config(often())).sink("slow", slow).open().unwrap();
    let quota = gate.define(Quota::new("tokens", 1 << 40)).unwrap();
    gate.consume(1, quota, 5).unwrap();
    wait_until("it hangs", || entered.load(Ordering::Acquire));
    gate.consume(1, quota, 6).unwrap();
    gate.snapshot().unwrap();
    let error = gate.deliver(Duration::from_millis(50)).unwrap_err();
    assert!(matches!(error, Error::NotDelivered { .. }), "{error}");
    assert!(error.to_string().contains("it takes too long"), "{error}");
    gate.close().unwrap();
    // The directory is free, although the worker still hangs in the sink.
    let open = |sink: MemorySink| {
        Tollgate::builder(dir.path()).config(config(often())).sink("slow", sink).open().unwrap()
    };
    let gate = open(store.sink());
    gate.consume(1, quota, 7).unwrap();
    gate.deliver(PATIENCE).unwrap();
    assert_eq!(store.used(1, "tokens", None), 18);
    // Now it arrives, and is refused: its start is not where the sink is.
    *door.0.lock().unwrap() = true;
    door.1.notify_all();
    gate.consume(1, quota, 1).unwrap();
    gate.deliver(PATIENCE).unwrap();
    assert_eq!(store.used(1, "tokens", None), 19);
}

/// A sink that fails while it is told to.
struct Switched {
    inner: MemorySink,
    is_down: Arc<AtomicBool>,
}

impl UsageSink for Switched {
    fn position(&mut self, engine: EngineId) -> Result<Option<Position>, SinkError> {
        self.inner.position(engine)
    }

    fn apply(&mut self, batch: &UsageBatch) -> Result<Applied, SinkError> {
        if self.is_down.load(Ordering::Acquire) {
            return Err(SinkError::outcome_unknown("test", "no answer"));
        }
        self.inner.apply(batch)
    }
}

#[test]
fn a_sink_that_fails_is_retried_then_down_and_healthy_again() {
    let dir = tempfile::tempdir().unwrap();
    let (store, is_down) = (MemoryStore::new(), Arc::new(AtomicBool::new(false)));
    let sink = Switched { inner: store.sink(), is_down: Arc::clone(&is_down) };
    let gate = Tollgate::builder(dir.path())
        .config(config(often().retry_attempts(4)))
        .sink("store", sink)
        .open()
        .unwrap();
    let quota = gate.define(Quota::new("tokens", 1 << 40)).unwrap();
    gate.deliver(PATIENCE).unwrap();
    assert_eq!(gate.sinks()[0].failures, 0);
    // Retries within the bound are no reason to worry.
    (0..4).for_each(|_| store.inject(Fault::BeforeCommit));
    consume(&gate, 1, quota);
    wait_until("delivered", || {
        assert_eq!(gate.sinks()[0].condition, SinkCondition::Fine);
        store.used(1, "tokens", None) == 1
    });
    assert_eq!(gate.sinks()[0].failures, 4);
    // Beyond it they go on, and health says so.
    is_down.store(true, Ordering::Release);
    consume(&gate, 1, quota);
    wait_until("down", || {
        gate.health().reasons.iter().any(|reason| {
            matches!(reason, HealthReason::SinkDown { sink, attempts: 7.., lag_batches: 1.., .. }
                if sink == "store")
        })
    });
    assert!(!gate.health().is_healthy());
    is_down.store(false, Ordering::Release);
    gate.deliver(PATIENCE).unwrap();
    assert_eq!(store.used(1, "tokens", None), 2);
    let status = &gate.sinks()[0];
    assert_eq!((status.condition, status.failures_in_a_row), (SinkCondition::Fine, 0));
}

#[test]
fn a_forgotten_sink_is_gone_and_other_names_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let stores = [MemoryStore::new(), MemoryStore::new()];
    let gate = Tollgate::builder(dir.path())
        .sink("a", stores[0].sink())
        .sink("a-1", stores[1].sink())
        .open()
        .unwrap();
    assert!(matches!(tollgate::forget_sink(dir.path(), "a"), Err(Error::Locked { .. })));
    gate.close().unwrap();
    assert!(tollgate::forget_sink(dir.path(), "a").unwrap());
    assert!(!tollgate::forget_sink(dir.path(), "a").unwrap());
    let gate = Tollgate::open(dir.path(), Config::default()).unwrap();
    let names: Vec<_> = gate.sinks().into_iter().map(|sink| sink.name).collect();
    assert_eq!(names, ["a-1"]);
    assert!(tollgate::forget_sink(dir.path().join("missing"), "a").is_err());
}

/// A sink that does not answer.
struct Down;

impl UsageSink for Down {
    fn position(&mut self, _: EngineId) -> Result<Option<Position>, SinkError> {
        Err(SinkError::outcome_unknown("test", "no answer"))
    }

    fn apply(&mut self, _: &UsageBatch) -> Result<Applied, SinkError> {
        unreachable!("its position is not known")
    }
}

/// What an operator sees of sinks without an open.
#[test]
fn verify_inspect_and_salvage_know_sinks() {
    let dir = tempfile::tempdir().unwrap();
    let store = MemoryStore::new();
    let gate = Tollgate::builder(dir.path()).sink("billing", store.sink()).open().unwrap();
    let quota = gate.define(Quota::new("tokens", 1 << 40)).unwrap();
    consume(&gate, 1, quota);
    gate.deliver(PATIENCE).unwrap();
    gate.close().unwrap();
    let gate = Tollgate::builder(dir.path()).sink("billing", Down).open().unwrap();
    for _ in 0..3 {
        consume(&gate, 2, quota);
        gate.snapshot().unwrap();
    }
    gate.close().unwrap();

    let sink = tollgate::inspect(dir.path()).unwrap().sinks.remove(0);
    assert_eq!(sink.name, "billing");
    assert!(sink.position.is_some() && sink.backlog.len() == 1, "{sink:?}");
    let verification = tollgate::verify(dir.path()).unwrap();
    assert!(matches!(verification.verdict, Verdict::Sound), "{verification:?}");
    let holds = |name: &str| {
        let found = verification.files.iter().find(|file| file.name == name);
        found.map(|file| file.holds.clone()).unwrap()
    };
    assert!(holds("sink-billing.tgp").contains("at batch"), "{verification:?}");
    assert_eq!(holds(&sink.backlog[0]), "what the sink \"billing\" has not got: 1 sums");

    let new = tempfile::tempdir().unwrap();
    let salvage = tollgate::salvage(dir.path(), new.path().join("new")).unwrap();
    assert_eq!(salvage.sinks, ["billing"]);
    assert!(salvage.losses.is_empty());

    // A damaged backlog harms the sink only, a damaged state refuses.
    let flip = |name: &str| {
        let path = dir.path().join(name);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[40] ^= 1;
        std::fs::write(path, bytes).unwrap();
    };
    flip(&sink.backlog[0]);
    let verification = tollgate::verify(dir.path()).unwrap();
    assert!(matches!(verification.verdict, Verdict::Weakened), "{verification:?}");
    flip("sink-billing.tgp");
    let Verdict::Refused(error) = tollgate::verify(dir.path()).unwrap().verdict else {
        panic!("verify would let it open")
    };
    let refused = Tollgate::open(dir.path(), Config::default()).unwrap_err();
    assert_eq!(error.to_string(), refused.to_string());
}
