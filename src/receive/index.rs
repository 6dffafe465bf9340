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
//! follows it, and all that brought it has ended well ([`Indexed::release`]). It comes last anyway.
//! The last piece of a file that has any bytes shows only at the file's end, as a chunk may be
//! empty: of that file one piece is always kept back, until another follows it.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;

use anyhow::{Result, anyhow, bail, ensure};

use super::Reading;
use super::assembly::{Image, Position, Step};
use super::order::{Behind, Place};
use crate::criu::files;
use crate::format::{Body, ImageName};
use crate::store::catalog::Catalog;
use crate::store::external::ExternalOutputs;
use crate::store::{Ahead, Piece, Target};

/// Small pieces of data that may wait for the index; some 100 bytes each. A stream of nothing but
/// these must not fill the memory. Of others, as a capture makes them, what is left of the memory
/// is the limit: an index that is made while the rest is sent ends last.
const MOST_WAITING: usize = 1 << 20;

/// Less than this number of bytes is small.
const SMALL: usize = 16 << 10;

/// A piece of a file's data, and what comes behind it.
#[derive(Debug)]
struct Arrived {
    /// `None` for a chunk without data.
    piece: Option<Piece>,
    behind: Behind,
}

/// A part of a file, in its order.
#[derive(Debug)]
enum Segment {
    /// From the index.
    Piece(Piece),
    /// Markers that other shards bring.
    Awaited(Range<u64>),
}

/// Where a file goes.
#[derive(Debug)]
enum Destination {
    Catalog(ImageName),
    External(usize),
    /// A later file of the same name replaced it.
    Nowhere,
}

/// One file in the making.
#[derive(Debug)]
struct Stream {
    to: Destination,
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
            match arrived.behind {
                Behind::Part => self.part += 1,
                Behind::Marker => {
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

/// An image whose index is read first.
pub(super) struct Indexed {
    catalog: Catalog,
    outlets: ExternalOutputs,
    labels: Vec<String>,
    /// The shard that is the index, once that is known.
    index: Option<usize>,
    /// What the index says, until all of it is here.
    steps: Vec<(Place, Step)>,
    /// Whether the index has said everything.
    is_read: bool,
    /// What came on other shards before.
    waiting: BTreeMap<Place, (Position, Arrived)>,
    /// How many of these are small.
    small_waiting: usize,
    streams: Vec<Stream>,
    /// In the order of their markers.
    gaps: Vec<Gap>,
    /// The markers that have not come yet.
    missing: BTreeMap<u64, u64>,
    is_laid_out: bool,
    /// Until it is released.
    kept_back: Option<KeptBack>,
    /// Bytes that came for no one: of files that later ones replaced.
    unwanted: u64,
}

impl Indexed {
    /// `labels` names the shards in errors.
    pub(super) fn new(outlets: ExternalOutputs, labels: Vec<String>) -> Self {
        Self {
            catalog: Catalog::new(),
            outlets,
            labels,
            index: None,
            steps: Vec::new(),
            is_read: false,
            waiting: BTreeMap::new(),
            small_waiting: 0,
            streams: Vec::new(),
            gaps: Vec::new(),
            missing: BTreeMap::new(),
            is_laid_out: false,
            kept_back: None,
            unwanted: 0,
        }
    }

    pub(super) fn catalog(&mut self) -> &mut Catalog {
        &mut self.catalog
    }

    /// The shard that is the index, once that is known.
    pub(super) fn index(&self) -> Option<usize> {
        self.index
    }

    /// Whether the end of the image was read from the index.
    pub(super) fn is_read(&self) -> bool {
        self.is_read
    }

    /// Whether the files are known.
    pub(super) fn is_laid_out(&self) -> bool {
        self.is_laid_out
    }

    /// Whether there is something that CRIU cannot do without, and does not get yet.
    pub(super) fn keeps_back(&self) -> bool {
        self.kept_back.is_some()
    }

    /// Bytes of data that came, and that no one wants.
    pub(super) fn unwanted(&self) -> u64 {
        self.unwanted + self.catalog.unwanted()
    }

    /// Finds out from the whole index which files there are, and what is missing of them.
    ///
    /// # Errors
    /// When the index makes no sense.
    pub(super) fn lay_out(&mut self) -> Result<()> {
        let mut open: HashMap<ImageName, usize> = HashMap::new();
        let mut complete: HashMap<ImageName, usize> = HashMap::new();
        let mut current: Option<(ImageName, usize)> = None;
        let mut next = 0;
        for (place, step) in std::mem::take(&mut self.steps) {
            if place.seq > next {
                let markers = next..place.seq;
                let Some((_, stream)) = current else {
                    bail!(self.index_error(format_args!(
                        "markers {} to {} are not in it, and belong to no file",
                        markers.start,
                        markers.end - 1
                    )));
                };
                let awaited = Segment::Awaited(markers.clone());
                self.streams[stream].segments.push_back(awaited);
                self.missing.insert(markers.start, markers.end);
                self.gaps.push(Gap { markers, stream });
            }
            let mut behind = Behind::Marker;
            match step {
                Step::Marker(Body::File(name)) => {
                    open.extend(current.take());
                    let stream = match open.remove(&name) {
                        Some(stream) => stream,
                        None => self.begin(&name)?,
                    };
                    current = Some((name, stream));
                }
                Step::Data(piece, more) => {
                    behind = more;
                    match current {
                        Some((_, stream)) => {
                            let segments = &mut self.streams[stream].segments;
                            segments.push_back(Segment::Piece(piece));
                        }
                        None => bail!(self.index_error("data comes before the name of its file")),
                    }
                }
                Step::Marker(Body::Data(_)) => {}
                Step::Marker(Body::FileEnd) => {
                    let Some((name, stream)) = current.take() else {
                        bail!(self.index_error("a file ends before it was named"));
                    };
                    if let Some(earlier) = complete.insert(name, stream) {
                        self.streams[earlier].to = Destination::Nowhere;
                    }
                }
                Step::Marker(Body::ImageEnd) => {
                    if let Some(name) = current
                        .iter()
                        .map(|(name, _)| name)
                        .chain(open.keys())
                        .min()
                    {
                        bail!(self.index_error(format_args!(
                            "the image ends, but its file {name} does not"
                        )));
                    }
                }
            }
            next = match behind {
                Behind::Marker => place.seq.saturating_add(1),
                Behind::Part => place.seq,
            };
        }
        self.outlets.check_complete_after(complete.keys())?;
        self.is_laid_out = true;
        let last = self.last_of_pages();
        self.kept_back = last.map(|stream| KeptBack {
            stream,
            piece: None,
        });
        for stream in 0..self.streams.len() {
            if let Destination::Catalog(name) = &self.streams[stream].to {
                self.catalog.begin(name.clone());
            }
            self.deliver(stream)?;
        }
        self.small_waiting = 0;
        for (place, (position, arrived)) in std::mem::take(&mut self.waiting) {
            self.put(place, position, arrived)?;
        }
        Ok(())
    }

    fn begin(&mut self, name: &ImageName) -> Result<usize> {
        let to = match self.outlets.begin(name)? {
            Some(number) => Destination::External(number),
            None => Destination::Catalog(name.clone()),
        };
        self.streams.push(Stream {
            to,
            segments: VecDeque::new(),
            part: 0,
            waiting: BTreeMap::new(),
        });
        Ok(self.streams.len() - 1)
    }

    /// The file with the last of the pages that are not in the index.
    fn last_of_pages(&self) -> Option<usize> {
        let mut of_pages = self
            .gaps
            .iter()
            .filter(|gap| match &self.streams[gap.stream].to {
                Destination::Catalog(name) => files::is_pages(name.as_str()),
                Destination::External(_) | Destination::Nowhere => false,
            });
        of_pages.next_back().map(|gap| gap.stream)
    }

    /// Gives CRIU the last of the pages: the image has proved whole.
    ///
    /// # Errors
    /// Those of `splice`; none for pipes of ours.
    pub(super) fn release(&mut self) -> Result<()> {
        if let Some(KeptBack { stream, piece }) = self.kept_back.take() {
            if let Some(piece) = piece {
                self.pass_on(stream, piece)?;
            }
            self.deliver(stream)?;
        }
        Ok(())
    }

    /// What is to be read for these files, whose readers have nothing left, and for external files
    /// with such readers: up to the last of the markers that they need next.
    pub(super) fn wanted<'a>(&self, files: impl Iterator<Item = &'a ImageName>) -> Reading {
        let files: Vec<_> = files.collect();
        let mut last = None;
        for (number, stream) in self.streams.iter().enumerate() {
            let is_wanted = match &stream.to {
                Destination::Catalog(name) => files.contains(&name),
                Destination::External(number) => self.outlets.is_starving(*number),
                Destination::Nowhere => false,
            };
            if !is_wanted {
                continue;
            }
            match stream.segments.front() {
                Some(Segment::Awaited(markers)) => last = last.max(Some(markers.start)),
                Some(Segment::Piece(_)) => {}
                // What its reader waits for is kept back until everything is here.
                None if self.is_kept_back(number) => return Reading::All,
                None => {}
            }
        }
        Reading::UpTo(last)
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
    fn put(&mut self, place: Place, position: Position, arrived: Arrived) -> Result<()> {
        let Some(stream) = self.stream_of(place.seq) else {
            bail!(self.error(
                position,
                format_args!(
                    "marker {} is in the index too, or behind its end",
                    place.seq
                )
            ));
        };
        if arrived.behind == Behind::Marker && !self.arrive(place.seq) {
            bail!(self.error(
                position,
                format_args!("marker {} comes a second time", place.seq)
            ));
        }
        self.streams[stream].waiting.insert(place, arrived);
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
        while let Some(piece) = self.streams[number].next_in_turn() {
            let piece = match &mut self.kept_back {
                Some(kept_back) if kept_back.stream == number => kept_back.piece.replace(piece),
                _ => Some(piece),
            };
            if let Some(piece) = piece {
                self.pass_on(number, piece)?;
            }
        }
        let stream = &self.streams[number];
        if stream.segments.is_empty() && !self.is_kept_back(number) {
            match &stream.to {
                Destination::Catalog(name) => self.catalog.end(name),
                Destination::External(number) => self.outlets.finish(*number),
                Destination::Nowhere => {}
            }
        }
        Ok(())
    }

    fn pass_on(&mut self, stream: usize, piece: Piece) -> Result<()> {
        match &self.streams[stream].to {
            Destination::Catalog(name) => self.catalog.add(name, piece)?,
            Destination::External(number) => self.outlets.append(*number, piece)?,
            Destination::Nowhere => self.unwanted += piece.len() as u64,
        }
        Ok(())
    }

    fn index_error(&self, what: impl std::fmt::Display) -> anyhow::Error {
        let index = self.index.map_or("the index", |index| &self.labels[index]);
        anyhow!("reading {index}, the index of the image: {what}")
    }

    fn error(&self, position: Position, what: impl std::fmt::Display) -> anyhow::Error {
        position.error(&self.labels, what)
    }
}

impl Image for Indexed {
    fn next(&self) -> Option<Place> {
        let missing = self.missing.first_key_value();
        missing.map(|(&start, _)| Place::of(start))
    }

    fn is_complete(&self) -> bool {
        self.is_laid_out && self.missing.is_empty()
    }

    fn outlets(&mut self) -> &mut ExternalOutputs {
        &mut self.outlets
    }

    fn is_far_ahead(&self, _stalled: bool) -> bool {
        self.small_waiting >= MOST_WAITING
    }

    fn waiting_bytes(&self) -> usize {
        0
    }

    fn ahead(&self) -> Ahead {
        Ahead::Piece
    }

    fn target(&self, _place: Place) -> Option<Target<'_>> {
        Some(Target::Piece)
    }

    fn current(&self) -> String {
        "the image".into()
    }

    fn written(&mut self, _bytes: u64, _behind: Behind) -> Result<()> {
        bail!("an image that is served goes to no file")
    }

    fn has_index(&self) -> bool {
        self.index.is_some()
    }

    fn awaited_index(&self) -> Option<usize> {
        self.index.filter(|_| !self.is_read)
    }

    /// The index is needed for everything else.
    fn keeps(&self, shard: usize) -> bool {
        self.index == Some(shard)
    }

    fn is_index(&mut self, shard: usize) -> Result<()> {
        ensure!(
            self.index.is_none(),
            "reading {}: it begins like an index, and so does another shard",
            self.labels[shard]
        );
        self.index = Some(shard);
        Ok(())
    }

    fn submit(&mut self, place: Place, position: Position, step: Step) -> Result<()> {
        if self.index == Some(position.shard) {
            ensure!(
                !self.is_read,
                self.error(position, "something follows the end of the index")
            );
            self.is_read = matches!(step, Step::Marker(Body::ImageEnd));
            self.steps.push((place, step));
            return Ok(());
        }
        ensure!(
            place.seq > 0,
            self.error(position, "the image has no index: serve it without --index")
        );
        let arrived = match step {
            Step::Data(piece, behind) => Arrived {
                piece: Some(piece),
                behind,
            },
            Step::Marker(Body::Data(_)) => Arrived {
                piece: None,
                behind: Behind::Marker,
            },
            Step::Marker(_) => bail!(self.error(
                position,
                format_args!(
                    "marker {} belongs in the index: this is a shard of another image",
                    place.seq
                )
            )),
        };
        if self.is_laid_out {
            return self.put(place, position, arrived);
        }
        let is_small = arrived
            .piece
            .as_ref()
            .is_none_or(|piece| piece.len() < SMALL);
        self.small_waiting += usize::from(is_small);
        if self.waiting.insert(place, (position, arrived)).is_some() {
            bail!(self.error(
                position,
                format_args!("marker {} comes a second time", place.seq)
            ));
        }
        Ok(())
    }
}
