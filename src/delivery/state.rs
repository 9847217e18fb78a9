//! What is remembered about a sink from one open to the next: `sink-<name>.tgp`.
//!
//! ```text
//! offset  size  field
//!      0     4  magic "TGP1"
//!      4     4  format version (2)
//!      8    16  engine id
//!     24     8  length of the payload
//!     32     -  payload: bincode of name, confirmed, in flight, backlog, and, not in version 1,
//!               after which batch it gets events
//!      -     4  CRC32 of everything before
//! ```
//!
//! The sink itself is the authority on its position. The file says what the position may be, and so
//! what must be kept, even when the sink can't be asked.
#![deny(clippy::indexing_slicing)]

use std::sync::Arc;

use crate::codec::{DecodeResult, Input, decode_cold, encode_cold};
use crate::error::{Error, Result};
use crate::journal::writer::ChainPoint;
use crate::model::{BatchNumber, EngineId};
use crate::numbers::number_in_name;
use crate::snapshot::deltas::DeltaRange;
use crate::storage::Storage;
use crate::storage::TemporaryFile;

const MAGIC: [u8; 4] = *b"TGP1";
/// The version that is written. The one before it is read too.
const VERSION: u32 = 2;
const HEAD_BYTES: usize = 4 + 4 + 16 + 8;
const FILE_BYTES_MAX: u64 = 4 << 20;
/// How many parts a backlog may have, so that they fit in the file.
pub(crate) const PARTS_MAX: usize = 1 << 18;
const NAME_BYTES_MAX: usize = 64;
const STATE_PREFIX: &str = "sink-";
const STATE_SUFFIX: &str = ".tgp";
const BACKLOG_PREFIX: &str = "backlog-";
const BACKLOG_SUFFIX: &str = ".tgd";
const TEMPORARY_SUFFIX: &str = ".tmp";
const ROOM_SUFFIX: &str = ".room";
/// What file systems allocate at a time, most of them.
const ROOM_BYTES: u64 = 4096;
const DIGITS: usize = 20;

/// What is allowed as a sink's name: it becomes part of file names.
pub(crate) const NAMES_ALLOWED: &str = "1 to 64 of a-z, 0-9, - and _";

pub(crate) fn is_valid_name(name: &str) -> bool {
    let is_plain = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_');
    (1..=NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(is_plain)
}

/// The file of the sink with this name.
pub(crate) fn file_name(sink: &str) -> String {
    format!("{STATE_PREFIX}{sink}{STATE_SUFFIX}")
}

/// The name of the state's file while it is being written.
fn temporary_name(sink: &str) -> String {
    format!("{STATE_PREFIX}{sink}{TEMPORARY_SUFFIX}")
}

/// A file that holds nothing but the room for the next state: on a full disk it gives way to it.
fn room_name(sink: &str) -> String {
    format!("{STATE_PREFIX}{sink}{ROOM_SUFFIX}")
}

/// The name of a part of the backlog while it is being written.
pub(crate) fn temporary_backlog_name(sink: &str) -> String {
    format!("{BACKLOG_PREFIX}{sink}{TEMPORARY_SUFFIX}")
}

/// Whether it is the name of one of these.
pub(crate) fn is_temporary(name: &str) -> bool {
    let state = name.strip_prefix(STATE_PREFIX);
    let written = state.or_else(|| name.strip_prefix(BACKLOG_PREFIX));
    let written = written.and_then(|rest| rest.strip_suffix(TEMPORARY_SUFFIX));
    let room = state.and_then(|rest| rest.strip_suffix(ROOM_SUFFIX));
    written.or(room).is_some_and(is_valid_name)
}

/// The sink whose state a file is; `None` for other names.
pub(crate) fn parse_file_name(name: &str) -> Option<&str> {
    let sink = name.strip_prefix(STATE_PREFIX)?.strip_suffix(STATE_SUFFIX)?;
    is_valid_name(sink).then_some(sink)
}

/// The file that holds what a sink has not got of this range.
pub(crate) fn backlog_name(sink: &str, range: DeltaRange) -> String {
    let from = range.from.map_or(0, |from| from.number.0);
    let to = range.to.number.0;
    format!("{BACKLOG_PREFIX}{sink}-{from:0DIGITS$}-{to:0DIGITS$}{BACKLOG_SUFFIX}")
}

/// The sink whose backlog a file is a part of; `None` for other names.
pub(crate) fn parse_backlog_name(name: &str) -> Option<&str> {
    let rest = name.strip_prefix(BACKLOG_PREFIX)?.strip_suffix(BACKLOG_SUFFIX)?;
    let number = |rest: &str| {
        let digits = rest.get(rest.len().checked_sub(DIGITS)?..)?;
        number_in_name(digits, DIGITS)
    };
    let mut rest = rest;
    for _ in 0..2 {
        number(rest)?;
        rest = rest.get(..rest.len() - DIGITS)?.strip_suffix('-')?;
    }
    is_valid_name(rest).then_some(rest)
}

/// Where a sink is, and what is kept for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SinkState {
    pub(crate) name: String,
    /// What the sink has confirmed; `None`: nothing, or nothing is known.
    pub(crate) confirmed: Option<ChainPoint>,
    /// The end of a delivery that the sink may have got. It stays a boundary until it is confirmed.
    pub(crate) in_flight: Option<ChainPoint>,
    /// Merged deltas of batches that the journal may not have any more: without gaps, from
    /// `confirmed` on. What follows is in the journal.
    pub(crate) backlog: Vec<DeltaRange>,
    /// It gets the events that are recorded in batches after this one; `None`: it wants none.
    pub(crate) events_after: Option<BatchNumber>,
}

#[derive(bincode::Encode, bincode::Decode)]
struct WireState {
    name: Vec<u8>,
    confirmed: Option<WirePoint>,
    in_flight: Option<WirePoint>,
    backlog: Vec<WirePoint>,
}

type WireEventsAfter = Option<u64>;

#[derive(bincode::Encode, bincode::Decode)]
struct WirePoint {
    number: u64,
    check: u32,
}

impl From<ChainPoint> for WirePoint {
    fn from(point: ChainPoint) -> Self {
        Self { number: point.number.0, check: point.check }
    }
}

impl From<WirePoint> for ChainPoint {
    fn from(point: WirePoint) -> Self {
        Self { number: BatchNumber(point.number), check: point.check }
    }
}

impl SinkState {
    /// Of a sink that nothing is known of.
    pub(crate) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            confirmed: None,
            in_flight: None,
            backlog: Vec::new(),
            events_after: None,
        }
    }

    /// The end of what is confirmed or in the backlog: the journal must be there from here on.
    /// `None`: the newest snapshot must be there too.
    pub(crate) fn tip(&self) -> Option<ChainPoint> {
        self.backlog.last().map(|range| range.to).or(self.confirmed)
    }

    /// The last batch that it names: all of them were durable when it was written.
    pub(crate) fn end(&self) -> BatchNumber {
        number_of(self.tip()).max(number_of(self.in_flight))
    }

    /// The sink is at `point`: what lies before is not needed any more. Returns the parts of the
    /// backlog that were dropped.
    pub(crate) fn confirm(&mut self, point: ChainPoint) -> Vec<DeltaRange> {
        self.confirmed = Some(point);
        self.in_flight = None;
        let kept = self.backlog.partition_point(|range| range.to.number <= point.number);
        self.backlog.drain(..kept).collect()
    }

    /// Whether it could have been written: see the fields.
    fn is_consistent(&self) -> bool {
        let mut end = self.confirmed;
        for range in &self.backlog {
            if range.from != end || range.to.number <= number_of(end) {
                return false;
            }
            end = Some(range.to);
        }
        let first = self.backlog.first();
        let is_boundary = |point: ChainPoint| match first {
            Some(range) => range.to == point,
            None => point.number > number_of(self.confirmed),
        };
        is_valid_name(&self.name)
            && self.confirmed.is_none_or(|point| point.number > BatchNumber::ZERO)
            && self.in_flight.is_none_or(is_boundary)
    }

    fn encode(&self, engine: EngineId) -> DecodeResult<Vec<u8>> {
        let wire = WireState {
            name: self.name.clone().into_bytes(),
            confirmed: self.confirmed.map(WirePoint::from),
            in_flight: self.in_flight.map(WirePoint::from),
            backlog: self.backlog.iter().map(|range| range.to.into()).collect(),
        };
        let events_after: WireEventsAfter = self.events_after.map(|batch| batch.0);
        let payload = encode_cold(&(wire, events_after))?;
        let mut bytes = Vec::with_capacity(HEAD_BYTES + payload.len() + 4);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&engine.0.to_le_bytes());
        bytes.extend_from_slice(&(payload.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&payload);
        bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
        Ok(bytes)
    }

    /// Decodes what [`encode`](Self::encode) made; the format's version where it is another one.
    fn decode(engine: EngineId, bytes: &[u8]) -> DecodeResult<std::result::Result<Self, u32>> {
        let checked = bytes.len().checked_sub(4).ok_or("it is cut short")?;
        let (checked, crc) = bytes.split_at_checked(checked).ok_or("it is cut short")?;
        let mut input = Input::new(checked);
        if input.array()? != MAGIC {
            return Err("it does not begin like a sink's position");
        }
        if Input::new(crc).u32()? != crc32fast::hash(checked) {
            return Err("its checksum does not match");
        }
        let version = input.u32()?;
        if !(1..=VERSION).contains(&version) {
            return Ok(Err(version));
        }
        if EngineId(input.u128()?) != engine {
            return Err("it belongs to another data directory");
        }
        let len = usize::try_from(input.u64()?).map_err(|_| "it is cut short")?;
        let payload = input.take(len)?;
        if !input.is_empty() {
            return Err("something follows its payload");
        }
        let (wire, events_after): (WireState, WireEventsAfter) =
            if version == 1 { (decode_cold(payload)?, None) } else { decode_cold(payload)? };
        let name = String::from_utf8(wire.name).map_err(|_| "its name is no text")?;
        let confirmed = wire.confirmed.map(ChainPoint::from);
        let mut from = confirmed;
        let backlog = wire.backlog.into_iter().map(|to| {
            let range = DeltaRange { from, to: to.into() };
            from = Some(range.to);
            range
        });
        let backlog = backlog.collect();
        let in_flight = wire.in_flight.map(ChainPoint::from);
        let events_after = events_after.map(BatchNumber);
        let state = Self { name, confirmed, in_flight, backlog, events_after };
        if state.is_consistent() { Ok(Ok(state)) } else { Err("it can't have been written so") }
    }

    /// Makes the state durable, in place of an earlier one.
    pub(crate) fn save(&self, storage: &Arc<dyn Storage>, engine: EngineId) -> Result<()> {
        let name = file_name(&self.name);
        debug_assert!(self.is_consistent(), "{self:?}");
        let bytes =
            self.encode(engine).map_err(|reason| Error::damaged(storage.path(&name), 0, reason))?;
        let write = || {
            let file = TemporaryFile::create(storage, temporary_name(&self.name))?;
            file.write(&bytes, 0)?;
            file.publish(&name)
        };
        match write() {
            // Or a full disk would keep from the sinks what is only on it until they have it.
            Err(error) if error.is_disk_full() && self.give_room_back(storage) => write()?,
            written => written?,
        }
        self.keep_room(storage, bytes.len() as u64);
        Ok(())
    }

    /// Keeps room for the state that comes next, which is as long as this one, or as `bytes`. Where
    /// there is none, it is tried again after the next.
    pub(crate) fn keep_room(&self, storage: &Arc<dyn Storage>, bytes: u64) {
        let name = room_name(&self.name);
        let bytes = bytes.next_multiple_of(ROOM_BYTES).max(ROOM_BYTES);
        if storage.open(&name).and_then(|file| file.len()).is_ok_and(|there| there >= bytes) {
            return;
        }
        let _ = storage.remove(&name);
        let kept = storage.create(&name).and_then(|file| file.allocate(bytes));
        if kept.is_err() {
            let _ = storage.remove(&name);
        }
    }

    /// Keeps none any more.
    pub(crate) fn drop_room(&self, storage: &Arc<dyn Storage>) {
        // What is left behind the next open removes.
        let _ = storage.remove(&room_name(&self.name));
    }

    /// Whether there was room that was kept, and is free now: some file systems free it only once
    /// the directory is synced.
    pub(crate) fn give_room_back(&self, storage: &Arc<dyn Storage>) -> bool {
        storage.remove(&room_name(&self.name)).and_then(|()| storage.sync_directory()).is_ok()
    }

    /// Reads the state of the sink with this name.
    pub(crate) fn load(storage: &Arc<dyn Storage>, engine: EngineId, sink: &str) -> Result<Self> {
        let name = file_name(sink);
        let path = storage.path(&name);
        let io = |error| Error::io("read", &path, error);
        let damaged = |offset: u64, reason: &str| {
            let reason = format!(
                "{reason}; without this file, and without a backlog, the sink {sink:?} goes on \
                 from the position that it stores itself, if the journal still reaches back to it"
            );
            Error::damaged(&path, offset, reason)
        };
        let file = storage.open(&name).map_err(io)?;
        let len = file.len().map_err(io)?;
        if len > FILE_BYTES_MAX {
            return Err(damaged(FILE_BYTES_MAX, "it is too long"));
        }
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        file.read_exact_at(&mut bytes, 0).map_err(io)?;
        match Self::decode(engine, &bytes).map_err(|reason| damaged(0, reason))? {
            Ok(state) if state.name == sink => Ok(state),
            Ok(_) => Err(damaged(0, "it is another sink's")),
            Err(found) => {
                Err(Error::UnsupportedVersion { path: path.clone(), found, supported: VERSION })
            }
        }
    }
}

fn number_of(point: Option<ChainPoint>) -> BatchNumber {
    point.map_or(BatchNumber::ZERO, |point| point.number)
}

/// The states of all sinks that the directory knows, by name.
pub(crate) fn load_all(storage: &Arc<dyn Storage>, engine: EngineId) -> Result<Vec<SinkState>> {
    let mut names = storage.list().map_err(|error| Error::io("list", storage.path(""), error))?;
    names.sort_unstable();
    let sinks = names.iter().filter_map(|name| parse_file_name(name));
    sinks.map(|sink| SinkState::load(storage, engine, sink)).collect()
}

#[cfg(test)]
#[cfg(not(loom))]
#[allow(clippy::indexing_slicing, reason = "a test may panic")]
mod tests {
    use super::*;
    use crate::numbers::NUMBER_MAX;
    use crate::storage::sim::SimDisk;

    const ENGINE: EngineId = EngineId(0x1234);

    fn point(number: u64) -> ChainPoint {
        ChainPoint { number: BatchNumber(number), check: 5 }
    }

    fn states() -> Vec<SinkState> {
        let range = |from, to| DeltaRange { from, to: point(to) };
        let new = || SinkState::new("billing-1");
        vec![
            new(),
            SinkState { in_flight: Some(point(4)), ..new() },
            SinkState { confirmed: Some(point(3)), in_flight: Some(point(4)), ..new() },
            SinkState { backlog: vec![range(None, 9)], ..new() },
            SinkState { events_after: Some(BatchNumber(u64::MAX)), ..new() },
            SinkState {
                confirmed: Some(point(3)),
                in_flight: Some(point(9)),
                backlog: vec![range(Some(point(3)), 9), range(Some(point(9)), 90)],
                ..new()
            },
        ]
    }

    #[test]
    fn states_survive_a_loss_of_power_and_no_flipped_bit_passes() {
        for state in states() {
            let disk = SimDisk::new(1);
            let storage = disk.storage();
            SinkState::new("billing-1").save(&storage, ENGINE).unwrap();
            state.save(&storage, ENGINE).unwrap();
            disk.power_cut();
            assert_eq!(load_all(&disk.storage(), ENGINE).unwrap(), std::slice::from_ref(&state));
            let name = file_name("billing-1");
            let bytes = disk.file(&name).unwrap();
            for bit in 0..bytes.len() * 8 {
                let mut flipped = bytes.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                disk.put(&name, &flipped);
                assert!(load_all(&disk.storage(), ENGINE).is_err(), "bit {bit} of {state:?}");
            }
            for len in 0..bytes.len() {
                disk.put(&name, &bytes[..len]);
                assert!(load_all(&disk.storage(), ENGINE).is_err(), "{len} bytes of {state:?}");
            }
            disk.put(&file_name("other"), &bytes);
            disk.delete(&name);
            assert!(load_all(&disk.storage(), ENGINE).is_err(), "another sink's");
            assert!(SinkState::decode(EngineId(1), &bytes).is_err(), "another engine's");
        }
    }

    #[test]
    fn as_many_parts_as_a_backlog_may_have_fit_in_the_file() {
        let mut state = SinkState::new(&"n".repeat(NAME_BYTES_MAX));
        state.events_after = Some(BatchNumber(u64::MAX));
        let mut from = None;
        // And one before which an end was in flight.
        for number in (0..=PARTS_MAX as u64).rev() {
            let number = BatchNumber(u64::MAX - number);
            let to = ChainPoint { number, check: u32::MAX };
            state.backlog.push(DeltaRange { from, to });
            from = Some(to);
        }
        let storage = SimDisk::new(1).storage();
        state.save(&storage, ENGINE).unwrap();
        assert_eq!(load_all(&storage, ENGINE).unwrap(), [state]);
    }

    #[test]
    fn what_does_not_hang_together_is_refused() {
        let range = |from, to| DeltaRange { from, to: point(to) };
        let base = SinkState { confirmed: Some(point(3)), ..SinkState::new("a") };
        let wrong = [
            SinkState { in_flight: Some(point(3)), ..base.clone() },
            SinkState {
                in_flight: Some(point(8)),
                backlog: vec![range(Some(point(3)), 9)],
                ..base.clone()
            },
            SinkState { backlog: vec![range(Some(point(3)), 3)], ..base.clone() },
            SinkState { confirmed: Some(point(0)), ..base.clone() },
            SinkState { name: "Ä".to_owned(), ..base },
        ];
        for state in wrong {
            let bytes = state.encode(ENGINE).unwrap();
            assert!(SinkState::decode(ENGINE, &bytes).is_err(), "{state:?}");
        }
    }

    #[test]
    fn names_parse_back_and_no_other_does() {
        let range = DeltaRange { from: None, to: point(NUMBER_MAX) };
        let beyond = DeltaRange { from: None, to: point(NUMBER_MAX + 1) };
        assert_eq!(parse_backlog_name(&backlog_name("a", beyond)), None);
        for sink in ["a", "billing-1", "7-00000000000000000001", "_"] {
            assert_eq!(parse_file_name(&file_name(sink)), Some(sink));
            assert_eq!(parse_backlog_name(&backlog_name(sink, range)), Some(sink));
            assert_eq!(parse_backlog_name(&file_name(sink)), None);
            for temporary in [temporary_name(sink), temporary_backlog_name(sink), room_name(sink)] {
                assert!(is_temporary(&temporary), "{temporary}");
            }
            assert!(!is_temporary(&file_name(sink)));
        }
        assert!(!is_temporary("sink-.tmp") && !is_temporary("notes.tmp"));
        assert!(!is_temporary("backlog-a.room") && !is_temporary("a.room"));
        for other in ["sink-.tgp", "sink-A.tgp", "sink-a.tmp", "backlog-a-1-2.tgd", "backlog-.tgd"]
        {
            assert_eq!(
                (parse_file_name(other), parse_backlog_name(other)),
                (None, None),
                "{other}"
            );
        }
        assert!(!is_valid_name(&"a".repeat(65)) && !is_valid_name("a/b"));
    }

    #[test]
    fn confirming_drops_what_lies_before() {
        let mut state = states().pop().unwrap();
        let dropped = state.confirm(point(9));
        assert_eq!(dropped.len(), 1);
        assert_eq!(state.backlog, [DeltaRange { from: Some(point(9)), to: point(90) }]);
        assert_eq!((state.in_flight, state.tip()), (None, Some(point(90))));
        assert!(state.is_consistent());
    }
}
