//! Files on their way out: each into its reader's pipe, freed while it is sent.
//!
//! The pipe is given references to pages: to those of memory (`vmsplice`), or to those that a pipe
//! of ours holds (`splice`). The pipe of a large file is given the largest capacity allowed; most
//! files fit into any pipe.

use std::collections::BTreeMap;
use std::io;
use std::time::Instant;

use anyhow::{Context, Result};
use nix::errno::Errno;

use super::{Extent, FileData};
use crate::format::ImageName;
use crate::os::memory::Sealed;
use crate::os::pipe::{self, DEFAULT_SLOTS, LARGEST, WriteEnd, slot};
use crate::os::poller::{Interest, Poller, Watched};
use crate::pace::Activity;

/// The most pieces of memory that one call takes (`UIO_MAXIOV` of the kernel).
const MOST_PIECES: usize = 1024;

/// The outcome of one call.
struct Sent {
    /// Bytes that the pipe could have taken.
    offered: usize,
    /// Bytes that it took: none if it was full.
    bytes: usize,
    /// The slots that these take.
    slots: usize,
}

/// Sends the front of the data, memory or a pipe: as much as fits into a pipe of this number of
/// slots.
///
/// # Errors
/// Those of `splice` and `vmsplice`.
fn send_front(data: &mut FileData, to: &WriteEnd, slots: usize) -> io::Result<Sent> {
    if let Some(held) = data.front_pipe()? {
        let offered = held.len();
        let bytes = held.send(to)?;
        data.drop_front(0);
        return Ok(Sent {
            offered,
            bytes,
            slots: bytes.div_ceil(slot()),
        });
    }
    let mut room = slots * slot();
    let fits = |extent: &&Extent| {
        let has_room = room > 0;
        room = room.saturating_sub(extent.len());
        has_room
    };
    let extents = data.memory().take(slots.min(MOST_PIECES));
    let pieces: Vec<_> = extents.take_while(fits).map(Extent::sealed).collect();
    let offered = pieces.iter().map(|piece| piece.bytes().len()).sum();
    let bytes = pipe::vmsplice(to, &pieces)?.bytes();
    let slots = slots_for(&pieces, bytes);
    data.drop_front(bytes);
    Ok(Sent {
        offered,
        bytes,
        slots,
    })
}

/// The part of a file that is here to be sent.
#[derive(Debug, Default)]
pub(crate) struct FileBody {
    pub(crate) data: FileData,
    /// Nothing more is to come.
    pub(crate) is_whole: bool,
}

/// The outcome of sending.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SendResult {
    /// All is sent.
    Done,
    /// All that is here is sent, and more is to come.
    Waiting,
    /// The pipe is full.
    Full,
    /// The reader closed the pipe.
    ReaderGone,
}

/// A file on its way to its reader.
#[derive(Debug)]
pub(crate) struct Transfer {
    pub(crate) name: ImageName,
    pipe: WriteEnd,
    slots: usize,
    body: FileBody,
    /// Bytes that are here and not sent.
    left: u64,
    /// The reader closed the pipe.
    hung_up: bool,
    /// The pipe is full: it is left alone until its reader makes room.
    is_full: bool,
    is_watched: bool,
    /// The time at which its reader last took something.
    pub(crate) took: Option<Instant>,
}

impl Transfer {
    /// Sends into a pipe, which is made larger unless it holds the whole file.
    ///
    /// # Errors
    /// Those of `F_GETPIPE_SZ`; none for an open pipe.
    pub(crate) fn new(name: ImageName, pipe: WriteEnd, body: FileBody) -> io::Result<Self> {
        let left = body.data.len();
        let is_small = body.is_whole && left <= (DEFAULT_SLOTS * slot()) as u64;
        let slots = match is_small {
            true => pipe::slots(&pipe)?,
            false => pipe::grow(&pipe, LARGEST)?,
        };
        Ok(Self {
            name,
            pipe,
            slots,
            body,
            left,
            hung_up: false,
            is_full: false,
            is_watched: false,
            took: None,
        })
    }

    /// Adds the data that has come since.
    ///
    /// # Errors
    /// Those of `splice`; none for pipes of ours.
    pub(crate) fn add(&mut self, more: FileBody) -> io::Result<()> {
        self.body.is_whole |= more.is_whole;
        self.left += more.data.len();
        self.body.data.append(more.data)
    }

    /// True if more is to come.
    pub(crate) fn is_open(&self) -> bool {
        !self.body.is_whole
    }

    /// Bytes that are here and not sent.
    pub(crate) fn left(&self) -> u64 {
        self.left
    }

    /// True if the reader waits for something that has not come.
    pub(crate) fn is_starving(&self) -> bool {
        self.is_open() && self.left == 0
    }

    /// Sends as much as the pipe takes, and counts it.
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
    fn send(&mut self, round: &mut Round) -> io::Result<SendResult> {
        if self.hung_up {
            return Ok(SendResult::ReaderGone);
        }
        let mut filled = 0;
        while !self.body.data.is_empty() {
            let sent = match send_front(&mut self.body.data, &self.pipe, self.slots) {
                Err(error) if error.raw_os_error() == Some(Errno::EPIPE as i32) => {
                    return Ok(SendResult::ReaderGone);
                }
                sent => sent?,
            };
            filled += sent.slots;
            self.left -= sent.bytes as u64;
            let has_more = !self.body.data.is_empty();
            if sent.bytes < sent.offered || has_more && pipe::is_full(&self.pipe)? {
                if filled > 0 {
                    self.took = Some(Instant::now());
                    round.filled += filled;
                    round.room += self.slots;
                }
                return Ok(SendResult::Full);
            }
        }
        Ok(match self.body.is_whole {
            true => SendResult::Done,
            false => SendResult::Waiting,
        })
    }
}

/// The outcome of one round of sending.
#[derive(Debug, Default)]
pub(crate) struct Round {
    /// Slots that were filled of pipes that are full now.
    filled: usize,
    /// The slots that these pipes have.
    room: usize,
    /// The files that were sent to their ends.
    pub(crate) sent_whole: Vec<ImageName>,
    /// The files whose readers closed their pipes before that.
    pub(crate) left_by_readers: Vec<ImageName>,
}

impl Round {
    /// The activity by which the loop paces itself; `None` if no pipe was filled.
    pub(crate) fn activity(&self) -> Option<Activity> {
        let (sent, room) = (self.filled as u64, self.room as u64);
        (sent > 0).then_some(Activity::Emptied { sent, room })
    }

    /// Sends a part of a file, and notes the outcome. Returns true if the transfer is over.
    fn send(&mut self, transfer: &mut Transfer) -> Result<bool> {
        let result = transfer
            .send(self)
            .with_context(|| format!("sending {}", transfer.name))?;
        transfer.is_full = result == SendResult::Full;
        match result {
            SendResult::Done => self.sent_whole.push(transfer.name.clone()),
            SendResult::ReaderGone => self.left_by_readers.push(transfer.name.clone()),
            SendResult::Waiting | SendResult::Full => return Ok(false),
        }
        Ok(true)
    }
}

/// The files on their way to readers of one kind. Each moves whenever its own reader makes room.
#[derive(Debug)]
pub(crate) struct Transfers {
    kind: Watched,
    all: BTreeMap<u64, Transfer>,
    next_id: u64,
}

impl Transfers {
    /// Their pipes are watched as `kind`.
    pub(crate) fn new(kind: Watched) -> Self {
        Self {
            kind,
            all: BTreeMap::new(),
            next_id: 0,
        }
    }

    /// Adds a file. Transfers are numbered from 0.
    pub(crate) fn start(&mut self, transfer: Transfer) {
        self.all.insert(self.next_id, transfer);
        self.next_id += 1;
    }

    /// A transfer, while it is not over.
    pub(crate) fn get(&self, id: u64) -> Option<&Transfer> {
        self.all.get(&id)
    }

    pub(crate) fn get_mut(&mut self, id: u64) -> Option<&mut Transfer> {
        self.all.get_mut(&id)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Transfer> {
        self.all.values()
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Transfer> {
        self.all.values_mut()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Notes that a pipe may have room again, and that its reader has closed it, which is found out
    /// otherwise only if there is something to send.
    pub(crate) fn made_room(&mut self, id: u64, hung_up: bool) {
        if let Some(transfer) = self.all.get_mut(&id) {
            transfer.is_full = false;
            transfer.hung_up |= hung_up;
        }
    }

    /// Sends as much as the pipes take, which for most files is all. A pipe that is to take more is
    /// watched.
    ///
    /// # Errors
    /// Those of `splice` and `vmsplice` but for a broken pipe, and of watching one.
    pub(crate) fn send(&mut self, poller: &Poller) -> Result<Round> {
        let mut round = Round::default();
        let mut over = Vec::new();
        for (&id, transfer) in &mut self.all {
            if !transfer.is_full && round.send(transfer)? {
                over.push(id);
            } else if !transfer.is_watched {
                poller
                    .add(&transfer.pipe, self.kind, id, Interest::WritableEdge)
                    .with_context(|| {
                        format!("preparing to wait for the reader of {}", transfer.name)
                    })?;
                transfer.is_watched = true;
            }
        }
        for id in over {
            self.all.remove(&id);
        }
        Ok(round)
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
    use crate::os::pipe::Moved;
    use crate::store::held_pipe::PipePool;
    use crate::store::{Ahead, Arena, Piece};

    fn data(sizes: &[usize]) -> (FileData, Vec<u8>) {
        let mut arena = Arena::new();
        let mut data = FileData::default();
        let mut expected = Vec::new();
        for (&size, byte) in sizes.iter().zip(1..) {
            let bytes = vec![byte; size];
            let part = FileData::copy_of(&bytes, &mut arena).unwrap();
            data.append(part).unwrap();
            expected.extend(bytes);
        }
        (data, expected)
    }

    /// The same bytes in pipes, each in as many slots as a pipe of the smallest size has, and more.
    fn in_pipes(sizes: &[usize]) -> (FileData, Vec<u8>) {
        let mut holder = PipePool::new(Ahead::Piece);
        let mut data = FileData::default();
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
            data.push(Piece::Pipe(held)).unwrap();
            expected.extend(bytes);
        }
        (data, expected)
    }

    fn transfer(pipe: WriteEnd, data: FileData) -> Transfer {
        let name = ImageName::new("pages-1.img").unwrap();
        let is_whole = true;
        Transfer::new(name, pipe, FileBody { data, is_whole }).unwrap()
    }

    /// Sends to a reader that takes a little at a time.
    fn sent(data: FileData) -> Vec<u8> {
        let (read, write) = pipe::new().unwrap();
        let read = read.nonblocking().unwrap();
        let mut transfer = transfer(write, data);
        let mut received = Vec::new();
        let mut buffer = vec![0; 3 * slot() + 7];
        loop {
            let progress = transfer.send(&mut Round::default()).unwrap();
            while let Moved::Bytes(bytes) = pipe::read(&read, &mut buffer).unwrap() {
                received.extend_from_slice(&buffer[..bytes]);
                if progress != SendResult::Done {
                    break;
                }
            }
            if progress == SendResult::Done {
                return received;
            }
        }
    }

    #[test]
    fn memory_is_sent_in_its_order() {
        let (data, expected) = data(&[5, 70_000, 4096, 1, 300_000]);
        assert!(sent(data) == expected);
    }

    #[test]
    fn pipes_and_memory_come_in_their_order() {
        if !PipePool::new(Ahead::Piece).has_room() {
            return;
        }
        let (mut all, mut expected) = in_pipes(&[40_000, 600_000, 70_000, 600_000]);
        for (more, bytes) in [data(&[5, 70_000]), in_pipes(&[600_000, 33_000])] {
            all.append(more).unwrap();
            expected.extend(bytes);
        }
        assert!(sent(all) == expected);
    }

    #[test]
    fn an_empty_pipe_is_filled_by_one_call() {
        if !PipePool::new(Ahead::Piece).has_room() {
            return;
        }
        let (read, write) = pipe::new().unwrap();
        let (data, expected) = in_pipes(&[500_000; 20]);
        let mut transfer = transfer(write, data);
        let mut sent = 0;
        while transfer.left() > 0 {
            let progress = transfer.send(&mut Round::default()).unwrap();
            let available = pipe::available(&read).unwrap();
            let left = expected.len() - sent - available;
            assert_eq!(transfer.left(), left as u64);
            let capacity = LARGEST.min(pipe::max_size());
            // Each piece ends within a page.
            let full = capacity - (capacity / 500_000).max(2) * slot();
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
    fn a_full_pipe_is_left_alone_until_it_has_room_whatever_comes_for_it() {
        let (read, write) = pipe::new().unwrap();
        let (large, _) = data(&[2 * LARGEST]);
        let mut transfer = transfer(write, large);
        transfer.body.is_whole = false;
        let mut transfers = Transfers::new(Watched::Transfer);
        let poller = Poller::new().unwrap();
        transfers.start(transfer);
        assert!(transfers.send(&poller).unwrap().filled > 0);

        let mut buffer = vec![0; LARGEST];
        pipe::read(&read, &mut buffer).unwrap();
        let transfer = transfers.get_mut(0).unwrap();
        let (data, is_whole) = (data(&[4]).0, false);
        transfer.add(FileBody { data, is_whole }).unwrap();
        assert_eq!(transfers.send(&poller).unwrap().filled, 0);
        transfers.made_room(0, false);
        assert!(transfers.send(&poller).unwrap().filled > 0);
    }

    #[test]
    fn a_reader_that_leaves_ends_the_transfer() {
        let (read, write) = pipe::new().unwrap();
        drop(read);
        let (data, _) = data(&[2 * LARGEST]);
        let mut transfer = transfer(write, data);
        // A process that another test is starting has it open until its program runs.
        while transfer.send(&mut Round::default()).unwrap() != SendResult::ReaderGone {}
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
