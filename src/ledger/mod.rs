//! What must be remembered besides the sums: open reservations, how reservations ended, and the
//! answers to requests that count once; and what is recorded for sinks. Pure.
//!
//! - [`codec`]: the bytes of events, in batches and snapshots alike.
//! - [`kept`]: an answer in few bytes.
//! - [`newest`]: many that have ended, of which the newest are kept.
//! - [`state`]: events folded, in whichever order they come.
//! - [`recorded`]: events that an application recorded, which are for sinks and change no state.

mod codec;
mod kept;
mod newest;
mod recorded;
mod state;

use std::fmt;

use smallvec::SmallVec;

pub(crate) use codec::{EVENT_BYTES_MIN, EventWriter, Events, open_bytes_max};
pub(crate) use kept::{Kept, QUOTA_IDS};
pub(crate) use recorded::{PAYLOAD_BYTES_MAX, Recorded, payload, payload_len};
pub(crate) use state::{Ledger, Remembering};

use crate::fold::SumKey;
use crate::model::{QuotaId, ReservationId, Timestamp, WindowStart};

/// How many counters one operation may name.
pub(crate) const PARTS_MAX: usize = 16;
/// This many need no allocation: a user, their organisation and the service, and one more.
pub(crate) const PARTS_COMMON: usize = 4;

/// What a reservation holds: of one counter, mostly.
pub(crate) type Parts = SmallVec<[Part; 1]>;

/// What one operation changed besides the sums.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum LedgerEvent {
    /// Something was reserved; the sums hold it already.
    Open { id: ReservationId, expires: Timestamp, parts: Parts },
    /// A reservation expires no earlier than this.
    Extend { id: ReservationId, expires: Timestamp },
    /// A reservation has ended: `parts` were given back, and what it cost was taken; both are in
    /// the sums. Empty once it is known that what was given back had been taken.
    Settle { id: ReservationId, how: Settlement, at: Timestamp, parts: Parts },
    /// A request was answered.
    Answer(Answer),
    /// The application recorded an event, for sinks. Not in snapshots.
    Recorded(Recorded),
}

/// What is reserved of one counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) user: u64,
    pub(crate) quota: QuotaId,
    pub(crate) window: WindowStart,
    pub(crate) amount: u64,
}

impl Part {
    /// What it is a part of.
    #[inline(always)]
    pub(crate) fn key(&self) -> SumKey {
        SumKey { quota: self.quota, window: self.window, user: self.user }
    }
}

/// How a reservation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Settlement {
    /// Its actual cost was charged.
    Committed,
    /// It was released as a whole, by `cancel` or by dropping it.
    Cancelled,
    /// It expired, and was released as a whole.
    Expired,
}

/// What was asked under a request's id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asked {
    TryConsume,
    Consume,
    Reserve,
}

/// A request and its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) request: u128,
    pub(crate) asked: Asked,
    pub(crate) is_admitted: bool,
    pub(crate) user: u64,
    pub(crate) quota: QuotaId,
    /// The window in which it was decided.
    pub(crate) window: WindowStart,
    pub(crate) amount: u64,
    /// The usage afterwards, and the limit then.
    pub(crate) used: u64,
    pub(crate) limit: u64,
    pub(crate) at: Timestamp,
    /// What was reserved, where that was asked and admitted.
    pub(crate) reservation: Option<ReservationId>,
}

impl fmt::Display for Settlement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Committed => "committed",
            Self::Cancelled => "cancelled",
            Self::Expired => "expired",
        })
    }
}

impl Settlement {
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::Committed => 1,
            Self::Cancelled => 2,
            Self::Expired => 3,
        }
    }

    pub(crate) fn from_number(number: u8) -> Option<Self> {
        [Self::Committed, Self::Cancelled, Self::Expired]
            .into_iter()
            .find(|how| how.number() == number)
    }
}

impl Asked {
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::TryConsume => 1,
            Self::Consume => 2,
            Self::Reserve => 3,
        }
    }

    pub(crate) fn from_number(number: u8) -> Option<Self> {
        [Self::TryConsume, Self::Consume, Self::Reserve]
            .into_iter()
            .find(|asked| asked.number() == number)
    }
}
