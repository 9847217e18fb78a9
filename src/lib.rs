//! An embedded quota engine: "may user U use n more of quota Q?", answered from memory in
//! nanoseconds, and recorded so that a crash loses nothing.
//!
//! ```
//! use tollgate::{Config, Quota, Tollgate, Window};
//!
//! # let dir = tempfile::tempdir()?;
//! # let dir = dir.path();
//! let gate = Tollgate::open(dir, Config::default())?; // creates, or locks and recovers
//! let requests = gate.define(Quota::new("requests", 1_000).window(Window::Day))?;
//!
//! let decision = gate.try_consume(42, requests, 1)?; // checked and counted in one atomic step
//! if decision.is_allowed() {
//!     assert_eq!(decision.remaining, 999);
//! } else if let Some(wait) = decision.retry_after() {
//!     println!("come back in {wait:?}");
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Counters live in a concurrent map of atomic cells. Each operation appends what it changed to a
//! memory-mapped ring, which survives the death of the process without a system call. Flusher
//! threads sum up the rings, append the sums to a journal that is synced every 100 ms (or before a
//! `_sync` operation returns), and merge the journal into snapshots. Opening the directory replays
//! snapshot, journal and rings.
//!
//! # What survives what
//!
//! An operation that has returned survives the death of the process. `_sync` operations, `sync`,
//! `define` and `set_limit` that have returned also survive loss of power.
//!
//! Everything acknowledged before the start of the last completed sync survives loss of power; a
//! sync starts every [`sync_interval`](Config::sync_interval), so a power cut loses at most that
//! plus one sync's duration. Operations admitted under [`Backpressure::AdmitUnlogged`] survive
//! nothing. `docs/durability.md` has the details, and the tests that show them.
//!
//! # What waits
//!
//! `check`, `try_consume`, `consume` and `reserve` may be called on an async runtime, with a short
//! [`backpressure_deadline`](Config::backpressure_deadline): they wait for room while the log is
//! full, for at most that long. Seldom, one may wait in the kernel for a disk that does not
//! respond. What waits for the disk by design, `open`, `define`, `sync`, `close` and others, does
//! not belong there: [`Tollgate`] says which.
//!
//! # What it needs
//!
//! 64-bit Linux (on x86-64, a processor of level v2) and a local file system. A data directory
//! takes 32 MiB for each of its [`lanes`](Config::lanes) (by default 4 on 2 processors, 64 on 32:
//! 128 MiB and 2 GiB), in addition to the journal and the snapshots;
//! [`lane_records`](Config::lane_records) makes that less.
//!
//! Users are 64-bit numbers. If yours are strings, map them to numbers with a table rather than a
//! hash: hashes may collide.
//!
//! # Features
//!
//! `config-file` (default): [`Config`] from TOML or YAML. `postgres`, `postgres-tls`, `redis`:
//! [sinks](sink) for these databases. `server`: the `tollgate` program.

#[cfg(not(target_pointer_width = "64"))]
compile_error!("tollgate maps rings and counts in 64 bits: 64-bit platforms only");

mod admission;
mod builder;
mod clock;
mod codec;
mod config;
mod counter;
mod delivery;
mod directory;
mod engine;
mod error;
mod flush;
mod fold;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod gate;
mod health;
mod identity;
mod journal;
mod ledger;
mod limits;
mod model;
mod numbers;
mod poison;
mod prefetch;
mod process;
mod recovery;
mod reservation;
mod seats;
pub mod sink;
mod snapshot;
mod stats;
mod storage;
mod sync;
#[cfg(test)]
#[cfg(not(loom))]
mod testing;
mod wal;

pub use builder::Builder;
pub use clock::{Clock, CoarseClock, ManualClock, SystemClock};
pub use config::{Backpressure, Config, DeliveryConfig};
pub use counter::Counter;
pub use delivery::{SinkCondition, SinkStatus, forget_sink};
pub use error::{Error, Resource, Result};
pub use gate::Tollgate;
pub use health::{Health, HealthLevel, HealthReason};
pub use ledger::Settlement;
pub use model::{
    AMOUNT_MAX, Consume, Decision, Decisions, EngineId, OpenReservation, Overrun, ParseIdError,
    ParseTimestampError, ParseWindowError, Quota, QuotaId, ReservationId, Timestamp, Usage,
    UsageEvent, Window,
};
pub use recovery::{
    Finding, InspectedFile, InspectedFileState, InspectedLane, InspectedQuota, InspectedSink,
    Inspection, RecoveryReport, Salvage, Verdict, Verification, VerifiedFile, inspect, salvage,
    verify,
};
pub use reservation::{Reservation, Reserved};
pub use stats::Stats;

/// Compiles the examples of the README, one of which needs the PostgreSQL sink.
#[cfg(all(doctest, feature = "postgres"))]
#[doc = include_str!("../README.md")]
struct Readme;
