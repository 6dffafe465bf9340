//! The end of a CRIU that has started us through its hook, as something to wait for.
//!
//! During a capture that CRIU waits for us while everything is frozen. If it ends first, it was
//! killed: the application goes on, and may write to pages that are still in our pipes. And a
//! streamer that no CRIU has connected to yet has nothing else to tell it that none will.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::os::pipe::uninterrupted;
use crate::os::poller::{Interest, Poller, Watched};

pub(super) struct Watch {
    process: OwnedFd,
    has_ended: Cell<bool>,
    may_end: Cell<bool>,
}

impl Watch {
    /// Watches a process. Its end can be seen for ever, so it is looked at on the edge only.
    pub(super) fn new(process: OwnedFd, poller: &Poller) -> io::Result<Self> {
        poller.add(&process, Watched::Caller, 0, Interest::ReadableEdge)?;
        Ok(Self {
            process,
            has_ended: Cell::new(false),
            may_end: Cell::new(false),
        })
    }

    /// From now on CRIU may end.
    pub(super) fn let_end(&self) {
        self.may_end.set(true);
    }

    /// Whether CRIU has ended, as far as [`Watch::check`] has seen.
    pub(super) fn has_ended(&self) -> bool {
        self.has_ended.get()
    }

    /// Fails if CRIU has ended and may not.
    pub(super) fn check(&self) -> Result<()> {
        let mut fds = [PollFd::new(self.process.as_fd(), PollFlags::POLLIN)];
        if uninterrupted(|| poll(&mut fds, PollTimeout::ZERO))? > 0 {
            self.has_ended.set(true);
        }
        ensure!(
            !self.has_ended() || self.may_end.get(),
            "CRIU, which has started this streamer, has ended and did not wait for it: it failed or was killed (see its log)"
        );
        Ok(())
    }
}
