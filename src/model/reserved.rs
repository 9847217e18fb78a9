//! Reservations, as they are read back.

use super::{Consume, ReservationId, Timestamp};

/// An open reservation, as it was when it was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct OpenReservation {
    /// The id by which it is settled.
    pub id: ReservationId,
    /// When it expires, unless it is settled or extended before.
    pub expires_at: Timestamp,
    /// What it holds: each of its counters once, by quota id and user, and the units.
    pub items: Vec<Consume>,
}
