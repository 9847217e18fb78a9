//! The database of the benchmark: started for it, durable as PostgreSQL is by default.

use std::collections::BTreeMap;
use std::thread;
use std::time::Duration;

use postgres::Client;
use tollgate::sink::PostgresSink;

use crate::cluster;
use crate::common::AnyError;
use crate::designs::Kind;
use crate::servers::Server;

pub(crate) struct Database {
    pub(crate) server: Server,
    schemas: u32,
}

impl Database {
    /// `None`, with a line that says so, where PostgreSQL is not installed.
    pub(crate) fn start() -> Option<Self> {
        let server = cluster::start("-c listen_addresses=", |_| {})?;
        Some(Self { server, schemas: 0 })
    }

    pub(crate) fn parameters(&self) -> String {
        cluster::parameters(self.server.dir())
    }

    fn client(&self) -> Client {
        cluster::connect(self.server.dir()).expect("the server runs")
    }

    /// Makes the tables of a design, empty, in a schema of their own.
    pub(crate) fn make_schema(&mut self, kind: Kind) -> Result<String, AnyError> {
        self.schemas += 1;
        let schema = format!("run_{}", self.schemas);
        if kind.is_tollgate() {
            PostgresSink::new(&self.parameters())?.schema(&schema).migrate()?;
        } else {
            self.client().batch_execute(&format!(
                "CREATE SCHEMA {schema};
                 CREATE TABLE {schema}.quota_usage (user_id bigint PRIMARY KEY, used bigint NOT NULL)"
            ))?;
        }
        Ok(schema)
    }

    /// What all users together have used.
    pub(crate) fn used(&self, schema: &str) -> Result<u64, AnyError> {
        let sum = format!("SELECT coalesce(sum(used), 0)::text FROM {schema}.quota_usage");
        Ok(self.client().query_one(&sum, &[])?.get::<_, String>(0).parse()?)
    }

    /// What each user has used.
    pub(crate) fn used_by_user(&self, schema: &str) -> Result<BTreeMap<u64, u64>, AnyError> {
        let rows = format!("SELECT user_id::text, used::text FROM {schema}.quota_usage");
        let mut used = BTreeMap::new();
        for row in self.client().query(&rows, &[])? {
            let [user, amount] = [0, 1].map(|column| row.get::<_, String>(column));
            *used.entry(user.parse()?).or_default() += amount.parse::<u64>()?;
        }
        Ok(used)
    }

    /// Waits until no connection is left: what a killed process has sent may still be at work.
    pub(crate) fn wait_until_idle(&self) -> Result<(), AnyError> {
        let mut client = self.client();
        let others = "SELECT count(*) FROM pg_stat_activity \
                      WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";
        while client.query_one(others, &[])?.get::<_, i64>(0) > 0 {
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}
