//! Data that stays in the pages in which it arrived: in pipes of our own.
//!
//! A decompressor's write puts data into pages that the pipe owns, and splicing moves references to
//! them: from the shard's pipe into one that holds them, and later into CRIU's pipe. Nothing is
//! copied, and we touch no memory for the first time: 0.05 CPU s/GB, and 0.03 for serving, where
//! reading into huge pages takes 0.35 (restore/4-shards-64KiB-blocks, 2026-11-26).
//!
//! A pipe holds one chunk, and then those of the same file that follow it, up to what its reader's
//! pipe takes at a time: so each file can be taken out in its order whatever other files do. The
//! price is a descriptor for each. Where the user's pipes are limited, or descriptors are few, no
//! image is kept in pipes, and data beyond the limit goes to memory.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::resource::{Resource, getrlimit};

use super::Ahead;
use crate::os::pipe::{self, BothEnds, LARGEST, Moved, Source, slot};

/// A chunk that is worth a pipe, in bytes. Making one takes as long as copying about this much.
pub(crate) const WORTH_HOLDING: usize = 32 << 10;

/// Descriptors left for everything else, at least: for the files that CRIU has open at the same
/// time, above all.
const OTHER_DESCRIPTORS: usize = 512;

/// Pipes for an image that goes on to files: each holds a chunk until it is whole.
const FEW: usize = 64;

/// The number of pipes that a limit of descriptors allows. A restore of many processes opens many
/// files at a time, and needs a quarter of a large limit.
fn most_pipes(descriptors: usize) -> usize {
    descriptors.saturating_sub(OTHER_DESCRIPTORS.max(descriptors / 4))
}

/// Makes the pipes, as far as limits allow.
#[derive(Debug)]
pub(crate) struct PipePool {
    /// The number of pipes that may be open.
    most: usize,
    /// The number of pipes that are open.
    open: Arc<AtomicUsize>,
}

impl PipePool {
    /// A pool for an image that is kept, or for one that goes on to files.
    pub(crate) fn new(ahead: Ahead) -> Self {
        let descriptors = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft);
        let descriptors = usize::try_from(descriptors).unwrap_or(usize::MAX);
        let for_keeping = match pipe::are_unlimited() {
            true => most_pipes(descriptors),
            false => 0,
        };
        Self {
            most: match ahead {
                Ahead::Piece => for_keeping,
                Ahead::Shard => for_keeping.max(FEW.min(descriptors / 4)),
            },
            open: Arc::default(),
        }
    }

    /// True if there may be another pipe.
    pub(crate) fn has_room(&self) -> bool {
        self.open.load(Ordering::Relaxed) < self.most
    }

    /// A new pipe for `bytes`, or for a part of them; `None` when a limit is reached.
    pub(crate) fn hold(&mut self, bytes: usize) -> Option<HeldPipe> {
        if !self.has_room() {
            return None;
        }
        // Data that does not begin with a page takes one slot more.
        let pipe = self.make(bytes + slot());
        if pipe.is_none() {
            self.most = 0;
        }
        pipe
    }

    /// A new pipe that data passes through, beyond any limit of ours; `None` where it would have
    /// next to no room.
    pub(crate) fn make(&self, bytes: usize) -> Option<HeldPipe> {
        let wanted = bytes.min(LARGEST);
        let (pipe, capacity) = BothEnds::new(wanted).ok()?;
        if capacity < wanted.min(WORTH_HOLDING) {
            return None;
        }
        self.open.fetch_add(1, Ordering::Relaxed);
        Some(HeldPipe {
            pipe,
            len: 0,
            capacity: capacity as u32,
            open: Arc::clone(&self.open),
        })
    }
}

/// Bytes in a pipe of our own. Dropped, they are gone.
#[derive(Debug)]
pub struct HeldPipe {
    pipe: BothEnds,
    len: u32,
    /// Bytes that it holds if its slots are full.
    capacity: u32,
    open: Arc<AtomicUsize>,
}

impl HeldPipe {
    pub(crate) fn len(&self) -> usize {
        self.len as usize
    }

    /// True if the slots are poorly filled, on the whole: each keeps a page, however little it
    /// holds.
    pub(crate) fn is_wasteful(&self) -> bool {
        self.len < self.capacity / 4 * 3
    }

    /// Takes up to `most` bytes out of a pipe. This one must have room.
    ///
    /// # Errors
    /// Those of `splice`; none for open pipes.
    pub(crate) fn take(&mut self, from: &impl Source, most: usize) -> io::Result<Moved> {
        let moved = pipe::splice(from, &self.pipe, most)?;
        self.len += moved.bytes() as u32;
        Ok(moved)
    }

    /// Takes over up to `most` bytes of another one that holds something, behind its own. Returns
    /// how many: none if all of its slots are taken.
    ///
    /// # Errors
    /// Those of `splice`; none for open pipes.
    pub(crate) fn absorb(&mut self, other: &mut Self, most: usize) -> io::Result<usize> {
        let bytes = self.take(&other.pipe, most.min(other.len()))?.bytes();
        other.len -= bytes as u32;
        Ok(bytes)
    }

    /// Takes over all that another one holds, or as much as the largest pipe has room for.
    ///
    /// # Errors
    /// Those of `splice`; none for open pipes.
    pub(crate) fn append(&mut self, other: &mut Self) -> io::Result<()> {
        if self.len() + slot() > LARGEST {
            return Ok(());
        }
        let wanted = (self.len() + other.len() + slot()).min(LARGEST);
        if wanted > self.capacity as usize {
            self.capacity = (pipe::grow(&self.pipe, wanted)? * slot()) as u32;
        }
        while other.len() > 0 && self.absorb(other, usize::MAX)? > 0 {}
        Ok(())
    }

    /// Moves what the target takes.
    ///
    /// # Errors
    /// `EPIPE` when the target's reader is gone.
    pub(crate) fn send(&mut self, to: impl AsFd) -> io::Result<usize> {
        let bytes = pipe::splice(&self.pipe, to, self.len())?.bytes();
        self.len -= bytes as u32;
        Ok(bytes)
    }

    /// Moves all of it to the end of a file.
    ///
    /// # Errors
    /// When the file cannot take it.
    pub(super) fn write_to(&mut self, file: &File) -> io::Result<()> {
        while self.len() > 0 {
            if self.send(file)? == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
        }
        Ok(())
    }

    /// Copies the first bytes to memory, and gives them back.
    ///
    /// # Errors
    /// Those of `read`; none for an open pipe.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer.len().min(self.len());
        match pipe::read(&self.pipe, &mut buffer[..most])?.bytes() {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            bytes => {
                self.len -= bytes as u32;
                Ok(bytes)
            }
        }
    }
}

impl Drop for HeldPipe {
    fn drop(&mut self) {
        self.open.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::pipe::ReadEnd;

    fn holder(most: usize) -> PipePool {
        PipePool {
            most,
            open: Arc::default(),
        }
    }

    fn filled(bytes: &[u8]) -> ReadEnd {
        let (read, write) = pipe::new().unwrap();
        pipe::grow(&write, 1 << 20).unwrap();
        if !bytes.is_empty() {
            let written = pipe::write(&write, bytes).unwrap();
            assert_eq!(written, Moved::Bytes(bytes.len()));
        }
        read
    }

    fn contents(held: &mut HeldPipe) -> Vec<u8> {
        let mut bytes = vec![0; held.len()];
        let mut taken = 0;
        while taken < bytes.len() {
            taken += held.read(&mut bytes[taken..]).unwrap();
        }
        bytes
    }

    #[test]
    fn what_is_held_comes_out_as_it_came_in() {
        let bytes: Vec<u8> = (0..50_000u32).map(|number| number as u8).collect();
        let mut first = holder(2).hold(50_000).unwrap();
        let from = filled(&bytes);
        assert_eq!(first.take(&from, 20_000).unwrap(), Moved::Bytes(20_000));
        let mut second = holder(2).hold(50_000).unwrap();
        while let Moved::Bytes(_) = second.take(&from, 30_000).unwrap() {}
        first.append(&mut second).unwrap();
        assert_eq!((first.len(), second.len()), (50_000, 0));
        assert!(contents(&mut first) == bytes);
    }

    #[test]
    fn chunks_that_follow_each_other_share_a_pipe_as_large_as_its_readers() {
        let mut holder = holder(1 << 10);
        let mut all = holder.hold(WORTH_HOLDING).unwrap();
        let full = LARGEST.min(pipe::max_size());
        for chunk in (1..).take_while(|chunk| chunk * 252 * 1024 <= full) {
            let mut next = holder.hold(252 * 1024).unwrap();
            next.take(&filled(&vec![chunk as u8; 252 * 1024]), usize::MAX)
                .unwrap();
            all.append(&mut next).unwrap();
            assert_eq!((all.len(), next.len()), (chunk * 252 * 1024, 0));
        }
    }

    #[test]
    fn a_quarter_of_the_descriptors_is_left_for_files_that_criu_has_open() {
        assert_eq!(most_pipes(300), 0);
        assert_eq!(most_pipes(1024), 512);
        assert_eq!(most_pipes(1 << 20), 3 << 18);
    }

    #[test]
    fn a_limit_of_pipes_ends_the_holding_until_one_is_given_back() {
        let mut holder = holder(1);
        let held = holder.hold(1).unwrap();
        assert!(holder.hold(1).is_none());
        drop(held);
        assert!(holder.hold(1).is_some());
    }

    #[test]
    fn a_pipe_that_scraps_fill_takes_no_more_and_is_wasteful() {
        let mut holder = holder(2);
        let mut source = holder.hold(100 * slot()).unwrap();
        let scraps = filled(&[1; 100]);
        for _ in 0..100 {
            // One byte of each page, as a writer that splices scraps leaves them.
            source.take(&scraps, 1).unwrap();
        }
        let mut held = holder.hold(WORTH_HOLDING).unwrap();
        while held.absorb(&mut source, 1000).unwrap() > 0 {}
        assert!(source.len() > 0);
        assert!(held.is_wasteful());
    }
}
