//! The guardian of the application: a process that does nothing but wait for our end.
//!
//! What is missing in a process when its last userfaultfd is closed reads as zero, without a word.
//! So no userfaultfd is ever closed by one death alone: the guardian shares our table of
//! descriptors (`CLONE_FILES`), that of a child just forked included. When we end before a
//! userfaultfd of the table is done with, the guardian kills the application, and ends, with the
//! table, when the kernel says that its memory is gone. When the guardian ends, we do the same.
//!
//! It has a session of its own, and takes no signal but SIGKILL: what ends our process group does
//! not end it. Nothing holds what ends both at once: a whole cgroup that is killed without the
//! application.

#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::prctl;
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, setsid};
use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::userfaultfd;
use crate::os::pipe::uninterrupted;
use crate::os::process::{fields_of, start_of};

/// Between two looks at processes that were killed.
const NEXT_LOOK: Duration = Duration::from_millis(2);

/// The guardian, and what it has to know.
#[derive(Debug)]
pub(super) struct Guardian {
    process: OwnedFd,
    pid: Pid,
    record: Record,
    /// This process. The guardian waits for it by this descriptor, which is its own, too.
    _streamer: OwnedFd,
}

impl Guardian {
    /// Starts it. There must be no other threads.
    ///
    /// # Errors
    /// Those of `clone`, and where there are no pidfds (before Linux 5.3).
    pub(super) fn start() -> Result<Self> {
        let record = Record(File::from(memfd_create(
            c"restored",
            MFdFlags::MFD_CLOEXEC,
        )?));
        let streamer = process(std::process::id() as i32).context("opening this process")?;
        let flags = (libc::CLONE_FILES | libc::SIGCHLD) as libc::c_ulong;
        let none: libc::c_ulong = 0;
        // SAFETY: without CLONE_VM this is a fork, and this is the only thread, so that no lock is
        // held by one that the new process lacks.
        let pid = unsafe { libc::syscall(libc::SYS_clone, flags, none, none, none, none) };
        if pid == 0 {
            wait_for(&streamer, &record);
            // SAFETY: nothing runs at this end; all that the process has is the streamer's.
            unsafe { libc::_exit(0) }
        }
        let pid = Errno::result(pid).context("starting the guardian")? as i32;
        Ok(Self {
            process: process(pid).context("opening the guardian")?,
            pid: Pid::from_raw(pid),
            record,
            _streamer: streamer,
        })
    }

    pub(super) fn record(&self) -> &Record {
        &self.record
    }

    /// Kills the application, all of it, and waits until the kernel says that it is gone.
    pub(super) fn kill_application(&self) {
        self.record.kill_all();
    }
}

/// Becomes readable when the guardian has ended.
impl AsFd for Guardian {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.process.as_fd()
    }
}

/// There must be no userfaultfd any more.
impl Drop for Guardian {
    fn drop(&mut self) {
        let _ = pidfd_send_signal(&self.process, Signal::KILL);
        let _ = uninterrupted(|| waitpid(self.pid, None));
    }
}

/// What the guardian does.
fn wait_for(streamer: &OwnedFd, record: &Record) {
    // Any of this may be refused: then more things end both at once.
    let _ = setsid();
    take_another_name();
    let mut fds = [PollFd::new(streamer.as_fd(), PollFlags::POLLIN)];
    let _ = uninterrupted(|| poll(&mut fds, PollTimeout::NONE));
    record.kill_all();
}

/// Takes this process out of the sight of those that end ours by its name (`pkill -f`).
fn take_another_name() {
    let _ = prctl::set_name(c"memory-guardian");
    if let Some(arguments) = fields_of(std::process::id(), 48..=48)
        && let Ok(start) = arguments.parse::<libc::c_ulong>()
    {
        let (end, none) = (libc::PR_SET_MM_ARG_END as libc::c_ulong, 0 as libc::c_ulong);
        // SAFETY: no memory is touched; the command line that /proc shows ends where it starts.
        unsafe { libc::prctl(libc::PR_SET_MM, end, start, none, none) };
    }
}

/// A descriptor of a process.
pub(super) fn process(pid: i32) -> Result<OwnedFd> {
    let pid = rustix::process::Pid::from_raw(pid).context("it is out of our sight")?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// The restored processes, in a file that the guardian shares: a line for each, with the number of
/// its descriptor, or with the layout of its memory.
#[derive(Debug)]
pub(super) struct Record(File);

impl Record {
    /// Adds a process. Its descriptor stays open until this program ends.
    pub(super) fn add(&self, process: OwnedFd) -> Result<()> {
        let descriptor = process.as_raw_fd();
        std::mem::forget(process);
        self.line(&format!("process {descriptor}"))
    }

    /// Adds what the process and all that it forks have in common.
    pub(super) fn add_layout(&self, layout: &Layout) -> Result<()> {
        self.line(&format!("layout {} {}", layout.start, layout.memory))
    }

    fn line(&self, line: &str) -> Result<()> {
        let mut file = &self.0;
        let written = file.write_all(format!("{line}\n").as_bytes());
        written.context("noting a restored process for the guardian")
    }

    fn read(&self) -> String {
        let len = self.0.metadata().map_or(0, |file| file.len() as usize);
        let mut bytes = vec![0; len];
        let _ = self.0.read_exact_at(&mut bytes, 0);
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Kills all processes that are recorded, and what they have forked, until the memory behind
    /// each open userfaultfd is gone.
    fn kill_all(&self) {
        let record = self.read();
        let mut layouts = Vec::new();
        let mut processes = Vec::new();
        for line in record.lines() {
            if let Some(descriptor) = line.strip_prefix("process ") {
                processes.extend(descriptor.parse::<RawFd>());
            } else if let Some((start, memory)) = line
                .strip_prefix("layout ")
                .and_then(|line| line.split_once(' '))
            {
                layouts.extend(start.parse().map(|start| Layout {
                    start,
                    memory: memory.to_owned(),
                }));
            }
        }
        loop {
            for &descriptor in &processes {
                // SAFETY: it was left open for this.
                let process = unsafe { BorrowedFd::borrow_raw(descriptor) };
                let _ = pidfd_send_signal(process, Signal::KILL);
            }
            if !layouts.is_empty() {
                kill_forked(&layouts);
            }
            if userfaultfds().into_iter().all(|descriptor| {
                // SAFETY: one that was closed since is some other file, or none, and asking is
                // harmless.
                userfaultfd::is_gone(unsafe { BorrowedFd::borrow_raw(descriptor) })
            }) {
                return;
            }
            thread::sleep(NEXT_LOOK);
        }
    }
}

/// The userfaultfds in the table.
fn userfaultfds() -> Vec<RawFd> {
    let open = fs::read_dir("/proc/self/fd")
        .into_iter()
        .flatten()
        .flatten();
    let is_userfaultfd = |file: &fs::DirEntry| {
        fs::read_link(file.path())
            .is_ok_and(|target| target.as_os_str() == "anon_inode:[userfaultfd]")
    };
    let numbers = open
        .filter(is_userfaultfd)
        .filter_map(|file| file.file_name().to_str()?.parse().ok());
    numbers.collect()
}

/// How the memory of a process is laid out: the same in all that it forks, and by chance in no
/// other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layout {
    /// When the process was started.
    start: u64,
    /// Its PID namespace, and where its program, stack, heap and arguments are.
    memory: String,
}

impl Layout {
    /// `None` when the process is gone.
    pub(super) fn of(pid: u32) -> Option<Self> {
        let namespace = fs::read_link(format!("/proc/{pid}/ns/pid")).ok()?;
        let program = fields_of(pid, 26..=28)?;
        let data = fields_of(pid, 45..=51)?;
        Some(Self {
            start: start_of(pid)?,
            memory: format!("{} {program} {data}", namespace.display()),
        })
    }
}

/// Kills what the processes of these layouts have forked.
fn kill_forked(layouts: &[Layout]) {
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        if let Some(pid) = pid
            && let Ok(process) = process(pid)
            && let Some(found) = Layout::of(pid as u32)
            && layouts
                .iter()
                .any(|layout| layout.memory == found.memory && layout.start <= found.start)
        {
            let _ = pidfd_send_signal(&process, Signal::KILL);
        }
    }
}
