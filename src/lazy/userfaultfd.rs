//! The calls of a userfaultfd (`ioctl_userfaultfd(2)`), which CRIU has made and registered memory
//! with. The crate `userfaultfd` would need libclang on each machine that builds this program.

#![allow(unsafe_code)]

use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

use crate::os::memory::page_size;

/// The calls, with the fields of their structures, which are all of 64 bits.
mod calls {
    // `uffdio_range`: start, length.
    nix::ioctl_read!(wake, 0xAA, 0x02, [u64; 2]);
    // `uffdio_copy`: destination, source, length, mode, and the bytes copied or an error.
    nix::ioctl_readwrite!(copy, 0xAA, 0x03, [u64; 5]);
    // `uffdio_zeropage`: start, length, mode, and the bytes zeroed or an error.
    nix::ioctl_readwrite!(zero_page, 0xAA, 0x04, [u64; 4]);
}

/// `UFFDIO_COPY_MODE_WP`.
const WRITE_PROTECTED: u64 = 2;

/// An address that exists in every process.
const ANYWHERE: u64 = 1 << 30;

/// Bytes of `struct uffd_msg`.
const MESSAGE: usize = 32;

/// Messages taken at a time.
const BATCH: usize = 16;

/// An act of a process that then waits for its reader.
#[derive(Debug)]
pub(super) enum Event {
    /// It needs the page of this address.
    Fault(u64),
    /// It has forked. The child lacks what the process lacks, and this fills it.
    Fork(OwnedFd),
    /// It has moved memory. An event that the old place is unmapped comes next.
    Remap {
        from: Range<u64>,
        to: Range<u64>,
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
/// them. Returns how many bytes are there now: maybe not all. A page that was there stays.
///
/// # Errors
/// `EAGAIN`: an event has to be read first. `ENOENT`: they are not registered, or not in one
/// mapping. `ESRCH`: the process has ended.
pub(super) fn copy(uffd: BorrowedFd, address: u64, bytes: &[u8]) -> nix::Result<u64> {
    let (from, len) = (bytes.as_ptr().addr() as u64, bytes.len() as u64);
    let mut request = [address, from, len, 0, 0];
    // SAFETY: the kernel only reads the bytes, and writes to the request. The memory that changes
    // is that of another process.
    match unsafe { calls::copy(uffd.as_raw_fd(), &raw mut request) } {
        Err(Errno::EAGAIN) if request[4].cast_signed() > 0 => Ok(request[4]),
        Err(Errno::EEXIST) => Ok(page_size() as u64),
        // The memory may have been about to change.
        Err(Errno::ENOENT) => check_settled(uffd).and(Err(Errno::ENOENT)),
        result => result.map(|_| len),
    }
}

/// Makes a page zero if it is missing, and wakes the threads that wait for it. Where nothing is
/// registered, they find that out.
///
/// # Errors
/// Those of [`copy`].
pub(super) fn zero(uffd: BorrowedFd, address: u64) -> nix::Result<()> {
    let mut request = [address, page_size() as u64, 0, 0];
    // SAFETY: the kernel writes to the request; the memory is that of another process.
    match unsafe { calls::zero_page(uffd.as_raw_fd(), &raw mut request) } {
        // SAFETY: the kernel only reads the range, which comes first.
        Err(Errno::EEXIST | Errno::ENOENT) => unsafe {
            calls::wake(uffd.as_raw_fd(), request.as_mut_ptr().cast()).map(drop)
        },
        result => result.map(drop),
    }
}

/// Returns true if these addresses lie in one registered mapping. Nothing changes.
///
/// # Errors
/// `EAGAIN`: an event has to be read first. `ESRCH`: the process has ended.
pub(super) fn is_registered(uffd: BorrowedFd, addresses: &Range<u64>) -> nix::Result<bool> {
    let len = addresses.end - addresses.start;
    // The kernel looks for the mapping, and then whether it is registered for write protection: no
    // mapping of CRIU's is (`EINVAL`), so that it copies nothing.
    let mut request = [addresses.start, addresses.start, len, WRITE_PROTECTED, 0];
    // SAFETY: the kernel only writes to the request.
    match unsafe { calls::copy(uffd.as_raw_fd(), &raw mut request) } {
        Err(Errno::EINVAL) => Ok(true),
        Err(Errno::ENOENT) => Ok(false),
        result => Err(result.err().unwrap_or(Errno::EPROTO)),
    }
}

/// Checks that no change is under way.
///
/// # Errors
/// `EAGAIN`: an event has to be read first. `ESRCH`: the process has ended.
pub(super) fn check_settled(uffd: BorrowedFd) -> nix::Result<()> {
    is_registered(uffd, &(ANYWHERE..ANYWHERE + page_size() as u64)).map(drop)
}

/// Returns true if the memory behind a userfaultfd is gone, so that nothing can run in it any more,
/// and for any other descriptor.
pub(super) fn is_gone(uffd: BorrowedFd) -> bool {
    matches!(
        check_settled(uffd),
        Err(Errno::ESRCH | Errno::ENOTTY | Errno::EBADF)
    )
}

/// The waiting events, faults first, and then in the order in which they were queued.
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

/// The event in a message: a kind, and three numbers from the ninth byte on.
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
            from: number(0)..number(0) + number(2),
            to: number(1)..number(1) + number(2),
        },
        0x15 => Event::Remove(number(0)..number(1)),
        0x16 => Event::Unmap(number(0)..number(1)),
        kind => unreachable!("CRIU asks for no event {kind:#x}"),
    }
}

/// Memory of this process, as if it were restored.
#[cfg(test)]
pub(super) mod tests {
    use std::ffi::c_void;
    use std::num::NonZeroUsize;
    use std::ptr::{NonNull, null_mut};

    use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

    use super::*;

    nix::ioctl_readwrite!(api, 0xAA, 0x3F, [u64; 3]);
    nix::ioctl_readwrite!(register, 0xAA, 0x00, [u64; 4]);

    /// Remap, remove and unmap events.
    const FEATURES: u64 = 1 << 2 | 1 << 3 | 1 << 6;

    /// A userfaultfd, where the kernel gives one to its user.
    pub(in crate::lazy) fn new() -> Option<OwnedFd> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | 1;
        // SAFETY: no memory is involved.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let fd = Errno::result(fd).ok().map(|fd| owned(fd as RawFd))?;
        let mut request = [0xAA, FEATURES, 0];
        // SAFETY: the kernel writes to the request.
        unsafe { api(fd.as_raw_fd(), &raw mut request) }.expect("its handshake");
        Some(fd)
    }

    /// Maps a page between two others, so that nothing else of this process comes there when it is
    /// unmapped. It is registered if there is a descriptor.
    pub(in crate::lazy) fn map(uffd: Option<BorrowedFd>) -> u64 {
        let (page, len) = (page_size(), NonZeroUsize::new(3 * page_size()).unwrap());
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: it goes where nothing is.
        let base = unsafe { mmap_anonymous(None, len, protection, MapFlags::MAP_PRIVATE) }.unwrap();
        let address = (base.as_ptr().addr() + page) as u64;
        let mut request = [address, page as u64, 1, 0];
        if let Some(uffd) = uffd {
            // SAFETY: the kernel writes to the request.
            unsafe { register(uffd.as_raw_fd(), &raw mut request) }.expect("registering");
        }
        address
    }

    fn at(address: u64) -> *mut c_void {
        null_mut::<c_void>().with_addr(address as usize)
    }

    pub(in crate::lazy) fn unmap(address: u64) {
        // SAFETY: only these tests know of it.
        unsafe { munmap(NonNull::new(at(address)).unwrap(), page_size()) }.unwrap();
    }

    /// Moves a page to where nothing is registered.
    pub(in crate::lazy) fn remap(from: u64, to: u64) {
        let (len, flags) = (page_size(), libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED);
        // SAFETY: only these tests know of it.
        let moved = unsafe { libc::mremap(at(from), len, len, flags, at(to)) };
        assert_eq!(moved, at(to));
    }

    pub(in crate::lazy) fn byte(address: u64) -> u8 {
        // SAFETY: a page is there, and nothing writes to it.
        unsafe { at(address).cast::<u8>().read_volatile() }
    }
}
