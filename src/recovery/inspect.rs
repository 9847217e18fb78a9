//! Looks at a data directory from outside: what it holds, without changing it.

use std::path::Path;
use std::sync::Arc;

use crate::admission::quotas::Quotas;
use crate::clock::{Clock, SystemClock};
use crate::delivery::state::{self as sinks, SinkState};
use crate::error::Result;
use crate::identity;
use crate::journal::files::FileSequence;
use crate::journal::found::{FoundFiles, UnreadableFile, find_files};
use crate::journal::writer::ChainPoint;
use crate::ledger::Remembering;
use crate::model::{EngineId, Quota, QuotaId};
use crate::recovery::load::without_state;
use crate::recovery::{
    Finding, RecoveryReport, State, Wanted, beyond_journal, has_content, is_ours, list,
    load_newest, rings,
};
use crate::sink::Position;
use crate::snapshot::deltas::DeltaRange;
use crate::snapshot::{self, SnapshotReader};
use crate::storage::{RealStorage, Storage};

/// What a data directory holds.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Inspection {
    /// The identity of the directory.
    pub engine_id: EngineId,
    /// What a recovery would find now.
    pub report: RecoveryReport,
    /// The last batch in the journal.
    pub last_batch: u64,
    /// The last batch that the journal says is durable.
    pub durable_batch: u64,
    /// How many times the directory was opened.
    pub generation: u64,
    /// The quotas, in the order of their definition.
    pub quotas: Vec<InspectedQuota>,
    /// The lanes.
    pub lanes: Vec<InspectedLane>,
    /// The sinks that it knows, by name.
    pub sinks: Vec<InspectedSink>,
    /// The journal's files, oldest first, then the snapshots, oldest first.
    pub files: Vec<InspectedFile>,
}

/// A quota and its counters.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct InspectedQuota {
    /// Its id.
    pub id: QuotaId,
    /// Its definition, with the default limit that applies now.
    pub quota: Quota,
    /// Counters in windows that are open now.
    pub counters: u64,
    /// The sum of what they have used.
    pub used: u128,
    /// The user who has used most, and how much.
    pub largest: Option<(u64, u64)>,
}

/// A lane's ring.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct InspectedLane {
    /// The ring's file.
    pub name: String,
    /// How many records it holds at most.
    pub capacity: u64,
    /// The number of the first record that the journal does not hold.
    pub next: u64,
    /// Records that the journal does not hold yet.
    pub waiting: u64,
}

/// A sink that was delivered to.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct InspectedSink {
    /// The name under which it was attached.
    pub name: String,
    /// The last position that it is known to have confirmed. It may have confirmed
    /// [`in_flight`](Self::in_flight) since; only the sink knows.
    pub position: Option<Position>,
    /// The end of the last delivery that was sent.
    pub in_flight: Option<Position>,
    /// Files that hold what it has not got and the journal may no longer have.
    pub backlog: Vec<String>,
}

/// A file of the journal, or a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct InspectedFile {
    /// The name.
    pub name: String,
    /// The length.
    pub bytes: u64,
    /// What it is.
    pub state: InspectedFileState,
}

/// What a file is.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum InspectedFileState {
    /// A journal file that holds the batches after this one.
    HoldsAfter(u64),
    /// A journal file that is ready to be used.
    Prepared,
    /// A journal file whose header does not verify.
    Unreadable(String),
    /// A snapshot up to this batch, with this many sums; verified to the end.
    Snapshot {
        /// The batch.
        batch: u64,
        /// Sums in it, of closed windows too.
        sums: u64,
    },
    /// A snapshot that does not verify.
    DamagedSnapshot(String),
}

/// Looks at a data directory, without taking its lock or changing anything.
///
/// Reads what a recovery would read, so it takes as long. If another process has the directory
/// open, files change while they are read, and what is found may be out of date or seem damaged.
///
/// # Errors
///
/// As [`Tollgate::open`](crate::Tollgate::open), except for the lock;
/// [`Error::Io`](crate::Error::Io) where there is no data directory.
pub fn inspect(dir: impl AsRef<Path>) -> Result<Inspection> {
    let dir = dir.as_ref();
    let storage: Arc<dyn Storage> = Arc::new(RealStorage::open_read_only(dir)?);
    let Some(identity) = identity::read(&storage)? else {
        let has_files = list(&storage)?.iter().any(|name| is_ours(name));
        let error = if has_files { identity::missing } else { identity::no_directory };
        return Err(error(&storage));
    };
    let engine = identity.engine;
    // Before the journal: what sinks were sent was durable by then, so a journal that is read later
    // holds it.
    let sinks = sinks::load_all(&storage, engine)?;
    let found = find_files(&storage, engine)?;
    let mut files = inspect_journal(&found);
    files.extend(inspect_snapshots(&storage, engine)?);
    let wanted = Wanted {
        lanes: 0,
        lane_records: 0,
        journal_file_bytes: 0,
        shards: 64,
        counters_expected: 0,
        remembering: Remembering::ALL,
        now: SystemClock.now(),
    };
    let mut state = if identity.is_created || has_content(&storage, engine)? {
        load_newest(&storage, engine, &found, &wanted)?
    } else {
        State::empty(&wanted)
    };
    let names = list(&storage)?;
    let beyond: Vec<_> = sinks.iter().filter_map(|sink| beyond_journal(sink, &state)).collect();
    let refused = beyond.into_iter().chain(without_state(&names));
    state.report.findings.extend(refused.map(|(name, what)| Finding {
        path: storage.path(&name),
        offset: 0,
        what,
    }));
    Ok(Inspection {
        engine_id: engine,
        last_batch: state.chain.last.number.0,
        durable_batch: state.chain.durable.number.0,
        generation: state.cold.generation().map_or(0, |generation| generation.number),
        quotas: inspect_quotas(&state),
        lanes: inspect_lanes(&state),
        sinks: sinks.iter().map(inspect_sink).collect(),
        files,
        report: state.report,
    })
}

fn inspect_sink(state: &SinkState) -> InspectedSink {
    let position = |point: ChainPoint| Position { batch: point.number.0, check: point.check };
    let file = |&range: &DeltaRange| sinks::backlog_name(&state.name, range);
    InspectedSink {
        name: state.name.clone(),
        position: state.confirmed.map(position),
        in_flight: state.in_flight.map(position),
        backlog: state.backlog.iter().map(file).collect(),
    }
}

fn inspect_journal(found: &FoundFiles) -> Vec<InspectedFile> {
    let in_use = found.in_use.iter().map(|entry| {
        let state = InspectedFileState::HoldsAfter(entry.previous.number.0);
        (entry.sequence, entry.bytes, state)
    });
    let prepared = found
        .prepared
        .iter()
        .map(|&(sequence, _, bytes)| (sequence, bytes, InspectedFileState::Prepared));
    let unreadable = found.unreadable.iter().map(|UnreadableFile { entry, reason, .. }| {
        let state = InspectedFileState::Unreadable((*reason).to_owned());
        (entry.sequence, entry.bytes, state)
    });
    let mut files: Vec<_> = in_use.chain(prepared).chain(unreadable).collect();
    files.sort_unstable_by_key(|&(sequence, ..)| sequence);
    let describe = |(sequence, bytes, state): (FileSequence, u64, _)| InspectedFile {
        name: sequence.file_name(),
        bytes,
        state,
    };
    files.into_iter().map(describe).collect()
}

fn inspect_snapshots(storage: &Arc<dyn Storage>, engine: EngineId) -> Result<Vec<InspectedFile>> {
    let mut numbers: Vec<_> =
        list(storage)?.iter().filter_map(|name| snapshot::parse_file_name(name)).collect();
    numbers.sort_unstable();
    let look = |number| -> Result<(u64, u64)> {
        let mut reader = SnapshotReader::open(storage, engine, number)?;
        reader.verify_to_end()?;
        Ok((reader.bytes(), reader.sum_count()))
    };
    let files = numbers.into_iter().map(|number| {
        let name = snapshot::file_name(number);
        let (bytes, state) = match look(number) {
            Ok((bytes, sums)) => (bytes, InspectedFileState::Snapshot { batch: number.0, sums }),
            Err(error) => {
                let bytes = storage.open(&name).and_then(|file| file.len()).unwrap_or(0);
                (bytes, InspectedFileState::DamagedSnapshot(error.to_string()))
            }
        };
        InspectedFile { name, bytes, state }
    });
    Ok(files.collect())
}

fn inspect_quotas(state: &State) -> Vec<InspectedQuota> {
    let mut quotas: Vec<_> = state
        .quotas
        .get_or_init(Quotas::new)
        .iter()
        .map(|quota| InspectedQuota {
            id: quota.definition().id,
            quota: quota.definition().quota(),
            counters: 0,
            used: 0,
            largest: None,
        })
        .collect();
    state.table.for_each(|key, live| {
        let used = live.cell.load().used();
        if let Some(quota) = quotas.get_mut(usize::from(key.quota.as_u16())) {
            quota.counters += 1;
            quota.used += u128::from(used);
            if quota.largest.is_none_or(|(_, most)| used > most) {
                quota.largest = Some((key.user, used));
            }
        }
    });
    quotas
}

fn inspect_lanes(state: &State) -> Vec<InspectedLane> {
    let rings = state.cold.generation().map(|generation| &generation.rings[..]).unwrap_or_default();
    let lanes = rings.iter().enumerate().map(|(lane, ring)| InspectedLane {
        name: rings::file_name(lane, ring.created),
        capacity: ring.capacity,
        next: state.cold.lane(lane).unwrap_or(ring.base),
        waiting: state.waiting.get(lane).copied().unwrap_or(0),
    });
    lanes.collect()
}
