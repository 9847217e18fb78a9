//! What the rings hold beyond the journal.

use std::sync::Arc;

use crate::codec::DecodeResult;
use crate::error::{Error, Result};
use crate::fold::{BLOCK, FoldTable, SumKey};
use crate::journal::batch::LaneSpan;
use crate::model::EngineId;
use crate::recovery::{Finding, State, rings};
use crate::snapshot::state::ColdState;
use crate::storage::Storage;
use crate::wal::lane::{Found, load_slot, scan_ring};
use crate::wal::record::{Record, Seal};
use crate::wal::region::Slots;

/// Reads what the rings hold beyond the journal's watermarks.
pub(super) fn read_lanes(
    storage: &Arc<dyn Storage>,
    engine: EngineId,
    state: &mut State,
) -> Result<()> {
    let Some(generation) = state.cold.generation().cloned() else { return Ok(()) };
    let boot = storage.boot_id();
    state.report.machine_restarted = boot == 0 || generation.boot != boot;
    let seal = Seal::new(generation.salt)?;
    for (lane, ring) in generation.rings.iter().enumerate() {
        let from = state.cold.lane(lane).unwrap_or(ring.base);
        let name = rings::file_name(lane, ring.created);
        let path = storage.path(&name);
        let slots = rings::slots(storage, engine, lane, ring)?;
        let at = |record| rings::record_offset(record, slots.capacity());
        let (cold, events) = (&mut state.cold, &mut state.events);
        let (has_restarted, mut lost) = (state.report.machine_restarted, 0);
        let mut adds = Adds { remainder: &mut state.remainder, block: Vec::with_capacity(BLOCK) };
        let scan = scan_ring(&slots, seal, from, &mut |number, found| {
            let damaged = |reason: &str| Error::damaged(&path, at(number), reason);
            match found {
                // The loss of power that took the definition has left its use, which came later.
                Found::Add(record) if has_restarted && !cold.knows(record.quota) => lost += 1,
                Found::Operation(operation)
                    if has_restarted && !operation.quotas().all(|quota| cold.knows(quota)) =>
                {
                    lost += operation.len();
                }
                Found::Add(record) => adds.take(cold, &record).map_err(damaged)?,
                Found::Operation(operation) => {
                    for record in operation.adds() {
                        adds.take(cold, &record).map_err(damaged)?;
                    }
                    let mut remembered = Ok(());
                    operation.for_each_event(|event| {
                        events.put(&event);
                        remembered = remembered.and_then(|()| cold.remember(event));
                    });
                    remembered.map_err(damaged)?;
                }
            }
            Ok(())
        })?;
        adds.finish();
        if lost > 0 {
            let what = format!("{lost} records are of quotas whose definition was lost");
            state.report.findings.push(Finding { path: path.clone(), offset: at(from), what });
        }
        state.report.lane_records += scan.records;
        state.waiting.push(scan.records);
        if scan.end > from {
            let lane = u16::try_from(lane).unwrap_or(u16::MAX);
            state.spans.push(LaneSpan { lane, from, to: scan.end, next: scan.end });
        }
        let oddity = if let Some(lapped) = scan.lapped {
            let what = format!(
                "record {from} was overwritten by record {lapped}, so the journal held it and has \
                 lost it"
            );
            Some((from, what))
        } else if let Some(beyond) = scan.beyond_gap {
            let what = format!("record {} does not verify, but record {beyond} does", scan.end);
            Some((scan.end, what))
        } else {
            None
        };
        if let Some((record, what)) = oddity {
            let offset = at(record);
            // Without a restart of the machine the ring is what the process left, to the byte.
            if !state.report.machine_restarted {
                return Err(Error::damaged(path, offset, what));
            }
            state.report.findings.push(Finding { path, offset, what });
        } else if let Some(record) = scan.one_bit_off {
            // Only a finding: one half-stored slot in ten million looks like this by chance.
            let what = format!("record {record} would verify but for one bit, and is left out");
            state.report.findings.push(Finding { path, offset: at(record), what });
        } else if !has_restarted
            && let Some(record) = find_lost(&slots, seal, ring.base, from, scan.torn)
        {
            // Only a finding: of a copy, or of a snapshot of the disk, nothing else is wrong.
            let what = format!(
                "record {record} is in the journal but no longer in the ring: the file system has \
                 lost pages that were not synced, maybe with later records, or this is a copy of a \
                 directory that was open"
            );
            state.report.findings.push(Finding { path, offset: at(record), what });
        }
    }
    Ok(())
}

/// A record that was in the ring before the journal had it, that nothing has overwritten since, and
/// that is not there. The death of a process leaves none: page cache and journal are of the same
/// machine. `torn` is the first record from `from` on that does not verify, and so the last one
/// that can have been written to.
fn find_lost(slots: &Slots, seal: Seal, base: u64, from: u64, torn: u64) -> Option<u64> {
    let capacity = slots.capacity();
    if from <= base {
        return None;
    }
    let (number, is_overwritten) = if from.is_multiple_of(capacity) {
        // The lane may have skipped up to here, but not before it had written some.
        (from.checked_sub(capacity)? + 1, torn > from)
    } else {
        (from - 1, torn >= (from - 1).saturating_add(capacity))
    };
    let slot = load_slot(slots.get(number));
    let verifies =
        seal.verified(number, &slot).is_some() || seal.decode_skip(number, &slot).is_some();
    (!is_overwritten && !verifies).then_some(number)
}

/// Takes back what was given back, where a loss of power has left the end of a reservation and not
/// its beginning.
pub(super) fn correct_reservations(state: &mut State) {
    for part in state.cold.ledger().unproven() {
        let key = SumKey { quota: part.quota, window: part.window, user: part.user };
        state.remainder.add_block(&[(key, part.amount.cast_signed())]);
        state.report.corrected += 1;
    }
}

/// Sums records up, a block at a time.
struct Adds<'a> {
    remainder: &'a mut FoldTable,
    block: Vec<(SumKey, i64)>,
}

impl Adds<'_> {
    #[inline]
    fn take(&mut self, cold: &ColdState, record: &Record) -> DecodeResult<()> {
        if !cold.knows(record.quota) {
            return Err("a record of an unknown quota");
        }
        self.block.push((record.key(), record.delta));
        if self.block.len() == BLOCK {
            self.finish();
        }
        Ok(())
    }

    fn finish(&mut self) {
        self.remainder.add_block(&self.block);
        self.block.clear();
    }
}
