//! The one error type of the crate.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

use crate::ledger::{PARTS_MAX, Settlement};
use crate::model::{AMOUNT_MAX, QuotaId, ReservationId};

/// Why an operation was not carried out.
///
/// A denial is not an error: it is a [`Decision`](crate::Decision). An error means that nothing was
/// counted, unless the variant says otherwise or the operation waits for the disk (a `_sync`
/// operation, or any with [`Config::durable_consumes`](crate::Config::durable_consumes)). Such an
/// operation counts first, so [`Io`](Self::Io), [`Damaged`](Self::Damaged) and
/// [`DurabilityLost`](Self::DurabilityLost) then mean that it was counted but may not be durable.
/// Whether something was counted can therefore not be told from the error alone, only with the
/// call; after one that [is retryable](Self::is_retryable) nothing was.
///
/// What [`reserve`](crate::Tollgate::reserve) and [`reserve_all`](crate::Tollgate::reserve_all)
/// counted in such a case is released, at the latest when the reservation expires, since nobody can
/// settle it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The quota id was not handed out by this data directory. Call `define` first.
    #[error("quota {0} is not defined in this data directory; define it first")]
    UnknownQuota(QuotaId),

    /// An amount of zero, or one above [`AMOUNT_MAX`].
    #[error("amount {0} is outside 1..={max}", max = AMOUNT_MAX)]
    InvalidAmount(u64),

    /// A limit above [`AMOUNT_MAX`].
    #[error("limit {0} is above {max}", max = AMOUNT_MAX)]
    InvalidLimit(u64),

    /// A floating-point amount that is not a number, infinite, negative, too large for the quota's
    /// decimals, or positive and so small that it rounds to zero units.
    #[error("amount {value} can't be counted with {decimals} decimals: {reason}")]
    InvalidFloat {
        /// The refused value.
        value: f64,
        /// The decimals of the quota.
        decimals: u8,
        /// What is wrong with it.
        reason: &'static str,
    },

    /// The counter would pass [`AMOUNT_MAX`]; nothing was counted.
    #[error("usage {used} plus {amount} would pass the largest count, {max}", max = AMOUNT_MAX)]
    Overflow {
        /// The usage before the call.
        used: u64,
        /// The amount that was asked for.
        amount: u64,
    },

    /// A quota definition that can't be accepted.
    #[error("quota {name:?} can't be defined: {reason}")]
    InvalidQuota {
        /// The name of the quota.
        name: String,
        /// What is wrong with the definition.
        reason: String,
    },

    /// A configuration value outside its range, or a configuration text that can't be read.
    #[error("configuration: {field} is {value}, allowed: {allowed}")]
    InvalidConfig {
        /// The field, with its path in the file.
        field: String,
        /// The value found.
        value: String,
        /// What would have been accepted.
        allowed: String,
    },

    /// Another process (or another `Tollgate` in this one) owns the data directory.
    #[error(
        "{} is in use by another process, or by another Tollgate or sink in this one: close that first",
        dir.display()
    )]
    #[non_exhaustive]
    Locked {
        /// The data directory.
        dir: PathBuf,
    },

    /// There is no engine in the directory, or no such directory, and
    /// [`create_if_missing(false)`](crate::Builder::create_if_missing) was asked for. Nothing was
    /// created.
    #[error(
        "{} {}, and none is to be created: check the path, and that its file system is mounted; \
         the first open of a new directory needs create_if_missing(true)",
        dir.display(),
        if *exists { "holds no engine" } else { "does not exist" }
    )]
    #[non_exhaustive]
    NoEngine {
        /// The data directory.
        dir: PathBuf,
        /// Whether the directory exists.
        exists: bool,
    },

    /// The data directory is on a file system that can't keep the promises (a network file system).
    #[error("{} lies on a {kind} file system, which can't be trusted with a log; use a local one", dir.display())]
    #[non_exhaustive]
    UnsupportedFileSystem {
        /// The data directory.
        dir: PathBuf,
        /// The kind of file system.
        kind: &'static str,
    },

    /// The processor lacks an instruction that the counters or the log need: on x86-64 those of
    /// level v2, which a virtual machine may hide.
    #[error("this processor lacks {lacks}, which the library needs")]
    UnsupportedProcessor {
        /// The instruction.
        lacks: &'static str,
    },

    /// The operating system refused something; the message says what, and to which file.
    #[error("can't {action} {}: {source}", path.display())]
    #[non_exhaustive]
    Io {
        /// What was being done, as a verb.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },

    /// A file holds something that a crash can't have left there. Nothing was changed.
    /// `tollgate verify` reports what else is damaged, and `tollgate salvage` saves what can be
    /// saved.
    #[error("{} is damaged at byte {offset}: {reason}; `tollgate verify` says more", path.display())]
    #[non_exhaustive]
    Damaged {
        /// The damaged (or missing) file.
        path: PathBuf,
        /// Where in the file the damage was noticed.
        offset: u64,
        /// What was found.
        reason: String,
    },

    /// The file was written by another version of the format.
    #[error(
        "{} has format version {found}, and this library reads version {supported}; open it with \
         the version that wrote it",
        path.display()
    )]
    UnsupportedVersion {
        /// The file.
        path: PathBuf,
        /// The version found.
        found: u32,
        /// The version that this library reads.
        supported: u32,
    },

    /// The log had no room within the configured deadline; nothing was counted. The flushers are
    /// behind, or the disk is full: `health` says which.
    #[error("the log had no room for {waited:?}; nothing was counted, see health() for the cause")]
    Backpressure {
        /// How long the call waited.
        waited: Duration,
    },

    /// Nothing can be made durable any more: a sync failed, and so did writing the same data to a
    /// new file; or a sync of the directory failed; or a file of the journal was taken away; or the
    /// log does not verify; or a flusher panicked. A `_sync` operation that gets this error was
    /// counted in memory and in the log, but may not survive loss of power; a definition or limit
    /// is as before. Open the directory again.
    #[error(
        "durability is lost: {reason}; what is counted survives this process, but maybe not loss of \
         power; open the directory again"
    )]
    #[non_exhaustive]
    DurabilityLost {
        /// The first failure.
        reason: String,
        /// The error that it was, where it was one.
        source: Option<Box<Error>>,
    },

    /// Counted in memory only: the log had no room, and
    /// [`AdmitUnlogged`](crate::Backpressure::AdmitUnlogged) is configured. It is lost at the next
    /// open.
    #[error(
        "the amount was counted in memory only, since the log had no room; the next open does not \
         find it"
    )]
    NotLogged,

    /// Whether a change of a definition or limit is durable is unknown: it may be gone after a
    /// restart. Until then, a new limit or a changed definition is in effect; a new quota is
    /// defined if [`quota_by_name`](crate::Tollgate::quota_by_name) finds it, and otherwise will be
    /// once a later `define` succeeds. Make the change again once `health` has recovered.
    #[error(
        "the change may be gone after a restart: {source}; make it again once health() has \
         recovered"
    )]
    OutcomeUnknown {
        /// What failed.
        source: Box<Error>,
    },

    /// `consume_batch` stopped in the middle: the first items were counted, the others were not. Or
    /// all were counted, but could not be made durable as
    /// [`durable_consumes`](crate::Config::durable_consumes) demands.
    #[error("{counted} of the items were counted, then: {source}")]
    BatchCutShort {
        /// How many items were counted, starting with the first.
        counted: usize,
        /// What stopped it.
        source: Box<Error>,
    },

    /// A bound of the configuration or of the format was reached; nothing was counted.
    #[error("too many {what}: at most {bound}; nothing was counted")]
    TooMany {
        /// What there are too many of, which says whether waiting helps.
        what: Resource,
        /// The bound.
        bound: u64,
    },

    /// An operation over no counter, or more than 16: a list of no items, or of too many.
    #[error("{found} items were given, allowed: 1..={max}; nothing was counted", max = PARTS_MAX)]
    InvalidGroup {
        /// How many there are.
        found: usize,
    },

    /// A reservation's time to live of less than a millisecond, or of more than 7 days.
    #[error("a time to live of {0:?} is outside 1 millisecond to 7 days")]
    InvalidTtl(Duration),

    /// No such reservation is open, and how it ended is not remembered: it was settled longer than
    /// the `dedup_window` ago, or never made. Nothing was counted.
    #[error("reservation {0} is not known; nothing was counted")]
    UnknownReservation(ReservationId),

    /// The reservation has ended already; nothing was counted now.
    #[error("reservation {id} is {how} already; nothing was counted")]
    ReservationSettled {
        /// The reservation.
        id: ReservationId,
        /// How it ended.
        how: Settlement,
    },

    /// A commit that names a counter which the reservation does not hold, or leaves out one that it
    /// holds. Nothing was counted, and it is open as before.
    #[error(
        "reservation {id} {} of user {user} and quota {quota}; nothing was counted",
        if *is_reserved { "needs an amount for the counter" } else { "does not hold the counter" }
    )]
    ReservationMismatch {
        /// The reservation.
        id: ReservationId,
        /// The user of the counter.
        user: u64,
        /// The quota of the counter.
        quota: QuotaId,
        /// Whether the reservation holds it.
        is_reserved: bool,
    },

    /// This request id was used for a different request before; nothing was counted now.
    #[error("request {id:032x} was made before with other arguments; nothing was counted")]
    RequestMismatch {
        /// The request's id.
        id: u128,
    },

    /// The event is too large because of its metadata. Nothing was counted.
    #[error(
        "the event takes {bytes} bytes of at most {max}: shorten its metadata; nothing was counted"
    )]
    EventTooLarge {
        /// How many bytes it takes, not counting user and quota.
        bytes: usize,
        /// How many it may take: 4096, or less where [`lane_records`](crate::Config::lane_records)
        /// is so small that it would not fit in a ring.
        max: usize,
    },

    /// A sink has not confirmed what it should have by now, or what it must have before the journal
    /// can be merged. What is missing is kept, and delivered when the sink takes it.
    #[error("the sink {sink:?} has not confirmed everything: {reason}")]
    #[non_exhaustive]
    NotDelivered {
        /// The sink's name.
        sink: String,
        /// Its last error; or that it takes too long; or that no more may be kept for it.
        reason: String,
        /// Its last error: a [`SinkError`](crate::sink::SinkError), or an [`Error`] where what is
        /// kept for it can't be read or written.
        source: Option<Arc<dyn StdError + Send + Sync>>,
        /// Whether the cause passes by itself: the sink can't be reached, or takes long.
        is_retryable: bool,
    },

    /// The engine was closed, or it belongs to the process that this one was forked from.
    #[error("the engine is closed in this process")]
    Closed,
}

/// What there may be only so many of: see [`Error::TooMany`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Resource {
    /// Open reservations: [`reservations_max`](crate::Config::reservations_max). There is room
    /// again as they are settled or expire.
    OpenReservations,
    /// Quotas of a data directory: 32,768. For good, since a quota can't be removed.
    Quotas,
    /// Definitions and limits that wait for the journal: 65,536. There is room again once it has
    /// been written.
    WaitingChanges,
    /// Sinks of one open: 64.
    Sinks,
    /// Counters with a handle or a limit of their own: about 4 billion.
    SharedCounters,
    /// Bytes that no sync has covered:
    /// [`unsynced_bytes_max`](crate::Config::unsynced_bytes_max). There is room again after the
    /// next sync.
    UnsyncedBytes,
}

impl Resource {
    /// Whether there are fewer again without anybody's help.
    fn passes(self) -> bool {
        match self {
            Self::OpenReservations | Self::WaitingChanges | Self::UnsyncedBytes => true,
            Self::Quotas | Self::Sinks | Self::SharedCounters => false,
        }
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OpenReservations => "open reservations (reservations_max)",
            Self::Quotas => "quotas",
            Self::WaitingChanges => "definitions and limits that wait for the journal",
            Self::Sinks => "sinks",
            Self::SharedCounters => "counters with a handle or a limit of their own",
            Self::UnsyncedBytes => "bytes of batches that no sync has covered (unsynced_bytes_max)",
        })
    }
}

/// The result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn io(action: &'static str, path: impl AsRef<Path>, source: io::Error) -> Self {
        Self::Io { action, path: path.as_ref().to_path_buf(), source }
    }

    pub(crate) fn damaged(path: impl AsRef<Path>, offset: u64, reason: impl Into<String>) -> Self {
        Self::Damaged { path: path.as_ref().to_path_buf(), offset, reason: reason.into() }
    }

    pub(crate) fn config(
        field: impl Into<String>,
        value: impl ToString,
        allowed: impl Into<String>,
    ) -> Self {
        Self::InvalidConfig {
            field: field.into(),
            value: value.to_string(),
            allowed: allowed.into(),
        }
    }

    /// A copy, for another caller.
    pub(crate) fn again(&self) -> Self {
        match self {
            Self::Io { action, path, source } => {
                let source = match source.raw_os_error() {
                    Some(code) => io::Error::from_raw_os_error(code),
                    None => io::Error::new(source.kind(), source.to_string()),
                };
                Self::io(action, path, source)
            }
            Self::Damaged { path, offset, reason } => Self::damaged(path, *offset, reason),
            Self::DurabilityLost { reason, source } => Self::DurabilityLost {
                reason: reason.clone(),
                source: source.as_ref().map(|source| Box::new(source.again())),
            },
            other => Self::durability_lost(other.to_string()),
        }
    }

    /// Of what is no error by itself.
    pub(crate) fn durability_lost(reason: impl Into<String>) -> Self {
        Self::DurabilityLost { reason: reason.into(), source: None }
    }

    /// Whether it is about this file.
    pub(crate) fn names(&self, file: &Path) -> bool {
        match self {
            Self::Damaged { path, .. }
            | Self::UnsupportedVersion { path, .. }
            | Self::Io { path, .. } => path == file,
            _ => false,
        }
    }

    /// Whether the disk could not return what a file holds.
    pub(crate) fn is_bad_medium(&self) -> bool {
        matches!(self, Self::Io { source, .. } if is_bad_medium(source))
    }

    /// Whether the same call may succeed later without anybody's help. Nothing was counted or
    /// changed then: to repeat the call, after a pause, counts once.
    ///
    /// - [`Backpressure`](Self::Backpressure): once the log has room.
    /// - [`TooMany`](Self::TooMany) of what there will be fewer of: open reservations, changes that
    ///   wait for the journal, unsynced bytes. Not quotas, sinks or counters with a handle.
    /// - [`Locked`](Self::Locked): once whoever has the directory closes it.
    ///   [`Builder::wait_for_lock`](crate::Builder::wait_for_lock) waits for that.
    /// - [`NotDelivered`](Self::NotDelivered), where the sink can't be reached or takes long.
    ///
    /// All others ask for another call or for help, or something was or may have been counted. Of a
    /// [`BatchCutShort`](Self::BatchCutShort) the items that were not counted can be repeated if
    /// its `source` is retryable.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Backpressure { .. } | Self::Locked { .. } => true,
            Self::TooMany { what, .. } => what.passes(),
            Self::NotDelivered { is_retryable, .. } => *is_retryable,
            Self::UnknownQuota(_)
            | Self::InvalidAmount(_)
            | Self::InvalidLimit(_)
            | Self::InvalidFloat { .. }
            // Only the end of the window would help.
            | Self::Overflow { .. }
            | Self::InvalidQuota { .. }
            | Self::InvalidConfig { .. }
            | Self::NoEngine { .. }
            | Self::UnsupportedFileSystem { .. }
            | Self::UnsupportedProcessor { .. }
            | Self::UnsupportedVersion { .. }
            | Self::InvalidGroup { .. }
            | Self::InvalidTtl(_)
            | Self::UnknownReservation(_)
            | Self::ReservationSettled { .. }
            | Self::ReservationMismatch { .. }
            | Self::RequestMismatch { .. }
            | Self::EventTooLarge { .. }
            | Self::Damaged { .. }
            | Self::Closed => false,
            // Something may have been counted or changed.
            Self::Io { .. }
            | Self::DurabilityLost { .. }
            | Self::NotLogged
            | Self::OutcomeUnknown { .. }
            | Self::BatchCutShort { .. } => false,
        }
    }

    /// Whether the cause is a lack of space: the operating system said that the disk is full, or
    /// the journal's next file is not ready yet. Also if that is the source of the error.
    #[must_use]
    pub fn is_disk_full(&self) -> bool {
        let mut cause: Option<&(dyn StdError + 'static)> = Some(self);
        while let Some(error) = cause {
            if error.downcast_ref().is_some_and(is_out_of_space) {
                return true;
            }
            cause = error.source();
        }
        false
    }
}

fn is_out_of_space(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// The operating system's errors when the disk can't return what it holds, because the sectors or
/// the file system's metadata are bad. After other errors a read may succeed later, or with other
/// rights.
const BAD_MEDIUM: &[Errno] = &[
    Errno::IO,
    Errno::ILSEQ,
    Errno::BADMSG,
    #[cfg(target_os = "linux")]
    Errno::NODATA,
    #[cfg(target_os = "linux")]
    Errno::REMOTEIO,
    #[cfg(target_os = "linux")]
    Errno::UCLEAN,
];

/// Whether a read failed because the disk can't return what it holds.
pub(crate) fn is_bad_medium(error: &io::Error) -> bool {
    Errno::from_io_error(error).is_some_and(|errno| BAD_MEDIUM.contains(&errno))
}

#[cfg(test)]
mod tests;
