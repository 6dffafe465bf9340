//! The end of a capture: the end marker, and readers that take the rest.
//!
//! The capture ends when the readers have taken everything out of the pipes, however long that
//! takes. What is still in a pipe refers to the application's own pages: once our end is reported,
//! the application may go on, and would change them. And a reader that leaves early would look like
//! one that has finished.

use anyhow::{Context, Result};

use super::CaptureLoop;
use super::shard::{Flushed, Shard};
use crate::os::poller::{Wait, Watched};
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
        if self.caller.is_none() && self.copied.get() == 0 {
            self.clock.enter(Phase::Written);
        }
        loop {
            // Before there is an end marker to be seen, no reader has seen it all.
            self.check_readers(|_| false)?;
            if self.image_writer.end_image()?.is_some() {
                break;
            }
            // The queues take room as well.
            self.image_writer.flush()?;
            pace.nap_longer();
        }
        self.image_writer.warn_of_late_shards();
        while self.image_writer.flush()? == Flushed::Partly || !self.is_drained()? {
            self.wait_for_readers(&mut pace)?;
        }
        Ok(self.image_writer.stats(self.clock.times()))
    }

    fn wait_for_readers(&mut self, pace: &mut Pace) -> Result<()> {
        let shards = self.image_writer.shards().iter();
        let is_behind = |shard: &Shard| !shard.is_drained().unwrap_or(true);
        self.clock.wait(Waiting::ForShards, shards.map(is_behind));
        pace.nap_longer();
        // A reader may leave when it has seen the end marker; not while something is left for it.
        self.check_readers(|shard| shard.is_drained().unwrap_or(false))
    }

    /// Fails when the reader of a shard has left for which `may_leave` is false, and when a signal
    /// came.
    fn check_readers(&mut self, may_leave: impl Fn(&Shard) -> bool) -> Result<()> {
        let mut events = Vec::new();
        self.supervisor
            .poller()
            .wait(Wait::Now, &mut events)
            .context("waiting for the shards' readers")?;
        for event in events {
            match event.kind {
                Watched::Interrupt | Watched::Caller => self.supervisor.check()?,
                Watched::Shard if event.hung_up => {
                    let shard = &self.image_writer.shards()[event.id as usize];
                    if !may_leave(shard) {
                        return Err(shard.reader_gone());
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// True when the readers have taken everything.
    fn is_drained(&self) -> Result<bool> {
        for shard in self.image_writer.shards() {
            if !shard
                .is_drained()
                .with_context(|| format!("waiting for the reader of {}", shard.label()))?
            {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
