//! The calls of a userfaultfd (`ioctl_userfaultfd(2)`), which CRIU has made, and registered memory
//! with.

#![allow(unsafe_code)]

use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

use crate::os::memory::page_size;

/// `struct uffdio_range`.
#[repr(C)]
pub struct Addresses {
    start: u64,
    len: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
pub struct CopyRequest {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

/// `struct uffdio_writeprotect`.
#[repr(C)]
pub struct ProtectRequest {
    start: u64,
    len: u64,
    mode: u64,
}

/// `struct uffdio_zeropage`.
#[repr(C)]
pub struct ZeroRequest {
    start: u64,
    len: u64,
    mode: u64,
    zeroed: i64,
}

mod calls {
    use super::{Addresses, CopyRequest, ProtectRequest, ZeroRequest};

    nix::ioctl_read!(wake, 0xAA, 0x02, Addresses);
    nix::ioctl_readwrite!(copy, 0xAA, 0x03, CopyRequest);
    nix::ioctl_readwrite!(zero_page, 0xAA, 0x04, ZeroRequest);
    nix::ioctl_readwrite!(write_protect, 0xAA, 0x06, ProtectRequest);
}

/// Bytes of `struct uffd_msg`.
const MESSAGE: usize = 32;

/// Messages taken at a time.
const BATCH: usize = 16;

/// What a process does with its memory, and waits with until it is told.
#[derive(Debug)]
pub(super) enum Event {
    /// It needs the page of this address.
    Fault(u64),
    /// It has forked. The child lacks what the process lacks, and this fills it.
    Fork(OwnedFd),
    /// It has moved memory, and unmaps the place where that was next.
    Remap {
        from: u64,
        to: u64,
        len: u64,
    },
    /// It drops pages, which read as zero from now on (`madvise`).
    Remove(Range<u64>),
    Unmap(Range<u64>),
}

/// A descriptor that has just been received.
pub(super) fn owned(descriptor: RawFd) -> OwnedFd {
    // SAFETY: the kernel has made it for the receiver of the message.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}

/// Copies `bytes`, whole pages, to pages that are missing, and wakes the threads that wait for
/// them. Returns how many bytes were copied: maybe not all.
///
/// # Errors
/// `EEXIST`: the first page is there already. `EAGAIN`: an event has to be read first. `ENOENT`: no
/// such memory is registered there. `ESRCH`: the process has ended.
pub(super) fn copy(uffd: BorrowedFd, address: u64, bytes: &[u8]) -> nix::Result<u64> {
    let mut copy = CopyRequest {
        dst: address,
        src: bytes.as_ptr().addr() as u64,
        len: bytes.len() as u64,
        mode: 0,
        copied: 0,
    };
    // SAFETY: the kernel only reads the bytes, and writes to the result's field. The memory that
    // changes is that of another process.
    let result = unsafe { calls::copy(uffd.as_raw_fd(), &raw mut copy) };
    match result {
        Err(Errno::EAGAIN) if copy.copied > 0 => Ok(copy.copied as u64),
        result => result.map(|_| bytes.len() as u64),
    }
}

/// Has a missing page be zero, and wakes the threads that wait for it.
///
/// # Errors
/// Those of [`copy`].
pub(super) fn zero(uffd: BorrowedFd, address: u64, len: u64) -> nix::Result<()> {
    let mut zero = ZeroRequest {
        start: address,
        len,
        mode: 0,
        zeroed: 0,
    };
    // SAFETY: the kernel writes to the result's field; the memory is that of another process.
    unsafe { calls::zero_page(uffd.as_raw_fd(), &raw mut zero) }.map(drop)
}

/// Has the threads that wait for a page look again.
pub(super) fn wake(uffd: BorrowedFd, address: u64, len: u64) {
    let mut addresses = Addresses {
        start: address,
        len,
    };
    // A process that has ended has no threads to wake.
    // SAFETY: the kernel only reads the range.
    let _ = unsafe { calls::wake(uffd.as_raw_fd(), &raw mut addresses) };
}

/// Whether the memory behind a userfaultfd is gone, and nothing can run in it any more; true for
/// any other descriptor.
pub(super) fn is_gone(uffd: BorrowedFd) -> bool {
    let mut protect = ProtectRequest {
        start: 1 << 16,
        len: page_size() as u64,
        mode: 0,
    };
    // A question that changes nothing: CRIU registers no memory for write protection (`ENOENT`).
    // SAFETY: the kernel only reads the request.
    let result = unsafe { calls::write_protect(uffd.as_raw_fd(), &raw mut protect) };
    matches!(result, Err(Errno::ESRCH | Errno::ENOTTY | Errno::EBADF))
}

/// The events that wait, in order; none if there are none.
///
/// # Errors
/// Those of `read`.
pub(super) fn read(uffd: BorrowedFd) -> nix::Result<Vec<Event>> {
    let mut buffer = [0; BATCH * MESSAGE];
    match nix::unistd::read(uffd, &mut buffer) {
        Ok(bytes) => Ok(buffer[..bytes].chunks_exact(MESSAGE).map(event).collect()),
        Err(Errno::EAGAIN | Errno::EINTR) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// An event out of a message: its kind, and three numbers from the ninth byte on.
fn event(message: &[u8]) -> Event {
    let number = |index: usize| {
        let bytes = &message[8 + 8 * index..][..8];
        u64::from_ne_bytes(bytes.try_into().expect("eight bytes"))
    };
    match message[0] {
        0x12 => Event::Fault(number(1)),
        0x13 => {
            let bytes = message[8..12].try_into().expect("four bytes");
            Event::Fork(owned(RawFd::from_ne_bytes(bytes)))
        }
        0x14 => Event::Remap {
            from: number(0),
            to: number(1),
            len: number(2),
        },
        0x15 => Event::Remove(number(0)..number(1)),
        0x16 => Event::Unmap(number(0)..number(1)),
        kind => unreachable!("CRIU asks for no event {kind:#x}"),
    }
}
