//! The outcome of a streamer in the background: for CRIU's hook, which has started it and waits for
//! it, and for people and scripts that come later.
//!
//! The hook hears lines, first through a pipe, and at `post-dump` through a connection to the
//! streamer's socket: milestones, and then `succeeded` or the reason of the failure. An end without
//! either means that the streamer was killed. The same end is left in a file, by which nothing is
//! decided.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::rc::Rc;

use anyhow::{Result, bail, ensure};

use super::milestone;
use super::notice::write_text;
use crate::os::descriptor::path_in;

/// The end of a streamer that has done all it had to.
pub(crate) const SUCCESS: &str = "succeeded";

/// The reason where there is no end.
pub(crate) const NO_ANSWER: &str = "no streamer answers: its log, streamer-capture.log or streamer-serve.log, has the reason; where it has none, the streamer was killed, or crashed, or this CRIU has not started the hook at `pre-stream`: start it with --stream, or without the hook; discard what there is of the image";

/// The hook that waits for a streamer. It reads from a pipe, and from `post-dump` on from a
/// connection.
#[derive(Debug, Clone)]
pub(crate) struct Hook(pub(crate) Rc<RefCell<File>>);

impl Hook {
    /// Tells of a milestone, or how the streamer has ended.
    pub(crate) fn tell(&self, line: &str) {
        // A hook that is gone has CRIU behind it, whose end shows.
        let _ = write_text(&*self.0.borrow(), &format!("{line}\n"));
    }
}

/// Hears a streamer until it has succeeded, or has reached a milestone that is `enough`.
///
/// # Errors
/// The reason of its failure, and [`NO_ANSWER`].
pub(crate) fn hear(streamer: impl Read, enough: Option<&str>) -> Result<()> {
    let mut said = Vec::new();
    for line in BufReader::new(streamer).lines().map_while(Result::ok) {
        let is_enough = enough.is_some_and(|milestone| line == milestone);
        if is_enough || line == SUCCESS {
            return Ok(());
        }
        if line != milestone::MEMORY_COPIED {
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
pub(crate) fn leave(directory: impl AsFd, name: &str, end: &str) -> io::Result<()> {
    let unfinished = format!(".{name}");
    writeln!(create(&directory, &unfinished)?, "{}", end)?;
    fs::rename(path_in(&directory, &unfinished), path_in(&directory, name))
}

/// Creates a file of ours in a directory, in place of what has its name there.
///
/// # Errors
/// When the name cannot be had.
pub(crate) fn create(directory: impl AsFd, name: &str) -> io::Result<File> {
    remove(&directory, name)?;
    let mut how = File::options();
    how.append(true).create_new(true).mode(0o600);
    how.open(path_in(directory, name))
}

/// Removes what has this name in a directory, if anything has.
///
/// # Errors
/// When it stays.
pub(crate) fn remove(directory: impl AsFd, name: &str) -> io::Result<()> {
    match fs::remove_file(path_in(directory, name)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
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
        let copied = Some(milestone::MEMORY_COPIED);
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
        let mut log = create(&directory, "log").unwrap();
        log.write_all(b"said").unwrap();
        assert_eq!(std::fs::read(&victim).unwrap(), b"precious");
        assert_eq!(std::fs::read(&name).unwrap(), b"said");
    }
}
