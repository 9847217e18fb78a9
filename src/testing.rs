//! What tests of several threads share.

use std::fs;
use std::sync::mpsc::{Receiver, channel};
use std::thread::{Scope, ScopedJoinHandle, sleep};
use std::time::Duration;

/// So often in a row a thread is to be found asleep: what it sleeps for a moment only is over then.
const LOOKS: u32 = 10;

/// A thread of which it can be told whether it waits for something.
#[derive(Debug)]
pub(crate) struct Watched<'scope, T> {
    thread: ScopedJoinHandle<'scope, T>,
    /// Its directory in `/proc`.
    place: Receiver<String>,
}

/// Starts a thread that is watched.
pub(crate) fn watched<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    act: impl FnOnce() -> T + Send + 'scope,
) -> Watched<'scope, T> {
    let (begun, place) = channel();
    let thread = scope.spawn(move || {
        let id = rustix::thread::gettid().as_raw_nonzero();
        let _ = begun.send(format!("/proc/self/task/{id}/stat"));
        act()
    });
    Watched { thread, place }
}

impl<T> Watched<'_, T> {
    /// Whether it comes to where it waits for somebody else. `false`: it has ended without that.
    /// Takes as long as it takes until one or the other is certain.
    pub(crate) fn waits(&self) -> bool {
        let place = self.place.recv().expect("the thread has begun");
        let mut asleep = 0;
        while asleep < LOOKS {
            if self.thread.is_finished() {
                return false;
            }
            // Behind the name, which is in parentheses, the state: S when it sleeps.
            let stat = fs::read_to_string(&place).unwrap_or_default();
            let is_asleep = stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" S"));
            asleep = if is_asleep { asleep + 1 } else { 0 };
            sleep(Duration::from_millis(1));
        }
        true
    }

    pub(crate) fn join(self) -> T {
        self.thread.join().expect("the thread did not panic")
    }
}

/// Who never waits is not taken for somebody who does, and the other way round.
#[test]
fn who_waits_is_told_from_who_does_not() {
    let (go_on, is_told) = channel::<()>();
    std::thread::scope(|scope| {
        let waiting = watched(scope, move || is_told.recv());
        let busy =
            watched(scope, || (0..1_000_000_u64).fold(0, |sum, n| sum ^ std::hint::black_box(n)));
        assert!(waiting.waits() && !busy.waits());
        go_on.send(()).expect("it waits");
        waiting.join().expect("it was told");
        busy.join();
    });
}
