//! The command line of a benchmark.

use std::path::PathBuf;
use std::process;
use std::str::FromStr;
use std::time::Duration;

use super::quiet::Quiet;

const USAGE: &str = "\
[FILTER]           only what has this in its name
--quick            a short run, to see that it works; its numbers mean little
--json FILE        write every repetition, medians, ratios and targets to FILE
--repetitions N    how often everything is measured (at least 5 for a median worth its name)
--seconds N        how long a timed run takes
--patience N       measure again what other processes disturb, for up to N seconds a scenario";

/// How a benchmark that takes a filter names it.
pub(crate) const FILTER: &str = "FILTER";
/// What not all benchmarks take.
const NOT_FOR_ALL: [&str; 4] = [FILTER, "--repetitions", "--seconds", "--patience"];

/// What the command line asks for.
#[derive(Debug, Clone, Default)]
pub(crate) struct Options {
    pub(crate) quick: bool,
    pub(crate) json: Option<PathBuf>,
    filter: Option<String>,
    repetitions: Option<usize>,
    seconds: Option<u64>,
    patience: u64,
}

impl Options {
    /// Reads the command line of a benchmark that takes these beside what all take. Leaves the
    /// process where it can't be understood, or would have no effect.
    pub(crate) fn from_args(takes: &[&str]) -> Self {
        let mut options = Self::default();
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            let name = if arg.starts_with('-') { &*arg } else { FILTER };
            if NOT_FOR_ALL.contains(&name) && !takes.contains(&name) {
                let takes = takes.join(", ");
                leave(2, &format!("{arg}: this benchmark takes --quick, --json, {takes}"));
            }
            match arg.as_str() {
                // `cargo bench` passes it to all.
                "--bench" => {}
                "--quick" => options.quick = true,
                "--json" => options.json = Some(value(&arg, args.next())),
                "--repetitions" => options.repetitions = Some(value(&arg, args.next())),
                "--seconds" => options.seconds = Some(value(&arg, args.next())),
                "--patience" => options.patience = value(&arg, args.next()),
                "--help" => leave(0, ""),
                unknown if unknown.starts_with('-') => leave(2, &format!("unknown: {unknown}")),
                filter => options.filter = Some(filter.to_owned()),
            }
        }
        options
    }

    /// Whether something of this name is asked for.
    pub(crate) fn wants(&self, name: &str) -> bool {
        self.filter.as_ref().is_none_or(|filter| name.contains(filter.as_str()))
    }

    /// How often everything is measured.
    pub(crate) fn repetitions(&self) -> usize {
        self.repetitions_or(5, 2)
    }

    /// How often something is measured: as asked, or `usual`, or `quick` in a short run.
    pub(crate) fn repetitions_or(&self, usual: usize, quick: usize) -> usize {
        self.repetitions.unwrap_or(if self.quick { quick } else { usual }).max(1)
    }

    /// How long a timed run takes: as asked, or `usual`, or `quick` in a short run.
    pub(crate) fn seconds(&self, usual: u64, quick: u64) -> u64 {
        self.seconds.unwrap_or(if self.quick { quick } else { usual }).max(1)
    }

    /// How much work there is.
    pub(crate) fn size<T>(&self, full: T, quick: T) -> T {
        if self.quick { quick } else { full }
    }

    /// Measures again what others disturb, if that was asked for.
    pub(crate) fn quiet(&self) -> Quiet {
        Quiet::new(Duration::from_secs(self.patience))
    }
}

fn value<T: FromStr>(name: &str, text: Option<String>) -> T {
    match text.as_deref().map(str::parse) {
        Some(Ok(value)) => value,
        _ => leave(2, &format!("{name} wants a value")),
    }
}

fn leave(code: i32, why: &str) -> ! {
    println!("{why}\n{USAGE}");
    process::exit(code)
}
