//! Where the values of a part are, by the hash of their keys: a look-up and the insertion after it
//! wait for one line of the processor's cache together, and to forget a value touches none.
//!
//! Values are numbered as they come. Those that a part has are a [`Span`] of numbers, and a slot
//! has the lower bits of one: the number modulo M, which is at least four times as much as there
//! may be values. So a slot tells by itself whether its value is forgotten, and is free then.
//!
//! **No value that is there is missed.** While the value with the number n is there, n - `oldest`
//! is less than `len`, and that is less than M, so that (s - `oldest`) modulo M is n - `oldest` for
//! the s = n modulo M of its slot. Until it is forgotten its slot therefore counts as taken, so
//! that nobody writes there, and leads to it. Where all of its line was taken it is in the list of
//! those that overflowed, with all of its number. The line names, modulo M, the newest of its
//! values in that list: one not older, which is there as long as this one is, and as long as it is
//! the list is asked. When lines are added all values that are there are put in again.
//!
//! **No other is taken for it.** What a slot or a line has left from long ago, or from before it
//! was first written, may be the lower bits of a number that is there by now. That takes room, or
//! costs a look at the list, until the number is forgotten. It misleads nobody, and neither does a
//! hash that looks alike: the caller compares the keys.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use crate::prefetch;

/// In a line, with its head, of 64 bytes.
const SLOTS: usize = 15;
/// So many values there may be for each line. Then one in a thousand finds its line full.
const LOAD_MAX: usize = 6;
/// Numbers modulo at least so many times the values that there may be: lines are not written
/// evenly, and a slot should be written again before its number comes again.
const NUMBERS: usize = 4;
/// A line's head has so many bits for the slot that is written next.
const NEXT_BITS: u32 = 4;
const _: () = assert!(SLOTS <= 1 << NEXT_BITS);

/// No more than so many values: their numbers leave room for those bits.
pub(super) const VALUES_MAX: usize = (1 << (u32::BITS - NEXT_BITS)) / NUMBERS - LOAD_MAX;

/// The numbers of the values that there are, counted around.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span {
    pub(super) oldest: u32,
    pub(super) len: usize,
}

impl Span {
    /// How far behind the oldest the value is whose number has these lower bits, if there is one.
    #[inline(always)]
    fn place(self, number: u32, mask: u32) -> Option<usize> {
        let place = (number.wrapping_sub(self.oldest) & mask) as usize;
        (place < self.len).then_some(place)
    }

    /// The number of the value that comes next.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "no more than `VALUES_MAX`")]
    fn next(self) -> u32 {
        self.oldest.wrapping_add(self.len as u32)
    }
}

/// Leads from hashes to places among the values.
#[derive(Debug)]
pub(super) struct Index {
    /// Never none.
    lines: Box<[Line]>,
    /// The bits of a slot that are the number's.
    mask: u32,
    /// Values that found their lines full: the oldest first, of which some may be forgotten.
    overflowed: VecDeque<Overflowed>,
}

/// A cache line. Of the lower half of a hash the upper bits say which, and the lower ones are the
/// tags of slots. (Its upper half says which part.)
///
/// The slots are written in turn, so that the next one has the oldest value of the line, and is the
/// first to be free.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line {
    /// A value's number, below the tag.
    slots: [u32; SLOTS],
    /// Of the newest value that overflowed from here the number, above the slot that is next.
    head: u32,
}

const _: () = assert!(size_of::<Line>() == 64);

#[derive(Debug)]
struct Overflowed {
    hash: u32,
    number: u32,
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the lower half is meant")]
fn lower(hash: u64) -> u32 {
    hash as u32
}

/// Which of so many lines.
#[inline(always)]
fn line_of(hash: u32, lines: usize) -> usize {
    ((u64::from(hash) * lines as u64) >> u32::BITS) as usize
}

/// The lower bits, where they lie in a slot.
#[inline(always)]
fn tag_of(hash: u32, mask: u32) -> u32 {
    hash.wrapping_mul(mask.wrapping_add(1))
}

impl Index {
    /// Of no values yet, of which the first will have the number `oldest`, with room for `values`.
    pub(super) fn new(values: usize, oldest: u32) -> Self {
        let lines = values.div_ceil(LOAD_MAX).max(1);
        let mask = (NUMBERS * LOAD_MAX * lines).next_power_of_two() - 1;
        #[expect(clippy::cast_possible_truncation, reason = "for no more than `VALUES_MAX`")]
        let mask = mask as u32;
        // The number before is the last that will be met again.
        let line = Line::new(oldest.wrapping_sub(1) & mask);
        Self { lines: vec![line; lines].into(), mask, overflowed: VecDeque::new() }
    }

    /// For how many values there is room.
    #[inline(always)]
    pub(super) fn capacity(&self) -> usize {
        LOAD_MAX * self.lines.len()
    }

    /// The place under this hash of which `is_it` is true.
    #[inline]
    pub(super) fn find(
        &self,
        hash: u64,
        span: Span,
        is_it: impl Fn(usize) -> bool,
    ) -> Option<usize> {
        let (hash, mask) = (lower(hash), self.mask);
        let line = &self.lines[line_of(hash, self.lines.len())];
        let tag = tag_of(hash, mask);
        let is_alike = |slot: u32| slot & !mask == tag;
        // Mostly none is, which a few instructions tell for all together.
        if line.slots.iter().fold(false, |any, &slot| any | is_alike(slot)) {
            let alike = line.slots.iter().filter(|&&slot| is_alike(slot));
            let found =
                alike.filter_map(|&slot| span.place(slot, mask)).find(|&place| is_it(place));
            if found.is_some() {
                return found;
            }
        }
        span.place(line.overflowed(), mask)?;
        self.find_overflowed(hash, span, is_it)
    }

    #[cold]
    fn find_overflowed(
        &self,
        hash: u32,
        span: Span,
        is_it: impl Fn(usize) -> bool,
    ) -> Option<usize> {
        let alike = self.overflowed.iter().filter(|overflowed| overflowed.hash == hash);
        let mut places = alike.filter_map(|overflowed| span.place(overflowed.number, u32::MAX));
        places.find(|&place| is_it(place))
    }

    /// Puts in the value that comes next. There is room for it.
    #[inline]
    pub(super) fn push(&mut self, hash: u64, span: Span) {
        let (hash, mask) = (lower(hash), self.mask);
        let place = line_of(hash, self.lines.len());
        let line = &mut self.lines[place];
        let mut next = line.next();
        if span.place(line.slots[next], mask).is_some() {
            // Mostly all are taken then, since they are written in turn; but this one may have been
            // left until its number came again.
            match line.free(next, span, mask) {
                Some(free) => next = free,
                None => return self.overflow(hash, span),
            }
        }
        line.slots[next] = tag_of(hash, mask) | span.next() & mask;
        line.set_next(if next == SLOTS - 1 { 0 } else { next + 1 });
    }

    #[cold]
    fn overflow(&mut self, hash: u32, span: Span) {
        let (place, number) = (line_of(hash, self.lines.len()), span.next());
        let is_forgotten = |first: &Overflowed| span.place(first.number, u32::MAX).is_none();
        while self.overflowed.front().is_some_and(is_forgotten) {
            self.overflowed.pop_front();
        }
        self.overflowed.push_back(Overflowed { hash, number });
        self.lines[place].set_overflowed(number & self.mask);
    }
}

impl Line {
    const NEXT_MASK: u32 = (1 << NEXT_BITS) - 1;

    fn new(number: u32) -> Self {
        Self { slots: [number; SLOTS], head: number << NEXT_BITS }
    }

    /// The slot that is to be written next.
    #[inline(always)]
    fn next(&self) -> usize {
        (self.head & Self::NEXT_MASK) as usize
    }

    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "there are few slots")]
    fn set_next(&mut self, next: usize) {
        self.head = self.head & !Self::NEXT_MASK | next as u32;
    }

    /// The number of the newest value that overflowed from here.
    #[inline(always)]
    fn overflowed(&self) -> u32 {
        self.head >> NEXT_BITS
    }

    fn set_overflowed(&mut self, number: u32) {
        self.head = number << NEXT_BITS | self.head & Self::NEXT_MASK;
    }

    /// A slot that is free, from `next` on around, if there is one.
    #[cold]
    fn free(&self, next: usize, span: Span, mask: u32) -> Option<usize> {
        let mut around = (next..SLOTS).chain(0..next);
        around.find(|&slot| span.place(self.slots[slot], mask).is_none())
    }
}

/// Where a part's lines are, for whoever has not yet locked it.
#[derive(Debug, Default)]
pub(super) struct Hint {
    /// Both relaxed, and maybe of different times or long out of date: only a prefetch is made of
    /// them, to which any address will do.
    lines: AtomicPtr<Line>,
    count: AtomicUsize,
}

impl Hint {
    pub(super) fn set(&self, index: &Index) {
        self.lines.store(index.lines.as_ptr().cast_mut(), Ordering::Relaxed);
        self.count.store(index.lines.len(), Ordering::Relaxed);
    }

    /// Says that this hash is about to be asked for, so that its line is there then.
    #[inline(always)]
    pub(super) fn prefetch(&self, hash: u64) {
        let line = line_of(lower(hash), self.count.load(Ordering::Relaxed));
        prefetch::for_write(self.lines.load(Ordering::Relaxed).wrapping_add(line));
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    /// An index with the keys of its values, each of which is its own hash: beyond the lower half
    /// it tells keys apart that the index can't.
    struct Keys {
        index: Index,
        oldest: u32,
        keys: VecDeque<u64>,
    }

    impl Keys {
        fn new(lines: usize, oldest: u32) -> Self {
            Self { index: Index::new(lines * LOAD_MAX, oldest), oldest, keys: VecDeque::new() }
        }

        fn span(&self) -> Span {
            Span { oldest: self.oldest, len: self.keys.len() }
        }

        fn find(&self, key: u64) -> Option<usize> {
            self.index.find(key, self.span(), |place| self.keys[place] == key)
        }

        fn push(&mut self, key: u64) {
            assert_eq!(self.find(key), None);
            self.index.push(key, self.span());
            self.keys.push_back(key);
            assert_eq!(self.find(key), Some(self.keys.len() - 1));
        }

        fn forget(&mut self, count: usize) {
            for _ in 0..count {
                let key = self.keys.pop_front().unwrap();
                self.oldest = self.oldest.wrapping_add(1);
                assert_eq!(self.find(key), None);
            }
        }

        /// Lets numbers go by, of values in the second line, until the oldest is `to`.
        fn go_on_until(&mut self, to: u32) {
            let mut key = (1 << 40) | (1 << 30);
            while self.oldest != to {
                if self.keys.len() == 8 {
                    self.forget(1);
                } else {
                    self.push(key);
                    key += 1 << 40;
                }
            }
        }

        fn assert_all_found(&self) {
            for (place, &key) in self.keys.iter().enumerate() {
                assert_eq!(self.find(key), Some(place));
            }
        }
    }

    /// Keys of one of four lines that look alike to the index, or don't.
    fn keys_of_line(line: u64) -> impl Iterator<Item = u64> {
        (0..).map(move |key| (key << 32) | (line << 30) | (key % 3))
    }

    /// What a slot holds that was never written is a number, too.
    #[test]
    fn slots_that_were_never_written_are_free_wherever_the_numbers_stand() {
        for lines in [1, 4] {
            let numbers = Index::new(lines * LOAD_MAX, 0).mask;
            for oldest in (0..=numbers + 1).chain([u32::MAX - 7]) {
                let mut keys = Keys::new(lines, oldest);
                keys_of_line(0).take(SLOTS).for_each(|key| keys.push(key));
                assert!(keys.index.overflowed.is_empty(), "{lines} {oldest}");
                keys.assert_all_found();
            }
        }
        // And nearly until the numbers come around.
        let mut keys = Keys::new(4, 0);
        keys.go_on_until(keys.index.mask - 8 - 15);
        keys_of_line(0).take(SLOTS).for_each(|key| keys.push(key));
        assert!(keys.index.overflowed.is_empty());
        keys.assert_all_found();
    }

    #[test]
    fn what_finds_its_line_full_is_found_until_it_is_forgotten() {
        let mut keys = Keys::new(4, u32::MAX - 12);
        let mut of_line = keys_of_line(2);
        of_line.by_ref().take(SLOTS + 5).for_each(|key| keys.push(key));
        assert_eq!(keys.index.overflowed.len(), 5);
        keys.assert_all_found();
        keys.forget(1);
        // Into the free slot; beside it the next one has no room.
        of_line.by_ref().take(2).for_each(|key| keys.push(key));
        assert_eq!(keys.index.overflowed.len(), 6);
        keys.assert_all_found();
        keys.forget(SLOTS + 1);
        keys.assert_all_found();
        of_line.by_ref().take(SLOTS).for_each(|key| keys.push(key));
        keys.assert_all_found();
        keys.forget(SLOTS + 5);
        assert_eq!(keys.keys.len(), 0);
        // Those that are forgotten don't stay in the list.
        of_line.take(SLOTS + 1).for_each(|key| keys.push(key));
        assert_eq!(keys.index.overflowed.len(), 1);
        keys.assert_all_found();
    }

    #[test]
    fn a_slot_left_until_its_number_comes_again_takes_room_and_misleads_nobody() {
        let mut keys = Keys::new(4, 0);
        let mut of_line = keys_of_line(0);
        let old: Vec<_> = of_line.by_ref().take(SLOTS).collect();
        old.iter().for_each(|&key| keys.push(key));
        keys.forget(SLOTS);
        keys.go_on_until(keys.index.mask + 1);
        // Seven of the slots lead to what there is now; the others are free.
        assert_eq!(keys.keys.len(), 7);
        old.iter().for_each(|&key| assert_eq!(keys.find(key), None));
        of_line.by_ref().take(SLOTS - 7).for_each(|key| keys.push(key));
        assert_eq!(keys.index.overflowed.len(), 0);
        of_line.by_ref().take(1).for_each(|key| keys.push(key));
        assert_eq!(keys.index.overflowed.len(), 1);
        keys.assert_all_found();
        // Then they are free, too.
        keys.forget(7);
        of_line.take(7).for_each(|key| keys.push(key));
        assert_eq!(keys.index.overflowed.len(), 1);
        keys.assert_all_found();
    }

    #[test]
    fn with_as_many_values_as_there_may_be_few_overflow() {
        let lines = 64;
        let mut keys = Keys::new(lines, u32::MAX - 70_000);
        let mut most = 0;
        for number in 0..140_000_u64 {
            if keys.keys.len() == keys.index.capacity() {
                keys.forget(1);
            }
            // As good as random.
            let mixed = (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            keys.push((mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9).rotate_left(32));
            most = most.max(keys.index.overflowed.len());
            if number % 1024 == 0 {
                keys.assert_all_found();
            }
        }
        assert!((1..lines / 8).contains(&most), "{most}");
    }
}
