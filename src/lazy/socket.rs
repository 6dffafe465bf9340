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

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::{PassCred, ReceiveTimeout};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    UnixCredentials, bind, listen, recvmsg, setsockopt, socket,
};
use nix::sys::stat::{Mode, fchmod};
use nix::sys::time::{TimeVal, TimeValLike};
use nix::unistd::{UnlinkatFlags, unlinkat};
use rustix::net::{SocketFlags, accept_with};

use super::userfaultfd;
use crate::os::pipe::uninterrupted;

/// The name that CRIU has for it.
const NAME: &str = "lazy-pages.socket";

/// What CRIU sends when all is restored (`LAZY_PAGES_RESTORE_FINISHED`).
const FINISHED: i32 = 0x5253_5446;

/// How long a descriptor may take that belongs to a PID that has come.
const PATIENCE_S: i64 = 10;

/// What CRIU says.
#[derive(Debug)]
pub(super) enum Message {
    /// A process is being restored: its numbers in the image, and as we see it.
    Process {
        pid: i32,
        real_pid: i32,
        uffd: OwnedFd,
    },
    Finished,
    Zombie,
    /// The connection is at its end.
    Closed,
}

/// The socket, until CRIU has connected.
#[derive(Debug)]
pub(super) struct Socket {
    socket: OwnedFd,
    directory: OwnedFd,
}

impl Socket {
    /// Listens in the working directory of a CRIU, in the place of a socket that is there, as
    /// CRIU's own daemon does.
    pub(super) fn bind(criu: i32) -> Result<Self> {
        let directory = PathBuf::from(format!("/proc/{criu}/cwd"));
        let path = fs::read_link(&directory).unwrap_or_else(|_| directory.clone());
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let bound = open(&directory, flags, Mode::empty()).and_then(|directory| {
            // There is none, or `bind` says what is in the way.
            let _ = unlinkat(&directory, NAME, UnlinkatFlags::NoRemoveDir);
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
            // Connections have this from their first message on.
            setsockopt(&socket, PassCred, &true)?;
            fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
            let address = format!("/proc/self/fd/{}/{NAME}", directory.as_raw_fd());
            bind(socket.as_raw_fd(), &UnixAddr::new(address.as_str())?)?;
            listen(&socket, Backlog::new(1)?)?;
            Ok(Self { socket, directory })
        });
        bound.with_context(|| format!("listening on {}/{NAME}", path.display()))
    }

    /// CRIU's connection.
    pub(super) fn accept(&self) -> Result<Connection> {
        let stream = accept_with(&self.socket, SocketFlags::CLOEXEC).context(
            "`criu restore` runs without its own --lazy-pages, and would not get the application's \
             memory: give both the option, or neither",
        )?;
        setsockopt(&stream, ReceiveTimeout, &TimeVal::seconds(PATIENCE_S))?;
        Ok(Connection(stream))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = unlinkat(&self.directory, NAME, UnlinkatFlags::NoRemoveDir);
    }
}

/// CRIU's connection.
#[derive(Debug)]
pub(super) struct Connection(OwnedFd);

impl Connection {
    /// Whether CRIU has said something that was not heard yet.
    pub(super) fn has_more(&self) -> Result<bool> {
        let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        Ok(uninterrupted(|| poll(&mut fds, PollTimeout::ZERO))? > 0)
    }

    /// What CRIU says next, for which this waits.
    pub(super) fn receive(&self) -> Result<Message> {
        let mut number = [0; 4];
        let Some((sender, _)) = self.take(&mut number)? else {
            return Ok(Message::Closed);
        };
        match i32::from_ne_bytes(number) {
            FINISHED => Ok(Message::Finished),
            ..=0 => Ok(Message::Zombie),
            pid => {
                let taken = self.take(&mut [0])?;
                let uffd = taken.and_then(|(_, uffd)| uffd);
                Ok(Message::Process {
                    pid,
                    real_pid: sender.context("CRIU's message names no sender")?,
                    uffd: uffd.context("CRIU sent no userfaultfd where it had to")?,
                })
            }
        }
    }

    /// Fills the buffer with what comes, and returns the sender's PID as we see it, and a
    /// descriptor that came along; `None` at the end.
    fn take(&self, buffer: &mut [u8]) -> Result<Option<(Option<i32>, Option<OwnedFd>)>> {
        let wanted = buffer.len();
        let mut parts = [IoSliceMut::new(buffer)];
        let mut control = nix::cmsg_space!(UnixCredentials, [RawFd; 1]);
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let stream = self.0.as_raw_fd();
        let received =
            uninterrupted(
                || match recvmsg::<()>(stream, &mut parts, Some(&mut control), flags) {
                    Err(Errno::ECONNRESET) => Ok(None),
                    received => {
                        let received = received?;
                        let (mut sender, mut uffd) = (None, None);
                        for message in received.cmsgs()? {
                            match message {
                                ControlMessageOwned::ScmCredentials(found) => {
                                    sender = Some(found.pid())
                                }
                                ControlMessageOwned::ScmRights(found) => {
                                    uffd = found.into_iter().map(userfaultfd::owned).next_back();
                                }
                                _ => {}
                            }
                        }
                        Ok(Some((received.bytes, sender, uffd)))
                    }
                },
            )
            .context("receiving what CRIU says")?;
        let Some((bytes @ 1.., sender, uffd)) = received else {
            return Ok(None);
        };
        ensure!(bytes == wanted, "CRIU sent a part of a number on {NAME}");
        Ok(Some((sender, uffd)))
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
