//! Memory for an image: filled once, never written again, given back to the kernel piece by piece.
//!
//! On restore nearly all CPU goes to page faults when the data is read into fresh 4 KiB pages (1.1 to 1.5 CPU s/GB on the
//! reference machine; 0.3 to 0.5 with huge pages: PROTOCOL.md, section 5). So memory is mapped in regions that ask for huge
//! pages, and handed out front to back in the order in which data arrives, whichever file and shard it belongs to: small files share
//! a page, there is at most one huge page begun, and what arrived together, and is mostly sent together, lies together.
//! Where huge pages are off or scarce the kernel gives small ones, and all else stays the same.
//!
//! Memory that was sealed is never written to again and never handed out twice, because a pipe may hold references to its pages
//! long after it was released here. Releasing gives whole pages back at once (`MADV_DONTNEED`), and a region's addresses
//! when all of it was released. Pages are given back as small ones from the middle of a huge page; the kernel frees the
//! memory behind them when it is short of memory, or when the rest of the huge page is released too.

#![allow(unsafe_code)]

use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};

const PAGE: usize = 4096;

/// The size of x86-64's huge pages.
const HUGE_PAGE: usize = 2 << 20;

/// The size of a region: large, so that the image of 128 GB needs only 2048 mappings (`vm.max_map_count` is 65530), small enough
/// not to matter under a limit of address space.
const REGION: usize = 64 << 20;

/// Below this size, pages from the middle of a huge page are not given back on their own: splitting a huge page is not free.
const WORTH_SPLITTING: usize = 64 << 10;

/// A stretch of sealed memory. It belongs to whoever holds it, until it is given to [`Arena::release`].
#[derive(Debug)]
pub struct Extent {
    region: u32,
    offset: u32,
    len: u32,
}

impl Extent {
    pub fn len(&self) -> usize {
        self.len as usize
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Cuts off the first `len` bytes.
    pub fn split_front(&mut self, len: usize) -> Extent {
        assert!(len <= self.len(), "a part is not longer than the whole");
        let front = Extent {
            len: len as u32,
            ..*self
        };
        self.offset += len as u32;
        self.len -= len as u32;
        front
    }
}

/// A stretch of memory that is being filled.
#[derive(Debug)]
pub struct Block {
    extent: Extent,
    filled: usize,
}

impl Block {
    /// Bytes that fit in still.
    pub fn left(&self) -> usize {
        self.extent.len() - self.filled
    }

    /// All of it is filled: from now on it is sealed.
    pub fn seal(self) -> Extent {
        assert_eq!(self.left(), 0, "only a full block is sealed");
        self.extent
    }
}

struct Region {
    base: NonNull<u8>,
    /// Bytes handed out so far.
    used: usize,
    /// Bytes of each huge page that are handed out and not released.
    live: [u32; REGION / HUGE_PAGE],
}

/// All memory of an image.
#[derive(Default)]
pub struct Arena {
    regions: Vec<Option<Region>>,
    live: usize,
}

impl Arena {
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes that are handed out and not released.
    pub fn live(&self) -> usize {
        self.live
    }

    /// Hands out up to `len` bytes (at least one if `len` is), as many as the current region has.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn reserve(&mut self, len: usize) -> io::Result<Block> {
        let full = self
            .regions
            .last()
            .is_none_or(|last| last.as_ref().is_none_or(|region| region.used == REGION));
        if full {
            self.regions.push(Some(Region::map()?));
        }
        let index = self.regions.len() - 1;
        let region = self.regions[index]
            .as_mut()
            .expect("the last region was just checked or mapped");
        let len = len.min(REGION - region.used);
        let extent = Extent {
            region: index as u32,
            offset: region.used as u32,
            len: len as u32,
        };
        for (page, bytes) in huge_pages(&extent) {
            region.live[page] += bytes as u32;
        }
        region.used += len;
        self.live += len;
        Ok(Block { extent, filled: 0 })
    }

    /// The part of a block that is not filled yet.
    pub fn unfilled(&mut self, block: &mut Block) -> &mut [u8] {
        let start = block.extent.offset as usize + block.filled;
        let base = self.region(&block.extent).base;
        // SAFETY: `reserve` handed out this range within the mapping once, so nothing sealed overlaps it; the block is borrowed
        // exclusively, and so is the arena, so no other reference into the region lives. The mapping is zeroed memory.
        unsafe { std::slice::from_raw_parts_mut(base.as_ptr().add(start), block.left()) }
    }

    /// The first `bytes` of a block's unfilled part are filled now.
    pub fn filled(&mut self, block: &mut Block, bytes: usize) {
        assert!(bytes <= block.left(), "no more is filled than was left");
        block.filled += bytes;
    }

    /// Sealed memory.
    pub fn bytes(&self, extent: &Extent) -> &[u8] {
        let base = self.region(extent).base;
        // SAFETY: an extent is a range within the mapping that `reserve` handed out, that was filled, and that is not
        // released while the extent exists; writing needs an exclusive borrow of the arena.
        unsafe {
            std::slice::from_raw_parts(base.as_ptr().add(extent.offset as usize), extent.len())
        }
    }

    /// Gives memory back to the kernel. References to it that a pipe holds stay good.
    pub fn release(&mut self, extent: Extent) {
        self.live -= extent.len();
        let slot = &mut self.regions[extent.region as usize];
        let region = slot.as_mut().expect("an extent keeps its region");
        for (page, bytes) in huge_pages(&extent) {
            region.live[page] -= bytes as u32;
            if region.live[page] == 0 {
                region.discard(page * HUGE_PAGE, (page + 1) * HUGE_PAGE);
            } else if bytes >= WORTH_SPLITTING {
                let start = (extent.offset as usize).max(page * HUGE_PAGE);
                region.discard(start.next_multiple_of(PAGE), (start + bytes) / PAGE * PAGE);
            }
        }
        if region.used == REGION && region.live.iter().all(|&bytes| bytes == 0) {
            *slot = None;
        }
    }

    /// Releases a block that will not be filled.
    pub fn abandon(&mut self, block: Block) {
        self.release(block.extent);
    }

    fn region(&self, extent: &Extent) -> &Region {
        self.regions[extent.region as usize]
            .as_ref()
            .expect("an extent keeps its region")
    }
}

/// The huge pages that an extent touches, with how many of its bytes lie in each.
fn huge_pages(extent: &Extent) -> impl Iterator<Item = (usize, usize)> + use<> {
    let start = extent.offset as usize;
    let end = start + extent.len as usize;
    (start / HUGE_PAGE..end.div_ceil(HUGE_PAGE)).map(move |page| {
        (
            page,
            end.min((page + 1) * HUGE_PAGE) - start.max(page * HUGE_PAGE),
        )
    })
}

impl Region {
    /// Maps a region, aligned to huge pages: more is mapped than needed, and the ends are cut off.
    fn map() -> io::Result<Self> {
        let size = NonZeroUsize::new(REGION + HUGE_PAGE).expect("a region is not empty");
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no memory in use.
        let mapped = unsafe { mmap_anonymous(None, size, protection, flags) }?.cast::<u8>();
        let before = mapped.as_ptr().align_offset(HUGE_PAGE);
        let after = HUGE_PAGE - before;
        // SAFETY: both ends lie in the mapping made above, and nothing refers to them; the middle is REGION bytes long.
        let base = unsafe {
            let base = mapped.add(before);
            if before > 0 {
                munmap(mapped.cast(), before)?;
            }
            if after > 0 {
                munmap(base.add(REGION).cast(), after)?;
            }
            // Refused where huge pages are not built in: small ones do.
            let _ = madvise(base.cast(), REGION, MmapAdvise::MADV_HUGEPAGE);
            base
        };
        Ok(Self {
            base,
            used: 0,
            live: [0; REGION / HUGE_PAGE],
        })
    }

    /// Gives back the pages between two offsets.
    fn discard(&mut self, start: usize, end: usize) {
        if start < end {
            // SAFETY: the range lies in this region's mapping, and everything in it was released: no reference remains.
            let result = unsafe {
                madvise(
                    self.base.add(start).cast(),
                    end - start,
                    MmapAdvise::MADV_DONTNEED,
                )
            };
            debug_assert!(result.is_ok(), "giving back memory of our own cannot fail");
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and extents into it can no longer be turned into references.
        let result = unsafe { munmap(self.base.cast(), REGION) };
        debug_assert!(result.is_ok(), "unmapping memory of our own cannot fail");
    }
}

// SAFETY: a region is memory that nothing else points to; it may move between threads like a Vec.
unsafe impl Send for Region {}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(arena: &mut Arena, len: usize, byte: u8) -> Extent {
        let mut block = arena.reserve(len).unwrap();
        let len = block.left();
        arena.unfilled(&mut block).fill(byte);
        arena.filled(&mut block, len);
        block.seal()
    }

    fn resident() -> usize {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * PAGE
    }

    #[test]
    fn memory_keeps_what_was_put_in() {
        let mut arena = Arena::new();
        let extents: Vec<_> = (1..=200)
            .map(|byte| filled(&mut arena, 700_001, byte))
            .collect();
        for (extent, byte) in extents.iter().zip(1..) {
            assert!(arena.bytes(extent).iter().all(|&found| found == byte));
        }
    }

    #[test]
    fn a_block_ends_with_its_region() {
        let mut arena = Arena::new();
        let first = filled(&mut arena, REGION - 10, 1);
        let second = filled(&mut arena, 100, 2);
        assert_eq!((first.len(), second.len()), (REGION - 10, 10));
        assert_eq!(arena.live(), REGION);
    }

    #[test]
    fn released_memory_goes_back_to_the_kernel() {
        let mut arena = Arena::new();
        let before = resident();
        let mut whole = filled(&mut arena, 32 << 20, 7);
        let full = resident();
        assert!(full >= before + (32 << 20));
        let front = whole.split_front(20 << 20);
        arena.release(front);
        assert!(resident() <= full - (18 << 20));
        assert!(arena.bytes(&whole).iter().all(|&found| found == 7));
        arena.release(whole);
        assert_eq!(arena.live(), 0);
    }
}
