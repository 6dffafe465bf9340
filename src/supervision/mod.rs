//! All that can end a transfer: a signal, a pump that fails, a command that fails, and the end of a
//! CRIU that has started us.
//!
//! The rest of the program knows only pipes. A descriptor that is one already is used as it is, at
//! no cost. For anything else a `pump` moves the data between a pipe and the descriptor, and a
//! `command` has a pipe for its standard input or output. A `criu_command` has none: it runs CRIU.
//!
//! A pipe cannot tell *why* its other end is gone, and to a reader a failure looks like the end. So
//! [`Supervisor::check`] is asked whenever it matters: while the transfer goes on, before the end
//! of the image is written, and before an image counts as received. Where a transfer fails because
//! an end is gone, [`Supervisor::conclude`] gives the reason why it is gone.
//!
//! **The reason first.** The program at the far end of a pipe fails when the pipe is closed, and a
//! supervisor that sees `tar` fail first takes that for the reason. So a [`Failure`] keeps open all
//! that the transfer had open until its reason is reported.

mod command;
mod criu_command;
mod ending;
mod program;
mod pump;
mod signals;
mod socket;

use std::any::Any;
use std::cell::{Cell, OnceCell, RefCell};
use std::io;
use std::mem;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow, ensure};
use nix::poll::{PollFlags, PollTimeout};
use nix::sys::prctl::set_child_subreaper;

use crate::format::ImageName;
use crate::os::descriptor::{Direction, FdKind, poll};
use crate::os::pipe::{self, Moved, ReadEnd, WriteEnd};
use crate::os::poller::{Interest, Poller, Wait, Watched};
use crate::report;
use command::Commands;
pub(crate) use command::ShellCommand;
pub(crate) use criu_command::CriuCommand;
use criu_command::RunningCriu;
pub(crate) use ending::Ending;
use program::Inherited;
use pump::PumpFailure;
pub(crate) use pump::Pumped;
use signals::Signals;

/// The interval at which commands that are to end are checked: no signal comes when a process
/// leaves a command's group.
pub(crate) const CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// Where a shard or an external file goes to, or comes from.
pub(crate) enum Endpoint {
    Descriptor(OwnedFd),
    Command(ShellCommand),
}

/// Why a transfer failed, and what it had open.
pub struct Failure {
    error: Error,
    open: Box<dyn Any>,
}

impl Failure {
    /// Keeps `open` until the error is reported.
    pub(crate) fn new(error: Error, open: impl Any) -> Self {
        Self {
            error,
            open: Box::new(open),
        }
    }

    /// The reason.
    pub fn error(&self) -> &Error {
        &self.error
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::new(error, ())
    }
}

/// The signals that came, and what is at the far ends of the pipes.
pub struct Supervisor {
    /// The only one, for all that is waited for.
    poller: Poller,
    signals: Rc<Signals>,
    /// The CRIU whose hook has started us. During a capture it waits for us while everything is
    /// frozen: if it ends first, it was killed, the application goes on, and may write to pages
    /// that are still in our pipes.
    caller: Option<OwnedFd>,
    caller_may_end: Cell<bool>,
    /// Settings that commands get as we got them.
    inherited: Inherited,
    /// The commands of external files are started in the middle of a capture.
    commands: RefCell<Commands>,
    /// Empty where we start no CRIU, and until then.
    criu: OnceCell<RunningCriu>,
    failure: PumpFailure,
    /// One for each pump that writes. It closes when everything is written.
    writing: Vec<ReadEnd>,
}

impl Supervisor {
    /// From now on signals no longer end the process but are caught. Must be called before there
    /// are other threads, and before this process changes what commands are to have as we had it.
    pub fn catch() -> io::Result<Self> {
        let (poller, signals) = (Poller::new()?, Signals::catch()?);
        poller.add(&signals, Watched::Interrupt, 0, Interest::Readable)?;
        Ok(Self {
            poller,
            signals: Rc::new(signals),
            caller: None,
            caller_may_end: Cell::new(false),
            inherited: Inherited::now()?,
            commands: RefCell::default(),
            criu: OnceCell::new(),
            failure: PumpFailure::default(),
            writing: Vec::new(),
        })
    }

    /// Gives commands the image's name.
    pub(crate) fn name_image(&mut self, name: Option<String>) {
        self.commands.get_mut().image_name = name;
    }

    /// The poller that every loop waits with.
    pub(crate) fn poller(&self) -> &Poller {
        &self.poller
    }

    /// From now on the transfer fails when this process ends: a CRIU whose hook has started it.
    pub(crate) fn watch(&mut self, process: impl AsFd) -> io::Result<()> {
        let process = process.as_fd().try_clone_to_owned()?;
        // Its end can be seen for ever, so it is looked at on the edge only.
        self.poller
            .add(&process, Watched::Caller, 0, Interest::ReadableEdge)?;
        self.caller = Some(process);
        Ok(())
    }

    /// The CRIU that has started the transfer may end before it, from now on.
    pub(crate) fn let_caller_end(&self) {
        self.caller_may_end.set(true);
    }

    /// True if a CRIU that has started the transfer has ended.
    pub(crate) fn caller_has_ended(&self) -> bool {
        let has_ended = |process: &OwnedFd| poll(process, PollFlags::POLLIN, PollTimeout::ZERO);
        let events = self.caller.as_ref().map(has_ended);
        events.is_some_and(|events| events.is_ok_and(|events| !events.is_empty()))
    }

    /// A pipe whose data goes to `end`, which errors call `label`.
    pub(crate) fn sink(&mut self, end: Endpoint, label: &str, pumped: Pumped) -> Result<WriteEnd> {
        let fd = self.open(end, Direction::Out)?;
        if FdKind::of(&fd) == FdKind::Pipe {
            return WriteEnd::new(fd).with_context(|| label.to_owned());
        }
        let (pipe, writing) = pump::write_to(fd, label, pumped, &self.failure)
            .with_context(|| format!("preparing {label}"))?;
        let writing = writing.nonblocking()?;
        self.poller
            .add(&writing, Watched::Interrupt, 0, Interest::ReadableEdge)?;
        self.writing.push(writing);
        Ok(pipe)
    }

    /// A pipe that is filled from `end`, which errors call `label`.
    pub(crate) fn source(&self, end: Endpoint, label: &str, pumped: Pumped) -> Result<ReadEnd> {
        let fd = self.open(end, Direction::In)?;
        if FdKind::of(&fd) == FdKind::Pipe {
            return ReadEnd::new(fd).with_context(|| label.to_owned());
        }
        pump::read_from(fd, label, pumped, &self.failure)
            .with_context(|| format!("preparing {label}"))
    }

    /// The descriptor to which data goes in `direction`: that of a command is started now.
    fn open(&self, end: Endpoint, direction: Direction) -> Result<OwnedFd> {
        match end {
            Endpoint::Descriptor(fd) => Ok(fd),
            Endpoint::Command(command) => {
                let mut commands = self.commands.borrow_mut();
                commands.start(command, direction, self.inherited)
            }
        }
    }

    /// All of an external file has been sent: its command, if there is one, sees the end.
    pub(crate) fn end_input(&self, file: &ImageName) {
        let mut commands = self.commands.borrow_mut();
        commands.close_pipes(|command| command.is_for_file(file));
    }

    /// Starts the command that runs CRIU, if there is one, for an image that goes in `direction`.
    pub(crate) fn start_criu(
        &self,
        command: Option<&CriuCommand>,
        direction: Direction,
    ) -> Result<()> {
        if let Some(command) = command {
            let signals = Rc::clone(&self.signals);
            let criu = RunningCriu::start(command, direction, self.inherited, signals)?;
            assert!(self.criu.set(criu).is_ok(), "CRIU is started once");
        }
        Ok(())
    }

    /// The command that runs CRIU, once it has ended well: nothing more will come of it.
    pub(crate) fn ended_criu(&self) -> Option<&str> {
        let criu = self.criu.get().filter(|criu| criu.has_ended());
        criu.map(|criu| &*criu.text)
    }

    /// True if the command that runs CRIU has ended well, or there is none.
    pub(crate) fn criu_has_succeeded(&self) -> bool {
        self.criu.get().is_none_or(RunningCriu::has_ended)
    }

    /// The reason behind an error that shows that CRIU is gone.
    pub(crate) fn explain_by_criu(&self, error: Error) -> Error {
        match self.criu.get() {
            Some(criu) if Ending::behind(&error).is_none() => criu.explain(error),
            _ => error,
        }
    }

    /// Fails if the transfer must not go on: a signal came ([`Ending::Signal`]), the CRIU that has
    /// started it is gone, or a pump or a command has failed.
    pub fn check(&self) -> Result<()> {
        let signalled = self.signals.check();
        // Only now: the signal of its end may have been among them.
        let criu = self.criu.get().map_or(Ok(()), RunningCriu::check);
        let has_killed = self.criu.get().is_some_and(RunningCriu::has_killed);
        match signalled {
            Err(signal) if has_killed && self.signals.spare() => report::warn(format_args!(
                "{signal:#}: not yet, as the application is dead, and its image is not written; a second signal ends that"
            )),
            signalled => signalled?,
        }
        ensure!(
            self.caller_may_end.get() || !self.caller_has_ended(),
            "CRIU, which has started this streamer, has ended and did not wait for it: it failed or was killed (see its log)"
        );
        self.check_pumps()?;
        self.commands.borrow().check()?;
        criu
    }

    /// True if all commands that are meant have ended well, or there are none.
    pub(crate) fn commands_have_succeeded(&self, is_meant: impl Fn(&ShellCommand) -> bool) -> bool {
        self.commands.borrow().have_succeeded(is_meant)
    }

    /// When to ask again whether the commands have ended: there is no signal for all of it. `None`
    /// once all have ended well.
    pub(crate) fn look_again(&self) -> Option<Instant> {
        let is_over = self.commands_have_succeeded(|_| true);
        (!is_over).then(|| Instant::now() + CHECK_INTERVAL)
    }

    fn check_pumps(&self) -> Result<()> {
        let failure = self.failure.get();
        failure.map_or(Ok(()), |reason| Err(anyhow!("{reason}")))
    }

    /// Ends the transfer that led to `result`. After a success everything is written, and every
    /// command has ended well. After a failure the error is the first reason. Once it is reported,
    /// CRIU loses its pipes, the commands are ended, and CRIU is waited for.
    pub(crate) fn conclude<T>(&mut self, result: Result<T, Failure>) -> Result<T, Failure> {
        let concluded = result.and_then(|value| Ok(self.finish().map(|()| value)?));
        let commands = mem::take(self.commands.get_mut());
        concluded.map_err(|Failure { error, open }| {
            let error = self.explain(error, &commands);
            Failure::new(error, (open, commands, self.criu.take()))
        })
    }

    /// Waits until the pumps have written everything and all commands have ended.
    fn finish(&mut self) -> Result<()> {
        while !self.have_pumps_written()? {
            self.wait(Wait::Forever)
                .context("waiting until all is written")?;
            self.check()?;
        }
        self.check_pumps()?;
        self.commands.get_mut().close_pipes(|_| true);
        while let Some(again) = self.look_again() {
            self.wait(Wait::Until(again))
                .context("waiting for the commands")?;
            self.check()?;
        }
        self.release_orphans()?;
        self.finish_criu()
    }

    /// True if all that went to pumps is written. Each that ends brings an event.
    pub(crate) fn have_pumps_written(&self) -> io::Result<bool> {
        for pipe in &self.writing {
            if pipe::read(pipe, &mut [0])? != Moved::End {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Lets processes that commands left behind, and the restored application, have another parent.
    ///
    /// # Errors
    /// None that are known.
    pub(crate) fn release_orphans(&self) -> Result<()> {
        set_child_subreaper(false).context("letting children go")
    }

    /// Waits until the command that runs CRIU has ended. All that it needed of us is done.
    fn finish_criu(&self) -> Result<()> {
        while let Some(criu) = self.criu.get()
            && !criu.has_ended()
        {
            criu.reap_all();
            if let Err(error) = self.check() {
                match Ending::behind(&error) {
                    // ^C was for the application in the foreground, and CRIU has got it too. Its
                    // own end may have come with it.
                    Some(Ending::Signal(libc::SIGINT)) => continue,
                    Some(Ending::Signal(_)) => criu.leave(),
                    _ => {}
                }
                return Err(error);
            }
            if !criu.has_ended() {
                self.wait(Wait::Forever).context("waiting for CRIU's end")?;
            }
        }
        Ok(())
    }

    /// Waits for a signal, such as that of a command's end, or for the end of a pump.
    fn wait(&self, wait: Wait) -> io::Result<()> {
        self.poller.wait(wait, &mut Vec::new())
    }

    /// The reason behind an error: a pipe that broke did so because of what was at its far end.
    fn explain(&self, error: Error, commands: &Commands) -> Error {
        match self.check_pumps() {
            _ if Ending::behind(&error).is_some() => error,
            Err(reason) => reason,
            Ok(()) => commands.explain(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::thread;

    /// The signals of CRIU's end and of ^C can be read in one go, so that none is left to wait for.
    #[test]
    fn an_interrupt_right_behind_the_end_of_criu_is_no_reason_to_wait_for_another() {
        let (done, is_done) = mpsc::channel();
        thread::spawn(move || {
            let supervisor = Supervisor::catch().unwrap();
            let command = CriuCommand::new(vec!["true".into()], false);
            supervisor
                .start_criu(command.as_ref(), Direction::In)
                .unwrap();
            let criu = supervisor.criu.get().unwrap();
            let path = format!("/proc/{}/stat", criu.process);
            while !std::fs::read_to_string(&path).unwrap().contains(") Z ") {
                thread::yield_now();
            }
            thread::sleep(Duration::from_millis(50));
            supervisor.signals.check().unwrap();
            // To this thread alone.
            nix::sys::signal::raise(nix::sys::signal::SIGINT).unwrap();
            done.send(supervisor.finish_criu()).unwrap();
        });
        let finished = is_done.recv_timeout(Duration::from_secs(20));
        finished.expect("it waits for ever").unwrap();
    }
}
