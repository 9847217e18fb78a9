//! What was read from the lanes since the last batch, to be summed when the next one is made.
//!
//! Deltas are stored one after the other. At the end they are added up in a row with a place for
//! each user, where the users of a group lie close together: their places do not depend on each
//! other, so a processor fetches many at once. Otherwise they are sorted, in a few sequential
//! passes over memory. A hash table of sums would wait for memory at each delta, once there are
//! more counters than the processor's nearest caches hold.

use std::collections::HashMap;
use std::ops::RangeInclusive;

use foldhash::fast::RandomState;

use crate::codec::{GROUP_BYTES_MAX, put_group, varint_bytes};
use crate::fold::{SumKey, sort};

/// Room for this many deltas of a group is kept from batch to batch, however few there are.
const KEPT_MIN: usize = 1 << 10;
/// More room is kept if it is no more than this many times what was needed.
const KEPT_TIMES: usize = 8;

/// A row of sums has at most this many places for each delta.
const ROW_PLACES: usize = 4;

/// Deltas, by quota and window.
#[derive(Debug, Default)]
pub(super) struct Tally {
    groups: Vec<Group>,
    /// Which group is that of a quota and window, in one word as [`SumKey::place`] has them.
    by_place: HashMap<u64, usize, RandomState>,
    /// The group of the last delta: mostly that of the next one, too.
    last: usize,
    /// What all groups but that one take, see [`bytes_max`](Self::bytes_max).
    others_bytes_max: usize,
    /// Kept for its memory.
    rows: Rows,
}

/// The deltas of one quota and window.
#[derive(Debug)]
struct Group {
    place: u64,
    deltas: Vec<Delta>,
    /// All bits of their users and, as they are written, of their amounts: none is longer. Where
    /// most are much shorter, a batch is taken for larger than it is, and ends sooner.
    users: u64,
    amounts: u64,
}

#[derive(Debug, Clone, Copy)]
struct Delta {
    user: u64,
    amount: i64,
}

impl Delta {
    /// As it is written.
    #[inline]
    fn zigzag(amount: i64) -> u64 {
        ((amount << 1) ^ (amount >> 63)).cast_unsigned()
    }
}

impl Group {
    fn new(place: u64) -> Self {
        Self { place, deltas: Vec::new(), users: 0, amounts: 0 }
    }

    #[inline(always)]
    fn add(&mut self, user: u64, amount: i64) {
        // Often it is of the same counter: what a commit gives back and what it charges, and before
        // these what was reserved.
        if let Some(last) = self.deltas.last_mut()
            && last.user == user
            && let Some(sum) = last.amount.checked_add(amount)
        {
            last.amount = sum;
            self.amounts |= Delta::zigzag(sum);
            return;
        }
        self.deltas.push(Delta { user, amount });
        self.users |= user;
        self.amounts |= Delta::zigzag(amount);
    }

    /// How much of a batch it takes at most: what is written of a user is no more than the user,
    /// and a sum takes no more bytes than its parts.
    fn bytes_max(&self) -> usize {
        match self.deltas.len() {
            0 => 0,
            deltas => {
                let bytes_each = varint_bytes(self.users) + varint_bytes(self.amounts);
                GROUP_BYTES_MAX + deltas * bytes_each
            }
        }
    }

    /// Takes the deltas out, and keeps no more room than what they needed makes likely.
    fn clear(&mut self) {
        self.deltas.shrink_to((self.deltas.len() * KEPT_TIMES).max(KEPT_MIN));
        self.deltas.clear();
        *self = Self { deltas: std::mem::take(&mut self.deltas), ..Self::new(self.place) };
    }
}

impl Tally {
    #[inline(always)]
    pub(super) fn add(&mut self, key: SumKey, amount: i64) {
        let place = key.place();
        if self.groups.get(self.last).is_none_or(|group| group.place != place) {
            self.turn_to(place);
        }
        self.groups[self.last].add(key.user, amount);
    }

    /// Makes the group of a place the last.
    #[cold]
    fn turn_to(&mut self, place: u64) {
        self.others_bytes_max += self.last_bytes_max();
        self.last = *self.by_place.entry(place).or_insert_with(|| {
            self.groups.push(Group::new(place));
            self.groups.len() - 1
        });
        self.others_bytes_max -= self.last_bytes_max();
    }

    fn last_bytes_max(&self) -> usize {
        self.groups.get(self.last).map_or(0, Group::bytes_max)
    }

    /// The sums take no more bytes of a batch than that, see [`put_sums`](crate::codec::put_sums).
    pub(super) fn bytes_max(&self) -> usize {
        self.others_bytes_max + self.last_bytes_max()
    }

    /// Takes the sums out and writes them as a batch has them, in place of what is in the buffer.
    /// Sums of zero are kept: that something happened in a window is part of the state.
    pub(super) fn drain_into(&mut self, out: &mut Vec<u8>) {
        out.clear();
        // Windows end: what had nothing this time may never have again.
        self.groups.retain(|group| !group.deltas.is_empty());
        self.groups.sort_unstable_by_key(|group| group.place);
        for group in &mut self.groups {
            if !self.rows.put_sums(out, group.place, &group.deltas) {
                put_sorted(out, group.place, &mut group.deltas);
            }
            group.clear();
        }
        self.rows.clear();
        let places = self.groups.iter().enumerate();
        self.by_place = places.map(|(group, of)| (of.place, group)).collect();
        self.others_bytes_max = 0;
    }
}

/// Sums deltas up by sorting them.
fn put_sorted(out: &mut Vec<u8>, place: u64, deltas: &mut [Delta]) {
    sort(deltas, |delta| delta.user);
    let runs = deltas.chunk_by(|a, b| a.user == b.user);
    let sums = runs.clone().filter_map(|run| {
        let sum: i128 = run.iter().map(|delta| i128::from(delta.amount)).sum();
        run.first().map(|delta| (delta.user, sum))
    });
    put_group(out, place, runs.count(), sums);
}

/// Two rows to add deltas up in: one takes half the memory of the other, and mostly will do.
#[derive(Debug, Default)]
struct Rows {
    narrow: Row<i32>,
    wide: Row<i64>,
}

impl Rows {
    /// Writes the sums of deltas, if the users lie so close together that a row of all of them is
    /// worth it. Otherwise, and where a sum is above 64 bits, nothing.
    fn put_sums(&mut self, out: &mut Vec<u8>, place: u64, deltas: &[Delta]) -> bool {
        let bounds = |(first, last): (u64, u64), delta: &Delta| {
            (first.min(delta.user), last.max(delta.user))
        };
        let (first, last) = deltas.iter().fold((u64::MAX, 0), bounds);
        let span = usize::try_from(last.saturating_sub(first)).unwrap_or(usize::MAX);
        if span >= deltas.len() * ROW_PLACES {
            return false;
        }
        self.narrow.put_sums(out, place, first..=last, deltas)
            || self.wide.put_sums(out, place, first..=last, deltas)
    }

    fn clear(&mut self) {
        self.narrow.clear();
        self.wide.clear();
    }
}

/// A sum for each user from the first to the last of a group.
#[derive(Debug, Default)]
struct Row<T> {
    sums: Vec<T>,
    /// How long it was since it was cleared.
    longest: usize,
}

impl<T: Place> Row<T> {
    /// Writes the sums of deltas of these users, if all are within bounds; otherwise nothing.
    fn put_sums(
        &mut self,
        out: &mut Vec<u8>,
        place: u64,
        users: RangeInclusive<u64>,
        deltas: &[Delta],
    ) -> bool {
        let first = *users.start();
        #[expect(clippy::cast_possible_truncation, reason = "64-bit platforms only")]
        let index = |user: u64| (user - first) as usize;
        let len = index(*users.end()) + 1;
        self.longest = self.longest.max(len);
        self.sums.clear();
        self.sums.resize(len, T::NONE);
        for &Delta { user, amount } in deltas {
            let sum = &mut self.sums[index(user)];
            match sum.plus(amount) {
                Some(after) => *sum = after,
                None => return false,
            }
        }
        let sums = users.zip(self.sums.iter().copied()).filter(|&(_, sum)| sum != T::NONE);
        put_group(out, place, sums.clone().count(), sums);
        true
    }

    /// Empties it, and keeps no more room than it needed lately.
    fn clear(&mut self) {
        self.sums.clear();
        self.sums.shrink_to((self.longest * KEPT_TIMES).max(KEPT_MIN));
        self.longest = 0;
    }
}

/// A sum in a row.
trait Place: Copy + Default + PartialEq + Into<i128> {
    /// Of a user who has no delta. No sum is this.
    const NONE: Self;

    /// The number with an amount more, if it is within the bounds.
    fn checked_plus(self, amount: i64) -> Option<Self>;

    /// The sum with an amount more, if it is within the bounds.
    #[inline(always)]
    fn plus(self, amount: i64) -> Option<Self> {
        let before = if self == Self::NONE { Self::default() } else { self };
        before.checked_plus(amount).filter(|&after| after != Self::NONE)
    }
}

impl Place for i32 {
    const NONE: Self = Self::MIN;

    #[inline(always)]
    fn checked_plus(self, amount: i64) -> Option<Self> {
        Self::try_from(amount).ok()?.checked_add(self)
    }
}

impl Place for i64 {
    const NONE: Self = Self::MIN;

    #[inline(always)]
    fn checked_plus(self, amount: i64) -> Option<Self> {
        self.checked_add(amount)
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::codec::Sums;
    use crate::model::{QuotaId, WindowStart};

    /// Of users anywhere, or that lie close together.
    fn any_key(is_close: bool) -> impl Strategy<Value = SumKey> {
        let close = prop_oneof![0..4_u64, 0..600_u64].prop_map(|user| u64::MAX - user);
        let user = prop_oneof![0..4_u64, 0..5000_u64, any::<u64>(), Just(u64::MAX)];
        let user = if is_close { close.boxed() } else { user.boxed() };
        let window = prop_oneof![Just(0), Just(86_400_000), Just(WindowStart::MAX.0)];
        let quota = prop_oneof![0..3_u16, Just(u16::MAX)];
        (quota, window, user).prop_map(|(quota, window, user)| SumKey {
            quota: QuotaId::from_u16(quota),
            window: WindowStart(window),
            user,
        })
    }

    /// Small ones, and those of which a few are above 32 bits, or 64.
    fn any_amount(is_small: bool) -> impl Strategy<Value = i64> {
        let edges = prop_oneof![Just(i64::from(i32::MIN)), Just(i64::from(i32::MAX))];
        let any = prop_oneof![any::<i64>(), Just(i64::MIN), Just(i64::MAX)];
        let small = prop_oneof![98 => -100..100_i64, 1 => edges];
        if is_small { small.boxed() } else { prop_oneof![small, any].boxed() }
    }

    fn any_deltas() -> impl Strategy<Value = Vec<(SumKey, i64)>> {
        any::<(bool, bool)>().prop_flat_map(|(is_close, is_small)| {
            let delta = (any_key(is_close), any_amount(is_small));
            proptest::collection::vec(delta, 0..3000)
        })
    }

    proptest! {
        #[test]
        fn a_tally_sums_as_a_map_does(
            batches in proptest::collection::vec(any_deltas(), 1..4),
        ) {
            let mut tally = Tally::default();
            let mut bytes = Vec::new();
            for deltas in batches {
                let mut expected = BTreeMap::<_, i128>::new();
                for (key, amount) in deltas {
                    *expected.entry(key).or_default() += i128::from(amount);
                    tally.add(key, amount);
                }
                let bytes_max = tally.bytes_max();
                tally.drain_into(&mut bytes);
                let sums = Sums::new(&bytes).map(|sum| sum.map(|sum| (sum.key, sum.amount)));
                prop_assert_eq!(sums.collect::<Result<Vec<_>, _>>(), Ok(expected.into_iter().collect()));
                prop_assert!(bytes.len() <= bytes_max, "{} > {bytes_max}", bytes.len());
                // What is kept for the next batch takes nothing of it.
                prop_assert_eq!(tally.bytes_max(), 0);
            }
        }
    }

    /// Where each is longer than those before, in its user or in its amount.
    #[test]
    fn no_more_is_written_than_was_measured() {
        for (user_shift, amount_shift) in [(1, 0), (0, 1), (1, 1)] {
            let mut tally = Tally::default();
            let mut bytes = Vec::new();
            for step in 0..62_u64 {
                let (quota, window) = (QuotaId::from_u16(1), WindowStart(0));
                let user = (1 << (step * user_shift)) + step * (1 - user_shift);
                tally.add(SumKey { quota, window, user }, 1 << (step * amount_shift));
            }
            let bytes_max = tally.bytes_max();
            tally.drain_into(&mut bytes);
            assert!(bytes.len() <= bytes_max, "{} > {bytes_max}", bytes.len());
        }
    }

    #[test]
    fn what_follows_of_a_user_is_measured_with_what_it_adds_up_to() {
        let (mut tally, mut bytes) = (Tally::default(), Vec::new());
        let (quota, window) = (QuotaId::from_u16(1), WindowStart(0));
        for user in 0..100 {
            (0..1000).for_each(|_| tally.add(SumKey { quota, window, user }, 100));
        }
        let bytes_max = tally.bytes_max();
        tally.drain_into(&mut bytes);
        assert!(bytes.len() <= bytes_max, "{} > {bytes_max}", bytes.len());
    }

    /// A quota with windows of a second once, an hour long: what they were kept in is given back.
    #[test]
    fn what_a_burst_took_is_given_back() {
        let key = |window, user| SumKey { quota: QuotaId::from_u16(1), window, user };
        let mut tally = Tally::default();
        let mut bytes = Vec::new();
        for second in 0..3600 {
            tally.add(key(WindowStart(second * 1000), 1), 1);
        }
        (0..100_000).for_each(|user| tally.add(key(WindowStart(0), user), 1));
        for _ in 0..2 {
            tally.drain_into(&mut bytes);
            tally.add(key(WindowStart(0), 1), 1);
        }
        let room: Vec<_> = tally.groups.iter().map(|group| group.deltas.capacity()).collect();
        assert!(matches!(*room, [room] if room <= KEPT_MIN), "{room:?}");
        assert_eq!(tally.by_place.len(), 1);
    }
}
