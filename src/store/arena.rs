//! Memory for an image: filled once, never written again, given back to the kernel piece by piece.
//!
//! Nearly all CPU of reading goes to the pages that are filled for the first time. Where the memory
//! was in use a moment ago, huge pages are the cheapest: 0.28 CPU s/GB, and 0.45 in pages of 4 KiB.
//! But a virtual machine gives free memory back to its host in huge pages, and pays the host's
//! faults when it touches them again: 0.6 to 2.9 CPU s/GB, while small pages mostly come out of
//! smaller rests, which it never gave back, and cost 0.44 to 0.70 (2026-11-25, reading 512 MiB from
//! a pipe, just after another run and 7 s after it). So [`Choice`] looks at what filling either
//! kind costs while the image arrives, and takes the cheaper.
//!
//! Memory is mapped in regions of either kind, and handed out front to back in the order in which
//! data arrives, whichever file and shard it belongs to: small files share a page, at most one huge
//! page is begun, and what arrived together, and is mostly sent together, lies together. Where huge
//! pages are off or scarce the kernel gives small ones, and all else stays the same.
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
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::os::memory::{HUGE_PAGE, Mapping, Pages, Sealed, populate};

/// The size of a region, in bytes: large, so that the image of 128 GB needs only 2048 mappings
/// (`vm.max_map_count` is 65530), small enough not to matter under a limit of address space.
const REGION: usize = 64 << 20;

/// Below this size, in bytes, pages from the middle of a huge page are not given back on their own:
/// splitting a huge page is not free.
const WORTH_SPLITTING: usize = 64 << 10;

/// A huge page is begun for at least this number of bytes, or after as many have gone into small
/// pages: what is left of the last huge page is memory that the image does not need, and most
/// images end with a few small files.
const WORTH_A_HUGE_PAGE: usize = 256 << 10;

/// Filling a block of less than this, in bytes, is not timed, as asking for the time takes long
/// beside it; unless it begins a huge page, which the kernel then clears as a whole.
const WORTH_TIMING: usize = 16 << 10;

/// Timed bytes after which the kind of pages is chosen anew. Half of a huge page, so that a huge
/// page is judged when it is full, whatever part of it was filled untimed.
const STRETCH: usize = HUGE_PAGE / 2;

/// Bytes until the dearer kind of pages is tried again for a stretch. Each trial doubles the time
/// until the next one, up to the rarest: trials in huge pages at 2.9 CPU s/GB then add 0.03 to the
/// 0.45 of small ones for an image of 1 GiB, and 0.02 for a large one.
const FIRST_TRIAL: usize = 32 << 20;
const RAREST_TRIAL: usize = 256 << 20;

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

    /// Takes back what was handed out but never written to.
    fn take_back(&self, range: Range<usize>) {
        self.live.fetch_sub(range.len(), Ordering::Relaxed);
        let mut in_use = self.in_use();
        for (page, part) in huge_pages(range) {
            in_use[page] -= part.len() as u32;
        }
    }

    /// Gives a range back to the kernel that nothing refers to any more. The lock is held
    /// meanwhile: a huge page that is found unused must not be handed out before it is discarded.
    fn release(&self, range: Range<usize>) {
        self.live.fetch_sub(range.len(), Ordering::Relaxed);
        let mut in_use = self.in_use();
        for (page, part) in huge_pages(range) {
            in_use[page] -= part.len() as u32;
            let unused = if in_use[page] == 0 {
                page * HUGE_PAGE..(page + 1) * HUGE_PAGE
            } else if part.len() >= WORTH_SPLITTING {
                part
            } else {
                continue;
            };
            // SAFETY: no byte of a huge page that is not in use belongs to an extent or a block,
            // and the part belongs to the caller, who is done with it.
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

    /// Adds what lies right behind it in memory. What lies elsewhere comes back.
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

    /// The bytes behind the first `skip`, for a pipe.
    pub(crate) fn sealed(&self, skip: usize) -> Sealed<'_> {
        // SAFETY: sealed memory is never handed out again. When the extent is dropped, its pages
        // are discarded or unmapped, or stay as they are.
        unsafe { Sealed::new(&self.bytes()[skip..]) }
    }
}

impl Drop for Extent {
    fn drop(&mut self) {
        if !self.is_empty() {
            self.region.release(self.range());
        }
    }
}

/// Memory that is being filled. [`Arena::seal`] makes an extent of it.
#[derive(Debug)]
pub struct Block {
    extent: Extent,
    filled: usize,
    /// Its pages, and the time at which it was handed out, if filling it is timed.
    timed: Option<(Pages, Duration)>,
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

    /// Cuts off what is filled.
    pub(crate) fn take_filled(&mut self) -> Extent {
        let filled = std::mem::take(&mut self.filled);
        self.extent.split_front(filled)
    }

    /// Whether nothing is left to fill.
    pub(crate) fn is_full(&self) -> bool {
        self.filled == self.extent.len()
    }
}

/// The region that the next bytes come from.
#[derive(Debug)]
struct Cursor {
    region: Arc<Region>,
    /// Bytes handed out so far.
    used: usize,
}

impl Cursor {
    fn left(cursor: &Option<Self>) -> usize {
        cursor.as_ref().map_or(0, |cursor| REGION - cursor.used)
    }
}

/// Chooses the pages that cost less CPU time to fill.
#[derive(Debug)]
struct Choice {
    pages: Pages,
    /// Bytes filled in this stretch, and the CPU time that it took.
    filled: usize,
    spent: Duration,
    /// What each kind of pages cost in its last stretch, in nanoseconds for a MiB; 0 at first, so
    /// that each is tried.
    huge_cost: u128,
    small_cost: u128,
    until_trial: usize,
    /// Bytes from one trial to the next.
    interval: usize,
}

impl Default for Choice {
    fn default() -> Self {
        Self {
            pages: Pages::Huge,
            filled: 0,
            spent: Duration::ZERO,
            huge_cost: 0,
            small_cost: 0,
            until_trial: FIRST_TRIAL,
            interval: FIRST_TRIAL,
        }
    }
}

impl Choice {
    /// The pages for what comes next.
    fn pages(&mut self) -> Pages {
        if self.filled >= STRETCH {
            self.end_stretch();
        }
        self.pages
    }

    fn note(&mut self, pages: Pages, bytes: usize, spent: Duration) {
        if pages == self.pages {
            self.filled += bytes;
            self.spent += spent;
        }
    }

    fn end_stretch(&mut self) {
        let (cost, other) = match self.pages {
            Pages::Huge => (&mut self.huge_cost, Pages::Small),
            Pages::Small => (&mut self.small_cost, Pages::Huge),
        };
        *cost = (self.spent.as_nanos() << 20) / self.filled as u128;
        let cheaper = if self.huge_cost <= self.small_cost {
            Pages::Huge
        } else {
            Pages::Small
        };
        self.until_trial = self.until_trial.saturating_sub(self.filled);
        (self.filled, self.spent) = (0, Duration::ZERO);
        self.pages = if self.until_trial == 0 {
            self.interval = (self.interval * 2).min(RAREST_TRIAL);
            self.until_trial = self.interval;
            other
        } else {
            cheaper
        };
    }
}

/// The CPU time of this thread. Unlike the time of day it stands still while others run.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// Hands out the memory for an image.
#[derive(Debug, Default)]
pub struct Arena {
    choice: Choice,
    huge: Option<Cursor>,
    small: Option<Cursor>,
    /// Bytes handed out in small pages since the last huge page was begun.
    in_small: usize,
    live: Arc<AtomicUsize>,
}

impl Arena {
    pub fn new() -> Self {
        Self::default()
    }

    /// Another one, for another thread. What either hands out counts for both.
    pub(crate) fn sibling(&self) -> Self {
        Self {
            live: Arc::clone(&self.live),
            ..Self::default()
        }
    }

    /// Notes that a block was populated, which is what its pages cost.
    pub(crate) fn was_populated(&mut self, block: &mut Block) {
        if let Some((pages, since)) = block.timed.take() {
            let spent = cpu_time().saturating_sub(since);
            self.choice.note(pages, block.extent.len(), spent);
        }
    }

    /// Bytes that are handed out and not given back.
    pub fn live(&self) -> usize {
        self.live.load(Ordering::Relaxed)
    }

    /// Bytes left of the huge page begun: memory that costs nothing more to fill.
    pub(crate) fn left_of_huge_page(&self) -> usize {
        Cursor::left(&self.huge) % HUGE_PAGE
    }

    /// Hands out up to `len` bytes, at least one.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn reserve(&mut self, len: usize) -> io::Result<Block> {
        self.hand_out(len, WORTH_A_HUGE_PAGE)
    }

    /// The same for the last bytes of something, which begin no huge page that they do not fill:
    /// behind an image there is nothing to use up the rest.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(crate) fn reserve_last(&mut self, len: usize) -> io::Result<Block> {
        self.hand_out(len, HUGE_PAGE)
    }

    fn hand_out(&mut self, len: usize, worth_a_huge_page: usize) -> io::Result<Block> {
        let begun = self.left_of_huge_page();
        let (pages, most) = if begun > 0 {
            (Pages::Huge, begun)
        } else if self.in_small + len <= worth_a_huge_page {
            (Pages::Small, REGION)
        } else {
            (self.choice.pages(), REGION)
        };
        match pages {
            Pages::Small => self.in_small += len,
            Pages::Huge => self.in_small = 0,
        }
        let pages = if self.have_region(pages).is_ok() {
            pages
        } else {
            // What is left of the other region does as well, or the addresses of that one.
            let other = match pages {
                Pages::Small => Pages::Huge,
                Pages::Huge => Pages::Small,
            };
            self.have_region(other)?;
            other
        };
        let cursor = self.cursor(pages).as_mut().expect("it was made above");
        let len = len.min(most).min(REGION - cursor.used);
        let extent = Extent {
            region: Arc::clone(&cursor.region),
            offset: cursor.used as u32,
            len: len as u32,
        };
        cursor.region.take(extent.range());
        cursor.used += len;
        let begins = pages == Pages::Huge && begun == 0;
        let timed = (begins || len >= WORTH_TIMING).then(|| (pages, cpu_time()));
        Ok(Block {
            extent,
            filled: 0,
            timed,
        })
    }

    fn cursor(&mut self, pages: Pages) -> &mut Option<Cursor> {
        match pages {
            Pages::Small => &mut self.small,
            Pages::Huge => &mut self.huge,
        }
    }

    /// Maps a region of these pages, unless there is something left of the last one.
    fn have_region(&mut self, pages: Pages) -> io::Result<()> {
        if Cursor::left(self.cursor(pages)) > 0 {
            return Ok(());
        }
        // It may be the last that keeps the addresses of its region.
        *self.cursor(pages) = None;
        let region = Region {
            mapping: Mapping::new(REGION, pages)?,
            in_use: Mutex::default(),
            live: Arc::clone(&self.live),
        };
        *self.cursor(pages) = Some(Cursor {
            region: Arc::new(region),
            used: 0,
        });
        Ok(())
    }

    /// What was filled of a block. The rest is taken back: the next block comes from there if
    /// nothing was handed out meanwhile.
    pub fn seal(&mut self, block: Block) -> Extent {
        let Block {
            extent: mut rest,
            filled,
            timed,
        } = block;
        if let Some((pages, since)) = timed {
            self.choice
                .note(pages, filled, cpu_time().saturating_sub(since));
        }
        let sealed = rest.split_front(filled);
        for (pages, cursor) in [
            (Pages::Small, &mut self.small),
            (Pages::Huge, &mut self.huge),
        ] {
            if let Some(cursor) = cursor
                && Arc::ptr_eq(&cursor.region, &rest.region)
                && cursor.used == rest.range().end
            {
                cursor.used = rest.range().start;
                cursor.region.take_back(rest.range());
                if pages == Pages::Small {
                    self.in_small -= rest.len().min(self.in_small);
                }
                rest.len = 0;
            }
        }
        sealed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::memory::page_size;

    fn filled(arena: &mut Arena, len: usize, byte: u8) -> Extent {
        let mut block = arena.reserve(len).unwrap();
        let len = block.unfilled().len();
        block.unfilled().fill(byte);
        block.filled(len);
        arena.seal(block)
    }

    /// Bytes of a region that take memory.
    fn resident(region: &Region) -> usize {
        // SAFETY: nothing writes to the region meanwhile; only its address is used.
        let bytes = unsafe { region.mapping.bytes(0..REGION) };
        let mut pages = vec![0u8; REGION / page_size()];
        let start = bytes.as_ptr().cast_mut().cast();
        // SAFETY: mincore writes one byte for each page of the range into the vector.
        let result = unsafe { libc::mincore(start, REGION, pages.as_mut_ptr()) };
        assert_eq!(result, 0);
        pages.iter().filter(|&&page| page & 1 != 0).count() * page_size()
    }

    /// The MiB of an image that go into huge pages, for parts of it: MiB, and nanoseconds for
    /// a MiB of huge pages and of small ones.
    fn mib_in_huge_pages(choice: &mut Choice, costs: &[(usize, u64, u64)]) -> usize {
        let mut huge = 0;
        for &(mib, huge_cost, small_cost) in costs {
            for _ in 0..mib {
                let pages = choice.pages();
                let cost = match pages {
                    Pages::Huge => huge_cost,
                    Pages::Small => small_cost,
                };
                huge += usize::from(pages == Pages::Huge);
                choice.note(pages, 1 << 20, Duration::from_nanos(cost));
            }
        }
        huge
    }

    #[test]
    fn huge_pages_are_taken_where_they_cost_less() {
        let huge = mib_in_huge_pages(&mut Choice::default(), &[(1024, 300, 450)]);
        assert!((1010..1024).contains(&huge), "{huge}");
    }

    #[test]
    fn small_pages_are_taken_where_huge_ones_are_dear_and_trials_cost_little() {
        let huge = mib_in_huge_pages(&mut Choice::default(), &[(1024, 2900, 450)]);
        assert!((2..10).contains(&huge), "{huge}");
        let huge = mib_in_huge_pages(&mut Choice::default(), &[(128 << 10, 2900, 450)]);
        assert!((300..600).contains(&huge), "{huge}");
    }

    #[test]
    fn pages_that_become_dear_are_left_at_once_and_cheap_ones_found_soon() {
        let mut choice = Choice::default();
        mib_in_huge_pages(&mut choice, &[(500, 300, 450)]);
        let huge = mib_in_huge_pages(&mut choice, &[(200, 2900, 450)]);
        assert!(huge < 5, "{huge}");
        let huge = mib_in_huge_pages(&mut choice, &[(1024, 300, 450)]);
        assert!(huge > 750, "{huge}");
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
        ahead.was_populated(&mut block);
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
    fn memory_in_small_pages_is_as_good() {
        let mut arena = Arena::new();
        arena.choice = Choice {
            pages: Pages::Small,
            huge_cost: u128::MAX,
            until_trial: usize::MAX,
            ..Choice::default()
        };
        let mut extents = vec![filled(&mut arena, REGION - 1000, 1)];
        extents.push(filled(&mut arena, 700_001, 2));
        extents.push(filled(&mut arena, 700_001, 3));
        assert_eq!(extents[1].len(), 1000);
        assert_eq!(resident(&extents[0].region), REGION);
        assert!(arena.huge.is_none());
        for (extent, byte) in extents.iter().zip(1..) {
            assert!(extent.bytes().iter().all(|&found| found == byte));
        }
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
        let first = filled(&mut arena, REGION - WORTH_A_HUGE_PAGE, 1);
        let second = filled(&mut arena, 2 * WORTH_A_HUGE_PAGE, 2);
        assert_eq!(second.len(), WORTH_A_HUGE_PAGE);
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
    fn the_few_small_files_behind_a_large_one_begin_no_huge_page() {
        let mut arena = Arena::new();
        let large = filled(&mut arena, 4 * HUGE_PAGE, 1);
        let small: Vec<_> = (0..10).map(|_| filled(&mut arena, 2000, 2)).collect();
        assert_eq!(resident(&large.region), 4 * HUGE_PAGE);
        assert!(resident(&small[0].region) < HUGE_PAGE / 4);
    }

    #[test]
    fn the_last_bytes_begin_no_huge_page_that_they_do_not_fill() {
        let mut arena = Arena::new();
        let mut kept = Vec::new();
        let mut left = HUGE_PAGE / 2;
        while left > 0 {
            let mut block = arena.reserve_last(left).unwrap();
            let len = block.unfilled().len();
            block.unfilled().fill(1);
            block.filled(len);
            kept.push(arena.seal(block));
            left -= len;
        }
        assert!(arena.huge.is_none());
        assert!(resident(&kept[0].region) < HUGE_PAGE * 3 / 4);
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
