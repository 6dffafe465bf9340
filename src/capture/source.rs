//! One file on its way in: the pipe that CRIU, or the writer of an external file, fills.
//!
//! CRIU's small files must be cheap, its page files fast. A pipe keeps its 64 KiB until it has
//! shown that it carries much; then it gets the most that the kernel allows. A file is moved when
//! it has ended, when its pipe is half full, or when nothing more came during a nap (its writer is
//! slow, or the pipe is full of partial pages); otherwise it is left to fill.
//!
//! A pipe that holds as many bytes as fit into its slots holds whole pages only. A source that was
//! once seen so full, and ever since held a multiple of a page, hands over memory, page by page.
//! The slots of any other may hold less than a page each, which decides the [`Route`] of its
//! chunks.
//!
//! CRIU's files of messages are always copied, because their framing is followed (see
//! [`super::dump_check`]). Even those of a large application hold a few megabytes.

use std::io;

use super::capacity;
use super::chunk::{Chunk, Route};
use crate::criu::files;
use crate::criu::framing::Framing;
use crate::format::ImageName;
use crate::os::pipe::{self, DEFAULT_SLOTS, ReadEnd, slot};

/// The most that the index has of the data of a file, in bytes, but for the chunk that passes this
/// (docs/protocol.md, section 2).
const LARGEST_IN_INDEX: usize = 1 << 20;

/// Slots full of bytes that show that a file is not small: half of a pipe of the default size.
const LARGE: usize = DEFAULT_SLOTS / 2;

/// The largest chunk that is copied, in bytes. One `write` then brings dozens of small files to a
/// shard and wakes its reader once; spliced, each would wake it twice.
pub(super) const LARGEST_COPIED: usize = 16 << 10;

/// The largest chunk of a file whose framing is followed, in bytes.
const LARGEST_READ: usize = 64 << 10;

/// The owner of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    Criu,
    External,
}

/// The next step with a source.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Ready {
    /// Give this chunk to a shard.
    Chunk(Chunk),
    /// It is empty; an event will come when it is not.
    Empty,
    /// Leave it to fill until after the next nap.
    Filling,
    /// It has ended.
    Ended,
}

/// The state of a source's pipe.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// It has this number of bytes.
    Bytes(usize),
    Empty,
    Ended,
}

/// A file that is being captured.
#[derive(Debug)]
pub(super) struct Source {
    /// Given by [`super::dump::Dump::open`].
    pub(super) id: u64,
    pub(super) name: ImageName,
    /// `None` when all of it is in the buffer.
    pipe: Option<ReadEnd>,
    pub(super) owner: Owner,
    /// Its writer is gone: what is in the pipe is the last of it.
    pub(super) has_ended: bool,
    /// The image names it, so that its end has to be marked too.
    pub(super) is_named: bool,
    /// CRIU sent the file again: what still comes does not count.
    pub(super) is_replaced: bool,
    /// It replaces one that the image names, whose end must be marked first.
    pub(super) restarts: bool,
    /// It has a turn in a later round.
    pub(super) is_queued: bool,
    /// The pipe's capacity.
    slots: usize,
    is_grown: bool,
    last_seen: usize,
    /// Bytes taken out of the pipe.
    moved: usize,
    /// Bytes given to shards.
    pub(super) given: usize,
    whole_pages: bool,
    framing: Option<Framing>,
}

impl Source {
    /// `slots` is the capacity of the pipe.
    pub(super) fn new(name: ImageName, pipe: ReadEnd, slots: usize, owner: Owner) -> Self {
        let framing = match owner {
            Owner::Criu => Framing::of(name.as_str()),
            Owner::External => None,
        };
        Self {
            id: 0,
            name,
            pipe: Some(pipe),
            owner,
            has_ended: false,
            is_named: false,
            is_replaced: false,
            restarts: false,
            is_queued: false,
            slots,
            is_grown: false,
            last_seen: 0,
            moved: 0,
            given: 0,
            whole_pages: false,
            framing,
        }
    }

    /// Makes the pipe non-blocking, to be read from.
    ///
    /// # Errors
    /// Where the pipe can be opened anew in no way.
    pub(super) fn make_nonblocking(&mut self) -> io::Result<()> {
        if let Some(pipe) = self.pipe.take() {
            self.pipe = Some(pipe.nonblocking()?);
        }
        Ok(())
    }

    /// The pipe that it comes through, until nothing more comes.
    pub(super) fn pipe(&self) -> &ReadEnd {
        self.pipe
            .as_ref()
            .expect("it is closed when nothing more comes")
    }

    /// True if more may come through its pipe.
    pub(super) fn is_open(&self) -> bool {
        self.pipe.is_some()
    }

    /// All of it has come.
    pub(super) fn close(&mut self) {
        self.pipe = None;
    }

    /// Decides which chunk to give to a shard. `staging` is the staging pipe's number of slots.
    pub(super) fn inspect(&mut self, staging: usize) -> io::Result<Ready> {
        let seen = self.last_seen;
        Ok(match self.look()? {
            Look::Empty => Ready::Empty,
            Look::Ended => Ready::Ended,
            Look::Bytes(available) => {
                let half_full = available * 2 >= self.slots * slot();
                if self.has_ended || half_full || available == seen {
                    Ready::Chunk(self.chunk(available, staging, slot()))
                } else {
                    Ready::Filling
                }
            }
        })
    }

    /// Looks at the pipe.
    pub(super) fn look(&mut self) -> io::Result<Look> {
        let available = pipe::available(self.pipe())?;
        self.last_seen = available;
        if available == 0 {
            return Ok(if self.has_ended {
                Look::Ended
            } else {
                Look::Empty
            });
        }
        let slot = slot();
        self.whole_pages = are_whole_pages(self.whole_pages, available, self.slots, slot);
        if !self.is_grown && available.max(self.moved) >= LARGE * slot {
            self.is_grown = true;
            self.slots = capacity::grow_source(self.pipe(), self.slots)?;
        }
        Ok(Look::Bytes(available))
    }

    fn chunk(&self, available: usize, staging: usize, slot: usize) -> Chunk {
        if self.framing.as_ref().is_some_and(|it| !it.is_over()) {
            let bytes = available.min(staging * slot).min(LARGEST_READ);
            return Chunk {
                bytes,
                slots: bytes.div_ceil(slot),
                route: Route::Copied,
                is_last: self.has_ended && bytes == available,
            };
        }
        let pages = available.div_ceil(slot);
        let (route, slots) = if available <= LARGEST_COPIED {
            (Route::Copied, pages)
        } else if self.whole_pages {
            (Route::Direct, pages)
        } else {
            (Route::Staged, staging.min(self.slots))
        };
        Chunk {
            bytes: available,
            slots,
            route,
            is_last: self.has_ended,
        }
    }

    /// It filled the staging pipe to the last byte.
    pub(super) fn holds_pages(&mut self) {
        self.whole_pages = true;
    }

    /// True if the data of this file goes to all shards, where the rest of the image has an index
    /// of its own: pages always, other files once they have brought much.
    pub(super) fn is_spread(&self) -> bool {
        files::is_pages(self.name.as_str()) || self.given > LARGEST_IN_INDEX
    }

    /// Its bytes took more slots than whole pages would.
    pub(super) fn holds_pieces(&mut self) {
        self.whole_pages = false;
    }

    /// This number of bytes was moved.
    pub(super) fn moved(&mut self, bytes: usize) {
        self.moved += bytes;
        self.last_seen = 0;
    }

    /// These bytes of it were copied.
    pub(super) fn copied(&mut self, bytes: &[u8]) {
        if let Some(framing) = &mut self.framing {
            framing.read(bytes);
        }
    }

    /// The framing of a file that begins with a magic; `None` for all others.
    pub(super) fn framing(&self) -> Option<&Framing> {
        self.framing.as_ref()
    }

    /// The error for bytes that were there before they were taken, and then not.
    pub(super) fn ended_early(&self, missing: usize) -> anyhow::Error {
        anyhow::anyhow!(
            "capturing {}: {missing} bytes are missing from its pipe: another process reads from it",
            self.name
        )
    }
}

/// True if a pipe of this many slots that holds `available` bytes counts as one of whole pages: it
/// did so far, or shows it now, and nothing speaks against it.
fn are_whole_pages(so_far: bool, available: usize, slots: usize, slot: usize) -> bool {
    (so_far || available == slots * slot) && available.is_multiple_of(slot)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAGING: usize = 64;

    fn source() -> (Source, pipe::WriteEnd) {
        let name = ImageName::new("pages-1.img").unwrap();
        let (read, write) = pipe::new().unwrap();
        (
            Source::new(name, read, DEFAULT_SLOTS, Owner::Criu),
            write.nonblocking().unwrap(),
        )
    }

    fn chunk(bytes: usize, slots: usize, route: Route) -> Ready {
        Ready::Chunk(Chunk {
            bytes,
            slots,
            route,
            is_last: false,
        })
    }

    #[test]
    fn a_source_is_left_to_fill_until_nothing_more_comes() {
        let (mut source, write) = source();
        assert_eq!(source.inspect(STAGING).unwrap(), Ready::Empty);
        pipe::write(&write, b"abc").unwrap();
        assert_eq!(source.inspect(STAGING).unwrap(), Ready::Filling);
        pipe::write(&write, b"def").unwrap();
        assert_eq!(source.inspect(STAGING).unwrap(), Ready::Filling);
        assert_eq!(source.inspect(STAGING).unwrap(), chunk(6, 1, Route::Copied));
    }

    #[test]
    fn an_ended_source_is_moved_at_once_and_for_the_last_time() {
        let (mut source, write) = source();
        pipe::write(&write, b"abc").unwrap();
        source.has_ended = true;
        let Ready::Chunk(mut chunk) = source.inspect(STAGING).unwrap() else {
            panic!("nothing to move");
        };
        assert!(chunk.is_last);
        chunk.shorten(2);
        assert!(!chunk.is_last);
    }

    #[test]
    fn only_a_large_file_gets_a_large_pipe() {
        let (mut source, write) = source();
        pipe::write(&write, &vec![0; LARGE * slot() - 1]).unwrap();
        source.inspect(STAGING).unwrap();
        assert_eq!(pipe::slots(&write).unwrap(), DEFAULT_SLOTS);
        pipe::write(&write, &[0; 1]).unwrap();
        source.inspect(STAGING).unwrap();
        assert!(
            pipe::slots(&write).unwrap() > DEFAULT_SLOTS
                || pipe::grow(&write, pipe::LARGEST).unwrap() == DEFAULT_SLOTS
        );
    }

    #[test]
    fn only_a_pipe_full_to_the_last_byte_shows_whole_pages() {
        let (mut source, write) = source();
        // Whatever becomes of the pipe, it is looked at as one that has not grown.
        source.is_grown = true;
        let (full, page) = (DEFAULT_SLOTS * slot(), slot());
        pipe::write(&write, &vec![0; full - page]).unwrap();
        assert_eq!(
            source.inspect(STAGING).unwrap(),
            chunk(full - page, DEFAULT_SLOTS, Route::Staged)
        );
        assert_eq!(
            source.inspect(8).unwrap(),
            chunk(full - page, 8, Route::Staged)
        );
        pipe::write(&write, &vec![0; page]).unwrap();
        assert_eq!(
            source.inspect(STAGING).unwrap(),
            chunk(full, DEFAULT_SLOTS, Route::Direct)
        );
        pipe::read(source.pipe(), &mut [0; 10]).unwrap();
        assert_eq!(
            source.inspect(STAGING).unwrap(),
            chunk(full - 10, DEFAULT_SLOTS, Route::Staged)
        );
    }
    #[test]
    fn pages_are_whole_where_a_pipe_is_full_of_them_whatever_their_size() {
        for page in [4 << 10, 16 << 10, 64 << 10] {
            let full = 16 * page;
            assert!(are_whole_pages(false, full, 16, page));
            assert!(!are_whole_pages(false, full - page, 16, page));
            assert!(are_whole_pages(true, full - page, 16, page));
            assert!(!are_whole_pages(true, full - 4095, 16, page));
        }
        assert!(!are_whole_pages(true, 4 << 10, 16, 64 << 10));
    }
}
