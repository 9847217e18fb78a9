//! Server-sent events, cut out of chunks that end anywhere. Pure.

use serde_json::Value;

/// An event that does not end within this is passed on unread: memory is bounded.
const EVENT_BYTES_MAX: usize = 1 << 20;

/// What a line may begin with beside `data:`; the first is a comment.
const FIELDS: [&[u8]; 4] = [b":", b"event:", b"id:", b"retry:"];

/// An event, as it came.
#[derive(Debug, PartialEq)]
pub(crate) struct Event {
    pub(crate) bytes: Vec<u8>,
    pub(crate) data: Data,
}

#[derive(Debug, PartialEq)]
pub(crate) enum Data {
    Json(Value),
    /// The end of the stream, as OpenAI marks it.
    Done,
    /// A comment, or another event without data.
    Nothing,
    /// Something else.
    Unread,
}

/// Takes chunks, gives events.
#[derive(Debug, Default)]
pub(crate) struct Events {
    pending: Vec<u8>,
    /// Where the line begins whose end was not seen yet.
    line: usize,
}

impl Events {
    /// The events that this chunk completes.
    pub(crate) fn push(&mut self, chunk: &[u8]) -> Vec<Event> {
        self.pending.extend_from_slice(chunk);
        let mut events = Vec::new();
        while let Some(length) = self.pending[self.line..].iter().position(|&byte| byte == b'\n') {
            let is_blank = matches!(&self.pending[self.line..self.line + length], b"" | b"\r");
            self.line += length + 1;
            if is_blank {
                events.push(self.take(self.line));
            }
        }
        if self.pending.len() > EVENT_BYTES_MAX {
            events.push(self.take(self.pending.len()));
        }
        events
    }

    /// What is left when the stream has ended.
    pub(crate) fn finish(&mut self) -> Option<Event> {
        (!self.pending.is_empty()).then(|| self.take(self.pending.len()))
    }

    fn take(&mut self, end: usize) -> Event {
        self.line = 0;
        let rest = self.pending.split_off(end);
        let bytes = std::mem::replace(&mut self.pending, rest);
        let data = data(&bytes);
        Event { bytes, data }
    }
}

fn data(event: &[u8]) -> Data {
    let mut text = Vec::new();
    let mut is_stream = true;
    for line in event.split(|&byte| byte == b'\n') {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if let Some(value) = line.strip_prefix(b"data:") {
            text.extend_from_slice(value.strip_prefix(b" ").unwrap_or(value));
            text.push(b'\n');
        } else {
            is_stream &= FIELDS.iter().any(|field| line.starts_with(field)) || line.is_empty();
        }
    }
    match text.trim_ascii() {
        b"" if is_stream => Data::Nothing,
        // Some upstreams give a whole answer where a stream was asked for.
        b"" => serde_json::from_slice(event).map_or(Data::Unread, Data::Json),
        b"[DONE]" => Data::Done,
        json => serde_json::from_slice(json).map_or(Data::Unread, Data::Json),
    }
}
