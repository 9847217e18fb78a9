//! One file of the journal on its own: read from batch to batch, or for whatever verifies in it.
#![deny(clippy::indexing_slicing)]

use std::sync::Arc;

use crate::codec::DecodeResult;
use crate::error::Result;
use crate::journal::batch::Batch;
use crate::journal::pool::IndexEntry;
use crate::journal::reader::{Cursor, FoundBatch, Next, Torn, UNUSED};
use crate::journal::writer::ChainPoint;
use crate::model::EngineId;
use crate::storage::Storage;

/// What a walk through one file in use finds.
#[derive(Debug)]
pub(crate) struct FileCheck {
    /// Batches that verify and follow each other, from the file's beginning on.
    pub(crate) batches: u64,
    /// The last of them, or the one before the file.
    pub(crate) last: ChainPoint,
    /// Where and why the walk ended before it should have.
    pub(crate) torn: Option<Torn>,
}

/// Walks through one file on its own, whether or not a recovery would: every batch, with its sums,
/// up to the one that the file after it names.
pub(crate) fn check_file(
    storage: &Arc<dyn Storage>,
    engine: EngineId,
    entry: &IndexEntry,
    next: Option<&IndexEntry>,
) -> Result<FileCheck> {
    let path = storage.path(&entry.sequence.file_name());
    let bound = next.map(|next| next.previous);
    let mut check = FileCheck { batches: 0, last: entry.previous, torn: None };
    let mut cursor = Cursor::new(storage, engine, entry);
    while bound.is_none_or(|bound| check.last.number < bound.number) {
        let at = cursor.offset;
        let reason = match cursor.next(check.last)? {
            Next::Batch(bytes) => match check_batch(engine, bytes) {
                Ok(point) => {
                    check.batches += 1;
                    check.last = point;
                    continue;
                }
                Err(reason) => reason,
            },
            Next::End { reason: UNUSED, .. } if bound.is_none() => return Ok(check),
            Next::End { reason, .. } => reason,
        };
        check.torn = Some(Torn { path, offset: at, reason });
        return Ok(check);
    }
    if bound.is_some_and(|bound| bound.number == check.last.number && bound != check.last) {
        let reason = "the file after it follows another batch of this number";
        check.torn = Some(Torn { path, offset: cursor.offset, reason });
    }
    Ok(check)
}

fn check_batch(engine: EngineId, bytes: &[u8]) -> DecodeResult<ChainPoint> {
    let batch = Batch::decode(engine, bytes)?;
    batch.sums().try_for_each(|sum| sum.map(drop))?;
    Ok(ChainPoint { number: batch.header.number, check: batch.header.check })
}

/// Visits every batch in a file that verifies, with its sums and wherever it lies: where one does
/// not, the next is looked for.
pub(crate) fn scan_file(
    storage: &Arc<dyn Storage>,
    engine: EngineId,
    entry: &IndexEntry,
    visit: &mut dyn FnMut(u64, &Batch<'_>),
) -> Result<()> {
    let mut cursor = Cursor::new(storage, engine, entry);
    while let Some(FoundBatch { offset, bytes, .. }) = cursor.find_batch()? {
        if let Some(bytes) = bytes
            && check_batch(engine, bytes).is_ok()
            && let Ok(batch) = Batch::decode(engine, bytes)
        {
            visit(offset, &batch);
        }
    }
    Ok(())
}
