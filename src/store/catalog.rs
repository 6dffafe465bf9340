//! The files of an image in memory, and what has become of each: served once or kept.
//!
//! Some CRIUs read a small file twice. Files of up to [`LARGEST_KEPT`] are therefore kept when
//! sent, as long as they come to no more than [`MOST_KEPT`] together. CRIU's files other than
//! memory pages weigh far less: some hundred bytes to a few KiB for each task, mapping list and
//! descriptor table; a pagemap takes about 20 bytes for each stretch of memory. What was sent and
//! not kept is gone.

use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;

use anyhow::Result;

use super::transfer::Cursor;
use super::{Ahead, Arena, Contents, Extent, Piece, Store, Target};
use crate::criu::files;
use crate::format::ImageName;

/// The largest file that can be asked for more than once, in bytes.
pub(crate) const LARGEST_KEPT: usize = 1 << 20;

/// What is kept in all for being asked for again, in bytes.
const MOST_KEPT: usize = 16 << 20;

/// What has become of a file.
#[derive(Debug)]
enum State {
    /// It is whole, and was not asked for yet.
    Complete(Contents),
    /// It was sent at least once, and is kept.
    Kept(Rc<Contents>),
    /// It was sent, and freed.
    Gone,
}

/// What a request finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lookup {
    Present,
    Absent,
    Gone,
}

/// The files by name.
#[derive(Debug, Default)]
pub struct Catalog {
    files: BTreeMap<ImageName, State>,
    /// Bytes in kept files.
    kept: usize,
}

impl Catalog {
    pub fn new() -> Self {
        Self::default()
    }

    pub(crate) fn look_up(&self, name: &ImageName) -> Lookup {
        match self.files.get(name) {
            None => Lookup::Absent,
            Some(State::Gone) => Lookup::Gone,
            Some(State::Complete(_) | State::Kept(_)) => Lookup::Present,
        }
    }

    /// Takes a file's contents for sending, if they are there. Small ones stay for the next time,
    /// in memory.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(crate) fn take(
        &mut self,
        name: &ImageName,
        arena: &mut Arena,
    ) -> io::Result<Option<Cursor>> {
        let Some(state) = self.files.get_mut(name) else {
            return Ok(None);
        };
        let (next, cursor) = match std::mem::replace(state, State::Gone) {
            State::Gone => return Ok(None),
            State::Complete(contents) => {
                let size = contents.len();
                let keep = size <= LARGEST_KEPT
                    && self.kept + size <= MOST_KEPT
                    && !files::is_pages(name.as_str());
                if !keep {
                    return Ok(Some(Cursor::Once(contents)));
                }
                self.kept += size;
                kept(Rc::new(contents.into_memory(arena)?))
            }
            State::Kept(contents) => kept(contents),
        };
        *state = next;
        Ok(Some(cursor))
    }

    /// A copy of a file's bytes, if they are there.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn read(&mut self, name: &ImageName, arena: &mut Arena) -> io::Result<Option<Vec<u8>>> {
        let contents = match self.files.get_mut(name) {
            Some(State::Complete(contents)) => {
                *contents = std::mem::take(contents).into_memory(arena)?;
                contents
            }
            Some(State::Kept(contents)) => &**contents,
            Some(State::Gone) | None => return Ok(None),
        };
        let bytes = contents.memory().flat_map(Extent::bytes);
        Ok(Some(bytes.copied().collect()))
    }

    /// Adds a file with these bytes. One of the same name is replaced.
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
            let unfilled = block.unfilled();
            let (front, rest) = bytes.split_at(unfilled.len());
            unfilled.copy_from_slice(front);
            block.filled(front.len());
            contents.push(Piece::Memory(arena.seal(block)))?;
            bytes = rest;
        }
        self.files.insert(name, State::Complete(contents));
        Ok(())
    }

    /// The names of all files, in order.
    pub fn names(&self) -> impl Iterator<Item = &ImageName> {
        self.files.keys()
    }
}

fn kept(contents: Rc<Contents>) -> (State, Cursor) {
    let cursor = Cursor::Kept {
        contents: Rc::clone(&contents),
        sent: 0,
    };
    (State::Kept(contents), cursor)
}

impl Store for Catalog {
    type File = Contents;

    fn ahead(&self, _current: Option<&Contents>) -> Ahead {
        Ahead::Piece
    }

    fn create(&mut self, _name: &ImageName) -> Result<Contents> {
        Ok(Contents::default())
    }

    fn target<'a>(&'a self, _file: &'a Contents) -> Target<'a> {
        Target::Piece
    }

    fn append(&mut self, file: &mut Contents, data: Piece) -> Result<()> {
        Ok(file.push(data)?)
    }

    fn finish(&mut self, name: ImageName, file: Contents) -> Result<()> {
        // Of several files of one name the last counts.
        self.files.insert(name, State::Complete(file));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> ImageName {
        ImageName::new(name).unwrap()
    }

    #[test]
    fn a_small_file_costs_little_beside_its_contents() {
        assert!(size_of::<(ImageName, State)>() <= 48);
    }

    #[test]
    fn the_last_file_of_a_name_counts_and_the_first_one_is_freed() {
        let (mut catalog, mut arena) = (Catalog::new(), Arena::new());
        let name = name("fs.img");
        for bytes in [&b"first, longer"[..], b"second"] {
            catalog.write(name.clone(), bytes, &mut arena).unwrap();
        }
        assert_eq!(catalog.read(&name, &mut arena).unwrap().unwrap(), b"second");
        assert_eq!(arena.live(), 6);
    }

    #[test]
    fn small_files_are_kept_until_they_weigh_too_much_and_pages_never() {
        let (mut catalog, mut arena) = (Catalog::new(), Arena::new());
        let large = vec![1; LARGEST_KEPT];
        let several: Vec<_> = (0..=MOST_KEPT / LARGEST_KEPT)
            .map(|number| name(&format!("{number:02}.img")))
            .collect();
        for name in several.iter().chain([&name("pages-1.img")]) {
            catalog.write(name.clone(), &large, &mut arena).unwrap();
        }
        assert_eq!(catalog.look_up(&name("none.img")), Lookup::Absent);
        let (last, first) = several.split_last().unwrap();
        for name in first {
            assert!(catalog.take(name, &mut arena).unwrap().is_some());
            assert_eq!(catalog.look_up(name), Lookup::Present);
        }
        for name in [last, &name("pages-1.img")] {
            assert!(catalog.take(name, &mut arena).unwrap().is_some());
            assert_eq!(catalog.look_up(name), Lookup::Gone);
            assert!(catalog.take(name, &mut arena).unwrap().is_none());
        }
        assert_eq!(arena.live(), MOST_KEPT);
    }
}
