//! What people are told on standard error, whoever reads it.
//!
//! `eprintln!` panics when standard error is a pipe whose reader is gone, and waits for ever when it is full and nobody empties
//! it. Neither may end or hold up a transfer: a line that cannot be written is lost after a moment.

use std::io;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::os::pipe::uninterrupted;

/// How long a pipe that nobody empties may hold up the transfer, in milliseconds, for each piece of a line.
const PATIENCE: u16 = 1000;

/// Bytes that a pipe with a free slot takes without blocking, and at once (`PIPE_BUF`).
const PIECE: usize = 4096;

/// Tells a line to whoever reads standard error.
pub fn tell(what: impl std::fmt::Display) {
    // There is nobody left to be told of a failure.
    let _ = write_line(io::stderr(), &format!("criu-image-streamer: {what}"));
}

/// Tells why the program failed.
pub fn tell_error(error: &anyhow::Error) {
    let _ = write_line(
        io::stderr(),
        &format!("criu-image-streamer Error: {error:#}"),
    );
}

/// Writes a line whole to a descriptor that may block.
///
/// # Errors
/// Those of `write`, and `ETIMEDOUT` when the other side takes nothing.
pub fn write_line(fd: impl AsFd, line: &str) -> io::Result<()> {
    write_text(fd, &format!("{line}\n"))
}

/// Writes text to a descriptor that may block.
///
/// # Errors
/// As [`write_line`].
pub fn write_text(fd: impl AsFd, text: &str) -> io::Result<()> {
    let mut left = text.as_bytes();
    while !left.is_empty() {
        let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLOUT)];
        if uninterrupted(|| poll(&mut fds, PollTimeout::from(PATIENCE)))? == 0 {
            return Err(Errno::ETIMEDOUT.into());
        }
        let piece = &left[..left.len().min(PIECE)];
        let written = uninterrupted(|| nix::unistd::write(&fd, piece))?;
        left = &left[written..];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::pipe;

    #[test]
    fn a_full_pipe_that_nobody_empties_is_given_up() {
        let (_read, write) = pipe::new().unwrap();
        let capacity = pipe::slots(&write).unwrap() * pipe::SLOT;
        let error = write_line(&write, &"x".repeat(capacity)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::ETIMEDOUT as i32));
    }

    #[test]
    fn a_pipe_that_nobody_reads_is_an_error_and_no_panic() {
        let (read, write) = pipe::new().unwrap();
        drop(read);
        let error = write_line(&write, "socket-init").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::EPIPE as i32));
    }
}
