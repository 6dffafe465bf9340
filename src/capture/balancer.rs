//! Chooses the shard for a chunk.
//!
//! **The rule.** A chunk is given to a shard only when that shard has free slots for the chunk's markers and all of its data.
//! Among the shards that may take one, that with the most room gets it. If the room is less than was asked for, the chunk is
//! cut to fit, but not below half of the shard's capacity: scraps would cost a wake-up each.
//! If no shard has that much room, nobody gets the chunk, and its source keeps its data until a shard has drained: a
//! stalled shard fills up once and is then passed over.
//!
//! **From below.** Room is never overestimated on purpose: what is known of a shard from its last inspection is a lower bound,
//! since its reader only makes more room. Only when the known room does not suffice are the shards inspected again (`FIONREAD`,
//! which contends with the reader for the pipe's mutex), so that many small files pass between two inspections.
//!
//! **Why nothing deadlocks.** An empty shard always qualifies, so data moves as long as any reader reads. A chunk that was given to a
//! shard fits into it, since the slots that it takes are never underestimated either ([`super::source`] says how that is known of
//! partial pages): so the splice finishes at once, and no source waits for one particular shard.
//!
//! Where that cannot be had (a shard of a single slot never holds a marker and data at once, and a shard that somebody else
//! writes to has less room than we know), the rest of the chunk is *promised* to its shard: this shard takes no other chunk
//! and this source gives none until the rest has moved, while all others go on. A promise only waits for its shard's
//! reader, never for another source or shard, so promises cannot form a cycle.

use std::io;

/// What the balancer needs to know of a shard. All sizes are in slots.
pub trait Room {
    /// Slots in all.
    fn capacity(&self) -> usize;
    /// Slots that are free for sure.
    fn room(&self) -> usize;
    /// Looks again at how much is free.
    ///
    /// # Errors
    /// When the shard cannot be inspected.
    fn inspect(&mut self) -> io::Result<()>;
    /// Whether it takes a chunk at all: none is promised to it.
    fn is_open(&self) -> bool;
}

/// A shard, and how many of its slots the chunk may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    pub shard: usize,
    pub slots: usize,
}

/// Finds a shard for `wanted` slots, or for a part of them that is worth a chunk.
///
/// # Errors
/// When a shard cannot be inspected.
pub fn choose<S: Room>(shards: &mut [S], wanted: usize) -> io::Result<Option<Grant>> {
    if let Some(shard) = roomiest(shards)
        && shards[shard].room() >= wanted
    {
        return Ok(Some(Grant {
            shard,
            slots: wanted,
        }));
    }
    for shard in shards.iter_mut().filter(|shard| shard.is_open()) {
        shard.inspect()?;
    }
    Ok(roomiest(shards).and_then(|shard| {
        let room = shards[shard].room();
        let worthwhile = room > 0 && (room >= wanted || room * 2 >= shards[shard].capacity());
        worthwhile.then_some(Grant {
            shard,
            slots: room.min(wanted),
        })
    }))
}

/// The open shard with the most known room; the first of several.
fn roomiest<S: Room>(shards: &[S]) -> Option<usize> {
    (0..shards.len())
        .rev()
        .filter(|&index| shards[index].is_open())
        .max_by_key(|&index| shards[index].room())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone)]
    struct Fake {
        capacity: usize,
        known: usize,
        real: usize,
        open: bool,
        inspections: usize,
    }

    impl Fake {
        fn new(known: usize, real: usize) -> Self {
            Self {
                capacity: 256,
                known,
                real,
                open: true,
                inspections: 0,
            }
        }
    }

    impl Room for Fake {
        fn capacity(&self) -> usize {
            self.capacity
        }
        fn room(&self) -> usize {
            self.known
        }
        fn inspect(&mut self) -> io::Result<()> {
            self.known = self.real;
            self.inspections += 1;
            Ok(())
        }
        fn is_open(&self) -> bool {
            self.open
        }
    }

    #[test]
    fn the_roomiest_shard_is_chosen_without_looking_at_any() {
        let mut shards = [Fake::new(10, 256), Fake::new(200, 256), Fake::new(100, 256)];
        assert_eq!(
            choose(&mut shards, 64).unwrap(),
            Some(Grant {
                shard: 1,
                slots: 64
            })
        );
        assert!(shards.iter().all(|shard| shard.inspections == 0));
    }

    #[test]
    fn shards_are_inspected_when_the_known_room_does_not_suffice() {
        let mut shards = [Fake::new(3, 3), Fake::new(5, 200)];
        assert_eq!(
            choose(&mut shards, 64).unwrap(),
            Some(Grant {
                shard: 1,
                slots: 64
            })
        );
    }

    #[test]
    fn a_chunk_is_cut_to_the_room_but_not_into_scraps() {
        let mut shards = [Fake::new(0, 128)];
        assert_eq!(
            choose(&mut shards, 200).unwrap(),
            Some(Grant {
                shard: 0,
                slots: 128
            })
        );
        let mut shards = [Fake::new(0, 127)];
        assert_eq!(choose(&mut shards, 200).unwrap(), None);
    }

    #[test]
    fn full_and_promised_shards_are_passed_over() {
        let mut promised = Fake::new(256, 256);
        promised.open = false;
        let mut shards = [promised.clone(), Fake::new(0, 0), Fake::new(0, 2)];
        assert_eq!(
            choose(&mut shards, 2).unwrap(),
            Some(Grant { shard: 2, slots: 2 })
        );
        assert_eq!(choose(&mut [promised, Fake::new(0, 0)], 1).unwrap(), None);
    }

    #[test]
    fn an_empty_shard_of_any_capacity_qualifies() {
        for capacity in [1, 2, 16, 256] {
            let mut shards = [Fake {
                capacity,
                ..Fake::new(0, capacity)
            }];
            assert_eq!(
                choose(&mut shards, 1000).unwrap(),
                Some(Grant {
                    shard: 0,
                    slots: capacity
                })
            );
        }
    }
}
