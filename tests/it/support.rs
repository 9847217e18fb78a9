//! What the tests share.

use std::time::Duration;

use tollgate::Config;

/// A configuration whose bounds are all met within a few operations.
pub(crate) fn small() -> Config {
    Config::default()
        .lanes(2)
        .lane_records(64)
        .shards(4)
        .journal_file_bytes(64 << 10)
        .snapshot_journal_bytes(64 << 10)
        .sync_interval(Duration::from_millis(2))
}
