//! A shard's stream, cut into markers and their data.
//!
//! Data should not come to memory at all, so that only as much is read as the next marker takes,
//! and the data behind it is spliced: to a file, or to a pipe of ours that holds it. Small chunks
//! are read together with their markers. For what is held, the shard's pipe is emptied into one of
//! ours first ([`ShardReader::empty`]).
//!
//! Where nothing can be held, what a pipe has is read in one call, markers and data together,
//! straight to where the data stays. The data of a chunk is then a part of that memory, found in
//! place. One large read for a full pipe costs half the CPU of reading marker, data, marker, data,
//! because each read but the last meets the pipe's writer, woken by the one before, at the pipe's
//! mutex.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::rc::Rc;

use anyhow::{Context, Result, anyhow, bail};

use super::order::{Next, Place};
use crate::format::marker::{self, BadMarker};
use crate::format::{Body, ImageName, Marker};
use crate::os::pipe::{self, Moved, ReadEnd, WriteEnd};
use crate::os::process::CapturingProcess;
use crate::report::meter::Meter;
use crate::store::held_pipe::{Filled, HeldPipe, PipePool, WORTH_HOLDING};
use crate::store::{Arena, Extent};

/// Bytes read ahead among small chunks. What is less is read and not spliced.
const AHEAD: usize = WORTH_HOLDING;

/// What one look at a pipe brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    Something,
    /// Nothing now, or nothing ever again.
    Nothing,
}

/// A pipe of our own between a shard's pipe and a file.
///
/// A pipe is locked while it is read, and copying into a file takes long: the shard's writer could
/// not write meanwhile, and then we would wait for it. Moving references to a pipe of our own first
/// takes 0.12 CPU s/GB off the 0.2 spent so.
pub(super) struct SplicePipe {
    read: ReadEnd,
    write: WriteEnd,
}

impl SplicePipe {
    /// # Errors
    /// When no more descriptors can be had.
    pub(super) fn new() -> Result<Self> {
        let (read, write) = pipe::new()?;
        pipe::grow(&write, pipe::LARGEST).context("preparing a pipe")?;
        Ok(Self { read, write })
    }

    /// Moves up to `most` bytes to the end of a file.
    fn splice(&self, from: &ReadEnd, to: &File, most: usize) -> io::Result<Moved> {
        let moved = pipe::splice(from, &self.write, most)?;
        if let Moved::Bytes(mut left) = moved {
            while left > 0 {
                match pipe::splice(&self.read, to, left)? {
                    Moved::Bytes(bytes) => left -= bytes,
                    Moved::WouldBlock | Moved::End => return Err(io::ErrorKind::WriteZero.into()),
                }
            }
        }
        Ok(moved)
    }
}

/// What came of holding data.
#[derive(Debug)]
pub(super) enum Holding {
    /// All of a chunk's data, or as much as fits into a pipe.
    Piece(HeldPipe, Next),
    /// Some of the data, which is not whole yet.
    Some,
    /// Nothing came.
    Nothing,
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
    /// What the pipe was emptied of, and was not taken yet. Made for the first data that is held.
    emptied: Option<HeldPipe>,
    /// The pipe had nothing when it was last to be emptied.
    is_dry: bool,
    label: Rc<str>,
    /// What was read and not taken yet.
    ahead: VecDeque<Extent>,
    chunk: Option<OpenChunk>,
    /// Data of the current chunk, on its way into this pipe.
    held: Option<HeldPipe>,
    /// Its pages are as good as their data: they will not change, and hold little else.
    may_hold: bool,
    /// Bytes of the last marker with data, if that was large: the next one takes as many, as a
    /// rule.
    last_large: Option<usize>,
    /// The pipe's writers are gone: what is in it is the last of the stream.
    hung_up: bool,
    ended: bool,
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
        let pipe = pipe
            .nonblocking()
            .with_context(|| format!("preparing {label}"))?;
        let slots =
            pipe::grow(&pipe, pipe::LARGEST).with_context(|| format!("preparing {label}"))?;
        Ok(Self {
            pipe,
            capacity: slots * pipe::slot(),
            emptied: None,
            is_dry: false,
            label: label.into(),
            ahead: VecDeque::new(),
            chunk: None,
            held: None,
            may_hold: true,
            last_large: None,
            hung_up: false,
            ended: false,
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

    /// Notes that the pipe's writers are gone.
    pub(super) fn hang_up(&mut self) {
        self.hung_up = true;
    }

    /// Whether everything was taken, up to the end of the stream.
    pub(super) fn has_ended(&self) -> bool {
        self.ended && self.ahead.is_empty()
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

    /// Bytes of the current chunk's data that are still to be taken.
    pub(super) fn left_of_chunk(&self) -> usize {
        self.chunk.as_ref().map_or(0, |chunk| chunk.left)
    }

    /// Takes the marker that comes next, if all of it was read. If data follows it, it becomes the
    /// current chunk.
    ///
    /// # Errors
    /// When the stream is damaged.
    pub(super) fn next_marker(&mut self) -> Result<Option<Marker>> {
        let decoded = self.decode().map_err(|error| self.error(error))?;
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
            self.may_hold &= !marker
                .origin
                .as_ref()
                .is_some_and(CapturingProcess::may_be_running);
        }
        self.last_seq = Some(marker.seq);
        if let Body::Data(left @ 1..) = marker.body {
            let left = left as usize;
            self.last_large = (left >= AHEAD).then_some(size);
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

    fn decode(&self) -> Result<Option<(Marker, usize)>, BadMarker> {
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
        let left = self.chunk.as_ref()?.left;
        let extent = self.take_front(left)?;
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

    /// Whether nothing of what was read is left.
    pub(super) fn is_read_out(&self) -> bool {
        self.ahead.is_empty()
    }

    /// How much to read for the next marker when data should rather be spliced: behind a large
    /// chunk, exactly what the marker takes, as far as that is known.
    pub(super) fn ahead_for_marker(&self) -> usize {
        let Some(expected) = self.last_large else {
            return AHEAD;
        };
        let bytes = self.ahead.iter().flat_map(Extent::bytes).copied();
        let begun: Vec<_> = bytes.take(marker::LENGTH).collect();
        match begun.first_chunk() {
            None => expected.max(marker::LENGTH) - begun.len(),
            Some(field) => {
                let read: usize = self.ahead.iter().map(Extent::len).sum();
                let frame = u32::from_le_bytes(*field) as usize;
                (marker::LENGTH + frame).saturating_sub(read).max(1)
            }
        }
    }

    /// How much to read for data that is not to be spliced.
    pub(super) fn ahead_for_data(&self) -> usize {
        let left = self.left_of_chunk();
        // The end of a large chunk that took more slots than its pipe had.
        if self.last_large.is_some() {
            return left;
        }
        left.max(AHEAD)
    }

    /// Whether data may be held in pipes.
    pub(super) fn may_hold(&self) -> bool {
        self.may_hold
    }

    /// Whether a pipe holds a part of the current chunk's data, to which the rest belongs.
    pub(super) fn is_holding(&self) -> bool {
        self.held.is_some()
    }

    /// Empties the shard's pipe into one of ours, from which everything is taken then, unless that
    /// still holds something. False where no such pipe can be had, and before the first marker,
    /// which tells whether the pages are those of an application that may run again: they must not
    /// look as if they had been copied.
    ///
    /// The first call that takes something wakes the shard's writer, which then writes with the
    /// pipe's mutex held, block by block, and each further call would spin for one of its blocks.
    /// With calls for each marker and each chunk that was over 70% of the samples of a receiving
    /// streamer, and is 15% with this (`restore/4-shards-64KiB-blocks-kept`, 2026-11-26).
    ///
    /// # Errors
    /// Those of `splice`; none for open pipes.
    pub(super) fn empty(&mut self, holder: &mut PipePool) -> Result<bool> {
        if self.last_seq.is_none() {
            return Ok(false);
        }
        let emptied = match &mut self.emptied {
            Some(emptied) => emptied,
            none => match holder.hold(self.capacity) {
                Some(held) => none.insert(held),
                None => return Ok(false),
            },
        };
        if emptied.len() > 0 {
            return Ok(true);
        }
        let moved = emptied
            .take(&self.pipe, self.capacity)
            .with_context(|| format!("reading {}", self.label))?;
        self.hung_up |= moved == Moved::End;
        self.is_dry = emptied.len() == 0;
        Ok(true)
    }

    /// Notes that what the pipe was emptied of is not enough to go on.
    ///
    /// # Errors
    /// When the stream was cut off.
    pub(super) fn expect_more(&mut self) -> Result<()> {
        if self.is_dry {
            self.check_for_end()?;
        }
        Ok(())
    }

    /// Whether something is left of what the pipe was emptied of.
    pub(super) fn has_emptied(&self) -> bool {
        self.emptied.as_ref().is_some_and(|held| held.len() > 0)
    }

    /// What is left of what the pipe was emptied of.
    fn emptied(&mut self) -> Option<&mut HeldPipe> {
        self.emptied.as_mut().filter(|held| held.len() > 0)
    }

    /// Moves data of the current chunk into a pipe that holds it.
    ///
    /// # Errors
    /// When the stream was cut off.
    pub(super) fn hold(&mut self, holder: &mut PipePool) -> Result<Holding> {
        let left = self.left_of_chunk();
        let mut held = match self.held.take() {
            Some(held) => held,
            None if !self.may_hold || left < WORTH_HOLDING => return Ok(Holding::Refused),
            None => match holder.hold(left) {
                Some(held) => held,
                None => return Ok(Holding::Refused),
            },
        };
        let filled = match self.emptied() {
            Some(emptied) => held.absorb(emptied, left),
            None => held.fill(&self.pipe, left),
        };
        let filled = filled.with_context(|| format!("reading {}", self.label))?;
        let chunk = self.chunk.as_mut().expect("data belongs to a chunk");
        match filled {
            Filled::Moved(Moved::Bytes(bytes)) => {
                self.meter.add(bytes);
                self.taken += bytes as u64;
                chunk.left -= bytes;
                if chunk.left == 0 {
                    self.chunk = None;
                    return Ok(Holding::Piece(held, Next::Marker));
                }
                self.held = Some(held);
                return Ok(Holding::Some);
            }
            Filled::Full => {
                self.may_hold &= !held.is_wasteful();
                chunk.place.part += 1;
                return Ok(Holding::Piece(held, Next::Part));
            }
            Filled::Moved(Moved::WouldBlock) => {}
            Filled::Moved(Moved::End) => self.hung_up = true,
        }
        self.held = Some(held);
        self.check_for_end()?;
        Ok(Holding::Nothing)
    }

    /// Reads what the pipe holds, up to `most` bytes, in one call. Called when what was read before
    /// is not enough to go on.
    ///
    /// # Errors
    /// When there is no memory, or the stream was cut off.
    pub(super) fn read(&mut self, arena: &mut Arena, most: usize) -> Result<Found> {
        let most = most.min(self.capacity);
        let mut block = arena
            .reserve(most)
            .with_context(|| format!("keeping {most} bytes in memory beside {}", arena.live()))?;
        let moved = match self.emptied() {
            Some(emptied) => emptied.read(block.unfilled()).map(Moved::Bytes),
            None => pipe::read(&self.pipe, block.unfilled()),
        };
        let moved = moved.with_context(|| format!("reading {}", self.label))?;
        if let Moved::Bytes(bytes) = moved {
            block.filled(bytes);
            self.ahead.push_back(arena.seal(block));
            self.meter.add(bytes);
            return Ok(Found::Something);
        }
        arena.seal(block);
        self.hung_up |= moved == Moved::End;
        self.check_for_end()?;
        Ok(Found::Nothing)
    }

    /// Moves data of the current chunk to the end of a file, which `name` names in errors; `None`
    /// when the pipe is empty.
    ///
    /// # Errors
    /// When the file cannot take it, and when the stream was cut off.
    pub(super) fn splice(
        &mut self,
        pipe: &SplicePipe,
        to: &File,
        name: &ImageName,
    ) -> Result<Option<Next>> {
        let left = self.left_of_chunk();
        let moved = match self.emptied() {
            Some(emptied) => emptied.send(to, left),
            None => pipe.splice(&self.pipe, to, left),
        };
        let moved = moved.with_context(|| format!("writing {name}"))?;
        match moved {
            Moved::Bytes(bytes) => {
                self.meter.add(bytes);
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
