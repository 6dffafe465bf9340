//! When to look at busy pipes again.
//!
//! While data flows, the loops do not sleep in epoll but nap, and then look at all busy pipes. In
//! the meantime the pipes fill, so that each call moves much, and their writers need not wake
//! us. A capture, which moves references, naps for a fixed time ([`NAP`]). Receiving,
//! which copies, naps for as long as pipes take to fill; serving, for as long as they take to be
//! emptied.

use std::time::{Duration, Instant};

use crate::os::poller::Wait;

/// How long a loop leaves busy pipes alone. With the time that waking up takes, a pipe of 1 MiB is
/// half full by then. `capture/4-shards` moved 14 to 21 GB/s with naps of 10 µs, and 8 with 50 µs
/// (2026-11-21); with 1 µs it took half as much CPU time again.
pub const NAP: Duration = Duration::from_micros(10);

/// How much later than asked for a nap may end, in nanoseconds. The kernel's default, 50 µs, is
/// five times the nap itself.
const SLACK: libc::c_ulong = 1000;

/// The longest nap, for when nothing moves because all shards are full or empty.
pub const LONGEST_NAP: Duration = Duration::from_millis(5);

/// The shortest time that the poller can wait.
const SHORTEST_WAIT: Duration = Duration::from_millis(1);

/// The longest nap while pipes fill: 1 MiB in this time is 2 GB/s from each shard. Slots that are
/// not full, as small spliced pieces leave them, keep a pipe from ever looking full, and then this
/// limits the speed.
const LONGEST_FILLING: Duration = Duration::from_micros(500);

/// The longest nap while pipes are emptied: CRIU copies what is in a pipe of 4 MiB in 2 to 3 ms.
const LONGEST_EMPTYING: Duration = Duration::from_millis(2);

/// Makes the calling thread's naps exact.
fn be_exact() {
    // If it is refused, naps are longer, and all else is the same.
    let _ = nix::sys::prctl::set_timerslack(SLACK);
}

/// The outcome of one round of a loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Activity {
    /// This number of bytes was found in pipes that hold as many as `room`.
    Filled { found: u64, room: u64 },
    /// This number of slots was filled in pipes that have as many as `room`.
    Emptied { sent: u64, room: u64 },
    /// Nothing moved. This is how long to wait for events.
    Idle(Wait),
}

/// Naps that grow while nothing moves, and start short again when something did.
#[derive(Debug)]
pub struct Pace {
    next: Duration,
}

impl Pace {
    /// For the calling thread, whose naps will be exact from now on.
    pub fn new() -> Self {
        be_exact();
        Self { next: NAP }
    }

    /// Naps as long as the busy pipes take, and returns how long to wait for events then.
    pub(crate) fn after(&mut self, activity: Activity) -> Wait {
        match activity {
            Activity::Filled { found, room } => self.nap_until_filled(found, room),
            Activity::Emptied { sent, room } => self.nap_until_emptied(sent, room),
            Activity::Idle(wait) => return wait,
        }
        Wait::Now
    }

    /// Naps after data was moved, or may be moved once more of it has come.
    pub(crate) fn nap(&mut self) -> Wait {
        self.next = NAP;
        std::thread::sleep(NAP);
        Wait::Now
    }

    /// Naps as long as pipes take to fill, judged by what was found in them: `found` bytes in
    /// pipes that hold `room`. Full pipes, whose writers wait, are looked at again at once.
    ///
    /// A reader that meets the pipe's writer at work spins on its mutex for the length of the
    /// write; the writer of a full pipe sleeps. Measured on a restore from 4 shards: 0.13 CPU
    /// s/GB spent spinning with naps of 10 µs, 0.03 with these.
    pub fn nap_until_filled(&mut self, found: u64, room: u64) {
        let full = found * 8 >= room * 7;
        if full && self.next == NAP {
            return;
        }
        if full {
            self.next = (self.next / 2).max(NAP);
        } else if found * 2 < room {
            self.next = (self.next * 2).min(LONGEST_FILLING);
        }
        std::thread::sleep(self.next);
    }

    /// Naps as long as pipes take to be emptied, judged by what went into them: `sent` slots where
    /// `room` would fit into empty ones. Where events come when pipes are empty, it does not nap at
    /// all.
    ///
    /// A reader copies with the pipe's mutex held, and we would spin for as long if we filled the
    /// pipe meanwhile. A pipe that was not found empty has a reader at work, so the next nap is
    /// longer.
    pub fn nap_until_emptied(&mut self, sent: u64, room: u64) {
        if sent * 8 < room * 7 {
            self.next = (self.next * 2).min(LONGEST_EMPTYING);
        } else if self.next == NAP {
            return;
        } else {
            self.next = (self.next - self.next / 8).max(NAP);
        }
        std::thread::sleep(self.next);
    }

    /// Naps because nothing could be moved: twice as long as the last time, so that a stalled shard
    /// costs no CPU, and yet never much longer than the stall has lasted already.
    pub(crate) fn nap_longer(&mut self) -> Wait {
        std::thread::sleep(self.next);
        self.next = (self.next * 2).min(LONGEST_NAP);
        Wait::Now
    }

    /// The same, but an event ends it: once naps are as long as the poller's waits can be, this
    /// tells how long to wait for one.
    pub(crate) fn rest(&mut self) -> Wait {
        if self.next < SHORTEST_WAIT {
            return self.nap_longer();
        }
        let end = Instant::now() + self.next;
        self.next = (self.next * 2).min(LONGEST_NAP);
        Wait::Until(end)
    }
}

impl Default for Pace {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn naps_adapt_until_pipes_are_found_full() {
        const ROOM: u64 = 1 << 20;
        let mut pace = Pace::new();
        for _ in 0..10 {
            pace.nap_until_filled(ROOM / 4, ROOM);
        }
        assert_eq!(pace.next, LONGEST_FILLING);
        pace.nap_until_filled(ROOM * 3 / 4, ROOM);
        assert_eq!(pace.next, LONGEST_FILLING);
        for _ in 0..10 {
            pace.nap_until_filled(ROOM, ROOM);
        }
        assert_eq!(pace.next, NAP);
    }

    #[test]
    fn naps_adapt_until_pipes_are_found_empty() {
        const ROOM: u64 = 1 << 20;
        let mut pace = Pace::new();
        pace.nap_until_emptied(ROOM, ROOM);
        assert_eq!(pace.next, NAP);
        for _ in 0..10 {
            pace.nap_until_emptied(ROOM / 2, ROOM);
        }
        assert_eq!(pace.next, LONGEST_EMPTYING);
        for _ in 0..100 {
            pace.nap_until_emptied(ROOM, ROOM);
        }
        assert_eq!(pace.next, NAP);
    }
}
