//! An upstream that does what a request's message says, and holds its answers back until it is
//! told.

use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};

/// What the upstream is to do, as the text of the first message.
pub(crate) struct Script {
    /// What it says that the whole took; `None` says nothing.
    pub(crate) total_tokens: Option<u64>,
    /// Words of a stream before it is held back.
    pub(crate) pieces: u64,
    /// Whether it waits before the end.
    pub(crate) holds: bool,
}

impl Script {
    /// Of the same length whatever the numbers.
    pub(crate) fn text(&self) -> String {
        let Self { total_tokens, pieces, holds } = self;
        let total = total_tokens.map_or_else(|| "none  ".to_owned(), |total| format!("{total:06}"));
        format!("total {total} pieces {pieces:02} holds {}", u8::from(*holds))
    }

    fn parse(request: &Value) -> Self {
        let text = request["messages"][0]["content"].as_str().expect("a script");
        let words: Vec<_> = text.split_whitespace().collect();
        Self {
            total_tokens: words[1].parse().ok(),
            pieces: words[3].parse().expect("a number"),
            holds: words[5] == "1",
        }
    }
}

#[derive(Default)]
struct State {
    arrived: AtomicUsize,
    broken_off: AtomicUsize,
    is_released: AtomicBool,
    last: Mutex<Value>,
    last_body: Mutex<String>,
}

pub(crate) struct Upstream {
    pub(crate) url: String,
    state: Arc<State>,
}

impl Upstream {
    /// On threads that end with the process.
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let state = Arc::new(State::default());
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, state) = (stream.expect("a connection"), Arc::clone(&shared));
                // Whoever asks may break off at any time.
                std::thread::spawn(move || drop(answer(stream, &state)));
            }
        });
        Self { url, state }
    }

    /// How many requests have come.
    pub(crate) fn arrived(&self) -> usize {
        self.state.arrived.load(Ordering::SeqCst)
    }

    /// The last request that has come.
    pub(crate) fn last(&self) -> Value {
        self.state.last.lock().expect("nobody panics with it").clone()
    }

    /// The same, as it came.
    pub(crate) fn last_body(&self) -> String {
        self.state.last_body.lock().expect("nobody panics with it").clone()
    }

    /// How many held streams the other side has broken off.
    pub(crate) fn broken_off(&self) -> usize {
        self.state.broken_off.load(Ordering::SeqCst)
    }

    /// Lets go of what is held, from now on of everything.
    pub(crate) fn release(&self) {
        self.state.is_released.store(true, Ordering::SeqCst);
    }
}

fn answer(stream: TcpStream, state: &State) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut length = 0;
    loop {
        let mut line = String::new();
        stream.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(": ") else {
            if line == "\r\n" {
                break;
            }
            continue;
        };
        if name.eq_ignore_ascii_case("content-length") {
            length = value.parse().expect("a length");
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    let request: Value = serde_json::from_slice(&body).expect("JSON");
    let mut stream = stream.into_inner();
    *state.last.lock().expect("nobody panics with it") = request.clone();
    *state.last_body.lock().expect("nobody panics with it") =
        String::from_utf8(body).expect("text");
    state.arrived.fetch_add(1, Ordering::SeqCst);
    if request["breaks_off"] == true {
        return Ok(());
    }
    if let Some(raw) = request["raw"].as_str() {
        return raw_answer(&mut stream, raw);
    }
    let script = Script::parse(&request);
    if script.total_tokens == Some(0) {
        let failed = "HTTP/1.1 500 Internal Server Error\r\nConnection: close\r\n\
                      Content-Length: 2\r\n\r\n{}";
        return stream.write_all(failed.as_bytes());
    }
    if request["stream"] == true {
        stream_answer(&mut stream, state, &script, &request)
    } else {
        whole_answer(&mut stream, state, &script)
    }
}

/// A success with this body, whatever it is.
fn raw_answer(stream: &mut TcpStream, body: &str) -> std::io::Result<()> {
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn whole_answer(stream: &mut TcpStream, state: &State, script: &Script) -> std::io::Result<()> {
    hold(stream, state, script)?;
    let text = "x".repeat(usize::try_from(script.pieces).expect("few"));
    let mut answer = json!({ "choices": [{ "message": { "content": text } }] });
    if let Some(total) = script.total_tokens {
        answer["usage"] = json!({ "total_tokens": total });
    }
    let body = answer.to_string();
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn stream_answer(
    stream: &mut TcpStream,
    state: &State,
    script: &Script,
    request: &Value,
) -> std::io::Result<()> {
    let head = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: text/event-stream\r\n\
                Transfer-Encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes())?;
    let send = |stream: &mut TcpStream, data: &str| {
        // In two chunks: an event ends where it likes.
        let event = format!("data: {data}\n\n");
        let (begin, end) = event.split_at(event.len() / 2);
        for part in [begin, end] {
            write!(stream, "{:x}\r\n{part}\r\n", part.len())?;
        }
        std::io::Result::Ok(())
    };
    let bytes = request["piece_bytes"].as_u64().unwrap_or(1);
    let bytes = usize::try_from(bytes).expect("it fits");
    for _ in 0..script.pieces {
        let text = "x".repeat(bytes);
        send(stream, &json!({ "choices": [{ "delta": { "content": text } }] }).to_string())?;
    }
    hold(stream, state, script)?;
    assert_eq!(request["stream_options"]["include_usage"], true, "the gateway always asks");
    if let Some(total) = script.total_tokens {
        let usage = json!({ "choices": [], "usage": { "total_tokens": total } });
        send(stream, &usage.to_string())?;
    }
    send(stream, "[DONE]")?;
    stream.write_all(b"0\r\n\r\n")
}

/// Waits until everything is let go, or the other side has gone.
fn hold(stream: &mut TcpStream, state: &State, script: &Script) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_millis(10)))?;
    while script.holds && !state.is_released.load(Ordering::SeqCst) {
        match stream.read(&mut [0; 16]) {
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Ok(_) | Err(_) => {
                state.broken_off.fetch_add(1, Ordering::SeqCst);
                return Err(ErrorKind::ConnectionAborted.into());
            }
        }
    }
    Ok(())
}
