//! The command line: what was typed ([`Args`]), and what it means ([`Plan`]).
//!
//! A plan owns the descriptors that were named, close-on-exec, and nothing else has been touched when it exists: bad usage is refused
//! before anything happens. Descriptors are claimed before this program opens any of its own, so that a number that
//! was not open cannot be mistaken for one that is.

#![allow(unsafe_code)]

mod help;

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::socket::sockopt::SockType;
use nix::sys::socket::{self, getsockopt};
use structopt::StructOpt;
use structopt::clap::AppSettings;

use crate::format::ImageName;
use crate::listen_ports::Remap;
use crate::os::pipe;
use crate::report::progress::Progress;
use crate::supervision::ShardCommand;

/// Shards that commands can be started for. More have never made anything faster: each is a pipe of 1 MiB and a pipeline of processes.
const MOST_COMMANDS: usize = 32;

/// Streams a CRIU checkpoint image between CRIU and pipes, without touching the disk.
///
/// Start `criu-image-streamer` first, wait for its line `socket-init`, then run `criu dump --stream` or `criu restore --stream`
/// with the same --images-dir.
#[derive(Debug, PartialEq, Eq, StructOpt)]
#[structopt(
    usage = "criu-image-streamer [OPTIONS] --images-dir <images-dir> <SUBCOMMAND>",
    global_settings = &[AppSettings::VersionlessSubcommands, AppSettings::DeriveDisplayOrder, AppSettings::UnifiedHelpMessage],
    settings = &[AppSettings::SubcommandRequiredElseHelp],
    after_help = help::ALL
)]
pub struct Args {
    /// Directory in which CRIU looks for the streamer's socket; `extract` writes the files there
    #[structopt(
        short = "D",
        long,
        value_name = "images-dir",
        parse(from_os_str),
        global = true
    )]
    images_dir: Option<PathBuf>,

    /// Descriptors of the shards, which carry the image [default: 1 for capture, 0 for extract and serve]
    #[structopt(short, long, value_name = "fd,fd,…", global = true)]
    shard_fds: Option<String>,

    /// Shell command for each shard, in place of --shard-fds: capture pipes the shard into it, extract and serve read it from
    /// its output. {} stands for the shard's number, from 1. The whole succeeds only if every command does
    #[structopt(long, value_name = "command", global = true)]
    shard_cmd: Option<String>,

    /// How many shards --shard-cmd makes, 1 to 32 [default: 1]
    #[structopt(long, value_name = "N", global = true)]
    num_shards: Option<String>,

    /// Files that are not CRIU's to put into the image, read from these descriptors, or to take out of it, written to them
    #[structopt(short, long, value_name = "name:fd,…", global = true)]
    ext_file_fds: Option<String>,

    /// Descriptor for progress lines and statistics [default: 2; none with --progress-bar]
    #[structopt(short, long, value_name = "fd", global = true)]
    progress_fd: Option<String>,

    /// For people: show on standard error what happens, and at the end what passed through each shard. The progress lines, which
    /// are for programs, then only go to a --progress-fd of their own
    #[structopt(long, global = true)]
    progress_bar: bool,

    /// serve only: change the TCP ports that the application listens on
    #[structopt(long, value_name = "old:new,…", global = true)]
    tcp_listen_remap: Option<String>,

    /// Go on until so many CRIU processes (restore, lazy-pages, …) have come and gone [default: 1]
    #[structopt(long, value_name = "N", global = true)]
    criu_clients: Option<String>,

    #[structopt(subcommand)]
    command: Command,
}

#[derive(Debug, PartialEq, Eq, StructOpt)]
enum Command {
    /// Capture a CRIU image: from `criu dump --stream` to the shards
    #[structopt(after_help = help::CAPTURE)]
    Capture,

    /// Write a captured image from the shards to --images-dir, for a plain `criu restore`
    #[structopt(after_help = help::EXTRACT)]
    Extract {
        /// Buffer the image in memory and serve it to `criu restore --stream` instead
        #[structopt(long)]
        serve: bool,
    },

    /// Buffer a captured image in memory and serve it to `criu restore --stream`: the same as `extract --serve`
    #[structopt(after_help = help::SERVE)]
    Serve,
}

/// What to do.
#[derive(Debug)]
pub enum Action {
    Capture,
    Extract,
    Serve(Vec<Remap>),
}

/// Where the shards go to, or come from.
#[derive(Debug)]
pub enum Shards {
    /// With what error messages call them.
    Descriptors(Vec<(OwnedFd, String)>),
    Commands(Vec<ShardCommand>),
}

/// A checked command line.
#[derive(Debug)]
pub struct Plan {
    pub action: Action,
    pub images_dir: PathBuf,
    pub shards: Shards,
    pub external_files: Vec<(ImageName, OwnedFd)>,
    pub progress: Progress,
    pub progress_bar: bool,
    pub criu_clients: usize,
}

/// Which way data goes through a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    In,
    Out,
}

impl Shards {
    /// What messages call them.
    pub fn labels(&self) -> Vec<String> {
        match self {
            Shards::Descriptors(fds) => fds.iter().map(|(_, label)| label.clone()).collect(),
            Shards::Commands(commands) => commands.iter().map(ShardCommand::label).collect(),
        }
    }
}

impl Plan {
    /// Checks what was typed, and claims the descriptors that it names.
    ///
    /// # Errors
    /// For bad usage, naming the argument.
    pub fn new(args: Args) -> Result<Self> {
        let commands = shard_commands(&args)?;
        let images_dir = args
            .images_dir
            .context("--images-dir <images-dir> is needed: the directory that CRIU is given too")?;
        let remaps = list(
            args.tcp_listen_remap.as_deref(),
            "--tcp-listen-remap",
            parse_remap,
        )?;
        check_remaps(&remaps)?;
        let action = match args.command {
            Command::Capture => Action::Capture,
            Command::Extract { serve: false } => Action::Extract,
            Command::Extract { serve: true } | Command::Serve => Action::Serve(remaps.clone()),
        };
        ensure!(
            remaps.is_empty() || matches!(action, Action::Serve(_)),
            "--tcp-listen-remap: only `serve` changes ports"
        );
        let direction = if matches!(action, Action::Capture) {
            Direction::Out
        } else {
            Direction::In
        };
        let criu_clients = match args.criu_clients.as_deref().map(str::parse) {
            None => 1,
            Some(Ok(count)) if count > 0 => count,
            Some(_) => bail!("--criu-clients: it takes a number from 1"),
        };

        let default_shard = if direction == Direction::Out { 1 } else { 0 };
        let mut shard_fds = list(args.shard_fds.as_deref(), "--shard-fds", parse_fd)?;
        if args.shard_fds.is_none() && commands.is_none() {
            shard_fds.push(default_shard);
        }
        let external = list(
            args.ext_file_fds.as_deref(),
            "--ext-file-fds",
            parse_external,
        )?;
        let progress_fd = match &args.progress_fd {
            None if args.progress_bar => None,
            // Nobody asked for it, and nobody misses it.
            None if is_stand_in(2) => None,
            None => Some(2),
            Some(fd) => Some(parse_fd(fd).context("--progress-fd")?),
        };
        check_unique(&shard_fds, &external, progress_fd)?;

        for &fd in &shard_fds {
            check_transfer(fd, direction, &format!("shard fd {fd}"), "--shard-fds")?;
        }
        let outward = if direction == Direction::Out {
            Direction::In
        } else {
            Direction::Out
        };
        for (name, fd) in &external {
            check_transfer(
                *fd,
                outward,
                &format!("the descriptor of {name}, {fd},"),
                "--ext-file-fds",
            )?;
        }
        if let Some(fd) = progress_fd {
            check_open(fd, &format!("progress fd {fd}"), "--progress-fd")?;
            ensure!(
                !args.progress_bar || !is_stderr(fd),
                "--progress-bar: progress fd {fd} is standard error, where the bar is drawn: give --progress-fd another one, or none"
            );
        }

        let shards = match commands {
            Some(commands) => Shards::Commands(commands),
            None => Shards::Descriptors(
                shard_fds
                    .into_iter()
                    .map(|fd| Ok((claim(fd)?, format!("shard fd {fd}"))))
                    .collect::<Result<_>>()?,
            ),
        };
        let external_files = external
            .into_iter()
            .map(|(name, fd)| Ok((name, claim(fd)?)))
            .collect::<Result<_>>()?;
        let progress = match progress_fd {
            Some(fd) => Progress::new(claim(fd)?),
            None => Progress::silent(),
        };
        Ok(Self {
            action,
            images_dir,
            shards,
            external_files,
            progress,
            progress_bar: args.progress_bar,
            criu_clients,
        })
    }
}

/// The items of a comma-separated list.
fn list<T>(text: Option<&str>, option: &str, parse: impl Fn(&str) -> Result<T>) -> Result<Vec<T>> {
    let items = text.into_iter().flat_map(|text| text.split(','));
    items
        .map(|item| parse(item).with_context(|| option.to_owned()))
        .collect()
}

fn parse_fd(text: &str) -> Result<RawFd> {
    let fd = text.parse().ok().filter(|&fd: &RawFd| fd >= 0);
    fd.with_context(|| format!("{text:?} is no file descriptor: give its number, such as 10"))
}

fn parse_external(text: &str) -> Result<(ImageName, RawFd)> {
    let (name, fd) = text
        .rsplit_once(':')
        .with_context(|| format!("{text:?} is not of the form name:fd, such as fs.tar:10"))?;
    let name = ImageName::new(name)
        .with_context(|| format!("an external file cannot be named {name:?}"))?;
    Ok((name, parse_fd(fd)?))
}

fn parse_remap(text: &str) -> Result<Remap> {
    let port = |port: &str| {
        port.parse::<u16>()
            .ok()
            .with_context(|| format!("{port:?} is no TCP port: they go from 0 to 65535"))
    };
    let (old, new) = text
        .split_once(':')
        .with_context(|| format!("{text:?} is not of the form old:new, such as 80:8080"))?;
    Ok(Remap {
        old: port(old)?,
        new: port(new)?,
    })
}

fn check_unique(
    shards: &[RawFd],
    external: &[(ImageName, RawFd)],
    progress: Option<RawFd>,
) -> Result<()> {
    let mut uses: HashMap<RawFd, String> = HashMap::new();
    let shards = shards.iter().map(|&fd| (fd, "--shard-fds".to_owned()));
    let files = external
        .iter()
        .map(|(name, fd)| (*fd, format!("--ext-file-fds {name}")));
    for (fd, option) in shards
        .chain(files)
        .chain(progress.map(|fd| (fd, "--progress-fd".to_owned())))
    {
        if let Some(other) = uses.insert(fd, option.clone()) {
            bail!(
                "{option}: file descriptor {fd} is used twice (also by {other}): give each its own"
            );
        }
    }
    let mut names: Vec<_> = external.iter().map(|(name, _)| name).collect();
    names.sort();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => bail!("--ext-file-fds: {} is named twice", pair[0]),
        None => Ok(()),
    }
}

fn check_remaps(remaps: &[Remap]) -> Result<()> {
    let mut old: Vec<_> = remaps.iter().map(|remap| remap.old).collect();
    old.sort_unstable();
    match old.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => bail!("--tcp-listen-remap: port {} is changed twice", pair[0]),
        None => Ok(()),
    }
}

/// Looks at a descriptor that is only a number so far.
fn peek<T>(fd: RawFd, look: impl FnOnce(BorrowedFd) -> T) -> T {
    // SAFETY: the borrow lasts for this call, in which nothing closes descriptors (there are no threads yet). If the number
    // belongs to no open file, the system calls that `look` makes say so.
    look(unsafe { BorrowedFd::borrow_raw(fd) })
}

fn check_open(fd: RawFd, what: &str, option: &str) -> Result<()> {
    let open = peek(fd, |fd| fcntl(fd, FcntlArg::F_GETFD)).is_ok();
    ensure!(
        open && !is_stand_in(fd),
        "{option}: {what} is not open: redirect it, such as {fd}>… or {fd}<…"
    );
    Ok(())
}

/// Whether what is written to a descriptor comes to the same place as what is written to standard error. On a terminal that is
/// what the person in front of it wanted.
fn is_stderr(fd: RawFd) -> bool {
    let place =
        |fd| peek(fd, |fd| nix::sys::stat::fstat(fd)).map(|stat| (stat.st_dev, stat.st_ino));
    let is_device = |fd| {
        matches!(
            peek(fd, pipe::describe),
            "a terminal" | "a character device"
        )
    };
    fd == 2 || (place(fd) == place(2) && !is_device(fd))
}

/// Whether this is the /dev/null that Rust's runtime opened because a standard stream was closed: taking it for a shard would
/// lose the image. It is recognised by being open for reading and writing, which shells do not do.
fn is_stand_in(fd: RawFd) -> bool {
    let null = File::open("/dev/null").and_then(|null| Ok(nix::sys::stat::fstat(&null)?));
    let found = peek(fd, |fd| nix::sys::stat::fstat(fd));
    let flags = peek(fd, |fd| fcntl(fd, FcntlArg::F_GETFL)).map(OFlag::from_bits_retain);
    match (null, found, flags) {
        (Ok(null), Ok(found), Ok(flags)) => {
            fd <= 2
                && null.st_rdev == found.st_rdev
                && flags & OFlag::O_ACCMODE == OFlag::O_RDWR
                && found.st_rdev != 0
        }
        _ => false,
    }
}

/// Looks whether data can go through a descriptor in this direction.
fn check_transfer(fd: RawFd, direction: Direction, what: &str, option: &str) -> Result<()> {
    check_open(fd, what, option)?;
    let (wrong, redirect, sense) = match direction {
        Direction::Out => (OFlag::O_RDONLY, format!("{fd}>file"), "writing"),
        Direction::In => (OFlag::O_WRONLY, format!("{fd}<file"), "reading"),
    };
    let kind = peek(fd, pipe::describe);
    match kind {
        "a terminal" => bail!(
            "{option}: {what} is a terminal, and an image is no text: redirect it to a pipe or file, such as {redirect}, or give --shard-fds or --shard-cmd"
        ),
        "a directory" | "a special file" => bail!(
            "{option}: {what} is {kind}, through which no image can go: redirect it to a pipe or file, such as {redirect}"
        ),
        _ => {}
    }
    let flags = OFlag::from_bits_retain(peek(fd, |fd| fcntl(fd, FcntlArg::F_GETFL))?);
    ensure!(
        flags & OFlag::O_ACCMODE != wrong && !flags.contains(OFlag::O_PATH),
        "{option}: {what} is {kind} that is not open for {sense}: exchange < and >"
    );
    if kind == "a socket" {
        let socket = peek(fd, |fd| getsockopt(&fd, SockType))
            .with_context(|| format!("{option}: asking what kind of socket {what} is"))?;
        ensure!(
            socket == socket::SockType::Stream,
            "{option}: {what} is a socket that does not carry a stream: give a TCP or UNIX stream socket"
        );
    }
    Ok(())
}

/// The commands that take or bring the shards, if any.
fn shard_commands(args: &Args) -> Result<Option<Vec<ShardCommand>>> {
    let Some(text) = &args.shard_cmd else {
        ensure!(
            args.num_shards.is_none(),
            "--num-shards: it goes with --shard-cmd; with --shard-fds, there are as many shards as descriptors"
        );
        return Ok(None);
    };
    ensure!(
        args.shard_fds.is_none(),
        "--shard-cmd: it takes the place of --shard-fds: give one of them"
    );
    ensure!(!text.trim().is_empty(), "--shard-cmd: the command is empty");
    let count = match args.num_shards.as_deref().map(str::parse) {
        None => 1,
        Some(Ok(count)) if (1..=MOST_COMMANDS).contains(&count) => count,
        Some(_) => bail!("--num-shards: it takes a number from 1 to {MOST_COMMANDS}"),
    };
    Ok(Some(ShardCommand::all(text, count)))
}

/// Takes ownership of a descriptor that was given to this process, and keeps it from being passed on.
fn claim(fd: RawFd) -> Result<OwnedFd> {
    if fd > 2 {
        // SAFETY: it was checked to be open, the command line gave it to us, no number is claimed twice, and nothing in this
        // process has opened a descriptor that it keeps: nobody else owns it.
        let owned = unsafe { OwnedFd::from_raw_fd(fd) };
        fcntl(&owned, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))
            .with_context(|| format!("claiming fd {fd}"))?;
        return Ok(owned);
    }
    let copy =
        peek(fd, |fd| fd.try_clone_to_owned()).with_context(|| format!("claiming fd {fd}"))?;
    let null = File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .context("opening /dev/null")?;
    match fd {
        0 => nix::unistd::dup2_stdin(null.as_fd()),
        1 => nix::unistd::dup2_stdout(null.as_fd()),
        _ => Ok(()),
    }
    .with_context(|| format!("closing the original of fd {fd}"))?;
    Ok(copy)
}

/// What was typed, or the text to show instead of doing something.
///
/// # Errors
/// For what cannot be understood.
pub fn parse() -> Result<Result<Args, String>> {
    use structopt::clap::ErrorKind;
    match Args::from_iter_safe(std::env::args_os()) {
        Ok(args) => Ok(Ok(args)),
        Err(error) => match error.kind {
            ErrorKind::HelpDisplayed | ErrorKind::VersionDisplayed => Ok(Err(error.message)),
            _ => Err(anyhow!(
                "{}",
                error.message.trim_start_matches("error: ").trim_end()
            )),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &str) -> Args {
        Args::from_iter(std::iter::once("criu-image-streamer").chain(line.split(' ')))
    }

    #[test]
    fn options_stand_before_or_after_the_subcommand() {
        let before = args("-D dir -s 10,11 -e fs.tar:12 -p 13 capture");
        assert_eq!(before, args("capture -D dir -s 10,11 -e fs.tar:12 -p 13"));
        assert_eq!(
            before,
            args("--images-dir dir -s 10,11 capture --ext-file-fds fs.tar:12 --progress-fd 13")
        );
    }

    #[test]
    fn an_external_file_may_have_a_colon_in_its_name() {
        assert_eq!(
            parse_external("a:b:7").unwrap(),
            (ImageName::new("a:b").unwrap(), 7)
        );
    }
}
