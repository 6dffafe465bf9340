//! The operating system: every system call on pipes, epoll and memory is wrapped here, once.
//!
//! Interrupted calls are repeated here. "Would block" and "end of file" are values and not errors,
//! since every caller has to tell them apart.

pub(crate) mod descriptor;
pub(crate) mod memory;
pub mod pipe;
pub mod poller;
pub mod process;
