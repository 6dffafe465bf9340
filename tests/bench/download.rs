//! A download: what stands on standard input, at the speed of a network.

use anyhow::Result;
use serde::{Deserialize, Serialize};
use std::{
    fs::File,
    io::{Read, Write, stdin, stdout},
    os::fd::AsFd,
    thread,
    time::{Duration, Instant},
};

#[derive(Serialize, Deserialize)]
pub struct Download {
    /// As fast as it is taken if there is no limit.
    pub bytes_per_s: Option<f64>,
}

/// Bytes written at a time, as a decompressor does.
const BLOCK: usize = 64 << 10;

/// What comes at once after the receiver has stood still: what the buffers on the way hold.
const BUFFERED: f64 = (1 << 20) as f64;

impl Download {
    pub fn play(self) -> Result<()> {
        let mut from = File::from(stdin().as_fd().try_clone_to_owned()?);
        // Not io::Stdout: its line buffer would cut the blocks.
        let mut to = File::from(stdout().as_fd().try_clone_to_owned()?);
        let mut block = vec![0; BLOCK];
        let mut due = Instant::now();
        loop {
            let bytes = from.read(&mut block)?;
            if bytes == 0 {
                return Ok(());
            }
            if let Some(speed) = self.bytes_per_s {
                let now = Instant::now();
                let earliest = now.checked_sub(Duration::from_secs_f64(BUFFERED / speed));
                due = earliest.map_or(due, |earliest| due.max(earliest));
                due += Duration::from_secs_f64(bytes as f64 / speed);
                thread::sleep(due.saturating_duration_since(now));
            }
            to.write_all(&block[..bytes])?;
        }
    }
}
