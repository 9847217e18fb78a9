//! What the tests deliver, and what they expect to find.

use std::collections::BTreeMap;

use tollgate::sink::{EventRow, Position, UsageBatch, UsageEvent, UsageRow};
use tollgate::{AMOUNT_MAX, EngineId, QuotaId, Timestamp};

/// User, quota's name, start of the window in milliseconds (0 for a lifetime).
pub(crate) type Key = (u64, String, u64);

/// Used and limit.
pub(crate) type Totals = BTreeMap<Key, (i128, u64)>;

pub(crate) const DAY_MS: u64 = 24 * 60 * 60 * 1000;
const FIRST_DAY_MS: u64 = 20_000 * DAY_MS;

/// SplitMix64.
#[derive(Debug, Clone)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// Stands for an engine: makes batches, and knows what they add up to.
#[derive(Debug)]
pub(crate) struct Feed {
    engine: EngineId,
    random: Random,
    position: Option<Position>,
    used: BTreeMap<Key, i128>,
    events: u64,
}

impl Feed {
    pub(crate) fn new(engine: u128, seed: u64) -> Self {
        let random = Random(seed);
        let engine = EngineId::from_u128(engine);
        Self { engine, random, position: None, used: BTreeMap::new(), events: 0 }
    }

    pub(crate) fn engine(&self) -> EngineId {
        self.engine
    }

    /// The end of the last batch.
    pub(crate) fn position(&self) -> Option<Position> {
        self.position
    }

    /// How many events the batches held.
    pub(crate) fn events(&self) -> u64 {
        self.events
    }

    /// A batch of random rows behind the last one.
    pub(crate) fn next(&mut self) -> UsageBatch {
        let count = self.random.below(30);
        let rows = (0..count).map(|_| self.row()).collect();
        let events: Vec<_> = (0..count.min(3)).map(|_| self.event()).collect();
        self.batch(rows, events)
    }

    /// A batch of these rows behind the last one.
    pub(crate) fn batch(&mut self, rows: Vec<UsageRow>, events: Vec<EventRow>) -> UsageBatch {
        let from = self.position;
        let step = 1 + self.random.below(3);
        let batch = from.map_or(0, |from| from.batch) + step;
        let to = Position { batch, check: self.random.next() as u32 };
        self.position = Some(to);
        self.events += events.len() as u64;
        UsageBatch::new(self.engine, from, to, rows, events)
    }

    fn row(&mut self) -> UsageRow {
        let user = match self.random.below(10) {
            0 => u64::MAX,
            1 => 1 << 63,
            user => user,
        };
        let (name, window_start) = match self.random.below(4) {
            0 => ("tokens \"größe\" '%s' \\", None),
            day => ("requests", Some(FIRST_DAY_MS + day * DAY_MS)),
        };
        let added = i128::from(self.random.below(1 << 40)) - (1 << 38);
        let key = (user, name.to_owned(), window_start.unwrap_or(0));
        let used = self.used.entry(key).or_insert(0);
        *used += added;
        let used = u64::try_from(*used).unwrap_or(0);
        row(user, name, window_start, added, used)
    }

    fn event(&mut self) -> EventRow {
        let (user, quota) = (self.random.next(), QuotaId::from_u16(1));
        let value = self.random.below(1000) as f64 / 8.0;
        let timestamp = Timestamp::from_unix_millis(FIRST_DAY_MS + self.random.below(DAY_MS));
        let mut event =
            UsageEvent::new(user, quota, value, timestamp).metadata("path\\", "/v1/ü\n\0");
        event.request_id = (self.random.below(2) == 0).then_some(1 << 127 | 9);
        EventRow::new("requests", event)
    }
}

/// What a store must hold after everything that these feeds made.
pub(crate) fn totals(feeds: &[&Feed]) -> Totals {
    let mut totals = Totals::new();
    for feed in feeds {
        for (key, used) in &feed.used {
            let limit = limit_of(&key.1);
            totals.entry(key.clone()).or_insert((0, limit)).0 += used;
        }
    }
    totals
}

/// A row of the quotas that the tests use: a quota's decimals and window follow from its name.
pub(crate) fn row(
    user: u64,
    name: &str,
    window_start: Option<u64>,
    added: i128,
    used: u64,
) -> UsageRow {
    let is_daily = window_start.is_some();
    let quota = QuotaId::from_u16(u16::from(is_daily));
    let mut row = UsageRow::new(user, quota, name, added, limit_of(name));
    row.decimals = if is_daily { 0 } else { 3 };
    row.window_start = window_start.map(Timestamp::from_unix_millis);
    row.window_end = window_start.map(|start| Timestamp::from_unix_millis(start + DAY_MS));
    row.used = Some(used);
    row
}

fn limit_of(name: &str) -> u64 {
    if name == "requests" { 1000 } else { AMOUNT_MAX }
}
