//! Chooses the shard for a chunk.
//!
//! **The rule.** A chunk is given to a shard only when that shard has room: free slots for the
//! chunk's markers and all of its data, or else for half of what the shard holds at all. The chunk
//! is then cut to fit; into less than that it is not cut, as scraps would cost a wake-up each. Of
//! the shards with room, that which has got the fewest bytes gets the chunk. If none has room, the
//! source keeps its data until a shard has drained: a stalled shard fills up once and is then
//! passed over.
//!
//! **Even shards.** A restore waits for the largest shard. Compressors that compete for processors
//! take their data by turns, so that the shard that has got the fewest bytes is often full while
//! another one, with more bytes, has room. That one is [`Choice::Ahead`]: the caller gives it
//! nothing until the others have caught up, or its [`Patience`] has ended. Only the time counts in
//! which one that is ahead is empty, so that its reader waits: a third at most, so that a shard
//! that takes less than two thirds of what others would take falls behind. One that is far behind
//! is not waited for any more, and gets what it has room for.
//!
//! **Late shards.** A shard whose reader has not begun looks like a stalled one. How much is still
//! to come is not known; where as much comes as has come, all but one can make up for a stalled
//! one. So shards go on without the one that has got the fewest bytes, and no further ahead of
//! several: then the image waits, for [`Patience::LATE`] in all, until these have begun.
//!
//! **Small images.** As long as the shards have got little, chunks are small: the last chunk of an
//! image makes its shard larger than the others by its size.
//!
//! **From below.** Free slots are never overestimated: what is known of a shard from its last
//! inspection is a lower bound, since its reader only frees more. Only when the known free slots do
//! not suffice are the shards inspected again (`FIONREAD`, which contends with the reader for the
//! pipe's mutex), so that many small files pass between two inspections.
//!
//! **Why nothing deadlocks.** An empty shard always has room, however full the others are. Where
//! any has room, one is chosen, at once or when patience has ended. So data moves as long as any
//! reader reads. A chunk that was given to a shard fits into it, since the slots that it takes are
//! not underestimated either, as a rule ([`super::chunk`]). So it leaves its source at once: no
//! source ever waits for one particular shard, and no shard for a source.
//!
//! A chunk of pieces takes more slots than is known. A shard that another process writes to as
//! well, or whose reader has made the pipe smaller, has less room than is known. What such a shard
//! does not take is copied to its queue, so that even then the chunk has left its source; the
//! shard gets no other until its queue has been written.

use std::io;
use std::time::{Duration, Instant};

use super::chunk::MARKER_SLOTS;
use crate::os::pipe::slot;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// The balancer's view of a shard.
pub(super) trait Slots {
    /// Slots in all.
    fn slots(&self) -> usize;
    /// Slots that are free for sure.
    fn free_slots(&self) -> usize;
    /// Bytes that it has got so far.
    fn given(&self) -> u64;
    /// Counts the free slots again.
    fn inspect(&mut self) -> io::Result<()>;
}

/// A shard, and how many of its slots the chunk may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Placement {
    pub(super) shard: usize,
    pub(super) slots: usize,
}

/// The shard for a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Choice {
    To(Placement),
    /// To this one, but it is ahead of others that may soon have room, and maybe far ahead of
    /// several. Of those that are ahead one may be empty, so that its reader waits.
    Ahead {
        placement: Placement,
        is_waiting: bool,
        is_far: bool,
    },
    /// To none: they are too full.
    Full,
}

/// Finds a shard for `wanted` slots, or for a part of them that is worth a chunk.
pub(super) fn choose<S: Slots>(shards: &mut [S], wanted: usize) -> io::Result<Choice> {
    let largest = shards.iter().map(S::slots).max().unwrap_or(0);
    let wanted = wanted.min(largest).min(most_slots(shards));
    let most = most_given(shards);
    let fits = |shard: &S| shard.given() <= most && shard.free_slots() >= wanted;
    if let Some(placement) = emptiest(shards, wanted, fits) {
        return Ok(Choice::To(placement));
    }
    for shard in shards.iter_mut() {
        shard.inspect()?;
    }
    let has_room = |shard: &S| {
        let free = shard.free_slots();
        free > 0 && (free >= wanted || free * 2 >= shard.slots())
    };
    let is_behind = |shard: &S| shard.given() <= most && has_room(shard);
    if let Some(placement) = emptiest(shards, wanted, is_behind) {
        return Ok(Choice::To(placement));
    }
    let is_empty = |shard: &S| shard.free_slots() == shard.slots();
    Ok(match emptiest(shards, wanted, has_room) {
        None => Choice::Full,
        Some(placement) => Choice::Ahead {
            placement,
            is_waiting: shards.iter().any(is_empty),
            is_far: shards[placement.shard].given() > most_without_others(shards),
        },
    })
}

/// The most slots of a chunk and its markers: few as long as the shards have got little. With an
/// eighth of the mean, 100 MB over 16 `lz4` were up to 1.28 times the mean.
fn most_slots<S: Slots>(shards: &[S]) -> usize {
    if let [_] = shards {
        return usize::MAX;
    }
    let mean = shards.iter().map(S::given).sum::<u64>() / shards.len() as u64;
    MARKER_SLOTS + (mean / 16).max(64 * KIB) as usize / slot()
}

/// The most bytes that a shard may have got while several others have got far less. The one with
/// the fewest does not count, unless there are only two.
fn most_without_others<S: Slots>(shards: &[S]) -> u64 {
    let total: u64 = shards.iter().map(S::given).sum();
    let fewest = shards.iter().map(S::given).min().unwrap_or(0);
    let usual = match shards.len() as u64 {
        0..=2 => total / 2,
        count => (total - fewest) / (count - 1),
    };
    usual + usual / 16 + 256 * KIB
}

/// The most bytes that a shard may have got and not be ahead: some more than the one with the
/// fewest, of those that are not far behind.
///
/// A pipe of 1 MiB is filled in one go, and `lz4` reads 4 MiB before it compresses them. The larger
/// an image is, the less does such a difference matter.
fn most_given<S: Slots>(shards: &[S]) -> u64 {
    let given = || shards.iter().map(S::given);
    let most = given().max().unwrap_or(0);
    let far_behind = most.saturating_sub((most / 2).clamp(8 * MIB, 128 * MIB));
    let fewest = given().filter(|&given| given >= far_behind).min();
    let fewest = fewest.unwrap_or(0);
    fewest + (fewest / 16).clamp(64 * KIB, 16 * MIB)
}

/// Of the shards that qualify, that which has got the fewest bytes; the first of several.
fn emptiest<S: Slots>(
    shards: &[S],
    wanted: usize,
    qualifies: impl Fn(&S) -> bool,
) -> Option<Placement> {
    let candidates = shards.iter().enumerate();
    let (shard, chosen) = candidates
        .filter(|(_, shard)| qualifies(shard))
        .min_by_key(|(_, shard)| shard.given())?;
    Some(Placement {
        shard,
        slots: chosen.free_slots().min(wanted),
    })
}

/// How long shards that are ahead may still be left to wait.
#[derive(Debug, Default)]
pub(super) struct Patience {
    /// For those that are ahead, in nanoseconds: half of the time in which none waits. Less than
    /// none, when the caller looked away for longer than it lasted.
    left: i64,
    /// The time for which those that are far ahead were left to wait.
    pub(super) spent_on_late: Duration,
    as_of: Option<Instant>,
    waits: Waits,
    /// When a chunk was held back first, if none was given to a shard behind since.
    held_since: Option<Instant>,
}

/// The reason why an empty shard waits while a chunk is held back.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Waits {
    /// None is empty.
    #[default]
    No,
    ForOthers,
    ForLateOnes,
}

impl Patience {
    /// A stall costs no more than this, however well all went before. A compressor that shares its
    /// processor with two others has it again by then.
    const LONGEST: Duration = Duration::from_millis(100);

    /// For all late shards of an image together. Commands that connect to another machine take up
    /// to a second before they read.
    const LATE: Duration = Duration::from_millis(1200);

    /// True if shards that are ahead, or even far ahead, are to wait. If `is_waiting`, one does so
    /// already. There is no patience when this is asked first, but for late ones.
    pub(super) fn lasts(&mut self, is_waiting: bool, is_far: bool, now: Instant) -> bool {
        self.pass(now);
        let held_since = *self.held_since.get_or_insert(now);
        let is_short = now.saturating_duration_since(held_since) < Self::LONGEST;
        let lasts = self.left > 0 && is_short;
        let lasts_longer = is_far && self.spent_on_late < Self::LATE;
        self.waits = match (lasts, lasts_longer) {
            (true, _) if is_waiting => Waits::ForOthers,
            (false, true) => Waits::ForLateOnes,
            _ => Waits::No,
        };
        lasts || lasts_longer
    }

    /// No shard has room, so that none is left to wait.
    pub(super) fn rest(&mut self) {
        if self.waits != Waits::No {
            self.pass(Instant::now());
            self.waits = Waits::No;
        }
    }

    /// A shard behind was given a chunk.
    pub(super) fn catch_up(&mut self) {
        self.rest();
        self.held_since = None;
    }

    fn pass(&mut self, now: Instant) {
        let before = self.as_of.replace(now).unwrap_or(now);
        let passed = now.saturating_duration_since(before);
        let nanos = passed.as_nanos() as i64;
        match self.waits {
            Waits::No => {
                self.left = (self.left + nanos / 2).min(Self::LONGEST.as_nanos() as i64);
            }
            Waits::ForOthers => self.left -= nanos,
            Waits::ForLateOnes => self.spent_on_late += passed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// So much that chunks are as large as can be.
    const GIVEN: u64 = 40 * MIB;

    #[derive(Clone)]
    struct Fake {
        slots: usize,
        known: usize,
        real: usize,
        given: u64,
        inspections: usize,
    }

    impl Fake {
        fn new(known: usize, real: usize) -> Self {
            Self {
                slots: 256,
                known,
                real,
                given: GIVEN,
                inspections: 0,
            }
        }

        fn small(slots: usize, real: usize) -> Self {
            Self {
                slots,
                ..Self::new(0, real)
            }
        }

        fn given(self, given: u64) -> Self {
            Self { given, ..self }
        }
    }

    impl Slots for Fake {
        fn slots(&self) -> usize {
            self.slots
        }
        fn free_slots(&self) -> usize {
            self.known
        }
        fn given(&self) -> u64 {
            self.given
        }
        fn inspect(&mut self) -> io::Result<()> {
            self.known = self.real;
            self.inspections += 1;
            Ok(())
        }
    }

    fn to(shard: usize, slots: usize) -> Choice {
        Choice::To(Placement { shard, slots })
    }

    #[test]
    fn of_those_with_room_the_shard_with_the_fewest_bytes_is_chosen_without_looking_at_any() {
        let mut shards = [
            Fake::new(10, 256).given(GIVEN + 1000),
            Fake::new(100, 256).given(GIVEN + 3000),
            Fake::new(200, 256).given(GIVEN + 4000),
        ];
        assert_eq!(choose(&mut shards, 64).unwrap(), to(1, 64));
        assert!(shards.iter().all(|shard| shard.inspections == 0));
    }

    #[test]
    fn shards_are_inspected_when_the_known_room_does_not_suffice() {
        let mut shards = [Fake::new(3, 3), Fake::new(5, 200).given(GIVEN + 9000)];
        assert_eq!(choose(&mut shards, 64).unwrap(), to(1, 64));
    }

    #[test]
    fn a_chunk_is_cut_to_the_room_but_not_into_scraps() {
        let mut shards = [Fake::new(0, 128)];
        assert_eq!(choose(&mut shards, 200).unwrap(), to(0, 128));
        let mut shards = [Fake::new(0, 127)];
        assert_eq!(choose(&mut shards, 200).unwrap(), Choice::Full);
    }

    #[test]
    fn a_chunk_is_rather_cut_than_given_to_a_shard_with_more_bytes() {
        let mut shards = [Fake::new(0, 128), Fake::new(0, 256).given(GIVEN + 4096)];
        assert_eq!(choose(&mut shards, 256).unwrap(), to(0, 128));
    }

    #[test]
    fn full_shards_are_passed_over() {
        let mut shards = [Fake::new(0, 0), Fake::new(0, 2).given(GIVEN + 9000)];
        assert_eq!(choose(&mut shards, 2).unwrap(), to(1, 2));
        assert_eq!(choose(&mut [Fake::new(0, 0)], 1).unwrap(), Choice::Full);
    }

    #[test]
    fn an_empty_shard_of_any_capacity_qualifies() {
        for slots in [1, 2, 16, 256] {
            let mut shards = [Fake::small(slots, slots)];
            assert_eq!(choose(&mut shards, 1000).unwrap(), to(0, slots));
        }
    }

    #[test]
    fn an_empty_shard_qualifies_beside_a_stalled_one_that_has_more_room() {
        let mut shards = [Fake::new(100, 100), Fake::small(64, 64)];
        assert_eq!(choose(&mut shards, 200).unwrap(), to(1, 64));
    }

    #[test]
    fn a_shard_that_is_ahead_of_a_full_one_is_told_apart() {
        let beside_full = |free, given| {
            let full = Fake::new(0, 0).given(40 * MIB);
            let other = Fake::new(free, free).given(given * MIB);
            choose(&mut [full, other], 64).unwrap()
        };
        let placement = Placement {
            shard: 1,
            slots: 64,
        };
        for (free, is_waiting) in [(128, false), (255, false), (256, true)] {
            assert_eq!(beside_full(free, 40), to(1, 64));
            assert_eq!(beside_full(free, 42), to(1, 64));
            let ahead = Choice::Ahead {
                placement,
                is_waiting,
                is_far: false,
            };
            assert_eq!(beside_full(free, 43), ahead);
            assert_eq!(beside_full(free, 45), ahead);
        }
    }

    #[test]
    fn no_chunk_is_held_back_for_long_where_all_shards_stand_still() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut patience = Patience::default();
        assert!(!patience.lasts(false, false, at(0)));
        patience.catch_up();
        assert!(patience.lasts(false, false, at(1000)));
        assert!(patience.lasts(false, false, at(1099)));
        assert!(!patience.lasts(false, false, at(1100)));
        assert!(!patience.lasts(false, false, at(9000)));
        patience.catch_up();
        assert!(patience.lasts(false, false, at(9001)));
    }

    #[test]
    fn a_stalled_shard_that_is_ahead_does_not_let_an_empty_one_wait_for_ever() {
        let mut shards = [
            Fake::new(0, 0).given(40 * MIB),
            Fake::new(200, 200).given(44 * MIB),
            Fake::new(256, 256).given(46 * MIB),
        ];
        let expected = Choice::Ahead {
            placement: Placement {
                shard: 1,
                slots: 64,
            },
            is_waiting: true,
            is_far: false,
        };
        assert_eq!(choose(&mut shards, 64).unwrap(), expected);
    }

    #[test]
    fn a_shard_that_is_far_behind_is_not_waited_for_but_gets_what_it_has_room_for() {
        let ahead = || Fake::new(256, 256).given(900 * MIB);
        let mut shards = [Fake::new(0, 0).given(700 * MIB), ahead()];
        assert_eq!(choose(&mut shards, 64).unwrap(), to(1, 64));
        let mut shards = [Fake::new(64, 64).given(700 * MIB), ahead()];
        assert_eq!(choose(&mut shards, 64).unwrap(), to(0, 64));
    }

    /// Readers of these speeds, in slots for each millisecond, of which some begin after a time,
    /// and a source of so many MiB: when all of it was given, in ms, and the bytes of each shard.
    fn simulate(speeds: &[usize], late: &[u64], mib: u64) -> (u64, Vec<u64>) {
        simulate_readers(speeds.len(), mib, |milli, shards| {
            for (index, (shard, speed)) in shards.iter_mut().zip(speeds).enumerate() {
                if late.get(index).is_none_or(|&late| milli >= late) {
                    shard.real = (shard.real + speed).min(shard.slots);
                }
            }
        })
    }

    /// Readers that do this in each millisecond.
    fn simulate_readers(
        count: usize,
        mib: u64,
        mut read: impl FnMut(u64, &mut [Fake]),
    ) -> (u64, Vec<u64>) {
        let start = Instant::now();
        let mut patience = Patience::default();
        let mut shards = vec![Fake::new(256, 256).given(0); count];
        let mut left = mib * MIB;
        for milli in 0.. {
            let now = start + Duration::from_millis(milli);
            while left > 0 {
                let placement = match choose(&mut shards, 257).unwrap() {
                    Choice::To(placement) => {
                        patience.pass(now);
                        patience.waits = Waits::No;
                        patience.catch_up();
                        placement
                    }
                    Choice::Ahead {
                        placement,
                        is_waiting,
                        is_far,
                    } if !patience.lasts(is_waiting, is_far, now) => placement,
                    Choice::Ahead { .. } | Choice::Full => break,
                };
                let shard = &mut shards[placement.shard];
                shard.known -= placement.slots;
                shard.real = shard.known;
                let bytes = (placement.slots as u64 * 4096).min(left);
                shard.given += bytes;
                left -= bytes;
            }
            if left == 0 {
                return (milli, shards.iter().map(|shard| shard.given).collect());
            }
            read(milli, &mut shards);
        }
        unreachable!("some shard takes something")
    }

    fn largest_over_mean(given: &[u64]) -> f64 {
        let mean = given.iter().sum::<u64>() as f64 / given.len() as f64;
        *given.iter().max().unwrap() as f64 / mean
    }

    #[test]
    fn shards_whose_readers_differ_a_little_stay_even() {
        for speeds in [[60, 60, 60, 60], [60, 60, 60, 45], [70, 60, 50, 50]] {
            let (_, given) = simulate(&speeds, &[], 1500);
            assert!(largest_over_mean(&given) < 1.05, "{speeds:?}: {given:?}");
        }
    }

    #[test]
    fn small_images_are_even_over_many_shards() {
        for count in [16, 32] {
            let (_, given) = simulate(&vec![60; count], &[], 96);
            assert!(largest_over_mean(&given) < 1.15, "{given:?}");
        }
    }

    #[test]
    fn small_images_are_even_over_compressors_that_take_blocks_by_turns() {
        // Of 4 MiB, for 12 ms of one of two processors, one compressor after the other.
        let mut blocks = [0; 16];
        let mut left = [0; 16];
        let (_, given) = simulate_readers(16, 96, |_, shards| {
            for ((shard, block), left) in shards.iter_mut().zip(&mut blocks).zip(&mut left) {
                if *left > 0 {
                    continue;
                }
                let taken = (shard.slots - shard.real).min(1024 - *block);
                shard.real += taken;
                *block += taken;
                if *block == 1024 {
                    (*block, *left) = (0, 12);
                }
            }
            let busy = left.iter_mut().filter(|left| **left > 0);
            busy.take(2).for_each(|left| *left -= 1);
        });
        assert!(largest_over_mean(&given) < 1.2, "{given:?}");
    }

    #[test]
    fn a_slow_shard_gets_what_it_takes_and_the_others_hardly_less_than_without_it() {
        for slow in [0, 1, 5] {
            let (millis, given) = simulate(&[60, 60, 60, slow], &[], 3000);
            let without = millis * 60 * 4096;
            assert!(
                given[..3].iter().all(|&given| given * 10 >= without * 9),
                "beside one of {slow} slots/ms: {given:?}"
            );
            assert!(given[3] + MIB >= millis * slow as u64 * 4096, "{given:?}");
        }
    }

    #[test]
    fn shards_that_begin_late_get_their_share_unless_they_are_too_late() {
        let late = |millis| [0, millis, millis, millis];
        for millis in [300, 1000] {
            let (_, given) = simulate(&[60; 4], &late(millis), 400);
            assert!(largest_over_mean(&given) < 1.15, "{millis} ms: {given:?}");
        }
        // Later ones are waited for no longer, besides the 400 ms that the one takes.
        let limit = Patience::LATE + Patience::LONGEST + Duration::from_millis(400);
        let (millis, _) = simulate(&[60_000; 4], &late(5000), 400);
        assert!(u128::from(millis) <= limit.as_millis() + 1, "{millis}");
    }

    #[test]
    fn one_of_four_that_does_not_begin_is_not_waited_for() {
        let (millis, _) = simulate(&[60_000; 4], &[5000], 256);
        assert!(
            u128::from(millis) <= Patience::LONGEST.as_millis() + 20,
            "{millis}"
        );
    }

    #[test]
    fn patience_lasts_a_third_of_the_time_and_never_long() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut patience = Patience::default();
        assert!(
            !patience.lasts(true, false, at(0)),
            "nothing has happened yet"
        );
        assert!(patience.lasts(true, false, at(20)));
        assert!(patience.lasts(true, false, at(29)));
        assert!(!patience.lasts(true, false, at(30)));
        assert!(patience.lasts(true, false, at(40)));
        assert!(!patience.lasts(true, false, at(45)));
        assert!(patience.lasts(true, false, at(47)));
        assert!(!patience.lasts(true, false, at(58)), "10 ms too long");
        assert!(!patience.lasts(true, false, at(78)));
        assert!(patience.lasts(true, false, at(80)));
        assert!(!patience.lasts(true, false, at(100)));
        patience.catch_up();
        assert!(patience.lasts(true, false, at(100_000)));
        assert!(
            !patience.lasts(true, false, at(100_100)),
            "a stall is not waited for"
        );
    }
}
