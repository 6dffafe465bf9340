//! SIGTERM, SIGINT and SIGHUP as something to wait for, so that a transfer ends in order: the socket and temporary files
//! removed, CRIU's pipes closed (which makes it resume the application).
//!
//! SIGPIPE needs nothing: Rust programs ignore it from the start, so that writing to a broken pipe is an error (`EPIPE`).

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// The signals that end a transfer.
const SIGNALS: [Signal; 3] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];

/// An error that stands for a signal; the exit status is then 128 and the signal's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interrupted(pub i32);

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let name = Signal::try_from(self.0).map_or("a signal", Signal::as_str);
        write!(f, "ended by {name}")
    }
}

impl std::error::Error for Interrupted {}

/// The signals that came.
#[derive(Debug)]
pub struct Interrupts(SignalFd);

impl Interrupts {
    /// From now on signals no longer end the process but wait here. Must be called before there are other threads.
    ///
    /// # Errors
    /// When no descriptor can be had.
    pub fn catch() -> io::Result<Self> {
        let mut mask = SigSet::empty();
        for signal in SIGNALS {
            mask.add(signal);
        }
        mask.thread_block()?;
        Ok(Self(SignalFd::with_flags(
            &mask,
            SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC,
        )?))
    }

    /// Fails if a signal came.
    ///
    /// # Errors
    /// [`Interrupted`], with the signal.
    pub fn check(&self) -> anyhow::Result<()> {
        match self.0.read_signal()? {
            Some(info) => Err(Interrupted(info.ssi_signo as i32).into()),
            None => Ok(()),
        }
    }
}

impl AsFd for Interrupts {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
