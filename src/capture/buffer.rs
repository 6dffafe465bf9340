//! Memory between CRIU's pipes and the shards (`--buffer`).
//!
//! The application is frozen until CRIU has handed over its last page, and CRIU is as fast as what
//! takes the pages. Spliced, they wait for the shards: 1 GiB waits 10 s for shards that take 100
//! MB/s. Copied to memory it takes a third of a second. So with a buffer the pages are copied as
//! fast as CRIU gives them, and the shards are fed from the copy.
//!
//! Everything goes through the buffer, small files and external ones too: what it has is no page of
//! the application's any more, and CRIU waits for no shard, whatever it sends. What a file holds is
//! looked into when it comes, so that a dump is known to be whole before the shards have it.
//!
//! The shards' pipes get references to our own pages, which are never written again, and which are
//! given back at once: the kernel frees each when the shard's reader has taken it.
//!
//! **When it is full**, CRIU waits, as it does without a buffer. So it does when memory gets
//! scarce, on the machine or in the cgroup, before the kernel would have to kill. What the buffer
//! holds goes to the shards meanwhile, so that data moves as long as any shard's reader reads.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::chunk::{Chunk, Route};
use super::prefault::{NoMemory, Prefault};
use super::source::{LARGEST_COPIED, Look, Owner, Source};
use crate::os::memory;
use crate::os::pipe::{self, LARGEST, Moved, slot};
use crate::store::{Arena, Block, Extent};

/// Less than this number of bytes is as good as none: it is waited for until there is more.
const SCARCE: usize = 256 << 10;

/// What the buffer may hold however scarce memory is, in bytes: without any, nothing would move.
const LEAST: usize = 2 << 20;

/// How long scarce memory is not looked at again.
const NEXT_LOOK: Duration = Duration::from_millis(5);

/// How long CRIU brings nothing before the shards are fed although there is plenty of room. It
/// takes about 10 ms to gather the next 64 MiB.
const QUIET: Duration = Duration::from_millis(50);

/// How long there may be no memory at all: what was given back takes a moment to be there again.
const PATIENCE: Duration = Duration::from_secs(1);

/// Bytes read at a time. The writer fills the rest of its pipe meanwhile.
const READ: usize = 256 << 10;

/// What became of a look at a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Copied {
    /// It has nothing; an event will tell when it has.
    Nothing,
    /// It may have more.
    Some,
    /// The buffer is full.
    NoRoom,
    /// It has ended, and all of it is here.
    All,
}

/// What the buffer holds of one file, front to back.
#[derive(Debug, Default)]
pub(super) struct Buffered {
    extents: VecDeque<Extent>,
    bytes: usize,
}

impl Buffered {
    /// How many bytes these are.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Adds to the end. What lies side by side in memory becomes one extent.
    pub(super) fn push(&mut self, extent: Extent) {
        self.bytes += extent.len();
        let rest = match self.extents.back_mut() {
            Some(last) => last.join(extent),
            None => Some(extent),
        };
        self.extents.extend(rest);
    }

    /// What to give to a shard next, if there is anything. `is_open` tells whether more may come.
    pub(super) fn chunk(&self, is_open: bool) -> Option<Chunk> {
        let front = self.extents.front()?;
        let bytes = front.len().min(LARGEST);
        let (route, slots) = if bytes <= LARGEST_COPIED {
            (Route::Copied, bytes.div_ceil(slot()))
        } else {
            let before = front.bytes().as_ptr().addr() % slot();
            (Route::Lent, (before + bytes).div_ceil(slot()))
        };
        Some(Chunk {
            bytes,
            slots,
            route,
            is_last: !is_open && bytes == self.bytes,
        })
    }

    /// Takes the first bytes out, which are no more than a chunk has.
    pub(super) fn take(&mut self, bytes: usize) -> Extent {
        let front = self.extents.front_mut().expect("a chunk was found here");
        self.bytes -= bytes;
        let taken = front.split_front(bytes);
        if front.is_empty() {
            self.extents.pop_front();
        }
        taken
    }
}

/// How much may still be taken before memory is looked at again.
#[derive(Debug)]
struct Allowance {
    bytes: usize,
    looked: Option<Instant>,
}

impl Allowance {
    /// That many were taken.
    fn take(&mut self, bytes: usize) {
        self.bytes = self.bytes.saturating_sub(bytes);
    }

    /// Bytes that may be taken. Looks at what is left of the memory where that is due. `coming`
    /// bytes were taken, and the kernel has not given them yet.
    fn bytes(&mut self, coming: usize) -> usize {
        let is_due = self.looked.is_none_or(|at| at.elapsed() >= NEXT_LOOK);
        if self.bytes < SCARCE && is_due {
            self.looked = Some(Instant::now());
            self.bytes = allowed(memory::available().unwrap_or(u64::MAX), coming);
        }
        if self.bytes < SCARCE { 0 } else { self.bytes }
    }
}

/// Bytes that may be taken before the next look, where this number is available of which `coming`
/// are as good as taken.
fn allowed(available: u64, coming: usize) -> usize {
    let left = available.saturating_sub(memory::LEAST + coming as u64);
    memory::until_next_look(left) as usize
}

/// The memory for all files.
pub(super) struct Buffer {
    arena: Arena,
    ahead: Option<Prefault>,
    /// What is left of the last block that was populated ahead.
    block: Option<Block>,
    most: usize,
    allowance: Allowance,
    /// When something of CRIU's was copied last.
    copied_at: Option<Instant>,
    /// Since when there has been no memory at all.
    none_since: Option<Instant>,
}

impl Buffer {
    /// Holds up to `most` bytes, and a page at least.
    pub(super) fn new(most: u64) -> Self {
        let most = usize::try_from(most).unwrap_or(usize::MAX).max(slot());
        let arena = Arena::new();
        let mut buffer = Self {
            ahead: Prefault::start(&arena, most),
            arena,
            block: None,
            most,
            allowance: Allowance {
                bytes: 0,
                looked: None,
            },
            copied_at: None,
            none_since: None,
        };
        buffer.ask_ahead();
        buffer
    }

    /// Nothing more will come: what was prepared for it is given back.
    pub(super) fn expect_no_more(&mut self) {
        self.ahead = None;
        self.block = None;
        self.copied_at = None;
    }

    /// Until when the shards get nothing, because CRIU's files come and there is plenty of room.
    /// The application is frozen, and compressors would take the processors from those who copy:
    /// with `lz4` on both of two cores it would be frozen twice as long.
    pub(super) fn comes_first_until(&self) -> Option<Instant> {
        let end = self.copied_at? + QUIET;
        let ready = self.ahead.as_ref().map_or(0, Prefault::ready);
        let has_plenty = self.arena.live().saturating_sub(ready) < self.most / 2;
        (has_plenty && Instant::now() < end).then_some(end)
    }

    /// Bytes of memory that may still be taken.
    fn room(&mut self) -> usize {
        let coming = self.ahead.as_ref().map_or(0, Prefault::coming);
        let taken = self.arena.live() + coming;
        let allowed = self
            .allowance
            .bytes(coming)
            .max(LEAST.saturating_sub(taken));
        allowed.min(self.most.saturating_sub(taken))
    }

    fn ask_ahead(&mut self) {
        let room = self.room();
        if let Some(ahead) = &mut self.ahead {
            self.allowance.take(ahead.ask(room));
        }
    }

    fn take_ahead(&mut self) -> Option<Block> {
        match self.ahead.as_mut()?.take() {
            Ok(block) => block,
            Err(NoMemory) => {
                self.ahead = None;
                None
            }
        }
    }

    /// Reads up to `len` bytes from a source, if there is room for any.
    fn read(&mut self, source: &mut Source, len: usize) -> Result<Option<Moved>> {
        if self.block.as_ref().is_none_or(Block::is_full) {
            self.block = self.take_ahead();
            self.ask_ahead();
        }
        if let Some(block) = &mut self.block {
            let moved = read(source, block, len)?;
            source.keep(block.take_filled());
            return Ok(Some(moved));
        }
        let Some(mut block) = self.reserve(len)? else {
            return Ok(None);
        };
        let moved = read(source, &mut block, len)?;
        let extent = self.arena.seal(block);
        self.allowance.take(extent.len());
        source.keep(extent);
        Ok(Some(moved))
    }

    /// Memory for up to `len` bytes, if there is room.
    fn reserve(&mut self, len: usize) -> Result<Option<Block>> {
        let room = self.room();
        if room == 0 {
            return Ok(None);
        }
        match self.arena.reserve(len.min(room)) {
            Ok(block) => {
                self.none_since = None;
                Ok(Some(block))
            }
            // The shards will take what is here.
            Err(_) if self.arena.live() > 0 => {
                self.none_since = None;
                Ok(None)
            }
            Err(error) => {
                let since = self.none_since.get_or_insert_with(Instant::now);
                if since.elapsed() < PATIENCE {
                    return Ok(None);
                }
                Err(error).context("--buffer: getting memory for it")
            }
        }
    }

    /// Copies what a source's pipe has, as far as there is room.
    ///
    /// # Errors
    /// When another process reads from the pipe, and where there is no memory at all.
    pub(super) fn copy(&mut self, source: &mut Source) -> Result<Copied> {
        let look = source.look();
        let available = match look.with_context(|| format!("capturing {}", source.name))? {
            Look::Empty => return Ok(Copied::Nothing),
            Look::Filling => return Ok(Copied::Some),
            Look::Ended => return Ok(Copied::All),
            Look::Bytes(available) => available,
        };
        if source.owner == Owner::Criu {
            self.copied_at = Some(Instant::now());
        }
        let mut left = available;
        while left > 0 {
            match self.read(source, left.min(READ))? {
                Some(Moved::Bytes(bytes)) => left -= bytes,
                Some(Moved::WouldBlock | Moved::End) => return Err(source.ended_early(left)),
                None => {
                    // There is no plenty after all.
                    self.copied_at = None;
                    let has_moved = left < available;
                    return Ok(if has_moved {
                        Copied::Some
                    } else {
                        Copied::NoRoom
                    });
                }
            }
        }
        Ok(Copied::Some)
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The thread that has the pages put may have had no processor since it was asked.
    #[test]
    fn what_was_asked_for_ahead_is_not_taken_for_available() {
        let limit = 256 << 20;
        let mut coming = 0;
        for _ in 0..1000 {
            coming += allowed(limit, coming);
        }
        assert!(coming as u64 <= limit - memory::LEAST, "{coming}");
        assert_eq!(allowed(limit, limit as usize), 0);
        assert_eq!(allowed(u64::MAX, 0), memory::MOST_UNSEEN as usize);
    }
}
