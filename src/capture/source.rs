//! One file on its way in: the pipe that CRIU, or the writer of an external file, fills.
//!
//! **Page files** of CRIU's and external files are spliced. A pipe keeps its 64 KiB until it has
//! shown that it carries much; then it gets the most that the kernel allows. A chunk is moved when
//! its file has ended, its pipe is half full, or nothing more came during a nap; otherwise it is
//! left to fill. Each slot of the pipe but the last should hold a page. Where splicing shows
//! that one holds less, or CRIU's pages are no multiple of a page, the file is collected from then
//! on.
//!
//! **Units.** With one shard, images of the same memory look the same, so that a store that keeps
//! equal blocks once has next to nothing to add for the second. Page files are cut at multiples of
//! a unit, and no less is moved unless the file has ended. CRIU loses nothing by that: it gives
//! whole pages, so a pipe without room is full to the last byte.
//!
//! **All others** are collected in memory, and given at their end, or at multiples of 64 KiB. One
//! `write` brings dozens of small files to a shard and wakes its reader once; spliced, each would
//! wake it twice. Their framing is followed (see [`super::dump_check`]). The large ones are
//! archives that a compressor has written.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::capacity;
use super::chunk::{Chunk, Route, slots_of};
use crate::criu::files;
use crate::criu::framing::Framing;
use crate::format::ImageName;
use crate::os::pipe::{self, DEFAULT_SLOTS, Moved, ReadEnd, slot};
use crate::store::Extent;

/// The most that the index has of the data of a file, in bytes, but for the chunk that passes this
/// (docs/protocol.md, section 2).
const LARGEST_IN_INDEX: usize = 1 << 20;

/// Slots full of bytes that show that a file is not small: half of a pipe of the default size.
const LARGE: usize = DEFAULT_SLOTS / 2;

/// The largest chunk of a spliced file that is copied, in bytes.
const LARGEST_COPIED: usize = 16 << 10;

/// The largest chunk of what is collected, in bytes.
const LARGEST_COLLECTED: usize = 64 << 10;

/// Bytes thrown away at a time.
const DISCARD: usize = 64 << 10;

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
    /// Give this chunk to a shard. It has no bytes at an end that comes behind the last of them.
    Chunk(Chunk),
    /// Nothing of it is to be moved; an event will come with more.
    Empty,
    /// Leave it to fill until after the next nap.
    Filling,
}

/// How far a source, or the busiest of all, got in one round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Activity {
    /// Nothing to do until an event comes.
    Idle,
    /// It waits for room in the shards.
    NoRoom,
    /// It has moved something, or will when it has filled.
    Busy,
    /// It is complete.
    Complete,
}

/// A file that is being captured.
#[derive(Debug)]
pub(super) struct Source {
    /// Given by [`super::dump::Dump::open`].
    pub(super) id: u64,
    pub(super) name: ImageName,
    /// `None` when all of it is in the buffer.
    pub(super) pipe: Option<ReadEnd>,
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
    /// Those of these that were read, and that no shard has yet.
    pub(super) collected: Vec<u8>,
    /// What the buffer has of it, and no shard yet.
    pub(super) buffered: VecDeque<Extent>,
    /// Bytes given to shards.
    pub(super) given: usize,
    /// It is one of CRIU's page files.
    is_pages: bool,
    /// Each slot of its pipe is thought to hold a page.
    pub(super) is_spliced: bool,
    /// `None` if it does not begin with a magic.
    pub(super) framing: Option<Framing>,
}

impl Source {
    /// # Errors
    /// Where the pipe cannot be made non-blocking.
    pub(super) fn new(name: ImageName, pipe: ReadEnd, owner: Owner) -> Result<Self> {
        let preparing = || format!("preparing to read {name}");
        let pipe = pipe.nonblocking().with_context(preparing)?;
        let slots = pipe::slots(&pipe).with_context(preparing)?;
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
            buffered: VecDeque::new(),
            given: 0,
            is_pages,
            is_spliced: is_pages || !is_of_criu,
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

    /// Decides which chunk to give to a shard. Page files are cut at multiples of `unit` bytes, if
    /// they are.
    pub(super) fn inspect(&mut self, unit: Option<usize>) -> Result<Ready> {
        let seen = self.last_seen;
        let available = self.look()?;
        if !self.is_spliced {
            return self.inspect_collected(available);
        }
        let capacity = self.slots * slot();
        let left = self.left_of(unit);
        let enough = left.unwrap_or(capacity / 2).min(capacity);
        let is_enough = self.has_ended || available >= enough;
        Ok(match available {
            0 if !self.has_ended => Ready::Empty,
            _ if !is_enough && available != seen => Ready::Filling,
            _ if !is_enough && left.is_some() && self.last_change.elapsed() < LONGEST_HOLD => {
                Ready::Empty
            }
            _ => Ready::Chunk(self.chunk(available, left)),
        })
    }

    /// The same for a file that is collected.
    fn inspect_collected(&mut self, available: usize) -> Result<Ready> {
        let in_all = self.collected.len() + available;
        let bytes = in_all.min(LARGEST_COLLECTED);
        self.collect(bytes)?;
        Ok(match bytes {
            LARGEST_COLLECTED.. => Ready::Chunk(Chunk::copied(bytes, false)),
            _ if self.has_ended => Ready::Chunk(Chunk::copied(bytes, true)),
            _ if available > 0 => Ready::Filling,
            _ => Ready::Empty,
        })
    }

    /// A chunk of up to `most` bytes out of the buffer; of none at an end that comes behind `most`
    /// bytes.
    pub(super) fn buffered_chunk(&self, most: usize) -> Chunk {
        let (mut bytes, mut slots) = (0, 0);
        let mut extents = self.buffered.iter();
        while bytes < most
            && let Some(extent) = extents.next()
        {
            let part = extent.len().min(most - bytes);
            bytes += part;
            slots += slots_of(&extent.bytes()[..part]);
        }
        let mut chunk = Chunk::copied(bytes, !self.is_open() && bytes < most);
        if bytes > LARGEST_COPIED {
            (chunk.route, chunk.slots) = (Route::Lent, slots);
        }
        chunk
    }

    /// Takes the first bytes out of what the buffer has.
    pub(super) fn take_buffered(&mut self, mut bytes: usize) -> Vec<Extent> {
        let mut taken = Vec::new();
        while bytes > 0
            && let Some(front) = self.buffered.front_mut()
        {
            let part = front.split_front(bytes.min(front.len()));
            if front.is_empty() {
                self.buffered.pop_front();
            }
            bytes -= part.len();
            taken.push(part);
        }
        taken
    }

    /// Throws away what comes, as the file was replaced.
    ///
    /// # Errors
    /// Those of `read`; none for an open pipe.
    pub(super) fn drain(&self) -> Result<Activity> {
        let mut discarded = vec![0; DISCARD];
        loop {
            match pipe::read(self.pipe(), &mut discarded)
                .with_context(|| format!("skipping the first of two files named {}", self.name))?
            {
                Moved::Bytes(_) => {}
                Moved::WouldBlock => return Ok(Activity::Idle),
                Moved::End => return Ok(Activity::Complete),
            }
        }
    }

    /// The bytes that are missing from the unit that was begun, if files are cut at units.
    ///
    /// The first unit is no larger than a pipe that has not grown: its writer may sleep until
    /// something is taken out, as growing a pipe wakes nobody before Linux 5.5.
    pub(super) fn left_of(&self, unit: Option<usize>) -> Option<usize> {
        let unit = match self.owner {
            Owner::External => return None,
            Owner::Criu if self.is_pages => unit?,
            Owner::Criu => unit.map(|_| LARGEST_COLLECTED)?,
        };
        let first = unit.min(DEFAULT_SLOTS * slot());
        Some(match self.given.checked_sub(first) {
            None => first - self.given,
            Some(behind) => unit - behind % unit,
        })
    }

    /// Collects `bytes` in all, of which the pipe must hold what is missing.
    ///
    /// # Errors
    /// When another process reads from the pipe.
    pub(super) fn collect(&mut self, bytes: usize) -> Result<()> {
        let start = self.collected.len();
        if bytes <= start {
            return Ok(());
        }
        let mut collected = std::mem::take(&mut self.collected);
        collected.resize(bytes, 0);
        let more = &mut collected[start..];
        let read = pipe::read(self.pipe(), more);
        if read.with_context(|| format!("capturing {}", self.name))? != Moved::Bytes(more.len()) {
            return Err(self.ended_early(more.len()));
        }
        self.copied(more);
        self.collected = collected;
        Ok(())
    }

    /// The bytes in the pipe, which grows if these are many.
    pub(super) fn look(&mut self) -> Result<usize> {
        let looking = || format!("capturing {}", self.name);
        let available = pipe::available(self.pipe()).with_context(looking)?;
        if available != self.last_seen {
            self.last_seen = available;
            self.last_change = Instant::now();
        }
        let slot = slot();
        self.is_spliced &= !self.is_pages || available.is_multiple_of(slot);
        if !self.is_grown && available.max(self.moved) >= LARGE * slot {
            self.is_grown = true;
            self.slots = capacity::grow_source(self.pipe(), self.slots).with_context(looking)?;
        }
        Ok(available)
    }

    /// A chunk of what is there, of which `left` bytes are the rest of a unit. If a file ends with
    /// a unit, its end is marked later, whether or not it is known.
    fn chunk(&self, available: usize, left: Option<usize>) -> Chunk {
        let mut bytes = left.map_or(available, |left| left.min(available));
        let mut route = Route::Copied;
        if bytes > LARGEST_COPIED.max(slot()) {
            bytes -= bytes % slot();
            route = Route::Direct;
        }
        let is_last = self.has_ended && bytes == available && left != Some(bytes);
        Chunk {
            route,
            ..Chunk::copied(bytes, is_last)
        }
    }

    /// True if the data of this file goes to all shards, where the rest of the image has an index
    /// of its own: pages always, other files once they have brought much.
    pub(super) fn is_spread(&self) -> bool {
        files::is_pages(self.name.as_str()) || self.given > LARGEST_IN_INDEX
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

    /// The error for bytes that were there before they were taken, and then not.
    pub(super) fn ended_early(&self, missing: usize) -> anyhow::Error {
        anyhow::anyhow!(
            "capturing {}: {missing} bytes are missing from its pipe: another process reads from it",
            self.name
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source() -> (Source, pipe::WriteEnd) {
        let name = ImageName::new("pages-1.img").unwrap();
        let (read, write) = pipe::new().unwrap();
        let source = Source::new(name, read, Owner::Criu).unwrap();
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
        assert_eq!(source.inspect(None).unwrap(), Ready::Empty);
        for _ in 0..2 {
            pipe::write(&write, &vec![0; slot()]).unwrap();
            assert_eq!(source.inspect(None).unwrap(), Ready::Filling);
        }
        let pages = chunk(2 * slot(), 2, Route::Copied);
        assert_eq!(source.inspect(None).unwrap(), pages);
    }

    #[test]
    fn pages_are_left_until_a_unit_is_there_or_there_is_no_room() {
        let (mut source, write) = source();
        source.is_grown = true;
        let page = vec![0; slot()];
        let unit = Some(3 * slot());
        pipe::write(&write, &page).unwrap();
        assert_eq!(source.inspect(unit).unwrap(), Ready::Filling);
        assert_eq!(source.inspect(unit).unwrap(), Ready::Empty);
        for _ in 1..DEFAULT_SLOTS {
            pipe::write(&write, &page).unwrap();
        }
        let whole = chunk(3 * slot(), 3, Route::Copied);
        assert_eq!(source.inspect(unit).unwrap(), whole);
        let unit = Some(100 * slot());
        let full = chunk(DEFAULT_SLOTS * slot(), DEFAULT_SLOTS, Route::Direct);
        assert_eq!(source.inspect(unit).unwrap(), full);
        pipe::read(source.pipe(), &mut [0; 10]).unwrap();
        assert_eq!(source.inspect(unit).unwrap(), Ready::Filling);
        let left = DEFAULT_SLOTS * slot() - 10;
        assert_eq!(source.collected.len(), left.min(LARGEST_COLLECTED));
    }

    #[test]
    fn a_file_that_is_no_page_file_is_collected_until_its_end() {
        let (read, write) = pipe::new().unwrap();
        let name = ImageName::new("route-9.img").unwrap();
        let mut source = Source::new(name, read, Owner::Criu).unwrap();
        for _ in 0..3 {
            pipe::write(&write, b"abc").unwrap();
            assert_eq!(source.inspect(None).unwrap(), Ready::Filling);
            assert_eq!(source.inspect(None).unwrap(), Ready::Empty);
        }
        source.has_ended = true;
        let Ready::Chunk(chunk) = source.inspect(None).unwrap() else {
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
        let Ready::Chunk(mut chunk) = source.inspect(None).unwrap() else {
            panic!("nothing to move");
        };
        assert!(chunk.is_last);
        chunk.shorten(2);
        assert!(!chunk.is_last);
    }

    #[test]
    fn only_a_large_file_gets_a_large_pipe() {
        let (mut source, write) = source();
        pipe::write(&write, &vec![0; (LARGE - 1) * slot()]).unwrap();
        source.inspect(None).unwrap();
        assert_eq!(pipe::slots(&write).unwrap(), DEFAULT_SLOTS);
        pipe::write(&write, &vec![0; slot()]).unwrap();
        source.inspect(None).unwrap();
        assert!(
            pipe::slots(&write).unwrap() > DEFAULT_SLOTS
                || pipe::grow(&write, pipe::LARGEST).unwrap() == DEFAULT_SLOTS
        );
    }
}
