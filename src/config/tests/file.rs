//! Configurations as text.

use super::*;

/// The options of a configuration as text.
fn values(config: &Config) -> Vec<(&'static str, String)> {
    config.checks().into_iter().map(|check| (check.field, check.value)).collect()
}

fn toml_error(text: &str) -> String {
    Config::from_toml(text).unwrap_err().to_string()
}

fn yaml_error(text: &str) -> String {
    Config::from_yaml(text).unwrap_err().to_string()
}

/// Each option at a value of its own, none of them its default: a field that is read into another's
/// place shows.
const ALL_OPTIONS: [(&str, &str); 23] = [
    ("lanes", "7"),
    ("lane_records", "128"),
    ("sync_interval", "11ms"),
    ("drain_interval", "12ms"),
    ("clock_tick", "13ms"),
    ("journal_file_bytes", "14MiB"),
    ("snapshot_journal_bytes", "15MiB"),
    ("snapshot_journal_percent", "16"),
    ("unsynced_bytes_max", "17MiB"),
    ("backpressure_deadline", "18s"),
    ("closed_window_retention", "19d"),
    ("counters_expected", "20"),
    ("shards", "256"),
    ("backlog_degraded_percent", "21"),
    ("clock_jump_max", "22s"),
    ("reservations_max", "28"),
    ("dedup_window", "29m"),
    ("dedup_max", "30"),
    ("delivery.worker_count", "23"),
    ("delivery.batch_size", "24"),
    ("delivery.flush_interval", "25s"),
    ("delivery.retry_attempts", "26"),
    ("delivery.retry_delay", "27s"),
];

fn as_toml(value: &str) -> String {
    if value.parse::<u64>().is_ok() { value.to_owned() } else { format!("{value:?}") }
}

#[test]
fn every_option_is_read_into_its_place() {
    let mut toml = String::new();
    for (field, value) in ALL_OPTIONS {
        toml += &format!("{field} = {}\n", as_toml(value));
    }
    toml += "backpressure = \"admit_unlogged\"\ndurable_consumes = true\n";
    let config = Config::from_toml(&toml).unwrap();
    let expected: Vec<_> = ALL_OPTIONS.map(|(field, value)| (field, value.to_owned())).into();
    assert_eq!(values(&config), expected);
    assert_eq!(config.backpressure, Backpressure::AdmitUnlogged);
    assert!(config.durable_consumes);
}

#[test]
fn what_is_printed_is_read_back() {
    let others = Config::low_latency().durable_consumes(true);
    let others = others.backpressure(Backpressure::AdmitUnlogged);
    for config in presets().into_iter().chain([others]) {
        let again = Config::from_toml(&config.to_string()).unwrap();
        assert_eq!(values(&again), values(&config));
        assert_eq!(again.backpressure, config.backpressure);
        assert_eq!(again.durable_consumes, config.durable_consumes);
    }
}

#[test]
fn empty_text_is_the_default() {
    for config in [
        Config::from_toml("").unwrap(),
        Config::from_yaml("").unwrap(),
        Config::from_yaml("# nothing\n").unwrap(),
        Config::from_yaml("async_quota:\ndelivery:\n").unwrap(),
        Config::from_toml("preset = \"default\"").unwrap(),
    ] {
        assert_eq!(values(&config), values(&Config::default()));
    }
}

#[test]
fn a_preset_is_a_base() {
    let config = Config::from_yaml("preset: high_reliability\nlanes: 9").unwrap();
    assert_eq!(values(&config), values(&Config::high_reliability().lanes(9)));
    assert_eq!(
        toml_error("preset = \"fast\""),
        "configuration: preset is \"fast\", \
         allowed: default, high_concurrency, low_latency, high_reliability"
    );
}

#[test]
fn the_compatibility_layout_maps_to_native_options() {
    let yaml = "
async_quota:
  enabled: false
  consumer:
    worker_count: 4
    channel_size: 100000
    batch_size: 500
    flush_interval: 2s
    retry_attempts: 7
    retry_delay: 250
";
    let toml = r#"
[async_quota]
enabled = false
[async_quota.consumer]
worker_count = 4
channel_size = 100_000
batch_size = 500
flush_interval = "2s"
retry_attempts = 7
retry_delay = 250
"#;
    for config in [Config::from_yaml(yaml).unwrap(), Config::from_toml(toml).unwrap()] {
        let delivery = DeliveryConfig {
            worker_count: 4,
            batch_size: 500,
            flush_interval: Duration::from_secs(2),
            retry_attempts: 7,
            retry_delay: Duration::from_millis(250),
        };
        assert_eq!((config.delivery, config.lane_records), (delivery, 131_072));
        assert!(config.durable_consumes);
    }
    assert!(!Config::from_yaml("async_quota: { enabled: true }").unwrap().durable_consumes);
    assert!(!Config::from_yaml("durable_consumes: false").unwrap().durable_consumes);
}

#[test]
fn channel_size_is_rounded_up_to_a_ring() {
    let records = |size: &str| {
        let text = format!("[async_quota.consumer]\nchannel_size = {size}");
        Config::from_toml(&text).map(|config| config.lane_records)
    };
    assert_eq!(records("1").unwrap(), 64);
    assert_eq!(records("64").unwrap(), 64);
    assert_eq!(records("65").unwrap(), 128);
    assert_eq!(records("67108864").unwrap(), 1 << 26);
    for (size, shown) in [("0", "0"), ("67108865", "67108865"), ("-5", "-5")] {
        assert_eq!(
            records(size).unwrap_err().to_string(),
            format!(
                "configuration: async_quota.consumer.channel_size is {shown}, allowed: 1..=67108864"
            )
        );
    }
}

#[test]
fn both_names_of_one_option_contradict() {
    assert_eq!(
        yaml_error("delivery: { batch_size: 5 }\nasync_quota: { consumer: { batch_size: 5 } }"),
        "configuration: async_quota.consumer.batch_size is 5, \
         allowed: one of it and delivery.batch_size, not both"
    );
    assert!(
        yaml_error("durable_consumes: true\nasync_quota: { enabled: true }")
            .contains("async_quota.enabled is true, allowed: one of it and durable_consumes")
    );
    assert!(
        yaml_error("lane_records: 64\nasync_quota: { consumer: { channel_size: 64 } }")
            .contains("async_quota.consumer.channel_size is 64, allowed: one of it and lane_rec")
    );
}

#[test]
fn wrong_values_are_named_with_the_path_in_the_file() {
    assert_eq!(
        yaml_error("async_quota:\n  consumer:\n    flush_interval: 5 parsecs"),
        "configuration: async_quota.consumer.flush_interval is \"5 parsecs\", \
         allowed: 10ms..=1h, written as \"100ms\" or as a number of milliseconds"
    );
    assert_eq!(
        toml_error("[delivery]\nworker_count = -3"),
        "configuration: delivery.worker_count is -3, allowed: 1..=64"
    );
    assert_eq!(
        toml_error("journal_file_bytes = \"2GiB\""),
        "configuration: journal_file_bytes is \"2GiB\", \
         allowed: 64KiB..=1GiB, written as \"64MiB\" or as a number of bytes"
    );
    for (text, field, allowed) in [
        ("lanes = \"8\"", "lanes", "1..=1024"),
        ("shards = \"8\"", "shards", "a power of two, 2..=65536"),
        (
            "async_quota.consumer.channel_size = \"8\"",
            "async_quota.consumer.channel_size",
            "1..=67108864",
        ),
    ] {
        assert_eq!(
            toml_error(text),
            format!(
                "configuration: {field} is \"8\", allowed: {allowed}, written as a number without \
                 quotes"
            )
        );
    }
    assert_eq!(toml_error("lanes = 2.5"), "configuration: lanes is 2.5, allowed: 1..=1024");
    assert_eq!(toml_error("lanes = true"), "configuration: lanes is true, allowed: 1..=1024");
    assert_eq!(
        toml_error("durable_consumes = 1"),
        "configuration: durable_consumes is 1, allowed: true, false"
    );
    assert_eq!(
        toml_error("backpressure = \"drop\""),
        "configuration: backpressure is \"drop\", allowed: reject, admit_unlogged"
    );
    assert!(toml_error("clock_jump_max = 9223372036854775807").contains("clock_jump_max is 9223"));
}

#[test]
fn unknown_and_repeated_fields_and_broken_text_are_refused_with_their_line() {
    let unknown = toml_error("lanes = 4\n[delivery]\nbatch_sise = 4");
    assert!(unknown.contains("`batch_sise`") && unknown.contains("line 3"), "{unknown}");
    let unknown = yaml_error("async_quota:\n  consumer:\n    workers: 4");
    assert!(unknown.contains("workers") && unknown.contains("line 3"), "{unknown}");
    let repeated = yaml_error("lanes: 4\nlanes: 5");
    assert!(repeated.contains("lanes") && repeated.contains("line 2"), "{repeated}");
    let repeated = toml_error("lanes = 4\nlanes = 5");
    assert!(repeated.contains("line 2"), "{repeated}");
    let broken = toml_error("lanes = ");
    assert!(broken.starts_with("configuration: file is unreadable (TOML"), "{broken}");
    assert!(!broken.contains('\n'), "{broken}");
    let nested = toml_error("lanes = [4]");
    assert!(nested.contains("a number, a text, true or false"), "{nested}");
}

#[test]
fn files_are_read_by_their_ending() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    for (name, text) in [("a.toml", "lanes = 6"), ("a.yaml", "lanes: 6"), ("a.yml", "lanes: 6")] {
        assert_eq!(Config::from_file(write(name, text)).unwrap().lanes, 6, "{name}");
    }
    let other = Config::from_file(write("a.json", "{}")).unwrap_err().to_string();
    assert!(other.contains("a name that ends in .toml, .yaml or .yml"), "{other}");
    let large = write("large.toml", &"#".repeat((1 << 20) + 1));
    let large = Config::from_file(large).unwrap_err().to_string();
    assert!(large.contains("at most 1MiB"), "{large}");
    let missing = Config::from_file(dir.path().join("missing.toml")).unwrap_err();
    assert!(matches!(missing, Error::Io { action: "read", .. }), "{missing}");
}

/// The tables of the document name what the code reads, and its examples work.
#[test]
fn the_document_works_as_written() {
    for row in table("The compatibility layout") {
        let (compatible, native) = (&row[0], &row[1]);
        let leaf = if compatible.ends_with("enabled") { "true" } else { "64" };
        let both = [compatible, native].map(|field| format!("{field} = {leaf}\n")).concat();
        let error = toml_error(&both);
        assert!(
            error.contains(&format!("{compatible} is {leaf}, allowed: one of it and {native},"))
        );
    }
    assert_eq!(table("The compatibility layout").len(), 7);
    let example = |language: &str| {
        let (_, after) = DOCUMENT.split_once(&format!("```{language}\n")).unwrap();
        after.split_once("```").unwrap().0
    };
    let toml = Config::from_toml(example("toml")).unwrap();
    assert_eq!((toml.lane_records, toml.journal_file_bytes), (1 << 21, 64 << 20));
    let yaml = Config::from_yaml(example("yaml")).unwrap();
    assert_eq!(values(&yaml), values(&Config::default().lane_records(1 << 17)));
}

#[test]
fn a_configuration_can_be_part_of_a_larger_one() {
    #[derive(serde::Deserialize)]
    struct Service {
        quotas: Config,
    }
    let service: Service = toml::from_str("[quotas]\nlanes = 6").unwrap();
    assert_eq!(service.quotas.lanes, 6);
    assert!(toml::from_str::<Service>("[quotas]\nlanes = 0").is_err());
}
