//! How deliveries to one sink go, for statistics and health. Read without waiting for the sink or
//! for the disk.

use std::collections::VecDeque;
use std::error::Error as StdError;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::uptime;
use crate::config::DeliveryConfig;
use crate::delivery::backoff::{pause, pause_for_help};
use crate::delivery::failure::Failure;
use crate::delivery::state::SinkState;
use crate::delivery::{SinkCondition, SinkStatus};
use crate::journal::writer::ChainPoint;
use crate::model::{BatchNumber, Timestamp};
use crate::sink::Position;

/// A call of a sink that takes longer than this counts as one that hangs. PostgreSQL gives a
/// statement 60 seconds.
pub(crate) const CALL_MAX: Duration = Duration::from_secs(90);

/// A sink of which nothing was heard for so long is asked where it is: it may have been emptied, or
/// set back, since it last had something to take.
pub(crate) const SILENCE_MAX: Duration = Duration::from_mins(1);

/// What became durable within so small a part of the lag is as old as the first of it.
const LAG_STEPS: u32 = 16;
/// How many ages are told apart: a year, looked at each millisecond, needs fewer.
const WAITING_MAX: usize = 512;

#[derive(Debug)]
pub(super) struct Progress {
    confirmed: Option<ChainPoint>,
    in_flight: Option<ChainPoint>,
    /// What is not confirmed, the oldest first.
    waiting: VecDeque<Waiting>,
    pub(super) backlog_bytes: u64,
    deliveries: u64,
    rows: u64,
    events: u64,
    failures: u64,
    /// Those that do not pass by themselves.
    refusals: u64,
    failures_in_a_row: u32,
    /// Of the batch that is in flight.
    refusals_in_a_row: u32,
    last_error: Option<LastError>,
    condition: SinkCondition,
    last_delivery: Option<Timestamp>,
    /// When the sink was called, while it has not answered.
    called_at: Option<Duration>,
    /// How often it was wanted to know where the sink is.
    questions: u64,
    /// This many of them were there when the sink was last asked, and said it.
    answers: u64,
    /// When the sink last said where it is, or took something.
    heard_at: Duration,
}

/// What an attempt failed with.
#[derive(Debug)]
pub(super) struct LastError {
    pub(super) reason: String,
    pub(super) source: Option<Arc<dyn StdError + Send + Sync>>,
    pub(super) is_retryable: bool,
}

/// Batches up to this one, from the end of those before on, and when they were first seen durable.
#[derive(Debug, Clone, Copy)]
struct Waiting {
    to: BatchNumber,
    since: Duration,
}

/// How many attempts failed so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Failures {
    pub(super) all: u64,
    pub(super) refusals: u64,
}

/// Numbers in the text of one and the same error may move with each attempt.
fn without_numbers(text: &str) -> impl Iterator<Item = char> {
    text.chars().filter(|character| !character.is_ascii_digit())
}

impl Progress {
    pub(super) fn new(state: &SinkState) -> Self {
        Self {
            confirmed: state.confirmed,
            in_flight: state.in_flight,
            waiting: VecDeque::new(),
            backlog_bytes: 0,
            deliveries: 0,
            rows: 0,
            events: 0,
            failures: 0,
            refusals: 0,
            failures_in_a_row: 0,
            refusals_in_a_row: 0,
            last_error: None,
            condition: SinkCondition::Fine,
            last_delivery: None,
            called_at: None,
            questions: 0,
            answers: 0,
            heard_at: uptime(),
        }
    }

    /// The sink is to say where it is. Returns the question's number.
    pub(super) fn ask(&mut self) -> u64 {
        self.questions += 1;
        self.questions
    }

    /// The same, if the sink has been silent for long at `now`, by uptime.
    pub(super) fn ask_if_silent(&mut self, now: Duration) {
        let silence = now.saturating_sub(self.heard_at);
        if self.is_answered(self.questions) && silence >= SILENCE_MAX {
            self.ask();
        }
    }

    /// The number of the last question; 0, which is answered, where there was none.
    pub(super) fn last_question(&self) -> u64 {
        self.questions
    }

    /// Whether the sink has said where it is since this question.
    pub(super) fn is_answered(&self, question: u64) -> bool {
        self.answers >= question
    }

    /// The sink was asked after this question, and is where `state` says.
    pub(super) fn answered(&mut self, question: u64, state: &SinkState) {
        // Together: who waits for the answer goes by the position.
        self.look(state);
        (self.answers, self.heard_at) = (question, uptime());
    }

    pub(super) fn called(&mut self) {
        self.called_at = Some(uptime());
    }

    pub(super) fn returned(&mut self) {
        self.called_at = None;
    }

    /// Takes over where the sink is.
    pub(super) fn look(&mut self, state: &SinkState) {
        if self.confirmed != state.confirmed {
            self.refusals_in_a_row = 0;
        }
        (self.confirmed, self.in_flight) = (state.confirmed, state.in_flight);
    }

    /// Notes what is durable at `now`, by uptime: what was not before has been waiting since then,
    /// however much of what is older the sink has got when.
    pub(super) fn note(&mut self, durable: BatchNumber, now: Duration) {
        let confirmed = self.confirmed.map_or(BatchNumber::ZERO, |point| point.number);
        let got = self.waiting.partition_point(|waiting| waiting.to <= confirmed);
        self.waiting.drain(..got);
        if durable <= self.waiting.back().map_or(confirmed, |last| last.to) {
            return;
        }
        let (step, is_full) = (self.waited(now) / LAG_STEPS, self.waiting.len() >= WAITING_MAX);
        match self.waiting.back_mut() {
            Some(last) if is_full || now.saturating_sub(last.since) < step => last.to = durable,
            _ => self.waiting.push_back(Waiting { to: durable, since: now }),
        }
    }

    /// How long the oldest of what is noted has been waiting.
    fn waited(&self, now: Duration) -> Duration {
        self.waiting.front().map_or(Duration::ZERO, |oldest| now.saturating_sub(oldest.since))
    }

    pub(super) fn delivered(&mut self, [rows, events]: [u64; 2], now: Timestamp) {
        self.deliveries += 1;
        self.rows += rows;
        self.events += events;
        self.last_delivery = Some(now);
        self.heard_at = uptime();
    }

    /// An attempt succeeded, or there was nothing to do. Returns whether that is worth logging,
    /// which must be done without the lock on this: a subscriber may ask for the engine's health.
    pub(super) fn succeeded(&mut self) -> bool {
        (self.failures_in_a_row, self.refusals_in_a_row) = (0, 0);
        self.last_error = None;
        std::mem::replace(&mut self.condition, SinkCondition::Fine) != SinkCondition::Fine
    }

    /// How long to wait, and whether this is worth logging, as above.
    pub(super) fn failed(
        &mut self,
        failure: &Failure,
        config: &DeliveryConfig,
    ) -> (Duration, bool) {
        self.failures += 1;
        self.failures_in_a_row = self.failures_in_a_row.saturating_add(1);
        self.refusals += u64::from(!failure.is_retryable);
        let condition = if !failure.is_retryable {
            SinkCondition::Refused
        } else if self.failures_in_a_row > config.retry_attempts {
            SinkCondition::Down
        } else {
            self.condition
        };
        let reason = &failure.reason;
        let is_known = |last: &LastError| without_numbers(&last.reason).eq(without_numbers(reason));
        let is_news =
            condition != self.condition || !self.last_error.as_ref().is_some_and(is_known);
        self.condition = condition;
        let (source, is_retryable) = (failure.source.clone(), failure.is_retryable);
        self.last_error = Some(LastError { reason: reason.clone(), source, is_retryable });
        let first = config.retry_delay;
        let pause = match failure {
            Failure { is_retryable: true, .. } => pause(first, self.failures_in_a_row),
            Failure { is_of_batch: false, .. } => pause_for_help(first, 0),
            _ => {
                self.refusals_in_a_row = self.refusals_in_a_row.saturating_add(1);
                pause_for_help(first, self.refusals_in_a_row)
            }
        };
        (pause, is_news)
    }

    fn lag(&self, durable: BatchNumber) -> u64 {
        let confirmed = self.confirmed.map_or(0, |point| point.number.0);
        durable.0.saturating_sub(confirmed)
    }

    pub(super) fn has(&self, batch: BatchNumber) -> bool {
        self.lag(batch) == 0
    }

    pub(super) fn failures(&self) -> Failures {
        Failures { all: self.failures, refusals: self.refusals }
    }

    pub(super) fn last_error(&self) -> Option<&LastError> {
        self.last_error.as_ref()
    }

    /// What callers are told about the sink at `now`, by uptime. A call that hangs is reported,
    /// since nothing fails while it does.
    pub(super) fn status(
        &mut self,
        sink: &str,
        is_attached: bool,
        durable: BatchNumber,
        now: Duration,
    ) -> SinkStatus {
        self.note(durable, now);
        let position = |point: ChainPoint| Position { batch: point.number.0, check: point.check };
        let lag_batches = self.lag(durable);
        let called_for = self.called_at.map(|called_at| now.saturating_sub(called_at));
        let hangs_for = called_for.filter(|&called_for| called_for > CALL_MAX);
        let (condition, last_error) = match hangs_for {
            Some(hangs_for) => {
                let reason = format!("the call has not returned for {} s", hangs_for.as_secs());
                (SinkCondition::Down, Some(reason))
            }
            None => (self.condition, self.last_error().map(|error| error.reason.clone())),
        };
        SinkStatus {
            name: sink.to_owned(),
            is_attached,
            position: self.confirmed.map(position),
            in_flight: self.in_flight.map(position),
            lag_batches,
            lag: if lag_batches > 0 { self.waited(now) } else { Duration::ZERO },
            backlog_bytes: self.backlog_bytes,
            deliveries: self.deliveries,
            rows: self.rows,
            events: self.events,
            failures: self.failures,
            failures_in_a_row: self.failures_in_a_row,
            last_error,
            condition: if is_attached { condition } else { SinkCondition::Missing },
            last_delivery: self.last_delivery,
        }
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    /// A sink that caught up in parts was once said to be as late as its last part, and one that
    /// could not be asked not to be late at all.
    #[test]
    fn the_lag_is_the_age_of_the_oldest_that_is_missing() {
        let mut state = SinkState::new("a");
        let mut progress = Progress::new(&state);
        let minutes = |minutes: u64| Duration::from_mins(minutes);
        // A batch each second, for an hour.
        (1..=3600).for_each(|n| progress.note(BatchNumber(n), Duration::from_secs(n)));
        let mut lag = |confirmed: u64, durable: u64, now: Duration| {
            let number = BatchNumber(confirmed);
            state.confirmed = (confirmed > 0).then_some(ChainPoint { number, check: 0 });
            progress.look(&state);
            progress.status("a", true, BatchNumber(durable), now).lag
        };
        for minute in [0, 1, 15, 30, 45, 59] {
            let (age, said) = (minutes(60 - minute), lag(60 * minute, 3600, minutes(60)));
            assert!(age.abs_diff(said) <= minutes(60) / LAG_STEPS, "{age:?}: {said:?}");
        }
        assert_eq!(lag(3600, 3600, minutes(61)), Duration::ZERO);
        assert_eq!(lag(3600, 3601, minutes(62)), Duration::ZERO);
        assert_eq!(lag(3600, 3602, minutes(63)), minutes(1));
        // What an hour has added is no more than what there is room for.
        assert!(progress.waiting.len() < 100, "{}", progress.waiting.len());
    }

    /// How far the journal is stands in the text, and each attempt was once logged.
    #[test]
    fn an_error_is_news_once_though_its_numbers_move() {
        let mut progress = Progress::new(&SinkState::new("billing"));
        let failure = |reason: &str, is_retryable| Failure {
            reason: reason.to_owned(),
            source: None,
            is_retryable,
            is_of_batch: false,
            is_end: false,
        };
        let cases = [
            ("it is at batch 7, not at 19", false, true),
            ("it is at batch 7, not at 20", false, false),
            ("it is at batch 7, not at 100", false, false),
            ("a table is missing", false, true),
            ("a table is missing", true, false),
            ("a table is missing", true, false),
        ];
        let config = DeliveryConfig::default().retry_attempts(100);
        for (reason, is_retryable, is_expected) in cases {
            let (_, is_news) = progress.failed(&failure(reason, is_retryable), &config);
            let last = progress.last_error().map(|error| &*error.reason);
            assert_eq!((is_news, last), (is_expected, Some(reason)));
        }
        progress.succeeded();
        assert!(progress.failed(&failure("a table is missing", true), &config).1);
    }

    /// A refused batch was once put together and sent again every 30 seconds forever.
    #[test]
    fn only_refusals_of_a_batch_are_further_and_further_apart() {
        let (mut progress, config) =
            (Progress::new(&SinkState::new("a")), DeliveryConfig::default());
        let mut pause = |is_retryable, is_of_batch| {
            let (reason, source) = (String::new(), None);
            let failure = Failure { reason, source, is_retryable, is_of_batch, is_end: false };
            progress.failed(&failure, &config).0.as_secs()
        };
        assert_eq!([(); 3].map(|()| pause(false, true)), [30, 60, 120]);
        assert_eq!([(); 3].map(|()| pause(false, false)), [30, 30, 30]);
        assert!(pause(true, true) < 30);
        assert_eq!(pause(false, true), 240);
        let (is_retryable, is_of_batch) = (false, true);
        let (reason, source) = (String::new(), None);
        let refused = Failure { reason, source, is_retryable, is_of_batch, is_end: false };
        progress.succeeded();
        assert_eq!(progress.failed(&refused, &config).0.as_secs(), 30);
        assert_eq!(progress.failed(&refused, &config).0.as_secs(), 60);
        // It had the batch all the same, and refuses the next one.
        let mut state = SinkState::new("a");
        state.confirm(ChainPoint { number: BatchNumber(1), check: 0 });
        progress.look(&state);
        assert_eq!(progress.failed(&refused, &config).0.as_secs(), 30);
    }
}
