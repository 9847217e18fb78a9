//! CRC32C (Castagnoli) over 64-bit words, for slots: a few words each, on the hot path.
//!
//! The processor's instruction does a word in three cycles, where `crc32fast`, made for large
//! blocks, takes 14 ns for a slot. On x86-64 there is no fallback: testing for the instruction at
//! each slot, and the overhead of a call, would cost more than the check itself. Elsewhere a table
//! is used.
#![allow(unsafe_code, reason = "the processor's CRC instruction is reached through assembly")]

use crate::error::{Error, Result};

/// That this processor can do it, and how: asked once, since asking costs as much as a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Crc32c {
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    by_instruction: bool,
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    _detected: (),
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
impl Crc32c {
    /// # Errors
    /// `UnsupportedProcessor` without SSE 4.2.
    pub(crate) fn detect() -> Result<Self> {
        if std::arch::is_x86_feature_detected!("sse4.2") {
            Ok(Self { _detected: () })
        } else {
            Err(Error::UnsupportedProcessor { lacks: "crc32 (SSE 4.2)" })
        }
    }

    /// Continues `crc` over words, each in little-endian order.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the instruction clears the upper half")]
    pub(crate) fn of<const N: usize>(self, crc: u32, words: [u64; N]) -> u32 {
        words.into_iter().fold(u64::from(crc), instruction) as u32
    }
}

#[cfg(not(all(target_arch = "x86_64", not(miri))))]
impl Crc32c {
    /// # Errors
    /// None here.
    #[expect(clippy::unnecessary_wraps, reason = "as on x86-64")]
    pub(crate) fn detect() -> Result<Self> {
        #[cfg(target_arch = "aarch64")]
        let by_instruction = std::arch::is_aarch64_feature_detected!("crc");
        #[cfg(not(target_arch = "aarch64"))]
        let by_instruction = false;
        Ok(Self { by_instruction })
    }

    /// Continues `crc` over words, each in little-endian order.
    #[inline(always)]
    pub(crate) fn of<const N: usize>(self, crc: u32, words: [u64; N]) -> u32 {
        if self.by_instruction {
            words.into_iter().fold(crc, instruction)
        } else {
            words.into_iter().fold(crc, software)
        }
    }
}

/// Inline assembly: a function with the target feature would not be inlined into its callers.
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[inline(always)]
fn instruction(crc: u64, word: u64) -> u64 {
    let mut state = crc;
    // SAFETY: the processor has SSE 4.2, as `detect` has checked, without which there is no
    // `Crc32c` to call this; registers only.
    unsafe {
        std::arch::asm!(
            "crc32 {state}, {word}",
            state = inout(reg) state,
            word = in(reg) word,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    state
}

#[cfg(target_arch = "aarch64")]
#[inline(always)]
fn instruction(crc: u32, word: u64) -> u32 {
    let mut state = crc;
    // SAFETY: the processor has the CRC extension, as `detect` has checked; registers only.
    unsafe {
        std::arch::asm!(
            ".arch_extension crc",
            "crc32cx {state:w}, {state:w}, {word:x}",
            state = inout(reg) state,
            word = in(reg) word,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    state
}

#[cfg(not(any(all(target_arch = "x86_64", not(miri)), target_arch = "aarch64")))]
fn instruction(crc: u32, word: u64) -> u32 {
    software(crc, word)
}

#[cfg(any(test, not(all(target_arch = "x86_64", not(miri)))))]
#[expect(clippy::cast_possible_truncation, reason = "the index is below 256")]
const TABLE: [u32; 256] = {
    const POLYNOMIAL_REVERSED: u32 = 0x82f6_3b78;
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let mut value = index as u32;
        let mut bit = 0;
        while bit < 8 {
            value = if value & 1 == 1 { (value >> 1) ^ POLYNOMIAL_REVERSED } else { value >> 1 };
            bit += 1;
        }
        table[index] = value;
        index += 1;
    }
    table
};

/// A word at a time, so that callers keep what they pass in registers.
#[cfg(any(test, not(all(target_arch = "x86_64", not(miri)))))]
#[cold]
fn software(crc: u32, word: u64) -> u32 {
    let mut state = crc;
    for byte in word.to_le_bytes() {
        state = TABLE[usize::from((state & 0xff) as u8 ^ byte)] ^ (state >> 8);
    }
    state
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn matches_the_published_check_value() {
        // RFC 3720, B.4: 32 bytes of zeros, and of ones; initial and final complement as there.
        let crc = Crc32c::detect().expect("SSE 4.2");
        assert_eq!(!crc.of(!0, [0; 4]), 0x8a91_36aa);
        assert_eq!(!crc.of(!0, [u64::MAX; 4]), 0x62a8_ab43);
    }

    proptest! {
        #[test]
        fn the_table_agrees_with_the_instruction(crc: u32, words: [u64; 5]) {
            let by_table = words.into_iter().fold(crc, software);
            prop_assert_eq!(by_table, Crc32c::detect().expect("SSE 4.2").of(crc, words));
        }
    }
}
