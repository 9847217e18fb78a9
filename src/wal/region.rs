//! Bytes shared with the page cache, seen as 64-bit words that are read and written atomically.
//!
//! A mapping is never turned into `&[u8]`: other threads, and the kernel's write-back, look at the
//! same memory while it changes, and only atomics may do that.
#![allow(
    unsafe_code,
    reason = "the mapped memory is reached through pointers here and nowhere else"
)]

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;

use memmap2::MmapRaw;

use crate::process::Process;
use crate::sync::AtomicU64;
use crate::wal::record::SLOT_WORDS;

/// Where the slots begin in a ring's file, in words: after a header of one page. A model's ring has
/// none: each word costs it time.
pub(crate) const SLOTS_AT: usize = if cfg!(loom) { 0 } else { 4096 / 8 };

/// A mapped file, or memory that stands for one in tests, as words.
pub(crate) struct Region {
    owner: Owner,
    /// The bytes that may hold something, ascending; `None` where that is not known. The others
    /// were zeros when the file was mapped.
    written: Option<Vec<Range<u64>>>,
    /// Of the file, for messages.
    path: PathBuf,
}

enum Owner {
    /// By this process.
    Mapped(MmapRaw, Process),
    Heap(Arc<[AtomicU64]>),
}

impl Region {
    /// Takes a shared, writable mapping whose blocks are allocated. Trailing bytes that do not fill
    /// a word are left out.
    pub(crate) fn mapped(map: MmapRaw) -> io::Result<Self> {
        // The kernel maps at page boundaries; checked, since the soundness of `words` rests on it.
        if map.as_mut_ptr().align_offset(align_of::<AtomicU64>()) != 0 {
            return Err(io::Error::other("the mapping is not aligned to 8 bytes"));
        }
        Ok(Self { owner: Owner::Mapped(map, Process::this()), written: None, path: PathBuf::new() })
    }

    /// Says which bytes may hold something, ascending.
    pub(crate) fn with_written(mut self, written: Option<Vec<Range<u64>>>) -> Self {
        self.written = written;
        self
    }

    /// Says which file it is.
    pub(crate) fn with_path(mut self, path: PathBuf) -> Self {
        self.path = path;
        self
    }

    /// Memory that stands for a mapped file; the test's disk keeps the other reference.
    pub(crate) fn heap(words: Arc<[AtomicU64]>) -> Self {
        Self { owner: Owner::Heap(words), written: None, path: PathBuf::new() }
    }

    /// The words, little-endian on disk.
    #[inline(always)]
    pub(crate) fn words(&self) -> &[AtomicU64] {
        match &self.owner {
            #[cfg(loom)]
            Owner::Mapped(..) => &[],
            #[cfg(not(loom))]
            Owner::Mapped(map, _) => {
                let count = map.len() / size_of::<AtomicU64>();
                // SAFETY: the mapping is readable, writable, aligned (checked in `mapped`), at
                // least `count` words long and lives as long as `self`; the file is locked by this
                // process and never truncated while it is mapped; all access within the process is
                // by atomics.
                unsafe { std::slice::from_raw_parts(map.as_mut_ptr().cast::<AtomicU64>(), count) }
            }
            Owner::Heap(words) => words,
        }
    }

    /// Asks the kernel to fault the pages of `words[start..start + count]` in for writing, so that
    /// later stores do not wait for it. Best effort: an error (an old kernel, a full disk) is
    /// returned for the caller to log.
    pub(crate) fn prefault(&self, start: usize, count: usize) -> io::Result<()> {
        match &self.owner {
            #[cfg(target_os = "linux")]
            Owner::Mapped(map, _) => {
                let word = size_of::<AtomicU64>();
                let page = 4096;
                let from = (start * word) / page * page;
                let to = ((start + count) * word).min(map.len());
                map.advise_range(memmap2::Advice::PopulateWrite, from, to.saturating_sub(from))
            }
            _ => {
                let _ = (start, count);
                Ok(())
            }
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // A forked process has no part in the mapping (`MADV_DONTFORK`): where it is in the parent,
        // the child may have mapped something else by now.
        if let Owner::Mapped(_, process) = self.owner
            && !process.is_this()
        {
            let nothing = Owner::Heap(Arc::new([]));
            std::mem::forget(std::mem::replace(&mut self.owner, nothing));
        }
    }
}

/// The slots of a ring: a region seen as an array of them, whose bounds were checked once. Copies
/// are of the same slots.
#[derive(Clone)]
pub(crate) struct Slots {
    region: Arc<Region>,
    first: NonNull<Slot>,
    mask: u64,
}

/// A slot's words.
pub(crate) type Slot = [AtomicU64; SLOT_WORDS];

// SAFETY: the pointer is into the region, which `self` keeps and which threads may share.
unsafe impl Send for Slots {}
// SAFETY: likewise; all access is by atomics.
unsafe impl Sync for Slots {}

impl Slots {
    /// The `capacity` slots of a ring's region. `None` where the region is too small, or the
    /// capacity is not a power of two.
    pub(crate) fn new(region: Region, capacity: u64) -> Option<Self> {
        let words = usize::try_from(capacity).ok()?.checked_mul(SLOT_WORDS)?;
        let slots = region.words().get(SLOTS_AT..)?.get(..words)?;
        let first = NonNull::from(slots).cast::<Slot>();
        capacity.is_power_of_two().then(|| Self {
            region: Arc::new(region),
            first,
            mask: capacity - 1,
        })
    }

    pub(crate) fn capacity(&self) -> u64 {
        self.mask + 1
    }

    /// The slot of the record with this number.
    #[inline(always)]
    pub(crate) fn get(&self, number: u64) -> &Slot {
        #[expect(clippy::cast_possible_truncation, reason = "masked by what is in memory")]
        let index = (number & self.mask) as usize;
        // SAFETY: the index is below the capacity, and `new` has checked that so many slots lie
        // behind `first`, in memory that does not move and that `self` keeps.
        unsafe { &*self.first.as_ptr().wrapping_add(index) }
    }

    /// The next records, from this one on, whose slots may hold something: as many as lie next to
    /// each other in the ring, or none when there are no more before its end. The range ends after
    /// `number` in any case.
    pub(crate) fn written_from(&self, number: u64) -> Range<u64> {
        let index = number & self.mask;
        let lap = number - index;
        let after = lap.saturating_add(self.capacity());
        let Some(written) = &self.region.written else { return number..after };
        let (first, size) = (SLOTS_AT * size_of::<AtomicU64>(), size_of::<Slot>() as u64);
        let slot_after = |byte: u64| byte.saturating_sub(first as u64).div_ceil(size);
        let Some(part) = written.iter().find(|part| slot_after(part.end) > index) else {
            return after..after;
        };
        let from = part.start.saturating_sub(first as u64) / size;
        lap.saturating_add(from.max(index)).min(after)
            ..lap.saturating_add(slot_after(part.end)).min(after)
    }

    /// The file, and where in it the slot of the record with this number lies.
    pub(crate) fn place(&self, number: u64) -> (&Path, u64) {
        let first = (SLOTS_AT * size_of::<AtomicU64>()) as u64;
        (&self.region.path, first + (number & self.mask) * size_of::<Slot>() as u64)
    }

    /// What they lie in.
    pub(crate) fn region(&self) -> &Region {
        &self.region
    }
}

impl fmt::Debug for Slots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slots").field("capacity", &self.capacity()).finish_non_exhaustive()
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.owner {
            Owner::Mapped(..) => "mapped",
            Owner::Heap(_) => "heap",
        };
        f.debug_struct("Region").field("kind", &kind).field("words", &self.words().len()).finish()
    }
}
