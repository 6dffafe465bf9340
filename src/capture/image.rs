//! The image on its way out: one sequence of markers, spread over all shards.
//!
//! One file is current at a time, and a chunk of another one is preceded by its name. A chunk goes, with its markers, to the shard that
//! [`super::balancer`] chooses, and is cut to what that shard has room for.

use std::time::Instant;

use anyhow::{Context, Result};

use super::balancer::{self, Room};
use super::shard::{Shard, Spliced};
use super::source::{Layout, Promise, Source};
use crate::format::{Body, Marker};
use crate::os::pipe::{self, Moved, ReadEnd, SLOT, WriteEnd};
use crate::report;
use crate::report::progress::Stats;

/// The most slots that a chunk may pass through the staging pipe with.
const LARGEST_STAGED: usize = 64;

/// Below this capacity, in bytes, a shard costs speed that a setting could give back.
const GOOD_CAPACITY: usize = 1 << 20;

/// How far a source got in one round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// Nothing to do until an event comes.
    Idle,
    /// It waits for room in the shards.
    NoRoom,
    /// It has moved something, or will when it has filled.
    Busy,
    /// It is complete.
    Complete,
}

/// A pipe through which chunks pass whose number of slots is not known: what fits into it takes no more slots elsewhere than it has.
/// It is filled only when a shard has room for all that fits, and so is emptied at once.
struct Staging {
    read: ReadEnd,
    write: WriteEnd,
    slots: usize,
    is_taken: bool,
}

impl Staging {
    /// Chooses a size that every shard has room for while it is half full.
    fn new(shards: &[Shard]) -> Result<Self> {
        let smallest = shards.iter().map(Room::capacity).min().unwrap_or(1);
        let (read, write, slots) = pipe::with_slots((smallest / 2).clamp(1, LARGEST_STAGED))?;
        Ok(Self {
            read,
            write,
            slots,
            is_taken: false,
        })
    }

    /// Takes as much out of a source as fits, and tells how many bytes that is.
    fn fill(&self, source: &mut Source) -> Result<usize> {
        match pipe::splice(&source.pipe, &self.write, self.slots * SLOT)
            .with_context(|| format!("capturing {}", source.name))?
        {
            Moved::Bytes(bytes) => {
                source.staged(bytes, self.slots);
                Ok(bytes)
            }
            Moved::WouldBlock | Moved::End => Err(ended_early(source, 1)),
        }
    }
}

/// An image that is being written.
pub struct Image {
    shards: Vec<Shard>,
    staging: Staging,
    seq: u64,
    current: Option<u64>,
    start: Option<Instant>,
}

impl Image {
    /// Writes to these shards.
    ///
    /// # Errors
    /// When no pipe can be had.
    pub fn new(shards: Vec<Shard>) -> Result<Self> {
        warn_of_small_pipes(&shards);
        Ok(Self {
            staging: Staging::new(&shards)?,
            shards,
            seq: 0,
            current: None,
            start: None,
        })
    }

    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// Gives one chunk of what a source has available, in bytes, to the shard with the most room, if any has enough.
    ///
    /// # Errors
    /// When the shard's reader is gone.
    pub fn give_chunk(&mut self, id: u64, source: &mut Source, available: usize) -> Result<Step> {
        const MARKERS: usize = 1;
        let largest = self.shards.iter().map(Room::capacity).max().unwrap_or(0);
        let layout = source.layout(available, self.staging.slots);
        let wanted = match layout {
            Layout::Pages => (available / SLOT).min(largest.saturating_sub(MARKERS)),
            Layout::AtMost(slots) => slots,
            Layout::Unknown => self.staging.slots,
        };
        let Some(grant) = balancer::choose(&mut self.shards, wanted + MARKERS)
            .context("looking for a shard with room")?
        else {
            return Ok(Step::NoRoom);
        };
        // The only shard that cannot hold a marker and data at once: its data is promised.
        let is_tiny = self.shards[grant.shard].capacity() <= MARKERS;
        let slots = grant.slots.saturating_sub(MARKERS);
        let mut staged = false;
        let size = if is_tiny {
            available.min(SLOT)
        } else if slots == 0 {
            return Ok(Step::NoRoom);
        } else if layout == Layout::Pages {
            slots * SLOT
        } else if slots < wanted {
            return Ok(Step::NoRoom);
        } else if layout != Layout::Unknown {
            available
        } else if self.staging.is_taken {
            return Ok(Step::NoRoom);
        } else {
            staged = true;
            self.staging.fill(source)?
        };
        self.start.get_or_insert_with(Instant::now);
        self.name_file(id, source, grant.shard);
        self.mark(grant.shard, Body::Data(size as u32));
        source.promise = Some(Promise {
            shard: grant.shard,
            left: size,
            staged,
        });
        self.shards[grant.shard].set_promised(true);
        self.staging.is_taken |= staged;
        if !self.keep_promise(source, slots.clamp(1, size))? {
            return Ok(Step::NoRoom);
        }
        if source.ended && size == available {
            self.mark_end(source, grant.shard);
            return Ok(Step::Complete);
        }
        Ok(Step::Busy)
    }

    /// Moves what is left of the chunk that was promised to a shard, `slots` at most, and tells whether all of it has moved.
    ///
    /// # Errors
    /// When the shard's reader is gone.
    pub fn keep_promise(&mut self, source: &mut Source, slots: usize) -> Result<bool> {
        let Some(promise) = source.promise else {
            return Ok(true);
        };
        let shard = &mut self.shards[promise.shard];
        let pipe = if promise.staged {
            &self.staging.read
        } else {
            &source.pipe
        };
        let left = match shard.splice(pipe, promise.left, slots)? {
            Spliced::All => 0,
            Spliced::Full { left } => left,
            Spliced::SourceEnded { missing } => return Err(ended_early(source, missing)),
        };
        source.moved(promise.left - left);
        if left > 0 {
            source.promise = Some(Promise { left, ..promise });
            return Ok(false);
        }
        source.promise = None;
        shard.set_promised(false);
        self.staging.is_taken &= !promise.staged;
        Ok(true)
    }

    /// Marks the end of a file that has nothing left.
    ///
    /// # Errors
    /// When a shard cannot be inspected.
    pub fn end_file(&mut self, id: u64, source: &mut Source) -> Result<Step> {
        let Some(grant) =
            balancer::choose(&mut self.shards, 1).context("looking for a shard with room")?
        else {
            return Ok(Step::NoRoom);
        };
        self.start.get_or_insert_with(Instant::now);
        self.name_file(id, source, grant.shard);
        self.mark_end(source, grant.shard);
        Ok(Step::Complete)
    }

    fn mark_end(&mut self, source: &mut Source, shard: usize) {
        self.mark(shard, Body::FileEnd);
        self.current = None;
        source.named = false;
    }

    /// Makes a file the current one.
    fn name_file(&mut self, id: u64, source: &mut Source, shard: usize) {
        if self.current != Some(id) {
            self.mark(shard, Body::File(source.name.clone()));
            self.current = Some(id);
            source.named = true;
        }
    }

    fn mark(&mut self, shard: usize, body: Body) {
        let seq = self.seq;
        self.shards[shard].mark(Marker { seq, body });
        self.seq += 1;
    }

    /// Writes all that is queued, and tells whether nothing is left.
    ///
    /// # Errors
    /// When a shard's reader is gone.
    pub fn flush(&mut self) -> Result<bool> {
        let mut all = true;
        for shard in &mut self.shards {
            all &= shard.flush()?;
        }
        Ok(all)
    }

    /// Marks the end of the image, and tells whether there was room for the mark. [`Image::flush`] writes it.
    ///
    /// # Errors
    /// When a shard cannot be inspected.
    pub fn end(&mut self) -> Result<bool> {
        let grant =
            balancer::choose(&mut self.shards, 1).context("looking for a shard with room")?;
        if let Some(grant) = grant {
            self.mark(grant.shard, Body::ImageEnd);
        }
        Ok(grant.is_some())
    }

    /// Whether the shards' readers have taken everything.
    ///
    /// # Errors
    /// Those of inspecting a pipe.
    pub fn is_drained(&self) -> Result<bool> {
        for shard in &self.shards {
            if !shard
                .is_drained()
                .with_context(|| format!("waiting for the reader of {}", shard.label()))?
            {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// What passed through each shard.
    pub fn stats(&self) -> Stats {
        let shards = self.shards.iter();
        Stats {
            shards: shards.map(|shard| shard.stats(self.start)).collect(),
        }
    }
}

fn warn_of_small_pipes(shards: &[Shard]) {
    if let Some(smallest) = shards.iter().min_by_key(|shard| shard.capacity())
        && smallest.capacity() * SLOT < GOOD_CAPACITY
    {
        report::warn(format_args!(
            "{} holds only {} KiB, which makes the capture slow: raise /proc/sys/fs/pipe-max-size to at least {GOOD_CAPACITY}, and /proc/sys/fs/pipe-user-pages-soft (0 is no limit) if that is not root's pipe",
            smallest.label(),
            smallest.capacity() * SLOT / 1024,
        ));
    }
}

fn ended_early(source: &Source, missing: usize) -> anyhow::Error {
    anyhow::anyhow!(
        "capturing {}: its pipe ended {missing} bytes early: somebody else reads from it",
        source.name
    )
}
