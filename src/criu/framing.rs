//! The framing of CRIU's image files, followed while they pass.
//!
//! A file of messages is a magic and then messages, each behind its length, a little-endian `u32`.
//! CRIU writes such a file through a buffer. A CRIU that was killed leaves it empty, or cut where
//! the buffer ended.
//!
//! Lengths are counted down and nothing is kept, so a message may have any size. Their content
//! is CRIU's business: a newer one adds fields, packs pages, or leaves files out, and its dump is
//! as good. A file that does not begin with CRIU's magic passes for the same reason.

use super::files::{self, COMMON_MAGIC, INVENTORY, INVENTORY_MAGIC, Kind};

/// Bytes of a message's length.
const LENGTH: usize = size_of::<u32>();

/// Bytes after which no more of a file is kept.
const MAX_KEPT: usize = 1 << 20;

/// The next thing in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Magic,
    Length,
    Message,
    /// Nothing more is checked.
    Anything,
}

/// Follows one file.
#[derive(Debug)]
pub(crate) struct Framing {
    magic: u32,
    /// Comes after the magic.
    body: Next,
    next: Next,
    /// Bytes that are missing from what comes next.
    missing: usize,
    /// The bytes of a magic or length that have come.
    field: Vec<u8>,
    /// The contents of inventory.img: all, but for one of a size that no CRIU writes.
    pub(crate) kept: Vec<u8>,
}

impl Framing {
    /// For a file that begins with a magic; `None` for all others.
    pub(crate) fn of(name: &str) -> Option<Self> {
        let body = match files::kind(name)? {
            Kind::OfMessages => Next::Length,
            Kind::Mixed => Next::Anything,
            Kind::Raw => return None,
        };
        let (magic, missing) = match name {
            INVENTORY => (INVENTORY_MAGIC, LENGTH),
            // Common to all files, and to all of one kind.
            _ => (COMMON_MAGIC, 2 * LENGTH),
        };
        Some(Self {
            magic,
            body,
            next: Next::Magic,
            missing,
            field: Vec::new(),
            kept: Vec::new(),
        })
    }

    /// Takes the next bytes of the file.
    pub(crate) fn read(&mut self, mut bytes: &[u8]) {
        if self.magic == INVENTORY_MAGIC && self.kept.len() < MAX_KEPT {
            self.kept.extend_from_slice(bytes);
        }
        while !bytes.is_empty() && self.next != Next::Anything {
            let (taken, rest) = bytes.split_at(bytes.len().min(self.missing));
            bytes = rest;
            self.missing -= taken.len();
            if self.next != Next::Message {
                self.field.extend_from_slice(taken);
            }
            if self.missing == 0 {
                self.go_on();
            }
        }
    }

    /// Goes on to what comes next.
    fn go_on(&mut self) {
        let number = u32::from_le_bytes(self.field.first_chunk().copied().unwrap_or_default());
        (self.next, self.missing) = match self.next {
            Next::Magic if number == self.magic => (self.body, LENGTH),
            Next::Magic => (Next::Anything, 0),
            Next::Length if number > 0 => (Next::Message, number as usize),
            _ => (Next::Length, LENGTH),
        };
        self.field.clear();
    }

    /// True if a file of messages does not begin as CRIU's do.
    pub(crate) fn is_foreign(&self) -> bool {
        self.next == Next::Anything
    }

    /// The reason why a file that has ended so cannot be whole, if there is one.
    pub(crate) fn defect(&self) -> Option<&'static str> {
        match self.next {
            Next::Magic if self.field.is_empty() => Some("is empty"),
            Next::Anything => None,
            Next::Length if self.missing == LENGTH => None,
            _ => Some("is cut off"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn magic() -> Vec<u8> {
        [COMMON_MAGIC.to_le_bytes(), 1u32.to_le_bytes()].concat()
    }

    /// The defect of a file that comes in pieces of every size.
    fn defect(name: &str, bytes: &[u8]) -> Option<&'static str> {
        let in_pieces_of = |size: usize| {
            let mut framing = Framing::of(name).unwrap();
            bytes.chunks(size).for_each(|piece| framing.read(piece));
            framing.defect()
        };
        let found = in_pieces_of(bytes.len().max(1));
        for size in 1..bytes.len() {
            assert_eq!(in_pieces_of(size), found, "{name} in pieces of {size}");
        }
        found
    }

    #[test]
    fn a_file_that_was_not_written_to_its_end_is_found_out_wherever_it_ends() {
        let messages = [
            &3u32.to_le_bytes()[..],
            b"abc",
            &[0; LENGTH],
            &[1, 0, 0, 0, 7],
        ];
        let whole = [&magic()[..], &messages.concat()].concat();
        // Messages of which some are missing are a file too.
        let between_messages = [8, 15, 19, 24];
        for end in 0..=whole.len() {
            let expected = match end {
                0 => Some("is empty"),
                _ if between_messages.contains(&end) => None,
                _ => Some("is cut off"),
            };
            assert_eq!(defect("mm-1.img", &whole[..end]), expected, "cut at {end}");
        }
        assert_eq!(defect("sk-queues.img", &whole[..7]), Some("is cut off"));
        assert_eq!(defect("sk-queues.img", &whole[..9]), None);
    }

    #[test]
    fn a_message_may_have_any_size_and_is_not_kept() {
        let mut framing = Framing::of("files.img").unwrap();
        framing.read(&[magic(), u32::MAX.to_le_bytes().to_vec()].concat());
        framing.read(&vec![0; 1 << 20]);
        assert_eq!(framing.defect(), Some("is cut off"));
        assert!(framing.field.is_empty());
    }

    #[test]
    fn what_does_not_begin_as_crius_files_do_is_not_judged() {
        assert_eq!(defect("core-1.img", &[1; 9]), None);
        assert_eq!(defect(INVENTORY, b"inventory"), None);
        assert_eq!(defect(INVENTORY, &INVENTORY_MAGIC.to_le_bytes()), None);
        assert_eq!(defect(INVENTORY, b""), Some("is empty"));
        assert!(Framing::of("pages-1.img").is_none());
        assert!(Framing::of("of-a-plugin.img").is_none());
    }
}
