//! Besides what the entry function checks: reading takes memory in proportion to the file.
#![no_main]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts what is allocated, and the most that ever was. Relaxed: one thread.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller's promises are handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are handed on.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// The disk's images, the blocks decoded, and all content twice, for comparison: a sum takes 48
/// bytes in memory and 2 in the file.
const FACTOR: usize = 256;
const BASE: usize = 2 << 20;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    tollgate::fuzzing::snapshot(data);
    let taken = PEAK.load(Ordering::Relaxed) - before;
    assert!(taken <= BASE + FACTOR * data.len(), "{taken} bytes for a file of {}", data.len());
});
