//! The dump: which files CRIU has open, and which of them may be looked at now.
//!
//! The image is complete when every file was read to its end, and what CRIU has delivered is a
//! whole dump (see [`super::dump_check`]).
//!
//! **Turns.** A source that has something to do is busy, and has a turn in each round.
//! One that found no room waits. CRIU can have thousands of small files open, and behind a stalled
//! shard all of them wait: so in each round only the first few are tried again, and those that find
//! no room go to the end of the queue. A large file thus holds up no small one, for which there may
//! be room.
//!
//! CRIU sends some files a second time while the first is still open, and the last one counts. The
//! second then ends the first in the image before it begins, and what still comes of the first is
//! thrown away.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::os::fd::AsFd;

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFlags, PollTimeout};

use super::dump_check::DumpCheck;
use super::source::{Activity, Owner, Source};
use crate::criu::{Connection, Message};
use crate::format::ImageName;
use crate::os::descriptor::poll;
use crate::os::pipe::ReadEnd;

/// Sources that are tried again in a round, of those that found no room.
const WAITING_PER_ROUND: usize = 16;

/// Prepares an external file.
pub(super) fn external_file(name: ImageName, pipe: ReadEnd) -> Result<Source> {
    let typed = pipe.as_fd().try_clone_to_owned();
    let typed = typed.with_context(|| format!("capturing {name}"))?;
    let mut source = Source::new(name, pipe, Owner::External)?;
    // The source has opened the pipe anew. A FIFO then tells nothing of writers that were gone
    // before.
    let events = poll(typed, PollFlags::empty(), PollTimeout::ZERO)?;
    source.has_ended = events.contains(PollFlags::POLLHUP);
    Ok(source)
}

/// Takes what CRIU says: the name of a file, and then its pipe, which makes a source of the two.
pub(super) fn file_of_criu(
    connection: &mut Connection,
    message: Message,
) -> Result<Option<Source>> {
    match message {
        Message::Request(name) => {
            let name = ImageName::new(&name)
                .with_context(|| format!("{} sent a file named {name:?}", connection.peer))?;
            connection.expect_pipe(name);
            Ok(None)
        }
        Message::Pipe(name, fd) => {
            let pipe = ReadEnd::new(fd)
                .with_context(|| format!("{} sent something wrong for {name}", connection.peer))?;
            Source::new(name, pipe, Owner::Criu).map(Some)
        }
    }
}

/// The files of one image.
#[derive(Default)]
pub(super) struct Dump {
    /// Files that are not complete in the image, by their numbers, and so in the order in which
    /// they were opened.
    pub(super) sources: BTreeMap<u64, Source>,
    by_name: HashMap<ImageName, u64>,
    /// Names of external files, which may come later.
    pub(super) external_names: Vec<ImageName>,
    next_id: u64,
    /// The sources that have something to do.
    busy: Vec<u64>,
    /// Those that found no room, in the order in which they are tried again.
    waiting: VecDeque<u64>,
    /// How many files may still bring something, and how many of these are CRIU's.
    pub(super) open_files: usize,
    open_of_criu: usize,
    pub(super) dump_check: DumpCheck,
}

impl Dump {
    /// Starts a file. One of the same name that is not complete yet is replaced by it.
    ///
    /// # Errors
    /// When CRIU sends a file that has the name of an external one.
    pub(super) fn open(&mut self, mut source: Source) -> Result<&Source> {
        let name = source.name.clone();
        ensure!(
            source.owner == Owner::External || !self.external_names.contains(&name),
            "capturing {name}: CRIU sends a file of this name too; give the external file another name"
        );
        let id = self.next_id;
        self.next_id += 1;
        source.id = id;
        self.open_files += 1;
        self.open_of_criu += usize::from(source.owner == Owner::Criu);
        if let Some(earlier) = self.by_name.insert(name, id)
            && let Some(replaced) = self.sources.get_mut(&earlier)
        {
            source.restarts = replaced.is_named || replaced.restarts;
            replaced.is_replaced = true;
            replaced.buffered.clear();
            if replaced.is_open() {
                self.wake(earlier, false);
            } else {
                self.sources.remove(&earlier);
            }
        }
        Ok(self.sources.entry(id).or_insert(source))
    }

    /// True while a file of CRIU's may still bring something.
    pub(super) fn criu_has_open_files(&self) -> bool {
        self.open_of_criu > 0
    }

    /// Gives a source a turn, as something has changed about its pipe, which holds the last of it
    /// if it has ended.
    pub(super) fn wake(&mut self, id: u64, has_ended: bool) {
        if let Some(source) = self.sources.get_mut(&id) {
            source.has_ended |= has_ended;
            if !source.is_queued && source.is_open() {
                source.is_queued = true;
                self.busy.push(id);
            }
        }
    }

    /// Gives all sources a turn.
    pub(super) fn wake_all(&mut self) {
        for id in self.sources.keys().copied().collect::<Vec<_>>() {
            self.wake(id, false);
        }
    }

    /// The sources of the next round: those that have something to do, and those that have waited
    /// longest.
    pub(super) fn take_round(&mut self) -> Vec<u64> {
        let waiting = self.waiting.len().min(WAITING_PER_ROUND);
        let longest = self.waiting.drain(..waiting);
        longest.chain(std::mem::take(&mut self.busy)).collect()
    }

    /// The first source of which the buffer has something, or the end, and that no other one has
    /// replaced.
    pub(super) fn first_buffered(&mut self) -> Option<&mut Source> {
        self.sources.values_mut().find(|source| {
            !source.is_replaced && (!source.is_open() || !source.buffered.is_empty())
        })
    }

    /// Queues a source after its turn. One that brings nothing more is recorded, and its pipe
    /// closed.
    pub(super) fn end_turn(&mut self, id: u64, activity: Activity) {
        let Some(source) = self.sources.get_mut(&id) else {
            return;
        };
        source.is_queued = matches!(activity, Activity::NoRoom | Activity::Busy);
        match activity {
            Activity::Idle => {}
            Activity::NoRoom => self.waiting.push_back(id),
            Activity::Busy => self.busy.push(id),
            Activity::Complete => {
                source.pipe = None;
                self.open_files -= 1;
                if source.owner == Owner::Criu {
                    self.open_of_criu -= 1;
                    if !source.is_replaced {
                        self.dump_check.record(source);
                    }
                }
            }
        }
    }

    /// Forgets a source that is complete in the image, or whose file does not count.
    pub(super) fn remove(&mut self, id: u64) {
        if let Some(source) = self.sources.remove(&id)
            && self.by_name.get(&source.name) == Some(&id)
        {
            self.by_name.remove(&source.name);
        }
    }

    /// How many files CRIU has not closed.
    pub(super) fn unclosed(&self) -> usize {
        let is_unclosed = |source: &&Source| source.owner == Owner::Criu && !source.has_ended;
        self.sources.values().filter(is_unclosed).count()
    }
}
