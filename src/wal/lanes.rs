//! All lanes, and which one a thread takes.

use std::cell::Cell;
#[cfg(not(loom))]
use std::sync::atomic::AtomicUsize;

use crate::sync::{AtomicBool, Ordering};
use crate::wal::lane::{Lane, Permit, Refusal};

/// A lane's place among the lanes.
pub(crate) type LaneIndex = usize;

/// How often all lanes are tried before the thread lets others run.
const SPINS: u32 = 8;

/// How often all lanes are tried before it counts as a lack of room: a lane that is held for so
/// long was abandoned, or its holder was not given a processor. The caller then waits up to its
/// deadline.
const ROUNDS_MAX: u32 = if cfg!(loom) { 12 } else { 1000 };

/// How often closing tries a lane that is held. A holder does nothing that waits, so a lane that is
/// still held after this was abandoned by a thread that died, and stays locked anyhow.
const CLOSE_ATTEMPTS: u32 = 1_000_000;

crate::sync::thread_local! {
    /// The lane that the thread took last. Shared by all engines of the process: it is only a
    /// preference.
    static PREFERRED: Cell<LaneIndex> = const { Cell::new(LaneIndex::MAX) };
}

/// Spreads threads over the lanes, and over whatever else has a place for each.
#[cfg(not(loom))]
static THREADS: AtomicUsize = AtomicUsize::new(0);

/// A number of this thread, given out in turn.
#[cfg(not(loom))]
pub(crate) fn thread_hint() -> usize {
    thread_local! {
        // Relaxed: a ticket, nothing else depends on it.
        static HINT: usize = THREADS.fetch_add(1, Ordering::Relaxed);
    }
    HINT.with(|&hint| hint)
}

/// In a model all threads want the same lane, so that they meet; a number that grew from one run of
/// the model to the next would make them differ.
#[cfg(loom)]
pub(crate) fn thread_hint() -> usize {
    0
}

/// Makes this thread try that lane first, for tests that have one thread.
#[cfg(all(test, not(loom)))]
pub(crate) fn prefer(lane: LaneIndex) {
    PREFERRED.with(|preferred| preferred.set(lane));
}

/// The lanes of an engine. All exist from open on.
#[derive(Debug)]
pub(crate) struct Lanes {
    lanes: Box<[Lane]>,
    closed: AtomicBool,
}

/// Why no lane could be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoLane {
    /// Every lane lacks room, or is held for longer than an operation takes.
    Full,
    /// The lanes are closed for good.
    Closed,
}

impl Lanes {
    /// At least one lane.
    pub(crate) fn new(lanes: Vec<Lane>) -> Self {
        Self { lanes: lanes.into_boxed_slice(), closed: AtomicBool::new(false) }
    }

    /// Takes the thread's preferred lane for one record, if it is free and has room.
    #[inline(always)]
    pub(crate) fn try_preferred(&self) -> Option<Permit<'_>> {
        self.lanes.get(PREFERRED.with(Cell::get))?.try_lock(1).ok()
    }

    /// Takes a lane with room for `slots` records: the thread's preferred one, or the next that is
    /// free. Waits for no lane in particular, and not for long: a holder does nothing that waits.
    #[inline]
    pub(crate) fn acquire(&self, slots: u64) -> Result<(LaneIndex, Permit<'_>), NoLane> {
        let preferred = PREFERRED.with(Cell::get);
        if let Some(lane) = self.lanes.get(preferred)
            && let Ok(permit) = lane.try_lock(slots)
        {
            return Ok((preferred, permit));
        }
        self.acquire_other(slots, preferred)
    }

    #[cold]
    fn acquire_other(
        &self,
        slots: u64,
        preferred: LaneIndex,
    ) -> Result<(LaneIndex, Permit<'_>), NoLane> {
        let count = self.lanes.len();
        let start = if preferred == LaneIndex::MAX { thread_hint() } else { preferred };
        let mut rounds = 0_u32;
        loop {
            // Acquire: pairs with the Release in `close`. Only looked at when a lane was refused: a
            // closed lane is locked.
            if self.closed.load(Ordering::Acquire) {
                return Err(NoLane::Closed);
            }
            let mut full = 0;
            for offset in 0..count {
                let index = (start % count + offset) % count;
                match self.lanes[index].try_lock(slots) {
                    Ok(permit) => {
                        PREFERRED.with(|preferred| preferred.set(index));
                        return Ok((index, permit));
                    }
                    Err(Refusal::Full) => full += 1,
                    Err(Refusal::Busy) => {}
                }
            }
            rounds += 1;
            if full == count || rounds >= ROUNDS_MAX {
                return Err(NoLane::Full);
            }
            if rounds < SPINS { crate::sync::spin_loop() } else { crate::sync::yield_now() }
        }
    }

    /// Takes all lanes for good: when this returns, no operation is in the middle of an append, and
    /// none will begin.
    pub(crate) fn close(&self) {
        // Release: pairs with the Acquire in `acquire_other`.
        self.closed.store(true, Ordering::Release);
        for lane in &self.lanes {
            for _ in 0..CLOSE_ATTEMPTS {
                match lane.try_lock(0) {
                    Ok(permit) => {
                        permit.keep();
                        break;
                    }
                    Err(_) => crate::sync::yield_now(),
                }
            }
        }
    }

    /// Whether [`close`](Self::close) was called.
    pub(crate) fn is_closed(&self) -> bool {
        // Relaxed: for statistics and early refusals.
        self.closed.load(Ordering::Relaxed)
    }

    pub(crate) fn iter(&self) -> std::slice::Iter<'_, Lane> {
        self.lanes.iter()
    }

    pub(crate) fn len(&self) -> usize {
        self.lanes.len()
    }

    pub(crate) fn get(&self, index: LaneIndex) -> Option<&Lane> {
        self.lanes.get(index)
    }
}

#[cfg(all(test, loom))]
mod loom_tests;

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::sync::AtomicU64;
    use crate::wal::record::{SLOT_WORDS, Seal};
    use crate::wal::region::{Region, SLOTS_AT, Slots};

    fn full_lane() -> Lane {
        let words = (0..SLOTS_AT + 2 * SLOT_WORDS).map(|_| AtomicU64::new(0)).collect();
        let Some(slots) = Slots::new(Region::heap(words), 2) else { panic!("words for two") };
        let lane = Lane::new(slots, 0, Seal::new(1));
        let Ok(mut permit) = lane.try_lock(1) else { panic!("nobody else is there") };
        assert_eq!(permit.skip(), 2);
        drop(permit);
        lane
    }

    /// A lane that a dead thread holds and another that is full: it used to be tried for ever, past
    /// the caller's deadline.
    #[test]
    fn with_an_abandoned_lane_a_full_ring_is_still_reported() {
        let lanes = Lanes::new(vec![full_lane(), full_lane()]);
        lanes.get(0).and_then(|lane| lane.try_lock(0).ok()).expect("nobody holds it").keep();
        assert_eq!(lanes.acquire(1).map(|_| ()), Err(NoLane::Full));
        lanes.get(1).expect("two lanes").free(2);
        assert_eq!(lanes.acquire(1).map(|(index, _)| index), Ok(1));
    }
}
