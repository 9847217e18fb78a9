//! What is too large for loom: handles against the sweep that forgets counters.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tollgate::{Config, ManualClock, Quota, Timestamp, Tollgate, Usage, Window};

const WORKERS: u64 = 3;
/// So many that a sweep finds some idle since their window ended.
const TRACKED: u64 = 2000;
const WINDOWS: u64 = 200;

/// Windows end, the table fills with users that come once, and sweeps forget the counters whose
/// window is over, while workers count the same few users by key and through handles that they take
/// and drop. Each consume of one unit is told the usage after it: in each window of a user, every
/// number from 1 on, once.
#[test]
fn a_counter_that_is_forgotten_or_shared_meanwhile_counts_each_unit_once() {
    let dir = tempfile::tempdir().unwrap();
    let clock = ManualClock::new(Timestamp::from_unix_millis(1_767_225_600_000));
    let config = Config::default().shards(2).lanes(2).clock(Arc::new(clock.clone()));
    let gate = Tollgate::open(dir.path(), config).unwrap();
    let quota = Quota::new("requests", 1 << 40).window(Window::Every(Duration::from_secs(1)));
    let quota = gate.define(quota).unwrap();
    let is_over = AtomicBool::new(false);
    let told: Vec<(u64, Usage)> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS)
            .map(|worker| {
                let (gate, is_over) = (&gate, &is_over);
                scope.spawn(move || {
                    let mut told = Vec::new();
                    let mut passing_by = (worker + 1) << 32;
                    let mut handles = BTreeMap::new();
                    for round in worker.. {
                        if is_over.load(Ordering::Relaxed) {
                            return told;
                        }
                        let user = round * 7 % TRACKED;
                        let usage = if user % WORKERS == worker {
                            let handle = handles
                                .entry(user)
                                .or_insert_with(|| gate.counter(user, quota).unwrap());
                            handle.consume(1).unwrap()
                        } else {
                            gate.consume(user, quota, 1).unwrap()
                        };
                        told.push((user, usage));
                        if round % 3 == 0 {
                            handles.remove(&(round % TRACKED));
                        }
                        passing_by += 1;
                        let _ = gate.consume(passing_by, quota, 1).unwrap();
                    }
                    told
                })
            })
            .collect();
        for _ in 0..WINDOWS {
            std::thread::sleep(Duration::from_millis(2));
            clock.advance(Duration::from_millis(500));
        }
        is_over.store(true, Ordering::Relaxed);
        workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
    });
    let mut windows = BTreeMap::<_, Vec<u64>>::new();
    for (user, usage) in told {
        windows.entry((user, usage.window_start)).or_default().push(usage.used);
    }
    assert!(windows.len() as u64 > WINDOWS, "{} windows of users", windows.len());
    for (window, mut used) in windows {
        used.sort_unstable();
        let count = used.len() as u64;
        assert!(used.iter().copied().eq(1..=count), "{window:?}: {used:?}");
    }
    let stats = gate.stats();
    assert!(stats.counters < stats.total / 4, "nothing was forgotten: {stats:?}");
}
