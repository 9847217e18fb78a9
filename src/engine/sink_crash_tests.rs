//! What an engine promises to one sink when something ends or is damaged: the engine, at every
//! single call that it makes, and the files that are kept for the sink.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::flushers::Step;
use super::sink_tests::{Bench, Down, START, at, consume, named, serve, small, status};
use super::*;
use crate::clock::ManualClock;
use crate::delivery::SinkCondition;
use crate::delivery::state::{SinkState, load_all};
use crate::model::{Quota, UsageEvent};
use crate::sink::{Fault, MemoryStore};
use crate::storage::sim::{self as disk, SimDisk};
use crate::wal::lanes::prefer;

/// A state file that is lost is made up for by the sink's own position, where the journal still
/// reaches back to it.
#[test]
fn a_lost_state_is_made_up_for_by_the_sinks_position() {
    let (bench, store) = (Bench::new(), MemoryStore::new());
    let owner = bench.open_with(&store);
    consume(&owner, 1, 10);
    serve(&owner);
    consume(&owner, 1, 5);
    owner.close().unwrap();
    let name = "sink-billing.tgp";
    bench.disk.corrupt(name, 30, 1).unwrap();
    let error = bench.try_open(vec![named(store.sink())]).unwrap_err();
    assert!(matches!(&error, Error::Damaged { path, .. } if path.ends_with(name)), "{error}");
    assert!(error.to_string().contains("without this file"), "{error}");
    assert!(bench.disk.delete(name));
    let owner = bench.open_with(&store);
    serve(&owner);
    assert_eq!(store.used(1, "lifetime", None), 15);
}

/// A position that is taken over while a merge is under way must reach back to what the merge
/// releases: what follows it is not in the backlog that was made before.
#[test]
fn a_position_taken_over_during_a_merge_does_not_lean_on_what_it_releases() {
    let (bench, store) = (Bench::new(), MemoryStore::new());
    let owner = bench.open_with(&store);
    consume(&owner, 1, 1);
    owner.engine.snapshot().unwrap();
    consume(&owner, 1, 1);
    serve(&owner);
    owner.close().unwrap();
    assert!(bench.disk.delete("sink-billing.tgp"));
    // Each open begins another file.
    let owner = bench.open(Vec::new());
    consume(&owner, 1, 1);
    owner.close().unwrap();
    let owner = bench.open(Vec::new());
    consume(&owner, 1, 1);
    owner.engine.snapshot().unwrap();
    owner.close().unwrap();

    let owner = bench.open_with(&store);
    consume(&owner, 1, 1);
    owner.engine.sync().unwrap();
    let mut is_served = false;
    let merge = owner.engine.compactor.run(&mut |_| {
        // Once the backlog is there nobody holds what the sink's worker needs.
        if !is_served && status(&owner).backlog_bytes > 0 {
            is_served = true;
            store.inject(Fault::BeforeCommit);
            owner.engine.serve_sinks();
        }
        Ok(())
    });
    merge.unwrap();
    assert!(is_served);
    // What the worker has gathered in memory does not help the next process.
    bench.disk.kill();
    drop(owner);
    let owner = bench.open_with(&store);
    owner.engine.step(Step::Files).unwrap();
    serve(&owner);
    let refused = status(&owner).last_error.unwrap();
    assert!(refused.contains("fed before"), "{refused}");
    for _ in 0..2 {
        consume(&owner, 1, 1);
        owner.engine.snapshot().unwrap();
    }
}

/// A snapshot whose directory could not be synced is there, and the engine that made it knows
/// nothing of it: what sinks need is kept by the next one all the same.
#[test]
fn snapshots_that_failed_late_release_nothing_that_a_sink_needs() {
    let (bench, store) = (Bench::new(), MemoryStore::new());
    let owner = bench.open(vec![named(Down)]);
    consume(&owner, 1, 1);
    owner.engine.snapshot().unwrap();
    consume(&owner, 1, 1);
    owner.close().unwrap();

    let owner = bench.open(vec![named(Down)]);
    for _ in 0..2 {
        consume(&owner, 1, 1);
        owner.engine.sync().unwrap();
        bench.disk.inject(disk::Fault::new(disk::Call::SyncDirectory, 0, disk::Outcome::Eio));
        owner.engine.snapshot().unwrap_err();
    }
    bench.disk.kill();
    drop(owner);

    let owner = bench.open_with(&store);
    owner.engine.step(Step::Files).unwrap();
    serve(&owner);
    assert_eq!(store.used(1, "lifetime", None), 4, "{:?}", status(&owner));
    for _ in 0..2 {
        consume(&owner, 1, 1);
        owner.engine.snapshot().unwrap();
    }
}

/// What is damaged is not delivered and not merged; all else goes on beside it.
#[test]
fn a_damaged_backlog_is_said_and_keeps_nobody_from_going_on() {
    let (bench, store) = (Bench::new(), MemoryStore::new());
    let owner = bench.open_with(&store);
    serve(&owner);
    owner.close().unwrap();
    let owner = bench.open(vec![named(Down)]);
    let rounds = |count: u64| {
        for _ in 0..count {
            consume(&owner, 1, 1);
            owner.engine.snapshot().unwrap();
        }
    };
    rounds(3);
    let backlog = |bench: &Bench| {
        let names = bench.disk.file_names().into_iter();
        names.filter(|name| name.starts_with("backlog")).collect::<Vec<_>>()
    };
    let names = backlog(&bench);
    assert_eq!(names.len(), 1);
    bench.disk.corrupt(&names[0], 100, 1).unwrap();
    rounds(5);
    assert_eq!(backlog(&bench).len(), 2, "{:?}", backlog(&bench));
    owner.close().unwrap();
    let owner = bench.open_with(&store);
    serve(&owner);
    let refused = status(&owner);
    assert_eq!(refused.condition, SinkCondition::Refused);
    assert!(refused.last_error.unwrap().contains(&names[0]));
}

/// What is missing in the journal is missing for one sink, and for nobody else.
#[test]
fn a_sink_whose_part_of_the_journal_is_gone_holds_nobody_up() {
    let (bench, store) = (Bench::new(), MemoryStore::new());
    let owner = bench.open_with(&store);
    consume(&owner, 1, 1);
    serve(&owner);
    let engine = owner.engine.id();
    owner.close().unwrap();
    let storage = bench.disk.storage();
    let is_old = |state: &SinkState| state.confirmed.is_some();
    let old = load_all(&storage, engine).unwrap().pop().filter(is_old).unwrap();
    drop(storage);
    for _ in 0..3 {
        let owner = bench.open_with(&store);
        consume(&owner, 1, 1);
        serve(&owner);
        owner.engine.snapshot().unwrap();
        owner.engine.step(Step::Files).unwrap();
        owner.close().unwrap();
    }
    old.save(&bench.disk.storage(), engine).unwrap();

    let other = MemoryStore::new();
    let sinks = vec![named(Down), ("other".to_owned(), Box::new(other.sink()) as _)];
    let owner = bench.open(sinks);
    for _ in 0..3 {
        consume(&owner, 1, 1);
        owner.engine.snapshot().unwrap();
    }
    owner.engine.sync().unwrap();
    owner.engine.serve_sinks();
    assert_eq!(other.used(1, "lifetime", None), 7);
}

/// Runs until the disk ends, or the work does. The sink fails on the way.
fn work(disk: &Arc<SimDisk>, store: &MemoryStore, counted: &mut u64) -> Result<()> {
    let clock = ManualClock::new(at(START));
    let alive = || if disk.has_crashed() { Err(Error::Closed) } else { Ok(()) };
    for round in 0..4_u64 {
        let sink = if round == 2 { named(Down) } else { named(store.sink()) };
        let owner = Owner::open_at_rest_with(&disk.storage(), small(&clock), vec![sink])?;
        let quota = owner.engine.define(&Quota::new("lifetime", 1 << 40))?;
        for step in 0..6 {
            prefer(0);
            let user = step % 3;
            if step % 2 == 0 {
                let counted = owner.engine.counted(user, quota)?;
                owner.engine.consume(&counted, 1, true)?;
            } else {
                let number = (round * 6 + step).to_string();
                let event = UsageEvent::new(user, quota, 1.0, at(step)).metadata("n", number);
                owner.engine.record(&event)?;
                owner.engine.sync()?;
            }
            alive()?;
            *counted += 1;
            match (round, step) {
                (0, 1) => store.inject(Fault::AfterCommit),
                (1, 1) => store.inject(Fault::BeforeCommit),
                _ => {}
            }
            owner.engine.serve_sinks();
            if step % 2 == 1 {
                owner.engine.snapshot()?;
            }
            alive()?;
        }
        if round % 2 == 0 {
            owner.close()?;
            alive()?;
        } else {
            disk.kill();
        }
    }
    Ok(())
}

/// Whatever call the engine ends at, and however: the sink has what a later engine has.
#[test]
fn an_end_at_any_call_delivers_everything_once() {
    let calls = {
        let disk = SimDisk::new(0);
        work(&disk, &MemoryStore::new(), &mut 0).unwrap();
        disk.calls()
    };
    assert!(calls > 400, "{calls} calls");
    for nth in 0..=calls {
        let disk = SimDisk::new(nth);
        let (store, mut counted) = (MemoryStore::new(), 0);
        disk.crash_at(nth);
        let ended = work(&disk, &store, &mut counted);
        assert_eq!(ended.is_ok(), nth == calls, "{ended:?}");
        disk.kill();
        let image = disk.snapshot_image();
        for outcome in 0..6 {
            let disk = SimDisk::from_image(&image, nth * 10 + outcome);
            if outcome > 0 {
                disk.power_cut();
            }
            // A store of its own, at the same point.
            let store = store.duplicate();
            let context = format!("ended at call {nth}, outcome {outcome}");
            let clock = ManualClock::new(at(START));
            let sinks = vec![named(store.sink())];
            let owner = Owner::open_at_rest_with(&disk.storage(), small(&clock), sinks)
                .unwrap_or_else(|error| panic!("{context}: refused: {error}"));
            let quota = owner.engine.define(&Quota::new("lifetime", 1 << 40)).unwrap();
            serve(&owner);
            let events = store.events();
            let numbers: Vec<_> = events.iter().map(|row| &row.event.metadata["n"]).collect();
            let distinct: BTreeSet<_> = numbers.iter().collect();
            assert_eq!(distinct.len(), numbers.len(), "{context}: twice in {numbers:?}");
            // What is counted by turns is consumed and recorded; one may be under way.
            let recorded = counted / 2..=counted / 2 + 1;
            assert!(
                recorded.contains(&(numbers.len() as u64)),
                "{context}: {numbers:?}, {counted}"
            );
            let mut sum = 0;
            for user in 0..3 {
                let counted = owner.engine.counted(user, quota).unwrap();
                let used = owner.engine.usage(&counted).used;
                let status = status(&owner);
                assert_eq!(
                    store.used(user, "lifetime", None),
                    i128::from(used),
                    "{context}: {status:?}"
                );
                sum += used;
            }
            assert!((counted..=counted + 1).contains(&sum), "{context}: {sum} of {counted}");
        }
    }
}
