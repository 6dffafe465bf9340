//! The socket in the images directory: who may connect, and what is left of it afterwards
//! (nothing).
//!
//! An image holds the memory of a process, so the socket has mode 0600 from its first moment (Linux
//! gives a bound socket the mode that its descriptor had) and only root and the streamer's own user
//! are let in, whatever the directory's mode.
//!
//! A socket that is bound and does not listen refuses clients. So it is bound under another name,
//! and gets its own when it listens.
//!
//! **Root of another user namespace.** Where the streamer runs in a user namespace, the kernel
//! shows it every user whom the namespace does not map, the host's root among them, as one and the
//! same. But it has looked at the socket's mode: connecting takes the right to write to the
//! socket's inode (`unix_find_bsd` in the kernel). With mode 0600 only its owner has it, and who
//! has `CAP_DAC_OVERRIDE` in a user namespace that maps the owner: root of ours or of one around
//! it. An unknown user is therefore let in while the mode is 0600.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, RenameFlags, open, renameat2};
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, getsockopt, listen, socket,
};
use nix::sys::stat::{FileStat, Mode, SFlag, fchmod, fstatat};
use nix::unistd::{UnlinkatFlags, linkat, unlinkat};
use rustix::io::retry_on_intr;
use rustix::net::{SocketFlags, accept_with};

use super::Connection;
use crate::os::namespace;
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
pub enum Way {
    /// By the directory's path, as this program was given it.
    SamePath,
    /// By a path of its own, such as a relative one, or one in /proc under RPC. If that is too
    /// long, CRIU fails before it freezes anything.
    OwnPath,
}

/// The listening socket; its name is removed from the directory when this is dropped, unless it is
/// another program's by then.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    directory: Directory,
    /// The socket's name in the directory.
    name: String,
    /// What the name leads to, which another program may bind anew.
    file: Option<Identity>,
}

impl Listener {
    /// Checks that the socket in `images_dir` can be used: before an image is received that cannot
    /// be served.
    ///
    /// # Errors
    /// When the path is too long for CRIU, and when the name is taken.
    pub fn check(images_dir: &Path, role: Role, way: Way) -> Result<()> {
        Directory::open(images_dir, role, way)?.remove_stale(&role.socket_name())
    }

    /// Listens in `images_dir`. A socket that a dead streamer left there is replaced; anything else
    /// of that name stays.
    ///
    /// # Errors
    /// Those of [`Listener::check`], and what binding can lead to.
    pub fn bind(images_dir: &Path, role: Role, way: Way) -> Result<Self> {
        let directory = Directory::open(images_dir, role, way)?;
        let name = role.socket_name();
        directory.remove_stale(&name)?;
        let socket = socket(
            AddressFamily::Unix,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            None,
        )
        .context("creating CRIU's socket")?;
        fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)
            .context("setting the mode of CRIU's socket")?;
        let asides = format!(".{name}.");
        directory.remove_all_stale(&asides);
        let aside = format!("{asides}{}", std::process::id());
        directory.remove_stale(&aside)?;
        bind(socket.as_raw_fd(), &directory.address(&aside)?)
            .with_context(|| format!("binding the socket {}", directory.path_of(&aside)))?;
        let mut listener = Self {
            socket,
            file: directory.stat(&aside).ok().map(|stat| identity(&stat)),
            directory,
            name: aside,
        };
        let backlog = Backlog::new(16).unwrap_or(Backlog::MAXCONN);
        listen(&listener.socket, backlog)
            .with_context(|| format!("listening on {}", listener.path()))?;
        listener.directory.rename(&listener.name, &name)?;
        listener.name = name;
        Ok(listener)
    }

    fn path(&self) -> String {
        self.directory.path_of(&self.name)
    }

    /// What the name leads to, if it still leads to this socket.
    fn stat(&self) -> Option<FileStat> {
        let stat = self.directory.stat(&self.name).ok()?;
        (Some(identity(&stat)) == self.file).then_some(stat)
    }

    /// Whether a user is root of a user namespace around ours.
    fn is_outer_root(&self, uid: u32) -> bool {
        let is_unknown = namespace::is_initial() == Some(false) && uid == namespace::unknown_user();
        is_unknown
            && self.stat().is_some_and(|stat| {
                let for_owner = Mode::S_IRUSR | Mode::S_IWUSR;
                let mode = Mode::from_bits_truncate(stat.st_mode);
                mode == for_owner && stat.st_uid == nix::unistd::geteuid().as_raw()
            })
    }

    /// Takes the next peer that may use the socket, refusing others; `None` when no peer waits.
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
            if peer.uid() == 0 || peer.uid() == own_uid || self.is_outer_root(peer.uid()) {
                return Ok(Some(Connection::new(
                    stream,
                    format!("process {} (user {})", peer.pid(), peer.uid()),
                )));
            }
            report::warn(format_args!(
                "refused a connection from process {} of user {}: only root and user {own_uid} may use {}",
                peer.pid(),
                peer.uid(),
                self.path()
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
        if self.stat().is_some() {
            // Nothing can be done about a failure here, and the next streamer replaces a stale
            // socket.
            let _ = self.directory.remove(&self.name);
        }
    }
}

/// Device and inode.
type Identity = (u64, u64);

fn identity(stat: &FileStat) -> Identity {
    (stat.st_dev, stat.st_ino)
}

/// The images directory, by a descriptor: a path in /proc may be gone before we are.
#[derive(Debug)]
struct Directory {
    fd: OwnedFd,
    path: PathBuf,
}

impl Directory {
    /// Opens the directory, whose socket's path must not be too long for CRIU.
    fn open(path: &Path, role: Role, way: Way) -> Result<Self> {
        let socket = path.join(role.socket_name());
        let length = socket.as_os_str().len();
        ensure!(
            length <= LONGEST_PATH || way == Way::OwnPath,
            "--images-dir: the path of CRIU's socket, {}, has {length} bytes, and a UNIX socket takes {LONGEST_PATH}: use a shorter path",
            socket.display()
        );
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let fd = open(path, flags, Mode::empty())
            .with_context(|| format!("opening the directory {}", path.display()))?;
        Ok(Self {
            fd,
            path: path.to_owned(),
        })
    }

    /// The path of a name in it, for people.
    fn path_of(&self, name: &str) -> String {
        self.path.join(name).display().to_string()
    }

    /// The address of a socket in it: a short one, whatever the directory's path.
    fn address(&self, name: &str) -> Result<UnixAddr> {
        let descriptor = Path::new("/proc/self/fd").join(self.fd.as_raw_fd().to_string());
        let directory = match descriptor.is_dir() {
            true => &descriptor,
            false => &self.path,
        };
        UnixAddr::new(&directory.join(name))
            .with_context(|| format!("naming the socket {}", self.path_of(name)))
    }

    /// What a name leads to, without following a link.
    fn stat(&self, name: &str) -> nix::Result<FileStat> {
        fstatat(&self.fd, name, AtFlags::AT_SYMLINK_NOFOLLOW)
    }

    fn remove(&self, name: &str) -> nix::Result<()> {
        unlinkat(&self.fd, name, UnlinkatFlags::NoRemoveDir)
    }

    /// Gives a socket another name. A stale socket of that name is replaced, and nothing else.
    fn rename(&self, from: &str, to: &str) -> Result<()> {
        let rename = || match renameat2(&self.fd, from, &self.fd, to, RenameFlags::RENAME_NOREPLACE)
        {
            // Some network file systems cannot rename with this promise.
            Err(Errno::EINVAL | Errno::ENOSYS) => {
                linkat(&self.fd, from, &self.fd, to, AtFlags::empty())
                    .and_then(|()| self.remove(from))
            }
            result => result,
        };
        let mut renamed = rename();
        if renamed == Err(Errno::EEXIST) {
            self.remove_stale(to)?;
            renamed = rename();
        }
        renamed.with_context(|| format!("naming the socket {}", self.path_of(to)))
    }

    /// Removes what streamers have left that were killed before their sockets got their names.
    fn remove_all_stale(&self, start: &str) {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let Ok(mut directory) = Dir::openat(&self.fd, ".", flags, Mode::empty()) else {
            return;
        };
        for entry in directory.iter().flatten() {
            if let Ok(name) = entry.file_name().to_str()
                && name.starts_with(start)
            {
                // One that is in use, or is no socket, stays.
                let _ = self.remove_stale(name);
            }
        }
    }

    /// Removes a socket without a listener.
    fn remove_stale(&self, name: &str) -> Result<()> {
        let path = self.path_of(name);
        let stat = match self.stat(name) {
            Ok(stat) => stat,
            Err(Errno::ENOENT) => return Ok(()),
            Err(error) => return Err(error).with_context(|| format!("looking at {path}")),
        };
        if SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) != SFlag::S_IFSOCK {
            bail!(
                "{path} is in the way of CRIU's socket and is no socket: move it or choose another --images-dir"
            );
        }
        // A datagram socket cannot connect to a stream socket, and is told so only if a process has
        // that one open: the listener there does not see the attempt.
        let probe = socket(
            AddressFamily::Unix,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC,
            None,
        )
        .context("creating a socket")?;
        match connect(probe.as_raw_fd(), &self.address(name)?) {
            Err(Errno::ECONNREFUSED) => match self.remove(name) {
                Ok(()) | Err(Errno::ENOENT) => Ok(()),
                Err(error) => {
                    Err(error).with_context(|| format!("removing the stale socket {path}"))
                }
            },
            Err(Errno::ENOENT) => Ok(()),
            Ok(()) | Err(Errno::EPROTOTYPE) => bail!(
                "another streamer listens on {path}: wait for its end or choose another --images-dir"
            ),
            Err(error) => {
                Err(error).with_context(|| format!("finding out whether {path} is in use"))
            }
        }
    }
}
