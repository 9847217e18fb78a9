//! Damage: what once passed without a word, and sweeps over golden directories.

mod allocations;
mod golden;
mod salvaged;
mod sweep;

use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::config::Config;
use crate::delivery::forget_on;
use crate::engine::Owner;
use crate::journal::batch::{BATCH_ALIGN, Batch, BatchHeader, HEADER_BYTES};
use crate::journal::files::FILE_HEADER_BYTES;
use crate::model::Quota;
use crate::storage::sim::SimDisk;

fn small() -> Config {
    Config::default()
        .lanes(1)
        .lane_records(64)
        .shards(2)
        .journal_file_bytes(64 << 10)
        .sync_interval(Duration::from_secs(60))
}

/// Opens, counts `amount` for user 1, durably or not, and returns what is used.
fn count(disk: &Arc<SimDisk>, amount: u64, is_sync: bool) -> (Owner, u64) {
    let owner = Owner::open_on(&disk.storage(), small()).unwrap();
    let quota = owner.engine.define(&Quota::new("requests", 1 << 40)).unwrap();
    let counted = owner.engine.counted(1, quota).unwrap();
    let used = owner.engine.consume(&counted, amount, is_sync).unwrap().used;
    (owner, used)
}

/// Exact, or less and reported, or refused. Whether it opened.
fn opens(disk: &Arc<SimDisk>, exact: u64, context: &str) -> bool {
    let owner = match Owner::open_on(&disk.storage(), small()) {
        Ok(owner) => owner,
        Err(Error::Damaged { .. }) => return false,
        Err(error) => panic!("{context}: {error}"),
    };
    let quota = owner.engine.define(&Quota::new("requests", 1 << 40)).unwrap();
    let used = owner.engine.usage(&owner.engine.counted(1, quota).unwrap()).used;
    let findings = &owner.engine.report().findings;
    assert!(
        used == exact || used < exact && !findings.is_empty(),
        "{context}: {used} instead of {exact}, {findings:?}"
    );
    true
}

/// In a directory that others use too, when it is created and later.
#[test]
fn files_of_others_stay() {
    const OTHERS: [&str; 8] = [
        "notes.tmp",
        "journal.tmp",
        "journal-1.tmp",
        "sink-A.tmp",
        "run-1.tmp",
        "x.txt",
        "lane-notes.tgr",
        "lane-0001-1.tgr",
    ];
    const OURS: [&str; 3] =
        ["tollgate-id.tmp", "journal-00000000000000000009.tmp", "backlog-billing.tmp"];
    let disk = SimDisk::new(1);
    OTHERS.iter().for_each(|name| disk.put(name, b"theirs"));
    for amount in 1..3 {
        OURS.iter().for_each(|name| disk.put(name, b"half"));
        let (owner, used) = count(&disk, 1, true);
        assert_eq!(used, amount);
        owner.close().unwrap();
        let is_there = |name: &&str| disk.file(name).is_some_and(|bytes| bytes == b"theirs");
        assert!(OTHERS.iter().all(is_there), "{:?}", disk.file_names());
        assert!(OURS.iter().all(|name| disk.file(name).is_none()), "{:?}", disk.file_names());
    }
}

/// What is left of a sink in a directory without anything else was once accepted by the first open,
/// and refused, as another directory's, by all later ones.
#[test]
fn what_is_left_of_a_sink_is_no_empty_directory() {
    for name in ["sink-billing.tgp", "backlog-a-00000000000000000000-00000000000000000009.tgd"] {
        let disk = SimDisk::new(1);
        disk.put(name, b"left");
        let refused = Owner::open_on(&disk.storage(), small()).map(drop).unwrap_err().to_string();
        assert!(refused.contains("tollgate.id"), "{refused}");
        assert_eq!(disk.file_names(), [name]);
    }
}

/// It may hold what is nowhere else. Once it was removed, and nobody was told.
#[test]
fn a_backlog_whose_sinks_state_is_gone_is_refused_until_it_is_forgotten() {
    let disk = SimDisk::new(1);
    count(&disk, 1, true).0.close().unwrap();
    let name = "backlog-gone-00000000000000000000-00000000000000000009.tgd";
    disk.put(name, b"left");
    let refused = Owner::open_on(&disk.storage(), small()).map(drop).unwrap_err();
    assert!(matches!(&refused, Error::Damaged { path, .. } if path.ends_with("sink-gone.tgp")));
    assert!(disk.file(name).is_some());
    let (verification, _) =
        verify::verify_on(&disk.storage(), Timestamp::from_unix_millis(1)).unwrap();
    assert!(matches!(verification.verdict, Verdict::Refused(_)), "{verification:?}");
    let file = verification.files.iter().find(|file| file.name == name).unwrap();
    assert!(file.damage.is_some(), "{file:?}");
    assert!(forget_on(&disk.storage(), "gone").unwrap());
    let (_owner, used) = count(&disk, 1, true);
    assert_eq!((used, disk.file(name)), (2, None));
}

/// The journal's files that hold something, sorted.
fn journal(disk: &SimDisk) -> Vec<String> {
    let is_in_use = |name: &String| disk.file(name).is_some_and(|bytes| bytes[32] == 1);
    let names = disk.file_names().into_iter();
    names.filter(|name| name.ends_with(".tgj")).filter(is_in_use).collect()
}

/// What is left of a file that was cut between two batches ends like one that was never longer.
#[test]
fn a_journal_file_that_was_cut_short_is_not_taken_for_whole() {
    let disk = SimDisk::new(1);
    count(&disk, 1, true).0.close().unwrap();
    let (owner, exact) = count(&disk, 2, true);
    owner.engine.sync().unwrap();
    disk.kill();
    drop(owner);
    let image = disk.snapshot_image();
    for name in journal(&disk) {
        let bytes = disk.file(&name).unwrap();
        for len in (0..4096).step_by(BATCH_ALIGN).chain([bytes.len() - 1]) {
            let cut = SimDisk::from_image(&image, 2);
            cut.put(&name, &bytes[..len]);
            let opened = opens(&cut, exact, &format!("{name} cut to {len}"));
            assert!(!opened, "{name} cut to {len} was opened");
        }
    }
}

/// The newest file of the journal lost its beginning, and with it the only life that it held, which
/// was durable and cleanly closed. Once it was taken for a file that nothing is needed of.
#[test]
fn a_last_file_that_was_emptied_is_refused() {
    let disk = SimDisk::new(1);
    count(&disk, 1, true).0.close().unwrap();
    let (owner, exact) = count(&disk, 2, true);
    owner.close().unwrap();
    disk.kill();
    let image = disk.snapshot_image();
    let name = journal(&disk).pop().unwrap();
    let bytes = disk.file(&name).unwrap();
    let mut without_its_first_page = bytes.clone();
    without_its_first_page[..4096].fill(0);
    let mut left: Vec<_> = [0, 1, 63].map(|len| bytes[..len].to_vec()).into();
    left.push(without_its_first_page);
    for left in left {
        for has_spares in [true, false] {
            let emptied = SimDisk::from_image(&image, 2);
            emptied.put(&name, &left);
            let is_spare = |spare: &&String| spare.ends_with(".tgj") && **spare > name;
            for spare in emptied.file_names().iter().filter(is_spare).filter(|_| !has_spares) {
                assert!(emptied.delete(spare));
            }
            let context = format!("{name}, {} bytes, {has_spares}", left.len());
            assert!(!opens(&emptied, exact, &context), "{context}: opened");
        }
    }
}

/// Where no batch begins the journal ends, but not where one began.
#[test]
fn a_damaged_beginning_of_the_last_batch_is_reported() {
    let disk = SimDisk::new(1);
    count(&disk, 1, true).0.close().unwrap();
    // The last batch begins the generation: what the rings hold can't be read without it.
    let (owner, exact) = count(&disk, 2, false);
    disk.kill();
    drop(owner);
    let image = disk.snapshot_image();
    let name = journal(&disk).pop().unwrap();
    for offset in (0..4096).step_by(BATCH_ALIGN) {
        if disk.file(&name).unwrap()[offset..].starts_with(b"TGB1") {
            for at in offset..offset + 4 {
                let damaged = SimDisk::from_image(&image, 3);
                damaged.corrupt(&name, at as u64, 1).unwrap();
                opens(&damaged, exact, &format!("{name} at {at}"));
            }
        }
    }
}

/// All files from the one that was put in use last on are gone, which no other file tells.
#[test]
fn a_journal_that_ends_before_a_sink_is_refused() {
    let disk = SimDisk::new(1);
    let store = crate::sink::MemoryStore::new();
    let open = || {
        let sink: crate::delivery::NamedSink = ("billing".to_owned(), Box::new(store.sink()));
        Owner::open_with(&disk.storage(), small(), vec![sink]).unwrap()
    };
    for _ in 0..2 {
        let owner = open();
        let quota = owner.engine.define(&Quota::new("requests", 1 << 40)).unwrap();
        let counted = owner.engine.counted(1, quota).unwrap();
        let _ = owner.engine.consume(&counted, 1, true).unwrap();
        owner.engine.deliver(Duration::from_secs(60)).unwrap();
        owner.close().unwrap();
        disk.kill();
    }
    let name = journal(&disk).pop().unwrap();
    for later in disk.file_names().iter().filter(|later| later.ends_with(".tgj")) {
        assert!(*later < name || disk.delete(later));
    }
    let refused = Owner::open_on(&disk.storage(), small()).map(drop).unwrap_err().to_string();
    assert!(refused.contains("sink-billing.tgp"), "{refused}");
    let target = SimDisk::new(2);
    let now = Timestamp::from_unix_millis(1_767_225_600_000);
    let (salvage, _) = salvage::salvage_on(&disk.storage(), &target.storage(), now).unwrap();
    let is_said = |loss: &Finding| loss.what.contains("the sink \"billing\" was sent");
    assert!(salvage.losses.iter().any(is_said), "{:?}", salvage.losses);
}

/// Once, such a file was passed over as too small, kept its place between files in use with the
/// header that does not verify, and was refused by the second open.
#[test]
fn a_file_of_which_nothing_is_needed_is_prepared_anew() {
    let disk = SimDisk::new(1);
    let (owner, exact) = count(&disk, 2, true);
    let spares = || disk.file_names().into_iter().filter(|name| name.ends_with(".tgj")).skip(1);
    while spares().count() < 2 {
        std::thread::sleep(Duration::from_millis(5));
    }
    owner.close().unwrap();
    let image = disk.snapshot_image();
    for name in spares() {
        let bytes = disk.file(&name).unwrap();
        let mut damaged: Vec<_> = [64, 4096].map(|len| bytes[..len].to_vec()).into();
        for bit in [0, 100, 260, 511] {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            damaged.push(flipped);
        }
        for (case, damaged) in damaged.iter().enumerate() {
            let disk = SimDisk::from_image(&image, 2);
            disk.put(&name, damaged);
            for round in 0..3 {
                let context = format!("{name}, case {case}, open {round}");
                assert!(opens(&disk, exact, &context), "{context} was refused");
            }
        }
    }
}

/// Where each batch begins.
fn batches(file: &[u8]) -> Vec<usize> {
    let places = (0..file.len()).step_by(BATCH_ALIGN);
    places.filter(|&offset| file[offset..].starts_with(b"TGB1")).collect()
}

/// The batch that is written last, at close, says that all others are durable: each of them is
/// missed. Before, the last ones may be a tail that a crash has torn.
#[test]
fn after_closing_damage_to_any_batch_that_counts_is_refused() {
    let disk = SimDisk::new(1);
    count(&disk, 5, false).0.close().unwrap();
    disk.kill();
    let image = disk.snapshot_image();
    let name = journal(&disk).pop().unwrap();
    let file = disk.file(&name).unwrap();
    let places = batches(&file);
    let (&mark, others) = places.split_last().unwrap();
    assert!(others.len() > 1, "{places:?}");
    let engine = identity::read(&disk.storage()).unwrap().unwrap().engine;
    let header = file[mark..].first_chunk::<HEADER_BYTES>().unwrap();
    let len = BatchHeader::decode(engine, header).unwrap().total_len();
    let mark_end = mark + usize::try_from(len).unwrap();
    let last = Batch::decode(engine, &file[mark..mark_end]).unwrap();
    assert!(last.spans.is_empty() && last.cold.is_empty(), "only a mark: {last:?}");
    assert_eq!(
        last.header.durable.next(),
        last.header.number,
        "it says that all others are durable"
    );
    for &offset in others {
        let damaged = SimDisk::from_image(&image, 2);
        damaged.corrupt(&name, offset as u64 + 40, 1).unwrap();
        assert!(!opens(&damaged, 5, &format!("batch at {offset}")), "batch at {offset}: opened");
    }
    disk.corrupt(&name, mark as u64 + 40, 1).unwrap();
    assert_eq!(count(&disk, 1, false).1, 6, "the mark itself holds nothing else");
}

/// A record that is gone while those behind it are there: a loss of power leaves that, which is
/// reported. The death of a process does not, so it is refused.
#[test]
fn a_gap_is_refused_unless_the_machine_was_restarted() {
    let disk = SimDisk::new(1);
    let (owner, _) = count(&disk, 1, true);
    let quota = owner.engine.define(&Quota::new("requests", 1 << 40)).unwrap();
    let counted = owner.engine.counted(1, quota).unwrap();
    for _ in 0..5 {
        owner.engine.consume(&counted, 1, false).unwrap();
    }
    disk.kill();
    drop(owner);
    let is_ring = |name: &String| name.starts_with("lane-");
    let ring = disk.file_names().into_iter().find(is_ring).unwrap();
    // The first of them is record 1.
    let mut bytes = disk.file(&ring).unwrap();
    bytes[4096 + 3 * 32..][..32].fill(0);
    disk.put(&ring, &bytes);
    let restarted = SimDisk::from_image(&disk.snapshot_image(), 2);
    restarted.power_cut_with(&mut |choice| choice.newest);
    assert!(!opens(&disk, 6, "the process died"));
    assert!(opens(&restarted, 6, "the machine was restarted"));
}
