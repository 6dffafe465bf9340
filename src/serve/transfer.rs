//! One file on its way out: from memory into the pipe that CRIU reads.
//!
//! The pipe is given references to the pages (`vmsplice`), which is right because the arena never writes to sealed memory
//! again. The pipe of a large file is given the largest capacity allowed; most files fit into any pipe.

use std::io::IoSlice;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;

use crate::format::ImageName;
use crate::os::pipe::{self, DEFAULT_SLOTS, LARGEST, Moved, SLOT, WriteEnd};
use crate::store::mem::Contents;
use crate::store::{Arena, Extent};

/// What a `vmsplice` that meets nobody takes at most for each MiB, and besides: 20 to 30 µs were measured for 1 MiB. What it takes beyond
/// that it has waited.
const WORK_FOR_MIB: Duration = Duration::from_micros(30);
const OTHER_WORK: Duration = Duration::from_micros(70);

/// The most pieces of memory that one call takes (`UIO_MAXIOV` of the kernel).
const MOST_PIECES: usize = 1024;

/// What is left to send of a file.
pub enum Rest {
    /// Freed as it is sent.
    Once {
        front: Option<Extent>,
        rest: std::vec::IntoIter<Extent>,
    },
    /// Kept by the server; the next byte is at `offset` of extent `index`.
    Kept {
        contents: Rc<Contents>,
        index: usize,
        offset: usize,
    },
}

impl Rest {
    pub fn once(contents: Contents) -> Self {
        let mut rest = contents.into_extents();
        Rest::Once {
            front: rest.next(),
            rest,
        }
    }

    pub fn kept(contents: Rc<Contents>) -> Self {
        Rest::Kept {
            contents,
            index: 0,
            offset: 0,
        }
    }

    /// Gives back what is not kept.
    pub fn release(self, arena: &mut Arena) {
        if let Rest::Once { front, rest } = self {
            for extent in front.into_iter().chain(rest) {
                arena.release(extent);
            }
        }
    }

    fn is_empty(&self) -> bool {
        match self {
            Rest::Once { front, .. } => front.is_none(),
            Rest::Kept {
                contents, index, ..
            } => *index == contents.extents().len(),
        }
    }

    fn is_large(&self) -> bool {
        let size: usize = match self {
            Rest::Once { front, rest } => {
                front.iter().chain(rest.as_slice()).map(Extent::len).sum()
            }
            Rest::Kept { contents, .. } => contents.len(),
        };
        size > DEFAULT_SLOTS * SLOT
    }

    /// The next bytes to send: as much as fits into a pipe of so many slots, or everything.
    fn slices<'a>(&'a self, slots: usize, arena: &'a Arena) -> Vec<IoSlice<'a>> {
        let (mut skip, first, others) = match self {
            Rest::Once { front, rest } => (0, front.as_ref(), rest.as_slice()),
            Rest::Kept {
                contents,
                index,
                offset,
            } => (*offset, None, &contents.extents()[*index..]),
        };
        let mut left = slots * SLOT;
        first
            .into_iter()
            .chain(others)
            .take(slots.min(MOST_PIECES))
            .map_while(|extent| {
                let bytes = &arena.bytes(extent)[std::mem::take(&mut skip)..];
                let fits = left > 0;
                left = left.saturating_sub(bytes.len());
                fits.then(|| IoSlice::new(bytes))
            })
            .collect()
    }

    /// So many bytes were sent.
    fn advance(&mut self, mut bytes: usize, arena: &mut Arena) {
        match self {
            Rest::Once { front, rest } => {
                while let Some(mut extent) = front.take() {
                    if bytes < extent.len() {
                        arena.release(extent.split_front(bytes));
                        *front = Some(extent);
                        return;
                    }
                    bytes -= extent.len();
                    arena.release(extent);
                    *front = rest.next();
                }
            }
            Rest::Kept {
                contents,
                index,
                offset,
            } => {
                *offset += bytes;
                while let Some(extent) = contents.extents().get(*index)
                    && *offset >= extent.len()
                {
                    *offset -= extent.len();
                    *index += 1;
                }
            }
        }
    }
}

/// How far a transfer got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// To its end, or its reader wants no more.
    All,
    /// Some of it, and then the pipe was full.
    Part(Part),
}

/// What one attempt to send moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Part {
    /// How many of the pipe's slots it filled, maybe none.
    pub slots: usize,
    /// How long a call that met the pipe's reader at work waited for it.
    pub waited: Option<Duration>,
}

/// A file on its way to CRIU.
pub struct Transfer {
    name: ImageName,
    pipe: WriteEnd,
    rest: Rest,
    slots: usize,
    begun: bool,
}

impl Transfer {
    /// Sends `rest` into a pipe of so many slots.
    pub fn new(name: ImageName, pipe: WriteEnd, slots: usize, rest: Rest) -> Self {
        Self {
            name,
            pipe,
            rest,
            slots,
            begun: false,
        }
    }

    pub fn pipe(&self) -> &WriteEnd {
        &self.pipe
    }

    /// The pipe's capacity in slots.
    pub fn slots(&self) -> usize {
        self.slots
    }

    /// Sends as much as the pipe takes. That CRIU closes the pipe early is its good right, and ends the transfer.
    ///
    /// A pipe that took only a part of what it was offered is full. It is not asked again to make sure: its reader is awake by
    /// then and copies with the pipe's mutex held, for which we would spin.
    ///
    /// # Errors
    /// Those of `vmsplice` other than a broken pipe.
    pub fn send(&mut self, arena: &mut Arena) -> Result<Sent> {
        if !self.begun {
            self.begun = true;
            if self.rest.is_large() {
                self.slots = pipe::grow(&self.pipe, LARGEST)
                    .with_context(|| format!("serving {}", self.name))?;
            }
        }
        let mut sent = Part::default();
        while !self.rest.is_empty() {
            let slices = self.rest.slices(self.slots, arena);
            let offered: usize = slices.iter().map(|slice| slice.len()).sum();
            let start = Instant::now();
            let moved = pipe::vmsplice(&self.pipe, &slices);
            let taken = start.elapsed();
            match moved {
                Ok(Moved::Bytes(bytes)) => {
                    let slots = slots_for(&slices, bytes);
                    self.rest.advance(bytes, arena);
                    sent.slots += slots;
                    sent.waited = sent.waited.max(waiting(taken, bytes));
                    if bytes < offered {
                        return Ok(Sent::Part(sent));
                    }
                }
                Ok(Moved::WouldBlock | Moved::End) => return Ok(Sent::Part(sent)),
                Err(error) if error.raw_os_error() == Some(Errno::EPIPE as i32) => {
                    let nothing = Rest::once(Contents::Empty);
                    std::mem::replace(&mut self.rest, nothing).release(arena);
                }
                Err(error) => return Err(error).with_context(|| format!("serving {}", self.name)),
            }
        }
        Ok(Sent::All)
    }
}

/// The slots that the first `bytes` of these pieces take: each page that they touch takes one.
fn slots_for(pieces: &[IoSlice], mut bytes: usize) -> usize {
    let mut slots = 0;
    for piece in pieces {
        let len = piece.len().min(bytes);
        if len == 0 {
            break;
        }
        slots += (piece.as_ptr().addr() % SLOT + len).div_ceil(SLOT);
        bytes -= len;
    }
    slots
}

/// How much of the time that a call took for so many bytes it cannot have worked.
fn waiting(taken: Duration, bytes: usize) -> Option<Duration> {
    let work = OTHER_WORK + WORK_FOR_MIB.mul_f64(bytes as f64 / f64::from(1 << 20));
    taken.checked_sub(work).filter(|rest| !rest.is_zero())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_that_is_touched_takes_a_slot() {
        let memory = vec![0; 4 * SLOT];
        let start = memory.as_ptr().align_offset(SLOT);
        let pieces = [
            IoSlice::new(&memory[start..start + SLOT]),
            IoSlice::new(&memory[start + SLOT - 1..start + SLOT + 1]),
        ];
        assert_eq!(slots_for(&pieces, SLOT + 2), 3);
        assert_eq!(slots_for(&pieces, SLOT + 1), 2);
        assert_eq!(slots_for(&pieces, 1), 1);
        assert_eq!(slots_for(&pieces, 0), 0);
    }

    #[test]
    fn a_call_that_takes_longer_than_its_work_has_waited() {
        let quick = Duration::from_micros(90);
        assert_eq!(waiting(quick, 1 << 20), None);
        assert_eq!(
            waiting(quick, 4096),
            Some(quick - OTHER_WORK - WORK_FOR_MIB / 256)
        );
        let long = Duration::from_micros(400);
        assert_eq!(waiting(long, 1 << 20), Some(Duration::from_micros(300)));
    }
}
