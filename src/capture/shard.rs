//! The writing side of a shard: markers that wait to be written, data spliced behind them, and how full the pipe is.
//!
//! We are the only writer of a shard, so that we know in what portions its pipe was filled, and how many slots each took at most.
//! `FIONREAD` tells how many bytes the reader has left; the newest portions that make up so many bytes are what is
//! still in there. Of a portion that the reader is inside of, each page's worth of bytes taken out has freed a slot, but for
//! the one that it may be in the middle of. So the room is never overestimated.
//!
//! Markers are gathered and written when data follows, or when the loop is about to sleep: the end of one small file and
//! the start of the next cost one `write` and one slot.
//!
//! Small files gather too, in a pipe of our own: nobody is woken by what is put there, and one splice moves a whole batch of files
//! to the shard. Waking the shard's reader twice for each file took 40% of the CPU.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use anyhow::{Context, Result};
use nix::errno::Errno;

use super::balancer::Room;
use crate::format::Marker;
use crate::os::pipe::{self, Moved, ReadEnd, SLOT, WriteEnd};
use crate::report::meter::Meter;
use crate::report::progress::ShardStats;

/// Something that was put into the pipe, and the most slots that it took there.
#[derive(Debug)]
struct Portion {
    bytes: usize,
    slots: usize,
}

impl Portion {
    /// The most slots that its last `left` bytes take.
    fn slots_left(&self, left: usize) -> usize {
        let taken_out = self.bytes - left;
        let freed = taken_out.div_ceil(SLOT).saturating_sub(1);
        self.slots.saturating_sub(freed).min(left)
    }
}

/// The capacity of the pipe for small files, in bytes: enough for some 30 of them, and for any other pipe to have room for.
const BATCH: usize = 256 << 10;

/// A chunk that is worth waking the shard's reader for, in bytes.
const WORTH_A_WAKE_UP: usize = 32 << 10;

/// A pipe of our own in which small files gather.
#[derive(Debug)]
struct Batch {
    entry: WriteEnd,
    exit: ReadEnd,
    capacity: usize,
    bytes: usize,
    /// The most slots that the bytes take: what the parts took at most, and no more than this pipe has.
    slots: usize,
}

impl Batch {
    fn new(largest: usize) -> Result<Self> {
        let (exit, entry) = pipe::new()?;
        let entry = entry.nonblocking()?;
        let capacity = pipe::grow(&entry, largest)?;
        Ok(Self {
            entry,
            exit,
            capacity,
            bytes: 0,
            slots: 0,
        })
    }

    /// Adds markers, as far as there is room, and tells how many bytes of them.
    fn write(&mut self, markers: &[u8]) -> Result<usize> {
        match pipe::write(&self.entry, markers).context("gathering small files")? {
            Moved::Bytes(bytes) => Ok(self.added(bytes, bytes.div_ceil(SLOT))),
            Moved::WouldBlock | Moved::End => Ok(0),
        }
    }

    /// Adds data, as far as there is room, and tells how many bytes of it.
    fn splice(&mut self, source: &ReadEnd, len: usize, slots: usize) -> Result<usize> {
        match pipe::splice(source, &self.entry, len).context("gathering small files")? {
            Moved::Bytes(bytes) => Ok(self.added(bytes, slots)),
            Moved::WouldBlock | Moved::End => Ok(0),
        }
    }

    fn added(&mut self, bytes: usize, slots: usize) -> usize {
        self.bytes += bytes;
        self.slots = (self.slots + slots).min(self.capacity);
        bytes
    }
}

/// How a splice into the shard went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spliced {
    /// All of it moved.
    All,
    /// The shard is full; so many bytes are left.
    Full { left: usize },
    /// The source ended early; so many bytes are missing.
    SourceEnded { missing: usize },
}

/// The writing side of a shard.
pub struct Shard {
    pipe: WriteEnd,
    label: String,
    capacity: usize,
    portions: VecDeque<Portion>,
    free: usize,
    markers: Vec<u8>,
    /// Small files that were not moved yet, with their markers: before the queued ones. None if small files do not gather.
    batch: Option<Batch>,
    meter: Meter,
    promised: bool,
}

impl Shard {
    /// Gives the pipe the largest capacity allowed. `label` names the shard in errors.
    ///
    /// # Errors
    /// When the pipe cannot be made non-blocking or measured.
    pub fn new(pipe: WriteEnd, label: String, meter: Meter) -> Result<Self> {
        let prepare = || {
            let pipe = pipe.nonblocking()?;
            let capacity = pipe::grow(&pipe, pipe::LARGEST)?;
            let others = pipe::available(&pipe)?;
            Ok::<_, io::Error>((pipe, capacity, others))
        };
        let (pipe, capacity, others) = prepare().with_context(|| format!("preparing {label}"))?;
        // Somebody's bytes that are in there already may take all slots.
        let portions = VecDeque::from([Portion {
            bytes: others,
            slots: capacity.min(others),
        }]);
        Ok(Self {
            pipe,
            label,
            capacity,
            portions,
            free: capacity - capacity.min(others),
            markers: Vec::new(),
            batch: None,
            meter,
            promised: false,
        })
    }

    /// From now on small files gather, which takes two descriptors. Where these, or the memory for a pipe, cannot be had, small
    /// files go straight to the shard as before.
    pub fn gather_small_files(&mut self) {
        self.batch = Batch::new(BATCH.min(self.capacity * SLOT)).ok();
    }

    pub fn label(&self) -> &str {
        &self.label
    }

    /// Queues a marker. It is written with the next data, or by [`Shard::flush`].
    pub fn mark(&mut self, marker: Marker) {
        marker.encode(&mut self.markers);
    }

    /// Keeps other chunks away until a promised one has moved.
    pub fn set_promised(&mut self, promised: bool) {
        self.promised = promised;
    }

    /// Moves the gathered files and writes the queued markers as far as there is room, and tells whether nothing is left.
    ///
    /// # Errors
    /// When the shard's reader is gone.
    pub fn flush(&mut self) -> Result<bool> {
        if !self.move_batch()? {
            return Ok(false);
        }
        while !self.markers.is_empty() {
            match pipe::write(&self.pipe, &self.markers).map_err(|error| self.broken(error))? {
                Moved::Bytes(bytes) => {
                    self.markers.drain(..bytes);
                    self.moved(bytes, bytes.div_ceil(SLOT));
                }
                Moved::WouldBlock | Moved::End => {
                    self.free = 0;
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Moves `len` bytes from a pipe behind the queued markers. `slots` is the most that they take. Small chunks only gather, and
    /// are moved by [`Shard::flush`].
    ///
    /// # Errors
    /// When the shard's reader is gone.
    pub fn splice(&mut self, source: &ReadEnd, len: usize, slots: usize) -> Result<Spliced> {
        let mut left = len;
        if len < WORTH_A_WAKE_UP {
            left -= self.gather(source, len, slots)?;
            if left == 0 {
                return Ok(Spliced::All);
            }
        }
        if !self.flush()? {
            return Ok(Spliced::Full { left });
        }
        let len = left;
        let result = loop {
            if left == 0 {
                break Spliced::All;
            }
            match pipe::splice(source, &self.pipe, left).map_err(|error| self.broken(error))? {
                Moved::Bytes(bytes) => left -= bytes,
                Moved::WouldBlock => break Spliced::Full { left },
                Moved::End => break Spliced::SourceEnded { missing: left },
            }
        };
        if result == Spliced::All {
            self.moved(len, slots);
        } else {
            // The kernel says that the pipe is full: this may have taken all of its slots.
            self.moved(len - left, self.capacity);
        }
        Ok(result)
    }

    /// Adds the queued markers and data behind them to the batch, as far as it has room, and tells how much of the data.
    fn gather(&mut self, source: &ReadEnd, len: usize, slots: usize) -> Result<usize> {
        let Some(batch) = &mut self.batch else {
            return Ok(0);
        };
        let gathered = batch.write(&self.markers)?;
        self.markers.drain(..gathered);
        if self.markers.is_empty() {
            let gathered = batch.splice(source, len, slots)?;
            if gathered > 0 {
                return Ok(gathered);
            }
        }
        // It is full.
        self.move_batch()?;
        Ok(0)
    }

    /// Moves the gathered files as far as there is room, and tells whether none is left.
    fn move_batch(&mut self) -> Result<bool> {
        while let Some(batch) = self.batch.as_mut().filter(|batch| batch.bytes > 0) {
            let moved = pipe::splice(&batch.exit, &self.pipe, batch.bytes);
            let Moved::Bytes(bytes) = moved.map_err(|error| self.broken(error))? else {
                self.free = 0;
                return Ok(false);
            };
            let batch = self.batch.as_mut().expect("it was there above");
            let slots = batch.slots;
            batch.bytes -= bytes;
            if batch.bytes == 0 {
                batch.slots = 0;
            }
            self.moved(bytes, slots);
        }
        Ok(true)
    }

    /// What the gathered files take at most, in slots.
    fn batch_slots(&self) -> usize {
        self.batch.as_ref().map_or(0, |batch| batch.slots)
    }

    /// Whether the reader has taken everything.
    ///
    /// # Errors
    /// Those of inspecting a pipe.
    pub fn is_drained(&self) -> io::Result<bool> {
        let nothing_queued = self.markers.is_empty() && self.batch_slots() == 0;
        Ok(nothing_queued && pipe::available(&self.pipe)? == 0)
    }

    /// What passed through, counted from the transfer's start.
    pub fn stats(&self, start: Option<Instant>) -> ShardStats {
        self.meter.stats(start)
    }

    fn moved(&mut self, bytes: usize, slots: usize) {
        self.meter.add(bytes);
        self.free = self.free.saturating_sub(slots);
        self.portions.push_back(Portion { bytes, slots });
    }

    fn broken(&self, error: io::Error) -> anyhow::Error {
        if error.raw_os_error() == Some(Errno::EPIPE as i32) {
            return self.reader_gone();
        }
        anyhow::Error::new(error).context(format!("writing to {}", self.label))
    }

    /// The error for a reader that went away before the image was complete.
    pub fn reader_gone(&self) -> anyhow::Error {
        anyhow::anyhow!(
            "writing to {}: its reader is gone, and the image with it",
            self.label
        )
    }
}

impl Room for Shard {
    fn capacity(&self) -> usize {
        self.capacity
    }

    fn room(&self) -> usize {
        let queued = self.batch_slots() + self.markers.len().div_ceil(SLOT);
        self.free.saturating_sub(queued)
    }

    fn inspect(&mut self) -> io::Result<()> {
        let mut left = pipe::available(&self.pipe)?;
        let mut taken = 0;
        let mut kept = 0;
        for portion in self.portions.iter().rev() {
            if left == 0 {
                break;
            }
            let in_pipe = portion.bytes.min(left);
            taken += portion.slots_left(in_pipe);
            left -= in_pipe;
            kept += 1;
        }
        self.portions.drain(..self.portions.len() - kept);
        self.free = self.capacity.saturating_sub(taken);
        Ok(())
    }

    fn is_open(&self) -> bool {
        !self.promised
    }
}

impl AsFd for Shard {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}
