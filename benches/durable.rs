//! What a consume costs that survives loss of power: `cargo bench --bench durable`.
//!
//! The baseline is the least that any log can do: a loop of `pwrite` and `fdatasync` of as many
//! bytes as tollgate writes for one consume, into a file that was written with zeros before, on the
//! same file system. redb commits one increment durably. The contestants take turns every few
//! hundred operations, since a disk's mood changes by the minute.
//!
//! What many threads could reach at most is the pace at which the kernel puts them to sleep and
//! wakes them: of threads that do nothing else, woken by that loop.
#![allow(
    clippy::expect_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a benchmark prints, reads the real clock, and stops where it can't go on"
)]

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition};
use rustix::thread::futex;
use tempfile::TempDir;
use tollgate::Config;

use common::AnyError;
use common::gates::{Gate, fresh_dir};
use common::keys::Users;
use common::options::Options;
use common::report::{Report, Row, Target};

const USERS: Users = Users::Uniform(100_000);
const THREADS: usize = 64;

fn main() -> Result<(), AnyError> {
    let options = Options::from_args(&["--repetitions", "--seconds", "--patience"]);
    let mut report = Report::new("durable", &options);
    let operations = options.size(400, 40);
    let users = USERS.draw(operations, 1);
    let gate = Gate::open(Config::default())?;
    gate.populate(USERS.count())?;
    let record = bytes_of_a_commit(&gate, &users)?;
    let raw = RawLog::new(record)?;
    let mut redb = Redb::new()?;
    // As tollgate was by now: files and memory are not new.
    micros(&users, |_| raw.append())?;
    micros(&users, |user| redb.add(user))?;
    println!("tollgate writes {record} bytes for a lone consume");

    let (mut of_raw, mut of_gate, mut of_redb) = (Vec::new(), Vec::new(), Vec::new());
    let (mut raw_rate, mut gate_rate, mut woken_rate) = (Vec::new(), Vec::new(), Vec::new());
    let (mut quiet, mut attempts) = (options.quiet(), 0);
    for repetition in 0..options.repetitions() {
        let measured = quiet.run(|| {
            attempts += 1;
            measure(repetition, &gate, &raw, &mut redb, &users, options.seconds(2, 1))
        })?;
        of_raw.push(measured.raw);
        of_gate.push(measured.gate);
        of_redb.push(measured.redb);
        raw_rate.push(1e6 / measured.raw_again);
        gate_rate.push(measured.many_threads);
        woken_rate.push(measured.many_woken);
    }
    redb.verify((operations * (attempts + 1)) as u64)?;

    let (one, many) = ("1 thread", "64 threads");
    report.add(Row::new(one, "pwrite + fdatasync", "us", &of_raw));
    let row = Row::new(one, "consume_sync", "us", &of_gate);
    report.add(row.against("pwrite + fdatasync", &of_raw, Target::AtMost(1.5)));
    let row = Row::new(one, "redb, one increment", "us", &of_redb);
    report.add(row.against("pwrite + fdatasync", &of_raw, None));
    let row = Row::new(many, "consume_sync", "/s", &gate_rate);
    report.add(row.against("1 raw loop", &raw_rate, Target::AtLeast(20.0)));
    let row = Row::new(many, "only woken by a raw loop", "/s", &woken_rate);
    report.add(row.against("1 raw loop", &raw_rate, None));
    report.finish()
}

/// One repetition: microseconds, and consumes a second of the many threads.
struct Measured {
    raw: f64,
    gate: f64,
    redb: f64,
    raw_again: f64,
    many_threads: f64,
    many_woken: f64,
}

/// Each repetition begins with another one.
fn measure(
    repetition: usize,
    gate: &Gate,
    raw: &RawLog,
    redb: &mut Redb,
    users: &[u32],
    seconds: u64,
) -> Result<Measured, AnyError> {
    let mut lone = [0.0; 3];
    for turn in 0..lone.len() {
        let contestant = (turn + repetition) % lone.len();
        lone[contestant] = match contestant {
            0 => micros(users, |_| raw.append()),
            1 => micros(users, |user| {
                gate.gate.consume_sync(user.into(), gate.quota, 1)?;
                Ok(())
            }),
            _ => micros(users, |user| redb.add(user)),
        }?;
    }
    let [raw_alone, gate_alone, redb_alone] = lone;
    Ok(Measured {
        raw: raw_alone,
        gate: gate_alone,
        redb: redb_alone,
        // Again, right before the many threads that are compared with it.
        raw_again: micros(users, |_| raw.append())?,
        many_threads: many_threads(gate, seconds)?,
        many_woken: many_woken(raw, seconds)?,
    })
}

/// Microseconds for each operation.
fn micros(
    users: &[u32],
    mut operate: impl FnMut(u32) -> Result<(), AnyError>,
) -> Result<f64, AnyError> {
    let start = Instant::now();
    for &user in users {
        operate(user)?;
    }
    Ok(start.elapsed().as_secs_f64() * 1e6 / users.len() as f64)
}

/// How many bytes go to the journal for one consume when it is alone.
fn bytes_of_a_commit(gate: &Gate, users: &[u32]) -> Result<usize, AnyError> {
    let before = gate.gate.stats();
    for &user in users {
        gate.gate.consume_sync(user.into(), gate.quota, 1)?;
    }
    let after = gate.gate.stats();
    let batches = (after.batches - before.batches).max(1);
    Ok(((after.bytes_to_disk - before.bytes_to_disk) / batches).max(1) as usize)
}

/// Consumes a second by all threads together. Each waits for the disk before its next.
fn many_threads(gate: &Gate, seconds: u64) -> Result<f64, AnyError> {
    let before = gate.used(USERS.count());
    let total = AtomicU64::new(0);
    let drawn = USERS.draw_for_threads(THREADS, 1 << 12);
    let start = Instant::now();
    let end = start + Duration::from_secs(seconds);
    thread::scope(|scope| {
        for users in &drawn {
            let total = &total;
            scope.spawn(move || {
                let mut count = 0;
                for &user in users.iter().cycle() {
                    let result = gate.gate.consume_sync(user.into(), gate.quota, 1);
                    result.expect("the disk works");
                    count += 1;
                    if Instant::now() >= end {
                        break;
                    }
                }
                // Relaxed: read when the threads have ended.
                total.fetch_add(count, Ordering::Relaxed);
            });
        }
    });
    let total = total.into_inner();
    let rate = total as f64 / start.elapsed().as_secs_f64();
    assert_eq!(gate.used(USERS.count()), before + total, "every operation counts");
    Ok(rate)
}

/// How often a second threads that only sleep are woken by a loop that only syncs.
fn many_woken(raw: &RawLog, seconds: u64) -> Result<f64, AnyError> {
    let (syncs, is_over, woken) = (AtomicU32::new(0), AtomicBool::new(false), AtomicU64::new(0));
    let start = Instant::now();
    let end = start + Duration::from_secs(seconds);
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                let mut count = 0;
                while !is_over.load(Ordering::Acquire) {
                    // It returns at once where another sync has ended since.
                    let seen = syncs.load(Ordering::Acquire);
                    if futex::wait(&syncs, futex::Flags::PRIVATE, seen, None).is_ok() {
                        count += 1;
                    }
                }
                // Relaxed: read when the threads have ended.
                woken.fetch_add(count, Ordering::Relaxed);
            });
        }
        let mut synced = Ok(());
        while synced.is_ok() && Instant::now() < end {
            synced = raw.append();
            syncs.fetch_add(1, Ordering::Release);
            futex::wake(&syncs, futex::Flags::PRIVATE, i32::MAX as u32)?;
        }
        is_over.store(true, Ordering::Release);
        syncs.fetch_add(1, Ordering::Release);
        futex::wake(&syncs, futex::Flags::PRIVATE, i32::MAX as u32)?;
        synced
    })?;
    Ok(woken.into_inner() as f64 / start.elapsed().as_secs_f64())
}

/// The least that a log can do.
struct RawLog {
    file: File,
    record: Vec<u8>,
    position: std::cell::Cell<u64>,
    // After the file, so that it is closed first.
    _dir: TempDir,
}

impl RawLog {
    const BYTES: usize = 8 << 20;

    fn new(record: usize) -> Result<Self, AnyError> {
        let dir = fresh_dir()?;
        let path = dir.path().join("log");
        let file = File::create_new(path)?;
        file.write_all_at(&vec![0; Self::BYTES], 0)?;
        file.sync_all()?;
        Ok(Self { file, record: vec![0xA5; record], position: 0.into(), _dir: dir })
    }

    fn append(&self) -> Result<(), AnyError> {
        let at = self.position.get();
        self.file.write_all_at(&self.record, at)?;
        self.file.sync_data()?;
        let next = at + self.record.len() as u64;
        let is_full = next + self.record.len() as u64 > Self::BYTES as u64;
        self.position.set(if is_full { 0 } else { next });
        Ok(())
    }
}

/// An embedded store that commits each increment durably.
struct Redb {
    database: Database,
    _dir: TempDir,
}

const COUNTS: TableDefinition<'_, (u64, u16), u64> = TableDefinition::new("counts");

impl Redb {
    fn new() -> Result<Self, AnyError> {
        let dir = fresh_dir()?;
        let database = Database::create(dir.path().join("redb"))?;
        let transaction = database.begin_write()?;
        {
            let mut table = transaction.open_table(COUNTS)?;
            for user in 0..USERS.count() {
                table.insert((user.into(), 0), 0)?;
            }
        }
        transaction.commit()?;
        Ok(Self { database, _dir: dir })
    }

    fn add(&mut self, user: u32) -> Result<(), AnyError> {
        let mut transaction = self.database.begin_write()?;
        transaction.set_durability(Durability::Immediate)?;
        {
            let mut table = transaction.open_table(COUNTS)?;
            let key = (user.into(), 0);
            let count = table.get(key)?.map_or(0, |count| count.value());
            table.insert(key, count + 1)?;
        }
        transaction.commit()?;
        Ok(())
    }

    fn verify(&self, operations: u64) -> Result<(), AnyError> {
        let table = self.database.begin_read()?.open_table(COUNTS)?;
        let counts = table.range::<(u64, u16)>(..)?;
        let total: Result<u64, redb::StorageError> =
            counts.map(|entry| entry.map(|(_, count)| count.value())).sum();
        assert_eq!(total?, operations, "redb has counted every operation");
        Ok(())
    }
}
