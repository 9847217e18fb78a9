//! The real binary: driven over HTTP, killed, stopped, misused.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_tollgate");

/// A running server.
pub(crate) struct Server {
    pub(crate) child: Child,
    pub(crate) address: String,
    /// What it has printed before it began to serve.
    pub(crate) greeting: Vec<String>,
    pub(crate) output: BufReader<std::process::ChildStdout>,
}

/// A quota to count with.
pub(crate) const REQUESTS: [&str; 2] = ["--quota", "requests=1000/day"];

impl Server {
    /// With the quota [`REQUESTS`].
    pub(crate) fn start(dir: &Path, arguments: &[&str]) -> Self {
        Self::start_without_quota(dir, &[&REQUESTS, arguments].concat())
    }

    pub(crate) fn start_without_quota(dir: &Path, arguments: &[&str]) -> Self {
        Self::launch(&mut Command::new(BINARY), dir, arguments)
    }

    /// By a shell, which runs `preparation` first and then becomes the server.
    pub(crate) fn start_after(preparation: &str, dir: &Path, arguments: &[&str]) -> Self {
        let script = format!("{preparation}; exec \"$0\" \"$@\"");
        Self::launch(Command::new("sh").args(["-c", &script, BINARY]), dir, arguments)
    }

    pub(crate) fn launch(command: &mut Command, dir: &Path, arguments: &[&str]) -> Self {
        let mut child = command
            .args(["serve", "--listen", "127.0.0.1:0", "--dir"])
            .arg(dir)
            .args(arguments)
            .stdout(Stdio::piped())
            .spawn()
            .expect("the server starts");
        let mut output = BufReader::new(child.stdout.take().expect("piped"));
        let mut greeting = Vec::new();
        loop {
            let mut line = String::new();
            let read = output.read_line(&mut line).expect("the server prints");
            assert!(read > 0, "the server ended early: {greeting:?}");
            greeting.push(line.trim_end().to_owned());
            if line.starts_with("stop with") {
                break;
            }
        }
        let listening = greeting.iter().find_map(|line| line.strip_prefix("listening on http://"));
        let address = listening.expect("it says where it listens").to_owned();
        Self { child, address, greeting, output }
    }

    pub(crate) fn connect(&self) -> Client {
        Client::new(&self.address)
    }

    pub(crate) fn kill(mut self) {
        self.child.kill().expect("it can be killed");
        self.child.wait().expect("it is reaped");
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub(crate) fn terminate(&self) {
        kill_process(self.pid(), Signal::TERM).expect("it is there");
    }

    /// SIGTERM, and what it printed then.
    pub(crate) fn stop(mut self) -> (Option<i32>, String) {
        self.terminate();
        let mut rest = String::new();
        self.output.read_to_string(&mut rest).expect("it prints");
        (self.child.wait().expect("it ends").code(), rest)
    }
}

/// A keep-alive connection.
pub(crate) struct Client {
    stream: BufReader<TcpStream>,
    pub(crate) headers: String,
}

pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HashMap<String, String>,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).expect("JSON")
    }
}

impl Client {
    pub(crate) fn new(address: &str) -> Self {
        let stream = TcpStream::connect(address).expect("it accepts");
        stream.set_nodelay(true).expect("a socket");
        Self { stream: BufReader::new(stream), headers: String::new() }
    }

    /// One request; an error when the server is gone.
    pub(crate) fn try_send(
        &mut self,
        method: &str,
        path: &str,
        body: &str,
    ) -> std::io::Result<Answer> {
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{}\
             Content-Length: {}\r\n\r\n{body}",
            self.headers,
            body.len()
        );
        self.stream.get_mut().write_all(request.as_bytes())?;
        let mut line = String::new();
        let gone = || std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
        if self.stream.read_line(&mut line)? == 0 {
            return Err(gone());
        }
        let status = line.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or_else(gone)?;
        let mut headers = HashMap::new();
        loop {
            line.clear();
            if self.stream.read_line(&mut line)? == 0 {
                return Err(gone());
            }
            let Some((name, value)) = line.trim_end().split_once(": ") else { break };
            headers.insert(name.to_ascii_lowercase(), value.to_owned());
        }
        let length = headers.get("content-length").and_then(|length| length.parse().ok());
        let mut body = vec![0; length.unwrap_or(0)];
        self.stream.read_exact(&mut body)?;
        Ok(Answer { status, headers, body: String::from_utf8_lossy(&body).into_owned() })
    }

    pub(crate) fn send(&mut self, method: &str, path: &str, body: &Value) -> Answer {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        self.try_send(method, path, &body).expect("the server answers")
    }

    pub(crate) fn get(&mut self, path: &str) -> Answer {
        self.send("GET", path, &Value::Null)
    }
}

/// For each user: what was sent, and what was acknowledged.
struct Load {
    sent: Vec<AtomicU64>,
    acknowledged: Vec<AtomicU64>,
}

const USERS: usize = 1_000;
const CONNECTIONS: usize = 4;
const LOW_LIMIT: u64 = 12;

impl Load {
    fn new(start: &[u64]) -> Self {
        let numbers = || start.iter().map(|&used| AtomicU64::new(used)).collect();
        Self { sent: numbers(), acknowledged: numbers() }
    }

    /// Drives the server until `enough` operations were acknowledged, then does `finish` while the
    /// load goes on (where the server is to be killed) or after it.
    fn drive(&self, server: Server, enough: u64, finish: impl FnOnce(Server), in_the_middle: bool) {
        let (done, count) = (AtomicBool::new(false), AtomicU64::new(0));
        let address = server.address.clone();
        let server = Mutex::new(Some(server));
        std::thread::scope(|scope| {
            for connection in 0..CONNECTIONS {
                let (done, count, address) = (&done, &count, &address);
                scope.spawn(move || self.one_connection(connection, address, done, count));
            }
            while count.load(Ordering::SeqCst) < enough {
                std::thread::yield_now();
            }
            let server = server.lock().expect("one user").take().expect("still running");
            if in_the_middle {
                finish(server);
                done.store(true, Ordering::SeqCst);
            } else {
                done.store(true, Ordering::SeqCst);
                // The connections finish what they have sent; see below.
                while count.load(Ordering::SeqCst) < enough + CONNECTIONS as u64 {
                    std::thread::yield_now();
                }
                finish(server);
            }
        });
    }

    fn one_connection(
        &self,
        connection: usize,
        address: &str,
        done: &AtomicBool,
        count: &AtomicU64,
    ) {
        let mut client = Client::new(address);
        let mut random = connection as u64 + 1;
        loop {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(99);
            let user = usize::try_from(random >> 33).expect("31 bits") % USERS;
            let amount = (random >> 20) % 3 + 1;
            let last = done.load(Ordering::SeqCst);
            self.sent[user].fetch_add(amount, Ordering::SeqCst);
            let body = json!({ "user": user, "quota": "load", "amount": amount });
            let Ok(answer) = client.try_send("POST", "/v1/try-consume", &body.to_string()) else {
                return;
            };
            match answer.status {
                200 => {
                    self.acknowledged[user].fetch_add(amount, Ordering::SeqCst);
                }
                429 => {
                    self.sent[user].fetch_sub(amount, Ordering::SeqCst);
                }
                status => panic!("{status}: {}", answer.body),
            }
            count.fetch_add(1, Ordering::SeqCst);
            if last {
                return;
            }
        }
    }

    fn usage(server: &Server) -> Vec<u64> {
        let mut client = server.connect();
        let used = |user| {
            let answer = client.get(&format!("/v1/users/{user}/quotas/load"));
            answer.json()["used"].as_u64().expect("a number")
        };
        (0..USERS).map(used).collect()
    }
}

/// The issue's promise, through HTTP: SIGKILL in the middle of a load loses nothing acknowledged,
/// invents nothing, passes no limit; a graceful stop leaves exactly what was acknowledged.
#[test]
fn a_killed_server_keeps_what_it_acknowledged_and_a_stopped_one_exactly_that() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), &[]);
    let mut client = server.connect();
    let definition = json!({ "name": "load", "limit": LOW_LIMIT });
    assert_eq!(client.send("POST", "/v1/quotas", &definition).status, 200);
    let load = Load::new(&[0; USERS]);
    load.drive(server, 3_000, Server::kill, true);

    let server = Server::start(dir.path(), &[]);
    let recovered = Load::usage(&server);
    for (user, &used) in recovered.iter().enumerate() {
        let acknowledged = load.acknowledged[user].load(Ordering::SeqCst);
        let sent = load.sent[user].load(Ordering::SeqCst);
        assert!(
            acknowledged <= used && used <= sent && used <= LOW_LIMIT,
            "user {user}: acknowledged {acknowledged}, recovered {used}, sent {sent}"
        );
    }
    assert!(recovered.contains(&LOW_LIMIT), "some users were stopped by the limit");

    let load = Load::new(&recovered);
    let mut summary = String::new();
    let stop = |server: Server| {
        let (code, printed) = server.stop();
        assert_eq!(code, Some(0), "{printed}");
        summary = printed;
    };
    load.drive(server, 1_500, stop, false);
    assert!(summary.contains("is durable in"), "{summary}");
    let server = Server::start(dir.path(), &[]);
    let acknowledged: Vec<_> =
        load.acknowledged.iter().map(|amount| amount.load(Ordering::SeqCst)).collect();
    assert_eq!(Load::usage(&server), acknowledged);
    server.kill();
}

#[test]
fn every_endpoint_answers_and_refuses_as_documented() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start_without_quota(dir.path(), &[]);
    let mut client = server.connect();
    let operation = |amount: u64| json!({ "user": 7, "quota": "calls", "amount": amount });

    let unknown = client.send("POST", "/v1/try-consume", &operation(1));
    assert_eq!((unknown.status, &unknown.json()["error"]["kind"]), (404, &json!("unknown_quota")));
    let definition = json!({ "name": "calls", "limit": 10, "window": "hour" });
    let defined = client.send("POST", "/v1/quotas", &definition);
    assert_eq!((defined.status, &defined.json()["window"]), (200, &json!("hour")));
    let every = json!({ "name": "every", "limit": 10, "window": { "every_ms": 90_000 } });
    assert_eq!(client.send("POST", "/v1/quotas", &every).status, 200);
    let other_meaning = json!({ "name": "calls", "limit": 10, "window": "day" });
    assert_eq!(client.send("POST", "/v1/quotas", &other_meaning).status, 409);
    // Also where the name is defined: that was once 409.
    for name in ["invalid", "calls"] {
        let no_limit = json!({ "name": name, "limit": u64::MAX, "window": "hour" });
        let invalid = json!({ "name": name, "limit": 10, "decimals": 19 });
        for definition in [no_limit, invalid] {
            assert_eq!(client.send("POST", "/v1/quotas", &definition).status, 400, "{definition}");
        }
    }
    assert_eq!(client.get("/v1/quotas").json()["quotas"].as_array().map(Vec::len), Some(2));

    let consumed = client.send("POST", "/v1/try-consume", &operation(8));
    assert_eq!((consumed.status, &consumed.json()["remaining"]), (200, &json!(2)));
    assert_eq!(consumed.headers["ratelimit-policy"], "\"calls\";q=10;w=3600");
    assert!(consumed.headers["ratelimit"].starts_with("\"calls\";r=2;t="));
    let denied = client.send("POST", "/v1/try-consume", &operation(3));
    assert_eq!((denied.status, &denied.json()["allowed"]), (429, &json!(false)));
    let wait: u64 = denied.headers["retry-after"].parse().unwrap();
    assert!((1..=3600).contains(&wait));
    let never = client.send("POST", "/v1/try-consume", &operation(11));
    assert_eq!((never.status, never.headers.get("retry-after")), (429, None));
    assert_eq!(client.send("POST", "/v1/check", &operation(2)).status, 200);
    assert_eq!(client.send("POST", "/v1/check", &operation(3)).status, 429);

    let past = client.send("POST", "/v1/consume", &operation(5));
    assert_eq!((past.status, &past.json()["used"]), (200, &json!(13)));
    let durable = json!({ "user": 8, "quota": "calls", "sync": true });
    assert_eq!(client.send("POST", "/v1/consume", &durable).json()["used"], 1);
    assert_eq!(client.send("POST", "/v1/try-consume", &durable).json()["used"], 2);
    let batch = json!({ "items": [operation(1), { "user": 8, "quota": "calls", "amount": 2 }] });
    let usages = client.send("POST", "/v1/consume-batch", &batch).json();
    assert_eq!(
        (&usages["usages"][0]["used"], &usages["usages"][1]["used"]),
        (&json!(14), &json!(4))
    );
    let most = json!({ "user": 9, "quota": "calls", "amount": i64::MAX });
    let cut = json!({ "items": [most, { "user": 9, "quota": "calls" }] });
    let cut = client.send("POST", "/v1/consume-batch", &cut);
    let error = &cut.json()["error"];
    assert_eq!((cut.status, &error["kind"]), (500, &json!("batch_cut_short")));
    assert_eq!(error["counted"], 1);
    let refunded = client.send("POST", "/v1/refund", &operation(4)).json();
    assert_eq!((&refunded["given_back"], &refunded["usage"]["used"]), (&json!(4), &json!(10)));

    let limit = "/v1/users/7/quotas/calls/limit";
    assert_eq!(client.send("PUT", limit, &json!({ "limit": 50 })).json()["limit"], 50);
    let usage = client.get("/v1/users/7/quotas/calls").json();
    assert_eq!((&usage["remaining"], &usage["own_limit"]), (&json!(40), &json!(50)));
    assert_eq!(client.send("DELETE", limit, &Value::Null).json()["limit"], 10);
    assert_eq!(client.send("POST", "/v1/sync", &Value::Null).status, 200);
    assert_eq!(client.send("POST", "/v1/snapshot", &Value::Null).status, 200);
    assert_eq!(client.get("/health").json()["level"], "healthy");
    assert_eq!(client.get("/stats").json()["denied"], 2);
    let metrics = client.get("/metrics").body;
    assert!(metrics.contains("\ntollgate_operations_denied_total 2\n"), "{metrics}");
    assert!(metrics.contains("tollgate_http_requests_total{class=\"4xx\"}"), "{metrics}");

    assert_eq!(client.send("POST", "/v1/consume", &operation(0)).status, 400);
    assert_eq!(client.send("POST", "/v1/consume", &json!({ "user": -1 })).status, 422);
    assert_eq!(client.try_send("POST", "/v1/consume", "{").unwrap().status, 400);
    assert_eq!(client.get("/v1/users/x/quotas/calls").status, 400);
    assert_eq!(client.get("/nothing").status, 404);
    assert_eq!(client.get("/v1/consume").status, 405);
    let large = json!({ "user": 7, "quota": "x".repeat(70 << 10) });
    assert_eq!(server.connect().send("POST", "/v1/consume", &large).status, 413);
    let mut wordy = server.connect();
    wordy.headers = "X-Filler: 1\r\n".repeat(100);
    assert_eq!(wordy.get("/health").status, 431);
    server.kill();
}

#[test]
fn a_token_is_asked_for_and_compared() {
    let dir = tempfile::tempdir().unwrap();
    let token_file = dir.path().join("token");
    std::fs::write(&token_file, "s3cret\n").unwrap();
    let token_file = token_file.to_str().unwrap();
    let server = Server::start(&dir.path().join("data"), &["--token-file", token_file]);
    let mut client = server.connect();
    assert_eq!(client.get("/stats").status, 401);
    client.headers = "Authorization: Bearer s3cre\r\n".to_owned();
    assert_eq!(client.get("/stats").status, 401);
    assert_eq!(client.get("/health").status, 200, "health is open");
    for scheme in ["Bearer", "bearer"] {
        client.headers = format!("Authorization: {scheme} s3cret\r\n");
        assert_eq!(client.get("/stats").status, 200);
    }
    run_printed_lines(&server);
    server.kill();
}

#[test]
fn the_printed_lines_work_as_printed() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), &[]);
    run_printed_lines(&server);
    server.kill();
}

pub(crate) fn run_printed_lines(server: &Server) {
    let answers = answers_of_printed_lines(server);
    assert_eq!(answers.len(), 2, "{:?}", server.greeting);
    for answer in answers {
        assert_eq!(answer["used"], 1, "{answer}");
    }
}

pub(crate) fn answers_of_printed_lines(server: &Server) -> Vec<Value> {
    let run = |line: &String| {
        let output = Command::new("sh").args(["-c", line]).output().expect("a shell");
        assert!(output.status.success(), "curl is installed, and the line works: {output:?}");
        serde_json::from_slice(&output.stdout).expect("JSON")
    };
    server.greeting.iter().filter(|line| line.starts_with("  curl ")).map(run).collect()
}

/// A connection on which the server waits for the rest of a request, and the rest.
pub(crate) fn half_a_request(server: &Server) -> (TcpStream, &'static str) {
    let body = r#"{"user":1,"quota":"requests"}"#;
    let mut stream = TcpStream::connect(&server.address).unwrap();
    let head = format!(
        "POST /v1/try-consume HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Expect: 100-continue\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    // Said when the body is read: the request is under way.
    let mut expected = *b"HTTP/1.1 100 Continue\r\n\r\n";
    stream.read_exact(&mut expected).unwrap();
    assert!(expected.starts_with(b"HTTP/1.1 100 "), "{expected:?}");
    stream.write_all(&body.as_bytes()[..10]).unwrap();
    (stream, &body[10..])
}

#[test]
fn a_request_under_way_finishes_when_the_server_stops() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), &[]);
    let (mut stream, rest) = half_a_request(&server);
    let address = server.address.clone();
    let stopping = std::thread::spawn(move || server.stop());
    while TcpStream::connect(&address).is_ok() {
        std::thread::yield_now();
    }
    stream.write_all(rest.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let (code, printed) = stopping.join().unwrap();
    assert_eq!(code, Some(0), "{printed}");
    let server = Server::start(dir.path(), &[]);
    assert_eq!(server.connect().get("/v1/users/1/quotas/requests").json()["used"], 1);
    server.kill();
}

fn run(arguments: &[&str]) -> Output {
    Command::new(BINARY).args(arguments).output().expect("it runs")
}

fn fails_with(arguments: &[&str], code: i32, words: &str) {
    let output = run(arguments);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
    assert!(said.contains(words), "{arguments:?}: {said}");
    if code == 1 {
        assert_eq!(said.trim_end().lines().count(), 1, "one clear line: {said}");
    }
}

#[test]
fn misuse_gets_one_clear_line_and_a_status() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let server = Server::start(&dir.path().join("data"), &[]);
    let any = ["--listen", "127.0.0.1:0"];
    let serve = |more: &[&str]| [&["serve"], &any[..], more].concat().join("\u{0}");
    let check = |more: &[&str], words: &str| {
        let line = serve(more);
        fails_with(&line.split('\u{0}').collect::<Vec<_>>(), 1, words);
    };
    fails_with(&["serve", "--no-such-flag"], 2, "no-such-flag");
    fails_with(&["serve", "--listen", "nonsense"], 2, "--listen");
    fails_with(&["serve", "--quota", "requests"], 2, "expected NAME=LIMIT/WINDOW");
    fails_with(&["serve", "--log-level", "loud"], 2, "off, error, warn, info, debug, trace");
    check(&["--dir", &path("data"), "--wait-for-lock", "1"], "let --wait-for-lock SECONDS");
    let (busy, free) = (server.address.as_str(), path("free"));
    fails_with(&["serve", "--dir", &free, "--listen", busy], 1, "can't listen on");
    check(&["--dir", &free, "--no-create"], "does not exist, and --no-create is given");
    assert!(!Path::new(&free).exists(), "neither a busy port nor a missing mount makes anything");
    std::fs::write(path("file"), "x").unwrap();
    check(&["--dir", &path("file")], "can't create");
    check(&["--dir", &free, "--config", &path("missing.toml")], "missing.toml");
    std::fs::write(path("bad.toml"), "lanes = 0\n").unwrap();
    check(&["--dir", &free, "--config", &path("bad.toml")], "bad.toml), allowed:");
    check(&["--dir", &free, "--token-file", &path("missing")], "can't read the token");
    std::fs::write(path("empty"), "\n").unwrap();
    check(&["--dir", &free, "--token-file", &path("empty")], "is empty");
    for token in ["one\ntwo\n", "one two\n", "bell\u{7}\n"] {
        std::fs::write(path("token"), token).unwrap();
        check(&["--dir", &free, "--token-file", &path("token")], "is not one word");
    }
    check(&["--dir", &free, "--sink-events"], "--sink-events needs --json-lines");
    let size = ["serve", "--json-lines", &free, "--json-lines-file-size", "64MB"];
    fails_with(&size, 2, "as in 64MiB");
    fails_with(&["serve", "--dir", &free, "--listen", "0.0.0.0:0"], 1, "--token-file");
    fails_with(&["inspect", &path("missing")], 1, "missing");
    server.kill();
    let journal = path("data/journal-00000000000000000001.tgj");
    std::fs::remove_file(&journal).unwrap();
    check(&["--dir", &path("data")], "is damaged at byte 0");
    check(&["--dir", &path("data")], &format!("`tollgate verify '{}'` says", path("data")));
}

#[test]
fn a_directory_can_be_looked_at() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path(), &[]);
    let body = json!({ "user": 42, "quota": "requests", "amount": 5 });
    assert_eq!(server.connect().send("POST", "/v1/consume", &body).status, 200);
    server.kill();
    let dir = dir.path().to_str().unwrap();
    let text = run(&["inspect", dir]);
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(text.contains("1 counters in open windows, 5 used, most by user 42: 5"), "{text}");
    let output = run(&["inspect", dir, "--json"]);
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    let quota = &json["quotas"][0];
    assert_eq!((&quota["used"], &quota["window"]), (&json!("5"), &json!("day")));
    assert!(text.contains("\"requests\": limit 1000, window day\n"), "{text}");
}

/// What a server delivers, it delivers once, over a kill; and a sink that is gone can be forgotten.
#[test]
fn a_server_delivers_to_files() {
    let root = tempfile::tempdir().expect("a directory");
    let (dir, lines) = (root.path().join("data"), root.path().join("lines"));
    let arguments = ["--json-lines", lines.to_str().expect("a plain path"), "--sink-events"];
    let consume = |server: &Server| {
        let body = json!({ "user": 42, "quota": "requests", "amount": 3 });
        assert_eq!(server.connect().send("POST", "/v1/consume", &body).status, 200);
    };
    // The same request each time: it counts once.
    let record = |server: &Server| {
        let metadata = json!({ "model": "large" });
        let body = json!({ "user": 42, "quota": "requests", "value": 2.0, "metadata": metadata });
        let mut client = server.connect();
        client.headers = format!("Idempotency-Key: {:032x}\r\n", 0xaa);
        let response = client.send("POST", "/v1/record", &body);
        assert_eq!((response.status, response.json()["used"].as_u64()), (200, Some(5)));
    };
    let server = Server::start(&dir, &arguments);
    consume(&server);
    record(&server);
    server.kill();
    let server = Server::start(&dir, &arguments);
    record(&server);
    for refused in [
        json!({ "user": 42, "quota": "requests", "value": -1.0 }),
        // Microseconds.
        json!({ "user": 42, "quota": "requests", "value": 1, "timestamp_ms": 1_767_323_045_678_000_u64 }),
        json!({ "user": 42, "quota": "requests", "value": 1, "metadata": { "": "x".repeat(5000) } }),
    ] {
        assert_eq!(server.connect().send("POST", "/v1/record", &refused).status, 400);
    }
    consume(&server);
    let metrics = server.connect().get("/metrics").body;
    for line in ["sink_up{sink=\"json-lines\"} 1\n", "sink_lag_batches{sink=\"json-lines\"} "] {
        assert!(metrics.contains(&format!("\ntollgate_{line}")), "{line}: {metrics}");
    }
    let stats: Value = serde_json::from_str(&server.connect().get("/stats").body).expect("JSON");
    assert_eq!(stats["sinks"][0]["name"], "json-lines");
    assert_eq!(server.stop().0, Some(0));
    let text: String = std::fs::read_dir(&lines)
        .expect("the directory is there")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "jsonl"))
        .map(|path| std::fs::read_to_string(path).expect("it can be read"))
        .collect();
    let read = |line| -> Value { serde_json::from_str(line).expect("JSON") };
    let written: Vec<Value> = text.lines().map(read).collect();
    let usage = written.iter().filter(|line| line["type"] == "usage" && line["user"] == 42);
    assert_eq!(usage.map(|line| line["added"].as_u64()).sum::<Option<u64>>(), Some(8), "{text}");
    let events: Vec<_> = written.iter().filter(|line| line["type"] == "event").collect();
    let [event] = &events[..] else { panic!("{text}") };
    assert_eq!(event["request_id"], "000000000000000000000000000000aa");
    assert_eq!((&event["value"], &event["metadata"]["model"]), (&json!(2.0), &json!("large")));

    let dir = dir.to_str().expect("a plain path");
    let output = run(&["forget-sink", dir, "json-lines"]);
    assert!(output.status.success(), "{output:?}");
    fails_with(&["forget-sink", dir, "json-lines"], 1, "knows no sink");
}
