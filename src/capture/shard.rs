//! The writing side of a shard: a queue of markers and copied data, data spliced behind it, and how
//! full the pipe is.
//!
//! We are the only writer of a shard, so we know in what portions its pipe was filled, and how many
//! slots each took at most. `FIONREAD` tells how many bytes the reader has left; the newest writes
//! that make up this number are what is still in the pipe. Bytes already read from a partly
//! consumed write free one slot per full page, except the one the reader may still be in. So the
//! number of free slots is never overestimated.
//!
//! Markers and copied data are queued, and written when spliced data follows, when there is enough
//! of them, or when the loop is about to sleep: hundreds of markers, or dozens of small files, cost
//! one `write` and wake the reader once.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context, Result};
use nix::errno::Errno;

use super::balancer::Slots;
use super::chunk::slots_of;
use crate::format::{self, Marker};
use crate::os::memory::Sealed;
use crate::os::pipe::{self, Moved, ReadEnd, WriteEnd, slot};
use crate::report::meter::Meter;

/// Bytes in the queue beyond which it is written before more is copied to it.
const LONG_QUEUE: usize = 32 << 10;

/// One write to the pipe, and the most slots that it took there.
#[derive(Debug)]
struct WriteRecord {
    bytes: usize,
    slots: usize,
}

impl WriteRecord {
    /// The most slots, of `slot` bytes each, that its last `left` bytes take.
    fn slots_left(&self, left: usize, slot: usize) -> usize {
        let taken_out = self.bytes - left;
        let freed = taken_out.div_ceil(slot).saturating_sub(1);
        self.slots.saturating_sub(freed).min(left)
    }
}

/// Forgets the writes of which a pipe, which has `left` bytes, holds nothing any more. Returns the
/// most slots, of `slot` bytes each, that the bytes take.
fn slots_taken(written: &mut VecDeque<WriteRecord>, mut left: usize, slot: usize) -> usize {
    let mut slots = 0;
    let mut gone = written.len();
    while left > 0 && gone > 0 {
        gone -= 1;
        let in_pipe = written[gone].bytes.min(left);
        slots += written[gone].slots_left(in_pipe, slot);
        left -= in_pipe;
    }
    written.drain(..gone);
    // Bytes that are not ours may have a slot each.
    slots + left
}

/// The writing side of a shard.
pub(super) struct Shard {
    pipe: WriteEnd,
    /// Its name in messages.
    pub(super) label: String,
    slots: usize,
    /// Writes that may still be in the pipe, the oldest first.
    written: VecDeque<WriteRecord>,
    /// Slots that were free after the last inspection, less what was written since.
    free: usize,
    /// Markers and copied data.
    queue: Vec<u8>,
    pub(super) meter: Meter,
}

impl Shard {
    pub(super) fn new(pipe: WriteEnd, label: String, meter: Meter) -> Result<Self> {
        let preparing = || format!("preparing {label}");
        let pipe = pipe.nonblocking().with_context(preparing)?;
        let mut shard = Self {
            slots: pipe::slots(&pipe).with_context(preparing)?,
            pipe,
            written: VecDeque::new(),
            free: 0,
            queue: Vec::new(),
            meter,
            label,
        };
        let inspected = shard.inspect();
        inspected.with_context(|| format!("preparing {}", shard.label))?;
        Ok(shard)
    }

    /// True if it has no room for a chunk of the usual size.
    pub(super) fn is_full(&self) -> bool {
        self.free * 2 < self.slots
    }

    /// Queues a marker. A padded one ends at a page of the shard.
    pub(super) fn mark(&mut self, marker: Marker, is_padded: bool) {
        let start = self.queue.len();
        marker.encode(&mut self.queue);
        if is_padded {
            format::pad(&mut self.queue, start, self.meter.bytes());
        }
    }

    /// Writes the queue as far as there is room. True if that was all.
    ///
    /// # Errors
    /// When the shard's reader is gone.
    pub(super) fn flush(&mut self) -> Result<bool> {
        let mut queue = std::mem::take(&mut self.queue);
        let written = self.write(&queue)?;
        queue.drain(..written);
        self.queue = queue;
        Ok(self.queue.is_empty())
    }

    /// Writes as far as there is room, and returns how many bytes these were.
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        let mut written = 0;
        while written < bytes.len() {
            let moved = pipe::write(&self.pipe, &bytes[written..]);
            let more = moved.map_err(|error| self.broken(error))?.bytes();
            if more == 0 {
                self.free = 0;
                break;
            }
            self.record(more, more.div_ceil(slot()));
            written += more;
        }
        Ok(written)
    }

    /// Moves `len` bytes, which take this number of slots at most, behind all that is queued.
    /// Returns how many bytes moved: all, if the slots were free, and the pipe has that many bytes.
    ///
    /// # Errors
    /// When the shard's reader is gone.
    pub(super) fn splice(&mut self, from: &ReadEnd, len: usize, slots: usize) -> Result<usize> {
        let mut bytes = 0;
        if !self.flush()? {
            return Ok(bytes);
        }
        while bytes < len
            && let Moved::Bytes(more) =
                pipe::splice(from, &self.pipe, len - bytes).map_err(|error| self.broken(error))?
        {
            bytes += more;
        }
        // A rest that does not fit may have taken all slots.
        self.record(bytes, if bytes == len { slots } else { self.slots });
        Ok(bytes)
    }

    /// Puts references to memory behind all that is queued. Returns how many bytes these are: all,
    /// if the slots that they take were free.
    ///
    /// # Errors
    /// When the shard's reader is gone.
    pub(super) fn lend(&mut self, memory: &[Sealed]) -> Result<usize> {
        if !self.flush()? {
            return Ok(0);
        }
        let len: usize = memory.iter().map(|piece| piece.bytes().len()).sum();
        let slots = memory.iter().map(|piece| slots_of(piece.bytes())).sum();
        let lent = pipe::vmsplice(&self.pipe, memory).map_err(|error| self.broken(error))?;
        let bytes = lent.bytes();
        // A rest that does not fit may have taken all slots.
        self.record(bytes, if bytes == len { slots } else { self.slots });
        Ok(bytes)
    }

    /// Queues a copy of these bytes, or writes them if they are many.
    ///
    /// # Errors
    /// When the shard's reader is gone.
    pub(super) fn copy_memory(&mut self, mut bytes: &[u8]) -> Result<()> {
        if self.queue.len() + bytes.len() > LONG_QUEUE && self.flush()? {
            bytes = &bytes[self.write(bytes)?..];
        }
        self.queue.extend_from_slice(bytes);
        Ok(())
    }

    /// True while something is left for the reader to take.
    pub(super) fn is_behind(&self) -> Result<bool> {
        let available = pipe::available(&self.pipe);
        let available =
            available.with_context(|| format!("waiting for the reader of {}", self.label))?;
        Ok(available > 0 || !self.queue.is_empty())
    }

    fn record(&mut self, bytes: usize, slots: usize) {
        self.free = self.free.saturating_sub(slots);
        if bytes > 0 {
            self.meter.add(bytes);
            self.written.push_back(WriteRecord { bytes, slots });
        }
    }

    fn broken(&self, error: io::Error) -> anyhow::Error {
        if error.raw_os_error() == Some(Errno::EPIPE as i32) {
            return self.reader_gone();
        }
        anyhow::Error::new(error).context(format!("writing to {}", self.label))
    }

    /// The error for a reader that went away before the image was complete.
    pub(super) fn reader_gone(&self) -> anyhow::Error {
        anyhow::anyhow!(
            "writing to {}: its reader is gone, and the image with it",
            self.label
        )
    }
}

impl Slots for Shard {
    fn slots(&self) -> usize {
        self.slots
    }

    fn free_slots(&self) -> usize {
        self.free.saturating_sub(self.queue.len().div_ceil(slot()))
    }

    fn given(&self) -> u64 {
        self.meter.bytes() + self.queue.len() as u64
    }

    fn inspect(&mut self) -> io::Result<()> {
        let left = pipe::available(&self.pipe)?;
        let taken = slots_taken(&mut self.written, left, slot());
        self.free = self.slots.saturating_sub(taken);
        Ok(())
    }
}

impl AsFd for Shard {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Body;
    use crate::format::ImageName;

    /// xorshift64.
    struct Random(u64);

    impl Random {
        /// A number from 1 to `most`.
        fn up_to(&mut self, most: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            1 + (self.0 % most as u64) as usize
        }

        fn bytes(&mut self, len: usize) -> Vec<u8> {
            (0..len).map(|_| self.up_to(256) as u8).collect()
        }
    }

    #[derive(Clone, Copy)]
    enum Way {
        Spliced,
        Copied,
    }

    /// A shard, its reader, and what the reader has not seen yet.
    struct Fixture {
        shard: Shard,
        reader: ReadEnd,
        unread: VecDeque<u8>,
    }

    impl Fixture {
        fn new(slots: usize) -> Self {
            let (read, write, got) = pipe::with_slots(slots).unwrap();
            assert_eq!(got, slots);
            let write = write.nonblocking().unwrap();
            let meter = Meter::default();
            Self {
                shard: Shard::new(write, "a shard".into(), meter).unwrap(),
                reader: read.nonblocking().unwrap(),
                unread: VecDeque::new(),
            }
        }

        fn mark(&mut self, body: Body) {
            let marker = Marker::new(7, body);
            let before = self.shard.queue.len();
            self.shard.mark(marker, false);
            self.unread.extend(&self.shard.queue[before..]);
        }

        /// Puts pieces, each in a slot of its own, if the shard has the free slots for them.
        fn put(&mut self, way: Way, pieces: &[Vec<u8>]) {
            let bytes: usize = pieces.iter().map(Vec::len).sum();
            let slots = match way {
                Way::Spliced => pieces.len(),
                Way::Copied => bytes.div_ceil(slot()) + 1,
            };
            if self.shard.free_slots() < slots {
                return;
            }
            let source = pipe_of(pieces);
            match way {
                Way::Spliced => {
                    let moved = self.shard.splice(&source, bytes, slots).unwrap();
                    assert_eq!(moved, bytes, "{slots} slots were not free");
                }
                Way::Copied => {
                    self.shard.copy_memory(&pieces.concat()).unwrap();
                }
            }
            self.unread.extend(pieces.iter().flatten());
        }

        fn read(&mut self, len: usize) {
            let mut buffer = vec![0; len];
            if let Moved::Bytes(bytes) = pipe::read(&self.reader, &mut buffer).unwrap() {
                assert!(
                    self.unread
                        .drain(..bytes)
                        .eq(buffer[..bytes].iter().copied())
                );
            }
        }

        /// Shows that the slots that are said to be free are free, and empties the pipe. Tells how
        /// many they were.
        fn prove(&mut self) -> usize {
            self.shard.inspect().unwrap();
            let free = self.shard.free;
            for page in 1..=free {
                let written = pipe::write(&self.shard.pipe, &vec![0; slot()]).unwrap();
                assert_eq!(written, Moved::Bytes(slot()), "page {page} of {free}");
            }
            let queued = self
                .unread
                .split_off(self.unread.len() - self.shard.queue.len());
            self.unread.resize(self.unread.len() + free * slot(), 0);
            while pipe::available(&self.reader).unwrap() > 0 {
                self.read(64 * slot());
            }
            assert!(self.unread.is_empty());
            self.unread = queued;
            self.shard.inspect().unwrap();
            assert_eq!(self.shard.free, self.shard.slots, "an empty pipe is free");
            free
        }
    }

    /// A pipe that holds each piece in a slot of its own.
    fn pipe_of(pieces: &[Vec<u8>]) -> ReadEnd {
        let (read, write, _) = pipe::with_slots(pieces.len().next_power_of_two()).unwrap();
        for piece in pieces {
            let (page, fill) = pipe::new().unwrap();
            pipe::write(&fill, piece).unwrap();
            let moved = pipe::splice(&page, &write, piece.len()).unwrap();
            assert_eq!(moved, Moved::Bytes(piece.len()));
        }
        read
    }

    #[test]
    fn slots_that_are_said_to_be_free_are_free() {
        let name = ImageName::new(&"n".repeat(255)).unwrap();
        for slots in [1, 2, 16, 64] {
            let mut proven = 0;
            for seed in 1..=60 {
                let mut random = Random(seed);
                let mut fixture = Fixture::new(slots);
                for _ in 0..random.up_to(60) {
                    match random.up_to(9) {
                        1 => fixture.mark(Body::File(name.clone())),
                        2 => fixture.mark(Body::FileEnd),
                        3 => {
                            let pages = random.up_to(slots);
                            let pages: Vec<_> = (0..pages).map(|_| random.bytes(slot())).collect();
                            fixture.put(Way::Spliced, &pages);
                        }
                        4 => {
                            let pieces = random.up_to(slots);
                            let size = random.up_to(slot());
                            let pieces: Vec<_> = (0..pieces)
                                .map(|_| {
                                    let len = random.up_to(size);
                                    random.bytes(len)
                                })
                                .collect();
                            fixture.put(Way::Spliced, &pieces);
                        }
                        5 => {
                            let size = random.up_to(3 * slot());
                            let bytes = random.bytes(size);
                            let pieces: Vec<_> = bytes.chunks(slot()).map(<[u8]>::to_vec).collect();
                            fixture.put(Way::Copied, &pieces);
                        }
                        6 => drop(fixture.shard.flush().unwrap()),
                        7 => fixture.read(random.up_to(3 * slot())),
                        8 => fixture.read(random.up_to(100)),
                        _ => fixture.shard.inspect().unwrap(),
                    }
                }
                proven += fixture.prove();
            }
            assert!(proven > 0, "no shard of {slots} slots had a free one");
        }
    }

    #[test]
    fn bytes_of_another_process_may_have_a_slot_each() {
        let mut fixture = Fixture::new(16);
        pipe::write(&fixture.shard.pipe, &[1; 3]).unwrap();
        fixture.unread.extend([1; 3]);
        fixture.shard.inspect().unwrap();
        assert_eq!(fixture.shard.free_slots(), 13);
        fixture.prove();
    }
    fn records(records: &[(usize, usize)]) -> VecDeque<WriteRecord> {
        let record = |&(bytes, slots)| WriteRecord { bytes, slots };
        records.iter().map(record).collect()
    }

    #[test]
    fn what_a_pipe_holds_takes_slots_of_the_page_size() {
        for page in [4 << 10, 16 << 10, 64 << 10] {
            // Markers, ten whole pages, and four pieces.
            let content = |left| {
                let mut written = records(&[(30, 1), (10 * page, 10), (4000, 4)]);
                let slots = slots_taken(&mut written, left, page);
                (written.len(), slots)
            };
            assert_eq!(content(30 + 10 * page + 4000), (3, 15));
            assert_eq!(content(10 * page + 4000), (2, 14));
            // The reader may still be in the first page.
            assert_eq!(content(9 * page + 4000), (2, 14));
            assert_eq!(content(9 * page + 3999), (2, 13));
            assert_eq!(content(page + 4000), (2, 6));
            assert_eq!(content(4000), (1, 4));
            assert_eq!(content(3), (1, 3));
            assert_eq!(content(0), (0, 0));
        }
    }

    #[test]
    fn a_shard_that_takes_nothing_keeps_no_record_of_each_attempt() {
        let mut fixture = Fixture::new(16);
        // The reader has made the pipe smaller, and reads nothing.
        pipe::resize(&fixture.reader, slot()).unwrap();
        let source = pipe_of(&[vec![1; slot()]]);
        for _ in 0..1000 {
            fixture.shard.inspect().unwrap();
            if fixture.shard.free_slots() < 2 {
                continue;
            }
            fixture.shard.mark(Marker::new(7, Body::FileEnd), false);
            let moved = fixture.shard.splice(&source, slot(), 1).unwrap();
            assert_eq!(moved, 0);
        }
        let records = fixture.shard.written.len();
        assert!(records <= 16, "{records} records");
    }
}
