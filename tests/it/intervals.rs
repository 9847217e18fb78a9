//! That a sync begins every `sync_interval` by itself. Nothing here depends on how fast the machine
//! is: a thread beside it does the same work at the same times, and both are counted.

use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tollgate::{Config, Quota, Tollgate};

const INTERVAL: Duration = Duration::from_millis(20);
const BEATS: u64 = 25;
/// The other thread may have been luckier.
const ATTEMPTS: u32 = 20;

/// The interval was once four times as long, and nothing failed. Half as many syncs as the other
/// thread has done are enough, once in all attempts.
#[test]
fn a_sync_begins_every_interval() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config::default().lanes(2).lane_records(1 << 12).sync_interval(INTERVAL);
    let gate = Tollgate::open(dir.path(), config).unwrap();
    let quota = gate.define(Quota::new("requests", 1 << 40)).unwrap();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                let _ = gate.consume(1, quota, 1).unwrap();
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let mut file = tempfile::tempfile_in(dir.path()).unwrap();
        let mut seen = Vec::new();
        for _ in 0..ATTEMPTS {
            let before = gate.stats().syncs;
            (0..BEATS).for_each(|_| beat(&mut file));
            seen.push(gate.stats().syncs - before);
            if seen.last() >= Some(&(BEATS / 2)) {
                break;
            }
        }
        is_over.store(true, Ordering::Relaxed);
        assert!(seen.last() >= Some(&(BEATS / 2)), "{seen:?}, while there were {BEATS} intervals");
    });
}

/// What the engine does once an interval.
fn beat(file: &mut File) {
    std::thread::sleep(INTERVAL);
    file.write_all(&[1; 100]).unwrap();
    file.sync_data().unwrap();
}
