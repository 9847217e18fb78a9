//! Calls that fail on command.

/// The kinds of calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    /// Every one of the others.
    Any,
    /// Every one that a file system refuses which has become read-only.
    Change,
    List,
    Create,
    Open,
    Map,
    Length,
    Read,
    Write,
    Allocate,
    Sync,
    Rename,
    Remove,
    SyncDirectory,
}

/// What happens to the call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// EIO, without effect.
    Eio,
    /// ENOSPC, without effect.
    Enospc,
    /// A write writes so many of its bytes, then EIO. Other calls: as `Eio`.
    ShortWrite(usize),
    /// A sync fails with EIO, and what it should have made durable counts as clean from then on, as
    /// in Linux: reads still show it, the next sync says OK, and a loss of power reveals that it
    /// was never stored. Written again, it has a new chance. Other calls: as `Eio`.
    LoseUnsynced,
    /// The process dies; see [`crash_at`](super::SimDisk::crash_at).
    Crash,
    /// The process dies in a write of which so many of 256 parts are there, in whole sectors. Other
    /// calls: as `Crash`.
    CrashWithin(u8),
}

/// A call that fails.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault {
    call: Call,
    /// On files whose name starts so.
    name: &'static str,
    /// Counted over such calls from the injection on; 0 is the next.
    nth: u64,
    outcome: Outcome,
    is_lasting: bool,
}

impl Call {
    fn includes(self, call: Self) -> bool {
        match self {
            Self::Any => true,
            Self::Change => {
                !matches!(call, Self::List | Self::Open | Self::Map | Self::Length | Self::Read)
            }
            kind => kind == call,
        }
    }
}

impl Fault {
    /// The `nth` call of the kind from now on (0 is the next one), on whatever file.
    pub(crate) fn new(call: Call, nth: u64, outcome: Outcome) -> Self {
        Self { call, name: "", nth, outcome, is_lasting: false }
    }

    /// All such calls after it fail too, until the faults are cleared.
    pub(crate) fn lasting(self) -> Self {
        Self { is_lasting: true, ..self }
    }

    /// Only calls on files whose name starts with `name` count; for a rename it is the old name.
    /// Calls on an open file go by the name that it was opened by.
    pub(crate) fn on(self, name: &'static str) -> Self {
        Self { name, ..self }
    }
}

/// The faults to come.
#[derive(Debug, Default)]
pub(super) struct Faults {
    calls: u64,
    /// `nth` counts down.
    armed: Vec<Fault>,
}

impl Faults {
    pub(super) fn inject(&mut self, fault: Fault) {
        self.armed.push(fault);
    }

    pub(super) fn clear(&mut self) {
        self.armed.clear();
    }

    pub(super) fn calls(&self) -> u64 {
        self.calls
    }

    /// Counts a call, and says what happens to it. Of several faults on one call, the first
    /// injected wins; all that do not last are used up.
    pub(super) fn meet(&mut self, call: Call, name: &str) -> Option<Outcome> {
        self.calls += 1;
        let mut outcome = None;
        self.armed.retain_mut(|fault| {
            if !fault.call.includes(call) || !name.starts_with(fault.name) {
                return true;
            }
            if fault.nth == 0 {
                outcome = outcome.or(Some(fault.outcome));
                return fault.is_lasting;
            }
            fault.nth -= 1;
            true
        });
        outcome
    }
}
