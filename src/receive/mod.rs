//! Receives an image: from the shards, through the reassembly, into a store.
//!
//! Shards are read as their data comes, never one after another: when a capture is connected directly, waiting for an empty shard
//! while another is full is a deadlock. What is ahead of its turn goes to memory. A store in memory keeps it there
//! anyway; for files on disk and external files it is a detour, so that a shard that is ahead is left alone as long as the image
//! makes progress without it, and then taken to memory up to a limit.
//!
//! A gap in the image shows as soon as it is certain: a shard's positions only grow, so a marker that is behind the last one of every
//! shard will not come.

mod assembly;
mod reader;

use std::io;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::format::Body;
use crate::os::pipe::ReadEnd;
use crate::os::poller::{Interest, Kind, Poller, Wait};
use crate::pace::Pace;
use crate::report::meter::{Counter, Counters, Meter};
use crate::report::progress::Stats;
use crate::store::{Arena, Store};
use crate::supervision::signals::Interrupts;
use assembly::{Origin, Reassembly, Step};
use reader::{Next, Part, Shard};

/// Bytes spliced from one shard before others have their turn.
const TURN: u64 = 1 << 20;

/// How long an image on its way to disk may make no progress before shards that are ahead are read into memory: longer than it takes
/// other processes to fill the pipe that it waits for.
const STALL: Duration = Duration::from_millis(20);

/// The most that waits in memory for its turn on the way to disk, in bytes.
const MOST_AHEAD: usize = 256 << 20;

/// How long the end of the shards is waited for after the image's end, to find out whether something follows. It is there
/// already when the shards come from other programs' output; a supervisor may keep its write end open, and need not.
const END_PATIENCE: Duration = Duration::from_millis(200);

/// What is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Watched {
    Interrupt,
    Shard,
}

impl Kind for Watched {
    const ALL: &'static [Self] = &[Self::Interrupt, Self::Shard];
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

struct Reception<'a, S: Store> {
    poller: Poller<Watched>,
    interrupts: &'a Interrupts,
    shards: Vec<Shard>,
    image: Reassembly<S>,
    arena: &'a mut Arena,
    /// The image has made no progress for a while.
    stalled: bool,
    start: Option<Instant>,
    files: Counter,
}

/// Receives a whole image into a store, and tells what passed through each shard.
///
/// # Errors
/// When the image is damaged, incomplete or too large for the store.
pub fn receive<S: Store>(
    shards: Vec<(ReadEnd, String)>,
    store: S,
    arena: &mut Arena,
    counters: &Counters,
    interrupts: &Interrupts,
) -> Result<(S, Stats)> {
    let labels = shards.iter().map(|(_, label)| label.clone()).collect();
    let shards = shards
        .into_iter()
        .zip(&counters.shards)
        .map(|((pipe, label), bytes)| Shard::new(pipe, label, Meter::new(bytes.clone())))
        .collect::<Result<Vec<_>>>()?;
    let poller = Poller::new().context("preparing to wait for events")?;
    let image = Reassembly::new(store, labels);
    let mut reception = Reception {
        poller,
        interrupts,
        shards,
        image,
        arena,
        stalled: false,
        files: counters.files.clone(),
        start: None,
    };
    reception.run()?;
    let stats = Stats {
        shards: reception
            .shards
            .iter()
            .map(|shard| shard.stats(reception.start))
            .collect(),
    };
    Ok((reception.image.into_store()?, stats))
}

impl<S: Store> Reception<'_, S> {
    fn run(&mut self) -> Result<()> {
        self.watch().context("preparing to wait for events")?;
        let mut busy = vec![true; self.shards.len()];
        let mut pace = Pace::new();
        let mut events = Vec::new();
        let mut wait = Wait::Now;
        let mut progress = Instant::now();
        while !self.image.is_complete() {
            self.poller
                .wait(wait, &mut events)
                .context("waiting for the shards")?;
            self.start.get_or_insert_with(Instant::now);
            for event in &events {
                match event.kind {
                    Watched::Interrupt => self.interrupts.check()?,
                    Watched::Shard => {
                        busy[event.id as usize] = true;
                        if event.hung_up {
                            self.shards[event.id as usize].hang_up();
                        }
                    }
                }
            }
            let mut overall = Turn::Idle;
            let mut room = 0;
            let before = self.image.next_place();
            let taken_before = self.taken();
            for (index, busy) in busy.iter_mut().enumerate().filter(|(_, busy)| **busy) {
                let turn = self.turn(index)?;
                *busy = turn != Turn::Idle;
                if turn == Turn::Busy {
                    room += self.shards[index].capacity() as u64;
                }
                overall = overall.max(turn);
                if self.image.is_complete() {
                    break;
                }
            }
            if self.image.next_place() != before {
                progress = Instant::now();
                self.stalled = false;
            }
            wait = match overall {
                _ if self.image.is_complete() => Wait::Now,
                Turn::Busy => {
                    pace.nap_until_filled(self.taken() - taken_before, room);
                    Wait::Now
                }
                Turn::Ahead => {
                    self.check_supply()?;
                    self.stalled = progress.elapsed() >= STALL;
                    Wait::Until(Instant::now() + STALL)
                }
                Turn::Idle => {
                    self.check_supply()?;
                    Wait::Forever
                }
            };
        }
        self.check_end()
    }

    fn watch(&self) -> io::Result<()> {
        self.poller
            .add(self.interrupts, Watched::Interrupt, 0, Interest::Readable)?;
        for (index, shard) in self.shards.iter().enumerate() {
            self.poller.add(
                shard.pipe(),
                Watched::Shard,
                index as u64,
                Interest::ReadableEdge,
            )?;
        }
        Ok(())
    }

    /// Bytes taken from all shards so far.
    fn taken(&self) -> u64 {
        self.shards.iter().map(Shard::offset).sum()
    }

    /// Takes from one shard what it has, up to a limit: to memory, what one read brings. Whoever reads on at once takes what the
    /// shard's writer has written meanwhile, block by block, and meets it at the pipe's mutex for each (0.2 CPU s/GB from
    /// writers of 64 KiB).
    fn turn(&mut self, index: usize) -> Result<Turn> {
        let mut turn = Turn::Idle;
        let mut has_read = false;
        let limit = self.shards[index].offset() + TURN;
        while !self.image.is_complete() {
            let shard = &mut self.shards[index];
            if self.image.is_far_ahead(self.stalled)
                && shard.last_seq() > Some(self.image.next_seq())
            {
                return Ok(turn.max(Turn::Ahead));
            }
            let (seq, step) = match shard.next(self.arena)? {
                Next::Nothing => {
                    let most = if S::BUFFERS {
                        usize::MAX
                    } else {
                        shard.ahead_for_markers()
                    };
                    let full = if S::BUFFERS {
                        has_read
                    } else {
                        shard.offset() >= limit
                    };
                    if full || !shard.read(self.arena, most)? {
                        return Ok(turn);
                    }
                    turn = Turn::Busy;
                    has_read = true;
                    continue;
                }
                Next::Data { seq, part } => {
                    match self.take_data(index, (seq, part), &mut has_read)? {
                        Turn::Busy => turn = Turn::Busy,
                        stopped => return Ok(turn.max(stopped)),
                    }
                    continue;
                }
                Next::Marker(seq, Body::File(name)) => (seq, Step::File(name)),
                Next::Marker(seq, Body::Data(_)) => (seq, Step::NoData),
                Next::Marker(seq, Body::FileEnd) => {
                    self.files.add(1);
                    (seq, Step::FileEnd)
                }
                Next::Marker(seq, Body::ImageEnd) => (seq, Step::ImageEnd),
            };
            let origin = self.origin(index);
            self.image.submit((seq, 0), origin, step, self.arena)?;
            turn = Turn::Busy;
        }
        Ok(turn)
    }

    fn origin(&self, shard: usize) -> Origin {
        Origin {
            shard,
            offset: self.shards[shard].offset(),
        }
    }

    /// Takes data of a chunk: what was read already, or else by splicing if the file takes that, or else by reading more.
    fn take_data(
        &mut self,
        index: usize,
        place: assembly::Place,
        has_read: &mut bool,
    ) -> Result<Turn> {
        let shard = &mut self.shards[index];
        let is_next = self.image.is_next(place);
        if !is_next && self.image.prefers_splicing() {
            let may_wait_in_memory = self.stalled && self.image.waiting_bytes() < MOST_AHEAD;
            if !may_wait_in_memory {
                return Ok(Turn::Ahead);
            }
        }
        if shard.is_read_out() {
            if let Some((name, file, store)) = self.image.splice_target(place) {
                let spliced = shard.splice(name, |pipe, len| store.splice(file, pipe, len))?;
                let Some(last) = spliced else {
                    return Ok(Turn::Idle);
                };
                self.image.spliced(last, self.arena)?;
                return Ok(Turn::Busy);
            }
            let most = if S::BUFFERS {
                usize::MAX
            } else {
                shard.left_of_chunk()
            };
            if (S::BUFFERS && *has_read) || !shard.read(self.arena, most)? {
                return Ok(Turn::Idle);
            }
            *has_read = true;
        }
        if let Some(Part { extent, last }) = shard.take_part() {
            let origin = self.origin(index);
            self.image
                .submit(place, origin, Step::Data { extent, last }, self.arena)?;
        }
        Ok(Turn::Busy)
    }

    /// Fails if the next marker cannot come any more.
    fn check_supply(&self) -> Result<()> {
        let next = self.image.next_seq();
        let may_supply = |shard: &Shard| {
            shard.is_at(next)
                || (!shard.has_ended() && shard.last_seq().is_none_or(|last| last < next))
        };
        if self.shards.iter().any(may_supply) {
            return Ok(());
        }
        let places = self.shards.iter().map(|shard| {
            let state = if shard.has_ended() { "ended" } else { "stands" };
            match shard.last_seq() {
                Some(last) => format!(
                    "{} {state} at byte {} after marker {last}",
                    shard.label(),
                    shard.offset()
                ),
                None => format!(
                    "{} {state} at byte {} without any marker",
                    shard.label(),
                    shard.offset()
                ),
            }
        });
        bail!(
            "putting the image together: marker {next} is missing: a shard was cut off, damaged or left out ({})",
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
                if !shard.is_read_out() || shard.read(self.arena, 1)? {
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
            for event in &events {
                match event.kind {
                    Watched::Interrupt => self.interrupts.check()?,
                    Watched::Shard if event.hung_up => self.shards[event.id as usize].hang_up(),
                    Watched::Shard => {}
                }
            }
        }
    }
}
