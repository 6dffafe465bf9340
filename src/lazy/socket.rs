//! The socket on which CRIU expects its lazy-pages daemon, and what it says there.
//!
//! ```text
//! criu restore --lazy-pages                    streamer
//!  | connects to lazy-pages.socket in its working directory, before it forks
//!  | PID (int), one byte + userfaultfd -------->|  from each process that it restores
//!  | -PID (int) ------------------------------->|  from each that is a zombie
//!  | 0x52535446 (int) ------------------------->|  all are restored, and go on now
//! ```

use std::fs;
use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open};
use nix::sys::socket::sockopt::PassCred;
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    UnixCredentials, bind, listen, recvmsg, setsockopt, socket,
};
use nix::sys::stat::{Mode, SFlag, fchmod, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};
use rustix::net::{SocketFlags, accept_with};

use super::guardian::process;
use super::userfaultfd;

/// The name that CRIU has for it.
const NAME: &str = "lazy-pages.socket";

/// What CRIU sends when all is restored (`LAZY_PAGES_RESTORE_FINISHED`).
const FINISHED: i32 = 0x5253_5446;

/// What CRIU says.
#[derive(Debug)]
pub(super) enum Message {
    /// A process is being restored.
    Process {
        /// As the image has it.
        pid: i32,
        /// As we see it.
        real_pid: u32,
        process: OwnedFd,
        uffd: OwnedFd,
    },
    Finished,
    /// The connection is at its end.
    Closed,
}

/// The socket, until CRIU has connected.
#[derive(Debug)]
pub(super) struct Socket {
    socket: OwnedFd,
    directory: OwnedFd,
    path: PathBuf,
}

impl Socket {
    /// Listens in the working directory of a CRIU.
    pub(super) fn bind(criu: u32) -> Result<Self> {
        let working_directory = format!("/proc/{criu}/cwd");
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let directory = open(working_directory.as_str(), flags, Mode::empty())
            .with_context(|| format!("opening CRIU's working directory, {working_directory}"))?;
        let path = fs::read_link(&working_directory)
            .unwrap_or_default()
            .join(NAME);
        let shown = path.display();
        match fstatat(&directory, NAME, AtFlags::AT_SYMLINK_NOFOLLOW) {
            // As CRIU's own daemon does it.
            Ok(stat)
                if SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
                    == SFlag::S_IFSOCK =>
            {
                unlinkat(&directory, NAME, UnlinkatFlags::NoRemoveDir)
                    .with_context(|| format!("removing the stale socket {shown}"))?;
            }
            Ok(_) => bail!("{shown} is in the way of CRIU's socket and is no socket: remove it"),
            Err(Errno::ENOENT) => {}
            Err(error) => return Err(error).with_context(|| format!("looking at {shown}")),
        }
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        // Connections have this from their first message on.
        setsockopt(&socket, PassCred, &true)?;
        fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
        let address = format!("/proc/self/fd/{}/{NAME}", directory.as_raw_fd());
        bind(socket.as_raw_fd(), &UnixAddr::new(address.as_str())?)
            .and_then(|()| listen(&socket, Backlog::new(1)?))
            .with_context(|| format!("listening on {shown}"))?;
        Ok(Self {
            socket,
            directory,
            path,
        })
    }

    /// CRIU's connection, if it has connected.
    pub(super) fn accept(&self) -> Result<Option<Connection>> {
        match accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(stream) => Ok(Some(Connection { stream, pid: None })),
            Err(
                rustix::io::Errno::AGAIN | rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED,
            ) => Ok(None),
            Err(error) => {
                Err(error).with_context(|| format!("accepting CRIU on {}", self.path.display()))
            }
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = unlinkat(&self.directory, NAME, UnlinkatFlags::NoRemoveDir);
    }
}

/// What one look at the connection brought.
#[derive(Debug, Default)]
struct Taken {
    /// None at its end.
    bytes: usize,
    /// The process that sent them, as we see it.
    sender: Option<i32>,
    uffd: Option<OwnedFd>,
}

/// CRIU's connection.
#[derive(Debug)]
pub(super) struct Connection {
    stream: OwnedFd,
    /// The process whose descriptor comes next, and its number here.
    pid: Option<(i32, i32)>,
}

impl Connection {
    /// What CRIU says next, if it has said something.
    pub(super) fn receive(&mut self) -> Result<Option<Message>> {
        loop {
            let mut bytes = [0; 4];
            let wanted = if self.pid.is_some() { 1 } else { bytes.len() };
            let Some(taken) = self.take(&mut bytes[..wanted])? else {
                return Ok(None);
            };
            if taken.bytes == 0 {
                return Ok(Some(Message::Closed));
            }
            ensure!(
                taken.bytes == wanted,
                "CRIU sent a part of a number on {NAME}"
            );
            if let Some((pid, real_pid)) = self.pid.take() {
                let uffd = taken
                    .uffd
                    .context("CRIU sent no userfaultfd where it had to")?;
                let process = process(real_pid)
                    .with_context(|| format!("watching process {pid}, which CRIU restores"))?;
                let real_pid = real_pid as u32;
                return Ok(Some(Message::Process {
                    pid,
                    real_pid,
                    process,
                    uffd,
                }));
            }
            match i32::from_ne_bytes(bytes) {
                FINISHED => return Ok(Some(Message::Finished)),
                // A zombie has no memory.
                ..=0 => {}
                pid => {
                    self.pid = Some((pid, taken.sender.context("CRIU's message names no sender")?))
                }
            }
        }
    }

    /// The next bytes, if there are some.
    fn take(&self, buffer: &mut [u8]) -> Result<Option<Taken>> {
        let mut parts = [IoSliceMut::new(buffer)];
        let mut control = nix::cmsg_space!(UnixCredentials, [RawFd; 1]);
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = match recvmsg::<()>(
            self.stream.as_raw_fd(),
            &mut parts,
            Some(&mut control),
            flags,
        ) {
            Ok(message) => message,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(None),
            Err(Errno::ECONNRESET) => return Ok(Some(Taken::default())),
            Err(error) => return Err(error).context("receiving what CRIU says"),
        };
        let mut taken = Taken {
            bytes: message.bytes,
            ..Taken::default()
        };
        for control in message.cmsgs()? {
            match control {
                ControlMessageOwned::ScmCredentials(credentials) => {
                    taken.sender = Some(credentials.pid());
                }
                ControlMessageOwned::ScmRights(descriptors) => {
                    taken.uffd = descriptors.into_iter().map(userfaultfd::owned).next_back();
                }
                _ => {}
            }
        }
        Ok(Some(taken))
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
