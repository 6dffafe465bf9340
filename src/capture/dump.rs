//! The dump: which files CRIU has open, and what it must have delivered when it is gone.
//!
//! The image is complete when CRIU has delivered inventory.img, which it sends last and only when
//! the dump succeeded, and every file was read to its end.
//!
//! CRIU sends some files a second time while the first is still open, and the last one counts. The
//! first is then ended in the image before the second begins, and what still comes of it is thrown
//! away.

use std::collections::HashMap;
use std::fs::File;

use anyhow::{Context, Result, ensure};

use super::sequence::{Activity, Sequence};
use super::source::{Owner, Source};
use crate::criu::files::{CPUINFO, INVENTORY};
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

/// Which of CRIU's files arrived whole.
#[derive(Debug, Default)]
struct Delivered {
    inventory: bool,
    cpuinfo: bool,
    others: bool,
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
    delivered: Delivered,
    null: Option<File>,
}

impl Dump {
    /// Starts a file. One of the same name that is still open is replaced by it.
    ///
    /// # Errors
    /// When CRIU sends a file that has the name of an external one.
    pub(super) fn open(&mut self, mut source: Source) -> Result<&Source> {
        let name = source.name.clone();
        match source.owner {
            Owner::External => self.external_names.push(name.clone()),
            Owner::Criu => ensure!(
                !self.external_names.contains(&name),
                "capturing {name}: CRIU sends a file of this name too; give the external file another name"
            ),
        }
        let id = self.next_id;
        self.next_id += 1;
        source.id = id;
        if let Some(earlier) = self.by_name.insert(name, id)
            && let Some(replaced) = self.sources.get_mut(&earlier)
        {
            replaced.is_replaced = true;
            // One that the image does not name yet, because it waits itself, never will be.
            let is_named = replaced.is_named;
            source.replaces = is_named.then_some(earlier).or(replaced.replaces);
            self.wake(earlier);
        }
        Ok(self.sources.entry(id).or_insert(source))
    }

    /// How many files are open.
    pub(super) fn open_files(&self) -> usize {
        self.sources.len()
    }

    /// Something has changed about a source.
    pub(super) fn wake(&mut self, id: u64) {
        if !self.busy.contains(&id) {
            self.busy.push(id);
        }
    }

    /// What is in a source's pipe is the last of it.
    pub(super) fn writer_gone(&mut self, id: u64) {
        if let Some(source) = self.sources.get_mut(&id) {
            source.has_ended = true;
        }
    }

    pub(super) fn take_busy(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.busy)
    }

    /// Takes a source out, to be given back with [`Dump::put_back`].
    pub(super) fn take(&mut self, id: u64) -> Option<Source> {
        self.sources.remove(&id)
    }

    /// Keeps a source after its turn, or what it delivered if it is complete.
    pub(super) fn put_back(&mut self, source: Source, activity: Activity) {
        match activity {
            Activity::Idle => {}
            Activity::NoRoom | Activity::Busy => self.busy.push(source.id),
            Activity::Complete => return self.complete(&source),
        }
        self.sources.insert(source.id, source);
    }

    fn complete(&mut self, source: &Source) {
        if self.by_name.get(&source.name) == Some(&source.id) {
            self.by_name.remove(&source.name);
        }
        if source.owner == Owner::Criu && !source.is_replaced {
            match source.name.as_str() {
                // CRIU writes either in one go: killed before, it leaves an empty file.
                INVENTORY => self.delivered.inventory = source.has_content(),
                CPUINFO => self.delivered.cpuinfo = source.has_content(),
                _ => self.delivered.others = true,
            }
        }
    }

    /// Fails when the image can no longer become complete, now that CRIU is gone.
    pub(super) fn check(&self) -> Result<()> {
        let Delivered {
            inventory,
            cpuinfo,
            others,
        } = self.delivered;
        let mut open = self.sources.values();
        ensure!(
            inventory || (cpuinfo && !others) || open.any(|source| source.owner == Owner::Criu),
            "capturing the image: CRIU went away without sending {INVENTORY}, so the checkpoint failed (see CRIU's log) and the application, if it lives, goes on; the image is incomplete: discard it"
        );
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
        sequence: &mut Sequence,
    ) -> Result<Activity> {
        if source.is_named && sequence.end_file(source)? == Activity::NoRoom {
            return Ok(Activity::NoRoom);
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
            match pipe::splice(&source.pipe, &*null, DISCARD)
                .with_context(|| format!("skipping the first of two files named {}", source.name))?
            {
                Moved::Bytes(_) => {}
                Moved::WouldBlock => return Ok(Activity::Idle),
                Moved::End => return Ok(Activity::Complete),
            }
        }
    }
}
