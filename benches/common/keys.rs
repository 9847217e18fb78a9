//! Which user each operation is for. Drawn beforehand, from fixed seeds: every contestant gets the
//! same keys, in every run.

/// How the users are distributed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Users {
    /// Each as likely as any other.
    Uniform(u32),
    /// The k-th in proportion to 1 / k^0.99, in no order of their numbers.
    Zipf(u32),
    /// One for all.
    One,
}

const ZIPF_EXPONENT: f64 = 0.99;

impl Users {
    pub(crate) fn count(self) -> u32 {
        match self {
            Self::Uniform(count) | Self::Zipf(count) => count,
            Self::One => 1,
        }
    }

    /// `count` users, drawn at random.
    pub(crate) fn draw(self, count: usize, seed: u64) -> Vec<u32> {
        let mut random = Random::new(seed);
        match self {
            Self::Uniform(users) => (0..count).map(|_| random.below(users)).collect(),
            Self::Zipf(users) => {
                let ranks = Ranks::new(users);
                (0..count).map(|_| ranks.draw(&mut random)).collect()
            }
            Self::One => vec![0; count],
        }
    }

    /// A sequence for each thread.
    pub(crate) fn draw_for_threads(self, threads: usize, count: usize) -> Vec<Vec<u32>> {
        (0..threads).map(|thread| self.draw(count, 1 + thread as u64)).collect()
    }
}

/// The distribution of Zipf, by its cumulative weights.
struct Ranks {
    cumulative: Vec<f64>,
    /// Which user has which rank: neighbours in rank should not be neighbours in memory.
    users: Vec<u32>,
}

impl Ranks {
    fn new(users: u32) -> Self {
        let mut total = 0.0;
        let weigh = |rank: u32| {
            total += f64::from(rank).powf(-ZIPF_EXPONENT);
            total
        };
        let cumulative = (1..=users).map(weigh).collect();
        let mut shuffled: Vec<u32> = (0..users).collect();
        let mut random = Random::new(0x5EED);
        for last in (1..shuffled.len()).rev() {
            let other = random.below(u32::try_from(last + 1).unwrap_or(u32::MAX));
            shuffled.swap(last, other as usize);
        }
        Self { cumulative, users: shuffled }
    }

    fn draw(&self, random: &mut Random) -> u32 {
        let total = self.cumulative.last().copied().unwrap_or_default();
        let point = random.unit() * total;
        let rank = self.cumulative.partition_point(|&sum| sum <= point);
        self.users[rank.min(self.users.len() - 1)]
    }
}

/// SplitMix64: good enough to draw keys.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        word ^ (word >> 31)
    }

    /// Below `bound`, by multiplication: the bias is far below what matters here.
    pub(crate) fn below(&mut self, bound: u32) -> u32 {
        (((self.next() >> 32) * u64::from(bound)) >> 32) as u32
    }

    /// From 0 up to, without, 1.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }
}
