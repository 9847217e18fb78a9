//! What the database's errors mean for a delivery.

use postgres::error::SqlState;

use super::super::SinkError;

pub(super) const KIND: &str = "PostgreSQL";

/// Anything that fails before the commit: the transaction is rolled back, or will be.
pub(super) fn failed(action: &'static str) -> impl FnOnce(postgres::Error) -> SinkError {
    move |error| {
        let Some(server) = error.as_db_error() else {
            return SinkError::unavailable(KIND, action, error);
        };
        let reason = server.message().to_owned();
        // The first two characters of a code are its class.
        match (server.code(), server.code().code().get(..2)) {
            (&SqlState::INSUFFICIENT_PRIVILEGE, _) => {
                let remedy = "grant the sink's user what docs/sinks.md lists";
                schema(reason, remedy, Some(error))
            }
            (_, Some("3D")) => {
                schema(reason, "create the database, or name another one", Some(error))
            }
            // Syntax errors and missing tables and schemas.
            (_, Some("42" | "3F")) => schema(reason, MIGRATE, Some(error)),
            // Data exceptions and violated constraints.
            (_, Some("22" | "23")) => {
                SinkError::BadData { sink: KIND, reason, source: Some(Box::new(error)) }
            }
            _ => SinkError::unavailable(KIND, action, error),
        }
    }
}

/// A commit that failed. Unless a deferred constraint failed it, only the position tells whether it
/// took effect.
pub(super) fn failed_commit(error: postgres::Error) -> SinkError {
    if error.code().is_some_and(|code| code.code().starts_with("23")) {
        return failed("commit")(error);
    }
    SinkError::OutcomeUnknown { sink: KIND, source: Box::new(error) }
}

const MIGRATE: &str = "create or migrate the tables with PostgresSink::migrate";

/// Tables that are not there, or not what they should be.
pub(super) fn schema(
    reason: impl Into<String>,
    remedy: impl Into<String>,
    error: Option<postgres::Error>,
) -> SinkError {
    SinkError::Schema {
        sink: KIND,
        reason: reason.into(),
        remedy: remedy.into(),
        source: error.map(Into::into),
    }
}
