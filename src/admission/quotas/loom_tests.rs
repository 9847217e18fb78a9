//! Models of the current window being replaced while others read it.

use loom::thread;

use super::*;
use crate::model::{Quota, Window};
use crate::sync::explore;

const MINUTE: u64 = 60_000;
const FIRST: u64 = 29_000_000 * MINUTE;
/// The first minute, the second and the third.
const MINUTES: [u64; 3] = [FIRST, FIRST + MINUTE, FIRST + 2 * MINUTE];

fn state(now: u64) -> Arc<QuotaState> {
    let quota = Quota::new("requests", 10).window(Window::Minute);
    let definition = Definition::new(QuotaId(3), &quota).expect("a valid quota");
    Arc::new(QuotaState::new(definition, WindowStart(0), at(now)))
}

fn at(millis: u64) -> Timestamp {
    Timestamp::from_unix_millis(millis)
}

/// Looks a time and a window's end up; the answers are functions of their argument alone.
fn look_up(state: &QuotaState, start: u64) {
    if let Some(current) = state.current(at(start + 7)) {
        let empty = CellState::new(QuotaId(3), WindowStart(start), 0);
        assert_eq!((current.start, current.empty()), (WindowStart(start), empty));
    }
    assert_eq!(state.window_at(at(start + 7)), WindowStart(start));
    assert_eq!(state.end_of(WindowStart(start)), Some(at(start + MINUTE)));
}

/// The window turns forward while others look.
///
/// Fails when `turn` stores `end` or `upper` before `start`, when one of the two orderings around
/// either is Relaxed, or when `upper` is not of the quota.
#[test]
fn loom_a_turning_window_is_never_torn() {
    explore(|| {
        let state = state(MINUTES[0]);
        let turner = thread::spawn({
            let state = Arc::clone(&state);
            move || look_up(&state, MINUTES[1])
        });
        look_up(&state, MINUTES[0]);
        look_up(&state, MINUTES[1]);
        turner.join().unwrap();
    });
}

/// A thread that read the clock before the window changed comes late, after others have turned it:
/// it must not make them see the old window again.
///
/// Fails when `turn` stores an older window over a newer one.
#[test]
fn loom_a_late_thread_does_not_turn_the_window_back() {
    explore(|| {
        let state = state(MINUTES[0]);
        let others = [MINUTES[0], MINUTES[2]].map(|start| {
            let state = Arc::clone(&state);
            thread::spawn(move || look_up(&state, start))
        });
        look_up(&state, MINUTES[1]);
        look_up(&state, MINUTES[1]);
        others.into_iter().for_each(|other| other.join().unwrap());
    });
}
