//! Where the files of an image go on restore: into memory, to disk, or through to somebody's pipe.
//!
//! A store is given the bytes of one file in order, either as sealed memory of the [`Arena`] or as a pipe to take them from;
//! how they came and in which order is not its business.

mod arena;
pub mod disk;
pub mod external;
pub mod mem;

pub use arena::{Arena, Block, Extent};

use std::io;

use anyhow::Result;

use crate::format::ImageName;
use crate::os::pipe::{Moved, ReadEnd};

/// A place for files.
pub trait Store {
    /// A file that is being received.
    type File;

    /// Whether data may wait in memory without limit for its turn. A store in memory takes it there anyway.
    const BUFFERS: bool;

    /// Starts a file. One of the same name that is complete is replaced when the new one is complete.
    ///
    /// # Errors
    /// When there is no place for it.
    fn create(&mut self, name: &ImageName) -> Result<Self::File>;

    /// Whether the file is best fed by [`Store::splice`].
    fn takes_pipe(&self, file: &Self::File) -> bool;

    /// Moves up to `len` bytes from the pipe to the end of the file. [`Moved::WouldBlock`] means that the pipe is empty.
    ///
    /// # Errors
    /// When the file cannot take them.
    fn splice(&mut self, file: &mut Self::File, from: &ReadEnd, len: usize) -> io::Result<Moved>;

    /// Appends memory to the file.
    ///
    /// # Errors
    /// When the file cannot take it.
    fn append(&mut self, file: &mut Self::File, data: Extent, arena: &mut Arena) -> io::Result<()>;

    /// Completes a file.
    ///
    /// # Errors
    /// When the file did not take everything after all.
    fn finish(&mut self, name: ImageName, file: Self::File, arena: &mut Arena) -> Result<()>;
}
