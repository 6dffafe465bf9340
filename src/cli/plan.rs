//! What the command line means, checked.
//!
//! Bad usage is refused before anything happens: a plan owns the descriptors that were named, and
//! nothing else has been touched when it exists.

use std::collections::HashSet;
use std::hash::Hash;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use anyhow::{Result, bail, ensure};

use super::descriptor::{Checks, FdNumber, Purpose, STDERR, STDIN, STDOUT};
use super::{Args, BufferSize, Command, ExternalFile, List};
use crate::criu::SocketPath;
use crate::criu::hook_caller::Caller;
use crate::format::ImageName;
use crate::listen_ports::Remap;
use crate::os::descriptor::Direction;
use crate::report::progress::Progress;
use crate::supervision::{CriuCommand, ShellCommand};

/// The most shards that commands are started for: each is a pipe of 1 MiB and a pipeline of
/// processes, and more have never been faster.
const MOST_COMMANDS: usize = 32;

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    Capture,
    Extract,
    Serve,
    List,
}

impl Action {
    /// Which way the shards go.
    pub(crate) fn direction(self) -> Direction {
        match self {
            Action::Capture => Direction::Out,
            Action::Extract | Action::Serve | Action::List => Direction::In,
        }
    }
}

/// Where the shards go to, or come from.
pub(crate) enum Shards {
    /// With what messages call them.
    Descriptors(Vec<(OwnedFd, String)>),
    Commands(Vec<ShellCommand>),
}

impl Shards {
    /// What messages call them.
    pub(crate) fn labels(&self) -> Vec<String> {
        match self {
            Shards::Descriptors(fds) => fds.iter().map(|(_, label)| label.clone()).collect(),
            Shards::Commands(commands) => commands.iter().map(ShellCommand::label).collect(),
        }
    }
}

/// Where an external file comes from, or goes to.
pub(crate) enum FileEnd {
    Descriptor(OwnedFd),
    Command(ShellCommand),
}

impl Default for Shards {
    fn default() -> Self {
        Shards::Descriptors(Vec::new())
    }
}

/// A checked command line.
pub(crate) struct Plan {
    pub(crate) action: Action,
    /// Empty where none is needed: by `list`.
    pub(crate) images_dir: PathBuf,
    pub(crate) shards: Shards,
    /// The last of the shards is an index.
    pub(crate) has_index: bool,
    /// The most that is held of an image that arrives, in bytes.
    pub(crate) hold_at_most: Option<u64>,
    pub(crate) buffer: Option<BufferSize>,
    /// The CRIU that waits in its hook may go on when the memory is copied.
    pub(crate) goes_on_when_copied: bool,
    pub(crate) external_files: Vec<(ImageName, FileEnd)>,
    pub(crate) remaps: Vec<Remap>,
    /// Where `list` writes to; `None`: nowhere.
    pub(crate) listing: Option<OwnedFd>,
    pub(crate) progress: Progress,
    pub(crate) progress_bar: bool,
    /// The command that runs CRIU, if we start it.
    pub(crate) criu: Option<CriuCommand>,
    /// The CRIU that waits in its hook for this streamer, if one does.
    pub(crate) caller: Option<Caller>,
}

impl Plan {
    /// Checks what was typed, and claims the descriptors that it names. Errors name the argument.
    pub(crate) fn new(args: Args) -> Result<Self> {
        let remaps = args.tcp_listen_remap.map_or_else(Vec::new, |list| list.0);
        if let Some(remap) = first_repeated(&remaps, |remap| remap.old) {
            bail!("--tcp-listen-remap: port {} is changed twice", remap.old);
        }
        let (action, criu) = match args.command {
            Command::Capture { criu } => (Action::Capture, criu),
            Command::Extract { serve: false, criu } => (Action::Extract, criu),
            Command::Extract { serve: true, criu } | Command::Serve { criu } => {
                (Action::Serve, criu)
            }
            Command::List => (Action::List, Vec::new()),
            Command::Hook => bail!("hook: CRIU starts it"),
        };
        let criu = CriuCommand::new(criu);
        ensure!(
            criu.is_none() || action != Action::Extract,
            "extract: it starts no command; run `criu restore` when it has ended, or give --serve"
        );
        ensure!(
            remaps.is_empty() || action == Action::Serve,
            "--tcp-listen-remap: only `serve` changes ports"
        );
        let shards_go = action.direction();
        let (files_go, standard) = match shards_go {
            Direction::Out => (Direction::In, STDOUT),
            Direction::In => (Direction::Out, STDIN),
        };
        let has_index = args.index || args.index_fd.is_some();
        ensure!(
            !args.index || args.shard_cmd.is_some(),
            "--index: it goes with --shard-cmd; with --shard-fds, give --index-fd"
        );
        ensure!(
            args.index_fd.is_none() || args.shard_cmd.is_none(),
            "--index-fd: it goes with --shard-fds; with --shard-cmd, give --index"
        );
        ensure!(
            args.hold_at_most.is_none() || (has_index && action == Action::Serve),
            "--hold-at-most: it is for `serve` with an index"
        );
        ensure!(
            args.buffer.is_none() || action == Action::Capture,
            "--buffer: it is for `capture`"
        );
        ensure!(
            args.buffer.is_some() || !args.go_on_when_copied,
            "--go-on-when-copied: memory is copied only with --buffer"
        );
        let commands =
            shard_commands(args.shard_cmd, args.num_shards, args.index, &args.shard_fds)?;
        let shard_fds = match (&commands, args.shard_fds) {
            (Some(_), _) => Vec::new(),
            (None, Some(fds)) => fds.0,
            (None, None) => vec![standard],
        };
        let external_files = args.ext_file_fds.map_or_else(Vec::new, |list| list.0);
        ensure!(
            action != Action::List || (external_files.is_empty() && args.ext_file_cmd.is_empty()),
            "--ext-file-fds, --ext-file-cmd: `list` only counts external files, as all others: use `extract`"
        );
        let names = external_files.iter().map(|file| &file.name);
        let names: Vec<_> = names
            .chain(args.ext_file_cmd.iter().map(|file| &file.name))
            .collect();
        if let Some(name) = first_repeated(&names, |&name| name) {
            bail!("--ext-file-fds, --ext-file-cmd: {name} is named twice");
        }
        let progress_fd = match args.progress_fd {
            None if args.progress_bar || STDERR.was_closed_at_start() => None,
            None => Some(STDERR),
            given => given,
        };

        let mut checks = Checks::new();
        let mut shard_fds = shard_fds
            .into_iter()
            .map(|fd| {
                let label = format!("shard fd {fd}");
                let checked = checks.check(fd, "--shard-fds", &label, Purpose::Image(shards_go))?;
                Ok((checked, label))
            })
            .collect::<Result<Vec<_>>>()?;
        if let Some(fd) = args.index_fd {
            let label = format!("index fd {fd}");
            let checked = checks.check(fd, "--index-fd", &label, Purpose::Image(shards_go))?;
            shard_fds.push((checked, label));
        }
        let external_files = external_files
            .into_iter()
            .map(|ExternalFile { name, fd }| {
                let option = format!("--ext-file-fds {name}");
                let what = format!("external file fd {fd}");
                Ok((
                    name,
                    checks.check(fd, &option, &what, Purpose::Image(files_go))?,
                ))
            })
            .collect::<Result<Vec<_>>>()?;
        // Without a standard output, or with /dev/null there, the exit status is what is wanted.
        let lists = action == Action::List && !STDOUT.was_closed_at_start();
        let listing = lists
            .then(|| checks.check(STDOUT, "list", "standard output", Purpose::Text))
            .transpose()?;
        let progress_fd = progress_fd
            .map(|fd| {
                ensure!(
                    !args.progress_bar || !fd.is_stderr(),
                    "--progress-bar: progress fd {fd} is standard error, where the bar is drawn: give --progress-fd another one, or none"
                );
                checks.check(fd, "--progress-fd", &format!("progress fd {fd}"), Purpose::Text)
            })
            .transpose()?;

        ensure!(
            args.images_dir.is_some() || action == Action::List,
            "--images-dir <images-dir> is needed: the directory that CRIU is given too"
        );
        Ok(Self {
            action,
            images_dir: args.images_dir.unwrap_or_default(),
            shards: match commands {
                Some(commands) => Shards::Commands(commands),
                None => Shards::Descriptors(
                    shard_fds
                        .into_iter()
                        .map(|(fd, label)| Ok((fd.claim()?, label)))
                        .collect::<Result<_>>()?,
                ),
            },
            has_index,
            hold_at_most: args.hold_at_most.map(|bytes| bytes.0),
            buffer: args.buffer,
            goes_on_when_copied: args.go_on_when_copied,
            external_files: external_files
                .into_iter()
                .map(|(name, fd)| Ok((name, FileEnd::Descriptor(fd.claim()?))))
                .chain(args.ext_file_cmd.into_iter().map(|file| Ok(file.end())))
                .collect::<Result<_>>()?,
            remaps,
            listing: listing.map(|fd| fd.claim()).transpose()?,
            progress: match progress_fd {
                Some(fd) => Progress::new(fd.claim()?),
                None => Progress::silent(),
            },
            progress_bar: args.progress_bar,
            criu,
            caller: None,
        })
    }
}

impl Plan {
    /// How CRIU gets to the socket.
    pub(crate) fn socket_path(&self) -> SocketPath {
        match self.caller {
            Some(_) => SocketPath::CriusOwn,
            None => SocketPath::Given,
        }
    }
}

/// The commands that take or bring the shards, if any.
fn shard_commands(
    text: Option<String>,
    count: Option<usize>,
    has_index: bool,
    shard_fds: &Option<List<FdNumber>>,
) -> Result<Option<Vec<ShellCommand>>> {
    let Some(text) = text else {
        ensure!(
            count.is_none(),
            "--num-shards: it goes with --shard-cmd; --shard-fds has a descriptor for each shard"
        );
        return Ok(None);
    };
    ensure!(
        shard_fds.is_none(),
        "--shard-cmd: it takes the place of --shard-fds: give one of them"
    );
    ensure!(!text.trim().is_empty(), "--shard-cmd: the command is empty");
    let count = count.unwrap_or(1);
    ensure!(
        (1..=MOST_COMMANDS).contains(&count),
        "--num-shards: it takes a number from 1 to {MOST_COMMANDS}"
    );
    ensure!(
        !has_index || text.contains("{}"),
        "--index: the command has no {{}}, so that the index would go where the other shard goes"
    );
    Ok(Some(ShellCommand::for_shards(&text, count, has_index)))
}

/// The first item whose key an earlier one has.
fn first_repeated<'a, T, K: Eq + Hash>(items: &'a [T], key: impl Fn(&'a T) -> K) -> Option<&'a T> {
    let mut seen = HashSet::new();
    items.iter().find(|item| !seen.insert(key(item)))
}
