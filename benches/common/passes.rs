//! Interleaved passes: every contestant does the same operations, on the same pinned threads, in
//! turns, so that what else happens on the machine meets all of them.

use std::collections::BTreeMap;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::options::Options;
use super::pin::pin;
use super::proc::await_merges;
use super::quiet::Quiet;

/// The first part of a pass is not timed: one in so many operations.
const WARM_UP_PART: usize = 4;
/// The first rounds of passes do not count: nearly all memory is new then, and new to the machine
/// below as well where that is a virtual one.
const FIRST_ROUNDS: usize = 2;
/// How long the machine is left alone between two passes.
const PAUSE: Duration = Duration::from_millis(20);

/// One way of doing the work.
pub(crate) trait Contestant: Sync {
    fn name(&self) -> &'static str;

    /// Does one operation for each user. Returns something that depends on all the results.
    fn run(&self, part: &Part<'_>) -> u64;

    /// Finishes what a pass leaves behind, so that the next contestant does not pay for it.
    fn settle(&self) {}

    /// Panics unless exactly so many operations were counted since it was made.
    fn verify(&self, operations: u64);
}

/// A thread's operations in a pass, timed or not.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part<'a> {
    pub(crate) thread: usize,
    /// How many of the thread's operations come before.
    pub(crate) first: usize,
    pub(crate) users: &'a [u32],
}

/// Nanoseconds per operation and thread, by contestant, one for each repetition.
pub(crate) type Samples = BTreeMap<&'static str, Vec<f64>>;

/// When a thread was in a pass.
#[derive(Debug, Clone, Copy)]
struct Span {
    start: Instant,
    end: Instant,
}

/// Runs all contestants as often as the options say, on as many threads as there are sequences of
/// users; thread n runs on core n. At the end all are asked whether they have counted everything.
pub(crate) fn race(
    contestants: &[&dyn Contestant],
    users: &[Vec<u32>],
    options: &Options,
) -> Samples {
    let race = Race {
        contestants,
        repetitions: options.repetitions(),
        barrier: Barrier::new(users.len()),
        counts: AtomicBool::new(false),
    };
    let mut quiet = Some(options.quiet());
    let runs: Vec<Run> = thread::scope(|scope| {
        let mut workers = Vec::new();
        for (thread, users) in users.iter().enumerate() {
            let (race, quiet) = (&race, quiet.take());
            workers.push(scope.spawn(move || {
                pin(thread);
                race.run(thread, users, quiet)
            }));
        }
        workers.into_iter().map(|worker| worker.join().expect("no pass panics")).collect()
    });

    let operations = users.first().map_or(0, |users| users.len() - warm_up(users));
    let mut samples = Samples::new();
    for (turn, contestant) in race.turns().enumerate() {
        let start = runs.iter().map(|run| run.spans[turn].start).min();
        let end = runs.iter().map(|run| run.spans[turn].end).max();
        let elapsed = end.zip(start).map_or(Duration::ZERO, |(end, start)| end - start);
        let sample = elapsed.as_secs_f64() * 1e9 / operations as f64;
        samples.entry(contestants[contestant].name()).or_default().push(sample);
    }
    let attempts = runs.first().map_or(0, |run| run.attempts);
    let counted = users.iter().map(Vec::len).sum::<usize>() * attempts;
    for contestant in contestants {
        contestant.verify(counted as u64);
    }
    samples
}

struct Race<'a> {
    contestants: &'a [&'a dyn Contestant],
    repetitions: usize,
    barrier: Barrier,
    /// Whether the repetition counts that has just ended.
    counts: AtomicBool,
}

/// One thread's part.
struct Run {
    /// Those of the repetitions that count.
    spans: Vec<Span>,
    /// How many repetitions there were, those that don't count included.
    attempts: usize,
}

impl Race<'_> {
    /// Who is next: each repetition begins with another contestant.
    fn order(&self, repetition: usize) -> impl Iterator<Item = usize> {
        let contestants = self.contestants.len();
        (0..contestants).map(move |index| (index + repetition) % contestants)
    }

    fn turns(&self) -> impl Iterator<Item = usize> {
        (0..self.repetitions).flat_map(|repetition| self.order(repetition))
    }

    /// What a thread does. The one with `quiet` leads: it decides what counts.
    fn run(&self, thread: usize, users: &[u32], mut quiet: Option<Quiet>) -> Run {
        let mut spans = Vec::new();
        let mut attempts = 0;
        for repetition in 0..FIRST_ROUNDS {
            for contestant in self.order(repetition) {
                self.pass(contestant, thread, users, quiet.is_some());
            }
            attempts += 1;
        }
        for repetition in 0..self.repetitions {
            loop {
                if let Some(quiet) = &mut quiet {
                    quiet.begin();
                }
                let passes = self.order(repetition);
                let passes: Vec<Span> = passes
                    .map(|contestant| self.pass(contestant, thread, users, quiet.is_some()))
                    .collect();
                attempts += 1;
                if let Some(quiet) = &quiet {
                    // Relaxed: the barrier orders it.
                    self.counts.store(quiet.accepts(), Ordering::Relaxed);
                }
                self.barrier.wait();
                let counts = self.counts.load(Ordering::Relaxed);
                // Nobody begins the next before all have looked.
                self.barrier.wait();
                if counts {
                    spans.extend(passes);
                    break;
                }
            }
        }
        Run { spans, attempts }
    }

    fn pass(&self, contestant: usize, thread: usize, users: &[u32], leads: bool) -> Span {
        let contestant = self.contestants[contestant];
        let (first, timed) = users.split_at(warm_up(users));
        let untimed = Part { thread, first: 0, users: first };
        let timed = Part { thread, first: first.len(), users: timed };
        self.barrier.wait();
        std::hint::black_box(contestant.run(&untimed));
        self.barrier.wait();
        let start = Instant::now();
        std::hint::black_box(contestant.run(&timed));
        let end = Instant::now();
        self.barrier.wait();
        if leads {
            contestant.settle();
            await_merges();
            thread::sleep(PAUSE);
        }
        Span { start, end }
    }
}

fn warm_up(users: &[u32]) -> usize {
    users.len() / WARM_UP_PART
}
