//! Hints to the processor about memory that is needed soon.
#![allow(unsafe_code, reason = "the instruction is reached through inline assembly")]

/// Asks the processor to fetch the cache line at `place`, which is about to be written. Any address
/// will do: one that is not there is left alone.
#[inline(always)]
pub(crate) fn for_write<T>(place: *const T) {
    // By inline assembly: the intrinsic asks for reading where the build does not name the feature,
    // which every processor has that has what `Word` needs.
    #[cfg(all(target_arch = "x86_64", not(loom), not(miri)))]
    // SAFETY: a hint, which faults on no address and changes no register or flag.
    unsafe {
        std::arch::asm!(
            "prefetchw byte ptr [{place}]",
            place = in(reg) place,
            options(nostack, preserves_flags, readonly),
        );
    }
    #[cfg(not(all(target_arch = "x86_64", not(loom), not(miri))))]
    let _ = place;
}

/// Asks the processor to fetch the cache line at `place`, which is about to be read. Others that
/// have it keep it. Any address will do.
#[inline(always)]
pub(crate) fn for_read<T>(place: *const T) {
    #[cfg(all(target_arch = "x86_64", not(loom), not(miri)))]
    // SAFETY: as for `for_write`.
    unsafe {
        std::arch::asm!(
            "prefetcht0 byte ptr [{place}]",
            place = in(reg) place,
            options(nostack, preserves_flags, readonly),
        );
    }
    #[cfg(not(all(target_arch = "x86_64", not(loom), not(miri))))]
    let _ = place;
}
