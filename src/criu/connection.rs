//! One connection with CRIU: messages in both directions, and the descriptors that come with them.
//!
//! A descriptor travels with one data byte. A `recvmsg` that has room for a descriptor never reads
//! past the byte that carries one, so received bytes and received descriptors stay in step although
//! several messages are taken at a time. The kernel drops descriptors that do not fit into the
//! control buffer: a peer that sends hundreds costs nothing.
//!
//! Bytes that are received and not understood yet are bounded by the largest message plus one read.

use std::io::{IoSliceMut, Write};
use std::mem::{self, MaybeUninit};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, anyhow, ensure};
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use prost::Message as _;
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};

/// The protobuf messages of `proto/criu.proto`.
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/criu.rs"));
}

use super::CommandLine;
use crate::format::ImageName;
use crate::os::pipe::Moved;
use proto::{ImgStreamerReplyEntry, ImgStreamerRequestEntry};

/// A message's length field, in bytes.
const LENGTH: usize = 4;

/// The largest message, in bytes (docs/protocol.md, section 1).
const MAX_MESSAGE: usize = 10 << 10;

/// Bytes taken in one `recvmsg`: many times a request, which names one file.
const READ_SIZE: usize = 1 << 10;

/// Bytes of the control buffer: room for two descriptors, of which the second is one too many.
const CONTROL_SIZE: usize = rustix::cmsg_space!(ScmRights(2));

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
    /// The peer's name in messages.
    pub(crate) peer: String,
    pub(crate) pid: i32,
    /// The one that it had when it connected.
    pub(crate) command_line: CommandLine,
    received: Vec<u8>,
    descriptors: Vec<OwnedFd>,
    /// Closed after the descriptors (fields are dropped in order): a peer that sees the end of the
    /// connection knows that nothing of it is kept.
    pub(super) stream: UnixStream,
    /// The file whose pipe comes next.
    requested: Option<ImageName>,
    /// A file was opened over it.
    pub(super) has_spoken: bool,
}

impl Connection {
    /// # Errors
    /// When nothing is known of the peer.
    pub fn new(stream: UnixStream) -> Result<Self> {
        stream.set_nonblocking(true)?;
        let peer = getsockopt(&stream, PeerCredentials).context("asking who connected")?;
        Ok(Self {
            peer: format!("process {} (user {})", peer.pid(), peer.uid()),
            pid: peer.pid(),
            command_line: CommandLine::of(peer.pid() as u32),
            received: Vec::new(),
            descriptors: Vec::new(),
            stream,
            requested: None,
            has_spoken: false,
        })
    }

    /// Gives what comes to `answer`, in up to `turn` system calls, and returns true at the end of
    /// the connection.
    ///
    /// # Errors
    /// Those of `answer`, and when the peer does not keep to the protocol.
    pub fn hear(
        &mut self,
        turn: usize,
        mut answer: impl FnMut(&mut Self, Message) -> Result<()>,
    ) -> Result<bool> {
        for _ in 0..turn {
            let received = self.receive().with_context(|| self.peer.clone())?;
            while let Some(message) = self.next_message().with_context(|| self.peer.clone())? {
                answer(self, message)?;
            }
            match received {
                Moved::Bytes(_) => {}
                received => return Ok(received == Moved::End),
            }
        }
        Ok(false)
    }

    /// Takes what waits in the socket, as far as one system call does: bytes, and the descriptors
    /// that came with them, close-on-exec.
    ///
    /// # Errors
    /// When `recvmsg` fails, and when the kernel dropped descriptors for which there was no room.
    fn receive(&mut self) -> Result<Moved> {
        let mut buffer = [0; READ_SIZE];
        let mut slices = [IoSliceMut::new(&mut buffer)];
        let mut space = [MaybeUninit::uninit(); CONTROL_SIZE];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let receive = || recvmsg(&self.stream, &mut slices, &mut control, flags);
        let received = match retry_on_intr(receive) {
            Err(Errno::AGAIN) => return Ok(Moved::WouldBlock),
            Err(Errno::CONNRESET) => return Ok(Moved::End),
            received => received.context("receiving")?,
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(arrived) = message {
                self.descriptors.extend(arrived);
            }
        }
        ensure!(
            !received.flags.contains(ReturnFlags::CTRUNC),
            "it sent descriptors that could not be received: too many at once, or `ulimit -n` leaves none free"
        );
        if received.bytes == 0 {
            return Ok(Moved::End);
        }
        self.received.extend_from_slice(&buffer[..received.bytes]);
        Ok(Moved::Bytes(received.bytes))
    }

    /// The next whole message among what was received.
    ///
    /// # Errors
    /// When the peer does not keep to the protocol.
    fn next_message(&mut self) -> Result<Option<Message>> {
        if !self.received.is_empty()
            && let Some(name) = self.requested.take()
        {
            self.received.remove(0);
            let sent = mem::take(&mut self.descriptors);
            let [pipe] = sent.try_into().map_err(|sent: Vec<_>| {
                let count = sent.len();
                anyhow!("it sent {count} descriptors where it had to send one pipe")
            })?;
            return Ok(Some(Message::Pipe(name, pipe)));
        }
        let length = self.received.first_chunk::<LENGTH>();
        let length = length.map_or(0, |length| u32::from_le_bytes(*length) as usize);
        ensure!(
            length <= MAX_MESSAGE,
            "it sent a message of {length} bytes, over the limit of {MAX_MESSAGE}: it is no CRIU that streams"
        );
        let Some(body) = self.received.get(LENGTH..LENGTH + length) else {
            // A descriptor comes together with its byte, and with all that was sent before: one
            // that is left over now belongs to no request, and would stay open.
            ensure!(
                self.descriptors.is_empty(),
                "it sent a descriptor where it had to send a request"
            );
            return Ok(None);
        };
        let request = ImgStreamerRequestEntry::decode(body)
            .context("it sent a message that is no request for a file")?;
        self.received.drain(..LENGTH + length);
        Ok(Some(Message::Request(request.filename)))
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
        let sent = self.stream.write_all(&message);
        sent.with_context(|| format!("answering {}", self.peer))?;
        self.requested = file;
        Ok(())
    }
}

/// A message behind its length.
pub(super) fn frame(message: &impl prost::Message) -> Vec<u8> {
    let message = message.encode_to_vec();
    [&(message.len() as u32).to_le_bytes()[..], &message].concat()
}
