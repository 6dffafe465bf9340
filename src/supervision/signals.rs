//! SIGTERM, SIGINT and SIGHUP as something to wait for, so that a transfer ends in order: the socket and temporary files
//! removed, CRIU's pipes closed (which makes it resume the application).
//!
//! SIGCHLD wakes the transfer in the same way, so that it ends as soon as a command that it depends on has failed. SIGXFSZ is kept
//! off: writing beyond a limit is an error like a full disk.
//!
//! SIGPIPE needs nothing: Rust programs ignore it from the start, so that writing to a broken pipe is an error (`EPIPE`).

use std::cell::RefCell;
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

/// The signal that led to an error, if one did.
pub fn signal_behind(error: &anyhow::Error) -> Option<Interrupted> {
    let of_cause =
        |cause: &(dyn std::error::Error + 'static)| match cause.downcast_ref::<io::Error>() {
            Some(error) => error.get_ref()?.downcast_ref::<Interrupted>().copied(),
            None => cause.downcast_ref::<Interrupted>().copied(),
        };
    error.chain().find_map(of_cause)
}

type Check = Box<dyn Fn() -> anyhow::Result<()>>;

/// The signals that came, and whatever else may speak against going on.
pub struct Interrupts {
    signals: SignalFd,
    also: RefCell<Option<Check>>,
}

impl Interrupts {
    /// From now on signals no longer end the process but wait here. Must be called before there are other threads.
    ///
    /// # Errors
    /// When no descriptor can be had.
    pub fn catch() -> io::Result<Self> {
        let mut mask = SigSet::empty();
        for signal in SIGNALS {
            if signal != Signal::SIGHUP || !is_ignored(signal) {
                mask.add(signal);
            }
        }
        mask.add(Signal::SIGCHLD);
        mask.thread_block()?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        SigSet::from(Signal::SIGXFSZ).thread_block()?;
        Ok(Self {
            signals,
            also: RefCell::new(None),
        })
    }

    /// Has [`Interrupts::check`] make this check too.
    pub fn also_check(&self, check: impl Fn() -> anyhow::Result<()> + 'static) {
        *self.also.borrow_mut() = Some(Box::new(check));
    }

    /// Fails if a signal came that ends the transfer, or something it depends on has failed.
    ///
    /// # Errors
    /// [`Interrupted`], with the signal; and the other check's.
    pub fn check(&self) -> anyhow::Result<()> {
        while let Some(info) = self.signals.read_signal()? {
            let number = info.ssi_signo as i32;
            if number != Signal::SIGCHLD as i32 {
                return Err(Interrupted(number).into());
            }
        }
        match &*self.also.borrow() {
            Some(check) => check(),
            None => Ok(()),
        }
    }
}

/// Whether whoever started us wants us to ignore a signal, as `nohup` does. Where that cannot be read, nobody is taken to.
fn is_ignored(signal: Signal) -> bool {
    let ignored = || {
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        let mask = status
            .lines()
            .find_map(|line| line.strip_prefix("SigIgn:"))?;
        u64::from_str_radix(mask.trim(), 16).ok()
    };
    ignored().is_some_and(|mask| mask & (1 << (signal as u32 - 1)) != 0)
}

impl AsFd for Interrupts {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.signals.as_fd()
    }
}
