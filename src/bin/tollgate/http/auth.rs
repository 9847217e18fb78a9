//! The bearer token.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use subtle::ConstantTimeEq as _;

use crate::http::App;
use crate::http::errors::ApiError;

/// Refuses requests without the token, where one is asked for.
pub(crate) async fn require_token(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Response {
    if has_token(&app, request.headers()) {
        next.run(request).await
    } else {
        ApiError::unauthorized().into_response()
    }
}

/// Whether these carry the token, or none is asked for. Compared in constant time.
pub(crate) fn has_token(app: &App, headers: &HeaderMap) -> bool {
    let Some(token) = &app.token else { return true };
    let given = headers
        .get(AUTHORIZATION)
        // The scheme's name is case-insensitive (RFC 9110, 11.1).
        .and_then(|value| value.as_bytes().split_at_checked(b"Bearer ".len()))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"Bearer "))
        .map(|(_, token)| token)
        .unwrap_or_default();
    given.ct_eq(token.as_bytes()).into()
}
