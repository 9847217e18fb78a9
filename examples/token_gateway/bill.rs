//! What is owed, until it is charged: the log may have no room for it just now.

use std::fmt::Display;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::{Instant, sleep};
use tollgate::{Consume, Error, Reservation, Tollgate};

/// How long a bill is tried again. Then the reservation is left to its time to live.
const TIME_MAX: Duration = Duration::from_secs(600);
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// A bill that is dropped unpaid leaves what was reserved reserved: it is in use.
pub(crate) struct Bill {
    gate: Tollgate,
    /// Until it is committed, or found to be over.
    reservation: Option<Reservation>,
    ttl: Duration,
    actual: u64,
    reserved: u64,
    /// What is left to be counted where the reservation is over.
    charges: Vec<Consume>,
    is_done: bool,
}

impl Bill {
    /// Charges the `actual` amount to the counters of the reservation: now, or in a task.
    pub(crate) fn settle(
        gate: &Tollgate,
        reservation: Reservation,
        counters: [Consume; 2],
        actual: u64,
        ttl: Duration,
    ) {
        let [Consume { amount: reserved, .. }, _] = counters;
        let charges = counters.map(|counter| Consume { amount: actual, ..counter }).to_vec();
        let (gate, reservation) = (gate.clone(), Some(reservation));
        let is_done = false;
        let mut bill = Self { gate, reservation, ttl, actual, reserved, charges, is_done };
        bill.present();
        if !bill.is_done
            && let Ok(runtime) = Handle::try_current()
        {
            runtime.spawn(bill.pay());
        }
    }

    /// Tries again until it is done. Dropped where the runtime is shut down.
    async fn pay(mut self) {
        let (began, mut extended) = (Instant::now(), Instant::now());
        let mut pause = PAUSE_MIN;
        while !self.is_done && began.elapsed() < TIME_MAX {
            // Extending needs room in the log as well: whichever finds it first.
            if let Some(reservation) = &self.reservation
                && extended.elapsed() >= self.ttl / 3
                && reservation.extend(self.ttl).is_ok()
            {
                extended = Instant::now();
            }
            sleep(pause.min(self.ttl / 3)).await;
            pause = (pause * 2).min(PAUSE_MAX);
            self.present();
        }
    }

    /// Not done afterwards where the log has no room.
    fn present(&mut self) {
        let Some(reservation) = &mut self.reservation else { return self.charge() };
        match reservation.commit(self.actual) {
            Ok(_) => self.is_done = true,
            Err(Error::Backpressure { .. }) => {}
            // This process stood still for too long. The tokens were used all the same.
            Err(Error::ReservationSettled { .. } | Error::UnknownReservation(_)) => {
                self.reservation = None;
                self.charge();
            }
            Err(error) if self.is_too_much(&error) => self.present(),
            Err(error) => self.give_up(&error),
        }
    }

    /// Whether it is more than can be counted, which nobody can have used: then it becomes what was
    /// reserved.
    fn is_too_much(&mut self, error: &Error) -> bool {
        let is_too_much = matches!(error, Error::InvalidAmount(_) | Error::Overflow { .. })
            && self.actual > self.reserved;
        if is_too_much {
            self.actual = self.reserved;
            self.charges.iter_mut().for_each(|charge| charge.amount = self.reserved);
        }
        is_too_much
    }

    fn charge(&mut self) {
        self.charges.retain(|charge| charge.amount > 0);
        match self.gate.consume_batch(&self.charges) {
            Ok(_) => self.is_done = true,
            Err(Error::Backpressure { .. }) => {}
            Err(Error::BatchCutShort { counted, source }) => {
                self.charges.drain(..counted);
                if self.is_too_much(&source) {
                    self.charge();
                } else if !matches!(*source, Error::Backpressure { .. }) {
                    self.give_up(&source);
                }
            }
            Err(error) if self.is_too_much(&error) => self.charge(),
            Err(error) => self.give_up(&error),
        }
    }

    fn give_up(&mut self, error: &dyn Display) {
        self.is_done = true;
        let actual = self.actual;
        match self.reservation.take().map(Reservation::detach) {
            Some(id) => eprintln!(
                "token_gateway: {actual} tokens were not charged: {error}; reservation {id} stays \
                 until its time is over"
            ),
            None => eprintln!("token_gateway: {actual} tokens were not charged: {error}"),
        }
    }
}

impl Drop for Bill {
    fn drop(&mut self) {
        if !self.is_done {
            self.present();
        }
        if !self.is_done {
            self.give_up(&"the log has no room");
        }
    }
}
