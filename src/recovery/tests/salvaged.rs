//! What salvage makes up for, and what it leaves out.

use super::golden;
use super::*;
use crate::clock::ManualClock;
use crate::fold::Sum;
use crate::model::{Consume, QuotaId, UsageEvent, Window};
use crate::recovery::salvage::salvage_on;
use crate::recovery::verify::{Verdict, verify_on};
use crate::sink::MemoryStore;
use crate::snapshot::SnapshotReader;
use crate::snapshot::SnapshotWriter;
use crate::snapshot::merge::SumSource as _;
use crate::storage::sim::{Call, Fault, Outcome};
use crate::wal::lanes::prefer;

const NOW: Timestamp = Timestamp::from_unix_millis(1_767_225_600_000);

/// What user 1 has used after a salvage, and what is lost.
fn salvaged(disk: &Arc<SimDisk>) -> (u64, Vec<Finding>) {
    let target = SimDisk::new(2);
    let (salvage, _) = salvage_on(&disk.storage(), &target.storage(), NOW).unwrap();
    let owner = Owner::open_on(&target.storage(), small()).unwrap();
    assert!(owner.engine.report().findings.is_empty());
    let quota = owner.engine.define(&Quota::new("requests", 1 << 40)).unwrap();
    let used = owner.engine.usage(&owner.engine.counted(1, quota).unwrap()).used;
    (used, salvage.losses)
}

/// Three durable consumes of 1, 2 and 4, each a batch of its own; killed. The name of the journal's
/// file, and where its batches begin.
fn three_batches() -> (Arc<SimDisk>, String, Vec<usize>) {
    let disk = SimDisk::new(1);
    let (owner, _) = count(&disk, 1, true);
    let quota = owner.engine.define(&Quota::new("requests", 1 << 40)).unwrap();
    let counted = owner.engine.counted(1, quota).unwrap();
    for amount in [2, 4] {
        owner.engine.consume(&counted, amount, true).unwrap();
    }
    disk.kill();
    drop(owner);
    let name = journal(&disk).pop().unwrap();
    let bytes = disk.file(&name).unwrap();
    let begins = (0..4096).step_by(BATCH_ALIGN).filter(|&at| bytes[at..].starts_with(b"TGB1"));
    let begins = begins.collect();
    (disk, name, begins)
}

/// The batch is lost, but the ring still holds its records; and those of the batches behind it are
/// counted once.
#[test]
fn records_of_a_lost_batch_are_taken_from_the_ring_and_no_others() {
    let (disk, name, begins) = three_batches();
    let image = disk.snapshot_image();
    for &begin in &begins {
        let damaged = SimDisk::from_image(&image, 3);
        damaged.corrupt(&name, begin as u64 + 70, 1).unwrap();
        let (used, losses) = salvaged(&damaged);
        // The first begins the generation, and the others hold everything that was counted. The
        // second defines the quota: nothing is counted without.
        let expected = if begins.get(1) == Some(&begin) { 0 } else { 7 };
        assert_eq!(used, expected, "batch at {begin}: {losses:?}");
        assert!(!losses.is_empty(), "batch at {begin}");
    }
}

/// With the ring overwritten too, what only the lost batch held is missing, and said to be.
#[test]
fn what_neither_journal_nor_ring_holds_is_lost_and_the_rest_is_not() {
    let (disk, name, begins) = three_batches();
    let image = disk.snapshot_image();
    let mut found = Vec::new();
    for &begin in begins.iter().skip(2) {
        let damaged = SimDisk::from_image(&image, 3);
        damaged.corrupt(&name, begin as u64 + 70, 1).unwrap();
        let ring = damaged.file_names().into_iter().find(|name| rings::is_ring(name)).unwrap();
        let mut bytes = damaged.file(&ring).unwrap();
        bytes[4096..].fill(0);
        damaged.put(&ring, &bytes);
        let (used, losses) = salvaged(&damaged);
        assert!(!losses.is_empty(), "batch at {begin}");
        found.push(used);
    }
    // Each of the three consumes was lost once; a mark holds none.
    for lost in [1, 2, 4] {
        assert!(found.contains(&(7 - lost)), "{lost} is not missing in {found:?}");
    }
}

/// The batch that defined a quota is lost, and a later quota is known: salvage said that the sums
/// of the first are lost, and counted them under the name that keeps its id.
#[test]
fn what_was_counted_under_a_lost_definition_is_left_out() {
    let disk = SimDisk::new(1);
    let owner = Owner::open_on(&disk.storage(), small()).unwrap();
    let counted = |name: &str| {
        let quota = owner.engine.define(&Quota::new(name, 1 << 40)).unwrap();
        let counted = owner.engine.counted(1, quota).unwrap();
        owner.engine.consume(&counted, 5, true).unwrap();
        owner.engine.set_limit(&counted, Some(1 << 30)).unwrap();
        quota
    };
    let quotas = [counted("lost"), counted("kept")];
    owner.engine.sync().unwrap();
    disk.kill();
    drop(owner);
    let name = journal(&disk).pop().unwrap();
    let bytes = disk.file(&name).unwrap();
    let defines = bytes.windows(4).position(|window| window == b"lost").unwrap();
    disk.corrupt(&name, defines as u64, 1).unwrap();

    let target = SimDisk::new(2);
    let (salvage, _) = salvage_on(&disk.storage(), &target.storage(), NOW).unwrap();
    let is_said = |loss: &Finding| loss.what.contains("the definition of quota #0 is lost");
    assert!(salvage.losses.iter().any(is_said), "{:?}", salvage.losses);
    let owner = Owner::open_on(&target.storage(), small()).unwrap();
    let usage = quotas.map(|quota| owner.engine.usage(&owner.engine.counted(1, quota).unwrap()));
    assert_eq!(usage.map(|usage| (usage.used, usage.limit)), [(0, 0), (5, 1 << 30)]);
}

/// A loss of power has left the end of a reservation and not its beginning, which the recovery
/// after it has set right: salvage once did it again, and counted what was reserved as used.
#[test]
fn what_a_recovery_has_set_right_is_not_set_right_again() {
    let disk = SimDisk::new(1);
    let owner = Owner::open_on(&disk.storage(), small().lanes(2)).unwrap();
    let quota = owner.engine.define(&Quota::new("requests", 1 << 40)).unwrap();
    let counted = owner.engine.counted(1, quota).unwrap();
    owner.engine.consume(&counted, 100, true).unwrap();
    prefer(0);
    let item = Consume { user: 1, quota, amount: 30 };
    let id = owner.engine.reserve(&[item], Duration::from_secs(60)).unwrap().unwrap();
    prefer(1);
    owner.engine.cancel(id).unwrap();
    disk.kill();
    drop(owner);
    // Whichever lane it was in: what is read first is the consume, which the journal holds.
    let lost = disk.file_names().into_iter().find(|name| name.starts_with("lane-000")).unwrap();
    let mut bytes = disk.file(&lost).unwrap();
    bytes[4096..].fill(0);
    disk.put(&lost, &bytes);
    disk.power_cut_with(&mut |choice| choice.newest);

    for life in 0..2 {
        let owner = Owner::open_on(&disk.storage(), small().lanes(2)).unwrap();
        let used = owner.engine.usage(&owner.engine.counted(1, quota).unwrap()).used;
        assert_eq!(used, 100, "life {life}");
        assert_eq!(owner.engine.report().corrected, u64::from(life == 0), "life {life}");
        disk.kill();
        drop(owner);
        let (used, losses) = salvaged(&disk);
        assert_eq!((used, &losses[..]), (100, &[][..]), "life {life}");
    }
}

/// The beginning of a reservation was in a batch that is lost. The recovery after it knew it, and
/// had nothing to set right.
#[test]
fn an_end_whose_beginning_is_lost_gives_nothing_back() {
    let disk = SimDisk::new(1);
    let (owner, _) = count(&disk, 100, true);
    let quota = owner.engine.define(&Quota::new("requests", 1 << 40)).unwrap();
    let item = Consume { user: 1, quota, amount: 30 };
    let id = owner.engine.reserve(&[item], Duration::from_secs(60)).unwrap().unwrap();
    owner.engine.sync().unwrap();
    owner.engine.cancel(id).unwrap();
    owner.engine.sync().unwrap();
    disk.kill();
    drop(owner);
    let name = journal(&disk).pop().unwrap();
    drop(Owner::open_on(&disk.storage(), small()).unwrap());
    disk.kill();

    let bytes = disk.file(&name).unwrap();
    let has_ledger = |&at: &usize| bytes[at..].starts_with(b"TGB2");
    let opens = (0..bytes.len()).step_by(BATCH_ALIGN).find(has_ledger).unwrap();
    disk.corrupt(&name, opens as u64 + 70, 1).unwrap();
    let ring = disk.file_names().into_iter().find(|name| rings::is_ring(name)).unwrap();
    let mut bytes = disk.file(&ring).unwrap();
    bytes[4096..].fill(0);
    disk.put(&ring, &bytes);
    let (used, losses) = salvaged(&disk);
    assert_eq!(used, 100, "{losses:?}");
    assert!(!losses.is_empty());
}

/// The batches of the last two lives are lost, and with them which generations these were: salvage
/// went on with the same, and a client that had kept an id settled another's reservation. So it did
/// in a directory that was made anew.
#[test]
fn no_id_is_given_again_after_a_salvage_or_in_another_directory() {
    const EACH: usize = 100;
    let reserve = |disk: &Arc<SimDisk>| {
        let owner = Owner::open_on(&disk.storage(), small().lane_records(1 << 10)).unwrap();
        let quota = owner.engine.define(&Quota::new("requests", 1 << 40)).unwrap();
        let item = Consume { user: 1, quota, amount: 1 };
        let reserve = || owner.engine.reserve(&[item], Duration::from_secs(60)).unwrap().unwrap();
        let ids: Vec<_> = std::iter::repeat_with(reserve).take(EACH).collect();
        owner.engine.sync().unwrap();
        disk.kill();
        ids
    };
    let disk = SimDisk::new(1);
    let mut given: Vec<_> = (0..3).flat_map(|_| reserve(&disk)).collect();
    for name in journal(&disk).iter().skip(1) {
        let bytes = disk.file(name).unwrap();
        let at = (0..bytes.len()).step_by(BATCH_ALIGN);
        let begins = at.filter(|&at| bytes[at..].starts_with(b"TGB"));
        begins.for_each(|at| disk.corrupt(name, at as u64 + 70, 1).unwrap());
    }
    let target = SimDisk::new(2);
    salvage_on(&disk.storage(), &target.storage(), NOW).unwrap();
    for disk in [target, SimDisk::new(3), SimDisk::new(4)] {
        for id in reserve(&disk) {
            assert!(!given.contains(&id), "{id} was given before, of {}", given.len());
            given.push(id);
        }
    }
}

/// What user 1 may use in a day.
const DAILY: u64 = 10;

/// A life with the clock at `now`, which forgets windows that are over by more than a minute.
fn life_at(disk: &Arc<SimDisk>, now: Timestamp) -> (Owner, QuotaId) {
    let config = small().closed_window_retention(Duration::from_mins(1));
    let config = config.clock(Arc::new(ManualClock::new(now)));
    let owner = Owner::open_on(&disk.storage(), config).unwrap();
    let quota = owner.engine.define(&Quota::new("daily", DAILY).window(Window::Day)).unwrap();
    (owner, quota)
}

/// A new directory was taken for one that does not read back, since an open of it says what an open
/// of the old one said: that the clock was ahead when counters were used, or windows forgotten.
#[test]
fn what_a_clock_that_was_ahead_left_is_salvaged() {
    const YEARS: Duration = Duration::from_hours(10 * 365 * 24);
    for (ahead, merges) in [(YEARS, false), (YEARS, true), (Duration::from_hours(25), true)] {
        let disk = SimDisk::new(1);
        for (now, amount) in [(NOW, 3), (NOW.saturating_add(ahead), DAILY), (NOW, 1)] {
            let (owner, quota) = life_at(&disk, now);
            let counted = owner.engine.counted(1, quota).unwrap();
            let _ = owner.engine.try_consume(&counted, amount, true).unwrap();
            if merges && now > NOW {
                owner.engine.snapshot().unwrap();
            }
            disk.kill();
        }
        let target = SimDisk::new(2);
        let (salvage, _) = salvage_on(&disk.storage(), &target.storage(), NOW).unwrap();
        assert_eq!((salvage.damage, salvage.losses), (vec![], vec![]));
        let opened = |disk: &Arc<SimDisk>, now| {
            let (owner, quota) = life_at(disk, now);
            let used = owner.engine.usage(&owner.engine.counted(1, quota).unwrap()).used;
            let findings = owner.engine.report().findings.iter();
            let result = (used, findings.map(|finding| finding.what.clone()).collect::<Vec<_>>());
            disk.kill();
            result
        };
        for now in [NOW, NOW.saturating_add(ahead)] {
            let [old, new] = [&disk, &target]
                .map(|disk| opened(&SimDisk::from_image(&disk.snapshot_image(), 3), now));
            assert_eq!(new.0, old.0, "{ahead:?}, {merges}: {new:?}, {old:?}");
            assert_eq!(new.1.len(), usize::from(now == NOW), "{ahead:?}, {merges}: {new:?}");
        }
    }
}

/// A life that writes a snapshot, and counts two.
fn merging_life(disk: &Arc<SimDisk>) {
    let (owner, _) = count(disk, 1, true);
    owner.engine.snapshot().unwrap();
    // Durable behind the snapshot: the next file begins after it.
    let quota = owner.engine.define(&Quota::new("requests", 1 << 40)).unwrap();
    let counted = owner.engine.counted(1, quota).unwrap();
    owner.engine.consume(&counted, 1, true).unwrap();
    owner.close().unwrap();
    disk.kill();
}

/// The first file was needed no more and could not be removed, and the process died when those
/// behind it had gone. That was once said to be damage, and a loss.
#[test]
fn a_file_that_could_not_be_removed_is_neither_damage_nor_a_loss() {
    let disk = SimDisk::new(1);
    merging_life(&disk);
    let name = FileSequence(1).file_name();
    let first = disk.file(&name).unwrap();
    (0..4).for_each(|_| merging_life(&disk));
    [2, 3].iter().for_each(|&sequence| {
        disk.delete(&FileSequence(sequence).file_name());
    });
    disk.put(&name, &first);
    let look = |disk: &Arc<SimDisk>| {
        let (verification, _) = verify_on(&disk.storage(), NOW).unwrap();
        let (salvage, _) = salvage_on(&disk.storage(), &SimDisk::new(2).storage(), NOW).unwrap();
        let is_missing = |loss: &Finding| loss.what.contains("it is missing");
        (verification, salvage.losses.iter().any(is_missing), salvage)
    };
    let (verification, _, salvage) = look(&disk);
    assert!(matches!(verification.verdict, Verdict::Sound), "{verification:?}");
    let file = verification.files.iter().find(|file| file.name == name).unwrap();
    assert!(file.holds.contains("needed no more"), "{file:?}");
    assert_eq!((salvage.damage, salvage.losses), (vec![], vec![]));

    // But what a sink needs, or what is needed behind the older snapshot, was taken away.
    let behind = SimDisk::from_image(&disk.snapshot_image(), 3);
    let confirmed = Some(ChainPoint { number: BatchNumber(1), check: 0 });
    let sink = SinkState { confirmed, ..SinkState::new("billing") };
    sink.save(&behind.storage(), salvage.source_engine_id).unwrap();
    let (verification, is_missing, _) = look(&behind);
    assert!(matches!(verification.verdict, Verdict::Weakened) && is_missing, "{verification:?}");
    behind.put(&sinks::file_name("billing"), b"damaged");
    assert!(look(&behind).1);
    let needed = SimDisk::from_image(&disk.snapshot_image(), 3);
    let files = journal(&needed);
    assert!(needed.delete(&files[files.len() - 2]));
    let (verification, is_missing, _) = look(&needed);
    assert!(matches!(verification.verdict, Verdict::Weakened) && is_missing, "{verification:?}");

    let (owner, used) = count(&disk, 1, true);
    assert_eq!(used, 11);
    while disk.file(&name).is_some() {
        std::thread::sleep(Duration::from_millis(5));
    }
    owner.close().unwrap();
}

/// What would be missed is said: parts of a backlog, and the journal behind the older snapshot.
#[test]
fn what_is_missing_to_go_on_from_is_seen_by_verify() {
    let said = |disk: &Arc<SimDisk>, now: Timestamp, name: &str| {
        let (verification, _) = verify_on(&disk.storage(), now).unwrap();
        let is_weakened = matches!(verification.verdict, Verdict::Weakened);
        let file = verification.files.into_iter().find(|file| file.name == name).unwrap();
        (is_weakened, file.damage.map(|(_, what)| what).unwrap_or_default())
    };
    let golden = golden::load("v1/sinks");
    for part in golden.files.keys().filter(|name| name.starts_with("backlog-")) {
        let disk = golden.disk();
        assert!(disk.delete(part));
        let sink = part.split('-').nth(1).unwrap();
        let (is_weakened, what) = said(&disk, golden.now, &format!("sink-{sink}.tgp"));
        assert!(is_weakened && what.contains(part), "{part}: {what}");
    }

    let disk = SimDisk::new(1);
    (0..3).for_each(|_| merging_life(&disk));
    let snapshots = disk.file_names().into_iter().filter(|name| name.starts_with("snapshot-"));
    let [older, newer] = &snapshots.collect::<Vec<_>>()[..] else { panic!("two snapshots") };
    assert_eq!(said(&disk, NOW, older), (false, String::new()));
    // The last file holds the newer snapshot's batch, and those before it the older one's.
    let files = journal(&disk);
    let (_, before_last) = files.split_last().unwrap();
    assert!(!before_last.is_empty() && before_last.iter().all(|name| disk.delete(name)));
    let (is_weakened, what) = said(&disk, NOW, older);
    assert!(is_weakened && what.contains("the journal begins after"), "{what}");
    assert_eq!(said(&disk, NOW, newer), (true, String::new()));
}

/// Events that only a backlog holds, or batches before the snapshot, whatever became of the sink's
/// state. Nothing was said of those in batches, nor of a backlog whose state is damaged.
#[test]
fn events_that_no_sink_has_are_a_loss() {
    for merges in [1, 4] {
        events_are_a_loss(merges);
    }
}

fn events_are_a_loss(merges: usize) {
    let disk = SimDisk::new(1);
    let sinks = vec![("billing".to_owned(), Box::new(MemoryStore::new().sink()) as _)];
    Owner::open_with(&disk.storage(), small(), sinks).unwrap().close().unwrap();
    let (owner, _) = count(&disk, 1, true);
    let quota = owner.engine.define(&Quota::new("requests", 1 << 40)).unwrap();
    owner.engine.record(&UsageEvent::new(1, quota, 2.0, NOW)).unwrap();
    for _ in 0..merges {
        owner.engine.snapshot().unwrap();
        let counted = owner.engine.counted(2, quota).unwrap();
        owner.engine.consume(&counted, 1, true).unwrap();
    }
    owner.close().unwrap();
    let mut names = disk.file_names().into_iter();
    assert_eq!(names.any(|name| name.starts_with("backlog-billing")), merges > 1);
    let state = "sink-billing.tgp";
    let whole = disk.file(state).unwrap();
    for left in [Some(whole.len()), Some(whole.len() - 1), None] {
        let damaged = SimDisk::from_image(&disk.snapshot_image(), 3);
        match left {
            Some(len) => damaged.put(state, &whole[..len]),
            None => assert!(damaged.delete(state)),
        }
        let (used, losses) = salvaged(&damaged);
        assert_eq!(used, 3);
        let is_said = |loss: &Finding| loss.path.ends_with(state) && loss.what.contains("event");
        // Without a state, and without a backlog, nobody knows of the sink.
        let is_known = left.is_some() || merges > 1;
        assert_eq!(losses.iter().any(is_said), is_known, "{merges}, {left:?}: {losses:?}");
    }
}

/// The only file that was in use, or the end of it. Once neither was said to be a loss, while what
/// was counted was made up for by the rings.
#[test]
fn limits_in_a_lost_end_of_the_journal_are_a_loss() {
    let disk = SimDisk::new(1);
    let (owner, _) = count(&disk, 1, true);
    owner.engine.snapshot().unwrap();
    let quota = owner.engine.define(&Quota::new("requests", 1 << 40)).unwrap();
    let counted = owner.engine.counted(1, quota).unwrap();
    owner.engine.set_limit(&counted, Some(7)).unwrap();
    disk.kill();
    drop(owner);
    let name = journal(&disk).pop().unwrap();
    let bytes = disk.file(&name).unwrap();
    for len in [None, Some(FILE_HEADER_BYTES), Some(4096)] {
        let damaged = SimDisk::from_image(&disk.snapshot_image(), 3);
        match len {
            Some(len) => damaged.put(&name, &bytes[..len]),
            None => assert!(damaged.delete(&name)),
        }
        let (used, losses) = salvaged(&damaged);
        assert!(used == 1 && !losses.is_empty(), "{len:?}: {used}, {losses:?}");
    }
}

/// A total that no correction of 128 bits leads back from.
#[test]
fn a_made_up_sum_is_damage() {
    let golden = golden::load("v1/snapshot");
    let disk = golden.disk();
    let engine = identity::read(&disk.storage()).unwrap().unwrap().engine;
    let name = golden.files.keys().rfind(|name| name.starts_with("snapshot-")).unwrap();
    let mut reader = SnapshotReader::open_named(&disk.storage(), engine, name).unwrap();
    let other = SimDisk::new(5);
    let mut writer = SnapshotWriter::create(&other.storage(), engine, reader.manifest()).unwrap();
    let mut last = None;
    while let Some(sum) = reader.next_sum().unwrap() {
        writer.write_sum(sum).unwrap();
        last = Some(sum.key);
    }
    let mut key = last.unwrap();
    key.user += 1_000_000;
    writer.write_sum(Sum { key, amount: i128::MIN }).unwrap();
    writer.finish().unwrap();
    disk.put(name, &other.file(name).unwrap());
    let (verification, _) = verify_on(&disk.storage(), golden.now).unwrap();
    let says = format!("{:?}", (verification.verdict, verification.report.findings));
    assert!(says.contains("has used -170"), "{says}");
}

/// Sums that verify but are others than the journal's: a fault of a program, or of a hand.
#[test]
fn a_snapshot_that_disagrees_with_the_journal_is_seen_by_verify() {
    let golden = golden::load("v1/snapshot");
    let disk = golden.disk();
    let storage = disk.storage();
    let engine = identity::read(&storage).unwrap().unwrap().engine;
    let name = golden.files.keys().rfind(|name| name.starts_with("snapshot-")).unwrap();
    let mut reader = SnapshotReader::open_named(&storage, engine, name).unwrap();
    let other = SimDisk::new(5);
    let mut writer = SnapshotWriter::create(&other.storage(), engine, reader.manifest()).unwrap();
    let mut is_first = true;
    while let Some(Sum { key, amount }) = reader.next_sum().unwrap() {
        writer.write_sum(Sum { key, amount: amount + i128::from(is_first) }).unwrap();
        is_first = false;
    }
    writer.finish().unwrap();
    let (verification, _) = verify_on(&storage, golden.now).unwrap();
    assert!(matches!(verification.verdict, Verdict::Sound), "{verification:?}");
    disk.put(name, &other.file(name).unwrap());
    let (verification, _) = verify_on(&disk.storage(), golden.now).unwrap();
    assert!(matches!(verification.verdict, Verdict::Weakened), "{verification:?}");
    let file = verification.files.iter().find(|file| file.name == *name).unwrap();
    let (_, what) = file.damage.as_ref().unwrap();
    assert!(what.contains("a sum is other than"), "{what}");
}

/// Sectors that can't be read are damage like any other: once, one of them ended a salvage, and a
/// look at the others, wherever it lay.
#[test]
fn what_can_not_be_read_ends_neither_a_salvage_nor_a_look() {
    let disk = SimDisk::new(1);
    let (owner, _) = count(&disk, 1, true);
    let quota = owner.engine.define(&Quota::new("requests", 1 << 40)).unwrap();
    let counted = owner.engine.counted(1, quota).unwrap();
    for _ in 0..2 {
        owner.engine.consume(&counted, 1, true).unwrap();
        owner.engine.snapshot().unwrap();
    }
    owner.engine.consume(&counted, 1, false).unwrap();
    disk.kill();
    drop(owner);
    let image = disk.snapshot_image();
    let names = disk.file_names();
    let newest = |prefix: &str| names.iter().filter(|name| name.starts_with(prefix)).max().unwrap();
    let in_use = journal(&disk).pop().unwrap();
    let cases = [
        (newest("snapshot-"), 4, 0),
        (&in_use, 4, 1),
        // What lies in the ring only.
        (newest("lane-"), 3, 1),
        (newest("tollgate.id"), 4, 0),
    ];
    for (name, expected, losses_min) in cases {
        for call in [Call::Open, Call::Length, Call::Read] {
            let bad = SimDisk::from_image(&image, 3);
            let name: &'static str = Box::leak(name.clone().into_boxed_str());
            let break_it = || {
                for nth in 0..1000 {
                    bad.inject(Fault::new(call, nth, Outcome::Eio).on(name));
                }
            };
            break_it();
            let (used, losses) = salvaged(&bad);
            assert_eq!(used, expected, "{name}, {call:?}: {losses:?}");
            assert!(losses.len() >= losses_min, "{name}, {call:?}: {losses:?}");
            bad.clear_faults();
            break_it();
            let (verification, _) = verify_on(&bad.storage(), NOW).unwrap();
            let file = verification.files.iter().find(|file| file.name == name).unwrap();
            assert!(file.damage.is_some(), "{name}, {call:?}: {verification:?}");
        }
    }
    // Of the ring only what is behind its header: it looks as if nothing had been written there.
    let ring: &'static str = Box::leak(newest("lane-").clone().into_boxed_str());
    for nth in 3..1000 {
        disk.inject(Fault::new(Call::Read, nth, Outcome::Eio).on(ring));
    }
    let (used, losses) = salvaged(&disk);
    assert_eq!(used, 3);
    assert!(losses.iter().any(|loss| loss.what.contains("what lay there")), "{losses:?}");
}

/// It was refused, and each file was said to be sound: what an open could not read lay behind the
/// last batch, and its error named the file without its directory.
#[test]
fn what_is_refused_for_a_bad_sector_names_the_file() {
    let (disk, name, _) = three_batches();
    let image = disk.snapshot_image();
    let name: &'static str = Box::leak(name.into_boxed_str());
    let mut refused = 0;
    for nth in 0..12 {
        let bad = SimDisk::from_image(&image, 3);
        bad.inject(Fault::new(Call::Read, nth, Outcome::Eio).on(name));
        let (verification, _) = verify_on(&bad.storage(), NOW).unwrap();
        if let Verdict::Refused(error) = &verification.verdict {
            refused += 1;
            assert!(error.names(&bad.storage().path(name)), "{error}");
            let file = verification.files.iter().find(|file| file.name == name).unwrap();
            assert!(file.damage.is_some(), "{nth}: {error}");
        }
    }
    assert!(refused > 5, "{refused}");
}

/// The look ended where it came to what is kept for the sink.
#[test]
fn a_sinks_state_that_can_not_be_read_does_not_end_a_look() {
    let golden = golden::load("v1/sinks");
    for call in [Call::Open, Call::Length, Call::Read] {
        let disk = golden.disk();
        disk.inject(Fault::new(call, 0, Outcome::Eio).on("sink-billing").lasting());
        let (verification, _) = verify_on(&disk.storage(), golden.now).unwrap();
        let Verdict::Refused(error) = &verification.verdict else { panic!("{verification:?}") };
        assert!(error.is_bad_medium(), "{error}");
        let damaged = verification.files.iter().filter(|file| file.damage.is_some());
        assert!(damaged.map(|file| &*file.name).eq(["sink-billing.tgp"]), "{verification:?}");
    }
}
