//! What is kept for a sink until it is there: by merges that meet a disk which fails, and by those
//! that drop windows. On a simulated disk without threads.

use std::collections::BTreeSet;
use std::time::Duration;

use super::sink_tests::{Bench, Down, START, at, consume, named, serve, status};
use super::*;
use crate::delivery::forget_on;
use crate::delivery::state::{self, SinkState};
use crate::model::{Consume, Decisions, Quota, Window};
use crate::sink::MemoryStore;
use crate::storage::sim::{Call, Fault, Outcome, SimDisk};

/// An engine whose only sink lags: it has got what was first, and each merge keeps the rest for it.
fn lagging(bench: &Bench, store: &MemoryStore, rounds: usize) -> Owner {
    let owner = bench.open_with(store);
    consume(&owner, 1, 100);
    serve(&owner);
    owner.close().unwrap();
    let owner = bench.open(vec![named(Down)]);
    (0..rounds).for_each(|_| merge(&owner).unwrap());
    owner
}

fn merge(owner: &Owner) -> Result<()> {
    consume(owner, 1, 1);
    owner.engine.snapshot()
}

/// The parts of the backlog that are there, and those that the state names.
fn parts(bench: &Bench, owner: &Owner) -> [BTreeSet<String>; 2] {
    // As another process would find it.
    let disk = SimDisk::from_image(&bench.disk.snapshot_image(), 1);
    let state = SinkState::load(&disk.storage(), owner.engine.id(), "billing").unwrap();
    let names = bench.disk.file_names().into_iter();
    let listed = state.backlog.iter().map(|&range| state::backlog_name("billing", range));
    [names.filter(|name| name.starts_with("backlog-")).collect(), listed.collect()]
}

/// A merge once dropped what an open reservation still held of a window that was over: a sink that
/// began with the totals was then told what the end of the reservation gave back, and not what it
/// was given back of.
#[test]
fn what_a_reservation_holds_outlasts_its_window_in_the_totals() {
    for is_settled_first in [false, true] {
        let (bench, store) = (Bench::new(), MemoryStore::new());
        let mut owner = bench.open(Vec::new());
        let quota = Quota::new("minute", 1 << 40).window(Window::Minute);
        let quota = owner.engine.define(&quota).unwrap();
        let counted = owner.engine.counted(8, quota).unwrap();
        owner.engine.consume(&counted, 3, false).unwrap();
        let item = Consume { user: 7, quota, amount: 10 };
        let reserved: std::result::Result<_, Decisions> =
            owner.engine.reserve(&[item], Duration::from_hours(24)).unwrap();
        let id = reserved.unwrap();
        let commit = |owner: &Owner| {
            let charged = owner.engine.commit(id, Charge::Same(4)).unwrap();
            assert!(charged.is_allowed());
        };
        merge(&owner).unwrap();
        bench.clock.advance(Duration::from_hours(1));
        owner.engine.clock.refresh();
        (0..3).for_each(|_| merge(&owner).unwrap());
        if is_settled_first {
            commit(&owner);
            owner.engine.sync().unwrap();
        }
        owner.close().unwrap();

        owner = bench.open_with(&store);
        serve(&owner);
        let used = |user| store.used(user, "minute", Some(at(START)));
        if !is_settled_first {
            assert_eq!(used(7), 10);
            commit(&owner);
            serve(&owner);
        }
        assert_eq!((used(7), used(8)), (4, 0), "settled first: {is_settled_first}");

        // Once nothing holds it, it goes the way of its window.
        (0..3).for_each(|_| merge(&owner).unwrap());
        owner.close().unwrap();
        let late = MemoryStore::new();
        let owner = bench.open(vec![("late".to_owned(), Box::new(late.sink()) as _)]);
        serve(&owner);
        assert!(
            late.rows().keys().all(|(_, quota, _)| &**quota == "lifetime"),
            "{:?}",
            late.rows()
        );
    }
}

/// One part that could not be read once ended all merges, and the journal grew without bound.
#[test]
fn a_part_that_can_not_be_read_does_not_end_merges() {
    let (bench, store) = (Bench::new(), MemoryStore::new());
    let owner = lagging(&bench, &store, 5);
    let [_, before] = parts(&bench, &owner);
    assert_eq!(before.len(), 1);
    // Each attempt to read it fails; nothing else is read of a backlog by these merges.
    for nth in 0..100 {
        bench.disk.inject(Fault::new(Call::Read, nth, Outcome::Eio).on("backlog-"));
    }
    merge(&owner).unwrap();
    bench.disk.clear_faults();
    (0..3).for_each(|_| merge(&owner).unwrap());
    let [there, listed] = parts(&bench, &owner);
    assert_eq!(there, listed);
    assert!(there.len() == 2 && there.is_superset(&before), "{there:?}");
    owner.close().unwrap();

    // It can be read again, and nothing is missing.
    let owner = bench.open_with(&store);
    serve(&owner);
    assert_eq!(store.used(1, "lifetime", None), 109);
}

/// What can't be written is not a part that can't be read: it is tried again, as one part.
#[test]
fn a_part_that_can_not_be_written_fails_the_merge() {
    for call in [Call::Create, Call::Write, Call::Sync, Call::Rename] {
        let (bench, store) = (Bench::new(), MemoryStore::new());
        let owner = lagging(&bench, &store, 5);
        bench.disk.inject(Fault::new(call, 0, Outcome::Enospc).on("backlog-"));
        let error = merge(&owner).unwrap_err();
        assert!(matches!(error, Error::Io { .. }), "{error}");
        (0..3).for_each(|_| merge(&owner).unwrap());
        let [there, listed] = parts(&bench, &owner);
        assert!(there == listed && there.len() == 1, "{call:?}: {there:?}, {listed:?}");
        owner.close().unwrap();
        let owner = bench.open_with(&store);
        serve(&owner);
        assert_eq!(store.used(1, "lifetime", None), 109);
    }
}

/// After a state that could not be saved, the part that it replaced once stayed until the next
/// open, which may be far away.
#[test]
fn a_part_that_was_replaced_is_removed_though_a_save_fails() {
    let (bench, store) = (Bench::new(), MemoryStore::new());
    let owner = lagging(&bench, &store, 5);
    for _ in 0..3 {
        bench.disk.inject(Fault::new(Call::Create, 0, Outcome::Enospc).on("sink-billing.tmp"));
        let error = merge(&owner).unwrap_err();
        assert!(matches!(error, Error::Io { .. }), "{error}");
    }
    (0..2).for_each(|_| merge(&owner).unwrap());
    let [there, listed] = parts(&bench, &owner);
    assert!(there == listed && there.len() == 1, "{there:?}, {listed:?}");
    let bytes = there.iter().map(|name| bench.disk.file(name).unwrap().len() as u64).sum::<u64>();
    assert_eq!(status(&owner).backlog_bytes, bytes);
    owner.close().unwrap();
    let owner = bench.open_with(&store);
    serve(&owner);
    assert_eq!(store.used(1, "lifetime", None), 110);
}

/// Killed between any two calls, or as the power goes: a directory that has forgotten half a sink
/// opens, and forgets the rest. A state that is gone before its backlog is taken for a lost one.
#[test]
fn a_sink_that_is_half_forgotten_keeps_nothing_from_opening() {
    let (bench, store) = (Bench::new(), MemoryStore::new());
    lagging(&bench, &store, 5).close().unwrap();
    let image = bench.disk.snapshot_image();
    let calls = {
        let disk = SimDisk::from_image(&image, 1);
        assert!(forget_on(&disk.storage(), "billing").unwrap());
        disk.calls()
    };
    for nth in 0..calls {
        for seed in 0..10 {
            let disk = SimDisk::from_image(&image, seed);
            disk.set_loose_directory(seed % 2 == 0);
            let storage = disk.storage();
            disk.crash_at(nth);
            assert!(forget_on(&storage, "billing").is_err());
            if seed == 0 {
                disk.kill()
            } else {
                disk.power_cut()
            }
            disk.clear_faults();
            let half = Bench { disk, clock: bench.clock.clone() };
            half.open(Vec::new()).close().unwrap();
            forget_on(&half.disk.storage(), "billing").unwrap();
            assert_eq!((half.bytes("sink"), half.bytes("backlog")), (0, 0));
        }
    }
}
