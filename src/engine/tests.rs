//! What the engine does when the disk or a thread fails.

mod bounds;
mod clock;
mod fork;
mod room;
pub(super) mod subscriber;
mod trouble;
mod unlogged;

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::clock::ManualClock;
use crate::config::Backpressure;
use crate::health::{Health, HealthLevel, HealthReason};
use crate::model::{Quota, Timestamp};
use crate::storage::RealStorage;
use crate::storage::faulty::{Call, Fault, FaultyDisk, Outcome};

const FOREVER: usize = usize::MAX;

struct World {
    dir: tempfile::TempDir,
    disk: FaultyDisk,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { dir, disk: FaultyDisk::default() }
    }

    fn open(&self) -> Result<Arc<Owner>> {
        self.open_with(small())
    }

    fn open_with(&self, config: Config) -> Result<Arc<Owner>> {
        let storage = self.disk.over(Arc::new(RealStorage::open(self.dir.path())?));
        Owner::open_on(&storage, config).map(Arc::new)
    }

    fn fail(&self, call: Call, name: &'static str, outcome: Outcome, times: usize) {
        self.disk.inject(Fault { call, name, outcome, times });
    }
}

/// Rings of 64 records and journal files of 64 KiB; the background syncs keep out of the way.
fn small() -> Config {
    Config::default()
        .lanes(2)
        .lane_records(64)
        .shards(4)
        .journal_file_bytes(64 << 10)
        .sync_interval(Duration::from_secs(60))
        .backpressure_deadline(Duration::from_secs(20))
}

/// Whoever finds no room is refused soon: for tests about that.
fn hasty() -> Config {
    small().backpressure_deadline(Duration::from_millis(50))
}

fn define(owner: &Owner) -> QuotaId {
    owner.engine.define(&Quota::new("requests", u64::MAX >> 1)).unwrap()
}

fn consume(owner: &Owner, user: u64, quota: QuotaId, is_sync: bool) -> Result<u64> {
    let counted = owner.engine.counted(user, quota)?;
    owner.engine.consume(&counted, 1, is_sync).map(|usage| usage.used)
}

fn used(owner: &Owner, user: u64, quota: QuotaId) -> u64 {
    owner.engine.usage(&owner.engine.counted(user, quota).unwrap()).used
}

/// Appends a batch without a sync, waiting for a file to be prepared where there is none.
fn append_batch(owner: &Owner) {
    let append = || owner.engine.committer.lock_drain().unwrap().append_batch();
    while let Err(error) = append() {
        assert!(error.is_disk_full(), "{error}");
        owner.engine.files.provide_spare().unwrap();
    }
}

/// Looks until health satisfies; a test that never gets there hangs, and says so by that.
fn wait_for_health(owner: &Owner, mut satisfies: impl FnMut(&Health) -> bool) -> Health {
    loop {
        let health = owner.engine.health();
        if satisfies(&health) {
            return health;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// I7: a failed sync is never retried on the same file; what it should have covered is written to
/// another one, and nothing is lost.
#[test]
fn a_failed_sync_is_made_good_in_another_file() {
    let world = World::new();
    let owner = world.open().unwrap();
    let quota = define(&owner);
    consume(&owner, 1, quota, true).unwrap();
    consume(&owner, 1, quota, false).unwrap();
    world.fail(Call::Sync, "journal-", Outcome::Fail(ErrorKind::Other), 1);
    assert_eq!(consume(&owner, 2, quota, true).unwrap(), 1);
    assert!(world.disk.is_exhausted());
    let health = owner.engine.health();
    assert_eq!(health.reasons, [HealthReason::SyncsRescued { syncs: 1 }]);
    consume(&owner, 2, quota, true).unwrap();
    drop(owner);
    let owner = world.open().unwrap();
    assert_eq!((used(&owner, 1, quota), used(&owner, 2, quota)), (2, 2));
    assert!(owner.engine.report().findings.is_empty());
}

/// Many batches behind one failed sync, so many that they need a file of their own size.
#[test]
fn a_rescue_that_is_larger_than_a_prepared_file_finds_room() {
    let world = World::new();
    let owner = world.open().unwrap();
    let quota = define(&owner);
    for round in 0..400 {
        for user in 0..60 {
            consume(&owner, user * 1_000_003, quota, false).unwrap();
        }
        if round % 4 == 0 {
            append_batch(&owner);
        }
    }
    world.fail(Call::Sync, "journal-", Outcome::Fail(ErrorKind::Other), 1);
    owner.engine.sync().unwrap();
    drop(owner);
    let owner = world.open().unwrap();
    assert!((0..60).all(|user| used(&owner, user * 1_000_003, quota) == 400));
}

#[test]
fn when_the_new_file_fails_too_durability_is_lost_for_good() {
    let world = World::new();
    let owner = world.open().unwrap();
    let quota = define(&owner);
    let is_lost_for_want_of_space =
        |error: &Error| matches!(error, Error::DurabilityLost { .. }) && error.is_disk_full();
    world.fail(Call::Sync, "journal-", Outcome::Fail(ErrorKind::StorageFull), FOREVER);
    let failed = consume(&owner, 1, quota, true).unwrap_err();
    assert!(is_lost_for_want_of_space(&failed), "{failed:?}");
    world.disk.heal();
    let still = consume(&owner, 1, quota, true).unwrap_err();
    assert!(is_lost_for_want_of_space(&still), "a healed disk changes nothing: {still:?}");
    let health = owner.engine.health();
    assert_eq!(health.level(), HealthLevel::Failed);
    assert!(health.to_string().starts_with("failed: durability is lost: "), "{health}");
    assert!(owner.close().is_err());
    // It said OK, so that whoever closed once more took all for safe.
    let again = owner.close().unwrap_err();
    assert!(is_lost_for_want_of_space(&again), "{again:?}");
    drop(owner);
    let owner = world.open().unwrap();
    assert_eq!(used(&owner, 1, quota), 2, "the page cache and the rings still had it");
}

/// I6: when the disk is full and the rings are too, callers are told; when there is space again,
/// counting goes on, and nothing that was acknowledged is lost.
#[test]
fn a_full_disk_is_said_and_nothing_is_lost() {
    let world = World::new();
    let owner = world.open_with(small().backpressure_deadline(Duration::from_secs(2))).unwrap();
    let quota = define(&owner);
    world.fail(Call::Create, "journal-", Outcome::Fail(ErrorKind::StorageFull), FOREVER);
    let mut acknowledged = 0;
    let refused = loop {
        match consume(&owner, acknowledged, quota, false) {
            Ok(_) => acknowledged += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, Error::Backpressure { .. }), "{refused}");
    let health = wait_for_health(&owner, |health| {
        health.reasons.iter().any(|reason| matches!(reason, HealthReason::JournalBlocked { .. }))
    });
    assert_eq!(health.level(), HealthLevel::Degraded);
    let synced = owner.engine.sync();
    assert!(matches!(&synced, Err(error) if error.is_disk_full()), "{synced:?}");
    world.disk.heal();
    wait_for_health(&owner, Health::is_healthy);
    for user in 0..1_000 {
        consume(&owner, user, quota, false).unwrap();
    }
    drop(owner);
    let owner = world.open().unwrap();
    let total: u64 = (0..acknowledged.max(1_000)).map(|user| used(&owner, user, quota)).sum();
    assert_eq!(total, acknowledged + 1_000);
}

#[test]
fn a_disk_that_is_full_at_open_is_said_and_opens_later() {
    for (call, name) in
        [(Call::Allocate, "lane-"), (Call::Create, "journal-"), (Call::Write, "tollgate")]
    {
        let world = World::new();
        world.fail(call, name, Outcome::Fail(ErrorKind::StorageFull), 1);
        let error = world.open().unwrap_err();
        assert!(error.is_disk_full(), "{error}");
        let owner = world.open().unwrap();
        let quota = define(&owner);
        consume(&owner, 1, quota, true).unwrap();
        drop(owner);
        assert_eq!(used(&world.open().unwrap(), 1, quota), 1);
    }
}

#[test]
fn what_is_admitted_unlogged_is_counted_and_shown() {
    let world = World::new();
    let config =
        small().backpressure(Backpressure::AdmitUnlogged).backpressure_deadline(Duration::ZERO);
    let owner = world.open_with(config).unwrap();
    let quota = define(&owner);
    world.fail(Call::Create, "journal-", Outcome::Fail(ErrorKind::StorageFull), FOREVER);
    while owner.engine.stats().unlogged < 10 {
        consume(&owner, 1, quota, false).unwrap();
    }
    let synced = consume(&owner, 1, quota, true);
    assert!(matches!(synced, Err(Error::NotLogged)), "{synced:?}");
    let stats = owner.engine.stats();
    assert_eq!(stats.total + stats.unlogged, used(&owner, 1, quota));
    let health = owner.engine.health();
    let unlogged = HealthReason::Unlogged { operations: stats.unlogged };
    assert!(health.reasons.contains(&unlogged), "{health:?}");
    world.disk.heal();
    drop(owner);
    let owner = world.open().unwrap();
    assert_eq!(used(&owner, 1, quota), stats.total, "what was logged is there, and no more");
}

/// Also where the configuration asks for the disk, and not the call.
#[test]
fn a_durable_consume_that_is_in_no_log_is_told_so() {
    let world = World::new();
    let config = small().backpressure(Backpressure::AdmitUnlogged).durable_consumes(true);
    let owner = world.open_with(config.backpressure_deadline(Duration::ZERO)).unwrap();
    let quota = define(&owner);
    world.fail(Call::Create, "journal-", Outcome::Fail(ErrorKind::StorageFull), FOREVER);
    let unlogged = loop {
        let consumed = consume(&owner, 1, quota, false);
        if owner.engine.stats().unlogged > 0 {
            break consumed;
        }
    };
    assert!(matches!(unlogged, Err(Error::NotLogged)), "{unlogged:?}");
}

#[test]
fn a_flusher_that_panics_shows_in_health_and_hangs_nobody() {
    let world = World::new();
    let owner = world.open_with(hasty()).unwrap();
    let quota = define(&owner);
    world.fail(Call::Write, "journal-", Outcome::Panic, FOREVER);
    // The drainer writes a batch once a ring is a quarter full.
    let refused = loop {
        if let Err(error) = consume(&owner, 1, quota, false) {
            break error;
        }
    };
    assert!(matches!(refused, Error::Backpressure { .. }), "{refused}");
    let health = wait_for_health(&owner, |health| health.level() == HealthLevel::Failed);
    assert!(health.reasons[0].to_string().contains("panicked"), "{health:?}");
    let synced = consume(&owner, 1, quota, true);
    assert!(synced.is_err());
    assert!(owner.engine.sync().is_err());
    world.disk.heal();
    assert!(owner.close().is_err());
}

/// A caller that leads a commit may meet the panic itself: the engine is poisoned all the same.
#[test]
fn a_commit_that_panics_poisons() {
    let world = World::new();
    let owner = world.open().unwrap();
    let quota = define(&owner);
    world.fail(Call::Sync, "journal-", Outcome::Panic, 1);
    let caller = Arc::clone(&owner);
    let result = std::thread::spawn(move || consume(&caller, 1, quota, true)).join();
    assert!(result.is_err());
    assert!(matches!(consume(&owner, 2, quota, true), Err(Error::DurabilityLost { .. })));
    assert_eq!(owner.engine.health().level(), HealthLevel::Failed);
}

#[test]
fn a_flusher_that_stalls_shows_in_health_until_it_goes_on() {
    let world = World::new();
    let owner = world.open_with(hasty()).unwrap();
    let quota = define(&owner);
    world.fail(Call::Write, "journal-", Outcome::Block, FOREVER);
    while consume(&owner, 1, quota, false).is_ok() {}
    wait_for_health(&owner, |health| {
        health
            .reasons
            .iter()
            .any(|reason| matches!(reason, HealthReason::Stalled { thread: "tollgate-drain", .. }))
    });
    world.disk.heal();
    wait_for_health(&owner, Health::is_healthy);
    consume(&owner, 1, quota, true).unwrap();
}

/// A clock that panics, or blocks, under the thread that advances the engine's.
#[derive(Debug, Default)]
struct FaultyClock {
    outcome: Mutex<Option<Outcome>>,
    healed: Condvar,
}

impl crate::clock::Clock for FaultyClock {
    fn now(&self) -> Timestamp {
        if std::thread::current().name() == Some("tollgate-clock") {
            let mut outcome = self.outcome.lock();
            while let Some(Outcome::Block) = *outcome {
                self.healed.wait(&mut outcome);
            }
            assert_eq!(*outcome, None, "injected");
        }
        crate::clock::SystemClock.now()
    }

    fn monotonic(&self) -> Duration {
        crate::clock::SystemClock.monotonic()
    }
}

/// What each flusher asks of the disk, and what a stall of it is called.
const FLUSHERS: [(&str, Option<(Call, &str)>); 5] = [
    ("tollgate-clock", None),
    ("tollgate-drain", Some((Call::Write, "journal-"))),
    ("tollgate-sync", Some((Call::Sync, "journal-"))),
    ("tollgate-files", Some((Call::Create, "journal-"))),
    ("tollgate-merge", Some((Call::Create, "snapshot-"))),
];

/// Counts, with one flusher in trouble, until health satisfies; then without, until all is well or
/// for ever lost.
fn trouble_each_flusher(outcome: Outcome, satisfies: impl Fn(&Health, &str) -> bool) {
    for (thread, call) in FLUSHERS {
        let world = World::new();
        let clock = Arc::new(FaultyClock::default());
        // The sync thread meets its fault first only where the drainer has nothing to write.
        let interval = if thread == "tollgate-sync" { 5 } else { 60_000 };
        let config = small()
            .sync_interval(Duration::from_millis(interval))
            .snapshot_journal_bytes(64 << 10)
            .backpressure_deadline(Duration::ZERO)
            .clock(Arc::clone(&clock) as Arc<dyn crate::clock::Clock>);
        let owner = world.open_with(config).unwrap();
        let quota = define(&owner);
        match call {
            Some((call, name)) => world.fail(call, name, outcome, FOREVER),
            None => *clock.outcome.lock() = Some(outcome),
        }
        let mut counted = 0;
        wait_for_health(&owner, |health| {
            for user in 0..32 {
                counted += consume(&owner, user * 1_000_003, quota, false).map_or(0, |_| 1);
            }
            satisfies(health, thread)
        });
        world.disk.heal();
        *clock.outcome.lock() = None;
        clock.healed.notify_all();
        if outcome == Outcome::Block {
            wait_for_health(&owner, Health::is_healthy);
        } else {
            assert!(owner.close().is_err(), "{thread}");
        }
        drop(owner);
        let owner = world.open().unwrap();
        let total: u64 = (0..32).map(|user| used(&owner, user * 1_000_003, quota)).sum();
        assert_eq!(total, counted, "{thread}");
    }
}

#[test]
fn each_flusher_that_panics_shows_in_health_for_good() {
    trouble_each_flusher(Outcome::Panic, |health, _| {
        health.level() == HealthLevel::Failed && health.reasons[0].to_string().contains("panicked")
    });
}

#[test]
fn each_flusher_that_stalls_shows_in_health_until_it_goes_on() {
    trouble_each_flusher(Outcome::Block, |health, name| {
        health
            .reasons
            .iter()
            .any(|reason| matches!(reason, HealthReason::Stalled { thread, .. } if *thread == name))
    });
}

/// Whoever waits for the disk stalls the sync: health says how old the last one is, whatever the
/// thread does.
#[test]
fn a_sync_that_hangs_is_late() {
    let world = World::new();
    let owner = world.open_with(small().sync_interval(Duration::from_millis(100))).unwrap();
    let quota = define(&owner);
    world.fail(Call::Sync, "journal-", Outcome::Block, FOREVER);
    consume(&owner, 1, quota, false).unwrap();
    let health = wait_for_health(&owner, |health| {
        health.reasons.iter().any(|reason| matches!(reason, HealthReason::SyncLate { .. }))
    });
    assert_eq!(health.level(), HealthLevel::Degraded);
    world.disk.heal();
    wait_for_health(&owner, Health::is_healthy);
    assert_eq!(consume(&owner, 1, quota, true).unwrap(), 2);
}

/// Waiters share commits: those that came while one was under way need one more together.
#[test]
fn callers_that_wait_share_one_sync() {
    const THREADS: u64 = 8;
    let world = World::new();
    let owner = world.open().unwrap();
    let quota = define(&owner);
    let before = owner.engine.stats();
    let leading = owner.engine.committer.lead_for_good();
    std::thread::scope(|scope| {
        for user in 0..THREADS {
            let owner = &owner;
            scope.spawn(move || consume(owner, user, quota, true).unwrap());
        }
        while owner.engine.stats().total < before.total + THREADS {
            std::thread::yield_now();
        }
        drop(leading);
    });
    let syncs = owner.engine.stats().syncs - before.syncs;
    assert!(syncs <= 2, "{syncs} syncs for {THREADS} calls");
    let drain = owner.engine.committer.lock_drain().unwrap();
    assert_eq!(drain.durable(), drain.head());
}

/// Lanes skip to the start of their rings while they are in use, and after a crash recovery follows
/// them there. The crash: the files as they are at an instant.
#[test]
fn records_behind_a_skip_are_recovered() {
    let world = World::new();
    let owner = world.open().unwrap();
    let quota = define(&owner);
    for round in 0..50 {
        for _ in 0..20 {
            consume(&owner, 1, quota, false).unwrap();
        }
        let mut drain = owner.engine.committer.lock_drain().unwrap();
        if round % 3 == 0 {
            drain.append_batch().unwrap();
        }
        let copy = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(world.dir.path()).unwrap() {
            let entry = entry.unwrap();
            if entry.file_name() != "tollgate.lock" && !entry.path().ends_with(".tmp") {
                let _ = std::fs::copy(entry.path(), copy.path().join(entry.file_name()));
            }
        }
        drop(drain);
        let storage: Arc<dyn Storage> = Arc::new(RealStorage::open(copy.path()).unwrap());
        let recovered = Owner::open_on(&storage, small()).unwrap();
        assert_eq!(used(&recovered, 1, quota), (round + 1) * 20, "round {round}");
    }
}

/// A copy of a directory may have holes where zeros were (`cp --sparse=always`). A store into one,
/// on a disk that was full by then, once killed the process.
#[test]
fn what_was_copied_with_holes_is_allocated() {
    use std::os::unix::fs::MetadataExt;

    let world = World::new();
    // An open faults a smaller ring in as a whole.
    let large = small().lane_records(1 << 17);
    let open = || {
        let owner = world.open_with(large.clone()).unwrap();
        owner.engine.files.prepare().unwrap();
        owner
    };
    drop(open());
    let files = || {
        let entries = std::fs::read_dir(world.dir.path()).unwrap();
        let paths = entries.map(|entry| entry.unwrap().path());
        let is_allocated = |path: &std::path::PathBuf| {
            path.extension().is_some_and(|kind| kind == "tgr" || kind == "tgj")
        };
        paths.filter(is_allocated).collect::<Vec<_>>()
    };
    let has_holes = |path: &std::path::PathBuf| {
        let found = std::fs::metadata(path).unwrap();
        found.blocks() * 512 < found.len()
    };
    assert!(!files().iter().any(has_holes));
    for path in files() {
        let bytes = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(bytes.len() as u64).unwrap();
        for (page, bytes) in (0..).zip(bytes.chunks(4096)) {
            if bytes.iter().any(|&byte| byte != 0) {
                std::os::unix::fs::FileExt::write_all_at(&file, bytes, page * 4096).unwrap();
            }
        }
    }
    let with_holes: Vec<_> = files().into_iter().filter(has_holes).collect();
    assert!(with_holes.iter().any(|path| path.to_string_lossy().contains("lane-")));
    drop(open());
    for path in with_holes.iter().filter(|path| path.exists()) {
        let is_in_use = path.extension().is_some_and(|kind| kind == "tgj")
            && std::fs::read(path).unwrap()[32] == 1;
        assert!(is_in_use || !has_holes(path), "{}", path.display());
    }
}

/// One rotten snapshot costs nothing: the one before it and the journal since make up for it, and
/// the rotten one is not tried again.
#[test]
fn a_rotten_snapshot_is_made_up_for() {
    let world = World::new();
    let owner = world.open().unwrap();
    let quota = define(&owner);
    for _ in 0..3 {
        for user in 0..20 {
            consume(&owner, user, quota, false).unwrap();
        }
        owner.engine.snapshot().unwrap();
    }
    consume(&owner, 1, quota, true).unwrap();
    drop(owner);
    let snapshots = || {
        let mut paths: Vec<_> = std::fs::read_dir(world.dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "tgs"))
            .collect();
        paths.sort();
        paths
    };
    let kept = snapshots();
    assert_eq!(kept.len(), 2, "{kept:?}");
    let newest = kept.last().unwrap();
    let mut bytes = std::fs::read(newest).unwrap();
    let middle = bytes.len() - 10;
    bytes[middle] ^= 1;
    std::fs::write(newest, bytes).unwrap();
    let owner = world.open().unwrap();
    assert_eq!(owner.engine.report().findings.len(), 1);
    assert_eq!(used(&owner, 1, quota), 4);
    assert!((2..20).all(|user| used(&owner, user, quota) == 3));
    assert_eq!(snapshots(), kept[..1]);
    drop(owner);
    // All rotten, but the journal's first file is still there: the same.
    for path in snapshots() {
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[600] ^= 1;
        std::fs::write(&path, bytes).unwrap();
    }
    let owner = world.open().unwrap();
    assert_eq!(used(&owner, 1, quota), 4);
    drop(owner);
    // With a gap in the journal nothing makes up for them: refused, naming it, nothing changed.
    let owner = world.open().unwrap();
    owner.engine.snapshot().unwrap();
    drop(owner);
    let journal = world.dir.path().join("journal-00000000000000000001.tgj");
    std::fs::remove_file(journal).unwrap();
    for path in snapshots() {
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[600] ^= 1;
        std::fs::write(&path, bytes).unwrap();
    }
    let names = || {
        let entries = std::fs::read_dir(world.dir.path()).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let before = names();
    assert!(matches!(world.open(), Err(Error::Damaged { .. })));
    assert_eq!(names(), before);
}
