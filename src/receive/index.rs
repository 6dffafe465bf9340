//! An image with an index: its files are known before its data has come.
//!
//! The index is a shard that carries every marker of the image but those of the data of large
//! files, which the other shards carry (docs/protocol.md, section 2). Once all of the index is
//! here, it is certain which files there are, and to which of them each missing piece of data
//! belongs. From then on each file is put together by itself, in its own order, and can be served
//! while it arrives.
//!
//! **A damaged image never runs.** CRIU cannot finish a restore without the last of the pages. So
//! the last piece of the pages is kept back until every piece of the image has come, nothing
//! follows it, and all that brought it has ended well ([`Image::finish`]). It comes last anyway.
//! The last piece of a file that has any bytes shows only at the file's end, as a chunk may be
//! empty: of that file one piece is always kept back, until another follows it.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;

use anyhow::{Result, bail};

use super::assembly::{Files, Image, Position, Step};
use super::order::{Next, Order, Place, Reading};
use crate::criu::files;
use crate::format::{Body, ImageName};
use crate::store::catalog::Catalog;
use crate::store::external::{External, File};
use crate::store::{Ahead, Piece, Store};

/// A part of a file, in its order.
#[derive(Debug)]
enum Segment {
    /// From the index.
    Piece(Piece),
    /// Markers that other shards bring.
    Awaited(Range<u64>),
}

/// One file in the making.
struct Stream {
    name: ImageName,
    /// `None` when all of it has gone there, and where a later file of the same name replaced it.
    to: Option<File<ImageName>>,
    segments: VecDeque<Segment>,
    /// The data of markers that other shards have brought.
    order: Order<Step>,
}

impl Stream {
    /// Takes the next piece, if it has come.
    fn next_in_turn(&mut self) -> Option<Piece> {
        loop {
            let markers = match self.segments.pop_front()? {
                Segment::Piece(piece) => return Some(piece),
                Segment::Awaited(markers) => markers,
            };
            self.order.pass_to(markers.start);
            if self.order.next().seq == markers.end {
                continue;
            }
            self.segments.push_front(Segment::Awaited(markers));
            match self.order.pop()? {
                Step::Data(piece, next) => {
                    self.order.pass(next);
                    return Some(piece);
                }
                Step::Marker(_) => self.order.pass(Next::Marker),
            }
        }
    }

    /// The marker that it waits for, once all pieces in their turn were taken.
    fn awaited(&self) -> Option<u64> {
        self.segments.front().map(|_| self.order.next().seq)
    }
}

/// The markers of one gap in the index: all of them are data of one file.
#[derive(Debug)]
struct Gap {
    markers: Range<u64>,
    stream: usize,
}

/// The end of the pages, which CRIU does not get before the image has proved whole.
#[derive(Debug)]
struct KeptBack {
    /// The file with the last of the pages.
    stream: usize,
    /// The last piece of it that has come in its turn.
    piece: Option<Piece>,
}

/// The files that the index names, each with the parts that it consists of.
struct Layout {
    store: External<Catalog>,
    streams: Vec<Stream>,
    complete: HashMap<ImageName, usize>,
}

impl Store for Layout {
    /// The number of a stream.
    type File = usize;

    const AHEAD: Ahead = Ahead::Piece;

    fn create(&mut self, name: &ImageName) -> Result<usize> {
        self.streams.push(Stream {
            name: name.clone(),
            to: Some(self.store.create(name)?),
            segments: VecDeque::new(),
            order: Order::new(),
        });
        Ok(self.streams.len() - 1)
    }

    fn append(&mut self, file: &mut usize, piece: Piece) -> Result<()> {
        let segments = &mut self.streams[*file].segments;
        segments.push_back(Segment::Piece(piece));
        Ok(())
    }

    fn finish(&mut self, name: ImageName, file: usize) -> Result<()> {
        if let Some(earlier) = self.complete.insert(name, file) {
            self.streams[earlier].to = None;
        }
        Ok(())
    }
}

/// An image whose index is read first.
pub(crate) struct Indexed {
    files: Files<Layout>,
    /// The marker behind the last one of the index so far.
    next: u64,
    /// In the order of their markers.
    gaps: Vec<Gap>,
    /// Data that has come before the whole index.
    early: Vec<(Place, Position, Step)>,
    is_laid_out: bool,
    /// The files that wait for data, by the first marker that each lacks.
    awaited: BTreeMap<u64, usize>,
    /// Until the image has proved whole.
    kept_back: Option<KeptBack>,
}

impl Indexed {
    fn streams(&mut self) -> &mut Vec<Stream> {
        &mut self.files.store.streams
    }

    /// Takes a step of the index. The markers between its own are data of the file that is current
    /// there.
    fn read_index(&mut self, place: Place, position: &Position, step: Step) -> Result<()> {
        let markers = self.next..place.seq;
        if !markers.is_empty() {
            let Some(&stream) = self.files.current() else {
                bail!(position.error(format_args!(
                    "markers {} to {} are not in the index, and belong to no file",
                    markers.start,
                    markers.end - 1
                )));
            };
            let awaited = Segment::Awaited(markers.clone());
            self.streams()[stream].segments.push_back(awaited);
            self.gaps.push(Gap { markers, stream });
        }
        self.next = match self.files.apply(position, step)? {
            Next::Marker => place.seq.saturating_add(1),
            Next::Part => place.seq,
        };
        Ok(())
    }

    /// The file with the last of the pages that are not in the index.
    fn last_of_pages(&self) -> Option<KeptBack> {
        let streams = &self.files.store.streams;
        let of_pages = self.gaps.iter().rfind(|gap| {
            let is_stored = matches!(streams[gap.stream].to, Some(File::Stored(_)));
            is_stored && files::is_pages(streams[gap.stream].name.as_str())
        });
        of_pages.map(|&Gap { stream, .. }| KeptBack {
            stream,
            piece: None,
        })
    }

    fn stream_of(&self, marker: u64) -> Option<usize> {
        let after = self.gaps.partition_point(|gap| gap.markers.start <= marker);
        let gap = self.gaps[..after].last()?;
        gap.markers.contains(&marker).then_some(gap.stream)
    }

    /// Takes data that came on another shard than the index.
    fn put(&mut self, place: Place, position: &Position, step: Step) -> Result<()> {
        let Some(stream) = self.stream_of(place.seq) else {
            bail!(position.error(format_args!(
                "marker {} is in the index too, or behind its end",
                place.seq
            )));
        };
        let order = &mut self.streams()[stream].order;
        order
            .insert(place, step)
            .map_err(|taken| position.error(taken))?;
        self.deliver(stream)
    }

    /// Moves on the pieces of a file whose turn it is.
    fn deliver(&mut self, number: usize) -> Result<()> {
        if let Some(awaited) = self.streams()[number].awaited() {
            self.awaited.remove(&awaited);
        }
        while let Some(piece) = self.streams()[number].next_in_turn() {
            let piece = match &mut self.kept_back {
                Some(kept_back) if kept_back.stream == number => kept_back.piece.replace(piece),
                _ => Some(piece),
            };
            self.pass_on(number, piece)?;
        }
        let kept_back = self.kept_back.as_ref();
        let is_kept_back = kept_back.is_some_and(|it| it.stream == number);
        let Layout { store, streams, .. } = &mut self.files.store;
        let stream = &mut streams[number];
        if let Some(awaited) = stream.awaited() {
            self.awaited.insert(awaited, number);
        } else if !is_kept_back && let Some(to) = stream.to.take() {
            store.finish(stream.name.clone(), to)?;
        }
        Ok(())
    }

    fn pass_on(&mut self, stream: usize, piece: Option<Piece>) -> Result<()> {
        let Layout { store, streams, .. } = &mut self.files.store;
        match (piece, &mut streams[stream].to) {
            (Some(piece), Some(to)) => store.append(to, piece),
            _ => Ok(()),
        }
    }
}

impl Image for Indexed {
    type Store = Catalog;

    const HAS_INDEX: bool = true;

    fn new(store: External<Catalog>) -> Self {
        Self {
            files: Files::new(Layout {
                store,
                streams: Vec::new(),
                complete: HashMap::new(),
            }),
            next: 0,
            gaps: Vec::new(),
            early: Vec::new(),
            is_laid_out: false,
            awaited: BTreeMap::new(),
            kept_back: None,
        }
    }

    fn store(&mut self) -> &mut External<Catalog> {
        &mut self.files.store.store
    }

    fn next(&self) -> Option<Place> {
        let awaited = self.awaited.first_key_value();
        awaited.map(|(&marker, _)| Place::of(marker))
    }

    fn is_complete(&self) -> bool {
        self.is_laid_out && self.awaited.is_empty()
    }

    fn ahead(&self) -> Ahead {
        Ahead::Piece
    }

    fn submit(&mut self, place: Place, position: Position, step: Step) -> Result<()> {
        if position.is_of_index {
            return self.read_index(place, &position, step);
        }
        if let Step::Marker(Body::File(_) | Body::FileEnd | Body::ImageEnd) = step {
            bail!(position.error(format_args!(
                "marker {} belongs in an index: either this is a shard of another image, or the \
                 image has no index: serve it without --index",
                place.seq
            )));
        }
        if self.is_laid_out {
            return self.put(place, &position, step);
        }
        self.early.push((place, position, step));
        Ok(())
    }

    fn is_index_read(&self) -> bool {
        self.files.is_complete
    }

    fn lay_out(&mut self) -> Result<()> {
        self.is_laid_out = true;
        self.kept_back = self.last_of_pages();
        for stream in 0..self.streams().len() {
            self.deliver(stream)?;
        }
        for (place, position, step) in std::mem::take(&mut self.early) {
            self.put(place, &position, step)?;
        }
        Ok(())
    }

    fn is_laid_out(&self) -> bool {
        self.is_laid_out
    }

    fn keeps_back(&self) -> bool {
        self.kept_back.is_some()
    }

    fn wanted(&self, names: &[ImageName]) -> Reading {
        let Some(kept_back) = &self.kept_back else {
            return Reading::All;
        };
        let Layout { store, streams, .. } = &self.files.store;
        let is_wanted = |number: usize| match &streams[number].to {
            Some(File::Stored(name)) => names.contains(name),
            Some(File::External(number)) => store.is_starving(*number),
            None => false,
        };
        // Its reader waits for the piece that is kept back until everything is here.
        if is_wanted(kept_back.stream) && streams[kept_back.stream].awaited().is_none() {
            return Reading::All;
        }
        let mut awaited = self.awaited.iter().rev();
        let last = awaited.find(|&(_, &stream)| is_wanted(stream));
        Reading::UpTo(last.map(|(&marker, _)| marker))
    }

    fn finish(&mut self) -> Result<()> {
        if let Some(KeptBack { stream, piece }) = self.kept_back.take() {
            self.pass_on(stream, piece)?;
            self.deliver(stream)?;
        }
        Ok(())
    }
}
