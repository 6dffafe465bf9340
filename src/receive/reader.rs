//! A shard's stream, cut into markers and their data.
//!
//! What a shard's pipe has is taken out of it in one call ([`ShardReader::fill`]), as a rule into a
//! pipe of ours: from there markers are read, and data is spliced to a pipe that holds it. So data
//! comes to memory only where it is small, together with its markers.
//!
//! Where nothing can be held, that one call reads to memory, markers and data together, straight to
//! where the data stays: a chunk's data is then a part of that memory, found in place.
//!
//! The first call that takes something wakes the shard's writer, which then writes with the pipe's
//! mutex held, block by block, and each further call would spin for one of its blocks. With calls
//! for each marker and each chunk that was over 70% of the samples of a receiving streamer, and is
//! 15% with one (`restore/4-shards-64KiB-blocks-kept`, 2026-11-26).

use std::collections::VecDeque;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use super::order::{Next, Place};
use crate::format::marker;
use crate::format::{Body, CapturingProcess, Marker};
use crate::os::pipe::{self, Moved, ReadEnd};
use crate::report::meter::Meter;
use crate::store::held_pipe::{HeldPipe, PipePool, WORTH_HOLDING};
use crate::store::{Arena, Extent, Piece};

/// Bytes read ahead among small chunks. Less than that is read and not spliced.
const AHEAD: usize = WORTH_HOLDING;

/// The longest wait for a stream's end behind the end of the image or of its index, to find out
/// whether something follows. It is there already when the shards come from other programs' output;
/// a supervisor may keep its write end open, and need not.
const END_PATIENCE: Duration = Duration::from_millis(200);

/// What was taken of a chunk's data.
#[derive(Debug)]
pub(super) enum Taken {
    /// A piece, and the kind of step that follows it.
    Piece(Piece, Next),
    /// Some of a piece.
    Part,
    /// Nothing: nothing is left of what was taken out of the shard's pipe.
    Nothing,
}

/// A chunk whose data was not taken whole yet.
#[derive(Debug)]
struct OpenChunk {
    place: Place,
    left: usize,
}

/// The reading side of a shard.
pub(crate) struct ShardReader {
    pub(super) pipe: ReadEnd,
    /// Bytes that the pipe holds at most.
    pub(super) capacity: usize,
    /// The name of the shard in errors.
    pub(super) label: Rc<str>,
    /// It may have something.
    pub(super) is_busy: bool,
    /// A pipe of ours with the data that was taken out of the shard's, and not read or spliced yet.
    /// Made when it is needed.
    intake: Option<HeldPipe>,
    /// Bytes that were read and not taken yet. They precede those of the intake.
    ahead: VecDeque<Extent>,
    chunk: Option<OpenChunk>,
    /// Data of the current chunk, on its way into this pipe.
    held: Option<HeldPipe>,
    /// Its pages are as good as their data: they will not change, and hold little else.
    may_splice: bool,
    /// The last marker with data had so much that the next one has too, as a rule.
    is_among_large: bool,
    /// Everything was taken, up to the end of the stream.
    pub(super) has_ended: bool,
    /// The end of the wait for the stream's end, once nothing else should come.
    pub(super) end_by: Option<Instant>,
    /// The position of the last marker taken; positions on a shard only grow.
    pub(super) last_seq: Option<u64>,
    /// Bytes of the stream taken so far: where in it an error is.
    pub(super) taken: u64,
    pub(super) meter: Meter,
}

impl ShardReader {
    /// Gives the pipe the largest capacity allowed. `label` names the shard in errors.
    ///
    /// # Errors
    /// When the pipe cannot be made non-blocking.
    pub(super) fn new(pipe: ReadEnd, label: &str, meter: Meter) -> Result<Self> {
        let preparing = || format!("preparing {label}");
        let pipe = pipe.nonblocking().with_context(preparing)?;
        let slots = pipe::grow(&pipe, pipe::LARGEST).with_context(preparing)?;
        Ok(Self {
            pipe,
            capacity: slots * pipe::slot(),
            label: label.into(),
            is_busy: true,
            intake: None,
            ahead: VecDeque::new(),
            chunk: None,
            held: None,
            may_splice: true,
            is_among_large: false,
            has_ended: false,
            end_by: None,
            last_seq: None,
            taken: 0,
            meter,
        })
    }

    /// An error at the current place of this shard.
    pub(super) fn error(&self, what: impl std::fmt::Display) -> anyhow::Error {
        anyhow!("reading {} at byte {}: {what}", self.label, self.taken)
    }

    /// The place of the data that comes next, if it is data.
    pub(super) fn chunk(&self) -> Option<Place> {
        self.chunk.as_ref().map(|chunk| chunk.place)
    }

    /// Takes out of the shard's pipe what it has, in one call: into a pipe of ours, where that may
    /// be and there is room for pipes, or to memory. A pipe that was begun is filled, and may be
    /// the last that there is room for. Returns false if there is nothing now, or nothing ever
    /// again. Called when what was taken out before is not enough to go on.
    ///
    /// Up to the first marker little is read, and nothing spliced: the marker says whether the
    /// pages are those of an application that may run again. These must not look to their capture
    /// as if they had been copied.
    ///
    /// # Errors
    /// When there is no memory, or the stream was cut off.
    pub(super) fn fill(&mut self, arena: &mut Arena, pipes: &PipePool) -> Result<bool> {
        let splices = self.held.is_some() || self.may_splice && pipes.has_room();
        let is_first = self.last_seq.is_none();
        if splices && !is_first && self.intake.is_none() {
            self.intake = pipes.make(self.capacity);
        }
        let moved = match &mut self.intake {
            Some(intake) if splices => intake.take(&self.pipe, self.capacity),
            _ => {
                let most = if splices && is_first {
                    AHEAD
                } else {
                    self.capacity
                };
                let mut moved = Moved::WouldBlock;
                let read = arena.fill(most, |buffer| {
                    moved = pipe::read(&self.pipe, buffer)?;
                    Ok(moved.bytes())
                });
                read.map(|extent| {
                    self.ahead.extend((!extent.is_empty()).then_some(extent));
                    moved
                })
            }
        };
        let moved = moved.with_context(|| format!("reading {}", self.label))?;
        self.meter.add(moved.bytes());
        if moved == Moved::End {
            self.has_ended = true;
            if let Some(chunk) = &self.chunk {
                bail!(self.error(format_args!(
                    "the stream ends {} bytes before the end of its chunk: it was cut off",
                    chunk.left
                )));
            }
            if !self.ahead.is_empty() {
                bail!(self.error("the stream ends within a marker: it was cut off"));
            }
        }
        Ok(moved.bytes() > 0)
    }

    /// True if the stream has ended behind the end of the image or of its index, or was given the
    /// time to.
    ///
    /// # Errors
    /// When something follows.
    pub(super) fn is_over(&mut self, arena: &mut Arena, pipes: &PipePool) -> Result<bool> {
        let has_intake = self.intake.as_ref().is_some_and(|intake| intake.len() > 0);
        let is_drained = self.ahead.is_empty() && !has_intake;
        if self.chunk.is_some() || !is_drained || self.fill(arena, pipes)? {
            bail!(
                self.error("something follows the end of the image: is the shard of another one?")
            );
        }
        let now = Instant::now();
        let end = *self.end_by.get_or_insert(now + END_PATIENCE);
        Ok(self.has_ended || now >= end)
    }

    /// Reads up to `most` bytes of what was taken out of the shard's pipe. Returns false if nothing
    /// is left of it.
    fn read(&mut self, arena: &mut Arena, most: usize) -> Result<bool> {
        let Some(intake) = self.intake.as_mut().filter(|intake| intake.len() > 0) else {
            return Ok(false);
        };
        let extent = arena.fill(most.min(intake.len()), |buffer| intake.read(buffer));
        let extent = extent.with_context(|| format!("reading {}", self.label))?;
        self.ahead.push_back(extent);
        Ok(true)
    }

    /// Reads more for the next marker. Returns false if what was taken out of the shard's pipe is
    /// not enough.
    ///
    /// # Errors
    /// When there is no memory.
    pub(super) fn read_for_marker(&mut self, arena: &mut Arena) -> Result<bool> {
        let mut most = AHEAD;
        if self.is_among_large {
            // No more than the marker, so that all of the data behind it can be spliced.
            let bytes = self.ahead.iter().flat_map(Extent::bytes).copied();
            let begun: Vec<_> = bytes.take(marker::LENGTH).collect();
            most = match begun.first_chunk() {
                None => marker::LENGTH - begun.len(),
                Some(field) => {
                    let read: usize = self.ahead.iter().map(Extent::len).sum();
                    marker::LENGTH + u32::from_le_bytes(*field) as usize - read
                }
            };
        }
        self.read(arena, most)
    }

    /// Takes the marker that comes next, if all of it was read. If data follows it, it becomes the
    /// current chunk.
    ///
    /// # Errors
    /// When the stream is damaged.
    pub(super) fn next_marker(&mut self) -> Result<Option<Marker>> {
        let decoded = self.decode();
        let decoded = decoded.map_err(|error| self.error(format_args!("{error:#}")))?;
        let Some((marker, size)) = decoded else {
            return Ok(None);
        };
        if let Some(last) = self.last_seq
            && marker.seq <= last
        {
            bail!(self.error(format_args!(
                "marker {} comes after marker {last}: the order is wrong, or it is repeated",
                marker.seq
            )));
        }
        if self.last_seq.is_none() {
            // Its pages may be the application's own.
            let origin = marker.origin.as_ref();
            self.may_splice &= !origin.is_some_and(CapturingProcess::may_be_running);
        }
        self.last_seq = Some(marker.seq);
        if let Body::Data(left @ 1..) = marker.body {
            let left = left as usize;
            self.is_among_large = left >= AHEAD;
            self.chunk = Some(OpenChunk {
                place: Place::of(marker.seq),
                left,
            });
        }
        let mut left = size;
        while left > 0 {
            left -= self.take_front(left).len();
        }
        Ok(Some(marker))
    }

    fn decode(&self) -> Result<Option<(Marker, usize)>> {
        let Some(front) = self.ahead.front() else {
            return Ok(None);
        };
        let decoded = Marker::decode(front.bytes())?;
        if decoded.is_some() || self.ahead.len() == 1 {
            return Ok(decoded);
        }
        // The marker continues in what was read next.
        let bytes = self.ahead.iter().flat_map(Extent::bytes).copied();
        let joined: Vec<_> = bytes.take(marker::LENGTH + marker::LARGEST_FRAME).collect();
        Marker::decode(&joined)
    }

    /// Takes up to `most` bytes of what was read, which is something, as far as they lie together.
    fn take_front(&mut self, most: usize) -> Extent {
        let front = self.ahead.front_mut().expect("something was read");
        let part = front.split_front(most.min(front.len()));
        if front.is_empty() {
            self.ahead.pop_front();
        }
        self.taken += part.len() as u64;
        part
    }

    /// Takes data of the current chunk: what was read already, or else by splicing it to a pipe
    /// that holds it, or else by reading it.
    ///
    /// # Errors
    /// When there is no memory, and those of `splice`; none for pipes of ours.
    pub(super) fn take_data(&mut self, arena: &mut Arena, pipes: &mut PipePool) -> Result<Taken> {
        let left = self.chunk.as_ref().map_or(0, |chunk| chunk.left);
        if self.ahead.is_empty() {
            let Some(intake) = self.intake.as_mut().filter(|intake| intake.len() > 0) else {
                return Ok(Taken::Nothing);
            };
            let is_worth = self.may_splice && left >= WORTH_HOLDING;
            let begun = self.held.take();
            if let Some(mut held) = begun.or_else(|| is_worth.then(|| pipes.hold(left)).flatten()) {
                let bytes = held.absorb(intake, left);
                let bytes = bytes.with_context(|| format!("reading {}", self.label))?;
                self.taken += bytes as u64;
                if bytes == 0 {
                    // All of its slots are taken.
                    self.may_splice &= !held.is_wasteful();
                } else if bytes < left {
                    self.chunk.as_mut().expect("data belongs to a chunk").left -= bytes;
                    self.held = Some(held);
                    return Ok(Taken::Part);
                }
                return Ok(Taken::Piece(Piece::Pipe(held), self.advance_chunk(bytes)));
            }
            // Behind the end of a large chunk there is another one.
            let most = if self.is_among_large {
                left
            } else {
                left.max(AHEAD)
            };
            self.read(arena, most)?;
        }
        let extent = self.take_front(left);
        let next = self.advance_chunk(extent.len());
        Ok(Taken::Piece(Piece::Memory(extent), next))
    }

    fn advance_chunk(&mut self, bytes: usize) -> Next {
        let chunk = self.chunk.as_mut().expect("data belongs to a chunk");
        chunk.left -= bytes;
        if chunk.left == 0 {
            self.chunk = None;
            return Next::Marker;
        }
        chunk.place.part += 1;
        Next::Part
    }
}
