//! One sink: its position, what it gets next, and what is kept for it.
//!
//! A delivery goes through these steps, and may be interrupted between any two, for example by the
//! death of the process:
//!
//! 1. The sink's position is read, unless the last call to the sink succeeded; even then if
//!    somebody waits for the sink, or nothing was heard of it for a minute. It must be the position
//!    that the state says is confirmed, or the end that is in flight; anything else is refused.
//! 2. The sums of a range are taken from the journal or from the backlog. An end in flight is taken
//!    again, and nothing else.
//! 3. The end is made durable as in flight: from now on it stays a boundary.
//! 4. The sink applies the batch.
//! 5. The end is confirmed, in memory. The next save makes that durable, before the part of the
//!    journal that it frees is released.
//!
//! Locks, in the order in which they are taken: `serving`, held throughout by the worker that
//! serves the sink; the compactor's, only for totals, which need the newest snapshot; `kept`, never
//! while the sink is called; `progress`, for an instant.

mod asking;
mod cover;

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::clock::uptime;
use crate::config::DeliveryConfig;
use crate::delivery::failure::{Failure, call};
use crate::delivery::progress::Progress;
use crate::delivery::rows::Rows;
use crate::delivery::state::{SinkState, backlog_name, file_name};
use crate::delivery::sums::{Base, Bounds, Content, Disk, EVENT_BYTES_MAX, Gathered};
use crate::delivery::{Host, SinkStatus};
use crate::error::{Error, Result};
use crate::journal::writer::ChainPoint;
use crate::model::BatchNumber;
use crate::sink::{Position, SinkError, UsageBatch, UsageSink};
use crate::snapshot::deltas::DeltaRange;

/// How often it is looked whether the journal holds something new for a sink.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);

/// What a delivery needs besides the sink.
pub(super) struct Context<'a> {
    pub(super) disk: &'a Disk,
    pub(super) config: &'a DeliveryConfig,
    pub(super) host: &'a dyn Host,
    pub(super) is_stopping: &'a dyn Fn() -> bool,
}

impl Context<'_> {
    /// Ends what takes long once the engine closes: its close would wait for that.
    fn go_on(&self) -> Result<()> {
        if (self.is_stopping)() { Err(Error::Closed) } else { Ok(()) }
    }
}

/// A sink that the directory knows.
#[derive(Debug)]
pub(super) struct Outlet {
    pub(super) name: String,
    /// `None` where the sink is not attached; none inside once the engine has dropped it.
    serving: Option<Mutex<Option<Serving>>>,
    kept: Mutex<Kept>,
    pub(super) progress: Mutex<Progress>,
    /// Somebody waits until the sink has this batch.
    wanted: AtomicU64,
    /// The next attempt is not to wait for its time.
    is_urgent: AtomicBool,
}

/// What the worker that serves the sink holds.
struct Serving {
    sink: Box<dyn UsageSink>,
    /// The state says where the sink is: the last call of it went well.
    is_position_known: bool,
    gathered: Option<Gathered>,
    /// The end of the part of the backlog that was read last.
    last_part: Option<BatchNumber>,
    /// The batch whose end is in flight.
    prepared: Option<UsageBatch>,
    next_flush: Duration,
    next_look: Duration,
}

impl std::fmt::Debug for Serving {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Serving").field("gathered", &self.gathered).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Kept {
    state: SinkState,
    /// The file says less than `state`.
    is_dirty: bool,
    /// There may be parts of the backlog that `state` does not name: written or replaced by a merge
    /// that failed, or not removed.
    has_unlisted: bool,
    /// How long the parts of the backlog are, by their ends, except those that can't be read.
    part_bytes: HashMap<BatchNumber, u64>,
    /// The journal up to this batch is released, or is about to be.
    released: BatchNumber,
    /// Nothing is written any more: another process may have the directory.
    is_closed: bool,
}

fn position(point: ChainPoint) -> Position {
    Position { batch: point.number.0, check: point.check }
}

fn point(position: Position) -> ChainPoint {
    ChainPoint { number: BatchNumber(position.batch), check: position.check }
}

impl Outlet {
    pub(super) fn new(
        state: SinkState,
        sink: Option<Box<dyn UsageSink>>,
        config: &DeliveryConfig,
    ) -> Self {
        let serving = sink.map(|sink| {
            Mutex::new(Some(Serving {
                sink,
                is_position_known: false,
                gathered: None,
                last_part: None,
                prepared: None,
                next_flush: uptime() + config.flush_interval,
                next_look: Duration::ZERO,
            }))
        });
        Self {
            name: state.name.clone(),
            progress: Mutex::new(Progress::new(&state)),
            serving,
            kept: Mutex::new(Kept {
                state,
                is_dirty: false,
                has_unlisted: false,
                part_bytes: HashMap::new(),
                released: BatchNumber::ZERO,
                is_closed: false,
            }),
            wanted: AtomicU64::new(0),
            is_urgent: AtomicBool::new(false),
        }
    }

    pub(super) fn is_attached(&self) -> bool {
        self.serving.is_some()
    }

    /// Asks for everything up to `batch`, at once.
    pub(super) fn want(&self, batch: BatchNumber) {
        // Release, both: pair with the Acquire in `serve`.
        self.wanted.fetch_max(batch.0, Ordering::Release);
        self.is_urgent.store(true, Ordering::Release);
    }

    /// Serves the sink if it is time and nobody else does. For how long it need not be looked at;
    /// `None` where somebody else does that.
    pub(super) fn serve(&self, cx: &Context<'_>) -> Option<Duration> {
        let mut serving = self.serving.as_ref()?.try_lock()?;
        let serving = serving.as_mut()?;
        let now = uptime();
        let is_urgent = self.is_urgent.swap(false, Ordering::Acquire);
        if !is_urgent && now < serving.next_look {
            return Some(serving.next_look.saturating_sub(now));
        }
        let wait = match self.attempt(serving, cx) {
            Ok(wait) => {
                let is_news = self.progress.lock().succeeded();
                if is_news {
                    tracing::info!(sink = self.name, "the sink works again");
                }
                wait
            }
            // None of the sink's: nothing more is asked of it.
            Err(failure) if failure.is_end => LOOK_INTERVAL,
            Err(failure) => {
                // Whatever was read may not be what the state says now.
                serving.is_position_known = false;
                serving.gathered = None;
                if !failure.is_retryable {
                    // It may be large, and wait for somebody for long: it is made up again.
                    serving.prepared = None;
                }
                let (pause, is_news) = self.progress.lock().failed(&failure, cx.config);
                if is_news {
                    tracing::warn!(sink = self.name, failure.reason, "a delivery failed");
                }
                pause
            }
        };
        serving.next_look = uptime() + wait;
        let is_urgent = self.is_urgent.load(Ordering::Acquire);
        Some(if is_urgent { Duration::ZERO } else { wait })
    }

    /// One delivery, if one is due. When to look again.
    fn attempt(
        &self,
        serving: &mut Serving,
        cx: &Context<'_>,
    ) -> std::result::Result<Duration, Failure> {
        self.progress.lock().note(cx.host.durable(), uptime());
        self.ask(serving, cx)?;
        self.prepare(serving, cx)?;
        let Some(batch) = &serving.prepared else {
            return Ok(LOOK_INTERVAL.min(cx.config.flush_interval));
        };
        self.call(|| serving.sink.apply(batch))
            .map_err(|failure| Failure { is_of_batch: true, ..failure })?;
        let to = point(batch.to());
        serving.next_flush = uptime() + cx.config.flush_interval;
        self.count(&mut serving.prepared, to, cx);
        self.confirm(to, cx)?;
        Ok(Duration::ZERO)
    }

    /// Counts the batch that was prepared, if it is the one up to here, which the sink has: once.
    fn count(&self, prepared: &mut Option<UsageBatch>, to: ChainPoint, cx: &Context<'_>) {
        if let Some(batch) = prepared.take_if(|batch| point(batch.to()) == to) {
            let counts = [batch.rows().len(), batch.events().len()].map(|count| count as u64);
            self.progress.lock().delivered(counts, cx.host.now());
        }
    }

    /// Puts the batch that comes next into `serving.prepared`, if one is due, with its end durably
    /// in flight.
    fn prepare(&self, serving: &mut Serving, cx: &Context<'_>) -> Result<()> {
        let mut kept = self.kept.lock();
        kept.refuse_when_closed()?;
        self.progress.lock().look(&kept.state);
        if let Some(batch) = &serving.prepared {
            let SinkState { confirmed, in_flight, .. } = kept.state;
            if (batch.from().map(point), Some(point(batch.to()))) == (confirmed, in_flight) {
                return Ok(());
            }
            serving.prepared = None;
        }
        if kept.state.tip().is_none() {
            drop(kept);
            return self.prepare_totals(serving, cx);
        }
        let Some((content, to)) = self.next_content(&kept.state, serving, cx)? else {
            return Ok(());
        };
        self.put_in_flight(&mut kept, serving, content, to, cx)
    }

    /// What follows the confirmed position: the first part of the backlog; what is in flight
    /// already; or what has gathered, once it is much, or old, or wanted.
    fn next_content(
        &self,
        state: &SinkState,
        serving: &mut Serving,
        cx: &Context<'_>,
    ) -> Result<Option<(Content, ChainPoint)>> {
        if let Some(&range) = state.backlog.first() {
            serving.gathered = None;
            let end = range.to.number;
            let is_news = serving.last_part.replace(end) != Some(end);
            let content = cx.disk.backlog_content(state, range, is_news, &mut |_| cx.go_on())?;
            return Ok(Some((content, range.to)));
        }
        let from = state.confirmed.unwrap_or(ChainPoint::START);
        if let Some(end) = state.in_flight {
            let bounds = Bounds::exactly(end.number);
            let (content, to) =
                cx.disk.content_of(state, Base::After(from), bounds, &mut |_| cx.go_on())?;
            self.require(cx.disk, end, to)?;
            return Ok(Some((content, to)));
        }
        if serving.gathered.as_ref().is_none_or(|gathered| gathered.from != from) {
            serving.gathered = Some(cx.disk.gather_after(from, state.events_after));
        }
        let Some(gathered) = &mut serving.gathered else { return Ok(None) };
        let entries = cx.config.batch_size;
        let bounds = Bounds { entries, ..Bounds::cut(cx.host.durable()) };
        gathered.gather(cx.disk, bounds, &mut |_| cx.go_on())?;
        let to = gathered.to();
        let is_due = gathered.is_full(entries, EVENT_BYTES_MAX)
            || uptime() >= serving.next_flush
            || self.is_wanted(Some(from));
        if to == from || !is_due {
            return Ok(None);
        }
        Ok(serving.gathered.take().map(|gathered| (gathered.into_content(), to)))
    }

    /// Prepares a first delivery: everything that was counted so far, from the newest snapshot and
    /// the journal.
    fn prepare_totals(&self, serving: &mut Serving, cx: &Context<'_>) -> Result<()> {
        if uptime() < serving.next_flush
            && !self.is_wanted(None)
            && self.kept.lock().state.in_flight.is_none()
        {
            return Ok(());
        }
        serving.gathered = None;
        cx.host.with_newest_snapshot(&mut |snapshot| {
            let mut kept = self.kept.lock();
            kept.refuse_when_closed()?;
            if kept.state.tip().is_some() {
                // The compactor has just put the totals into the backlog.
                return Ok(());
            }
            let base = snapshot.map_or(Base::After(ChainPoint::START), Base::Snapshot);
            let in_flight = kept.state.in_flight;
            let bounds = match in_flight {
                Some(end) => Bounds::exactly(end.number),
                None => Bounds::cut(cx.host.durable()),
            };
            let (content, to) =
                cx.disk.content_of(&kept.state, base, bounds, &mut |_| cx.go_on())?;
            if let Some(end) = in_flight {
                self.require(cx.disk, end, to)?;
            }
            self.put_in_flight(&mut kept, serving, content, to, cx)
        })
    }

    fn is_wanted(&self, confirmed: Option<ChainPoint>) -> bool {
        // Acquire: pairs with the Release in `want`.
        self.wanted.load(Ordering::Acquire) > confirmed.map_or(0, |point| point.number.0)
    }

    /// The batch at the end in flight is the one that was sent.
    fn require(&self, disk: &Disk, sent: ChainPoint, found: ChainPoint) -> Result<()> {
        if sent == found {
            return Ok(());
        }
        let reason = format!(
            "the sink {:?} was sent batch {} (check {:08x}), and here is batch {} (check {:08x})",
            self.name, sent.number, sent.check, found.number, found.check
        );
        Err(Error::damaged(disk.storage.path(&file_name(&self.name)), 0, reason))
    }

    /// The file that holds the first of what comes next.
    fn next_file(&self, state: &SinkState, disk: &Disk) -> PathBuf {
        let from = state.confirmed.map_or(BatchNumber::ZERO, |point| point.number);
        match state.backlog.first() {
            Some(&part) => disk.storage.path(&backlog_name(&self.name, part)),
            None => disk.files.path_of_next(from),
        }
    }

    fn put_in_flight(
        &self,
        kept: &mut Kept,
        serving: &mut Serving,
        content: Content,
        to: ChainPoint,
        cx: &Context<'_>,
    ) -> Result<()> {
        let mut rows = Rows::new(cx.host, self.next_file(&kept.state, cx.disk));
        let mut pace = |_| cx.go_on();
        let (made, events) =
            (rows.make(content.sums, &mut pace)?, rows.events(content.events, &mut pace)?);
        if kept.state.in_flight != Some(to) {
            let state = SinkState { in_flight: Some(to), ..kept.state.clone() };
            kept.refuse_when_closed()?;
            state.save(&cx.disk.storage, cx.disk.engine)?;
            kept.state = state;
            kept.is_dirty = false;
        }
        let from = kept.state.confirmed.map(position);
        let batch = UsageBatch::new(cx.disk.engine, from, position(to), made, events);
        serving.prepared = Some(batch);
        self.progress.lock().look(&kept.state);
        Ok(())
    }

    fn confirm(&self, end: ChainPoint, cx: &Context<'_>) -> Result<()> {
        self.confirm_locked(&mut self.kept.lock(), end, cx)
    }

    fn confirm_locked(&self, kept: &mut Kept, end: ChainPoint, cx: &Context<'_>) -> Result<()> {
        kept.refuse_when_closed()?;
        let dropped = kept.state.confirm(end);
        kept.is_dirty = true;
        let bytes = |range: &DeltaRange| kept.part_bytes.remove(&range.to.number);
        let bytes: u64 = dropped.iter().filter_map(bytes).sum();
        {
            let mut progress = self.progress.lock();
            progress.look(&kept.state);
            progress.backlog_bytes -= bytes;
        }
        if !dropped.is_empty() {
            // The file must not name parts that are gone.
            self.save(kept, cx.disk)?;
            self.remove_parts(kept, &dropped, cx.disk)?;
        }
        Ok(())
    }

    /// Removes parts that the state names no more.
    fn remove_parts(&self, kept: &mut Kept, parts: &[DeltaRange], disk: &Disk) -> Result<()> {
        let mut remove = parts.iter().map(|&range| disk.remove_backlog(&self.name, range));
        let removed = remove.try_for_each(|removed| removed);
        kept.has_unlisted |= removed.is_err();
        removed
    }

    fn save(&self, kept: &mut Kept, disk: &Disk) -> Result<()> {
        kept.refuse_when_closed()?;
        kept.is_dirty = true;
        let saved = kept.state.save(&disk.storage, disk.engine);
        kept.has_unlisted |= saved.is_err();
        saved?;
        kept.is_dirty = false;
        // Not before: the file must not name parts that are gone.
        if kept.has_unlisted {
            let state = std::slice::from_ref(&kept.state);
            disk.remove_unlisted(state, |sink| sink == kept.state.name)?;
            kept.has_unlisted = false;
        }
        Ok(())
    }

    /// Notes how long the backlog is.
    pub(super) fn measure(&self, disk: &Disk) {
        self.measure_locked(&mut self.kept.lock(), disk);
    }

    /// Opens only those parts that are new: there may be many.
    fn measure_locked(&self, kept: &mut Kept, disk: &Disk) {
        let before = std::mem::take(&mut kept.part_bytes);
        let bytes = |&range: &DeltaRange| {
            let end = range.to.number;
            let read = || Some(disk.open_backlog(&self.name, range).ok()?.bytes());
            Some((end, before.get(&end).copied().or_else(read)?))
        };
        kept.part_bytes = kept.state.backlog.iter().filter_map(bytes).collect();
        self.progress.lock().backlog_bytes = kept.part_bytes.values().sum();
    }

    /// Drops the sink, unless somebody is in it: a worker that is lets go of it afterwards. What
    /// it holds, a connection or a directory of its own, is then free for the next open, however
    /// long handles keep this engine in memory.
    pub(super) fn let_go(&self) {
        let dropped = self.serving.as_ref().and_then(|serving| serving.try_lock()?.take());
        if catch_unwind(AssertUnwindSafe(|| drop(dropped))).is_err() {
            tracing::warn!(sink = self.name, "the sink panicked when it was dropped");
        }
    }

    /// Writes what is known, for the last time.
    pub(super) fn close(&self, disk: &Disk) -> Result<()> {
        let mut kept = self.kept.lock();
        let saved =
            if kept.is_dirty && !kept.is_closed { self.save(&mut kept, disk) } else { Ok(()) };
        if !std::mem::replace(&mut kept.is_closed, true) {
            kept.state.drop_room(&disk.storage);
        }
        saved
    }

    pub(super) fn status(&self, durable: BatchNumber, now: Duration) -> SinkStatus {
        self.progress.lock().status(&self.name, self.is_attached(), durable, now)
    }

    /// Calls the sink, and notes since when.
    fn call<R>(
        &self,
        work: impl FnOnce() -> std::result::Result<R, SinkError>,
    ) -> std::result::Result<R, Failure> {
        self.progress.lock().called();
        let result = call(work);
        self.progress.lock().returned();
        result
    }
}

impl Kept {
    fn refuse_when_closed(&self) -> Result<()> {
        if self.is_closed { Err(Error::Closed) } else { Ok(()) }
    }
}
