//! Makes files of a store out of the steps of an image, each in its turn.
//!
//! What is wrong with the order or the contents of an image is found here, and blamed on a shard
//! and an offset.

use std::collections::HashMap;

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::order::{Behind, Order, Place};
use crate::format::{Body, ImageName};
use crate::store::external::{External, ExternalOutputs, File};
use crate::store::{Ahead, Piece, Store, Target};

/// Steps that may wait for their turn, whatever the sizes of their data; some 100 bytes each. A
/// stream of nothing but markers that leaves out one must not fill the memory.
const MOST_WAITING: usize = 1 << 20;

/// Steps that may wait while the image makes progress: 1 MB or so. A shard that is further ahead
/// can as well wait in its pipe.
const MANY_WAITING: usize = 16 << 10;

/// One step in the making of the image.
#[derive(Debug)]
pub(super) enum Step {
    /// A marker that no data follows.
    Marker(Body),
    /// Some of the data behind a marker, and whether more of it comes.
    Data(Piece, Behind),
}

impl Step {
    /// Bytes of data that come with it.
    fn len(&self) -> usize {
        match self {
            Step::Data(piece, _) => piece.len(),
            Step::Marker(_) => 0,
        }
    }
}

/// What a receiver makes of the steps of an image.
pub(super) trait Image {
    /// The first place that is missing. `None` while only the index can tell.
    fn next(&self) -> Option<Place>;

    /// Whether nothing is missing.
    fn is_complete(&self) -> bool;

    /// The external files.
    fn outlets(&mut self) -> &mut ExternalOutputs;

    /// Whether so much waits for its turn that no more should be taken ahead of it. `stalled` says
    /// that the image has made no progress for a while, and may depend on it.
    fn is_far_ahead(&self, stalled: bool) -> bool;

    /// Bytes of data that wait for their turn.
    fn waiting_bytes(&self) -> usize;

    /// Where data waits whose turn has not come.
    fn ahead(&self) -> Ahead;

    /// Where the data at this place goes. `None`: it should wait in its shard.
    fn target(&self, place: Place) -> Option<Target<'_>>;

    /// The name of the file whose turn it is, for errors.
    fn current(&self) -> String;

    /// This number of bytes of data, at the place whose turn it was, went into the current file.
    ///
    /// # Errors
    /// As [`Image::submit`].
    fn written(&mut self, bytes: u64, behind: Behind) -> Result<()>;

    /// Whether a shard has shown to be an index.
    fn has_index(&self) -> bool;

    /// The index, while all of it is not here.
    fn awaited_index(&self) -> Option<usize>;

    /// Whether a shard is read whatever is held.
    fn keeps(&self, shard: usize) -> bool;

    /// Notes that a shard begins like an index.
    ///
    /// # Errors
    /// When another one does too.
    fn is_index(&mut self, shard: usize) -> Result<()>;

    /// Takes a step.
    ///
    /// # Errors
    /// When the step makes no sense at its place, or the store fails.
    fn submit(&mut self, place: Place, position: Position, step: Step) -> Result<()>;
}

/// Where a step came from, for errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) shard: usize,
    /// Bytes of the shard up to and with the step.
    pub(super) offset: u64,
}

impl Position {
    pub(super) fn error(self, labels: &[String], what: impl std::fmt::Display) -> anyhow::Error {
        anyhow!(
            "reading {} before byte {}: {what}",
            labels[self.shard],
            self.offset
        )
    }
}

#[derive(Debug)]
struct Waiting {
    position: Position,
    step: Step,
}

/// An image in the making, all of whose steps have their turn.
pub(super) struct Assembly<S: Store> {
    store: External<S>,
    order: Order<Waiting>,
    /// Bytes of data that wait for their turn.
    waiting_bytes: usize,
    current: Option<(ImageName, File<S::File>)>,
    /// Files that are neither complete nor current.
    open: HashMap<ImageName, File<S::File>>,
    complete: bool,
    labels: Vec<String>,
}

impl<S: Store> Image for Assembly<S> {
    fn next(&self) -> Option<Place> {
        Some(self.order.next())
    }

    fn is_complete(&self) -> bool {
        self.complete
    }

    fn outlets(&mut self) -> &mut ExternalOutputs {
        self.store.outlets()
    }

    fn is_far_ahead(&self, stalled: bool) -> bool {
        self.order.len() >= if stalled { MOST_WAITING } else { MANY_WAITING }
    }

    fn waiting_bytes(&self) -> usize {
        self.waiting_bytes
    }

    fn ahead(&self) -> Ahead {
        let current = self.current.as_ref();
        self.store.ahead(current.map(|(_, file)| file))
    }

    fn target(&self, place: Place) -> Option<Target<'_>> {
        match &self.current {
            // Data that belongs to no file is an error, which is found when it is applied.
            None if place == self.order.next() => Some(Target::Piece),
            Some((_, file)) if place == self.order.next() => Some(self.store.target(file)),
            _ if self.ahead() == Ahead::Piece => Some(Target::Piece),
            _ => None,
        }
    }

    fn current(&self) -> String {
        let current = self.current.as_ref();
        current.map_or_else(|| "no file".into(), |(name, _)| name.to_string())
    }

    fn written(&mut self, bytes: u64, behind: Behind) -> Result<()> {
        if let Some((_, file)) = &mut self.current {
            self.store.written(file, bytes);
        }
        self.pass(behind)?;
        self.catch_up()
    }

    fn has_index(&self) -> bool {
        false
    }

    fn awaited_index(&self) -> Option<usize> {
        None
    }

    fn keeps(&self, _shard: usize) -> bool {
        true
    }

    /// An index is a shard like any other here.
    fn is_index(&mut self, _shard: usize) -> Result<()> {
        Ok(())
    }

    fn submit(&mut self, place: Place, position: Position, step: Step) -> Result<()> {
        if place == self.order.next() {
            self.apply(position, step)?;
            return self.catch_up();
        }
        let len = step.len();
        if self
            .order
            .insert(place, Waiting { position, step })
            .is_err()
        {
            bail!(self.error(
                position,
                format_args!("marker {} comes a second time", place.seq)
            ));
        }
        self.waiting_bytes += len;
        Ok(())
    }
}

impl<S: Store> Assembly<S> {
    /// `labels` names the shards in errors.
    pub(super) fn new(store: External<S>, labels: Vec<String>) -> Self {
        Self {
            store,
            order: Order::new(),
            waiting_bytes: 0,
            current: None,
            open: HashMap::new(),
            complete: false,
            labels,
        }
    }

    fn catch_up(&mut self) -> Result<()> {
        while let Some(Waiting { position, step }) = self.order.pop() {
            self.waiting_bytes -= step.len();
            self.apply(position, step)?;
        }
        Ok(())
    }

    fn pass(&mut self, behind: Behind) -> Result<()> {
        self.order
            .pass(behind)
            .context("the image has more markers than can be counted")
    }

    fn apply(&mut self, position: Position, step: Step) -> Result<()> {
        ensure!(
            !self.complete,
            self.error(position, "something follows the end of the image")
        );
        let mut behind = Behind::Marker;
        match step {
            Step::Marker(Body::File(name)) => {
                self.open.extend(self.current.take());
                let file = match self.open.remove(&name) {
                    Some(file) => file,
                    None => self.store.create(&name)?,
                };
                self.current = Some((name, file));
            }
            Step::Data(piece, more) => {
                let Some((name, file)) = &mut self.current else {
                    bail!(self.error(position, "data comes before the name of its file"));
                };
                self.store
                    .append(file, piece)
                    .with_context(|| format!("writing {name}"))?;
                behind = more;
            }
            Step::Marker(Body::Data(_)) => {
                ensure!(
                    self.current.is_some(),
                    self.error(position, "data comes before the name of its file")
                );
            }
            Step::Marker(Body::FileEnd) => {
                let Some((name, file)) = self.current.take() else {
                    bail!(self.error(position, "a file ends before it was named"));
                };
                self.store.finish(name, file)?;
            }
            Step::Marker(Body::ImageEnd) => {
                let current = self.current.iter().map(|(name, _)| name);
                if let Some(name) = current.chain(self.open.keys()).min() {
                    bail!(self.error(
                        position,
                        format_args!("the image ends, but its file {name} does not")
                    ));
                }
                self.complete = true;
            }
        }
        self.pass(behind)
    }

    /// The store, once the image is complete.
    ///
    /// # Errors
    /// When something was left over.
    pub(super) fn into_store(mut self) -> Result<S> {
        if let Some((place, Waiting { position, .. })) = self.order.pop_first() {
            bail!(self.error(
                position,
                format_args!("marker {} follows the end of the image", place.seq)
            ));
        }
        self.store.into_behind()
    }

    fn error(&self, position: Position, what: impl std::fmt::Display) -> anyhow::Error {
        position.error(&self.labels, what)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::poller::Poller;
    use crate::store::catalog::Catalog;

    const HERE: Position = Position {
        shard: 0,
        offset: 0,
    };

    fn name(name: &str) -> ImageName {
        ImageName::new(name).unwrap()
    }

    fn file(text: &str) -> Step {
        Step::Marker(Body::File(name(text)))
    }

    fn data(bytes: &[u8]) -> Step {
        Step::Data(Piece::in_memory(bytes), Behind::Marker)
    }

    const NO_DATA: Step = Step::Marker(Body::Data(0));
    const FILE_END: Step = Step::Marker(Body::FileEnd);
    const IMAGE_END: Step = Step::Marker(Body::ImageEnd);

    fn assembly() -> Assembly<Catalog> {
        let store = External::new(
            Catalog::new(),
            ExternalOutputs::new(Vec::new(), &Poller::new().unwrap()).unwrap(),
        );
        Assembly::new(store, vec!["shard fd 0".into()])
    }

    fn read<const N: usize>(mut files: Catalog, names: [&str; N]) -> [Vec<u8>; N] {
        names.map(|text| files.read(&name(text)).unwrap().unwrap())
    }

    #[test]
    fn steps_in_any_order_make_the_same_image() {
        for order in [
            [0, 1, 2, 3, 4, 5, 6],
            [6, 5, 4, 3, 2, 1, 0],
            [3, 0, 6, 1, 5, 2, 4],
        ] {
            let mut image = assembly();
            for seq in order {
                let step = match seq {
                    0 => file("a"),
                    1 => data(b"12"),
                    2 => NO_DATA,
                    3 => data(b"345"),
                    5 => file("b"),
                    _ => FILE_END,
                };
                image.submit(Place::of(seq), HERE, step).unwrap();
            }
            image.submit(Place::of(7), HERE, IMAGE_END).unwrap();
            assert!(image.is_complete());
            let files = image.into_store().unwrap();
            assert_eq!(read(files, ["a", "b"]), [&b"12345"[..], b""]);
        }
    }

    #[test]
    fn files_that_take_turns_do_not_mix_and_the_last_of_a_name_counts() {
        let mut image = assembly();
        let steps = [
            file("a"),
            data(b"a1"),
            file("b"),
            data(b"b1"),
            file("a"),
            data(b"a2"),
            FILE_END,
            file("b"),
            FILE_END,
            file("b"),
            data(b"new"),
            FILE_END,
            IMAGE_END,
        ];
        for (seq, step) in (0..).zip(steps) {
            image.submit(Place::of(seq), HERE, step).unwrap();
        }
        let files = image.into_store().unwrap();
        assert_eq!(read(files, ["a", "b"]), [&b"a1a2"[..], b"new"]);
    }

    fn error_of(steps: Vec<(u64, Step)>) -> String {
        let mut image = assembly();
        for (seq, step) in steps {
            if let Err(error) = image.submit(Place::of(seq), HERE, step) {
                return format!("{error:#}");
            }
        }
        image
            .into_store()
            .map_or_else(|error| format!("{error:#}"), |_| "no error".into())
    }

    #[test]
    fn what_is_far_ahead_is_still_taken_when_nothing_else_helps() {
        let mut image = assembly();
        for seq in 1..=MANY_WAITING as u64 {
            assert!(!image.is_far_ahead(false));
            image.submit(Place::of(seq), HERE, FILE_END).unwrap();
        }
        assert!(image.is_far_ahead(false));
        assert!(!image.is_far_ahead(true));
    }

    #[test]
    fn every_disorder_has_its_own_error() {
        for (steps, text) in [
            (vec![(0, data(b"x"))], "before the name"),
            (vec![(0, FILE_END)], "before it was named"),
            (vec![(0, file("a")), (1, IMAGE_END)], "its file a does not"),
            (vec![(0, file("a")), (0, FILE_END)], "second time"),
            (vec![(1, FILE_END), (1, FILE_END)], "second time"),
            (vec![(0, IMAGE_END), (1, file("a"))], "follows the end"),
            (vec![(5, file("a")), (0, IMAGE_END)], "follows the end"),
        ] {
            let error = error_of(steps);
            assert!(error.contains(text), "{error}");
        }
    }
}
