//! One file on its way in: the pipe that CRIU, or the writer of an external file, fills.
//!
//! CRIU's small files must be cheap, its page files fast. A pipe keeps its 64 KiB until it has
//! shown that it carries much; then it gets the most that the kernel allows. A file is moved when
//! it has ended, when its pipe is half full, or when nothing more came during a nap (its writer is
//! slow, or the pipe is full of partial pages); otherwise it is left to fill.
//!
//! **Units.** With one shard, images of the same memory look the same, so that a store that keeps
//! equal blocks once has next to nothing to add for the second. CRIU's page files are cut at
//! multiples of a unit, and no less is moved unless the file has ended. CRIU loses nothing by that:
//! it gives whole pages, so a pipe without room is full to the last byte.
//!
//! CRIU's other files, all of which are small but for archives, are collected in memory, and given
//! at their end, or at multiples of 64 KiB. Their framing is followed (see [`super::dump_check`]).
//!
//! A pipe that holds as many bytes as fit into its slots holds whole pages only. A source that was
//! once seen so full, and ever since held a multiple of a page, hands over memory, page by page.
//! The slots of any other may hold less than a page each, which decides the [`Route`] of its
//! chunks.

use std::io;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::capacity;
use super::chunk::{Chunk, Route};
use crate::criu::files;
use crate::criu::framing::Framing;
use crate::format::ImageName;
use crate::os::pipe::{self, DEFAULT_SLOTS, Moved, ReadEnd, slot};

/// The most that the index has of the data of a file, in bytes, but for the chunk that passes this
/// (docs/protocol.md, section 2).
const LARGEST_IN_INDEX: usize = 1 << 20;

/// Slots full of bytes that show that a file is not small: half of a pipe of the default size.
const LARGE: usize = DEFAULT_SLOTS / 2;

/// The largest chunk that is copied, in bytes. One `write` then brings dozens of small files to a
/// shard and wakes its reader once; spliced, each would wake it twice.
pub(super) const LARGEST_COPIED: usize = 16 << 10;

/// The largest chunk of what is collected, in bytes.
const LARGEST_COLLECTED: usize = 64 << 10;

/// How long a part of a unit is left where it is while nothing more comes.
const LONGEST_HOLD: Duration = Duration::from_secs(1);

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
    /// Nothing of it is to be moved; an event will come with more.
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
    last_change: Instant,
    /// Bytes taken out of the pipe.
    moved: usize,
    /// The last of these, which no shard has yet.
    pub(super) collected: Vec<u8>,
    /// Bytes given to shards.
    pub(super) given: usize,
    /// It is one of CRIU's page files.
    is_pages: bool,
    whole_pages: bool,
    framing: Option<Framing>,
}

impl Source {
    /// `slots` is the capacity of the pipe.
    ///
    /// # Errors
    /// Where the pipe cannot be made non-blocking.
    pub(super) fn new(name: ImageName, pipe: ReadEnd, slots: usize, owner: Owner) -> Result<Self> {
        let pipe = pipe.nonblocking();
        let pipe = pipe.with_context(|| format!("preparing to read {name}"))?;
        let is_of_criu = owner == Owner::Criu;
        let is_pages = is_of_criu && files::is_pages(name.as_str());
        let framing = is_of_criu.then(|| Framing::of(name.as_str())).flatten();
        Ok(Self {
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
            last_change: Instant::now(),
            moved: 0,
            collected: Vec::new(),
            given: 0,
            is_pages,
            whole_pages: is_pages,
            framing,
        })
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

    /// Decides which chunk to give to a shard. Page files are cut at multiples of `unit` bytes, if
    /// they are. `staging` is the staging pipe's number of slots.
    pub(super) fn inspect(&mut self, unit: Option<usize>, staging: usize) -> Result<Ready> {
        let seen = self.last_seen;
        let look = self.look();
        let look = look.with_context(|| format!("capturing {}", self.name))?;
        if self.is_collected() {
            return self.inspect_collected(&look);
        }
        let available = match look {
            Look::Bytes(available) => available,
            Look::Ended => return Ok(Ready::Ended),
            Look::Empty => return Ok(Ready::Empty),
        };
        let capacity = self.slots * slot();
        let left = self.left_of(unit);
        let enough = left.unwrap_or(capacity / 2).min(capacity);
        let is_held = left.is_some() && self.whole_pages;
        Ok(if self.has_ended || available >= enough {
            Ready::Chunk(self.chunk(available, left, staging))
        } else if available != seen {
            Ready::Filling
        } else if is_held && self.last_change.elapsed() < LONGEST_HOLD {
            Ready::Empty
        } else {
            Ready::Chunk(self.chunk(available, left, staging))
        })
    }

    /// The bytes that are missing from the unit that was begun, if the file is cut at units.
    pub(super) fn left_of(&self, unit: Option<usize>) -> Option<usize> {
        let unit = unit.filter(|_| self.is_pages)?;
        Some(unit - self.given % unit)
    }

    /// True if it is given to shards out of memory, at its end or in pieces of one size.
    fn is_collected(&self) -> bool {
        self.owner == Owner::Criu && !self.is_pages
    }

    fn inspect_collected(&mut self, look: &Look) -> Result<Ready> {
        let mut is_whole = *look == Look::Ended;
        if let Look::Bytes(available) = *look {
            let in_all = self.collected.len() + available;
            self.collect(in_all.min(LARGEST_COLLECTED))?;
            is_whole = self.has_ended && in_all <= LARGEST_COLLECTED;
        }
        let bytes = self.collected.len();
        Ok(match bytes {
            0 if is_whole => Ready::Ended,
            _ if is_whole || bytes == LARGEST_COLLECTED => Ready::Chunk(Chunk {
                bytes,
                slots: bytes.div_ceil(slot()),
                route: Route::Copied,
                is_last: bytes < LARGEST_COLLECTED,
            }),
            _ => Ready::Empty,
        })
    }

    /// Collects `bytes` in all, of which the pipe must hold what is missing.
    ///
    /// # Errors
    /// When another process reads from the pipe.
    pub(super) fn collect(&mut self, bytes: usize) -> Result<()> {
        let start = self.collected.len();
        let Some(missing) = bytes.checked_sub(start).filter(|&missing| missing > 0) else {
            return Ok(());
        };
        let mut more = vec![0; missing];
        let read = pipe::read(self.pipe(), &mut more);
        let read = read.with_context(|| format!("capturing {}", self.name))?;
        if read != Moved::Bytes(missing) {
            return Err(self.ended_early(missing));
        }
        self.copied(&more);
        self.collected.append(&mut more);
        Ok(())
    }

    /// Looks at the pipe.
    pub(super) fn look(&mut self) -> io::Result<Look> {
        let available = pipe::available(self.pipe())?;
        if available != self.last_seen {
            self.last_seen = available;
            self.last_change = Instant::now();
        }
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

    /// A chunk of what is there, of which `left` bytes are the rest of a unit. If a file ends with
    /// a unit, its end is marked later, whether or not it is known.
    fn chunk(&self, available: usize, left: Option<usize>, staging: usize) -> Chunk {
        let bytes = left.map_or(available, |left| left.min(available));
        let pages = bytes.div_ceil(slot());
        let (route, slots) = if bytes <= LARGEST_COPIED {
            (Route::Copied, pages)
        } else if self.whole_pages {
            (Route::Direct, pages)
        } else {
            (Route::Staged, staging.min(self.slots))
        };
        Chunk {
            bytes,
            slots,
            route,
            is_last: self.has_ended && bytes == available && left != Some(bytes),
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

    /// These bytes were read from its pipe.
    pub(super) fn copied(&mut self, bytes: &[u8]) {
        if let Some(framing) = &mut self.framing {
            framing.read(bytes);
        }
        self.moved(bytes.len());
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
        let source = Source::new(name, read, DEFAULT_SLOTS, Owner::Criu).unwrap();
        (source, write.nonblocking().unwrap())
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
        assert_eq!(source.inspect(None, STAGING).unwrap(), Ready::Empty);
        pipe::write(&write, b"abc").unwrap();
        assert_eq!(source.inspect(None, STAGING).unwrap(), Ready::Filling);
        pipe::write(&write, b"def").unwrap();
        assert_eq!(source.inspect(None, STAGING).unwrap(), Ready::Filling);
        assert_eq!(
            source.inspect(None, STAGING).unwrap(),
            chunk(6, 1, Route::Copied)
        );
    }

    #[test]
    fn pages_are_left_until_a_unit_is_there_or_there_is_no_room() {
        let (mut source, write) = source();
        source.is_grown = true;
        let page = vec![0; slot()];
        let unit = Some(3 * slot());
        pipe::write(&write, &page).unwrap();
        assert_eq!(source.inspect(unit, STAGING).unwrap(), Ready::Filling);
        assert_eq!(source.inspect(unit, STAGING).unwrap(), Ready::Empty);
        for _ in 1..DEFAULT_SLOTS {
            pipe::write(&write, &page).unwrap();
        }
        let whole = chunk(3 * slot(), 3, Route::Copied);
        assert_eq!(source.inspect(unit, STAGING).unwrap(), whole);
        let unit = Some(100 * slot());
        let full = chunk(DEFAULT_SLOTS * slot(), DEFAULT_SLOTS, Route::Direct);
        assert_eq!(source.inspect(unit, STAGING).unwrap(), full);
        pipe::read(source.pipe(), &mut [0; 10]).unwrap();
        assert_eq!(source.inspect(unit, STAGING).unwrap(), Ready::Filling);
        assert_ne!(source.inspect(unit, STAGING).unwrap(), Ready::Empty);
    }

    #[test]
    fn a_file_that_is_no_page_file_is_collected_until_its_end() {
        let (read, write) = pipe::new().unwrap();
        let name = ImageName::new("route-9.img").unwrap();
        let mut source = Source::new(name, read, DEFAULT_SLOTS, Owner::Criu).unwrap();
        for _ in 0..3 {
            pipe::write(&write, b"abc").unwrap();
            assert_eq!(source.inspect(None, STAGING).unwrap(), Ready::Empty);
        }
        source.has_ended = true;
        let Ready::Chunk(chunk) = source.inspect(None, STAGING).unwrap() else {
            panic!("nothing to move");
        };
        assert!(chunk.is_last);
        assert_eq!(source.collected, b"abcabcabc");
    }

    #[test]
    fn an_ended_source_is_moved_at_once_and_for_the_last_time() {
        let (mut source, write) = source();
        pipe::write(&write, b"abc").unwrap();
        source.has_ended = true;
        let Ready::Chunk(mut chunk) = source.inspect(None, STAGING).unwrap() else {
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
        source.inspect(None, STAGING).unwrap();
        assert_eq!(pipe::slots(&write).unwrap(), DEFAULT_SLOTS);
        pipe::write(&write, &[0; 1]).unwrap();
        source.inspect(None, STAGING).unwrap();
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
        source.whole_pages = false;
        let (full, page) = (DEFAULT_SLOTS * slot(), slot());
        pipe::write(&write, &vec![0; full - page]).unwrap();
        assert_eq!(
            source.inspect(None, STAGING).unwrap(),
            chunk(full - page, DEFAULT_SLOTS, Route::Staged)
        );
        assert_eq!(
            source.inspect(None, 8).unwrap(),
            chunk(full - page, 8, Route::Staged)
        );
        pipe::write(&write, &vec![0; page]).unwrap();
        assert_eq!(
            source.inspect(None, STAGING).unwrap(),
            chunk(full, DEFAULT_SLOTS, Route::Direct)
        );
        pipe::read(source.pipe(), &mut [0; 10]).unwrap();
        assert_eq!(
            source.inspect(None, STAGING).unwrap(),
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
