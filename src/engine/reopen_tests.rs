//! What an open makes of a directory that normal use has left. On a simulated disk, without
//! threads.

use std::sync::Arc;
use std::time::Duration;

use super::flushers::Step;
use super::order_tests::{START, consume, small};
use super::*;
use crate::clock::ManualClock;
use crate::model::{Quota, Timestamp, Window};
use crate::storage::sim::SimDisk;

/// The map was made as large as all sums of closed windows in the snapshot ask for, which would
/// fill it before a counter was forgotten.
#[test]
fn an_open_makes_room_for_open_windows_only() {
    const USERS: u64 = 100;
    let disk = SimDisk::new(1);
    let clock = ManualClock::new(Timestamp::from_unix_millis(START));
    let config = || small().lane_records(1 << 12).clock(Arc::new(clock.clone()));
    let open = || Owner::open_at_rest(&disk.storage(), config()).unwrap();
    let count = |owner: &Owner, quota, users: std::ops::Range<u64>| {
        clock.advance(Duration::from_secs(1));
        users.for_each(|user| assert_eq!(consume(owner, user, quota, false).unwrap(), 1));
        owner.engine.step(Step::Files).unwrap();
        owner.engine.sync().unwrap();
    };
    let owner = open();
    let per_second = Quota::new("requests", 10).window(Window::Every(Duration::from_secs(1)));
    let quota = owner.engine.define(&per_second).unwrap();
    for _ in 0..100 {
        count(&owner, quota, 0..USERS);
    }
    owner.engine.snapshot().unwrap();
    disk.kill();
    drop(owner);

    let owner = open();
    let table = &owner.engine.table;
    assert_eq!(table.len() as u64, USERS);
    assert!(table.capacity() <= 4 * table.len(), "room for {}", table.capacity());
    // And so it stays, whoever comes.
    for window in 1..=50 {
        count(&owner, quota, window * USERS..(window + 1) * USERS);
    }
    assert!(table.len() as u64 <= 4 * USERS, "{} counters", table.len());
}
