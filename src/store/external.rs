//! External files, laid over another store: what belongs to them goes straight through to a pipe, and is never stored.
//!
//! Whoever reads an external file (usually `tar`) sets the pace: while its pipe is full, nothing else of the image is received. It
//! depends on nothing that we could be holding back, so this cannot deadlock; and if the rest were received meanwhile,
//! memory would fill with what may turn out to be more of the external file.

use std::collections::HashMap;
use std::io;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::AsFd;

use super::{Arena, Extent, Store};
use crate::format::ImageName;
use crate::os::pipe::{self, Moved, ReadEnd, WriteEnd, uninterrupted};
use crate::supervision::signals::{Interrupted, Interrupts};

/// A file of the overlay: an external one, or one of the store below.
pub enum File<F> {
    External(WriteEnd),
    Stored(F),
}

enum External {
    Waiting(WriteEnd),
    Begun,
    Complete,
}

/// A store with external files in front of it.
pub struct Overlay<'a, S> {
    pub below: S,
    external: HashMap<ImageName, External>,
    interrupts: &'a Interrupts,
}

impl<'a, S> Overlay<'a, S> {
    /// Hands out the files named in `external` through their pipes (which must not block).
    pub fn new(below: S, external: Vec<(ImageName, WriteEnd)>, interrupts: &'a Interrupts) -> Self {
        let external = external
            .into_iter()
            .map(|(name, pipe)| (name, External::Waiting(pipe)))
            .collect();
        Self {
            below,
            external,
            interrupts,
        }
    }

    /// Ends the overlay, when the image is complete.
    ///
    /// # Errors
    /// When an external file that was asked for is not in the image.
    pub fn into_below(self) -> Result<S> {
        let mut missing: Vec<_> = self
            .external
            .iter()
            .filter(|(_, state)| !matches!(state, External::Complete))
            .map(|(name, _)| name.to_string())
            .collect();
        missing.sort();
        if !missing.is_empty() {
            bail!(
                "--ext-file-fds: the image has no file named {}",
                missing.join(", ")
            );
        }
        Ok(self.below)
    }

    /// Waits until the reader of an external file makes room.
    fn wait_for_room(&self, pipe: &WriteEnd) -> io::Result<()> {
        let mut fds = [
            PollFd::new(pipe.as_fd(), PollFlags::POLLOUT),
            PollFd::new(self.interrupts.as_fd(), PollFlags::POLLIN),
        ];
        uninterrupted(|| poll(&mut fds, PollTimeout::NONE))?;
        self.interrupts
            .check()
            .map_err(|error| match error.downcast::<Interrupted>() {
                Ok(interrupted) => io::Error::other(interrupted),
                Err(other) => io::Error::other(other),
            })
    }
}

impl<S: Store> Store for Overlay<'_, S> {
    type File = File<S::File>;

    const BUFFERS: bool = S::BUFFERS;

    fn create(&mut self, name: &ImageName) -> Result<Self::File> {
        let Some(state) = self.external.get_mut(name) else {
            return self.below.create(name).map(File::Stored);
        };
        match std::mem::replace(state, External::Begun) {
            External::Waiting(pipe) => Ok(File::External(pipe)),
            External::Begun | External::Complete => {
                bail!(
                    "the image contains the external file {name} twice, and its first contents are handed out already"
                )
            }
        }
    }

    fn takes_pipe(&self, file: &Self::File) -> bool {
        match file {
            File::External(_) => true,
            File::Stored(file) => self.below.takes_pipe(file),
        }
    }

    fn splice(&mut self, file: &mut Self::File, from: &ReadEnd, len: usize) -> io::Result<Moved> {
        let pipe = match file {
            File::External(pipe) => pipe,
            File::Stored(file) => return self.below.splice(file, from, len),
        };
        loop {
            match pipe::splice(from, &*pipe, len).map_err(reader_gone)? {
                // A full target hides that the source has ended, which is told only once: so it has to be
                // emptied before the source is believed to be merely empty.
                Moved::WouldBlock if pipe::available(from)? > 0 || !has_room(pipe)? => {
                    self.wait_for_room(pipe)?;
                }
                moved => return Ok(moved),
            }
        }
    }

    fn append(&mut self, file: &mut Self::File, data: Extent, arena: &mut Arena) -> io::Result<()> {
        let pipe = match file {
            File::External(pipe) => pipe,
            File::Stored(file) => return self.below.append(file, data, arena),
        };
        let mut bytes = arena.bytes(&data);
        while !bytes.is_empty() {
            match pipe::write(pipe, bytes).map_err(reader_gone)? {
                Moved::Bytes(written) => bytes = &bytes[written..],
                Moved::WouldBlock | Moved::End => self.wait_for_room(pipe)?,
            }
        }
        arena.release(data);
        Ok(())
    }

    fn finish(&mut self, name: ImageName, file: Self::File, arena: &mut Arena) -> Result<()> {
        match file {
            File::External(pipe) => {
                drop(pipe);
                self.external.insert(name, External::Complete);
                Ok(())
            }
            File::Stored(file) => self
                .below
                .finish(name, file, arena)
                .context("storing a file"),
        }
    }
}

fn has_room(pipe: &WriteEnd) -> io::Result<bool> {
    let mut fds = [PollFd::new(pipe.as_fd(), PollFlags::POLLOUT)];
    Ok(uninterrupted(|| poll(&mut fds, PollTimeout::ZERO))? > 0)
}

fn reader_gone(error: io::Error) -> io::Error {
    if error.raw_os_error() == Some(Errno::EPIPE as i32) {
        return io::Error::new(
            io::ErrorKind::BrokenPipe,
            "whoever reads this external file went away before its end",
        );
    }
    error
}
