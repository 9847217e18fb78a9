//! A handle to one counter.

use std::fmt;
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::sync::Arc;

use crate::admission::shared::{Kept, SharedCell};
use crate::engine::{Bound, Counted, Engine, Owner};
use crate::error::Result;
use crate::model::{Decision, QuotaId, Usage};
use crate::prefetch;

/// One user's counter of one quota: checks, consumes, refunds, sets limits and reads usage without
/// the look-up.
///
/// Store it with what it belongs to (a session, a connection, a tenant): an operation then costs
/// less than one by key. Looking the handle up in a large collection on each request costs
/// another cache miss, and is often no faster than going by key.
///
/// Cheap to clone, `Send` and `Sync`. It keeps the engine open, and the counter in memory.
///
/// # Examples
///
/// ```
/// use tollgate::{Config, Quota, Tollgate};
///
/// # let dir = tempfile::tempdir()?;
/// let gate = Tollgate::open(dir.path(), Config::default())?;
/// let tokens = gate.define(Quota::new("tokens", 100))?;
/// let counter = gate.counter(7, tokens)?;
///
/// assert!(counter.try_consume(60)?.is_allowed());
/// assert!(!counter.try_consume(60)?.is_allowed());
/// assert_eq!(gate.usage(7, tokens)?.used, 60);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
// Never across two cache lines, wherever it lies in an array, and as many to a line as possible:
// programs have many of them.
#[derive(Clone)]
#[repr(align(16))]
pub struct Counter {
    kept: Kept<Bound>,
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<Counter>() == 16);

impl Counter {
    pub(crate) fn new(owner: &Arc<Owner>, user: u64, quota: QuotaId) -> Result<Self> {
        let bound = owner.bind(quota)?;
        Kept::new(bound, |bound| bound.share(user)).map(|kept| Self { kept })
    }

    #[inline(always)]
    fn cell(&self) -> &SharedCell {
        self.kept.cell()
    }

    #[inline(always)]
    fn engine(&self) -> &Engine {
        &self.kept.owner().engine
    }

    /// For an operation that will change it.
    #[inline(always)]
    fn counted_to_change(&self) -> Counted<'_> {
        // For writing at once: another core may have changed it last, and would otherwise be asked
        // twice.
        prefetch::for_write(self.cell());
        self.counted()
    }

    #[inline(always)]
    fn counted(&self) -> Counted<'_> {
        let cell = self.cell();
        Counted { user: cell.user(), quota: &self.kept.owner().quota, cell: Some(cell) }
    }

    /// The user whose counter it is.
    #[must_use]
    pub fn user(&self) -> u64 {
        self.cell().user()
    }

    /// The quota that it counts.
    #[must_use]
    pub fn quota(&self) -> QuotaId {
        self.kept.owner().quota.definition().id
    }

    /// See [`Tollgate::check`](crate::Tollgate::check).
    ///
    /// # Errors
    ///
    /// The same.
    #[inline]
    pub fn check(&self, amount: u64) -> Result<Decision> {
        self.engine().check(&self.counted(), amount)
    }

    /// See [`Tollgate::try_consume`](crate::Tollgate::try_consume).
    ///
    /// # Errors
    ///
    /// The same.
    #[inline]
    pub fn try_consume(&self, amount: u64) -> Result<Decision> {
        self.engine().try_consume(&self.counted_to_change(), amount, false)
    }

    /// See [`Tollgate::try_consume_sync`](crate::Tollgate::try_consume_sync).
    ///
    /// # Errors
    ///
    /// The same.
    pub fn try_consume_sync(&self, amount: u64) -> Result<Decision> {
        self.engine().try_consume(&self.counted(), amount, true)
    }

    /// See [`Tollgate::consume`](crate::Tollgate::consume).
    ///
    /// # Errors
    ///
    /// The same.
    #[inline]
    pub fn consume(&self, amount: u64) -> Result<Usage> {
        self.engine().consume(&self.counted_to_change(), amount, false)
    }

    /// See [`Tollgate::consume_sync`](crate::Tollgate::consume_sync).
    ///
    /// # Errors
    ///
    /// The same.
    pub fn consume_sync(&self, amount: u64) -> Result<Usage> {
        self.engine().consume(&self.counted(), amount, true)
    }

    /// See [`Tollgate::refund`](crate::Tollgate::refund).
    ///
    /// # Errors
    ///
    /// The same.
    pub fn refund(&self, amount: u64) -> Result<u64> {
        self.engine().refund(&self.counted(), amount)
    }

    /// See [`Tollgate::set_limit`](crate::Tollgate::set_limit).
    ///
    /// # Errors
    ///
    /// The same.
    pub fn set_limit(&self, limit: u64) -> Result<()> {
        self.engine().set_limit(&self.counted(), Some(limit))
    }

    /// See [`Tollgate::clear_limit`](crate::Tollgate::clear_limit).
    ///
    /// # Errors
    ///
    /// The same.
    pub fn clear_limit(&self) -> Result<()> {
        self.engine().set_limit(&self.counted(), None)
    }

    /// See [`Tollgate::own_limit`](crate::Tollgate::own_limit).
    #[must_use]
    pub fn own_limit(&self) -> Option<u64> {
        self.engine().own_limit(&self.counted())
    }

    /// See [`Tollgate::usage`](crate::Tollgate::usage).
    #[must_use]
    pub fn usage(&self) -> Usage {
        self.engine().usage(&self.counted())
    }
}

// As `Tollgate`.
impl UnwindSafe for Counter {}
impl RefUnwindSafe for Counter {}

impl fmt::Debug for Counter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Counter")
            .field("user", &self.user())
            .field("quota", &self.quota())
            .field("state", &self.cell().live().cell.load())
            .finish_non_exhaustive()
    }
}
