//! A design under a load: measured, and told.

use std::thread;
use std::time::Duration;

use rustix::process::Signal;

use crate::common::AnyError;
use crate::common::gates::fresh_dir;
use crate::common::numbers::{median, short};
use crate::common::open_loop::{Of, Times, open_loop};
use crate::common::options::Options;
use crate::common::pin::on_core;
use crate::common::quiet::Quiet;
use crate::common::report::{Report, Row, Target};
use crate::database::Database;
use crate::designs::{self, Kind};
use crate::loads::Load;
use crate::{CALLER_CORE, USERS};

/// What a run leaves behind should not meet the next. And a service that answers requests has been
/// up for some seconds: by then an engine has noticed that its map is quiet.
const PAUSE: Duration = Duration::from_millis(2_500);
/// What tollgate must keep to, with and without a database.
const P99_MAX_MICROS: f64 = 5.0;
const TIMES_WITH_DATABASE: f64 = 1.2;

/// What is special about a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Case {
    /// All users are known.
    Usual,
    /// And the database is killed in the middle.
    DatabaseKilled,
    /// No user is known: the first request of each makes its counter.
    NewUsers,
}

impl Case {
    fn name(self) -> &'static str {
        match self {
            Self::Usual => "",
            Self::DatabaseKilled => ", database killed",
            Self::NewUsers => ", new users",
        }
    }
}

/// One design under one load, in all its runs.
pub(crate) struct Contest {
    load: Load,
    kind: Kind,
    case: Case,
    runs: Vec<Run>,
}

struct Run {
    times: Times,
    /// What was counted, and what the database had in the end.
    counted: u64,
    found: u64,
}

impl Contest {
    /// In the order in which they are measured.
    pub(crate) fn all(load: Load) -> Vec<Self> {
        let mut contests = vec![
            (Kind::BareMap, Case::Usual),
            (Kind::Sink, Case::Usual),
            (Kind::BareMap, Case::DatabaseKilled),
            (Kind::Sink, Case::DatabaseKilled),
            (Kind::SinkSync, Case::Usual),
            (Kind::Channel, Case::Usual),
            (Kind::Transaction, Case::Usual),
        ];
        if load == Load::High {
            contests.push((Kind::Sink, Case::NewUsers));
        }
        let contest = |(kind, case)| Self { load, kind, case, runs: Vec::new() };
        contests.into_iter().map(contest).collect()
    }

    /// Where its line stands: designs one after the other.
    pub(crate) fn place(&self) -> (Kind, Case) {
        (self.kind, self.case)
    }

    /// Whether one run is too few: for times that are so short that little disturbs them.
    pub(crate) fn is_repeated(&self) -> bool {
        self.kind.is_in_memory() && self.case != Case::NewUsers
    }

    fn name(&self) -> String {
        format!("{}, {}", self.load.name(), self.design())
    }

    fn design(&self) -> String {
        format!("{}{}", self.kind.name(), self.case.name())
    }

    /// Adds a run; measures again where others disturb it and there is patience. A database that
    /// works for the design counts as another, so only its start must be quiet then.
    pub(crate) fn measure(
        &mut self,
        options: &Options,
        quiet: &mut Quiet,
        database: &mut Database,
    ) -> Result<(), AnyError> {
        let seconds = options.seconds(self.load.seconds(), 2);
        loop {
            quiet.begin();
            let run = self.run(seconds, database)?;
            if !self.kind.is_in_memory() || quiet.accepts() {
                self.runs.push(run);
                return Ok(());
            }
        }
    }

    fn run(&self, seconds: u64, database: &mut Database) -> Result<Run, AnyError> {
        let dir = fresh_dir()?;
        let schema = database.make_schema(self.kind)?;
        let mut design = designs::open(self.kind, &database.parameters(), &schema, dir.path())?;
        let known = if self.case == Case::NewUsers { 0 } else { USERS.count() };
        design.populate(known)?;
        let dues = self.load.dues(seconds);
        let users = USERS.draw(dues.len(), 1);
        let counted = dues.len() as u64 + u64::from(known);
        thread::sleep(PAUSE);
        let times = thread::scope(|scope| {
            if self.case == Case::DatabaseKilled {
                let half = Duration::from_secs(seconds) / 2;
                let database = &mut *database;
                scope.spawn(move || {
                    thread::sleep(half);
                    database.server.kill(Signal::KILL);
                });
            }
            let operate = |user| assert!(design.request(user), "the limit is never reached");
            on_core(CALLER_CORE, || open_loop(&users, dues, operate))
        });
        if self.case == Case::DatabaseKilled {
            database.server.restart();
        }
        design.finish()?;
        let found = database.used(&schema)?;
        let expected = if self.kind == Kind::BareMap { 0 } else { counted };
        assert_eq!(found, expected, "{}: the database has all", self.name());
        thread::sleep(PAUSE);
        Ok(Run { times, counted, found })
    }

    /// One number of each run.
    fn samples(&self, of: Of, figure: Figure) -> Vec<f64> {
        self.runs.iter().map(|run| figure.micros(run.times.of(of))).collect()
    }

    fn print(&self) {
        print!("{:<17} {:<25}", self.load.name(), self.design());
        for of in Of::BOTH {
            for figure in Figure::ALL {
                print!(" {:>8}", short(median(&self.samples(of, figure))));
            }
        }
        let [counted, found] = self.counts().map(|counts| counts.iter().sum::<f64>());
        println!(" {counted:>8} {found:>8}");
    }

    /// What was counted, and what the database had, in each run.
    fn counts(&self) -> [Vec<f64>; 2] {
        let [counted, found]: [fn(&Run) -> u64; 2] = [|run| run.counted, |run| run.found];
        [counted, found].map(|count| self.runs.iter().map(|run| count(run) as f64).collect())
    }

    /// Records the figures, but for the one that has a target: returns that.
    fn tell(&self, contests: &[Self], report: &mut Report) -> Option<Row> {
        let mut judged = None;
        for of in Of::BOTH {
            let scenario = format!("{}, {}", self.name(), of.name());
            for figure in Figure::ALL {
                let row = Row::new(&scenario, figure.name(), "us", &self.samples(of, figure));
                if (of, figure) == (Of::Service, Figure::P99) && self.has_target() {
                    judged = Some(self.judge(row, contests));
                } else {
                    report.record(row);
                }
            }
            let mut all = Times::new();
            self.runs.iter().for_each(|run| all.add(&run.times));
            report.attach(&scenario, all.counts(of));
        }
        for (name, counts) in ["counted", "in the database"].into_iter().zip(self.counts()) {
            report.record(Row::new(&self.name(), name, "", &counts));
        }
        judged
    }

    fn has_target(&self) -> bool {
        self.kind == Kind::Sink && self.case != Case::NewUsers
    }

    fn judge(&self, row: Row, contests: &[Self]) -> Row {
        let of = |kind, case| {
            let contest = contests.iter().find(|it| it.kind == kind && it.case == case);
            contest.map(|contest| contest.samples(Of::Service, Figure::P99)).unwrap_or_default()
        };
        let row = row.must(Target::AtMost(P99_MAX_MICROS));
        if self.case == Case::DatabaseKilled {
            let target = Target::AtMost(TIMES_WITH_DATABASE);
            row.against("database alive", &of(Kind::Sink, Case::Usual), target)
        } else {
            row.against("bare map", &of(Kind::BareMap, Case::Usual), None)
        }
    }
}

/// A number that sums times up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Figure {
    Mean,
    P50,
    P99,
    Max,
}

impl Figure {
    const ALL: [Self; 4] = [Self::Mean, Self::P50, Self::P99, Self::Max];

    fn name(self) -> &'static str {
        match self {
            Self::Mean => "mean",
            Self::P50 => "p50",
            Self::P99 => "p99",
            Self::Max => "max",
        }
    }

    fn micros(self, times: &hdrhistogram::Histogram<u64>) -> f64 {
        let nanos = match self {
            Self::Mean => times.mean(),
            Self::P50 => times.value_at_percentile(50.0) as f64,
            Self::P99 => times.value_at_percentile(99.0) as f64,
            Self::Max => times.max() as f64,
        };
        nanos / 1e3
    }
}

/// Begins the table of all contests.
pub(crate) fn print_header() {
    println!("Microseconds; medians of the runs of a line, and what these counted together:");
    let [service, response] = ["of the call", "from when it was due"];
    println!("{:<43} {service:>35} {response:>35}", "");
    print!("{:<17} {:<25}", "load", "design");
    let figures = Figure::ALL.iter().chain(&Figure::ALL);
    figures.for_each(|figure| print!(" {:>8}", figure.name()));
    println!(" {:>8} {:>8}", "counted", "database");
}

/// Prints the lines of contests under one load, and records them. Returns what has a target.
pub(crate) fn tell(contests: &[Contest], report: &mut Report) -> Vec<Row> {
    contests.iter().for_each(Contest::print);
    contests.iter().filter_map(|contest| contest.tell(contests, report)).collect()
}
