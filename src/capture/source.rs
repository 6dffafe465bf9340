//! One file on its way in: the pipe that CRIU, or the writer of an external file, fills.
//!
//! CRIU's small files must be cheap, its page files fast. A pipe keeps its 64 KiB until it has shown that it carries much;
//! then it gets the most that the kernel allows. A file is moved when it has ended, when its pipe is half full, or when nothing more
//! came during a nap (its writer is slow, or the pipe is full of partial pages); otherwise it is left to fill.
//!
//! **How many slots a chunk takes.** `FIONREAD` counts bytes, and a slot holds anything from a byte to a page. Three things are
//! certain: n bytes take at most n slots, and no more than the pipe has; and a pipe that holds as many bytes as fit into
//! its slots holds whole pages only. A source that was once seen so full, and ever since held a multiple of a page, hands
//! over memory, page by page. Of any other, a chunk is first moved to a staging pipe of known size ([`Layout::Unknown`]).

use std::io;

use crate::format::ImageName;
use crate::os::pipe::{self, DEFAULT_SLOTS, LARGEST, ReadEnd, SLOT};

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
    /// It lies in the staging pipe, not in the source.
    pub staged: bool,
}

/// What is known of the slots that a source's data takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Each slot holds a whole page.
    Pages,
    /// All of it takes so many slots at most.
    AtMost(usize),
    /// It may take more slots than shards should have to have free.
    Unknown,
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
    whole_pages: bool,
}

impl Source {
    /// # Errors
    /// Those of inspecting a pipe.
    /// `capacity` is that of the pipe, in slots.
    pub fn new(name: ImageName, pipe: ReadEnd, capacity: usize, origin: Origin) -> Self {
        Self {
            name,
            pipe,
            origin,
            ended: false,
            named: false,
            replaced: false,
            replaces: None,
            promise: None,
            capacity,
            grown: false,
            last_seen: 0,
            moved: 0,
            whole_pages: false,
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
        self.whole_pages |= available == self.capacity * SLOT;
        self.whole_pages &= available.is_multiple_of(SLOT);
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

    /// How the `available` bytes lie in slots, where a number of them up to `bearable` is no reason to look closer.
    pub fn layout(&self, available: usize, bearable: usize) -> Layout {
        let most = available.min(self.capacity);
        if self.whole_pages {
            Layout::Pages
        } else if most <= bearable {
            Layout::AtMost(most)
        } else {
            Layout::Unknown
        }
    }

    /// So many bytes filled so many slots of the staging pipe.
    pub fn staged(&mut self, bytes: usize, slots: usize) {
        self.whole_pages |= bytes == slots * SLOT;
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
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source() -> (Source, pipe::WriteEnd) {
        let name = ImageName::new("pages-1.img").unwrap();
        let (read, write) = pipe::new().unwrap();
        (
            Source::new(name, read, DEFAULT_SLOTS, Origin::Criu),
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
    fn only_a_pipe_full_to_the_last_byte_shows_whole_pages() {
        let (mut source, write) = source();
        pipe::write(&write, &[0; SLOT]).unwrap();
        source.inspect().unwrap();
        assert_eq!(
            source.layout(SLOT, DEFAULT_SLOTS),
            Layout::AtMost(DEFAULT_SLOTS)
        );
        assert_eq!(source.layout(SLOT, 8), Layout::Unknown);
        assert_eq!(source.layout(5, 8), Layout::AtMost(5));

        pipe::write(&write, &[0; (DEFAULT_SLOTS - 1) * SLOT]).unwrap();
        source.inspect().unwrap();
        assert_eq!(source.layout(16 * SLOT, 8), Layout::Pages);
        pipe::read(&source.pipe, &mut [0; 10]).unwrap();
        source.inspect().unwrap();
        assert_eq!(source.layout(16 * SLOT - 10, 8), Layout::Unknown);
    }
}
