//! How batches are handed to sinks.

use std::time::Duration;

use super::bounds::{self, Check};

/// How synced batches are handed to the sinks. Part of [`Config`](crate::Config), with which it is
/// validated.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "settings have no effect until they are part of a configuration"]
pub struct DeliveryConfig {
    pub(crate) worker_count: usize,
    pub(crate) batch_size: usize,
    pub(crate) flush_interval: Duration,
    pub(crate) retry_attempts: u32,
    pub(crate) retry_delay: Duration,
}

impl Default for DeliveryConfig {
    fn default() -> Self {
        Self {
            worker_count: 3,
            batch_size: 10_000,
            flush_interval: Duration::from_secs(5),
            retry_attempts: 3,
            retry_delay: Duration::from_millis(100),
        }
    }
}

impl DeliveryConfig {
    /// How many threads deliver. Default 3; 1 to 64.
    pub fn worker_count(mut self, count: usize) -> Self {
        self.worker_count = count;
        self
    }

    /// Once this many counters have changed or events have been recorded, they are delivered
    /// without waiting for the [`flush_interval`](Self::flush_interval); the transaction ends with
    /// the journal batch that reaches this number. The first delivery to a sink (all totals) is
    /// larger, and so is what accumulates while a sink is down. Default 10,000; 1 to 1,000,000.
    pub fn batch_size(mut self, entries: usize) -> Self {
        self.batch_size = entries;
        self
    }

    /// How often a sink is given what has accumulated. A longer interval is less work for the
    /// database, since changes of one counter are added up. Default 5 seconds; 10 milliseconds to 1
    /// hour.
    pub fn flush_interval(mut self, interval: Duration) -> Self {
        self.flush_interval = interval;
        self
    }

    /// How often a failed delivery is retried before health says that the sink is down. Retries go
    /// on even then, and what could not be delivered is kept. Default 3; 0 to 100.
    pub fn retry_attempts(mut self, attempts: u32) -> Self {
        self.retry_attempts = attempts;
        self
    }

    /// The upper bound of the pause before the first retry; the pause is drawn at random below it.
    /// The bound doubles with each retry, up to 30 seconds, or to this value if that is longer.
    /// Default 100 milliseconds; 1 millisecond to 1 hour.
    pub fn retry_delay(mut self, delay: Duration) -> Self {
        self.retry_delay = delay;
        self
    }

    pub(super) fn checks(&self) -> [Check; 5] {
        [
            bounds::WORKER_COUNT.check(self.worker_count as u64),
            bounds::BATCH_SIZE.check(self.batch_size as u64),
            bounds::FLUSH_INTERVAL.check_time(self.flush_interval),
            bounds::RETRY_ATTEMPTS.check(u64::from(self.retry_attempts)),
            bounds::RETRY_DELAY.check_time(self.retry_delay),
        ]
    }
}
