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
use std::sync::Arc;

use memmap2::MmapRaw;

use crate::sync::AtomicU64;

/// A mapped file, or memory that stands for one in tests, as words.
pub(crate) struct Region {
    owner: Owner,
}

enum Owner {
    Mapped(MmapRaw),
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
        Ok(Self { owner: Owner::Mapped(map) })
    }

    /// Memory that stands for a mapped file; the test's disk keeps the other reference.
    pub(crate) fn heap(words: Arc<[AtomicU64]>) -> Self {
        Self { owner: Owner::Heap(words) }
    }

    /// The words, little-endian on disk.
    #[inline(always)]
    pub(crate) fn words(&self) -> &[AtomicU64] {
        match &self.owner {
            #[cfg(loom)]
            Owner::Mapped(_) => &[],
            #[cfg(not(loom))]
            Owner::Mapped(map) => {
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
            Owner::Mapped(map) => {
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

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.owner {
            Owner::Mapped(_) => "mapped",
            Owner::Heap(_) => "heap",
        };
        f.debug_struct("Region").field("kind", &kind).field("words", &self.words().len()).finish()
    }
}
