//! The descriptors that the command line names: the only place that handles raw numbers.
//!
//! Each number is checked before any is claimed, and all before this program opens a descriptor of
//! its own: otherwise a number that was not open could be mistaken for one of ours.
//!
//! **Two names for one file.** With `capture >app.img 2>&1` a message would stand in the middle of
//! the image, although standard output and standard error have different numbers. So descriptors
//! are compared by the files they lead to, and standard error counts as named, since errors go
//! there whatever `--progress-fd` says.

#![allow(unsafe_code)]

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};
use libc::{dev_t, ino_t};
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::socket::{SockType, getsockopt, sockopt};
use nix::sys::stat::{fstat, makedev};

use crate::os::descriptor::{Direction, FdKind, flags};

/// The number of a descriptor, as typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct FdNumber(RawFd);

pub(super) const STDIN: FdNumber = FdNumber(0);
pub(super) const STDOUT: FdNumber = FdNumber(1);
pub(super) const STDERR: FdNumber = FdNumber(2);

impl FromStr for FdNumber {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.parse().ok().filter(|&number| number >= 0);
        let why = || format!("{text:?} is no file descriptor: give its number, such as 10");
        number.map(Self).ok_or_else(why)
    }
}

impl fmt::Display for FdNumber {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FdNumber {
    fn peek<T>(self, look: impl FnOnce(BorrowedFd) -> T) -> T {
        // SAFETY: the borrow lasts for this call, in which nothing closes descriptors: there are
        // no threads yet. If the number belongs to no open file, system calls on it say so.
        look(unsafe { BorrowedFd::borrow_raw(self.0) })
    }

    fn kind(self) -> FdKind {
        self.peek(|fd| FdKind::of(fd))
    }

    /// The file that data going in this direction must have to itself. A pipe is one file: what
    /// goes into one end comes out of the other. The two directions of a socket are two streams:
    /// sshd gives a command one socket for both. /dev/null keeps nothing, and a terminal shows
    /// everything.
    fn file(self, direction: Direction) -> Option<FileId> {
        let stat = self.peek(|fd| fstat(fd)).ok()?;
        let is_shared = match self.kind() {
            FdKind::NotOpen | FdKind::Terminal | FdKind::CharacterDevice => true,
            FdKind::Socket => direction == Direction::In,
            _ => false,
        };
        (!is_shared).then_some((stat.st_dev, stat.st_ino))
    }

    /// True if text written here lands where standard error's text lands.
    pub(super) fn is_stderr(self) -> bool {
        let file = self.file(Direction::Out);
        self == STDERR || (file.is_some() && file == STDERR.file(Direction::Out))
    }

    /// True if a standard stream was closed when the program started: Rust's runtime then opens
    /// /dev/null in its place, and an image written there is lost. Shells do not open /dev/null
    /// for both reading and writing, which makes the difference.
    pub(super) fn was_closed_at_start(self) -> bool {
        let device = self.peek(|fd| fstat(fd)).map(|stat| stat.st_rdev);
        let flags = self.peek(|fd| flags(fd));
        let mode = flags.map(|flags| flags & OFlag::O_ACCMODE);
        self.0 <= 2 && device == Ok(makedev(1, 3)) && mode == Ok(OFlag::O_RDWR)
    }

    /// Checks that an image can go through in this direction.
    fn check_transfer(self, what: &str, direction: Direction) -> Result<()> {
        let (wrong_mode, redirect, purpose) = match direction {
            Direction::Out => (OFlag::O_RDONLY, format!("{self}>file"), "writing"),
            Direction::In => (OFlag::O_WRONLY, format!("{self}<file"), "reading"),
        };
        let kind = self.kind();
        ensure!(
            !matches!(kind, FdKind::Terminal | FdKind::Directory | FdKind::Special),
            "{what} is {kind}, which cannot carry an image: redirect it to a pipe or file, such as {redirect}, or give --shard-fds or --shard-cmd"
        );
        let flags = self.peek(|fd| flags(fd))?;
        ensure!(
            flags & OFlag::O_ACCMODE != wrong_mode && !flags.contains(OFlag::O_PATH),
            "{what} is {kind} that is not open for {purpose}: exchange < and >"
        );
        if kind == FdKind::Socket {
            let socket = self.peek(|fd| getsockopt(&fd, sockopt::SockType));
            ensure!(
                socket == Ok(SockType::Stream),
                "{what} is a socket that does not carry a stream: give a TCP or UNIX stream socket"
            );
        }
        Ok(())
    }

    /// Takes ownership of a descriptor that was checked, and keeps it from being passed on.
    pub(super) fn claim(self) -> Result<OwnedFd> {
        if self.0 > 2 {
            // SAFETY: the descriptor is open, and the command line gave it to us. `Plan::new`
            // checks all numbers with the same `Checks`, so that it has no second owner here.
            let fd = unsafe { OwnedFd::from_raw_fd(self.0) };
            fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).context("claiming a descriptor")?;
            return Ok(fd);
        }
        let copy = self
            .peek(|fd| fd.try_clone_to_owned())
            .context("claiming a descriptor")?;
        let null = File::options().read(true).write(true).open("/dev/null");
        let null = null.context("opening /dev/null")?;
        match self {
            STDIN => nix::unistd::dup2_stdin(null)?,
            STDOUT => nix::unistd::dup2_stdout(null)?,
            // Errors still go there.
            _ => {}
        }
        Ok(copy)
    }
}

/// A file's device and inode.
type FileId = (dev_t, ino_t);

/// The purpose of a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// The image, or an external file.
    Image(Direction),
    /// Lines, which may stand beside errors.
    Text,
}

/// The descriptors named so far, and the files that they lead to, each with what has named it.
pub(super) struct Checks {
    numbers: HashMap<FdNumber, String>,
    files: HashMap<FileId, String>,
}

impl Checks {
    pub(super) fn new() -> Self {
        let named = |file| (file, "standard error, where errors are told".to_owned());
        Self {
            numbers: HashMap::new(),
            files: STDERR.file(Direction::Out).map(named).into_iter().collect(),
        }
    }

    /// Checks a descriptor that was `named` so, by an option.
    pub(super) fn check(
        &mut self,
        number: FdNumber,
        named: String,
        purpose: Purpose,
    ) -> Result<()> {
        if let Some(other) = self.numbers.insert(number, named.clone()) {
            bail!("{named} is used twice (also by {other}): give each its own descriptor");
        }
        ensure!(
            number.kind() != FdKind::NotOpen && !number.was_closed_at_start(),
            "{named} is not open: redirect it, such as {number}>… or {number}<…"
        );
        let direction = match purpose {
            Purpose::Image(direction) => {
                number.check_transfer(&named, direction)?;
                direction
            }
            Purpose::Text if number.is_stderr() => return Ok(()),
            Purpose::Text => Direction::Out,
        };
        if let Some(file) = number.file(direction)
            && let Some(other) = self.files.insert(file, named.clone())
        {
            bail!(
                "{named} leads to the same file, pipe or socket as {other}, and they would get into each other's way: redirect one of them elsewhere"
            );
        }
        Ok(())
    }
}
