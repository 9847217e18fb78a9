//! The keys, and a batch as the script's arguments.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use super::super::{SinkError, UsageBatch, UsageRow};
use super::KIND;
use crate::model::{EngineId, Timestamp};

/// What all keys begin with. Its braces keep them in one slot of a cluster.
#[derive(Debug, Clone)]
pub(super) struct Keys {
    prefix: String,
}

/// The rows of one window of a quota.
#[derive(Debug)]
pub(super) struct WindowRows {
    pub(super) quota: Arc<str>,
    pub(super) usage_key: String,
    pub(super) meaning_key: String,
    pub(super) limits_key: String,
    pub(super) decimals: u8,
    /// In milliseconds since 1970; empty when it never ends.
    pub(super) end: String,
    /// Likewise.
    pub(super) expires: String,
    /// "user added limit" for each row, one after the other.
    pub(super) rows: String,
}

impl Keys {
    pub(super) fn new(prefix: &str) -> Self {
        Self { prefix: format!("{{{prefix}}}") }
    }

    pub(super) fn position(&self, engine: EngineId) -> String {
        format!("{}:position:{engine}", self.prefix)
    }

    fn usage(&self, quota: &str, start: Timestamp) -> String {
        format!("{}:usage:{quota}:{}", self.prefix, start.as_unix_millis())
    }

    fn meaning(&self, quota: &str, start: Timestamp) -> String {
        format!("{}:window:{quota}:{}", self.prefix, start.as_unix_millis())
    }

    fn limits(&self, quota: &str) -> String {
        format!("{}:limits:{quota}", self.prefix)
    }

    /// The rows of a batch by quota and window. Windows expire `retention` after their end.
    pub(super) fn windows(
        &self,
        batch: &UsageBatch,
        retention: Option<Duration>,
    ) -> Result<Vec<WindowRows>, SinkError> {
        let mut windows = BTreeMap::new();
        for row in batch.rows() {
            let window = windows
                .entry((&row.name, row.stored_start()))
                .or_insert_with(|| self.window(row, retention));
            let end = millis(row.window_end);
            if (window.decimals, &window.end) != (row.decimals, &end) {
                return Err(SinkError::other_meaning(KIND, &row.name));
            }
            // Writing to a string does not fail.
            let _ = write!(window.rows, "{} {} {} ", row.user, row.added, row.limit);
        }
        Ok(windows.into_values().collect())
    }

    fn window(&self, row: &UsageRow, retention: Option<Duration>) -> WindowRows {
        let (name, start) = (&*row.name, row.stored_start());
        let expires = row.window_end.zip(retention).map(|(end, it)| end.saturating_add(it));
        WindowRows {
            quota: Arc::clone(&row.name),
            usage_key: self.usage(name, start),
            meaning_key: self.meaning(name, start),
            limits_key: self.limits(name),
            decimals: row.decimals,
            end: millis(row.window_end),
            expires: millis(expires),
            rows: String::new(),
        }
    }
}

fn millis(time: Option<Timestamp>) -> String {
    time.map_or_else(String::new, |time| time.as_unix_millis().to_string())
}
