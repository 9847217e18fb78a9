//! What must come before what, and what must be looked at first: each seen at the one moment that
//! shows it. On a simulated disk, without threads but where a test starts one.
//!
//! `.ci/mutants` takes these steps away one at a time.

use std::sync::Arc;
use std::time::Duration;

use super::flushers::Step;
use super::*;
use crate::admission::table::Key;
use crate::clock::{Clock, ManualClock};
use crate::flush::commit::Target;
use crate::health::HealthLevel;
use crate::identity::{self, Identity};
use crate::journal::batch::{BATCH_ALIGN, BatchHeader};
use crate::model::{Consume, Quota, Timestamp, Window};
use crate::storage::faulty::{self, FaultyDisk};
use crate::storage::sim::{Call, Fault, Outcome, SimDisk, Undecided};
use crate::wal::lanes::prefer;
use crate::wal::record::SLOT_BYTES;
use crate::wal::region::SLOTS_AT;

pub(super) const START: u64 = 1_767_225_600_000;
const MINUTE: u64 = 60_000;

/// One ring of 64 records.
pub(super) fn small() -> Config {
    Config::default()
        .lanes(1)
        .lane_records(64)
        .shards(2)
        .journal_file_bytes(64 << 10)
        .sync_interval(Duration::from_secs(60))
        .backpressure_deadline(Duration::ZERO)
}

fn clock() -> ManualClock {
    ManualClock::new(Timestamp::from_unix_millis(START))
}

pub(super) fn open(disk: &Arc<SimDisk>) -> Owner {
    Owner::open_at_rest(&disk.storage(), small()).unwrap()
}

pub(super) fn define(owner: &Owner) -> QuotaId {
    owner.engine.define(&Quota::new("requests", 1 << 40)).unwrap()
}

pub(super) fn consume(owner: &Owner, user: u64, quota: QuotaId, is_sync: bool) -> Result<u64> {
    let counted = owner.engine.counted(user, quota)?;
    owner.engine.consume(&counted, 1, is_sync).map(|usage| usage.used)
}

pub(super) fn used(owner: &Owner, user: u64, quota: QuotaId) -> u64 {
    owner.engine.usage(&owner.engine.counted(user, quota).unwrap()).used
}

/// A batch that the disk did not take leaves its records where they are: in the ring, which then
/// has no more room than before.
#[test]
fn records_stay_in_the_ring_until_their_batch_is_written() {
    let disk = SimDisk::new(1);
    let owner = open(&disk);
    let quota = define(&owner);
    // So many that a batch goes out, and so few that the lane does not skip.
    for _ in 0..20 {
        consume(&owner, 1, quota, false).unwrap();
    }
    disk.inject(Fault::new(Call::Write, 0, Outcome::Eio));
    assert!(owner.engine.step(Step::Drain).is_err());
    let more = (0..).take_while(|_| consume(&owner, 1, quota, false).is_ok()).count();
    assert_eq!(more, 44);
    assert_eq!(used(&owner, 1, quota), 64, "what found no room is not counted");
    disk.kill();
    drop(owner);
    let owner = open(&disk);
    assert_eq!(used(&owner, 1, quota), 64);
}

/// What is appended while a batch is being written stays in the ring: only what the batch holds
/// makes room.
#[test]
fn a_batch_frees_no_more_than_it_holds() {
    let (disk, faults) = (SimDisk::new(1), FaultyDisk::default());
    let owner = Owner::open_at_rest(&faults.over(disk.storage()), small()).unwrap();
    let quota = define(&owner);
    let fill = || (0..).take_while(|_| consume(&owner, 1, quota, false).is_ok()).count();
    for _ in 0..20 {
        consume(&owner, 1, quota, false).unwrap();
    }
    let (call, outcome) = (faulty::Call::Write, faulty::Outcome::Block);
    faults.inject(faulty::Fault { call, name: "journal-", outcome, times: usize::MAX });
    std::thread::scope(|scope| {
        let batch = scope.spawn(|| owner.engine.step(Step::Drain));
        while !faults.is_blocking() {
            std::thread::yield_now();
        }
        assert_eq!(fill(), 44);
        faults.heal();
        batch.join().unwrap().unwrap();
    });
    assert_eq!(fill(), 20);
    disk.kill();
    drop(owner);
    assert_eq!(used(&open(&disk), 1, quota), 84);
}

/// A batch that says too early that those before it are durable turns a loss of power, which may
/// take them, into damage.
#[test]
fn a_batch_says_what_is_durable_and_no_more() {
    let disk = SimDisk::new(1);
    let owner = open(&disk);
    let quota = define(&owner);
    let durable = owner.engine.committer.durable_batch();
    for _ in 0..3 {
        consume(&owner, 1, quota, false).unwrap();
        owner.engine.committer.lock_drain().unwrap().append_batch().unwrap();
    }
    let names = disk.file_names().into_iter().filter(|name| name.ends_with(".tgj"));
    let headers = names.flat_map(|name| {
        let file = disk.file(&name).unwrap();
        let heads = (0..file.len()).step_by(BATCH_ALIGN).filter_map(|at| file[at..].first_chunk());
        let decode = |head| BatchHeader::decode(owner.engine.id, head).ok();
        heads.filter_map(decode).collect::<Vec<_>>()
    });
    let last = headers.max_by_key(|header| header.number).unwrap();
    assert!(last.number.0 > durable.0 + 2, "{last:?}");
    assert_eq!(last.durable, durable);
}

/// A counter that was counted in the window before meets a caller who knows the new one already:
/// the fast path leaves it to the slow one.
#[test]
fn a_counter_of_the_window_before_begins_anew() {
    let (disk, clock) = (SimDisk::new(1), clock());
    let config = small().clock(Arc::new(clock.clone()));
    let owner = Owner::open_at_rest(&disk.storage(), config).unwrap();
    let quota = Quota::new("requests", 1 << 40).window(Window::Every(Duration::from_secs(60)));
    let quota = owner.engine.define(&quota).unwrap();
    for user in [1, 2] {
        assert_eq!(consume(&owner, user, quota, false).unwrap(), 1);
        assert_eq!(consume(&owner, user, quota, false).unwrap(), 2);
    }
    clock.advance(Duration::from_secs(60));
    owner.engine.clock.refresh();
    for user in [1, 2] {
        assert_eq!(consume(&owner, user, quota, false).unwrap(), 1, "user {user}");
    }
}

/// A snapshot rots, and the one before it makes up for it with the journal since: which is kept,
/// however often its files are reused, while the engine runs and by the next open.
#[test]
fn the_journal_is_kept_back_to_the_older_snapshot() {
    let disk = SimDisk::new(1);
    const ROUND: u64 = 1000;
    // More than a file of the journal.
    let fill = |owner: &Owner, quota| {
        for _ in 0..ROUND {
            owner.engine.step(Step::Files).unwrap();
            consume(owner, 1, quota, true).unwrap();
        }
    };
    let mut exact = 0;
    for _ in 0..2 {
        let owner = open(&disk);
        let quota = define(&owner);
        for _ in 0..3 {
            fill(&owner, quota);
            owner.engine.snapshot().unwrap();
        }
        fill(&owner, quota);
        exact += 4 * ROUND;
        disk.kill();
        drop(owner);
        let image = disk.snapshot_image();
        for is_reopened in [false, true] {
            let rotten = SimDisk::from_image(&image, 2);
            let mut found = exact;
            if is_reopened {
                let owner = open(&rotten);
                fill(&owner, quota);
                fill(&owner, quota);
                found += 2 * ROUND;
                rotten.kill();
            }
            let names = rotten.file_names().into_iter();
            let newest = names.filter(|name| name.ends_with(".tgs")).max().unwrap();
            let middle = rotten.file(&newest).unwrap().len() as u64 - 10;
            rotten.corrupt(&newest, middle, 1).unwrap();
            let owner = open(&rotten);
            assert_eq!(owner.engine.report().findings.len(), 1, "{is_reopened}");
            assert_eq!(used(&owner, 1, quota), found, "{is_reopened}");
        }
    }
}

/// A lane has skipped to the start of its ring, and the batch that says so could not be written:
/// the record that says it too leads to what lies behind.
#[test]
fn what_lies_behind_a_skip_is_found_without_its_batch() {
    let disk = SimDisk::new(1);
    let owner = open(&disk);
    let quota = define(&owner);
    let some = |count| (0..count).for_each(|_| assert!(consume(&owner, 1, quota, false).is_ok()));
    some(20);
    owner.engine.step(Step::Drain).unwrap();
    some(20);
    disk.inject(Fault::new(Call::Write, 0, Outcome::Eio));
    assert!(owner.engine.step(Step::Drain).is_err());
    assert_eq!(owner.engine.lanes.get(0).unwrap().tail(), 64, "it has skipped");
    some(5);
    disk.kill();
    drop(owner);
    assert_eq!(used(&open(&disk), 1, quota), 45);
}

/// A lane that is about to be drained for the first time stays where it is: at its start nothing is
/// free yet, and callers would wait for the batch. It used to skip at once.
#[test]
fn a_lane_skips_only_where_there_is_room() {
    let disk = SimDisk::new(1);
    let owner = open(&disk);
    let quota = define(&owner);
    let lane = owner.engine.lanes.get(0).unwrap();
    let some = |count| (0..count).for_each(|_| assert!(consume(&owner, 1, quota, false).is_ok()));
    some(40);
    owner.engine.step(Step::Drain).unwrap();
    assert_eq!((lane.tail(), lane.freed()), (40, 40));
    some(18);
    disk.inject(Fault::new(Call::Write, 0, Outcome::Eio));
    assert!(owner.engine.step(Step::Drain).is_err());
    assert_eq!((lane.tail(), lane.freed()), (64, 40));
    // While its batch is not written there is as much room as was drained before.
    some(40);
    assert!(consume(&owner, 1, quota, false).is_err());
    owner.engine.step(Step::Drain).unwrap();
    assert_eq!(used(&owner, 1, quota), 98);
}

/// With as many bytes waiting for a sync as may, the sync used to refuse to write more before it
/// began, and so never began again.
#[test]
fn a_sync_makes_room_for_batches_that_had_none() {
    let disk = SimDisk::new(1);
    let config = small().unsynced_bytes_max(1 << 20);
    let owner = Owner::open_at_rest(&disk.storage(), config).unwrap();
    let quota = define(&owner);
    let mut user = 0_u64;
    let is_full = |result: Result<u64>| match result {
        Ok(_) => false,
        Err(Error::Backpressure { .. }) => true,
        Err(error) => panic!("{error}"),
    };
    while !is_full(consume(&owner, user.rotate_left(48), quota, false)) {
        user += 1;
        if user.is_multiple_of(32) {
            owner.engine.step(Step::Files).unwrap();
            let drained = owner.engine.step(Step::Drain);
            assert!(matches!(drained, Ok(()) | Err(Error::TooMany { .. })), "{drained:?}");
        }
    }
    consume(&owner, 0, quota, false).unwrap_err();
    owner.engine.step(Step::Sync).unwrap();
    assert_eq!(consume(&owner, 0, quota, true).unwrap(), 2);
    disk.power_cut();
    drop(owner);
    let owner = open(&disk);
    assert!((1..user).all(|user| used(&owner, user.rotate_left(48), quota) == 1));
}

/// A lane that is filled as fast as it is read leaves room in batches for the others.
#[test]
fn each_lane_is_read_first_in_turn() {
    let disk = SimDisk::new(1);
    let owner = Owner::open_at_rest(&disk.storage(), small().lanes(2)).unwrap();
    let quota = define(&owner);
    let in_lane = |lane, count| {
        prefer(lane);
        (0..count).for_each(|_| assert!(consume(&owner, 1, quota, false).is_ok()));
    };
    owner.engine.committer.lock_drain().unwrap().bound_records(16);
    in_lane(1, 10);
    for _ in 0..2 {
        in_lane(0, 20);
        owner.engine.committer.lock_drain().unwrap().append_batch().unwrap();
    }
    let lane = owner.engine.lanes.get(1).unwrap();
    assert_eq!((lane.tail(), lane.freed()), (10, 10));
}

/// A batch that is appended while a sync is under way is not covered by it.
#[test]
fn what_is_appended_during_a_sync_waits_for_the_next() {
    let (disk, faults) = (SimDisk::new(1), FaultyDisk::default());
    let storage = faults.over(disk.storage());
    let owner = Owner::open_at_rest(&storage, small()).unwrap();
    let quota = define(&owner);
    let sync = |outcome, times| {
        let call = faulty::Call::Sync;
        faults.inject(faulty::Fault { call, name: "journal-", outcome, times });
    };
    sync(faulty::Outcome::Block, usize::MAX);
    let batches = owner.engine.stats().batches;
    let target = std::thread::scope(|scope| {
        let first = scope.spawn(|| consume(&owner, 1, quota, true));
        while owner.engine.stats().batches == batches {
            std::thread::yield_now();
        }
        consume(&owner, 2, quota, false).unwrap();
        let tail = owner.engine.lanes.get(0).unwrap().tail();
        owner.engine.committer.lock_drain().unwrap().append_batch().unwrap();
        faults.heal();
        first.join().unwrap().unwrap();
        Target::Record { lane: 0, number: tail - 1 }
    });
    sync(faulty::Outcome::Fail(std::io::ErrorKind::Other), usize::MAX);
    assert!(matches!(
        owner.engine.committer.wait_durable(target),
        Err(Error::DurabilityLost { .. })
    ));
}

/// Ends a recovery with `config` at each of its calls by a loss of power, in ways that show what
/// was written too early: what a sync had covered before must be there.
fn lose_power_in_recovery(config: impl Fn() -> Config) {
    const USERS: u64 = 60;
    let disk = SimDisk::new(1);
    let owner = open(&disk);
    let quota = define(&owner);
    for user in 0..USERS {
        consume(&owner, user << 50, quota, user == USERS - 1).unwrap();
    }
    // With a file at hand recovery creates none, and so syncs no names on its behalf.
    owner.engine.step(Step::Files).unwrap();
    disk.kill();
    drop(owner);
    let image = disk.snapshot_image();
    for nth in 0.. {
        let ended = SimDisk::from_image(&image, nth);
        ended.crash_at(nth);
        let is_complete = Owner::open_at_rest(&ended.storage(), config()).is_ok_and(|owner| {
            let is_alive = !ended.has_crashed();
            ended.kill();
            drop(owner);
            is_alive
        });
        ended.kill();
        let image = ended.snapshot_image();
        // Of each file the first sectors persist, so many, or all but those.
        let cuts = (0..6).flat_map(|first| [(first, true), (first, false)]);
        for (cut, names_persist) in cuts.flat_map(|cut| [(cut, true), (cut, false)]) {
            let (first, sectors_persist) = cut;
            let context = format!("ended at call {nth}, cut {cut:?}, names {names_persist}");
            let disk = SimDisk::from_image(&image, 1);
            disk.power_cut_with(&mut |choice| {
                let persists = match choice.what {
                    Undecided::Sector { index, .. } => (index < first) == sectors_persist,
                    Undecided::Length { .. } => true,
                    Undecided::Names | Undecided::Name { .. } => names_persist,
                };
                if persists { choice.newest } else { 0 }
            });
            let owner = Owner::open_at_rest(&disk.storage(), config());
            let owner = owner.unwrap_or_else(|error| panic!("{context}: {error}"));
            let found: Vec<_> = (0..USERS).map(|user| used(&owner, user << 50, quota)).collect();
            assert!(found.iter().all(|&used| used == 1), "{context}: {found:?}");
        }
        if is_complete {
            assert!(nth > 10, "{nth} calls");
            break;
        }
    }
}

/// No mark in the journal says yet what was synced, so recovery writes it again. The new file's
/// header counts only when its batches are there, also where they are longer than the sector that
/// they share with it.
#[test]
fn a_recovery_that_loses_power_keeps_what_was_synced() {
    lose_power_in_recovery(small);
}

/// The rings that a batch names are there when it is.
#[test]
fn a_recovery_to_new_rings_that_loses_power_keeps_what_was_synced() {
    lose_power_in_recovery(|| small().lane_records(128));
}

/// A loss of power leaves records in a ring that were never durable, and numbers that the next
/// generation uses: they do not count as its records.
#[test]
fn what_a_generation_left_in_a_ring_never_counts_in_the_next() {
    let disk = SimDisk::new(1);
    let owner = open(&disk);
    let quota = define(&owner);
    let some = |owner: &Owner, count| {
        (0..count).for_each(|_| assert!(consume(owner, 1, quota, false).is_ok()));
    };
    some(&owner, 20);
    owner.engine.sync().unwrap();
    some(&owner, 20);
    owner.engine.step(Step::Drain).unwrap();
    assert_eq!(owner.engine.lanes.get(0).unwrap().tail(), 64, "it has skipped");
    some(&owner, 5);
    // Only those five persist.
    let slots = SLOTS_AT * 8 / 512;
    disk.power_cut_with(&mut |choice| match choice.what {
        Undecided::Sector { file, index } if file.starts_with("lane-") && index == slots => {
            choice.newest
        }
        _ => 0,
    });
    drop(owner);
    let owner = open(&disk);
    assert_eq!(used(&owner, 1, quota), 20);
    assert_eq!(owner.engine.lanes.get(0).unwrap().tail(), 64);
    some(&owner, 2);
    disk.kill();
    drop(owner);
    assert_eq!(used(&open(&disk), 1, quota), 22);
}

/// A loss of power takes the batches of a ring's first lap and leaves the second lap, which has
/// overwritten the whole of it: nothing in the ring is what recovery looks for, and it says so.
#[test]
fn a_ring_that_is_ahead_of_the_journal_is_reported() {
    let disk = SimDisk::new(1);
    let owner = open(&disk);
    let quota = define(&owner);
    for count in [20, 20, 64] {
        (0..count).for_each(|_| assert!(consume(&owner, 1, quota, false).is_ok()));
        if count == 20 {
            owner.engine.step(Step::Drain).unwrap();
        }
    }
    assert_eq!(owner.engine.lanes.get(0).unwrap().tail(), 128);
    disk.power_cut_with(&mut |choice| match choice.what {
        Undecided::Sector { file, .. } if file.starts_with("journal-") => 0,
        _ => choice.newest,
    });
    drop(owner);
    let owner = open(&disk);
    assert_eq!(used(&owner, 1, quota), 0);
    let [finding] = &*owner.engine.report().findings else { panic!("{:?}", owner.engine.report()) };
    assert_eq!(finding.offset, SLOTS_AT as u64 * 8, "{finding:?}");
}

/// A slot that was published and does not verify any more: nothing behind it can be promised.
#[test]
fn a_record_that_rots_in_the_ring_ends_durability() {
    let disk = SimDisk::new(1);
    let owner = open(&disk);
    let quota = define(&owner);
    for _ in 0..3 {
        consume(&owner, 1, quota, false).unwrap();
    }
    let ring = disk.file_names().into_iter().find(|name| name.starts_with("lane-")).unwrap();
    let offset = (SLOTS_AT * 8 + SLOT_BYTES) as u64;
    disk.corrupt(&ring, offset, 1).unwrap();
    let error = owner.engine.step(Step::Sync).unwrap_err();
    assert!(matches!(&error, Error::Damaged { path, offset: at, .. }
        if path.ends_with(&ring) && *at == offset));
    assert_eq!(owner.engine.health().level(), HealthLevel::Failed);
    assert!(matches!(consume(&owner, 1, quota, true), Err(Error::DurabilityLost { .. })));
}

/// A clock that tells nobody when it moves: the engine sees it when it looks.
#[derive(Debug)]
pub(super) struct Silent(pub(super) ManualClock);

impl Clock for Silent {
    fn now(&self) -> Timestamp {
        self.0.now()
    }

    fn monotonic(&self) -> Duration {
        self.0.monotonic()
    }
}

/// The coarse clock is behind, by a window: whoever would be denied finds the new window open.
#[test]
fn before_a_denial_the_real_clock_is_asked() {
    let (disk, clock) = (SimDisk::new(1), clock());
    let config = small().clock(Arc::new(Silent(clock.clone())));
    let owner = Owner::open_at_rest(&disk.storage(), config).unwrap();
    let engine = &owner.engine;
    let quota = engine.define(&Quota::new("per-minute", 5).window(Window::Minute)).unwrap();
    type Call = fn(&Engine, u64, QuotaId) -> bool;
    let try_consume: Call = |engine, user, quota| {
        let counted = engine.counted(user, quota).unwrap();
        engine.try_consume(&counted, 5, false).unwrap().is_allowed()
    };
    let check: Call = |engine, user, quota| {
        engine.check(&engine.counted(user, quota).unwrap(), 5).unwrap().is_allowed()
    };
    let group: Call = |engine, user, quota| {
        engine.try_consume_all(&[Consume { user, quota, amount: 5 }]).unwrap().is_allowed()
    };
    for (user, call) in (1..).zip([try_consume, check, group]) {
        assert!(try_consume(engine, user, quota));
        assert!(!call(engine, user, quota));
        clock.advance(Duration::from_millis(MINUTE));
        assert!(call(engine, user, quota), "call {user}");
    }
}

/// A clock that was set back: what is counted goes on in the counter's own window, in memory and in
/// the log.
#[test]
fn a_record_names_the_window_that_counted() {
    let (disk, clock) = (SimDisk::new(1), clock());
    let open = || {
        let config = small().clock(Arc::new(clock.clone()));
        Owner::open_at_rest(&disk.storage(), config).unwrap()
    };
    let owner = open();
    let quota = owner.engine.define(&Quota::new("per-minute", 5).window(Window::Minute)).unwrap();
    clock.advance(Duration::from_millis(MINUTE));
    assert_eq!(consume(&owner, 1, quota, false).unwrap(), 1);
    clock.set(Timestamp::from_unix_millis(START));
    assert_eq!(consume(&owner, 1, quota, false).unwrap(), 2);
    disk.kill();
    drop(owner);
    clock.advance(Duration::from_millis(MINUTE));
    assert_eq!(used(&open(), 1, quota), 2);
}

/// Counters whose window is over are forgotten to make room, and do not come back in it when the
/// clock is set back. Those that are in their window, have a limit of their own or a handle are not
/// forgotten.
#[test]
fn what_is_still_needed_is_not_forgotten() {
    let (disk, clock) = (SimDisk::new(1), clock());
    let config = small().clock(Arc::new(clock.clone()));
    let owner = Owner::open_at_rest(&disk.storage(), config).unwrap();
    let engine = &owner.engine;
    let minute = engine.define(&Quota::new("per-minute", 5).window(Window::Minute)).unwrap();
    let day = engine.define(&Quota::new("per-day", 5).window(Window::Day)).unwrap();
    let counted = |user, quota| engine.counted(user, quota).unwrap();
    engine.set_limit(&counted(1, minute), Some(3)).unwrap();
    let handle = engine.share(&counted(2, minute)).unwrap();
    consume(&owner, 3, minute, false).unwrap();
    consume(&owner, 3, day, false).unwrap();
    clock.advance(Duration::from_millis(MINUTE));
    for user in 10..2000 {
        drop(engine.share(&counted(user, minute)).unwrap());
    }
    let is_there = |user, quota| engine.table.find(Key { user, quota }, |_| ()).is_some();
    assert!(!is_there(3, minute), "nothing was forgotten");
    assert_eq!(engine.usage(&counted(1, minute)).limit, 3);
    let through_handle = Counted { cell: Some(handle.cell()), ..counted(2, minute) };
    assert_eq!(engine.consume(&through_handle, 1, false).unwrap().used, 1);
    assert_eq!(used(&owner, 2, minute), 1);
    assert_eq!(used(&owner, 3, day), 1);
    clock.set(Timestamp::from_unix_millis(START));
    let usage = engine.consume(&counted(3, minute), 1, false).unwrap();
    assert_eq!(usage.resets_at, Some(Timestamp::from_unix_millis(START + 2 * MINUTE)));
}

/// A merge drops the sums of windows that are over. After an open with a clock that was set back
/// no counter opens in such a window: it would be empty.
#[test]
fn a_pruned_window_stays_closed_after_an_open() {
    let (disk, clock) = (SimDisk::new(1), clock());
    let config = || small().closed_window_retention(Duration::ZERO).clock(Arc::new(clock.clone()));
    let owner = Owner::open_at_rest(&disk.storage(), config()).unwrap();
    let quota = owner.engine.define(&Quota::new("per-minute", 5).window(Window::Minute)).unwrap();
    consume(&owner, 1, quota, false).unwrap();
    clock.advance(Duration::from_millis(4 * MINUTE));
    owner.engine.snapshot().unwrap();
    owner.close().unwrap();
    drop(owner);
    clock.set(Timestamp::from_unix_millis(START));
    let owner = Owner::open_at_rest(&disk.storage(), config()).unwrap();
    let usage = owner.engine.usage(&owner.engine.counted(1, quota).unwrap());
    assert_eq!(
        (usage.used, usage.resets_at),
        (0, Some(Timestamp::from_unix_millis(START + 4 * MINUTE)))
    );
}

/// The identity's mark that the directory was created may be lost, by a sync that failed and was
/// believed by the next process. What the directory holds counts all the same.
#[test]
fn a_directory_with_content_is_not_begun_anew() {
    let disk = SimDisk::new(1);
    let owner = open(&disk);
    let quota = define(&owner);
    consume(&owner, 1, quota, false).unwrap();
    let engine = owner.engine.id();
    disk.kill();
    drop(owner);
    identity::write(&disk.storage(), Identity { engine, is_created: false }).unwrap();
    assert_eq!(used(&open(&disk), 1, quota), 1);
}
