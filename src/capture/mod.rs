//! Captures an image: from CRIU's pipes to the shards, by moving page references.
//!
//! One thread runs one loop. It sleeps in epoll while nothing is going on. Once data flows it naps for some tens of microseconds
//! between two rounds (see [`crate::os::poller`]); in each round it looks at every source that has something, and gives its
//! data in chunks to the shards that have room ([`balancer`] holds the rule, and why nothing deadlocks). Nothing ever blocks on a
//! shard.
//!
//! The markers of all shards form one sequence, in which one file is current at a time: a chunk of another file than the
//! last one is preceded by a `filename` marker. Where CRIU sends a file a second time while the first is still open, the
//! first is ended in the image before the second begins, and whatever still comes of it is thrown away: so the last one counts.
//!
//! The end marker is written only for a complete image: CRIU has delivered inventory.img, which it sends last and only when
//! the dump succeeded, and every file was read to its end. In every other case this fails, and with the program's end CRIU's
//! pipes break, so that CRIU lets the application go on.

mod balancer;
mod image;
mod shard;
mod source;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{Resource, getrlimit};

use crate::criu::{Clients, Connection, Listener, Message};
use crate::format::ImageName;
use crate::os::pipe::{self, Moved, ReadEnd, WriteEnd};
use crate::os::poller::{Event, Interest, Kind, Poller, Wait};
use crate::pace::Pace;
use crate::report::meter::{Counter, Counters, Meter};
use crate::report::progress::{Milestone, Progress, Stats};
use crate::supervision::Interrupts;
use image::{Image, Step};
use shard::Shard;
use source::{Origin, Ready, Source};

/// The file that CRIU sends last, and only when the dump succeeded.
const INVENTORY: &str = "inventory.img";

/// The file that `criu cpuinfo dump` sends alone, and `criu dump` before it freezes the application.
const CPUINFO: &str = "cpuinfo.img";

/// System calls made for one client before others have their turn: CRIU can send small files as fast as we take them, and
/// each holds a descriptor until it has been read.
const TURN: usize = 16;

/// Chunks that one source gives before others have their turn: enough to empty its pipe, although it is filled meanwhile.
const CHUNKS_PER_TURN: usize = 4;

/// Bytes thrown away at a time.
const DISCARD: usize = 1 << 20;

/// How long readers are waited for briefly.
const DRAIN_PATIENCE: Duration = Duration::from_secs(1);

/// Whether the shards' readers must have taken everything before their pipes are closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drain {
    /// They are waited for a moment: those that fail on the last bytes are noticed that way. One that is slow, or waits for our end,
    /// is not waited for.
    Briefly,
    /// They are waited for however long it takes: whoever waits for their ends too would take one that never looked at the
    /// rest for one that did.
    Completely,
}

/// Descriptors kept free of files: for epoll, signals, the socket, the standard streams, and for what one look at a client can
/// bring.
const OTHER_DESCRIPTORS: usize = 32;

/// How long CRIU may neither write to nor close any of the many files that it has open before it is asked for more.
const OPEN_PATIENCE: Duration = Duration::from_secs(1);

/// What to capture from, and where to.
pub struct Capture<'a> {
    pub listener: Listener,
    /// The shards' pipes, with what error messages call them.
    pub shards: Vec<(WriteEnd, String)>,
    pub external_files: Vec<(ImageName, ReadEnd)>,
    pub progress: &'a mut Progress,
    /// How many CRIU processes must have come and gone.
    pub criu_clients: usize,
    pub drain: Drain,
    pub counters: Counters,
}

/// What is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Watched {
    Interrupt,
    Listener,
    Client,
    Source,
    Shard,
}

impl Kind for Watched {
    const ALL: &'static [Self] = &[
        Self::Interrupt,
        Self::Listener,
        Self::Client,
        Self::Source,
        Self::Shard,
    ];
}

/// Which files arrived whole.
#[derive(Debug, Default)]
struct Delivered {
    inventory: bool,
    cpuinfo: bool,
    others: bool,
}

impl Delivered {
    fn is_image(&self) -> bool {
        self.inventory || (self.cpuinfo && !self.others)
    }
}

struct Loop<'a> {
    poller: Poller<Watched>,
    interrupts: &'a Interrupts,
    /// Until nobody is waited for any more.
    listener: Option<Listener>,
    clients: Clients<ImageName>,
    image: Image,
    sources: HashMap<u64, Source>,
    by_name: HashMap<ImageName, u64>,
    /// So many files may be open before CRIU is left waiting with the next, as it may be faster than the shards.
    most_sources: usize,
    /// Since when all of so many files have been idle.
    idle_since: Option<Instant>,
    external_names: Vec<ImageName>,
    busy: Vec<u64>,
    next_source: u64,
    delivered: Delivered,
    frozen: bool,
    progress: &'a mut Progress,
    drain: Drain,
    files: Counter,
    discard: Option<File>,
}

impl Capture<'_> {
    /// Captures one image, and tells what passed through each shard.
    ///
    /// # Errors
    /// Whenever the image did not become complete.
    pub fn run(self, interrupts: &Interrupts) -> Result<Stats> {
        let poller = Poller::new().context("preparing to wait for events")?;
        let mut taken = self.shards.len() + self.external_files.len() + OTHER_DESCRIPTORS;
        let mut shards = Vec::new();
        for ((pipe, label), bytes) in self.shards.into_iter().zip(self.counters.shards) {
            shards.push(Shard::new(pipe, label, Meter::new(bytes))?);
        }
        let limit = descriptor_limit();
        if limit >= MANY_DESCRIPTORS {
            taken += 2 * shards.len();
            shards.iter_mut().for_each(Shard::gather_small_files);
        }
        let most_sources = limit.saturating_sub(taken).max(1);
        let mut capture = Loop {
            poller,
            interrupts,
            listener: Some(self.listener),
            clients: Clients::new(self.criu_clients),
            image: Image::new(shards)?,
            sources: HashMap::new(),
            by_name: HashMap::new(),
            most_sources,
            idle_since: None,
            external_names: Vec::new(),
            busy: Vec::new(),
            next_source: 0,
            delivered: Delivered::default(),
            frozen: false,
            progress: self.progress,
            drain: self.drain,
            files: self.counters.files,
            discard: None,
        };
        capture.watch(interrupts)?;
        for (name, pipe) in self.external_files {
            capture.external_names.push(name.clone());
            let slots = pipe::slots(&pipe).with_context(|| format!("capturing {name}"))?;
            capture.add_source(Source::new(name, pipe, slots, Origin::External))?;
        }
        capture.progress.reached(Milestone::SocketInit);
        capture.receive_files()?;
        capture.finish()
    }
}

/// So many descriptors are enough for CRIU's files and for gathering small ones as well; with fewer, CRIU's come first.
const MANY_DESCRIPTORS: usize = 256;

/// How many descriptors this process may have.
fn descriptor_limit() -> usize {
    getrlimit(Resource::RLIMIT_NOFILE).map_or(usize::MAX, |(soft, _)| soft as usize)
}

impl Loop<'_> {
    fn watch(&self, interrupts: &Interrupts) -> Result<()> {
        let add = || {
            self.poller
                .add(interrupts, Watched::Interrupt, 0, Interest::Readable)?;
            if let Some(listener) = &self.listener {
                self.poller
                    .add(listener, Watched::Listener, 0, Interest::Readable)?;
            }
            for (index, shard) in self.image.shards().iter().enumerate() {
                self.poller
                    .add(shard, Watched::Shard, index as u64, Interest::Gone)?;
            }
            Ok::<_, io::Error>(())
        };
        add().context("preparing to wait for events")
    }

    /// Runs until CRIU is gone and every file has been read to its end.
    fn receive_files(&mut self) -> Result<()> {
        let mut events = Vec::new();
        let mut pace = Pace::new();
        let mut wait = Wait::Forever;
        loop {
            self.poller
                .wait(wait, &mut events)
                .context("waiting for CRIU")?;
            let heard = self.handle(&events)?;
            self.clients.check_grace()?;
            let moved = self.round()?;
            self.idle_since = match (heard, moved) {
                (Step::NoRoom, Step::Idle) => self.idle_since.or_else(|| Some(Instant::now())),
                _ => None,
            };
            let mut step = heard.max(moved);
            if self.clients.all_gone() {
                if self.sources.is_empty() {
                    break;
                }
                self.listener = None;
                self.clients.close_idle();
                ensure!(
                    self.delivered.is_image() || self.criu_still_writes(),
                    self.incomplete()
                );
            }
            if step < Step::Busy && !self.image.flush()? {
                step = Step::NoRoom;
            }
            wait = match step {
                Step::Idle => Wait::Forever.or_until(self.clients.grace_ends()),
                Step::NoRoom => {
                    pace.nap_longer();
                    Wait::Now
                }
                Step::Busy | Step::Complete => {
                    pace.nap();
                    Wait::Now
                }
            };
        }
        ensure!(self.delivered.is_image(), self.incomplete());
        Ok(())
    }

    fn criu_still_writes(&self) -> bool {
        self.sources
            .values()
            .any(|source| source.origin == Origin::Criu)
    }

    fn incomplete(&self) -> String {
        format!(
            "capturing the image: CRIU went away without sending {INVENTORY}, so the checkpoint failed (see CRIU's log) and the application, if it lives, goes on; the image is incomplete: discard it"
        )
    }

    /// Acts on events. Busy: files were added; no room: they have to wait until others have ended.
    fn handle(&mut self, events: &[Event<Watched>]) -> Result<Step> {
        let mut step = Step::Idle;
        for event in events {
            match event.kind {
                Watched::Interrupt => self.interrupts.check()?,
                Watched::Listener => {
                    if let Some(listener) = &self.listener {
                        self.clients
                            .accept(listener, &self.poller, Watched::Client)?;
                    }
                }
                Watched::Client => {
                    let heard = if self.sources.len() < self.most_sources || self.is_stuck() {
                        self.hear(event.id)?
                    } else {
                        Step::NoRoom
                    };
                    step = step.max(heard);
                }
                Watched::Source => {
                    if let Some(source) = self.sources.get_mut(&event.id) {
                        source.ended |= event.hung_up;
                        self.wake(event.id);
                    }
                }
                Watched::Shard => {
                    if event.hung_up {
                        return Err(self.image.shards()[event.id as usize].reader_gone());
                    }
                }
            }
        }
        Ok(step)
    }

    /// CRIU has more files open than there are descriptors for, and needs yet another one to go on.
    fn is_stuck(&self) -> bool {
        self.idle_since
            .is_some_and(|start| start.elapsed() >= OPEN_PATIENCE)
    }

    fn wake(&mut self, source: u64) {
        if !self.busy.contains(&source) {
            self.busy.push(source);
        }
    }

    /// Takes the files that a client sends. One that breaks the protocol before it has sent any is dropped; a later
    /// violation means that the image cannot be trusted.
    fn hear(&mut self, id: u64) -> Result<Step> {
        let mut step = Step::Idle;
        let mut opened = Vec::new();
        let heard = self.clients.next_requests(
            id,
            TURN,
            |connection: &mut Connection, requested: &mut Option<ImageName>, message| match message
            {
                Message::Request(name) => {
                    let name = ImageName::new(&name).with_context(|| {
                        format!("{} sent a file named {name:?}", connection.peer())
                    })?;
                    *requested = Some(name);
                    connection.expect_descriptor();
                    Ok(false)
                }
                Message::Descriptor(fd) => {
                    let name = requested
                        .take()
                        .context("a descriptor came without a name")?;
                    let pipe = ReadEnd::measured(fd).with_context(|| {
                        format!("{} sent something wrong for {name}", connection.peer())
                    })?;
                    opened.push((name, pipe));
                    Ok(true)
                }
            },
        );
        for (name, pipe) in opened {
            ensure!(
                !self.external_names.contains(&name),
                "capturing {name}: CRIU sends a file of this name too; give the external file another name"
            );
            self.open(name, pipe)?;
            step = Step::Busy;
        }
        heard?;
        Ok(step)
    }

    /// Starts a file of CRIU's. An open one of the same name is replaced by it.
    fn open(&mut self, name: ImageName, (pipe, slots): (ReadEnd, usize)) -> Result<()> {
        if !self.frozen && name.as_str() != CPUINFO {
            self.frozen = true;
            self.progress.reached(Milestone::CheckpointStart);
        }
        let mut source = Source::new(name, pipe, slots, Origin::Criu);
        if let Some(&earlier) = self.by_name.get(&source.name)
            && let Some(replaced) = self.sources.get_mut(&earlier)
        {
            replaced.replaced = true;
            // One that still waits for its own predecessor has no place in the image itself.
            source.replaces = Some(replaced.replaces.unwrap_or(earlier));
            self.wake(earlier);
        }
        self.add_source(source)
    }

    fn add_source(&mut self, source: Source) -> Result<()> {
        let id = self.next_source;
        self.next_source += 1;
        self.poller
            .add(&source.pipe, Watched::Source, id, Interest::ReadableEdge)
            .with_context(|| format!("preparing to wait for {}", source.name))?;
        self.by_name.insert(source.name.clone(), id);
        self.sources.insert(id, source);
        Ok(())
    }

    /// Gives every busy source one turn, and tells how the busiest fared.
    fn round(&mut self) -> Result<Step> {
        let mut overall = Step::Idle;
        for id in std::mem::take(&mut self.busy) {
            let Some(mut source) = self.sources.remove(&id) else {
                continue;
            };
            let step = self.advance(id, &mut source)?;
            overall = overall.max(step);
            match step {
                Step::Complete => self.complete(id, &source),
                Step::Idle => {
                    self.sources.insert(id, source);
                }
                Step::NoRoom | Step::Busy => {
                    self.sources.insert(id, source);
                    self.busy.push(id);
                }
            }
        }
        Ok(overall)
    }

    fn complete(&mut self, id: u64, source: &Source) {
        self.files.add(1);
        if self.by_name.get(&source.name) == Some(&id) {
            self.by_name.remove(&source.name);
        }
        if source.origin == Origin::Criu && !source.replaced {
            match source.name.as_str() {
                // CRIU writes either in one go: killed before, it leaves an empty file.
                INVENTORY => self.delivered.inventory = source.has_content(),
                CPUINFO => self.delivered.cpuinfo = source.has_content(),
                _ => self.delivered.others = true,
            }
        }
    }

    /// Moves what a source has, as far as the shards have room.
    fn advance(&mut self, id: u64, source: &mut Source) -> Result<Step> {
        if !self
            .image
            .keep_promise(source, source.promise.map_or(0, |promise| promise.left))?
        {
            return Ok(Step::NoRoom);
        }
        if source.replaced {
            return self.discard(id, source);
        }
        if let Some(earlier) = source.replaces {
            if self
                .sources
                .get(&earlier)
                .is_some_and(|earlier| earlier.named)
            {
                return Ok(Step::NoRoom);
            }
            source.replaces = None;
        }
        let mut chunks = 0;
        loop {
            match source
                .inspect()
                .with_context(|| format!("capturing {}", source.name))?
            {
                Ready::Empty => return Ok(Step::Idle),
                Ready::Filling => return Ok(Step::Busy),
                Ready::Ended => return self.image.end_file(id, source),
                Ready::Move(available) => {
                    let step = self.image.give_chunk(id, source, available)?;
                    chunks += 1;
                    if step != Step::Busy || (chunks >= CHUNKS_PER_TURN && !source.ended) {
                        return Ok(step);
                    }
                }
            }
        }
    }

    /// Ends a replaced file in the image, and throws away whatever its writer still sends.
    fn discard(&mut self, id: u64, source: &mut Source) -> Result<Step> {
        if source.named && self.image.end_file(id, source)? == Step::NoRoom {
            return Ok(Step::NoRoom);
        }
        let null = match &mut self.discard {
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
                Moved::WouldBlock => return Ok(Step::Idle),
                Moved::End => return Ok(Step::Complete),
            }
        }
    }

    /// Completes the image.
    fn finish(mut self) -> Result<Stats> {
        // To us, an external file that could not be read has ended.
        self.interrupts.check()?;
        let mut pace = Pace::new();
        self.listener = None;
        loop {
            // Before there is an end marker to be seen, no reader has seen it all, whatever it has taken.
            self.check_readers(|_| false)?;
            if self.image.end()? {
                break;
            }
            // What is queued takes room as well.
            self.image.flush()?;
            pace.nap_longer();
        }
        while !self.image.flush()? {
            self.wait_for_readers(&mut pace)?;
        }
        let written = Instant::now();
        while (self.drain == Drain::Completely || written.elapsed() < DRAIN_PATIENCE)
            && !self.image.is_drained()?
        {
            self.wait_for_readers(&mut pace)?;
        }
        Ok(self.image.stats())
    }

    fn wait_for_readers(&mut self, pace: &mut Pace) -> Result<()> {
        pace.nap_longer();
        // A reader may leave when it has seen the end marker; not while something is left for it.
        self.check_readers(|shard| shard.is_drained().unwrap_or(false))
    }

    /// Fails when a shard's reader has left that `may_leave` does not let go, and when a signal came.
    fn check_readers(&mut self, may_leave: impl Fn(&Shard) -> bool) -> Result<()> {
        let mut events = Vec::new();
        self.poller
            .wait(Wait::Now, &mut events)
            .context("waiting for the shards' readers")?;
        for event in events {
            match event.kind {
                Watched::Interrupt => self.interrupts.check()?,
                Watched::Shard if event.hung_up => {
                    let shard = &self.image.shards()[event.id as usize];
                    if !may_leave(shard) {
                        return Err(shard.reader_gone());
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }
}
