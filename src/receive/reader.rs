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
use crate::format::{Body, Marker};
use crate::os::pipe::{self, Moved, ReadEnd};
use crate::os::process::CapturingProcess;
use crate::report::meter::Meter;
use crate::store::held_pipe::{HeldPipe, PipePool, WORTH_HOLDING};
use crate::store::{Arena, Extent};

/// Bytes read ahead among small chunks. Less than that is read and not spliced.
const AHEAD: usize = WORTH_HOLDING;

/// The longest wait for a stream's end behind the end of the image or of its index, to find out
/// whether something follows. It is there already when the shards come from other programs' output;
/// a supervisor may keep its write end open, and need not.
const END_PATIENCE: Duration = Duration::from_millis(200);

/// The outcome of holding data.
#[derive(Debug)]
pub(super) enum Holding {
    /// All of a chunk's data, or as much as fits into a pipe.
    Piece(HeldPipe, Next),
    /// More of the chunk's data, but not all.
    Begun,
    /// Nothing is left of what was taken out of the shard's pipe.
    Drained,
    /// It should be read to memory: it is too small, or a limit is reached.
    Refused,
}

/// A chunk whose data was not taken whole yet.
#[derive(Debug)]
struct OpenChunk {
    place: Place,
    left: usize,
}

/// The reading side of a shard.
pub(crate) struct ShardReader {
    pipe: ReadEnd,
    /// Bytes that the pipe holds at most.
    capacity: usize,
    label: Rc<str>,
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
    ended: bool,
    /// The end of the wait for the stream's end, once nothing else should come.
    end_by: Option<Instant>,
    last_seq: Option<u64>,
    /// Bytes of the stream taken so far.
    taken: u64,
    meter: Meter,
}

impl ShardReader {
    /// Gives the pipe the largest capacity allowed. `label` names the shard in errors.
    ///
    /// # Errors
    /// When the pipe cannot be made non-blocking.
    pub(super) fn new(pipe: ReadEnd, label: &str, meter: Meter) -> Result<Self> {
        let prepare = || {
            let pipe = pipe.nonblocking()?;
            let slots = pipe::grow(&pipe, pipe::LARGEST)?;
            Ok::<_, std::io::Error>((pipe, slots))
        };
        let (pipe, slots) = prepare().with_context(|| format!("preparing {label}"))?;
        Ok(Self {
            pipe,
            capacity: slots * pipe::slot(),
            label: label.into(),
            intake: None,
            ahead: VecDeque::new(),
            chunk: None,
            held: None,
            may_splice: true,
            is_among_large: false,
            ended: false,
            end_by: None,
            last_seq: None,
            taken: 0,
            meter,
        })
    }

    pub(super) fn label(&self) -> Rc<str> {
        Rc::clone(&self.label)
    }

    pub(super) fn pipe(&self) -> &ReadEnd {
        &self.pipe
    }

    pub(super) fn meter(&self) -> &Meter {
        &self.meter
    }

    /// Bytes that the pipe holds at most.
    pub(super) fn capacity(&self) -> usize {
        self.capacity
    }

    /// True if everything was taken, up to the end of the stream.
    pub(super) fn has_ended(&self) -> bool {
        self.ended
    }

    /// The position of the last marker taken; positions on a shard only grow.
    pub(super) fn last_seq(&self) -> Option<u64> {
        self.last_seq
    }

    /// Bytes of the stream taken so far: where in it an error is.
    pub(super) fn offset(&self) -> u64 {
        self.taken
    }

    /// An error at the current place of this shard.
    pub(super) fn error(&self, what: impl std::fmt::Display) -> anyhow::Error {
        anyhow!("reading {} at byte {}: {what}", self.label, self.taken)
    }

    /// The place of the data that comes next, if it is data.
    pub(super) fn chunk(&self) -> Option<Place> {
        self.chunk.as_ref().map(|chunk| chunk.place)
    }

    fn left_of_chunk(&self) -> usize {
        self.chunk.as_ref().map_or(0, |chunk| chunk.left)
    }

    /// True if data may be spliced and held in pipes.
    pub(super) fn may_splice(&self) -> bool {
        self.may_splice
    }

    /// True if a pipe holds a part of the current chunk's data, to which the rest belongs.
    pub(super) fn is_holding(&self) -> bool {
        self.held.is_some()
    }

    /// Takes out of the shard's pipe what it has, in one call: into a pipe of ours if `splices`,
    /// or to memory. Returns false if there is nothing now, or nothing ever again. Called when
    /// what was taken out before is not enough to go on.
    ///
    /// Up to the first marker little is read, and nothing spliced: the marker says whether the
    /// pages are those of an application that may run again. These must not look to their capture
    /// as if they had been copied.
    ///
    /// # Errors
    /// When there is no memory, or the stream was cut off.
    pub(super) fn fill(
        &mut self,
        splices: bool,
        arena: &mut Arena,
        pipes: &PipePool,
    ) -> Result<bool> {
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
            self.ended = true;
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
        let is_drained = self.ahead.is_empty() && self.intake().is_none();
        if self.chunk.is_some() || !is_drained || self.fill(false, arena, pipes)? {
            bail!(
                self.error("something follows the end of the image: is the shard of another one?")
            );
        }
        let now = Instant::now();
        let end = *self.end_by.get_or_insert(now + END_PATIENCE);
        Ok(self.ended || now >= end)
    }

    /// The end of the wait for the stream's end, once it has begun.
    pub(super) fn end_by(&self) -> Option<Instant> {
        self.end_by
    }

    /// The pipe of ours, if it has something.
    fn intake(&mut self) -> Option<&mut HeldPipe> {
        self.intake.as_mut().filter(|intake| intake.len() > 0)
    }

    /// Reads up to `most` bytes of what was taken out of the shard's pipe. Returns false if nothing
    /// is left of it.
    fn read(&mut self, arena: &mut Arena, most: usize) -> Result<bool> {
        let label = self.label();
        let Some(intake) = self.intake() else {
            return Ok(false);
        };
        let extent = arena
            .fill(most.min(intake.len()), |buffer| intake.read(buffer))
            .with_context(|| format!("reading {label}"))?;
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

    /// Reads data of the current chunk that is not held.
    ///
    /// # Errors
    /// When there is no memory.
    pub(super) fn read_data(&mut self, arena: &mut Arena) -> Result<bool> {
        let left = self.left_of_chunk();
        // Behind the end of a large chunk there is another one.
        let most = if self.is_among_large {
            left
        } else {
            left.max(AHEAD)
        };
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
            let part = self.take_front(left).expect("a marker was read whole");
            left -= part.len();
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

    /// Takes the data of the current chunk that was read, as far as it lies together.
    pub(super) fn take_data(&mut self) -> Option<(Extent, Next)> {
        let extent = self.take_front(self.left_of_chunk())?;
        let next = self.advance_chunk(extent.len());
        Some((extent, next))
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

    /// Moves data of the current chunk into a pipe that holds it.
    ///
    /// # Errors
    /// Those of `splice`; none for pipes of ours.
    pub(super) fn hold(&mut self, pipes: &mut PipePool) -> Result<Holding> {
        let left = self.left_of_chunk();
        let Some(intake) = self.intake.as_mut().filter(|intake| intake.len() > 0) else {
            return Ok(Holding::Drained);
        };
        let is_worth = self.may_splice && left >= WORTH_HOLDING;
        let begun = self.held.take();
        let Some(mut held) = begun.or_else(|| is_worth.then(|| pipes.hold(left)).flatten()) else {
            return Ok(Holding::Refused);
        };
        let bytes = held
            .absorb(intake, left)
            .with_context(|| format!("reading {}", self.label))?;
        self.taken += bytes as u64;
        if bytes == 0 {
            // All of its slots are taken.
            self.may_splice &= !held.is_wasteful();
        } else if bytes < left {
            self.chunk.as_mut().expect("data belongs to a chunk").left -= bytes;
            self.held = Some(held);
            return Ok(Holding::Begun);
        }
        Ok(Holding::Piece(held, self.advance_chunk(bytes)))
    }
}
