//! What is kept for a sink until it is there: by merges that meet a disk which fails, and by those
//! that drop windows. On a simulated disk without threads.

use std::collections::BTreeSet;

use super::sink_tests::{Bench, Down, consume, named, serve, status};
use super::*;
use crate::delivery::state::{self, SinkState};
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
