//! The rings' files: names, headers, creation.
//!
//! A ring's file starts with a page whose first 64 bytes are its header, little-endian, written
//! once; slots follow:
//!
//! ```text
//! offset  size  field
//!      0     4  magic "TGR1"
//!      4     4  format version (1)
//!      8    16  engine id
//!     24     8  lane
//!     32     8  generation that created the file
//!     40     8  capacity in slots
//!     48    12  zero
//!     60     4  CRC32 of bytes 0..60
//! ```
#![deny(clippy::indexing_slicing)]

use std::sync::Arc;

use crate::codec::Input;
use crate::error::{Error, Result};
use crate::journal::cold::RingRef;
use crate::model::EngineId;
use crate::numbers::number_in_name;
use crate::storage::Storage;
use crate::wal::record::SLOT_BYTES;
use crate::wal::region::{SLOTS_AT, Slots};

const MAGIC: [u8; 4] = *b"TGR1";
const VERSION: u32 = 1;
const PREFIX: &str = "lane-";
const SUFFIX: &str = ".tgr";
/// There are at most 1024 lanes.
const LANE_DIGITS: usize = 4;
const CREATED_DIGITS: usize = 20;
pub(crate) const HEADER_BYTES: usize = 64;
const CHECKED_BYTES: usize = HEADER_BYTES - 4;
const ZERO_BYTES: usize = 12;
const _: () = assert!(4 + 4 + 16 + 8 + 8 + 8 + ZERO_BYTES == CHECKED_BYTES);
const _: () = assert!(HEADER_BYTES <= SLOTS_AT * 8 || cfg!(loom));

/// The name of a lane's ring, created by a generation.
pub(crate) fn file_name(lane: usize, created: u64) -> String {
    format!("{PREFIX}{lane:0LANE_DIGITS$}-{created:0CREATED_DIGITS$}{SUFFIX}")
}

/// Whether the name is a ring's.
pub(crate) fn is_ring(name: &str) -> bool {
    let rest = name.strip_prefix(PREFIX).and_then(|rest| rest.strip_suffix(SUFFIX));
    let is_number = |digits: &str, width| number_in_name(digits, width).is_some();
    rest.and_then(|rest| rest.split_once('-')).is_some_and(|(lane, created)| {
        is_number(lane, LANE_DIGITS) && is_number(created, CREATED_DIGITS)
    })
}

fn file_bytes(capacity: u64) -> u64 {
    SLOTS_AT as u64 * 8 + capacity * SLOT_BYTES as u64
}

/// Where a slot lies in the file.
pub(super) fn slot_offset(index: u64) -> u64 {
    file_bytes(index)
}

/// Where the record with this number lies in the file of a ring of this capacity, a power of two.
pub(super) fn record_offset(number: u64, capacity: u64) -> u64 {
    slot_offset(number & (capacity - 1))
}

/// The header of a lane's ring.
pub(super) fn header(engine: EngineId, lane: usize, ring: &RingRef) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&engine.0.to_le_bytes());
    bytes.extend_from_slice(&(lane as u64).to_le_bytes());
    bytes.extend_from_slice(&ring.created.to_le_bytes());
    bytes.extend_from_slice(&ring.capacity.to_le_bytes());
    bytes.extend_from_slice(&[0; ZERO_BYTES]);
    let crc = crc32fast::hash(&bytes);
    bytes.extend_from_slice(&crc.to_le_bytes());
    bytes
}

/// Whose ring a file is, by a header whose checksum matches.
pub(crate) fn owner(storage: &Arc<dyn Storage>, name: &str) -> Option<EngineId> {
    let mut bytes = [0; HEADER_BYTES];
    storage.open(name).ok()?.read_exact_at(&mut bytes, 0).ok()?;
    let (checked, crc) = bytes.split_at(CHECKED_BYTES);
    let mut input = Input::new(checked);
    let is_ours = input.array().ok()? == MAGIC && input.u32().ok()? == VERSION;
    let owner = EngineId(input.u128().ok()?);
    let matches = Input::new(crc).u32().ok()? == crc32fast::hash(checked);
    (is_ours && matches).then_some(owner)
}

/// Creates a ring with its blocks allocated, and syncs it. The caller syncs the directory.
pub(crate) fn create(
    storage: &Arc<dyn Storage>,
    engine: EngineId,
    lane: usize,
    ring: &RingRef,
) -> Result<()> {
    let name = file_name(lane, ring.created);
    let create = || -> std::io::Result<()> {
        let file = storage.create(&name)?;
        file.allocate(file_bytes(ring.capacity))?;
        file.write_all_at(&header(engine, lane, ring), 0)?;
        file.sync_data()
    };
    create().map_err(|error| {
        // Only takes space; what can't be removed now is removed at the next open.
        let _ = storage.remove(&name);
        Error::io("create", storage.path(&name), error)
    })
}

/// Allocates all blocks of a ring that stays in use: a copy of the directory may have holes where
/// there were only zeros, and a store into a hole on a full disk kills the process.
pub(crate) fn allocate(storage: &Arc<dyn Storage>, lane: usize, ring: &RingRef) -> Result<()> {
    let name = file_name(lane, ring.created);
    let allocated = storage.open(&name).and_then(|file| file.allocate(file_bytes(ring.capacity)));
    allocated.map_err(|error| Error::io("allocate", storage.path(&name), error))
}

/// Maps a ring that the journal says is there, and checks that it is the one.
pub(crate) fn slots(
    storage: &Arc<dyn Storage>,
    engine: EngineId,
    lane: usize,
    ring: &RingRef,
) -> Result<Slots> {
    let name = file_name(lane, ring.created);
    let path = storage.path(&name);
    let found = || -> std::io::Result<_> {
        let file = storage.open(&name)?;
        let len = file.len()?;
        let mut found = vec![0; HEADER_BYTES];
        if len >= HEADER_BYTES as u64 {
            file.read_exact_at(&mut found, 0)?;
        }
        Ok((len, found))
    };
    let (len, found) = match found() {
        Ok(found) => found,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(Error::damaged(path, 0, "the ring is missing"));
        }
        Err(error) => return Err(Error::io("open", path, error)),
    };
    if len != file_bytes(ring.capacity) {
        let reason = format!("the ring is {len} bytes long, not {}", file_bytes(ring.capacity));
        return Err(Error::damaged(path, len, reason));
    }
    if found != header(engine, lane, ring) {
        return Err(Error::damaged(path, 0, "the ring's header is not what was written"));
    }
    let region = storage.map(&name).map_err(|error| Error::io("map", &path, error))?;
    Slots::new(region, ring.capacity)
        .ok_or_else(|| Error::damaged(path, 0, "a ring with a capacity that is not a power of two"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numbers::NUMBER_MAX;

    #[test]
    fn names_are_rings_up_to_the_highest_generation() {
        for created in [1, NUMBER_MAX] {
            assert!(is_ring(&file_name(1023, created)), "{created}");
        }
        for other in [&*file_name(0, NUMBER_MAX + 1), "lane-0000-99999999999999999999.tgr"] {
            assert!(!is_ring(other), "{other}");
        }
        for other in ["lane-0000-1.tgr", "lane-00000000000000000000001.tgr", "lane-0000.tgr"] {
            assert!(!is_ring(other), "{other}");
        }
    }
}
