//! Opening what a process has left behind, and what counters take in memory:
//! `cargo bench --bench recovery`.
//!
//! Each task runs in a process of its own, which is this program again: only so can an engine be
//! killed before it has drained its log, and memory be told apart. Files are in the page cache, as
//! they are after the death of a process; after the loss of the machine the disk comes on top.
#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a benchmark prints, reads the real clock, and stops where it can't go on"
)]

mod common;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tollgate::{Config, RecoveryReport, Tollgate};

use common::AnyError;
use common::gates::{fresh_dir, unlimited, used};
use common::keys::Users;
use common::options::{FILTER, Options};
use common::peers::{BareMap, Governor};
use common::proc::Resident;
use common::report::{Report, Row, Target};

/// Users whose counters lie in the snapshot; records in the lanes, and their users.
const COUNTERS: u32 = 10_000_000;
const RECORDS: u64 = 10_000_000;
const USERS_OF_RECORDS: u32 = 100_000;
/// So many rings that none is full enough for a batch before the next sync.
const LANES: usize = 160;

fn main() -> Result<(), AnyError> {
    if let Some(task) = Task::from_env() {
        return task.run();
    }
    let options = Options::from_args(&[FILTER, "--repetitions", "--patience"]);
    let mut report = Report::new("recovery", &options);
    if options.wants("empty") {
        empty_directory(&options, &mut report)?;
    }
    if options.wants("snapshot") {
        snapshot(&options, &mut report)?;
    }
    if options.wants("lanes") {
        lanes(&options, &mut report)?;
    }
    if options.wants("memory") {
        memory(&options, &mut report)?;
    }
    report.finish()
}

fn empty_directory(options: &Options, report: &mut Report) -> Result<(), AnyError> {
    let (mut opens, mut closes) = (Vec::new(), Vec::new());
    for _ in 0..options.repetitions() {
        let dir = fresh_dir()?;
        let start = Instant::now();
        let gate = Tollgate::open(dir.path(), Config::default())?;
        opens.push(millis(start));
        let quota = gate.define(unlimited())?;
        gate.consume(1, quota, 1)?;
        let start = Instant::now();
        gate.close()?;
        closes.push(millis(start));
    }
    let target = Target::AtMost(50.0);
    report.add(Row::new("empty directory", "open", "ms", &opens).must(target));
    report.add(Row::new("empty directory", "close", "ms", &closes).must(target));
    Ok(())
}

fn snapshot(options: &Options, report: &mut Report) -> Result<(), AnyError> {
    let counters = options.size(COUNTERS, COUNTERS / 50);
    let dir = fresh_dir()?;
    let filled = Task::new("fill-snapshot", dir.path(), counters.into()).finish()?;
    let mut quiet = options.quiet();
    let task = Task::new("open", dir.path(), counters.into());
    let opens = (0..options.repetitions())
        .map(|_| {
            let opened = quiet.run(|| task.finish())?;
            assert_eq!(opened["counters"], counters);
            assert_eq!(opened["used"], u64::from(counters));
            Ok(opened)
        })
        .collect::<Result<Vec<_>, AnyError>>()?;
    let name = format!("snapshot of {counters} counters");
    let rates: Vec<f64> =
        seconds(&opens).into_iter().map(|seconds| f64::from(counters) / seconds).collect();
    report.add(Row::new(&name, "open", "s", &seconds(&opens)));
    report.add(Row::new(&name, "counters", "/s", &rates).must(Target::AtLeast(5e6)));
    let bytes = number(&filled, "snapshot_bytes") / f64::from(counters);
    report.add(Row::new(&name, "on disk", "B/counter", &[bytes]));
    let resident: Vec<f64> =
        opens.iter().map(|open| number(open, "grown") / f64::from(counters)).collect();
    let row = Row::new(&name, "in memory once open", "B/counter", &resident);
    report.add(row.must(Target::AtMost(100.0)));
    Ok(())
}

fn lanes(options: &Options, report: &mut Report) -> Result<(), AnyError> {
    let records = options.size(RECORDS, RECORDS / 50);
    let (mut with_records, mut without) = (Vec::new(), Vec::new());
    let mut quiet = options.quiet();
    for _ in 0..options.repetitions() {
        let measured: Result<_, AnyError> = quiet.run(|| {
            let dir = fresh_dir()?;
            Task::new("fill-lanes", dir.path(), records).kill_when_ready()?;
            let open = Task::new("open-lanes", dir.path(), records);
            Ok((open.finish()?, open.finish()?))
        });
        let (opened, again) = measured?;
        // A slow machine has drained some before the kill: they are not counted, though the batch
        // that they are in is read as well.
        let in_lanes = number(&opened, "lane_records");
        assert!(in_lanes * 2.0 > records as f64, "most of them are in the lanes at the kill");
        assert_eq!(opened["used"], records, "nothing was lost");
        with_records.push(opened);
        without.push(again);
    }
    let name = format!("{records} records in the lanes");
    let rate = |open: &Value| number(open, "lane_records") / number(open, "seconds");
    let rates: Vec<f64> = with_records.iter().map(rate).collect();
    report.add(Row::new(&name, "open", "s", &seconds(&with_records)));
    report.add(Row::new(&name, "open after a clean close", "s", &seconds(&without)));
    report.add(Row::new(&name, "records", "/s", &rates).must(Target::AtLeast(20e6)));
    Ok(())
}

fn memory(options: &Options, report: &mut Report) -> Result<(), AnyError> {
    let counters = options.size(COUNTERS, COUNTERS / 50);
    let name = format!("{counters} counters");
    let dir = fresh_dir()?;
    let filled = Task::new("fill-memory", dir.path(), counters.into()).finish()?;
    let gate = number(&filled, "grown") / f64::from(counters);
    let heap = number(&filled, "grown_heap") / f64::from(counters);
    let grown = |what: &str| -> Result<f64, AnyError> {
        let filled = Task::new(what, dir.path(), counters.into()).finish()?;
        Ok(number(&filled, "grown") / f64::from(counters))
    };
    let (governor, bare) = (grown("fill-governor")?, grown("fill-bare-map")?);
    let target = Target::AtMost(100.0);
    let row = Row::new(&name, "memory, tollgate", "B/counter", &[gate]).must(target);
    report.add(row.against("governor", &[governor], None).against("bare map", &[bare], None));
    report.add(Row::new(&name, "of which heap", "B/counter", &[heap]));
    report.add(Row::new(&name, "memory, governor", "B/counter", &[governor]));
    report.add(Row::new(&name, "memory, bare map", "B/counter", &[bare]));
    Ok(())
}

fn millis(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}

fn number(answer: &Value, name: &str) -> f64 {
    answer[name].as_f64().expect("the task answers with it")
}

fn seconds(answers: &[Value]) -> Vec<f64> {
    answers.iter().map(|answer| number(answer, "seconds")).collect()
}

/// What a process of its own does. It answers with a line of JSON.
struct Task {
    name: String,
    dir: String,
    count: u64,
}

const VARIABLE: &str = "TOLLGATE_BENCH_TASK";

impl Task {
    fn new(name: &str, dir: &Path, count: u64) -> Self {
        let dir = dir.to_str().expect("the path is UTF-8").to_owned();
        Self { name: name.to_owned(), dir, count }
    }

    fn from_env() -> Option<Self> {
        let text = std::env::var(VARIABLE).ok()?;
        let mut parts = text.splitn(3, ' ');
        let (name, count) = (parts.next()?.to_owned(), parts.next()?.parse().ok()?);
        Some(Self { name, count, dir: parts.next()?.to_owned() })
    }

    fn spawn(&self) -> Result<Child, AnyError> {
        let Self { name, dir, count } = self;
        let mut command = Command::new(std::env::current_exe()?);
        command.env(VARIABLE, format!("{name} {count} {dir}")).stdout(Stdio::piped());
        Ok(command.spawn()?)
    }

    /// Waits for the answer and the end.
    fn finish(&self) -> Result<Value, AnyError> {
        let output = self.spawn()?.wait_with_output()?;
        assert!(output.status.success(), "{} has failed", self.name);
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Waits for the answer, then sends a SIGKILL.
    fn kill_when_ready(&self) -> Result<(), AnyError> {
        let mut child = self.spawn()?;
        let mut answer = String::new();
        let stdout = child.stdout.take().expect("it is piped");
        BufReader::new(stdout).read_line(&mut answer)?;
        child.kill()?;
        child.wait()?;
        assert!(!answer.is_empty(), "{} has failed", self.name);
        Ok(())
    }

    fn run(&self) -> Result<(), AnyError> {
        let answer = match self.name.as_str() {
            "fill-snapshot" => self.fill_snapshot()?,
            "fill-lanes" => self.fill_lanes()?,
            "fill-memory" => self.fill_memory()?,
            "fill-governor" => self.fill(Governor::populated),
            "fill-bare-map" => self.fill(BareMap::populated),
            "open" => self.open(Config::default(), self.users())?,
            "open-lanes" => self.open(many_lanes(), USERS_OF_RECORDS)?,
            unknown => panic!("no task {unknown}"),
        };
        println!("{answer}");
        if self.name == "fill-lanes" {
            // To be killed.
            thread::sleep(Duration::from_hours(1));
        }
        Ok(())
    }

    fn users(&self) -> u32 {
        u32::try_from(self.count).expect("users are counted in 32 bits")
    }

    fn fill_snapshot(&self) -> Result<Value, AnyError> {
        let gate = Tollgate::open(&self.dir, Config::default())?;
        let quota = gate.define(unlimited())?;
        for user in 0..self.users() {
            gate.consume(user.into(), quota, 1)?;
        }
        gate.snapshot()?;
        let bytes = gate.stats().snapshot_bytes;
        gate.close()?;
        Ok(json!({ "snapshot_bytes": bytes }))
    }

    /// Each lane gets an equal part from a thread of its own, two at a time and from users that were
    /// drawn before, so that it is over before the drain looks for the first time.
    fn fill_lanes(&self) -> Result<Value, AnyError> {
        let share = self.count as usize / LANES;
        assert_eq!(share as u64 * LANES as u64, self.count, "the lanes share alike");
        let draw = |lane| Users::Uniform(USERS_OF_RECORDS).draw(share, lane as u64);
        let users: Vec<_> = (0..LANES).map(draw).collect();
        let gate = Tollgate::open(&self.dir, undrained())?;
        let quota = gate.define(unlimited())?;
        let consume = |users: &[u32]| -> tollgate::Result<()> {
            users.iter().try_for_each(|&user| gate.consume(user.into(), quota, 1).map(drop))
        };
        for pair in users.chunks(2) {
            thread::scope(|scope| {
                let fill = |users| scope.spawn(move || consume(users));
                let fillers: Vec<_> = pair.iter().map(|users| fill(users)).collect();
                fillers.into_iter().try_for_each(|filler| filler.join().expect("no panic"))
            })?;
        }
        // Leaked: an engine that is dropped drains.
        std::mem::forget(gate);
        Ok(json!({}))
    }

    fn fill_memory(&self) -> Result<Value, AnyError> {
        let gate = Tollgate::open(&self.dir, Config::default())?;
        let quota = gate.define(unlimited())?;
        let before = Resident::now();
        for user in 0..self.users() {
            gate.consume(user.into(), quota, 1)?;
        }
        gate.sync()?;
        Ok(grown_since(before))
    }

    fn fill<T>(&self, populate: impl FnOnce(u32) -> T) -> Value {
        let before = Resident::now();
        let peer = populate(self.users());
        let answer = grown_since(before);
        drop(peer);
        answer
    }

    fn open(&self, config: Config, users: u32) -> Result<Value, AnyError> {
        let before = Resident::now();
        let start = Instant::now();
        let gate = Tollgate::open(&self.dir, config)?;
        let seconds = start.elapsed().as_secs_f64();
        let grown = Resident::now().total().saturating_sub(before.total());
        let RecoveryReport { counters, lane_records, findings, .. } = gate.recovery_report();
        assert!(findings.is_empty(), "{findings:?}");
        let quota = gate.quota_by_name(unlimited().name()).expect("it was defined");
        let answer = json!({
            "seconds": seconds,
            "grown": grown,
            "counters": counters,
            "lane_records": lane_records,
            "used": used(&gate, quota, users),
        });
        gate.close()?;
        Ok(answer)
    }
}

fn grown_since(before: Resident) -> Value {
    let now = Resident::now();
    json!({
        "grown": now.total().saturating_sub(before.total()),
        "grown_heap": now.anonymous.saturating_sub(before.anonymous),
    })
}

/// Rings for all the records.
fn many_lanes() -> Config {
    Config::default().lanes(LANES).lane_records(1 << 18)
}

/// The same, left undrained until the drain looks for the first time, after a second.
fn undrained() -> Config {
    many_lanes()
        .sync_interval(Duration::from_mins(1))
        .drain_interval(Duration::from_secs(1))
        .journal_file_bytes(128 << 20)
}
