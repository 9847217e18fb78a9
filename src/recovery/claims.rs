//! Which engine a directory belongs to, if the identity file can't be read: the headers of most
//! other files name the engine too.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::delivery::state as sinks;
use crate::error::Result;
use crate::identity;
use crate::journal::files::{FILE_HEADER_BYTES, FileHeader, FileSequence};
use crate::model::EngineId;
use crate::recovery::{list, rings};
use crate::snapshot::{self, SnapshotReader};
use crate::storage::Storage;

/// How many files name each engine, in headers that verify.
pub(super) fn count(storage: &Arc<dyn Storage>) -> Result<BTreeMap<u128, usize>> {
    let mut counts = BTreeMap::new();
    for name in list(storage)? {
        if let Some(engine) = owner(storage, &name) {
            *counts.entry(engine.0).or_insert(0) += 1;
        }
    }
    Ok(counts)
}

/// The engine that more files name than any other; where two are named as often, the one that
/// `identity` names.
pub(super) fn engine(
    storage: &Arc<dyn Storage>,
    identity: Option<EngineId>,
) -> Result<Option<EngineId>> {
    let counts = count(storage)?;
    let most = counts.values().max().copied().unwrap_or(0);
    let mut first = counts.iter().filter(|&(_, &count)| count == most).map(|(&engine, _)| engine);
    Ok(match (first.next(), first.next()) {
        (Some(engine), None) => Some(EngineId(engine)),
        (None, _) => identity,
        (Some(_), Some(_)) => {
            identity.filter(|identity| counts.get(&identity.0).is_some_and(|&count| count == most))
        }
    })
}

/// Whether it is the name of a file that an engine was writing when its process died. What else
/// lies in the directory is left alone.
pub(super) fn is_temporary(name: &str) -> bool {
    name == identity::TEMPORARY
        || FileSequence::is_temporary(name)
        || snapshot::is_temporary(name)
        || sinks::is_temporary(name)
}

/// Whose file this is.
pub(super) fn owner(storage: &Arc<dyn Storage>, name: &str) -> Option<EngineId> {
    if FileSequence::parse(name).is_some() {
        let mut bytes = [0; FILE_HEADER_BYTES];
        storage.open(name).ok()?.read_exact_at(&mut bytes, 0).ok()?;
        FileHeader::owner(&bytes)
    } else if let Some(number) = snapshot::parse_file_name(name) {
        SnapshotReader::owner(storage, number)
    } else if rings::is_ring(name) {
        rings::owner(storage, name)
    } else {
        None
    }
}
