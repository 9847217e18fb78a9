//! Rows and events for sinks, made from sums and recorded events.

use std::path::PathBuf;
use std::sync::Arc;

use crate::delivery::Host;
use crate::delivery::sums::{Pace, keep_pace};
use crate::error::{Error, Result};
use crate::fold::Sum;
use crate::ledger::Recorded;
use crate::model::{Definition, QuotaId, Timestamp, Window};
use crate::sink::{EventRow, UsageRow};

/// Makes rows; sums come quota by quota.
pub(super) struct Rows<'a> {
    host: &'a dyn Host,
    /// Where the first of what they are made of lies, for messages.
    file: PathBuf,
    current: Option<(Definition, Arc<str>)>,
}

impl<'a> Rows<'a> {
    pub(super) fn new(host: &'a dyn Host, file: PathBuf) -> Self {
        Self { host, file, current: None }
    }

    /// There may be millions: they go where there is room for all, and the sums are freed.
    pub(super) fn make(&mut self, sums: Vec<Sum>, pace: &mut Pace<'_>) -> Result<Vec<UsageRow>> {
        let mut rows = Vec::with_capacity(sums.len());
        for (made, sum) in sums.iter().enumerate() {
            keep_pace(made, pace)?;
            rows.push(self.row(sum)?);
        }
        Ok(rows)
    }

    pub(super) fn events(
        &mut self,
        events: Vec<Recorded>,
        pace: &mut Pace<'_>,
    ) -> Result<Vec<EventRow>> {
        let event = |(made, recorded): (usize, Recorded)| {
            keep_pace(made, pace)?;
            let (_, name) = self.quota(recorded.quota)?;
            let name = Arc::clone(name);
            let event = recorded.event();
            let event = event.map_err(|reason| Error::damaged(&self.file, 0, reason))?;
            Ok(EventRow { name, event })
        };
        events.into_iter().enumerate().map(event).collect()
    }

    fn row(&mut self, sum: &Sum) -> Result<UsageRow> {
        let key = sum.key;
        let (definition, name) = self.quota(key.quota)?;
        let window_start = (definition.calendar.window() != Window::Lifetime)
            .then(|| Timestamp::from_unix_millis(key.window.0));
        let (decimals, name) = (definition.decimals, Arc::clone(name));
        let window_end = definition.calendar.end_of(key.window);
        let (used, limit) = self.host.counter(key);
        Ok(UsageRow {
            user: key.user,
            quota: key.quota,
            name,
            decimals,
            window_start,
            window_end,
            added: sum.amount,
            used,
            limit,
        })
    }

    fn quota(&mut self, quota: QuotaId) -> Result<&(Definition, Arc<str>)> {
        if self.current.as_ref().is_none_or(|(definition, _)| definition.id != quota) {
            let definition = self.host.quota(quota).ok_or_else(|| {
                let reason = format!("a sum or an event of the unknown quota {quota}");
                Error::damaged(&self.file, 0, reason)
            })?;
            let name = Arc::from(definition.name.as_str());
            self.current = Some((definition, name));
        }
        self.current.as_ref().ok_or(Error::UnknownQuota(quota))
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    /// `docs/sinks.md` says how many bytes a first delivery takes for each counter.
    #[test]
    fn a_row_takes_as_many_bytes_as_is_documented() {
        assert_eq!((size_of::<UsageRow>(), size_of::<UsageRow>() + size_of::<Sum>()), (112, 160));
    }
}
