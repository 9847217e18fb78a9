//! Operations on a schedule that does not wait for them, each timed twice.

use hdrhistogram::Histogram;
use hdrhistogram::iterators::IterationValue;
use serde_json::{Value, json};

/// Longer times count as this.
const NANOS_MAX: u64 = 600_000_000_000;

/// Which of the two times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Of {
    /// From the call to the return.
    Service,
    /// From when it was due to the return.
    Response,
}

impl Of {
    pub(crate) const BOTH: [Self; 2] = [Self::Service, Self::Response];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Service => "service",
            Self::Response => "response",
        }
    }
}

/// Nanoseconds that operations took.
pub(crate) struct Times {
    service: Histogram<u64>,
    response: Histogram<u64>,
}

impl Times {
    pub(crate) fn new() -> Self {
        let histogram = || Histogram::new_with_max(NANOS_MAX, 3).expect("the bounds are valid");
        Self { service: histogram(), response: histogram() }
    }

    pub(crate) fn of(&self, of: Of) -> &Histogram<u64> {
        match of {
            Of::Service => &self.service,
            Of::Response => &self.response,
        }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.service.add(&other.service).expect("the bounds are the same");
        self.response.add(&other.response).expect("the bounds are the same");
    }

    /// How many operations took how long: pairs, in steps of a tenth.
    pub(crate) fn counts(&self, of: Of) -> Value {
        let steps = self.of(of).iter_log(1, 1.1);
        let counts = steps.filter(|step| step.count_since_last_iteration() > 0);
        let pair = |step: IterationValue<u64>| {
            json!([step.value_iterated_to(), step.count_since_last_iteration()])
        };
        counts.map(pair).collect()
    }
}

/// One operation for each user, each when it is due (in nanoseconds from now), or at once when that
/// is over. The caller spins between them.
pub(crate) fn open_loop<T>(
    users: &[u32],
    dues: impl IntoIterator<Item = u64>,
    mut operate: impl FnMut(u32) -> T,
) -> Times {
    let clock = quanta::Clock::new();
    let mut times = Times::new();
    let start = clock.raw();
    let since_start = || clock.delta_as_nanos(start, clock.raw());
    for (due, &user) in dues.into_iter().zip(users) {
        let mut began = since_start();
        while began < due {
            std::hint::spin_loop();
            began = since_start();
        }
        std::hint::black_box(operate(std::hint::black_box(user)));
        let ended = since_start();
        times.service.saturating_record(ended.saturating_sub(began));
        times.response.saturating_record(ended.saturating_sub(due));
    }
    times
}
