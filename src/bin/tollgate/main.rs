//! The `tollgate` command: the engine behind HTTP, and what an operator does to a data directory.

mod cli;
mod definition;
mod descriptors;
mod http;
mod inspect;
mod output;
mod patience;
mod salvage;
mod serve;
mod sinks;
mod units;
mod verify;

use std::process::ExitCode;

use clap::Parser as _;
use nix::sys::signal::{SigSet, Signal};
use tollgate::Config;

use crate::cli::{CheckConfigOptions, Cli, Command, ForgetSinkOptions};

/// What went wrong, in one line for the operator.
type Failure = String;

fn main() -> ExitCode {
    // A file beyond its bound (`ulimit -f`) is an error, which names it, and not the end of the
    // process. Before there are threads: they take this over. Nothing else needs to be done where
    // it fails.
    let _ = SigSet::from(Signal::SIGXFSZ).thread_block();
    // Bad flags end here, with a message and status 2.
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Serve(options) => serve::run(&options).map(|()| ExitCode::SUCCESS),
        Command::CheckConfig(options) => check_config(&options).map(|()| ExitCode::SUCCESS),
        Command::Inspect(options) => inspect::run(&options).map(|()| ExitCode::SUCCESS),
        Command::ForgetSink(options) => forget_sink(&options).map(|()| ExitCode::SUCCESS),
        Command::Verify(options) => verify::run(&options),
        Command::Salvage(options) => salvage::run(&options),
    };
    match result {
        Ok(status) => status,
        Err(failure) => {
            output::complain(failure);
            ExitCode::FAILURE
        }
    }
}

fn check_config(options: &CheckConfigOptions) -> Result<(), Failure> {
    let config = Config::from_file(&options.file).map_err(|error| error.to_string())?;
    output::publish(|out| write!(out, "{config}"))
}

fn forget_sink(options: &ForgetSinkOptions) -> Result<(), Failure> {
    let ForgetSinkOptions { dir, name } = options;
    match tollgate::forget_sink(dir, name).map_err(|error| error.to_string())? {
        true => output::say(format_args!("{} has forgotten the sink {name:?}", dir.display())),
        false => return Err(format!("{} knows no sink {name:?}", dir.display())),
    }
    Ok(())
}
