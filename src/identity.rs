//! The file that says whose directory this is.
//!
//! `tollgate.id`, 48 bytes, little-endian:
//!
//! ```text
//! offset  size  field
//!      0     4  magic "TGID"
//!      4     4  format version (1)
//!      8    16  engine id
//!     24     8  state: 0 = being created, 1 = created
//!     32    12  zero
//!     44     4  CRC32 of bytes 0..44
//! ```
//!
//! It is written before anything else, and once more when the first journal file is in place: a
//! directory that was created and lacks its journal is damaged, one that was being created is begun
//! anew.
#![deny(clippy::indexing_slicing)]

use std::io::ErrorKind;
use std::sync::Arc;

use crate::codec::Input;
use crate::error::{Error, Result};
use crate::model::EngineId;
use crate::storage::{Storage, TemporaryFile};

/// Its name.
pub(crate) const NAME: &str = "tollgate.id";
pub(crate) const TEMPORARY: &str = "tollgate-id.tmp";
const MAGIC: [u8; 4] = *b"TGID";
const VERSION: u32 = 1;
const BYTES: usize = 48;
const CHECKED_BYTES: usize = BYTES - 4;
const ZERO_BYTES: usize = 12;
const _: () = assert!(4 + 4 + 16 + 8 + ZERO_BYTES == CHECKED_BYTES);

/// What the file says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) engine: EngineId,
    pub(crate) is_created: bool,
}

/// Reads the identity; `None` where the directory has none.
pub(crate) fn read(storage: &Arc<dyn Storage>) -> Result<Option<Identity>> {
    let path = storage.path(NAME);
    let file = match storage.open(NAME) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("open", path, error)),
    };
    let mut bytes = [0; BYTES];
    let len = file.len().map_err(|error| Error::io("read", &path, error))?;
    if len != BYTES as u64 {
        return Err(Error::damaged(path, len, format!("it is {len} bytes long, not {BYTES}")));
    }
    file.read_exact_at(&mut bytes, 0).map_err(|error| Error::io("read", &path, error))?;
    let damaged = |reason| Error::damaged(&path, 0, reason);
    let mut input = Input::new(&bytes);
    let magic: [u8; 4] = input.array().map_err(damaged)?;
    let version = input.u32().map_err(damaged)?;
    let engine = EngineId(input.u128().map_err(damaged)?);
    let state = input.u64().map_err(damaged)?;
    let zeros: [u8; ZERO_BYTES] = input.array().map_err(damaged)?;
    let crc = input.u32().map_err(damaged)?;
    if magic != MAGIC || crc32fast::hash(bytes.split_at(CHECKED_BYTES).0) != crc {
        return Err(damaged("its checksum does not match"));
    }
    if version != VERSION {
        return Err(Error::UnsupportedVersion { path, found: version, supported: VERSION });
    }
    if state > 1 || zeros != [0; ZERO_BYTES] {
        return Err(damaged("it can't have been written like this"));
    }
    Ok(Some(Identity { engine, is_created: state == 1 }))
}

/// The error when the directory has no identity but files that need one.
pub(crate) fn missing(storage: &Arc<dyn Storage>) -> Error {
    let reason = "it is missing, although the directory holds a journal, rings, snapshots or sinks";
    Error::damaged(storage.path(NAME), 0, reason)
}

/// The error when the directory has nothing of an engine's.
pub(crate) fn no_directory(storage: &Arc<dyn Storage>) -> Error {
    let reason = std::io::Error::new(ErrorKind::NotFound, "this is not a data directory");
    Error::io("read", storage.path(""), reason)
}

/// Writes the identity, durably, in place of an earlier one.
pub(crate) fn write(storage: &Arc<dyn Storage>, identity: Identity) -> Result<()> {
    let mut bytes = Vec::with_capacity(BYTES);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&identity.engine.0.to_le_bytes());
    bytes.extend_from_slice(&u64::from(identity.is_created).to_le_bytes());
    bytes.extend_from_slice(&[0; ZERO_BYTES]);
    let crc = crc32fast::hash(&bytes);
    bytes.extend_from_slice(&crc.to_le_bytes());
    let file = TemporaryFile::create(storage, TEMPORARY.to_owned())?;
    file.write(&bytes, 0)?;
    file.publish(NAME)
}
