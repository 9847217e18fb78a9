//! What is hard to bring about from outside.

use std::sync::Arc;

use tollgate::{Config, Tollgate};

use super::metrics::Metrics;
use super::waits::{self, Waits};
use super::{App, waits::run};

fn app(config: Config) -> (Arc<App>, tempfile::TempDir) {
    let dir = tempfile::tempdir().expect("a directory");
    let waits = Waits::new(waits::is_durable(&config));
    let gate = Tollgate::open(dir.path(), config.lanes(1).lane_records(64)).expect("it opens");
    (Arc::new(App { gate, token: None, metrics: Metrics::default(), waits }), dir)
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
}
