//! What a snapshot says besides sums and limits: how far it reaches, definitions, rings.

use bincode::{Decode, Encode};

use crate::codec::{DecodeResult, decode_cold, encode_cold};
use crate::journal::cold::{CAPACITY_MAX, Generation, RingRef};
use crate::journal::writer::ChainPoint;
use crate::model::{BatchNumber, Definition, QuotaId, WindowStart};
use crate::numbers::NUMBER_MAX;

/// The head of a snapshot. The order of the fields is part of the format.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Manifest {
    /// The last batch contained.
    pub(crate) number: u64,
    /// Its check.
    pub(crate) check: u32,
    /// The rings in use after that batch.
    pub(crate) generation: Generation,
    /// For each lane the number of the first record that is not contained.
    pub(crate) lanes: Vec<u64>,
    /// Ascending by id.
    pub(crate) definitions: Vec<Definition>,
    /// `(quota, window)`, ascending: nothing is kept of windows of the quota that start below
    /// `window`.
    pub(crate) floors: Vec<(u16, u64)>,
    /// When the snapshot was written, in milliseconds since 1970.
    pub(crate) created: u64,
}

impl Manifest {
    pub(crate) fn point(&self) -> ChainPoint {
        ChainPoint { number: BatchNumber(self.number), check: self.check }
    }

    pub(super) fn encode(&self) -> DecodeResult<Vec<u8>> {
        self.check()?;
        encode_cold(self)
    }

    pub(super) fn decode(bytes: &[u8]) -> DecodeResult<Self> {
        let manifest: Self = decode_cold(bytes)?;
        manifest.check()?;
        Ok(manifest)
    }

    /// Checks relations between the fields that hold in every manifest: readers rely on them.
    fn check(&self) -> DecodeResult<()> {
        check_generation(&self.generation)?;
        let rings = &self.generation.rings;
        if rings.len() != self.lanes.len()
            || rings.iter().zip(&self.lanes).any(|(ring, &next)| next < ring.base)
            || self.lanes.iter().any(|&next| next > NUMBER_MAX)
        {
            return Err("a manifest whose lanes do not match its rings");
        }
        if !self.definitions.is_sorted_by(|a, b| a.id < b.id) {
            return Err("a manifest whose definitions are out of order");
        }
        let is_defined = |quota| self.definitions.binary_search_by_key(&quota, |d| d.id).is_ok();
        if !self.floors.is_sorted_by(|a, b| a.0 < b.0)
            || !self.floors.iter().all(|&(quota, window)| {
                is_defined(QuotaId(quota)) && WindowStart(window) <= WindowStart::MAX
            })
        {
            return Err("a manifest whose floors do not match its definitions");
        }
        Ok(())
    }
}

/// Refuses rings that can't exist.
pub(crate) fn check_generation(generation: &Generation) -> DecodeResult<()> {
    if generation.rings.len() > usize::from(u16::MAX) + 1 {
        return Err("a generation with more than 65536 lanes");
    }
    if !generation.rings.iter().all(|ring| ring.capacity.is_power_of_two()) {
        return Err("a ring whose capacity is not a power of two");
    }
    let is_possible =
        |ring: &RingRef| ring.capacity <= CAPACITY_MAX && ring.base.max(ring.created) <= NUMBER_MAX;
    if generation.number > NUMBER_MAX || !generation.rings.iter().all(is_possible) {
        return Err("a generation that can't have been written");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::snapshot::testing::manifest;

    #[test]
    fn a_manifest_round_trips() {
        let manifest = manifest(7);
        assert_eq!(Manifest::decode(&manifest.encode().unwrap()).unwrap(), manifest);
    }

    #[test]
    fn what_can_not_have_been_written_is_refused() {
        let refused = |change: fn(&mut Manifest)| {
            let mut bad = manifest(7);
            change(&mut bad);
            assert!(bad.encode().is_err());
            assert!(Manifest::decode(&encode_cold(&bad).unwrap()).is_err());
        };
        refused(|bad| bad.lanes.push(0));
        refused(|bad| bad.lanes[1] = 0);
        refused(|bad| bad.generation.rings[0].capacity = 3);
        refused(|bad| bad.generation.rings[0].capacity = CAPACITY_MAX * 2);
        refused(|bad| bad.generation.rings[0].created = NUMBER_MAX + 1);
        refused(|bad| bad.generation.number = u64::MAX);
        refused(|bad| bad.lanes[0] = u64::MAX);
        refused(|bad| bad.definitions.reverse());
        refused(|bad| bad.floors.push((9, 0)));
        refused(|bad| bad.floors.push((2, WindowStart::MAX.0 + 1)));
        refused(|bad| bad.floors.push((1, 0)));
    }

    /// A count of 2^64 definitions in a few bytes must be refused before memory is asked for.
    #[test]
    fn a_huge_count_is_refused() {
        let manifest = Manifest { definitions: vec![], floors: vec![], created: 0, ..manifest(7) };
        let mut bytes = manifest.encode().unwrap();
        // The counts of definitions and floors, and when it was written, take a byte each.
        assert_eq!(bytes.split_off(bytes.len() - 3), [0, 0, 0]);
        bytes.push(253);
        bytes.extend_from_slice(&[0xff; 8]);
        assert_eq!(Manifest::decode(&bytes), Err("cold data that bincode can't decode"));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = Manifest::decode(&bytes);
        }
    }
}
