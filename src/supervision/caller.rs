//! The end of a CRIU that has started us through its hook, as something to wait for.
//!
//! During a capture that CRIU waits for us while everything is frozen. If it ends first, it was
//! killed: the application goes on, and may write to pages that are still in our pipes. And a
//! streamer that no CRIU has connected to yet has nothing else to tell it that none will.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Result, ensure};

use crate::os::poller::{Interest, Kind, Poller, Wait};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Watched {
    Signals,
    Caller,
}

impl Kind for Watched {
    const ALL: &'static [Self] = &[Self::Signals, Self::Caller];
}

pub(super) struct Watch {
    /// Of signals, and CRIU's process. The end of a process can be seen for ever, so it is looked
    /// at on the edge only.
    poller: Poller<Watched>,
    /// The process, which epoll forgets when this is closed.
    _process: OwnedFd,
    has_ended: Cell<bool>,
    may_end: Cell<bool>,
}

impl Watch {
    /// Watches a process, beside `signals`.
    pub(super) fn new(process: OwnedFd, signals: impl AsFd) -> io::Result<Self> {
        let poller = Poller::new()?;
        poller.add(signals, Watched::Signals, 0, Interest::Readable)?;
        poller.add(&process, Watched::Caller, 0, Interest::ReadableEdge)?;
        Ok(Self {
            poller,
            _process: process,
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
        let mut events = Vec::new();
        self.poller.wait(Wait::Now, &mut events)?;
        if events.iter().any(|event| event.kind == Watched::Caller) {
            self.has_ended.set(true);
        }
        ensure!(
            !self.has_ended() || self.may_end.get(),
            "CRIU, which has started this streamer, has ended and did not wait for it: it failed or was killed (see its log)"
        );
        Ok(())
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.poller.as_fd()
    }
}
