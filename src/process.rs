//! Which process this is. A forked one has a copy of the memory and the parent's descriptors, but
//! neither its threads nor its rings: what was opened before the fork stays the parent's.

use crate::error::{Error, Result};

/// The process that opened something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Process(u32);

impl Process {
    /// The one that calls. A system call.
    pub(crate) fn this() -> Self {
        Self(std::process::id())
    }

    pub(crate) fn is_this(self) -> bool {
        self == Self::this()
    }

    /// An error in a process that was forked from this one.
    pub(crate) fn check(self) -> Result<()> {
        if self.is_this() { Ok(()) } else { Err(Error::Closed) }
    }
}
