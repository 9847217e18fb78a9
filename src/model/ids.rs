//! Identifiers and sequence numbers, each a type of its own, so that they can't be mixed up.

use std::fmt;
use std::str::FromStr;

/// The largest amount, usage and limit: 2^63 - 1 units.
pub const AMOUNT_MAX: u64 = i64::MAX as u64;

/// Whether the amount can be counted at once: 1 to [`AMOUNT_MAX`].
#[inline(always)]
pub(crate) const fn is_valid_amount(amount: u64) -> bool {
    // One comparison: 0 becomes the largest number.
    amount.wrapping_sub(1) < AMOUNT_MAX
}

/// Names a defined quota within one data directory. Handed out by `define`; stays the same across
/// restarts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QuotaId(pub(crate) u16);

impl QuotaId {
    /// The number, for logs and foreign formats.
    #[must_use]
    pub fn as_u16(self) -> u16 {
        self.0
    }

    /// The id with this number, as [`as_u16`](Self::as_u16) gave it. Operations on a number that
    /// was never handed out return [`Error::UnknownQuota`](crate::Error::UnknownQuota).
    #[must_use]
    pub fn from_u16(number: u16) -> Self {
        Self(number)
    }
}

impl fmt::Display for QuotaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}

/// The start of a window, in milliseconds since 1970-01-01 UTC; 0 for a lifetime. It names the
/// window: later windows of a quota have larger starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct WindowStart(pub(crate) u64);

impl WindowStart {
    /// The largest start that a cell can hold: 48 bits, the year 10889.
    pub(crate) const MAX: Self = Self((1 << 48) - 1);
}

/// Numbers the batches of a data directory; the first is 1. Never restarts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct BatchNumber(pub(crate) u64);

impl BatchNumber {
    /// Stands for "before the first batch".
    pub(crate) const ZERO: Self = Self(0);

    pub(crate) fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for BatchNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Names a reservation. Never handed out twice by one data directory, not even across a loss of
/// power. The chance that two directories hand out the same id is one in billions, even where one
/// is a copy of the other (salvaged or not), or was created anew in its place.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReservationId {
    /// Identifies the open of the data directory during which it was made.
    pub(crate) generation: u64,
    /// Numbers the reservations of that open, starting from a random number.
    pub(crate) number: u64,
}

impl ReservationId {
    /// The id as one number, to be kept elsewhere. `Display` writes it as 32 hexadecimal digits,
    /// which `parse` reads.
    #[must_use]
    pub const fn as_u128(self) -> u128 {
        (self.generation as u128) << 64 | self.number as u128
    }

    /// The id with this number, as [`as_u128`](Self::as_u128) gave it.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "the lower half is meant")]
    pub const fn from_u128(number: u128) -> Self {
        Self { generation: (number >> 64) as u64, number: number as u64 }
    }
}

impl fmt::Display for ReservationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.as_u128())
    }
}

/// From what `Display` writes: 32 hexadecimal digits, in either case, and nothing else.
impl FromStr for ReservationId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).map(Self::from_u128)
    }
}

/// The identity of a data directory: random, and fixed at creation. Every file of the directory
/// names it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EngineId(pub(crate) u128);

impl EngineId {
    /// The id with this number.
    #[must_use]
    pub const fn from_u128(number: u128) -> Self {
        Self(number)
    }

    /// The number, for foreign formats. `Display` writes it as 32 hexadecimal digits, which `parse`
    /// reads.
    #[must_use]
    pub const fn as_u128(self) -> u128 {
        self.0
    }
}

impl fmt::Display for EngineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// From what `Display` writes: 32 hexadecimal digits, in either case, and nothing else.
impl FromStr for EngineId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).map(Self)
    }
}

/// A text that is no id: not 32 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an id is written as 32 hexadecimal digits")]
pub struct ParseIdError(());

fn parse(text: &str) -> Result<u128, ParseIdError> {
    // Fewer digits are a text that was cut, and `from_str_radix` takes a sign.
    if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(ParseIdError(()));
    }
    u128::from_str_radix(text, 16).map_err(|_| ParseIdError(()))
}

impl fmt::Debug for ReservationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ReservationId({self})")
    }
}

impl fmt::Debug for EngineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EngineId({self})")
    }
}
