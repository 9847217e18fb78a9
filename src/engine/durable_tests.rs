//! What `durable_consumes` promises of each operation, what a merge may take in, and in which order
//! things take effect.

use std::sync::Arc;
use std::time::Duration;

use super::flushers::Step;
use super::order_tests::{consume, define, open, small, used};
use super::*;
use crate::journal::cold::ColdEvent;
use crate::model::{AMOUNT_MAX, Consume};
use crate::storage::RealStorage;
use crate::storage::faulty::{self, FaultyDisk};
use crate::storage::sim::{SimDisk, Undecided};
use crate::testing::watched;

fn durable() -> Config {
    small().durable_consumes(true)
}

/// Nothing persists that no sync covered.
fn cut(disk: &SimDisk, owner: Owner) {
    disk.power_cut_with(&mut |_| 0);
    drop(owner);
}

/// Each operation waits for the disk, where the configuration says so.
#[test]
fn every_operation_survives_a_loss_of_power() {
    let item = |quota| Consume { user: 1, quota, amount: 5 };
    type Act = fn(&Owner, QuotaId, Consume) -> u64;
    // What is used afterwards.
    let acts: [(&str, Act); 8] = [
        ("consume", |owner, quota, _| {
            consume(owner, 1, quota, false).unwrap();
            21
        }),
        ("refund", |owner, quota, _| {
            let counted = owner.engine.counted(1, quota).unwrap();
            owner.engine.refund(&counted, 4).unwrap();
            16
        }),
        ("all", |owner, _, item| {
            assert!(owner.engine.try_consume_all(&[item]).unwrap().is_allowed());
            25
        }),
        ("once", |owner, quota, _| {
            let counted = owner.engine.counted(1, quota).unwrap();
            assert!(owner.engine.try_consume_once(9, counted, 5).unwrap().is_allowed());
            25
        }),
        ("reserve", |owner, _, item| {
            owner.engine.reserve(&[item], Duration::from_secs(600)).unwrap().unwrap();
            25
        }),
        ("cancel", |owner, _, item| {
            let id = owner.engine.reserve(&[item], Duration::from_secs(600)).unwrap().unwrap();
            owner.engine.cancel(id).unwrap();
            20
        }),
        ("commit", |owner, _, item| {
            let id = owner.engine.reserve(&[item], Duration::from_secs(600)).unwrap().unwrap();
            assert!(owner.engine.commit(id, Charge::Same(2)).unwrap().is_allowed());
            22
        }),
        ("try_consume", |owner, quota, _| {
            let counted = owner.engine.counted(1, quota).unwrap();
            assert!(owner.engine.try_consume(&counted, 5, false).unwrap().is_allowed());
            25
        }),
    ];
    let mut failed = Vec::new();
    for (name, act) in acts {
        let disk = SimDisk::new(1);
        let owner = Owner::open_at_rest(&disk.storage(), durable()).unwrap();
        let quota = define(&owner);
        let counted = owner.engine.counted(1, quota).unwrap();
        owner.engine.consume(&counted, 20, true).unwrap();
        let expected = act(&owner, quota, item(quota));
        cut(&disk, owner);
        let found = used(&open(&disk), 1, quota);
        if found != expected {
            failed.push((name, found, expected));
        }
    }
    assert!(failed.is_empty(), "{failed:?}");
}

#[test]
fn an_event_survives_a_loss_of_power() {
    let disk = SimDisk::new(1);
    let store = crate::sink::MemoryStore::new();
    let sinks = vec![sink_tests::named(store.sink())];
    let owner = Owner::open_at_rest_with(&disk.storage(), durable(), sinks).unwrap();
    let quota = define(&owner);
    let at = Timestamp::from_unix_millis(5);
    owner.engine.record(&crate::model::UsageEvent::new(1, quota, 5.0, at)).unwrap();
    cut(&disk, owner);
    assert_eq!(used(&open(&disk), 1, quota), 5);
}

#[test]
fn an_extension_survives_a_loss_of_power() {
    let disk = SimDisk::new(1);
    let clock = crate::clock::ManualClock::new(Timestamp::from_unix_millis(1 << 40));
    let config = || durable().clock(Arc::new(clock.clone()));
    let owner = Owner::open_at_rest(&disk.storage(), config()).unwrap();
    let quota = define(&owner);
    let item = Consume { user: 1, quota, amount: 5 };
    let id = owner.engine.reserve(&[item], Duration::from_secs(60)).unwrap().unwrap();
    owner.engine.extend(id, Duration::from_secs(600)).unwrap();
    cut(&disk, owner);
    clock.advance(Duration::from_secs(120));
    let owner = Owner::open_at_rest(&disk.storage(), config()).unwrap();
    owner.engine.step(Step::Expiry).unwrap();
    assert_eq!(used(&owner, 1, quota), 5, "it is open for another eight minutes");
}

fn batch(quota: QuotaId) -> Vec<Consume> {
    (0..100).map(|user| Consume { user, quota, amount: 1 }).collect()
}

/// How many units the users of a batch have.
fn used_by_all(owner: &Owner, quota: QuotaId) -> usize {
    batch(quota).iter().filter(|item| used(owner, item.user, quota) == 1).count()
}

#[test]
fn a_batch_waits_for_the_disk_once() {
    let disk = SimDisk::new(1);
    let owner = Owner::open_at_rest(&disk.storage(), durable().lane_records(256)).unwrap();
    let quota = define(&owner);
    let before = owner.engine.stats().syncs;
    assert_eq!(owner.engine.consume_batch(&batch(quota)).unwrap().len(), 100);
    let syncs = owner.engine.stats().syncs - before;
    assert!((1..=2).contains(&syncs), "{syncs}");
    cut(&disk, owner);
    assert_eq!(used_by_all(&open(&disk), quota), 100);
}

/// Those before the one that can't be counted are acknowledged.
#[test]
fn a_batch_that_is_cut_short_waits_for_the_disk() {
    let disk = SimDisk::new(1);
    let owner = Owner::open_at_rest(&disk.storage(), durable()).unwrap();
    let quota = define(&owner);
    let items = [1, AMOUNT_MAX, 1].map(|amount| Consume { user: 1, quota, amount });
    let Err(Error::BatchCutShort { counted: 1, source }) = owner.engine.consume_batch(&items)
    else {
        panic!("the second can't be counted");
    };
    assert!(matches!(*source, Error::Overflow { .. }), "{source}");
    cut(&disk, owner);
    assert_eq!(used(&open(&disk), 1, quota), 1);
}

/// What is said to be counted is what an open finds.
#[test]
fn a_batch_that_could_not_be_made_durable_was_counted() {
    let (disk, faults) = (SimDisk::new(1), FaultyDisk::default());
    let config = durable().lane_records(256);
    let owner = Owner::open_at_rest(&faults.over(disk.storage()), config).unwrap();
    let quota = define(&owner);
    let (call, outcome) = (faulty::Call::Sync, faulty::Outcome::Fail(std::io::ErrorKind::Other));
    faults.inject(faulty::Fault { call, name: "journal-", outcome, times: usize::MAX });
    let failed = owner.engine.consume_batch(&batch(quota));
    let Err(Error::BatchCutShort { counted, source }) = failed else { panic!("{failed:?}") };
    assert!(matches!(*source, Error::DurabilityLost { .. }), "{source}");
    disk.kill();
    drop(owner);
    assert_eq!((counted, used_by_all(&open(&disk), quota)), (100, 100));
}

#[test]
fn a_batch_that_is_not_logged_was_counted() {
    let disk = SimDisk::new(1);
    let config = durable().backpressure(crate::config::Backpressure::AdmitUnlogged);
    let owner = Owner::open_at_rest(&disk.storage(), config).unwrap();
    let quota = define(&owner);
    let failed = owner.engine.consume_batch(&batch(quota));
    let Err(Error::BatchCutShort { counted: 100, source }) = failed else { panic!("{failed:?}") };
    assert!(matches!(*source, Error::NotLogged), "{source}");
    assert_eq!(used_by_all(&owner, quota), 100);
    // What had room in the log is durable.
    cut(&disk, owner);
    let found = used_by_all(&open(&disk), quota);
    assert!((32..100).contains(&found), "{found}");
}

/// While the first waits for the disk, does the second?
fn second_waits(act: impl Fn(&Owner, bool) + Sync, prepare: impl FnOnce(&Owner)) -> bool {
    let (disk, faults) = (SimDisk::new(1), FaultyDisk::default());
    let owner = Owner::open_at_rest(&faults.over(disk.storage()), durable()).unwrap();
    prepare(&owner);
    let (call, outcome) = (faulty::Call::Sync, faulty::Outcome::Block);
    faults.inject(faulty::Fault { call, name: "journal-", outcome, times: usize::MAX });
    std::thread::scope(|scope| {
        let first = scope.spawn(|| act(&owner, true));
        while !faults.is_blocking() {
            std::thread::yield_now();
        }
        let second = watched(scope, || act(&owner, false));
        let waits = second.waits();
        faults.heal();
        first.join().unwrap();
        second.join();
        waits
    })
}

#[test]
fn who_is_given_an_answer_again_waits_for_it_to_be_durable() {
    let waits = second_waits(
        |owner, _| {
            let counted = owner.engine.counted(1, QuotaId(0)).unwrap();
            assert!(owner.engine.try_consume_once(9, counted, 5).unwrap().is_allowed());
        },
        |owner| {
            define(owner);
        },
    );
    assert!(waits);
}

/// It may be open again after a loss of power, and expire, though it was said to be committed.
#[test]
fn who_finds_a_reservation_settled_waits_for_it_to_be_durable() {
    let id = Mutex::new(None);
    let waits = second_waits(
        |owner, is_first| {
            let id = id.lock().unwrap();
            let settled = owner.engine.commit(id, Charge::Same(2)).map(drop);
            let is_repeated = matches!(settled, Err(Error::ReservationSettled { .. }));
            assert!(settled.is_ok() == is_first && is_repeated != is_first, "{settled:?}");
        },
        |owner| {
            let quota = define(owner);
            let item = Consume { user: 1, quota, amount: 5 };
            let ttl = Duration::from_secs(60);
            *id.lock() = Some(owner.engine.reserve(&[item], ttl).unwrap().unwrap());
        },
    );
    assert!(waits);
}

#[test]
fn who_extends_by_less_waits_for_what_extends_by_more() {
    let id = Mutex::new(None);
    let waits = second_waits(
        |owner, is_first| {
            let ttl = Duration::from_secs(if is_first { 1000 } else { 600 });
            let id = id.lock().unwrap();
            owner.engine.extend(id, ttl).unwrap();
        },
        |owner| {
            let quota = define(owner);
            let item = Consume { user: 1, quota, amount: 5 };
            let ttl = Duration::from_secs(60);
            *id.lock() = Some(owner.engine.reserve(&[item], ttl).unwrap().unwrap());
        },
    );
    assert!(waits);
}

/// A snapshot that goes beyond the durable journal would outlive the batches that it stands on.
#[test]
fn a_merge_takes_in_durable_batches_only() {
    let disk = SimDisk::new(1);
    let owner = open(&disk);
    let quota = define(&owner);
    consume(&owner, 1, quota, true).unwrap();
    owner.engine.snapshot().unwrap();
    consume(&owner, 1, quota, true).unwrap();
    consume(&owner, 1, quota, false).unwrap();
    owner.engine.committer.lock_drain().unwrap().append_batch().unwrap();
    owner.engine.compactor.run(&mut |_| Ok(())).unwrap();
    disk.power_cut_with(&mut |choice| match choice.what {
        Undecided::Sector { file, .. } if file.starts_with("journal-") => 0,
        _ => choice.newest,
    });
    drop(owner);
    let owner = Owner::open_at_rest(&disk.storage(), small()).unwrap();
    assert!((2..=3).contains(&used(&owner, 1, quota)));
}

/// Two limits that are set at once take effect in the order in which they are written.
#[test]
fn what_is_journalled_takes_effect_under_the_same_lock() {
    let disk = SimDisk::new(1);
    let owner = open(&disk);
    let quota = define(&owner).as_u16();
    let event = ColdEvent::SetLimit { user: 1, quota, limit: 4 };
    let committer = &owner.engine.committer;
    std::thread::scope(|scope| {
        committer
            .take_cold(event, || {
                let other = watched(scope, || committer.cold_waiting());
                assert!(other.waits(), "nobody else has the drain");
            })
            .unwrap();
    });
}

#[test]
fn nothing_is_taken_in_after_a_close() {
    let disk = SimDisk::new(1);
    let owner = open(&disk);
    let quota = define(&owner).as_u16();
    owner.close().unwrap();
    let event = ColdEvent::SetLimit { user: 1, quota, limit: 4 };
    let taken = owner.engine.committer.take_cold(event, || ());
    assert!(matches!(taken, Err(Error::Closed)), "{taken:?}");
}

/// Without it each open would count as one after a restart of the machine.
#[test]
fn the_machine_says_which_start_it_is() {
    let open = || {
        let dir = tempfile::tempdir().unwrap();
        RealStorage::open(dir.path()).unwrap().boot_id()
    };
    assert!(open() != 0 && open() == open());
}

/// What is reserved is counted as such before its counter is let go: a refund that meets it leaves
/// it alone.
#[test]
fn refunds_leave_alone_what_is_reserved() {
    const ROUNDS: u64 = 30_000;
    let dir = tempfile::tempdir().unwrap();
    let config = Config::default().shards(2).lanes(4).lane_records(1 << 12);
    let storage: Arc<dyn Storage> = Arc::new(RealStorage::open(dir.path()).unwrap());
    let owner = Owner::open_on(&storage, config).unwrap();
    let quota = define(&owner);
    let is_over = AtomicBool::new(false);
    let (mut charged, mut given) = (0, 0);
    std::thread::scope(|scope| {
        let refunding = scope.spawn(|| {
            let mut given = 0;
            while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
                let counted = owner.engine.counted(1, quota).unwrap();
                given += owner.engine.refund(&counted, 7).unwrap();
            }
            given
        });
        let item = Consume { user: 1, quota, amount: 5 };
        for _ in 0..ROUNDS {
            let id = owner.engine.reserve(&[item], Duration::from_secs(600)).unwrap().unwrap();
            assert!(owner.engine.commit(id, Charge::Same(2)).unwrap().is_allowed());
            charged += 2;
        }
        is_over.store(true, std::sync::atomic::Ordering::Relaxed);
        given = refunding.join().unwrap();
    });
    assert_eq!(used(&owner, 1, quota) + given, charged);
}
