//! Anonymous memory: mapped in large pieces, given back page by page.

#![allow(unsafe_code)]

use std::io::{self, IoSlice};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::OnceLock;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};

/// The size of x86-64's huge pages. On machines with others it is only the unit in which memory is
/// handed out and given back.
pub(crate) const HUGE_PAGE: usize = 2 << 20;

/// The size of a page: 4 KiB on x86-64, up to 64 KiB on aarch64 and ppc64.
pub(crate) fn page_size() -> usize {
    static SIZE: OnceLock<usize> = OnceLock::new();
    *SIZE.get_or_init(rustix::param::page_size)
}

/// The pages that lie wholly between two offsets. `MADV_DONTNEED` rounds its length up to a page:
/// given a part of one, it would empty what lies behind.
fn whole_pages(range: Range<usize>, page: usize) -> Range<usize> {
    range.start.next_multiple_of(page)..range.end / page * page
}

/// Private memory of ours in small pages, zeroed, aligned to huge ones, and left out of core dumps.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping is memory that nothing else points to; like a Vec it may move between threads,
// and shared references give access to it only through unsafe functions.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes, a multiple of [`HUGE_PAGE`]. More is mapped first, and the ends are cut
    /// off, because the kernel aligns to small pages only.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(crate) fn new(len: usize) -> io::Result<Self> {
        let size = NonZeroUsize::new(len + HUGE_PAGE).expect("it is not empty");
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no memory in
        // use.
        let mapped = unsafe { mmap_anonymous(None, size, protection, flags) }?.cast::<u8>();
        let before = mapped.as_ptr().align_offset(HUGE_PAGE);
        // SAFETY: both ends lie in the mapping made above, and nothing refers to them; the middle
        // is `len` bytes long.
        let base = unsafe {
            let base = mapped.add(before);
            if before > 0 {
                munmap(mapped.cast(), before)?;
            }
            munmap(base.add(len).cast(), HUGE_PAGE - before)?;
            // Refused where huge pages are not built in.
            let _ = madvise(base.cast(), len, MmapAdvise::MADV_NOHUGEPAGE);
            // An image is another process's memory, and has no business in a core dump of ours.
            let _ = madvise(base.cast(), len, MmapAdvise::MADV_DONTDUMP);
            base
        };
        Ok(Self { base, len })
    }

    /// The bytes between two offsets.
    ///
    /// # Safety
    /// Nothing may write to them for as long as the reference lives.
    pub(crate) unsafe fn bytes(&self, range: Range<usize>) -> &[u8] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: the range lies in the mapping, which is initialized (zeroed) memory; the caller
        // keeps writers away.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().add(range.start), range.len()) }
    }

    /// The same for writing.
    ///
    /// # Safety
    /// Nothing else may refer to them for as long as the reference lives.
    #[expect(clippy::mut_from_ref, reason = "the caller has the range to itself")]
    pub(crate) unsafe fn bytes_mut(&self, range: Range<usize>) -> &mut [u8] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: as above, and the caller has the range to itself.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr().add(range.start), range.len()) }
    }

    /// Gives the pages that lie wholly between two offsets back to the kernel. References to them
    /// that a pipe holds stay good. From then on they are zeroed.
    ///
    /// # Safety
    /// Nothing may refer to these bytes, or count on what they hold.
    pub(crate) unsafe fn discard(&self, range: Range<usize>) {
        assert!(range.end <= self.len);
        let Range { start, end } = whole_pages(range, page_size());
        if start < end {
            // SAFETY: the range lies in this mapping, and nothing refers to it.
            let result = unsafe {
                let first = self.base.add(start).cast();
                madvise(first, end - start, MmapAdvise::MADV_DONTNEED)
            };
            debug_assert!(result.is_ok(), "giving back memory of our own cannot fail");
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no reference to it is left.
        let result = unsafe { munmap(self.base.cast(), self.len) };
        debug_assert!(result.is_ok(), "unmapping memory of our own cannot fail");
    }
}

/// Has the kernel put pages behind memory of ours.
pub(crate) fn populate(memory: &mut [u8]) {
    let first = NonNull::from(&mut *memory).cast::<u8>();
    let start = first.addr().get();
    let pages = whole_pages(start..start + memory.len(), page_size());
    if pages.is_empty() {
        return;
    }
    // SAFETY: the pages lie in memory that is borrowed exclusively, and keep what they hold.
    // Refused by kernels before 5.14, and where there is no memory: filling it then brings the
    // pages, or the error.
    let _ = unsafe {
        let first = first.add(pages.start - start);
        madvise(first.cast(), pages.len(), MmapAdvise::MADV_POPULATE_WRITE)
    };
}

/// Memory that is always left free, in bytes.
pub(crate) const LEAST: u64 = 32 << 20;

/// Memory below which everything that can wait waits, in bytes.
pub(crate) const SHORT: u64 = 2 * LEAST;

/// The most to take before checking again how much memory is left, in bytes.
pub(crate) const MOST_UNSEEN: u64 = 256 << 20;

/// How much to take before checking again. Shrinks with what is left, because other processes
/// allocate too.
pub(crate) fn until_next_look(left: u64) -> u64 {
    (left / 8).min(MOST_UNSEEN)
}

/// The bytes of memory that this process can still get without taking them from others: what the
/// machine has available, or less where a memory cgroup of ours has less left. `None` where that
/// cannot be read.
pub(crate) fn available() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let machine = field(&meminfo, "MemAvailable:")? << 10;
    let cgroups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let left = cgroups.lines().filter_map(left_in_cgroup);
    Some(left.fold(machine, u64::min))
}

/// The number behind a word at the start of a line.
fn field(text: &str, word: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(word))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Bytes left in the memory cgroup that a line of /proc/self/cgroup names, and in its ancestors.
/// In a container the path may be the host's: the cgroup at the root of the mount is then ours.
fn left_in_cgroup(line: &str) -> Option<u64> {
    let mut parts = line.splitn(3, ':');
    let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
    let (root, files) = match controllers {
        "" => ("/sys/fs/cgroup", V2),
        _ if controllers.split(',').any(|name| name == "memory") => ("/sys/fs/cgroup/memory", V1),
        _ => return None,
    };
    let path = Path::new(root).join(path.trim_start_matches('/'));
    let within = path.ancestors().take_while(|path| path.starts_with(root));
    within.filter_map(|path| left_in(path, files)).min()
}

/// The files of a memory cgroup, and the fields of its memory.stat.
#[derive(Debug, Clone, Copy)]
struct CgroupFiles {
    limit: &'static str,
    usage: &'static str,
    /// Memory in use that the kernel takes back when it is needed, as `MemAvailable` counts it.
    reclaimable: &'static [&'static str],
    /// The part of it that has to be written to disk first.
    dirty: &'static [&'static str],
}

const V1: CgroupFiles = CgroupFiles {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    reclaimable: &["total_active_file ", "total_inactive_file "],
    dirty: &["total_dirty ", "total_writeback "],
};

const V2: CgroupFiles = CgroupFiles {
    limit: "memory.max",
    usage: "memory.current",
    reclaimable: &["active_file ", "inactive_file ", "slab_reclaimable "],
    dirty: &["file_dirty ", "file_writeback "],
};

fn left_in(cgroup: &Path, files: CgroupFiles) -> Option<u64> {
    let read = |name| std::fs::read_to_string(cgroup.join(name)).ok();
    let number = |name| read(name)?.trim().parse::<u64>().ok();
    let (limit, usage) = (number(files.limit)?, number(files.usage)?);
    let stat = read("memory.stat").unwrap_or_default();
    let sum = |words: &[&str]| -> u64 { words.iter().filter_map(|word| field(&stat, word)).sum() };
    let cache = sum(files.reclaimable).saturating_sub(sum(files.dirty));
    Some((limit + cache).saturating_sub(usage))
}

/// Bytes that are never written again, whatever becomes of their owner: what may be lent to a pipe.
#[derive(Debug, Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Sealed<'a>(IoSlice<'a>);

impl<'a> Sealed<'a> {
    /// # Safety
    /// The pages of `bytes` must never be written to again, also after `bytes` is gone, but by
    /// being unmapped or discarded: a pipe may hold references to them for as long as it likes.
    pub(crate) unsafe fn new(bytes: &'a [u8]) -> Self {
        Self(IoSlice::new(bytes))
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// For the system call that takes several.
    pub(super) fn slices<'b>(all: &'b [Self]) -> &'b [IoSlice<'a>] {
        // SAFETY: Sealed is a transparent wrapper of IoSlice.
        unsafe { std::slice::from_raw_parts(all.as_ptr().cast(), all.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_pages_are_given_back() {
        assert_eq!(whole_pages(0..4096, 4096), 0..4096);
        assert_eq!(whole_pages(1..12287, 4096), 4096..8192);
        assert_eq!(whole_pages(1..12288, 4096), 4096..12288);
        const LARGE: usize = 64 << 10;
        assert_eq!(whole_pages(4096..2 * LARGE + 4096, LARGE), LARGE..2 * LARGE);
        assert!(whole_pages(4096..LARGE - 4096, LARGE).is_empty());
        assert!(whole_pages(LARGE..2 * LARGE - 1, LARGE).is_empty());
    }

    #[test]
    fn a_cgroup_has_left_what_its_limit_and_its_parents_allow() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        assert_eq!(left_in(dir.path(), V2), None);
        write("memory.current", "3000\n");
        write("memory.max", "max\n");
        assert_eq!(left_in(dir.path(), V2), None);
        write("memory.max", "10000\n");
        assert_eq!(left_in(dir.path(), V2), Some(7000));
        let stat = "anon 5\nfile 7\nfile_dirty 30\nfile_writeback 20\ninactive_file 500\n\
                    active_file 700\nslab_reclaimable 40\n";
        write("memory.stat", stat);
        assert_eq!(
            left_in(dir.path(), V2),
            Some(7000 + 500 + 700 + 40 - 30 - 20)
        );
        write("memory.max", "1000\n");
        assert_eq!(left_in(dir.path(), V2), Some(0));
        assert!(available().is_some_and(|bytes| bytes > 0));
    }

    #[test]
    fn discarding_a_part_of_a_page_leaves_it_alone() {
        let mapping = Mapping::new(HUGE_PAGE).unwrap();
        let page = page_size();
        // SAFETY: nothing else knows of this mapping.
        unsafe {
            mapping.bytes_mut(0..3 * page).fill(7);
            mapping.discard(1..2 * page + 1);
            assert!(mapping.bytes(0..page).iter().all(|&byte| byte == 7));
            assert!(mapping.bytes(page..2 * page).iter().all(|&byte| byte == 0));
            assert!(
                mapping
                    .bytes(2 * page..3 * page)
                    .iter()
                    .all(|&byte| byte == 7)
            );
        }
    }
}
