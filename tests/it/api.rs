//! The public operations, one promise a test.

use std::panic::{RefUnwindSafe, UnwindSafe};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tollgate::sink::{Fault, MemoryStore, SinkError};
use tollgate::{
    AMOUNT_MAX, Config, Consume, Counter, Decision, Decisions, EngineId, Error, HealthLevel,
    ManualClock, Quota, QuotaId, Reservation, ReservationId, Timestamp, Tollgate, Window,
};

use crate::support::small;

/// Handles can be shared by threads, kept in statics, and used by what catches panics; errors go
/// through any error type.
const _: () = {
    const fn is_shared<T: Send + Sync + 'static>() {}
    const fn is_handle<T: Send + Sync + UnwindSafe + RefUnwindSafe + 'static>() {}
    is_handle::<Tollgate>();
    is_handle::<Counter>();
    is_handle::<Reservation>();
    is_shared::<Error>();
    is_shared::<Decisions>();
};

const NEW_YEAR: u64 = 1_767_225_600_000; // 2026-01-01T00:00:00Z

fn open(dir: &tempfile::TempDir) -> Tollgate {
    Tollgate::open(dir.path(), small()).expect("the directory opens")
}

fn temporary() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

#[test]
fn ids_are_read_back_as_they_are_written() {
    let dir = temporary();
    let gate = open(&dir);
    let id = gate.engine_id();
    assert_eq!(id.to_string().parse(), Ok(id));
    assert_eq!(id.to_string().to_uppercase().parse(), Ok(id));
    // Numbers to `u128`: with a sign, and cut.
    let signed = format!("+{:031x}", 1);
    for text in ["no id", "", "+1", "1", &signed, &format!("{id}0"), &format!(" {id}")] {
        assert!(text.parse::<EngineId>().is_err(), "{text:?}");
        assert!(text.parse::<ReservationId>().is_err(), "{text:?}");
    }
}

#[test]
fn bad_input_is_refused_and_counts_nothing() {
    let dir = temporary();
    let gate = open(&dir);
    let quota = gate.define(Quota::new("requests", 10)).unwrap();
    assert!(matches!(gate.try_consume(1, quota, 0), Err(Error::InvalidAmount(0))));
    assert!(matches!(gate.consume(1, quota, AMOUNT_MAX + 1), Err(Error::InvalidAmount(_))));
    assert!(matches!(gate.check(1, quota, 0), Err(Error::InvalidAmount(0))));
    assert!(matches!(gate.refund(1, quota, 0), Err(Error::InvalidAmount(0))));
    assert!(matches!(gate.set_limit(1, quota, u64::MAX), Err(Error::InvalidLimit(u64::MAX))));
    let unknown = QuotaId::from_u16(9);
    assert!(
        matches!(gate.try_consume(1, unknown, 1), Err(Error::UnknownQuota(id)) if id == unknown)
    );
    assert!(matches!(gate.usage(1, unknown), Err(Error::UnknownQuota(_))));
    assert!(matches!(gate.counter(1, unknown), Err(Error::UnknownQuota(_))));
    assert_eq!(gate.usage(1, quota).unwrap().used, 0);
    assert_eq!(gate.stats().total, 0);
}

#[test]
fn a_consume_that_would_pass_the_largest_count_is_refused() {
    let dir = temporary();
    let gate = open(&dir);
    let quota = gate.define(Quota::new("bytes", 10)).unwrap();
    assert_eq!(gate.consume(1, quota, AMOUNT_MAX).unwrap().used, AMOUNT_MAX);
    let refused = gate.consume(1, quota, 1);
    assert!(matches!(refused, Err(Error::Overflow { used: AMOUNT_MAX, amount: 1 })), "{refused:?}");
    drop(gate);
    assert_eq!(open(&dir).usage(1, quota).unwrap().used, AMOUNT_MAX);
}

/// There was its text only.
#[test]
fn what_a_sink_said_can_be_matched_on() {
    let (dir, store) = (temporary(), MemoryStore::new());
    (0..1_000).for_each(|_| store.inject(Fault::BeforeCommit));
    let gate = Tollgate::builder(dir.path()).config(small()).sink("billing", store.sink());
    let gate = gate.open().unwrap();
    let quota = gate.define(Quota::new("requests", 10)).unwrap();
    gate.consume(1, quota, 1).unwrap();
    let (sink, source) = loop {
        let error = gate.deliver(Duration::from_millis(50)).unwrap_err();
        assert!(error.is_retryable(), "{error:?}");
        match error {
            Error::NotDelivered { sink, source: Some(source), .. } => break (sink, source),
            // No attempt was made in time.
            Error::NotDelivered { .. } => {}
            error => panic!("{error:?}"),
        }
    };
    let is_unavailable = matches!(source.downcast_ref(), Some(SinkError::Unavailable { .. }));
    assert!(sink == "billing" && is_unavailable, "{source:?}");
}

#[test]
fn a_batch_with_a_bad_item_counts_nothing() {
    let dir = temporary();
    let gate = open(&dir);
    let quota = gate.define(Quota::new("requests", 10)).unwrap();
    let items = [Consume { user: 1, quota, amount: 3 }, Consume { user: 2, quota, amount: 0 }];
    assert!(matches!(gate.consume_batch(&items), Err(Error::InvalidAmount(0))));
    assert_eq!(gate.usage(1, quota).unwrap().used, 0);
}

#[test]
fn definitions_are_idempotent_by_name_and_keep_their_meaning() {
    let dir = temporary();
    let gate = open(&dir);
    let day = gate.define(Quota::new("requests", 10).window(Window::Day)).unwrap();
    assert_eq!(gate.define(Quota::new("requests", 10).window(Window::Day)).unwrap(), day);
    assert_eq!(gate.define(Quota::new("requests", 20).window(Window::Day)).unwrap(), day);
    assert_eq!(gate.usage(1, day).unwrap().limit, 20);
    let other = gate.define(Quota::new("requests", 10).window(Window::Hour));
    assert!(matches!(other, Err(Error::InvalidQuota { .. })), "{other:?}");
    drop(gate);
    let gate = open(&dir);
    assert_eq!(gate.quota_by_name("requests"), Some(day));
    assert_eq!(gate.quota(day).unwrap().limit(), 20);
    assert_eq!(gate.define(Quota::new("tokens", 5)).unwrap().as_u16(), day.as_u16() + 1);
}

/// All who race for a name get one quota, as one of them defined it; so does the next start.
#[test]
fn of_several_who_define_what_is_absent_one_does() {
    let dir = temporary();
    let mut limits = Vec::new();
    for start in 0..2 {
        let gate = open(&dir);
        for round in 0..8 {
            let name = format!("quota-{round}");
            let barrier = std::sync::Barrier::new(4);
            let define = |limit| {
                barrier.wait();
                let id = gate.define_if_absent(Quota::new(&name, limit)).unwrap();
                (id, gate.quota(id).unwrap().limit())
            };
            let found = std::thread::scope(|scope| {
                let define = &define;
                let spawn = |thread: u64| scope.spawn(move || define(100 * start + 10 + thread));
                let threads = [0, 1, 2, 3].map(spawn);
                threads.map(|thread| thread.join().unwrap())
            });
            assert!(found.iter().all(|it| *it == found[0]), "{found:?}");
            limits.push(found[0].1);
        }
        assert_eq!(gate.quotas().len(), 8);
    }
    assert!(limits.iter().all(|limit| (10..14).contains(limit)), "{limits:?}");
    assert_eq!(limits[..8], limits[8..]);
}

#[test]
fn a_denial_says_when_it_is_worth_coming_back() {
    let dir = temporary();
    let clock = ManualClock::new(Timestamp::from_unix_millis(NEW_YEAR + 20_000));
    let gate = Tollgate::open(dir.path(), small().clock(Arc::new(clock))).unwrap();
    let minute = gate.define(Quota::new("per-minute", 5).window(Window::Minute)).unwrap();
    let ever = gate.define(Quota::new("ever", 5)).unwrap();
    assert!(gate.try_consume(1, minute, 5).unwrap().is_allowed());
    let denied = gate.try_consume(1, minute, 1).unwrap();
    assert!(denied.is_denied());
    assert_eq!(denied.retry_after(), Some(Duration::from_secs(40)));
    assert_eq!(denied.resets_at, Some(Timestamp::from_unix_millis(NEW_YEAR + 60_000)));
    assert_eq!(gate.try_consume(1, minute, 6).unwrap().retry_after(), None, "never fits");
    assert!(gate.try_consume(1, ever, 5).unwrap().is_allowed());
    assert_eq!(gate.try_consume(1, ever, 1).unwrap().retry_after(), None, "never resets");
    assert_eq!(gate.stats().denied, 3);
}

#[test]
fn usage_stays_in_its_window_across_a_restart() {
    let dir = temporary();
    let clock = ManualClock::new(Timestamp::from_unix_millis(NEW_YEAR));
    let open = || Tollgate::open(dir.path(), small().clock(Arc::new(clock.clone()))).unwrap();
    let gate = open();
    let day = gate.define(Quota::new("per-day", 10).window(Window::Day)).unwrap();
    gate.consume(1, day, 7).unwrap();
    drop(gate);
    let gate = open();
    assert_eq!(gate.usage(1, day).unwrap().used, 7);
    drop(gate);
    clock.advance(Duration::from_secs(24 * 3600));
    let gate = open();
    assert_eq!(gate.usage(1, day).unwrap().used, 0);
    assert!(gate.try_consume(1, day, 10).unwrap().is_allowed());
}

/// A clock that is set back neither reopens a window nor loses what was counted: usage goes on in
/// the counter's own window, in memory and after a restart.
#[test]
fn a_clock_that_is_set_back_reopens_nothing() {
    let dir = temporary();
    let clock = ManualClock::new(Timestamp::from_unix_millis(NEW_YEAR + 3_600_000));
    let open = || Tollgate::open(dir.path(), small().clock(Arc::new(clock.clone()))).unwrap();
    let gate = open();
    let hour = gate.define(Quota::new("per-hour", 10).window(Window::Hour)).unwrap();
    gate.consume(1, hour, 10).unwrap();
    clock.set(Timestamp::from_unix_millis(NEW_YEAR + 10));
    assert!(gate.try_consume(1, hour, 1).unwrap().is_denied());
    drop(gate);
    let gate = open();
    assert!(gate.try_consume(1, hour, 1).unwrap().is_denied());
    assert_eq!(gate.usage(1, hour).unwrap().used, 10);
    clock.set(Timestamp::from_unix_millis(NEW_YEAR + 2 * 3_600_000));
    assert!(gate.try_consume(1, hour, 10).unwrap().is_allowed());
}

/// A counter of a window that is over is forgotten on a restart; a clock that is set back later
/// must not find an empty counter in that window.
#[test]
fn a_forgotten_window_stays_closed() {
    let dir = temporary();
    let clock = ManualClock::new(Timestamp::from_unix_millis(NEW_YEAR));
    let open = || Tollgate::open(dir.path(), small().clock(Arc::new(clock.clone()))).unwrap();
    let gate = open();
    let hour = gate.define(Quota::new("per-hour", 10).window(Window::Hour)).unwrap();
    gate.consume(1, hour, 10).unwrap();
    drop(gate);
    clock.set(Timestamp::from_unix_millis(NEW_YEAR + 3_600_000));
    drop(open());
    let gate = open();
    clock.set(Timestamp::from_unix_millis(NEW_YEAR + 60_000));
    let decision = gate.try_consume(1, hour, 10).unwrap();
    assert!(decision.is_allowed(), "counted in the window that follows");
    assert_eq!(decision.resets_at, Some(Timestamp::from_unix_millis(NEW_YEAR + 2 * 3_600_000)));
}

#[test]
fn limits_of_users_survive_and_can_be_taken_away() {
    let dir = temporary();
    let gate = open(&dir);
    let quota = gate.define(Quota::new("requests", 10)).unwrap();
    gate.set_limit(1, quota, 3).unwrap();
    gate.counter(2, quota).unwrap().set_limit(0).unwrap();
    assert!(gate.try_consume(1, quota, 4).unwrap().is_denied());
    assert!(gate.try_consume(2, quota, 1).unwrap().is_denied());
    drop(gate);
    let gate = open(&dir);
    assert_eq!(gate.usage(1, quota).unwrap().limit, 3);
    assert_eq!(gate.usage(2, quota).unwrap().limit, 0);
    gate.clear_limit(1, quota).unwrap();
    gate.snapshot().unwrap();
    drop(gate);
    let gate = open(&dir);
    assert_eq!(gate.usage(1, quota).unwrap().limit, 10);
    assert_eq!(gate.usage(2, quota).unwrap().limit, 0);
}

#[test]
fn handle_and_map_share_one_counter() {
    let dir = temporary();
    let gate = open(&dir);
    let quota = gate.define(Quota::new("requests", 10)).unwrap();
    gate.consume(1, quota, 2).unwrap();
    let counter = gate.counter(1, quota).unwrap();
    counter.consume(3).unwrap();
    gate.consume(1, quota, 1).unwrap();
    assert_eq!((counter.usage().used, gate.usage(1, quota).unwrap().used), (6, 6));
    assert_eq!(counter.refund(100).unwrap(), 6);
    assert_eq!(gate.usage(1, quota).unwrap().used, 0);
    drop(gate);
    assert!(counter.try_consume(1).unwrap().is_allowed(), "a handle keeps the engine open");
    drop(counter);
    assert_eq!(open(&dir).usage(1, quota).unwrap().used, 1);
}

#[test]
fn a_directory_has_one_owner_and_a_closed_engine_refuses() {
    let dir = temporary();
    let gate = open(&dir);
    let quota = gate.define(Quota::new("requests", 10)).unwrap();
    let second = Tollgate::open(dir.path(), small());
    assert!(matches!(second, Err(Error::Locked { .. })), "{second:?}");
    let counter = gate.counter(1, quota).unwrap();
    gate.close().unwrap();
    gate.close().unwrap();
    // Also where there is nothing to do: whoever is told 0 would believe that it was recorded.
    assert!(matches!(gate.refund(1, quota, 1), Err(Error::Closed)));
    assert!(matches!(counter.refund(1), Err(Error::Closed)));
    assert!(matches!(counter.try_consume(11), Err(Error::Closed)), "nor is there a denial");
    assert!(matches!(gate.counter(2, quota), Err(Error::Closed)));
    assert!(matches!(gate.consume(1, quota, 1), Err(Error::Closed)));
    assert!(matches!(gate.sync(), Err(Error::Closed)));
    assert!(matches!(gate.define(Quota::new("x", 1)), Err(Error::Closed)));
    assert_eq!(gate.health().level(), HealthLevel::Failed);
    let again = open(&dir);
    assert_eq!(again.usage(1, quota).unwrap().used, 0);
    assert_eq!(gate.usage(1, quota).unwrap().used, 0, "what is in memory can still be read");
}

/// The directory was moved while an engine had it open, and a copy put in its place, which another
/// one opened. The first went on by the path, and renamed and removed the other's files.
#[test]
fn a_directory_that_was_moved_and_its_copy_are_two() {
    let dir = temporary();
    let [data, copy, moved] = ["data", "copy", "moved"].map(|name| dir.path().join(name));
    let first = Tollgate::open(&data, small()).unwrap();
    let quota = first.define(Quota::new("requests", AMOUNT_MAX)).unwrap();
    first.consume_sync(1, quota, 1).unwrap();
    first.close().unwrap();
    std::fs::create_dir(&copy).unwrap();
    for entry in std::fs::read_dir(&data).unwrap().map(Result::unwrap) {
        std::fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
    }
    let first = Tollgate::open(&data, small()).unwrap();
    std::fs::rename(&data, &moved).unwrap();
    std::fs::rename(&copy, &data).unwrap();
    let second = Tollgate::open(&data, small()).unwrap();
    for round in 0..50 {
        for user in 0..200 {
            first.consume(user, quota, 1).unwrap();
        }
        first.sync().unwrap();
        second.consume_sync(round % 7, quota, 10).unwrap();
    }
    first.close().unwrap();
    second.close().unwrap();
    let used = |dir| Tollgate::open(dir, small()).unwrap().usage(1, quota).unwrap().used;
    assert_eq!(used(&moved), 51);
    assert_eq!(used(&data), 71);
}

/// Some always ask for one unit, so that the limit is reached exactly: nobody is refused what fits.
#[test]
fn more_threads_than_lanes_lose_nothing_and_keep_the_limit() {
    const LIMIT: u64 = 20_000;
    let dir = temporary();
    let gate = open(&dir);
    let quota = gate.define(Quota::new("requests", LIMIT)).unwrap();
    let admitted = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let (gate, admitted) = (&gate, &admitted);
            scope.spawn(move || {
                let counter = gate.counter(1, quota).unwrap();
                loop {
                    let amount = thread % 3 + 1;
                    let by_handle = thread % 2 == 0;
                    let decision = if by_handle {
                        counter.try_consume(amount)
                    } else {
                        gate.try_consume(1, quota, amount)
                    };
                    if !is_admitted_exactly(amount, &decision.unwrap()) {
                        break;
                    }
                    admitted.fetch_add(amount, Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(admitted.into_inner(), LIMIT);
    assert_eq!(gate.usage(1, quota).unwrap().used, LIMIT);
    drop(gate);
    assert_eq!(open(&dir).usage(1, quota).unwrap().used, LIMIT);
}

/// Whether it was admitted: when it fits, and only then.
fn is_admitted_exactly(amount: u64, decision: &Decision) -> bool {
    let is_admitted = decision.is_allowed();
    let after = decision.used + if is_admitted { 0 } else { amount };
    assert_eq!(is_admitted, after <= decision.limit, "{amount}: {decision:?}");
    is_admitted
}

/// One thread changes a user's limit, others consume and give back. A decision is by a limit that
/// was in force during the call, and exact by it. Even limits are defaults, odd ones the user's.
#[test]
fn limits_that_change_meanwhile_bind_from_the_answer_on() {
    const CHANGES: u64 = 300;
    let dir = temporary();
    let gate = open(&dir);
    let default = 40;
    let quota = gate.define(Quota::new("requests", default)).unwrap();
    // How many changes were asked for, and how many acknowledged.
    let [asked, acknowledged] = [AtomicU64::new(0), AtomicU64::new(0)];
    // The limit after so many changes: each other one takes it away.
    let limit_after =
        |changes: u64| if changes.is_multiple_of(2) { default } else { changes % 30 * 2 + 1 };
    std::thread::scope(|scope| {
        for thread in 0..3 {
            let (gate, asked, acknowledged) = (&gate, &asked, &acknowledged);
            scope.spawn(move || {
                let counter = gate.counter(1, quota).unwrap();
                let mut denied = 0_u64;
                while acknowledged.load(Ordering::SeqCst) < CHANGES {
                    let amount = thread + 1;
                    let first = acknowledged.load(Ordering::SeqCst);
                    let decision = match thread {
                        0 => counter.try_consume(amount),
                        1 => gate.try_consume(1, quota, amount),
                        _ => gate
                            .try_consume_all(&[Consume { user: 1, quota, amount }])
                            .map(|decisions| decisions.get(0).unwrap()),
                    };
                    let decision = decision.unwrap();
                    let last = asked.load(Ordering::SeqCst);
                    let mut limits = (first..=last).map(limit_after);
                    assert!(limits.any(|limit| limit == decision.limit), "{decision:?}");
                    if !is_admitted_exactly(amount, &decision) {
                        denied += 1;
                        gate.refund(1, quota, 7).unwrap();
                    }
                }
                assert!(denied > 0, "the limits did not bind");
            });
        }
        for change in 1..=CHANGES {
            asked.store(change, Ordering::SeqCst);
            match change % 2 {
                0 => gate.clear_limit(1, quota).unwrap(),
                _ => gate.set_limit(1, quota, limit_after(change)).unwrap(),
            }
            acknowledged.store(change, Ordering::SeqCst);
        }
    });
}

/// Refunds and consumes of one counter race; the sum of what was applied is what is left, in memory
/// and on disk.
#[test]
fn racing_refunds_and_consumes_add_up() {
    let dir = temporary();
    let gate = open(&dir);
    let quota = gate.define(Quota::new("requests", 1_000_000)).unwrap();
    let (added, given) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (gate, added, given) = (&gate, &added, &given);
            scope.spawn(move || {
                for round in 0..3_000_u64 {
                    if thread % 2 == 0 {
                        gate.consume(1, quota, 3).unwrap();
                        added.fetch_add(3, Ordering::Relaxed);
                    } else {
                        let back = gate.refund(1, quota, round % 5 + 1).unwrap();
                        given.fetch_add(back, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let left = added.into_inner() - given.into_inner();
    assert_eq!(gate.usage(1, quota).unwrap().used, left);
    drop(gate);
    assert_eq!(open(&dir).usage(1, quota).unwrap().used, left);
}

#[test]
fn presets_open_and_work() {
    for config in [Config::high_concurrency(), Config::low_latency(), Config::high_reliability()] {
        let dir = temporary();
        let gate = Tollgate::open(dir.path(), config.lane_records(1 << 12)).unwrap();
        let quota = gate.define(Quota::new("requests", 10)).unwrap();
        assert!(gate.try_consume(1, quota, 1).unwrap().is_allowed());
        assert!(gate.health().is_healthy(), "{:?}", gate.health());
        gate.close().unwrap();
    }
}

#[test]
fn a_look_from_outside_sees_what_a_recovery_would() {
    let dir = temporary();
    let gate = open(&dir);
    let quota = gate.define(Quota::new("requests", 10)).unwrap();
    let other = gate.define(Quota::new("tokens", 10)).unwrap();
    gate.consume(1, quota, 4).unwrap();
    gate.consume(2, quota, 5).unwrap();
    gate.snapshot().unwrap();
    gate.consume(2, quota, 2).unwrap();
    gate.close().unwrap();
    let before = std::fs::read_dir(dir.path()).unwrap().count();
    let seen = tollgate::inspect(dir.path()).unwrap();
    assert_eq!(seen.engine_id, gate.engine_id());
    assert_eq!(seen.quotas.len(), 2);
    assert_eq!((seen.quotas[0].id, seen.quotas[0].counters), (quota, 2));
    assert_eq!((seen.quotas[0].used, seen.quotas[0].largest), (11, Some((2, 7))));
    assert_eq!((seen.quotas[1].id, seen.quotas[1].counters), (other, 0));
    assert_eq!(seen.durable_batch, seen.last_batch - 1, "the last one is the mark");
    assert!(seen.report.findings.is_empty(), "{:?}", seen.report.findings);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), before);
    let missing = tollgate::inspect(dir.path().join("missing"));
    assert!(matches!(missing, Err(Error::Io { .. })), "{missing:?}");
    let empty = temporary();
    assert!(matches!(tollgate::inspect(empty.path()), Err(Error::Io { .. })));
}
