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

/// The two names of an answer's bound. OpenAI's newer models know only the second, and other
/// servers, or older ones, only the first.
pub(crate) const BOUNDS: [&str; 2] = ["max_tokens", "max_completion_tokens"];

/// The name under which this host is told a bound that a client did not set.
pub(crate) fn bound_name(host: Option<&str>) -> &'static str {
    let [older, newer] = BOUNDS;
    if host == Some("api.openai.com") { newer } else { older }
}

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
    /// Whether something came that has the form of an answer.
    is_read: bool,
    unread_bytes: u64,
}

impl Produced {
    /// Adds the content of an event of a stream (`delta`), or of a whole answer (`message`), that
    /// took this many bytes.
    pub(crate) fn add(&mut self, answer: &Value, bytes: usize) {
        let choices = answer["choices"].as_array();
        let has_form =
            |choice: &Value| choice["delta"].is_object() || choice["message"].is_object();
        let is_read = choices.is_some_and(|choices| choices.iter().all(has_form));
        if !is_read && !answer["usage"]["total_tokens"].is_u64() && !answer["error"].is_object() {
            return self.add_unread(bytes);
        }
        self.is_read = true;
        for choice in choices.into_iter().flatten() {
            let mut size = Size::default();
            size.add(&choice["delta"]);
            size.add(&choice["message"]);
            self.pieces += u64::from(size.bytes > 0);
            self.bytes += size.bytes;
        }
    }

    /// Adds what has no form that is known here.
    pub(crate) fn add_unread(&mut self, bytes: usize) {
        self.unread_bytes += bytes as u64;
    }

    /// Whether there was an answer, and nothing of it has a form that is known here.
    pub(crate) fn is_unreadable(self) -> bool {
        self.unread_bytes > 0 && !self.is_read
    }

    /// Servers send a token at a time, or several. What could not be read may be content.
    pub(crate) fn tokens(self) -> u64 {
        self.pieces.max(self.bytes.div_ceil(ANSWER_BYTES_PER_TOKEN))
            + self.unread_bytes.div_ceil(ANSWER_BYTES_PER_TOKEN)
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
