//! One shard's turn: its markers, and the data behind them, are taken and submitted.

use std::rc::Rc;
use std::time::Instant;

use anyhow::{Result, ensure};

use super::Receiver;
use super::assembly::{Image, Position, Step};
use super::order::{Place, Reading};
use super::reader::Taken;
use crate::format::{Body, CapturingProcess};
use crate::store::Ahead;

/// The outcome of one shard's turn, or of a step of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Turn {
    /// Nothing is left of what was taken out of the shard's pipe.
    Idle,
    /// It is ahead of the others, and left alone.
    Ahead,
    /// It moved something.
    Busy,
}

impl<I: Image> Receiver<'_, I> {
    /// Takes from one shard what it has. Its pipe is emptied once: a second time would bring what
    /// its writer has written since, block by block, and meet it at the pipe's mutex for each.
    pub(super) fn turn(&mut self, index: usize, reading: Reading) -> Result<Turn> {
        let mut turn = Turn::Idle;
        let mut was_filled = false;
        while !self.image.is_complete() && !self.rests(index, reading) {
            let step = match self.shards[index].chunk() {
                Some(place) => self.take_data(index, place)?,
                None => self.take_marker(index)?,
            };
            match step {
                Turn::Busy => {}
                Turn::Ahead => return Ok(turn.max(Turn::Ahead)),
                Turn::Idle => {
                    if was_filled || !self.shards[index].fill(&mut self.arena, &self.pipes)? {
                        return Ok(turn);
                    }
                    was_filled = true;
                }
            }
            turn = Turn::Busy;
        }
        Ok(turn)
    }

    fn take_marker(&mut self, index: usize) -> Result<Turn> {
        let shard = &mut self.shards[index];
        let is_first = shard.last_seq.is_none();
        let Some(marker) = shard.next_marker()? else {
            return Ok(match shard.read_for_marker(&mut self.arena)? {
                true => Turn::Busy,
                false => Turn::Idle,
            });
        };
        if is_first {
            self.check_origin(index, marker.origin)?;
        }
        if marker.is_index && I::HAS_INDEX {
            ensure!(
                self.index.is_none(),
                "reading {}: it begins like an index, and so does another shard",
                self.shards[index].label
            );
            self.index = Some(index);
        }
        self.markers += 1;
        self.files.add(u64::from(marker.body == Body::FileEnd));
        if !matches!(marker.body, Body::Data(1..)) {
            self.submit(index, Place::of(marker.seq), Step::Marker(marker.body))?;
        }
        Ok(Turn::Busy)
    }

    /// Fails if a shard is of another image than the first: their markers may fit together.
    fn check_origin(&mut self, shard: usize, origin: Option<CapturingProcess>) -> Result<()> {
        let first = self.captured_by.get_or_insert((shard, origin.clone()));
        let name = |origin: &Option<CapturingProcess>| match origin {
            Some(process) => process.to_string(),
            None => "a streamer that leaves no name".into(),
        };
        ensure!(
            first.1 == origin,
            "putting the image together: {} and {} are of different images, captured by {} and by \
             {}: give all shards of one capture",
            self.shards[first.0].label,
            self.shards[shard].label,
            name(&first.1),
            name(&origin)
        );
        Ok(())
    }

    fn take_data(&mut self, index: usize, place: Place) -> Result<Turn> {
        let is_next = self.image.next() == Some(place);
        if !is_next && self.image.ahead() == Ahead::Shard && !self.takes_early_data() {
            return Ok(Turn::Ahead);
        }
        match self.shards[index].take_data(&mut self.arena, &mut self.pipes)? {
            Taken::Piece(piece, next) => self.submit(index, place, Step::Data(piece, next))?,
            Taken::Part if is_next => self.progress = Instant::now(),
            Taken::Part => {}
            Taken::Nothing => return Ok(Turn::Idle),
        }
        Ok(Turn::Busy)
    }

    fn submit(&mut self, index: usize, place: Place, step: Step) -> Result<()> {
        let is_of_index = self.index == Some(index);
        if is_of_index {
            self.index_progress = Instant::now();
        }
        let position = Position {
            shard: Rc::clone(&self.shards[index].label),
            offset: self.shards[index].taken,
            is_of_index,
        };
        self.image.submit(place, position, step)
    }
}
