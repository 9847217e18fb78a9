//! The golden directories in `tests/golden`: loaded, and made.
//!
//! `TOLLGATE_MAKE_GOLDEN=1 cargo test --lib golden` makes those that are missing. What is there is
//! never made anew: it shows that what an earlier version wrote can still be read.

mod remembered;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};

use super::*;
use crate::clock::ManualClock;
use crate::delivery::NamedSink;
use crate::engine::{Charge, ReservedOnce};
use crate::journal::files::FileHeader;
use crate::model::{Consume, QuotaId, ReservationId, Timestamp, UsageEvent, Window};
use crate::sink::MemoryStore;

/// Those that are damaged on purpose: what differs from one version to the next.
pub(super) const NAMES: [&str; 12] = [
    "v1/closed",
    "v1/killed",
    "v1/skips",
    "v1/snapshot",
    "v1/generations-before",
    "v1/generations",
    "v1/limits",
    "v1/sinks",
    "v1/windows",
    "v2/ledger",
    "v2/events",
    "v3/answers",
];

/// The version that is written now.
const VERSION: &str = "v3";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// A golden directory and what it holds.
#[derive(Debug)]
pub(super) struct Golden {
    pub(super) name: &'static str,
    pub(super) files: BTreeMap<String, Vec<u8>>,
    pub(super) now: Timestamp,
    /// By quota and user.
    pub(super) used: BTreeMap<(u16, u64), u64>,
    /// What was ever counted, refunds not taken off.
    pub(super) most: BTreeMap<(u16, u64), u64>,
    pub(super) lanes: usize,
    pub(super) lane_records: u64,
}

pub(super) fn load(name: &'static str) -> Golden {
    let text = fs::read_to_string(root().join(format!("{name}.json"))).unwrap();
    let expected: Value = serde_json::from_str(&text).unwrap();
    let number = |value: &Value| value.as_u64().unwrap();
    let entries = fs::read_dir(root().join(name)).unwrap().map(|entry| entry.unwrap());
    let read = |entry: fs::DirEntry| {
        (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())
    };
    let counters = expected["counters"].as_array().unwrap();
    let by = |field: &str| {
        let entry = |counter: &Value| {
            let quota = u16::try_from(number(&counter["quota"])).unwrap();
            ((quota, number(&counter["user"])), number(&counter[field]))
        };
        counters.iter().map(entry).collect()
    };
    Golden {
        name,
        files: entries.map(read).collect(),
        now: Timestamp::from_unix_millis(number(&expected["now_ms"])),
        used: by("used"),
        most: by("most"),
        lanes: usize::try_from(number(&expected["lanes"])).unwrap(),
        lane_records: number(&expected["lane_records"]),
    }
}

impl Golden {
    pub(super) fn disk(&self) -> Arc<SimDisk> {
        let disk = SimDisk::new(1);
        for (name, bytes) in &self.files {
            disk.put(name, bytes);
        }
        disk
    }
}

/// 2026-01-01 00:00:30 UTC.
const START_MS: u64 = 1_767_225_630_000;

/// A directory in the making, and what should be in it, counted here.
struct Making {
    disk: Arc<SimDisk>,
    clock: ManualClock,
    quotas: Vec<Quota>,
    used: BTreeMap<(u16, u64), u64>,
    most: BTreeMap<(u16, u64), u64>,
    limits: BTreeMap<(u16, u64), u64>,
    /// Open ones, with what they hold.
    reservations: Vec<(ReservationId, Vec<Consume>)>,
    requests: Vec<Asking>,
    /// Recorded, and not delivered.
    events: Vec<UsageEvent>,
    lanes: usize,
    lane_records: u64,
}

/// A request that was answered.
struct Asking {
    id: u128,
    how: &'static str,
    item: Consume,
    is_admitted: bool,
}

impl Making {
    fn new(quotas: Vec<Quota>) -> Self {
        Self {
            disk: SimDisk::new(1),
            clock: ManualClock::new(Timestamp::from_unix_millis(START_MS)),
            quotas,
            used: BTreeMap::new(),
            most: BTreeMap::new(),
            limits: BTreeMap::new(),
            reservations: Vec::new(),
            requests: Vec::new(),
            events: Vec::new(),
            lanes: 0,
            lane_records: 0,
        }
    }

    fn open(&mut self, lanes: usize, lane_records: u64) -> Owner {
        self.open_with(lanes, lane_records, Vec::new())
    }

    fn open_with(&mut self, lanes: usize, lane_records: u64, sinks: Vec<NamedSink>) -> Owner {
        (self.lanes, self.lane_records) = (lanes, lane_records);
        let clock = Arc::new(self.clock.clone());
        let config = small().lanes(lanes).lane_records(lane_records).clock(clock);
        let owner = Owner::open_with(&self.disk.storage(), config, sinks).unwrap();
        for (id, quota) in self.quotas.iter().enumerate() {
            assert_eq!(usize::from(owner.engine.define(quota).unwrap().as_u16()), id);
        }
        // The files of the journal that are prepared in the background.
        let prepared = |name: &String| {
            name.ends_with(".tgj") && self.disk.file(name).is_some_and(|bytes| bytes[32] == 0)
        };
        while self.disk.file_names().iter().filter(|name| prepared(name)).count() < 2 {
            std::thread::sleep(Duration::from_millis(5));
        }
        owner
    }

    fn consume(&mut self, owner: &Owner, quota: u16, user: u64, amount: u64, is_sync: bool) {
        let counted = owner.engine.counted(user, QuotaId(quota)).unwrap();
        owner.engine.consume(&counted, amount, is_sync).unwrap();
        *self.used.entry((quota, user)).or_default() += amount;
        *self.most.entry((quota, user)).or_default() += amount;
    }

    /// From another thread, so that it goes to another lane.
    fn consume_elsewhere(&mut self, owner: &Owner, quota: u16, user: u64, amount: u64) {
        std::thread::scope(|scope| {
            scope.spawn(|| self.consume(owner, quota, user, amount, false)).join().unwrap();
        });
    }

    fn refund(&mut self, owner: &Owner, quota: u16, user: u64, amount: u64) {
        let counted = owner.engine.counted(user, QuotaId(quota)).unwrap();
        assert_eq!(owner.engine.refund(&counted, amount).unwrap(), amount);
        *self.used.get_mut(&(quota, user)).unwrap() -= amount;
    }

    fn set_limit(&mut self, owner: &Owner, quota: u16, user: u64, limit: Option<u64>) {
        let counted = owner.engine.counted(user, QuotaId(quota)).unwrap();
        owner.engine.set_limit(&counted, limit).unwrap();
        self.used.entry((quota, user)).or_default();
        self.most.entry((quota, user)).or_default();
        match limit {
            Some(limit) => self.limits.insert((quota, user), limit),
            None => self.limits.remove(&(quota, user)),
        };
    }

    fn reserve(&mut self, owner: &Owner, items: &[(u64, u64)], ttl: u64) -> ReservationId {
        let item = |&(user, amount)| Consume { user, quota: QuotaId(0), amount };
        let items: Vec<_> = items.iter().map(item).collect();
        let id = owner.engine.reserve(&items, Duration::from_secs(ttl)).unwrap().unwrap();
        for item in &items {
            *self.used.entry((0, item.user)).or_default() += item.amount;
            *self.most.entry((0, item.user)).or_default() += item.amount;
        }
        self.reservations.push((id, items));
        id
    }

    fn commit(&mut self, owner: &Owner, id: ReservationId, actual: u64) {
        assert!(owner.engine.commit(id, Charge::Same(actual)).unwrap().is_allowed());
        let index = self.reservations.iter().position(|known| known.0 == id).unwrap();
        for item in self.reservations.remove(index).1 {
            let used = self.used.get_mut(&(0, item.user)).unwrap();
            *used = *used - item.amount + actual;
            *self.most.get_mut(&(0, item.user)).unwrap() += actual;
        }
    }

    /// Asks `how`, for an hour where that is to reserve.
    fn ask(&mut self, owner: &Owner, how: &'static str, id: u128, item: Consume) {
        let counted = owner.engine.counted(item.user, item.quota).unwrap();
        let is_admitted = match how {
            "try_consume" => {
                owner.engine.try_consume_once(id, counted, item.amount).unwrap().is_allowed()
            }
            "consume" => owner.engine.consume_once(id, counted, item.amount, &[]).is_ok(),
            _ => {
                let hour = Duration::from_secs(3_600);
                match owner.engine.reserve_once(id, counted, item.amount, hour).unwrap() {
                    ReservedOnce::Now(reserved) => {
                        self.reservations.push((reserved, vec![item]));
                        true
                    }
                    _ => false,
                }
            }
        };
        let counted = if is_admitted { item.amount } else { 0 };
        for counts in [&mut self.used, &mut self.most] {
            *counts.entry((item.quota.as_u16(), item.user)).or_default() += counted;
        }
        self.requests.push(Asking { id, how, item, is_admitted });
    }

    fn record(&mut self, owner: &Owner, user: u64, value: u64) {
        let at = Timestamp::from_unix_millis(START_MS - self.events.len() as u64);
        let mut event = UsageEvent::new(user, QuotaId(0), value as f64, at).metadata("n", "ü");
        if value.is_multiple_of(2) {
            event = event.request_id(1 << 100 | u128::from(value));
        }
        owner.engine.record(&event).unwrap();
        *self.used.entry((0, user)).or_default() += value;
        *self.most.entry((0, user)).or_default() += value;
        self.events.push(event);
    }

    fn save(&self, name: &str) {
        let dir = root().join(VERSION).join(name);
        fs::create_dir_all(&dir).unwrap();
        for file in self.disk.file_names() {
            let bytes = shrunk(self.disk.file(&file).unwrap());
            fs::write(dir.join(file), bytes).unwrap();
        }
        let counter = |(&(quota, user), &used): (&(u16, u64), &u64)| {
            let default = self.quotas[usize::from(quota)].limit();
            let limit = self.limits.get(&(quota, user)).copied().unwrap_or(default);
            let most = self.most[&(quota, user)];
            json!({ "quota": quota, "user": user, "used": used, "most": most, "limit": limit })
        };
        let quotas = self.quotas.iter().map(|quota| {
            json!({
                "name": quota.name(),
                "limit": quota.limit(),
                "window": format!("{:?}", quota.counting_window()),
                "utc_offset_minutes": quota.offset_minutes(),
                "decimals": quota.decimal_places(),
            })
        });
        let item = |item: &Consume| {
            let quota = item.quota.as_u16();
            json!({ "user": item.user, "quota": quota, "amount": item.amount })
        };
        let reservation = |(id, items): &(ReservationId, Vec<Consume>)| {
            let items: Vec<_> = items.iter().map(item).collect();
            json!({ "id": id.to_string(), "items": items })
        };
        let request = |asking: &Asking| {
            json!({
                "id": asking.id.to_string(),
                "how": asking.how,
                "asked": item(&asking.item),
                "admitted": asking.is_admitted,
            })
        };
        let event = |event: &UsageEvent| {
            json!({
                "user": event.user,
                "value": event.value,
                "timestamp_ms": event.timestamp.as_unix_millis(),
                "request_id": event.request_id.map(|id| id.to_string()),
            })
        };
        let expected = json!({
            "now_ms": crate::clock::Clock::now(&self.clock).as_unix_millis(),
            "lanes": self.lanes,
            "lane_records": self.lane_records,
            "quotas": quotas.collect::<Vec<_>>(),
            "counters": self.used.iter().map(counter).collect::<Vec<_>>(),
            "reservations": self.reservations.iter().map(reservation).collect::<Vec<_>>(),
            "requests": self.requests.iter().map(request).collect::<Vec<_>>(),
            "events": self.events.iter().map(event).collect::<Vec<_>>(),
        });
        fs::write(root().join(VERSION).join(format!("{name}.json")), format!("{expected:#}\n"))
            .unwrap();
    }
}

/// A journal file without the zeros at its end: the least size that a configuration can ask for is
/// 64 KiB. The header says the new length.
fn shrunk(mut bytes: Vec<u8>) -> Vec<u8> {
    let Some(header) = bytes.first_chunk::<FILE_HEADER_BYTES>() else { return bytes };
    let engine = FileHeader::owner(header);
    let Some(Ok(header)) = engine.map(|engine| FileHeader::decode(engine, header)) else {
        return bytes;
    };
    let used = bytes.iter().rposition(|&byte| byte != 0).unwrap() + 1;
    let len = (used + 256).next_multiple_of(512);
    bytes.truncate(len);
    let bytes_written = len as u64;
    let header = match header {
        FileHeader::Prepared { sequence, .. } => {
            FileHeader::Prepared { sequence, bytes: bytes_written }
        }
        FileHeader::InUse { sequence, previous, previous_check, .. } => {
            FileHeader::InUse { sequence, bytes: bytes_written, previous, previous_check }
        }
    };
    bytes[..FILE_HEADER_BYTES].copy_from_slice(&header.encode(engine.unwrap()));
    bytes
}

fn make_closed() {
    let mut making = Making::new(vec![Quota::new("requests", 1_000)]);
    let owner = making.open(1, 64);
    for user in 0..5 {
        making.consume(&owner, 0, user, user + 1, user == 3);
    }
    owner.close().unwrap();
    making.save("closed");
}

fn make_killed() {
    let day = Quota::new("bytes", 1 << 40).window(Window::Day);
    let mut making = Making::new(vec![Quota::new("requests", 1_000), day]);
    let owner = making.open(2, 64);
    making.consume(&owner, 0, 1, 10, false);
    making.consume(&owner, 1, u64::MAX, 1 << 39, true);
    making.consume(&owner, 0, 2, 20, false);
    owner.engine.sync().unwrap();
    for user in 1..5 {
        making.consume(&owner, 0, user, 3, false);
        making.consume_elsewhere(&owner, 1, user, 5);
    }
    making.disk.kill();
    making.save("killed");
}

fn make_skips() {
    let mut making = Making::new(vec![Quota::new("requests", 1_000)]);
    let owner = making.open(1, 64);
    for round in 1..5 {
        for user in 0..14 {
            making.consume(&owner, 0, user % 3, round, false);
        }
        owner.engine.sync().unwrap();
    }
    making.consume(&owner, 0, 5, 5, false);
    making.consume(&owner, 0, 6, 6, false);
    making.disk.kill();
    making.save("skips");
}

fn make_snapshot() {
    let mut making = Making::new(vec![Quota::new("requests", 1_000).window(Window::Month)]);
    let owner = making.open(1, 64);
    for round in 1..4 {
        for user in 0..6 {
            making.consume(&owner, 0, user * user, round, false);
        }
        if round < 3 {
            owner.engine.snapshot().unwrap();
        }
    }
    making.consume(&owner, 0, 7, 70, true);
    making.consume(&owner, 0, 1, 100, false);
    making.consume(&owner, 0, 8, 1, false);
    making.disk.kill();
    making.save("snapshot");
}

fn make_generations() {
    let mut making = Making::new(vec![Quota::new("requests", 1_000)]);
    let owner = making.open(1, 64);
    making.consume(&owner, 0, 1, 1, false);
    owner.close().unwrap();
    let owner = making.open(2, 64);
    making.consume(&owner, 0, 1, 2, false);
    making.consume_elsewhere(&owner, 0, 2, 2);
    making.disk.kill();
    let owner = making.open(2, 128);
    making.consume(&owner, 0, 1, 4, true);
    making.consume(&owner, 0, 3, 4, false);
    making.disk.kill();
    making.save("generations-before");
    let owner = making.open(1, 128);
    making.consume(&owner, 0, 1, 8, false);
    owner.engine.snapshot().unwrap();
    making.consume(&owner, 0, 2, 8, true);
    making.consume(&owner, 0, 4, 8, false);
    making.disk.kill();
    making.save("generations");
}

fn make_limits() {
    let mut making = Making::new(vec![Quota::new("a", 10), Quota::new("b", 20)]);
    let owner = making.open(1, 64);
    for user in 0..4 {
        making.set_limit(&owner, 0, user, Some(100 + user));
        making.consume(&owner, 0, user, 7, false);
    }
    making.set_limit(&owner, 1, 9, Some(0));
    owner.engine.snapshot().unwrap();
    making.set_limit(&owner, 0, 1, None);
    making.set_limit(&owner, 0, 2, Some(u64::MAX >> 1));
    making.quotas[1] = Quota::new("b", 30);
    owner.engine.define(&making.quotas[1]).unwrap();
    making.consume(&owner, 1, 3, 25, true);
    making.disk.kill();
    making.save("limits");
}

fn make_windows() {
    let every = Window::Every(Duration::from_secs(90));
    let mut making = Making::new(vec![
        Quota::new("lifetime", 1_000),
        Quota::new("minute", 1_000).window(Window::Minute),
        Quota::new("hour", 1_000).window(Window::Hour).utc_offset_minutes(-90),
        Quota::new("day", 1_000).window(Window::Day).utc_offset_minutes(330).decimals(2),
        Quota::new("month", 1_000).window(Window::Month),
        Quota::new("year", 1_000).window(Window::Year),
        Quota::new("every 90 s", 1_000).window(every),
    ]);
    let owner = making.open(1, 64);
    for quota in 0..7 {
        making.consume(&owner, quota, 1, 100 + u64::from(quota), false);
    }
    owner.engine.snapshot().unwrap();
    making.clock.advance(Duration::from_secs(120));
    for closed in [1, 6] {
        making.used.insert((closed, 1), 0);
    }
    for quota in 0..7 {
        making.consume(&owner, quota, 1, 10, quota == 3);
        making.consume(&owner, quota, 2, 50, false);
        making.refund(&owner, quota, 2, 20);
    }
    owner.engine.sync().unwrap();
    making.refund(&owner, 0, 1, 60);
    owner.close().unwrap();
    making.save("windows");
}

/// One sink has an end in flight and a backlog beyond it, one was not attached, one is behind, one
/// never got anything.
fn make_sinks() {
    let minute = Quota::new("minute", 1_000).window(Window::Minute);
    let mut making = Making::new(vec![Quota::new("requests", 1_000), minute]);
    let stores = ["archive", "billing", "copy"].map(|name| (name, MemoryStore::new()));
    let sink = |index: usize| -> NamedSink {
        let (name, store) = &stores[index];
        ((*name).to_owned(), Box::new(store.sink()))
    };
    let owner = making.open_with(1, 64, vec![sink(0), sink(1), sink(2)]);
    making.consume(&owner, 0, 1, 10, false);
    making.consume(&owner, 1, 1, 5, false);
    owner.engine.deliver(Duration::from_secs(60)).unwrap();
    owner.close().unwrap();
    // From here on `billing` fails, and `archive` is not there. `late` is, and never answers.
    (0..10_000).for_each(|_| stores[1].1.inject(crate::sink::Fault::BeforeCommit));
    let late = MemoryStore::new();
    (0..10_000).for_each(|_| late.inject(crate::sink::Fault::BeforeCommit));
    let late: NamedSink = ("late".to_owned(), Box::new(late.sink()));
    let owner = making.open_with(1, 64, vec![sink(1), sink(2), late]);
    making.consume(&owner, 0, 2, 20, false);
    owner.engine.deliver(Duration::from_millis(200)).unwrap_err();
    for round in 0..4 {
        making.consume(&owner, 0, round, 3, false);
        making.consume(&owner, 1, 2, 1, false);
        owner.engine.snapshot().unwrap();
    }
    making.consume(&owner, 0, 7, 7, true);
    making.consume(&owner, 0, 8, 8, false);
    making.disk.kill();
    let names = making.disk.file_names();
    let parts = |sink: &str| names.iter().filter(|name| name.starts_with(sink)).count();
    assert_eq!(["backlog-archive", "backlog-billing", "backlog-late"].map(parts), [1, 2, 2]);
    making.save("sinks");
}

#[test]
fn missing_golden_directories_are_made_when_asked_for() {
    if std::env::var_os("TOLLGATE_MAKE_GOLDEN").is_none() {
        return;
    }
    let makers: [(&str, fn()); 11] = [
        ("closed", make_closed),
        ("killed", make_killed),
        ("skips", make_skips),
        ("snapshot", make_snapshot),
        ("generations", make_generations),
        ("limits", make_limits),
        ("sinks", make_sinks),
        ("windows", make_windows),
        ("ledger", remembered::make_ledger),
        ("answers", remembered::make_answers),
        ("events", remembered::make_events),
    ];
    for (name, make) in makers {
        if !root().join(VERSION).join(name).exists() {
            make();
        }
    }
}
