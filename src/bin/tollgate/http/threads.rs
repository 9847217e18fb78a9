//! Threads for work that waits, where no thread may be had when it is needed.
//!
//! tokio's own would do, but panic where the system refuses to make one (a bound on processes),
//! and all end after a while without work. Some of these are made at the start and stay, so that
//! whatever is given to them has its turn.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

type Job = Box<dyn FnOnce() + Send>;

/// As of the standard library's threads.
const STACK_BYTES: usize = 2 << 20;
/// The others end when they have had nothing to do for this long.
const IDLE_TIME_MAX: Duration = Duration::from_secs(10);

/// So many threads as the work takes, within bounds. They outlive this value.
#[derive(Debug)]
pub(crate) struct Threads {
    shared: Arc<Shared>,
    count_max: usize,
    /// Tests ask for more than there is, which is refused.
    stack_bytes: usize,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    has_work: Condvar,
}

#[derive(Default)]
struct State {
    /// What has no thread yet. Who gives work bounds it.
    jobs: VecDeque<Job>,
    count: usize,
    /// Those that wait for work, or are about to take some.
    idle: usize,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { jobs, count, idle } = self;
        write!(f, "{count} threads, {idle} of them idle; {} jobs", jobs.len())
    }
}

impl Threads {
    /// Starts the `kept` threads that stay.
    pub(crate) fn start(kept: usize, count_max: usize) -> io::Result<Self> {
        let threads = Self { shared: Arc::default(), count_max, stack_bytes: STACK_BYTES };
        for _ in 0..kept.min(count_max) {
            threads.spawn(None)?;
            threads.shared.state.lock().count += 1;
        }
        Ok(threads)
    }

    /// Runs it on a thread of its own, or, where none can be made, on one of the others when it is
    /// free.
    pub(crate) fn run(&self, job: impl FnOnce() + Send + 'static) {
        let mut state = self.shared.state.lock();
        state.jobs.push_back(Box::new(job));
        if state.jobs.len() > state.idle
            && state.count < self.count_max
            && self.spawn(Some(IDLE_TIME_MAX)).is_ok()
        {
            state.count += 1;
        }
        drop(state);
        self.shared.has_work.notify_one();
    }

    fn spawn(&self, idle_time_max: Option<Duration>) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let thread =
            thread::Builder::new().name("tollgate-wait".to_owned()).stack_size(self.stack_bytes);
        thread.spawn(move || shared.work(idle_time_max)).map(drop)
    }
}

impl Shared {
    /// Does what there is to do, and ends after so long without.
    fn work(&self, idle_time_max: Option<Duration>) {
        while let Some(job) = self.next(idle_time_max) {
            // Who waits for it sees that it has no result.
            let _ = catch_unwind(AssertUnwindSafe(job));
        }
    }

    fn next(&self, idle_time_max: Option<Duration>) -> Option<Job> {
        let mut state = self.state.lock();
        state.idle += 1;
        let job = loop {
            if let Some(job) = state.jobs.pop_front() {
                break Some(job);
            }
            let Some(time_max) = idle_time_max else {
                self.has_work.wait(&mut state);
                continue;
            };
            let waited = self.has_work.wait_for(&mut state, time_max);
            if waited.timed_out() && state.jobs.is_empty() {
                state.count -= 1;
                break None;
            }
        };
        state.idle -= 1;
        job
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const KEPT: usize = 8;

    /// tokio's threads panicked where the system refused another one. And a panic ends no thread.
    #[test]
    fn what_gets_no_thread_of_its_own_has_its_turn() {
        let mut threads = Threads::start(KEPT, 100).expect("threads");
        threads.stack_bytes = 1 << 50;
        threads.spawn(None).expect_err("there is not that much");
        let (done, results) = mpsc::channel();
        for number in 0..100 {
            let done = done.clone();
            threads.run(move || {
                assert!(number % 10 != 0, "meant to fail");
                let _ = done.send(number);
            });
        }
        drop(done);
        let results: Vec<_> = results.iter().collect();
        assert_eq!(results.len(), 90);
    }

    #[test]
    fn work_that_waits_does_not_hold_up_other_work() {
        let count = KEPT + 5;
        let threads = Threads::start(KEPT, count).expect("threads");
        let meeting = Arc::new(std::sync::Barrier::new(count));
        let (done, results) = mpsc::channel();
        for _ in 0..count {
            let (meeting, done) = (Arc::clone(&meeting), done.clone());
            // Passed only once all of them run at the same time.
            threads.run(move || {
                meeting.wait();
                let _ = done.send(());
            });
        }
        drop(done);
        assert_eq!(results.iter().count(), count);
    }
}
