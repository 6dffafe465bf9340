//! One clock for all processes of the benchmark.

use nix::time::{ClockId, clock_gettime};

/// CLOCK_MONOTONIC: differences hold across processes.
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("Linux has a monotonic clock");
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}

pub fn seconds_between(start_ns: u64, end_ns: u64) -> f64 {
    (end_ns - start_ns) as f64 / 1e9
}
