//! What an operator is told to do, done.

use std::sync::atomic::AtomicBool;

use super::*;

#[test]
fn what_is_told_is_right() {
    let Some(server) = start() else { return };
    let dir = server.dir();
    emptied_tables_are_given_all_totals_once(dir);
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
