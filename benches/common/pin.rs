//! Which core a thread runs on.

use std::thread;

use rustix::thread::{CpuSet, sched_setaffinity};

/// Keeps the calling thread on one core; threads that it starts inherit that. On a machine without
/// such a core the thread stays where it is allowed to be.
pub(crate) fn pin(core: usize) {
    if core < cores() {
        let mut set = CpuSet::new();
        set.set(core);
        sched_setaffinity(None, &set).expect("a core that exists can be asked for");
    }
}

/// Keeps the calling thread, and those that it starts from now on, off the cores of so many
/// callers, which are pinned from core 0 on; where these take all cores it may run anywhere.
pub(crate) fn keep_off(callers: usize) {
    let mut set = CpuSet::new();
    let free = if callers < cores() { callers } else { 0 };
    (free..cores()).for_each(|core| set.set(core));
    sched_setaffinity(None, &set).expect("cores that exist can be asked for");
}

/// Runs `work` on a thread of its own, pinned to `core`, and waits for it.
pub(crate) fn on_core<T: Send>(core: usize, work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            pin(core);
            work()
        });
        worker.join().expect("the pinned thread does not panic")
    })
}

/// How many cores there are. Asked once: what is pinned would get a smaller answer later.
pub(crate) fn cores() -> usize {
    static CORES: std::sync::OnceLock<usize> = std::sync::OnceLock::new();
    *CORES.get_or_init(|| thread::available_parallelism().map_or(1, usize::from))
}
