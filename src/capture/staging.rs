//! A pipe that measures chunks: whatever fits into it needs at most its number of slots in a shard.
//!
//! It is filled only when a shard has that many free slots, and so is emptied at once.

use anyhow::{Context, Result};

use super::source::Source;
use crate::os::pipe::{self, Moved, ReadEnd, WriteEnd, slot};

/// The most slots of the staging pipe.
const MOST_SLOTS: usize = 64;

pub(super) struct Staging {
    read: ReadEnd,
    write: WriteEnd,
    slots: usize,
}

impl Staging {
    /// Makes a pipe whose content fits into a half-empty shard of `smallest` slots.
    pub(super) fn new(smallest: usize) -> Result<Self> {
        let (read, write, slots) = pipe::with_slots((smallest / 2).clamp(1, MOST_SLOTS))?;
        Ok(Self { read, write, slots })
    }

    pub(super) fn slots(&self) -> usize {
        self.slots
    }

    /// The end at which it is emptied.
    pub(super) fn read_end(&self) -> &ReadEnd {
        &self.read
    }

    /// Takes up to `len` bytes out of a source, as far as they fit, and returns how many these are.
    ///
    /// # Errors
    /// When the source has nothing any more.
    pub(super) fn fill(&self, source: &mut Source, len: usize) -> Result<usize> {
        let full = self.slots * slot();
        let moved = pipe::splice(source.pipe(), &self.write, len.min(full))
            .with_context(|| format!("capturing {}", source.name))?;
        let Moved::Bytes(bytes) = moved else {
            return Err(source.ended_early(len));
        };
        if bytes == full {
            source.holds_pages();
        }
        Ok(bytes)
    }
}
