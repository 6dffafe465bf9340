//! What a capture learns from the contents of CRIU's image files while they pass.
//!
//! A file of messages is a magic and then messages, each behind its length, a little-endian `u32`.
//! CRIU writes such a file through a buffer. A CRIU that was killed leaves it empty, or cut where
//! the buffer ended: between a length and its message, or between two messages, which only those
//! who refer to what is missing tell.
//!
//! Only messages that say what else there must be are looked into: the tree, a process's state,
//! which pages there are, and who refers to which open file. Of all others the lengths are
//! followed, and nothing is kept.

use std::collections::HashSet;
use std::fmt;

use anyhow::{Result, ensure};
use prost::Message;

use super::files::{
    self, COMMON_MAGIC, INVENTORY, INVENTORY_MAGIC, Layout, MAGIC, OPEN_FILES, TREE,
};
use super::proto::{
    CoreEntry, FdinfoEntry, FileEntry, FsEntry, InventoryEntry, MmEntry, PagemapEntry, PagemapHead,
    PstreeEntry,
};

/// Bytes of a message's length.
const LENGTH: usize = 4;

/// The largest message that is looked into, in bytes: a process of 200,000 threads has it.
const LARGEST: usize = 1 << 20;

/// The state of a process that has ended, and whose parent does not know it yet.
const DEAD: u32 = 2;

/// The pages are in the parent image.
const IN_PARENT: u32 = 1;
/// The pages may be restored when they are needed.
const LAZY: u32 = 2;
/// The pages are in the pages file.
const PRESENT: u32 = 4;

/// What a file says.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Contents {
    Inventory {
        of_pre_dump: bool,
    },
    Tree(Vec<Process>),
    /// Of a process or thread.
    Core {
        is_dead: bool,
    },
    Pagemap(Pagemap),
    /// The numbers of all open files.
    OpenFiles(HashSet<u32>),
    /// The numbers of open files that something has: descriptors, a program, a working directory.
    References(Vec<u32>),
    /// Nothing that matters here.
    Other,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    /// All of its threads.
    pub(crate) threads: Vec<u32>,
}

/// Which pages a pages file holds.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Pagemap {
    /// The number of the pages file.
    pub(crate) pages_id: Option<u32>,
    pub(crate) present: u64,
    /// Pages that a page server was to send later.
    pub(crate) lazy: u64,
    /// Pages of an earlier image.
    pub(crate) in_parent: u64,
}

/// Why a file cannot be whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Defect {
    Empty,
    Cut,
    /// It does not begin as CRIU's files do.
    Foreign,
    /// It holds a message that cannot be read.
    Unreadable,
}

impl fmt::Display for Defect {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Defect::Empty => "is empty",
            Defect::Cut => "is cut off",
            Defect::Foreign => "does not begin with CRIU's magic",
            Defect::Unreadable => "holds a message that is not CRIU's",
        })
    }
}

/// Which messages a file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Inventory,
    Tree,
    Core,
    Pagemap,
    OpenFiles,
    Descriptors,
    Memory,
    Directories,
    Other,
}

/// What comes next in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Magic,
    Length,
    Message,
}

/// Reads one file while it passes.
#[derive(Debug)]
pub(crate) struct Reader {
    contents: Contents,
    kind: Kind,
    magic: (usize, u32),
    next: Next,
    /// Bytes that are missing from what comes next.
    missing: usize,
    /// What came of it, as far as it is kept.
    kept: Vec<u8>,
    is_empty: bool,
    defect: Option<Defect>,
}

impl Reader {
    /// For a file of messages; `None` for all others.
    pub(crate) fn new(name: &str) -> Option<Self> {
        if files::layout(name) != Some(Layout::Messages) {
            return None;
        }
        let kind = match name {
            INVENTORY => Kind::Inventory,
            TREE => Kind::Tree,
            OPEN_FILES => Kind::OpenFiles,
            _ if name.starts_with("core-") => Kind::Core,
            _ if name.starts_with("pagemap-") => Kind::Pagemap,
            _ if name.starts_with("fdinfo-") => Kind::Descriptors,
            _ if name.starts_with("mm-") => Kind::Memory,
            _ if name.starts_with("fs-") => Kind::Directories,
            _ => Kind::Other,
        };
        let contents = match kind {
            Kind::Inventory => Contents::Inventory { of_pre_dump: false },
            Kind::Tree => Contents::Tree(Vec::new()),
            Kind::Core => Contents::Core { is_dead: false },
            Kind::Pagemap => Contents::Pagemap(Pagemap::default()),
            Kind::OpenFiles => Contents::OpenFiles(HashSet::new()),
            Kind::Descriptors | Kind::Memory | Kind::Directories => {
                Contents::References(Vec::new())
            }
            Kind::Other => Contents::Other,
        };
        let magic = match name {
            INVENTORY => (size_of::<u32>(), INVENTORY_MAGIC),
            _ => (MAGIC, COMMON_MAGIC),
        };
        Some(Self {
            contents,
            kind,
            magic,
            next: Next::Magic,
            missing: magic.0,
            kept: Vec::new(),
            is_empty: true,
            defect: None,
        })
    }

    /// Takes the next bytes of the file.
    pub(crate) fn read(&mut self, mut bytes: &[u8]) {
        while self.defect.is_none() && !bytes.is_empty() {
            self.is_empty = false;
            let (taken, rest) = bytes.split_at(bytes.len().min(self.missing));
            bytes = rest;
            self.missing -= taken.len();
            if self.next != Next::Message || self.kind != Kind::Other {
                self.kept.extend_from_slice(taken);
            }
            while self.missing == 0 && self.defect.is_none() {
                self.go_on();
            }
        }
    }

    /// Goes on to what comes next, when something is complete.
    fn go_on(&mut self) {
        let number = self.kept.first_chunk().copied().map(u32::from_le_bytes);
        let (next, missing) = match self.next {
            Next::Magic if number != Some(self.magic.1) => {
                self.defect = Some(Defect::Foreign);
                return;
            }
            Next::Magic => (Next::Length, LENGTH),
            Next::Length => (Next::Message, number.unwrap_or(0) as usize),
            Next::Message => {
                if look_into(self.kind, &mut self.contents, &self.kept).is_err() {
                    self.defect = Some(Defect::Unreadable);
                }
                (Next::Length, LENGTH)
            }
        };
        if next == Next::Message && missing > LARGEST && self.kind != Kind::Other {
            self.defect = Some(Defect::Unreadable);
        }
        self.kept.clear();
        (self.next, self.missing) = (next, missing);
    }

    /// What the file said, now that it has ended.
    pub(crate) fn finish(self) -> Result<Contents, Defect> {
        match self.defect {
            Some(defect) => Err(defect),
            None if self.is_empty => Err(Defect::Empty),
            None if self.next == Next::Length && self.missing == LENGTH => Ok(self.contents),
            None => Err(Defect::Cut),
        }
    }
}

/// Takes from a message what matters.
fn look_into(kind: Kind, contents: &mut Contents, message: &[u8]) -> Result<()> {
    match contents {
        Contents::Inventory { of_pre_dump } => {
            *of_pre_dump = InventoryEntry::decode(message)?.pre_dump_mode.is_some();
        }
        Contents::Tree(processes) => {
            let PstreeEntry { pid, threads } = PstreeEntry::decode(message)?;
            processes.push(Process { pid, threads });
        }
        Contents::Core { is_dead } => {
            let task = CoreEntry::decode(message)?.tc;
            *is_dead = task.is_some_and(|task| task.task_state == DEAD);
        }
        Contents::Pagemap(pagemap) if pagemap.pages_id.is_none() => {
            pagemap.pages_id = Some(PagemapHead::decode(message)?.pages_id);
        }
        Contents::Pagemap(pagemap) => {
            let entry = PagemapEntry::decode(message)?;
            let pages = entry.nr_pages.unwrap_or(entry.compat_nr_pages.into());
            let of_old_criu = if entry.in_parent() {
                IN_PARENT
            } else {
                PRESENT
            };
            let flags = entry.flags.unwrap_or(of_old_criu);
            let sum = match flags {
                _ if flags & PRESENT != 0 => &mut pagemap.present,
                _ if flags & IN_PARENT != 0 => &mut pagemap.in_parent,
                _ if flags & LAZY != 0 => &mut pagemap.lazy,
                _ => return Ok(()),
            };
            let total = sum.checked_add(pages);
            ensure!(total.is_some(), "more pages than there can be");
            *sum = total.unwrap_or(u64::MAX);
        }
        Contents::OpenFiles(ids) => {
            ids.insert(FileEntry::decode(message)?.id);
        }
        Contents::References(ids) => match kind {
            Kind::Memory => ids.push(MmEntry::decode(message)?.exe_file_id),
            Kind::Directories => {
                let FsEntry { cwd_id, root_id } = FsEntry::decode(message)?;
                ids.extend([cwd_id, root_id]);
            }
            _ => ids.push(FdinfoEntry::decode(message)?.id),
        },
        Contents::Other => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn magic(magic: u32) -> Vec<u8> {
        [magic.to_le_bytes(), 1u32.to_le_bytes()].concat()
    }

    fn message(message: &impl Message) -> Vec<u8> {
        let message = message.encode_to_vec();
        [&(message.len() as u32).to_le_bytes()[..], &message].concat()
    }

    /// The file, read in pieces of every size.
    fn read(name: &str, bytes: &[u8]) -> Result<Contents, Defect> {
        let of_pieces = |size: usize| {
            let mut reader = Reader::new(name).unwrap();
            bytes.chunks(size).for_each(|piece| reader.read(piece));
            reader.finish()
        };
        let found = of_pieces(bytes.len().max(1));
        for size in 1..bytes.len() {
            assert_eq!(of_pieces(size), found, "{name} in pieces of {size} bytes");
        }
        found
    }

    fn pagemap(entries: &[(u32, u64)]) -> Vec<u8> {
        let head = PagemapHead { pages_id: 7 };
        let mut bytes = [magic(COMMON_MAGIC), message(&head)].concat();
        for &(flags, pages) in entries {
            bytes.extend(message(&PagemapEntry {
                flags: Some(flags),
                nr_pages: Some(pages),
                ..PagemapEntry::default()
            }));
        }
        bytes
    }

    #[test]
    fn a_pagemap_says_which_pages_are_where() {
        let bytes = pagemap(&[(PRESENT, 3), (PRESENT | LAZY, 4), (LAZY, 5), (IN_PARENT, 6)]);
        let pages = Pagemap {
            pages_id: Some(7),
            present: 7,
            lazy: 5,
            in_parent: 6,
        };
        let found = read("pagemap-1.img", &bytes);
        assert_eq!(found, Ok(Contents::Pagemap(pages)));
    }

    #[test]
    fn a_pagemap_of_an_old_criu_counts_in_its_own_way() {
        let mut bytes = pagemap(&[]);
        for in_parent in [false, true] {
            bytes.extend(message(&PagemapEntry {
                compat_nr_pages: 2,
                in_parent: Some(in_parent),
                ..PagemapEntry::default()
            }));
        }
        let pages = Pagemap {
            pages_id: Some(7),
            present: 2,
            lazy: 0,
            in_parent: 2,
        };
        let found = read("pagemap-1.img", &bytes);
        assert_eq!(found, Ok(Contents::Pagemap(pages)));
    }

    #[test]
    fn a_file_that_was_not_written_to_its_end_is_found_out_wherever_it_ends() {
        let whole = pagemap(&[(PRESENT, 1), (PRESENT, 2)]);
        let head = pagemap(&[]).len();
        let one = pagemap(&[(PRESENT, 1)]).len();
        for end in 0..whole.len() {
            let found = read("pagemap-1.img", &whole[..end]);
            match end {
                0 => assert_eq!(found, Err(Defect::Empty)),
                // Messages of which some are missing are a file too.
                _ if [MAGIC, head, one].contains(&end) => assert!(found.is_ok()),
                _ => assert_eq!(found, Err(Defect::Cut), "cut at {end}"),
            }
        }
    }

    #[test]
    fn a_message_larger_than_any_of_crius_is_no_reason_to_keep_it() {
        let size = (LARGEST as u32 + 1).to_le_bytes();
        let bytes = [magic(COMMON_MAGIC), size.to_vec()].concat();
        assert_eq!(read("pstree.img", &bytes), Err(Defect::Unreadable));
        let mut reader = Reader::new("creds-1.img").unwrap();
        reader.read(&bytes);
        reader.read(&[0; 1000]);
        assert!(reader.kept.is_empty());
        assert_eq!(reader.finish(), Err(Defect::Cut));
    }

    #[test]
    fn a_file_with_another_magic_is_not_crius() {
        assert_eq!(read("core-1.img", &magic(1)), Err(Defect::Foreign));
        assert_eq!(read(INVENTORY, b"inventory"), Err(Defect::Foreign));
    }

    #[test]
    fn who_has_an_open_file_names_it_as_files_img_does() {
        let file = |name: &str, entry: Vec<u8>| {
            let bytes = [magic(COMMON_MAGIC), entry].concat();
            read(name, &bytes).unwrap()
        };
        let files = file("files.img", message(&FileEntry { id: 3 }));
        assert_eq!(files, Contents::OpenFiles([3].into()));
        let fs = FsEntry {
            cwd_id: 3,
            root_id: 4,
        };
        for (name, entry, ids) in [
            ("fdinfo-2.img", message(&FdinfoEntry { id: 3 }), vec![3]),
            ("mm-1.img", message(&MmEntry { exe_file_id: 3 }), vec![3]),
            ("fs-1.img", message(&fs), vec![3, 4]),
        ] {
            assert_eq!(file(name, entry), Contents::References(ids), "{name}");
        }
    }

    #[test]
    fn a_pre_dump_says_so_in_its_inventory() {
        for mode in [None, Some(1)] {
            let inventory = message(&InventoryEntry {
                img_version: 2,
                pre_dump_mode: mode,
            });
            let bytes = [&INVENTORY_MAGIC.to_le_bytes()[..], &inventory].concat();
            let of_pre_dump = mode.is_some();
            assert_eq!(
                read(INVENTORY, &bytes),
                Ok(Contents::Inventory { of_pre_dump })
            );
        }
    }
}
