//! The latch that the first failure of the engine closes.

use std::any::Any;
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
    first: Mutex<Option<Failure>>,
}

/// What closed the latch.
#[derive(Debug)]
struct Failure {
    reason: String,
    source: Option<Error>,
}

impl Poison {
    /// [`latch`](Self::latch)es the reason, and logs it.
    pub(crate) fn set(&self, reason: impl Into<String>) {
        self.latch(reason);
        self.say();
    }

    /// [`set`](Self::set), by an error.
    pub(crate) fn set_by(&self, error: &Error) {
        self.latch_by(error.to_string(), Some(error.again()));
        self.say();
    }

    /// Latches the reason, unless there is one already. Logs nothing: the caller may hold locks
    /// that whoever gets what is logged wants, when it calls the engine.
    pub(crate) fn latch(&self, reason: impl Into<String>) {
        self.latch_by(reason.into(), None);
    }

    /// [`latch`](Self::latch), by an error.
    pub(crate) fn latch_by(&self, reason: String, source: Option<Error>) {
        let mut latched = self.first.lock();
        if latched.is_none() {
            *latched = Some(Failure { reason, source });
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
            let first = self.first.lock();
            let source = first.as_ref().and_then(|first| first.source.as_ref());
            return Err(Error::DurabilityLost {
                reason: first.as_ref().map(|first| first.reason.clone()).unwrap_or_default(),
                source: source.map(|source| Box::new(source.again())),
            });
        }
        Ok(())
    }

    /// Closes the latch when a panic begins while the guard lives. One that was under way before,
    /// of a thread that does something else while it unwinds, is none of the engine's.
    pub(crate) fn on_panic(&self, reason: &'static str) -> OnPanic<'_> {
        OnPanic { poison: self, reason, was_panicking: std::thread::panicking() }
    }

    pub(crate) fn reason(&self) -> Option<String> {
        self.first.lock().as_ref().map(|failure| failure.reason.clone())
    }
}

/// What a panic said, by its payload.
pub(crate) fn said_by(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
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
