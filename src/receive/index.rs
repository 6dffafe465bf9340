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
//! follows it, and all that brought it has ended well ([`Served::release`]). It comes last anyway.
//! The last piece of a file that has any bytes shows only at the file's end, as a chunk may be
//! empty: of that file one piece is always kept back, until another follows it.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;

use anyhow::{Result, bail, ensure};

use super::assembly::{Files, Image, Position, Step, Target};
use super::order::{Next, Place};
use super::{Reading, Served};
use crate::criu::files;
use crate::format::{Body, ImageName};
use crate::store::catalog::Catalog;
use crate::store::external::{External, File};
use crate::store::{Ahead, Piece, Store};

/// A piece of a file's data, and what comes next.
#[derive(Debug)]
struct Arrived {
    /// `None` for a chunk without data.
    piece: Option<Piece>,
    next: Next,
}

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
    /// The part of the marker whose turn it is.
    part: u32,
    /// What came before its turn.
    waiting: BTreeMap<Place, Arrived>,
}

impl Stream {
    /// Takes the next piece, if it has come.
    fn next_in_turn(&mut self) -> Option<Piece> {
        loop {
            let markers = match self.segments.front_mut()? {
                Segment::Awaited(markers) => markers,
                Segment::Piece(_) => match self.segments.pop_front() {
                    Some(Segment::Piece(piece)) => return Some(piece),
                    _ => unreachable!("a piece was in front"),
                },
            };
            let place = Place {
                seq: markers.start,
                part: self.part,
            };
            let arrived = self.waiting.remove(&place)?;
            match arrived.next {
                Next::Part => self.part += 1,
                Next::Marker => {
                    self.part = 0;
                    markers.start += 1;
                    if markers.is_empty() {
                        self.segments.pop_front();
                    }
                }
            }
            if arrived.piece.is_some() {
                return arrived.piece;
            }
        }
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
            part: 0,
            waiting: BTreeMap::new(),
        });
        Ok(self.streams.len() - 1)
    }

    fn append(&mut self, file: &mut usize, piece: Piece) -> Result<()> {
        self.streams[*file]
            .segments
            .push_back(Segment::Piece(piece));
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
    /// What the index says, until all of it is here.
    steps: Vec<(Place, Position, Step)>,
    /// What came on other shards before.
    waiting: BTreeMap<Place, (Position, Arrived)>,
    files: Files<Layout>,
    /// In the order of their markers.
    gaps: Vec<Gap>,
    /// The markers that have not come yet.
    missing: BTreeMap<u64, u64>,
    is_laid_out: bool,
    /// Until it is released.
    kept_back: Option<KeptBack>,
}

impl Indexed {
    pub(super) fn new(store: External<Catalog>) -> Self {
        Self {
            steps: Vec::new(),
            waiting: BTreeMap::new(),
            files: Files::new(Layout {
                store,
                streams: Vec::new(),
                complete: HashMap::new(),
            }),
            gaps: Vec::new(),
            missing: BTreeMap::new(),
            is_laid_out: false,
            kept_back: None,
        }
    }

    fn streams(&mut self) -> &mut Vec<Stream> {
        &mut self.files.store.streams
    }

    /// Notes that the markers between the index's are data of the file that is current there.
    fn expect(&mut self, markers: Range<u64>, position: &Position) -> Result<()> {
        let Some(&stream) = self.files.current() else {
            bail!(position.error(format_args!(
                "markers {} to {} are not in the index, and belong to no file",
                markers.start,
                markers.end - 1
            )));
        };
        let awaited = Segment::Awaited(markers.clone());
        self.streams()[stream].segments.push_back(awaited);
        self.missing.insert(markers.start, markers.end);
        self.gaps.push(Gap { markers, stream });
        Ok(())
    }

    /// The file with the last of the pages that are not in the index.
    fn last_of_pages(&self) -> Option<usize> {
        let streams = &self.files.store.streams;
        let mut of_pages = self.gaps.iter().filter(|gap| {
            let is_stored = matches!(streams[gap.stream].to, Some(File::Stored(_)));
            is_stored && files::is_pages(streams[gap.stream].name.as_str())
        });
        of_pages.next_back().map(|gap| gap.stream)
    }

    fn is_kept_back(&self, stream: usize) -> bool {
        let kept_back = self.kept_back.as_ref();
        kept_back.is_some_and(|kept_back| kept_back.stream == stream)
    }

    fn stream_of(&self, marker: u64) -> Option<usize> {
        let after = self.gaps.partition_point(|gap| gap.markers.start <= marker);
        let gap = self.gaps[..after].last()?;
        gap.markers.contains(&marker).then_some(gap.stream)
    }

    /// Takes data that came on another shard than the index.
    fn put(&mut self, place: Place, position: &Position, arrived: Arrived) -> Result<()> {
        let Some(stream) = self.stream_of(place.seq) else {
            bail!(position.error(format_args!(
                "marker {} is in the index too, or behind its end",
                place.seq
            )));
        };
        ensure!(
            arrived.next == Next::Part || self.arrive(place.seq),
            position.error(format_args!("marker {} comes a second time", place.seq))
        );
        self.streams()[stream].waiting.insert(place, arrived);
        self.deliver(stream)
    }

    /// Notes that all of a marker's data is here. False if it was before.
    fn arrive(&mut self, marker: u64) -> bool {
        let Some((&start, &end)) = self.missing.range(..=marker).next_back() else {
            return false;
        };
        if marker >= end {
            return false;
        }
        self.missing.remove(&start);
        if start < marker {
            self.missing.insert(start, marker);
        }
        if marker + 1 < end {
            self.missing.insert(marker + 1, end);
        }
        true
    }

    /// Moves on what is in its turn of a file.
    fn deliver(&mut self, number: usize) -> Result<()> {
        while let Some(piece) = self.streams()[number].next_in_turn() {
            let piece = match &mut self.kept_back {
                Some(kept_back) if kept_back.stream == number => kept_back.piece.replace(piece),
                _ => Some(piece),
            };
            if let Some(piece) = piece {
                self.pass_on(number, piece)?;
            }
        }
        let is_kept_back = self.is_kept_back(number);
        let Layout { store, streams, .. } = &mut self.files.store;
        let stream = &mut streams[number];
        if stream.segments.is_empty()
            && !is_kept_back
            && let Some(to) = stream.to.take()
        {
            store.finish(stream.name.clone(), to)?;
        }
        Ok(())
    }

    fn pass_on(&mut self, stream: usize, piece: Piece) -> Result<()> {
        let Layout { store, streams, .. } = &mut self.files.store;
        match &mut streams[stream].to {
            Some(to) => store.append(to, piece),
            None => Ok(()),
        }
    }
}

impl Served for Indexed {
    fn lay_out(&mut self) -> Result<()> {
        let mut next = 0;
        for (place, position, step) in std::mem::take(&mut self.steps) {
            if place.seq > next {
                self.expect(next..place.seq, &position)?;
            }
            next = match self.files.apply(&position, step)? {
                Next::Marker => place.seq.saturating_add(1),
                Next::Part => place.seq,
            };
        }
        self.store().outlets().check_all_begun()?;
        self.is_laid_out = true;
        let last = self.last_of_pages();
        self.kept_back = last.map(|stream| KeptBack {
            stream,
            piece: None,
        });
        for stream in 0..self.streams().len() {
            self.deliver(stream)?;
        }
        for (place, (position, arrived)) in std::mem::take(&mut self.waiting) {
            self.put(place, &position, arrived)?;
        }
        Ok(())
    }

    fn is_laid_out(&self) -> bool {
        self.is_laid_out
    }

    fn keeps_back(&self) -> bool {
        self.kept_back.is_some()
    }

    fn release(&mut self) -> Result<()> {
        if let Some(KeptBack { stream, piece }) = self.kept_back.take() {
            if let Some(piece) = piece {
                self.pass_on(stream, piece)?;
            }
            self.deliver(stream)?;
        }
        Ok(())
    }

    fn wanted(&self, names: &[ImageName]) -> Reading {
        if self.kept_back.is_none() {
            return Reading::All;
        }
        let Layout { store, streams, .. } = &self.files.store;
        let mut last = None;
        for (number, stream) in streams.iter().enumerate() {
            let is_wanted = match &stream.to {
                Some(File::Stored(name)) => names.contains(name),
                Some(File::External(number)) => store.is_starving(*number),
                None => false,
            };
            match stream.segments.front() {
                Some(Segment::Awaited(markers)) if is_wanted => {
                    last = last.max(Some(markers.start));
                }
                // What its reader waits for is kept back until everything is here.
                None if is_wanted && self.is_kept_back(number) => return Reading::All,
                _ => {}
            }
        }
        Reading::UpTo(last)
    }
}

impl Image for Indexed {
    type Store = Catalog;

    fn store(&mut self) -> &mut External<Catalog> {
        &mut self.files.store.store
    }

    fn next(&self) -> Option<Place> {
        let missing = self.missing.first_key_value();
        missing.map(|(&start, _)| Place::of(start))
    }

    fn is_complete(&self) -> bool {
        self.is_laid_out && self.missing.is_empty()
    }

    fn ahead(&self) -> Ahead {
        Ahead::Piece
    }

    fn target(&self, _place: Place) -> Target<'_> {
        Target::Piece
    }

    fn written(&mut self, _bytes: u64, _next: Next) -> Result<()> {
        unreachable!("an image that is served goes to no file")
    }

    fn submit(&mut self, place: Place, position: Position, step: Step) -> Result<()> {
        if position.is_of_index {
            ensure!(
                !self.is_laid_out,
                position.error("something follows the end of the index")
            );
            self.steps.push((place, position, step));
            return Ok(());
        }
        ensure!(
            place.seq > 0,
            position.error("the image has no index: serve it without --index")
        );
        let (piece, next) = match step {
            Step::Data(piece, next) => (Some(piece), next),
            Step::Marker(Body::Data(_)) => (None, Next::Marker),
            Step::Marker(_) => bail!(position.error(format_args!(
                "marker {} belongs in the index: this is a shard of another image",
                place.seq
            ))),
        };
        let arrived = Arrived { piece, next };
        if self.is_laid_out {
            return self.put(place, &position, arrived);
        }
        let blamed = position.clone();
        ensure!(
            self.waiting.insert(place, (position, arrived)).is_none(),
            blamed.error(format_args!("marker {} comes a second time", place.seq))
        );
        Ok(())
    }
}
