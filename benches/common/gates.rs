//! Engines to measure, each in a directory of its own on the file system of the build.

use tempfile::TempDir;
use tollgate::{AMOUNT_MAX, Config, Quota, QuotaId, Tollgate, Window};

use super::AnyError;

/// An open engine and its directory.
pub(crate) struct Gate {
    // Before the directory: the engine closes before its files go.
    pub(crate) gate: Tollgate,
    pub(crate) quota: QuotaId,
    pub(crate) dir: TempDir,
}

impl Gate {
    /// Opens an engine with a quota that is never reached.
    pub(crate) fn open(config: Config) -> Result<Self, AnyError> {
        let dir = fresh_dir()?;
        let gate = Tollgate::open(dir.path(), config)?;
        let quota = gate.define(unlimited())?;
        Ok(Self { gate, quota, dir })
    }

    /// Counts one unit for each of the first `users`.
    pub(crate) fn populate(&self, users: u32) -> Result<(), AnyError> {
        for user in 0..users {
            self.gate.consume(user.into(), self.quota, 1)?;
        }
        self.gate.sync()?;
        Ok(())
    }

    /// What all the first `users` have used.
    pub(crate) fn used(&self, users: u32) -> u64 {
        used(&self.gate, self.quota, users)
    }
}

/// What all the first `users` have used of a quota.
pub(crate) fn used(gate: &Tollgate, quota: QuotaId, users: u32) -> u64 {
    let usage = |user: u32| gate.usage(user.into(), quota).expect("the quota is defined");
    (0..users).map(|user| usage(user).used).sum()
}

/// The quota that is never reached, with a window, as quotas have.
pub(crate) fn unlimited() -> Quota {
    Quota::new("requests", AMOUNT_MAX).window(Window::Month)
}

/// An empty directory on a real file system.
pub(crate) fn fresh_dir() -> Result<TempDir, AnyError> {
    Ok(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?)
}
