//! Snapshot, journal and lanes -> counters: what an open loads, and what `verify` looks at.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::admission::cell::CellState;
use crate::admission::quotas::Quotas;
use crate::admission::shared::SHARED_MAX;
use crate::admission::table::{Key, Table};
use crate::delivery::state::{self as sinks, SinkState};
use crate::error::{Error, Resource, Result};
use crate::flush::compact::KeptSnapshot;
use crate::fold::{FoldTable, Sum, SumKey};
use crate::journal::found::{FoundFiles, UnreadableFile};
use crate::journal::reader::read_chain;
use crate::journal::writer::ChainPoint;
use crate::model::{AMOUNT_MAX, BatchNumber, EngineId, QuotaId, Timestamp, WindowStart};
use crate::recovery::{Finding, State, Wanted, list, replay};
use crate::snapshot::merge::{MergedSums, SortedSums, SumSource};
use crate::snapshot::state::ColdState;
use crate::snapshot::{self, Limit, SnapshotReader};
use crate::storage::Storage;

/// Loads from the newest snapshot that is good; where a snapshot is damaged, or can't be read, from
/// the one before it and the journal since. What the older one does not make up for is the answer.
/// The file of one that can't be read stays.
pub(super) fn load_newest(
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
    let mut unreadable = Vec::new();
    for (index, &candidate) in candidates.iter().enumerate() {
        match load(storage, engine, found, candidate, wanted) {
            Ok(mut state) => {
                let (newer, older) = candidates.split_at(index);
                for &number in newer.iter().flatten() {
                    // The journal does not reach as far as a snapshot that may be sound.
                    if number > state.chain.last.number && kept(storage, engine, number)?.is_some()
                    {
                        return Err(first_of(unreadable, damage));
                    }
                }
                for (number, error) in &unreadable {
                    state.leave_alone(storage, *number, error);
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
            Err(error) => {
                let is_it = |&number: &BatchNumber| is_unreadable(storage, number, &error);
                let Some(number) = candidate.filter(is_it) else { return Err(error) };
                unreadable.push((number, error));
            }
        }
    }
    Err(first_of(unreadable, damage))
}

/// Why nothing could be loaded: first of all, what may pass.
fn first_of(unreadable: Vec<(BatchNumber, Error)>, damage: Option<Error>) -> Error {
    let unreadable = unreadable.into_iter().next().map(|(_, error)| error);
    unreadable.or(damage).unwrap_or(Error::Closed)
}

/// Whether it is this snapshot that can't be read.
fn is_unreadable(storage: &Arc<dyn Storage>, number: BatchNumber, error: &Error) -> bool {
    matches!(error, Error::Io { .. }) && error.names(&storage.path(&snapshot::file_name(number)))
}

/// The sinks that the directory knows.
///
/// # Errors
/// `Damaged` also where one is beyond the journal: what is delivered, or kept to be delivered, was
/// durable before. And where a backlog is left of one that is not known: it may hold what is
/// nowhere else.
pub(super) fn load_sinks(
    storage: &Arc<dyn Storage>,
    engine: EngineId,
    state: &State,
) -> Result<Vec<SinkState>> {
    let sinks = sinks::load_all(storage, engine)?;
    let names = list(storage)?;
    let beyond = sinks.iter().find_map(|sink| beyond_journal(sink, state));
    match beyond.or_else(|| without_state(&names).next()) {
        Some((name, reason)) => Err(Error::damaged(storage.path(&name), 0, reason)),
        None => Ok(sinks),
    }
}

/// The states that are missing though parts of the sinks' backlogs are there, once for each part,
/// and what is wrong: a sink's state is there before its backlog, and goes after it.
pub(super) fn without_state(names: &[String]) -> impl Iterator<Item = (String, String)> {
    let known: HashSet<&str> =
        names.iter().filter_map(|name| sinks::parse_file_name(name)).collect();
    names.iter().filter_map(move |name| {
        let sink = sinks::parse_backlog_name(name)?;
        let state = sinks::file_name(sink);
        let reason = || {
            format!(
                "it is missing, but {name} is there, which is kept for the sink {sink:?}: bring the \
                 file back, or have the sink forgotten, and with it what it has not got"
            )
        };
        (!known.contains(sink)).then(|| (state, reason()))
    })
}

/// What is wrong with a sink that is beyond the journal's end, and its file.
pub(super) fn beyond_journal(sink: &SinkState, state: &State) -> Option<(String, String)> {
    let (name, end, last) = (&sink.name, sink.end(), state.chain.last.number);
    let reason = || {
        format!(
            "the sink {name:?} was sent, or is kept, what was counted up to batch {end}, but the \
             journal ends with batch {last}: the batches {}..={end} are lost",
            last.next()
        )
    };
    (end > last).then(|| (sinks::file_name(name), reason()))
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
    let mut shown = 0;
    if let Some(reader) = &mut snapshot {
        state.cold = ColdState::from_snapshot(reader)?;
        let manifest = reader.manifest();
        start = ChainPoint { number: BatchNumber(manifest.number), check: manifest.check };
        state.snapshots.push(KeptSnapshot { point: start, bytes: reader.bytes() });
        state.report.snapshot_batch = Some(manifest.number);
        shown = manifest.created;
    }

    let mut deltas = FoldTable::default();
    let cold = &mut state.cold;
    state.chain = read_chain(storage, engine, found, start, &mut |batch| {
        cold.apply(batch)?;
        cold.bound(wanted.remembering, wanted.now);
        shown = batch.header.time.as_unix_millis();
        deltas.add_sums(batch.sums())
    })?;
    state.report.journal_batches = state.chain.batches;
    if let Some(torn) = &state.chain.torn {
        state.report.findings.push(Finding {
            path: torn.path.clone(),
            offset: torn.offset,
            what: format!("the journal ends here: {}", torn.reason),
        });
    }

    for UnreadableFile { entry, reason, was_prepared } in &found.unreadable {
        let path = storage.path(&entry.sequence.file_name());
        let held = if *was_prepared {
            "it was prepared, and held nothing yet"
        } else {
            "nothing is needed of what it may have held"
        };
        let what = format!("{reason}; {held}");
        state.report.findings.push(Finding { path, offset: 0, what });
    }

    replay::read_lanes(storage, engine, &mut state)?;
    replay::correct_reservations(&mut state);
    let mut remainder = Vec::new();
    let lanes_sums = std::mem::take(&mut state.remainder);
    deltas.add_sums(lanes_sums.iter().map(Ok)).map_err(|reason| {
        Error::damaged(sums_path(storage, state.report.snapshot_batch), 0, reason)
    })?;
    state.remainder = lanes_sums;
    deltas.drain_sorted(&mut remainder);

    let quotas = state.quotas.get_or_init(Quotas::new);
    for definition in state.cold.definitions() {
        let floor = state.cold.floor(definition.id);
        quotas.define(definition.clone(), floor, wanted.now);
        if floor.0 > wanted.now.as_unix_millis() {
            let from = Timestamp::from_unix_millis(floor.0);
            let name = &definition.name;
            let what = format!(
                "{name:?} counts from {from} on: the clock was ahead when the snapshot was written, \
                 which forgot the windows before"
            );
            let path = storage.path(&snapshot::file_name(start.number));
            state.report.findings.push(Finding { path, offset: 0, what });
            state.clock_findings += 1;
        }
    }
    state.report.quotas = quotas.iter().count() as u64;
    // A clock that is behind, and set right once the directory is open, gives nothing back, unless
    // the last batch was written with it.
    let latest = wanted.now.max(Timestamp::from_unix_millis(shown));
    load_counters(storage, &mut state, snapshot.as_mut(), remainder, wanted.now, latest)?;
    load_limits(&mut state, snapshot.as_mut())?;
    state.report.counters = state.table.len() as u64;
    Ok(state)
}

/// No counter is loaded in a window that begins so much later than `latest`: the clock was ahead
/// for a while, and the counter could not be used until then.
const AHEAD_MAX: Duration = Duration::from_hours(24);

/// Loads the counters whose window is still open and not far ahead of `latest`, and of which the
/// snapshot has forgotten nothing.
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
    latest: Timestamp,
) -> Result<()> {
    let State { table, cold, quotas, remainder, report, clock_findings, .. } = state;
    let quotas = quotas.get_or_init(Quotas::new);
    let sums_path = || sums_path(storage, report.snapshot_batch);
    let mut deltas = SortedSums(deltas.into_iter());
    let mut sources: Vec<&mut dyn SumSource> = vec![&mut deltas];
    if let Some(reader) = snapshot {
        sources.push(reader);
    }
    let mut totals = MergedSums::new(sources)?;
    let reserved = cold.ledger().reserved();
    let mut ahead = BTreeMap::new();
    let mut corrected = 0;
    table.load(|loading| {
        while let Some(total) = totals.next_sum()? {
            let Sum { key, amount } = total;
            let Some(quota) = quotas.get(key.quota) else {
                let reason = format!("a sum of the unknown quota {}", key.quota);
                return Err(Error::damaged(sums_path(), 0, reason));
            };
            // A window that is over needs no counter; but no counter may open in it again.
            let is_over = quota.forget(key.window, now);
            // The snapshot has left out what was counted in this window before: what is known of it
            // is not all, and says nothing about a loss. Counters open in a later one.
            if key.window < cold.floor(key.quota) {
                continue;
            }
            let least = if is_over { 0 } else { reserved.get(&key).copied().unwrap_or(0) };
            let used = match u64::try_from(amount.max(least)) {
                Ok(used) if used <= AMOUNT_MAX => used,
                _ => AMOUNT_MAX,
            };
            // A late commit can charge more than that to a window that is over.
            if amount < least || i128::from(used) != amount && !is_over {
                let correction = i128::from(used).checked_sub(amount);
                let added =
                    correction.and_then(|amount| remainder.add_checked(Sum { key, amount }));
                if added.is_none() {
                    let SumKey { user, quota, .. } = key;
                    let reason = format!("user {user} of quota {quota} has used {amount}");
                    return Err(Error::damaged(sums_path(), 0, reason));
                }
                corrected += 1;
            }
            // Where windows before the floor were forgotten, counters open in the floor's at least.
            let from = latest.as_unix_millis().max(cold.floor(key.quota).0);
            let from = Timestamp::from_unix_millis(from).saturating_add(AHEAD_MAX);
            if key.window.0 > from.as_unix_millis() {
                let (count, first) = ahead.entry(key.quota).or_insert((0, key.window));
                (*count, *first) = (*count + 1, key.window.min(*first));
            } else if !is_over {
                loading.put(Key { user: key.user, quota: key.quota }, key.window, used);
            }
        }
        Ok(())
    })?;
    let path = sums_path();
    report.corrected += corrected;
    for (quota, (count, first)) in ahead {
        let name = cold.definition(quota).map_or("", |definition| &definition.name);
        let first = Timestamp::from_unix_millis(first.0);
        let what = format!(
            "{name:?}: counters not loaded: {count}, in windows from {first} on; the clock was ahead \
             when they were used"
        );
        report.findings.push(Finding { path: path.clone(), offset: 0, what });
        *clock_findings += 1;
    }
    Ok(())
}

/// Where a bad total comes from, as near as it is known: the snapshot, or the batches.
fn sums_path(storage: &Arc<dyn Storage>, snapshot: Option<u64>) -> PathBuf {
    let name = snapshot.map(|number| snapshot::file_name(BatchNumber(number)));
    storage.path(name.as_deref().unwrap_or("journal"))
}

fn load_limits(state: &mut State, snapshot: Option<&mut SnapshotReader>) -> Result<()> {
    let mut changes: BTreeMap<(QuotaId, u64), Option<u64>> = state.cold.limit_changes().clone();
    let set = |table: &Table, quotas: &Quotas, quota: QuotaId, user: u64, limit: u64| {
        let Some(state) = quotas.get(quota) else { return Ok(()) };
        let create = || CellState::new(quota, state.window_for_new_cell(WindowStart(0)), 0);
        let is_set = table.load_limit(Key { user, quota }, limit, create);
        let what = Resource::SharedCounters;
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
