//! What was read from the lanes since the last batch, to be summed when the next one is made.
//!
//! Deltas are stored one after the other. At the end they are added up in a row with a place for
//! each user, where the users of a group lie close together: their places do not depend on each
//! other, so a processor fetches many at once. Otherwise they are sorted, in a few sequential
//! passes over memory. A hash table of sums would wait for memory at each delta, once there are
//! more counters than the processor's nearest caches hold.

use std::collections::HashMap;

use foldhash::fast::RandomState;

use crate::codec::{GROUP_BYTES_MAX, varint_bytes};
use crate::fold::{Sum, SumKey, sort};

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
    /// See [`bytes_max`](Self::bytes_max).
    bytes_max: usize,
    /// Kept for its memory.
    row: Row,
}

/// The deltas of one quota and window.
#[derive(Debug)]
struct Group {
    place: u64,
    deltas: Vec<Delta>,
}

#[derive(Debug, Clone, Copy)]
struct Delta {
    user: u64,
    amount: i64,
}

impl Delta {
    /// Both, if they are of one user and their sum is an amount.
    #[inline]
    fn plus(self, other: Self) -> Option<Self> {
        let amount = self.amount.checked_add(other.amount).filter(|_| self.user == other.user)?;
        Some(Self { amount, ..self })
    }

    /// What it adds to a batch at most. What is written of a user is no more than the user, and a
    /// sum takes no more bytes than its parts.
    #[inline]
    fn bytes_max(&self) -> usize {
        let zigzag_max = self.amount.unsigned_abs().saturating_mul(2);
        varint_bytes(self.user) + varint_bytes(zigzag_max)
    }
}

impl Tally {
    #[inline]
    pub(super) fn add(&mut self, key: SumKey, amount: i64) {
        let place = key.place();
        if self.groups.get(self.last).is_none_or(|group| group.place != place) {
            self.last = self.group_of(place);
        }
        let deltas = &mut self.groups[self.last].deltas;
        let delta = Delta { user: key.user, amount };
        let Some(last) = deltas.last_mut() else {
            self.bytes_max += GROUP_BYTES_MAX + delta.bytes_max();
            return deltas.push(delta);
        };
        // Often it is of the same counter: what a commit gives back and what it charges, and before
        // these what was reserved.
        match last.plus(delta) {
            Some(sum) => {
                self.bytes_max += sum.bytes_max();
                self.bytes_max -= last.bytes_max();
                *last = sum;
            }
            None => {
                self.bytes_max += delta.bytes_max();
                deltas.push(delta);
            }
        }
    }

    fn group_of(&mut self, place: u64) -> usize {
        *self.by_place.entry(place).or_insert_with(|| {
            self.groups.push(Group { place, deltas: Vec::new() });
            self.groups.len() - 1
        })
    }

    /// The sums take no more bytes of a batch than that, see [`put_sums`](crate::codec::put_sums).
    pub(super) fn bytes_max(&self) -> usize {
        self.bytes_max
    }

    /// Moves the sums out, ascending by key. Sums of zero are kept: that something happened in a
    /// window is part of the state.
    pub(super) fn drain_sorted(&mut self, out: &mut Vec<Sum>) {
        out.clear();
        // Windows end: what had nothing this time may never have again.
        self.groups.retain(|group| !group.deltas.is_empty());
        self.groups.sort_unstable_by_key(|group| group.place);
        let mut row_len = 0;
        for Group { place, deltas } in &mut self.groups {
            if self.row.add_up(*place, deltas, out) {
                row_len = row_len.max(self.row.0.len());
            } else {
                sort_up(*place, deltas, out);
            }
            deltas.shrink_to((deltas.len() * KEPT_TIMES).max(KEPT_MIN));
            deltas.clear();
        }
        self.row.0.clear();
        self.row.0.shrink_to((row_len * KEPT_TIMES).max(KEPT_MIN));
        let places = self.groups.iter().enumerate();
        self.by_place = places.map(|(group, of)| (of.place, group)).collect();
        self.bytes_max = 0;
    }
}

/// Appends the sums of deltas, by sorting them.
fn sort_up(place: u64, deltas: &mut [Delta], out: &mut Vec<Sum>) {
    sort(deltas, |delta| delta.user);
    let mut sum: Option<Sum> = None;
    for &Delta { user, amount } in &*deltas {
        match &mut sum {
            Some(sum) if sum.key.user == user => sum.amount += i128::from(amount),
            _ => {
                let key = SumKey::at(place, user);
                out.extend(sum.replace(Sum { key, amount: amount.into() }));
            }
        }
    }
    out.extend(sum);
}

/// A sum for each user from the first to the last of a group.
#[derive(Debug, Default)]
struct Row(Vec<i64>);

impl Row {
    /// Of a user who has no delta. No sum is this.
    const NONE: i64 = i64::MIN;

    /// Appends the sums of deltas, if the users lie so close together that a row of all of them is
    /// worth it. Otherwise, and where a sum is above 64 bits, nothing.
    fn add_up(&mut self, place: u64, deltas: &[Delta], out: &mut Vec<Sum>) -> bool {
        let bounds = |(first, last): (u64, u64), delta: &Delta| {
            (first.min(delta.user), last.max(delta.user))
        };
        let (first, last) = deltas.iter().fold((u64::MAX, 0), bounds);
        let span = usize::try_from(last.saturating_sub(first)).unwrap_or(usize::MAX);
        if span >= deltas.len() * ROW_PLACES {
            return false;
        }
        self.0.clear();
        self.0.resize(span + 1, Self::NONE);
        for &Delta { user, amount } in deltas {
            #[expect(clippy::cast_possible_truncation, reason = "less than the row's length")]
            let sum = &mut self.0[(user - first) as usize];
            let before = if *sum == Self::NONE { 0 } else { *sum };
            match before.checked_add(amount) {
                Some(after) if after != Self::NONE => *sum = after,
                _ => return false,
            }
        }
        let sums = (first..=last).zip(&self.0).filter(|&(_, &sum)| sum != Self::NONE);
        out.extend(
            sums.map(|(user, &sum)| Sum { key: SumKey::at(place, user), amount: sum.into() }),
        );
        true
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::codec::put_sums;
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

    /// Small ones, and those of which a few are above 64 bits.
    fn any_amount(is_small: bool) -> impl Strategy<Value = i64> {
        let any = prop_oneof![-100..100_i64, any::<i64>(), Just(i64::MIN), Just(i64::MAX)];
        if is_small { (-100..100_i64).boxed() } else { any.boxed() }
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
            let mut sums = Vec::new();
            for deltas in batches {
                let mut expected = BTreeMap::<_, i128>::new();
                for (key, amount) in deltas {
                    *expected.entry(key).or_default() += i128::from(amount);
                    tally.add(key, amount);
                }
                let bytes_max = tally.bytes_max();
                tally.drain_sorted(&mut sums);
                prop_assert!(sums.iter().map(|sum| (sum.key, sum.amount)).eq(expected));
                let mut bytes = Vec::new();
                put_sums(&mut bytes, &sums);
                prop_assert!(bytes.len() <= bytes_max, "{} > {bytes_max}", bytes.len());
                // What is kept for the next batch takes nothing of it.
                prop_assert_eq!(tally.bytes_max(), 0);
            }
        }
    }

    /// A quota with windows of a second once, an hour long: what they were kept in is given back.
    #[test]
    fn what_a_burst_took_is_given_back() {
        let key = |window, user| SumKey { quota: QuotaId::from_u16(1), window, user };
        let mut tally = Tally::default();
        let mut sums = Vec::new();
        for second in 0..3600 {
            tally.add(key(WindowStart(second * 1000), 1), 1);
        }
        (0..100_000).for_each(|user| tally.add(key(WindowStart(0), user), 1));
        for _ in 0..2 {
            tally.drain_sorted(&mut sums);
            tally.add(key(WindowStart(0), 1), 1);
        }
        let room: Vec<_> = tally.groups.iter().map(|group| group.deltas.capacity()).collect();
        assert!(matches!(*room, [room] if room <= KEPT_MIN), "{room:?}");
        assert_eq!(tally.by_place.len(), 1);
    }
}
