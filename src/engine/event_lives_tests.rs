//! Lives in which events are recorded and delivered, on a simulated disk, without threads: one seed
//! decides every operation, every step, every fault of the sinks, and every death.
//!
//! Proves that a sink gets each event that was acknowledged exactly once and whole, and any other
//! at most once; and that what it has of events adds up to its totals. `TOLLGATE_SIM_SEED=n` runs
//! one life alone, `TOLLGATE_SIM_RUNS` sets how many there are.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::delivery_tests::{Mood, Remote, number};
use super::flushers::Step;
use super::*;
use crate::clock::ManualClock;
use crate::model::{Quota, Timestamp, UsageEvent, Window, units_from_f64};
use crate::storage::sim::{SimDisk, SplitMix64};
use crate::wal::lanes::prefer;

const START: u64 = 1_767_225_600_000;
const USERS: u64 = 4;
const RUNS: u64 = 400;
const LIVES: usize = 5;

/// What is known of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// It was refused, and counted nothing.
    Refused,
    /// Its recording had not returned, or was lost with the power.
    Open,
    Acknowledged {
        is_synced: bool,
    },
}

#[derive(Debug, Clone)]
struct Made {
    event: UsageEvent,
    fate: Fate,
    /// Which sinks were attached when it was recorded first, or had been.
    sinks: [bool; 2],
}

struct World {
    seed: u64,
    random: SplitMix64,
    disk: Arc<SimDisk>,
    clock: ManualClock,
    /// The first is there from the start, the second is added later. Either may be missing.
    remotes: [Remote; 2],
    added_in: usize,
    known: [bool; 2],
    owner: Option<Owner>,
    quotas: [QuotaId; 2],
    made: Vec<Made>,
    log: Vec<String>,
    /// Parts of backlogs met at the ends of lives.
    parts: usize,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = SplitMix64::new(seed);
        Self {
            seed,
            disk: SimDisk::new(random.next_u64()),
            clock: ManualClock::new(Timestamp::from_unix_millis(START)),
            remotes: [Remote::new(random.next_u64()), Remote::new(random.next_u64())],
            added_in: 1 + random.index(LIVES - 1),
            known: [false; 2],
            owner: None,
            quotas: [QuotaId(0); 2],
            made: Vec::new(),
            log: Vec::new(),
            parts: 0,
            random,
        }
    }

    fn fail(&self, what: &str) -> ! {
        let from = self.log.len().saturating_sub(300);
        panic!("seed {}: {what}\nafter:\n{}", self.seed, self.log[from..].join("\n"));
    }

    fn engine(&self) -> &Engine {
        &self.owner.as_ref().expect("open within a life").engine
    }

    fn config(&mut self) -> Config {
        let batch_size = 1 + self.random.index(30);
        Config::default()
            .lanes(2)
            .lane_records(64)
            .shards(2)
            .journal_file_bytes(64 << 10)
            .snapshot_journal_bytes(64 << 10)
            .sync_interval(Duration::from_secs(60))
            .backpressure_deadline(Duration::ZERO)
            .dedup_window(Duration::from_hours(7 * 24))
            .delivery(|it| it.batch_size(batch_size))
            .clock(Arc::new(self.clock.clone()))
    }

    /// Opens with the sinks that were added by now, or with some of them.
    fn open(&mut self, life: usize, all: bool) -> bool {
        let mut sinks: Vec<NamedSink> = Vec::new();
        let mut attached = [false; 2];
        for (index, added_in) in [0, self.added_in].into_iter().enumerate() {
            // Nothing is recorded before the first sink is known.
            let must = all || index == 0 && !self.known[0];
            if life >= added_in && (must || self.random.index(4) > 0) {
                attached[index] = true;
                sinks.push((format!("sink-{index}"), Box::new(self.remotes[index].sink())));
            }
        }
        let storage = self.disk.storage();
        let config = self.config();
        let opened = Owner::open_at_rest_with(&storage, config, sinks).and_then(|owner| {
            let lifetime = Quota::new("lifetime", 1 << 40).decimals(1);
            let minute = Quota::new("minute", 1 << 40).window(Window::Minute);
            let quotas = [owner.engine.define(&lifetime)?, owner.engine.define(&minute)?];
            Ok((owner, quotas))
        });
        self.log.push(format!("open with {attached:?}: {:?}", opened.as_ref().err()));
        match opened {
            _ if self.disk.has_crashed() => {
                drop(opened);
                false
            }
            Ok((owner, quotas)) => {
                (self.owner, self.quotas) = (Some(owner), quotas);
                self.known[0] |= attached[0];
                self.known[1] |= attached[1];
                true
            }
            Err(error) => self.fail(&format!("refused: {error}")),
        }
    }

    fn live(&mut self, life: usize) {
        if self.random.index(3) > 0 {
            let nth = self.random.index(400) as u64;
            let parts = u8::try_from(self.random.index(256)).expect("a byte");
            self.log.push(format!("crash at call {nth}, within a write after {parts}/256"));
            self.disk.crash_within(nth, parts);
        }
        for remote in &self.remotes {
            let mood = [Mood::Works, Mood::Fails, Mood::Fails, Mood::Down][self.random.index(4)];
            remote.set_mood(mood);
            self.log.push(format!("{mood:?}"));
        }
        if self.open(life, false) {
            for _ in 0..30 + self.random.index(150) {
                self.step();
                if self.disk.has_crashed() {
                    break;
                }
            }
        }
        self.die();
    }

    fn step(&mut self) {
        prefer(self.random.index(2));
        let result = match self.random.index(100) {
            0..45 => return self.record_new(),
            45..52 => return self.record_again(),
            52..56 => {
                self.clock.advance(Duration::from_secs(40));
                return;
            }
            56..72 => {
                self.engine().serve_sinks();
                self.log.push("serve".to_owned());
                return;
            }
            72..76 => self.engine().step(Step::Drain),
            76..80 => self.engine().step(Step::Append),
            80..86 => self.engine().step(Step::Files),
            86..92 => self.engine().step(Step::Sync).inspect(|()| self.log.push("sync".to_owned())),
            _ => self.engine().snapshot().inspect(|()| self.log.push("snapshot".to_owned())),
        };
        match result {
            _ if self.disk.has_crashed() => {}
            Ok(()) if self.log.last().is_some_and(|last| last == "sync" || last == "snapshot") => {
                self.log.push("durable".to_owned());
                for made in &mut self.made {
                    if let Fate::Acknowledged { is_synced } = &mut made.fate {
                        *is_synced = true;
                    }
                }
            }
            Ok(()) => self.log.push("step".to_owned()),
            Err(error) if error.is_disk_full() => {}
            Err(error) => self.fail(&error.to_string()),
        }
    }

    fn record_new(&mut self) {
        let number = self.made.len();
        let value = (1 + self.random.index(50)) as f64;
        let quota = self.quotas[self.random.index(2)];
        let time = Timestamp::from_unix_millis(self.random.next_u64() % START);
        let mut event = UsageEvent::new(self.random.next_u64() % USERS, quota, value, time)
            .metadata("number", number.to_string());
        if self.random.index(3) == 0 {
            event = event.request_id(self.random.next_u64().into());
        }
        if self.random.index(4) == 0 {
            event = event.metadata("text", "ü".repeat(self.random.index(500)));
        }
        self.made.push(Made { event, fate: Fate::Refused, sinks: self.known });
        self.record(number);
    }

    /// A request that was made before.
    fn record_again(&mut self) {
        let with_id = |(number, made): (usize, &Made)| made.event.request_id.map(|_| number);
        let numbers: Vec<_> = self.made.iter().enumerate().filter_map(with_id).collect();
        if !numbers.is_empty() {
            let number = numbers[self.random.index(numbers.len())];
            self.record(number);
        }
    }

    fn record(&mut self, number: usize) {
        let made = self.made[number].clone();
        let result = self.engine().record(&made.event);
        self.log.push(format!("record {number} {made:?} -> {:?}", result.as_ref().err()));
        self.made[number].fate = match (result, made.fate) {
            (Ok(_), fate @ Fate::Acknowledged { .. }) => fate,
            (_, fate @ Fate::Acknowledged { .. }) if self.disk.has_crashed() => fate,
            _ if self.disk.has_crashed() => Fate::Open,
            (Ok(_), _) => Fate::Acknowledged { is_synced: false },
            (Err(Error::Backpressure { .. }), Fate::Refused | Fate::Open) => made.fate,
            (Err(error), _) => self.fail(&error.to_string()),
        };
    }

    fn die(&mut self) {
        let owner = self.owner.take();
        let is_power_cut = self.random.index(3) == 0;
        if !self.disk.has_crashed()
            && self.random.index(3) == 0
            && let Some(owner) = &owner
        {
            let closed = owner.close();
            self.log.push(format!("close: {closed:?}"));
        }
        self.log.push(format!("end: power cut {is_power_cut}"));
        if is_power_cut {
            self.disk.power_cut();
            for made in &mut self.made {
                if made.fate == (Fate::Acknowledged { is_synced: false }) {
                    made.fate = Fate::Open;
                }
            }
        } else {
            self.disk.kill();
        }
        drop(owner);
        self.disk.clear_faults();
        let names = self.disk.file_names();
        self.parts += names.iter().filter(|name| name.starts_with("backlog")).count();
    }

    /// All sinks work and are given everything.
    fn finish(&mut self) {
        for remote in &self.remotes {
            remote.set_mood(Mood::Works);
        }
        assert!(self.open(LIVES, true));
        self.engine().sync().unwrap();
        for _ in 0..5000 {
            if self.engine().sinks().iter().all(|sink| sink.lag_batches == 0) {
                break;
            }
            self.engine().serve_sinks();
        }
        for status in self.engine().sinks() {
            if status.lag_batches > 0 {
                self.fail(&format!("{status:?}"));
            }
        }
        for index in 0..2 {
            self.compare(index);
        }
        self.owner = None;
    }

    fn compare(&self, index: usize) {
        let store = &self.remotes[index].store;
        let mut found = vec![0_u64; self.made.len()];
        let mut sums: BTreeMap<(u64, &str), i128> = BTreeMap::new();
        let rows = store.events();
        for row in &rows {
            let number: usize = row.event.metadata["number"].parse().unwrap();
            found[number] += 1;
            if self.made[number].event != row.event {
                self.fail(&format!("sink {index} has {row:?}, not {:?}", self.made[number]));
            }
            let decimals = if &*row.name == "lifetime" { 1 } else { 0 };
            let units = i128::from(units_from_f64(row.event.value, decimals).unwrap());
            *sums.entry((row.event.user, &row.name)).or_default() += units;
        }
        for (number, (made, &found)) in self.made.iter().zip(&found).enumerate() {
            let expected = match made.fate {
                Fate::Refused => 0..=0,
                Fate::Acknowledged { .. } if made.sinks[index] => 1..=1,
                _ => 0..=1,
            };
            if !expected.contains(&found) {
                self.fail(&format!("sink {index} has event {number} {found} times: {made:?}"));
            }
        }
        // The second has totals of what was recorded before it came.
        if index == 0 {
            let mut totals: BTreeMap<(u64, &str), i128> = BTreeMap::new();
            let rows = store.rows();
            for ((user, name, _), row) in &rows {
                *totals.entry((*user, name)).or_default() += row.used;
            }
            if totals != sums {
                self.fail(&format!("totals {totals:?}, events {sums:?}"));
            }
        }
    }
}

#[test]
fn in_the_end_every_sink_has_each_event_once() {
    let first = number("TOLLGATE_SIM_SEED");
    let default = if first.is_some() { 1 } else { RUNS };
    let runs = number("TOLLGATE_SIM_RUNS").unwrap_or(default);
    let first = first.unwrap_or(1);
    let (mut parts, mut acknowledged, mut open) = (0, 0, 0);
    for seed in first..first + runs {
        let mut world = World::new(seed);
        for life in 0..LIVES {
            world.live(life);
        }
        world.finish();
        parts += world.parts as u64;
        let is_open = |made: &&Made| made.fate == Fate::Open;
        open += world.made.iter().filter(is_open).count() as u64;
        let is_acknowledged = |made: &&Made| matches!(made.fate, Fate::Acknowledged { .. });
        acknowledged += world.made.iter().filter(is_acknowledged).count() as u64;
    }
    // The lives meet what they are there for.
    let least = if runs < 100 { 0 } else { runs };
    assert!(
        parts >= least && acknowledged >= least * 10 && open >= least,
        "{parts} parts of backlogs, {acknowledged} events acknowledged, {open} under way or lost"
    );
}
