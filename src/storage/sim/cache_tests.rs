//! What the page cache does unasked, and what ends a process in the middle of a write.

use std::collections::BTreeSet;

use super::*;
use crate::sync::Ordering;

const SECTOR: usize = 512;

#[test]
fn what_a_failed_sync_has_lost_is_read_until_it_is_evicted() {
    let disk = SimDisk::new(1);
    disk.put("a", &[1; 2 * SECTOR]);
    let storage = disk.storage();
    let file = storage.open("a").unwrap();
    file.write_all_at(&[2; 2 * SECTOR], 0).unwrap();
    assert!(!disk.evict(), "it is dirty");
    disk.inject(Fault::new(Call::Sync, 0, Outcome::LoseUnsynced));
    assert!(file.sync_data().is_err());
    assert_eq!(disk.file("a").unwrap(), [2; 2 * SECTOR]);
    // What is written again has a new chance.
    file.write_all_at(&[3; SECTOR], 0).unwrap();
    assert!(disk.evict() && !disk.evict());
    assert_eq!(disk.file("a").unwrap(), [[3; SECTOR], [1; SECTOR]].concat());
    file.sync_data().unwrap();
    disk.power_cut();
    assert_eq!(disk.file("a").unwrap(), [[3; SECTOR], [1; SECTOR]].concat());
}

#[test]
fn what_was_written_back_from_a_region_may_be_left_whole_or_in_part() {
    let disk = SimDisk::new(1);
    disk.put("ring", &[0; SECTOR]);
    let storage = disk.storage();
    let region = storage.map("ring").unwrap();
    let store = |value| {
        for word in region.words() {
            word.store(value, Ordering::Relaxed);
        }
    };
    store(u64::MAX);
    disk.write_back();
    store(u64::MAX / 255);
    let left: BTreeSet<Vec<u8>> = disk.outcomes().map(|disk| disk.file("ring").unwrap()).collect();
    for whole in [0, 255, 1] {
        assert!(left.contains(&vec![whole; SECTOR]), "{whole}");
    }
    let is_mixed = |bytes: &&Vec<u8>| bytes.contains(&255) && bytes.contains(&1);
    assert_eq!(left.iter().filter(is_mixed).count(), 2);
    assert_eq!(left.len(), 5);
}

#[test]
fn a_process_dies_within_a_write_between_two_sectors() {
    for (parts, there) in [(0, 0), (100, 1), (128, 2), (255, 3)] {
        let disk = SimDisk::new(1);
        disk.put("a", &[1; 4 * SECTOR]);
        let storage = disk.storage();
        let file = storage.open("a").unwrap();
        disk.crash_within(0, parts);
        assert!(file.write_all_at(&[2; 4 * SECTOR], 0).is_err() && disk.has_crashed());
        let expected = [vec![2; there * SECTOR], vec![1; (4 - there) * SECTOR]].concat();
        assert!(disk.file("a").unwrap() == expected, "{parts}");
    }
}

#[test]
fn a_lasting_fault_lasts_until_it_is_cleared() {
    let disk = SimDisk::new(1);
    disk.put("a", &[1; SECTOR]);
    let storage = disk.storage();
    let file = storage.open("a").unwrap();
    disk.inject(Fault::new(Call::Change, 1, Outcome::Eio).lasting());
    file.write_all_at(&[2; SECTOR], 0).unwrap();
    for _ in 0..3 {
        assert!(file.write_all_at(&[3; SECTOR], 0).is_err() && file.sync_data().is_err());
        assert!(storage.create("b").is_err() && storage.remove("a").is_err());
        let mut bytes = [0; SECTOR];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [2; SECTOR]);
    }
    disk.clear_faults();
    file.write_all_at(&[3; SECTOR], 0).unwrap();
}
