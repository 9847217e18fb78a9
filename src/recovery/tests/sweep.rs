//! Every golden directory, damaged in every way: flipped bits, cut files, files in each other's
//! place, files gone.
//!
//! For each case an open finds the exact state, or reports what it left out and counts no more than
//! was counted, or refuses, names a file, and changes nothing. `verify` says beforehand which. What
//! is refused is salvaged, to a directory that opens and counts no more. Nothing panics, or takes
//! memory beyond a multiple of the files.
//!
//! The state is all that [`Found`] says, not only what is used.
//!
//! By default zero bytes, and lengths beyond 4 KiB, are sampled; `TOLLGATE_SWEEP=all` takes them
//! all.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::allocations::peak_of;
use super::golden::{self, Golden};
use super::*;
use crate::clock::uptime;
use crate::ledger::{Answer, Parts, Remembering, Settlement};
use crate::model::{Definition, ReservationId};
use crate::recovery::salvage::salvage_on;
use crate::recovery::verify::{Verdict, verify_on};
use crate::storage::sim::Image;

/// The table of quotas that every recovery sets up, buffers of fixed sizes.
const MEMORY_BASE: usize = 1 << 20;
/// Files in memory, decoded sums, and the simulated disk, which keeps each file twice.
const MEMORY_FACTOR: usize = 16;

fn is_full() -> bool {
    std::env::var("TOLLGATE_SWEEP").is_ok_and(|value| value == "all")
}

/// How many cases came out which way.
#[derive(Debug, Default)]
struct Tally {
    cases: u64,
    exact: u64,
    /// Of these: with damage that an open does not see.
    weakened: u64,
    reported: u64,
    refused: u64,
    /// Of these: salvaged without a loss.
    salvaged_exactly: u64,
    memory_max: usize,
}

impl Tally {
    fn print(&self, what: &str) {
        // Shown by `--nocapture`, and when a test fails.
        #[expect(clippy::print_stderr, reason = "what a test did")]
        {
            eprintln!("{what}: {self:?}");
        }
    }
}

/// A golden directory about to be damaged.
struct Sweep<'a> {
    golden: &'a Golden,
    image: Image,
    /// What the undamaged directory holds.
    exact: Found,
    /// The same directory at another time: a file from then may lead back or ahead, or hide what a
    /// ring held, without a word, see `docs/durability.md`.
    other_time: Option<&'a Golden>,
    tally: Tally,
}

/// By quota and user.
type Used = BTreeMap<(u16, u64), u64>;

/// What a recovery finds.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Found {
    /// What is used, where anything is; whichever counters there are.
    used: Used,
    /// The limits of their own that counters have.
    limits: BTreeMap<(u16, u64), u64>,
    quotas: Vec<Definition>,
    open: Vec<(ReservationId, Timestamp, Parts)>,
    settled: Vec<(ReservationId, Settlement, Timestamp)>,
    answers: Vec<Answer>,
    /// Where the sinks are, and what is kept for them. Not of a directory that was salvaged.
    sinks: Vec<SinkState>,
}

impl Found {
    fn new(table: &Table, quotas: &Quotas, ledger: &Ledger, now: Timestamp) -> Self {
        let (mut used, mut limits) = (Used::new(), BTreeMap::new());
        table.for_each(|key, live| {
            let at = (key.quota.as_u16(), key.user);
            let own = live.limit(u64::MAX);
            if own < u64::MAX {
                limits.insert(at, own);
            }
            let amount = live.cell.load().used();
            if amount > 0 {
                used.insert(at, amount);
            }
        });
        Self {
            used,
            limits,
            quotas: quotas.iter().map(|quota| quota.definition().clone()).collect(),
            open: ledger.open().map(|(id, at, parts)| (id, at, parts.clone())).collect(),
            settled: ledger.settled(now),
            answers: ledger.answers(now).collect(),
            sinks: Vec::new(),
        }
    }

    fn without_sinks(&self) -> Self {
        Self { sinks: Vec::new(), ..self.clone() }
    }
}

impl<'a> Sweep<'a> {
    fn new(golden: &'a Golden) -> Self {
        let disk = golden.disk();
        let image = disk.snapshot_image();
        let recovered = recover(&disk.storage(), &wanted(golden)).unwrap();
        let Recovered { table, quotas, ledger, sinks, .. } = recovered;
        let exact = Found { sinks, ..Found::new(&table, &quotas, &ledger, golden.now) };
        for (key, &used) in &golden.used {
            assert_eq!(exact.used.get(key).copied().unwrap_or(0), used, "{key:?}");
        }
        Self { golden, image, exact, other_time: None, tally: Tally::default() }
    }

    /// What a look finds.
    fn found(&self, state: State) -> Found {
        let State { table, quotas, cold, .. } = state;
        let quotas = quotas.into_inner().unwrap_or_else(Quotas::new);
        Found::new(&table, &quotas, &cold.into_ledger(), self.golden.now)
    }

    /// What a recovery finds, without the flushers' threads, and what it reports; or why not.
    fn recovered(&self, disk: &Arc<SimDisk>) -> Result<(Found, RecoveryReport)> {
        let Recovered { table, quotas, ledger, sinks, report, .. } =
            recover(&disk.storage(), &wanted(self.golden))?;
        let found = Found::new(&table, &quotas, &ledger, self.golden.now);
        Ok((Found { sinks, ..found }, report))
    }

    fn damage(&mut self, context: &str, damage: impl FnOnce(&SimDisk)) {
        let context = format!("{}: {context}", self.golden.name);
        let disk = SimDisk::from_image(&self.image, 2);
        damage(&disk);
        let files: usize = disk
            .file_names()
            .iter()
            .filter_map(|name| disk.file(name))
            .map(|file| file.len())
            .sum();
        let began = uptime();
        let ((), peak) = peak_of(|| self.examine(&disk, &context));
        assert!(uptime() - began < Duration::from_secs(20), "{context}: it takes long");
        assert!(
            peak <= MEMORY_BASE + MEMORY_FACTOR * files,
            "{context}: {peak} bytes of memory for {files} bytes"
        );
        self.tally.memory_max = self.tally.memory_max.max(peak);
        self.tally.cases += 1;
    }

    fn examine(&mut self, disk: &Arc<SimDisk>, context: &str) {
        let (verification, state) = verify_on(&disk.storage(), self.golden.now)
            .unwrap_or_else(|error| panic!("{context}: verify: {error}"));
        if let Verdict::Refused(error) = &verification.verdict {
            self.refused(disk, error, context);
            return;
        }
        let state = state.unwrap_or_else(|| panic!("{context}: not refused"));
        let (seen, findings) = (self.found(state), &verification.report.findings);
        let recovered = self.recovered(disk);
        let (found, report) = recovered.unwrap_or_else(|error| panic!("{context}: {error}"));
        assert_eq!((&found.without_sinks(), &report.findings), (&seen, findings), "{context}");
        match verification.verdict {
            Verdict::Findings => {
                assert!(!findings.is_empty(), "{context}: no finding");
                self.assert_no_more(&found.used, context);
                self.tally.reported += 1;
            }
            _ => {
                assert!(findings.is_empty(), "{context}: {findings:?}");
                self.assert_exact(&found, &self.exact_in(disk), context);
                self.tally.exact += 1;
                let is_weakened = matches!(verification.verdict, Verdict::Weakened);
                self.tally.weakened += u64::from(is_weakened);
            }
        }
        let second = self.recovered(disk);
        let (again, _) = second.unwrap_or_else(|error| panic!("{context}, again: {error}"));
        assert_eq!(again, found, "{context}: a second recovery differs");
    }

    /// An open refuses too, for the same reason, and changes nothing. What is refused can be
    /// salvaged.
    fn refused(&mut self, disk: &Arc<SimDisk>, error: &Error, context: &str) {
        let files = || -> Vec<_> {
            disk.file_names().into_iter().map(|name| (disk.file(&name), name)).collect()
        };
        let before = files();
        match self.recovered(disk) {
            Err(other) => assert_eq!(other.to_string(), error.to_string(), "{context}"),
            Ok((found, _)) => panic!("{context}: opened with {found:?}, but verify said {error}"),
        }
        assert!(files() == before, "{context}: a refused open changed something");
        match error {
            Error::Damaged { path, .. } | Error::UnsupportedVersion { path, .. } => {
                assert!(path.file_name().is_some(), "{context}: {error} names no file");
            }
            error => panic!("{context}: {error}"),
        }
        let target = SimDisk::new(4);
        let salvaged = salvage_on(&disk.storage(), &target.storage(), self.golden.now);
        let (salvage, state) =
            salvaged.unwrap_or_else(|error| panic!("{context}: salvage: {error}"));
        assert!(files() == before, "{context}: salvage changed something");
        let found = self.found(state);
        self.assert_no_more(&found.used, context);
        let recovered = self.recovered(&target);
        let (again, report) =
            recovered.unwrap_or_else(|error| panic!("{context}, salvaged: {error}"));
        assert_eq!((&again, report.findings), (&found, Vec::new()), "{context}, salvaged");
        if salvage.losses.is_empty() {
            self.assert_exact(&found, &self.exact.without_sinks(), &format!("{context}, salvaged"));
            self.tally.salvaged_exactly += 1;
        }
        self.tally.refused += 1;
    }

    /// Nobody knows of a sink whose state is gone and that has no backlog: its position decides.
    fn exact_in(&self, disk: &SimDisk) -> Found {
        let mut exact = self.exact.clone();
        exact.sinks.retain(|sink| {
            !sink.backlog.is_empty() || disk.file(&sinks::file_name(&sink.name)).is_some()
        });
        exact
    }

    /// Exact; or, with a file of the same directory from another time, no more than was counted:
    /// such a file is as good as the right one.
    fn assert_exact(&self, found: &Found, exact: &Found, context: &str) {
        if self.other_time.is_some() {
            self.assert_no_more(&found.used, context);
        } else {
            assert_eq!(found, exact, "{context}: not exact, without a word");
        }
    }

    fn assert_no_more(&self, used: &Used, context: &str) {
        for (key, used) in used {
            let of = |golden: &Golden| golden.most.get(key).copied().unwrap_or(0);
            let most = of(self.golden).max(self.other_time.map_or(0, of));
            assert!(*used <= most, "{context}: {key:?} has {used}, but only {most} was counted");
        }
    }
}

fn wanted(golden: &Golden) -> Wanted {
    Wanted {
        lanes: golden.lanes,
        lane_records: golden.lane_records,
        journal_file_bytes: 4096,
        shards: 2,
        counters_expected: 0,
        remembering: Remembering::ALL,
        now: golden.now,
    }
}

fn flip_every_bit(name: &'static str) {
    let golden = golden::load(name);
    let mut sweep = Sweep::new(&golden);
    for (file, bytes) in &golden.files {
        for (offset, &byte) in bytes.iter().enumerate() {
            let bits = if byte != 0 || is_full() {
                0..8
            } else if offset.is_multiple_of(61) {
                offset / 61 % 8..offset / 61 % 8 + 1
            } else {
                continue;
            };
            for bit in bits {
                sweep.damage(&format!("bit {bit} of byte {offset} of {file}"), |disk| {
                    disk.corrupt(file, offset as u64, 1 << bit).unwrap();
                });
            }
        }
    }
    sweep.tally.print(&format!("flipped bits of {name}"));
}

fn cut_at_every_length(name: &'static str) {
    let golden = golden::load(name);
    let mut sweep = Sweep::new(&golden);
    for (file, bytes) in &golden.files {
        let is_sampled = |len| len >= 4096 && !is_full();
        for len in (0..bytes.len()).filter(|&len| !is_sampled(len) || len % 97 == 0) {
            sweep.damage(&format!("{file} cut to {len}"), |disk| disk.put(file, &bytes[..len]));
        }
    }
    sweep.tally.print(&format!("cut files of {name}"));
}

macro_rules! each_golden {
    ($($name:literal: $flip:ident, $cut:ident;)*) => {
        $(
            #[test]
            fn $flip() {
                flip_every_bit($name);
            }

            #[test]
            fn $cut() {
                cut_at_every_length($name);
            }
        )*
    };
}

each_golden! {
    "v1/closed": flipped_bits_of_closed, cut_files_of_closed;
    "v1/killed": flipped_bits_of_killed, cut_files_of_killed;
    "v1/skips": flipped_bits_of_skips, cut_files_of_skips;
    "v1/snapshot": flipped_bits_of_snapshot, cut_files_of_snapshot;
    "v1/generations": flipped_bits_of_generations, cut_files_of_generations;
    "v1/limits": flipped_bits_of_limits, cut_files_of_limits;
    "v1/sinks": flipped_bits_of_sinks, cut_files_of_sinks;
    "v1/windows": flipped_bits_of_windows, cut_files_of_windows;
    "v2/ledger": flipped_bits_of_ledger, cut_files_of_ledger;
    "v2/events": flipped_bits_of_events, cut_files_of_events;
    "v3/answers": flipped_bits_of_answers, cut_files_of_answers;
}

#[test]
fn files_that_are_gone() {
    let mut cases = 0;
    for name in golden::NAMES {
        let golden = golden::load(name);
        let mut sweep = Sweep::new(&golden);
        for file in golden.files.keys() {
            sweep.damage(&format!("{file} gone"), |disk| assert!(disk.delete(file)));
        }
        sweep.tally.print(&format!("files gone from {name}"));
        cases += sweep.tally.cases;
    }
    assert!(cases > 40, "{cases}");
}

/// Two files of one directory in each other's place.
#[test]
fn swapped_files() {
    let mut cases = 0;
    for name in golden::NAMES {
        let golden = golden::load(name);
        let mut sweep = Sweep::new(&golden);
        for (one, bytes) in &golden.files {
            for (other, other_bytes) in golden.files.range(one.clone()..).skip(1) {
                sweep.damage(&format!("{one} and {other} swapped"), |disk| {
                    disk.put(one, other_bytes);
                    disk.put(other, bytes);
                });
            }
        }
        sweep.tally.print(&format!("swapped files of {name}"));
        cases += sweep.tally.cases;
    }
    assert!(cases > 100, "{cases}");
}

fn kind(file: &str) -> &str {
    file.split(['-', '.']).next().unwrap_or_default()
}

/// A file in the place of another directory's of the same kind, and in addition to them.
#[test]
fn files_of_other_directories() {
    let all = golden::NAMES.map(golden::load);
    let mut cases = 0;
    for golden in &all {
        let mut sweep = Sweep::new(golden);
        for foreign in all.iter().filter(|other| other.name != golden.name) {
            let is_same = foreign.files["tollgate.id"] == golden.files["tollgate.id"];
            sweep.other_time = is_same.then_some(foreign);
            for (other, bytes) in &foreign.files {
                for file in golden.files.keys().filter(|file| kind(file) == kind(other)) {
                    let context = format!("{}'s {other} as {file}", foreign.name);
                    sweep.damage(&context, |disk| disk.put(file, bytes));
                }
                if !golden.files.contains_key(other) {
                    let context = format!("{}'s {other} too", foreign.name);
                    sweep.damage(&context, |disk| disk.put(other, bytes));
                }
            }
        }
        sweep.tally.print(&format!("files of others in {}", golden.name));
        cases += sweep.tally.cases;
    }
    assert!(cases > 500, "{cases}");
}
