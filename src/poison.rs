//! The latch that the first failure of the engine closes.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use crate::error::{Error, Result};

/// Set once, by the first failure after which nothing can be promised any more: a sync that failed
/// for good, a log that does not verify, a flusher that panicked.
#[derive(Debug, Default)]
pub(crate) struct Poison {
    is_set: AtomicBool,
    reason: Mutex<Option<String>>,
}

impl Poison {
    /// Latches the reason, unless there is one already.
    pub(crate) fn set(&self, reason: impl Into<String>) {
        let mut latched = self.reason.lock();
        if latched.is_none() {
            let reason = reason.into();
            tracing::error!(reason, "durability is lost; the data directory must be reopened");
            *latched = Some(reason);
            // Release: pairs with the Acquire in `check`; the reason is there.
            self.is_set.store(true, Ordering::Release);
        }
    }

    /// An error once the latch is closed. Whoever takes a lock of the flushers checks again under
    /// it.
    pub(crate) fn check(&self) -> Result<()> {
        // Acquire: pairs with the Release in `set`.
        if self.is_set.load(Ordering::Acquire) {
            return Err(Error::DurabilityLost { reason: self.reason().unwrap_or_default() });
        }
        Ok(())
    }

    /// Closes the latch when a panic begins while the guard lives. One that was under way before,
    /// of a thread that does something else while it unwinds, is none of the engine's.
    pub(crate) fn on_panic(&self, reason: &'static str) -> OnPanic<'_> {
        OnPanic { poison: self, reason, was_panicking: std::thread::panicking() }
    }

    pub(crate) fn reason(&self) -> Option<String> {
        self.reason.lock().clone()
    }
}

/// See [`Poison::on_panic`].
#[derive(Debug)]
pub(crate) struct OnPanic<'a> {
    poison: &'a Poison,
    reason: &'static str,
    was_panicking: bool,
}

impl Drop for OnPanic<'_> {
    fn drop(&mut self) {
        if !self.was_panicking && std::thread::panicking() {
            self.poison.set(self.reason);
        }
    }
}
