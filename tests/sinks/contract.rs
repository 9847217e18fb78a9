//! The contract, as functions over any store.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use tollgate::sink::{Applied, Position, SinkError, UsageBatch, UsageSink};
use tollgate::{AMOUNT_MAX, EngineId, Timestamp};

use crate::feed::{DAY_MS, Feed, Key, Random, Totals, row, totals};

/// Something that sinks write to, and how to look into it past them.
pub(crate) trait Store {
    /// A sink, as after a restart of the process. There is one at a time.
    fn open(&self) -> Box<dyn UsageSink>;

    /// What is stored.
    fn totals(&self) -> Totals;

    /// How many events are stored; `None` where there are none.
    fn events(&self) -> Option<u64>;

    /// What the events add up to, by user and quota, where they are stored. None is there twice.
    #[cfg(any(feature = "postgres", feature = "redis"))]
    fn recorded(&self) -> Option<std::collections::BTreeMap<(u64, String), i128>> {
        None
    }

    /// Whether a quota's decimals and window are held against a row that differs.
    fn compares_meaning(&self) -> bool {
        true
    }
}

type Function = (&'static str, fn(&dyn Store));

/// Runs the whole contract, each function on an empty store.
pub(crate) fn holds_for<S: Store>(mut empty: impl FnMut() -> S) {
    let functions: [Function; 8] = [
        ("an unknown engine has no position", an_unknown_engine_has_no_position),
        ("a repeat changes nothing", a_repeat_changes_nothing),
        ("another position is refused", another_position_is_refused),
        ("a position is not taken for another engine's", positions_are_kept_apart),
        ("two engines sum", two_engines_sum),
        ("the largest numbers are exact", the_largest_numbers_are_exact),
        ("another meaning is refused", another_meaning_is_refused),
        ("totals are right after repeats, restarts and refusals", totals_are_right),
    ];
    for (name, function) in functions {
        let store = empty();
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| function(&store))) {
            eprintln!("failed: {name}");
            resume_unwind(panic);
        }
    }
}

fn an_unknown_engine_has_no_position(store: &dyn Store) {
    let mut sink = store.open();
    assert_eq!(sink.position(EngineId::from_u128(u128::MAX)).unwrap(), None);
    assert_eq!(sink.wants_events(), store.events().is_some());
}

fn a_repeat_changes_nothing(store: &dyn Store) {
    let mut feed = Feed::new(1, 1);
    let mut sink = store.open();
    for _ in 0..4 {
        let batch = feed.next();
        assert_eq!(sink.apply(&batch).unwrap(), Applied::Now);
        assert_eq!(sink.position(feed.engine()).unwrap(), feed.position());
        assert_eq!(sink.apply(&batch).unwrap(), Applied::Before);
        drop(sink);
        sink = store.open();
        assert_eq!(sink.apply(&batch).unwrap(), Applied::Before);
        assert_eq!(sink.position(feed.engine()).unwrap(), feed.position());
    }
    let batch = feed.batch(Vec::new(), Vec::new());
    assert_eq!(sink.apply(&batch).unwrap(), Applied::Now, "an empty batch moves the position");
    assert_eq!(sink.position(feed.engine()).unwrap(), feed.position());
    drop(sink);
    assert_eq!(store.totals(), totals(&[&feed]));
    assert_eq!(store.events(), store.events().and(Some(feed.events())));
}

fn assert_refused(sink: &mut dyn UsageSink, batch: &UsageBatch, at: Option<Position>) {
    match sink.apply(batch) {
        Err(SinkError::Disagrees { engine, stored, from, to, .. }) => {
            assert_eq!((engine, stored), (batch.engine(), at));
            assert_eq!((from, to), (batch.from(), batch.to()));
        }
        other => panic!("{:?} to {:?} at {at:?}: {other:?}", batch.from(), batch.to()),
    }
    assert_eq!(sink.position(batch.engine()).unwrap(), at);
}

fn another_position_is_refused(store: &dyn Store) {
    let mut feed = Feed::new(1, 2);
    let mut sink = store.open();
    let first = feed.next();
    let second = feed.next();
    assert_refused(&mut *sink, &second, None);
    sink.apply(&first).unwrap();
    sink.apply(&second).unwrap();
    let at = feed.position();
    // Ahead, behind, of another history, and a first batch where there was one.
    assert_refused(&mut *sink, &first, at);
    let mut skipped = Feed::new(1, 2);
    (0..3).for_each(|_| drop(skipped.next()));
    assert_refused(&mut *sink, &skipped.next(), at);
    let (number, check) = at.map(|at| (at.batch, at.check)).unwrap();
    let rows = || vec![row(1, "requests", Some(DAY_MS), 1, 1)];
    let forked = Some(Position { batch: number, check: check ^ 1 });
    let to = Position { batch: number + 1, check };
    let engine = feed.engine();
    assert_refused(&mut *sink, &UsageBatch::new(engine, forked, to, rows(), Vec::new()), at);
    assert_refused(&mut *sink, &UsageBatch::new(engine, None, to, rows(), Vec::new()), at);
    drop(sink);
    assert_eq!(store.totals(), totals(&[&feed]));
}

fn positions_are_kept_apart(store: &dyn Store) {
    // One's id begins as the other's.
    let (mut one, mut other) = (Feed::new(1 << 64, 3), Feed::new((1 << 64) + 1, 4));
    let mut sink = store.open();
    sink.apply(&one.next()).unwrap();
    assert_eq!(sink.position(other.engine()).unwrap(), None);
    sink.apply(&other.next()).unwrap();
    assert_eq!(sink.position(one.engine()).unwrap(), one.position());
    assert_eq!(sink.position(other.engine()).unwrap(), other.position());
}

fn two_engines_sum(store: &dyn Store) {
    let (mut one, mut other) = (Feed::new(1, 5), Feed::new(2, 6));
    let mut sink = store.open();
    for _ in 0..5 {
        sink.apply(&one.next()).unwrap();
        sink.apply(&other.next()).unwrap();
    }
    drop(sink);
    assert_eq!(store.totals(), totals(&[&one, &other]));
}

fn the_largest_numbers_are_exact(store: &dyn Store) {
    let mut feed = Feed::new(u128::MAX, 7);
    let mut sink = store.open();
    let rows = vec![row(u64::MAX, "bytes", None, i128::from(AMOUNT_MAX) - 5000, AMOUNT_MAX)];
    sink.apply(&feed.batch(rows, Vec::new())).unwrap();
    let rows = vec![row(u64::MAX, "bytes", None, -1, AMOUNT_MAX - 1)];
    sink.apply(&feed.batch(rows, Vec::new())).unwrap();
    let last_day = Timestamp::MAX.as_unix_millis() + 1 - DAY_MS;
    let rows = vec![row(0, "requests", Some(last_day), -3, 0)];
    let to = Position { batch: i64::MAX as u64, check: u32::MAX };
    let batch = UsageBatch::new(feed.engine(), feed.position(), to, rows, Vec::new());
    sink.apply(&batch).unwrap();
    assert_eq!(sink.position(feed.engine()).unwrap(), Some(to));
    drop(sink);
    let expected: [(Key, (i128, u64)); 2] = [
        ((u64::MAX, "bytes".to_owned(), 0), (i128::from(AMOUNT_MAX) - 5001, AMOUNT_MAX)),
        ((0, "requests".to_owned(), last_day), (-3, 1000)),
    ];
    assert_eq!(store.totals(), Totals::from(expected));
}

fn another_meaning_is_refused(store: &dyn Store) {
    if !store.compares_meaning() {
        return;
    }
    let (mut one, mut other) = (Feed::new(1, 8), Feed::new(2, 9));
    let mut sink = store.open();
    let agreed = row(1, "requests", Some(DAY_MS), 5, 5);
    sink.apply(&one.batch(vec![agreed.clone()], Vec::new())).unwrap();
    let mut decimals = agreed.clone();
    decimals.decimals = 1;
    let mut window = agreed.clone();
    window.window_end = Some(Timestamp::from_unix_millis(DAY_MS + 1));
    let mut endless = agreed;
    endless.window_end = None;
    for differing in [decimals, window, endless] {
        let rows = vec![row(0, "requests", Some(DAY_MS), 7, 7), differing];
        let to = Position { batch: 1, check: 1 };
        let batch = UsageBatch::new(other.engine(), None, to, rows, Vec::new());
        let error = sink.apply(&batch).unwrap_err();
        assert!(matches!(error, SinkError::BadData { .. }), "{error:?}");
        assert!(error.to_string().contains("\"requests\""), "{error}");
        assert_eq!(sink.position(other.engine()).unwrap(), None);
    }
    // Nothing is left of what was refused, and the sink works on.
    sink.apply(&other.batch(vec![row(1, "requests", Some(DAY_MS), 2, 2)], Vec::new())).unwrap();
    drop(sink);
    let key = (1, "requests".to_owned(), DAY_MS);
    assert_eq!(store.totals(), Totals::from([(key, (7, 1000))]));
}

fn totals_are_right(store: &dyn Store) {
    let mut random = Random(10);
    let mut feeds = [Feed::new(1, 11), Feed::new(2, 12)];
    let mut sink = store.open();
    let mut last: [Option<UsageBatch>; 2] = [None, None];
    for _ in 0..60 {
        let which = random.below(2) as usize;
        let feed = &mut feeds[which];
        match random.below(6) {
            0 => {
                if let Some(batch) = &last[which] {
                    assert_eq!(sink.apply(batch).unwrap(), Applied::Before);
                }
            }
            1 => {
                drop(sink);
                sink = store.open();
                assert_eq!(sink.position(feed.engine()).unwrap(), feed.position());
            }
            2 => {
                let to = Position { batch: u64::from(u32::MAX), check: 0 };
                let from = Some(Position { batch: u64::from(u32::MAX) - 1, check: 0 });
                let rows = vec![row(1, "requests", Some(DAY_MS), 1, 1)];
                let batch = UsageBatch::new(feed.engine(), from, to, rows, Vec::new());
                assert_refused(&mut *sink, &batch, feed.position());
            }
            _ => {
                let batch = feed.next();
                assert_eq!(sink.apply(&batch).unwrap(), Applied::Now);
                last[which] = Some(batch);
            }
        }
    }
    drop(sink);
    let [one, other] = &feeds;
    assert_eq!(store.totals(), totals(&[one, other]));
    assert_eq!(store.events(), store.events().and(Some(one.events() + other.events())));
}
