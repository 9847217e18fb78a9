//! All lanes, and which one a thread takes.

use crate::seats::{Place, Seat, Seats, thread_hint};
use crate::sync::{AtomicBool, Mutex, Ordering};
use crate::wal::lane::{CLOSE_ATTEMPTS, Lane, Permit, Refusal, Then};

/// A lane's place among the lanes.
pub(crate) type LaneIndex = usize;

/// How often all lanes are tried before the thread lets others run.
const SPINS: u32 = 8;

/// How often all lanes are tried before it counts as a lack of room: a lane that is held for so
/// long was abandoned, or its holder was not given a processor. The caller then waits up to its
/// deadline.
const ROUNDS_MAX: u32 = if cfg!(loom) { 12 } else { 1000 };

/// How often all lanes are tried before another thread's is taken over or shared although there is
/// one that nobody keeps: that one has no room, or somebody is in it, which mostly passes soon.
const PATIENCE: u32 = if cfg!(loom) { 4 } else { 500 };

/// Makes this thread try that lane first, for tests that have one thread.
#[cfg(all(test, not(loom)))]
pub(crate) fn prefer(lane: LaneIndex) {
    Place::prefer(lane);
}

/// The lanes of an engine. All exist from open on.
#[derive(Debug)]
pub(crate) struct Lanes {
    lanes: Box<[Lane]>,
    seats: Seats,
    /// Numbers below the lanes' tails that no record has had: from before the lanes were made, and
    /// what they have skipped.
    unused_numbers: Mutex<u64>,
    closed: AtomicBool,
}

/// What a thread that found no lane free may do with those that other threads keep.
#[derive(Debug, Clone, Copy)]
struct Claim {
    /// There is another for whose it was: the thread's own, or one that nobody keeps, which has no
    /// room now.
    takes_over: bool,
    may_share: bool,
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
        let seats = Seats::new();
        if !seats.has_barrier() {
            lanes.iter().for_each(Lane::share);
        }
        let unused_numbers = Mutex::new(lanes.iter().map(Lane::tail).sum());
        let closed = AtomicBool::new(false);
        Self { lanes: lanes.into_boxed_slice(), seats, unused_numbers, closed }
    }

    /// How many records were written so far. Never goes back.
    pub(crate) fn records(&self) -> u64 {
        let unused_numbers = self.unused_numbers.lock();
        let tails: u64 = self.lanes.iter().map(Lane::tail).sum();
        tails - *unused_numbers
    }

    /// Makes a lane go on at the start of its ring, if nobody is in it: from which record on, and
    /// with which. Only the drainer does this.
    pub(crate) fn skip(&self, lane: &Lane) -> Option<(u64, u64)> {
        // Until it is published: whoever counts records sees both or neither.
        let mut unused_numbers = self.unused_numbers.lock();
        let mut permit = self.borrow(lane)?;
        let (from, to) = (permit.next(), permit.skip());
        *unused_numbers += to - from;
        lane.note_skip(from, to);
        drop(permit);
        Some((from, to))
    }

    /// Takes the thread's own lane for one record, if it has one, and it was seen to have room.
    /// Nothing in it is a call, around which callers would have to keep what they know.
    #[inline(always)]
    pub(crate) fn try_own(&self) -> Option<Permit<'_>> {
        let place = Place::of_thread();
        let lane = self.lanes.get(place.lane)?;
        lane.try_enter_at_once(self.seats.get(place.seat)?, 1)
    }

    /// Whether the lane that the thread prefers is shared.
    #[inline]
    pub(crate) fn prefers_shared(&self) -> bool {
        self.lanes.get(Place::of_thread().lane).is_some_and(Lane::is_shared)
    }

    /// Takes the shared lane that the thread prefers for one record, if it is free and has room.
    #[inline]
    pub(crate) fn try_preferred_shared(&self) -> Option<Permit<'_>> {
        self.try_shared(self.lanes.get(Place::of_thread().lane)?, 1)
    }

    /// Takes the thread's own lane for this many records, or the shared one that it prefers, if it
    /// is free and has room.
    #[inline(always)]
    pub(crate) fn try_preferred_for(&self, slots: u64) -> Option<Permit<'_>> {
        let place = Place::of_thread();
        let lane = self.lanes.get(place.lane)?;
        match self.seats.get(place.seat).map(|seat| lane.try_enter(seat, slots)) {
            Some(Ok(permit)) => Some(permit),
            _ => self.try_shared(lane, slots),
        }
    }

    #[cold]
    fn try_shared<'a>(&self, lane: &'a Lane, slots: u64) -> Option<Permit<'a>> {
        if !lane.is_shared() {
            return None;
        }
        lane.try_lock(slots).ok().and_then(|permit| self.unless_closed(permit).ok())
    }

    /// Leaves a lane that was held while the others were closed, or is about to be closed.
    fn unless_closed<'a>(&self, permit: Permit<'a>) -> Result<Permit<'a>, NoLane> {
        // Acquire: as in `acquire_other`.
        if self.closed.load(Ordering::Acquire) { Err(NoLane::Closed) } else { Ok(permit) }
    }

    /// Takes a lane with room for `slots` records: the thread's own, or the next that is free.
    /// Waits for no lane in particular, and not for long: a holder does nothing that waits.
    #[inline]
    pub(crate) fn acquire(&self, slots: u64) -> Result<(LaneIndex, Permit<'_>), NoLane> {
        let place = Place::of_thread();
        if let Some(lane) = self.lanes.get(place.lane) {
            match self.seats.get(place.seat) {
                Some(seat) if !lane.is_shared() => {
                    if let Ok(permit) = lane.try_enter(seat, slots) {
                        return Ok((place.lane, permit));
                    }
                }
                _ => {
                    if let Ok(permit) = lane.try_lock(slots) {
                        return Ok((place.lane, self.unless_closed(permit)?));
                    }
                }
            }
        }
        self.acquire_other(slots, place.lane)
    }

    #[cold]
    fn acquire_other(
        &self,
        slots: u64,
        preferred: LaneIndex,
    ) -> Result<(LaneIndex, Permit<'_>), NoLane> {
        let count = self.lanes.len();
        let seat = self.seats.get(Place::sit_down());
        // Maybe that of a thread that has ended, and sat here before.
        let own = self.lanes.iter().position(|lane| seat.is_some_and(|seat| lane.is_of(seat)));
        let start = match (preferred, own) {
            (LaneIndex::MAX, Some(own)) => own,
            (LaneIndex::MAX, None) => thread_hint(),
            (preferred, _) => preferred,
        };
        let mut rounds = 0_u32;
        loop {
            // Acquire: pairs with the Release in `close`. Only looked at when a lane was refused,
            // or is shared: a closed lane is locked, if nobody was in it then.
            if self.closed.load(Ordering::Acquire) {
                return Err(NoLane::Closed);
            }
            let mut full = 0;
            let mut spare = self.lanes.iter().filter(|lane| !lane.is_kept()).peekable();
            let may_share = rounds >= PATIENCE || spare.peek().is_none();
            let is_left_a_lane = rounds >= PATIENCE && spare.any(|lane| lane.lacks_room(slots));
            let takes_over = own.is_some() || is_left_a_lane;
            let claim = Claim { takes_over, may_share };
            for offset in 0..count {
                let index = (start % count + offset) % count;
                match self.try_take(&self.lanes[index], slots, seat, rounds, claim) {
                    Ok(permit) => {
                        let permit = self.unless_closed(permit)?;
                        return Ok((index, self.settle(index, permit, seat)));
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

    /// Makes the lane the thread's own, if it is nobody's now, in place of any that it had before.
    fn settle<'a>(
        &'a self,
        index: LaneIndex,
        permit: Permit<'a>,
        seat: Option<Seat<'a>>,
    ) -> Permit<'a> {
        Place::prefer(index);
        let Some(seat) = seat else { return permit };
        for (other, lane) in self.lanes.iter().enumerate() {
            if other != index && lane.is_of(seat) {
                lane.give_up(seat);
            }
        }
        permit.keep_for(seat)
    }

    /// Takes this lane: the thread's own, or one that is free. After a round without any of these,
    /// one that is another thread's own: to keep it, where a full one is left to the other, or the
    /// other is gone; otherwise all share it from then on.
    fn try_take<'a>(
        &'a self,
        lane: &'a Lane,
        slots: u64,
        seat: Option<Seat<'a>>,
        rounds: u32,
        claim: Claim,
    ) -> Result<Permit<'a>, Refusal> {
        if lane.lacks_room(slots) {
            return Err(Refusal::Full);
        }
        match lane.owner() {
            None => lane.try_lock(slots),
            Some(owner) => match seat.filter(|seat| seat.number == owner) {
                Some(seat) => lane.try_enter(seat, slots),
                None if rounds == 0 => Err(Refusal::Busy),
                None if claim.takes_over || !Seats::is_taken(owner) => {
                    lane.take_away(&self.seats, Then::Nobodys, slots)
                }
                None if claim.may_share => lane.take_away(&self.seats, Then::Shared, slots),
                None => Err(Refusal::Busy),
            },
        }
    }

    /// Takes a lane for a moment, whosever it is, with room for one record.
    pub(crate) fn borrow<'a>(&self, lane: &'a Lane) -> Option<Permit<'a>> {
        lane.take_away(&self.seats, Then::Nobodys, 1).ok()
    }

    /// Takes all lanes for good: no operation will begin. Whether none is in the middle of an
    /// append: a thread that was stopped there ends it when it goes on.
    pub(crate) fn close(&self) -> bool {
        self.close_within(CLOSE_ATTEMPTS)
    }

    fn close_within(&self, attempts: u32) -> bool {
        // Release: pairs with the Acquire in `acquire_other` and `unless_closed`.
        self.closed.store(true, Ordering::Release);
        let take = |lane: &Lane| {
            // Who took it before may hold it for longer than it is waited for, and then keep it.
            lane.refuse_to_be_kept();
            lane.take_away(&self.seats, Then::Closed, 0).map(Permit::keep)
        };
        let mut is_quiet = true;
        for lane in &self.lanes {
            let owner = lane.owner();
            let mut attempts = 0..attempts;
            let is_taken =
                attempts.any(|_| take(lane).inspect_err(|_| crate::sync::yield_now()).is_ok());
            // An owner who leaves it after the first attempt leaves it locked, for good.
            let owner = owner.and_then(|owner| self.seats.get(owner));
            is_quiet &= is_taken || owner.is_some_and(|owner| !lane.is_entered_by(owner));
        }
        is_quiet
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
    use crate::model::{QuotaId, WindowStart};
    use crate::sync::AtomicU64;
    use crate::wal::record::{Record, SLOT_WORDS, Seal};
    use crate::wal::region::{Region, SLOTS_AT, Slots};

    fn full_lane() -> Lane {
        let words = (0..SLOTS_AT + 2 * SLOT_WORDS).map(|_| AtomicU64::new(0)).collect();
        let Some(slots) = Slots::new(Region::heap(words), 2) else { panic!("words for two") };
        let lane = Lane::new(slots, 0, Seal::sure(1));
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

    fn lane_of(capacity: usize) -> Lane {
        let words = (0..SLOTS_AT + capacity * SLOT_WORDS).map(|_| AtomicU64::new(0)).collect();
        let slots = Slots::new(Region::heap(words), capacity as u64);
        let Some(slots) = slots else { panic!("words for all") };
        Lane::new(slots, 0, Seal::sure(1))
    }

    /// Appends so many records, to whichever lane.
    fn append(lanes: &Lanes, count: usize) {
        use crate::model::{QuotaId, WindowStart};
        use crate::wal::record::Record;
        let record = Record { user: 1, quota: QuotaId(1), window: WindowStart(0), delta: 1 };
        for _ in 0..count {
            loop {
                if let Ok((_, mut permit)) = lanes.acquire(1) {
                    permit.append(&record);
                    break;
                }
            }
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_lane_is_kept_by_a_thread_and_lent_for_a_moment() {
        let lanes = Lanes::new(vec![lane_of(64)]);
        let lane = lanes.get(0).expect("one lane");
        append(&lanes, 1);
        let mine = lane.owner();
        assert_eq!(mine, Some(Place::sit_down()));
        assert!(lanes.try_own().is_some() && lane.try_lock(1).is_err());
        drop(lanes.borrow(lane).expect("its owner is outside"));
        assert_eq!(lane.owner(), None);
        assert!(lanes.try_own().is_none(), "it has to be taken again");
        append(&lanes, 1);
        assert_eq!((lane.owner(), lane.tail()), (mine, 2));
        // An owner that is inside is not disturbed.
        let inside = lanes.try_own().expect("it is free");
        assert!(std::thread::scope(|scope| scope
            .spawn(|| lanes.borrow(lane).is_none())
            .join()
            .expect("no panic")));
        drop(inside);
        assert_eq!(lane.owner(), mine);
    }

    /// It used to go on through whichever lane had room, by the slow way each time, while its own
    /// was full.
    #[test]
    #[cfg(target_os = "linux")]
    fn a_thread_whose_lane_is_full_goes_on_in_another() {
        let lanes = Lanes::new(vec![lane_of(4), lane_of(4)]);
        append(&lanes, 4);
        let [first, second] = [0, 1].map(|index| lanes.get(index).expect("two lanes"));
        let (full, other) = if first.tail() == 4 { (first, second) } else { (second, first) };
        assert_eq!(full.owner(), Some(Place::sit_down()));
        append(&lanes, 1);
        assert_eq!((full.owner(), other.owner()), (None, Some(Place::sit_down())));
        assert!(lanes.try_own().is_some(), "by the fast path from then on");
        full.free(4);
        assert!(full.try_lock(1).is_ok(), "it is for whoever wants it");
        // The lane of another thread, where there is no other room; that one is not shared for it.
        append(&lanes, 3);
        full.free(0);
        let (taken, done) = (std::sync::Barrier::new(2), std::sync::Barrier::new(2));
        let theirs = std::thread::scope(|scope| {
            let (taken, done, lanes) = (&taken, &done, &lanes);
            scope.spawn(move || {
                full.free(4);
                append(lanes, 1);
                taken.wait();
                done.wait();
            });
            taken.wait();
            let theirs = full.owner();
            append(lanes, 1);
            done.wait();
            theirs
        });
        assert!(theirs.is_some_and(|theirs| theirs != Place::sit_down()));
        assert_eq!((full.owner(), full.tail()), (Some(Place::sit_down()), 6));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn the_lane_of_a_thread_that_has_ended_goes_to_another() {
        let lanes = Lanes::new(vec![lane_of(64)]);
        let lane = lanes.get(0).expect("one lane");
        // While this thread is there, so that the other's seat is not this one's.
        let mine = Place::sit_down();
        std::thread::scope(|scope| scope.spawn(|| append(&lanes, 1)).join().expect("no panic"));
        assert_ne!(lane.owner(), Some(mine));
        append(&lanes, 1);
        assert_eq!((lane.owner(), lane.is_shared()), (Some(mine), false));
    }

    /// The drainer was in the one lane that nobody kept, for a moment: another thread's was shared
    /// for good, and each operation of both was dearer from then on.
    #[test]
    #[cfg(target_os = "linux")]
    fn a_thread_waits_for_a_lane_that_nobody_keeps_before_it_shares_another() {
        let is_left_alone = || {
            let lanes = Lanes::new(vec![lane_of(64), lane_of(64)]);
            let (lanes, begun) = (&lanes, &AtomicBool::new(false));
            let kept = &std::sync::Barrier::new(2);
            std::thread::scope(|scope| {
                let (done, is_done) = std::sync::mpsc::channel::<()>();
                scope.spawn(move || {
                    append(lanes, 1);
                    kept.wait();
                    is_done.recv().expect_err("nothing is sent");
                });
                kept.wait();
                let free = lanes.iter().find(|lane| lane.owner().is_none()).expect("one of two");
                let borrowed = lanes.borrow(free).expect("nobody else is there");
                scope.spawn(move || {
                    while !begun.load(Ordering::Acquire) {
                        std::hint::spin_loop();
                    }
                    std::thread::sleep(std::time::Duration::from_micros(20));
                    drop(borrowed);
                });
                begun.store(true, Ordering::Release);
                append(lanes, 1);
                drop(done);
            });
            lanes.iter().all(|lane| !lane.is_shared())
        };
        // Whoever holds the lane may not be given a processor for longer than it is waited for.
        assert!((0..20).any(|_| is_left_alone()));
    }

    /// It used to take the next lane where its predecessor's, with the same seat, was its own: in
    /// time few threads kept all lanes, and another had to share one.
    #[test]
    fn nobody_keeps_two_lanes() {
        let lanes = Lanes::new((0..8).map(|_| lane_of(64)).collect());
        for _ in 0..20 {
            std::thread::scope(|scope| {
                scope.spawn(|| append(&lanes, 1));
                scope.spawn(|| append(&lanes, 1));
            });
        }
        let mut owners: Vec<_> = lanes.iter().filter_map(Lane::owner).collect();
        let count = owners.len();
        owners.sort_unstable();
        owners.dedup();
        assert_eq!(owners.len(), count);
    }

    /// There are as many lanes as threads: none has to be shared because one has no room now.
    #[test]
    #[cfg(target_os = "linux")]
    fn where_a_full_lane_is_left_another_is_taken_over_and_not_shared() {
        let lanes = Lanes::new(vec![lane_of(4), lane_of(4)]);
        let (lanes, kept) = (&lanes, &std::sync::Barrier::new(2));
        std::thread::scope(|scope| {
            let (done, is_done) = std::sync::mpsc::channel::<()>();
            scope.spawn(move || {
                append(lanes, 5);
                kept.wait();
                is_done.recv().expect_err("nothing is sent");
            });
            kept.wait();
            append(lanes, 1);
            drop(done);
        });
        let by_tail = |tail| lanes.iter().find(|lane| lane.tail() == tail).expect("one of two");
        assert_eq!((by_tail(4).owner(), by_tail(2).owner()), (None, Some(Place::sit_down())));
        assert!(lanes.iter().all(|lane| !lane.is_shared()));
    }

    #[test]
    fn more_threads_than_lanes_lose_no_record() {
        const EACH: usize = 20_000;
        let lanes = Lanes::new(vec![lane_of(1 << 17), lane_of(1 << 17)]);
        std::thread::scope(|scope| {
            for _ in 0..5 {
                scope.spawn(|| append(&lanes, EACH));
            }
            for _ in 0..2000 {
                for lane in lanes.iter() {
                    drop(lanes.borrow(lane));
                }
            }
        });
        let verified = |lane: &Lane| {
            let tail = lane.tail();
            assert!((0..tail).all(|number| lane.read(number).is_some()));
            tail
        };
        assert_eq!(lanes.iter().map(verified).sum::<u64>(), 5 * EACH as u64);
    }

    /// A skip leaves a lane beyond its room until a batch names it. Closing tried it as if it were
    /// held, gave up, and left it open.
    #[test]
    fn a_lane_that_skipped_beyond_its_room_is_closed_all_the_same() {
        let lanes = Lanes::new(vec![lane_of(2)]);
        let lane = lanes.get(0).expect("one lane");
        lane.share();
        let record = Record { user: 1, quota: QuotaId(1), window: WindowStart(0), delta: 1 };
        for freed in [0, 1] {
            lane.free(freed);
            let (_, mut permit) = lanes.acquire(1).expect("there is room");
            permit.append(&record);
        }
        let mut permit = lanes.borrow(lane).expect("nobody holds it");
        assert_eq!(permit.skip(), 4);
        drop(permit);
        lanes.close();
        // The batch that names the skip.
        lane.free(4);
        assert!(lanes.try_own().is_none());
        assert_eq!(lanes.acquire(1).map(|_| ()), Err(NoLane::Closed));
    }

    /// A thread that had taken a lane just before the close made it its own afterwards, and each of
    /// its later operations was counted.
    #[test]
    fn a_lane_that_was_taken_before_the_close_is_not_kept_after_it() {
        let lanes = Lanes::new(vec![lane_of(64)]);
        let seat = lanes.seats.get(Place::sit_down());
        let held = lanes.get(0).and_then(|lane| lane.try_lock(1).ok()).expect("nobody holds it");
        assert!(!lanes.close_within(10), "somebody is in it");
        drop(lanes.settle(0, held, seat));
        assert!(lanes.try_own().is_none());
        assert_eq!(lanes.acquire(1).map(|_| ()), Err(NoLane::Closed));
    }
}
