//! The child: random operations on several threads, acknowledged in the shared page, until it is
//! killed. It closes and opens the directory again and again, so that kills hit recovery and close
//! as well.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tollgate::{Consume, Decision, Tollgate};

use crate::page::{Page, Tally};
use crate::{COUNTERS, Random, THREADS, define, open, split};

/// Runs until killed.
pub(crate) fn run(dir: &Path, page: &Path, seed: u64) {
    let page = Page::open(page);
    let mut random = Random(seed);
    loop {
        let gate = open(dir, &page, random.next());
        let rounds = random.below(400) + 1;
        let stop = AtomicBool::new(false);
        let seeds: Vec<_> = (0..THREADS).map(|_| random.next()).collect();
        std::thread::scope(|scope| {
            for (thread, &seed) in seeds.iter().enumerate() {
                let (gate, page, stop) = (&gate, &page, &stop);
                scope.spawn(move || work(gate, page, thread, seed, rounds, stop));
            }
        });
        match random.below(3) {
            0 => drop(gate),
            _ => gate.close().expect("the disk works"),
        }
    }
}

fn work(gate: &Tollgate, page: &Page, thread: usize, seed: u64, rounds: u64, stop: &AtomicBool) {
    let mut random = Random(seed);
    let quotas = define(gate);
    for _ in 0..rounds {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let counter = random.below(COUNTERS as u64) as usize;
        let (user, quota) = split(counter);
        let id = quotas[quota];
        let amount = random.below(5) + 1;
        let issue = |tally| page.add(counter, tally, thread, amount);
        let acknowledge = |decision: &Decision| {
            if decision.is_allowed() {
                page.add(counter, Tally::AddAcked, thread, amount);
            }
        };
        match random.below(100) {
            0..50 => {
                issue(Tally::AddIssued);
                acknowledge(&gate.try_consume(user, id, amount).expect("there is room"));
            }
            50..65 => {
                issue(Tally::AddIssued);
                let handle = gate.counter(user, id).expect("it is defined");
                acknowledge(&handle.try_consume(amount).expect("there is room"));
            }
            65..75 => {
                issue(Tally::AddIssued);
                acknowledge(&gate.try_consume_sync(user, id, amount).expect("the disk works"));
            }
            75..85 => {
                issue(Tally::RefundIssued);
                let given = gate.refund(user, id, amount).expect("there is room");
                page.add(counter, Tally::RefundAcked, thread, given);
            }
            85..90 if quota == 0 => {
                // Past the limit on purpose: only on the quota that has none.
                issue(Tally::AddIssued);
                let items = [Consume { user, quota: id, amount }];
                gate.consume_batch(&items).expect("there is room");
                page.add(counter, Tally::AddAcked, thread, amount);
            }
            90..92 => gate.sync().expect("the disk works"),
            92..93 => gate.snapshot().expect("the disk works"),
            93..94 => {
                // The limit that it has: what is recovered must not depend on when.
                let limit = gate.usage(user, id).expect("it is defined").limit;
                gate.set_limit(user, id, limit).expect("the disk works");
            }
            94 if thread == 0 => {
                std::thread::sleep(Duration::from_micros(random.below(2_000)));
            }
            _ => {
                let _ = gate.check(user, id, amount).expect("it is defined");
            }
        }
    }
}
