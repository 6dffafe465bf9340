//! The command line, checked.
//!
//! Bad usage is refused before anything happens: a plan owns the descriptors that were named, and
//! nothing else has been touched when it exists.

use std::collections::HashSet;
use std::ffi::OsString;
use std::mem;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use anyhow::{Result, bail, ensure};

use super::descriptor::{Checks, FdNumber, Purpose, STDERR, STDIN, STDOUT};
use super::{Args, Command};
use crate::criu::hook_caller::Caller;
use crate::criu::{CommandLine, Role};
use crate::format::ImageName;
use crate::os::descriptor::Direction;
use crate::report::progress::Progress;
use crate::supervision::{CriuCommand, Endpoint, ShellCommand};

/// The most shards that commands are started for: each is a pipe of 1 MiB and a pipeline of
/// processes, and more have never been faster.
const MAX_COMMANDS: usize = 32;

/// The longest path of a socket, in bytes: CRIU copies it, with a NUL behind it, into the 108 bytes
/// of `sun_path` (docs/protocol.md, section 1).
const MAX_PATH: usize = 107;

/// A checked command line, and what it names.
pub(crate) struct Plan {
    /// As typed, but for what is below.
    pub(crate) args: Args,
    /// Empty where none is needed: by `list`.
    pub(crate) images_dir: PathBuf,
    /// With their names in messages; the last of them may be an index.
    pub(crate) shards: Vec<(Endpoint, String)>,
    pub(crate) external_files: Vec<(ImageName, Endpoint)>,
    /// Where `list` writes to; `None`: nowhere.
    pub(crate) listing: Option<OwnedFd>,
    pub(crate) progress: Progress,
    /// The command that runs CRIU, if we start it.
    pub(crate) criu: Option<CriuCommand>,
    /// The CRIU that waits in its hook for this streamer, if one does.
    pub(crate) caller: Option<Caller>,
}

impl Plan {
    /// Checks what was typed, and claims the descriptors that it names. Errors name the argument.
    pub(crate) fn new(mut args: Args) -> Result<Self> {
        if args.command == (Command::Extract { serve: true }) {
            args.command = Command::Serve;
        }
        check_usage(&args)?;
        check_names(&args)?;
        let files = args.ext_file_cmd.iter().map(|(_, command)| command);
        let mut commands = args.shard_cmd.iter().chain(files);
        commands.try_for_each(|text| ShellCommand::check_shell(text))?;
        let commands = shard_commands(&args)?;
        args.index |= args.index_fd.is_some();
        let mut plan = claim(args)?;
        for command in commands {
            let label = command.label.clone();
            plan.shards.push((Endpoint::Command(command), label));
        }
        for (name, text) in mem::take(&mut plan.args.ext_file_cmd) {
            let command = ShellCommand::for_file(name.clone(), text);
            plan.external_files.push((name, Endpoint::Command(command)));
        }
        Ok(plan)
    }

    /// Checks that CRIU can get to its socket. Under the hook it has a path of its own, such as one
    /// in /proc, and fails before it freezes anything if that is too long.
    pub(crate) fn check_socket(&self, role: Role) -> Result<()> {
        let socket = self.images_dir.join(role.socket_name());
        let length = socket.as_os_str().len();
        ensure!(
            length <= MAX_PATH || self.caller.is_some(),
            "--images-dir: the path of CRIU's socket, {}, has {length} bytes, and a UNIX socket takes {MAX_PATH}: use a shorter path",
            socket.display()
        );
        Ok(())
    }
}

/// The command that runs CRIU; `None` where there are no words.
fn criu_command(words: Vec<OsString>) -> Option<CriuCommand> {
    let line: Vec<_> = words.iter().map(|word| word.as_bytes()).collect();
    let lets_live = CommandLine(line.join(&0)).lets_live();
    CriuCommand::new(words, lets_live)
}

/// Refuses options that do not go together, or not with the subcommand.
fn check_usage(args: &Args) -> Result<()> {
    let has_commands = args.shard_cmd.is_some();
    let has_files = !args.ext_file_fds.is_empty() || !args.ext_file_cmd.is_empty();
    let is = |other| args.command == other;
    let extract = Command::Extract { serve: false };
    let why = if !args.criu.is_empty() && (is(extract) || is(Command::List)) {
        "--: `extract` and `list` start no command; run `criu restore` when `extract` has ended, or give --serve"
    } else if !args.tcp_listen_remap.is_empty() && !is(Command::Serve) {
        "--tcp-listen-remap: only `serve` changes ports"
    } else if args.index && !has_commands {
        "--index: it goes with --shard-cmd; with --shard-fds, give --index-fd"
    } else if args.index_fd.is_some() && has_commands {
        "--index-fd: it goes with --shard-fds; with --shard-cmd, give --index"
    } else if args.lazy_pages && !is(Command::Serve) {
        "--lazy-pages: it is for `serve`"
    } else if args.buffer.is_some() && !is(Command::Capture) {
        "--buffer: it is for `capture`"
    } else if args.go_on_when_copied && args.buffer.is_none() {
        "--go-on-when-copied: memory is copied only with --buffer"
    } else if has_commands && !args.shard_fds.is_empty() {
        "--shard-cmd: it takes the place of --shard-fds: give one of them"
    } else if args.num_shards.is_some() && !has_commands {
        "--num-shards: it goes with --shard-cmd; --shard-fds has a descriptor for each shard"
    } else if is(Command::List) && has_files {
        "--ext-file-fds, --ext-file-cmd: `list` only counts external files, as all others: use `extract`"
    } else if args.images_dir.is_none() && !is(Command::List) {
        "--images-dir <images-dir> is needed: the directory that CRIU is given too"
    } else {
        return Ok(());
    };
    bail!(why)
}

/// Refuses ports and external files that are named twice.
fn check_names(args: &Args) -> Result<()> {
    let ports = args.tcp_listen_remap.iter().map(|remap| remap.old);
    let ports = ports.map(|port| format!("--tcp-listen-remap: port {port}"));
    let fds = args.ext_file_fds.iter().map(|(name, _)| name);
    let names = fds.chain(args.ext_file_cmd.iter().map(|(name, _)| name));
    let names = names.map(|name| format!("--ext-file-fds, --ext-file-cmd: {name}"));
    let mut seen = HashSet::new();
    match ports.chain(names).find(|it| !seen.insert(it.clone())) {
        Some(twice) => bail!("{twice} is named twice"),
        None => Ok(()),
    }
}

/// Claims the descriptors of a plan, when all of them are checked.
fn claim(mut args: Args) -> Result<Plan> {
    let (shards_go, files_go, standard) = match args.command {
        Command::Capture => (Direction::Out, Direction::In, STDOUT),
        _ => (Direction::In, Direction::Out, STDIN),
    };
    let mut shards = args.shard_fds.clone();
    if shards.is_empty() && args.shard_cmd.is_none() {
        shards.push(standard);
    }
    // Without a standard output, or with /dev/null there, the exit status is what is wanted.
    let lists = args.command == Command::List && !STDOUT.was_closed_at_start();
    let listing = lists.then_some(STDOUT);
    let progress = progress_fd(&args)?;
    let mut checks = Checks::new();
    for &fd in &shards {
        checks.check(fd, format!("--shard-fds {fd}"), Purpose::Image(shards_go))?;
    }
    if let Some(fd) = args.index_fd {
        checks.check(fd, format!("--index-fd {fd}"), Purpose::Image(shards_go))?;
    }
    for (name, fd) in &args.ext_file_fds {
        let named = format!("--ext-file-fds {name}:{fd}");
        checks.check(*fd, named, Purpose::Image(files_go))?;
    }
    if let Some(fd) = listing {
        checks.check(fd, "standard output".into(), Purpose::Text)?;
    }
    if let Some(fd) = progress {
        checks.check(fd, format!("--progress-fd {fd}"), Purpose::Text)?;
    }
    let shards = shards.into_iter().map(|fd| (fd, "shard fd"));
    let shards = shards.chain(args.index_fd.map(|fd| (fd, "index fd")));
    let shards =
        shards.map(|(fd, what)| Ok((Endpoint::Descriptor(fd.claim()?), format!("{what} {fd}"))));
    let files = args.ext_file_fds.iter();
    let files = files.map(|(name, fd)| Ok((name.clone(), Endpoint::Descriptor(fd.claim()?))));
    Ok(Plan {
        shards: shards.collect::<Result<_>>()?,
        external_files: files.collect::<Result<_>>()?,
        images_dir: args.images_dir.take().unwrap_or_default(),
        listing: listing.map(FdNumber::claim).transpose()?,
        progress: Progress::new(progress.map(FdNumber::claim).transpose()?, None),
        criu: criu_command(mem::take(&mut args.criu)),
        caller: None,
        args,
    })
}

/// The descriptor for progress lines, if there is to be one.
fn progress_fd(args: &Args) -> Result<Option<FdNumber>> {
    let fd = match args.progress_fd {
        None if args.progress_bar || STDERR.was_closed_at_start() => return Ok(None),
        given => given.unwrap_or(STDERR),
    };
    ensure!(
        !args.progress_bar || !fd.is_stderr(),
        "--progress-bar: progress fd {fd} is standard error, where the bar is drawn: give --progress-fd another one, or none"
    );
    Ok(Some(fd))
}

/// The commands that take or bring the shards, if any.
fn shard_commands(args: &Args) -> Result<Vec<ShellCommand>> {
    let Some(text) = &args.shard_cmd else {
        return Ok(Vec::new());
    };
    ensure!(!text.trim().is_empty(), "--shard-cmd: the command is empty");
    let count = args.num_shards.unwrap_or(1);
    ensure!(
        (1..=MAX_COMMANDS).contains(&count),
        "--num-shards: it takes a number from 1 to {MAX_COMMANDS}"
    );
    ensure!(
        !args.index || text.contains("{}"),
        "--index: the command has no {{}}, so that the index would go where the other shard goes"
    );
    Ok(ShellCommand::for_shards(text, count, args.index))
}
