//! Errors as JSON: `{"error": {"kind": "...", "message": "..."}}`; a reservation that has ended
//! also says how, in `"settled"`, and a batch that was cut short how many items were counted, in
//! `"counted"`.

use std::time::Duration;

use axum::Json;
use axum::extract::rejection::{JsonRejection, PathRejection};
use axum::http::header::{RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::json;
use tollgate::{Error, Resource, Settlement};

/// An answer that is no success.
#[derive(Debug)]
pub(crate) struct ApiError {
    status: StatusCode,
    kind: &'static str,
    message: String,
    /// How a reservation ended.
    settled: Option<Settlement>,
    /// How many items of a batch were counted.
    counted: Option<usize>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, message: message.into(), settled: None, counted: None }
    }

    pub(crate) fn unauthorized() -> Self {
        let message = "this server asks for a token: Authorization: Bearer TOKEN";
        Self::new(StatusCode::UNAUTHORIZED, "unauthorized", message)
    }

    /// The request says that a web page sent it, or may have.
    pub(crate) fn of_a_page() -> Self {
        let message = "without a token, only requests to an IP address or localhost are answered, \
                       and none of web pages from elsewhere (as Host and Origin say): start the \
                       server with --token-file FILE, or with --insecure if that is meant";
        Self::new(StatusCode::FORBIDDEN, "forbidden", message)
    }

    pub(crate) fn unknown_quota(name: &str) -> Self {
        let message = format!("the quota {name:?} is not defined; POST it to /v1/quotas first");
        Self::new(StatusCode::NOT_FOUND, "unknown_quota", message)
    }

    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "bad_request", message)
    }

    pub(crate) fn bad_path(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "bad_path", message)
    }

    pub(crate) fn bad_idempotency_key(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "bad_idempotency_key", message)
    }

    pub(crate) fn interrupted() -> Self {
        let message = "the operation was interrupted; its outcome is unknown";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "interrupted", message)
    }

    /// The request's body did not come in time.
    pub(crate) fn slow_body(limit: Duration) -> Self {
        let message = format!("the body was not there within {limit:?}; nothing was counted");
        Self::new(StatusCode::REQUEST_TIMEOUT, "slow_body", message)
    }

    /// So many wait for the disk that it did not even begin.
    pub(crate) fn no_turn(waited: Duration) -> Self {
        let message = format!("too many wait for the disk; after {waited:?} nothing was counted");
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "too_many", message)
    }

    /// It has begun, and goes on.
    pub(crate) fn not_yet(waited: Duration) -> Self {
        let message = format!("the disk did not answer within {waited:?}; it may be done later");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "outcome_unknown", message)
    }

    /// A definition, valid by itself, that is refused beside the quotas that are there.
    pub(crate) fn refused_definition(error: Error) -> Self {
        let (status, kind) = match error {
            Error::InvalidQuota { .. } => (StatusCode::CONFLICT, "invalid_quota"),
            Error::TooMany { what: Resource::Quotas, .. } => {
                (StatusCode::CONFLICT, "too_many_quotas")
            }
            error => return error.into(),
        };
        Self::new(status, kind, error.to_string())
    }
}

/// What went wrong, in the words of this API where the engine's name the library's.
fn message(error: &Error) -> String {
    match error {
        Error::Backpressure { waited } => {
            format!("the log had no room for {waited:?}; nothing was counted; /health says why")
        }
        Error::OutcomeUnknown { source } => format!(
            "the change may be gone after a restart: {}; make it again once /health is healthy",
            message(source)
        ),
        Error::BatchCutShort { counted, source } => {
            format!("{counted} of the items were counted, then: {}", message(source))
        }
        error => error.to_string(),
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        let message = message(&error);
        let (settled, counted) = match error {
            Error::ReservationSettled { how, .. } => (Some(how), None),
            Error::BatchCutShort { counted, .. } => (None, Some(counted)),
            _ => (None, None),
        };
        let (status, kind) = match error {
            Error::UnknownQuota(_) => (StatusCode::NOT_FOUND, "unknown_quota"),
            Error::InvalidAmount(_)
            | Error::InvalidLimit(_)
            | Error::InvalidFloat { .. }
            | Error::Overflow { .. } => (StatusCode::BAD_REQUEST, "invalid_amount"),
            Error::EventTooLarge { .. } => (StatusCode::BAD_REQUEST, "event_too_large"),
            Error::InvalidGroup { .. } => (StatusCode::BAD_REQUEST, "invalid_group"),
            Error::ReservationMismatch { .. } => {
                (StatusCode::UNPROCESSABLE_ENTITY, "reservation_mismatch")
            }
            Error::InvalidTtl(_) => (StatusCode::BAD_REQUEST, "invalid_ttl"),
            Error::UnknownReservation(_) => (StatusCode::NOT_FOUND, "unknown_reservation"),
            Error::ReservationSettled { .. } => (StatusCode::CONFLICT, "reservation_settled"),
            Error::RequestMismatch { .. } => (StatusCode::UNPROCESSABLE_ENTITY, "request_mismatch"),
            Error::InvalidQuota { .. } => (StatusCode::BAD_REQUEST, "invalid_quota"),
            // A client that comes again finds it as it was.
            Error::TooMany { .. } if !error.is_retryable() => (StatusCode::CONFLICT, "too_many"),
            Error::TooMany { .. } => (StatusCode::SERVICE_UNAVAILABLE, "too_many"),
            Error::Backpressure { .. } => (StatusCode::SERVICE_UNAVAILABLE, "backpressure"),
            Error::Closed => (StatusCode::SERVICE_UNAVAILABLE, "closed"),
            Error::DurabilityLost { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "durability_lost"),
            Error::NotLogged => (StatusCode::INTERNAL_SERVER_ERROR, "not_logged"),
            Error::BatchCutShort { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "batch_cut_short"),
            Error::OutcomeUnknown { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "outcome_unknown"),
            _ => (StatusCode::INTERNAL_SERVER_ERROR, "internal"),
        };
        Self { settled, counted, ..Self::new(status, kind, message) }
    }
}

impl From<JsonRejection> for ApiError {
    fn from(rejection: JsonRejection) -> Self {
        Self::new(rejection.status(), "bad_body", rejection.body_text())
    }
}

impl From<PathRejection> for ApiError {
    fn from(rejection: PathRejection) -> Self {
        Self::new(rejection.status(), "bad_path", rejection.body_text())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut body = json!({ "error": { "kind": self.kind, "message": self.message } });
        if let Some(how) = self.settled {
            body["error"]["settled"] = json!(how.to_string());
        }
        if let Some(counted) = self.counted {
            body["error"]["counted"] = json!(counted);
        }
        let mut response = (self.status, Json(body)).into_response();
        match self.status {
            StatusCode::SERVICE_UNAVAILABLE => {
                response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
            }
            StatusCode::UNAUTHORIZED => {
                let scheme = HeaderValue::from_static("Bearer");
                response.headers_mut().insert(WWW_AUTHENTICATE, scheme);
            }
            _ => {}
        }
        response
    }
}

pub(crate) async fn not_found() -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, "not_found", "there is nothing at this path")
}

pub(crate) async fn method_not_allowed() -> ApiError {
    let message = "this path does not answer this method";
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_paths_and_not_functions() {
        let full = || Error::Backpressure { waited: Duration::from_secs(1) };
        let errors = [
            full(),
            Error::OutcomeUnknown { source: Box::new(full()) },
            Error::BatchCutShort { counted: 3, source: Box::new(full()) },
        ];
        for error in errors {
            let said = ApiError::from(error).message;
            assert!(said.contains("/health") && !said.contains("()"), "{said}");
        }
    }

    /// Where a client is told to come again, something must have changed by then.
    #[test]
    fn no_more_quotas_is_for_good() {
        let said = |what| {
            let error = Error::TooMany { what, bound: 8 };
            let response = ApiError::refused_definition(error).into_response();
            (response.status().as_u16(), response.headers().contains_key(RETRY_AFTER))
        };
        assert_eq!(said(Resource::Quotas), (409, false));
        assert_eq!(said(Resource::WaitingChanges), (503, true));
    }
}
