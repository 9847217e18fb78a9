//! How reservations have ended, remembered for a while.
//!
//! Reservations are numbered as they are opened, so the number alone gives the place of a
//! reservation's end in a ring: 8 bytes, next to those of the reservations that the same thread
//! opened before and after it. A map would take several times the memory, and wait for it several
//! times.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam::utils::CachePadded;

use crate::admission::remembered::Remembered;
use crate::admission::reservations::{NUMBERS_IN_BLOCK, NUMBERS_IN_LAP};
use crate::ledger::{Remembering, Settlement};
use crate::model::{ReservationId, Timestamp};
use crate::prefetch;
use crate::stats::Striped;

/// This many places are allocated at a time. A multiple of the numbers after which the shards of
/// open reservations recur, so that numbers that share a place share a shard.
const CHUNK: usize = 1 << 12;
const _: () = assert!((CHUNK as u64).is_multiple_of(NUMBERS_IN_LAP));

/// When an end is stored, the place so much further on is asked for, a cache line ahead: it has
/// mostly left the caches since the ring was last there.
const AHEAD: usize = 8;
const _: () = assert!((AHEAD as u64) < NUMBERS_IN_BLOCK);

/// At most this many numbers are left out for a while: threads take them in blocks, and keep the
/// rest of their block while they open nothing.
const SKIPPED_MAX: u64 = 2048;
/// The newest number is known to within so many: whoever writes it down makes all others wait.
const NEWEST_STEP: u64 = 64;

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
    /// The number of its places is 2 to the power of this.
    places_log2: u32,
    /// The greatest number that has ended, or one not much below it.
    newest: CachePadded<AtomicU64>,
    /// Who ends when the newest number is further ahead than this is late: its place would be
    /// another's before as many have ended as are to be remembered.
    lag_max: u64,
    forgotten_early: Striped,
    /// Those of earlier generations, and those that ended late.
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
    /// None yet. `open_max` reservations may be open at a time.
    ///
    /// From when a number ends to when another takes its place at least `remembering.max` others
    /// end: all the numbers that lie between the newest of then and the one that takes the place,
    /// but for those that are open still, and those that are left out. For that the places are
    /// more than all three together by as many as a number may lag.
    pub(crate) fn new(
        generation: u64,
        remembering: Remembering,
        open_max: usize,
        opened: Timestamp,
    ) -> Self {
        let beside = (open_max as u64).saturating_add(SKIPPED_MAX);
        let needed = (remembering.max as u64).saturating_add(beside);
        let places = needed.saturating_add(beside).max(CHUNK as u64).next_power_of_two();
        let chunks = places / CHUNK as u64;
        Self {
            generation,
            opened,
            remembering,
            chunks: (0..chunks).map(|_| OnceLock::new()).collect(),
            places_log2: places.ilog2(),
            newest: CachePadded::default(),
            lag_max: places - needed,
            forgotten_early: Striped::default(),
            others: Remembered::new(remembering),
        }
    }

    /// Where the end of a reservation has its place: the chunk, the place in it, and the lap.
    #[expect(clippy::cast_possible_truncation, reason = "masked")]
    fn place(&self, number: u64) -> (usize, usize, u64) {
        let place = (number & ((1 << self.places_log2) - 1)) as usize;
        let lap = (number >> self.places_log2) & LAP_MASK;
        (place / CHUNK, place % CHUNK, lap)
    }

    /// Whether a number ends late. Counts it as ended.
    fn is_late(&self, number: u64) -> bool {
        // Relaxed: a bound, and whoever is a step behind it is allowed for.
        let mut newest = self.newest.load(Ordering::Relaxed);
        if number >= newest.saturating_add(NEWEST_STEP) {
            newest = self.newest.fetch_max(number, Ordering::Relaxed);
        }
        newest.saturating_sub(number) > self.lag_max - NEWEST_STEP
    }

    /// Remembers an end. The caller has the lock of the reservation's shard.
    #[inline]
    pub(crate) fn insert(&self, id: ReservationId, how: Settlement, at: Timestamp, now: Timestamp) {
        if id.generation != self.generation || !self.insert_in_place(id.number, how, at, now) {
            self.others.insert(id, how, at, now);
        }
    }

    /// `false` where it is late, a younger one has the place already, or the clock was set so far
    /// ahead since the engine was opened that a place can't hold it.
    #[inline(always)]
    fn insert_in_place(&self, number: u64, how: Settlement, at: Timestamp, now: Timestamp) -> bool {
        if self.is_late(number) {
            return false;
        }
        let millis = at.as_unix_millis().saturating_sub(self.opened.as_unix_millis());
        if millis > AT_MASK {
            return false;
        }
        let (chunk, place, lap) = self.place(number);
        let chunk =
            self.chunks[chunk].get_or_init(|| (0..CHUNK).map(|_| AtomicU64::new(0)).collect());
        let end = End { how, millis, lap };
        // Relaxed, here and in `get`: whoever asks for it has found it no longer open, under the
        // lock under which it was closed after this. Those that share a place share that lock.
        let before = End::unpack(chunk[place].load(Ordering::Relaxed));
        if before.is_some_and(|before| before.is_after(lap)) {
            return false;
        }
        chunk[place].store(end.pack(), Ordering::Relaxed);
        // In its block only: what lies behind that is mostly written by another thread.
        if number % NUMBERS_IN_BLOCK < NUMBERS_IN_BLOCK - AHEAD as u64 {
            prefetch::for_write(chunk.as_ptr().wrapping_add(place + AHEAD));
        }
        let is_lost = |before: End| before.lap != lap && !self.is_over(before, now);
        if before.is_some_and(is_lost) {
            self.forgotten_early.add_one();
        }
        true
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

    /// As small as it gets.
    fn settled() -> Settled {
        let window = Duration::from_millis(WINDOW);
        Settled::new(GENERATION, Remembering { window, max: 2 }, 2, at(0))
    }

    fn places(settled: &Settled) -> u64 {
        (settled.chunks.len() * CHUNK) as u64
    }

    /// Opened by a machine without a clock of its own, which then asked for the time: once, each
    /// end was forgotten at once, 34 years after the engine was opened.
    #[test]
    fn an_end_long_after_the_clock_of_the_open_is_remembered() {
        let settled = settled();
        let later = at(AT_MASK + 5);
        settled.insert(id(7), Settlement::Committed, later, later);
        assert_eq!(settled.get(id(7), later), Some(Settlement::Committed));
        assert_eq!(settled.get(id(7), at(AT_MASK + 5 + WINDOW)), None);
    }

    #[test]
    fn an_end_is_remembered_for_its_time_under_its_id_alone() {
        let settled = settled();
        let older = ReservationId { generation: 2, number: 7 };
        settled.insert(id(7), Settlement::Cancelled, at(5), at(5));
        assert_eq!(settled.get(id(7), at(4 + WINDOW)), Some(Settlement::Cancelled));
        assert_eq!(settled.get(id(7), at(5 + WINDOW)), None);
        for other in [older, id(6), id(8), id(7 + places(&settled)), id(u64::MAX)] {
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
        let [first, second, third] = [0, 1, 2].map(|lap| id(9 + lap * places(&settled)));
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
        let (early, late) = (id(9), id(9 + places(&settled)));
        settled.insert(late, Settlement::Committed, at(1), at(1));
        settled.insert(early, Settlement::Cancelled, at(2), at(2));
        assert_eq!(settled.get(late, at(2)), Some(Settlement::Committed));
        assert_eq!(settled.get(early, at(2)), Some(Settlement::Cancelled));
        assert_eq!(settled.forgotten_early(), 0);
    }

    /// It ends just before another takes its place: it was once forgotten then, though it was among
    /// the newest.
    #[test]
    fn the_end_of_a_long_one_is_not_forgotten_before_older_ones() {
        for lag in [0, 1, NEWEST_STEP, SKIPPED_MAX] {
            let settled = settled();
            let long = id(100);
            let successor = long.number + places(&settled);
            for number in 101..successor - lag {
                settled.insert(id(number), Settlement::Committed, at(1), at(1));
            }
            settled.insert(long, Settlement::Cancelled, at(2), at(2));
            settled.insert(id(successor), Settlement::Committed, at(3), at(3));
            assert_eq!(settled.get(long, at(3)), Some(Settlement::Cancelled), "{lag}");
            assert_eq!(settled.get(id(successor), at(3)), Some(Settlement::Committed), "{lag}");
            assert_eq!(settled.forgotten_early(), 0, "{lag}");
        }
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

    /// The last that ended are there, as many as are to be remembered, whatever order they end in.
    #[test]
    fn of_the_newest_none_is_forgotten() {
        let (max, open_max) = (3000, 1000);
        let window = Duration::from_millis(WINDOW);
        let settled = Settled::new(GENERATION, Remembering { window, max }, open_max, at(0));
        let mut open = std::collections::VecDeque::new();
        let mut ended = Vec::new();
        for number in 1..60_000 {
            if open.len() == open_max {
                // One of the newest, or one in between; the oldest stay open for long.
                let is_old = number % 64 == 0;
                let newest = open_max - 1 - number % 8;
                let place = if is_old { (number * 7919) % open_max } else { newest };
                let ends: u64 = open.remove(place).unwrap();
                settled.insert(id(ends), Settlement::Committed, at(1), at(1));
                ended.push(ends);
            }
            open.push_back(number as u64);
        }
        let (older, newest) = ended.split_at(ended.len() - max);
        let lag = |number: &u64| 60_000 - number;
        assert!(
            newest.iter().any(|number| lag(number) > places(&settled)),
            "none was open for long"
        );
        assert!(older.iter().any(|&number| settled.get(id(number), at(1)).is_none()));
        for &number in newest {
            assert_eq!(settled.get(id(number), at(1)), Some(Settlement::Committed), "{number}");
        }
    }
}
