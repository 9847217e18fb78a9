//! A small upstream to try the gateway against: it says one word a token, and counts them.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use axum::routing::post;
use axum::{Json, Router};
use hyper::body::{Bytes, Frame};
use serde_json::{Value, json};
use tokio::sync::mpsc;

const WORDS: [&str; 12] = [
    "what",
    " is",
    " reserved",
    " first",
    " and",
    " counted",
    " afterwards",
    " is",
    " never",
    " more",
    " than",
    " allowed",
];
const TOKENS_DEFAULT: u64 = 24;
const TOKENS_MAX: u64 = 1_000;
const WORD_TIME: Duration = Duration::from_millis(40);

pub(crate) fn router() -> Router {
    Router::new().route("/v1/chat/completions", post(complete))
}

fn words() -> impl Iterator<Item = &'static str> {
    WORDS.into_iter().cycle()
}

async fn complete(Json(request): Json<Value>) -> Response {
    let tokens = request["max_tokens"].as_u64().or(request["max_completion_tokens"].as_u64());
    let tokens = tokens.unwrap_or(TOKENS_DEFAULT).clamp(1, TOKENS_MAX);
    let usage = usage(&request, tokens);
    if request["stream"] == true {
        let with_usage = request["stream_options"]["include_usage"] == true;
        return stream(tokens, with_usage.then_some(usage));
    }
    tokio::time::sleep(WORD_TIME).await;
    let count = usize::try_from(tokens).unwrap_or(usize::MAX);
    let text: String = words().take(count).collect();
    let message = json!({ "role": "assistant", "content": text });
    let choice = json!({ "index": 0, "message": message, "finish_reason": "stop" });
    Json(json!({ "object": "chat.completion", "choices": [choice], "usage": usage }))
        .into_response()
}

fn usage(request: &Value, completion: u64) -> Value {
    let messages = request["messages"].as_array().map_or(&[][..], Vec::as_slice);
    let contents = messages.iter().filter_map(|message| message["content"].as_str());
    let prompt: u64 = contents.map(|text| text.split_whitespace().count() as u64).sum();
    json!({
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    })
}

/// An event a word.
fn stream(tokens: u64, usage: Option<Value>) -> Response {
    let (client, events) = mpsc::channel(1);
    tokio::spawn(async move {
        for (_, word) in (0..tokens).zip(words()) {
            let choice = json!({ "index": 0, "delta": { "content": word }, "finish_reason": null });
            let event = json!({ "object": "chat.completion.chunk", "choices": [choice] });
            if client.send(event.to_string()).await.is_err() {
                // Nobody listens any more.
                return;
            }
            tokio::time::sleep(WORD_TIME).await;
        }
        if let Some(usage) = usage {
            let event = json!({ "object": "chat.completion.chunk", "choices": [], "usage": usage });
            let _ = client.send(event.to_string()).await;
        }
        let _ = client.send("[DONE]".to_owned()).await;
    });
    ([(CONTENT_TYPE, "text/event-stream")], Body::new(Streamed { events })).into_response()
}

struct Streamed {
    events: mpsc::Receiver<String>,
}

impl hyper::body::Body for Streamed {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let event = self.events.poll_recv(context);
        event.map(|event| Some(Ok(Frame::data(format!("data: {}\n\n", event?).into()))))
    }
}
