//! The socket in the images directory: who may connect, and what is left of it afterwards
//! (nothing).
//!
//! An image holds the memory of a process, so the socket has mode 0600 from its first moment: Linux
//! gives a bound socket the mode that its descriptor had. Connecting takes the right to write to
//! the socket's inode (`unix_find_bsd` in the kernel), whatever the directory's mode. Only its
//! owner has it, and root: also root of a user namespace around ours.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{
    self, AddressFamily, Backlog, Shutdown, SockFlag, SockType, UnixAddr, bind, connect,
    getsockopt, shutdown,
};
use nix::sys::stat::{Mode, fchmod};

use super::Connection;

/// The longest path of a socket, in bytes: CRIU copies it, with a NUL behind it, into the 108 bytes
/// of `sun_path` (docs/protocol.md, section 1).
const MAX_PATH: usize = 107;

/// What CRIU wants from the socket: it looks for another name on dump than on restore.
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

    /// The name of a file that belongs to the streamer of this role.
    pub fn file_name(self, suffix: &str) -> String {
        let stem = match self {
            Role::Capture => "streamer-capture",
            Role::Serve => "streamer-serve",
        };
        format!("{stem}{suffix}")
    }
}

/// How CRIU gets to the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketPath {
    /// By the directory's path, as this program was given it.
    Given,
    /// By a path of its own, such as a relative one, or one in /proc under RPC. If that is too
    /// long, CRIU fails before it freezes anything.
    CriusOwn,
}

/// The listening socket. Its name is removed from the directory when this is dropped.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    name: SocketName,
}

impl Listener {
    /// Checks that the socket in `images_dir` can be used: before an image is received that cannot
    /// be served.
    ///
    /// # Errors
    /// When the path is too long for CRIU, and when the name is taken.
    pub fn check(images_dir: &Path, role: Role, path: SocketPath) -> Result<()> {
        SocketName::new(images_dir, role, path)?.remove_stale()
    }

    /// Listens in `images_dir`. A socket that a dead streamer left there is replaced; anything else
    /// of that name stays.
    ///
    /// # Errors
    /// Those of [`Listener::check`], and those of binding.
    pub fn bind(images_dir: &Path, role: Role, path: SocketPath) -> Result<Self> {
        let name = SocketName::new(images_dir, role, path)?;
        name.remove_stale()?;
        let socket = listen(&name.by_descriptor)
            .with_context(|| format!("listening on the socket {}", name.path))?;
        Ok(Self { socket, name })
    }

    /// Refuses all further clients, and keeps the name from being taken by another streamer.
    pub(crate) fn close(&self) {
        // A socket that listens can be shut down.
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Both);
    }

    /// Takes the next peer; `None` when no peer waits.
    ///
    /// # Errors
    /// Those of `accept`, such as having no descriptor left.
    pub fn accept(&self) -> Result<Option<Connection>> {
        let stream = match self.socket.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error).context("accepting CRIU's connection"),
        };
        let peer = getsockopt(&stream, PeerCredentials).context("asking who connected")?;
        let peer = format!("process {} (user {})", peer.pid(), peer.uid());
        Ok(Some(Connection::new(stream.into(), peer)))
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
        let _ = fs::remove_file(&self.name.by_descriptor);
    }
}

/// The socket's name in the images directory.
#[derive(Debug)]
struct SocketName {
    /// Keeps the directory within reach: a path in /proc may be gone before we are.
    _directory: OwnedFd,
    /// A path by that descriptor, short whatever the directory's own path.
    by_descriptor: PathBuf,
    /// The path for people.
    path: String,
}

impl SocketName {
    fn new(images_dir: &Path, role: Role, path: SocketPath) -> Result<Self> {
        let socket = images_dir.join(role.socket_name());
        let length = socket.as_os_str().len();
        ensure!(
            length <= MAX_PATH || path == SocketPath::CriusOwn,
            "--images-dir: the path of CRIU's socket, {}, has {length} bytes, and a UNIX socket takes {MAX_PATH}: use a shorter path",
            socket.display()
        );
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let directory = open(images_dir, flags, Mode::empty())
            .with_context(|| format!("opening the directory {}", images_dir.display()))?;
        let by_descriptor = format!("/proc/self/fd/{}", directory.as_raw_fd());
        Ok(Self {
            _directory: directory,
            by_descriptor: Path::new(&by_descriptor).join(role.socket_name()),
            path: socket.display().to_string(),
        })
    }

    fn address(&self) -> Result<UnixAddr> {
        UnixAddr::new(&self.by_descriptor).with_context(|| format!("naming {}", self.path))
    }

    /// Removes a socket without a listener.
    fn remove_stale(&self) -> Result<()> {
        let path = &self.path;
        match fs::symlink_metadata(&self.by_descriptor) {
            Ok(found) => ensure!(
                found.file_type().is_socket(),
                "{path} is in the way of CRIU's socket and is no socket: move it or choose another --images-dir"
            ),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error).with_context(|| format!("looking at {path}")),
        }
        // A datagram socket cannot connect to a stream socket, and is told so only if a process has
        // that one open: the listener there does not see the attempt.
        match connect(
            new_socket(SockType::Datagram)?.as_raw_fd(),
            &self.address()?,
        ) {
            Err(Errno::ECONNREFUSED) => fs::remove_file(&self.by_descriptor)
                .with_context(|| format!("removing the stale socket {path}")),
            Ok(()) | Err(Errno::EPROTOTYPE) => bail!(
                "another streamer listens on {path}: wait for its end or choose another --images-dir"
            ),
            Err(error) => {
                Err(error).with_context(|| format!("finding out whether {path} is in use"))
            }
        }
    }
}

/// Listens on a socket of ours alone.
///
/// # Errors
/// Those of binding.
pub(crate) fn listen(path: &Path) -> Result<UnixListener> {
    let socket = new_socket(SockType::Stream)?;
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR).context("setting its mode")?;
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?).context("binding it")?;
    socket::listen(&socket, Backlog::new(16).unwrap_or(Backlog::MAXCONN))?;
    Ok(UnixListener::from(socket))
}

fn new_socket(kind: SockType) -> Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket::socket(AddressFamily::Unix, kind, flags, None).context("creating a socket")
}
