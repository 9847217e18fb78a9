//! What panics, what a bound holds up, and what health says of it.

use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::clock::Clock;
use crate::engine::flushers::Reach;
use crate::storage::sim::{self, SimDisk};

/// A panic in the middle of a batch: whoever had the drain next went on with sums that were no
/// longer what the lanes held, and what was acknowledged was lost without a word.
#[test]
fn a_panic_while_a_batch_is_written_ends_durability_at_once() {
    let world = World::new();
    let owner = world.open().unwrap();
    let quota = define(&owner);
    for _ in 0..5 {
        consume(&owner, 1, quota, false).unwrap();
    }
    world.fail(Call::Write, "journal-", Outcome::Panic, 1);
    let engine = Arc::clone(&owner.engine);
    let other = Quota::new("other", 1);
    assert!(std::thread::spawn(move || engine.define(&other).map(drop)).join().is_err());
    let synced = owner.engine.sync();
    assert!(matches!(synced, Err(Error::DurabilityLost { .. })), "{synced:?}");
    owner.close().unwrap_err();
    drop(owner);
    assert_eq!(used(&world.open().unwrap(), 1, quota), 5);
}

/// A request that panics gives its reservation back while it unwinds, and with it waits for the
/// disk. That the thread panics is none of the engine's: it once ended durability for all.
#[test]
fn a_panic_of_the_caller_is_not_the_engines() {
    let world = World::new();
    let owner = world.open_with(small().durable_consumes(true)).unwrap();
    let quota = define(&owner);
    let item = crate::model::Consume { user: 1, quota, amount: 5 };
    let id = owner.engine.reserve(&[item], Duration::from_secs(600)).unwrap().unwrap();
    struct GivesBack(Arc<Engine>, crate::model::ReservationId);
    impl Drop for GivesBack {
        fn drop(&mut self) {
            self.0.cancel(self.1).unwrap();
        }
    }
    let guard = GivesBack(Arc::clone(&owner.engine), id);
    let handler = std::thread::spawn(move || {
        let _guard = guard;
        panic!("a handler");
    });
    assert!(handler.join().is_err());
    assert_eq!(owner.engine.poison.reason(), None);
    assert_eq!(consume(&owner, 1, quota, true).unwrap(), 1);
}

/// With as many bytes unsynced as may be, callers were refused until the next sync was due, on a
/// disk that had nothing to do.
#[test]
fn a_sync_begins_when_as_much_waits_for_it_as_may() {
    let world = World::new();
    let config = small().lane_records(1 << 12).unsynced_bytes_max(1 << 20);
    // Far less than until the next sync.
    let config = config.backpressure_deadline(Duration::from_secs(20)).journal_file_bytes(1 << 20);
    let owner = world.open_with(config).unwrap();
    let quota = define(&owner);
    for user in 0..200_000_u64 {
        consume(&owner, user.wrapping_mul(0x9e37_79b9_7f4a_7c15), quota, false).unwrap();
    }
}

/// What is in the journal was not synced while the journal had no room for more.
#[test]
fn what_is_written_is_made_durable_though_no_more_can_be() {
    let disk = SimDisk::new(1);
    let config = || small().lanes(1).backpressure_deadline(Duration::ZERO);
    let owner = Owner::open_at_rest(&disk.storage(), config()).unwrap();
    let quota = define(&owner);
    disk.inject(sim::Fault::new(sim::Call::Create, 0, sim::Outcome::Enospc));
    let (mut appended, mut users) = (0, 0);
    loop {
        let before = users;
        while users < before + 40 {
            users += 1;
            consume(&owner, users * 1_000_003, quota, false).unwrap();
        }
        if owner.engine.committer.lock_drain().unwrap().append_batch().is_err() {
            break;
        }
        appended = users;
    }
    for nth in 0..3 {
        disk.inject(sim::Fault::new(sim::Call::Create, nth, sim::Outcome::Enospc));
    }
    owner.engine.sync().unwrap_err();
    disk.power_cut_with(&mut |_| 0);
    drop(owner);
    disk.clear_faults();
    let owner = Owner::open_at_rest(&disk.storage(), config()).unwrap();
    let total: u64 = (1..=users).map(|user| used(&owner, user * 1_000_003, quota)).sum();
    assert!(total >= appended, "{total} of {appended}");
}

/// A drain that merely read the lanes took back what a sync had said of the journal.
#[test]
fn a_journal_that_can_not_be_written_is_said_until_it_can() {
    let world = World::new();
    let owner = world.open_with(small().sync_interval(Duration::from_millis(20))).unwrap();
    let quota = define(&owner);
    owner.engine.files.prepare().unwrap();
    owner.engine.sync().unwrap();
    let is_blocked = |health: &Health| {
        health.reasons.iter().any(|reason| matches!(reason, HealthReason::JournalBlocked { .. }))
    };
    world.fail(Call::Write, "journal-", Outcome::Fail(ErrorKind::Other), FOREVER);
    consume(&owner, 1, quota, false).unwrap();
    wait_for_health(&owner, is_blocked);
    for _ in 0..100 {
        std::thread::sleep(Duration::from_millis(1));
        assert!(is_blocked(&owner.engine.health()));
    }
    world.disk.heal();
    wait_for_health(&owner, |health| !is_blocked(health));
}

/// A lane that has skipped to the start of its ring counted as full until the batch was written
/// that says so.
#[test]
fn a_skip_is_no_backlog() {
    let disk = SimDisk::new(1);
    let config = small().lanes(1).lane_records(1 << 16).journal_file_bytes(1 << 20);
    let owner = Owner::open_at_rest(&disk.storage(), config).unwrap();
    let quota = define(&owner);
    for _ in 0..8200 {
        consume(&owner, 1, quota, false).unwrap();
    }
    let append = || owner.engine.committer.lock_drain().unwrap().append_batch();
    append().unwrap();
    consume(&owner, 1, quota, false).unwrap();
    disk.inject(sim::Fault::new(sim::Call::Write, 0, sim::Outcome::Eio));
    append().unwrap_err();
    let percent = |health: &Health| {
        health.reasons.iter().find_map(|reason| match reason {
            HealthReason::Backlog { percent } => Some(*percent),
            _ => None,
        })
    };
    assert_eq!(percent(&owner.engine.health()), None, "one record");
    // What it has room for until then is what was freed at the ring's start.
    let lane = owner.engine.lanes.get(0).unwrap();
    while !lane.lacks_room(1) {
        consume(&owner, 1, quota, false).unwrap();
    }
    assert_eq!(percent(&owner.engine.health()), Some(100));
    append().unwrap();
    assert_eq!(percent(&owner.engine.health()), None);
}

/// A commit prepares the file that it needs, or waits for it: it failed with "disk full", on an
/// empty disk, where callers were not to wait for room.
#[test]
fn a_commit_waits_for_a_file_to_be_prepared() {
    let world = World::new();
    let config = small().lane_records(1 << 16).journal_file_bytes(16 << 20);
    let owner = world.open_with(config.backpressure_deadline(Duration::ZERO)).unwrap();
    let quota = define(&owner);
    for user in 0..40_000 {
        consume(&owner, user * 1_000_003, quota, false).unwrap();
    }
    owner.engine.sync().unwrap();
    owner.close().unwrap();
}

/// It was counted, and the engine closed before it was durable: that is no refusal.
#[test]
fn what_was_counted_is_not_answered_as_closed() {
    let world = World::new();
    let owner = world.open().unwrap();
    let quota = define(&owner);
    owner.engine.files.provide_spare().unwrap();
    consume(&owner, 1, quota, false).unwrap();
    world.fail(Call::Write, "journal-", Outcome::Fail(ErrorKind::Other), FOREVER);
    owner.close().unwrap_err();
    let lane = owner.engine.lanes.iter().position(|lane| lane.tail() > lane.freed()).unwrap();
    let number = owner.engine.lanes.get(lane).unwrap().freed();
    let durable = owner.engine.committer.wait_durable(Target::Record { lane, number });
    assert!(matches!(durable, Err(Error::DurabilityLost { .. })), "{durable:?}");
}

/// Callers are told that the log has no room, and health why: it once said no more than they.
#[test]
fn health_says_why_no_file_can_be_prepared() {
    let world = World::new();
    let owner = world.open_with(hasty()).unwrap();
    let quota = define(&owner);
    world.fail(Call::Create, "journal-", Outcome::Fail(ErrorKind::PermissionDenied), FOREVER);
    let mut user = 0;
    let refused = loop {
        user += 1;
        if let Err(error) = consume(&owner, user * 1_000_003, quota, false) {
            break error;
        }
    };
    assert!(matches!(refused, Error::Backpressure { .. }), "{refused:?}");
    let health = owner.engine.health().to_string();
    assert!(health.contains("the journal has no room: can't create"), "{health}");
    let synced = owner.engine.sync().unwrap_err();
    assert!(!synced.is_disk_full(), "{synced}");
    assert!(synced.to_string().contains("can't create"), "{synced}");
}

/// Each kick of a caller that waits for room was followed at once, on a full disk as fast as that
/// could say so.
#[test]
fn a_file_that_can_not_be_prepared_is_not_tried_at_each_kick() {
    let world = World::new();
    let config = small().backpressure_deadline(Duration::from_millis(500));
    let owner = world.open_with(config).unwrap();
    let quota = define(&owner);
    // At most, with waits of 50, 100 and 200 ms between them: four tries, and one just before.
    world.fail(Call::Create, "journal-", Outcome::Fail(ErrorKind::StorageFull), 50);
    while consume(&owner, 1, quota, false).is_ok() {
        assert!(!world.disk.is_exhausted());
    }
    assert!(!world.disk.is_exhausted());
}

/// Somebody has removed or moved the journal's file, or put another in its place: `_sync` calls
/// went on saying that what they counted was durable.
#[test]
fn a_file_that_is_taken_away_ends_durability() {
    enum Taken {
        Removed,
        Moved,
        Replaced,
    }
    let ways = [Taken::Removed, Taken::Moved, Taken::Replaced].map(|taken| (true, taken));
    for (is_in_use, taken) in ways.into_iter().chain([(false, Taken::Removed)]) {
        let world = World::new();
        let owner = world.open().unwrap();
        let quota = define(&owner);
        owner.engine.files.prepare().unwrap();
        consume(&owner, 1, quota, true).unwrap();
        assert_eq!(owner.engine.files.find_taken_away(), None);
        let paths = std::fs::read_dir(world.dir.path()).unwrap().map(|entry| entry.unwrap().path());
        let is_it = |path: &std::path::PathBuf| {
            path.extension().is_some_and(|kind| kind == "tgj")
                && (std::fs::read(path).unwrap()[32] == 1) == is_in_use
        };
        let path = paths.filter(is_it).max().unwrap();
        let copy = path.with_extension("copy");
        match taken {
            Taken::Removed => std::fs::remove_file(&path).unwrap(),
            Taken::Moved => std::fs::rename(&path, &copy).unwrap(),
            Taken::Replaced => {
                std::fs::copy(&path, &copy).unwrap();
                std::fs::rename(&copy, &path).unwrap();
            }
        }
        let health = wait_for_health(&owner, |health| health.level() == HealthLevel::Failed);
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(health.to_string().contains(name), "{health}");
        let synced = consume(&owner, 1, quota, true);
        assert!(matches!(synced, Err(Error::DurabilityLost { .. })), "{synced:?}");
    }
}

/// Counts how often the monotonic clock was read.
#[derive(Debug)]
struct CountedClock {
    clock: ManualClock,
    looks: AtomicU64,
}

impl Clock for CountedClock {
    fn now(&self) -> Timestamp {
        self.clock.now()
    }

    fn monotonic(&self) -> Duration {
        self.looks.fetch_add(1, Ordering::Relaxed);
        self.clock.monotonic()
    }

    fn attach(&self, listener: Weak<CoarseClock>) {
        self.clock.attach(listener);
    }
}

/// A pause of the machine degraded health until the next start, however long ago it was: nobody saw
/// what came later.
#[test]
fn what_has_passed_degrades_health_for_a_while() {
    const HOUR: Duration = Duration::from_hours(1);
    const MINUTE: Duration = Duration::from_mins(1);
    let disk = SimDisk::new(1);
    let clock = ManualClock::new(Timestamp::from_unix_millis(1_767_225_600_000));
    let config = small().backpressure(Backpressure::AdmitUnlogged).clock(Arc::new(clock.clone()));
    let config = config.backpressure_deadline(Duration::ZERO);
    let owner = Owner::open_at_rest(&disk.storage(), config).unwrap();
    let (engine, quota) = (&owner.engine, define(&owner));
    let count_unlogged = || {
        let before = engine.stats().unlogged;
        while engine.stats().unlogged == before {
            consume(&owner, 1, quota, false).unwrap();
        }
    };
    let rescue = || {
        engine.sync().unwrap();
        consume(&owner, 1, quota, false).unwrap();
        let fault = sim::Fault::new(sim::Call::Sync, 0, sim::Outcome::LoseUnsynced);
        disk.inject(fault.on("journal-"));
        engine.sync().unwrap();
    };
    // What of it health says: unlogged, rescued, jumped.
    let said = || {
        engine.health().reasons.iter().fold([false; 3], |[unlogged, rescued, jumped], reason| {
            [
                unlogged || matches!(reason, HealthReason::Unlogged { .. }),
                rescued || matches!(reason, HealthReason::SyncsRescued { .. }),
                jumped || matches!(reason, HealthReason::ClockJumped { .. }),
            ]
        })
    };
    let clocks = engine.read_clocks();
    assert_eq!(said(), [false; 3]);
    clock.set(Timestamp::from_unix_millis(1_767_225_600_000 + 120_000));
    engine.look_for_jump(clocks);
    count_unlogged();
    rescue();
    assert_eq!(said(), [true; 3]);
    clock.advance(HOUR - MINUTE);
    assert_eq!(said(), [true; 3]);
    count_unlogged();
    // Nobody asks for long: it is known all the same when it was.
    engine.sweep();
    clock.advance(MINUTE);
    assert_eq!(said(), [true, false, true]);
    clock.advance(HOUR - MINUTE);
    assert_eq!(said(), [false, false, true]);
    rescue();
    assert_eq!(said(), [false, true, true]);
    clock.advance(22 * HOUR);
    assert_eq!(said(), [false, false, true]);
    clock.advance(MINUTE);
    assert_eq!(said(), [false; 3]);
    let stats = engine.stats();
    assert!(stats.unlogged >= 2);
    assert_eq!((stats.syncs_rescued, stats.clock_jumps), (2, 1));
}

/// R13: time that passes is no jump, the wall clock alone that goes elsewhere is one.
#[test]
fn a_jump_of_the_clock_is_said() {
    const START: u64 = 1_767_225_600_000;
    let world = World::new();
    let clock = ManualClock::new(Timestamp::from_unix_millis(START));
    let counted = Arc::new(CountedClock { clock: clock.clone(), looks: AtomicU64::new(0) });
    let source = Arc::clone(&counted) as Arc<dyn Clock>;
    let config = small().clock(source).clock_jump_max(Duration::from_secs(60));
    let owner = world.open_with(config).unwrap();
    clock.set(Timestamp::from_unix_millis(START + 59_000));
    let jump = |health: &Health| {
        let mut jumps = health.reasons.iter().filter_map(|reason| match reason {
            HealthReason::ClockJumped { by, backwards } => Some((*by, *backwards)),
            _ => None,
        });
        jumps.next_back()
    };
    // Until the clock's thread has looked at it.
    let looks = counted.looks.load(Ordering::Relaxed);
    while counted.looks.load(Ordering::Relaxed) < looks + 2 {
        std::thread::yield_now();
    }
    assert_eq!(jump(&owner.engine.health()), None, "it is within the bound");
    clock.set(Timestamp::from_unix_millis(START - 120_000));
    let health = wait_for_health(&owner, |health| jump(health).is_some());
    assert_eq!(jump(&health), Some((Duration::from_secs(179), true)));
    assert_eq!(health.level(), HealthLevel::Degraded);
    clock.set(Timestamp::from_unix_millis(START));
    let forwards = Some((Duration::from_secs(120), false));
    wait_for_health(&owner, |health| jump(health) == forwards);
    // However far.
    clock.advance(Duration::MAX);
    clock.set(Timestamp::from_unix_millis(START - 1));
    let is_far = |(by, backwards)| backwards && by > Duration::from_hours(24 * 365);
    wait_for_health(&owner, |health| jump(health).is_some_and(is_far));
}

/// The directory was moved, and a copy put in its place: nobody was told that a restart would go on
/// with the copy.
#[test]
fn a_directory_that_is_moved_or_replaced_is_said_until_it_is_back() {
    let world = World::new();
    let moved = world.dir.path().with_extension("moved");
    let owner = world.open().unwrap();
    let quota = define(&owner);
    let is_moved = |health: &Health| matches!(&health.reasons[..], [HealthReason::DirectoryMoved { dir }] if dir == world.dir.path());
    std::fs::rename(world.dir.path(), &moved).unwrap();
    wait_for_health(&owner, is_moved);
    std::fs::create_dir(world.dir.path()).unwrap();
    owner.engine.look_where_directory_is();
    let health = owner.engine.health();
    assert!(is_moved(&health) && health.level() == HealthLevel::Degraded, "{health}");
    assert!(health.to_string().contains(world.dir.path().to_str().unwrap()), "{health}");
    assert_eq!(consume(&owner, 1, quota, true).unwrap(), 1);
    std::fs::remove_dir(world.dir.path()).unwrap();
    std::fs::rename(&moved, world.dir.path()).unwrap();
    wait_for_health(&owner, Health::is_healthy);
}

/// While a page waited for the disk to be prefaulted, no thread of the process could map memory.
#[test]
fn nothing_is_prefaulted_while_the_disk_does_not_answer() {
    let disk = FaultyDisk::default();
    let storage = disk.over(SimDisk::new(1).storage());
    let owner = Owner::open_at_rest(&storage, small()).unwrap();
    let quota = define(&owner);
    let mut reaches: Vec<_> = owner.engine.lanes.iter().map(|_| Reach::new(u64::MAX)).collect();
    let again = reaches.clone();
    assert!(owner.engine.prefault_ahead(&mut reaches).unwrap() > 0);
    disk.inject(Fault {
        call: Call::Sync,
        name: "journal-",
        outcome: Outcome::Block,
        times: FOREVER,
    });
    std::thread::scope(|scope| {
        let syncing = scope.spawn(|| consume(&owner, 1, quota, true).unwrap());
        while !disk.is_blocking() {
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_millis(60));
        assert_eq!(owner.engine.prefault_ahead(&mut again.clone()).unwrap(), 0);
        disk.heal();
        assert_eq!(syncing.join().unwrap(), 1);
    });
    assert!(owner.engine.prefault_ahead(&mut again.clone()).unwrap() > 0);
}
