//! The configuration as text: TOML or YAML, in the native layout or in the compatibility layout.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use serde::de::{Deserialize, Deserializer, Error as _};

use super::bounds::{self, Bounds};
use super::{Backpressure, Config, DeliveryConfig};
use crate::error::{Error, Result};

/// The largest file that is read.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Files.
impl Config {
    /// Reads a configuration from TOML text. Options that it does not name keep the default, or the
    /// value of the `preset` that it names.
    ///
    /// ```
    /// use tollgate::Config;
    ///
    /// let config = Config::from_toml(r#"
    ///     preset = "low_latency"
    ///     sync_interval = "50ms"
    ///     [delivery]
    ///     worker_count = 2
    /// "#)?;
    ///
    /// let error = Config::from_toml(r#"lane_records = 1000"#).unwrap_err();
    /// assert_eq!(
    ///     error.to_string(),
    ///     "configuration: lane_records is 1000, allowed: a power of two, 64..=67108864"
    /// );
    /// # Ok::<(), tollgate::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::InvalidConfig`] for text that is not TOML, an option that does not exist, or a
    /// value that is out of its bounds.
    pub fn from_toml(text: &str) -> Result<Self> {
        toml::from_str::<WireConfig>(text).map_err(|error| unreadable("TOML", error))?.into_config()
    }

    /// Reads a configuration from YAML text, as [`from_toml`](Self::from_toml) does from TOML.
    ///
    /// ```
    /// let config = tollgate::Config::from_yaml("
    /// async_quota:
    ///   enabled: true
    ///   consumer:
    ///     worker_count: 3
    ///     channel_size: 100000
    ///     flush_interval: 5s
    /// ")?;
    /// # Ok::<(), tollgate::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`from_toml`](Self::from_toml).
    pub fn from_yaml(text: &str) -> Result<Self> {
        serde_saphyr::from_str::<Option<WireConfig>>(text)
            .map_err(|error| unreadable("YAML", error.without_snippet()))?
            .unwrap_or_default()
            .into_config()
    }

    /// Reads a configuration from a file of at most 1 MiB: TOML when its name ends in `.toml`, YAML
    /// for `.yaml` and `.yml`.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] when the file can't be read, [`Error::InvalidConfig`] for another file
    /// extension, a larger file, and everything that [`from_toml`](Self::from_toml) refuses.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let parse = match path.extension().and_then(|extension| extension.to_str()) {
            Some("toml") => Self::from_toml,
            Some("yaml" | "yml") => Self::from_yaml,
            _ => {
                let allowed = "a name that ends in .toml, .yaml or .yml";
                return Err(Error::config("file", path.display(), allowed));
            }
        };
        parse(&read_bounded(path)?).map_err(|error| match error {
            Error::InvalidConfig { field, value, allowed } => {
                let value = format!("{value} (in {})", path.display());
                Error::InvalidConfig { field, value, allowed }
            }
            other => other,
        })
    }
}

/// Takes the same form as a file, for a configuration that is part of a larger one.
impl<'de> Deserialize<'de> for Config {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        WireConfig::deserialize(deserializer)?.into_config().map_err(D::Error::custom)
    }
}

fn read_bounded(path: &Path) -> Result<String> {
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text))
        .map_err(|error| Error::io("read", path, error))?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(Error::config("file", path.display(), "a file of at most 1MiB"));
    }
    Ok(text)
}

/// What a parser says, with the line that it names, on one line.
fn unreadable(language: &str, error: impl ToString) -> Error {
    let message = error.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
    let allowed = format!("{language} with the options of docs/configuration.md");
    Error::config("file", format!("unreadable ({message})"), allowed)
}

#[derive(Debug, Default, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
struct WireConfig {
    preset: Named,
    lanes: Named,
    lane_records: Named,
    sync_interval: Named,
    drain_interval: Named,
    clock_tick: Named,
    journal_file_bytes: Named,
    snapshot_journal_bytes: Named,
    snapshot_journal_percent: Named,
    unsynced_bytes_max: Named,
    backpressure_deadline: Named,
    backpressure: Named,
    closed_window_retention: Named,
    counters_expected: Named,
    shards: Named,
    durable_consumes: Named,
    backlog_degraded_percent: Named,
    clock_jump_max: Named,
    reservations_max: Named,
    dedup_window: Named,
    dedup_max: Named,
    delivery: Option<WireDelivery>,
    async_quota: Option<WireAsyncQuota>,
}

#[derive(Debug, Default, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
struct WireDelivery {
    worker_count: Named,
    batch_size: Named,
    flush_interval: Named,
    retry_attempts: Named,
    retry_delay: Named,
}

/// The compatibility layout: that of a channel with workers that batch into the database.
#[derive(Debug, Default, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
struct WireAsyncQuota {
    enabled: Named,
    consumer: Option<WireConsumer>,
}

#[derive(Debug, Default, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
struct WireConsumer {
    worker_count: Named,
    channel_size: Named,
    batch_size: Named,
    flush_interval: Named,
    retry_attempts: Named,
    retry_delay: Named,
}

/// The value given for an option, if it is named: an option without a value is refused, rather than
/// taken to keep its default.
#[derive(Debug, Default)]
struct Named(Option<Scalar>);

impl<'de> Deserialize<'de> for Named {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Scalar::deserialize(deserializer).map(|scalar| Self(Some(scalar)))
    }
}

/// A value whose expected type is not known yet, so that a wrong one can be refused with its
/// field's name.
#[derive(Debug, serde::Deserialize)]
#[serde(untagged, expecting = "a number, a text, true or false")]
enum Scalar {
    Nothing,
    Flag(bool),
    Integer(i64),
    Number(f64),
    Text(String),
}

impl std::fmt::Display for Scalar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Nothing => f.write_str("without a value"),
            Self::Flag(flag) => write!(f, "{flag}"),
            Self::Integer(integer) => write!(f, "{integer}"),
            Self::Number(number) => write!(f, "{number:?}"),
            Self::Text(text) => write!(f, "{text:?}"),
        }
    }
}

/// A value and the field that gives it.
#[derive(Debug)]
struct Given {
    field: &'static str,
    scalar: Scalar,
}

impl WireConfig {
    fn into_config(self) -> Result<Config> {
        let mut config = preset(self.preset)?;
        let async_quota = self.async_quota.unwrap_or_default();
        let mut consumer = async_quota.consumer.unwrap_or_default();
        let channel_size = std::mem::take(&mut consumer.channel_size);
        assign_delivery(&mut config.delivery, self.delivery.unwrap_or_default(), consumer)?;

        assign(&mut config.lanes, &bounds::LANES, self.lanes)?;
        assign_ring(&mut config.lane_records, self.lane_records, channel_size)?;
        assign(&mut config.sync_interval, &bounds::SYNC_INTERVAL, self.sync_interval)?;
        assign(&mut config.drain_interval, &bounds::DRAIN_INTERVAL, self.drain_interval)?;
        assign(&mut config.clock_tick, &bounds::CLOCK_TICK, self.clock_tick)?;
        assign(
            &mut config.journal_file_bytes,
            &bounds::JOURNAL_FILE_BYTES,
            self.journal_file_bytes,
        )?;
        assign(
            &mut config.snapshot_journal_bytes,
            &bounds::SNAPSHOT_JOURNAL_BYTES,
            self.snapshot_journal_bytes,
        )?;
        assign(
            &mut config.snapshot_journal_percent,
            &bounds::SNAPSHOT_JOURNAL_PERCENT,
            self.snapshot_journal_percent,
        )?;
        assign(
            &mut config.unsynced_bytes_max,
            &bounds::UNSYNCED_BYTES_MAX,
            self.unsynced_bytes_max,
        )?;
        assign(
            &mut config.backpressure_deadline,
            &bounds::BACKPRESSURE_DEADLINE,
            self.backpressure_deadline,
        )?;
        assign_policy(&mut config.backpressure, self.backpressure)?;
        assign(
            &mut config.closed_window_retention,
            &bounds::CLOSED_WINDOW_RETENTION,
            self.closed_window_retention,
        )?;
        assign(&mut config.counters_expected, &bounds::COUNTERS_EXPECTED, self.counters_expected)?;
        assign(&mut config.shards, &bounds::SHARDS, self.shards)?;
        assign_durable(&mut config.durable_consumes, self.durable_consumes, async_quota.enabled)?;
        assign(
            &mut config.backlog_degraded_percent,
            &bounds::BACKLOG_DEGRADED_PERCENT,
            self.backlog_degraded_percent,
        )?;
        assign(&mut config.clock_jump_max, &bounds::CLOCK_JUMP_MAX, self.clock_jump_max)?;
        assign(&mut config.reservations_max, &bounds::RESERVATIONS_MAX, self.reservations_max)?;
        assign(&mut config.dedup_window, &bounds::DEDUP_WINDOW, self.dedup_window)?;
        assign(&mut config.dedup_max, &bounds::DEDUP_MAX, self.dedup_max)?;
        Ok(config)
    }
}

fn preset(name: Named) -> Result<Config> {
    match name.0 {
        None => Ok(Config::default()),
        Some(name) => choose("preset", name, &PRESETS).map(|preset| preset()),
    }
}

type Preset = fn() -> Config;

const PRESETS: [(&str, Preset); 4] = [
    ("default", Config::default),
    ("high_concurrency", Config::high_concurrency),
    ("low_latency", Config::low_latency),
    ("high_reliability", Config::high_reliability),
];

fn assign_policy(target: &mut Backpressure, name: Named) -> Result<()> {
    let policies =
        [("reject", Backpressure::Reject), ("admit_unlogged", Backpressure::AdmitUnlogged)];
    if let Some(name) = name.0 {
        *target = choose("backpressure", name, &policies)?;
    }
    Ok(())
}

/// The choice with this name.
fn choose<T: Copy>(field: &str, name: Scalar, choices: &[(&str, T)]) -> Result<T> {
    let chosen = choices.iter().find(|(known, _)| matches!(&name, Scalar::Text(n) if n == known));
    match chosen {
        Some((_, choice)) => Ok(*choice),
        None => {
            let names: Vec<_> = choices.iter().map(|(known, _)| *known).collect();
            Err(Error::config(field, name, names.join(", ")))
        }
    }
}

/// `enabled: false` asks for consumes that are not asynchronous.
fn assign_durable(target: &mut bool, native: Named, compatible: Named) -> Result<()> {
    let compatible = given("async_quota.enabled", compatible);
    let is_inverted = compatible.is_some();
    match either(given("durable_consumes", native), compatible)? {
        None => Ok(()),
        Some(Given { scalar: Scalar::Flag(flag), .. }) => {
            *target = flag != is_inverted;
            Ok(())
        }
        Some(Given { field, scalar }) => Err(Error::config(field, scalar, "true, false")),
    }
}

/// `channel_size` need not be a power of two: the next larger one is taken.
fn assign_ring(target: &mut u64, native: Named, channel_size: Named) -> Result<()> {
    let channel_size = given("async_quota.consumer.channel_size", channel_size);
    let rounded = channel_size.is_some();
    let bounds = &bounds::LANE_RECORDS;
    let Some(value) = either(given(bounds.field, native), channel_size)? else {
        return Ok(());
    };
    *target = if rounded {
        let allowed = 1..=bounds.max();
        let size = value.in_base_unit(bounds).filter(|size| allowed.contains(size));
        size.ok_or_else(|| value.refused(bounds, &format!("{allowed:?}")))?
            .next_power_of_two()
            .max(bounds.min())
    } else {
        value.read(bounds)?
    };
    Ok(())
}

fn assign_delivery(
    config: &mut DeliveryConfig,
    native: WireDelivery,
    compatible: WireConsumer,
) -> Result<()> {
    assign_either(
        &mut config.worker_count,
        &bounds::WORKER_COUNT,
        native.worker_count,
        given("async_quota.consumer.worker_count", compatible.worker_count),
    )?;
    assign_either(
        &mut config.batch_size,
        &bounds::BATCH_SIZE,
        native.batch_size,
        given("async_quota.consumer.batch_size", compatible.batch_size),
    )?;
    assign_either(
        &mut config.flush_interval,
        &bounds::FLUSH_INTERVAL,
        native.flush_interval,
        given("async_quota.consumer.flush_interval", compatible.flush_interval),
    )?;
    assign_either(
        &mut config.retry_attempts,
        &bounds::RETRY_ATTEMPTS,
        native.retry_attempts,
        given("async_quota.consumer.retry_attempts", compatible.retry_attempts),
    )?;
    assign_either(
        &mut config.retry_delay,
        &bounds::RETRY_DELAY,
        native.retry_delay,
        given("async_quota.consumer.retry_delay", compatible.retry_delay),
    )
}

fn assign<T: Setting>(target: &mut T, bounds: &Bounds, native: Named) -> Result<()> {
    assign_either(target, bounds, native, None)
}

fn assign_either<T: Setting>(
    target: &mut T,
    bounds: &Bounds,
    native: Named,
    compatible: Option<Given>,
) -> Result<()> {
    if let Some(value) = either(given(bounds.field, native), compatible)? {
        *target = T::from_base_unit(value.read(bounds)?);
    }
    Ok(())
}

fn given(field: &'static str, named: Named) -> Option<Given> {
    named.0.map(|scalar| Given { field, scalar })
}

/// Whichever of two fields with the same meaning is given; giving both is a contradiction, even
/// where they agree.
fn either(native: Option<Given>, compatible: Option<Given>) -> Result<Option<Given>> {
    match (native, compatible) {
        (Some(native), Some(compatible)) => {
            let allowed = format!("one of it and {}, not both", native.field);
            Err(Error::config(compatible.field, compatible.scalar, allowed))
        }
        (native, compatible) => Ok(native.or(compatible)),
    }
}

impl Given {
    /// The value in the base unit of the option, within its bounds.
    fn read(&self, bounds: &Bounds) -> Result<u64> {
        let value = self.in_base_unit(bounds).filter(|&value| bounds.allows(value));
        value.ok_or_else(|| self.refused(bounds, &bounds.allowed()))
    }

    /// With how it is written, where that is not plain, or where a number stands in quotes.
    fn refused(&self, bounds: &Bounds, allowed: &str) -> Error {
        let notation = match (&self.scalar, bounds.unit().notation()) {
            (Scalar::Text(_), "") => ", written as a number without quotes",
            (_, notation) => notation,
        };
        Error::config(self.field, &self.scalar, format!("{allowed}{notation}"))
    }

    fn in_base_unit(&self, bounds: &Bounds) -> Option<u64> {
        match &self.scalar {
            Scalar::Integer(integer) => bounds.unit().plain_number(u64::try_from(*integer).ok()?),
            Scalar::Text(text) => bounds.unit().read(text),
            Scalar::Nothing | Scalar::Flag(_) | Scalar::Number(_) => None,
        }
    }
}

/// The type of an option in [`Config`]. Bounds keep the values within each.
trait Setting {
    fn from_base_unit(value: u64) -> Self;
}

impl Setting for u64 {
    fn from_base_unit(value: u64) -> Self {
        value
    }
}

impl Setting for usize {
    fn from_base_unit(value: u64) -> Self {
        Self::try_from(value).unwrap_or(Self::MAX)
    }
}

impl Setting for u32 {
    fn from_base_unit(value: u64) -> Self {
        Self::try_from(value).unwrap_or(Self::MAX)
    }
}

impl Setting for Duration {
    fn from_base_unit(nanoseconds: u64) -> Self {
        Self::from_nanos(nanoseconds)
    }
}
