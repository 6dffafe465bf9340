//! Moves data between a pipe and a descriptor that is none: a regular file, a socket, a device.
//!
//! Each pump is a thread that blocks: it has nothing else to do, and neither files nor all devices
//! can be waited for. The data is spliced. What cannot be spliced (files opened for appending, some
//! devices) refuses the first attempt, and is then read and written. Once bytes have moved, every
//! error is real.
//!
//! **Into sockets the data is copied.** A socket's queue would refer to the application's pages
//! until the peer has acknowledged them, long after the capture may have ended and the application
//! may have gone on. Over loopback that costs a pump 0.45 CPU s/GB in place of 0.20, of which the
//! reader saves as much as it costs, and over a UNIX socket 0.28 in place of 0.035 (2026-11-25, a
//! pump alone between a pipe of 1 MiB and a reader of 64 KiB, medians of 5 to 10 runs of 2 GB on a
//! busy machine). Buffers of 32 to 128 KiB made no difference there.
//!
//! **A kept shard is copied.** Spliced from a file, a pipe refers to the file's pages in the page
//! cache, and an image that waits for CRIU changes when the file is written over. So the shards
//! that `serve` keeps are copied. A pipe that another program fills is taken as it is: nothing
//! tells pages of the pipe's own, as those of a `write`, from those of a file, as with `pv`, and to
//! copy all would take the streamer from 0.17 to 0.74 CPU s/GiB or more (2026-11-29, one shard,
//! busy machine).
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
//! **The stage.** While the kernel splices between a pipe and something else, it holds the pipe's
//! mutex, also while it waits for a socket or disk. The transfer's loop, which must never wait for
//! one shard, would wait for that mutex. So the data goes through another pipe that only the thread
//! uses: between two pipes, no mutex is held while waiting.
//!
//! A pump's failure is known before its end of the pipe is closed: the transfer that sees the end
//! can ask why. A thread that is blocked does not keep the process from ending.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, OnceLock};
use std::thread;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::fstat;
use nix::unistd::{Whence, lseek};

use super::socket;
use crate::format::{Body, Marker, marker};
use crate::os::descriptor::{FdKind, flush};
use crate::os::pipe::{self, LARGEST, ReadEnd, WriteEnd, uninterrupted};

/// Bytes of a pump's stack: it calls nothing deep, and 32 shards must not cost memory.
const STACK: usize = 64 << 10;

/// Bytes copied at a time where the data is not spliced: what the stage holds. Each pump has its
/// own buffer, so it is as small as it may be without costing much.
const COPY: usize = 64 << 10;

/// What stands behind a shard on a block device: a frame of no bytes.
const NO_MARKER: [u8; marker::LENGTH] = [0; marker::LENGTH];

/// What a pump moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pumped {
    ExternalFile,
    Shard,
    /// A shard that stays in its pipe's pages until CRIU reads it.
    KeptShard,
}

type Outcome = Result<(), Errno>;

/// Why a pump failed.
pub(super) struct Reason {
    /// What it was doing, naming the descriptor.
    doing: String,
    errno: Errno,
}

impl Reason {
    pub(super) fn error(&self) -> anyhow::Error {
        anyhow::Error::from(io::Error::from(self.errno)).context(self.doing.clone())
    }
}

/// Starts a pump that fills a pipe from a descriptor, which `label` names.
pub(super) fn read_from(
    from: OwnedFd,
    label: &str,
    pumped: Pumped,
    failure: Arc<OnceLock<Reason>>,
) -> Result<ReadEnd> {
    let (read, write) = wide_pipe()?;
    let stage = pipe::new()?;
    let doing = format!("reading {label}");
    start(move || {
        let wait_for = (&from, PollFlags::POLLIN);
        let read = match (pumped, FdKind::of(&from)) {
            (Pumped::Shard | Pumped::KeptShard, FdKind::BlockDevice) => read_device(&from, &write),
            (Pumped::KeptShard, _) => transfer(&from, &write, &stage, PumpMode::Copy, wait_for),
            _ => transfer(&from, &write, &stage, PumpMode::Splice, wait_for),
        };
        match read {
            // The pipe has no reader any more: the image is complete, or the reader says why not.
            Ok(()) | Err(Errno::EPIPE) => {}
            Err(errno) => drop(failure.set(Reason { doing, errno })),
        }
        drop(write);
    })?;
    Ok(read)
}

/// Starts a pump that empties a pipe into a descriptor, which `label` names. The second pipe closes
/// when everything is written.
pub(super) fn write_to(
    to: OwnedFd,
    label: &str,
    pumped: Pumped,
    failure: Arc<OnceLock<Reason>>,
) -> Result<(WriteEnd, ReadEnd)> {
    let (read, write) = wide_pipe()?;
    let (writing, written) = pipe::new()?;
    let stage = pipe::new()?;
    let label = label.to_owned();
    start(move || {
        if let Err(reason) = write_all(&read, to, &stage, pumped, &label) {
            drop(failure.set(reason));
        }
        drop(read);
        drop(written);
    })?;
    Ok((write, writing))
}

/// Writes all that comes, and waits until it is where it cannot be lost any more.
fn write_all(
    from: &ReadEnd,
    to: OwnedFd,
    stage: &Stage,
    pumped: Pumped,
    label: &str,
) -> Result<(), Reason> {
    let because = |doing: &str| {
        let doing = format!("{doing} {label}");
        |errno| Reason { doing, errno }
    };
    let kind = FdKind::of(&to);
    let mode = match kind {
        FdKind::Socket => PumpMode::Copy,
        _ => PumpMode::Splice,
    };
    if kind == FdKind::RegularFile {
        cut_off(&to).map_err(because("cutting off the end of"))?;
    }
    let wait_for = (&to, PollFlags::POLLOUT);
    transfer(from, &to, stage, mode, wait_for).map_err(because("writing to"))?;
    if kind == FdKind::BlockDevice && pumped == Pumped::Shard {
        // A device that is full to the last byte needs none.
        let _ = nix::unistd::write(&to, &NO_MARKER);
    }
    match kind {
        FdKind::Socket => {
            socket::deliver(&to).map_err(because("waiting until everything has arrived from"))?;
        }
        FdKind::RegularFile | FdKind::BlockDevice => {
            flush(&to).map_err(because("flushing to disk"))?;
        }
        _ => {}
    }
    // Some file systems tell of a full disk or an exceeded quota only now.
    nix::unistd::close(to).map_err(because("closing"))
}

/// Takes away what a file holds behind the place at which the image begins.
fn cut_off(file: &OwnedFd) -> Outcome {
    let begin = lseek(file, 0, Whence::SeekCur)?;
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    if flags.contains(OFlag::O_APPEND) || fstat(file)?.st_size <= begin {
        return Ok(());
    }
    nix::unistd::ftruncate(file, begin)
}

/// Reads a shard from a block device, up to its end.
fn read_device(from: &OwnedFd, to: &WriteEnd) -> Outcome {
    let wait_for = (from, PollFlags::POLLIN);
    let mut block = Vec::new();
    let mut data_left = 0;
    loop {
        let held = block.len();
        block.resize(held + COPY, 0);
        let taken = retry(wait_for, || nix::unistd::read(from, &mut block[held..]))?;
        block.truncate(held + taken);
        let mut shard = 0;
        let has_ended = loop {
            let data = block.len().min(shard + data_left) - shard;
            data_left -= data;
            shard += data;
            match Marker::decode(&block[shard..]) {
                _ if data_left > 0 => break taken == 0,
                Ok(None) => break taken == 0,
                Ok(Some((marker, size))) => {
                    shard += size;
                    match marker.body {
                        Body::Data(size) => data_left = size as usize,
                        Body::ImageEnd => break true,
                        Body::File(_) | Body::FileEnd => {}
                    }
                }
                Err(_) => break true,
            }
        };
        write_out(to, &block[..shard], wait_for)?;
        block.drain(..shard);
        if has_ended {
            return Ok(());
        }
    }
}

fn start(pump: impl FnOnce() + Send + 'static) -> Result<()> {
    let thread = thread::Builder::new().name("pump".into()).stack_size(STACK);
    thread.spawn(pump).context("starting a thread")?;
    Ok(())
}

/// A pipe of the largest capacity allowed.
fn wide_pipe() -> Result<(ReadEnd, WriteEnd)> {
    let (read, write) = pipe::new()?;
    pipe::grow(&write, LARGEST)?;
    Ok((read, write))
}

/// The pipe between.
type Stage = (ReadEnd, WriteEnd);

/// The descriptor, which may be non-blocking, and what to wait for then.
type WaitFor<'a> = (&'a OwnedFd, PollFlags);

/// How the data leaves the stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PumpMode {
    /// By splicing, or by copying where the first attempt to splice is refused.
    Splice,
    Copy,
}

/// Moves all that comes.
fn transfer(
    from: impl AsFd,
    to: impl AsFd,
    stage: &Stage,
    mode: PumpMode,
    wait_for: WaitFor,
) -> Outcome {
    let mut buffer = match mode {
        PumpMode::Splice => Vec::new(),
        PumpMode::Copy => vec![0; COPY],
    };
    let mut moved = false;
    'splicing: loop {
        let mut left = match retry(wait_for, || splice(&from, &stage.1, LARGEST)) {
            Ok(0) => return Ok(()),
            Err(errno) if !moved && pipe::is_refusal(errno) => break,
            result => result?,
        };
        if mode == PumpMode::Copy {
            copy(&stage.0, &to, left, &mut buffer, wait_for)?;
            continue;
        }
        while left > 0 {
            match retry(wait_for, || splice(&stage.0, &to, left)) {
                Ok(0) => return Err(Errno::EIO),
                Err(errno) if !moved && pipe::is_refusal(errno) => {
                    buffer.resize(COPY, 0);
                    copy(&stage.0, &to, left, &mut buffer, wait_for)?;
                    break 'splicing;
                }
                result => left -= result?,
            }
            moved = true;
        }
    }
    buffer.resize(COPY, 0);
    copy(from, to, usize::MAX, &mut buffer, wait_for)
}

fn splice(from: impl AsFd, to: impl AsFd, len: usize) -> nix::Result<usize> {
    nix::fcntl::splice(from, None, to, None, len, SpliceFFlags::SPLICE_F_MOVE)
}

/// Copies up to `len` bytes, or as many as there are.
fn copy(
    from: impl AsFd,
    to: impl AsFd,
    len: usize,
    buffer: &mut [u8],
    wait_for: WaitFor,
) -> Outcome {
    let mut left = len;
    while left > 0 {
        let most = left.min(buffer.len());
        let length = retry(wait_for, || nix::unistd::read(&from, &mut buffer[..most]))?;
        if length == 0 {
            return Ok(());
        }
        write_out(&to, &buffer[..length], wait_for)?;
        left -= length;
    }
    Ok(())
}

fn write_out(to: impl AsFd, mut bytes: &[u8], wait_for: WaitFor) -> Outcome {
    while !bytes.is_empty() {
        match retry(wait_for, || nix::unistd::write(&to, bytes))? {
            0 => return Err(Errno::EIO),
            written => bytes = &bytes[written..],
        }
    }
    Ok(())
}

/// Repeats a call until it is neither interrupted nor told to wait.
fn retry<T>(wait_for: WaitFor, mut attempt: impl FnMut() -> nix::Result<T>) -> nix::Result<T> {
    loop {
        match attempt() {
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => {
                let (fd, flags) = wait_for;
                let mut fds = [PollFd::new(fd.as_fd(), flags)];
                uninterrupted(|| poll(&mut fds, PollTimeout::NONE))?;
            }
            result => return result,
        }
    }
}
