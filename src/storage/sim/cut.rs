//! What a loss of power leaves: one choice after the other.

use std::sync::Arc;

use super::{Image, SimDisk};

/// Something that a loss of power decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Choice<'a> {
    pub(crate) what: Undecided<'a>,
    /// At least two. 0 is what was durable.
    pub(crate) options: usize,
    /// The option that is what the process saw last.
    pub(crate) newest: usize,
}

/// What is to be decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Undecided<'a> {
    /// How many of the changes of names since the last sync of the directory persist.
    Names,
    /// Whether this change of a name persists, where any subset may.
    Name { file: &'a str },
    /// Which of its lengths a file has.
    Length { file: &'a str },
    /// Which of its contents a sector has.
    Sector { file: &'a str, index: usize },
}

/// Asks, where there is something to ask.
pub(super) struct Settle<'a> {
    pub(super) choose: &'a mut dyn FnMut(&Choice<'_>) -> usize,
}

impl Settle<'_> {
    pub(super) fn choose(&mut self, what: Undecided<'_>, options: usize, newest: usize) -> usize {
        if options < 2 {
            return 0;
        }
        (self.choose)(&Choice { what, options, newest }).min(options - 1)
    }
}

/// All outcomes of a loss of power, as an odometer over the choices that lead to them.
#[derive(Debug)]
pub(crate) struct Outcomes {
    image: Image,
    /// The first answers for the next one; those after them are 0. `None` when all were given.
    answers: Option<Vec<usize>>,
}

impl Outcomes {
    pub(super) fn new(image: Image) -> Self {
        Self { image, answers: Some(Vec::new()) }
    }
}

impl Iterator for Outcomes {
    type Item = Arc<SimDisk>;

    fn next(&mut self) -> Option<Self::Item> {
        let answers = self.answers.take()?;
        let disk = SimDisk::from_image(&self.image, 0);
        let mut given: Vec<(usize, usize)> = Vec::new();
        disk.power_cut_with(&mut |choice| {
            let answer = answers.get(given.len()).copied().unwrap_or(0);
            given.push((answer, choice.options));
            answer
        });
        while let Some((answer, options)) = given.pop() {
            if answer + 1 < options {
                let kept = given.iter().map(|&(answer, _)| answer);
                self.answers = Some(kept.chain([answer + 1]).collect());
                break;
            }
        }
        Some(disk)
    }
}

/// A small generator whose every seed is good (Steele, Lea, Flood 2014).
#[derive(Debug, Clone)]
pub(crate) struct SplitMix64 {
    state: u64,
}

impl SplitMix64 {
    pub(crate) fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    pub(crate) fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One of `0..bound`; 0 where there is none. The bias is below 2^-32 for bounds below 2^32.
    pub(crate) fn index(&mut self, bound: usize) -> usize {
        let scaled = u128::from(self.next_u64()) * bound as u128;
        usize::try_from(scaled >> 64).unwrap_or_default()
    }
}
