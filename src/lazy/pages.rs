//! A pages file, in two: what CRIU reads itself, in order, and what is filled in later, in units
//! that begin and end with a page.
//!
//! A unit goes to all memories that miss it: that of the process, and those of the children that it
//! has forked since. Then it is freed. A child is added while its parent's memory is locked, and
//! lacks what the parent lacked. So when a unit was filled in all memories, and none has come
//! since, none will ever miss it again.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};

use super::memory::Memory;
use super::pagemap::Stretch;
use super::parts::{Part, Parts};
use crate::os::memory::page_size;
use crate::store::{Arena, FileData, Piece};

/// Bytes of a unit at most, but for a page that is in several pieces.
const LARGEST_UNIT: usize = 1 << 20;

/// Bytes of a unit at least, unless the file does not go on there.
const SMALLEST_UNIT: usize = 256 << 10;

/// The pages of a process that are filled in later.
#[derive(Debug)]
pub(super) struct PagesFile {
    stretches: Vec<Stretch>,
    /// Each with its place in the file; `None` when somebody fills it, or has. The last is empty,
    /// and filled when the process goes on.
    units: Vec<(u64, Mutex<Option<FileData>>)>,
    /// The units that are not filled.
    left: AtomicUsize,
    memories: Mutex<Vec<Arc<Memory>>>,
}

/// Never left in disorder: a panic ends the program.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PagesFile {
    /// Of a process that has none.
    pub(super) fn none() -> Self {
        Self::new(Vec::new(), Vec::new(), 0)
    }

    fn new(stretches: Vec<Stretch>, units: Vec<(u64, FileData)>, end: u64) -> Self {
        let units = units.into_iter().chain([(end, FileData::default())]);
        let units = units.map(|(begin, unit)| (begin, Mutex::new(Some(unit))));
        let units: Vec<_> = units.collect();
        Self {
            stretches,
            left: AtomicUsize::new(units.len()),
            units,
            memories: Mutex::default(),
        }
    }

    /// Divides the contents of a pages file, which has the size that the stretches need.
    pub(super) fn divide(
        stretches: Vec<Stretch>,
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
        let (mut units, mut eager, mut offset) = (Vec::new(), FileData::default(), 0);
        for run in stretches.chunk_by(|one, next| one.is_lazy == next.is_lazy) {
            let mut left = run.iter().map(|stretch| stretch.len as usize).sum();
            while left > 0 {
                let unit = unit(left, &mut take)?;
                let (begin, len) = (offset, unit.len());
                (offset, left) = (begin + len as u64, left - len);
                if run[0].is_lazy {
                    units.push((begin, unit));
                } else {
                    unit.into_pieces().try_for_each(|piece| eager.push(piece))?;
                }
            }
        }
        Ok((Self::new(stretches, units, offset), eager))
    }

    /// All that is filled in later.
    pub(super) fn missing(&self) -> Parts {
        let (mut missing, mut offset) = (Parts::default(), 0);
        for &Stretch {
            address,
            len,
            is_lazy,
        } in &self.stretches
        {
            if is_lazy {
                missing.insert(Part {
                    address,
                    offset,
                    len,
                });
            }
            offset += len;
        }
        missing
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

    /// Fills a unit in wherever it is missing, and frees it; returns its length. `None` if somebody
    /// else fills it. The process depends on us no more when its last one is filled.
    pub(super) fn fill(&self, number: usize, buffer: &mut Vec<u8>) -> Result<Option<usize>> {
        let (offset, unit) = &self.units[number];
        let Some(unit) = locked(unit).take() else {
            return Ok(None);
        };
        let len = unit.len();
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
fn unit(most: usize, mut take: impl FnMut(usize) -> io::Result<Piece>) -> io::Result<FileData> {
    let mut unit = FileData::default();
    loop {
        let rest = unit.len().next_multiple_of(page_size()) - unit.len();
        if rest == 0 && unit.len() >= SMALLEST_UNIT.min(most) {
            return Ok(unit);
        }
        let wanted = if rest > 0 { rest } else { LARGEST_UNIT };
        unit.push(take(wanted.min(most - unit.len()))?)?;
    }
}
