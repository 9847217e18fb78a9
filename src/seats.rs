//! How a thread announces which lane, or which shard of the map, it is inside of, without a locked
//! instruction.
//!
//! A thread keeps the lane that it took: as long as nobody else wants it, it enters and leaves by
//! plain loads and stores. A thread that does want it pays for both sides. This is Dekker's mutual
//! exclusion with the costs on one side, as in biased locks and in hazard pointers over
//! `membarrier(2)`:
//!
//! - The thread stores at its seat which lane it enters, then checks whether the lane is still its
//!   own. Between the two there is only a compiler fence ([`light_barrier`]).
//! - The thread that takes the lane away stores that it is nobody's, makes every thread of the
//!   process pass a full barrier ([`heavy_barrier`]), then looks at the seat. Either it sees the
//!   thread inside, and waits; or the thread sees that the lane is no longer its own.
//!
//! Where the system has no such barrier no lane is kept, and all take lanes by compare-and-swap.
//!
//! Readers of the map stand to its writers as a lane's owner to those who want the lane, see
//! [`bias`](crate::admission): there a seat says which shard its thread is in.

use std::cell::Cell;

use crossbeam::utils::CachePadded;

use crate::sync::{AtomicU64, Ordering};

/// How many threads have a seat at a time; others keep no lane.
const SEATS: usize = if cfg!(loom) { 3 } else { 256 };

/// A thread without a seat; and the owner of a lane that is nobody's.
pub(crate) const NOBODY: u64 = 0;

/// A thread that asked for a seat when none was free, with how many had been given back until then:
/// it asks again once there is another.
const STANDING: u64 = 1 << 63;

/// At a seat: the thread is inside of nothing.
pub(crate) const OUTSIDE: u64 = 0;

/// Spreads threads over the lanes, and over whatever else has a place for each.
#[cfg(not(loom))]
static THREADS: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);

/// A number of this thread, given out in turn.
#[cfg(not(loom))]
#[inline]
pub(crate) fn thread_hint() -> usize {
    const NONE: usize = usize::MAX;
    std::thread_local! {
        static HINT: Cell<usize> = const { Cell::new(NONE) };
    }
    #[cold]
    fn take() -> usize {
        // Relaxed: a ticket, nothing else depends on it.
        let hint = THREADS.fetch_add(1, Ordering::Relaxed);
        let _ = HINT.try_with(|known| known.set(hint));
        hint
    }
    // `get` is not inlined.
    match HINT.try_with(Cell::get).unwrap_or(NONE) {
        NONE => take(),
        hint => hint,
    }
}

/// In a model all threads want the same lane, so that they meet; a number that grew from one run of
/// the model to the next would make them differ.
#[cfg(loom)]
pub(crate) fn thread_hint() -> usize {
    0
}

/// What a thread knows of itself. Shared by all engines of the process.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    /// The lane that it took last: only a preference.
    pub(crate) lane: usize,
    /// Its seat's number, from 1.
    pub(crate) seat: u64,
}

crate::sync::thread_local! {
    static PLACE: Cell<Place> = const { Cell::new(Place::NONE) };
}

impl Place {
    const NONE: Self = Self { lane: usize::MAX, seat: NOBODY };

    /// The calling thread's.
    #[inline(always)]
    pub(crate) fn of_thread() -> Self {
        // `with` is not inlined. Where this is gone before its thread, the thread has no seat.
        PLACE.try_with(Cell::get).unwrap_or(Self::NONE)
    }

    /// Remembers the lane that the calling thread took.
    pub(crate) fn prefer(lane: usize) {
        PLACE.with(|place| place.set(Self { lane, ..place.get() }));
    }

    /// Gives the calling thread a seat, if it has none and one is free. The number, which is no
    /// seat's otherwise.
    pub(crate) fn sit_down() -> u64 {
        let place = Self::of_thread();
        // Before it asks: of what is given back meanwhile it learns the next time.
        let standing = STANDING | taken::given_back();
        if place.seat == standing || (1..STANDING).contains(&place.seat) {
            return place.seat;
        }
        let seat = taken::take().unwrap_or(standing);
        PLACE.with(|place| place.set(Self { seat, ..place.get() }));
        seat
    }
}

/// The seats at one engine's lanes, or at its map.
#[derive(Debug)]
pub(crate) struct Seats {
    /// What each thread is inside of: the address of a lane, or a shard's name.
    inside: Box<[CachePadded<AtomicU64>]>,
    has_barrier: bool,
}

/// The calling thread's seat.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seat<'a> {
    pub(crate) number: u64,
    pub(crate) inside: &'a AtomicU64,
}

impl Seats {
    pub(crate) fn new() -> Self {
        let seat = |_| CachePadded::new(AtomicU64::new(OUTSIDE));
        Self { inside: (0..SEATS).map(seat).collect(), has_barrier: register_barrier() }
    }

    /// Whether lanes can be kept.
    pub(crate) fn has_barrier(&self) -> bool {
        self.has_barrier
    }

    /// The seat with this number.
    #[inline(always)]
    pub(crate) fn get(&self, number: u64) -> Option<Seat<'_>> {
        let index = usize::try_from(number.wrapping_sub(1)).ok()?;
        Some(Seat { number, inside: self.inside.get(index)? })
    }

    /// Where each thread is that has a seat, or had one.
    pub(crate) fn all(&self) -> impl Iterator<Item = &AtomicU64> {
        self.inside.iter().map(|inside| &**inside).take(taken::highest())
    }

    /// Whether a thread sits there.
    pub(crate) fn is_taken(number: u64) -> bool {
        taken::is_taken(number)
    }
}

/// Keeps the compiler from moving the loads that follow before the stores that precede. With
/// [`heavy_barrier`] on the other side, as good as a full barrier on both.
#[inline(always)]
pub(crate) fn light_barrier() {
    #[cfg(not(loom))]
    std::sync::atomic::compiler_fence(Ordering::SeqCst);
    #[cfg(loom)]
    loom::sync::atomic::fence(Ordering::SeqCst);
}

/// Makes every running thread of the process pass a full barrier. Whether it did.
#[cfg(all(target_os = "linux", not(loom), not(miri)))]
fn heavy_barrier() -> bool {
    use rustix::thread::{MembarrierCommand, membarrier};
    membarrier(MembarrierCommand::PrivateExpedited).is_ok()
}

/// Makes every thread of the process pass a barrier, on a system that has offered one.
pub(crate) fn pass_barrier() {
    if !heavy_barrier() {
        // It was there when the engine was opened, and has been forbidden since. What a running
        // thread has stored, others see within far less than this, for which no processor gives a
        // word.
        #[cfg(not(loom))]
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

/// Whether the system offers [`heavy_barrier`] from now on.
#[cfg(all(target_os = "linux", not(loom), not(miri)))]
fn register_barrier() -> bool {
    use rustix::thread::{MembarrierCommand, membarrier};
    membarrier(MembarrierCommand::RegisterPrivateExpedited).is_ok() && heavy_barrier()
}

#[cfg(loom)]
fn heavy_barrier() -> bool {
    loom::sync::atomic::fence(Ordering::SeqCst);
    true
}

#[cfg(loom)]
fn register_barrier() -> bool {
    true
}

#[cfg(not(any(loom, all(target_os = "linux", not(miri)))))]
fn heavy_barrier() -> bool {
    false
}

#[cfg(not(any(loom, all(target_os = "linux", not(miri)))))]
fn register_barrier() -> bool {
    false
}

/// Which seats are taken: the same for all engines of the process.
#[cfg(not(loom))]
mod taken {
    use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

    use parking_lot::Mutex;

    use super::{PLACE, Place, SEATS, STANDING};

    static TAKEN: Mutex<[bool; SEATS]> = Mutex::new([false; SEATS]);

    /// The highest number that was ever given.
    static HIGHEST: AtomicUsize = AtomicUsize::new(0);

    /// How many seats were given back. Changed under the lock: whoever has seen one counted finds
    /// it free, if nobody has taken it since.
    static GIVEN_BACK: AtomicU64 = AtomicU64::new(0);

    /// Frees the thread's seat when the thread ends.
    struct Guard(u64);

    impl Drop for Guard {
        fn drop(&mut self) {
            // First: whatever else the thread does while it ends, it has no seat.
            PLACE.with(|place| place.set(Place { seat: STANDING, ..place.get() }));
            let mut taken = TAKEN.lock();
            if let Some(taken) = at(&mut taken, self.0) {
                *taken = false;
            }
            // Relaxed: the lock orders it.
            GIVEN_BACK.fetch_add(1, Ordering::Relaxed);
        }
    }

    thread_local! {
        static GUARD: std::cell::OnceCell<Guard> = const { std::cell::OnceCell::new() };
    }

    fn at(taken: &mut [bool; SEATS], number: u64) -> Option<&mut bool> {
        taken.get_mut(usize::try_from(number.checked_sub(1)?).ok()?)
    }

    /// Takes the first free seat.
    pub(super) fn first_free(taken: &mut [bool; SEATS]) -> Option<u64> {
        let number = (1..=SEATS as u64).find(|&number| at(taken, number) == Some(&mut false))?;
        *at(taken, number)? = true;
        Some(number)
    }

    /// A free seat's number, for the calling thread.
    pub(super) fn take() -> Option<u64> {
        let sit = |guard: &std::cell::OnceCell<Guard>| {
            let number = first_free(&mut TAKEN.lock())?;
            // Relaxed: before the thread first says where it is; the barriers order it with that.
            HIGHEST.fetch_max(usize::try_from(number).unwrap_or(SEATS), Ordering::Relaxed);
            // Set once a thread: its place says that it has a seat, or stands.
            guard.set(Guard(number)).is_ok().then_some(number)
        };
        // A thread that ends has no guard any more, and gets no seat.
        GUARD.try_with(sit).ok().flatten()
    }

    pub(super) fn given_back() -> u64 {
        // Relaxed: who sees it late asks the next time.
        GIVEN_BACK.load(Ordering::Relaxed)
    }

    pub(super) fn highest() -> usize {
        // Relaxed: see `take`.
        HIGHEST.load(Ordering::Relaxed)
    }

    pub(super) fn is_taken(number: u64) -> bool {
        at(&mut TAKEN.lock(), number).is_some_and(|taken| *taken)
    }
}

/// In a model, threads are given their seats.
#[cfg(loom)]
mod taken {
    pub(super) fn take() -> Option<u64> {
        None
    }

    pub(super) fn given_back() -> u64 {
        0
    }

    pub(super) fn highest() -> usize {
        super::SEATS
    }

    pub(super) fn is_taken(_: u64) -> bool {
        true
    }
}

/// Gives the calling thread of a model a seat.
#[cfg(loom)]
pub(crate) fn sit_at(seat: u64) {
    PLACE.with(|place| place.set(Place { seat, ..place.get() }));
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn seats_are_of_one_thread_each_and_freed_when_it_ends() {
        let mine = Place::sit_down();
        let is_seat = |number| (1..=SEATS as u64).contains(&number);
        assert!(is_seat(mine));
        assert_eq!(Place::sit_down(), mine);
        let theirs = std::thread::spawn(Place::sit_down).join().expect("no panic");
        assert!(theirs != mine && is_seat(theirs));
        assert!(Seats::is_taken(mine));
        let seats = Seats::new();
        assert_eq!(seats.get(mine).map(|seat| seat.number), Some(mine));
        let none = [NOBODY, STANDING, SEATS as u64 + 1];
        assert!(none.into_iter().all(|number| seats.get(number).is_none()));
    }

    /// A thread that once came when all seats were taken, by a burst of others, stood for its life.
    #[test]
    fn a_thread_that_found_no_seat_asks_again_once_one_is_given_back() {
        let standing = STANDING | taken::given_back();
        PLACE.with(|place| place.set(Place { seat: standing, ..place.get() }));
        std::thread::spawn(Place::sit_down).join().expect("no panic");
        let seat = Place::sit_down();
        assert!((1..=SEATS as u64).contains(&seat), "{seat}");
        assert_eq!(Place::sit_down(), seat);
    }

    #[test]
    fn each_seat_is_given_once_and_then_there_is_none() {
        let mut all = [false; SEATS];
        let given: Vec<_> = std::iter::from_fn(|| taken::first_free(&mut all)).collect();
        assert!(given.iter().copied().eq(1..=SEATS as u64));
        all[7] = false;
        assert_eq!(taken::first_free(&mut all), Some(8));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn linux_has_the_barrier() {
        assert!(Seats::new().has_barrier());
    }
}
