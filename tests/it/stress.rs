//! What is too large for loom: handles against the sweep that forgets counters, and groups against
//! insertions.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tollgate::{Config, Consume, ManualClock, Quota, Timestamp, Tollgate, Usage, Window};

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

/// Groups take several shards of the map at once, in whichever order their users are named, while
/// others insert into the same shards, and wait for all who read there. Each comes to an end, and
/// counts each unit once. Reservations take shards when they are settled, too.
#[test]
fn groups_meet_insertions_in_the_same_shards() {
    const ROUNDS: u64 = 20_000;
    let dir = tempfile::tempdir().unwrap();
    let gate = Tollgate::open(dir.path(), Config::default().shards(4).lanes(2)).unwrap();
    let quota = gate.define(Quota::new("requests", 1 << 40)).unwrap();
    let consume = |user| Consume { user, quota, amount: 1 };
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (gate, is_over) = (&gate, &is_over);
        let inserting = scope.spawn(move || {
            for user in 1 << 32.. {
                if is_over.load(Ordering::Relaxed) {
                    return user - (1 << 32);
                }
                let _ = gate.consume(user, quota, 1).unwrap();
            }
            unreachable!("there are more users than that")
        });
        let workers: Vec<_> = (0..WORKERS)
            .map(|worker| {
                scope.spawn(move || {
                    for round in 0..ROUNDS {
                        // In both orders, a user that is new now and then, and one twice.
                        let mut users = [round % 3, 3 + round % 5, 8 + round / 16, 8 + round / 16];
                        users.rotate_left(usize::try_from(worker).unwrap());
                        let items = users.map(consume);
                        if round % 2 == 0 {
                            assert!(gate.try_consume_all(&items).unwrap().is_allowed());
                        } else {
                            let reserved = gate.reserve_all(&items, Duration::from_secs(60));
                            let mut reserved = reserved.unwrap().into_result().unwrap();
                            assert!(reserved.commit_items(&items).unwrap().is_allowed());
                        }
                    }
                })
            })
            .collect();
        workers.into_iter().for_each(|worker| worker.join().unwrap());
        is_over.store(true, Ordering::Relaxed);
        assert!(inserting.join().unwrap() > 0);
    });
    let users = 0..8 + ROUNDS / 16;
    let used: u64 = users.map(|user| gate.usage(user, quota).unwrap().used).sum();
    assert_eq!(used, WORKERS * ROUNDS * 4);
}
