//! Reading a shard of the map without touching its lock.
//!
//! A read lock is two locked instructions on a word that all readers of the shard share: more than
//! the rest of a look-up and, if two threads meet, a cache line that bounces between them. A shard
//! that nobody has written to for a while is therefore *open*: a reader only announces at its
//! [seat](crate::seats) which shard it is in, and checks whether the shard is still open. A writer
//! takes the shard's lock, closes the shard, makes all threads of the process pass a barrier, and
//! waits until no seat names the shard any more. This is BRAVO (Dice and Kogan, "Biased Locking for
//! Reader-Writer Locks", ATC 2019) with the readers' barrier moved to the writers.
//!
//! Protocol. A shard's word is [`OPEN`], or counts the reads under its lock since it was last
//! written to.
//!
//! - Reader: stores the shard at its seat, then loads the word. Between the two there is only a
//!   compiler fence. If the shard is open, it reads, and leaves its seat (Release); if not, it
//!   leaves at once, and takes the lock.
//! - Reader with the read lock: counts its read by compare-and-swap, and opens the shard after
//!   [`READS_TO_OPEN`] of them (Release: what the last writer did comes before). A periodic check,
//!   which opens shards that are seldom read, counts as half of them.
//! - Writer with the write lock: stores 0. If the shard was open, it then passes the heavy barrier
//!   and waits for every seat that names the shard (Acquire: pairs with that Release). Nobody opens
//!   the shard before the writer releases the lock.
//!
//! A barrier costs some microseconds and must not come too often: shards that are written to again
//! within a few hundred reads, and between two periodic checks, stay closed, and are read under
//! their locks.
#![allow(unsafe_code, reason = "an open shard is reached past its lock here and nowhere else")]

use std::ops::Deref;

use dashmap::RwLock;
use smallvec::SmallVec;

use crate::ledger::PARTS_COMMON;
use crate::seats::{OUTSIDE, Place, Seats, light_barrier, pass_barrier};
use crate::sync::{AtomicU64, Ordering, Patience};

/// The word of an open shard.
const OPEN: u64 = u64::MAX;

/// After this many reads under its lock a shard is opened: then they have cost as much as closing
/// it again will. In tests a few are enough, so that shards open and close all the time.
const READS_TO_OPEN: u64 = if cfg!(loom) {
    2
} else if cfg!(test) {
    4
} else {
    256
};

/// At a seat: the thread reads more than one shard. A shard's name is its index and 1.
const SEVERAL: u64 = u64::MAX;

/// Which shards are open, and which threads are in which.
#[derive(Debug)]
pub(super) struct Bias {
    seats: Seats,
    /// Of each shard.
    words: Box<[AtomicU64]>,
}

/// A thread is in an open shard, or in several; dropped when it leaves.
#[derive(Debug)]
struct Inside<'a>(&'a AtomicU64);

/// A shard that is open, and that the thread is in.
#[derive(Debug)]
pub(super) struct Open<'a, T> {
    shard: &'a RwLock<T>,
    _inside: Inside<'a>,
}

impl<T> Deref for Open<'_, T> {
    type Target = T;

    #[inline(always)]
    fn deref(&self) -> &T {
        // SAFETY: the shard is open, and the thread says that it is in it; see `Bias::read`.
        unsafe { &*self.shard.data_ptr() }
    }
}

impl Bias {
    /// All shards are closed.
    pub(super) fn new(shards: usize) -> Self {
        Self { seats: Seats::new(), words: (0..shards).map(|_| AtomicU64::new(0)).collect() }
    }

    /// Reads a shard. Its lock is only written to through [`write`](Self::write), and is always
    /// given with the same index.
    #[inline(always)]
    pub(super) fn read<T, R>(
        &self,
        index: usize,
        shard: &RwLock<T>,
        operate: impl FnOnce(&T) -> R,
    ) -> R {
        let Some(inside) = self.enter(index) else {
            return self.read_locked(index, shard, operate);
        };
        // SAFETY: the shard is open, and this thread says that it is in it, so that whoever wants
        // to write waits until `inside` is dropped; see the head of the module.
        let shard = unsafe { &*shard.data_ptr() };
        let result = operate(shard);
        drop(inside);
        result
    }

    /// Reads a shard if it is open; `None` otherwise. [`read`](Self::read) then opens it in time.
    #[inline(always)]
    pub(super) fn read_if_open<'a, T>(
        &'a self,
        index: usize,
        shard: &'a RwLock<T>,
    ) -> Option<Open<'a, T>> {
        self.enter(index).map(|inside| Open { shard, _inside: inside })
    }

    #[cold]
    fn read_locked<T, R>(
        &self,
        index: usize,
        shard: &RwLock<T>,
        operate: impl FnOnce(&T) -> R,
    ) -> R {
        Place::sit_down();
        let shard = shard.read();
        self.count_reads(index, 1);
        operate(&shard)
    }

    /// Opens the shards that nobody has written to since the last call: those that are read less
    /// often, where the lock's line has left the caches by the next time. Waits for nobody.
    pub(super) fn open_quiet<'a, T: 'a>(&self, shards: impl Iterator<Item = &'a RwLock<T>>) {
        for (index, shard) in shards.enumerate() {
            if !self.is_open(index)
                && let Some(_shared) = shard.try_read()
            {
                self.count_reads(index, READS_TO_OPEN / 2);
            }
        }
    }

    /// Reads several shards, of these indices, which ascend. Locks are taken in that order, so that
    /// no two threads wait for each other, whether or not the locks let a writer go first.
    #[inline]
    pub(super) fn read_each<'a, T: 'a, R>(
        &self,
        indices: &[usize],
        shard: impl Fn(usize) -> &'a RwLock<T>,
        operate: impl FnOnce(&[&T]) -> R,
    ) -> R {
        let Some(inside) = self.enter_each(indices) else {
            return self.read_each_locked(indices, shard, operate);
        };
        let mut shards: SmallVec<[&T; PARTS_COMMON]> = SmallVec::new();
        for &index in indices {
            // SAFETY: all of them are open, and this thread says that it is in several; see `read`.
            shards.push(unsafe { &*shard(index).data_ptr() });
        }
        let result = operate(&shards);
        drop(inside);
        result
    }

    /// Reads shards that are open, in any order and one maybe more than once; `None` where one is
    /// not open. [`read_each`](Self::read_each) then opens it in time.
    #[inline(always)]
    pub(super) fn read_open<const N: usize, T, R>(
        &self,
        indices: [usize; N],
        shards: [&RwLock<T>; N],
        operate: impl FnOnce([&T; N]) -> Option<R>,
    ) -> Option<R> {
        let inside = self.enter_each(&indices)?;
        // SAFETY: all of them are open, and this thread says that it is in several; see `read`.
        let result = operate(shards.map(|shard| unsafe { &*shard.data_ptr() }));
        drop(inside);
        result
    }

    #[cold]
    fn read_each_locked<'a, T: 'a, R>(
        &self,
        indices: &[usize],
        shard: impl Fn(usize) -> &'a RwLock<T>,
        operate: impl FnOnce(&[&T]) -> R,
    ) -> R {
        Place::sit_down();
        let mut guards: SmallVec<[_; PARTS_COMMON]> = SmallVec::new();
        for &index in indices {
            guards.push(shard(index).read());
            self.count_reads(index, 1);
        }
        let shards: SmallVec<[&T; PARTS_COMMON]> = guards.iter().map(|guard| &**guard).collect();
        operate(&shards)
    }

    /// Takes a shard's lock for writing, once nobody reads it.
    pub(super) fn write<'a, T>(
        &self,
        index: usize,
        shard: &'a RwLock<T>,
    ) -> dashmap::RwLockWriteGuard<'a, T> {
        let shard = shard.write();
        self.close(index);
        shard
    }

    /// Enters a shard if it is open. A thread that is in one already takes the others' locks.
    #[inline(always)]
    fn enter(&self, index: usize) -> Option<Inside<'_>> {
        let inside = self.sit(index as u64 + 1)?;
        // Acquire: pairs with the Release in `count_reads`.
        let is_open = self.words.get(index)?.load(Ordering::Acquire) == OPEN;
        is_open.then_some(inside)
    }

    /// Enters all of these shards if they are open.
    #[inline(always)]
    fn enter_each(&self, indices: &[usize]) -> Option<Inside<'_>> {
        let inside = self.sit(SEVERAL)?;
        // Acquire: as in `enter`.
        let is_open = |&index: &usize| {
            self.words.get(index).is_some_and(|word| word.load(Ordering::Acquire) == OPEN)
        };
        indices.iter().all(is_open).then_some(inside)
    }

    /// Says at the thread's seat where it is from here on.
    #[inline(always)]
    fn sit(&self, name: u64) -> Option<Inside<'_>> {
        let seat = self.seats.get(Place::of_thread().seat)?;
        // Relaxed: only the thread itself stores it.
        if seat.inside.load(Ordering::Relaxed) != OUTSIDE {
            return None;
        }
        // Release: whoever waits for the thread to leave another shard, and finds this one, has
        // seen what it did there. Ordered by the barriers before the load that follows.
        seat.inside.store(name, Ordering::Release);
        // Pairs with the heavy one in `close`.
        light_barrier();
        Some(Inside(seat.inside))
    }

    fn is_open(&self, index: usize) -> bool {
        // Relaxed: a guess.
        self.words.get(index).is_some_and(|word| word.load(Ordering::Relaxed) == OPEN)
    }

    /// Counts reads of a shard that is closed. The caller has its read lock.
    fn count_reads(&self, index: usize, count: u64) {
        let Some(word) = self.words.get(index) else { return };
        // Relaxed: nobody but those with the lock stores it.
        let reads = word.load(Ordering::Relaxed);
        if reads == OPEN || !self.seats.has_barrier() {
            return;
        }
        let next = if reads + count >= READS_TO_OPEN { OPEN } else { reads + count };
        // Release: what the last writer did is seen by whoever finds the shard open. By
        // compare-and-swap: a shard that another has opened must not look closed, or the next
        // writer would not wait.
        let _ = word.compare_exchange(reads, next, Ordering::Release, Ordering::Relaxed);
    }

    /// Closes a shard, and waits until nobody is in it. The caller has its write lock.
    fn close(&self, index: usize) {
        let Some(word) = self.words.get(index) else { return };
        // Relaxed: the lock orders it after the store of whoever opened the shard, and the barrier
        // orders this one.
        let was_open = word.load(Ordering::Relaxed) == OPEN;
        word.store(0, Ordering::Relaxed);
        if was_open {
            self.wait_for_readers(index as u64 + 1);
        }
    }

    #[cold]
    fn wait_for_readers(&self, name: u64) {
        pass_barrier();
        for inside in self.seats.all() {
            let mut patience = Patience::default();
            // Acquire: pairs with the Release of whoever leaves.
            while [name, SEVERAL].contains(&inside.load(Ordering::Acquire)) {
                patience.wait();
            }
        }
    }
}

impl Drop for Inside<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        // Release: pairs with the Acquire in `wait_for_readers`.
        self.0.store(OUTSIDE, Ordering::Release);
    }
}

#[cfg(all(test, loom))]
mod loom_tests;
#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use std::sync::Barrier;

    use super::*;

    /// Two words that only a writer makes differ, for a moment.
    type Shard = RwLock<[u64; 2]>;

    fn read(bias: &Bias, index: usize, shards: &[Shard]) -> u64 {
        bias.read(index, &shards[index], |&[one, other]| {
            assert_eq!(one, other, "nobody writes");
            one
        })
    }

    fn open(bias: &Bias, index: usize, shards: &[Shard]) {
        for _ in 0..READS_TO_OPEN {
            read(bias, index, shards);
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_shard_opens_when_it_is_read_often_and_closes_when_it_is_written_to() {
        let shards = [Shard::default(), Shard::default()];
        let bias = Bias::new(shards.len());
        open(&bias, 0, &shards);
        assert!(bias.is_open(0) && !bias.is_open(1));
        *bias.write(0, &shards[0]) = [1; 2];
        assert!(!bias.is_open(0));
        for _ in 1..READS_TO_OPEN {
            assert_eq!(read(&bias, 0, &shards), 1);
        }
        assert!(!bias.is_open(0), "they are counted from the last write on");
        assert_eq!(read(&bias, 0, &shards), 1);
        assert!(bias.is_open(0));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_shard_opens_that_nobody_writes_to_between_two_looks() {
        let shards = [Shard::default(), Shard::default(), Shard::default()];
        let bias = Bias::new(shards.len());
        let held = bias.write(2, &shards[2]);
        bias.open_quiet(shards.iter());
        drop(bias.write(1, &shards[1]));
        assert!((0..3).all(|index| !bias.is_open(index)));
        bias.open_quiet(shards.iter());
        assert!(bias.is_open(0) && !bias.is_open(1) && !bias.is_open(2));
        drop(held);
        bias.open_quiet(shards.iter());
        assert!(bias.is_open(1) && !bias.is_open(2));
        assert_eq!(read(&bias, 1, &shards), 0);
        drop(bias.write(0, &shards[0]));
        assert!(!bias.is_open(0));
    }

    /// By its name, and by the one that stands for several.
    #[test]
    #[cfg(target_os = "linux")]
    fn a_writer_waits_for_who_is_inside() {
        let shards = [Shard::default(), Shard::default()];
        let bias = Bias::new(shards.len());
        for indices in [&[1][..], &[0, 1]] {
            indices.iter().for_each(|&index| open(&bias, index, &shards));
            let (entered, written) = (Barrier::new(2), AtomicU64::new(0));
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    entered.wait();
                    drop(bias.write(1, &shards[1]));
                    written.store(1, Ordering::Relaxed);
                });
                let inside = bias.enter_each(indices).expect("all are open");
                entered.wait();
                while bias.is_open(1) {
                    std::thread::yield_now();
                }
                assert_eq!(written.load(Ordering::Relaxed), 0);
                assert!(bias.enter(1).is_none() && bias.enter(0).is_none());
                drop(inside);
            });
            assert_eq!(written.load(Ordering::Relaxed), 1);
        }
    }

    #[test]
    fn who_is_in_a_shard_takes_the_lock_of_another() {
        let shards = [Shard::default(), Shard::default()];
        let bias = Bias::new(shards.len());
        open(&bias, 0, &shards);
        open(&bias, 1, &shards);
        let read = bias.read(0, &shards[0], |_| read(&bias, 1, &shards));
        assert_eq!(read, 0);
        let several = bias.read_each(&[0, 1], |index| &shards[index], |all| all.len());
        assert_eq!(several, 2);
    }

    #[test]
    fn racing_readers_never_see_half_a_write() {
        const WRITES: u64 = 2000;
        let shards = [Shard::default(), Shard::default()];
        let bias = Bias::new(shards.len());
        let is_done = crate::sync::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !is_done.load(Ordering::Relaxed) {
                        read(&bias, 0, &shards);
                        bias.read_each(
                            &[0, 1],
                            |index| &shards[index],
                            |all| {
                                assert!(all.iter().all(|[one, other]| one == other));
                            },
                        );
                    }
                });
            }
            for write in 1..=WRITES {
                let index = usize::from(write % 3 == 0);
                let mut shard = bias.write(index, &shards[index]);
                for word in &mut *shard {
                    // So that the words are not stored in one go.
                    *std::hint::black_box(word) += 1;
                    std::thread::yield_now();
                }
            }
            is_done.store(true, Ordering::Relaxed);
        });
        assert_eq!((0..2).map(|index| read(&bias, index, &shards)).sum::<u64>(), WRITES);
    }
}
