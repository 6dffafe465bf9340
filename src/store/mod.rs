//! Where the files of an image go on restore: into memory, to disk, or to the reader of an external
//! file; or nowhere, to be listed.
//!
//! A store is given the files of an image, piece by piece, each file in its order. How the pieces
//! came is not its business.

mod arena;
pub mod catalog;
pub mod disk;
pub mod external;
pub(crate) mod held_pipe;
pub mod listing;
mod piece;
pub(crate) mod transfer;

use anyhow::Result;

pub use arena::{Arena, Block, Extent};
pub use piece::{FileData, Piece};

use crate::format::ImageName;

/// The place in which early data waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ahead {
    /// As a piece, which it becomes anyway.
    Piece,
    /// In its shard, for as long as the image makes progress without it.
    Shard,
}

/// A place for files.
pub trait Store {
    /// A file that is being received.
    type File;

    /// The place in which early data waits.
    const AHEAD: Ahead;

    /// Starts a file. One of the same name that is complete is replaced.
    ///
    /// # Errors
    /// When there is no place for it.
    fn create(&mut self, name: &ImageName) -> Result<Self::File>;

    /// Appends a piece to the file.
    ///
    /// # Errors
    /// When the file cannot take it.
    fn append(&mut self, file: &mut Self::File, piece: Piece) -> Result<()>;

    /// Completes a file.
    ///
    /// # Errors
    /// When the file did not take everything after all.
    fn finish(&mut self, name: ImageName, file: Self::File) -> Result<()>;
}
