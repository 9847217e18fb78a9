//! What the engine does when the disk fails at a bad moment, or what it holds rots. On a simulated
//! disk, without threads but where a test starts one.

use std::sync::Arc;
use std::time::Duration;

use super::flushers::Step;
use super::order_tests::{START, consume, define, open, small, used};
use super::*;
use crate::clock::{Clock, ManualClock};
use crate::health::HealthLevel;
use crate::identity::{self, Identity};
use crate::model::{Consume, Decisions, Quota, ReservationId, Timestamp};
use crate::storage::CheckedStorage;
use crate::storage::sim::{Call, Fault, Outcome, SimDisk};
use crate::wal::lanes::prefer;
use crate::wal::region::SLOTS_AT;

fn reserve(owner: &Owner, item: Consume, ttl: Duration) -> ReservationId {
    let reserved: std::result::Result<_, Decisions> = owner.engine.reserve(&[item], ttl).unwrap();
    reserved.unwrap()
}

fn snapshots(disk: &SimDisk) -> Vec<String> {
    let mut names = disk.file_names();
    names.retain(|name| name.starts_with("snapshot-"));
    names.sort();
    names
}

/// As it was when it was created.
fn wipe_ring(disk: &SimDisk, lane: usize) {
    let prefix = format!("lane-{lane:04}");
    let name = disk.file_names().into_iter().find(|name| name.starts_with(&prefix)).unwrap();
    let mut bytes = disk.file(&name).unwrap();
    bytes[SLOTS_AT * 8..].fill(0);
    disk.put(&name, &bytes);
}

/// Each goes one durable unit of user 1 further.
fn write_two_snapshots(owner: &Owner, quota: QuotaId) {
    for _ in 0..2 {
        consume(owner, 1, quota, true).unwrap();
        owner.engine.snapshot().unwrap();
    }
}

/// Once the directory can't be synced, no attempt leaves a file behind that no later one knows of;
/// and durability is over: callers were only asked for patience.
#[test]
fn attempts_that_can_not_succeed_write_nothing() {
    let disk = SimDisk::new(1);
    let storage: Arc<dyn Storage> = Arc::new(CheckedStorage::new(disk.storage()));
    let owner = Owner::open_at_rest(&storage, small()).unwrap();
    let quota = define(&owner);
    disk.inject(Fault::new(Call::SyncDirectory, 0, Outcome::Eio));
    consume(&owner, 1, quota, true).unwrap();
    for _ in 0..10 {
        owner.engine.snapshot().unwrap_err();
        owner.engine.step(Step::Files).unwrap_err();
    }
    let health = owner.engine.health();
    assert_eq!(health.level(), HealthLevel::Failed, "{health}");
    let reason = owner.engine.poison.reason().unwrap();
    assert!(reason.contains("the directory /simulated/"), "{reason}");
    assert!(reason.contains("must be reopened") && !reason.contains(".tmp"), "{reason}");
    let synced = consume(&owner, 1, quota, true);
    assert!(matches!(synced, Err(Error::DurabilityLost { .. })), "{synced:?}");
    assert!(snapshots(&disk).len() <= 1, "{:?}", disk.file_names());
    let calls = disk.calls();
    for _ in 0..10 {
        owner.engine.step(Step::Files).unwrap_err();
    }
    assert_eq!(disk.calls(), calls);
}

/// The mark that a directory was created is lost, and it can't be read just now: it is not begun
/// anew.
#[test]
fn what_can_not_be_read_is_not_begun_anew() {
    let disk = SimDisk::new(1);
    let owner = open(&disk);
    let quota = define(&owner);
    consume(&owner, 1, quota, true).unwrap();
    let engine = owner.engine.id();
    disk.kill();
    drop(owner);
    identity::write(&disk.storage(), Identity { engine, is_created: false }).unwrap();
    let image = disk.snapshot_image();
    for nth in 0..20 {
        let disk = SimDisk::from_image(&image, nth);
        disk.inject(Fault::new(Call::Read, nth, Outcome::Eio).on("journal-"));
        // Where this fails it has changed nothing.
        drop(Owner::open_at_rest(&disk.storage(), small()));
        disk.clear_faults();
        disk.kill();
        assert_eq!(used(&open(&disk), 1, quota), 1, "the read {nth} failed");
    }
}

/// The newest snapshot is sound, and the batch that it goes up to is not: nothing older is taken.
#[test]
fn a_sound_snapshot_beyond_the_journal_is_not_given_up() {
    let disk = SimDisk::new(1);
    let owner = open(&disk);
    let quota = define(&owner);
    write_two_snapshots(&owner, quota);
    disk.kill();
    drop(owner);
    // Otherwise the ring would make up for it.
    wipe_ring(&disk, 0);
    let before = snapshots(&disk);
    let journal = disk.file_names().into_iter().find(|name| name.starts_with("journal-")).unwrap();
    let file = disk.file(&journal).unwrap();
    let last = file.iter().rposition(|&byte| byte != 0).unwrap();
    // Every place in the last batch.
    for at in (last.saturating_sub(250)..last).step_by(8) {
        let rotten = SimDisk::from_image(&disk.snapshot_image(), 1);
        rotten.corrupt(&journal, at as u64, 1).unwrap();
        match Owner::open_at_rest(&rotten.storage(), small()) {
            Ok(owner) => assert_eq!(used(&owner, 1, quota), 2, "at {at}"),
            Err(Error::Damaged { .. }) => assert_eq!(snapshots(&rotten), before, "at {at}"),
            Err(error) => panic!("at {at}: {error}"),
        }
    }
}

/// The file system has lost what was not synced, and the machine ran on: the ring looked as if
/// nothing was counted since the last batch.
#[test]
fn pages_that_a_ring_has_lost_are_missed() {
    // One record, some; a lane that has skipped to its ring's start; that has gone through its ring
    // once, and more than once.
    for (journaled, more) in [1, 30, 40, 64, 100, 200].into_iter().flat_map(|journaled| {
        // The last fill the ring.
        [0, 1, 2, 63, 64].map(|more| (journaled, more))
    }) {
        let disk = SimDisk::new(1);
        let owner = open(&disk);
        let quota = define(&owner);
        for number in 1..=journaled {
            consume(&owner, 1, quota, false).unwrap();
            if number % 10 == 0 || number == journaled {
                owner.engine.step(Step::Drain).unwrap();
                owner.engine.step(Step::Append).unwrap();
            }
        }
        let more =
            (0..more).take_while(|_| consume(&owner, 1, quota, false).is_ok()).count() as u64;
        disk.kill();
        drop(owner);
        for is_lost in [false, true] {
            let disk = SimDisk::from_image(&disk.snapshot_image(), 1);
            if is_lost {
                wipe_ring(&disk, 0);
            }
            let owner = open(&disk);
            let findings = &owner.engine.report().findings;
            let context = format!("{journaled} journaled and {more} more: {findings:?}");
            assert_eq!(findings.len(), usize::from(is_lost), "{context}");
            let counted = if is_lost { journaled } else { journaled + more };
            assert_eq!(used(&owner, 1, quota), counted, "{context}");
        }
    }
}

/// The newest snapshot rots while the engine runs: merges go on from the one before it.
#[test]
fn a_rotten_snapshot_does_not_end_merges() {
    let disk = SimDisk::new(1);
    let owner = open(&disk);
    let quota = define(&owner);
    for user in 0..200 {
        consume(&owner, user, quota, false).unwrap();
        owner.engine.step(Step::Drain).unwrap();
    }
    write_two_snapshots(&owner, quota);
    let newest = snapshots(&disk).pop().unwrap();
    let middle = disk.file(&newest).unwrap().len() as u64 / 2;
    disk.corrupt(&newest, middle, 1).unwrap();
    write_two_snapshots(&owner, quota);
    assert!(!snapshots(&disk).contains(&newest) && snapshots(&disk).len() == 2);
    disk.kill();
    drop(owner);
    let owner = open(&disk);
    assert_eq!((used(&owner, 1, quota), used(&owner, 7, quota)), (5, 1));
    assert_eq!(owner.engine.report().findings, []);
}

/// The newest snapshot can't be read while the engine runs: merges go on from the one before it,
/// and it is not removed.
#[test]
fn a_snapshot_that_can_not_be_read_does_not_end_merges() {
    let disk = SimDisk::new(1);
    let owner = open(&disk);
    let quota = define(&owner);
    write_two_snapshots(&owner, quota);
    let newest = snapshots(&disk).pop().unwrap();
    for nth in 0..10 {
        let fault = Fault::new(Call::Read, nth, Outcome::Eio);
        disk.inject(fault.on(Box::leak(newest.clone().into_boxed_str())));
    }
    consume(&owner, 1, quota, true).unwrap();
    owner.engine.snapshot().unwrap();
    assert!(snapshots(&disk).contains(&newest) && snapshots(&disk).len() == 3);
    disk.clear_faults();
    disk.kill();
    drop(owner);
    let owner = open(&disk);
    assert_eq!(used(&owner, 1, quota), 3);
    assert_eq!(owner.engine.report().findings, []);
}

/// What can't be read for an instant is not removed as if it were damaged.
#[test]
fn an_older_snapshot_that_can_not_be_read_just_now_stays() {
    let disk = SimDisk::new(1);
    let owner = open(&disk);
    let quota = define(&owner);
    write_two_snapshots(&owner, quota);
    disk.kill();
    drop(owner);
    let before = snapshots(&disk);
    assert_eq!(before.len(), 2);
    disk.inject(Fault::new(Call::Open, 1, Outcome::Eio).on("snapshot-"));
    let owner = open(&disk);
    assert_eq!((owner.engine.report().findings.len(), used(&owner, 1, quota)), (1, 2));
    disk.kill();
    drop(owner);
    assert_eq!(snapshots(&disk), before);
    assert_eq!(open(&disk).engine.report().findings, []);
}

/// A refund and a reservation survived a loss of power, and what they followed did not: what the
/// reservation gives back is in the counter all the same, so that memory and log stay alike.
#[test]
fn a_counter_is_never_below_what_is_reserved_of_it() {
    for is_committed in [false, true] {
        let disk = SimDisk::new(1);
        let owner = Owner::open_at_rest(&disk.storage(), small().lanes(2)).unwrap();
        let quota = define(&owner);
        owner.engine.sync().unwrap();
        let counted = owner.engine.counted(1, quota).unwrap();
        prefer(0);
        owner.engine.consume(&counted, 3, false).unwrap();
        prefer(1);
        assert_eq!(owner.engine.refund(&counted, 3).unwrap(), 3);
        let item = Consume { user: 1, quota, amount: 5 };
        let id = reserve(&owner, item, Duration::from_secs(600));
        assert!(owner.engine.lanes.get(1).unwrap().tail() > 0);
        disk.kill();
        drop(owner);
        // As a loss of power that takes this ring and no other.
        wipe_ring(&disk, 0);

        let open = || Owner::open_at_rest(&disk.storage(), small().lanes(2)).unwrap();
        let owner = open();
        assert_eq!(used(&owner, 1, quota), 5);
        if is_committed {
            assert!(owner.engine.commit(id, Charge::Same(5)).unwrap().is_allowed());
        } else {
            owner.engine.cancel(id).unwrap();
        }
        consume(&owner, 1, quota, false).unwrap();
        let in_memory = used(&owner, 1, quota);
        assert_eq!(in_memory, if is_committed { 6 } else { 1 });
        disk.kill();
        drop(owner);
        assert_eq!(used(&open(), 1, quota), in_memory);
    }
}

/// A clock that makes others give back what is over just when somebody asks it.
#[derive(Debug)]
struct Meddling {
    inner: ManualClock,
    engine: Mutex<Option<Arc<Owner>>>,
}

impl Clock for Meddling {
    fn now(&self) -> Timestamp {
        let armed = self.engine.lock().take();
        if let Some(owner) = armed {
            self.inner.advance(Duration::from_secs(10));
            owner.engine.clock.refresh();
            owner.engine.step(Step::Expiry).unwrap();
        }
        self.inner.now()
    }

    fn monotonic(&self) -> Duration {
        self.inner.monotonic()
    }
}

/// Another thread gives back an expired reservation between a look at the counter and the denial:
/// what fits then is not refused.
#[test]
fn what_others_give_back_meanwhile_is_not_refused() {
    let disk = SimDisk::new(1);
    let inner = ManualClock::new(Timestamp::from_unix_millis(START));
    let clock = Arc::new(Meddling { inner, engine: Mutex::new(None) });
    let config = small().clock(Arc::clone(&clock) as _);
    let owner = Arc::new(Owner::open_at_rest(&disk.storage(), config).unwrap());
    let quota = owner.engine.define(&Quota::new("five", 5)).unwrap();
    let counted = owner.engine.counted(1, quota).unwrap();
    let asks: [fn(&Owner, &Counted<'_>) -> bool; 2] = [
        |owner, counted| owner.engine.check(counted, 5).unwrap().is_allowed(),
        |owner, counted| owner.engine.try_consume(counted, 5, false).unwrap().is_allowed(),
    ];
    for (ask, new_users) in asks.into_iter().zip([10, 200]) {
        for is_open in [true, false] {
            reserve(&owner, Consume { user: 1, quota, amount: 5 }, Duration::from_secs(5));
            if is_open {
                (0..10).for_each(|_| assert_eq!(used(&owner, 1, quota), 5));
            } else {
                // Whoever puts a counter into a shard closes it, to the quick way.
                let new = |user| owner.engine.counted(user, quota).unwrap();
                (new_users..new_users + 100).for_each(|user| owner.engine.create(&new(user)));
            }
            *clock.engine.lock() = Some(Arc::clone(&owner));
            assert!(ask(&owner, &counted));
            owner.engine.refund(&counted, 5).unwrap();
        }
    }
    assert_eq!(owner.engine.stats().reservations, 0);
}

/// An open that found no room for all rings, or for the journal behind them, kept those that it had
/// made: what had been free before was not any more.
#[test]
fn an_open_that_finds_no_space_leaves_no_rings() {
    let disk = SimDisk::new(1);
    let owner = open(&disk);
    let quota = define(&owner);
    consume(&owner, 1, quota, true).unwrap();
    drop(owner);
    let rings = || disk.file_names().into_iter().filter(|name| name.starts_with("lane-")).count();
    let bytes = |name: &String| disk.file(name).unwrap().len() as u64;
    let (taken, before) = (disk.file_names().iter().map(bytes).sum::<u64>(), rings());
    let mut failures = 0;
    let owner = loop {
        disk.set_capacity(taken + failures * 4096);
        match Owner::open_at_rest(&disk.storage(), small().lanes(8)) {
            Ok(owner) => break owner,
            Err(error) => assert!(error.is_disk_full(), "{error}"),
        }
        assert_eq!(rings(), before, "{failures}");
        failures += 1;
    };
    // Some for want of rings, the others for want of a file of the journal.
    assert!(failures > 16, "{failures}");
    assert_eq!((used(&owner, 1, quota), rings()), (1, 8));
}
