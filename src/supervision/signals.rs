//! SIGTERM, SIGINT and SIGHUP as something to wait for, so that a transfer ends in order: the
//! socket and temporary files removed, CRIU's pipes closed (CRIU then resumes the application).
//!
//! SIGCHLD wakes the transfer in the same way, so that it ends as soon as a command has failed.
//! SIGXFSZ is kept off: writing beyond a limit is an error like a full disk.
//!
//! SIGPIPE needs nothing: Rust programs ignore it from the start, so that writing to a broken pipe
//! is an error (`EPIPE`).

#![allow(unsafe_code)]

use std::cell::Cell;
use std::io;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::ending::Ending;

/// The signals that came.
pub(super) struct Signals {
    descriptor: SignalFd,
    /// One came that ends the transfer.
    pub(super) has_ended_us: Cell<bool>,
    has_spared_us: Cell<bool>,
}

impl Signals {
    /// From now on signals no longer end the process but wait here. Must be called before there are
    /// other threads.
    pub(super) fn catch() -> io::Result<Self> {
        let mut caught = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD]);
        if !is_ignored(Signal::SIGHUP) {
            caught.add(Signal::SIGHUP);
        }
        let mut blocked = caught;
        blocked.add(Signal::SIGXFSZ);
        blocked.thread_block()?;
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        Ok(Self {
            descriptor: SignalFd::with_flags(&caught, flags)?,
            has_ended_us: Cell::new(false),
            has_spared_us: Cell::new(false),
        })
    }

    /// Fails with [`Ending::Signal`] if a signal came that ends the transfer.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        while let Some(info) = self.descriptor.read_signal()? {
            let number = info.ssi_signo as i32;
            if number != Signal::SIGCHLD as i32 {
                self.has_ended_us.set(true);
                return Err(Ending::Signal(number).into());
            }
        }
        Ok(())
    }

    /// Has the signal that came not end the transfer. False: one has been spared already.
    pub(super) fn spare(&self) -> bool {
        let spares = !self.has_spared_us.replace(true);
        self.has_ended_us.set(self.has_ended_us.get() && !spares);
        spares
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// True if the program was started to ignore a signal, as by `nohup`.
pub(super) fn is_ignored(signal: Signal) -> bool {
    // SAFETY: without a new action the call changes nothing. It writes the present action to
    // `action`, a plain C structure for which zeroes are valid.
    let action = unsafe {
        let mut action: libc::sigaction = mem::zeroed();
        libc::sigaction(signal as i32, ptr::null(), &mut action);
        action
    };
    action.sa_sigaction == libc::SIG_IGN
}
