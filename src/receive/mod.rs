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

mod assembly;
mod order;
mod reader;

use std::io;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::format::{Body, ImageName};
use crate::os::memory;
use crate::os::pipe::{ReadEnd, WriteEnd};
use crate::os::poller::{Event, Interest, Kind, Poller, Wait};
use crate::pace::Pace;
use crate::report::meter::{Counter, Counters, Meter};
use crate::report::progress::Stats;
use crate::store::external::External;
use crate::store::held::Holder;
use crate::store::{Ahead, Arena, Piece, Store, Target};
use crate::supervision::Interrupts;
use assembly::{Assembly, Origin, Step};
use order::Place;
use reader::{Found, Holding, Reader, Stage};

/// Bytes spliced from one shard before others have their turn.
const TURN: u64 = 1 << 20;

/// When extracting to disk: the time without progress after which data that arrived early is read
/// into memory. It is longer than other processes take to fill the pipe that the image waits for.
const STALL: Duration = Duration::from_millis(20);

/// The most that waits in memory for its turn on the way to disk, in bytes.
const MOST_AHEAD: usize = 256 << 20;

/// How long the end of the shards is waited for after the image's end, to find out whether
/// something follows. It is there already when the shards come from other programs' output; a
/// supervisor may keep its write end open, and need not.
const END_PATIENCE: Duration = Duration::from_millis(200);

/// How long a full pipe of an external file is left alone if no event comes, should the kernel have
/// ended a call for another reason than a full pipe.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// What must be left of the machine's memory, or of our cgroup's, in bytes.
const LEAST_MEMORY: u64 = 32 << 20;

/// The most that is taken before memory is looked at again, in bytes.
const MOST_UNSEEN: u64 = 256 << 20;

/// What is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Watched {
    Interrupt,
    Shard,
    /// The pipe of an external file.
    External,
}

impl Kind for Watched {
    const ALL: &'static [Self] = &[Self::Interrupt, Self::Shard, Self::External];
}

/// How far a shard got in one turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Turn {
    /// It has nothing now.
    Idle,
    /// It is ahead of the others, and left alone.
    Ahead,
    /// It moved something.
    Busy,
}

/// What follows a step of a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    /// It moved something, and there may be more.
    GoOn,
    Stop(Turn),
}

struct Receiver<'a, S: Store> {
    poller: Poller<Watched>,
    interrupts: &'a Interrupts,
    shards: Vec<Reader>,
    /// The shards that may have something.
    busy: Vec<bool>,
    image: Assembly<External<S>>,
    arena: &'a mut Arena,
    /// What holds data in pipes, where that is possible.
    holder: Option<Holder>,
    /// How many bytes are taken when memory is looked at again.
    look_at_memory: u64,
    /// Made for the first file on disk.
    stage: Option<Stage>,
    /// When the image last made progress.
    progress: Instant,
    start: Option<Instant>,
    files: Counter,
}

/// Receives a whole image into a store, and tells what passed through each shard.
///
/// # Errors
/// When the image is damaged, incomplete or too large for the store.
pub fn receive<S: Store>(
    shards: Vec<(ReadEnd, String)>,
    external_files: Vec<(ImageName, WriteEnd)>,
    store: S,
    arena: &mut Arena,
    counters: &Counters,
    interrupts: &Interrupts,
) -> Result<(S, Stats)> {
    let labels = shards.iter().map(|(_, label)| label.clone()).collect();
    let shards = shards
        .into_iter()
        .zip(&counters.shards)
        .map(|((pipe, label), bytes)| Reader::new(pipe, label, Meter::new(bytes.clone())))
        .collect::<Result<Vec<_>>>()?;
    let mut receiver = Receiver {
        poller: Poller::new().context("preparing to wait for events")?,
        interrupts,
        busy: vec![true; shards.len()],
        shards,
        image: Assembly::new(External::new(store, external_files)?, labels),
        arena,
        holder: Holder::new(),
        look_at_memory: 0,
        stage: None,
        progress: Instant::now(),
        start: None,
        files: counters.files.clone(),
    };
    receiver.run()?;
    let shards = receiver.shards.iter();
    let stats = Stats {
        shards: shards
            .map(|shard| shard.meter().stats(receiver.start))
            .collect(),
    };
    Ok((receiver.image.into_store()?.into_behind()?, stats))
}

impl<S: Store> Receiver<'_, S> {
    fn run(&mut self) -> Result<()> {
        self.watch().context("preparing to wait for events")?;
        let mut pace = Pace::new();
        let mut events = Vec::new();
        let (mut wait, mut turn) = (Wait::Now, Turn::Idle);
        while !self.image.is_complete() || self.image.store().is_sending() {
            self.poller
                .wait(wait, &mut events)
                .context("waiting for the shards")?;
            self.start.get_or_insert_with(Instant::now);
            self.handle(&events)?;
            if wait != Wait::Now && events.is_empty() {
                self.try_external_files_again();
            }
            if turn == Turn::Idle {
                // What there was to be had is no stall.
                self.progress = Instant::now();
            }
            let (moved, found, room) = self.round()?;
            turn = moved;
            self.check_memory()?;
            let (sent, room_to_send) = self.image.store().send()?;
            wait = match turn {
                Turn::Busy => {
                    pace.nap_until_filled(found, room);
                    Wait::Now
                }
                _ if sent > 0 => {
                    pace.nap_until_emptied(sent as u64, room_to_send as u64);
                    Wait::Now
                }
                Turn::Ahead => {
                    self.check_supply()?;
                    Wait::Until(Instant::now() + STALL)
                }
                Turn::Idle => {
                    self.check_supply()?;
                    let sending = self.image.store().is_sending();
                    Wait::Forever.or_until(sending.then(|| Instant::now() + TRY_AGAIN))
                }
            };
        }
        self.check_end()
    }

    fn watch(&mut self) -> io::Result<()> {
        let Self { poller, image, .. } = self;
        poller.add(self.interrupts, Watched::Interrupt, 0, Interest::Readable)?;
        for (index, shard) in (0..).zip(&self.shards) {
            poller.add(shard.pipe(), Watched::Shard, index, Interest::ReadableEdge)?;
        }
        for (number, pipe) in image.store().pipes() {
            poller.add(
                pipe,
                Watched::External,
                number as u64,
                Interest::WritableEdge,
            )?;
        }
        Ok(())
    }

    fn handle(&mut self, events: &[Event<Watched>]) -> Result<()> {
        for event in events {
            let index = event.id as usize;
            match event.kind {
                Watched::Interrupt => self.interrupts.check()?,
                Watched::Shard => {
                    self.busy[index] = true;
                    if event.hung_up {
                        self.shards[index].hang_up();
                    }
                }
                Watched::External => self.image.store().made_room(index),
            }
        }
        Ok(())
    }

    fn try_external_files_again(&mut self) {
        let store = self.image.store();
        let open: Vec<_> = store.pipes().map(|(number, _)| number).collect();
        open.into_iter().for_each(|number| store.made_room(number));
    }

    /// Gives every shard that may have something one turn. Tells how the busiest fared, how many
    /// bytes were taken, and how many the pipes hold that they were taken from.
    fn round(&mut self) -> Result<(Turn, u64, u64)> {
        let before = self.image.next();
        let taken_before = self.taken();
        let (mut overall, mut room) = (Turn::Idle, 0);
        if self.image.store().is_behind() {
            return Ok((Turn::Ahead, 0, 0));
        }
        for index in 0..self.shards.len() {
            if self.image.is_complete() || !self.busy[index] {
                continue;
            }
            let turn = self.turn(index)?;
            self.busy[index] = turn != Turn::Idle;
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
        if available < LEAST_MEMORY {
            bail!(
                "keeping the image in memory: {} MB of it are here, and only {} MB of memory are \
                 left on this machine or in this cgroup: it does not fit",
                taken / 1_000_000,
                available / 1_000_000
            );
        }
        // Less and less may come before the next look, and never much: others take memory too.
        self.look_at_memory = taken + (available / 8).min(MOST_UNSEEN);
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

    /// Takes from one shard what it has, up to a limit.
    fn turn(&mut self, index: usize) -> Result<Turn> {
        let mut turn = Turn::Idle;
        let mut allowance = Allowance::new(self.way(index), &self.shards[index]);
        while !self.image.is_complete() {
            let next = self.image.next().seq;
            if self.image.is_far_ahead(false)
                && self.shards[index].last_seq() > Some(next)
                && self.image.is_far_ahead(self.is_stalled())
            {
                return Ok(turn.max(Turn::Ahead));
            }
            let then = match self.shards[index].chunk() {
                Some(place) => self.take_data(index, place, &mut allowance)?,
                None => self.take_marker(index, &mut allowance)?,
            };
            match then {
                Then::GoOn => turn = Turn::Busy,
                Then::Stop(last) => return Ok(turn.max(last)),
            }
        }
        Ok(turn)
    }

    fn take_marker(&mut self, index: usize, allowance: &mut Allowance) -> Result<Then> {
        let shard = &mut self.shards[index];
        let Some(marker) = shard.next_marker()? else {
            let most = match allowance.way {
                Way::Read => usize::MAX,
                Way::Splice => shard.ahead_for_marker(),
            };
            return allowance.read(shard, self.arena, most);
        };
        match marker.body {
            Body::Data(1..) => return Ok(Then::GoOn),
            Body::FileEnd => self.files.add(1),
            _ => {}
        }
        let step = Step::Marker(marker.body);
        self.submit(index, Place::of(marker.seq), step)?;
        Ok(Then::GoOn)
    }

    /// How data is best taken from a shard at present.
    fn way(&self, index: usize) -> Way {
        let (holder, shard) = (self.holder.as_ref(), &self.shards[index]);
        // A pipe that was begun is filled, and may be the last one that there is room for.
        let holds = shard.is_holding() || holder.is_some_and(Holder::has_room) && shard.may_hold();
        match self.image.ahead() {
            Ahead::Piece if !holds => Way::Read,
            Ahead::Piece | Ahead::Shard => Way::Splice,
        }
    }

    /// Takes data of a chunk: what was read already, or else by splicing it to its file or to a
    /// pipe that holds it, or else by reading more.
    fn take_data(&mut self, index: usize, place: Place, allowance: &mut Allowance) -> Result<Then> {
        let target = match self.image.target(place) {
            Some(target) => target,
            None if self.image.waiting_bytes() < MOST_AHEAD && self.is_stalled() => Target::Piece,
            None => return Ok(Then::Stop(Turn::Ahead)),
        };
        let shard = &mut self.shards[index];
        if !shard.is_read_out() {
            let (extent, behind) = shard.take_data().expect("something was read");
            self.submit(index, place, Step::Data(Piece::Memory(extent), behind))?;
            return Ok(Then::GoOn);
        }
        if let Target::File(file) = target {
            let stage = match &mut self.stage {
                Some(stage) => stage,
                none => none.insert(Stage::new()?),
            };
            let spliced = shard.splice(stage, file, &self.image.current())?;
            let Some(behind) = spliced else {
                return Ok(Then::Stop(Turn::Idle));
            };
            self.image.written(behind)?;
            return Ok(Then::GoOn);
        }
        let most = match (allowance.way, &mut self.holder) {
            (Way::Splice, Some(holder)) => match shard.hold(holder)? {
                Holding::Piece(held, behind) => {
                    self.submit(index, place, Step::Data(Piece::held(held), behind))?;
                    return Ok(Then::GoOn);
                }
                Holding::Some => return Ok(Then::Stop(Turn::Busy)),
                Holding::Nothing => return Ok(Then::Stop(Turn::Idle)),
                Holding::Refused => shard.ahead_for_data(),
            },
            (Way::Splice, None) => shard.left_of_chunk(),
            (Way::Read, _) => usize::MAX,
        };
        allowance.read(shard, self.arena, most)
    }

    fn submit(&mut self, index: usize, place: Place, step: Step) -> Result<()> {
        let origin = Origin {
            shard: index,
            offset: self.shards[index].offset(),
        };
        self.image.submit(place, origin, step)
    }

    /// Fails if the next marker cannot come any more.
    fn check_supply(&self) -> Result<()> {
        if self.image.is_complete() {
            return Ok(());
        }
        let next = self.image.next().seq;
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

    /// The end marker must be the last thing on the shards.
    fn check_end(&mut self) -> Result<()> {
        let end = Instant::now() + END_PATIENCE;
        let mut events = Vec::new();
        loop {
            let mut all_ended = true;
            for shard in &mut self.shards {
                if !shard.is_read_out() || shard.read(self.arena, 1)? == Found::Something {
                    bail!(shard.error("something follows the end of the image"));
                }
                all_ended &= shard.has_ended();
            }
            if all_ended || Instant::now() >= end {
                return Ok(());
            }
            self.poller
                .wait(Wait::Until(end), &mut events)
                .context("waiting for the end of the shards")?;
            self.handle(&events)?;
        }
    }
}

/// How data is taken from a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Spliced, with as little read as possible.
    Splice,
    /// Read, as much as there is.
    Read,
}

/// How much more may be taken from a shard in its turn. By reading, what one read brings: a reader
/// that reads on at once takes what the shard's writer has written meanwhile, block by block, and
/// meets it at the pipe's mutex for each (0.2 CPU s/GB from writers of 64 KiB). By splicing, about
/// as much as a pipe holds, and for the same reason no more once the pipe was emptied.
struct Allowance {
    way: Way,
    has_read: bool,
    /// Where in the stream the turn ends when splicing.
    end: u64,
}

impl Allowance {
    fn new(way: Way, shard: &Reader) -> Self {
        Self {
            way,
            has_read: false,
            end: shard.offset() + TURN,
        }
    }

    /// Reads up to `most` bytes if the turn is not over.
    fn read(&mut self, shard: &mut Reader, arena: &mut Arena, most: usize) -> Result<Then> {
        let is_over = match self.way {
            Way::Read => self.has_read,
            Way::Splice => shard.offset() >= self.end,
        };
        if is_over || shard.read(arena, most)? == Found::Nothing {
            return Ok(Then::Stop(Turn::Idle));
        }
        self.has_read = true;
        Ok(Then::GoOn)
    }
}
