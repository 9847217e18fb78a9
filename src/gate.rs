//! The front of the crate: [`Tollgate`].

use std::fmt;
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::builder::Builder;
use crate::config::Config;
use crate::counter::Counter;
use crate::delivery::SinkStatus;
use crate::engine::{Keepers, Owner};
#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
use crate::health::Health;
use crate::model::{Consume, Decision, Decisions, EngineId, Quota, QuotaId, Usage, UsageEvent};
use crate::recovery::RecoveryReport;
use crate::stats::Stats;

/// Counts and caps usage in memory, and loses nothing in a crash.
///
/// Cloning is cheap and shares the engine. Dropping the last clone (and the last [`Counter`] and
/// [`Reservation`](crate::Reservation)) closes it: everything is synced and the flusher threads
/// end. [`close`](Self::close) does the same, and reports errors.
///
/// # Durability
///
/// What an operation has acknowledged survives the death of the process at any instant. What a
/// `_sync` operation or [`sync`](Self::sync) has acknowledged also survives loss of power;
/// operations without a `_sync` form are made durable by a [`sync`](Self::sync) after them.
///
/// Everything acknowledged before the start of the last completed sync survives loss of power; a
/// sync starts every [`Config::sync_interval`], so a power cut loses at most that plus one sync's
/// duration. Operations admitted under
/// [`AdmitUnlogged`](crate::Backpressure::AdmitUnlogged) survive nothing, not even a clean close.
///
/// # Threads
///
/// All operations can be called from any number of threads. These wait for the disk: the `_sync`
/// operations, `define`, `define_if_absent`, `set_limit`, `clear_limit`, `sync`, `snapshot`,
/// `deliver`, `close`, and dropping the last handle; with [`Config::durable_consumes`] also every
/// operation that counts, refunds, reserves, settles or extends, and dropping a
/// [`Reservation`](crate::Reservation). The others wait for room while the log is full, for
/// [`Config::backpressure_deadline`] at most (1 second by default: set it lower where they run on
/// an async runtime). See [`Backpressure`](crate::Backpressure). No deadline bounds one more wait:
/// a store to a page of the log that was never written, or that the kernel has just written back,
/// may wait in the kernel while the disk does not respond or the file system is frozen
/// (`docs/durability.md`).
///
/// # Processes
///
/// Fork first, then open. A forked child must not use an engine that its parent opened: the rings
/// are not mapped in the child, so such a call crashes it. In the child, operations that wait for
/// the disk return [`Error::Closed`], and [`close`](Self::close), dropping the last handle and
/// dropping a [`Reservation`](crate::Reservation) do nothing. The directory stays the parent's. If
/// the parent is killed, the directory stays locked until the child exits or executes another
/// program.
///
/// # Examples
///
/// ```
/// use tollgate::{Config, Quota, Tollgate, Window};
///
/// # let dir = tempfile::tempdir()?;
/// # let dir = dir.path();
/// let gate = Tollgate::open(dir, Config::default())?;
/// let requests = gate.define(Quota::new("requests", 2).window(Window::Day))?;
///
/// assert!(gate.try_consume(7, requests, 1)?.is_allowed());
/// assert!(gate.try_consume(7, requests, 1)?.is_allowed());
/// let denied = gate.try_consume(7, requests, 1)?;
/// assert!(!denied.is_allowed());
/// assert!(denied.retry_after().is_some());
///
/// gate.close()?;
/// let gate = Tollgate::open(dir, Config::default())?;
/// assert_eq!(gate.usage(7, requests)?.used, 2);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Tollgate {
    pub(crate) owner: Arc<Owner>,
    /// For reservations.
    pub(crate) keepers: Keepers,
}

impl Tollgate {
    pub(crate) fn of(owner: Owner) -> Self {
        let owner = Arc::new(owner);
        Self { keepers: Keepers::new(&owner), owner }
    }

    /// Opens a data directory: creates it, or locks and recovers it.
    ///
    /// What recovery found is in [`recovery_report`](Self::recovery_report). Where the directory
    /// must be there already, use [`Builder::create_if_missing`].
    ///
    /// # Errors
    ///
    /// [`Error::InvalidConfig`] for a value out of range, [`Error::Locked`] when another process
    /// (or another `Tollgate` in this one) has the directory open,
    /// [`Error::UnsupportedFileSystem`] on a network file system, [`Error::Damaged`] when files
    /// hold what no crash can leave behind (nothing is changed then), [`Error::UnsupportedVersion`]
    /// for another version of the format, [`Error::UnsupportedProcessor`], and [`Error::Io`] for
    /// whatever the operating system refuses.
    pub fn open(dir: impl AsRef<Path>, config: Config) -> Result<Self> {
        Self::builder(dir).config(config).open()
    }

    /// Opens a data directory with sinks attached, which receive what is counted, each change
    /// exactly once; or one that must already exist, or that another process is about to close:
    /// see [`Builder`].
    ///
    /// ```
    /// use tollgate::sink::MemoryStore;
    /// use tollgate::{Quota, Tollgate};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let dir = dir.path();
    /// let store = MemoryStore::new(); // stands for a database
    /// let gate = Tollgate::builder(dir).sink("billing", store.sink()).open()?;
    /// let tokens = gate.define(Quota::new("tokens", 1_000))?;
    /// gate.consume(42, tokens, 5)?;
    /// gate.close()?; // delivers what it can
    /// assert_eq!(store.used(42, "tokens", None), 5);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn builder(dir: impl AsRef<Path>) -> Builder {
        Builder::new(dir.as_ref())
    }

    /// [`open`](Self::open) on any storage.
    #[cfg(feature = "fuzzing")]
    pub(crate) fn open_on(
        storage: &Arc<dyn crate::storage::Storage>,
        config: Config,
    ) -> Result<Self> {
        Ok(Self::of(Owner::open_on(storage, config)?))
    }

    /// Defines a quota and returns its id, which stays the same across restarts. Durable when it
    /// returns.
    ///
    /// Idempotent by name: a quota that is already defined gets the new default limit and overrun
    /// policy, if they differ. Users with a limit of their own keep it. A quota can't be removed.
    /// A program that defines its quotas at each start thereby undoes what was changed meanwhile:
    /// use [`define_if_absent`](Self::define_if_absent) if it should not.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidQuota`] when the definition is invalid, or when the name is already defined
    /// with another window, offset or decimals, which what was counted so far depends on.
    /// [`Error::TooMany`] quotas, [`Error::Closed`]. When the disk fails: [`Error::Io`] or
    /// [`Error::DurabilityLost`] if nothing was changed, [`Error::OutcomeUnknown`] otherwise.
    pub fn define(&self, quota: Quota) -> Result<QuotaId> {
        self.owner.engine.define(&quota)
    }

    /// The id of the quota with this name, which stays as it is, whatever its limit, window or
    /// decimals: [`quota`](Self::quota) says. Where there is none it is defined as
    /// [`define`](Self::define) does. Durable when it returns; of several calls at once one
    /// defines.
    ///
    /// ```
    /// use tollgate::{Config, Quota, Tollgate};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let dir = dir.path();
    /// let gate = Tollgate::open(dir, Config::default())?;
    /// let requests = gate.define_if_absent(Quota::new("requests", 1_000))?;
    /// gate.define(Quota::new("requests", 5_000))?; // by an operator, at run time
    /// gate.close()?;
    ///
    /// let gate = Tollgate::open(dir, Config::default())?;
    /// assert_eq!(gate.define_if_absent(Quota::new("requests", 1_000))?, requests);
    /// assert_eq!(gate.quota(requests)?.limit(), 5_000);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`define`](Self::define), but a definition that differs from that of the name is none.
    pub fn define_if_absent(&self, quota: Quota) -> Result<QuotaId> {
        self.owner.engine.define_if_absent(&quota)
    }

    /// Whether `user` may use `amount` more. Counts nothing; the answer holds for this instant
    /// only.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownQuota`]; [`Error::InvalidAmount`] for 0 or more than `AMOUNT_MAX`.
    // Always: as `try_consume`.
    #[inline(always)]
    pub fn check(&self, user: u64, quota: QuotaId, amount: u64) -> Result<Decision> {
        let engine = &self.owner.engine;
        engine.check(&engine.counted(user, quota)?, amount)
    }

    /// Counts `amount` if it fits within the limit, in one atomic step. However many threads race,
    /// the amounts admitted in one window never exceed the limit, and an amount that fits is never
    /// refused.
    ///
    /// # Errors
    ///
    /// As [`check`](Self::check). [`Error::Backpressure`] when the log has no room within the
    /// deadline, and [`Error::Closed`]; nothing was counted then. With
    /// [`Config::durable_consumes`], also the errors of
    /// [`try_consume_sync`](Self::try_consume_sync).
    // Always: what it answers then need not go through memory, where it would be waited for.
    #[inline(always)]
    pub fn try_consume(&self, user: u64, quota: QuotaId, amount: u64) -> Result<Decision> {
        let engine = &self.owner.engine;
        engine.try_consume(&engine.counted(user, quota)?, amount, false)
    }

    /// [`try_consume`](Self::try_consume), durable before it returns: what was admitted survives
    /// loss of power. Callers that wait at the same time share one sync.
    ///
    /// # Errors
    ///
    /// As [`try_consume`](Self::try_consume). [`Error::DurabilityLost`], [`Error::Damaged`] and
    /// [`Error::Io`] mean that the disk failed after the amount was counted; it survives the death
    /// of the process. [`Error::NotLogged`] can occur where
    /// [`AdmitUnlogged`](crate::Backpressure::AdmitUnlogged) is configured.
    pub fn try_consume_sync(&self, user: u64, quota: QuotaId, amount: u64) -> Result<Decision> {
        let engine = &self.owner.engine;
        engine.try_consume(&engine.counted(user, quota)?, amount, true)
    }

    /// Counts usage that has already happened, past the limit if need be.
    ///
    /// # Errors
    ///
    /// As [`try_consume`](Self::try_consume); [`Error::Overflow`] when the usage would pass
    /// [`AMOUNT_MAX`](crate::AMOUNT_MAX).
    #[inline]
    pub fn consume(&self, user: u64, quota: QuotaId, amount: u64) -> Result<Usage> {
        let engine = &self.owner.engine;
        engine.consume(&engine.counted(user, quota)?, amount, false)
    }

    /// [`consume`](Self::consume), durable before it returns.
    ///
    /// # Errors
    ///
    /// As [`consume`](Self::consume) and [`try_consume_sync`](Self::try_consume_sync).
    pub fn consume_sync(&self, user: u64, quota: QuotaId, amount: u64) -> Result<Usage> {
        let engine = &self.owner.engine;
        engine.consume(&engine.counted(user, quota)?, amount, true)
    }

    /// Counts many items, each as [`consume`](Self::consume) does; the batch is not one atomic
    /// step. All items are validated before the first is counted. With [`Config::durable_consumes`]
    /// it waits for the disk once, after all are counted.
    ///
    /// # Errors
    ///
    /// Those of [`consume`](Self::consume) when nothing was counted. [`Error::BatchCutShort`] says
    /// how many items were counted when a later one could not be, or when those that were counted
    /// (perhaps all) could not be made durable as [`Config::durable_consumes`] demands.
    pub fn consume_batch(&self, items: &[Consume]) -> Result<Vec<Usage>> {
        self.owner.engine.consume_batch(items)
    }

    /// Takes up to `amount` off the usage of the current window, excluding what open reservations
    /// hold, and returns how much it took off.
    ///
    /// After a loss of power, usage may be too low by refunds that survived while what they
    /// refunded did not, or exceed a limit by refunds that no sync had covered; it is never below
    /// zero.
    ///
    /// # Errors
    ///
    /// As [`try_consume`](Self::try_consume). Without room in the log it is an error whatever
    /// [`Config::backpressure`] says.
    pub fn refund(&self, user: u64, quota: QuotaId, amount: u64) -> Result<u64> {
        let engine = &self.owner.engine;
        engine.refund(&engine.counted(user, quota)?, amount)
    }

    /// Counts all of these items, or none: either every one is admitted, or the answer names the
    /// first that does not fit. Exact however many threads race, even when they name the same
    /// counters in another order; logged whole or not at all. A typical call counts for a user,
    /// their organisation and the whole service.
    ///
    /// 1 to 16 items. Items of the same counter are added up; more than
    /// [`AMOUNT_MAX`](crate::AMOUNT_MAX) together is denied, whatever the limit.
    ///
    /// ```
    /// use tollgate::{Config, Consume, Quota, Tollgate};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// let gate = Tollgate::open(dir.path(), Config::default())?;
    /// let by_user = gate.define(Quota::new("by-user", 10))?;
    /// let by_organisation = gate.define(Quota::new("by-organisation", 5))?;
    ///
    /// let call =
    ///     |amount| [Consume::new(7, by_user, amount), Consume::new(1, by_organisation, amount)];
    /// assert!(gate.try_consume_all(&call(3))?.is_allowed());
    /// let denied = gate.try_consume_all(&call(3))?;
    /// assert_eq!(denied.refused(), Some(1));
    /// assert_eq!(gate.usage(7, by_user)?.used, 3);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`try_consume`](Self::try_consume), with nothing counted; [`Error::InvalidGroup`] for no
    /// items, or more than 16. Without room in the log it is an error whatever
    /// [`Config::backpressure`] says.
    pub fn try_consume_all(&self, items: &[Consume]) -> Result<Decisions> {
        self.owner.engine.try_consume_all(items)
    }

    /// [`try_consume`](Self::try_consume), once: of all calls with one `request` id only the first
    /// counts, and all get its answer, even when they are concurrent or come after a crash.
    ///
    /// An id is remembered for [`Config::dedup_window`], unless there are more than
    /// [`Config::dedup_max`] in that time: then the oldest are forgotten first, and
    /// [`Stats::answers_forgotten_early`](crate::Stats) says so. A denial is remembered too, like
    /// any answer: to ask again when there is room, use another id.
    ///
    /// ```
    /// use tollgate::{Config, Error, Quota, Tollgate};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// let gate = Tollgate::open(dir.path(), Config::default())?;
    /// let requests = gate.define(Quota::new("requests", 10))?;
    ///
    /// let first = gate.try_consume_once(0xfeed, 7, requests, 1)?;
    /// let again = gate.try_consume_once(0xfeed, 7, requests, 1)?;
    /// assert_eq!(again, first);
    /// assert_eq!(gate.usage(7, requests)?.used, 1);
    ///
    /// let other = gate.try_consume_once(0xfeed, 7, requests, 2);
    /// assert!(matches!(other, Err(Error::RequestMismatch { .. })));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`try_consume`](Self::try_consume); the id is not remembered then, and the call can be
    /// repeated. But if the disk failed under [`Config::durable_consumes`] ([`Error::Io`],
    /// [`Error::DurabilityLost`]), the request was counted and its id is remembered: it does not
    /// count again under the same id. [`Error::RequestMismatch`] when this id was used for a
    /// different request. Without room in the log it is an error whatever [`Config::backpressure`]
    /// says.
    pub fn try_consume_once(
        &self,
        request: u128,
        user: u64,
        quota: QuotaId,
        amount: u64,
    ) -> Result<Decision> {
        let engine = &self.owner.engine;
        engine.try_consume_once(request, engine.counted(user, quota)?, amount)
    }

    /// [`consume`](Self::consume), once: see [`try_consume_once`](Self::try_consume_once).
    ///
    /// # Errors
    ///
    /// Those of [`try_consume_once`](Self::try_consume_once) and of [`consume`](Self::consume).
    pub fn consume_once(
        &self,
        request: u128,
        user: u64,
        quota: QuotaId,
        amount: u64,
    ) -> Result<Usage> {
        let engine = &self.owner.engine;
        engine.consume_once(request, engine.counted(user, quota)?, amount, &[])
    }

    /// Counts an event as [`consume`](Self::consume) does, and keeps it whole for the sinks that
    /// [want events](crate::sink::UsageSink::wants_events): each of them gets it exactly once, in
    /// the same transaction as the total that it is part of. While no sink of the data directory
    /// wants events, it costs and stores no more than `consume` does.
    ///
    /// The value is converted as [`Quota::units`] does. With a
    /// [`request_id`](UsageEvent::request_id) the event counts, and is delivered, once: see
    /// [`try_consume_once`](Self::try_consume_once). It counts in the window in which it is
    /// recorded, whatever its timestamp says.
    ///
    /// ```
    /// use tollgate::sink::MemoryStore;
    /// use tollgate::{Quota, Timestamp, Tollgate, UsageEvent};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// let store = MemoryStore::new(); // stands for a database
    /// let gate = Tollgate::builder(dir.path()).sink("billing", store.sink()).open()?;
    /// let credits = gate.define(Quota::new("credits", 100_000).decimals(2))?;
    ///
    /// let event = UsageEvent::new(42, credits, 0.25, Timestamp::now())
    ///     .request_id(0xfeed)
    ///     .metadata("model", "large");
    /// assert_eq!(gate.record(&event)?.used, 25);
    /// assert_eq!(gate.record(&event)?.used, 25); // the same request
    ///
    /// gate.close()?; // delivers what it can
    /// assert_eq!(store.used(42, "credits", None), 25);
    /// let [row] = &store.events()[..] else { panic!("one event") };
    /// assert_eq!((&*row.name, &row.event), ("credits", &event));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`consume`](Self::consume) and, with a `request_id`, as
    /// [`consume_once`](Self::consume_once); [`Error::InvalidFloat`] for a value that can't be
    /// counted; [`Error::EventTooLarge`], also while no sink wants events. Where one does, a lack
    /// of room in the log is an error whatever [`Config::backpressure`] says.
    pub fn record(&self, event: &UsageEvent) -> Result<Usage> {
        self.owner.engine.record(event)
    }

    /// What `user` has used in the current window.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownQuota`].
    pub fn usage(&self, user: u64, quota: QuotaId) -> Result<Usage> {
        let engine = &self.owner.engine;
        Ok(engine.usage(&engine.counted(user, quota)?))
    }

    /// A handle to one counter, for callers that use it often: it saves the look-up.
    ///
    /// Store it with what it belongs to (a session, a connection, a tenant): an operation then
    /// costs less than one by key. Looking the handle up in a large collection on each request
    /// costs another cache miss, and is often no faster than going by key.
    ///
    /// The counter stays in memory as long as a handle to it does.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownQuota`]; [`Error::TooMany`] beyond about 4 billion counters with a handle or
    /// a limit of their own; [`Error::Closed`].
    pub fn counter(&self, user: u64, quota: QuotaId) -> Result<Counter> {
        Counter::new(&self.owner, user, quota)
    }

    /// Makes everything durable that was acknowledged before the call.
    ///
    /// # Errors
    ///
    /// [`Error::DurabilityLost`] once a sync has failed for good, [`Error::Io`] when the journal
    /// can't be written for now, [`Error::Closed`].
    pub fn sync(&self) -> Result<()> {
        self.owner.engine.sync()
    }

    /// Writes a snapshot of everything acknowledged before the call, which bounds the work of the
    /// next recovery. The engine does this by itself as the journal grows.
    ///
    /// # Errors
    ///
    /// As [`sync`](Self::sync); [`Error::Damaged`] when a file can't be read back;
    /// [`Error::NotDelivered`] when a sink lags so far behind that no more files may be kept for
    /// it.
    pub fn snapshot(&self) -> Result<()> {
        self.owner.engine.snapshot()
    }

    /// Makes everything acknowledged before the call durable, then delivers it to all attached
    /// sinks without waiting for the [`flush_interval`](crate::DeliveryConfig::flush_interval). The
    /// engine delivers by itself; this call is for those who need to know that it has, before a
    /// report or in a test. Each sink is asked where it is, even if it has confirmed everything, so
    /// that one which was emptied meanwhile gets all totals anew.
    ///
    /// # Errors
    ///
    /// As [`sync`](Self::sync). [`Error::NotDelivered`] when a sink has not answered and confirmed
    /// everything within the `timeout`, or refuses it for a reason that does not pass by itself;
    /// delivery goes on all the same. [`Error::Closed`], also when the engine is closed during the
    /// call, before every sink has everything.
    pub fn deliver(&self, timeout: Duration) -> Result<()> {
        self.owner.engine.deliver(timeout)
    }

    /// The state of delivery for each attached sink, in the order in which they were attached, and
    /// then for those that were attached before but are not now.
    #[must_use]
    pub fn sinks(&self) -> Vec<SinkStatus> {
        self.owner.engine.sinks()
    }

    /// What the engine has done since it was opened. For deliveries see [`sinks`](Self::sinks).
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.owner.engine.stats()
    }

    /// How the engine is doing.
    #[must_use]
    pub fn health(&self) -> Health {
        self.owner.engine.health()
    }

    /// What was found when the directory was opened.
    #[must_use]
    pub fn recovery_report(&self) -> &RecoveryReport {
        self.owner.engine.report()
    }

    /// The identity of the data directory.
    #[must_use]
    pub fn engine_id(&self) -> EngineId {
        self.owner.engine.id()
    }

    /// The quota as it is defined now.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownQuota`].
    pub fn quota(&self, quota: QuotaId) -> Result<Quota> {
        self.owner.engine.describe(quota)
    }

    /// The id of the quota with this name. To define it where there is none, see
    /// [`define_if_absent`](Self::define_if_absent).
    #[must_use]
    pub fn quota_by_name(&self, name: &str) -> Option<QuotaId> {
        self.owner.engine.quota_by_name(name)
    }

    /// All defined quotas, in the order of their definition.
    #[must_use]
    pub fn quotas(&self) -> Vec<QuotaId> {
        self.owner.engine.quota_ids()
    }

    /// Closes the engine for all clones and handles: later operations get [`Error::Closed`],
    /// everything acknowledged is made durable except what was [admitted
    /// unlogged](crate::Backpressure::AdmitUnlogged), the threads end, and the directory can be
    /// opened again. What is in memory can still be read, for example by [`check`](Self::check). A
    /// second call waits for the first, does nothing itself, and returns the same result.
    ///
    /// Attached sinks are given what they lack: `close` waits for each until it has everything or
    /// its next attempt fails, but for 5 seconds at most. What a sink still lacks then is delivered
    /// after the next open, and is not an error here. Then the sinks are dropped, on the engine's
    /// threads: their connections are closed, and a directory of JSON lines can be opened again. A
    /// sink that hangs is dropped once its call has returned.
    ///
    /// # Errors
    ///
    /// As [`sync`](Self::sync). What could not be made durable is recovered at the next open,
    /// unless power is lost before.
    pub fn close(&self) -> Result<()> {
        self.owner.close()
    }
}

// A caller's panic finds no operation half done. The caller's code that operations run
// (`Config::clock` before a denial, and where something may be forgotten; `tracing` subscribers
// where something fails) never runs between a counter's change and its record, nor while a shard of
// the map is swept. A panic in a flusher or a commit, of such code or the
// engine's own, poisons the engine, and later calls say so; one of a sink is caught.
impl UnwindSafe for Tollgate {}
impl RefUnwindSafe for Tollgate {}

impl fmt::Debug for Tollgate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tollgate").field("engine_id", &self.engine_id()).finish_non_exhaustive()
    }
}
