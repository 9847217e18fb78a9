//! What one request is charged: reserved before, kept open while, charged after.

use std::pin::pin;
use std::time::Duration;

use serde_json::Value;
use tokio::time::{Instant, sleep_until};
use tollgate::{Consume, Decisions, Error, Reservation, Reserved, Tollgate};

use crate::bill::Bill;
use crate::estimate::{Produced, total_tokens};

/// A request that has been let through. However it ends, it is charged when this is dropped, at the
/// latest.
pub(crate) struct Metered {
    gate: Tollgate,
    counters: [Consume; 2],
    /// Until it is settled.
    reservation: Option<Reservation>,
    ttl: Duration,
    extend_at: Instant,
    prompt_tokens: u64,
    /// Whether the upstream may have begun to work: without that, nothing is owed.
    is_owed: bool,
    produced: Produced,
    /// As the upstream says.
    total_tokens: Option<u64>,
}

impl Metered {
    /// Reserves of both counters, or of none.
    pub(crate) fn reserve(
        gate: &Tollgate,
        counters: [Consume; 2],
        prompt_tokens: u64,
        ttl: Duration,
    ) -> Result<Result<Self, Decisions>, Error> {
        let reservation = match gate.reserve_all(&counters, ttl)? {
            Reserved::Open(reservation) => reservation,
            Reserved::Denied(decisions) => return Ok(Err(decisions)),
        };
        Ok(Ok(Self {
            gate: gate.clone(),
            counters,
            reservation: Some(reservation),
            ttl,
            extend_at: Instant::now() + ttl / 3,
            prompt_tokens,
            is_owed: false,
            produced: Produced::default(),
            total_tokens: None,
        }))
    }

    /// Does the work, and keeps the reservation open for as long as it takes. The time to live can
    /// so be short, which matters when this process dies: then it is for how long others miss what
    /// was reserved.
    pub(crate) async fn keep_open<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        loop {
            tokio::select! {
                // First, so that work which is always ready does not keep it from being extended.
                biased;
                () = sleep_until(self.extend_at) => self.extend(),
                output = &mut work => return output,
            }
        }
    }

    fn extend(&mut self) {
        self.extend_at = Instant::now() + self.ttl / 3;
        if let Some(reservation) = &self.reservation
            && let Err(error) = reservation.extend(self.ttl)
        {
            eprintln!("token_gateway: {error}");
            // Several times before its time is over: the log may have had no room just now.
            self.extend_at = Instant::now() + self.ttl / 30;
        }
    }

    /// The upstream is asked: from here on it may work, whether or not its answer comes.
    pub(crate) fn begin(&mut self) {
        self.is_owed = true;
    }

    /// The upstream was not reached, or has refused.
    pub(crate) fn take_back(&mut self) {
        self.is_owed = false;
    }

    /// Takes in what the upstream has sent: a part of the answer, or all of it.
    pub(crate) fn observe(&mut self, answer: &Value, bytes: usize) {
        self.produced.add(answer, bytes);
        if let Some(total) = total_tokens(answer) {
            self.total_tokens = Some(total);
        }
    }

    /// The upstream has sent something that can't be read.
    pub(crate) fn observe_unread(&mut self, bytes: usize) {
        self.produced.add_unread(bytes);
    }

    /// What it cost: what the upstream says, or what it has sent. Of an answer that can't be read
    /// nobody knows, so that it is as much as it might have been.
    fn actual(&self) -> u64 {
        let estimate = self.prompt_tokens + self.produced.tokens();
        let [Consume { amount: reserved, .. }, _] = self.counters;
        let is_unknown = self.produced.is_unreadable();
        self.total_tokens.unwrap_or(if is_unknown { estimate.max(reserved) } else { estimate })
    }

    /// Charges what it cost. Further calls do nothing.
    pub(crate) fn settle(&mut self) {
        let Some(reservation) = self.reservation.take() else { return };
        if !self.is_owed {
            // Dropping it gives all of it back.
            return;
        }
        let actual = self.actual();
        Bill::settle(&self.gate, reservation, self.counters, actual, self.ttl);
    }
}

impl Drop for Metered {
    fn drop(&mut self) {
        self.settle();
    }
}
