//! Makes files of a store out of the steps of an image, each in its turn.
//!
//! Errors in the order or the contents of an image are found here, and blamed on a shard and an
//! offset.

use std::collections::HashMap;
use std::fmt::Display;
use std::fs::File;
use std::rc::Rc;

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::order::{AlreadyTaken, Next, Order, Place};
use crate::format::{Body, ImageName};
use crate::store::external::External;
use crate::store::{Ahead, Piece, Store};

/// One step in the making of the image.
#[derive(Debug)]
pub(crate) enum Step {
    /// A marker that no data follows.
    Marker(Body),
    /// Some of the data behind a marker, and whether more of it comes.
    Data(Piece, Next),
}

/// Where the data at some place goes.
pub(crate) enum Target<'a> {
    /// Nowhere yet: it should wait in its shard.
    Wait,
    /// Into memory or a pipe of ours, and from there to [`Image::submit`].
    Piece,
    /// To the end of this file, and then to [`Image::written`].
    File(&'a File, &'a ImageName),
}

/// What a receiver makes of the steps of an image.
pub(crate) trait Image {
    type Store: Store;

    fn store(&mut self) -> &mut External<Self::Store>;

    /// The first place that is missing. `None` while only the index can tell.
    fn next(&self) -> Option<Place>;

    /// Whether nothing is missing.
    fn is_complete(&self) -> bool;

    /// Where data waits whose turn has not come.
    fn ahead(&self) -> Ahead;

    fn target(&self, place: Place) -> Target<'_>;

    /// This number of bytes, at the place whose turn it was, went into the current file.
    ///
    /// # Errors
    /// As [`Image::submit`].
    fn written(&mut self, bytes: u64, next: Next) -> Result<()>;

    /// Takes a step.
    ///
    /// # Errors
    /// When the step makes no sense at its place, or the store fails.
    fn submit(&mut self, place: Place, position: Position, step: Step) -> Result<()>;
}

/// Where a step came from.
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
    is_complete: bool,
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

#[derive(Debug)]
struct Waiting {
    position: Position,
    step: Step,
}

/// An image in the making, all of whose steps have their turn.
pub(crate) struct Assembly<S: Store> {
    files: Files<External<S>>,
    order: Order<Waiting>,
}

impl<S: Store> Image for Assembly<S> {
    type Store = S;

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

    fn target(&self, place: Place) -> Target<'_> {
        if place != self.order.next() {
            return match self.ahead() {
                Ahead::Piece => Target::Piece,
                Ahead::Shard => Target::Wait,
            };
        }
        let current = self.files.current.as_ref();
        let file = current.and_then(|(name, file)| Some((name, self.files.store.target(file)?)));
        match file {
            Some((name, file)) => Target::File(file, name),
            // Data that belongs to no file is an error, which is found when it is applied.
            None => Target::Piece,
        }
    }

    fn written(&mut self, bytes: u64, next: Next) -> Result<()> {
        if let Some((_, file)) = &mut self.files.current {
            self.files.store.written(file, bytes);
        }
        self.pass(next)?;
        self.catch_up()
    }

    fn submit(&mut self, place: Place, position: Position, step: Step) -> Result<()> {
        if place == self.order.next() {
            self.apply(&position, step)?;
            return self.catch_up();
        }
        let blamed = position.clone();
        let waiting = Waiting { position, step };
        self.order.insert(place, waiting).map_err(|AlreadyTaken| {
            blamed.error(format_args!("marker {} comes a second time", place.seq))
        })
    }
}

impl<S: Store> Assembly<S> {
    pub(crate) fn new(store: External<S>) -> Self {
        Self {
            files: Files::new(store),
            order: Order::new(),
        }
    }

    fn catch_up(&mut self) -> Result<()> {
        while let Some(Waiting { position, step }) = self.order.pop() {
            self.apply(&position, step)?;
        }
        Ok(())
    }

    fn apply(&mut self, position: &Position, step: Step) -> Result<()> {
        let next = self.files.apply(position, step)?;
        self.pass(next)
    }

    fn pass(&mut self, next: Next) -> Result<()> {
        self.order
            .pass(next)
            .context("the image has more markers than can be counted")
    }

    /// Checks a complete image.
    ///
    /// # Errors
    /// When something was left over, and when a file that was asked for is not in the image.
    pub(crate) fn check(&mut self) -> Result<()> {
        if let Some((place, Waiting { position, .. })) = self.order.pop_first() {
            bail!(position.error(format_args!(
                "marker {} follows the end of the image",
                place.seq
            )));
        }
        self.files.store.outlets().check_all_begun()
    }

    pub(crate) fn into_store(self) -> S {
        self.files.store.into_behind()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::poller::Poller;
    use crate::store::catalog::Catalog;
    use crate::store::external::ExternalOutputs;

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
        let outlets = ExternalOutputs::new(Vec::new(), &Poller::new().unwrap()).unwrap();
        Assembly::new(External::new(Catalog::new(), outlets))
    }

    fn read<const N: usize>(mut image: Assembly<Catalog>, names: [&str; N]) -> [Vec<u8>; N] {
        image.check().unwrap();
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
        let error = made.and_then(|()| image.check()).unwrap_err();
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
