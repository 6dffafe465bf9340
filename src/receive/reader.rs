//! The reading side of a shard: cuts the stream into markers and their data.
//!
//! What a pipe holds is read in one call, markers and data together, straight to where the data stays: into the rest of a huge page, or
//! into memory for exactly as many bytes as there are. The data of a chunk is then a part of that memory, found in place. One
//! large read for a full pipe costs half the CPU of reading marker, data, marker, data, because each read but the last meets the
//! pipe's writer, woken by the one before, at the pipe's mutex.
//!
//! On the way to disk, data should not come to memory at all, so that only as much is read ahead as the next markers take.

use std::collections::VecDeque;
use std::io;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};

use crate::format::marker::{self, BadMarker, Body, Marker};
use crate::os::pipe::{self, Moved, ReadEnd};
use crate::report::meter::Meter;
use crate::report::progress::ShardStats;
use crate::store::{Arena, Extent};

/// Bytes read ahead among small files, when data should rather be spliced.
const AHEAD: usize = 16 << 10;

/// Bytes read ahead after a large chunk: the end of a file, the name of another, and the size of the next chunk.
const AHEAD_OF_LARGE: usize = 64;

/// A chunk that is worth splicing, in bytes.
const LARGE: usize = AHEAD;

/// What a shard has next.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// A marker that no data follows.
    Marker(u64, Body),
    /// Data of a chunk, of which so many parts were taken before.
    Data { seq: u64, part: u32 },
    /// Nothing before more is read.
    Nothing,
}

/// Data of a chunk, in memory.
#[derive(Debug)]
pub struct Part {
    pub extent: Extent,
    /// Nothing of the chunk comes after it.
    pub last: bool,
}

#[derive(Debug)]
struct Chunk {
    seq: u64,
    left: usize,
    /// How many parts of it were taken.
    part: u32,
}

/// The reading side of a shard.
pub struct Shard {
    pipe: ReadEnd,
    /// Bytes that the pipe holds at most.
    capacity: usize,
    label: String,
    /// What was read and not taken yet.
    ahead: VecDeque<Extent>,
    chunk: Option<Chunk>,
    last_was_large: bool,
    /// Nobody holds the pipe's write end: what is in the pipe is the last of it.
    hung_up: bool,
    ended: bool,
    last_seq: Option<u64>,
    meter: Meter,
    taken: u64,
}

impl Shard {
    /// Gives the pipe the largest capacity allowed. `label` names the shard in errors.
    ///
    /// # Errors
    /// When the pipe cannot be made non-blocking.
    pub fn new(pipe: ReadEnd, label: String, meter: Meter) -> Result<Self> {
        let pipe = pipe
            .nonblocking()
            .with_context(|| format!("preparing {label}"))?;
        let slots =
            pipe::grow(&pipe, pipe::LARGEST).with_context(|| format!("preparing {label}"))?;
        Ok(Self {
            pipe,
            capacity: slots * pipe::SLOT,
            label,
            ahead: VecDeque::new(),
            chunk: None,
            last_was_large: false,
            hung_up: false,
            ended: false,
            last_seq: None,
            meter,
            taken: 0,
        })
    }

    pub fn label(&self) -> &str {
        &self.label
    }

    pub fn pipe(&self) -> &ReadEnd {
        &self.pipe
    }

    /// Bytes that the pipe holds at most.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// The pipe's writers are gone.
    pub fn hang_up(&mut self) {
        self.hung_up = true;
    }

    /// Whether everything was taken, up to the end of the stream.
    pub fn has_ended(&self) -> bool {
        self.ended && self.ahead.is_empty()
    }

    /// The position of the last marker taken; positions on a shard only grow.
    pub fn last_seq(&self) -> Option<u64> {
        self.last_seq
    }

    /// Bytes of the stream taken so far: where in it an error is.
    pub fn offset(&self) -> u64 {
        self.taken
    }

    pub fn stats(&self, start: Option<Instant>) -> ShardStats {
        self.meter.stats(start)
    }

    /// An error at the current place of this shard.
    pub fn error(&self, what: impl std::fmt::Display) -> anyhow::Error {
        anyhow!("reading {} at byte {}: {what}", self.label, self.offset())
    }

    /// What comes next of what was read. A chunk stays the next thing until its data was taken.
    ///
    /// # Errors
    /// When the stream is damaged or cut off.
    pub fn next(&mut self, arena: &mut Arena) -> Result<Next> {
        if let Some(chunk) = &self.chunk {
            return Ok(Next::Data {
                seq: chunk.seq,
                part: chunk.part,
            });
        }
        match self.decode(arena).map_err(|error| self.error(error))? {
            Some((marker, size)) => {
                let next = self.enter(marker)?;
                self.skip(size, arena);
                Ok(next)
            }
            None => Ok(Next::Nothing),
        }
    }

    fn decode(&self, arena: &Arena) -> Result<Option<(Marker, usize)>, BadMarker> {
        let Some(front) = self.ahead.front() else {
            return Ok(None);
        };
        let decoded = Marker::decode(arena.bytes(front))?;
        if decoded.is_some() || self.ahead.len() == 1 {
            return Ok(decoded);
        }
        // The marker continues in what was read next.
        let mut joined = Vec::new();
        for extent in &self.ahead {
            let missing = marker::LENGTH + marker::LARGEST_FRAME - joined.len();
            let bytes = arena.bytes(extent);
            joined.extend_from_slice(&bytes[..bytes.len().min(missing)]);
        }
        Marker::decode(&joined)
    }

    fn enter(&mut self, Marker { seq, body }: Marker) -> Result<Next> {
        if let Some(last) = self.last_seq
            && seq <= last
        {
            bail!(self.error(format_args!(
                "marker {seq} comes after marker {last}: the order is wrong, or it is repeated"
            )));
        }
        self.last_seq = Some(seq);
        match body {
            Body::Data(left) if left > 0 => {
                let left = left as usize;
                self.last_was_large = left >= LARGE;
                self.chunk = Some(Chunk { seq, left, part: 0 });
                Ok(Next::Data { seq, part: 0 })
            }
            body => Ok(Next::Marker(seq, body)),
        }
    }

    fn skip(&mut self, mut size: usize, arena: &mut Arena) {
        while size > 0 {
            let part = self
                .take_front(size)
                .expect("only what was read is skipped");
            size -= part.len();
            arena.release(part);
        }
    }

    /// Up to `most` bytes from the front of what was read.
    fn take_front(&mut self, most: usize) -> Option<Extent> {
        let front = self.ahead.front_mut()?;
        let part = front.split_front(most.min(front.len()));
        if front.is_empty() {
            self.ahead.pop_front();
        }
        self.taken += part.len() as u64;
        Some(part)
    }

    /// How much to read when data should rather be spliced: what the next markers take.
    pub fn ahead_for_markers(&self) -> usize {
        if self.last_was_large {
            AHEAD_OF_LARGE
        } else {
            AHEAD
        }
    }

    /// Reads what the pipe holds, up to `most` bytes, and tells whether there was something. Called when what was read before
    /// is not enough to go on.
    ///
    /// A few bytes, or what is left of a huge page begun, are read without asking first how much there is, because the question takes
    /// the pipe's mutex too, and has to wait for a writer that is in the middle of a block as long as the read itself. For the same
    /// reason a read ends with the huge page if that took a good part of what a pipe holds: full pipes of 1 MiB then fill huge
    /// pages of 2 MiB in two reads each.
    ///
    /// # Errors
    /// When there is no memory, or the stream was cut off.
    pub fn read(&mut self, arena: &mut Arena, most: usize) -> Result<bool> {
        let unasked = match arena.left_of_huge_page() {
            _ if most <= LARGE => most,
            left => left.min(most),
        };
        if unasked >= LARGE.min(most) {
            match self.read_block(arena, unasked)? {
                0 => {
                    self.check_for_end()?;
                    return Ok(false);
                }
                taken if taken < unasked || unasked == most || unasked >= self.capacity / 2 => {
                    return Ok(true);
                }
                _ => return self.read_available(arena, most - unasked).map(|_| true),
            }
        }
        let any = self.read_available(arena, most)?;
        if !any {
            self.check_for_end()?;
        }
        Ok(any)
    }

    fn read_available(&mut self, arena: &mut Arena, most: usize) -> Result<bool> {
        let available =
            pipe::available(&self.pipe).with_context(|| format!("reading {}", self.label))?;
        let mut left = available.min(most);
        let any = left > 0;
        while left > 0 {
            let taken = self.read_block(arena, left)?;
            if taken == 0 {
                bail!(self.error("somebody else reads from it too"))
            }
            left -= taken;
        }
        Ok(any)
    }

    /// One read, of up to `most` bytes; 0 if the pipe is empty.
    fn read_block(&mut self, arena: &mut Arena, most: usize) -> Result<usize> {
        let reserved = if self.hung_up {
            arena.reserve_last(most)
        } else {
            arena.reserve(most)
        };
        let mut block = reserved
            .with_context(|| format!("keeping {most} bytes in memory beside {}", arena.live()))?;
        let moved = pipe::read(&self.pipe, arena.unfilled(&mut block))
            .with_context(|| format!("reading {}", self.label))?;
        let taken = match moved {
            Moved::Bytes(bytes) => bytes,
            Moved::WouldBlock => 0,
            Moved::End => {
                self.hung_up = true;
                0
            }
        };
        arena.filled(&mut block, taken);
        let extent = arena.seal(block);
        if taken > 0 {
            self.ahead.push_back(extent);
            self.arrived(taken);
        }
        Ok(taken)
    }

    fn arrived(&mut self, bytes: usize) {
        self.meter.add(bytes);
    }

    /// Takes the data of the current chunk that was read, as far as it lies together.
    pub fn take_part(&mut self) -> Option<Part> {
        let left = self.chunk.as_ref()?.left;
        let extent = self.take_front(left)?;
        let last = self.advance_chunk(extent.len());
        Some(Part { extent, last })
    }

    /// So many bytes of the current chunk were taken; tells whether nothing of it comes after them.
    fn advance_chunk(&mut self, bytes: usize) -> bool {
        let chunk = self.chunk.as_mut().expect("data belongs to a chunk");
        chunk.left -= bytes;
        chunk.part += 1;
        let last = chunk.left == 0;
        if last {
            self.chunk = None;
        }
        last
    }

    /// Bytes of the current chunk's data that are still to be taken.
    pub fn left_of_chunk(&self) -> usize {
        self.chunk.as_ref().map_or(0, |chunk| chunk.left)
    }

    /// Whether nothing of what was read is left.
    pub fn is_read_out(&self) -> bool {
        self.ahead.is_empty()
    }

    /// Whether the current chunk is the one at this position.
    pub fn is_at(&self, seq: u64) -> bool {
        self.chunk.as_ref().is_some_and(|chunk| chunk.seq == seq)
    }

    /// Moves data of the current chunk with `splice`, which is given the pipe and how many bytes to move; `None` when the pipe is
    /// empty, otherwise whether it was the last of the chunk. `to` names the target in errors.
    ///
    /// # Errors
    /// Those of `splice`, and when the stream was cut off.
    pub fn splice(
        &mut self,
        to: &impl std::fmt::Display,
        splice: impl FnOnce(&ReadEnd, usize) -> io::Result<Moved>,
    ) -> Result<Option<bool>> {
        match splice(&self.pipe, self.left_of_chunk()).with_context(|| format!("writing {to}"))? {
            Moved::Bytes(bytes) => {
                self.arrived(bytes);
                self.taken += bytes as u64;
                return Ok(Some(self.advance_chunk(bytes)));
            }
            Moved::WouldBlock => {}
            Moved::End => self.hung_up = true,
        }
        self.check_for_end()?;
        Ok(None)
    }

    /// Notes that nothing more comes, if that is so.
    ///
    /// # Errors
    /// When the stream ends within a marker or a chunk.
    fn check_for_end(&mut self) -> Result<()> {
        self.ended |= self.hung_up;
        match &self.chunk {
            _ if !self.ended => Ok(()),
            Some(chunk) => bail!(self.error(format_args!(
                "the stream ends {} bytes before the end of its chunk: it was cut off",
                chunk.left
            ))),
            None if !self.ahead.is_empty() => {
                bail!(self.error("the stream ends within a marker: it was cut off"))
            }
            None => Ok(()),
        }
    }
}
