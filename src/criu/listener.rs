//! A socket that CRIU connects to. Only its owner may connect, and it is removed in the end.
//!
//! An image holds the memory of a process, so the umask gives the socket mode 0600 from its first
//! moment. Connecting takes the right to write to the socket's inode (`unix_find_bsd` in the
//! kernel), whatever the directory's mode. Only its owner has it, and root: also root of a user
//! namespace around ours.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::socket::{Shutdown, shutdown};
use nix::sys::stat::{Mode, umask};

use crate::os::descriptor::path_in;

/// The socket's role for CRIU, which looks for another name on dump than on restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Capture,
    Serve,
}

impl Role {
    /// The name of the socket in the images directory.
    pub fn socket_name(self) -> String {
        self.file_name(".sock")
    }

    /// The subcommand.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Role::Capture => "capture",
            Role::Serve => "serve",
        }
    }

    /// The name of a file that belongs to the streamer of this role.
    pub fn file_name(self, suffix: &str) -> String {
        format!("streamer-{}{suffix}", self.name())
    }
}

/// The listening socket. Its name is removed from the directory when this is dropped.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    /// Keeps the directory within reach: a path in /proc may be gone before we are.
    _directory: File,
    /// A path by that descriptor.
    path: PathBuf,
}

impl Listener {
    /// Checks that a socket of this name can be used in a directory: before an image is received
    /// that cannot be served.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn check(directory: &Path, name: &str) -> Result<()> {
        free(directory, name).map(drop)
    }

    /// Listens in a directory, on a socket that only its owner can connect to. A socket that a dead
    /// streamer left there is replaced; anything else of that name stays.
    ///
    /// # Errors
    /// The errors of [`Listener::check`], and of binding.
    pub fn bind(directory: &Path, name: &str) -> Result<Self> {
        let (descriptor, path) = free(directory, name)?;
        let others = umask(Mode::all() - Mode::S_IRUSR - Mode::S_IWUSR);
        let socket = UnixListener::bind(&path);
        umask(others);
        let shown = directory.join(name);
        let socket =
            socket.with_context(|| format!("listening on the socket {}", shown.display()))?;
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            _directory: descriptor,
            path,
        })
    }

    /// Refuses all further clients, and keeps the name from being taken by another streamer.
    pub(crate) fn close(&self) {
        // A socket that listens can be shut down.
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Both);
    }

    /// Takes the next peer; `None` when no peer waits.
    ///
    /// # Errors
    /// When `accept` fails, as when no descriptor is left.
    pub fn accept(&self) -> Result<Option<UnixStream>> {
        match self.socket.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error).context("accepting CRIU's connection"),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Nothing can be done about a failure here, and the next streamer replaces a stale socket.
        let _ = fs::remove_file(&self.path);
    }
}

/// A directory, and a path by its descriptor at which nothing stands: a socket without a listener
/// is removed.
fn free(directory: &Path, name: &str) -> Result<(File, PathBuf)> {
    let shown = directory.join(name).display().to_string();
    let directory = File::open(directory)
        .with_context(|| format!("opening the directory {}", directory.display()))?;
    let path = path_in(&directory, name);
    let found = match fs::symlink_metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((directory, path)),
        found => found.with_context(|| format!("looking for {shown}"))?,
    };
    ensure!(
        found.file_type().is_socket(),
        "{shown} is in the way of CRIU's socket and is no socket: move it or choose another directory"
    );
    // A datagram socket cannot connect to a stream socket, and the error differs if a process has
    // that one open. The listener there does not see the attempt.
    let probe = UnixDatagram::unbound().context("creating a socket")?;
    let refused = probe.connect(&path).err();
    match refused.as_ref().and_then(io::Error::raw_os_error) {
        // It has just gone.
        Some(libc::ENOENT) => {}
        Some(libc::ECONNREFUSED) => {
            fs::remove_file(&path).with_context(|| format!("removing the stale socket {shown}"))?
        }
        None | Some(libc::EPROTOTYPE) => bail!(
            "another streamer listens on {shown}: wait for its end or choose another directory"
        ),
        Some(error) => Err(io::Error::from_raw_os_error(error))
            .with_context(|| format!("finding out if {shown} is in use"))?,
    }
    Ok((directory, path))
}
