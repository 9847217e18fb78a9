//! The routes: a chat completion is reserved, forwarded and charged; anyone can ask for their
//! usage.

use std::collections::BTreeMap;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, FromRequest as _, FromRequestParts, State};
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE, RETRY_AFTER};
use axum::http::request::Parts;
use axum::http::{HeaderValue, Request, StatusCode, Uri};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Frame, Incoming};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tollgate::{AMOUNT_MAX, Consume, Decisions, Tollgate};

use crate::accounts::{Account, Accounts};
use crate::estimate::{completion_tokens_max, prompt_tokens};
use crate::metering::Metered;
use crate::sse::{Data, Events};

const REQUEST_BYTES_MAX: usize = 8 << 20;
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// A whole answer may take this long until it begins.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(600);
/// Events on their way to a client that reads slowly; then the upstream is read slowly too.
const EVENTS_UNDER_WAY: usize = 16;
/// For requests that set no bound of their own: there must be one to be reserved.
const COMPLETION_TOKENS_DEFAULT: u64 = 1_024;

pub(crate) type Upstream = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// What all requests share.
pub(crate) struct Gateway {
    pub(crate) gate: Tollgate,
    pub(crate) accounts: Accounts,
    pub(crate) client: Upstream,
    /// Where completions are asked for.
    pub(crate) upstream: Uri,
    /// How this gateway proves itself there.
    pub(crate) upstream_authorization: Option<HeaderValue>,
    /// The field that bounds an answer, for requests that have none.
    pub(crate) bound_name: String,
    pub(crate) ttl: Duration,
    /// A stream may stand still for this long: the upstream that sends it, or the client that reads
    /// it. The body of a request may take as long.
    pub(crate) silence_max: Duration,
}

pub(crate) fn router(gateway: Arc<Gateway>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(complete))
        .route("/v1/usage", get(usage))
        .fallback(|| async { unknown_url(StatusCode::NOT_FOUND, "there is nothing at this path") })
        .method_not_allowed_fallback(|| async {
            unknown_url(StatusCode::METHOD_NOT_ALLOWED, "this path does not answer this method")
        })
        .layer(DefaultBodyLimit::max(REQUEST_BYTES_MAX))
        .with_state(gateway)
}

/// An error in the form that clients of the API know.
fn refuse(status: StatusCode, code: &str, message: &str) -> Response {
    let error = json!({ "message": message, "type": code, "param": null, "code": code });
    (status, axum::Json(json!({ "error": error }))).into_response()
}

fn unknown_url(status: StatusCode, message: &str) -> Response {
    refuse(status, "unknown_url", message)
}

/// From the head of the request: without a key that is known, no body is read.
impl FromRequestParts<Arc<Gateway>> for Account {
    type Rejection = Response;

    async fn from_request_parts(
        parts: &mut Parts,
        gateway: &Arc<Gateway>,
    ) -> Result<Self, Response> {
        let authorization = parts.headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        // The scheme's name is case-insensitive (RFC 9110, 11.1).
        let key = authorization
            .and_then(|value| value.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("Bearer"))
            .map(|(_, key)| key);
        key.and_then(|key| gateway.accounts.get(key)).cloned().ok_or_else(|| {
            refuse(StatusCode::UNAUTHORIZED, "invalid_api_key", "this API key is not known")
        })
    }
}

/// The body of a request, if it comes in time.
async fn body(request: Request<Body>, time_max: Duration) -> Result<Bytes, Response> {
    let code = "invalid_request_error";
    match timeout(time_max, Bytes::from_request(request, &())).await {
        Ok(Ok(body)) => Ok(body),
        Ok(Err(rejection)) => Err(refuse(rejection.status(), code, &rejection.body_text())),
        Err(_) => Err(refuse(StatusCode::REQUEST_TIMEOUT, code, "the body takes too long")),
    }
}

/// What a request asks for, and what is sent on for it: what the client has sent, but for the fields
/// that are set here. The order of a schema's fields is that in which a model answers.
struct Ask {
    request: BTreeMap<String, Box<RawValue>>,
    is_stream: bool,
    /// The client did not ask for the stream's usage: it gets the stream without.
    hides_usage: bool,
    prompt_tokens: u64,
    tokens: u64,
}

impl Ask {
    fn parse(body: &[u8], bound_name: &str) -> Result<Self, String> {
        let text = |error: serde_json::Error| error.to_string();
        let mut request: BTreeMap<String, Box<RawValue>> =
            serde_json::from_slice(body).map_err(text)?;
        let mut fields: Value = serde_json::from_slice(body).map_err(text)?;
        if !fields["messages"].is_array() {
            return Err("messages is no list".to_owned());
        }
        let mut set = |fields: &mut Value, name: &str, value: Value| {
            request.insert(name.to_owned(), to_raw_value(&value).map_err(text)?);
            fields[name] = value;
            Ok::<_, String>(())
        };
        let prompt_tokens = prompt_tokens(&serde_json::from_slice(body).map_err(text)?);
        let completion = if let Some(tokens) = completion_tokens_max(&fields)? {
            tokens
        } else {
            set(&mut fields, bound_name, json!(COMPLETION_TOKENS_DEFAULT))?;
            completion_tokens_max(&fields)?.unwrap_or(COMPLETION_TOKENS_DEFAULT)
        };
        let is_stream = match &fields["stream"] {
            Value::Null => false,
            Value::Bool(is_stream) => *is_stream,
            // Upstreams may take it for the one or the other.
            _ => return Err("stream is neither true nor false".to_owned()),
        };
        let mut hides_usage = false;
        if is_stream {
            hides_usage = fields["stream_options"]["include_usage"] != true;
            let mut options = fields["stream_options"].take();
            if !options.is_object() {
                options = json!({});
            }
            options["include_usage"] = json!(true);
            set(&mut fields, "stream_options", options)?;
        }
        let tokens = prompt_tokens.saturating_add(completion).min(AMOUNT_MAX);
        Ok(Self { request, is_stream, hides_usage, prompt_tokens, tokens })
    }
}

/// `POST /v1/chat/completions`
async fn complete(
    State(gateway): State<Arc<Gateway>>,
    account: Account,
    request: Request<Body>,
) -> Response {
    let body = match body(request, gateway.silence_max).await {
        Ok(body) => body,
        Err(refusal) => return refusal,
    };
    let ask = match Ask::parse(&body, &gateway.bound_name) {
        Ok(ask) => ask,
        Err(message) => {
            return refuse(StatusCode::BAD_REQUEST, "invalid_request_error", &message);
        }
    };
    // Answered from memory: nothing that would need a thread of its own.
    let counters = gateway.accounts.counters(&account, ask.tokens);
    let metered = match Metered::reserve(&gateway.gate, counters, ask.prompt_tokens, gateway.ttl) {
        Ok(Ok(metered)) => metered,
        Ok(Err(decisions)) => return over_budget(&account, ask.tokens, &decisions),
        // Too many are open, or the log has no room: nothing was reserved.
        Err(error) => {
            let mut refusal =
                refuse(StatusCode::SERVICE_UNAVAILABLE, "overloaded", &error.to_string());
            refusal.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
            return refusal;
        }
    };
    // A task of its own, which goes on when the client goes away: what an answer cost is known when
    // it has come.
    let forwarding = tokio::spawn(async move { forward(&gateway, metered, ask).await });
    forwarding.await.unwrap_or_else(|_| {
        refuse(StatusCode::INTERNAL_SERVER_ERROR, "interrupted", "the request was interrupted")
    })
}

/// 429, with who has no budget left, and when there is one again.
fn over_budget(account: &Account, tokens: u64, decisions: &Decisions) -> Response {
    let index = decisions.refused().unwrap_or(0);
    let who = match index {
        0 => "this API key".to_owned(),
        _ => format!("the organisation {:?}", account.organisation),
    };
    let (remaining, limit) = decisions.get(index).map_or((0, 0), |it| (it.remaining, it.limit));
    let message = format!(
        "the request may take {tokens} tokens; {who} has {remaining} of {limit} left, \
         without what requests under way have reserved"
    );
    let code = if decisions.retry_after().is_some() {
        "rate_limit_exceeded"
    } else {
        // More than the whole budget, or a budget that never starts anew: waiting does not help.
        "insufficient_quota"
    };
    let mut refusal = refuse(StatusCode::TOO_MANY_REQUESTS, code, &message);
    if let Some(seconds) = decisions.retry_after_secs() {
        refusal.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    refusal
}

/// Asks the upstream, and gives its answer.
async fn forward(gateway: &Gateway, mut metered: Metered, ask: Ask) -> Response {
    let mut request = Request::post(&gateway.upstream).header(CONTENT_TYPE, "application/json");
    if let Some(authorization) = &gateway.upstream_authorization {
        request = request.header(AUTHORIZATION, authorization);
    }
    let unreachable =
        |why: &str| refuse(StatusCode::BAD_GATEWAY, "upstream", &format!("no answer: {why}"));
    let body = match serde_json::to_vec(&ask.request) {
        Ok(body) => Full::from(body),
        Err(error) => return unreachable(&error.to_string()),
    };
    let request = match request.body(body) {
        Ok(request) => request,
        Err(error) => return unreachable(&error.to_string()),
    };
    metered.begin();
    let asked = timeout(ANSWER_TIME_MAX, gateway.client.request(request));
    let (head, body) = match metered.keep_open(asked).await {
        Ok(Ok(answer)) => answer.into_parts(),
        Ok(Err(error)) => {
            if error.is_connect() {
                metered.take_back();
            }
            return unreachable(&error.to_string());
        }
        Err(_) => return unreachable("it takes too long"),
    };
    if !head.status.is_success() {
        metered.take_back();
    }
    let kind = head.headers.get(CONTENT_TYPE).cloned();
    let kind = kind.unwrap_or(HeaderValue::from_static("application/json"));
    if ask.is_stream && head.status.is_success() {
        let (client, parts) = mpsc::channel(EVENTS_UNDER_WAY);
        tokio::spawn(relay(metered, body, client, ask.hides_usage, gateway.silence_max));
        return (head.status, [(CONTENT_TYPE, kind)], Body::new(Relayed { parts })).into_response();
    }
    let whole = timeout(ANSWER_TIME_MAX, Limited::new(body, ANSWER_BYTES_MAX).collect());
    let bytes = match metered.keep_open(whole).await {
        Ok(Ok(whole)) => whole.to_bytes(),
        Ok(Err(error)) => return unreachable(&error.to_string()),
        Err(_) => return unreachable("it takes too long"),
    };
    match serde_json::from_slice(&bytes) {
        Ok(answer) => metered.observe(&answer, bytes.len()),
        Err(_) => metered.observe_unread(bytes.len()),
    }
    // Before the client has the answer, so that it finds itself charged.
    metered.settle();
    let mut response = (head.status, [(CONTENT_TYPE, kind)], bytes).into_response();
    if let Some(wait) = head.headers.get(RETRY_AFTER) {
        response.headers_mut().insert(RETRY_AFTER, wait.clone());
    }
    response
}

/// Passes a stream on, event by event. It is charged at the stream's end, and also where it is
/// broken off by either side: `metered` is dropped then.
async fn relay(
    mut metered: Metered,
    mut body: Incoming,
    client: mpsc::Sender<Part>,
    hides_usage: bool,
    silence_max: Duration,
) {
    let mut events = Events::default();
    loop {
        let frame = tokio::select! {
            // The client went away: the upstream is let go of, which makes it stop.
            () = client.closed() => return,
            frame = metered.keep_open(timeout(silence_max, body.frame())) => frame,
        };
        let (arrived, is_end) = match frame {
            Ok(Some(Ok(frame))) => match frame.into_data() {
                Ok(data) => (events.push(&data), false),
                Err(_trailers) => continue,
            },
            Ok(None) => (events.finish().into_iter().collect(), true),
            // The upstream broke off, or stands still.
            Ok(Some(Err(_))) | Err(_) => {
                // Before the client finds out.
                metered.settle();
                return;
            }
        };
        for event in arrived {
            match &event.data {
                Data::Json(answer) => {
                    metered.observe(answer, event.bytes.len());
                    let is_usage_only = answer["choices"].as_array().is_some_and(Vec::is_empty)
                        && answer["usage"].is_object();
                    if hides_usage && is_usage_only {
                        continue;
                    }
                }
                // Before the client reads the end, so that it finds itself charged.
                Data::Done => metered.settle(),
                Data::Unread => metered.observe_unread(event.bytes.len()),
                Data::Nothing => {}
            }
            let sent = timeout(silence_max, client.send(Part::Event(event.bytes.into())));
            match metered.keep_open(sent).await {
                Ok(Ok(())) => {}
                // The client is gone, or does not read: what is reserved is not kept for it.
                Ok(Err(_)) | Err(_) => return,
            }
        }
        if is_end {
            metered.settle();
            // A client that is gone, or does not read, needs no end.
            let _ = timeout(silence_max, client.send(Part::End)).await;
            return;
        }
    }
}

enum Part {
    Event(Bytes),
    End,
}

/// The body of a streamed answer. Where the parts stop without an end, the client finds its stream
/// broken off.
struct Relayed {
    parts: mpsc::Receiver<Part>,
}

impl hyper::body::Body for Relayed {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        self.parts.poll_recv(context).map(|part| match part {
            Some(Part::Event(event)) => Some(Ok(Frame::data(event))),
            Some(Part::End) => None,
            None => Some(Err(io::Error::other("the stream was broken off"))),
        })
    }
}

/// `GET /v1/usage`: what the caller and their organisation have used and reserved.
async fn usage(State(gateway): State<Arc<Gateway>>, account: Account) -> Response {
    let mut body = json!({});
    let counters = gateway.accounts.counters(&account, 0);
    for (name, Consume { user, quota, .. }) in ["key", "organisation"].into_iter().zip(counters) {
        let usage = match gateway.gate.usage(user, quota) {
            Ok(usage) => usage,
            Err(error) => {
                let message = error.to_string();
                return refuse(StatusCode::INTERNAL_SERVER_ERROR, "internal", &message);
            }
        };
        body[name] = json!({
            "used": usage.used,
            "reserved": usage.reserved,
            "limit": usage.limit,
            "remaining": usage.remaining,
            "resets_at": usage.resets_at.map(|at| at.to_string()),
        });
    }
    axum::Json(body).into_response()
}
