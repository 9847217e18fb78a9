//! The pure parts of the example.

use serde_json::{Value, json};

use crate::estimate::{Produced, bound_name, completion_tokens_max, prompt_tokens};
use crate::sse::{Data, Event, Events};

#[test]
fn events_are_found_wherever_chunks_end() {
    let stream = b"data: {\"a\": 1}\n\n: a comment\r\n\r\nevent: x\ndata: {\ndata: \"b\": 2}\n\n\
                   data: [DONE]\n\ndata: cut";
    let whole = |size: usize| {
        let mut events = Events::default();
        let mut found: Vec<Event> =
            stream.chunks(size).flat_map(|chunk| events.push(chunk)).collect();
        found.extend(events.finish());
        found
    };
    let expected = [
        Data::Json(json!({ "a": 1 })),
        Data::Nothing,
        Data::Json(json!({ "b": 2 })),
        Data::Done,
        Data::Unread,
    ];
    for size in 1..=stream.len() {
        let (bytes, data): (Vec<_>, Vec<_>) =
            whole(size).into_iter().map(|event| (event.bytes, event.data)).unzip();
        assert_eq!(data, expected, "chunks of {size}");
        assert_eq!(bytes.concat(), stream, "everything is passed on, unchanged");
    }
}

#[test]
fn an_event_without_an_end_is_not_kept_for_ever() {
    let mut events = Events::default();
    let passed: usize =
        (0..300).flat_map(|_| events.push(&[b'x'; 8_192])).map(|event| event.bytes.len()).sum();
    let left = events.finish().map_or(0, |event| event.bytes.len());
    assert_eq!(passed + left, 300 * 8_192);
    assert!(left <= 1 << 20, "{left}");
}

/// The tokens of what a request asks.
pub(crate) fn estimate(request: &Value) -> u64 {
    prompt_tokens(&serde_json::from_str(&request.to_string()).expect("JSON"))
}

#[test]
fn prompts_are_estimated_from_their_text() {
    let settings = json!({ "model": "m", "max_tokens": 5, "n": 2, "stream": true });
    assert_eq!(estimate(&settings), 3);
    let messages = |messages: Value| estimate(&json!({ "model": "m", "messages": messages }));
    assert_eq!(messages(json!([])), 3 + 3);
    // Names and strings of 8, 4, 4, 7 and 6 bytes.
    assert_eq!(messages(json!([{ "role": "user", "content": "123456" }])), 3 + 10);
    let parts = json!([
        { "type": "text", "text": "1234" },
        { "type": "image_url", "image_url": { "url": "data:image/png;base64,AAAA" } },
    ]);
    assert_eq!(messages(json!([{ "role": "user", "content": parts }])), 3 + 21 + 1_000);
    let tool = json!({ "type": "function", "function": { "name": "now" } });
    assert_eq!(estimate(&json!({ "messages": [], "tools": [tool] })), 3 + 14);
}

/// Wherever a client puts it, what a model may be shown is in the estimate.
#[test]
fn no_part_of_a_request_is_left_out_of_the_estimate() {
    let long = "x".repeat(300_000);
    let role = json!([{ "role": long }]);
    let named = json!({ &long: 1 });
    let typed = json!({ "properties": { "type": { "description": long } } });
    let no_media = json!([{ "content": [{ "type": "text", "image_url": { "url": long } }] }]);
    let numbers: Vec<u32> = (100_000..150_000).collect();
    let twice = format!(r#"{{"messages":[{{"content":"{long}","content":"a"}}]}}"#);
    for request in [
        json!({ "messages": role }),
        json!({ "messages": no_media }),
        json!({ "messages": [], "response_format": { "json_schema": { "description": long } } }),
        json!({ "messages": [], "functions": [{ "description": long }] }),
        json!({ "messages": [], "prediction": { "type": "content", "content": long } }),
        json!({ "messages": [], "tools": [{ "parameters": { "properties": named } }] }),
        json!({ "messages": [], "tools": [{ "parameters": typed }] }),
        json!({ "messages": [], "tools": [{ "parameters": { "enum": numbers } }] }),
        json!({ "messages": [], &long: 1 }),
    ] {
        let text = request.to_string();
        assert!(estimate(&request) >= text.len() as u64 / 4, "{}", &text[..99]);
    }
    let tokens = prompt_tokens(&serde_json::from_str(&twice).expect("JSON"));
    assert!(tokens >= twice.len() as u64 / 4, "{tokens}");

    // A recording of some size.
    let media = json!([{ "content": [{ "type": "file", "file": { "file_data": long } }] }]);
    let tokens = estimate(&json!({ "messages": media }));
    assert!((1_172..1_300).contains(&tokens), "{tokens}");
}

#[test]
fn the_bound_of_an_answer_is_what_all_of_them_may_take() {
    let bound = |request: Value| completion_tokens_max(&request);
    assert_eq!(bound(json!({})), Ok(None));
    assert_eq!(bound(json!({ "max_tokens": 7 })), Ok(Some(7)));
    assert_eq!(bound(json!({ "max_completion_tokens": 9, "max_tokens": 7, "n": 2 })), Ok(Some(18)));
    assert_eq!(bound(json!({ "max_completion_tokens": 1, "max_tokens": 7 })), Ok(Some(7)));
    assert_eq!(bound(json!({ "max_completion_tokens": 7, "max_tokens": null })), Ok(Some(7)));
    assert_eq!(bound(json!({ "max_tokens": u64::MAX, "n": 2 })), Ok(Some(u64::MAX)));
    for bad in [json!({ "max_tokens": -1 }), json!({ "n": "x" }), json!({ "max_tokens": 1.5 })] {
        assert!(bound(bad.clone()).is_err(), "{bad}");
    }
}

#[test]
fn what_is_no_stream_is_told_from_a_stream_without_data() {
    let data = |text: &str| {
        let mut events = Events::default();
        let mut found = events.push(text.as_bytes());
        found.extend(events.finish());
        found.into_iter().map(|event| event.data).collect::<Vec<_>>()
    };
    for nothing in ["\n", ": x\n\n", "event: x\nid: 1\n\n", "retry: 5\r\n\r\n", "data:\n\n"] {
        assert_eq!(data(nothing), [Data::Nothing], "{nothing:?}");
    }
    for unread in ["<p>\n\n", "x", "data: x\n\n", "data: x\ny\n\n", "{\"a\":"] {
        assert_eq!(data(unread), [Data::Unread], "{unread:?}");
    }
    let whole = Data::Json(json!({ "a": [1] }));
    assert_eq!(data("{\n  \"a\": [\n    1\n  ]\n}\n"), [whole], "a whole answer");
}

#[test]
fn a_bound_has_the_name_that_the_host_knows() {
    assert_eq!(bound_name(Some("api.openai.com")), "max_completion_tokens");
    for host in [None, Some("127.0.0.1"), Some("api.openai.com.example")] {
        assert_eq!(bound_name(host), "max_tokens", "{host:?}");
    }
}

#[test]
fn what_was_produced_is_counted_by_pieces_or_by_length() {
    let mut produced = Produced::default();
    let delta = |delta: Value| json!({ "choices": [{ "delta": delta }] });
    produced.add(&delta(json!({ "role": "assistant", "content": "" })), 90);
    assert_eq!(produced.tokens(), 0);
    produced.add(&delta(json!({ "content": "a" })), 90);
    produced.add(&delta(json!({ "content": "b" })), 90);
    assert_eq!(produced.tokens(), 2);
    produced.add(&delta(json!({ "content": "a longer piece of text" })), 90);
    assert_eq!(produced.tokens(), 6);
    let mut produced = Produced::default();
    produced.add(
        &json!({ "choices": [{ "message": { "role": "assistant", "content": "12345" } }] }),
        90,
    );
    assert_eq!(produced.tokens(), 2);
    // What else comes counts by its bytes.
    produced.add_unread(9);
    produced.add(&json!({ "output": "1234" }), 17);
    assert_eq!((produced.tokens(), produced.is_unreadable()), (2 + 7, false));
}

#[test]
fn an_answer_is_unreadable_where_nothing_of_it_is_known() {
    let is_unreadable = |answer: Value| {
        let mut produced = Produced::default();
        assert!(!produced.is_unreadable(), "nothing came");
        produced.add(&answer, 9);
        produced.is_unreadable()
    };
    for unknown in [
        json!({}),
        json!([]),
        json!("text"),
        json!({ "output": "x" }),
        json!({ "error": null, "usage": null }),
        json!({ "usage": { "output_tokens": 9 } }),
        json!({ "choices": [{ "words": "x" }] }),
    ] {
        assert!(is_unreadable(unknown.clone()), "{unknown}");
    }
    for known in [
        json!({ "choices": [] }),
        json!({ "choices": [{ "delta": {} }] }),
        json!({ "usage": { "total_tokens": 0 } }),
        json!({ "error": { "message": "x" } }),
    ] {
        assert!(!is_unreadable(known.clone()), "{known}");
    }
}
