//! The command that runs CRIU: `capture -- criu dump …`, `serve -- criu restore …`.
//!
//! Its end is part of the transfer's: a failure fails the transfer at once, and an image is whole
//! only when the command has ended well, since CRIU can fail after it has delivered everything
//! (unlocking the network, an action script).
//!
//! **One process.** The command is waited for by its number, and nothing else of it: what CRIU has
//! restored is no business of ours.
//!
//! **It is never ended.** CRIU has no handler for SIGTERM or SIGINT (`git grep` finds none in 4.2).
//! In the middle of a dump these kill it, with the application's connections locked, its cgroup
//! frozen, and code of CRIU's in it. A CRIU whose pipes break lets the application go on as it was.
//! So when the transfer fails, CRIU loses its pipes, and is waited for. After a signal we are in a
//! hurry, and [`RESUME_TIMEOUT`] has to do: CRIU goes on by itself.
//!
//! **Signals of the whole group.** The command is in our process group, as `--shell-job` needs it
//! in the terminal's foreground. So ^C, the terminal's hangup, and the SIGTERM of timeout(1), which
//! goes to its whole group, would kill CRIU beside us. A command of a capture ignores them, as with
//! `trap '' INT`: they end the transfer, and that ends CRIU in order. A command of a restore starts
//! with the default: nothing is lost with it, CRIU stays for as long as the application where
//! was not asked to detach it, and ends a helper of its own by SIGTERM (`stop_cgroupd`). SIGHUP
//! is left as we found it, for `nohup`.

use std::cell::Cell;
use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::rc::Rc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result};
use nix::sys::signal::SigHandler;
use nix::unistd::Pid;

use super::command::{END_INTERVAL, EXPLAIN_TIMEOUT};
use super::ending::Ending;
use super::program::{self, Inherited};
use super::signals::Signals;
use crate::os::descriptor::Direction;
use crate::report;

/// The time that CRIU has to let the application go on when a signal has ended the transfer: less
/// than supervisors wait before they send SIGKILL (10 s and more).
const RESUME_TIMEOUT: Duration = Duration::from_secs(8);

/// The words of a command that runs CRIU: at least one.
#[derive(Debug, Clone)]
pub(crate) struct CriuCommand {
    words: Vec<OsString>,
    /// The application lives on after a dump.
    lets_live: bool,
}

impl CriuCommand {
    /// `None` where there are no words.
    pub(crate) fn new(words: Vec<OsString>, lets_live: bool) -> Option<Self> {
        (!words.is_empty()).then_some(Self { words, lets_live })
    }

    fn text(&self) -> String {
        let words: Vec<_> = self.words.iter().map(|it| it.to_string_lossy()).collect();
        format!("`{}`", words.join(" "))
    }
}

/// The command at work. Dropped before it has ended, it is waited for.
pub(super) struct RunningCriu {
    pub(super) text: String,
    pub(super) process: Pid,
    signals: Rc<Signals>,
    /// A success means that the application is dead.
    kills: bool,
    /// How it has ended: well, too, if it goes on without us.
    ended: Cell<Option<ExitStatus>>,
}

impl RunningCriu {
    /// Starts the command of a transfer whose image goes in `direction`.
    ///
    /// # Errors
    /// When there is no such program.
    pub(super) fn start(
        command: &CriuCommand,
        direction: Direction,
        inherited: Inherited,
        signals: Rc<Signals>,
    ) -> Result<Self> {
        let text = command.text();
        let at_signals = match direction {
            Direction::Out => SigHandler::SigIgn,
            Direction::In => SigHandler::SigDfl,
        };
        let mut process = Command::new(&command.words[0]);
        process.args(&command.words[1..]);
        let process = program::start(process, at_signals, inherited)
            .with_context(|| format!("starting {text}"))?;
        Ok(Self {
            text,
            process,
            signals,
            kills: direction == Direction::Out && !command.lets_live,
            ended: Cell::new(None),
        })
    }

    /// Finds out whether it has ended, and fails if it has failed.
    pub(super) fn check(&self) -> Result<()> {
        if !self.has_ended() {
            let next = program::next_end(self.process.as_raw());
            self.take(next.with_context(|| format!("asking how {} ended", self.text))?);
        }
        let failure = self.failure();
        failure.map_or(Ok(()), |end| Err(self.error(end, "")))
    }

    /// Takes note of its end, if that is the next one.
    fn take(&self, next: Option<(Pid, ExitStatus)>) {
        if let Some((pid, end)) = next
            && pid == self.process
            && end.stopped_signal().is_none()
        {
            self.ended.set(Some(end));
        }
    }

    /// Reaps all that has ended. As PID 1 of a container this process becomes the parent of what
    /// the restored application leaves behind.
    pub(super) fn reap_all(&self) {
        while let Ok(next @ Some(_)) = program::next_end(-1) {
            self.take(next);
        }
    }

    /// How it has failed, if it has.
    fn failure(&self) -> Option<ExitStatus> {
        self.ended.get().filter(|end| !end.success())
    }

    /// The error for such a failure, with what it led to.
    fn error(&self, end: ExitStatus, led_to: &str) -> Error {
        let message = format!("{} {}{led_to}", self.text, program::failure(end));
        let status = program::exit_status(end);
        Ending::Criu { message, status }.into()
    }

    /// True if the application is dead, and its image all that is left of it, as far as
    /// [`RunningCriu::check`] has seen.
    pub(super) fn has_killed(&self) -> bool {
        self.kills && self.has_ended() && self.failure().is_none()
    }

    /// True if it has ended, as far as [`RunningCriu::check`] has seen.
    pub(super) fn has_ended(&self) -> bool {
        self.ended.get().is_some()
    }

    /// The reason behind an error that shows that CRIU is gone: the command is given the time to
    /// end and say why.
    pub(super) fn explain(&self, error: Error) -> Error {
        let end = Instant::now() + EXPLAIN_TIMEOUT;
        while self.is_running() && Instant::now() < end && self.signals.check().is_ok() {
            thread::sleep(END_INTERVAL);
        }
        match self.failure() {
            Some(end) => self.error(end, &format!(": {error:#}")),
            None => error,
        }
    }

    /// True if it has not ended now.
    fn is_running(&self) -> bool {
        self.check().is_ok() && !self.has_ended()
    }

    /// Lets it go on without us.
    pub(super) fn leave(&self) {
        report::warn(format_args!(
            "{} goes on, as process {}",
            self.text, self.process
        ));
        self.ended.set(Some(ExitStatus::default()));
    }
}

impl Drop for RunningCriu {
    fn drop(&mut self) {
        let mut until = None;
        while self.is_running() {
            if self.signals.check().is_err() || self.signals.has_ended_us.get() {
                until.get_or_insert_with(|| Instant::now() + RESUME_TIMEOUT);
            }
            if until.is_some_and(|until| until <= Instant::now()) {
                self.leave();
            }
            thread::sleep(END_INTERVAL);
        }
    }
}
