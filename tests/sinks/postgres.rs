//! The sink that writes to PostgreSQL, against a server of the tests' own.

mod reach;
mod repairs;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

use postgres::Client;
use rustix::process::Signal;
use tollgate::sink::{Applied, Position, PostgresSink, SinkError, UsageSink};
use tollgate::{Error, HealthReason, Timestamp, Tollgate};

use crate::cluster::{self, connect, parameters};
use crate::contract::{Store, holds_for};
use crate::delivery::{Mishaps, deliver, kills, totals_survive_kills};
use crate::embedded::{self, PATIENCE};
use crate::feed::{DAY_MS, Feed, Totals, row, totals};
use crate::proxy::Proxy;
use crate::servers::{Server, directory};

const SOCKET: &str = ".s.PGSQL.5432";

/// The tests kill processes, not the machine: what the kernel was given survives.
const SETTINGS: &str = "-c shared_buffers=16MB -c fsync=off";

fn start() -> Option<Server> {
    cluster::start(&format!("{SETTINGS} -c listen_addresses="), |_| {})
}

/// A schema on a server, and the way that sinks go there.
struct Tables<'a> {
    dir: &'a Path,
    /// What sinks connect by.
    parameters: String,
    schema: String,
}

impl<'a> Tables<'a> {
    /// In a schema of its own, whose name needs quotes.
    fn new(dir: &'a Path) -> Self {
        Self::at(dir, parameters(dir))
    }

    fn at(dir: &'a Path, parameters: String) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let schema = format!("It's \"{}\"", NUMBER.fetch_add(1, Ordering::Relaxed));
        let tables = Self { dir, parameters, schema };
        tables.sink().migrate().unwrap();
        tables
    }

    fn sink(&self) -> PostgresSink {
        PostgresSink::new(&self.parameters).unwrap().schema(&self.schema).with_events()
    }

    fn quoted(&self) -> String {
        format!("\"{}\"", self.schema.replace('"', "\"\""))
    }

    fn client(&self) -> Client {
        connect(self.dir).unwrap()
    }

    /// With the schema's name in place of `{}`.
    fn execute(&self, statement: &str) {
        self.client().batch_execute(&statement.replace("{}", &self.quoted())).unwrap();
    }

    fn query(&self, statement: &str) -> Vec<postgres::Row> {
        self.client().query(&statement.replace("{}", &self.quoted()), &[]).unwrap()
    }
}

impl Store for Tables<'_> {
    fn open(&self) -> Box<dyn UsageSink> {
        Box::new(self.sink())
    }

    fn totals(&self) -> Totals {
        let statement = "SELECT user_id::text, quota, window_start, used::text, \"limit\"::text \
                         FROM {}.quota_usage";
        let rows = self.query(statement).into_iter();
        rows.map(|row| {
            let text = |column: usize| row.get::<_, String>(column);
            let start = Timestamp::from(row.get::<_, SystemTime>(2)).as_unix_millis();
            let key = (text(0).parse().unwrap(), text(1), start);
            (key, (text(3).parse().unwrap(), text(4).parse().unwrap()))
        })
        .collect()
    }

    fn events(&self) -> Option<u64> {
        let count: i64 = self.query("SELECT count(*) FROM {}.quota_events")[0].get(0);
        Some(count as u64)
    }

    fn recorded(&self) -> Option<BTreeMap<(u64, String), i128>> {
        let statement = "SELECT user_id::text, quota, sum(value)::numeric::text, count(*), \
                         count(DISTINCT metadata->>'number') FROM {}.quota_events GROUP BY 1, 2";
        let rows = self.query(statement).into_iter();
        let sums = rows.map(|row| {
            assert_eq!(row.get::<_, i64>(3), row.get::<_, i64>(4), "an event is there twice");
            let text = |column: usize| row.get::<_, String>(column);
            ((text(0).parse().unwrap(), text(1)), text(2).parse().unwrap())
        });
        Some(sums.collect())
    }
}

#[test]
fn the_contract_holds() {
    let Some(server) = start() else { return };
    holds_for(|| Tables::new(server.dir()));
    rows_and_events_read_well(server.dir());
    a_missing_table_is_named(server.dir());
    what_has_another_version_is_refused(server.dir());
    engines_do_not_wait_for_ever(server.dir());
    a_position_waits_for_what_is_under_way(server.dir());
    a_schema_that_is_held_up_holds_up_no_other(server.dir());
    a_role_without_rights_is_told(server.dir());
    a_large_batch_is_many_statements_and_one_transaction(server.dir());
    totals_survive_broken_connections(server.dir());
}

fn rows_and_events_read_well(dir: &Path) {
    let tables = Tables::new(dir);
    let mut feed = Feed::new(1, 1);
    let mut sink = tables.sink();
    let batch = feed.next();
    assert!(!batch.events().is_empty());
    assert_eq!(sink.last_events(feed.engine()).unwrap(), None);
    sink.apply(&batch).unwrap();
    sink.apply(&feed.batch(vec![row(7, "requests", Some(DAY_MS), 3, 3)], Vec::new())).unwrap();
    assert_eq!(sink.last_events(feed.engine()).unwrap(), Some(batch.to().batch));
    assert_eq!(sink.last_events(Feed::new(2, 1).engine()).unwrap(), None);
    let found = tables.query(
        "SELECT window_start = '1970-01-02 00:00 UTC', window_end = '1970-01-03 00:00 UTC', \
         used = 3, decimals = 0, updated_at > now() - interval '1 minute' \
         FROM {}.quota_usage WHERE user_id = 7 AND window_start < '1970-01-03'",
    );
    assert!((0..5).all(|column| found[0].get::<_, bool>(column)), "{found:?}");
    let found = tables.query(
        "SELECT user_id::text, value, occurred_at, request_id, metadata->>'path\\', quota \
         FROM {}.quota_events ORDER BY engine_id, batch, nr",
    );
    for (found, event) in found.iter().zip(batch.events()) {
        let expected = &event.event;
        assert_eq!(found.get::<_, String>(0), expected.user.to_string());
        assert_eq!(found.get::<_, f64>(1), expected.value);
        assert_eq!(Timestamp::from(found.get::<_, SystemTime>(2)), expected.timestamp);
        let request_id = expected.request_id.map(|id| format!("{id:032x}"));
        assert_eq!(found.get::<_, Option<String>>(3), request_id);
        assert_eq!(found.get::<_, String>(4), "/v1/ü\n\u{fffd}");
        assert_eq!(found.get::<_, String>(5), "requests");
    }
}

fn assert_schema_error(error: &SinkError, words: &[&str]) {
    assert!(matches!(error, SinkError::Schema { .. }), "{error:?}");
    assert!(!error.is_retryable());
    for word in words {
        assert!(error.to_string().contains(word), "{error}");
    }
}

fn a_missing_table_is_named(dir: &Path) {
    let tables = Tables::new(dir);
    let mut feed = Feed::new(1, 2);
    let mut sink = tables.sink();
    let first = feed.next();
    sink.apply(&first).unwrap();
    tables.execute("DROP TABLE {}.quota_usage");
    let batch = feed.next();
    assert_schema_error(&sink.apply(&batch).unwrap_err(), &["quota_usage", "migrate"]);
    assert_eq!(sink.position(feed.engine()).unwrap(), batch.from(), "nothing was applied");
    // The table alone does not bring the totals back.
    let error = sink.migrate().unwrap_err();
    assert_schema_error(&error, &["quota_usage", "DROP TABLE", "backup"]);
    tables.execute("DROP SCHEMA {} CASCADE");
    assert_schema_error(&sink.apply(&batch).unwrap_err(), &["does not exist", "migrate"]);
    assert_schema_error(&tables.sink().position(feed.engine()).unwrap_err(), &["quota_schema"]);
    sink.migrate().unwrap();
    sink.migrate().unwrap();
    assert_eq!(sink.position(feed.engine()).unwrap(), None);
    let error = sink.apply(&batch).unwrap_err();
    assert!(matches!(error, SinkError::Disagrees { stored: None, .. }), "{error}");
    assert_eq!(sink.apply(&first).unwrap(), Applied::Now);
}

fn what_has_another_version_is_refused(dir: &Path) {
    let tables = Tables::new(dir);
    tables.execute("UPDATE {}.quota_schema SET version = 2");
    let error = tables.sink().position(Feed::new(1, 1).engine()).unwrap_err();
    assert_schema_error(&error, &["version 2", "writes 1", "later version"]);
    assert_schema_error(&tables.sink().migrate().unwrap_err(), &["version 2"]);
    tables.execute("UPDATE {}.quota_schema SET version = 1");
    // By hand, in a schema that exists.
    tables.execute("DROP SCHEMA {} CASCADE; CREATE SCHEMA {}");
    tables.execute(&tables.sink().creation_sql());
    tables.sink().migrate().unwrap();
    assert_eq!(tables.sink().position(Feed::new(1, 1).engine()).unwrap(), None);
}

/// A transaction that holds rows, and does not end.
fn engines_do_not_wait_for_ever(dir: &Path) {
    let tables = Tables::new(dir);
    let mut feed = Feed::new(1, 3);
    let mut sink = tables.sink().statement_timeout(Duration::from_millis(100));
    let rows = || vec![row(1, "requests", Some(DAY_MS), 1, 1)];
    sink.apply(&feed.batch(rows(), Vec::new())).unwrap();
    let mut holder = tables.client();
    let mut transaction = holder.transaction().unwrap();
    let schema = tables.schema.replace('"', "\"\"");
    transaction.batch_execute(&format!("UPDATE \"{schema}\".quota_usage SET used = used")).unwrap();
    let batch = feed.batch(rows(), Vec::new());
    let error = sink.apply(&batch).unwrap_err();
    assert!(matches!(error, SinkError::Unavailable { .. }) && error.is_retryable(), "{error:?}");
    assert!(error.to_string().contains("statement timeout"), "{error}");
    transaction.rollback().unwrap();
    assert_eq!(sink.apply(&batch).unwrap(), Applied::Now);
}

/// A connection was lost, but what came through it is still at work, and commits. A position that
/// is read meanwhile would say that the batch is not applied, and not for long.
fn a_position_waits_for_what_is_under_way(dir: &Path) {
    let tables = Tables::new(dir);
    let engine = Feed::new(0xab, 4).engine();
    let mut client = tables.client();
    let mut left_behind = client.transaction().unwrap();
    let (schema, name) = (tables.quoted(), tables.schema.replace('\'', "''"));
    let statements = format!(
        "SELECT pg_advisory_xact_lock(hashtextextended('tollgate {engine} {name}', 0)); \
         INSERT INTO {schema}.quota_positions VALUES ('{engine}', 7, 8, now())"
    );
    left_behind.batch_execute(&statements).unwrap();
    thread::scope(|scope| {
        let position = scope.spawn(|| tables.sink().position(engine).unwrap());
        thread::sleep(Duration::from_millis(300));
        assert!(!position.is_finished());
        left_behind.commit().unwrap();
        assert_eq!(position.join().unwrap(), Some(Position { batch: 7, check: 8 }));
    });
}

/// Two sinks of one engine, in one database: one waits for a table, and the other once waited for
/// it until the end of its statement's time, at each attempt.
fn a_schema_that_is_held_up_holds_up_no_other(dir: &Path) {
    let (held_up, free) = (Tables::new(dir), Tables::new(dir));
    let mut locker = held_up.client();
    let mut lock = locker.transaction().unwrap();
    let table = format!("{}.quota_usage", held_up.quoted());
    lock.batch_execute(&format!("LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")).unwrap();
    let batch = Feed::new(1, 1).batch(vec![row(1, "requests", Some(DAY_MS), 1, 1)], Vec::new());
    thread::scope(|scope| {
        let waiting = scope.spawn(|| held_up.sink().apply(&batch).unwrap());
        let name = table.replace('\'', "''");
        let waits = "SELECT 1 FROM pg_locks WHERE NOT granted AND relation = ";
        let waits = format!("{waits}'{name}'::regclass");
        while held_up.query(&waits).is_empty() {
            thread::sleep(Duration::from_millis(10));
        }
        let mut sink = free.sink().statement_timeout(Duration::from_secs(5));
        assert_eq!(sink.position(batch.engine()).unwrap(), None);
        assert_eq!(sink.apply(&batch).unwrap(), Applied::Now);
        lock.rollback().unwrap();
        assert_eq!(waiting.join().unwrap(), Applied::Now);
    });
}

fn a_role_without_rights_is_told(dir: &Path) {
    let tables = Tables::new(dir);
    tables.execute("CREATE ROLE guest LOGIN");
    let parameters = parameters(dir).replace("user=tollgate", "user=guest");
    let sink = || PostgresSink::new(&parameters).unwrap().schema(&tables.schema);
    let engine = Feed::new(1, 1).engine();
    assert_schema_error(&sink().position(engine).unwrap_err(), &["permission denied", "grant"]);
    // As docs/sinks.md says.
    tables.execute(
        "GRANT USAGE ON SCHEMA {} TO guest; \
         GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA {} TO guest",
    );
    assert_eq!(sink().apply(&Feed::new(1, 1).next()).unwrap(), Applied::Now);
}

/// A first delivery holds all totals: one statement with all of them would take too long, or be
/// longer than the server allows. In the place of that, statements of too many rows are refused.
fn a_large_batch_is_many_statements_and_one_transaction(dir: &Path) {
    const ROWS: u64 = 100_001;
    const EVENTS: u64 = 20_001;
    let tables = Tables::new(dir);
    tables.execute(
        "CREATE FUNCTION {}.refuse_large() RETURNS trigger LANGUAGE plpgsql AS $$ \
         BEGIN \
             IF (SELECT count(*) FROM added) > TG_ARGV[0]::bigint THEN \
                 RAISE EXCEPTION 'a statement of more than % rows', TG_ARGV[0]; \
             END IF; \
             RETURN NULL; \
         END $$; \
         CREATE TRIGGER small AFTER INSERT ON {}.quota_usage REFERENCING NEW TABLE AS added \
         FOR EACH STATEMENT EXECUTE FUNCTION {}.refuse_large(100000); \
         CREATE TRIGGER small AFTER INSERT ON {}.quota_events REFERENCING NEW TABLE AS added \
         FOR EACH STATEMENT EXECUTE FUNCTION {}.refuse_large(10000)",
    );
    let template = Feed::new(1, 1).next().events()[0].clone();
    let event = |number: u64| {
        let mut event = template.clone();
        event.event.value = number as f64;
        event
    };
    let rows: Vec<_> =
        (1..=ROWS).map(|user| row(user, "requests", Some(DAY_MS), i128::from(user), 0)).collect();
    let expected: Totals = rows
        .iter()
        .map(|row| ((row.user, "requests".to_owned(), DAY_MS), (row.added, 1000)))
        .collect();
    let mut feed = Feed::new(1, 1);
    let batch = feed.batch(rows, (1..=EVENTS).map(event).collect());
    let mut sink = tables.sink();

    // What fails in the last statement of either kind leaves nothing of those before.
    let mut other = row(ROWS, "requests", Some(DAY_MS), 7, 7);
    other.decimals = 1;
    sink.apply(&Feed::new(2, 1).batch(vec![other], Vec::new())).unwrap();
    let error = sink.apply(&batch).unwrap_err();
    assert!(matches!(error, SinkError::BadData { .. }), "{error:?}");
    assert!(error.to_string().contains("\"requests\" is stored with other decimals"), "{error}");
    assert_eq!(tables.totals().len(), 1);
    assert_eq!(sink.position(feed.engine()).unwrap(), None);
    tables.execute("DELETE FROM {}.quota_usage");
    let refuse = format!("ALTER TABLE {{}}.quota_events ADD CHECK (value <> {EVENTS})");
    tables.execute(&refuse);
    let error = sink.apply(&batch).unwrap_err();
    assert!(matches!(error, SinkError::BadData { .. }), "{error:?}");
    assert!(error.to_string().contains("quota_events_value_check"), "{error}");
    assert_eq!((tables.totals().len(), tables.events()), (0, Some(0)));
    assert_eq!(sink.position(feed.engine()).unwrap(), None);
    tables.execute("ALTER TABLE {}.quota_events DROP CONSTRAINT quota_events_value_check");

    for applied in [Applied::Now, Applied::Before] {
        assert_eq!(sink.apply(&batch).unwrap(), applied);
        assert!(tables.totals() == expected, "{applied:?}");
        let found = tables.query(
            "SELECT count(*), count(*) FILTER (WHERE value = nr), max(nr) FROM {}.quota_events",
        );
        let found = [0, 1, 2].map(|column| found[0].get::<_, i64>(column) as u64);
        assert_eq!(found, [EVENTS; 3], "{applied:?}: numbered in their order");
    }
}

/// Connections break after any number of bytes, the confirmation of a commit among them.
fn totals_survive_broken_connections(dir: &Path) {
    let sockets = directory();
    let (socket, target) = (sockets.path().join(SOCKET), dir.join(SOCKET));
    let _proxy = Proxy::start(&socket, &target, [20_000, 30], 31);
    let mut tables = Tables::new(dir);
    tables.parameters = parameters(sockets.path());
    let mishaps = Mishaps::default();
    let mut feed = Feed::new(1, 32);
    let mut sink = tables.sink();
    for _ in 0..400 {
        deliver(&mut sink, &feed.next(), &mishaps);
    }
    assert_eq!(tables.totals(), totals(&[&feed]));
    assert_eq!(tables.events(), Some(feed.events()));
    eprintln!("400 batches over broken connections, {mishaps:?}");
    assert!(mishaps.errors.load(Ordering::Relaxed) > 50);
    assert!(mishaps.lost_confirmations.load(Ordering::Relaxed) > 0);
}

fn address(tables: &Tables<'_>) -> String {
    format!("postgres\n{}\n{}", parameters(tables.dir), tables.schema)
}

#[test]
fn engines_deliver_while_either_side_is_killed() {
    let Some(server) = start() else { return };
    let dir = server.dir().to_path_buf();
    let tables = Tables::new(&dir);
    let server = Mutex::new(server);
    embedded::totals_are_equal_after_kills_of_either_side(
        &server,
        &tables,
        &address(&tables),
        kills(),
    );
    let tables = Tables::new(&dir);
    let address = address(&tables);
    embedded::a_server_that_is_down_gets_everything_later(&server, &tables, &address);
    a_row_that_is_refused_is_said_and_kept(&dir);
    a_table_that_is_gone_is_said_and_nothing_is_lost(&dir);
    an_engine_delivers_over_broken_connections(&dir);
}

/// Health names what is wrong; until it is put right nothing is lost and nothing else suffers.
fn refusal(gate: &Tollgate) -> String {
    let error = gate.deliver(PATIENCE).unwrap_err();
    assert!(matches!(error, Error::NotDelivered { .. }), "{error}");
    let reasons = gate.health().reasons;
    let [HealthReason::SinkRefused { reason, .. }] = &reasons[..] else { panic!("{reasons:?}") };
    reason.clone()
}

fn a_row_that_is_refused_is_said_and_kept(dir: &Path) {
    let tables = Tables::new(dir);
    let data = tempfile::tempdir().unwrap();
    let gate = embedded::open(data.path(), tables.open());
    let [tokens, requests] = embedded::define(&gate);
    gate.consume(1, tokens, 50).unwrap();
    gate.deliver(PATIENCE).unwrap();
    tables.execute("ALTER TABLE {}.quota_usage ADD CONSTRAINT small CHECK (used < 100)");
    gate.consume(1, tokens, 70).unwrap();
    let reason = refusal(&gate);
    assert!(reason.contains("\"small\""), "{reason}");
    gate.consume(2, requests, 3).unwrap();
    gate.snapshot().unwrap();
    gate.snapshot().unwrap();
    assert!(refusal(&gate).contains("\"small\""));
    assert_eq!(tables.totals().len(), 1);
    tables.execute("ALTER TABLE {}.quota_usage DROP CONSTRAINT small");
    gate.deliver(PATIENCE).unwrap();
    assert!(gate.health().is_healthy(), "{:?}", gate.health());
    let expected = [(1, "tokens", 120), (2, "requests", 3)];
    let expected =
        expected.map(|(user, quota, used)| ((user, quota.to_owned(), 0), (used, 1 << 40)));
    assert_eq!(tables.totals(), Totals::from(expected));
}

fn a_table_that_is_gone_is_said_and_nothing_is_lost(dir: &Path) {
    let tables = Tables::new(dir);
    let data = tempfile::tempdir().unwrap();
    let gate = embedded::open(data.path(), tables.open());
    let [tokens, _] = embedded::define(&gate);
    gate.consume(1, tokens, 50).unwrap();
    gate.deliver(PATIENCE).unwrap();
    // Set aside, and put back.
    tables.execute("ALTER TABLE {}.quota_usage RENAME TO set_aside");
    gate.consume(1, tokens, 7).unwrap();
    let reason = refusal(&gate);
    assert!(reason.contains("quota_usage") && reason.contains("does not exist"), "{reason}");
    tables.execute("ALTER TABLE {}.set_aside RENAME TO quota_usage");
    gate.deliver(PATIENCE).unwrap();
    let key = (1, "tokens".to_owned(), 0);
    assert_eq!(tables.totals(), Totals::from([(key.clone(), (57, 1 << 40))]));
    // Dropped, and made anew: all totals come again.
    tables.execute("DROP SCHEMA {} CASCADE");
    gate.consume(1, tokens, 1).unwrap();
    let reason = refusal(&gate);
    assert!(reason.contains("PostgresSink::migrate"), "{reason}");
    tables.sink().migrate().unwrap();
    gate.deliver(PATIENCE).unwrap();
    assert_eq!(tables.totals(), Totals::from([(key, (58, 1 << 40))]));
}

fn an_engine_delivers_over_broken_connections(dir: &Path) {
    let sockets = directory();
    let (socket, target) = (sockets.path().join(SOCKET), dir.join(SOCKET));
    let _proxy = Proxy::start(&socket, &target, [20_000, 30], 61);
    let mut tables = Tables::new(dir);
    tables.parameters = parameters(sockets.path());
    let data = tempfile::tempdir().unwrap();
    let gate = embedded::open(data.path(), tables.open());
    let [tokens, requests] = embedded::define(&gate);
    for round in 0..300 {
        gate.consume(round % 7, tokens, 2).unwrap();
        gate.consume(round % 5, requests, 1).unwrap();
        thread::sleep(Duration::from_millis(10));
    }
    gate.deliver(PATIENCE).unwrap();
    let failures = gate.sinks()[0].failures;
    assert!(failures > 10, "{failures}");
    let used = |quota, user| i128::from(gate.usage(user, quota).unwrap().used);
    let tokens = (0..7).map(|user| ((user, "tokens".to_owned(), 0), used(tokens, user)));
    let requests = (0..5).map(|user| ((user, "requests".to_owned(), 0), used(requests, user)));
    let expected = tokens.chain(requests).map(|(key, used)| (key, (used, 1 << 40)));
    assert_eq!(tables.totals(), expected.collect());
}

#[test]
fn totals_survive_kills_of_the_server() {
    let Some(server) = start() else { return };
    let dir = server.dir().to_path_buf();
    let tables = Tables::new(&dir);
    // At once, with its children dying after it; with them, without a checkpoint; in order.
    let signals = [Signal::KILL, Signal::KILL, Signal::QUIT, Signal::INT];
    totals_survive_kills(&Mutex::new(server), &tables, &signals, kills());
}

/// The client's way to close a connection can't be taken on a thread of an asynchronous runtime:
/// whoever dropped the sink there panicked.
#[test]
fn a_sink_may_be_dropped_by_asynchronous_code() {
    let Some(server) = start() else { return };
    let tables = Tables::new(server.dir());
    let mut sink = tables.sink();
    let mut feed = Feed::new(1, 1);
    assert_eq!(sink.apply(&feed.next()).unwrap(), Applied::Now);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async move { drop(sink) });
}

/// Nor could it migrate: most programs have such a runtime, and begin there.
#[test]
fn asynchronous_code_may_migrate() {
    let Some(server) = start() else { return };
    let mut sink = PostgresSink::new(&parameters(server.dir())).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    // Once to create the tables, and once to check them.
    for _ in 0..2 {
        runtime.block_on(async { sink.migrate() }).unwrap();
    }
    assert_eq!(sink.apply(&Feed::new(1, 1).next()).unwrap(), Applied::Now);
}

#[test]
fn without_a_server_the_error_says_so() {
    let mut sink = PostgresSink::new("host=/nowhere user=tollgate password=secret").unwrap();
    assert!(!format!("{sink:?}").contains("secret"));
    let error = sink.position(Feed::new(1, 1).engine()).unwrap_err();
    assert!(matches!(error, SinkError::Unavailable { .. }) && error.is_retryable(), "{error:?}");
    assert!(error.to_string().contains("No such file"), "{error}");
    let error = PostgresSink::new("host").unwrap_err();
    assert!(matches!(error, SinkError::Misconfigured { .. }) && !error.is_retryable(), "{error:?}");
}

/// Over TCP, from a server that takes encrypted connections only.
#[cfg(feature = "postgres-tls")]
#[test]
fn connections_are_encrypted() {
    use crate::servers::{Program, command};

    const CERTIFICATE: &str = "[req]\ndistinguished_name = dn\nx509_extensions = ext\nprompt = no\n\
        [dn]\nCN = localhost\n\
        [ext]\nsubjectAltName = DNS:localhost\nbasicConstraints = critical, CA:FALSE\n";
    let Some(openssl) = (Program { names: &["openssl"], versions: None }).find() else { return };
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let make_certificate = |dir: &Path, name: &str| {
        std::fs::write(dir.join("certificate.cnf"), CERTIFICATE).unwrap();
        let arguments = format!(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 \
             -config certificate.cnf -keyout {name}.key -out {name}.pem"
        );
        assert!(command(&openssl, dir).args(arguments.split(' ')).status().unwrap().success());
        std::fs::read(dir.join(format!("{name}.pem"))).unwrap()
    };
    let server = cluster::start(
        &format!(
            "{SETTINGS} -c listen_addresses=127.0.0.1 -c port={port} -c ssl=on \
             -c ssl_cert_file=../server.pem -c ssl_key_file=../server.key"
        ),
        |dir| {
            make_certificate(dir, "server");
            let rules = "local all all trust\nhostssl all all 127.0.0.1/32 trust\n";
            std::fs::write(dir.join("data/pg_hba.conf"), rules).unwrap();
        },
    );
    let Some(server) = server else { return };
    let authorities = std::fs::read(server.dir().join("server.pem")).unwrap();
    let others = make_certificate(server.dir(), "other");
    let parameters =
        format!("host=localhost hostaddr=127.0.0.1 port={port} user=tollgate dbname=postgres");
    let sink = || PostgresSink::new(&parameters).unwrap();
    let mut feed = Feed::new(1, 1);

    let error = sink().migrate().unwrap_err();
    assert!(error.to_string().contains("no encryption"), "{error}");
    let error = sink().tls(&others).unwrap().migrate().unwrap_err();
    assert!(error.to_string().contains("certificate"), "{error}");
    let other_name = parameters.replace("host=localhost", "host=db.internal");
    let other_name = PostgresSink::new(&other_name).unwrap().tls(&authorities).unwrap().migrate();
    assert!(other_name.unwrap_err().to_string().contains("not valid for name"));
    let mut encrypted = sink().tls(&authorities).unwrap();
    encrypted.migrate().unwrap();
    assert_eq!(encrypted.apply(&feed.next()).unwrap(), Applied::Now);
    let error = sink().tls(b"").unwrap_err();
    assert!(matches!(error, SinkError::Misconfigured { .. }), "{error}");
}
