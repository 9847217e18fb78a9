//! Prometheus metrics, in its text format.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tollgate::{HealthLevel, SinkStatus};

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
        // Writing to a string can't fail.
        let _ = writeln!(text, "# HELP tollgate_{name} {help}\n# TYPE tollgate_{name} {kind}");
        let _ = writeln!(text, "tollgate_{name} {value}");
    };
    #[expect(clippy::cast_precision_loss, reason = "Prometheus values are floating point")]
    let counters = [
        ("records_total", "Records written to the log.", stats.total as f64),
        ("records_processed_total", "Of these, drained from it.", stats.processed as f64),
        ("operations_failed_total", "Refused with an error.", stats.failed as f64),
        ("operations_unlogged_total", "Counted but not logged.", stats.dropped as f64),
        ("operations_denied_total", "Denied by a limit.", stats.denied as f64),
        ("batches_total", "Batches appended to the journal.", stats.batches as f64),
        ("backpressure_waits_total", "Waits for room.", stats.backpressure_waits as f64),
        ("syncs_total", "Syncs completed.", stats.syncs as f64),
        ("syncs_rescued_total", "Failed syncs made good.", stats.syncs_rescued as f64),
        ("disk_written_bytes_total", "Journal and snapshots.", stats.bytes_to_disk as f64),
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
        ("backlog_records", "Records not drained yet.", stats.backlog as f64),
        ("backlog_max_records", "Records that the lanes hold.", stats.backlog_max as f64),
        ("counters", "Counters in memory.", stats.counters as f64),
        ("quotas", "Quotas defined.", stats.quotas as f64),
        ("reservations", "Open reservations.", stats.reservations as f64),
        ("answers", "Remembered answers to requests with an id.", stats.answers as f64),
        ("durable_batch", "The last batch that is durable.", stats.durable_batch as f64),
        ("journal_bytes", "Size of the journal's files.", stats.journal_bytes as f64),
        ("snapshot_bytes", "Size of the newest snapshot.", stats.snapshot_bytes as f64),
        ("last_sync_seconds", "How long it took.", stats.last_sync_duration.as_secs_f64()),
        ("health", "0 healthy, 1 degraded, 2 failed.", health),
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
    let values: [(&str, &str, &str, Value); 7] = [
        ("deliveries_total", "counter", "Deliveries confirmed.", |it| it.deliveries as f64),
        ("rows_total", "counter", "Rows in them.", |it| it.rows as f64),
        ("events_total", "counter", "Recorded events in them.", |it| it.events as f64),
        ("failures_total", "counter", "Attempts that failed.", |it| it.failures as f64),
        ("lag_batches", "gauge", "Durable batches behind it.", |it| it.lag_batches as f64),
        ("lag_seconds", "gauge", "How long something waits.", |it| it.lag.as_secs_f64()),
        ("backlog_bytes", "gauge", "Files kept for it.", |it| it.backlog_bytes as f64),
    ];
    for (name, kind, help, value) in values {
        // Writing to a string can't fail.
        let _ = writeln!(text, "# HELP tollgate_sink_{name} {help}");
        let _ = writeln!(text, "# TYPE tollgate_sink_{name} {kind}");
        for sink in sinks {
            let _ =
                writeln!(text, "tollgate_sink_{name}{{sink=\"{}\"}} {}", sink.name, value(sink));
        }
    }
}

fn render_requests(metrics: &Metrics, text: &mut String) {
    let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
    let mut add = |line: String| {
        text.push_str(&line);
        text.push('\n');
    };
    add("# HELP tollgate_http_requests_total Requests by the class of their status.".to_owned());
    add("# TYPE tollgate_http_requests_total counter".to_owned());
    for (class, count) in (1..).zip(&metrics.answers) {
        add(format!("tollgate_http_requests_total{{class=\"{class}xx\"}} {}", load(count)));
    }
    add("# HELP tollgate_http_request_seconds Time from head to answer.".to_owned());
    add("# TYPE tollgate_http_request_seconds histogram".to_owned());
    let mut below = 0;
    for (bound, count) in BOUNDS.iter().zip(&metrics.buckets) {
        below += load(count);
        add(format!("tollgate_http_request_seconds_bucket{{le=\"{bound}\"}} {below}"));
    }
    let all: u64 = metrics.buckets.iter().map(load).sum();
    add(format!("tollgate_http_request_seconds_bucket{{le=\"+Inf\"}} {all}"));
    #[expect(clippy::cast_precision_loss, reason = "Prometheus values are floating point")]
    add(format!("tollgate_http_request_seconds_sum {}", load(&metrics.micros) as f64 / 1e6));
    add(format!("tollgate_http_request_seconds_count {all}"));
}
