//! Rate-limit headers: `RateLimit-Policy` and `RateLimit` as in the IETF draft "RateLimit header
//! fields for HTTP" (draft-ietf-httpapi-ratelimit-headers), and `Retry-After` (RFC 9110, 10.2.3).

use std::time::Duration;

use axum::http::header::{HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};
use tollgate::{Decision, Decisions, Quota, Timestamp, Usage, Window};

const POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
const LIMIT: HeaderName = HeaderName::from_static("ratelimit");

/// The largest integer of a structured field (RFC 8941, 3.3.1): a larger one would make the whole
/// field unreadable.
const INTEGER_MAX: u64 = 999_999_999_999_999;

/// What an answer says about one counter.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Standing<'a> {
    quota: &'a Quota,
    limit: u64,
    remaining: u64,
    resets_at: Option<Timestamp>,
}

impl<'a> Standing<'a> {
    pub(crate) fn decided(quota: &'a Quota, decision: &Decision) -> Self {
        let Decision { limit, remaining, resets_at, .. } = *decision;
        Self { quota, limit, remaining, resets_at }
    }

    pub(crate) fn used(quota: &'a Quota, usage: &Usage) -> Self {
        let Usage { limit, remaining, resets_at, .. } = *usage;
        Self { quota, limit, remaining, resets_at }
    }

    /// Its members of the two lists.
    fn members(&self, now: Timestamp) -> (String, String) {
        let Self { quota, limit, remaining, resets_at } = *self;
        let name = structured_string(quota.name());
        let [limit, remaining] = [limit, remaining].map(|units| units.min(INTEGER_MAX));
        let mut policy = format!("{name};q={limit}");
        if let Some(window) = window_seconds(quota.counting_window()) {
            policy.push_str(&format!(";w={window}"));
        }
        let mut state = format!("{name};r={remaining}");
        if let Some(resets_at) = resets_at {
            state.push_str(&format!(";t={}", whole_seconds(resets_at.saturating_sub(now))));
        }
        (policy, state)
    }
}

/// How long to wait, as of now, before asking again can help: the decision may be an earlier one,
/// repeated under its key. At least 1 millisecond, also where its window has ended since.
pub(crate) fn wait(decision: &Decision, now: Timestamp) -> Option<Duration> {
    decision.retry_after()?;
    Some(decision.resets_at?.saturating_sub(now).max(Duration::from_millis(1)))
}

/// The longest wait of those that refused.
pub(crate) fn wait_for_all(decisions: &Decisions, now: Timestamp) -> Option<Duration> {
    decisions.retry_after()?;
    decisions.each().filter_map(|decision| wait(&decision, now)).max()
}

/// The headers of an answer about one counter or several. Of several counters of a quota the one
/// with the least left is named: the fields tell counters apart by the quota only.
pub(crate) fn headers(
    standings: &[Standing<'_>],
    retry_after: Option<Duration>,
    now: Timestamp,
) -> HeaderMap {
    let mut named: Vec<Standing<'_>> = Vec::with_capacity(standings.len());
    // A name outside ASCII has no form in a structured field: it is left out.
    let has_form = |name: &str| name.bytes().all(|byte| (0x20..0x7f).contains(&byte));
    for &standing in standings.iter().filter(|standing| has_form(standing.quota.name())) {
        let known = named.iter_mut().find(|known| known.quota.name() == standing.quota.name());
        match known {
            Some(known) if standing.remaining < known.remaining => *known = standing,
            Some(_) => {}
            None => named.push(standing),
        }
    }
    let (policies, states): (Vec<_>, Vec<_>) =
        named.iter().map(|standing| standing.members(now)).unzip();
    let mut headers = HeaderMap::new();
    for (header, members) in [(POLICY, policies), (LIMIT, states)] {
        if !members.is_empty()
            && let Ok(value) = HeaderValue::from_str(&members.join(", "))
        {
            headers.insert(header, value);
        }
    }
    if let Some(wait) = retry_after {
        headers.insert(RETRY_AFTER, HeaderValue::from(whole_seconds(wait).max(1)));
    }
    headers
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
        let resets_at = Some(Timestamp::from_unix_millis(2_500));
        let standing = Standing { quota: &quota, limit: 10, remaining: 3, resets_at };
        let headers = headers(&[standing], None, now);
        assert_eq!(headers[POLICY], "\"per \\\"minute\\\"\";q=10;w=60");
        assert_eq!(headers[LIMIT], "\"per \\\"minute\\\"\";r=3;t=2");
    }

    /// A field with a larger integer is none at all.
    #[test]
    fn no_integer_has_more_digits_than_a_field_may() {
        let quota = Quota::new("all", 10);
        let (limit, remaining) = (u64::MAX >> 1, 1_000_000_000_000_000);
        let standing = Standing { quota: &quota, limit, remaining, resets_at: None };
        let headers = headers(&[standing], None, Timestamp::from_unix_millis(0));
        assert_eq!(headers[POLICY], "\"all\";q=999999999999999");
        assert_eq!(headers[LIMIT], "\"all\";r=999999999999999");
    }

    #[test]
    fn a_name_that_has_no_form_is_left_out() {
        let quota = Quota::new("größe\n", 10);
        let now = Timestamp::from_unix_millis(0);
        let standing = Standing { quota: &quota, limit: 1, remaining: 1, resets_at: None };
        assert!(headers(&[standing], None, now).is_empty());
    }

    #[test]
    fn of_several_counters_of_a_quota_the_tightest_is_named() {
        let [calls, tokens] = ["calls", "tokens"].map(|name| Quota::new(name, 10));
        let now = Timestamp::from_unix_millis(0);
        let standing = |quota, remaining| Standing { quota, limit: 10, remaining, resets_at: None };
        let standings = [standing(&tokens, 5), standing(&calls, 2), standing(&tokens, 4)];
        let headers = headers(&standings, Some(Duration::from_millis(1_001)), now);
        assert_eq!(headers[POLICY], "\"tokens\";q=10, \"calls\";q=10");
        assert_eq!(headers[LIMIT], "\"tokens\";r=4, \"calls\";r=2");
        assert_eq!(headers[RETRY_AFTER], "2");
    }
}
