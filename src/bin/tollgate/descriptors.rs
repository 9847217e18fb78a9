//! File descriptors: each connection takes one, and so do the engine's files.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::output::complain;

/// What is kept for the engine's files, its sinks and the server's own: a journal that is about to
/// be merged has some 200 files open, and twice as many after many short lives.
const RESERVED: u64 = 512;

/// How many connections there can be at a time: as many as wished for, or as the limit of open
/// files allows once it is raised as far as the process may.
pub(crate) fn connections(wished: u32) -> usize {
    let wished = u64::from(wished);
    let limit = open_files_max();
    let slots = slots(wished, limit);
    if slots < wished {
        complain(format_args!(
            "{limit} files may be open (ulimit -n): {slots} connections at a time, not {wished}"
        ));
    }
    usize::try_from(slots).unwrap_or(1)
}

/// Where few files may be open, half of them are connections.
fn slots(wished: u64, limit: u64) -> u64 {
    wished.min(limit - RESERVED.min(limit / 2)).max(1)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_engine_keeps_its_descriptors() {
        let cases = [
            (u64::MAX, 1024),
            (1536, 1024),
            (1535, 1023),
            (1024, 512),
            (1023, 512),
            (256, 128),
            (1, 1),
            (0, 1),
        ];
        for (limit, expected) in cases {
            assert_eq!(slots(1024, limit), expected, "{limit}");
        }
        assert_eq!(slots(16, 256), 16);
    }
}
