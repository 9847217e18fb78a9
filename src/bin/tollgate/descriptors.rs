//! File descriptors: each connection takes one, and so do the engine's files.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::output::complain;

/// What is kept for the engine's files, its sinks and the server's own.
const RESERVED: u64 = 128;

/// How many connections there can be at a time: as many as wished for, or as the limit of open
/// files allows once it is raised as far as the process may.
pub(crate) fn connections(wished: u32) -> usize {
    let wished = u64::from(wished);
    let limit = open_files_max();
    let slots = wished.min(limit.saturating_sub(RESERVED)).max(1);
    if slots < wished {
        complain(format_args!(
            "{limit} files may be open (ulimit -n): {slots} connections at a time, not {wished}"
        ));
    }
    usize::try_from(slots).unwrap_or(1)
}

/// Raises the soft limit to the hard one, and says what it is then.
fn open_files_max() -> u64 {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    // No limit is the highest one.
    let [current, maximum] = [current, maximum].map(|limit| limit.unwrap_or(u64::MAX));
    let raised = Rlimit { current: Some(maximum), maximum: Some(maximum) };
    match setrlimit(Resource::Nofile, raised) {
        Ok(()) => maximum,
        Err(_) => current,
    }
}
