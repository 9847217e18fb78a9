//! The gateway as a child process, and a client of it.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime};

use serde_json::Value;

/// Guards against a hang only.
const PATIENCE: Duration = Duration::from_secs(100);

/// The example, as `cargo test` builds it beside the tests. It must be of these sources: with
/// `--test gateway` cargo does not build it.
fn binary() -> PathBuf {
    let tests = std::env::current_exe().expect("the test has a path");
    let target = tests.parent().and_then(Path::parent).expect("target/PROFILE/deps");
    let binary = target.join("examples/token_gateway");
    let built = binary.metadata().and_then(|metadata| metadata.modified());
    // What cargo says that it is made of.
    let made_of = std::fs::read_to_string(binary.with_extension("d"));
    let is_made_of = |sources: String| built.is_ok_and(|built| is_as_new_as(built, &sources));
    assert!(
        made_of.is_ok_and(is_made_of),
        "{} is missing or old: `cargo build --example token_gateway`, or `cargo test` without \
         `--test`, builds it",
        binary.display()
    );
    binary
}

/// Whether none of the sources is newer, by a line of `made: source source`, in which spaces of
/// names are escaped. One that is gone was removed since.
fn is_as_new_as(built: SystemTime, line: &str) -> bool {
    let (_, sources) = line.trim_end().split_once(": ").expect("it names its sources");
    let escaped = sources.replace("\\ ", "\0");
    let mut sources = escaped.split_ascii_whitespace().map(|source| source.replace('\0', " "));
    sources.all(|source| {
        let changed = Path::new(&source).metadata().and_then(|metadata| metadata.modified());
        changed.is_ok_and(|changed| changed <= built)
    })
}

/// A running gateway; killed when dropped.
pub(crate) struct Gateway {
    child: Child,
    pub(crate) address: String,
    /// What it has printed before it began to serve.
    pub(crate) greeting: Vec<String>,
}

impl Gateway {
    pub(crate) fn start(dir: &Path, arguments: &[&str]) -> Self {
        let mut child = Command::new(binary())
            .args(["--listen", "127.0.0.1:0", "--dir"])
            .arg(dir.join("data"))
            .args(arguments)
            .stdout(Stdio::piped())
            .spawn()
            .expect("the gateway starts");
        let mut output = BufReader::new(child.stdout.take().expect("piped"));
        let mut greeting = Vec::new();
        while greeting.last().is_none_or(|line: &String| !line.starts_with("stop with")) {
            let mut line = String::new();
            let read = output.read_line(&mut line).expect("it prints");
            assert!(read > 0, "the gateway ended early: {greeting:?}");
            greeting.push(line.trim_end().to_owned());
        }
        let listening = greeting.iter().find_map(|line| line.strip_prefix("listening on http://"));
        let address = listening.expect("it says where it listens").to_owned();
        Self { child, address, greeting }
    }

    /// SIGKILL.
    pub(crate) fn kill(mut self) {
        self.child.kill().expect("it can be killed");
        self.child.wait().expect("it is reaped");
    }

    /// SIGTERM; waits until it has ended.
    pub(crate) fn stop(mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("it is there");
        assert!(self.child.wait().expect("it ends").success());
    }

    pub(crate) fn complete(&self, key: &str, request: &Value) -> Answer {
        self.complete_as(key, &request.to_string())
    }

    /// With exactly this body.
    pub(crate) fn complete_as(&self, key: &str, body: &str) -> Answer {
        send(&self.address, "POST", "/v1/chat/completions", key, body)
    }

    /// As [`complete`](Self::complete), of a body that never comes to its end.
    pub(crate) fn begin(&self, key: &str, body: &str) -> Answer {
        let length = body.len() + 1_000;
        send_part(&self.address, "POST", "/v1/chat/completions", key, body, length)
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        send(&self.address, "GET", path, "alice", "")
    }

    /// Used and reserved, by the key and by its organisation.
    pub(crate) fn usage(&self, key: &str) -> [(u64, u64); 2] {
        let mut answer = send(&self.address, "GET", "/v1/usage", key, "");
        assert_eq!(answer.status, 200);
        let usage: Value = serde_json::from_str(&answer.rest()).expect("JSON");
        ["key", "organisation"].map(|name| {
            let number = |field: &str| usage[name][field].as_u64().expect("a number");
            (number("used"), number("reserved"))
        })
    }
}

/// What it says where it does not start.
pub(crate) fn refusal(dir: &Path, arguments: &[&str]) -> String {
    let dir = dir.join("data");
    let output = Command::new(binary()).arg("--dir").arg(dir).args(arguments).output();
    let output = output.expect("the gateway runs");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8(output.stderr).expect("text")
}

impl Drop for Gateway {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An answer, of which the body is read as it comes.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HashMap<String, String>,
    stream: BufReader<TcpStream>,
    is_ended: bool,
}

fn send(address: &str, method: &str, path: &str, key: &str, body: &str) -> Answer {
    send_part(address, method, path, key, body, body.len())
}

/// Says that the body has this length, and sends what there is of it.
fn send_part(
    address: &str,
    method: &str,
    path: &str,
    key: &str,
    body: &str,
    length: usize,
) -> Answer {
    let mut stream = TcpStream::connect(address).expect("it accepts");
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\
         Authorization: Bearer {key}\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).expect("it reads");
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    stream.read_line(&mut line).expect("it answers");
    let status = line.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
    let mut headers = HashMap::new();
    loop {
        line.clear();
        stream.read_line(&mut line).expect("it answers");
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        headers.insert(name.to_ascii_lowercase(), value.to_owned());
    }
    Answer { status, headers, stream, is_ended: false }
}

impl Answer {
    /// The next part of a stream; `None` at its end, and where it is broken off.
    pub(crate) fn next(&mut self) -> Option<String> {
        let mut line = String::new();
        self.stream.read_line(&mut line).ok()?;
        let length = usize::from_str_radix(line.trim_end(), 16).ok()?;
        let mut part = vec![0; length + 2];
        self.stream.read_exact(&mut part).ok()?;
        part.truncate(length);
        self.is_ended = length == 0;
        (length > 0).then(|| String::from_utf8(part).expect("text"))
    }

    /// Whether a stream has come to its end, rather than been broken off.
    pub(crate) fn is_ended(&self) -> bool {
        self.is_ended
    }

    /// The rest of the body.
    pub(crate) fn rest(&mut self) -> String {
        if self.headers.contains_key("transfer-encoding") {
            return std::iter::from_fn(|| self.next()).collect();
        }
        let mut body = String::new();
        self.stream.read_to_string(&mut body).expect("a body");
        body
    }
}

/// Waits for something that takes as long as it takes.
#[expect(clippy::disallowed_methods, reason = "guards against a hang")]
pub(crate) fn eventually(what: &str, is: impl Fn() -> bool) {
    let began = std::time::Instant::now();
    while !is() {
        assert!(began.elapsed() < PATIENCE, "still not: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
