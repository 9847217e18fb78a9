//! A 128-bit word that changes by compare-and-swap.
//!
//! On x86-64 it uses `cmpxchg16b`, inline: the crates that offer it detect it at run time, behind a
//! function pointer, which costs more than the instruction saves. Every x86-64 processor since 2006
//! has it; [`is_supported`] is called once, at open. Elsewhere `portable-atomic` provides the word.
#![allow(unsafe_code, reason = "the instruction is reached through inline assembly")]

#[cfg(not(all(target_arch = "x86_64", not(loom), not(miri))))]
pub(crate) use portable::Word;
#[cfg(all(target_arch = "x86_64", not(loom), not(miri)))]
pub(crate) use x86_64::{Word, is_supported};

#[cfg(all(target_arch = "x86_64", not(loom), not(miri)))]
mod x86_64 {
    use std::arch::asm;
    use std::cell::UnsafeCell;
    use std::fmt;

    /// Whether this processor has the instruction.
    pub(crate) fn is_supported() -> bool {
        std::arch::is_x86_feature_detected!("cmpxchg16b")
    }

    /// The word. Aligned as the instruction asks for.
    #[repr(C, align(16))]
    pub(crate) struct Word(UnsafeCell<u128>);

    // SAFETY: the word is read and written by single instructions that are atomic, and by nothing
    // else once it is shared.
    unsafe impl Sync for Word {}

    impl Word {
        pub(crate) const fn new(value: u128) -> Self {
            Self(UnsafeCell::new(value))
        }

        /// Both halves, each whole, but maybe not of one instant: good for a first guess.
        #[inline(always)]
        pub(crate) fn guess(&self) -> u128 {
            let (low, high): (u64, u64);
            // SAFETY: the word is alive and aligned; both loads lie within it, and an aligned load
            // of 64 bits is atomic.
            unsafe {
                asm!(
                    "mov {low}, qword ptr [{word}]",
                    "mov {high}, qword ptr [{word} + 8]",
                    word = in(reg) self.0.get(),
                    low = out(reg) low,
                    high = lateout(reg) high,
                    options(nostack, preserves_flags, readonly),
                );
            }
            u128::from(low) | u128::from(high) << 64
        }

        /// Stores the lower half in one store; the upper half stays. A thread that sees this store
        /// sees what was stored before it.
        #[inline(always)]
        pub(crate) fn store_lower(&self, low: u64) {
            // SAFETY: the word is alive, aligned and writable; an aligned store of 64 bits is
            // atomic, and the instruction comes after what was stored before it, as all stores do.
            unsafe {
                asm!(
                    "mov qword ptr [{word}], {low}",
                    word = in(reg) self.0.get(),
                    low = in(reg) low,
                    options(nostack, preserves_flags),
                );
            }
        }

        /// Swaps `new` in for `current`; the value found instead where that is not what is there.
        /// A full barrier.
        #[inline(always)]
        pub(crate) fn compare_exchange(&self, current: u128, new: u128) -> Result<(), u128> {
            #[expect(clippy::cast_possible_truncation, reason = "the halves are meant")]
            let [current_low, current_high, new_low, new_high] =
                [current as u64, (current >> 64) as u64, new as u64, (new >> 64) as u64];
            let (low, high): (u64, u64);
            let is_swapped: u8;
            // SAFETY: the word is alive, aligned to 16 bytes and writable, and the processor has
            // the instruction (checked at open). rbx, which the compiler keeps for itself, is
            // restored.
            unsafe {
                asm!(
                    "xchg {new_low}, rbx",
                    "lock cmpxchg16b xmmword ptr [rdi]",
                    "sete cl",
                    "mov rbx, {new_low}",
                    new_low = inout(reg) new_low => _,
                    in("rcx") new_high,
                    lateout("cl") is_swapped,
                    inout("rax") current_low => low,
                    inout("rdx") current_high => high,
                    // Named, so that it is not rbx.
                    in("rdi") self.0.get(),
                    options(nostack),
                );
            }
            if is_swapped != 0 { Ok(()) } else { Err(u128::from(low) | u128::from(high) << 64) }
        }
    }

    impl fmt::Debug for Word {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "{:#034x}", self.guess())
        }
    }
}

#[cfg(not(all(target_arch = "x86_64", not(loom), not(miri))))]
mod portable {
    use crate::sync::{AtomicU128, Ordering};

    /// The word.
    #[derive(Debug)]
    pub(crate) struct Word(AtomicU128);

    impl Word {
        pub(crate) fn new(value: u128) -> Self {
            Self(AtomicU128::new(value))
        }

        /// The halves, maybe not of one instant: as the other one's, so that models show what comes
        /// of that.
        #[cfg(loom)]
        pub(crate) fn guess(&self) -> u128 {
            let low = self.0.load(Ordering::Relaxed) & u128::from(u64::MAX);
            let high = self.0.load(Ordering::Relaxed) & !u128::from(u64::MAX);
            low | high
        }

        /// The value: here of one instant.
        #[cfg(not(loom))]
        #[inline]
        pub(crate) fn guess(&self) -> u128 {
            // Acquire: pairs with the Releases below. What was stored before the state that is
            // seen, such as a reservation whose units are in it, is seen too.
            self.0.load(Ordering::Acquire)
        }

        /// Stores the lower half; the upper stays. Nobody else changes the word meanwhile.
        #[inline]
        pub(crate) fn store_lower(&self, low: u64) {
            // Relaxed: it is the caller's, who has swapped it last.
            let high = self.0.load(Ordering::Relaxed) & !u128::from(u64::MAX);
            // Release: pairs with the Acquire in `compare_exchange`, and with whoever reads it.
            self.0.store(high | u128::from(low), Ordering::Release);
        }

        /// Swaps `new` in for `current`; the value found instead where that is not what is there.
        #[inline]
        pub(crate) fn compare_exchange(&self, current: u128, new: u128) -> Result<(), u128> {
            // Acquire and Release: pair with each other. What is given back is in the log before
            // anybody can take it again. Acquire where it fails: as in `guess`.
            self.0.compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire).map(|_| ())
        }
    }
}

#[cfg(not(all(target_arch = "x86_64", not(loom), not(miri))))]
/// Whether this processor has what the word needs: always.
pub(crate) fn is_supported() -> bool {
    true
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn halves_are_swapped_together_or_not_at_all() {
        let old = 0x1122_3344_5566_7788_99aa_bbcc_ddee_ff00;
        let new = u128::MAX - 5;
        let word = Word::new(old);
        assert_eq!(word.guess(), old);
        assert_eq!(word.compare_exchange(old ^ 1, new), Err(old));
        assert_eq!(word.compare_exchange(old ^ 1 << 64, new), Err(old));
        assert_eq!(word.compare_exchange(old, new), Ok(()));
        assert_eq!(word.guess(), new);
        word.store_lower(7);
        assert_eq!(word.guess(), new & !u128::from(u64::MAX) | 7);
    }

    #[test]
    fn racing_threads_lose_no_increment_of_either_half() {
        const EACH: u128 = 50_000;
        let word = Word::new(0);
        std::thread::scope(|scope| {
            for step in [1, 1 << 64, 1 | 1 << 64] {
                let word = &word;
                scope.spawn(move || {
                    for _ in 0..EACH {
                        let mut seen = word.guess();
                        while let Err(now) = word.compare_exchange(seen, seen + step) {
                            seen = now;
                        }
                    }
                });
            }
        });
        assert_eq!(word.guess(), (2 * EACH) | ((2 * EACH) << 64));
    }
}
