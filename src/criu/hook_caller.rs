//! The CRIU that runs this program as its action script (docs/protocol.md, section 1).
//!
//! The environment has CRIU's present action, and its images directory as one of CRIU's own
//! descriptors in /proc. From that path comes CRIU's PID: a script may stand between CRIU and this
//! program. Only CRIU's command line shows if it dumps or restores. Under RPC that is `criu swrk`,
//! and the command line of the container engine shows it, which has started CRIU.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::connection::frame;
use super::connection::proto::ImgStreamerRequestEntry;
use super::{Message, Role};
use crate::os::process::{arguments_in, command_line_of, parent_of, start_of};

/// Variables that CRIU sets for its action scripts.
const ACTION: &str = "CRTOOLS_SCRIPT_ACTION";
const IMAGES_DIR: &str = "CRTOOLS_IMAGE_DIR";

/// Begins the hook's request to the streamer, in place of a file's name; its CRIU follows. No file
/// can have a name with a slash.
const CALL: &str = "/post-dump ";

/// The CRIU whose hook has called, if a message is such a call.
pub(crate) fn call_in(message: &Message) -> Option<&str> {
    match message {
        Message::Request(name) => name.strip_prefix(CALL),
        Message::Descriptor(_) => None,
    }
}

/// The action that CRIU is at; `None` if it is not CRIU that runs this program.
pub(crate) fn action() -> Option<OsString> {
    std::env::var_os(ACTION)
}

/// A CRIU that waits for its action script.
#[derive(Debug)]
pub(crate) struct Caller {
    pid: u32,
    /// With the PID, distinguishes it from every other process since the machine was started.
    start: u64,
    /// Readable when it has ended.
    process: OwnedFd,
    images_dir: PathBuf,
    /// A program drives it over RPC, as container engines do.
    is_driven: bool,
    /// Its command line, or its parent's if it is driven.
    command_line: Vec<u8>,
}

impl Caller {
    /// # Errors
    /// When CRIU's environment variables are missing, or do not lead to a process that runs.
    pub(crate) fn find() -> Result<Self> {
        let images_dir = std::env::var_os(IMAGES_DIR).map(PathBuf::from);
        let images_dir = images_dir.with_context(|| {
            format!("{IMAGES_DIR} is not set: the hook is for CRIU's --action-script")
        })?;
        let pid = process_behind(&images_dir).with_context(|| {
            format!(
                "{IMAGES_DIR} is {}, and CRIU sets it to /proc/PID/fd/NUMBER",
                images_dir.display()
            )
        })?;
        let process = Pid::from_raw(pid as i32).context("CRIU's PID is 0")?;
        let process = pidfd_open(process, PidfdFlags::empty())
            .with_context(|| format!("looking for CRIU, process {pid}"))?;
        let own = command_line_of(pid);
        let images_dir = match fs::metadata(&images_dir) {
            // CRIU has capabilities, and this process has none.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                let started_in = PathBuf::from(std::env::var_os("PWD").unwrap_or_default());
                started_in.join(images_dir_in(&own))
            }
            _ => resolved(images_dir),
        };
        let is_driven = actions_in(&own).is_empty();
        let parents = || parent_of(pid).map(command_line_of);
        Ok(Self {
            pid,
            start: start_of(pid).with_context(|| format!("looking at CRIU, process {pid}"))?,
            process,
            images_dir,
            is_driven,
            command_line: is_driven.then(parents).flatten().unwrap_or(own),
        })
    }

    /// Its images directory: the path of it if there is one, else one in /proc.
    pub(crate) fn images_dir(&self) -> &Path {
        &self.images_dir
    }

    /// The CRIU, in words.
    pub(crate) fn identity(&self) -> String {
        format!("CRIU {} {}", self.pid, self.start)
    }

    /// Calls the streamer that was started for it, now that CRIU has closed its files, and returns
    /// the connection, over which the streamer answers.
    ///
    /// # Errors
    /// When no streamer listens.
    pub(crate) fn call(&self, images_dir: impl AsFd) -> io::Result<UnixStream> {
        let name = Role::Capture.socket_name();
        // A short path, whatever that of the directory is.
        let directory = images_dir.as_fd().as_raw_fd();
        let mut streamer = UnixStream::connect(format!("/proc/self/fd/{directory}/{name}"))?;
        let filename = format!("{CALL}{}", self.identity());
        streamer.write_all(&frame(&ImgStreamerRequestEntry { filename }))?;
        Ok(streamer)
    }

    /// Its role for the streamer, as far as command lines show it.
    pub(crate) fn role(&self) -> Option<Role> {
        Some(match action_in(&self.command_line)? {
            Action::Dump | Action::NoDump => Role::Capture,
            Action::Restore => Role::Serve,
        })
    }

    /// True if it writes a pre-dump or the processor's features, and no dump. It then runs no
    /// action script when that is written.
    pub(crate) fn takes_no_dump(&self) -> bool {
        let mut words = arguments_in(&self.command_line);
        action_in(&self.command_line) == Some(Action::NoDump)
            || words.any(|word| word == b"--pre-dump")
    }

    /// True if the application lives on after a dump, as far as command lines show it.
    pub(crate) fn lets_live(&self) -> bool {
        lets_live(&self.command_line)
    }

    /// True if a program drives it over RPC, as container engines do.
    pub(crate) fn is_driven(&self) -> bool {
        self.is_driven
    }
}

impl AsFd for Caller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.process.as_fd()
    }
}

/// The PID in `/proc/PID/fd/NUMBER`.
fn process_behind(path: &Path) -> Option<u32> {
    let words: Vec<_> = path.to_str()?.split('/').collect();
    match words[..] {
        ["", "proc", pid, "fd", _] => pid.parse().ok(),
        _ => None,
    }
}

/// The path that a link in /proc shows, if it leads to the same directory: it may be another mount
/// namespace's, or gone.
fn resolved(link: PathBuf) -> PathBuf {
    let identity = |path: &Path| fs::metadata(path).map(|it| (it.dev(), it.ino())).ok();
    match fs::read_link(&link) {
        Ok(path) if identity(&path).is_some_and(|it| Some(it) == identity(&link)) => path,
        _ => link,
    }
}

/// The images directory that a command line of CRIU's names.
fn images_dir_in(arguments: &[u8]) -> &Path {
    let mut words = arguments_in(arguments);
    let directory = words.by_ref().find_map(|word| match word {
        b"-D" | b"--images-dir" => Some(&b""[..]),
        _ => word
            .strip_prefix(b"-D")
            .or_else(|| word.strip_prefix(b"--images-dir=")),
    });
    let directory = directory.filter(|it| !it.is_empty()).or(words.next());
    Path::new(OsStr::from_bytes(directory.unwrap_or_default()))
}

/// CRIU's task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Dump,
    /// A pre-dump, or cpuinfo.img alone.
    NoDump,
    Restore,
}

/// The words of a command line that may be its action, each with whether it may be an option's
/// value instead, such as the name of a directory: it follows an option.
fn actions_in(arguments: &[u8]) -> Vec<(Action, bool)> {
    let words: Vec<_> = arguments_in(arguments).collect();
    let found = words.windows(2).filter_map(|pair| {
        let action = match pair[1] {
            b"dump" | b"checkpoint" => Action::Dump,
            b"pre-dump" | b"cpuinfo" => Action::NoDump,
            b"restore" => Action::Restore,
            _ => return None,
        };
        let may_be_value = pair[0].starts_with(b"-") && !pair[0].contains(&b'=');
        Some((action, may_be_value))
    });
    found.collect()
}

/// The action of a command line: the first that can be nothing else, or what all may be.
fn action_in(arguments: &[u8]) -> Option<Action> {
    let found = actions_in(arguments);
    let &(first, _) = found.first()?;
    let certain = found.iter().find(|(_, may_be_value)| !may_be_value);
    let agree = found.iter().all(|(action, _)| *action == first);
    let certain = certain.map(|(action, _)| *action);
    certain.or(agree.then_some(first))
}

/// True if the application lives on after a dump with these arguments, each with a NUL behind it.
pub(crate) fn lets_live(arguments: &[u8]) -> bool {
    let is_option = |word: &[u8]| word == b"-R" || word == b"-s" || word.starts_with(b"--leave-");
    arguments_in(arguments).any(is_option)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn criu_is_found_behind_its_descriptor() {
        assert_eq!(process_behind(Path::new("/proc/17/fd/1021")), Some(17));
        for other in ["/proc/self/fd/3", "/proc/17/cwd", "images", ""] {
            assert_eq!(process_behind(Path::new(other)), None, "{other}");
        }
    }

    #[test]
    fn a_command_line_names_the_images_directory() {
        for (line, directory) in [
            ("criu dump -t 1 -D images", "images"),
            ("criu dump -D/images -t 1", "/images"),
            ("criu --images-dir=a dump", "a"),
            ("criu dump --images-dir a", "a"),
            ("criu dump", ""),
        ] {
            let bytes = line.replace(' ', "\0").into_bytes();
            assert_eq!(images_dir_in(&bytes), Path::new(directory), "{line}");
        }
    }

    #[test]
    fn command_lines_tell_what_is_going_on() {
        let bytes = |line: &str| line.replace(' ', "\0").into_bytes();
        for (line, action) in [
            ("criu dump --stream -t 1", Some(Action::Dump)),
            ("criu -D images restore", Some(Action::Restore)),
            ("criu restore -D checkpoint", Some(Action::Restore)),
            ("criu restore -D dump", Some(Action::Restore)),
            ("criu -D dump restore", Some(Action::Restore)),
            ("criu -v4 -D=dump restore", Some(Action::Restore)),
            ("criu -v4 dump", Some(Action::Dump)),
            ("criu -v4 dump -D restore", None),
            ("criu pre-dump --stream", Some(Action::NoDump)),
            ("criu cpuinfo dump", Some(Action::NoDump)),
            (
                "runc --root /run/runc checkpoint restore",
                Some(Action::Dump),
            ),
            (
                "runc restore --image-path checkpoint app",
                Some(Action::Restore),
            ),
            ("criu swrk 3", None),
            ("dump", None),
            ("", None),
        ] {
            assert_eq!(action_in(&bytes(line)), action, "{line}");
        }
        for line in [
            "criu dump -R",
            "criu dump --leave-running",
            "runc checkpoint --leave-running a",
        ] {
            assert!(lets_live(&bytes(line)), "{line}");
        }
        assert!(!lets_live(&bytes("criu dump --stream -t 7")));
    }
}
