//! An image with an index, seen by those who serve it while it arrives.

use std::time::Instant;

use anyhow::Result;

use super::assembly::Image;
use super::index::Indexed;
use super::reader::Reader;
use super::{END_PATIENCE, Reading, Receiver};
use crate::format::ImageName;
use crate::os::pipe::{ReadEnd, WriteEnd};
use crate::os::poller::Event;
use crate::pace::Activity;
use crate::report::meter::Counters;
use crate::report::progress::Stats;
use crate::store::catalog::Catalog;
use crate::store::external::ExternalOutputs;
use crate::supervision::Supervisor;

/// An image with an index that is served while it arrives.
pub(crate) struct Arriving<'a> {
    receiver: Receiver<'a, Indexed>,
    /// Until when the end of the index is waited for.
    index_end_by: Option<Instant>,
}

impl<'a> Arriving<'a> {
    /// Receives from these shards, of which one is the index.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub(crate) fn new(
        shards: Vec<(ReadEnd, String)>,
        external_files: Vec<(ImageName, WriteEnd)>,
        counters: &Counters,
        supervisor: &'a Supervisor,
    ) -> Result<Self> {
        let outlets = ExternalOutputs::new(external_files, supervisor.poller())?;
        let image = |labels| Indexed::new(outlets, labels);
        Ok(Self {
            receiver: Receiver::new(shards, image, counters, supervisor)?,
            index_end_by: None,
        })
    }

    /// Acts on events, and takes what the shards have.
    ///
    /// # Errors
    /// When the image is damaged or incomplete, and when a signal came.
    pub(crate) fn step(&mut self, events: &[Event], reading: Reading) -> Result<Activity> {
        let activity = self.receiver.step(events, reading)?;
        let end = self
            .index_end_by
            .filter(|_| !self.receiver.image.is_laid_out());
        Ok(match activity {
            Activity::Idle(wait) => Activity::Idle(wait.or_until(end).or_until(self.end_by())),
            busy => busy,
        })
    }

    fn end_by(&self) -> Option<Instant> {
        self.receiver.end_by.filter(|&end| end > Instant::now())
    }

    /// The number of the index, once all of it was read and its shard has ended, or was given the
    /// time to.
    pub(crate) fn index(&mut self) -> Option<usize> {
        let index = self.receiver.image.index()?;
        if !self.receiver.image.is_read() {
            return None;
        }
        let now = Instant::now();
        let end = *self.index_end_by.get_or_insert(now + END_PATIENCE);
        let has_ended = self.receiver.shards[index].has_ended();
        (has_ended || now >= end).then_some(index)
    }

    /// Finds out from the index which files there are.
    ///
    /// # Errors
    /// When the index makes no sense.
    pub(crate) fn lay_out(&mut self) -> Result<()> {
        self.receiver.image.lay_out()
    }

    pub(crate) fn catalog(&mut self) -> &mut Catalog {
        self.receiver.image.catalog()
    }

    /// Whether all of the image has come, and nothing follows it.
    ///
    /// # Errors
    /// When something does.
    pub(crate) fn is_whole(&mut self) -> Result<bool> {
        Ok(self.receiver.image.is_complete() && self.receiver.have_ended()?)
    }

    /// Gives CRIU the last of the pages.
    ///
    /// # Errors
    /// Those of `splice`; none for pipes of ours.
    pub(crate) fn release(&mut self) -> Result<()> {
        self.receiver.image.release()
    }

    /// Whether readers of external files still have to take something.
    pub(crate) fn is_sending(&mut self) -> bool {
        self.receiver.image.outlets().is_sending()
    }

    /// What is to be read for CRIU, which waits for these files, and for readers of external files.
    pub(crate) fn wanted<'b>(&self, files: impl Iterator<Item = &'b ImageName>) -> Reading {
        self.receiver.image.wanted(files)
    }

    /// Bytes of data that have come, less those that no one wants, and those that readers of
    /// external files have taken.
    pub(crate) fn kept(&mut self) -> u64 {
        let data: u64 = self.receiver.shards.iter().map(Reader::data).sum();
        let image = &mut self.receiver.image;
        data.saturating_sub(image.outlets().sent() + image.unwanted())
    }

    /// Whether there is something that CRIU cannot do without, and does not get yet.
    pub(crate) fn keeps_back(&self) -> bool {
        self.receiver.image.keeps_back()
    }

    pub(crate) fn stats(&self) -> Stats {
        self.receiver.stats()
    }
}
