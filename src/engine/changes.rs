//! Operations that are rare and wait for the disk: definitions, limits, syncs, snapshots. And
//! queries about them.

use crate::admission::quotas::QUOTAS_MAX;
use crate::engine::{Counted, Engine, HalfDefined};
use crate::error::{Error, Resource, Result};
use crate::flush::commit::Target;
use crate::journal::cold::ColdEvent;
use crate::model::{AMOUNT_MAX, Definition, Quota, QuotaId, WindowStart};

/// At most this many definitions and limits wait for the journal.
const COLD_WAITING_MAX: usize = 1 << 16;

/// What becomes of a quota that has the name already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Defined {
    Changes,
    Stays,
}

impl Engine {
    /// Defines a quota, or changes the default limit of a defined one. Durable when it returns.
    pub(crate) fn define(&self, quota: &Quota) -> Result<QuotaId> {
        self.define_over(quota, Defined::Changes)
    }

    /// Defines a quota where none has its name. Durable when it returns.
    pub(crate) fn define_if_absent(&self, quota: &Quota) -> Result<QuotaId> {
        self.define_over(quota, Defined::Stays)
    }

    fn define_over(&self, quota: &Quota, defined: Defined) -> Result<QuotaId> {
        quota.validate()?;
        self.require_open()?;
        let mut half_defined = self.half_defined.lock();
        let earlier = self.define_half_defined(&mut half_defined);
        let known = self.quota_by_name(quota.name()).and_then(|id| self.quotas.get(id));
        let definition = match known {
            Some(state)
                if defined == Defined::Changes && !state.definition().same_meaning(quota) =>
            {
                return Err(Error::InvalidQuota {
                    name: quota.name().to_owned(),
                    reason:
                        "it is defined with another window, offset or decimals, which what was \
                             counted depends on; choose another name"
                            .to_owned(),
                });
            }
            Some(state)
                if defined == Defined::Stays
                    || (state.limit(), state.overrun())
                        == (quota.limit(), quota.overrun_policy()) =>
            {
                // The definition may be another caller's that still waits for the disk.
                let id = state.definition().id;
                drop(half_defined);
                self.wait_for_change(self.committer.last_cold())?;
                return Ok(id);
            }
            Some(state) => Definition {
                limit: quota.limit(),
                overrun: quota.overrun_policy(),
                ..state.definition().clone()
            },
            None => {
                // Its id would be the next quota's, too.
                earlier.map_err(|error| match &*half_defined {
                    Some(half) if half.definition.name == quota.name() => unknown(error),
                    _ => error,
                })?;
                let count = self.quotas.iter().count();
                let id = u16::try_from(count)
                    .ok()
                    .filter(|&id| usize::from(id) < QUOTAS_MAX)
                    .ok_or(Error::TooMany { what: Resource::Quotas, bound: QUOTAS_MAX as u64 })?;
                Definition::new(QuotaId::from_u16(id), quota)?
            }
        };
        let id = definition.id;
        let now = self.clock.refresh();
        let event = ColdEvent::Define(definition.clone());
        let target = if known.is_some() {
            self.change(event, || self.quotas.define(definition, WindowStart(0), now))?
        } else {
            // Whoever finds it can use it at once, and what is used must have been defined.
            let (target, written) = self.committer.write_cold(&event)?;
            *half_defined = Some(HalfDefined { target, definition });
            let defined = written.and_then(|()| self.define_half_defined(&mut half_defined));
            defined.map_err(unknown)?;
            target
        };
        drop(half_defined);
        self.wait_for_change(target)?;
        Ok(id)
    }

    /// Makes the quota usable whose definition was on its way to the journal, once it is there.
    fn define_half_defined(&self, half_defined: &mut Option<HalfDefined>) -> Result<()> {
        let Some(HalfDefined { target, definition }) = half_defined.take() else { return Ok(()) };
        if let Err(error) = self.committer.append_cold(target) {
            *half_defined = Some(HalfDefined { target, definition });
            return Err(error);
        }
        let (name, id) = (definition.name.clone(), definition.id);
        self.quotas.define(definition, WindowStart(0), self.clock.now());
        // Only now: whoever finds it by its name can use it.
        self.names.write().insert(name, id);
        Ok(())
    }

    /// Sets or clears a user's limit. Durable when it returns.
    pub(crate) fn set_limit(&self, counter: &Counted<'_>, limit: Option<u64>) -> Result<()> {
        if let Some(limit) = limit.filter(|&limit| limit > AMOUNT_MAX) {
            return Err(Error::InvalidLimit(limit));
        }
        self.require_open()?;
        let user = counter.user;
        let quota = counter.quota.definition().id.as_u16();
        let event = match limit {
            Some(limit) => ColdEvent::SetLimit { user, quota, limit },
            None => ColdEvent::ClearLimit { user, quota },
        };
        // Before the drain's lock, under which nobody may wait for the map: a writer waits for all
        // who read there.
        let mut shared = limit.map(|_| self.share(counter)).transpose()?;
        let target = {
            // From the look on, or one that is set meanwhile would outlast a later clear.
            let _changing = self.limits_changing.lock();
            let is_there = || self.table.find(counter.key(), |live| live.has_own_limit());
            if limit.is_none() && is_there() == Some(true) {
                shared = Some(self.share(counter)?);
            }
            self.change(event, || {
                if let Some(handle) = &shared {
                    handle.cell().set_limit(limit);
                }
            })?
        };
        self.wait_for_change(target)
    }

    /// The user's own limit, if there is one.
    pub(crate) fn own_limit(&self, counter: &Counted<'_>) -> Option<u64> {
        // No limit is so large: it is the default of none.
        let limit = self.find_cell(counter, |live| live.limit(u64::MAX))?;
        (limit <= AMOUNT_MAX).then_some(limit)
    }

    fn change(&self, event: ColdEvent, apply: impl FnOnce()) -> Result<Target> {
        if self.committer.cold_waiting() >= COLD_WAITING_MAX {
            let what = Resource::WaitingChanges;
            return Err(Error::TooMany { what, bound: COLD_WAITING_MAX as u64 });
        }
        self.committer.take_cold(event, apply)
    }

    fn wait_for_change(&self, target: Target) -> Result<()> {
        self.committer.wait_durable(target).map_err(unknown)
    }

    /// [`refuse_when_closed`](Self::refuse_when_closed), also in a forked process: for operations
    /// that wait for the disk. Others do without the system call.
    fn require_open(&self) -> Result<()> {
        self.committer.check_process()?;
        self.refuse_when_closed()
    }

    pub(super) fn refuse_when_closed(&self) -> Result<()> {
        if self.lanes.is_closed() { Err(Error::Closed) } else { Ok(()) }
    }

    /// Everything acknowledged before the call survives loss of power when it returns.
    pub(crate) fn sync(&self) -> Result<()> {
        self.require_open()?;
        self.committer.commit()
    }

    /// Writes a snapshot of everything acknowledged before the call.
    pub(crate) fn snapshot(&self) -> Result<()> {
        self.require_open()?;
        self.committer.commit()?;
        let merged = self.compactor.run(&mut |_| self.refuse_when_closed());
        self.show_merge(merged.as_ref().err());
        merged
    }

    /// The quota as it was defined, with the default limit that applies now.
    pub(crate) fn describe(&self, id: QuotaId) -> Result<Quota> {
        let state = self.quota(id)?;
        let (limit, overrun) = (state.limit(), state.overrun());
        Ok(Definition { limit, overrun, ..state.definition().clone() }.quota())
    }

    pub(crate) fn quota_by_name(&self, name: &str) -> Option<QuotaId> {
        self.names.read().get(name).copied()
    }

    pub(crate) fn quota_ids(&self) -> Vec<QuotaId> {
        self.quotas.iter().map(|quota| quota.definition().id).collect()
    }
}

/// Of a change that was handed over, and that this failure keeps from the disk.
fn unknown(failure: Error) -> Error {
    Error::OutcomeUnknown { source: Box::new(failure) }
}
