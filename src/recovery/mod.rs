//! Recovery: snapshot, the journal after it, the lanes after that -> counters.
//!
//! It can be killed at any instant and run again. Nothing that was found is changed until a new
//! journal file holds everything again, durably: the batches that no sync is known to have covered,
//! verbatim, and one batch with what the lanes held beyond them, the corrections, and the new
//! generation. Only then are the rings used anew.

mod claims;
mod inspect;
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
pub use report::{Finding, RecoveryReport};
pub use salvage::{Salvage, salvage};
pub use verify::{Verdict, Verification, VerifiedFile, verify};

use crate::admission::cell::CellState;
use crate::admission::quotas::Quotas;
use crate::admission::shared::SHARED_MAX;
use crate::admission::table::{Key, Table};
use crate::delivery::state::{self as sinks, SinkState};
use crate::error::{Error, Result};
use crate::flush::compact::KeptSnapshot;
use crate::fold::{FoldTable, Sum};
use crate::identity::{self, Identity};
use crate::journal::batch::{self, BatchContent, LaneSpan};
use crate::journal::cold::{ColdEvent, Generation, RingRef};
use crate::journal::files::FileSequence;
use crate::journal::reader::{ChainEnd, FoundFiles, find_files, read_chain};
use crate::journal::writer::{ChainPoint, Encoded, JournalFiles, JournalWriter};
use crate::ledger::Ledger;
use crate::model::{AMOUNT_MAX, BatchNumber, EngineId, QuotaId, Timestamp, WindowStart};
use crate::snapshot::merge::{MergedSums, SumSource};
use crate::snapshot::state::ColdState;
use crate::snapshot::{self, Limit, SnapshotReader};
use crate::storage::Storage;
use crate::wal::lane::Lane;
use crate::wal::lanes::Lanes;
use crate::wal::record::Seal;

/// How the engine wants to go on.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    pub(crate) lanes: usize,
    pub(crate) lane_records: u64,
    pub(crate) journal_file_bytes: u64,
    pub(crate) shards: usize,
    pub(crate) counters_expected: usize,
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
    let sinks = if is_new { Vec::new() } else { sinks::load_all(storage, engine)? };
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
    let tips = sinks.iter().filter_map(SinkState::tip);
    files.release_up_to(tips.fold(older.point.number, |least, tip| least.min(tip.number)));
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

/// Whether a file of this name is a ring, a snapshot or the journal's.
fn is_ours(name: &str) -> bool {
    rings::is_ring(name)
        || snapshot::parse_file_name(name).is_some()
        || FileSequence::parse(name).is_some()
}

/// Whose directory it is.
struct Identified {
    engine: EngineId,
    /// Nothing was ever acknowledged in it.
    is_new: bool,
    /// Its identity says that it was created.
    is_marked: bool,
}

/// Whose directory it is, and whether it is (still) being created.
fn identify(storage: &Arc<dyn Storage>) -> Result<Identified> {
    let ours: Vec<_> = list(storage)?.into_iter().filter(|name| is_ours(name)).collect();
    match identity::read(storage)? {
        Some(Identity { engine, is_created: true }) => {
            return Ok(Identified { engine, is_new: false, is_marked: true });
        }
        Some(Identity { engine, is_created: false }) if has_content(storage, engine)? => {
            return Ok(Identified { engine, is_new: false, is_marked: false });
        }
        None if !ours.is_empty() => return Err(identity::missing(storage)),
        _ => {}
    }
    // A creation that was interrupted has acknowledged nothing: begin anew.
    remove_temporaries(storage)?;
    for name in &ours {
        remove(storage, name)?;
    }
    let mut random = [0; 16];
    fill_random(&mut random)?;
    let engine = EngineId(u128::from_le_bytes(random));
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

fn fill_random(bytes: &mut [u8]) -> Result<()> {
    getrandom::fill(bytes).map_err(|error| {
        Error::io("read random bytes from", "the operating system", std::io::Error::other(error))
    })
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
    /// What the lanes held beside sums, encoded.
    events: Vec<u8>,
    /// The spans of the lanes that the remainder covers.
    spans: Vec<LaneSpan>,
    /// Per lane: how many records the remainder covers.
    waiting: Vec<u64>,
    chain: ChainEnd,
    snapshots: Vec<KeptSnapshot>,
    /// Snapshots that nobody needs now and that can't be read now: they may be good.
    unread: Vec<BatchNumber>,
    report: RecoveryReport,
}

impl State {
    fn leave_alone(&mut self, storage: &Arc<dyn Storage>, number: BatchNumber, error: &Error) {
        self.unread.push(number);
        let path = storage.path(&snapshot::file_name(number));
        self.report.findings.push(Finding { path, offset: 0, what: error.to_string() });
    }

    fn empty(wanted: &Wanted) -> Self {
        Self {
            cold: ColdState::new(),
            table: Table::new(wanted.shards, wanted.counters_expected),
            quotas: OnceCell::new(),
            remainder: FoldTable::default(),
            events: Vec::new(),
            spans: Vec::new(),
            waiting: Vec::new(),
            chain: ChainEnd::at_start(),
            snapshots: Vec::new(),
            unread: Vec::new(),
            report: RecoveryReport::default(),
        }
    }
}

/// Loads from the newest snapshot that is good; where a snapshot is damaged, from the one before it
/// and the journal since. Damage that the older one does not make up for is the answer.
fn load_newest(
    storage: &Arc<dyn Storage>,
    engine: EngineId,
    found: &FoundFiles,
    wanted: &Wanted,
) -> Result<State> {
    let mut numbers: Vec<_> =
        list(storage)?.iter().filter_map(|name| snapshot::parse_file_name(name)).collect();
    numbers.sort_unstable();
    let mut candidates: Vec<_> = numbers.into_iter().rev().map(Some).collect();
    candidates.push(None);
    let mut damage: Option<Error> = None;
    let mut findings = Vec::new();
    for (index, &candidate) in candidates.iter().enumerate() {
        match load(storage, engine, found, candidate, wanted) {
            Ok(mut state) => {
                let (newer, older) = candidates.split_at(index);
                for &number in newer.iter().flatten() {
                    // The journal does not reach as far as a snapshot that may be sound.
                    if number > state.chain.last.number && kept(storage, engine, number)?.is_some()
                    {
                        return Err(damage.unwrap_or(Error::Closed));
                    }
                }
                for &number in older.iter().skip(1).flatten() {
                    match kept(storage, engine, number) {
                        Ok(snapshot) => state.snapshots.extend(snapshot),
                        Err(error) => state.leave_alone(storage, number, &error),
                    }
                }
                state.report.findings.append(&mut findings);
                return Ok(state);
            }
            Err(error @ Error::Damaged { .. }) => {
                if let Error::Damaged { path, offset, reason } = &error {
                    let finding =
                        Finding { path: path.clone(), offset: *offset, what: reason.clone() };
                    findings.push(finding);
                }
                damage.get_or_insert(error);
            }
            Err(error) => return Err(error),
        }
    }
    Err(damage.unwrap_or(Error::Closed))
}

/// An older snapshot, if its head is good: kept until the next merge.
fn kept(
    storage: &Arc<dyn Storage>,
    engine: EngineId,
    number: BatchNumber,
) -> Result<Option<KeptSnapshot>> {
    let reader = match SnapshotReader::open(storage, engine, number) {
        Ok(reader) => reader,
        // What can't be read just now may be good.
        Err(error @ Error::Io { .. }) => return Err(error),
        Err(_) => return Ok(None),
    };
    let point = ChainPoint { number, check: reader.manifest().check };
    Ok(Some(KeptSnapshot { point, bytes: reader.bytes() }))
}

fn load(
    storage: &Arc<dyn Storage>,
    engine: EngineId,
    found: &FoundFiles,
    base: Option<BatchNumber>,
    wanted: &Wanted,
) -> Result<State> {
    let mut state = State::empty(wanted);
    let mut snapshot = match base {
        Some(number) => Some(SnapshotReader::open(storage, engine, number)?),
        None => None,
    };
    let mut start = ChainPoint::START;
    if let Some(reader) = &mut snapshot {
        state.cold = ColdState::from_snapshot(reader)?;
        let manifest = reader.manifest();
        start = ChainPoint { number: BatchNumber(manifest.number), check: manifest.check };
        state.snapshots.push(KeptSnapshot { point: start, bytes: reader.bytes() });
        state.report.snapshot_batch = Some(manifest.number);
        let expected = usize::try_from(reader.sum_count()).unwrap_or(0);
        state.table = Table::new(wanted.shards, expected.max(wanted.counters_expected));
    }

    let mut deltas = FoldTable::default();
    let cold = &mut state.cold;
    state.chain = read_chain(storage, engine, found, start, &mut |batch| {
        let damaged = |reason: &str| {
            let reason = format!("batch {}: {reason}", batch.header.number);
            Error::damaged(storage.path("journal"), 0, reason)
        };
        cold.apply(batch).map_err(damaged)?;
        deltas.add_sums(batch.sums()).map_err(damaged)
    })?;
    state.report.journal_batches = state.chain.batches;
    if let Some(torn) = &state.chain.torn {
        state.report.findings.push(Finding {
            path: torn.path.clone(),
            offset: torn.offset,
            what: format!("the journal ends here: {}", torn.reason),
        });
    }

    for (entry, reason) in &found.unreadable {
        let path = storage.path(&entry.sequence.file_name());
        let what = format!("{reason}; nothing was needed of what it may have held");
        state.report.findings.push(Finding { path, offset: 0, what });
    }

    replay::read_lanes(storage, engine, &mut state)?;
    replay::correct_reservations(&mut state);
    let mut remainder = Vec::new();
    let lanes_sums = std::mem::take(&mut state.remainder);
    deltas
        .add_sums(lanes_sums.iter().map(Ok))
        .map_err(|reason| Error::damaged(storage.path("lane"), 0, reason))?;
    state.remainder = lanes_sums;
    deltas.drain_sorted(&mut remainder);

    let quotas = state.quotas.get_or_init(Quotas::new);
    for definition in state.cold.definitions() {
        let floor = state.cold.floor(definition.id);
        quotas.define(definition.clone(), floor, wanted.now);
    }
    state.report.quotas = quotas.iter().count() as u64;
    load_counters(storage, &mut state, snapshot.as_mut(), remainder, wanted.now)?;
    load_limits(&mut state, snapshot.as_mut())?;
    state.report.counters = state.table.len() as u64;
    Ok(state)
}

/// So many counters are put into the map at once: 32 MiB of them.
const LOADED_AT_ONCE: usize = 1 << 20;

/// Sums in memory, as a source for a merge.
struct SortedSums(std::vec::IntoIter<Sum>);

impl SumSource for SortedSums {
    fn next_sum(&mut self) -> Result<Option<Sum>> {
        Ok(self.0.next())
    }
}

/// Loads the counters whose window is still open, and of which the snapshot has forgotten nothing.
///
/// Totals below zero, which refunds leave that survived a loss of power when what they gave back
/// did not, count as zero; those below what is reserved of the counter, as that, so that settling
/// finds what it gives back; those above what can be used, which a loss of refunds leaves, as that.
/// The difference is written down.
fn load_counters(
    storage: &Arc<dyn Storage>,
    state: &mut State,
    snapshot: Option<&mut SnapshotReader>,
    deltas: Vec<Sum>,
    now: Timestamp,
) -> Result<()> {
    let mut deltas = SortedSums(deltas.into_iter());
    let mut sources: Vec<&mut dyn SumSource> = vec![&mut deltas];
    if let Some(reader) = snapshot {
        sources.push(reader);
    }
    let mut totals = MergedSums::new(sources)?;
    let reserved = state.cold.ledger().reserved();
    let mut loaded = Vec::new();
    while let Some(total) = totals.next_sum()? {
        let Sum { key, amount } = total;
        let Some(quota) = state.quotas.get_or_init(Quotas::new).get(key.quota) else {
            let reason = format!("a sum of the unknown quota {}", key.quota);
            return Err(Error::damaged(storage.path("snapshot"), 0, reason));
        };
        // A window that is over needs no counter; but no counter may open in it again.
        let is_over = quota.forget(key.window, now);
        // The snapshot has left out what was counted in this window before: what is known of it is
        // not all, and says nothing about a loss. Counters open in a later one.
        if key.window < state.cold.floor(key.quota) {
            continue;
        }
        let least = if is_over { 0 } else { reserved.get(&key).copied().unwrap_or(0) };
        let used = match u64::try_from(amount.max(least)) {
            Ok(used) if used <= AMOUNT_MAX => used,
            _ => AMOUNT_MAX,
        };
        // A late commit can charge more than that to a window that is over.
        if amount < least || i128::from(used) != amount && !is_over {
            let correction = Sum { key, amount: i128::from(used) - amount };
            if state.remainder.add_checked(correction).is_none() {
                return Err(too_large(storage, total));
            }
            state.report.corrected += 1;
        }
        if !is_over {
            let place = Key { user: key.user, quota: key.quota };
            loaded.push(state.table.loaded(place, key.window, used));
            if loaded.len() == LOADED_AT_ONCE {
                state.table.load(&mut loaded);
            }
        }
    }
    state.table.load(&mut loaded);
    Ok(())
}

fn too_large(storage: &Arc<dyn Storage>, sum: Sum) -> Error {
    let reason =
        format!("user {} of quota {} has used {}", sum.key.user, sum.key.quota, sum.amount);
    Error::damaged(storage.path("snapshot"), 0, reason)
}

fn load_limits(state: &mut State, snapshot: Option<&mut SnapshotReader>) -> Result<()> {
    let mut changes: BTreeMap<(QuotaId, u64), Option<u64>> = state.cold.limit_changes().clone();
    let set = |table: &Table, quotas: &Quotas, quota: QuotaId, user: u64, limit: u64| {
        let Some(state) = quotas.get(quota) else { return Ok(()) };
        let create = || CellState::new(quota, state.window_for_new_cell(WindowStart(0)), 0);
        let is_set = table.set_limit(Key { user, quota }, Some(limit), create, |_, _| false);
        let what = "counters with a limit of their own";
        if is_set { Ok(()) } else { Err(Error::TooMany { what, bound: SHARED_MAX }) }
    };
    let quotas = state.quotas.get_or_init(Quotas::new);
    if let Some(reader) = snapshot {
        while let Some(Limit { quota, user, limit }) = reader.next_limit()? {
            match changes.remove(&(quota, user)) {
                Some(Some(changed)) => set(&state.table, quotas, quota, user, changed)?,
                Some(None) => {}
                None => set(&state.table, quotas, quota, user, limit)?,
            }
        }
    }
    for ((quota, user), change) in changes {
        if let Some(limit) = change {
            set(&state.table, quotas, quota, user, limit)?;
        }
    }
    Ok(())
}

/// Makes what was found durable in a new journal file, and opens the lanes.
fn go_on(
    storage: &Arc<dyn Storage>,
    engine: EngineId,
    found: FoundFiles,
    mut state: State,
    wanted: &Wanted,
) -> Result<Recovered> {
    let generation = next_generation(storage, engine, &state, wanted)?;
    let last = state.chain.last;
    let mut sums = Vec::new();
    state.remainder.drain_sorted(&mut sums);
    let content = BatchContent {
        number: last.number.next(),
        durable: state.chain.durable.number,
        time: wanted.now,
        previous_check: last.check,
        spans: &state.spans,
        cold: &[ColdEvent::Generation(generation.clone())],
        ledger: &state.events,
        sums: &sums,
    };
    let (bytes, check) = batch::encode(engine, &content)
        .map_err(|reason| Error::damaged(storage.path("journal"), 0, reason))?;
    let mut batches = std::mem::take(&mut state.chain.unsynced);
    batches.push(Encoded { number: content.number, check, bytes });

    let files = found.into_files(Arc::clone(storage), engine, wanted.journal_file_bytes)?;
    let files = Arc::new(files);
    let writer = JournalWriter::begin(Arc::clone(&files), state.chain.durable, &batches)?;
    remove_other_rings(storage, &generation)?;
    remove_other_snapshots(storage, &state)?;
    storage.sync_directory().map_err(|error| Error::io("sync", storage.path(""), error))?;

    let seal = Seal::new(generation.salt)?;
    let mut lanes = Vec::new();
    for (index, ring) in generation.rings.iter().enumerate() {
        lanes.push(Lane::new(rings::slots(storage, engine, index, ring)?, ring.base, seal));
    }
    Ok(Recovered {
        engine,
        table: state.table,
        quotas: state.quotas.into_inner().unwrap_or_else(Quotas::new),
        lanes: Lanes::new(lanes),
        files,
        writer,
        snapshots: state.snapshots,
        ledger: state.cold.into_ledger(),
        generation: generation.number,
        sinks: Vec::new(),
        report: state.report,
    })
}

/// The next use of the rings: the same files where their number and size are as wanted, else new
/// ones.
fn next_generation(
    storage: &Arc<dyn Storage>,
    engine: EngineId,
    state: &State,
    wanted: &Wanted,
) -> Result<Generation> {
    let old = state.cold.generation();
    let number = old.map_or(0, |generation| generation.number) + 1;
    let mut random = [0; 8];
    fill_random(&mut random)?;
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
        if kept.is_none() {
            // Left by a recovery that was killed before its batch was written.
            let name = rings::file_name(lane, ring.created);
            if existing.contains(&name) {
                remove(storage, &name)?;
            }
            rings::create(storage, engine, lane, &ring)?;
        }
        rings.push(ring);
    }
    storage.sync_directory().map_err(|error| Error::io("sync", storage.path(""), error))?;
    Ok(Generation { number, salt: u64::from_le_bytes(random), boot: storage.boot_id(), rings })
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
