//! Random operations, restarts and window changes against a sequential model of a page.
//!
//! Proves: what the engine answers is what a map of numbers would answer, across windows, limits,
//! refunds, handles, snapshots and reopenings, with rings, journal files and snapshots so small
//! that every bound is met often.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use tollgate::{Consume, Error, ManualClock, Quota, QuotaId, Timestamp, Tollgate, Window};

use crate::support::small;

const START: u64 = 1_767_225_600_000; // 2026-01-01T00:00:00Z
const USERS: u64 = 6;
const LIMITS: [u64; 3] = [10, 40, 25];
const WINDOWS: [Window; 3] = [Window::Lifetime, Window::Minute, Window::Day];

#[derive(Debug, Clone)]
enum Step {
    TryConsume { user: u64, quota: usize, amount: u64, by_handle: bool },
    Consume { user: u64, quota: usize, amount: u64, by_handle: bool },
    ConsumeSync { user: u64, quota: usize, amount: u64 },
    ConsumeBatch { items: Vec<(u64, usize, u64)> },
    Check { user: u64, quota: usize, amount: u64 },
    Refund { user: u64, quota: usize, amount: u64 },
    SetLimit { user: u64, quota: usize, limit: u64 },
    ClearLimit { user: u64, quota: usize },
    Redefine { quota: usize, limit: u64 },
    Advance { seconds: u64 },
    Sync,
    Snapshot,
    Reopen { by_drop: bool },
}

fn steps() -> impl Strategy<Value = Step> {
    let (user, quota) = (|| 0..USERS, || 0..WINDOWS.len());
    prop_oneof![
        6 => (user(), quota(), 1_u64..15, any::<bool>()).prop_map(|(user, quota, amount, by_handle)| {
            Step::TryConsume { user, quota, amount, by_handle }
        }),
        4 => (user(), quota(), 1_u64..15, any::<bool>()).prop_map(|(user, quota, amount, by_handle)| {
            Step::Consume { user, quota, amount, by_handle }
        }),
        1 => (user(), quota(), 1_u64..15)
            .prop_map(|(user, quota, amount)| Step::ConsumeSync { user, quota, amount }),
        1 => proptest::collection::vec((user(), quota(), 1_u64..9), 0..6)
            .prop_map(|items| Step::ConsumeBatch { items }),
        3 => (user(), quota(), 1_u64..30)
            .prop_map(|(user, quota, amount)| Step::Check { user, quota, amount }),
        3 => (user(), quota(), 1_u64..20)
            .prop_map(|(user, quota, amount)| Step::Refund { user, quota, amount }),
        1 => (user(), quota(), 0_u64..60)
            .prop_map(|(user, quota, limit)| Step::SetLimit { user, quota, limit }),
        1 => (user(), quota()).prop_map(|(user, quota)| Step::ClearLimit { user, quota }),
        1 => (quota(), 5_u64..60).prop_map(|(quota, limit)| Step::Redefine { quota, limit }),
        2 => prop_oneof![1_u64..100, 3_000_u64..200_000].prop_map(|seconds| Step::Advance { seconds }),
        1 => Just(Step::Sync),
        1 => Just(Step::Snapshot),
        1 => any::<bool>().prop_map(|by_drop| Step::Reopen { by_drop }),
    ]
}

/// What the engine should do, one step at a time.
#[derive(Debug, Default)]
struct Model {
    now: u64,
    used: HashMap<(u64, usize), (u64, u64)>,
    limits: HashMap<(u64, usize), u64>,
    defaults: Vec<u64>,
}

impl Model {
    fn window(&self, quota: usize) -> u64 {
        let ms = START + self.now * 1000;
        match WINDOWS[quota] {
            Window::Minute => ms / 60_000 * 60_000,
            Window::Day => ms / 86_400_000 * 86_400_000,
            _ => 0,
        }
    }

    fn used(&self, user: u64, quota: usize) -> u64 {
        match self.used.get(&(user, quota)) {
            Some(&(window, used)) if window == self.window(quota) => used,
            _ => 0,
        }
    }

    fn set_used(&mut self, user: u64, quota: usize, used: u64) {
        let window = self.window(quota);
        self.used.insert((user, quota), (window, used));
    }

    fn limit(&self, user: u64, quota: usize) -> u64 {
        self.limits.get(&(user, quota)).copied().unwrap_or(self.defaults[quota])
    }

    fn admits(&self, user: u64, quota: usize, amount: u64) -> bool {
        self.used(user, quota) + amount <= self.limit(user, quota)
    }
}

struct World {
    dir: tempfile::TempDir,
    clock: ManualClock,
    gate: Option<Tollgate>,
    ids: Vec<QuotaId>,
}

impl World {
    fn gate(&self) -> &Tollgate {
        self.gate.as_ref().expect("open between steps")
    }

    fn open(&mut self) {
        let config = small().clock(Arc::new(self.clock.clone()));
        self.gate = Some(Tollgate::open(self.dir.path(), config).expect("the directory opens"));
    }

    fn step(&mut self, model: &mut Model, step: Step) -> Result<(), TestCaseError> {
        match step {
            Step::TryConsume { user, quota, amount, by_handle } => {
                let id = self.ids[quota];
                let decision = if by_handle {
                    self.gate().counter(user, id).expect("defined").try_consume(amount)
                } else {
                    self.gate().try_consume(user, id, amount)
                };
                let decision = decision.expect("there is room in the log");
                prop_assert_eq!(decision.is_allowed(), model.admits(user, quota, amount));
                if decision.is_allowed() {
                    model.set_used(user, quota, model.used(user, quota) + amount);
                }
                prop_assert_eq!(decision.used, model.used(user, quota));
                prop_assert_eq!(decision.limit, model.limit(user, quota));
            }
            Step::Consume { user, quota, amount, by_handle } => {
                let id = self.ids[quota];
                let usage = if by_handle {
                    self.gate().counter(user, id).expect("defined").consume(amount)
                } else {
                    self.gate().consume(user, id, amount)
                };
                model.set_used(user, quota, model.used(user, quota) + amount);
                prop_assert_eq!(usage.expect("there is room").used, model.used(user, quota));
            }
            Step::ConsumeSync { user, quota, amount } => {
                let usage = self.gate().consume_sync(user, self.ids[quota], amount);
                model.set_used(user, quota, model.used(user, quota) + amount);
                prop_assert_eq!(usage.expect("the disk works").used, model.used(user, quota));
            }
            Step::ConsumeBatch { items } => {
                let batch: Vec<_> = items
                    .iter()
                    .map(|&(user, quota, amount)| Consume { user, quota: self.ids[quota], amount })
                    .collect();
                let usages = self.gate().consume_batch(&batch).expect("there is room");
                for (&(user, quota, amount), usage) in items.iter().zip(usages) {
                    model.set_used(user, quota, model.used(user, quota) + amount);
                    prop_assert_eq!(usage.used, model.used(user, quota));
                }
            }
            Step::Check { user, quota, amount } => {
                let decision = self.gate().check(user, self.ids[quota], amount).expect("defined");
                prop_assert_eq!(decision.is_allowed(), model.admits(user, quota, amount));
                prop_assert_eq!(decision.used, model.used(user, quota));
            }
            Step::Refund { user, quota, amount } => {
                let given =
                    self.gate().refund(user, self.ids[quota], amount).expect("there is room");
                let used = model.used(user, quota);
                prop_assert_eq!(given, amount.min(used));
                model.set_used(user, quota, used - given);
            }
            Step::SetLimit { user, quota, limit } => {
                self.gate().set_limit(user, self.ids[quota], limit).expect("the disk works");
                model.limits.insert((user, quota), limit);
            }
            Step::ClearLimit { user, quota } => {
                self.gate().clear_limit(user, self.ids[quota]).expect("the disk works");
                model.limits.remove(&(user, quota));
            }
            Step::Redefine { quota, limit } => {
                let id = self.gate().define(definition(quota, limit)).expect("the same meaning");
                prop_assert_eq!(id, self.ids[quota]);
                model.defaults[quota] = limit;
            }
            Step::Advance { seconds } => {
                self.clock.advance(Duration::from_secs(seconds));
                model.now += seconds;
            }
            Step::Sync => self.gate().sync().expect("the disk works"),
            Step::Snapshot => self.gate().snapshot().expect("the disk works"),
            Step::Reopen { by_drop } => {
                let gate = self.gate.take().expect("open between steps");
                if by_drop {
                    drop(gate);
                } else {
                    gate.close().expect("the disk works");
                    prop_assert!(matches!(gate.try_consume(0, self.ids[0], 1), Err(Error::Closed)));
                    drop(gate);
                }
                self.open();
            }
        }
        Ok(())
    }

    fn compare(&self, model: &Model) -> Result<(), TestCaseError> {
        for user in 0..USERS {
            for quota in 0..WINDOWS.len() {
                let usage = self.gate().usage(user, self.ids[quota]).expect("defined");
                prop_assert_eq!(
                    usage.used,
                    model.used(user, quota),
                    "user {} quota {}",
                    user,
                    quota
                );
                prop_assert_eq!(usage.limit, model.limit(user, quota));
            }
        }
        Ok(())
    }
}

fn definition(quota: usize, limit: u64) -> Quota {
    Quota::new(format!("quota-{quota}"), limit).window(WINDOWS[quota])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn the_engine_agrees_with_the_model(steps in proptest::collection::vec(steps(), 1..250)) {
        let clock = ManualClock::new(Timestamp::from_unix_millis(START));
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut world = World { dir, clock, gate: None, ids: Vec::new() };
        world.open();
        world.ids = (0..WINDOWS.len())
            .map(|quota| world.gate().define(definition(quota, LIMITS[quota])).expect("valid"))
            .collect();
        let mut model = Model { defaults: LIMITS.to_vec(), ..Model::default() };
        for step in steps {
            world.step(&mut model, step)?;
        }
        world.compare(&model)?;
        world.gate = None;
        world.open();
        world.compare(&model)?;
    }
}
