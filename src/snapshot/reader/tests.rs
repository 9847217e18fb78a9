//! That what is read is what was written, and that nothing else is ever read.

use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::journal::writer::ChainPoint;
use crate::model::AMOUNT_MAX;
use crate::snapshot::SnapshotWriter;
use crate::snapshot::codec::{put_limits_block, put_sums_block};
use crate::snapshot::testing::{ENGINE, TestDisk, manifest, sum};

const NUMBER: BatchNumber = BatchNumber(7);

/// What a snapshot holds.
type Content = (Manifest, Vec<Sum>, Vec<Limit>);

fn limit(quota: u16, user: u64, limit: u64) -> Limit {
    Limit { quota: QuotaId(quota), user, limit }
}

fn write(disk: &Arc<TestDisk>, content: &Content, block_bytes: usize) {
    let (manifest, sums, limits) = content;
    let storage: Arc<dyn Storage> = disk.clone();
    let mut writer = SnapshotWriter::create_with(&storage, ENGINE, manifest, block_bytes).unwrap();
    for &sum in sums {
        writer.write_sum(sum).unwrap();
    }
    for &limit in limits {
        writer.write_limit(limit).unwrap();
    }
    let info = writer.finish().unwrap();
    assert_eq!((info.sums, info.limits), (sums.len() as u64, limits.len() as u64));
    assert_eq!(info.bytes, disk.bytes(&file_name(info.point.number)).len() as u64);
    assert_eq!(storage.list().unwrap(), [file_name(info.point.number)]);
}

fn read(disk: &Arc<TestDisk>, engine: EngineId, number: BatchNumber) -> Result<Content> {
    let storage: Arc<dyn Storage> = disk.clone();
    let mut reader = SnapshotReader::open(&storage, engine, number)?;
    let (mut sums, mut limits) = (Vec::new(), Vec::new());
    while let Some(sum) = reader.next_sum()? {
        sums.push(sum);
    }
    assert_eq!(reader.sum_count(), sums.len() as u64);
    while let Some(limit) = reader.next_limit()? {
        limits.push(limit);
    }
    assert_eq!(reader.next_sum()?, None);
    Ok((reader.manifest().clone(), sums, limits))
}

fn read_bytes(bytes: Vec<u8>) -> Result<Content> {
    let disk = Arc::new(TestDisk::default());
    disk.put(&file_name(NUMBER), bytes);
    read(&disk, ENGINE, NUMBER)
}

/// Several blocks of each kind.
fn small() -> (Content, Vec<u8>) {
    let sums = vec![sum(1, 5, 3, 10), sum(1, 5, 9, -1), sum(1, 6, 3, 0), sum(2, 0, 1, i128::MIN)];
    let limits = vec![limit(1, 1, 0), limit(1, 2, 50), limit(2, u64::MAX, AMOUNT_MAX)];
    let content = (manifest(NUMBER.0), sums, limits);
    let disk = Arc::new(TestDisk::default());
    write(&disk, &content, 45);
    (content, disk.bytes(&file_name(NUMBER)))
}

fn is_refused(result: &Result<Content>) -> bool {
    matches!(result, Err(Error::Damaged { .. } | Error::UnsupportedVersion { .. }))
}

#[test]
fn every_flipped_bit_is_noticed() {
    let (content, bytes) = small();
    assert_eq!(read_bytes(bytes.clone()).unwrap(), content);
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << bit;
            let result = read_bytes(flipped);
            assert!(is_refused(&result), "bit {bit} of byte {at}: {result:?}");
        }
    }
}

#[test]
fn every_truncation_and_every_addition_is_refused() {
    let (_, bytes) = small();
    for len in 0..bytes.len() {
        let result = read_bytes(bytes[..len].to_vec());
        assert!(is_refused(&result), "{len} of {} bytes: {result:?}", bytes.len());
    }
    for more in [1, 20, 512] {
        let result = read_bytes([&bytes[..], &vec![0; more]].concat());
        assert!(is_refused(&result), "{more} bytes more: {result:?}");
    }
}

/// A crash can leave pages that were never written; a block must not vanish with its place taken
/// by another.
#[test]
fn zeroed_and_exchanged_pieces_are_refused() {
    let (_, bytes) = small();
    for len in [1, 20, 64, 512] {
        for at in 0..=bytes.len().saturating_sub(len) {
            let mut zeroed = bytes.clone();
            zeroed[at..at + len].fill(0);
            assert!(zeroed == bytes || is_refused(&read_bytes(zeroed)), "{len} bytes at {at}");
        }
    }
    let header = bytes.clone().into_iter().take(HEADER_BYTES).collect::<Vec<_>>();
    let header: [u8; HEADER_BYTES] = header.try_into().unwrap();
    let header = Header::decode(ENGINE, &header).unwrap();
    let (head, blocks) =
        bytes.split_at(HEADER_BYTES + usize::try_from(header.manifest_len).unwrap());
    // Whole blocks, in every order but the one they were written in.
    let mut pieces = Vec::new();
    let mut rest = blocks;
    while !rest.is_empty() {
        let block = BlockHeader::decode(rest, pieces.len() as u64).unwrap();
        let (piece, tail) = rest.split_at(BLOCK_HEADER_BYTES + block.len);
        pieces.push(piece);
        rest = tail;
    }
    assert!(pieces.len() > 4, "{} blocks", pieces.len());
    for first in 0..pieces.len() {
        for second in first + 1..pieces.len() {
            let mut order = pieces.clone();
            order.swap(first, second);
            let result = read_bytes([head, &order.concat()].concat());
            assert!(is_refused(&result), "{first} for {second}: {result:?}");
        }
    }
}

#[test]
fn another_directory_and_another_name_are_refused() {
    let (_, bytes) = small();
    let disk = Arc::new(TestDisk::default());
    disk.put(&file_name(NUMBER), bytes.clone());
    disk.put(&file_name(NUMBER.next()), bytes);
    assert!(is_refused(&read(&disk, EngineId(ENGINE.0 + 1), NUMBER)));
    assert!(is_refused(&read(&disk, ENGINE, NUMBER.next())));
}

/// The counts in the header are checked, though every checksum is right.
#[test]
fn wrong_counts_are_refused() {
    let (_, bytes) = small();
    let head: [u8; HEADER_BYTES] = bytes[..HEADER_BYTES].try_into().unwrap();
    let header = Header::decode(ENGINE, &head).unwrap();
    let Counts { blocks, events: _, sums, limits } = header.counts;
    for counts in [
        Counts { blocks: blocks - 1, ..header.counts },
        Counts { blocks: blocks + 1, ..header.counts },
        Counts { sums: sums - 1, ..header.counts },
        Counts { sums: sums + 1, ..header.counts },
        Counts { limits: limits - 1, ..header.counts },
        Counts { limits: limits + 1, ..header.counts },
        Counts::default(),
    ] {
        let mut changed = Header { counts, ..header }.encode(ENGINE);
        changed.extend_from_slice(&bytes[HEADER_BYTES..]);
        let result = read_bytes(changed);
        assert!(is_refused(&result), "{counts:?}: {result:?}");
    }
}

/// Appends a block with this index.
type PutBlock<'a> = &'a dyn Fn(&mut Vec<u8>, u64);

/// A file as someone would forge it: all checksums right.
fn sealed(manifest: &Manifest, blocks: &[PutBlock<'_>], counts: Counts) -> Vec<u8> {
    let manifest_bytes = manifest.encode().unwrap();
    let mut body = manifest_bytes.clone();
    for (index, put) in blocks.iter().enumerate() {
        put(&mut body, index as u64);
    }
    let header = Header {
        point: ChainPoint { number: NUMBER, check: 99 },
        manifest_crc: Binding::new(ENGINE, NUMBER).manifest_crc(&manifest_bytes),
        manifest_len: manifest_bytes.len() as u64,
        counts,
        file_len: (HEADER_BYTES + body.len()) as u64,
    };
    [header.encode(ENGINE), body].concat()
}

#[test]
fn blocks_out_of_order_are_refused_with_right_checksums_too() {
    let binding = Binding::new(ENGINE, NUMBER);
    let sums = |users: [u64; 2]| {
        move |out: &mut Vec<u8>, index| {
            let sums = users.map(|user| sum(1, 5, user, 1));
            put_sums_block(out, binding, index, &sums).unwrap();
        }
    };
    let limits = |users: [u64; 2]| {
        move |out: &mut Vec<u8>, index| {
            let limits = users.map(|user| limit(1, user, 1));
            put_limits_block(out, binding, index, &limits).unwrap();
        }
    };
    let (s1, s2, s3) = (sums([1, 2]), sums([2, 3]), sums([3, 4]));
    let (l1, l2, l3) = (limits([1, 2]), limits([2, 3]), limits([3, 4]));
    let read = |blocks: &[PutBlock<'_>], sums, limits| {
        let counts = Counts { blocks: blocks.len() as u64, events: 0, sums, limits };
        read_bytes(sealed(&manifest(NUMBER.0), blocks, counts))
    };
    assert!(read(&[&s1, &s3, &l1, &l3], 4, 4).is_ok());
    assert!(is_refused(&read(&[&s1, &s2], 4, 0)), "user 2 twice");
    assert!(is_refused(&read(&[&s3, &s1], 4, 0)), "descending");
    assert!(is_refused(&read(&[&l1, &l2], 0, 4)), "user 2 twice");
    assert!(is_refused(&read(&[&l3, &l1], 0, 4)), "descending");
    assert!(is_refused(&read(&[&s1, &l1, &s3], 4, 2)), "sums after limits");
    let other = Manifest { check: 98, ..manifest(NUMBER.0) };
    let result = read_bytes(sealed(&other, &[], Counts::default()));
    assert!(is_refused(&result), "the manifest of another batch");
}

/// The bytes are in data directories: a change here needs a new format version.
#[test]
fn the_format_is_fixed() {
    let (_, bytes) = small();
    assert_eq!((bytes.len(), crc32fast::hash(&bytes)), (727, 1_337_961_917));
}

#[test]
fn the_writer_refuses_what_would_be_a_bad_file() {
    let disk = Arc::new(TestDisk::default());
    let storage: Arc<dyn Storage> = disk.clone();
    let create = || SnapshotWriter::create(&storage, ENGINE, &manifest(NUMBER.0)).unwrap();
    let mut writer = create();
    writer.write_sum(sum(1, 5, 3, 1)).unwrap();
    assert!(writer.write_sum(sum(1, 5, 3, 1)).is_err(), "twice");
    assert!(writer.write_sum(sum(1, 4, 9, 1)).is_err(), "descending");
    assert!(writer.write_sum(sum(3, 1 << 48, 9, 1)).is_err(), "beyond 48 bits");
    writer.write_limit(limit(1, 3, 1)).unwrap();
    assert!(writer.write_sum(sum(2, 5, 3, 1)).is_err(), "after a limit");
    assert!(writer.write_limit(limit(1, 3, 2)).is_err(), "twice");
    assert!(writer.write_limit(limit(1, 4, AMOUNT_MAX + 1)).is_err(), "too large");
    drop(writer);
    assert_eq!(storage.list().unwrap(), [""; 0], "dropped unfinished");

    let zero = Manifest { number: 0, ..manifest(NUMBER.0) };
    assert!(SnapshotWriter::create(&storage, ENGINE, &zero).is_err());
    // What a failed attempt left is no obstacle.
    disk.put("snapshot-00000000000000000007.tmp", vec![1; 10_000]);
    create().finish().unwrap();
    assert_eq!(read(&disk, ENGINE, NUMBER).unwrap(), (manifest(NUMBER.0), vec![], vec![]));
}

#[test]
fn limits_can_be_read_without_the_sums() {
    let (content, bytes) = small();
    let disk = Arc::new(TestDisk::default());
    disk.put(&file_name(NUMBER), bytes);
    let storage: Arc<dyn Storage> = disk;
    let mut reader = SnapshotReader::open(&storage, ENGINE, NUMBER).unwrap();
    assert_eq!(reader.next_limit().unwrap(), Some(content.2[0]));
    reader.verify_to_end().unwrap();
}

/// Blocks of the size that is used, more than one piece of them, and a block cut by its count.
#[test]
fn a_large_snapshot_round_trips() {
    let wide = (0..20_000).map(|user| sum(1, 5, user * 0x1_0000_0000_0001, i128::MAX - 9));
    let dense = (0..50_000).map(|user| sum(2, 5, user, 1));
    let limits = (0..20_000).map(|user| limit(2, user << 40, user)).collect();
    let content = (manifest(NUMBER.0), wide.chain(dense).collect(), limits);
    let disk = Arc::new(TestDisk::default());
    write(&disk, &content, usize::MAX);
    assert!(disk.bytes(&file_name(NUMBER)).len() > 2 * PIECE_BYTES);
    assert!(read(&disk, ENGINE, NUMBER).unwrap() == content);
}

fn contents() -> impl Strategy<Value = Content> {
    let small_or_any = || prop_oneof![0_u64..5, any::<u64>()];
    let amount = prop_oneof![(-3_i128..1000), any::<i128>()];
    let window = prop_oneof![0_u64..3, Just((1 << 48) - 1)];
    let sums = proptest::collection::btree_map((1_u16..3, window, small_or_any()), amount, 0..60);
    let limits = proptest::collection::btree_map((1_u16..3, small_or_any()), 0..=AMOUNT_MAX, 0..30);
    (sums, limits).prop_map(|(sums, limits)| {
        let sums = sums.into_iter().map(|((q, w, u), amount)| sum(q, w, u, amount)).collect();
        let limits = limits.into_iter().map(|((q, u), value)| limit(q, u, value)).collect();
        (manifest(NUMBER.0), sums, limits)
    })
}

proptest! {
    #[test]
    fn snapshots_round_trip(content in contents(), block_bytes in 1_usize..400) {
        let disk = Arc::new(TestDisk::default());
        write(&disk, &content, block_bytes);
        prop_assert_eq!(read(&disk, ENGINE, NUMBER).unwrap(), content);
    }

    /// With right checksums too, arbitrary payloads are refused or decode to something ordered.
    #[test]
    fn arbitrary_payloads_never_panic(payload: Vec<u8>) {
        let (mut sums, mut limits) = (Vec::new(), Vec::new());
        if decode_sums(&payload, None, &mut sums).is_ok() {
            prop_assert!(sums.is_sorted_by(|a, b| a.key < b.key));
        }
        if decode_limits(&payload, None, &mut limits).is_ok() {
            prop_assert!(limits.is_sorted_by(|a, b| a.key() < b.key()));
        }
    }
}
