//! What normal ends leave behind, in its rarer forms: an open takes it for what it is, and finds
//! everything. On a simulated disk, without threads but where a test starts one.

use std::io::ErrorKind;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use super::flushers::Step;
use super::order_tests::{START, consume, open, small, used};
use super::*;
use crate::clock::{Clock as _, ManualClock};
use crate::model::{AMOUNT_MAX, Consume, Quota, Timestamp, Window, WindowStart};
use crate::storage::faulty::{self, FaultyDisk};
use crate::storage::sim::{Call, Fault, Outcome, SimDisk};

const MINUTE: Duration = Duration::from_secs(60);

fn define(owner: &Owner) -> QuotaId {
    owner.engine.define(&Quota::new("requests", AMOUNT_MAX)).unwrap()
}

/// A quota that is found by its name, and who defines it, in a thread that waits for the disk.
fn begin_to_define(owner: &Arc<Owner>) -> (JoinHandle<Result<QuotaId>>, QuotaId) {
    let definer = {
        let owner = Arc::clone(owner);
        std::thread::spawn(move || owner.engine.define(&Quota::new("other", 10)))
    };
    loop {
        match owner.engine.quota_by_name("other") {
            Some(quota) => return (definer, quota),
            None => std::thread::yield_now(),
        }
    }
}

/// All answers of the journal were once held at once, though only the newest were to be remembered.
#[test]
fn a_recovery_holds_not_many_more_answers_than_are_remembered() {
    const ANSWERS: u64 = 6000;
    let (disk, max) = (SimDisk::new(1), 100);
    let open = || Owner::open_at_rest(&disk.storage(), small().dedup_max(max)).unwrap();
    let owner = open();
    let quota = define(&owner);
    for id in 1..=ANSWERS {
        let counted = owner.engine.counted(1, quota).unwrap();
        owner.engine.consume_once(u128::from(id), counted, 1, &[]).unwrap();
        if id % 15 == 0 {
            owner.engine.step(Step::Files).unwrap();
            owner.engine.step(Step::Drain).unwrap();
        }
    }
    disk.kill();
    drop(owner);
    let owner = open();
    assert_eq!(used(&owner, 1, quota), ANSWERS);
    // Of those that the recovery still held.
    let stats = owner.engine.stats();
    assert!(stats.answers == max as u64 && stats.answers_forgotten_early < 4300, "{stats:?}");
    let counted = owner.engine.counted(1, quota).unwrap();
    owner.engine.consume_once(u128::from(ANSWERS), counted, 1, &[]).unwrap();
    assert_eq!(used(&owner, 1, quota), ANSWERS);
}

/// How a life ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Kill,
    PowerCut,
    /// What no sync has covered goes to a new file; then a kill.
    FailedSync,
}

/// Batches that no sync has covered may lie in two files. What takes their place then names a batch
/// in the first of the two: the second holds nothing any more. It used to be read as before, so
/// that the next open but one refused, or lost what had been durable.
#[test]
fn a_tail_in_two_files_is_replaced_as_a_whole() {
    const USERS: u64 = 60;
    const ROUNDS: u64 = 300;
    let ends = [End::Kill, End::FailedSync].into_iter().flat_map(|end| [(end, 0), (end, 1)]);
    let cuts = (0..30).map(|seed| (End::PowerCut, seed));
    for (end, seed) in ends.chain(cuts) {
        // With a merge at once, or later.
        let merges_at_once = seed % 2 == 0;
        let disk = SimDisk::new(seed);
        let owner = open(&disk);
        let quota = define(&owner);
        let user = |number: u64| number * 1_000_003;
        for _ in 0..ROUNDS {
            (0..USERS)
                .for_each(|number| assert!(consume(&owner, user(number), quota, false).is_ok()));
            owner.engine.committer.lock_drain().unwrap().append_batch().unwrap();
            owner.engine.step(Step::Files).unwrap();
        }
        match end {
            End::Kill => disk.kill(),
            End::PowerCut => disk.power_cut(),
            End::FailedSync => {
                disk.inject(Fault::new(Call::Sync, 0, Outcome::Eio));
                owner.engine.sync().unwrap();
                if merges_at_once {
                    owner.engine.step(Step::Files).unwrap();
                    owner.engine.snapshot().unwrap();
                }
                disk.kill();
            }
        }
        drop(owner);
        let owner = open(&disk);
        owner.engine.step(Step::Files).unwrap();
        if merges_at_once {
            owner.engine.snapshot().unwrap();
        }
        let counts: Vec<_> = (0..USERS).map(|number| used(&owner, user(number), quota)).collect();
        if end != End::PowerCut {
            assert!(counts.iter().all(|&count| count == ROUNDS), "{end:?}: {counts:?}");
        }
        // So that a batch says that all before it is durable.
        for more in 1..=2 {
            assert_eq!(consume(&owner, user(0), quota, true).unwrap(), counts[0] + more);
        }
        disk.kill();
        drop(owner);
        let owner = open(&disk);
        let again: Vec<_> = (0..USERS).map(|number| used(&owner, user(number), quota)).collect();
        assert_eq!((again[0], &again[1..]), (counts[0] + 2, &counts[1..]), "{end:?} {seed}");
        if end != End::PowerCut {
            assert_eq!(owner.engine.report().findings, [], "{end:?} {seed}");
        }
        // And a merge reads the same.
        owner.engine.snapshot().unwrap();
        disk.kill();
        drop(owner);
        let owner = open(&disk);
        assert_eq!(used(&owner, user(0), quota), counts[0] + 2, "{end:?} {seed}");
    }
}

/// A quota can be used, by its name, while who defines it still waits for the disk.
#[test]
fn a_quota_is_found_by_its_name_once_a_kill_leaves_it_defined() {
    let disk = SimDisk::new(1);
    let owner = Arc::new(open(&disk));
    define(&owner);
    // Whoever waits for the disk waits for this.
    let leading = owner.engine.committer.lead_for_good();
    let (definer, quota) = begin_to_define(&owner);
    assert_eq!(consume(&owner, 1, quota, false).unwrap(), 1);
    let image = disk.snapshot_image();
    drop(leading);
    definer.join().unwrap().unwrap();
    let disk = SimDisk::from_image(&image, 1);
    let owner = open(&disk);
    assert_eq!(used(&owner, 1, quota), 1);
}

/// A definition that found no room is not there, and can be made again once there is some.
#[test]
fn a_quota_whose_definition_found_no_room_is_not_defined() {
    let (disk, faults) = (SimDisk::new(1), FaultyDisk::default());
    let owner = Owner::open_at_rest(&faults.over(disk.storage()), small()).unwrap();
    define(&owner);
    let (call, outcome) = (faulty::Call::Write, faulty::Outcome::Fail(ErrorKind::StorageFull));
    faults.inject(faulty::Fault { call, name: "journal-", outcome, times: usize::MAX });
    let failed = owner.engine.define(&Quota::new("no room", 10));
    assert!(failed.is_err(), "{failed:?}");
    assert_eq!(owner.engine.quota_by_name("no room"), None);
    faults.heal();
    let other = owner.engine.define(&Quota::new("other", 10)).unwrap();
    let again = owner.engine.define(&Quota::new("no room", 10)).unwrap();
    assert_ne!(other, again);
    assert_eq!(consume(&owner, 1, again, false).unwrap(), 1);
    disk.kill();
    drop(owner);
    let owner = open(&disk);
    assert_eq!(owner.engine.quota_by_name("other"), Some(other));
    assert_eq!(owner.engine.quota_by_name("no room"), Some(again));
    assert_eq!(used(&owner, 1, again), 1);
}

/// After a loss of power the ring may still hold what used a quota whose definition is lost.
#[test]
fn what_used_a_quota_that_a_power_cut_took_is_left_out() {
    let mut left_out = 0;
    for seed in 0..60 {
        let disk = SimDisk::new(seed);
        let owner = Arc::new(open(&disk));
        let known = define(&owner);
        consume(&owner, 1, known, true).unwrap();
        let leading = owner.engine.committer.lead_for_good();
        let (definer, quota) = begin_to_define(&owner);
        let items = [known, quota].map(|quota| Consume { user: 1, quota, amount: 1 });
        let _ = owner.engine.try_consume_all(&items).unwrap();
        consume(&owner, 1, quota, false).unwrap();
        disk.power_cut();
        drop(leading);
        let _ = definer.join().unwrap();
        drop(owner);
        let owner = open(&disk);
        let is_defined = owner.engine.quota_by_name("other").is_some();
        let findings = owner.engine.report().findings.len();
        left_out += usize::from(!is_defined && findings > 0);
        assert!((1..=2).contains(&used(&owner, 1, known)), "{seed}");
        if !is_defined {
            assert_eq!(used(&owner, 1, known), 1, "{seed}: an operation is there whole or not");
        }
    }
    assert!(left_out > 0, "no seed has shown it");
}

/// Sums beyond what can be used: in a window that is over nobody asks, and else they are as much as
/// can be.
#[test]
fn a_sum_above_the_bound_is_as_much_as_can_be_used() {
    let disk = SimDisk::new(1);
    let clock = ManualClock::new(Timestamp::from_unix_millis(START));
    let config = || small().clock(Arc::new(clock.clone()));
    let owner = Owner::open_at_rest(&disk.storage(), config()).unwrap();
    let quota = owner.engine.define(&Quota::new("minutes", AMOUNT_MAX).window(Window::Minute));
    let quota = quota.unwrap();
    let lifetime = define(&owner);
    assert_eq!(consume(&owner, 1, quota, false).unwrap(), 1);
    let item = Consume { user: 1, quota, amount: 1 };
    let id = owner.engine.reserve(&[item], 5 * MINUTE).unwrap().unwrap();
    clock.advance(MINUTE);
    // So that no cell knows of the reservation's window.
    assert_eq!(consume(&owner, 1, quota, false).unwrap(), 1);
    let late = owner.engine.commit(id, Charge::Same(AMOUNT_MAX)).unwrap();
    assert!(late.is_allowed());
    // As a loss of power leaves it that takes a refund: here its record is written by hand.
    consume(&owner, 2, lifetime, false).unwrap();
    let key = crate::fold::SumKey { quota: lifetime, window: WindowStart(0), user: 2 };
    let window =
        owner.engine.quota(lifetime).unwrap().window_at(Timestamp::from_unix_millis(START));
    {
        let (_, mut permit) = owner.engine.lanes.acquire(1).unwrap();
        let delta = AMOUNT_MAX.cast_signed();
        let (user, quota) = (key.user, key.quota);
        permit.append(&crate::wal::record::Record { user, quota, window, delta });
    }
    for life in 0..2 {
        disk.kill();
        let owner = Owner::open_at_rest(&disk.storage(), config()).unwrap();
        assert_eq!(used(&owner, 2, lifetime), AMOUNT_MAX, "{life}");
        assert_eq!(owner.engine.report().corrected, u64::from(life == 0), "{life}");
        assert_eq!(used(&owner, 1, quota), 1, "{life}");
        owner.engine.step(Step::Files).unwrap();
        owner.engine.snapshot().unwrap();
    }
}

/// A merge while the clock is far ahead, or was a moment ago, forgets nothing of windows that are
/// current again once it is set right. Once, all quotas went on in a window of that far future.
#[test]
fn a_merge_while_the_clock_is_ahead_forgets_nothing() {
    for ahead in [Duration::from_millis(500), Duration::from_hours(24 * 365)] {
        let disk = SimDisk::new(1);
        let hour_end = START - START % 3_600_000 + 3_600_000;
        let clock = ManualClock::new(Timestamp::from_unix_millis(hour_end - 1));
        let config = || {
            let config = small().closed_window_retention(Duration::ZERO);
            config.clock(Arc::new(clock.clone()))
        };
        let owner = Owner::open_at_rest(&disk.storage(), config()).unwrap();
        let quota = owner.engine.define(&Quota::new("hours", 100).window(Window::Hour)).unwrap();
        owner.engine.consume(&owner.engine.counted(1, quota).unwrap(), 90, true).unwrap();
        let right = clock.now();
        clock.set(right.saturating_add(ahead));
        owner.engine.snapshot().unwrap();
        clock.set(right);
        owner.engine.consume(&owner.engine.counted(2, quota).unwrap(), 80, true).unwrap();
        disk.kill();
        let owner = Owner::open_at_rest(&disk.storage(), config()).unwrap();
        assert_eq!((used(&owner, 1, quota), used(&owner, 2, quota)), (90, 80), "{ahead:?}");
        assert_eq!(owner.engine.report().findings, []);
    }
}

/// The clock was far ahead at an open, and a merge forgot a window that turned out to be the
/// current one: what came after the merge is not all that was used in it, and it is said.
#[test]
fn a_window_that_a_merge_forgot_is_not_opened_again() {
    let disk = SimDisk::new(1);
    let clock = ManualClock::new(Timestamp::from_unix_millis(START));
    let config = || small().clock(Arc::new(clock.clone())).closed_window_retention(MINUTE);
    let open = || Owner::open_at_rest(&disk.storage(), config()).unwrap();
    let owner = open();
    let quota = owner.engine.define(&Quota::new("hours", 100).window(Window::Hour)).unwrap();
    owner.engine.consume(&owner.engine.counted(1, quota).unwrap(), 90, true).unwrap();
    disk.kill();
    clock.set(Timestamp::from_unix_millis(START + 24 * 3_600_000));
    let owner = open();
    owner.engine.snapshot().unwrap();
    clock.set(Timestamp::from_unix_millis(START + 1));
    owner.engine.consume(&owner.engine.counted(1, quota).unwrap(), 5, true).unwrap();
    disk.kill();
    let owner = open();
    let counted = owner.engine.counted(1, quota).unwrap();
    let usage = owner.engine.usage(&counted);
    assert_eq!(usage.used, 0, "it is the window from which on everything is known: {usage:?}");
    let _ = owner.engine.consume(&counted, 1, false).unwrap();
    assert!(owner.engine.quota(quota).unwrap().window_for_new_cell(WindowStart(START)).0 > START);
    let [finding] = &owner.engine.report().findings[..] else { panic!("nothing is said of it") };
    assert!(finding.to_string().contains("the clock was ahead"), "{finding}");
}

/// Lives that each write little: their files do not pile up.
#[test]
fn files_of_short_lives_are_merged() {
    let disk = SimDisk::new(1);
    let config = || small().snapshot_journal_bytes(128 << 10);
    let mut most = 0;
    for life in 1..=20 {
        let owner = Owner::open_at_rest(&disk.storage(), config()).unwrap();
        let quota = define(&owner);
        assert_eq!(consume(&owner, 1, quota, true).unwrap(), life);
        owner.engine.step(Step::Files).unwrap();
        owner.engine.step(Step::Merge).unwrap();
        owner.engine.step(Step::Files).unwrap();
        let names = disk.file_names();
        most = most.max(names.iter().filter(|name| name.starts_with("journal-")).count());
        disk.kill();
    }
    assert!(most < 12, "{most} files");
}

/// The journal may be large, and its files small: each takes a descriptor, of which a process once
/// had too few, and the engine blocked for good.
#[test]
fn small_files_are_merged_by_their_number() {
    let disk = SimDisk::new(1);
    let owner = Owner::open_at_rest(&disk.storage(), small().lane_records(4096)).unwrap();
    let quota = define(&owner);
    let mut most = 0;
    for _ in 0..800 {
        // A file holds two of these.
        for user in 0..4000 {
            consume(&owner, user << 50, quota, false).unwrap();
        }
        owner.engine.sync().unwrap();
        owner.engine.step(Step::Files).unwrap();
        owner.engine.step(Step::Merge).unwrap();
        owner.engine.step(Step::Files).unwrap();
        most = most.max(journal_files(&disk));
    }
    assert!((128..300).contains(&most), "{most} files");
}

/// Nor by lives that are too short for a merge, each with a file of its own.
#[test]
fn small_files_of_short_lives_are_merged_by_their_number() {
    let disk = SimDisk::new(1);
    let mut most = 0;
    for _ in 0..500 {
        drop(Owner::open_at_rest(&disk.storage(), small()).unwrap());
        most = most.max(journal_files(&disk));
        disk.kill();
    }
    assert!((192..400).contains(&most), "{most} files");
}

/// A ring that can't be mapped, for want of memory: each open once left a file of the journal.
#[test]
fn opens_that_can_not_map_the_rings_leave_nothing() {
    let disk = SimDisk::new(1);
    let owner = Owner::open_at_rest(&disk.storage(), small()).unwrap();
    let quota = define(&owner);
    consume(&owner, 1, quota, true).unwrap();
    disk.kill();
    drop(owner);
    let before = disk.file_names();
    for _ in 0..40 {
        // The first is read by the recovery.
        disk.inject(Fault::new(Call::Map, 1, Outcome::Eio));
        Owner::open_at_rest(&disk.storage(), small()).unwrap_err();
        disk.clear_faults();
        disk.kill();
        assert_eq!(disk.file_names(), before);
    }
    // A ring of another size is new.
    for _ in 0..40 {
        disk.inject(Fault::new(Call::Map, 1, Outcome::Eio));
        Owner::open_at_rest(&disk.storage(), small().lane_records(128)).unwrap_err();
        disk.clear_faults();
        disk.kill();
        assert!(disk.file_names().len() <= before.len() + 1, "{:?}", disk.file_names());
    }
    assert_eq!(used(&Owner::open_at_rest(&disk.storage(), small()).unwrap(), 1, quota), 1);
}

fn journal_files(disk: &SimDisk) -> usize {
    disk.file_names().iter().filter(|name| name.starts_with("journal-")).count()
}

/// Nor do those of lives that end before any thread has looked.
#[test]
fn files_of_lives_without_a_thread_are_merged() {
    let config = || small().snapshot_journal_bytes(64 << 10);
    for is_closed in [true, false] {
        let disk = SimDisk::new(1);
        let mut most = 0;
        for life in 1..=60 {
            let owner = Owner::open_at_rest(&disk.storage(), config()).unwrap();
            let quota = define(&owner);
            assert_eq!(consume(&owner, 1, quota, true).unwrap(), life);
            if is_closed {
                owner.close().unwrap();
            }
            let names = disk.file_names();
            most = most.max(names.iter().filter(|name| name.starts_with("journal-")).count());
            disk.kill();
        }
        assert!(most < 24, "{most} files");
    }
}
