//! The four designs: what a request does, and how usage gets to the database. And a map, to show
//! what the machine itself costs.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};
use dashmap::DashMap;
use postgres::{Client, NoTls, Statement};
use tollgate::sink::PostgresSink;
use tollgate::{Quota, QuotaId, Tollgate, Window};

use crate::common::AnyError;
use crate::common::peers;

/// Never reached.
const LIMIT: u64 = 1_000_000_000;
const DELIVERY_PATIENCE: Duration = Duration::from_secs(60);

/// Which design.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// The check is a query, each consume a transaction.
    Transaction,
    /// Counters in memory; workers behind a channel write to the database.
    Channel,
    /// tollgate, with the database as its sink.
    Sink,
    /// The same, each consume durable before it returns.
    SinkSync,
    /// No design: a map that keeps nothing.
    BareMap,
}

/// A design at work.
pub(crate) trait Design: Send {
    /// Makes users below a number known, each with one unit used, in memory and in the database.
    fn populate(&mut self, users: u32) -> Result<(), AnyError>;

    /// Checks, and counts what is admitted.
    fn request(&mut self, user: u32) -> bool;

    /// Returns when the database has everything.
    fn finish(self: Box<Self>) -> Result<(), AnyError>;
}

impl Kind {
    pub(crate) const DESIGNS: [Self; 4] =
        [Self::Transaction, Self::Channel, Self::Sink, Self::SinkSync];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Transaction => "transaction",
            Self::Channel => "channel",
            Self::Sink => "tollgate",
            Self::SinkSync => "tollgate, consume_sync",
            Self::BareMap => "bare map",
        }
    }

    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Self::DESIGNS.into_iter().find(|kind| kind.name() == name)
    }

    pub(crate) fn is_tollgate(self) -> bool {
        matches!(self, Self::Sink | Self::SinkSync)
    }

    /// Whether a request never waits for the disk or another process.
    pub(crate) fn is_in_memory(self) -> bool {
        matches!(self, Self::Sink | Self::BareMap)
    }
}

/// Begins. tollgate's directory may be one that was used before.
pub(crate) fn open(
    kind: Kind,
    parameters: &str,
    schema: &str,
    dir: &Path,
) -> Result<Box<dyn Design>, AnyError> {
    Ok(match kind {
        Kind::Transaction => Box::new(Transaction::open(parameters, schema)?),
        Kind::Channel => Box::new(Channel::open(parameters, schema)?),
        Kind::Sink | Kind::SinkSync => {
            let is_sync = kind == Kind::SinkSync;
            Box::new(Embedded::open(parameters, schema, dir, is_sync)?)
        }
        Kind::BareMap => Box::new(BareMap::default()),
    })
}

/// Everything in the database, over one connection.
struct Transaction {
    client: Client,
    schema: String,
    check: Statement,
    consume: Statement,
}

impl Transaction {
    fn open(parameters: &str, schema: &str) -> Result<Self, AnyError> {
        let mut client = Client::connect(parameters, NoTls)?;
        let check =
            client.prepare(&format!("SELECT used FROM {schema}.quota_usage WHERE user_id = $1"))?;
        let consume = client.prepare(&format!(
            "INSERT INTO {schema}.quota_usage AS usage VALUES ($1, 1) \
             ON CONFLICT (user_id) DO UPDATE SET used = usage.used + 1"
        ))?;
        Ok(Self { client, schema: schema.to_owned(), check, consume })
    }
}

/// Gives users below a number one unit each.
fn insert_users(client: &mut Client, schema: &str, users: u32) -> Result<(), AnyError> {
    client.batch_execute(&format!(
        "INSERT INTO {schema}.quota_usage SELECT user_id, 1 FROM generate_series(0, {users} - 1) \
         AS user_id; \
         ANALYZE {schema}.quota_usage"
    ))?;
    Ok(())
}

impl Design for Transaction {
    fn populate(&mut self, users: u32) -> Result<(), AnyError> {
        insert_users(&mut self.client, &self.schema, users)
    }

    fn request(&mut self, user: u32) -> bool {
        let user = i64::from(user);
        let row = self.client.query_opt(&self.check, &[&user]).expect("the database answers");
        let used: i64 = row.map_or(0, |row| row.get(0));
        if used as u64 >= LIMIT {
            return false;
        }
        // A statement is a transaction.
        self.client.execute(&self.consume, &[&user]).expect("the database answers");
        true
    }

    fn finish(self: Box<Self>) -> Result<(), AnyError> {
        Ok(())
    }
}

/// Counters in memory, and a queue to workers that write ten at a time, or what there is after five
/// seconds.
struct Channel {
    /// To populate.
    client: Client,
    schema: String,
    usage: DashMap<u32, AtomicU64>,
    sender: Sender<u32>,
    workers: Vec<JoinHandle<()>>,
}

impl Channel {
    const WORKERS: usize = 3;
    const BATCH: usize = 10;
    const INTERVAL: Duration = Duration::from_secs(5);
    const QUEUE: usize = 10_000;

    fn open(parameters: &str, schema: &str) -> Result<Self, AnyError> {
        let (sender, receiver) = bounded(Self::QUEUE);
        let mut workers = Vec::new();
        for _ in 0..Self::WORKERS {
            let mut client = Client::connect(parameters, NoTls)?;
            let write = client.prepare(&format!(
                "INSERT INTO {schema}.quota_usage AS usage \
                 SELECT user_id, count(*) FROM unnest($1::bigint[]) AS user_id \
                 GROUP BY user_id ORDER BY user_id \
                 ON CONFLICT (user_id) DO UPDATE SET used = usage.used + excluded.used"
            ))?;
            let receiver = receiver.clone();
            workers.push(thread::spawn(move || {
                Self::work(&receiver, |users| {
                    client.execute(&write, &[&users]).expect("the database answers");
                });
            }));
        }
        let (client, schema) = (Client::connect(parameters, NoTls)?, schema.to_owned());
        Ok(Self { client, schema, usage: DashMap::new(), sender, workers })
    }

    fn work(receiver: &Receiver<u32>, mut write: impl FnMut(&[i64])) {
        let mut users = Vec::new();
        let mut is_open = true;
        while is_open {
            let deadline = Instant::now() + Self::INTERVAL;
            while users.len() < Self::BATCH {
                match receiver.recv_deadline(deadline) {
                    Ok(user) => users.push(user.into()),
                    Err(RecvTimeoutError::Timeout) => break,
                    Err(RecvTimeoutError::Disconnected) => {
                        is_open = false;
                        break;
                    }
                }
            }
            if !users.is_empty() {
                write(&users);
                users.clear();
            }
        }
    }
}

impl Design for Channel {
    fn populate(&mut self, users: u32) -> Result<(), AnyError> {
        for user in 0..users {
            self.usage.insert(user, AtomicU64::new(1));
        }
        insert_users(&mut self.client, &self.schema, users)
    }

    fn request(&mut self, user: u32) -> bool {
        // Relaxed, here and below: counts, nothing depends on them.
        let used = self.usage.get(&user).map_or(0, |used| used.load(Ordering::Relaxed));
        if used >= LIMIT {
            return false;
        }
        self.usage.entry(user).or_default().fetch_add(1, Ordering::Relaxed);
        self.sender.send(user).expect("the workers live");
        true
    }

    fn finish(self: Box<Self>) -> Result<(), AnyError> {
        drop(self.sender);
        for worker in self.workers {
            worker.join().expect("the worker does not panic");
        }
        Ok(())
    }
}

/// tollgate, as it is configured by default.
struct Embedded {
    gate: Tollgate,
    quota: QuotaId,
    is_sync: bool,
}

impl Embedded {
    fn open(parameters: &str, schema: &str, dir: &Path, is_sync: bool) -> Result<Self, AnyError> {
        let sink = PostgresSink::new(parameters)?.schema(schema);
        let builder = Tollgate::builder(dir).sink("database", sink);
        let gate = builder.open()?;
        let quota = gate.define(Quota::new("requests", LIMIT).window(Window::Month))?;
        Ok(Self { gate, quota, is_sync })
    }
}

impl Design for Embedded {
    fn populate(&mut self, users: u32) -> Result<(), AnyError> {
        for user in 0..users {
            self.gate.consume(user.into(), self.quota, 1)?;
        }
        self.gate.deliver(DELIVERY_PATIENCE)?;
        Ok(())
    }

    fn request(&mut self, user: u32) -> bool {
        let user = user.into();
        let check = self.gate.check(user, self.quota, 1).expect("the quota is defined");
        if !check.is_allowed() {
            return false;
        }
        let usage = if self.is_sync {
            self.gate.consume_sync(user, self.quota, 1)
        } else {
            self.gate.consume(user, self.quota, 1)
        };
        usage.expect("the disk works and the log has room");
        true
    }

    fn finish(self: Box<Self>) -> Result<(), AnyError> {
        self.gate.deliver(DELIVERY_PATIENCE)?;
        self.gate.close()?;
        Ok(())
    }
}

/// The same look-ups and additions, in a map alone.
#[derive(Default)]
struct BareMap(peers::BareMap);

impl Design for BareMap {
    fn populate(&mut self, users: u32) -> Result<(), AnyError> {
        self.0 = peers::BareMap::populated(users);
        Ok(())
    }

    fn request(&mut self, user: u32) -> bool {
        let is_admitted = self.0.load(user) < LIMIT;
        if is_admitted {
            self.0.add(user);
        }
        is_admitted
    }

    fn finish(self: Box<Self>) -> Result<(), AnyError> {
        Ok(())
    }
}
