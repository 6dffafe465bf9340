//! What is taken from one shard in its turn, and how: its markers, and the data behind them.

use anyhow::Result;

use super::assembly::{Image, Position, Step};
use super::order::Place;
use super::reader::{Found, Holding, Reader, Stage};
use super::{Reading, Receiver};
use crate::format::Body;
use crate::store::held_pipe::PipePool;
use crate::store::{Ahead, Arena, Piece, Target};

/// Bytes spliced from one shard before others have their turn.
const TURN: u64 = 1 << 20;

/// The most that waits in memory for its turn on the way to disk, in bytes.
const MOST_AHEAD: usize = 256 << 20;

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
enum Then {
    /// It moved something, and there may be more.
    GoOn,
    Stop(Turn),
}

/// How data is taken from a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
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

    /// Whether all is taken that the shard's pipe was emptied of.
    ///
    /// # Errors
    /// When the stream was cut off.
    fn is_used_up(&self, shard: &mut Reader) -> Result<bool> {
        let is_used_up = self.way == Way::Hold && !shard.has_emptied();
        if is_used_up {
            shard.expect_more()?;
        }
        Ok(is_used_up)
    }

    /// Reads up to `most` bytes if the turn is not over.
    fn read(&mut self, shard: &mut Reader, arena: &mut Arena, most: usize) -> Result<Then> {
        let is_over = match self.way {
            Way::Read => self.has_read,
            Way::Splice => shard.offset() >= self.end,
            Way::Hold => self.is_used_up(shard)?,
        };
        if is_over || shard.read(arena, most)? == Found::Nothing {
            return Ok(Then::Stop(Turn::Idle));
        }
        self.has_read = true;
        Ok(Then::GoOn)
    }
}

impl<I: Image> Receiver<'_, I> {
    /// Takes from one shard what it has, up to a limit.
    pub(super) fn turn(&mut self, index: usize, reading: Reading) -> Result<Turn> {
        let mut turn = Turn::Idle;
        let mut allowance = Allowance::new(self.way(index), &self.shards[index]);
        if allowance.way == Way::Hold
            && !self.rests(index, reading)
            && let Some(holder) = &mut self.holder
            && !self.shards[index].empty(holder)?
        {
            allowance.way = Way::Splice;
        }
        while !self.image.is_complete() {
            let next = self.image.next().map(|place| place.seq);
            if self.image.is_far_ahead(false)
                && self.image.awaited_index() != Some(index)
                && self.shards[index].last_seq() > next
                && self.image.is_far_ahead(self.is_stalled())
            {
                return Ok(turn.max(Turn::Ahead));
            }
            if self.rests(index, reading) {
                return Ok(turn);
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
        let is_first = shard.last_seq().is_none();
        let Some(marker) = shard.next_marker()? else {
            let most = match allowance.way {
                Way::Read => usize::MAX,
                Way::Hold | Way::Splice => shard.ahead_for_marker(),
            };
            return allowance.read(shard, &mut self.arena, most);
        };
        if is_first {
            self.check_origin(index, marker.origin)?;
        }
        if marker.is_index {
            self.image.is_index(index)?;
        }
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
        let holds =
            shard.is_holding() || holder.is_some_and(PipePool::has_room) && shard.may_hold();
        match self.image.ahead() {
            Ahead::Piece if holds => Way::Hold,
            Ahead::Piece => Way::Read,
            Ahead::Shard => Way::Splice,
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
        if allowance.is_used_up(shard)? {
            return Ok(Then::Stop(Turn::Idle));
        }
        // What is held already comes first, whatever has become possible since.
        let is_holding = shard.is_holding();
        if let Target::File(file) = target
            && !is_holding
        {
            let stage = match &mut self.stage {
                Some(stage) => stage,
                none => none.insert(Stage::new()?),
            };
            let before = shard.offset();
            let spliced = shard.splice(stage, file, &self.image.current())?;
            let Some(behind) = spliced else {
                return Ok(Then::Stop(Turn::Idle));
            };
            let bytes = shard.offset() - before;
            self.image.written(bytes, behind)?;
            return Ok(Then::GoOn);
        }
        let way = if is_holding { Way::Hold } else { allowance.way };
        let most = match (way, &mut self.holder) {
            (Way::Hold | Way::Splice, Some(holder)) => match shard.hold(holder)? {
                Holding::Piece(held, behind) => {
                    self.submit(index, place, Step::Data(Piece::Pipe(held), behind))?;
                    return Ok(Then::GoOn);
                }
                Holding::Some => return Ok(Then::Stop(Turn::Busy)),
                Holding::Nothing => return Ok(Then::Stop(Turn::Idle)),
                Holding::Refused => shard.ahead_for_data(),
            },
            (Way::Hold | Way::Splice, None) => shard.left_of_chunk(),
            (Way::Read, _) => usize::MAX,
        };
        allowance.read(shard, &mut self.arena, most)
    }

    fn submit(&mut self, index: usize, place: Place, step: Step) -> Result<()> {
        let position = Position {
            shard: index,
            offset: self.shards[index].offset(),
        };
        self.image.submit(place, position, step)
    }
}
