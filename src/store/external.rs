//! External files, in front of another store: their data goes to their readers' pipes.
//!
//! Data that a reader does not take is held, and never stops the image: a supervisor may read a
//! second external file before the first. A reader that is slow, but takes something now and then,
//! is waited for once [`MOST_BEHIND`] are held. A pipe is closed as soon as its file's own end was
//! reached, because supervisors wait for the reader's end while the image still comes in.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::transfer::{FileBody, Round, Transfer, Transfers};
use super::{Ahead, FileData, Piece, Store};
use crate::format::ImageName;
use crate::os::pipe::WriteEnd;
use crate::os::poller::{Poller, Watched};

/// Bytes that are held for readers before the image waits for them.
const MOST_BEHIND: u64 = 4 << 20;

/// A reader that has taken nothing for longer than this is not waited for.
const AT_WORK: Duration = Duration::from_millis(200);

/// A file of the image: an external one, by its number, or one of the store behind.
pub(crate) enum File<F> {
    External(usize),
    Stored(F),
}

#[derive(Debug)]
struct ExternalFile {
    name: ImageName,
    has_begun: bool,
}

/// A store with external files in front of it, and the pipes to their readers.
pub(crate) struct External<S> {
    pub(crate) behind: S,
    files: Vec<ExternalFile>,
    /// Under the numbers of their files, until all is sent.
    transfers: Transfers,
}

impl<S> External<S> {
    /// Sends each file that `files` names into its pipe.
    ///
    /// # Errors
    /// Those of measuring a pipe.
    pub(crate) fn new(behind: S, files: Vec<(ImageName, WriteEnd)>) -> Result<Self> {
        let mut transfers = Transfers::new(Watched::External);
        let mut all = Vec::new();
        for (name, pipe) in files {
            let transfer = Transfer::new(name.clone(), pipe, FileBody::default())
                .with_context(|| format!("preparing {name}"))?;
            transfers.start(transfer);
            let has_begun = false;
            all.push(ExternalFile { name, has_begun });
        }
        Ok(Self {
            behind,
            files: all,
            transfers,
        })
    }

    /// The number of the external file of this name, which begins.
    ///
    /// # Errors
    /// When it had begun before.
    fn begin(&mut self, name: &ImageName) -> Result<Option<usize>> {
        let Some(number) = self.files.iter().position(|file| file.name == *name) else {
            return Ok(None);
        };
        ensure!(
            !std::mem::replace(&mut self.files[number].has_begun, true),
            "the image contains the external file {name} twice, \
             and its first contents are handed out already"
        );
        Ok(Some(number))
    }

    /// Adds to what is sent of a file, unless its reader has left.
    ///
    /// # Errors
    /// Those of `splice`; none for pipes of ours.
    fn add(&mut self, number: usize, more: FileBody) -> Result<()> {
        match self.transfers.get_mut(number as u64) {
            Some(transfer) => Ok(transfer.add(more)?),
            None => Ok(()),
        }
    }

    /// Fails if an external file that was asked for is not in an image, all of whose files have
    /// begun.
    pub(crate) fn check_all_begun(&self) -> Result<()> {
        let missing = self.files.iter().filter(|file| !file.has_begun);
        let mut missing: Vec<_> = missing.map(|file| file.name.as_str()).collect();
        missing.sort_unstable();
        ensure!(
            missing.is_empty(),
            "external files: the image has no file named {}",
            missing.join(", ")
        );
        Ok(())
    }

    /// Notes that a pipe may have room again.
    pub(crate) fn made_room(&mut self, number: u64) {
        self.transfers.made_room(number, false);
    }

    /// Sends what the pipes take, which `poller` watches.
    ///
    /// # Errors
    /// When a reader is gone before it had all of its file.
    pub(crate) fn send(&mut self, poller: &Poller) -> Result<Round> {
        let round = self.transfers.send(poller)?;
        if let Some(name) = round.left_by_readers.first() {
            bail!("sending {name}: the reader of this external file went away before its end");
        }
        Ok(round)
    }

    /// True if much is held for readers that are at work.
    pub(crate) fn is_behind(&self) -> bool {
        let at_work = self
            .transfers
            .iter()
            .filter(|transfer| transfer.took.is_some_and(|took| took.elapsed() < AT_WORK));
        at_work.map(Transfer::left).sum::<u64>() > MOST_BEHIND
    }

    /// True if a file's reader waits for something that has not come.
    pub(crate) fn is_starving(&self, number: usize) -> bool {
        let transfer = self.transfers.get(number as u64);
        transfer.is_some_and(Transfer::is_starving)
    }

    /// True if readers still have to take something that is here.
    pub(crate) fn is_sending(&self) -> bool {
        let mut files = (0..).zip(&self.files);
        files.any(|(number, file)| file.has_begun && self.transfers.get(number).is_some())
    }
}

impl<S: Store> External<S> {
    /// The place in which early data waits while `current` is the file whose turn it is. While it
    /// is an external one, early data may be more of it, which would fill the memory to no avail.
    pub(crate) fn ahead(&self, current: Option<&File<S::File>>) -> Ahead {
        match current {
            Some(File::External(_)) => Ahead::Shard,
            None | Some(File::Stored(_)) => S::AHEAD,
        }
    }
}

impl<S: Store> Store for External<S> {
    type File = File<S::File>;

    const AHEAD: Ahead = S::AHEAD;

    fn create(&mut self, name: &ImageName) -> Result<Self::File> {
        match self.begin(name)? {
            Some(number) => Ok(File::External(number)),
            None => self.behind.create(name).map(File::Stored),
        }
    }

    fn append(&mut self, file: &mut Self::File, piece: Piece) -> Result<()> {
        match file {
            File::External(number) => {
                let mut body = FileBody::default();
                body.data.push(piece)?;
                self.add(*number, body)
            }
            File::Stored(file) => self.behind.append(file, piece),
        }
    }

    fn finish(&mut self, name: ImageName, file: Self::File) -> Result<()> {
        match file {
            File::External(number) => {
                let data = FileData::default();
                let is_whole = true;
                self.add(number, FileBody { data, is_whole })
            }
            File::Stored(file) => self.behind.finish(name, file),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::os::pipe::{self, Moved};
    use crate::store::catalog::Catalog;

    #[test]
    fn a_reader_that_waits_for_the_second_file_gets_it_before_the_first_is_read() {
        let (first_read, first_write) = pipe::new().unwrap();
        let (second_read, second_write) = pipe::new().unwrap();
        let [first, second] = ["first", "second"].map(|name| ImageName::new(name).unwrap());
        let files = vec![(first.clone(), first_write), (second.clone(), second_write)];
        let poller = Poller::new().unwrap();
        let mut store = External::new(Catalog::new(), files).unwrap();
        let large = vec![1; 8 << 20];

        let mut file = store.create(&first).unwrap();
        store.append(&mut file, Piece::in_memory(&large)).unwrap();
        store.finish(first, file).unwrap();
        store.send(&poller).unwrap();
        let mut file = store.create(&second).unwrap();
        store.append(&mut file, Piece::in_memory(b"small")).unwrap();
        store.finish(second, file).unwrap();
        store.send(&poller).unwrap();

        let mut buffer = [0; 100];
        assert_eq!(
            pipe::read(&second_read, &mut buffer).unwrap(),
            Moved::Bytes(5)
        );
        // A process that another test is starting has the end open until its program runs.
        while pipe::read(&second_read, &mut buffer).unwrap() != Moved::End {}
        assert!(store.is_sending());
        let mut taken = 0;
        let mut buffer = vec![0; 1 << 20];
        while taken < large.len() {
            if let Moved::Bytes(bytes) = pipe::read(&first_read, &mut buffer).unwrap() {
                taken += bytes;
            }
            store.made_room(0);
            store.send(&poller).unwrap();
        }
        assert!(!store.is_sending());
        while pipe::read(&first_read, &mut buffer).unwrap() != Moved::End {}
        store.check_all_begun().unwrap();
    }
}
