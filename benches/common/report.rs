//! What was measured: a table for the eye, JSON for the plots and for whoever doubts the table.

use std::fs;

use serde_json::{Value, json};

use super::AnyError;
use super::numbers::{median, ratios, short};
use super::options::Options;
use super::pin::cores;
use super::proc::Processors;
use super::quiet::QUIET;

/// What a number must reach.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Target {
    AtMost(f64),
    AtLeast(f64),
}

impl Target {
    fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtMost(bound) => value <= bound,
            Self::AtLeast(bound) => value >= bound,
        }
    }

    fn text(self) -> String {
        match self {
            Self::AtMost(bound) => format!("<= {}", short(bound)),
            Self::AtLeast(bound) => format!(">= {}", short(bound)),
        }
    }
}

/// One thing that was measured, several times.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    scenario: String,
    name: String,
    unit: &'static str,
    samples: Vec<f64>,
    target: Option<Target>,
    comparisons: Vec<Comparison>,
}

/// A row in proportion to another of the same run.
#[derive(Debug, Clone)]
struct Comparison {
    baseline: String,
    ratios: Vec<f64>,
    target: Option<Target>,
}

impl Row {
    pub(crate) fn new(scenario: &str, name: &str, unit: &'static str, samples: &[f64]) -> Self {
        let (scenario, name) = (scenario.to_owned(), name.to_owned());
        let (target, comparisons) = (None, Vec::new());
        Self { scenario, name, unit, samples: samples.to_vec(), target, comparisons }
    }

    /// The number itself must reach a target.
    pub(crate) fn must(mut self, target: Target) -> Self {
        self.target = Some(target);
        self
    }

    /// Compares with what the same repetitions gave for another; the target is of the ratio.
    pub(crate) fn against(
        mut self,
        baseline: &str,
        samples: &[f64],
        target: impl Into<Option<Target>>,
    ) -> Self {
        let (baseline, target) = (baseline.to_owned(), target.into());
        self.comparisons.push(Comparison {
            baseline,
            ratios: ratios(&self.samples, samples),
            target,
        });
        self
    }

    fn lines(&self) -> Vec<[String; 6]> {
        let value = format!("{} {}", short(median(&self.samples)), self.unit);
        let line = |value: &str, ratio: String, baseline: &str, judged: f64, target| {
            let (wanted, verdict) = verdict(target, judged);
            let what = format!("{}: {}", self.scenario, self.name);
            [what, value.to_owned(), ratio, baseline.to_owned(), wanted, verdict]
        };
        let mut lines = Vec::new();
        if self.comparisons.is_empty() || self.target.is_some() {
            lines.push(line(&value, String::new(), "", median(&self.samples), self.target));
        }
        for comparison in &self.comparisons {
            let ratio = median(&comparison.ratios);
            let shown = format!("{ratio:.2} x");
            lines.push(line(&value, shown, &comparison.baseline, ratio, comparison.target));
        }
        lines
    }

    fn to_json(&self) -> Value {
        let comparisons = self.comparisons.iter().map(|comparison| {
            let ratio = median(&comparison.ratios);
            json!({
                "baseline": comparison.baseline,
                "ratios": comparison.ratios,
                "ratio": ratio,
                "target": comparison.target.map(Target::text),
                "met": comparison.target.map(|target| target.is_met(ratio)),
            })
        });
        let value = median(&self.samples);
        json!({
            "scenario": self.scenario,
            "name": self.name,
            "unit": self.unit,
            "samples": self.samples,
            "median": value,
            "target": self.target.map(Target::text),
            "met": self.target.map(|target| target.is_met(value)),
            "against": comparisons.collect::<Vec<_>>(),
        })
    }
}

fn verdict(target: Option<Target>, value: f64) -> (String, String) {
    target.map_or_else(Default::default, |target| {
        let met = if target.is_met(value) { "met" } else { "MISSED" };
        (target.text(), met.to_owned())
    })
}

/// The result of one benchmark.
#[derive(Debug)]
pub(crate) struct Report {
    name: &'static str,
    options: Options,
    rows: Vec<Row>,
    started: Processors,
    extra: serde_json::Map<String, Value>,
    /// Whether the table was begun.
    is_headed: bool,
}

impl Report {
    pub(crate) fn new(name: &'static str, options: &Options) -> Self {
        let note = if options.quick { "; a quick run: the numbers mean little" } else { "" };
        println!("{name}: {} cores{note}\n", cores());
        let (rows, extra) = (Vec::new(), serde_json::Map::new());
        let (options, started) = (options.clone(), Processors::now());
        Self { name, options, rows, started, extra, is_headed: false }
    }

    /// Adds a row, and prints it.
    pub(crate) fn add(&mut self, row: Row) {
        if !self.is_headed {
            self.is_headed = true;
            print_line(&["what", "median", "ratio", "against", "target", ""].map(str::to_owned));
        }
        for line in row.lines() {
            print_line(&line);
        }
        self.record(row);
    }

    /// Adds a row that only the JSON shows.
    pub(crate) fn record(&mut self, row: Row) {
        self.rows.push(row);
    }

    /// Adds what explains the rows, and prints it.
    pub(crate) fn note(&mut self, name: &str, value: Value) {
        println!("({name}: {value})");
        self.attach(name, value);
    }

    /// Adds what is no row, for the plots.
    pub(crate) fn attach(&mut self, name: &str, value: Value) {
        self.extra.insert(name.to_owned(), value);
    }

    /// Says whether the machine was quiet, and writes the JSON that was asked for.
    pub(crate) fn finish(self) -> Result<(), AnyError> {
        let others = Processors::now().used_by_others(self.started);
        let quiet = if others > QUIET {
            "too much, unless --patience sorted it out"
        } else {
            "quiet enough"
        };
        println!("\nothers used {:.0} % of the processors meanwhile: {quiet}", others * 100.0);
        let Some(path) = &self.options.json else { return Ok(()) };
        let report = json!({
            "benchmark": self.name,
            "quick": self.options.quick,
            "cores": cores(),
            "used_by_others": others,
            "rows": self.rows.iter().map(Row::to_json).collect::<Vec<_>>(),
            "extra": self.extra,
        });
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::write(path, format!("{report}\n"))?;
        println!("written: {}", path.display());
        Ok(())
    }
}

fn print_line([what, value, ratio, baseline, target, verdict]: &[String; 6]) {
    println!("{what:<48} {value:>14} {ratio:>8}  {baseline:<18} {target:<10} {verdict}");
}
