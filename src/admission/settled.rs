//! How reservations have ended, remembered for a while.
//!
//! Reservations are numbered as they are opened, so the end of one has its place in a ring by its
//! number alone: 8 bytes, next to those of the reservations that the same thread has opened before
//! and after it. A map would take several times the memory, and wait for it several times.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::admission::remembered::Remembered;
use crate::ledger::{Remembering, Settlement};
use crate::model::{ReservationId, Timestamp};
use crate::stats::Striped;

/// So many places are allocated at a time.
const CHUNK: usize = 1 << 12;

const HOW_BITS: u32 = 2;
/// Milliseconds since the engine was opened: 34 years.
const AT_BITS: u32 = 40;
const AT_MASK: u64 = (1 << AT_BITS) - 1;
/// How often the ring has been filled, modulo this: it tells numbers apart that share a place.
const LAP_BITS: u32 = u64::BITS - AT_BITS - HOW_BITS;
const LAP_MASK: u64 = (1 << LAP_BITS) - 1;

/// The ends of an engine's reservations.
#[derive(Debug)]
pub(crate) struct Settled {
    generation: u64,
    opened: Timestamp,
    remembering: Remembering,
    /// The ring: those of this generation.
    chunks: Box<[OnceLock<Box<[AtomicU64]>>]>,
    forgotten_early: Striped,
    /// Those of earlier generations, and those that ended so late that another has their place.
    others: Remembered<ReservationId, Settlement>,
}

/// An end, in 8 bytes; never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct End {
    how: Settlement,
    /// Since the engine was opened.
    millis: u64,
    lap: u64,
}

impl End {
    fn pack(self) -> u64 {
        let Self { how, millis, lap } = self;
        u64::from(how.number()) | millis << HOW_BITS | lap << (AT_BITS + HOW_BITS)
    }

    fn unpack(word: u64) -> Option<Self> {
        let how = Settlement::from_number((word & ((1 << HOW_BITS) - 1)) as u8)?;
        let millis = (word >> HOW_BITS) & AT_MASK;
        Some(Self { how, millis, lap: word >> (AT_BITS + HOW_BITS) })
    }

    /// Whether it is of a later lap than `lap`.
    fn is_after(self, lap: u64) -> bool {
        let ahead = self.lap.wrapping_sub(lap) & LAP_MASK;
        (1..=LAP_MASK / 2).contains(&ahead)
    }
}

impl Settled {
    /// None yet. `open_max` reservations may be open at a time: with so many places more than are
    /// to be remembered, who loses a place is older than those.
    pub(crate) fn new(
        generation: u64,
        remembering: Remembering,
        open_max: usize,
        opened: Timestamp,
    ) -> Self {
        let places = remembering.max.saturating_add(open_max).max(CHUNK).next_power_of_two();
        Self {
            generation,
            opened,
            remembering,
            chunks: (0..places / CHUNK).map(|_| OnceLock::new()).collect(),
            forgotten_early: Striped::default(),
            others: Remembered::new(remembering),
        }
    }

    /// Where the end of a reservation has its place: the chunk, the place in it, and the lap.
    #[expect(clippy::cast_possible_truncation, reason = "masked")]
    fn place(&self, number: u64) -> (usize, usize, u64) {
        let places = (self.chunks.len() * CHUNK) as u64;
        let place = (number & (places - 1)) as usize;
        let lap = (number >> places.trailing_zeros()) & LAP_MASK;
        (place / CHUNK, place % CHUNK, lap)
    }

    /// Remembers an end.
    pub(crate) fn insert(&self, id: ReservationId, how: Settlement, at: Timestamp, now: Timestamp) {
        if id.generation != self.generation || !self.insert_in_place(id.number, how, at, now) {
            self.others.insert(id, how, at, now);
        }
    }

    /// `false` where a younger one has the place.
    fn insert_in_place(&self, number: u64, how: Settlement, at: Timestamp, now: Timestamp) -> bool {
        let (chunk, place, lap) = self.place(number);
        let chunk =
            self.chunks[chunk].get_or_init(|| (0..CHUNK).map(|_| AtomicU64::new(0)).collect());
        let millis = at.as_unix_millis().saturating_sub(self.opened.as_unix_millis());
        let end = End { how, millis: millis.min(AT_MASK), lap };
        // Relaxed, here and in `get`: who asks for it has found it no longer open, under the lock
        // under which it was closed after this.
        let mut known = chunk[place].load(Ordering::Relaxed);
        loop {
            let before = End::unpack(known);
            if before.is_some_and(|before| before.is_after(lap)) {
                return false;
            }
            let swapped = chunk[place].compare_exchange_weak(
                known,
                end.pack(),
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
            match swapped {
                Ok(_) => {
                    let is_lost = |before: End| before.lap != lap && !self.is_over(before, now);
                    if before.is_some_and(is_lost) {
                        self.forgotten_early.add_one();
                    }
                    return true;
                }
                Err(now) => known = now,
            }
        }
    }

    fn is_over(&self, end: End, now: Timestamp) -> bool {
        let at = self.opened.as_unix_millis().saturating_add(end.millis);
        self.remembering.is_over(Timestamp::from_unix_millis(at), now)
    }

    /// How a reservation ended, if that is not forgotten.
    pub(crate) fn get(&self, id: ReservationId, now: Timestamp) -> Option<Settlement> {
        if id.generation == self.generation {
            let (chunk, place, lap) = self.place(id.number);
            let word =
                self.chunks[chunk].get().map_or(0, |chunk| chunk[place].load(Ordering::Relaxed));
            if let Some(end) = End::unpack(word).filter(|end| end.lap == lap) {
                return (!self.is_over(end, now)).then_some(end.how);
            }
        }
        self.others.get(id, now)
    }

    /// How many were forgotten before their time, for want of room.
    pub(crate) fn forgotten_early(&self) -> u64 {
        self.forgotten_early.sum() + self.others.forgotten_early()
    }

    /// Forgets what is over, where that gives memory back.
    pub(crate) fn sweep(&self, now: Timestamp) {
        self.others.sweep(now);
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use std::time::Duration;

    use super::*;

    const GENERATION: u64 = 3;
    const WINDOW: u64 = 1000;

    fn at(millis: u64) -> Timestamp {
        Timestamp::from_unix_millis(1_000_000 + millis)
    }

    fn id(number: u64) -> ReservationId {
        ReservationId { generation: GENERATION, number }
    }

    /// As small as it gets: a ring of one chunk.
    fn settled() -> Settled {
        let window = Duration::from_millis(WINDOW);
        Settled::new(GENERATION, Remembering { window, max: 2 }, 2, at(0))
    }

    #[test]
    fn an_end_is_remembered_for_its_time_under_its_id_alone() {
        let settled = settled();
        let older = ReservationId { generation: 2, number: 7 };
        settled.insert(id(7), Settlement::Cancelled, at(5), at(5));
        assert_eq!(settled.get(id(7), at(4 + WINDOW)), Some(Settlement::Cancelled));
        assert_eq!(settled.get(id(7), at(5 + WINDOW)), None);
        for other in [older, id(6), id(8), id(7 + CHUNK as u64), id(u64::MAX)] {
            assert_eq!(settled.get(other, at(5)), None, "{other}");
        }
        settled.insert(older, Settlement::Expired, at(5), at(5));
        assert_eq!(settled.get(older, at(5)), Some(Settlement::Expired));
        assert_eq!(settled.get(id(7), at(5)), Some(Settlement::Cancelled));
        assert_eq!(settled.forgotten_early(), 0);
    }

    #[test]
    fn a_younger_one_takes_the_place_and_that_is_counted_unless_the_time_is_over() {
        let settled = settled();
        let [first, second, third] = [0, 1, 2].map(|lap| id(9 + lap * CHUNK as u64));
        settled.insert(first, Settlement::Committed, at(1), at(1));
        settled.insert(second, Settlement::Cancelled, at(2), at(2));
        assert_eq!(settled.get(first, at(2)), None);
        assert_eq!(settled.get(second, at(2)), Some(Settlement::Cancelled));
        assert_eq!(settled.forgotten_early(), 1);
        settled.insert(third, Settlement::Expired, at(2 + WINDOW), at(2 + WINDOW));
        assert_eq!(settled.forgotten_early(), 1);
    }

    /// One that was open for long ends when another has had its place since.
    #[test]
    fn one_that_ends_late_is_remembered_beside_the_younger() {
        let settled = settled();
        let (early, late) = (id(9), id(9 + CHUNK as u64));
        settled.insert(late, Settlement::Committed, at(1), at(1));
        settled.insert(early, Settlement::Cancelled, at(2), at(2));
        assert_eq!(settled.get(late, at(2)), Some(Settlement::Committed));
        assert_eq!(settled.get(early, at(2)), Some(Settlement::Cancelled));
        assert_eq!(settled.forgotten_early(), 0);
    }

    #[test]
    fn ends_of_all_times_and_laps_fit() {
        for how in [Settlement::Committed, Settlement::Cancelled, Settlement::Expired] {
            for millis in [0, 1, AT_MASK] {
                for lap in [0, 1, LAP_MASK] {
                    let end = End { how, millis, lap };
                    assert_eq!(End::unpack(end.pack()), Some(end));
                    let next = End { lap: (lap + 1) & LAP_MASK, ..end };
                    assert!(next.is_after(lap) && !end.is_after(lap) && !end.is_after(next.lap));
                }
            }
        }
        assert_eq!(End::unpack(0), None);
        // A clock that was set back, and one that was set far ahead.
        let settled = settled();
        settled.insert(id(1), Settlement::Committed, Timestamp::MIN, Timestamp::MIN);
        assert_eq!(settled.get(id(1), Timestamp::MIN), Some(Settlement::Committed));
        settled.insert(id(2), Settlement::Committed, Timestamp::MAX, Timestamp::MAX);
        assert_eq!(settled.get(id(2), at(0)), Some(Settlement::Committed));
    }

    /// With as many places more as reservations may be open, the newest that are to be remembered
    /// are there, whatever order they end in.
    #[test]
    fn of_the_newest_none_is_forgotten() {
        let (max, open_max) = (3000, 1000);
        let window = Duration::from_millis(WINDOW);
        let settled = Settled::new(GENERATION, Remembering { window, max }, open_max, at(0));
        let mut open = std::collections::VecDeque::new();
        let mut ended = Vec::new();
        for number in 1..20_000 {
            if open.len() == open_max {
                // The oldest, the newest, or one in between.
                let place = [0, open_max - 1, (number * 7919) % open_max][number % 3];
                let ends: u64 = open.remove(place).unwrap();
                settled.insert(id(ends), Settlement::Committed, at(1), at(1));
                ended.push(ends);
            }
            open.push_back(number as u64);
        }
        ended.sort_unstable();
        for &number in ended.iter().rev().take(max) {
            assert_eq!(settled.get(id(number), at(1)), Some(Settlement::Committed), "{number}");
        }
    }
}
