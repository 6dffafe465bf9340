//! The names and sizes of an image's files. Their contents go nowhere.
//!
//! Data is spliced to /dev/null and never copied to memory: 0.1 CPU s/GB, in 3.5 MB.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs::File;

use anyhow::{Context, Result};

use super::{Ahead, Piece, Store};
use crate::format::ImageName;

/// Counts files, and keeps nothing of them.
pub struct Listing {
    nowhere: File,
    /// Bytes of each file that is complete.
    sizes: BTreeMap<ImageName, u64>,
}

impl Listing {
    /// # Errors
    /// When there is no /dev/null.
    pub fn new() -> Result<Self> {
        let nowhere = File::options().write(true).open("/dev/null");
        Ok(Self {
            nowhere: nowhere.context("opening /dev/null")?,
            sizes: BTreeMap::new(),
        })
    }

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

    fn target<'a>(&'a self, _file: &'a u64) -> Option<&'a File> {
        Some(&self.nowhere)
    }

    fn written(&mut self, file: &mut u64, bytes: u64) {
        *file += bytes;
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
