//! Moves data between a pipe and a descriptor that is none: a regular file, a socket, a device.
//!
//! One thread for each, that blocks: it has nothing else to do, and neither files nor all devices can be waited for. The data is
//! spliced; what cannot be spliced (files opened for appending, some devices) refuses the very first attempt, and is then read and
//! written. Once bytes have moved, every error is real.
//!
//! **The stage.** While the kernel splices between a pipe and something else, it holds the pipe's mutex, also while it waits for a
//! socket or disk; the transfer's loop, which must never wait for one shard, would wait for that mutex. So the data goes
//! through another pipe that only the thread uses: between two pipes, no mutex is held while waiting.
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

use crate::os::pipe::{self, LARGEST, ReadEnd, WriteEnd, uninterrupted};
use crate::supervision::signals::Interrupts;

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
        let stage = pipe::new().with_context(|| format!("preparing {label}"))?;
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
                        let _only_here = report.set(fill(&from, &pipe, &stage));
                        drop(pipe);
                    }
                    Way::Out(pipe, to) => {
                        let written = empty(&pipe, &to, &stage);
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
fn fill(from: &OwnedFd, pipe: &WriteEnd, stage: &Stage) -> Outcome {
    match transfer(from, pipe, stage, (from, PollFlags::POLLIN)) {
        Err(Errno::EPIPE) => Ok(()),
        outcome => outcome,
    }
}

/// From a pipe into a descriptor.
fn empty(pipe: &ReadEnd, to: &OwnedFd, stage: &Stage) -> Outcome {
    transfer(pipe, to, stage, (to, PollFlags::POLLOUT))
}

/// The pipe between.
type Stage = (ReadEnd, WriteEnd);

/// A descriptor that may have been made non-blocking by whoever gave it to us, and what to wait for then.
type Patience<'a> = (&'a OwnedFd, PollFlags);

/// How splicing went.
enum Spliced {
    All,
    /// It is not possible between these two: none of the first bytes arrived, and so many of them are in the stage.
    Impossible {
        staged: usize,
    },
}

fn transfer(from: impl AsFd, to: impl AsFd, stage: &Stage, patience: Patience) -> Outcome {
    match splice_all(&from, &to, stage, patience)? {
        Spliced::All => Ok(()),
        Spliced::Impossible { staged } => {
            let mut buffer = vec![0; COPY];
            copy(&stage.0, &to, &mut buffer, Some(staged), patience)?;
            copy(&from, &to, &mut buffer, None, patience)
        }
    }
}

fn splice_all(
    from: impl AsFd,
    to: impl AsFd,
    (stage_out, stage_in): &Stage,
    patience: Patience,
) -> Result<Spliced, Errno> {
    let mut moved = false;
    loop {
        let staged = match persist(patience, || splice(&from, stage_in, LARGEST)) {
            Ok(0) => return Ok(Spliced::All),
            Err(Errno::EINVAL) if !moved => return Ok(Spliced::Impossible { staged: 0 }),
            result => result?,
        };
        let mut left = staged;
        while left > 0 {
            match persist(patience, || splice(stage_out, &to, left)) {
                Err(Errno::EINVAL) if !moved => return Ok(Spliced::Impossible { staged }),
                Ok(0) => return Err(Errno::EIO),
                result => left -= result?,
            }
            moved = true;
        }
    }
}

fn splice(from: impl AsFd, to: impl AsFd, len: usize) -> nix::Result<usize> {
    nix::fcntl::splice(from, None, to, None, len, SpliceFFlags::SPLICE_F_MOVE)
}

/// Copies so many bytes, or all up to the end.
fn copy(
    from: impl AsFd,
    to: impl AsFd,
    buffer: &mut [u8],
    limit: Option<usize>,
    patience: Patience,
) -> Outcome {
    let mut left = limit.unwrap_or(usize::MAX);
    while left > 0 {
        let most = left.min(buffer.len());
        let length = persist(patience, || nix::unistd::read(&from, &mut buffer[..most]))?;
        if length == 0 {
            return Ok(());
        }
        let mut rest = &buffer[..length];
        while !rest.is_empty() {
            match persist(patience, || nix::unistd::write(&to, rest))? {
                0 => return Err(Errno::EIO),
                written => rest = &rest[written..],
            }
        }
        if limit.is_some() {
            left -= length;
        }
    }
    Ok(())
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
