//! For the fuzz target: a snapshot of arbitrary bytes.

use std::sync::Arc;

use super::codec::{BLOCK_BYTES_MAX, BLOCK_HEADER_BYTES, Binding, HEADER_BYTES, reseal_block};
use super::deltas::{DeltaRange, DeltasReader, DeltasWriter};
use super::merge::SumSource;
use super::*;
use crate::error::Result;
use crate::fold::{Sum, SumKey};
use crate::journal::writer::ChainPoint;
use crate::ledger::{LedgerEvent, Recorded};
use crate::model::{EngineId, QuotaId, WindowStart};
use crate::storage::Storage;
use crate::storage::sim::SimDisk;

const ENGINE: EngineId = EngineId(7);
const NUMBER: BatchNumber = BatchNumber(3);

/// What a snapshot holds.
type Content = (Manifest, Vec<LedgerEvent>, Vec<Sum>, Vec<Limit>);

fn read(storage: &Arc<dyn Storage>) -> Result<Content> {
    let mut reader = SnapshotReader::open(storage, ENGINE, NUMBER)?;
    let (mut events, mut sums, mut limits) = (Vec::new(), Vec::new(), Vec::new());
    reader.read_events(&mut |event| {
        events.push(event);
        Ok(())
    })?;
    while let Some(sum) = reader.next_sum()? {
        sums.push(sum);
    }
    while let Some(limit) = reader.next_limit()? {
        limits.push(limit);
    }
    Ok((reader.manifest().clone(), events, sums, limits))
}

/// Reads `bytes`; what can be read is the same after it was written anew. With `reseal`, magic,
/// length and checksums are made right first, so that what they guard is reached.
pub(crate) fn check(mut bytes: Vec<u8>, reseal: bool) {
    if reseal {
        self::reseal(&mut bytes);
    }
    let disk = SimDisk::new(0);
    disk.put(&file_name(NUMBER), &bytes);
    let Ok(content) = read(&disk.storage()) else { return };
    disk.delete(&file_name(NUMBER));
    let storage = disk.storage();
    let anew = || -> Result<Content> {
        let mut writer =
            SnapshotWriter::create_with(&storage, ENGINE, &content.0, BLOCK_BYTES_MAX)?;
        content.1.iter().try_for_each(|event| writer.write_event(event))?;
        content.2.iter().try_for_each(|&sum| writer.write_sum(sum))?;
        content.3.iter().try_for_each(|&limit| writer.write_limit(limit))?;
        writer.finish()?;
        read(&storage)
    };
    match anew() {
        Ok(anew) => assert!(anew == content, "another content after writing it anew"),
        Err(error) => unreachable!("what was read can't be written: {error}"),
    }
}

fn reseal(bytes: &mut [u8]) {
    let binding = Binding::new(ENGINE, NUMBER);
    let file_len = bytes.len() as u64;
    let Some((head, rest)) = bytes.split_first_chunk_mut::<HEADER_BYTES>() else { return };
    let (manifest_len, counts, check) = codec::header_fields(head);
    let manifest_len = manifest_len.min(rest.len() as u64 / 2);
    let (manifest, mut blocks) =
        rest.split_at_mut(usize::try_from(manifest_len).unwrap_or_default());
    let header = codec::Header {
        point: ChainPoint { number: NUMBER, check },
        manifest_crc: binding.manifest_crc(manifest),
        manifest_len,
        counts,
        file_len,
    };
    head.copy_from_slice(&header.encode(ENGINE));
    for index in 0.. {
        if blocks.len() <= BLOCK_HEADER_BYTES {
            break;
        }
        let len = reseal_block(blocks, binding, index);
        blocks = blocks.split_at_mut(len).1;
    }
}

/// The range that is read.
const RANGE: DeltaRange = DeltaRange {
    from: Some(ChainPoint { number: BatchNumber(1), check: 7 }),
    to: ChainPoint { number: NUMBER, check: 9 },
};

/// A part of a backlog: as [`check`] does with a snapshot.
pub(crate) fn check_deltas(mut bytes: Vec<u8>, reseal: bool) {
    const NAME: &str = "backlog";
    if reseal {
        deltas::reseal(&mut bytes, ENGINE, RANGE);
    }
    let read = |storage: &Arc<dyn Storage>| -> Result<_> {
        let mut reader = DeltasReader::open(storage, ENGINE, RANGE, NAME)?;
        let (mut events, mut sums) = (Vec::new(), Vec::new());
        reader.read_events(&mut |event| {
            events.push(event);
            Ok(())
        })?;
        while let Some(sum) = reader.next_sum()? {
            sums.push(sum);
        }
        Ok((events, sums))
    };
    let disk = SimDisk::new(0);
    disk.put(NAME, &bytes);
    let storage = disk.storage();
    let Ok((events, sums)) = read(&storage) else { return };
    disk.delete(NAME);
    let anew = write_deltas(&storage, NAME, &events, &sums).and_then(|()| read(&storage));
    match anew {
        Ok(anew) => assert!(anew == (events, sums), "another content after writing it anew"),
        Err(error) => unreachable!("what was read can't be written: {error}"),
    }
}

fn write_deltas(
    storage: &Arc<dyn Storage>,
    name: &str,
    events: &[Recorded],
    sums: &[Sum],
) -> Result<()> {
    let mut writer = DeltasWriter::create(storage, ENGINE, RANGE, "backlog.tmp".to_owned())?;
    events.iter().try_for_each(|event| writer.write_event(event.clone()))?;
    sums.iter().try_for_each(|&sum| writer.write_sum(sum))?;
    writer.finish(name)
}

/// A small part of a backlog, for the corpus.
pub(crate) fn example_deltas() -> Result<Vec<u8>> {
    let disk = SimDisk::new(0);
    let quota = QuotaId(1);
    let key = |user| SumKey { quota, window: WindowStart(86_400_000), user };
    let sums: Vec<_> =
        (0..9).map(|user| Sum { key: key(user * 999), amount: i128::from(user) - 5 }).collect();
    let events = [4, 40].map(|len| Recorded { user: 9, quota, payload: vec![5; len] });
    write_deltas(&disk.storage(), "backlog", &events, &sums)?;
    Ok(disk.file("backlog").unwrap_or_default())
}

/// A small snapshot, for the corpus.
pub(crate) fn example(events: &[LedgerEvent]) -> Result<Vec<u8>> {
    use crate::journal::cold::{Generation, RingRef};
    use crate::model::{Definition, Quota, Window};

    let disk = SimDisk::new(0);
    let storage = disk.storage();
    let quota = Quota::new("requests", 100).window(Window::Day);
    let ring = RingRef { created: 1, capacity: 64, base: 64 };
    let manifest = Manifest {
        number: NUMBER.0,
        check: 99,
        generation: Generation { number: 1, salt: 77, boot: 5, rings: vec![ring] },
        lanes: vec![70],
        definitions: vec![Definition::new(QuotaId(1), &quota)?],
        floors: vec![(1, 5)],
        created: 1_700_000_000_000,
    };
    let mut writer = SnapshotWriter::create_with(&storage, ENGINE, &manifest, 64)?;
    events.iter().try_for_each(|event| writer.write_event(event))?;
    for user in 0..20 {
        let key =
            SumKey { quota: QuotaId(1), window: WindowStart(86_400_000), user: user * user * 999 };
        writer.write_sum(Sum { key, amount: i128::from(user) * 1_000 - 5 })?;
    }
    for user in 0..4 {
        writer.write_limit(Limit { quota: QuotaId(1), user, limit: user << 20 })?;
    }
    writer.finish()?;
    Ok(disk.file(&file_name(NUMBER)).unwrap_or_default())
}
