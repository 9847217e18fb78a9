//! The engine behind HTTP/JSON. `docs/http.md` describes it for those who call it.

mod api;
pub(crate) mod auth;
mod errors;
mod events;
mod groups;
mod idempotency;
mod limits;
pub(crate) mod metrics;
mod object;
#[cfg(test)]
mod tests;
mod threads;
pub(crate) mod waits;

use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::middleware;
use axum::routing::{get, post, put};
use tollgate::Tollgate;

use crate::http::auth::Access;
use crate::http::metrics::Metrics;
use crate::http::waits::Waits;

/// The largest body that is read.
pub(crate) const BODY_BYTES_MAX: usize = 64 << 10;

/// What all requests share.
#[derive(Debug)]
pub(crate) struct App {
    pub(crate) gate: Tollgate,
    pub(crate) access: Access,
    pub(crate) metrics: Metrics,
    pub(crate) waits: Waits,
}

/// All routes.
pub(crate) fn router(app: Arc<App>) -> Router {
    let api = Router::new()
        .route("/v1/quotas", get(api::quotas).post(api::define))
        .route("/v1/check", post(api::check))
        .route("/v1/try-consume", post(api::try_consume))
        .route("/v1/consume", post(api::consume))
        .route("/v1/consume-batch", post(api::consume_batch))
        .route("/v1/refund", post(api::refund))
        .route("/v1/record", post(events::record))
        .route("/v1/try-consume-all", post(groups::try_consume_all))
        .route("/v1/reserve", post(groups::reserve))
        .route("/v1/reserve-all", post(groups::reserve_all))
        .route("/v1/reservations/{id}", get(groups::read))
        .route("/v1/reservations/{id}/commit", post(groups::commit))
        .route("/v1/reservations/{id}/cancel", post(groups::cancel))
        .route("/v1/reservations/{id}/extend", post(groups::extend))
        .route("/v1/users/{user}/quotas/{quota}", get(api::usage))
        .route(
            "/v1/users/{user}/quotas/{quota}/limit",
            put(api::set_limit).delete(api::clear_limit),
        )
        .route("/v1/sync", post(api::sync))
        .route("/v1/snapshot", post(api::snapshot))
        .route("/stats", get(api::stats))
        .route("/metrics", get(metrics::metrics))
        .route_layer(middleware::from_fn_with_state(Arc::clone(&app), auth::require_token));
    Router::new()
        .route("/", get(|| async { "tollgate: see /health, /stats, /metrics and /v1/quotas\n" }))
        .route("/health", get(api::health))
        .merge(api)
        .fallback(errors::not_found)
        .method_not_allowed_fallback(errors::method_not_allowed)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(middleware::from_fn_with_state(Arc::clone(&app), auth::refuse_pages))
        // The outermost, so that it counts whatever is answered.
        .layer(middleware::from_fn_with_state(Arc::clone(&app), metrics::measure))
        .with_state(app)
}
