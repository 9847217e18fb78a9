//! Where operations run, so that those that wait for the disk or for room in the log hold up
//! nothing else.
//!
//! An operation that is answered from memory runs on the thread that serves the connection: handing
//! it to another one would take more than twice the time of the whole request. Operations that are
//! going to wait run on [threads of their own](super::threads): those that ask to be durable, all
//! that count if the configuration says `durable_consumes`, and all operations while the log fills
//! up or the disk does not respond, as they may then wait for the `backpressure_deadline`.
//!
//! The last have a bound of their own. A disk that does not respond occupies the threads of all
//! operations that wait for it, for as long as it likes; what the engine answers from memory goes
//! on meanwhile.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Semaphore, oneshot};
use tokio::time::{Instant, timeout_at};
use tollgate::{Error, HealthReason, Tollgate};

use crate::http::App;
use crate::http::api::ApiResult;
use crate::http::errors::ApiError;
use crate::http::threads::Threads;

/// So many operations may wait for the disk at a time; the others wait for their turn.
pub(super) const OPERATIONS_MAX: usize = 512;
/// So many may wait for room in the log, which none does for longer than `backpressure_deadline`.
const ROOM_MAX: usize = 512;
/// So many reports may: they have threads of their own, as they are wanted most while others wait.
const REPORTS_MAX: usize = 8;
/// So many threads of each are there from the start, for when the system refuses to make others.
const OPERATIONS_KEPT: usize = 8;
const ROOM_KEPT: usize = 4;
const REPORTS_KEPT: usize = 2;

/// What waits longer, for its turn or for the disk, is answered without it.
pub(super) const WAIT_MAX: Duration = Duration::from_secs(30);

/// What may wait at a time.
#[derive(Debug)]
pub(crate) struct Waits {
    is_durable: bool,
    operations: Turns,
    room: Turns,
    reports: Turns,
    began: Instant,
    /// When health was last looked at, in milliseconds since then; the lowest bit: whether an
    /// operation might have had to wait.
    looked: AtomicU64,
}

/// What waits for the same: those that may at a time, and their threads, which nothing else takes.
#[derive(Debug)]
struct Turns {
    turns: Arc<Semaphore>,
    threads: Threads,
}

impl Turns {
    fn new(kept: usize, max: usize) -> io::Result<Self> {
        let turns = Arc::new(Semaphore::new(max));
        Ok(Self { turns, threads: Threads::start(kept, max)? })
    }
}

impl Waits {
    /// `is_durable`: every operation that counts waits for the disk. An error where not even a few
    /// threads can be made.
    pub(crate) fn new(is_durable: bool) -> io::Result<Self> {
        Ok(Self {
            is_durable,
            operations: Turns::new(OPERATIONS_KEPT, OPERATIONS_MAX)?,
            room: Turns::new(ROOM_KEPT, ROOM_MAX)?,
            reports: Turns::new(REPORTS_KEPT, REPORTS_MAX)?,
            began: Instant::now(),
            looked: AtomicU64::new(u64::MAX),
        })
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX >> 1)
    }

    /// For the rest of this millisecond an operation may have to wait.
    #[cfg(test)]
    pub(super) fn expect_waits(&self) {
        self.looked.store(self.now_ms() << 1 | 1, Ordering::Relaxed);
    }

    /// Whether an operation that only counts may have to wait, as of this millisecond.
    fn may_wait(&self, gate: &Tollgate) -> bool {
        let now = self.now_ms();
        // Relaxed, both: a hint.
        let seen = self.looked.load(Ordering::Relaxed);
        if seen >> 1 == now {
            return seen & 1 != 0;
        }
        let waits = may_wait(gate);
        self.looked.store(now << 1 | u64::from(waits), Ordering::Relaxed);
        waits
    }
}

/// Runs an operation: on a thread that may wait where `waits` says that it waits for the disk, or
/// everything that counts does.
pub(super) async fn run<T: Send + 'static>(
    app: &Arc<App>,
    waits: bool,
    work: impl FnOnce(&Tollgate) -> Result<T, Error> + Send + 'static,
) -> ApiResult<T> {
    if waits || app.waits.is_durable {
        on_disk(app, work).await
    } else {
        in_memory(app, work).await
    }
}

/// Runs what does not wait for the disk, whatever the configuration says; on a thread that may wait
/// only while the log fills up or the disk does not answer.
pub(super) async fn in_memory<T: Send + 'static>(
    app: &Arc<App>,
    work: impl FnOnce(&Tollgate) -> Result<T, Error> + Send + 'static,
) -> ApiResult<T> {
    if !app.waits.may_wait(&app.gate) {
        return Ok(work(&app.gate)?);
    }
    let work = move |app: &App| work(&app.gate);
    Ok(on_waiting_thread(app, &app.waits.room, work).await??)
}

/// Runs many operations in one, which may take long in any case.
pub(super) async fn run_many<T: Send + 'static>(
    app: &Arc<App>,
    work: impl FnOnce(&Tollgate) -> Result<T, Error> + Send + 'static,
) -> ApiResult<T> {
    let turns = if app.waits.is_durable { &app.waits.operations } else { &app.waits.room };
    let work = move |app: &App| work(&app.gate);
    Ok(on_waiting_thread(app, turns, work).await??)
}

/// Whether an operation that only counts may have to wait. A ring counts as filling up from
/// `backlog_degraded_percent` on.
fn may_wait(gate: &Tollgate) -> bool {
    let waits = |reason: &HealthReason| {
        matches!(
            reason,
            HealthReason::Backlog { .. }
                | HealthReason::JournalBlocked { .. }
                | HealthReason::SyncLate { .. }
                | HealthReason::Stalled { .. }
        )
    };
    gate.health().reasons.iter().any(waits)
}

/// Runs what waits for the disk.
pub(super) async fn on_disk<T: Send + 'static>(
    app: &Arc<App>,
    work: impl FnOnce(&Tollgate) -> Result<T, Error> + Send + 'static,
) -> ApiResult<T> {
    let work = move |app: &App| work(&app.gate);
    Ok(on_waiting_thread(app, &app.waits.operations, work).await??)
}

/// Gathers what is reported: statistics are added up over all parts of the map, and the sinks.
pub(super) async fn report<T: Send + 'static>(
    app: &Arc<App>,
    work: impl FnOnce(&App) -> T + Send + 'static,
) -> ApiResult<T> {
    on_waiting_thread(app, &app.waits.reports, work).await
}

/// Runs it on a thread for blocking work. What has begun ends, also when the client goes away or is
/// answered before.
async fn on_waiting_thread<T: Send + 'static>(
    app: &Arc<App>,
    Turns { turns, threads }: &Turns,
    work: impl FnOnce(&App) -> T + Send + 'static,
) -> ApiResult<T> {
    let deadline = Instant::now() + WAIT_MAX;
    let Ok(turn) = timeout_at(deadline, Arc::clone(turns).acquire_owned()).await else {
        return Err(ApiError::no_turn(WAIT_MAX));
    };
    let (done, result) = oneshot::channel();
    let here = Arc::clone(app);
    threads.run(move || {
        // The semaphores are never closed.
        let _turn = turn;
        // A result that nobody waits for any more is dropped.
        let _ = done.send(work(&here));
    });
    match timeout_at(deadline, result).await {
        Ok(ended) => ended.map_err(|_| ApiError::interrupted()),
        Err(_) => Err(ApiError::not_yet(WAIT_MAX)),
    }
}
