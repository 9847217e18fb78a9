//! An event's payload as records of 24 bytes: its length in two bytes, then its bytes, then zeros.
//! Pure.

use crate::codec::Input;
use crate::ledger::PAYLOAD_BYTES_MAX;
use crate::wal::record::Item;

/// What one record holds.
pub(crate) const PIECE_BYTES: usize = 24;
const LENGTH_BYTES: usize = 2;

const RECORDS_MAX: usize = (LENGTH_BYTES + PAYLOAD_BYTES_MAX).div_ceil(PIECE_BYTES);
/// The other records of an operation that records an event: add, request, answer.
const OTHERS_MAX: usize = 3;
// A record says in eight bits how many follow.
const _: () = assert!(RECORDS_MAX + OTHERS_MAX <= u8::MAX as usize);

/// How many records a payload of this many bytes takes; none for an empty one. The length is at
/// most [`PAYLOAD_BYTES_MAX`].
#[expect(clippy::cast_possible_truncation, reason = "asserted above")]
pub(crate) fn records(payload_len: usize) -> u8 {
    match payload_len.min(PAYLOAD_BYTES_MAX) {
        0 => 0,
        len => (LENGTH_BYTES + len).div_ceil(PIECE_BYTES) as u8,
    }
}

/// The longest payload whose operation fits in a ring of this many records.
pub(crate) fn len_max(ring_records: u64) -> usize {
    let records = usize::try_from(ring_records).unwrap_or(usize::MAX).saturating_sub(OTHERS_MAX);
    records.saturating_mul(PIECE_BYTES).saturating_sub(LENGTH_BYTES).min(PAYLOAD_BYTES_MAX)
}

/// The records of a payload, which is not empty and at most [`PAYLOAD_BYTES_MAX`] long.
pub(crate) fn items(payload: &[u8]) -> impl Iterator<Item = Item> {
    let len = u16::try_from(payload.len()).unwrap_or(u16::MAX).to_le_bytes();
    let mut bytes = len.into_iter().chain(payload.iter().copied());
    (0..records(payload.len())).map(move |_| {
        let mut piece = [0; PIECE_BYTES];
        piece.iter_mut().zip(&mut bytes).for_each(|(to, from)| *to = from);
        Item::Payload(piece)
    })
}

/// The payload that these records hold; `None` where they are not what [`items`] makes.
pub(crate) fn joined(items: impl Iterator<Item = Item>) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    for item in items {
        if let Item::Payload(piece) = item {
            bytes.extend_from_slice(&piece);
        }
    }
    let mut input = Input::new(&bytes);
    let len = usize::from(u16::from_le_bytes(input.array().ok()?));
    let payload = input.take(len).ok().filter(|_| (1..=PAYLOAD_BYTES_MAX).contains(&len))?;
    let rest = input.take(input.remaining()).ok()?;
    let is_padding = rest.len() < PIECE_BYTES && rest.iter().all(|&byte| byte == 0);
    is_padding.then(|| payload.to_vec())
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    #[test]
    fn payloads_of_every_length_come_back() {
        for len in 1..=PAYLOAD_BYTES_MAX {
            let payload: Vec<_> = (0..=250).cycle().take(len).collect();
            let mut items: Vec<_> = items(&payload).collect();
            assert_eq!(items.len(), usize::from(records(len)));
            assert!(len <= len_max(items.len() as u64 + 3));
            assert!(len > len_max(items.len() as u64 + 2));
            assert_eq!(joined(items.iter().copied()), Some(payload));
            let last = items.pop().unwrap();
            assert_eq!(joined(items.iter().copied()), None, "cut short");
            items.extend([last, Item::Payload([0; PIECE_BYTES])]);
            assert_eq!(joined(items.iter().copied()), None, "longer than it says");
        }
        assert_eq!(records(0), 0);
        assert_eq!(joined([].into_iter()), None);
        assert_eq!(joined([Item::Payload([0; PIECE_BYTES])].into_iter()), None);
        let mut not_padded = [0; PIECE_BYTES];
        (not_padded[0], not_padded[23]) = (1, 1);
        assert_eq!(joined([Item::Payload(not_padded)].into_iter()), None);
        assert_eq!(len_max(u64::MAX), PAYLOAD_BYTES_MAX);
        assert_eq!(len_max(0), 0);
    }
}
