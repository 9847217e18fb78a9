//! A request that checks a quota and counts, in four designs, with usage in a database:
//! `cargo bench --features postgres --bench scenarios`.
//!
//! Requests come on a fixed schedule, whether or not the ones before are done, from a caller pinned
//! to core 0; everything else, the database included, runs on core 1. Two times are taken: the
//! request's own, and the time from when it was due to when it was done. A map that keeps nothing
//! does the same look-ups beside them, so that what the machine itself costs at a rate can be seen.
//! After each run the database must have what was counted. tollgate runs once more with the
//! database killed in the middle. Then each design is killed itself, in the middle of its load, in
//! a process of its own, and the database is compared with what was acknowledged.
#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_possible_wrap,
    reason = "a benchmark prints, reads the real clock, and stops where it can't go on"
)]

#[allow(clippy::unwrap_used, reason = "it is the tests'")]
#[path = "../../tests/sinks/cluster.rs"]
mod cluster;
#[path = "../common/mod.rs"]
mod common;
mod contests;
mod database;
mod designs;
mod kills;
mod loads;
#[allow(dead_code, clippy::unwrap_used, clippy::print_stderr, reason = "it is the tests'")]
#[path = "../../tests/sinks/servers.rs"]
mod servers;

use common::AnyError;
use common::keys::Users;
use common::options::{FILTER, Options};
use common::pin::pin;
use common::report::Report;
use contests::Contest;
use database::Database;
use loads::Load;

const USERS: Users = Users::Zipf(10_000);
const CALLER_CORE: usize = 0;
const OTHERS_CORE: usize = 1;
/// How often what takes a microsecond or less is measured; the rest, once.
const REPETITIONS: usize = 5;

fn main() -> Result<(), AnyError> {
    // Threads and processes inherit the core of the thread that starts them.
    pin(OTHERS_CORE);
    if let Some(task) = kills::Task::from_env() {
        return task.run();
    }
    let options = Options::from_args(&[FILTER, "--repetitions", "--seconds", "--patience"]);
    let Some(mut database) = Database::start() else {
        return Err("PostgreSQL's initdb and postgres are needed, in PATH or as Debian has them \
                    (apt-get install postgresql): nothing was measured"
            .into());
    };
    let mut report = Report::new("scenarios", &options);
    let mut judged = Vec::new();
    contests::print_header();
    for load in Load::ALL.into_iter().filter(|load| options.wants(load.name())) {
        let mut contests = Contest::all(load);
        let mut quiet = options.quiet();
        for repetition in 0..options.repetitions_or(REPETITIONS, 1) {
            // Each repetition begins with another one.
            contests.rotate_left(repetition.min(1));
            for contest in &mut contests {
                if repetition == 0 || contest.is_repeated() {
                    contest.measure(&options, &mut quiet, &mut database)?;
                }
            }
        }
        contests.sort_by_key(Contest::place);
        judged.extend(contests::tell(&contests, &mut report));
    }
    if options.wants("killed") {
        judged.extend(kills::measure(&options, &mut database, &mut report)?);
    }
    println!("\nTargets:");
    judged.into_iter().for_each(|row| report.add(row));
    println!("\n(the database is among the others whose use of the processors is counted)");
    report.finish()
}
