//! A new directory with everything in one snapshot.
//!
//! It begins with the snapshot of batch 1, which no journal ever held, and a journal that continues
//! after it, so nothing can be loaded without the snapshot. The identity is written last: until
//! then this is not a data directory, and an open refuses it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::Notes;
use super::pieces::Pieces;
use crate::error::Result;
use crate::fold::Sum;
use crate::identity::{self, Identity};
use crate::journal::cold::Generation;
use crate::journal::pool::JournalFiles;
use crate::journal::writer::{ChainPoint, JournalWriter};
use crate::ledger::LedgerEvent;
use crate::model::{AMOUNT_MAX, BatchNumber, Definition, EngineId, Quota, QuotaId, Timestamp};
use crate::recovery::random;
use crate::snapshot::merge::{MergedSums, SortedSums, SumSource};
use crate::snapshot::{Limit, Manifest, SnapshotInfo, SnapshotReader, SnapshotWriter};
use crate::storage::Storage;

/// The first file of the journal is empty: later ones are as large as the configuration says.
const JOURNAL_FILE_BYTES: u64 = 64 << 10;

/// Writes it. Returns what the snapshot holds, and how many quotas are defined.
pub(super) fn write(
    storage: &Arc<dyn Storage>,
    engine: EngineId,
    mut pieces: Pieces,
    mut base: Option<SnapshotReader>,
    now: Timestamp,
    notes: &mut Notes<'_>,
) -> Result<(SnapshotInfo, u64)> {
    // Before gaps are filled: what was counted under a lost definition has no meaning under
    // another.
    let known: BTreeSet<_> = pieces.definitions.keys().copied().collect();
    fill_definitions(&mut pieces.definitions, notes)?;
    let check = crc32fast::hash(&engine.0.to_le_bytes());
    let point = ChainPoint { number: BatchNumber(1), check };
    let manifest = Manifest {
        number: point.number.0,
        check,
        generation: Generation {
            // Newer than any that is known. One that is lost may be this one: reservations of the
            // two have other numbers.
            number: pieces.last_generation() + 1,
            salt: u64::from_le_bytes(random()?),
            boot: storage.boot_id(),
            rings: Vec::new(),
        },
        lanes: Vec::new(),
        definitions: pieces.definitions.values().cloned().collect(),
        floors: pieces.floors.iter().map(|(quota, window)| (quota.0, window.0)).collect(),
        created: now.as_unix_millis(),
    };
    let mut writer = SnapshotWriter::create(storage, engine, &manifest)?;
    pieces.end_ledger();
    let events = std::mem::take(&mut pieces.ledger).into_events();
    for event in events.filter(|event| is_defined(&known, event)) {
        writer.write_event(&event)?;
    }
    write_sums(&mut pieces, &known, base.as_mut(), &mut writer, notes)?;
    write_limits(&pieces, &known, base.as_mut(), &mut writer)?;
    let info = writer.finish()?;
    let files =
        JournalFiles::new(Arc::clone(storage), engine, JOURNAL_FILE_BYTES, Vec::new(), Vec::new());
    JournalWriter::begin(Arc::new(files), point, &[])?;
    identity::write(storage, Identity { engine, is_created: true })?;
    Ok((info, pieces.definitions.len() as u64))
}

fn is_defined(known: &BTreeSet<QuotaId>, event: &LedgerEvent) -> bool {
    match event {
        LedgerEvent::Open { parts, .. } | LedgerEvent::Settle { parts, .. } => {
            parts.iter().all(|part| known.contains(&part.quota))
        }
        LedgerEvent::Answer(answer) => known.contains(&answer.quota),
        // The ledger does not hold what was recorded for sinks.
        LedgerEvent::Extend { .. } | LedgerEvent::Recorded(_) => true,
    }
}

/// Ids are handed out without gaps: a quota whose definition is lost keeps its id under another
/// name, so that the others keep theirs.
fn fill_definitions(
    definitions: &mut BTreeMap<QuotaId, Definition>,
    notes: &mut Notes<'_>,
) -> Result<()> {
    let end = definitions.last_key_value().map_or(0, |(id, _)| id.0);
    for id in (0..end).map(QuotaId) {
        if definitions.contains_key(&id) {
            continue;
        }
        let mut name = format!("lost-{id}");
        while definitions.values().any(|definition| definition.name == name) {
            name.push('-');
        }
        let what = format!("the definition of quota {id} is lost: it is {name:?} now, limit 0");
        notes.loss("journal", 0, what);
        definitions.insert(id, Definition::new(id, &Quota::new(name, 0))?);
    }
    Ok(())
}

/// The totals, as a recovery would load them: not below zero, where what was given back survived
/// and what it gave back did not, and not above what can be counted.
fn write_sums(
    pieces: &mut Pieces,
    known: &BTreeSet<QuotaId>,
    base: Option<&mut SnapshotReader>,
    writer: &mut SnapshotWriter,
    notes: &mut Notes<'_>,
) -> Result<()> {
    let mut deltas = Vec::new();
    pieces.deltas.drain_sorted(&mut deltas);
    deltas.retain(|sum| known.contains(&sum.key.quota));
    let mut deltas = SortedSums(deltas.into_iter());
    let mut sources: Vec<&mut dyn SumSource> = vec![&mut deltas];
    sources.extend(base.map(|base| base as &mut dyn SumSource));
    let mut totals = MergedSums::new(sources)?;
    while let Some(Sum { key, amount }) = totals.next_sum()? {
        let largest = i128::from(AMOUNT_MAX);
        if amount > largest {
            let what = format!("user {} of quota {} has used {amount}", key.user, key.quota);
            notes.loss("journal", 0, format!("{what}: counted as {largest}"));
        }
        writer.write_sum(Sum { key, amount: amount.clamp(0, largest) })?;
    }
    Ok(())
}

fn write_limits(
    pieces: &Pieces,
    known: &BTreeSet<QuotaId>,
    base: Option<&mut SnapshotReader>,
    writer: &mut SnapshotWriter,
) -> Result<()> {
    let mut limits = BTreeMap::new();
    if let Some(base) = base {
        while let Some(Limit { quota, user, limit }) = base.next_limit()? {
            limits.insert((quota, user), Some(limit));
        }
    }
    limits.extend(pieces.limit_changes.iter().map(|(&key, &change)| (key, change)));
    for ((quota, user), limit) in limits {
        if let Some(limit) = limit.filter(|_| known.contains(&quota)) {
            writer.write_limit(Limit { quota, user, limit })?;
        }
    }
    Ok(())
}
