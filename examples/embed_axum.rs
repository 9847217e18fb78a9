//! Middleware that meters a real route: `cargo run --release --example embed_axum`.
//!
//! Each API key (the header `X-Api-Key`) may call `/hello` five times a minute:
//!
//! ```sh
//! for i in 1 2 3 4 5 6; do curl -si -H 'X-Api-Key: 7' http://127.0.0.1:3000/hello; done
//! ```
//!
//! The sixth answer is 429, with `Retry-After`. Stop with Ctrl-C, start again within the minute:
//! the key is still at its limit.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "an example talks")]

use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use tollgate::{Config, Quota, QuotaId, Tollgate, Window};

const ADDRESS: &str = "127.0.0.1:3000";

/// The threads that serve wait no longer than this for room in the log: while a slow or full disk
/// leaves none, the default of 1 second would hold up all other requests.
const LOG_WAIT_MAX: Duration = Duration::from_millis(5);

#[derive(Clone)]
struct Metering {
    gate: Tollgate,
    calls: QuotaId,
}

/// Counts a call before it is made; refuses it where the key has none left.
async fn meter(State(metering): State<Metering>, request: Request, next: Next) -> Response {
    let key = request.headers().get("x-api-key").and_then(|key| key.to_str().ok()?.parse().ok());
    let Some(key) = key else {
        return (StatusCode::UNAUTHORIZED, "X-Api-Key: a number, please\n").into_response();
    };
    match metering.gate.try_consume(key, metering.calls, 1) {
        Ok(decision) if decision.is_allowed() => next.run(request).await,
        Ok(decision) => {
            let mut response = (StatusCode::TOO_MANY_REQUESTS, "enough for now\n").into_response();
            if let Some(seconds) = decision.retry_after_secs() {
                response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
            }
            response
        }
        // The log has no room, or the engine is closed: nothing was counted.
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")).into_response(),
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("embed_axum: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let config = Config::default().backpressure_deadline(LOG_WAIT_MAX);
    let gate = Tollgate::open("example-data/embed_axum", config)?;
    let calls = gate.define(Quota::new("calls", 5).window(Window::Minute))?;
    let metering = Metering { gate: gate.clone(), calls };
    let app = Router::new()
        .route("/hello", get(|| async { "hello\n" }))
        .route_layer(middleware::from_fn_with_state(metering, meter));

    let (told, mut stop) = tokio::sync::mpsc::channel(1);
    ctrlc::set_handler(move || {
        // Told twice is told.
        let _ = told.try_send(());
    })?;
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(async {
        let listener = tokio::net::TcpListener::bind(ADDRESS)
            .await
            .map_err(|error| format!("can't listen on {ADDRESS}: {error}"))?;
        println!("listening on http://{ADDRESS}/hello");
        let stopped = async move {
            stop.recv().await;
        };
        axum::serve(listener, app)
            .with_graceful_shutdown(stopped)
            .await
            .map_err(Box::<dyn Error>::from)
    })?;
    gate.close()?;
    Ok(())
}
