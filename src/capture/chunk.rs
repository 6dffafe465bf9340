//! A chunk: the part of a file that goes to one shard in one piece.
//!
//! **How many slots a chunk takes.** A shard must have room for all of a chunk that it is given
//! (see [`super::balancer`]). But `FIONREAD` counts bytes, and a slot of a pipe holds anything from
//! a byte to a page: what a source holds may take far more slots than its bytes would fill. On each
//! [`Route`] the number of slots is known, but for sources whose slots turn out to hold less than a
//! page: what such a chunk leaves behind is copied, and so is all that follows it.

use crate::os::pipe::slot;

/// The most slots that a chunk's markers take: padded, they can end in a second one.
pub(super) const MARKER_SLOTS: usize = 2;

/// The most that they take where they are not padded, in bytes: two names of up to 255, and the
/// origin.
const MARKERS: usize = 1024;

/// The slots that references to memory take.
pub(super) fn slots_of(memory: &[u8]) -> usize {
    (memory.as_ptr().addr() % slot() + memory.len()).div_ceil(slot())
}

/// How a chunk's bytes get from the source to the shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route {
    /// Spliced. Each slot of the source should hold a whole page.
    Direct,
    /// Read into memory, and queued with the markers: copied bytes fill their slots.
    Copied,
    /// Out of the buffer: the shard's pipe gets references to our own pages, each of which takes a
    /// slot. Small chunks out of the buffer are [`Route::Copied`] from there.
    Lent,
}

/// A part of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chunk {
    pub(super) bytes: usize,
    /// The most slots that the bytes take in a shard.
    pub(super) slots: usize,
    pub(super) route: Route,
    /// The file has no bytes after these.
    pub(super) is_last: bool,
}

impl Chunk {
    /// A chunk that is copied.
    pub(super) fn copied(bytes: usize, is_last: bool) -> Self {
        Self {
            bytes,
            slots: bytes.div_ceil(slot()),
            route: Route::Copied,
            is_last,
        }
    }

    /// Cuts the chunk to `slots` of `slot` bytes each. With none left, for a shard of a single
    /// slot, it gets what fits into the slot of its markers.
    pub(super) fn cut(&mut self, slots: usize, slot: usize) {
        if slots >= self.slots {
            return;
        }
        // Bytes that are lent need not begin at a page.
        let whole = slots.saturating_sub(usize::from(self.route == Route::Lent));
        if whole == 0 {
            self.route = Route::Copied;
        }
        self.shorten(match slots {
            0 => slot - MARKERS,
            _ => whole.max(1) * slot,
        });
        self.slots = slots;
    }

    /// Leaves at most `bytes` in the chunk.
    pub(super) fn shorten(&mut self, bytes: usize) {
        if bytes < self.bytes {
            self.bytes = bytes;
            self.is_last = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: [usize; 3] = [4 << 10, 16 << 10, 64 << 10];

    fn cut(bytes: usize, route: Route, slots: usize, slot: usize) -> (usize, Route, bool) {
        let mut chunk = Chunk {
            bytes,
            slots: 16,
            route,
            is_last: true,
        };
        chunk.cut(slots, slot);
        (chunk.bytes, chunk.route, chunk.is_last)
    }

    #[test]
    fn a_chunk_is_cut_at_a_page_if_it_is_cut_at_all() {
        for slot in SIZES {
            let bytes = 16 * slot;
            assert_eq!(
                cut(bytes, Route::Direct, 16, slot),
                (bytes, Route::Direct, true)
            );
            assert_eq!(
                cut(bytes, Route::Direct, 3, slot),
                (3 * slot, Route::Direct, false)
            );
        }
    }

    #[test]
    fn lent_memory_may_begin_within_a_page() {
        for slot in SIZES {
            assert_eq!(
                cut(16 * slot, Route::Lent, 3, slot),
                (2 * slot, Route::Lent, false)
            );
            assert_eq!(
                cut(16 * slot, Route::Lent, 1, slot),
                (slot, Route::Copied, false)
            );
        }
    }

    #[test]
    fn a_shard_of_one_slot_takes_a_chunk_in_the_slot_of_its_markers() {
        for slot in SIZES {
            for route in [Route::Direct, Route::Copied, Route::Lent] {
                let (bytes, route, is_last) = cut(16 * slot, route, 0, slot);
                assert_eq!((route, is_last), (Route::Copied, false));
                assert!((1..=slot - MARKERS).contains(&bytes));
            }
        }
    }
}
