//! How the engine is doing.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// Whether the engine keeps its promises, and why not.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Health {
    /// What is wrong, worst first. Empty when all is well.
    pub reasons: Vec<HealthReason>,
}

/// The state in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum HealthLevel {
    /// All promises are kept.
    Healthy,
    /// All promises are kept so far, but something needs attention.
    Degraded,
    /// Durability is lost, and what is counted from now on may not survive; or the engine is
    /// closed. Open the directory again.
    Failed,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum HealthReason {
    /// The engine was closed.
    Closed,
    /// A sync failed for good, the directory's included, the log does not verify, a file of the
    /// journal was taken away, or a flusher panicked.
    #[non_exhaustive]
    DurabilityLost {
        /// The first failure.
        reason: String,
    },
    /// The journal can't be written for now (a full disk, most often). Counting goes on until the
    /// rings are full.
    #[non_exhaustive]
    JournalBlocked {
        /// The operating system's answer.
        reason: String,
    },
    /// The data directory was moved or replaced: its path leads to another one, or to none. What is
    /// counted goes on to the directory that was opened, wherever it is now, but an open by the
    /// path would not find it. Close the engine and put the directory back in its place.
    #[non_exhaustive]
    DirectoryMoved {
        /// Where it was.
        dir: PathBuf,
    },
    /// No sync has completed for too long: a loss of power would take more than the configured
    /// interval.
    #[non_exhaustive]
    SyncLate {
        /// The time since the last completed sync began.
        since: Duration,
    },
    /// A flusher thread shows no sign of life: it is waiting for the disk, or is not scheduled.
    #[non_exhaustive]
    Stalled {
        /// The thread.
        thread: &'static str,
        /// For how long, not counting the sleep between two rounds of its work.
        silent: Duration,
    },
    /// The rings fill up: the flushers are slower than the callers.
    #[non_exhaustive]
    Backlog {
        /// How full the fullest ring is.
        percent: u8,
    },
    /// Some operations were admitted without being logged, as the configuration allows. Reported
    /// for an hour after the last one.
    #[non_exhaustive]
    Unlogged {
        /// How many since the directory was opened.
        operations: u64,
    },
    /// Syncs failed; what they should have covered was written anew to another file, so nothing is
    /// lost. The disk needs attention. Reported for an hour after the last one.
    #[non_exhaustive]
    SyncsRescued {
        /// How many since the directory was opened.
        syncs: u64,
    },
    /// Snapshots can't be written; the journal grows.
    #[non_exhaustive]
    SnapshotsFail {
        /// What happened.
        reason: String,
    },
    /// A durable batch of the journal can't be read back, so no snapshot can be made and the
    /// journal grows. What is counted is in memory and in the log. It may be for a moment only: the
    /// reason is gone once the batch has been read. As long as it stays, an open would be refused
    /// too; if it stays, look at the disk, close the engine, and [salvage](crate::salvage) the
    /// directory.
    #[non_exhaustive]
    JournalUnreadable {
        /// What happened, and to which file.
        reason: String,
    },
    /// A sink can't be reached or keeps failing, and attempts go on; or a call to it has not
    /// returned for 90 seconds. What it misses is kept.
    #[non_exhaustive]
    SinkDown {
        /// The sink's name.
        sink: String,
        /// How many attempts have failed in a row.
        attempts: u32,
        /// How many batches it is behind.
        lag_batches: u64,
        /// The last error.
        reason: String,
    },
    /// A sink refuses what it is given, for a reason that does not pass by itself. What it misses
    /// is kept.
    #[non_exhaustive]
    SinkRefused {
        /// The sink's name.
        sink: String,
        /// How many batches it is behind.
        lag_batches: u64,
        /// The last error.
        reason: String,
    },
    /// A sink that was attached before is not now. What it misses is kept, until it is
    /// attached again or [forgotten](crate::forget_sink).
    #[non_exhaustive]
    SinkMissing {
        /// The sink's name.
        sink: String,
        /// How many batches it is behind.
        lag_batches: u64,
        /// Bytes of files that are kept for it beside the journal.
        backlog_bytes: u64,
    },
    /// The wall clock jumped. Counters stay in the window they are in: one that was used while the
    /// clock was ahead is still in the window of that time after the clock has been set right. If
    /// that window is more than a day away, open the directory again, which loads the counter in
    /// its present window. Reported for a day after the last jump, as long as the clock is doubted.
    #[non_exhaustive]
    ClockJumped {
        /// How far it jumped, forwards or backwards.
        by: Duration,
        /// Whether it went backwards.
        backwards: bool,
    },
}

impl Health {
    /// The worst of the reasons.
    #[must_use]
    pub fn level(&self) -> HealthLevel {
        self.reasons.iter().map(HealthReason::level).max().unwrap_or(HealthLevel::Healthy)
    }

    /// Whether all promises are kept and nothing needs attention.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        self.level() == HealthLevel::Healthy
    }
}

impl HealthReason {
    /// How bad it is.
    #[must_use]
    pub fn level(&self) -> HealthLevel {
        match self {
            Self::Closed | Self::DurabilityLost { .. } => HealthLevel::Failed,
            _ => HealthLevel::Degraded,
        }
    }
}

impl fmt::Display for HealthLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Healthy => "healthy",
            Self::Degraded => "degraded",
            Self::Failed => "failed",
        })
    }
}

/// The level, and what is wrong.
impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.level().fmt(f)?;
        for (index, reason) in self.reasons.iter().enumerate() {
            write!(f, "{} {reason}", if index == 0 { ":" } else { ";" })?;
        }
        Ok(())
    }
}

impl fmt::Display for HealthReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => write!(f, "the engine is closed"),
            Self::DurabilityLost { reason } => write!(f, "durability is lost: {reason}"),
            Self::JournalBlocked { reason } => write!(f, "the journal can't be written: {reason}"),
            Self::DirectoryMoved { dir } => write!(
                f,
                "the data directory was moved or replaced: what is counted goes to the one that was \
                 opened, and a restart would not find it at {}; stop, and put it back there",
                dir.display()
            ),
            Self::SyncLate { since } => write!(f, "the last sync began {since:.1?} ago"),
            Self::Stalled { thread, silent } => {
                write!(f, "the thread {thread} has shown no sign of life for {silent:.1?}")
            }
            Self::Backlog { percent } => write!(f, "the fullest ring is {percent} % full"),
            Self::Unlogged { operations } => {
                write!(f, "{operations} operations were admitted without being logged")
            }
            Self::SyncsRescued { syncs } => {
                write!(f, "{syncs} syncs failed and were made good in another file; check the disk")
            }
            Self::SnapshotsFail { reason } => write!(f, "snapshots can't be written: {reason}"),
            Self::JournalUnreadable { reason } => write!(
                f,
                "the journal can't be read back for now, so that no snapshot can be made; if this \
                 stays, the next open will refuse: then close the engine and salvage the directory: \
                 {reason}"
            ),
            Self::SinkDown { sink, attempts, lag_batches, reason } => write!(
                f,
                "the sink {sink:?} is down ({attempts} attempts) and {lag_batches} batches behind: \
                 {reason}"
            ),
            Self::SinkRefused { sink, lag_batches, reason } => {
                write!(f, "the sink {sink:?} refuses and is {lag_batches} batches behind: {reason}")
            }
            Self::SinkMissing { sink, lag_batches, backlog_bytes } => write!(
                f,
                "the sink {sink:?} is not attached and {lag_batches} batches behind; {backlog_bytes} \
                 bytes are kept for it"
            ),
            Self::ClockJumped { by, backwards } => {
                let direction = if *backwards { "backwards" } else { "forwards" };
                write!(f, "the wall clock jumped {direction} by {by:.1?}")
            }
        }
    }
}
