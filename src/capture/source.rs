//! One file on its way in: the pipe that CRIU, or the writer of an external file, fills.
//!
//! CRIU's small files must be cheap, its page files fast. A pipe keeps its 64 KiB until it has shown that it carries much;
//! then it gets the most that the kernel allows. A file is moved when it has ended, when its pipe is half full, or when nothing more
//! came during a nap (its writer is slow, or the pipe is full of partial pages); otherwise it is left to fill.

use std::io;

use crate::pipe::{self, DEFAULT_SLOTS, LARGEST, ReadEnd, SLOT};
use crate::wire::ImageName;

/// Bytes in a pipe that show that a file is not small: half of a pipe that nobody resized.
const LARGE: usize = DEFAULT_SLOTS * SLOT / 2;

/// Who writes a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    Criu,
    External,
}

/// The rest of a chunk whose marker is written already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Promise {
    pub shard: usize,
    pub left: usize,
}

/// What to do with a source now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ready {
    /// Move so many bytes.
    Move(usize),
    /// It is empty; an event will tell when it is not.
    Empty,
    /// Leave it to fill until after the next nap.
    Filling,
    /// It has ended.
    Ended,
}

/// A file that is being captured.
#[derive(Debug)]
pub struct Source {
    pub name: ImageName,
    pub pipe: ReadEnd,
    pub origin: Origin,
    /// Nobody holds the write end: what is in the pipe is the last of it.
    pub ended: bool,
    /// Markers about it were queued, so that its end has to be marked too.
    pub named: bool,
    /// CRIU sent the file again: what still comes does not count.
    pub replaced: bool,
    /// The source that this one replaces; its end must be marked first.
    pub replaces: Option<u64>,
    pub promise: Option<Promise>,
    capacity: usize,
    grown: bool,
    last_seen: usize,
    moved: usize,
    bytes_per_slot: usize,
}

impl Source {
    pub fn new(name: ImageName, pipe: ReadEnd, origin: Origin) -> Self {
        Self {
            name,
            pipe,
            origin,
            ended: false,
            named: false,
            replaced: false,
            replaces: None,
            promise: None,
            capacity: DEFAULT_SLOTS,
            grown: false,
            last_seen: 0,
            moved: 0,
            bytes_per_slot: SLOT,
        }
    }

    /// Looks at the pipe and decides.
    ///
    /// # Errors
    /// Those of inspecting a pipe.
    pub fn inspect(&mut self) -> io::Result<Ready> {
        let available = pipe::available(&self.pipe)?;
        if available == 0 {
            self.last_seen = 0;
            return Ok(if self.ended {
                Ready::Ended
            } else {
                Ready::Empty
            });
        }
        let unchanged = available == self.last_seen;
        self.last_seen = available;
        if !self.grown && (available >= LARGE || self.moved >= LARGE) {
            self.grown = true;
            self.capacity = pipe::grow(&self.pipe, LARGEST)?;
        }
        let half_full = available * 2 >= self.capacity * SLOT;
        Ok(if self.ended || half_full || unchanged {
            Ready::Move(available)
        } else {
            Ready::Filling
        })
    }

    /// Slots that `bytes` from the pipe's front take elsewhere, as far as is known: full pages, one begun, unless this source
    /// turned out to send partial ones; and never more than the pipe has.
    pub fn slots_of(&self, bytes: usize) -> usize {
        (bytes.div_ceil(self.bytes_per_slot) + 1)
            .min(self.capacity.max(DEFAULT_SLOTS))
            .min(bytes)
    }

    /// Bytes, of those available, that go into so many slots. At least one, for pipes of one slot.
    pub fn bytes_in(&self, slots: usize, available: usize) -> usize {
        if slots >= self.slots_of(available) {
            return available;
        }
        (slots.saturating_sub(1).max(1) * self.bytes_per_slot).min(available)
    }

    /// So many bytes were moved.
    pub fn moved(&mut self, bytes: usize) {
        self.moved += bytes;
        self.last_seen = 0;
    }

    /// Whether it sent anything at all so far.
    pub fn has_content(&self) -> bool {
        self.moved > 0
    }

    /// A shard was full after `bytes`, although `slots` were free: this source sends partial pages.
    pub fn learn(&mut self, bytes: usize, slots: usize) {
        if bytes > 0 {
            self.bytes_per_slot = (bytes / slots.max(1)).clamp(1, self.bytes_per_slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source() -> (Source, pipe::WriteEnd) {
        let (read, write) = pipe::new().unwrap();
        (
            Source::new(ImageName::new("pages-1.img").unwrap(), read, Origin::Criu),
            write.nonblocking().unwrap(),
        )
    }

    #[test]
    fn a_source_is_left_to_fill_until_nothing_more_comes() {
        let (mut source, write) = source();
        assert_eq!(source.inspect().unwrap(), Ready::Empty);
        pipe::write(&write, b"abc").unwrap();
        assert_eq!(source.inspect().unwrap(), Ready::Filling);
        pipe::write(&write, b"def").unwrap();
        assert_eq!(source.inspect().unwrap(), Ready::Filling);
        assert_eq!(source.inspect().unwrap(), Ready::Move(6));
    }

    #[test]
    fn an_ended_source_is_moved_at_once() {
        let (mut source, write) = source();
        pipe::write(&write, b"abc").unwrap();
        source.ended = true;
        assert_eq!(source.inspect().unwrap(), Ready::Move(3));
    }

    #[test]
    fn only_a_large_file_gets_a_large_pipe() {
        let (mut source, write) = source();
        pipe::write(&write, &[0; LARGE - 1]).unwrap();
        source.inspect().unwrap();
        assert_eq!(pipe::slots(&write).unwrap(), DEFAULT_SLOTS);
        pipe::write(&write, &[0; 1]).unwrap();
        source.inspect().unwrap();
        assert!(
            pipe::slots(&write).unwrap() > DEFAULT_SLOTS
                || pipe::grow(&write, LARGEST).unwrap() == DEFAULT_SLOTS
        );
    }

    #[test]
    fn partial_pages_are_believed_to_take_more_slots_once_seen() {
        let (mut source, _write) = source();
        assert_eq!(source.slots_of(8 * SLOT), 9);
        assert_eq!(source.bytes_in(5, 100 * SLOT), 4 * SLOT);
        source.learn(1000, 10);
        assert_eq!(source.slots_of(1000), 11);
        assert_eq!(source.bytes_in(5, 100_000), 400);
        assert_eq!(source.bytes_in(1, 100_000), 100);
    }
}
