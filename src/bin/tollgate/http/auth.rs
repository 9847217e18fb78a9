//! Who may use the server: the bearer token, or, without one, whoever is no web page.
//!
//! A browser on the server's machine reaches a port that only listens there. A page of any site can
//! make it send requests, and, where the site's name is made to lead to this machine (DNS
//! rebinding), read the answers too. The browser says so: `Origin` names the site of the page, and
//! `Host` the name that was looked up.

use std::net::IpAddr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::HeaderMap;
use axum::http::header::{AUTHORIZATION, HOST, HeaderValue, ORIGIN};
use axum::http::uri::{Authority, Uri};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use subtle::ConstantTimeEq as _;

use crate::http::App;
use crate::http::errors::ApiError;

/// Who may use the server.
#[derive(Debug)]
pub(crate) enum Access {
    /// Who has this token.
    Token(String),
    /// Who calls it by an address, or as `localhost`, and is no web page from elsewhere.
    Unnamed,
    /// Whoever reaches it.
    Anyone,
}

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
    let Access::Token(token) = &app.access else { return true };
    let given = headers
        .get(AUTHORIZATION)
        // The scheme's name is case-insensitive (RFC 9110, 11.1).
        .and_then(|value| value.as_bytes().split_at_checked(b"Bearer ".len()))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"Bearer "))
        .map(|(_, token)| token)
        .unwrap_or_default();
    given.ct_eq(token.as_bytes()).into()
}

/// Refuses requests of web pages where neither a token keeps them away nor everybody is let in.
pub(crate) async fn refuse_pages(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Response {
    if matches!(app.access, Access::Unnamed) && !is_unnamed(request.uri(), request.headers()) {
        ApiError::of_a_page().into_response()
    } else {
        next.run(request).await
    }
}

/// Whether all that names a host here names an address or `localhost`. A browser always says which
/// host it means.
fn is_unnamed(uri: &Uri, headers: &HeaderMap) -> bool {
    let read = |value: &HeaderValue| value.to_str().ok()?.parse::<Authority>().ok();
    let hosts = headers.get_all(HOST).iter().map(read);
    // `null` where the browser keeps it to itself: of a file, or a frame without a site.
    let site = |value: &HeaderValue| value.to_str().ok()?.parse::<Uri>().ok()?.authority().cloned();
    let origins = headers.get_all(ORIGIN).iter().map(site);
    let named = uri.authority().cloned().map(Some);
    hosts.chain(origins).chain(named).all(|host| host.is_some_and(|host| is_local(host.host())))
}

fn is_local(host: &str) -> bool {
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    host.eq_ignore_ascii_case("localhost") || address.parse::<IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_let_in(uri: &str, headers: &[(&'static str, &'static str)]) -> bool {
        let header = |&(name, value): &(&'static str, &'static str)| {
            (name.parse().expect("a name"), HeaderValue::from_static(value))
        };
        let headers: HeaderMap = headers.iter().map(header).collect();
        is_unnamed(&uri.parse().expect("a path"), &headers)
    }

    #[test]
    fn programs_of_the_machine_are_let_in() {
        for host in ["localhost", "LocalHost:8080", "127.0.0.1", "127.0.0.1:8080", "[::1]:8080"] {
            assert!(is_let_in("/v1/sync", &[("host", host)]), "{host}");
        }
        for origin in ["http://localhost:3000", "http://127.0.0.1:8080", "https://[::1]"] {
            assert!(is_let_in("/", &[("host", "[::1]"), ("origin", origin)]), "{origin}");
        }
        assert!(is_let_in("/", &[]), "as HTTP/1.0 allows");
        assert!(is_let_in("http://127.0.0.1:8080/v1/sync", &[]));
    }

    #[test]
    fn pages_are_not() {
        for host in ["evil.example", "evil.example:8080", "localhost.evil.example", "", "a b"] {
            assert!(!is_let_in("/v1/sync", &[("host", host)]), "{host}");
            assert!(!is_let_in("/", &[("host", "localhost"), ("host", host)]), "{host}");
        }
        for origin in ["https://evil.example", "http://127.0.0.1.evil.example", "null", "", "/"] {
            assert!(!is_let_in("/", &[("host", "127.0.0.1"), ("origin", origin)]), "{origin}");
        }
        assert!(!is_let_in("http://evil.example/v1/sync", &[("host", "127.0.0.1")]));
    }
}
