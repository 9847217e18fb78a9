//! The endpoints.
//!
//! [`waits`](super::waits) says on which threads they run.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::HttpBody as _;
use axum::extract::rejection::PathRejection;
use axum::extract::{FromRequest, Path, Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::time::timeout;
use tollgate::{
    Clock as _, Consume, Decision, Error, HealthLevel, Overrun, Quota, QuotaId, SinkStatus,
    SystemClock, Timestamp, Tollgate, Usage,
};

use crate::definition::{OverrunName, WindowName, describe};
use crate::http::App;
use crate::http::auth::has_token;
use crate::http::errors::ApiError;
use crate::http::idempotency::RequestKey;
use crate::http::limits::{self, Standing};
use crate::http::object::Object;
use crate::http::waits::{in_memory, on_disk, report, run, run_many};

pub(super) type ApiResult<T> = Result<T, ApiError>;
pub(super) type Body<T> = Result<InTime<T>, ApiError>;
type UserAndQuota = Result<Path<(u64, String)>, PathRejection>;

/// A client has this long to send the body of a request.
pub(super) const BODY_TIME_MAX: Duration = Duration::from_secs(30);

/// A body of JSON that came in time.
#[derive(Debug)]
pub(crate) struct InTime<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for InTime<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> ApiResult<Self> {
        match timeout(BODY_TIME_MAX, Json::from_request(request, state)).await {
            Ok(body) => {
                let Json(Object(body)) = body?;
                Ok(Self(body))
            }
            Err(_) => Err(ApiError::slow_body(BODY_TIME_MAX)),
        }
    }
}

/// A body that may be left out, which says what the default says.
#[derive(Debug)]
pub(crate) struct IfAny<T>(pub(super) T);

impl<T: DeserializeOwned + Default, S: Send + Sync> FromRequest<S> for IfAny<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> ApiResult<Self> {
        if request.body().is_end_stream() {
            return Ok(Self(T::default()));
        }
        InTime::from_request(request, state).await.map(|InTime(body)| Self(body))
    }
}

/// A quota, as defined over HTTP.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DefineRequest {
    name: String,
    limit: u64,
    #[serde(default)]
    window: WindowName,
    #[serde(default)]
    utc_offset_minutes: i16,
    #[serde(default)]
    decimals: u8,
    /// Charge where it is missing and the quota is new, as it was where there is one.
    overrun: Option<OverrunName>,
    /// Leaves a quota that is defined as it is.
    #[serde(default)]
    if_absent: bool,
}

/// Who uses how much of what.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct OperationRequest {
    pub(super) user: u64,
    pub(super) quota: String,
    #[serde(default = "one")]
    pub(super) amount: u64,
    /// Durable before the answer.
    #[serde(default)]
    pub(super) sync: bool,
}

pub(super) fn one() -> u64 {
    1
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct BatchRequest {
    items: Vec<Object<OperationRequest>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LimitRequest {
    limit: u64,
}

impl App {
    pub(super) fn quota(&self, name: &str) -> ApiResult<(QuotaId, Quota)> {
        let id = self.gate.quota_by_name(name).ok_or_else(|| ApiError::unknown_quota(name))?;
        Ok((id, self.gate.quota(id)?))
    }
}

pub(super) fn usage_json(usage: &Usage) -> Value {
    json!({
        "used": usage.used,
        "reserved": usage.reserved,
        "limit": usage.limit,
        "remaining": usage.remaining,
        "window_start": usage.window_start.map(|at| at.to_string()),
        "resets_at": usage.resets_at.map(|at| at.to_string()),
    })
}

pub(super) fn decision_json(decision: &Decision, now: Timestamp) -> Value {
    json!({
        "allowed": decision.is_allowed(),
        "used": decision.used,
        "limit": decision.limit,
        "remaining": decision.remaining,
        "resets_at": decision.resets_at.map(|at| at.to_string()),
        "retry_after_ms": limits::wait(decision, now).map(|wait| wait.as_millis()),
    })
}

pub(super) fn decision_status(is_allowed: bool) -> StatusCode {
    if is_allowed { StatusCode::OK } else { StatusCode::TOO_MANY_REQUESTS }
}

/// 200, or 429 with when to come back.
fn answer(quota: &Quota, decision: &Decision) -> Response {
    let now = SystemClock.now();
    let standing = Standing::decided(quota, decision);
    let headers = limits::headers(&[standing], limits::wait(decision, now), now);
    let body = Json(decision_json(decision, now));
    (decision_status(decision.is_allowed()), headers, body).into_response()
}

pub(super) fn usage_answer(quota: &Quota, usage: &Usage) -> Response {
    let headers = limits::headers(&[Standing::used(quota, usage)], None, SystemClock.now());
    (headers, Json(usage_json(usage))).into_response()
}

/// `POST /v1/quotas`
pub(crate) async fn define(
    State(app): State<Arc<App>>,
    body: Body<DefineRequest>,
) -> ApiResult<Json<Value>> {
    let InTime(request) = body?;
    let quota = Quota::new(request.name, request.limit)
        .window(request.window.into())
        .utc_offset_minutes(request.utc_offset_minutes)
        .decimals(request.decimals);
    quota.validate()?;
    let overrun = request.overrun.map(Overrun::from);
    let id = on_disk(&app, move |gate| {
        let present = || gate.quota(gate.quota_by_name(quota.name())?).ok();
        let overrun = overrun.or_else(|| Some(present()?.overrun_policy())).unwrap_or_default();
        let quota = quota.overrun(overrun);
        Ok(if request.if_absent { gate.define_if_absent(quota) } else { gate.define(quota) })
    });
    let id = id.await?;
    let id = id.map_err(ApiError::refused_definition)?;
    Ok(Json(describe(id, &app.gate.quota(id)?)))
}

/// Waits for the disk, where that was asked for.
pub(super) fn sync_if(is_asked: bool, gate: &Tollgate) -> Result<(), Error> {
    if is_asked { gate.sync() } else { Ok(()) }
}

/// `GET /v1/quotas`
pub(crate) async fn quotas(State(app): State<Arc<App>>) -> ApiResult<Json<Value>> {
    let mut quotas = Vec::new();
    for id in app.gate.quotas() {
        quotas.push(describe(id, &app.gate.quota(id)?));
    }
    Ok(Json(json!({ "quotas": quotas })))
}

/// `POST /v1/check`
pub(crate) async fn check(
    State(app): State<Arc<App>>,
    body: Body<OperationRequest>,
) -> ApiResult<Response> {
    let InTime(request) = body?;
    if request.sync {
        return Err(ApiError::bad_request("a check changes nothing: it has no sync"));
    }
    let (id, quota) = app.quota(&request.quota)?;
    // Before it denies, it releases expired reservations, which needs room in the log: so a check
    // may wait too.
    let check = in_memory(&app, move |gate| gate.check(request.user, id, request.amount));
    Ok(answer(&quota, &check.await?))
}

/// `POST /v1/try-consume`
pub(crate) async fn try_consume(
    State(app): State<Arc<App>>,
    RequestKey(key): RequestKey,
    body: Body<OperationRequest>,
) -> ApiResult<Response> {
    let InTime(OperationRequest { user, quota, amount, sync }) = body?;
    let (id, quota) = app.quota(&quota)?;
    let decision = run(&app, sync, move |gate| match key {
        Some(key) => {
            let decision = gate.try_consume_once(key, user, id, amount)?;
            sync_if(sync, gate)?;
            Ok(decision)
        }
        None if sync => gate.try_consume_sync(user, id, amount),
        None => gate.try_consume(user, id, amount),
    });
    let decision = decision.await?;
    Ok(answer(&quota, &decision))
}

/// `POST /v1/consume`
pub(crate) async fn consume(
    State(app): State<Arc<App>>,
    RequestKey(key): RequestKey,
    body: Body<OperationRequest>,
) -> ApiResult<Response> {
    let InTime(OperationRequest { user, quota, amount, sync }) = body?;
    let (id, quota) = app.quota(&quota)?;
    let usage = run(&app, sync, move |gate| match key {
        Some(key) => {
            let usage = gate.consume_once(key, user, id, amount)?;
            sync_if(sync, gate)?;
            Ok(usage)
        }
        None if sync => gate.consume_sync(user, id, amount),
        None => gate.consume(user, id, amount),
    });
    let usage = usage.await?;
    Ok(usage_answer(&quota, &usage))
}

/// `POST /v1/consume-batch`
pub(crate) async fn consume_batch(
    State(app): State<Arc<App>>,
    key: RequestKey,
    body: Body<BatchRequest>,
) -> ApiResult<Json<Value>> {
    key.refuse()?;
    let InTime(request) = body?;
    let mut items = Vec::with_capacity(request.items.len());
    for Object(OperationRequest { user, quota, amount, sync }) in request.items {
        if sync {
            return Err(ApiError::bad_request("an item has no sync; POST /v1/sync afterwards"));
        }
        items.push(Consume { user, quota: app.quota(&quota)?.0, amount });
    }
    let usages = run_many(&app, move |gate| gate.consume_batch(&items)).await?;
    Ok(Json(json!({ "usages": usages.iter().map(usage_json).collect::<Vec<_>>() })))
}

/// `POST /v1/refund`
pub(crate) async fn refund(
    State(app): State<Arc<App>>,
    key: RequestKey,
    body: Body<OperationRequest>,
) -> ApiResult<Json<Value>> {
    key.refuse()?;
    let InTime(OperationRequest { user, quota, amount, sync }) = body?;
    let (id, _) = app.quota(&quota)?;
    let given_back = run(&app, sync, move |gate| {
        let given_back = gate.refund(user, id, amount)?;
        sync_if(sync, gate)?;
        Ok(given_back)
    });
    let given_back = given_back.await?;
    let usage = app.gate.usage(user, id)?;
    Ok(Json(json!({ "given_back": given_back, "usage": usage_json(&usage) })))
}

/// `GET /v1/users/{user}/quotas/{quota}`
pub(crate) async fn usage(State(app): State<Arc<App>>, path: UserAndQuota) -> ApiResult<Response> {
    let Path((user, name)) = path?;
    let (id, quota) = app.quota(&name)?;
    usage_and_limit(&app, user, id, &quota)
}

/// A usage, and the user's own limit.
fn usage_and_limit(app: &App, user: u64, id: QuotaId, quota: &Quota) -> ApiResult<Response> {
    let usage = app.gate.usage(user, id)?;
    let mut json = usage_json(&usage);
    json["own_limit"] = json!(app.gate.own_limit(user, id)?);
    let headers = limits::headers(&[Standing::used(quota, &usage)], None, SystemClock.now());
    Ok((headers, Json(json)).into_response())
}

/// `PUT /v1/users/{user}/quotas/{quota}/limit`
pub(crate) async fn set_limit(
    State(app): State<Arc<App>>,
    path: UserAndQuota,
    body: Body<LimitRequest>,
) -> ApiResult<Response> {
    let Path((user, name)) = path?;
    let InTime(LimitRequest { limit }) = body?;
    let (id, quota) = app.quota(&name)?;
    on_disk(&app, move |gate| gate.set_limit(user, id, limit)).await?;
    usage_and_limit(&app, user, id, &quota)
}

/// `DELETE /v1/users/{user}/quotas/{quota}/limit`
pub(crate) async fn clear_limit(
    State(app): State<Arc<App>>,
    path: UserAndQuota,
) -> ApiResult<Response> {
    let Path((user, name)) = path?;
    let (id, quota) = app.quota(&name)?;
    on_disk(&app, move |gate| gate.clear_limit(user, id)).await?;
    usage_and_limit(&app, user, id, &quota)
}

/// `POST /v1/sync`
pub(crate) async fn sync(State(app): State<Arc<App>>) -> ApiResult<Json<Value>> {
    let stats = on_disk(&app, |gate| gate.sync().map(|()| gate.stats())).await?;
    Ok(Json(json!({ "durable_batch": stats.durable_batch })))
}

/// `POST /v1/snapshot`
pub(crate) async fn snapshot(State(app): State<Arc<App>>) -> ApiResult<Json<Value>> {
    let stats = on_disk(&app, |gate| gate.snapshot().map(|()| gate.stats())).await?;
    Ok(Json(json!({ "snapshot_batch": stats.snapshot_batch })))
}

/// `GET /health`: 200 while promises are kept, 503 once they are not. The reasons may name files
/// and repeat what a database said: they are for those who have the token.
pub(crate) async fn health(State(app): State<Arc<App>>, headers: HeaderMap) -> Response {
    let health = app.gate.health();
    let status = match health.level() {
        HealthLevel::Healthy | HealthLevel::Degraded => StatusCode::OK,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    };
    let mut body = json!({ "level": health.level().to_string() });
    if has_token(&app, &headers) {
        let reasons = health.reasons.iter().map(ToString::to_string);
        body["reasons"] = json!(reasons.collect::<Vec<_>>());
    }
    (status, Json(body)).into_response()
}

fn sink_json(sink: &SinkStatus) -> Value {
    json!({
        "name": sink.name,
        "attached": sink.is_attached,
        "condition": sink.condition.to_string(),
        "position": sink.position.map(|at| at.batch),
        "lag_batches": sink.lag_batches,
        "lag_ms": sink.lag.as_millis(),
        "backlog_bytes": sink.backlog_bytes,
        "deliveries": sink.deliveries,
        "rows": sink.rows,
        "events": sink.events,
        "failures": sink.failures,
        "last_error": sink.last_error,
        "last_delivery": sink.last_delivery.map(|at| at.to_string()),
    })
}

/// `GET /stats`
pub(crate) async fn stats(State(app): State<Arc<App>>) -> ApiResult<Json<Value>> {
    report(&app, |app| Json(stats_json(app))).await
}

fn stats_json(app: &App) -> Value {
    let stats = app.gate.stats();
    json!({
        "total": stats.total,
        "processed": stats.processed,
        "failed": stats.failed,
        "unlogged": stats.unlogged,
        "denied": stats.denied,
        "batches": stats.batches,
        "backpressure_waits": stats.backpressure_waits,
        "backlog": stats.backlog,
        "backlog_max": stats.backlog_max,
        "counters": stats.counters,
        "quotas": stats.quotas,
        "syncs": stats.syncs,
        "syncs_rescued": stats.syncs_rescued,
        "clock_jumps": stats.clock_jumps,
        "last_sync": stats.last_sync.map(|at| at.to_string()),
        "last_sync_us": stats.last_sync_duration.as_micros(),
        "durable_batch": stats.durable_batch,
        "bytes_to_disk": stats.bytes_to_disk,
        "journal_bytes": stats.journal_bytes,
        "snapshot_bytes": stats.snapshot_bytes,
        "snapshot_batch": stats.snapshot_batch,
        "snapshots": stats.snapshots,
        "reservations": stats.reservations,
        "reservations_expired": stats.reservations_expired,
        "answers": stats.answers,
        "answers_forgotten_early": stats.answers_forgotten_early,
        "sinks": app.gate.sinks().iter().map(sink_json).collect::<Vec<_>>(),
        "http_requests": app.metrics.requests(),
    })
}
