//! The simulated disk against what Linux does: each rule of the module's head has a test.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::node::SECTOR_BYTES;
use super::*;
use crate::storage::StorageFile;
use crate::storage::checked::CheckedStorage;
use crate::sync::Ordering;
use crate::wal::region::Region;

fn disk() -> (Arc<SimDisk>, Arc<dyn Storage>) {
    let disk = SimDisk::new(1);
    let storage = disk.storage();
    (disk, storage)
}

/// An open file, name and contents durable.
fn durable_file(storage: &dyn Storage, name: &str, bytes: &[u8]) -> Arc<dyn StorageFile> {
    let file = storage.create(name).unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file.sync_data().unwrap();
    storage.sync_directory().unwrap();
    file
}

fn sectors(values: &[u8]) -> Vec<u8> {
    values.iter().flat_map(|&value| [value; SECTOR_BYTES]).collect()
}

/// The first byte of each sector.
fn values(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().step_by(SECTOR_BYTES).copied().collect()
}

/// What a file may be after a loss of power.
fn outcomes_of(disk: &SimDisk, name: &str) -> BTreeSet<Option<Vec<u8>>> {
    disk.outcomes().map(|disk| disk.file(name).map(|bytes| values(&bytes))).collect()
}

fn name_outcomes(disk: &SimDisk) -> BTreeSet<String> {
    disk.outcomes().map(|disk| disk.file_names().join(" ")).collect()
}

fn set<const N: usize>(names: [&str; N]) -> BTreeSet<String> {
    names.into_iter().map(str::to_owned).collect()
}

fn nothing(_: &Choice<'_>) -> usize {
    0
}

fn everything(choice: &Choice<'_>) -> usize {
    choice.newest
}

fn os_error(error: &io::Error) -> Option<rustix::io::Errno> {
    rustix::io::Errno::from_io_error(error)
}

fn is_eio<T: std::fmt::Debug>(result: io::Result<T>) -> bool {
    os_error(&result.unwrap_err()) == Some(rustix::io::Errno::IO)
}

fn is_full<T: std::fmt::Debug>(result: io::Result<T>) -> bool {
    result.unwrap_err().kind() == ErrorKind::StorageFull
}

fn store(region: &Region, word: usize, value: u64) {
    region.words()[word].store(value.to_le(), Ordering::Release);
}

#[test]
fn a_file_reads_as_it_was_written() {
    let (_disk, storage) = disk();
    let file = storage.create("a").unwrap();
    file.write_all_at(b"abc", 2).unwrap();
    file.allocate(7).unwrap();
    file.allocate(3).unwrap();
    assert_eq!(file.len().unwrap(), 7);
    let mut bytes = [9; 7];
    storage.open("a").unwrap().read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"\0\0abc\0\0");
    let beyond = file.read_exact_at(&mut bytes, 1).unwrap_err();
    assert_eq!(beyond.kind(), ErrorKind::UnexpectedEof);
    let far = file.read_exact_at(&mut bytes, u64::MAX).unwrap_err();
    assert_eq!(far.kind(), ErrorKind::UnexpectedEof);
    let far = file.write_all_at(&bytes, u64::MAX - 2).unwrap_err();
    assert_eq!(far.kind(), ErrorKind::FileTooLarge);
    assert_eq!(file.allocate(u64::MAX).unwrap_err().kind(), ErrorKind::FileTooLarge);
}

#[test]
fn names_behave_as_in_a_real_directory() {
    let (_disk, storage) = disk();
    storage.create("a").unwrap().write_all_at(b"a", 0).unwrap();
    storage.create("b").unwrap();
    assert_eq!(storage.create("a").unwrap_err().kind(), ErrorKind::AlreadyExists);
    assert_eq!(storage.open("c").unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(storage.rename("c", "a").unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(storage.remove("c").unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(storage.open("../a").unwrap_err().kind(), ErrorKind::InvalidInput);
    storage.rename("a", "a").unwrap();
    let replaced = storage.open("b").unwrap();
    storage.rename("a", "b").unwrap();
    assert_eq!(storage.list().unwrap(), ["b"]);
    assert_eq!(replaced.len().unwrap(), 0, "an open file outlives its name");
    assert_eq!(storage.open("b").unwrap().len().unwrap(), 1);
}

#[test]
fn what_was_synced_survives_any_loss_of_power() {
    let (disk, storage) = disk();
    durable_file(&*storage, "a", &sectors(&[1, 2]));
    for seed in 0..20 {
        let disk = SimDisk::from_image(&disk.snapshot_image(), seed);
        disk.power_cut();
        assert_eq!(disk.file("a"), Some(sectors(&[1, 2])));
    }
    assert_eq!((disk.dirty_sectors(), disk.outcomes().count()), (0, 1));
}

#[test]
fn unsynced_sectors_persist_in_every_combination() {
    let (disk, storage) = disk();
    let file = durable_file(&*storage, "a", &sectors(&[0, 0, 0]));
    file.write_all_at(&sectors(&[1, 1, 1]), 0).unwrap();
    assert_eq!(disk.dirty_sectors(), 3);
    let outcomes = outcomes_of(&disk, "a");
    assert_eq!(outcomes.len(), 8);
    assert!(outcomes.contains(&Some(vec![0, 1, 0])), "a later sector without an earlier one");
}

#[test]
fn a_sector_rewritten_persists_in_any_of_its_versions() {
    let (disk, storage) = disk();
    let file = durable_file(&*storage, "a", &sectors(&[1]));
    for value in [2, 3, 3] {
        file.write_all_at(&[value; SECTOR_BYTES], 0).unwrap();
    }
    let expected = [1, 2, 3].map(|value| Some(vec![value]));
    assert_eq!(outcomes_of(&disk, "a"), expected.into());
    file.sync_data().unwrap();
    assert_eq!(outcomes_of(&disk, "a"), [Some(vec![3])].into());
}

#[test]
fn the_versions_kept_of_a_sector_are_bounded() {
    let (disk, storage) = disk();
    let file = durable_file(&*storage, "a", &sectors(&[0]));
    for value in 1..=100 {
        file.write_all_at(&[value; SECTOR_BYTES], 0).unwrap();
    }
    let outcomes = outcomes_of(&disk, "a");
    assert!(outcomes.len() < 12 && outcomes.contains(&Some(vec![0])), "{outcomes:?}");
    assert!(outcomes.contains(&Some(vec![100])));
}

#[test]
fn a_part_of_a_sector_is_written_with_the_rest_of_it() {
    let (disk, storage) = disk();
    let file = durable_file(&*storage, "a", &sectors(&[1, 1]));
    file.write_all_at(&[2; 4], 510).unwrap();
    let with_second =
        |choice: &Choice<'_>| usize::from(choice.what == Undecided::Sector { file: "a", index: 1 });
    disk.power_cut_with(&mut { with_second });
    let bytes = disk.file("a").unwrap();
    assert_eq!(bytes[508..516], [1, 1, 1, 1, 2, 2, 1, 1]);
}

#[test]
fn a_file_that_grew_has_its_old_length_or_a_later_one() {
    let (disk, storage) = disk();
    let file = durable_file(&*storage, "a", &sectors(&[1]));
    file.allocate(1024).unwrap();
    file.write_all_at(&sectors(&[2]), 1024).unwrap();
    let expected = [vec![1], vec![1, 0], vec![1, 0, 0], vec![1, 0, 2]].map(Some);
    assert_eq!(outcomes_of(&disk, "a"), expected.into());
    file.sync_data().unwrap();
    assert_eq!(outcomes_of(&disk, "a"), [Some(vec![1, 0, 2])].into());
}

#[test]
fn a_length_inside_a_sector_cuts_it() {
    let (disk, storage) = disk();
    let file = durable_file(&*storage, "a", b"ab");
    file.write_all_at(b"xyz", 0).unwrap();
    let outcomes: BTreeSet<_> = disk.outcomes().filter_map(|disk| disk.file("a")).collect();
    let expected = [&b"ab"[..], b"xy", b"ab\0", b"xyz"].map(<[u8]>::to_vec);
    assert_eq!(outcomes, expected.into());
}

#[test]
fn a_synced_file_without_its_name_is_gone() {
    let (disk, storage) = disk();
    let file = storage.create("a").unwrap();
    file.write_all_at(b"a", 0).unwrap();
    file.sync_data().unwrap();
    assert_eq!(name_outcomes(&disk), set(["", "a"]));
    disk.power_cut_with(&mut nothing);
    assert_eq!(disk.file("a"), None);
}

#[test]
fn names_persist_up_to_a_point_of_their_order() {
    let (disk, storage) = disk();
    durable_file(&*storage, "old", b"old");
    storage.create("new.tmp").unwrap();
    storage.rename("new.tmp", "new").unwrap();
    storage.remove("old").unwrap();
    assert_eq!(name_outcomes(&disk), set(["old", "new.tmp old", "new old", "new"]));
    storage.sync_directory().unwrap();
    assert_eq!(name_outcomes(&disk), set(["new"]));
}

#[test]
fn a_renamed_file_is_found_under_its_old_name() {
    let (disk, storage) = disk();
    durable_file(&*storage, "current", b"1");
    durable_file(&*storage, "next", b"2");
    storage.rename("next", "current").unwrap();
    storage.open("current").unwrap().sync_data().unwrap();
    disk.power_cut_with(&mut nothing);
    assert_eq!(disk.file("current"), Some(b"1".to_vec()));
    assert_eq!(disk.file("next"), Some(b"2".to_vec()));
}

#[test]
fn in_a_loose_directory_any_subset_persists_and_each_name_is_consistent() {
    let (disk, storage) = disk();
    disk.set_loose_directory(true);
    durable_file(&*storage, "old", b"old");
    storage.create("tmp").unwrap().write_all_at(b"new", 0).unwrap();
    storage.rename("tmp", "new").unwrap();
    storage.remove("old").unwrap();
    let expected = ["", "old", "new", "tmp", "new old", "old tmp"];
    assert_eq!(name_outcomes(&disk), set(expected), "never new and tmp");
}

#[test]
fn a_name_removed_and_created_again_leads_to_either_file() {
    let (disk, storage) = disk();
    durable_file(&*storage, "a", b"1");
    storage.remove("a").unwrap();
    let file = storage.create("a").unwrap();
    file.write_all_at(b"2", 0).unwrap();
    file.sync_data().unwrap();
    let expected = [Some(vec![b'1']), None, Some(vec![b'2'])];
    assert_eq!(outcomes_of(&disk, "a"), expected.into());
}

#[test]
fn a_killed_process_leaves_everything_and_is_not_heard_any_more() {
    let (disk, storage) = disk();
    let file = storage.create("a").unwrap();
    file.write_all_at(b"abc", 0).unwrap();
    disk.kill();
    assert!(file.write_all_at(b"x", 0).is_err());
    assert!(file.len().is_err() && file.sync_data().is_err());
    assert!(storage.list().is_err() && storage.create("b").is_err());
    assert!(storage.rename("a", "b").is_err() && storage.sync_directory().is_err());
    let next = disk.storage();
    assert_eq!(next.list().unwrap(), ["a"]);
    assert_eq!(disk.file("a"), Some(b"abc".to_vec()));
    drop((file, storage));
    disk.power_cut_with(&mut nothing);
    assert_eq!(disk.file_names(), Vec::<String>::new(), "it was never durable");
    assert!(next.list().is_err(), "a loss of power ends the process");
}

#[test]
fn one_process_at_a_time_has_the_disk() {
    let (disk, first) = disk();
    let second = disk.storage();
    assert!(first.create("a").is_err());
    second.create("a").unwrap();
}

#[test]
fn a_region_is_the_file() {
    let (_disk, storage) = disk();
    let file = durable_file(&*storage, "ring", &sectors(&[0]));
    let region = storage.map("ring").unwrap();
    store(&region, 3, 0x0807_0605_0403_0201);
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, 24).unwrap();
    assert_eq!(bytes, [1, 2, 3, 4, 5, 6, 7, 8]);
    file.write_all_at(&[9, 9], 30).unwrap();
    let word = region.words()[3].load(Ordering::Acquire);
    assert_eq!(u64::from_le(word), 0x0909_0605_0403_0201);
    let again = storage.map("ring").unwrap();
    store(&again, 0, 5);
    assert_eq!(u64::from_le(region.words()[0].load(Ordering::Acquire)), 5);
}

#[test]
fn stores_into_a_region_survive_a_kill_and_stray_ones_reach_nobody() {
    let (disk, storage) = disk();
    durable_file(&*storage, "ring", &sectors(&[0]));
    let region = storage.map("ring").unwrap();
    store(&region, 0, 1);
    disk.kill();
    store(&region, 0, 2);
    let fresh = disk.storage().map("ring").unwrap();
    assert_eq!(u64::from_le(fresh.words()[0].load(Ordering::Acquire)), 1);
    store(&region, 0, 3);
    assert_eq!(u64::from_le(fresh.words()[0].load(Ordering::Acquire)), 1);
}

#[test]
fn each_sector_of_a_region_is_durable_or_live_after_a_loss_of_power() {
    let (disk, storage) = disk();
    durable_file(&*storage, "ring", &sectors(&[0, 0, 0]));
    let region = storage.map("ring").unwrap();
    for value in [1, 2] {
        store(&region, 0, value);
        store(&region, 64, value);
    }
    assert_eq!(disk.dirty_sectors(), 2);
    let expected = [[0, 0, 0], [0, 2, 0], [2, 0, 0], [2, 2, 0]];
    assert_eq!(outcomes_of(&disk, "ring"), expected.map(|v| Some(v.to_vec())).into());
    storage.open("ring").unwrap().sync_data().unwrap();
    assert_eq!(outcomes_of(&disk, "ring"), [Some(vec![2, 2, 0])].into());
}

#[test]
fn a_lost_sync_shows_the_new_bytes_until_power_is_lost() {
    let (disk, storage) = disk();
    let file = durable_file(&*storage, "a", &sectors(&[1, 1]));
    file.write_all_at(&sectors(&[2, 2]), 0).unwrap();
    disk.inject(Fault::new(Call::Sync, 0, Outcome::LoseUnsynced));
    assert!(is_eio(file.sync_data()));
    assert_eq!(disk.dirty_sectors(), 0, "marked clean");
    file.sync_data().unwrap();
    assert_eq!(disk.file("a"), Some(sectors(&[2, 2])));
    // What is written again has a new chance; what is not was never stored, whatever the sync said.
    file.write_all_at(&sectors(&[3]), 512).unwrap();
    file.sync_data().unwrap();
    disk.power_cut_with(&mut everything);
    assert_eq!(disk.file("a"), Some(sectors(&[1, 3])));
}

#[test]
fn a_lost_sync_of_a_region_shows_the_stores_until_power_is_lost() {
    let (disk, storage) = disk();
    let file = durable_file(&*storage, "ring", &sectors(&[0, 0]));
    let region = storage.map("ring").unwrap();
    store(&region, 0, 1);
    store(&region, 64, 1);
    disk.inject(Fault::new(Call::Sync, 0, Outcome::LoseUnsynced));
    assert!(is_eio(file.sync_data()));
    store(&region, 64, 2);
    file.sync_data().unwrap();
    disk.power_cut_with(&mut everything);
    assert_eq!(disk.file("ring").map(|bytes| values(&bytes)), Some(vec![0, 2]));
}

#[test]
fn a_failed_sync_that_loses_nothing_leaves_it_undecided() {
    let (disk, storage) = disk();
    let file = durable_file(&*storage, "a", &sectors(&[1]));
    file.write_all_at(&sectors(&[2]), 0).unwrap();
    disk.inject(Fault::new(Call::Sync, 0, Outcome::Eio));
    assert!(is_eio(file.sync_data()));
    assert_eq!(outcomes_of(&disk, "a").len(), 2);
    file.sync_data().unwrap();
    assert_eq!(outcomes_of(&disk, "a"), [Some(vec![2])].into());
}

#[test]
fn a_lost_sync_of_the_directory_loses_names() {
    let (disk, storage) = disk();
    storage.create("a").unwrap();
    disk.inject(Fault::new(Call::SyncDirectory, 0, Outcome::LoseUnsynced));
    assert!(is_eio(storage.sync_directory()));
    storage.create("b").unwrap();
    storage.sync_directory().unwrap();
    assert_eq!(storage.list().unwrap(), ["a", "b"]);
    disk.power_cut_with(&mut everything);
    assert_eq!(disk.file_names(), ["b"]);
}

#[test]
fn a_checked_disk_does_not_believe_the_sync_after_a_lost_one() {
    let (disk, storage) = disk();
    let checked = CheckedStorage::new(storage);
    let file = durable_file(&checked, "a", &sectors(&[1]));
    file.write_all_at(&sectors(&[2]), 0).unwrap();
    disk.inject(Fault::new(Call::Sync, 0, Outcome::LoseUnsynced));
    assert!(file.sync_data().is_err());
    let calls = disk.calls();
    assert!(file.sync_data().is_err());
    assert_eq!(disk.calls(), calls, "the kernel was not asked");
}

#[test]
fn the_nth_call_of_a_kind_fails_and_no_other() {
    let (disk, storage) = disk();
    let a = storage.create("a").unwrap();
    let b = storage.create("b").unwrap();
    disk.inject(Fault::new(Call::Write, 1, Outcome::Enospc));
    disk.inject(Fault::new(Call::Sync, 1, Outcome::Eio).on("b"));
    a.write_all_at(b"1", 0).unwrap();
    a.allocate(10).unwrap();
    assert!(is_full(b.write_all_at(b"2", 0)));
    assert_eq!(b.len().unwrap(), 0, "without effect");
    b.write_all_at(b"2", 0).unwrap();
    b.sync_data().unwrap();
    a.sync_data().unwrap();
    assert!(is_eio(b.sync_data()));
    disk.inject(Fault::new(Call::Sync, 0, Outcome::Eio));
    disk.clear_faults();
    b.sync_data().unwrap();
}

#[test]
fn every_kind_of_call_can_fail_without_effect() {
    let (disk, storage) = disk();
    let file = durable_file(&*storage, "a", &sectors(&[1]));
    let mut byte = [0];
    let mut failing = |call: Call, act: &mut dyn FnMut(&mut [u8]) -> bool| {
        disk.inject(Fault::new(call, 0, Outcome::Eio));
        assert!(act(&mut byte), "{call:?}");
    };
    failing(Call::List, &mut |_| is_eio(storage.list()));
    failing(Call::Create, &mut |_| is_eio(storage.create("b")));
    failing(Call::Open, &mut |_| is_eio(storage.open("a")));
    failing(Call::Map, &mut |_| is_eio(storage.map("a")));
    failing(Call::Length, &mut |_| is_eio(file.len()));
    failing(Call::Read, &mut |byte| is_eio(file.read_exact_at(byte, 0)));
    failing(Call::Write, &mut |_| is_eio(file.write_all_at(&[2], 0)));
    failing(Call::Allocate, &mut |_| is_eio(file.allocate(4096)));
    failing(Call::Sync, &mut |_| is_eio(file.sync_data()));
    failing(Call::Rename, &mut |_| is_eio(storage.rename("a", "b")));
    failing(Call::Remove, &mut |_| is_eio(storage.remove("a")));
    failing(Call::SyncDirectory, &mut |_| is_eio(storage.sync_directory()));
    failing(Call::Any, &mut |_| is_eio(storage.remove("a")));
    assert_eq!((disk.file_names(), disk.file("a")), (vec!["a".into()], Some(sectors(&[1]))));
}

#[test]
fn a_short_write_leaves_its_first_bytes() {
    let (disk, storage) = disk();
    let file = durable_file(&*storage, "a", b"0000");
    disk.inject(Fault::new(Call::Write, 0, Outcome::ShortWrite(2)));
    assert!(is_eio(file.write_all_at(b"1111", 1)));
    assert_eq!(disk.file("a"), Some(b"0110".to_vec()));
}

#[test]
fn after_a_crash_no_call_and_no_store_has_an_effect() {
    let (disk, storage) = disk();
    let file = durable_file(&*storage, "ring", &sectors(&[0]));
    let region = storage.map("ring").unwrap();
    store(&region, 0, 1);
    disk.crash_at(1);
    file.len().unwrap();
    assert!(!disk.has_crashed());
    assert!(file.write_all_at(&[7], 8).is_err());
    assert!(disk.has_crashed());
    store(&region, 0, 2);
    assert!(file.len().is_err() && storage.list().is_err());
    disk.kill();
    let next = disk.storage();
    assert!(!disk.has_crashed());
    assert_eq!(next.open("ring").unwrap().len().unwrap(), 512);
    assert_eq!(disk.file("ring").unwrap()[..9], [1, 0, 0, 0, 0, 0, 0, 0, 0]);
}

/// As a test of the engine would: once to count the calls, then a crash at each of them.
#[test]
fn a_workload_can_be_crashed_at_every_call() {
    let replace = |storage: &dyn Storage| -> io::Result<()> {
        let file = storage.create("tmp")?;
        file.write_all_at(b"new", 0)?;
        file.sync_data()?;
        storage.rename("tmp", "current")?;
        storage.sync_directory()
    };
    let start = SimDisk::new(0);
    start.put("current", b"old");
    let image = start.snapshot_image();
    replace(&*start.storage()).unwrap();
    for nth in 0..=start.calls() {
        let disk = SimDisk::from_image(&image, nth);
        disk.crash_at(nth);
        let is_done = replace(&*disk.storage()).is_ok();
        for outcome in disk.outcomes() {
            let current = outcome.file("current").unwrap();
            assert!(current == b"new" || (current == b"old" && !is_done), "call {nth}");
        }
    }
}

#[test]
fn a_full_disk_takes_what_fits_and_more_once_there_is_room() {
    let (disk, storage) = disk();
    disk.set_capacity(1000);
    let file = storage.create("a").unwrap();
    file.allocate(600).unwrap();
    file.write_all_at(&[1; 600], 0).unwrap();
    let other = storage.create("b").unwrap();
    assert!(is_full(other.write_all_at(&[2; 500], 0)));
    assert_eq!(other.len().unwrap(), 400);
    assert!(is_full(other.allocate(401)));
    file.write_all_at(&[3; 600], 0).unwrap();
    storage.remove("a").unwrap();
    assert!(is_full(other.allocate(401)), "a removed file takes space while it is open");
    drop(file);
    other.allocate(1000).unwrap();
    disk.set_capacity(2000);
    other.allocate(1500).unwrap();
}

#[test]
fn rot_is_seen_at_once_and_after_a_loss_of_power() {
    let (disk, storage) = disk();
    let file = durable_file(&*storage, "a", &sectors(&[1, 1]));
    file.write_all_at(&sectors(&[2]), 512).unwrap();
    let region = storage.map("a").unwrap();
    disk.corrupt("a", 0, 0x80).unwrap();
    disk.corrupt("a", 512, 0x80).unwrap();
    assert_eq!(region.words()[0].load(Ordering::Acquire).to_le_bytes()[0], 0x81);
    let expected = [vec![0x81, 0x81], vec![0x81, 0x82]].map(Some);
    assert_eq!(outcomes_of(&disk, "a"), expected.into());
    assert_eq!(disk.corrupt("a", 1024, 1).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    assert_eq!(disk.corrupt("b", 0, 1).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn files_can_be_put_and_taken_away_from_outside() {
    let (disk, storage) = disk();
    storage.create("a").unwrap().write_all_at(b"1", 0).unwrap();
    disk.put("a", b"2");
    assert_eq!(outcomes_of(&disk, "a"), [Some(vec![b'2'])].into());
    assert_eq!(storage.open("a").unwrap().len().unwrap(), 1);
    assert!(disk.delete("a") && !disk.delete("a"));
    storage.sync_directory().unwrap();
    assert_eq!(name_outcomes(&disk), set([""]));
}

#[test]
fn an_image_is_a_disk_of_its_own() {
    let (disk, storage) = disk();
    let file = durable_file(&*storage, "ring", &sectors(&[0, 0]));
    let region = storage.map("ring").unwrap();
    store(&region, 0, 1);
    file.write_all_at(&[1], 512).unwrap();
    let image = disk.snapshot_image();
    store(&region, 0, 2);
    file.sync_data().unwrap();
    let copy = SimDisk::from_image(&image, 0);
    assert_eq!(copy.dirty_sectors(), 2, "what was not durable is not");
    assert_eq!(outcomes_of(&copy, "ring").len(), 4);
    assert!(copy.file("ring").is_some_and(|bytes| bytes[0] == 1));
    copy.power_cut_with(&mut everything);
    assert_eq!(copy.file("ring").map(|bytes| values(&bytes)), Some(vec![1, 1]));
}

#[test]
fn one_seed_decides_everything() {
    let run = |seed| {
        let disk = SimDisk::new(seed);
        let storage = disk.storage();
        let file = durable_file(&*storage, "a", &sectors(&[0; 32]));
        file.write_all_at(&sectors(&[1; 32]), 0).unwrap();
        storage.create("b").unwrap();
        disk.power_cut();
        (disk.file_names(), disk.file("a"))
    };
    let outcomes: BTreeSet<_> = (0..200).map(run).collect();
    assert!((0..20).all(|seed| run(seed) == run(seed)));
    assert!(outcomes.len() > 50, "{} of 200 differ", outcomes.len());
    let all = |value| outcomes.iter().any(|(_, a)| *a == Some(sectors(&[value; 32])));
    assert!(all(0) && all(1), "the extremes are among them");
}

#[test]
fn the_generator_is_splitmix64() {
    let mut random = SplitMix64::new(1_234_567);
    assert_eq!(random.next_u64(), 6_457_827_717_110_365_317);
    assert_eq!(random.next_u64(), 3_203_168_211_198_807_973);
    assert_eq!(random.index(0), 0);
    assert!((0..1000).all(|_| random.index(3) < 3));
}
