//! Files that are prepared and taken.

use std::sync::Arc;

use crate::journal::files::FILE_HEADER_BYTES;
use crate::journal::writer::{ChainPoint, Encoded, JournalFiles, JournalWriter};
use crate::model::{BatchNumber, EngineId};
use crate::storage::sim::SimDisk;

const ENGINE: EngineId = EngineId(7);

fn batch(number: u64, bytes: u64) -> Encoded {
    let bytes = vec![1; usize::try_from(bytes).unwrap()];
    Encoded { number: BatchNumber(number), check: 0, bytes: bytes.into() }
}

/// A configuration with larger files meets the small ones that were prepared before it, and the
/// first file of an open is small when it is reused. Once, the first large batch then found no room
/// for ever.
#[test]
fn a_batch_that_no_prepared_file_has_room_for_gets_a_larger_one() {
    let storage = SimDisk::new(0).storage();
    let files = |bytes, spares| {
        Arc::new(JournalFiles::new(Arc::clone(&storage), ENGINE, bytes, Vec::new(), spares))
    };
    files(4096, Vec::new()).prepare().unwrap();
    let found = crate::journal::reader::find_files(&storage, ENGINE).unwrap();
    assert_eq!(found.prepared.len(), 2);

    let larger = 64 << 10;
    let files = files(larger, found.prepared);
    let mut writer = JournalWriter::begin(Arc::clone(&files), ChainPoint::START, &[]).unwrap();
    writer.append(&batch(1, 2048)).unwrap();
    assert!(!writer.has_room(8192), "the files at hand are too small");
    assert!(writer.append(&batch(2, 8192)).is_err());
    files.prepare().unwrap();
    assert!(writer.has_room(8192));
    writer.append(&batch(2, 8192)).unwrap();
    writer.append(&batch(3, larger - 8192 - FILE_HEADER_BYTES as u64)).unwrap();
    let found = crate::journal::reader::find_files(&storage, ENGINE).unwrap();
    let sequences: Vec<_> = found.in_use.iter().map(|entry| entry.sequence.0).collect();
    assert_eq!(sequences, [1, 3], "the small one was passed over");
}
