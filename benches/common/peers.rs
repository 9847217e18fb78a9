//! What tollgate is measured against, in memory: none of them keeps anything.

use std::hint::black_box;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crossbeam::utils::CachePadded;
use dashmap::DashMap;
use foldhash::fast::RandomState;
use governor::{DefaultKeyedRateLimiter, Quota as Rate, RateLimiter};

use super::passes::{Contestant, Part};

/// The baseline: the map that anyone would begin with, default hasher and shards.
#[derive(Debug, Default)]
pub(crate) struct BareMap {
    map: DashMap<(u64, u16), AtomicU64>,
}

impl BareMap {
    pub(crate) fn populated(users: u32) -> Self {
        let bare = Self::default();
        for user in 0..users {
            bare.map.insert((user.into(), 0), AtomicU64::new(0));
        }
        bare
    }

    #[inline]
    pub(crate) fn add(&self, user: u32) -> u64 {
        let counter = self.map.get(&(black_box(user).into(), 0)).expect("all users are there");
        // Relaxed: a count, nothing depends on it.
        counter.fetch_add(1, Ordering::Relaxed)
    }

    #[inline]
    pub(crate) fn load(&self, user: u32) -> u64 {
        let counter = self.map.get(&(black_box(user).into(), 0)).expect("all users are there");
        counter.load(Ordering::Relaxed)
    }
}

impl Contestant for BareMap {
    fn name(&self) -> &'static str {
        "bare map"
    }

    fn run(&self, part: &Part<'_>) -> u64 {
        part.users.iter().fold(0, |sum, &user| sum.wrapping_add(self.add(user)))
    }

    fn verify(&self, operations: u64) {
        let counted: u64 = self.map.iter().map(|entry| entry.load(Ordering::Relaxed)).sum();
        assert_eq!(counted, operations, "the bare map has counted every operation");
    }
}

/// The bare map, with the hasher and the number of shards that tollgate has: what of its cost they
/// are.
#[derive(Debug)]
pub(crate) struct TunedMap {
    map: DashMap<(u64, u16), AtomicU64, RandomState>,
}

impl TunedMap {
    /// As many as tollgate's by default.
    const SHARDS: usize = 1024;

    pub(crate) fn populated(users: u32) -> Self {
        let map = DashMap::with_hasher_and_shard_amount(RandomState::default(), Self::SHARDS);
        for user in 0..users {
            map.insert((user.into(), 0), AtomicU64::new(0));
        }
        Self { map }
    }
}

impl Contestant for TunedMap {
    fn name(&self) -> &'static str {
        "tuned map"
    }

    fn run(&self, part: &Part<'_>) -> u64 {
        let add = |user: u32| {
            let counter = self.map.get(&(black_box(user).into(), 0)).expect("all users are there");
            counter.fetch_add(1, Ordering::Relaxed)
        };
        part.users.iter().fold(0, |sum, &user| sum.wrapping_add(add(user)))
    }

    fn verify(&self, operations: u64) {
        let counted: u64 = self.map.iter().map(|entry| entry.load(Ordering::Relaxed)).sum();
        assert_eq!(counted, operations, "the tuned map has counted every operation");
    }
}

/// The baseline of a check: the bare map's `get`, and a load.
#[derive(Debug)]
pub(crate) struct BareGet(BareMap);

impl BareGet {
    pub(crate) fn populated(users: u32) -> Self {
        Self(BareMap::populated(users))
    }
}

impl Contestant for BareGet {
    fn name(&self) -> &'static str {
        "bare map's get"
    }

    fn run(&self, part: &Part<'_>) -> u64 {
        part.users.iter().fold(0, |sum, &user| sum.wrapping_add(self.0.load(user)))
    }

    fn verify(&self, _: u64) {
        self.0.verify(0);
    }
}

/// One word that all threads add to: what no exact shared count can beat without being split.
#[derive(Debug, Default)]
pub(crate) struct BareWord(CachePadded<AtomicU64>);

impl Contestant for BareWord {
    fn name(&self) -> &'static str {
        "bare fetch_add"
    }

    fn run(&self, part: &Part<'_>) -> u64 {
        part.users.iter().fold(0, |sum, user| {
            black_box(user);
            sum.wrapping_add(self.0.fetch_add(1, Ordering::Relaxed))
        })
    }

    fn verify(&self, operations: u64) {
        assert_eq!(self.0.load(Ordering::Relaxed), operations);
    }
}

type Limiter = DefaultKeyedRateLimiter<(u64, u16)>;

/// The governor crate's keyed limiter, in its default store, with a rate that is never reached.
pub(crate) struct Governor {
    limiter: Limiter,
    admitted: AtomicU64,
}

impl Governor {
    pub(crate) fn populated(users: u32) -> Self {
        let rate = NonZeroU32::new(1_000_000_000).expect("not 0");
        let limiter = RateLimiter::keyed(Rate::per_second(rate));
        let governor = Self { limiter, admitted: AtomicU64::new(0) };
        (0..users).for_each(|user| assert!(governor.admits(user)));
        governor
    }

    #[inline]
    pub(crate) fn admits(&self, user: u32) -> bool {
        admits(&self.limiter, user)
    }
}

impl Contestant for Governor {
    fn name(&self) -> &'static str {
        "governor"
    }

    fn run(&self, part: &Part<'_>) -> u64 {
        let admitted = part.users.iter().fold(0, |sum, &user| sum + u64::from(self.admits(user)));
        self.admitted.fetch_add(admitted, Ordering::Relaxed)
    }

    fn verify(&self, operations: u64) {
        assert_eq!(self.admitted.load(Ordering::Relaxed), operations, "governor admits all");
    }
}

/// [`Governor`], where users with odd numbers are let through once in ten years.
pub(crate) struct HalfGovernor {
    limiters: [Limiter; 2],
}

impl HalfGovernor {
    pub(crate) fn populated(users: u32) -> Self {
        let rate = NonZeroU32::new(1_000_000_000).expect("not 0");
        let decade = Duration::from_hours(24 * 3650);
        let rare = Rate::with_period(decade).expect("not 0");
        let open = RateLimiter::keyed(Rate::per_second(rate));
        let limiters = [open, RateLimiter::keyed(rare)];
        (0..users).for_each(|user| assert!(admits(&limiters[user as usize % 2], user)));
        Self { limiters }
    }
}

impl Contestant for HalfGovernor {
    fn name(&self) -> &'static str {
        "governor"
    }

    fn run(&self, part: &Part<'_>) -> u64 {
        let ask = |user: u32| u64::from(admits(&self.limiters[user as usize % 2], user));
        let admitted = part.users.iter().fold(0, |sum, &user| sum + ask(user));
        assert_eq!(admitted, part.users.iter().filter(|&user| user % 2 == 0).count() as u64);
        admitted
    }

    fn verify(&self, _: u64) {}
}

#[inline]
fn admits(limiter: &Limiter, user: u32) -> bool {
    limiter.check_key(&(black_box(user).into(), 0)).is_ok()
}
