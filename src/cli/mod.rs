//! The command line: as typed ([`Args`]), and as checked ([`Plan`]).

mod descriptor;
mod help;
mod image_name;
mod options;
mod plan;

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;

use anyhow::{Result, anyhow, ensure};
use structopt::StructOpt;
use structopt::clap::{AppSettings, ErrorKind};

use crate::criu::hook_caller;
use crate::format::ImageName;
use crate::listen_ports::Remap;
use crate::os::descriptor::Direction;
use crate::os::memory;
use descriptor::FdNumber;
pub(crate) use image_name::StoredAs;
pub(crate) use plan::Plan;

/// The command line, as typed.
#[derive(Debug, PartialEq, Eq, StructOpt)]
#[structopt(about = help::ABOUT, template = help::ALL_TEMPLATE)]
#[structopt(
    usage = "criu-image-streamer [OPTIONS] --images-dir <images-dir> <SUBCOMMAND> [-- <command>...]",
    global_settings = &[
        AppSettings::VersionlessSubcommands,
        AppSettings::DeriveDisplayOrder,
        AppSettings::UnifiedHelpMessage,
        AppSettings::ColorNever,
    ],
    settings = &[AppSettings::SubcommandRequiredElseHelp],
    after_help = help::EXAMPLES
)]
pub struct Args {
    /// Directory in which CRIU looks for the streamer's socket; `extract` writes the files there.
    /// `list` needs none
    #[structopt(short = "D", long, parse(from_os_str), global = true)]
    images_dir: Option<PathBuf>,

    /// Descriptors of the shards, which carry the image [default: 1 for capture, 0 for extract,
    /// serve and list]
    #[structopt(short, long, value_name = "fd,fd,...")]
    #[structopt(require_delimiter = true, global = true)]
    shard_fds: Vec<FdNumber>,

    /// Shell command for each shard, in place of --shard-fds: capture pipes the shard into it,
    /// the others read the shard from its output. {} stands for the shard's number, from 1.
    /// Every command must succeed
    #[structopt(long, value_name = "command", global = true)]
    shard_cmd: Option<String>,

    /// Number of shards that --shard-cmd makes, 1 to 32 [default: 1]
    #[structopt(long, value_name = "N", global = true)]
    num_shards: Option<usize>,

    /// With --shard-cmd: make one more shard, the index, whose command has `index` for {}. `serve`
    /// then lets CRIU connect as soon as the index is here, and serves the rest while it arrives
    #[structopt(long, global = true)]
    pub(crate) index: bool,

    /// With --shard-fds: descriptor of the index, one more shard; see --index
    #[structopt(long, value_name = "fd", global = true)]
    index_fd: Option<FdNumber>,

    /// serve: let the application run at once, and fill in its memory afterwards. `criu restore`
    /// must have its own --lazy-pages. The progress line `memory-in-place` tells when all is there
    #[structopt(long, global = true)]
    pub(crate) lazy_pages: bool,

    /// capture: copy the application's memory to up to this number of bytes (K, M and G are known,
    /// and 50% of the memory that is available), as fast as CRIU gives it, and feed the shards from
    /// there. The progress line `memory-copied` tells when the application may go on
    #[structopt(long, value_name = "bytes", parse(try_from_str = buffer_size), global = true)]
    pub(crate) buffer: Option<u64>,

    /// capture with --buffer, under CRIU's hook: let CRIU go on as soon as the memory is copied,
    /// for an application that it leaves running. What becomes of the image then is in
    /// streamer-capture.outcome
    #[structopt(long, global = true)]
    pub(crate) go_on_when_copied: bool,

    /// Name of the image, $CRIU_IMAGE_NAME for the commands. Under CRIU's hook a capture makes one,
    /// and leaves it in the images directory for the restore
    #[structopt(long, value_name = "name", global = true)]
    pub(crate) image_name: Option<StoredAs>,

    /// External files: added to the image from these descriptors on capture, written to them on
    /// restore
    #[structopt(short, long, value_name = "name:fd,...")]
    #[structopt(parse(try_from_str = external_fd), require_delimiter = true, global = true)]
    ext_file_fds: Vec<(ImageName, FdNumber)>,

    /// External file by a shell command, which must succeed: capture starts it when the application
    /// is frozen, and adds its output to the image; extract and serve pipe the file into it, and it
    /// has ended before CRIU is started. May be repeated
    #[structopt(long, value_name = "name:command")]
    #[structopt(parse(try_from_str = external_command), number_of_values = 1, global = true)]
    ext_file_cmd: Vec<(ImageName, String)>,

    /// Descriptor for progress lines and statistics [default: 2; none with --progress-bar]
    #[structopt(short, long, value_name = "fd", global = true)]
    progress_fd: Option<FdNumber>,

    /// Show the progress on standard error, for people, and at the end a line for each shard.
    /// Progress lines, which programs read, then go to --progress-fd only
    #[structopt(long, global = true)]
    pub(crate) progress_bar: bool,

    /// Write to this file at the end, as JSON, what passed through each shard, and for how long the
    /// shards, CRIU and the image waited for each other
    #[structopt(long, value_name = "file", parse(from_os_str), global = true)]
    pub(crate) statistics: Option<PathBuf>,

    /// serve only: change the TCP ports that the application listens on
    #[structopt(long, value_name = "old:new,...")]
    #[structopt(require_delimiter = true, global = true)]
    pub(crate) tcp_listen_remap: Vec<Remap>,

    #[structopt(subcommand)]
    pub(crate) command: Command,

    /// The words behind `--`.
    #[structopt(skip)]
    criu: Vec<OsString>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, StructOpt)]
pub(crate) enum Command {
    /// Capture a CRIU image: from `criu dump --stream` to the shards
    ///
    /// The command behind `--` runs `criu dump --stream`. It is started when CRIU can connect, and
    /// its status counts
    #[structopt(template = help::TEMPLATE, after_help = help::EXAMPLES)]
    Capture,

    /// Write a captured image from the shards to --images-dir, for a plain `criu restore`
    #[structopt(template = help::TEMPLATE, after_help = help::EXAMPLES)]
    Extract {
        /// Buffer the image in memory and serve it to `criu restore --stream` instead, as `serve`
        /// does
        #[structopt(long)]
        serve: bool,
    },

    /// Buffer a captured image in memory and serve it to `criu restore --stream`: the same as
    /// `extract --serve`
    ///
    /// The command behind `--` runs `criu restore --stream`. It is started when CRIU can connect,
    /// and its status counts
    #[structopt(template = help::TEMPLATE, after_help = help::EXAMPLES)]
    Serve,

    /// Read a captured image from the shards, check that it is whole, and print the size and name
    /// of each of its files to standard output
    #[structopt(template = help::TEMPLATE, after_help = help::EXAMPLES)]
    List,

    /// Be CRIU's action script: start `capture` or `serve` for it, and have it wait for the uploads
    ///
    /// `criu dump --stream --action-script criu-image-streamer`, without `hook`, is enough. The
    /// options are in streamer-capture.options and streamer-serve.options, one a line, in
    /// /etc/criu-image-streamer or in the directory that CRIU_IMAGE_STREAMER_OPTIONS names
    #[structopt(template = help::TEMPLATE, after_help = help::EXAMPLES)]
    Hook,
}

impl Command {
    /// The direction of the shards.
    pub(crate) fn direction(self) -> Direction {
        match self {
            Self::Capture => Direction::Out,
            _ => Direction::In,
        }
    }
}

/// A number of bytes, or the part of the memory that is available now.
fn buffer_size(text: &str) -> Result<u64, String> {
    let bytes = |digits: &str, shift| digits.parse::<u64>().ok()?.checked_mul(1_u64 << shift);
    let size = match text.split_at_checked(text.len().wrapping_sub(1)) {
        Some((digits, "%")) => bytes(digits, 0)
            .filter(|&percent| percent <= 100)
            .and_then(|percent| Some(memory::available()? / 100 * percent)),
        Some((digits, "K")) => bytes(digits, 10),
        Some((digits, "M")) => bytes(digits, 20),
        Some((digits, "G")) => bytes(digits, 30),
        _ => bytes(text, 0),
    };
    size.filter(|&size| size > 0).ok_or_else(|| {
        format!("{text:?} is no size of a buffer, such as 512M, 4G or 50% of what is available")
    })
}

/// An external file's name in the image, and the descriptor that it comes from or goes to.
fn external_fd(text: &str) -> Result<(ImageName, FdNumber), String> {
    let (name, fd) = external(text, text.rsplit_once(':'), "name:fd, such as fs.tar:10")?;
    Ok((name, fd.parse()?))
}

/// An external file's name in the image, and the command that it comes from or goes to.
fn external_command(text: &str) -> Result<(ImageName, String), String> {
    let form = "name:command, such as 'fs.tar:tar -C fs -cf - .'";
    let (name, command) = external(text, text.split_once(':'), form)?;
    match command.trim() {
        "" => Err(format!("the command of {name} is empty")),
        _ => Ok((name, command.to_owned())),
    }
}

/// The name of an external file, and what is behind it.
fn external<'a>(
    text: &str,
    parts: Option<(&str, &'a str)>,
    form: &str,
) -> Result<(ImageName, &'a str), String> {
    let (name, value) = parts.ok_or_else(|| format!("{text:?} is not of the form {form}"))?;
    let why = |why| format!("an external file cannot be named {name:?}: {why}");
    Ok((ImageName::new(name).map_err(why)?, value))
}

/// Puts the subcommand before all options: of an option that stands on both sides of it, clap keeps
/// the values of one side only.
fn subcommand_first(mut words: Vec<OsString>) -> Vec<OsString> {
    // The words up to it are a whole command line.
    let is_it = |at: &usize| {
        let is_option = words[*at].as_encoded_bytes().starts_with(b"-");
        !is_option && Args::clap().get_matches_from_safe(&words[..=*at]).is_ok()
    };
    if let Some(at) = (1..words.len()).find(is_it) {
        words[1..=at].rotate_right(1);
    }
    words
}

/// The words of a command line, and those behind `--`, which are another program's.
fn parse_words(mut words: Vec<OsString>) -> structopt::clap::Result<Args> {
    let end = words.iter().position(|word| word == "--");
    let criu = end.map_or_else(Vec::new, |end| words.split_off(end));
    let mut args = Args::from_iter_safe(subcommand_first(words))?;
    args.criu = criu.into_iter().skip(1).collect();
    Ok(args)
}

/// Parses what was typed. `None`: CRIU runs this program as its action script.
///
/// # Errors
/// When it is no command line of ours.
pub(crate) fn parse() -> Result<Option<Args>> {
    let typed: Vec<_> = std::env::args_os().collect();
    // CRIU gives its action scripts no arguments.
    if typed.len() < 2 && hook_caller::action().is_some() {
        return Ok(None);
    }
    let ends = typed.last().is_some_and(|word| word == "--");
    let args = parse_words(typed).map_err(|error| match error.kind {
        ErrorKind::HelpDisplayed | ErrorKind::VersionDisplayed => {
            // A reader such as `head` may have seen enough.
            let _ = writeln!(std::io::stdout(), "{}", error.message);
            std::process::exit(0)
        }
        // The usage is its message.
        ErrorKind::MissingArgumentOrSubcommand => error.exit(),
        _ => anyhow!("{}", reason(&error).trim_end()),
    })?;
    ensure!(
        !ends,
        "--: there is no command behind it: give one, such as `criu dump --stream …`"
    );
    ensure!(
        !args.go_on_when_copied,
        "--go-on-when-copied: it is for the options of CRIU's hook, which waits for the end otherwise; here, wait for the progress line `memory-copied`"
    );
    if args.command != Command::Hook {
        return Ok(Some(args));
    }
    ensure!(
        args == Args::from_iter(["criu-image-streamer", "hook"]),
        "hook: its options are in files, not on its command line; see the README"
    );
    Ok(None)
}

/// The message of an error of clap's, without the word before it.
fn reason(error: &structopt::clap::Error) -> &str {
    error.message.trim_start_matches("error: ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(line: &str) -> Args {
        let words = std::iter::once("criu-image-streamer").chain(line.split(' '));
        parse_words(words.map(OsString::from).collect()).unwrap()
    }

    #[test]
    fn every_value_of_a_list_counts() {
        for line in [
            "-s 3 -s 4,5 -e a:6,b:7 --tcp-listen-remap 8:9,1:2 capture",
            "capture -s 3,4,5 -e a:6 -e b:7 --tcp-listen-remap 8:9 --tcp-listen-remap=1:2",
            "--shard-fds=3 -e a:6 --tcp-listen-remap 8:9 capture -s4 -s 5 -e b:7 --tcp-listen-remap 1:2",
        ] {
            let args = args(line);
            assert_eq!(
                args.shard_fds,
                ["3", "4", "5"].map(|fd| fd.parse().unwrap())
            );
            assert_eq!(args.ext_file_fds.len(), 2, "{line}");
            assert_eq!(
                args.tcp_listen_remap,
                ["8:9", "1:2"].map(|it| it.parse().unwrap())
            );
        }
        let line = "--index -D serve --ext-file-cmd a:x capture --ext-file-cmd b:y -- serve";
        let args = args(line);
        assert_eq!(args.images_dir, Some("serve".into()));
        assert_eq!(args.ext_file_cmd.len(), 2);
        assert_eq!(args.command, Command::Capture);
        assert_eq!(args.criu, ["serve"]);
    }

    #[test]
    fn a_buffer_is_a_number_of_bytes_or_a_part_of_what_is_available() {
        assert_eq!(buffer_size("512M"), Ok(512 << 20));
        assert_eq!(buffer_size("1000"), Ok(1000));
        for text in [
            "",
            "0",
            "0%",
            "101%",
            "%",
            "-5%",
            "50 %",
            "half",
            "M",
            "1T",
            "-1",
            "9\u{e9}",
            "99999999999G",
        ] {
            assert!(buffer_size(text).is_err(), "{text:?}");
        }
        let [half, all] = ["50%", "100%"].map(|text| buffer_size(text).unwrap());
        assert!(half > 0 && half < all, "{half} of {all}");
    }

    #[test]
    fn an_external_file_may_have_a_colon_in_its_name() {
        let (name, fd) = external_fd("a:b:7").unwrap();
        assert_eq!(name, ImageName::new("a:b").unwrap());
        assert_eq!(fd, "7".parse().unwrap());
    }

    #[test]
    fn an_external_files_command_may_have_colons() {
        let (name, command) = external_command("fs.tar:ssh a:b").unwrap();
        assert_eq!(name, ImageName::new("fs.tar").unwrap());
        assert_eq!(command, "ssh a:b");
    }
}
