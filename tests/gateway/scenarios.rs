//! What the gateway promises, one promise a test.

use std::io::Write as _;
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use crate::parts::estimate;
use crate::process::{Answer, Gateway, eventually};
use crate::upstream::{Script, Upstream};

pub(crate) const PLENTY: u64 = 1_000_000_000;
pub(crate) const MAX_TOKENS: u64 = 100;

/// Two keys of one organisation.
pub(crate) fn start(
    dir: &Path,
    upstream: &Upstream,
    organisation_tokens: u64,
    ttl: Duration,
) -> Gateway {
    start_with(dir, upstream, organisation_tokens, ttl, &[])
}

pub(crate) fn start_with(
    dir: &Path,
    upstream: &Upstream,
    organisation_tokens: u64,
    ttl: Duration,
    options: &[&str],
) -> Gateway {
    let accounts = dir.join("accounts.toml");
    let text = format!(
        "window = \"month\"\n\
         [[organisations]]\nname = \"acme\"\nid = 1\ntokens = {organisation_tokens}\n\
         [[keys]]\nkey = \"alice\"\nid = 7\norganisation = \"acme\"\ntokens = {PLENTY}\n\
         [[keys]]\nkey = \"bob\"\nid = 8\norganisation = \"acme\"\ntokens = {PLENTY}\n"
    );
    std::fs::write(&accounts, text).unwrap();
    let (accounts, ttl) = (accounts.to_str().unwrap(), ttl.as_millis().to_string());
    let own = ["--upstream", &upstream.url, "--accounts", accounts, "--ttl-ms", &ttl];
    Gateway::start(dir, &[&own, options].concat())
}

pub(crate) const HOUR: Duration = Duration::from_secs(3_600);

pub(crate) fn request(script: &Script, is_stream: bool) -> Value {
    let messages = json!([{ "role": "user", "content": script.text() }]);
    json!({ "model": "m", "messages": messages, "max_tokens": MAX_TOKENS, "stream": is_stream })
}

/// What a request reserves for its prompt; the same for all scripts.
pub(crate) fn prompt() -> u64 {
    let script = Script { total_tokens: None, pieces: 0, holds: false };
    estimate(&request(&script, false))
}

/// Starts a stream, and reads until it is held back.
fn held_stream(gateway: &Gateway, pieces: u64) -> Answer {
    let script = Script { total_tokens: Some(prompt() + 50), pieces, holds: true };
    let mut answer = gateway.complete("alice", &request(&script, true));
    assert_eq!(answer.status, 200);
    for _ in 0..pieces {
        assert!(answer.next().expect("a piece").contains("\"content\":\"x\""));
    }
    answer
}

/// The request that each of the 200 makes, and what it is charged when it is admitted.
fn varied(index: u64) -> (Value, u64) {
    let total = prompt() + 1 + index % 90;
    let pieces = index % 7;
    let says = Script { total_tokens: Some(total), pieces, holds: true };
    let is_silent = Script { total_tokens: None, ..says };
    match index % 4 {
        0 => (request(&says, false), total),
        1 => {
            let mut asks = request(&says, true);
            asks["stream_options"] = json!({ "include_usage": true });
            (asks, total)
        }
        2 => (request(&says, true), total),
        _ => (request(&is_silent, true), prompt() + pieces),
    }
}

fn check_admitted(index: u64, body: &str) {
    match index % 4 {
        0 => assert!(body.contains("\"usage\""), "{body}"),
        1 => assert!(body.contains("\"usage\"") && body.ends_with("[DONE]\n\n"), "{body}"),
        _ => assert!(!body.contains("\"usage\"") && body.ends_with("[DONE]\n\n"), "{body}"),
    }
    if !index.is_multiple_of(4) {
        let pieces = body.matches("\"content\":\"x\"").count() as u64;
        assert_eq!(pieces, index % 7, "{body}");
    }
}

#[test]
fn of_200_at_once_50_are_admitted_and_the_budget_is_kept() {
    const REQUESTS: usize = 200;
    let dir = tempfile::tempdir().unwrap();
    let upstream = Upstream::start();
    let reserved = prompt() + MAX_TOKENS;
    let budget = 50 * reserved;
    let gateway = start(dir.path(), &upstream, budget, HOUR);
    let (together, refused) = (Barrier::new(REQUESTS), AtomicUsize::new(0));
    let keys = ["alice", "bob"];
    let (admitted, organisation, charged) = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..REQUESTS as u64)
            .map(|index| {
                let (gateway, together, refused) = (&gateway, &together, &refused);
                scope.spawn(move || {
                    let (request, cost) = varied(index);
                    let key = usize::try_from(index / 4 % 2).unwrap();
                    together.wait();
                    let mut answer = gateway.complete(keys[key], &request);
                    if answer.status == 429 {
                        refused.fetch_add(1, Ordering::SeqCst);
                        assert!(answer.headers["retry-after"].parse::<u64>().unwrap() > 0);
                        let body = answer.rest();
                        assert!(body.contains("organisation") && body.contains("acme"), "{body}");
                        return (key, 0);
                    }
                    assert_eq!(answer.status, 200);
                    check_admitted(index, &answer.rest());
                    (key, cost)
                })
            })
            .collect();
        let decided = || refused.load(Ordering::SeqCst) + upstream.arrived();
        eventually("all are decided", || decided() == REQUESTS);
        let (admitted, [_, organisation]) = (upstream.arrived(), gateway.usage("alice"));
        upstream.release();
        let mut charged = [0, 0];
        for thread in threads {
            let (key, cost) = thread.join().unwrap();
            charged[key] += cost;
        }
        (admitted, organisation, charged)
    });
    assert_eq!(admitted, 50);
    assert_eq!(organisation, (budget, budget), "not one token was left");
    let total = charged[0] + charged[1];
    for (key, charged) in keys.into_iter().zip(charged) {
        assert_eq!(gateway.usage(key), [(charged, 0), (total, 0)]);
    }

    // What has come back can be had to the last token, and not one more.
    let rest = budget - total;
    let script = Script { total_tokens: Some(rest), pieces: 1, holds: false };
    let mut last = request(&script, false);
    last["max_tokens"] = json!(rest - prompt() + 1);
    assert_eq!(gateway.complete("bob", &last).status, 429);
    last["max_tokens"] = json!(rest - prompt());
    assert_eq!(gateway.complete("bob", &last).status, 200);
    assert_eq!(gateway.usage("alice")[1], (budget, 0));
    assert_eq!(gateway.complete("alice", &request(&script, true)).status, 429);
}

#[test]
fn a_client_that_goes_away_pays_for_what_was_streamed() {
    let dir = tempfile::tempdir().unwrap();
    let upstream = Upstream::start();
    let gateway = start(dir.path(), &upstream, PLENTY, HOUR);
    let stream = held_stream(&gateway, 5);
    let reserved = prompt() + MAX_TOKENS;
    assert_eq!(gateway.usage("alice"), [(reserved, reserved); 2]);
    drop(stream);
    let charged = (prompt() + 5, 0);
    eventually("it is charged", || gateway.usage("alice") == [charged; 2]);
    eventually("the upstream is let go of", || upstream.broken_off() == 1);
}

#[test]
fn a_whole_answer_is_charged_though_nobody_waits_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let upstream = Upstream::start();
    let gateway = start(dir.path(), &upstream, PLENTY, HOUR);
    drop(held_whole(&gateway, &upstream));
    upstream.release();
    eventually("it is charged", || gateway.usage("alice") == [(77, 0); 2]);
}

/// Asks for a whole answer, of 77 tokens, which is held back.
fn held_whole(gateway: &Gateway, upstream: &Upstream) -> TcpStream {
    let script = Script { total_tokens: Some(77), pieces: 1, holds: true };
    let body = request(&script, false).to_string();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: test\r\nAuthorization: bearer alice\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut stream = TcpStream::connect(&gateway.address).unwrap();
    stream.write_all(head.as_bytes()).unwrap();
    eventually("it has arrived", || upstream.arrived() == 1);
    stream
}

/// The upstream works for it, and what it would have cost is not known.
#[test]
fn told_to_stop_it_charges_the_prompt_of_an_answer_that_has_not_come() {
    let dir = tempfile::tempdir().unwrap();
    let upstream = Upstream::start();
    let gateway = start(dir.path(), &upstream, PLENTY, HOUR);
    let _stream = held_whole(&gateway, &upstream);
    gateway.stop();
    let gateway = start(dir.path(), &upstream, PLENTY, HOUR);
    assert_eq!(gateway.usage("alice"), [(prompt(), 0); 2]);
}

#[test]
fn an_upstream_that_breaks_off_before_its_answer_has_read_the_prompt() {
    let dir = tempfile::tempdir().unwrap();
    let upstream = Upstream::start();
    let gateway = start(dir.path(), &upstream, PLENTY, HOUR);
    for is_stream in [false, true] {
        let script = Script { total_tokens: None, pieces: 0, holds: false };
        let mut asks = request(&script, is_stream);
        asks["breaks_off"] = json!(true);
        let (used, _) = gateway.usage("alice")[0];
        assert_eq!(gateway.complete("alice", &asks).status, 502);
        assert_eq!(gateway.usage("alice"), [(used + estimate(&asks), 0); 2]);
    }
}

/// A model answers in the order of its schema, and knows numbers that no integer here holds.
#[test]
fn what_a_client_sends_reaches_the_upstream_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let upstream = Upstream::start();
    let gateway = start(dir.path(), &upstream, PLENTY, HOUR);
    let schema = r#"{"z":1,"a":2, "big":123456789012345678901234567890,"price":1.10}"#;
    let script = Script { total_tokens: Some(9), pieces: 1, holds: false };
    for is_stream in [false, true] {
        let asks = format!(
            r#"{{"stream":{is_stream},"messages":[{{"content":"{}"}}],"response_format":{schema}}}"#,
            script.text()
        );
        assert_eq!(gateway.complete_as("alice", &asks).status, 200);
        let sent = upstream.last_body();
        assert!(sent.contains(&format!("\"response_format\":{schema}")), "{sent}");
        assert!(sent.contains("\"max_tokens\":1024"), "{sent}");
        assert_eq!(
            sent.contains("\"stream_options\":{\"include_usage\":true}"),
            is_stream,
            "{sent}"
        );
    }
}

#[test]
fn what_fails_before_it_begins_costs_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let upstream = Upstream::start();
    let gateway = start(dir.path(), &upstream, PLENTY, HOUR);
    for is_stream in [false, true] {
        let fails = Script { total_tokens: Some(0), pieces: 1, holds: false };
        assert_eq!(gateway.complete("alice", &request(&fails, is_stream)).status, 500);
    }
    for (bad, status) in [
        (json!({ "messages": [], "max_tokens": -1 }), 400),
        (json!({ "max_tokens": 1 }), 400),
        (json!({ "messages": [], "max_tokens": PLENTY }), 429),
        (json!({ "messages": [], "max_tokens": u64::MAX, "n": 9 }), 429),
    ] {
        let answer = gateway.complete("alice", &bad);
        assert_eq!((answer.status, answer.headers.get("retry-after")), (status, None), "{bad}");
    }
    assert_eq!(gateway.complete("mallory", &json!({})).status, 401);
    assert_eq!(gateway.usage("alice"), [(0, 0); 2]);

    // Nobody listens there any more.
    let dir = tempfile::tempdir().unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let upstream = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let gateway = Gateway::start(dir.path(), &["--upstream", &upstream]);
    let request = json!({ "messages": [], "max_tokens": 5 });
    assert_eq!(gateway.complete("sk-demo-alice", &request).status, 502);
    assert_eq!(gateway.usage("sk-demo-alice"), [(0, 0); 2]);
}

/// A stream that takes longer than the time to live, with nothing on the line.
#[test]
fn a_long_stream_keeps_what_it_has_reserved() {
    const TTL: Duration = Duration::from_secs(4);
    let dir = tempfile::tempdir().unwrap();
    let upstream = Upstream::start();
    let gateway = start(dir.path(), &upstream, PLENTY, TTL);
    let mut stream = held_stream(&gateway, 2);
    std::thread::sleep(TTL + TTL / 2);
    let reserved = prompt() + MAX_TOKENS;
    assert_eq!(gateway.usage("alice"), [(reserved, reserved); 2]);
    upstream.release();
    assert!(stream.rest().ends_with("[DONE]\n\n"));
    assert_eq!(gateway.usage("alice"), [(prompt() + 50, 0); 2]);
}

/// A stream that does not end in time when the gateway is told to stop is broken off, and charged.
#[test]
fn told_to_stop_it_charges_what_was_streamed() {
    let dir = tempfile::tempdir().unwrap();
    let upstream = Upstream::start();
    let gateway = start(dir.path(), &upstream, PLENTY, HOUR);
    let mut stream = held_stream(&gateway, 3);
    gateway.stop();
    assert!(stream.next().is_none() && !stream.is_ended(), "it is broken off");
    let gateway = start(dir.path(), &upstream, PLENTY, HOUR);
    assert_eq!(gateway.usage("alice"), [(prompt() + 3, 0); 2]);
}

/// Runs some requests to their end, kills the gateway while others are in mid-stream, and starts it
/// again. Gives it back with what had been charged and what was open.
fn killed_in_mid_stream(dir: &Path, ttl: Duration) -> (Gateway, u64, u64) {
    const OPEN: u64 = 5;
    let upstream = Upstream::start();
    let gateway = start(dir, &upstream, PLENTY, ttl);
    let mut charged = 0;
    for index in 0..8 {
        let (mut request, cost) = varied(index);
        let script = request["messages"][0]["content"].as_str().unwrap();
        request["messages"][0]["content"] = json!(script.replace("holds 1", "holds 0"));
        let mut answer = gateway.complete("alice", &request);
        assert_eq!(answer.status, 200);
        check_admitted(index, &answer.rest());
        charged += cost;
    }
    let mut streams: Vec<_> = (0..OPEN).map(|pieces| held_stream(&gateway, 1 + pieces)).collect();
    let open = OPEN * (prompt() + MAX_TOKENS);
    gateway.kill();
    for stream in &mut streams {
        assert_eq!(stream.next(), None, "it is broken off");
    }
    (start(dir, &upstream, PLENTY, ttl), charged, open)
}

#[test]
fn killed_in_mid_stream_it_has_lost_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (gateway, charged, open) = killed_in_mid_stream(dir.path(), HOUR);
    assert_eq!(gateway.usage("alice"), [(charged + open, open); 2]);
}

#[test]
fn killed_in_mid_stream_it_gives_back_what_was_open_when_its_time_is_over() {
    let dir = tempfile::tempdir().unwrap();
    let (gateway, charged, _) = killed_in_mid_stream(dir.path(), Duration::from_millis(1_500));
    eventually("it is given back", || gateway.usage("alice") == [(charged, 0); 2]);
}

/// The demonstration: its own upstream, its own accounts.
#[test]
fn the_printed_lines_work_as_printed() {
    let dir = tempfile::tempdir().unwrap();
    let gateway = Gateway::start(dir.path(), &[]);
    let lines = gateway.greeting.iter().filter(|line| line.starts_with("  curl "));
    let outputs: Vec<_> = lines
        .map(|line| {
            let output = Command::new("sh").args(["-c", line]).output().expect("a shell");
            assert!(output.status.success(), "curl is installed, and the line works: {output:?}");
            String::from_utf8(output.stdout).expect("text")
        })
        .collect();
    let [answer, stream, refusal, usage] = outputs.try_into().expect("four lines");
    let answer: Value = serde_json::from_str(&answer).expect("JSON");
    assert_eq!(answer["usage"]["total_tokens"], 2 + 24, "{answer}");
    assert!(stream.ends_with("data: [DONE]\n\n") && !stream.contains("usage"), "{stream}");
    assert_eq!(stream.matches("content").count(), 24, "{stream}");
    assert!(refusal.starts_with("HTTP/1.1 429") && refusal.contains("retry-after:"), "{refusal}");
    let usage: Value = serde_json::from_str(&usage).expect("JSON");
    assert_eq!((&usage["key"]["used"], &usage["key"]["reserved"]), (&json!(52), &json!(0)));
}
