//! The open reservations, and what they take of each counter.

use std::collections::HashMap;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use crossbeam::utils::CachePadded;
use foldhash::fast::RandomState;
use parking_lot::Mutex;

use crate::admission::remembered::Locked;
use crate::fold::SumKey;
use crate::ledger::{Part, Parts};
use crate::model::{ReservationId, Timestamp};

const SHARDS: usize = 64;

/// Numbers are given to a thread in blocks of so many, whose reservations lie in one shard: with
/// other threads it shares a line once per block.
const NUMBERS_IN_BLOCK: u64 = 64;
const STRIPES: usize = 16;

/// All of an engine's.
#[derive(Debug)]
pub(crate) struct Reservations {
    generation: u64,
    next_block: AtomicU64,
    /// The next number of a thread's block; a multiple of the block's size when it is used up.
    next_numbers: [CachePadded<AtomicU64>; STRIPES],
    max: usize,
    open: AtomicUsize,
    /// Whether there was ever one: read by operations that would rather not look further.
    is_used: AtomicBool,
    shards: Box<[Locked<Shard>]>,
    reserved: Box<[Locked<ReservedSums>]>,
    hasher: RandomState,
}

/// How much of each counter is reserved; nothing is left out.
type ReservedSums = HashMap<SumKey, u64, RandomState>;

#[derive(Debug, Default)]
struct Shard {
    open: HashMap<ReservationId, Entry, RandomState>,
    /// No open reservation expires before this.
    first_expiry: u64,
}

#[derive(Debug)]
struct Entry {
    expires: Timestamp,
    parts: Parts,
    /// Somebody is about to settle it.
    is_taken: bool,
}

/// A place for one more reservation, given back when dropped.
#[derive(Debug)]
pub(crate) struct Place<'a> {
    reservations: &'a Reservations,
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

impl Reservations {
    /// None yet; ids are of this generation.
    pub(crate) fn new(generation: u64, max: usize) -> Self {
        Self {
            generation,
            // So that no number is 0.
            next_block: AtomicU64::new(NUMBERS_IN_BLOCK),
            next_numbers: std::array::from_fn(|_| CachePadded::default()),
            max,
            open: AtomicUsize::new(0),
            is_used: AtomicBool::new(false),
            shards: (0..SHARDS).map(|_| CachePadded::default()).collect(),
            reserved: (0..SHARDS).map(|_| CachePadded::default()).collect(),
            hasher: RandomState::default(),
        }
    }

    /// A place for one more; `None` at the bound.
    pub(crate) fn place(&self) -> Option<Place<'_>> {
        // Relaxed: a count. The place is there before the reservation is.
        let before = self.open.fetch_add(1, Ordering::Relaxed);
        let place = Place { reservations: self };
        if before >= self.max {
            return None;
        }
        // Relaxed: whoever finds units of a reservation in a counter has acquired what was stored
        // before it was counted, through the counter's cell.
        if !self.is_used.load(Ordering::Relaxed) {
            self.is_used.store(true, Ordering::Relaxed);
        }
        Some(place)
    }

    pub(crate) fn max(&self) -> usize {
        self.max
    }

    /// An id that was never given before. `thread` is a number of the calling thread: others mostly
    /// take theirs elsewhere.
    pub(crate) fn next_id(&self, thread: usize) -> ReservationId {
        let next_number = &self.next_numbers[thread % STRIPES];
        // Relaxed, all of them: tickets.
        let mut next = next_number.load(Ordering::Relaxed);
        loop {
            let number = if next.is_multiple_of(NUMBERS_IN_BLOCK) {
                self.next_block.fetch_add(NUMBERS_IN_BLOCK, Ordering::Relaxed)
            } else {
                next
            };
            let swapped = next_number.compare_exchange_weak(
                next,
                number + 1,
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
            match swapped {
                Ok(_) => return ReservationId { generation: self.generation, number },
                // Another thread with the same stripe.
                Err(now) => next = now,
            }
        }
    }

    /// Puts one in as recovery found it; the bound may have been another.
    pub(crate) fn load(&self, id: ReservationId, expires: Timestamp, parts: &[Part]) {
        self.is_used.store(true, Ordering::Relaxed);
        self.open.fetch_add(1, Ordering::Relaxed);
        for part in parts {
            self.reserve(part);
        }
        Place { reservations: self }.open(id, expires, parts.into());
    }

    /// How many are open.
    pub(crate) fn len(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    fn shard(&self, id: ReservationId) -> &Mutex<Shard> {
        let index = (id.number / NUMBERS_IN_BLOCK) as usize % SHARDS;
        &self.shards[index]
    }

    fn sums(&self, key: SumKey) -> &Mutex<ReservedSums> {
        #[expect(clippy::cast_possible_truncation, reason = "64-bit platforms only")]
        let hash = self.hasher.hash_one(key) as usize;
        &self.reserved[hash % SHARDS]
    }

    /// How much of a counter's usage is reserved.
    pub(crate) fn reserved(&self, key: SumKey) -> u64 {
        // Relaxed: see `place`.
        if !self.is_used.load(Ordering::Relaxed) {
            return 0;
        }
        self.sums(key).lock().get(&key).copied().unwrap_or(0)
    }

    /// Counts what is reserved. The counter's cell is held.
    pub(crate) fn reserve(&self, part: &Part) {
        let key = key_of(part);
        *self.sums(key).lock().entry(key).or_default() += part.amount;
    }

    /// Counts what is no longer reserved. The counter's cell is held, unless its window is over.
    pub(crate) fn unreserve(&self, part: &Part) {
        let key = key_of(part);
        let mut sums = self.sums(key).lock();
        if let Some(sum) = sums.get_mut(&key) {
            *sum = sum.saturating_sub(part.amount);
            if *sum == 0 {
                sums.remove(&key);
            }
        }
    }

    /// Makes a reservation expire no earlier than at `expires`; `write` writes it down, and its
    /// error leaves everything as it was. `None` when it is not open; what `write` gave, unless it
    /// lives as long anyway.
    pub(crate) fn extend<T, E>(
        &self,
        id: ReservationId,
        expires: Timestamp,
        write: impl FnOnce() -> Result<T, E>,
    ) -> Option<Result<Option<T>, E>> {
        let mut shard = self.shard(id).lock();
        let entry = shard.open.get_mut(&id).filter(|entry| !entry.is_taken)?;
        if expires <= entry.expires {
            return Some(Ok(None));
        }
        let written = write();
        if written.is_ok() {
            entry.expires = expires;
        }
        Some(written.map(Some))
    }

    /// Takes a reservation to settle it.
    pub(crate) fn take(&self, id: ReservationId) -> Take<'_> {
        let mut shard = self.shard(id).lock();
        match shard.open.get_mut(&id) {
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

    /// Those whose time is over, also while somebody settles them.
    pub(crate) fn expired(&self, now: Timestamp) -> Vec<ReservationId> {
        let mut expired = Vec::new();
        if self.len() == 0 {
            return expired;
        }
        for shard in &self.shards {
            let mut shard = shard.lock();
            if shard.open.is_empty() || shard.first_expiry > now.as_unix_millis() {
                continue;
            }
            let mut first = u64::MAX;
            for (&id, entry) in &shard.open {
                if entry.expires <= now {
                    expired.push(id);
                }
                first = first.min(entry.expires.as_unix_millis());
            }
            shard.first_expiry = first;
        }
        expired
    }
}

impl Place<'_> {
    /// Fills the place.
    pub(crate) fn open(self, id: ReservationId, expires: Timestamp, parts: Parts) {
        let mut shard = self.reservations.shard(id).lock();
        let first = if shard.open.is_empty() { u64::MAX } else { shard.first_expiry };
        shard.first_expiry = first.min(expires.as_unix_millis());
        shard.open.insert(id, Entry { expires, parts, is_taken: false });
        drop(shard);
        std::mem::forget(self);
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.reservations.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Taken<'_> {
    pub(crate) fn id(&self) -> ReservationId {
        self.id
    }

    pub(crate) fn expires(&self) -> Timestamp {
        self.expires
    }

    /// It is settled: its place is free.
    pub(crate) fn settled(mut self) {
        self.is_settled = true;
        self.reservations.shard(self.id).lock().open.remove(&self.id);
        drop(Place { reservations: self.reservations });
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if self.is_settled {
            return;
        }
        if let Some(entry) = self.reservations.shard(self.id).lock().open.get_mut(&self.id) {
            entry.is_taken = false;
        }
    }
}

fn key_of(part: &Part) -> SumKey {
    SumKey { quota: part.quota, window: part.window, user: part.user }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;
    use crate::model::{QuotaId, WindowStart};

    const PART: Part = Part { user: 7, quota: QuotaId(1), window: WindowStart(0), amount: 5 };

    fn at(millis: u64) -> Timestamp {
        Timestamp::from_unix_millis(millis)
    }

    fn open(reservations: &Reservations, expires: u64) -> ReservationId {
        let id = reservations.next_id(0);
        reservations.reserve(&PART);
        let place = reservations.place().expect("there is room");
        place.open(id, at(expires), smallvec::smallvec![PART]);
        id
    }

    #[test]
    fn places_are_bounded_and_come_back() {
        let reservations = Reservations::new(1, 2);
        assert_eq!(reservations.reserved(key_of(&PART)), 0);
        let first = open(&reservations, 10);
        let place = reservations.place().expect("a second");
        assert!(reservations.place().is_none());
        drop(place);
        let second = open(&reservations, 10);
        assert!(first != second && reservations.place().is_none());
        assert_eq!((reservations.len(), reservations.reserved(key_of(&PART))), (2, 10));
        let Take::Taken(taken) = reservations.take(first) else { panic!("it is open") };
        assert!(matches!(reservations.take(first), Take::Busy));
        reservations.unreserve(&PART);
        taken.settled();
        assert!(matches!(reservations.take(first), Take::Gone));
        assert_eq!((reservations.len(), reservations.reserved(key_of(&PART))), (1, 5));
    }

    /// Also by threads that share a stripe, of which there are more than stripes.
    #[test]
    fn no_number_is_given_twice() {
        let reservations = Reservations::new(1, 2);
        let mut numbers: Vec<u64> = std::thread::scope(|scope| {
            let take = |thread| {
                let next = || reservations.next_id(thread).number;
                std::iter::repeat_with(next).take(1000).collect::<Vec<_>>()
            };
            let threads: Vec<_> =
                (0..STRIPES + 4).map(|thread| scope.spawn(move || take(thread))).collect();
            threads.into_iter().flat_map(|thread| thread.join().expect("no panic")).collect()
        });
        numbers.sort_unstable();
        assert!(numbers.is_sorted_by(|one, next| one < next));
        assert!(numbers.first().is_some_and(|&first| first > 0));
    }

    #[test]
    fn what_was_not_settled_is_open_again() {
        let reservations = Reservations::new(1, 2);
        let id = open(&reservations, 10);
        for _ in 0..2 {
            let Take::Taken(taken) = reservations.take(id) else { panic!("it is open") };
            assert_eq!(taken.parts[..], [PART]);
            let extended = reservations.extend(id, at(20), || Ok::<_, ()>(()));
            assert_eq!(extended, None, "it is being settled");
        }
        assert_eq!(reservations.len(), 1);
    }

    #[test]
    fn those_whose_time_is_over_are_found_again_and_again() {
        let reservations = Reservations::new(1, 1000);
        let late = open(&reservations, 30);
        let ids: Vec<_> = (0..200).map(|n| open(&reservations, 10 + n % 2)).collect();
        assert_eq!(reservations.expired(at(9)), []);
        assert_eq!(reservations.expired(at(10)).len(), 100);
        assert_eq!(reservations.expired(at(11)).len(), 200);
        for id in ids {
            let Take::Taken(taken) = reservations.take(id) else { panic!("it is open") };
            taken.settled();
        }
        assert_eq!(reservations.expired(at(29)), []);
        assert_eq!(reservations.extend::<(), _>(late, at(40), || Err(())), Some(Err(())));
        assert_eq!(reservations.expired(at(30)), [late]);
        assert_eq!(reservations.extend(late, at(40), || Ok::<_, ()>(())), Some(Ok(Some(()))));
        assert_eq!(reservations.extend(late, at(35), || Ok::<_, ()>(())), Some(Ok(None)));
        assert_eq!(reservations.expired(at(39)), []);
        assert_eq!(reservations.expired(at(40)), [late]);
    }
}
