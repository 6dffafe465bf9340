//! Errors behind which there is no other reason, and their exit statuses.

use std::fmt;

use anyhow::Error;
use nix::sys::signal::Signal;

/// An end of the transfer that has an exit status of its own.
#[derive(Debug)]
pub(crate) enum Ending {
    /// By a signal to this process.
    Signal(i32),
    /// By the failure of the command that runs CRIU, alone.
    Criu { message: String, status: u8 },
}

impl Ending {
    /// The ending that led to an error, if one did.
    pub(crate) fn behind(error: &Error) -> Option<&Self> {
        error.chain().find_map(|cause| cause.downcast_ref())
    }

    /// The exit status: as a shell has it for signals, or the command's own.
    pub(crate) fn exit_status(&self) -> u8 {
        match self {
            Self::Signal(signal) => 128 + *signal as u8,
            Self::Criu { status, .. } => *status,
        }
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Signal(signal) => {
                let name = Signal::try_from(*signal).map_or("a signal", Signal::as_str);
                write!(f, "ended by {name}")
            }
            Self::Criu { message, .. } => f.write_str(message),
        }
    }
}

impl std::error::Error for Ending {}
