//! When requests are due.

/// A load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Load {
    Low,
    High,
    /// Low, then twice as high as high, then low again: a third of the time each.
    Burst,
}

impl Load {
    pub(crate) const ALL: [Self; 3] = [Self::Low, Self::High, Self::Burst];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Low => "100/s",
            Self::High => "1,000/s",
            Self::Burst => "burst 100-2,000/s",
        }
    }

    /// How long a run takes. A p99 is the tail of a hundredth of the requests: at the lowest rate it
    /// takes longest to see some tens of these.
    pub(crate) fn seconds(self) -> u64 {
        match self {
            Self::Low => 30,
            Self::High | Self::Burst => 6,
        }
    }

    /// The instants, in nanoseconds from the start, of a run that takes so long.
    pub(crate) fn dues(self, seconds: u64) -> Vec<u64> {
        let rates: &[u64] = match self {
            Self::Low => &[100],
            Self::High => &[1_000],
            Self::Burst => &[100, 2_000, 100],
        };
        let phase_nanos = seconds * 1_000_000_000 / rates.len() as u64;
        let phase = |(number, rate): (usize, &u64)| {
            let (begin, between) = (number as u64 * phase_nanos, 1_000_000_000 / rate);
            (0..phase_nanos / between).map(move |request| begin + request * between)
        };
        rates.iter().enumerate().flat_map(phase).collect()
    }
}
