//! The reading side of a shard: cuts the stream into markers and their data.
//!
//! Markers go through a buffer; the data of large chunks is read past it, straight to where it stays. How far the buffer reads
//! ahead follows what the shard carries: after a large chunk only as much as the next markers take, since data that
//! was read ahead has to be copied once more; among small files many of them at once.

use std::io;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use crate::pipe::{self, Moved, ReadEnd};
use crate::progress::ShardStats;
use crate::store::{Arena, Block, Extent};
use crate::wire::{self, Marker, MarkerBody};

/// Bytes read ahead among small files. Also more than the largest marker takes.
const AHEAD: usize = 16 << 10;

/// Bytes read ahead after a large chunk: the end of a file, the name of another, and the size of the next chunk.
const AHEAD_OF_LARGE: usize = 64;

/// A chunk that is worth reading past the buffer, in bytes.
const LARGE: usize = AHEAD;

/// Memory reserved at a time for a chunk, in bytes: a marker may announce 4 GiB that never come.
const BLOCK: usize = 1 << 20;

/// What a shard has next.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// A marker that no data follows.
    Marker(u64, MarkerBody),
    /// Data of a chunk, of which so many parts were taken before.
    Data { seq: u64, part: u32 },
    /// Nothing now.
    Nothing,
    /// Nothing ever again.
    Ended,
}

/// How taking a chunk's data went.
#[derive(Debug)]
pub enum Taken {
    /// Memory with some of it; whether it is the last of the chunk.
    Memory { extent: Extent, last: bool },
    /// Nothing whole yet.
    Nothing,
}

#[derive(Debug)]
struct Chunk {
    seq: u64,
    left: usize,
    /// How many parts of it were taken.
    part: u32,
    block: Option<Block>,
}

/// The reading side of a shard.
pub struct Shard {
    pipe: ReadEnd,
    label: String,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    chunk: Option<Chunk>,
    last_was_large: bool,
    ended: bool,
    last_seq: Option<u64>,
    received: u64,
    last_read: Option<Instant>,
}

impl Shard {
    /// Gives the pipe the largest capacity allowed. `label` names the shard in errors.
    ///
    /// # Errors
    /// When the pipe cannot be made non-blocking.
    pub fn new(pipe: ReadEnd, label: String) -> Result<Self> {
        let pipe = pipe
            .nonblocking()
            .with_context(|| format!("preparing {label}"))?;
        pipe::grow(&pipe, pipe::LARGEST).with_context(|| format!("preparing {label}"))?;
        Ok(Self {
            pipe,
            label,
            buffer: vec![0; AHEAD].into_boxed_slice(),
            start: 0,
            end: 0,
            chunk: None,
            last_was_large: false,
            ended: false,
            last_seq: None,
            received: 0,
            last_read: None,
        })
    }

    pub fn label(&self) -> &str {
        &self.label
    }

    pub fn pipe(&self) -> &ReadEnd {
        &self.pipe
    }

    /// Whether everything was taken, up to the end of the stream.
    pub fn has_ended(&self) -> bool {
        self.ended && self.start == self.end
    }

    /// The position of the last marker taken; positions on a shard only grow.
    pub fn last_seq(&self) -> Option<u64> {
        self.last_seq
    }

    /// Bytes of the stream taken so far: where in it an error is.
    pub fn offset(&self) -> u64 {
        self.received - (self.end - self.start) as u64
    }

    pub fn stats(&self, start: Option<Instant>) -> ShardStats {
        let duration = match (start, self.last_read) {
            (Some(start), Some(end)) => end.duration_since(start),
            _ => Duration::ZERO,
        };
        ShardStats {
            size: self.received,
            transfer_duration_millis: duration.as_millis() as u64,
        }
    }

    /// An error at the current place of this shard.
    pub fn error(&self, what: impl std::fmt::Display) -> anyhow::Error {
        anyhow!("reading {} at byte {}: {what}", self.label, self.offset())
    }

    /// What comes next on this shard. A chunk stays the next thing until its data was taken.
    ///
    /// # Errors
    /// When the stream is damaged or cut off.
    pub fn next(&mut self) -> Result<Next> {
        loop {
            if let Some(chunk) = &self.chunk {
                return Ok(Next::Data {
                    seq: chunk.seq,
                    part: chunk.part,
                });
            }
            match wire::decode(&self.buffer[self.start..self.end])
                .map_err(|error| self.error(error))?
            {
                Some((marker, size)) => return self.take(marker, size),
                None if self.ended && self.start == self.end => return Ok(Next::Ended),
                None if self.ended => {
                    bail!(self.error("the stream ends within a marker: it was cut off"))
                }
                None => {
                    if !self.read_ahead()? {
                        return Ok(Next::Nothing);
                    }
                }
            }
        }
    }

    fn take(&mut self, marker: Marker, size: usize) -> Result<Next> {
        let Marker { seq, body } = marker;
        if let Some(last) = self.last_seq
            && seq <= last
        {
            bail!(self.error(format_args!(
                "marker {seq} comes after marker {last}: the order is wrong, or it is repeated"
            )));
        }
        self.start += size;
        self.last_seq = Some(seq);
        match body {
            MarkerBody::Data(left) if left > 0 => {
                let left = left as usize;
                self.last_was_large = left >= LARGE;
                self.chunk = Some(Chunk {
                    seq,
                    left,
                    part: 0,
                    block: None,
                });
                Ok(Next::Data { seq, part: 0 })
            }
            body => Ok(Next::Marker(seq, body)),
        }
    }

    /// Reads into the buffer; `false` when there is nothing now.
    fn read_ahead(&mut self) -> Result<bool> {
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        let missing = match wire::frame_length(&self.buffer[..self.end])
            .map_err(|error| self.error(error))?
        {
            Some(length) => wire::LENGTH + length - self.end,
            None => wire::LENGTH - self.end,
        };
        let size = if self.last_was_large {
            AHEAD_OF_LARGE.max(missing)
        } else {
            AHEAD - self.end
        };
        match pipe::read(&self.pipe, &mut self.buffer[self.end..self.end + size])
            .with_context(|| format!("reading {}", self.label))?
        {
            Moved::Bytes(bytes) => {
                self.end += bytes;
                self.arrived(bytes);
                Ok(true)
            }
            Moved::WouldBlock => Ok(false),
            Moved::End => {
                self.ended = true;
                Ok(true)
            }
        }
    }

    fn arrived(&mut self, bytes: usize) {
        self.received += bytes as u64;
        self.last_read = Some(Instant::now());
    }

    fn chunk(&mut self) -> &mut Chunk {
        self.chunk
            .as_mut()
            .expect("a chunk's data is only taken when it is the next thing")
    }

    /// Takes up to `most` bytes of the current chunk into memory; nothing before they are all there.
    ///
    /// # Errors
    /// When the stream was cut off, or there is no memory.
    pub fn take_memory(&mut self, arena: &mut Arena, most: usize) -> Result<Taken> {
        let mut chunk = self
            .chunk
            .take()
            .expect("a chunk's data is only taken when it is the next thing");
        let Some(block) = self.fill(&mut chunk, arena, most)? else {
            self.chunk = Some(chunk);
            return Ok(Taken::Nothing);
        };
        let last = chunk.left == 0;
        if !last {
            chunk.part += 1;
            self.chunk = Some(chunk);
        }
        Ok(Taken::Memory {
            extent: block.seal(),
            last,
        })
    }

    /// Fills one block of the chunk; `None` when the shard has nothing now.
    fn fill(&mut self, chunk: &mut Chunk, arena: &mut Arena, most: usize) -> Result<Option<Block>> {
        let mut block = match chunk.block.take() {
            Some(block) => block,
            None => arena
                .reserve(chunk.left.min(most).min(BLOCK))
                .with_context(|| {
                    format!(
                        "keeping {} bytes in memory, beside {} so far",
                        chunk.left,
                        arena.live()
                    )
                })?,
        };
        while block.left() > 0 {
            let space = arena.unfilled(&mut block);
            let bytes = if self.start < self.end {
                let bytes = space.len().min(self.end - self.start);
                space[..bytes].copy_from_slice(&self.buffer[self.start..self.start + bytes]);
                self.start += bytes;
                bytes
            } else {
                match pipe::read(&self.pipe, space)
                    .with_context(|| format!("reading {}", self.label))?
                {
                    Moved::Bytes(bytes) => {
                        self.arrived(bytes);
                        bytes
                    }
                    Moved::WouldBlock => {
                        chunk.block = Some(block);
                        return Ok(None);
                    }
                    Moved::End => bail!(self.cut_off(chunk.left)),
                }
            };
            arena.filled(&mut block, bytes);
            chunk.left -= bytes;
        }
        Ok(Some(block))
    }

    /// Bytes of the current chunk that have to go through memory, since they are there already: read ahead, or part of a block.
    pub fn in_memory(&self) -> usize {
        let Some(chunk) = &self.chunk else { return 0 };
        match &chunk.block {
            Some(block) => block.left(),
            None => chunk.left.min(self.end - self.start),
        }
    }

    /// Whether a part of the current chunk is on its way to memory.
    pub fn has_begun_block(&self) -> bool {
        self.chunk
            .as_ref()
            .is_some_and(|chunk| chunk.block.is_some())
    }

    /// Whether the current chunk is the one at this position.
    pub fn is_at(&self, seq: u64) -> bool {
        self.chunk.as_ref().is_some_and(|chunk| chunk.seq == seq)
    }

    /// Takes data of the current chunk with `splice`, which is given the pipe and how many bytes to move; `None` when there is
    /// nothing now, otherwise whether it was the last of the chunk.
    ///
    /// # Errors
    /// When the stream was cut off, and those of `splice`, to which `to` is added.
    pub fn take_spliced(
        &mut self,
        to: &dyn std::fmt::Display,
        splice: impl FnOnce(&ReadEnd, usize) -> io::Result<Moved>,
    ) -> Result<Option<bool>> {
        let left = self.chunk().left;
        match splice(&self.pipe, left).with_context(|| format!("writing {to}"))? {
            Moved::Bytes(bytes) => {
                self.arrived(bytes);
                let chunk = self.chunk();
                chunk.left -= bytes;
                chunk.part += 1;
                let last = chunk.left == 0;
                if last {
                    self.chunk = None;
                }
                Ok(Some(last))
            }
            Moved::WouldBlock => Ok(None),
            Moved::End => bail!(self.cut_off(left)),
        }
    }

    fn cut_off(&self, left: usize) -> anyhow::Error {
        self.error(format_args!(
            "the stream ends {left} bytes before the end of its chunk: it was cut off"
        ))
    }

    /// Whether something follows on this shard: `None` while that is not known.
    ///
    /// # Errors
    /// Those of reading.
    pub fn has_more(&mut self) -> Result<Option<bool>> {
        if self.start < self.end {
            return Ok(Some(true));
        }
        if self.ended {
            return Ok(Some(false));
        }
        self.last_was_large = true;
        Ok(if self.read_ahead()? {
            Some(self.start < self.end)
        } else {
            None
        })
    }
}
