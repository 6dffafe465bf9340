//! What is at the far ends of the pipes: another program's pipe, a file or socket with a [`pump`] before it, or a [`command`]
//! that we started.
//!
//! The rest of the program knows only pipes. A descriptor that is one already is passed on as it is, at no cost. For
//! anything else a pipe is put before it, and a thread moves the data between the two.
//!
//! A pipe cannot tell *why* its other end is gone, and to a reader a failure looks like the end. So the failures of pumps and
//! commands are looked at whenever it matters: by [`Interrupts::check`] while the transfer goes on, before the image's end is
//! written, and before an image counts as received. Where the transfer fails because an end is gone, the
//! error that is shown is the reason why it is gone.

mod command;
mod pump;
pub mod signals;

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use anyhow::{Context, Result};

use crate::os::pipe::{self, ReadEnd, WriteEnd};
use signals::Interrupts;

use command::Commands;
pub use command::ShardCommand;
use pump::{Pump, Way};

/// What is at the far ends of all pipes of one transfer.
#[derive(Default)]
pub struct Endpoints {
    parties: Rc<Parties>,
}

#[derive(Default)]
struct Parties {
    pumps: RefCell<Vec<Pump>>,
    commands: RefCell<Option<Commands>>,
}

impl Endpoints {
    /// Endpoints whose failures end the transfer that `interrupts` is for.
    pub fn new(interrupts: &Interrupts) -> Self {
        let endpoints = Self::default();
        let parties = Rc::downgrade(&endpoints.parties);
        interrupts.also_check(move || match parties.upgrade() {
            Some(parties) => parties.check(),
            None => Ok(()),
        });
        endpoints
    }

    /// A pipe whose data goes to `fd`.
    ///
    /// # Errors
    /// When there is no thread or pipe to be had.
    pub fn sink(&self, fd: OwnedFd, label: &str) -> Result<WriteEnd> {
        if pipe::is_pipe(&fd) {
            return WriteEnd::new(fd).with_context(|| label.to_owned());
        }
        let (read, write) = wide_pipe(label)?;
        self.add(Pump::start(Way::Out(read, fd), label)?);
        Ok(write)
    }

    /// A pipe that is filled from `fd`.
    ///
    /// # Errors
    /// When there is no thread or pipe to be had.
    pub fn source(&self, fd: OwnedFd, label: &str) -> Result<ReadEnd> {
        if pipe::is_pipe(&fd) {
            return ReadEnd::new(fd).with_context(|| label.to_owned());
        }
        let (read, write) = wide_pipe(label)?;
        self.add(Pump::start(Way::In(fd, write), label)?);
        Ok(read)
    }

    fn add(&self, pump: Pump) {
        self.parties.pumps.borrow_mut().push(pump);
    }

    /// Starts commands that read a shard each from their standard input.
    ///
    /// # Errors
    /// When one cannot be started; the others are ended.
    pub fn start_readers(&self, commands: Vec<ShardCommand>) -> Result<Vec<(WriteEnd, String)>> {
        let (commands, pipes) = Commands::start_readers(commands)?;
        *self.parties.commands.borrow_mut() = Some(commands);
        Ok(pipes)
    }

    /// Starts commands that write a shard each to their standard output.
    ///
    /// # Errors
    /// When one cannot be started; the others are ended.
    pub fn start_writers(&self, commands: Vec<ShardCommand>) -> Result<Vec<(ReadEnd, String)>> {
        let (commands, pipes) = Commands::start_writers(commands)?;
        *self.parties.commands.borrow_mut() = Some(commands);
        Ok(pipes)
    }

    /// Whether commands take the shards, so that their ends have to be waited for.
    pub fn has_commands(&self) -> bool {
        self.parties.commands.borrow().is_some()
    }

    /// Ends the transfer that led to `result`: when it succeeded by waiting for everything to be written and every command to
    /// end well, otherwise by ending the commands.
    ///
    /// # Errors
    /// When not all of it succeeded: with the first reason.
    pub fn conclude<T>(self, result: Result<T>, interrupts: &Interrupts) -> Result<T> {
        let pumps = self.parties.pumps.take();
        let mut commands = self.parties.commands.take();
        let concluded = result.and_then(|value| {
            for pump in &pumps {
                pump.finish(interrupts)?;
            }
            if let Some(commands) = &mut commands {
                commands.finish(interrupts)?;
            }
            Ok(value)
        });
        concluded.map_err(|error| explain(error, &pumps, commands.as_mut()))
    }
}

/// The reason behind an error: a pipe that broke did so because of what was at its far end.
fn explain(error: anyhow::Error, pumps: &[Pump], commands: Option<&mut Commands>) -> anyhow::Error {
    if signals::signal_behind(&error).is_some() {
        return error;
    }
    if let Some(reason) = pumps.iter().find_map(|pump| pump.check().err()) {
        return reason;
    }
    match commands {
        Some(commands) => commands.explain(error),
        None => error,
    }
}

impl Parties {
    fn check(&self) -> Result<()> {
        for pump in self.pumps.borrow().iter() {
            pump.check()?;
        }
        match &mut *self.commands.borrow_mut() {
            Some(commands) => commands.check(),
            None => Ok(()),
        }
    }
}

/// A pipe of the largest capacity allowed.
fn wide_pipe(label: &str) -> Result<(ReadEnd, WriteEnd)> {
    let (read, write) = pipe::new().with_context(|| format!("preparing {label}"))?;
    pipe::grow(&write, pipe::LARGEST).with_context(|| format!("preparing {label}"))?;
    Ok((read, write))
}
