//! The socket in the images directory: who may connect, and what is left of it afterwards
//! (nothing).
//!
//! An image holds the memory of a process, so the socket has mode 0600 from its first moment (Linux
//! gives a bound socket the mode that its descriptor had) and only root and the streamer's own user
//! are let in, whatever the directory's mode.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, getsockopt, listen, socket,
};
use nix::sys::stat::{Mode, fchmod};
use rustix::io::retry_on_intr;
use rustix::net::{SocketFlags, accept_with};

use super::Connection;
use crate::report;

/// CRIU copies the socket's path, with a NUL behind it, into the 108 bytes of `sun_path`
/// (docs/protocol.md, section 1).
const LONGEST_PATH: usize = 107;

/// What CRIU wants from the socket: it looks for another name on dump than on restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Capture,
    Serve,
}

impl Role {
    /// The name of the socket in the images directory.
    pub fn socket_name(self) -> &'static str {
        match self {
            Role::Capture => "streamer-capture.sock",
            Role::Serve => "streamer-serve.sock",
        }
    }
}

/// The listening socket; its name is removed from the directory when this is dropped, unless it is
/// somebody else's by then.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    path: PathBuf,
    /// Device and inode of the path, which somebody else may bind anew.
    file: Option<(u64, u64)>,
}

impl Listener {
    /// The path of the socket in `images_dir`, if it can be used: checked before an image is
    /// received that cannot be served.
    ///
    /// # Errors
    /// When the path is too long for CRIU, and when the name is taken.
    pub fn check(images_dir: &Path, role: Role) -> Result<PathBuf> {
        let path = images_dir.join(role.socket_name());
        let length = path.as_os_str().len();
        ensure!(
            length <= LONGEST_PATH,
            "--images-dir: the path of CRIU's socket, {}, has {length} bytes, and a UNIX socket takes {LONGEST_PATH}: use a shorter path",
            path.display()
        );
        remove_stale(&path)?;
        Ok(path)
    }

    /// Listens in `images_dir`. A socket that a dead streamer left there is replaced; anything else
    /// of that name stays.
    ///
    /// # Errors
    /// Those of [`Listener::check`], and what binding can lead to.
    pub fn bind(images_dir: &Path, role: Role) -> Result<Self> {
        let path = Self::check(images_dir, role)?;
        let socket = socket(
            AddressFamily::Unix,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            None,
        )
        .context("creating CRIU's socket")?;
        fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)
            .context("setting the mode of CRIU's socket")?;
        let address = UnixAddr::new(&path)
            .with_context(|| format!("naming the socket {}", path.display()))?;
        bind(socket.as_raw_fd(), &address)
            .with_context(|| format!("binding the socket {}", path.display()))?;
        let file = identity(&path);
        let listener = Self { socket, path, file };
        let backlog = Backlog::new(16).unwrap_or(Backlog::MAXCONN);
        listen(&listener.socket, backlog)
            .with_context(|| format!("listening on {}", listener.path.display()))?;
        Ok(listener)
    }

    /// Takes the next peer that may use the socket, refusing others; `None` when nobody waits.
    ///
    /// # Errors
    /// Those of `accept`, such as having no descriptor left.
    pub fn accept(&self) -> Result<Option<Connection>> {
        loop {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let stream = match retry_on_intr(|| accept_with(&self.socket, flags)) {
                Ok(stream) => stream,
                Err(rustix::io::Errno::AGAIN) => return Ok(None),
                Err(rustix::io::Errno::CONNABORTED) => continue,
                Err(error) => return Err(error).context("accepting CRIU's connection"),
            };
            let peer = getsockopt(&stream, PeerCredentials).context("asking who connected")?;
            let own_uid = nix::unistd::geteuid().as_raw();
            if peer.uid() == 0 || peer.uid() == own_uid {
                return Ok(Some(Connection::new(
                    stream,
                    format!("process {} (user {})", peer.pid(), peer.uid()),
                )));
            }
            report::warn(format_args!(
                "refused a connection from process {} of user {}: only root and user {own_uid} may use {}",
                peer.pid(),
                peer.uid(),
                self.path.display()
            ));
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
        if self.file.is_some() && identity(&self.path) == self.file {
            // Nothing can be done about a failure here, and whoever binds next replaces a stale
            // socket.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// What a path leads to, without following a link.
fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = path.symlink_metadata().ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// Removes a socket that nobody listens on.
fn remove_stale(path: &Path) -> Result<()> {
    let metadata = match path.symlink_metadata() {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("looking at {}", path.display())),
    };
    if !metadata.file_type().is_socket() {
        bail!(
            "{} is in the way of CRIU's socket and is no socket: move it or choose another --images-dir",
            path.display()
        );
    }
    // A datagram socket cannot connect to a stream socket, and is told so only if somebody has that
    // one open: whoever listens there does not see the attempt.
    let probe = socket(
        AddressFamily::Unix,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .context("creating a socket")?;
    let address =
        UnixAddr::new(path).with_context(|| format!("naming the socket {}", path.display()))?;
    match connect(probe.as_raw_fd(), &address) {
        Err(Errno::ECONNREFUSED) => std::fs::remove_file(path)
            .with_context(|| format!("removing the stale socket {}", path.display())),
        Ok(()) | Err(Errno::EPROTOTYPE) => bail!(
            "another streamer listens on {}: wait for its end or choose another --images-dir",
            path.display()
        ),
        Err(error) => {
            Err(error).with_context(|| format!("finding out whether {} is in use", path.display()))
        }
    }
}
