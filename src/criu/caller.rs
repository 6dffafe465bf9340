//! The CRIU that runs this program as its action script (docs/protocol.md, section 1).
//!
//! CRIU says which action it is at, and names its images directory as one of its own descriptors in
//! /proc. From that path comes CRIU's PID: a script may stand between CRIU and this program. CRIU
//! does not say whether it dumps or restores; its command line does. Under RPC that is `criu swrk`,
//! and the command line of the container engine tells, which has started it.

use std::ffi::OsString;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::Role;
use crate::os::process::{parent_of, start_of};

/// What CRIU sets for its action scripts.
const ACTION: &str = "CRTOOLS_SCRIPT_ACTION";
const IMAGES_DIR: &str = "CRTOOLS_IMAGE_DIR";

/// The action that CRIU is at; `None` if it is not CRIU that runs this program.
pub(crate) fn action() -> Option<OsString> {
    std::env::var_os(ACTION)
}

/// A CRIU that waits for its action script.
#[derive(Debug)]
pub(crate) struct Caller {
    pid: u32,
    /// With the PID, tells it from every other process since the machine was started.
    start: u64,
    /// Readable when it has ended.
    process: OwnedFd,
    images_dir: PathBuf,
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
        Ok(Self {
            pid,
            start: start_of(pid).with_context(|| format!("looking at CRIU, process {pid}"))?,
            process,
            images_dir: resolved(images_dir),
        })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// Its images directory: the path of it if there is one, else one in /proc.
    pub(crate) fn images_dir(&self) -> &Path {
        &self.images_dir
    }

    /// Which CRIU it is, in words.
    pub(crate) fn identity(&self) -> String {
        format!("CRIU {} {}", self.pid, self.start)
    }

    /// What it is doing, as far as command lines tell.
    pub(crate) fn role(&self) -> Option<Role> {
        role_of(self.pid).or_else(|| role_of(parent_of(self.pid)?))
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

/// What a process is doing, by the words of its command line, if they do not contradict each other.
fn role_of(pid: u32) -> Option<Role> {
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    role_in(&arguments)
}

fn role_in(arguments: &[u8]) -> Option<Role> {
    let mut roles = arguments.split(|&byte| byte == 0).filter_map(|argument| {
        Some(match argument {
            b"dump" | b"pre-dump" | b"checkpoint" => Role::Capture,
            b"restore" => Role::Serve,
            _ => return None,
        })
    });
    let role = roles.next()?;
    roles.all(|other| other == role).then_some(role)
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
    fn command_lines_tell_what_is_going_on() {
        let role = |line: &str| role_in(line.replace(' ', "\0").as_bytes());
        assert_eq!(role("criu dump --stream -t 1"), Some(Role::Capture));
        assert_eq!(role("criu -D images restore"), Some(Role::Serve));
        assert_eq!(role("runc checkpoint app"), Some(Role::Capture));
        for unknown in ["criu swrk 3", "criu restore -D dump", ""] {
            assert_eq!(role(unknown), None, "{unknown}");
        }
    }
}
