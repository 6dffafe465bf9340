//! One file on its way out: from memory into the pipe that CRIU reads.
//!
//! The pipe is given references to the pages (`vmsplice`), which is right because the arena never writes to sealed memory
//! again. The pipe of a large file is given the largest capacity allowed; most files fit into any pipe.

use std::io::IoSlice;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;

use crate::pipe::{self, DEFAULT_SLOTS, LARGEST, Moved, SLOT, WriteEnd};
use crate::store::mem::Contents;
use crate::store::{Arena, Extent};
use crate::wire::ImageName;

/// A `vmsplice` that takes longer than this has waited: filling a pipe of 1 MiB takes 20 to 30 µs.
const WAITED: Duration = Duration::from_micros(100);

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

    /// The next bytes to send: as much as fits into a pipe of this capacity, or everything.
    fn slices<'a>(&'a self, capacity: usize, arena: &'a Arena) -> Vec<IoSlice<'a>> {
        let (mut skip, first, others) = match self {
            Rest::Once { front, rest } => (0, front.as_ref(), rest.as_slice()),
            Rest::Kept {
                contents,
                index,
                offset,
            } => (*offset, None, &contents.extents()[*index..]),
        };
        let mut left = capacity;
        first
            .into_iter()
            .chain(others)
            .take(capacity / SLOT)
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
    /// Maybe none.
    pub bytes: usize,
    /// How long a call took that met the pipe's reader at work, and had to wait for the pipe.
    pub waited: Option<Duration>,
}

/// A file on its way to CRIU.
pub struct Transfer {
    name: ImageName,
    pipe: WriteEnd,
    rest: Rest,
    /// Bytes that the pipe holds at most; 0 before the beginning.
    capacity: usize,
}

impl Transfer {
    pub fn new(name: ImageName, pipe: WriteEnd, rest: Rest) -> Self {
        Self {
            name,
            pipe,
            rest,
            capacity: 0,
        }
    }

    pub fn pipe(&self) -> &WriteEnd {
        &self.pipe
    }

    /// Bytes that the pipe holds at most.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Sends as much as the pipe takes. That CRIU closes the pipe early is its good right, and ends the transfer.
    ///
    /// A pipe that took only a part of what it was offered is full. It is not asked again to make sure: its reader is awake by
    /// then and copies with the pipe's mutex held, for which we would spin.
    ///
    /// # Errors
    /// Those of `vmsplice` other than a broken pipe.
    pub fn send(&mut self, arena: &mut Arena) -> Result<Sent> {
        if self.capacity == 0 {
            self.capacity = DEFAULT_SLOTS * SLOT;
            if self.rest.is_large() {
                let slots = pipe::grow(&self.pipe, LARGEST)
                    .with_context(|| format!("serving {}", self.name))?;
                self.capacity = slots * SLOT;
            }
        }
        let mut sent = Part::default();
        while !self.rest.is_empty() {
            let slices = self.rest.slices(self.capacity, arena);
            let offered: usize = slices.iter().map(|slice| slice.len()).sum();
            let start = Instant::now();
            let moved = pipe::vmsplice(&self.pipe, &slices);
            sent.waited = Some(start.elapsed()).filter(|&taken| taken > WAITED);
            match moved {
                Ok(Moved::Bytes(bytes)) => {
                    self.rest.advance(bytes, arena);
                    sent.bytes += bytes;
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
