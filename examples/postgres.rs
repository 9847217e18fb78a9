//! Usage in a database, exactly once: counts, delivers, and prints what a bill is made from.
//!
//! `cargo run --release --features postgres --example postgres -- "host=localhost user=me dbname=me"`
//! writes to PostgreSQL; without parameters, or without the feature, to files of JSON lines.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "an example talks")]

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use tollgate::sink::{JsonLinesSink, UsageSink};
use tollgate::{Config, Quota, Tollgate, Window};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("postgres: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let dir = std::env::temp_dir().join("tollgate-example-postgres");
    let parameters = std::env::args().nth(1);
    let gate = Tollgate::builder(dir.join("data"))
        .config(Config::default().delivery(|it| it.flush_interval(Duration::from_secs(1))))
        .sink("billing", sink(parameters.as_deref(), &dir)?)
        .open()?;

    let tokens = gate.define(Quota::new("tokens", 1_000_000).window(Window::Month))?;
    for request in 0..100_000 {
        let decision = gate.try_consume(request % 10, tokens, 1 + request % 7)?;
        if !decision.is_allowed() {
            break; // a limit is a limit, also in an example that is run again and again
        }
    }
    // The engine does this by itself, every second; here we want to see it.
    gate.deliver(Duration::from_secs(30))?;

    println!("user 3 has used {} tokens this month", gate.usage(3, tokens)?.used);
    for sink in gate.sinks() {
        println!("{}: {} rows in {} deliveries", sink.name, sink.rows, sink.deliveries);
        if let Some(position) = sink.position {
            println!("{}: is at {position}, {} batches behind", sink.name, sink.lag_batches);
        }
    }
    println!("run it again: it goes on, and nothing is delivered twice");
    gate.close()?;
    Ok(())
}

/// PostgreSQL where there are parameters, files otherwise.
fn sink(parameters: Option<&str>, dir: &Path) -> Result<Box<dyn UsageSink>, Box<dyn Error>> {
    #[cfg(feature = "postgres")]
    if let Some(parameters) = parameters {
        let mut database = tollgate::sink::PostgresSink::new(parameters)?;
        database.migrate()?; // once, when you deploy: creates the tables, or checks them
        return Ok(Box::new(database));
    }
    if parameters.is_some() {
        return Err("PostgreSQL needs --features postgres".into());
    }
    let lines = dir.join("lines");
    std::fs::create_dir_all(&lines)?;
    println!("writing JSON lines to {}", lines.display());
    Ok(Box::new(JsonLinesSink::open(lines)?))
}
