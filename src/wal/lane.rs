//! One lane: a ring of slots with one writer at a time.
//!
//! Protocol. `state` is the number of the next record, shifted by one, and the writer's lock in its
//! lowest bit.
//!
//! - A writer sets the lock bit by compare-and-swap (Acquire: it sees what the writer before it
//!   stored), stores its slots, and stores the new number with the bit clear (Release): one store
//!   publishes the records and unlocks.
//! - The drainer loads `state` (Acquire: pairs with that Release) and reads the slots below the
//!   number.
//! - The drainer stores `freed` (Release: its reads of the slots come before); a writer loads it
//!   (Acquire) before it overwrites a slot of the lap before.
//!
//! A writer that dies with the lock keeps it. While the engine runs this costs only the lane, since
//! others only ever try to lock it; closing then reports it, and leaves the directory locked.
//!
//! A thread that finds an unowned lane makes it its own: it keeps the lock, and from then on enters
//! and leaves by plain stores, see [`seats`](crate::seats). It gives up a full lane when another
//! has room. The drainer takes a lane away from its owner for a moment; another thread takes it for
//! good, in exchange for its own full lane, or when there are more threads than lanes.

mod upkeep;

use crossbeam::utils::CachePadded;

use crate::prefetch;
use crate::seats::{NOBODY, OUTSIDE, Seat, Seats, light_barrier, pass_barrier};
use crate::sync::{AtomicU64, Ordering};
use crate::wal::operation::{Operation, Reading};
use crate::wal::record::{Item, Record, SLOT_WORDS, Seal};
use crate::wal::region::{Slot, Slots};

const LOCKED: u64 = 1;

/// The owner of a lane that is for all, for good.
const SHARED: u64 = u64::MAX;

/// How often a thread that takes a lane away yields while the owner is inside: an operation takes
/// less than a microsecond, unless its thread is descheduled.
pub(crate) const PATIENCE: u32 = if cfg!(loom) { 2 } else { 100 };

/// How often closing tries a lane that is held. A holder waits for nothing except pages of the
/// ring, so a lane that is still held after this belongs to a thread that died in it, or was
/// stopped.
pub(crate) const CLOSE_ATTEMPTS: u32 = 1_000_000;

/// Why a lane could not be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Another writer holds it.
    Busy,
    /// It lacks room for the slots asked for.
    Full,
}

/// A ring and its writer's and drainer's positions. 128 bytes apart: the adjacent-line prefetcher
/// pulls pairs.
#[derive(Debug)]
pub(crate) struct Lane {
    head: CachePadded<Head>,
    drained: CachePadded<Drained>,
}

/// What the drainer stores, and what readers need.
#[derive(Debug)]
struct Drained {
    freed: AtomicU64,
    /// The last skip: the first record it skips, and the first after it. Stored before the tail
    /// after it is published.
    skipped: [AtomicU64; 2],
    slots: Slots,
    seal: Seal,
}

/// What writers need, on one cache line.
#[derive(Debug)]
struct Head {
    state: AtomicU64,
    /// The seat of the thread that owns the lane, [`NOBODY`] or [`SHARED`]. Set under the lock, and
    /// taken back by compare-and-swap. A close sets it without the lock, from [`NOBODY`] only.
    owner: AtomicU64,
    /// The [`limit`](Lane::limit) as a writer last saw it: the line it comes from is read when that
    /// is reached, not for every record. Loaded and stored under the lock.
    limit_seen: AtomicU64,
    slots: Slots,
    seal: Seal,
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<Head>() <= 64);

/// Whose a lane is once it was taken from its owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    /// It goes to the next thread that wants it.
    Nobodys,
    /// All threads share it.
    Shared,
    /// Nobody's, for good: it stays locked, also when its owner does not leave it.
    Closed,
}

/// How many slots ahead of a writer their cache lines are asked for: the drainer has read them from
/// another core, and the next locked instruction would wait for them.
const PREFETCH_AHEAD: usize = 24;

impl Lane {
    /// A lane over these slots, all free, whose next record is `base`.
    pub(crate) fn new(slots: Slots, base: u64, seal: Seal) -> Self {
        Self {
            head: CachePadded::new(Head {
                state: AtomicU64::new(base << 1),
                owner: AtomicU64::new(NOBODY),
                limit_seen: AtomicU64::new(base),
                slots: slots.clone(),
                seal,
            }),
            drained: CachePadded::new(Drained {
                freed: AtomicU64::new(base),
                skipped: [base, base].map(AtomicU64::new),
                slots,
                seal,
            }),
        }
    }

    /// Takes the lane for writing up to `slots` records, without waiting. A lane that is a thread's
    /// own is busy.
    #[inline(always)]
    pub(crate) fn try_lock(&self, slots: u64) -> Result<Permit<'_>, Refusal> {
        // Relaxed: only a guess for the compare-and-swap.
        let seen = self.head.state.load(Ordering::Relaxed);
        if seen & LOCKED != 0 {
            return Err(Refusal::Busy);
        }
        // Acquire: pairs with the Release in `Permit::drop`.
        if self
            .head
            .state
            .compare_exchange(seen, seen | LOCKED, Ordering::Acquire, Ordering::Relaxed)
            .is_err()
        {
            return Err(Refusal::Busy);
        }
        Permit { lane: self, state: seen | LOCKED, inside: None }.with_room(slots)
    }

    /// Takes the lane for the thread at this seat, whose own it must be: without a locked
    /// instruction.
    #[inline(always)]
    pub(crate) fn try_enter<'a>(
        &'a self,
        seat: Seat<'a>,
        slots: u64,
    ) -> Result<Permit<'a>, Refusal> {
        self.enter(seat).ok_or(Refusal::Busy)?.with_room(slots)
    }

    /// [`try_enter`](Self::try_enter), where there was room when a writer last looked: nothing that
    /// is not inlined.
    #[inline(always)]
    pub(crate) fn try_enter_at_once<'a>(
        &'a self,
        seat: Seat<'a>,
        slots: u64,
    ) -> Option<Permit<'a>> {
        self.enter(seat).filter(|permit| permit.has_known_room(slots))
    }

    #[inline(always)]
    fn enter<'a>(&'a self, seat: Seat<'a>) -> Option<Permit<'a>> {
        debug_assert_eq!(seat.inside.load(Ordering::Relaxed), OUTSIDE, "a thread is in one lane");
        // Release: whoever waits for the thread to leave another lane, and finds this one, has seen
        // what it did there. Ordered by the barriers before the load that follows.
        seat.inside.store(self.address(), Ordering::Release);
        // Pairs with the heavy one in `take_away`.
        light_barrier();
        // Relaxed: only the thread itself makes a lane its own.
        if self.head.owner.load(Ordering::Relaxed) != seat.number {
            // Release: see `Permit::drop`.
            seat.inside.store(OUTSIDE, Ordering::Release);
            return None;
        }
        // Relaxed: since the lane became its own, nobody but whoever sits at this seat has stored
        // it.
        let state = self.head.state.load(Ordering::Relaxed);
        Some(Permit { lane: self, state, inside: Some(seat.inside) })
    }

    /// Takes the lane, also when it is a thread's own: then it is no longer. Waits for the owner to
    /// leave it, but not for long.
    #[cold]
    pub(crate) fn take_away(
        &self,
        seats: &Seats,
        then: Then,
        slots: u64,
    ) -> Result<Permit<'_>, Refusal> {
        // Relaxed: only a guess for the compare-and-swap.
        let number = self.head.owner.load(Ordering::Relaxed);
        let Some(owner) = seats.get(number) else { return self.try_lock(slots) };
        // Acquire: pairs with the Release in `keep_for`: the owner is seen inside from there on.
        if self
            .head
            .owner
            .compare_exchange(number, NOBODY, Ordering::Acquire, Ordering::Relaxed)
            .is_err()
        {
            return Err(Refusal::Busy);
        }
        // From here on the lock, which the owner has kept, is ours once the owner is outside.
        let mut is_left = false;
        pass_barrier();
        for _ in 0..if then == Then::Closed { CLOSE_ATTEMPTS } else { PATIENCE } {
            is_left = !self.is_entered_by(owner);
            if is_left {
                break;
            }
            crate::sync::yield_now();
        }
        if !is_left {
            if then != Then::Closed {
                // Release: as in `keep_for`. Nobody else stores it while the lock is held, but a
                // close, which comes again.
                self.head.owner.store(number, Ordering::Release);
            }
            return Err(Refusal::Busy);
        }
        if then == Then::Shared {
            self.share();
        }
        // Relaxed: ordered by the load of `inside`.
        let state = self.head.state.load(Ordering::Relaxed) | LOCKED;
        Permit { lane: self, state, inside: None }.with_room(slots)
    }

    /// Makes the lane nobody's, if it is this thread's own. The thread is outside of it.
    pub(crate) fn give_up(&self, seat: Seat<'_>) {
        // Relaxed: whoever takes the lane away, and comes first, orders the rest itself.
        let Head { state, owner, .. } = &*self.head;
        if owner.compare_exchange(seat.number, NOBODY, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        {
            // Relaxed: the thread stored it itself. Release: unlocks, see `Permit::drop`.
            let unlocked = state.load(Ordering::Relaxed) & !LOCKED;
            state.store(unlocked, Ordering::Release);
        }
    }

    /// The seat of the thread whose own the lane is now.
    pub(crate) fn owner(&self) -> Option<u64> {
        // Relaxed: a guess.
        let owner = self.head.owner.load(Ordering::Relaxed);
        (owner != NOBODY && owner != SHARED).then_some(owner)
    }

    /// Whether the thread at this seat is in it.
    pub(crate) fn is_entered_by(&self, seat: Seat<'_>) -> bool {
        // Acquire: pairs with the Release in `Permit::drop`.
        seat.inside.load(Ordering::Acquire) == self.address()
    }

    /// Whether it is owned by the thread at this seat.
    pub(crate) fn is_of(&self, seat: Seat<'_>) -> bool {
        self.owner() == Some(seat.number)
    }

    /// Whether it is a thread's own, or shared.
    pub(crate) fn is_kept(&self) -> bool {
        // Relaxed: a guess.
        self.head.owner.load(Ordering::Relaxed) != NOBODY
    }

    /// Whether all threads share it.
    #[inline(always)]
    pub(crate) fn is_shared(&self) -> bool {
        // Relaxed: a guess.
        self.head.owner.load(Ordering::Relaxed) == SHARED
    }

    /// Makes all threads share it. Nobody else has the lock now.
    pub(crate) fn share(&self) {
        // Relaxed: says nothing but itself.
        self.head.owner.store(SHARED, Ordering::Relaxed);
    }

    /// If nobody owns it, keeps all threads from making it their own from now on, even the one that
    /// holds it now.
    pub(crate) fn refuse_to_be_kept(&self) {
        // Relaxed: says nothing but itself.
        let (owner, relaxed) = (&self.head.owner, Ordering::Relaxed);
        let _ = owner.compare_exchange(NOBODY, SHARED, relaxed, relaxed);
    }

    /// Names the lane at a seat.
    #[inline(always)]
    fn address(&self) -> u64 {
        std::ptr::from_ref(self).addr() as u64
    }

    /// Whether there is no room now for this many records.
    pub(crate) fn lacks_room(&self, slots: u64) -> bool {
        self.tail() + slots > self.limit()
    }

    /// The number that the next record may not reach yet.
    #[inline(always)]
    fn limit(&self) -> u64 {
        // Acquire: pairs with the Release in `free`; the drainer has read what is overwritten from
        // here on.
        self.drained.freed.load(Ordering::Acquire) + self.capacity()
    }

    /// [`limit`](Self::limit), for the holder of the lock and later ones.
    #[cold]
    fn see_limit(&self) -> u64 {
        let limit = self.limit();
        // Relaxed: see `Permit::has_known_room`.
        self.head.limit_seen.store(limit, Ordering::Relaxed);
        limit
    }

    #[inline(always)]
    pub(crate) fn capacity(&self) -> u64 {
        self.drained.slots.capacity()
    }

    /// The number of the next record: all below are published.
    pub(crate) fn tail(&self) -> u64 {
        // Acquire: pairs with the Release in `Permit::drop`; the slots below are stored.
        self.head.state.load(Ordering::Acquire) >> 1
    }

    /// The number up to which the slots were freed.
    pub(crate) fn freed(&self) -> u64 {
        // Relaxed: for statistics, and for the drainer, which alone stores it.
        self.drained.freed.load(Ordering::Relaxed)
    }

    /// Gives the slots of all records below `number` to the writers. Only the drainer calls this,
    /// once their records are in the journal.
    pub(crate) fn free(&self, number: u64) {
        // Release: pairs with the Acquire in `limit`; the drainer's reads of the slots come before.
        self.drained.freed.store(number, Ordering::Release);
    }

    /// Reads a published record that is all of its operation. `None` when it is not, see
    /// [`read_operation`](Self::read_operation).
    #[inline]
    pub(crate) fn read(&self, number: u64) -> Option<Record> {
        self.drained.seal.decode(number, &load_slot(self.drained.slots.get(number)))
    }

    /// Reads the published operation that begins at `number`. `None` is damage: a slot below the
    /// tail that does not verify.
    #[inline]
    pub(crate) fn read_operation(&self, number: u64, operation: &mut Operation) -> Option<()> {
        let Drained { slots, seal, .. } = &*self.drained;
        let slot = |number| seal.verified(number, &load_slot(slots.get(number)));
        (operation.read(number, slot) == Reading::Complete).then_some(())
    }
}

#[inline]
pub(crate) fn load_slot(words: &Slot) -> [u64; SLOT_WORDS] {
    let mut slot = [0; SLOT_WORDS];
    for (value, word) in slot.iter_mut().zip(words) {
        // Relaxed: ordered by `state` while the lane is live, and verified by the check in any
        // case.
        *value = u64::from_le(word.load(Ordering::Relaxed));
    }
    slot
}

/// The right to append to a lane; dropping it publishes what was appended and unlocks.
#[derive(Debug)]
pub(crate) struct Permit<'a> {
    lane: &'a Lane,
    /// What to store: the number of the next record, with the lock's bit.
    state: u64,
    /// Where the thread says that it is inside, when the lane is its own.
    inside: Option<&'a AtomicU64>,
}

impl<'a> Permit<'a> {
    /// The permit, if there is room for this many records.
    #[inline(always)]
    fn with_room(self, slots: u64) -> Result<Self, Refusal> {
        // A lane that has skipped may be beyond its room: to close it none is needed.
        let is_full =
            slots > 0 && !self.has_known_room(slots) && self.next() + slots > self.lane.see_limit();
        if is_full { Err(Refusal::Full) } else { Ok(self) }
    }

    #[inline(always)]
    fn has_known_room(&self, slots: u64) -> bool {
        // Relaxed: what was acquired with it, was so by this thread, or before it got the lock.
        self.next() + slots <= self.lane.head.limit_seen.load(Ordering::Relaxed)
    }

    /// Makes the lane the thread's own, if it is nobody's.
    pub(crate) fn keep_for(mut self, seat: Seat<'a>) -> Self {
        let owner = &self.lane.head.owner;
        // Relaxed: a guess for the compare-and-swap.
        if self.inside.is_none() && owner.load(Ordering::Relaxed) == NOBODY {
            // Release: as in `enter`.
            seat.inside.store(self.lane.address(), Ordering::Release);
            // It fails where the lane is being closed. Release: pairs with the Acquire in
            // `take_away`.
            let is_kept = owner
                .compare_exchange(NOBODY, seat.number, Ordering::Release, Ordering::Relaxed)
                .is_ok();
            if is_kept {
                self.inside = Some(seat.inside);
            } else {
                // Release: see `Permit::drop`.
                seat.inside.store(OUTSIDE, Ordering::Release);
            }
        }
        self
    }

    /// The number of the next record.
    #[inline(always)]
    pub(crate) fn next(&self) -> u64 {
        self.state >> 1
    }

    /// Stores a record. The room was checked when the lane was taken, so this can't fail.
    #[inline(always)]
    pub(crate) fn append(&mut self, record: &Record) {
        self.store_next(self.lane.head.seal.encode(self.next(), record));
    }

    /// Stores the `count` records of one operation next to each other. The room for them was
    /// checked.
    pub(crate) fn append_operation(&mut self, count: u8, items: impl Iterator<Item = Item>) {
        for (following, item) in (0..count).rev().zip(items) {
            self.append_item(&item, following);
        }
    }

    /// Stores one record of an operation, of which this many are still to be stored.
    #[inline(always)]
    pub(crate) fn append_item(&mut self, item: &Item, following: u8) {
        self.store_next(self.lane.head.seal.encode_item(self.next(), item, following));
    }

    #[inline(always)]
    fn store_next(&mut self, slot: [u64; SLOT_WORDS]) {
        debug_assert!(self.next() < self.lane.limit());
        self.store(slot);
        self.state += 1 << 1;
    }

    #[inline(always)]
    fn store(&self, slot: [u64; SLOT_WORDS]) {
        let [values @ .., check_value] = slot;
        let place = self.lane.head.slots.get(self.next());
        // Maybe beyond the ring's end, in vain: what comes next is at its start.
        prefetch::for_write(std::ptr::from_ref(place).wrapping_add(PREFETCH_AHEAD));
        let [rest @ .., check_word] = place;
        for (word, value) in rest.iter().zip(values) {
            // Relaxed: published by the Release below and by the one in `drop`.
            word.store(value.to_le(), Ordering::Relaxed);
        }
        // Release: the check word last, so that a process that dies in between leaves a slot that
        // does not verify.
        check_word.store(check_value.to_le(), Ordering::Release);
    }

    /// Makes the lane go on at the start of its ring, and leaves a record that says so; for it the
    /// lane was taken with room for one. Returns the number of the next record. Only the drainer
    /// does this, and reads nothing in between.
    pub(crate) fn skip(&mut self) -> u64 {
        debug_assert!(self.next() < self.lane.limit());
        let target = (self.next() + 1).next_multiple_of(self.lane.capacity());
        self.store(self.lane.head.seal.encode_skip(self.next(), target));
        self.state = target << 1 | LOCKED;
        target
    }

    /// Keeps the lane locked for good: closing the engine.
    pub(crate) fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for Permit<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        let state = &self.lane.head.state;
        match self.inside {
            // Release: pairs with the Acquire in `try_lock` and `tail`.
            None => state.store(self.state & !LOCKED, Ordering::Release),
            Some(inside) => {
                // Release: pairs with the Acquire in `tail`.
                state.store(self.state, Ordering::Release);
                // Release: pairs with the Acquire in `take_away`.
                inside.store(OUTSIDE, Ordering::Release);
            }
        }
    }
}

/// What is found in a ring after the process that wrote it is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RingScan {
    /// How many records verify without a gap.
    pub(crate) records: u64,
    /// Where the next record would have gone.
    pub(crate) end: u64,
    /// The first record that does not verify.
    pub(crate) torn: u64,
    /// A record beyond the run that verifies all the same: a gap, left by a loss of power or by
    /// rot.
    pub(crate) beyond_gap: Option<u64>,
    /// The slot where the run ends would verify but for one bit: the death of a process is unlikely
    /// to have left it so.
    pub(crate) one_bit_off: Option<u64>,
    /// A record of a later lap in the first slot: what was expected there had been journaled and
    /// overwritten.
    pub(crate) lapped: Option<u64>,
}

/// For how many laps ahead a slot that does not verify is tested.
const LAPS_TESTED: u64 = 64;

/// What one operation wrote.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Found<'a> {
    /// One add, as most do.
    Add(Record),
    Operation(&'a Operation),
}

/// Reads the operations in a ring from `from` on, as far as they verify without a gap and at most
/// one lap; each with the number of its first record.
pub(crate) fn scan_ring(
    slots: &Slots,
    seal: Seal,
    from: u64,
    visit: &mut dyn FnMut(u64, Found<'_>) -> crate::error::Result<()>,
) -> crate::error::Result<RingScan> {
    let capacity = slots.capacity();
    let load = |number| load_slot(slots.get(number));
    let skip = |number| seal.decode_skip(number, &load(number));
    let item = |number| seal.verified(number, &load(number));
    let verifies = |number| item(number).is_some() || skip(number).is_some();
    let leads_to = |number: u64| number.checked_add(1)?.checked_next_multiple_of(capacity);
    let limit = from.saturating_add(capacity);
    let item_below_limit = |number| if number < limit { item(number) } else { None };
    let mut operation = Operation::default();
    let mut records = 0;
    let mut end = from;
    // Beyond `end`: the first records of an operation whose writer died.
    let mut begun = 0;
    while end < limit {
        if let Some(record) = seal.decode(end, &load(end)) {
            visit(end, Found::Add(record))?;
            records += 1;
            end += 1;
        } else if let Some(target) = skip(end).filter(|&target| leads_to(end) == Some(target)) {
            end = target;
        } else {
            match operation.read(end, item_below_limit) {
                Reading::Complete => {
                    visit(end, Found::Operation(&operation))?;
                    records += operation.len();
                    end += operation.len();
                }
                Reading::CutShort(count) => {
                    begun = count;
                    break;
                }
            }
        }
    }
    let torn = end.saturating_add(begun);
    // What was never written need not be read to know that it verifies no record: of a ring that
    // has not been filled yet, most.
    let mut beyond_gap = None;
    let mut next = torn.saturating_add(1);
    while beyond_gap.is_none() && next < limit {
        let written = slots.written_from(next);
        beyond_gap = (written.start..written.end.min(limit)).find(|&number| verifies(number));
        next = written.end;
    }
    let lapped = (1..=LAPS_TESTED)
        .map_while(|lap| lap.checked_mul(capacity)?.checked_add(from))
        .find(|&number| end == from && verifies(number));
    let is_one_bit_off = torn < limit && seal.is_one_bit_off(torn, &load(torn));
    let one_bit_off = is_one_bit_off.then_some(torn);
    Ok(RingScan { records, end, torn, beyond_gap, one_bit_off, lapped })
}

#[cfg(all(test, loom))]
pub(crate) mod loom_tests;
#[cfg(test)]
#[cfg(not(loom))]
mod tests;
