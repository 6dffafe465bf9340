//! Huge pages for a test.

use std::fs::File;

use nix::fcntl::{Flock, FlockArg};

const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// Huge pages that were added to the machine's pool, and are given back.
pub struct HugePages {
    before: String,
    /// Whoever else changes the pool meanwhile takes them away, or leaves it larger for good.
    _turn: Flock<File>,
}

impl HugePages {
    /// `None` if the machine does not give that many.
    pub fn reserve(number: usize) -> Option<Self> {
        let turn = Flock::lock(File::open(POOL).ok()?, FlockArg::LockExclusive).ok()?;
        let read = || std::fs::read_to_string(POOL);
        let before = read().ok()?;
        let had: usize = before.trim().parse().ok()?;
        std::fs::write(POOL, (had + number).to_string()).ok()?;
        let reserved = Self {
            before,
            _turn: turn,
        };
        let has: usize = read().ok()?.trim().parse().ok()?;
        (has >= had + number).then_some(reserved)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        // A pool that stays larger is no reason to fail.
        let _ = std::fs::write(POOL, &self.before);
    }
}
