//! Ways in for the fuzz targets in `fuzz/`. Not public API: it changes without notice.
//!
//! A decoder behind a checksum refuses nearly all arbitrary bytes at once. So an input's first byte
//! says whether it is taken as it is, or gets right checksums first.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::codec::{Input, encoded_sums};
use crate::config::Config;
use crate::delivery::state::{self, SinkState};
use crate::error::Result;
use crate::fold::Sum;
use crate::gate::Tollgate;
use crate::identity;
use crate::journal::batch::{self, Batch, BatchContent};
use crate::journal::cold::{ColdEvent, RingRef};
use crate::journal::files::{FILE_HEADER_BYTES, FileHeader, FileSequence};
use crate::journal::writer::ChainPoint;
use crate::ledger::{Answer, Asked, EventWriter, LedgerEvent, Part, Recorded, Settlement};
use crate::model::{
    BatchNumber, Definition, EngineId, Quota, QuotaId, ReservationId, Window, WindowStart,
};
use crate::recovery::rings;
use crate::snapshot::deltas::DeltaRange;
use crate::storage::sim::SimDisk;
use crate::sync::AtomicU64;
use crate::wal::lane::{Found, scan_ring};
use crate::wal::payload::PIECE_BYTES;
use crate::wal::record::{Item, Record, SLOT_BYTES, SLOT_WORDS, Seal};
use crate::wal::region::{Region, SLOTS_AT, Slots};

const ENGINE: EngineId = EngineId(7);
const SALT: u64 = 5;

/// A ring of arbitrary slots: the scan reads records only, each whole, in order and at most a lap;
/// and those that follow each other from where it begins, all of them.
///
/// Layout: capacity as a power of two (1 byte), where to begin (8 bytes), then for each slot a byte
/// that says how its check comes about (1: as a record, 2: as a skip, 4 to 7: as an item, 8: as a
/// piece of an event, else as it is) and 32 bytes.
///
/// # Panics
///
/// On a finding.
pub fn slot(data: &[u8]) {
    let mut input = Input::new(data);
    let (Ok([power]), Ok(from)) = (input.array::<1>(), input.u64()) else { return };
    let capacity = 1_u64 << (power % 7);
    let Ok(seal) = Seal::new(SALT) else { return };
    let words: Arc<[AtomicU64]> =
        (0..SLOTS_AT as u64 + capacity * SLOT_WORDS as u64).map(|_| AtomicU64::new(0)).collect();
    let mut built = BTreeSet::new();
    for index in 0..capacity {
        let (Ok([how]), Ok(bytes)) = (input.array::<1>(), input.array::<SLOT_BYTES>()) else {
            break;
        };
        let mut slot = [0; SLOT_WORDS];
        for (word, bytes) in slot.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = bytes.try_into().map(u64::from_le_bytes).unwrap_or_default();
        }
        let begin = from & !(capacity - 1);
        let lap = u64::from(how >> 4).wrapping_mul(capacity);
        let number = begin.wrapping_add(lap).wrapping_add(index);
        if matches!(how & 12, 4 | 8) {
            let following = slot[3].to_le_bytes()[0] % 4;
            let item = if how & 12 == 4 { item(how & 3, slot) } else { piece(slot) };
            slot = seal.encode_item(number, &item, following);
            let verified = seal.verified(number, &slot);
            let read = verified.and_then(|slot| Some((slot.item()?, slot.following())));
            assert_eq!(read, Some((item, following.into())));
        } else if how & 3 == 2 {
            let target = number.wrapping_add(slot[0] % (2 * capacity));
            slot = seal.encode_skip(number, target);
        } else if how & 1 == 1 {
            let [user, delta, window, quota] = slot;
            let [low, high, ..] = quota.to_le_bytes();
            let record = Record {
                user,
                quota: QuotaId::from_u16(u16::from_le_bytes([low, high])),
                window: WindowStart(window & WindowStart::MAX.0),
                delta: delta.cast_signed(),
            };
            slot = seal.encode(number, &record);
            assert_eq!(seal.decode(number, &slot), Some(record));
            built.insert(number);
        }
        let at = SLOTS_AT + usize::try_from(index).unwrap_or_default() * SLOT_WORDS;
        for (word, value) in words.iter().skip(at).zip(slot) {
            // Relaxed: nobody else is there.
            word.store(value.to_le(), crate::sync::Ordering::Relaxed);
        }
    }
    let mut visited = 0_u64;
    let Some(slots) = Slots::new(Region::heap(words), capacity) else { return };
    let scan = scan_ring(&slots, seal, from, &mut |_, found| {
        visited += match found {
            Found::Add(_) => 1,
            Found::Operation(operation) => {
                assert!(operation.adds().count() as u64 <= operation.len());
                let mut events = 0;
                operation.for_each_event(|_| events += 1);
                assert!(events <= operation.len());
                operation.len()
            }
        };
        Ok(())
    });
    let Ok(scan) = scan else { unreachable!("no visit fails") };
    assert_eq!(scan.records, visited);
    assert!(visited <= capacity);
    assert!(scan.end >= from && scan.end - from <= 3 * capacity && scan.end - from >= visited);
    assert!(scan.beyond_gap.is_none_or(|number| number > scan.end));
    let run = (from..from.saturating_add(capacity)).take_while(|number| built.contains(number));
    assert!(scan.end - from >= run.count() as u64);
}

/// A record of one of four kinds.
fn item(kind: u8, [a, b, time, c]: [u64; SLOT_WORDS]) -> Item {
    let at = crate::model::Timestamp::from_unix_millis(time);
    let id = ReservationId { generation: b, number: a };
    let (quota, window) =
        (QuotaId::from_u16(c.to_le_bytes()[1].into()), WindowStart(time & WindowStart::MAX.0));
    match kind {
        0 => Item::Add(Record { user: a, quota, window, delta: b.cast_signed() }),
        1 => Item::Open { id, expires: at },
        2 => Item::Settle { id, how: Settlement::Cancelled, at },
        _ => Item::Request { id: u128::from(a) << 64 | u128::from(b), asked: Asked::Reserve, at },
    }
}

fn piece([a, b, rest, _]: [u64; SLOT_WORDS]) -> Item {
    let mut piece = [0; PIECE_BYTES];
    for (bytes, word) in piece.chunks_exact_mut(8).zip([a, b, rest]) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    Item::Payload(piece)
}

/// A batch, or a file's header, of arbitrary bytes: what is read is the same after it was written
/// anew.
///
/// # Panics
///
/// On a finding.
pub fn batch(data: &[u8]) {
    let Some((how, data)) = data.split_first() else { return };
    if how & 2 == 2 {
        return file_header(data, how & 1 == 1);
    }
    let mut bytes = data.to_vec();
    if how & 1 == 1 {
        batch::reseal(ENGINE, &mut bytes);
    }
    let Some((header, spans, cold, events, sums)) = read_batch(&bytes) else { return };
    let mut ledger = EventWriter::default();
    events.iter().for_each(|event| ledger.put(event));
    let content = BatchContent {
        number: header.number,
        durable: header.durable,
        time: header.time,
        previous_check: header.previous_check,
        spans: &spans,
        cold: &cold,
        ledger: ledger.bytes(),
        sums: &encoded_sums(&sums),
    };
    let Ok((anew, check)) = batch::encode(ENGINE, &content) else {
        unreachable!("what was read can't be written")
    };
    let Some((header_anew, spans_anew, cold_anew, events_anew, sums_anew)) = read_batch(&anew)
    else {
        unreachable!("what was written can't be read")
    };
    assert_eq!(header_anew.check, check);
    assert_eq!(
        (header_anew.number, header_anew.durable, header_anew.time, header_anew.previous_check),
        (header.number, header.durable, header.time, header.previous_check)
    );
    assert!(spans_anew == spans && cold_anew == cold && sums_anew == sums);
    assert_eq!(events_anew, events);
}

type BatchRead =
    (batch::BatchHeader, Vec<batch::LaneSpan>, Vec<ColdEvent>, Vec<LedgerEvent>, Vec<Sum>);

fn read_batch(bytes: &[u8]) -> Option<BatchRead> {
    let batch = Batch::decode(ENGINE, bytes).ok()?;
    let mut sums = Vec::new();
    let mut source = batch.sums();
    while let Some(sum) = source.next_sum().ok()? {
        sums.push(sum);
    }
    let mut events = Vec::new();
    let mut source = batch.events();
    while let Some(event) = source.next_event().ok()? {
        events.push(event);
    }
    Some((batch.header, batch.spans, batch.cold, events, sums))
}

fn file_header(data: &[u8], reseal: bool) {
    let Some(mut bytes) = data.first_chunk::<FILE_HEADER_BYTES>().copied() else { return };
    if reseal {
        FileHeader::reseal(ENGINE, &mut bytes);
    }
    if let Ok(header) = FileHeader::decode(ENGINE, &bytes) {
        // Headers of earlier versions are written anew in the present one.
        assert_eq!(FileHeader::decode(ENGINE, &header.encode(ENGINE)), Ok(header));
    }
}

/// A file that holds little, of arbitrary bytes, as the engine finds it by its name: what is read
/// is the same after it was written anew.
///
/// The first byte says which, and whether its checksum is made right first.
///
/// # Panics
///
/// On a finding.
pub fn file(data: &[u8]) {
    let Some((how, data)) = data.split_first() else { return };
    let is_resealed = how & 1 == 1;
    match how >> 1 & 3 {
        0 => identity_file(resealed(data.to_vec(), is_resealed)),
        1 => sink_file(resealed(data.to_vec(), is_resealed)),
        2 => ring_file(resealed(data.to_vec(), is_resealed)),
        _ => crate::snapshot::fuzzing::check_deltas(data.to_vec(), is_resealed),
    }
}

/// With the checksum that these files end with.
fn resealed(mut bytes: Vec<u8>, is_resealed: bool) -> Vec<u8> {
    if is_resealed && let Some((fields, crc)) = bytes.split_last_chunk_mut::<4>() {
        *crc = crc32fast::hash(fields).to_le_bytes();
    }
    bytes
}

fn identity_file(bytes: Vec<u8>) {
    let disk = SimDisk::new(0);
    disk.put(identity::NAME, &bytes);
    let storage = disk.storage();
    let Ok(Some(identity)) = identity::read(&storage) else { return };
    let anew = identity::write(&storage, identity).and_then(|()| identity::read(&storage));
    assert!(anew.is_ok_and(|anew| anew == Some(identity)));
    assert!(disk.file(identity::NAME) == Some(bytes), "another file says the same");
}

fn sink_file(bytes: Vec<u8>) {
    let disk = SimDisk::new(0);
    disk.put(&state::file_name("a"), &bytes);
    let storage = disk.storage();
    let Ok(state) = SinkState::load(&storage, ENGINE, "a") else { return };
    assert!(state.end() >= state.tip().map_or(BatchNumber::ZERO, |tip| tip.number));
    let anew = state.save(&storage, ENGINE);
    let anew = anew.and_then(|()| SinkState::load(&storage, ENGINE, "a"));
    assert!(anew.is_ok_and(|anew| anew == state));
}

fn ring_file(mut bytes: Vec<u8>) {
    const RING: RingRef = RingRef { created: 1, capacity: 2, base: 0 };
    let disk = SimDisk::new(0);
    let storage = disk.storage();
    let name = rings::file_name(0, RING.created);
    // Of the right length, which is all that is left to see but for the header.
    if rings::create(&storage, ENGINE, 0, &RING).is_err() {
        unreachable!("the disk works");
    }
    let whole = disk.file(&name).unwrap_or_default();
    bytes.extend_from_slice(whole.get(bytes.len()..).unwrap_or_default());
    disk.put(&name, &bytes);
    let owner = rings::owner(&storage, &name);
    if rings::slots(&storage, ENGINE, 0, &RING).is_ok() {
        assert_eq!(owner, Some(ENGINE));
        assert!(bytes.get(..rings::HEADER_BYTES) == whole.get(..rings::HEADER_BYTES));
    }
}

/// Events of each kind that ledgers hold, some of which differ little from those before them.
fn some_events() -> Vec<LedgerEvent> {
    let id = |number: u64| ReservationId { generation: 3, number: 70_000 + number };
    let time = |millis: u64| crate::model::Timestamp::from_unix_millis(1_700_000_000_000 + millis);
    let (user, quota, window) = (9, QuotaId::from_u16(1), WindowStart(86_400_000));
    let part = Part { user, quota, window, amount: 300 };
    let parts = |parts: &[Part]| parts.iter().copied().collect();
    let answer = Answer {
        request: 1 << 100,
        asked: Asked::Reserve,
        is_admitted: true,
        user,
        quota,
        window,
        amount: 300,
        used: 400,
        limit: 1000,
        at: time(5),
        reservation: Some(id(0)),
    };
    let refused = Answer { is_admitted: false, reservation: None, at: time(4), ..answer };
    let (other, asked) = (Part { user: 10, ..part }, Asked::TryConsume);
    let (committed, expired) = (Settlement::Committed, Settlement::Expired);
    vec![
        LedgerEvent::Open { id: id(0), expires: time(600), parts: parts(&[part, other]) },
        LedgerEvent::Open { id: id(1), expires: time(601), parts: parts(&[other]) },
        LedgerEvent::Extend { id: id(0), expires: time(700) },
        LedgerEvent::Extend { id: ReservationId { generation: 2, ..id(5) }, expires: time(0) },
        LedgerEvent::Settle {
            id: id(0),
            how: committed,
            at: time(1),
            parts: parts(&[part, other]),
        },
        LedgerEvent::Settle { id: id(1), how: committed, at: time(2), parts: parts(&[other]) },
        LedgerEvent::Settle { id: id(2), how: expired, at: time(2), parts: parts(&[]) },
        LedgerEvent::Answer(answer),
        LedgerEvent::Answer(refused),
        LedgerEvent::Answer(Answer { asked, window: WindowStart(0), limit: 5, ..refused }),
    ]
}

fn some_record() -> LedgerEvent {
    LedgerEvent::Recorded(Recorded { user: 9, quota: QuotaId::from_u16(1), payload: vec![5; 30] })
}

/// A snapshot of arbitrary bytes: what is read is the same after it was written anew.
///
/// # Panics
///
/// On a finding.
pub fn snapshot(data: &[u8]) {
    let Some((how, data)) = data.split_first() else { return };
    crate::snapshot::fuzzing::check(data.to_vec(), how & 1 == 1);
}

/// A configuration of arbitrary text.
///
/// # Panics
///
/// On a finding.
pub fn configuration(data: &[u8]) {
    let Some((how, text)) = data.split_first() else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    let read = if how & 1 == 1 { Config::from_toml(text) } else { Config::from_yaml(text) };
    match read {
        Ok(config) => assert!(config.validate().is_ok()),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// A disk in memory under an engine, which can be killed and lose power.
#[derive(Debug)]
pub struct Disk(Arc<SimDisk>);

impl Disk {
    /// An empty disk; the seed decides what a loss of power leaves.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(SimDisk::new(seed))
    }

    /// Opens the engine on it, as a new process.
    ///
    /// # Errors
    ///
    /// Those of [`Tollgate::open`].
    pub fn open(&self, config: Config) -> Result<Tollgate> {
        Tollgate::open_on(&self.0.storage(), config)
    }

    /// Ends the process at once; what it wrote is in the page cache.
    pub fn kill(&self) {
        self.0.kill();
    }

    /// Ends the process and loses what was not synced, or a part of it.
    pub fn power_cut(&self) {
        self.0.power_cut();
    }
}

/// One of each that [`file`] takes.
fn files() -> Result<Vec<(u8, &'static str, Vec<u8>)>> {
    let disk = SimDisk::new(0);
    let storage = disk.storage();
    identity::write(&storage, identity::Identity { engine: ENGINE, is_created: true })?;
    let point = |number| ChainPoint { number: BatchNumber(number), check: 5 };
    let range = |from, to| DeltaRange { from: Some(point(from)), to: point(to) };
    let state = SinkState {
        confirmed: Some(point(3)),
        in_flight: Some(point(9)),
        backlog: vec![range(3, 9), range(9, 90)],
        events_after: Some(BatchNumber(2)),
        ..SinkState::new("a")
    };
    state.save(&storage, ENGINE)?;
    let ring = RingRef { created: 1, capacity: 2, base: 0 };
    rings::create(&storage, ENGINE, 0, &ring)?;
    let file = |name: &str| disk.file(name).unwrap_or_default();
    let mut header = file(&rings::file_name(0, 1));
    header.truncate(rings::HEADER_BYTES);
    Ok(vec![
        (0, "identity-as-it-is", file(identity::NAME)),
        (1, "sink-as-it-is", file(&state::file_name("a"))),
        (2, "ring-as-it-is", header),
        (3, "backlog-as-it-is", crate::snapshot::fuzzing::example_deltas()?),
    ])
}

/// Inputs to begin with, by target.
///
/// # Errors
///
/// When one can't be made.
pub fn corpus() -> Result<Vec<(&'static str, &'static str, Vec<u8>)>> {
    let mut seeds = Vec::new();
    let mut slots = vec![2];
    slots.extend_from_slice(&5_u64.to_le_bytes());
    for how in [0x11, 1, 1, 0] {
        slots.push(how);
        slots.extend_from_slice(&[how; SLOT_BYTES]);
    }
    seeds.push(("slot", "a-lap", slots));
    let mut slots = vec![3];
    slots.extend_from_slice(&8_u64.to_le_bytes());
    for (how, following) in [(4, 1), (8, 0), (4, 2), (6, 1), (7, 0), (1, 0)] {
        slots.push(how);
        slots.extend_from_slice(&[3; SLOT_BYTES - 8]);
        slots.extend_from_slice(&[following, 1, 0, 0, 0, 0, 0, 0]);
    }
    seeds.push(("slot", "operations", slots));
    let quota = Quota::new("requests", 100).window(Window::Day);
    let cold = [
        ColdEvent::Define(Definition::new(QuotaId::from_u16(0), &quota)?),
        ColdEvent::SetLimit { user: 4, quota: 0, limit: 9 },
        ColdEvent::ClearLimit { user: 4, quota: 0 },
    ];
    let key = |user| crate::fold::SumKey {
        quota: QuotaId::from_u16(0),
        window: WindowStart(86_400_000),
        user,
    };
    let sums =
        [1, 70_000, u64::MAX].map(|user| Sum { key: key(user), amount: -5 + i128::from(user) });
    let mut ledger = EventWriter::default();
    some_events().iter().chain([&some_record()]).for_each(|event| ledger.put(event));
    let content = BatchContent {
        number: BatchNumber(9),
        durable: BatchNumber(8),
        time: crate::model::Timestamp::from_unix_millis(1_700_000_000_000),
        previous_check: 77,
        spans: &[
            batch::LaneSpan { lane: 0, from: 3, to: 9, next: 9 },
            batch::LaneSpan { lane: 2, from: 64, to: 99, next: 128 },
        ],
        cold: &cold,
        ledger: ledger.bytes(),
        sums: &encoded_sums(&sums),
    };
    if let Ok((bytes, _)) = batch::encode(ENGINE, &content) {
        seeds.push(("batch", "as-it-is", [&[0][..], &bytes].concat()));
        seeds.push(("batch", "resealed", [&[1][..], &bytes].concat()));
    }
    let header = FileHeader::InUse {
        sequence: FileSequence(8),
        bytes: 1 << 20,
        previous: BatchNumber(99),
        previous_check: 0xdead_beef,
    };
    seeds.push(("batch", "file-header", [&[2][..], &header.encode(ENGINE)].concat()));
    seeds.push(("batch", "file-header-resealed", [&[3][..], &header.encode(ENGINE)].concat()));
    let snapshot = crate::snapshot::fuzzing::example(&some_events())?;
    seeds.push(("snapshot", "as-it-is", [&[0][..], &snapshot].concat()));
    seeds.push(("snapshot", "resealed", [&[1][..], &snapshot].concat()));
    seeds.extend(files()?.into_iter().flat_map(|(kind, name, bytes)| {
        let how = |resealed: u8| [&[kind << 1 | resealed][..], &bytes].concat();
        [("file", name, how(0)), ("file", name.trim_end_matches("-as-it-is"), how(1))]
    }));
    let toml: &[u8] = b"\x01lanes = 4\nlane_records = 1024\nsync_interval = \"50ms\"\n";
    let yaml: &[u8] = b"\x00async_quota:\n  enabled: true\n  consumer:\n    worker_count: 3\n    \
                        channel_size: 100000\n    flush_interval: 5s\n";
    seeds.push(("configuration", "toml", toml.to_vec()));
    seeds.push(("configuration", "yaml", yaml.to_vec()));
    // Any bytes are operations; these are many.
    let operations = (0..400_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes());
    seeds.push(("operations", "mixed", operations.collect()));
    Ok(seeds)
}
