//! A child process that inherits chosen descriptors and is watched through a pidfd.
//!
//! The standard library has no safe form of these few system calls; each has one small function
//! here, and they are the only unsafe code of the tests.

#![allow(
    unsafe_code,
    reason = "pre_exec, pidfd_open, pidfd_send_signal, a thread's user and FIONREAD have no safe form"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{self, Command, ExitStatus};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

/// A limit that the child starts with, as with `ulimit`.
#[derive(Debug, Clone, Copy)]
pub enum Limit {
    OpenFiles(u64),
    /// The soft limit alone, which the child may raise again.
    SoftOpenFiles(u64),
    /// In bytes.
    AddressSpace(u64),
    /// In bytes. Writing more is an error (SIGXFSZ is ignored), as on a full disk.
    FileSize(u64),
    /// This system call fails with `EPERM`, as under a container engine's seccomp profile.
    Refused(libc::c_long),
    /// Those of the cgroup whose `cgroup.procs` is open there.
    Cgroup(RawFd),
}

/// A running child. It is reaped by [`Child::reap`] only, so its pid stays its own until then.
pub struct Child {
    process: process::Child,
    pidfd: OwnedFd,
}

impl Child {
    /// Starts `command` with `inherited` open under the numbers they have in this process, and
    /// nothing else but the standard streams: all other descriptors of the tests are close-on-exec.
    pub fn spawn(
        command: &mut Command,
        inherited: &[OwnedFd],
        limits: Vec<Limit>,
    ) -> io::Result<Self> {
        inherit(
            command,
            inherited.iter().map(AsRawFd::as_raw_fd).collect(),
            limits,
        );
        let process = command.spawn()?;
        let pidfd = open_pidfd(process.id())?;
        Ok(Self { process, pidfd })
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// A second handle for a watchdog: a signal sent through it never hits another process.
    pub fn pidfd(&self) -> io::Result<OwnedFd> {
        self.pidfd.try_clone()
    }

    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        send_signal(&self.pidfd, signal)
    }

    /// False: it is still running after that time.
    pub fn wait_for_end(&self, timeout: Duration) -> bool {
        wait_for_end(&self.pidfd, timeout)
    }

    /// Waits for the end, however long it takes.
    pub fn reap(&mut self) -> io::Result<ExitStatus> {
        self.process.wait()
    }
}

/// False: the process is still running after that time.
pub fn wait_for_end(pidfd: &OwnedFd, timeout: Duration) -> bool {
    let timeout = PollTimeout::try_from(timeout).expect("a timeout of less than a month");
    let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    loop {
        match poll(&mut fds, timeout) {
            Err(nix::Error::EINTR) => {}
            ready => return ready.expect("poll on a pidfd") > 0,
        }
    }
}

/// The result of a system call, or its error.
fn checked<T: Into<i64> + Copy>(result: T) -> io::Result<T> {
    if result.into() < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// An error means that the process has ended already.
pub fn send_signal(pidfd: &OwnedFd, signal: Signal) -> io::Result<()> {
    let (call, pidfd) = (libc::SYS_pidfd_send_signal, pidfd.as_raw_fd());
    let no_info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: the kernel reads no memory of ours: the only pointer is null, which the call allows.
    checked(unsafe { libc::syscall(call, pidfd, signal as i32, no_info, 0) }).map(drop)
}

/// Does something as another user, with this user's rights and limits: a pipe counts as the real
/// user's. It is a thread of its own that becomes the user, and ends: the C library changes a whole
/// process, the system call only the thread that makes it.
pub fn as_user<T: Send>(uid: u32, act: impl FnOnce() -> T + Send) -> T {
    let with_rights = move || {
        let unchanged = u32::MAX;
        // SAFETY: takes three integers; no memory is involved.
        checked(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, unchanged) })
            .unwrap_or_else(|why| panic!("become user {uid}: {why}"));
        act()
    };
    std::thread::scope(|scope| scope.spawn(with_rights).join().unwrap())
}

/// Has the child of `command` inherit these descriptors, and start with these limits.
pub fn inherit(command: &mut Command, fds: Vec<RawFd>, limits: Vec<Limit>) {
    let prepare = move || {
        for &fd in &fds {
            // SAFETY: changes a flag in the new process's own descriptor table; no memory is
            // involved.
            checked(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) })?;
        }
        limits.iter().try_for_each(|limit| set(*limit))
    };
    // SAFETY: between fork and exec `prepare` makes only system calls, which are async-signal-safe,
    // and allocates nothing: the vectors were built before the fork.
    unsafe { command.pre_exec(prepare) };
}

fn set(limit: Limit) -> io::Result<()> {
    let (resource, max) = match limit {
        Limit::Cgroup(members) => {
            // SAFETY: the pointer is to one constant byte. 0 is the process that writes.
            let written = unsafe { libc::write(members, b"0".as_ptr().cast(), 1) };
            return checked(written as i64).map(drop);
        }
        Limit::Refused(call) => return refuse(call),
        Limit::OpenFiles(max) | Limit::SoftOpenFiles(max) => (libc::RLIMIT_NOFILE, max),
        Limit::AddressSpace(max) => (libc::RLIMIT_AS, max),
        Limit::FileSize(max) => (libc::RLIMIT_FSIZE, max),
    };
    let mut to_set = libc::rlimit {
        rlim_cur: max,
        rlim_max: max,
    };
    // SAFETY: the pointers are to a local variable that outlives the calls; ignoring a signal sets
    // up no handler.
    unsafe {
        if matches!(limit, Limit::SoftOpenFiles(_)) {
            checked(libc::getrlimit(resource, &mut to_set))?;
            to_set.rlim_cur = max;
        }
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        checked(libc::setrlimit(resource, &to_set)).map(drop)
    }
}

/// From here on, and in all children, this system call fails with `EPERM`.
fn refuse(call: libc::c_long) -> io::Result<()> {
    let action = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    let step = |code: u32, jt, jf, k| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let number = std::mem::offset_of!(libc::seccomp_data, nr) as u32;
    let mut steps = [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, number),
        step(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            0,
            1,
            call as u32,
        ),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, action),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: steps.len() as u16,
        filter: steps.as_mut_ptr(),
    };
    // SAFETY: the program and its steps are local variables that outlive the calls. Without
    // privileges the first has to come before a filter.
    unsafe {
        checked(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        let mode = libc::SECCOMP_MODE_FILTER;
        checked(libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program)).map(drop)
    }
}

fn open_pidfd(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: takes two integers; no memory is involved.
    let fd = checked(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: the kernel just made this descriptor for us, and nothing else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Bytes that wait in a pipe.
pub fn queued(pipe: impl AsFd) -> usize {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the pointer is to a local int, which is what FIONREAD writes, and outlives the call.
    let result = unsafe { libc::ioctl(pipe.as_fd().as_raw_fd(), libc::FIONREAD, &mut bytes) };
    checked(result).expect("FIONREAD");
    bytes as usize
}
