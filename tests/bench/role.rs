//! The parts that are played around the streamer: CRIU, the sinks, the producers, and what the
//! streamer is compared with.
//!
//! Each is a process of its own, this same program started again, so that none of its CPU time or
//! memory is counted as the streamer's. A role's one argument is its description as JSON. The roles
//! that are timed say when they are ready, wait for a line that starts them, and report when they
//! started and ended.
#![allow(unsafe_code)] // Claiming inherited descriptors has no safe form.

use crate::clock::{now_ns, seconds_between};
use crate::measured::{cpu_s, spawn_with_fds};
use crate::peak::PeakWatch;
use crate::{download, machine, naive, producer, reader, sink, writer};
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use std::{
    env,
    io::{BufRead, BufReader, Write, stdin, stdout},
    os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd},
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
};

#[derive(Serialize, Deserialize)]
pub enum Role {
    Writer(writer::Writer),
    Sink(sink::Sink),
    Producer(producer::Producer),
    Reader(reader::Reader),
    Naive(naive::Naive),
    Janitor(machine::Janitor),
    Download(download::Download),
}

/// The first argument that makes this program play a role.
const ROLE_ARGUMENT: &str = "--role";

impl Role {
    pub fn from_arguments() -> Result<Option<Self>> {
        let mut arguments = env::args().skip(1);
        match (arguments.next(), arguments.next()) {
            (Some(first), Some(role)) if first == ROLE_ARGUMENT => {
                Ok(Some(serde_json::from_str(&role)?))
            }
            _ => Ok(None),
        }
    }

    pub fn play(self) -> Result<()> {
        match self {
            Self::Writer(role) => role.play(),
            Self::Sink(role) => role.play(),
            Self::Producer(role) => role.play(),
            Self::Reader(role) => role.play(),
            Self::Naive(role) => role.play(),
            Self::Janitor(role) => role.play(),
            Self::Download(role) => role.play(),
        }
    }

    pub fn command(&self) -> Result<Command> {
        self.command_of(&env::current_exe()?)
    }

    /// The same, with the path at which the program is found.
    pub fn command_of(&self, program: &Path) -> Result<Command> {
        let mut command = Command::new(program);
        command.arg(ROLE_ARGUMENT).arg(self.argument()?);
        Ok(command)
    }

    /// The argument that makes this program play the role.
    pub fn argument(&self) -> Result<String> {
        Ok(serde_json::to_string(self)?)
    }
}

/// Takes over the descriptors that a role was started with, or was sent.
pub fn claim_fds(numbers: &[RawFd]) -> Vec<OwnedFd> {
    let claim = |&number: &RawFd| {
        // SAFETY: the one who named the descriptor opened it for us, and nothing else here uses its
        // number.
        unsafe { OwnedFd::from_raw_fd(number) }
    };
    numbers.iter().map(claim).collect()
}

/// When a timed role started and ended its work.
#[derive(Serialize, Deserialize, Clone, Copy)]
pub struct Span {
    pub start_ns: u64,
    pub end_ns: u64,
}

impl Span {
    pub fn seconds(&self) -> f64 {
        seconds_between(self.start_ns, self.end_ns)
    }
}

/// In the role's process: waits for the start, does the work, reports how long it took.
pub fn perform(work: impl FnOnce(&str) -> Result<()>) -> Result<()> {
    println!("ready");
    let mut line = String::new();
    ensure!(stdin().read_line(&mut line)? > 0, "Never started");
    let start_ns = now_ns();
    work(line.trim_end())?;
    let span = Span {
        start_ns,
        end_ns: now_ns(),
    };
    println!("{}", serde_json::to_string(&span)?);
    stdout().flush()?;
    Ok(())
}

/// A timed role, as seen by the benchmark.
pub struct Performer {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Performer {
    /// Returns once the role is ready.
    pub fn prepare(role: &Role, inherited: &[BorrowedFd]) -> Result<Self> {
        let mut command = role.command()?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = spawn_with_fds(&mut command, inherited)?;
        let output = BufReader::new(child.stdout.take().context("No output")?);
        let mut performer = Self { child, output };
        let line = performer.line()?;
        ensure!(line == "ready", "Unexpected word from a role: {line}");
        Ok(performer)
    }

    /// CPU time so far.
    pub fn cpu_s(&self) -> Result<f64> {
        cpu_s(self.child.id() as i32)
    }

    /// Has its memory count from now on.
    pub fn count_in(&self, watch: &PeakWatch) -> Result<()> {
        watch.add(self.child.id())
    }

    /// Starts the work. The line goes to the role, as the argument of its work.
    pub fn start(&mut self, line: &str) -> Result<()> {
        let stdin = self.child.stdin.as_mut().context("No input")?;
        Ok(stdin.write_all(format!("{line}\n").as_bytes())?)
    }

    pub fn finish(mut self) -> Result<Span> {
        let line = self.line();
        let status = self.child.wait()?;
        ensure!(status.success(), "A role failed with {status}");
        Ok(serde_json::from_str(&line?)?)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            bail!("A role ended without a word");
        }
        Ok(line.trim_end().to_owned())
    }
}
