//! Limits of single users.

#[cfg(doc)]
use crate::error::Error;
use crate::error::Result;
use crate::gate::Tollgate;
use crate::model::QuotaId;

/// Limits of single users, instead of the quota's.
impl Tollgate {
    /// Gives a user a limit of their own, from 0 (nothing is admitted) to
    /// [`AMOUNT_MAX`](crate::AMOUNT_MAX). Durable when it returns. A concurrent operation may still
    /// use the previous limit.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownQuota`]; [`Error::InvalidLimit`]; [`Error::TooMany`] beyond about 4 billion
    /// counters with a handle or a limit of their own; [`Error::Closed`]. When the disk fails:
    /// [`Error::DurabilityLost`] if the limit is as before, [`Error::OutcomeUnknown`] if it is
    /// changed but may not be after a restart.
    pub fn set_limit(&self, user: u64, quota: QuotaId, limit: u64) -> Result<()> {
        let engine = &self.owner.engine;
        engine.set_limit(&engine.counted(user, quota)?, Some(limit))
    }

    /// Removes a user's own limit: the quota's default applies again. Durable when it returns.
    ///
    /// # Errors
    ///
    /// As [`set_limit`](Self::set_limit).
    pub fn clear_limit(&self, user: u64, quota: QuotaId) -> Result<()> {
        let engine = &self.owner.engine;
        engine.set_limit(&engine.counted(user, quota)?, None)
    }

    /// The limit of the user's own; `None` where the quota's default applies.
    /// [`usage`](Self::usage) says which limit applies.
    ///
    /// ```
    /// use tollgate::{Config, Quota, Tollgate};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// let gate = Tollgate::open(dir.path(), Config::default())?;
    /// let requests = gate.define(Quota::new("requests", 1_000))?;
    /// gate.set_limit(42, requests, 5_000)?;
    /// assert_eq!(gate.own_limit(42, requests)?, Some(5_000));
    /// assert_eq!(gate.own_limit(43, requests)?, None);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::UnknownQuota`].
    pub fn own_limit(&self, user: u64, quota: QuotaId) -> Result<Option<u64>> {
        let engine = &self.owner.engine;
        Ok(engine.own_limit(&engine.counted(user, quota)?))
    }
}
