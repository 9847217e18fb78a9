//! The pure parts of the example.

use serde_json::{Value, json};

use crate::estimate::{Produced, completion_tokens_max, prompt_tokens};
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
        Data::Other,
        Data::Json(json!({ "b": 2 })),
        Data::Done,
        Data::Other,
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

#[test]
fn prompts_are_estimated_from_their_text() {
    let messages = |messages: Value| prompt_tokens(&json!({ "model": "m", "messages": messages }));
    assert_eq!(messages(json!([])), 3);
    assert_eq!(messages(json!([{ "role": "user", "content": "123456" }])), 3 + 4 + 2);
    let parts = json!([
        { "type": "text", "text": "1234" },
        { "type": "image_url", "image_url": { "url": "data:image/png;base64,AAAA" } },
    ]);
    assert_eq!(messages(json!([{ "role": "user", "content": parts }])), 3 + 4 + 2 + 1_000);
    let tool = json!({ "type": "function", "function": { "name": "now" } });
    assert_eq!(prompt_tokens(&json!({ "messages": [], "tools": [tool] })), 3 + 1);
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
fn what_was_produced_is_counted_by_pieces_or_by_length() {
    let mut produced = Produced::default();
    let delta = |delta: Value| json!({ "choices": [{ "delta": delta }] });
    produced.add(&delta(json!({ "role": "assistant", "content": "" })));
    assert_eq!(produced.tokens(), 0);
    produced.add(&delta(json!({ "content": "a" })));
    produced.add(&delta(json!({ "content": "b" })));
    assert_eq!(produced.tokens(), 2);
    produced.add(&delta(json!({ "content": "a longer piece of text" })));
    assert_eq!(produced.tokens(), 6);
    let mut produced = Produced::default();
    produced
        .add(&json!({ "choices": [{ "message": { "role": "assistant", "content": "12345" } }] }));
    assert_eq!(produced.tokens(), 2);
}
