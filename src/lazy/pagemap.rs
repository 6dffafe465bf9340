//! CRIU's pagemaps, which map the memory of a process to its pages file. No other module of this
//! folder knows a file of CRIU's.
//!
//! ```text
//! | magic (8 bytes) | length (u32 LE) | pagemap_head { pages_id = 1 } | length | pagemap_entry | …
//! pagemap_entry { vaddr = 1, compat_nr_pages = 2, in_parent = 3, flags = 4, nr_pages = 5 }
//! ```
//!
//! Pages lie in the pages file in the order of the entries. CRIU writes these in the order of the
//! addresses; a pagemap whose entries overlap, go back or leave the address space is none of
//! CRIU's. An unknown flag may change the meaning of all others.

use anyhow::{Context, Result, bail, ensure};

use super::parts::Part;
use crate::criu::messages::{Field, fields, last_varint, messages};
use crate::os::memory::page_size;

const MAGIC: [u8; 8] = [0x19, 0x43, 0x56, 0x54, 0x25, 0x40, 0x08, 0x56];

/// The pages are in the parent image.
const IN_PARENT: u64 = 1;
/// They may be restored after the process goes on.
const LAZY: u64 = 2;
/// They are in the pages file.
const PRESENT: u64 = 4;

/// The end of all address spaces, whatever the machine.
const END: u64 = 1 << 56;

/// An entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stretch {
    pub(super) part: Part,
    pub(super) is_lazy: bool,
}

/// The contents of a pagemap.
#[derive(Debug)]
pub(super) struct Pagemap {
    /// The number in the name of the pages file.
    pub(super) pages: u64,
    /// In the order of the pages file.
    pub(super) stretches: Vec<Stretch>,
    /// True if an entry has an unknown flag.
    pub(super) unknown_flags: bool,
    /// The offsets of the flags' varints in the file.
    flags_at: Vec<usize>,
}

impl Pagemap {
    /// Parses a pagemap.
    ///
    /// # Errors
    /// When it is none, or one that no CRIU writes.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self> {
        let mut messages = messages(bytes, &MAGIC)?.into_iter();
        let head = messages.next().context("it has no first message")?;
        let mut pagemap = Self {
            pages: last_varint(&fields(head)?, 1).context("it names no pages file")?,
            stretches: Vec::new(),
            unknown_flags: false,
            flags_at: Vec::new(),
        };
        for entry in messages {
            let entry = fields(entry)?;
            pagemap.add(&entry)?;
            let flags = entry.iter().filter(|field| field.varint(4).is_some());
            let flags = flags.map(|field| field.value.as_ptr().addr() - bytes.as_ptr().addr());
            pagemap.flags_at.extend(flags);
        }
        Ok(pagemap)
    }

    fn add(&mut self, entry: &[Field]) -> Result<()> {
        let number = |field| last_varint(entry, field);
        let address = number(1).context("an entry has no address")?;
        let pages = number(5).or(number(2)).context("an entry has no length")?;
        let flags = number(4).unwrap_or(PRESENT);
        let before = self.stretches.last();
        let least = before.map_or(0, |stretch| stretch.part.addresses().end);
        let page = page_size() as u64;
        let end = pages
            .checked_mul(page)
            .and_then(|len| len.checked_add(address))
            .filter(|&end| end <= END)
            .with_context(|| {
                format!("{pages} pages at {address:#x} are beyond the address space")
            })?;
        ensure!(
            address.is_multiple_of(page),
            "an entry is at {address:#x}, which is within a page"
        );
        ensure!(
            address >= least,
            "the entry at {address:#x} overlaps the one before, or belongs in front of it"
        );
        if flags & !(IN_PARENT | LAZY | PRESENT) != 0 {
            self.unknown_flags = true;
        } else if flags & IN_PARENT != 0 || number(3) == Some(1) {
            bail!("pages of it are in a parent image, which a stream does not have");
        } else if flags & PRESENT == 0 {
            bail!("pages at {address:#x} are not in the image: it was dumped with --lazy-pages");
        }
        let part = Part {
            address,
            offset: self.size(),
            len: end - address,
        };
        self.stretches.push(Stretch {
            part,
            is_lazy: flags & LAZY != 0,
        });
        Ok(())
    }

    /// The size in bytes that its pages file must have.
    pub(super) fn size(&self) -> u64 {
        let last = self.stretches.last();
        last.map_or(0, |stretch| stretch.part.places().end)
    }

    /// Changes the bytes of this pagemap so that CRIU reads all pages itself: none are lazy then.
    pub(super) fn make_ordinary(&self, bytes: &mut [u8]) {
        for &at in &self.flags_at {
            // The lowest bits are in a varint's first byte.
            bytes[at] &= !(LAZY as u8);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::encoding::{WireType, encode_key, encode_varint};

    fn message(fields: &[(u32, u64)]) -> Vec<u8> {
        let mut body = Vec::new();
        for &(number, value) in fields {
            encode_key(number, WireType::Varint, &mut body);
            encode_varint(value, &mut body);
        }
        let mut message = (body.len() as u32).to_le_bytes().to_vec();
        message.extend(body);
        message
    }

    fn pagemap(entries: &[&[(u32, u64)]]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(message(&[(1, 7)]));
        entries
            .iter()
            .for_each(|entry| bytes.extend(message(entry)));
        bytes
    }

    fn page() -> u64 {
        page_size() as u64
    }

    #[test]
    fn entries_of_all_criu_versions_are_understood() {
        let bytes = pagemap(&[
            &[(1, 16 * page()), (2, 3)],
            &[(1, 32 * page()), (2, 1), (4, 4)],
            &[(1, 33 * page()), (2, 0), (4, 6), (5, 5), (9, 1)],
        ]);
        let parsed = Pagemap::parse(&bytes).unwrap();
        assert_eq!((parsed.pages, parsed.size()), (7, 9 * page()));
        let stretch = |[address, offset, len]: [u64; 3], is_lazy| Stretch {
            part: Part {
                address: address * page(),
                offset: offset * page(),
                len: len * page(),
            },
            is_lazy,
        };
        let expected = [
            stretch([16, 0, 3], false),
            stretch([32, 3, 1], false),
            stretch([33, 4, 5], true),
        ];
        assert_eq!(parsed.stretches, expected);
        let mut ordinary = bytes.clone();
        parsed.make_ordinary(&mut ordinary);
        assert_eq!(ordinary.len(), bytes.len());
        let parsed = Pagemap::parse(&ordinary).unwrap();
        assert!(parsed.stretches.iter().all(|stretch| !stretch.is_lazy));
        assert_eq!(parsed.size(), 9 * page());
    }

    #[test]
    fn what_no_criu_writes_is_refused() {
        let refused: &[&[&[(u32, u64)]]] = &[
            &[&[(1, 16 * page()), (2, 3)], &[(1, 18 * page()), (2, 1)]],
            &[&[(1, 16 * page()), (2, 1)], &[(1, 15 * page()), (2, 1)]],
            &[&[(1, 16 * page() + 1), (2, 1)]],
            &[&[(1, 0), (2, 0), (5, 1 << 60)]],
            &[&[(1, !(page() - 1)), (2, 1)]],
            &[&[(1, END), (2, 1)]],
            &[&[(1, page()), (2, 1), (4, 2)]],
            &[&[(1, page()), (2, 1), (4, 5)]],
            &[&[(1, page()), (2, 1), (3, 1)]],
            &[&[(1, page())]],
            &[&[(2, 1)]],
        ];
        for entries in refused {
            let parsed = Pagemap::parse(&pagemap(entries));
            assert!(parsed.is_err(), "{entries:?}: {parsed:?}");
        }
        let whole = pagemap(&[&[(1, page()), (2, 1)]]);
        for cut in 0..whole.len() {
            // What ends between two messages is whole, and does not fit its pages file.
            let parsed = Pagemap::parse(&whole[..cut]);
            assert!(parsed.is_err() || parsed.unwrap().size() == 0, "{cut}");
        }
    }

    #[test]
    fn an_unknown_flag_is_told() {
        let parsed = Pagemap::parse(&pagemap(&[&[(1, page()), (2, 1), (4, 14)]])).unwrap();
        assert!(parsed.unknown_flags);
    }
}
