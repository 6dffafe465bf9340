//! Any bytes and descriptors on CRIU's socket: the requests that come out are those that a dumb
//! reference reads from the same bytes, up to the first error, and no descriptor stays open.
//!
//! ```text
//! input: | role | step | step | …
//! role:  even: capture, odd: serve, which answers; a file exists if the length of its name is even
//! step:  | how many descriptors, 0 to 7 (bits 0 to 2) | length (u8) | bytes |, sent in one message
//! ```

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use criu_image_streamer::fuzzing::{CriuMessages, ImgStreamerRequestEntry};
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::sockopt::PassCred;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, setsockopt, socketpair,
};
use nix::unistd::pipe2;
use prost::Message as _;

/// One message over the socket: bytes, and how many descriptors.
type Step<'a> = (&'a [u8], u8);

fn steps(mut input: &[u8]) -> Vec<Step<'_>> {
    let mut steps = Vec::new();
    while let [descriptors, length, rest @ ..] = input {
        let (bytes, rest) = rest.split_at(rest.len().min(usize::from(*length)));
        steps.push((bytes, descriptors & 7));
        input = rest;
    }
    steps
}

pub fn run(input: &[u8]) {
    let Some((&role, rest)) = input.split_first() else {
        return;
    };
    let serve = role & 1 == 1;
    let steps = steps(rest);
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::Stream, None, flags).unwrap();
    let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
    if serve {
        setsockopt(&theirs, PassCred, &true).unwrap();
    }
    let mut criu = CriuMessages::new(theirs);
    let answers: Option<fn(&str) -> bool> = serve.then_some(exists);

    let (mut sent, mut found, mut heard) = (Vec::new(), Vec::new(), Ok(()));
    for (bytes, descriptors) in steps {
        if heard.is_err() || !send(&ours, bytes, &write, descriptors) {
            break;
        }
        sent.extend_from_slice(bytes);
        heard = criu.hear(answers, &mut found);
    }
    let expected = reference(&sent, serve);
    match heard {
        Ok(()) => assert_eq!(found, expected, "other requests"),
        Err(error) => assert!(
            expected.starts_with(&found),
            "{found:?} where the reference reads {expected:?}, and then {error:#}"
        ),
    }

    drop((criu, ours, write));
    // The pipe ends when its write end is closed everywhere: also in a process that another thread
    // is about to start, which has it until it executes its program.
    let mut end = [PollFd::new(read.as_fd(), PollFlags::POLLIN)];
    let patience = PollTimeout::from(10_000_u16);
    assert_eq!(poll(&mut end, patience), Ok(1), "a descriptor stays open");
}

/// False: the socket is full.
fn send(socket: &OwnedFd, bytes: &[u8], fd: &OwnedFd, descriptors: u8) -> bool {
    if bytes.is_empty() {
        return true;
    }
    let fds = vec![fd.as_raw_fd(); usize::from(descriptors)];
    let rights = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights[..] };
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(bytes)],
        control,
        flags,
        None,
    )
    .is_ok_and(|sent| sent == bytes.len())
}

fn exists(name: &str) -> bool {
    name.len().is_multiple_of(2)
}

/// Reads requests, and one byte behind each that a descriptor belongs to, until something is wrong.
fn reference(mut bytes: &[u8], serve: bool) -> Vec<String> {
    let mut requests = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk() {
        let length = u32::from_le_bytes(*length) as usize;
        let Some(body) = rest.get(..length.min((10 << 10) + 1)) else {
            break;
        };
        let Ok(request) = ImgStreamerRequestEntry::decode(body) else {
            break;
        };
        if length > 10 << 10 {
            break;
        }
        let with_descriptor = !serve || exists(&request.filename);
        requests.push(request.filename);
        let behind = length + usize::from(with_descriptor);
        let Some(rest) = rest.get(behind..) else {
            break;
        };
        bytes = rest;
    }
    requests
}
