//! Usage as the application reports it.

use std::collections::BTreeMap;

use super::{QuotaId, Timestamp};

/// Something that was used, as the application reports it: counted, and kept whole for the sinks
/// that want events.
///
/// ```
/// use tollgate::{QuotaId, Timestamp, UsageEvent};
///
/// let at = Timestamp::from_unix_millis(1_767_323_045_678);
/// let event = UsageEvent::new(42, QuotaId::from_u16(0), 0.25, at)
///     .request_id(0xfeed)
///     .metadata("model", "large")
///     .metadata("path", "/v1/chat");
/// assert_eq!(event.metadata["model"], "large");
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct UsageEvent {
    /// The user.
    pub user: u64,
    /// The quota.
    pub quota: QuotaId,
    /// The amount, before conversion to units: 0.25 is 25 units where the quota has two decimals.
    pub value: f64,
    /// When it was used, according to the application. The event counts in the window in which it
    /// is recorded, whatever the timestamp says.
    pub timestamp: Timestamp,
    /// The request that used it. Of all events, and calls of
    /// [`consume_once`](crate::Tollgate::consume_once), with the same id only the first counts.
    pub request_id: Option<u128>,
    /// What else the application wants to keep, by name.
    pub metadata: BTreeMap<String, String>,
}

impl UsageEvent {
    /// An event without a request id and without metadata.
    #[must_use]
    pub fn new(user: u64, quota: QuotaId, value: f64, timestamp: Timestamp) -> Self {
        Self { user, quota, value, timestamp, request_id: None, metadata: BTreeMap::new() }
    }

    /// The request that used it. See the [field](Self#structfield.request_id).
    #[must_use]
    pub fn request_id(mut self, id: u128) -> Self {
        self.request_id = Some(id);
        self
    }

    /// Adds a piece of metadata, replacing an earlier one of that name.
    #[must_use]
    pub fn metadata(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.metadata.insert(name.into(), value.into());
        self
    }
}
