//! What the kills (`tests/crash`) and the power cuts (`tests/power`) share: a process that counts
//! in a data directory, life after life, and what must be found there after each of its deaths.

mod child;
mod groups;
mod limits;
mod page;
mod requests;
mod verdict;
mod worker;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Signal, set_parent_process_death_signal};
use tollgate::{AMOUNT_MAX, Config, ManualClock, Quota, QuotaId, Timestamp, Tollgate, Window};

use limits::Limits;
pub(crate) use page::{Answered, Count, Open, Page, Phase, Request, Tally};
pub(crate) use verdict::{Level, examine_twice};
use verdict::{examine, settle};

pub(crate) const THREADS: usize = 3;
pub(crate) const USERS: usize = 8;
/// The kinds of quotas, by their place in [`quotas`]; between these, one with a limit.
pub(crate) const UNLIMITED: usize = 0;
pub(crate) const PER_MINUTE: usize = 2;
/// Its default limit changes, and users get limits of their own and lose them.
pub(crate) const ADJUSTED: usize = 3;
pub(crate) const QUOTAS: usize = 4;
/// Counters of these users.
pub(crate) const SINGLES: usize = USERS * QUOTAS;
/// Two counters more, without a limit, that are only ever changed together.
pub(crate) const PAIR: [usize; 2] = [SINGLES, SINGLES + 1];
pub(crate) const COUNTERS: usize = SINGLES + PAIR.len();
/// So low that it binds.
pub(crate) const LIMIT: u64 = 300;
/// Default limits of [`ADJUSTED`] are even and users' own are odd, so that it can be told which of
/// them applies. No higher than this.
pub(crate) const ADJUSTED_MAX: u64 = 400;
const WINDOW_MS: u64 = 60_000;
/// 2026-01-01: a window begins.
const START_MS: u64 = 1_767_225_600_000;
/// Only a hang takes so long without a sign of life: a minute at least.
const LOOKS_MAX: u32 = 1_200_000;
/// A run of at least so many deaths must meet everything, or it has shown nothing.
const DEATHS_THAT_MEET_ALL: u64 = 50;
/// How many times as many deaths there may be until all has been met.
const LONGER_AT_MOST: u64 = 4;
/// What a child says by its exit code where it found a promise broken.
pub(crate) const VIOLATION: u8 = 3;
/// What a run of kills or of power cuts must have met.
pub(crate) const EVENTS: [Count; 6] = [
    Count::Promised,
    Count::Denied,
    Count::AskedAgain,
    Count::Windows,
    Count::Changes,
    Count::CoveredUnasked,
];

/// SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// A counter's user and kind of quota. Users lie far apart, so that batches are not small.
pub(crate) fn split(counter: usize) -> (u64, usize) {
    match counter.checked_sub(SINGLES) {
        Some(index) => (1 << (60 + index), UNLIMITED),
        None => ((counter / QUOTAS) as u64 * 0x0123_4567_89ab, counter % QUOTAS),
    }
}

/// The ids of the quotas, which are defined where they are missing.
pub(crate) fn quotas(gate: &Tollgate) -> tollgate::Result<[QuotaId; QUOTAS]> {
    Ok([
        gate.define(Quota::new("unlimited", AMOUNT_MAX))?,
        gate.define(Quota::new("limited", LIMIT))?,
        gate.define(Quota::new("per-minute", LIMIT).window(Window::Minute))?,
        match gate.quota_by_name("adjusted") {
            Some(id) => id,
            None => gate.define(adjusted(ADJUSTED_MAX))?,
        },
    ])
}

pub(crate) fn adjusted(limit: u64) -> Quota {
    Quota::new("adjusted", limit)
}

/// What makes durable what is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Syncs {
    /// Every call, before it returns.
    EachCall,
    /// Calls for which their caller waits, and the syncs in the background.
    SomeCalls,
    /// The syncs in the background alone.
    Interval,
    /// Only the close, or a merge: the rings go round without the journal being synced.
    Close,
}

impl Syncs {
    pub(crate) fn each_call(self) -> bool {
        self == Self::EachCall
    }

    /// Whether nobody waits for the disk.
    pub(crate) fn no_call(self) -> bool {
        matches!(self, Self::Interval | Self::Close)
    }
}

/// An open engine and what it was opened with.
pub(crate) struct Life {
    pub(crate) gate: Tollgate,
    pub(crate) clock: ManualClock,
    pub(crate) syncs: Syncs,
    pub(crate) limits: Limits,
}

/// Opens the directory with bounds so small that all of them are met, and a geometry that changes
/// with the seed. The clock goes on where the page's is.
pub(crate) fn open(dir: &Path, page: &Page, seed: u64) -> tollgate::Result<Life> {
    let mut random = Random(seed);
    let clock = clock_of(page);
    let syncs = match random.below(8) {
        0 => Syncs::EachCall,
        1 | 2 => Syncs::Interval,
        3 => Syncs::Close,
        _ => Syncs::SomeCalls,
    };
    // Drained seldom, a lane goes far along its ring.
    let drain_us = if random.below(2) == 0 { 200 } else { 50_000 };
    let sync_ms = if syncs == Syncs::Close { 60_000 } else { 1 + random.below(10) };
    let config = Config::default()
        .lanes(1 + random.below(3) as usize)
        .lane_records(64 << random.below(4))
        .shards(4)
        .journal_file_bytes(64 << 10)
        .snapshot_journal_bytes(64 << 10)
        .sync_interval(Duration::from_millis(sync_ms))
        .drain_interval(Duration::from_micros(drain_us))
        .backpressure_deadline(Duration::from_secs(60))
        .closed_window_retention(Duration::from_secs(60 * random.below(4)))
        .durable_consumes(syncs.each_call())
        .clock(Arc::new(clock.clone()));
    let gate = Tollgate::open(dir, config)?;
    Ok(Life { gate, clock, syncs, limits: Limits::of(page) })
}

/// The clock that all lives of a page have.
pub(crate) fn clock_of(page: &Page) -> ManualClock {
    ManualClock::new(Timestamp::from_unix_millis(START_MS + page.clock() * WINDOW_MS))
}

/// The window, counted from [`START_MS`], that starts from zero again at this time.
pub(crate) fn window_until(resets_at: Option<Timestamp>) -> Option<u64> {
    resets_at.map(|time| (time.as_unix_millis() - START_MS) / WINDOW_MS - 1)
}

/// Starts this program again, as a process that counts until it is ended.
pub(crate) fn spawn(level: Level, dir: &Path, page: &Path, seed: u64) -> std::io::Result<Child> {
    spawn_as(["--child", level.name()], dir, page, seed)
}

/// As [`spawn`], for a child of another kind.
pub(crate) fn spawn_as(
    kind: [&str; 2],
    dir: &Path,
    page: &Path,
    seed: u64,
) -> std::io::Result<Child> {
    Command::new(std::env::current_exe()?)
        .args(kind)
        .arg(dir)
        .arg(page)
        .arg(seed.to_string())
        .stdin(Stdio::null())
        .spawn()
}

/// What this process was started as, and with what; `None` where it is not a child.
pub(crate) fn child_arguments() -> Option<(String, String, PathBuf, Page, u64)> {
    let mut arguments = std::env::args().skip(1);
    let flag = arguments.next().filter(|flag| flag.starts_with("--child"))?;
    // A test that is killed leaves nothing behind.
    set_parent_process_death_signal(Some(Signal::KILL)).expect("the kernel ends it");
    let mut argument = || arguments.next().expect("the parent gives all arguments");
    let (kind, dir, page, seed) = (argument(), argument(), argument(), argument());
    let page = Page::open(Path::new(&page));
    Some((flag, kind, PathBuf::from(dir), page, seed.parse().expect("a seed")))
}

/// What a child does; `None` where this process is not one.
pub(crate) fn child_main() -> Option<ExitCode> {
    let (_, level, dir, page, seed) = child_arguments().filter(|(flag, ..)| flag == "--child")?;
    let found = child::run(Level::named(&level), &dir, &page, seed);
    Some(end(&page, &found))
}

/// Says what a child found and how it ends by that.
pub(crate) fn end(page: &Page, found: &str) -> ExitCode {
    if page.is_cut() {
        // Whatever failed may have failed for that.
        std::thread::sleep(Duration::from_secs(60));
    }
    eprintln!("{found}");
    ExitCode::from(VIOLATION)
}

/// Waits for an instant at which to end the child: some time later, or soon after a phase began.
/// `meanwhile` is called again and again. An error where the child comes to nothing more.
pub(crate) fn wait_for_moment(
    child: &mut Child,
    page: &Page,
    random: &mut Random,
    mut meanwhile: impl FnMut(),
) -> Result<(), String> {
    let mut pause = |micros| {
        meanwhile();
        std::thread::sleep(Duration::from_micros(micros));
    };
    let phase = match random.below(8) {
        0 => {
            pause(random.below(3_000));
            return Ok(());
        }
        1 => {
            (0..20).for_each(|_| pause(random.below(1_000)));
            return Ok(());
        }
        2 => {
            (0..20).for_each(|_| pause(random.below(4_000)));
            return Ok(());
        }
        3 => Phase::Opening,
        5 => Phase::Merging,
        6 => Phase::Closing,
        _ => Phase::Counting,
    };
    let (mut turns, mut looks) = (page.counted(Count::Turns), 0);
    while !page.is_in(phase) {
        pause(50);
        looks += 1;
        let now = page.counted(Count::Turns);
        if now != turns {
            (turns, looks) = (now, 0);
        }
        if child.try_wait().map_err(|error| format!("no child: {error}"))?.is_some() {
            return Ok(());
        }
        if looks > LOOKS_MAX {
            return Err(format!(
                "the child hangs before it comes to {phase:?}, after {turns} turns"
            ));
        }
    }
    let micros = if random.below(2) == 0 { 300 } else { 3_000 };
    pause(random.below(micros));
    Ok(())
}

/// In what phases children were ended.
#[derive(Debug, Default)]
pub(crate) struct Moments {
    pub(crate) deaths: u64,
    counts: [u64; Phase::ALL.len()],
}

impl Moments {
    pub(crate) fn note(&mut self, page: &Page) {
        self.deaths += 1;
        for (count, phase) in self.counts.iter_mut().zip(Phase::ALL) {
            *count += u64::from(page.is_in(phase));
        }
    }

    /// Whether a run that was to be of `deaths` is over. Where it has not met each phase often
    /// enough, or one of these events never, it goes on for longer; an error at last.
    pub(crate) fn suffice(&self, deaths: u64, events: &[(Count, u64)]) -> Result<bool, String> {
        let count = self.deaths;
        if count < deaths || deaths < DEATHS_THAT_MEET_ALL {
            return Ok(count == deaths);
        }
        let [_, phases @ ..] = self.counts;
        let rare = phases.iter().zip(&Phase::ALL[1..]).filter(|(count, _)| **count < deaths / 25);
        let rare = rare.map(|(_, phase)| format!("{phase:?}"));
        let never = events.iter().filter(|(_, count)| *count == 0);
        let missing: Vec<_> = rare.chain(never.map(|(event, _)| format!("{event:?}"))).collect();
        match missing.is_empty() {
            false if count >= LONGER_AT_MOST * deaths => {
                Err(format!("after {count} deaths, these were not met, or hardly: {missing:?}"))
            }
            is_complete => Ok(is_complete),
        }
    }
}

impl std::fmt::Display for Moments {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [starting, opening, counting, closing, merging] = self.counts;
        write!(
            f,
            "{starting} before open, {opening} in open, {counting} while counting ({merging} of \
             all during a merge), {closing} in close"
        )
    }
}

/// How many journal files the directory has had: their numbers never come again.
pub(crate) fn journal_files(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let number = |name: String| name.strip_prefix("journal-")?.strip_suffix(".tgj")?.parse().ok();
    names.filter_map(number).max().unwrap_or(0)
}

/// A number from the environment.
pub(crate) fn number(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name} is a number")),
        Err(_) => default,
    }
}
