//! The simulated CRIU of a dump, and the same writer without a streamer.
//!
//! Like CRIU's, its big files are made of pages that already exist and that are spliced into the
//! pipe, one 4 KiB slot each; its small files are written. Without a streamer it feeds the same
//! pages straight to the sinks: what it then reaches is the most that any streamer could.

use crate::common::criu::{Criu, Role};
use crate::memory::{PageMemory, Pages};
use crate::role;
use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{SpliceFFlags, vmsplice};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};
use std::{
    fs::File,
    io::{IoSlice, Write},
    os::fd::{AsFd, OwnedFd, RawFd},
    path::Path,
    thread,
};

#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
pub enum Files {
    /// `writers` files at once, `bytes` in all.
    Pages { writers: usize, bytes: u64 },
    /// One after another.
    Small { count: usize, bytes: usize },
}

impl Files {
    pub fn total_bytes(&self) -> u64 {
        match *self {
            Self::Pages { bytes, .. } => bytes,
            Self::Small { count, bytes } => (count * bytes) as u64,
        }
    }
}

#[derive(Serialize, Deserialize)]
pub struct Writer {
    pub files: Files,
    pub huge_pages: bool,
    /// The shards' descriptors, when there is no streamer.
    pub direct: Vec<RawFd>,
}

/// More would only cost memory: pages that a sink has let go can be sent again.
const MOST_MEMORY: u64 = 256 << 20;

impl Writer {
    pub fn play(self) -> Result<()> {
        let pages = if self.huge_pages {
            Pages::Huge
        } else {
            Pages::Small
        };
        let size = self.files.total_bytes().min(MOST_MEMORY) as usize;
        let memory = PageMemory::filled(size, pages)?;
        let shards = role::claim_fds(&self.direct);
        role::perform(|images_dir| {
            if shards.is_empty() {
                dump(&self.files, &memory, Path::new(images_dir))
            } else {
                feed(&self.files, &memory, shards)
            }
        })
    }
}

fn dump(files: &Files, memory: &[u8], images_dir: &Path) -> Result<()> {
    let criu = Criu::try_connect(images_dir, Role::Capture)?;
    match *files {
        Files::Pages { writers, bytes } => in_parallel(writers, |writer| {
            let share = bytes / writers as u64;
            let pipe = criu.try_create_file(&format!("pages-{}.img", writer + 1), None)?;
            let start = writer * memory.len() / writers;
            send_pages(memory, start, share, &[pipe.into()])
        })?,
        Files::Small { count, bytes } => {
            for number in 0..count {
                let mut pipe = criu.try_create_file(&format!("core-{number}.img"), None)?;
                pipe.write_all(&memory[..bytes])?;
            }
        }
    }
    let mut inventory = criu.try_create_file("inventory.img", None)?;
    Ok(inventory.write_all(&memory[..100])?)
}

fn feed(files: &Files, memory: &[u8], shards: Vec<OwnedFd>) -> Result<()> {
    match *files {
        Files::Pages { writers, bytes } => {
            // Each writer has shards of its own, or else a share of one.
            let mut shares: Vec<Vec<OwnedFd>> = (0..writers).map(|_| vec![]).collect();
            for (number, shard) in shards.iter().enumerate() {
                shares[number % writers].push(shard.try_clone()?);
            }
            for (number, share) in shares.iter_mut().enumerate() {
                if share.is_empty() {
                    share.push(shards[number % shards.len()].try_clone()?);
                }
            }
            in_parallel(writers, |writer| {
                let start = writer * memory.len() / writers;
                send_pages(memory, start, bytes / writers as u64, &shares[writer])
            })
        }
        Files::Small { count, bytes } => {
            let shards: Vec<_> = shards.into_iter().map(File::from).collect();
            for number in 0..count {
                (&shards[number % shards.len()]).write_all(&memory[..bytes])?;
            }
            Ok(())
        }
    }
}

fn in_parallel(writers: usize, work: impl Fn(usize) -> Result<()> + Sync) -> Result<()> {
    let work = &work;
    thread::scope(|scope| {
        let running: Vec<_> = (0..writers)
            .map(|writer| scope.spawn(move || work(writer)))
            .collect();
        (running.into_iter()).try_for_each(|writer| writer.join().expect("no writer panics"))
    })
}

/// Sends `bytes` bytes of `memory`, round and round, to whichever of `pipes` has room.
fn send_pages(memory: &[u8], start: usize, bytes: u64, pipes: &[OwnedFd]) -> Result<()> {
    let page = 4096;
    let mut position = start / page * page;
    let mut left = bytes;
    // With a single pipe there is nothing to choose: it blocks, as CRIU does.
    let flags = if pipes.len() == 1 {
        SpliceFFlags::empty()
    } else {
        SpliceFFlags::SPLICE_F_NONBLOCK
    };
    while left > 0 {
        let mut all_full = true;
        for pipe in pipes.iter() {
            let piece = (memory.len() - position).min(left as usize);
            match vmsplice(
                pipe,
                &[IoSlice::new(&memory[position..position + piece])],
                flags,
            ) {
                Ok(sent) => {
                    all_full = false;
                    left -= sent as u64;
                    position = (position + sent) % memory.len();
                }
                Err(Errno::EAGAIN) => {}
                Err(error) => return Err(error).context("Failed to vmsplice"),
            }
            if left == 0 {
                break;
            }
        }
        if all_full {
            wait_for_room(pipes)?;
        }
    }
    Ok(())
}

fn wait_for_room(pipes: &[OwnedFd]) -> Result<()> {
    let mut polled: Vec<_> = (pipes.iter())
        .map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLOUT))
        .collect();
    poll(&mut polled, PollTimeout::NONE)?;
    Ok(())
}
