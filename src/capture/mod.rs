//! Captures an image: from CRIU's pipes to the shards, by moving page references.
//!
//! One thread runs one loop. It sleeps in epoll while nothing is going on. Once data flows it naps
//! for some tens of microseconds between two rounds (see [`crate::pace`]); in each round it looks
//! at every source that has something, and gives its data in chunks to the shards that have room.
//! Nothing ever blocks on a shard.
//!
//! ```text
//! source ──► chunk ──► image_writer ──► balancer ──► shard
//! what may   bytes,    place and    which        measures      a queue, and
//! be moved   slots,    markers      shard        what pages    the slots of
//! now        route                               do not fill   its pipe
//!   │          ▲
//!   └► buffer ─┘  with `--buffer`: memory that CRIU's data is copied to first
//! ```
//!
//! The end marker is written only for a complete image (see `dump_check` and `stray_files`). In
//! every other case this fails, and with the program's end CRIU's pipes break, so that CRIU lets
//! the application go on.

mod balancer;
mod buffer;
mod capacity;
mod chunk;
mod dump;
mod dump_check;
mod finish;
mod image_writer;
mod prefault;
mod shard;
mod source;
mod stray_files;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::resource::{Resource, getrlimit};

use crate::criu::files::CPUINFO;
use crate::criu::{Clients, CommandLine, Connection, Listener, hook_caller};
use crate::format::ImageName;
use crate::os::descriptor::Direction;
use crate::os::pipe::{LARGEST, WriteEnd};
use crate::os::poller::{Event, Interest, Wait, Watched};
use crate::pace::Pace;
use crate::report::meter::{Counters, Meter};
use crate::report::milestone;
use crate::report::progress::{Progress, Stats};
use crate::report::times::{Clock, Phase, Waiting};
use crate::supervision::{CHECK_INTERVAL, CriuCommand, Endpoint, Failure, Pumped, Supervisor};
use buffer::Buffer;
use dump::Dump;
use image_writer::ImageWriter;
use shard::Shard;
use source::{Activity, Source};
use stray_files::StrayFiles;

/// System calls made for one client before others have their turn: CRIU can send small files as
/// fast as we take them, and each holds a descriptor until it has been read.
const CALLS_PER_TURN: usize = 16;

/// Files that may be open in any case: CRIU keeps some forty open, and may need the next before it
/// writes to any of them.
const LEAST_OPEN: usize = 64;

/// Pieces given out of the buffer before CRIU is heard again.
const PIECES_PER_TURN: usize = 64;

/// How long a file may stay open after CRIU has said at `post-dump` that all are closed.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// A request for a capture.
pub(crate) struct Capture<'a> {
    /// Where CRIU writes what it does not stream.
    pub(crate) images_dir: &'a Path,
    /// The last of the shards is an index.
    pub(crate) has_index: bool,
    /// How much the buffer holds at most, in bytes, if there is to be one.
    pub(crate) buffer: Option<u64>,
    /// A CRIU that waits for the end may go on when the memory is copied.
    pub(crate) goes_on_when_copied: bool,
    /// The CRIU whose hook has started us, and calls at `post-dump`.
    pub(crate) caller: Option<String>,
    /// A copy of inventory.img is left in the images directory when the dump is whole.
    pub(crate) leaves_inventory: bool,
    /// Commands among them are started when the application is frozen.
    pub(crate) external_files: Vec<(ImageName, Endpoint)>,
    pub(crate) progress: &'a mut Progress,
    /// The command that runs CRIU, if we start it.
    pub(crate) criu: Option<&'a CriuCommand>,
    pub(crate) counters: Counters,
}

struct CaptureLoop<'a> {
    supervisor: &'a Supervisor,
    clients: Clients,
    request: Capture<'a>,
    dump: Dump,
    stray_files: StrayFiles,
    /// `None`: the application's pages go to the shards.
    buffer: Option<Buffer>,
    /// When CRIU's hook has called.
    called: Option<Instant>,
    image_writer: ImageWriter,
    /// The most files that may be open before CRIU is left waiting with the next: it may be faster
    /// than the shards.
    most_open: usize,
    is_frozen: bool,
    /// All that CRIU had to deliver has come.
    is_whole: bool,
    /// The image has its end marker.
    is_marked: bool,
    clock: Clock,
}

impl Capture<'_> {
    /// Captures one image, and returns how much passed through each shard. The clients'
    /// socket keeps other streamers away until all is over. Error messages call the shards' pipes
    /// by their labels.
    ///
    /// # Errors
    /// Whenever the image did not become complete.
    pub(crate) fn run(
        self,
        listener: Listener,
        pipes: Vec<(WriteEnd, String)>,
        supervisor: &Supervisor,
    ) -> Result<(Stats, Clients), Failure> {
        capacity::even_out(&pipes).context("giving the shards the same capacity")?;
        let mut shards = Vec::new();
        for ((pipe, label), bytes) in pipes.into_iter().zip(&self.counters.shards) {
            shards.push(Shard::new(pipe, label, Meter::new(bytes.clone()))?);
        }
        let mut capture = CaptureLoop {
            supervisor,
            clients: Clients::of(listener, 1, supervisor.poller())?,
            dump: Dump::default(),
            stray_files: StrayFiles::look(self.images_dir),
            buffer: self.buffer.map(Buffer::new),
            called: None,
            clock: Clock::new(shards.len()),
            image_writer: ImageWriter::new(shards, self.has_index),
            most_open: descriptors_left().max(LEAST_OPEN),
            is_frozen: false,
            is_whole: false,
            is_marked: false,
            request: self,
        };
        for (id, shard) in (0..).zip(&capture.image_writer.shards) {
            let poller = supervisor.poller();
            let added = poller.add(shard, Watched::Shard, id, Interest::Gone);
            added.context("preparing to wait for events")?;
        }
        let names = capture.request.external_files.iter();
        capture.dump.external_names = names.map(|(name, _)| name.clone()).collect();
        capture.open_external_files()?;
        capture.request.progress.reached(milestone::SOCKET_INIT);
        supervisor.start_criu(capture.request.criu, Direction::Out)?;
        let captured = capture.receive_files().and_then(|()| capture.finish());
        let error = match captured {
            Ok(stats) => return Ok((stats, capture.clients)),
            Err(error) if capture.clients.have_left() => supervisor.explain_by_criu(error),
            Err(error) if capture.request.leaves_inventory && !capture.clients.have_come() => error.context(
                "no CRIU has connected: one that an engine drives over RPC can stream only with pull requests 2536 and 3145, which no release has (see docs/kubernetes.md)",
            ),
            Err(error) => error,
        };
        let kept = (capture.clients, capture.dump, capture.image_writer);
        Err(Failure::new(error, kept))
    }
}

/// Descriptors for CRIU's files: a quarter of those that are left is for commands and clients.
fn descriptors_left() -> usize {
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(usize::MAX, |(soft, _)| soft as usize);
    let open = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    limit.saturating_sub(open) / 4 * 3
}

impl CaptureLoop<'_> {
    /// Runs until CRIU sends no more and every file has been read to its end.
    ///
    /// CRIU's hook calls at `post-dump`, and waits for our end while CRIU is connected (see
    /// [`crate::commands`]): CRIU has then closed all files, and its connection counts no more.
    fn receive_files(&mut self) -> Result<()> {
        let mut events = Vec::new();
        let mut pace = Pace::new();
        let mut wait = Wait::Now;
        loop {
            let waited = self.supervisor.poller().wait(wait, &mut events);
            waited.context("waiting for CRIU")?;
            // Nothing is left of what CRIU has sent before its hook called.
            if self.called.is_some() && events.is_empty() {
                self.clients.dismiss();
            }
            // Parts of units may have been left for long enough.
            if events.is_empty() && wait != Wait::Now {
                self.supervisor.check()?;
                self.dump.wake_all();
            }
            let heard = self.handle(&events)?;
            let moved = self.move_data()?;
            if self.is_received()? {
                return self.stray_files.check();
            }
            self.keep_time(heard.max(moved));
            wait = self.next_wait(heard, moved, &mut pace);
        }
    }

    /// Until the next round, it counts as this that the time goes by.
    fn keep_time(&mut self, activity: Activity) {
        let waiting = match activity {
            Activity::Busy | Activity::Complete => Waiting::No,
            Activity::NoRoom => Waiting::ForShards,
            Activity::Idle => Waiting::ForCriu,
        };
        let shards = self.image_writer.shards.iter();
        self.clock.wait(waiting, shards.map(Shard::is_full));
    }

    /// Acts on events, and fails if CRIU cannot come any more. Busy: files were added; no room:
    /// they have to wait until others have ended.
    fn handle(&mut self, events: &[Event]) -> Result<Activity> {
        if events.is_empty()
            && !self.clients.have_asked()
            && let Some(command) = self.supervisor.ended_criu()
        {
            return Err(self.stray_files.why_missed(command));
        }
        let mut activity = Activity::Idle;
        for event in events {
            match event.kind {
                Watched::Interrupt | Watched::Caller => self.supervisor.check()?,
                Watched::Listener => self.clients.accept(self.supervisor.poller())?,
                Watched::Client => activity = activity.max(self.take_requests(event.id)?),
                Watched::Source => self.dump.wake(event.id, event.hung_up),
                Watched::Shard if event.hung_up => {
                    let shard = &self.image_writer.shards[event.id as usize];
                    // A reader may leave when it has the end marker, and all that came before it.
                    if !self.is_marked || shard.is_behind()? {
                        return Err(shard.reader_gone());
                    }
                }
                _ => {}
            }
        }
        self.clients.check_grace()?;
        if !self.is_frozen && !self.is_whole {
            self.stray_files.check_unconnected()?;
        }
        Ok(activity)
    }

    /// Moves all data that can be moved, and returns how the busiest source fared.
    fn move_data(&mut self) -> Result<Activity> {
        let mut moved = Activity::Idle;
        for id in self.dump.take_round() {
            moved = moved.max(self.turn(id)?);
        }
        moved = moved.max(self.feed_shards()?);
        if moved < Activity::Busy && !self.image_writer.flush()? {
            return Ok(Activity::NoRoom);
        }
        Ok(moved)
    }

    /// True when all files are complete, and nothing more can come.
    fn is_received(&mut self) -> Result<bool> {
        if !self.clients.all_gone() && !self.is_dismissed() {
            return Ok(false);
        }
        self.check_hook()?;
        if self.request.caller.is_none() {
            self.clients.stop_listening();
        }
        if !self.is_whole && !self.dump.criu_has_open_files() {
            self.dump.dump_check.check()?;
            // The file would be missing in the image.
            if let Some((name, _)) = self.request.external_files.first() {
                bail!(
                    "capturing {name}: its command was not started, since no application was frozen: leave out --ext-file-cmd where CRIU dumps none"
                );
            }
            if self.request.leaves_inventory {
                let inventory = &self.dump.dump_check.inventory;
                self.stray_files.leave_inventory(inventory)?;
            }
            self.is_whole = true;
        }
        self.tell_when_copied()?;
        Ok(self.dump.sources.is_empty()
            && self.supervisor.criu_has_succeeded()
            && self.supervisor.commands_have_succeeded(|it| it.has_file()))
    }

    /// Naps where data flows, and returns how long to wait for events then.
    fn next_wait(&self, heard: Activity, moved: Activity, pace: &mut Pace) -> Wait {
        let is_called = self.called.is_some() && !self.is_dismissed();
        let has_buffer = self.buffer.is_some();
        match heard.max(moved) {
            Activity::Idle if is_called => Wait::Now,
            Activity::Idle => Wait::Until(Instant::now() + CHECK_INTERVAL),
            // CRIU does not wait for the shards, and is to be heard at once; unless it is known to
            // have something to say, and has too many files open.
            Activity::NoRoom if has_buffer && heard == Activity::Idle => pace.rest(),
            Activity::NoRoom => pace.nap_longer(),
            // CRIU waits while its pipe is full, and for nothing that a nap would bring.
            _ if has_buffer && self.dump.criu_has_open_files() => Wait::Now,
            _ => pace.nap(),
        }
    }

    /// Takes the files that a client sends. One that breaks the protocol before it has sent any is
    /// dropped; a later violation means that the image cannot be trusted.
    fn take_requests(&mut self, id: u64) -> Result<Activity> {
        if self.dump.open_files >= self.most_open {
            return Ok(Activity::NoRoom);
        }
        let command_line = self.clients.command_line(id);
        let is_of_cpuinfo = command_line.is_some_and(CommandLine::is_of_cpuinfo);
        if let Some(option) = command_line.and_then(CommandLine::memory_elsewhere) {
            bail!(
                "capturing the image: CRIU was given {option}, so the application's memory stays out of the stream, and the image can never be whole; dump without that option"
            );
        }
        let mut opened = Vec::new();
        let mut call = None;
        let taken = self.clients.next_requests(
            id,
            CALLS_PER_TURN,
            |connection: &mut Connection, message| {
                if let Some(caller) = hook_caller::call_in(&message) {
                    call = Some(caller.to_owned());
                    return Ok(false);
                }
                let source = dump::file_of_criu(connection, message)?;
                let is_open = source.is_some();
                opened.extend(source);
                Ok(is_open)
            },
        );
        let mut activity = Activity::Idle;
        self.dump.dump_check.is_of_cpuinfo = is_of_cpuinfo;
        for source in opened {
            if !self.is_frozen && source.name.as_str() != CPUINFO {
                self.is_frozen = true;
                self.request.progress.reached(milestone::CHECKPOINT_START);
                self.clock.enter(Phase::Frozen);
                self.open_external_files()?;
            }
            self.open(source)?;
            activity = Activity::Busy;
        }
        taken?;
        if let Some(caller) = call {
            self.hear_call(id, &caller);
        }
        Ok(activity)
    }

    /// CRIU's hook calls: CRIU is at `post-dump`. The hook of a CRIU that has not started us hears
    /// nothing.
    fn hear_call(&mut self, id: u64, caller: &str) {
        let connection = self.clients.take(id, self.supervisor.poller());
        if let Some(connection) = connection
            && self.request.caller.as_deref() == Some(caller)
        {
            self.called = Some(Instant::now());
            self.request.progress.hook_connects(connection);
            self.clients.refuse_others(self.supervisor.poller());
        }
    }

    /// CRIU's hook has called, and all that CRIU had sent before was heard.
    fn is_dismissed(&self) -> bool {
        self.called.is_some() && self.clients.have_left()
    }

    /// Fails if CRIU has not come to `post-dump`, or has come there and left files open.
    fn check_hook(&self) -> Result<()> {
        match (&self.request.caller, self.called) {
            (Some(_), None) => bail!(
                "capturing the image: CRIU went away before it was at `post-dump`, so the checkpoint failed (see CRIU's log) and the application, if it lives, goes on; the image is incomplete: discard it"
            ),
            (Some(_), Some(at)) => ensure!(
                at.elapsed() < CLOSE_TIMEOUT || self.dump.unclosed() == 0,
                "capturing the image: CRIU says that it is written, and has not closed {} of its files: a plugin may have forgotten them; discard it",
                self.dump.unclosed()
            ),
            (None, _) => {}
        }
        Ok(())
    }

    /// Opens the external files; those of commands once the application is frozen.
    fn open_external_files(&mut self) -> Result<()> {
        let is_due =
            |(_, end): &mut (_, _)| self.is_frozen || matches!(end, Endpoint::Descriptor(_));
        let due = self.request.external_files.extract_if(.., is_due);
        for (name, end) in due.collect::<Vec<_>>() {
            let pipe = self
                .supervisor
                .source(end, name.as_str(), Pumped::ExternalFile)?;
            self.open(dump::external_file(name, pipe)?)?;
        }
        Ok(())
    }

    fn open(&mut self, source: Source) -> Result<()> {
        let source = self.dump.open(source)?;
        let (poller, interest) = (self.supervisor.poller(), Interest::ReadableEdge);
        let added = poller.add(source.pipe(), Watched::Source, source.id, interest);
        added.with_context(|| format!("preparing to wait for {}", source.name))
    }

    /// Reports, once, that nothing of the application is needed any more, as all of CRIU's files
    /// have come.
    fn tell_when_copied(&mut self) -> Result<()> {
        let has_all = self.buffer.is_some()
            && self.dump.open_files == 0
            && self.supervisor.commands_have_succeeded(|it| it.has_file());
        if self.request.counters.copied.get() > 0 || !self.is_frozen || !has_all {
            return Ok(());
        }
        // An external file that could not be read looks like one that has ended.
        self.supervisor.check()?;
        self.stray_files.check()?;
        self.request.counters.copied.add(1);
        if let Some(buffer) = &mut self.buffer {
            buffer.expect_no_more();
        }
        // A hook that hears it may let CRIU go on.
        if self.request.goes_on_when_copied {
            self.supervisor.let_caller_end();
            self.request.progress.reached(milestone::MEMORY_COPIED);
        } else {
            self.request.progress.line(milestone::MEMORY_COPIED);
        }
        if self.request.goes_on_when_copied || self.request.caller.is_none() {
            self.clock.enter(Phase::Written);
        }
        Ok(())
    }

    /// One turn of a source: what it has goes to the buffer, or else to the shards.
    fn turn(&mut self, id: u64) -> Result<Activity> {
        let Some(source) = self.dump.sources.get_mut(&id) else {
            return Ok(Activity::Idle);
        };
        let is_replaced = source.is_replaced;
        let activity = match &mut self.buffer {
            _ if is_replaced => source.drain()?,
            Some(buffer) => buffer.copy(source)?,
            None => self.image_writer.advance(source)?,
        };
        self.dump.end_turn(id, activity);
        if activity == Activity::Complete && (self.buffer.is_none() || is_replaced) {
            self.complete(id);
        }
        Ok(activity)
    }

    /// A file is complete in the image, or does not count.
    fn complete(&mut self, id: u64) {
        self.dump.remove(id);
        self.request.counters.files.add(1);
    }

    /// Gives the shards what the buffer holds, as far as they have room.
    fn feed_shards(&mut self) -> Result<Activity> {
        let mut activity = Activity::Idle;
        let mut pieces = 0..PIECES_PER_TURN;
        while let Some(buffer) = &self.buffer
            && (buffer.has_been_full || !self.dump.criu_has_open_files())
            && let Some(source) = self.dump.first_buffered()
            && pieces.next().is_some()
        {
            let left = source.left_of(self.image_writer.unit);
            let chunk = source.buffered_chunk(left.unwrap_or(LARGEST));
            let given = self.image_writer.give(source, chunk)?;
            match given {
                Activity::NoRoom => return Ok(activity.max(given)),
                Activity::Complete => {
                    let id = source.id;
                    self.complete(id);
                }
                Activity::Busy | Activity::Idle => {}
            }
            activity = Activity::Busy;
        }
        Ok(activity)
    }
}
