//! The flusher threads: named, watched, joined on close.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, bounded};

use crate::clock::uptime;
use crate::error::{Error, Result};
use crate::poison::Poison;

/// A thread's life sign and the way to wake it.
#[derive(Debug)]
pub(crate) struct Pulse {
    name: &'static str,
    /// Milliseconds of uptime at the last sign of life.
    beat_ms: AtomicU64,
    /// How long a healthy thread may be silent; `None` for work whose length depends on the disk.
    silence_max: Option<Duration>,
    kick: Sender<()>,
    kicked: Receiver<()>,
    stop: Arc<AtomicBool>,
}

impl Pulse {
    pub(crate) fn new(
        name: &'static str,
        silence_max: Option<Duration>,
        stop: &Arc<AtomicBool>,
    ) -> Arc<Self> {
        let (kick, kicked) = bounded(1);
        let pulse = Self {
            name,
            beat_ms: AtomicU64::new(0),
            silence_max,
            kick,
            kicked,
            stop: Arc::clone(stop),
        };
        pulse.beat();
        Arc::new(pulse)
    }

    /// Gives a sign of life.
    pub(crate) fn beat(&self) {
        let now = u64::try_from(uptime().as_millis()).unwrap_or(u64::MAX);
        // Relaxed: a time, nothing depends on it.
        self.beat_ms.store(now, Ordering::Relaxed);
    }

    /// Wakes the thread if it sleeps; otherwise its next sleep ends at once.
    pub(crate) fn kick(&self) {
        // A full channel means that a kick is on its way already.
        let _ = self.kick.try_send(());
    }

    /// Sleeps, at most `duration`. Whether to go on: false once the engine closes.
    pub(crate) fn sleep(&self, duration: Duration) -> bool {
        self.beat();
        if !self.is_stopping() && !duration.is_zero() {
            let _ = self.kicked.recv_timeout(duration);
        }
        self.beat();
        !self.is_stopping()
    }

    /// [`sleep`](Self::sleep) for work in pieces: an error once the engine closes.
    pub(crate) fn pause(&self, duration: Duration) -> Result<()> {
        if self.sleep(duration) { Ok(()) } else { Err(Error::Closed) }
    }

    pub(crate) fn is_stopping(&self) -> bool {
        // Acquire: pairs with the Release in `Flushers::stop`.
        self.stop.load(Ordering::Acquire)
    }

    /// How long the thread has been silent beyond what is normal for it.
    pub(crate) fn stalled_for(&self) -> Option<(&'static str, Duration)> {
        let beat = Duration::from_millis(self.beat_ms.load(Ordering::Relaxed));
        let silent = uptime().saturating_sub(beat);
        self.silence_max.filter(|&max| silent > max).map(|_| (self.name, silent))
    }
}

/// The running threads.
#[derive(Debug)]
pub(crate) struct Flushers {
    stop: Arc<AtomicBool>,
    threads: Vec<(Arc<Pulse>, JoinHandle<()>)>,
}

impl Flushers {
    pub(crate) fn new(stop: Arc<AtomicBool>) -> Self {
        Self { stop, threads: Vec::new() }
    }

    /// Starts a thread. A panic in `work` is caught, and poisons the engine.
    pub(crate) fn spawn(
        &mut self,
        pulse: &Arc<Pulse>,
        poison: &Arc<Poison>,
        work: impl FnOnce(&Pulse) + Send + 'static,
    ) -> Result<()> {
        self.spawn_named(pulse.name.to_owned(), pulse, poison, work)
    }

    /// [`spawn`](Self::spawn) with a name of the thread's own, for one of several that do the same.
    pub(crate) fn spawn_named(
        &mut self,
        name: String,
        pulse: &Arc<Pulse>,
        poison: &Arc<Poison>,
        work: impl FnOnce(&Pulse) + Send + 'static,
    ) -> Result<()> {
        let thread_name = name.clone();
        let (thread_pulse, poison) = (Arc::clone(pulse), Arc::clone(poison));
        let body = move || {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| work(&thread_pulse))) {
                let what = panic
                    .downcast_ref::<&str>()
                    .map(ToString::to_string)
                    .or_else(|| panic.downcast_ref::<String>().cloned())
                    .unwrap_or_default();
                poison.set(format!("the thread {name} panicked: {what}"));
            }
        };
        let thread = std::thread::Builder::new()
            .name(thread_name.clone())
            .spawn(body)
            .map_err(|error| Error::io("start the thread", thread_name, error))?;
        self.threads.push((Arc::clone(pulse), thread));
        Ok(())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.threads.is_empty()
    }

    /// Stops the threads, and waits for them until `deadline`. Those that are not done then are
    /// left to themselves: what they hold is theirs.
    pub(crate) fn stop_until(&mut self, deadline: Duration) {
        // Release: pairs with the Acquire in `is_stopping`.
        self.stop.store(true, Ordering::Release);
        self.threads.iter().for_each(|(pulse, _)| pulse.kick());
        while self.threads.iter().any(|(_, thread)| !thread.is_finished()) && uptime() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.threads.retain(|(_, thread)| thread.is_finished());
        self.stop();
    }

    /// Stops all threads and waits for them. A thread that drops the engine's last reference does
    /// not wait for itself.
    pub(crate) fn stop(&mut self) {
        // Release: pairs with the Acquire in `is_stopping`.
        self.stop.store(true, Ordering::Release);
        for (pulse, thread) in self.threads.drain(..) {
            pulse.kick();
            if thread.thread().id() != std::thread::current().id() {
                // A panic was caught inside and is in the poison.
                let _ = thread.join();
            }
        }
    }
}
