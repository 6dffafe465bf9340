//! Chooses the shard for a chunk.
//!
//! **The rule.** A chunk is given to a shard only when that shard has free slots for the chunk's
//! markers and all of its data. Among the shards that may take one, that with the most free slots
//! gets it. If it has fewer than were asked for, the chunk is cut to fit, but not below half of the
//! shard's capacity: scraps would cost a wake-up each. If no shard has that much room, the source
//! keeps its data until a shard has drained: a stalled shard fills up once and is then passed over.
//!
//! **From below.** Free slots are never overestimated: what is known of a shard from its last
//! inspection is a lower bound, since its reader only frees more. Only when the known free slots do
//! not suffice are the shards inspected again (`FIONREAD`, which contends with the reader for the
//! pipe's mutex), so that many small files pass between two inspections.
//!
//! **Why nothing deadlocks.** An empty shard always qualifies, however full the others are, so data
//! moves as long as any reader reads. A chunk that was given to a shard fits into it, since the
//! slots that it takes are never underestimated either ([`super::chunk`] says how). So it leaves
//! its source at once: no source ever waits for one particular shard, and no shard for a source.
//!
//! A shard that another process writes to as well, or whose reader has made the pipe smaller, has
//! less room than we know. What such a shard does not take is copied to its queue, so that even
//! then the chunk has left its source; the shard gets no other until its queue has been written.

use std::io;

/// What the balancer needs to know of a shard.
pub(super) trait Slots {
    /// Slots in all.
    fn slots(&self) -> usize;
    /// Slots that are free for sure.
    fn free_slots(&self) -> usize;
    /// Looks again at how many are free.
    fn inspect(&mut self) -> io::Result<()>;
}

/// A shard, and how many of its slots the chunk may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Placement {
    pub(super) shard: usize,
    pub(super) slots: usize,
}

/// Finds a shard for `wanted` slots, or for a part of them that is worth a chunk.
pub(super) fn choose<S: Slots>(shards: &mut [S], wanted: usize) -> io::Result<Option<Placement>> {
    let largest = shards.iter().map(S::slots).max().unwrap_or(0);
    let wanted = wanted.min(largest);
    if let Some(placement) = roomiest(shards, wanted, |shard| shard.free_slots() >= wanted) {
        return Ok(Some(placement));
    }
    for shard in shards.iter_mut() {
        shard.inspect()?;
    }
    Ok(roomiest(shards, wanted, |shard| {
        let free = shard.free_slots();
        free > 0 && (free >= wanted || free * 2 >= shard.slots())
    }))
}

/// Of the shards that qualify, that with the most known free slots; the first of several.
fn roomiest<S: Slots>(
    shards: &[S],
    wanted: usize,
    qualifies: impl Fn(&S) -> bool,
) -> Option<Placement> {
    let candidates = shards.iter().enumerate().rev();
    let (shard, free) = candidates
        .filter(|(_, shard)| qualifies(shard))
        .map(|(index, shard)| (index, shard.free_slots()))
        .max_by_key(|&(_, free)| free)?;
    Some(Placement {
        shard,
        slots: free.min(wanted),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fake {
        slots: usize,
        known: usize,
        real: usize,
        inspections: usize,
    }

    impl Fake {
        fn new(known: usize, real: usize) -> Self {
            Self {
                slots: 256,
                known,
                real,
                inspections: 0,
            }
        }

        fn small(slots: usize, real: usize) -> Self {
            Self {
                slots,
                ..Self::new(0, real)
            }
        }
    }

    impl Slots for Fake {
        fn slots(&self) -> usize {
            self.slots
        }
        fn free_slots(&self) -> usize {
            self.known
        }
        fn inspect(&mut self) -> io::Result<()> {
            self.known = self.real;
            self.inspections += 1;
            Ok(())
        }
    }

    fn placed(shard: usize, slots: usize) -> Option<Placement> {
        Some(Placement { shard, slots })
    }

    #[test]
    fn the_roomiest_shard_is_chosen_without_looking_at_any() {
        let mut shards = [Fake::new(10, 256), Fake::new(200, 256), Fake::new(100, 256)];
        assert_eq!(choose(&mut shards, 64).unwrap(), placed(1, 64));
        assert!(shards.iter().all(|shard| shard.inspections == 0));
    }

    #[test]
    fn shards_are_inspected_when_the_known_room_does_not_suffice() {
        let mut shards = [Fake::new(3, 3), Fake::new(5, 200)];
        assert_eq!(choose(&mut shards, 64).unwrap(), placed(1, 64));
    }

    #[test]
    fn a_chunk_is_cut_to_the_room_but_not_into_scraps() {
        let mut shards = [Fake::new(0, 128)];
        assert_eq!(choose(&mut shards, 200).unwrap(), placed(0, 128));
        let mut shards = [Fake::new(0, 127)];
        assert_eq!(choose(&mut shards, 200).unwrap(), None);
    }

    #[test]
    fn full_shards_are_passed_over() {
        let mut shards = [Fake::new(0, 0), Fake::new(0, 2)];
        assert_eq!(choose(&mut shards, 2).unwrap(), placed(1, 2));
        assert_eq!(choose(&mut [Fake::new(0, 0)], 1).unwrap(), None);
    }

    #[test]
    fn an_empty_shard_of_any_capacity_qualifies() {
        for slots in [1, 2, 16, 256] {
            let mut shards = [Fake::small(slots, slots)];
            assert_eq!(choose(&mut shards, 1000).unwrap(), placed(0, slots));
        }
    }

    #[test]
    fn an_empty_shard_qualifies_beside_a_stalled_one_that_has_more_room() {
        let mut shards = [Fake::new(100, 100), Fake::small(64, 64)];
        assert_eq!(choose(&mut shards, 200).unwrap(), placed(1, 64));
    }
}
