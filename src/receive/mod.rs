//! Receives an image: from the shards, in order, into a store.
//!
//! Shards are read as their data comes, never one after another: when a capture is connected
//! directly, waiting for an empty shard while another is full is a deadlock. Early data becomes a
//! piece, in memory or in a pipe that holds it, which it becomes anyway where the image is kept.
//! For files on disk that is a detour: a shard that is ahead is left alone for as long as the image
//! makes progress without it, and then taken to memory.
//!
//! Memory is the one limit. Where what comes does not fit, this fails before the kernel kills; but
//! shards of an image with an index rest while memory is short and CRIU waits for nothing that has
//! not come, and shards on the way to disk rest for a while, as the one that is missing may come.
//!
//! A gap in the image shows as soon as it is certain: a shard's positions only grow, so a marker
//! that is behind the last one of every shard will not come.

mod assembly;
mod index;
mod order;
mod reader;
mod shard_turn;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::format::{CapturingProcess, ImageName};
use crate::os::memory;
use crate::os::pipe::{ReadEnd, WriteEnd};
use crate::os::poller::{Event, Interest, Wait, Watched};
use crate::pace::{Activity, Pace};
use crate::report::meter::{Counter, Counters, Meter};
use crate::report::progress::Stats;
use crate::report::times::{Clock, Phase, Waiting};
use crate::store::external::External;
use crate::store::held_pipe::PipePool;
use crate::store::{Ahead, Arena, Store};
use crate::supervision::{Failure, Supervisor};
pub(crate) use assembly::{Assembly, Image};
pub(crate) use index::Indexed;
use order::Reading;
use reader::ShardReader;
use shard_turn::Turn;

/// When extracting to disk: the time without progress after which early data is read into memory.
/// It is longer than other processes take to fill the pipe that the image waits for.
const STALL: Duration = Duration::from_millis(20);

/// The time between two looks at the memory while it is short.
const SHORTAGE_LOOK: Duration = Duration::from_millis(10);

/// The longest rest of shards while memory is short and the index does not go on. A single writer,
/// such as a live capture, may block on a data shard before it finishes the index.
const INDEX_PATIENCE: Duration = Duration::from_secs(1);

/// The longest rest of shards while memory is short and the image on its way to disk does not go
/// on.
const SHORTAGE_PATIENCE: Duration = Duration::from_secs(10);

/// Bytes of memory that a marker takes at most while it waits for its turn.
const MARKER_COST: u64 = 256;

/// Reads shards, and gives their steps to an image.
pub(crate) struct Receiver<'a, I> {
    supervisor: &'a Supervisor,
    shards: Vec<ShardReader>,
    pub(crate) image: I,
    /// The first shard that had a marker, and the process that captured it.
    captured_by: Option<(usize, Option<CapturingProcess>)>,
    /// The shard that the image is laid out by.
    index: Option<usize>,
    /// The time at which the index last went on.
    index_progress: Instant,
    arena: Arena,
    /// The pipes that hold data.
    pipes: PipePool,
    /// The memory that is left is looked at when this number of bytes is taken.
    next_look: u64,
    /// It is short, and looked at at this time as well.
    short_until: Option<Instant>,
    /// Markers that were taken.
    markers: u64,
    /// The last turn of the busiest shard.
    last: Turn,
    /// The time at which the image last made progress, or there was nothing to be had.
    progress: Instant,
    start: Instant,
    files: Counter,
    clock: Clock,
}

/// Receives a whole image into a store. Returns the statistics of each shard, too.
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
    let mut receiver =
        Receiver::<Assembly<S>>::new(shards, external_files, store, counters, supervisor)?;
    let received = receiver.receive_all();
    let stats = receiver.stats();
    let open = receiver.into_open();
    match received {
        Ok(()) => Ok((open.1.into_store(), stats)),
        Err(error) => Err(Failure::new(error, open)),
    }
}

impl<'a, I: Image> Receiver<'a, I> {
    /// Receives from these shards into a store.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub(crate) fn new(
        shards: Vec<(ReadEnd, String)>,
        external_files: Vec<(ImageName, WriteEnd)>,
        store: I::Store,
        counters: &Counters,
        supervisor: &'a Supervisor,
    ) -> Result<Self> {
        let store = External::new(store, external_files)?;
        let shards = shards
            .into_iter()
            .zip(&counters.shards)
            .map(|((pipe, label), bytes)| ShardReader::new(pipe, &label, Meter::new(bytes.clone())))
            .collect::<Result<Vec<_>>>()?;
        for (index, shard) in (0..).zip(&shards) {
            let poller = supervisor.poller();
            poller
                .add(&shard.pipe, Watched::Shard, index, Interest::ReadableEdge)
                .context("preparing to wait for events")?;
        }
        let now = Instant::now();
        let mut clock = Clock::new(shards.len());
        clock.enter(Phase::Received);
        Ok(Self {
            supervisor,
            shards,
            image: I::new(store),
            captured_by: None,
            index: None,
            index_progress: now,
            arena: Arena::new(),
            pipes: PipePool::new(I::Store::AHEAD),
            next_look: 0,
            short_until: None,
            markers: 0,
            last: Turn::Idle,
            progress: now,
            start: now,
            files: counters.files.clone(),
            clock,
        })
    }

    /// Everything that must stay open until the reason of a failure is reported.
    pub(crate) fn into_open(self) -> (Vec<ShardReader>, I) {
        // A process that is being started may have a shard open, too, whose events would go on.
        for shard in &self.shards {
            self.supervisor.poller().remove(&shard.pipe);
        }
        (self.shards, self.image)
    }

    /// Acts on events, takes what the shards have, and sends what readers of external files take.
    /// The readers of the files that `starving` names have nothing left.
    pub(crate) fn step(
        &mut self,
        events: &[Event],
        starving: impl FnOnce() -> Vec<ImageName>,
    ) -> Result<Activity> {
        let now = Instant::now();
        self.handle(events)?;
        if self.last == Turn::Idle {
            // There was nothing to be had, which is no stall.
            self.progress = now;
        }
        let filled = self.round(self.reading(starving))?;
        self.check_memory()?;
        let sent = self.image.store().send(self.supervisor.poller())?;
        for name in &sent.sent_whole {
            self.supervisor.end_input(name);
        }
        if let Some(activity) = filled.or(sent.activity()) {
            return Ok(activity);
        }
        self.check_supply()?;
        let stall = (self.last == Turn::Ahead).then(|| Instant::now() + STALL);
        let ends = self.shards.iter().filter_map(|shard| shard.end_by);
        Ok(Activity::Idle(
            Wait::Forever
                .or_until(stall)
                .or_until(self.short_until)
                .or_until(ends.filter(|&end| end > now).min()),
        ))
    }

    fn receive_all(&mut self) -> Result<()> {
        let mut pace = Pace::new();
        let (mut events, mut wait) = (Vec::new(), Wait::Now);
        while !self.is_whole()? || self.is_sending() {
            let waited = self.supervisor.poller().wait(wait, &mut events);
            waited.context("waiting for the shards")?;
            let activity = self.step(&events, Vec::new)?;
            self.keep_time(match activity {
                Activity::Idle(_) => Waiting::ForShards,
                _ => Waiting::No,
            });
            wait = pace.after(activity);
        }
        self.image.finish()
    }

    /// Counts the time until the next call as this wait.
    pub(crate) fn keep_time(&mut self, waiting: Waiting) {
        let shards = self.shards.iter();
        let slow = shards.map(|shard| !shard.is_busy && !shard.has_ended);
        self.clock.wait(waiting, slow);
    }

    /// Notes that CRIU can connect from now on.
    pub(crate) fn start_serving(&mut self) {
        self.clock.enter(Phase::Served);
    }

    /// True if readers of external files still have to take something.
    pub(crate) fn is_sending(&mut self) -> bool {
        self.image.store().is_sending()
    }

    pub(crate) fn stats(&self) -> Stats {
        let shards = self.shards.iter();
        Stats {
            shards: shards.map(|shard| shard.meter.stats(self.start)).collect(),
            times: self.clock.times(),
        }
    }

    fn handle(&mut self, events: &[Event]) -> Result<()> {
        for event in events {
            let index = event.id as usize;
            match event.kind {
                Watched::Interrupt | Watched::Caller => self.supervisor.check()?,
                Watched::Shard => self.shards[index].is_busy = true,
                Watched::External => self.image.store().made_room(event.id),
                _ => {}
            }
        }
        Ok(())
    }

    /// Gives every shard that may have something one turn. Returns how full the pipes were, if
    /// anything was taken out of them.
    fn round(&mut self, reading: Reading) -> Result<Option<Activity>> {
        let before = self.image.next();
        let taken_before = self.taken();
        let mut room = 0;
        if self.image.store().is_behind() {
            self.last = Turn::Ahead;
            return Ok(None);
        }
        self.last = Turn::Idle;
        for index in 0..self.shards.len() {
            if self.image.is_complete() || !self.shards[index].is_busy {
                continue;
            }
            let turn = self.turn(index, reading)?;
            self.shards[index].is_busy = turn != Turn::Idle || self.rests(index, reading);
            if turn == Turn::Busy {
                room += self.shards[index].capacity as u64;
            }
            self.last = self.last.max(turn);
        }
        if self.image.next() != before {
            self.progress = Instant::now();
        }
        let found = self.taken() - taken_before;
        Ok((self.last == Turn::Busy).then_some(Activity::Filled { found, room }))
    }

    /// True if a shard stands at data that is left in it. The index never rests.
    fn rests(&self, shard: usize, reading: Reading) -> bool {
        reading.leaves(self.shards[shard].chunk()) && self.index != Some(shard)
    }

    /// Looks at the memory that is left, and fails before an image that is kept takes the last of
    /// it. Pages in pipes belong to no process, so that the kernel would kill others for them.
    fn check_memory(&mut self) -> Result<()> {
        let now = Instant::now();
        let taken = self.taken() + self.markers * MARKER_COST;
        let is_due = self.short_until.is_some_and(|until| now >= until);
        if taken < self.next_look && !is_due {
            return Ok(());
        }
        let Some(available) = memory::available() else {
            self.next_look = u64::MAX;
            return Ok(());
        };
        let is_short = available < memory::SHORT;
        let has_waited_in_vain =
            self.last == Turn::Ahead && is_short && self.progress.elapsed() >= SHORTAGE_PATIENCE;
        if available < memory::LEAST && self.image.ahead() == Ahead::Piece || has_waited_in_vain {
            bail!(
                "keeping the image in memory: {} MB of it are here, and only {} MB of memory are \
                 left on this machine or in this cgroup: it does not fit",
                self.taken() / 1_000_000,
                available / 1_000_000
            );
        }
        self.next_look = taken + memory::until_next_look(available);
        self.short_until = is_short.then_some(now + SHORTAGE_LOOK);
        Ok(())
    }

    /// Bytes taken from all shards so far.
    fn taken(&self) -> u64 {
        self.shards.iter().map(|shard| shard.taken).sum()
    }

    /// True if data on its way to disk is taken before its turn: the image has made no progress
    /// for a while, and there is memory.
    fn takes_early_data(&self) -> bool {
        self.progress.elapsed() >= STALL && self.short_until.is_none()
    }

    /// Fails if the index cannot come any more.
    fn check_index(&self) -> Result<()> {
        // The index says so in its first marker.
        let is_no_index = |shard: &ShardReader| shard.has_ended || shard.last_seq.is_some();
        match self.index {
            Some(index) if self.shards[index].has_ended && !self.image.is_index_read() => bail!(
                "putting the image together: {}, its index, was cut off at byte {}",
                self.shards[index].label,
                self.shards[index].taken
            ),
            None if self.shards.iter().all(is_no_index) => {
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
        let may_supply = |shard: &ShardReader| {
            shard.chunk().is_some_and(|place| place.seq == next)
                || (!shard.has_ended && shard.last_seq.is_none_or(|last| last < next))
        };
        if self.shards.iter().any(may_supply) {
            return Ok(());
        }
        let places = self.shards.iter().map(|shard| {
            let state = if shard.has_ended { "ended" } else { "stands" };
            let last = match shard.last_seq {
                Some(last) => format!("after marker {last}"),
                None => "without any marker".into(),
            };
            format!("{} {state} at byte {} {last}", shard.label, shard.taken)
        });
        bail!(
            "putting the image together: marker {next} is missing: a shard was cut off, damaged or \
             left out ({})",
            places.collect::<Vec<_>>().join("; ")
        )
    }

    /// Finds out which files there are, as soon as that is certain: once all of the index, or of an
    /// image without one, was read, and its shard has ended, or was given the time to. False until
    /// then.
    ///
    /// # Errors
    /// When the index makes no sense.
    pub(crate) fn knows_files(&mut self) -> Result<bool> {
        if !I::HAS_INDEX {
            return self.is_whole();
        }
        if !self.image.is_laid_out()
            && self.image.is_index_read()
            && let Some(index) = self.index
            && self.shards[index].is_over(&mut self.arena, &self.pipes)?
            && self
                .supervisor
                .commands_have_succeeded(|it| it.is_for_shard(index))
        {
            self.image.lay_out()?;
        }
        Ok(self.image.is_laid_out())
    }

    /// The data to read: everything, or, while memory is short, the data that is needed next for
    /// these files, whose readers wait.
    fn reading(&self, starving: impl FnOnce() -> Vec<ImageName>) -> Reading {
        let index_may_come = self.index_progress.elapsed() < INDEX_PATIENCE;
        if self.short_until.is_none() || !I::HAS_INDEX {
            Reading::All
        } else if self.image.is_laid_out() {
            self.image.wanted(&starving())
        } else if index_may_come || self.image.is_index_read() {
            Reading::UpTo(None)
        } else {
            Reading::All
        }
    }

    /// True if all of the image has come, and nothing follows it: the shards have ended, or have
    /// been given the time to.
    ///
    /// # Errors
    /// When something follows.
    pub(crate) fn is_whole(&mut self) -> Result<bool> {
        let mut is_whole = self.image.is_complete();
        if is_whole {
            for shard in &mut self.shards {
                is_whole &= shard.is_over(&mut self.arena, &self.pipes)?;
            }
        }
        Ok(is_whole)
    }

    /// The files of an image that is served, or of the store that it goes to.
    pub(crate) fn store(&mut self) -> &mut I::Store {
        &mut self.image.store().behind
    }
}
