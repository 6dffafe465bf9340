//! Moves data between a pipe and a descriptor that is none: a regular file, a socket, a device.
//!
//! One thread for each, that blocks: it has nothing else to do, and neither files nor all devices can be waited for. The data is
//! spliced; what cannot be spliced (files opened for appending, some devices) refuses the very first attempt, and is then read and
//! written. Once bytes have moved, every error is real.
//!
//! What a pump came to is known before its end of the pipe is closed: whoever sees the pipe's end can ask why.
//! A thread that is blocked does not keep the process from ending.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, OnceLock};
use std::thread;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::SpliceFFlags;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::interrupt::Interrupts;
use crate::pipe::{self, LARGEST, ReadEnd, WriteEnd, uninterrupted};

/// Bytes of a pump's stack: it calls nothing deep, and 32 shards must not cost memory.
const STACK: usize = 64 << 10;

/// Bytes copied at a time where splicing is not possible. As small as it may be without costing much: each pump has its own.
const COPY: usize = 32 << 10;

/// Which way the data goes.
pub enum Way {
    In(OwnedFd, WriteEnd),
    Out(ReadEnd, OwnedFd),
}

type Outcome = Result<(), Errno>;

/// A pump at work.
pub struct Pump {
    label: String,
    verb: &'static str,
    /// It ends by itself once nothing more goes into its pipe.
    ends: bool,
    outcome: Arc<OnceLock<Outcome>>,
    /// Nobody writes to this; its other end is closed when the pump has ended.
    end: ReadEnd,
}

impl Pump {
    /// Starts one. `label` names the descriptor in errors.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn start(way: Way, label: &str) -> Result<Self> {
        let outcome = Arc::new(OnceLock::new());
        let (end, ended) = pipe::new().with_context(|| format!("preparing {label}"))?;
        let (verb, ends) = match way {
            Way::In(..) => ("reading", false),
            Way::Out(..) => ("writing to", true),
        };
        let report = Arc::clone(&outcome);
        thread::Builder::new()
            .name("pump".into())
            .stack_size(STACK)
            .spawn(move || {
                // In each arm, the outcome is there before the pipe's end is closed.
                match way {
                    Way::In(from, pipe) => {
                        let _only_here = report.set(fill(&from, &pipe));
                        drop(pipe);
                    }
                    Way::Out(pipe, to) => {
                        let written = empty(&pipe, &to);
                        // Some file systems tell of a full disk or an exceeded quota only now.
                        let closed = nix::unistd::close(to);
                        let _only_here = report.set(written.and(closed));
                        drop(pipe);
                    }
                }
                drop(ended);
            })
            .with_context(|| format!("starting a thread for {label}"))?;
        Ok(Self {
            label: label.to_owned(),
            verb,
            ends,
            outcome,
            end,
        })
    }

    /// Fails if the pump has failed.
    ///
    /// # Errors
    /// Its error, naming the descriptor.
    pub fn check(&self) -> Result<()> {
        match self.outcome.get() {
            Some(Err(errno)) => Err(std::io::Error::from(*errno))
                .with_context(|| format!("{} {}", self.verb, self.label)),
            Some(Ok(())) | None => Ok(()),
        }
    }

    /// Waits until everything is written, or, where the pump reads, looks whether something went wrong: what it reads from
    /// need not end, once the image has.
    ///
    /// # Errors
    /// Its error, and interruption by a signal.
    pub fn finish(&self, interrupts: &Interrupts) -> Result<()> {
        while self.ends && self.outcome.get().is_none() {
            let mut fds = [
                PollFd::new(self.end.as_fd(), PollFlags::POLLIN),
                PollFd::new(interrupts.as_fd(), PollFlags::POLLIN),
            ];
            uninterrupted(|| poll(&mut fds, PollTimeout::NONE))
                .with_context(|| format!("waiting until {} is written", self.label))?;
            interrupts.check()?;
        }
        self.check()
    }
}

/// From a descriptor into a pipe. That nobody reads from the pipe any more is no error here: the image is complete, or the
/// reader knows why not.
fn fill(from: &OwnedFd, pipe: &WriteEnd) -> Outcome {
    match splice_all(from, pipe, (from, PollFlags::POLLIN)) {
        Ok(Spliced::All) => Ok(()),
        Ok(Spliced::Impossible) => copy(
            |buffer| nix::unistd::read(from, buffer),
            |bytes| nix::unistd::write(pipe, bytes),
            (from, PollFlags::POLLIN),
        ),
        Err(error) => Err(error),
    }
    .or_else(|error| match error {
        Errno::EPIPE => Ok(()),
        other => Err(other),
    })
}

/// From a pipe into a descriptor.
fn empty(pipe: &ReadEnd, to: &OwnedFd) -> Outcome {
    match splice_all(pipe, to, (to, PollFlags::POLLOUT))? {
        Spliced::All => Ok(()),
        Spliced::Impossible => copy(
            |buffer| nix::unistd::read(pipe, buffer),
            |bytes| nix::unistd::write(to, bytes),
            (to, PollFlags::POLLOUT),
        ),
    }
}

/// How splicing went.
enum Spliced {
    All,
    /// It is not possible between these two; nothing was moved.
    Impossible,
}

/// A descriptor that may have been made non-blocking by whoever gave it to us, and what to wait for then.
type Patience<'a> = (&'a OwnedFd, PollFlags);

fn splice_all(from: impl AsFd, to: impl AsFd, patience: Patience) -> Result<Spliced, Errno> {
    let mut moved = false;
    loop {
        match nix::fcntl::splice(
            &from,
            None,
            &to,
            None,
            LARGEST,
            SpliceFFlags::SPLICE_F_MOVE,
        ) {
            Ok(0) => return Ok(Spliced::All),
            Ok(_) => moved = true,
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => wait(patience)?,
            Err(Errno::EINVAL) if !moved => return Ok(Spliced::Impossible),
            Err(error) => return Err(error),
        }
    }
}

fn copy(
    mut read: impl FnMut(&mut [u8]) -> nix::Result<usize>,
    mut write: impl FnMut(&[u8]) -> nix::Result<usize>,
    patience: Patience,
) -> Outcome {
    let mut buffer = vec![0; COPY];
    loop {
        let length = persist(patience, || read(&mut buffer))?;
        if length == 0 {
            return Ok(());
        }
        let mut rest = &buffer[..length];
        while !rest.is_empty() {
            match persist(patience, || write(rest))? {
                0 => return Err(Errno::EIO),
                written => rest = &rest[written..],
            }
        }
    }
}

/// Repeats a call until it is neither interrupted nor told to wait.
fn persist<T>(patience: Patience, mut attempt: impl FnMut() -> nix::Result<T>) -> nix::Result<T> {
    loop {
        match attempt() {
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => wait(patience)?,
            result => return result,
        }
    }
}

fn wait((fd, flags): Patience) -> nix::Result<()> {
    let mut fds = [PollFd::new(fd.as_fd(), flags)];
    uninterrupted(|| poll(&mut fds, PollTimeout::NONE)).map(drop)
}
