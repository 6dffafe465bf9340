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

use anyhow::{Context, Result};

use super::prefault::Prefault;
use super::source::{Activity, Source};
use crate::os::memory;
use crate::os::pipe::{self, slot};
use crate::store::{Arena, Block};

/// The size of the buffer however scarce memory is, in bytes, unless less is asked for.
const LEAST: u64 = 2 << 20;

/// Bytes read at a time. The writer fills the rest of its pipe until then.
const READ: usize = 256 << 10;

/// The memory for all files.
pub(super) struct Buffer {
    arena: Arena,
    prefault: Option<Prefault>,
    /// The block that is being filled.
    block: Option<Block>,
    size: usize,
    /// CRIU has had to wait for room: the shards should be fed although it has more.
    pub(super) has_been_full: bool,
}

impl Buffer {
    /// Holds up to `most` bytes, and a page at least, as far as there is memory.
    pub(super) fn new(most: u64) -> Self {
        let available = memory::available().unwrap_or(u64::MAX);
        let most = most.min(available.saturating_sub(memory::LEAST).max(LEAST));
        let size = usize::try_from(most).unwrap_or(usize::MAX).max(slot());
        let arena = Arena::new();
        Self {
            prefault: Prefault::start(&arena, size),
            arena,
            block: None,
            size,
            has_been_full: false,
        }
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

    /// Copies what a source's pipe has, as far as there is room.
    ///
    /// # Errors
    /// When another process reads from the pipe, and where there is no memory at all.
    pub(super) fn copy(&mut self, source: &mut Source) -> Result<Activity> {
        let available = match source.look()? {
            0 if source.has_ended => return Ok(Activity::Complete),
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
            let room = self.room();
            if let Some(prefault) = &mut self.prefault {
                prefault.ask(room);
            }
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
        // What lies side by side in memory becomes one extent.
        let separate = match source.buffered.back_mut() {
            Some(last) => last.join(extent),
            None => Some(extent),
        };
        source.buffered.extend(separate);
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
            Err(_) if self.arena.live() > 0 => Ok(None),
            Err(error) => Err(error).context("--buffer: getting memory for it"),
        }
    }
}
