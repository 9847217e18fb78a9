//! The open reservations, and what they hold of each counter.
//!
//! They are divided into shards by their numbers, each under a lock. Opening one takes that lock
//! before anything is counted, and keeps it as long as the operation lasts: nobody else can then
//! take the next number, and as soon as units of the reservation are in a counter, whoever looks
//! for it finds it, or waits.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicIsize, AtomicU64, Ordering};

use crossbeam::utils::CachePadded;
use foldhash::fast::RandomState;

use crate::admission::cell::{Cell, CellState};
use crate::admission::remembered::Locked;
use crate::admission::reserved::{HeldSum, Reserved, SumPlace};
use crate::admission::table::Place;
use crate::fold::SumKey;
use crate::ledger::{Part, Parts};
use crate::model::{ReservationId, Timestamp, WindowStart};
use crate::sync::{BriefGuard, BriefLock};

const SHARDS: usize = 64;

/// Numbers are given to a thread in blocks of this many, whose reservations are in one shard: it
/// shares a cache line with other threads only once per block.
pub(super) const NUMBERS_IN_BLOCK: u64 = 64;
/// Numbers so far apart are in the same shard.
pub(super) const NUMBERS_IN_LAP: u64 = NUMBERS_IN_BLOCK * SHARDS as u64;
const STRIPES: usize = 16;

/// A shard takes at most this many places at a time, so that threads rarely meet at the common
/// pool; and no more than one in `PLACES_PART` of those left there.
const PLACES_AT_ONCE: isize = 64;
const PLACES_PART: isize = 2 * SHARDS as isize;

/// This many reservations of a shard are found without a search: either few are open at a time, or
/// many, and then the search is not what takes long.
const NEAR: usize = 4;

/// All of an engine's.
#[derive(Debug)]
pub(crate) struct Reservations {
    generation: u64,
    next_block: AtomicU64,
    /// The next number of a thread's block; 0 before its first. Stored under the lock of that
    /// number's shard.
    next_numbers: [CachePadded<AtomicU64>; STRIPES],
    max: usize,
    /// How many more may be open than shards have places for. Below 0 where recovery found more
    /// than may be.
    places: CachePadded<AtomicIsize>,
    /// Whether there was ever one: read by operations that would rather not look further.
    is_used: AtomicBool,
    shards: Box<[Locked<Shard>]>,
    /// By the shards: none of its reservations expires before this. Changed under the shard's lock.
    first_expiries: [AtomicU64; SHARDS],
    reserved: Reserved,
}

#[derive(Debug, Default)]
struct Shard {
    /// By the numbers, where the place is free; mostly it is.
    near: [Option<(ReservationId, Entry)>; NEAR],
    others: HashMap<ReservationId, Entry, RandomState>,
    /// How many more may be open here.
    places: isize,
}

#[derive(Debug)]
struct Entry {
    expires: Timestamp,
    parts: Parts,
    /// Somebody is about to settle it.
    is_taken: bool,
}

/// A reservation that is about to be opened. Nothing has changed when it is dropped instead.
#[derive(Debug)]
pub(crate) struct Opening<'a> {
    reservations: &'a Reservations,
    shard: BriefGuard<'a, Shard>,
    next_number: &'a AtomicU64,
    id: ReservationId,
}

/// An open reservation of one counter, that nobody else settles or takes meanwhile.
#[derive(Debug)]
pub(crate) struct Open<'a> {
    reservations: &'a Reservations,
    shard: BriefGuard<'a, Shard>,
    pub(crate) id: ReservationId,
    pub(crate) expires: Timestamp,
    pub(crate) part: Part,
}

/// What became of an attempt to settle.
#[derive(Debug)]
pub(crate) enum Take<'a> {
    Taken(Taken<'a>),
    /// Another is settling it just now.
    Busy,
    /// It is not open.
    Gone,
}

/// A reservation that nobody else settles; open again when dropped before
/// [`settled`](Self::settled).
#[derive(Debug)]
pub(crate) struct Taken<'a> {
    reservations: &'a Reservations,
    id: ReservationId,
    expires: Timestamp,
    pub(crate) parts: Parts,
    is_settled: bool,
}

impl Shard {
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "64-bit platforms only")]
    fn near(id: ReservationId) -> usize {
        id.number as usize % NEAR
    }

    #[inline(always)]
    fn get(&self, id: ReservationId) -> Option<&Entry> {
        match &self.near[Self::near(id)] {
            Some((known, entry)) if *known == id => Some(entry),
            _ if self.others.is_empty() => None,
            _ => self.others.get(&id),
        }
    }

    fn get_mut(&mut self, id: ReservationId) -> Option<&mut Entry> {
        match &mut self.near[Self::near(id)] {
            Some((known, entry)) if *known == id => Some(entry),
            _ => self.others.get_mut(&id),
        }
    }

    #[inline(always)]
    fn insert(&mut self, id: ReservationId, entry: Entry) {
        let near = &mut self.near[Self::near(id)];
        if near.is_none() {
            *near = Some((id, entry));
        } else {
            self.others.insert(id, entry);
        }
    }

    #[inline(always)]
    fn remove(&mut self, id: ReservationId) {
        match &mut self.near[Self::near(id)] {
            near @ Some(_) if near.as_ref().is_some_and(|(known, _)| *known == id) => *near = None,
            _ => drop(self.others.remove(&id)),
        }
    }

    fn iter(&self) -> impl Iterator<Item = (ReservationId, &Entry)> {
        let near = self.near.iter().flatten().map(|(id, entry)| (*id, entry));
        near.chain(self.others.iter().map(|(&id, entry)| (id, entry)))
    }

    fn len(&self) -> usize {
        self.near.iter().flatten().count() + self.others.len()
    }
}

impl Reservations {
    /// None yet; ids are of this generation, with numbers from about `first` on. The hasher is that
    /// of the counters' table.
    pub(crate) fn new(generation: u64, first: u64, max: usize, hasher: RandomState) -> Self {
        // A block's, and no number is 0.
        let first = first.next_multiple_of(NUMBERS_IN_BLOCK).max(NUMBERS_IN_BLOCK);
        Self {
            generation,
            next_block: AtomicU64::new(first),
            next_numbers: std::array::from_fn(|_| CachePadded::default()),
            max,
            places: CachePadded::new(AtomicIsize::new(max.try_into().unwrap_or(isize::MAX))),
            is_used: AtomicBool::new(false),
            shards: (0..SHARDS).map(|_| CachePadded::default()).collect(),
            first_expiries: std::array::from_fn(|_| AtomicU64::new(u64::MAX)),
            reserved: Reserved::new(hasher),
        }
    }

    pub(crate) fn max(&self) -> usize {
        self.max
    }

    /// Begins to open one, under an id that was never given before; `None` at the bound. `thread`
    /// is a number of the calling thread: others mostly take theirs elsewhere. The caller must not
    /// be in a shard of the counters' map.
    #[inline]
    pub(crate) fn begin(&self, thread: usize) -> Option<Opening<'_>> {
        let next_number = &*self.next_numbers[thread % STRIPES];
        loop {
            // Relaxed: a guess.
            let number = match next_number.load(Ordering::Relaxed) {
                0 => self.first_number(next_number),
                number => number,
            };
            let mut shard = self.shard(number).lock();
            // Relaxed: a number is the next until somebody stores another, under this lock.
            if next_number.load(Ordering::Relaxed) != number {
                continue;
            }
            if shard.places <= 0 {
                shard.places += self.take_places(PLACES_AT_ONCE);
                if shard.places <= 0 {
                    drop(shard);
                    self.collect_places()?;
                    continue;
                }
            }
            let id = ReservationId { generation: self.generation, number };
            return Some(Opening { reservations: self, shard, next_number, id });
        }
    }

    /// [`begin`](Self::begin) where nothing is in the way. Waits for nobody: the caller may be in a
    /// shard of the counters' map.
    #[inline(always)]
    pub(crate) fn try_begin(&self, thread: usize) -> Option<Opening<'_>> {
        let next_number = &*self.next_numbers[thread % STRIPES];
        // Relaxed, both: as in `begin`.
        let number = next_number.load(Ordering::Relaxed);
        if number == 0 {
            return None;
        }
        let mut shard = self.shard(number).try_lock()?;
        if next_number.load(Ordering::Relaxed) != number {
            return None;
        }
        if shard.places <= 0 {
            shard.places += self.take_places(PLACES_AT_ONCE);
        }
        let id = ReservationId { generation: self.generation, number };
        let opening = Opening { reservations: self, shard, next_number, id };
        (opening.shard.places > 0).then_some(opening)
    }

    /// Another block's first number.
    fn next_block(&self) -> u64 {
        // Relaxed: a ticket.
        self.next_block.fetch_add(NUMBERS_IN_BLOCK, Ordering::Relaxed)
    }

    #[cold]
    fn first_number(&self, next_number: &AtomicU64) -> u64 {
        let first = self.next_block();
        // Relaxed: see `begin`.
        match next_number.compare_exchange(0, first, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => first,
            Err(number) => number,
        }
    }

    /// Takes up to this many places that no shard has.
    #[cold]
    fn take_places(&self, count: isize) -> isize {
        // Relaxed, here and below: a count.
        let mut left = self.places.load(Ordering::Relaxed);
        loop {
            if left <= 0 {
                return 0;
            }
            let taken = (left / PLACES_PART).clamp(1, count);
            let swapped = self.places.compare_exchange_weak(
                left,
                left - taken,
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
            match swapped {
                Ok(_) => return taken,
                Err(now) => left = now,
            }
        }
    }

    /// Takes the places back that shards have and don't use; `None` when there are none.
    #[cold]
    fn collect_places(&self) -> Option<()> {
        for shard in &self.shards {
            let mut shard = shard.lock();
            let places = std::mem::take(&mut shard.places);
            // Under the lock: who comes after this and has looked at all shards finds the places
            // here, unless somebody has taken them. Otherwise they would be nowhere for as long as
            // this thread has no processor, and others be told that there are none.
            self.places.fetch_add(places, Ordering::Relaxed);
        }
        (self.places.load(Ordering::Relaxed) > 0).then_some(())
    }

    /// Puts one in as recovery found it; the bound may have been another.
    pub(crate) fn load(&self, id: ReservationId, expires: Timestamp, parts: &[Part]) {
        self.is_used.store(true, Ordering::Relaxed);
        for part in parts {
            self.reserved.load(part);
        }
        self.places.fetch_sub(1, Ordering::Relaxed);
        let mut shard = self.shard(id.number).lock();
        shard.places += 1;
        self.insert(&mut shard, id, expires, parts.into());
    }

    /// How many are open. Takes every shard's lock in turn.
    pub(crate) fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().len()).sum()
    }

    fn shard_index(number: u64) -> usize {
        (number / NUMBERS_IN_BLOCK) as usize % SHARDS
    }

    fn shard(&self, number: u64) -> &BriefLock<Shard> {
        &self.shards[Self::shard_index(number)]
    }

    /// Opens one, for which the shard has a place.
    #[inline(always)]
    fn insert(&self, shard: &mut Shard, id: ReservationId, expires: Timestamp, parts: Parts) {
        // Relaxed, all of them: whoever finds units of a reservation in a counter has acquired what
        // was stored before it was counted, through the counter's cell.
        let first_expiry = &self.first_expiries[Self::shard_index(id.number)];
        if expires.as_unix_millis() < first_expiry.load(Ordering::Relaxed) {
            first_expiry.store(expires.as_unix_millis(), Ordering::Relaxed);
        }
        if !self.is_used.load(Ordering::Relaxed) {
            self.is_used.store(true, Ordering::Relaxed);
        }
        shard.places -= 1;
        shard.insert(id, Entry { expires, parts, is_taken: false });
    }

    /// Closes one: its place is free.
    #[inline(always)]
    fn remove(&self, shard: &mut Shard, id: ReservationId) {
        shard.remove(id);
        shard.places += 1;
        if shard.places > 2 * PLACES_AT_ONCE || self.places.load(Ordering::Relaxed) <= 0 {
            let places = std::mem::take(&mut shard.places);
            self.places.fetch_add(places, Ordering::Relaxed);
        }
    }

    /// Where a counter's reserved sum is, which is about to be changed.
    #[inline(always)]
    pub(crate) fn prefetch(&self, counter: Place, window: WindowStart) -> SumPlace {
        self.reserved.prefetch(counter, window)
    }

    /// A counter's reserved sum, to be changed while the counter's cell is held.
    #[inline(always)]
    pub(crate) fn lock_sum(&self, place: SumPlace) -> HeldSum<'_> {
        self.reserved.lock(place)
    }

    /// Counts what is reserved. The counter's cell is held.
    pub(crate) fn reserve(&self, part: &Part) {
        self.reserved.lock(self.reserved.place(part.key())).add(part.amount);
    }

    /// Counts what is no longer reserved. The counter's cell is held, unless its window is over.
    pub(crate) fn unreserve(&self, part: &Part) {
        self.reserved.lock(self.reserved.place(part.key())).subtract(part.amount);
    }

    /// A counter's state as seen from a window, and how much of it is reserved: of one instant.
    /// `None` while somebody is about to change them.
    pub(crate) fn read(
        &self,
        cell: &Cell,
        user: u64,
        window: WindowStart,
    ) -> Option<(CellState, u64)> {
        let state = cell.load().seen_from(window);
        // Relaxed, after the state: see `insert`.
        if !self.is_used.load(Ordering::Relaxed) {
            return Some((state, 0));
        }
        self.reserved.read(cell, user, window)
    }

    /// How much of a counter's usage is reserved. Inlined where each operation asks: the first look
    /// is all that there is to it for those who reserve nothing.
    #[inline(always)]
    pub(crate) fn reserved(&self, key: SumKey) -> u64 {
        // Relaxed: see `insert`.
        if !self.is_used.load(Ordering::Relaxed) {
            return 0;
        }
        self.reserved.sum(key)
    }

    /// Makes a reservation expire no earlier than at `expires`; `write` writes it down. Whether
    /// that was to do; `None` when it is not open, or its time is over at `now`.
    pub(crate) fn extend(
        &self,
        id: ReservationId,
        now: Timestamp,
        expires: Timestamp,
        write: impl FnOnce(),
    ) -> Option<bool> {
        let mut shard = self.shard(id.number).lock();
        let entry = shard.get_mut(id).filter(|entry| !entry.is_taken && entry.expires > now)?;
        let is_longer = expires > entry.expires;
        if is_longer {
            write();
            entry.expires = expires;
        }
        Some(is_longer)
    }

    /// When it expires, if it is open.
    pub(crate) fn expires(&self, id: ReservationId) -> Option<Timestamp> {
        let mut shard = self.shard(id.number).lock();
        shard.get_mut(id).filter(|entry| !entry.is_taken).map(|entry| entry.expires)
    }

    /// Takes a reservation to settle it.
    pub(crate) fn take(&self, id: ReservationId) -> Take<'_> {
        let mut shard = self.shard(id.number).lock();
        match shard.get_mut(id) {
            None => Take::Gone,
            Some(entry) if entry.is_taken => Take::Busy,
            Some(entry) => {
                entry.is_taken = true;
                let (expires, parts) = (entry.expires, entry.parts.clone());
                drop(shard);
                Take::Taken(Taken { reservations: self, id, expires, parts, is_settled: false })
            }
        }
    }

    /// Finds a reservation of one counter to settle it at once, if it is open and nobody else is
    /// about to.
    #[inline]
    pub(crate) fn open_one(&self, id: ReservationId) -> Option<Open<'_>> {
        let shard = self.shard(id.number).lock();
        let entry = shard.get(id).filter(|entry| !entry.is_taken)?;
        let &[part] = &*entry.parts else { return None };
        let expires = entry.expires;
        Some(Open { reservations: self, shard, id, expires, part })
    }

    /// Whether the time of one may be over.
    pub(crate) fn is_due(&self, now: Timestamp) -> bool {
        // Relaxed: see `insert`.
        self.is_used.load(Ordering::Relaxed)
            && self
                .first_expiries
                .iter()
                .any(|first| first.load(Ordering::Relaxed) <= now.as_unix_millis())
    }

    /// Visits those that are open, also while somebody settles them, in no order: each shard's as
    /// of one instant, under its lock.
    pub(crate) fn for_each(&self, mut visit: impl FnMut(ReservationId, Timestamp, &[Part])) {
        for shard in &self.shards {
            for (id, entry) in shard.lock().iter() {
                visit(id, entry.expires, &entry.parts);
            }
        }
    }

    /// Those whose time is over, also while somebody settles them.
    pub(crate) fn expired(&self, now: Timestamp) -> Vec<ReservationId> {
        let mut expired = Vec::new();
        if !self.is_due(now) {
            return expired;
        }
        for (shard, first_expiry) in self.shards.iter().zip(&self.first_expiries) {
            if first_expiry.load(Ordering::Relaxed) > now.as_unix_millis() {
                continue;
            }
            let shard = shard.lock();
            let mut first = u64::MAX;
            for (id, entry) in shard.iter() {
                if entry.expires <= now {
                    expired.push(id);
                }
                first = first.min(entry.expires.as_unix_millis());
            }
            first_expiry.store(first, Ordering::Relaxed);
        }
        expired
    }
}

impl Opening<'_> {
    /// The id that it gets.
    pub(crate) fn id(&self) -> ReservationId {
        self.id
    }

    /// Opens it. Its units are counted as reserved, and their counters' cells still held.
    #[inline(always)]
    pub(crate) fn open(mut self, expires: Timestamp, parts: Parts) {
        let next = self.id.number + 1;
        let is_block_over = next.is_multiple_of(NUMBERS_IN_BLOCK);
        let next = if is_block_over { self.reservations.next_block() } else { next };
        // Relaxed: see `begin`.
        self.next_number.store(next, Ordering::Relaxed);
        self.reservations.insert(&mut self.shard, self.id, expires, parts);
    }
}

impl Open<'_> {
    /// It is settled: its place is free. `remember` keeps how, for whoever asks from now on.
    #[inline(always)]
    pub(crate) fn settled(mut self, remember: impl FnOnce()) {
        remember();
        self.reservations.remove(&mut self.shard, self.id);
    }
}

impl Taken<'_> {
    pub(crate) fn id(&self) -> ReservationId {
        self.id
    }

    pub(crate) fn expires(&self) -> Timestamp {
        self.expires
    }

    /// It is settled: its place is free. `remember` keeps how, for whoever asks from now on.
    pub(crate) fn settled(mut self, remember: impl FnOnce()) {
        self.is_settled = true;
        let mut shard = self.reservations.shard(self.id.number).lock();
        remember();
        self.reservations.remove(&mut shard, self.id);
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if self.is_settled {
            return;
        }
        if let Some(entry) = self.reservations.shard(self.id.number).lock().get_mut(self.id) {
            entry.is_taken = false;
        }
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests;
