//! Processes that embed the engine, and deliver to a server: both sides are killed at random.
//!
//! A child counts until it is killed, and writes down what was acknowledged, in a file that its
//! death does not harm. In the end the engine, opened again, must have what was acknowledged (or
//! that and the operation under way), and the database what the engines have, to the unit. Of one
//! quota all is recorded: the events that the database has add up to its totals, none is there
//! twice.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, SystemTime};

use rustix::process::Signal;
use tollgate::sink::UsageSink;
use tollgate::{Config, Quota, QuotaId, Tollgate, UsageEvent};

use crate::contract::Store;
use crate::feed::{Random, Totals};
use crate::servers::Server;

const CHILD: &str = "TOLLGATE_SINK_CHILD";
const USERS: u64 = 6;
const QUOTAS: u64 = 2;
const QUOTA_NAMES: [&str; QUOTAS as usize] = ["tokens", "requests"];
/// The quota of which all is recorded.
const RECORDED: usize = 1;
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// How a child gets to the server: what [`sink_at`] understands.
pub(crate) type Address = String;

/// The sink at an address: its kind, and what that needs, on a line each.
fn sink_at(address: &str) -> Box<dyn UsageSink> {
    let mut lines = address.lines();
    let mut line = || lines.next().unwrap().to_owned();
    match line().as_str() {
        #[cfg(feature = "postgres")]
        "postgres" => {
            let sink = tollgate::sink::PostgresSink::new(&line()).unwrap();
            Box::new(sink.schema(&line()).with_events())
        }
        #[cfg(feature = "redis")]
        "redis" => {
            let sink = tollgate::sink::RedisSink::new(&line()).unwrap();
            Box::new(sink.prefix(&line()))
        }
        kind => panic!("{kind}"),
    }
}

/// Small, so that everything happens often.
pub(crate) fn config() -> Config {
    Config::default()
        .lanes(2)
        .lane_records(1 << 8)
        .shards(4)
        .journal_file_bytes(64 << 10)
        .snapshot_journal_bytes(64 << 10)
        .sync_interval(Duration::from_millis(2))
        .delivery(|it| {
            it.flush_interval(Duration::from_millis(10))
                .retry_delay(Duration::from_millis(1))
                .batch_size(5)
                .worker_count(1)
        })
}

pub(crate) fn open(dir: &Path, sink: Box<dyn UsageSink>) -> Tollgate {
    Tollgate::builder(dir).config(config()).sink("database", sink).open().unwrap()
}

pub(crate) fn define(gate: &Tollgate) -> [QuotaId; QUOTAS as usize] {
    QUOTA_NAMES.map(|name| gate.define(Quota::new(name, 1 << 40)).unwrap())
}

/// Per counter: what was handed to `consume`, and what was acknowledged.
struct Ledger(File);

impl Ledger {
    fn open(path: &Path) -> Self {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
        let file = file.unwrap();
        file.set_len(USERS * QUOTAS * 16).unwrap();
        Self(file)
    }

    fn read(&self, counter: u64, acknowledged: bool) -> u64 {
        let mut bytes = [0; 8];
        self.0.read_exact_at(&mut bytes, counter * 16 + u64::from(acknowledged) * 8).unwrap();
        u64::from_le_bytes(bytes)
    }

    fn add(&self, counter: u64, acknowledged: bool, amount: u64) {
        let sum = self.read(counter, acknowledged) + amount;
        let offset = counter * 16 + u64::from(acknowledged) * 8;
        self.0.write_all_at(&sum.to_le_bytes(), offset).unwrap();
    }
}

/// The child: a test only by its looks. Without its variable it does nothing.
#[test]
fn child() {
    let Ok(task) = std::env::var(CHILD) else { return };
    let (head, address) = task.split_once("\n\n").unwrap();
    let [dir, seed] = head.lines().collect::<Vec<_>>()[..] else { panic!("{head}") };
    let dir = Path::new(dir);
    let ledger = Ledger::open(&dir.join("ledger"));
    let mut random = Random(seed.parse().unwrap());
    loop {
        let gate = open(&dir.join("data"), sink_at(address));
        let quotas = define(&gate);
        for _ in 0..1 + random.below(3000) {
            let counter = random.below(USERS * QUOTAS);
            let (user, quota) = (counter / QUOTAS, quotas[(counter % QUOTAS) as usize]);
            let amount = 1 + random.below(9);
            ledger.add(counter, false, amount);
            let number = format!("{:x} {:x}", random.next(), random.next());
            match random.below(300) {
                0 if quota != quotas[RECORDED] => {
                    gate.consume_sync(user, quota, amount).map(|_| ()).unwrap();
                }
                1 if quota != quotas[RECORDED] => {
                    gate.consume(user, quota, amount).unwrap();
                    gate.snapshot().unwrap();
                }
                // All of one quota is recorded.
                _ if quota == quotas[RECORDED] => {
                    let now = SystemTime::now().into();
                    let event = UsageEvent::new(user, quota, amount as f64, now);
                    gate.record(&event.metadata("number", number)).map(|_| ()).unwrap();
                }
                _ => gate.consume(user, quota, amount).map(|_| ()).unwrap(),
            }
            ledger.add(counter, true, amount);
        }
        gate.close().unwrap();
    }
}

/// A process with an engine, started again when it was killed.
struct Engine {
    dir: PathBuf,
    address: Address,
    child: Child,
}

impl Engine {
    fn start(dir: PathBuf, address: &str, seed: u64) -> Self {
        std::fs::create_dir_all(&dir).unwrap();
        let child = Self::spawn(&dir, address, seed);
        Self { dir, address: address.to_owned(), child }
    }

    fn spawn(dir: &Path, address: &str, seed: u64) -> Child {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "embedded::child", "--nocapture", "--test-threads", "1"])
            .env(CHILD, format!("{}\n{seed}\n\n{address}", dir.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        let status = self.child.wait().unwrap();
        assert_eq!(status.code(), None, "the child ended by itself");
    }

    fn kill_and_restart(&mut self, seed: u64) {
        self.kill();
        self.child = Self::spawn(&self.dir, &self.address, seed);
    }

    /// Delivers what is left, and returns what the engine has.
    fn finish(&mut self) -> BTreeMap<(u64, String), i128> {
        self.kill();
        let gate = open(&self.dir.join("data"), sink_at(&self.address));
        let quotas = define(&gate);
        gate.deliver(PATIENCE).unwrap();
        let ledger = Ledger::open(&self.dir.join("ledger"));
        let mut used = BTreeMap::new();
        let mut under_way = 0;
        for counter in 0..USERS * QUOTAS {
            let (user, quota) = (counter / QUOTAS, quotas[(counter % QUOTAS) as usize]);
            let has = gate.usage(user, quota).unwrap().used;
            let range = ledger.read(counter, true)..=ledger.read(counter, false);
            assert!(range.contains(&has), "counter {counter} has {has}, not {range:?}");
            under_way += range.end() - range.start();
            if has > 0 {
                let name = gate.quota(quota).unwrap().name().to_owned();
                used.insert((user, name), i128::from(has));
            }
        }
        let acknowledged: i128 = used.values().sum();
        let status = &gate.sinks()[0];
        assert_eq!(status.lag_batches, 0, "{status:?}");
        eprintln!("{acknowledged} units acknowledged, up to {under_way} of them under way");
        gate.close().unwrap();
        used
    }
}

/// Two engines deliver to one database; engines and server are killed, one or the other.
pub(crate) fn totals_are_equal_after_kills_of_either_side(
    server: &Mutex<Server>,
    store: &dyn Store,
    address: &str,
    kills: u64,
) {
    let root = tempfile::tempdir().unwrap();
    let mut random = Random(51);
    let mut engines =
        ["one", "two"].map(|name| Engine::start(root.path().join(name), address, random.next()));
    let mut server_kills = 0;
    for _ in 0..kills {
        thread::sleep(Duration::from_millis(random.below(250)));
        match random.below(3) {
            victim @ 0..2 => engines[victim as usize].kill_and_restart(random.next()),
            _ => {
                let mut server = server.lock().unwrap();
                server.kill(Signal::KILL);
                thread::sleep(Duration::from_millis(random.below(100)));
                server.restart();
                server_kills += 1;
            }
        }
    }
    let mut expected = Totals::new();
    for engine in &mut engines {
        for ((user, quota), used) in engine.finish() {
            expected.entry((user, quota, 0)).or_insert((0, 1 << 40)).0 += used;
        }
    }
    assert_eq!(store.totals(), expected);
    if let Some(recorded) = store.recorded() {
        expected.retain(|(_, quota, _), _| *quota == QUOTA_NAMES[RECORDED]);
        let expected =
            expected.into_iter().map(|((user, quota, _), (used, _))| ((user, quota), used));
        assert_eq!(recorded, expected.collect());
    }
    eprintln!("{kills} kills, {server_kills} of them of the server; equal to the unit");
}

/// A server that is down for a while: what waits for it is bounded, and all there in the end.
pub(crate) fn a_server_that_is_down_gets_everything_later(
    server: &Mutex<Server>,
    store: &dyn Store,
    address: &str,
) {
    let dir = tempfile::tempdir().unwrap();
    let gate = open(dir.path(), sink_at(address));
    let [tokens, _] = define(&gate);
    let count = |rounds: u64| {
        for _ in 0..rounds {
            (0..USERS).for_each(|user| gate.consume(user, tokens, 1).map(|_| ()).unwrap());
        }
    };
    count(10);
    gate.deliver(PATIENCE).unwrap();
    server.lock().unwrap().kill(Signal::KILL);
    let mut sizes = Vec::new();
    for round in 0..60 {
        count(100);
        gate.snapshot().unwrap();
        if round >= 30 {
            let status = &gate.sinks()[0];
            sizes.push(status.backlog_bytes + gate.stats().journal_bytes);
            assert!(status.backlog_bytes > 0, "{status:?}");
        }
    }
    let (least, most) = (sizes.iter().min().unwrap(), sizes.iter().max().unwrap());
    assert!(most - least <= 256 << 10, "{sizes:?}");
    let health = gate.health();
    assert!(!health.is_healthy(), "{health:?}");
    server.lock().unwrap().restart();
    gate.deliver(PATIENCE).unwrap();
    let expected = (0..USERS).map(|user| ((user, "tokens".to_owned(), 0), (6010, 1 << 40)));
    assert_eq!(store.totals(), expected.collect());
}
