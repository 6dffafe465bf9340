//! Moves data between a pipe and a descriptor that is none: a regular file, a socket, a device.
//!
//! Each pump is a thread that blocks: it has nothing else to do, and neither files nor all devices
//! can be waited for.
//!
//! **Copied, not spliced.** Spliced from a file, a pipe refers to the file's pages in the page
//! cache, and an image that waits for CRIU changes when the file is written over. Spliced into a
//! socket, the application's pages stay in its queue until the peer has acknowledged them, long
//! after the application may have gone on. And while the kernel splices, it holds the pipe's mutex,
//! also while it waits for a socket or disk: the transfer's loop, which must never wait for one
//! shard, would wait for that mutex. A pipe that another program fills is taken as it is: nothing
//! distinguishes pages of the pipe's own, which `write` makes, from a file's, which `pv` splices,
//! and to copy all would take the streamer from 0.17 to 0.74 CPU s/GiB or more (2026-11-29, one
//! shard, busy machine).
//!
//! **The end of a shard.** A regular file is cut off where an image begins, so that nothing follows
//! it, and no earlier image goes on where one breaks off. A block device has no end: a frame that
//! is no marker follows the shard there, and its reader looks for that, or for the image's end.
//!
//! **Written is not safe.** A socket still has to deliver what was written, and closing it with
//! something unread throws that away; a disk's error shows when its cache is flushed. So a pump
//! ends only when the socket's peer has everything (see `socket`), and when a regular file or block
//! device is on disk.
//!
//! A pump's failure is known before its end of the pipe is closed: the transfer that sees the end
//! can ask why. A thread that is blocked does not keep the process from ending.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, OnceLock};
use std::thread;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFlags, PollTimeout};
use nix::sys::stat::fstat;
use nix::unistd::{Whence, lseek};

use super::socket;
use crate::format::{Body, Marker, marker};
use crate::os::descriptor::{FdKind, flags, flush, poll};
use crate::os::pipe::{self, LARGEST, ReadEnd, WriteEnd};

/// Bytes of a pump's stack: it calls nothing deep, and 32 shards must not cost memory.
const STACK: usize = 64 << 10;

/// Bytes copied at a time. Each pump has its own buffer, so it is as small as it may be without
/// costing much.
const COPY: usize = 64 << 10;

/// Stands behind a shard on a block device: a frame of no bytes.
const NO_MARKER: [u8; marker::LENGTH] = [0; marker::LENGTH];

/// The thing that a pump moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pumped {
    ExternalFile,
    Shard,
}

/// The reason of the first pump that has failed, once one has.
pub(super) type PumpFailure = Arc<OnceLock<String>>;

/// Starts a pump that fills a pipe from a descriptor, which `label` names.
pub(super) fn read_from(
    from: OwnedFd,
    label: &str,
    pumped: Pumped,
    failure: &PumpFailure,
) -> Result<ReadEnd> {
    let (read, write) = wide_pipe()?;
    let label = label.to_owned();
    start(write, failure, move |pipe| {
        let copied = match (pumped, FdKind::of(&from)) {
            (Pumped::Shard, FdKind::BlockDevice) => copy_shard(&from, pipe),
            _ => copy(&from, pipe),
        };
        match copied {
            // The pipe has no reader any more: the image is complete, or the reader says why not.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            copied => copied.with_context(|| format!("reading {label}")),
        }
    })?;
    Ok(read)
}

/// Starts a pump that empties a pipe into a descriptor, which `label` names. The second pipe closes
/// when everything is written.
pub(super) fn write_to(
    to: OwnedFd,
    label: &str,
    pumped: Pumped,
    failure: &PumpFailure,
) -> Result<(WriteEnd, ReadEnd)> {
    let (read, write) = wide_pipe()?;
    let (writing, written) = pipe::new()?;
    let label = label.to_owned();
    start((read, written), failure, move |(pipe, _)| {
        write_all(pipe, to, pumped, &label)
    })?;
    Ok((write, writing))
}

/// Runs a pump, and then closes its ends of pipes.
fn start<E: Send + 'static>(
    ends: E,
    failure: &PumpFailure,
    pump: impl FnOnce(&E) -> Result<()> + Send + 'static,
) -> Result<()> {
    let failure = Arc::clone(failure);
    let run = move || {
        if let Err(error) = pump(&ends) {
            let _ = failure.set(format!("{error:#}"));
        }
        drop(ends);
    };
    let thread = thread::Builder::new().name("pump".into()).stack_size(STACK);
    thread.spawn(run).context("starting a thread")?;
    Ok(())
}

/// A pipe of the largest capacity allowed.
fn wide_pipe() -> Result<(ReadEnd, WriteEnd)> {
    let (read, write) = pipe::new()?;
    pipe::grow(&write, LARGEST)?;
    Ok((read, write))
}

/// Writes all that comes, and waits until it is where it cannot be lost any more.
fn write_all(from: &ReadEnd, to: OwnedFd, pumped: Pumped, label: &str) -> Result<()> {
    let kind = FdKind::of(&to);
    if kind == FdKind::RegularFile {
        cut_off(&to).with_context(|| format!("cutting off the end of {label}"))?;
    }
    copy(from, &to).with_context(|| format!("writing to {label}"))?;
    if kind == FdKind::BlockDevice && pumped == Pumped::Shard {
        // A device that is full to the last byte needs none.
        let _ = nix::unistd::write(&to, &NO_MARKER);
    }
    match kind {
        FdKind::Socket => socket::deliver(&to)
            .with_context(|| format!("waiting until everything has arrived from {label}"))?,
        _ => flush(&to).with_context(|| format!("flushing to disk {label}"))?,
    }
    // Some file systems tell of a full disk or an exceeded quota only now.
    nix::unistd::close(to).with_context(|| format!("closing {label}"))
}

/// Takes away what a file holds behind the place at which the image begins.
fn cut_off(file: &OwnedFd) -> io::Result<()> {
    let begin = lseek(file, 0, Whence::SeekCur)?;
    if flags(file)?.contains(OFlag::O_APPEND) || fstat(file)?.st_size <= begin {
        return Ok(());
    }
    Ok(nix::unistd::ftruncate(file, begin)?)
}

/// Copies a shard from a block device, up to its end.
fn copy_shard(from: &OwnedFd, to: &WriteEnd) -> io::Result<()> {
    let mut bytes = Vec::new();
    let mut data_left = 0;
    loop {
        let held = bytes.len();
        bytes.resize(held + COPY, 0);
        let taken = read(from, &mut bytes[held..])?;
        bytes.truncate(held + taken);
        let mut shard = 0;
        let has_ended = loop {
            let data = data_left.min(bytes.len() - shard);
            data_left -= data;
            shard += data;
            match Marker::decode(&bytes[shard..]) {
                Ok(Some((marker, size))) => {
                    shard += size;
                    match marker.body {
                        Body::Data(size) => data_left = size as usize,
                        Body::ImageEnd => break true,
                        Body::File(_) | Body::FileEnd => {}
                    }
                }
                Ok(None) => break taken == 0,
                Err(_) => break true,
            }
        };
        write(to, &bytes[..shard])?;
        bytes.drain(..shard);
        if has_ended {
            return Ok(());
        }
    }
}

/// Copies all that comes.
fn copy(from: impl AsFd, to: impl AsFd) -> io::Result<()> {
    let mut buffer = vec![0; COPY];
    loop {
        match read(&from, &mut buffer)? {
            0 => return Ok(()),
            length => write(&to, &buffer[..length])?,
        }
    }
}

fn read(from: impl AsFd, buffer: &mut [u8]) -> io::Result<usize> {
    retry(&from, PollFlags::POLLIN, || {
        nix::unistd::read(&from, buffer)
    })
}

fn write(to: impl AsFd, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match retry(&to, PollFlags::POLLOUT, || nix::unistd::write(&to, bytes))? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            written => bytes = &bytes[written..],
        }
    }
    Ok(())
}

/// Repeats a call while it is interrupted, or would block: a descriptor may be non-blocking.
fn retry<T>(
    fd: impl AsFd,
    ready: PollFlags,
    mut attempt: impl FnMut() -> nix::Result<T>,
) -> io::Result<T> {
    loop {
        match attempt() {
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => drop(poll(&fd, ready, PollTimeout::NONE)?),
            result => return Ok(result?),
        }
    }
}
