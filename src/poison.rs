//! The latch that the first failure of the engine closes.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use crate::error::{Error, Result};

/// Set once, by the first failure after which nothing can be promised any more: a sync that failed
/// for good (of the directory: any), a log that does not verify, a file of the journal that was
/// taken away, a flusher that panicked.
#[derive(Debug, Default)]
pub(crate) struct Poison {
    is_set: AtomicBool,
    is_said: AtomicBool,
    reason: Mutex<Option<String>>,
}

impl Poison {
    /// [`latch`](Self::latch)es the reason, and logs it.
    pub(crate) fn set(&self, reason: impl Into<String>) {
        self.latch(reason);
        self.say();
    }

    /// Latches the reason, unless there is one already. Logs nothing: the caller may hold locks
    /// that whoever gets what is logged wants, when it calls the engine.
    pub(crate) fn latch(&self, reason: impl Into<String>) {
        let mut latched = self.reason.lock();
        if latched.is_none() {
            *latched = Some(reason.into());
            // Release: pairs with the Acquire in `check`; the reason is there.
            self.is_set.store(true, Ordering::Release);
        }
    }

    /// Logs the reason, once there is one, and only once.
    pub(crate) fn say(&self) {
        // Acquire: pairs with the Release in `latch`. Relaxed: the first to come says it.
        if self.is_set.load(Ordering::Acquire) && !self.is_said.swap(true, Ordering::Relaxed) {
            let reason = self.reason().unwrap_or_default();
            tracing::error!(reason, "durability is lost; the data directory must be reopened");
        }
    }

    /// An error once the latch is closed. Whoever takes a lock of the flushers checks again under
    /// it.
    pub(crate) fn check(&self) -> Result<()> {
        // Acquire: pairs with the Release in `latch`.
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
            self.poison.latch(self.reason);
        }
    }
}
