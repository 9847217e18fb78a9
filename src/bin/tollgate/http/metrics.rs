//! Prometheus metrics, in its text format.

use std::fmt::{Display, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tollgate::{HealthLevel, SinkCondition, SinkStatus};

use crate::http::App;
use crate::http::api::ApiResult;
use crate::http::waits::report;

/// Upper bounds of the latency histogram, in seconds.
const BOUNDS: [f64; 10] =
    [0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.05, 0.25, 1.0];

/// What the server counts itself. Relaxed throughout: counts, nothing depends on them.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    answers: [AtomicU64; 5],
    buckets: [AtomicU64; BOUNDS.len() + 1],
    micros: AtomicU64,
}

impl Metrics {
    fn observe(&self, status: StatusCode, seconds: f64) {
        let class = usize::from(status.as_u16() / 100).clamp(1, 5) - 1;
        self.answers[class].fetch_add(1, Ordering::Relaxed);
        let bucket = BOUNDS.partition_point(|&bound| bound < seconds);
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "positive")]
        self.micros.fetch_add((seconds * 1e6) as u64, Ordering::Relaxed);
    }

    /// How many requests were answered.
    pub(crate) fn requests(&self) -> u64 {
        self.answers.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }
}

/// Counts and times every request.
#[expect(clippy::disallowed_methods, reason = "times requests of the server, not of the engine")]
pub(crate) async fn measure(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let began = Instant::now();
    let response = next.run(request).await;
    app.metrics.observe(response.status(), began.elapsed().as_secs_f64());
    response
}

/// `GET /metrics`.
pub(crate) async fn metrics(State(app): State<Arc<App>>) -> ApiResult<impl IntoResponse> {
    let text = report(&app, render).await?;
    Ok(([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text))
}

fn render(app: &App) -> String {
    let stats = app.gate.stats();
    let mut text = String::new();
    let mut add = |name: &str, kind: &str, help: &str, value: f64| {
        head(&mut text, name, kind, help);
        line(&mut text, name, value);
    };
    #[expect(clippy::cast_precision_loss, reason = "Prometheus values are floating point")]
    let counters = [
        ("records_total", "Records written to the log.", stats.total as f64),
        ("records_processed_total", "Records drained from the log.", stats.processed as f64),
        (
            "operations_failed_total",
            "Operations that failed: no room, or closed.",
            stats.failed as f64,
        ),
        ("operations_unlogged_total", "Operations counted in memory only.", stats.unlogged as f64),
        ("operations_denied_total", "Operations denied by a limit.", stats.denied as f64),
        ("batches_total", "Batches appended to the journal.", stats.batches as f64),
        ("backpressure_waits_total", "Waits for room in the log.", stats.backpressure_waits as f64),
        ("syncs_total", "Syncs completed.", stats.syncs as f64),
        ("syncs_rescued_total", "Failed syncs made good.", stats.syncs_rescued as f64),
        ("clock_jumps_total", "Jumps of the wall clock.", stats.clock_jumps as f64),
        (
            "disk_written_bytes_total",
            "Bytes written to the journal and to snapshots.",
            stats.bytes_to_disk as f64,
        ),
        ("snapshots_total", "Snapshots written.", stats.snapshots as f64),
        (
            "reservations_expired_total",
            "Reservations given back because their time was over.",
            stats.reservations_expired as f64,
        ),
        (
            "answers_forgotten_early_total",
            "Answers to request ids forgotten before their time, for want of room.",
            stats.answers_forgotten_early as f64,
        ),
    ];
    for (name, help, value) in counters {
        add(name, "counter", help, value);
    }
    let health = match app.gate.health().level() {
        HealthLevel::Healthy => 0.0,
        HealthLevel::Degraded => 1.0,
        _ => 2.0,
    };
    #[expect(clippy::cast_precision_loss, reason = "Prometheus values are floating point")]
    let gauges = [
        ("backlog_records", "Records in the log, not drained yet.", stats.backlog as f64),
        ("backlog_max_records", "Room in all lanes, in records.", stats.backlog_max as f64),
        ("counters", "Counters in memory.", stats.counters as f64),
        ("quotas", "Quotas defined.", stats.quotas as f64),
        ("reservations", "Open reservations.", stats.reservations as f64),
        ("answers", "Remembered answers to requests with an id.", stats.answers as f64),
        ("durable_batch", "The last batch that is durable.", stats.durable_batch as f64),
        ("journal_bytes", "Size of the journal's files.", stats.journal_bytes as f64),
        ("snapshot_bytes", "Size of the newest snapshot.", stats.snapshot_bytes as f64),
        (
            "last_sync_timestamp_seconds",
            "When the last sync ended, in seconds since 1970; 0 before the first.",
            stats.last_sync.map_or(0.0, |at| at.as_unix_millis() as f64 / 1e3),
        ),
        (
            "last_sync_duration_seconds",
            "Duration of the last sync.",
            stats.last_sync_duration.as_secs_f64(),
        ),
        ("health", "Health: 0 healthy, 1 degraded, 2 failed.", health),
    ];
    for (name, help, value) in gauges {
        add(name, "gauge", help, value);
    }
    render_sinks(&app.gate.sinks(), &mut text);
    render_requests(&app.metrics, &mut text);
    text
}

fn render_sinks(sinks: &[SinkStatus], text: &mut String) {
    type Value = fn(&SinkStatus) -> f64;
    #[expect(clippy::cast_precision_loss, reason = "Prometheus values are floating point")]
    let values: [(&str, &str, &str, Value); 8] = [
        (
            "up",
            "gauge",
            "1 while the sink works; 0 if it is down, has refused or is missing.",
            |it| f64::from(u8::from(it.condition == SinkCondition::Fine)),
        ),
        ("deliveries_total", "counter", "Deliveries that the sink has confirmed.", |it| {
            it.deliveries as f64
        }),
        ("rows_total", "counter", "Rows delivered to the sink.", |it| it.rows as f64),
        ("events_total", "counter", "Recorded events delivered to the sink.", |it| {
            it.events as f64
        }),
        ("failures_total", "counter", "Attempts with the sink that failed.", |it| {
            it.failures as f64
        }),
        ("lag_batches", "gauge", "Durable batches that the sink has not confirmed.", |it| {
            it.lag_batches as f64
        }),
        ("lag_seconds", "gauge", "Age, since the open, of the oldest undelivered change.", |it| {
            it.lag.as_secs_f64()
        }),
        ("backlog_bytes", "gauge", "Bytes of backlog files kept for the sink.", |it| {
            it.backlog_bytes as f64
        }),
    ];
    for (name, kind, help, value) in values {
        let name = format!("sink_{name}");
        head(text, &name, kind, help);
        for sink in sinks {
            line(text, format_args!("{name}{{sink=\"{}\"}}", sink.name), value(sink));
        }
    }
}

fn render_requests(metrics: &Metrics, text: &mut String) {
    let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
    let [requests, seconds] = ["http_requests_total", "http_request_seconds"];
    head(text, requests, "counter", "Requests by the class of their status.");
    for (class, count) in (1..).zip(&metrics.answers) {
        line(text, format_args!("{requests}{{class=\"{class}xx\"}}"), load(count));
    }
    head(text, seconds, "histogram", "Time from head to answer.");
    let mut below = 0;
    for (bound, count) in BOUNDS.iter().zip(&metrics.buckets) {
        below += load(count);
        line(text, format_args!("{seconds}_bucket{{le=\"{bound}\"}}"), below);
    }
    let all: u64 = metrics.buckets.iter().map(load).sum();
    line(text, format_args!("{seconds}_bucket{{le=\"+Inf\"}}"), all);
    #[expect(clippy::cast_precision_loss, reason = "Prometheus values are floating point")]
    line(text, format_args!("{seconds}_sum"), load(&metrics.micros) as f64 / 1e6);
    line(text, format_args!("{seconds}_count"), all);
}

/// What stands above a metric's lines.
fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    // Writing to a string can't fail.
    let _ = writeln!(text, "# HELP tollgate_{name} {help}\n# TYPE tollgate_{name} {kind}");
}

fn line(text: &mut String, name: impl Display, value: impl Display) {
    // Writing to a string can't fail.
    let _ = writeln!(text, "tollgate_{name} {value}");
}
