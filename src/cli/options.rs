//! Files of options, for a streamer that CRIU's hook starts: CRIU runs an action script without
//! arguments.
//!
//! A line is one option and its value, which is the rest of the line: a command stands there as
//! in a script, without a second level of quotes. Empty lines, and those that begin with `#`, are
//! left out. Options that name descriptors are refused, since a hook inherits none, and so are
//! options that CRIU has itself.
//!
//! Such a file has commands that run as the user who starts CRIU. One that others may write to is
//! refused, and so is a link that leads out of its directory: the file behind it was not written
//! for this. An error quotes an option's name at most, so that it shows nothing of another file.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::sys::stat::Mode;
use structopt::StructOpt;
use structopt::clap::ErrorKind;

use super::{Args, reason};
use crate::os::descriptor::open_directory;

/// The largest file of options, in bytes.
const LARGEST: u64 = 64 << 10;

/// Mode bits that let others than the owner write.
const OTHERS_WRITE: u32 = 0o022;

impl Args {
    /// Reads the options for `subcommand` from the file `name` in a directory, for a streamer whose
    /// socket is in `images_dir`.
    ///
    /// # Errors
    /// Each names the file, and where it can the line.
    pub(crate) fn from_file(
        directory: &Path,
        name: &str,
        subcommand: &str,
        images_dir: &Path,
    ) -> Result<Self> {
        let read = || Self::parse(&read(directory, name)?, subcommand);
        let mut args = read().with_context(|| directory.join(name).display().to_string())?;
        args.images_dir = Some(images_dir.to_owned());
        Ok(args)
    }

    /// True if CRIU may go on before the image is written, and a command writes it to the images
    /// directory, as far as its text shows.
    pub(crate) fn goes_on_into(&self, images_dir: &Path) -> bool {
        let files = self.ext_file_cmd.iter().map(|(_, command)| command);
        let images_dir = images_dir.to_string_lossy();
        let names_it =
            |text: &String| text.contains("CRTOOLS_IMAGE_DIR") || text.contains(&*images_dir);
        self.go_on_when_copied && self.shard_cmd.iter().chain(files).any(names_it)
    }

    fn parse(text: &str, subcommand: &str) -> Result<Self> {
        let mut all = Vec::new();
        for (line, number) in text.lines().map(str::trim).zip(1..) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (name, option) = split(line).with_context(|| {
                format!("line {number} is no option: a line is one option and its value")
            })?;
            Self::of(std::slice::from_ref(&option), subcommand)
                .and_then(|_| check_option(name))
                .with_context(|| format!("line {number}: {name}"))?;
            all.push(option);
        }
        let args = Self::of(&all, subcommand)?;
        ensure!(
            args.shard_cmd.is_some(),
            "there is no line with --shard-cmd, the command that takes or brings the image"
        );
        Ok(args)
    }

    fn of(options: &[String], subcommand: &str) -> Result<Self> {
        let words = std::iter::once("criu-image-streamer")
            .chain(options.iter().map(String::as_str))
            .chain([subcommand]);
        Self::from_iter_safe(words).map_err(|error| match error.kind {
            ErrorKind::HelpDisplayed | ErrorKind::VersionDisplayed => {
                anyhow!("it shows a text, and starts nothing")
            }
            ErrorKind::UnknownArgument => anyhow!("there is no such option"),
            _ => {
                // The rest shows the usage of the command line.
                anyhow!("{}", reason(&error).lines().next().unwrap_or_default())
            }
        })
    }
}

/// Refuses options that a streamer in the background cannot have.
fn check_option(name: &str) -> Result<()> {
    match name {
        "--images-dir" => bail!("CRIU has an images directory, and tells which"),
        "--shard-fds" | "--index-fd" | "--ext-file-fds" | "--progress-fd" => {
            bail!("it names a descriptor, and CRIU's hook has none of them: give commands")
        }
        "--progress-bar" => bail!("nobody sees the bar of a streamer in the background"),
        _ => Ok(()),
    }
}

/// The name of the option on a line, and the word that the line is on a command line. `None` if it
/// does not look like an option: the short ones are of no use here.
fn split(line: &str) -> Option<(&str, String)> {
    let is_end = |c: char| c == '=' || c.is_whitespace();
    let (name, value) = match line.split_once(is_end) {
        Some((name, value)) => (name, format!("={}", value.trim_start())),
        None => (line, String::new()),
    };
    let is_word = |word: &str| word.bytes().all(|c| c == b'-' || c.is_ascii_lowercase());
    is_word(name.strip_prefix("--")?).then(|| (name, format!("{name}{value}")))
}

fn read(directory: &Path, name: &str) -> Result<String> {
    let directory = open_directory(directory).context("opening the directory")?;
    let file = File::from(open_beneath(&directory, name)?);
    let metadata = file.metadata().context("looking at it")?;
    let own = nix::unistd::geteuid().as_raw();
    if ![0, own].contains(&metadata.uid()) || metadata.mode() & OTHERS_WRITE != 0 {
        bail!(
            "other users may write to it, and it has commands: it must be root's or user {own}'s, with a mode such as 0644"
        );
    }
    read_text(file, LARGEST)
}

/// The text of a regular file of up to `most` bytes.
pub(super) fn read_text(file: File, most: u64) -> Result<String> {
    let is_file = file.metadata().context("looking at it")?.is_file();
    ensure!(is_file, "it is no regular file");
    let mut text = String::new();
    let mut file = file.take(most + 1);
    file.read_to_string(&mut text).context("reading it")?;
    ensure!(text.len() as u64 <= most, "it has more than {most} bytes");
    Ok(text)
}

/// Opens a file that may be a link, but to no file outside of its directory: a Kubernetes ConfigMap
/// has such links.
fn open_beneath(directory: impl AsFd, name: &str) -> Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let beneath = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    let how = OpenHow::new().flags(flags).resolve(beneath);
    match openat2(&directory, name, how) {
        // An older kernel, or a seccomp profile that does not know the call.
        Err(Errno::ENOSYS | Errno::EPERM) => {
            openat(&directory, name, flags | OFlag::O_NOFOLLOW, Mode::empty()).context("opening it")
        }
        Err(Errno::EXDEV | Errno::ELOOP) => bail!("it is a link out of its directory"),
        opened => opened.context("opening it"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn refused(text: &str, words: &[&str]) {
        let error = format!("{:#}", Args::parse(text, "capture").unwrap_err());
        for word in words {
            assert!(error.contains(word), "{word:?} is not in {error:?}");
        }
    }

    #[test]
    fn a_line_is_an_option_and_its_value() {
        let text = "
            # the store
            --num-shards 2
            --index
            --shard-cmd lz4 -d <'app {}.lz4' | tee \"$HOME/copy\" # all of it
        ";
        let args = Args::parse(text, "serve").unwrap();
        let command = "lz4 -d <'app {}.lz4' | tee \"$HOME/copy\" # all of it";
        assert_eq!(args.shard_cmd.as_deref(), Some(command));
        assert_eq!(args.num_shards, Some(2));
        assert!(args.index);
        let args = Args::parse("--shard-cmd=-x\r\n", "capture").unwrap();
        assert_eq!(args.shard_cmd.as_deref(), Some("-x"));
    }

    #[test]
    fn errors_name_the_line() {
        refused(
            "--shard-cmd cat\n\n--shard-comd cat",
            &["line 3", "--shard-comd", "no such option"],
        );
        refused("--num-shards many", &["line 1", "--num-shards"]);
        refused("capture", &["line 1", "no option"]);
        refused("--help", &["line 1", "--help"]);
        refused(
            "--shard-cmd cat\n--images-dir a",
            &["line 2", "--images-dir"],
        );
        for descriptors in [
            "--shard-fds 3",
            "--index-fd 3",
            "--ext-file-fds a:3",
            "--progress-fd 2",
        ] {
            refused(descriptors, &["line 1", "names a descriptor"]);
        }
        refused("--progress-bar", &["line 1", "--progress-bar"]);
        refused("--shard-cmd a\n--shard-cmd b", &["--shard-cmd"]);
        refused("--num-shards 2", &["--shard-cmd"]);
    }

    #[test]
    fn nothing_is_quoted_of_a_file_that_has_no_options() {
        for line in [
            "root:$6$secret:1:::",
            "-----BEGIN secret KEY-----",
            "--secret\u{e9}",
            "--Secret",
            "-secret",
            "--unknown secret",
            "--unknown=secret",
        ] {
            let error = format!("{:#}", Args::parse(line, "capture").unwrap_err());
            assert!(!error.to_lowercase().contains("secret"), "{error}");
        }
    }

    #[test]
    fn a_link_may_stay_within_its_directory_and_not_lead_out_of_it() {
        let place = tempfile::TempDir::new().unwrap();
        let directory = place.path().join("options");
        std::fs::create_dir_all(directory.join("..2026")).unwrap();
        std::fs::write(directory.join("..2026/it"), "--shard-cmd cat").unwrap();
        std::fs::write(place.path().join("outside"), "--shard-cmd cat").unwrap();
        for (link, target) in [
            ("..data", "..2026"),
            ("it", "..data/it"),
            ("out", "../outside"),
        ] {
            std::os::unix::fs::symlink(target, directory.join(link)).unwrap();
        }
        std::os::unix::fs::symlink(place.path().join("outside"), directory.join("away")).unwrap();
        assert_eq!(read(&directory, "it").unwrap(), "--shard-cmd cat");
        for link in ["out", "away"] {
            let error = format!("{:#}", read(&directory, link).unwrap_err());
            assert!(error.contains("out of its directory"), "{error}");
        }
    }
}
