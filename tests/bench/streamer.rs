//! The streamer's process, and others that stand in for it.

use crate::clock::now_ns;
use crate::common::child::{Limit, inherit};
use crate::machine::WorkDir;
use crate::measured::{Finished, Measured};
use anyhow::{Context, Result, bail};
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use serde::Deserialize;
use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read},
    os::fd::{AsRawFd, OwnedFd},
    os::unix::fs::PermissionsExt,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Read end and write end.
pub fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    Ok(pipe2(OFlag::O_CLOEXEC)?)
}

pub fn fd_list(fds: &[OwnedFd]) -> String {
    let numbers: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd().to_string()).collect();
    numbers.join(",")
}

/// The streamer's statistics.
#[derive(Deserialize)]
struct Statistics {
    shards: Vec<ShardStatistics>,
}

#[derive(Deserialize)]
struct ShardStatistics {
    size: u64,
}

/// What a receiver is not allowed.
#[derive(Clone, Copy, PartialEq)]
pub enum Restriction {
    None,
    /// It is an ordinary user.
    User,
    /// `ulimit -n`.
    OpenFiles(u64),
}

/// An ordinary user: nobody.
const USER: u32 = 65_534;

impl Restriction {
    pub fn apply(self, command: &mut Command, images_dir: &Path) -> Result<()> {
        match self {
            Self::None => {}
            Self::User => {
                fs::set_permissions(images_dir, fs::Permissions::from_mode(0o777))?;
                command.uid(USER).gid(USER);
            }
            Self::OpenFiles(most) => inherit(command, vec![], vec![Limit::OpenFiles(most)]),
        }
        Ok(())
    }
}

/// A program that another user may run too, who may not be able to walk to where it is.
pub struct Executable(File);

impl Executable {
    pub fn open(program: &Path) -> Result<Self> {
        let file = File::open(program).with_context(|| program.display().to_string())?;
        Ok(Self(file))
    }

    /// It leads there while this value lives.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd()))
    }
}

/// The streamer with a verb and its options, and with these shards.
pub fn streamer_command(
    program: &Path,
    arguments: &[&str],
    shard_fds: &str,
    images_dir: &Path,
    progress: i32,
) -> Command {
    let mut command = Command::new(program);
    command.arg("--images-dir").arg(images_dir);
    command.args(["--shard-fds", shard_fds]);
    command.args(["--progress-fd", &progress.to_string()]);
    command.args(arguments);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}

/// A measured process that reports its progress.
pub struct Streamer {
    pub process: Measured,
    pub images_dir: PathBuf,
    pub started_ns: u64,
    progress: BufReader<File>,
    errors: PathBuf,
}

impl Streamer {
    /// Runs `program` with a verb and its options, and with these shards.
    pub fn spawn(
        program: &Path,
        arguments: &[&str],
        shards: Vec<OwnedFd>,
        work_dir: &WorkDir,
    ) -> Result<Self> {
        let fds = fd_list(&shards);
        Self::spawn_as(shards, work_dir, |images_dir, progress| {
            Ok(streamer_command(
                program, arguments, &fds, images_dir, progress,
            ))
        })
    }

    /// The same with a command line that `command` makes from the images directory and the progress
    /// descriptor.
    pub fn spawn_as(
        mut inherited: Vec<OwnedFd>,
        work_dir: &WorkDir,
        command: impl FnOnce(&Path, i32) -> Result<Command>,
    ) -> Result<Self> {
        let images_dir = work_dir.subdirectory("images")?;
        let errors = images_dir.with_file_name("stderr");
        let (progress, progress_end) = pipe()?;
        let mut command = command(&images_dir, progress_end.as_raw_fd())?;
        command.stderr(File::create(&errors)?);
        inherited.push(progress_end);
        Ok(Self {
            started_ns: now_ns(),
            process: Measured::spawn(command, inherited)?,
            images_dir,
            progress: BufReader::new(File::from(progress)),
            errors,
        })
    }

    /// Returns when the streamer has said that it listens.
    pub fn wait_for_socket(&mut self) -> Result<()> {
        self.wait_for_line("socket-init")
    }

    /// Returns when it has said this.
    pub fn wait_for_line(&mut self, awaited: &str) -> Result<()> {
        let mut line = String::new();
        while self.progress.read_line(&mut line)? > 0 {
            if line.trim_end() == awaited {
                return Ok(());
            }
            line.clear();
        }
        bail!("The streamer did not say {awaited}: {}", self.errors()?);
    }

    fn errors(&self) -> Result<String> {
        fs::read_to_string(&self.errors).context("Failed to read the streamer's errors")
    }

    pub fn finish(self) -> Result<Finished> {
        self.finish_with_sizes().map(|(finished, _)| finished)
    }

    /// The same, with the bytes of each shard out of its statistics.
    pub fn finish_with_sizes(mut self) -> Result<(Finished, Vec<u64>)> {
        let mut lines = String::new();
        self.progress.read_to_string(&mut lines)?;
        let finished = self.process.wait()?;
        if !finished.status.success() {
            let errors = fs::read_to_string(self.errors)?;
            bail!("The streamer failed with {}: {errors}", finished.status);
        }
        let statistics = lines.lines().find(|line| line.starts_with('{'));
        let sizes = match statistics {
            Some(line) => serde_json::from_str::<Statistics>(line)?.shards,
            None => vec![],
        };
        Ok((finished, sizes.iter().map(|shard| shard.size).collect()))
    }
}
