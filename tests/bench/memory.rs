//! Page memory of a known kind.
//!
//! What a streamer costs depends on the pages that its data sits in: CRIU's pages are the
//! application's, mostly of 4 KiB, already there when the dump starts. So the simulated CRIU needs
//! memory that has been touched before the clock starts, and the naive receiver needs the contrary:
//! 4 KiB pages that fault when they are first written, also on a machine where transparent huge
//! pages are on for every program.
#![allow(unsafe_code)] // mmap and madvise have no safe form.

use anyhow::{Context, Result};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};
use std::{ffi::c_void, num::NonZeroUsize, ops::Deref, ptr::NonNull, slice};

#[derive(Clone, Copy, PartialEq)]
pub enum Pages {
    Small,
    Huge,
}

pub struct PageMemory {
    start: NonNull<c_void>,
    len: NonZeroUsize,
}

impl PageMemory {
    /// Memory that no page stands behind yet.
    pub fn fresh(len: usize, pages: Pages) -> Result<Self> {
        let len = NonZeroUsize::new(len).context("Memory of no length")?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new anonymous mapping overlaps nothing that Rust knows of.
        let start = unsafe { mmap_anonymous(None, len, access, MapFlags::MAP_PRIVATE) }
            .with_context(|| format!("Failed to map {len} bytes"))?;
        let memory = Self { start, len };
        let advice = match pages {
            Pages::Small => MmapAdvise::MADV_NOHUGEPAGE,
            Pages::Huge => MmapAdvise::MADV_HUGEPAGE,
        };
        // SAFETY: the range is the mapping just made, and this advice changes no content.
        // A kernel without huge pages refuses it, and then has only small ones anyway.
        let _ = unsafe { madvise(start, len.get(), advice) };
        Ok(memory)
    }

    /// Memory filled with what a page of an application may look like: one half of each page cannot
    /// be compressed, the other is all the same.
    pub fn filled(len: usize, pages: Pages) -> Result<Self> {
        let mut memory = Self::fresh(len, pages)?;
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for page in memory.as_mut_slice().chunks_mut(4096) {
            let (noise, rest) = page.split_at_mut(page.len() / 2);
            for word in noise.chunks_mut(8) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                word.copy_from_slice(&state.to_le_bytes()[..word.len()]);
            }
            rest.fill(state as u8);
        }
        Ok(memory)
    }

    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: start..start+len is our own writable mapping, and the borrow of self keeps it and
        // keeps others away.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.len.get()) }
    }
}

impl Deref for PageMemory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: start..start+len is a readable mapping that lives as long as self.
        unsafe { slice::from_raw_parts(self.start.as_ptr().cast(), self.len.get()) }
    }
}

impl Drop for PageMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours alone, and no borrow of it outlives self.
        let _ = unsafe { munmap(self.start, self.len.get()) };
    }
}

// SAFETY: the mapping belongs to the value, like a Vec's heap memory does.
unsafe impl Send for PageMemory {}
// SAFETY: writing takes `&mut self`; shared references only read.
unsafe impl Sync for PageMemory {}
