//! Why an attempt failed, and calls to sinks, which may fail in any way.

use std::error::Error as StdError;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::error::Error;
use crate::poison::said_by;
use crate::sink::SinkError;

/// Why an attempt failed.
pub(super) struct Failure {
    pub(super) reason: String,
    /// `None` for a panic.
    pub(super) source: Option<Arc<dyn StdError + Send + Sync>>,
    pub(super) is_retryable: bool,
    /// The sink was given a batch.
    pub(super) is_of_batch: bool,
    /// Nothing failed: the engine closes.
    pub(super) is_end: bool,
}

impl From<SinkError> for Failure {
    fn from(error: SinkError) -> Self {
        let (is_retryable, reason) = (error.is_retryable(), error.to_string());
        let source = Some(Arc::new(error) as _);
        Self { reason, source, is_retryable, is_of_batch: false, is_end: false }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let (is_retryable, reason) = (matches!(error, Error::Io { .. }), error.to_string());
        let is_end = matches!(error, Error::Closed);
        let source = Some(Arc::new(error) as _);
        Self { reason, source, is_retryable, is_of_batch: false, is_end }
    }
}

/// Calls a sink, which may be anybody's code.
pub(super) fn call<R>(call: impl FnOnce() -> Result<R, SinkError>) -> Result<R, Failure> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(Failure::from),
        Err(panic) => {
            let reason = format!("the sink panicked: {}", said_by(&*panic));
            let source = None;
            Err(Failure { reason, source, is_retryable: false, is_of_batch: false, is_end: false })
        }
    }
}
