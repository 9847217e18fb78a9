//! Reading a file back: where its last commit line ends, and the positions there.

use std::fs::File;
use std::io::{self, BufRead, BufReader};

use super::lines::{Commit, Positions, Start, unseal};

/// What a file holds.
#[derive(Debug)]
pub(super) struct Scan {
    pub(super) positions: Positions,
    /// Where the last committed batch begins; 0, with the first line, where there is none.
    pub(super) last: u64,
    /// The length up to the last commit line.
    pub(super) committed: u64,
}

/// Content that no crash can have left in a file.
#[derive(Debug)]
pub(super) struct Damage {
    pub(super) offset: u64,
    pub(super) reason: String,
}

/// Reads a file from its start. Only the last batch can be incomplete, since each is synced before
/// the next one begins: a batch that does not verify before another commit line is damage.
pub(super) fn scan(file: &File) -> io::Result<Result<Scan, Damage>> {
    let mut reader = Reader { input: BufReader::new(file), offset: 0, line: Vec::new() };
    if !reader.next()? {
        return damage(0, "it has no first line".to_owned());
    }
    let mut positions = match unseal(&reader.line).map(Start::parse) {
        Some(Ok(positions)) => positions,
        Some(Err(reason)) => return damage(0, reason),
        None => return damage(0, "its first line does not verify".to_owned()),
    };
    let (mut last, mut committed) = (0, reader.offset);
    let mut crc = crc32fast::Hasher::new();
    let mut lines = 0;
    while reader.next()? {
        let Some(commit) = unseal(&reader.line).and_then(Commit::parse) else {
            crc.update(&reader.line);
            crc.update(b"\n");
            lines += 1;
            continue;
        };
        if commit.from != committed {
            return damage(committed, "a batch before the last one does not verify".to_owned());
        }
        let lines_crc = std::mem::take(&mut crc).finalize();
        if (commit.lines, commit.lines_crc) == (lines, lines_crc) {
            positions.insert(commit.engine.as_u128(), commit.position);
            (last, committed) = (committed, reader.offset);
        }
        lines = 0;
    }
    Ok(Ok(Scan { positions, last, committed }))
}

fn damage<T>(offset: u64, reason: String) -> io::Result<Result<T, Damage>> {
    Ok(Err(Damage { offset, reason }))
}

struct Reader<R> {
    input: R,
    /// Just after the last line that was read.
    offset: u64,
    /// Without its line feed.
    line: Vec<u8>,
}

impl<R: BufRead> Reader<R> {
    /// Reads a line; false when no complete one is left.
    fn next(&mut self) -> io::Result<bool> {
        self.line.clear();
        let read = self.input.read_until(b'\n', &mut self.line)?;
        if self.line.pop() != Some(b'\n') {
            return Ok(false);
        }
        self.offset += read as u64;
        Ok(true)
    }
}
