//! Messages to people, on standard error.
//!
//! `eprintln!` panics when standard error is a pipe without a reader, and waits for ever when its
//! reader reads nothing. Neither may end or hold up a transfer: a line that cannot be written is
//! lost after a moment.

use std::fmt::Display;
use std::io;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::poll::PollFlags;

use crate::os::descriptor::{poll, uninterrupted};

/// The longest time that a full pipe may hold up the transfer for each piece of a line, in
/// milliseconds.
const WRITE_TIMEOUT: u16 = 1000;

/// Bytes that a pipe with a free slot takes at once (`PIPE_BUF`).
const MAX_PIECE: usize = 4096;

/// Warns of something that does not end the program.
pub(crate) fn warn(what: impl Display) {
    // A warning that cannot be written cannot be reported either.
    let _ = write_text(io::stderr(), &format!("criu-image-streamer: {what}\n"));
}

/// Tells a person something, in lines of its own.
pub(crate) fn tell(text: impl Display) {
    let _ = write_text(io::stderr(), &format!("{text}\n"));
}

/// Reports the reason why the program failed.
pub(crate) fn error(fd: impl AsFd, error: &anyhow::Error) {
    let _ = write_text(fd, &format!("criu-image-streamer Error: {error:#}\n"));
}

/// Writes text to a descriptor that may block, and fails (`ETIMEDOUT`) when the reader takes
/// nothing.
pub(super) fn write_text(fd: impl AsFd, text: &str) -> io::Result<()> {
    write_patiently(fd, text, || Err(Errno::ETIMEDOUT.into()))
}

/// Writes text to a descriptor that may block, and waits for its reader for as long as `go_on` has
/// no error: it is asked when the reader has taken nothing for [`WRITE_TIMEOUT`].
pub(crate) fn write_patiently<E: From<io::Error>>(
    fd: impl AsFd,
    text: &str,
    mut go_on: impl FnMut() -> Result<(), E>,
) -> Result<(), E> {
    let mut left = text.as_bytes();
    while !left.is_empty() {
        let ready = poll(&fd, PollFlags::POLLOUT, WRITE_TIMEOUT).map_err(io::Error::from)?;
        if ready.is_empty() {
            go_on()?;
            continue;
        }
        let piece = &left[..left.len().min(MAX_PIECE)];
        match uninterrupted(|| nix::unistd::write(&fd, piece)) {
            Ok(written) => left = &left[written..],
            // Another writer was faster.
            Err(Errno::EAGAIN) => {}
            Err(error) => return Err(io::Error::from(error).into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::pipe;

    #[test]
    fn a_full_pipe_whose_reader_reads_nothing_is_given_up() {
        let (_read, write) = pipe::new().unwrap();
        let capacity = pipe::slots(&write).unwrap() * pipe::slot();
        let error = write_text(&write, &"x".repeat(capacity + 1)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::ETIMEDOUT as i32));
    }

    #[test]
    fn a_pipe_without_a_reader_is_an_error_and_no_panic() {
        let (read, write) = pipe::new().unwrap();
        drop(read);
        // A process that another test is starting has it open until its program runs.
        let error = loop {
            if let Err(error) = write_text(&write, "socket-init\n") {
                break error;
            }
        };
        assert_eq!(error.raw_os_error(), Some(Errno::EPIPE as i32));
    }
}
