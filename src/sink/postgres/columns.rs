//! Rows and events as columns: a statement takes each as one array.

use std::time::SystemTime;

use postgres::types::{ToSql, Type};

use super::super::json::{JsonObject, without_nul};
use super::super::{EventRow, UsageRow};

/// A parameter with its type, so that statements need no preparation.
pub(super) type Parameter<'a> = (&'a (dyn ToSql + Sync), Type);

/// Rows of a batch.
#[derive(Debug, Default)]
pub(super) struct UsageColumns<'a> {
    users: Vec<String>,
    quotas: Vec<&'a str>,
    starts: Vec<SystemTime>,
    ends: Vec<Option<SystemTime>>,
    decimals: Vec<i16>,
    added: Vec<String>,
    limits: Vec<String>,
}

impl<'a> UsageColumns<'a> {
    pub(super) fn new(rows: &'a [UsageRow]) -> Self {
        let mut columns = Self::default();
        for row in rows {
            columns.users.push(row.user.to_string());
            columns.quotas.push(&row.name);
            columns.starts.push(row.stored_start().into());
            columns.ends.push(row.window_end.map(SystemTime::from));
            columns.decimals.push(i16::from(row.decimals));
            columns.added.push(row.added.to_string());
            columns.limits.push(row.limit.to_string());
        }
        columns
    }

    pub(super) fn parameters(&self) -> [Parameter<'_>; 7] {
        [
            (&self.users, Type::TEXT_ARRAY),
            (&self.quotas, Type::TEXT_ARRAY),
            (&self.starts, Type::TIMESTAMPTZ_ARRAY),
            (&self.ends, Type::TIMESTAMPTZ_ARRAY),
            (&self.decimals, Type::INT2_ARRAY),
            (&self.added, Type::TEXT_ARRAY),
            (&self.limits, Type::TEXT_ARRAY),
        ]
    }
}

/// Events of a batch.
#[derive(Debug, Default)]
pub(super) struct EventColumns<'a> {
    users: Vec<String>,
    quotas: Vec<&'a str>,
    values: Vec<f64>,
    times: Vec<SystemTime>,
    request_ids: Vec<Option<String>>,
    metadata: Vec<String>,
}

impl<'a> EventColumns<'a> {
    /// PostgreSQL's text can't hold a NUL, so it is replaced, lest an event stop all deliveries.
    pub(super) fn new(events: &'a [EventRow]) -> Self {
        let mut columns = Self::default();
        for EventRow { name, event } in events {
            let metadata = event.metadata.iter();
            let metadata =
                metadata.map(|(name, value)| (without_nul(name), without_nul(value))).collect();
            columns.users.push(event.user.to_string());
            columns.quotas.push(name);
            columns.values.push(event.value);
            columns.times.push(event.timestamp.into());
            columns.request_ids.push(event.request_id.map(|id| format!("{id:032x}")));
            columns.metadata.push(JsonObject(&metadata).to_string());
        }
        columns
    }

    pub(super) fn parameters(&self) -> [Parameter<'_>; 6] {
        [
            (&self.users, Type::TEXT_ARRAY),
            (&self.quotas, Type::TEXT_ARRAY),
            (&self.values, Type::FLOAT8_ARRAY),
            (&self.times, Type::TIMESTAMPTZ_ARRAY),
            (&self.request_ids, Type::TEXT_ARRAY),
            (&self.metadata, Type::TEXT_ARRAY),
        ]
    }
}
