//! Shell commands that take or bring the shards (`--shard-cmd`) and the external files
//! (`--ext-file-cmd`).
//!
//! With `exec 10> >(lz4 | aws …)` a failed upload goes unnoticed, and a pipe cannot tell a `tar`
//! that has finished from one that has died. Here the streamer starts each command and waits for
//! it, and the transfer has succeeded only if every command did.
//!
//! **A command** is its shell, and every process of its group that the shell does not wait for:
//! with `tee >(upload)` the upload outlives the shell. As a subreaper we become the parent of such
//! a process when its own is gone, and wait for it as long as it takes; its failure is the
//! command's. Two kinds are not covered: one whose failure the shell itself took note of and kept
//! quiet about (`upload & cat`), and one that left the group, by `setsid` or by job control (`set
//! -m`): a daemon, such as ssh's control master, is to outlive the transfer.
//!
//! **Ends.** Each command is a process group of its own, so that a whole pipeline can be ended.
//! When a transfer fails, the groups get SIGTERM, and what is left of them after [`TERM_TIMEOUT`]
//! gets SIGKILL. Only then are their standard inputs closed: an upload that was cut short must not
//! take the end of its input for the end of the data. Processes whose shell is gone become our
//! children (we are a subreaper). So they can be waited for, and no group is signalled that has
//! ended.
//!
//! **Inherited** are standard error, and standard output where it is not the pipe; standard input
//! is /dev/null where it is not. Nothing else: see `program`.

use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow, bail, ensure};
use nix::poll::{PollFlags, PollTimeout};
use nix::sys::prctl::set_child_subreaper;
use nix::sys::signal::{SigHandler, Signal, killpg};
use nix::unistd::{AccessFlags, Pid, access};

use super::program::{self, Inherited};
use crate::format::ImageName;
use crate::os::descriptor::{Direction, poll};
use crate::os::pipe::{self, LARGEST};

/// The time that a command has to clean up after SIGTERM.
const TERM_TIMEOUT: Duration = Duration::from_secs(5);

/// The time that a command has to end and give the reason why its pipe, or CRIU, is gone.
pub(super) const EXPLAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// The interval at which commands that are about to end are checked.
pub(super) const END_INTERVAL: Duration = Duration::from_millis(5);

/// A shard or an external file, which a command takes or brings.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Target {
    /// The shard of this number, from 0.
    Shard(usize),
    ExternalFile(ImageName),
}

/// A command for one shard or external file.
#[derive(Debug, Clone)]
pub(crate) struct ShellCommand {
    target: Target,
    /// Its name in messages.
    pub(crate) label: String,
    /// Given to the shell.
    text: String,
}

impl ShellCommand {
    /// One command for each shard: `{}` in the text is the shard's number, and `index` for one more
    /// where there is an index.
    pub(crate) fn for_shards(text: &str, shards: usize, has_index: bool) -> Vec<Self> {
        let names = (1..=shards).map(|number| number.to_string());
        let all = names.chain(has_index.then(|| "index".to_owned()));
        all.enumerate()
            .map(|(number, name)| Self {
                target: Target::Shard(number),
                label: format!("shard command {name}"),
                text: text.replace("{}", &name),
            })
            .collect()
    }

    /// The command of an external file.
    pub(crate) fn for_file(name: ImageName, text: String) -> Self {
        Self {
            label: format!("the command of external file {name}"),
            target: Target::ExternalFile(name),
            text,
        }
    }

    /// Checks that the failure of any program in a command will be known.
    ///
    /// # Errors
    /// When it is a pipeline, and no shell here gives one the status of all its programs.
    pub(crate) fn check_shell(text: &str) -> Result<()> {
        let knows_pipefail =
            || program::succeeds(Command::new("sh").args(["-o", "pipefail", "-c", ":"]));
        ensure!(
            has_bash() || !is_pipeline(text) || knows_pipefail(),
            "`{text}` is a pipeline, and only the failure of its last program would be known: there is no bash here, and sh has no `pipefail`; install bash"
        );
        Ok(())
    }

    fn with_text(&self) -> String {
        format!("{}, `{}`", self.label, self.text)
    }

    /// True if it takes or brings an external file.
    pub(crate) fn has_file(&self) -> bool {
        matches!(self.target, Target::ExternalFile(_))
    }

    /// True if it takes or brings the shard of this number, from 0.
    pub(crate) fn is_for_shard(&self, number: usize) -> bool {
        self.target == Target::Shard(number)
    }

    /// True if it takes or brings this external file.
    pub(super) fn is_for_file(&self, name: &ImageName) -> bool {
        matches!(&self.target, Target::ExternalFile(it) if it == name)
    }
}

/// A process of a command's group, as errors call it.
type Process = &'static str;

struct Running {
    command: ShellCommand,
    /// Which way its data goes.
    direction: Direction,
    group: Pid,
    /// A copy of our end of the pipe: shows when the command has closed its own, and keeps its
    /// input from ending.
    pipe: Option<OwnedFd>,
    /// The end of the process that has failed, or a success, as far as it is known.
    ended: Cell<Option<(Process, ExitStatus)>>,
}

/// Commands at work. Dropped before they have ended, they are ended.
#[derive(Default)]
pub(super) struct Commands {
    running: Vec<Running>,
    /// `$CRIU_IMAGE_NAME`.
    pub(super) image_name: Option<String>,
}

impl Commands {
    /// Starts a command whose data goes in `direction`, in a process group of its own, and returns
    /// our end of its pipe.
    pub(super) fn start(
        &mut self,
        command: ShellCommand,
        direction: Direction,
        inherited: Inherited,
    ) -> Result<OwnedFd> {
        let (read, write) = io::pipe().context("creating a pipe")?;
        let (ours, stdin, stdout) = match direction {
            Direction::Out => (OwnedFd::from(write), read.into(), Stdio::inherit()),
            Direction::In => (read.into(), Stdio::null(), write.into()),
        };
        if command.has_file() {
            pipe::grow(&ours, LARGEST)?;
        }
        let pipe = Some(ours.try_clone()?);
        // Processes whose parents are gone become our children.
        set_child_subreaper(true).context("preparing to wait for commands")?;
        let has_bash = has_bash();
        let mut shell = Command::new(if has_bash { "bash" } else { "sh" });
        if has_bash || is_pipeline(&command.text) {
            shell.args(["-o", "pipefail"]);
        }
        shell.args(["-c", &command.text]);
        let image_name = self.image_name.iter();
        shell.envs(image_name.map(|name| ("CRIU_IMAGE_NAME", name)));
        shell.stdin(stdin).stdout(stdout).process_group(0);
        let group = program::start(shell, SigHandler::SigDfl, inherited)
            .with_context(|| format!("starting a shell for {}", command.with_text()))?;
        self.running.push(Running {
            command,
            direction,
            group,
            pipe,
            ended: Cell::new(None),
        });
        Ok(ours)
    }

    /// Fails if a command has failed, with what it is for, its text and status.
    pub(super) fn check(&self) -> Result<()> {
        self.running.iter().try_for_each(Running::check)
    }

    /// Lets the commands that are meant see the end of their input.
    pub(super) fn close_pipes(&mut self, is_meant: impl Fn(&ShellCommand) -> bool) {
        for running in &mut self.running {
            running.pipe.take_if(|_| is_meant(&running.command));
        }
    }

    /// True if all that are meant have ended well, as far as [`Commands::check`] has seen.
    pub(super) fn have_succeeded(&self, is_meant: impl Fn(&ShellCommand) -> bool) -> bool {
        let mut running = self.running.iter();
        running.all(|running| !is_meant(&running.command) || running.has_succeeded())
    }

    /// The reason behind an error of the transfer: a command that closed its pipe is given the time
    /// to end and say why.
    pub(super) fn explain(&self, error: Error) -> Error {
        let end = Instant::now() + EXPLAIN_TIMEOUT;
        while self.check().is_ok()
            && Instant::now() < end
            && self.running.iter().any(Running::is_about_to_end)
        {
            std::thread::sleep(END_INTERVAL);
        }
        if let Err(reason) = self.check() {
            return reason;
        }
        let early = self.running.iter().find(|running| {
            running.direction == Direction::Out && running.has_succeeded() && running.pipe.is_some()
        });
        match early {
            Some(running) => anyhow!(
                "{}: it ended with exit status 0 before it had read everything, and the rest is lost",
                running.command.with_text()
            ),
            None => error,
        }
    }
}

impl Running {
    fn has_succeeded(&self) -> bool {
        self.ended.get().is_some_and(|(_, end)| end.success())
    }

    /// Finds out what became of the command, and fails if it has failed.
    fn check(&self) -> Result<()> {
        while self.ended.get().is_none() {
            let ended = match self.next_end() {
                Ok(None) => break,
                Ok(Some((_, end))) if end.success() || will_go_on(end) => continue,
                Ok(Some(failed)) => failed,
                // No process of the group is left.
                Err(_) => ("it", ExitStatus::default()),
            };
            self.ended.set(Some(ended));
        }
        match self.ended.get() {
            Some((process, end)) if !end.success() => {
                let failure = program::failure(end);
                bail!("{}: {process} {failure}", self.command.with_text())
            }
            _ => Ok(()),
        }
    }

    /// How the next process of the group ended or stopped, if one has.
    fn next_end(&self) -> nix::Result<Option<(Process, ExitStatus)>> {
        let shell = self.group.as_raw();
        // A shell that has left its own group is waited for all the same.
        let next = program::next_end(-shell).or_else(|_| program::next_end(shell))?;
        Ok(next.map(|(pid, end)| match pid == self.group {
            true => ("it", end),
            false => ("a process that it left in the background", end),
        }))
    }

    /// True if the command runs on although its end of the pipe is closed.
    fn is_about_to_end(&self) -> bool {
        let Some(pipe) = &self.pipe else { return false };
        let gone = PollFlags::POLLERR | PollFlags::POLLHUP;
        self.ended.get().is_none()
            && poll(pipe, PollFlags::empty(), PollTimeout::ZERO)
                .is_ok_and(|events| events.intersects(gone))
    }

    /// Reaps the processes of the group that have ended, and returns true if some are left.
    fn reap(&self) -> bool {
        while let Ok(next) = program::next_end(-self.group.as_raw()) {
            if next.is_none() {
                return true;
            }
        }
        false
    }
}

impl Drop for Commands {
    fn drop(&mut self) {
        let is_told = self.running.iter().all(|running| running.pipe.is_none());
        let has_ended_well = is_told && self.have_succeeded(|_| true);
        let mut left: Vec<_> = self.running.iter().collect();
        left.retain(|running| running.reap());
        if has_ended_well {
            return;
        }
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            for running in &left {
                // It was there a moment ago, and is ours. If it has ended by itself, so much the
                // better.
                let _ = killpg(running.group, signal);
                let _ = killpg(running.group, Signal::SIGCONT);
            }
            let end = Instant::now() + TERM_TIMEOUT;
            while !left.is_empty() && Instant::now() < end {
                left.retain(|running| running.reap());
                std::thread::sleep(END_INTERVAL);
            }
        }
    }
}

/// True if a process was stopped by another one, which will have it go on. One that wants to ask on
/// a terminal has stopped for ever, as it is not in the foreground.
fn will_go_on(end: ExitStatus) -> bool {
    let signal = end.stopped_signal();
    signal.is_some_and(|signal| ![libc::SIGTTIN, libc::SIGTTOU].contains(&signal))
}

/// True if a command may be a pipeline: it has a `|` that is not half of `||`.
fn is_pipeline(text: &str) -> bool {
    text.replace("||", "").contains('|')
}

fn has_bash() -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| access(&dir.join("bash"), AccessFlags::X_OK).is_ok())
}
