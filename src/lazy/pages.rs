//! A pages file, in two: what CRIU reads itself, in order, and what is filled in later, in units
//! that begin and end with a page.
//!
//! A unit goes to all memories that miss it: that of the process, and those of the children that it
//! has forked since. Then it is freed. A child is added while its parent's memory is locked, and
//! lacks what the parent lacked. So when a unit was filled in all memories, and none has come
//! since, none will ever miss it again.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, ensure};

use super::memory::Memory;
use super::missing::{Missing, Part};
use super::pagemap::Stretch;
use crate::os::memory::page_size;
use crate::store::{Arena, FileData, Piece};

/// Bytes of a unit at most, but for a page that is in several pieces.
const LARGEST_UNIT: usize = 1 << 20;

/// Bytes of a unit at least, unless the file does not go on there.
const SMALLEST_UNIT: usize = 256 << 10;

/// The pages of a process that are filled in later.
#[derive(Debug, Default)]
pub(super) struct PagesFile {
    stretches: Vec<Stretch>,
    /// Each with its place in the file; `None` when somebody fills it, or has.
    units: Vec<(u64, Mutex<Option<Unit>>)>,
    memories: Mutex<Vec<Arc<Memory>>>,
}

/// Data that is filled in at a time.
#[derive(Debug)]
pub(super) struct Unit {
    offset: u64,
    pub(super) len: usize,
    data: Vec<Piece>,
}

/// Never left in disorder: a panic ends the program.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PagesFile {
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
            let end = offset + run.iter().map(|stretch| stretch.len).sum::<u64>();
            while offset < end {
                let left = usize::try_from(end - offset).unwrap_or(usize::MAX);
                if run[0].is_lazy {
                    let (len, data) = unit(left, &mut take)?;
                    let unit = Unit { offset, len, data };
                    units.push((offset, Mutex::new(Some(unit))));
                    offset += len as u64;
                } else {
                    let piece = take(left)?;
                    offset += piece.len() as u64;
                    eager.push(piece)?;
                }
            }
        }
        let file = Self {
            stretches,
            units,
            memories: Mutex::default(),
        };
        Ok((file, eager))
    }

    /// All that is filled in later.
    pub(super) fn missing(&self) -> Missing {
        let mut missing = Missing::default();
        let mut offset = 0;
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

    fn memories(&self) -> Vec<Arc<Memory>> {
        locked(&self.memories).clone()
    }

    /// Takes a unit, unless somebody else has.
    pub(super) fn take(&self, number: usize) -> Option<Unit> {
        locked(&self.units[number].1).take()
    }

    /// Takes the unit of a place.
    pub(super) fn take_at(&self, offset: u64) -> Option<Unit> {
        let behind = self.units.partition_point(|(begin, _)| *begin <= offset);
        self.take(behind.checked_sub(1)?)
    }

    /// Fills a unit in wherever it is missing, and frees it.
    pub(super) fn fill(&self, unit: Unit, buffer: &mut Vec<u8>) -> Result<()> {
        let Unit { offset, len, data } = unit;
        let read;
        let bytes = if let [Piece::Memory(extent)] = data.as_slice() {
            extent.bytes()
        } else {
            buffer.resize(buffer.len().max(len), 0);
            read = &mut buffer[..len];
            let mut rest = &mut *read;
            for piece in data {
                let (front, behind) = rest.split_at_mut(piece.len());
                piece
                    .read(front)
                    .context("taking pages out of our memory")?;
                rest = behind;
            }
            read
        };
        let mut filled = 0;
        loop {
            let memories = self.memories();
            if memories.len() == filled {
                return Ok(());
            }
            for memory in &memories[filled..] {
                memory.fill(offset, bytes)?;
            }
            filled = memories.len();
        }
    }

    /// # Errors
    /// When a memory lacks something although all is filled in.
    pub(super) fn close(&self) -> Result<()> {
        self.memories().iter().try_for_each(|memory| {
            let pid = memory.pid;
            ensure!(
                memory.close_if_filled(),
                "process {pid} lacks pages that the image does not have"
            );
            Ok(())
        })
    }
}

/// The next pages, up to `most` bytes of them.
fn unit(
    most: usize,
    mut take: impl FnMut(usize) -> io::Result<Piece>,
) -> io::Result<(usize, Vec<Piece>)> {
    let (mut len, mut data) = (0_usize, Vec::new());
    loop {
        let rest = len.next_multiple_of(page_size()) - len;
        if rest == 0 && len >= SMALLEST_UNIT.min(most) {
            return Ok((len, data));
        }
        let wanted = if rest > 0 { rest } else { LARGEST_UNIT };
        let piece = take(wanted.min(most - len))?;
        len += piece.len();
        data.push(piece);
    }
}
