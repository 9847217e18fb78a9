//! Rate-limit headers: `RateLimit-Policy` and `RateLimit` as in the IETF draft "RateLimit header
//! fields for HTTP" (draft-ietf-httpapi-ratelimit-headers), and `Retry-After` (RFC 9110, 10.2.3).

use std::time::Duration;

use axum::http::header::{HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};
use tollgate::{Decision, Quota, Timestamp, Usage, Window};

const POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
const LIMIT: HeaderName = HeaderName::from_static("ratelimit");

/// The headers of an answer about a quota.
pub(crate) fn headers(
    quota: &Quota,
    limit: u64,
    remaining: u64,
    resets_at: Option<Timestamp>,
    now: Timestamp,
) -> HeaderMap {
    let name = structured_string(quota.name());
    let mut policy = format!("{name};q={limit}");
    if let Some(window) = window_seconds(quota.counting_window()) {
        policy.push_str(&format!(";w={window}"));
    }
    let mut state = format!("{name};r={remaining}");
    if let Some(resets_at) = resets_at {
        state.push_str(&format!(";t={}", whole_seconds(resets_at.saturating_sub(now))));
    }
    let mut headers = HeaderMap::new();
    for (header, value) in [(POLICY, policy), (LIMIT, state)] {
        // A name outside ASCII has no form in a structured field: then the header is left out.
        if let Ok(value) = HeaderValue::from_str(&value) {
            headers.insert(header, value);
        }
    }
    headers
}

pub(crate) fn decision_headers(quota: &Quota, decision: &Decision, now: Timestamp) -> HeaderMap {
    let Decision { limit, remaining, resets_at, .. } = *decision;
    let mut headers = headers(quota, limit, remaining, resets_at, now);
    if let Some(wait) = decision.retry_after() {
        headers.insert(RETRY_AFTER, HeaderValue::from(whole_seconds(wait).max(1)));
    }
    headers
}

pub(crate) fn usage_headers(quota: &Quota, usage: &Usage, now: Timestamp) -> HeaderMap {
    headers(quota, usage.limit, usage.remaining, usage.resets_at, now)
}

/// A string of a structured field (RFC 8941, 3.3.3).
fn structured_string(text: &str) -> String {
    let escaped = text.replace('\\', "\\\\").replace('"', "\\\"");
    format!("\"{escaped}\"")
}

/// Rounded up: a client that waits so long comes when it is worth it.
fn whole_seconds(duration: Duration) -> u64 {
    duration.as_secs() + u64::from(duration.subsec_nanos() > 0)
}

/// The length of a window; of months and years the longest, since theirs differ.
fn window_seconds(window: Window) -> Option<u64> {
    const DAY: u64 = 24 * 3600;
    match window {
        Window::Minute => Some(60),
        Window::Hour => Some(3600),
        Window::Day => Some(DAY),
        Window::Month => Some(31 * DAY),
        Window::Year => Some(366 * DAY),
        Window::Every(length) => Some(whole_seconds(length)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_have_the_drafts_form() {
        let quota = Quota::new("per \"minute\"", 10).window(Window::Minute);
        let now = Timestamp::from_unix_millis(1_000);
        let headers = headers(&quota, 10, 3, Some(Timestamp::from_unix_millis(2_500)), now);
        assert_eq!(headers[POLICY], "\"per \\\"minute\\\"\";q=10;w=60");
        assert_eq!(headers[LIMIT], "\"per \\\"minute\\\"\";r=3;t=2");
    }

    #[test]
    fn a_name_that_has_no_form_is_left_out() {
        let quota = Quota::new("größe\n", 10);
        let now = Timestamp::from_unix_millis(0);
        assert!(headers(&quota, 1, 1, None, now).get(LIMIT).is_none());
    }
}
