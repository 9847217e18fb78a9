//! Interleaved passes: every contestant does the same operations, on the same pinned threads, in
//! turns, so that what else happens on the machine meets all of them.

use std::collections::BTreeMap;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use super::pin::pin;

/// The first part of a pass is not timed: one in so many operations.
const WARM_UP_PART: usize = 16;
/// How long the machine is left alone between two passes.
const PAUSE: Duration = Duration::from_millis(20);

/// One way of doing the work.
pub(crate) trait Contestant: Sync {
    fn name(&self) -> &'static str;

    /// Does one operation for each user. Returns something that depends on all the results.
    fn run(&self, users: &[u32]) -> u64;

    /// Finishes what a pass leaves behind, so that the next contestant does not pay for it.
    fn settle(&self) {}

    /// Panics unless exactly so many operations were counted since it was made.
    fn verify(&self, operations: u64);
}

/// Nanoseconds per operation and thread, by contestant, one for each repetition.
pub(crate) type Samples = BTreeMap<&'static str, Vec<f64>>;

/// When a thread was in a pass.
#[derive(Debug, Clone, Copy)]
struct Span {
    start: Instant,
    end: Instant,
}

/// Runs all contestants `repetitions` times, on as many threads as there are sequences of users;
/// thread n runs on core n. At the end all are asked whether they have counted everything.
pub(crate) fn race(
    contestants: &[&dyn Contestant],
    users: &[Vec<u32>],
    repetitions: usize,
) -> Samples {
    let barrier = Barrier::new(users.len());
    let spans: Vec<Vec<Span>> = thread::scope(|scope| {
        let mut workers = Vec::new();
        for (thread, users) in users.iter().enumerate() {
            let barrier = &barrier;
            workers.push(scope.spawn(move || {
                pin(thread);
                take_turns(contestants, users, repetitions, thread == 0, barrier)
            }));
        }
        workers.into_iter().map(|worker| worker.join().expect("no pass panics")).collect()
    });

    let operations = users.first().map_or(0, |users| users.len() - warm_up(users));
    let mut samples = Samples::new();
    for (turn, contestant) in turns(contestants.len(), repetitions).enumerate() {
        let start = spans.iter().map(|spans| spans[turn].start).min();
        let end = spans.iter().map(|spans| spans[turn].end).max();
        let elapsed = end.zip(start).map_or(Duration::ZERO, |(end, start)| end - start);
        let sample = elapsed.as_secs_f64() * 1e9 / operations as f64;
        samples.entry(contestants[contestant].name()).or_default().push(sample);
    }
    let counted = users.iter().map(Vec::len).sum::<usize>() * repetitions;
    for contestant in contestants {
        contestant.verify(counted as u64);
    }
    samples
}

/// One thread's part.
fn take_turns(
    contestants: &[&dyn Contestant],
    users: &[u32],
    repetitions: usize,
    settles: bool,
    barrier: &Barrier,
) -> Vec<Span> {
    let (first, timed) = users.split_at(warm_up(users));
    let turn = |index: usize| {
        let contestant = contestants[index];
        barrier.wait();
        std::hint::black_box(contestant.run(first));
        barrier.wait();
        let start = Instant::now();
        std::hint::black_box(contestant.run(timed));
        let end = Instant::now();
        barrier.wait();
        if settles {
            contestant.settle();
            thread::sleep(PAUSE);
        }
        Span { start, end }
    };
    turns(contestants.len(), repetitions).map(turn).collect()
}

fn warm_up(users: &[u32]) -> usize {
    users.len() / WARM_UP_PART
}

/// Who is next: each repetition begins with another contestant.
fn turns(contestants: usize, repetitions: usize) -> impl Iterator<Item = usize> {
    (0..repetitions)
        .flat_map(move |turn| (0..contestants).map(move |index| (index + turn) % contestants))
}
