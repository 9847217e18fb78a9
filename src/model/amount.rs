//! Floating point at the edge: everything inside counts in integers.

use super::AMOUNT_MAX;
use crate::error::{Error, Result};

/// The most decimals of a quota: 10^18 is the largest power of ten below [`AMOUNT_MAX`].
pub(crate) const DECIMALS_MAX: u8 = 18;

const MANTISSA_BITS: u32 = f64::MANTISSA_DIGITS - 1;
const EXPONENT_MAX: u64 = 0x7ff;
/// What the stored exponent of a number is above the exponent of its mantissa's last bit.
const EXPONENT_BIAS: i32 = 1075;
/// A mantissa (53 bits) times the largest power of ten (60 bits) has fewer bits than this.
const SCALED_BITS_MAX: u32 = 114;

/// The units of 10^-`decimals` nearest to `value`; a tie goes to the even number of units.
///
/// The value is taken for what its bits say (0.285 is slightly less than 285/1000), and is rounded
/// once: the product with the power of ten is exact.
pub(crate) fn units_from_f64(value: f64, decimals: u8) -> Result<u64> {
    let refuse = |reason| Err(Error::InvalidFloat { value, decimals, reason });
    if decimals > DECIMALS_MAX {
        return refuse("there are at most 18 decimals");
    }
    if value.is_nan() {
        return refuse("it is not a number");
    }
    if value.is_infinite() {
        return refuse("it is infinite");
    }
    if value < 0.0 {
        return refuse("it is negative");
    }
    if value == 0.0 {
        return Ok(0);
    }
    match scaled(value, decimals) {
        Some(0) => refuse("it rounds to zero units"),
        Some(units) if units <= AMOUNT_MAX => Ok(units),
        _ => refuse("it is more than 2^63 - 1 units"),
    }
}

/// The given number of units of 10^-`decimals` as a floating-point number: the nearest one below
/// 2^53 units, within two units in its last place beyond.
pub(crate) fn f64_from_units(units: u64, decimals: u8) -> f64 {
    // The power of ten is exact, 18 decimals need 42 bits beside the power of two; so the division
    // rounds once, and the conversion of `units` only from 2^53 on.
    units as f64 / 10_u64.pow(u32::from(decimals.min(DECIMALS_MAX))) as f64
}

/// `value` x 10^`decimals`, rounded to the nearest integer, ties to even; `None` beyond 64 bits.
/// The value is finite and positive.
fn scaled(value: f64, decimals: u8) -> Option<u64> {
    let bits = value.to_bits();
    let fraction = bits & ((1 << MANTISSA_BITS) - 1);
    let stored_exponent = (bits >> MANTISSA_BITS) & EXPONENT_MAX;
    let (mantissa, stored_exponent) = match stored_exponent {
        0 => (fraction, 1),
        normal => (fraction | 1 << MANTISSA_BITS, normal),
    };
    // value = mantissa x 2^exponent, exactly.
    let exponent = i32::try_from(stored_exponent).ok()? - EXPONENT_BIAS;
    let product = u128::from(mantissa) * 10_u128.pow(u32::from(decimals));
    let shift = exponent.unsigned_abs();
    if exponent >= 0 {
        let fits = shift < product.leading_zeros();
        return fits.then(|| product << shift).and_then(|units| u64::try_from(units).ok());
    }
    if shift > SCALED_BITS_MAX {
        // Less than half a unit.
        return Some(0);
    }
    let whole = product >> shift;
    let rest = product - (whole << shift);
    let half = 1_u128 << (shift - 1);
    let up = rest > half || (rest == half && whole % 2 == 1);
    u64::try_from(whole + u128::from(up)).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn reason(value: f64, decimals: u8) -> &'static str {
        match units_from_f64(value, decimals) {
            Err(Error::InvalidFloat { reason, .. }) => reason,
            other => panic!("{value} with {decimals} decimals: {other:?}"),
        }
    }

    #[test]
    fn what_is_no_amount_is_refused() {
        assert_eq!(reason(f64::NAN, 2), "it is not a number");
        assert_eq!(reason(f64::INFINITY, 2), "it is infinite");
        assert_eq!(reason(f64::NEG_INFINITY, 2), "it is infinite");
        assert_eq!(reason(-f64::MIN_POSITIVE, 2), "it is negative");
        assert_eq!(reason(1.0, 19), "there are at most 18 decimals");
        assert_eq!(reason(f64::MAX, 18), "it is more than 2^63 - 1 units");
        assert_eq!(reason(0.004, 2), "it rounds to zero units");
        assert_eq!(reason(f64::from_bits(1), 18), "it rounds to zero units");
        assert_eq!(units_from_f64(0.0, 2).unwrap(), 0);
        assert_eq!(units_from_f64(-0.0, 2).unwrap(), 0);
    }

    #[test]
    fn ties_go_to_the_even_unit() {
        // All of these are exact in binary.
        assert_eq!(units_from_f64(1.5, 0).unwrap(), 2);
        assert_eq!(units_from_f64(2.5, 0).unwrap(), 2);
        assert_eq!(units_from_f64(0.125, 2).unwrap(), 12);
        assert_eq!(units_from_f64(0.375, 2).unwrap(), 38);
        assert_eq!(reason(0.5, 0), "it rounds to zero units");
        assert_eq!(units_from_f64(0.5_f64.next_up(), 0).unwrap(), 1);
        assert_eq!(units_from_f64(2.5_f64.next_up(), 0).unwrap(), 3);
    }

    /// Multiplying in floating point gives 28.5 exactly for the first, and 30 units; the bits say
    /// less than that.
    #[test]
    fn values_are_rounded_once() {
        assert_eq!(units_from_f64(0.285, 2).unwrap(), 28);
        assert_eq!(units_from_f64(1.005, 2).unwrap(), 100);
        assert_eq!(units_from_f64(0.1, 18).unwrap(), 100_000_000_000_000_006);
        assert_eq!(units_from_f64(0.3, 1).unwrap(), 3);
    }

    #[test]
    fn the_largest_amounts_are_exact() {
        let two_to_63 = 9_223_372_036_854_775_808.0_f64;
        assert_eq!(reason(two_to_63, 0), "it is more than 2^63 - 1 units");
        assert_eq!(units_from_f64(two_to_63.next_down(), 0).unwrap(), (1 << 63) - 1024);
        assert_eq!(reason(2.0 * two_to_63, 0), "it is more than 2^63 - 1 units");
        assert_eq!(units_from_f64(9.2, 18).unwrap(), 9_199_999_999_999_999_289);
        assert_eq!(reason(9.3, 18), "it is more than 2^63 - 1 units");
    }

    /// The decimal expansion that the standard library prints is exact; rounds it as text.
    fn rounded_text(value: f64, decimals: u8) -> u128 {
        let text = format!("{value:.1100}");
        let (whole, fraction) = text.split_once('.').unwrap();
        let (kept, rest) = fraction.split_at(usize::from(decimals));
        let units: u128 = format!("{whole}{kept}").parse().unwrap();
        let half = format!("5{}", "0".repeat(rest.len() - 1));
        let up = match rest.cmp(half.as_str()) {
            std::cmp::Ordering::Less => false,
            std::cmp::Ordering::Equal => units % 2 == 1,
            std::cmp::Ordering::Greater => true,
        };
        units + u128::from(up)
    }

    fn assert_as_text(value: f64, decimals: u8) {
        let expected = rounded_text(value, decimals);
        match units_from_f64(value, decimals) {
            Ok(units) => assert_eq!(u128::from(units), expected, "{value:e}, {decimals}"),
            Err(_) => assert!(expected == 0 || expected > u128::from(AMOUNT_MAX), "{value:e}"),
        }
    }

    proptest! {
        #[test]
        fn rounding_agrees_with_the_decimal_expansion(
            mantissa in 1.0_f64..2.0, exponent in -80_i32..64, decimals in 0..=DECIMALS_MAX,
        ) {
            assert_as_text(mantissa * 2_f64.powi(exponent), decimals);
        }

        /// Halves of a unit of 2^-k, where ties are.
        #[test]
        fn rounding_agrees_near_ties(
            odd in 0_u32..1 << 20, decimals in 0..=DECIMALS_MAX, nudge in -1_i32..=1,
        ) {
            let tie = (2.0 * f64::from(odd) + 1.0) / 2_f64.powi(i32::from(decimals) + 1);
            let value = match nudge {
                -1 => tie.next_down(),
                1 => tie.next_up(),
                _ => tie,
            };
            assert_as_text(value, decimals);
        }

        #[test]
        fn units_survive_the_way_out_and_back(
            units in 1_u64..1 << 52, decimals in 0..=DECIMALS_MAX,
        ) {
            let value = f64_from_units(units, decimals);
            prop_assert_eq!(units_from_f64(value, decimals).unwrap(), units);
            let exact: f64 = format!("{units}e-{decimals}").parse().unwrap();
            prop_assert_eq!(value.to_bits(), exact.to_bits());
        }
    }
}
