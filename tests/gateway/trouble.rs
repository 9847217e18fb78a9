//! Clients, upstreams and disks that do not do what is expected of them.

use std::time::Duration;

use serde_json::{Value, json};
use tollgate::{AMOUNT_MAX, Config, Consume, Error, Quota, Tollgate};

use crate::estimate::BOUNDS;
use crate::metering::Metered;
use crate::parts::estimate;
use crate::process::{eventually, refusal};
use crate::scenarios::{HOUR, MAX_TOKENS, PLENTY, prompt, request, start, start_with};
use crate::upstream::{Script, Upstream};

const SILENT: Script = Script { total_tokens: None, pieces: 0, holds: false };

/// Both names of the bound are sent on, and the upstream may go by either.
#[test]
fn the_larger_of_two_bounds_is_reserved() {
    let dir = tempfile::tempdir().unwrap();
    let upstream = Upstream::start();
    let gateway = start(dir.path(), &upstream, PLENTY, HOUR);
    let script = Script { holds: true, ..SILENT };
    let mut asks = request(&script, true);
    asks["max_completion_tokens"] = json!(1);
    let _stream = gateway.complete("alice", &asks);
    let reserved = prompt() + MAX_TOKENS;
    assert_eq!(gateway.usage("alice"), [(reserved, reserved); 2]);
}

/// More than the sockets between them hold: the upstream's stream stands still, and what it has
/// reserved must not stay so for as long as the client likes.
#[test]
fn a_client_that_does_not_read_pays_for_what_was_streamed() {
    const PIECES: u64 = 99;
    const PIECE_BYTES: u64 = 256 << 10;
    let dir = tempfile::tempdir().unwrap();
    let upstream = Upstream::start();
    let gateway = start_with(dir.path(), &upstream, PLENTY, HOUR, &["--silence-ms", "3000"]);
    let script = Script { pieces: PIECES, ..SILENT };
    let mut asks = request(&script, true);
    asks["piece_bytes"] = json!(PIECE_BYTES);
    let mut answer = gateway.complete("alice", &asks);
    assert_eq!(answer.status, 200);
    let is_settled = || gateway.usage("alice").iter().all(|&(_, reserved)| reserved == 0);
    eventually("it is settled", is_settled);
    let [(used, _), organisation] = gateway.usage("alice");
    assert_eq!(organisation, (used, 0));
    let streamed = used - estimate(&asks);
    let piece = PIECE_BYTES / 4;
    assert!(streamed.is_multiple_of(piece), "{streamed}");
    assert!((1..PIECES).contains(&(streamed / piece)), "{streamed}");

    // It finds its stream cut off, not ended.
    let read: usize = std::iter::from_fn(|| answer.next()).map(|part| part.len()).sum();
    assert!((read as u64) < PIECES * PIECE_BYTES && !answer.is_ended(), "{read}");
}

#[test]
fn an_answer_that_cannot_be_read_is_charged_what_was_reserved() {
    type Charged = fn(u64) -> u64;
    let reserved: Charged = |prompt| prompt + MAX_TOKENS;
    let prompt_alone: Charged = |prompt| prompt;
    let whole = json!({ "choices": [{ "message": { "content": "12345678" } }] });
    let mut with_usage = whole.clone();
    with_usage["usage"] = json!({ "total_tokens": 9 });
    let mut absurd = whole.clone();
    absurd["usage"] = json!({ "total_tokens": AMOUNT_MAX + 1 });
    for (raw, is_stream, charged) in [
        ("surprise", false, reserved),
        ("surprise", true, reserved),
        ("data: surprise\n\ndata: [DONE]\n\n", true, reserved),
        ("data: {\"output\": \"x\"}\n\ndata: [DONE]\n\n", true, reserved),
        ("{\"output\": \"x\"}", false, reserved),
        ("{\"output\": \"x\"}", true, reserved),
        // A whole answer, though a stream was asked for.
        (&whole.to_string(), true, |prompt| prompt + 2),
        (&with_usage.to_string(), true, |_| 9),
        // Nobody has used so much.
        (&absurd.to_string(), false, |prompt| prompt + 2),
        ("{\"usage\": {\"total_tokens\": 9223372036854775808}}", false, reserved),
        ("{\"usage\": {\"total_tokens\": 18446744073709551616}}", false, reserved),
        // Nothing was produced.
        ("{\"error\": {\"message\": \"x\"}}", false, prompt_alone),
        (": nothing yet\n\ndata: [DONE]\n\n", true, prompt_alone),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let upstream = Upstream::start();
        let gateway = start(dir.path(), &upstream, PLENTY, HOUR);
        let mut asks = request(&SILENT, is_stream);
        asks["raw"] = json!(raw);
        let mut answer = gateway.complete("alice", &asks);
        assert_eq!((answer.status, &*answer.rest()), (200, raw), "it is passed on as it is");
        let charged = charged(estimate(&asks));
        assert_eq!(gateway.usage("alice"), [(charged, 0); 2], "{raw:?}, {is_stream}");
    }
}

#[test]
fn a_bill_that_can_not_be_counted_is_what_was_reserved() {
    let dir = tempfile::tempdir().unwrap();
    let upstream = Upstream::start();
    let gateway = start(dir.path(), &upstream, PLENTY, HOUR);
    let script = Script { total_tokens: Some(9), ..SILENT };
    assert_eq!(gateway.complete("alice", &request(&script, false)).status, 200);
    let mut asks = request(&SILENT, false);
    asks["raw"] = json!(json!({ "usage": { "total_tokens": AMOUNT_MAX } }).to_string());
    assert_eq!(gateway.complete("alice", &asks).status, 200);
    assert_eq!(gateway.usage("alice"), [(9 + estimate(&asks) + MAX_TOKENS, 0); 2]);
}

/// An upstream may take it for true, and stream.
#[test]
fn a_stream_that_is_neither_true_nor_false_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let upstream = Upstream::start();
    let gateway = start(dir.path(), &upstream, PLENTY, HOUR);
    for stream in [json!("true"), json!(1), json!({})] {
        let mut asks = request(&SILENT, false);
        asks["stream"] = stream;
        assert_eq!(gateway.complete("alice", &asks).status, 400, "{asks}");
    }
    assert_eq!(upstream.arrived(), 0);
    let mut asks = request(&SILENT, false);
    asks["stream"] = Value::Null;
    assert_eq!(gateway.complete("alice", &asks).status, 200);
}

/// What was used is charged as soon as the log has room again, and until then it is reserved.
#[test]
fn what_the_log_has_no_room_for_is_charged_later() {
    const TTL: Duration = Duration::from_secs(600);
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path().join("data");
    let config = Config::default()
        .lanes(1)
        .lane_records(64)
        .journal_file_bytes(64 << 10)
        .backpressure_deadline(Duration::from_millis(20));
    let gate = Tollgate::open(&here, config).unwrap();
    let quota = gate.define(Quota::new("tokens", PLENTY)).unwrap();
    let counters = [7, 8].map(|user| Consume { user, quota, amount: 100 });
    let reserve = || Metered::reserve(&gate, counters, 5, TTL).unwrap().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let (mut metered, mut given_up) = (reserve(), reserve());

    // No journal file can be created any more, where a directory has the name that it has first;
    // what is left of the last one is filled.
    let in_the_way = |number| here.join(format!("journal-{number:020}.tmp"));
    for number in 1..100 {
        let _ = std::fs::create_dir(in_the_way(number));
    }
    let mut refused = 0;
    for user in 1_000.. {
        match gate.consume(user, quota, 1) {
            Ok(_) => refused = 0,
            Err(Error::Backpressure { .. }) => refused += 1,
            Err(error) => panic!("{error}"),
        }
        if refused == 50 {
            break;
        }
    }
    // An extension that fails is tried again long before the reservation's time is over.
    let failed = gate.stats().failed;
    let mut paused = tokio::runtime::Builder::new_current_thread();
    let paused = paused.enable_time().start_paused(true).build().unwrap();
    paused.block_on(async { metered.keep_open(tokio::time::sleep(TTL)).await });
    assert!(gate.stats().failed >= failed + 10);
    runtime.block_on(async {
        metered.begin();
        metered.observe(&json!({ "choices": [], "usage": { "total_tokens": 50 } }), 90);
        drop(metered);
    });
    // Without a runtime there is nobody to try again.
    given_up.begin();
    drop(given_up);
    let usage = |user| {
        let usage = gate.usage(user, quota).unwrap();
        (usage.used, usage.reserved)
    };
    assert_eq!([7, 8].map(usage), [(200, 200); 2]);
    for number in 1..100 {
        let _ = std::fs::remove_dir(in_the_way(number));
    }
    eventually("it is charged", || [7, 8].map(usage) == [(150, 100); 2]);
    runtime.shutdown_background();
    gate.close().unwrap();
}

#[test]
fn a_body_is_read_for_those_with_a_key_and_not_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let upstream = Upstream::start();
    let gateway = start_with(dir.path(), &upstream, PLENTY, HOUR, &["--silence-ms", "500"]);
    assert_eq!(gateway.begin("mallory", "").status, 401);
    assert_eq!(gateway.begin("alice", "{\"messages\":").status, 408);
}

#[test]
fn a_bound_is_sent_under_the_name_that_the_upstream_knows() {
    let dir = tempfile::tempdir().unwrap();
    let upstream = Upstream::start();
    let mut asks = request(&SILENT, false);
    asks.as_object_mut().unwrap().remove("max_tokens");
    for (options, name) in [(&[][..], BOUNDS[0]), (&["--bound-field", BOUNDS[1]], BOUNDS[1])] {
        let gateway = start_with(dir.path(), &upstream, PLENTY, HOUR, options);
        assert_eq!(gateway.complete("alice", &asks).status, 200);
        let sent = upstream.last();
        let sent = BOUNDS.map(|name| sent[name].as_u64());
        assert_eq!(sent, BOUNDS.map(|it| (it == name).then_some(1_024)));
    }
}

/// The parser's message quotes the text that it is about, and the text is full of keys.
#[test]
fn a_bad_accounts_file_is_refused_without_a_word_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("accounts.toml");
    let organisation = "[[organisations]]\nname = \"acme\"\nid = 1\ntokens = 5\n";
    let key = |key: &str, id: &str, organisation: &str| {
        format!("[[keys]]\nkey = {key}\nid = {id}\norganisation = {organisation}\ntokens = 5\n")
    };
    let good = key("\"secret-1\"", "7", "\"acme\"");
    let cases = [
        (key("secret-2", "8", "\"acme\""), "line 11: "),
        (key("\"secret-2", "8", "\"acme\""), "line 11: "),
        (key("\"secret-2\"", "\"secret-3\"", "\"acme\""), "line 12: "),
        (format!("{good}secret-2 = 1\n"), "line 15: "),
        (format!("{good}organization = \"secret-2\"\n"), "line 15: "),
        (key("\"secret-2\"", "8", "\"secret-3\""), "key 8: "),
        (key("\"secret-1\"", "8", "\"acme\""), "key 8 "),
        ("[[organisations]]\nname = \"secret-2\"\nid = 1\ntokens = 5\n".to_owned(), "id 1 "),
    ];
    for (more, place) in cases {
        let text = format!("{organisation}{good}{more}");
        std::fs::write(&file, &text).unwrap();
        let said = refusal(dir.path(), &["--accounts", file.to_str().unwrap()]);
        assert!(!said.contains("secret"), "{text}: {said}");
        assert!(said.starts_with("token_gateway: accounts ") && said.contains(place), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
}

#[test]
fn a_busy_port_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let said = refusal(dir.path(), &["--listen", &address]);
    assert!(said.starts_with(&format!("token_gateway: can't listen on {address}: ")), "{said}");
}

/// Clients ask for the models first, and expect the API's form of an error.
#[test]
fn an_unknown_path_is_an_error_of_the_api() {
    let dir = tempfile::tempdir().unwrap();
    let gateway = start(dir.path(), &Upstream::start(), PLENTY, HOUR);
    for (path, status) in [("/v1/models", 404), ("/v1/chat/completions", 405)] {
        let mut answer = gateway.get(path);
        let error: Value = serde_json::from_str(&answer.rest()).unwrap();
        assert_eq!((answer.status, &error["error"]["code"]), (status, &json!("unknown_url")));
    }
}
