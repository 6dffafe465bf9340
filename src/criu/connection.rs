//! One connection with CRIU: messages in both directions, and the descriptors that come with them.
//!
//! A descriptor travels with one data byte. A `recvmsg` that has room for a descriptor never reads past the byte that
//! carries one, so received bytes and received descriptors stay in step although several messages are taken at a time. The
//! kernel drops descriptors that do not fit into the control buffer: a peer that sends hundreds costs nothing.
//!
//! What is received and not understood yet is bounded by the largest message plus one read.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, send};
use nix::unistd::Pid;
use prost::Message as _;

use crate::criu_proto::{ImgStreamerReplyEntry, ImgStreamerRequestEntry};
use crate::pipe::uninterrupted;

/// A message's length field, in bytes.
const LENGTH: usize = 4;

/// The largest message, in bytes (PROTOCOL.md, section 1).
const LARGEST_MESSAGE: usize = 10 << 10;

/// Bytes taken in one `recvmsg`: many times a request, which names one file.
const READ: usize = 1 << 10;

/// Bytes of the control buffer: room for the sender's credentials (32 bytes) and for two descriptors (24), of which a second is
/// one too many. Where no credentials come it is room for ten.
const CONTROL: usize = 32 + 24;

/// What one look at the socket brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Receipt {
    /// Something; there may be more.
    Something,
    /// Nothing now.
    Nothing,
    /// The end of the connection.
    Closed,
}

/// What CRIU said.
#[derive(Debug)]
pub enum Message {
    /// It opens the file of this name (which nobody has checked).
    Request(String),
    /// The descriptor that belongs to the request before.
    Descriptor(OwnedFd),
}

/// A peer that was let in.
#[derive(Debug)]
pub struct Connection {
    peer: String,
    received: Vec<u8>,
    descriptors: VecDeque<OwnedFd>,
    /// Closed after the descriptors (fields are dropped in order): a peer that sees the end of the connection knows that
    /// nothing of it is kept.
    stream: OwnedFd,
    expects_descriptor: bool,
    asker: Option<Pid>,
}

impl Connection {
    /// Speaks over `stream` (non-blocking) with a peer that error messages call `peer`.
    pub fn new(stream: OwnedFd, peer: String) -> Self {
        Self {
            peer,
            received: Vec::new(),
            descriptors: VecDeque::new(),
            stream,
            expects_descriptor: false,
            asker: None,
        }
    }

    /// Who is on the other side, in words.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// The process that sent what was received last, which need not be the one that connected; `None` where it is out of sight, in
    /// another PID namespace.
    pub fn asker(&self) -> Option<Pid> {
        self.asker
    }

    /// Takes what waits in the socket, as far as one system call does.
    ///
    /// # Errors
    /// Those of `recvmsg`, and when descriptors were lost.
    pub fn receive(&mut self) -> Result<Receipt> {
        let mut buffer = [0; READ];
        let received = match receive(self.stream.as_fd(), &mut buffer, &mut self.descriptors) {
            Ok(received) => received,
            Err(Errno::EAGAIN) => return Ok(Receipt::Nothing),
            Err(Errno::ECONNRESET) => return Ok(Receipt::Closed),
            Err(error) => {
                return Err(error).with_context(|| format!("receiving from {}", self.peer));
            }
        };
        ensure!(
            !received.truncated,
            "{} sent descriptors that could not be received: too many at once, or `ulimit -n` leaves none free",
            self.peer
        );
        if received.bytes == 0 {
            return Ok(Receipt::Closed);
        }
        self.received.extend_from_slice(&buffer[..received.bytes]);
        self.asker = received.sender;
        Ok(Receipt::Something)
    }

    /// The next whole message among what was received.
    ///
    /// # Errors
    /// When the peer does not keep to the protocol.
    pub fn next_message(&mut self) -> Result<Option<Message>> {
        if self.expects_descriptor {
            if self.received.is_empty() {
                return Ok(None);
            }
            self.received.remove(0);
            self.expects_descriptor = false;
            let fd = self.descriptors.pop_front();
            let fd = fd.with_context(|| {
                format!("{} sent a byte where it had to send a pipe", self.peer)
            })?;
            ensure!(
                self.descriptors.is_empty(),
                "{} sent several descriptors where it had to send one pipe",
                self.peer
            );
            return Ok(Some(Message::Descriptor(fd)));
        }
        let Some(field) = self.received.first_chunk::<LENGTH>() else {
            return self.nothing_yet();
        };
        let length = u32::from_le_bytes(*field) as usize;
        ensure!(
            length <= LARGEST_MESSAGE,
            "{} sent a message of {length} bytes, over the limit of {LARGEST_MESSAGE}: it is no CRIU that streams",
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

    /// More bytes have to come first. A descriptor comes together with its byte, and with all that was sent before: one
    /// that is left over now belongs to no request, and would stay open.
    fn nothing_yet(&self) -> Result<Option<Message>> {
        ensure!(
            self.descriptors.is_empty(),
            "{} sent a descriptor where it had to send a request",
            self.peer
        );
        Ok(None)
    }

    /// Whether a part of a message was received, or a reply's descriptor is still to come.
    pub fn is_within_message(&self) -> bool {
        self.expects_descriptor || !self.received.is_empty()
    }

    /// The next thing to come is a descriptor.
    pub fn expect_descriptor(&mut self) {
        self.expects_descriptor = true;
    }

    /// Answers a request on restore. If the file exists, the pipe for it comes next.
    ///
    /// # Errors
    /// When the peer is gone, or takes no answers. CRIU waits for each answer before it asks again, so that the socket always
    /// has room for one.
    pub fn reply(&mut self, exists: bool) -> Result<()> {
        let mut message = vec![0; LENGTH];
        ImgStreamerReplyEntry { exists }
            .encode(&mut message)
            .expect("a Vec takes whatever is written to it");
        let length = (message.len() - LENGTH) as u32;
        message[..LENGTH].copy_from_slice(&length.to_le_bytes());
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let sent = uninterrupted(|| send(self.stream.as_raw_fd(), &message, flags))
            .with_context(|| format!("answering {}", self.peer))?;
        ensure!(
            sent == message.len(),
            "answering {}: it does not read the answers",
            self.peer
        );
        self.expects_descriptor = exists;
        Ok(())
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// What one `recvmsg` took.
struct Received {
    bytes: usize,
    /// Descriptors were dropped by the kernel.
    truncated: bool,
    sender: Option<Pid>,
}

/// Receives bytes, and the descriptors that came with them, close-on-exec.
///
/// nix's wrapper does not serve here: after a truncation it refuses to list the descriptors that did arrive, so that they
/// would stay open for ever.
#[allow(unsafe_code)]
fn receive(
    stream: BorrowedFd,
    buffer: &mut [u8],
    descriptors: &mut VecDeque<OwnedFd>,
) -> nix::Result<Received> {
    // u64s, because the control buffer must be aligned like a cmsghdr.
    let mut control = [0u64; CONTROL / size_of::<u64>()];
    let mut slice = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: a msghdr is plain data, for which all zeroes is a valid value.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &mut slice;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = CONTROL;
    let flags = libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT;
    let bytes = uninterrupted(|| {
        // SAFETY: the header points to `slice` and `control`, which outlive the call and are exclusively ours, with their sizes.
        Errno::result(unsafe { libc::recvmsg(stream.as_raw_fd(), &mut header, flags) })
    })?;
    let mut sender = None;
    // SAFETY: the kernel filled in the header and the control buffer, which the CMSG macros walk within msg_controllen. The data
    // of an SCM_RIGHTS message are whole ints, maybe unaligned; each is a descriptor made for us by this call, wrapped once. The data
    // of an SCM_CREDENTIALS message is one ucred.
    unsafe {
        let mut message = libc::CMSG_FIRSTHDR(&header);
        while let Some(found) = message.as_ref() {
            let kind = (found.cmsg_level, found.cmsg_type);
            if kind == (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) {
                let data = libc::CMSG_DATA(message).cast::<libc::ucred>();
                sender = Some(data.read_unaligned().pid).filter(|&pid| pid > 0);
            }
            if kind == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
                let data = libc::CMSG_DATA(message).cast::<RawFd>();
                let count = (found.cmsg_len - libc::CMSG_LEN(0) as usize) / size_of::<RawFd>();
                for index in 0..count {
                    descriptors.push_back(OwnedFd::from_raw_fd(data.add(index).read_unaligned()));
                }
            }
            message = libc::CMSG_NXTHDR(&header, message);
        }
    }
    Ok(Received {
        bytes: bytes as usize,
        truncated: header.msg_flags & libc::MSG_CTRUNC != 0,
        sender: sender.map(Pid::from_raw),
    })
}
