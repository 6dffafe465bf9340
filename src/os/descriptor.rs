//! The kind of file behind a descriptor, and the direction of data through it.

use std::fmt;
use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::stat::{SFlag, fstat};
use nix::unistd::fsync;

/// The direction of data, seen from this program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Direction {
    In,
    Out,
}

/// Repeats a system call for as long as signals interrupt it.
pub(crate) fn uninterrupted<T>(mut attempt: impl FnMut() -> nix::Result<T>) -> nix::Result<T> {
    loop {
        match attempt() {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// Waits until one of the wanted things can be done with a descriptor, or something has happened to
/// it, and returns all of these; empty when the time is over.
pub(crate) fn poll(
    fd: impl AsFd,
    wanted: PollFlags,
    timeout: impl Into<PollTimeout>,
) -> nix::Result<PollFlags> {
    let mut fds = [PollFd::new(fd.as_fd(), wanted)];
    let timeout = timeout.into();
    uninterrupted(|| nix::poll::poll(&mut fds, timeout))?;
    Ok(fds[0].revents().unwrap_or(PollFlags::empty()))
}

/// The flags of a descriptor's file description.
pub(crate) fn flags(fd: impl AsFd) -> nix::Result<OFlag> {
    fcntl(fd, FcntlArg::F_GETFL).map(OFlag::from_bits_retain)
}

/// A path of a file in an open directory: short, and good when the directory's own path is gone.
pub(crate) fn path_in(directory: impl AsFd, name: impl AsRef<Path>) -> PathBuf {
    let directory = directory.as_fd().as_raw_fd();
    Path::new("/proc/self/fd")
        .join(directory.to_string())
        .join(name)
}

/// The path that a link in /proc shows, if it leads to the same directory: it may be another mount
/// namespace's, or gone.
pub(crate) fn resolved(link: PathBuf) -> PathBuf {
    let identity = |path: &Path| fs::metadata(path).map(|it| (it.dev(), it.ino())).ok();
    match fs::read_link(&link) {
        Ok(path) if identity(&path).is_some_and(|it| Some(it) == identity(&link)) => path,
        _ => link,
    }
}

/// Brings to disk what was written to a file or directory.
pub(crate) fn flush(file: impl AsFd) -> nix::Result<()> {
    match uninterrupted(|| fsync(&file)) {
        // There is no disk behind it.
        Err(Errno::EINVAL | Errno::EROFS) => Ok(()),
        result => result,
    }
}

/// The kind of file that a descriptor leads to. Displayed, it is a phrase for an error message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FdKind {
    NotOpen,
    RegularFile,
    Directory,
    Pipe,
    Socket,
    BlockDevice,
    Terminal,
    CharacterDevice,
    Special,
}

impl FdKind {
    pub(crate) fn of(fd: impl AsFd) -> Self {
        let Ok(stat) = fstat(&fd) else {
            return Self::NotOpen;
        };
        match SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) {
            SFlag::S_IFREG => Self::RegularFile,
            SFlag::S_IFDIR => Self::Directory,
            SFlag::S_IFIFO => Self::Pipe,
            SFlag::S_IFSOCK => Self::Socket,
            SFlag::S_IFBLK => Self::BlockDevice,
            SFlag::S_IFCHR if nix::unistd::isatty(fd).unwrap_or(false) => Self::Terminal,
            SFlag::S_IFCHR => Self::CharacterDevice,
            _ => Self::Special,
        }
    }
}

impl fmt::Display for FdKind {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::NotOpen => "not open",
            Self::RegularFile => "a regular file",
            Self::Directory => "a directory",
            Self::Pipe => "a pipe",
            Self::Socket => "a socket",
            Self::BlockDevice => "a block device",
            Self::Terminal => "a terminal",
            Self::CharacterDevice => "a character device",
            Self::Special => "a special file",
        })
    }
}
