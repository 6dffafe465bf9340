//! One connection with CRIU: messages in both directions, and the descriptors that come with them.
//!
//! A descriptor travels with one data byte. A `recvmsg` that has room for a descriptor never reads
//! past the byte that carries one, so received bytes and received descriptors stay in step although
//! several messages are taken at a time. The kernel drops descriptors that do not fit into the
//! control buffer: a peer that sends hundreds costs nothing.
//!
//! Bytes that are received and not understood yet are bounded by the largest message plus one read.

use std::collections::VecDeque;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use prost::Message as _;
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, recvmsg, send,
};

/// The protobuf messages of `proto/criu.proto`.
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/criu.rs"));
}

use super::CommandLine;
use crate::format::ImageName;
use proto::{ImgStreamerReplyEntry, ImgStreamerRequestEntry};

/// A message's length field, in bytes.
const LENGTH: usize = 4;

/// The largest message, in bytes (docs/protocol.md, section 1).
const MAX_MESSAGE: usize = 10 << 10;

/// Bytes taken in one `recvmsg`: many times a request, which names one file.
const READ_SIZE: usize = 1 << 10;

/// Bytes of the control buffer: room for two descriptors, of which the second is one too many.
const CONTROL_SIZE: usize = rustix::cmsg_space!(ScmRights(2));

/// The result of one look at the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Receipt {
    /// Something; there may be more.
    Something,
    /// Nothing now.
    Nothing,
    /// The end of the connection.
    Closed,
}

/// A message of CRIU's.
#[derive(Debug)]
pub enum Message {
    /// It opens the file of this name (unchecked).
    Request(String),
    /// The pipe of the file that it opened before.
    Pipe(ImageName, OwnedFd),
}

/// A peer that was let in.
#[derive(Debug)]
pub struct Connection {
    peer: String,
    pid: i32,
    command_line: CommandLine,
    received: Vec<u8>,
    descriptors: VecDeque<OwnedFd>,
    /// Closed after the descriptors (fields are dropped in order): a peer that sees the end of the
    /// connection knows that nothing of it is kept.
    stream: OwnedFd,
    /// The file whose pipe comes next.
    requested: Option<ImageName>,
    /// A file was opened over it.
    pub(super) has_spoken: bool,
}

impl Connection {
    /// Speaks over `stream` (non-blocking).
    ///
    /// # Errors
    /// When it is no UNIX socket.
    pub fn new(stream: OwnedFd) -> Result<Self> {
        let peer = getsockopt(&stream, PeerCredentials).context("asking who connected")?;
        Ok(Self {
            peer: format!("process {} (user {})", peer.pid(), peer.uid()),
            pid: peer.pid(),
            command_line: CommandLine::of(peer.pid() as u32),
            received: Vec::new(),
            descriptors: VecDeque::new(),
            stream,
            requested: None,
            has_spoken: false,
        })
    }

    /// The peer's name in messages.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// The peer's PID.
    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// The peer's command line when it connected.
    pub(crate) fn command_line(&self) -> &CommandLine {
        &self.command_line
    }

    /// Gives what comes to `answer`, in up to `turn` system calls.
    ///
    /// # Errors
    /// Those of `answer`, and when the peer does not keep to the protocol.
    pub fn hear(
        &mut self,
        turn: usize,
        mut answer: impl FnMut(&mut Self, Message) -> Result<()>,
    ) -> Result<Receipt> {
        for _ in 0..turn {
            let receipt = self.receive()?;
            while let Some(message) = self.next_message()? {
                answer(self, message)?;
            }
            if receipt != Receipt::Something {
                return Ok(receipt);
            }
        }
        Ok(Receipt::Something)
    }

    /// Takes what waits in the socket, as far as one system call does: bytes, and the descriptors
    /// that came with them, close-on-exec.
    ///
    /// # Errors
    /// When `recvmsg` fails, and when the kernel dropped descriptors for which there was no room.
    fn receive(&mut self) -> Result<Receipt> {
        let mut buffer = [0; READ_SIZE];
        let mut slices = [IoSliceMut::new(&mut buffer)];
        let mut space = [MaybeUninit::uninit(); CONTROL_SIZE];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let receive = || recvmsg(&self.stream, &mut slices, &mut control, flags);
        let received = match retry_on_intr(receive) {
            Err(Errno::AGAIN) => return Ok(Receipt::Nothing),
            Err(Errno::CONNRESET) => return Ok(Receipt::Closed),
            received => received.with_context(|| format!("receiving from {}", self.peer))?,
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(arrived) = message {
                self.descriptors.extend(arrived);
            }
        }
        ensure!(
            !received.flags.contains(ReturnFlags::CTRUNC),
            "{} sent descriptors that could not be received: too many at once, or `ulimit -n` leaves none free",
            self.peer
        );
        if received.bytes == 0 {
            return Ok(Receipt::Closed);
        }
        self.received.extend_from_slice(&buffer[..received.bytes]);
        Ok(Receipt::Something)
    }

    /// The next whole message among what was received.
    ///
    /// # Errors
    /// When the peer does not keep to the protocol.
    fn next_message(&mut self) -> Result<Option<Message>> {
        if self.requested.is_some() && self.received.is_empty() {
            return Ok(None);
        }
        if let Some(name) = self.requested.take() {
            self.received.remove(0);
            let fd = self.descriptors.pop_front();
            let fd = fd.with_context(|| {
                format!("{} sent a byte where it had to send a pipe", self.peer)
            })?;
            ensure!(
                self.descriptors.is_empty(),
                "{} sent several descriptors where it had to send one pipe",
                self.peer
            );
            return Ok(Some(Message::Pipe(name, fd)));
        }
        let Some(field) = self.received.first_chunk::<LENGTH>() else {
            return self.nothing_yet();
        };
        let length = u32::from_le_bytes(*field) as usize;
        ensure!(
            length <= MAX_MESSAGE,
            "{} sent a message of {length} bytes, over the limit of {MAX_MESSAGE}: it is no CRIU that streams",
            self.peer
        );
        let Some(body) = self.received.get(LENGTH..LENGTH + length) else {
            return self.nothing_yet();
        };
        let request = ImgStreamerRequestEntry::decode(body).with_context(|| {
            format!("{} sent a message that is no request for a file", self.peer)
        })?;
        self.received.drain(..LENGTH + length);
        Ok(Some(Message::Request(request.filename)))
    }

    /// More bytes have to come first. A descriptor comes together with its byte, and with all that
    /// was sent before: one that is left over now belongs to no request, and would stay open.
    fn nothing_yet(&self) -> Result<Option<Message>> {
        ensure!(
            self.descriptors.is_empty(),
            "{} sent a descriptor where it had to send a request",
            self.peer
        );
        Ok(None)
    }

    /// True if a part of a message was received, or a file's pipe is still to come.
    pub(super) fn is_within_request(&self) -> bool {
        self.requested.is_some() || !self.received.is_empty()
    }

    /// The next thing to come is the pipe of this file.
    pub fn expect_pipe(&mut self, name: ImageName) {
        self.requested = Some(name);
    }

    /// Answers a request on restore: with the file, if it exists. Its pipe comes next.
    ///
    /// # Errors
    /// When the peer is gone, or takes no answers. CRIU waits for each answer before it asks again,
    /// so that the socket always has room for one.
    pub fn reply(&mut self, file: Option<ImageName>) -> Result<()> {
        let exists = file.is_some();
        let message = frame(&ImgStreamerReplyEntry { exists });
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let sent = retry_on_intr(|| send(&self.stream, &message, flags))
            .with_context(|| format!("answering {}", self.peer))?;
        ensure!(
            sent == message.len(),
            "answering {}: it does not read the answers",
            self.peer
        );
        self.requested = file;
        Ok(())
    }
}

impl From<Connection> for OwnedFd {
    fn from(connection: Connection) -> Self {
        connection.stream
    }
}

/// A message behind its length.
pub(super) fn frame(message: &impl prost::Message) -> Vec<u8> {
    let message = message.encode_to_vec();
    [&(message.len() as u32).to_le_bytes()[..], &message].concat()
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
