//! What must be found in a directory after a death, and whether it is.

use std::path::Path;

use tollgate::Tollgate;

use super::{
    ADJUSTED, ADJUSTED_MAX, COUNTERS, Count, LIMIT, Open, PAIR, PER_MINUTE, Page, QUOTAS, Tally,
    UNLIMITED, USERS, open, quotas, split,
};

/// What died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    /// The process: all that was acknowledged is there.
    Process,
    /// The machine: what a completed sync covered is there.
    Power,
}

impl Level {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Process => "process",
            Self::Power => "power",
        }
    }

    pub(crate) fn named(name: &str) -> Self {
        if name == Self::Process.name() { Self::Process } else { Self::Power }
    }
}

/// What was found, and is as it may be.
#[derive(Debug)]
pub(crate) struct Found {
    used: Vec<u64>,
    /// Units that had to be there, beyond those that were there before.
    promised: u64,
}

/// What recovery says it has found, and as what it is counted.
const FINDINGS: [(&str, Count); 3] = [
    ("the journal ends here", Count::TornBatches),
    ("does not verify, but record", Count::Gaps),
    ("so the journal held it and has lost it", Count::Laps),
];

/// Looks at a directory that was just opened after a death.
pub(crate) fn examine(gate: &Tollgate, page: &Page, level: Level) -> Result<Found, String> {
    let report = gate.recovery_report();
    // A process that is killed in a write leaves a part of it.
    let is_torn = |finding: &tollgate::Finding| finding.what.starts_with("the journal ends here");
    let is_sound = report.findings.iter().all(is_torn) && report.corrected == 0;
    if level == Level::Process && !is_sound {
        return Err(format!("the death of a process left damage: {report:?}"));
    }
    if !report.created && report.machine_restarted != (level == Level::Power) {
        return Err(format!("the death of the {} was taken for another: {report:?}", level.name()));
    }
    for finding in &report.findings {
        let kind = FINDINGS.into_iter().find(|(part, _)| finding.what.contains(part));
        page.count(kind.map_or(Count::OtherFindings, |(_, kind)| kind), 1);
    }
    examine_counters(gate, page, level)
}

/// Whether all counters and limits are what they may be, and none passes its limit.
pub(crate) fn examine_counters(
    gate: &Tollgate,
    page: &Page,
    level: Level,
) -> Result<Found, String> {
    let ids = quotas(gate).map_err(|error| format!("the quotas can't be defined: {error}"))?;
    let usage = |counter| {
        let (user, quota) = split(counter);
        gate.usage(user, ids[quota]).expect("it is defined")
    };
    let [one, other] = PAIR.map(|counter| usage(counter).used);
    if one != other {
        return Err(format!("of two counters that change together one has {one}, one {other}"));
    }
    let default = gate.quota(ids[ADJUSTED]).expect("it is defined").limit();
    if !page.limit(None).contains(&default) {
        return Err(format!("the default limit is {default}, not of {:?}", page.limit(None)));
    }
    for user in 0..USERS {
        let limit = usage(user * QUOTAS + ADJUSTED).limit;
        let own = if limit % 2 == 1 { limit } else { 0 };
        let may_be = page.limit(Some(user));
        if !may_be.contains(&own) || (own == 0 && limit != default) {
            return Err(format!("the limit of {user} is {limit}, not of {may_be:?} or {default}"));
        }
    }
    let used: Vec<_> = (0..COUNTERS).map(|counter| usage(counter).used).collect();
    let mut promised = 0;
    for (counter, &used) in used.iter().enumerate() {
        promised += judge(page, level, counter, used)?;
    }
    Ok(Found { used, promised })
}

/// Whether a counter is what it may be. Returns how much of it had to be there.
fn judge(page: &Page, level: Level, counter: usize, used: u64) -> Result<u64, String> {
    let quota = split(counter).1;
    let window = if quota == PER_MINUTE { page.slot(page.clock()) } else { Some(0) };
    let slot = window.ok_or("the page has no place for this window")?;
    let base = if slot == 0 { page.base(counter) } else { 0 };
    let [added, refunded] =
        [Tally::Added, Tally::Refunded].map(|tally| page.sum(counter, slot, tally));
    let [adding, refunding, unplaced] =
        [Open::Add, Open::Refund, Open::RefundUnplaced].map(|open| page.open_amount(counter, open));
    let [durable, given_back] = match level {
        Level::Process => [added, refunded],
        Level::Power => page.durable(counter, slot),
    };
    let least = (base + durable).saturating_sub(refunded + refunding + unplaced);
    let most = (base + added + adding).saturating_sub(given_back);
    if used < least || used > most {
        return Err(format!(
            "counter {counter} has {used}, should have {least}..={most} (began with {base}; added \
             {added}, {durable} of it durable, {adding} open; given back {refunded}, {given_back} \
             of it durable, {refunding} open, {unplaced} in one window or another)"
        ));
    }
    // Refunds that loss of power took back, while others used what they had freed.
    let lost = refunded + refunding + unplaced - given_back.min(refunded);
    let allowance = if level == Level::Power { lost } else { 0 };
    let limit = if quota == ADJUSTED { ADJUSTED_MAX } else { LIMIT };
    if quota != UNLIMITED && used > limit.max(base) + allowance {
        return Err(format!("counter {counter} has {used} above {limit}, refunds lost {lost}"));
    }
    Ok(least.saturating_sub(base))
}

/// Makes what was found after a death the new start.
pub(crate) fn settle(gate: &Tollgate, page: &Page, level: Level, found: &Found) {
    if level == Level::Power {
        page.doubt_answers();
    }
    let adjusted = gate.quota_by_name("adjusted").expect("it is defined");
    let own = |user: usize| {
        let limit = gate.usage(split(user * QUOTAS).0, adjusted).expect("it is defined").limit;
        if limit % 2 == 1 { limit } else { 0 }
    };
    let default = gate.quota(adjusted).expect("it is defined").limit();
    let limits = (0..USERS).map(|user| (Some(user), own(user)));
    for (user, limit) in limits.chain([(None, default)]) {
        page.acknowledge_limit(user, limit);
        page.ask_limit(user, limit);
    }
    page.rebase(&found.used);
    page.count(Count::Recoveries, 1);
    page.count(Count::Promised, found.promised);
}

/// Recovers twice, the second time with a snapshot merged in between, and looks at every counter.
pub(crate) fn examine_twice(
    dir: &Path,
    page: &Page,
    level: Level,
    seed: u64,
) -> Result<(), String> {
    let refused = |error| format!("the directory does not open: {error}");
    let life = open(dir, page, seed).map_err(refused)?;
    let found = examine(&life.gate, page, level)?;
    settle(&life.gate, page, level, &found);
    if seed.is_multiple_of(2) {
        life.gate.snapshot().map_err(|error| format!("no snapshot: {error}"))?;
    }
    drop(life);
    let life = open(dir, page, seed ^ 1).map_err(refused)?;
    // Nothing happened in between: nothing else may be found.
    examine(&life.gate, page, Level::Process).map_err(|what| format!("opened again, {what}"))?;
    life.gate.close().map_err(|error| format!("it does not close: {error}"))
}
