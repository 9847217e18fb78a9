//! The lines: usage and events out, the sealed lines (start, commit) out and back in. Pure.
//!
//! A sealed line ends with its own CRC-32, which tells it from a line that merely looks like one.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use super::super::json::{JsonObject, JsonText};
use super::super::{EventRow, Position, UsageRow};
use crate::model::{EngineId, Timestamp};

/// Goes up when a reader of the lines would misread the new ones.
const FORMAT: u32 = 1;

const COMMIT_PREFIX: &str = r#"{"type":"commit","engine":""#;
const START_PREFIX: &str = r#"{"type":"start","format":"#;
const SEAL: &str = r#","crc":"#;

/// The positions of the engines, by their ids.
pub(super) type Positions = BTreeMap<u128, Position>;

/// A line about a row.
pub(super) struct UsageLine<'a>(pub(super) EngineId, pub(super) &'a UsageRow);

/// A line about an event.
pub(super) struct EventLine<'a>(pub(super) EngineId, pub(super) &'a EventRow);

/// What ends a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Commit {
    pub(super) engine: EngineId,
    pub(super) position: Position,
    /// The number of lines in the batch, not counting this one.
    pub(super) lines: u64,
    /// Where in the file they begin: everything before that was committed earlier.
    pub(super) from: u64,
    /// Their CRC-32, line feeds included.
    pub(super) lines_crc: u32,
}

/// The first line of a file.
pub(super) struct Start<'a>(pub(super) &'a Positions);

/// A line with a checksum of itself.
pub(super) struct Sealed<T>(pub(super) T);

impl fmt::Display for UsageLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(engine, row) = self;
        write!(
            f,
            r#"{{"type":"usage","engine":"{engine}","user":{},"quota":{},"decimals":{},"#,
            row.user,
            JsonText(&row.name),
            row.decimals
        )?;
        write!(
            f,
            r#""window_start":{},"window_end":{},"added":{},"used":{},"limit":{}}}"#,
            Time(row.window_start),
            Time(row.window_end),
            row.added,
            Units(row.used),
            row.limit
        )
    }
}

impl fmt::Display for EventLine<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(engine, EventRow { name, event }) = self;
        write!(
            f,
            r#"{{"type":"event","engine":"{engine}","user":{},"quota":{},"value":"#,
            event.user,
            JsonText(name)
        )?;
        // JSON has no infinities; the debug form of a finite number is one in JSON too.
        if event.value.is_finite() {
            write!(f, "{:?}", event.value)?;
        } else {
            f.write_str("null")?;
        }
        write!(f, r#","timestamp":{},"request_id":"#, Time(Some(event.timestamp)))?;
        match event.request_id {
            Some(id) => write!(f, r#""{id:032x}""#)?,
            None => f.write_str("null")?,
        }
        write!(f, r#","metadata":{}}}"#, JsonObject(&event.metadata))
    }
}

impl fmt::Display for Commit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { engine, position: Position { batch, check }, lines, from, lines_crc } = self;
        write!(f, r#"{COMMIT_PREFIX}{engine}","batch":{batch},"check":{check},"lines":{lines},"#)?;
        write!(f, r#""from":{from},"lines_crc":{lines_crc}"#)
    }
}

impl fmt::Display for Start<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, r#"{START_PREFIX}{FORMAT},"positions":["#)?;
        for (index, (engine, Position { batch, check })) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, r#"{comma}{{"engine":"{engine:032x}","batch":{batch},"check":{check}}}"#)?;
        }
        f.write_str("]")
    }
}

impl<T: fmt::Display> fmt::Display for Sealed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = self.0.to_string();
        write!(f, "{line}{SEAL}{}}}", crc32fast::hash(line.as_bytes()))
    }
}

impl Commit {
    /// Reads a line without its seal; `None` for any other line.
    pub(super) fn parse(line: &str) -> Option<Self> {
        let rest = line.strip_prefix(COMMIT_PREFIX)?;
        let (engine, rest) = rest.split_once(r#"","batch":"#)?;
        let (batch, rest) = rest.split_once(r#","check":"#)?;
        let (check, rest) = rest.split_once(r#","lines":"#)?;
        let (lines, rest) = rest.split_once(r#","from":"#)?;
        let (from, lines_crc) = rest.split_once(r#","lines_crc":"#)?;
        let engine = EngineId::from_u128(u128::from_str_radix(engine, 16).ok()?);
        let position = Position { batch: number(batch)?, check: number(check)? };
        let (lines, from, lines_crc) = (number(lines)?, number(from)?, number(lines_crc)?);
        Some(Self { engine, position, lines, from, lines_crc })
    }
}

impl Start<'_> {
    /// Reads a line without its seal; the error says what is wrong.
    pub(super) fn parse(line: &str) -> Result<Positions, String> {
        let malformed = || "its first line is not one that starts a file".to_owned();
        let rest = line.strip_prefix(START_PREFIX).ok_or_else(malformed)?;
        let (format, rest) = rest.split_once(r#","positions":["#).ok_or_else(malformed)?;
        if format != FORMAT.to_string() {
            return Err(format!("it has format {format}, this library reads {FORMAT}"));
        }
        let list = rest.strip_suffix(']').ok_or_else(malformed)?;
        let engines = list.split("},{").filter(|engine| !engine.is_empty());
        engines.map(|engine| parse_position(engine).ok_or_else(malformed)).collect()
    }
}

/// Reads an engine's id and position.
fn parse_position(text: &str) -> Option<(u128, Position)> {
    let text = text.trim_start_matches('{').trim_end_matches('}');
    let (engine, rest) = text.strip_prefix(r#""engine":""#)?.split_once(r#"","batch":"#)?;
    let (batch, check) = rest.split_once(r#","check":"#)?;
    let position = Position { batch: number(batch)?, check: number(check)? };
    Some((u128::from_str_radix(engine, 16).ok()?, position))
}

/// The sealed part of a line (given without its line feed), if the checksum is right.
pub(super) fn unseal(line: &[u8]) -> Option<&str> {
    let line = std::str::from_utf8(line).ok()?;
    let (sealed, crc) = line.strip_suffix('}')?.rsplit_once(SEAL)?;
    (number(crc) == Some(crc32fast::hash(sealed.as_bytes()))).then_some(sealed)
}

/// A number as it is written here: digits only.
fn number<T: FromStr>(text: &str) -> Option<T> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

struct Time(Option<Timestamp>);

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(time) => write!(f, "\"{time}\""),
            None => f.write_str("null"),
        }
    }
}

struct Units(Option<u64>);

impl fmt::Display for Units {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(units) => write!(f, "{units}"),
            None => f.write_str("null"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::super::UsageEvent;
    use super::*;
    use crate::model::QuotaId;

    fn event(value: f64, text: &str) -> EventRow {
        let event = UsageEvent {
            user: u64::MAX,
            quota: QuotaId::from_u16(3),
            value,
            timestamp: Timestamp::from_unix_millis(1_767_323_045_678),
            request_id: Some(0xfeed),
            metadata: [(text, ""), ("b", "c")].map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
        };
        EventRow { name: text.into(), event }
    }

    proptest! {
        #[test]
        fn an_event_is_json(value in prop::num::f64::ANY, text in any::<String>()) {
            let line = EventLine(EngineId::from_u128(7), &event(value, &text)).to_string();
            prop_assert!(!line.contains('\n'));
            let json: serde_json::Value = serde_json::from_str(&line).unwrap();
            prop_assert_eq!(json["user"].as_u64(), Some(u64::MAX));
            let (_, number) = line.split_once("\"value\":").unwrap();
            let (number, _) = number.split_once(",\"timestamp\":").unwrap();
            prop_assert_eq!(number.parse().ok(), value.is_finite().then_some(value));
            prop_assert_eq!(json["quota"].as_str(), Some(&*text));
            let id = "0000000000000000000000000000feed";
            prop_assert_eq!(json["request_id"].as_str(), Some(id));
            prop_assert_eq!(json["timestamp"].as_str(), Some("2026-01-02T03:04:05.678Z"));
            if text != "b" {
                prop_assert_eq!(json["metadata"][&text].as_str(), Some(""));
            }
            prop_assert_eq!(json["metadata"]["b"].as_str().is_some(), true);
        }

        #[test]
        fn sealed_lines_come_back(
            engines in prop::collection::btree_map(any::<u128>(), any::<(u64, u32)>(), 0..4),
            lines: u64, from: u64, lines_crc: u32,
        ) {
            let positions: Positions = engines
                .into_iter()
                .map(|(engine, (batch, check))| (engine, Position { batch, check }))
                .collect();
            let line = Sealed(Start(&positions)).to_string();
            serde_json::from_str::<serde_json::Value>(&line).unwrap();
            prop_assert_eq!(Start::parse(unseal(line.as_bytes()).unwrap()).unwrap(), positions.clone());
            for (engine, position) in positions {
                let engine = EngineId::from_u128(engine);
                let commit = Commit { engine, position, lines, from, lines_crc };
                let line = Sealed(commit).to_string();
                serde_json::from_str::<serde_json::Value>(&line).unwrap();
                prop_assert_eq!(Commit::parse(unseal(line.as_bytes()).unwrap()), Some(commit));
            }
        }

        #[test]
        fn no_line_makes_the_parsers_panic(line in any::<Vec<u8>>(), text in any::<String>()) {
            let _ = unseal(&line);
            let _ = Commit::parse(&format!("{COMMIT_PREFIX}{text}"));
            let _ = Start::parse(&format!("{START_PREFIX}{FORMAT},\"positions\":[{text}]"));
        }
    }
}
