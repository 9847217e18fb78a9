//! A sink that writes to PostgreSQL: one transaction per batch, which moves the engine's position
//! by a conditional update and adds all rows, in as few statements as their number allows.
//!
//! Every transaction first takes an advisory lock of the engine's own, one for each schema. So a
//! transaction that a lost connection left behind, and that may yet commit, has ended before a
//! position is read.

mod columns;
mod failure;
mod reach;
mod schema;
#[cfg(feature = "postgres-tls")]
mod tls;

use std::fmt;
use std::time::Duration;

use postgres::config::{SslMode, TargetSessionAttrs};
use postgres::types::Type;
use postgres::{Client, Config, IsolationLevel, NoTls, Transaction};

use self::columns::{EventColumns, Parameter, UsageColumns};
use self::failure::{KIND, failed, failed_commit};
use self::reach::Attempt;
use self::schema::{MIGRATION_LOCK, Statements, TABLES, VERSION, quote, quote_literal};
use super::{Applied, Position, SinkError, UsageBatch, UsageSink};
use crate::model::EngineId;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(60);
const MIGRATE: &str = "migrate the tables";

/// Rows per statement. A batch may hold millions: all totals, or what accumulated during an outage.
/// All of them in one statement would exceed its timeout, or the 1 GiB that the server takes as one
/// message, at every attempt. This many take a second or two, and 30 MB with the longest names.
const STATEMENT_ROWS_MAX: usize = 100_000;
/// Events per statement. Each may take 4 KiB, and six times that where JSON escapes all of it: 250
/// MB together.
const STATEMENT_EVENTS_MAX: usize = 10_000;

/// Writes usage, and events on request, to tables in a PostgreSQL database.
///
/// It connects when it is first used, and reconnects after the connection was lost. It connects
/// only to a server that takes writes, the first such one of several hosts, and never to a replica.
/// Calls block. [`migrate`](Self::migrate) may be called on any thread. The calls of
/// [`UsageSink`], which are the engine's, must not be made on one of an asynchronous runtime.
///
/// ```no_run
/// use std::time::Duration;
/// use tollgate::sink::PostgresSink;
///
/// let mut sink = PostgresSink::new("host=db.internal user=tollgate dbname=billing")?
///     .connect_timeout(Duration::from_secs(5))
///     .with_events();
/// sink.migrate()?; // once, when you deploy: creates the tables, or checks them
/// # Ok::<(), tollgate::sink::SinkError>(())
/// ```
pub struct PostgresSink {
    config: Config,
    statements: Statements,
    statement_timeout: Duration,
    takes_events: bool,
    #[cfg(feature = "postgres-tls")]
    tls: Option<tokio_postgres_rustls::MakeRustlsConnect>,
    /// An attempt to connect that took too long, and has not ended yet.
    attempt: Option<Attempt>,
    connection: Option<Client>,
}

impl PostgresSink {
    /// A sink for the database that `params` names, as `key=value` pairs or as a URL
    /// (`postgresql://user@host/db`). Does not connect.
    ///
    /// # Errors
    ///
    /// [`SinkError::Misconfigured`] when `params` can't be read, or name no host.
    pub fn new(params: &str) -> Result<Self, SinkError> {
        let mut config: Config =
            params.parse().map_err(|e: postgres::Error| SinkError::misconfigured(KIND, e))?;
        if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
            return Err(SinkError::misconfigured(KIND, "the parameters name no host"));
        }
        if config.get_application_name().is_none() {
            config.application_name("tollgate");
        }
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(CONNECT_TIMEOUT);
        }
        // A replica may be behind, or empty: acting on its position would count totals twice.
        if config.get_target_session_attrs() == TargetSessionAttrs::Any {
            config.target_session_attrs(TargetSessionAttrs::ReadWrite);
        }
        let statements = Statements::new("tollgate");
        Ok(Self {
            config,
            statements,
            statement_timeout: STATEMENT_TIMEOUT,
            takes_events: false,
            #[cfg(feature = "postgres-tls")]
            tls: None,
            attempt: None,
            connection: None,
        })
    }

    /// The schema that holds the tables. Default `tollgate`.
    #[must_use]
    pub fn schema(mut self, name: &str) -> Self {
        self.statements = Statements::new(name);
        self
    }

    /// Stores events too, in the table `quota_events`, which grows with each.
    #[must_use]
    pub fn with_events(mut self) -> Self {
        self.takes_events = true;
        self
    }

    /// Connects only with encryption, to a server whose certificate is signed by one of these
    /// authorities and names the host that is connected to. Certificates are given as PEM text.
    ///
    /// # Errors
    ///
    /// [`SinkError::Misconfigured`] when the text holds no certificate, or one that can't be read.
    #[cfg(feature = "postgres-tls")]
    pub fn tls(mut self, authorities: &[u8]) -> Result<Self, SinkError> {
        self.tls = Some(tls::connector(authorities)?);
        self.config.ssl_mode(SslMode::Require);
        Ok(self)
    }

    /// How long connecting to an address may take. Default 10 seconds, or what the connection's
    /// parameters say. The whole attempt, including authentication, is given up after three times
    /// that for each host.
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.config.connect_timeout(timeout);
        self
    }

    /// How long the database may take for a statement, including waits for locks. Default 60
    /// seconds; at least 1 millisecond, at most 24 days. The connection is given up when the
    /// server's machine is silent for as long (at least 4 seconds), unless the connection's
    /// parameters say otherwise (`tcp_user_timeout`, `keepalives_idle` and the like).
    #[must_use]
    pub fn statement_timeout(mut self, timeout: Duration) -> Self {
        self.statement_timeout = reach::timeout(timeout);
        self
    }

    /// Creates the tables where there are none; otherwise checks that all are there, in the version
    /// that this library uses. Blocks, on any thread.
    ///
    /// For the deployment: a later start does not need it, and need not fail with it. What is
    /// counted while the database is down, or has no tables, is delivered once that is repaired.
    ///
    /// Creating needs the right to create a schema in the database, or to create tables in the
    /// schema if that exists.
    ///
    /// # Errors
    ///
    /// [`SinkError::Schema`] when some of the tables are missing, or are of another version, or the
    /// database's encoding is not UTF8. [`SinkError::Unavailable`] when the database can't be
    /// reached.
    pub fn migrate(&mut self) -> Result<(), SinkError> {
        reach::elsewhere(MIGRATE, || self.migrate_here())
    }

    fn migrate_here(&mut self) -> Result<(), SinkError> {
        let step = |e| failed(MIGRATE)(e);
        let mut connection = self.connect()?;
        let schema = &self.statements.schema;
        let lock = format!("SELECT pg_advisory_xact_lock({MIGRATION_LOCK})");
        let mut transaction = begin(&mut connection, self.statement_timeout, &lock)?;
        require_utf8(&mut transaction)?;
        let missing = missing_tables(&mut transaction, schema)?;
        if missing.len() == TABLES.len() {
            create_schema(&mut transaction, schema)?;
            transaction.batch_execute(&schema::creation(schema)).map_err(step)?;
        } else if missing.is_empty() {
            require_version(&mut transaction, &self.statements)?;
        } else {
            let reason =
                format!("of the tables in schema {schema:?}, {} is missing", missing.join(", "));
            let others = TABLES.iter().filter(|table| !missing.contains(table));
            let others: Vec<_> = others.map(|table| format!("{}.{table}", quote(schema))).collect();
            let remedy = format!(
                "with the others alone, totals would be wrong: put it back from a backup, or drop \
                 the others as well (DROP TABLE {}) and migrate again, to be given all totals anew",
                others.join(", ")
            );
            return Err(failure::schema(reason, remedy, None));
        }
        transaction.commit().map_err(step)
    }

    /// The SQL that [`migrate`](Self::migrate) runs in an empty schema, for those who run it
    /// themselves.
    #[must_use]
    pub fn creation_sql(&self) -> String {
        schema::creation(&self.statements.schema)
    }

    /// A new connection. While an attempt has not ended, no other is made.
    fn connect(&mut self) -> Result<Client, SinkError> {
        let patience = reach::patience(&self.config);
        let (attempt, patience) = match self.attempt.take() {
            Some(attempt) => (attempt, Duration::ZERO),
            None => (self.attempt()?, patience),
        };
        attempt.wait(patience).unwrap_or_else(|attempt| {
            self.attempt = Some(attempt);
            let reason = if patience.is_zero() {
                "the attempt before has not ended".to_owned()
            } else {
                format!("no answer in {patience:?}")
            };
            Err(SinkError::unavailable(KIND, "connect", reason))
        })
    }

    fn attempt(&self) -> Result<Attempt, SinkError> {
        let config = reach::bounded(&self.config, self.statement_timeout);
        #[cfg(feature = "postgres-tls")]
        if let Some(tls) = self.tls.clone() {
            return Attempt::start(move || config.connect(tls));
        }
        if config.get_ssl_mode() == SslMode::Require {
            let reason = "sslmode=require needs PostgresSink::tls, of the feature postgres-tls";
            return Err(SinkError::misconfigured(KIND, reason));
        }
        Attempt::start(move || config.connect(NoTls))
    }

    /// The connection of the last call, or a new one.
    fn connection(&mut self) -> Result<Client, SinkError> {
        if let Some(connection) = self.connection.take().filter(|it| !it.is_closed()) {
            return Ok(connection);
        }
        let mut connection = self.connect()?;
        let mut transaction = begin(&mut connection, self.statement_timeout, "")?;
        require_utf8(&mut transaction)?;
        require_version(&mut transaction, &self.statements)?;
        transaction.rollback().map_err(failed("end a transaction"))?;
        Ok(connection)
    }

    /// Runs `work` in a transaction under the engine's lock. A connection on which anything failed
    /// is not used again.
    fn with_transaction<T>(
        &mut self,
        engine: EngineId,
        work: impl FnOnce(&mut Transaction<'_>, &Statements) -> Result<Outcome<T>, SinkError>,
    ) -> Result<T, SinkError> {
        let mut connection = self.connection()?;
        let first = preamble(&self.statements.schema, engine);
        let mut transaction = begin(&mut connection, self.statement_timeout, &first)?;
        let value = match work(&mut transaction, &self.statements)? {
            Outcome::Commit(value) => {
                transaction.commit().map_err(failed_commit)?;
                value
            }
            Outcome::Rollback(value) => {
                transaction.rollback().map_err(failed("end a transaction"))?;
                value
            }
        };
        self.connection = Some(connection);
        Ok(value)
    }
}

impl UsageSink for PostgresSink {
    fn position(&mut self, engine: EngineId) -> Result<Option<Position>, SinkError> {
        self.with_transaction(engine, |transaction, statements| {
            read_position(transaction, statements, engine).map(Outcome::Rollback)
        })
    }

    fn apply(&mut self, batch: &UsageBatch) -> Result<Applied, SinkError> {
        // A batch goes forward; the statements do not compare numbers.
        batch.verdict(batch.from())?;
        let takes_events = self.takes_events;
        self.with_transaction(batch.engine(), |transaction, statements| {
            if !move_position(transaction, statements, batch)? {
                let stored = read_position(transaction, statements, batch.engine())?;
                return match batch.verdict(stored)? {
                    Applied::Before => Ok(Outcome::Rollback(Applied::Before)),
                    // Somebody who does not take the lock has just moved it there.
                    Applied::Now => {
                        Err(SinkError::unavailable(KIND, "move a position", "it moved"))
                    }
                };
            }
            add_usage(transaction, statements, batch)?;
            if takes_events {
                insert_events(transaction, statements, batch)?;
            }
            Ok(Outcome::Commit(Applied::Now))
        })
    }

    fn wants_events(&self) -> bool {
        self.takes_events
    }

    fn last_events(&mut self, engine: EngineId) -> Result<Option<u64>, SinkError> {
        self.with_transaction(engine, |transaction, statements| {
            read_last_events(transaction, statements, engine).map(Outcome::Rollback)
        })
    }
}

impl Drop for PostgresSink {
    /// On a thread of its own: the client blocks as it closes the connection, and panics where it
    /// is not allowed to, on a thread of an asynchronous runtime.
    fn drop(&mut self) {
        // An attempt may have come to a connection meanwhile.
        let left = (self.connection.take(), self.attempt.take());
        if !matches!(left, (None, None)) {
            reach::drop_elsewhere(left, reach::named_thread());
        }
    }
}

/// Without the connection's parameters, which hold a password.
impl fmt::Debug for PostgresSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresSink")
            .field("hosts", &self.config.get_hosts())
            .field("schema", &self.statements.schema)
            .field("is_connected", &self.connection.is_some())
            .finish_non_exhaustive()
    }
}

/// How a transaction ends.
enum Outcome<T> {
    Commit(T),
    Rollback(T),
}

/// A transaction that waits for nothing longer than the timeout, and sees what others have
/// committed, whatever the session's defaults are. A client that hangs loses its locks. `first` is
/// sent in the same round trip.
fn begin<'a>(
    connection: &'a mut Client,
    timeout: Duration,
    first: &str,
) -> Result<Transaction<'a>, SinkError> {
    let mut transaction = connection
        .build_transaction()
        .isolation_level(IsolationLevel::ReadCommitted)
        .start()
        .map_err(failed("begin a transaction"))?;
    let timeout_ms = timeout.as_millis();
    let bounds = format!(
        "SET LOCAL statement_timeout = {timeout_ms}; \
         SET LOCAL idle_in_transaction_session_timeout = {timeout_ms}; {first}"
    );
    transaction.batch_execute(&bounds).map_err(failed("begin a transaction"))?;
    Ok(transaction)
}

/// What every transaction of an engine begins with. A batch that was confirmed must survive the
/// database's crash, whatever the session's default is. What holds up the tables of one schema is
/// nothing to another's, so the lock is the schema's too.
fn preamble(schema: &str, engine: EngineId) -> String {
    let lock = quote_literal(&format!("tollgate {engine} {schema}"));
    format!(
        "SELECT set_config('synchronous_commit', 'on', true) \
         WHERE current_setting('synchronous_commit') = 'off'; \
         SELECT pg_advisory_xact_lock(hashtextextended({lock}, 0))"
    )
}

fn read_position(
    transaction: &mut Transaction<'_>,
    statements: &Statements,
    engine: EngineId,
) -> Result<Option<Position>, SinkError> {
    let row = transaction
        .query_typed_opt(&statements.read_position, &[(&engine.to_string(), Type::TEXT)])
        .map_err(failed("read a position"))?;
    let Some(row) = row else { return Ok(None) };
    let batch: String = row.try_get(0).map_err(failed("read a position"))?;
    let check: i64 = row.try_get(1).map_err(failed("read a position"))?;
    match (batch.parse(), check.try_into()) {
        (Ok(batch), Ok(check)) => Ok(Some(Position { batch, check })),
        _ => {
            let reason = format!("batch {batch} with checksum {check} is no position");
            Err(failure::schema(reason, "correct it in quota_positions", None))
        }
    }
}

/// Moves the position from the start of the batch to its end; false where it is elsewhere.
fn move_position(
    transaction: &mut Transaction<'_>,
    statements: &Statements,
    batch: &UsageBatch,
) -> Result<bool, SinkError> {
    let engine = batch.engine().to_string();
    let text = |position: Position| (position.batch.to_string(), i64::from(position.check));
    let (to, to_check) = text(batch.to());
    let mut parameters: Vec<Parameter<'_>> =
        vec![(&engine, Type::TEXT), (&to, Type::TEXT), (&to_check, Type::INT8)];
    let from = batch.from().map(text);
    let statement = match &from {
        Some((from, from_check)) => {
            parameters.extend([(from as _, Type::TEXT), (from_check as _, Type::INT8)]);
            &statements.update_position
        }
        None => &statements.insert_position,
    };
    let moved = transaction.execute_typed(statement, &parameters);
    moved.map(|rows| rows == 1).map_err(failed("move a position"))
}

fn add_usage(
    transaction: &mut Transaction<'_>,
    statements: &Statements,
    batch: &UsageBatch,
) -> Result<(), SinkError> {
    for rows in batch.rows().chunks(STATEMENT_ROWS_MAX) {
        let columns = UsageColumns::new(rows);
        let stored = transaction
            .execute_typed(&statements.add_usage, &columns.parameters())
            .map_err(failed("add usage"))?;
        if stored != rows.len() as u64 {
            let other = transaction
                .query_typed(&statements.find_other_meaning, &columns.parameters())
                .map_err(failed("compare rows"))?;
            let quota: Option<String> = other.first().and_then(|row| row.try_get(0).ok());
            let Some(quota) = quota else {
                let expected = rows.len();
                let reason = format!(
                    "quota_usage took {stored} of {expected} rows: a trigger, a rule or a policy \
                     keeps the others away"
                );
                return Err(SinkError::bad_data(KIND, reason));
            };
            return Err(SinkError::other_meaning(KIND, &quota));
        }
    }
    Ok(())
}

fn insert_events(
    transaction: &mut Transaction<'_>,
    statements: &Statements,
    batch: &UsageBatch,
) -> Result<(), SinkError> {
    let (engine, number) = (batch.engine().to_string(), batch.to().batch.to_string());
    let chunks = batch.events().chunks(STATEMENT_EVENTS_MAX);
    for (events, before) in chunks.zip((0_i64..).step_by(STATEMENT_EVENTS_MAX)) {
        let columns = EventColumns::new(events);
        let mut parameters: Vec<Parameter<'_>> =
            vec![(&engine, Type::TEXT), (&number, Type::TEXT), (&before, Type::INT8)];
        parameters.extend(columns.parameters());
        transaction
            .execute_typed(&statements.insert_events, &parameters)
            .map_err(failed("store events"))?;
    }
    Ok(())
}

fn read_last_events(
    transaction: &mut Transaction<'_>,
    statements: &Statements,
    engine: EngineId,
) -> Result<Option<u64>, SinkError> {
    let step = || failed("look for events");
    let row = transaction
        .query_typed_opt(&statements.find_last_events, &[(&engine.to_string(), Type::TEXT)])
        .map_err(step())?;
    let Some(row) = row else { return Ok(None) };
    let batch: String = row.try_get(0).map_err(step())?;
    batch.parse().map(Some).map_err(|_| {
        let reason = format!("batch {batch} is no number of a delivery");
        failure::schema(reason, "correct it in quota_events", None)
    })
}

/// Refuses a database whose encoding lacks characters: an event with such a character would stop
/// all deliveries.
fn require_utf8(transaction: &mut Transaction<'_>) -> Result<(), SinkError> {
    let step = || failed("read the encoding of the database");
    let rows =
        transaction.query_typed("SELECT current_setting('server_encoding')", &[]).map_err(step())?;
    let encoding: Option<String> =
        rows.first().map(|row| row.try_get(0)).transpose().map_err(step())?;
    let encoding = encoding.unwrap_or_default();
    if encoding == "UTF8" {
        return Ok(());
    }
    let reason = format!("the database's encoding is {encoding}");
    Err(failure::schema(reason, "use one with the encoding UTF8, which has all characters", None))
}

/// Refuses tables that are missing, or of another version.
fn require_version(
    transaction: &mut Transaction<'_>,
    statements: &Statements,
) -> Result<(), SinkError> {
    let row = transaction
        .query_typed(&statements.read_version, &[])
        .map_err(failed("read the version of the tables"))?;
    let version: Option<i32> = row.first().and_then(|row| row.try_get(0).ok());
    match version {
        Some(VERSION) => Ok(()),
        Some(other) => {
            let reason = format!("the tables have version {other}, this library writes {VERSION}");
            // There was none before the first.
            let remedy = if other > VERSION {
                "use a later version of this library"
            } else {
                "correct it in quota_schema"
            };
            Err(failure::schema(reason, remedy, None))
        }
        None => {
            let table = format!("{}.quota_schema", quote(&statements.schema));
            let remedy = format!(
                "where the tables are those of this library, put it back \
                 (INSERT INTO {table} VALUES ({VERSION}))"
            );
            Err(failure::schema("quota_schema holds no version", remedy, None))
        }
    }
}

fn missing_tables(
    transaction: &mut Transaction<'_>,
    schema: &str,
) -> Result<Vec<&'static str>, SinkError> {
    let statement = "SELECT tablename::text FROM pg_tables WHERE schemaname = $1::text::name";
    let rows = transaction
        .query_typed(statement, &[(&schema, Type::TEXT)])
        .map_err(failed("list the tables"))?;
    let found: Vec<String> = rows.iter().filter_map(|row| row.try_get(0).ok()).collect();
    let is_missing = |table: &&str| !found.iter().any(|found| found == table);
    Ok(TABLES.into_iter().filter(is_missing).collect())
}

/// Creates the schema, unless it is there: then no right to create one is needed.
fn create_schema(transaction: &mut Transaction<'_>, schema: &str) -> Result<(), SinkError> {
    let statement = "SELECT 1 FROM pg_namespace WHERE nspname = $1::text::name";
    let found = transaction
        .query_typed(statement, &[(&schema, Type::TEXT)])
        .map_err(failed("look for the schema"))?;
    if found.is_empty() {
        transaction
            .batch_execute(&format!("CREATE SCHEMA {}", quote(schema)))
            .map_err(failed("create the schema"))?;
    }
    Ok(())
}
