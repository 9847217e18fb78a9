//! A counter that threads sleep on until it moves.
//!
//! On Linux it is a futex: all who sleep are woken by one system call, and whoever wakes goes on
//! without a lock. Elsewhere, and in models, it is a lock and a condition variable.

use std::time::Duration;

use crate::sync::{AtomicU32, Ordering};

/// Moved by whoever has news, and waited on by whoever wants it.
#[derive(Debug, Default)]
pub(crate) struct Futex {
    moves: AtomicU32,
    sleepers: Sleepers,
}

/// How often the counter had moved when somebody looked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seen(u32);

impl Futex {
    /// To be called before looking for what the news are about.
    pub(crate) fn look(&self) -> Seen {
        // Acquire: pairs with the Release in `advance`; what the news are about is seen after it.
        Seen(self.moves.load(Ordering::Acquire))
    }

    /// Sleeps until the counter has moved since that look, or somebody is woken without a move, or
    /// for so long. May return early.
    pub(crate) fn sleep(&self, seen: Seen, at_most: Duration) {
        self.sleepers.sleep(&self.moves, seen.0, at_most);
    }

    /// There are news: whoever looked before does not fall asleep any more. Wakes nobody.
    pub(crate) fn advance(&self) {
        // Release: pairs with the Acquire in `look`.
        self.moves.fetch_add(1, Ordering::Release);
    }

    /// Wakes so many of those who sleep, or all. How many they were.
    pub(crate) fn wake(&self, at_most: u32) -> usize {
        self.sleepers.wake(&self.moves, at_most)
    }
}

#[cfg(not(all(target_os = "linux", not(loom), not(miri))))]
use portable::Sleepers;
#[cfg(all(target_os = "linux", not(loom), not(miri)))]
use system::Sleepers;

#[cfg(all(target_os = "linux", not(loom), not(miri)))]
mod system {
    use std::sync::atomic::AtomicU32;
    use std::time::Duration;

    use rustix::thread::futex::{Flags, Timespec, wait, wake};

    /// The kernel knows them.
    #[derive(Debug, Default)]
    pub(super) struct Sleepers;

    impl Sleepers {
        pub(super) fn sleep(&self, word: &AtomicU32, seen: u32, at_most: Duration) {
            let timeout = Timespec::try_from(at_most).ok();
            // An error says that the word has moved, that the time is over, or that a signal came:
            // the caller looks again in any case.
            let _ = wait(word, Flags::PRIVATE, seen, timeout.as_ref());
        }

        pub(super) fn wake(&self, word: &AtomicU32, at_most: u32) -> usize {
            // The kernel reads it as a signed number.
            wake(word, Flags::PRIVATE, at_most.min(i32::MAX.unsigned_abs())).unwrap_or(0)
        }
    }
}

#[cfg(not(all(target_os = "linux", not(loom), not(miri))))]
mod portable {
    use std::time::Duration;

    use crate::sync::{AtomicU32, Condvar, Mutex, Ordering};

    #[derive(Debug, Default)]
    pub(super) struct Sleepers {
        counts: Mutex<Counts>,
        woken: Condvar,
    }

    #[derive(Debug, Default)]
    struct Counts {
        asleep: usize,
        /// Of these, those who are to wake and have not noticed.
        called: usize,
    }

    impl Sleepers {
        pub(super) fn sleep(&self, word: &AtomicU32, seen: u32, at_most: Duration) {
            let mut counts = self.counts.lock();
            // Acquire: pairs with the Release in `advance`. A waker that moves the word after this
            // gets the lock only once this thread sleeps.
            if word.load(Ordering::Acquire) != seen {
                return;
            }
            counts.asleep += 1;
            self.woken.wait_for(&mut counts, at_most);
            counts.asleep -= 1;
            // It was called, or it is awake in place of one who was.
            counts.called = counts.called.saturating_sub(1);
        }

        pub(super) fn wake(&self, _: &AtomicU32, at_most: u32) -> usize {
            let mut counts = self.counts.lock();
            let at_most = usize::try_from(at_most).unwrap_or(usize::MAX);
            let woken = counts.asleep.saturating_sub(counts.called).min(at_most);
            counts.called += woken;
            drop(counts);
            (0..woken).for_each(|_| self.woken.notify_one());
            woken
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const NEVER: Duration = Duration::from_secs(1 << 20);

    #[test]
    fn who_looked_before_a_move_does_not_fall_asleep() {
        let futex = Futex::default();
        let seen = futex.look();
        futex.advance();
        futex.sleep(seen, NEVER);
        assert_eq!(futex.wake(u32::MAX), 0);
    }

    #[test]
    fn a_sleep_ends_when_its_time_is_over() {
        let futex = Futex::default();
        futex.sleep(futex.look(), Duration::from_millis(1));
        assert_eq!(futex.wake(1), 0, "nobody sleeps");
    }

    #[test]
    fn as_many_wake_as_are_called() {
        let futex = Futex::default();
        let seen = futex.look();
        std::thread::scope(|scope| {
            let sleepers: Vec<_> =
                (0..5).map(|_| scope.spawn(|| futex.sleep(seen, NEVER))).collect();
            let wake = |count: usize, at_most| {
                let mut woken = 0;
                // They may be on their way to sleep.
                while woken < count {
                    woken += futex.wake(at_most);
                    std::thread::yield_now();
                }
                woken
            };
            assert_eq!(wake(2, 1), 2);
            while sleepers.iter().filter(|sleeper| sleeper.is_finished()).count() < 2 {
                std::thread::yield_now();
            }
            assert_eq!(wake(3, u32::MAX), 3);
        });
    }
}
