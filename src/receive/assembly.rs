//! Puts the markers of all shards in order again, and the data with them into files.
//!
//! Shards run ahead of each other: one waits in a compressor's block, another in the network. What comes before its turn waits
//! here, its data already in memory. Whatever is wrong with the order or the contents of an image is found here, and
//! blamed on a shard and an offset.

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, HashMap};

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::format::ImageName;
use crate::store::{Arena, Extent, Store};

/// Parts that may wait for their turn, whatever the sizes of their data; some 100 bytes each. A stream of nothing but markers that
/// leaves out one must not fill the memory.
const MOST_WAITING: usize = 1 << 20;

/// Parts that may wait while the image makes progress: 1 MB or so. A shard that is further ahead can as well wait in its pipe.
const MANY_WAITING: usize = 16 << 10;

/// One step in the making of the image.
#[derive(Debug)]
pub enum Step {
    File(ImageName),
    Data { extent: Extent, last: bool },
    NoData,
    FileEnd,
    ImageEnd,
}

impl Step {
    /// Bytes of data that come with it.
    fn len(&self) -> usize {
        match self {
            Step::Data { extent, .. } => extent.len(),
            _ => 0,
        }
    }
}

/// Where a step came from, for errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    pub shard: usize,
    pub offset: u64,
}

/// The place of a step in the image: the marker's position, and the part of its data.
pub type Place = (u64, u32);

struct Waiting {
    place: Place,
    origin: Origin,
    step: Step,
}

impl PartialEq for Waiting {
    fn eq(&self, other: &Self) -> bool {
        self.place == other.place
    }
}

impl Eq for Waiting {}

impl PartialOrd for Waiting {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Waiting {
    fn cmp(&self, other: &Self) -> Ordering {
        self.place.cmp(&other.place)
    }
}

/// An image in the making.
pub struct Reassembly<S: Store> {
    store: S,
    next: Place,
    waiting: BinaryHeap<Reverse<Waiting>>,
    waiting_bytes: usize,
    current: Option<(ImageName, S::File)>,
    /// Files that are neither complete nor current.
    open: HashMap<ImageName, S::File>,
    complete: bool,
    labels: Vec<String>,
}

impl<S: Store> Reassembly<S> {
    /// `labels` names the shards in errors.
    pub fn new(store: S, labels: Vec<String>) -> Self {
        Self {
            store,
            next: (0, 0),
            waiting: BinaryHeap::new(),
            waiting_bytes: 0,
            current: None,
            open: HashMap::new(),
            complete: false,
            labels,
        }
    }

    /// The position of the marker whose turn it is.
    pub fn next_seq(&self) -> u64 {
        self.next.0
    }

    /// The place of the step whose turn it is.
    pub fn next_place(&self) -> Place {
        self.next
    }

    /// Whether the end of the image was reached, with nothing missing before.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// Whether so much waits for its turn that no more should be taken ahead of it. `stalled` says that the image has made no
    /// progress for a while, and may depend on it.
    pub fn is_far_ahead(&self, stalled: bool) -> bool {
        self.waiting.len() >= if stalled { MOST_WAITING } else { MANY_WAITING }
    }

    /// Bytes of data that wait for their turn.
    pub fn waiting_bytes(&self) -> usize {
        self.waiting_bytes
    }

    /// Whether the current file is fed by splicing, so that data should not be taken to memory ahead of its turn.
    pub fn prefers_splicing(&self) -> bool {
        let current = self.current.as_ref();
        !S::BUFFERS || current.is_some_and(|(_, file)| self.store.takes_pipe(file))
    }

    /// The current file, with the store to splice into it, if it is the turn of this place and the file takes a pipe.
    pub fn splice_target(&mut self, place: Place) -> Option<(&ImageName, &mut S::File, &mut S)> {
        match &mut self.current {
            Some((name, file)) if place == self.next && self.store.takes_pipe(file) => {
                Some((name, file, &mut self.store))
            }
            _ => None,
        }
    }

    /// Whether it is this place's turn.
    pub fn is_next(&self, place: Place) -> bool {
        place == self.next
    }

    /// Data at the place whose turn it was went into the current file.
    ///
    /// # Errors
    /// As [`Reassembly::submit`].
    pub fn spliced(&mut self, last: bool, arena: &mut Arena) -> Result<()> {
        self.pass(last)?;
        self.catch_up(arena)
    }

    /// Takes a step, now if it is its turn, otherwise when that comes.
    ///
    /// # Errors
    /// When the step makes no sense at its place, or the store fails.
    pub fn submit(
        &mut self,
        place: Place,
        origin: Origin,
        step: Step,
        arena: &mut Arena,
    ) -> Result<()> {
        if place == self.next {
            self.apply(origin, step, arena)?;
            return self.catch_up(arena);
        }
        ensure!(
            place > self.next,
            self.error(
                origin,
                format_args!("marker {} comes a second time", place.0)
            )
        );
        self.waiting_bytes += step.len();
        self.waiting.push(Reverse(Waiting {
            place,
            origin,
            step,
        }));
        Ok(())
    }

    fn catch_up(&mut self, arena: &mut Arena) -> Result<()> {
        while let Some(Reverse(first)) = self.waiting.peek() {
            if first.place > self.next {
                break;
            }
            if let Some(Reverse(Waiting {
                place,
                origin,
                step,
            })) = self.waiting.pop()
            {
                ensure!(
                    place == self.next,
                    self.error(
                        origin,
                        format_args!("marker {} comes a second time", place.0)
                    )
                );
                self.waiting_bytes -= step.len();
                self.apply(origin, step, arena)?;
            }
        }
        Ok(())
    }

    fn pass(&mut self, last: bool) -> Result<()> {
        self.next = if last {
            let seq = self
                .next
                .0
                .checked_add(1)
                .context("the image has more markers than can be counted")?;
            (seq, 0)
        } else {
            (self.next.0, self.next.1 + 1)
        };
        Ok(())
    }

    fn apply(&mut self, origin: Origin, step: Step, arena: &mut Arena) -> Result<()> {
        ensure!(
            !self.complete,
            self.error(origin, "something follows the end of the image")
        );
        let mut last = true;
        match step {
            Step::File(name) => {
                if let Some((name, file)) = self.current.take() {
                    self.open.insert(name, file);
                }
                let file = match self.open.remove(&name) {
                    Some(file) => file,
                    None => self.store.create(&name)?,
                };
                self.current = Some((name, file));
            }
            Step::Data {
                extent,
                last: is_last,
            } => {
                let Some((name, file)) = &mut self.current else {
                    bail!(self.error(origin, "data comes before the name of its file"));
                };
                self.store
                    .append(file, extent, arena)
                    .with_context(|| format!("writing {name}"))?;
                last = is_last;
            }
            Step::NoData => {
                ensure!(
                    self.current.is_some(),
                    self.error(origin, "data comes before the name of its file")
                );
            }
            Step::FileEnd => {
                let Some((name, file)) = self.current.take() else {
                    bail!(self.error(origin, "a file ends before it was named"));
                };
                self.store.finish(name, file, arena)?;
            }
            Step::ImageEnd => {
                let unfinished = self
                    .current
                    .iter()
                    .map(|(name, _)| name)
                    .chain(self.open.keys())
                    .min();
                if let Some(name) = unfinished {
                    bail!(self.error(
                        origin,
                        format_args!("the image ends, but its file {name} does not")
                    ));
                }
                self.complete = true;
            }
        }
        self.pass(last)
    }

    /// The store, once the image is complete.
    ///
    /// # Errors
    /// When something was left over.
    pub fn into_store(self) -> Result<S> {
        if let Some(Reverse(first)) = self.waiting.peek() {
            bail!(self.error(
                first.origin,
                format_args!("marker {} follows the end of the image", first.place.0)
            ));
        }
        Ok(self.store)
    }

    fn error(&self, origin: Origin, what: impl std::fmt::Display) -> anyhow::Error {
        anyhow!(
            "reading {} before byte {}: {what}",
            self.labels[origin.shard],
            origin.offset
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::mem::MemStore;

    const HERE: Origin = Origin {
        shard: 0,
        offset: 0,
    };

    fn name(name: &str) -> ImageName {
        ImageName::new(name).unwrap()
    }

    fn data(arena: &mut Arena, bytes: &[u8]) -> Step {
        let mut block = arena.reserve(bytes.len()).unwrap();
        arena.unfilled(&mut block).copy_from_slice(bytes);
        arena.filled(&mut block, bytes.len());
        Step::Data {
            extent: arena.seal(block),
            last: true,
        }
    }

    fn reassembly() -> (Reassembly<MemStore>, Arena) {
        (
            Reassembly::new(MemStore::new(), vec!["shard fd 0".into()]),
            Arena::new(),
        )
    }

    #[test]
    fn steps_in_any_order_make_the_same_image() {
        for order in [
            [0, 1, 2, 3, 4, 5, 6],
            [6, 5, 4, 3, 2, 1, 0],
            [3, 0, 6, 1, 5, 2, 4],
        ] {
            let (mut image, mut arena) = reassembly();
            for seq in order {
                let step = match seq {
                    0 => Step::File(name("a")),
                    1 => data(&mut arena, b"12"),
                    2 => Step::NoData,
                    3 => data(&mut arena, b"345"),
                    4 | 5 => [Step::FileEnd, Step::File(name("b"))]
                        .into_iter()
                        .nth(seq - 4)
                        .unwrap(),
                    _ => Step::FileEnd,
                };
                image
                    .submit((seq as u64, 0), HERE, step, &mut arena)
                    .unwrap();
            }
            image
                .submit((7, 0), HERE, Step::ImageEnd, &mut arena)
                .unwrap();
            assert!(image.is_complete());
            let store = image.into_store().unwrap();
            assert_eq!(store.read(&name("a"), &arena).unwrap(), b"12345");
            assert_eq!(store.read(&name("b"), &arena).unwrap(), b"");
        }
    }

    #[test]
    fn files_that_take_turns_do_not_mix_and_the_last_of_a_name_counts() {
        let (mut image, mut arena) = reassembly();
        let steps = [
            Step::File(name("a")),
            data(&mut arena, b"a1"),
            Step::File(name("b")),
            data(&mut arena, b"b1"),
            Step::File(name("a")),
            data(&mut arena, b"a2"),
            Step::FileEnd,
            Step::File(name("b")),
            Step::FileEnd,
            Step::File(name("b")),
            data(&mut arena, b"new"),
            Step::FileEnd,
            Step::ImageEnd,
        ];
        for (seq, step) in (0..).zip(steps) {
            image.submit((seq, 0), HERE, step, &mut arena).unwrap();
        }
        let store = image.into_store().unwrap();
        assert_eq!(store.read(&name("a"), &arena).unwrap(), b"a1a2");
        assert_eq!(store.read(&name("b"), &arena).unwrap(), b"new");
    }

    fn error_of(steps: impl FnOnce(&mut Arena) -> Vec<(u64, Step)>) -> String {
        let (mut image, mut arena) = reassembly();
        for (seq, step) in steps(&mut arena) {
            if let Err(error) = image.submit((seq, 0), HERE, step, &mut arena) {
                return format!("{error:#}");
            }
        }
        image
            .into_store()
            .map_or_else(|error| format!("{error:#}"), |_| "no error".into())
    }

    #[test]
    fn what_is_far_ahead_is_still_taken_when_nothing_else_helps() {
        let (mut image, mut arena) = reassembly();
        for seq in 1..=MANY_WAITING as u64 {
            assert!(!image.is_far_ahead(false));
            image
                .submit((seq, 0), HERE, Step::FileEnd, &mut arena)
                .unwrap();
        }
        assert!(image.is_far_ahead(false));
        assert!(!image.is_far_ahead(true));
    }

    #[test]
    fn every_disorder_has_its_own_error() {
        let data_first = error_of(|arena| vec![(0, data(arena, b"x"))]);
        assert!(data_first.contains("before the name"), "{data_first}");
        let end_first = error_of(|_| vec![(0, Step::FileEnd)]);
        assert!(end_first.contains("before it was named"), "{end_first}");
        let open = error_of(|_| vec![(0, Step::File(name("a"))), (1, Step::ImageEnd)]);
        assert!(open.contains("its file a does not"), "{open}");
        let repeated = error_of(|_| vec![(0, Step::File(name("a"))), (0, Step::FileEnd)]);
        assert!(repeated.contains("second time"), "{repeated}");
        let repeated_ahead = error_of(|_| {
            vec![
                (1, Step::FileEnd),
                (1, Step::FileEnd),
                (0, Step::File(name("a"))),
            ]
        });
        assert!(repeated_ahead.contains("second time"), "{repeated_ahead}");
        let after = error_of(|_| vec![(0, Step::ImageEnd), (1, Step::File(name("a")))]);
        assert!(after.contains("follows the end"), "{after}");
        let far_after = error_of(|_| vec![(5, Step::File(name("a"))), (0, Step::ImageEnd)]);
        assert!(far_after.contains("follows the end"), "{far_after}");
    }
}
