//! A pages file, divided into the pages that CRIU reads itself, in order, and units to be filled in
//! later, which begin and end with a page.
//!
//! A unit goes to all memories that lack it: the process's own, and those of children that were
//! forked since. Then it is freed. A child is added while its parent's memory is locked, and lacks
//! the same pages. So when a unit was filled into all memories, and none was added since, none will
//! ever lack it again.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};

use super::memory::Memory;
use super::pagemap::Stretch;
use super::parts::Parts;
use crate::os::memory::page_size;
use crate::store::{Arena, FileData, Piece};

/// The largest unit in bytes, but for a page that is in several pieces.
const LARGEST_UNIT: usize = 1 << 20;

/// The smallest unit in bytes, unless CRIU reads the pages behind it.
const SMALLEST_UNIT: usize = 256 << 10;

/// The pages of a process that are filled in later.
#[derive(Debug)]
pub(super) struct PagesFile {
    /// The addresses and places of all of them.
    pub(super) missing: Parts,
    /// Each with its place in the file; `None` from when a thread fills it. The last one is empty,
    /// and filled when the process goes on.
    units: Vec<(u64, Mutex<Option<FileData>>)>,
    /// The number of units that are not filled.
    left: AtomicUsize,
    memories: Mutex<Vec<Arc<Memory>>>,
}

/// Never left in disorder: a panic ends the program.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PagesFile {
    /// Divides the contents of a pages file, which has the size that the stretches need.
    pub(super) fn divide(
        stretches: &[Stretch],
        contents: FileData,
        arena: &mut Arena,
    ) -> io::Result<(Self, FileData)> {
        let mut pieces: Vec<_> = contents.into_pieces().collect();
        pieces.reverse();
        // Up to `most` bytes, at least one: as they lie there.
        let mut take = |most: usize| {
            let mut piece = pieces.pop().ok_or(io::ErrorKind::UnexpectedEof)?;
            if piece.len() <= most {
                return Ok(piece);
            }
            let front = piece.split_front(most, arena)?;
            pieces.push(piece);
            Ok::<_, io::Error>(front)
        };
        let (mut missing, mut units) = (Parts::default(), Vec::new());
        let (mut eager, mut offset) = (FileData::default(), 0);
        for run in stretches.chunk_by(|one, next| one.is_lazy == next.is_lazy) {
            let is_lazy = run[0].is_lazy;
            let parts = run.iter().map(|stretch| stretch.part);
            let mut left = parts.clone().map(|part| part.len).sum();
            while left > 0 {
                let unit = unit(left, &mut take)?;
                let len = unit.len();
                left -= len;
                if is_lazy {
                    units.push((offset, Mutex::new(Some(unit))));
                } else {
                    unit.into_pieces().try_for_each(|piece| eager.push(piece))?;
                }
                offset += len;
            }
            parts
                .filter(|_| is_lazy)
                .for_each(|part| missing.insert(part));
        }
        units.push((offset, Mutex::new(Some(FileData::default()))));
        let file = Self {
            missing,
            left: AtomicUsize::new(units.len()),
            units,
            memories: Mutex::default(),
        };
        Ok((file, eager))
    }

    pub(super) fn units(&self) -> usize {
        self.units.len()
    }

    pub(super) fn add(&self, memory: Arc<Memory>) {
        locked(&self.memories).push(memory);
    }

    /// The unit of a place.
    pub(super) fn unit_at(&self, offset: u64) -> usize {
        self.units.partition_point(|(begin, _)| *begin <= offset) - 1
    }

    /// Fills a unit into all memories that lack it, frees it, and returns its length; `None` if
    /// another thread fills it. With the last one the process depends on us no more.
    pub(super) fn fill(&self, number: usize, buffer: &mut Vec<u8>) -> Result<Option<usize>> {
        let (offset, unit) = &self.units[number];
        let Some(unit) = locked(unit).take() else {
            return Ok(None);
        };
        let len = unit.len() as usize;
        let bytes = if let Some(all) = unit.memory().next().filter(|all| all.len() == len) {
            all.bytes()
        } else {
            buffer.resize(buffer.len().max(len), 0);
            let mut rest = &mut buffer[..len];
            for piece in unit.into_pieces() {
                let (front, behind) = rest.split_at_mut(piece.len());
                piece
                    .read(front)
                    .context("taking pages out of our memory")?;
                rest = behind;
            }
            &buffer[..len]
        };
        self.each_memory(|memory| memory.fill(*offset, bytes))?;
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.each_memory(Memory::close)?;
        }
        Ok(Some(len))
    }

    fn each_memory(&self, act: impl Fn(&Memory) -> Result<()>) -> Result<()> {
        let mut done = 0;
        loop {
            let memories = locked(&self.memories).clone();
            if memories.len() == done {
                return Ok(());
            }
            memories[done..].iter().try_for_each(|memory| act(memory))?;
            done = memories.len();
        }
    }
}

/// The next pages, up to `most` bytes of them.
fn unit(most: u64, mut take: impl FnMut(usize) -> io::Result<Piece>) -> io::Result<FileData> {
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    let mut unit = FileData::default();
    loop {
        let len = unit.len() as usize;
        let rest = len.next_multiple_of(page_size()) - len;
        if rest == 0 && len >= SMALLEST_UNIT.min(most) {
            return Ok(unit);
        }
        let wanted = if rest > 0 { rest } else { LARGEST_UNIT };
        unit.push(take(wanted.min(most - len))?)?;
    }
}
