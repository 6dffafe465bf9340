//! What is taken from one shard in its turn, and how: its markers, and the data behind them.

use std::time::Instant;

use anyhow::{Result, ensure};

use super::assembly::{Image, Position, Step, Target};
use super::order::Place;
use super::reader::{Found, Holding, ShardReader, SplicePipe};
use super::{Index, Reading, Receiver};
use crate::format::Body;
use crate::store::held_pipe::PipePool;
use crate::store::{Ahead, Arena, Piece};

/// Bytes spliced from one shard before others have their turn.
const TURN: u64 = 1 << 20;

/// How far a shard got in one turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Turn {
    /// It has nothing now.
    Idle,
    /// It is ahead of the others, and left alone.
    Ahead,
    /// It moved something.
    Busy,
}

/// What follows a step of a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flow {
    /// It moved something, and there may be more.
    GoOn,
    Stop(Turn),
}

/// How data is taken from a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Transport {
    /// Spliced, with as little read as possible, and all from a pipe of ours into which the shard's
    /// is emptied.
    Hold,
    /// Spliced from the shard's pipe, with as little read as possible.
    Splice,
    /// Read, as much as there is.
    Read,
}

/// How much more may be taken from a shard in its turn. By reading, what one read brings: a reader
/// that reads on at once takes what the shard's writer has written meanwhile, block by block, and
/// meets it at the pipe's mutex for each (0.2 CPU s/GB from writers of 64 KiB). By holding, for the
/// same reason, what the shard's pipe was emptied of. By splicing to files, about as much as a pipe
/// holds.
struct TurnBudget {
    transport: Transport,
    has_read: bool,
    /// Where in the stream the turn ends when splicing.
    end: u64,
}

impl TurnBudget {
    fn new(transport: Transport, shard: &ShardReader) -> Self {
        Self {
            transport,
            has_read: false,
            end: shard.offset() + TURN,
        }
    }

    /// Whether all is taken that the shard's pipe was emptied of.
    ///
    /// # Errors
    /// When the stream was cut off.
    fn is_used_up(&self, shard: &mut ShardReader) -> Result<bool> {
        let is_used_up = self.transport == Transport::Hold && !shard.has_emptied();
        if is_used_up {
            shard.expect_more()?;
        }
        Ok(is_used_up)
    }

    /// Reads up to `most` bytes if the turn is not over.
    fn read(&mut self, shard: &mut ShardReader, arena: &mut Arena, most: usize) -> Result<Flow> {
        let is_over = match self.transport {
            Transport::Read => self.has_read,
            Transport::Splice => shard.offset() >= self.end,
            Transport::Hold => self.is_used_up(shard)?,
        };
        if is_over || shard.read(arena, most)? == Found::Nothing {
            return Ok(Flow::Stop(Turn::Idle));
        }
        self.has_read = true;
        Ok(Flow::GoOn)
    }
}

impl<I: Image> Receiver<'_, I> {
    /// Takes from one shard what it has, up to a limit.
    pub(super) fn turn(&mut self, index: usize, reading: Reading) -> Result<Turn> {
        let mut turn = Turn::Idle;
        let mut budget = TurnBudget::new(self.transport(index), &self.shards[index]);
        if budget.transport == Transport::Hold
            && !self.rests(index, reading)
            && let Some(pipes) = &mut self.pipes
            && !self.shards[index].empty(pipes)?
        {
            budget.transport = Transport::Splice;
        }
        while !self.image.is_complete() {
            if self.rests(index, reading) {
                return Ok(turn);
            }
            let then = match self.shards[index].chunk() {
                Some(place) => self.take_data(index, place, &mut budget)?,
                None => self.take_marker(index, &mut budget)?,
            };
            match then {
                Flow::GoOn => turn = Turn::Busy,
                Flow::Stop(last) => return Ok(turn.max(last)),
            }
        }
        Ok(turn)
    }

    fn take_marker(&mut self, index: usize, budget: &mut TurnBudget) -> Result<Flow> {
        let shard = &mut self.shards[index];
        let is_first = shard.last_seq().is_none();
        let Some(marker) = shard.next_marker()? else {
            let most = match budget.transport {
                Transport::Read => usize::MAX,
                Transport::Hold | Transport::Splice => shard.ahead_for_marker(),
            };
            return budget.read(shard, &mut self.arena, most);
        };
        if is_first {
            self.check_origin(index, marker.origin)?;
        }
        self.markers += 1;
        if marker.is_index && self.index != Index::Unused {
            ensure!(
                self.index == Index::Unknown,
                "reading {}: it begins like an index, and so does another shard",
                self.shards[index].label()
            );
            self.index = Index::Arriving(index);
        }
        let is_of_index = self.index == Index::Arriving(index);
        match marker.body {
            Body::Data(1..) => return Ok(Flow::GoOn),
            Body::FileEnd => self.files.add(1),
            Body::ImageEnd if is_of_index => {
                self.submit(index, Place::of(marker.seq), Step::Marker(marker.body))?;
                self.index = Index::Read(index);
                return Ok(Flow::GoOn);
            }
            _ => {}
        }
        let step = Step::Marker(marker.body);
        self.submit(index, Place::of(marker.seq), step)?;
        Ok(Flow::GoOn)
    }

    /// How data is best taken from a shard at present.
    fn transport(&self, index: usize) -> Transport {
        let (pipes, shard) = (self.pipes.as_ref(), &self.shards[index]);
        // A pipe that was begun is filled, and may be the last one that there is room for.
        let holds = shard.is_holding() || pipes.is_some_and(PipePool::has_room) && shard.may_hold();
        match self.image.ahead() {
            Ahead::Piece if holds => Transport::Hold,
            Ahead::Piece => Transport::Read,
            Ahead::Shard => Transport::Splice,
        }
    }

    /// Takes data of a chunk: what was read already, or else by splicing it to its file or to a
    /// pipe that holds it, or else by reading more.
    fn take_data(&mut self, index: usize, place: Place, budget: &mut TurnBudget) -> Result<Flow> {
        let target = match self.image.target(place) {
            Target::Wait if self.is_stalled() && self.memory.short_until.is_none() => Target::Piece,
            Target::Wait => return Ok(Flow::Stop(Turn::Ahead)),
            target => target,
        };
        let shard = &mut self.shards[index];
        if !shard.is_read_out() {
            let (extent, next) = shard.take_data().expect("something was read");
            self.submit(index, place, Step::Data(Piece::Memory(extent), next))?;
            return Ok(Flow::GoOn);
        }
        if budget.is_used_up(shard)? {
            return Ok(Flow::Stop(Turn::Idle));
        }
        // What is held already comes first, whatever has become possible since.
        let is_holding = shard.is_holding();
        if let Target::File(file, name) = target
            && !is_holding
        {
            let splice_pipe = match &mut self.splice_pipe {
                Some(pipe) => pipe,
                none => none.insert(SplicePipe::new()?),
            };
            let before = shard.offset();
            let spliced = shard.splice(splice_pipe, file, name)?;
            let Some(next) = spliced else {
                return Ok(Flow::Stop(Turn::Idle));
            };
            let bytes = shard.offset() - before;
            self.image.written(bytes, next)?;
            return Ok(Flow::GoOn);
        }
        let transport = if is_holding {
            Transport::Hold
        } else {
            budget.transport
        };
        let most = match (transport, &mut self.pipes) {
            (Transport::Hold | Transport::Splice, Some(pipes)) => match shard.hold(pipes)? {
                Holding::Piece(held, next) => {
                    self.submit(index, place, Step::Data(Piece::Pipe(held), next))?;
                    return Ok(Flow::GoOn);
                }
                Holding::Some => return Ok(Flow::Stop(Turn::Busy)),
                Holding::Nothing => return Ok(Flow::Stop(Turn::Idle)),
                Holding::Refused => shard.ahead_for_data(),
            },
            (Transport::Hold | Transport::Splice, None) => shard.left_of_chunk(),
            (Transport::Read, _) => usize::MAX,
        };
        budget.read(shard, &mut self.arena, most)
    }

    fn submit(&mut self, index: usize, place: Place, step: Step) -> Result<()> {
        let is_of_index =
            matches!(self.index, Index::Arriving(at) | Index::Read(at) if at == index);
        if is_of_index {
            self.index_progress = Instant::now();
        }
        let position = Position {
            shard: self.shards[index].label(),
            offset: self.shards[index].offset(),
            is_of_index,
        };
        self.image.submit(place, position, step)
    }
}
