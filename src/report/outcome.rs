//! How a streamer in the background has ended: for CRIU's hook, which has started it and waits for
//! it, and for people and scripts that come later.
//!
//! The hook hears lines, first through a pipe, and at `post-dump` through a connection to the
//! streamer's socket: milestones, and then `succeeded` or the reason of the failure. An end without
//! either means that the streamer was killed. The same end is left in a file, behind a line with
//! the CRIU that has started the streamer. Nothing is decided by that file.

use std::cell::RefCell;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, renameat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::notice::write_text;
use super::progress::Milestone;

/// The end of a streamer that has done all it had to.
const SUCCESS: &str = "succeeded";

/// Bytes of an outcome that are read: a reason has some hundred.
const MAX_OUTCOME: u64 = 64 << 10;

/// The hook that waits for a streamer, as this hears of it.
#[derive(Debug, Clone)]
pub(crate) struct Hook {
    listens_to: Rc<RefCell<File>>,
    goes_on_when_copied: bool,
}

impl Hook {
    /// A hook that listens to a pipe.
    pub(crate) fn new(pipe: OwnedFd, goes_on_when_copied: bool) -> Self {
        Self {
            listens_to: Rc::new(RefCell::new(pipe.into())),
            goes_on_when_copied,
        }
    }

    /// From now on it listens to this connection.
    pub(crate) fn connects(&self, connection: OwnedFd) {
        self.listens_to.replace(connection.into());
    }

    /// Tells of a milestone.
    pub(crate) fn reached(&self, milestone: Milestone) {
        if milestone != Milestone::MemoryCopied || self.goes_on_when_copied {
            self.tell(milestone.line());
        }
    }

    /// Tells how the streamer has ended: the reason of its failure, if it has failed.
    pub(crate) fn ended(&self, failure: Option<&str>) {
        self.tell(failure.unwrap_or(SUCCESS));
    }

    fn tell(&self, line: &str) {
        // A hook that is gone has CRIU behind it, whose end shows.
        let _ = write_text(&*self.listens_to.borrow(), &format!("{line}\n"));
    }
}

/// What a streamer has said in the end.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Said {
    /// It has succeeded, or has come far enough.
    GoOn,
    /// The reason of its failure.
    Failed(String),
    /// Nothing: it was killed.
    Nothing,
}

/// Hears a streamer until it has ended, or has reached a milestone that is `enough`.
pub(crate) fn hear(streamer: impl Read, enough: Option<Milestone>) -> Said {
    let mut said = Vec::new();
    for line in BufReader::new(streamer).lines().map_while(Result::ok) {
        if enough.is_some_and(|milestone| line == milestone.line()) {
            return Said::GoOn;
        }
        if line != Milestone::MemoryCopied.line() {
            said.push(line);
        }
    }
    end(&said.join("\n"))
}

fn end(text: &str) -> Said {
    match text.trim_end() {
        SUCCESS => Said::GoOn,
        "" => Said::Nothing,
        reason => Said::Failed(reason.to_owned()),
    }
}

/// Leaves the end of a streamer that `starter` has started in a file, which is there as a whole or
/// not at all.
///
/// # Errors
/// Those of writing it.
pub(crate) fn leave(
    directory: impl AsFd,
    name: &str,
    starter: &str,
    failure: Option<&str>,
) -> Result<()> {
    let unfinished = format!(".{name}");
    let mut file = File::from(create(&directory, &unfinished)?);
    let end = failure.unwrap_or(SUCCESS);
    file.write_all(format!("{starter}\n{end}\n").as_bytes())?;
    Ok(renameat(&directory, unfinished.as_str(), &directory, name)?)
}

/// The reason why a streamer that `starter` has started has failed, as far as its file tells.
pub(crate) fn left(directory: impl AsFd, name: &str, starter: &str) -> Option<String> {
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let mut text = String::new();
    let read = openat(directory, name, flags, Mode::empty())
        .map(|file| File::from(file).take(MAX_OUTCOME).read_to_string(&mut text));
    read.ok()?.ok()?;
    let (by, text) = text.split_once('\n')?;
    match end(text) {
        Said::Failed(reason) if by == starter => Some(reason),
        _ => None,
    }
}

/// Creates a file of ours in a directory, in place of what has its name there.
///
/// # Errors
/// When the name cannot be had.
pub(crate) fn create(directory: impl AsFd, name: &str) -> Result<OwnedFd> {
    remove(&directory, name)?;
    let flags = OFlag::O_WRONLY | OFlag::O_APPEND | OFlag::O_CREAT | OFlag::O_EXCL;
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    openat(directory, name, flags | OFlag::O_CLOEXEC, mode).context("creating it")
}

/// Removes what has this name in a directory, if anything has.
///
/// # Errors
/// When it stays.
pub(crate) fn remove(directory: impl AsFd, name: &str) -> Result<()> {
    match unlinkat(directory, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(error) => Err(error).context("removing an earlier one"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(text: &str, enough: Option<Milestone>) -> Said {
        hear(text.as_bytes(), enough)
    }

    #[test]
    fn only_an_end_that_was_told_is_one() {
        let failed = |reason: &str| Said::Failed(reason.into());
        assert_eq!(heard("succeeded\n", None), Said::GoOn);
        assert_eq!(heard("a: no\nand b\n", None), failed("a: no\nand b"));
        for cut in ["", "memory-copied\n"] {
            assert_eq!(heard(cut, None), Said::Nothing, "{cut:?}");
        }
        let copied = Some(Milestone::MemoryCopied);
        assert_eq!(heard("memory-copied\nlate\n", copied), Said::GoOn);
        assert_eq!(heard("memory-copied\nlate\n", None), failed("late"));
    }

    #[test]
    fn a_reason_is_that_of_the_streamer_that_left_it() {
        let place = tempfile::TempDir::new().unwrap();
        let directory = File::open(place.path()).unwrap();
        let left = |starter: &str| left(&directory, "outcome", starter);
        assert_eq!(left("CRIU 1 2"), None);
        for failure in [None, Some("a: no")] {
            leave(&directory, "outcome", "CRIU 1 2", failure).unwrap();
            assert_eq!(left("CRIU 1 2").as_deref(), failure);
            assert_eq!(left("CRIU 1 23"), None);
        }
    }

    /// Others may be able to write to the images directory.
    #[test]
    fn what_stands_under_a_name_is_replaced_and_never_written_to() {
        let place = tempfile::TempDir::new().unwrap();
        let directory = File::open(place.path()).unwrap();
        let victim = place.path().join("victim");
        std::fs::write(&victim, "precious").unwrap();
        let name = place.path().join("log");
        std::os::unix::fs::symlink(&victim, &name).unwrap();
        create(&directory, "log").unwrap();
        std::fs::remove_file(&name).unwrap();
        std::fs::hard_link(&victim, &name).unwrap();
        let mut log = File::from(create(&directory, "log").unwrap());
        log.write_all(b"said").unwrap();
        assert_eq!(std::fs::read(&victim).unwrap(), b"precious");
        assert_eq!(std::fs::read(&name).unwrap(), b"said");
    }
}
