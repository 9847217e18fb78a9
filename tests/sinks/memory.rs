//! The sink in memory.

use tollgate::sink::{Applied, Fault, MemoryStore, SinkError, UsageSink};

use crate::contract::{Store, holds_for};
use crate::feed::{Feed, Totals, totals};

impl Store for MemoryStore {
    fn open(&self) -> Box<dyn UsageSink> {
        Box::new(self.sink())
    }

    fn totals(&self) -> Totals {
        let rows = self.rows().into_iter();
        rows.map(|((user, name, start), row)| {
            let start = start.map_or(0, |start| start.as_unix_millis());
            ((user, name.to_string(), start), (row.used, row.limit))
        })
        .collect()
    }

    fn events(&self) -> Option<u64> {
        Some(Self::events(self).len() as u64)
    }
}

#[test]
fn the_contract_holds() {
    holds_for(MemoryStore::new);
}

#[test]
fn faults_come_in_the_order_in_which_they_were_injected() {
    let store = MemoryStore::new();
    let mut sink = store.sink();
    let mut feed = Feed::new(1, 1);
    let first = feed.next();
    store.inject(Fault::BeforeCommit);
    store.inject(Fault::AfterCommit);

    let error = sink.apply(&first).unwrap_err();
    assert!(matches!(error, SinkError::Unavailable { .. }) && error.is_retryable());
    assert_eq!(store.position(feed.engine()), None);
    assert!(store.rows().is_empty());

    let error = sink.apply(&first).unwrap_err();
    assert!(matches!(error, SinkError::OutcomeUnknown { .. }) && error.is_retryable());
    assert_eq!(store.position(feed.engine()), feed.position());

    assert_eq!(sink.apply(&first).unwrap(), Applied::Before);
    assert_eq!(Store::totals(&store), totals(&[&feed]));
}
