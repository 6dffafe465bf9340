//! One file on its way out: from memory into the pipe that CRIU reads.
//!
//! The pipe is given references to the pages (`vmsplice`), which is right because the arena never writes to sealed memory
//! again. The pipe of a large file is given the largest capacity allowed; most files fit into any pipe.

use std::io::IoSlice;
use std::rc::Rc;

use anyhow::{Context, Result};
use nix::errno::Errno;

use crate::pipe::{self, DEFAULT_SLOTS, LARGEST, Moved, SLOT, WriteEnd};
use crate::store::mem::Contents;
use crate::store::{Arena, Extent};
use crate::wire::ImageName;

/// Extents given to the kernel at a time.
const BATCH: usize = 16;

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

    /// The next bytes to send.
    fn slices<'a>(&'a self, arena: &'a Arena) -> Vec<IoSlice<'a>> {
        match self {
            Rest::Once { front, rest } => front
                .iter()
                .chain(rest.as_slice())
                .take(BATCH)
                .map(|extent| IoSlice::new(arena.bytes(extent)))
                .collect(),
            Rest::Kept {
                contents,
                index,
                offset,
            } => {
                let mut skip = *offset;
                contents.extents()[*index..]
                    .iter()
                    .take(BATCH)
                    .map(|extent| IoSlice::new(&arena.bytes(extent)[std::mem::take(&mut skip)..]))
                    .collect()
            }
        }
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
    /// Something moved, and then the pipe was full.
    Some,
    /// The pipe was full.
    Nothing,
}

/// A file on its way to CRIU.
pub struct Transfer {
    name: ImageName,
    pipe: WriteEnd,
    rest: Rest,
    begun: bool,
}

impl Transfer {
    pub fn new(name: ImageName, pipe: WriteEnd, rest: Rest) -> Self {
        Self {
            name,
            pipe,
            rest,
            begun: false,
        }
    }

    pub fn pipe(&self) -> &WriteEnd {
        &self.pipe
    }

    /// Sends as much as the pipe takes. That CRIU closes the pipe early is its good right, and ends the transfer.
    ///
    /// # Errors
    /// Those of `vmsplice` other than a broken pipe.
    pub fn send(&mut self, arena: &mut Arena) -> Result<Sent> {
        if !self.begun {
            self.begun = true;
            if self.rest.is_large() {
                pipe::grow(&self.pipe, LARGEST)
                    .with_context(|| format!("serving {}", self.name))?;
            }
        }
        let mut sent = Sent::Nothing;
        while !self.rest.is_empty() {
            match pipe::vmsplice(&self.pipe, &self.rest.slices(arena)) {
                Ok(Moved::Bytes(bytes)) => {
                    self.rest.advance(bytes, arena);
                    sent = Sent::Some;
                }
                Ok(Moved::WouldBlock | Moved::End) => return Ok(sent),
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
