//! Directories that earlier versions wrote are read as they always were.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tollgate::sink::{MemoryStore, Position, UsageBatch, UsageRow, UsageSink as _};
use tollgate::{AMOUNT_MAX, ManualClock, QuotaId, Reserved, Timestamp, Tollgate, Verdict, Window};

use crate::support::small;

/// The golden directories of all versions: folder, and what is expected.
fn golden() -> Vec<(std::path::PathBuf, Value)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut found = Vec::new();
    for version in std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()) {
        if !version.is_dir() {
            continue;
        }
        for path in std::fs::read_dir(version).unwrap().map(|entry| entry.unwrap().path()) {
            if path.extension().is_some_and(|extension| extension == "json") {
                let expected = std::fs::read_to_string(&path).unwrap();
                found.push((path.with_extension(""), serde_json::from_str(&expected).unwrap()));
            }
        }
    }
    assert!(found.len() >= 18, "{}", found.len());
    found
}

fn copied(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for file in std::fs::read_dir(from).unwrap().map(|entry| entry.unwrap()) {
        std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
    }
}

fn open_at(dir: &Path, millis: u64) -> Tollgate {
    let clock = ManualClock::new(Timestamp::from_unix_millis(millis));
    Tollgate::open(dir, small().clock(Arc::new(clock))).unwrap()
}

fn check(gate: &Tollgate, expected: &Value, context: &str) {
    let ids = gate.quotas();
    let quotas = expected["quotas"].as_array().unwrap();
    assert_eq!(ids.len(), quotas.len(), "{context}");
    for (&id, expected) in ids.iter().zip(quotas) {
        let quota = gate.quota(id).unwrap();
        assert_eq!(quota.name(), expected["name"], "{context}");
        assert_eq!(quota.limit(), expected["limit"], "{context}");
        assert_eq!(format!("{:?}", quota.counting_window()), expected["window"], "{context}");
        assert_eq!(quota.offset_minutes(), expected["utc_offset_minutes"], "{context}");
        assert_eq!(quota.decimal_places(), expected["decimals"], "{context}");
    }
    for counter in expected["counters"].as_array().unwrap() {
        let id = ids[usize::try_from(counter["quota"].as_u64().unwrap()).unwrap()];
        let usage = gate.usage(counter["user"].as_u64().unwrap(), id).unwrap();
        assert_eq!(usage.used, counter["used"], "{context}: {counter}");
        assert_eq!(usage.limit, counter["limit"], "{context}: {counter}");
        let user = counter["user"].as_u64().unwrap();
        let reserved: u64 =
            reserved(expected).filter(|item| item.0 == user).map(|item| item.1).sum();
        assert_eq!(usage.reserved, reserved, "{context}: {counter}");
    }
    for request in list(expected, "requests") {
        let id = request["id"].as_str().unwrap().parse().unwrap();
        let [user, amount] = ["user", "amount"].map(|of| request["asked"][of].as_u64().unwrap());
        let quota = ids[usize::try_from(request["asked"]["quota"].as_u64().unwrap_or(0)).unwrap()];
        let is_allowed = match request.get("how").and_then(Value::as_str) {
            Some("consume") => gate.consume_once(id, user, quota, amount).is_ok(),
            Some("reserve") => match gate.reserve_once(id, user, quota, amount, HOUR).unwrap() {
                // It is open already, under the id that it had.
                Reserved::Open(reservation) => {
                    let known = list(expected, "reservations");
                    let known = known.filter_map(|known| known["id"].as_str());
                    let id = reservation.detach().to_string();
                    assert!(known.into_iter().any(|known| known == id), "{context}: {request}");
                    true
                }
                Reserved::Denied(_) => false,
            },
            _ => gate.try_consume_once(id, user, quota, amount).unwrap().is_allowed(),
        };
        assert_eq!(is_allowed, request["admitted"], "{context}: {request}");
    }
}

const HOUR: Duration = Duration::from_secs(3_600);

/// Files of version 1 have none.
fn list<'a>(expected: &'a Value, name: &str) -> impl Iterator<Item = &'a Value> {
    expected.get(name).and_then(Value::as_array).into_iter().flatten()
}

/// User and amount.
fn reserved(expected: &Value) -> impl Iterator<Item = (u64, u64)> {
    let items = list(expected, "reservations").flat_map(|reservation| list(reservation, "items"));
    items.map(|item| (item["user"].as_u64().unwrap(), item["amount"].as_u64().unwrap()))
}

#[test]
fn golden_directories_hold_what_they_always_did() {
    for (from, expected) in golden() {
        let context = from.display().to_string();
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("data");
        copied(&from, &dir);
        let verification = tollgate::verify(&dir).unwrap();
        assert!(matches!(verification.verdict, Verdict::Sound), "{context}: {verification:?}");

        let now = expected["now_ms"].as_u64().unwrap();
        for round in ["first", "second", "with a snapshot"] {
            let context = format!("{context}, {round} open");
            let gate = open_at(&dir, now);
            let report = gate.recovery_report();
            assert!(report.findings.is_empty() && report.corrected == 0, "{context}: {report:?}");
            assert!(report.machine_restarted || round != "first", "{context}");
            check(&gate, &expected, &context);
            if round == "second" {
                gate.snapshot().unwrap();
            }
            gate.close().unwrap();
        }
        let gate = open_at(&dir, now);
        for reservation in list(&expected, "reservations") {
            let id = reservation["id"].as_str().unwrap().parse().unwrap();
            assert!(gate.commit_reservation(id, 1).unwrap().is_allowed(), "{context}");
        }
        assert_eq!(gate.stats().reservations, 0, "{context}");

        let salvaged = root.path().join("salvaged");
        let salvage = tollgate::salvage(&from, &salvaged).unwrap();
        assert!(salvage.damage.is_empty(), "{context}: {salvage:?}");
        // What no sink has got is left behind.
        let has_events = list(&expected, "events").next().is_some();
        assert_eq!(salvage.losses.is_empty(), !has_events, "{context}: {salvage:?}");
        check(&open_at(&salvaged, now), &expected, &format!("{context}, salvaged"));
    }
}

/// What the sinks of a golden directory are at, and what a new one and one that was emptied get.
#[test]
fn golden_sinks_are_where_they_always_were() {
    let v1 = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1");
    let expected = std::fs::read_to_string(v1.join("sinks.json")).unwrap();
    let expected: Value = serde_json::from_str(&expected).unwrap();
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("data");
    copied(&v1.join("sinks"), &dir);
    let sinks = tollgate::inspect(&dir).unwrap().sinks;
    let found = sinks.iter().map(|sink| {
        let batch = |at: Option<Position>| at.map_or(0, |at| at.batch);
        (&*sink.name, batch(sink.position), batch(sink.in_flight), sink.backlog.len())
    });
    let found: Vec<_> = found.collect();
    assert_eq!(found, SINKS);

    let clock = ManualClock::new(Timestamp::from_unix_millis(expected["now_ms"].as_u64().unwrap()));
    let stores = ["billing", "emptied", "late", "new"].map(|name| (name, MemoryStore::new()));
    // As `billing` was when it last confirmed: what follows is in its backlog.
    let inspected = sinks.iter().find(|sink| sink.name == "billing").unwrap();
    let engine = tollgate::inspect(&dir).unwrap().engine_id;
    let rows = vec![golden_row("requests", None, 10), golden_row("minute", Some(MINUTE), 5)];
    let at = inspected.position.unwrap();
    let batch = UsageBatch::new(engine, None, at, rows, Vec::new());
    stores[0].1.sink().apply(&batch).unwrap();
    let mut builder = Tollgate::builder(&dir).config(small().clock(Arc::new(clock)));
    for (name, store) in &stores {
        // The name under which it was attached, if it was.
        let name = if *name == "emptied" { "archive" } else { name };
        builder = builder.sink(name, store.sink());
    }
    let gate = builder.open().unwrap();
    gate.deliver(Duration::from_secs(60)).unwrap();
    let ids = gate.quotas();
    for counter in expected["counters"].as_array().unwrap() {
        let id = ids[usize::try_from(counter["quota"].as_u64().unwrap()).unwrap()];
        let user = counter["user"].as_u64().unwrap();
        let start = gate.usage(user, id).unwrap().window_start;
        let name = gate.quota(id).unwrap().name().to_owned();
        for (sink, store) in &stores {
            let used = store.used(user, &name, start);
            assert_eq!(used, i128::from(counter["used"].as_u64().unwrap()), "{sink}: {counter}");
        }
    }
}

/// The sink that was down gets what was recorded, in order, each event once.
#[test]
fn golden_events_are_delivered() {
    let mut delivered = 0;
    for (from, expected) in golden() {
        let events: Vec<_> = list(&expected, "events").collect();
        if events.is_empty() {
            continue;
        }
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("data");
        copied(&from, &dir);
        let (store, now) = (MemoryStore::new(), expected["now_ms"].as_u64().unwrap());
        for _ in 0..2 {
            let clock = ManualClock::new(Timestamp::from_unix_millis(now));
            let builder = Tollgate::builder(&dir).config(small().clock(Arc::new(clock)));
            let gate = builder.sink("billing", store.sink()).open().unwrap();
            gate.deliver(Duration::from_secs(60)).unwrap();
            gate.close().unwrap();
        }
        let rows = store.events();
        assert_eq!(rows.len(), events.len(), "{}", from.display());
        for (row, expected) in rows.iter().zip(&events) {
            assert_eq!(row.event.user, expected["user"]);
            assert_eq!(row.event.value, expected["value"]);
            assert_eq!(row.event.timestamp.as_unix_millis(), expected["timestamp_ms"]);
            let request_id = row.event.request_id.map(|id| id.to_string());
            assert_eq!(request_id.as_deref(), expected["request_id"].as_str());
            assert_eq!(row.event.metadata["n"], "ü");
            delivered += 1;
        }
        for counter in expected["counters"].as_array().unwrap() {
            let used = store.used(counter["user"].as_u64().unwrap(), "tokens", None);
            assert_eq!(used, i128::from(counter["used"].as_u64().unwrap()), "{counter}");
        }
    }
    assert!(delivered >= 14, "{delivered}");
}

/// 2026-01-01, the minute in which the golden directories were made.
const MINUTE: u64 = 1_767_225_600_000;

fn golden_row(name: &str, window: Option<u64>, added: i128) -> UsageRow {
    let quota = QuotaId::from_u16(u16::from(window.is_some()));
    let mut row = UsageRow::new(1, quota, name, added, 1_000);
    row.window_start = window.map(Timestamp::from_unix_millis);
    row.window_end = window.map(|start| Timestamp::from_unix_millis(start + 60_000));
    row
}

/// Name, position, end in flight, parts of the backlog.
const SINKS: [(&str, u64, u64, usize); 4] =
    [("archive", 5, 0, 1), ("billing", 5, 7, 2), ("copy", 7, 0, 1), ("late", 0, 7, 2)];

#[test]
fn years_later_only_lifetimes_are_left() {
    for (from, expected) in golden() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("data");
        copied(&from, &dir);
        let ten_years = u64::try_from(Duration::from_hours(24 * 3653).as_millis()).unwrap();
        let gate = open_at(&dir, expected["now_ms"].as_u64().unwrap() + ten_years);
        // Before a denial, what is over is given back.
        assert!(gate.check(1, gate.quotas()[0], AMOUNT_MAX).unwrap().is_denied());
        for counter in expected["counters"].as_array().unwrap() {
            let id = gate.quotas()[usize::try_from(counter["quota"].as_u64().unwrap()).unwrap()];
            let is_lifetime = gate.quota(id).unwrap().counting_window() == Window::Lifetime;
            let user = counter["user"].as_u64().unwrap();
            let given_back: u64 =
                reserved(&expected).filter(|item| item.0 == user).map(|item| item.1).sum();
            let left = if is_lifetime { counter["used"].as_u64().unwrap() - given_back } else { 0 };
            let used = gate.usage(user, id).unwrap().used;
            assert_eq!(used, left, "{}: {counter}", from.display());
        }
    }
}
