//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand};
use tollgate::Quota;
use tracing_subscriber::filter::LevelFilter;

use crate::definition::{self, FLAG_FORM};
use crate::sinks::SinkOptions;

/// An exact, crash-safe quota engine.
#[derive(Debug, Parser)]
#[command(version, about)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve quotas over HTTP/JSON.
    Serve(Box<ServeOptions>),
    /// Print the values that a configuration file comes to, or what is wrong with it.
    ///
    /// Status 0: `serve --config` would take it; what is printed says the same in TOML, with all
    /// options. 1: it would not, and it is said why.
    CheckConfig(CheckConfigOptions),
    /// Print what a data directory holds, without changing it.
    ///
    /// Best when no server has it open: files that change meanwhile may seem damaged.
    Inspect(InspectOptions),
    /// Remove what a data directory keeps for a sink that will not be attached again.
    ForgetSink(ForgetSinkOptions),
    /// Read everything in a data directory and say what an open would do, without changing it.
    ///
    /// Status 0: it would find the exact state, and nothing is damaged. 3: it would find the exact
    /// state, but what it would fall back on is damaged. 4: it would open and report what it left
    /// out or made up for. 5: it would refuse. 1: the directory is in use, or can't be read.
    Verify(VerifyOptions),
    /// Make a new data directory from all that verifies in a damaged one, which is not changed.
    ///
    /// Status 0: nothing is lost. 4: something is lost, or may be; it is said what. 1: no directory
    /// was made.
    Salvage(SalvageOptions),
}

/// How to serve.
#[derive(Debug, Args)]
pub(crate) struct ServeOptions {
    /// The data directory; created where it is missing.
    #[arg(long, default_value = "data")]
    pub(crate) dir: PathBuf,

    /// Don't create anything: refuse to start where --dir is missing or holds no engine, as when
    /// its file system is not mounted.
    #[arg(long)]
    pub(crate) no_create: bool,

    /// Wait this many seconds for another process to close --dir, in a restart where the next
    /// process starts before the last has ended. A directory of --json-lines is not waited for.
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub(crate) wait_for_lock: u32,

    /// An IP address and port: 127.0.0.1:8080, [::1]:8080. Anything but loopback needs
    /// --token-file, or --insecure.
    #[arg(long, default_value = "127.0.0.1:8080")]
    pub(crate) listen: SocketAddr,

    /// The engine's configuration, TOML or YAML by its ending.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,

    /// Requests must carry the token in this file: `Authorization: Bearer TOKEN`.
    #[arg(long, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,

    /// Serve beyond loopback without a token, under any host name, and to web pages too.
    #[arg(long)]
    pub(crate) insecure: bool,

    /// Connections at a time; further ones wait to be accepted.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub(crate) connections_max: u32,

    /// Define this quota, as `requests=1000/day`, unless the directory has one of this name, which
    /// stays as it is. May be given several times.
    ///
    /// LIMIT is for each user. WINDOW is lifetime, minute, hour, day, month or year. POST
    /// /v1/quotas defines other quotas, and changes limits.
    #[arg(long = "quota", value_name = FLAG_FORM, value_parser = definition::parse)]
    pub(crate) quotas: Vec<Quota>,

    /// How much is logged, on stderr.
    #[arg(long, value_name = "LEVEL", default_value = "warn", value_parser = log_levels())]
    pub(crate) log_level: LevelFilter,

    #[command(flatten)]
    pub(crate) sinks: SinkOptions,
}

fn log_levels() -> impl TypedValueParser<Value = LevelFilter> {
    let names = ["off", "error", "warn", "info", "debug", "trace"];
    PossibleValuesParser::new(names).try_map(|name| name.parse::<LevelFilter>())
}

/// What to check.
#[derive(Debug, Args)]
pub(crate) struct CheckConfigOptions {
    /// The configuration, TOML or YAML by its ending.
    pub(crate) file: PathBuf,
}

/// What to look at.
#[derive(Debug, Args)]
pub(crate) struct InspectOptions {
    /// The data directory.
    pub(crate) dir: PathBuf,

    /// Print JSON instead of text.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What to forget.
#[derive(Debug, Args)]
pub(crate) struct ForgetSinkOptions {
    /// The data directory.
    pub(crate) dir: PathBuf,

    /// The sink, by the name under which it was attached. The server calls its sinks `postgres`,
    /// `redis` and `json-lines`.
    pub(crate) name: String,
}

/// What to verify.
#[derive(Debug, Args)]
pub(crate) struct VerifyOptions {
    /// The data directory.
    pub(crate) dir: PathBuf,

    /// Print JSON instead of text.
    #[arg(long)]
    pub(crate) json: bool,
}

/// What to salvage.
#[derive(Debug, Args)]
pub(crate) struct SalvageOptions {
    /// The damaged data directory.
    pub(crate) dir: PathBuf,

    /// The new data directory: missing, or empty.
    #[arg(long, value_name = "NEW")]
    pub(crate) to: PathBuf,

    /// Print JSON instead of text.
    #[arg(long)]
    pub(crate) json: bool,
}
