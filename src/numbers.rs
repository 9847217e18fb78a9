//! The numbers that batches, records, generations and files have, and how file names show them.

/// No number of a batch, a record, a generation or a file gets so far. A larger one was made up,
/// and those who go on from a smaller one can add to it.
pub(crate) const NUMBER_MAX: u64 = 1 << 62;

/// The number in a file's name, which has so many digits; `None` where no file of ours has it.
pub(crate) fn number_in_name(digits: &str, width: usize) -> Option<u64> {
    let is_plain = digits.len() == width && digits.bytes().all(|byte| byte.is_ascii_digit());
    digits.parse().ok().filter(|&number| is_plain && number <= NUMBER_MAX)
}
