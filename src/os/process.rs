//! Processes, distinguished from later ones of the same number; and this process in the
//! background.

#![allow(unsafe_code)]

use std::fs::{self, File};
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::str::FromStr;

use anyhow::{Context, Result};
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout, fork, setsid};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// When a process was started, in clock ticks since the machine was.
pub(crate) fn start_of(pid: u32) -> Option<u64> {
    field_of(pid, 22)
}

/// The PID of a process's parent; `None` for one that has none here.
pub(crate) fn parent_of(pid: u32) -> Option<u32> {
    field_of(pid, 4).filter(|&parent| parent != 0)
}

fn field_of<T: FromStr>(pid: u32, number: usize) -> Option<T> {
    fields_of(pid, number..=number)?.parse().ok()
}

/// Fields of /proc/PID/stat, with blanks between them. The fields behind the name, which ends with
/// the last parenthesis, start with the third (proc(5)).
pub(crate) fn fields_of(pid: u32, numbers: RangeInclusive<usize>) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.trim_end().rsplit_once(") ")?;
    let fields: Vec<_> = fields.split(' ').collect();
    let (first, last) = (numbers.start() - 3, numbers.end() - 3);
    Some(fields.get(first..=last)?.join(" "))
}

/// A pidfd of a process.
///
/// # Errors
/// When it has ended, is out of sight, or no descriptor is left; and before Linux 5.3.
pub(crate) fn open(pid: i32) -> Result<OwnedFd> {
    let pid = Pid::from_raw(pid).context("it is out of our sight")?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// Closes all descriptors but the standard streams, before anything is opened, or only marks them
/// close-on-exec. Kernels before 5.11, and seccomp profiles that do not know the call, refuse it:
/// then descriptors that others have left open stay, and our own are close-on-exec anyway.
pub(crate) fn close_range(flags: libc::c_uint) {
    let (first, last) = (3_u32, u32::MAX);
    // SAFETY: either only a flag is set, or the descriptors that another program has left open are
    // closed before anything of ours is open. No memory is involved.
    unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) };
}

/// Has `work` go on as a process of a session of its own, which reads nothing, and whose standard
/// output and standard error are `log`. Its exit status is what `work` returns. There must be no
/// other threads.
///
/// # Errors
/// When `fork` fails, and when there is no /dev/null.
pub(crate) fn go_on_in_background(log: OwnedFd, work: impl FnOnce() -> u8) -> Result<()> {
    let null = File::open("/dev/null").context("opening /dev/null")?;
    // SAFETY: this is the only thread, so that no lock is held by one that the new process lacks.
    if unsafe { fork() }.context("starting a process")?.is_child() {
        let detached = setsid()
            .and_then(|_| dup2_stdin(null))
            .and_then(|()| dup2_stdout(&log))
            .and_then(|()| dup2_stderr(log));
        let status = detached.map_or(1, |()| work());
        std::process::exit(status.into())
    }
    Ok(())
}
