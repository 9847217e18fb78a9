//! Memory in huge pages.
//!
//! A look-up at random in tens of megabytes misses the processor's table of pages more often than
//! its caches, and a virtual machine walks two trees of tables for each. Memory in pages of 2 MiB
//! has few enough entries. The system makes them by itself where it is told to, but slowly;
//! `MADV_COLLAPSE` (Linux 6.1) moves what lies in a block into one page at once.
#![allow(unsafe_code, reason = "the system is asked by a call that takes an address")]

use std::ops::Range;

/// The size of a huge page, and of the blocks that become one.
pub(crate) const BLOCK_BYTES: usize = 2 << 20;

/// One in so many bytes of a block must be in use for it to become a huge page.
const USED_PART: usize = 4;

/// The addresses of the blocks in which enough is in use, given what is, in any order.
pub(crate) fn blocks(mut used: Vec<Range<usize>>) -> Vec<usize> {
    used.sort_unstable_by_key(|range| range.start);
    // Each block with how many of its bytes are in use; ascending, as the ranges are.
    let mut blocks: Vec<(usize, usize)> = Vec::new();
    for range in used {
        let mut from = range.start;
        while from < range.end {
            let block = from / BLOCK_BYTES * BLOCK_BYTES;
            let to = range.end.min(block + BLOCK_BYTES);
            match blocks.last_mut() {
                Some((last, bytes)) if *last == block => *bytes += to - from,
                _ => blocks.push((block, to - from)),
            }
            from = to;
        }
    }
    blocks.retain(|&(_, bytes)| bytes >= BLOCK_BYTES / USED_PART);
    blocks.into_iter().map(|(block, _)| block).collect()
}

/// Moves the block at this address into a huge page. It may be in use meanwhile, and what it holds
/// stays. Whether it is in one now: not where the system has none to give, or knows no such call.
#[cfg(all(target_os = "linux", not(miri)))]
pub(crate) fn collapse(block: usize) -> bool {
    let place = std::ptr::without_provenance_mut(block);
    // SAFETY: changes how memory is mapped and not what it holds, and returns an error where
    // nothing is mapped.
    let result = unsafe { libc::madvise(place, BLOCK_BYTES, libc::MADV_COLLAPSE) };
    result == 0
}

/// Elsewhere memory stays as it is.
#[cfg(not(all(target_os = "linux", not(miri))))]
pub(crate) fn collapse(_: usize) -> bool {
    false
}

/// Room for so many values, in huge pages where it is large enough and the system has some.
pub(crate) fn with_capacity<T>(capacity: usize) -> Vec<T> {
    let values: Vec<T> = Vec::with_capacity(capacity);
    let start = values.as_ptr().addr();
    let blocks = start.next_multiple_of(BLOCK_BYTES)..start + capacity * size_of::<T>();
    if blocks.end > blocks.start + BLOCK_BYTES {
        prefer(blocks.start, (blocks.end - blocks.start) / BLOCK_BYTES * BLOCK_BYTES);
    }
    values
}

/// Asks for huge pages where nothing was stored yet.
#[cfg(all(target_os = "linux", not(miri)))]
fn prefer(start: usize, bytes: usize) {
    let place = std::ptr::without_provenance_mut(start);
    // SAFETY: as in `collapse`.
    unsafe { libc::madvise(place, bytes, libc::MADV_HUGEPAGE) };
}

/// Elsewhere memory comes as it comes.
#[cfg(not(all(target_os = "linux", not(miri))))]
fn prefer(_: usize, _: usize) {}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_those_with_enough_in_use() {
        let at = |block: usize, part: usize| block * BLOCK_BYTES + part * (BLOCK_BYTES / 8);
        let used = vec![
            // Over the end of a block into the next but one.
            at(9, 7)..at(11, 1),
            // A quarter, in two pieces, given out of order.
            at(4, 6)..at(4, 7),
            at(4, 1)..at(4, 2),
            at(5, 0)..at(5, 1),
        ];
        assert_eq!(blocks(used), [at(4, 0), at(10, 0)]);
        assert!(blocks(Vec::new()).is_empty());
    }

    #[test]
    fn what_is_collapsed_stays_as_it_is() {
        let mut words = with_capacity(BLOCK_BYTES);
        words.extend(0..BLOCK_BYTES);
        let bytes = words.as_ptr_range();
        let used = bytes.start.addr()..bytes.end.addr();
        for block in blocks(Vec::from([used])) {
            collapse(block);
        }
        assert!(words.iter().copied().eq(0..BLOCK_BYTES));
        assert!(!collapse(0), "nothing is there");
    }
}
