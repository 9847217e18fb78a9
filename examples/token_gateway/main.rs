//! A gateway that keeps token budgets exactly, in front of OpenAI-style chat completions:
//! `cargo run --release --example token_gateway`.
//!
//! What a completion costs is known when it is over, so checking the budget before and counting
//! after lets through too much: requests under way are counted by nobody. Here each request
//! reserves, of its API key's budget and of its organisation's in one step, what it may take at
//! most (the prompt's estimate and `max_tokens`), is forwarded, and is charged what it took: as
//! the upstream says, or what was streamed until someone broke off. It prints `curl` lines to try.
//!
//! - `accounts`: keys, organisations, budgets
//! - `bill`: what is owed, until the log has room for it
//! - `estimate`: tokens that nobody has counted
//! - `metering`: one request's reservation, from its beginning to its end
//! - `gateway`: the routes, and the stream's way through
//! - `sse`: events out of chunks
//! - `upstream`: something to forward to
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "an example talks")]

mod accounts;
mod bill;
mod estimate;
mod gateway;
mod metering;
mod sse;
mod upstream;

use std::error::Error;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use axum::http::{HeaderValue, Uri};
use axum::serve::ListenerExt as _;
use clap::Parser;
use hyper_rustls::HttpsConnectorBuilder;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tollgate::{Config, Tollgate};

use crate::accounts::Accounts;
use crate::estimate::{BOUNDS, bound_name};
use crate::gateway::Gateway;

/// The threads that serve wait no longer than this for room in the log.
const LOG_WAIT_MAX: Duration = Duration::from_millis(5);
/// Requests under way have this long to finish once the gateway was told to stop.
const STOP_TIME_MAX: Duration = Duration::from_secs(10);

/// Keeps token budgets in front of OpenAI-style chat completions.
#[derive(Debug, Parser)]
struct Options {
    /// Where to listen.
    #[arg(long, default_value = "127.0.0.1:8090")]
    listen: SocketAddr,

    /// The data directory; created where it is missing.
    #[arg(long, default_value = "example-data/token_gateway")]
    dir: PathBuf,

    /// What to forward to, without the path: `https://api.openai.com`. The environment variable
    /// UPSTREAM_API_KEY holds the key to it. Without this option, a small one of its own.
    #[arg(long, value_name = "URL")]
    upstream: Option<String>,

    /// Keys, organisations and budgets; examples/token_gateway/accounts.toml shows the form, and is
    /// what is used without this option.
    #[arg(long, value_name = "FILE")]
    accounts: Option<PathBuf>,

    /// The field under which the upstream is told the bound of an answer, where a request sets
    /// none. By default max_completion_tokens for api.openai.com, and max_tokens for others.
    #[arg(long, value_name = "NAME", value_parser = BOUNDS)]
    bound_field: Option<String>,

    /// For how long what is reserved stays so when this process dies, in milliseconds. Long streams
    /// extend it as they go.
    #[arg(long, default_value_t = 60_000, value_parser = clap::value_parser!(u64).range(100..=604_800_000))]
    ttl_ms: u64,

    /// How long either side may stand still, in milliseconds. For tests.
    #[arg(long, hide = true, default_value_t = 120_000, value_parser = clap::value_parser!(u64).range(1..))]
    silence_ms: u64,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("token_gateway: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<(), Box<dyn Error>> {
    let config = Config::default().backpressure_deadline(LOG_WAIT_MAX);
    let gate = Tollgate::open(&options.dir, config)?;
    let accounts = accounts(options, &gate)?;
    let (told, stop) = watch::channel(false);
    ctrlc::set_handler(move || {
        // There is always a receiver until the process ends.
        let _ = told.send(true);
    })?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let served = runtime.block_on(serve(options, gate.clone(), accounts, stop));
    // Streams that still run are dropped with it, and charged.
    runtime.shutdown_timeout(Duration::from_secs(1));
    gate.close()?;
    served
}

fn accounts(options: &Options, gate: &Tollgate) -> Result<Accounts, Box<dyn Error>> {
    let Some(file) = &options.accounts else { return Accounts::install(accounts::DEMO, gate) };
    let accounts = std::fs::read_to_string(file)
        .map_err(Into::into)
        .and_then(|text| Accounts::install(&text, gate));
    accounts.map_err(|error| format!("accounts {}, {error}", file.display()).into())
}

async fn serve(
    options: &Options,
    gate: Tollgate,
    accounts: Accounts,
    stop: watch::Receiver<bool>,
) -> Result<(), Box<dyn Error>> {
    let base = match &options.upstream {
        Some(url) => url.trim_end_matches('/').to_owned(),
        None => {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
            let url = format!("http://{}", listener.local_addr()?);
            tokio::spawn(axum::serve(listener, upstream::router()).into_future());
            url
        }
    };
    let upstream: Uri = format!("{base}/v1/chat/completions")
        .parse()
        .map_err(|error| format!("--upstream {base}: {error}"))?;
    let upstream_authorization = match std::env::var("UPSTREAM_API_KEY") {
        Ok(key) => {
            let value = HeaderValue::try_from(format!("Bearer {key}"));
            Some(value.map_err(|_| "UPSTREAM_API_KEY has characters that no key has")?)
        }
        Err(_) => None,
    };
    let connector =
        HttpsConnectorBuilder::new().with_webpki_roots().https_or_http().enable_http1().build();
    let client = Client::builder(TokioExecutor::new()).build(connector);
    let ttl = Duration::from_millis(options.ttl_ms);
    let bound_name =
        options.bound_field.as_deref().unwrap_or(bound_name(upstream.host())).to_owned();
    let gateway = Gateway {
        gate,
        accounts,
        client,
        upstream,
        upstream_authorization,
        bound_name,
        ttl,
        silence_max: Duration::from_millis(options.silence_ms),
    };

    // Events are small: they should not wait to be filled up.
    let listener = TcpListener::bind(options.listen)
        .await
        .map_err(|error| format!("can't listen on {}: {error}", options.listen))?;
    print_invitation(options, &base, &listener.local_addr()?.to_string());
    let listener = listener.tap_io(|stream| {
        let _ = stream.set_nodelay(true);
    });
    let [mut graceful, mut forced] = [stop.clone(), stop];
    let served = axum::serve(listener, gateway::router(Arc::new(gateway))).with_graceful_shutdown(
        async move {
            let _ = graceful.wait_for(|&told| told).await;
        },
    );
    tokio::select! {
        served = served.into_future() => served?,
        () = async {
            let _ = forced.wait_for(|&told| told).await;
            tokio::time::sleep(STOP_TIME_MAX).await;
        } => {}
    }
    Ok(())
}

fn print_invitation(options: &Options, upstream: &str, address: &str) {
    println!("forwarding to {upstream}");
    println!("listening on http://{address}");
    if options.accounts.is_none() && options.upstream.is_none() {
        let curl = |flags: &str, body: &str| {
            println!(
                "  curl {flags} -H 'Authorization: Bearer sk-demo-alice' -H 'Content-Type: \
                 application/json' -d '{body}' http://{address}/v1/chat/completions"
            );
        };
        let messages = r#""messages":[{"role":"user","content":"say something"}]"#;
        println!("try an answer, a stream, one that there is no budget for, and what was used:");
        curl("-s", &format!(r#"{{{messages},"max_tokens":24}}"#));
        curl("-sN", &format!(r#"{{{messages},"max_tokens":24,"stream":true}}"#));
        curl("-si", &format!(r#"{{{messages},"max_tokens":3980}}"#));
        println!("  curl -s -H 'Authorization: Bearer sk-demo-alice' http://{address}/v1/usage");
    }
    println!("stop with Ctrl-C");
}
