//! The end of a capture: the end marker, and readers that take the rest.
//!
//! The capture ends when the readers have taken everything out of the pipes, however long that
//! takes. What is still in a pipe refers to the application's own pages: once our end is reported,
//! the application may go on, and would change them. And a reader that leaves early would look like
//! one that has finished.

use anyhow::{Context, Result};

use super::CaptureLoop;
use super::shard::Shard;
use crate::os::poller::Wait;
use crate::pace::Pace;
use crate::report::progress::Stats;
use crate::report::times::{Phase, Waiting};

impl CaptureLoop<'_> {
    /// Writes the rest of a complete image and its end marker, and waits for the readers.
    ///
    /// # Errors
    /// When a reader leaves before it has everything, and when a signal came.
    pub(super) fn finish(&mut self) -> Result<Stats> {
        // An external file that could not be read looks like one that has ended.
        self.supervisor.check()?;
        let mut pace = Pace::new();
        // CRIU's hook waits for the end, and the application with it.
        if self.request.caller.is_none() && self.request.counters.copied.get() == 0 {
            self.clock.enter(Phase::Written);
        }
        let mut events = Vec::new();
        loop {
            let waited = self.supervisor.poller().wait(Wait::Now, &mut events);
            waited.context("waiting for the shards' readers")?;
            self.handle(&events)?;
            self.is_marked = self.is_marked || self.image_writer.end_image()?;
            // The queues take room as well.
            self.image_writer.flush()?;
            let shards = self.image_writer.shards.iter();
            let are_behind = shards.map(Shard::is_behind).collect::<Result<Vec<_>>>()?;
            if self.is_marked && !are_behind.contains(&true) {
                break;
            }
            self.clock.wait(Waiting::ForShards, are_behind.into_iter());
            pace.nap_longer();
        }
        self.image_writer.warn_of_late_shards();
        Ok(self.image_writer.stats(self.clock.times()))
    }
}
