//! The CRIU that runs this program as its action script (docs/protocol.md, section 1).
//!
//! The environment has CRIU's present action, and its images directory as one of CRIU's own
//! descriptors in /proc. From that path comes CRIU's PID: a script may stand between CRIU and this
//! program. Only CRIU's [`CommandLine`] shows if it dumps or restores. Under RPC that is
//! `criu swrk`, and the command line of the container engine shows it, which has started CRIU.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::connection::frame;
use super::connection::proto::ImgStreamerRequestEntry;
use super::{CommandLine, Message, Role};
use crate::os::descriptor::{path_in, resolved};
use crate::os::process::{self, parent_of, start_of};

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
        Message::Pipe(..) => None,
    }
}

/// The action that CRIU is at; `None` if it is not CRIU that runs this program.
pub(crate) fn action() -> Option<OsString> {
    std::env::var_os(ACTION)
}

/// A CRIU that waits for its action script.
#[derive(Debug)]
pub(crate) struct Caller {
    /// Its PID and its start, which distinguish it from every other process since the machine was
    /// started.
    pub(crate) identity: String,
    /// Readable when it has ended.
    pub(crate) process: OwnedFd,
    /// The path of it if there is one, else one in /proc.
    pub(crate) images_dir: PathBuf,
    pub(crate) directory: File,
    /// A program drives it over RPC, as container engines do.
    pub(crate) is_driven: bool,
    /// Its own, or its engine's if it is driven.
    pub(crate) command_line: CommandLine,
}

impl Caller {
    /// # Errors
    /// When CRIU's environment variables are missing, or do not lead to a process that runs.
    pub(crate) fn find() -> Result<Self> {
        let images_dir = std::env::var_os(IMAGES_DIR).unwrap_or_default();
        let images_dir = PathBuf::from(images_dir);
        let pid = process_behind(&images_dir).with_context(|| {
            format!(
                "{IMAGES_DIR} is {images_dir:?}, and CRIU sets it to /proc/PID/fd/NUMBER for its --action-script"
            )
        })?;
        let process = process::open(pid as i32)
            .with_context(|| format!("looking for CRIU, process {pid}"))?;
        let start = start_of(pid).with_context(|| format!("looking at CRIU, process {pid}"))?;
        let own = CommandLine::of(pid);
        let images_dir = match fs::metadata(&images_dir) {
            // CRIU has capabilities, and this process has none.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                let started_in = PathBuf::from(std::env::var_os("PWD").unwrap_or_default());
                started_in.join(own.images_dir())
            }
            _ => resolved(images_dir),
        };
        let directory = File::open(&images_dir);
        let is_driven = own.actions().is_empty();
        let parents = || parent_of(pid).map(CommandLine::of);
        Ok(Self {
            identity: format!("CRIU {pid} {start}"),
            process,
            directory: directory
                .with_context(|| format!("opening CRIU's images directory {images_dir:?}"))?,
            images_dir,
            is_driven,
            command_line: is_driven.then(parents).flatten().unwrap_or(own),
        })
    }

    /// Calls the streamer that was started for it, now that CRIU has closed its files, and returns
    /// the connection, over which the streamer answers.
    ///
    /// # Errors
    /// When no streamer listens.
    pub(crate) fn call(&self) -> io::Result<UnixStream> {
        let socket = path_in(&self.directory, Role::Capture.socket_name());
        let mut streamer = UnixStream::connect(socket)?;
        let filename = format!("{CALL}{}", self.identity);
        streamer.write_all(&frame(&ImgStreamerRequestEntry { filename }))?;
        Ok(streamer)
    }
}

/// The PID in `/proc/PID/fd/NUMBER`.
fn process_behind(path: &Path) -> Option<u32> {
    let (pid, fd) = path.to_str()?.strip_prefix("/proc/")?.split_once("/fd/")?;
    pid.parse().ok().filter(|_| !fd.contains('/'))
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
}
