//! Shell commands that take the shards away, or bring them: `--shard-cmd`.
//!
//! With `exec 10> >(lz4 | aws …)` nobody ever learns that an upload failed. Here each command is started and waited for by the
//! streamer, and the transfer has succeeded only if every one did.
//!
//! **Ends.** Each command is a process group of its own, so that a whole pipeline can be ended. When a transfer fails, the groups
//! get SIGTERM, and what is left of them after [`GRACE`] gets SIGKILL. Only then are their standard inputs closed: an upload
//! that was cut short must not take the end of its input for the end of the data. Processes whose shell is gone
//! become our children (we are a subreaper), so that they can be waited for, and no group is signalled that has ended.
//!
//! **What they inherit.** Standard error, and on capture standard output; on restore standard input is /dev/null. No other
//! descriptor, no blocked signal, no ignored one: this process blocks the signals that it waits for, and Rust ignores SIGPIPE.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigHandler, SigSet, Signal, killpg, signal};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;

use crate::os::pipe::{self, ReadEnd, WriteEnd, uninterrupted};
use crate::supervision::signals::Interrupts;

/// How long a command may take to clean up after SIGTERM.
const GRACE: Duration = Duration::from_secs(5);

/// How long a command whose pipe is gone may take to end and say why.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Between two looks at commands that are about to end.
const LOOK: Duration = Duration::from_millis(5);

/// Signals whose handling a shell or supervisor may have changed for us, and commands should not inherit.
const RESET: [Signal; 5] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGPIPE,
    Signal::SIGTERM,
];

/// A command for one shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardCommand {
    /// From 1.
    pub number: usize,
    /// What the shell is given.
    pub text: String,
}

impl ShardCommand {
    /// The commands for so many shards: `{}` in the text is the shard's number.
    pub fn all(text: &str, shards: usize) -> Vec<Self> {
        (1..=shards)
            .map(|number| Self {
                number,
                text: text.replace("{}", &number.to_string()),
            })
            .collect()
    }

    /// What messages call it.
    pub fn label(&self) -> String {
        format!("shard command {}", self.number)
    }
}

/// What became of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Running,
    Succeeded,
    Failed(WaitStatus),
}

struct Running {
    command: ShardCommand,
    group: Pid,
    /// A copy of our end of the pipe. It tells whether the command has closed its own, and keeps its input from ending.
    pipe: Option<OwnedFd>,
    fate: Fate,
}

/// Which end of its pipe a command has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Task {
    Reads,
    Writes,
}

/// Commands at work. Dropped before they have ended, they are ended.
pub struct Commands {
    task: Task,
    running: Vec<Running>,
}

impl Commands {
    /// Starts commands that read from the pipes that are returned, with their labels.
    ///
    /// # Errors
    /// When one cannot be started.
    pub fn start_readers(commands: Vec<ShardCommand>) -> Result<(Self, Vec<(WriteEnd, String)>)> {
        let start = |command: &ShardCommand| {
            let (read, write) = pipe::new()?;
            let group = spawn(command, Stdio::from(OwnedFd::from(read)), Stdio::inherit())?;
            Ok((group, write.as_fd().try_clone_to_owned()?, write))
        };
        Self::start(Task::Reads, commands, start)
    }

    /// Starts commands that write to the pipes that are returned, with their labels.
    ///
    /// # Errors
    /// When one cannot be started.
    pub fn start_writers(commands: Vec<ShardCommand>) -> Result<(Self, Vec<(ReadEnd, String)>)> {
        let start = |command: &ShardCommand| {
            let (read, write) = pipe::new()?;
            let group = spawn(command, Stdio::null(), Stdio::from(OwnedFd::from(write)))?;
            Ok((group, read.as_fd().try_clone_to_owned()?, read))
        };
        Self::start(Task::Writes, commands, start)
    }

    fn start<E>(
        task: Task,
        commands: Vec<ShardCommand>,
        start: impl Fn(&ShardCommand) -> Result<(Pid, OwnedFd, E)>,
    ) -> Result<(Self, Vec<(E, String)>)> {
        prepare_to_wait().context("preparing to start the shard commands")?;
        let mut started = Self {
            task,
            running: Vec::new(),
        };
        let mut pipes = Vec::new();
        for command in commands {
            let label = command.label();
            let (group, pipe, end) =
                start(&command).with_context(|| format!("starting {label}, `{}`", command.text))?;
            started.running.push(Running {
                command,
                group,
                pipe: Some(pipe),
                fate: Fate::Running,
            });
            pipes.push((end, label));
        }
        Ok((started, pipes))
    }

    /// Fails if a command has failed.
    ///
    /// # Errors
    /// With the command's number, its text and its status.
    pub fn check(&mut self) -> Result<()> {
        for running in &mut self.running {
            running.look()?;
        }
        match self.running.iter().find_map(Running::failure) {
            Some(failure) => Err(failure),
            None => Ok(()),
        }
    }

    /// Waits for the end of all commands, which see the end of their input now.
    ///
    /// # Errors
    /// When one failed, and for a signal.
    pub fn finish(&mut self, interrupts: &Interrupts) -> Result<()> {
        for running in &mut self.running {
            running.pipe = None;
        }
        loop {
            // A command's end is a signal too, and looked at in there.
            interrupts.check()?;
            self.check()?;
            if self
                .running
                .iter()
                .all(|running| running.fate == Fate::Succeeded)
            {
                return Ok(());
            }
            let mut fds = [PollFd::new(interrupts.as_fd(), PollFlags::POLLIN)];
            uninterrupted(|| poll(&mut fds, PollTimeout::NONE))
                .context("waiting for the shard commands")?;
        }
    }

    /// The reason behind an error of the transfer: a command that closed its pipe is given the time to end and say why.
    pub fn explain(&mut self, error: anyhow::Error) -> anyhow::Error {
        let end = Instant::now() + LAST_WORDS;
        loop {
            if let Err(reason) = self.check() {
                return reason;
            }
            let about_to_end = self
                .running
                .iter()
                .any(|running| running.fate == Fate::Running && running.has_closed_pipe());
            if !about_to_end || Instant::now() > end {
                break;
            }
            std::thread::sleep(LOOK);
        }
        let early = self.running.iter().find(|running| {
            self.task == Task::Reads && running.fate == Fate::Succeeded && running.pipe.is_some()
        });
        match early {
            Some(running) => anyhow!(
                "{}: it ended with exit status 0 before it had read the whole shard, which is lost",
                running.name()
            ),
            None => error,
        }
    }
}

impl Running {
    fn name(&self) -> String {
        format!("{}, `{}`", self.command.label(), self.command.text)
    }

    /// Finds out whether the shell has ended. It is left to be waited for, so that its group stays its own.
    fn look(&mut self) -> Result<()> {
        if self.fate != Fate::Running {
            return Ok(());
        }
        let flags = WaitPidFlag::WEXITED
            | WaitPidFlag::WSTOPPED
            | WaitPidFlag::WNOHANG
            | WaitPidFlag::WNOWAIT;
        self.fate = match uninterrupted(|| waitid(Id::Pid(self.group), flags)) {
            // Nobody can bring it to the terminal's foreground: it would stand still for ever.
            Ok(status @ WaitStatus::Stopped(_, Signal::SIGTTIN | Signal::SIGTTOU)) => {
                Fate::Failed(status)
            }
            // Whoever stopped it will have it go on.
            Ok(WaitStatus::StillAlive | WaitStatus::Stopped(..)) => Fate::Running,
            Ok(WaitStatus::Exited(_, 0)) => Fate::Succeeded,
            Ok(status) => Fate::Failed(status),
            Err(error) => {
                bail!("{}: its exit status cannot be had: {error}", self.name())
            }
        };
        Ok(())
    }

    fn failure(&self) -> Option<anyhow::Error> {
        let Fate::Failed(status) = self.fate else {
            return None;
        };
        let how = match status {
            WaitStatus::Exited(_, status) => format!("exit status {status}"),
            WaitStatus::Signaled(_, signal, _) => {
                format!("signal {} ({signal})", signal as i32)
            }
            WaitStatus::Stopped(_, signal) => {
                return Some(anyhow!(
                    "{}: it wants to ask something on the terminal, and was stopped ({signal}): give it keys or a password file, so that it has nothing to ask",
                    self.name()
                ));
            }
            other => format!("{other:?}"),
        };
        Some(anyhow!("{}: it failed with {how}", self.name()))
    }

    fn has_closed_pipe(&self) -> bool {
        let Some(pipe) = &self.pipe else { return false };
        let mut fds = [PollFd::new(pipe.as_fd(), PollFlags::empty())];
        let gone = PollFlags::POLLERR | PollFlags::POLLHUP;
        uninterrupted(|| poll(&mut fds, PollTimeout::ZERO)).is_ok()
            && fds[0]
                .revents()
                .is_some_and(|events| events.intersects(gone))
    }

    /// Waits for what has ended of the group, and tells whether something is left of it.
    fn reap(&self) -> bool {
        loop {
            let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG;
            match uninterrupted(|| waitid(Id::PGid(self.group), flags)) {
                Ok(WaitStatus::StillAlive) => return true,
                Ok(_) => {}
                // The kernel's word that there is no child in the group; anything else leaves nothing to wait for either.
                Err(_) => return false,
            }
        }
    }
}

impl Drop for Commands {
    fn drop(&mut self) {
        let all_well = self
            .running
            .iter()
            .all(|running| running.fate == Fate::Succeeded && running.pipe.is_none());
        if all_well {
            for running in &self.running {
                running.reap();
            }
            return;
        }
        let mut left: Vec<_> = self
            .running
            .iter()
            .filter(|running| running.reap())
            .collect();
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            for running in &left {
                // It was there a moment ago, and is ours; if it has ended by itself, all the better.
                let _ = killpg(running.group, signal);
                let _ = killpg(running.group, Signal::SIGCONT);
            }
            let end = Instant::now() + GRACE;
            while !left.is_empty() && Instant::now() < end {
                left.retain(|running| running.reap());
                std::thread::sleep(LOOK);
            }
        }
    }
}

/// Children whose parents are gone become ours, and the ends of children are kept for us even if whoever started us wanted to hear of none.
fn prepare_to_wait() -> io::Result<()> {
    nix::sys::prctl::set_child_subreaper(true)?;
    // SAFETY: the default is no function, so that none of ours can run at the wrong time.
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigDfl) }?;
    Ok(())
}

/// Starts a command in a process group of its own, whose number is returned.
fn spawn(command: &ShardCommand, stdin: Stdio, stdout: Stdio) -> Result<Pid> {
    let mut bash = Command::new("bash");
    bash.args(["-o", "pipefail", "-c", &command.text]);
    let mut sh = Command::new("sh");
    sh.args(["-c", &command.text]);
    let shell = if has_bash() { &mut bash } else { &mut sh };
    shell.stdin(stdin).stdout(stdout).process_group(0);
    // SAFETY: between fork and exec, `prepare_child` makes system calls only and allocates nothing.
    unsafe { shell.pre_exec(prepare_child) };
    let child = shell.spawn().context("starting a shell")?;
    Ok(Pid::from_raw(child.id() as libc::pid_t))
}

fn has_bash() -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .any(|dir| nix::unistd::access(&dir.join("bash"), nix::unistd::AccessFlags::X_OK).is_ok())
}

/// In the new process: gives it the signals and descriptors that a program expects.
fn prepare_child() -> io::Result<()> {
    for number in RESET {
        // SAFETY: the default is no function, so that none of ours can run.
        unsafe { signal(number, SigHandler::SigDfl) }?;
    }
    SigSet::empty().thread_set_mask()?;
    const FIRST: libc::c_uint = 3;
    // SAFETY: it only sets a flag on descriptors; no memory is involved.
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            FIRST,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    match Errno::result(result) {
        // Older kernels (before 5.11) cannot; what we were given for ourselves is close-on-exec anyway.
        Ok(_) | Err(Errno::ENOSYS | Errno::EINVAL) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
