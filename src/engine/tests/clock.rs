//! What a clock of the application's can do to the engine.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::clock::Clock;
use crate::model::Window;
use crate::storage::sim::SimDisk;

/// Panics where the monotonic time is asked for, while it is told to.
#[derive(Debug)]
struct BrokenClock {
    clock: ManualClock,
    panics: AtomicBool,
}

impl Clock for BrokenClock {
    fn now(&self) -> Timestamp {
        self.clock.now()
    }

    fn monotonic(&self) -> Duration {
        assert!(!self.panics.load(Ordering::Relaxed), "the clock is broken");
        self.clock.monotonic()
    }

    fn attach(&self, listener: Weak<CoarseClock>) {
        self.clock.attach(listener);
    }
}

/// After a jump of the wall clock it was asked for each counter of a full shard, while that was
/// being swept: the counters that were taken out of it were gone.
#[test]
fn a_clock_that_panics_takes_no_counter_with_it() {
    const START: u64 = 1_767_225_600_000;
    let disk = SimDisk::new(1);
    let clock = ManualClock::new(Timestamp::from_unix_millis(START));
    let broken = Arc::new(BrokenClock { clock: clock.clone(), panics: AtomicBool::new(false) });
    let config = small().lane_records(1 << 12).clock(Arc::clone(&broken) as Arc<dyn Clock>);
    let owner = Owner::open_at_rest(&disk.storage(), config).unwrap();
    let hourly = Quota::new("hourly", 10).window(Window::Hour);
    let quota = owner.engine.define(&hourly).unwrap();
    for user in 0..100 {
        consume(&owner, user, quota, false).unwrap();
    }
    clock.set(Timestamp::from_unix_millis(START + 7_200_000));
    broken.panics.store(true, Ordering::Relaxed);
    let mut panics = 0;
    for user in 100..300 {
        let consumed = catch_unwind(AssertUnwindSafe(|| consume(&owner, user, quota, false)));
        panics += u32::from(consumed.is_err());
    }
    broken.panics.store(false, Ordering::Relaxed);
    assert!(panics > 0, "the clock was asked");
    clock.set(Timestamp::from_unix_millis(START));
    assert_eq!((0..100).map(|user| used(&owner, user, quota)).sum::<u64>(), 100);
}
