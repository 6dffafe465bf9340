//! The guardian of the application: a process that does nothing but wait for our end.
//!
//! A page that is missing when the last userfaultfd of its process is closed reads as zero, without
//! a word. So no userfaultfd is ever closed by one death alone: the guardian shares our table of
//! descriptors (`CLONE_FILES`), which includes that of a child just forked. When we end while a
//! userfaultfd is open, the guardian kills the application, and ends, with the table, when the
//! kernel says that the memory is gone. When the guardian ends, we do the same.
//!
//! It has a session and a name of its own, and takes no signal but SIGKILL: a signal to our process
//! group, or to all programs of our name, does not end it. Nothing helps when both end at once, as
//! with a whole cgroup that is killed without the application.

#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{BorrowedFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFlags, PollTimeout};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::prctl;
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, setsid};
use rustix::process::{Signal, pidfd_send_signal};

use super::{socket, userfaultfd};
use crate::os::descriptor::{poll, uninterrupted};
use crate::os::process::{self, fields_of, start_of};

/// The time between two looks at processes that were killed.
const NEXT_LOOK: Duration = Duration::from_millis(2);

/// The guardian, and its knowledge of the application.
#[derive(Debug)]
pub(crate) struct Guardian {
    /// Readable when the guardian has ended.
    pub(super) process: OwnedFd,
    pid: Pid,
    /// CRIU's connection and the restored processes, in a file that the guardian shares: a line for
    /// each, with the number of its descriptor, and later one with the layout of its memory.
    record: File,
    /// This process, for whose end the guardian waits: it has the same descriptors.
    _streamer: OwnedFd,
}

impl Guardian {
    /// Starts the guardian. There must be no other threads.
    ///
    /// # Errors
    /// Those of `clone`, and where there are no pidfds (before Linux 5.3).
    pub(crate) fn start() -> Result<Self> {
        let record = File::from(memfd_create(c"restored", MFdFlags::MFD_CLOEXEC)?);
        let streamer = process::open(std::process::id() as i32).context("opening this process")?;
        let flags = (libc::CLONE_FILES | libc::SIGCHLD) as libc::c_ulong;
        let none: libc::c_ulong = 0;
        // SAFETY: without CLONE_VM this is a fork, and this is the only thread, so that no lock is
        // held by one that the new process lacks.
        let pid = unsafe { libc::syscall(libc::SYS_clone, flags, none, none, none, none) };
        if pid == 0 {
            guard(&streamer, &record);
            // SAFETY: nothing runs at this end; all that the process has is the streamer's.
            unsafe { libc::_exit(0) }
        }
        let pid = Errno::result(pid).context("starting the guardian")? as i32;
        Ok(Self {
            process: process::open(pid).context("opening the guardian")?,
            pid: Pid::from_raw(pid),
            record,
            _streamer: streamer,
        })
    }

    /// Adds a process, or the connection on which processes will say that they are restored. The
    /// descriptor stays open until this program ends.
    pub(super) fn add(&self, descriptor: OwnedFd) -> Result<()> {
        self.add_line(&descriptor.into_raw_fd().to_string())
    }

    /// Adds the layout by which all forked children of a process are found, unless it has ended.
    pub(super) fn add_layout(&self, pid: u32) -> Result<()> {
        let layout = layout_of(pid);
        layout.map_or(Ok(()), |(start, memory)| {
            self.add_line(&format!("{start} {memory}"))
        })
    }

    fn add_line(&self, line: &str) -> Result<()> {
        let written = (&self.record).write_all(format!("{line}\n").as_bytes());
        written.context("noting a restored process for the guardian")
    }

    /// Kills the application.
    pub(super) fn kill_all(&self) {
        kill_all(&self.record);
    }

    /// Ends the guardian, when there is nothing to guard any more.
    pub(super) fn end(&self) {
        let _ = pidfd_send_signal(&self.process, Signal::KILL);
        let _ = uninterrupted(|| waitpid(self.pid, None));
    }
}

/// Waits for the streamer's end, and kills the application.
fn guard(streamer: &OwnedFd, record: &File) {
    // Any of this may be refused: then more signals end both at once.
    let _ = setsid();
    let _ = prctl::set_name(c"memory-guardian");
    let arguments = fields_of(std::process::id(), 48..=48).and_then(|field| field.parse().ok());
    if let Some(start) = arguments {
        let (start, none): (libc::c_ulong, libc::c_ulong) = (start, 0);
        let end = libc::PR_SET_MM_ARG_END as libc::c_ulong;
        // SAFETY: no memory is touched; the command line that /proc shows ends where it starts.
        unsafe { libc::prctl(libc::PR_SET_MM, end, start, none, none) };
    }
    let _ = poll(streamer, PollFlags::POLLIN, PollTimeout::NONE);
    kill_all(record);
}

/// Kills all recorded processes and their forked children, until the memory behind each open
/// userfaultfd is gone.
fn kill_all(record: &File) {
    let mut bytes = vec![0; record.metadata().map_or(0, |file| file.len() as usize)];
    let _ = record.read_exact_at(&mut bytes, 0);
    let record = String::from_utf8_lossy(&bytes);
    loop {
        for descriptor in record.lines().filter_map(|line| line.parse().ok()) {
            // SAFETY: it was left open for this.
            let descriptor = unsafe { BorrowedFd::borrow_raw(descriptor) };
            let _ = pidfd_send_signal(descriptor, Signal::KILL);
            // Those that nobody has heard yet wait for CRIU, which may be gone.
            while let Some(sender) = socket::unheard(descriptor) {
                let _ = process::open(sender).map(|sender| pidfd_send_signal(sender, Signal::KILL));
            }
        }
        kill_forked(&record);
        // Where it cannot be found out, it is not so.
        if are_gone().unwrap_or(false) {
            return;
        }
        thread::sleep(NEXT_LOOK);
    }
}

/// Returns true if the memory behind all userfaultfds in the table is gone.
fn are_gone() -> io::Result<bool> {
    for file in fs::read_dir("/proc/self/fd")? {
        let file = file?;
        let target = fs::read_link(file.path()).unwrap_or_default();
        if target.as_os_str() == "anon_inode:[userfaultfd]"
            && let Some(number) = file.file_name().to_str().and_then(|name| name.parse().ok())
        {
            // SAFETY: one that was closed since is some other file, or none, and asking is
            // harmless.
            let uffd = unsafe { BorrowedFd::borrow_raw(number) };
            if !userfaultfd::is_gone(uffd) {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// The start of a process, and its PID namespace with the addresses of its data, heap, arguments
/// and environment: the same in all forked children, and by chance in no other process. `None` when
/// it has ended.
fn layout_of(pid: u32) -> Option<(u64, String)> {
    let namespace = fs::read_link(format!("/proc/{pid}/ns/pid")).ok()?;
    let memory = format!("{} {}", namespace.display(), fields_of(pid, 45..=51)?);
    Some((start_of(pid)?, memory))
}

/// Kills the forked children of the recorded processes.
fn kill_forked(record: &str) {
    let is_forked = |start: u64, memory: &str| {
        let mut layouts = record.lines().filter_map(|line| line.split_once(' '));
        layouts.any(|(parent, layout)| {
            layout == memory && parent.parse().is_ok_and(|parent: u64| parent <= start)
        })
    };
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    for pid in processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()) {
        if let Ok(process) = process::open(pid)
            && let Some((start, memory)) = layout_of(pid as u32)
            && is_forked(start, &memory)
        {
            let _ = pidfd_send_signal(&process, Signal::KILL);
        }
    }
}
