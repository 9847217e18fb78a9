//! Delivering as an engine does: the position is read after any doubt.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tollgate::sink::{Applied, SinkError, UsageBatch, UsageSink};

use crate::contract::Store;
use crate::feed::{Feed, Random, totals};
use crate::servers::Server;

const DELIVERY_TIMEOUT: Duration = Duration::from_secs(60);

/// What went wrong on the way.
#[derive(Debug, Default)]
pub(crate) struct Mishaps {
    pub(crate) errors: AtomicU64,
    /// Errors of batches that had been applied.
    pub(crate) lost_confirmations: AtomicU64,
}

/// Delivers a batch, whatever happens.
pub(crate) fn deliver(sink: &mut dyn UsageSink, batch: &UsageBatch, mishaps: &Mishaps) {
    let start = Instant::now();
    let retry = |error: &SinkError| {
        mishaps.errors.fetch_add(1, Ordering::Relaxed);
        assert!(error.is_retryable(), "{error}");
        assert!(start.elapsed() < DELIVERY_TIMEOUT, "{error}");
        thread::sleep(Duration::from_millis(2));
    };
    loop {
        match sink.apply(batch) {
            Ok(Applied::Now) => return,
            Ok(Applied::Before) => panic!("nobody else delivers this"),
            Err(error) => retry(&error),
        }
        let position = loop {
            match sink.position(batch.engine()) {
                Ok(position) => break position,
                Err(error) => retry(&error),
            }
        };
        if position == Some(batch.to()) {
            mishaps.lost_confirmations.fetch_add(1, Ordering::Relaxed);
            return;
        }
        assert_eq!(position, batch.from());
    }
}

/// Two engines deliver while the server is killed again and again.
pub(crate) fn totals_survive_kills(
    server: &Mutex<Server>,
    store: &(dyn Store + Sync),
    signals: &[Signal],
    kills: u64,
) -> Mishaps {
    let mishaps = Mishaps::default();
    let is_over = AtomicBool::new(false);
    let mut feeds = [Feed::new(1, 21), Feed::new(2, 22)];
    thread::scope(|scope| {
        for feed in &mut feeds {
            let (mishaps, is_over) = (&mishaps, &is_over);
            scope.spawn(move || {
                let mut sink = store.open();
                while !is_over.load(Ordering::Relaxed) {
                    deliver(&mut *sink, &feed.next(), mishaps);
                }
            });
        }
        let mut random = Random(23);
        for _ in 0..kills {
            thread::sleep(Duration::from_millis(random.below(100)));
            let mut server = server.lock().unwrap();
            server.kill(signals[random.below(signals.len() as u64) as usize]);
            thread::sleep(Duration::from_millis(random.below(20)));
            server.restart();
        }
        is_over.store(true, Ordering::Relaxed);
    });
    let [one, other] = &feeds;
    assert_eq!(store.totals(), totals(&[one, other]));
    assert_eq!(store.events(), store.events().and(Some(one.events() + other.events())));
    let batches = feeds.iter().filter_map(Feed::position).map(|at| at.batch).sum::<u64>();
    eprintln!("{kills} kills, positions up to {batches}, {mishaps:?}");
    assert!(mishaps.errors.load(Ordering::Relaxed) > 0);
    mishaps
}

/// How often servers are killed: `TOLLGATE_SINK_KILLS`, or a number that takes seconds.
pub(crate) fn kills() -> u64 {
    std::env::var("TOLLGATE_SINK_KILLS").map_or(15, |kills| kills.parse().unwrap())
}
