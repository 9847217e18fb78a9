//! How many tokens a request may take, before anybody has counted them. Pure.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use tollgate::AMOUNT_MAX;

/// Text has some four bytes a token in English, fewer in other languages and in code. Low, so that
/// the estimate is rather too high: what is reserved too much comes back.
const PROMPT_BYTES_PER_TOKEN: u64 = 3;
/// What begins the answer.
const ANSWER_TOKENS: u64 = 3;
/// For an image or a recording, whose size in bytes says little: so many, or one for so many bytes.
const MEDIA_TOKENS: u64 = 1_000;
const MEDIA_BYTES_PER_TOKEN: u64 = 256;
const MEDIA: [&str; 4] = ["image_url", "input_audio", "file", "video_url"];
/// What no model is shown.
const SETTINGS: [&str; 6] =
    ["model", "stream", "stream_options", "max_tokens", "max_completion_tokens", "n"];
const ANSWER_BYTES_PER_TOKEN: u64 = 4;

/// The two names of an answer's bound. OpenAI's newer models know only the second, and other
/// servers, or older ones, only the first.
pub(crate) const BOUNDS: [&str; 2] = ["max_tokens", "max_completion_tokens"];

/// The name under which this host is told a bound that a client did not set.
pub(crate) fn bound_name(host: Option<&str>) -> &'static str {
    let [older, newer] = BOUNDS;
    if host == Some("api.openai.com") { newer } else { older }
}

/// The tokens of all that a request holds: which of its fields a model is shown, and in which form,
/// the upstream decides.
pub(crate) fn prompt_tokens(request: &Json) -> u64 {
    let mut size = Size::default();
    if let Json::Fields(fields) = request {
        for (name, value) in fields {
            if !SETTINGS.contains(&name.as_str()) {
                size.bytes += name.len() as u64;
                size.add_json(value);
            }
        }
    }
    size.bytes.div_ceil(PROMPT_BYTES_PER_TOKEN) + size.media_tokens + ANSWER_TOKENS
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

/// What an upstream says that the whole took. More than can be counted can't be meant.
pub(crate) fn total_tokens(answer: &Value) -> Option<u64> {
    answer["usage"]["total_tokens"].as_u64().filter(|&total| total <= AMOUNT_MAX)
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
        if !is_read && total_tokens(answer).is_none() && !answer["error"].is_object() {
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

/// What a client sends, with all fields of an object, also of the same name: an upstream may take
/// any of them.
#[derive(Debug)]
pub(crate) enum Json {
    Text(String),
    List(Vec<Json>),
    Fields(Vec<(String, Json)>),
    /// A number and the like, by its length.
    Other(usize),
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(JsonVisitor)
    }
}

struct JsonVisitor;

impl<'de> Visitor<'de> for JsonVisitor {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Json, E> {
        Ok(Json::Other("null".len()))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Json, E> {
        Ok(Json::Other(value.to_string().len()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Json, E> {
        Ok(Json::Other(value.to_string().len()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Json, E> {
        Ok(Json::Other(value.to_string().len()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Json, E> {
        Ok(Json::Other(value.to_string().len()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Json, E> {
        Ok(Json::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut values: A) -> Result<Json, A::Error> {
        let mut list = Vec::new();
        while let Some(value) = values.next_element()? {
            list.push(value);
        }
        Ok(Json::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Json, A::Error> {
        let mut fields = Vec::new();
        while let Some(field) = entries.next_entry()? {
            fields.push(field);
        }
        Ok(Json::Fields(fields))
    }
}

/// The text in a value, whatever its form.
#[derive(Debug, Default)]
struct Size {
    bytes: u64,
    media_tokens: u64,
}

impl Size {
    /// Of a request: with the names of fields, and an image or a recording where the field beside
    /// it, `type`, says that it is one.
    fn add_json(&mut self, value: &Json) {
        match value {
            Json::Text(text) => self.bytes += text.len() as u64,
            Json::Other(length) => self.bytes += *length as u64,
            Json::List(values) => values.iter().for_each(|value| self.add_json(value)),
            Json::Fields(fields) => {
                let is_media = |name: &str| {
                    MEDIA.contains(&name)
                        && fields.iter().any(|(beside, value)| {
                            beside == "type" && matches!(value, Json::Text(kind) if kind == name)
                        })
                };
                for (name, value) in fields {
                    self.bytes += name.len() as u64;
                    if is_media(name) {
                        let mut media = Self::default();
                        media.add_json(value);
                        let tokens = media.bytes.div_ceil(MEDIA_BYTES_PER_TOKEN);
                        self.media_tokens += media.media_tokens + tokens.max(MEDIA_TOKENS);
                    } else {
                        self.add_json(value);
                    }
                }
            }
        }
    }

    /// Of an answer: without the names of fields, and without images and recordings.
    fn add(&mut self, value: &Value) {
        match value {
            Value::String(text) => self.bytes += text.len() as u64,
            Value::Array(values) => values.iter().for_each(|value| self.add(value)),
            Value::Object(fields) => {
                for (name, value) in fields {
                    if name != "role" && name != "type" && !MEDIA.contains(&name.as_str()) {
                        self.add(value);
                    }
                }
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }
}
