//! The dump: which files CRIU has open, and which of them may be looked at now.
//!
//! The image is complete when every file was read to its end, and what CRIU has delivered is a
//! whole dump (see [`super::dump_check`]).
//!
//! **Who is looked at.** A source that has something to do is busy, and has a turn in each round.
//! One that found no room waits. CRIU can have thousands of small files open, and behind a stalled
//! shard all of them wait: so in each round only the first few are tried again, and those that find
//! no room go to the end of the queue. A large file thus holds up no small one, for which there may
//! be room.
//!
//! CRIU sends some files a second time while the first is still open, and the last one counts. The
//! first is then ended in the image before the second begins, and what still comes of it is thrown
//! away.

use std::collections::{HashMap, VecDeque};
use std::fs::File;

use anyhow::{Context, Result, ensure};

use super::buffer::{Buffered, Copied};
use super::dump_check::DumpCheck;
use super::image_writer::{Activity, ImageWriter};
use super::source::{Owner, Source};
use crate::criu::{Connection, Message};
use crate::format::ImageName;
use crate::os::pipe::{self, Moved, ReadEnd};

/// Bytes thrown away at a time.
const DISCARD: usize = 1 << 20;

/// Prepares an external file.
pub(super) fn external_file(name: ImageName, pipe: ReadEnd) -> Result<Source> {
    let slots = pipe::slots(&pipe).with_context(|| format!("capturing {name}"))?;
    Ok(Source::new(name, pipe, slots, Owner::External))
}

/// Takes what CRIU says: the name of a file, which is kept in `requested`, and then its pipe, which
/// makes a source of the two.
pub(super) fn file_of_criu(
    connection: &mut Connection,
    requested: &mut Option<ImageName>,
    message: Message,
) -> Result<Option<Source>> {
    match message {
        Message::Request(name) => {
            let name = ImageName::new(&name)
                .with_context(|| format!("{} sent a file named {name:?}", connection.peer()))?;
            *requested = Some(name);
            connection.expect_descriptor();
            Ok(None)
        }
        Message::Descriptor(fd) => {
            let name = requested
                .take()
                .context("a descriptor came without a name")?;
            let (pipe, slots) = ReadEnd::measured(fd).with_context(|| {
                format!("{} sent something wrong for {name}", connection.peer())
            })?;
            Ok(Some(Source::new(name, pipe, slots, Owner::Criu)))
        }
    }
}

/// The files of one image.
#[derive(Default)]
pub(super) struct Dump {
    sources: HashMap<u64, Source>,
    by_name: HashMap<ImageName, u64>,
    external_names: Vec<ImageName>,
    next_id: u64,
    /// The sources that have something to do.
    busy: Vec<u64>,
    /// Those that found no room, in the order in which they are tried again.
    waiting: VecDeque<u64>,
    /// Those that have something for the buffer.
    arriving: VecDeque<u64>,
    /// How many files may still bring something, and how many of these are CRIU's.
    open: usize,
    open_of_criu: usize,
    dump_check: DumpCheck,
    /// All that CRIU had to deliver has come.
    is_whole: bool,
    null: Option<File>,
}

impl Dump {
    /// An external file of this name will come.
    pub(super) fn expect_external(&mut self, name: ImageName) {
        self.external_names.push(name);
    }

    /// Starts a file. One of the same name that is still open is replaced by it.
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
        self.open += 1;
        self.open_of_criu += usize::from(source.owner == Owner::Criu);
        if let Some(earlier) = self.by_name.insert(name, id)
            && let Some(replaced) = self.sources.get_mut(&earlier)
        {
            replaced.is_replaced = true;
            // One that the image does not name yet, because it waits itself, never will be.
            let is_named = replaced.is_named;
            source.replaces = is_named.then_some(earlier).or(replaced.replaces);
            self.make_busy(earlier);
        }
        Ok(self.sources.entry(id).or_insert(source))
    }

    /// How many files may still bring something.
    pub(super) fn open_files(&self) -> usize {
        self.open
    }

    /// Whether all files are complete in the image.
    pub(super) fn is_complete(&self) -> bool {
        self.sources.is_empty()
    }

    /// Something has changed about a source's pipe.
    pub(super) fn wake(&mut self, id: u64) {
        match self.sources.get_mut(&id) {
            Some(source) if source.buffered.is_some() && !source.is_replaced => {
                if !source.is_arriving {
                    source.is_arriving = true;
                    self.arriving.push_back(id);
                }
            }
            _ => self.make_busy(id),
        }
    }

    /// A source has something to do for the shards.
    pub(super) fn make_busy(&mut self, id: u64) {
        if let Some(source) = self.sources.get_mut(&id)
            && !source.is_queued
        {
            source.is_queued = true;
            self.busy.push(id);
        }
    }

    /// What is in a source's pipe is the last of it.
    pub(super) fn writer_gone(&mut self, id: u64) {
        if let Some(source) = self.sources.get_mut(&id) {
            source.has_ended = true;
        }
    }

    /// How many sources have something for the buffer.
    pub(super) fn arriving(&self) -> usize {
        self.arriving.len()
    }

    /// Has the first of these copied, and tells how it fared. Where it found no room, it is the
    /// first again.
    ///
    /// # Errors
    /// Those of copying.
    pub(super) fn copy_arriving(
        &mut self,
        copy: impl FnOnce(&mut Source) -> Result<Copied>,
    ) -> Result<Activity> {
        let Some(id) = self.arriving.pop_front() else {
            return Ok(Activity::Idle);
        };
        let Some(source) = self.sources.get_mut(&id) else {
            return Ok(Activity::Idle);
        };
        source.is_arriving = false;
        if source.is_replaced {
            self.make_busy(id);
            return Ok(Activity::Idle);
        }
        let copied = copy(source)?;
        source.is_arriving = matches!(copied, Copied::Some | Copied::NoRoom);
        let activity = match copied {
            Copied::Some => {
                self.arriving.push_back(id);
                Activity::Busy
            }
            Copied::NoRoom => {
                self.arriving.push_front(id);
                Activity::NoRoom
            }
            Copied::Nothing => Activity::Idle,
            Copied::All => {
                self.has_come(id);
                Activity::Complete
            }
        };
        self.make_busy(id);
        Ok(activity)
    }

    /// All of a file is in the buffer.
    fn has_come(&mut self, id: u64) {
        if let Some(mut source) = self.sources.remove(&id) {
            self.record(&mut source);
            self.sources.insert(id, source);
        }
    }

    pub(super) fn take_busy(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.busy)
    }

    /// How many sources wait for room.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// The source that has waited longest.
    pub(super) fn take_waiting(&mut self) -> Option<u64> {
        self.waiting.pop_front()
    }

    /// Takes a source out, to be given back with [`Dump::put_back`].
    pub(super) fn take(&mut self, id: u64) -> Option<Source> {
        let mut source = self.sources.remove(&id)?;
        source.is_queued = false;
        Some(source)
    }

    /// Keeps a source after its turn, or what it delivered if it is complete.
    pub(super) fn put_back(&mut self, mut source: Source, activity: Activity) {
        source.is_queued = true;
        match activity {
            Activity::Idle => source.is_queued = false,
            Activity::NoRoom => self.waiting.push_back(source.id),
            Activity::Busy => self.busy.push(source.id),
            Activity::Complete => return self.complete(source),
        }
        self.sources.insert(source.id, source);
    }

    fn complete(&mut self, mut source: Source) {
        if self.by_name.get(&source.name) == Some(&source.id) {
            self.by_name.remove(&source.name);
        }
        if source.is_open() {
            self.record(&mut source);
        }
    }

    /// Records a file that brings nothing more, and closes its pipe.
    fn record(&mut self, source: &mut Source) {
        source.close();
        self.open -= 1;
        if source.owner == Owner::Criu {
            self.open_of_criu -= 1;
            if !source.is_replaced {
                self.dump_check.record(source);
            }
        }
    }

    /// Whether the CRIU that sends the files was asked for cpuinfo.img alone.
    pub(super) fn expect_cpuinfo(&mut self, is_alone: bool) {
        self.dump_check.is_of_cpuinfo = is_alone;
    }

    /// Whether CRIU has sent and closed all files of a whole dump.
    pub(super) fn is_whole_dump(&self) -> bool {
        self.open_of_criu == 0 && self.dump_check.is_whole_dump()
    }

    /// Fails when the image can no longer become complete, now that CRIU sends no more.
    pub(super) fn check(&mut self) -> Result<()> {
        if self.open_of_criu == 0 && !self.is_whole {
            self.dump_check.check()?;
            self.is_whole = true;
        }
        Ok(())
    }

    /// Whether the file that a source replaces has not been ended in the image yet.
    pub(super) fn must_wait(&self, source: &Source) -> bool {
        let replaced = source.replaces.and_then(|id| self.sources.get(&id));
        replaced.is_some_and(|replaced| replaced.is_named)
    }

    /// Ends a replaced file in the image, and throws away what its writer still sends.
    pub(super) fn discard(
        &mut self,
        source: &mut Source,
        image_writer: &mut ImageWriter,
    ) -> Result<Activity> {
        if source.buffered.is_some() {
            source.buffered = Some(Buffered::default());
        }
        if source.is_named && image_writer.end_file(source)? == Activity::NoRoom {
            return Ok(Activity::NoRoom);
        }
        if !source.is_open() {
            return Ok(Activity::Complete);
        }
        let null = match &mut self.null {
            Some(null) => null,
            none => none.insert(
                File::options()
                    .write(true)
                    .open("/dev/null")
                    .context("opening /dev/null")?,
            ),
        };
        loop {
            match pipe::splice(source.pipe(), &*null, DISCARD)
                .with_context(|| format!("skipping the first of two files named {}", source.name))?
            {
                Moved::Bytes(_) => {}
                Moved::WouldBlock => return Ok(Activity::Idle),
                Moved::End => return Ok(Activity::Complete),
            }
        }
    }
}
