//! Reads everything in a data directory and cross-checks it, without changing anything.
//!
//! What an open would do is decided by the code that an open runs to load the state. Beyond that,
//! each file is read to its end, whether or not an open would need it, and each snapshot is
//! compared with the one before it and the batches in between.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use crate::clock::{Clock, SystemClock};
use crate::delivery::state::{self as sinks, SinkState};
use crate::error::{Error, Result};
use crate::fold::{FoldTable, Sum};
use crate::identity::{self, Identity};
use crate::journal::files::FileSequence;
use crate::journal::found::{FoundFiles, UnreadableFile, find_files, left_over_before};
use crate::journal::reader::read_chain;
use crate::journal::walk::check_file;
use crate::journal::writer::ChainPoint;
use crate::ledger::Remembering;
use crate::model::{BatchNumber, EngineId, QuotaId, Timestamp};
use crate::recovery::{
    RecoveryReport, State, Wanted, claims, has_content, is_ours, list, load_newest, load_sinks,
    rings, unneeded_in,
};
use crate::snapshot::deltas::{DeltaRange, DeltasReader};
use crate::snapshot::merge::{MergedSums, SortedSums, SumSource};
use crate::snapshot::state::ColdState;
use crate::snapshot::{self, Limit, SnapshotReader};
use crate::storage::{RealStorage, Storage};

/// What was found in a data directory.
#[derive(Debug)]
#[non_exhaustive]
pub struct Verification {
    /// The identity of the directory: from the identity file or, if that can't be read, the one
    /// that most other files name.
    pub engine_id: Option<EngineId>,
    /// What an open would do.
    pub verdict: Verdict,
    /// What an open would report; empty where it would refuse.
    pub report: RecoveryReport,
    /// The last batch in the journal; 0 where an open would refuse.
    pub last_batch: u64,
    /// Each file in the directory except the lock, sorted by name.
    pub files: Vec<VerifiedFile>,
}

/// What is kept for a sink.
enum Kept {
    /// These files.
    In(HashMap<String, DeltaRange>),
    /// The sink's state is missing.
    Unknown,
    /// It does not verify.
    Unreadable,
}

/// What an open would do.
#[derive(Debug)]
#[non_exhaustive]
pub enum Verdict {
    /// It would find the exact state and report nothing, and nothing in the directory is damaged.
    Sound,
    /// It would find the exact state and report nothing, but something that it does not need is
    /// damaged: a snapshot or a part of the journal to fall back on, or a file that is not in use.
    Weakened,
    /// It would open, and report what it left out or made up for.
    Findings,
    /// It would refuse, with this error. See [`salvage`](crate::salvage).
    Refused(Error),
}

/// A file.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct VerifiedFile {
    /// The name.
    pub name: String,
    /// The length.
    pub bytes: u64,
    /// What it holds, in a few words.
    pub holds: String,
    /// Where it does not verify, in bytes, and why. `None`: it verifies to its end.
    pub damage: Option<(u64, String)>,
}

/// Reads everything in a data directory, and says what an open would do. Changes not a single byte.
/// Takes the directory's lock while it reads, shared with other calls of `verify`.
///
/// Takes as long as reading all files, and memory for the journal's sums, ended reservations and
/// answered requests.
///
/// # Errors
///
/// [`Error::Locked`] while a process has the directory open; [`Error::Io`] where there is no data
/// directory, and for whatever the operating system refuses. Bad sectors and damage are not errors
/// here, but part of the [`Verdict`].
pub fn verify(dir: impl AsRef<Path>) -> Result<Verification> {
    let storage: Arc<dyn Storage> = Arc::new(RealStorage::open_locked_read_only(dir.as_ref())?);
    verify_on(&storage, SystemClock.now()).map(|(verification, _)| verification)
}

/// [`verify`] on any storage, with what an open would load if it did not refuse.
pub(super) fn verify_on(
    storage: &Arc<dyn Storage>,
    now: Timestamp,
) -> Result<(Verification, Option<State>)> {
    let identity = identity_of(storage)?;
    let engine = match &identity {
        Ok(identity) => Some(identity.engine),
        Err(_) => claims::engine(storage, None)?,
    };
    let mut names = list(storage)?;
    names.sort_unstable();
    let look = Look { storage, engine: engine.unwrap_or(EngineId(0)) };
    let content = match &identity {
        Ok(Identity { engine, is_created: false }) => has_content(storage, *engine),
        _ => Ok(true),
    };
    let is_created = *content.as_ref().unwrap_or(&true);
    let state = match (identity, content) {
        (Err(error), _) | (_, Err(error)) => Err(error),
        (Ok(_), Ok(false)) => Ok(State::empty(&wanted(now))),
        (Ok(Identity { engine, .. }), Ok(true)) => find_files(storage, engine)
            .and_then(|found| load_newest(storage, engine, &found, &wanted(now)))
            .and_then(|state| load_sinks(storage, engine, &state).map(|_| state)),
    };
    let state = match state {
        Err(error @ Error::Io { .. }) if !error.is_bad_medium() => return Err(error),
        state => state,
    };
    let mut files = if is_created {
        look.at_all(&names, state.as_ref().ok())?
    } else {
        names.iter().map(|name| look.at_begun_anew(name)).collect()
    };
    if let Err(error) = &state
        && error.is_bad_medium()
    {
        let is_it = |file: &VerifiedFile| error.names(&storage.path(&file.name));
        for file in files.iter_mut().filter(|file| file.damage.is_none() && is_it(file)) {
            file.damage = Some(place_of(error));
        }
    }
    let is_damaged = || files.iter().any(|file| file.damage.is_some());
    let (verdict, state) = match state {
        Err(error) => (Verdict::Refused(error), None),
        Ok(state) if !state.report.findings.is_empty() => (Verdict::Findings, Some(state)),
        Ok(state) if is_damaged() => (Verdict::Weakened, Some(state)),
        Ok(state) => (Verdict::Sound, Some(state)),
    };
    let report = state.as_ref().map(|state| state.report.clone()).unwrap_or_default();
    let last_batch = state.as_ref().map_or(0, |state| state.chain.last.number.0);
    Ok((Verification { engine_id: engine, verdict, report, last_batch, files }, state))
}

/// Whose directory it is, or why an open would refuse it. An error means that it is not a data
/// directory, or can't be read at all.
fn identity_of(storage: &Arc<dyn Storage>) -> Result<Result<Identity>> {
    match identity::read(storage) {
        Ok(Some(identity)) => Ok(Ok(identity)),
        Ok(None) if list(storage)?.iter().any(|name| is_ours(name)) => {
            Ok(Err(identity::missing(storage)))
        }
        Ok(None) => Err(identity::no_directory(storage)),
        Err(error @ Error::Io { .. }) if !error.is_bad_medium() => Err(error),
        Err(error) => Ok(Err(error)),
    }
}

/// For a look only.
fn wanted(now: Timestamp) -> Wanted {
    Wanted {
        lanes: 0,
        lane_records: 0,
        journal_file_bytes: 0,
        shards: 2,
        counters_expected: 0,
        remembering: Remembering::ALL,
        now,
    }
}

/// A look at the files.
struct Look<'a> {
    storage: &'a Arc<dyn Storage>,
    engine: EngineId,
}

/// What is wrong between two snapshots.
enum Link {
    /// The batches in between can't be read.
    Broken(String),
    /// They lead from the one to something other than the other.
    Differs(String),
}

/// What a file holds, and its damage.
type Said = (String, Option<(u64, String)>);

impl Look<'_> {
    fn bytes(&self, name: &str) -> u64 {
        self.storage.open(name).and_then(|file| file.len()).unwrap_or(0)
    }

    fn at_begun_anew(&self, name: &str) -> VerifiedFile {
        let holds = "nothing: the creation was interrupted, an open begins anew".to_owned();
        VerifiedFile { name: name.to_owned(), bytes: self.bytes(name), holds, damage: None }
    }

    fn at_all(&self, names: &[String], state: Option<&State>) -> Result<Vec<VerifiedFile>> {
        let mut files = Vec::new();
        let mut journal = self.journal(names)?;
        let mut snapshots = self.snapshots(names)?;
        let mut kept = BTreeMap::new();
        for name in names {
            let (holds, damage) = if let Some(sequence) = FileSequence::parse(name) {
                journal.remove(&sequence).unwrap_or_default()
            } else if let Some(number) = snapshot::parse_file_name(name) {
                snapshots.remove(&number).unwrap_or_default()
            } else if let Some(sink) = sinks::parse_file_name(name) {
                self.sink(sink, names)
            } else if let Some(sink) = sinks::parse_backlog_name(name) {
                let kept = match kept.entry(sink) {
                    Entry::Occupied(known) => known.into_mut(),
                    Entry::Vacant(place) => place.insert(self.kept_for(sink, names)?),
                };
                self.backlog(sink, name, kept)?
            } else if rings::is_ring(name) {
                self.ring(name, state)
            } else if name == identity::NAME {
                match identity::read(self.storage) {
                    Ok(_) => (format!("engine {}", self.engine), None),
                    Err(error) => ("the identity".to_owned(), Some(place_of(&error))),
                }
            } else if claims::is_temporary(name) {
                ("left half-written; the next open removes it".to_owned(), None)
            } else {
                ("not the engine's".to_owned(), None)
            };
            let bytes = self.bytes(name);
            files.push(VerifiedFile { name: name.clone(), bytes, holds, damage });
        }
        Ok(files)
    }

    /// Each file of the journal on its own.
    fn journal(&self, names: &[String]) -> Result<BTreeMap<FileSequence, Said>> {
        let sequences = names.iter().filter_map(|name| FileSequence::parse(name));
        let sequences: Vec<_> = sequences.collect();
        let found = match find_files(self.storage, self.engine) {
            Ok(found) => found,
            Err(error @ Error::Io { .. }) if !error.is_bad_medium() => return Err(error),
            // One refused file keeps the others from being looked at.
            Err(error) => {
                let say = |sequence: FileSequence| {
                    let is_it = error.names(&self.storage.path(&sequence.file_name()));
                    let said = if is_it { Some(place_of(&error)) } else { None };
                    (sequence, ("the journal, not read any further".to_owned(), said))
                };
                return Ok(sequences.into_iter().map(say).collect());
            }
        };
        let mut said = BTreeMap::new();
        let unneeded = unneeded_in(self.storage, self.engine)?;
        let left_over = left_over_before(found.in_use.iter(), &sequences, unneeded);
        for (index, entry) in found.in_use.iter().enumerate() {
            let next = found.in_use.get(index + 1);
            let check = match check_file(self.storage, self.engine, entry, next) {
                Err(error) if error.is_bad_medium() => {
                    let holds = format!("what follows batch {}", entry.previous.number);
                    said.insert(entry.sequence, (holds, Some(place_of(&error))));
                    continue;
                }
                check => check?,
            };
            let holds = match check.batches {
                0 => format!("no batch yet after batch {}", entry.previous.number),
                _ => format!("batches {}..={}", entry.previous.number.next(), check.last.number),
            };
            // The file that says where it ends is gone.
            if entry.sequence < left_over {
                let holds = format!("{holds}, needed no more; the next open removes it");
                said.insert(entry.sequence, (holds, None));
                continue;
            }
            let torn = check.torn.map(|torn| (torn.offset, torn.reason.to_owned()));
            let resized = found.resized(entry).map(|reason| (entry.bytes, reason));
            let damage = torn.or(resized);
            said.insert(entry.sequence, (holds, damage));
        }
        let prepared = |&(sequence, ..): &(FileSequence, _, _)| {
            (sequence, ("prepared, holds nothing yet".to_owned(), None))
        };
        said.extend(found.prepared.iter().map(prepared));
        for name in &found.misnamed {
            let holds = "prepared under another name; the next open removes it".to_owned();
            said.extend(FileSequence::parse(name).map(|sequence| (sequence, (holds, None))));
        }
        for UnreadableFile { entry, reason, .. } in &found.unreadable {
            let holds = "a file of the journal".to_owned();
            said.insert(entry.sequence, (holds, Some((0, (*reason).to_owned()))));
        }
        Ok(said)
    }

    /// Each snapshot to its end, and against the one before it.
    fn snapshots(&self, names: &[String]) -> Result<BTreeMap<BatchNumber, Said>> {
        let numbers = names.iter().filter_map(|name| snapshot::parse_file_name(name));
        let found = find_files(self.storage, self.engine).ok();
        let mut said = BTreeMap::new();
        let mut before = None;
        let numbers: Vec<_> = numbers.collect();
        let newest = numbers.iter().max().copied();
        for number in numbers {
            let checked = self.snapshot(number);
            let is_good = checked.is_ok();
            let (holds, damage) = match checked {
                Ok(holds) => {
                    let other = match &found {
                        Some(found) => match self.disagreement(found, before, number) {
                            // Reported for the file it is about.
                            Err(error) if error.is_bad_medium() => None,
                            other => other?,
                        },
                        None => None,
                    };
                    // The older of the two newest is a fallback, which needs the journal after it.
                    // A snapshot before those is about to be removed, and the journal after it may
                    // be gone.
                    if let Some((Link::Broken(why), before)) = other.as_ref().zip(before)
                        && Some(number) == newest
                        && let Some((_, damage)) = said.get_mut(&before)
                    {
                        *damage = Some((0, format!("nothing leads on from it: {why}")));
                    }
                    let differs = match other {
                        Some(Link::Differs(what)) => Some((0, what)),
                        _ => None,
                    };
                    (holds, differs)
                }
                Err(error @ Error::Io { .. }) if !error.is_bad_medium() => return Err(error),
                Err(error) => (format!("a snapshot of batch {number}"), Some(place_of(&error))),
            };
            if is_good && damage.is_none() {
                before = Some(number);
            }
            said.insert(number, (holds, damage));
        }
        Ok(said)
    }

    fn snapshot(&self, number: BatchNumber) -> Result<String> {
        let mut reader = SnapshotReader::open(self.storage, self.engine, number)?;
        let (sums, limits) = (reader.sum_count(), reader.limit_count());
        let events = match reader.event_count() {
            0 => String::new(),
            events => format!(", {events} reservations and answers"),
        };
        reader.verify_to_end()?;
        Ok(format!("everything up to batch {number}: {sums} sums, {limits} limits{events}"))
    }

    /// What is wrong between a snapshot and the one before it, by the batches in between.
    fn disagreement(
        &self,
        found: &FoundFiles,
        before: Option<BatchNumber>,
        number: BatchNumber,
    ) -> Result<Option<Link>> {
        let mut base = match before {
            Some(before) => Some(SnapshotReader::open(self.storage, self.engine, before)?),
            None => None,
        };
        let (mut cold, start) = match &mut base {
            Some(base) => (ColdState::from_snapshot(base)?, base.manifest().point()),
            None => (ColdState::new(), ChainPoint::START),
        };
        let mut deltas = FoldTable::default();
        let read = read_chain(self.storage, self.engine, found, start, &mut |batch| {
            if batch.header.number > number {
                return Ok(());
            }
            cold.apply(batch)?;
            deltas.add_sums(batch.sums())
        });
        // A chain that can't be read, or ends earlier, proves nothing.
        match read {
            Err(Error::Damaged { path, reason, .. }) => {
                let name = path.file_name().unwrap_or_default().display();
                return Ok(Some(Link::Broken(format!("{name}: {reason}"))));
            }
            Err(_) => return Ok(None),
            Ok(_) if cold.last().number < number => return Ok(None),
            Ok(_) => {}
        }
        let mut snapshot = SnapshotReader::open(self.storage, self.engine, number)?;
        let against = match before {
            Some(before) => format!("snapshot {before} and the journal since"),
            None => "the journal from its beginning".to_owned(),
        };
        let differs =
            |what: &str| Ok(Some(Link::Differs(format!("{what} other than by {against}"))));
        let expected = ColdState::from_snapshot(&mut snapshot)?;
        if cold.last() != expected.last() {
            return differs("its batch is");
        }
        if !cold.definitions().eq(expected.definitions())
            || cold.generation() != expected.generation()
            || snapshot.manifest().lanes.iter().enumerate().any(|(i, &n)| cold.lane(i) != Some(n))
        {
            return differs("quotas or rings are");
        }
        if !cold.ledger().open().eq(expected.ledger().open()) {
            return differs("a reservation is");
        }
        if !same_sums(base.as_mut(), deltas, &mut snapshot, &expected)? {
            return differs("a sum is");
        }
        if limits_after(base.as_mut(), &cold)? != limits_after(Some(&mut snapshot), &expected)? {
            return differs("a limit is");
        }
        Ok(None)
    }

    fn sink(&self, sink: &str, names: &[String]) -> Said {
        match SinkState::load(self.storage, self.engine, sink) {
            Ok(SinkState { confirmed, in_flight, backlog, .. }) => {
                let parts = backlog.iter().map(|&range| sinks::backlog_name(sink, range));
                let there: HashSet<_> = names.iter().collect();
                let is_missing = |name: &String| !there.contains(name);
                let missing: Vec<_> = parts.filter(is_missing).collect();
                let damage = (!missing.is_empty()).then(|| {
                    let what = format!("what it has not got is missing: {}", missing.join(", "));
                    (0, what)
                });
                let at = confirmed.map_or_else(
                    || "at no position".to_owned(),
                    |point| format!("at batch {}", point.number),
                );
                let sent = in_flight.map_or_else(String::new, |point| {
                    format!(", or at batch {}, which was sent", point.number)
                });
                (format!("the sink {sink:?} is {at}{sent}"), damage)
            }
            Err(error) => (format!("where the sink {sink:?} is"), Some(place_of(&error))),
        }
    }

    /// What a sink's state says is kept for it.
    fn kept_for(&self, sink: &str, names: &[String]) -> Result<Kept> {
        if !names.contains(&sinks::file_name(sink)) {
            return Ok(Kept::Unknown);
        }
        match SinkState::load(self.storage, self.engine, sink) {
            Ok(state) => {
                let parts = state.backlog.iter();
                let parts = parts.map(|&range| (sinks::backlog_name(sink, range), range));
                Ok(Kept::In(parts.collect()))
            }
            Err(error @ Error::Io { .. }) if !error.is_bad_medium() => Err(error),
            Err(_) => Ok(Kept::Unreadable),
        }
    }

    /// A part of a sink's backlog, to its end.
    fn backlog(&self, sink: &str, name: &str, kept: &Kept) -> Result<Said> {
        let parts = match kept {
            Kept::In(parts) => parts,
            Kept::Unknown => {
                let file = sinks::file_name(sink);
                let damage = (0, format!("{file}, which says what this is a part of, is missing"));
                return Ok((format!("kept for the sink {sink:?}"), Some(damage)));
            }
            Kept::Unreadable => {
                let holds = format!("kept for the sink {sink:?}, whose state can't be told");
                return Ok((holds, None));
            }
        };
        let Some(&range) = parts.get(name) else {
            return Ok((
                "left of a backlog that was replaced; the next open removes it".to_owned(),
                None,
            ));
        };
        let read = DeltasReader::open(self.storage, self.engine, range, name).and_then(|mut it| {
            let (mut events, mut sums) = (0_u64, 0_u64);
            it.read_events(&mut |_| {
                events += 1;
                Ok(())
            })?;
            while it.next_sum()?.is_some() {
                sums += 1;
            }
            let events = if events > 0 { format!(", {events} events") } else { String::new() };
            Ok(format!("{sums} sums{events}"))
        });
        let holds = |sums: &str| format!("what the sink {sink:?} has not got: {sums}");
        match read {
            Ok(found) => Ok((holds(&found), None)),
            Err(error @ Error::Io { .. }) if !error.is_bad_medium() => Err(error),
            Err(error) => Ok((holds("it does not verify"), Some(place_of(&error)))),
        }
    }

    fn ring(&self, name: &str, state: Option<&State>) -> Said {
        let Some(generation) = state.and_then(|state| state.cold.generation()) else {
            let damage = rings::owner(self.storage, name).is_none();
            let damage = damage.then(|| (0, "the ring's header does not verify".to_owned()));
            return ("a ring; what it holds can't be told without the journal".to_owned(), damage);
        };
        let mut rings = generation.rings.iter().enumerate();
        let used = rings.find(|(lane, ring)| rings::file_name(*lane, ring.created) == name);
        let (Some((lane, _)), Some(state)) = (used, state) else {
            return ("a ring that is not in use".to_owned(), None);
        };
        let waiting = state.waiting.get(lane).copied().unwrap_or(0);
        let path = self.storage.path(name);
        let finding = state.report.findings.iter().find(|finding| finding.path == path);
        let damage = finding.map(|finding| (finding.offset, finding.what.clone()));
        (format!("{waiting} records that no batch holds"), damage)
    }
}

/// Where an error says that the damage is.
pub(super) fn place_of(error: &Error) -> (u64, String) {
    match error {
        Error::Damaged { offset, reason, .. } => (*offset, reason.clone()),
        error => (0, error.to_string()),
    }
}

fn same_sums(
    base: Option<&mut SnapshotReader>,
    mut deltas: FoldTable,
    snapshot: &mut SnapshotReader,
    expected: &ColdState,
) -> Result<bool> {
    let mut sorted = Vec::new();
    deltas.drain_sorted(&mut sorted);
    let mut sorted = SortedSums(sorted.into_iter());
    let mut sources: Vec<&mut dyn SumSource> = vec![&mut sorted];
    sources.extend(base.map(|base| base as &mut dyn SumSource));
    let mut totals = MergedSums::new(sources)?;
    // A merge leaves out what lies below the floors that it raised, unless a reservation holds it.
    let held = expected.ledger().held();
    let is_kept =
        |sum: &Sum| sum.key.window >= expected.floor(sum.key.quota) || held.contains(&sum.key);
    loop {
        let mut total = totals.next_sum()?;
        while total.as_ref().is_some_and(|sum| !is_kept(sum)) {
            total = totals.next_sum()?;
        }
        let sum = snapshot.next_sum()?;
        if total != sum {
            return Ok(false);
        }
        if sum.is_none() {
            return Ok(true);
        }
    }
}

fn limits_after(
    base: Option<&mut SnapshotReader>,
    cold: &ColdState,
) -> Result<BTreeMap<(QuotaId, u64), u64>> {
    let mut limits = BTreeMap::new();
    if let Some(base) = base {
        while let Some(Limit { quota, user, limit }) = base.next_limit()? {
            limits.insert((quota, user), limit);
        }
    }
    for (&key, &change) in cold.limit_changes() {
        match change {
            Some(limit) => limits.insert(key, limit),
            None => limits.remove(&key),
        };
    }
    Ok(limits)
}
