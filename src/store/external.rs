//! External files, in front of another store: what belongs to them goes to their readers' pipes.
//!
//! What a reader does not take is held, and never stops the image: a supervisor may read a second
//! external file before the first. A reader that is slow, but takes something now and then, is
//! waited for once [`MOST_BEHIND`] are held. A pipe is closed as soon as its file's own end was
//! reached, because supervisors wait for the reader's end while the image still comes in.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::transfer::{Progress, Transfer};
use super::{Ahead, Contents, Piece, Store, Target};
use crate::format::ImageName;
use crate::os::pipe::{self, WriteEnd};

/// What is held for readers before the image waits for them, in bytes.
const MOST_BEHIND: usize = 4 << 20;

/// How long ago a reader that is waited for has taken something.
const AT_WORK: Duration = Duration::from_millis(200);

/// A file of the image: an external one, by its number, or one of the store behind.
pub(crate) enum File<F> {
    External(usize),
    Stored(F),
}

/// How far an external file has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// It did not begin yet.
    Awaited,
    Begun,
    /// All of it is here.
    Complete,
}

#[derive(Debug)]
struct Outlet {
    name: ImageName,
    state: State,
    /// What was not sent yet; `None` when all of it was, and the pipe is closed.
    transfer: Option<Transfer>,
    /// The pipe is full: it is left alone until its reader makes room.
    full: bool,
    /// When its reader last took something.
    took: Option<Instant>,
}

/// The external files, and the pipes to their readers.
#[derive(Debug)]
pub(crate) struct ExternalOutputs {
    all: Vec<Outlet>,
    /// The files that were sent to their ends since this was asked for.
    sent_whole: Vec<ImageName>,
    /// Bytes that were sent.
    sent: u64,
}

impl ExternalOutputs {
    /// Sends each file that `files` names into its pipe.
    ///
    /// # Errors
    /// Those of measuring a pipe.
    pub(crate) fn new(files: Vec<(ImageName, WriteEnd)>) -> Result<Self> {
        let outlets = files.into_iter().map(|(name, pipe)| {
            let slots = pipe::slots(&pipe).with_context(|| format!("preparing {name}"))?;
            Ok(Outlet {
                name,
                state: State::Awaited,
                transfer: Some(Transfer::open(pipe, slots, Contents::default())),
                full: false,
                took: None,
            })
        });
        Ok(Self {
            all: outlets.collect::<Result<_>>()?,
            sent_whole: Vec::new(),
            sent: 0,
        })
    }

    /// The number of the external file of this name, which begins.
    ///
    /// # Errors
    /// When it had begun before.
    pub(crate) fn begin(&mut self, name: &ImageName) -> Result<Option<usize>> {
        let Some(number) = self.all.iter().position(|outlet| outlet.name == *name) else {
            return Ok(None);
        };
        match std::mem::replace(&mut self.all[number].state, State::Begun) {
            State::Awaited => Ok(Some(number)),
            State::Begun | State::Complete => bail!(
                "the image contains the external file {name} twice, \
                 and its first contents are handed out already"
            ),
        }
    }

    /// Adds to what is sent of a file.
    ///
    /// # Errors
    /// Those of `splice`; none for pipes of ours.
    pub(crate) fn append(&mut self, number: usize, data: Piece) -> Result<()> {
        match &mut self.all[number].transfer {
            Some(transfer) => Ok(transfer.add(data)?),
            None => Ok(()),
        }
    }

    /// All of a file is here.
    pub(crate) fn finish(&mut self, number: usize) {
        let outlet = &mut self.all[number];
        outlet.state = State::Complete;
        if let Some(transfer) = &mut outlet.transfer {
            transfer.close();
        }
    }

    /// Fails if an external file that was asked for is not among the `names` of the image's files.
    pub(crate) fn check_complete_after<'a>(
        &self,
        names: impl Iterator<Item = &'a ImageName> + Clone,
    ) -> Result<()> {
        let is_missing = |outlet: &&Outlet| !names.clone().any(|name| *name == outlet.name);
        Self::check_none(self.all.iter().filter(is_missing))
    }

    /// Fails if an external file that was asked for is not in the image.
    pub(crate) fn check_complete(&self) -> Result<()> {
        Self::check_none(
            self.all
                .iter()
                .filter(|outlet| outlet.state != State::Complete),
        )
    }

    fn check_none<'a>(missing: impl Iterator<Item = &'a Outlet>) -> Result<()> {
        let mut missing: Vec<_> = missing.map(|outlet| outlet.name.to_string()).collect();
        missing.sort();
        if !missing.is_empty() {
            bail!(
                "external files: the image has no file named {}",
                missing.join(", ")
            );
        }
        Ok(())
    }

    /// The pipes that are open, by their numbers.
    pub(crate) fn pipes(&self) -> impl Iterator<Item = (usize, &WriteEnd)> {
        let numbered = self.all.iter().enumerate();
        numbered.filter_map(|(number, outlet)| Some((number, outlet.transfer.as_ref()?.pipe())))
    }

    /// Notes that a pipe may have room again.
    pub(crate) fn made_room(&mut self, number: usize) {
        self.all[number].full = false;
    }

    /// Notes that all pipes may have room again.
    pub(crate) fn try_again(&mut self) {
        self.all.iter_mut().for_each(|outlet| outlet.full = false);
    }

    /// Sends what the pipes take, and tells how many slots were filled, and how many the pipes have
    /// that took something.
    ///
    /// # Errors
    /// When a reader is gone before it had all of its file.
    pub(crate) fn send(&mut self) -> Result<(usize, usize)> {
        let (mut filled, mut room) = (0, 0);
        for outlet in self.all.iter_mut().filter(|outlet| !outlet.full) {
            let Some(transfer) = &mut outlet.transfer else {
                continue;
            };
            let before = transfer.left();
            let progress = transfer
                .send()
                .with_context(|| format!("writing {}", outlet.name))?;
            self.sent += (before - transfer.left()) as u64;
            match progress {
                Progress::Done => {
                    outlet.transfer = None;
                    self.sent_whole.push(outlet.name.clone());
                }
                Progress::Waiting => {}
                Progress::Partial { slots } => {
                    outlet.full = true;
                    if slots > 0 {
                        outlet.took = Some(Instant::now());
                        filled += slots;
                        room += transfer.slots();
                    }
                }
                Progress::ReaderGone => bail!(
                    "writing {}: the reader of this external file went away before its end",
                    outlet.name
                ),
            }
        }
        Ok((filled, room))
    }

    /// The files that were sent to their ends since the last time.
    pub(crate) fn take_sent_whole(&mut self) -> Vec<ImageName> {
        std::mem::take(&mut self.sent_whole)
    }

    /// Whether much is held for readers that are at work.
    pub(crate) fn is_behind(&self) -> bool {
        let at_work = self
            .all
            .iter()
            .filter(|outlet| outlet.took.is_some_and(|took| took.elapsed() < AT_WORK));
        let held = at_work.filter_map(|outlet| Some(outlet.transfer.as_ref()?.left()));
        held.sum::<usize>() > MOST_BEHIND
    }

    /// Bytes that readers have taken.
    pub(crate) fn sent(&self) -> u64 {
        self.sent
    }

    /// Whether a file's reader waits for something that has not come.
    pub(crate) fn is_starving(&self, number: usize) -> bool {
        let transfer = self.all[number].transfer.as_ref();
        transfer.is_some_and(|transfer| transfer.is_open() && transfer.left() == 0)
    }

    /// Whether readers still have to take something of what is here.
    pub(crate) fn is_sending(&self) -> bool {
        let mut begun = self
            .all
            .iter()
            .filter(|outlet| outlet.state != State::Awaited);
        begun.any(|outlet| outlet.transfer.is_some())
    }
}

/// A store with external files in front of it.
pub(crate) struct External<S> {
    behind: S,
    outlets: ExternalOutputs,
}

impl<S> External<S> {
    pub(crate) fn new(behind: S, outlets: ExternalOutputs) -> Self {
        Self { behind, outlets }
    }

    pub(crate) fn outlets(&mut self) -> &mut ExternalOutputs {
        &mut self.outlets
    }

    /// # Errors
    /// When an external file that was asked for is not in the image.
    pub(crate) fn into_behind(self) -> Result<S> {
        self.outlets.check_complete()?;
        Ok(self.behind)
    }
}

impl<S: Store> Store for External<S> {
    type File = File<S::File>;

    /// While an external file is current, what is ahead may be more of it, which would fill the
    /// memory to no avail.
    fn ahead(&self, current: Option<&Self::File>) -> Ahead {
        match current {
            None => self.behind.ahead(None),
            Some(File::Stored(file)) => self.behind.ahead(Some(file)),
            Some(File::External(_)) => Ahead::Shard,
        }
    }

    fn create(&mut self, name: &ImageName) -> Result<Self::File> {
        match self.outlets.begin(name)? {
            Some(number) => Ok(File::External(number)),
            None => self.behind.create(name).map(File::Stored),
        }
    }

    fn target<'a>(&'a self, file: &'a Self::File) -> Target<'a> {
        match file {
            File::External(_) => Target::Piece,
            File::Stored(file) => self.behind.target(file),
        }
    }

    fn written(&mut self, file: &mut Self::File, bytes: u64) {
        match file {
            File::External(_) => {}
            File::Stored(file) => self.behind.written(file, bytes),
        }
    }

    fn append(&mut self, file: &mut Self::File, data: Piece) -> Result<()> {
        match file {
            File::External(number) => self.outlets.append(*number, data),
            File::Stored(file) => self.behind.append(file, data),
        }
    }

    fn finish(&mut self, name: ImageName, file: Self::File) -> Result<()> {
        match file {
            File::External(number) => {
                self.outlets.finish(number);
                Ok(())
            }
            File::Stored(file) => self.behind.finish(name, file),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::pipe::Moved;
    use crate::store::catalog::Catalog;

    #[test]
    fn a_reader_that_waits_for_the_second_file_gets_it_before_the_first_is_read() {
        let (first_read, first_write) = pipe::new().unwrap();
        let (second_read, second_write) = pipe::new().unwrap();
        let [first, second] = ["first", "second"].map(|name| ImageName::new(name).unwrap());
        let files = vec![(first.clone(), first_write), (second.clone(), second_write)];
        let mut store = External::new(Catalog::new(), ExternalOutputs::new(files).unwrap());
        let large = vec![1; 8 << 20];

        let mut file = store.create(&first).unwrap();
        store.append(&mut file, Piece::in_memory(&large)).unwrap();
        store.finish(first, file).unwrap();
        store.outlets.send().unwrap();
        let mut file = store.create(&second).unwrap();
        store.append(&mut file, Piece::in_memory(b"small")).unwrap();
        store.finish(second, file).unwrap();
        store.outlets.send().unwrap();

        let mut buffer = [0; 100];
        assert_eq!(
            pipe::read(&second_read, &mut buffer).unwrap(),
            Moved::Bytes(5)
        );
        assert_eq!(pipe::read(&second_read, &mut buffer).unwrap(), Moved::End);
        assert!(store.outlets.is_sending());
        let mut taken = 0;
        let mut buffer = vec![0; 1 << 20];
        while taken < large.len() {
            if let Moved::Bytes(bytes) = pipe::read(&first_read, &mut buffer).unwrap() {
                taken += bytes;
            }
            store.outlets.made_room(0);
            store.outlets.send().unwrap();
        }
        assert!(!store.outlets.is_sending());
        assert_eq!(pipe::read(&first_read, &mut buffer).unwrap(), Moved::End);
        store.into_behind().unwrap();
    }
}
