//! Receives an image: from the shards, in order, into a store.
//!
//! Shards are read as their data comes, never one after another: when a capture is connected
//! directly, waiting for an empty shard while another is full is a deadlock. What is ahead of its
//! turn becomes a piece, in memory or in a pipe that holds it, which it becomes anyway where the
//! image is kept. For files on disk that is a detour: a shard that is ahead is left alone for as
//! long as the image makes progress without it, and then taken to memory up to a limit.
//!
//! A gap in the image shows as soon as it is certain: a shard's positions only grow, so a marker
//! that is behind the last one of every shard will not come.

mod arriving;
mod assembly;
mod index;
mod order;
mod reader;
mod shard_turn;

use std::io;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::format::ImageName;
use crate::os::memory;
use crate::os::pipe::{ReadEnd, WriteEnd};
use crate::os::poller::{Event, Interest, Wait, Watched};
use crate::os::process::CapturingProcess;
use crate::pace::{Activity, Pace};
use crate::report::meter::{Counter, Counters, Meter};
use crate::report::progress::Stats;
use crate::store::external::{External, ExternalOutputs};
use crate::store::held_pipe::PipePool;
use crate::store::{Ahead, Arena, Store};
use crate::supervision::{Failure, Supervisor};
use assembly::{Assembly, Image};
use order::Place;
use reader::{Found, Reader, Stage};
use shard_turn::Turn;

pub(crate) use arriving::Arriving;

/// When extracting to disk: the time without progress after which data that arrived early is read
/// into memory. It is longer than other processes take to fill the pipe that the image waits for.
const STALL: Duration = Duration::from_millis(20);

/// How long the end of the shards is waited for after the image's end, to find out whether
/// something follows. It is there already when the shards come from other programs' output; a
/// supervisor may keep its write end open, and need not.
const END_PATIENCE: Duration = Duration::from_millis(200);

/// Reads shards, and gives their steps to an image.
struct Receiver<'a, I> {
    supervisor: &'a Supervisor,
    shards: Vec<Reader>,
    /// The shards that may have something.
    busy: Vec<bool>,
    image: I,
    /// The first shard with a marker, and the process that captured it.
    captured_by: Option<(usize, Option<CapturingProcess>)>,
    arena: Arena,
    /// What holds data in pipes, where that is possible.
    holder: Option<PipePool>,
    /// How many bytes are taken when memory is looked at again.
    look_at_memory: u64,
    /// Made for the first file on disk.
    stage: Option<Stage>,
    /// How the busiest shard fared last.
    last: Turn,
    /// When the image last made progress, or there was nothing to be had.
    progress: Instant,
    /// Until when the end of the shards is waited for, once the image has ended.
    end_by: Option<Instant>,
    start: Option<Instant>,
    files: Counter,
}

/// Receives a whole image into a store, and tells what passed through each shard.
///
/// # Errors
/// When the image is damaged, incomplete or too large for the store.
pub fn receive<S: Store + 'static>(
    shards: Vec<(ReadEnd, String)>,
    external_files: Vec<(ImageName, WriteEnd)>,
    store: S,
    counters: &Counters,
    supervisor: &Supervisor,
) -> Result<(S, Stats), Failure> {
    let outlets = ExternalOutputs::new(external_files, supervisor.poller())?;
    let store = External::new(store, outlets);
    let image = |labels| Assembly::new(store, labels);
    let mut receiver = Receiver::new(shards, image, counters, supervisor)?;
    let received = receiver.receive_all();
    let stats = receiver.stats();
    let (shards, mut image) = (receiver.shards, receiver.image);
    match received.and_then(|()| image.outlets().check_complete()) {
        Ok(()) => Ok((image.into_store()?, stats)),
        Err(error) => Err(Failure::new(error, (shards, image))),
    }
}

/// What is read of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reading {
    All,
    /// No data behind a marker that comes after this one. Shards that stand there rest.
    UpTo(Option<u64>),
}

impl Reading {
    /// Whether data at this place is left in its shard.
    fn leaves(self, place: Option<Place>) -> bool {
        match (self, place) {
            (Reading::UpTo(last), Some(place)) => last.is_none_or(|last| place.seq > last),
            (Reading::All, _) | (_, None) => false,
        }
    }
}

impl<'a, I: Image> Receiver<'a, I> {
    fn new(
        shards: Vec<(ReadEnd, String)>,
        image: impl FnOnce(Vec<String>) -> I,
        counters: &Counters,
        supervisor: &'a Supervisor,
    ) -> Result<Self> {
        let labels = shards.iter().map(|(_, label)| label.clone()).collect();
        let shards = shards
            .into_iter()
            .zip(&counters.shards)
            .map(|((pipe, label), bytes)| Reader::new(pipe, label, Meter::new(bytes.clone())))
            .collect::<Result<Vec<_>>>()?;
        let now = Instant::now();
        let receiver = Self {
            supervisor,
            busy: vec![true; shards.len()],
            shards,
            image: image(labels),
            captured_by: None,
            arena: Arena::new(),
            holder: PipePool::new(),
            look_at_memory: 0,
            stage: None,
            last: Turn::Idle,
            progress: now,
            end_by: None,
            start: None,
            files: counters.files.clone(),
        };
        receiver.watch().context("preparing to wait for events")?;
        Ok(receiver)
    }

    /// Acts on events, takes what the shards have, and sends what readers of external files take.
    fn step(&mut self, events: &[Event], reading: Reading) -> Result<Activity> {
        let now = Instant::now();
        self.start.get_or_insert(now);
        self.handle(events)?;
        if self.last == Turn::Idle {
            // There was nothing to be had, which is no stall.
            self.progress = now;
        }
        let (turn, found, room) = self.round(reading)?;
        self.last = turn;
        self.check_memory()?;
        let sent = self.image.outlets().send()?;
        for name in &sent.sent_whole {
            self.supervisor.end_input(name);
        }
        if turn == Turn::Busy {
            return Ok(Activity::Filled { found, room });
        }
        if let Some(activity) = sent.activity() {
            return Ok(activity);
        }
        self.check_supply()?;
        let wait = Wait::Forever.or_until(self.image.outlets().transfers().try_again());
        let stall = (turn == Turn::Ahead).then(|| Instant::now() + STALL);
        Ok(Activity::Idle(wait.or_until(stall)))
    }

    fn receive_all(&mut self) -> Result<()> {
        let mut pace = Pace::new();
        let (mut events, mut wait) = (Vec::new(), Wait::Now);
        while !self.image.is_complete() || self.image.outlets().is_sending() {
            self.supervisor
                .poller()
                .wait(wait, &mut events)
                .context("waiting for the shards")?;
            wait = pace.after(self.step(&events, Reading::All)?);
        }
        self.check_end()
    }

    fn stats(&self) -> Stats {
        let shards = self.shards.iter();
        Stats {
            shards: shards
                .map(|shard| shard.meter().stats(self.start))
                .collect(),
        }
    }

    fn watch(&self) -> io::Result<()> {
        for (index, shard) in (0..).zip(&self.shards) {
            let poller = self.supervisor.poller();
            poller.add(shard.pipe(), Watched::Shard, index, Interest::ReadableEdge)?;
        }
        Ok(())
    }

    fn handle(&mut self, events: &[Event]) -> Result<()> {
        for event in events {
            let index = event.id as usize;
            match event.kind {
                Watched::Interrupt | Watched::Caller => self.supervisor.check()?,
                Watched::Shard => {
                    self.busy[index] = true;
                    if event.hung_up {
                        self.shards[index].hang_up();
                    }
                }
                Watched::External => self.image.outlets().transfers().made_room(event.id),
                _ => {}
            }
        }
        Ok(())
    }

    /// Gives every shard that may have something one turn. Tells how the busiest fared, how many
    /// bytes were taken, and how many the pipes hold that they were taken from.
    fn round(&mut self, reading: Reading) -> Result<(Turn, u64, u64)> {
        let before = self.image.next();
        let taken_before = self.taken();
        let (mut overall, mut room) = (Turn::Idle, 0);
        if self.image.outlets().is_behind() {
            return Ok((Turn::Ahead, 0, 0));
        }
        for index in 0..self.shards.len() {
            if self.image.is_complete() || !self.busy[index] {
                continue;
            }
            let turn = self.turn(index, reading)?;
            self.busy[index] = turn != Turn::Idle || self.rests(index, reading);
            if turn == Turn::Busy {
                room += self.shards[index].capacity() as u64;
            }
            overall = overall.max(turn);
        }
        if self.image.next() != before {
            self.progress = Instant::now();
        }
        Ok((overall, self.taken() - taken_before, room))
    }

    /// Fails if a shard is of another image than the first: their markers may fit together.
    fn check_origin(&mut self, shard: usize, origin: Option<CapturingProcess>) -> Result<()> {
        let first = self.captured_by.get_or_insert((shard, origin.clone()));
        let told = |origin: &Option<CapturingProcess>| match origin {
            Some(process) => process.to_string(),
            None => "a streamer that leaves no name".into(),
        };
        ensure!(
            first.1 == origin,
            "putting the image together: {} and {} are of different images, captured by {} and by \
             {}: give all shards of one capture",
            self.shards[first.0].label(),
            self.shards[shard].label(),
            told(&first.1),
            told(&origin)
        );
        Ok(())
    }

    /// Whether a shard stands at data that is left in it.
    fn rests(&self, index: usize, reading: Reading) -> bool {
        reading.leaves(self.shards[index].chunk()) && !self.image.keeps(index)
    }

    /// Fails before an image that is kept takes the last of the memory. Pages in pipes belong to no
    /// process, so that the kernel would kill others for them.
    fn check_memory(&mut self) -> Result<()> {
        let taken = self.taken();
        if taken < self.look_at_memory || self.image.ahead() != Ahead::Piece {
            return Ok(());
        }
        let Some(available) = memory::available() else {
            self.look_at_memory = u64::MAX;
            return Ok(());
        };
        if available < memory::LEAST {
            bail!(
                "keeping the image in memory: {} MB of it are here, and only {} MB of memory are \
                 left on this machine or in this cgroup: it does not fit",
                taken / 1_000_000,
                available / 1_000_000
            );
        }
        self.look_at_memory = taken + memory::until_next_look(available);
        Ok(())
    }

    /// Bytes taken from all shards so far.
    fn taken(&self) -> u64 {
        self.shards.iter().map(Reader::offset).sum()
    }

    /// Whether the image has made no progress for a while.
    fn is_stalled(&self) -> bool {
        self.progress.elapsed() >= STALL
    }

    /// Fails if the index cannot come any more.
    fn check_index(&self) -> Result<()> {
        // The index says so in its first marker.
        let is_no_index = |shard: &Reader| shard.has_ended() || shard.last_seq().is_some();
        match self.image.awaited_index() {
            Some(index) if self.shards[index].has_ended() => bail!(
                "putting the image together: {}, its index, was cut off at byte {}",
                self.shards[index].label(),
                self.shards[index].offset()
            ),
            None if !self.image.has_index() && self.shards.iter().all(is_no_index) => {
                bail!("putting the image together: no shard is an index: serve it without --index")
            }
            _ => Ok(()),
        }
    }

    /// Fails if the next marker cannot come any more.
    fn check_supply(&self) -> Result<()> {
        if self.image.is_complete() {
            return Ok(());
        }
        let Some(next) = self.image.next().map(|place| place.seq) else {
            return self.check_index();
        };
        let may_supply = |shard: &Reader| {
            shard.chunk().is_some_and(|place| place.seq == next)
                || (!shard.has_ended() && shard.last_seq().is_none_or(|last| last < next))
        };
        if self.shards.iter().any(may_supply) {
            return Ok(());
        }
        let places = self.shards.iter().map(|shard| {
            let state = if shard.has_ended() { "ended" } else { "stands" };
            let last = match shard.last_seq() {
                Some(last) => format!("after marker {last}"),
                None => "without any marker".into(),
            };
            format!(
                "{} {state} at byte {} {last}",
                shard.label(),
                shard.offset()
            )
        });
        bail!(
            "putting the image together: marker {next} is missing: a shard was cut off, damaged or \
             left out ({})",
            places.collect::<Vec<_>>().join("; ")
        )
    }

    /// Waits for the end of the shards: the end marker must be the last thing on them.
    fn check_end(&mut self) -> Result<()> {
        let mut events = Vec::new();
        while !self.have_ended()? {
            let end = Instant::now() + END_PATIENCE;
            self.supervisor
                .poller()
                .wait(Wait::Until(self.end_by.unwrap_or(end)), &mut events)
                .context("waiting for the end of the shards")?;
            self.handle(&events)?;
        }
        Ok(())
    }

    /// Whether the shards have ended, or have been given the time to.
    ///
    /// # Errors
    /// When something follows the end of the image.
    fn have_ended(&mut self) -> Result<bool> {
        let mut all_ended = true;
        for shard in &mut self.shards {
            let has_more = shard.chunk().is_some() || !shard.is_read_out();
            if has_more || shard.read(&mut self.arena, 1)? == Found::Something {
                bail!(
                    shard.error(
                        "something follows the end of the image: is the shard of another one?"
                    )
                );
            }
            all_ended &= shard.has_ended();
        }
        let now = Instant::now();
        let end = *self.end_by.get_or_insert(now + END_PATIENCE);
        Ok(all_ended || now >= end)
    }
}
