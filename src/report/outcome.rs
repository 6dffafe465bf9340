//! The outcome of a streamer in the background: for CRIU's hook, which has started it and waits for
//! it, and for people and scripts that come later.
//!
//! The hook hears lines, first through a pipe, and at `post-dump` through a connection to the
//! streamer's socket: milestones, and then `succeeded` or the reason of the failure. An end without
//! either means that the streamer was killed. The same end is left in a file, by which nothing is
//! decided.

use std::cell::RefCell;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, renameat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::milestone::Milestone;
use super::notice::write_text;

/// The end of a streamer that has done all it had to.
const SUCCESS: &str = "succeeded";

/// The reason where there is no end.
pub(crate) const NO_ANSWER: &str = "no streamer answers: its log, streamer-capture.log or streamer-serve.log, has the reason; where it has none, the streamer was killed, or crashed, or this CRIU has not started the hook at `pre-stream`: start it with --stream, or without the hook; discard what there is of the image";

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

/// Hears a streamer until it has succeeded, or has reached a milestone that is `enough`.
///
/// # Errors
/// The reason of its failure, and [`NO_ANSWER`].
pub(crate) fn hear(streamer: impl Read, enough: Option<Milestone>) -> Result<()> {
    let mut said = Vec::new();
    for line in BufReader::new(streamer).lines().map_while(Result::ok) {
        let is_enough = enough.is_some_and(|milestone| line == milestone.line());
        if is_enough || line == SUCCESS {
            return Ok(());
        }
        if line != Milestone::MemoryCopied.line() {
            said.push(line);
        }
    }
    ensure!(!said.is_empty(), NO_ANSWER);
    bail!(said.join("\n"))
}

/// Leaves the end of a streamer in a file, which is there as a whole or not at all.
///
/// # Errors
/// When it cannot be written.
pub(crate) fn leave(directory: impl AsFd, name: &str, failure: Option<&str>) -> Result<()> {
    let unfinished = format!(".{name}");
    let mut file = File::from(create(&directory, &unfinished)?);
    writeln!(file, "{}", failure.unwrap_or(SUCCESS))?;
    Ok(renameat(&directory, unfinished.as_str(), &directory, name)?)
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

    #[test]
    fn only_an_end_that_was_told_is_one() {
        let heard = |text: &str, enough| {
            let heard = hear(text.as_bytes(), enough);
            heard.map_err(|error| error.to_string())
        };
        assert_eq!(heard("succeeded\n", None), Ok(()));
        assert_eq!(heard("a: no\nand b\n", None), Err("a: no\nand b".into()));
        for cut in ["", "memory-copied\n"] {
            assert_eq!(heard(cut, None), Err(NO_ANSWER.into()), "{cut:?}");
        }
        let copied = Some(Milestone::MemoryCopied);
        assert_eq!(heard("memory-copied\nlate\n", copied), Ok(()));
        assert_eq!(heard("memory-copied\nlate\n", None), Err("late".into()));
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
