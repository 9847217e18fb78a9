//! CRC32C (Castagnoli) over 64-bit words, for slots: a few words each, on the hot path.
//!
//! The processor's instruction does a word in three cycles where `crc32fast`, made for large
//! blocks, takes 14 ns for a slot. The table is the fallback where the instruction is missing.
#![allow(unsafe_code, reason = "the processor's CRC instruction is reached through intrinsics")]

/// Continues `crc` over words, each in little-endian order.
#[inline]
pub(crate) fn crc32c<const N: usize>(crc: u32, words: [u64; N]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("sse4.2") {
        // SAFETY: the processor has SSE 4.2, as just checked.
        return unsafe { hardware(crc, words) };
    }
    #[cfg(target_arch = "aarch64")]
    if std::arch::is_aarch64_feature_detected!("crc") {
        // SAFETY: the processor has the CRC extension, as just checked.
        return unsafe { hardware(crc, words) };
    }
    software(crc, words)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse4.2")]
#[inline]
fn hardware<const N: usize>(crc: u32, words: [u64; N]) -> u32 {
    let mut state = u64::from(crc);
    for word in words {
        state = std::arch::x86_64::_mm_crc32_u64(state, word);
    }
    // The instruction leaves the upper half zero.
    #[expect(clippy::cast_possible_truncation, reason = "the upper half is zero")]
    let crc = state as u32;
    crc
}

#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "crc")]
#[inline]
fn hardware<const N: usize>(crc: u32, words: [u64; N]) -> u32 {
    words.into_iter().fold(crc, |state, word| std::arch::aarch64::__crc32cd(state, word))
}

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

fn software<const N: usize>(crc: u32, words: [u64; N]) -> u32 {
    let mut state = crc;
    for byte in words.into_iter().flat_map(u64::to_le_bytes) {
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
        assert_eq!(!crc32c(!0, [0; 4]), 0x8a91_36aa);
        assert_eq!(!crc32c(!0, [u64::MAX; 4]), 0x62a8_ab43);
    }

    proptest! {
        #[test]
        fn the_table_agrees_with_the_instruction(crc: u32, words: [u64; 5]) {
            prop_assert_eq!(software(crc, words), crc32c(crc, words));
        }
    }
}
