//! A pages file, divided into the pages that CRIU reads itself, in order, and units to be filled in
//! later, which begin and end with a page.
//!
//! A unit goes to all memories that lack it: the process's own, and those of children that were
//! forked since. It is freed as it goes.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};

use super::memory::{Family, Memory, locked};
use super::pagemap::Stretch;
use super::parts::Parts;
use crate::os::memory::page_size;
use crate::report::meter::Counter;
use crate::store::{Arena, FileData};

/// The smallest unit in bytes, unless CRIU reads the pages behind it.
const SMALLEST_UNIT: u64 = 256 << 10;

/// The pages of a process that are filled in later.
#[derive(Debug)]
pub(super) struct PagesFile {
    /// The addresses and places of all of them.
    missing: Parts,
    /// Each with its place in the file; `None` from when a thread fills it. The last one is empty,
    /// and filled when the process goes on.
    units: Vec<(u64, Mutex<Option<FileData>>)>,
    /// The number of units that are not filled.
    left: AtomicUsize,
    family: Arc<Family>,
}

impl PagesFile {
    /// Divides the contents of a pages file, which has the size that the stretches need.
    pub(super) fn divide(
        stretches: &[Stretch],
        mut contents: FileData,
        arena: &mut Arena,
    ) -> io::Result<(Self, FileData)> {
        let (mut missing, mut units) = (Parts::default(), Vec::new());
        let (mut eager, mut offset) = (FileData::default(), 0);
        for run in stretches.chunk_by(|one, next| one.is_lazy == next.is_lazy) {
            let parts = run.iter().map(|stretch| stretch.part);
            let end = offset + parts.clone().map(|part| part.len).sum::<u64>();
            while offset < end {
                // As the pieces lie there, so that next to nothing is copied.
                let len = contents.front_len(SMALLEST_UNIT);
                let len = len.next_multiple_of(page_size() as u64).min(end - offset);
                let unit = contents.split_front(len, arena)?;
                match run[0].is_lazy {
                    true => units.push((offset, Mutex::new(Some(unit)))),
                    false => eager.append(unit)?,
                }
                offset += len;
            }
            parts
                .filter(|_| run[0].is_lazy)
                .for_each(|part| missing.insert(part));
        }
        units.push((offset, Mutex::new(Some(FileData::default()))));
        let file = Self {
            missing,
            left: AtomicUsize::new(units.len()),
            units,
            family: Arc::default(),
        };
        Ok((file, eager))
    }

    /// The memory of a process that CRIU restores.
    pub(super) fn memory(&self, pid: i32, real_pid: u32, uffd: OwnedFd) -> Arc<Memory> {
        Memory::restored(pid, real_pid, uffd, self.missing.clone(), &self.family)
    }

    pub(super) fn units(&self) -> usize {
        self.units.len()
    }

    /// The unit of a place.
    pub(super) fn unit_at(&self, offset: u64) -> usize {
        self.units.partition_point(|(begin, _)| *begin <= offset) - 1
    }

    /// Fills a unit into all memories that lack it, unless another thread does. Returns true if it
    /// was the last one: then the process and its children depend on us no more.
    pub(super) fn fill(&self, number: usize, buffer: &mut [u8], filled: &Counter) -> Result<bool> {
        let (mut offset, unit) = (self.units[number].0, &self.units[number].1);
        let Some(mut unit) = locked(unit).take() else {
            return Ok(false);
        };
        while !unit.is_empty() {
            let len = unit
                .read(buffer)
                .context("taking pages out of our memory")?;
            let bytes = &buffer[..len];
            self.family.each(|memory| memory.fill(offset, bytes))?;
            offset += len as u64;
            filled.add(len as u64);
        }
        let is_last = self.left.fetch_sub(1, Ordering::AcqRel) == 1;
        if is_last {
            self.family.each(Memory::close)?;
        }
        Ok(is_last)
    }
}
