//! Files that are prepared and taken, and what is proven of damaged ones.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::codec::encoded_sums;
use crate::error::Error;
use crate::fold::{Sum, SumKey};
use crate::journal::batch::{self, Batch, BatchContent, LaneSpan};
use crate::journal::files::{FILE_HEADER_BYTES, FileHeader, FileSequence};
use crate::journal::found::find_files;
use crate::journal::pool::{IndexEntry, JournalFiles};
use crate::journal::proof::{find_candidates, prove};
use crate::journal::reader::{ChainEnd, Cursor, read_chain};
use crate::journal::writer::{ChainPoint, Encoded, JournalWriter};
use crate::model::{BatchNumber, EngineId, QuotaId, Timestamp, WindowStart};
use crate::storage::StorageFile;
use crate::storage::sim::{Call, Fault, Outcome, SimDisk};

const ENGINE: EngineId = EngineId(7);

fn batch(number: u64, bytes: u64) -> Encoded {
    let bytes = vec![1; usize::try_from(bytes).unwrap()];
    Encoded { number: BatchNumber(number), check: 0, bytes }
}

/// A configuration with larger files meets the small ones that were prepared before it, and the
/// first file of an open is small when it is reused. Once, the first large batch then found no room
/// for ever.
#[test]
fn a_batch_that_no_prepared_file_has_room_for_gets_a_larger_one() {
    let storage = SimDisk::new(0).storage();
    let files = |bytes, spares| {
        Arc::new(JournalFiles::new(Arc::clone(&storage), ENGINE, bytes, Vec::new(), spares))
    };
    files(4096, Vec::new()).prepare().unwrap();
    let found = find_files(&storage, ENGINE).unwrap();
    assert_eq!(found.prepared.len(), 2);

    let larger = 64 << 10;
    let files = files(larger, found.prepared);
    let mut writer = JournalWriter::begin(Arc::clone(&files), ChainPoint::START, &[]).unwrap();
    writer.append(&batch(1, 2048)).unwrap();
    assert!(!writer.has_room(8192), "the files at hand are too small");
    assert!(writer.append(&batch(2, 8192)).is_err());
    files.prepare().unwrap();
    assert!(writer.has_room(8192));
    writer.append(&batch(2, 8192)).unwrap();
    writer.append(&batch(3, larger - 8192 - FILE_HEADER_BYTES as u64)).unwrap();
    let found = find_files(&storage, ENGINE).unwrap();
    let sequences: Vec<_> = found.in_use.iter().map(|entry| entry.sequence.0).collect();
    assert_eq!(sequences, [1, 3], "the small one was passed over");
}

const SMALL: u64 = 4096;

/// An empty journal of files in each of which one batch has room.
fn small_files(disk: &Arc<SimDisk>) -> (Arc<JournalFiles>, JournalWriter) {
    let files = JournalFiles::new(disk.storage(), ENGINE, SMALL, Vec::new(), Vec::new());
    let files = Arc::new(files);
    files.prepare().unwrap();
    let writer = JournalWriter::begin(Arc::clone(&files), ChainPoint::START, &[]).unwrap();
    (files, writer)
}

/// The batch that fills a small file.
fn filling(number: u64) -> Encoded {
    batch(number, SMALL - FILE_HEADER_BYTES as u64)
}

/// A file that is needed no more and can't be given its new name is removed: once, it stayed
/// until the next open, of no use to anybody.
#[test]
fn a_file_that_can_not_be_reused_is_removed() {
    let disk = SimDisk::new(0);
    let (files, mut writer) = small_files(&disk);
    for number in 1..=2 {
        writer.append(&filling(number)).unwrap();
    }
    files.release_up_to(BatchNumber(1));
    disk.inject(Fault::new(Call::Rename, 0, Outcome::Eio).on("journal-"));
    files.prepare().unwrap_err();
    assert_eq!(disk.file_names(), [FileSequence(2).file_name()]);
    files.prepare().unwrap();
    assert_eq!(find_files(&disk.storage(), ENGINE).unwrap().prepared.len(), 2);
}

/// Nobody knew of it any more, so that it stayed until the next open.
#[test]
fn a_file_that_can_not_be_removed_just_now_is_removed_later() {
    let disk = SimDisk::new(0);
    let (files, mut writer) = small_files(&disk);
    for number in 1..=4 {
        writer.append(&filling(number)).unwrap();
        files.prepare().unwrap();
    }
    disk.inject(Fault::new(Call::Remove, 0, Outcome::Eio).on("journal-"));
    files.release_up_to(BatchNumber(1));
    files.prepare().unwrap_err();
    assert!(disk.file_names().contains(&FileSequence(1).file_name()));
    assert_eq!(files.bytes(), 6 * SMALL);
    // It is in nobody's way.
    files.prepare().unwrap();
    files.release_up_to(BatchNumber(2));
    files.prepare().unwrap();
    let names = [3, 4, 5, 6].map(|sequence| FileSequence(sequence).file_name());
    assert_eq!(disk.file_names(), names);
    assert_eq!(files.bytes(), 4 * SMALL);
}

/// It was too small to be reused, and the call that waited for a file got the error, though one
/// could be prepared.
#[test]
fn who_waits_for_a_file_has_nothing_to_do_with_one_that_can_not_be_removed() {
    let disk = SimDisk::new(0);
    let one = real(1, 0, 1, ChainPoint::START);
    let two = real(2, 0, 1, one.point());
    put(&disk, 1, ChainPoint::START, &[&one]);
    put(&disk, 2, one.point(), &[&two]);
    let found = find_files(&disk.storage(), ENGINE).unwrap();
    let files = found.into_files(disk.storage(), ENGINE, 8192).unwrap();
    files.release_up_to(BatchNumber(1));
    disk.inject(Fault::new(Call::Remove, 0, Outcome::Eio).on("journal-"));
    files.provide_spare().unwrap();
    // The preparer says it, once it has prepared the other.
    let error = files.prepare().unwrap_err().to_string();
    assert!(error.contains(&FileSequence(1).file_name()), "{error}");
    assert_eq!(find_files(&disk.storage(), ENGINE).unwrap().prepared.len(), 2);
    files.prepare().unwrap();
    assert_eq!(files.bytes(), 2 * 4096 + 2 * 8192, "it is still there");
}

/// Whoever waits for a file needs one, also where the disk has no room for the second.
#[test]
fn one_file_is_enough_for_who_waits_for_it() {
    let disk = SimDisk::new(0);
    let files = JournalFiles::new(disk.storage(), ENGINE, 4096, Vec::new(), Vec::new());
    files.provide_spare().unwrap();
    assert_eq!(find_files(&disk.storage(), ENGINE).unwrap().prepared.len(), 1);
    disk.inject(Fault::new(Call::Create, 0, Outcome::Enospc));
    files.provide_spare().unwrap();
    files.prepare().unwrap_err();
}

/// A file that did not fit took all that was left on the disk, for a moment and again and again,
/// and other programs found none.
#[test]
fn a_file_that_does_not_fit_is_not_begun() {
    let disk = SimDisk::new(0);
    let storage = disk.storage();
    let files = JournalFiles::new(storage, ENGINE, 4096, Vec::new(), Vec::new());
    disk.set_capacity(4096 + 4095);
    disk.inject(Fault::new(Call::Create, 1, Outcome::Eio));
    let error = files.prepare().unwrap_err();
    assert!(error.is_disk_full(), "{error}");
    disk.clear_faults();
    disk.set_capacity(4096 + 4096);
    files.prepare().unwrap();
}

/// Every byte of a batch lies under a checksum or is known: also what only says how much was
/// durable, and the padding.
#[test]
fn no_flipped_bit_of_a_batch_passes() {
    let key = SumKey { quota: QuotaId(1), window: WindowStart(0), user: 7 };
    let content = BatchContent {
        number: BatchNumber(5),
        durable: BatchNumber(3),
        time: Timestamp::from_unix_millis(9),
        previous_check: 11,
        spans: &[LaneSpan { lane: 0, from: 3, to: 8, next: 64 }],
        ledger: &[],
        cold: &[],
        sums: &encoded_sums(&[Sum { key, amount: 40 }]),
    };
    let (bytes, _) = batch::encode(ENGINE, &content).unwrap();
    assert!(Batch::decode(ENGINE, &bytes).is_ok());
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(Batch::decode(ENGINE, &flipped).is_err(), "bit {bit}");
    }
}

/// An empty batch; `time` tells two of the same number apart.
fn real(number: u64, durable: u64, time: u64, previous: ChainPoint) -> Encoded {
    let content = BatchContent {
        number: BatchNumber(number),
        durable: BatchNumber(durable),
        time: Timestamp::from_unix_millis(time),
        previous_check: previous.check,
        spans: &[],
        ledger: &[],
        cold: &[],
        sums: &[],
    };
    let (bytes, check) = batch::encode(ENGINE, &content).unwrap();
    Encoded { number: content.number, check, bytes }
}

fn put(disk: &SimDisk, sequence: u64, previous: ChainPoint, batches: &[&Encoded]) {
    let sequence = FileSequence(sequence);
    let (bytes, previous_check) = (4096, previous.check);
    let header = FileHeader::InUse { sequence, bytes, previous: previous.number, previous_check };
    let mut file = header.encode(ENGINE).to_vec();
    batches.iter().for_each(|batch| file.extend_from_slice(&batch.bytes));
    file.resize(4096, 0);
    disk.put(&sequence.file_name(), &file);
}

/// A loss of power has torn batch 2 out of the first file and left 3 and 4; the next open wrote
/// another 2 to a second file, and went on. The first 3 and 4 are never taken, whatever is damaged
/// in the second file, though they verify: what they hold the others hold too.
#[test]
fn batches_that_were_replaced_are_never_proven() {
    let one = real(1, 0, 1, ChainPoint::START);
    let torn = real(2, 1, 1, one.point());
    let stale = real(3, 1, 1, torn.point());
    let stale_mark = real(4, 3, 1, stale.point());
    let two = real(2, 1, 2, one.point());
    let three = real(3, 1, 2, two.point());
    let four = real(4, 3, 2, three.point());
    let second = [&two, &three, &four];
    let proven = |damaged: Option<usize>, header_is_damaged: bool| -> Vec<_> {
        let disk = SimDisk::new(0);
        put(&disk, 1, ChainPoint::START, &[&one, &stale, &stale_mark]);
        put(&disk, 2, one.point(), &second);
        let name = FileSequence(2).file_name();
        if let Some(index) = damaged {
            let before: usize = second[..index].iter().map(|batch| batch.bytes.len()).sum();
            disk.corrupt(&name, (FILE_HEADER_BYTES + before + 8) as u64, 1).unwrap();
        }
        if header_is_damaged {
            disk.corrupt(&name, 8, 1).unwrap();
        }
        let storage = disk.storage();
        let candidates = find_candidates(&storage, ENGINE).unwrap();
        let proof = prove(&storage, ENGINE, &candidates, ChainPoint::START, &[]).unwrap();
        proof.batches.iter().map(|place| place.point).collect()
    };
    let [one, two, three, four] = [&one, &two, &three, &four].map(Encoded::point);
    for header_is_damaged in [false, true] {
        assert_eq!(proven(None, header_is_damaged), [one, two, three, four]);
        // The last one says that the third was durable.
        assert_eq!(proven(Some(0), header_is_damaged), [one, three, four]);
        assert_eq!(proven(Some(1), header_is_damaged), [one, two, four]);
        assert_eq!(proven(Some(2), header_is_damaged), [one, two, three]);
    }
}

/// A tail that no sync had covered lay in two files, and the next open replaced it: what the second
/// file says of where it begins counts no more, though its header verifies.
#[test]
fn where_a_replaced_file_began_proves_nothing() {
    let one = real(1, 0, 1, ChainPoint::START);
    let torn = real(2, 1, 1, one.point());
    let stale = real(3, 1, 1, torn.point());
    let stale_too = real(4, 1, 1, stale.point());
    let two = real(2, 1, 2, one.point());
    let three = real(3, 1, 2, two.point());
    let four = real(4, 3, 2, three.point());
    let five = real(5, 3, 2, four.point());
    let real = [&two, &three, &four, &five];
    let proven = |damaged: &[usize]| -> Vec<_> {
        let disk = SimDisk::new(0);
        put(&disk, 1, ChainPoint::START, &[&one, &torn, &stale]);
        let within = (FILE_HEADER_BYTES + one.bytes.len() + 8) as u64;
        disk.corrupt(&FileSequence(1).file_name(), within, 1).unwrap();
        put(&disk, 2, stale.point(), &[&stale_too]);
        put(&disk, 3, one.point(), &real);
        for &index in damaged {
            let before: usize = real[..index].iter().map(|batch| batch.bytes.len()).sum();
            let within = (FILE_HEADER_BYTES + before + 8) as u64;
            disk.corrupt(&FileSequence(3).file_name(), within, 1).unwrap();
        }
        let storage = disk.storage();
        let candidates = find_candidates(&storage, ENGINE).unwrap();
        let proof = prove(&storage, ENGINE, &candidates, ChainPoint::START, &[]).unwrap();
        proof.batches.iter().map(|place| place.point).collect()
    };
    let [two, three, four, five] = real.map(Encoded::point);
    assert_eq!(proven(&[]), [one.point(), two, three, four, five]);
    // The last one says that the third was durable.
    assert_eq!(proven(&[1, 2]), [one.point(), two, five]);
}

fn chain_of(disk: &Arc<SimDisk>) -> crate::error::Result<ChainEnd> {
    let storage = disk.storage();
    let found = find_files(&storage, ENGINE)?;
    read_chain(&storage, ENGINE, &found, ChainPoint::START, &mut |_| Ok(()))
}

/// A batch that has the next number but follows another one is none of this chain.
#[test]
fn a_batch_that_follows_another_one_ends_the_journal() {
    let one = real(1, 0, 1, ChainPoint::START);
    let other = real(1, 0, 2, ChainPoint::START);
    let (two, stale) = (real(2, 0, 1, one.point()), real(2, 0, 1, other.point()));
    for (second, last) in [(&two, &two), (&stale, &one)] {
        let disk = SimDisk::new(0);
        put(&disk, 1, ChainPoint::START, &[&one, second]);
        assert_eq!(chain_of(&disk).unwrap().last, last.point());
    }
}

/// Files go lowest first, so one that is missing among others was taken away, whatever the others
/// say of what was durable.
#[test]
fn a_file_that_is_missing_among_others_is_named() {
    let one = real(1, 0, 1, ChainPoint::START);
    let two = real(2, 0, 1, one.point());
    let three = real(3, 0, 1, two.point());
    for is_whole in [true, false] {
        let disk = SimDisk::new(0);
        put(&disk, 1, ChainPoint::START, &[&one]);
        if is_whole {
            put(&disk, 2, one.point(), &[&two]);
        }
        put(&disk, 3, two.point(), &[&three]);
        match chain_of(&disk) {
            Ok(end) => assert!(is_whole && end.last == three.point(), "{end:?}"),
            Err(Error::Damaged { path, .. }) => {
                assert!(!is_whole && path.ends_with(FileSequence(2).file_name()), "{path:?}");
            }
            Err(error) => panic!("{error}"),
        }
    }
}

/// What an application recorded: 64 bytes that are a header, with a length up to the file's end,
/// at a place where batches may begin.
fn with_a_header_inside(number: u64, previous: ChainPoint, inside: &Encoded) -> Encoded {
    let mut recorded = vec![0; 60];
    recorded.extend_from_slice(&inside.bytes[..64]);
    recorded.resize(200, 0);
    let content = BatchContent {
        number: BatchNumber(number),
        durable: BatchNumber(number - 1),
        time: Timestamp::from_unix_millis(1),
        previous_check: previous.check,
        spans: &[],
        ledger: &recorded,
        cold: &[],
        sums: &[],
    };
    let (bytes, check) = batch::encode(ENGINE, &content).unwrap();
    assert_eq!(bytes[128..192], inside.bytes[..64]);
    Encoded { number: content.number, check, bytes }
}

/// A header of a batch that is not there, which claims that others were durable.
fn claim(number: u64, durable: u64, len: usize) -> Encoded {
    let recorded = vec![1; len];
    let content = BatchContent {
        number: BatchNumber(number),
        durable: BatchNumber(durable),
        time: Timestamp::from_unix_millis(1),
        previous_check: 0,
        spans: &[],
        ledger: &recorded,
        cold: &[],
        sums: &[],
    };
    let (bytes, check) = batch::encode(ENGINE, &content).unwrap();
    Encoded { number: content.number, check, bytes }
}

/// A batch that a loss of power has torn was taken for one that had been durable, and the journal
/// refused, where what was recorded in it looks like the header of a later batch.
#[test]
fn what_was_recorded_in_a_torn_batch_proves_nothing() {
    let one = real(1, 0, 1, ChainPoint::START);
    let two = with_a_header_inside(2, one.point(), &claim(9, 5, 300));
    // In its header and in its body.
    for within in [8, 70] {
        let disk = SimDisk::new(0);
        put(&disk, 1, ChainPoint::START, &[&one, &two]);
        let at = FILE_HEADER_BYTES + one.bytes.len() + within;
        disk.corrupt(&FileSequence(1).file_name(), at as u64, 1).unwrap();
        let end = chain_of(&disk).unwrap();
        assert!(end.last == one.point() && end.torn.is_some(), "{within}: {end:?}");
    }
}

/// Nor does it hide the batches behind it, of which one says that it was durable.
#[test]
fn what_was_recorded_in_a_damaged_batch_hides_no_other() {
    let one = real(1, 0, 1, ChainPoint::START);
    let two = with_a_header_inside(2, one.point(), &claim(9, 5, 600));
    let three = real(3, 1, 1, two.point());
    let four = real(4, 3, 1, three.point());
    for within in [8, 70] {
        let disk = SimDisk::new(0);
        put(&disk, 1, ChainPoint::START, &[&one, &two, &three, &four]);
        let at = FILE_HEADER_BYTES + one.bytes.len() + within;
        disk.corrupt(&FileSequence(1).file_name(), at as u64, 1).unwrap();
        let refused = chain_of(&disk).unwrap_err().to_string();
        assert!(refused.contains("batch 2 was durable"), "{refused}");
        let storage = disk.storage();
        let candidates = find_candidates(&storage, ENGINE).unwrap();
        let proof = prove(&storage, ENGINE, &candidates, ChainPoint::START, &[]).unwrap();
        let proven: Vec<_> = proof.batches.iter().map(|place| place.point).collect();
        assert_eq!(proven, [one.point(), three.point(), four.point()], "{within}");
        assert!(proof.unproven.is_empty(), "{within}: {:?}", proof.unproven);
    }
}

/// A file that counts the bytes which are read from it.
#[derive(Debug)]
struct CountedFile {
    bytes: Vec<u8>,
    read: AtomicU64,
}

impl StorageFile for CountedFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.bytes.len() as u64)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.read.fetch_add(buf.len() as u64, Ordering::Relaxed);
        let offset = usize::try_from(offset).unwrap();
        buf.copy_from_slice(&self.bytes[offset..offset + buf.len()]);
        Ok(())
    }

    fn write_all_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn allocate(&self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A header of batch 8, with a body like this.
fn header_of(body_len: usize, body_crc: u32) -> Vec<u8> {
    let mut header = real(8, 7, 1, ChainPoint::START).bytes[..60].to_vec();
    header[4..8].copy_from_slice(&u32::try_from(body_len).unwrap().to_le_bytes());
    header[44..48].copy_from_slice(&body_crc.to_le_bytes());
    header.extend_from_slice(&crc32fast::hash(&header).to_le_bytes());
    header
}

/// Of headers that follow each other closely, each of a batch up to the file's end, every byte was
/// read once for each: an open took minutes for a file that somebody had made up.
#[test]
fn headers_of_batches_that_are_not_there_are_passed_over_quickly() {
    const FILE_BYTES: usize = 1 << 20;
    let last = real(9, 8, 1, ChainPoint::START);
    for has_checksums in [false, true] {
        let mut bytes = vec![0; FILE_BYTES];
        let mut at = FILE_BYTES - last.bytes.len();
        bytes[at..].copy_from_slice(&last.bytes);
        let mut rest = crc32fast::hash(&last.bytes);
        // From the last to the first: each holds all that come after it.
        while at > FILE_HEADER_BYTES {
            let check = if has_checksums { rest } else { !rest };
            let header = header_of(FILE_BYTES - at, check);
            let mut hasher = crc32fast::Hasher::new();
            hasher.update(&header);
            let behind = (FILE_BYTES - at) as u64;
            hasher.combine(&crc32fast::Hasher::new_with_initial_len(rest, behind));
            rest = hasher.finalize();
            at -= 64;
            bytes[at..at + 64].copy_from_slice(&header);
        }
        let file = Arc::new(CountedFile { bytes, read: AtomicU64::new(0) });
        let storage = SimDisk::new(0).storage();
        let entry = IndexEntry {
            sequence: FileSequence(1),
            file: Arc::clone(&file) as Arc<dyn StorageFile>,
            bytes: file.len().unwrap(),
            previous: ChainPoint { number: BatchNumber(3), check: 3 },
        };
        let mut cursor = Cursor::new(&storage, ENGINE, &entry);
        let number = cursor.find_batch().unwrap().map(|found| found.header.number.0);
        let read = file.read.load(Ordering::Relaxed);
        assert!(read < 8 * FILE_BYTES as u64, "{read} bytes were read");
        // What verifies behind them is found, unless it lies in what has its checksum.
        assert_eq!(number, (!has_checksums).then_some(9));
    }
}
