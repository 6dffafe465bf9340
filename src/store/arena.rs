//! Memory for an image: filled once, never written again, given back to the kernel piece by piece.
//!
//! Nearly all CPU of reading goes to the pages that are filled for the first time. Small ones are
//! dependable: a virtual machine gives free memory back to its host in huge pages, and pays the
//! host's faults when it touches them again, while small pages mostly come from fragments that were
//! never returned. Filling 512 MiB from a pipe took 0.45 CPU s/GB in small pages and 0.28 in huge
//! ones where the memory was in use a moment ago, 0.44 to 0.70 and 0.6 to 2.9 where it was not
//! (2026-11-25), and 0.8 to 1.8 and 1.4 to 3.1 on a busy host (2026-11-29). Under CRIU's hook and
//! with `--buffer`, an application of 512 MiB was frozen for 2.2 s with huge pages and for 0.9 with
//! small ones (2026-11-29).
//!
//! Memory is mapped in regions, and handed out front to back in the order in which data arrives,
//! whichever file and shard it belongs to: small files share a page, and data that arrives
//! together, and is mostly sent together, lies together.
//!
//! An [`Extent`] owns its bytes, and gives them back when it is dropped. They are never written to
//! again and never handed out twice, because a pipe may hold references to their pages long after.
//! Whole pages go back at once, and a region's addresses with the last extent in it. Pages are
//! given back as small ones from the middle of a huge page; the kernel frees the memory behind them
//! when it is short of memory, or when the rest of the huge page is given back too.

#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::os::memory::{HUGE_PAGE, Mapping, Sealed, populate};

/// The size of a region, in bytes: large, so that the image of 128 GB needs only 2048 mappings
/// (`vm.max_map_count` is 65530), small enough not to matter under a limit of address space.
const REGION: usize = 64 << 20;

/// Below this size, in bytes, pages from the middle of a huge page are not given back on their own:
/// splitting a huge page is not free.
const WORTH_SPLITTING: usize = 64 << 10;

/// A part of the memory, and how much of it is in use.
#[derive(Debug)]
struct Region {
    mapping: Mapping,
    /// Bytes of each huge page that are handed out and not given back.
    in_use: Mutex<[u32; REGION / HUGE_PAGE]>,
    /// The same for the whole arena.
    live: Arc<AtomicUsize>,
}

impl Region {
    /// The counts are right after every step, so that a panic elsewhere does not spoil them.
    fn in_use(&self) -> MutexGuard<'_, [u32; REGION / HUGE_PAGE]> {
        self.in_use.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, range: Range<usize>) {
        self.live.fetch_add(range.len(), Ordering::Relaxed);
        let mut in_use = self.in_use();
        for (page, part) in huge_pages(range) {
            in_use[page] += part.len() as u32;
        }
    }

    /// Takes back a range that nothing refers to any more, and gives it to the kernel if it was
    /// filled. The lock is held until then: a huge page that is found unused must not be handed out
    /// before it is discarded.
    fn release(&self, range: Range<usize>, was_filled: bool) {
        self.live.fetch_sub(range.len(), Ordering::Relaxed);
        let mut in_use = self.in_use();
        for (page, part) in huge_pages(range) {
            in_use[page] -= part.len() as u32;
            let unused = if !was_filled {
                continue;
            } else if in_use[page] == 0 {
                page * HUGE_PAGE..(page + 1) * HUGE_PAGE
            } else if part.len() >= WORTH_SPLITTING {
                part
            } else {
                continue;
            };
            // SAFETY: no byte of a huge page that is not in use belongs to an extent or a block,
            // and the part belongs to the caller, which is done with it.
            unsafe { self.mapping.discard(unused) };
        }
    }
}

/// The parts of a range that lie in different huge pages, with the number of each page.
fn huge_pages(range: Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> {
    (range.start / HUGE_PAGE..range.end.div_ceil(HUGE_PAGE)).map(move |page| {
        let start = range.start.max(page * HUGE_PAGE);
        (page, start..range.end.min((page + 1) * HUGE_PAGE))
    })
}

/// Bytes that were filled and are never written again. Dropped, they go back to the kernel;
/// references to them that a pipe holds stay good.
#[derive(Debug)]
pub struct Extent {
    region: Arc<Region>,
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

    fn range(&self) -> Range<usize> {
        self.offset as usize..(self.offset + self.len) as usize
    }

    /// Cuts off the first `len` bytes.
    #[must_use]
    pub fn split_front(&mut self, len: usize) -> Extent {
        assert!(len <= self.len(), "a part is not longer than the whole");
        let front = Extent {
            region: Arc::clone(&self.region),
            offset: self.offset,
            len: len as u32,
        };
        self.offset += len as u32;
        self.len -= len as u32;
        front
    }

    /// Adds an extent that lies right behind it in memory. One that lies elsewhere comes back.
    pub(crate) fn join(&mut self, mut next: Extent) -> Option<Extent> {
        if !Arc::ptr_eq(&self.region, &next.region) || self.range().end != next.range().start {
            return Some(next);
        }
        self.len += next.len;
        next.len = 0;
        None
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the range was handed out once, and was sealed: nothing writes to it.
        unsafe { self.region.mapping.bytes(self.range()) }
    }

    /// The bytes, for a pipe.
    pub(crate) fn sealed(&self) -> Sealed<'_> {
        // SAFETY: sealed memory is never handed out again. When the extent is dropped, its pages
        // are discarded or unmapped, or stay as they are.
        unsafe { Sealed::new(self.bytes()) }
    }
}

impl Drop for Extent {
    fn drop(&mut self) {
        if !self.is_empty() {
            self.region.release(self.range(), true);
        }
    }
}

/// Memory that is being filled. [`Arena::seal`] makes an extent of it.
#[derive(Debug)]
pub struct Block {
    extent: Extent,
    filled: usize,
}

impl Block {
    /// The part that is not filled yet.
    pub fn unfilled(&mut self) -> &mut [u8] {
        let Range { start, end } = self.extent.range();
        // SAFETY: the range was handed out once, to this block, and is not sealed: nothing else
        // refers to it, and the block is borrowed exclusively.
        unsafe {
            self.extent
                .region
                .mapping
                .bytes_mut(start + self.filled..end)
        }
    }

    /// Notes that the first `bytes` of the unfilled part are filled now.
    pub fn filled(&mut self, bytes: usize) {
        assert!(
            bytes <= self.extent.len() - self.filled,
            "no more is filled than was left"
        );
        self.filled += bytes;
    }

    /// Has the kernel put pages behind the unfilled part, so that filling it costs no page faults.
    pub(crate) fn populate(&mut self) {
        populate(self.unfilled());
    }

    /// Cuts off the filled part.
    pub(crate) fn take_filled(&mut self) -> Extent {
        let filled = std::mem::take(&mut self.filled);
        self.extent.split_front(filled)
    }

    /// True if nothing is left to fill.
    pub(crate) fn is_full(&self) -> bool {
        self.filled == self.extent.len()
    }
}

/// Hands out the memory for an image.
#[derive(Debug, Default)]
pub struct Arena {
    /// The region that the next bytes come from, and how many of it were handed out.
    region: Option<(Arc<Region>, usize)>,
    live: Arc<AtomicUsize>,
}

impl Arena {
    pub fn new() -> Self {
        Self::default()
    }

    /// Another one, for another thread. Both count in [`Arena::live`].
    pub(crate) fn sibling(&self) -> Self {
        Self {
            region: None,
            live: Arc::clone(&self.live),
        }
    }

    /// Bytes that are handed out and not given back.
    pub fn live(&self) -> usize {
        self.live.load(Ordering::Relaxed)
    }

    /// Hands out up to `len` bytes, at least one.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn reserve(&mut self, len: usize) -> io::Result<Block> {
        if self.region.as_ref().is_none_or(|(_, used)| *used == REGION) {
            // It may be the last that keeps the addresses of its region.
            self.region = None;
        }
        let (region, used) = match &mut self.region {
            Some(region) => region,
            none => {
                let region = Region {
                    mapping: Mapping::new(REGION)?,
                    in_use: Mutex::default(),
                    live: Arc::clone(&self.live),
                };
                none.insert((Arc::new(region), 0))
            }
        };
        let extent = Extent {
            region: Arc::clone(region),
            offset: *used as u32,
            len: len.min(REGION - *used) as u32,
        };
        region.take(extent.range());
        *used += extent.len();
        Ok(Block { extent, filled: 0 })
    }

    /// Memory for up to `len` bytes, as far as `fill` fills it, which returns how far.
    ///
    /// # Errors
    /// `ENOMEM`, and those of `fill`.
    pub(crate) fn fill(
        &mut self,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> io::Result<usize>,
    ) -> io::Result<Extent> {
        let mut block = self.reserve(len)?;
        let filled = fill(block.unfilled())?;
        block.filled(filled);
        Ok(self.seal(block))
    }

    /// The filled part of a block. The rest is taken back: the next block comes from there if
    /// nothing was handed out in between.
    pub fn seal(&mut self, block: Block) -> Extent {
        let Block {
            extent: mut rest,
            filled,
        } = block;
        let sealed = rest.split_front(filled);
        if let Some((region, used)) = &mut self.region
            && Arc::ptr_eq(region, &rest.region)
            && *used == rest.range().end
        {
            *used = rest.range().start;
            region.release(rest.range(), false);
            rest.len = 0;
        }
        sealed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::memory::page_size;

    fn filled(arena: &mut Arena, len: usize, byte: u8) -> Extent {
        let fill = |buffer: &mut [u8]| {
            buffer.fill(byte);
            Ok(buffer.len())
        };
        arena.fill(len, fill).unwrap()
    }

    /// Bytes of a region that take memory.
    fn resident(region: &Region) -> usize {
        // SAFETY: nothing writes to the region for as long; only its address is used.
        let bytes = unsafe { region.mapping.bytes(0..REGION) };
        let mut pages = vec![0u8; REGION / page_size()];
        let start = bytes.as_ptr().cast_mut().cast();
        // SAFETY: mincore writes one byte for each page of the range into the vector.
        let result = unsafe { libc::mincore(start, REGION, pages.as_mut_ptr()) };
        assert_eq!(result, 0);
        pages.iter().filter(|&&page| page & 1 != 0).count() * page_size()
    }

    #[test]
    fn extents_that_lie_side_by_side_become_one() {
        let mut arena = Arena::new();
        let mut first = filled(&mut arena, 1000, 1);
        let second = filled(&mut arena, 2000, 2);
        let third = filled(&mut arena, 10, 3);
        let third = first.join(third).expect("it does not follow the first");
        assert!(first.join(second).is_none());
        assert!(first.join(third).is_none());
        let expected = [vec![1; 1000], vec![2; 2000], vec![3; 10]].concat();
        assert_eq!(first.bytes(), expected);
        assert_eq!(arena.live(), expected.len());
        drop(first);
        assert_eq!(arena.live(), 0);
    }

    #[test]
    fn a_populated_block_has_its_memory_and_is_filled_bit_by_bit() {
        let arena = Arena::new();
        let mut ahead = arena.sibling();
        let mut block = ahead.reserve(HUGE_PAGE).unwrap();
        let region = Arc::clone(&block.extent.region);
        block.populate();
        assert_eq!(resident(&region), HUGE_PAGE);
        block.unfilled()[..5].fill(7);
        block.filled(5);
        let extent = block.take_filled();
        assert_eq!(extent.bytes(), [7; 5]);
        assert!(!block.is_full());
        assert_eq!(arena.live(), HUGE_PAGE);
        drop(block);
        assert_eq!(arena.live(), 5);
        assert_eq!(extent.bytes(), [7; 5]);
    }

    #[test]
    fn memory_keeps_what_was_put_in() {
        let mut arena = Arena::new();
        let extents: Vec<_> = (1..=200)
            .map(|byte| filled(&mut arena, 700_001, byte))
            .collect();
        for (extent, byte) in extents.iter().zip(1..) {
            assert!(extent.bytes().iter().all(|&found| found == byte));
        }
    }

    #[test]
    fn a_block_ends_with_its_region() {
        let mut arena = Arena::new();
        let first = filled(&mut arena, REGION - 1000, 1);
        let second = filled(&mut arena, 2000, 2);
        assert_eq!(second.len(), 1000);
        assert_eq!(arena.live(), first.len() + second.len());
    }

    #[test]
    fn what_is_not_filled_of_a_block_is_released() {
        let mut arena = Arena::new();
        let mut block = arena.reserve(1000).unwrap();
        block.filled(10);
        let sealed = arena.seal(block);
        assert_eq!(sealed.len(), 10);
        assert_eq!(arena.live(), 10);
        drop(sealed);
        assert_eq!(arena.live(), 0);
    }

    #[test]
    fn released_memory_goes_back_to_the_kernel() {
        let mut arena = Arena::new();
        let mut whole = filled(&mut arena, 32 << 20, 7);
        let region = Arc::clone(&whole.region);
        assert_eq!(resident(&region), 32 << 20);
        drop(whole.split_front(20 << 20));
        assert_eq!(resident(&region), 12 << 20);
        assert!(whole.bytes().iter().all(|&found| found == 7));
        drop(whole);
        assert_eq!(resident(&region), 0);
        assert_eq!(arena.live(), 0);
    }

    #[test]
    fn a_part_of_a_small_page_is_never_given_back() {
        let mut arena = Arena::new();
        let mut whole = filled(&mut arena, 100_000, 7);
        drop(whole.split_front(WORTH_SPLITTING + 1));
        assert!(whole.bytes().iter().all(|&found| found == 7));
    }

    #[test]
    fn extents_may_be_dropped_by_another_thread_while_memory_is_handed_out() {
        let mut arena = Arena::new();
        let (give, take) = std::sync::mpsc::channel::<Extent>();
        let dropper = std::thread::spawn(move || take.into_iter().for_each(drop));
        for round in 0..20_000u32 {
            let byte = round as u8;
            let mut extent = filled(&mut arena, 3000, byte);
            let front = extent.split_front(extent.len() / 3);
            give.send(extent).unwrap();
            assert!(front.bytes().iter().all(|&found| found == byte), "{round}");
            give.send(front).unwrap();
        }
        drop(give);
        dropper.join().unwrap();
        assert_eq!(arena.live(), 0);
    }

    #[test]
    fn what_an_image_holds_is_left_out_of_core_dumps() {
        let mut arena = Arena::new();
        let extent = filled(&mut arena, 100, 1);
        let address = extent.bytes().as_ptr().addr();
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
