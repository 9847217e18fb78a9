//! A sink that writes to Redis or Valkey: one script per batch, which compares the position, adds
//! all rows and moves the position. Redis runs a script alone, and logs it as one transaction.

mod keys;

use std::fmt;
use std::time::Duration;

use redis::{Client, Connection, RedisError, Script, ScriptInvocation};

use self::keys::{Keys, WindowRows};
use super::{Applied, Position, SinkError, UsageBatch, UsageSink};
use crate::model::EngineId;

const KIND: &str = "Redis";
const APPLY: &str = "apply a batch";
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(60);

/// Writes usage to Redis (from version 5) or Valkey.
///
/// It connects when it is first used, and reconnects after the connection was lost.
///
/// IMPORTANT: what the server confirms must survive its crash; otherwise a forgotten batch is
/// noticed, and deliveries are refused from then on. So run it with `appendonly yes` and
/// `appendfsync always`. With `aof-load-truncated yes`, the default, Redis 7 may count part of a
/// batch twice if it was killed while writing it: set it to `no`, and run `redis-check-aof --fix`
/// after a crash. Nor may the server evict keys: leave `maxmemory-policy` at `noeviction`. Evicted
/// usage is gone, and if a position is evicted, all totals are added again.
///
/// ```no_run
/// use tollgate::sink::RedisSink;
///
/// let sink = RedisSink::new("redis://cache.internal:6379/0")?.prefix("billing");
/// # Ok::<(), tollgate::sink::SinkError>(())
/// ```
pub struct RedisSink {
    client: Client,
    apply: Script,
    read_position: Script,
    keys: Keys,
    retention: Option<Duration>,
    connect_timeout: Duration,
    response_timeout: Duration,
    connection: Option<Connection>,
}

impl RedisSink {
    /// A sink for the server that a URL names: `redis://host:port/db` or `redis+unix:///socket`.
    /// Does not connect.
    ///
    /// # Errors
    ///
    /// [`SinkError::Misconfigured`] when the URL can't be read.
    pub fn new(url: &str) -> Result<Self, SinkError> {
        Ok(Self {
            client: Client::open(url).map_err(|e| SinkError::misconfigured(KIND, e))?,
            apply: Script::new(include_str!("apply.lua")),
            read_position: Script::new(include_str!("position.lua")),
            keys: Keys::new("tollgate"),
            retention: None,
            connect_timeout: CONNECT_TIMEOUT,
            response_timeout: RESPONSE_TIMEOUT,
            connection: None,
        })
    }

    /// What the keys begin with, in braces. Default `tollgate`; not empty.
    #[must_use]
    pub fn prefix(mut self, prefix: &str) -> Self {
        self.keys = Keys::new(prefix);
        self
    }

    /// How long the usage of a window is kept after its end. Default: forever. Usage that is
    /// delivered later than that starts from zero, and expires at once.
    #[must_use]
    pub fn retention(mut self, retention: Duration) -> Self {
        self.retention = Some(retention);
        self
    }

    /// How long connecting may take. Default 10 seconds.
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// How long an answer may take. Default 60 seconds.
    #[must_use]
    pub fn response_timeout(mut self, timeout: Duration) -> Self {
        self.response_timeout = timeout;
        self
    }

    fn connection(&mut self) -> Result<Connection, SinkError> {
        if let Some(connection) = self.connection.take() {
            return Ok(connection);
        }
        let connect = || -> Result<Connection, RedisError> {
            let connection = self.client.get_connection_with_timeout(self.connect_timeout)?;
            let timeout = Some(self.response_timeout.max(Duration::from_millis(1)));
            connection.set_read_timeout(timeout)?;
            connection.set_write_timeout(timeout)?;
            Ok(connection)
        };
        connect().map_err(|e| SinkError::unavailable(KIND, "connect", e))
    }

    /// The script with a batch as its arguments; `apply.lua` lists them.
    fn invocation(&self, batch: &UsageBatch, windows: &[WindowRows]) -> ScriptInvocation<'_> {
        let mut invocation = self.apply.prepare_invoke();
        invocation.key(self.keys.position(batch.engine()));
        for position in [batch.from(), Some(batch.to())] {
            let (batch, check) = position.map(|it| (it.batch, it.check)).unzip();
            invocation.arg(text(batch)).arg(text(check));
        }
        for window in windows {
            invocation.key(&window.usage_key).key(&window.meaning_key).key(&window.limits_key);
            invocation.arg(window.decimals).arg(&window.end);
            invocation.arg(&window.expires).arg(&window.rows);
        }
        invocation
    }
}

impl UsageSink for RedisSink {
    fn position(&mut self, engine: EngineId) -> Result<Option<Position>, SinkError> {
        let mut connection = self.connection()?;
        let key = self.keys.position(engine);
        let (batch, check): (Option<Vec<u8>>, Option<Vec<u8>>) = self
            .read_position
            .key(&key)
            .invoke(&mut connection)
            .map_err(failed("read a position"))?;
        self.connection = Some(connection);
        let text = |field: Option<Vec<u8>>| lossy(&field.unwrap_or_default());
        stored_position(&key, &text(batch), &text(check))
    }

    fn apply(&mut self, batch: &UsageBatch) -> Result<Applied, SinkError> {
        // A batch goes forward; the script does not compare numbers.
        batch.verdict(batch.from())?;
        let windows = self.keys.windows(batch, self.retention)?;
        let mut connection = self.connection()?;
        let verdict: Vec<Vec<u8>> =
            self.invocation(batch, &windows).invoke(&mut connection).map_err(failed_apply)?;
        self.connection = Some(connection);
        let verdict: Vec<String> = verdict.iter().map(|word| lossy(word)).collect();
        understood(&self.keys.position(batch.engine()), batch, &windows, &verdict)
    }
}

/// A number as text, empty for none.
fn text(number: Option<impl ToString>) -> String {
    number.map(|number| number.to_string()).unwrap_or_default()
}

/// A key may hold anything.
fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Without the URL, which may hold a password.
impl fmt::Debug for RedisSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisSink")
            .field("address", &self.client.get_connection_info().addr())
            .field("keys", &self.keys)
            .field("is_connected", &self.connection.is_some())
            .finish_non_exhaustive()
    }
}

/// What the script said.
fn understood(
    position_key: &str,
    batch: &UsageBatch,
    windows: &[WindowRows],
    verdict: &[String],
) -> Result<Applied, SinkError> {
    let verdict: Vec<&str> = verdict.iter().map(String::as_str).collect();
    match *verdict.as_slice() {
        ["now"] => return Ok(Applied::Now),
        ["now", sums, usage, user] => {
            tracing::warn!(
                sums,
                usage,
                user,
                "sums beyond 64 bits are stored as the last number, the first of them here"
            );
            return Ok(Applied::Now);
        }
        ["before"] => return Ok(Applied::Before),
        ["disagrees", stored, check] => {
            let stored = stored_position(position_key, stored, check)?;
            batch.verdict(stored)?;
        }
        ["type", key, kind] => {
            let reason = format!("key {key:?} holds a {kind}, not a hash");
            return Err(foreign(reason));
        }
        ["value", usage, user, used] => {
            let reason = format!("user {user} has {used:?} in {usage:?}, which is not a count");
            return Err(foreign(reason));
        }
        ["meaning", usage] => {
            let window = windows.iter().find(|window| window.usage_key == usage);
            let quota = window.map_or(usage, |window| &window.quota);
            return Err(SinkError::other_meaning(KIND, quota));
        }
        _ => {}
    }
    let answer = format!("the script answered {verdict:?}");
    Err(SinkError::unavailable(KIND, APPLY, answer))
}

fn stored_position(key: &str, batch: &str, check: &str) -> Result<Option<Position>, SinkError> {
    match (batch.parse(), check.parse()) {
        (Ok(batch), Ok(check)) => Ok(Some(Position { batch, check })),
        _ if batch.is_empty() && check.is_empty() => Ok(None),
        _ => {
            let reason = format!("batch {batch:?} with check {check:?} in {key:?} is no position");
            Err(foreign(reason))
        }
    }
}

/// For a key that somebody else wrote.
fn foreign(reason: String) -> SinkError {
    let remedy = "correct it, or give the sink a prefix of its own".to_owned();
    SinkError::Schema { sink: KIND, reason, remedy, source: None }
}

/// An error without effect: one of reading, or one that the server answered with.
fn failed(action: &'static str) -> impl FnOnce(RedisError) -> SinkError {
    move |error| match error.code() {
        Some("NOPERM") => SinkError::Schema {
            sink: KIND,
            reason: "the sink's user lacks a permission".to_owned(),
            remedy: "grant it what docs/sinks.md lists".to_owned(),
            source: Some(Box::new(error)),
        },
        Some("WRONGTYPE") => foreign(error.to_string()),
        _ => SinkError::unavailable(KIND, action, error),
    }
}

/// An error of the script: if the server answered with it, no usage was written; without an answer,
/// nobody knows.
fn failed_apply(error: RedisError) -> SinkError {
    if error.code().is_some() {
        return failed(APPLY)(error);
    }
    SinkError::OutcomeUnknown { sink: KIND, source: Box::new(error) }
}
