//! Memory in huge pages.
//!
//! A look-up at random in tens of megabytes misses the processor's table of pages more often than
//! its caches, and a virtual machine walks two trees of tables for each. Memory in pages of 2 MiB
//! has few enough entries. It is asked for when the memory is taken, before anything is stored
//! there: to move what lies somewhere already (`MADV_COLLAPSE`) holds up whoever touches it, by
//! milliseconds.
#![allow(unsafe_code, reason = "the system is asked by a call that takes an address")]

/// The size of a huge page, and what it is aligned to.
const PAGE_BYTES: usize = 2 << 20;

/// Room for so many values, in huge pages where it is large enough and the system has some.
pub(crate) fn with_capacity<T>(capacity: usize) -> Vec<T> {
    let values: Vec<T> = Vec::with_capacity(capacity);
    let start = values.as_ptr().addr();
    let end = start + capacity * size_of::<T>();
    let first = start.next_multiple_of(PAGE_BYTES);
    let pages = end.saturating_sub(first) / PAGE_BYTES;
    if pages > 0 {
        prefer(first, pages * PAGE_BYTES);
    }
    values
}

/// Asks for huge pages where nothing was stored yet.
#[cfg(all(target_os = "linux", not(miri)))]
fn prefer(start: usize, bytes: usize) {
    let place = std::ptr::without_provenance_mut(start);
    // SAFETY: changes how memory is mapped and not what it holds, and returns an error where
    // nothing is mapped.
    let asked = unsafe { rustix::mm::madvise(place, bytes, rustix::mm::Advice::LinuxHugepage) };
    if let Err(error) = asked {
        tracing::debug!(%error, "no huge pages: look-ups will be slower");
    }
}

/// Elsewhere memory comes as it comes.
#[cfg(not(all(target_os = "linux", not(miri))))]
fn prefer(_: usize, _: usize) {}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    #[test]
    fn there_is_room_for_as_many_as_asked_for() {
        for capacity in [0, 1, PAGE_BYTES / 8, PAGE_BYTES] {
            let mut words = with_capacity(capacity);
            assert!(words.capacity() >= capacity);
            words.extend(0..capacity);
            assert!(words.iter().copied().eq(0..capacity));
        }
        assert!(with_capacity::<()>(5).capacity() >= 5);
    }
}
