//! What happens when the heap can grow no more, under `ulimit -v` or without overcommitment: a clear error and exit status 1.
//!
//! Rust's default is to abort, with a message that names nobody and the status of a crash. The image itself lies in the arena, whose
//! mapping can fail as any system call can; but what is known of each of many small files is on the heap. Nothing that could need
//! memory is done here: the names that this leaves (a private directory, or a socket that nobody listens on) are those
//! that a killed streamer leaves, and the next one removes them.

#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};

const MESSAGE: &[u8] =
    b"criu-image-streamer Error: keeping track of the image: out of memory: see `ulimit -v`\n";

/// The system's allocator, for a program that ends when it has nothing left.
pub struct OrExit;

fn check(memory: *mut u8) -> *mut u8 {
    if memory.is_null() {
        // SAFETY: a static buffer with its length; _exit runs no code of ours.
        unsafe {
            libc::write(libc::STDERR_FILENO, MESSAGE.as_ptr().cast(), MESSAGE.len());
            libc::_exit(1);
        }
    }
    memory
}

// SAFETY: each call is passed on to the system's allocator as it is, and its result returned as it is.
unsafe impl GlobalAlloc for OrExit {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps the contract of `alloc`, which is this one's.
        check(unsafe { System.alloc(layout) })
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps the contract of `alloc_zeroed`, which is this one's.
        check(unsafe { System.alloc_zeroed(layout) })
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller keeps the contract of `realloc`, which is this one's.
        check(unsafe { System.realloc(memory, layout, size) })
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`, which is this one's.
        unsafe { System.dealloc(memory, layout) }
    }
}
