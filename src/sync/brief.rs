//! A lock for what mostly takes less than a microsecond.
//!
//! Letting go of one whose waiters sleep takes a locked instruction, to find out whether there are
//! any, and a locked instruction waits until all that was stored before it has left the processor.
//! This lock is let go of by a plain store. Who finds it taken looks again and again, and naps for
//! a moment when that takes long: nobody has to be woken.
#![allow(unsafe_code, reason = "the lock's protocol is unsafe to implement")]

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::lock_api::{self, GuardSend, RawMutex};

use crate::sync::Patience;

/// Held briefly, but where what it guards grows, or its holder meets somebody in the middle of a
/// change, or has no processor. It waits for no disk and for nobody who may want this lock.
pub(crate) type BriefLock<T> = lock_api::Mutex<RawBriefLock, T>;
pub(crate) type BriefGuard<'a, T> = lock_api::MutexGuard<'a, RawBriefLock, T>;

/// The lock itself. Not modelled by loom, which would try each look anew.
#[derive(Debug)]
pub(crate) struct RawBriefLock {
    is_taken: AtomicBool,
}

impl RawBriefLock {
    #[cold]
    fn wait(&self) {
        let mut patience = Patience::default();
        while !self.try_lock() {
            // Looking leaves the line with whoever has the lock, as trying would not.
            // Relaxed: a guess.
            while self.is_taken.load(Ordering::Relaxed) {
                patience.wait();
            }
        }
    }
}

// SAFETY: one thread at a time has it: `lock` and `try_lock` return, or are true, only when they
// have changed the mark from free to taken, and who has it alone makes it free again.
unsafe impl RawMutex for RawBriefLock {
    const INIT: Self = Self { is_taken: AtomicBool::new(false) };

    type GuardMarker = GuardSend;

    #[inline(always)]
    fn lock(&self) {
        if !self.try_lock() {
            self.wait();
        }
    }

    #[inline(always)]
    fn try_lock(&self) -> bool {
        // Acquire: pairs with the Release in `unlock`.
        self.is_taken.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    #[inline(always)]
    unsafe fn unlock(&self) {
        // Release: pairs with the Acquire in `try_lock`.
        self.is_taken.store(false, Ordering::Release);
    }

    fn is_locked(&self) -> bool {
        // Relaxed: over by the time the caller knows.
        self.is_taken.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    #[test]
    fn one_thread_at_a_time_has_it_and_sees_what_the_others_did() {
        const EACH: u64 = 200_000;
        // Two words that differ only while somebody has the lock.
        let lock = BriefLock::new([0_u64; 2]);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for round in 0..EACH {
                        let mut words = lock.lock();
                        assert_eq!(words[0], words[1]);
                        words[0] += 1;
                        if round % 1000 == 0 {
                            // So that others find it taken, also on one processor.
                            std::thread::yield_now();
                        }
                        words[1] += 1;
                    }
                });
            }
        });
        assert_eq!(lock.into_inner(), [3 * EACH; 2]);
    }

    /// Its holder may be without a processor for long.
    #[test]
    fn a_lock_that_is_held_for_long_is_waited_for() {
        let lock = BriefLock::new(0);
        std::thread::scope(|scope| {
            let mut held = lock.lock();
            let other = scope.spawn(|| *lock.lock());
            assert!(lock.is_locked() && lock.try_lock().is_none());
            std::thread::sleep(std::time::Duration::from_millis(20));
            *held = 7;
            drop(held);
            assert_eq!(other.join().expect("it got the lock"), 7);
        });
        assert!(!lock.is_locked());
    }
}
