//! The end of a stream that goes into a socket.
//!
//! A write puts data into the socket's queue. `close` then goes on sending it in the background,
//! with nobody left to report a failure to, and throws it away at once if the peer has sent
//! something that was not read: TCP answers with a reset, even to a mere greeting. So the stream is
//! ended with `shutdown`, and the socket is kept open until the peer has everything: over TCP,
//! until its kernel has acknowledged it; over a UNIX socket, until it has read it. Nothing is read
//! from the socket, as what the peer says may be meant for the program that gave the socket to us.

#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFlags, PollTimeout};
use nix::sys::socket::{Shutdown, getsockopt, shutdown, sockopt};

use crate::os::descriptor::poll;

/// The interval between two looks at the queue, for which there is no event.
const CHECK_INTERVAL: Duration = Duration::from_millis(10);

/// The time that a peer that has everything has to close its end, or to refuse it.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Ends the stream, and waits until the peer has all of it, for as long as that takes.
///
/// # Errors
/// When the peer did not take everything: `ECONNRESET`, `EPIPE`, `ETIMEDOUT` and the like.
pub(super) fn deliver(socket: impl AsFd) -> Result<(), Errno> {
    let socket = socket.as_fd();
    take_error(socket)?;
    match shutdown(socket.as_raw_fd(), Shutdown::Write) {
        // The connection is gone; the error may have been taken already.
        Err(Errno::ENOTCONN) => return take_error(socket).and(Err(Errno::ECONNRESET)),
        result => result?,
    }
    let mut delivered = Instant::now();
    loop {
        let queued = queued(socket);
        // The peer has ended its own stream as well: a hang-up, after we have ended ours.
        let events = poll(socket, PollFlags::empty(), PollTimeout::ZERO)?;
        let has_ended = events.contains(PollFlags::POLLHUP);
        // Asked last: what throws the queue away, or ends the peer's stream by a reset, sets the
        // error before.
        take_error(socket)?;
        if queued != Ok(0) {
            delivered = Instant::now();
        }
        // Of sockets other than TCP and UNIX ones the queue is not known: the peer's end has to do.
        let may_have_all = queued.unwrap_or(0) == 0;
        if has_ended && may_have_all || delivered.elapsed() >= CLOSE_TIMEOUT {
            return Ok(());
        }
        thread::sleep(CHECK_INTERVAL);
    }
}

/// Fails if the connection has failed.
fn take_error(socket: impl AsFd) -> Result<(), Errno> {
    match getsockopt(&socket, sockopt::SocketError)? {
        0 => Ok(()),
        error => Err(Errno::from_raw(error)),
    }
}

/// Bytes that the peer does not have yet.
fn queued(socket: impl AsFd) -> Result<usize, Errno> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the pointer is to a local int, which is what SIOCOUTQ writes, and outlives the call.
    let result = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::TIOCOUTQ, &mut bytes) };
    Errno::result(result)?;
    Ok(usize::try_from(bytes).unwrap_or(0))
}
