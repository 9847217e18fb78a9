//! Reservations, operations over several counters, requests that count once: one promise a test.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tollgate::{
    AMOUNT_MAX, Config, Consume, Decisions, Error, ManualClock, Overrun, Quota, QuotaId,
    Reservation, ReservationId, Reserved, Resource, Settlement, Timestamp, Tollgate, Window,
};

use crate::support::small;

pub(super) const NEW_YEAR: u64 = 1_767_225_600_000; // 2026-01-01T00:00:00Z
pub(super) const MINUTE: Duration = Duration::from_secs(60);

/// A gate on a clock that is set by hand, with a quota of 10 a day.
pub(super) struct Fixture {
    dir: tempfile::TempDir,
    pub(super) clock: Arc<ManualClock>,
    pub(super) gate: Tollgate,
    pub(super) quota: QuotaId,
}

impl Fixture {
    pub(super) fn new() -> Self {
        Self::with(Quota::new("tokens", 10).window(Window::Day), |config| config)
    }

    pub(super) fn with(quota: Quota, configure: impl Fn(Config) -> Config) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let clock = Arc::new(ManualClock::new(Timestamp::from_unix_millis(NEW_YEAR)));
        let config = configure(small().clock(clock.clone()));
        let gate = Tollgate::open(dir.path(), config).expect("the directory opens");
        let quota = gate.define(quota).expect("the quota is valid");
        Self { dir, clock, gate, quota }
    }

    /// Opens what is in the directory now, as after a crash.
    pub(super) fn crash(&self) -> (tempfile::TempDir, Tollgate) {
        let copy = tempfile::tempdir().expect("a temporary directory");
        // As it is at one instant: twice the same.
        let mut image = image(self.dir.path());
        while image.is_err() || image.as_ref().ok() != self::image(self.dir.path()).as_ref().ok() {
            image = self::image(self.dir.path());
        }
        for (name, bytes) in image.expect("it was read") {
            std::fs::write(copy.path().join(name), bytes).expect("a copy");
        }
        let config = small().clock(self.clock.clone());
        let gate = Tollgate::open(copy.path(), config).expect("the copy opens");
        (copy, gate)
    }

    pub(super) fn reserve(&self, amount: u64) -> Reservation {
        match self.gate.reserve(7, self.quota, amount, MINUTE).expect("no error") {
            Reserved::Open(reservation) => reservation,
            Reserved::Denied(denied) => panic!("{denied:?}"),
        }
    }

    /// Used and reserved.
    pub(super) fn usage(&self) -> (u64, u64) {
        usage(&self.gate, 7, self.quota)
    }
}

/// The files of a directory.
fn image(dir: &Path) -> std::io::Result<BTreeMap<OsString, Vec<u8>>> {
    let read = |entry: std::io::Result<std::fs::DirEntry>| {
        let entry = entry?;
        Ok((entry.file_name(), std::fs::read(entry.path())?))
    };
    std::fs::read_dir(dir)?.map(read).collect()
}

fn usage(gate: &Tollgate, user: u64, quota: QuotaId) -> (u64, u64) {
    let usage = gate.usage(user, quota).expect("the quota is known");
    (usage.used, usage.reserved)
}

/// Waits until the expiry thread has looked at the clock again.
fn eventually(what: impl Fn() -> bool) {
    while !what() {
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn what_is_reserved_counts_at_once_and_the_rest_comes_back() {
    let on = Fixture::new();
    let mut reservation = on.reserve(8);
    assert_eq!(on.usage(), (8, 8));
    let denied = on.gate.reserve(7, on.quota, 3, MINUTE).unwrap().into_result().unwrap_err();
    assert_eq!((denied.refused(), denied.get(0).unwrap().used), (Some(0), 8));
    assert!(denied.retry_after().is_some());
    assert!(on.gate.try_consume(7, on.quota, 3).unwrap().is_denied());
    assert_eq!(on.gate.consume(7, on.quota, 1).unwrap().reserved, 8);
    let charged = reservation.commit(5).unwrap();
    assert!(charged.is_allowed());
    assert_eq!((charged.get(0).unwrap().used, charged.get(0).unwrap().remaining), (6, 4));
    assert_eq!(on.usage(), (6, 0));
    let id = reservation.id();
    let again = reservation.commit(5);
    let how = Settlement::Committed;
    assert!(
        matches!(again, Err(Error::ReservationSettled { id: i, how: h }) if (i, h) == (id, how))
    );
    drop(reservation);
    assert_eq!(on.usage(), (6, 0));
}

#[test]
fn dropped_or_cancelled_it_is_given_back() {
    let on = Fixture::new();
    drop(on.reserve(4));
    assert_eq!(on.usage(), (0, 0));
    on.reserve(4).cancel().unwrap();
    assert_eq!(on.usage(), (0, 0));
    let id = on.reserve(4).detach();
    assert_eq!(on.usage(), (4, 4));
    on.gate.cancel_reservation(id).unwrap();
    assert_eq!(on.usage(), (0, 0));
    let again = on.gate.cancel_reservation(id);
    let how = Settlement::Cancelled;
    assert!(matches!(again, Err(Error::ReservationSettled { how: h, .. }) if h == how));
    let unknown = ReservationId::from_u128(99);
    assert!(matches!(
        on.gate.commit_reservation(unknown, 1),
        Err(Error::UnknownReservation(id)) if id == unknown
    ));
}

#[test]
fn its_time_over_it_is_given_back() {
    let on = Fixture::new();
    let id = on.reserve(10).detach();
    let kept = on.gate.reserve(8, on.quota, 2, 2 * MINUTE).unwrap().into_result().unwrap();
    on.clock.advance(MINUTE - Duration::from_millis(1));
    assert!(on.gate.try_consume(7, on.quota, 1).unwrap().is_denied());
    on.clock.advance(Duration::from_millis(1));
    // Before a denial it is looked whether something is over.
    assert!(on.gate.try_consume(7, on.quota, 1).unwrap().is_allowed());
    assert_eq!(on.usage(), (1, 0));
    let late = on.gate.commit_reservation(id, 3);
    let how = Settlement::Expired;
    assert!(matches!(late, Err(Error::ReservationSettled { how: h, .. }) if h == how));
    kept.extend(3 * MINUTE).unwrap();
    on.clock.advance(2 * MINUTE);
    assert_eq!(usage(&on.gate, 8, on.quota), (2, 2));
    on.clock.advance(MINUTE);
    eventually(|| usage(&on.gate, 8, on.quota) == (0, 0));
    assert_eq!(on.gate.stats().reservations_expired, 2);
    assert!(matches!(kept.extend(MINUTE), Err(Error::ReservationSettled { .. })));
}

#[test]
fn what_cost_more_is_charged_or_refused_as_the_quota_says() {
    let on = Fixture::new();
    assert!(on.reserve(4).commit(25).unwrap().is_allowed());
    assert_eq!(on.usage(), (25, 0));

    let refusing = Quota::new("strict", 10).overrun(Overrun::Refuse);
    let on = Fixture::with(refusing, |config| config);
    let mut reservation = on.reserve(4);
    assert!(on.gate.try_consume(7, on.quota, 5).unwrap().is_allowed());
    let denied = reservation.commit(6).unwrap();
    assert_eq!((denied.refused(), denied.get(0).unwrap().used), (Some(0), 9));
    assert_eq!(on.usage(), (9, 4));
    assert!(reservation.commit(5).unwrap().is_allowed());
    assert_eq!(on.usage(), (10, 0));
    // The policy is kept, and can be changed.
    let (_copy, gate) = on.crash();
    assert_eq!(gate.quota(on.quota).unwrap().overrun_policy(), Overrun::Refuse);
    gate.define(Quota::new("strict", 10)).unwrap();
    assert_eq!(gate.quota(on.quota).unwrap().overrun_policy(), Overrun::Charge);
}

#[test]
fn bad_input_is_refused_and_reserves_nothing() {
    let on = Fixture::with(Quota::new("tokens", 10), |config| config.reservations_max(2));
    let reserve = |amount, ttl| on.gate.reserve(7, on.quota, amount, ttl);
    assert!(matches!(reserve(0, MINUTE), Err(Error::InvalidAmount(0))));
    assert!(matches!(reserve(1, Duration::ZERO), Err(Error::InvalidTtl(Duration::ZERO))));
    let longest = Duration::from_secs(7 * 86_400);
    for ttl in [Duration::from_nanos(999_999), longest + Duration::from_nanos(1)] {
        assert!(matches!(reserve(1, ttl), Err(Error::InvalidTtl(refused)) if refused == ttl));
    }
    for ttl in [Duration::from_millis(1), longest] {
        assert!(reserve(1, ttl).unwrap().is_open());
    }
    assert!(matches!(on.gate.reserve_all(&[], MINUTE), Err(Error::InvalidGroup { found: 0, .. })));
    let mut first = on.reserve(1);
    let _second = on.reserve(1);
    let too_many = reserve(1, MINUTE);
    let what = Resource::OpenReservations;
    assert!(matches!(too_many, Err(Error::TooMany { what: it, bound: 2 }) if it == what));
    assert!(matches!(first.commit(AMOUNT_MAX + 1), Err(Error::InvalidAmount(_))));
    assert!(matches!(first.commit_items(&[]), Err(Error::InvalidGroup { found: 0 })));
    assert!(matches!(first.commit(AMOUNT_MAX), Err(Error::Overflow { .. })));
    assert_eq!((on.usage(), on.gate.stats().reservations), ((2, 2), 2));
    assert!(first.commit(0).unwrap().is_allowed());
    assert_eq!(on.usage(), (1, 1));
    let unknown = QuotaId::from_u16(9);
    assert!(matches!(on.gate.reserve(7, unknown, 1, MINUTE), Err(Error::UnknownQuota(_))));
    let items = [Consume { user: 1, quota: on.quota, amount: 1 }; 17];
    assert!(matches!(on.gate.try_consume_all(&items), Err(Error::InvalidGroup { found: 17, .. })));
    let huge = [Consume { user: 1, quota: on.quota, amount: AMOUNT_MAX }; 2];
    let denied = on.gate.try_consume_all(&huge).unwrap();
    let each: Vec<_> = denied.each().map(|one| (one.used, one.retry_after())).collect();
    assert!(denied.is_denied() && each == [(0, None); 2], "{denied:?}");
    assert!(on.gate.reserve_all(&huge, MINUTE).unwrap().into_result().is_err());
}

/// However large the limit, and however many make up the sum.
#[test]
fn items_that_are_too_much_together_are_denied() {
    let on = Fixture::with(Quota::new("tokens", AMOUNT_MAX), |config| config);
    let all = |count, amount| {
        let item = Consume { user: 1, quota: on.quota, amount };
        on.gate.try_consume_all(&vec![item; count]).unwrap().is_allowed()
    };
    assert!(!all(2, AMOUNT_MAX) && !all(16, AMOUNT_MAX) && !all(2, AMOUNT_MAX / 2 + 1));
    assert!(all(2, AMOUNT_MAX / 2));
    assert_eq!(on.gate.usage(1, on.quota).unwrap().used, AMOUNT_MAX - 1);
}

#[test]
fn it_is_charged_to_the_window_in_which_it_was_made() {
    let on = Fixture::new();
    let day = Duration::from_secs(86_400);
    let reserve = |amount| on.gate.reserve(7, on.quota, amount, day).unwrap();
    let mut reservation = reserve(8).into_result().unwrap();
    let cancelled = reserve(1).into_result().unwrap();
    on.clock.advance(day - MINUTE);
    reservation.extend(3 * MINUTE).unwrap();
    cancelled.extend(3 * MINUTE).unwrap();
    on.clock.advance(2 * MINUTE);
    assert_eq!(on.usage(), (0, 0), "a new day");
    assert!(on.gate.try_consume(7, on.quota, 10).unwrap().is_allowed());
    assert!(reservation.commit(3).unwrap().is_allowed());
    drop(cancelled);
    assert_eq!(on.usage(), (10, 0), "yesterday's reservation changes nothing today");
    let (_copy, gate) = on.crash();
    assert_eq!(usage(&gate, 7, on.quota), (10, 0));
    assert_eq!(gate.stats().reservations, 0);
}

#[test]
fn a_refund_leaves_what_is_reserved() {
    let on = Fixture::new();
    let mut reservation = on.reserve(6);
    on.gate.consume(7, on.quota, 3).unwrap();
    assert_eq!(on.gate.refund(7, on.quota, 9).unwrap(), 3);
    assert_eq!(on.usage(), (6, 6));
    assert!(reservation.commit(6).unwrap().is_allowed());
    assert_eq!(on.gate.refund(7, on.quota, 9).unwrap(), 6);
    assert_eq!(on.usage(), (0, 0));
}

#[test]
fn after_a_crash_it_is_open_until_its_time_is_over() {
    let on = Fixture::new();
    let (committed, open, lost) = (on.reserve(1).detach(), on.reserve(2).detach(), on.reserve(4));
    let lost = lost.detach();
    assert!(on.gate.commit_reservation(committed, 2).unwrap().is_allowed());
    on.gate.extend_reservation(open, 2 * MINUTE).unwrap();
    for snapshot in [false, true] {
        if snapshot {
            on.gate.snapshot().unwrap();
        }
        let (copy, gate) = on.crash();
        assert_eq!(usage(&gate, 7, on.quota), (8, 6));
        assert_eq!(gate.stats().reservations, 2);
        let again = gate.commit_reservation(committed, 2);
        assert!(matches!(again, Err(Error::ReservationSettled { .. })), "{again:?}");
        assert!(gate.commit_reservation(open, 1).unwrap().is_allowed());
        assert_eq!(usage(&gate, 7, on.quota), (7, 4));
        // Ids are not given twice.
        let next = gate.reserve(7, on.quota, 1, MINUTE).unwrap().into_result().unwrap().detach();
        assert!(![committed, open, lost].contains(&next));
        drop(gate);
        let gate = Tollgate::open(copy.path(), small().clock(on.clock.clone())).unwrap();
        assert_eq!(usage(&gate, 7, on.quota), (8, 5));
    }
    on.clock.advance(MINUTE);
    eventually(|| on.usage() == (4, 2));
    let (_copy, gate) = on.crash();
    eventually(|| usage(&gate, 7, on.quota) == (4, 2));
    on.clock.advance(MINUTE);
    eventually(|| usage(&gate, 7, on.quota) == (2, 0));
}

#[test]
fn an_id_reads_back() {
    let id = ReservationId::from_u128(0x1_0000_0000_0000_0000_0000_0000_0002);
    assert_eq!(id.to_string().parse::<ReservationId>().unwrap(), id);
    assert_eq!(ReservationId::from_u128(id.as_u128()), id);
    assert!("x".parse::<ReservationId>().is_err());
    // In logs it is looked for in the form in which it is kept.
    assert_eq!(format!("{id:?}"), format!("ReservationId({id})"));
}

pub(super) fn group(parts: &[(u64, QuotaId, u64)]) -> Vec<Consume> {
    parts.iter().map(|&(user, quota, amount)| Consume { user, quota, amount }).collect()
}

#[test]
fn a_group_is_counted_whole_or_not_at_all() {
    let on = Fixture::new();
    let other = on.gate.define(Quota::new("requests", 3)).unwrap();
    let call = group(&[(1, other, 2), (7, on.quota, 5), (2, on.quota, 1)]);
    let admitted = on.gate.try_consume_all(&call).unwrap();
    assert!(admitted.is_allowed() && admitted.retry_after().is_none());
    let used: Vec<_> = admitted.each().map(|decision| decision.used).collect();
    assert_eq!(used, [2, 5, 1], "in the order of the call");
    let denied = on.gate.try_consume_all(&call).unwrap();
    assert_eq!(denied.refused(), Some(0));
    let allowed: Vec<_> = denied.each().map(|decision| decision.is_allowed()).collect();
    assert_eq!(allowed, [false, true, true]);
    assert_eq!(denied.retry_after(), None, "a lifetime does not end");
    assert_eq!(on.usage(), (5, 0));
    assert_eq!(usage(&on.gate, 2, on.quota), (1, 0));
    // The same counter twice is added up.
    let twice = group(&[(7, on.quota, 3), (7, on.quota, 3)]);
    let denied = on.gate.try_consume_all(&twice).unwrap();
    assert!(denied.is_denied() && denied.retry_after() > Some(MINUTE));
    let twice = group(&[(7, on.quota, 3), (7, on.quota, 2)]);
    assert!(on.gate.try_consume_all(&twice).unwrap().is_allowed());
    assert_eq!(on.usage(), (10, 0));
    let (_copy, gate) = on.crash();
    assert_eq!(usage(&gate, 7, on.quota), (10, 0));
    assert_eq!(usage(&gate, 1, other), (2, 0));
}

#[test]
fn a_group_is_reserved_and_settled_whole() {
    let on = Fixture::new();
    let other = on.gate.define(Quota::new("strict", 9).overrun(Overrun::Refuse)).unwrap();
    let call = group(&[(1, other, 4), (7, on.quota, 4)]);
    let reserve = || on.gate.reserve_all(&call, MINUTE).unwrap().into_result();
    let mut reservation = reserve().unwrap();
    assert_eq!((on.usage(), usage(&on.gate, 1, other)), ((4, 4), (4, 4)));
    assert_eq!(reserve().unwrap().commit(1).unwrap().each().len(), 2);
    assert_eq!((on.usage(), usage(&on.gate, 1, other)), ((5, 4), (5, 4)));
    // By their names, in whatever order, and so are the answers.
    let actual = |strict, tokens| group(&[(1, other, strict), (7, on.quota, tokens)]);
    let denied = reservation.commit_items(&actual(9, 12)).unwrap();
    assert_eq!(denied.refused(), Some(0));
    assert_eq!((on.usage(), usage(&on.gate, 1, other)), ((5, 4), (5, 4)));
    let charged = reservation.commit_items(&actual(8, 12)).unwrap();
    let used: Vec<_> = charged.each().map(|decision| decision.used).collect();
    assert_eq!((charged.is_allowed(), used), (true, vec![9, 13]));
    assert_eq!((on.usage(), usage(&on.gate, 1, other)), ((13, 0), (9, 0)));
    let (_copy, gate) = on.crash();
    assert_eq!((usage(&gate, 7, on.quota), usage(&gate, 1, other)), ((13, 0), (9, 0)));
}

/// By their order alone, two amounts that were swapped were once charged to the wrong counters.
#[test]
fn a_commit_names_each_counter_of_its_reservation_and_no_other() {
    let on = Fixture::new();
    let other = on.gate.define(Quota::new("requests", 9)).unwrap();
    let call = group(&[(1, other, 4), (7, on.quota, 4)]);
    let id = on.gate.reserve_all(&call, MINUTE).unwrap().into_result().unwrap().detach();
    let commit = |parts: &[_]| on.gate.commit_reservation_items(id, &group(parts));
    let foreign = [(1, other, 1), (7, on.quota, 1), (8, on.quota, 1)];
    for (parts, expected) in [
        (&foreign[..], (8, on.quota, false)),
        (&foreign[..1], (7, on.quota, true)),
        (&[(1, other, 1), (7, other, 1)], (7, other, false)),
    ] {
        match commit(parts) {
            Err(Error::ReservationMismatch { id: it, user, quota, is_reserved }) => {
                assert_eq!((it, (user, quota, is_reserved)), (id, expected));
            }
            answer => panic!("{answer:?}"),
        }
    }
    let huge = [(1, other, AMOUNT_MAX), (7, on.quota, 1), (1, other, AMOUNT_MAX)];
    let sum = 2 * AMOUNT_MAX;
    assert!(matches!(commit(&huge), Err(Error::InvalidAmount(it)) if it == sum));
    let many = [(1, other, 1); 17];
    assert!(matches!(commit(&many), Err(Error::InvalidGroup { found: 17 })));
    assert_eq!((on.usage(), usage(&on.gate, 1, other)), ((4, 4), (4, 4)));
    // What two calls to a model cost, in one go.
    let charged = commit(&[(7, on.quota, 2), (1, other, 0), (7, on.quota, 3)]).unwrap();
    let used: Vec<_> = charged.each().map(|decision| decision.used).collect();
    assert_eq!((charged.is_allowed(), used), (true, vec![5, 0, 5]));
    assert_eq!((on.usage(), usage(&on.gate, 1, other)), ((5, 0), (0, 0)));
}

/// Threads that want the same counters in any order, while others consume, refund and reserve one
/// of them: nobody waits for ever, no limit is passed, nobody is refused while there is room for
/// all, and each group is counted whole.
#[test]
fn racing_groups_are_exact() {
    const THREADS: u64 = 4;
    const ROUNDS: u64 = 2_000;
    let on = Fixture::with(Quota::new("tokens", AMOUNT_MAX), |config| {
        config.lanes(4).lane_records(1 << 12).journal_file_bytes(1 << 20)
    });
    let limit = 3_000;
    let tight = on.gate.define(Quota::new("tight", limit)).unwrap();
    let [admitted, extra] = [AtomicU64::new(0), AtomicU64::new(0)];
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (gate, quota, admitted, extra) = (&on.gate, on.quota, &admitted, &extra);
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    let mut call = group(&[(1, quota, 1), (2, quota, 1), (9, tight, 1)]);
                    call.rotate_left((thread + round) as usize % 3);
                    let decisions = gate.try_consume_all(&call).unwrap();
                    match decisions.refused() {
                        None => drop(admitted.fetch_add(1, Ordering::Relaxed)),
                        Some(refused) => {
                            let full = decisions.get(refused).unwrap();
                            assert_eq!((full.used, full.limit), (limit, limit));
                        }
                    }
                    let reserved = gate.reserve(2, quota, 5, MINUTE).unwrap();
                    gate.consume(1, quota, 2).unwrap();
                    extra.fetch_add(2, Ordering::Relaxed);
                    extra.fetch_sub(gate.refund(1, quota, 1).unwrap(), Ordering::Relaxed);
                    if round % 2 == 0 {
                        drop(reserved);
                    } else {
                        let mut reservation = reserved.into_result().unwrap();
                        assert!(reservation.commit(0).unwrap().is_allowed());
                    }
                }
            });
        }
    });
    let admitted = admitted.into_inner();
    assert_eq!(admitted, limit, "as many as fit, and no more");
    let expected = [(admitted + extra.into_inner(), 0), (admitted, 0), (admitted, 0)];
    let found = |gate: &Tollgate| {
        [(1, on.quota), (2, on.quota), (9, tight)].map(|(user, quota)| usage(gate, user, quota))
    };
    assert_eq!(found(&on.gate), expected);
    let (_copy, gate) = on.crash();
    assert_eq!(found(&gate), expected);
}

#[test]
fn a_request_counts_once_and_is_answered_alike() {
    let on = Fixture::new();
    let once = |id, amount| on.gate.try_consume_once(id, 7, on.quota, amount);
    let first = once(1, 6).unwrap();
    assert!(first.is_allowed());
    let denied = once(2, 6).unwrap();
    assert!(denied.is_denied() && denied.retry_after().is_some());
    on.gate.consume(7, on.quota, 1).unwrap();
    on.clock.advance(MINUTE);
    assert_eq!(once(1, 6).unwrap(), first);
    assert_eq!(once(2, 6).unwrap(), denied, "refused once, refused again");
    assert_eq!(on.usage(), (7, 0));
    for other in [
        once(1, 5).map(drop),
        on.gate.try_consume_once(1, 8, on.quota, 6).map(drop),
        on.gate.consume_once(1, 7, on.quota, 6).map(drop),
        on.gate.reserve_once(2, 7, on.quota, 6, MINUTE).map(drop),
    ] {
        assert!(matches!(other, Err(Error::RequestMismatch { .. })), "{other:?}");
    }
    let used = on.gate.consume_once(3, 7, on.quota, 20).unwrap();
    assert_eq!((used.used, used.remaining), (27, 0));
    assert_eq!(on.gate.consume_once(3, 7, on.quota, 20).unwrap(), used);
    for snapshot in [false, true] {
        if snapshot {
            on.gate.snapshot().unwrap();
        }
        let (_copy, gate) = on.crash();
        assert_eq!(gate.try_consume_once(1, 7, on.quota, 6).unwrap(), first);
        assert_eq!(gate.try_consume_once(2, 7, on.quota, 6).unwrap(), denied);
        assert_eq!(gate.consume_once(3, 7, on.quota, 20).unwrap(), used);
        assert_eq!((usage(&gate, 7, on.quota), gate.stats().answers), ((27, 0), 3));
    }
    assert!(matches!(once(4, 0), Err(Error::InvalidAmount(0))));
}

#[test]
fn a_request_is_forgotten_when_its_time_is_over_or_there_are_too_many() {
    let on = Fixture::with(Quota::new("tokens", 1000), |config| {
        config.dedup_window(MINUTE).dedup_max(3)
    });
    let once = |id| on.gate.try_consume_once(id, 7, on.quota, 1).unwrap().used;
    assert_eq!([1, 2, 3, 1].map(once), [1, 2, 3, 1]);
    assert_eq!([4, 2, 1].map(once), [4, 2, 5], "the first was the oldest");
    assert_eq!(on.gate.stats().answers_forgotten_early, 2);
    on.clock.advance(MINUTE);
    assert_eq!(once(4), 6);
    on.gate.snapshot().unwrap();
    let (_copy, gate) = on.crash();
    assert_eq!(gate.stats().answers, 1);
}

#[test]
fn a_reservation_is_made_once() {
    let on = Fixture::new();
    let reserve = |gate: &Tollgate| {
        gate.reserve_once(1, 7, on.quota, 6, MINUTE).unwrap().into_result().unwrap()
    };
    let mut first = reserve(&on.gate);
    let again = reserve(&on.gate);
    assert_eq!(again.id(), first.id());
    drop(again);
    assert_eq!(on.usage(), (6, 6), "the second handle does not cancel it");
    let (_copy, gate) = on.crash();
    assert_eq!(reserve(&gate).id(), first.id());
    assert!(first.commit(4).unwrap().is_allowed());
    let mut again = reserve(&on.gate);
    assert!(matches!(again.commit(4), Err(Error::ReservationSettled { .. })));
    let denied = on.gate.reserve_once(2, 7, on.quota, 7, MINUTE).unwrap().into_result();
    assert_eq!(denied.as_ref().unwrap_err().refused(), Some(0));
    let again = on.gate.reserve_once(2, 7, on.quota, 7, MINUTE).unwrap().into_result();
    assert_eq!(again.unwrap_err(), denied.unwrap_err());
}

/// Two threads under each id, at the same time: one counts, both get its answer.
#[test]
fn of_racing_calls_under_one_id_one_counts() {
    let on = Fixture::with(Quota::new("tokens", 1_500), |config| {
        config.lane_records(1 << 12).journal_file_bytes(1 << 20)
    });
    let barrier = std::sync::Barrier::new(2);
    let answers = std::thread::scope(|scope| {
        let threads = [(), ()].map(|()| {
            scope.spawn(|| {
                let ask = |id| on.gate.try_consume_once(id, 7, on.quota, 1).unwrap();
                barrier.wait();
                (0..2_000).map(ask).collect::<Vec<_>>()
            })
        });
        threads.map(|thread| thread.join().unwrap())
    });
    assert!(answers[0] == answers[1]);
    assert_eq!(on.usage(), (1_500, 0));
    let (_copy, gate) = on.crash();
    let ask = |id| gate.try_consume_once(id, 7, on.quota, 1).unwrap();
    assert!((0..2_000).map(ask).eq(answers[0].iter().copied()));
}

#[test]
fn closed_it_is_open_until_the_next_open() {
    let on = Fixture::new();
    let mut reservation = on.reserve(4);
    on.gate.close().unwrap();
    assert!(matches!(reservation.commit(1), Err(Error::Closed)));
    // Not longer than it has.
    assert!(matches!(reservation.extend(Duration::from_millis(1)), Err(Error::Closed)));
    let one = on.gate.try_consume_all(&group(&[(1, on.quota, 1)]));
    assert!(matches!(one, Err(Error::Closed)));
    assert!(matches!(on.gate.try_consume_once(1, 7, on.quota, 1), Err(Error::Closed)));
    let id = reservation.id();
    drop(reservation);
    let gate = Tollgate::open(on.dir.path(), small().clock(on.clock.clone())).unwrap();
    assert_eq!(usage(&gate, 7, on.quota), (4, 4));
    let charged: Decisions = gate.commit_reservation(id, 3).unwrap();
    assert_eq!(charged.get(0).unwrap().used, 3);
}
