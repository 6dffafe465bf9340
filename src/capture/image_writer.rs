//! The image on its way out: one sequence of markers, spread over all shards.
//!
//! One file is current at a time, and a chunk of another one is preceded by its name. A chunk goes,
//! with its markers, to the shard that [`super::balancer`] chooses, and is cut to what that shard
//! has room for.
//!
//! Where the image has an index, that is the last of the shards. It gets all markers but those of
//! the data of large files, which go to the other shards, and the data of all other files.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::balancer::{self, Choice, Patience, Placement, Slots};
use super::capacity;
use super::chunk::{Chunk, MARKER_SLOTS, Route};
use super::shard::Shard;
use super::source::{Activity, Ready, Source};
use crate::format::{Body, CapturingProcess, Marker};
use crate::os::pipe::slot;
use crate::report;
use crate::report::progress::Stats;
use crate::report::times::Times;
use crate::store::Extent;

/// Larger chunks begin at a page of their shard, where there is one shard.
const LARGEST_UNALIGNED: u32 = 64 << 10;

/// Chunks that one source gives before others have their turn: enough to empty its pipe, although
/// it is filled meanwhile.
const CHUNKS_PER_TURN: usize = 4;

/// A wait for late shards that is worth a word.
const LONG_WAIT: Duration = Duration::from_millis(200);

/// An image that is being written.
pub(super) struct ImageWriter {
    pub(super) shards: Vec<Shard>,
    /// The number of the index.
    index: Option<usize>,
    /// At multiples of this number of bytes page files are cut into chunks, where there is one
    /// shard: if that is half empty, it has room for one, also for one of several pieces of the
    /// buffer.
    pub(super) unit: Option<usize>,
    seq: u64,
    /// The source whose file is current.
    current: Option<u64>,
    /// When the first marker was queued.
    start: Instant,
    /// This process, for the first marker of each shard.
    origins: Vec<Option<CapturingProcess>>,
    patience: Patience,
}

impl ImageWriter {
    /// Writes to these shards, of which the last may be an index.
    pub(super) fn new(shards: Vec<Shard>, has_index: bool) -> Self {
        let smallest = shards.iter().min_by_key(|shard| shard.slots());
        smallest.inspect(|shard| capacity::warn_of_small_pipe(shard));
        let smallest = smallest.map_or(1, |shard| shard.slots());
        let unit = (smallest * 7 / 16).min((smallest / 2).saturating_sub(MARKER_SLOTS));
        let unit = unit.max(1) * slot();
        Self {
            unit: (shards.len() == 1).then_some(unit),
            index: has_index.then(|| shards.len() - 1),
            origins: vec![CapturingProcess::own(); shards.len()],
            shards,
            seq: 0,
            current: None,
            start: Instant::now(),
            patience: Patience::default(),
        }
    }

    /// Moves what a source has, as far as the shards have room.
    ///
    /// # Errors
    /// When a shard's reader is gone.
    pub(super) fn advance(&mut self, source: &mut Source) -> Result<Activity> {
        for _ in 0..CHUNKS_PER_TURN {
            let activity = match source.inspect(self.unit)? {
                Ready::Empty => Activity::Idle,
                Ready::Filling => break,
                Ready::Chunk(chunk) => self.give(source, chunk)?,
            };
            if activity != Activity::Busy {
                return Ok(activity);
            }
        }
        Ok(Activity::Busy)
    }

    /// Gives a chunk to the shard that is to have it, if any has room: out of the buffer, or where
    /// that has nothing of the source, out of its pipe.
    ///
    /// # Errors
    /// When the shard's reader is gone.
    pub(super) fn give(&mut self, source: &mut Source, mut chunk: Chunk) -> Result<Activity> {
        // The end of a file goes to the index, where there is one.
        let is_spread = chunk.bytes > 0 && source.is_spread();
        let wanted = chunk.slots + MARKER_SLOTS;
        let Some(Placement { shard, slots }) = self.place(is_spread, wanted)? else {
            return Ok(Activity::NoRoom);
        };
        chunk.cut(slots.saturating_sub(MARKER_SLOTS), slot());
        self.name_file(source, shard);
        if chunk.bytes > 0 {
            self.mark(shard, Body::Data(chunk.bytes as u32));
            match &source.take_buffered(chunk.bytes)[..] {
                [] => self.move_chunk(source, &chunk, shard)?,
                extents => self.lend(extents, &chunk, shard)?,
            }
        }
        source.given += chunk.bytes;
        if chunk.is_last {
            self.mark_end(source, shard);
            return Ok(Activity::Complete);
        }
        Ok(Activity::Busy)
    }

    /// Lends memory of the buffer's to a shard. Copied chunks go into its queue, and so does a rest
    /// for which there is no room after all.
    fn lend(&mut self, extents: &[Extent], chunk: &Chunk, shard: usize) -> Result<()> {
        let shard = &mut self.shards[shard];
        let mut lent = 0;
        if chunk.route == Route::Lent {
            let memory: Vec<_> = extents.iter().map(Extent::sealed).collect();
            lent = shard.lend(&memory)?;
        }
        for extent in extents {
            let (gone, rest) = extent.bytes().split_at(lent.min(extent.len()));
            lent -= gone.len();
            shard.copy_memory(rest)?;
        }
        Ok(())
    }

    /// Moves all of a chunk. A rest for which there is no room after all goes into the queue.
    fn move_chunk(&mut self, source: &mut Source, chunk: &Chunk, shard: usize) -> Result<()> {
        let shard = &mut self.shards[shard];
        let mut spliced = 0;
        if chunk.route == Route::Direct {
            spliced = shard.splice(source.pipe(), chunk.bytes, chunk.slots)?;
            source.moved(spliced);
            // A rest shows that bytes take more slots than whole pages would.
            source.is_spliced = spliced == chunk.bytes;
        }
        source.collect(chunk.bytes - spliced)?;
        let copied = source.collected.drain(..chunk.bytes - spliced);
        shard.copy_memory(copied.as_slice())
    }

    /// Marks the end of the image, which [`ImageWriter::flush`] writes. False when no shard has
    /// room for the marker.
    pub(super) fn end_image(&mut self) -> Result<bool> {
        let placement = self.place(false, MARKER_SLOTS)?;
        if let Some(placement) = placement {
            self.mark(placement.shard, Body::ImageEnd);
        }
        Ok(placement.is_some())
    }

    /// Finds a shard, which is the index, where there is one, unless the data is to be spread.
    fn place(&mut self, is_spread: bool, wanted: usize) -> Result<Option<Placement>> {
        let (others, index) = self.shards.split_at_mut(self.index.unwrap_or(0));
        let is_spread = is_spread && !others.is_empty();
        let skipped = if is_spread { 0 } else { others.len() };
        let wanted_of_index = if is_spread { MARKER_SLOTS } else { wanted };
        let choice = match balancer::choose(index, wanted_of_index) {
            // The name of the file, and later its end, go to the index.
            Ok(Choice::To(_)) if is_spread => balancer::choose(others, wanted),
            Ok(_) if is_spread => Ok(Choice::Full),
            choice => choice,
        };
        let placement = match choice.context("looking for a shard with room")? {
            Choice::To(placement) => {
                self.patience.catch_up();
                Some(placement)
            }
            Choice::Ahead {
                placement,
                is_waiting,
                is_far,
            } => {
                let waits = self.patience.lasts(is_waiting, is_far, Instant::now());
                (!waits).then_some(placement)
            }
            Choice::Full => {
                self.patience.rest();
                None
            }
        };
        Ok(placement.map(|placement| Placement {
            shard: placement.shard + skipped,
            ..placement
        }))
    }

    /// Makes a file the current one, after the end of the one that it replaces.
    fn name_file(&mut self, source: &mut Source, shard: usize) {
        if std::mem::take(&mut source.restarts) {
            self.name_file(source, shard);
            self.mark_end(source, shard);
        }
        // With one shard, each chunk names its file, so that the number of markers does not depend
        // on which files' chunks came between.
        if self.current != Some(source.id) || self.unit.is_some() {
            self.mark(self.index.unwrap_or(shard), Body::File(source.name.clone()));
            self.current = Some(source.id);
            source.is_named = true;
        }
    }

    fn mark_end(&mut self, source: &mut Source, shard: usize) {
        self.mark(self.index.unwrap_or(shard), Body::FileEnd);
        self.current = None;
        source.is_named = false;
    }

    fn mark(&mut self, shard: usize, body: Body) {
        let seq = self.seq;
        let mut marker = Marker::new(seq, body);
        marker.origin = self.origins[shard].take();
        marker.is_index = seq == 0 && self.index.is_some();
        let is_large = matches!(marker.body, Body::Data(bytes) if bytes > LARGEST_UNALIGNED);
        self.shards[shard].mark(marker, is_large && self.unit.is_some());
        self.seq += 1;
        if seq == 0 {
            self.start = Instant::now();
            // Each shard says whose it is, even if it gets nothing else.
            let others = (0..self.shards.len()).filter(|&other| other != shard);
            others.for_each(|other| self.mark(other, Body::Data(0)));
        }
    }

    /// Writes all that is queued, as far as the shards have room. True if that was all.
    ///
    /// # Errors
    /// When a shard's reader is gone.
    pub(super) fn flush(&mut self) -> Result<bool> {
        let shards = &mut self.shards;
        shards
            .iter_mut()
            .try_fold(true, |all, shard| Ok(shard.flush()? && all))
    }

    /// Warns if the image waited for late shards.
    pub(super) fn warn_of_late_shards(&self) {
        let waited = self.patience.spent_on_late;
        if waited >= LONG_WAIT {
            report::warn(format_args!(
                "the image waited {:.1} s for shards whose readers began late, so that none is much larger than the others: start their commands before CRIU",
                waited.as_secs_f64()
            ));
        }
    }

    /// The bytes that passed through each shard, and what was waited for.
    pub(super) fn stats(&self, times: Times) -> Stats {
        let shards = self.shards.iter();
        Stats {
            shards: shards.map(|shard| shard.meter.stats(self.start)).collect(),
            times,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::capture::source::Owner;
    use crate::format::ImageName;
    use crate::os::pipe::{self, Moved, ReadEnd, WriteEnd};
    use crate::report::meter::Meter;

    /// An `ImageWriter` of one shard, the shard's reader, and another writer of the shard.
    fn image_writer() -> (ImageWriter, ReadEnd, WriteEnd) {
        let (read, write) = pipe::new().unwrap();
        pipe::grow(&write, pipe::LARGEST).unwrap();
        let write = write.nonblocking().unwrap();
        let other = write.as_fd().try_clone_to_owned().unwrap();
        let other = WriteEnd::new(other).unwrap();
        let shard = Shard::new(write, "a shard".into(), Meter::default()).unwrap();
        let image_writer = ImageWriter::new(vec![shard], false);
        (image_writer, read.nonblocking().unwrap(), other)
    }

    /// A source whose pipe is full of pages, these, and a chunk of them all.
    fn source() -> (Source, Vec<u8>, Chunk) {
        let (read, write) = pipe::new().unwrap();
        let slots = pipe::grow(&read, pipe::LARGEST).unwrap();
        let pages: Vec<_> = (0..slots * slot()).map(|i| (i % 251) as u8).collect();
        let written = pipe::write(&write, &pages).unwrap();
        assert_eq!(written, Moved::Bytes(pages.len()));
        let name = ImageName::new("pages-1.img").unwrap();
        let mut source = Source::new(name, read, Owner::Criu).unwrap();
        let Ready::Chunk(chunk) = source.inspect(None).unwrap() else {
            panic!("a full pipe is ready");
        };
        (source, pages, chunk)
    }

    #[test]
    fn a_chunk_leaves_its_source_where_a_shard_has_less_room_than_is_known() {
        let (mut image_writer, reader, other) = image_writer();
        let slots = image_writer.shards[0].slots();
        let (mut source, pages, chunk) = source();
        let foreign = (slots - 3) * slot();
        pipe::write(&other, &vec![1; foreign]).unwrap();
        let activity = image_writer.give(&mut source, chunk).unwrap();
        assert_eq!(activity, Activity::Busy);
        let moved = pages.len() - pipe::available(source.pipe()).unwrap();
        assert!(moved > 3 * slot(), "{moved} bytes fit into the shard");

        let mut arrived = Vec::new();
        let mut buffer = vec![0; 1 << 16];
        while let Moved::Bytes(bytes) = pipe::read(&reader, &mut buffer).unwrap() {
            arrived.extend(&buffer[..bytes]);
            image_writer.flush().unwrap();
        }
        assert!(image_writer.flush().unwrap());
        assert!(arrived.ends_with(&pages[..moved]));
        assert!((1..slot() + 100).contains(&(arrived.len() - foreign - moved)));
    }

    #[test]
    fn a_source_that_another_process_reads_from_is_an_error() {
        for route in [Route::Direct, Route::Copied] {
            let (mut image_writer, _reader, _other) = image_writer();
            let (mut source, pages, mut chunk) = source();
            chunk.route = route;
            pipe::read(source.pipe(), &mut vec![0; pages.len()]).unwrap();
            let error = image_writer.give(&mut source, chunk).unwrap_err();
            assert!(error.to_string().contains("another process"), "{error:#}");
        }
    }

    #[test]
    fn pages_that_come_in_pieces_are_copied_from_then_on() {
        let (mut image_writer, reader, _other) = image_writer();
        let (read, write) = pipe::new().unwrap();
        let slots = pipe::grow(&read, pipe::LARGEST).unwrap();
        let name = ImageName::new("pages-1.img").unwrap();
        let mut source = Source::new(name, read, Owner::Criu).unwrap();
        let fill = || {
            for _ in 0..slots {
                let (page, half) = pipe::new().unwrap();
                pipe::write(&half, &vec![0; slot() / 2]).unwrap();
                let moved = pipe::splice(&page, &write, slot()).unwrap();
                assert_eq!(moved, Moved::Bytes(slot() / 2));
            }
        };
        fill();
        for route in [Route::Direct, Route::Copied] {
            let Ready::Chunk(chunk) = source.inspect(None).unwrap() else {
                panic!("half of a full pipe is ready");
            };
            assert_eq!(chunk.route, route);
            image_writer.give(&mut source, chunk).unwrap();
            while pipe::read(&reader, &mut vec![0; 64 * slot()]).unwrap() != Moved::WouldBlock {
                image_writer.flush().unwrap();
            }
            if route == Route::Direct {
                fill();
            }
        }
    }
}
