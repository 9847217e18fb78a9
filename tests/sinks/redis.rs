//! The sink that writes to Redis or Valkey, against a server of the tests' own.

use std::collections::HashMap;
use std::fmt::Debug;
use std::fs::{File, metadata};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use redis::{Client, Connection, FromRedisValue};
use rustix::process::Signal;
use tollgate::AMOUNT_MAX;
use tollgate::sink::{Applied, RedisSink, SinkError, UsageSink};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use crate::contract::{Store, holds_for};
use crate::delivery::{Mishaps, deliver, kills, totals_survive_kills};
use crate::embedded;
use crate::feed::{DAY_MS, Feed, Totals, row, totals};
use crate::proxy::Proxy;
use crate::servers::{Program, Server, command, directory};

const SOCKET: &str = "socket";

fn start() -> Option<Server> {
    let program = Program { names: &["redis-server", "valkey-server"], versions: None }.find()?;
    let arguments = "--port 0 --unixsocket socket --save  --appendonly yes --appendfsync always \
                     --aof-load-truncated no";
    let arguments: Vec<_> = arguments.split(' ').collect();
    let server = Server::start(directory(), program, &arguments, |dir| {
        // While it loads its log it answers with errors.
        UnixStream::connect(dir.join(SOCKET)).is_ok()
            && redis::cmd("PING").query::<String>(&mut connect(dir)).is_ok()
    });
    Some(server.repaired_by(cut_half_transactions))
}

/// Cuts a transaction off that the server was killed in the middle of writing, as docs/sinks.md
/// asks for. Left to itself the server cuts off the last command only, and counts those before it.
fn cut_half_transactions(dir: &Path) {
    let names = &["redis-check-aof", "valkey-check-aof"];
    let Some(program) = (Program { names, versions: None }).find() else { return };
    let mut check = command(&program, dir);
    check.args(["--fix", "appendonlydir/appendonly.aof.manifest"]).stdin(Stdio::piped());
    let mut check = check.spawn().unwrap();
    let _ = check.stdin.take().unwrap().write_all(b"y\n");
    assert!(check.wait().unwrap().success());
}

fn url(dir: &Path) -> String {
    format!("redis+unix://{}", dir.join(SOCKET).display())
}

fn connect(dir: &Path) -> Connection {
    Client::open(url(dir)).unwrap().get_connection().unwrap()
}

/// A prefix on a server, and the way that sinks go there.
struct Hashes<'a> {
    dir: &'a Path,
    sinks_dir: &'a Path,
    prefix: String,
}

impl<'a> Hashes<'a> {
    fn new(dir: &'a Path) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let prefix = format!("test-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        Self { dir, sinks_dir: dir, prefix }
    }

    fn sink(&self) -> RedisSink {
        RedisSink::new(&url(self.sinks_dir)).unwrap().prefix(&self.prefix)
    }

    /// A sink of a user whose rights [`let_guest`](Self::let_guest) sets.
    fn guest(&self) -> RedisSink {
        let url = format!("{}?user=guest&pass=secret", url(self.dir));
        RedisSink::new(&url).unwrap().prefix(&self.prefix)
    }

    fn let_guest(&self, rules: &str) {
        let _: String = self.query(&format!("ACL SETUSER guest reset on >secret {rules}"));
    }

    /// With the prefix in place of `{}`; arguments are what spaces part.
    fn query<T: FromRedisValue>(&self, command: &str) -> T {
        let command = command.replace("{}", &format!("{{{}}}", self.prefix));
        let mut words = command.split(' ');
        let mut query = redis::cmd(words.next().unwrap());
        query.arg(words.collect::<Vec<_>>());
        query.query(&mut connect(self.dir)).unwrap()
    }
}

impl Store for Hashes<'_> {
    fn open(&self) -> Box<dyn UsageSink> {
        Box::new(self.sink())
    }

    fn totals(&self) -> Totals {
        let mut totals = Totals::new();
        let mut connection = connect(self.dir);
        let usage = format!("{{{}}}:usage:", self.prefix);
        let keys: Vec<String> = self.query("KEYS {}:usage:*");
        for key in keys {
            let (quota, start) = key.strip_prefix(&usage).unwrap().rsplit_once(':').unwrap();
            let mut all = |key: &str| -> HashMap<u64, i64> {
                redis::cmd("HGETALL").arg(key).query(&mut connection).unwrap()
            };
            let limits = all(&format!("{{{}}}:limits:{quota}", self.prefix));
            for (user, used) in all(&key) {
                let key = (user, quota.to_owned(), start.parse().unwrap());
                totals.insert(key, (i128::from(used), limits[&user] as u64));
            }
        }
        totals
    }

    fn events(&self) -> Option<u64> {
        None
    }
}

#[test]
fn the_contract_holds() {
    let Some(server) = start() else { return };
    holds_for(|| Hashes::new(server.dir()));
    keys_read_well(server.dir());
    sums_beyond_64_bits_harm_no_other_row(server.dir());
    a_sum_beyond_64_bits_is_told_of_once(server.dir());
    foreign_keys_are_refused(server.dir());
    foreign_bytes_are_refused(server.dir());
    windows_expire(server.dir());
    a_forgotten_script_is_sent_again(server.dir());
    a_server_out_of_memory_takes_nothing(server.dir());
    a_replica_is_not_believed(server.dir());
    a_missing_right_changes_no_usage(server.dir());
    a_missing_right_changes_no_sum_beyond_64_bits(server.dir());
    the_documented_rights_suffice(server.dir());
    totals_survive_broken_connections(server.dir());
}

fn keys_read_well(dir: &Path) {
    let hashes = Hashes::new(dir);
    let rows = vec![row(u64::MAX, "requests", Some(DAY_MS), 3, 3), row(7, "tokens", None, 4, 4)];
    let mut feed = Feed::new(0xab, 1);
    hashes.sink().apply(&feed.batch(rows, Vec::new())).unwrap();
    let text = |command: &str| hashes.query::<String>(command);
    assert_eq!(text("HGET {}:usage:requests:86400000 18446744073709551615"), "3");
    assert_eq!(text("HGET {}:limits:requests 18446744073709551615"), "1000");
    assert_eq!(text("HGET {}:window:requests:86400000 window_end"), "172800000");
    assert_eq!(text("HGET {}:usage:tokens:0 7"), "4");
    assert_eq!(text("HGET {}:window:tokens:0 decimals"), "3");
    let position = feed.position().unwrap();
    let key = "{}:position:000000000000000000000000000000ab";
    assert_eq!(text(&format!("HGET {key} batch")), position.batch.to_string());
    assert_eq!(text(&format!("HGET {key} check")), position.check.to_string());
}

/// One user's sum once kept a sink from all others, for good. The script has no numbers of 64 bits;
/// it must tell the last unit that fits from the next.
fn sums_beyond_64_bits_harm_no_other_row(dir: &Path) {
    let max = i128::from(AMOUNT_MAX);
    let cases: [(i128, i128, bool); 16] = [
        (max, 0, true),
        (max, 1, false),
        (max - 1, 1, true),
        (max - 1_000_000_000, 1_000_000_000, true),
        (max - 1_000_000_000, 1_000_000_001, false),
        (max, -max, true),
        (max, max, false),
        (-max, -1, true),
        (-max, -2, false),
        (-max - 1, max, true),
        (-max - 1, -1, false),
        (0, max + 1, false),
        (0, -max - 1, true),
        (0, -max - 2, false),
        // The sum would fit.
        (-max, max + 2, false),
        (0, i128::MIN, false),
    ];
    for (first, second, fits) in cases {
        let hashes = Hashes::new(dir);
        let mut feed = Feed::new(1, 1);
        let mut sink = hashes.sink();
        let batch = |feed: &mut Feed, added| {
            let other = row(8, "tokens", None, 1, 1);
            feed.batch(vec![row(7, "tokens", None, added, 0), other], Vec::new())
        };
        sink.apply(&batch(&mut feed, first)).unwrap();
        let second_batch = batch(&mut feed, second);
        assert_eq!(sink.apply(&second_batch).unwrap(), Applied::Now, "{first} + {second}");
        assert_eq!(sink.apply(&second_batch).unwrap(), Applied::Before, "{first} + {second}");
        let stored = if fits { first + second } else { max * second.signum() };
        let used = |user| hashes.query::<String>(&format!("HGET {{}}:usage:tokens:0 {user}"));
        assert_eq!((used(7), used(8)), (stored.to_string(), "2".to_owned()), "{first} + {second}");
        assert_eq!(sink.position(feed.engine()).unwrap(), feed.position());
    }
}

/// Gathers the users that warnings name.
struct Named(Arc<Mutex<Vec<String>>>);

impl Visit for Named {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "user" {
            self.0.lock().unwrap().push(value.to_owned());
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn Debug) {}
}

impl Subscriber for Named {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        event.record(&mut Self(Arc::clone(&self.0)));
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// Once a user was at the last number, each delivery that added to that was once told of, for good.
fn a_sum_beyond_64_bits_is_told_of_once(dir: &Path) {
    let max = i128::from(AMOUNT_MAX);
    let (hashes, mut feed) = (Hashes::new(dir), Feed::new(1, 1));
    let mut sink = hashes.sink();
    let mut named = |rows: &[(u64, i128)]| {
        let rows = rows.iter().map(|&(user, added)| row(user, "tokens", None, added, 0)).collect();
        let (batch, named) = (feed.batch(rows, Vec::new()), Arc::default());
        let heard = Named(Arc::clone(&named));
        let applied = tracing::subscriber::with_default(heard, || sink.apply(&batch));
        assert_eq!(applied.unwrap(), Applied::Now);
        named.lock().unwrap().clone()
    };
    assert_eq!(named(&[(7, max), (8, max - 1), (9, -max)]), [""; 0]);
    // By what was added, which is no different.
    assert_eq!(named(&[(7, 1), (9, -2)]), [""; 0]);
    assert_eq!(named(&[(7, 1), (8, 2), (9, -2)]), ["8"]);
    assert_eq!(named(&[(7, 1), (8, 1), (9, -2)]), [""; 0]);
    assert_eq!(named(&[(8, -5)]), [""; 0]);
    assert_eq!(named(&[(7, i128::MIN), (8, 1)]), ["7"]);
}

/// As [`a_missing_right_changes_no_usage`], where a field is set and not added to.
fn a_missing_right_changes_no_sum_beyond_64_bits(dir: &Path) {
    let hashes = Hashes::new(dir);
    let mut feed = Feed::new(1, 1);
    let rows = |added| [7, 8].map(|user| row(user, "tokens", None, added + user as i128, 0)).into();
    hashes.sink().apply(&feed.batch(rows(5), Vec::new())).unwrap();
    // User 8 is beyond, and user 7 is not.
    let batch = feed.batch(rows(i128::from(AMOUNT_MAX) - 5 - 7 - 7 - 1), Vec::new());
    let mut sink = hashes.guest();
    let used =
        || [7, 8].map(|user| hashes.query::<i64>(&format!("HGET {{}}:usage:tokens:0 {user}")));
    hashes.let_guest("~* +@all -hset (+hset ~*:limits:* ~*:window:* ~*:position:*)");
    for _ in 0..2 {
        sink.apply(&batch).unwrap_err();
        assert_eq!((used(), sink.position(feed.engine()).unwrap()), ([12, 13], batch.from()));
    }
    hashes.let_guest("~* +@all");
    assert_eq!(sink.apply(&batch).unwrap(), Applied::Now);
    assert_eq!(used(), [AMOUNT_MAX as i64 - 1, AMOUNT_MAX as i64]);
}

fn foreign_keys_are_refused(dir: &Path) {
    let commands = [
        "SET {}:usage:requests:86400000 x",
        "SET {}:limits:requests x",
        "SADD {}:window:requests:86400000 x",
        "HSET {}:usage:requests:86400000 1 many",
        "HSET {}:usage:requests:86400000 2 007",
        "HSET {}:usage:requests:86400000 2 -0",
        "HSET {}:usage:requests:86400000 2 9223372036854775808",
        "SET {}:position:00000000000000000000000000000001 x",
        "HSET {}:position:00000000000000000000000000000001 batch x",
    ];
    for command in commands {
        let hashes = Hashes::new(dir);
        let _: redis::Value = hashes.query(command);
        let rows = [1, 2].map(|user| row(user, "requests", Some(DAY_MS), 1, 1));
        let batch = Feed::new(1, 1).batch(rows.into(), Vec::new());
        let error = hashes.sink().apply(&batch).unwrap_err();
        assert!(matches!(error, SinkError::Schema { .. }), "{command}: {error:?}");
        let keys: Vec<String> = hashes.query("KEYS {}:*");
        assert_eq!(keys.len(), 1, "{command}: nothing was written");
    }
}

/// Bytes that are no text.
fn foreign_bytes_are_refused(dir: &Path) {
    for (key, field, name) in [
        ("usage:requests:86400000", "1", "usage:requests:86400000"),
        ("position:00000000000000000000000000000001", "batch", "position:"),
        ("position:00000000000000000000000000000001", "check", "position:"),
    ] {
        let hashes = Hashes::new(dir);
        let key = format!("{{{}}}:{key}", hashes.prefix);
        let set = redis::cmd("HSET").arg(key).arg(field).arg(b"\xff").exec(&mut connect(dir));
        set.unwrap();
        let mut feed = Feed::new(1, 1);
        let batch = feed.batch(vec![row(1, "requests", Some(DAY_MS), 1, 1)], Vec::new());
        let mut errors = vec![hashes.sink().apply(&batch).unwrap_err()];
        if name == "position:" {
            errors.push(hashes.sink().position(feed.engine()).unwrap_err());
        }
        for error in errors {
            assert!(matches!(error, SinkError::Schema { .. }), "{error:?}");
            assert!(error.to_string().contains(name), "{error}");
        }
    }
}

fn windows_expire(dir: &Path) {
    let hashes = Hashes::new(dir);
    let mut sink = hashes.sink().retention(Duration::from_secs(3600));
    let mut feed = Feed::new(1, 1);
    let later = 100_000 * DAY_MS;
    let rows = vec![
        row(1, "requests", Some(DAY_MS), 1, 1),
        row(1, "requests", Some(later), 2, 2),
        row(1, "tokens", None, 3, 3),
    ];
    sink.apply(&feed.batch(rows, Vec::new())).unwrap();
    let mut keys: Vec<String> = hashes.query("KEYS {}:usage:*");
    keys.sort();
    let expected = [format!("requests:{later}"), "tokens:0".to_owned()];
    assert_eq!(keys, expected.map(|key| format!("{{{}}}:usage:{key}", hashes.prefix)));
    let left: i64 = hashes.query(&format!("PTTL {{}}:window:requests:{later}"));
    assert!(left > 0);
    assert_eq!(hashes.query::<i64>("PTTL {}:usage:tokens:0"), -1);
}

fn a_forgotten_script_is_sent_again(dir: &Path) {
    let hashes = Hashes::new(dir);
    let mut sink = hashes.sink();
    let mut feed = Feed::new(1, 1);
    for _ in 0..2 {
        let _: String = hashes.query("SCRIPT FLUSH");
        assert_eq!(sink.apply(&feed.next()).unwrap(), Applied::Now);
    }
    assert_eq!(hashes.totals(), totals(&[&feed]));
}

fn a_server_out_of_memory_takes_nothing(dir: &Path) {
    let hashes = Hashes::new(dir);
    let mut sink = hashes.sink();
    let mut feed = Feed::new(1, 1);
    sink.apply(&feed.next()).unwrap();
    let (before, expected) = (feed.position(), hashes.totals());
    let batch = feed.batch((0..9).map(|user| row(user, "tokens", None, 1, 1)).collect(), vec![]);
    let _: String = hashes.query("CONFIG SET maxmemory 1");
    let error = sink.apply(&batch).unwrap_err();
    assert!(matches!(error, SinkError::Unavailable { .. }) && error.is_retryable(), "{error:?}");
    assert_eq!((sink.position(feed.engine()).unwrap(), hashes.totals()), (before, expected));
    let _: String = hashes.query("CONFIG SET maxmemory 0");
    assert_eq!(sink.apply(&batch).unwrap(), Applied::Now);
}

/// Its copy may be old, or empty: from its position totals would come twice.
fn a_replica_is_not_believed(dir: &Path) {
    let hashes = Hashes::new(dir);
    let mut sink = hashes.sink();
    let mut feed = Feed::new(1, 1);
    let first = feed.next();
    sink.apply(&first).unwrap();
    let (before, batch) = (feed.position(), feed.next());
    let _: String = hashes.query("REPLICAOF 127.0.0.1 1");
    let results = [
        sink.position(feed.engine()).map(drop),
        sink.apply(&first).map(drop),
        sink.apply(&batch).map(drop),
    ];
    let _: String = hashes.query("REPLICAOF NO ONE");
    for result in results {
        let error = result.unwrap_err();
        assert!(matches!(error, SinkError::Unavailable { .. }), "{error:?}");
        assert!(error.to_string().contains("read only replica"), "{error}");
    }
    assert_eq!(sink.position(feed.engine()).unwrap(), before);
    assert_eq!(sink.apply(&batch).unwrap(), Applied::Now);
}

/// Rights are checked call by call, and what a script has written before a refused call stays: it
/// must not be usage, which each attempt would add again.
fn a_missing_right_changes_no_usage(dir: &Path) {
    let withheld = [
        "-hset",
        "-hincrby",
        "-pexpireat",
        // For some of the keys.
        "-hset (+hset ~*:position:*)",
        "-hset (+hset ~*:limits:* ~*:window:*)",
        "-hincrby (+hincrby ~*:usage:bytes:*)",
        "-pexpireat (+pexpireat ~*:usage:*)",
        "-pexpireat (+pexpireat ~*:window:*)",
    ];
    let later = 100_000 * DAY_MS;
    let rows = |added| {
        // The first window does not expire.
        let windows = [("bytes", None), ("requests", Some(later))];
        windows.map(|(name, start)| [1, 2].map(|user| row(user, name, start, added, 0))).concat()
    };
    for rule in withheld {
        let hashes = Hashes::new(dir);
        let used = || {
            let keys = ["bytes:0".to_owned(), format!("requests:{later}")];
            keys.map(|key| hashes.query::<Vec<i64>>(&format!("HVALS {{}}:usage:{key}"))).concat()
        };
        let mut sink = hashes.guest().retention(Duration::from_secs(3600));
        let mut feed = Feed::new(1, 1);
        // To keys that are not there, and to keys that are.
        for (added, before, after) in [(5, 0, 5), (7, 5, 12)] {
            let batch = feed.batch(rows(added), Vec::new());
            hashes.let_guest(&format!("~* +@all {rule}"));
            for attempt in 1..=3 {
                let error = sink.apply(&batch).unwrap_err();
                let found = used();
                assert!(
                    found.iter().all(|&used| used == before),
                    "{rule}, attempt {attempt}: {found:?} in place of {before}: {error}"
                );
                assert_eq!(sink.position(feed.engine()).unwrap(), batch.from(), "{rule}");
            }
            hashes.let_guest("~* +@all");
            assert_eq!(sink.apply(&batch).unwrap(), Applied::Now, "{rule}");
            assert_eq!(sink.apply(&batch).unwrap(), Applied::Before, "{rule}");
            assert_eq!(used(), [after; 4], "{rule}");
            let left: i64 = hashes.query(&format!("PTTL {{}}:usage:requests:{later}"));
            assert!(left > 0, "{rule}");
        }
    }
}

/// Those that docs/sinks.md lists.
fn the_documented_rights_suffice(dir: &Path) {
    let hashes = Hashes::new(dir);
    let text = include_str!("../../docs/sinks.md").split_whitespace().collect::<Vec<_>>().join(" ");
    let rights = text.split("on >PASSWORD ").nth(1).and_then(|rest| rest.split('`').next());
    hashes.let_guest(&rights.unwrap().replace("{tollgate}", "{}"));
    let _: String = hashes.query("SCRIPT FLUSH");
    let mut sink = hashes.guest().retention(Duration::from_secs(1 << 32));
    let mut feed = Feed::new(1, 1);
    for _ in 0..3 {
        assert_eq!(sink.apply(&feed.next()).unwrap(), Applied::Now);
        assert_eq!(sink.position(feed.engine()).unwrap(), feed.position());
    }
    assert_eq!(hashes.totals(), totals(&[&feed]));
    // In another of the server's databases.
    let url = format!("{}?user=guest&pass=secret&db=1", url(dir));
    let mut sink = RedisSink::new(&url).unwrap().prefix(&hashes.prefix);
    assert_eq!(sink.position(feed.engine()).unwrap(), None);
}

fn totals_survive_broken_connections(dir: &Path) {
    let sockets = directory();
    let (socket, target) = (sockets.path().join(SOCKET), dir.join(SOCKET));
    let _proxy = Proxy::start(&socket, &target, [10_000, 10], 41);
    let mut hashes = Hashes::new(dir);
    hashes.sinks_dir = sockets.path();
    let mishaps = Mishaps::default();
    let mut feed = Feed::new(1, 42);
    let mut sink = hashes.sink();
    for _ in 0..400 {
        deliver(&mut sink, &feed.next(), &mishaps);
    }
    assert_eq!(hashes.totals(), totals(&[&feed]));
    eprintln!("400 batches over broken connections, {mishaps:?}");
    assert!(mishaps.errors.load(Ordering::Relaxed) > 50);
    assert!(mishaps.lost_confirmations.load(Ordering::Relaxed) > 10);
}

fn address(hashes: &Hashes<'_>) -> String {
    format!("redis\n{}\n{}", url(hashes.dir), hashes.prefix)
}

#[test]
fn engines_deliver_while_either_side_is_killed() {
    let Some(server) = start() else { return };
    let dir = server.dir().to_path_buf();
    let hashes = Hashes::new(&dir);
    let server = Mutex::new(server);
    embedded::totals_are_equal_after_kills_of_either_side(
        &server,
        &hashes,
        &address(&hashes),
        kills(),
    );
    let hashes = Hashes::new(&dir);
    let address = address(&hashes);
    embedded::a_server_that_is_down_gets_everything_later(&server, &hashes, &address);
}

#[test]
fn totals_survive_kills_of_the_server() {
    let Some(server) = start() else { return };
    let dir = server.dir().to_path_buf();
    let hashes = Hashes::new(&dir);
    totals_survive_kills(&Mutex::new(server), &hashes, &[Signal::KILL, Signal::TERM], kills());
}

/// A kill in the middle of a write to the log leaves the beginning of a batch there.
#[test]
fn half_a_batch_in_the_log_counts_for_nothing() {
    let Some(mut server) = start() else { return };
    let dir = server.dir().to_path_buf();
    let hashes = Hashes::new(&dir);
    let mut feed = Feed::new(1, 1);
    hashes.sink().apply(&feed.next()).unwrap();
    let (before, expected) = (feed.position(), hashes.totals());
    let log = dir.join("appendonlydir/appendonly.aof.1.incr.aof");
    let whole = metadata(&log).unwrap().len();
    let batch = feed.next();
    hashes.sink().apply(&batch).unwrap();
    server.kill(Signal::KILL);
    let longer = metadata(&log).unwrap().len();
    File::options().write(true).open(&log).unwrap().set_len((whole + longer) / 2).unwrap();
    server.restart();
    let mut sink = hashes.sink();
    assert_eq!((sink.position(feed.engine()).unwrap(), hashes.totals()), (before, expected));
    assert_eq!(sink.apply(&batch).unwrap(), Applied::Now);
    server.kill(Signal::KILL);
    server.restart();
    assert_eq!(hashes.totals(), totals(&[&feed]));
}

#[test]
fn without_a_server_the_error_says_so() {
    let mut sink = RedisSink::new("redis+unix:///nowhere/socket?pass=secret").unwrap();
    assert!(!format!("{sink:?}").contains("secret"), "{sink:?}");
    let error = sink.position(Feed::new(1, 1).engine()).unwrap_err();
    assert!(matches!(error, SinkError::Unavailable { .. }) && error.is_retryable(), "{error:?}");
    assert!(error.to_string().contains("No such file"), "{error}");
    let error = RedisSink::new("http://nowhere").unwrap_err();
    assert!(matches!(error, SinkError::Misconfigured { .. }) && !error.is_retryable(), "{error:?}");
}
