//! How large pipes are made, and what is left for others.
//!
//! Large pipes make a capture fast (docs/protocol.md, section 5). But an ordinary user has a
//! limited number of pages in pipes, over all processes, and CRIU needs some of them: it takes
//! memory out of the application through pipes of its own, and what sits in the application's pipes
//! through one of the same size. Where it gets none, the dump fails. So pipes grow only as far as a
//! part of the user's pages is left.
//!
//! **All shards have the same capacity.** One by one, the first would take all there is, and the
//! last would be left with next to nothing, and be slow.

use std::io;

use super::balancer::Slots;
use super::shard::Shard;
use crate::os::pipe::{self, DEFAULT_SLOTS, LARGEST, ReadEnd, WriteEnd, slot};
use crate::report;

/// Bytes that the largest of the application's pipes holds, and so the one through which CRIU takes
/// it out, unless `/proc/sys/fs/pipe-max-size` was raised.
const PIPE_OF_CRIU: usize = 1 << 20;

/// The most that is left for others, in bytes: what 32 such pipes hold. Where pages are large, a
/// third of the user's would be far more.
const MOST_LEFT: usize = 32 * PIPE_OF_CRIU;

/// Below this capacity, in bytes, a shard costs speed that a setting could give back.
const GOOD: usize = 1 << 20;

/// Gives the shards' pipes the largest capacity that all of them can have while a third of the
/// user's pages is left. Those that their readers have made larger are made smaller again.
pub(super) fn even_out(pipes: &[(WriteEnd, String)]) -> io::Result<()> {
    let left = (pipe::user_pages() / 3 * slot()).clamp(PIPE_OF_CRIU, MOST_LEFT);
    let smallest = DEFAULT_SLOTS * slot();
    let mut bytes = LARGEST;
    loop {
        for (pipe, _) in pipes {
            if pipe::slots(pipe)? * slot() > bytes {
                // Refused to one that holds more than that.
                let _ = pipe::resize(pipe, bytes);
            }
        }
        let reserve = pipe::reserve(left);
        let is_smallest = bytes <= smallest;
        if reserve.is_some() || is_smallest {
            let mut all_grown = true;
            for (pipe, _) in pipes {
                let is_grown = pipe::slots(pipe)? * slot() >= bytes;
                all_grown &= is_grown || pipe::resize(pipe, bytes).is_ok();
            }
            if all_grown || is_smallest {
                return Ok(());
            }
        }
        bytes /= 2;
    }
}

/// Gives the pipe of a large file the largest capacity that it can have while CRIU can still make a
/// pipe. Returns its capacity in slots, which was `slots`.
pub(super) fn grow_source(pipe: &ReadEnd, slots: usize) -> io::Result<usize> {
    match pipe::reserve(PIPE_OF_CRIU) {
        Some(_reserve) => pipe::grow(pipe, LARGEST),
        None => Ok(slots),
    }
}

/// Warns of the setting that keeps a shard's pipe small.
pub(super) fn warn_of_small_pipe(shard: &Shard) {
    let capacity = shard.slots() * slot();
    if capacity >= GOOD {
        return;
    }
    let help = if pipe::max_size() < GOOD {
        format!("raise /proc/sys/fs/pipe-max-size to {GOOD}")
    } else {
        "all pipes of a user share the pages of /proc/sys/fs/pipe-user-pages-soft, of which CRIU needs some; raise it (0 is no limit), or use fewer shards".into()
    };
    report::warn(format_args!(
        "{} holds only {} KiB, which makes the capture slow: {help}",
        shard.label,
        capacity >> 10
    ));
}
