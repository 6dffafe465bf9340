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
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use structopt::StructOpt;
use structopt::clap::ErrorKind;

use super::{Args, reason};

/// The largest file of options, in bytes.
const LARGEST: u64 = 64 << 10;

/// Mode bits that let others than the owner write.
const OTHERS_WRITE: u32 = 0o022;

/// Options that a streamer which CRIU's hook starts cannot follow.
const NOT_FOR_HOOK: [&str; 8] = [
    "--images-dir",
    "--shard-fds",
    "--index-fd",
    "--ext-file-fds",
    "--progress-fd",
    "--progress-bar",
    "--help",
    "--version",
];

impl Args {
    /// Reads the options for `subcommand` from a file, for a streamer whose socket is in
    /// `images_dir`.
    ///
    /// # Errors
    /// Each names the file, and where it can the line.
    pub(crate) fn from_file(path: &Path, subcommand: &str, images_dir: &Path) -> Result<Self> {
        let args = read(path).and_then(|text| Self::parse(&text, subcommand));
        let mut args = args.with_context(|| path.display().to_string())?;
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
            let line = || format!("line {number}: {name}");
            ensure!(
                !NOT_FOR_HOOK.contains(&name),
                "{}: it is not for CRIU's hook, which has no descriptors, no terminal, and CRIU's images directory",
                line()
            );
            Self::of(std::slice::from_ref(&option), subcommand).with_context(line)?;
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
            ErrorKind::UnknownArgument => anyhow!("there is no such option"),
            // The rest shows the usage of the command line.
            _ => anyhow!("{}", reason(&error).lines().next().unwrap_or_default()),
        })
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

/// The text of a file that may be a link, but to no file outside of its directory: a Kubernetes
/// ConfigMap has such links.
fn read(path: &Path) -> Result<String> {
    let found = path.canonicalize().context("looking for it")?;
    let directory = path.parent().unwrap_or(path).canonicalize()?;
    ensure!(
        found.starts_with(directory),
        "it is a link out of its directory"
    );
    let file = open(&found)?.context("it is gone")?;
    // Of the open file: its name may lead to another one by now.
    let metadata = file.metadata().context("looking at it")?;
    let own = nix::unistd::geteuid().as_raw();
    ensure!(
        [0, own].contains(&metadata.uid()) && metadata.mode() & OTHERS_WRITE == 0,
        "other users may write to it, and it has commands: it must be root's or user {own}'s, with a mode such as 0644"
    );
    read_text(file, LARGEST)
}

/// Opens a regular file, which is no link. `None` if there is none.
pub(super) fn open(path: &Path) -> Result<Option<File>> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = match File::options().read(true).custom_flags(flags).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.context("opening it")?,
    };
    let is_file = file.metadata().context("looking at it")?.is_file();
    ensure!(is_file, "it is no regular file");
    Ok(Some(file))
}

/// The text of a file of up to `most` bytes.
pub(super) fn read_text(file: File, most: u64) -> Result<String> {
    let mut text = String::new();
    let mut file = file.take(most + 1);
    file.read_to_string(&mut text).context("reading it")?;
    ensure!(text.len() as u64 <= most, "it has more than {most} bytes");
    Ok(text)
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
            refused(descriptors, &["line 1", "has no descriptors"]);
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
        assert_eq!(read(&directory.join("it")).unwrap(), "--shard-cmd cat");
        for link in ["out", "away"] {
            let error = format!("{:#}", read(&directory.join(link)).unwrap_err());
            assert!(error.contains("out of its directory"), "{error}");
        }
    }
}
