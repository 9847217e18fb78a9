//! The endpoints of reservations, and of operations over several counters.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};
use tollgate::{
    Clock as _, Consume, Decisions, Error, Quota, ReservationId, Reserved, SystemClock, Timestamp,
    Tollgate,
};

use crate::http::App;
use crate::http::api::{
    ApiResult, Body, IfAny, InTime, OperationRequest, decision_json, decision_status, one, sync_if,
    usage_json,
};
use crate::http::errors::ApiError;
use crate::http::idempotency::RequestKey;
use crate::http::limits::{self, Standing};
use crate::http::object::Object;
use crate::http::waits::run;

/// Counters, and how much of each.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct GroupRequest {
    items: Vec<Object<OperationRequest>>,
    /// Durable before the answer.
    #[serde(default)]
    sync: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ReserveRequest {
    user: u64,
    quota: String,
    #[serde(default = "one")]
    amount: u64,
    ttl_ms: u64,
    #[serde(default)]
    sync: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ReserveAllRequest {
    items: Vec<Object<OperationRequest>>,
    ttl_ms: u64,
    #[serde(default)]
    sync: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CommitRequest {
    actual: Actual,
    #[serde(default)]
    sync: bool,
}

/// What a reservation cost.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "an amount, or a list of user, quota and amount for each counter")]
enum Actual {
    /// The same for each counter.
    Same(u64),
    /// An amount for each counter.
    Items(Vec<Object<CostRequest>>),
}

/// What a counter is charged.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct CostRequest {
    user: u64,
    quota: String,
    amount: u64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ExtendRequest {
    ttl_ms: u64,
    #[serde(default)]
    sync: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CancelRequest {
    #[serde(default)]
    sync: bool,
}

/// A counter of a group.
struct Item {
    consume: Consume,
    quota: Quota,
}

fn items(app: &App, requests: Vec<Object<OperationRequest>>) -> ApiResult<Vec<Item>> {
    let item = |Object(OperationRequest { user, quota, amount, sync })| {
        if sync {
            return Err(ApiError::bad_request("an item has no sync; the request has"));
        }
        let (id, quota) = app.quota(&quota)?;
        Ok(Item { consume: Consume { user, quota: id, amount }, quota })
    };
    requests.into_iter().map(item).collect()
}

fn costs_named(app: &App, costs: Vec<Object<CostRequest>>) -> ApiResult<Vec<Item>> {
    let item = |Object(CostRequest { user, quota, amount })| {
        let (id, quota) = app.quota(&quota)?;
        Ok(Item { consume: Consume { user, quota: id, amount }, quota })
    };
    costs.into_iter().map(item).collect()
}

/// Whose counter of what it is about.
fn name_counter(json: &mut Value, item: &Item) {
    json["user"] = json!(item.consume.user);
    json["quota"] = json!(item.quota.name());
}

fn consumes(items: &[Item]) -> Vec<Consume> {
    items.iter().map(|item| item.consume).collect()
}

/// `POST /v1/try-consume-all`
pub(crate) async fn try_consume_all(
    State(app): State<Arc<App>>,
    key: RequestKey,
    body: Body<GroupRequest>,
) -> ApiResult<Response> {
    key.refuse()?;
    let InTime(GroupRequest { items: requests, sync }) = body?;
    let items = items(&app, requests)?;
    let consumes = consumes(&items);
    let decisions = run(&app, sync, move |gate| {
        let decisions = gate.try_consume_all(&consumes)?;
        sync_if(sync && decisions.is_allowed(), gate)?;
        Ok(decisions)
    });
    let decisions = decisions.await?;
    Ok(group_answer(&items, &decisions))
}

/// 200, or 429 with which counter refused and when to come back.
fn group_answer(items: &[Item], decisions: &Decisions) -> Response {
    let now = SystemClock.now();
    let wait = limits::wait_for_all(decisions, now);
    let named = items.iter().zip(decisions.each());
    let each = named.clone().map(|(item, decision)| {
        let mut json = decision_json(&decision, now);
        name_counter(&mut json, item);
        json
    });
    let body = json!({
        "allowed": decisions.is_allowed(),
        "refused": decisions.refused(),
        "retry_after_ms": wait.map(|wait| wait.as_millis()),
        "decisions": each.collect::<Vec<_>>(),
    });
    let standings: Vec<_> =
        named.map(|(item, decision)| Standing::decided(&item.quota, &decision)).collect();
    let headers = limits::headers(&standings, wait, now);
    (decision_status(decisions.is_allowed()), headers, Json(body)).into_response()
}

/// `POST /v1/reserve`
pub(crate) async fn reserve(
    State(app): State<Arc<App>>,
    RequestKey(key): RequestKey,
    body: Body<ReserveRequest>,
) -> ApiResult<Response> {
    let InTime(ReserveRequest { user, quota, amount, ttl_ms, sync }) = body?;
    let (id, quota) = app.quota(&quota)?;
    let ttl = Duration::from_millis(ttl_ms);
    let item = Item { consume: Consume { user, quota: id, amount }, quota };
    if let Some(key) = key {
        // Under a key the reservation outlives this call: a repeat gets its id.
        let reserved = run(&app, sync, move |gate| {
            let (reserved, expires_at) =
                with_expiry(gate, gate.reserve_once(key, user, id, amount, ttl)?);
            let reserved = detached(reserved);
            sync_if(sync && reserved.is_ok(), gate)?;
            Ok((reserved, expires_at))
        });
        let (reserved, expires_at) = reserved.await?;
        return reserve_answer(&app, vec![item], reserved, expires_at);
    }
    let reserved = run(&app, sync, move |gate| {
        let reserved = gate.reserve(user, id, amount, ttl)?;
        sync_if(sync && reserved.is_open(), gate)?;
        Ok(with_expiry(gate, reserved))
    });
    let (reserved, expires_at) = reserved.await?;
    reserve_answer(&app, vec![item], detached(reserved), expires_at)
}

/// `POST /v1/reserve-all`
pub(crate) async fn reserve_all(
    State(app): State<Arc<App>>,
    key: RequestKey,
    body: Body<ReserveAllRequest>,
) -> ApiResult<Response> {
    key.refuse()?;
    let InTime(ReserveAllRequest { items: requests, ttl_ms, sync }) = body?;
    let items = items(&app, requests)?;
    let (consumes, ttl) = (consumes(&items), Duration::from_millis(ttl_ms));
    let reserved = run(&app, sync, move |gate| {
        let reserved = gate.reserve_all(&consumes, ttl)?;
        sync_if(sync && reserved.is_open(), gate)?;
        Ok(with_expiry(gate, reserved))
    });
    let (reserved, expires_at) = reserved.await?;
    reserve_answer(&app, items, detached(reserved), expires_at)
}

/// And when it expires. Not where it has ended: a repeated request may name one that has.
fn with_expiry(gate: &Tollgate, reserved: Reserved) -> (Reserved, Option<Timestamp>) {
    let expires_at = match &reserved {
        Reserved::Open(reservation) => expiry(gate, reservation.id()),
        Reserved::Denied(_) => None,
    };
    (reserved, expires_at)
}

fn expiry(gate: &Tollgate, id: ReservationId) -> Option<Timestamp> {
    gate.open_reservation(id).ok().map(|open| open.expires_at)
}

fn reservation_json(id: ReservationId, expires_at: Option<Timestamp>) -> Value {
    json!({
        "reservation": id.to_string(),
        "expires_at": expires_at.map(|at| at.to_string()),
    })
}

/// The reservation, which from here on lives by its id; or what was denied.
///
/// Until then dropping it gives it back: where it can't be made durable, or nobody waits for the
/// answer any more, nobody knows the id by which to do so.
fn detached(reserved: Reserved) -> Result<ReservationId, Decisions> {
    match reserved {
        Reserved::Open(reservation) => Ok(reservation.detach()),
        Reserved::Denied(decisions) => Err(decisions),
    }
}

/// 200 with the reservation, or as a refused group.
fn reserve_answer(
    app: &App,
    mut items: Vec<Item>,
    reserved: Result<ReservationId, Decisions>,
    expires_at: Option<Timestamp>,
) -> ApiResult<Response> {
    let id = match reserved {
        Ok(id) => id,
        Err(decisions) => return Ok(group_answer(&items, &decisions)),
    };
    // Each once, in the order of the request.
    let mut named = HashSet::new();
    items.retain(|Item { consume, .. }| named.insert((consume.quota, consume.user)));
    let mut counters = Vec::with_capacity(items.len());
    let mut standings = Vec::with_capacity(items.len());
    for item in &items {
        let usage = app.gate.usage(item.consume.user, item.consume.quota)?;
        let mut json = usage_json(&usage);
        name_counter(&mut json, item);
        counters.push(json);
        standings.push(Standing::used(&item.quota, &usage));
    }
    let headers = limits::headers(&standings, None, SystemClock.now());
    let mut body = reservation_json(id, expires_at);
    body["counters"] = json!(counters);
    Ok((headers, Json(body)).into_response())
}

type Id = Result<Path<String>, PathRejection>;

/// 32 hexadecimal digits, as the reservation's answer writes it.
fn id(path: Id) -> ApiResult<ReservationId> {
    let Path(text) = path?;
    text.parse().map_err(|_| ApiError::bad_path("a reservation's id is 32 hexadecimal digits"))
}

/// `GET /v1/reservations/{id}`
pub(crate) async fn read(State(app): State<Arc<App>>, path: Id) -> ApiResult<Json<Value>> {
    let id = id(path)?;
    // One whose time is over is released first, which needs room in the log.
    let open = run(&app, false, move |gate| gate.open_reservation(id)).await?;
    let mut counters = Vec::with_capacity(open.items.len());
    for consume in open.items {
        let item = Item { consume, quota: app.gate.quota(consume.quota)? };
        let mut json = json!({ "amount": consume.amount });
        name_counter(&mut json, &item);
        counters.push(json);
    }
    let mut body = reservation_json(id, Some(open.expires_at));
    body["counters"] = json!(counters);
    Ok(Json(body))
}

/// `POST /v1/reservations/{id}/commit`
pub(crate) async fn commit(
    State(app): State<Arc<App>>,
    path: Id,
    body: Body<CommitRequest>,
) -> ApiResult<Response> {
    let id = id(path)?;
    let InTime(CommitRequest { actual, sync }) = body?;
    let (amount, items) = match actual {
        Actual::Same(amount) => (amount, None),
        Actual::Items(costs) => (0, Some(costs_named(&app, costs)?)),
    };
    let costs = items.as_deref().map(consumes);
    let decisions = run(&app, sync, move |gate| {
        let committed = match &costs {
            None => gate.commit_reservation(id, amount),
            Some(costs) => gate.commit_reservation_items(id, costs),
        };
        let is_settled = match &committed {
            Ok(decisions) => decisions.is_allowed(),
            // By a request whose answer may have been lost, or not be there yet.
            Err(error) => matches!(error, Error::ReservationSettled { .. }),
        };
        sync_if(sync && is_settled, gate)?;
        committed
    });
    let decisions = decisions.await?;
    let now = SystemClock.now();
    let each = decisions.each().enumerate().map(|(index, decision)| {
        let mut json = decision_json(&decision, now);
        if let Some(item) = items.as_ref().and_then(|items| items.get(index)) {
            name_counter(&mut json, item);
        }
        json
    });
    let body = json!({
        "allowed": decisions.is_allowed(),
        "refused": decisions.refused(),
        "decisions": each.collect::<Vec<_>>(),
    });
    Ok((decision_status(decisions.is_allowed()), Json(body)).into_response())
}

/// `POST /v1/reservations/{id}/cancel`
pub(crate) async fn cancel(
    State(app): State<Arc<App>>,
    path: Id,
    body: Result<IfAny<CancelRequest>, ApiError>,
) -> ApiResult<Json<Value>> {
    let id = id(path)?;
    let IfAny(CancelRequest { sync }) = body?;
    let cancelled = run(&app, sync, move |gate| {
        let cancelled = gate.cancel_reservation(id);
        // By this request or another one: see `commit`.
        let is_settled = matches!(&cancelled, Ok(()) | Err(Error::ReservationSettled { .. }));
        sync_if(sync && is_settled, gate)?;
        cancelled
    });
    cancelled.await?;
    Ok(Json(json!({ "reservation": id.to_string() })))
}

/// `POST /v1/reservations/{id}/extend`
pub(crate) async fn extend(
    State(app): State<Arc<App>>,
    path: Id,
    body: Body<ExtendRequest>,
) -> ApiResult<Json<Value>> {
    let id = id(path)?;
    let InTime(ExtendRequest { ttl_ms, sync }) = body?;
    let ttl = Duration::from_millis(ttl_ms);
    let extended = run(&app, sync, move |gate| {
        gate.extend_reservation(id, ttl)?;
        sync_if(sync, gate)?;
        Ok(expiry(gate, id))
    });
    Ok(Json(reservation_json(id, extended.await?)))
}
