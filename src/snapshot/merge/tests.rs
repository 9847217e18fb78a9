//! That a merge is the plain sum of what it read, however it is cut in pieces, and leaves nothing
//! half done.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::codec::encoded_sums;
use crate::journal::batch::{self, BatchContent, LaneSpan};
use crate::journal::cold::ColdEvent;
use crate::journal::writer::ChainPoint;
use crate::ledger::{EventWriter, LedgerEvent, Parts, Settlement};
use crate::model::ReservationId;
use crate::snapshot::testing::{ENGINE, TestDisk, definition, generation, sum};
use crate::snapshot::{TEMPORARY_SUFFIX, file_name, parse_file_name};

/// What one batch brings.
#[derive(Debug, Clone, Default)]
struct Change {
    sums: Vec<Sum>,
    /// User, quota, limit.
    limits: Vec<(u64, u16, Option<u64>)>,
    /// How far lane 0 goes on.
    records: u64,
    restarts: bool,
}

/// Encodes batches that follow each other.
struct Chain {
    last: ChainPoint,
    lanes: Vec<u64>,
    generation: u64,
    batches: Vec<Vec<u8>>,
}

impl Chain {
    /// With a first batch, which defines the quotas 1 to 3 and begins a generation.
    fn new() -> Self {
        let mut chain =
            Self { last: ChainPoint::START, lanes: Vec::new(), generation: 1, batches: Vec::new() };
        let mut cold: Vec<_> = (1..=3).map(|id| ColdEvent::Define(definition(id))).collect();
        cold.push(ColdEvent::Generation(generation(1, &[0, 64])));
        chain.push(&[], &cold, &[]);
        chain.lanes = vec![0, 64];
        chain
    }

    fn of(changes: &[Change]) -> Self {
        let mut chain = Self::new();
        for change in changes {
            chain.change(change);
        }
        chain
    }

    fn change(&mut self, change: &Change) {
        let from = self.lanes[0];
        let to = from + change.records;
        let mut span = LaneSpan { lane: 0, from, to, next: to + change.records % 3 };
        let mut cold: Vec<_> = change
            .limits
            .iter()
            .map(|&(user, quota, limit)| match limit {
                Some(limit) => ColdEvent::SetLimit { user, quota, limit },
                None => ColdEvent::ClearLimit { user, quota },
            })
            .collect();
        if change.restarts {
            span.next = to;
            self.generation += 1;
            self.lanes = vec![to.next_multiple_of(64), self.lanes[1], 7];
            cold.push(ColdEvent::Generation(generation(self.generation, &self.lanes)));
        } else {
            self.lanes[0] = span.next;
        }
        self.push(&[span], &cold, &change.sums);
    }

    fn push(&mut self, spans: &[LaneSpan], cold: &[ColdEvent], sums: &[Sum]) {
        self.push_with(&[], spans, cold, sums);
    }

    fn push_with(&mut self, ledger: &[u8], spans: &[LaneSpan], cold: &[ColdEvent], sums: &[Sum]) {
        let number = self.last.number.next();
        let content = BatchContent {
            number,
            durable: self.last.number,
            time: Timestamp::from_unix_millis(1),
            previous_check: self.last.check,
            spans,
            cold,
            ledger,
            sums: &encoded_sums(sums),
        };
        let (bytes, check) = batch::encode(ENGINE, &content).unwrap();
        self.last = ChainPoint { number, check };
        self.batches.push(bytes);
    }

    /// The batches after `number`.
    fn after(&self, number: BatchNumber) -> Source<'_> {
        Source(self.batches[index(number)..].iter())
    }
}

/// Of the batch that follows `number`.
fn index(number: BatchNumber) -> usize {
    usize::try_from(number.0).unwrap()
}

struct Source<'a>(std::slice::Iter<'a, Vec<u8>>);

impl BatchSource for Source<'_> {
    fn next_batch(
        &mut self,
        visit: &mut dyn FnMut(&Batch<'_>) -> DecodeResult<()>,
    ) -> Result<bool> {
        let Some(bytes) = self.0.next() else { return Ok(false) };
        let batch = Batch::decode(ENGINE, bytes).unwrap();
        visit(&batch).map_err(|reason| {
            let reason = format!("batch {}: {reason}", batch.header.number);
            Error::damaged("journal", 0, reason)
        })?;
        Ok(true)
    }
}

const REMEMBERING: Remembering = Remembering { window: Duration::from_mins(10), max: 1000 };
const TINY: MergeLimits =
    MergeLimits { sums_in_memory: 4, runs_max: 2, block_bytes: 60, remembering: REMEMBERING };

fn no_horizon(_: &Definition) -> WindowStart {
    WindowStart(0)
}

/// Merges what follows the snapshot of batch `base` (0: none).
fn merge_after(
    storage: &Arc<dyn Storage>,
    base: BatchNumber,
    batches: &mut dyn BatchSource,
    horizon: &dyn Fn(&Definition) -> WindowStart,
    limits: &MergeLimits,
) -> Result<Option<SnapshotInfo>> {
    let reader = match base {
        BatchNumber::ZERO => None,
        number => Some(SnapshotReader::open(storage, ENGINE, number)?),
    };
    let now = Timestamp::from_unix_millis(9);
    merge(storage, ENGINE, reader, batches, horizon, now, &mut |_| Ok(()), limits)
}

/// Merges until nothing is left; the number of the last snapshot, and how many it took.
fn merge_all(
    storage: &Arc<dyn Storage>,
    chain: &Chain,
    limits: &MergeLimits,
) -> (BatchNumber, u32) {
    let (mut base, mut rounds) = (BatchNumber::ZERO, 0);
    let merge_next =
        |base| merge_after(storage, base, &mut chain.after(base), &no_horizon, limits).unwrap();
    while let Some(info) = merge_next(base) {
        assert!(info.point.number > base);
        base = info.point.number;
        rounds += 1;
        assert!(storage.list().unwrap().iter().all(|name| !name.ends_with(TEMPORARY_SUFFIX)));
    }
    (base, rounds)
}

type Totals = BTreeMap<SumKey, i128>;
type OwnLimits = BTreeMap<(QuotaId, u64), u64>;

fn read(storage: &Arc<dyn Storage>, number: BatchNumber) -> (Totals, OwnLimits) {
    let mut reader = SnapshotReader::open(storage, ENGINE, number).unwrap();
    let (mut totals, mut limits) = (Totals::new(), OwnLimits::new());
    while let Some(sum) = reader.next_sum().unwrap() {
        totals.insert(sum.key, sum.amount);
    }
    while let Some(limit) = reader.next_limit().unwrap() {
        limits.insert(limit.key(), limit.limit);
    }
    (totals, limits)
}

/// The same, from the changes.
fn model(changes: &[Change]) -> (Totals, OwnLimits) {
    let (mut totals, mut limits) = (Totals::new(), OwnLimits::new());
    for change in changes {
        for sum in &change.sums {
            *totals.entry(sum.key).or_default() += sum.amount;
        }
        for &(user, quota, limit) in &change.limits {
            match limit {
                Some(limit) => limits.insert((QuotaId(quota), user), limit),
                None => limits.remove(&(QuotaId(quota), user)),
            };
        }
    }
    (totals, limits)
}

fn disk() -> Arc<dyn Storage> {
    Arc::new(TestDisk::default())
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let key = (1_u16..4, 0_u64..3, 0_u64..6);
    let sums = proptest::collection::btree_map(key, -50_i128..50, 0..5);
    let limit = proptest::option::of(0_u64..100);
    let limits = proptest::collection::vec((0_u64..4, 1_u16..4, limit), 0..3);
    let change = (sums, limits, 0_u64..9, proptest::bool::weighted(0.2));
    let change = change.prop_map(|(sums, limits, records, restarts)| Change {
        sums: sums.into_iter().map(|((q, w, u), amount)| sum(q, w, u, amount)).collect(),
        limits,
        records,
        restarts,
    });
    proptest::collection::vec(change, 1..30)
}

proptest! {
    /// With room for four sums and two runs, spills and early stops are the rule.
    #[test]
    fn a_merge_is_the_sum_of_its_batches(changes in changes()) {
        let chain = Chain::of(&changes);
        let storage = disk();
        let (number, _) = merge_all(&storage, &chain, &TINY);
        prop_assert_eq!(number, chain.last.number);
        prop_assert_eq!(read(&storage, number), model(&changes));

        let manifest = SnapshotReader::open(&storage, ENGINE, number).unwrap().manifest().clone();
        prop_assert_eq!(manifest.point(), chain.last);
        prop_assert_eq!(manifest.lanes, chain.lanes);
        prop_assert_eq!(manifest.generation.number, chain.generation);
        prop_assert_eq!(manifest.definitions.len(), 3);
    }

    /// However the work is cut in merges and runs, the last snapshot has the same bytes.
    #[test]
    fn merging_in_steps_equals_merging_at_once(changes in changes(), cut in 0_usize..30) {
        let chain = Chain::of(&changes);
        let (at_once, in_steps, tiny) = (disk(), disk(), disk());
        let same_blocks = |limits| MergeLimits { block_bytes: 60, ..limits };
        let ample = same_blocks(MergeLimits::new(REMEMBERING));
        let (number, rounds) = merge_all(&at_once, &chain, &ample);
        prop_assert_eq!(rounds, 1);

        let first = BatchNumber(1 + (cut % changes.len()) as u64);
        let mut batches = Source(chain.batches[..index(first)].iter());
        merge_after(&in_steps, BatchNumber::ZERO, &mut batches, &no_horizon, &ample).unwrap();
        merge_after(&in_steps, first, &mut chain.after(first), &no_horizon, &ample).unwrap();
        merge_all(&tiny, &chain, &TINY);

        let bytes = |storage: &Arc<dyn Storage>| {
            let file = storage.open(&file_name(number)).unwrap();
            let mut bytes = vec![0; usize::try_from(file.len().unwrap()).unwrap()];
            file.read_exact_at(&mut bytes, 0).unwrap();
            bytes
        };
        prop_assert_eq!(bytes(&in_steps), bytes(&at_once));
        prop_assert_eq!(bytes(&tiny), bytes(&at_once));
    }

    #[test]
    fn merged_sums_equal_a_map(runs in proptest::collection::vec(
        proptest::collection::btree_map((1_u16..3, 0_u64..3, 0_u64..9), -9_i128..9, 0..20), 0..6)
    ) {
        let mut expected = Totals::new();
        let runs: Vec<Vec<_>> = runs.into_iter().map(|run| {
            run.into_iter().map(|((q, w, u), amount)| sum(q, w, u, amount)).collect()
        }).collect();
        for sum in runs.iter().flatten() {
            *expected.entry(sum.key).or_default() += sum.amount;
        }
        let mut sources: Vec<_> = runs.iter().map(|run| SortedSums(run.iter().copied())).collect();
        let sources = sources.iter_mut().map(|source| source as &mut dyn SumSource).collect();
        let mut merged = MergedSums::new(sources).unwrap();
        let mut totals = Vec::new();
        while let Some(sum) = merged.next_sum().unwrap() {
            totals.push((sum.key, sum.amount));
        }
        prop_assert_eq!(totals, expected.into_iter().collect::<Vec<_>>());
    }
}

#[test]
fn nothing_to_merge_writes_nothing() {
    let storage = disk();
    let chain = Chain::new();
    let none = &mut Source([].iter());
    let merged = merge_after(&storage, BatchNumber::ZERO, none, &no_horizon, &TINY).unwrap();
    assert_eq!(merged, None);
    merge_all(&storage, &chain, &TINY);
    let merged = merge_after(&storage, BatchNumber(1), none, &no_horizon, &TINY).unwrap();
    assert_eq!(merged, None);
    assert_eq!(storage.list().unwrap(), [file_name(BatchNumber(1))]);
}

/// The bound on runs ends a merge early; the next goes on from there.
#[test]
fn a_merge_stops_at_its_bounds() {
    let full = |user: u64| Change {
        sums: (0..4).map(|step| sum(1, 0, user * 10 + step, 1)).collect(),
        ..Change::default()
    };
    let chain = Chain::of(&[full(0), full(1), full(2)]);
    let storage = disk();
    let info = merge_after(
        &storage,
        BatchNumber::ZERO,
        &mut chain.after(BatchNumber::ZERO),
        &no_horizon,
        &TINY,
    );
    let info = info.unwrap().unwrap();
    assert_eq!((info.point.number, info.sums), (BatchNumber(3), 8));

    let limits = |from: u64| Change {
        limits: (from..from + 4).map(|user| (user, 1, Some(1))).collect(),
        ..Change::default()
    };
    let chain = Chain::of(&[limits(0), limits(4)]);
    let storage = disk();
    let info = merge_after(
        &storage,
        BatchNumber::ZERO,
        &mut chain.after(BatchNumber::ZERO),
        &no_horizon,
        &TINY,
    );
    assert_eq!(info.unwrap().unwrap().point.number, BatchNumber(2));
}

/// What is below the horizon is dropped, from the base and from batches; the horizon is written
/// down, and holds when the next merge's clock is behind.
#[test]
fn windows_below_the_horizon_are_dropped_for_good() {
    let late = Change { sums: vec![sum(1, 4, 1, 5), sum(2, 4, 1, 5)], ..Change::default() };
    let open = Change { sums: vec![sum(1, 5, 1, 1), sum(1, 6, 1, 2)], ..Change::default() };
    let mut chain = Chain::of(&[late.clone(), open]);
    let storage = disk();
    let (first, _) = merge_all(&storage, &chain, &TINY);
    assert_eq!(read(&storage, first).0.len(), 4);

    let horizon = |definition: &Definition| match definition.id {
        QuotaId(1) => WindowStart(5),
        _ => WindowStart(0),
    };
    chain.change(&Change::default());
    let second = chain.last.number;
    merge_after(&storage, first, &mut chain.after(first), &horizon, &TINY).unwrap();
    let kept = [(1, 5, 1), (1, 6, 2), (2, 4, 5)].map(|(q, w, n)| (sum(q, w, 1, 0).key, n));
    assert_eq!(read(&storage, second).0, Totals::from(kept));
    let floors =
        |number| SnapshotReader::open(&storage, ENGINE, number).unwrap().manifest().floors.clone();
    assert_eq!(floors(second), [(1, 5)]);

    chain.change(&late);
    let third = chain.last.number;
    merge_after(&storage, second, &mut chain.after(second), &no_horizon, &TINY).unwrap();
    let kept = [(1, 5, 1), (1, 6, 2), (2, 4, 10)].map(|(q, w, n)| (sum(q, w, 1, 0).key, n));
    assert_eq!(read(&storage, third).0, Totals::from(kept));
    assert_eq!(floors(third), [(1, 5)]);
    let state =
        ColdState::from_manifest(SnapshotReader::open(&storage, ENGINE, third).unwrap().manifest());
    assert_eq!(state.floor(QuotaId(1)), WindowStart(5));
    assert_eq!(state.floor(QuotaId(2)), WindowStart(0));
}

/// What had ended was once forgotten only at the end: the reservations of a gibibyte of journal
/// took gigabytes meanwhile.
#[test]
fn of_what_has_ended_not_much_more_is_held_than_is_kept() {
    let mut chain = Chain::new();
    let end = |number| LedgerEvent::Settle {
        id: ReservationId { generation: 1, number },
        how: Settlement::Cancelled,
        at: Timestamp::from_unix_millis(1),
        parts: Parts::new(),
    };
    for batch in 0..20 {
        let mut ledger = EventWriter::default();
        (0..1000).for_each(|number| ledger.put(&end(batch * 1000 + number)));
        chain.push_with(ledger.bytes(), &[], &[], &[]);
    }
    let storage = disk();
    let now = Timestamp::from_unix_millis(9);
    let mut folding = Folding::new(&storage, ENGINE, ColdState::new(), &TINY, now);
    let mut batches = chain.after(BatchNumber::ZERO);
    let mut longest = 0;
    while batches.next_batch(&mut |batch| folding.take(batch)).unwrap() {
        longest = longest.max(folding.state.ledger().settled(Timestamp::MAX).len());
    }
    assert!((4000..=2 * REMEMBERING.max + 4096).contains(&longest), "{longest}");
    let (number, _) = merge_all(&storage, &chain, &TINY);
    let reader = SnapshotReader::open(&storage, ENGINE, number).unwrap();
    assert_eq!(reader.event_count(), REMEMBERING.max as u64);
}

/// Each of these would make a snapshot that says something else than the journal.
#[test]
fn batches_that_do_not_fit_are_refused() {
    let refused = |change: &dyn Fn(&mut Chain), reason: &str| {
        let storage = disk();
        let mut chain = Chain::of(&[Change { records: 4, ..Change::default() }]);
        change(&mut chain);
        let mut batches = chain.after(BatchNumber::ZERO);
        match merge_after(&storage, BatchNumber::ZERO, &mut batches, &no_horizon, &TINY) {
            Err(Error::Damaged { reason: found, .. }) => {
                assert!(found.contains(reason), "{found:?} instead of {reason:?}");
            }
            other => panic!("{other:?} instead of {reason:?}"),
        }
        assert_eq!(storage.list().unwrap(), [""; 0]);
    };
    let span = |lane, from| LaneSpan { lane, from, to: from, next: from };
    let without_generation = |chain: &mut Chain| {
        (chain.last, chain.batches) = (ChainPoint::START, Vec::new());
        chain.push(&[], &[], &[]);
    };
    refused(&without_generation, "no batch began a generation");
    refused(&|chain| drop(chain.batches.remove(0)), "batch 2: it does not follow");
    refused(&|chain| chain.batches.push(chain.batches[1].clone()), "batch 2: it does not follow");
    refused(
        &|chain| {
            chain.last.check ^= 1;
            chain.push(&[], &[], &[]);
        },
        "batch 3: it does not follow the batch before it by check",
    );
    refused(&|chain| chain.push(&[span(0, 4)], &[], &[]), "continue its lane");
    refused(&|chain| chain.push(&[span(0, 6)], &[], &[]), "continue its lane");
    refused(&|chain| chain.push(&[span(2, 0)], &[], &[]), "does not exist");
    refused(&|chain| chain.push(&[], &[], &[sum(9, 0, 0, 1)]), "unknown quota #9");
    let limit = |quota, limit| ColdEvent::SetLimit { user: 1, quota, limit };
    refused(&|chain| chain.push(&[], &[limit(9, 1)], &[]), "unknown quota");
    refused(&|chain| chain.push(&[], &[limit(1, u64::MAX)], &[]), "above 2^63");
    let other = Definition { decimals: 3, ..definition(1) };
    refused(
        &|chain| chain.push(&[], &[ColdEvent::Define(other.clone())], &[]),
        "under the same id",
    );
    let begin = |number, base| ColdEvent::Generation(generation(number, &[base]));
    refused(&|chain| chain.push(&[], &[begin(1, 64)], &[]), "not newer");
    refused(&|chain| chain.push(&[], &[begin(2, 1)], &[]), "again");
    for amount in [i128::MIN, i128::MAX] {
        let twice = move |chain: &mut Chain| {
            for _ in 0..2 {
                chain.push(&[], &[], &[sum(1, 0, 0, amount)]);
            }
        };
        refused(&twice, "above 128 bits");
    }
}

#[test]
fn an_overflow_between_base_and_batches_is_refused() {
    let large = Change { sums: vec![sum(1, 0, 0, i128::MAX)], ..Change::default() };
    let mut chain = Chain::of(std::slice::from_ref(&large));
    let storage = disk();
    let (base, _) = merge_all(&storage, &chain, &TINY);
    chain.change(&large);
    let merged = merge_after(&storage, base, &mut chain.after(base), &no_horizon, &TINY);
    assert!(matches!(merged, Err(Error::Damaged { .. })), "{merged:?}");
    assert_eq!(storage.list().unwrap(), [file_name(base)]);
}

#[test]
fn the_pace_is_told_every_byte_and_may_end_the_merge() {
    let change = |user: u64| Change {
        sums: (0..20_000).map(|step| sum(1, 0, user + step * 0x1_0000_0001, 1 << 100)).collect(),
        ..Change::default()
    };
    let chain = Chain::of(&[change(0), change(1)]);
    let storage = disk();
    let limits = MergeLimits { sums_in_memory: 20_000, ..MergeLimits::new(REMEMBERING) };
    let now = Timestamp::from_unix_millis(9);
    let mut steps = Vec::new();
    let mut count = |bytes| {
        steps.push(bytes);
        Ok(())
    };
    let mut batches = chain.after(BatchNumber::ZERO);
    merge(&storage, ENGINE, None, &mut batches, &no_horizon, now, &mut count, &limits).unwrap();
    let snapshot = storage.open(&file_name(chain.last.number)).unwrap().len().unwrap();
    let told: u64 = steps.iter().sum();
    // The runs are as large as the snapshot, less its head; its last piece is written at the end.
    assert!(told + 2 * 512 * 1024 > 2 * snapshot, "{told} of {snapshot}");
    assert!(steps.iter().all(|&bytes| bytes < 512 * 1024));

    for ends_at in 0..steps.len() {
        let storage = disk();
        let mut left = ends_at;
        let mut pace = |_| {
            left = left.checked_sub(1).ok_or(Error::Closed)?;
            Ok(())
        };
        let mut batches = chain.after(BatchNumber::ZERO);
        let merged =
            merge(&storage, ENGINE, None, &mut batches, &no_horizon, now, &mut pace, &limits);
        assert!(matches!(merged, Err(Error::Closed)));
        assert_eq!(storage.list().unwrap(), [""; 0]);
    }
}

/// Ends a merge at each of its calls to the disk. Whatever is found then under a final name is
/// complete, the base is still there, and a new merge comes to the same end.
#[test]
fn a_merge_can_be_killed_at_every_call() {
    let change = |user: u64| Change {
        sums: (0..4).map(|step| sum(1, 0, user + step, 1)).collect(),
        limits: vec![(user, 1, Some(user))],
        records: 4,
        ..Change::default()
    };
    let changes: Vec<_> = (0..2).map(change).collect();
    let mut chain = Chain::of(&changes);
    let base_disk = Arc::new(TestDisk::default());
    let base_storage: Arc<dyn Storage> = base_disk.clone();
    let (base, _) = merge_all(&base_storage, &chain, &MergeLimits::new(REMEMBERING));
    let old = read(&base_storage, base);
    let more: Vec<_> = (2..4).map(change).collect();
    more.iter().for_each(|change| chain.change(change));
    let new = model(&[changes, more].concat());

    for calls in 0.. {
        let disk = base_disk.killed();
        let storage: Arc<dyn Storage> = disk.clone();
        disk.fail_after(calls);
        let batches = &mut chain.after(base);
        let merged = merge_after(&storage, base, batches, &no_horizon, &TINY);
        for (found, lost_power) in [(disk.killed(), false), (disk.power_lost(), true)] {
            let found: Arc<dyn Storage> = found;
            for name in found.list().unwrap() {
                match parse_file_name(&name) {
                    Some(number) if number == base => assert_eq!(read(&found, number), old),
                    Some(number) => assert_eq!(read(&found, number), new, "after {calls} calls"),
                    None => assert!(name.ends_with(TEMPORARY_SUFFIX), "{name} after {calls} calls"),
                }
            }
            let is_there = found.list().unwrap().contains(&file_name(chain.last.number));
            assert!(is_there || merged.is_err(), "lost power: {lost_power}, {calls} calls");
            let batches = &mut chain.after(base);
            merge_after(&found, base, batches, &no_horizon, &TINY).unwrap();
            assert_eq!(read(&found, chain.last.number), new);
            let names = [base, chain.last.number].map(file_name);
            assert_eq!(found.list().unwrap(), names, "after {calls} calls");
        }
        if storage.list().unwrap() == [base, chain.last.number].map(file_name) {
            // Two runs are created, written, removed; the snapshot is created, written, given its
            // header, synced, renamed, and the directory synced.
            assert_eq!(calls, 12);
            break;
        }
    }
}
