//! What is counted, but in no log.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use smallvec::SmallVec;

use crate::admission::cell::CellState;
use crate::admission::table::Key;
use crate::model::WindowStart;

/// How many counters can have unlogged units at a time. Units of a further counter are refused, as
/// without this policy: nobody could tell later what may be given back unlogged.
const COUNTERS_MAX: usize = 1 << 18;

/// After a sweep that forgot next to nothing the next one waits for so long: each looks at all of
/// them.
const SWEEP_PAUSE: Duration = Duration::from_mins(1);

/// The units that were admitted unlogged and that nobody has given back, by counter.
#[derive(Debug, Default)]
pub(crate) struct Unlogged {
    /// Whether there were any, ever. Mostly there are none, and a refund takes no lock.
    is_any: AtomicBool,
    counters: Mutex<HashMap<Key, Windows>>,
    /// When to sweep again.
    sweep_at: Mutex<Duration>,
}

/// Of one counter: in the newest window that it has some in, the last, and in those before that a
/// refund may still be of.
type Windows = SmallVec<[Units; 1]>;

/// Of one counter in one window.
#[derive(Debug, Clone, Copy)]
struct Units {
    window: WindowStart,
    amount: u64,
}

impl Unlogged {
    /// Remembers what `add` adds to the counter's cell. `None` where there are too many counters:
    /// then nothing is added.
    pub(super) fn admit(
        &self,
        key: Key,
        amount: u64,
        add: impl FnOnce() -> Result<CellState, CellState>,
    ) -> Option<Result<CellState, CellState>> {
        // For as long as it takes to add: whoever finds the units in the cell finds them here, too.
        let mut counters = self.counters.lock();
        if counters.len() >= COUNTERS_MAX && !counters.contains_key(&key) {
            return None;
        }
        // Relaxed: before the cell's compare-and-swap, which publishes it.
        self.is_any.store(true, Ordering::Relaxed);
        let added = add();
        if let Ok(state) = added {
            let windows = counters.entry(key).or_default();
            windows.retain(|units| !state.has_left(units.window));
            match windows.iter_mut().find(|units| units.window == state.window()) {
                Some(units) => units.amount = units.amount.saturating_add(amount),
                None => windows.push(Units { window: state.window(), amount }),
            }
        }
        Some(added)
    }

    /// Takes up to `amount` of what the counter has in no log, for a refund that has seen it in the
    /// cell. How much.
    pub(super) fn take(&self, key: Key, window: WindowStart, amount: u64) -> u64 {
        // Relaxed: ordered by the cell's compare-and-swap.
        if !self.is_any.load(Ordering::Relaxed) {
            return 0;
        }
        let mut counters = self.counters.lock();
        let Some(windows) = counters.get_mut(&key) else { return 0 };
        let Some(units) = windows.iter_mut().find(|units| units.window == window) else { return 0 };
        let taken = amount.min(units.amount);
        units.amount -= taken;
        if windows.iter().all(|units| units.amount == 0) {
            counters.remove(&key);
        }
        taken
    }

    /// Forgets those whose window is over for the counter, once there are many. `now` is the
    /// monotonic clock's.
    pub(in crate::engine) fn sweep(
        &self,
        now: Duration,
        is_over: impl Fn(Key, WindowStart) -> bool,
    ) {
        if now < *self.sweep_at.lock() {
            return;
        }
        let known: Vec<_> = {
            let counters = self.counters.lock();
            if counters.len() < COUNTERS_MAX / 2 {
                return;
            }
            counters.iter().filter_map(|(&key, windows)| Some((key, newest(windows)?))).collect()
        };
        let mut forgotten = 0;
        // Not with the lock: who admits has the counter's shard, and waits for it there.
        for &(key, window) in &known {
            if is_over(key, window) {
                forgotten += 1;
                let mut counters = self.counters.lock();
                if counters.get(&key).and_then(newest) == Some(window) {
                    counters.remove(&key);
                }
            }
        }
        if forgotten < known.len() / 100 {
            *self.sweep_at.lock() = now.saturating_add(SWEEP_PAUSE);
        }
    }
}

fn newest(windows: &Windows) -> Option<WindowStart> {
    windows.last().map(|units| units.window)
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;
    use crate::admission::cell::Cell;
    use crate::model::QuotaId;

    const QUOTA: QuotaId = QuotaId(1);
    const FIRST: WindowStart = WindowStart(5);

    fn key(user: u64) -> Key {
        Key { user, quota: QUOTA }
    }

    fn admit(unlogged: &Unlogged, user: u64, window: u64, amount: u64) -> bool {
        let state = CellState::new(QUOTA, WindowStart(window), amount);
        unlogged.admit(key(user), amount, || Ok(state)).is_some()
    }

    #[test]
    fn as_much_is_taken_as_there_is_in_the_window() {
        let unlogged = Unlogged::default();
        assert_eq!(unlogged.take(key(1), WindowStart(5), 1), 0);
        assert!(admit(&unlogged, 1, 5, 3) && admit(&unlogged, 1, 5, 4));
        assert_eq!(unlogged.take(key(1), WindowStart(4), 9), 0);
        assert_eq!(unlogged.take(key(1), WindowStart(5), 2), 2);
        assert_eq!(unlogged.take(key(1), WindowStart(5), 9), 5);
        assert_eq!(unlogged.take(key(1), WindowStart(5), 9), 0);
        assert!(admit(&unlogged, 1, 5, 3) && admit(&unlogged, 1, 6, 2));
        assert_eq!(unlogged.take(key(1), WindowStart(6), 9), 2);
        let state = CellState::new(QUOTA, WindowStart(6), 9);
        assert_eq!(unlogged.admit(key(1), 1, || Err(state)), Some(Err(state)));
        assert_eq!(unlogged.take(key(1), WindowStart(6), 9), 0);
    }

    /// The log gave back what it had never counted: the next window's units had taken the place of
    /// those that the refund was about to take.
    #[test]
    fn a_refund_finds_the_units_of_its_window_though_the_counter_has_left_it() {
        let (unlogged, cell) = (Unlogged::default(), Cell::new(CellState::new(QUOTA, FIRST, 2)));
        let admit = |window, amount| {
            let add = || cell.add(WindowStart(window), amount, u64::MAX >> 1);
            assert!(unlogged.admit(key(1), amount, add).is_some_and(|added| added.is_ok()));
        };
        admit(5, 3);
        let refund = cell.begin_refund(FIRST, 9, |_| 0).unwrap();
        admit(6, 1);
        admit(7, 1);
        assert!(!cell.load().has_left(FIRST));
        assert_eq!(unlogged.take(key(1), refund.window(), refund.amount()), 3);
        refund.finish();
        assert!(cell.load().has_left(FIRST));
        admit(7, 1);
        assert_eq!(unlogged.counters.lock().len(), 1, "what nobody asks for any more");
        assert_eq!(unlogged.take(key(1), WindowStart(6), 9), 0);
        assert_eq!(unlogged.take(key(1), WindowStart(7), 9), 2);
        assert!(unlogged.counters.lock().is_empty());
    }

    #[test]
    fn beyond_the_bound_nothing_is_added_until_windows_are_over() {
        let unlogged = Unlogged::default();
        let max = COUNTERS_MAX as u64;
        assert!((0..max).all(|user| admit(&unlogged, user, 5, 1)));
        assert_eq!(unlogged.admit(key(max), 1, || panic!("it was refused")), None);
        assert!(admit(&unlogged, 0, 5, 1), "one of those that it has");
        unlogged.sweep(Duration::ZERO, |key, window| key.user % 2 == 0 && window == WindowStart(5));
        assert!(admit(&unlogged, max, 5, 1));
        assert_eq!(unlogged.take(key(0), WindowStart(5), 9), 0);
        assert_eq!(unlogged.take(key(1), WindowStart(5), 9), 1);
    }

    /// Those of windows that never end were all looked at each second.
    #[test]
    fn a_sweep_that_forgets_nothing_is_not_soon_followed_by_another() {
        let unlogged = Unlogged::default();
        let max = COUNTERS_MAX as u64;
        assert!((0..max).all(|user| admit(&unlogged, user, 5, 1)));
        let looks = |seconds, is_over: fn(u64) -> bool| {
            let looks = std::cell::Cell::new(0);
            unlogged.sweep(Duration::from_secs(seconds), |key, _| {
                looks.set(looks.get() + 1);
                is_over(key.user)
            });
            looks.get()
        };
        assert_eq!(looks(7, |_| false), max);
        assert_eq!(looks(66, |_| false), 0);
        assert_eq!(looks(67, |user| user < 100_000), max, "after a minute");
        assert_eq!(looks(68, |_| false), max - 100_000, "at once, after one that forgot many");
    }
}
