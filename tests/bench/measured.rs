//! A process whose CPU time and memory are measured from its first instruction to its last.
//!
//! The CPU time comes from wait4. The peak of resident memory cannot come from there: `ru_maxrss`
//! of a child starts with what its parent had when it forked. `VmHWM` in /proc counts the program
//! alone, but is gone once the process has ended. So the process is seized with ptrace, with no
//! other wish than to be stopped at the door when it exits, its memory still in place. A process
//! traced like this runs at full speed.
#![allow(unsafe_code)] // ptrace and wait4 have no safe form here.

use crate::clock::now_ns;
use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;
use std::{
    fs, io, mem,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::process::ExitStatusExt,
    },
    process::{Child, Command, ExitStatus},
    ptr,
    sync::mpsc,
    thread,
};

/// Starts a process that keeps `inherited` open, under the same numbers.
///
/// The descriptors lose their close-on-exec flag for that moment: no other thread may start a
/// process meanwhile.
pub fn spawn_with_fds(command: &mut Command, inherited: &[BorrowedFd]) -> Result<Child> {
    for fd in inherited {
        fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
    }
    let child = command.spawn();
    for fd in inherited {
        fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    }
    child.with_context(|| format!("Failed to start {:?}", command.get_program()))
}

pub struct Finished {
    pub status: ExitStatus,
    pub cpu_s: f64,
    pub peak_rss_bytes: u64,
    pub ended_ns: u64,
}

pub struct Measured {
    pub pid: i32,
    tracer: thread::JoinHandle<Result<Finished>>,
}

impl Measured {
    /// The process inherits these descriptors, and we lose them.
    pub fn spawn(mut command: Command, inherited: Vec<OwnedFd>) -> Result<Self> {
        let (started, pid) = mpsc::sync_channel(1);
        // Only the thread that seized a process may wait for its stops and let it go on.
        let tracer = thread::spawn(move || {
            let fds: Vec<_> = inherited.iter().map(AsFd::as_fd).collect();
            let child = spawn_with_fds(&mut command, &fds);
            drop(fds);
            drop(inherited);
            // The command holds our copies of the child's standard streams.
            drop(command);
            let pid = child?.id() as i32;
            let seized = seize(pid);
            let _ = started.send(pid);
            watch(pid, seized.is_ok())
        });
        match pid.recv() {
            Ok(pid) => Ok(Self { pid, tracer }),
            Err(_) => match tracer.join() {
                Ok(Err(error)) => Err(error),
                _ => bail!("Nothing was started"),
            },
        }
    }

    /// CPU time so far.
    pub fn cpu_s(&self) -> Result<f64> {
        cpu_s(self.pid)
    }

    /// Peak of resident memory so far.
    pub fn peak_rss_bytes(&self) -> Result<u64> {
        peak_rss_bytes(self.pid)
    }

    pub fn wait(self) -> Result<Finished> {
        self.tracer.join().expect("the tracer does not panic")
    }
}

fn seize(pid: i32) -> io::Result<()> {
    // SAFETY: PTRACE_SEIZE reads no memory of ours, its last argument is a bit mask.
    let result = unsafe {
        libc::ptrace(
            libc::PTRACE_SEIZE,
            pid,
            ptr::null_mut::<libc::c_void>(),
            (libc::PTRACE_O_TRACEEXIT | libc::PTRACE_O_EXITKILL) as usize as *mut libc::c_void,
        )
    };
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Lets the process run on after each of its stops, until it has ended.
fn watch(pid: i32, seized: bool) -> Result<Finished> {
    let mut peak_at_exit = None;
    loop {
        let mut status = 0;
        // SAFETY: a rusage of all zeros is a valid one.
        let mut usage: libc::rusage = unsafe { mem::zeroed() };
        // SAFETY: both pointers are to live variables of the right types.
        if unsafe { libc::wait4(pid, &mut status, libc::__WALL, &mut usage) } == -1 {
            let error = io::Error::last_os_error();
            if error.kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return Err(error).context("Failed to wait for the measured process");
        }
        if libc::WIFSTOPPED(status) {
            let event = status >> 16;
            if event == libc::PTRACE_EVENT_EXIT {
                peak_at_exit = peak_rss_bytes(pid).ok();
            }
            let signal = if event == 0 {
                libc::WSTOPSIG(status)
            } else {
                0
            };
            // SAFETY: PTRACE_CONT reads no memory of ours, its last argument is a signal number.
            unsafe {
                libc::ptrace(
                    libc::PTRACE_CONT,
                    pid,
                    ptr::null_mut::<libc::c_void>(),
                    signal as usize as *mut libc::c_void,
                )
            };
            continue;
        }
        let ended_ns = now_ns();
        ensure!(
            !seized || peak_at_exit.is_some(),
            "The measured process ended without a stop at its exit"
        );
        let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
        return Ok(Finished {
            status: ExitStatus::from_raw(status),
            cpu_s: seconds(usage.ru_utime) + seconds(usage.ru_stime),
            // Where ptrace is forbidden this is an upper bound, with our own memory in it.
            peak_rss_bytes: peak_at_exit.unwrap_or(usage.ru_maxrss as u64 * 1024),
            ended_ns,
        });
    }
}

/// CPU time of all our children that have ended and been waited for.
pub fn cpu_s_of_ended_children() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let seconds = |time: TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
}

/// The threads' exact times, or what the kernel's coarser clock counted where threads have ended
/// meanwhile.
pub fn cpu_s(pid: i32) -> Result<f64> {
    let mut running_ns = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let times = fs::read_to_string(task?.path().join("schedstat"))?;
        let on_cpu = times.split(' ').next().context("Empty schedstat")?;
        running_ns += on_cpu.parse::<u64>()?;
    }
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after_name = stat.rsplit(") ").next().context("Malformed stat")?;
    let ticks: u64 = (after_name.split(' ').skip(11).take(2))
        .map(|field| field.parse::<u64>().unwrap_or(0))
        .sum();
    const TICKS_PER_SECOND: f64 = 100.0; // USER_HZ, the same on every Linux that has a streamer.
    Ok((running_ns as f64 / 1e9).max(ticks as f64 / TICKS_PER_SECOND))
}

fn peak_rss_bytes(pid: i32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = (status.lines().find_map(|line| line.strip_prefix("VmHWM:")))
        .context("No VmHWM in /proc")?
        .trim()
        .trim_end_matches(" kB");
    Ok(kib.parse::<u64>()? * 1024)
}
