//! What is hard to bring about from outside.

use std::pin::Pin;
use std::sync::{Arc, Mutex, mpsc};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::http::{Request, StatusCode, header};
use axum::response::IntoResponse as _;
use hyper::body::Frame;
use hyper::service::Service as _;
use hyper_util::service::TowerToHyperService;
use tollgate::{Config, ManualClock, Quota, Timestamp, Tollgate, Window};

use super::api::BODY_TIME_MAX;
use super::auth::Access;
use super::metrics::Metrics;
use super::waits::{OPERATIONS_MAX, WAIT_MAX, Waits, in_memory, on_disk, run};
use super::{App, router};

fn app(config: Config) -> (Arc<App>, tempfile::TempDir) {
    let dir = tempfile::tempdir().expect("a directory");
    let waits = Waits::new(config.has_durable_consumes()).expect("threads");
    let gate = Tollgate::open(dir.path(), config.lanes(1).lane_records(64)).expect("it opens");
    (Arc::new(App { gate, access: Access::Unnamed, metrics: Metrics::default(), waits }), dir)
}

#[tokio::test]
async fn what_waits_for_the_disk_runs_elsewhere() {
    let here = std::thread::current().id();
    let (plain, _dir) = app(Config::default());
    let (durable, _dir) = app(Config::default().durable_consumes(true));
    for (app, waits, is_here) in
        [(&plain, false, true), (&plain, true, false), (&durable, false, false)]
    {
        let ran = run(app, waits, |_| Ok(std::thread::current().id())).await;
        assert_eq!(ran.expect("it runs") == here, is_here, "{waits}");
    }
    // Also where whatever counts is durable.
    let ran = in_memory(&durable, |_| Ok(std::thread::current().id())).await;
    assert_eq!(ran.expect("it runs"), here);
}

/// Whatever waits for a disk that does not answer keeps its threads; what is answered from memory
/// is answered.
#[test]
fn a_disk_that_hangs_holds_up_only_what_waits_for_it() {
    let (app, _dir) = app(Config::default());
    let quota = app.gate.define(Quota::new("requests", 10)).expect("it is defined");
    let (disk, hangs) = mpsc::channel::<()>();
    let hangs = Arc::new(Mutex::new(hangs));
    // Time stands still, so that it stays as this test says.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .expect("a runtime");
    let is_answered = runtime.block_on(async {
        for _ in 0..OPERATIONS_MAX {
            let (app, hangs) = (Arc::clone(&app), Arc::clone(&hangs));
            let hang = move |_: &Tollgate| {
                // All of them until the sender is dropped.
                let _ = hangs.lock().map(|hangs| hangs.recv());
                Ok(())
            };
            tokio::spawn(async move { on_disk(&app, hang).await });
        }
        tokio::task::yield_now().await;
        app.waits.expect_waits();
        let counting = Arc::clone(&app);
        let counts = tokio::spawn(async move {
            run(&counting, false, move |gate| gate.try_consume(1, quota, 1)).await
        });
        // Guards against a hang only.
        for _ in 0..4_000 {
            if counts.is_finished() {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
            tokio::task::yield_now().await;
        }
        counts.is_finished()
    });
    drop(disk);
    assert!(is_answered);
    assert_eq!(app.gate.usage(1, quota).expect("it is known").used, 1);
}

/// A body that never comes.
struct Silence;

impl HttpBody for Silence {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Poll::Pending
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_that_does_not_come_is_answered_and_measured() {
    let (app, _dir) = app(Config::default());
    app.gate.define(Quota::new("requests", 10)).expect("it is defined");
    let request = Request::post("/v1/consume")
        .header(header::CONTENT_TYPE, "application/json")
        .body(Body::new(Silence))
        .expect("a request");
    let began = tokio::time::Instant::now();
    let service = TowerToHyperService::new(router(Arc::clone(&app)));
    let response = service.call(request).await.expect("it answers");
    assert_eq!(response.status(), StatusCode::REQUEST_TIMEOUT);
    assert_eq!(began.elapsed().as_secs(), BODY_TIME_MAX.as_secs());
    assert_eq!(app.metrics.requests(), 1);
}

/// The commit before may be in memory only, and its answer lost.
#[tokio::test]
async fn a_commit_that_is_repeated_is_durable_where_that_is_asked_for() {
    let (app, _dir) = app(Config::default().sync_interval(Duration::from_secs(60)));
    let quota = app.gate.define(Quota::new("requests", 10)).expect("it is defined");
    let reserved = app.gate.reserve(7, quota, 5, Duration::from_secs(600)).expect("no error");
    let id = reserved.into_result().expect("there is room").detach();
    let committed = app.gate.commit_reservation(id, 5).expect("it is open");
    assert!(committed.is_allowed());
    let syncs = app.gate.stats().syncs;
    let request = Request::post(format!("/v1/reservations/{id}/commit"))
        .header(header::CONTENT_TYPE, "application/json")
        .body(Body::from(r#"{"actual": 5, "sync": true}"#))
        .expect("a request");
    let service = TowerToHyperService::new(router(Arc::clone(&app)));
    let response = service.call(request).await.expect("it answers");
    assert_eq!(response.status(), StatusCode::CONFLICT);
    assert!(app.gate.stats().syncs > syncs);
}

/// As a commit may be.
#[tokio::test]
async fn an_extension_and_a_cancel_are_durable_where_that_is_asked_for() {
    let (app, _dir) = app(Config::default().sync_interval(Duration::from_secs(60)));
    let quota = app.gate.define(Quota::new("requests", 10)).expect("it is defined");
    let reserved = app.gate.reserve(7, quota, 5, Duration::from_secs(600)).expect("no error");
    let id = reserved.into_result().expect("there is room").detach();
    // The last is answered by how it ended, which may be in memory only.
    let settles = [
        ("extend", r#"{"ttl_ms": 900000, "sync": true}"#, StatusCode::OK),
        ("cancel", r#"{"sync": true}"#, StatusCode::OK),
        ("cancel", r#"{"sync": true}"#, StatusCode::CONFLICT),
    ];
    for (what, body, status) in settles {
        // Else there would be nothing to sync.
        app.gate.consume(8, quota, 1).expect("it is counted");
        let syncs = app.gate.stats().syncs;
        let request = Request::post(format!("/v1/reservations/{id}/{what}"))
            .header(header::CONTENT_TYPE, "application/json")
            .body(Body::from(body))
            .expect("a request");
        let service = TowerToHyperService::new(router(Arc::clone(&app)));
        let response = service.call(request).await.expect("it answers");
        assert_eq!(response.status(), status, "{what}");
        assert!(app.gate.stats().syncs > syncs, "{what}");
    }
}

/// What a wait for the disk has counted is not answered as if it were not.
#[tokio::test(start_paused = true)]
async fn an_operation_that_takes_too_long_is_of_unknown_outcome() {
    let (app, _dir) = app(Config::default());
    let (disk, held_up) = mpsc::channel::<()>();
    let (done, is_done) = mpsc::channel();
    let slow = on_disk(&app, move |_| {
        // Ends when the sender is dropped.
        let _ = held_up.recv();
        Ok(done.send(()))
    });
    let patience = async {
        // Time does not pass by itself while a thread works.
        tokio::task::yield_now().await;
        tokio::time::advance(WAIT_MAX + Duration::from_secs(1)).await;
    };
    let (answer, ()) = tokio::join!(slow, patience);
    let answer = answer.expect_err("it takes too long").into_response();
    assert_eq!(answer.status(), StatusCode::INTERNAL_SERVER_ERROR);
    drop(disk);
    is_done.recv().expect("it goes on to its end");
}

/// The engine's clock is behind: as if the answer were repeated after its window.
#[tokio::test]
async fn a_denial_whose_window_is_over_says_to_come_again() {
    let clock = Arc::new(ManualClock::new(Timestamp::from_unix_millis(1_000)));
    let (app, _dir) = app(Config::default().clock(clock));
    let quota = Quota::new("requests", 10).window(Window::Hour);
    app.gate.define(quota).expect("it is defined");
    let item = r#"{"user": 7, "quota": "requests", "amount": 9}"#;
    let all = format!(r#"{{"items": [{item}]}}"#);
    for (path, body) in [("try-consume", item), ("try-consume-all", &all)] {
        let mut last = None;
        for _ in 0..2 {
            let request = Request::post(format!("/v1/{path}"))
                .header(header::CONTENT_TYPE, "application/json")
                .body(Body::from(body.to_owned()))
                .expect("a request");
            let service = TowerToHyperService::new(router(Arc::clone(&app)));
            last = Some(service.call(request).await.expect("it answers"));
        }
        let denied = last.expect("two answers");
        assert_eq!(denied.status(), StatusCode::TOO_MANY_REQUESTS, "{path}");
        assert_eq!(denied.headers()[header::RETRY_AFTER], "1", "{path}");
        assert!(denied.headers()["ratelimit"].as_bytes().ends_with(b";t=0"), "{path}");
    }
}
