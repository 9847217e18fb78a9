//! Recovery: snapshot, the journal after it, the lanes after that -> counters.
//!
//! It can be killed at any instant and run again. Nothing that was found is changed until a new
//! journal file durably holds everything that was not known to be durable: the batches that no sync
//! is known to have covered, verbatim, and one batch with what the lanes held beyond them, the
//! corrections, and the new generation. Only then are the rings reused.

mod claims;
mod inspect;
mod load;
mod replay;
mod report;
pub(crate) mod rings;
mod salvage;
mod verify;

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::sync::Arc;

pub use inspect::{
    InspectedFile, InspectedFileState, InspectedLane, InspectedQuota, InspectedSink, Inspection,
    inspect,
};
use load::{beyond_journal, load_newest, load_sinks, without_state};
pub use report::{Finding, RecoveryReport};
pub use salvage::{Salvage, salvage};
pub use verify::{Verdict, Verification, VerifiedFile, verify};

use crate::admission::quotas::Quotas;
use crate::admission::table::Table;
use crate::codec::put_sums;
use crate::delivery::state::{self as sinks, SinkState};
use crate::error::{Error, Result};
use crate::flush::compact::KeptSnapshot;
use crate::fold::FoldTable;
use crate::identity::{self, Identity};
use crate::journal::batch::{self, BatchContent, LaneSpan};
use crate::journal::cold::{ColdEvent, Generation, RingRef};
use crate::journal::files::FileSequence;
use crate::journal::found::{FoundFiles, find_files};
use crate::journal::pool::JournalFiles;
use crate::journal::reader::{ChainEnd, read_chain};
use crate::journal::writer::{ChainPoint, Encoded, JournalWriter};
use crate::ledger::{EventWriter, Ledger, Remembering};
use crate::model::{BatchNumber, EngineId, Timestamp};
use crate::snapshot;
use crate::snapshot::state::ColdState;
use crate::storage::Storage;
use crate::wal::lane::Lane;
use crate::wal::lanes::Lanes;
use crate::wal::record::Seal;

/// So that as many bytes are taken by each, in batches and snapshots.
const FIRST_RESERVATION_MIN: u64 = 1 << 61;

/// How the engine wants to go on.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    pub(crate) lanes: usize,
    pub(crate) lane_records: u64,
    pub(crate) journal_file_bytes: u64,
    pub(crate) shards: usize,
    pub(crate) counters_expected: usize,
    /// Of what has ended not much more than this is held.
    pub(crate) remembering: Remembering,
    pub(crate) now: Timestamp,
}

/// Everything that the engine needs to go on.
#[derive(Debug)]
pub(crate) struct Recovered {
    pub(crate) engine: EngineId,
    pub(crate) table: Table,
    pub(crate) quotas: Quotas,
    pub(crate) lanes: Lanes,
    pub(crate) files: Arc<JournalFiles>,
    pub(crate) writer: JournalWriter,
    pub(crate) snapshots: Vec<KeptSnapshot>,
    pub(crate) ledger: Ledger,
    pub(crate) generation: u64,
    /// Where the numbers of its reservations begin.
    pub(crate) first_reservation: u64,
    /// The sinks that the directory knows.
    pub(crate) sinks: Vec<SinkState>,
    pub(crate) report: RecoveryReport,
}

/// Recovers a data directory, or creates one where there is none.
pub(crate) fn recover(storage: &Arc<dyn Storage>, wanted: &Wanted) -> Result<Recovered> {
    let Identified { engine, is_new, is_marked } = identify(storage)?;
    let found = find_files(storage, engine)?;
    let state =
        if is_new { State::empty(wanted) } else { load_newest(storage, engine, &found, wanted)? };
    let sinks = if is_new { Vec::new() } else { load_sinks(storage, engine, &state)? };
    // Only now: what is refused is not changed.
    remove_temporaries(storage)?;
    for name in &found.misnamed {
        remove(storage, name)?;
    }
    let recovered = go_on(storage, engine, found, state, wanted)?;
    release_journal(&recovered.files, &recovered.snapshots, &sinks);
    if !is_marked {
        identity::write(storage, Identity { engine, is_created: true })?;
    }
    let report = RecoveryReport { created: is_new, ..recovered.report };
    Ok(Recovered { report, sinks, ..recovered })
}

/// Releases what neither the older of the two newest snapshots nor a sink needs. There may be
/// snapshots that the process before knew nothing of, since the sync of the directory failed that
/// should have ended their making: sinks may still need what lies before those.
fn release_journal(files: &JournalFiles, snapshots: &[KeptSnapshot], sinks: &[SinkState]) {
    let [_, older, ..] = snapshots else { return };
    files.release_up_to(unneeded(older.point.number, sinks));
}

/// Up to where the journal is needed neither after the older snapshot nor by a sink.
fn unneeded(older: BatchNumber, sinks: &[SinkState]) -> BatchNumber {
    let tips = sinks.iter().filter_map(SinkState::tip);
    tips.fold(older, |least, tip| least.min(tip.number))
}

/// The same of a directory that is only looked at. The beginning where there is no older snapshot,
/// or a sink may be anywhere.
fn unneeded_in(storage: &Arc<dyn Storage>, engine: EngineId) -> Result<BatchNumber> {
    let names = list(storage)?;
    let mut snapshots: Vec<_> =
        names.iter().filter_map(|name| snapshot::parse_file_name(name)).collect();
    snapshots.sort_unstable();
    let [.., older, _] = snapshots[..] else { return Ok(BatchNumber::ZERO) };
    match sinks::load_all(storage, engine) {
        Ok(sinks) if without_state(&names).next().is_none() => Ok(unneeded(older, &sinks)),
        _ => Ok(BatchNumber::ZERO),
    }
}

fn list(storage: &Arc<dyn Storage>) -> Result<Vec<String>> {
    storage.list().map_err(|error| Error::io("list", storage.path(""), error))
}

fn remove(storage: &Arc<dyn Storage>, name: &str) -> Result<()> {
    storage.remove(name).map_err(|error| Error::io("remove", storage.path(name), error))
}

/// Files that were being written when a process died count for nothing.
fn remove_temporaries(storage: &Arc<dyn Storage>) -> Result<()> {
    for name in list(storage)?.iter().filter(|name| claims::is_temporary(name)) {
        remove(storage, name)?;
    }
    Ok(())
}

/// Whether a file of this name is a ring, a snapshot, the journal's, or kept for a sink.
fn is_ours(name: &str) -> bool {
    rings::is_ring(name)
        || snapshot::parse_file_name(name).is_some()
        || FileSequence::parse(name).is_some()
        || sinks::parse_file_name(name).is_some()
        || sinks::parse_backlog_name(name).is_some()
}

/// Whose directory it is.
struct Identified {
    engine: EngineId,
    /// Nothing was ever acknowledged in it.
    is_new: bool,
    /// Its identity says that it was created.
    is_marked: bool,
}

/// Whether the names of the files are those of an engine's, or of the beginnings of one.
pub(crate) fn has_names_of_engine(storage: &Arc<dyn Storage>) -> Result<bool> {
    Ok(list(storage)?.iter().any(|name| name == identity::NAME || is_ours(name)))
}

/// Whether there is an engine: more than a creation that was interrupted has left.
///
/// # Errors
/// Where that can't be told, and where what there is lacks an identity.
pub(crate) fn holds_engine(storage: &Arc<dyn Storage>) -> Result<bool> {
    Ok(find_engine(storage)?.is_some())
}

/// Whose directory it is; `None` where nothing was ever acknowledged in it.
fn find_engine(storage: &Arc<dyn Storage>) -> Result<Option<Identified>> {
    Ok(match identity::read(storage)? {
        Some(Identity { engine, is_created: true }) => {
            Some(Identified { engine, is_new: false, is_marked: true })
        }
        Some(Identity { engine, is_created: false }) if has_content(storage, engine)? => {
            Some(Identified { engine, is_new: false, is_marked: false })
        }
        None if list(storage)?.iter().any(|name| is_ours(name)) => {
            return Err(identity::missing(storage));
        }
        _ => None,
    })
}

/// Whose directory it is, and whether it is (still) being created.
fn identify(storage: &Arc<dyn Storage>) -> Result<Identified> {
    if let Some(identified) = find_engine(storage)? {
        return Ok(identified);
    }
    let ours: Vec<_> = list(storage)?.into_iter().filter(|name| is_ours(name)).collect();
    // A creation that was interrupted has acknowledged nothing: begin anew.
    remove_temporaries(storage)?;
    for name in &ours {
        remove(storage, name)?;
    }
    let engine = EngineId(u128::from_le_bytes(random()?));
    identity::write(storage, Identity { engine, is_created: false })?;
    Ok(Identified { engine, is_new: true, is_marked: false })
}

/// Whether the directory holds a batch or a snapshot of this engine, whatever its identity says:
/// the mark that it was created may have been lost, by a sync that failed and was believed by the
/// next process.
///
/// # Errors
/// What can't be read is not taken for nothing.
fn has_content(storage: &Arc<dyn Storage>, engine: EngineId) -> Result<bool> {
    if list(storage)?.iter().any(|name| snapshot::parse_file_name(name).is_some()) {
        return Ok(true);
    }
    let found = find_files(storage, engine)?;
    if found.hold_nothing() {
        return Ok(false);
    }
    let end = read_chain(storage, engine, &found, ChainPoint::START, &mut |_| Ok(()))?;
    Ok(end.last.number > BatchNumber::ZERO)
}

fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| {
        Error::io("read random bytes from", "the operating system", std::io::Error::other(error))
    })?;
    Ok(bytes)
}

/// What the files say.
#[derive(Debug)]
struct State {
    cold: ColdState,
    table: Table,
    /// Made once nothing that is read before it was refused: it is large.
    quotas: OnceCell<Quotas>,
    /// What the lanes held beyond the journal, and corrections.
    remainder: FoldTable,
    /// What the lanes held besides sums, encoded.
    events: EventWriter,
    /// The spans of the lanes that the remainder covers.
    spans: Vec<LaneSpan>,
    /// Per lane: how many records the remainder covers.
    waiting: Vec<u64>,
    chain: ChainEnd,
    snapshots: Vec<KeptSnapshot>,
    /// Snapshots that nobody needs now and that can't be read now: they may be good.
    unread: Vec<BatchNumber>,
    report: RecoveryReport,
    /// How many of the findings only say that the clock was ahead.
    clock_findings: usize,
}

impl State {
    /// Whether nothing was found but that the clock was ahead: by that nothing is damaged or lost.
    fn is_exact(&self) -> bool {
        self.report.findings.len() == self.clock_findings
    }

    fn leave_alone(&mut self, storage: &Arc<dyn Storage>, number: BatchNumber, error: &Error) {
        self.unread.push(number);
        let path = storage.path(&snapshot::file_name(number));
        let (offset, what) = verify::place_of(error);
        self.report.findings.push(Finding { path, offset, what });
    }

    fn empty(wanted: &Wanted) -> Self {
        Self {
            cold: ColdState::new(),
            table: Table::new(wanted.shards, wanted.counters_expected),
            quotas: OnceCell::new(),
            remainder: FoldTable::default(),
            events: EventWriter::default(),
            spans: Vec::new(),
            waiting: Vec::new(),
            chain: ChainEnd::at_start(),
            snapshots: Vec::new(),
            unread: Vec::new(),
            report: RecoveryReport::default(),
            clock_findings: 0,
        }
    }
}

/// Makes what was found durable in a new journal file, and opens the lanes.
fn go_on(
    storage: &Arc<dyn Storage>,
    engine: EngineId,
    found: FoundFiles,
    mut state: State,
    wanted: &Wanted,
) -> Result<Recovered> {
    let mut made = NewRings { storage, names: Vec::new() };
    let generation = next_generation(storage, engine, &state, wanted, &mut made)?;
    let first_reservation = first_reservation()?;
    // Mapped before the journal goes on: an open that fails here, again and again, must not leave a
    // file each time.
    let mut mapped = Vec::new();
    for (lane, ring) in generation.rings.iter().enumerate() {
        mapped.push((rings::slots(storage, engine, lane, ring)?, ring.base));
    }
    let last = state.chain.last;
    let mut sums = Vec::new();
    state.remainder.drain_sorted(&mut sums);
    let mut sum_bytes = Vec::new();
    put_sums(&mut sum_bytes, &sums);
    let content = BatchContent {
        number: last.number.next(),
        durable: state.chain.durable.number,
        time: wanted.now,
        previous_check: last.check,
        spans: &state.spans,
        cold: &[ColdEvent::Generation(generation.clone())],
        ledger: state.events.bytes(),
        sums: &sum_bytes,
    };
    let (bytes, check) = batch::encode(engine, &content)
        .map_err(|reason| Error::damaged(storage.path("journal"), 0, reason))?;
    let mut batches = std::mem::take(&mut state.chain.unsynced);
    batches.push(Encoded { number: content.number, check, bytes });

    let files = found.into_files(Arc::clone(storage), engine, wanted.journal_file_bytes)?;
    let files = Arc::new(files);
    files.make_room(batches.iter().map(|batch| batch.bytes.len() as u64).sum())?;
    // From here on the journal may name them.
    made.names.clear();
    let writer = JournalWriter::begin(Arc::clone(&files), state.chain.durable, &batches)?;
    remove_other_rings(storage, &generation)?;
    remove_other_snapshots(storage, &state)?;
    storage.sync_directory().map_err(|error| Error::io("sync", storage.path(""), error))?;

    let seal = Seal::new(generation.salt)?;
    let lanes = mapped.into_iter().map(|(slots, base)| Lane::new(slots, base, seal));
    Ok(Recovered {
        engine,
        table: state.table,
        quotas: state.quotas.into_inner().unwrap_or_else(Quotas::new),
        lanes: Lanes::new(lanes.collect()),
        files,
        writer,
        snapshots: state.snapshots,
        ledger: state.cold.into_ledger(),
        generation: generation.number,
        first_reservation,
        sinks: Vec::new(),
        report: state.report,
    })
}

/// Rings that were made for a generation that no batch names yet. They go with it: where an open
/// ends for want of space, they take the most of it.
struct NewRings<'a> {
    storage: &'a Arc<dyn Storage>,
    names: Vec<String>,
}

impl Drop for NewRings<'_> {
    fn drop(&mut self) {
        for name in &self.names {
            // What can't be removed now is removed at the next open.
            let _ = self.storage.remove(name);
        }
    }
}

/// The next use of the rings: the same files where their number and size are as wanted, else new
/// ones.
fn next_generation(
    storage: &Arc<dyn Storage>,
    engine: EngineId,
    state: &State,
    wanted: &Wanted,
    made: &mut NewRings<'_>,
) -> Result<Generation> {
    let old = state.cold.generation();
    let number = old.map_or(0, |generation| generation.number) + 1;
    let salt = u64::from_le_bytes(random()?);
    let ends: BTreeMap<_, _> =
        state.spans.iter().map(|span| (usize::from(span.lane), span.to)).collect();
    let existing = list(storage)?;
    let mut rings = Vec::new();
    for lane in 0..wanted.lanes {
        let kept = old
            .and_then(|generation| generation.rings.get(lane))
            .filter(|ring| ring.capacity == wanted.lane_records);
        let end = ends.get(&lane).copied().or_else(|| state.cold.lane(lane)).unwrap_or(0);
        let ring = RingRef {
            created: kept.map_or(number, |ring| ring.created),
            capacity: wanted.lane_records,
            // At the start of the ring, whose pages are the warmest.
            base: end.next_multiple_of(wanted.lane_records),
        };
        if kept.is_some() {
            rings::allocate(storage, lane, &ring)?;
        } else {
            // Left by a recovery that was killed before its batch was written.
            let name = rings::file_name(lane, ring.created);
            if existing.contains(&name) {
                remove(storage, &name)?;
            }
            rings::create(storage, engine, lane, &ring)?;
            made.names.push(name);
        }
        rings.push(ring);
    }
    storage.sync_directory().map_err(|error| Error::io("sync", storage.path(""), error))?;
    Ok(Generation { number, salt, boot: storage.boot_id(), rings })
}

/// A random number, so that no id is given twice: generations repeat if a directory is salvaged,
/// copied or made anew, and a caller that has kept an id must not find another's reservation under
/// it.
fn first_reservation() -> Result<u64> {
    Ok(FIRST_RESERVATION_MIN + u64::from_le_bytes(random()?) % FIRST_RESERVATION_MIN)
}

/// A snapshot that is damaged was made up for by the one before it: it would only be tried again.
fn remove_other_snapshots(storage: &Arc<dyn Storage>, state: &State) -> Result<()> {
    let kept = || state.snapshots.iter().map(|snapshot| snapshot.point.number);
    let is_kept = |number| kept().chain(state.unread.iter().copied()).any(|kept| kept == number);
    for name in list(storage)? {
        if snapshot::parse_file_name(&name).is_some_and(|number| !is_kept(number)) {
            remove(storage, &name)?;
        }
    }
    Ok(())
}

fn remove_other_rings(storage: &Arc<dyn Storage>, generation: &Generation) -> Result<()> {
    let rings = generation.rings.iter().enumerate();
    let used: Vec<_> = rings.map(|(lane, ring)| rings::file_name(lane, ring.created)).collect();
    for name in list(storage)?.iter().filter(|name| rings::is_ring(name) && !used.contains(name)) {
        remove(storage, name)?;
    }
    Ok(())
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests;
