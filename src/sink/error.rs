//! Why a delivery failed, and whether to try again.

use std::error::Error as StdError;
use std::fmt;
use std::path::PathBuf;

use super::Position;
use crate::model::EngineId;

/// Why a sink did not answer, or did not apply a batch.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SinkError {
    /// The sink can't be reached, or failed. Nothing of the batch was applied.
    #[error("{sink}: can't {action}: {}", chain(source.as_ref()))]
    #[non_exhaustive]
    Unavailable {
        /// The sink, by kind.
        sink: &'static str,
        /// What was being done, as a verb.
        action: &'static str,
        /// What the sink, or the connection to it, reported.
        source: Box<dyn StdError + Send + Sync>,
    },

    /// The connection to the sink was lost during the commit: the batch is applied as a whole or
    /// not at all. The stored position tells which.
    #[error(
        "{sink}: lost during the commit, the batch may or may not be applied: {}",
        chain(source.as_ref())
    )]
    #[non_exhaustive]
    OutcomeUnknown {
        /// The sink, by kind.
        sink: &'static str,
        /// What the connection to the sink reported.
        source: Box<dyn StdError + Send + Sync>,
    },

    /// The stored position is neither the start nor the end of the batch, so that applying it would
    /// lose usage or count it twice. Nothing was applied.
    #[error("{}", disagreement(*.engine, *.stored, *.from, *.to))]
    #[non_exhaustive]
    Disagrees {
        /// The engine that the batch comes from.
        engine: EngineId,
        /// What the sink has stored for the engine.
        stored: Option<Position>,
        /// Where the batch starts; `None` for a first batch.
        from: Option<Position>,
        /// Where the batch ends.
        to: Position,
    },

    /// The sink's tables are missing, or are not those that this library expects.
    #[error("{sink}: {reason}; {remedy}")]
    Schema {
        /// The sink, by kind.
        sink: &'static str,
        /// What was found.
        reason: String,
        /// What to do about it.
        remedy: String,
        /// What the sink said, where it said anything.
        source: Option<Box<dyn StdError + Send + Sync>>,
    },

    /// The batch holds something that the sink can't store. Nothing was applied.
    #[error("{sink}: the batch can't be stored: {reason}")]
    BadData {
        /// The sink, by kind.
        sink: &'static str,
        /// What can't be stored, and why.
        reason: String,
        /// What the sink said, where it said anything.
        source: Option<Box<dyn StdError + Send + Sync>>,
    },

    /// The sink can't be used as it is configured.
    #[error("{sink}: {}", chain(source.as_ref()))]
    #[non_exhaustive]
    Misconfigured {
        /// The sink, by kind.
        sink: &'static str,
        /// What is wrong with its settings.
        source: Box<dyn StdError + Send + Sync>,
    },

    /// A file of the sink holds something that a crash can't have left there.
    #[error("{} is damaged at byte {offset}: {reason}", path.display())]
    #[non_exhaustive]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where the damage was noticed.
        offset: u64,
        /// What was found.
        reason: String,
    },
}

impl SinkError {
    /// Whether the same call may succeed later without anybody's help.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Unavailable { .. } | Self::OutcomeUnknown { .. })
    }

    /// [`Unavailable`](Self::Unavailable), for sinks of your own: what was being done, as a verb,
    /// and what came of it.
    #[must_use]
    pub fn unavailable(
        sink: &'static str,
        action: &'static str,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Self {
        Self::Unavailable { sink, action, source: source.into() }
    }

    /// [`OutcomeUnknown`](Self::OutcomeUnknown), for sinks of your own.
    #[must_use]
    pub fn outcome_unknown(
        sink: &'static str,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Self {
        Self::OutcomeUnknown { sink, source: source.into() }
    }

    /// [`Misconfigured`](Self::Misconfigured), for sinks of your own.
    #[must_use]
    pub fn misconfigured(
        sink: &'static str,
        source: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Self {
        Self::Misconfigured { sink, source: source.into() }
    }

    /// [`BadData`](Self::BadData), for sinks of your own.
    #[must_use]
    pub fn bad_data(sink: &'static str, reason: impl Into<String>) -> Self {
        Self::BadData { sink, reason: reason.into(), source: None }
    }

    /// Another engine has stored rows under the same name that can't be added to.
    pub(super) fn other_meaning(sink: &'static str, quota: &str) -> Self {
        let reason = format!(
            "quota {quota:?} is stored with other decimals or another window, by an engine that \
             defines it differently; give one of the two another name"
        );
        Self::bad_data(sink, reason)
    }
}

/// An error with its causes, which database clients report separately.
fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

fn disagreement(
    engine: EngineId,
    stored: Option<Position>,
    from: Option<Position>,
    to: Position,
) -> String {
    let verdict = match (stored, from) {
        (None, _) => "it was emptied, or is another one",
        (Some(_), None) => "it was fed before, from a history that is not known here",
        (Some(stored), _) if stored.batch > to.batch => {
            "it is ahead: the data directory was set back, or has a copy that delivers too"
        }
        (Some(stored), Some(from)) if stored.batch < from.batch => {
            "it is behind: it lost what it had confirmed"
        }
        (Some(stored), Some(from)) if stored.batch == from.batch || stored.batch == to.batch => {
            "it was fed from another history"
        }
        _ => "it stands in the middle of the batch",
    };
    format!(
        "the sink disagrees about engine {engine}: it is at {}, the batch goes from {} to {to}; {verdict}",
        Shown(stored),
        Shown(from),
    )
}

struct Shown(Option<Position>);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(position) => position.fmt(f),
            None => f.write_str("no position"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(stored: Option<(u64, u32)>, from: Option<(u64, u32)>) -> String {
        let at = |(batch, check)| Position { batch, check };
        let engine = EngineId::from_u128(0xab);
        let to = Position { batch: 20, check: 2 };
        let error = SinkError::Disagrees { engine, stored: stored.map(at), from: from.map(at), to };
        assert!(!error.is_retryable());
        error.to_string()
    }

    #[test]
    fn a_disagreement_names_both_sides_and_says_what_it_looks_like() {
        let from = Some((10, 1));
        assert_eq!(
            text(Some((21, 0xff)), from),
            "the sink disagrees about engine 000000000000000000000000000000ab: it is at batch 21 \
             (check 000000ff), the batch goes from batch 10 (check 00000001) to batch 20 (check \
             00000002); it is ahead: the data directory was set back, or has a copy that delivers \
             too"
        );
        assert!(text(Some((9, 1)), from).contains("it is behind"));
        assert!(text(Some((10, 7)), from).contains("another history"));
        assert!(text(Some((20, 7)), from).contains("another history"));
        assert!(text(Some((15, 7)), from).contains("in the middle"));
        assert!(text(None, from).contains("it is at no position"));
        assert!(text(Some((15, 7)), None).contains("fed before"));
    }
}
