//! Reservations: making them, the handle to an open one, and operations by id.

use std::fmt;
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::time::Duration;

use crate::engine::{Charge, Keeper, Keepers, ReservedOnce};
use crate::error::Result;
use crate::gate::Tollgate;
use crate::model::{Consume, Decisions, OpenReservation, QuotaId, ReservationId};

/// The answer to a reservation request.
#[derive(Debug)]
#[must_use = "a reservation that nobody keeps is cancelled at once"]
pub enum Reserved {
    /// Admitted, and counted until it is settled or expires.
    Open(Reservation),
    /// Does not fit; nothing was counted.
    Denied(Decisions),
}

impl Reserved {
    /// Whether it was admitted.
    #[must_use]
    pub fn is_open(&self) -> bool {
        matches!(self, Self::Open(_))
    }

    /// The reservation, or why there is none, for `?` and `match`.
    ///
    /// # Errors
    ///
    /// The denial.
    pub fn into_result(self) -> Result<Reservation, Decisions> {
        match self {
            Self::Open(reservation) => Ok(reservation),
            Self::Denied(decisions) => Err(decisions),
        }
    }
}

/// Reservations.
impl Tollgate {
    /// Holds `amount`, an estimate, against the limit for work whose cost is known only afterwards:
    /// see [`Reservation`]. It is counted at once, in one atomic step, so that what is reserved and
    /// what is used together never exceed the limit.
    ///
    /// It lasts at most `ttl` (1 millisecond to 7 days) by the wall clock: what is not settled by
    /// then is released. If the clock is set back meanwhile, it lasts longer by as much.
    ///
    /// # Errors
    ///
    /// As [`try_consume`](Self::try_consume); [`Error::InvalidTtl`](crate::Error::InvalidTtl);
    /// [`Error::TooMany`](crate::Error::TooMany) when
    /// [`Config::reservations_max`](crate::Config::reservations_max) are open. Without room in the
    /// log it is an error whatever [`Config::backpressure`](crate::Config::backpressure) says.
    pub fn reserve(
        &self,
        user: u64,
        quota: QuotaId,
        amount: u64,
        ttl: Duration,
    ) -> Result<Reserved> {
        let (engine, item) = (&self.owner.engine, Consume { user, quota, amount });
        // At once: what it says then does not go through memory on its way.
        match engine.reserve_fast(&item, ttl) {
            Some(id) => Ok(Reserved::Open(Reservation::new(&self.keepers, id, false))),
            None => Ok(self.reserved(engine.reserve_slow(&[item], ttl)?)),
        }
    }

    fn reserved(&self, reserved: Result<ReservationId, Decisions>) -> Reserved {
        match reserved {
            Ok(id) => Reserved::Open(Reservation::new(&self.keepers, id, false)),
            Err(decisions) => Reserved::Denied(decisions),
        }
    }

    /// Reserves from several counters, all or nothing, as
    /// [`try_consume_all`](Self::try_consume_all) does.
    ///
    /// # Errors
    ///
    /// As [`reserve`](Self::reserve) and [`try_consume_all`](Self::try_consume_all).
    pub fn reserve_all(&self, items: &[Consume], ttl: Duration) -> Result<Reserved> {
        Ok(self.reserved(self.owner.engine.reserve(items, ttl)?))
    }

    /// [`Reservation::commit`] by id, for a reservation that was [detached](Reservation::detach),
    /// even after a restart. Of several calls only one counts.
    ///
    /// # Errors
    ///
    /// The same.
    pub fn commit_reservation(&self, id: ReservationId, actual: u64) -> Result<Decisions> {
        self.owner.engine.commit(id, Charge::Same(actual))
    }

    /// [`Reservation::commit_items`] by id.
    ///
    /// # Errors
    ///
    /// The same.
    pub fn commit_reservation_items(
        &self,
        id: ReservationId,
        actual: &[Consume],
    ) -> Result<Decisions> {
        self.owner.engine.commit(id, Charge::Items(actual))
    }

    /// [`Reservation::cancel`] by id.
    ///
    /// # Errors
    ///
    /// The same.
    pub fn cancel_reservation(&self, id: ReservationId) -> Result<()> {
        self.owner.engine.cancel(id)
    }

    /// [`Reservation::extend`] by id.
    ///
    /// # Errors
    ///
    /// The same.
    pub fn extend_reservation(&self, id: ReservationId, ttl: Duration) -> Result<()> {
        self.owner.engine.extend(id, ttl)
    }

    /// An open reservation: when it expires, and what it holds. Changes nothing; the answer holds
    /// for this instant only.
    ///
    /// # Errors
    ///
    /// [`UnknownReservation`](crate::Error::UnknownReservation) and
    /// [`ReservationSettled`](crate::Error::ReservationSettled) where it is not open, as
    /// [`Reservation::commit`] says. One whose time is over is released first. Where it is not open
    /// this may wait, and fail, as a commit does.
    pub fn open_reservation(&self, id: ReservationId) -> Result<OpenReservation> {
        self.owner.engine.open_reservation(id)
    }

    /// All open reservations, those first that expire first: for a service that was restarted, and
    /// looks for the work that it had begun. It looks at each of them, while others go on; what is
    /// reserved, settled or extended meanwhile may be in the answer as it was before or after.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tollgate::{Config, Quota, Tollgate};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let dir = dir.path();
    /// let gate = Tollgate::open(dir, Config::default())?;
    /// let tokens = gate.define(Quota::new("tokens", 10_000))?;
    /// let reserved = gate.reserve(7, tokens, 4_000, Duration::from_secs(60))?;
    /// let id = reserved.into_result()?.detach(); // kept beside the work, which takes longer
    /// gate.close()?;
    ///
    /// let gate = Tollgate::open(dir, Config::default())?;
    /// let [open] = &gate.open_reservations()[..] else { panic!("there is one") };
    /// assert_eq!((open.id, open.items[0].amount), (id, 4_000));
    /// assert_eq!(&gate.open_reservation(id)?, open);
    /// assert!(gate.commit_reservation_items(id, &open.items)?.is_allowed()); // all of it was used
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn open_reservations(&self) -> Vec<OpenReservation> {
        self.owner.engine.open_reservations()
    }

    /// [`reserve`](Self::reserve), once: see [`try_consume_once`](Self::try_consume_once). Later
    /// calls get a handle to the first one's reservation, whether or not it is still open; dropping
    /// such a handle does not cancel it.
    ///
    /// # Errors
    ///
    /// Those of [`try_consume_once`](Self::try_consume_once) and of [`reserve`](Self::reserve).
    /// Where the disk failed under
    /// [`Config::durable_consumes`](crate::Config::durable_consumes), the units are reserved:
    /// another call with the same id gets the handle; without one, the units are released when the
    /// reservation expires.
    pub fn reserve_once(
        &self,
        request: u128,
        user: u64,
        quota: QuotaId,
        amount: u64,
        ttl: Duration,
    ) -> Result<Reserved> {
        let engine = &self.owner.engine;
        let counted = engine.counted(user, quota)?;
        Ok(match engine.reserve_once(request, counted, amount, ttl)? {
            ReservedOnce::Now(id) => Reserved::Open(Reservation::new(&self.keepers, id, false)),
            ReservedOnce::Before(id) => Reserved::Open(Reservation::new(&self.keepers, id, true)),
            ReservedOnce::Denied(decisions) => Reserved::Denied(decisions),
        })
    }
}

/// Units of one or several counters that are already counted, while the work they are for is still
/// going on.
///
/// It ends with the first of [`commit`](Self::commit), [`cancel`](Self::cancel), being dropped
/// (which cancels it, unless a commit was an error), and the end of its time to live, when it
/// expires and is released. A reservation that is [detached](Self::detach) lives on under its id.
/// After a crash it is open until it expires.
///
/// Whatever happens to it is charged to the window in which it was made.
///
/// It is `Send` and `Sync`, and keeps the engine open.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
/// use tollgate::{Config, Quota, Reserved, Tollgate};
///
/// # let dir = tempfile::tempdir()?;
/// let gate = Tollgate::open(dir.path(), Config::default())?;
/// let tokens = gate.define(Quota::new("tokens", 10_000))?;
///
/// let reserved = gate.reserve(7, tokens, 4_000, Duration::from_secs(60))?;
/// let Reserved::Open(mut reservation) = reserved else { panic!("there is room") };
/// assert_eq!(gate.usage(7, tokens)?.reserved, 4_000);
///
/// // ... the answer has ended, and took less.
/// assert!(reservation.commit(1_234)?.is_allowed());
/// let usage = gate.usage(7, tokens)?;
/// assert_eq!((usage.used, usage.reserved), (1_234, 0));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "a reservation that nobody keeps is cancelled at once"]
pub struct Reservation {
    keeper: Keeper,
    id: ReservationId,
    /// Dropping it does not cancel it.
    is_detached: bool,
}

impl Reservation {
    #[inline(always)]
    pub(crate) fn new(keepers: &Keepers, id: ReservationId, is_detached: bool) -> Self {
        Self { keeper: keepers.one(), id, is_detached }
    }

    /// Its id, by which it can be settled elsewhere, unless this handle cancels it first.
    #[must_use]
    pub fn id(&self) -> ReservationId {
        self.id
    }

    /// Charges `actual` units to each of its counters. What was reserved beyond that is released;
    /// what goes beyond the reservation is admitted or refused as the quota's
    /// [`Overrun`](crate::Overrun) says. 0 releases all of it.
    ///
    /// A denial leaves the reservation open, with nothing charged: commit less, or cancel it.
    ///
    /// The answer is about the window in which the reservation was made. If that window has ended,
    /// only the limit is known: `used` is 0, `remaining` is the whole limit, and `resets_at` is in
    /// the past.
    ///
    /// As durable as [`Tollgate::consume`](crate::Tollgate::consume).
    ///
    /// # Errors
    ///
    /// After any error the handle is [detached](Self::detach), so that a `?` after this call
    /// releases nothing that is in use: a reservation that is still open can be committed again,
    /// through the handle or by its [`id`](Self::id), until it expires.
    ///
    /// [`ReservationSettled`](crate::Error::ReservationSettled) and
    /// [`UnknownReservation`](crate::Error::UnknownReservation) when it is no longer open: it
    /// expired, or was settled by its id. Nothing is charged then.
    /// [`InvalidAmount`](crate::Error::InvalidAmount) above [`AMOUNT_MAX`](crate::AMOUNT_MAX),
    /// [`Overflow`](crate::Error::Overflow) when the usage would pass it,
    /// [`Backpressure`](crate::Error::Backpressure) when the log has no room within the deadline:
    /// it stays open. [`Closed`](crate::Error::Closed).
    pub fn commit(&mut self, actual: u64) -> Result<Decisions> {
        match self.keeper.engine.commit_fast(self.id, actual) {
            Some(decisions) => {
                self.is_detached = true;
                Ok(decisions)
            }
            None => self.settle(Charge::Same(actual)),
        }
    }

    /// [`commit`](Self::commit) with an amount for each counter, from 0 to
    /// [`AMOUNT_MAX`](crate::AMOUNT_MAX). The items name each counter of the reservation, and no
    /// other, in any order; 1 to 16 items. Amounts of the same counter are added up. The answers
    /// are in the order of the items.
    ///
    /// ```
    /// use std::time::Duration;
    /// use tollgate::{Config, Consume, Quota, Tollgate};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// let gate = Tollgate::open(dir.path(), Config::default())?;
    /// let input = gate.define(Quota::new("input", 1_000))?;
    /// let output = gate.define(Quota::new("output", 1_000))?;
    ///
    /// let items = [Consume::new(7, output, 500), Consume::new(7, input, 100)];
    /// let reserved = gate.reserve_all(&items, Duration::from_secs(60))?;
    /// let mut reservation = reserved.into_result()?;
    ///
    /// let actual = [Consume::new(7, input, 90), Consume::new(7, output, 320)];
    /// assert!(reservation.commit_items(&actual)?.is_allowed());
    /// assert_eq!((gate.usage(7, input)?.used, gate.usage(7, output)?.used), (90, 320));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`commit`](Self::commit), which detach it too;
    /// [`ReservationMismatch`](crate::Error::ReservationMismatch) where the items' counters are not
    /// exactly those of the reservation, [`InvalidGroup`](crate::Error::InvalidGroup) for no items,
    /// or more than 16: it stays open.
    pub fn commit_items(&mut self, actual: &[Consume]) -> Result<Decisions> {
        self.settle(Charge::Items(actual))
    }

    fn settle(&mut self, charge: Charge<'_>) -> Result<Decisions> {
        let decisions = self.keeper.engine.commit_slow(self.id, charge);
        // What could not be charged is in use all the same: the `?` that drops the handle must not
        // release it.
        self.is_detached |= !decisions.as_ref().is_ok_and(Decisions::is_denied);
        decisions
    }

    /// Releases all of it.
    ///
    /// # Errors
    ///
    /// As [`commit`](Self::commit). The handle is gone all the same: cancel the reservation again
    /// by its [`id`](Self::id), or let it expire.
    pub fn cancel(mut self) -> Result<()> {
        self.is_detached = true;
        self.keeper.engine.cancel(self.id)
    }

    /// Keeps it open for `ttl` from now, rounded down to whole milliseconds: 1 millisecond to 7
    /// days. It never shortens the reservation's life, and can't revive one that has expired.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidTtl`](crate::Error::InvalidTtl); otherwise as [`commit`](Self::commit).
    pub fn extend(&self, ttl: Duration) -> Result<()> {
        self.keeper.engine.extend(self.id, ttl)
    }

    /// Lets it live on without the handle, until it is settled by its id or expires.
    pub fn detach(mut self) -> ReservationId {
        self.is_detached = true;
        self.id
    }
}

impl Drop for Reservation {
    /// Cancels it. Where the log has no room within the deadline, or the engine is closed, it stays
    /// open until it expires. In a process that was forked from the one that opened the engine it
    /// is left to that one.
    fn drop(&mut self) {
        if self.is_detached || !self.keeper.is_of_this_process() {
            return;
        }
        if let Err(error) = self.keeper.engine.cancel(self.id) {
            tracing::debug!(%error, id = %self.id, "a dropped reservation was not cancelled");
        }
    }
}

// As `Tollgate`.
impl UnwindSafe for Reservation {}
impl RefUnwindSafe for Reservation {}

impl fmt::Debug for Reservation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reservation").field("id", &self.id).finish_non_exhaustive()
    }
}
