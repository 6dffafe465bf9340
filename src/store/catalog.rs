//! The files of an image in memory, and the fate of each: served once or kept.
//!
//! Some CRIUs read a small file twice. Files of up to [`LARGEST_KEPT`] are therefore kept when
//! sent, as long as they come to no more than [`MOST_KEPT`] together. CRIU's files other than
//! memory pages weigh far less: some hundred bytes to a few KiB for each task, mapping list and
//! descriptor table; a pagemap takes about 20 bytes for each stretch of memory. What was sent and
//! not kept is gone.

use std::collections::BTreeMap;
use std::io;

use anyhow::Result;

use super::transfer::FileBody;
use super::{Ahead, Arena, FileData, Piece, Store};
use crate::criu::files;
use crate::format::ImageName;

/// The largest file that can be asked for more than once, in bytes.
pub(crate) const LARGEST_KEPT: u64 = 1 << 20;

/// The most that is kept in all, in bytes.
const MOST_KEPT: u64 = 16 << 20;

/// The fate of a file.
#[derive(Debug)]
enum State {
    /// This part is here and not taken yet.
    Here(Part),
    /// It was sent at least once, and is kept.
    Kept(Box<[u8]>),
    /// It was sent, and freed.
    Gone,
}

#[derive(Debug, Default)]
struct Part {
    data: FileData,
    /// Nothing more is to come.
    is_whole: bool,
    /// It was asked for before it was whole.
    is_requested: bool,
}

/// The answer to a request.
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
    kept: u64,
    /// For copies.
    arena: Arena,
}

impl Catalog {
    pub fn new() -> Self {
        Self::default()
    }

    /// True if a file has contents that were not sent and freed. One that is not whole yet has.
    pub(crate) fn holds_something(&self, name: &ImageName) -> bool {
        match self.files.get(name) {
            Some(State::Here(part)) => !part.is_whole || !part.data.is_empty(),
            Some(State::Kept(contents)) => !contents.is_empty(),
            Some(State::Gone) | None => false,
        }
    }

    pub(crate) fn look_up(&self, name: &ImageName) -> Lookup {
        match self.files.get(name) {
            None => Lookup::Absent,
            Some(State::Here(part)) if part.is_requested => Lookup::Gone,
            Some(State::Gone) => Lookup::Gone,
            Some(_) => Lookup::Present,
        }
    }

    /// Takes a file's contents for sending, if they are there: a copy if the file is kept.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(crate) fn take(&mut self, name: &ImageName) -> io::Result<Option<FileBody>> {
        let Some(state) = self.files.get_mut(name) else {
            return Ok(None);
        };
        let data = match state {
            State::Here(part) if part.is_requested => return Ok(None),
            State::Here(part) if !part.is_whole => {
                part.is_requested = true;
                return Ok(Some(self.take_more(name)));
            }
            State::Here(part) => {
                let data = std::mem::take(&mut part.data);
                *state = State::Gone;
                let kept = self.kept + data.len();
                let is_large = data.len() > LARGEST_KEPT || kept > MOST_KEPT;
                if is_large || files::is_pages(name.as_str()) {
                    data
                } else {
                    let bytes = data.into_bytes()?;
                    let copy = FileData::copy_of(&bytes, &mut self.arena)?;
                    *state = State::Kept(bytes.into());
                    self.kept = kept;
                    copy
                }
            }
            State::Kept(bytes) => FileData::copy_of(bytes, &mut self.arena)?,
            State::Gone => return Ok(None),
        };
        let is_whole = true;
        Ok(Some(FileBody { data, is_whole }))
    }

    /// Takes the data of a file that has come since it was asked for. A pipe has no way to say
    /// "failed": any other file than pages, which CRIU counts, would look complete if it was cut
    /// short, and is taken when it is whole.
    pub(crate) fn take_more(&mut self, name: &ImageName) -> FileBody {
        let is_pages = files::is_pages(name.as_str());
        match self.files.get_mut(name) {
            Some(State::Here(part)) if part.is_requested && (part.is_whole || is_pages) => {
                let (data, is_whole) = (std::mem::take(&mut part.data), part.is_whole);
                if is_whole {
                    self.files.insert(name.clone(), State::Gone);
                }
                FileBody { data, is_whole }
            }
            _ => FileBody::default(),
        }
    }

    /// True if all of a file is here, or there is no such file.
    pub(crate) fn is_whole(&self, name: &str) -> bool {
        let named = self.files.iter().find(|(found, _)| found.as_str() == name);
        !matches!(named, Some((_, State::Here(part))) if !part.is_whole)
    }

    /// Frees the data of a file that is not whole yet, whose reader is gone, and all that comes.
    pub(crate) fn forget(&mut self, name: &ImageName) {
        if let Some(state @ State::Here(_)) = self.files.get_mut(name) {
            *state = State::Gone;
        }
    }

    /// A copy of a file's bytes, if they are there.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn read(&mut self, name: &ImageName) -> io::Result<Option<Vec<u8>>> {
        Ok(match self.files.get_mut(name) {
            Some(State::Here(part)) if part.is_whole => {
                let bytes = std::mem::take(&mut part.data).into_bytes()?;
                part.data = FileData::copy_of(&bytes, &mut self.arena)?;
                Some(bytes)
            }
            Some(State::Kept(bytes)) => Some(bytes.to_vec()),
            _ => None,
        })
    }

    /// Adds a file with these bytes. One of the same name is replaced.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn write(&mut self, name: ImageName, bytes: &[u8]) -> io::Result<()> {
        let data = FileData::copy_of(bytes, &mut self.arena)?;
        self.insert(name, data);
        Ok(())
    }

    /// Takes a file out that was not asked for yet.
    pub(crate) fn remove(&mut self, name: &ImageName) -> Option<FileData> {
        match self.files.remove(name)? {
            State::Here(part) => Some(part.data),
            State::Kept(_) | State::Gone => None,
        }
    }

    /// Adds a file. One of the same name is replaced.
    pub(crate) fn insert(&mut self, name: ImageName, data: FileData) {
        let whole = Part {
            data,
            is_whole: true,
            is_requested: false,
        };
        self.files.insert(name, State::Here(whole));
    }

    /// The names of all files, in order.
    pub fn names(&self) -> impl Iterator<Item = &ImageName> {
        self.files.keys()
    }
}

/// A file can be asked for before it is whole.
impl Store for Catalog {
    type File = ImageName;

    const AHEAD: Ahead = Ahead::Piece;

    fn create(&mut self, name: &ImageName) -> Result<ImageName> {
        // Of several files of one name the last counts.
        let nothing = State::Here(Part::default());
        self.files.insert(name.clone(), nothing);
        Ok(name.clone())
    }

    fn append(&mut self, file: &mut ImageName, piece: Piece) -> Result<()> {
        match self.files.get_mut(file) {
            Some(State::Here(part)) => Ok(part.data.push(piece)?),
            // Its reader is gone.
            _ => Ok(()),
        }
    }

    fn finish(&mut self, _name: ImageName, file: ImageName) -> Result<()> {
        if let Some(State::Here(part)) = self.files.get_mut(&file) {
            part.is_whole = true;
        }
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
        assert!(size_of::<(ImageName, State)>() <= 56);
    }

    #[test]
    fn the_last_file_of_a_name_counts_and_the_first_one_is_freed() {
        let mut catalog = Catalog::new();
        let name = name("fs.img");
        for bytes in [&b"first, longer"[..], b"second"] {
            catalog.write(name.clone(), bytes).unwrap();
        }
        assert_eq!(catalog.read(&name).unwrap().unwrap(), b"second");
        assert_eq!(catalog.arena.live(), 6);
    }

    #[test]
    fn pages_are_taken_as_they_come_and_other_files_when_they_are_whole() {
        let mut catalog = Catalog::new();
        let [pages, ghost] = ["pages-1.img", "ghost-file-1.img"].map(name);
        for name in [&pages, &ghost] {
            let mut file = catalog.create(name).unwrap();
            let piece = Piece::in_memory(b"first");
            catalog.append(&mut file, piece).unwrap();
        }
        for (name, beginning) in [(&pages, &b"first"[..]), (&ghost, b"")] {
            assert_eq!(catalog.look_up(name), Lookup::Present);
            let body = catalog.take(name).unwrap().unwrap();
            assert!(!body.is_whole);
            assert_eq!(body.data.into_bytes().unwrap(), beginning);
            assert!(catalog.take(name).unwrap().is_none(), "it is under way");
            let piece = Piece::in_memory(b", second");
            catalog.append(&mut name.clone(), piece).unwrap();
        }
        for (name, more) in [(&pages, &b", second"[..]), (&ghost, b"")] {
            let found = catalog.take_more(name);
            assert!(!found.is_whole);
            assert_eq!(found.data.into_bytes().unwrap(), more);
            catalog.finish(name.clone(), name.clone()).unwrap();
        }
        for (name, rest) in [(&pages, &b""[..]), (&ghost, b"first, second")] {
            let found = catalog.take_more(name);
            assert!(found.is_whole);
            assert_eq!(found.data.into_bytes().unwrap(), rest);
            assert_eq!(catalog.look_up(name), Lookup::Gone);
        }
    }

    #[test]
    fn small_files_are_kept_until_they_weigh_too_much_and_pages_never() {
        let mut catalog = Catalog::new();
        let large = vec![1; LARGEST_KEPT as usize];
        let several: Vec<_> = (0..=MOST_KEPT / LARGEST_KEPT)
            .map(|number| name(&format!("{number:02}.img")))
            .collect();
        for name in several.iter().chain([&name("pages-1.img")]) {
            catalog.write(name.clone(), &large).unwrap();
        }
        assert_eq!(catalog.look_up(&name("none.img")), Lookup::Absent);
        let (last, first) = several.split_last().unwrap();
        for name in [first, first].concat() {
            let body = catalog.take(&name).unwrap().unwrap();
            assert!(body.data.into_bytes().unwrap() == large);
            assert_eq!(catalog.look_up(&name), Lookup::Present);
        }
        for name in [last, &name("pages-1.img")] {
            assert!(catalog.take(name).unwrap().is_some());
            assert_eq!(catalog.look_up(name), Lookup::Gone);
            assert!(catalog.take(name).unwrap().is_none());
        }
        assert_eq!(catalog.kept, MOST_KEPT);
        assert_eq!(catalog.arena.live(), 0);
    }
}
