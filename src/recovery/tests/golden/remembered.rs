//! Golden directories of what is remembered besides the sums.

use super::*;
use crate::model::AMOUNT_MAX;

/// Reservations open, extended, committed and cancelled, groups and requests: in a snapshot, in
/// batches after it, and in the ring.
pub(super) fn make_ledger() {
    let mut making = Making::new(vec![Quota::new("tokens", 1_000)]);
    let owner = making.open(1, 64);
    for round in 0..3_u64 {
        let first = making.reserve(&owner, &[(1, 10), (2, 20 + round)], 3_600);
        let second = making.reserve(&owner, &[(3, 30)], 3_600);
        making.reserve(&owner, &[(4, 40)], 3_600);
        making.commit(&owner, first, 5);
        making.commit(&owner, second, if round == 1 { 0 } else { 31 });
        let asked = Consume { user: 5, quota: QuotaId(0), amount: 400 };
        making.ask(&owner, "try_consume", u128::from(round) << 100 | 1, asked);
        let pair = [6, 7].map(|user| Consume { user, quota: QuotaId(0), amount: 9 });
        assert!(owner.engine.try_consume_all(&pair).unwrap().is_allowed());
        for user in [6, 7] {
            *making.used.entry((0, user)).or_default() += 9;
            *making.most.entry((0, user)).or_default() += 9;
        }
        let open = making.reservations[0].0;
        owner.engine.extend(open, Duration::from_secs(7_200 + round)).unwrap();
        match round {
            0 => owner.engine.snapshot().unwrap(),
            1 => owner.engine.sync().unwrap(),
            _ => {}
        }
    }
    making.disk.kill();
    making.save("ledger");
}

/// Requests of each kind, admitted and refused, of two quotas, and reservations that end in their
/// batch and after it: in a snapshot, in batches after it, and in the ring; in runs, so that most
/// of them are written as how they differ from the one before.
pub(super) fn make_answers() {
    let calls = Quota::new("calls", AMOUNT_MAX).window(Window::Month);
    let mut making = Making::new(vec![Quota::new("tokens", 1_000), calls]);
    let owner = making.open(1, 128);
    let mut left_open: Option<ReservationId> = None;
    for round in 0..3_u64 {
        let id = |number: u64| u128::from(round * 100 + number).wrapping_mul(u128::MAX / 1_000);
        let tokens = |user, amount| Consume { user, quota: QuotaId(0), amount };
        let calls = |user, amount| Consume { user, quota: QuotaId(1), amount };
        for number in 0..3 {
            making.ask(&owner, "try_consume", id(number), calls(100 + number, 1 + round));
            making.clock.advance(Duration::from_millis(7));
        }
        making.ask(&owner, "consume", id(10), calls(u64::MAX, 1 << 40));
        making.ask(&owner, "try_consume", id(11), tokens(5, 400));
        making.ask(&owner, "try_consume", id(12), tokens(6, 4_000));
        making.ask(&owner, "reserve", id(13), tokens(7, 70));
        making.ask(&owner, "reserve", id(14), tokens(8, 80));
        making.ask(&owner, "reserve", id(15), tokens(9, 9_000));
        making.set_limit(&owner, 0, 5, Some(2_000 + round));
        making.ask(&owner, "consume", id(16), tokens(5, 3));
        // One that a batch before this one says the beginning of, then some that last for less.
        if let Some(before) = left_open.take() {
            making.commit(&owner, before, 4);
        }
        for user in 20..24 {
            let short = making.reserve(&owner, &[(user, 9)], 60);
            making.clock.advance(Duration::from_millis(1));
            making.commit(&owner, short, user % 2);
        }
        let [one, pair] = [&[(30, 10)][..], &[(31, 10), (32, 20)]]
            .map(|items| making.reserve(&owner, items, 3_600 + round));
        owner.engine.extend(pair, Duration::from_secs(7_200 + round)).unwrap();
        left_open = Some(one);
        match round {
            0 => owner.engine.snapshot().unwrap(),
            1 => owner.engine.sync().unwrap(),
            _ => {}
        }
    }
    making.disk.kill();
    making.save("answers");
}

/// Events for a sink that never took any: in its backlog, in two parts, in a batch after it, and in
/// the ring. Another has got some of them.
pub(super) fn make_events() {
    let mut making = Making::new(vec![Quota::new("tokens", 1_000)]);
    let (store, other) = (MemoryStore::new(), MemoryStore::new());
    (0..10_000).for_each(|_| store.inject(crate::sink::Fault::BeforeCommit));
    let sink: NamedSink = ("billing".to_owned(), Box::new(store.sink()));
    let other: NamedSink = ("other".to_owned(), Box::new(other.sink()));
    let owner = making.open_with(1, 64, vec![sink, other]);
    for value in 1..=10 {
        making.record(&owner, value % 3, value);
        if value % 4 == 0 {
            owner.engine.sync().unwrap();
        }
    }
    owner.engine.deliver(Duration::from_millis(200)).unwrap_err();
    owner.engine.snapshot().unwrap();
    making.record(&owner, 1, 11);
    making.record(&owner, 1, 12);
    owner.engine.sync().unwrap();
    making.record(&owner, 2, 13);
    making.record(&owner, 2, 14);
    making.disk.kill();
    let names = making.disk.file_names();
    let parts = names.iter().filter(|name| name.starts_with("backlog-billing")).count();
    assert_eq!(parts, 2, "{names:?}");
    making.save("events");
}
