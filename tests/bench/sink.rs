//! What stands at the other end of a captured shard.

use anyhow::Result;
use nix::fcntl::{SpliceFFlags, splice};
use serde::{Deserialize, Serialize};
use std::{
    fs::OpenOptions,
    io::{Read, stdin},
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
    /// Takes nothing for 5 seconds, and then all.
    Stalled,
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
            Self::Slow => read_slowly(),
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

fn read_slowly() -> Result<()> {
    const READS_PER_SECOND: usize = 16;
    let mut stdin = stdin().lock();
    let mut buffer = vec![0; MIB / READS_PER_SECOND];
    let start = Instant::now();
    let mut taken = 0;
    loop {
        match stdin.read(&mut buffer)? {
            0 => return Ok(()),
            bytes => taken += bytes,
        }
        let due = Duration::from_secs_f64(taken as f64 / MIB as f64);
        thread::sleep(due.saturating_sub(start.elapsed()));
    }
}
