//! Reservations, operations over several counters and requests that count once, over HTTP.

use std::path::Path;

use serde_json::{Value, json};

use crate::server::{Answer, Client, Server};

const HOUR_MS: u64 = 3_600_000;
/// The first 16 bytes of the SHA-256 of "order 4711", by `sha256sum`.
const ORDER_HASH: &str = "326b6f65e1b3a7b89818d0fa0d99bc90";

/// A server with a quota of 10 a day for each user and one of 12 that refuses overruns.
fn start(dir: &Path) -> (Server, Client) {
    let server = Server::start_without_quota(dir, &[]);
    let mut client = server.connect();
    for quota in [
        json!({ "name": "tokens", "limit": 10, "window": "day" }),
        json!({ "name": "organisation", "limit": 12, "overrun": "refuse" }),
    ] {
        let defined = client.send("POST", "/v1/quotas", &quota);
        assert_eq!(defined.status, 200, "{}", defined.body);
    }
    (server, client)
}

fn kind(answer: &Answer) -> (u16, String) {
    let kind = answer.json()["error"]["kind"].as_str().unwrap_or("none").to_owned();
    (answer.status, kind)
}

fn is(status: u16, kind: &str) -> (u16, String) {
    (status, kind.to_owned())
}

/// Used and reserved.
fn usage(client: &mut Client, user: u64, quota: &str) -> (u64, u64) {
    let usage = client.get(&format!("/v1/users/{user}/quotas/{quota}")).json();
    let number = |name: &str| usage[name].as_u64().expect("a number");
    (number("used"), number("reserved"))
}

fn reservation(answer: &Answer) -> String {
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.json()["reservation"].as_str().expect("an id").to_owned()
}

fn settle(client: &mut Client, id: &str, what: &str, body: &Value) -> Answer {
    client.send("POST", &format!("/v1/reservations/{id}/{what}"), body)
}

fn with_key(client: &mut Client, key: &str, path: &str, body: &Value) -> Answer {
    client.headers = format!("Idempotency-Key: {key}\r\n");
    let answer = client.send("POST", path, body);
    client.headers.clear();
    answer
}

#[test]
fn a_reservation_is_made_and_settled_over_http() {
    let dir = tempfile::tempdir().unwrap();
    let (server, mut client) = start(dir.path());
    let ask =
        |amount: u64| json!({ "user": 7, "quota": "tokens", "amount": amount, "ttl_ms": HOUR_MS });
    let reserved = client.send("POST", "/v1/reserve", &ask(8));
    let id = reservation(&reserved);
    let counter = &reserved.json()["counters"][0];
    assert_eq!((&counter["user"], &counter["quota"]), (&json!(7), &json!("tokens")));
    assert_eq!((&counter["reserved"], &counter["remaining"]), (&json!(8), &json!(2)));
    assert_eq!(reserved.headers["ratelimit-policy"], "\"tokens\";q=10;w=86400");
    let read = |client: &mut Client, id: &str| client.get(&format!("/v1/reservations/{id}"));
    let expires_at = reserved.json()["expires_at"].clone();
    let open = json!({ "reservation": id, "expires_at": expires_at, "counters": [
        { "user": 7, "quota": "tokens", "amount": 8 },
    ] });
    assert!(expires_at.is_string() && read(&mut client, &id).json() == open, "{open}");
    assert_eq!(usage(&mut client, 7, "tokens"), (8, 8));

    let denied = client.send("POST", "/v1/reserve", &ask(3));
    let body = denied.json();
    assert_eq!((denied.status, &body["refused"]), (429, &json!(0)));
    assert_eq!(body["decisions"][0]["quota"], "tokens");
    let wait: u64 = denied.headers["retry-after"].parse().unwrap();
    assert!((1..=86_400).contains(&wait));

    let extended = settle(&mut client, &id, "extend", &json!({ "ttl_ms": 2 * HOUR_MS }));
    assert_eq!(reservation(&extended), id);
    let later = &extended.json()["expires_at"];
    assert!(later.as_str() > expires_at.as_str(), "{later}");
    assert_eq!(&read(&mut client, &id).json()["expires_at"], later);
    let charged = settle(&mut client, &id, "commit", &json!({ "actual": 5, "sync": true }));
    assert_eq!((charged.status, &charged.json()["decisions"][0]["used"]), (200, &json!(5)));
    assert_eq!(usage(&mut client, 7, "tokens"), (5, 0));
    for (what, body) in [
        ("commit", json!({ "actual": 5 })),
        ("cancel", Value::Null),
        ("cancel", json!({ "sync": true })),
        ("extend", json!({ "ttl_ms": HOUR_MS, "sync": true })),
    ] {
        let late = settle(&mut client, &id, what, &body);
        assert_eq!(kind(&late), is(409, "reservation_settled"), "{what}");
        assert_eq!(late.json()["error"]["settled"], "committed");
    }
    assert_eq!(kind(&read(&mut client, &id)), is(409, "reservation_settled"));

    let id = reservation(&client.send("POST", "/v1/reserve", &ask(4)));
    // What it does not know was ignored, `sync` included.
    let refused = settle(&mut client, &id, "cancel", &json!({ "snyc": true }));
    assert_eq!(kind(&refused), is(422, "bad_body"));
    assert_eq!(reservation(&settle(&mut client, &id, "cancel", &Value::Null)), id);
    assert_eq!(usage(&mut client, 7, "tokens"), (5, 0));
    let late = settle(&mut client, &id, "cancel", &Value::Null);
    assert_eq!(late.json()["error"]["settled"], "cancelled");

    // One that nobody settles is given back when its time is over.
    let brief = json!({ "user": 8, "quota": "tokens", "amount": 1, "ttl_ms": 1 });
    let id = reservation(&client.send("POST", "/v1/reserve", &brief));
    while usage(&mut client, 8, "tokens") != (0, 0) {
        std::thread::yield_now();
    }
    let late = settle(&mut client, &id, "commit", &json!({ "actual": 1 }));
    assert_eq!(late.json()["error"]["settled"], "expired");
    assert_eq!(client.get("/stats").json()["reservations_expired"], 1);
    server.kill();
}

#[test]
fn a_group_is_counted_whole_over_http() {
    let dir = tempfile::tempdir().unwrap();
    let (server, mut client) = start(dir.path());
    let group = |amount: u64| {
        json!([
            { "user": 1, "quota": "organisation", "amount": amount },
            { "user": 7, "quota": "tokens", "amount": amount },
        ])
    };
    let all = json!({ "items": group(4), "sync": true });
    let counted = client.send("POST", "/v1/try-consume-all", &all);
    assert_eq!((counted.status, &counted.json()["refused"]), (200, &Value::Null));
    assert_eq!(
        counted.headers["ratelimit-policy"],
        "\"organisation\";q=12, \"tokens\";q=10;w=86400"
    );
    let denied = client.send("POST", "/v1/try-consume-all", &json!({ "items": group(7) }));
    let body = denied.json();
    assert_eq!((denied.status, &body["refused"]), (429, &json!(1)));
    let refused = &body["decisions"][1];
    assert_eq!((&refused["user"], &refused["quota"]), (&json!(7), &json!("tokens")));
    assert_eq!(body["decisions"][0]["allowed"], true);
    assert!(denied.headers.contains_key("retry-after"));
    assert_eq!(usage(&mut client, 1, "organisation"), (4, 0));

    let all = json!({ "items": group(5), "ttl_ms": HOUR_MS, "sync": true });
    let reserved = client.send("POST", "/v1/reserve-all", &all);
    let id = reservation(&reserved);
    let counters = reserved.json()["counters"].clone();
    assert_eq!(
        (&counters[0]["quota"], &counters[1]["quota"]),
        (&json!("organisation"), &json!("tokens"))
    );
    let again = client.send("POST", "/v1/reserve-all", &all);
    assert_eq!((again.status, &again.json()["refused"]), (429, &json!(0)));
    assert!(!again.headers.contains_key("retry-after"), "a lifetime does not end");
    // 4 are used by others of the organisation: 8 are left for it.
    let actual = |tokens: u64, organisation: u64| {
        json!({ "actual": [
            { "user": 7, "quota": "tokens", "amount": tokens },
            { "user": 1, "quota": "organisation", "amount": organisation },
        ] })
    };
    let denied = settle(&mut client, &id, "commit", &actual(20, 9));
    let body = denied.json();
    assert_eq!((denied.status, &body["refused"]), (429, &json!(1)));
    let refused = &body["decisions"][1];
    assert_eq!((&refused["user"], &refused["quota"]), (&json!(1), &json!("organisation")));
    assert!(!denied.headers.contains_key("retry-after"), "it would not help");
    assert_eq!(usage(&mut client, 7, "tokens"), (9, 5));
    let charged = settle(&mut client, &id, "commit", &actual(20, 8));
    assert_eq!((charged.status, &charged.json()["allowed"]), (200, &json!(true)));
    assert_eq!(usage(&mut client, 7, "tokens"), (24, 0));
    assert_eq!(usage(&mut client, 1, "organisation"), (12, 0));
    server.kill();
}

#[test]
fn a_key_counts_once_over_http() {
    let dir = tempfile::tempdir().unwrap();
    let (server, mut client) = start(dir.path());
    let ask = |amount: u64| json!({ "user": 7, "quota": "tokens", "amount": amount });
    let uuid = "8e03978e-40d5-43e8-bc93-6894a57f9324";
    let first = with_key(&mut client, uuid, "/v1/try-consume", &ask(2));
    let other_form = format!("\"{}\"", uuid.replace('-', "").to_uppercase());
    for key in [uuid, &other_form] {
        let again = with_key(&mut client, key, "/v1/try-consume", &ask(2));
        assert_eq!((again.status, &again.body), (200, &first.body));
    }
    assert_eq!(usage(&mut client, 7, "tokens"), (2, 0));
    let durable = json!({ "user": 7, "quota": "tokens", "amount": 3, "sync": true });
    let used = with_key(&mut client, "order 4711", "/v1/consume", &durable);
    assert_eq!((used.status, &used.json()["used"]), (200, &json!(5)));
    let hashed = with_key(&mut client, ORDER_HASH, "/v1/consume", &durable);
    assert_eq!(hashed.body, used.body, "the text stands for the start of its hash");
    assert_eq!(usage(&mut client, 7, "tokens"), (5, 0));
    for (path, body) in [("/v1/try-consume", ask(3)), ("/v1/consume", ask(2))] {
        let other = with_key(&mut client, "order 4711", path, &body);
        assert_eq!(kind(&other), is(422, "request_mismatch"));
    }
    let denied = with_key(&mut client, "too much", "/v1/try-consume", &ask(6));
    assert_eq!(denied.status, 429);
    let refund = json!({ "user": 7, "quota": "tokens", "amount": 5 });
    assert_eq!(client.send("POST", "/v1/refund", &refund).status, 200);
    let again = with_key(&mut client, "too much", "/v1/try-consume", &ask(6));
    // But for the wait, which is as of now.
    let [mut first, mut second] = [&denied, &again].map(Answer::json);
    let waits = [&mut first, &mut second].map(|answer| answer["retry_after_ms"].take().as_u64());
    assert!(waits[0] >= waits[1] && waits[1].is_some(), "{waits:?}");
    assert_eq!((again.status, second), (429, first), "refused once, refused again");

    let reserve = json!({ "user": 7, "quota": "tokens", "amount": 4, "ttl_ms": HOUR_MS });
    let id = reservation(&with_key(&mut client, "call 1", "/v1/reserve", &reserve));
    assert_eq!(reservation(&with_key(&mut client, "call 1", "/v1/reserve", &reserve)), id);
    assert_eq!(usage(&mut client, 7, "tokens"), (4, 4));
    let stats = client.get("/stats").json();
    assert_eq!((&stats["answers"], &stats["reservations"]), (&json!(4), &json!(1)));
    let metrics = client.get("/metrics").body;
    assert!(metrics.contains("\ntollgate_answers 4\n"), "{metrics}");
    assert!(metrics.contains("\ntollgate_reservations 1\n"), "{metrics}");
    server.kill();
}

/// What was reserved, and what was asked under a key, before a SIGKILL is what it was after it.
#[test]
fn a_killed_server_remembers_reservations_and_keys() {
    let dir = tempfile::tempdir().unwrap();
    let (server, mut client) = start(dir.path());
    let consume = json!({ "user": 7, "quota": "tokens", "amount": 2 });
    let reserve = json!({ "user": 7, "quota": "tokens", "amount": 6, "ttl_ms": HOUR_MS });
    let counted = with_key(&mut client, "pay", "/v1/consume", &consume);
    assert_eq!(counted.status, 200, "{}", counted.body);
    let keyed = reservation(&with_key(&mut client, "call", "/v1/reserve", &reserve));
    let group = json!({ "ttl_ms": HOUR_MS, "items": [
        { "user": 7, "quota": "tokens", "amount": 1 },
        { "user": 1, "quota": "organisation", "amount": 1 },
    ] });
    let open = reservation(&client.send("POST", "/v1/reserve-all", &group));
    server.kill();

    let (server, mut client) = start(dir.path());
    assert_eq!(usage(&mut client, 7, "tokens"), (9, 7));
    let again = with_key(&mut client, "pay", "/v1/consume", &consume);
    assert_eq!((again.status, &again.json()["used"]), (200, &json!(2)));
    assert_eq!(reservation(&with_key(&mut client, "call", "/v1/reserve", &reserve)), keyed);
    let charged = settle(&mut client, &keyed, "commit", &json!({ "actual": 3 }));
    assert_eq!(charged.status, 200, "{}", charged.body);
    assert_eq!(usage(&mut client, 7, "tokens"), (6, 1));
    server.kill();

    let (server, mut client) = start(dir.path());
    let late = settle(&mut client, &keyed, "commit", &json!({ "actual": 3 }));
    assert_eq!(late.json()["error"]["settled"], "committed");
    let again = with_key(&mut client, "call", "/v1/reserve", &reserve);
    assert_eq!((reservation(&again), &again.json()["expires_at"]), (keyed, &Value::Null));
    let actual = json!({ "actual": [
        { "user": 1, "quota": "organisation", "amount": 2 },
        { "user": 7, "quota": "tokens", "amount": 4 },
    ] });
    let charged = settle(&mut client, &open, "commit", &actual);
    assert_eq!(charged.status, 200, "{}", charged.body);
    assert_eq!(usage(&mut client, 7, "tokens"), (9, 0));
    assert_eq!(usage(&mut client, 1, "organisation"), (2, 0));
    server.kill();
}

#[test]
fn what_is_no_reservation_group_or_key_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("tollgate.toml");
    std::fs::write(&config, "reservations_max = 1\n").unwrap();
    let config = config.to_str().unwrap();
    let server = Server::start(&dir.path().join("data"), &["--config", config]);
    let mut client = server.connect();
    let ask = |ttl_ms: u64| json!({ "user": 7, "quota": "requests", "ttl_ms": ttl_ms });
    let seven_days = 7 * 24 * HOUR_MS;
    for ttl_ms in [0, seven_days + 1] {
        let refused = client.send("POST", "/v1/reserve", &ask(ttl_ms));
        assert_eq!(kind(&refused), is(400, "invalid_ttl"));
    }
    let id = reservation(&client.send("POST", "/v1/reserve", &ask(seven_days)));
    let full = client.send("POST", "/v1/reserve", &ask(HOUR_MS));
    assert_eq!(kind(&full), is(503, "too_many"));
    assert_eq!(full.headers["retry-after"], "1");

    let cost = |user: u64| json!({ "user": user, "quota": "requests", "amount": 1 });
    let both = settle(&mut client, &id, "commit", &json!({ "actual": [cost(7), cost(8)] }));
    assert_eq!(kind(&both), is(422, "reservation_mismatch"));
    let none = settle(&mut client, &id, "commit", &json!({ "actual": [] }));
    assert_eq!(kind(&none), is(400, "invalid_group"));
    let bare = json!({ "actual": [{ "user": 7, "quota": "requests" }] });
    assert_eq!(settle(&mut client, &id, "commit", &bare).status, 422, "no amount is meant");
    assert_eq!(settle(&mut client, &id, "commit", &json!({ "actual": [1] })).status, 422);
    let huge = settle(&mut client, &id, "commit", &json!({ "actual": 1_u64 << 63 }));
    assert_eq!(kind(&huge), is(400, "invalid_amount"));
    assert_eq!(settle(&mut client, &id, "commit", &json!({ "actual": "x" })).status, 422);
    let unknown = "0123456789abcdef".repeat(2);
    let commit = json!({ "actual": 1 });
    assert_eq!(
        kind(&settle(&mut client, &unknown, "commit", &commit)),
        is(404, "unknown_reservation")
    );
    for bad in [&unknown[1..], &format!("{unknown}0"), &format!("+{}", &unknown[1..])] {
        assert_eq!(
            kind(&settle(&mut client, bad, "commit", &commit)),
            is(400, "bad_path"),
            "{bad}"
        );
    }
    let item = json!({ "user": 1, "quota": "requests" });
    for count in [0, 17] {
        let items = json!({ "items": vec![item.clone(); count] });
        let refused = client.send("POST", "/v1/try-consume-all", &items);
        assert_eq!(kind(&refused), is(400, "invalid_group"), "{count}");
    }
    let unknown = json!({ "items": [{ "user": 1, "quota": "none" }] });
    let refused = client.send("POST", "/v1/try-consume-all", &unknown);
    assert_eq!(kind(&refused), is(404, "unknown_quota"));

    let items = json!({ "items": [item], "ttl_ms": HOUR_MS });
    let group = json!({ "items": [item] });
    for (path, body) in [
        ("/v1/try-consume-all", &group),
        ("/v1/consume-batch", &group),
        ("/v1/reserve-all", &items),
        ("/v1/refund", &item),
    ] {
        let refused = with_key(&mut client, "key", path, body);
        assert_eq!(kind(&refused), is(400, "bad_idempotency_key"), "{path}");
    }
    for key in ["", "\"a", "a\tb", &"a".repeat(256), "a\r\nIdempotency-Key: b"] {
        let refused = with_key(&mut client, key, "/v1/consume", &item);
        assert_eq!(kind(&refused), is(400, "bad_idempotency_key"), "{key:?}");
    }
    assert_eq!(usage(&mut client, 1, "requests"), (0, 0));
    server.kill();
}
