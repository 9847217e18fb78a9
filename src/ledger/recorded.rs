//! A recorded event, kept for the sinks: whose it is, and the rest as bincode.

use crate::codec::{DecodeResult, decode_cold, encode_cold, encoded_len};
use crate::model::{QuotaId, Timestamp, UsageEvent};

/// The most bytes that an event's payload takes.
pub(crate) const PAYLOAD_BYTES_MAX: usize = 4096;

/// An event as the log, the journal and backlogs hold it. What it counted is in the sums.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Recorded {
    pub(crate) user: u64,
    pub(crate) quota: QuotaId,
    /// Not empty, and no more than [`PAYLOAD_BYTES_MAX`].
    pub(crate) payload: Vec<u8>,
}

/// Value, time, request, metadata.
type Wire<M> = (f64, u64, Option<u128>, M);

fn wire(event: &UsageEvent) -> Wire<&std::collections::BTreeMap<String, String>> {
    (event.value, event.timestamp.as_unix_millis(), event.request_id, &event.metadata)
}

/// How many bytes the payload takes.
pub(crate) fn payload_len(event: &UsageEvent) -> DecodeResult<usize> {
    encoded_len(&wire(event))
}

/// All of an event but its user and quota.
pub(crate) fn payload(event: &UsageEvent) -> DecodeResult<Vec<u8>> {
    encode_cold(&wire(event))
}

impl Recorded {
    /// The event as it was reported.
    pub(crate) fn event(&self) -> DecodeResult<UsageEvent> {
        let (value, time, request_id, metadata): Wire<_> = decode_cold(&self.payload)?;
        let timestamp = Timestamp::from_unix_millis(time);
        if timestamp.as_unix_millis() != time || !value.is_finite() || value < 0.0 {
            return Err("an event that can't have been recorded");
        }
        let Self { user, quota, .. } = *self;
        Ok(UsageEvent { user, quota, value, timestamp, request_id, metadata })
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn recorded(event: &UsageEvent) -> Recorded {
        let payload = payload(event).unwrap();
        Recorded { user: event.user, quota: event.quota, payload }
    }

    proptest! {
        #[test]
        fn events_come_back_whole(
            user: u64,
            quota: u16,
            value in 0.0..1e300_f64,
            time in 0..=Timestamp::MAX.as_unix_millis(),
            request_id: Option<u128>,
            metadata in proptest::collection::btree_map(any::<String>(), any::<String>(), 0..8),
        ) {
            let timestamp = Timestamp::from_unix_millis(time);
            let quota = QuotaId(quota);
            let event = UsageEvent { user, quota, value, timestamp, request_id, metadata };
            let recorded = recorded(&event);
            prop_assert_eq!(payload_len(&event).unwrap(), recorded.payload.len());
            prop_assert_eq!(recorded.event().unwrap(), event);
        }

        #[test]
        fn arbitrary_bytes_never_panic(payload: Vec<u8>) {
            let _ = Recorded { user: 1, quota: QuotaId(1), payload }.event();
        }
    }

    /// The decoder bounds what a payload may claim in memory: the densest ones must pass.
    #[test]
    fn the_largest_number_of_entries_comes_back() {
        for bytes_max in [1 << 10, PAYLOAD_BYTES_MAX] {
            let mut event = UsageEvent::new(1, QuotaId(1), 1.0, Timestamp::MAX);
            for name in (0..bytes_max).filter_map(|code| char::from_u32(u32::try_from(code).ok()?))
            {
                let longer = event.clone().metadata(name, "");
                if payload_len(&longer).unwrap() > bytes_max {
                    break;
                }
                event = longer;
            }
            assert!(event.metadata.len() > bytes_max / 5, "{}", event.metadata.len());
            assert_eq!(recorded(&event).event().unwrap(), event);
        }
    }

    /// What `docs/sinks.md` says.
    #[test]
    fn an_event_takes_few_bytes() {
        let now = Timestamp::from_unix_millis(1_767_323_045_678);
        let event = UsageEvent::new(u64::MAX, QuotaId(u16::MAX), 12.5, now);
        assert_eq!(payload_len(&event), Ok(19));
        assert_eq!(payload_len(&event.clone().request_id(u128::MAX)), Ok(19 + 17));
        assert_eq!(payload_len(&event.metadata("model", "large")), Ok(19 + 1 + 5 + 1 + 5));
    }

    #[test]
    fn what_can_not_have_been_recorded_is_refused() {
        let event = UsageEvent::new(1, QuotaId(1), 1.0, Timestamp::MIN);
        for value in [f64::NAN, f64::INFINITY, -1.0] {
            assert!(recorded(&UsageEvent { value, ..event.clone() }).event().is_err());
        }
        let mut longer = recorded(&event);
        longer.payload.push(0);
        assert!(longer.event().is_err());
        let late: Wire<_> = (1.0, u64::MAX, None, &event.metadata);
        let payload = encode_cold(&late).unwrap();
        assert!(Recorded { payload, ..longer }.event().is_err());
    }
}
