//! What is between a sink and PostgreSQL: silence, locks, servers that are not the right one.

use std::net::{Ipv4Addr, TcpListener};
use std::sync::mpsc;
use std::time::Instant;

use super::*;

/// What `schema::MIGRATION_LOCK` is.
const MIGRATION_LOCK: u64 = 0x746f_6c6c_6761_7465;

/// What `work` returns, which must not take much longer than a second.
fn in_time<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || sender.send(work()));
    receiver.recv_timeout(Duration::from_secs(20)).expect("it hangs")
}

fn assert_unavailable<T: std::fmt::Debug>(result: Result<T, SinkError>, words: &str) {
    let error = result.unwrap_err();
    assert!(matches!(error, SinkError::Unavailable { .. }) && error.is_retryable(), "{error:?}");
    assert!(error.to_string().contains(words), "{error}");
}

#[test]
fn what_is_not_there_or_not_to_be_had_is_said_in_time() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let settings = format!("{SETTINGS} -c listen_addresses=127.0.0.1 -c port={port}");
    let Some(server) = cluster::start(&settings, |_| {}) else { return };
    let dir = server.dir();
    let parameters = format!("{} port={port}", parameters(dir));
    let tables = Tables::at(dir, parameters);
    the_longest_timeout_is_one_for_the_socket_too(&tables, port);
    new_sinks_do_not_wait_for_ever(&tables);
    two_migrate_at_once_whatever_the_isolation(&tables);
    // The last, since it leaves the server so.
    what_can_not_be_written_to_is_not_believed(&tables);
}

fn the_longest_timeout_is_one_for_the_socket_too(tables: &Tables<'_>, port: u16) {
    let parameters = format!("host=127.0.0.1 port={port} user=tollgate dbname=postgres");
    let sink = PostgresSink::new(&parameters).unwrap().schema(&tables.schema);
    let mut sink = sink.statement_timeout(Duration::MAX);
    assert_eq!(sink.position(Feed::new(1, 1).engine()).unwrap(), None);
}

/// Nor do those who migrate.
fn new_sinks_do_not_wait_for_ever(tables: &Tables<'_>) {
    let timeout = Duration::from_millis(100);
    let mut holder = tables.client();
    for lock in [
        format!("LOCK TABLE {}.quota_schema IN ACCESS EXCLUSIVE MODE", tables.quoted()),
        format!("SELECT pg_advisory_xact_lock({MIGRATION_LOCK})"),
    ] {
        let mut transaction = holder.transaction().unwrap();
        transaction.batch_execute(&lock).unwrap();
        let mut sink = tables.sink().statement_timeout(timeout);
        if lock.contains("TABLE") {
            let engine = Feed::new(1, 1).engine();
            let position;
            (position, sink) = in_time(move || (sink.position(engine), sink));
            assert_unavailable(position, "statement timeout");
        }
        assert_unavailable(in_time(move || sink.migrate()), "statement timeout");
        transaction.rollback().unwrap();
    }
    tables.sink().statement_timeout(Duration::from_secs(60)).migrate().unwrap();
}

/// The second sees what the first has made.
fn two_migrate_at_once_whatever_the_isolation(tables: &Tables<'_>) {
    tables.execute("DROP SCHEMA {} CASCADE");
    let options = "options='-c default_transaction_isolation=serializable'";
    let second = PostgresSink::new(&format!("{} {options}", tables.parameters)).unwrap();
    let mut second = second.schema(&tables.schema);
    let mut first = tables.client();
    let mut transaction = first.transaction().unwrap();
    let creation = format!(
        "SELECT pg_advisory_xact_lock({MIGRATION_LOCK}); CREATE SCHEMA {}; {}",
        tables.quoted(),
        second.creation_sql()
    );
    transaction.batch_execute(&creation).unwrap();
    let waiting = thread::spawn(move || second.migrate());
    let waits = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
    while tables.query(waits).is_empty() {
        thread::sleep(Duration::from_millis(10));
    }
    transaction.commit().unwrap();
    waiting.join().unwrap().unwrap();
}

/// A replica lags, or is empty: from its position totals would come twice.
fn what_can_not_be_written_to_is_not_believed(tables: &Tables<'_>) {
    let mut feed = Feed::new(7, 1);
    let engine = feed.engine();
    let mut sinks = [tables.sink(), tables.sink()];
    sinks[0].apply(&feed.next()).unwrap();
    sinks[1].position(engine).unwrap();
    let options = "options='-c default_transaction_read_only=on'";
    let read_only = PostgresSink::new(&format!("{} {options}", tables.parameters)).unwrap();
    let mut read_only = read_only.schema(&tables.schema);
    assert_unavailable(read_only.position(engine), "does not allow writes");
    assert_unavailable(read_only.migrate(), "does not allow writes");

    // A pooler may lead a connection elsewhere.
    tables.execute("ALTER SYSTEM SET default_transaction_read_only = on");
    tables.execute("SELECT pg_reload_conf()");
    let [one, other] = &mut sinks;
    is_refused_soon(|| one.position(engine).map(drop));
    is_refused_soon(|| other.last_events(engine).map(drop));
}

/// Once the server has read its settings.
fn is_refused_soon(mut ask: impl FnMut() -> Result<(), SinkError>) {
    let start = Instant::now();
    loop {
        match ask() {
            Ok(()) => assert!(start.elapsed() < Duration::from_secs(10), "it is believed"),
            result => return assert_unavailable(result, "read-only transaction"),
        }
    }
}

/// It accepts, as a balancer without servers does, and answers nothing.
#[test]
fn a_peer_that_never_answers_is_given_up() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let parameters = format!("host=127.0.0.1 port={port} user=tollgate");
    let sink = PostgresSink::new(&parameters).unwrap();
    let mut sink = sink.connect_timeout(Duration::from_millis(300));
    let engine = Feed::new(1, 1).engine();
    let position;
    (position, sink) = in_time(move || (sink.position(engine), sink));
    assert_unavailable(position, "no answer");
    let peer = listener.accept().unwrap();
    // Attempts do not pile up.
    assert_unavailable(sink.position(engine), "not ended");
    assert_unavailable(sink.migrate(), "not ended");
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err());
    // Once it has ended, there is another.
    drop((peer, listener));
    let start = Instant::now();
    loop {
        let error = sink.position(engine).unwrap_err();
        if error.to_string().contains("refused") {
            break;
        }
        assert!(start.elapsed() < Duration::from_secs(10), "{error}");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn parameters_that_lead_nowhere_are_refused() {
    let engine = Feed::new(1, 1).engine();
    for (parameters, words) in [("user=tollgate", "host"), ("host=/nowhere sslmode=require", "tls")]
    {
        let error = PostgresSink::new(parameters).and_then(|mut sink| sink.position(engine));
        let error = error.unwrap_err();
        assert!(matches!(error, SinkError::Misconfigured { .. }), "{error:?}");
        assert!(error.to_string().contains(words), "{error}");
    }
}
