//! Whether the machine did something else meanwhile.

use std::thread;
use std::time::{Duration, Instant};

use super::proc::Processors;

/// The part of the processors that others may use without spoiling the numbers.
pub(crate) const QUIET: f64 = 0.05;
/// How long the machine is looked at, to see whether it is quiet.
const LOOK: Duration = Duration::from_millis(250);

/// Measures again what was disturbed, as long as the patience lasts. Without patience everything is
/// measured once; the report says how busy others were in either case.
#[derive(Debug)]
pub(crate) struct Quiet {
    patience_ends: Instant,
    before: Processors,
}

impl Quiet {
    pub(crate) fn new(patience: Duration) -> Self {
        Self { patience_ends: Instant::now() + patience, before: Processors::now() }
    }

    /// Waits until others are quiet. To be called before a repetition.
    pub(crate) fn begin(&mut self) {
        loop {
            self.before = Processors::now();
            if self.is_over() {
                return;
            }
            thread::sleep(LOOK);
            if self.others_were_quiet() {
                self.before = Processors::now();
                return;
            }
        }
    }

    /// Whether what was measured since `begin` counts.
    pub(crate) fn accepts(&self) -> bool {
        self.is_over() || self.others_were_quiet()
    }

    /// Measures until it counts.
    pub(crate) fn run<T>(&mut self, mut measure: impl FnMut() -> T) -> T {
        loop {
            self.begin();
            let measured = measure();
            if self.accepts() {
                return measured;
            }
        }
    }

    fn is_over(&self) -> bool {
        Instant::now() >= self.patience_ends
    }

    fn others_were_quiet(&self) -> bool {
        Processors::now().used_by_others(self.before) <= QUIET
    }
}
