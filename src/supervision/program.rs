//! Starting another program: what it gets of ours, and how its end is known.
//!
//! It starts as if a shell had started it. This process blocks the signals that it waits for, Rust
//! ignores SIGPIPE, naps end on time, and the limit on descriptors is raised, which breaks programs
//! that use `select` above 1024: the program gets none of that, and no descriptor but its standard
//! streams.

#![allow(unsafe_code)]

use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Stdio};

use nix::errno::Errno;
use nix::sys::prctl::{get_timerslack, set_timerslack};
use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};
use nix::sys::signal::{SigHandler, SigSet, Signal, signal};
use nix::unistd::Pid;

use super::signals::is_ignored;
use crate::os::descriptor::uninterrupted;
use crate::os::process::close_range;

/// Settings that this process was started with and changes for itself. Programs inherit them, and
/// so does every application that CRIU restores, for life.
#[derive(Debug, Clone, Copy)]
pub(super) struct Inherited {
    /// The soft and the hard limit on descriptors.
    descriptor_limit: (rlim_t, rlim_t),
    /// How late the kernel may end a sleep, in nanoseconds; 0 for the default.
    timer_slack: libc::c_ulong,
}

impl Inherited {
    /// The present settings.
    pub(super) fn now() -> nix::Result<Self> {
        Ok(Self {
            descriptor_limit: getrlimit(Resource::RLIMIT_NOFILE)?,
            timer_slack: get_timerslack().unwrap_or(0) as libc::c_ulong,
        })
    }
}

/// Starts a program, and returns its process, which is to be waited for. It ignores the signals
/// that end programs, or takes them by default; SIGHUP is then left as we found it, for `nohup`.
///
/// # Errors
/// When there is no such program, or no process can be made.
pub(super) fn start(
    mut command: Command,
    at_signals: SigHandler,
    inherited: Inherited,
) -> io::Result<Pid> {
    keep_ends()?;
    // SAFETY: between fork and exec, `prepare` makes system calls only and allocates nothing.
    unsafe { command.pre_exec(move || prepare(at_signals, inherited)) };
    let child = command.spawn()?;
    Ok(Pid::from_raw(child.id() as libc::pid_t))
}

/// Runs a program to its end, and returns true if it has succeeded.
pub(super) fn succeeds(command: &mut Command) -> bool {
    let quiet = command.stdin(Stdio::null()).stdout(Stdio::null());
    let status = keep_ends().and_then(|()| quiet.stderr(Stdio::null()).status());
    status.is_ok_and(|status| status.success())
}

/// Has the kernel keep how programs end: this process may have been started to ignore SIGCHLD.
///
/// Nothing is set where it is not ignored: setting the default action discards a SIGCHLD that is
/// waiting to be read, and with it the end of a command that was started before.
fn keep_ends() -> io::Result<()> {
    if is_ignored(Signal::SIGCHLD) {
        // SAFETY: the default is no function, so that none of ours can run at the wrong time.
        unsafe { signal(Signal::SIGCHLD, SigHandler::SigDfl) }?;
    }
    Ok(())
}

/// In the new process: gives it the signals and descriptors that a program expects.
fn prepare(at_signals: SigHandler, inherited: Inherited) -> io::Result<()> {
    let (soft, hard) = inherited.descriptor_limit;
    setrlimit(Resource::RLIMIT_NOFILE, soft, hard)?;
    // Where it is refused, it was refused to us as well.
    let _ = set_timerslack(inherited.timer_slack);
    // SAFETY: neither the default nor ignoring is a function, so that none of ours can run.
    let set = |number, handler| unsafe { signal(number, handler) };
    for number in [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM] {
        set(number, at_signals)?;
    }
    if matches!(at_signals, SigHandler::SigIgn) {
        set(Signal::SIGHUP, SigHandler::SigIgn)?;
    }
    set(Signal::SIGPIPE, SigHandler::SigDfl)?;
    SigSet::empty().thread_set_mask()?;
    close_range(libc::CLOSE_RANGE_CLOEXEC);
    Ok(())
}

/// The exit status that a shell would give a program that has ended so.
pub(super) fn exit_status(end: ExitStatus) -> u8 {
    let by_signal = end.signal().map(|signal| 128 + signal);
    end.code().or(by_signal).unwrap_or(1) as u8
}

/// How a program failed, as the end of a sentence about it.
pub(super) fn failure(end: ExitStatus) -> String {
    if let Some(status) = end.code() {
        return format!("failed with exit status {status}");
    }
    let Some(signal) = end.signal() else {
        return "wants to ask something on the terminal, and was stopped: give it keys or a password file, so that it has nothing to ask".into();
    };
    // A real-time one has no name.
    let name = Signal::try_from(signal).map_or(String::new(), |name| format!(" ({name})"));
    format!("failed with signal {signal}{name}")
}

/// How the next child has ended or was stopped: this one, or one of a group (a negative number), or
/// any (-1). `None` if none has yet.
///
/// # Errors
/// `ECHILD` when there is no such child.
pub(super) fn next_end(which: i32) -> nix::Result<Option<(Pid, ExitStatus)>> {
    let mut status = 0;
    let options = libc::WNOHANG | libc::WUNTRACED;
    let pid = uninterrupted(|| {
        // SAFETY: the pointer is to a local variable that outlives the call.
        Errno::result(unsafe { libc::waitpid(which, &mut status, options) })
    })?;
    Ok((pid != 0).then_some((Pid::from_raw(pid), ExitStatus::from_raw(status))))
}
