//! Files in memory, to be served in any order.
//!
//! A file is a list of extents of the arena; most files are one extent, which lies in the entry itself: with its name, a small file
//! costs less than 100 bytes beside its contents.

use std::io;

use anyhow::Result;

use super::{Arena, Extent, Store};
use crate::format::ImageName;
use crate::os::pipe::{Moved, ReadEnd};

/// The contents of a file, front to back.
#[derive(Debug, Default)]
pub enum Contents {
    #[default]
    Empty,
    One(Extent),
    Many(Vec<Extent>),
}

impl Contents {
    pub fn push(&mut self, extent: Extent) {
        match self {
            Contents::Empty => *self = Contents::One(extent),
            Contents::Many(extents) => extents.push(extent),
            Contents::One(_) => {
                if let Contents::One(first) = std::mem::take(self) {
                    *self = Contents::Many(vec![first, extent]);
                }
            }
        }
    }

    pub fn extents(&self) -> &[Extent] {
        match self {
            Contents::Empty => &[],
            Contents::One(extent) => std::slice::from_ref(extent),
            Contents::Many(extents) => extents,
        }
    }

    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.extents().iter().map(Extent::len).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The extents, to be sent or released one by one.
    pub fn into_extents(self) -> std::vec::IntoIter<Extent> {
        match self {
            Contents::Empty => Vec::new(),
            Contents::One(extent) => vec![extent],
            Contents::Many(extents) => extents,
        }
        .into_iter()
    }

    /// Gives all of it back to the kernel.
    pub fn release(self, arena: &mut Arena) {
        for extent in self.into_extents() {
            arena.release(extent);
        }
    }
}

/// The complete files.
///
/// While an image is received nobody looks for a file, so they are only listed; when it is complete the list is sorted. A hash
/// table would take twice the memory when it grows.
#[derive(Debug, Default)]
pub struct MemStore {
    files: Vec<(ImageName, Contents)>,
}

impl MemStore {
    pub fn new() -> Self {
        Self::default()
    }

    /// All files, sorted by name. Of several files of one name the last counts.
    pub fn into_files(mut self, arena: &mut Arena) -> Vec<(ImageName, Contents)> {
        // The sort is stable, and keeps the first of equals.
        self.files.reverse();
        self.files.sort_by(|(a, _), (b, _)| a.cmp(b));
        self.files.dedup_by(|(later, contents), (earlier, _)| {
            let same = later == earlier;
            if same {
                std::mem::take(contents).release(arena);
            }
            same
        });
        self.files
    }

    /// A file's bytes in one piece.
    pub fn read(&self, name: &ImageName, arena: &Arena) -> Option<Vec<u8>> {
        let (_, contents) = self.files.iter().rev().find(|(found, _)| found == name)?;
        let slices = contents.extents().iter().map(|extent| arena.bytes(extent));
        Some(slices.flatten().copied().collect())
    }

    /// Adds a file with these bytes.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn write(
        &mut self,
        name: ImageName,
        mut bytes: &[u8],
        arena: &mut Arena,
    ) -> io::Result<()> {
        let mut contents = Contents::default();
        while !bytes.is_empty() {
            let mut block = arena.reserve(bytes.len())?;
            let (front, rest) = bytes.split_at(block.left());
            arena.unfilled(&mut block).copy_from_slice(front);
            arena.filled(&mut block, front.len());
            contents.push(arena.seal(block));
            bytes = rest;
        }
        self.files.push((name, contents));
        Ok(())
    }
}

impl Store for MemStore {
    type File = Contents;

    const BUFFERS: bool = true;

    fn create(&mut self, _name: &ImageName) -> Result<Contents> {
        Ok(Contents::default())
    }

    fn takes_pipe(&self, _file: &Contents) -> bool {
        false
    }

    fn splice(&mut self, _file: &mut Contents, _from: &ReadEnd, _len: usize) -> io::Result<Moved> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn append(&mut self, file: &mut Contents, data: Extent, _arena: &mut Arena) -> io::Result<()> {
        file.push(data);
        Ok(())
    }

    fn finish(&mut self, name: ImageName, file: Contents, _arena: &mut Arena) -> Result<()> {
        self.files.push((name, file));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_file_costs_little_beside_its_contents() {
        assert!(size_of::<(ImageName, Contents)>() <= 40);
    }

    #[test]
    fn the_last_file_of_a_name_counts_and_the_first_one_is_freed() {
        let (mut store, mut arena) = (MemStore::new(), Arena::new());
        let name = ImageName::new("fs.img").unwrap();
        store
            .write(name.clone(), b"first, longer", &mut arena)
            .unwrap();
        store.write(name.clone(), b"second", &mut arena).unwrap();
        assert_eq!(store.read(&name, &arena).unwrap(), b"second");
        assert_eq!(store.into_files(&mut arena).len(), 1);
        assert_eq!(arena.live(), 6);
    }
}
