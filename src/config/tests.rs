//! That bounds are enforced where they are said to be, and that the documents say what the code
//! does.

use super::*;
use crate::wal::record::SLOT_BYTES;

const DOCUMENT: &str = include_str!("../../docs/configuration.md");

fn refused(config: &Config) -> (String, String, String) {
    match config.validate() {
        Err(Error::InvalidConfig { field, value, allowed }) => (field, value, allowed),
        other => panic!("{config:?}: {other:?}"),
    }
}

#[test]
fn presets_are_valid() {
    for preset in presets() {
        preset.validate().unwrap();
    }
}

#[test]
fn errors_name_field_value_and_bounds() {
    let text = |field: &str, value: &str, allowed: &str| {
        (field.to_owned(), value.to_owned(), allowed.to_owned())
    };
    let config = Config::default().sync_interval(Duration::from_secs(61));
    assert_eq!(refused(&config), text("sync_interval", "61s", "1ms..=1m"));
    let config = Config::default().sync_interval(Duration::MAX);
    assert_eq!(refused(&config).0, "sync_interval");
    let config = Config::default().shards(1000);
    assert_eq!(refused(&config), text("shards", "1000", "a power of two, 2..=65536"));
    let config = Config::default().journal_file_bytes(0);
    assert_eq!(refused(&config), text("journal_file_bytes", "0", "64KiB..=1GiB"));
    let config = Config::default().delivery(|it| it.worker_count(65));
    assert_eq!(refused(&config), text("delivery.worker_count", "65", "1..=64"));
}

/// One setting took those of the preset away, which a file keeps.
#[test]
fn what_is_set_of_deliveries_leaves_the_rest_to_the_preset() {
    let preset = Config::high_reliability().delivery;
    let often = Duration::from_millis(20);
    let config = Config::high_reliability()
        .delivery(|it| it.flush_interval(often))
        .delivery(|it| it.batch_size(5));
    assert_eq!(config.delivery, preset.flush_interval(often).batch_size(5));
    assert_eq!(config.delivery.retry_attempts, 10);
}

/// Setting one option to a bad value must make that option's check fail: each setter reaches its
/// own field, and each field its own bounds.
#[test]
fn each_setter_reaches_its_own_check() {
    let far = Duration::MAX;
    let bad: Vec<(&str, Config)> = vec![
        ("lanes", Config::default().lanes(0)),
        ("lane_records", Config::default().lane_records(65)),
        ("sync_interval", Config::default().sync_interval(far)),
        ("drain_interval", Config::default().drain_interval(far)),
        ("clock_tick", Config::default().clock_tick(far)),
        ("journal_file_bytes", Config::default().journal_file_bytes(1)),
        ("snapshot_journal_bytes", Config::default().snapshot_journal_bytes(1)),
        ("snapshot_journal_percent", Config::default().snapshot_journal_percent(9)),
        ("unsynced_bytes_max", Config::default().unsynced_bytes_max(1)),
        ("backpressure_deadline", Config::default().backpressure_deadline(far)),
        ("closed_window_retention", Config::default().closed_window_retention(far)),
        ("counters_expected", Config::default().counters_expected(usize::MAX)),
        ("shards", Config::default().shards(1)),
        ("backlog_degraded_percent", Config::default().backlog_degraded_percent(101)),
        ("clock_jump_max", Config::default().clock_jump_max(Duration::ZERO)),
        ("reservations_max", Config::default().reservations_max(0)),
        ("dedup_window", Config::default().dedup_window(Duration::ZERO)),
        ("dedup_max", Config::default().dedup_max(0)),
        ("delivery.worker_count", Config::default().delivery(|it| it.worker_count(0))),
        ("delivery.batch_size", Config::default().delivery(|it| it.batch_size(0))),
        ("delivery.flush_interval", Config::default().delivery(|it| it.flush_interval(far))),
        ("delivery.retry_attempts", Config::default().delivery(|it| it.retry_attempts(101))),
        ("delivery.retry_delay", Config::default().delivery(|it| it.retry_delay(far))),
    ];
    assert_eq!(bad.len(), Config::default().checks().len());
    for (field, config) in &bad {
        let failed: Vec<_> =
            config.checks().iter().filter(|c| !c.is_allowed).map(|c| c.field).collect();
        assert_eq!(failed, [*field]);
    }
}

#[test]
fn bounds_themselves_are_allowed() {
    Config::default()
        .lanes(1)
        .lane_records(64)
        .backpressure_deadline(Duration::ZERO)
        .validate()
        .unwrap();
    let config = Config::default()
        .lanes(1024)
        .lane_records(1 << 26)
        .sync_interval(Duration::from_secs(60))
        .unsynced_bytes_max(4 << 30)
        .shards(65_536);
    config.validate().unwrap();
}

fn presets() -> [Config; 4] {
    [
        Config::default(),
        Config::high_concurrency(),
        Config::low_latency(),
        Config::high_reliability(),
    ]
}

/// The cells of the table under a heading of the document, without its head and without backticks.
fn table(heading: &str) -> Vec<Vec<String>> {
    table_below(&format!("\n## {heading}\n"))
}

fn table_below(text: &str) -> Vec<Vec<String>> {
    let (_, section) = DOCUMENT.split_once(text).unwrap();
    let rows = section.lines().skip_while(|line| !line.starts_with('|'));
    rows.take_while(|line| line.starts_with('|'))
        .skip(2)
        .map(|row| {
            let cells = row.trim_matches('|').split('|');
            cells.map(|cell| cell.trim().replace('`', "")).collect()
        })
        .collect()
}

/// What the document says where the code says a number that depends on the machine.
fn documented_value(config: &Config, check: &Check) -> String {
    let lanes = config.lanes;
    match check.field {
        "lanes" if lanes == (2 * parallelism()).clamp(4, 64) => "2 a processor, 4 to 64".into(),
        "lanes" if lanes == (4 * parallelism()).clamp(16, 256) => "4 a processor, 16 to 256".into(),
        _ => check.value.clone(),
    }
}

#[test]
fn the_document_lists_every_option_with_its_default_and_bounds() {
    let config = Config::default();
    let mut expected: Vec<[String; 3]> = config
        .checks()
        .iter()
        .map(|c| [c.field.to_owned(), documented_value(&config, c), c.allowed.clone()])
        .collect();
    let others = [
        ["backpressure", "reject", "reject, admit_unlogged"],
        ["durable_consumes", "false", "true, false"],
    ];
    expected.extend(others.map(|row| row.map(str::to_owned)));
    let mut found = Vec::new();
    for row in table("Options") {
        let [option, default, allowed, purpose] = &row[..] else { panic!("{row:?}") };
        assert!(!purpose.is_empty(), "{option} has no purpose");
        found.push([option.clone(), default.clone(), allowed.clone()]);
    }
    expected.sort();
    found.sort();
    assert_eq!(found, expected);
    assert_eq!((config.backpressure, config.durable_consumes), (Backpressure::Reject, false));
}

#[test]
fn the_document_lists_what_each_preset_changes() {
    let presets = presets();
    let checks: Vec<Vec<Check>> = presets.iter().map(Config::checks).collect();
    let mut expected = Vec::new();
    for (at, default) in checks[0].iter().enumerate() {
        let values: Vec<_> =
            presets.iter().zip(&checks).map(|(p, c)| documented_value(p, &c[at])).collect();
        if values.iter().any(|value| *value != values[0]) {
            expected.push([vec![default.field.to_owned()], values].concat());
        }
    }
    assert_eq!(table("Presets"), expected);
    for preset in &presets {
        assert_eq!((preset.backpressure, preset.durable_consumes), (Backpressure::Reject, false));
    }
}

/// A preset that fills a small disk would otherwise be found out there.
#[test]
fn the_document_says_what_the_rings_take_up() {
    let rows = table_below("What the rings take up on disk, from the open on:\n");
    assert_eq!(rows.len(), 3);
    for row in rows {
        let processors: usize = row[0].parse().unwrap();
        let room = presets().map(|preset| {
            let documented = documented_value(&preset, &preset.checks()[0]);
            let words = documented.split(' ');
            let numbers: Vec<usize> = words.filter_map(|word| word.parse().ok()).collect();
            let [each, min, max] = numbers[..] else { panic!("{documented}") };
            let lanes = (each * processors).clamp(min, max) as u64;
            units::Unit::Bytes.show(SLOT_BYTES as u64 * preset.lane_records * lanes)
        });
        assert_eq!(row[1..], room);
    }
}

#[cfg(feature = "config-file")]
mod file;
