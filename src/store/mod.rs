//! Where the files of an image go on restore: into memory, to disk, or to the reader of an external
//! file; or nowhere, to be listed.
//!
//! A store says where the next bytes of a file go, and the receiver puts them there. How they came
//! and in which order is not the store's business.

mod arena;
pub mod catalog;
pub mod disk;
pub mod external;
pub(crate) mod held_pipe;
pub mod listing;
mod piece;
pub(crate) mod transfer;

use std::fs::File;

use anyhow::Result;

pub use arena::{Arena, Block, Extent};
pub use piece::{FileData, Piece};

use crate::format::ImageName;

/// Where the next bytes of a file go.
#[derive(Debug, Clone, Copy)]
pub enum Target<'a> {
    /// Into memory or a pipe of ours, and from there to [`Store::append`].
    Piece,
    /// To the end of this file, and then to [`Store::written`], which is as good as appended.
    File(&'a File),
}

/// Where data waits whose turn has not come.
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

    /// Where data waits while `current` is the file whose turn it is.
    fn ahead(&self, current: Option<&Self::File>) -> Ahead;

    /// Starts a file. One of the same name that is complete is replaced when the new one is
    /// complete.
    ///
    /// # Errors
    /// When there is no place for it.
    fn create(&mut self, name: &ImageName) -> Result<Self::File>;

    fn target<'a>(&'a self, file: &'a Self::File) -> Target<'a>;

    /// This number of bytes went to [`Target::File`].
    fn written(&mut self, _file: &mut Self::File, _bytes: u64) {}

    /// Appends a piece to the file.
    ///
    /// # Errors
    /// When the file cannot take it.
    fn append(&mut self, file: &mut Self::File, data: Piece) -> Result<()>;

    /// Completes a file.
    ///
    /// # Errors
    /// When the file did not take everything after all.
    fn finish(&mut self, name: ImageName, file: Self::File) -> Result<()>;
}
