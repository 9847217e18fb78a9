//! State that is read back: open reservations, limits of users' own.

use std::sync::atomic::{AtomicBool, Ordering};

use tollgate::{AMOUNT_MAX, Error, Quota, ReservationId, Settlement, Tollgate};

use crate::reservations::{Fixture, MINUTE, NEW_YEAR, group};

/// A service that was restarted knew neither what its reservations held nor for how long.
#[test]
fn open_reservations_can_be_read_back() {
    let on = Fixture::new();
    let other = on.gate.define(Quota::new("requests", 9)).unwrap();
    assert!(on.gate.open_reservations().is_empty());
    let call = group(&[(1, other, 1), (7, on.quota, 2), (1, other, 3)]);
    let long = on.gate.reserve_all(&call, 2 * MINUTE).unwrap().into_result().unwrap().detach();
    let (brief, settled) = (on.reserve(1).detach(), on.reserve(1).detach());
    on.gate.cancel_reservation(settled).unwrap();
    let said = |gate: &Tollgate| {
        let open = gate.open_reservations();
        for one in &open {
            assert_eq!(gate.open_reservation(one.id).as_ref().ok(), Some(one));
        }
        open.into_iter()
            .map(|one| (one.id, one.expires_at.as_unix_millis() - NEW_YEAR, one.items))
            .collect::<Vec<_>>()
    };
    let both = [
        (brief, 60_000, group(&[(7, on.quota, 1)])),
        (long, 120_000, group(&[(7, on.quota, 2), (1, other, 4)])),
    ];
    assert_eq!(said(&on.gate), both);
    let (_copy, gate) = on.crash();
    assert_eq!(said(&gate), both);
    // To look at one settles nothing and keeps nobody from doing so.
    assert_eq!(on.usage(), (3, 3));
    on.gate.extend_reservation(brief, 3 * MINUTE).unwrap();
    assert_eq!(said(&on.gate).last().map(|it| (it.0, it.1)), Some((brief, 180_000)));
    assert!(on.gate.commit_reservation(brief, 1).unwrap().is_allowed());

    let how = |id| match on.gate.open_reservation(id) {
        Err(Error::ReservationSettled { how, .. }) => how,
        answer => panic!("{answer:?}"),
    };
    assert_eq!((how(brief), how(settled)), (Settlement::Committed, Settlement::Cancelled));
    let unknown = ReservationId::from_u128(99);
    assert!(matches!(
        on.gate.open_reservation(unknown),
        Err(Error::UnknownReservation(id)) if id == unknown
    ));
    on.clock.advance(2 * MINUTE);
    assert_eq!(how(long), Settlement::Expired);
    assert_eq!((said(&on.gate), on.usage()), (Vec::new(), (1, 0)));
}

/// Commits that come while all are read are carried out, once.
#[test]
fn reading_them_back_hinders_nobody() {
    let on = Fixture::with(Quota::new("tokens", AMOUNT_MAX), |config| config);
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reading = scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                for open in on.gate.open_reservations() {
                    assert_eq!(open.items, group(&[(7, on.quota, 2)]));
                }
            }
        });
        for _ in 0..5_000 {
            assert!(on.reserve(2).commit(1).unwrap().is_allowed());
        }
        is_over.store(true, Ordering::Relaxed);
        reading.join().unwrap();
    });
    assert_eq!(on.usage(), (5_000, 0));
}

/// The limit that applies did not say whose it was.
#[test]
fn a_limit_of_a_users_own_is_told_from_the_default() {
    let on = Fixture::new();
    let own = |gate: &Tollgate| [7, 8, 9].map(|user| gate.own_limit(user, on.quota).unwrap());
    assert_eq!(own(&on.gate), [None; 3]);
    on.gate.set_limit(7, on.quota, 10).unwrap(); // the same as the default
    on.gate.set_limit(8, on.quota, AMOUNT_MAX).unwrap();
    on.gate.consume(9, on.quota, 1).unwrap();
    assert_eq!(own(&on.gate), [Some(10), Some(AMOUNT_MAX), None]);
    let (_copy, gate) = on.crash();
    assert_eq!(own(&gate), [Some(10), Some(AMOUNT_MAX), None]);
    let counter = on.gate.counter(7, on.quota).unwrap();
    assert_eq!(counter.own_limit(), Some(10));
    counter.clear_limit().unwrap();
    assert_eq!((counter.own_limit(), own(&on.gate)[0]), (None, None));
    let unknown = tollgate::QuotaId::from_u16(9);
    assert!(matches!(on.gate.own_limit(7, unknown), Err(Error::UnknownQuota(_))));
}
