//! Models of what is read of a counter while somebody reserves of it.

use std::sync::Arc;

use loom::thread;

use super::*;
use crate::model::QuotaId;
use crate::sync::explore;

const QUOTA: QuotaId = QuotaId(3);
const TODAY: WindowStart = WindowStart(86_400_000);
const USER: u64 = 7;

struct World {
    cell: Cell,
    reserved: Reserved,
}

impl World {
    fn new() -> Arc<Self> {
        let cell = Cell::new(CellState::new(QUOTA, TODAY, 10));
        Arc::new(Self { cell, reserved: Reserved::new(RandomState::default()) })
    }

    fn place(&self) -> SumPlace {
        self.reserved.place(SumKey { quota: QUOTA, window: TODAY, user: USER })
    }

    fn reserve(&self, amount: u64) {
        let seen = self.cell.try_hold(TODAY).expect("nobody else holds it");
        self.reserved.lock(self.place()).add(amount);
        let next = seen.plus(amount, AMOUNT_MAX).expect("there is room");
        self.cell.release(seen, next);
    }

    fn cancel(&self, amount: u64) {
        let seen = self.cell.try_hold(TODAY).expect("nobody else holds it");
        self.reserved.lock(self.place()).subtract(amount);
        self.cell.release(seen, seen.minus(amount));
    }
}

/// A state that comes back, with what was reserved in between, was once told as one.
///
/// Fails when the sum is read after its lock was let go, when the state is not read again under it,
/// or when that it is held does not matter.
#[test]
fn loom_usage_and_what_is_reserved_of_it_are_of_one_instant() {
    explore(|| {
        let world = World::new();
        let other = thread::spawn({
            let world = Arc::clone(&world);
            move || {
                world.reserve(5);
                world.cancel(5);
            }
        });
        if let Some((state, reserved)) = world.reserved.read(&world.cell, USER, TODAY) {
            assert!([(10, 0), (15, 5)].contains(&(state.used(), reserved)), "{state:?} {reserved}");
        }
        other.join().unwrap();
        let (state, reserved) =
            world.reserved.read(&world.cell, USER, TODAY).expect("nobody changes it");
        assert_eq!((state.used(), reserved), (10, 0));
    });
}
