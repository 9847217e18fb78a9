//! What is lost when the process is killed in the middle of its load.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use serde_json::json;

use crate::common::AnyError;
use crate::common::gates::fresh_dir;
use crate::common::keys::Random;
use crate::common::open_loop::open_loop;
use crate::common::options::Options;
use crate::common::pin::on_core;
use crate::common::report::{Report, Row, Target};
use crate::database::Database;
use crate::designs::{self, Kind};
use crate::loads::Load;
use crate::{CALLER_CORE, USERS};

const VARIABLE: &str = "TOLLGATE_BENCH_TASK";
const LOAD: Load = Load::High;
/// Longer than any child lives.
const LOAD_SECONDS: u64 = 120;
/// A child is killed after between half a second and this: before or after tollgate's first
/// delivery.
const LIFE_MILLIS_MAX: u32 = 7_000;
const LIFE_MILLIS_MIN: u32 = 500;
const KILLS: usize = 3;

/// Kills each design several times, each time with new tables. Returns what has a target.
pub(crate) fn measure(
    options: &Options,
    database: &mut Database,
    report: &mut Report,
) -> Result<Vec<Row>, AnyError> {
    let mut random = Random::new(7);
    let spread = LIFE_MILLIS_MAX - LIFE_MILLIS_MIN;
    let kills = options.repetitions_or(KILLS, 1);
    let lives: Vec<_> = (0..kills).map(|_| LIFE_MILLIS_MIN + random.below(spread)).collect();
    println!("\n{:<42} {:>8} {:>14} {:>8}", "killed", "kills", "acknowledged", "lost");
    let mut judged = Vec::new();
    for kind in Kind::DESIGNS {
        let (mut acknowledged, mut lost) = (Vec::new(), Vec::new());
        for &life in &lives {
            let outcome = kill(kind, Duration::from_millis(life.into()), database)?;
            acknowledged.push(outcome.acknowledged);
            lost.push(outcome.lost);
        }
        let scenario = format!("killed at {}, {}", LOAD.name(), kind.name());
        // One unit lost by one kill is too much: the sums count, not the medians.
        let sum = |counts: &[u64]| counts.iter().sum::<u64>();
        let (acknowledged_sum, lost_sum) = (sum(&acknowledged), sum(&lost));
        println!("{scenario:<42} {kills:>8} {acknowledged_sum:>14} {lost_sum:>8}");
        report.record(Row::new(&scenario, "acknowledged", "", &[acknowledged_sum as f64]));
        report.attach(&scenario, json!({ "acknowledged": acknowledged, "lost": lost }));
        let row = Row::new(&scenario, "lost", "", &[lost_sum as f64]);
        if kind.is_tollgate() {
            judged.push(row.must(Target::AtMost(0.0)));
        } else {
            report.record(row);
        }
    }
    Ok(judged)
}

struct Outcome {
    acknowledged: u64,
    /// What was acknowledged and is not in the database.
    lost: u64,
}

fn kill(kind: Kind, life: Duration, database: &mut Database) -> Result<Outcome, AnyError> {
    let dir = fresh_dir()?;
    let schema = database.make_schema(kind)?;
    let parameters = database.parameters();
    let task = Task { kind, parameters, schema, dir: dir.path().to_path_buf() };
    let ledger = Ledger::open(dir.path())?;
    let mut child = task.spawn()?;
    while ledger.read(Count::Acknowledged)? == 0 {
        assert!(child.try_wait()?.is_none(), "the child has failed");
        thread::sleep(Duration::from_millis(1));
    }
    thread::sleep(life);
    child.kill()?;
    assert_eq!(child.wait()?.code(), None, "the child lived until it was killed");
    database.wait_until_idle()?;
    if kind.is_tollgate() {
        // As after any crash: the service is started again, and delivers what is left.
        designs::open(kind, &task.parameters, &task.schema, &task.data_dir())?.finish()?;
    }
    let [begun, acknowledged] = [ledger.read(Count::Begun)?, ledger.read(Count::Acknowledged)?];
    let found = database.used_by_user(&task.schema)?;
    // By user: one unit that is there unacknowledged makes up for no other's.
    let found = |user| found.get(&user).copied().unwrap_or(0);
    let (most, least) = (used_after(begun), used_after(acknowledged));
    for (&user, &most) in &most {
        assert!(found(user) <= most, "{}: user {user} has more than was asked", kind.name());
    }
    let lost = least.iter().map(|(&user, &used)| used.saturating_sub(found(user))).sum();
    Ok(Outcome { acknowledged, lost })
}

/// What each user has used after so many requests of a child.
fn used_after(requests: u64) -> BTreeMap<u64, u64> {
    let drawn = USERS.draw(LOAD.dues(LOAD_SECONDS).len(), 1);
    let mut used = BTreeMap::new();
    for &user in drawn.iter().take(requests as usize) {
        *used.entry(user.into()).or_default() += 1;
    }
    used
}

/// What a process of its own does: requests, until it is killed.
pub(crate) struct Task {
    kind: Kind,
    parameters: String,
    schema: String,
    dir: PathBuf,
}

impl Task {
    pub(crate) fn from_env() -> Option<Self> {
        let text = std::env::var(VARIABLE).ok()?;
        let mut lines = text.lines().map(str::to_owned);
        let kind = Kind::from_name(&lines.next()?)?;
        let (parameters, schema) = (lines.next()?, lines.next()?);
        Some(Self { kind, parameters, schema, dir: lines.next()?.into() })
    }

    fn spawn(&self) -> Result<Child, AnyError> {
        let Self { kind, parameters, schema, dir } = self;
        let text = format!("{}\n{parameters}\n{schema}\n{}", kind.name(), dir.display());
        let mut command = Command::new(std::env::current_exe()?);
        Ok(command.env(VARIABLE, text).stdin(Stdio::null()).spawn()?)
    }

    fn data_dir(&self) -> PathBuf {
        self.dir.join("data")
    }

    pub(crate) fn run(self) -> Result<(), AnyError> {
        let data_dir = self.data_dir();
        let ledger = Ledger::open(&self.dir)?;
        let mut design = designs::open(self.kind, &self.parameters, &self.schema, &data_dir)?;
        let dues = LOAD.dues(LOAD_SECONDS);
        let users = USERS.draw(dues.len(), 1);
        let mut requests = 0;
        let operate = |user: u32| {
            requests += 1;
            ledger.write(Count::Begun, requests);
            assert!(design.request(user), "the limit is never reached");
            ledger.write(Count::Acknowledged, requests);
        };
        on_core(CALLER_CORE, || open_loop(&users, dues, operate));
        Err("the child was not killed".into())
    }
}

/// Which requests a child has made: in a file, whose pages its death does not harm.
struct Ledger(File);

#[derive(Clone, Copy)]
enum Count {
    Begun,
    Acknowledged,
}

impl Ledger {
    fn open(dir: &Path) -> Result<Self, AnyError> {
        let path = dir.join("ledger");
        let file =
            File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        file.set_len(16)?;
        Ok(Self(file))
    }

    fn read(&self, count: Count) -> Result<u64, AnyError> {
        let mut bytes = [0; 8];
        self.0.read_exact_at(&mut bytes, count as u64 * 8)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn write(&self, count: Count, value: u64) {
        let written = self.0.write_all_at(&value.to_le_bytes(), count as u64 * 8);
        written.expect("the page is there");
    }
}
