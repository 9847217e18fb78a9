//! The flusher threads: named, watched, joined on close.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::clock::uptime;
use crate::error::{Error, Result};
use crate::poison::{Poison, said_by};

/// A thread's life sign and the way to wake it.
#[derive(Debug)]
pub(crate) struct Pulse {
    name: &'static str,
    /// Milliseconds of uptime at the last sign of life; while the thread sleeps, at which it wakes.
    beat_ms: AtomicU64,
    /// How long a healthy thread may be silent, beyond the sleep that it has announced.
    silence_max: Duration,
    /// Whether its next sleep ends at once. A lock and a condition, and no channel: a channel spins
    /// and yields before it sleeps, which for a thread that wakes a thousand times a second takes
    /// much of a processor from the callers.
    is_kicked: Mutex<bool>,
    kick: Condvar,
    stop: Arc<AtomicBool>,
}

impl Pulse {
    pub(crate) fn new(
        name: &'static str,
        silence_max: Duration,
        stop: &Arc<AtomicBool>,
    ) -> Arc<Self> {
        let pulse = Self {
            name,
            beat_ms: AtomicU64::new(0),
            silence_max,
            is_kicked: Mutex::new(false),
            kick: Condvar::new(),
            stop: Arc::clone(stop),
        };
        pulse.beat();
        Arc::new(pulse)
    }

    /// Gives a sign of life.
    pub(crate) fn beat(&self) {
        self.beat_after(Duration::ZERO);
    }

    fn beat_after(&self, sleep: Duration) {
        let then = uptime().saturating_add(sleep);
        let then = u64::try_from(then.as_millis()).unwrap_or(u64::MAX);
        // Relaxed: a time, nothing depends on it.
        self.beat_ms.store(then, Ordering::Relaxed);
    }

    /// Wakes the thread if it sleeps; otherwise its next sleep ends at once.
    pub(crate) fn kick(&self) {
        *self.is_kicked.lock() = true;
        self.kick.notify_one();
    }

    /// Sleeps, at most `duration`. Whether to go on: false once the engine closes.
    pub(crate) fn sleep(&self, duration: Duration) -> bool {
        self.beat_after(duration);
        if !self.is_stopping() && !duration.is_zero() {
            let mut is_kicked = self.is_kicked.lock();
            if !*is_kicked {
                self.kick.wait_for(&mut is_kicked, duration);
            }
            *is_kicked = false;
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
        (silent > self.silence_max).then_some((self.name, silent))
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
                let what = said_by(&*panic);
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

    /// Forgets the threads, in a process that was forked and does not have them: neither waiting
    /// for a thread nor detaching it is defined there.
    pub(crate) fn disown(&mut self) {
        self.threads.drain(..).for_each(std::mem::forget);
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

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    const SILENCE_MAX: Duration = Duration::from_millis(20);

    /// A long interval is no stall: the drainer, when idle, sleeps up to eight times the
    /// configured second.
    #[test]
    fn a_thread_that_sleeps_as_announced_does_not_stall() {
        let pulse = Pulse::new("sleeper", SILENCE_MAX, &Arc::default());
        std::thread::scope(|scope| {
            scope.spawn(|| pulse.sleep(Duration::from_secs(600)));
            let began = uptime();
            while uptime() < began + 10 * SILENCE_MAX {
                std::thread::sleep(SILENCE_MAX / 4);
            }
            let stalled = pulse.stalled_for();
            pulse.kick();
            assert_eq!(stalled, None);
        });
    }

    #[test]
    fn a_kick_before_a_sleep_ends_it() {
        const LONG: Duration = Duration::from_secs(60);
        let stop = Arc::<AtomicBool>::default();
        let pulse = Pulse::new("sleeper", SILENCE_MAX, &stop);
        let began = uptime();
        pulse.kick();
        assert!(pulse.sleep(LONG), "to go on with");
        stop.store(true, Ordering::Release);
        assert!(!pulse.sleep(LONG), "at the end");
        assert!(uptime() < began + LONG, "it did not sleep");
    }

    #[test]
    fn a_thread_that_works_for_too_long_stalls_until_it_goes_on() {
        let pulse = Pulse::new("worker", SILENCE_MAX, &Arc::default());
        pulse.sleep(Duration::ZERO);
        let began = uptime();
        while uptime() <= began + 2 * SILENCE_MAX {
            std::thread::sleep(SILENCE_MAX / 4);
        }
        let (name, silent) = pulse.stalled_for().unwrap();
        assert_eq!(name, "worker");
        assert!(silent > SILENCE_MAX, "{silent:?}");
        pulse.beat();
        assert_eq!(pulse.stalled_for(), None);
    }
}
