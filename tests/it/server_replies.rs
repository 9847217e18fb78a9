//! What the server tells whom: what it prints to try, and what is for those with the token only.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use serde_json::{Value, json};

use crate::server::{Server, answers_of_printed_lines};

/// There is nothing to count yet.
#[test]
fn without_quotas_the_printed_line_defines_one() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start_without_quota(dir.path(), &[]);
    let [quota] = &answers_of_printed_lines(&server)[..] else { panic!("one line") };
    let (name, limit) = (&quota["name"], &quota["limit"]);
    assert_eq!((name, limit), (&json!("requests"), &json!(1_000)));
    server.kill();
}

/// What is wrong may name files and repeat what a database said.
#[test]
fn health_gives_its_reasons_to_those_with_the_token_only() {
    let dir = tempfile::tempdir().unwrap();
    let token = dir.path().join("token");
    std::fs::write(&token, "s3cret").unwrap();
    let data = dir.path().join("data");
    let server = Server::start(&data, &["--token-file", token.to_str().unwrap()]);
    let mut client = server.connect();
    for headers in ["", "Authorization: Bearer s3cre\r\n"] {
        client.headers = headers.to_owned();
        assert_eq!(client.get("/health").json(), json!({ "level": "healthy" }));
    }
    client.headers = "Authorization: Bearer s3cret\r\n".to_owned();
    let whole = json!({ "level": "healthy", "reasons": [] });
    assert_eq!(client.get("/health").json(), whole);
    server.kill();
    let server = Server::start(&data, &[]);
    assert_eq!(server.connect().get("/health").json(), whole, "no token is asked for");
    server.kill();
}

#[test]
fn the_root_names_paths_that_answer() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), &[]);
    let mut client = server.connect();
    let text = client.get("/").body;
    let paths: Vec<_> = text.split([' ', ',', '\n']).filter(|word| word.starts_with('/')).collect();
    assert_eq!(paths.len(), 4, "{text}");
    for path in paths {
        assert_eq!(client.send("GET", path, &Value::Null).status, 200, "{path}");
    }
    server.kill();
}

/// serde takes fields from an array too, by their order.
#[test]
fn an_array_is_no_request() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), &[]);
    let mut client = server.connect();
    let fields = json!([1, "requests", 1, false]);
    let items = json!({ "items": [fields] });
    let for_a_while = json!({ "items": [fields], "ttl_ms": 1_000 });
    let requests = [
        ("/v1/try-consume", &fields),
        ("/v1/consume", &fields),
        ("/v1/check", &fields),
        ("/v1/refund", &fields),
        ("/v1/record", &json!([1, "requests", 1.0, null, {}, false])),
        ("/v1/reserve", &json!([1, "requests", 1, 1_000, false])),
        ("/v1/quotas", &json!(["other", 10, "day", 0, 0, "charge"])),
        ("/v1/consume-batch", &json!([[{ "user": 1, "quota": "requests" }]])),
        ("/v1/consume-batch", &items),
        ("/v1/try-consume-all", &items),
        ("/v1/reserve-all", &for_a_while),
    ];
    for (path, body) in requests {
        let answer = client.send("POST", path, body);
        assert_eq!(
            (answer.status, &answer.json()["error"]["kind"]),
            (422, &json!("bad_body")),
            "{path}"
        );
    }
    let limit = client.send("PUT", "/v1/users/1/quotas/requests/limit", &json!([5]));
    assert_eq!(limit.status, 422, "{}", limit.body);
    assert_eq!(client.get("/stats").json()["total"], 0);
    assert_eq!(client.get("/v1/quotas").json()["quotas"].as_array().map(Vec::len), Some(1));
    server.kill();
}

#[test]
fn heads_are_taken_up_to_what_is_documented() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), &[]);
    // Whether the head comes at once or in pieces.
    for piece in [usize::MAX, 1_000] {
        for (bytes, status) in [(32 << 10, "200"), (64 << 10, "431")] {
            let start =
                "GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-Filler: ";
            let filler = "x".repeat(bytes - start.len() - 4);
            let head = format!("{start}{filler}\r\n\r\n");
            let mut stream = TcpStream::connect(&server.address).unwrap();
            for piece in head.as_bytes().chunks(piece) {
                // It may have been refused already.
                if stream.write_all(piece).is_err() {
                    break;
                }
            }
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer);
            let answer = String::from_utf8_lossy(&answer);
            let said = answer.split(' ').nth(1).unwrap_or("nothing");
            let is_reset = answer.is_empty() && status == "431";
            assert!(said == status || is_reset, "{bytes} bytes: {said}");
        }
    }
    server.kill();
}

/// A duration had the name of a point in time, and jumps of the clock were in neither.
#[test]
fn statistics_and_metrics_say_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), &[]);
    let mut client = server.connect();
    let consumed = json!({ "user": 1, "quota": "requests", "sync": true });
    assert_eq!(client.send("POST", "/v1/consume", &consumed).status, 200);
    let (stats, text) = (client.get("/stats").json(), client.get("/metrics").body);
    let metric = |name: &str| -> f64 {
        let value = text.lines().find_map(|line| line.strip_prefix(&format!("tollgate_{name} ")));
        value.unwrap_or_else(|| panic!("{name} in {text}")).parse().expect("a number")
    };
    assert_eq!((&stats["clock_jumps"], metric("clock_jumps_total")), (&json!(0), 0.0));
    assert_eq!(metric("health"), 0.0);
    assert!((0.0..60.0).contains(&metric("last_sync_duration_seconds")), "{text}");
    // Of this millennium, by the one and the other.
    assert!(stats["last_sync"].as_str().is_some_and(|at| at.starts_with("20")), "{stats}");
    assert!(metric("last_sync_timestamp_seconds") > 946_684_800.0, "{text}");
    server.kill();
}

/// Who defines quotas at each start took back what was changed at run time.
#[test]
fn a_definition_leaves_alone_what_it_does_not_name() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start_without_quota(dir.path(), &[]);
    let mut client = server.connect();
    let mut define = |body: &Value| {
        let answer = client.send("POST", "/v1/quotas", body);
        assert_eq!(answer.status, 200, "{}", answer.body);
        let quota = answer.json();
        (quota["limit"].as_u64(), quota["overrun"].as_str().map(str::to_owned))
    };
    let [charge, refuse] = ["charge", "refuse"].map(|overrun| Some(overrun.to_owned()));
    assert_eq!(define(&json!({ "name": "new", "limit": 10 })), (Some(10), charge.clone()));
    let strict = json!({ "name": "new", "limit": 10, "overrun": "refuse" });
    assert_eq!(define(&strict), (Some(10), refuse.clone()));
    assert_eq!(define(&json!({ "name": "new", "limit": 20 })), (Some(20), refuse.clone()));
    // Nor is it refused where its meaning is another.
    let start = json!({ "name": "new", "limit": 5, "window": "day", "overrun": "charge" });
    let mut if_absent = start.clone();
    if_absent["if_absent"] = json!(true);
    assert_eq!(define(&if_absent), (Some(20), refuse));
    if_absent["name"] = json!("newer");
    assert_eq!(define(&if_absent), (Some(5), charge));
    assert_eq!(client.send("POST", "/v1/quotas", &start).status, 409);
    server.kill();
}

/// A page of any site could have a browser on the server's machine send these, which have no body.
#[test]
fn without_a_token_web_pages_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let evil = "Origin: https://evil.example\r\n";
    let paths = [("POST", "/v1/sync"), ("POST", "/v1/snapshot"), ("GET", "/health"), ("GET", "/")];
    let server = Server::start(&data, &[]);
    let mut client = server.connect();
    for (method, path) in paths {
        client.headers = evil.to_owned();
        let refused = client.send(method, path, &Value::Null);
        assert_eq!((refused.status, &refused.json()["error"]["kind"]), (403, &json!("forbidden")));
        client.headers = "Origin: http://localhost:3000\r\n".to_owned();
        assert_eq!(client.send(method, path, &Value::Null).status, 200, "{path}");
    }
    // A name of theirs that leads here, beside the one that the client says.
    client.headers = "Host: evil.example\r\n".to_owned();
    assert_eq!(client.get("/v1/quotas").status, 403);
    server.kill();
    let token = dir.path().join("token");
    std::fs::write(&token, "s3cret").unwrap();
    for arguments in [&["--insecure"][..], &["--token-file", token.to_str().unwrap()]] {
        let server = Server::start(&data, arguments);
        let mut client = server.connect();
        client.headers = format!("{evil}Authorization: Bearer s3cret\r\n");
        assert_eq!(client.send("POST", "/v1/sync", &Value::Null).status, 200, "{arguments:?}");
        server.kill();
    }
}
