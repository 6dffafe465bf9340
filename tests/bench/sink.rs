//! What stands at the other end of a captured shard.

use crate::memory::{PageMemory, Pages};
use anyhow::Result;
use nix::fcntl::{SpliceFFlags, splice};
use serde::{Deserialize, Serialize};
use std::{
    fs::{File, OpenOptions},
    io::{Read, stdin},
    os::fd::AsFd,
    thread,
    time::{Duration, Instant},
};

#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Debug)]
pub enum Sink {
    /// Splices to /dev/null: takes what comes for next to nothing.
    Splice,
    /// Reads and drops.
    Read,
    /// Takes 1 MiB per second.
    Slow,
    /// Takes 25 MB per second, as an upload may.
    Upload,
    /// Takes nothing for 5 seconds, and then all.
    Stalled,
    /// Reads into memory of huge pages, and keeps it.
    Keep,
    /// `lz4 -1 > /dev/null`: not a role of ours, the real program.
    Lz4,
}

const MIB: usize = 1 << 20;
const STALL: Duration = Duration::from_secs(5);

impl Sink {
    pub fn play(self) -> Result<()> {
        match self {
            Self::Splice | Self::Lz4 => splice_to_null(),
            Self::Stalled => {
                thread::sleep(STALL);
                splice_to_null()
            }
            Self::Read => read_and_drop(),
            Self::Keep => read_and_keep(),
            Self::Slow => read_slowly(MIB),
            Self::Upload => read_slowly(25_000_000),
        }
    }

    /// Whether it takes all the time it wants, so that its end says nothing about the streamer.
    pub fn hinders(self) -> bool {
        matches!(self, Self::Slow | Self::Stalled)
    }
}

fn splice_to_null() -> Result<()> {
    let null = OpenOptions::new().write(true).open("/dev/null")?;
    while splice(stdin(), None, &null, None, 4 * MIB, SpliceFFlags::empty())? > 0 {}
    Ok(())
}

fn read_and_drop() -> Result<()> {
    let mut stdin = stdin().lock();
    let mut buffer = vec![0; MIB];
    while stdin.read(&mut buffer)? > 0 {}
    Ok(())
}

fn read_and_keep() -> Result<()> {
    const REGION: usize = 64 * MIB;
    let mut stdin = File::from(stdin().as_fd().try_clone_to_owned()?);
    let mut kept = vec![];
    loop {
        let mut region = PageMemory::fresh(REGION, Pages::Huge)?;
        let mut filled = 0;
        while filled < REGION {
            match stdin.read(&mut region.as_mut_slice()[filled..])? {
                0 => return Ok(()),
                bytes => filled += bytes,
            }
        }
        kept.push(region);
    }
}

fn read_slowly(bytes_per_second: usize) -> Result<()> {
    const READS_PER_SECOND: usize = 16;
    let mut stdin = stdin().lock();
    let mut buffer = vec![0; bytes_per_second / READS_PER_SECOND];
    let mut taken = stdin.read(&mut buffer)?;
    let start = Instant::now();
    loop {
        match stdin.read(&mut buffer)? {
            0 => return Ok(()),
            bytes => taken += bytes,
        }
        let due = Duration::from_secs_f64(taken as f64 / bytes_per_second as f64);
        thread::sleep(due.saturating_sub(start.elapsed()));
    }
}
