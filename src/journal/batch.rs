//! One batch: the sums of a drain, the span of each lane that they cover, and cold changes. Pure
//! codec.
//!
//! Layout, little-endian:
//!
//! ```text
//! offset  size  field
//!      0     4  magic: "TGB1", or "TGB2" where the body holds events of the ledger
//!      4     4  body length in bytes
//!      8     8  number
//!     16     8  durable: all batches up to this number were known durable when this one was
//!               written
//!     24     8  time: milliseconds since 1970 when this one was written
//!     32     8  engine: low half of the engine id
//!     40     4  check of the batch before (0 for the first)
//!     44     4  CRC32 of the body
//!     48    12  zero
//!     60     4  CRC32 of bytes 0..60: the batch's own check, which the next batch names
//!     64     -  body, then zeros up to a multiple of 64
//! ```
//!
//! The body: the lanes' spans (count; then for each lane `lane, from, to - from, next - to`), the
//! length of the cold events and the cold events, in a "TGB2" the length of the ledger's events and
//! these (see [`crate::ledger`]), the sums (see [`put_sums`](crate::codec::put_sums)). Numbers in
//! the body are varints.

use crate::codec::{DecodeResult, Input, Sums, decode_cold, encode_cold, put_varint};
use crate::error::Result;
use crate::journal::cold::ColdEvent;
use crate::ledger::Events;
use crate::model::{BatchNumber, EngineId, Timestamp};
use crate::numbers::NUMBER_MAX;

/// Batches start at multiples of this.
pub(crate) const BATCH_ALIGN: usize = 64;
/// The size of the header.
pub(crate) const HEADER_BYTES: usize = 64;

/// Why bytes are not decoded that do not begin like a header.
pub(crate) const NO_BATCH: &str = "no batch begins here";

const MAGIC: [u8; 4] = *b"TGB1";
const MAGIC_WITH_LEDGER: [u8; 4] = *b"TGB2";
const CHECKED_BYTES: usize = HEADER_BYTES - 4;
const ZERO_BYTES: usize = 12;
const SPAN_BYTES_MIN: usize = 4;
const _: () = assert!(HEADER_BYTES.is_multiple_of(BATCH_ALIGN));
const _: () = assert!(4 + 4 + 8 * 4 + 4 + 4 + ZERO_BYTES == CHECKED_BYTES);

/// The records `from..to` of a lane are in the batch; the lane goes on at `next`, which is beyond
/// `to` when the drainer made the lane skip to the start of its ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LaneSpan {
    pub(crate) lane: u16,
    pub(crate) from: u64,
    pub(crate) to: u64,
    pub(crate) next: u64,
}

/// The fields of a batch's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BatchHeader {
    pub(crate) number: BatchNumber,
    pub(crate) durable: BatchNumber,
    pub(crate) time: Timestamp,
    pub(crate) previous_check: u32,
    has_ledger: bool,
    body_len: u32,
    body_crc: u32,
    /// The batch's own check.
    pub(crate) check: u32,
}

/// What goes into a batch.
#[derive(Debug)]
pub(crate) struct BatchContent<'a> {
    pub(crate) number: BatchNumber,
    pub(crate) durable: BatchNumber,
    pub(crate) time: Timestamp,
    pub(crate) previous_check: u32,
    pub(crate) spans: &'a [LaneSpan],
    pub(crate) cold: &'a [ColdEvent],
    /// Encoded events.
    pub(crate) ledger: &'a [u8],
    /// Encoded sums.
    pub(crate) sums: &'a [u8],
}

/// Encodes a batch, padding included. Returns the bytes and the check.
pub(crate) fn encode(engine: EngineId, content: &BatchContent<'_>) -> DecodeResult<(Vec<u8>, u32)> {
    let mut bytes = Vec::new();
    let check = encode_into(&mut bytes, engine, content)?;
    Ok((bytes, check))
}

/// [`encode`] in place of what is in the buffer.
pub(crate) fn encode_into(
    bytes: &mut Vec<u8>,
    engine: EngineId,
    content: &BatchContent<'_>,
) -> DecodeResult<u32> {
    bytes.clear();
    // All but the spans and most cold events.
    bytes.reserve(content.ledger.len() + content.sums.len() + 4096);
    bytes.resize(HEADER_BYTES, 0);
    put_varint(bytes, content.spans.len() as u64);
    for span in content.spans {
        put_varint(bytes, u64::from(span.lane));
        put_varint(bytes, span.from);
        put_varint(bytes, span.to - span.from);
        put_varint(bytes, span.next - span.to);
    }
    let cold = if content.cold.is_empty() { Vec::new() } else { encode_cold(&content.cold)? };
    put_varint(bytes, cold.len() as u64);
    bytes.extend_from_slice(&cold);
    let has_ledger = !content.ledger.is_empty();
    if has_ledger {
        put_varint(bytes, content.ledger.len() as u64);
        bytes.extend_from_slice(content.ledger);
    }
    bytes.extend_from_slice(content.sums);

    let (header, body) = bytes.split_at_mut(HEADER_BYTES);
    let body_len = u32::try_from(body.len()).map_err(|_| "a batch above 4 GiB")?;
    let mut fields = Vec::with_capacity(HEADER_BYTES);
    fields.extend_from_slice(if has_ledger { &MAGIC_WITH_LEDGER } else { &MAGIC });
    fields.extend_from_slice(&body_len.to_le_bytes());
    fields.extend_from_slice(&content.number.0.to_le_bytes());
    fields.extend_from_slice(&content.durable.0.to_le_bytes());
    fields.extend_from_slice(&content.time.as_unix_millis().to_le_bytes());
    fields.extend_from_slice(&engine_tag(engine).to_le_bytes());
    fields.extend_from_slice(&content.previous_check.to_le_bytes());
    fields.extend_from_slice(&crc32fast::hash(body).to_le_bytes());
    fields.extend_from_slice(&[0; ZERO_BYTES]);
    let check = crc32fast::hash(&fields);
    fields.extend_from_slice(&check.to_le_bytes());
    header.copy_from_slice(&fields);
    bytes.resize(bytes.len().next_multiple_of(BATCH_ALIGN), 0);
    Ok(check)
}

/// For fuzzing: makes magic, length, engine, padding and checksums right.
#[cfg(feature = "fuzzing")]
pub(crate) fn reseal(engine: EngineId, bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().max(HEADER_BYTES), 0);
    let (header, body) = bytes.split_at_mut(HEADER_BYTES);
    let mut fields = Vec::with_capacity(HEADER_BYTES);
    let has_ledger = header.starts_with(&MAGIC_WITH_LEDGER);
    fields.extend_from_slice(if has_ledger { &MAGIC_WITH_LEDGER } else { &MAGIC });
    fields.extend_from_slice(&u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes());
    fields.extend_from_slice(header.get(8..32).unwrap_or_default());
    fields.extend_from_slice(&engine_tag(engine).to_le_bytes());
    fields.extend_from_slice(header.get(40..44).unwrap_or_default());
    fields.extend_from_slice(&crc32fast::hash(body).to_le_bytes());
    fields.extend_from_slice(&[0; ZERO_BYTES]);
    fields.extend_from_slice(&crc32fast::hash(&fields).to_le_bytes());
    header.copy_from_slice(&fields);
    bytes.resize(bytes.len().next_multiple_of(BATCH_ALIGN), 0);
}

fn engine_tag(engine: EngineId) -> u64 {
    u64::try_from(engine.0 & u128::from(u64::MAX)).unwrap_or_default()
}

impl BatchHeader {
    /// Decodes a header. All zeros is not a header.
    pub(crate) fn decode(engine: EngineId, bytes: &[u8; HEADER_BYTES]) -> DecodeResult<Self> {
        let mut input = Input::new(bytes);
        let has_ledger = match input.array()? {
            MAGIC => false,
            MAGIC_WITH_LEDGER => true,
            _ => return Err(NO_BATCH),
        };
        let body_len = input.u32()?;
        let number = BatchNumber(input.u64()?);
        let durable = BatchNumber(input.u64()?);
        let time = Timestamp::from_unix_millis(input.u64()?);
        let tag = input.u64()?;
        let previous_check = input.u32()?;
        let body_crc = input.u32()?;
        let zeros: [u8; ZERO_BYTES] = input.array()?;
        let check = input.u32()?;
        let checked = bytes.split_at(CHECKED_BYTES).0;
        if crc32fast::hash(checked) != check {
            return Err("a batch header whose checksum does not match");
        }
        if tag != engine_tag(engine) {
            return Err("a batch of another data directory");
        }
        let is_possible = (1..=NUMBER_MAX).contains(&number.0) && durable < number;
        if zeros != [0; ZERO_BYTES] || !is_possible {
            return Err("a batch header that can't have been written");
        }
        Ok(Self { number, durable, time, previous_check, has_ledger, body_len, body_crc, check })
    }

    /// Decodes a header as if it began as it should.
    pub(crate) fn decode_without_magic(
        engine: EngineId,
        bytes: &[u8; HEADER_BYTES],
    ) -> DecodeResult<Self> {
        let with = |magic: [u8; 4]| {
            let mut whole = *bytes;
            if let Some(found) = whole.first_chunk_mut() {
                *found = magic;
            }
            Self::decode(engine, &whole)
        };
        with(MAGIC).or_else(|_| with(MAGIC_WITH_LEDGER))
    }

    /// The body's length, and its checksum.
    pub(super) fn body(&self) -> (u64, u32) {
        (self.body_len.into(), self.body_crc)
    }

    /// The length of the whole batch in its file, padding included.
    pub(crate) fn total_len(&self) -> u64 {
        (HEADER_BYTES as u64 + u64::from(self.body_len)).next_multiple_of(BATCH_ALIGN as u64)
    }
}

/// A decoded batch: verified, with its sums still to be read.
#[derive(Debug)]
pub(crate) struct Batch<'a> {
    pub(crate) header: BatchHeader,
    pub(crate) spans: Vec<LaneSpan>,
    pub(crate) cold: Vec<ColdEvent>,
    ledger: &'a [u8],
    sums: &'a [u8],
}

impl<'a> Batch<'a> {
    /// Decodes a batch from `bytes`, which start at its header and hold [`BatchHeader::total_len`]
    /// bytes.
    pub(crate) fn decode(engine: EngineId, bytes: &'a [u8]) -> DecodeResult<Self> {
        let (head, rest) = bytes.split_first_chunk().ok_or("cut short")?;
        let header = BatchHeader::decode(engine, head)?;
        let body_len = usize::try_from(header.body_len).map_err(|_| "a batch above the memory")?;
        let (body, padding) = rest.split_at_checked(body_len).ok_or("cut short")?;
        if crc32fast::hash(body) != header.body_crc {
            return Err("a batch body whose checksum does not match");
        }
        if padding.len() >= BATCH_ALIGN || padding.iter().any(|&byte| byte != 0) {
            return Err("a batch whose padding is not zero");
        }
        let mut input = Input::new(body);
        let spans = decode_spans(&mut input)?;
        let cold_len = input.count(1)?;
        let cold = match input.take(cold_len)? {
            [] => Vec::new(),
            cold => decode_cold(cold)?,
        };
        let ledger_len = if header.has_ledger { input.count(1)? } else { 0 };
        let ledger = input.take(ledger_len)?;
        if header.has_ledger && ledger.is_empty() {
            return Err("a batch whose ledger is empty");
        }
        let left = input.remaining();
        let sums = input.take(left)?;
        Ok(Self { header, spans, cold, ledger, sums })
    }

    /// What is to be remembered.
    pub(crate) fn events(&self) -> Events<'a> {
        Events::new(self.ledger)
    }

    /// The sums, ascending by key.
    pub(crate) fn sums(&self) -> Sums<'a> {
        Sums::new(self.sums)
    }
}

/// Gives batches with consecutive numbers.
pub(crate) trait BatchSource {
    /// Hands the next batch to `visit`, which says what is wrong with it; `false` when there is
    /// none.
    fn next_batch(&mut self, visit: &mut dyn FnMut(&Batch<'_>) -> DecodeResult<()>)
    -> Result<bool>;
}

fn decode_spans(input: &mut Input<'_>) -> DecodeResult<Vec<LaneSpan>> {
    let count = input.count(SPAN_BYTES_MIN)?;
    let mut spans: Vec<LaneSpan> = Vec::with_capacity(count);
    for _ in 0..count {
        let lane = u16::try_from(input.varint()?).map_err(|_| "a lane above 65535")?;
        let from = input.varint()?;
        let to = from.checked_add(input.varint()?).ok_or("a span above 64 bits")?;
        let next = to.checked_add(input.varint()?).ok_or("a span above 64 bits")?;
        if next > NUMBER_MAX {
            return Err("a span that can't have been written");
        }
        if spans.last().is_some_and(|last| last.lane >= lane) {
            return Err("lane spans out of order");
        }
        spans.push(LaneSpan { lane, from, to, next });
    }
    Ok(spans)
}
