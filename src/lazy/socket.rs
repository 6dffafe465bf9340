//! The socket on which CRIU expects its lazy-pages daemon, and CRIU's messages there.
//!
//! ```text
//! criu restore --lazy-pages                    streamer
//!  | connects to lazy-pages.socket in its working directory, before it forks
//!  | PID (int), one byte + userfaultfd -------->|  from each process that it restores
//!  | -PID (int) ------------------------------->|  from each that is a zombie
//!  | 0x52535446 (int) ------------------------->|  all are restored, and go on now
//! ```

use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::socket::sockopt::{PassCred, PeerCredentials};
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, Shutdown, UnixCredentials, getsockopt, recvmsg, setsockopt,
    shutdown,
};
use rustix::io::ioctl_fionread;

use super::userfaultfd;
use crate::criu::Listener;
use crate::os::descriptor::resolved;

/// The name of the socket in CRIU's working directory.
const NAME: &str = "lazy-pages.socket";

/// CRIU's message when all is restored (`LAZY_PAGES_RESTORE_FINISHED`).
pub(super) const FINISHED: i32 = 0x5253_5446;

/// The longest time between a PID and its descriptor.
const PATIENCE: Duration = Duration::from_secs(10);

/// Listens in the working directory of a CRIU, which waits for an answer of ours before it
/// connects.
pub(super) fn listen(criu: i32) -> Result<Listener> {
    let directory = resolved(format!("/proc/{criu}/cwd").into());
    let listener = Listener::bind(&directory, NAME)?;
    setsockopt(&listener, PassCred, &true)?;
    Ok(listener)
}

/// CRIU's connection.
#[derive(Debug)]
pub(super) struct Connection(pub(super) OwnedFd);

impl Connection {
    /// That of a CRIU which must have connected by now.
    pub(super) fn accept(listener: &Listener) -> Result<Self> {
        let stream = listener.accept()?.context(
            "`criu restore` runs without its own --lazy-pages, and would not get the application's \
             memory: give both the option, or neither",
        )?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self(stream.into()))
    }

    /// Returns true if a message waits.
    pub(super) fn has_more(&self) -> Result<bool> {
        Ok(ioctl_fionread(&self.0)? > 0)
    }

    /// Waits for the next number, and returns it with its sender's PID here; `None` at the end of
    /// the connection.
    pub(super) fn receive(&self) -> Result<Option<(i32, i32)>> {
        let mut number = [0; 4];
        let (bytes, sender, _) = take(&self.0, &mut number, MsgFlags::empty())?;
        if bytes == 0 {
            return Ok(None);
        }
        let sender = sender.context("CRIU's message names no sender")?;
        Ok(Some((i32::from_ne_bytes(number), sender)))
    }

    /// Waits for the descriptor of the process of the last message.
    pub(super) fn receive_userfaultfd(&self) -> Result<OwnedFd> {
        let (_, _, uffd) = take(&self.0, &mut [0], MsgFlags::empty())?;
        uffd.context("CRIU sent no userfaultfd where it had to")
    }
}

/// The PID here of the process that has sent what comes next, which nobody has received yet. A
/// descriptor in it stays open. From now on sending fails. `None` when nothing is left, or only
/// what CRIU says itself.
pub(super) fn unheard(connection: BorrowedFd) -> Option<i32> {
    let criu = getsockopt(&connection, PeerCredentials).ok()?;
    shutdown(connection.as_raw_fd(), Shutdown::Read).ok()?;
    let (bytes, sender, uffd) = take(connection, &mut [0], MsgFlags::MSG_DONTWAIT).ok()?;
    uffd.map(IntoRawFd::into_raw_fd);
    sender.filter(|&sender| bytes > 0 && sender != criu.pid())
}

/// Fills the buffer, or nothing of it at the end. Returns the number of bytes, the sender's PID
/// here, and a descriptor that came along.
fn take(
    connection: impl AsFd,
    buffer: &mut [u8],
    flags: MsgFlags,
) -> Result<(usize, Option<i32>, Option<OwnedFd>)> {
    let wanted = buffer.len();
    let mut parts = [IoSliceMut::new(buffer)];
    let mut control = nix::cmsg_space!(UnixCredentials, [RawFd; 1]);
    let (connection, flags) = (connection.as_fd(), flags | MsgFlags::MSG_CMSG_CLOEXEC);
    let received = loop {
        match recvmsg::<()>(
            connection.as_raw_fd(),
            &mut parts,
            Some(&mut control),
            flags,
        ) {
            Err(Errno::EINTR) => {}
            Err(Errno::ECONNRESET) => return Ok((0, None, None)),
            received => break received.context("receiving what CRIU says")?,
        }
    };
    let (mut sender, mut uffd) = (None, None);
    for message in received.cmsgs()? {
        match message {
            ControlMessageOwned::ScmCredentials(found) => sender = Some(found.pid()),
            ControlMessageOwned::ScmRights(found) => {
                uffd = found.into_iter().map(userfaultfd::owned).next_back();
            }
            _ => {}
        }
    }
    let bytes = received.bytes;
    ensure!(
        bytes == 0 || bytes == wanted,
        "CRIU sent a part of a number on {NAME}"
    );
    Ok((bytes, sender, uffd))
}
