//! How many tokens a request may take, before anybody has counted them. Pure.

use serde_json::Value;

/// Text has some four bytes a token in English, fewer in other languages and in code. Low, so that
/// the estimate is rather too high: what is reserved too much comes back.
const PROMPT_BYTES_PER_TOKEN: u64 = 3;
/// What a message costs beside its text, and what begins the answer.
const MESSAGE_TOKENS: u64 = 4;
const ANSWER_TOKENS: u64 = 3;
/// For an image or a recording, whose size in bytes says little.
const MEDIA_TOKENS: u64 = 1_000;
const MEDIA: [&str; 4] = ["image_url", "input_audio", "file", "video_url"];
const ANSWER_BYTES_PER_TOKEN: u64 = 4;

/// The tokens of a request's messages and tools.
pub(crate) fn prompt_tokens(request: &Value) -> u64 {
    let messages = &request["messages"];
    let count = messages.as_array().map_or(0, Vec::len) as u64;
    let mut size = Size::default();
    size.add(messages);
    size.add(&request["tools"]);
    size.bytes.div_ceil(PROMPT_BYTES_PER_TOKEN)
        + size.media * MEDIA_TOKENS
        + count * MESSAGE_TOKENS
        + ANSWER_TOKENS
}

/// The tokens that a request allows its answers together; `None` where it sets no bound, and an
/// error where that is no number. The bound has two names, and the larger one counts: both are sent
/// on, and the upstream may go by either.
pub(crate) fn completion_tokens_max(request: &Value) -> Result<Option<u64>, &'static str> {
    let number = |name: &str, what| match &request[name] {
        Value::Null => Ok(None),
        value => value.as_u64().map(Some).ok_or(what),
    };
    let newer = number("max_completion_tokens", "max_completion_tokens is not a count")?;
    let older = number("max_tokens", "max_tokens is not a count")?;
    let answers = number("n", "n is not a count")?.unwrap_or(1).max(1);
    Ok(newer.max(older).map(|tokens| tokens.saturating_mul(answers)))
}

/// What came out of an answer so far, for when nobody says how many tokens it was.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Produced {
    pieces: u64,
    bytes: u64,
}

impl Produced {
    /// Adds the content of an event of a stream (`delta`), or of a whole answer (`message`).
    pub(crate) fn add(&mut self, answer: &Value) {
        let choices = answer["choices"].as_array().map_or(&[][..], Vec::as_slice);
        for choice in choices {
            let mut size = Size::default();
            size.add(&choice["delta"]);
            size.add(&choice["message"]);
            self.pieces += u64::from(size.bytes > 0);
            self.bytes += size.bytes;
        }
    }

    /// Servers send a token at a time, or several.
    pub(crate) fn tokens(self) -> u64 {
        self.pieces.max(self.bytes.div_ceil(ANSWER_BYTES_PER_TOKEN))
    }
}

/// The text in a value, whatever its form, without the names of fields.
#[derive(Debug, Default)]
struct Size {
    bytes: u64,
    media: u64,
}

impl Size {
    fn add(&mut self, value: &Value) {
        match value {
            Value::String(text) => self.bytes += text.len() as u64,
            Value::Array(values) => values.iter().for_each(|value| self.add(value)),
            Value::Object(fields) => {
                for (name, value) in fields {
                    if MEDIA.contains(&name.as_str()) {
                        self.media += 1;
                    } else if name != "role" && name != "type" {
                        self.add(value);
                    }
                }
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }
}
