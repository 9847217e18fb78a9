//! That errors say what callers go by.

use super::*;
use crate::sink::SinkError;

fn io(kind: io::ErrorKind) -> Error {
    Error::io("write", "journal-1", io::Error::from(kind))
}

/// Only where it was the error itself was a full disk told from others.
#[test]
fn a_full_disk_is_found_behind_other_errors() {
    let wrapped = |kind| {
        let boxed = || Box::new(io(kind));
        let unavailable = SinkError::Unavailable {
            sink: "json-lines",
            action: "write",
            source: io::Error::from(kind).into(),
        };
        let not_delivered = |source| Error::NotDelivered {
            sink: "billing".to_owned(),
            reason: String::new(),
            source: Some(source),
            is_retryable: true,
        };
        [
            io(kind),
            Error::OutcomeUnknown { source: boxed() },
            Error::BatchCutShort { counted: 1, source: boxed() },
            Error::DurabilityLost { reason: String::new(), source: Some(boxed()) },
            not_delivered(Arc::new(unavailable)),
            not_delivered(Arc::new(io(kind))),
        ]
    };
    for error in wrapped(io::ErrorKind::StorageFull) {
        assert!(error.is_disk_full(), "{error:?}");
        let nested = Error::BatchCutShort { counted: 1, source: Box::new(error) };
        assert!(nested.is_disk_full(), "{nested:?}");
    }
    for error in wrapped(io::ErrorKind::PermissionDenied) {
        assert!(!error.is_disk_full(), "{error:?}");
    }
    assert!(!Error::Closed.is_disk_full());
}

/// To repeat what was counted would count it twice.
#[test]
fn what_passes_by_itself_and_counted_nothing_is_retryable() {
    let full = || Error::Backpressure { waited: Duration::from_secs(1) };
    let too_many = |what| Error::TooMany { what, bound: 1 };
    let not_delivered = |is_retryable| Error::NotDelivered {
        sink: "billing".to_owned(),
        reason: String::new(),
        source: None,
        is_retryable,
    };
    let retryable = [
        full(),
        Error::Locked { dir: PathBuf::from("data") },
        too_many(Resource::OpenReservations),
        too_many(Resource::WaitingChanges),
        too_many(Resource::UnsyncedBytes),
        not_delivered(true),
    ];
    for error in retryable {
        assert!(error.is_retryable(), "{error:?}");
    }
    let others = [
        Error::BatchCutShort { counted: 1, source: Box::new(full()) },
        Error::OutcomeUnknown { source: Box::new(full()) },
        io(io::ErrorKind::Interrupted),
        Error::NotLogged,
        Error::Closed,
        too_many(Resource::Quotas),
        too_many(Resource::Sinks),
        too_many(Resource::SharedCounters),
        not_delivered(false),
    ];
    for error in others {
        assert!(!error.is_retryable(), "{error:?}");
    }
}

#[test]
fn messages_say_what_to_do() {
    let said = |error: Error| error.to_string();
    assert!(said(Error::damaged("a", 1, "x")).ends_with("`tollgate verify` says more"));
    assert!(said(Error::durability_lost("x")).ends_with("open the directory again"));
    let options = [
        (Resource::OpenReservations, "(reservations_max)"),
        (Resource::UnsyncedBytes, "(unsynced_bytes_max)"),
    ];
    for (what, option) in options {
        assert!(said(Error::TooMany { what, bound: 1 }).contains(option));
    }
}

#[test]
fn what_is_told_again_keeps_the_code_of_the_operating_system() {
    let full = io::Error::from_raw_os_error(Errno::NOSPC.raw_os_error());
    let error = Error::io("write", "journal-1", full);
    let again = error.again();
    assert_eq!(again.to_string(), error.to_string());
    let Error::Io { source, .. } = again else { panic!("{again:?}") };
    assert_eq!(source.raw_os_error(), Some(Errno::NOSPC.raw_os_error()));
}
