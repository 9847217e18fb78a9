//! An answer as it is remembered: in 40 bytes, without its request's id and its time, which are
//! stored next to it.

use super::{Answer, Asked};
use crate::fold::SumKey;
use crate::model::{AMOUNT_MAX, ReservationId, Timestamp};

/// The upper bit of an amount or a place, which they leave free.
const UPPER: u64 = 1 << 63;
const _: () = assert!(AMOUNT_MAX == UPPER - 1);

/// No quota's id is as large as this: it leaves the upper bit of a place free.
pub(crate) const QUOTA_IDS: usize = 1 << 15;

/// Whoever reserved and was admitted is told the reservation, all others the usage and the limit:
/// these share their place.
///
/// Two bits tell which is there, and what was asked; what was admitted of the rest says the usage's
/// upper bit.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kept {
    user: u64,
    /// Below the lower of the two bits.
    amount: u64,
    /// Quota and window, see [`SumKey::place`], and the upper of the two bits.
    place: u64,
    /// The usage below what was admitted, or the reservation's generation.
    first: u64,
    /// The limit, or the reservation's number.
    second: u64,
}

const _: () = assert!(size_of::<Kept>() == 40);

/// An answer with all that is stored next to it. A merge holds millions.
#[derive(Debug, Clone, Copy)]
pub(super) struct KeptAnswer {
    pub(super) request: u128,
    pub(super) at: Timestamp,
    kept: Kept,
}

const _: () = assert!(size_of::<KeptAnswer>() == 64);

impl From<Answer> for KeptAnswer {
    #[inline]
    fn from(answer: Answer) -> Self {
        Self { request: answer.request, at: answer.at, kept: answer.into() }
    }
}

impl From<KeptAnswer> for Answer {
    fn from(KeptAnswer { request, at, kept }: KeptAnswer) -> Self {
        kept.answer(request, at)
    }
}

const fn bit(is_set: bool) -> u64 {
    if is_set { UPPER } else { 0 }
}

impl From<Answer> for Kept {
    #[inline]
    fn from(answer: Answer) -> Self {
        let Answer { asked, is_admitted, user, quota, window, .. } = answer;
        let Answer { amount, used, limit, reservation, .. } = answer;
        let (first, second) = match reservation {
            Some(ReservationId { generation, number }) => (generation, number),
            None => (used & AMOUNT_MAX | bit(is_admitted), limit),
        };
        let (is_lower, is_upper) = match (asked, reservation) {
            (Asked::TryConsume, _) => (false, false),
            (Asked::Consume, _) => (true, false),
            (Asked::Reserve, None) => (false, true),
            (Asked::Reserve, Some(_)) => (true, true),
        };
        let place = SumKey { quota, window, user }.place();
        Self {
            user,
            amount: amount & AMOUNT_MAX | bit(is_lower),
            place: place & !UPPER | bit(is_upper),
            first,
            second,
        }
    }
}

impl Kept {
    pub(crate) fn answer(self, request: u128, at: Timestamp) -> Answer {
        let Self { user, amount, place, first, second } = self;
        let asked = match (amount & UPPER != 0, place & UPPER != 0) {
            (false, false) => Asked::TryConsume,
            (true, false) => Asked::Consume,
            (_, true) => Asked::Reserve,
        };
        let is_reserved = amount & place & UPPER != 0;
        let reservation =
            is_reserved.then_some(ReservationId { generation: first, number: second });
        let (used, limit) = if is_reserved { (0, 0) } else { (first & AMOUNT_MAX, second) };
        let SumKey { quota, window, .. } = SumKey::at(place & !UPPER, user);
        Answer {
            request,
            asked,
            is_admitted: is_reserved || first & UPPER != 0,
            user,
            quota,
            window,
            amount: amount & AMOUNT_MAX,
            used,
            limit,
            at,
            reservation,
        }
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;
    use crate::model::{QuotaId, WindowStart};

    /// Of an admitted reservation neither usage nor limit is kept: nobody is told.
    #[test]
    fn an_answer_is_kept_as_it_was_told() {
        let at = Timestamp::from_unix_millis(5);
        for asked in [Asked::TryConsume, Asked::Consume, Asked::Reserve] {
            for is_admitted in [false, true] {
                for highest in [false, true] {
                    let value = |max: u64| if highest { max } else { 1 };
                    let is_reserved = asked == Asked::Reserve && is_admitted;
                    let id = ReservationId { generation: value(u64::MAX), number: value(u64::MAX) };
                    let answer = Answer {
                        request: 7,
                        asked,
                        is_admitted,
                        user: value(u64::MAX),
                        quota: QuotaId::from_u16(if highest { (1 << 15) - 1 } else { 1 }),
                        window: WindowStart(value(WindowStart::MAX.0)),
                        amount: value(AMOUNT_MAX),
                        used: if is_reserved { 0 } else { value(AMOUNT_MAX) },
                        limit: if is_reserved { 0 } else { value(AMOUNT_MAX) },
                        at,
                        reservation: is_reserved.then_some(id),
                    };
                    assert_eq!(Kept::from(answer).answer(7, at), answer);
                }
            }
        }
    }
}
