//! Makes files of a store out of the steps of an image, each in its turn.
//!
//! Errors in the order or the contents of an image are found here, and blamed on a shard and an
//! offset.

use std::collections::HashMap;
use std::fmt::Display;
use std::rc::Rc;

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::order::{Next, Order, Place, Reading};
use crate::format::{Body, ImageName};
use crate::store::external::External;
use crate::store::{Ahead, Piece, Store};

/// One step in the making of an image.
#[derive(Debug)]
pub(crate) enum Step {
    /// A marker that no data follows.
    Marker(Body),
    /// Some of the data behind a marker, and the kind of step that follows it.
    Data(Piece, Next),
}

/// An image in the making, to which a receiver submits its steps.
pub(crate) trait Image {
    type Store: Store;

    /// One of the shards is an index that the image is laid out by.
    const HAS_INDEX: bool;

    fn new(store: External<Self::Store>) -> Self;

    fn store(&mut self) -> &mut External<Self::Store>;

    /// The first place that is missing. `None` while only the index can tell.
    fn next(&self) -> Option<Place>;

    /// True if nothing is missing.
    fn is_complete(&self) -> bool;

    /// The place in which early data waits.
    fn ahead(&self) -> Ahead;

    /// Takes a step.
    ///
    /// # Errors
    /// When the step makes no sense at its place, or the store fails.
    fn submit(&mut self, place: Place, position: Position, step: Step) -> Result<()>;

    /// True once all of the index was read.
    fn is_index_read(&self) -> bool {
        false
    }

    /// Finds out from the whole index what is missing of its files.
    ///
    /// # Errors
    /// When that makes no sense.
    fn lay_out(&mut self) -> Result<()> {
        Ok(())
    }

    /// True if it is certain which files there are.
    fn is_laid_out(&self) -> bool {
        self.is_complete()
    }

    /// True if there is something that CRIU cannot do without, and does not get yet.
    fn keeps_back(&self) -> bool {
        false
    }

    /// The data to read for these files, whose readers have nothing left, and for external files
    /// with such readers: up to the last of the markers that they need next.
    fn wanted(&self, _names: &[ImageName]) -> Reading {
        Reading::All
    }

    /// Ends an image that has proved whole: gives CRIU what was kept back.
    ///
    /// # Errors
    /// When something is missing or left over after all.
    fn finish(&mut self) -> Result<()>;
}

/// The origin of a step.
#[derive(Debug, Clone)]
pub(crate) struct Position {
    /// The name of the shard in errors.
    pub(crate) shard: Rc<str>,
    /// Bytes of the shard up to and with the step.
    pub(crate) offset: u64,
    /// The shard is the index that the image is laid out by.
    pub(crate) is_of_index: bool,
}

impl Position {
    pub(crate) fn error(&self, what: impl Display) -> anyhow::Error {
        anyhow!("reading {} before byte {}: {what}", self.shard, self.offset)
    }
}

/// The files of an image, as its markers name and end them.
pub(crate) struct Files<S: Store> {
    pub(crate) store: S,
    current: Option<(ImageName, S::File)>,
    /// Files that are neither complete nor current.
    open: HashMap<ImageName, S::File>,
    pub(super) is_complete: bool,
}

impl<S: Store> Files<S> {
    pub(crate) fn new(store: S) -> Self {
        Self {
            store,
            current: None,
            open: HashMap::new(),
            is_complete: false,
        }
    }

    /// The file that data belongs to.
    pub(crate) fn current(&self) -> Option<&S::File> {
        self.current.as_ref().map(|(_, file)| file)
    }

    /// Takes the step whose turn it is. Returns what comes next.
    ///
    /// # Errors
    /// When the step makes no sense, or the store fails.
    pub(crate) fn apply(&mut self, position: &Position, step: Step) -> Result<Next> {
        ensure!(
            !self.is_complete,
            position.error("something follows the end of the image")
        );
        match step {
            Step::Marker(Body::File(name)) => {
                self.open.extend(self.current.take());
                let file = match self.open.remove(&name) {
                    Some(file) => file,
                    None => self.store.create(&name)?,
                };
                self.current = Some((name, file));
            }
            Step::Marker(Body::Data(_)) | Step::Data(..) => {
                let Some((name, file)) = &mut self.current else {
                    bail!(position.error("data comes before the name of its file"));
                };
                if let Step::Data(piece, next) = step {
                    self.store
                        .append(file, piece)
                        .with_context(|| format!("writing {name}"))?;
                    return Ok(next);
                }
            }
            Step::Marker(Body::FileEnd) => {
                let Some((name, file)) = self.current.take() else {
                    bail!(position.error("a file ends before it was named"));
                };
                self.store.finish(name, file)?;
            }
            Step::Marker(Body::ImageEnd) => {
                let current = self.current.iter().map(|(name, _)| name);
                if let Some(name) = current.chain(self.open.keys()).min() {
                    bail!(
                        position
                            .error(format_args!("the image ends, but its file {name} does not"))
                    );
                }
                self.is_complete = true;
            }
        }
        Ok(Next::Marker)
    }
}

/// An image without an index, all of whose steps come in one order.
pub(crate) struct Assembly<S: Store> {
    files: Files<External<S>>,
    order: Order<(Position, Step)>,
}

impl<S: Store> Image for Assembly<S> {
    type Store = S;

    const HAS_INDEX: bool = false;

    fn new(store: External<S>) -> Self {
        Self {
            files: Files::new(store),
            order: Order::new(),
        }
    }

    fn store(&mut self) -> &mut External<S> {
        &mut self.files.store
    }

    fn next(&self) -> Option<Place> {
        Some(self.order.next())
    }

    fn is_complete(&self) -> bool {
        self.files.is_complete
    }

    fn ahead(&self) -> Ahead {
        self.files.store.ahead(self.files.current())
    }

    fn submit(&mut self, place: Place, position: Position, step: Step) -> Result<()> {
        self.order
            .insert(place, (position.clone(), step))
            .map_err(|taken| position.error(taken))?;
        while let Some((position, step)) = self.order.pop() {
            self.order.pass(self.files.apply(&position, step)?);
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        if let Some((place, (position, _))) = self.order.pop_first() {
            bail!(position.error(format_args!(
                "marker {} follows the end of the image",
                place.seq
            )));
        }
        self.files.store.check_all_begun()
    }
}

impl<S: Store> Assembly<S> {
    pub(crate) fn into_store(self) -> S {
        self.files.store.behind
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::catalog::Catalog;

    fn here() -> Position {
        Position {
            shard: "shard fd 0".into(),
            offset: 0,
            is_of_index: false,
        }
    }

    fn name(name: &str) -> ImageName {
        ImageName::new(name).unwrap()
    }

    fn file(text: &str) -> Step {
        Step::Marker(Body::File(name(text)))
    }

    fn data(bytes: &[u8]) -> Step {
        Step::Data(Piece::in_memory(bytes), Next::Marker)
    }

    const NO_DATA: Step = Step::Marker(Body::Data(0));
    const FILE_END: Step = Step::Marker(Body::FileEnd);
    const IMAGE_END: Step = Step::Marker(Body::ImageEnd);

    fn assembly() -> Assembly<Catalog> {
        Assembly::new(External::new(Catalog::new(), Vec::new()).unwrap())
    }

    fn read<const N: usize>(mut image: Assembly<Catalog>, names: [&str; N]) -> [Vec<u8>; N] {
        image.finish().unwrap();
        let mut files = image.into_store();
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
                image.submit(Place::of(seq), here(), step).unwrap();
            }
            image.submit(Place::of(7), here(), IMAGE_END).unwrap();
            assert!(image.is_complete());
            assert_eq!(read(image, ["a", "b"]), [&b"12345"[..], b""]);
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
            image.submit(Place::of(seq), here(), step).unwrap();
        }
        assert_eq!(read(image, ["a", "b"]), [&b"a1a2"[..], b"new"]);
    }

    fn error_of(steps: Vec<(u64, Step)>) -> String {
        let mut image = assembly();
        let mut steps = steps.into_iter();
        let made = steps.try_for_each(|(seq, step)| image.submit(Place::of(seq), here(), step));
        let error = made.and_then(|()| image.finish()).unwrap_err();
        format!("{error:#}")
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
