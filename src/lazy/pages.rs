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
    units: Vec<Unit>,
    memories: Mutex<Vec<Arc<Memory>>>,
}

#[derive(Debug)]
struct Unit {
    offset: u64,
    len: usize,
    /// `None` when somebody fills it, or has.
    data: Mutex<Option<Vec<Piece>>>,
}

/// Data that was taken out of the file to be filled in.
#[derive(Debug)]
pub(super) struct Taken {
    offset: u64,
    data: Vec<Piece>,
    len: usize,
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
        let mut source = Source {
            pieces: contents.into_pieces().collect::<Vec<_>>().into_iter(),
            front: None,
            arena,
        };
        let mut eager = FileData::default();
        let mut units = Vec::new();
        let mut offset = 0;
        for run in stretches.chunk_by(|one, next| one.is_lazy == next.is_lazy) {
            let end = offset + run.iter().map(|stretch| stretch.len).sum::<u64>();
            while offset < end {
                let left = usize::try_from(end - offset).unwrap_or(usize::MAX);
                if run[0].is_lazy {
                    let unit = source.unit(offset, left)?;
                    offset += unit.len as u64;
                    units.push(unit);
                } else {
                    let piece = source.take(left)?;
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
        for stretch in &self.stretches {
            if stretch.is_lazy {
                missing.insert(Part {
                    address: stretch.address,
                    offset,
                    len: stretch.len,
                });
            }
            offset += stretch.len;
        }
        missing
    }

    pub(super) fn units(&self) -> usize {
        self.units.len()
    }

    pub(super) fn add(&self, memory: Arc<Memory>) {
        locked(&self.memories).push(memory);
    }

    pub(super) fn memories(&self) -> Vec<Arc<Memory>> {
        locked(&self.memories).clone()
    }

    /// Takes a unit, unless somebody else has.
    pub(super) fn take(&self, unit: usize) -> Option<Taken> {
        let Unit { offset, len, data } = &self.units[unit];
        locked(data).take().map(|data| Taken {
            offset: *offset,
            len: *len,
            data,
        })
    }

    /// Takes the unit of a place.
    pub(super) fn take_at(&self, offset: u64) -> Option<Taken> {
        let behind = self.units.partition_point(|unit| unit.offset <= offset);
        self.take(behind.checked_sub(1)?)
    }

    /// Fills a unit in wherever it is missing, and frees it. Returns its bytes.
    pub(super) fn fill(&self, taken: Taken, buffer: &mut Vec<u8>) -> Result<usize> {
        let Taken { offset, data, len } = taken;
        let kept;
        let bytes = match data.as_slice() {
            [Piece::Memory(extent)] => extent.bytes(),
            _ => {
                kept = data;
                buffer.resize(buffer.len().max(len), 0);
                read(kept, &mut buffer[..len]).context("taking pages out of our own memory")?;
                &buffer[..len]
            }
        };
        let mut filled = 0;
        loop {
            let memories = self.memories();
            if memories.len() == filled {
                return Ok(len);
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
        for memory in self.memories() {
            ensure!(
                memory.close_if_filled(),
                "process {} lacks pages that the image does not have",
                memory.pid
            );
        }
        Ok(())
    }
}

fn read(data: Vec<Piece>, mut buffer: &mut [u8]) -> io::Result<()> {
    for piece in data {
        let (front, behind) = buffer.split_at_mut(piece.len());
        piece.read(front)?;
        buffer = behind;
    }
    Ok(())
}

/// The pieces of a file, front to back.
struct Source<'a> {
    pieces: std::vec::IntoIter<Piece>,
    front: Option<Piece>,
    arena: &'a mut Arena,
}

impl Source<'_> {
    /// Up to `most` bytes, at least one: as they lie there.
    fn take(&mut self, most: usize) -> io::Result<Piece> {
        let next = self.front.take().or_else(|| self.pieces.next());
        let mut piece = next.ok_or(io::ErrorKind::UnexpectedEof)?;
        if piece.len() <= most {
            return Ok(piece);
        }
        let front = piece.split_front(most, self.arena)?;
        self.front = Some(piece);
        Ok(front)
    }

    /// The next pages, up to `most` bytes of them.
    fn unit(&mut self, offset: u64, most: usize) -> io::Result<Unit> {
        let (mut data, mut len) = (Vec::new(), 0_usize);
        loop {
            let rest = len.next_multiple_of(page_size()) - len;
            if rest == 0 && len >= SMALLEST_UNIT.min(most) {
                break;
            }
            let wanted = if rest > 0 { rest } else { LARGEST_UNIT };
            let piece = self.take(wanted.min(most - len))?;
            len += piece.len();
            data.push(piece);
        }
        Ok(Unit {
            offset,
            len,
            data: Mutex::new(Some(data)),
        })
    }
}
