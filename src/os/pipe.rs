//! Pipes: their ends, their contents and capacity, and moving page references between them.
//!
//! Every system call on a pipe is wrapped here, once. None of them blocks: `splice` and `vmsplice`
//! by a flag, reads and writes by the file description being non-blocking. Interrupted
//! calls are repeated here; "would block" and "end of file" are values, not errors, since every
//! caller has to tell them apart. A short count is a value too: only the caller knows what was
//! promised to whom.
//!
//! Capacity is counted in slots. A slot holds a reference to (part of) one page, so a marker of 12
//! bytes costs as much room as 4096 bytes of data: `FIONREAD`, which counts bytes, says how much
//! can be taken out, but not how much fits in.
//!
//! The seccomp profiles of container engines refuse `vmsplice`, some refuse `splice`, and a few
//! kinds of files cannot be spliced to. The data is then copied, in the same pieces and with the
//! same results.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, open};
use nix::poll::{PollFlags, PollTimeout};
use nix::sys::stat::Mode;
use rustix::thread::CapabilitySet;

use super::descriptor::{FdKind, flags, poll, uninterrupted};
use super::memory::{Sealed, page_size};

/// Slots of a pipe of the default size (`PIPE_DEF_BUFFERS` in the kernel).
pub const DEFAULT_SLOTS: usize = 16;

/// The largest capacity asked for, in bytes. CRIU misbehaves when its pipe is larger than 4 MiB
/// (docs/protocol.md, section 1), and beyond 1 MiB the benchmark shows no gain for the other pipes.
pub const LARGEST: usize = 4 << 20;

/// Bytes that a pipe of each user may have, without a setting of the administrator.
const DEFAULT_MAX_SIZE: usize = 1 << 20;

/// Pages that the pipes of each user may have, without a setting of the administrator.
const DEFAULT_USER_PAGES: usize = 16384;

/// Bytes that one slot of a pipe can hold: a page.
pub fn slot() -> usize {
    page_size()
}

/// One end of a pipe: that which data comes out of, or (not `READS`) goes into.
#[derive(Debug)]
pub struct PipeEnd<const READS: bool> {
    fd: OwnedFd,
    /// The earlier flags of a file description that others have too.
    set_back: Option<OFlag>,
}

/// The end of a pipe that data comes out of.
pub type ReadEnd = PipeEnd<true>;

/// The end of a pipe that data goes into.
pub type WriteEnd = PipeEnd<false>;

impl<const READS: bool> PipeEnd<READS> {
    fn of(fd: OwnedFd) -> Self {
        Self { fd, set_back: None }
    }

    /// Takes a descriptor that must be such an end of a pipe.
    ///
    /// # Errors
    /// When it is not a pipe, or its other end; the text says which.
    pub fn new(fd: OwnedFd) -> Result<Self> {
        ensure!(slots(&fd).is_ok(), "it is {}, not a pipe", FdKind::of(fd));
        let (wrong_mode, is, needed) = match READS {
            true => (OFlag::O_WRONLY, "write", "read"),
            false => (OFlag::O_RDONLY, "read", "write"),
        };
        ensure!(
            flags(&fd)? & OFlag::O_ACCMODE != wrong_mode,
            "it is the {is} end of a pipe, where its {needed} end is needed"
        );
        Ok(Self::of(fd))
    }

    /// The same end, with reads or writes that do not block, without changing it for others who
    /// hold the same end.
    ///
    /// The flag belongs to the open file description, which the shell or a supervisor may share;
    /// opening the pipe anew through /proc gives a description of our own. Where that is not
    /// possible (no /proc, a pipe of another user), the shared one is changed, and set back at the
    /// end.
    ///
    /// # Errors
    /// When the description can neither be opened anew nor changed.
    pub fn nonblocking(mut self) -> io::Result<Self> {
        let access = match READS {
            true => OFlag::O_RDONLY,
            false => OFlag::O_WRONLY,
        };
        if let Ok(own) = open_anew(&self.fd, access) {
            return Ok(Self::of(own));
        }
        let flags = flags(&self.fd)?;
        fcntl(&self.fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        self.set_back = Some(flags);
        Ok(self)
    }
}

impl<const READS: bool> Drop for PipeEnd<READS> {
    fn drop(&mut self) {
        if let Some(flags) = self.set_back {
            let _ = fcntl(&self.fd, FcntlArg::F_SETFL(flags));
        }
    }
}

impl<const READS: bool> AsFd for PipeEnd<READS> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The result of one attempt to move data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moved {
    /// This number of bytes, at least one.
    Bytes(usize),
    /// Nothing now: the source is empty or the target full.
    WouldBlock,
    /// Nothing ever again: the source is empty, and its write end is closed.
    End,
}

impl Moved {
    /// The bytes that moved, where it makes no difference why there are none.
    pub(crate) fn bytes(self) -> usize {
        match self {
            Moved::Bytes(bytes) => bytes,
            Moved::WouldBlock | Moved::End => 0,
        }
    }
}

/// A pipe of our own, both ends of which are one descriptor, that does not block.
#[derive(Debug)]
pub(crate) struct BothEnds(OwnedFd);

impl BothEnds {
    /// A new pipe that holds up to `bytes`, or as many as the kernel allows if that is fewer, and
    /// its capacity in bytes.
    ///
    /// # Errors
    /// Where there is no /proc, and when no more descriptors can be had.
    pub(crate) fn new(bytes: usize) -> io::Result<(Self, usize)> {
        let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        let both = open_anew(&write, OFlag::O_RDWR)?;
        drop((read, write));
        let capacity = grow(&both, bytes)? * slot();
        Ok((Self(both), capacity))
    }
}

impl AsFd for BothEnds {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Where data can be spliced from.
pub trait Source: AsFd {}

impl Source for ReadEnd {}
impl Source for BothEnds {}

/// A new pipe, both ends close-on-exec and blocking.
///
/// # Errors
/// When no more descriptors can be had.
pub fn new() -> Result<(ReadEnd, WriteEnd)> {
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).context("creating a pipe")?;
    Ok((PipeEnd::of(read), PipeEnd::of(write)))
}

/// How many bytes can be taken out of a pipe now.
///
/// # Errors
/// None for an open pipe.
pub fn available(pipe: impl AsFd) -> io::Result<usize> {
    Ok(rustix::io::ioctl_fionread(pipe)? as usize)
}

/// True if a pipe has no free slot. Unlike [`available`], and unlike an attempt to fill it, this
/// does not wait for the pipe's mutex, which a reader holds while it copies.
///
/// # Errors
/// None for an open pipe.
pub(crate) fn is_full(pipe: &WriteEnd) -> io::Result<bool> {
    Ok(poll(pipe, PollFlags::POLLOUT, PollTimeout::ZERO)?.is_empty())
}

/// The capacity of a pipe in slots.
///
/// # Errors
/// None for an open pipe.
pub fn slots(pipe: impl AsFd) -> io::Result<usize> {
    let bytes = fcntl(pipe, FcntlArg::F_GETPIPE_SZ)?;
    Ok(slots_in(bytes, slot()))
}

/// The slots, of `slot` bytes each, of a pipe whose capacity the kernel gives in bytes.
fn slots_in(bytes: libc::c_int, slot: usize) -> usize {
    usize::try_from(bytes).map_or(1, |bytes| bytes / slot)
}

/// Gives a pipe a capacity of `bytes` (a power of two), and returns it in slots.
///
/// # Errors
/// `EPERM` where a limit is in the way of a larger one, `EBUSY` where the pipe holds too much for a
/// smaller one.
pub(crate) fn resize(pipe: impl AsFd, bytes: usize) -> io::Result<usize> {
    let got = fcntl(pipe, FcntlArg::F_SETPIPE_SZ(bytes as libc::c_int))?;
    Ok(slots_in(got, slot()))
}

/// Gives a pipe the largest capacity that the kernel allows, up to `wanted` bytes, and returns it
/// in slots.
///
/// Asking for too much is refused outright (`EPERM` beyond `/proc/sys/fs/pipe-max-size`, or when
/// the user's pipes hold more than `pipe-user-pages-soft`), and capacities are powers of two: so
/// this halves until it is not refused. A pipe is never made smaller.
///
/// # Errors
/// None for an open pipe.
pub fn grow(pipe: impl AsFd, wanted: usize) -> io::Result<usize> {
    let current = slots(&pipe)?;
    let mut bytes = wanted.next_power_of_two();
    while bytes > current * slot() {
        match resize(&pipe, bytes) {
            Ok(got) => return Ok(got),
            Err(_) => bytes /= 2,
        }
    }
    Ok(current)
}

fn setting(name: &str) -> Option<usize> {
    let text = std::fs::read_to_string(format!("/proc/sys/fs/{name}")).ok()?;
    text.trim().parse().ok()
}

/// The largest capacity, in bytes, that a pipe of an ordinary user can be given.
pub(crate) fn max_size() -> usize {
    setting("pipe-max-size").unwrap_or(DEFAULT_MAX_SIZE)
}

/// How many pages the pipes of an ordinary user may have, over all processes. 0 is no limit.
pub(crate) fn user_pages() -> usize {
    setting("pipe-user-pages-soft").unwrap_or(DEFAULT_USER_PAGES)
}

/// True if this process's user may have any amount of memory in pipes: others share
/// `pipe-user-pages-soft` pages (64 MiB by default) between all their processes.
pub(crate) fn are_unlimited() -> bool {
    static UNLIMITED: OnceLock<bool> = OnceLock::new();
    let unlimited = || {
        if setting("pipe-user-pages-soft")? == 0 {
            return Some(true);
        }
        // The kernel asks for one of these in the initial user namespace.
        let is_initial = is_initial_user_namespace()?;
        let mine = rustix::thread::capabilities(None).ok()?.effective;
        let exempting = CapabilitySet::SYS_RESOURCE | CapabilitySet::SYS_ADMIN;
        Some(is_initial && mine.intersects(exempting))
    };
    *UNLIMITED.get_or_init(|| unlimited().unwrap_or(false))
}

/// True if the user namespace is the one that maps every user to itself; `None` without /proc.
fn is_initial_user_namespace() -> Option<bool> {
    let map = std::fs::read_to_string("/proc/self/uid_map").ok()?;
    Some(map.split_whitespace().eq(["0", "0", "4294967295"]))
}

/// Takes `bytes` of the memory that the user's pipes may have, in pipes of 1 MiB or the most that
/// is allowed, so that pipes that grow until these are closed leave it to others. `None`: the
/// user's pipes may not have that much more.
pub(crate) fn reserve(bytes: usize) -> Option<Vec<OwnedFd>> {
    let mut pipes = Vec::new();
    if are_unlimited() {
        return Some(pipes);
    }
    let each = max_size().min(DEFAULT_MAX_SIZE);
    for _ in 0..bytes.div_ceil(each) {
        match nix::unistd::pipe2(OFlag::O_CLOEXEC) {
            Ok((read, _)) => {
                resize(&read, each).ok()?;
                pipes.push(read);
            }
            // Descriptors run out before pages do.
            Err(Errno::EMFILE) => break,
            Err(_) => return None,
        }
    }
    Some(pipes)
}

/// A new pipe of `wanted` slots (a power of two), or of as many as are allowed if that is fewer,
/// and how many it has.
///
/// # Errors
/// When no more descriptors can be had.
#[cfg(test)]
pub(crate) fn with_slots(wanted: usize) -> Result<(ReadEnd, WriteEnd, usize)> {
    let (read, write) = new()?;
    // Making a pipe smaller is always allowed, and where making it larger is not, it stays as it
    // is.
    let _ = resize(&write, wanted * slot());
    let got = slots(&write).context("measuring a pipe")?;
    Ok((read, write, got))
}

/// A non-blocking file description of our own for an open pipe.
fn open_anew(pipe: &OwnedFd, access: OFlag) -> nix::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", pipe.as_raw_fd());
    let flags = access | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    open(path.as_str(), flags, Mode::empty())
}

fn moved(attempt: impl FnMut() -> nix::Result<usize>) -> io::Result<Moved> {
    match uninterrupted(attempt) {
        Ok(0) => Ok(Moved::End),
        Ok(bytes) => Ok(Moved::Bytes(bytes)),
        Err(Errno::EAGAIN) => Ok(Moved::WouldBlock),
        Err(error) => Err(error.into()),
    }
}

/// Makes a call that may be refused to this process. `None`: it is, and nothing moved.
fn unless_refused(call: impl FnMut() -> nix::Result<usize>) -> Option<io::Result<Moved>> {
    match uninterrupted(call) {
        Err(errno) if is_refusal(errno) => None,
        result => Some(moved(|| result)),
    }
}

/// True if an error of `splice` or `vmsplice` means that the data has to be copied: they are not
/// allowed here, not in this kernel, or not for this kind of file. Where it means something else,
/// copying fails in the same way.
fn is_refusal(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::EPERM | Errno::ENOSYS | Errno::EOPNOTSUPP | Errno::EINVAL
    )
}

/// Moves up to `len` bytes from a pipe to a pipe or file without copying them, where that is
/// possible.
///
/// # Errors
/// `EPIPE` when the target's reader is gone, and what writing to a file can lead to.
pub fn splice(from: &impl Source, to: impl AsFd, len: usize) -> io::Result<Moved> {
    let flags = SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK;
    let spliced = unless_refused(|| nix::fcntl::splice(from, None, &to, None, len, flags));
    spliced.unwrap_or_else(|| copy(from, to, len))
}

/// Puts references to the pages of sealed memory into a pipe, or copies of them where that is not
/// possible.
///
/// # Errors
/// `EPIPE` when the pipe's reader is gone.
pub(crate) fn vmsplice(to: &WriteEnd, pieces: &[Sealed]) -> io::Result<Moved> {
    let slices = Sealed::slices(pieces);
    let flags = SpliceFFlags::SPLICE_F_NONBLOCK;
    let spliced = unless_refused(|| nix::fcntl::vmsplice(to, slices, flags));
    spliced.unwrap_or_else(|| copy_memory(to, pieces))
}

/// Bytes copied at a time.
const COPY: usize = 32 << 10;

/// Bytes that a pipe with a free slot takes without blocking (`PIPE_BUF` in the kernel).
const ONE_SLOT: usize = 4096;

/// Copies from a pipe as `splice` would move, without blocking: no more is taken out than fits into
/// the target, whose only writer is this process.
fn copy(from: &impl Source, to: impl AsFd, len: usize) -> io::Result<Moved> {
    let mut buffer = [0; COPY];
    let mut copied = 0;
    while copied < len {
        let ready = available(from)?;
        if ready == 0 {
            let events = poll(from, PollFlags::POLLIN, PollTimeout::ZERO)?;
            if copied == 0 && events == PollFlags::POLLHUP {
                return Ok(Moved::End);
            }
            break;
        }
        let most = ready.min(len - copied).min(room(&to)?).min(COPY);
        if most == 0 {
            break;
        }
        let taken = uninterrupted(|| nix::unistd::read(from, &mut buffer[..most]))?;
        let mut rest = &buffer[..taken];
        while !rest.is_empty() {
            match uninterrupted(|| nix::unistd::write(&to, rest))? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                written => rest = &rest[written..],
            }
        }
        copied += taken;
    }
    Ok(copied_or_would_block(copied))
}

/// Copies from memory as `vmsplice` would refer to it, without blocking.
fn copy_memory(to: &WriteEnd, pieces: &[Sealed]) -> io::Result<Moved> {
    let mut copied = 0;
    for piece in pieces {
        let mut rest = piece.bytes();
        while !rest.is_empty() {
            let most = rest.len().min(room(to)?);
            if most == 0 {
                return Ok(copied_or_would_block(copied));
            }
            let written = uninterrupted(|| nix::unistd::write(to, &rest[..most]))?;
            rest = &rest[written..];
            copied += written;
        }
    }
    Ok(copied_or_would_block(copied))
}

fn copied_or_would_block(copied: usize) -> Moved {
    match copied {
        0 => Moved::WouldBlock,
        bytes => Moved::Bytes(bytes),
    }
}

/// Bytes that can be written without blocking: all that an empty pipe holds, or what one slot does.
/// Other files take anything. A pipe without a reader takes some too: the write then fails.
fn room(to: impl AsFd) -> io::Result<usize> {
    if poll(&to, PollFlags::POLLOUT, PollTimeout::ZERO)?.is_empty() {
        return Ok(0);
    }
    match fcntl(&to, FcntlArg::F_GETPIPE_SZ) {
        Ok(capacity) if available(&to)? == 0 => Ok(usize::try_from(capacity).unwrap_or(ONE_SLOT)),
        Ok(_) => Ok(ONE_SLOT),
        Err(_) => Ok(usize::MAX),
    }
}

/// Reads from a pipe (made non-blocking before).
///
/// # Errors
/// None for an open pipe.
pub fn read(from: &impl Source, buffer: &mut [u8]) -> io::Result<Moved> {
    moved(|| nix::unistd::read(from, buffer))
}

/// Writes to a pipe (made non-blocking before).
///
/// # Errors
/// `EPIPE` when the pipe's reader is gone.
pub fn write(to: &WriteEnd, bytes: &[u8]) -> io::Result<Moved> {
    moved(|| nix::unistd::write(to, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_for_more_than_is_allowed_holds_as_much_as_is_allowed() {
        let (pipe, capacity) = BothEnds::new(LARGEST).unwrap();
        let (read, _write) = new().unwrap();
        assert_eq!(capacity, grow(&read, LARGEST).unwrap() * slot());
        assert_eq!(capacity, slots(&pipe).unwrap() * slot());
    }

    #[test]
    fn an_end_is_refused_where_the_other_is_needed() {
        let (read, write) = nix::unistd::pipe().unwrap();
        assert!(ReadEnd::new(write).is_err());
        assert!(WriteEnd::new(read).is_err());
    }

    #[test]
    fn empty_full_and_ended_are_told_apart() {
        let (read, write) = new().unwrap();
        let (read, write) = (read.nonblocking().unwrap(), write.nonblocking().unwrap());
        let mut buffer = [0; 10];
        assert_eq!(super::read(&read, &mut buffer).unwrap(), Moved::WouldBlock);
        assert_eq!(super::write(&write, b"abc").unwrap(), Moved::Bytes(3));
        assert_eq!(available(&read).unwrap(), 3);
        assert!(!is_full(&write).unwrap());
        assert_eq!(super::read(&read, &mut buffer).unwrap(), Moved::Bytes(3));
        while super::write(&write, &vec![0; slot()]).unwrap() != Moved::WouldBlock {}
        assert!(is_full(&write).unwrap());
        assert_eq!(available(&read).unwrap(), slots(&read).unwrap() * slot());
        drop(write);
        while super::read(&read, &mut vec![0; slot()]).unwrap() != Moved::End {}
    }

    #[test]
    fn a_capacity_is_as_many_slots_as_it_has_pages() {
        for (bytes, page, slots) in [
            (1 << 16, 4 << 10, 16),
            (1 << 20, 4 << 10, 256),
            (1 << 20, 16 << 10, 64),
            (1 << 20, 64 << 10, 16),
            (64 << 10, 64 << 10, 1),
        ] {
            assert_eq!(slots_in(bytes, page), slots, "pages of {page} bytes");
        }
    }

    #[test]
    fn a_slot_of_a_pipe_holds_a_page() {
        let (read, write, got) = with_slots(4).unwrap();
        assert_eq!(got, 4);
        let write = write.nonblocking().unwrap();
        let written = super::write(&write, &vec![0; 5 * slot()]).unwrap();
        assert_eq!(written, Moved::Bytes(4 * slot()));
        assert_eq!(available(&read).unwrap(), 4 * slot());
    }

    /// Fills a pipe by turns of a writer that leaves odd pieces, and empties it into `to`.
    fn assert_copied(capacity: usize) {
        let (read, write) = new().unwrap();
        let (read, write) = (read.nonblocking().unwrap(), write.nonblocking().unwrap());
        let (out, into, _) = with_slots(capacity).unwrap();
        let out = out.nonblocking().unwrap();
        let bytes: Vec<u8> = (0..200_000u32).map(|number| (number / 7) as u8).collect();
        let (mut written, mut received) = (0, Vec::new());
        let mut buffer = [0; 3000];
        while received.len() < bytes.len() {
            let piece = &bytes[written..(written + 777).min(bytes.len())];
            if let Moved::Bytes(more) = super::write(&write, piece).unwrap() {
                written += more;
            }
            let full = copy(&read, &into, usize::MAX).unwrap() == Moved::WouldBlock;
            assert!(!full || available(&read).unwrap() == 0 || available(&into).unwrap() > 0);
            if let Moved::Bytes(taken) = super::read(&out, &mut buffer).unwrap() {
                received.extend_from_slice(&buffer[..taken]);
            }
        }
        assert!(received == bytes);
        // A process that another test is starting has these ends open until its program runs.
        drop(write);
        while copy(&read, &into, 1).unwrap() != Moved::End {}
        drop(out);
        let (read, write) = new().unwrap();
        let error = loop {
            super::write(&write, b"abc").unwrap();
            if let Err(error) = copy(&read, &into, 3) {
                break error;
            }
        };
        assert_eq!(error.raw_os_error(), Some(Errno::EPIPE as i32));
    }

    #[test]
    fn what_can_only_be_copied_arrives_without_blocking_or_losing_a_byte() {
        for capacity in [1, 2, DEFAULT_SLOTS] {
            assert_copied(capacity);
        }
    }

    #[test]
    fn what_is_refused_is_to_be_copied_and_all_else_is_a_result() {
        for refusal in [Errno::EINVAL, Errno::EPERM, Errno::ENOSYS] {
            assert!(unless_refused(|| Err(refusal)).is_none());
        }
        assert!(unless_refused(|| Err(Errno::EPIPE)).is_some_and(|moved| moved.is_err()));
        assert!(unless_refused(|| Ok(1)).is_some_and(|moved| moved.is_ok()));
    }

    #[test]
    fn a_pipe_grows_as_far_as_allowed_and_never_shrinks() {
        let (read, _write) = new().unwrap();
        let grown = grow(&read, LARGEST).unwrap();
        assert!(grown >= DEFAULT_SLOTS);
        assert_eq!(grow(&read, slot()).unwrap(), grown);
    }

    #[test]
    fn making_one_end_nonblocking_leaves_other_holders_alone() {
        let (read, _write) = new().unwrap();
        let other = read.fd.try_clone().unwrap();
        let _ours = read.nonblocking().unwrap();
        assert!(!flags(&other).unwrap().contains(OFlag::O_NONBLOCK));
    }
}
