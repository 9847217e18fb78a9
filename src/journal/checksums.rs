//! Checksums of parts of a file. Each byte is read only once, however the parts overlap.
#![deny(clippy::indexing_slicing)]

use std::io;

use crc32fast::Hasher;

use crate::journal::batch::BATCH_ALIGN;
use crate::storage::StorageFile;

/// So much is read at a time.
const PIECE_BYTES: usize = 1 << 18;
const _: () = assert!(PIECE_BYTES.is_multiple_of(BATCH_ALIGN));

/// The checksums of a file's beginnings, of which that of any part follows.
#[derive(Debug, Default)]
pub(super) struct Checksums {
    /// Of the first 1, 2, 3.. times `BATCH_ALIGN` bytes.
    beginnings: Vec<u32>,
}

impl Checksums {
    /// The checksum of the `len` bytes from `start` on, a multiple of `BATCH_ALIGN`.
    pub(super) fn of(&mut self, file: &dyn StorageFile, start: u64, len: u64) -> io::Result<u32> {
        let align = BATCH_ALIGN as u64;
        let end = start + len;
        let mut rest = [0; BATCH_ALIGN];
        let rest_len = usize::try_from(end % align).map_err(io::Error::other)?;
        let rest = rest.split_at_mut(rest_len).0;
        file.read_exact_at(rest, end / align * align)?;
        let mut whole = self.beginning(file, end / align)?;
        whole.update(rest);
        // Two parts have the checksum of the first, moved on by the length of the second, and that
        // of the second.
        let mut first = self.beginning(file, start / align)?;
        first.combine(&Hasher::new_with_initial_len(0, len));
        Ok(whole.finalize() ^ first.finalize())
    }

    /// The checksum of the first `count` times `BATCH_ALIGN` bytes, to be continued from.
    fn beginning(&mut self, file: &dyn StorageFile, count: u64) -> io::Result<Hasher> {
        let count = usize::try_from(count).map_err(io::Error::other)?;
        let mut piece = Vec::new();
        while self.beginnings.len() < count {
            let mut hasher = self.known(self.beginnings.len());
            let left = count - self.beginnings.len();
            piece.resize((left * BATCH_ALIGN).min(PIECE_BYTES), 0);
            file.read_exact_at(&mut piece, (self.beginnings.len() * BATCH_ALIGN) as u64)?;
            for part in piece.chunks(BATCH_ALIGN) {
                hasher.update(part);
                self.beginnings.push(hasher.clone().finalize());
            }
        }
        Ok(self.known(count))
    }

    fn known(&self, count: usize) -> Hasher {
        let last = count.checked_sub(1).and_then(|last| self.beginnings.get(last));
        let len = (count * BATCH_ALIGN) as u64;
        Hasher::new_with_initial_len(last.copied().unwrap_or_default(), len)
    }
}

#[cfg(test)]
#[cfg(not(loom))]
#[allow(clippy::indexing_slicing, reason = "a test may panic")]
mod tests {
    use super::*;
    use crate::storage::sim::SimDisk;

    #[test]
    fn a_parts_checksum_is_that_of_its_bytes() {
        let bytes: Vec<_> = (0..600_000_u32).map(|at| (at % 251) as u8).collect();
        let disk = SimDisk::new(0);
        disk.put("file", &bytes);
        let file = disk.storage().open("file").unwrap();
        let mut checksums = Checksums::default();
        for (start, len) in [(128, 200_001), (0, 0), (0, 1), (64, 63), (512_000, 88_000), (64, 64)]
        {
            let part = &bytes[start..start + len];
            let check = checksums.of(&*file, start as u64, len as u64).unwrap();
            assert_eq!(check, crc32fast::hash(part), "{start}, {len}");
        }
    }
}
