//! Counts bytes and files, once: for the bar, and for the statistics at the end.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::progress::ShardStats;

/// A count that the bar may read while the transfer adds to it.
#[derive(Debug, Clone, Default)]
pub struct Counter(Arc<AtomicU64>);

impl Counter {
    pub fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The counts of one transfer.
#[derive(Debug, Clone, Default)]
pub struct Counters {
    /// Files that are complete.
    pub files: Counter,
    /// Bytes of each shard, markers and data.
    pub shards: Vec<Counter>,
    /// 1 once a capture with a buffer has copied all of the memory.
    pub copied: Counter,
    /// Bytes that were filled in after the application went on.
    pub filled: Counter,
}

impl Counters {
    /// Zeroes, for a transfer through this number of shards.
    pub fn new(shards: usize) -> Self {
        Self {
            shards: (0..shards).map(|_| Counter::default()).collect(),
            ..Self::default()
        }
    }
}

/// Counts the bytes of one shard, and notes when the last of them passed.
#[derive(Debug, Default)]
pub struct Meter {
    bytes: Counter,
    last: Option<Instant>,
}

impl Meter {
    /// Counts in `bytes`.
    pub fn new(bytes: Counter) -> Self {
        Self { bytes, last: None }
    }

    pub fn add(&mut self, bytes: usize) {
        self.bytes.add(bytes as u64);
        self.last = Some(Instant::now());
    }

    /// Bytes so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.get()
    }

    /// The bytes, and the time that they took from `start`, the beginning of the image's transfer.
    pub fn stats(&self, start: Instant) -> ShardStats {
        let duration = self.last.map_or(Duration::ZERO, |last| last - start);
        ShardStats {
            size: self.bytes.get(),
            transfer_duration_millis: duration.as_millis() as u64,
        }
    }
}
