//! Where things are, by the hash of their keys: an open-addressing table with linear probing, and
//! deletion by moving back what follows (Knuth, The Art of Computer Programming, 6.4, algorithm R).
//!
//! Not a map from a library: those keep their key tags apart from the entries, and what is
//! remembered for minutes is in none of the processor's caches. Here a look-up and the insertion
//! after it wait for one cache line together, and so does a removal.

use crate::prefetch;

/// How few slots there are, where there are any.
const SLOTS_MIN: usize = 16;

/// Leads from hashes to numbers. One number may be there under several keys' hashes, and one hash
/// may lead to several: the caller knows the keys.
#[derive(Debug, Default)]
pub(super) struct Index {
    /// A power of two, at most half of them taken; none at first.
    slots: Vec<Slot>,
    len: usize,
}

/// Free where the tag is 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Slot {
    /// Of the hash; says where its home is, too.
    tag: u32,
    number: u32,
}

impl Slot {
    const FREE: Self = Self { tag: 0, number: 0 };
}

/// The lower bits of a hash, but never 0.
fn tag_of(hash: u64) -> u32 {
    #[expect(clippy::cast_possible_truncation, reason = "the lower bits are meant")]
    let tag = hash as u32;
    tag | 1 << 31
}

impl Index {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    fn mask(&self) -> usize {
        self.slots.len().wrapping_sub(1)
    }

    fn home(&self, tag: u32) -> usize {
        tag as usize & self.mask()
    }

    /// The places of the slots with this tag, from its home on.
    fn places(&self, tag: u32) -> impl Iterator<Item = usize> {
        let (mask, home) = (self.mask(), self.home(tag));
        let slots = (0..self.slots.len()).map(move |step| (home + step) & mask);
        let taken = slots.take_while(|&place| self.slots[place] != Slot::FREE);
        taken.filter(move |&place| self.slots[place].tag == tag)
    }

    /// Says that this hash is about to be asked for, so that its line is there then.
    #[inline]
    pub(super) fn prefetch(&self, hash: u64) {
        if let Some(slot) = self.slots.get(self.home(tag_of(hash))) {
            prefetch::for_write(slot);
        }
    }

    /// The number under this hash of which `is_it` is true.
    #[inline]
    pub(super) fn find(&self, hash: u64, is_it: impl Fn(u32) -> bool) -> Option<u32> {
        let mut numbers = self.places(tag_of(hash)).map(|place| self.slots[place].number);
        numbers.find(|&number| is_it(number))
    }

    /// Puts `number` in, in place of the one under this hash of which `is_it` is true, if there is
    /// one.
    #[inline]
    pub(super) fn insert(&mut self, hash: u64, number: u32, is_it: impl Fn(u32) -> bool) {
        let tag = tag_of(hash);
        let known = self.places(tag).find(|&place| is_it(self.slots[place].number));
        if let Some(place) = known {
            self.slots[place].number = number;
            return;
        }
        self.insert_new(hash, number);
    }

    /// Puts `number` in, where none of its key is there.
    #[inline]
    pub(super) fn insert_new(&mut self, hash: u64, number: u32) {
        if self.len >= self.slots.len() / 2 {
            self.grow();
        }
        self.put(Slot { tag: tag_of(hash), number });
        self.len += 1;
    }

    fn put(&mut self, slot: Slot) {
        let mut place = self.home(slot.tag);
        while self.slots[place] != Slot::FREE {
            place = (place + 1) & self.mask();
        }
        self.slots[place] = slot;
    }

    #[cold]
    fn grow(&mut self) {
        let slots = vec![Slot::FREE; (2 * self.slots.len()).max(SLOTS_MIN)];
        for slot in std::mem::replace(&mut self.slots, slots) {
            if slot != Slot::FREE {
                self.put(slot);
            }
        }
    }

    /// Removes this number under this hash. Whether it was there.
    #[inline]
    pub(super) fn remove(&mut self, hash: u64, number: u32) -> bool {
        let found = self.places(tag_of(hash)).find(|&place| self.slots[place].number == number);
        let Some(mut free) = found else { return false };
        self.len -= 1;
        let mut place = free;
        loop {
            place = (place + 1) & self.mask();
            let slot = self.slots[place];
            if slot == Slot::FREE {
                break;
            }
            // What has come past the free slot on its way from home moves into it.
            let way = place.wrapping_sub(self.home(slot.tag)) & self.mask();
            if way >= place.wrapping_sub(free) & self.mask() {
                self.slots[free] = slot;
                free = place;
            }
        }
        self.slots[free] = Slot::FREE;
        true
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// Hashes of keys of which many share a home, also at the end of the slots, and some the tag.
    fn hash_of(key: u32) -> u64 {
        [14, 15, 0, 30, 14 + 16][key as usize % 5] + (u64::from(key / 5) << 16)
    }

    proptest! {
        #[test]
        fn it_leads_where_a_map_does(
            steps in proptest::collection::vec((0..3_u8, 0..25_u32), 0..300),
        ) {
            let mut index = Index::default();
            let mut expected = BTreeMap::new();
            // The key of each number.
            let mut keys = Vec::new();
            for (step, key) in steps {
                let hash = hash_of(key);
                let is_it = |number: u32| keys[number as usize] == key;
                prop_assert_eq!(index.find(hash, is_it), expected.get(&key).copied());
                if step == 0 {
                    let removed = expected.remove(&key);
                    let number = removed.unwrap_or(u32::MAX);
                    prop_assert_eq!(index.remove(hash, number), removed.is_some());
                } else {
                    let number = u32::try_from(keys.len()).unwrap();
                    index.insert(hash, number, is_it);
                    expected.insert(key, number);
                    keys.push(key);
                }
                prop_assert_eq!(index.len(), expected.len());
            }
            for (&key, &number) in &expected {
                let is_it = |number: u32| keys[number as usize] == key;
                prop_assert_eq!(index.find(hash_of(key), is_it), Some(number));
            }
        }
    }
}
