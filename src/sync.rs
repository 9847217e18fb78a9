//! The atomics and locks that order what threads do to each other, so that loom sees them.
//!
//! With `--cfg loom` they are loom's, and the `loom_tests` modules run the same code through all
//! its interleavings. What orders nothing (statistics, the clock's word) stays with `std`.

mod brief;
pub(crate) mod futex;
mod patience;

pub(crate) use brief::{BriefGuard, BriefLock};
pub(crate) use patience::Patience;

#[cfg(not(loom))]
pub(crate) use std::{
    hint::spin_loop,
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence},
    thread::yield_now,
    thread_local,
};

#[cfg(all(not(loom), any(miri, not(target_os = "linux"))))]
pub(crate) use parking_lot::Condvar;
#[cfg(not(loom))]
pub(crate) use parking_lot::{Mutex, MutexGuard};
#[cfg(all(not(loom), any(miri, not(target_arch = "x86_64"))))]
pub(crate) use portable_atomic::AtomicU128;

#[cfg(loom)]
pub(crate) use loom::{
    hint::spin_loop,
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence},
    thread::yield_now,
};

#[cfg(loom)]
pub(crate) use model::{AtomicU128, Condvar, Mutex, MutexGuard};

/// loom's macro does not know `const` initial values.
#[cfg(loom)]
macro_rules! local {
    ($(#[$attribute:meta])* static $name:ident: $type:ty = const { $value:expr };) => {
        loom::thread_local! {
            $(#[$attribute])*
            static $name: $type = $value;
        }
    };
}
#[cfg(loom)]
pub(crate) use local as thread_local;

/// What loom lacks, made of what it has.
#[cfg(loom)]
mod model {
    use std::ops::{Deref, DerefMut};
    use std::sync::PoisonError;
    use std::time::Duration;

    use loom::sync::atomic::{AtomicUsize, Ordering};

    /// loom has no 128-bit atomic. This one keeps the number of a value in a loom atomic and the
    /// values in a list, where a value has one number for good: the same accesses, with the same
    /// orderings, on a smaller word.
    #[derive(Debug)]
    pub(crate) struct AtomicU128 {
        number: AtomicUsize,
        /// Not modelled: no access of the model happens under its lock.
        values: std::sync::Mutex<Vec<u128>>,
    }

    impl AtomicU128 {
        pub(crate) fn new(value: u128) -> Self {
            Self { number: AtomicUsize::new(0), values: std::sync::Mutex::new(vec![value]) }
        }

        fn number_of(&self, value: u128) -> usize {
            let mut values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
            values.iter().position(|&known| known == value).unwrap_or_else(|| {
                values.push(value);
                values.len() - 1
            })
        }

        fn value(&self, number: usize) -> u128 {
            self.values.lock().unwrap_or_else(PoisonError::into_inner)[number]
        }

        pub(crate) fn load(&self, order: Ordering) -> u128 {
            self.value(self.number.load(order))
        }

        pub(crate) fn store(&self, value: u128, order: Ordering) {
            self.number.store(self.number_of(value), order);
        }

        pub(crate) fn compare_exchange(
            &self,
            current: u128,
            new: u128,
            success: Ordering,
            failure: Ordering,
        ) -> Result<u128, u128> {
            let (current, new) = (self.number_of(current), self.number_of(new));
            self.number
                .compare_exchange(current, new, success, failure)
                .map(|number| self.value(number))
                .map_err(|number| self.value(number))
        }
    }

    /// loom's mutex with the face of `parking_lot`'s.
    #[derive(Debug, Default)]
    pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

    /// `None` only while its condition variable waits.
    #[derive(Debug)]
    pub(crate) struct MutexGuard<'a, T>(Option<loom::sync::MutexGuard<'a, T>>);

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(loom::sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
            MutexGuard(Some(self.0.lock().unwrap_or_else(PoisonError::into_inner)))
        }
    }

    impl<T> Deref for MutexGuard<'_, T> {
        type Target = T;

        fn deref(&self) -> &T {
            self.0.as_ref().expect("not waiting")
        }
    }

    impl<T> DerefMut for MutexGuard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            self.0.as_mut().expect("not waiting")
        }
    }

    /// loom's condition variable with the face of `parking_lot`'s. It never times out, so that a
    /// wake-up that gets lost is a deadlock, which loom reports.
    #[derive(Debug, Default)]
    pub(crate) struct Condvar(loom::sync::Condvar);

    impl Condvar {
        pub(crate) fn wait_for<T>(&self, guard: &mut MutexGuard<'_, T>, _timeout: Duration) {
            if let Some(inner) = guard.0.take() {
                guard.0 = Some(self.0.wait(inner).unwrap_or_else(PoisonError::into_inner));
            }
        }

        pub(crate) fn notify_one(&self) {
            self.0.notify_one();
        }
    }
}

/// Runs a model through its interleavings. Panics when there is only one: such a model shows
/// nothing.
///
/// Of several reads before a change loom knows the last one only. So a thread that reads must be
/// the one that is spawned, and the one that changes what it reads must go on where it was: the
/// first run is then the one in which the reads come last, and loom finds what they depend on.
#[cfg(all(test, loom))]
pub(crate) fn explore(model: impl Fn() + Sync + Send + 'static) {
    explore_by(&loom::model::Builder::new(), model);
}

/// [`explore`] with one preemption at most, for models that take too long with more.
#[cfg(all(test, loom))]
pub(crate) fn explore_briefly(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(1);
    explore_by(&builder, model);
}

#[cfg(all(test, loom))]
fn explore_by(builder: &loom::model::Builder, model: impl Fn() + Sync + Send + 'static) {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    let runs = Arc::new(AtomicUsize::new(0));
    builder.check({
        let runs = Arc::clone(&runs);
        move || {
            // Relaxed: a count, of one thread.
            runs.fetch_add(1, Ordering::Relaxed);
            model();
        }
    });
    assert!(runs.load(Ordering::Relaxed) > 1, "there is only one interleaving");
}
