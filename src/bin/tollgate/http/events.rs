//! What is recorded for the sinks, as it is reported.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use serde::Deserialize;
use tollgate::{Clock as _, SystemClock, Timestamp, UsageEvent};

use crate::http::App;
use crate::http::api::{ApiResult, Body, InTime, sync_if, usage_answer};
use crate::http::errors::ApiError;
use crate::http::idempotency::RequestKey;
use crate::http::waits::run;

/// What was used.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RecordRequest {
    user: u64,
    quota: String,
    value: f64,
    /// When; now where it is missing.
    timestamp_ms: Option<u64>,
    #[serde(default)]
    metadata: BTreeMap<String, String>,
    /// Durable before the answer.
    #[serde(default)]
    sync: bool,
}

/// `POST /v1/record`
pub(crate) async fn record(
    State(app): State<Arc<App>>,
    RequestKey(request_id): RequestKey,
    body: Body<RecordRequest>,
) -> ApiResult<Response> {
    let InTime(RecordRequest { user, quota, value, timestamp_ms, metadata, sync }) = body?;
    let (id, quota) = app.quota(&quota)?;
    if timestamp_ms.is_some_and(|ms| ms > Timestamp::MAX.as_unix_millis()) {
        let message = format!("timestamp_ms is in milliseconds, at most {}", Timestamp::MAX);
        return Err(ApiError::bad_request(message));
    }
    let timestamp = timestamp_ms.map_or_else(|| SystemClock.now(), Timestamp::from_unix_millis);
    let mut event = UsageEvent::new(user, id, value, timestamp);
    (event.request_id, event.metadata) = (request_id, metadata);
    let usage = run(&app, sync, move |gate| {
        let usage = gate.record(&event)?;
        sync_if(sync, gate)?;
        Ok(usage)
    });
    let usage = usage.await?;
    Ok(usage_answer(&quota, &usage))
}
