//! What an operator is told to do, done.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;

use tollgate::{QuotaId, UsageEvent};

use super::*;

/// What a child that delivers is told by: a directory, where the tables are, how many deliveries.
const CHILD: &str = "TOLLGATE_SINK_DELIVERIES";
/// What it says.
const DELIVERED: &str = "delivered";

#[test]
fn what_is_told_is_right() {
    let Some(server) = start() else { return };
    let dir = server.dir();
    emptied_tables_are_given_all_totals_once(dir);
    events_that_stay_in_emptied_tables_stay_alone(dir);
    what_is_dropped_for_a_missing_table_is_the_sinks(dir);
    a_version_that_is_gone_is_put_back(dir);
    a_database_that_is_missing_is_to_be_created(dir);
    a_database_of_another_encoding_is_refused(dir);
    a_constraint_that_refuses_a_commit_has_refused(dir);
    a_row_that_a_trigger_keeps_away_is_said(dir);
}

/// The words of docs/sinks.md from `begin` to `end`, for the tables' schema.
fn documented(tables: &Tables<'_>, begin: &str, end: char) -> String {
    let text = include_str!("../../../docs/sinks.md");
    let found = text.find(begin).map(|start| text[start..].split(end).next().unwrap());
    let found = found.unwrap_or_else(|| panic!("{begin} is not documented"));
    found.replace("tollgate.", &format!("{}.", tables.quoted()))
}

/// While an engine delivers.
fn emptied_tables_are_given_all_totals_once(dir: &Path) {
    let tables = Tables::new(dir);
    let statement = documented(&tables, "TRUNCATE tollgate.", ';');
    let data = tempfile::tempdir().unwrap();
    let gate = embedded::open(data.path(), tables.open());
    let [tokens, _] = embedded::define(&gate);
    let is_over = AtomicBool::new(false);
    let mut consumed = 0;
    thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..50 {
                thread::sleep(Duration::from_millis(20));
                tables.execute(&statement);
            }
            is_over.store(true, Ordering::Release);
        });
        while !is_over.load(Ordering::Acquire) {
            gate.consume(consumed % 7, tokens, 1).unwrap();
            consumed += 1;
            // It is refused where it finds the tables emptied, and then gives all totals.
            let _ = gate.deliver(Duration::from_millis(500));
        }
    });
    let used = |user| i128::from(gate.usage(user, tokens).unwrap().used);
    let expected = (0..7).map(|user| ((user, "tokens".to_owned(), 0), (used(user), 1 << 40)));
    let expected: Totals = expected.collect();
    for is_idle in [false, true] {
        if is_idle {
            tables.execute(&statement);
        }
        let _ = gate.deliver(PATIENCE);
        gate.deliver(PATIENCE).unwrap();
        assert_eq!(tables.totals(), expected, "idle: {is_idle}");
    }
}

/// The last delivery was applied, and the process was killed before it had written that down. Its
/// events came twice; where it was the first one, they kept the sink from all others.
fn events_that_stay_in_emptied_tables_stay_alone(dir: &Path) {
    for deliveries in [1, 2] {
        let (tables, data) = (Tables::new(dir), tempfile::tempdir().unwrap());
        deliver_and_be_killed(&tables, data.path(), deliveries);
        assert_eq!(tables.events(), Some(deliveries));
        tables.execute(&documented(&tables, "TRUNCATE tollgate.", ';'));
        let gate = open_seldom(data.path(), tables.sink());
        let [_, quota] = embedded::define(&gate);
        record(&gate, quota, deliveries);
        gate.deliver(PATIENCE).unwrap();
        let (name, sum) = ("requests".to_owned(), i128::from(deliveries) + 1);
        assert_eq!(tables.totals(), Totals::from([((1, name.clone(), 0), (sum, 1 << 40))]));
        assert_eq!(tables.recorded(), Some(BTreeMap::from([((1, name), sum)])));
    }
}

/// Where nothing is delivered that nobody asks for.
fn open_seldom(data: &Path, sink: PostgresSink) -> Tollgate {
    let config = embedded::config().delivery(|it| it.flush_interval(Duration::from_secs(3600)));
    Tollgate::builder(data).config(config).sink("database", sink).open().unwrap()
}

fn record(gate: &Tollgate, quota: QuotaId, number: u64) {
    let event = UsageEvent::new(1, quota, 1.0, Timestamp::from_unix_millis(number));
    gate.record(&event.metadata("number", number.to_string())).unwrap();
}

fn deliver_and_be_killed(tables: &Tables<'_>, data: &Path, deliveries: u64) {
    let Tables { parameters, schema, .. } = tables;
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "postgres::repairs::child", "--nocapture", "--test-threads", "1"])
        .env(CHILD, format!("{}\n{parameters}\n{schema}\n{deliveries}", data.display()))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let said: Vec<_> = BufReader::new(child.stderr.take().unwrap())
        .lines()
        .map(Result::unwrap)
        .take_while(|line| line != DELIVERED)
        .collect();
    child.kill().unwrap();
    assert_eq!(child.wait().unwrap().code(), None, "the child ended by itself: {said:?}");
}

/// A test only by its looks: it does nothing unless it is told to, and then until it is killed.
#[test]
fn child() {
    let Ok(task) = std::env::var(CHILD) else { return };
    let [data, parameters, schema, deliveries] = task.lines().collect::<Vec<_>>()[..] else {
        panic!("{task}")
    };
    let sink = PostgresSink::new(parameters).unwrap().schema(schema).with_events();
    let gate = open_seldom(Path::new(data), sink);
    let [_, quota] = embedded::define(&gate);
    for number in 0..deliveries.parse().unwrap() {
        record(&gate, quota, number);
        gate.deliver(PATIENCE).unwrap();
    }
    eprintln!("{DELIVERED}");
    // It ends if the parent does.
    let _ = std::io::stdin().read_line(&mut String::new());
}

fn what_is_dropped_for_a_missing_table_is_the_sinks(dir: &Path) {
    let tables = Tables::new(dir);
    tables.execute("CREATE TABLE {}.somebody_elses (); DROP TABLE {}.quota_positions");
    let error = tables.sink().migrate().unwrap_err();
    assert_schema_error(&error, &["quota_positions is missing", "backup"]);
    let text = error.to_string();
    let drop = text.split("others as well (").nth(1).and_then(|rest| rest.split(") and").next());
    tables.client().batch_execute(drop.unwrap()).unwrap();
    tables.sink().migrate().unwrap();
    tables.execute("SELECT FROM {}.somebody_elses");
}

fn a_version_that_is_gone_is_put_back(dir: &Path) {
    let tables = Tables::new(dir);
    let engine = Feed::new(1, 1).engine();
    tables.execute("DELETE FROM {}.quota_schema");
    for error in [tables.sink().migrate(), tables.sink().position(engine).map(drop)] {
        assert_schema_error(error.as_ref().unwrap_err(), &["holds no version", "INSERT INTO"]);
    }
    let text = tables.sink().migrate().unwrap_err().to_string();
    let insert = text.split("put it back (").nth(1).and_then(|rest| rest.rsplit_once(')'));
    tables.client().batch_execute(insert.unwrap().0).unwrap();
    tables.sink().migrate().unwrap();
    tables.execute("UPDATE {}.quota_schema SET version = 0");
    let error = tables.sink().migrate().unwrap_err();
    assert_schema_error(&error, &["version 0", "correct it"]);
}

fn a_database_that_is_missing_is_to_be_created(dir: &Path) {
    let parameters = parameters(dir).replace("dbname=postgres", "dbname=missing");
    let error = PostgresSink::new(&parameters).unwrap().migrate().unwrap_err();
    assert_schema_error(&error, &["\"missing\" does not exist", "create the database"]);
    assert!(!error.to_string().contains("migrate"), "{error}");
}

/// It has no place for most names of users and models.
fn a_database_of_another_encoding_is_refused(dir: &Path) {
    let latin = "CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0 LC_COLLATE 'C' \
                 LC_CTYPE 'C'";
    connect(dir).unwrap().batch_execute(latin).unwrap();
    let parameters = parameters(dir).replace("dbname=postgres", "dbname=latin");
    let mut sink = PostgresSink::new(&parameters).unwrap();
    assert_schema_error(&sink.migrate().unwrap_err(), &["LATIN1", "UTF8"]);
    let mut client = Client::connect(&parameters, postgres::NoTls).unwrap();
    client.batch_execute(&format!("CREATE SCHEMA tollgate; {}", sink.creation_sql())).unwrap();
    let error = sink.position(Feed::new(1, 1).engine()).unwrap_err();
    assert_schema_error(&error, &["LATIN1", "UTF8"]);
}

fn a_constraint_that_refuses_a_commit_has_refused(dir: &Path) {
    let tables = Tables::new(dir);
    tables.execute("ALTER TABLE {}.quota_usage ADD UNIQUE (used) DEFERRABLE INITIALLY DEFERRED");
    let rows = [1, 2].map(|user| row(user, "tokens", None, 5, 5)).to_vec();
    let error = tables.sink().apply(&Feed::new(1, 1).batch(rows, Vec::new())).unwrap_err();
    assert!(matches!(error, SinkError::BadData { .. }), "{error:?}");
    assert!(error.to_string().contains("quota_usage_used_key"), "{error}");
}

fn a_row_that_a_trigger_keeps_away_is_said(dir: &Path) {
    let tables = Tables::new(dir);
    tables.execute(
        "CREATE FUNCTION {}.suppress() RETURNS trigger LANGUAGE plpgsql AS $$ \
         BEGIN RETURN NULL; END $$; \
         CREATE TRIGGER suppress BEFORE INSERT ON {}.quota_usage \
         FOR EACH ROW EXECUTE FUNCTION {}.suppress()",
    );
    let mut feed = Feed::new(1, 1);
    let rows = vec![row(1, "tokens", None, 5, 5)];
    let error = tables.sink().apply(&feed.batch(rows, Vec::new())).unwrap_err();
    assert!(matches!(error, SinkError::BadData { .. }), "{error:?}");
    assert!(error.to_string().contains("0 of 1 rows"), "{error}");
    assert_eq!(tables.sink().position(feed.engine()).unwrap(), None);
}
