//! `tollgate serve`: opens the engine, serves until told to stop, closes it.

use std::env;
use std::fs;
use std::io::{self, IsTerminal as _};
use std::num::NonZero;
use std::path::{self, Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use axum::http::HeaderValue;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc};
use tollgate::{Config, Error, Quota, RecoveryReport, Tollgate};

use crate::Failure;
use crate::cli::ServeOptions;
use crate::definition::summary;
use crate::descriptors;
use crate::http::auth::Access;
use crate::http::metrics::Metrics;
use crate::http::waits::Waits;
use crate::http::{self, App};
use crate::output::{complain, damage, say, with_spinner};
use crate::patience::Patience;

/// A client has this long to send its next request's head.
const HEAD_TIME_MAX: Duration = Duration::from_secs(20);
/// A client has this long to take something of an answer before its connection is given up.
const WRITE_TIME_MAX: Duration = Duration::from_secs(30);
const HEADERS_MAX: usize = 64;
const HEAD_BYTES_MAX: usize = 32 << 10;
/// Requests under way have this long to finish once the server was told to stop.
const STOP_TIME_MAX: Duration = Duration::from_secs(10);
/// What tells the process to stop may do so several times in a row, as a terminal and a shell do:
/// within this time it counts as once.
const REPEAT_TIME_MAX: Duration = Duration::from_millis(500);
/// The quota that is proposed where there is none, to try things out with.
const PROPOSED_QUOTA: &str = "requests";

/// Serves until Ctrl-C or SIGTERM.
pub(crate) fn run(options: &ServeOptions) -> Result<(), Failure> {
    tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_ansi(
            io::stderr().is_terminal() && env::var_os("NO_COLOR").is_none_or(|it| it.is_empty()),
        )
        // It would say so by `eprintln!`, which panics where stderr is gone.
        .log_internal_errors(false)
        .with_max_level(options.log_level)
        .init();
    let token = options.token_file.as_deref().map(read_token).transpose()?;
    if !options.listen.ip().is_loopback() && token.is_none() && !options.insecure {
        return Err(format!(
            "{} can be reached by others: give --token-file FILE, or --insecure if that is meant",
            options.listen
        ));
    }
    let config = match &options.config {
        Some(file) => Config::from_file(file).map_err(|error| error.to_string())?,
        None => Config::default(),
    };
    let no_threads = |error| format!("can't start threads: {error}");
    let waits = Waits::new(config.has_durable_consumes()).map_err(no_threads)?;
    let workers = thread::available_parallelism().map_or(1, NonZero::get);
    require_threads(workers + 1).map_err(no_threads)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .enable_all()
        .thread_name("tollgate-http")
        .build()
        .map_err(no_threads)?;
    // Before the directory: a busy port should change nothing.
    let listener = runtime
        .block_on(TcpListener::bind(options.listen))
        .map_err(|error| format!("can't listen on {}: {error}", options.listen))?;
    let slots = descriptors::connections(options.connections_max);
    let gate = open(options, config)?;
    for quota in &options.quotas {
        define(&gate, quota).map_err(|error| error.to_string())?;
    }
    let address = listener.local_addr().map_err(|error| error.to_string())?;
    // Before anybody is told how to stop it.
    let stop = stop_signal()?;
    print_invitation(&gate, &address.to_string(), options.token_file.as_deref());

    let access = match token {
        Some(token) => Access::Token(token),
        None if options.insecure => Access::Anyone,
        None => Access::Unnamed,
    };
    let app = Arc::new(App { gate, access, metrics: Metrics::default(), waits });
    runtime.block_on(serve(listener, Arc::clone(&app), slots, stop));
    // What still runs after its time is not waited for.
    runtime.shutdown_timeout(Duration::from_secs(1));
    close(&app, &options.dir)
}

/// Makes as many threads as the runtime is about to, and one more, as what ends may count for a
/// moment longer: it would panic where they can't be made.
fn require_threads(count: usize) -> io::Result<()> {
    let (hold, held) = std::sync::mpsc::channel::<()>();
    let held = Arc::new(Mutex::new(held));
    let wait = || {
        let held = Arc::clone(&held);
        let wait = move || {
            let _ = held.lock().recv();
        };
        thread::Builder::new().name("tollgate-probe".to_owned()).spawn(wait)
    };
    let made: Vec<_> = (0..count).map(|_| wait()).collect();
    // All end now.
    drop(hold);
    made.into_iter().try_for_each(|thread| {
        // None of them panics.
        let _ = thread?.join();
        Ok(())
    })
}

fn read_token(file: &Path) -> Result<String, Failure> {
    let text = fs::read_to_string(file)
        .map_err(|error| format!("can't read the token in {}: {error}", file.display()))?;
    let token = text.trim_ascii();
    if token.is_empty() {
        return Err(format!("the token file {} is empty", file.display()));
    }
    // No request could carry it, nor a shell take it out of its file.
    let is_word = !token.bytes().any(|byte| byte.is_ascii_whitespace());
    if !is_word || HeaderValue::from_bytes(token.as_bytes()).is_err() {
        return Err(format!(
            "the token in {} is not one word without control characters",
            file.display()
        ));
    }
    Ok(token.to_owned())
}

/// Opens the directory, with a spinner on a terminal when it takes a while.
#[expect(clippy::disallowed_methods, reason = "times the start of the server")]
fn open(options: &ServeOptions, config: Config) -> Result<Tollgate, Failure> {
    let dir = &options.dir;
    let builder = Tollgate::builder(dir)
        .config(config)
        .create_if_missing(!options.no_create)
        .wait_for_lock(Duration::from_secs(options.wait_for_lock.into()));
    let builder = options.sinks.attach(builder)?;
    let began = Instant::now();
    let gate = with_spinner(format!("recovering {}", dir.display()), || builder.open());
    let gate = gate.map_err(|error| match error {
        Error::Damaged { .. } => {
            let dir = shell_quoted(&dir.display().to_string());
            format!("{}; `tollgate verify {dir}` says more", damage(&error))
        }
        // A directory of JSON lines is not waited for.
        Error::Locked { dir: locked, .. } if path::absolute(dir).is_ok_and(|it| it == locked) => {
            format!(
                "{} is in use by another process: stop that first, or let --wait-for-lock SECONDS \
                 wait for it",
                dir.display()
            )
        }
        Error::NoEngine { exists, .. } => format!(
            "{} {}, and --no-create is given: check the path, and that its file system is mounted",
            dir.display(),
            if exists { "holds no engine" } else { "does not exist" }
        ),
        error => error.to_string(),
    })?;
    print_report(dir, gate.recovery_report(), began.elapsed());
    Ok(gate)
}

fn print_report(dir: &Path, report: &RecoveryReport, took: Duration) {
    let dir = dir.display();
    if report.created {
        say(format_args!("created {dir} in {took:.1?}"));
        return;
    }
    let RecoveryReport { counters, quotas, journal_batches, lane_records, .. } = report;
    say(format_args!(
        "recovered {dir} in {took:.1?}: {counters} counters of {quotas} quotas, from {}, \
         {journal_batches} batches of the journal and {lane_records} records of the log",
        match report.snapshot_batch {
            Some(batch) => format!("the snapshot at batch {batch}"),
            None => "no snapshot".to_owned(),
        }
    ));
    if report.machine_restarted {
        say("  the machine was restarted: what no sync had covered may be missing");
    }
    if report.corrected > 0 {
        say(format_args!("  {} counters were corrected", report.corrected));
    }
    for finding in &report.findings {
        say(format_args!("  finding: {finding}"));
    }
}

/// Defines a quota of the command line, unless its name is taken: what was changed since an earlier
/// start stays.
fn define(gate: &Tollgate, quota: &Quota) -> Result<(), Error> {
    let is_new = gate.quota_by_name(quota.name()).is_none();
    let defined = gate.define_if_absent(quota.clone()).and_then(|id| gate.quota(id))?;
    let (name, asked, present) = (quota.name(), summary(quota), summary(&defined));
    if is_new {
        say(format_args!("defined the quota {name:?}: {present}"));
    } else if asked != present {
        say(format_args!("the quota {name:?} stays as it is: {present} (--quota says {asked})"));
    }
    Ok(())
}

fn print_invitation(gate: &Tollgate, address: &str, token_file: Option<&Path>) {
    say(format_args!("listening on http://{address}"));
    let token = match token_file {
        Some(file) => {
            let file = shell_quoted(&file.display().to_string());
            format!(" -H \"Authorization: Bearer $(tr -d '[:space:]' <{file})\"")
        }
        None => String::new(),
    };
    let url = |path: &str| shell_quoted(&format!("http://{address}{path}"));
    let post = |path: &str, body: &Value| {
        let (body, url) = (shell_quoted(&body.to_string()), url(path));
        say(format_args!("  curl -s{token} -H 'Content-Type: application/json' -d {body} {url}"));
    };
    say("try:");
    match gate.quotas().first().and_then(|&id| gate.quota(id).ok()) {
        Some(quota) => {
            let name = quota.name();
            post("/v1/try-consume", &json!({ "user": 42, "quota": name, "amount": 1 }));
            // Else curl takes them out of the path.
            let option = if matches!(name, "." | "..") { " --path-as-is" } else { "" };
            let url = url(&format!("/v1/users/42/quotas/{}", path_segment(name)));
            say(format_args!("  curl -s{option}{token} {url}"));
        }
        None => {
            let quota = json!({ "name": PROPOSED_QUOTA, "limit": 1_000, "window": "day" });
            post("/v1/quotas", &quota);
        }
    }
    say("stop with Ctrl-C");
}

/// As one word of a shell's command.
fn shell_quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// As one segment of a URL's path: unreserved characters (RFC 3986, 2.3) as they are, the bytes of
/// all others by their numbers.
fn path_segment(text: &str) -> String {
    let mut segment = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            segment.push(char::from(byte));
        } else {
            segment.push_str(&format!("%{byte:02X}"));
        }
    }
    segment
}

/// Receives something when the process is told to stop. Told a second time, it ends at once.
#[expect(clippy::disallowed_methods, reason = "times the signals of an operator")]
fn stop_signal() -> Result<mpsc::Receiver<()>, Failure> {
    let (told, stop) = mpsc::channel(1);
    let mut first = None;
    ctrlc::set_handler(move || {
        if first.get_or_insert_with(Instant::now).elapsed() >= REPEAT_TIME_MAX {
            complain("stopped at once; the next start recovers what was acknowledged");
            std::process::exit(130);
        }
        // Has room for the first.
        let _ = told.try_send(());
    })
    .map_err(|error| format!("can't listen for signals: {error}"))?;
    Ok(stop)
}

/// Accepts connections until told to stop, then lets requests under way finish.
async fn serve(listener: TcpListener, app: Arc<App>, slots: usize, mut stop: mpsc::Receiver<()>) {
    let router = http::router(app);
    let slots = Arc::new(Semaphore::new(slots));
    let mut has_failed = false;
    let graceful = GracefulShutdown::new();
    loop {
        let accepted = async {
            // The semaphore is never closed.
            let slot = Arc::clone(&slots).acquire_owned().await;
            (slot, listener.accept().await)
        };
        let (slot, stream) = tokio::select! {
            _ = stop.recv() => break,
            (slot, stream) = accepted => (slot, stream),
        };
        let stream = match stream {
            Ok((stream, _)) => stream,
            Err(error) => {
                if !std::mem::replace(&mut has_failed, true) {
                    tracing::warn!(%error, "can't accept a connection; this is said once");
                }
                // Out of file descriptors, most likely: connections that end will free some.
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            }
        };
        // Answers are small: they should not wait to be filled up.
        let _ = stream.set_nodelay(true);
        let stream = TokioIo::new(Patience::new(stream, WRITE_TIME_MAX));
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIME_MAX)
            .max_headers(HEADERS_MAX)
            .max_buf_size(HEAD_BYTES_MAX)
            .serve_connection(stream, TowerToHyperService::new(router.clone()));
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            // A client that breaks off is its own affair.
            let _ = connection.await;
            drop(slot);
        });
    }
    say("stopping");
    drop(listener);
    if tokio::time::timeout(STOP_TIME_MAX, graceful.shutdown()).await.is_err() {
        complain(format_args!("some requests did not finish within {STOP_TIME_MAX:?}"));
    }
}

fn close(app: &App, dir: &Path) -> Result<(), Failure> {
    let requests = app.metrics.requests();
    let closed = app.gate.close();
    let stats = app.gate.stats();
    say(format_args!(
        "served {requests} requests: {} records written, {} denials; everything up to batch {} \
         is durable in {}",
        stats.total,
        stats.denied,
        stats.durable_batch,
        PathBuf::from(dir).display()
    ));
    for sink in app.gate.sinks() {
        if sink.lag_batches > 1 || !sink.is_attached {
            let error = sink.last_error.map_or_else(String::new, |error| format!(": {error}"));
            say(format_args!(
                "kept for the sink {:?}: {} batches{error}",
                sink.name, sink.lag_batches
            ));
        }
    }
    closed.map_err(|error| format!("closing {}: {error}", dir.display()))
}
