//! External files, in front of another store: what belongs to them goes to their readers' pipes.
//!
//! What a reader does not take is held, and never stops the image: a supervisor may read a second
//! external file before the first. A reader that is slow, but takes something now and then, is
//! waited for once [`MOST_BEHIND`] are held. A pipe is closed as soon as its file's own end was
//! reached, because supervisors wait for the reader's end while the image still comes in.

use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::transfer::{FileBody, Remaining, Round, Transfer, Transfers};
use super::{Ahead, FileData, Piece, Store, Target};
use crate::format::ImageName;
use crate::os::pipe::{self, WriteEnd};
use crate::os::poller::{Poller, Watched};

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

/// The external files, and the pipes to their readers.
#[derive(Debug)]
pub(crate) struct ExternalOutputs {
    files: Vec<(ImageName, State)>,
    /// Under the numbers of their files, until all is sent.
    transfers: Transfers,
    /// Bytes that were sent.
    sent: u64,
}

impl ExternalOutputs {
    /// Sends each file that `files` names into its pipe, which `poller` watches.
    ///
    /// # Errors
    /// Those of measuring and of watching a pipe.
    pub(crate) fn new(files: Vec<(ImageName, WriteEnd)>, poller: &Poller) -> Result<Self> {
        let mut transfers = Transfers::new(Watched::External);
        let mut names = Vec::new();
        for (name, pipe) in files {
            let slots = pipe::slots(&pipe).with_context(|| format!("preparing {name}"))?;
            let nothing_yet = FileBody {
                data: Remaining::Once(FileData::default()),
                is_whole: false,
            };
            let transfer = Transfer::new(name.clone(), pipe, slots, nothing_yet);
            transfers.start(transfer, poller, &mut Round::default())?;
            names.push((name, State::Awaited));
        }
        Ok(Self {
            files: names,
            transfers,
            sent: 0,
        })
    }

    /// The number of the external file of this name, which begins.
    ///
    /// # Errors
    /// When it had begun before.
    pub(crate) fn begin(&mut self, name: &ImageName) -> Result<Option<usize>> {
        let Some(number) = self.files.iter().position(|(file, _)| file == name) else {
            return Ok(None);
        };
        match std::mem::replace(&mut self.files[number].1, State::Begun) {
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
        match self.transfers.get_mut(number as u64) {
            Some(transfer) => Ok(transfer.add(data)?),
            None => Ok(()),
        }
    }

    /// All of a file is here.
    pub(crate) fn finish(&mut self, number: usize) {
        self.files[number].1 = State::Complete;
        if let Some(transfer) = self.transfers.get_mut(number as u64) {
            transfer.close();
        }
    }

    /// Fails if an external file that was asked for is not among the `names` of the image's files.
    pub(crate) fn check_complete_after<'a>(
        &self,
        names: impl Iterator<Item = &'a ImageName> + Clone,
    ) -> Result<()> {
        let is_missing = |file: &ImageName, _| !names.clone().any(|name| name == file);
        self.check_none(is_missing)
    }

    /// Fails if an external file that was asked for is not in the image.
    pub(crate) fn check_complete(&self) -> Result<()> {
        self.check_none(|_, state| state != State::Complete)
    }

    fn check_none(&self, is_missing: impl Fn(&ImageName, State) -> bool) -> Result<()> {
        let missing = self
            .files
            .iter()
            .filter(|(name, state)| is_missing(name, *state));
        let mut missing: Vec<_> = missing.map(|(name, _)| name.to_string()).collect();
        missing.sort();
        if !missing.is_empty() {
            bail!(
                "external files: the image has no file named {}",
                missing.join(", ")
            );
        }
        Ok(())
    }

    pub(crate) fn transfers(&mut self) -> &mut Transfers {
        &mut self.transfers
    }

    /// Sends what the pipes take.
    ///
    /// # Errors
    /// When a reader is gone before it had all of its file.
    pub(crate) fn send(&mut self) -> Result<Round> {
        let round = self.transfers.send()?;
        self.sent += round.freed;
        if let Some(name) = round.left_by_readers.first() {
            bail!("sending {name}: the reader of this external file went away before its end");
        }
        Ok(round)
    }

    /// Whether much is held for readers that are at work.
    pub(crate) fn is_behind(&self) -> bool {
        let at_work = self
            .transfers
            .iter()
            .filter(|transfer| transfer.took.is_some_and(|took| took.elapsed() < AT_WORK));
        at_work.map(Transfer::left).sum::<usize>() > MOST_BEHIND
    }

    /// Bytes that readers have taken.
    pub(crate) fn sent(&self) -> u64 {
        self.sent
    }

    /// Whether a file's reader waits for something that has not come.
    pub(crate) fn is_starving(&self, number: usize) -> bool {
        let transfer = self.transfers.get(number as u64);
        transfer.is_some_and(Transfer::is_starving)
    }

    /// Whether readers still have to take something of what is here.
    pub(crate) fn is_sending(&self) -> bool {
        let mut files = (0..).zip(&self.files);
        files.any(|(number, (_, state))| {
            *state != State::Awaited && self.transfers.get(number).is_some()
        })
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
        let outlets = ExternalOutputs::new(files, &Poller::new().unwrap()).unwrap();
        let mut store = External::new(Catalog::new(), outlets);
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
            store.outlets.transfers().made_room(0);
            store.outlets.send().unwrap();
        }
        assert!(!store.outlets.is_sending());
        assert_eq!(pipe::read(&first_read, &mut buffer).unwrap(), Moved::End);
        store.into_behind().unwrap();
    }
}
