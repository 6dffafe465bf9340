//! A link of limited speed, such as a network's.

use anyhow::Result;
use std::{
    fs::File,
    io::{Read, Write, stdin, stdout},
    os::fd::AsFd,
    thread,
    time::{Duration, Instant},
};

/// Bytes written at a time, as a decompressor does.
const BLOCK: usize = 64 << 10;

/// Bytes that come at once after the receiver has stood still: those in the buffers on the way.
const BUFFERED: f64 = (1 << 20) as f64;

/// Copies standard input to standard output, and says on standard error how many bytes it was.
pub fn copy(bytes_per_s: f64) -> Result<()> {
    let mut from = File::from(stdin().as_fd().try_clone_to_owned()?);
    // Not io::Stdout: its line buffer would cut the blocks.
    let mut to = File::from(stdout().as_fd().try_clone_to_owned()?);
    let mut block = vec![0; BLOCK];
    let mut total = 0;
    let mut due = Instant::now();
    loop {
        let bytes = from.read(&mut block)?;
        if bytes == 0 {
            eprintln!("{total}");
            return Ok(());
        }
        total += bytes as u64;
        let now = Instant::now();
        let earliest = now.checked_sub(Duration::from_secs_f64(BUFFERED / bytes_per_s));
        due = earliest.map_or(due, |earliest| due.max(earliest));
        due += Duration::from_secs_f64(bytes as f64 / bytes_per_s);
        thread::sleep(due.saturating_duration_since(now));
        to.write_all(&block[..bytes])?;
    }
}
