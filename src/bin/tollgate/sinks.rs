//! The sinks that the server delivers to, from the command line.

use std::path::PathBuf;
#[cfg(feature = "redis")]
use std::time::Duration;

use clap::Args;
#[cfg(feature = "redis")]
use clap::builder::NonEmptyStringValueParser;
use tollgate::Builder;
use tollgate::sink::JsonLinesSink;
#[cfg(feature = "postgres")]
use tollgate::sink::PostgresSink;
#[cfg(feature = "redis")]
use tollgate::sink::RedisSink;

use crate::Failure;
#[cfg(feature = "postgres")]
use crate::output::complain;
use crate::units;

/// Where usage goes. Each kind once; the data directory remembers under its name where it is.
#[derive(Debug, Args)]
pub(crate) struct SinkOptions {
    /// Deliver usage to files of JSON lines in this directory, created where it is missing.
    #[arg(long, value_name = "DIR", help_heading = "Sinks")]
    json_lines: Option<PathBuf>,

    /// Begin a new file once the newest is this long, such as 256MiB [default: 64MiB]
    #[arg(long, value_name = "SIZE", requires = "json_lines", help_heading = "Sinks")]
    #[arg(value_parser = units::size)]
    json_lines_file_size: Option<u64>,

    /// Deliver the recorded events too, to files of JSON lines and to PostgreSQL.
    #[arg(long, help_heading = "Sinks")]
    sink_events: bool,

    /// Deliver usage to PostgreSQL: `host=.. user=.. dbname=..` or `postgresql://..`; @FILE reads
    /// that from a file, which keeps a password out of the list of processes.
    #[cfg(feature = "postgres")]
    #[arg(long, value_name = "PARAMETERS", help_heading = "Sinks")]
    postgres: Option<String>,

    /// The schema of its tables.
    #[cfg(feature = "postgres")]
    #[arg(long, value_name = "NAME", requires = "postgres", help_heading = "Sinks")]
    postgres_schema: Option<String>,

    /// Create its tables before the start, or check that they are there. A database that can't be
    /// reached does not stop the start: what is counted is kept until it takes it.
    #[cfg(feature = "postgres")]
    #[arg(long, requires = "postgres", help_heading = "Sinks")]
    postgres_migrate: bool,

    /// Encrypt the connection, and trust the authorities in this PEM file only.
    #[cfg(feature = "postgres-tls")]
    #[arg(long, value_name = "FILE", requires = "postgres", help_heading = "Sinks")]
    postgres_ca: Option<PathBuf>,

    /// Deliver usage to Redis or Valkey: `redis://..` or `redis+unix://..`; @FILE reads that from a
    /// file.
    #[cfg(feature = "redis")]
    #[arg(long, value_name = "URL", help_heading = "Sinks")]
    redis: Option<String>,

    /// What its keys begin with, in braces [default: tollgate]
    #[cfg(feature = "redis")]
    #[arg(long, value_name = "NAME", requires = "redis", help_heading = "Sinks")]
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    redis_prefix: Option<String>,

    /// How long the usage of a window is kept there after its end, such as 90d [default: forever]
    #[cfg(feature = "redis")]
    #[arg(long, value_name = "DURATION", requires = "redis", help_heading = "Sinks")]
    #[arg(value_parser = units::duration)]
    redis_retention: Option<Duration>,
}

impl SinkOptions {
    /// Attaches what is asked for.
    pub(crate) fn attach(&self, mut builder: Builder) -> Result<Builder, Failure> {
        if self.sink_events && !self.takes_events() {
            let or = if cfg!(feature = "postgres") { " or --postgres" } else { "" };
            return Err(format!("--sink-events needs --json-lines{or}"));
        }
        if let Some(dir) = &self.json_lines {
            let sink = JsonLinesSink::open(dir)
                .map_err(|error| format!("--json-lines {}: {error}", dir.display()))?;
            let sink = if self.sink_events { sink.with_events() } else { sink };
            let sink = match self.json_lines_file_size {
                Some(bytes) => sink.file_bytes_max(bytes),
                None => sink,
            };
            builder = builder.sink("json-lines", sink);
        }
        #[cfg(feature = "postgres")]
        if let Some(parameters) = &self.postgres {
            builder = builder.sink("postgres", self.postgres_sink(parameters)?);
        }
        #[cfg(feature = "redis")]
        if let Some(url) = &self.redis {
            builder = builder.sink("redis", self.redis_sink(url)?);
        }
        Ok(builder)
    }

    /// Whether any of the sinks does.
    fn takes_events(&self) -> bool {
        #[cfg(feature = "postgres")]
        if self.postgres.is_some() {
            return true;
        }
        self.json_lines.is_some()
    }

    #[cfg(feature = "postgres")]
    fn postgres_sink(&self, parameters: &str) -> Result<PostgresSink, Failure> {
        let failed = |error| format!("--postgres: {error}");
        let mut sink = PostgresSink::new(&given(parameters)?).map_err(failed)?;
        if self.sink_events {
            sink = sink.with_events();
        }
        if let Some(schema) = &self.postgres_schema {
            sink = sink.schema(schema);
        }
        #[cfg(feature = "postgres-tls")]
        if let Some(file) = &self.postgres_ca {
            let authorities = std::fs::read(file)
                .map_err(|error| format!("can't read {}: {error}", file.display()))?;
            sink = sink.tls(&authorities).map_err(failed)?;
        }
        if self.postgres_migrate {
            match sink.migrate() {
                // Deliveries say what is missing, if anything still is.
                Err(error) if error.is_retryable() => complain(format_args!(
                    "--postgres-migrate: {error}; going on without: what is counted is kept until \
                     the database takes it"
                )),
                migrated => migrated.map_err(failed)?,
            }
        }
        Ok(sink)
    }

    #[cfg(feature = "redis")]
    fn redis_sink(&self, url: &str) -> Result<RedisSink, Failure> {
        let failed = |error| format!("--redis: {error}");
        let mut sink = RedisSink::new(&given(url)?).map_err(failed)?;
        if let Some(prefix) = &self.redis_prefix {
            sink = sink.prefix(prefix);
        }
        if let Some(retention) = self.redis_retention {
            sink = sink.retention(retention);
        }
        Ok(sink)
    }
}

/// What an option says, or the file that it names.
#[cfg(any(feature = "postgres", feature = "redis"))]
fn given(text: &str) -> Result<String, Failure> {
    match text.strip_prefix('@') {
        Some(file) => std::fs::read_to_string(file)
            .map(|text| text.trim().to_owned())
            .map_err(|error| format!("can't read {file}: {error}")),
        None => Ok(text.to_owned()),
    }
}
