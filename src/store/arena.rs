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

/// A huge page is begun for at least so much, or after so much has gone into small pages, in bytes: what is left of the last huge
/// page is memory that the image does not need, and most images end with a few small files.
const WORTH_A_HUGE_PAGE: usize = 256 << 10;

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
}

struct Region {
    base: NonNull<u8>,
    /// Bytes handed out so far.
    used: usize,
    /// Bytes of each huge page that are handed out and not released.
    live: [u32; REGION / HUGE_PAGE],
}

/// What a region asks the kernel for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pages {
    Huge,
    Small,
}

/// All memory of an image.
#[derive(Default)]
pub struct Arena {
    regions: Vec<Option<Region>>,
    /// The regions that the next bytes come from.
    huge: Option<u32>,
    small: Option<u32>,
    /// Bytes handed out in small pages since the last huge page was begun.
    in_small: usize,
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

    /// Bytes left of the huge page begun: memory that costs nothing more to fill.
    pub fn left_of_huge_page(&self) -> usize {
        self.left_in(self.huge) % HUGE_PAGE
    }

    /// Hands out up to `len` bytes, at least one.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn reserve(&mut self, len: usize) -> io::Result<Block> {
        self.hand_out(len, WORTH_A_HUGE_PAGE)
    }

    /// The same for the last bytes of something, which begin no huge page that they do not fill: behind an image there is nothing
    /// to use up the rest.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn reserve_last(&mut self, len: usize) -> io::Result<Block> {
        self.hand_out(len, HUGE_PAGE)
    }

    fn hand_out(&mut self, len: usize, worth_a_huge_page: usize) -> io::Result<Block> {
        let (index, most) = self.place(len, worth_a_huge_page)?;
        let region = self.regions[index as usize]
            .as_mut()
            .expect("a cursor points to a region");
        let len = len.min(most);
        let extent = Extent {
            region: index,
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

    /// The region that `len` bytes come from, and how many of them it can give at most.
    fn place(&mut self, len: usize, worth_a_huge_page: usize) -> io::Result<(u32, usize)> {
        let begun = self.left_of_huge_page();
        if begun == 0 && self.in_small + len <= worth_a_huge_page {
            self.in_small += len;
            let index = self.region_for(self.small, Pages::Small)?;
            self.small = Some(index);
            return Ok((index, self.left_in(self.small)));
        }
        self.in_small = 0;
        let index = self.region_for(self.huge, Pages::Huge)?;
        self.huge = Some(index);
        let begins_another = len.saturating_sub(begun) >= worth_a_huge_page;
        let most = if begun > 0 && !begins_another {
            begun
        } else {
            self.left_in(self.huge)
        };
        Ok((index, most))
    }

    /// Bytes of a region that were not handed out yet.
    fn left_in(&self, region: Option<u32>) -> usize {
        let region = region.and_then(|index| self.regions[index as usize].as_ref());
        region.map_or(0, |region| REGION - region.used)
    }

    /// The region itself if it has anything left, otherwise a new one.
    fn region_for(&mut self, region: Option<u32>, pages: Pages) -> io::Result<u32> {
        if let Some(index) = region
            && self.left_in(region) > 0
        {
            return Ok(index);
        }
        self.regions.push(Some(Region::map(pages)?));
        Ok(self.regions.len() as u32 - 1)
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

    /// What was filled of a block: from now on it is sealed. The rest is taken back: the next block comes from there if nothing was
    /// handed out meanwhile.
    pub fn seal(&mut self, block: Block) -> Extent {
        let mut rest = block.extent;
        let sealed = rest.split_front(block.filled);
        let region = self.regions[rest.region as usize]
            .as_mut()
            .expect("a block keeps its region");
        if region.used == rest.offset as usize + rest.len() {
            region.used = rest.offset as usize;
            self.live -= rest.len();
            if self.small == Some(rest.region) {
                self.in_small -= rest.len().min(self.in_small);
            }
            for (page, bytes) in huge_pages(&rest) {
                region.live[page] -= bytes as u32;
            }
        } else {
            self.release(rest);
        }
        sealed
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
        if extent.is_empty() {
            return;
        }
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
    fn map(pages: Pages) -> io::Result<Self> {
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
            let advice = match pages {
                Pages::Huge => MmapAdvise::MADV_HUGEPAGE,
                Pages::Small => MmapAdvise::MADV_NOHUGEPAGE,
            };
            // Refused where huge pages are not built in: small ones do.
            let _ = madvise(base.cast(), REGION, advice);
            // It is another process's memory, and has no business in a core dump of ours.
            let _ = madvise(base.cast(), REGION, MmapAdvise::MADV_DONTDUMP);
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
    use std::sync::Mutex;

    /// Tests that fill much memory take turns: some of them look at how much the process has.
    static TURN: Mutex<()> = Mutex::new(());

    fn filled(arena: &mut Arena, len: usize, byte: u8) -> Extent {
        let mut block = arena.reserve(len).unwrap();
        let len = block.left();
        arena.unfilled(&mut block).fill(byte);
        arena.filled(&mut block, len);
        arena.seal(block)
    }

    fn resident() -> usize {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * PAGE
    }

    #[test]
    fn memory_keeps_what_was_put_in() {
        let _turn = TURN.lock().unwrap();
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
        let _turn = TURN.lock().unwrap();
        let mut arena = Arena::new();
        let first = filled(&mut arena, REGION - WORTH_A_HUGE_PAGE, 1);
        let second = filled(&mut arena, 2 * WORTH_A_HUGE_PAGE, 2);
        assert_eq!(second.len(), WORTH_A_HUGE_PAGE);
        assert_eq!(arena.live(), first.len() + second.len());
    }

    #[test]
    fn what_is_not_filled_of_a_block_is_released() {
        let mut arena = Arena::new();
        let mut block = arena.reserve(1000).unwrap();
        arena.filled(&mut block, 10);
        assert_eq!(arena.seal(block).len(), 10);
        assert_eq!(arena.live(), 10);
    }

    #[test]
    fn the_few_small_files_behind_a_large_one_begin_no_huge_page() {
        let _turn = TURN.lock().unwrap();
        let mut arena = Arena::new();
        filled(&mut arena, 4 * HUGE_PAGE, 1);
        let before = resident();
        for _ in 0..10 {
            filled(&mut arena, 2000, 2);
        }
        assert!(resident() - before < HUGE_PAGE / 4);
    }

    #[test]
    fn the_last_bytes_begin_no_huge_page_that_they_do_not_fill() {
        let _turn = TURN.lock().unwrap();
        let mut arena = Arena::new();
        let before = resident();
        let mut left = HUGE_PAGE / 2;
        while left > 0 {
            let mut block = arena.reserve_last(left).unwrap();
            let len = block.left();
            arena.unfilled(&mut block).fill(1);
            arena.filled(&mut block, len);
            arena.seal(block);
            left -= len;
        }
        assert!(resident() - before < HUGE_PAGE * 3 / 4);
    }

    #[test]
    fn released_memory_goes_back_to_the_kernel() {
        let _turn = TURN.lock().unwrap();
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

    #[test]
    fn what_an_image_holds_is_left_out_of_core_dumps() {
        let mut arena = Arena::new();
        let extent = filled(&mut arena, 100, 1);
        let address = arena.bytes(&extent).as_ptr().addr();
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut is_ours = false;
        let flags = maps.lines().find(|line| {
            let range = line
                .split(' ')
                .next()
                .and_then(|range| range.split_once('-'));
            if let Some((start, end)) = range
                && let Ok(start) = usize::from_str_radix(start, 16)
                && let Ok(end) = usize::from_str_radix(end, 16)
            {
                is_ours = (start..end).contains(&address);
            }
            is_ours && line.starts_with("VmFlags:")
        });
        assert!(flags.unwrap().split(' ').any(|flag| flag == "dd"));
    }
}
