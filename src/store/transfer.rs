//! One file on its way out: into its reader's pipe, freed while it is sent.
//!
//! The pipe is given references to pages: to those of memory (`vmsplice`), or to those that a pipe
//! of ours holds (`splice`). The pipe of a large file is given the largest capacity allowed; most
//! files fit into any pipe.

use std::io;
use std::rc::Rc;

use nix::errno::Errno;

use super::{Contents, Piece};
use crate::os::memory::Sealed;
use crate::os::pipe::{self, DEFAULT_SLOTS, LARGEST, Moved, WriteEnd, slot};

/// The most pieces of memory that one call takes (`UIO_MAXIOV` of the kernel).
const MOST_PIECES: usize = 1024;

/// What is left to send of a file.
#[derive(Debug)]
pub(crate) enum Cursor {
    /// Freed while it is sent.
    Once(Contents),
    /// Kept for the next time; `sent` bytes of it are sent.
    Kept { contents: Rc<Contents>, sent: usize },
}

impl Cursor {
    fn left(&self) -> usize {
        match self {
            Cursor::Once(contents) => contents.len(),
            Cursor::Kept { contents, sent } => contents.len() - sent,
        }
    }

    fn is_empty(&self) -> bool {
        match self {
            Cursor::Once(contents) => contents.is_empty(),
            Cursor::Kept { .. } => self.left() == 0,
        }
    }

    /// Sends what lies at the front, memory or a pipe: as much as fits into a pipe of this number
    /// of slots.
    ///
    /// # Errors
    /// Those of `splice` and `vmsplice`.
    fn send(&mut self, to: &WriteEnd, slots: usize) -> io::Result<Sent> {
        if let Cursor::Once(contents) = self
            && let Some(held) = contents.front_pipe(slots)?
        {
            let offered = held.len();
            let moved = held.send(to, usize::MAX)?;
            contents.drop_emptied_pipe();
            let bytes = bytes_of(moved);
            let slots = bytes.div_ceil(slot());
            return Ok(Sent {
                offered,
                bytes,
                slots,
            });
        }
        let pieces = self.memory(slots);
        let offered = pieces.iter().map(|piece| piece.bytes().len()).sum();
        let bytes = bytes_of(pipe::vmsplice(to, &pieces)?);
        let slots = slots_for(&pieces, bytes);
        match self {
            Cursor::Once(contents) => contents.drop_front(bytes),
            Cursor::Kept { sent, .. } => *sent += bytes,
        }
        Ok(Sent {
            offered,
            bytes,
            slots,
        })
    }

    /// The memory at the front: as much as fits into a pipe of this number of slots.
    fn memory(&self, slots: usize) -> Vec<Sealed<'_>> {
        let (contents, mut skip) = match self {
            Cursor::Once(contents) => (contents, 0),
            Cursor::Kept { contents, sent } => (&**contents, *sent),
        };
        let mut room = slots * slot();
        let mut pieces = Vec::new();
        for extent in contents.memory() {
            if extent.len() <= skip {
                skip -= extent.len();
                continue;
            }
            if room == 0 || pieces.len() == slots.min(MOST_PIECES) {
                break;
            }
            let piece = extent.sealed(std::mem::take(&mut skip));
            room = room.saturating_sub(piece.bytes().len());
            pieces.push(piece);
        }
        pieces
    }
}

/// What came of one call.
struct Sent {
    /// Bytes that the pipe could have taken.
    offered: usize,
    /// Bytes that it took: none if it was full.
    bytes: usize,
    /// The slots that these take.
    slots: usize,
}

fn bytes_of(moved: Moved) -> usize {
    match moved {
        Moved::Bytes(bytes) => bytes,
        Moved::WouldBlock | Moved::End => 0,
    }
}

/// How far a transfer got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// All is sent.
    Done,
    /// All that is here is sent, and more is to come.
    Waiting,
    /// The pipe is full. This number of its slots was filled, maybe none.
    Partial { slots: usize },
    /// The reader closed the pipe.
    ReaderGone,
}

/// A file on its way to its reader.
#[derive(Debug)]
pub(crate) struct Transfer {
    pipe: WriteEnd,
    slots: usize,
    cursor: Cursor,
    /// Bytes that are here and not sent.
    left: usize,
    /// More is to come.
    is_open: bool,
    /// The reader closed the pipe.
    hung_up: bool,
    grown: bool,
}

impl Transfer {
    /// Sends into a pipe with this number of slots.
    pub(crate) fn new(pipe: WriteEnd, slots: usize, cursor: Cursor) -> Self {
        Self {
            pipe,
            slots,
            left: cursor.left(),
            cursor,
            is_open: false,
            hung_up: false,
            grown: false,
        }
    }

    pub(crate) fn pipe(&self) -> &WriteEnd {
        &self.pipe
    }

    /// The pipe's capacity in slots.
    pub(crate) fn slots(&self) -> usize {
        self.slots
    }

    /// The same for a file of which nothing may be here yet.
    pub(crate) fn open(pipe: WriteEnd, slots: usize, begin: Contents) -> Self {
        Self {
            is_open: true,
            ..Self::new(pipe, slots, Cursor::Once(begin))
        }
    }

    /// Nothing is to come any more.
    pub(crate) fn close(&mut self) {
        self.is_open = false;
    }

    /// Notes that the reader closed the pipe, which [`Transfer::send`] finds out only if there is
    /// something to send.
    pub(crate) fn hang_up(&mut self) {
        self.hung_up = true;
    }

    /// Whether what is sent is kept for the next time.
    pub(crate) fn is_kept(&self) -> bool {
        matches!(self.cursor, Cursor::Kept { .. })
    }

    /// Whether more is to come.
    pub(crate) fn is_open(&self) -> bool {
        self.is_open
    }

    /// Bytes that are here and not sent.
    pub(crate) fn left(&self) -> usize {
        self.left
    }

    /// Adds to what is sent once.
    ///
    /// # Errors
    /// Those of `splice`; none for pipes of ours.
    pub(crate) fn add(&mut self, data: Piece) -> io::Result<()> {
        match &mut self.cursor {
            Cursor::Once(contents) => {
                self.left += data.len();
                contents.push(data)
            }
            Cursor::Kept { .. } => unreachable!("what is kept is complete"),
        }
    }

    /// Adds all of this to what is sent once.
    ///
    /// # Errors
    /// Those of `splice`; none for pipes of ours.
    pub(crate) fn add_all(&mut self, data: Contents) -> io::Result<()> {
        data.into_pieces().try_for_each(|piece| self.add(piece))
    }

    /// Sends as much as the pipe takes.
    ///
    /// A pipe that took only a part of what it was offered is full. It is not given more to make
    /// sure: its reader is awake by then and copies with the pipe's mutex held, for which we would
    /// spin. For the same reason as much is offered at a time as an empty pipe takes: where chunks
    /// of 512 KiB were given one by one, the reader of the first had us spin for the second, and so
    /// on (serving took 0.09 to 0.31 CPU s/GB, and takes 0.03 with this:
    /// `restore/4-shards-64KiB-blocks-kept`, 2026-11-26).
    ///
    /// # Errors
    /// Those of `splice` and `vmsplice` but for a broken pipe.
    pub(crate) fn send(&mut self) -> io::Result<Progress> {
        if !self.grown && (self.is_open || self.left > DEFAULT_SLOTS * slot()) {
            self.grown = true;
            self.slots = pipe::grow(&self.pipe, LARGEST)?;
        }
        let mut filled = 0;
        if self.hung_up {
            return Ok(self.leave());
        }
        while !self.cursor.is_empty() {
            match self.cursor.send(&self.pipe, self.slots) {
                Ok(sent) => {
                    filled += sent.slots;
                    self.left -= sent.bytes;
                    let is_all = self.cursor.is_empty();
                    if sent.bytes < sent.offered || !is_all && pipe::is_full(&self.pipe)? {
                        return Ok(Progress::Partial { slots: filled });
                    }
                }
                Err(error) if error.raw_os_error() == Some(Errno::EPIPE as i32) => {
                    return Ok(self.leave());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(if self.is_open {
            Progress::Waiting
        } else {
            Progress::Done
        })
    }

    /// Frees what the reader left.
    fn leave(&mut self) -> Progress {
        self.cursor = Cursor::Once(Contents::default());
        self.left = 0;
        Progress::ReaderGone
    }
}

/// The slots that the first `bytes` of these pieces take: each page that they touch takes one.
fn slots_for(pieces: &[Sealed], mut bytes: usize) -> usize {
    let mut slots = 0;
    for piece in pieces.iter().map(Sealed::bytes) {
        let len = piece.len().min(bytes);
        if len == 0 {
            break;
        }
        slots += (piece.as_ptr().addr() % slot() + len).div_ceil(slot());
        bytes -= len;
    }
    slots
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Arena;
    use crate::store::held_pipe::PipePool;

    fn contents(sizes: &[usize]) -> (Contents, Vec<u8>) {
        let mut arena = Arena::new();
        let mut contents = Contents::default();
        let mut expected = Vec::new();
        for (&size, byte) in sizes.iter().zip(1..) {
            let mut block = arena.reserve(size).unwrap();
            assert_eq!(block.unfilled().len(), size);
            block.unfilled().fill(byte);
            block.filled(size);
            contents.push(Piece::Memory(arena.seal(block))).unwrap();
            expected.extend(std::iter::repeat_n(byte, size));
        }
        (contents, expected)
    }

    /// The same bytes in pipes, each in as many slots as a pipe of the smallest size has, and more.
    fn in_pipes(sizes: &[usize]) -> (Contents, Vec<u8>) {
        let mut holder = PipePool::new().expect("pages can be held here");
        let mut contents = Contents::default();
        let mut expected = Vec::new();
        for (&size, byte) in sizes.iter().zip(1..) {
            let bytes = vec![byte; size];
            let (read, write) = pipe::new().unwrap();
            pipe::grow(&write, size).unwrap();
            assert_eq!(pipe::write(&write, &bytes).unwrap(), Moved::Bytes(size));
            let mut held = holder.hold(size).unwrap();
            while held.len() < size {
                let moved = held.take(&read, size).unwrap();
                assert!(matches!(moved, Moved::Bytes(_)), "{moved:?}");
            }
            contents.push(Piece::held(held)).unwrap();
            expected.extend(bytes);
        }
        (contents, expected)
    }

    /// Sends to a reader that takes a little at a time.
    fn sent(cursor: Cursor) -> Vec<u8> {
        let (read, write) = pipe::new().unwrap();
        let read = read.nonblocking().unwrap();
        let mut transfer = Transfer::new(write, DEFAULT_SLOTS, cursor);
        let mut received = Vec::new();
        let mut buffer = vec![0; 3 * slot() + 7];
        loop {
            let progress = transfer.send().unwrap();
            while let Moved::Bytes(bytes) = pipe::read(&read, &mut buffer).unwrap() {
                received.extend_from_slice(&buffer[..bytes]);
                if progress != Progress::Done {
                    break;
                }
            }
            if progress == Progress::Done {
                return received;
            }
        }
    }

    #[test]
    fn what_is_sent_once_is_freed_and_what_is_kept_stays() {
        let (contents, expected) = contents(&[5, 70_000, 4096, 1, 300_000]);
        let kept = Rc::new(contents);
        for _ in 0..2 {
            let cursor = Cursor::Kept {
                contents: Rc::clone(&kept),
                sent: 0,
            };
            assert!(sent(cursor) == expected);
        }
        let once = Cursor::Once(Rc::into_inner(kept).unwrap());
        assert!(sent(once) == expected);
    }

    #[test]
    fn pipes_and_memory_come_in_their_order() {
        if PipePool::new().is_none() {
            return;
        }
        let (mut all, mut expected) = in_pipes(&[40_000, 600_000, 70_000, 600_000]);
        for (more, bytes) in [contents(&[5, 70_000]), in_pipes(&[600_000, 33_000])] {
            more.into_pieces()
                .for_each(|piece| all.push(piece).unwrap());
            expected.extend(bytes);
        }
        assert!(sent(Cursor::Once(all)) == expected);
    }

    #[test]
    fn an_empty_pipe_is_filled_by_one_call() {
        if PipePool::new().is_none() {
            return;
        }
        let (read, write) = pipe::new().unwrap();
        let (contents, expected) = in_pipes(&[500_000; 4]);
        let mut transfer = Transfer::new(write, DEFAULT_SLOTS, Cursor::Once(contents));
        let mut sent = 0;
        while transfer.left() > 0 {
            let progress = transfer.send().unwrap();
            let available = pipe::available(&read).unwrap();
            let left = expected.len() - sent - available;
            assert_eq!(transfer.left(), left);
            let full = LARGEST.min(pipe::max_size()) - 2 * slot();
            assert!(left == 0 || available > full, "{progress:?}: {available}");
            let mut buffer = vec![0; available];
            assert_eq!(
                pipe::read(&read, &mut buffer).unwrap(),
                Moved::Bytes(available)
            );
            assert!(buffer == expected[sent..sent + available]);
            sent += available;
        }
        assert_eq!(sent, expected.len());
    }

    #[test]
    fn a_reader_that_leaves_ends_the_transfer() {
        let (read, write) = pipe::new().unwrap();
        drop(read);
        let (contents, _) = contents(&[100]);
        let mut transfer = Transfer::new(write, DEFAULT_SLOTS, Cursor::Once(contents));
        assert_eq!(transfer.send().unwrap(), Progress::ReaderGone);
    }

    #[test]
    fn every_page_that_is_touched_takes_a_slot() {
        let memory = vec![0; 4 * slot()];
        let start = memory.as_ptr().align_offset(slot());
        // SAFETY: this memory goes into no pipe.
        #[expect(unsafe_code)]
        let piece = |range| unsafe { Sealed::new(&memory[range]) };
        let pieces = [
            piece(start..start + slot()),
            piece(start + slot() - 1..start + slot() + 1),
        ];
        assert_eq!(slots_for(&pieces, slot() + 2), 3);
        assert_eq!(slots_for(&pieces, slot() + 1), 2);
        assert_eq!(slots_for(&pieces, 1), 1);
        assert_eq!(slots_for(&pieces, 0), 0);
    }
}
