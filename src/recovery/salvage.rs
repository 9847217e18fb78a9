//! Makes a new data directory from everything that verifies in a damaged one.
//!
//! What verified records say is counted, each once, and nothing else:
//!
//! 1. The newest snapshot that verifies to its end: everything up to its batch.
//! 2. The batches after it that are proven to belong to the journal, even those after a damaged one
//!    (`journal::proof` says how). No two batches hold the same record.
//! 3. The records in the rings that verify and that no counted batch names. A record's number is
//!    never reused within its generation, and a batch names the records that it holds, so a record
//!    that no counted batch names was not counted. This makes up for lost batches, as far as the
//!    rings reach back.
//!
//! The fold here is lenient where `snapshot::state` is strict: it goes on after gaps, and leaves
//! out and reports what it can't place.
//!
//! The new directory has an identity of its own, since it does not continue the old one's history:
//! a sink that has taken batches of the old engine compares numbers and checks, and would refuse
//! the new ones, or take one of them for a batch that it knows.

mod lanes;
mod pieces;
mod write;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use crate::clock::{Clock, SystemClock};
use crate::delivery::state::{self, SinkState};
use crate::error::{Error, Result};
use crate::identity;
use crate::journal::files::FileSequence;
use crate::journal::found::left_over_before;
use crate::journal::proof::{Candidates, Proof, find_candidates, prove, read_batch};
use crate::journal::walk::{check_file, scan_file};
use crate::journal::writer::ChainPoint;
use crate::ledger::LedgerEvent;
use crate::model::{BatchNumber, EngineId, Timestamp};
use crate::recovery::salvage::pieces::Pieces;
use crate::recovery::{Finding, State, claims, is_ours, list, random, unneeded_in, verify};
use crate::snapshot::deltas::{self, DeltaRange, DeltasReader};
use crate::snapshot::{self, Manifest, SnapshotReader};
use crate::storage::{ForgivingStorage, RealStorage, Storage};

/// What was recovered from a damaged directory, and what was not.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Salvage {
    /// The engine whose directory was read.
    pub source_engine_id: EngineId,
    /// The identity of the new directory.
    pub engine_id: EngineId,
    /// The last batch in the snapshot it started from; `None` without a snapshot.
    pub snapshot_batch: Option<u64>,
    /// Batches of the journal that were counted.
    pub journal_batches: u64,
    /// The last batch that was counted, in the snapshot or in the journal.
    pub last_batch: u64,
    /// Records counted from the rings: those that no counted batch holds.
    pub lane_records: u64,
    /// Quotas in the new directory.
    pub quotas: u64,
    /// Sums in the new directory, of closed windows too.
    pub sums: u64,
    /// Users' own limits in the new directory.
    pub limits: u64,
    /// The sinks that the old engine delivered to, by name. The new directory is another engine:
    /// each sink gets all its totals, on top of what it has from the old one, unless the sink is
    /// emptied first.
    pub sinks: Vec<String>,
    /// What does not verify, whether or not it was made up for.
    pub damage: Vec<Finding>,
    /// What is lost, or may be. Empty: the new directory holds everything that the old one did.
    pub losses: Vec<Finding>,
}

/// Makes a new data directory from everything that verifies in a damaged one, which is not changed.
///
/// Never counts more than what verified records say: the newest snapshot that verifies, the batches
/// after it that certainly belong to the journal, and the records in the rings that none of these
/// holds. `docs/durability.md` has the rules. From an undamaged directory this makes the exact
/// state.
///
/// `new_dir` must be missing or empty. It does not become a data directory until it is complete;
/// after an error, what was made in it is removed. It has an engine id of its own, and the same
/// quota ids.
///
/// # Errors
///
/// [`Error::Locked`] while a process has the directory open; [`Error::Damaged`] where nothing says
/// whose directory it is; [`Error::UnsupportedVersion`] for a file that another version of this
/// library can read; [`Error::Io`] for whatever the operating system refuses, and for a `new_dir`
/// that is not empty. Bad sectors count as damage, and do not end a salvage.
pub fn salvage(dir: impl AsRef<Path>, new_dir: impl AsRef<Path>) -> Result<Salvage> {
    let (dir, new_dir) = (dir.as_ref(), new_dir.as_ref());
    let source: Arc<dyn Storage> = Arc::new(RealStorage::open_locked_read_only(dir)?);
    let target = Arc::new(RealStorage::create_empty(new_dir, dir)?);
    let storage = Arc::clone(&target) as Arc<dyn Storage>;
    let salvaged = salvage_on(&source, &storage, SystemClock.now());
    if salvaged.is_err() {
        clear(&target);
    }
    salvaged.map(|(salvage, _)| salvage)
}

/// Takes away what was made, so that it can be tried again.
fn clear(target: &RealStorage) {
    let names = target.list().unwrap_or_default();
    for name in names.iter().filter(|name| *name == identity::NAME || is_ours(name)) {
        let _ = target.remove(name);
    }
    let _ = target.remove_lock_file();
}

/// [`salvage`] between any two storages, with what an open of the new directory would load.
pub(super) fn salvage_on(
    source: &Arc<dyn Storage>,
    target: &Arc<dyn Storage>,
    now: Timestamp,
) -> Result<(Salvage, State)> {
    let forgiving = Arc::new(ForgivingStorage::new(Arc::clone(source)));
    let source = &(Arc::clone(&forgiving) as Arc<dyn Storage>);
    let mut notes = Notes { storage: source, damage: Vec::new(), losses: Vec::new() };
    let engine = source_engine(source, &mut notes)?;
    let candidates = find_candidates(source, engine)?;
    let snapshots = Snapshots::find(source, engine, &mut notes)?;
    let mut base = snapshots.base(source, engine)?;
    let start = base.as_ref().map_or(ChainPoint::START, |base| base.manifest().point());
    let points: Vec<_> = snapshots.manifests.iter().map(Manifest::point).collect();
    let proof = prove(source, engine, &candidates, start, &points)?;
    note_journal(source, engine, &candidates, &proof, (start, &points), &mut notes)?;

    let mut pieces = Pieces::new(base.as_ref().map(SnapshotReader::manifest));
    if let Some(base) = &mut base {
        base.read_events(&mut |event| {
            pieces.ledger.apply(event);
            Ok(())
        })?;
    }
    for manifest in &snapshots.manifests {
        pieces.learn_definitions(manifest);
    }
    let mut buffer = Vec::new();
    for place in &proof.batches {
        let batch = read_batch(source, engine, &candidates, place, &mut buffer)?;
        pieces.take(&batch).map_err(|reason| {
            let reason = format!("batch {}: {reason}", place.point.number);
            let name = candidates.files.get(place.file).map_or("", |file| &file.name);
            Error::damaged(source.path(name), place.offset, reason)
        })?;
    }
    let lane_records = lanes::take_records(source, engine, &mut pieces, &mut notes)?;
    pieces.complete_definitions(&mut notes);
    note_events(source, engine, &candidates, pieces.recorded_in_rings > 0, &mut notes)?;

    let engine_id = EngineId(u128::from_le_bytes(random()?));
    let (snapshot, quotas) = write::write(target, engine_id, pieces, base, now, &mut notes)?;
    let end = proof.batches.last().map_or(start, |place| place.point);
    if end == ChainPoint::START && lane_records == 0 {
        notes.loss("", 0, "no snapshot and no batch verifies: nothing was recovered".to_owned());
    }
    note_sinks(source, engine, end, &mut notes)?;
    note_unreadable(&forgiving, &mut notes);
    let state = check(target, now)?;
    let salvage = Salvage {
        source_engine_id: engine,
        engine_id,
        snapshot_batch: Some(start.number.0).filter(|&number| number > 0),
        journal_batches: proof.batches.len() as u64,
        last_batch: end.number.0,
        lane_records,
        quotas,
        sums: snapshot.sums,
        limits: snapshot.limits,
        sinks: sinks(source)?,
        damage: notes.damage,
        losses: notes.losses,
    };
    Ok((salvage, state))
}

/// Reports what could not be read, since it may have been anything. A snapshot is made up for; if
/// not, the part of the journal that is missing without it is reported.
fn note_unreadable(forgiving: &ForgivingStorage, notes: &mut Notes<'_>) {
    for (name, offset, what) in forgiving.unreadable() {
        if snapshot::parse_file_name(&name).is_none() && is_ours(&name) {
            let what = "what lay there, and in no other file, is lost";
            notes.loss(&name, offset, what.to_owned());
        }
        notes.damage(&name, offset, what);
    }
}

/// Reports the sinks for which events were recorded that they are not known to have: the new
/// directory holds no events.
fn note_events(
    storage: &Arc<dyn Storage>,
    engine: EngineId,
    candidates: &Candidates,
    has_waiting: bool,
    notes: &mut Notes<'_>,
) -> Result<()> {
    let names = list(storage)?;
    let last_recorded = last_recorded(storage, engine, candidates)?;
    for sink in sinks(storage)? {
        // A sink whose state is missing or does not verify may be at any position, and may take
        // events.
        let known = SinkState::load(storage, engine, &sink);
        let mut parts = names.iter().filter(|name| state::parse_backlog_name(name) == Some(&*sink));
        let may_be_kept_for =
            known.is_err() && parts.any(|name| deltas::may_hold_events(storage, name));
        let unknown = SinkState { events_after: Some(BatchNumber::ZERO), ..SinkState::new(&sink) };
        let state = known.unwrap_or(unknown);
        let Some(after) = state.events_after else { continue };
        let has = state.confirmed.map_or(after, |confirmed| confirmed.number.max(after));
        let is_behind = last_recorded.is_some_and(|last| last > has);
        let has_none = |&range: &DeltaRange| {
            let name = state::backlog_name(&sink, range);
            let reader = DeltasReader::open(storage, engine, range, &name);
            reader.is_ok_and(|reader| reader.payload_bytes() == 0)
        };
        let is_kept_for = !state.backlog.iter().all(has_none);
        if is_behind || is_kept_for || may_be_kept_for || has_waiting {
            let what =
                format!("the sink {sink:?} gets no recorded event that it has not confirmed");
            notes.loss(&state::file_name(&sink), 0, what);
        }
    }
    Ok(())
}

/// The last batch that holds an event recorded for sinks, even before the snapshot, which holds
/// none: a sink gets events from the journal, or from its backlog.
fn last_recorded(
    storage: &Arc<dyn Storage>,
    engine: EngineId,
    candidates: &Candidates,
) -> Result<Option<BatchNumber>> {
    let mut last = None;
    for candidate in &candidates.files {
        scan_file(storage, engine, &candidate.entry, &mut |_, batch| {
            let mut events = batch.events();
            while let Ok(Some(event)) = events.next_event() {
                if matches!(event, LedgerEvent::Recorded(_)) {
                    last = last.max(Some(batch.header.number));
                }
            }
        })?;
    }
    Ok(last)
}

/// Reports the sinks that know of batches that are lost: nothing is sent before it is durable.
fn note_sinks(
    storage: &Arc<dyn Storage>,
    engine: EngineId,
    end: ChainPoint,
    notes: &mut Notes<'_>,
) -> Result<()> {
    for sink in sinks(storage)? {
        let Ok(state) = SinkState::load(storage, engine, &sink) else { continue };
        if state.end() > end.number {
            let what = format!(
                "the sink {sink:?} was sent, or is kept, what was counted up to batch {}; batches \
                 {}..={} are lost",
                state.end(),
                end.number.next(),
                state.end()
            );
            notes.loss(&state::file_name(&sink), 0, what);
        }
    }
    Ok(())
}

fn sinks(storage: &Arc<dyn Storage>) -> Result<Vec<String>> {
    let names = list(storage)?;
    let sink = |name| state::parse_file_name(name).or_else(|| state::parse_backlog_name(name));
    let sinks: BTreeSet<_> = names.iter().filter_map(|name| sink(name)).collect();
    Ok(sinks.into_iter().map(str::to_owned).collect())
}

/// What the operator is told.
struct Notes<'a> {
    storage: &'a Arc<dyn Storage>,
    damage: Vec<Finding>,
    losses: Vec<Finding>,
}

impl Notes<'_> {
    fn damage(&mut self, name: &str, offset: u64, what: String) {
        self.damage.push(Finding { path: self.storage.path(name), offset, what });
    }

    fn loss(&mut self, name: &str, offset: u64, what: String) {
        self.losses.push(Finding { path: self.storage.path(name), offset, what });
    }

    fn damaged(&mut self, name: &str, error: &Error) {
        let (offset, what) = verify::place_of(error);
        self.damage(name, offset, what);
    }
}

/// Whose directory it is: what most files say, since one of them may be another directory's.
fn source_engine(storage: &Arc<dyn Storage>, notes: &mut Notes<'_>) -> Result<EngineId> {
    let identity = match identity::read(storage) {
        Ok(identity) => identity.map(|identity| identity.engine),
        Err(error @ (Error::Io { .. } | Error::UnsupportedVersion { .. })) => return Err(error),
        Err(error) => {
            notes.damaged(identity::NAME, &error);
            None
        }
    };
    let Some(engine) = claims::engine(storage, identity)? else {
        let reason = "no file, or no more than of another directory, says whose directory this is";
        return Err(Error::damaged(storage.path(identity::NAME), 0, reason));
    };
    match identity {
        None if notes.damage.is_empty() => {
            notes.damage(identity::NAME, 0, "it is missing".to_owned());
        }
        Some(other) if other != engine => {
            let what = format!("it is of {other}, but most other files are of {engine}");
            notes.damage(identity::NAME, 0, what);
        }
        _ => {}
    }
    for name in list(storage)?.iter().filter(|name| is_ours(name)) {
        if let Some(other) = claims::owner(storage, name).filter(|&other| other != engine) {
            notes.damage(name, 0, format!("it belongs to another data directory, {other}"));
        }
    }
    Ok(engine)
}

/// The snapshots: those that verify to their end, and what the heads of all say.
struct Snapshots {
    /// The name of the newest that verifies.
    base: Option<(BatchNumber, String)>,
    /// Newest first.
    manifests: Vec<Manifest>,
}

impl Snapshots {
    fn find(storage: &Arc<dyn Storage>, engine: EngineId, notes: &mut Notes<'_>) -> Result<Self> {
        let mut found = Self { base: None, manifests: Vec::new() };
        for name in list(storage)? {
            let Some(named) = snapshot::parse_file_name(&name) else { continue };
            let mut reader = match SnapshotReader::open_named(storage, engine, &name) {
                Ok(reader) => reader,
                Err(error @ (Error::Io { .. } | Error::UnsupportedVersion { .. })) => {
                    return Err(error);
                }
                Err(error) => {
                    notes.damaged(&name, &error);
                    continue;
                }
            };
            found.manifests.push(reader.manifest().clone());
            let number = reader.manifest().point().number;
            if number != named {
                notes.damage(&name, 0, format!("it is the snapshot of batch {number}"));
            }
            match reader.verify_to_end() {
                Ok(()) if found.base.as_ref().is_none_or(|&(newest, _)| newest < number) => {
                    found.base = Some((number, name));
                }
                Ok(()) => {}
                Err(error @ Error::Io { .. }) => return Err(error),
                Err(error) => notes.damaged(&name, &error),
            }
        }
        found.manifests.sort_unstable_by_key(|manifest| std::cmp::Reverse(manifest.number));
        Ok(found)
    }

    fn base(&self, storage: &Arc<dyn Storage>, engine: EngineId) -> Result<Option<SnapshotReader>> {
        let open = |(_, name): &(_, String)| SnapshotReader::open_named(storage, engine, name);
        self.base.as_ref().map(open).transpose()
    }
}

/// Reports what is damaged in the journal, and which of its batches after the start are lost by it,
/// judging also by what the snapshots' heads name.
fn note_journal(
    storage: &Arc<dyn Storage>,
    engine: EngineId,
    candidates: &Candidates,
    proof: &Proof,
    (start, points): (ChainPoint, &[ChainPoint]),
    notes: &mut Notes<'_>,
) -> Result<()> {
    for (name, offset, what) in &candidates.damage {
        notes.damage(name, *offset, what.clone());
    }
    let name_of = |file: usize| {
        candidates.files.get(file).map_or_else(|| "journal".to_owned(), |file| file.name.clone())
    };
    let mut end = (start.number, "journal".to_owned(), 0);
    for place in &proof.batches {
        let missing = end.0.next()..place.point.number;
        if missing.start < missing.end {
            let what = format!("batches {}..={} are lost", missing.start, missing.end.0 - 1);
            let at = if end.2 == 0 { (name_of(place.file), place.offset) } else { (end.1, end.2) };
            notes.loss(&at.0, at.1, what);
        }
        end = (place.point.number, name_of(place.file), place.end());
    }
    if let (Some(first), Some(last)) = (proof.unproven.first(), proof.unproven.last()) {
        let what = format!(
            "batches {}..={} verify, but nothing proves that they belong here: not counted",
            first.point.number, last.point.number
        );
        notes.loss(&name_of(first.file), first.offset, what);
    }
    let in_use: Vec<_> = candidates.files.iter().filter(|file| file.is_in_use).collect();
    let before_last = in_use.last().map(|last| last.entry.previous);
    let named = points.iter().copied().chain(before_last).map(|point| point.number).max();
    if let Some(last) = named.filter(|&last| last > end.0) {
        let what = format!("batches {}..={last} are lost", end.0.next());
        notes.loss(&end.1, end.2, what);
    }
    if let Some(last) = in_use.last().filter(|last| last.is_short) {
        let what = "it is cut short: what it held beyond, if anything, is lost".to_owned();
        notes.loss(&last.name, last.entry.bytes, what);
    }
    let entries = in_use.iter().map(|candidate| &candidate.entry);
    let unneeded = unneeded_in(storage, engine)?.min(start.number);
    let left_over = left_over_before(entries, &candidates.sequences, unneeded);
    for (index, candidate) in in_use.iter().enumerate() {
        // The file that says where it ends is gone.
        if candidate.entry.sequence < left_over {
            continue;
        }
        let next = in_use.get(index + 1).map(|next| &next.entry);
        if let Some(torn) = check_file(storage, engine, &candidate.entry, next)?.torn {
            notes.damage(&candidate.name, torn.offset, torn.reason.to_owned());
            let is_tail = next.is_none() && (end.2 <= torn.offset || end.1 != candidate.name);
            if is_tail {
                let what = format!("the journal ends here: {}", torn.reason);
                notes.loss(&candidate.name, torn.offset, what);
            }
        }
    }
    note_missing_files(candidates, proof, left_over, notes);
    Ok(())
}

/// A journal file that is gone, or of which nothing was proven, may have been the last one. Missing
/// files up to `left_over` were released, not lost.
fn note_missing_files(
    candidates: &Candidates,
    proof: &Proof,
    left_over: FileSequence,
    notes: &mut Notes<'_>,
) {
    let sequences = &candidates.sequences;
    for pair in sequences.windows(2) {
        if let [before, after] = pair
            && before.next() < *after
            && left_over < *after
        {
            let what = "it is missing, and with it what only it held".to_owned();
            notes.loss(&before.next().file_name(), 0, what);
        }
    }
    let last_in_use = candidates.files.iter().rposition(|file| file.is_in_use);
    for (index, candidate) in candidates.files.iter().enumerate() {
        let is_after_last = last_in_use.is_none_or(|last| index > last);
        let is_used = proof.batches.iter().any(|place| place.file == index);
        if !candidate.is_in_use && is_after_last && !is_used {
            let what = "its header does not verify; what it held, if anything, is lost".to_owned();
            notes.loss(&candidate.name, 0, what);
        }
    }
    // One is always in use; the others are prepared.
    if candidates.files.is_empty() {
        notes.loss("journal", 0, "the file of the journal that was in use is missing".to_owned());
    }
}

/// The new directory must open without findings except about a clock that was ahead, and each file
/// must be whole; otherwise it can't be used.
fn check(target: &Arc<dyn Storage>, now: Timestamp) -> Result<State> {
    let (verification, state) = verify::verify_on(target, now)?;
    let is_whole = verification.files.iter().all(|file| file.damage.is_none());
    match (verification.verdict, state) {
        (verify::Verdict::Refused(error), _) => Err(error),
        (_, Some(state)) if is_whole && state.is_exact() => Ok(state),
        _ => {
            let findings = verification.report.findings.iter().map(ToString::to_string);
            let findings = findings.collect::<Vec<_>>().join("; ");
            let reason = format!("what was written does not read back: {findings}");
            Err(Error::damaged(target.path(""), 0, reason))
        }
    }
}
