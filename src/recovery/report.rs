//! What recovery found, for the operator.

use std::path::PathBuf;

/// What was found when the data directory was opened.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RecoveryReport {
    /// The directory was created by this open.
    pub created: bool,
    /// The last batch in the snapshot; `None` without a snapshot.
    pub snapshot_batch: Option<u64>,
    /// Batches read from the journal after the snapshot.
    pub journal_batches: u64,
    /// Records found in the lanes that no batch held: what a killed process left behind.
    pub lane_records: u64,
    /// Counters loaded into memory.
    pub counters: u64,
    /// Quotas defined.
    pub quotas: u64,
    /// The machine was restarted since the directory was last open (or that is unknown): what no
    /// completed sync had covered may be missing.
    pub machine_restarted: bool,
    /// Counters corrected after a loss of power: set to zero where a refund survived but what it
    /// refunded did not; raised by what was reserved where the end of a reservation survived but
    /// its beginning did not.
    pub corrected: u64,
    /// What did not verify and was left out, and what comes from a clock that was ahead, in one
    /// sentence each. Apart from such a clock, empty after a clean close and after the death of the
    /// process.
    pub findings: Vec<Finding>,
}

/// Something that did not verify, but that a crash explains.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Finding {
    /// The file.
    pub path: PathBuf,
    /// Where in the file, in bytes.
    pub offset: u64,
    /// What was found.
    pub what: String,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} at {}: {}", self.path.display(), self.offset, self.what)
    }
}
