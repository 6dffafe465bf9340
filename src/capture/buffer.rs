//! Memory between CRIU's pipes and the shards (`--buffer`).
//!
//! The application is frozen until CRIU has handed over its last page, and CRIU is as fast as what
//! takes the pages. Spliced, they wait for the shards: 1 GiB waits 10 s for shards that take 100
//! MB/s. Copied to memory it takes a third of a second. So with a buffer the pages are copied as
//! fast as CRIU gives them, and the shards are fed from the copy, file by file.
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

use std::collections::{BTreeMap, VecDeque};

use anyhow::{Context, Result};

use super::chunk::{Chunk, Route, slots_of};
use super::prefault::Prefault;
use super::source::{Activity, LARGEST_COPIED, Source};
use crate::os::memory;
use crate::os::pipe::{self, slot};
use crate::store::{Arena, Block, Extent};

/// The size of the buffer however scarce memory is, in bytes, unless less is asked for.
const LEAST: u64 = 2 << 20;

/// Bytes read at a time. The writer fills the rest of its pipe until then.
const READ: usize = 256 << 10;

/// The part of a file that no shard has yet.
#[derive(Default)]
struct Rest {
    extents: VecDeque<Extent>,
    has_ended: bool,
}

/// The memory for all files.
pub(super) struct Buffer {
    arena: Arena,
    prefault: Option<Prefault>,
    /// The block that is being filled.
    block: Option<Block>,
    size: usize,
    /// CRIU has had to wait for room: the shards should be fed although it has more.
    pub(super) has_been_full: bool,
    /// By the numbers of their sources, and so in the order in which these were opened.
    files: BTreeMap<u64, Rest>,
}

impl Buffer {
    /// Holds up to `most` bytes, and a page at least, as far as there is memory.
    pub(super) fn new(most: u64) -> Self {
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
            files: BTreeMap::new(),
        };
        buffer.ask_for_pages();
        buffer
    }

    /// Nothing more will come: what was prepared for it is given back.
    pub(super) fn expect_no_more(&mut self) {
        self.prefault = None;
        self.block = None;
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
        let available = match source.look()? {
            0 if source.has_ended => {
                self.files.entry(source.id).or_default().has_ended = true;
                return Ok(Activity::Complete);
            }
            0 => return Ok(Activity::Idle),
            available => available,
        };
        let mut left = available;
        while left > 0 {
            match self.read(source, left.min(READ))? {
                0 if left == available => return Ok(Activity::NoRoom),
                0 => break,
                bytes => left -= bytes,
            }
        }
        Ok(Activity::Busy)
    }

    /// Reads up to `len` bytes from a source, which has them; none where there is no room.
    fn read(&mut self, source: &mut Source, len: usize) -> Result<usize> {
        if self.block.as_ref().is_none_or(Block::is_full) {
            self.block = self.prefault.as_mut().and_then(Prefault::take);
            if self.block.is_none() {
                self.block = self.reserve()?;
            }
            self.ask_for_pages();
        }
        let Some(block) = &mut self.block else {
            self.has_been_full = true;
            return Ok(0);
        };
        let unfilled = block.unfilled();
        let len = unfilled.len().min(len);
        let bytes = pipe::read(source.pipe(), &mut unfilled[..len])
            .with_context(|| format!("capturing {}", source.name))?
            .bytes();
        if bytes == 0 {
            return Err(source.ended_early(len));
        }
        block.filled(bytes);
        let extent = block.take_filled();
        source.copied(extent.bytes());
        self.push(source.id, extent);
        Ok(bytes)
    }

    /// Memory that is not populated, if there is room.
    fn reserve(&mut self) -> Result<Option<Block>> {
        let room = self.room();
        if room == 0 {
            return Ok(None);
        }
        match self.arena.reserve(READ.min(room)) {
            Ok(block) => Ok(Some(block)),
            // The shards will take what is here.
            Err(_) if self.next().is_some() => Ok(None),
            Err(error) => Err(error).context("--buffer: getting memory for it"),
        }
    }

    /// Adds to the end of a file. What lies side by side in memory becomes one extent.
    fn push(&mut self, source: u64, extent: Extent) {
        let extents = &mut self.files.entry(source).or_default().extents;
        let separate = match extents.back_mut() {
            Some(last) => last.join(extent),
            None => Some(extent),
        };
        extents.extend(separate);
    }

    /// The number of the first source of which something is here, or the end.
    pub(super) fn next(&self) -> Option<u64> {
        let mut files = self.files.iter();
        let first = files.find(|(_, rest)| rest.has_ended || !rest.extents.is_empty());
        first.map(|(source, _)| *source)
    }

    /// A chunk of up to `most` bytes of a source; of none at an end that comes behind `most` bytes.
    pub(super) fn chunk(&self, source: u64, most: usize) -> Chunk {
        let rest = &self.files[&source];
        let (mut bytes, mut slots) = (0, 0);
        let mut extents = rest.extents.iter();
        while bytes < most
            && let Some(extent) = extents.next()
        {
            let part = extent.len().min(most - bytes);
            bytes += part;
            slots += slots_of(&extent.bytes()[..part]);
        }
        let mut chunk = Chunk::copied(bytes, rest.has_ended && bytes < most);
        if bytes > LARGEST_COPIED {
            (chunk.route, chunk.slots) = (Route::Lent, slots);
        }
        chunk
    }

    /// Takes the first bytes of a source out.
    pub(super) fn take(&mut self, source: u64, mut bytes: usize) -> Vec<Extent> {
        let mut taken = Vec::new();
        let extents = &mut self.files.entry(source).or_default().extents;
        while bytes > 0
            && let Some(mut extent) = extents.pop_front()
        {
            let part = extent.split_front(bytes.min(extent.len()));
            bytes -= part.len();
            taken.push(part);
            if !extent.is_empty() {
                extents.push_front(extent);
            }
        }
        taken
    }

    /// Takes out a source that does not count, or is done with.
    pub(super) fn remove(&mut self, source: u64) {
        self.files.remove(&source);
    }
}
