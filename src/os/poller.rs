//! epoll, in the one way in which all loops of this program use it.
//!
//! Pipes are watched edge-triggered: an event says that something changed, and how much there is to
//! do is then read off the pipe itself. Level-triggered epoll would return at once for every source
//! that has data but may not be moved yet, and every page that arrives would cost a wake-up.
//!
//! There is one epoll, the supervisor's, lent to every loop. An event carries a kind and a number,
//! such as a shard's index. The poller keeps no objects: shards stand in a slice for the balancer,
//! files are found by name, and a descriptor leaves epoll when its owner closes it. One that was
//! inherited may stay for as long as another process has it: its events come on the edge only, and
//! find nothing to do.

use std::io;
use std::os::fd::AsFd;
use std::time::Instant;

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::descriptor::uninterrupted;

/// Events taken at a time.
const BATCH: usize = 64;

/// The bits of a token that hold the kind; the number has the others.
const KIND_BITS: u32 = 4;

/// The kinds of things that are watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Watched {
    /// A signal that came.
    Interrupt,
    /// The end of a CRIU whose hook has started us.
    Caller,
    Listener,
    Client,
    /// A file that is captured.
    Source,
    Shard,
    /// The reader of an external file.
    External,
    /// A file on its way to CRIU.
    Transfer,
    /// The memory of a restored application.
    Memory,
}

impl Watched {
    const ALL: [Self; 9] = [
        Self::Interrupt,
        Self::Caller,
        Self::Listener,
        Self::Client,
        Self::Source,
        Self::Shard,
        Self::External,
        Self::Transfer,
        Self::Memory,
    ];
}

/// The events to wait for, as epoll's flags.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Interest {
    /// Each change of something readable, and its end.
    ReadableEdge = libc::EPOLLIN as isize | libc::EPOLLET as isize,
    /// Each change of something writable, and its reader's end.
    WritableEdge = libc::EPOLLOUT as isize | libc::EPOLLET as isize,
    /// Something to read, for as long as there is.
    Readable = libc::EPOLLIN as isize,
    /// Only that the other side is gone.
    Gone = libc::EPOLLET as isize,
}

/// How long to wait for events, the shortest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Wait {
    /// Only look.
    Now,
    Until(Instant),
    Forever,
}

impl Wait {
    /// The earlier of this and `end`, if there is one.
    pub(crate) fn or_until(self, end: Option<Instant>) -> Self {
        end.map_or(self, |end| self.min(Wait::Until(end)))
    }

    /// In milliseconds, rounded up so that a wait never ends before its time.
    fn timeout(self) -> EpollTimeout {
        match self {
            Wait::Now => EpollTimeout::ZERO,
            Wait::Forever => EpollTimeout::NONE,
            Wait::Until(end) => {
                let left = end.saturating_duration_since(Instant::now());
                let millis = left.as_nanos().div_ceil(1_000_000);
                EpollTimeout::try_from(millis).unwrap_or(EpollTimeout::MAX)
            }
        }
    }
}

/// One event: what was registered, and whether the other side is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) kind: Watched,
    pub(crate) id: u64,
    pub(crate) hung_up: bool,
}

/// An epoll instance. Descriptors leave it by being closed.
pub(crate) struct Poller(Epoll);

impl Poller {
    /// # Errors
    /// When the kernel has no more descriptors for us.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?))
    }

    /// Watches a descriptor. Its events carry `kind` and `id`.
    ///
    /// # Errors
    /// `EPERM` for descriptors that cannot be waited for, such as regular files.
    pub(crate) fn add(
        &self,
        fd: impl AsFd,
        kind: Watched,
        id: u64,
        interest: Interest,
    ) -> io::Result<()> {
        let flags = EpollFlags::from_bits_retain(interest as libc::c_int);
        let token = id << KIND_BITS | kind as u64;
        Ok(self.0.add(fd, EpollEvent::new(flags, token))?)
    }

    /// Watches a descriptor no more, although it stays open.
    pub(crate) fn remove(&self, fd: impl AsFd) {
        // One that is not watched is an error, and as it should be.
        let _ = self.0.delete(fd);
    }

    /// Waits for events. They are in `found`, which is empty when the time is over.
    ///
    /// # Errors
    /// When `epoll_wait` fails, but for interruptions.
    pub(crate) fn wait(&self, wait: Wait, found: &mut Vec<Event>) -> io::Result<()> {
        found.clear();
        let mut events = [EpollEvent::empty(); BATCH];
        // The time that is left is looked at anew.
        let count = uninterrupted(|| self.0.wait(&mut events, wait.timeout()))?;
        let gone = EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR;
        found.extend(events[..count].iter().map(|event| Event {
            kind: Watched::ALL[(event.data() & ((1 << KIND_BITS) - 1)) as usize],
            id: event.data() >> KIND_BITS,
            hung_up: event.events().intersects(gone),
        }));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::pipe;
    use std::time::Duration;

    #[test]
    fn every_kind_has_its_number() {
        assert!(Watched::ALL.len() <= 1 << KIND_BITS);
        for (number, &kind) in Watched::ALL.iter().enumerate() {
            assert_eq!(kind as usize, number);
        }
    }

    #[test]
    fn events_carry_what_was_registered() {
        let poller = Poller::new().unwrap();
        let mut events = Vec::new();
        let (read, write) = pipe::new().unwrap();
        poller
            .add(&read, Watched::Shard, 7, Interest::Readable)
            .unwrap();
        poller
            .add(
                &write,
                Watched::External,
                u64::MAX >> KIND_BITS,
                Interest::Gone,
            )
            .unwrap();
        let end = Instant::now() + Duration::from_millis(2);
        poller.wait(Wait::Until(end), &mut events).unwrap();
        assert!(events.is_empty() && Instant::now() >= end);
        drop(read);
        poller.wait(Wait::Forever, &mut events).unwrap();
        let gone = Event {
            kind: Watched::External,
            id: u64::MAX >> KIND_BITS,
            hung_up: true,
        };
        assert_eq!(events, [gone]);
    }

    #[test]
    fn the_earlier_of_two_ends_counts() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        assert_eq!(Wait::Forever.or_until(None), Wait::Forever);
        assert_eq!(Wait::Forever.or_until(Some(now)), Wait::Until(now));
        assert_eq!(Wait::Until(later).or_until(Some(now)), Wait::Until(now));
        assert_eq!(Wait::Now.or_until(Some(later)), Wait::Now);
    }
}
