//! Counts and caps, closes, opens again: `cargo run --release --example quickstart`.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "an example talks")]

use std::error::Error;
use std::process::ExitCode;

use tollgate::{Config, Quota, Tollgate, Window};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("quickstart: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let dir = tempfile::tempdir()?;

    // Creates the directory, or locks and recovers it.
    let gate = Tollgate::open(dir.path(), Config::default())?;
    let requests = gate.define(Quota::new("requests", 3).window(Window::Day))?;

    // Checked and counted in one atomic step, from memory.
    for attempt in 1..=4 {
        let decision = gate.try_consume(42, requests, 1)?;
        if decision.is_allowed() {
            println!("request {attempt}: allowed, {} left", decision.remaining);
        } else if let Some(wait) = decision.retry_after() {
            println!("request {attempt}: denied, come back in {wait:?}");
        } else {
            println!("request {attempt}: denied, and waiting does not help");
        }
    }

    // Some users get more, and an amount can be refunded.
    gate.set_limit(42, requests, 10)?;
    println!("refunded: {}", gate.refund(42, requests, 2)?);

    // A handle skips the look-up; `_sync` survives loss of power before it returns.
    let counter = gate.counter(42, requests)?;
    println!("after a durable consume: {:?}", counter.consume_sync(5)?);

    println!("health: {}", gate.health().level());
    gate.close()?;

    // What was acknowledged is there again; so it would be after a SIGKILL instead of the close.
    let gate = Tollgate::open(dir.path(), Config::default())?;
    let report = gate.recovery_report();
    println!("recovered {} counters: {:?}", report.counters, gate.usage(42, requests)?);
    Ok(())
}
