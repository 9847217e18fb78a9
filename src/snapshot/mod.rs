//! Snapshots: everything up to one batch, folded into a total per counter, in one file.
//!
//! A snapshot bounds recovery and lets journal files be reused. It is written under a temporary
//! name, synced and renamed, and then the directory is synced; only a complete one ever has its
//! final name. `docs/format.md` describes the bytes.
//!
//! - [`codec`]: header and blocks; pure.
//! - [`manifest`]: what a snapshot says besides sums and limits.
//! - [`writer`], [`reader`]: one file, streamed.
//! - [`state`]: what changes rarely, folded batch by batch; pure, shared with recovery.
//! - [`merge`]: snapshot and batches become the next snapshot.
//! - [`deltas`]: the sums of a range of batches, for a sink that lags.

mod codec;
pub(crate) mod deltas;
pub(crate) mod manifest;
pub(crate) mod merge;
mod reader;
pub(crate) mod state;
mod writer;

#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing;
#[cfg(test)]
mod testing;

pub(crate) use codec::Limit;
pub(crate) use manifest::Manifest;
pub(crate) use reader::SnapshotReader;
pub(crate) use writer::{SnapshotInfo, SnapshotWriter};

use crate::model::BatchNumber;
use crate::numbers::number_in_name;

const PREFIX: &str = "snapshot-";
const SUFFIX: &str = ".tgs";
const RUN_PREFIX: &str = "run-";
const TEMPORARY_SUFFIX: &str = ".tmp";
const DIGITS: usize = 20;

/// The name of the snapshot that contains the batches up to `number`.
pub(crate) fn file_name(number: BatchNumber) -> String {
    format!("{PREFIX}{:0DIGITS$}{SUFFIX}", number.0)
}

/// The number in a snapshot's name; `None` for other names.
pub(crate) fn parse_file_name(name: &str) -> Option<BatchNumber> {
    parse_number(name.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?)
}

fn parse_number(digits: &str) -> Option<BatchNumber> {
    number_in_name(digits, DIGITS).map(BatchNumber)
}

/// Whether it is the name of a snapshot, or of a run of a merge, that is being written.
pub(crate) fn is_temporary(name: &str) -> bool {
    let Some(stem) = name.strip_suffix(TEMPORARY_SUFFIX) else { return false };
    let run = stem.strip_prefix(RUN_PREFIX).and_then(|rest| rest.split_once('-'));
    let run = run.filter(|(_, index)| index.parse::<usize>().is_ok()).map(|(start, _)| start);
    stem.strip_prefix(PREFIX).or(run).is_some_and(|digits| parse_number(digits).is_some())
}

/// The name of a snapshot while it is being written.
fn temporary_name(number: BatchNumber) -> String {
    format!("{PREFIX}{:0DIGITS$}{TEMPORARY_SUFFIX}", number.0)
}

/// The name of a sorted run of the merge that goes on from batch `start`.
fn run_name(start: BatchNumber, index: usize) -> String {
    format!("{RUN_PREFIX}{:0DIGITS$}-{index}{TEMPORARY_SUFFIX}", start.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numbers::NUMBER_MAX;

    #[test]
    fn names_round_trip_and_nothing_else_is_taken_for_one() {
        for number in [0, 1, NUMBER_MAX].map(BatchNumber) {
            assert_eq!(parse_file_name(&file_name(number)), Some(number));
            for temporary in [temporary_name(number), run_name(number, 3)] {
                assert!(is_temporary(&temporary), "{temporary}");
                assert_eq!(parse_file_name(&temporary), None, "{temporary}");
            }
        }
        for other in ["run-1.tmp", "run-00000000000000000001-a.tmp", "snapshot-1.tmp", "notes.tmp"]
        {
            assert!(!is_temporary(other), "{other}");
        }
        for other in ["snapshot-1.tgs", "snapshot-+0000000000000000001.tgs", "snapshot-.tgs"] {
            assert_eq!(parse_file_name(other), None, "{other}");
        }
        assert_eq!(parse_file_name("snapshot-99999999999999999999.tgs"), None, "above 64 bits");
        let beyond = BatchNumber(NUMBER_MAX + 1);
        assert_eq!(parse_file_name(&file_name(beyond)), None);
        assert!(!is_temporary(&temporary_name(beyond)) && !is_temporary(&run_name(beyond, 3)));
    }
}
