//! The names and sizes of an image's files. Their contents go nowhere.
//!
//! Data passes through our pipes and is never copied to memory.

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::Result;

use super::{Ahead, Piece, Store};
use crate::format::ImageName;

/// Counts files, and keeps nothing of them.
#[derive(Default)]
pub struct Listing {
    /// Bytes of each file that is complete.
    sizes: BTreeMap<ImageName, u64>,
}

impl Listing {
    /// The names of the files that are complete.
    pub fn names(&self) -> impl Iterator<Item = &ImageName> {
        self.sizes.keys()
    }

    /// A line for each file, as `du -b` writes them: its bytes, a tab, and its name, in which
    /// control characters are escaped. Sorted by name, as the order in the image is that in which
    /// CRIU happened to write.
    pub fn lines(&self) -> String {
        let mut lines = String::new();
        for (name, size) in &self.sizes {
            writeln!(lines, "{size}\t{name}").expect("memory takes what is written to it");
        }
        lines
    }
}

impl Store for Listing {
    /// Bytes that have come.
    type File = u64;

    const AHEAD: Ahead = Ahead::Shard;

    fn create(&mut self, _name: &ImageName) -> Result<u64> {
        Ok(0)
    }

    fn append(&mut self, file: &mut u64, piece: Piece) -> Result<()> {
        *file += piece.len() as u64;
        Ok(())
    }

    fn finish(&mut self, name: ImageName, file: u64) -> Result<()> {
        self.sizes.insert(name, file);
        Ok(())
    }
}
