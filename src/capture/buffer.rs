//! Memory between CRIU's pipes and the shards (`--buffer`).
//!
//! The application is frozen until CRIU has handed over its last page, and CRIU is as fast as what
//! takes the pages. Spliced, they wait for the shards: 1 GiB waits 10 s for shards that take 100
//! MB/s. Copied to memory it takes a third of a second. So with a buffer the pages are copied as
//! fast as CRIU gives them, and the shards are fed from the copy, unit by unit (see
//! [`super::source`]), in the order in which these were complete.
//!
//! Everything goes through the buffer, small files and external ones too: nothing in it is a page
//! of the application's any more, and CRIU waits for no shard, whatever it sends. Files are looked
//! into when they come, so that a dump is known to be whole before the shards have it.
//!
//! The shards' pipes get references to our own pages, which are never written again, and which are
//! given back at once: the kernel frees each when the shard's reader has taken it.
//!
//! **CRIU comes first.** While it has a file open, the shards get nothing until the buffer has been
//! full: the application is frozen, and compressors would take the processors from those who copy.
//! With `lz4` on both of two cores it would be frozen twice as long.
//!
//! **When it is full**, CRIU waits, as it does without a buffer, until the shards have taken some.
//! Its size is fixed when it starts, by the memory that there is then.

use std::collections::{HashMap, VecDeque};

use anyhow::{Context, Result};

use super::chunk::{Chunk, Route};
use super::image_writer::Activity;
use super::prefault::Prefault;
use super::source::{LARGEST_COPIED, Look, Source};
use crate::os::memory;
use crate::os::pipe::{self, Moved, slot};
use crate::store::{Arena, Block, Extent};

/// The size of the buffer however scarce memory is, in bytes, unless less is asked for.
const LEAST: u64 = 2 << 20;

/// Bytes read at a time. The writer fills the rest of its pipe until then.
const READ: usize = 256 << 10;

/// A unit of a source, or what has come of one.
struct Piece {
    source: u64,
    extents: VecDeque<Extent>,
    bytes: usize,
    /// The file has no bytes after these.
    is_last: bool,
}

impl Piece {
    fn new(source: u64) -> Self {
        Self {
            source,
            extents: VecDeque::new(),
            bytes: 0,
            is_last: false,
        }
    }

    /// Adds to the end. What lies side by side in memory becomes one extent.
    fn push(&mut self, extent: Extent) {
        self.bytes += extent.len();
        let rest = match self.extents.back_mut() {
            Some(last) => last.join(extent),
            None => Some(extent),
        };
        self.extents.extend(rest);
    }

    /// The slots that references to it take.
    fn slots(&self) -> usize {
        let slots = |extent: &Extent| {
            let before = extent.bytes().as_ptr().addr() % slot();
            (before + extent.len()).div_ceil(slot())
        };
        self.extents.iter().map(slots).sum()
    }
}

/// The memory for all files.
pub(super) struct Buffer {
    arena: Arena,
    prefault: Option<Prefault>,
    /// The rest of the last block that was populated.
    block: Option<Block>,
    size: usize,
    /// A file that was to be copied has found no room.
    has_been_full: bool,
    /// At multiples of this number of bytes files are cut into pieces.
    unit: usize,
    /// Of each source the piece that is not complete.
    begun: HashMap<u64, Piece>,
    /// In the order in which they were complete.
    pieces: VecDeque<Piece>,
}

impl Buffer {
    /// Holds up to `most` bytes, and a page at least, as far as there is memory. Files are cut at
    /// multiples of `unit` bytes.
    pub(super) fn new(most: u64, unit: usize) -> Self {
        let available = memory::available().unwrap_or(u64::MAX);
        let most = most.min(available.saturating_sub(memory::LEAST).max(LEAST));
        let size = usize::try_from(most).unwrap_or(usize::MAX).max(slot());
        let arena = Arena::new();
        let mut buffer = Self {
            prefault: Prefault::start(&arena, size),
            arena,
            block: None,
            size,
            has_been_full: false,
            unit,
            begun: HashMap::new(),
            pieces: VecDeque::new(),
        };
        buffer.ask_for_pages();
        buffer
    }

    /// Nothing more will come: what was prepared for it is given back.
    pub(super) fn expect_no_more(&mut self) {
        self.prefault = None;
        self.block = None;
    }

    /// True if CRIU has had to wait for room: the shards should be fed although it has more.
    pub(super) fn has_been_full(&self) -> bool {
        self.has_been_full
    }

    /// Bytes that may still be taken.
    fn room(&self) -> usize {
        let coming = self.prefault.as_ref().map_or(0, Prefault::coming);
        self.size.saturating_sub(self.arena.live() + coming)
    }

    fn ask_for_pages(&mut self) {
        let room = self.room();
        if let Some(prefault) = &mut self.prefault {
            prefault.ask(room);
        }
    }

    /// Copies what a source's pipe has, as far as there is room.
    ///
    /// # Errors
    /// When another process reads from the pipe, and where there is no memory at all.
    pub(super) fn copy(&mut self, source: &mut Source) -> Result<Activity> {
        let look = source.look();
        let available = match look.with_context(|| format!("capturing {}", source.name))? {
            Look::Empty => return Ok(Activity::Idle),
            Look::Ended => {
                let last = self.begun.remove(&source.id);
                let mut last = last.unwrap_or_else(|| Piece::new(source.id));
                last.is_last = true;
                self.pieces.push_back(last);
                return Ok(Activity::Complete);
            }
            Look::Bytes(available) => available,
        };
        let mut left = available;
        while left > 0 {
            match self.read(source, left.min(READ).min(source.left_of(self.unit)))? {
                Some(Moved::Bytes(bytes)) => left -= bytes,
                Some(Moved::WouldBlock | Moved::End) => return Err(source.ended_early(left)),
                None => {
                    self.has_been_full = true;
                    self.pieces
                        .extend(self.begun.drain().map(|(_, piece)| piece));
                    if left == available {
                        return Ok(Activity::NoRoom);
                    }
                    break;
                }
            }
        }
        Ok(Activity::Busy)
    }

    /// Reads up to `len` bytes from a source, if there is room for any.
    fn read(&mut self, source: &mut Source, len: usize) -> Result<Option<Moved>> {
        if self.block.as_ref().is_none_or(Block::is_full) {
            self.block = self.prefault.as_mut().and_then(Prefault::take);
            self.ask_for_pages();
        }
        let (moved, extent) = match &mut self.block {
            Some(block) => (read(source, block, len)?, block.take_filled()),
            None => {
                let Some(mut block) = self.reserve(len)? else {
                    return Ok(None);
                };
                (read(source, &mut block, len)?, self.arena.seal(block))
            }
        };
        source.copied(extent.bytes());
        source.moved(extent.len());
        let id = source.id;
        let piece = self.begun.entry(id).or_insert_with(|| Piece::new(id));
        piece.push(extent);
        if source.left_of(self.unit) == self.unit {
            self.pieces.extend(self.begun.remove(&id));
        }
        Ok(Some(moved))
    }

    /// Memory for up to `len` bytes, if there is room.
    fn reserve(&mut self, len: usize) -> Result<Option<Block>> {
        let room = self.room();
        if room == 0 {
            return Ok(None);
        }
        match self.arena.reserve(len.min(room)) {
            Ok(block) => Ok(Some(block)),
            // The shards will take what is here.
            Err(_) if !self.pieces.is_empty() || !self.begun.is_empty() => Ok(None),
            Err(error) => Err(error).context("--buffer: getting memory for it"),
        }
    }

    /// The number of the source of the first piece, and a chunk of that; of no bytes where a file
    /// ends with a unit.
    pub(super) fn next(&self) -> Option<(u64, Chunk)> {
        let piece = self.pieces.front()?;
        let (route, slots) = if piece.bytes <= LARGEST_COPIED {
            (Route::Copied, piece.bytes.div_ceil(slot()))
        } else {
            (Route::Lent, piece.slots())
        };
        let chunk = Chunk {
            bytes: piece.bytes,
            slots,
            route,
            is_last: piece.is_last,
        };
        Some((piece.source, chunk))
    }

    /// Takes the first bytes of the first piece out, and the piece with its last.
    pub(super) fn take(&mut self, bytes: usize) -> Vec<Extent> {
        let piece = self.pieces.front_mut().expect("a chunk was found here");
        piece.bytes -= bytes;
        let mut taken = Vec::new();
        let mut left = bytes;
        while left > 0 {
            let front = piece.extents.front_mut();
            let front = front.expect("the piece has these bytes");
            let part = front.split_front(left.min(front.len()));
            left -= part.len();
            taken.push(part);
            if front.is_empty() {
                piece.extents.pop_front();
            }
        }
        if piece.bytes == 0 {
            self.pieces.pop_front();
        }
        taken
    }

    /// Takes the first piece out, which does not count, or is empty.
    pub(super) fn skip(&mut self) {
        self.pieces.pop_front();
    }
}

/// Reads up to `len` bytes from a source into a block.
fn read(source: &Source, block: &mut Block, len: usize) -> Result<Moved> {
    let unfilled = block.unfilled();
    let len = unfilled.len().min(len);
    let moved = pipe::read(source.pipe(), &mut unfilled[..len])
        .with_context(|| format!("capturing {}", source.name))?;
    if let Moved::Bytes(bytes) = moved {
        block.filled(bytes);
    }
    Ok(moved)
}
